//! Resync: how a primary brings a learner up to date, moving only what differs.
//!
//! The learner gets every new entry from a start on. What it lacks of the past is found by comparing unit versions, a batch of blocks at
//! a time, and pushed unit by unit. A whole pass without a difference, and the learner's journal on stable media, and it is
//! proposed for the acting set. The learner's side is `learner`.
//!
//! Invariants
//! - While a unit is read and pushed, no write to it is sequenced: on the connection the unit comes after every entry that it
//!   holds, and before every one that it lacks.
//! - No learner that acted since the last settled epoch is started, and drops its tail, before the present one is settled: it may be the
//!   only one that has what was acknowledged then.
//! - Nothing is compared before everything up to the start is acknowledged, so applied: the learner never gets those entries.
//!
//! - Once a learner was proposed, it is not started anew in that epoch: the proposal may still be taken, and a member that has just
//!   dropped its tail must not be among the acting. It goes on where it was, or another epoch sorts it out.
//!
//! Source: docs/decisions/0005-unit-versions.md.

use std::collections::{BTreeMap, VecDeque};

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, Epoch, GroupId, NodeId, Seq, Version};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PageRange, UNIT_SIZE, UNITS_PER_BLOCK};
use xsan_protocol::wire::header::{Header, Opcode};
use xsan_protocol::wire::replication::{BlockDigest, BlockVersions, PeerInfo, PushMeta, block_digest};
use zerocopy::IntoBytes;

use super::action::Change;
use super::call::{Call, ReadJob, ReadPurpose};
use super::frames::{self, KEY_MAX};
use super::group::Group;
use super::lag::Lag;
use super::peering::{ASK_AGAIN_NS, PROPOSE_AGAIN_NS, is_due};
use crate::net::frame::Frame;
use crate::store::PageData;

/// Blocks of one comparison.
pub(super) const COMPARE_BLOCKS: usize = 64;
/// Units on their way to learners, of a shard and of one learner.
const PUSHES_MAX: usize = 16;
const LEARNER_PUSHES_MAX: usize = 8;
/// A learner whose store has no room, or does not get on, is asked no sooner than this, and the usual time between two
/// questions, later. So clients do not wait all the time for what is kept for it.
const LEFT_ALONE_NS: u64 = 1_000_000_000;
/// A pass that left units out is followed by the next one after this.
const RESUME_AFTER_NS: u64 = 200_000_000;
/// And one that brought over what is of no known version.
const UNKNOWN_AFTER_NS: u64 = 10_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Lost,
    /// LearnStart was sent, with entries up to this one left out.
    Starting(Version),
    Running(Version),
    /// The connection broke after it was proposed: it is asked where its journal ends.
    Resuming(Version),
    /// It was proposed, and lacks entries that are kept no more: it starts anew with the next epoch.
    Behind,
}

#[derive(Debug)]
struct Compare {
    number: u64,
    /// This node's versions when it asked.
    blocks: BTreeMap<BlockKey, [Version; UNITS_PER_BLOCK]>,
    end: BlockKey,
}

/// Where a pass over the group's blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    From(BlockKey),
    Done,
}

#[derive(Debug)]
pub(super) struct Learner {
    pub node: NodeId,
    step: Step,
    attempt: u32,
    asked_ns: Option<u64>,
    pub sent: Seq,
    pub durable: Seq,
    /// How it gets on with what is acknowledged.
    lag: Lag,
    /// An entry whose way to its journal is being timed, and when it was sent.
    timed: Option<(Seq, u64)>,
    pass: Pass,
    differences: u64,
    /// A block that it got as it is here, and that nobody may take for whole.
    unknown: Option<BlockKey>,
    compare: Option<Compare>,
    to_push: VecDeque<(BlockKey, u8)>,
    /// Pushes that are not answered yet.
    pub pushing: usize,
    /// Number of the flush that makes what it got stable.
    flush: Option<u64>,
    complete: bool,
    /// A unit could not be read or stored: no new pass before this.
    resume_ns: u64,
    proposed_ns: Option<u64>,
}

/// A unit that is being pushed: writes to it wait.
#[derive(Debug)]
pub(super) struct PushLock {
    pub learner: NodeId,
    pub key: BlockKey,
    pub unit: u8,
    /// The store is being read.
    reading: bool,
}

impl Learner {
    pub fn new(node: NodeId) -> Self {
        Self {
            node,
            step: Step::Lost,
            attempt: 0,
            asked_ns: None,
            sent: Seq(0),
            durable: Seq(0),
            lag: Lag::default(),
            timed: None,
            pass: Pass::From(BlockKey::default()),
            differences: 0,
            unknown: None,
            compare: None,
            to_push: VecDeque::new(),
            pushing: 0,
            flush: None,
            complete: false,
            resume_ns: 0,
            proposed_ns: None,
        }
    }

    /// Does it get new entries?
    pub fn is_running(&self) -> bool {
        matches!(self.step, Step::Running(_))
    }

    /// A new entry goes out to it.
    pub fn on_sent(&mut self, seq: Seq, now_ns: u64) {
        self.sent = seq;
        // Until it is up to date, what is pushed to it takes its time, too.
        if self.complete && self.timed.is_none() {
            self.timed = Some((seq, now_ns));
        }
    }

    /// It has entries in its journal. Returns how long the one took that was timed.
    pub fn on_durable(&mut self, durable: Seq, now_ns: u64) -> Option<u64> {
        self.durable = self.durable.max(durable);
        let (_, sent_ns) = self.timed.take_if(|(seq, _)| *seq <= durable)?;
        Some(now_ns.saturating_sub(sent_ns))
    }

    /// Has it everything, and gets what is new?
    pub fn has_everything(&self) -> bool {
        self.is_running() && self.proposed_ns.is_some()
    }

    /// Entries behind this one are kept for it.
    pub fn needs_after(&self) -> Option<Seq> {
        match self.step {
            Step::Starting(start) => Some(start.seq),
            Step::Running(_) | Step::Resuming(_) => Some(self.durable),
            _ => None,
        }
    }

    /// Notes how far it is behind what is acknowledged.
    pub fn watch(&mut self, acked: Seq, now_ns: u64) {
        match self.needs_after() {
            Some(after) => self.lag.watch(after, acked, now_ns),
            None => self.lag = Lag::default(),
        }
    }

    /// Does it lack what was acknowledged some time ago?
    pub fn is_late(&self, now_ns: u64) -> bool {
        self.lag.is_late(now_ns)
    }

    /// The connection to it broke, or it lacks an entry.
    fn lose(&mut self, call: &mut Call<'_>) {
        self.timed = None;
        match self.step {
            Step::Running(start) if self.proposed_ns.is_some() => {
                self.step = Step::Resuming(start);
                self.asked_ns = None;
            }
            Step::Resuming(_) => self.asked_ns = None,
            Step::Behind => {}
            _ => self.restart(call),
        }
    }

    fn leave_alone(&mut self, call: &Call<'_>) {
        self.asked_ns = Some(call.now_ns + LEFT_ALONE_NS);
    }

    /// It is too far behind for entries to be kept for it.
    pub fn outrun(&mut self, call: &mut Call<'_>) {
        if self.proposed_ns.is_some() {
            self.step = Step::Behind;
        } else {
            self.restart(call);
            self.leave_alone(call);
        }
    }

    /// Forgets how far it was: it starts anew.
    fn restart(&mut self, call: &mut Call<'_>) {
        call.core.pushes -= self.pushing;
        *self = Self { attempt: self.attempt, ..Self::new(self.node) };
    }

    fn propose(&mut self, call: &mut Call<'_>, group: GroupId, epoch: Epoch, change: Change) {
        if is_due(self.proposed_ns, PROPOSE_AGAIN_NS, call.now_ns) {
            self.proposed_ns = Some(call.now_ns);
            call.propose(group, epoch, self.node, change);
        }
    }

    /// Bytes known to be on their way or waiting to be.
    pub fn bytes_left(&self) -> u64 {
        ((self.to_push.len() + self.pushing) * UNIT_SIZE) as u64
    }
}

impl Group {
    fn learner(&mut self, node: NodeId) -> Option<&mut Learner> {
        self.primary.as_mut()?.learners.iter_mut().find(|learner| learner.node == node)
    }

    /// Starts the learners that are not under way.
    pub(super) fn start_learners(&mut self, call: &mut Call<'_>) {
        let last = self.replica.last;
        let Some(primary) = self.primary.as_mut().filter(|primary| primary.is_active()) else { return };
        for learner in &mut primary.learners {
            let quiet = matches!(learner.step, Step::Running(_) | Step::Behind)
                || primary.dropped.contains(&learner.node);
            if quiet || !is_due(learner.asked_ns, ASK_AGAIN_NS, call.now_ns) {
                continue;
            }
            if matches!(learner.step, Step::Resuming(_)) {
                learner.asked_ns = Some(call.now_ns);
                call.send(learner.node, frames::frame(Opcode::Peer, self.id, primary.epoch));
                continue;
            }
            let start = match learner.step {
                Step::Starting(start) => start,
                _ => {
                    learner.attempt = call.core.fresh_token() as u32;
                    learner.step = Step::Starting(last);
                    last
                }
            };
            learner.asked_ns = Some(call.now_ns);
            let frame =
                frames::learn_start(Opcode::LearnStart, self.id, primary.epoch, start, learner.attempt);
            call.send(learner.node, frame);
        }
    }

    /// The learner has dropped its tail: it gets every entry behind the start.
    pub(super) fn on_learner_started(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let last = self.replica.last.seq;
        let Some(primary) = &mut self.primary else { return };
        let epoch = primary.epoch;
        let Some(learner) = primary.learners.iter_mut().find(|learner| learner.node == from) else { return };
        let (start, attempt) = frames::learn_start_of(header);
        if header.status.is_some() || learner.step != Step::Starting(start) || learner.attempt != attempt {
            return;
        }
        if !self.replica.has_from(start.seq.next()) {
            return learner.restart(call);
        }
        learner.step = Step::Running(start);
        (learner.sent, learner.durable) = (last, start.seq);
        for entry in self.replica.entries_from(start.seq.next()) {
            call.send(from, frames::of_entry(Opcode::Append, entry, epoch, self.replica.acked, true));
        }
        self.on_progress(call);
    }

    /// A learner that was proposed tells where its journal ends: it goes on from there, if that can be sent.
    pub(super) fn on_learner_info(&mut self, call: &mut Call<'_>, from: NodeId, info: PeerInfo) {
        let (epoch, last) = (self.epoch, self.replica.last.seq);
        let known = self.replica.version_at(info.last.seq) == Some(info.last);
        let resumable = known && self.replica.has_from(info.last.seq.next());
        let Some(learner) = self.learner(from) else { return };
        let Step::Resuming(start) = learner.step else { return };
        if !resumable {
            learner.step = Step::Behind;
            return;
        }
        learner.step = Step::Running(start);
        (learner.sent, learner.durable) = (last, info.durable);
        for entry in self.replica.entries_from(info.last.seq.next()) {
            call.send(from, frames::of_entry(Opcode::Append, entry, epoch, self.replica.acked, true));
        }
        call.send(from, frames::numbered(Opcode::Commit, self.id, epoch, self.replica.acked.0));
    }

    /// The learner, or the connection to it, lost its state. `why`: the learner refused something.
    pub(super) fn lose_learner(&mut self, call: &mut Call<'_>, node: NodeId, why: Option<Code>) {
        let Some(primary) = &mut self.primary else { return };
        primary.pushes.retain(|lock| lock.learner != node);
        call.unsend(node, self.id);
        if let Some(learner) = self.learner(node) {
            learner.lose(call);
            if matches!(why, Some(Code::StorageFull | Code::Busy)) {
                learner.leave_alone(call);
            }
        }
        call.core.ticking.insert(self.id);
    }

    /// Moves every learner on as far as it goes now.
    pub(super) fn go_on_pushing(&mut self, call: &mut Call<'_>) {
        let Some(primary) = self.primary.as_ref().filter(|primary| primary.is_active()) else { return };
        for index in 0..primary.learners.len() {
            self.go_on_with(call, index);
        }
        self.read_pushes(call);
    }

    fn go_on_with(&mut self, call: &mut Call<'_>, index: usize) {
        let acked = self.replica.acked;
        let Some(primary) = &mut self.primary else { return };
        let epoch = primary.epoch;
        let learner = &mut primary.learners[index];
        let start = match learner.step {
            Step::Running(start) => start,
            Step::Behind => return learner.propose(call, self.id, epoch, Change::Renew),
            _ => return,
        };
        if acked < start.seq {
            return;
        }
        while learner.pushing < LEARNER_PUSHES_MAX
            && call.core.pushes < PUSHES_MAX
            && let Some((key, unit)) = learner.to_push.front().copied()
        {
            if !call.core.pace.grant(call.now_ns, UNIT_SIZE) {
                call.core.paced.insert(self.id);
                break;
            }
            learner.to_push.pop_front();
            learner.pushing += 1;
            call.core.pushes += 1;
            primary.pushes.push(PushLock { learner: learner.node, key, unit, reading: false });
        }
        if learner.compare.is_some() || !learner.to_push.is_empty() {
            return;
        }
        if let Pass::From(key) = learner.pass {
            return self.compare(call, index, key);
        }
        if learner.pushing > 0 && !Mutation::PromotedEarly.is_on() {
            return;
        }
        if learner.differences > 0 && !Mutation::PromotedEarly.is_on() {
            if let Some(block) = learner.unknown.take() {
                tracing::error!(group = %self.id, %block, learner = %learner.node, "what this replica has is of no known version, and no learner can be made of it");
                learner.resume_ns = call.now_ns + UNKNOWN_AFTER_NS;
            }
            if call.now_ns < learner.resume_ns {
                return;
            }
            learner.differences = 0;
            learner.pass = Pass::From(BlockKey::default());
            self.compare(call, index, BlockKey::default());
        } else if learner.complete {
            learner.propose(call, self.id, epoch, Change::Promote);
        } else if learner.flush.is_none() {
            // When it acts, it vouches for nothing before all that it got is stable (`stop_learning`), and the writes of the group wait for
            // that: most of it is made stable now, while nobody waits.
            let number = call.core.fresh_token();
            learner.flush = Some(number);
            let node = learner.node;
            call.send(node, frames::numbered(Opcode::MemberFlush, self.id, epoch, number));
        }
    }

    /// Is this the answer to a learner's last flush?
    pub(super) fn on_learner_flushed(
        &mut self,
        call: &mut Call<'_>,
        from: NodeId,
        number: u64,
        ok: bool,
    ) -> bool {
        let Some(learner) = self.learner(from) else { return false };
        if learner.flush != Some(number) {
            return false;
        }
        learner.flush = None;
        learner.complete = ok;
        if ok {
            self.on_progress(call);
        }
        true
    }

    /// Sends the digests of the next blocks from `first` on.
    fn compare(&mut self, call: &mut Call<'_>, index: usize, first: BlockKey) {
        if !self.replica.is_view_fresh(call.core.turn) {
            call.core.deferred.insert(self.id);
            return;
        }
        let view = call.stores.view(self.replica.store);
        let found = view.blocks_after(self.id, frames::predecessor(first), COMPARE_BLOCKS);
        let blocks: BTreeMap<_, _> =
            found.iter().map(|(key, _)| (*key, view.unit_versions(self.id, *key))).collect();
        let mut list: Vec<BlockDigest> =
            blocks.iter().map(|(key, versions)| BlockDigest::new(*key, block_digest(versions))).collect();
        let last = found.last().map(|(key, _)| *key);
        let end = if found.len() < COMPARE_BLOCKS { KEY_MAX } else { last.unwrap_or(KEY_MAX) };
        if last != Some(end) {
            list.push(BlockDigest::new(end, 0));
        }
        let Some(mut buffer) = call.core.pool.alloc(size_of_val(list.as_slice())) else { return };
        buffer.copy_from_slice(list.as_slice().as_bytes());
        let number = call.core.fresh_token();
        let Some(primary) = &mut self.primary else { return };
        let learner = &mut primary.learners[index];
        learner.compare = Some(Compare { number, blocks, end });
        let mut frame = frames::numbered(Opcode::Compare, self.id, primary.epoch, number);
        frame.header.key = first;
        frame.data = Some(buffer.freeze());
        let (node, epoch) = (learner.node, primary.epoch);
        // The learner answers from exactly this state.
        call.send(node, frames::numbered(Opcode::Commit, self.id, epoch, self.replica.acked.0));
        call.send(node, frame);
    }

    /// Which blocks of the learner differ.
    pub(super) fn on_compared(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) {
        let header = frame.header;
        let Some(learner) = self.learner(from) else { return };
        let Some(compare) = learner.compare.take_if(|compare| compare.number == header.request_id) else {
            return;
        };
        let bytes: &[u8] = frame.data.as_deref().unwrap_or_default();
        let list = BlockVersions::list(bytes);
        let (None, Ok(list)) = (header.status, list) else {
            // The pass goes on from where it was, at the next tick.
            call.core.ticking.insert(self.id);
            return;
        };
        learner.complete = false;
        for block in list {
            learner.differences += 1;
            let ours = compare.blocks.get(&block.key()).copied().unwrap_or([Version::ZERO; UNITS_PER_BLOCK]);
            let theirs = block.versions();
            let differs = |unit: &usize| ours[*unit] != theirs[*unit] || theirs[*unit] == Version::UNKNOWN;
            let units = (0..UNITS_PER_BLOCK).filter(differs);
            learner.to_push.extend(units.map(|unit| (block.key(), unit as u8)));
            if ours.contains(&Version::UNKNOWN) {
                learner.unknown = Some(block.key());
            }
        }
        let covered = header.key.min(compare.end);
        learner.pass = frames::successor(covered).map_or(Pass::Done, Pass::From);
        self.on_progress(call);
    }

    /// Reads the locked units whose entries are applied by now.
    fn read_pushes(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        let due: Vec<(NodeId, BlockKey, u8)> = primary
            .pushes
            .iter()
            .filter(|lock| !lock.reading)
            .map(|lock| (lock.learner, lock.key, lock.unit))
            .collect();
        for (node, key, unit) in due {
            let pages = PageRange::of_unit(unit);
            let unacked = self.replica.newest_unacked(key, pages).is_some();
            let mut merges = self.primary.iter().flat_map(|primary| &primary.merges);
            let merging = merges.any(|lock| lock.key == key && lock.pages.overlaps(pages));
            if unacked || merging || self.replica.applied < self.replica.acked {
                continue;
            }
            let version = self.replica.unit_version(call, key, unit);
            let (reign, as_of) =
                (self.primary.as_ref().map_or(0, |primary| primary.reign), self.replica.acked);
            let Some(learner) = self.learner(node) else { continue };
            let attempt = learner.attempt;
            if version == Version::ZERO {
                let meta = PushMeta { version, as_of, lost: 0 };
                self.send_push(call, (node, attempt), (key, unit), meta, None);
                self.run_waiting(call);
                continue;
            }
            let purpose = ReadPurpose::Push { learner: node, attempt, unit, version, as_of };
            let job = ReadJob { group: self.id, reign, key, pages, purpose, attempt: 1 };
            let reads = call.read(self.replica.store, job);
            let Some(primary) = &mut self.primary else { return };
            let lock = |lock: &&mut PushLock| lock.learner == node && lock.key == key && lock.unit == unit;
            if let Some(lock) = primary.pushes.iter_mut().find(lock) {
                lock.reading = reads;
            }
        }
    }

    /// Sends a unit, and lets writes to it go on.
    pub(super) fn send_push(
        &mut self,
        call: &mut Call<'_>,
        (node, attempt): (NodeId, u32),
        (key, unit): (BlockKey, u8),
        meta: PushMeta,
        data: Option<PageData>,
    ) {
        if !self.is_pushing((node, attempt), (key, unit)) {
            return;
        }
        self.unlock((node, attempt), (key, unit));
        call.core.counters.resync_bytes_moved += if data.is_some() { UNIT_SIZE as u64 } else { 0 };
        let mut frame = frames::push(self.id, self.epoch, key, unit, meta, data);
        frame.header.request_id = u64::from(attempt);
        call.send(node, frame);
    }

    fn is_pushing(&mut self, (node, attempt): (NodeId, u32), (key, unit): (BlockKey, u8)) -> bool {
        let current = self.learner(node).is_some_and(|learner| learner.attempt == attempt);
        let Some(primary) = &self.primary else { return false };
        let mut locks = primary.pushes.iter();
        current && locks.any(|lock| lock.learner == node && lock.key == key && lock.unit == unit)
    }

    fn unlock(&mut self, (node, _): (NodeId, u32), (key, unit): (BlockKey, u8)) {
        if let Some(primary) = &mut self.primary {
            primary.pushes.retain(|lock| !(lock.learner == node && lock.key == key && lock.unit == unit));
        }
    }

    /// The unit can not be read: the next pass comes back to it.
    pub(super) fn drop_push(&mut self, call: &mut Call<'_>, learner: (NodeId, u32), unit: (BlockKey, u8)) {
        if !self.is_pushing(learner, unit) {
            return;
        }
        self.unlock(learner, unit);
        self.push_ended(call, learner.0, true);
    }

    fn push_ended(&mut self, call: &mut Call<'_>, node: NodeId, failed: bool) {
        if let Some(learner) = self.learner(node)
            && learner.pushing > 0
        {
            learner.pushing -= 1;
            call.core.pushes -= 1;
            if failed {
                learner.resume_ns = call.now_ns + RESUME_AFTER_NS;
            }
        }
    }

    /// The learner has the unit in its journal, or refused it: then the next pass comes back to it.
    pub(super) fn on_pushed(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let Some(learner) = self.learner(from) else { return };
        if let Some(code) = header.status {
            tracing::debug!(group = %header.group, %from, block = %header.key, ?code, "a learner did not take a unit");
        }
        if !learner.is_running() || u64::from(learner.attempt) != header.request_id {
            return;
        }
        if header.status == Some(Code::ReplicaBehind) {
            self.lose_learner(call, from, None);
        } else {
            self.push_ended(call, from, header.status.is_some());
            self.on_progress(call);
        }
    }
}
