//! Destage: moves what is applied from the journal to its place, and frees the journal behind it.
//!
//! One cycle at a time, over a bounded number of blocks, oldest first. A block goes with everything applied to it
//! when the cycle starts, so its new record is its whole state at one moment:
//!
//! 1. flush the journal, and write and flush a checkpoint that says what each group has applied: nothing is
//!    overwritten in place whose newer content is not stable in the journal *and* known to be acknowledged (else
//!    replay would leave the entry pending, and the old record would name a page that is gone);
//! 2. copy the pages (read back and verified) to their capacity units; torn writes are covered by the journal;
//! 3. flush capacity: a record never names content that is not there;
//! 4. write the block records, each to the older half of its slot; 5. flush them, and the journal;
//! 6. only now reuse what the records no longer name, and write the checkpoint with the new tail and the groups as
//!    they were at 5; 7. flush it, and free the journal below the tail.
//!
//! After a crash at any point the checkpoint on disk still has the journal that covers the unfinished part.
//!
//! Invariants
//! - The checkpoint's tail passes nothing that is unapplied, or applied but in no stable record.
//! - What the checkpoint says a group has applied is stable in the journal or in records.
//! - A slot at or above the checkpoint's mark is never written: the mark is raised by a cycle of its own, after
//!   zeroing the slots, so that recovery can tell a blank slot from a damaged one.

use std::collections::VecDeque;

use xsan_protocol::disk::block_record::{RECORD_SIZE, SLOT_SIZE};
use xsan_protocol::disk::checkpoint::{Checkpoint, GroupRow};
use xsan_protocol::ids::Version;
use xsan_protocol::limits::PAGES_PER_WRITE_MAX;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange};

use super::StoreEvent;
use super::engine::{Operation, Store, mismatches, read_buffer};
use super::index::{JournalPage, MixMap, NO_SLOT, Snapshot};
use crate::disk::buffers::{Buffer, BufferMut};
use crate::io::{DeviceRole, DiskAction, DiskError, DiskOk};

/// Blocks and pages of one cycle.
const CYCLE_BLOCKS_MAX: usize = 512;
const CYCLE_PAGES_MAX: usize = 8192;
/// Pages being copied at once, by the eighths of the journal that are taken: the device serves the journal too,
/// and what clients wait for is there. The fuller it is, the less they are spared.
const COPY_PAGES: [usize; 9] = [24, 24, 24, 24, 24, 48, 128, 512, 1024];
/// As long as nothing is appended.
const COPY_PAGES_QUIET: usize = 256;
/// Nobody writes when there was no append for so long.
const QUIET_NS: u64 = 100_000_000;
/// Records being written at once.
const RECORDS_IN_FLIGHT: usize = 32;
/// Slots zeroed when the mark is raised.
const MARK_STEP: u32 = CYCLE_BLOCKS_MAX as u32;
/// Bytes of the buffer of zeroes that slots are zeroed from.
const ZERO_BYTES: usize = 64 * 1024;
/// A block with a damaged page is left alone for so long, or until something of it is mended.
pub(super) const SKIP_NS: u64 = 1_000_000_000;
/// After so many cycles that met damage in a block, its pages go to their place as they are: what could be mended in the journal can be
/// mended there, nothing else waits for them any more, and opening the store does not stop at them.
const AS_IT_IS_AFTER: u8 = 8;
/// After one, when so many eighths of the journal are taken.
const AS_IT_IS_EIGHTHS: usize = 6;

/// What the cycle waits for, or does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    FlushJournal,
    Copy,
    FlushCapacity,
    Records,
    FlushRecords,
    ZeroSlots,
    FlushZeroes,
    Checkpoint,
    FlushCheckpoint,
}

/// Pages of one block that lie one behind the other in capacity.
#[derive(Debug)]
struct Run {
    /// Index of the block in the cycle.
    block: usize,
    offset: u64,
    pages: Vec<JournalPage>,
}

/// A run being copied; `parts` are its pieces, each contiguous in the journal.
#[derive(Debug)]
struct Copying {
    run: Run,
    pieces: Vec<std::ops::Range<usize>>,
    parts: Vec<Option<Buffer>>,
    left: usize,
    /// Pages that do not match their checksums, or that can not be read.
    bad: Vec<u16>,
    /// It is not written.
    stays: bool,
}

#[derive(Debug)]
pub struct Destage {
    phase: Phase,
    blocks: Vec<Snapshot>,
    runs: VecDeque<Run>,
    copying: MixMap<u64, Copying>,
    next_run: u64,
    pages_in_flight: usize,
    next_record: usize,
    /// Writes and flushes of the phase that are under way.
    left: usize,
    checkpoint: Option<Checkpoint>,
    /// The checkpoint is the one before the copying, not the one after.
    opening: bool,
    pub(super) checkpoint_number: u64,
    /// Everything is to go to its place (idle, or the end of recovery).
    pub(super) drain: bool,
}

impl Destage {
    pub fn new(checkpoint_number: u64) -> Self {
        Self {
            phase: Phase::Idle,
            blocks: Vec::new(),
            runs: VecDeque::new(),
            copying: MixMap::default(),
            next_run: 0,
            pages_in_flight: 0,
            next_record: 0,
            left: 0,
            checkpoint: None,
            opening: false,
            checkpoint_number,
            drain: false,
        }
    }

    /// The store has failed: what is being copied stays where it was.
    pub fn discard_copies(&mut self) {
        self.copying.clear();
    }

    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }
}

impl Store {
    /// Does as much of the cycle as can be done now.
    pub(super) fn step_destage(&mut self) {
        loop {
            let before = self.destage.phase;
            match before {
                Phase::Idle => self.maybe_start_cycle(),
                Phase::Copy => self.step_copy(),
                Phase::Records => self.step_records(),
                Phase::Checkpoint => self.step_checkpoint(),
                Phase::ZeroSlots => self.step_zero_slots(),
                Phase::FlushJournal
                | Phase::FlushCapacity
                | Phase::FlushRecords
                | Phase::FlushZeroes
                | Phase::FlushCheckpoint => {}
            }
            if self.destage.phase == before {
                return;
            }
        }
    }

    /// Eighths of the journal that nothing new can go to: what is in use, and what is kept to carry entries along.
    fn eighths_taken(&self) -> usize {
        let taken = self.journal.used_bytes() + self.carry_reserve(0);
        (taken * 8 / self.journal.ring_bytes()).min(8) as usize
    }

    fn destage_is_due(&self) -> bool {
        let idle = self.journal.is_quiet() && self.now_ns >= self.last_append_ns + self.options.idle_after_ns;
        self.eighths_taken() >= 4 || self.destage.drain || idle
    }

    fn maybe_start_cycle(&mut self) {
        if !self.reads.no_repairs() || self.reads.repairs_waiting() || !self.destage_is_due() {
            return;
        }
        let chosen = self.choose_blocks();
        if chosen.is_empty() {
            // Nothing to copy, but what was applied and undone again may still hold the tail.
            if (self.eighths_taken() >= 4 || self.destage.drain) && self.new_tail() > self.journal.tail {
                self.enter_flush(Phase::FlushRecords);
            }
            return;
        }
        let slots = chosen.iter().filter(|id| self.index.block(**id).slot == NO_SLOT).count() as u32;
        if slots > self.slots.ready() && self.slots.mark() < self.slots.count() {
            self.destage.phase = Phase::ZeroSlots;
            return;
        }
        self.take_snapshots(&chosen);
        self.counters.destage_cycles += 1;
        self.destage.opening = true;
        self.destage.checkpoint = Some(self.next_checkpoint(self.journal.tail));
        if self.journal.flushed < self.journal.durable {
            self.enter_flush(Phase::FlushJournal);
        } else {
            self.destage.phase = Phase::Checkpoint;
        }
    }

    /// The oldest dirty blocks that there is capacity for, and a slot.
    fn choose_blocks(&self) -> Vec<u32> {
        let (mut chosen, mut pages, mut units, mut slots) = (Vec::new(), 0, 0, 0);
        for id in self.index.dirty_blocks() {
            let block = self.index.block(id);
            if chosen.len() == CYCLE_BLOCKS_MAX || pages >= CYCLE_PAGES_MAX {
                break;
            }
            let wanted = (block.units_wanted(), u32::from(block.slot == NO_SLOT));
            let fits = units + wanted.0 <= self.units.free() && slots + wanted.1 <= self.slots.free();
            let marking = self.groups.get(&block.group).is_some_and(super::group::Group::is_marking);
            if block.skip_until_ns > self.now_ns || !fits || marking {
                continue;
            }
            chosen.push(id);
            pages += block.journalled_pages();
            (units, slots) = (units + wanted.0, slots + wanted.1);
        }
        chosen
    }

    fn take_snapshots(&mut self, chosen: &[u32]) {
        let urgent = self.eighths_taken() >= AS_IT_IS_EIGHTHS || self.destage.drain;
        let as_it_is_after = if urgent { 1 } else { AS_IT_IS_AFTER };
        for id in chosen {
            let slot = match self.index.block(*id).slot {
                NO_SLOT => self.slots.allocate().expect("`choose_blocks` counted them"),
                slot => slot,
            };
            let units = &mut self.units;
            let allocate = || units.allocate().expect("`choose_blocks` counted them");
            let mut snapshot = self.index.begin_destage(*id, slot, self.id, allocate);
            snapshot.as_it_is =
                self.index.block(*id).met_damaged >= as_it_is_after && !Mutation::DamageLeft.is_on();
            snapshot.record.timestamp_ns = self.now_ns;
            snapshot.record.acked =
                self.groups.get(&snapshot.record.group).map_or(Version::ZERO, |group| group.settled());
            self.destage.blocks.push(snapshot);
        }
        let mut runs = Vec::new();
        for (block, snapshot) in self.destage.blocks.iter().enumerate() {
            self.runs_of(block, snapshot, &mut runs);
        }
        runs.sort_unstable_by_key(|run: &Run| run.offset);
        self.destage.runs = runs.into();
        self.destage.next_record = 0;
    }

    fn runs_of(&self, block: usize, snapshot: &Snapshot, runs: &mut Vec<Run>) {
        let first = runs.len();
        for page in &snapshot.pages {
            let (unit, within) = (page.page as usize / PAGES_PER_UNIT, page.page as usize % PAGES_PER_UNIT);
            let unit_offset = self.layout.unit_offset(snapshot.record.units[unit].capacity);
            let offset = unit_offset + (within * PAGE_SIZE) as u64;
            if let Some(last) = runs[first..].last_mut()
                && last.offset + (last.pages.len() * PAGE_SIZE) as u64 == offset
                && last.pages.len() < PAGES_PER_WRITE_MAX
            {
                last.pages.push(*page);
            } else {
                runs.push(Run { block, offset, pages: vec![*page] });
            }
        }
    }

    fn step_copy(&mut self) {
        let quiet = self.now_ns >= self.last_append_ns + QUIET_NS;
        let most = COPY_PAGES[self.eighths_taken()].max(if quiet { COPY_PAGES_QUIET } else { 0 });
        while self.destage.pages_in_flight < most {
            let Some(run) = self.destage.runs.pop_front() else { break };
            if let Err(run) = self.start_copy(run) {
                // No buffers: the foreground has them, and will give them back.
                self.destage.runs.push_front(run);
                break;
            }
        }
        if self.destage.runs.is_empty() && self.destage.copying.is_empty() {
            self.enter_flush(Phase::FlushCapacity);
        }
    }

    fn start_copy(&mut self, run: Run) -> Result<(), Run> {
        let page = PAGE_SIZE as u64;
        let mut pieces: Vec<std::ops::Range<usize>> = Vec::new();
        // Where one sector can not be read, the pages beside it can.
        let singly = self.index.block(self.destage.blocks[run.block].id).met_damaged > 0;
        for (index, at) in run.pages.iter().enumerate() {
            let follows = index > 0 && !singly && {
                let before = run.pages[index - 1].position;
                before + page == at.position && !at.position.is_multiple_of(self.layout.journal.bytes)
            };
            match pieces.last_mut() {
                Some(last) if follows => last.end = index + 1,
                _ => pieces.push(index..index + 1),
            }
        }
        let buffers: Option<Vec<BufferMut>> =
            pieces.iter().map(|piece| self.pool.alloc(piece.len() * PAGE_SIZE)).collect();
        let Some(buffers) = buffers else { return Err(run) };
        let number = self.destage.next_run;
        self.destage.next_run += 1;
        self.destage.pages_in_flight += run.pages.len();
        for (index, buffer) in buffers.into_iter().enumerate() {
            let offset = self.layout.journal_offset(run.pages[pieces[index].start].position);
            let id = self.operation(Operation::DestageRead { run: number, piece: index });
            self.actions.push(DiskAction::Read { id, device: self.layout.journal_device, offset, buffer });
        }
        let copying = Copying {
            left: pieces.len(),
            parts: pieces.iter().map(|_| None).collect(),
            pieces,
            run,
            bad: Vec::new(),
            stays: false,
        };
        self.destage.copying.insert(number, copying);
        Ok(())
    }

    pub(super) fn on_destage_read(&mut self, number: u64, piece: usize, result: Result<DiskOk, DiskError>) {
        if self.failed {
            return;
        }
        let copying = self.destage.copying.get_mut(&number).expect("a run stays until it is written");
        let pages = &copying.run.pages[copying.pieces[piece].clone()];
        let snapshot = &mut self.destage.blocks[copying.run.block];
        let part = &mut copying.parts[piece];
        let bad = match result {
            Ok(done) => {
                let buffer = read_buffer(done);
                let checksums: Vec<u32> = pages.iter().map(|page| page.checksum).collect();
                let bad = mismatches(&buffer, &checksums);
                *part = Some(buffer.freeze());
                bad
            }
            // Which of them, the next cycle finds out.
            Err(_) if pages.len() > 1 => Vec::new(),
            Err(_) => vec![0],
        };
        copying.left -= 1;
        if part.is_none() && snapshot.as_it_is {
            *part = self.pool.alloc(pages.len() * PAGE_SIZE).map(unreadable);
        }
        let stays = part.is_none() || !snapshot.as_it_is && !bad.is_empty();
        copying.bad.extend(bad.iter().map(|index| pages[usize::from(*index)].page));
        copying.stays |= stays;
        snapshot.failed |= stays;
        if copying.left == 0 {
            self.tell_damage(number);
            self.write_run(number);
        }
    }

    /// Says which pages of a run are damaged: those, and none of the sound ones between them.
    fn tell_damage(&mut self, number: u64) {
        let copying = self.destage.copying.get_mut(&number).expect("its last piece has just arrived");
        if copying.bad.is_empty() {
            return;
        }
        copying.bad.sort_unstable();
        self.counters.checksum_errors += copying.bad.len() as u64;
        let snapshot = &self.destage.blocks[copying.run.block];
        self.index.block_mut(snapshot.id).skip_until_ns = self.now_ns.saturating_add(SKIP_NS);
        let (group, key) = (snapshot.record.group, snapshot.record.key);
        tracing::warn!(
            store = %self.id, %group, %key, pages = ?copying.bad, stays = copying.stays,
            "destage met damaged pages in the journal"
        );
        for run in copying.bad.chunk_by(|a, b| a + 1 == *b).filter(|_| !Mutation::DamageLeft.is_on()) {
            let pages = PageRange::new(run[0], run.len() as u16);
            self.events.push(StoreEvent::Damaged { group, key, pages });
        }
    }

    fn write_run(&mut self, number: u64) {
        let copying = self.destage.copying.get_mut(&number).expect("its last piece has just arrived");
        if copying.stays {
            return self.end_run(number);
        }
        let parts: Vec<Buffer> = copying.parts.iter_mut().filter_map(Option::take).collect();
        assert!(parts.len() == copying.pieces.len());
        let (offset, bytes) = (copying.run.offset, copying.run.pages.len() * PAGE_SIZE);
        self.counters.written_capacity_bytes += bytes as u64;
        let id = self.operation(Operation::DestageWrite { run: number });
        self.actions.push(DiskAction::Write { id, device: DeviceRole::Capacity, offset, parts });
    }

    pub(super) fn on_destage_written(&mut self, number: u64) {
        self.end_run(number);
    }

    fn end_run(&mut self, number: u64) {
        let copying = self.destage.copying.remove(&number).expect("a run ends once");
        self.destage.pages_in_flight -= copying.run.pages.len();
    }

    fn step_records(&mut self) {
        while self.destage.left < RECORDS_IN_FLIGHT {
            let Some(snapshot) = self.destage.blocks.get_mut(self.destage.next_record) else { break };
            if snapshot.failed {
                self.destage.next_record += 1;
                continue;
            }
            let Some(mut buffer) = self.pool.alloc(RECORD_SIZE) else { break };
            let record = &mut snapshot.record;
            record.cycle = self.destage.checkpoint_number;
            record.generation = self.slots.next_generation(record.slot);
            record.encode(&mut buffer);
            let offset = self.layout.record_offset(record.slot, record.generation);
            self.destage.next_record += 1;
            self.counters.written_record_bytes += RECORD_SIZE as u64;
            self.cycle_write(offset, vec![buffer.freeze()]);
        }
        if self.destage.next_record == self.destage.blocks.len() && self.destage.left == 0 {
            self.enter_flush(Phase::FlushRecords);
        }
    }

    fn cycle_write(&mut self, offset: u64, parts: Vec<Buffer>) {
        let id = self.operation(Operation::CycleWrite);
        self.destage.left += 1;
        self.actions.push(DiskAction::Write { id, device: DeviceRole::Capacity, offset, parts });
    }

    /// Flushes what the phase is about; where the journal is meant too, it covers what is durable now.
    fn enter_flush(&mut self, phase: Phase) {
        assert!(self.destage.left == 0);
        if phase == Phase::FlushCapacity && Mutation::RecordBeforeData.is_on() {
            self.destage.phase = Phase::Records;
            return;
        }
        if phase == Phase::FlushRecords && Mutation::CheckpointBeforeRecords.is_on() {
            self.destage.checkpoint = Some(self.next_checkpoint(self.new_tail()));
            self.retire_blocks();
            self.destage.phase = Phase::Checkpoint;
            return;
        }
        self.destage.phase = phase;
        let capacity = phase != Phase::FlushJournal;
        let journal = matches!(phase, Phase::FlushJournal | Phase::FlushRecords | Phase::FlushZeroes);
        let apart = self.layout.journal_device != DeviceRole::Capacity;
        if matches!(phase, Phase::FlushRecords | Phase::FlushZeroes) {
            self.destage.checkpoint = Some(self.next_checkpoint(self.new_tail()));
        }
        if capacity {
            let covered = (!apart).then_some(self.journal.durable);
            self.cycle_flush(DeviceRole::Capacity, covered);
        }
        if journal && (apart || !capacity) {
            self.cycle_flush(self.layout.journal_device, Some(self.journal.durable));
        }
    }

    fn cycle_flush(&mut self, device: DeviceRole, covered: Option<u64>) {
        let id = self.operation(Operation::CycleFlush { covered });
        self.destage.left += 1;
        self.counters.flushes += 1;
        self.actions.push(DiskAction::Flush { id, device });
    }

    /// Oldest position that replay will need; the running cycle's blocks count as done unless they failed.
    pub(super) fn new_tail(&self) -> u64 {
        let failed = self.destage.blocks.iter().filter(|snapshot| snapshot.failed);
        let kept = failed.map(Snapshot::dirty_since).chain(self.index.oldest_dirty());
        let pending = self.groups.values().filter_map(super::group::Group::oldest_position);
        let oldest = kept.chain(pending).min().unwrap_or(u64::MAX);
        let page = PAGE_SIZE as u64;
        (oldest / page * page).min(self.journal.durable).max(self.journal.tail)
    }

    pub(super) fn next_checkpoint(&self, tail: u64) -> Checkpoint {
        let rows = self.groups.iter().map(|(group, state)| GroupRow {
            group: *group,
            applied: state.settled(),
            reset_position: state.reset_position,
            damaged: state.damaged,
        });
        Checkpoint {
            store: self.id,
            number: self.destage.checkpoint_number + 1,
            tail,
            flushed: self.journal.flushed.max(tail),
            session: self.session,
            session_start: self.session_start,
            slots_mark: self.slots.mark(),
            generations: self.slots.generations(),
            damaged: self.damaged,
            groups: rows.collect(),
        }
    }

    fn step_zero_slots(&mut self) {
        let mark = self.slots.mark();
        let goal = (mark + MARK_STEP).min(self.slots.count());
        if self.destage.left > 0 {
            return;
        }
        let Some(mut zeroes) = self.pool.alloc(ZERO_BYTES) else { return };
        zeroes.fill(0);
        let zeroes = zeroes.freeze();
        let (mut offset, end) = (self.layout.record_offset(mark, 0), self.layout.record_offset(goal - 1, 0));
        let end = end + SLOT_SIZE as u64;
        while offset < end {
            let bytes = (end - offset).min(1 << 20) as usize;
            let parts = (0..bytes).step_by(ZERO_BYTES);
            let parts = parts.map(|at| zeroes.slice(0..ZERO_BYTES.min(bytes - at)));
            self.counters.written_record_bytes += bytes as u64;
            self.cycle_write(offset, parts.collect());
            offset += bytes as u64;
        }
        self.destage.next_record = goal as usize;
    }

    fn step_checkpoint(&mut self) {
        if self.destage.left > 0 {
            return;
        }
        let checkpoint = self.destage.checkpoint.as_ref().expect("made when the flush before it was issued");
        let Some(mut buffer) = self.pool.alloc(Checkpoint::size(checkpoint.groups.len())) else { return };
        checkpoint.encode(&mut buffer);
        let offset = self.layout.checkpoint_offset(checkpoint.number);
        if Mutation::JournalFreedEarly.is_on() {
            self.journal.release(checkpoint.tail);
        }
        self.counters.written_checkpoint_bytes += buffer.len() as u64;
        self.cycle_write(offset, vec![buffer.freeze()]);
    }

    /// A write or flush of the cycle has ended.
    pub(super) fn on_cycle_written(&mut self) {
        self.destage.left -= 1;
        if self.destage.left > 0 {
            return;
        }
        match self.destage.phase {
            Phase::FlushJournal => self.destage.phase = Phase::Checkpoint,
            Phase::FlushCapacity => self.destage.phase = Phase::Records,
            Phase::FlushRecords => {
                self.retire_blocks();
                self.destage.phase = Phase::Checkpoint;
            }
            Phase::ZeroSlots => self.enter_flush(Phase::FlushZeroes),
            Phase::FlushZeroes => {
                let goal = self.destage.next_record as u32;
                self.slots.raise_mark(goal);
                let checkpoint = self.destage.checkpoint.as_mut().expect("made when the flush was issued");
                checkpoint.slots_mark = goal;
                self.destage.phase = Phase::Checkpoint;
            }
            Phase::Checkpoint => {
                if Mutation::JournalFreedUnflushed.is_on()
                    && let Some(checkpoint) = &self.destage.checkpoint
                {
                    self.journal.release(checkpoint.tail);
                }
                self.enter_flush(Phase::FlushCheckpoint);
            }
            Phase::FlushCheckpoint => {
                let checkpoint = self.destage.checkpoint.take().expect("it has just been written");
                self.destage.checkpoint_number = checkpoint.number;
                self.journal.release(checkpoint.tail);
                self.carry_at = 0;
                let opening = std::mem::take(&mut self.destage.opening);
                self.destage.phase = if opening { Phase::Copy } else { Phase::Idle };
            }
            // More records may follow: `step_records` looks.
            Phase::Records => {}
            Phase::Idle | Phase::Copy => unreachable!("nothing of the cycle is under way"),
        }
    }

    /// The records are on stable media: their pages leave the journal, what they no longer name can be reused.
    fn retire_blocks(&mut self) {
        for snapshot in std::mem::take(&mut self.destage.blocks) {
            let freed = self.index.end_destage(&snapshot);
            freed.units.into_iter().for_each(|unit| self.units.release(unit));
            if let Some(slot) = freed.slot {
                self.slots.release(slot);
            }
        }
    }
}

/// What stands for a page that can not be read: zeroes, which a read takes for damage as well.
fn unreadable(mut buffer: BufferMut) -> Buffer {
    buffer.fill(0);
    buffer.freeze()
}
