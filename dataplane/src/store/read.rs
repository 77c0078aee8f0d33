//! Reading pages, each verified against its checksum, and mending those that are damaged.
//!
//! A request that lies in one piece on one device is read straight into the caller's buffer; one in several pieces is
//! put together. The index may change while the device reads (an entry is applied, a block destaged, the place
//! reused): a page that does not match is damaged only if it is still where it was looked for; otherwise the
//! request is read again from where its pages are now.
//!
//! Invariants
//! - No byte leaves here that did not match the checksum its page had when its place was looked up.
//! - Repairs are under way only while no destage cycle is: neither writes what the other is writing, and the
//!   journal is not freed under a repair.

use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};

use xsan_protocol::checksum::crc32c;
use xsan_protocol::ids::{BlockKey, GroupId};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PAGE_SIZE, PageRange};

use super::engine::{Operation, Store, mismatches, read_buffer};
use super::index::{MixMap, Place};
use super::{PageData, ReadError, ReadPages, StoreEvent};
use crate::disk::buffers::BufferMut;
use crate::io::{DeviceRole, DiskAction, DiskError, DiskOk};

/// Times a request is read again because its pages moved, before they count as damaged.
const ATTEMPTS_MAX: u32 = 16;

/// CRC32C of a page of zeroes.
static ZERO_CHECKSUM: LazyLock<u32> = LazyLock::new(|| crc32c(&[0; PAGE_SIZE]));

/// Pages of a request that lie one behind the other on one device.
#[derive(Clone, Copy, Debug)]
struct Segment {
    /// First page, counted from the start of the request.
    first: u16,
    count: u16,
    device: DeviceRole,
    offset: u64,
}

#[derive(Debug)]
struct Reading {
    token: u64,
    group: GroupId,
    key: BlockKey,
    pages: PageRange,
    /// `None` while the device fills it (or after it was lost to a failed read).
    buffer: Option<BufferMut>,
    places: Vec<Place>,
    expected: Arc<[u32]>,
    segments: Vec<Segment>,
    /// Segments under way.
    left: usize,
    damaged: Vec<u16>,
    attempts: u32,
    again: bool,
    /// Read page by page, because a longer read failed: one bad sector is one damaged page.
    singly: bool,
}

#[derive(Debug)]
struct Repair {
    token: u64,
    group: GroupId,
    key: BlockKey,
    pages: PageRange,
    data: PageData,
    left: usize,
}

#[derive(Debug, Default)]
pub struct Reads {
    reads: MixMap<u64, Reading>,
    next_read: u64,
    /// Reads that wait for a buffer.
    stalled: VecDeque<u64>,
    waiting_repairs: VecDeque<Repair>,
    repairs: MixMap<u64, Repair>,
}

impl Reads {
    /// No repair is under way: destage may write.
    pub fn no_repairs(&self) -> bool {
        self.repairs.is_empty()
    }

    pub fn repairs_waiting(&self) -> bool {
        !self.waiting_repairs.is_empty()
    }
}

impl Store {
    /// Reads `pages` into `buffer`; ends with `ReadDone { token }`. What is not allocated is zero and not read
    /// from the device: `StoreView::allocated` tells beforehand.
    ///
    /// # Panics
    /// A buffer of another length: our bug.
    pub fn read(&mut self, token: u64, group: GroupId, key: BlockKey, pages: PageRange, buffer: BufferMut) {
        assert!(buffer.len() == pages.bytes());
        if self.failed {
            self.events.push(StoreEvent::ReadDone { token, result: Err(ReadError::Failed) });
            return;
        }
        let number = self.reads.next_read;
        self.reads.next_read += 1;
        let reading = Reading {
            token,
            group,
            key,
            pages,
            buffer: Some(buffer),
            places: Vec::with_capacity(usize::from(pages.count)),
            expected: Arc::default(),
            segments: Vec::new(),
            left: 0,
            damaged: Vec::new(),
            attempts: 0,
            again: false,
            singly: false,
        };
        self.start_read(number, reading);
    }

    /// Looks up the pages and issues the reads, or puts the request aside until there are buffers.
    fn start_read(&mut self, number: u64, mut reading: Reading) {
        reading.places.clear();
        self.index.places(reading.group, reading.key, reading.pages, |_, place| reading.places.push(place));
        let checksum = |place: &Place| match place {
            Place::Zero => *ZERO_CHECKSUM,
            Place::Journal { checksum, .. } | Place::Capacity { checksum, .. } => *checksum,
        };
        reading.expected = reading.places.iter().map(checksum).collect();
        reading.segments = self.segments(&reading.places, reading.singly);
        reading.damaged.clear();
        reading.again = false;
        if reading.buffer.is_none() {
            reading.buffer = self.pool.alloc(reading.pages.bytes());
        }
        let Some(mut buffer) = reading.buffer.take() else { return self.stall(number, reading) };
        if let [segment] = reading.segments[..]
            && segment.count == reading.pages.count
        {
            reading.left = 1;
            self.issue_read(number, 0, segment, buffer);
            self.reads.reads.insert(number, reading);
            return;
        }
        let lengths = reading.segments.iter().map(|segment| usize::from(segment.count) * PAGE_SIZE);
        let parts: Option<Vec<BufferMut>> = lengths.map(|length| self.pool.alloc(length)).collect();
        let Some(parts) = parts else {
            reading.buffer = Some(buffer);
            return self.stall(number, reading);
        };
        for (place, page) in reading.places.iter().zip(buffer.chunks_exact_mut(PAGE_SIZE)) {
            if *place == Place::Zero {
                page.fill(0);
            }
        }
        reading.buffer = Some(buffer);
        reading.left = parts.len();
        for (index, part) in parts.into_iter().enumerate() {
            self.issue_read(number, index, reading.segments[index], part);
        }
        if reading.left == 0 {
            return self.finish_read(reading);
        }
        self.reads.reads.insert(number, reading);
    }

    fn segments(&self, places: &[Place], singly: bool) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        for (page, place) in places.iter().enumerate() {
            let Some((device, offset)) = self.source(*place) else { continue };
            if let Some(last) = segments.last_mut()
                && !singly
                && last.device == device
                && usize::from(last.first + last.count) == page
                && last.offset + u64::from(last.count) * PAGE_SIZE as u64 == offset
            {
                last.count += 1;
            } else {
                segments.push(Segment { first: page as u16, count: 1, device, offset });
            }
        }
        segments
    }

    fn issue_read(&mut self, number: u64, index: usize, segment: Segment, buffer: BufferMut) {
        let id = self.operation(Operation::Read { read: number, segment: index });
        self.counters.read_bytes += buffer.len() as u64;
        self.actions.push(DiskAction::Read { id, device: segment.device, offset: segment.offset, buffer });
    }

    fn stall(&mut self, number: u64, reading: Reading) {
        self.reads.reads.insert(number, reading);
        self.reads.stalled.push_back(number);
    }

    pub(super) fn retry_stalled_reads(&mut self) {
        for _ in 0..self.reads.stalled.len() {
            let Some(number) = self.reads.stalled.pop_front() else { return };
            if let Some(reading) = self.reads.reads.remove(&number) {
                self.start_read(number, reading);
            }
        }
    }

    pub(super) fn on_read(&mut self, number: u64, index: usize, result: Result<DiskOk, DiskError>) {
        // After a failure of the store the request was answered already.
        let Some(mut reading) = self.reads.reads.remove(&number) else { return };
        let segment = reading.segments[index];
        let range = usize::from(segment.first)..usize::from(segment.first + segment.count);
        let bad = match result {
            Ok(done) => {
                let part = read_buffer(done);
                let mut bad = mismatches(&part, &reading.expected[range.clone()]);
                if Mutation::ChecksumIgnored.is_on() {
                    bad.clear();
                }
                match &mut reading.buffer {
                    Some(buffer) => {
                        buffer[range.start * PAGE_SIZE..range.end * PAGE_SIZE].copy_from_slice(&part);
                        self.counters.copied_bytes += part.len() as u64;
                    }
                    None => reading.buffer = Some(part),
                }
                bad
            }
            Err(_) if segment.count > 1 => {
                (reading.again, reading.singly) = (true, true);
                Vec::new()
            }
            Err(_) => vec![0],
        };
        for page in bad {
            let page = segment.first + page;
            let now = self.index.place(reading.group, reading.key, reading.pages.first + page);
            if now == reading.places[usize::from(page)] || reading.attempts >= ATTEMPTS_MAX {
                reading.damaged.push(page);
            } else {
                reading.again = true;
            }
        }
        reading.left -= 1;
        if reading.left > 0 {
            self.reads.reads.insert(number, reading);
        } else if reading.again || reading.buffer.is_none() && self.lost_buffer(&mut reading) {
            reading.attempts += 1;
            self.start_read(number, reading);
        } else {
            self.finish_read(reading);
        }
    }

    /// The only page of a request could not be read, and the buffer went with the failed read: gets another.
    /// `true`: there is none now, the request must be put aside.
    fn lost_buffer(&self, reading: &mut Reading) -> bool {
        reading.buffer = self.pool.alloc(reading.pages.bytes());
        reading.buffer.is_none()
    }

    fn finish_read(&mut self, mut reading: Reading) {
        let buffer = reading.buffer.take().expect("a finished read has its buffer");
        let result = if reading.damaged.is_empty() {
            Ok(ReadPages { buffer, checksums: reading.expected })
        } else {
            reading.damaged.sort_unstable();
            self.counters.checksum_errors += reading.damaged.len() as u64;
            Err(ReadError::Damaged { buffer, damaged: reading.damaged, expected: reading.expected })
        };
        self.events.push(StoreEvent::ReadDone { token: reading.token, result });
    }

    /// The store has failed: answers every read, in the order they came.
    pub(super) fn fail_reads(&mut self) {
        let mut reads: Vec<(u64, Reading)> = std::mem::take(&mut self.reads.reads).into_iter().collect();
        reads.sort_unstable_by_key(|(number, _)| *number);
        for (_, reading) in reads {
            self.events.push(StoreEvent::ReadDone { token: reading.token, result: Err(ReadError::Failed) });
        }
        self.reads.stalled.clear();
        self.reads.waiting_repairs.clear();
        self.reads.repairs.clear();
    }

    /// Rewrites damaged pages in place, where `data` is what the index expects; ends with `Repaired { token }`.
    /// Pages that were overwritten meanwhile are left alone.
    ///
    /// # Panics
    /// Data that does not fit the pages: our bug.
    pub fn repair(&mut self, token: u64, group: GroupId, key: BlockKey, pages: PageRange, data: PageData) {
        assert!(data.bytes.len() == pages.bytes());
        assert!(data.checksums.len() == usize::from(pages.count));
        if !self.failed {
            self.reads.waiting_repairs.push_back(Repair { token, group, key, pages, data, left: 0 });
        }
    }

    pub(super) fn issue_repairs(&mut self) {
        if !self.destage.is_idle() {
            return;
        }
        while let Some(mut repair) = self.reads.waiting_repairs.pop_front() {
            let number = self.reads.next_read;
            self.reads.next_read += 1;
            for (index, page) in repair.pages.pages().enumerate() {
                let place = self.index.place(repair.group, repair.key, page);
                let (Place::Journal { checksum, .. } | Place::Capacity { checksum, .. }) = place else {
                    continue;
                };
                let bytes = repair.data.bytes.slice(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
                if checksum != repair.data.checksums[index] || crc32c(&bytes) != checksum {
                    continue;
                }
                let (device, offset) = self.source(place).expect("it is on a device");
                let id = self.operation(Operation::Repair { repair: number });
                self.actions.push(DiskAction::Write { id, device, offset, parts: vec![bytes] });
                repair.left += 1;
            }
            self.counters.repaired_pages += repair.left as u64;
            if repair.left == 0 {
                self.events.push(StoreEvent::Repaired { token: repair.token, pages: repair.pages });
            } else {
                self.reads.repairs.insert(number, repair);
            }
        }
    }

    pub(super) fn on_repair_written(&mut self, number: u64) {
        let repair = self.reads.repairs.get_mut(&number).expect("a repair stays until its writes end");
        repair.left -= 1;
        if repair.left == 0 {
            let (token, pages) = (repair.token, repair.pages);
            self.index.unskip(repair.group, repair.key);
            self.reads.repairs.remove(&number);
            self.events.push(StoreEvent::Repaired { token, pages });
        }
    }
}
