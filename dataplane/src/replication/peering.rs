//! Peering: what a primary does at every new epoch before it serves, and with a member that comes back.
//!
//! It asks every acting member where its journal ends; the longest journal wins and is rolled forward to all. An entry keeps the version
//! that it was given. The journals of an acting set are prefixes of one another: a member whose journal is not is proposed out.
//! Used by `group`; its counterpart at the member is `Group::on_peer`.
//!
//! Invariants
//! - Without a member of the last settled epoch nothing is acknowledged before the control plane knows that all who act
//!   now have their journals complete.
//! - The group becomes active only after every acting member answered at this epoch, and once this node's journal holds
//!   all that any of them holds. A member that answered takes nothing of an older epoch.
//!
//! Source: docs/decisions/0009-settled-epochs.md; Ongaro and Ousterhout, "In Search of an Understandable Consensus
//! Algorithm", 2014, for comparing journals by (epoch, seq).

use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, NodeId, Seq};
use xsan_protocol::map;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::wire::header::{Opcode, flags};
use xsan_protocol::wire::replication::{FetchMeta, PeerInfo};

use super::action::Change;
use super::call::Call;
use super::frames;
use super::group::Group;
use super::primary::Primary;
use super::quorum::Quorum;
use super::resync::Learner;
use super::status::Stage;
use crate::net::frame::{Frame, Meta};

/// A question that was not answered is asked again.
pub(super) const ASK_AGAIN_NS: u64 = 100_000_000;
/// A member that does not answer for so long is proposed out.
const SILENT_MAX_NS: u64 = 300_000_000;
/// A member that does not journal anything for so long, with entries waiting for it, is proposed out.
const STALLED_MAX_NS: u64 = 2_000_000_000;
pub(super) const PROPOSE_AGAIN_NS: u64 = 500_000_000;
/// The group stands still meanwhile: asked again as soon as an answer should have come.
const SETTLE_AGAIN_NS: u64 = 100_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Members are being asked.
    Asking,
    /// A member has entries that this node lacks.
    Fetching {
        from: NodeId,
        to: Seq,
    },
    /// All is known; this node's journal is not complete yet.
    Journaling,
    Active,
}

/// A member of the acting set as its primary sees it.
#[derive(Debug)]
pub(super) struct Member {
    pub node: NodeId,
    pub info: Option<PeerInfo>,
    /// It has answered, and gets every entry since.
    pub synced: bool,
    /// The newest entry sent to it.
    pub sent: Seq,
    pub asked_ns: Option<u64>,
    pub silent_since_ns: u64,
    pub progress_ns: u64,
    proposed_ns: Option<u64>,
    /// When it last said so: its store has no room for new places. `None`: it had, when it answered last.
    full_ns: Option<u64>,
    /// Its journal is no prefix of the group's, or ends before what can still be sent.
    outcast: bool,
}

impl Member {
    fn new(node: NodeId, now_ns: u64) -> Self {
        Self {
            node,
            info: None,
            synced: false,
            sent: Seq(0),
            asked_ns: None,
            silent_since_ns: now_ns,
            progress_ns: now_ns,
            proposed_ns: None,
            full_ns: None,
            outcast: false,
        }
    }
}

/// Is it time again for something last done at `last_ns`?
pub(super) fn is_due(last_ns: Option<u64>, every_ns: u64, now_ns: u64) -> bool {
    last_ns.is_none_or(|last| now_ns.saturating_sub(last) >= every_ns)
}

impl Group {
    /// Leads the group from this epoch on. `continues`: this node led it in the epoch just before, and nobody else can have
    /// since, so its requests stay.
    pub(super) fn reign(
        &mut self,
        call: &mut Call<'_>,
        group: &map::Group,
        min_replicas: u8,
        continues: bool,
    ) {
        assert!(continues == self.primary.is_some());
        // Learners begin anew. While the members are asked, which may take long, nothing else is forgotten.
        self.trim_but_for(call, |learner| group.acting().any(|member| member.node == learner.node));
        let reign = call.core.fresh_token();
        let primary = self.primary.get_or_insert_with(|| Box::new(Primary::new(group.epoch, reign)));
        call.core.pushes -= primary.learners.iter().map(|learner| learner.pushing).sum::<usize>();
        primary.epoch = group.epoch;
        primary.phase = Phase::Asking;
        primary.since_ns = call.now_ns;
        primary.min_replicas = usize::from(min_replicas);
        primary.members = group.acting().map(|member| Member::new(member.node, call.now_ns)).collect();
        primary.learners = group.learners().map(|member| Learner::new(member.node)).collect();
        primary.quorum = None;
        primary.pushes.clear();
        primary.round = None;
        primary.flushed = None;
        primary.announced = Seq(0);
        primary.settled = group.is_settled();
        primary.dropped = group.dropped.iter().map(|member| member.node).collect();
        primary.waits_to_settle =
            !Mutation::SettledAtOnce.is_on() && !group.former.iter().all(|former| group.acts(former));
        primary.settling_ns = None;
        primary.successor = None;
        let acts = |node| group.acting().any(|member| member.node == node);
        primary.scrub.iter_mut().for_each(|scrub| scrub.on_acting(acts));
        for waiting in &mut primary.waiting {
            waiting.request.epoch = group.epoch;
        }
        if !primary.serves() {
            self.fail_requests(call, Code::GroupInactive);
        }
        self.ask(call);
        self.maybe_compare_journals(call);
    }

    /// Asks the members that have not answered, each at most every `ASK_AGAIN_NS`.
    fn ask(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        let own = call.node();
        for member in &mut primary.members {
            let due = is_due(member.asked_ns, ASK_AGAIN_NS, call.now_ns);
            if member.node == own || member.synced || member.info.is_some() || !due {
                continue;
            }
            member.asked_ns = Some(call.now_ns);
            call.send(member.node, frames::frame(Opcode::Peer, self.id, primary.epoch));
        }
    }

    /// Have the members' stores room for new places? Who said a while ago that there is none is asked again.
    ///
    /// # Errors
    /// `StorageFull`: one has just said that it has none. `Busy`: one has not answered yet.
    pub(super) fn admit_at_members(&mut self, call: &mut Call<'_>) -> Result<(), Code> {
        let Some(primary) = &mut self.primary else { return Ok(()) };
        let mut admitted = Ok(());
        for member in &mut primary.members {
            let Some(full_ns) = member.full_ns else { continue };
            if !is_due(Some(full_ns), ASK_AGAIN_NS, call.now_ns) {
                return Err(Code::StorageFull);
            }
            admitted = Err(Code::Busy);
            if is_due(member.asked_ns, ASK_AGAIN_NS, call.now_ns) {
                member.asked_ns = Some(call.now_ns);
                call.send(member.node, frames::frame(Opcode::Peer, self.id, primary.epoch));
            }
        }
        admitted
    }

    /// A frame of a member or learner to its primary.
    pub(super) fn on_answer(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        let header = frame.header;
        if self.primary.as_ref().is_none_or(|primary| primary.epoch != header.epoch) {
            return;
        }
        if matches!(header.opcode, Opcode::AppendOk | Opcode::PeerInfo)
            && let Some(primary) = &mut self.primary
            && let Some(member) = primary.members.iter_mut().find(|member| member.node == from)
        {
            member.full_ns = (header.flags & flags::STORE_FULL != 0).then_some(call.now_ns);
        }
        match header.opcode {
            Opcode::AppendOk => self.on_append_answer(call, from, header.status, Seq(header.request_id)),
            Opcode::PeerInfo => self.on_peer_info(call, from, &frame),
            Opcode::FetchReply => self.on_fetched(call, from, frame),
            Opcode::MemberFlushReply => {
                let ok = header.status.is_none();
                if !self.on_learner_flushed(call, from, header.request_id, ok) {
                    self.on_round_flushed(call, from, header.request_id, ok);
                }
            }
            Opcode::LearnStartReply => self.on_learner_started(call, from, &header),
            Opcode::CompareReply => {
                if !self.on_scrub_compared(call, from, &frame) {
                    self.on_compared(call, from, &frame);
                }
            }
            Opcode::PushReply => self.on_pushed(call, from, &header),
            Opcode::FetchPagesReply => self.on_pages(call, from, frame),
            Opcode::CheckReply => self.on_check_reply(call, from, &frame),
            Opcode::Damaged => self.on_damaged(call, from, &header),
            opcode => {
                tracing::warn!(group = %self.id, %from, ?opcode, "not a frame of replication");
                call.core.counters.frames_refused += 1;
            }
        }
    }

    fn on_append_answer(&mut self, call: &mut Call<'_>, from: NodeId, status: Option<Code>, durable: Seq) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(learner) = primary.learners.iter_mut().find(|learner| learner.node == from) {
            return match status {
                // What was on its way when it was lost is refused, too.
                Some(_) if !learner.is_running() => {}
                Some(code) => self.lose_learner(call, from, Some(code)),
                None => {
                    if learner.is_running() && durable <= learner.sent {
                        let taken_ns = learner.on_durable(durable, call.now_ns);
                        taken_ns.into_iter().for_each(|ns| call.core.latencies.add_member(from, ns));
                    }
                }
            };
        }
        let Some(member) = primary.members.iter_mut().find(|member| member.node == from) else { return };
        if let Some(code) = status {
            // It lacks something, or knows of a newer epoch: it is asked again.
            tracing::debug!(group = %self.id, %from, ?code, "a member refused an append");
            if std::mem::replace(&mut member.synced, false) {
                member.silent_since_ns = call.now_ns;
                member.info = None;
                member.asked_ns = Some(call.now_ns);
            }
            call.core.ticking.insert(self.id);
            return;
        }
        // It may report more before all have answered, and it reports nothing twice.
        if let Some(info) = &mut member.info {
            info.durable = info.durable.max(durable.min(info.last.seq));
        }
        if durable > self.replica.last.seq && primary.quorum.is_some() {
            tracing::warn!(group = %self.id, %from, %durable, "a member reports entries that it was never sent");
            return;
        }
        self.on_append_ok(call, from, durable);
    }

    fn on_peer_info(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) {
        let Some(primary) = &mut self.primary else { return };
        let Meta::PeerInfo(info) = frame.meta else { return };
        if frame.header.status.is_some() {
            return;
        }
        let Some(member) = primary.members.iter_mut().find(|member| member.node == from) else {
            return self.on_learner_info(call, from, info);
        };
        if member.synced {
            // It was asked twice. What it tells of its journal here, it does not tell again.
            return self.on_append_answer(call, from, None, info.durable);
        }
        if info.durable > info.last.seq || info.last.epoch > primary.epoch {
            tracing::warn!(group = %self.id, %from, ?info, "a member's journal can not end like that");
            return;
        }
        member.info = Some(info);
        if primary.quorum.is_some() {
            self.take_in(call, from);
            self.on_progress(call);
        } else {
            self.maybe_compare_journals(call);
        }
    }

    /// Once every acting member has in its journal what any had when the epoch began, the control plane is told: nothing may
    /// rest on this acting set alone before it knows.
    ///
    /// Without it: (1) A restarts, having lost nothing; (2) B has lost its power, which nobody knows yet, and
    /// the acting set becomes B alone; (3) B is back without what it had not flushed, and is all there is. With
    /// it A counts on, because B never answered at that epoch.
    ///
    /// A primary whose store has failed knows nothing of what is in its journal.
    pub(super) fn settle(&mut self, call: &mut Call<'_>) {
        let failed = call.core.has_failed(self.replica.store);
        let Some(primary) = self.primary.as_mut().filter(|_| !failed) else { return };
        let everywhere = primary.quorum.as_ref().map(Quorum::durable_everywhere);
        if everywhere.is_none_or(|everywhere| everywhere < primary.settles_at) {
            return;
        }
        if !primary.settled && is_due(primary.settling_ns, SETTLE_AGAIN_NS, call.now_ns) {
            primary.settling_ns = Some(call.now_ns);
            let epoch = primary.epoch;
            call.core.ticking.insert(self.id);
            call.propose(self.id, epoch, call.node(), Change::Settle);
        }
    }

    /// The control plane has forgotten the former members.
    pub(super) fn on_settled(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        primary.settled = true;
        primary.dropped.clear();
        if std::mem::take(&mut primary.waits_to_settle)
            && let Some(quorum) = &primary.quorum
        {
            let acked = quorum.acked();
            self.on_acknowledged(call, acked);
            self.maybe_activate(call);
        }
        self.start_learners(call);
    }

    /// Once all have answered: whose journal is the longest?
    fn maybe_compare_journals(&mut self, call: &mut Call<'_>) {
        let own = call.node();
        let last = self.replica.last;
        let Some(primary) = &mut self.primary else { return };
        let waits = |member: &Member| member.node != own && member.info.is_none();
        if primary.phase != Phase::Asking || primary.members.iter().any(waits) {
            return;
        }
        let longest = primary
            .members
            .iter()
            .filter_map(|member| member.info.map(|info| (info.last, member.node)))
            .max()
            .filter(|(longest, _)| *longest > last && !Mutation::LongestJournalIgnored.is_on());
        let Some((longest, from)) = longest else { return self.all_known(call) };
        if longest.seq <= last.seq {
            tracing::error!(group = %self.id, own = %last, %from, longest = %longest, "this node's journal is no prefix of a newer one");
            return self.yield_to(call, from);
        }
        primary.phase = Phase::Fetching { from, to: longest.seq };
        let mut fetch = frames::frame(Opcode::Fetch, self.id, primary.epoch);
        fetch.meta = Meta::Fetch(FetchMeta { from: last.seq.next(), to: longest.seq });
        call.send(from, fetch);
    }

    /// An entry that this node lacked.
    fn on_fetched(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        let Some(primary) = &self.primary else { return };
        let Phase::Fetching { from: source, to } = primary.phase else { return };
        if source != from {
            return;
        }
        if let Some(code) = frame.header.status {
            tracing::error!(group = %self.id, %from, ?code, "a member's longer journal can not be fetched");
            return self.yield_to(call, from);
        }
        let epoch = primary.epoch;
        let entry = match frames::entry_of(frame) {
            Ok(entry) if entry.version.epoch <= epoch && entry.version.epoch >= self.replica.last.epoch => {
                entry
            }
            _ => {
                tracing::warn!(group = %self.id, %from, "a fetched entry is malformed");
                call.core.counters.frames_refused += 1;
                return;
            }
        };
        if entry.version.seq != self.replica.last.seq.next() {
            return;
        }
        self.replica.on_append(call, entry, true);
        if self.replica.last.seq == to {
            self.all_known(call);
        }
    }

    /// This node has the longest journal: sends each member what it lacks, and counts what they have.
    fn all_known(&mut self, call: &mut Call<'_>) {
        let own = call.node();
        let Some(primary) = &mut self.primary else { return };
        primary.phase = Phase::Journaling;
        let infos = || primary.members.iter().filter_map(|member| member.info);
        let acked = infos().map(|info| info.acked).max().unwrap_or(Seq(0)).max(self.replica.acked);
        if acked > self.replica.last.seq {
            tracing::error!(group = %self.id, %acked, last = %self.replica.last, "an acknowledged entry is in no journal");
        }
        let acked = acked.min(self.replica.last.seq);
        // What nobody has will not count as acknowledged once something else is there.
        self.replica.acked = self.replica.acked.min(acked);
        let nodes: Vec<NodeId> = primary.members.iter().map(|member| member.node).collect();
        for &node in nodes.iter().filter(|node| **node != own) {
            self.take_in(call, node);
        }
        let vouched = self.replica.vouched();
        let Some(primary) = &mut self.primary else { return };
        if primary.members.iter().any(|member| member.outcast) {
            return;
        }
        for member in primary.members.iter_mut().filter(|member| member.node == own) {
            (member.synced, member.sent) = (true, self.replica.last.seq);
        }
        let durable = |member: &Member| match member.info {
            _ if member.node == own => (own, vouched),
            Some(info) => (member.node, info.durable),
            // It has answered, and its connection broke since: it is asked again what it has.
            None => (member.node, Seq(0)),
        };
        let quorum = Quorum::new(primary.members.iter().map(durable).collect(), acked);
        let everywhere = quorum.acked();
        primary.quorum = Some(quorum);
        primary.settles_at = self.replica.last.seq;
        let acked = if primary.waits_to_settle { acked } else { everywhere };
        self.on_acknowledged(call, acked);
        self.settle(call);
        self.maybe_activate(call);
    }

    /// A member has answered: from here on it gets every entry, starting with those that it lacks.
    fn take_in(&mut self, call: &mut Call<'_>, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        let Some(member) = primary.members.iter_mut().find(|member| member.node == node) else { return };
        let Some(info) = member.info else { return };
        let is_prefix = match self.replica.version_at(info.last.seq) {
            Some(version) => version == info.last,
            None => info.last.seq < self.replica.last.seq,
        };
        if !is_prefix || !self.replica.has_from(info.last.seq.next()) {
            tracing::error!(
                group = %self.id, %node, theirs = %info.last, own = %self.replica.last,
                "a member's journal does not continue into the group's: it is proposed out"
            );
            member.outcast = true;
            return;
        }
        member.synced = true;
        member.sent = self.replica.last.seq;
        member.progress_ns = call.now_ns;
        let epoch = primary.epoch;
        for entry in self.replica.entries_from(info.last.seq.next()) {
            call.send(node, frames::of_entry(Opcode::Append, entry, epoch, self.replica.acked, true));
        }
        call.send(node, frames::numbered(Opcode::Commit, self.id, epoch, self.replica.acked.0));
        if primary.quorum.is_some() {
            self.on_append_ok(call, node, info.durable);
        }
    }

    /// Serves, once this node's journal holds everything.
    pub(super) fn maybe_activate(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        let complete = self.replica.vouched() >= self.replica.last.seq;
        let ready = primary.quorum.is_some() && !primary.waits_to_settle && complete;
        if primary.phase != Phase::Journaling || !ready {
            return;
        }
        primary.phase = Phase::Active;
        for wait in &mut primary.flushes {
            wait.through.get_or_insert(self.replica.last.seq);
        }
        let since_ns = primary.since_ns;
        call.sample(Stage::Peering, since_ns);
        tracing::debug!(group = %self.id, epoch = %self.epoch, last = %self.replica.last, "the group is active");
        self.search_for_deleted(call);
        self.start_learners(call);
        self.on_progress(call);
    }

    /// `node` has what this node lacks and can not be given: it should lead the group.
    fn yield_to(&mut self, call: &mut Call<'_>, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if primary.successor.replace(node) != Some(node) {
            primary.yielded_ns = None;
        }
        self.propose_out(call);
    }

    /// The connection to `node` is broken: what was under way is lost.
    pub(super) fn on_peer_lost(&mut self, call: &mut Call<'_>, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if primary.learners.iter().any(|learner| learner.node == node) {
            self.lose_learner(call, node, None);
            return self.on_progress(call);
        }
        let Some(member) = primary.members.iter_mut().find(|member| member.node == node) else { return };
        if member.synced || member.info.is_some() {
            member.silent_since_ns = call.now_ns;
        }
        (member.synced, member.info, member.asked_ns) = (false, None, None);
        primary.scrub.iter_mut().for_each(|scrub| scrub.step_back());
        if matches!(primary.phase, Phase::Fetching { from, .. } if from == node) {
            primary.phase = Phase::Asking;
        }
        call.core.ticking.insert(self.id);
        let round =
            self.primary.as_ref().and_then(|primary| primary.round.as_ref()).map(|round| round.number);
        if let Some(number) = round {
            self.on_round_flushed(call, node, number, false);
        }
    }

    /// There is a new connection to `node`.
    pub(super) fn on_peer_up(&mut self, call: &mut Call<'_>, node: NodeId) {
        let Some(primary) = &mut self.primary else { return };
        if let Some(member) = primary.members.iter_mut().find(|member| member.node == node) {
            if !member.synced {
                (member.info, member.asked_ns) = (None, None);
                if primary.phase != Phase::Active && primary.quorum.is_none() {
                    primary.phase = Phase::Asking;
                }
            }
            return self.ask(call);
        }
        self.start_learners(call);
    }

    pub(super) fn on_primary_tick(&mut self, call: &mut Call<'_>) {
        self.ask(call);
        self.settle(call);
        self.propose_out(call);
        self.announce(call);
        let acked = self.replica.acked;
        for learner in self.primary.iter_mut().flat_map(|primary| &mut primary.learners) {
            learner.watch(acked, call.now_ns);
        }
        if call.has_lease()
            && let Some(primary) = &mut self.primary
        {
            for (request, reply) in primary.held.drain(..) {
                call.complete(request, Ok(reply));
            }
        }
        self.start_learners(call);
        self.go_on_scrubbing(call);
        self.go_on_searching(call);
        self.on_progress(call);
    }

    /// Tells the members what is acknowledged, when no append did.
    fn announce(&mut self, call: &mut Call<'_>) {
        let (acked, own) = (self.replica.acked, call.node());
        let Some(primary) = &mut self.primary else { return };
        if primary.quorum.is_none() || primary.announced >= acked {
            return;
        }
        primary.announced = acked;
        let members =
            primary.members.iter().filter(|member| member.synced && member.node != own).map(|m| m.node);
        let learners =
            primary.learners.iter().filter(|learner| learner.is_running()).map(|learner| learner.node);
        for node in members.chain(learners) {
            call.send(node, frames::numbered(Opcode::Commit, self.id, primary.epoch, acked.0));
        }
    }

    /// Proposes out who is silent, stalled (a flush too, that others have ended), or not of this group's past.
    fn propose_out(&mut self, call: &mut Call<'_>) {
        let (id, last, own, now_ns) = (self.id, self.replica.last.seq, call.node(), call.now_ns);
        let Some(primary) = &mut self.primary else { return };
        // A learner that has everything may stand in.
        let ready = primary.learners.iter().any(Learner::has_everything);
        let spare = primary.members.len() + usize::from(ready) > primary.min_replicas;
        let epoch: Epoch = primary.epoch;
        if let Some(successor) = primary.successor
            && is_due(primary.yielded_ns, PROPOSE_AGAIN_NS, now_ns)
        {
            primary.yielded_ns = Some(now_ns);
            tracing::warn!(group = %id, node = %successor, "proposing the member with the longest journal as primary");
            call.propose(id, epoch, successor, Change::Lead);
        }
        let member_count = primary.members.len();
        for member in &mut primary.members {
            let durable = primary.quorum.as_ref().and_then(|quorum| quorum.durable(member.node));
            let silent = member.node != own
                && !member.synced
                && member.info.is_none()
                && now_ns.saturating_sub(member.silent_since_ns) >= SILENT_MAX_NS;
            let stalled = member.synced
                && durable.is_some_and(|durable| durable < last)
                && now_ns.saturating_sub(member.progress_ns) >= STALLED_MAX_NS;
            let flushes = primary
                .round
                .as_ref()
                .is_some_and(|round| round.waits_for(member.node, member_count, STALLED_MAX_NS, now_ns));
            let wanted = member.outcast || (spare && (silent || stalled || flushes));
            if wanted && is_due(member.proposed_ns, PROPOSE_AGAIN_NS, now_ns) {
                member.proposed_ns = Some(now_ns);
                tracing::warn!(
                    group = %id, node = %member.node, outcast = member.outcast, silent, stalled, flushes,
                    "proposing a member out of the acting set"
                );
                let change = if member.outcast { Change::Exclude } else { Change::Demote };
                call.propose(id, epoch, member.node, change);
            }
        }
    }
}
