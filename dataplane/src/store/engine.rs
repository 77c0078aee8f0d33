//! The store's state machine: takes records, reads and completions, gives device operations and events.
//!
//! `shard` calls it once a turn: requests, completions, then `end_turn`, which hands out all the device operations of
//! the turn with at most one journal append among them. Reads are in `read`, background work in `destage`.
//!
//! Invariants
//! - `Durable` is reported for an entry when its batch and every batch before it are complete.
//! - After the first failed write or flush nothing is issued and nothing more becomes durable, flushed or repaired.
//! - Nothing here depends on time, chance or the order of a hash map: the same events give the same actions.
//!
//! Source: docs/format/store.md; Rebello et al., "Can Applications Recover from fsync Failures?", ATC '20, for the second.

use std::collections::BTreeMap;
use std::sync::Arc;

use xsan_protocol::checksum::crc32c;
use xsan_protocol::ids::{BlockKey, GroupId, Seq, StoreId, Version};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, UNIT_SIZE, UNITS_PER_BLOCK};
use xsan_protocol::wire::replication::block_digest;

use super::allocator::{Slots, Units};
use super::carry::{CarryPlace, carried_pages};
use super::destage::Destage;
use super::group::{Group, Pending};
use super::index::{Change, Index, MixMap, Place};
use super::journal::{Item, Journal, Placed, Queued};
use super::layout::Layout;
use super::read::Reads;
use super::reserve::{Claim, Reserved, Wanted};
use super::status::{Counters, StoreStatus, UnitLocation};
use super::{GroupTail, Record, Refused, StoreError, StoreEvent, StoreView, Withdrawn};
use crate::disk::buffers::BufferPool;
use crate::io::{DeviceRole, DiskAction, DiskCompletion, DiskError, DiskOk};

/// What an operation under way is for.
#[derive(Debug)]
pub(super) enum Operation {
    Batch {
        position: u64,
    },
    ClientFlush {
        covered: u64,
    },
    Read {
        read: u64,
        segment: usize,
    },
    Repair {
        repair: u64,
    },
    DestageRead {
        run: u64,
        piece: usize,
    },
    DestageWrite {
        run: u64,
    },
    /// A record, checkpoint or zeroes of a destage cycle.
    CycleWrite,
    /// A flush of a destage cycle; `covered` when it also flushes the journal.
    CycleFlush {
        covered: Option<u64>,
    },
}

/// How a store behaves; the defaults serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// The time of opening, on the clock that `tick` uses; for the records' timestamps and idle detection.
    pub now_ns: u64,
    /// With no append for so long, everything is destaged.
    pub idle_after_ns: u64,
    /// The cluster the store must be of; `None` takes any (tools).
    pub cluster_id: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { now_ns: 0, idle_after_ns: 500_000_000, cluster_id: None }
    }
}

/// How much of the reserve of capacity is to be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reserve {
    Whole,
    Half,
}

#[derive(Debug, Default)]
pub(super) struct Flushes {
    waiting: Vec<u64>,
    in_flight: Option<Vec<u64>>,
}

/// One store. See the module.
#[derive(Debug)]
pub struct Store {
    pub(super) id: StoreId,
    pub(super) layout: Layout,
    pub(super) options: Options,
    pub(super) pool: &'static BufferPool,
    pub(super) session: u64,
    pub(super) session_start: u64,
    /// Part of the store was lost; cleared when every group has been relearned.
    pub(super) damaged: bool,
    pub(super) failed: bool,
    pub(super) now_ns: u64,
    pub(super) last_append_ns: u64,
    pub(super) journal: Journal,
    pub(super) index: Index,
    pub(super) units: Units,
    pub(super) slots: Slots,
    pub(super) groups: BTreeMap<GroupId, Group>,
    /// For all pending entries.
    pub(super) reserved: Reserved,
    /// What is to be carried is looked for when the journal gets to the one (0: now), or at the other.
    pub(super) carry_at: u64,
    pub(super) carry_again_ns: u64,
    pub(super) flushes: Flushes,
    pub(super) reads: Reads,
    pub(super) destage: Destage,
    pub(super) operations: MixMap<u64, Operation>,
    pub(super) next_operation: u64,
    pub(super) actions: Vec<DiskAction>,
    pub(super) events: Vec<StoreEvent>,
    pub(super) counters: Counters,
}

impl Store {
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// Queues one record for the journal; `Durable`, `Pushed` or `Reset` comes when it is there.
    ///
    /// # Errors
    /// 203 `JournalFull`: retry after the next destage. 202 `StorageFull`. 204 `StoreFailed`: this replica must
    /// leave its groups.
    ///
    /// # Panics
    /// A group's entry out of order, or data that does not fit its pages: our bug, not the caller's data.
    pub fn append(&mut self, record: Record) -> Result<(), Refused> {
        let claim = match self.check(&record) {
            Ok(claim) => claim,
            Err(error) => return Err(Refused { record: Box::new(record), error }),
        };
        let group = self.groups.entry(record.group()).or_default();
        let (life, applied) = match &record {
            Record::Entry(entry) => {
                let follows = entry.version.seq == group.last.seq.next();
                assert!(follows, "entry {} follows {}", entry.version, group.last);
                group.last = entry.version;
                group.pending.push_back(Pending::of(entry, claim));
                self.reserved.add(entry.group, entry.key, claim);
                (group.life, Seq(0))
            }
            Record::Push { as_of, .. } => {
                assert!(*as_of <= group.last.seq, "a push as of {as_of} needs the entries up to it");
                (group.life, Seq(0))
            }
            Record::Reset { last, .. } => {
                let applied = group.applied.seq;
                group.reset(record.group(), *last, &mut self.reserved);
                self.carry_at = 0;
                (group.life, applied)
            }
        };
        self.last_append_ns = self.now_ns;
        self.journal.push(Queued { item: Item::Record(record), life, applied });
        Ok(())
    }

    /// Takes back the entries and pushes of a group that are on no way to the device yet, as if they had never come.
    pub fn withdraw(&mut self, group: GroupId) -> Withdrawn {
        let taken = self.journal.withdraw(group);
        let Some(state) = self.groups.get_mut(&group) else {
            return Withdrawn { last: Version::ZERO, pushes: taken.pushes };
        };
        state.withdraw(group, &mut self.reserved);
        if taken.carry {
            state.cancel_carry();
            self.carry_at = 0;
        }
        Withdrawn { last: state.last, pushes: taken.pushes }
    }

    /// Is there room for the record? Returns what is to be set aside for an entry.
    fn check(&self, record: &Record) -> Result<Claim, StoreError> {
        if self.failed {
            return Err(StoreError::Failed);
        }
        match record {
            Record::Entry(entry) => {
                let pages = entry.data.as_ref().map_or(0, |_| usize::from(entry.pages.count));
                let mut wanted = Wanted::default();
                if let Some(data) = &entry.data {
                    assert!(data.checksums.len() == pages);
                    assert!(data.bytes.len() == pages * PAGE_SIZE);
                    wanted = self.index.wanted(entry.group, entry.key, entry.pages);
                }
                // Zeroes free space: they may use nearly the last of the journal. Capacity is what the primary looks at: an entry has its
                // place in the group's order, and what does not fit waits in the journal until something is freed.
                self.check_journal(pages, if entry.data.is_some() { 16 } else { 64 })?;
                Ok(Claim { wanted, journal_pages: carried_pages(pages) })
            }
            Record::Push { group, key, unit, data, .. } => {
                self.check_journal(data.as_ref().map_or(0, |_| PAGES_PER_UNIT), 16)?;
                if let Some(data) = data {
                    assert!(data.checksums.len() == PAGES_PER_UNIT);
                    assert!(data.bytes.len() == UNIT_SIZE);
                    self.check_capacity(
                        self.index.wanted(*group, *key, PageRange::of_unit(*unit)).counts(),
                        Reserve::Half,
                    )?;
                }
                Ok(Claim::default())
            }
            // It frees what is set aside, or is one of a few.
            Record::Reset { .. } if self.journal.has_room(1 + self.carried_due(), 0) => Ok(Claim::default()),
            Record::Reset { .. } => Err(StoreError::JournalFull),
        }
    }

    /// Is there room in the journal, leaving a `share`-th of it to those with smaller shares, and what it takes to carry what is
    /// pending?
    fn check_journal(&self, pages: usize, share: u64) -> Result<(), StoreError> {
        let reserve = self.journal.ring_bytes() / share;
        let carry = self.carry_reserve(carried_pages(pages));
        if self.journal.has_room(pages + 1, reserve + carry) { Ok(()) } else { Err(StoreError::JournalFull) }
    }

    /// Is there room for new units and blocks, leaving the reserve? New writes leave all of it, resync half: the rest is for
    /// entries of acting members, which are never refused.
    fn check_capacity(&self, (units, blocks): (u32, u32), reserve: Reserve) -> Result<(), StoreError> {
        let part = if reserve == Reserve::Whole { 1 } else { 2 };
        let unit_reserve = (self.units.count() / 64).clamp(16, 4096) / part;
        let slot_reserve = (self.slots.count() / 64).clamp(4, 1024) / part;
        let units_used = self.index.promised_units() + self.reserved.units();
        let slots_used = self.index.slotless() + self.reserved.blocks();
        let units_fit = units == 0 || units_used + units + unit_reserve <= self.units.free();
        let slots_fit = blocks == 0 || slots_used + blocks + slot_reserve <= self.slots.free();
        if units_fit && slots_fit { Ok(()) } else { Err(StoreError::Full) }
    }

    /// Entries up to `through` are acknowledged: they become readable, as soon as they are durable here.
    pub fn apply(&mut self, group: GroupId, through: Seq) {
        let Some(state) = self.groups.get_mut(&group) else { return };
        state.acknowledged = state.acknowledged.max(through);
        state.apply_ready(group, &mut self.index, &mut self.reserved);
    }

    /// Asks for `Flushed { token }`: everything durable now is on stable media. A store that has failed, or fails before, says
    /// nothing.
    pub fn flush(&mut self, token: u64) {
        if self.failed {
            return;
        }
        if self.journal.flushed == self.journal.durable {
            self.events.push(StoreEvent::Flushed { token });
        } else {
            self.flushes.waiting.push(token);
        }
    }

    /// Hands out the device operations of this turn.
    pub fn end_turn(&mut self, out: &mut Vec<DiskAction>) {
        if !self.failed {
            self.carry_old_entries();
            self.issue_batch();
            self.issue_flush();
            self.retry_stalled_reads();
            self.issue_repairs();
            self.step_destage();
        }
        out.append(&mut self.actions);
    }

    /// The time, now and then: for idle detection and timestamps.
    pub fn tick(&mut self, now_ns: u64) {
        self.now_ns = self.now_ns.max(now_ns);
    }

    pub fn take_events(&mut self, out: &mut Vec<StoreEvent>) {
        out.append(&mut self.events);
    }

    pub(super) fn operation(&mut self, operation: Operation) -> u64 {
        let id = self.next_operation;
        self.next_operation += 1;
        self.operations.insert(id, operation);
        id
    }

    fn issue_batch(&mut self) {
        let groups = &mut self.groups;
        let batch = self.journal.next_batch(self.pool, |queued, position, data_position| {
            place(groups, queued, position, data_position)
        });
        let Some(batch) = batch else { return };
        self.counters.written_journal_bytes += batch.bytes as u64;
        self.counters.entry_bytes += batch.data_bytes as u64;
        let id = self.operation(Operation::Batch { position: batch.position });
        let device = self.layout.journal_device;
        let offset = self.layout.journal_offset(batch.position);
        self.actions.push(DiskAction::Write { id, device, offset, parts: batch.parts });
    }

    fn issue_flush(&mut self) {
        if self.flushes.waiting.is_empty() || self.flushes.in_flight.is_some() {
            return;
        }
        self.flushes.in_flight = Some(std::mem::take(&mut self.flushes.waiting));
        let covered = self.journal.durable;
        let id = self.operation(Operation::ClientFlush { covered });
        self.counters.flushes += 1;
        self.actions.push(DiskAction::Flush { id, device: self.layout.journal_device });
    }

    /// Takes the end of an operation.
    ///
    /// # Panics
    /// An operation that this store did not issue, or that ended before: our bug.
    pub fn on_disk(&mut self, completion: DiskCompletion) {
        let operation = self.operations.remove(&completion.id).expect("each operation ends once");
        match (operation, completion.result) {
            (Operation::Read { read, segment }, result) => self.on_read(read, segment, result),
            (Operation::DestageRead { run, piece }, result) => self.on_destage_read(run, piece, result),
            (_, Err(error)) => self.fail(error),
            (_, Ok(_)) if self.failed => {}
            (Operation::Batch { position }, Ok(_)) => self.on_batch(position),
            (Operation::ClientFlush { mut covered }, Ok(_)) => {
                if Mutation::StoreFlushCoversLater.is_on() {
                    covered = self.journal.durable;
                }
                self.journal.on_flushed(covered);
                let tokens = self.flushes.in_flight.take().expect("one flush is in flight");
                self.events.extend(tokens.into_iter().map(|token| StoreEvent::Flushed { token }));
            }
            (Operation::Repair { repair }, Ok(_)) => self.on_repair_written(repair),
            (Operation::DestageWrite { run }, Ok(_)) => self.on_destage_written(run),
            (Operation::CycleWrite, Ok(_)) => self.on_cycle_written(),
            (Operation::CycleFlush { covered }, Ok(_)) => {
                if let Some(covered) = covered {
                    self.journal.on_flushed(covered);
                }
                self.on_cycle_written();
            }
        }
    }

    fn fail(&mut self, error: DiskError) {
        if !std::mem::replace(&mut self.failed, true) {
            tracing::error!(store = %self.id, errno = error.errno, "a write or flush failed: the store takes nothing more");
            self.events.push(StoreEvent::Failed);
            self.actions.clear();
            self.fail_reads();
            // Others need the memory.
            self.journal.discard_queued();
            self.destage.discard_copies();
            let pending = self.groups.values_mut().flat_map(|group| &mut group.pending);
            pending.for_each(|entry| entry.bytes = None);
        }
    }

    fn on_batch(&mut self, position: u64) {
        // At most a few groups a batch: a list is found through faster than a map.
        let mut durable: Vec<(GroupId, Seq)> = Vec::new();
        let (groups, index, events) = (&mut self.groups, &mut self.index, &mut self.events);
        let (reserved, mut relearned) = (&mut self.reserved, false);
        let (mut carried, mut ended) = (Vec::new(), false);
        self.journal.on_written(position, |placed| match placed {
            Placed::Entry { group, seq, life } => {
                let state = groups.get_mut(&group).expect("a group with entries stays");
                if state.life != life {
                    return;
                }
                state.entry_mut(seq).expect("an entry is not applied before it is durable").durable = true;
                if seq <= state.acknowledged {
                    state.apply_ready(group, index, reserved);
                }
                match durable.iter_mut().rev().find(|(of, _)| *of == group) {
                    Some((_, newest)) => *newest = seq,
                    None => durable.push((group, seq)),
                }
            }
            Placed::Carry { group, carry, place } => {
                let state = groups.get_mut(&group).expect("a group with entries stays");
                if state.on_copy_durable(carry, place) {
                    carried.push(group);
                }
            }
            Placed::Carried { group, carry } => {
                let state = groups.get_mut(&group).expect("a group with entries stays");
                state.on_carried_durable(carry);
                ended = true;
            }
            Placed::Push { token, position, group, key, pages, version, as_of, life, data } => {
                let state = groups.get_mut(&group).expect("a group with pushes stays");
                if state.life == life {
                    state.acknowledged = state.acknowledged.max(as_of);
                    state.apply_ready(group, index, reserved);
                }
                let data = data.as_ref().map(|(position, checksums)| (*position, &checksums[..]));
                let (previous_first, previous_last) = (Version::ZERO, Version::ZERO);
                index.apply(&Change {
                    position,
                    push: true,
                    group,
                    key,
                    pages,
                    version,
                    previous_first,
                    previous_last,
                    data,
                });
                events.push(StoreEvent::Pushed { token });
            }
            Placed::Reset { position, group, last, life } => {
                let state = groups.get_mut(&group).expect("made when the reset was queued");
                state.on_reset_durable(position, last, life);
                events.push(StoreEvent::Reset { group });
                (relearned, ended) = (true, true);
            }
        });
        if relearned && self.damaged {
            self.damaged = self.groups.values().any(|group| group.damaged);
        }
        if ended {
            self.carry_at = 0;
        }
        carried.into_iter().for_each(|group| self.end_carry(group));
        self.events.extend(durable.into_iter().map(|(group, seq)| StoreEvent::Durable { group, seq }));
    }

    /// End of a group's journal; zero for a group that was never seen.
    pub fn tail(&self, group: GroupId) -> GroupTail {
        let state = self.groups.get(&group);
        state
            .map_or_else(GroupTail::default, |state| GroupTail { last: state.last, acked: state.applied.seq })
    }

    pub fn status(&self) -> StoreStatus {
        let unit = UNIT_SIZE as u64;
        let used = u64::from(self.units.count() - self.units.free());
        StoreStatus {
            capacity_bytes: u64::from(self.units.count()) * unit,
            used_bytes: (used + u64::from(self.index.promised_units())) * unit,
            journal_bytes: self.journal.ring_bytes(),
            journal_used_bytes: self.journal.used_bytes().min(self.journal.ring_bytes()),
            journalled_pages: self.index.journalled_pages(),
            blocks: self.index.block_count() as u64,
            failed: self.failed,
            damaged: self.damaged,
            counters: self.counters,
        }
    }

    /// Where the units of a block are, for diagnosis; empty when nothing is stored.
    pub fn locate(&self, group: GroupId, key: BlockKey) -> Vec<UnitLocation> {
        let block = self.index.get(group, key);
        let units = block.into_iter().flat_map(|block| block.units());
        let places = units.map(|(unit, state)| UnitLocation {
            unit,
            version: state.version(),
            device_offset: (state.present != 0).then(|| self.layout.unit_offset(state.capacity)),
            present_pages: state.present.count_ones() as u8,
            journalled_pages: state.journalled.count_ones() as u8,
        });
        places.collect()
    }

    /// Device and offset of a place.
    pub(super) fn source(&self, place: Place) -> Option<(DeviceRole, u64)> {
        match place {
            Place::Zero => None,
            Place::Journal { position, .. } => {
                Some((self.layout.journal_device, self.layout.journal_offset(position)))
            }
            Place::Capacity { page, .. } => {
                Some((DeviceRole::Capacity, self.layout.units.offset + page * PAGE_SIZE as u64))
            }
        }
    }
}

/// Notes where a record of a new batch went.
fn place(
    groups: &mut BTreeMap<GroupId, Group>,
    queued: &Queued,
    position: u64,
    data_position: u64,
) -> Placed {
    let life = queued.life;
    match &queued.item {
        Item::Carry(entry, carry) => {
            let place = CarryPlace { seq: entry.version.seq, position, data_position };
            Placed::Carry { group: entry.group, carry: *carry, place }
        }
        Item::Carried { group, carry, .. } => Placed::Carried { group: *group, carry: *carry },
        Item::Record(Record::Entry(entry)) => {
            let state = groups.get_mut(&entry.group).expect("made when the entry was queued");
            if state.life == life {
                let pending = state.entry_mut(entry.version.seq).expect("a queued entry is pending");
                pending.position = position;
                pending.data_position = data_position;
            }
            Placed::Entry { group: entry.group, seq: entry.version.seq, life }
        }
        Item::Record(Record::Push { token, group, key, unit, version, as_of, data, .. }) => Placed::Push {
            token: *token,
            position,
            group: *group,
            key: *key,
            pages: PageRange::of_unit(*unit),
            version: *version,
            as_of: *as_of,
            life,
            data: data.as_ref().map(|data| (data_position, Arc::clone(&data.checksums))),
        },
        Item::Record(Record::Reset { group, last }) => {
            Placed::Reset { position, group: *group, last: *last, life }
        }
    }
}

impl StoreView for Store {
    fn unit_version(&self, group: GroupId, key: BlockKey, unit: u8) -> Version {
        let block = self.index.get(group, key);
        block.and_then(|block| block.unit(unit)).map_or(Version::ZERO, |unit| unit.version())
    }

    fn unit_versions(&self, group: GroupId, key: BlockKey) -> [Version; UNITS_PER_BLOCK] {
        self.index.versions(group, key)
    }

    fn blocks_after(&self, group: GroupId, after: Option<BlockKey>, max: usize) -> Vec<(BlockKey, u64)> {
        let keys = self.index.keys_after(group, after);
        let digests = keys.map(|key| (key, block_digest(&self.index.versions(group, key))));
        digests.filter(|(_, digest)| *digest != 0).take(max).collect()
    }

    fn allocated(&self, group: GroupId, key: BlockKey, pages: PageRange) -> Vec<bool> {
        let mut flags = Vec::with_capacity(usize::from(pages.count));
        self.index.places(group, key, pages, |_, place| flags.push(place != Place::Zero));
        flags
    }

    fn admit(&self, pages: usize) -> Result<(), StoreError> {
        if self.failed {
            return Err(StoreError::Failed);
        }
        self.check_journal(pages, 8)?;
        let units = if pages == 0 { 0 } else { (pages - 1).div_ceil(PAGES_PER_UNIT) + 1 } as u32;
        self.check_capacity((units, u32::from(pages > 0)), Reserve::Whole)
    }

    fn is_full(&self) -> bool {
        !self.failed && self.check_capacity((1, 1), Reserve::Whole).is_err()
    }

    fn admit_write(&self, group: GroupId, key: BlockKey, pages: PageRange) -> Result<(), StoreError> {
        if self.failed {
            return Err(StoreError::Failed);
        }
        self.check_journal(usize::from(pages.count), 8)?;
        self.check_capacity(self.index.wanted(group, key, pages).counts(), Reserve::Whole)
    }

    fn wants_room(&self, group: GroupId, key: BlockKey, pages: PageRange) -> bool {
        !self.index.wanted(group, key, pages).is_none()
    }

    fn has_room(&self, group: GroupId, key: BlockKey, pages: PageRange) -> bool {
        self.check_capacity(self.index.wanted(group, key, pages).counts(), Reserve::Half).is_ok()
    }
}

/// CRC32C of each page of `bytes` that does not match, by its number.
pub(super) fn mismatches(bytes: &[u8], checksums: &[u32]) -> Vec<u16> {
    assert!(bytes.len() == checksums.len() * PAGE_SIZE);
    let pages = bytes.chunks_exact(PAGE_SIZE).zip(checksums).enumerate();
    pages.filter(|(_, (page, checksum))| crc32c(page) != **checksum).map(|(index, _)| index as u16).collect()
}

/// The buffer of a completed read.
pub(super) fn read_buffer(done: DiskOk) -> crate::disk::buffers::BufferMut {
    match done {
        DiskOk::Read(buffer) => buffer,
        DiskOk::Written | DiskOk::Flushed => unreachable!("a read ends with its buffer"),
    }
}
