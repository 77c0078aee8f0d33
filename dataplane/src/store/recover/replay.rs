//! Replay of the journal, from the checkpoint's tail to the first batch that is not whole.
//!
//! That is the torn end of what was never flushed, unless there is evidence that everything there had been flushed: a later
//! batch, or the checkpoint, whose flushed mark lies above; a block record that holds something newer; a batch of a session
//! whose checkpoints are lost. Then it is corruption. And where it had been written though never flushed (a later batch says so, or it can not
//! be read), only a loss of power explains it: the store counts as that of a host which had one.
//!
//! Invariants
//! - Batches of this session lie at or above `session_start`, which is on stable media before the first of them:
//!   remainders of an older session there are refused, whatever their chain says.
//! - No pass over the batches goes beyond the end of the one before, which may have met a read that failed.
//!
//! Source: Alagappan et al., "Protocol-Aware Recovery for Consensus-Based Storage", FAST '18.

use std::cell::RefCell;
use std::sync::Arc;

use xsan_protocol::disk::journal::{self, BatchHead, BatchHeader, Descriptor, HEAD_BYTES_MAX, Kind};
use xsan_protocol::ids::{GroupId, Seq, Version};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::PAGE_SIZE;

use super::{OpenError, READ_BYTES, Recovery, read_again, read_around};
use crate::disk::buffers::{Buffer, BufferMut, BufferPool};
use crate::store::carry::carried_pages;
use crate::store::engine::mismatches;
use crate::store::group::Pending;
use crate::store::index::Change;
use crate::store::reserve::{Claim, Wanted};

/// How far behind the end of the journal a later whole batch is looked for.
const LOOK_AHEAD_BYTES: u64 = 64 << 20;

/// Where a walk over the batches is.
struct Chain {
    end: u64,
    limit: u64,
    session: u64,
    first: bool,
    /// Start of the next lap of the ring, and what the batch there says is the end of the one before it.
    next_lap: (u64, Option<u64>),
}

/// A carry of a group that is complete: of its entries above `after`, by records from `start` up to `end`.
pub(super) struct Carried {
    after: Seq,
    start: u64,
    end: u64,
}

/// The highest marks of the batches behind the end of replay.
#[derive(Default)]
struct Ahead {
    flushed: u64,
    durable: u64,
}

thread_local! {
    /// Memory for the data of replayed entries: those that stay pending must not take the shard's buffers away.
    ///
    /// Arenas are never unmapped, and only what replay fills of them takes memory; a later opening uses them again.
    static REPLAY_ARENAS: RefCell<Vec<&'static BufferPool>> = const { RefCell::new(Vec::new()) };
}

fn replay_buffer(bytes: usize) -> BufferMut {
    const ARENA_BYTES: usize = 64 << 20;
    REPLAY_ARENAS.with_borrow_mut(|arenas| {
        if let Some(buffer) = arenas.iter().find_map(|arena| arena.alloc(bytes)) {
            return buffer;
        }
        let arena = BufferPool::anonymous(ARENA_BYTES);
        arenas.push(arena);
        arena.alloc(bytes).expect("a fresh arena has slots of every class")
    })
}

impl Recovery<'_> {
    /// Reads batches from the checkpoint's tail on, and applies what is acknowledged.
    pub(super) fn replay(&mut self) -> Result<(), OpenError> {
        let mut head = self.devices.buffer(HEAD_BYTES_MAX)?;
        let mut chain = self.chain(u64::MAX);
        // Once for the resets and carries: what one of them dropped must not be applied, and comes before it.
        while let Some(batch) = self.next_head(&mut chain, &mut head) {
            for (number, descriptor) in batch.descriptors.iter().enumerate() {
                let (group, position) = (descriptor.group, batch.header.position + number as u64);
                match descriptor.kind {
                    Kind::Reset => self.resets.entry(group).or_default().push((position, descriptor.acked)),
                    Kind::Carried => {
                        let carried =
                            Carried { after: descriptor.acked, start: descriptor.start, end: position };
                        self.carried.entry(group).or_default().push(carried);
                    }
                    _ => {}
                }
            }
        }
        // What could not be read a moment ago may be there now, but was not looked through: replay goes no further.
        let mut limit = chain.end;
        let is_known_whole = !self.carried.is_empty();
        if is_known_whole {
            limit = self.whole_end(limit, &mut head);
            self.carried.values_mut().for_each(|carried| carried.retain(|carried| carried.end < limit));
        }
        let mut chain = self.chain(limit);
        while let Some(batch) = self.next_head(&mut chain, &mut head) {
            let Some(data) = self.read_data(&batch) else { break };
            self.replay_batch(&batch, &data);
            self.end = chain.end;
        }
        if is_known_whole && self.end < limit {
            tracing::error!(store = %self.superblock.store, end = self.end, "the journal can not be read any more");
            self.damaged = true;
        }
        self.seen_end = self.seen_end.max(chain.end);
        Ok(())
    }

    /// The beginning of a walk over the batches up to `limit`.
    fn chain(&self, limit: u64) -> Chain {
        Chain { end: self.checkpoint.tail, limit, session: 0, first: true, next_lap: (u64::MAX, None) }
    }

    /// Where replay is going to end: at the first batch whose data is not whole, or behind the last.
    fn whole_end(&self, limit: u64, head: &mut BufferMut) -> u64 {
        let mut chain = self.chain(limit);
        let mut end = chain.end;
        while let Some(batch) = self.next_head(&mut chain, head)
            && self.read_data(&batch).is_some()
        {
            end = chain.end;
        }
        end
    }

    /// The head of the batch that follows in the chain.
    fn next_head(&self, chain: &mut Chain, buffer: &mut BufferMut) -> Option<BatchHead> {
        if chain.end >= chain.limit {
            return None;
        }
        let lap = chain.end.next_multiple_of(self.layout.journal.bytes);
        if chain.next_lap.0 != lap {
            chain.next_lap = (lap, self.read_head(lap, buffer).map(|batch| batch.header.previous_end));
        }
        let here = self.read_head(chain.end, buffer);
        let jumped = (chain.next_lap.1 == Some(chain.end)).then(|| self.read_head(lap, buffer)).flatten();
        // Who jumped over the ring's end has overwritten nothing there: what it found may still be there.
        let follow = [here, jumped].into_iter().flatten().filter(|batch| self.follows(&batch.header, chain));
        let batch = follow.max_by_key(|batch| batch.header.session)?;
        let BatchHeader { position, session, .. } = batch.header;
        (chain.end, chain.session) = (position + batch.header.batch_bytes() as u64, session);
        chain.first = false;
        Some(batch)
    }

    /// May the batch be the next of the chain?
    fn follows(&self, batch: &BatchHeader, chain: &Chain) -> bool {
        let BatchHeader { position, previous_end, session, .. } = *batch;
        // The oldest batch kept may itself follow a jump.
        let follows = previous_end == chain.end || chain.first && position == chain.end;
        let newest = self.checkpoint.session;
        let in_order = session >= chain.session && session <= newest;
        let of_session = position < self.checkpoint.session_start || session == newest;
        follows && in_order && of_session || Mutation::StaleBatchReplayed.is_on()
    }

    /// The verified head of the batch at `position`, if there is one that lies within the ring.
    fn read_head(&self, position: u64, buffer: &mut BufferMut) -> Option<BatchHead> {
        let device = self.devices.of(self.layout.journal_device);
        let offset = self.layout.journal_offset(position);
        let lap_end = self.layout.journal.end();
        read_again(device, offset, &mut buffer[..PAGE_SIZE]).ok()?;
        let header = BatchHeader::peek(&buffer[..PAGE_SIZE]).ok()?;
        let ours = header.store == self.superblock.store && header.position == position;
        if !ours || offset + header.batch_bytes() as u64 > lap_end {
            return None;
        }
        let bytes = header.head_bytes();
        read_again(device, offset, &mut buffer[..bytes]).ok()?;
        journal::decode(&buffer[..bytes]).ok()
    }

    /// The data of a batch, record by record; `None` when any page of it is not as it should be.
    fn read_data(&self, batch: &BatchHead) -> Option<Vec<Option<Buffer>>> {
        let device = self.devices.of(self.layout.journal_device);
        let data = batch.header.position + batch.header.head_bytes() as u64;
        let mut records = Vec::with_capacity(batch.descriptors.len());
        for descriptor in &batch.descriptors {
            if !descriptor.kind.has_data() {
                records.push(None);
                continue;
            }
            let mut buffer = replay_buffer(descriptor.pages.bytes());
            let offset =
                self.layout.journal_offset(data) + u64::from(descriptor.data_page) * PAGE_SIZE as u64;
            read_again(device, offset, &mut buffer).ok()?;
            let bad = mismatches(&buffer, checksums(batch, descriptor));
            let torn = bad.iter().any(|page| descriptor.lost.unbounded_shr(u32::from(*page)) & 1 == 0);
            if torn && !Mutation::TornBatchReplayed.is_on() {
                return None;
            }
            records.push(Some(buffer.freeze()));
        }
        Some(records)
    }

    fn replay_batch(&mut self, batch: &BatchHead, data: &[Option<Buffer>]) {
        let data_position = batch.header.position + batch.header.head_bytes() as u64;
        for (number, descriptor) in batch.descriptors.iter().enumerate() {
            let position = batch.header.position + number as u64;
            let at = data_position + u64::from(descriptor.data_page) * PAGE_SIZE as u64;
            let table: Arc<[u32]> = checksums(batch, descriptor).into();
            match descriptor.kind {
                Kind::Write | Kind::Zero | Kind::Carry | Kind::CarryZero => {
                    if self.counts(descriptor, position) {
                        self.replay_entry(descriptor, position, at, table, data[number].clone());
                    }
                }
                Kind::Carried => {
                    let carried = self.carried.get(&descriptor.group);
                    if carried.is_some_and(|carried| carried.iter().any(|carried| carried.end == position)) {
                        self.acknowledge_at(descriptor, position);
                    }
                }
                Kind::Push | Kind::PushZero => self.replay_push(descriptor, position, at, &table),
                Kind::Reset => self.replay_reset(descriptor, position),
            }
        }
    }

    fn replay_reset(&mut self, descriptor: &Descriptor, position: u64) {
        let known = self.groups.get(&descriptor.group).map_or(0, |group| group.reset_position);
        if position > known {
            // The reset drops what was not applied; what was, it has not.
            self.acknowledge(descriptor.group, descriptor.acked);
            let group = self.groups.entry(descriptor.group).or_default();
            group.reset(descriptor.group, descriptor.version, &mut self.reserved);
            group.on_reset_durable(position, descriptor.version, group.life);
        }
    }

    /// Does this record of an entry count, or another of the same entry?
    fn counts(&self, descriptor: &Descriptor, position: u64) -> bool {
        let copy = matches!(descriptor.kind, Kind::Carry | Kind::CarryZero);
        let (group, seq) = (descriptor.group, descriptor.version.seq);
        let carried = self.carried.get(&group).map_or(&[][..], Vec::as_slice);
        let mut of_it = carried.iter().filter(|carried| seq > carried.after);
        if copy
            && !of_it.clone().any(|carried| (carried.start..carried.end).contains(&position))
            && !Mutation::CarryUnfinished.is_on()
        {
            return false;
        }
        // What a reset lies behind is not what was carried, for all its seq.
        let resets = self.resets.get(&group).map_or(&[][..], Vec::as_slice);
        let reset_before = |end: u64| resets.iter().any(|(reset, _)| (position..end).contains(reset));
        !of_it.any(|carried| position < carried.start && !reset_before(carried.start))
    }

    /// What the group had applied at the next reset behind `position`, if the checkpoint knows of that reset.
    fn applied_before_reset(&self, group: GroupId, position: u64) -> Option<Seq> {
        let (next, applied) = self.resets.get(&group)?.iter().find(|(reset, _)| *reset > position)?;
        (*next <= self.groups.get(&group)?.reset_position).then_some(*applied)
    }

    fn replay_entry(
        &mut self,
        descriptor: &Descriptor,
        position: u64,
        at: u64,
        table: Arc<[u32]>,
        bytes: Option<Buffer>,
    ) {
        let before_reset = self.applied_before_reset(descriptor.group, position);
        let group = self.groups.entry(descriptor.group).or_default();
        let has_data = descriptor.kind.has_data();
        let data_pages = if has_data { usize::from(descriptor.pages.count) } else { 0 };
        let wanted = match has_data {
            true => self.index.wanted(descriptor.group, descriptor.key, descriptor.pages),
            false => Wanted::default(),
        };
        let pending = Pending {
            position,
            data_position: at,
            durable: true,
            version: descriptor.version,
            key: descriptor.key,
            pages: descriptor.pages,
            previous_first: descriptor.previous_first,
            previous_last: descriptor.previous_last,
            checksums: has_data.then_some(table),
            bytes,
            claim: Claim { wanted, journal_pages: carried_pages(data_pages) },
        };
        // What was applied, by the checkpoint or the reset, may be in its block's record or not. What a reset dropped is gone, and its seq
        // may have been given again.
        if descriptor.version.seq <= before_reset.unwrap_or(group.applied.seq) {
            self.index.apply(&pending.change(descriptor.group));
            return;
        }
        if before_reset.is_some() {
            return;
        }
        if descriptor.version.seq != group.last.seq.next() {
            let (group, version) = (descriptor.group, descriptor.version);
            tracing::error!(store = %self.superblock.store, %group, %version, "the journal lacks entries");
            self.damaged = true;
            return;
        }
        group.last = descriptor.version;
        self.reserved.add(descriptor.group, pending.key, pending.claim);
        group.pending.push_back(pending);
        self.acknowledge(descriptor.group, descriptor.acked);
    }

    fn acknowledge(&mut self, group: GroupId, through: Seq) {
        let state = self.groups.entry(group).or_default();
        state.acknowledged = state.acknowledged.max(through);
        state.apply_ready(group, &mut self.index, &mut self.reserved);
    }

    /// What a record says was acknowledged, unless a reset that the checkpoint knows of came after it: seqs may have gone back.
    fn acknowledge_at(&mut self, descriptor: &Descriptor, position: u64) {
        let reset = self.groups.get(&descriptor.group).map_or(0, |group| group.reset_position);
        if position > reset {
            self.acknowledge(descriptor.group, descriptor.acked);
        }
    }

    fn replay_push(&mut self, descriptor: &Descriptor, position: u64, at: u64, table: &[u32]) {
        self.acknowledge_at(descriptor, position);
        self.index.apply(&Change {
            position,
            push: true,
            group: descriptor.group,
            key: descriptor.key,
            pages: descriptor.pages,
            version: descriptor.version,
            previous_first: Version::ZERO,
            previous_last: Version::ZERO,
            data: descriptor.kind.has_data().then_some((at, table)),
        });
    }

    /// Is the end of the replay the torn end of the journal, or is something missing that was flushed?
    pub(super) fn judge(&mut self) -> Result<(), OpenError> {
        let store = self.superblock.store;
        let Ahead { flushed: flushed_above, durable } = self.look_ahead()?;
        self.lost_end = durable > self.end || self.is_end_unreadable()?;
        if self.lost_end {
            tracing::warn!(%store, end = self.end, durable, "the end of the journal is missing, which no flush had covered");
        }
        let (session, known) = (self.seen_session, self.checkpoint.session);
        let is_torn = flushed_above.max(self.checkpoint.flushed) <= self.end && self.newest_record < self.end;
        if !is_torn || session > known {
            tracing::error!(
                %store, end = self.end, flushed = flushed_above, session, known, "the journal is damaged below what was flushed"
            );
            self.damaged = true;
        }
        Ok(())
    }

    /// Looks through the whole batch heads behind the end.
    fn look_ahead(&mut self) -> Result<Ahead, OpenError> {
        let ring = self.layout.journal.bytes;
        let limit = (self.checkpoint.tail + ring).min(self.end + LOOK_AHEAD_BYTES.min(ring));
        let device = self.devices.of(self.layout.journal_device);
        let mut buffer = self.devices.buffer(READ_BYTES)?;
        let mut head = self.devices.buffer(HEAD_BYTES_MAX)?;
        let (mut position, mut ahead) = (self.end, Ahead::default());
        while position < limit {
            let lap_left = ring - position % ring;
            let bytes = (limit - position).min(lap_left).min(READ_BYTES as u64) as usize;
            // One unreadable sector must not hide what is behind it; zeroes are no batch.
            let _ = read_around(device, self.layout.journal_offset(position), &mut buffer[..bytes]);
            for (page, at) in buffer[..bytes].chunks_exact(PAGE_SIZE).zip((position..).step_by(PAGE_SIZE)) {
                let candidate = BatchHeader::peek(page).is_ok_and(|header| header.position == at);
                if candidate && let Some(batch) = self.read_head(at, &mut head) {
                    ahead.flushed = ahead.flushed.max(batch.header.flushed);
                    // Remainders of earlier sessions tell of ends that were known then.
                    if batch.header.session == self.checkpoint.session {
                        ahead.durable = ahead.durable.max(batch.header.durable);
                    }
                    self.seen_session = self.seen_session.max(batch.header.session);
                    self.seen_end = self.seen_end.max(at + batch.header.batch_bytes() as u64);
                }
            }
            position += bytes as u64;
        }
        Ok(ahead)
    }

    /// Is there something at the end that the device does not give?
    fn is_end_unreadable(&self) -> Result<bool, OpenError> {
        let device = self.devices.of(self.layout.journal_device);
        let mut page = self.devices.buffer(PAGE_SIZE)?;
        let offset = self.layout.journal_offset(self.end);
        if read_again(device, offset, &mut page).is_err() {
            return Ok(true);
        }
        let of_session = |header: &BatchHeader| {
            header.store == self.superblock.store
                && header.position == self.end
                && header.session == self.checkpoint.session
                && offset + header.batch_bytes() as u64 <= self.layout.journal.end()
        };
        let Some(header) = BatchHeader::peek(&page).ok().filter(of_session) else { return Ok(false) };
        let mut rest = (PAGE_SIZE..header.batch_bytes()).step_by(PAGE_SIZE);
        Ok(rest.any(|at| read_again(device, offset + at as u64, &mut page).is_err()))
    }
}

/// Checksums of a record's data.
fn checksums<'b>(batch: &'b BatchHead, descriptor: &Descriptor) -> &'b [u32] {
    if !descriptor.kind.has_data() {
        return &[];
    }
    let first = descriptor.data_page as usize;
    &batch.checksums[first..first + usize::from(descriptor.pages.count)]
}
