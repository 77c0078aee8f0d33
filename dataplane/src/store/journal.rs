//! Journal: the ring of batches in which every record becomes durable.
//!
//! Queues records, forms one batch of those queued at the end of a turn, and tells when a prefix of the ring is
//! complete or flushed. Driven by `engine`; applies nothing and knows no index.
//!
//! Invariants
//! - `tail <= flushed <= durable <= head` but for `flushed`, which may stay below `tail`; none ever goes back.
//! - `durable` grows only over batches that are all complete, in the order of their positions.
//! - A batch never wraps: what would not fit before the ring's end starts at the next lap.
//! - What is queued fits (`has_room` was asked), with what a batch may have to jump over.
//! - Bytes from `tail` to `head` (a lap at most) are never written again.

use std::collections::VecDeque;
use std::sync::Arc;

use xsan_protocol::disk::journal::{
    BatchHeader, DATA_PAGES_MAX, DESCRIPTORS_MAX, Descriptor, HeadWriter, Kind, head_bytes,
};
use xsan_protocol::ids::{BlockKey, GroupId, Seq, StoreId, Version};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PAGE_SIZE, PageRange};

use super::carry::CarryPlace;
use super::{Entry, PageData, Record};
use crate::disk::buffers::{Buffer, BufferPool};

/// Batches in flight at once.
pub const BATCHES_MAX: usize = 4;

/// A record in a batch, as its completion needs it.
#[derive(Debug)]
pub enum Placed {
    Entry {
        group: GroupId,
        seq: Seq,
        /// Which life of the group (counted by resets) the entry is of.
        life: u32,
    },
    Carry {
        group: GroupId,
        carry: u32,
        place: CarryPlace,
    },
    Carried {
        group: GroupId,
        carry: u32,
    },
    Push {
        token: u64,
        position: u64,
        group: GroupId,
        key: BlockKey,
        pages: PageRange,
        version: Version,
        as_of: Seq,
        life: u32,
        data: Option<(u64, Arc<[u32]>)>,
    },
    Reset {
        position: u64,
        group: GroupId,
        last: Version,
        life: u32,
    },
}

/// What may wait for its batch.
#[derive(Debug)]
pub enum Item {
    Record(Record),
    /// An entry that the journal has already, once more; of the carry of its group with this number.
    Carry(Entry, u32),
    /// That carry is complete: from `start` on, of the entries above `after`.
    Carried {
        group: GroupId,
        carry: u32,
        after: Seq,
        start: u64,
    },
}

impl Item {
    fn group(&self) -> GroupId {
        match self {
            Self::Record(record) => record.group(),
            Self::Carry(entry, _) => entry.group,
            Self::Carried { group, .. } => *group,
        }
    }

    fn data(&self) -> Option<&PageData> {
        match self {
            Self::Record(Record::Entry(entry)) | Self::Carry(entry, _) => entry.data.as_ref(),
            Self::Record(Record::Push { data, .. }) => data.as_ref(),
            Self::Record(Record::Reset { .. }) | Self::Carried { .. } => None,
        }
    }

    fn into_data(self) -> Option<PageData> {
        match self {
            Self::Record(Record::Entry(entry)) | Self::Carry(entry, _) => entry.data,
            Self::Record(Record::Push { data, .. }) => data,
            Self::Record(Record::Reset { .. }) | Self::Carried { .. } => None,
        }
    }
}

/// An item waiting for its batch.
#[derive(Debug)]
pub struct Queued {
    pub item: Item,
    pub life: u32,
    /// For a reset: what the group had applied before. Replay drops what comes above it and before the reset.
    pub applied: Seq,
}

impl Queued {
    fn data(&self) -> Option<&PageData> {
        self.item.data()
    }

    fn data_pages(&self) -> usize {
        self.data().map_or(0, |data| data.checksums.len())
    }

    fn descriptor(&self, data_page: u32) -> Descriptor {
        let has_data = self.data().is_some();
        let none = Descriptor {
            kind: Kind::Reset,
            group: self.item.group(),
            version: Version::ZERO,
            acked: Seq(0),
            key: BlockKey::default(),
            pages: PageRange::of_unit(0),
            previous_first: Version::ZERO,
            previous_last: Version::ZERO,
            data_page: if has_data { data_page } else { 0 },
            start: 0,
            lost: 0,
        };
        match &self.item {
            Item::Record(Record::Entry(entry)) => {
                let kind = if has_data { Kind::Write } else { Kind::Zero };
                Descriptor { kind, ..of_entry(entry, none) }
            }
            Item::Carry(entry, _) => {
                let kind = if has_data { Kind::Carry } else { Kind::CarryZero };
                Descriptor { kind, ..of_entry(entry, none) }
            }
            Item::Record(Record::Push { key, unit, version, as_of, lost, .. }) => Descriptor {
                kind: if has_data { Kind::Push } else { Kind::PushZero },
                version: *version,
                acked: *as_of,
                key: *key,
                pages: PageRange::of_unit(*unit),
                lost: if has_data { *lost } else { 0 },
                ..none
            },
            Item::Record(Record::Reset { last, .. }) => {
                Descriptor { kind: Kind::Reset, version: *last, acked: self.applied, ..none }
            }
            Item::Carried { after, start, .. } => {
                Descriptor { kind: Kind::Carried, acked: *after, start: *start, ..none }
            }
        }
    }
}

fn of_entry(entry: &Entry, none: Descriptor) -> Descriptor {
    Descriptor {
        version: entry.version,
        acked: entry.acked,
        key: entry.key,
        pages: entry.pages,
        previous_first: entry.previous_first,
        previous_last: entry.previous_last,
        ..none
    }
}

#[derive(Debug)]
struct Batch {
    position: u64,
    end: u64,
    done: bool,
    placed: Vec<Placed>,
}

/// A batch ready for the device.
#[derive(Debug)]
pub struct NewBatch {
    pub position: u64,
    pub parts: Vec<Buffer>,
    pub bytes: usize,
    /// Data of entries and pushes; not what is there once more.
    pub data_bytes: usize,
}

/// What `Journal::withdraw` has taken back beside entries.
#[derive(Debug, Default)]
pub struct TakenBack {
    /// Tokens of pushes.
    pub pushes: Vec<u64>,
    /// Records of a carry.
    pub carry: bool,
}

#[derive(Debug)]
pub struct Journal {
    store: StoreId,
    session: u64,
    ring_bytes: u64,
    batch_bytes_max: usize,
    pub tail: u64,
    pub head: u64,
    /// End of the newest batch: `head`, or below it after a jump.
    previous_end: u64,
    pub durable: u64,
    pub flushed: u64,
    queue: VecDeque<Queued>,
    queued_pages: usize,
    in_flight: VecDeque<Batch>,
}

/// State of a journal at open.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    pub store: StoreId,
    pub session: u64,
    pub ring_bytes: u64,
    pub batch_bytes_max: usize,
    pub tail: u64,
    pub head: u64,
}

impl Journal {
    pub fn new(start: Start) -> Self {
        assert!(start.tail <= start.head);
        assert!(start.head - start.tail <= start.ring_bytes);
        Self {
            store: start.store,
            session: start.session,
            ring_bytes: start.ring_bytes,
            batch_bytes_max: start.batch_bytes_max,
            tail: start.tail,
            head: start.head,
            previous_end: start.head,
            durable: start.head,
            flushed: start.head,
            queue: VecDeque::new(),
            queued_pages: 0,
            in_flight: VecDeque::new(),
        }
    }

    pub fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Bytes that hold something needed, or will when what is queued is written.
    pub fn used_bytes(&self) -> u64 {
        self.head - self.tail + self.queued_bytes()
    }

    /// What is queued takes no more.
    fn queued_bytes(&self) -> u64 {
        // A head page a record is far more than batches need, and at depth one what they need.
        ((self.queued_pages + self.queue.len()) * PAGE_SIZE) as u64
    }

    /// Would `pages` more, heads included, leave `reserve` bytes?
    pub fn has_room(&self, pages: usize, reserve: u64) -> bool {
        let wanted = self.queued_bytes() + (pages * PAGE_SIZE) as u64 + reserve;
        let left_of_lap = self.ring_bytes - self.head % self.ring_bytes;
        let jump = if wanted > left_of_lap { self.batch_bytes_max as u64 } else { 0 };
        self.head - self.tail + wanted + jump <= self.ring_bytes
    }

    pub fn is_quiet(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty()
    }

    /// The store has failed: nothing more is written.
    pub fn discard_queued(&mut self) {
        self.queue.clear();
        self.queued_pages = 0;
    }

    /// Takes back the entries and pushes of a group that no batch has yet, and its carry as far as no batch has that.
    pub fn withdraw(&mut self, group: GroupId) -> TakenBack {
        let mut taken = TakenBack::default();
        let pages = &mut self.queued_pages;
        self.queue.retain(|queued| {
            match &queued.item {
                item if item.group() != group => return true,
                Item::Record(Record::Entry(_)) => {}
                Item::Carry(..) => taken.carry = true,
                Item::Record(Record::Push { token, .. }) => taken.pushes.push(*token),
                Item::Record(Record::Reset { .. }) | Item::Carried { .. } => return true,
            }
            *pages -= queued.data_pages();
            false
        });
        taken
    }

    pub fn push(&mut self, queued: Queued) {
        self.queued_pages += queued.data_pages();
        self.queue.push_back(queued);
    }

    /// Records at the front of the queue that make one batch, and their data pages.
    fn batch_size(&self) -> (usize, usize) {
        let (mut records, mut pages) = (0, 0);
        for queued in self.queue.iter().take(DESCRIPTORS_MAX) {
            let more = pages + queued.data_pages();
            let bytes = head_bytes(records + 1, more) + more * PAGE_SIZE;
            if records > 0 && (bytes > self.batch_bytes_max || more > DATA_PAGES_MAX) {
                break;
            }
            (records, pages) = (records + 1, more);
        }
        (records, pages)
    }

    /// Forms a batch of what is queued, unless enough are in flight, or there is no buffer; `place` learns where each record and its
    /// data went.
    pub fn next_batch(
        &mut self,
        pool: &'static BufferPool,
        mut place: impl FnMut(&Queued, u64, u64) -> Placed,
    ) -> Option<NewBatch> {
        if self.queue.is_empty() || self.in_flight.len() == BATCHES_MAX {
            return None;
        }
        let (records, data_pages) = self.batch_size();
        let head_size = head_bytes(records, data_pages);
        let bytes = head_size + data_pages * PAGE_SIZE;
        assert!(bytes <= self.batch_bytes_max);
        let left_of_lap = self.ring_bytes - self.head % self.ring_bytes;
        let jump = if left_of_lap < bytes as u64 { left_of_lap } else { 0 };
        let position = self.head + jump;
        let end = position + bytes as u64;
        assert!(end - self.tail <= self.ring_bytes, "what is queued had room");
        let mut head = pool.alloc(head_size)?;
        let header = BatchHeader {
            store: self.store,
            position,
            previous_end: self.previous_end,
            flushed: self.flushed,
            durable: self.durable,
            session: self.session,
            descriptor_count: records as u32,
            data_pages: data_pages as u32,
        };
        let mut writer = HeadWriter::new(header, &mut head);
        let mut placed = Vec::with_capacity(records);
        let mut parts = Vec::with_capacity(records + 1);
        let (mut page, mut carried) = (0, 0);
        for (index, queued) in self.queue.drain(..records).enumerate() {
            let checksums: &[u32] = queued.data().map_or(&[], |data| &data.checksums);
            writer.push(&queued.descriptor(page), checksums);
            let data_position = position + head_size as u64 + u64::from(page) * PAGE_SIZE as u64;
            placed.push(place(&queued, position + index as u64, data_position));
            page += queued.data_pages() as u32;
            carried += if matches!(queued.item, Item::Carry(..)) { queued.data_pages() } else { 0 };
            parts.extend(queued.item.into_data().map(|data| data.bytes));
        }
        writer.finish();
        parts.insert(0, head.freeze());
        self.queued_pages -= data_pages;
        self.in_flight.push_back(Batch { position, end, done: false, placed });
        self.head = end;
        self.previous_end = end;
        Some(NewBatch { position, parts, bytes, data_bytes: (data_pages - carried) * PAGE_SIZE })
    }

    /// The device has written the batch at `position`. Hands out what became durable, in order.
    pub fn on_written(&mut self, position: u64, mut durable: impl FnMut(Placed)) {
        let batch = self.in_flight.iter_mut().find(|batch| batch.position == position);
        let batch = batch.expect("only batches in flight complete");
        batch.done = true;
        if Mutation::JournalOutOfOrder.is_on() {
            std::mem::take(&mut batch.placed).into_iter().for_each(&mut durable);
        }
        while self.in_flight.front().is_some_and(|batch| batch.done) {
            let batch = self.in_flight.pop_front().expect("looked at above");
            assert!(self.durable < batch.end);
            self.durable = batch.end;
            batch.placed.into_iter().for_each(&mut durable);
        }
    }

    /// Everything below `covered` is on stable media.
    pub fn on_flushed(&mut self, covered: u64) {
        assert!(covered <= self.durable);
        self.flushed = self.flushed.max(covered);
    }

    /// Batches below `tail` are not needed any more.
    pub fn release(&mut self, tail: u64) {
        assert!(tail >= self.tail);
        assert!(tail <= self.durable);
        self.tail = tail;
    }
}
