//! What the Raft leader does besides Raft: grants leases, and has the groups follow what becomes of the nodes.
//!
//! Runs on every node, and acts on the one that leads. `Leader` is shared with `membership::heartbeat`;
//! `Controller` is the loop that runs `placement::planner` and commits its changes, one batch a moment.
//!
//! Invariants
//! - One lease table per term: a leader of a new term starts with nothing but the grace time.
//! - A batch is decided, and the nodes that it takes for gone are held, under one lock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto;

use crate::clock::{BootTime, unix_ms};
use crate::events::{EventLog, Observer};
use crate::lease::{Beat, Health, LeaseTable};
use crate::membership::heartbeat::Grant;
use crate::membership::voters;
use crate::placement::Proposal;
use crate::placement::planner::Planner;
use crate::placement::slow::SlowNodes;
use crate::raft::handle::RaftHandle;
use crate::state::command::{Command, GroupChange, Reply};
use crate::timing::{BEAT_AGE_MAX, CONTROLLER_TICK};

/// Between two looks at Raft's membership.
const VOTERS_INTERVAL: Duration = Duration::from_millis(250);
/// After an election: until a quorum has acknowledged the leader and its state is applied.
const ELECTED_POLL: Duration = Duration::from_millis(5);
/// Wishes of primaries that wait for the next decision; more are dropped, they are made again.
const PROPOSALS_MAX: usize = 4096;

/// The leader's view of the nodes; empty on the others but for the latest beats.
pub struct Leader {
    handle: RaftHandle,
    inner: Mutex<Inner>,
    wake: Notify,
    elected: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    /// The term that this node leads, with its leases.
    term: Option<(u64, LeaseTable)>,
    /// Of every node, whoever leads: so that a new leader can answer them at once.
    latest: BTreeMap<NodeId, (Beat, SocketAddr, BootTime)>,
    proposals: Vec<Proposal>,
    slow: SlowNodes,
    /// Nodes that nobody waits for any more, by the last plan.
    out: BTreeSet<NodeId>,
    events: EventLog,
}

impl Inner {
    /// The lease table of this node's present term as leader. The grace time counts from here, after the election, and
    /// not from when what is acted on arrived.
    fn leases(&mut self, term: u64, grace: Duration) -> &mut LeaseTable {
        if self.term.as_ref().is_none_or(|(present, _)| *present != term) {
            self.term = None;
        }
        &mut self.term.get_or_insert_with(|| (term, LeaseTable::new(BootTime::now(), grace))).1
    }
}

impl Leader {
    /// `events`: what this node has seen before.
    pub fn new(handle: RaftHandle, events: EventLog) -> Self {
        let (elected, _) = watch::channel(0);
        let inner = Mutex::new(Inner { events, ..Inner::default() });
        Self { handle, inner, wake: Notify::new(), elected }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does this node lead, and know that `node` was removed from the cluster?
    pub fn has_removed(&self, node: NodeId) -> bool {
        let leads = self.handle.leadership().is_some_and(|leadership| leadership.may_grant);
        leads && self.handle.state().was_removed(node)
    }

    /// A beat arrived. Returns the lease to answer with, if this node leads and may grant one.
    pub fn on_beat(&self, now: BootTime, beat: Beat, from: SocketAddr) -> Option<Grant> {
        let known = self.handle.state().map().nodes.contains_key(&beat.node);
        let mut inner = self.lock();
        if known {
            inner.latest.insert(beat.node, (beat, from, now));
        }
        self.take(&mut inner, now, &beat)
    }

    fn take(&self, inner: &mut Inner, now: BootTime, beat: &Beat) -> Option<Grant> {
        let leadership = self.handle.leadership()?;
        // Read after the leadership: it includes all that was committed before this term.
        let state = self.handle.state();
        let registered = state.registered(beat.node);
        let grace = self.handle.timing().leader_grace();
        let leases = inner.leases(leadership.term, grace);
        let before = leases.health(now, beat.node, registered);
        let length = leases.on_beat(now, beat, registered, leadership.may_grant);
        if before != leases.health(now, beat.node, registered) {
            self.wake.notify_one();
        }
        Some(Grant::answer(beat, beat.incarnation?, length?, state.version()))
    }

    /// Grants for the latest beats, as if they had just arrived.
    pub fn grant_latest(&self, now: BootTime) -> Vec<(Grant, SocketAddr)> {
        let mut inner = self.lock();
        let fresh = |(_, _, heard): &&(Beat, SocketAddr, BootTime)| now.since(*heard) < BEAT_AGE_MAX;
        let latest: Vec<_> = inner.latest.values().filter(fresh).copied().collect();
        let grant = |(beat, from, _): (Beat, SocketAddr, BootTime)| {
            self.take(&mut inner, now, &beat).map(|grant| (grant, from))
        };
        latest.into_iter().filter_map(grant).collect()
    }

    /// Changes each time this node has been elected and may grant leases.
    pub fn watch_elected(&self) -> watch::Receiver<u64> {
        self.elected.subscribe()
    }

    /// Wishes of primaries, from any node.
    pub fn on_proposals(&self, proposals: impl IntoIterator<Item = Proposal>) {
        let mut inner = self.lock();
        let room = PROPOSALS_MAX.saturating_sub(inner.proposals.len());
        inner.proposals.extend(proposals.into_iter().take(room));
        self.wake.notify_one();
    }

    /// A node's data process finds others far slower than their peers, or itself.
    pub fn on_slow_report(&self, now: BootTime, witness: NodeId, nodes: impl IntoIterator<Item = NodeId>) {
        let state = self.handle.state();
        let known = |node: &NodeId| state.map().nodes.contains_key(node);
        if known(&witness) {
            self.lock().slow.on_report(now, witness, nodes.into_iter().filter(known));
        }
    }

    /// The nodes as this leader sees them, for the API; empty when it does not lead, or leads nobody: Raft alone never finds that out.
    pub fn health(&self, now: BootTime) -> Vec<proto::NodeHealth> {
        let state = self.handle.state();
        let inner = self.lock();
        let leads = self.handle.leadership().is_some_and(|leadership| leadership.may_grant);
        let Some((_, leases)) = inner.term.as_ref().filter(|_| leads) else {
            return Vec::new();
        };
        let health = |node: &NodeId| {
            let latest = inner.latest.get(node);
            let age = latest.map(|(_, _, heard)| now.since(*heard));
            let heard = age.is_some_and(|age| age < BEAT_AGE_MAX);
            let registered = state.registered(*node);
            proto::NodeHealth {
                node: node.0,
                up: match leases.health(now, *node, registered) {
                    Health::Up => true,
                    // Just elected: it has a lease of the leader before, or is about to get one.
                    Health::Assumed => {
                        heard
                            && registered.is_some()
                            && latest.is_some_and(|(beat, ..)| beat.incarnation == registered)
                    }
                    Health::Gone => false,
                },
                heard,
                heartbeat_age_ms: age.map(|age| age.as_millis() as u64),
                out: inner.out.contains(node),
            }
        };
        state.map().nodes.keys().map(health).collect()
    }

    /// What this node saw happen while it led, oldest first.
    pub fn events(&self) -> Vec<proto::Event> {
        self.lock().events.list()
    }

    /// See `EventLog::take_unsaved`.
    pub fn unsaved_events(&self, summaries: bool) -> Option<Vec<proto::Event>> {
        self.lock().events.take_unsaved(summaries)
    }

    /// See `EventLog::not_saved`.
    pub fn events_not_saved(&self) {
        self.lock().events.not_saved();
    }

    /// Announces elections to `watch_elected`. Runs for ever.
    pub async fn watch_elections(&self) {
        let mut role = self.handle.watch_role();
        let mut announced = 0;
        loop {
            match self.handle.leadership() {
                Some(leadership) if leadership.term == announced => self.handle.role_changed(&mut role).await,
                Some(leadership) if leadership.may_grant => {
                    announced = leadership.term;
                    tracing::info!(term = announced, "this node leads");
                    self.elected.send_replace(announced);
                    self.wake.notify_one();
                }
                Some(leadership) => {
                    // The grace time counts from here, not from the first beat.
                    self.lock().leases(leadership.term, self.handle.timing().leader_grace());
                    tokio::time::sleep(ELECTED_POLL).await;
                }
                None => self.handle.role_changed(&mut role).await,
            }
        }
    }
}

/// The loop, and what it remembers within one term.
pub struct Controller {
    handle: RaftHandle,
    leader: Arc<Leader>,
    term: u64,
    planner: Planner,
    observer: Observer,
}

impl Controller {
    pub fn new(handle: RaftHandle, leader: Arc<Leader>) -> Self {
        Self { handle, leader, term: 0, planner: Planner::default(), observer: Observer::default() }
    }

    /// Decides whenever something changed, and at every tick. Runs for ever.
    pub async fn run(mut self) {
        let mut ticks = tokio::time::interval(CONTROLLER_TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut state = self.handle.watch_state();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.leader.wake.notified() => {}
                changed = state.changed() => if changed.is_err() { return },
            }
            let Some(leadership) = self.handle.leadership().filter(|leadership| leadership.may_grant) else {
                continue;
            };
            if leadership.term != self.term {
                self.term = leadership.term;
                self.planner = Planner::default();
                self.observer = Observer::default();
                self.elected();
            }
            let changes = self.plan(BootTime::now());
            if !changes.is_empty() {
                self.commit(changes).await;
            }
            self.detach_from_the_dead().await;
        }
    }

    fn elected(&self) {
        let state = self.handle.state();
        let own = self.handle.node();
        let name = state.map().nodes.get(&own).map_or_else(|| own.to_string(), |node| node.name.clone());
        let message = format!("node {name} leads in term {}", self.term);
        self.leader.lock().events.add(unix_ms(), "leader-elected", format!("node {name}"), message);
    }

    fn plan(&mut self, now: BootTime) -> Vec<GroupChange> {
        let state = self.handle.state();
        let mut inner = self.leader.lock();
        let proposals = std::mem::take(&mut inner.proposals);
        let mut events = std::mem::take(&mut inner.events);
        let slow = inner.slow.at(now);
        let leases = inner.leases(self.term, self.handle.timing().leader_grace());
        let health = |node| leases.health(now, node, state.registered(node));
        self.observer.look(unix_ms(), &state, health, &slow, &mut events);
        let changes = self.planner.plan(now, &state, leases, &proposals, &slow);
        (inner.events, inner.out) = (events, self.planner.out().clone());
        changes
    }

    async fn commit(&self, changes: Vec<GroupChange>) {
        let count = changes.len();
        let reply = self.handle.propose_until(self.term, Command::ReconfigureGroups(changes)).await;
        match reply {
            Ok(reply) => {
                tracing::debug!(count, ?reply, "groups reconfigured");
                if let Reply::Groups { changed, .. } = reply {
                    self.leader.lock().events.reconfigured(unix_ms(), u64::from(changed));
                }
            }
            Err(error) => tracing::warn!(count, code = error.code().number(), "group changes: {error}"),
        }
        // Held until the outcome is known: applied, or this node leads no more in that term.
        let mut inner = self.leader.lock();
        if let Some((term, leases)) = &mut inner.term
            && *term == self.term
        {
            leases.release();
        }
    }

    /// Volumes are attached no more at nodes that nobody waits for: nobody could delete them, and no such node would be removed.
    /// One that comes back in the same life attaches what it has open again. One at a time: its commit is a new state, which comes
    /// back here after the next look at what is more urgent.
    async fn detach_from_the_dead(&self) {
        let state = self.handle.state();
        for volume in state.map().volumes.values() {
            for &node in volume.attached_nodes.iter().filter(|node| self.planner.out().contains(node)) {
                let Some(incarnation) = state.registered(node) else { continue };
                let command = Command::Detach { volume: volume.id, node, incarnation };
                return match self.handle.propose_until(self.term, command).await {
                    Ok(_) => {
                        tracing::info!(%node, volume = %volume.name, "the node is gone: the volume is attached there no more");
                    }
                    Err(error) => {
                        let code = error.code().number();
                        tracing::warn!(code, %node, volume = %volume.name, "still shown as attached: {error}");
                    }
                };
            }
        }
    }

    /// Keeps Raft's membership in line with the nodes, while this node leads. Runs for ever.
    pub async fn watch_voters(handle: RaftHandle) {
        loop {
            tokio::time::sleep(VOTERS_INTERVAL).await;
            if handle.leadership().is_some_and(|leadership| leadership.may_grant)
                && let Err(error) = voters::reconcile(&handle).await
            {
                tracing::debug!(code = error.code().number(), "voters: {error}");
            }
        }
    }
}
