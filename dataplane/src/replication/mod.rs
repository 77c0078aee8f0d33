//! Replication: every group of one shard, as one deterministic state machine.
//!
//! Takes requests, frames, store events, maps and ticks; appends [`Action`]s, which the shard carries out in
//! order. Reads no clock, socket or file. Knows no volume and no gateway.
//!
//! Contract with the shard
//! - The actions of one call are carried out, in order, before the next call: the stores then show what was decided.
//! - When a store refuses a record, the later records of the same group in the same `out` are not offered to it; all of
//!   them, in order, go to [`Replication::on_append_refused`].
//! - Frames of one group to one node travel in order, on one connection. Frames are lost only when it breaks, which is told
//!   by [`Replication::on_peer_lost`], and its return by [`Replication::on_peer_up`]; and content, where [`Action::Unsend`] says so.
//!
//! Source: Lin et al., "PacificA", 2008, for leaving the configuration to a separate consensus.

use std::collections::BTreeMap;
use std::sync::Arc;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, Incarnation, MapVersion, NodeId, Seq, ShardIndex, StoreId};
use xsan_protocol::map::ClusterMap;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::wire::header::Opcode;

mod action;
mod call;
mod check;
mod driver;
mod flush;
mod frames;
mod group;
mod lag;
mod learner;
mod pace;
mod peering;
mod primary;
mod quorum;
mod reads;
mod reclaim;
mod replica;
mod resync;
mod scrub;
mod status;

pub use action::{Action, Change, Operation, Origin, Reply, Request, RequestId};
pub use call::Stores;
pub use driver::{Driver, Output, StoreTable};
pub use frames::is_content;
pub use scrub::{ScrubFindings, ScrubOrder, ScrubOutcome, ScrubStatus};
pub use status::{Counters, ReplicationStatus, SlowMember, Stage};

use crate::disk::buffers::BufferPool;
use crate::net::frame::Frame;
use crate::store::{Entry, GroupTail, Record, StoreError, StoreEvent, Withdrawn};
use call::{Call, Core, MendJob, ReadPurpose, Token};
use flush::FlushWaiter;
use group::{Group, Role};
use primary::InQuestion;
use reclaim::{Leftover, Lineages, is_needed};
use replica::Replica;
use resync::Learner;

/// Of the shard's memory, what acknowledged entries may hold for learners that are late, and for those that were brought up to
/// date (they are slow, or act in a moment); and what learners here hold, if some are late. Clients get half of that memory at most.
const LATE_PART: usize = 16;
const UP_TO_DATE_PART: usize = 8;

/// One group as a store recovered it.
#[derive(Clone, Debug)]
pub struct RecoveredGroup {
    pub group: GroupId,
    pub tail: GroupTail,
    /// The entries after `tail.acked`, in order, with their payload.
    pub pending: Vec<Entry>,
}

impl RecoveredGroup {
    fn into_replica(self, store: StoreId) -> Replica {
        Replica::new(self.group, store, self.tail, self.pending)
    }
}

/// All groups of one shard.
#[derive(Debug)]
pub struct Replication {
    core: Core,
    groups: BTreeMap<GroupId, Group>,
    /// What the stores recovered of groups that the map has not mentioned yet.
    recovered: BTreeMap<(StoreId, GroupId), RecoveredGroup>,
    /// What stores hold of groups that are elsewhere by now, be it on another store of this shard.
    leftovers: BTreeMap<(StoreId, GroupId), Leftover>,
    map_version: Option<MapVersion>,
}

impl Replication {
    pub fn new(node: NodeId, incarnation: Incarnation, shard: ShardIndex, pool: &'static BufferPool) -> Self {
        tracing::debug!(%node, %incarnation, %shard, "replication starts");
        let core = Core::new(node, incarnation, pool);
        let (groups, recovered, leftovers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { core, groups, recovered, leftovers, map_version: None }
    }

    /// Makes a store of this shard known, with what it recovered. A damaged one may lack acknowledged entries: the
    /// control plane makes its groups learners as long as there is any other source.
    pub fn add_store(&mut self, store: StoreId, recovered: Vec<RecoveredGroup>, damaged: bool) {
        self.core.stores.insert(store, false);
        if damaged {
            tracing::error!(%store, "the store lost records: its groups are rebuilt from their peers");
        }
        for group in recovered {
            self.recovered.insert((store, group.group), group);
        }
    }

    /// A newer map. Groups that changed are taken over, left or followed; frames that waited for it are taken.
    pub fn on_map(&mut self, map: &Arc<ClusterMap>, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        if self.map_version.is_some_and(|version| version >= map.version) {
            return;
        }
        self.begin(stores, now_ns, out);
        self.map_version = Some(map.version);
        let mut changed: Vec<_> = map
            .groups
            .values()
            .filter(|group| group.epoch > self.groups.get(&group.id).map_or(Epoch(0), |own| own.epoch))
            .collect();
        changed.sort_unstable_by_key(|group| group.id);
        for group in changed {
            let member = group.member(self.core.node).filter(|member| {
                member.incarnation == self.core.incarnation && self.core.stores.contains_key(&member.store)
            });
            if let Some(member) = member {
                self.place(group.id, member.store, stores, now_ns, out);
            }
            let min_replicas = map.pools.get(&group.id.pool()).map_or(1, |pool| pool.min_replicas);
            self.with(group.id, stores, now_ns, out, |own, call| own.on_map(call, group, min_replicas));
            // Their answers are of an older epoch: they would not be taken.
            let of_group = |mend: &MendJob| mend.read.group == group.id;
            for mend in self.core.take_mends(of_group) {
                self.with(group.id, stores, now_ns, out, |own, call| own.on_unanswered_mend(call, mend));
            }
        }
        let settled: Vec<GroupId> =
            self.groups.values().filter(|own| own.is_unsettled()).map(|own| own.id).collect();
        for id in settled {
            let now = map
                .groups
                .get(&id)
                .is_some_and(|group| group.epoch == self.groups[&id].epoch && group.is_settled());
            if now {
                self.with(id, stores, now_ns, out, |own, call| own.on_settled(call));
            }
        }
        self.reclaim(map, stores, now_ns, out);
        self.find_leftovers(map);
        for (from, frame) in std::mem::take(&mut self.core.early) {
            self.take_frame(from, frame, stores, now_ns, out);
        }
    }

    /// Has what the map does not need any more reclaimed.
    fn reclaim(&mut self, map: &ClusterMap, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        let lineages = Lineages::of(map);
        let deleted = lineages.lost_any_of(&self.core.lineages);
        self.core.lineages = lineages;
        if deleted {
            let ids: Vec<GroupId> = self.groups.keys().copied().collect();
            for id in ids {
                self.with(id, stores, now_ns, out, |group, call| group.search_for_deleted(call));
            }
        }
    }

    /// Decides which replicas are of no use any more.
    fn find_leftovers(&mut self, map: &ClusterMap) {
        let Core { node, incarnation, .. } = self.core;
        // An older map may not know of a group that an earlier life was given.
        let own = map.nodes.get(&node).and_then(|own| own.data.as_ref());
        if own.is_none_or(|own| own.incarnation != incarnation) {
            return;
        }
        let is_needed = |store, id| is_needed(map, id, node, store);
        let core = &self.core;
        let recovered = self.recovered.extract_if(.., |(store, id), _| !is_needed(*store, *id));
        let recovered = recovered.map(|((store, _), group)| group.into_replica(store));
        let left = self.groups.extract_if(.., |id, group| {
            let store = group.replica.store;
            group.role == Role::None && !is_needed(store, *id) && !core.has_failed(store)
        });
        for replica in recovered.chain(left.map(|(_, group)| group.replica)) {
            self.leftovers.insert((replica.store, replica.group), Leftover { replica, is_emptied: true });
        }
        for ((store, id), leftover) in &mut self.leftovers {
            leftover.is_emptied = !is_needed(*store, *id);
        }
    }

    /// The group is kept in `store` from now on.
    fn place(
        &mut self,
        id: GroupId,
        store: StoreId,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        if self.groups.get(&id).is_some_and(|group| group.replica.store == store) {
            return;
        }
        self.with(id, stores, now_ns, out, |group, call| group.abdicate(call));
        let recovered = self.recovered.remove(&(store, id)).map(|group| group.into_replica(store));
        let left = self.leftovers.remove(&(store, id)).map(|leftover| leftover.replica);
        let replica =
            recovered.or(left).unwrap_or_else(|| Replica::new(id, store, GroupTail::default(), Vec::new()));
        let before = self.groups.insert(id, Group::new(id, replica));
        if let Some(Group { replica, .. }) =
            before.filter(|before| !self.core.has_failed(before.replica.store))
        {
            self.leftovers.insert((replica.store, id), Leftover { replica, is_emptied: false });
        }
    }

    /// The node may serve until this moment.
    pub fn on_lease(&mut self, until_ns: u64) {
        self.core.lease_until_ns = until_ns;
    }

    pub fn on_request(&mut self, request: Request, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        self.begin(stores, now_ns, out);
        if self.groups.contains_key(&request.group) {
            self.with(request.group, stores, now_ns, out, |group, call| group.on_request(call, request));
        } else {
            out.push(Action::Complete { request: request.id, result: Err(Code::NotPrimary) });
        }
    }

    /// A frame of the replication family from another node.
    pub fn on_frame(
        &mut self,
        from: NodeId,
        frame: Frame,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        self.begin(stores, now_ns, out);
        self.take_frame(from, frame, stores, now_ns, out);
    }

    fn take_frame(
        &mut self,
        from: NodeId,
        frame: Frame,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        let id = frame.header.group;
        if self.groups.contains_key(&id) {
            self.with(id, stores, now_ns, out, |group, call| group.on_frame(call, from, frame));
        } else {
            // Soon after a start, peers may know the map before this node does.
            let mut call = Call { core: &mut self.core, stores, now_ns, out };
            group::hold_early(&mut call, from, frame);
        }
    }

    pub fn on_store_event(
        &mut self,
        store: StoreId,
        event: StoreEvent,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        self.begin(stores, now_ns, out);
        match event {
            StoreEvent::Damaged { group, key, pages } => {
                if self.groups.get(&group).is_some_and(|group| group.replica.store == store) {
                    self.with(group, stores, now_ns, out, |group, call| {
                        group.on_destage_damaged(call, key, pages);
                    });
                }
            }
            StoreEvent::Durable { group, seq } => {
                if self.groups.get(&group).is_some_and(|group| group.replica.store == store) {
                    self.with(group, stores, now_ns, out, |group, call| group.on_durable(call, seq));
                } else {
                    self.with_replica(store, group, stores, now_ns, out, |replica, call| {
                        replica.on_durable(call, seq);
                    });
                }
            }
            StoreEvent::Reset { group } => {
                if self.groups.get(&group).is_some_and(|group| group.replica.store == store) {
                    self.with(group, stores, now_ns, out, |group, call| group.on_reset(call));
                } else {
                    self.with_replica(store, group, stores, now_ns, out, |replica, _| replica.on_reset());
                }
            }
            StoreEvent::Pushed { token } => {
                let mut call = Call { core: &mut self.core, stores, now_ns, out };
                group::answer_push(&mut call, token, None);
            }
            StoreEvent::Flushed { token } => self.on_flushed(store, token, stores, now_ns, out),
            StoreEvent::ReadDone { token, result } => match self.core.take(token) {
                Some(Token::Read(job)) if matches!(job.purpose, ReadPurpose::Dropped) => {}
                Some(Token::Read(job)) => {
                    self.with(job.group, stores, now_ns, out, |group, call| {
                        group.on_read_done(call, job, result);
                    });
                }
                Some(other) => self.core.put_back(token, other),
                None => {}
            },
            StoreEvent::Repaired { pages, .. } => tracing::info!(%store, ?pages, "damaged pages are mended"),
            StoreEvent::Failed => {
                tracing::error!(%store, "the store has failed: its groups go on without it");
                self.core.stores.insert(store, true);
                self.recovered.retain(|(of, _), _| *of != store);
                self.leftovers.retain(|(of, _), _| *of != store);
                for group in self.groups.values_mut() {
                    group.give_up_failed(&self.core);
                }
            }
        }
    }

    fn on_flushed(
        &mut self,
        store: StoreId,
        token: u64,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        match self.core.take(token) {
            Some(Token::Flush(of)) if of == store => {}
            Some(other) => return self.core.put_back(token, other),
            None => return,
        }
        let released = Call { core: &mut self.core, stores, now_ns, out }.flushed(store, token);
        for waiter in released {
            match waiter {
                FlushWaiter::Replica { group, ticket } => {
                    self.with_replica(store, group, stores, now_ns, out, |replica, call| {
                        replica.on_stable(call, ticket);
                    });
                    self.with(group, stores, now_ns, out, |group, call| group.on_vouched(call));
                }
                FlushWaiter::Member { group, epoch, to, request_id } => {
                    let frame = frames::numbered(Opcode::MemberFlushReply, group, epoch, request_id);
                    out.push(Action::Send { to, frame });
                }
                FlushWaiter::Round { group, round } => {
                    let own = self.core.node;
                    self.with(group, stores, now_ns, out, |group, call| {
                        group.on_round_flushed(call, own, round, true);
                    });
                }
            }
        }
    }

    /// The store did not take a record. Entries are offered again at the next tick; the primary sees a slow member.
    pub fn on_append_refused(
        &mut self,
        store: StoreId,
        record: Record,
        error: StoreError,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        self.begin(stores, now_ns, out);
        tracing::warn!(%store, %error, "the store refuses a record");
        match record {
            Record::Entry(entry) => {
                self.with_replica(store, entry.group, stores, now_ns, out, |replica, call| {
                    replica.on_refused(call, entry.version.seq);
                });
            }
            Record::Reset { group, .. } => {
                self.with_replica(store, group, stores, now_ns, out, |replica, call| {
                    replica.on_reset_refused(call);
                });
            }
            Record::Push { token, .. } => {
                let mut call = Call { core: &mut self.core, stores, now_ns, out };
                group::answer_push(&mut call, token, Some(error.code()));
            }
        }
    }

    /// A connection to `node` is there, for the first time or again.
    pub fn on_peer_up(&mut self, node: NodeId, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        self.begin(stores, now_ns, out);
        let mut call = Call { core: &mut self.core, stores, now_ns, out };
        for group in self.groups.values_mut() {
            group.on_peer_up(&mut call, node);
        }
    }

    /// The connection to a shard of `node` is broken: frames under way in both directions are lost, of the groups that
    /// the shard `holds`.
    pub fn on_peer_lost(
        &mut self,
        node: NodeId,
        holds: &dyn Fn(GroupId) -> bool,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        self.begin(stores, now_ns, out);
        self.core.early.retain(|(from, frame)| *from != node || !holds(frame.header.group));
        let mut call = Call { core: &mut self.core, stores, now_ns, out };
        for group in self.groups.values_mut().filter(|group| holds(group.id)) {
            group.on_peer_lost(&mut call, node);
        }
        for mend in self.core.take_mends(|mend| mend.asked == node && holds(mend.read.group)) {
            self.with(mend.read.group, stores, now_ns, out, |group, call| {
                group.on_unanswered_mend(call, mend)
            });
        }
    }

    /// A session is fenced: its requests that have no place in the order yet are dropped, none is answered any more.
    pub fn on_origin_gone(&mut self, origin: Origin) {
        for group in self.groups.values_mut() {
            if group.on_origin_gone(origin) {
                self.core.deferred.insert(group.id);
            }
        }
        self.core.drop_reads(|request| request.origin == origin);
    }

    /// Time passes: questions are repeated, the silent proposed out, acknowledgements announced. Idle groups cost nothing.
    pub fn on_tick(&mut self, now_ns: u64, stores: &dyn Stores, out: &mut Vec<Action>) {
        self.begin(stores, now_ns, out);
        self.core.latencies.on_tick(now_ns);
        let (_, arena) = self.core.pool.arena();
        self.bound_retained(arena / LATE_PART, Learner::is_late, stores, now_ns, out);
        let up_to_date: InQuestion = |learner, _| learner.has_everything();
        self.bound_retained(arena / UP_TO_DATE_PART, up_to_date, stores, now_ns, out);
        self.scrub(stores, now_ns, out);
        self.tick_groups(stores, now_ns, out);
        self.leftovers
            .retain(|_, leftover| !leftover.on_tick(&mut Call { core: &mut self.core, stores, now_ns, out }));
        self.bound_learned(arena / LATE_PART, now_ns, out);
    }

    fn tick_groups(&mut self, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        let ticking: Vec<GroupId> = self.core.ticking.iter().copied().collect();
        for id in ticking {
            if self.groups.contains_key(&id) {
                self.with(id, stores, now_ns, out, |group, call| group.on_tick(call));
            } else {
                self.core.ticking.remove(&id);
            }
        }
    }

    /// What all groups together keep for the learners `in_question` leaves buffers to clients. For one that is still being brought
    /// up to date, and not late, clients wait as they do for a member: it would never catch up if it had to start anew.
    fn bound_retained(
        &mut self,
        bound: usize,
        in_question: InQuestion,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        let mut groups = Vec::new();
        // Groups with learners tick.
        for id in &self.core.ticking {
            let group = self.groups.get(id);
            groups.extend(group.and_then(|group| Some((group.retains_for(now_ns, in_question)?, *id))));
        }
        let mut total: usize = groups.iter().map(|(bytes, _)| bytes).sum();
        groups.sort_unstable();
        while total > bound
            && !Mutation::KeptWithoutBound.is_on()
            && let Some((bytes, id)) = groups.pop()
        {
            total -= bytes;
            self.with(id, stores, now_ns, out, |group, call| group.outrun(call, in_question));
        }
    }

    /// What all learners here were sent leaves buffers to clients, too: those whose device does not take it forget what is not on
    /// its way there. Nothing behind it may be asked of these stores in the same call.
    fn bound_learned(&mut self, bound: usize, now_ns: u64, out: &mut Vec<Action>) {
        let (mut total, mut late) = (0, Vec::new());
        // Groups that hold something tick.
        for group in self.core.ticking.iter().filter_map(|id| self.groups.get(id)) {
            let Some((bytes, is_late)) = group.learner_holds(now_ns) else { continue };
            total += bytes;
            if is_late && bytes > 0 {
                late.push(Action::Withdraw { store: group.replica.store, group: group.id });
            }
        }
        if total > bound {
            out.append(&mut late);
        }
    }

    /// The stores have taken back what was on no way to their devices. Before anything else is done: groups and stores differ until
    /// then.
    pub fn on_withdrawn(
        &mut self,
        withdrawn: Vec<(GroupId, Withdrawn)>,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        for (group, Withdrawn { last, pushes }) in withdrawn {
            for token in pushes {
                let mut call = Call { core: &mut self.core, stores, now_ns, out };
                group::answer_push(&mut call, token, Some(Code::Busy));
            }
            self.with(group, stores, now_ns, out, |group, call| group.on_withdrawn(call, last));
        }
    }

    /// These groups are to be scrubbed, in this order, and no others: what was asked for before and is not among them ends.
    pub fn set_scrubs(
        &mut self,
        bytes_per_second: u64,
        orders: Vec<ScrubOrder>,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
    ) {
        self.begin(stores, now_ns, out);
        self.core.scrubber.set_orders(bytes_per_second, orders);
        if let Some(running) = self.core.scrubber.running
            && !self.core.scrubber.is_wanted(&running)
        {
            self.with(running.group, stores, now_ns, out, |group, call| group.stop_scrub(call));
        }
    }

    /// Has the scrub under way go on at its rate, or begins the next one.
    fn scrub(&mut self, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        if self.core.scrubber.is_idle() {
            return;
        }
        self.core.scrubber.refill(now_ns, self.core.pushes > 0);
        if self.core.scrubber.running.is_some() {
            return;
        }
        for order in self.core.scrubber.open() {
            self.with(order.group, stores, now_ns, out, |group, call| {
                if group.can_scrub(call) {
                    group.start_scrub(call, order);
                }
            });
            if self.core.scrubber.running.is_some() {
                return;
            }
        }
    }

    /// The scrub under way, and the outcomes of those that ended.
    pub fn scrub_status(&self) -> ScrubStatus {
        let findings = |order: &ScrubOrder| {
            let primary = self.groups.get(&order.group)?.primary.as_ref()?;
            primary.scrub.as_ref().map(|scrub| scrub.findings)
        };
        let running = self.core.scrubber.running;
        let running =
            running.map(|order| ScrubOutcome { order, findings: findings(&order).unwrap_or_default() });
        ScrubStatus { running, outcomes: self.core.scrubber.outcomes().to_vec() }
    }

    /// Is there something that only waits for the next call, whatever it is?
    pub fn has_deferred(&self) -> bool {
        !self.core.deferred.is_empty()
    }

    /// A group in words, for those who look for the cause of something.
    pub fn describe(&self, group: GroupId) -> String {
        self.groups.get(&group).map_or_else(String::new, |group| format!("{group:?}"))
    }

    /// What this node knows to be acknowledged in a group, and what it has in its journal.
    pub fn journal(&self, group: GroupId) -> Option<(Seq, Seq)> {
        self.groups.get(&group).map(|group| (group.replica.acked, group.replica.durable))
    }

    /// A group that has something to do at the next tick or call.
    pub fn busy_group(&self) -> Option<GroupId> {
        let emptied = self.leftovers.values().filter(|leftover| leftover.is_emptied);
        let emptied = emptied.map(|leftover| leftover.replica.group);
        self.core.ticking.iter().chain(&self.core.deferred).copied().chain(emptied).next()
    }

    pub fn status(&self) -> ReplicationStatus {
        let mut status = ReplicationStatus {
            counters: self.core.counters,
            slow_members: self.core.latencies.slow_members(),
            ..ReplicationStatus::default()
        };
        for group in self.groups.values() {
            match group.role {
                Role::None => {}
                Role::Learner => status.groups_learner += 1,
                Role::Acting => status.groups_secondary += 1,
                Role::Primary => status.groups_primary += 1,
            }
            let Some(primary) = &group.primary else { continue };
            status.groups_active += usize::from(primary.is_active() && primary.serves());
            status.writes_in_flight += primary.in_flight.len();
            status.requests_waiting += primary.waiting.len();
            status.resync_bytes_left += primary.learners.iter().map(resync::Learner::bytes_left).sum::<u64>();
        }
        status
    }

    /// Moves the latencies measured since the last call to `samples`.
    pub fn drain_latencies(&mut self, samples: &mut Vec<(Stage, u64)>) {
        self.core.latencies.drain(samples);
    }

    /// The newest entry of a group here, and how far it is known to be acknowledged.
    pub fn tail(&self, group: GroupId) -> Option<GroupTail> {
        let replica = &self.groups.get(&group)?.replica;
        Some(GroupTail { last: replica.last, acked: replica.acked })
    }

    /// A new call: the stores show what the last one decided, so what waited for that goes on.
    fn begin(&mut self, stores: &dyn Stores, now_ns: u64, out: &mut Vec<Action>) {
        assert!(out.is_empty(), "the actions of one call are carried out before the next");
        self.core.turn += 1;
        for id in std::mem::take(&mut self.core.deferred) {
            self.with(id, stores, now_ns, out, |group, call| group.on_deferred(call));
        }
        while !self.core.paced.is_empty()
            && self.core.pace.has_room(now_ns)
            && let Some(id) = self.core.paced.pop_first()
        {
            self.with(id, stores, now_ns, out, |group, call| group.go_on_pushing(call));
        }
    }

    /// The replica of a group that `store` has.
    fn with_replica(
        &mut self,
        store: StoreId,
        id: GroupId,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
        act: impl FnOnce(&mut Replica, &mut Call<'_>),
    ) {
        let here = self.groups.get_mut(&id).map(|group| &mut group.replica);
        let replica = match here.filter(|replica| replica.store == store) {
            Some(replica) => replica,
            None => match self.leftovers.get_mut(&(store, id)) {
                Some(leftover) => &mut leftover.replica,
                None => return,
            },
        };
        act(replica, &mut Call { core: &mut self.core, stores, now_ns, out });
    }

    fn with(
        &mut self,
        id: GroupId,
        stores: &dyn Stores,
        now_ns: u64,
        out: &mut Vec<Action>,
        act: impl FnOnce(&mut Group, &mut Call<'_>),
    ) {
        if let Some(group) = self.groups.get_mut(&id) {
            act(group, &mut Call { core: &mut self.core, stores, now_ns, out });
        }
    }
}

#[cfg(test)]
mod tests;
