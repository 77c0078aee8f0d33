//! Opening a store: superblock, checkpoint, block records, replay of the journal. Blocking, before the shard serves.
//!
//! 1. Reads superblock and checkpoint, then every block record: what is in its place.
//! 2. Replays the journal over that (`replay`).
//! 3. Writes the session's first checkpoint.
//!
//! If block records that the checkpoint counts are not there, or the journal lacks what was flushed, the store is damaged: it says
//! so, keeps what it has, and its groups come back as learners, which repairs them from their peers.
//!
//! Invariants
//! - Every byte taken over was checked: heads by their seal, data by their page checksums.
//! - A damaged store says `damaged` at every open until each of its groups that it knows was reset (relearned).

mod replay;

use std::collections::BTreeMap;
use std::io;

use xsan_protocol::disk::block_record::{BlockRecord, NO_CAPACITY, RECORD_SIZE, SLOT_SIZE};
use xsan_protocol::disk::checkpoint::{self, Checkpoint};
use xsan_protocol::disk::superblock::Superblock;
use xsan_protocol::disk::{COUNTER_END, DiskFormatError};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::units::PAGE_SIZE;

use super::allocator::{Slots, Units};
use super::destage::{Destage, SKIP_NS};
use super::engine::{Options, Store};
use super::format::{self, FormatError};
use super::group::Group;
use super::index::Index;
use super::journal::{Journal, Start};
use super::layout::Layout;
use super::reserve::Reserved;
use super::status::Counters;
use super::{Entry, GroupTail};
use crate::disk::buffers::{BufferMut, BufferPool};
use crate::io::{Device, DeviceRole, DiskAction, DiskCompletion, DiskOk};
use replay::Carried;

/// Bytes read at once where much is read.
const READ_BYTES: usize = 1 << 20;
/// No store comes this far. One that was opened there could come to what its next opening does not read.
const COUNTER_MAX: u64 = COUNTER_END / 2;

/// What was found besides the store itself.
#[derive(Debug)]
pub struct Recovered {
    pub groups: Vec<RecoveredGroup>,
    /// Part of the store was lost: every group of it must come back as a learner, also those not named here.
    pub damaged: bool,
    /// Something is missing that had been written, but that no flush covered. That is so after a loss of power; where there was none, the device
    /// has lost it.
    pub lost_end: bool,
}

impl Recovered {
    /// Groups that a damaged store has whole: they were brought up to date since.
    pub fn intact_groups(&self) -> Vec<GroupId> {
        self.groups.iter().filter(|group| !group.damaged).map(|group| group.group).collect()
    }
}

#[derive(Debug)]
pub struct RecoveredGroup {
    pub group: GroupId,
    pub tail: GroupTail,
    /// Entries in the journal that are not known to be acknowledged, with their data.
    pub pending: Vec<Entry>,
    /// This group has not been relearned since the store was damaged.
    pub damaged: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the superblock is not usable: {0}")]
    Superblock(#[source] DiskFormatError),
    #[error("the device is of cluster {found}")]
    OtherCluster { found: String },
    #[error(
        "the device is smaller than its store, or the cache device is not the one that its store was made with"
    )]
    Mismatch,
    #[error("neither checkpoint is valid")]
    Checkpoint,
    #[error("a counter of the store is at {found}, which none can have come to")]
    Counter { found: u64 },
    #[error("what is left of a damaged store does not fit its capacity")]
    Beyond,
    #[error(transparent)]
    Device(#[from] FormatError),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Device(FormatError::Device(error))
    }
}

impl OpenError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Superblock(error) => error.code(),
            Self::OtherCluster { .. } | Self::Mismatch => Code::DeviceInUse,
            Self::Checkpoint | Self::Counter { .. } | Self::Beyond => Code::StoreCorrupt,
            Self::Device(error) => error.code(),
        }
    }
}

/// Both devices of a store.
#[derive(Clone, Copy)]
struct Devices<'a> {
    capacity: &'a dyn Device,
    cache: Option<&'a dyn Device>,
    pool: &'static BufferPool,
}

impl<'a> Devices<'a> {
    fn of(&self, role: DeviceRole) -> &'a dyn Device {
        match role {
            DeviceRole::Capacity => self.capacity,
            DeviceRole::Cache => self.cache.expect("a store with a cache was opened with it"),
        }
    }

    fn buffer(&self, bytes: usize) -> Result<BufferMut, OpenError> {
        Ok(format::buffer(self.pool, bytes)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.cache.map_or(Ok(()), Device::flush)?;
        self.capacity.flush()
    }
}

impl Store {
    /// Opens a store: finds its state after whatever ended the process or the host before.
    ///
    /// # Errors
    /// 200 `StoreNotFormatted`, 201 `DeviceInUse` (another cluster's), 206 `StoreCorrupt`, 208 `FormatUnsupported`,
    /// 209 `DeviceUnusable`, 11 `MemoryShort`.
    pub fn open(
        device: &dyn Device,
        cache: Option<&dyn Device>,
        pool: &'static BufferPool,
        options: Options,
    ) -> Result<(Self, Recovered), OpenError> {
        let devices = Devices { capacity: device, cache, pool };
        let (superblock, layout) = read_layout(&devices, &options)?;
        let checkpoint = read_checkpoint(&devices, &layout, &superblock)?;
        let mut recovery = Recovery::new(devices, layout, superblock, checkpoint);
        recovery.load_records()?;
        recovery.replay()?;
        recovery.judge()?;
        recovery.check_counters()?;
        recovery.finish(options)
    }
}

fn read_layout(devices: &Devices<'_>, options: &Options) -> Result<(Superblock, Layout), OpenError> {
    let read = |device| format::read_superblock(device, devices.pool)?.map_err(OpenError::Superblock);
    let superblock = read(devices.capacity)?;
    let cache = devices.cache.map(read).transpose()?;
    if options.cluster_id.as_ref().is_some_and(|id| *id != superblock.cluster_id) {
        return Err(OpenError::OtherCluster { found: superblock.cluster_id });
    }
    let sizes = devices.capacity.size_bytes() >= superblock.device_bytes
        && devices
            .cache
            .zip(cache.as_ref())
            .is_none_or(|(device, cache)| device.size_bytes() >= cache.device_bytes);
    let stores = cache.as_ref().is_none_or(|cache| cache.store == superblock.store);
    if superblock.cached != cache.is_some() || !sizes || !stores {
        return Err(OpenError::Mismatch);
    }
    let layout = Layout::of(&superblock, cache.as_ref());
    let layout = layout.ok_or(OpenError::Superblock(DiskFormatError::Field { field: "layout" }))?;
    Ok((superblock, layout))
}

fn read_checkpoint(
    devices: &Devices<'_>,
    layout: &Layout,
    superblock: &Superblock,
) -> Result<Checkpoint, OpenError> {
    let mut slot = devices.buffer(checkpoint::SLOT_SIZE)?;
    let (mut newest, mut unread) = (None::<Checkpoint>, None);
    for number in 0..2 {
        // A slot is larger than most checkpoints: what can not be read in the rest of it does not matter.
        let failed = read_around(devices.capacity, layout.checkpoint_offset(number), &mut slot);
        unread = failed.err().or(unread);
        let found = Checkpoint::decode(&slot).ok().filter(|found| found.store == superblock.store);
        newest = newest.into_iter().chain(found).max_by_key(|found| found.number);
    }
    if newest.is_none()
        && let Some(error) = unread
    {
        return Err(error.into());
    }
    newest.filter(|found| found.slots_mark <= layout.slot_count()).ok_or(OpenError::Checkpoint)
}

/// The state of an opening, step by step.
struct Recovery<'a> {
    devices: Devices<'a>,
    layout: Layout,
    superblock: Superblock,
    checkpoint: Checkpoint,
    index: Index,
    units: Units,
    slots: Slots,
    groups: BTreeMap<GroupId, Group>,
    reserved: Reserved,
    /// Position of each reset in the journal and what its group had applied before it.
    resets: BTreeMap<GroupId, Vec<(u64, Seq)>>,
    carried: BTreeMap<GroupId, Vec<Carried>>,
    /// Device offsets of halves of slots that are to be blank: not whole, or contradicting others.
    broken: Vec<u64>,
    /// Highest journal position in any block record.
    newest_record: u64,
    /// Slots whose newest record is of the cycle that was cut off: the checkpoint does not count those.
    written_since: u64,
    /// End of what replay took over.
    end: u64,
    /// End of anything whole that was seen, also behind `end`.
    seen_end: u64,
    /// Newest session of which anything was seen.
    seen_session: u64,
    damaged: bool,
    lost_end: bool,
}

impl<'a> Recovery<'a> {
    fn new(devices: Devices<'a>, layout: Layout, superblock: Superblock, checkpoint: Checkpoint) -> Self {
        let rows = checkpoint.groups.iter();
        let groups = rows.map(|row| (row.group, Group::recovered(row)));
        Self {
            devices,
            units: Units::new(layout.unit_count()),
            slots: Slots::new(layout.slot_count(), checkpoint.slots_mark),
            groups: groups.collect(),
            reserved: Reserved::default(),
            end: checkpoint.tail,
            seen_end: checkpoint.flushed,
            seen_session: checkpoint.session,
            layout,
            superblock,
            checkpoint,
            index: Index::default(),
            resets: BTreeMap::new(),
            carried: BTreeMap::new(),
            broken: Vec::new(),
            newest_record: 0,
            written_since: 0,
            damaged: false,
            lost_end: false,
        }
    }

    /// Reads every slot below the mark.
    fn load_records(&mut self) -> Result<(), OpenError> {
        let mark = self.checkpoint.slots_mark;
        let slots_at_once = READ_BYTES / SLOT_SIZE;
        let mut buffer = self.devices.buffer(READ_BYTES)?;
        for first in (0..mark).step_by(slots_at_once) {
            let count = (mark - first).min(slots_at_once as u32);
            let part = &mut buffer[..count as usize * SLOT_SIZE];
            let offset = self.layout.record_offset(first, 0);
            if self.devices.capacity.read_at(offset, part).is_err() {
                self.read_halves_singly(first, part);
            }
            for (index, slot) in part.chunks_exact(SLOT_SIZE).enumerate() {
                self.load_slot(first + index as u32, slot);
            }
        }
        let found = self.slots.generations().wrapping_sub(self.written_since);
        if found != self.checkpoint.generations {
            let (store, expected) = (self.superblock.store, self.checkpoint.generations);
            tracing::error!(%store, expected, found, "block records that were written are not there");
            self.damaged = true;
        }
        Ok(())
    }

    /// A read of many slots failed: reads them half by half; what can not be read is taken for broken.
    fn read_halves_singly(&self, first: u32, part: &mut [u8]) {
        for (index, half) in part.chunks_exact_mut(RECORD_SIZE).enumerate() {
            let offset = self.layout.record_offset(first, 0) + (index * RECORD_SIZE) as u64;
            if read_again(self.devices.capacity, offset, half).is_err() {
                half.fill(0xff);
            }
        }
    }

    fn load_slot(&mut self, number: u32, slot: &[u8]) {
        let mut newest: Option<BlockRecord> = None;
        for (half, bytes) in slot.chunks_exact(RECORD_SIZE).enumerate() {
            let valid = BlockRecord::decode(bytes).ok().filter(|record| {
                record.store == self.superblock.store
                    && record.slot == number
                    && record.generation < COUNTER_MAX
                    && record.generation % 2 == half as u64
            });
            if let Some(record) = valid {
                newest = newest.into_iter().chain([record]).max_by_key(|record| record.generation);
                continue;
            }
            if bytes.iter().any(|byte| *byte != 0) {
                // Torn by a crash, or damaged. If it was the newest of its slot, the sum of the generations tells.
                tracing::warn!(store = %self.superblock.store, slot = number, half, "a block record is not whole");
                self.broken.push(self.layout.record_offset(number, half as u64));
            }
        }
        let Some(record) = newest else { return };
        self.slots.set_recovered(number, record.generation, false);
        self.written_since += u64::from(record.cycle == self.checkpoint.number);
        // It was written under a checkpoint that is not there.
        self.damaged |= record.cycle > self.checkpoint.number;
        self.newest_record = self.newest_record.max(record.entry_position).max(record.push_position);
        let group = self.groups.entry(record.group).or_default();
        // The checkpoint in force when the record was written says as much, and every later one more, but for what a reset took back.
        if record.cycle > self.checkpoint.number && record.acked.seq > group.applied.seq {
            (group.applied, group.last, group.acknowledged) = (record.acked, record.acked, record.acked.seq);
        }
        if record.is_free() {
            return;
        }
        let capacities = record.units.iter().map(|unit| unit.capacity);
        let taken: Vec<u32> = capacities.filter(|capacity| *capacity != NO_CAPACITY).collect();
        let twice = self.index.get(record.group, record.key).is_some();
        let fits = !twice && taken.iter().all(|capacity| self.units.take(*capacity));
        if !fits {
            tracing::error!(store = %self.superblock.store, slot = number, "a block record contradicts another");
            self.damaged = true;
            self.broken.extend([0, 1].map(|half| self.layout.record_offset(number, half)));
            self.slots.set_recovered(number, 0, false);
            return;
        }
        self.slots.set_recovered(number, record.generation, true);
        self.index.insert_recovered(&record);
    }

    /// Before anything is written: a store of a writer that is not ours stays as it is.
    fn check_counters(&self) -> Result<(), OpenError> {
        let counters = [self.checkpoint.number, self.seen_session, self.seen_end, self.newest_record];
        let found = counters.into_iter().max().unwrap_or_default();
        if found < COUNTER_MAX { Ok(()) } else { Err(OpenError::Counter { found }) }
    }

    /// Writes the first checkpoint of this session and hands over the store.
    fn finish(mut self, options: Options) -> Result<(Store, Recovered), OpenError> {
        self.blank_broken_halves()?;
        self.devices.flush()?;
        let mut recovered = Vec::new();
        if self.damaged {
            // What is missing may be anywhere: nothing pending is trusted, every group is relearned.
            for (id, group) in &mut self.groups {
                group.forget_pending(*id, &mut self.reserved);
                group.damaged = true;
            }
        }
        // As at runtime: the resets of all the groups that are known end it.
        let relearned = !self.resets.is_empty() && self.groups.values().all(|group| !group.damaged);
        let damaged = self.damaged || self.checkpoint.damaged && !relearned;
        for (group, state) in &mut self.groups {
            // Entries may say more, of others that never came: their seqs may be given to others.
            state.acknowledged = state.acknowledged.min(state.last.seq);
            recovered.push(RecoveredGroup {
                group: *group,
                tail: GroupTail { last: state.last, acked: state.applied.seq },
                pending: state.pending.iter().map(|entry| entry.entry(*group, state.applied.seq)).collect(),
                damaged: state.damaged,
            });
        }
        let devices = self.devices;
        let lost_end = self.lost_end;
        let (lost, seen_end) = (self.damaged, self.seen_end.max(self.newest_record));
        let lap = self.layout.journal.bytes;
        let mut store = self.into_store(options, damaged);
        store.write_checkpoint(&devices)?;
        if lost {
            // Positions behind the end are in use by what is being given up: everything goes to its place, and the
            // journal starts anew beyond all of them.
            store.settle(&devices)?;
            store.restart_journal(seen_end.max(store.journal.head).next_multiple_of(lap) + lap);
            store.write_checkpoint(&devices)?;
        }
        Ok((store, Recovered { groups: recovered, damaged, lost_end }))
    }

    /// A half that is no record, or contradicts others, is zeroed: it must not count one day.
    fn blank_broken_halves(&self) -> Result<(), OpenError> {
        let mut zeroes = self.devices.buffer(RECORD_SIZE)?;
        zeroes.fill(0);
        for offset in &self.broken {
            self.devices.capacity.write_at(*offset, &zeroes)?;
        }
        Ok(())
    }

    fn into_store(self, options: Options, damaged: bool) -> Store {
        let session = self.seen_session + 1;
        let journal = Journal::new(Start {
            store: self.superblock.store,
            session,
            ring_bytes: self.layout.journal.bytes,
            batch_bytes_max: self.layout.batch_bytes_max(),
            tail: self.checkpoint.tail,
            head: self.end,
        });
        Store {
            id: self.superblock.store,
            layout: self.layout,
            pool: self.devices.pool,
            session,
            session_start: self.end,
            damaged,
            failed: false,
            now_ns: options.now_ns,
            last_append_ns: options.now_ns,
            options,
            journal,
            index: self.index,
            units: self.units,
            slots: self.slots,
            groups: self.groups,
            reserved: self.reserved,
            carry_at: 0,
            carry_again_ns: 0,
            flushes: Default::default(),
            reads: Default::default(),
            destage: Destage::new(self.checkpoint.number),
            operations: Default::default(),
            next_operation: 0,
            actions: Vec::new(),
            events: Vec::new(),
            counters: Counters::default(),
        }
    }
}

/// A read that fails is tried once more: what can not be read passes for what is not there.
fn read_again(device: &dyn Device, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    device.read_at(offset, buffer).or_else(|_| device.read_at(offset, buffer))
}

/// Reads what can be read of a range; pages that can not are filled with zeroes.
///
/// # Errors
/// Of the last of those.
fn read_around(device: &dyn Device, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    if read_again(device, offset, buffer).is_ok() {
        return Ok(());
    }
    let mut result = Ok(());
    for (page, at) in buffer.chunks_exact_mut(PAGE_SIZE).zip((offset..).step_by(PAGE_SIZE)) {
        if let Err(error) = read_again(device, at, page) {
            page.fill(0);
            result = Err(error);
        }
    }
    result
}

impl Store {
    fn write_checkpoint(&mut self, devices: &Devices<'_>) -> Result<(), OpenError> {
        let checkpoint = self.next_checkpoint(self.new_tail());
        let mut buffer = devices.buffer(Checkpoint::size(checkpoint.groups.len()))?;
        checkpoint.encode(&mut buffer);
        devices.capacity.write_at(self.layout.checkpoint_offset(checkpoint.number), &buffer)?;
        devices.capacity.flush()?;
        self.destage.checkpoint_number = checkpoint.number;
        self.journal.release(checkpoint.tail);
        Ok(())
    }

    /// Destages everything, blocking. What is damaged, as pages that were lost before they came, goes to its place as it is.
    fn settle(&mut self, devices: &Devices<'_>) -> Result<(), OpenError> {
        self.destage.drain = true;
        let mut actions = Vec::new();
        for _ in 0..2 {
            loop {
                self.end_turn(&mut actions);
                if actions.is_empty() {
                    break;
                }
                for action in actions.drain(..) {
                    self.on_disk(carry_out(devices, action)?);
                }
            }
            // What was met damaged is met again.
            self.tick(self.now_ns + SKIP_NS);
        }
        self.destage.drain = false;
        self.take_events(&mut Vec::new());
        if self.index.oldest_dirty().is_some() {
            return Err(OpenError::Beyond);
        }
        Ok(())
    }

    /// Starts the journal anew at `position`: nothing in it is needed.
    fn restart_journal(&mut self, position: u64) {
        assert!(self.journal.is_quiet());
        self.journal = Journal::new(Start {
            store: self.id,
            session: self.session,
            ring_bytes: self.layout.journal.bytes,
            batch_bytes_max: self.layout.batch_bytes_max(),
            tail: position,
            head: position,
        });
        self.session_start = position;
    }
}

fn carry_out(devices: &Devices<'_>, action: DiskAction) -> io::Result<DiskCompletion> {
    let (id, done) = match action {
        DiskAction::Read { id, device, offset, mut buffer } => {
            devices.of(device).read_at(offset, &mut buffer)?;
            (id, DiskOk::Read(buffer))
        }
        DiskAction::Write { id, device, mut offset, parts } => {
            for part in &parts {
                devices.of(device).write_at(offset, part)?;
                offset += part.len() as u64;
            }
            (id, DiskOk::Written)
        }
        DiskAction::Flush { id, device } => {
            devices.of(device).flush()?;
            (id, DiskOk::Flushed)
        }
    };
    Ok(DiskCompletion { id, result: Ok(done) })
}
