//! Primary: requests of one group, in order, at the node that leads it.
//!
//! Gives each write its seq, hands it to its own replica and to every member, and answers when `quorum` says that it is
//! acknowledged. Reads and merges are in `reads`, taking over in `peering`, bringing learners up to date in `resync`.
//!
//! Invariants
//! - Requests that touch the same pages take effect in the order in which they came.
//! - Nothing is sequenced while the group is not active, and nothing is answered well without a lease.
//! - Every queue is bounded; beyond the bound the answer is Busy.

use std::collections::VecDeque;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, Epoch, NodeId, Seq, Version};
use xsan_protocol::limits::{GROUP_WRITES_MAX, PAGES_PER_WRITE_MAX};
use xsan_protocol::map::Durability;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE, PageRange};
use xsan_protocol::wire::header::Opcode;

use super::action::{Operation, Origin, Reply, Request, RequestId};
use super::call::{Call, Merge};
use super::flush::FlushWaiter;
use super::frames;
use super::group::{Group, Role};
use super::pace::Work;
use super::peering::{Member, Phase};
use super::quorum::Quorum;
use super::reclaim::Search;
use super::resync::{Learner, PushLock};
use super::scrub::Scrub;
use super::status::Stage;
use crate::store::{Entry, PageData};

/// Requests of one group that wait for others, or for the group to become active.
const GROUP_WAITING_MAX: usize = 512;

/// Is this learner one for which nothing more may be kept, now?
pub(super) type InQuestion = fn(&Learner, u64) -> bool;

#[derive(Debug)]
pub(super) struct InFlight {
    pub seq: Seq,
    /// `None`: nobody waits for it, or its session is fenced.
    pub request: Option<RequestId>,
    pub fua: bool,
    pub started_ns: u64,
}

/// A request that could not start yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub request: Request,
    /// Entries up to here must be acknowledged first.
    pub after: Seq,
}

/// A merge under way: nothing else starts on its page.
#[derive(Debug)]
pub(super) struct MergeLock {
    pub request: RequestId,
    pub key: BlockKey,
    pub pages: PageRange,
}

/// A client's flush, or the flush of a write that asked for one.
#[derive(Debug)]
pub(super) struct FlushWait {
    pub request: RequestId,
    /// `None`: whatever is there when the group becomes active.
    pub through: Option<Seq>,
}

/// One flush of every acting member.
#[derive(Debug)]
pub(super) struct FlushRound {
    pub number: u64,
    pub covers: Seq,
    pub since_ns: u64,
    pub awaiting: Vec<NodeId>,
    /// A member refused or was lost: a new round is needed.
    pub failed: bool,
}

impl FlushRound {
    /// Have at least half of the members answered, and this one not for so long?
    pub fn waits_for(&self, node: NodeId, members: usize, time_ns: u64, now_ns: u64) -> bool {
        let one_of_few = self.awaiting.contains(&node) && 2 * self.awaiting.len() <= members;
        one_of_few && now_ns.saturating_sub(self.since_ns) >= time_ns
    }
}

#[derive(Debug)]
pub(super) struct Primary {
    pub epoch: Epoch,
    /// Which stay at the head of the group this is: what was begun in an earlier one is not answered well.
    pub reign: u64,
    pub phase: Phase,
    pub since_ns: u64,
    pub min_replicas: usize,
    /// The acting set, with this node.
    pub members: Vec<Member>,
    pub learners: Vec<Learner>,
    /// Set once every acting member has answered.
    pub quorum: Option<Quorum>,
    pub in_flight: VecDeque<InFlight>,
    pub waiting: VecDeque<Waiting>,
    pub merges: Vec<MergeLock>,
    pub pushes: Vec<PushLock>,
    pub flushes: Vec<FlushWait>,
    pub round: Option<FlushRound>,
    /// Every acting member has everything up to here on stable media, in this epoch.
    pub flushed: Option<Seq>,
    /// Answers that wait for the lease.
    pub held: Vec<(RequestId, Reply)>,
    /// The acknowledged seq that every member was told.
    pub announced: Seq,
    /// Does the control plane count on the present acting set?
    pub settled: bool,
    /// Who acted since the last settled epoch, and may not drop anything before this one is.
    pub dropped: Vec<NodeId>,
    /// It counts on members that do not act here: nothing may be acknowledged without them.
    pub waits_to_settle: bool,
    /// The newest entry that any member had when the epoch began.
    pub settles_at: Seq,
    /// When the control plane was last asked to settle the epoch.
    pub settling_ns: Option<u64>,
    /// Its journal is newer than this node's and can not be fetched: it should lead.
    pub successor: Option<NodeId>,
    pub yielded_ns: Option<u64>,
    /// For blocks of deleted volumes.
    pub search: Search,
    pub scrub: Option<Box<Scrub>>,
}

impl Primary {
    pub fn new(epoch: Epoch, reign: u64) -> Self {
        Self {
            epoch,
            reign,
            phase: Phase::Asking,
            since_ns: 0,
            min_replicas: 1,
            members: Vec::new(),
            learners: Vec::new(),
            quorum: None,
            in_flight: VecDeque::new(),
            waiting: VecDeque::new(),
            merges: Vec::new(),
            pushes: Vec::new(),
            flushes: Vec::new(),
            round: None,
            flushed: None,
            held: Vec::new(),
            announced: Seq(0),
            settled: false,
            dropped: Vec::new(),
            waits_to_settle: false,
            settles_at: Seq(0),
            settling_ns: None,
            successor: None,
            yielded_ns: None,
            search: Search::Done,
            scrub: None,
        }
    }

    pub fn is_active(&self) -> bool {
        self.phase == Phase::Active
    }

    /// Are there members enough for client I/O?
    pub fn serves(&self) -> bool {
        self.members.len() >= self.min_replicas
    }

    pub fn is_busy(&self, acked: Seq) -> bool {
        !self.is_active()
            || !self.settled
            || !self.learners.is_empty()
            || !self.in_flight.is_empty()
            || !self.waiting.is_empty()
            || !self.held.is_empty()
            || !self.flushes.is_empty()
            || self.announced < acked
            || self.search != Search::Done
            || self.scrub.is_some()
            || self.members.iter().any(|member| !member.synced)
    }

    /// When the newest write up to `seq` that is in flight began.
    fn newest_started(&self, seq: Seq) -> Option<u64> {
        let index = self.in_flight.partition_point(|flight| flight.seq <= seq).checked_sub(1)?;
        self.in_flight.get(index).map(|flight| flight.started_ns)
    }

    /// Could a write of these pages have its place in the order now?
    pub fn takes_writes_of(&self, key: BlockKey, pages: PageRange) -> bool {
        self.is_active() && self.in_flight.len() < GROUP_WRITES_MAX && !self.is_blocked(key, pages, true)
    }

    /// Does a request of these pages have to wait behind one that came before?
    fn is_blocked(&self, key: BlockKey, pages: PageRange, writes: bool) -> bool {
        let merging = !Mutation::MergeUnlocked.is_on()
            && self.merges.iter().any(|lock| lock.key == key && lock.pages.overlaps(pages));
        let pushing = writes
            && !Mutation::PushUnlocked.is_on()
            && self.pushes.iter().any(|lock| lock.key == key && pages.units().contains(&lock.unit));
        merging || pushing || self.waiting.iter().any(|waiting| waiting.blocks(key, pages))
    }
}

impl Waiting {
    /// Must a later request of these pages stay behind this one?
    fn blocks(&self, key: BlockKey, pages: PageRange) -> bool {
        target_of(&self.request.operation)
            .is_some_and(|target| target.writes && target.key == key && target.pages.overlaps(pages))
    }
}

struct Target {
    key: BlockKey,
    pages: PageRange,
    writes: bool,
}

fn target_of(operation: &Operation) -> Option<Target> {
    match *operation {
        Operation::Read { key, pages } | Operation::BlockStatus { key, pages } => {
            Some(Target { key, pages, writes: false })
        }
        Operation::Write { key, pages, .. } | Operation::Zero { key, pages, .. } => {
            Some(Target { key, pages, writes: true })
        }
        Operation::WriteSectors { key, offset, ref bytes, .. } => {
            Some(Target { key, pages: PageRange::around(offset, bytes.len() as u32), writes: true })
        }
        Operation::Flush => None,
    }
}

/// Is the request well formed? It may come from a peer's frame.
fn check(operation: &Operation) -> Result<(), Code> {
    let fits = match operation {
        Operation::Read { pages, .. } => usize::from(pages.count) <= PAGES_PER_WRITE_MAX,
        Operation::Write { pages, data, .. } => {
            usize::from(pages.count) <= PAGES_PER_WRITE_MAX
                && data.bytes.len() == pages.bytes()
                && data.checksums.len() == usize::from(pages.count)
        }
        Operation::WriteSectors { offset, bytes, .. } => {
            let (start, length) = (*offset as usize, bytes.len());
            length > 0 && start + length <= BLOCK_SIZE && start % PAGE_SIZE + length <= PAGE_SIZE
        }
        Operation::Zero { .. } | Operation::BlockStatus { .. } | Operation::Flush => true,
    };
    fits.then_some(()).ok_or(Code::InvalidArgument)
}

impl Group {
    pub(super) fn on_request(&mut self, call: &mut Call<'_>, request: Request) {
        if let Err(code) = self.admit(call, &request) {
            return call.complete(request.id, Err(code));
        }
        let Some(primary) = &mut self.primary else { return };
        if matches!(request.operation, Operation::Flush) {
            if primary.flushes.len() >= GROUP_WAITING_MAX {
                return call.complete(request.id, Err(Code::Busy));
            }
            let through = primary.is_active().then_some(self.replica.last.seq);
            primary.flushes.push(FlushWait { request: request.id, through });
            call.core.ticking.insert(self.id);
            return self.go_on_flushing(call);
        }
        let waiting = Waiting { request, after: Seq(0) };
        if let Some(waiting) = self.try_start(call, waiting) {
            let Some(primary) = &mut self.primary else { return };
            if primary.waiting.len() >= GROUP_WAITING_MAX {
                return call.complete(waiting.request.id, Err(Code::Busy));
            }
            primary.waiting.push_back(waiting);
            call.core.ticking.insert(self.id);
        }
    }

    /// May this node take the request at all?
    fn admit(&self, call: &Call<'_>, request: &Request) -> Result<(), Code> {
        let primary = self.primary.as_ref().ok_or(Code::NotPrimary)?;
        if request.epoch != self.epoch {
            return Err(Code::StaleEpoch);
        }
        if call.core.has_failed(self.replica.store) {
            return Err(Code::StoreFailed);
        }
        if !call.has_lease() {
            return Err(Code::LeaseEnded);
        }
        if !primary.serves() {
            return Err(Code::GroupInactive);
        }
        check(&request.operation)
    }

    /// Starts the request, or gives it back because it has to wait.
    fn try_start(&mut self, call: &mut Call<'_>, mut waiting: Waiting) -> Option<Waiting> {
        let primary = self.primary.as_ref()?;
        let target = target_of(&waiting.request.operation).expect("a flush does not wait here");
        let full = target.writes && primary.in_flight.len() >= GROUP_WRITES_MAX;
        if !primary.is_active() || full || primary.is_blocked(target.key, target.pages, target.writes) {
            return Some(waiting);
        }
        // What is read must be acknowledged: a read never shows what a fail-over could take back.
        let reads = !target.writes || matches!(waiting.request.operation, Operation::WriteSectors { .. });
        if reads && !Mutation::UnackedRead.is_on() {
            if waiting.after == Seq(0) {
                waiting.after = self.replica.newest_unacked(target.key, target.pages).unwrap_or(Seq(0));
            }
            if waiting.after > self.replica.applied {
                return Some(waiting);
            }
        }
        let Request { id, durability, operation, .. } = waiting.request;
        match operation {
            Operation::Read { key, pages } => self.start_read(call, id, key, pages),
            Operation::BlockStatus { key, pages } => self.answer_status(call, id, key, pages),
            Operation::Write { key, pages, data, fua } => {
                self.on_write(call, id, key, pages, Some(data), fua, durability);
            }
            Operation::Zero { key, pages, fua } => {
                self.on_write(call, id, key, pages, None, fua, durability);
            }
            Operation::WriteSectors { key, offset, bytes, fua } => {
                let merge = Merge { request: id, offset, bytes, fua, durability };
                self.start_merge(call, key, target.pages, merge);
            }
            Operation::Flush => unreachable!("a flush has no target"),
        }
        None
    }

    /// Gives a write its place in the order, and sends it to every member.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a write; a struct would be built once and taken apart here"
    )]
    pub(super) fn on_write(
        &mut self,
        call: &mut Call<'_>,
        request: RequestId,
        key: BlockKey,
        pages: PageRange,
        data: Option<PageData>,
        fua: bool,
        durability: Durability,
    ) {
        let view = call.stores.view(self.replica.store);
        let admitted = if data.is_some() { view.admit_write(self.id, key, pages) } else { view.admit(0) };
        if let Err(error) = admitted {
            return call.complete(request, Err(error.code()));
        }
        if data.is_some()
            && view.wants_room(self.id, key, pages)
            && let Err(code) = self.admit_at_members(call)
        {
            return call.complete(request, Err(code));
        }
        self.sequence(call, Some(request), key, pages, data, fua, durability);
    }

    /// The next entry of the group; without a `request` nobody waits for it.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a write; a struct would be built once and taken apart here"
    )]
    pub(super) fn sequence(
        &mut self,
        call: &mut Call<'_>,
        request: Option<RequestId>,
        key: BlockKey,
        pages: PageRange,
        data: Option<PageData>,
        fua: bool,
        durability: Durability,
    ) {
        let (first, last) = (pages.first_unit(), pages.last_unit());
        let previous = |unit: u8| {
            if pages.covers_unit(unit) { Version::ZERO } else { self.replica.unit_version(call, key, unit) }
        };
        let entry = Entry {
            group: self.id,
            version: Version::new(self.epoch, self.replica.last.seq.next()),
            acked: self.replica.acked,
            key,
            pages,
            data,
            previous_first: previous(first),
            previous_last: if last == first { Version::ZERO } else { previous(last) },
        };
        call.core.counters.writes += 1;
        let Some(primary) = &mut self.primary else { return };
        assert!(primary.is_active() && primary.serves());
        primary.in_flight.push_back(InFlight {
            seq: entry.version.seq,
            request,
            fua,
            started_ns: call.now_ns,
        });
        self.replicate(call, entry, durability == Durability::EveryWrite);
    }

    /// The next entry of the group: to the own replica, and to all who follow.
    pub(super) fn replicate(&mut self, call: &mut Call<'_>, entry: Entry, sync: bool) {
        let Some(primary) = &mut self.primary else { return };
        let (own, seq, before) = (call.node(), entry.version.seq, self.replica.last.seq);
        for member in &mut primary.members {
            let caught_up =
                primary.quorum.as_ref().and_then(|quorum| quorum.durable(member.node)) == Some(before);
            if caught_up {
                member.progress_ns = call.now_ns;
            }
            if member.synced {
                member.sent = seq;
                if member.node != own {
                    let frame =
                        frames::of_entry(Opcode::Append, &entry, primary.epoch, self.replica.acked, sync);
                    call.send(member.node, frame);
                }
            }
        }
        for learner in primary.learners.iter_mut().filter(|learner| learner.is_running()) {
            learner.on_sent(seq, call.now_ns);
            let frame = frames::of_entry(Opcode::Append, &entry, primary.epoch, self.replica.acked, sync);
            call.send(learner.node, frame);
        }
        primary.announced = self.replica.acked;
        self.trim(call);
        self.replica.on_append(call, entry, sync);
    }

    /// The own journal has more.
    pub(super) fn on_own_durable(&mut self, call: &mut Call<'_>) {
        let vouched = self.replica.vouched();
        let started_ns = self.primary.as_ref().and_then(|primary| primary.newest_started(vouched));
        if let Some(started_ns) = started_ns {
            call.sample(Stage::JournalLocal, started_ns);
        }
        self.on_append_ok(call, call.node(), vouched);
        self.maybe_activate(call);
    }

    /// A member of the acting set has everything up to `durable` in its journal.
    pub(super) fn on_append_ok(&mut self, call: &mut Call<'_>, node: NodeId, durable: Seq) {
        let Some(primary) = &mut self.primary else { return };
        let started_ns = primary.newest_started(durable);
        let Some(quorum) = &mut primary.quorum else { return };
        if quorum.durable(node).is_none_or(|known| durable <= known) {
            return;
        }
        if let Some(member) = primary.members.iter_mut().find(|member| member.node == node) {
            member.progress_ns = call.now_ns;
        }
        if let Some(started_ns) = started_ns {
            call.core.latencies.add_member(node, call.now_ns.saturating_sub(started_ns));
        }
        let acked = quorum.record(node, durable);
        if !primary.settled {
            // What has become durable everywhere waits for that, if it must.
            let waits = primary.waits_to_settle;
            self.settle(call);
            if waits {
                return;
            }
        }
        if let Some(acked) = acked {
            self.on_acknowledged(call, acked);
        }
    }

    /// Everything up to `acked` is in the journal of every acting member: apply it, answer, and go on with what waited.
    pub(super) fn on_acknowledged(&mut self, call: &mut Call<'_>, acked: Seq) {
        self.replica.on_acked(call, acked);
        let mut sampled = false;
        while let Some(primary) = &mut self.primary
            && let Some(flight) = primary.in_flight.pop_front_if(|flight| flight.seq <= acked)
        {
            if !std::mem::replace(&mut sampled, true) {
                call.sample(Stage::Acknowledge, flight.started_ns);
                if flight.request.is_some() {
                    let took_ns = call.now_ns.saturating_sub(flight.started_ns);
                    call.core.pace.add(call.now_ns, Work::Write, took_ns);
                }
            }
            let Some(request) = flight.request else { continue };
            if flight.fua && !Mutation::FuaForgotten.is_on() {
                primary.flushes.push(FlushWait { request, through: Some(flight.seq) });
            } else {
                self.answer(call, request, Reply::Done);
            }
        }
        self.on_progress(call);
    }

    /// Something ended that others may have waited for.
    pub(super) fn on_progress(&mut self, call: &mut Call<'_>) {
        self.trim(call);
        self.run_waiting(call);
        self.go_on_flushing(call);
        self.go_on_pushing(call);
        call.core.ticking.insert(self.id);
    }

    /// Starts those of the waiting requests that can, in the order in which they came.
    pub(super) fn run_waiting(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        if primary.waiting.is_empty() || !primary.is_active() {
            return;
        }
        let queue = std::mem::take(&mut primary.waiting);
        for waiting in queue {
            let rest = self.try_start(call, waiting);
            if let (Some(rest), Some(primary)) = (rest, &mut self.primary) {
                primary.waiting.push_back(rest);
            }
        }
    }

    /// A good answer, which needs the lease: without it, it waits until the lease is renewed or this node deposed.
    pub(super) fn answer(&mut self, call: &mut Call<'_>, request: RequestId, reply: Reply) {
        if call.has_lease() {
            return call.complete(request, Ok(reply));
        }
        if let Some(primary) = &mut self.primary {
            primary.held.push((request, reply));
            call.core.ticking.insert(self.id);
        }
    }

    /// Ends everything that clients wait for here. A write among it may or may not have happened.
    pub(super) fn fail_requests(&mut self, call: &mut Call<'_>, code: Code) {
        let Some(primary) = &mut self.primary else { return };
        let mut requests: Vec<RequestId> =
            primary.in_flight.drain(..).filter_map(|flight| flight.request).collect();
        requests.extend(primary.held.drain(..).map(|(request, _)| request));
        requests.extend(primary.flushes.drain(..).map(|wait| wait.request));
        requests.extend(primary.waiting.drain(..).map(|waiting| waiting.request.id));
        requests.extend(primary.merges.drain(..).map(|lock| lock.request));
        for request in requests {
            call.complete(request, Err(code));
        }
    }

    /// What this primary has still to send is of an epoch that has passed. Whom it reaches may take it, for as long as it knows of no
    /// newer one; what it lacks then, it is asked for.
    pub(super) fn unsend_all(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &self.primary else { return };
        let members = primary.members.iter().map(|member| member.node).filter(|node| *node != call.node());
        let learners = primary.learners.iter().map(|learner| learner.node);
        let nodes: Vec<NodeId> = members.chain(learners).collect();
        nodes.into_iter().for_each(|node| call.unsend(node, self.id));
    }

    /// This node leads the group no longer.
    pub(super) fn abdicate(&mut self, call: &mut Call<'_>) {
        self.fail_requests(call, Code::NotPrimary);
        self.stop_scrub(call);
        if let Some(primary) = self.primary.take() {
            call.core.pushes -= primary.learners.iter().map(|learner| learner.pushing).sum::<usize>();
        }
        self.role = Role::None;
    }

    /// A session is fenced: what of it has no place in the order yet is dropped, the rest is not answered.
    pub(super) fn on_origin_gone(&mut self, origin: Origin) -> bool {
        if Mutation::FencedRequestKept.is_on() {
            return false;
        }
        let Some(primary) = &mut self.primary else { return false };
        let gone = |request: &RequestId| request.origin == origin;
        for flight in &mut primary.in_flight {
            flight.request = flight.request.filter(|request| !gone(request));
        }
        let before = primary.waiting.len() + primary.merges.len() + primary.flushes.len();
        primary.held.retain(|(request, _)| !gone(request));
        primary.waiting.retain(|waiting| !gone(&waiting.request.id));
        primary.merges.retain(|lock| !gone(&lock.request));
        primary.flushes.retain(|wait| !gone(&wait.request));
        before != primary.waiting.len() + primary.merges.len() + primary.flushes.len()
    }

    /// Forgets entries that nobody needs: applied, and in the journal of every member and learner.
    fn trim(&mut self, call: &mut Call<'_>) {
        self.trim_but_for(call, |_| true);
    }

    /// The same, of the learners only for those that `matter`.
    pub(super) fn trim_but_for(&mut self, call: &mut Call<'_>, matter: impl Fn(&Learner) -> bool) {
        let Some(primary) = &self.primary else { return };
        let Some(quorum) = &primary.quorum else { return };
        let learners = primary.learners.iter().filter(|learner| matter(learner));
        let slowest = learners.filter_map(Learner::needs_after).min();
        let floor = quorum.durable_everywhere().min(slowest.unwrap_or(Seq(u64::MAX)));
        self.replica.trim(call.core.turn, floor);
    }

    /// What acknowledged entries hold for learners, if any of them is `in_question`.
    pub fn retains_for(&self, now_ns: u64, in_question: InQuestion) -> Option<usize> {
        let learners = &self.primary.as_ref()?.learners;
        let any = learners.iter().any(|learner| in_question(learner, now_ns));
        any.then(|| self.replica.retained_bytes())
    }

    /// Keeps nothing more for learners that are `in_question`: they start anew.
    pub fn outrun(&mut self, call: &mut Call<'_>, in_question: InQuestion) {
        let Some(primary) = &mut self.primary else { return };
        let now_ns = call.now_ns;
        for learner in primary.learners.iter_mut().filter(|learner| in_question(learner, now_ns)) {
            tracing::warn!(group = %self.id, node = %learner.node, "a learner fell too far behind");
            call.unsend(learner.node, self.id);
            learner.outrun(call);
            primary.pushes.retain(|lock| lock.learner != learner.node);
        }
        call.core.ticking.insert(self.id);
    }

    /// Flushes the acting members as far as someone waits for it, and answers those whose writes are stable.
    pub(super) fn go_on_flushing(&mut self, call: &mut Call<'_>) {
        let acked = self.replica.acked;
        let Some(primary) = &mut self.primary else { return };
        if primary.flushes.is_empty() {
            return;
        }
        let flushed = if Mutation::FlushAnsweredAtOnce.is_on() { Some(acked) } else { primary.flushed };
        let stable = |wait: &FlushWait| wait.through.is_some() && wait.through <= flushed;
        let done: Vec<RequestId> =
            primary.flushes.extract_if(.., |wait| stable(wait)).map(|wait| wait.request).collect();
        for request in done {
            self.answer(call, request, Reply::Done);
        }
        let Some(primary) = &mut self.primary else { return };
        let due = primary.flushes.iter().any(|wait| wait.through.is_some_and(|through| through <= acked));
        if !due
            || primary.round.is_some()
            || !primary.is_active()
            || primary.members.iter().any(|member| !member.synced)
        {
            return;
        }
        let number = call.core.fresh_token();
        let mut awaiting: Vec<NodeId> = primary.members.iter().map(|member| member.node).collect();
        if Mutation::FlushOfPrimaryOnly.is_on() {
            awaiting.retain(|node| *node == call.node());
        }
        let since_ns = call.now_ns;
        // What was acknowledged before a member acted is on its way to that one.
        let everywhere = primary.quorum.as_ref().map_or(Seq(0), Quorum::durable_everywhere);
        let covers = acked.min(everywhere);
        primary.round =
            Some(FlushRound { number, covers, since_ns, awaiting: awaiting.clone(), failed: false });
        let epoch = primary.epoch;
        for node in awaiting {
            if node == call.node() {
                call.flush(self.replica.store, FlushWaiter::Round { group: self.id, round: number });
            } else {
                call.send(node, frames::numbered(Opcode::MemberFlush, self.id, epoch, number));
            }
        }
    }

    /// A member's journal is on stable media, as asked in round `number`.
    pub(super) fn on_round_flushed(&mut self, call: &mut Call<'_>, node: NodeId, number: u64, ok: bool) {
        let Some(primary) = &mut self.primary else { return };
        let Some(round) = primary.round.as_mut().filter(|round| round.number == number) else { return };
        round.awaiting.retain(|awaited| *awaited != node);
        round.failed |= !ok;
        if !round.awaiting.is_empty() {
            return;
        }
        let FlushRound { mut covers, failed, .. } = *round;
        if Mutation::FlushCoversLaterWrites.is_on() {
            covers = self.replica.acked;
        }
        primary.round = None;
        if failed {
            // The next tick tries again, or the next epoch without the member that can not.
            return;
        }
        primary.flushed = primary.flushed.max(Some(covers));
        self.go_on_flushing(call);
    }
}
