//! The control plane: leases, plans and the agreement on them, with the real state, lease table, planner and link.
//!
//! Raft is simulated as what it promises: one order of committed commands, a leader at a time, and of what a deposed leader
//! had under way any prefix. A deposed leader that does not know it yet goes on granting leases for as long as its last
//! quorum allows, and the next one may be elected at any time after that quorum: the most that `timing` claims to bear.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use xsan_controlplane::clock::BootTime;
use xsan_controlplane::lease::{Beat, Health, LeaseTable};
use xsan_controlplane::membership::heartbeat::Grant;
use xsan_controlplane::membership::voters;
use xsan_controlplane::placement::Proposal;
use xsan_controlplane::placement::planner::Planner;
use xsan_controlplane::raft::handle::Members;
use xsan_controlplane::state::command::{Command, GroupChange, NewNode, NewVolume, SettingsChange};
use xsan_controlplane::state::{ClusterState, Departure};
use xsan_controlplane::timing::{BEAT_INTERVAL, CONTROLLER_TICK, RaftTiming};
use xsan_protocol::ids::{GroupId, Incarnation, MapVersion, NodeId, Seq, StoreId};
use xsan_protocol::map::{DataProcess, Durability, Member};
use xsan_protocol::proto;

use crate::plan::{MS, US};
use crate::process::Input;
use crate::world::{Event, World};

const RAFT_BEAT: u64 = 100 * MS;
const RETRY: u64 = 200 * MS;

fn timing() -> RaftTiming {
    RaftTiming::new(Duration::from_secs(1))
}

pub struct ControlPlane {
    /// All that is committed.
    pub state: Arc<ClusterState>,
    pub leader: Option<Leader>,
    /// They may not know yet that they do not lead any more.
    former: Vec<Leader>,
    term: u64,
    /// Proposed under the present leader, not committed, in order.
    under_way: Vec<(u64, Command)>,
    next_proposal: u64,
}

pub struct Leader {
    pub host: usize,
    life: u64,
    pub term: u64,
    leases: LeaseTable,
    planner: Planner,
    proposals: Vec<Proposal>,
    /// When a quorum last acknowledged it.
    quorum_at: u64,
    /// Its group changes are on their way into the log.
    committing: Option<u64>,
    /// What it has applied.
    known: Arc<ClusterState>,
}

impl ControlPlane {
    pub fn new() -> Self {
        Self {
            state: Arc::default(),
            leader: None,
            former: Vec::new(),
            term: 0,
            under_way: Vec::new(),
            next_proposal: 0,
        }
    }

    pub fn apply(&mut self, command: &Command) {
        let mut state = (*self.state).clone();
        state.apply(command);
        self.state = Arc::new(state);
        if let Some(leader) = &mut self.leader {
            leader.known = self.state.clone();
        }
    }
}

fn registered(state: &ClusterState, node: NodeId) -> Option<Incarnation> {
    state.map().nodes.get(&node)?.data.as_ref().map(|data| data.incarnation)
}

/// Group, epoch that it was at, members by node (primary *, learner ~) and incarnation.
fn in_short(change: &GroupChange) -> String {
    let member = |member: &Member| {
        let mark = match (change.primary == Some(member.node), member.learner) {
            (true, _) => "*",
            (_, true) => "~",
            _ => "",
        };
        format!("{mark}{}:{}{}", member.node, member.incarnation, if member.damaged { "!" } else { "" })
    };
    let members: Vec<String> = change.members.iter().map(member).collect();
    format!("{}@{} [{}]", change.group, change.expected, members.join(" "))
}

impl World {
    /// The cluster is founded: every node is known, the first leader elected.
    pub fn found(&mut self) {
        for host in 0..self.hosts.len() {
            self.add_to_cluster(host);
        }
        self.set_voters([self.hosts[0].node].into());
        for host in 0..self.hosts.len() {
            self.start_control(host);
        }
        self.elect(0);
        self.reconcile(0);
        self.after(RAFT_BEAT, Event::RaftBeat);
        self.after(1, Event::Plan);
    }

    pub fn add_to_cluster(&mut self, host: usize) {
        let node = self.hosts[host].node;
        self.control.apply(&Command::AddNode(NewNode {
            cluster_id: "sim".to_owned(),
            name: format!("node-{node}"),
            address: "127.0.0.1".parse().expect("an address"),
            control_port: 8080,
            failure_domain: String::new(),
            instance: u64::from(node.0),
            founder: true,
        }));
        assert!(self.control.state.map().nodes.contains_key(&node));
    }

    pub fn create_volume(&mut self) {
        self.control.apply(&Command::CreateVolume(NewVolume {
            name: "v".to_owned(),
            size_bytes: 64 << 30,
            replica_count: self.plan.replica_count,
            policy: String::new(),
            durability: if self.plan.every_write { Durability::EveryWrite } else { Durability::OnFlush },
            created_unix_ms: 0,
            request: 1,
            group_count: self.plan.group_count,
        }));
        assert_eq!(self.control.state.map().volumes.len(), 1);
        let change = SettingsChange {
            demote_slow_nodes: Some(self.plan.demotes),
            down_out_interval: Some(Duration::from_nanos(self.plan.out_ns)),
            ..Default::default()
        };
        self.control.apply(&Command::ChangeSettings(change));
        assert_eq!(self.control.state.settings().down_out_interval.as_nanos(), u128::from(self.plan.out_ns));
        self.spread_state();
    }

    /// The control process of a host begins; what it knew of the cluster is on its disk.
    pub fn start_control(&mut self, host: usize) {
        let state = self.control.state.clone();
        let control = &mut self.hosts[host].control;
        control.alive = true;
        control.life += 1;
        control.link = Default::default();
        if control.known.version() == MapVersion(0) {
            control.known = state;
        }
        let life = control.life;
        self.after(1, Event::Beat { host, life, again: true });
        self.link_up(host);
    }

    /// The data process introduces itself to the control process.
    pub fn link_up(&mut self, host: usize) {
        let now = self.hosts[host].clock(self.now);
        let this = &mut self.hosts[host];
        if !this.control.alive {
            return;
        }
        let Some(process) = &this.process else { return };
        let store = process.driver.stores().next().expect("a data process has its store").status();
        let data = DataProcess {
            incarnation: process.incarnation,
            boot_id: this.boot,
            shard_ports: vec![9100],
            nbd_port: 10809,
            stores: vec![xsan_protocol::map::Store {
                id: this.store,
                capacity_bytes: store.capacity_bytes,
                shard: xsan_protocol::ids::ShardIndex(0),
                device: "sim".to_owned(),
                media: "ssd".to_owned(),
                failed: store.failed,
                failed_before: this.failed_before,
            }],
        };
        let (outbound, _) = tokio::sync::mpsc::channel(1);
        let damaged = this.damaged_stores.clone();
        if this.control.link.on_hello(now, data, damaged, outbound).is_err() {
            let life = this.life;
            return self.after(RETRY, Event::LinkUp { host, life });
        }
        let life = this.life;
        self.after(1, Event::Register { host, life });
        self.after(1, Event::Status { host, life, again: true });
        self.send_map(host);
    }

    /// Has the data process registered with the cluster, until it is.
    pub fn register(&mut self, host: usize, life: u64) {
        let runs = self.hosts[host].control_runs(self.now);
        let Some(process) = self.process_of(host, life) else { return };
        let incarnation = process.incarnation;
        let this = &self.hosts[host];
        if registered(&this.control.known, this.node) == Some(incarnation) {
            this.control.link.on_registered();
            let control_life = this.control.life;
            return self.after(1, Event::Beat { host, life: control_life, again: false });
        }
        if let Some((process, damaged_stores)) = this.control.link.process().filter(|_| runs) {
            let node = this.node;
            let replaces = registered(&this.control.known, node);
            self.propose(host, Command::DataStarted { node, process, damaged_stores, replaces });
        }
        self.after(RETRY, Event::Register { host, life });
    }

    /// The data process tells its status.
    pub fn status(&mut self, host: usize, life: u64, again: bool) {
        let Some(process) = self.process_of(host, life) else { return };
        let paused = self.hosts[host].data_paused_until > self.now;
        let version = process.map.version;
        let failed = process.driver.stores().any(|store| store.status().failed);
        if again {
            self.after(BEAT_INTERVAL.as_nanos() as u64, Event::Status { host, life, again });
        }
        if !paused {
            let wait = 20 * US + self.random.below(100 * US);
            self.after(wait, Event::StatusArrives { host, life, version, failed });
        }
    }

    pub fn on_status(&mut self, host: usize, life: u64, version: MapVersion, failed: bool) {
        if self.process_of(host, life).is_none() || !self.hosts[host].control_runs(self.now) {
            return;
        }
        let this = &self.hosts[host];
        let store = proto::StoreStatus { id: this.store.0, failed, ..Default::default() };
        let status = proto::DataStatus { map_version: version.0, stores: vec![store], ..Default::default() };
        let news = this.control.link.on_status(this.clock(self.now), status);
        let (node, control_life) = (this.node, this.control.life);
        let incarnation = this.process.as_ref().expect("checked above").incarnation;
        for store in news {
            self.propose(host, Command::StoreFailed { node, incarnation, store });
        }
        self.after(1, Event::Beat { host, life: control_life, again: false });
        self.pass_lease_on(host);
    }

    /// Sends a beat to whoever leads, or thinks so.
    pub fn beat(&mut self, host: usize, life: u64, again: bool) {
        let this = &self.hosts[host];
        if this.control.life != life || !this.powered || !this.control.alive {
            return;
        }
        let beat = this.control.link.beat(this.node, this.clock(self.now));
        if again {
            self.after(BEAT_INTERVAL.as_nanos() as u64, Event::Beat { host, life, again });
        }
        let leaders = self.control.leader.iter().chain(&self.control.former);
        let leaders: Vec<(usize, u64)> = leaders.map(|leader| (leader.host, leader.term)).collect();
        for (to, term) in leaders {
            let latency = self.datagram_latency();
            if self.net.hears(host, to) && !self.random.one_in(100) {
                self.after(latency, Event::BeatArrives { from: host, term, beat });
            }
        }
    }

    pub fn on_beat(&mut self, from: usize, term: u64, beat: Beat) {
        let now = self.now;
        let mut leaders = self.control.leader.iter_mut().chain(&mut self.control.former);
        let Some(leader) = leaders.find(|leader| leader.term == term) else { return };
        let host = &self.hosts[leader.host];
        if host.control.life != leader.life || !host.control_runs(now) {
            return;
        }
        let to = leader.host;
        let clock = host.clock(now);
        let registered = registered(&leader.known, beat.node);
        let may_grant = now - leader.quorum_at < timing().quorum_ack_age_max().as_nanos() as u64;
        let before = leader.leases.health(clock, beat.node, registered);
        let length = leader.leases.on_beat(clock, &beat, registered, may_grant);
        let changed = before != leader.leases.health(clock, beat.node, registered);
        let version = leader.known.version();
        if changed {
            self.after(1, Event::PlanNow);
        }
        if let Some(incarnation) = beat.incarnation
            && let Some(length) = length
            && self.net.hears(to, from)
            && !self.random.one_in(100)
        {
            let latency = self.datagram_latency() + self.plan.grant_ns;
            self.after(
                latency,
                Event::Grant { host: from, grant: Grant::answer(&beat, incarnation, length, version) },
            );
        }
    }

    pub fn on_grant(&mut self, host: usize, grant: &Grant) {
        if !self.hosts[host].control_runs(self.now) {
            return;
        }
        let this = &self.hosts[host];
        this.control.link.on_grant(this.clock(self.now), grant);
        self.pass_lease_on(host);
    }

    fn pass_lease_on(&mut self, host: usize) {
        let until = *self.hosts[host].control.link.watch_lease().borrow();
        if let Some(BootTime(until)) = until {
            let life = self.hosts[host].life;
            let wait = 10 * US + self.random.below(100 * US);
            self.after(wait, Event::Lease { host, life, until });
        }
    }

    /// Can this host, as a leader, reach a quorum?
    fn reaches_quorum(&self, host: usize) -> bool {
        let voters = self.voters();
        voters.contains(&self.hosts[host].node) && self.reaches_most(host, &voters)
    }

    fn reaches_most(&self, host: usize, voters: &BTreeSet<NodeId>) -> bool {
        let reached = voters.iter().filter(|voter| self.is_reached(host, voter.0 as usize - 1));
        reached.count() * 2 > voters.len()
    }

    /// Do the control processes of these two hosts run, and hear each other?
    fn is_reached(&self, host: usize, other: usize) -> bool {
        let runs = |host: usize| self.hosts[host].control_runs(self.now);
        runs(host) && runs(other) && (host == other || self.net.meets(host, other))
    }

    fn voters(&self) -> BTreeSet<NodeId> {
        self.control.state.map().nodes.values().filter(|node| node.voter).map(|node| node.id).collect()
    }

    /// The leader keeps the voters in line with the nodes, a step at a time, and takes out who was asked to leave and holds nothing any
    /// more: as `voters::reconcile` does, but that a change of the voters is agreed on at once.
    fn reconcile(&mut self, leader: usize) {
        let ids = |nodes: &BTreeSet<NodeId>| nodes.iter().map(|node| u64::from(node.0)).collect();
        let (voters, retiring) = (self.voters(), voters::retiring(&self.control.state));
        let caught_up = self.present().filter(|host| self.is_reached(leader, *host));
        let caught_up = caught_up.map(|host| self.hosts[host].node).collect();
        let members = Members { voters: ids(&voters), caught_up: ids(&caught_up), ..Members::default() };
        let wanted = voters::wanted(&members, u64::from(self.hosts[leader].node.0), &ids(&retiring));
        let wanted: BTreeSet<NodeId> = wanted.into_iter().map(|id| NodeId(id as u32)).collect();
        if wanted != voters {
            if self.reaches_most(leader, &wanted) {
                self.log(|| format!("{wanted:?} vote"));
                self.set_voters(wanted);
            }
            return;
        }
        for node in retiring.difference(&voters).copied() {
            let asked = |(_, command): &(u64, Command)| *command == Command::RemoveNode { node };
            // Guests have moved elsewhere before.
            if !self.workload.uses(node.0 as usize - 1) && !self.control.under_way.iter().any(asked) {
                let term = self.control.term;
                self.on_propose(term, Command::RemoveNode { node });
            }
        }
    }

    fn set_voters(&mut self, voters: BTreeSet<NodeId>) {
        let mut state = (*self.control.state).clone();
        state.set_voters(voters);
        self.control.state = Arc::new(state);
    }

    /// Has the leader no doubt that this node's lease has ended?
    pub fn is_gone(&mut self, node: NodeId) -> bool {
        let Some(leader) = &mut self.control.leader else { return false };
        let clock = self.hosts[leader.host].clock(self.now);
        leader.leases.health(clock, node, registered(&leader.known, node)) == Health::Gone
    }

    /// A node that hears of its removal from the leader stops, and its supervisor starts it no more.
    fn end_removed(&mut self, leader: usize) {
        for host in 0..self.hosts.len() {
            let removed = !self.hosts[host].gone && self.control.state.was_removed(self.hosts[host].node);
            if removed && self.is_reached(leader, host) {
                self.log(|| format!("host {host} is removed"));
                self.count("node removed");
                self.hosts[host].gone = true;
                self.kill_control(host);
                self.kill_data(host);
            }
        }
    }

    pub fn raft_beat(&mut self) {
        self.after(RAFT_BEAT, Event::RaftBeat);
        let leads = self.control.leader.as_ref().map(|leader| (leader.host, leader.life));
        let well = leads
            .is_some_and(|(host, life)| self.hosts[host].control.life == life && self.reaches_quorum(host));
        if well {
            let leader = self.control.leader.as_mut().expect("it is there");
            leader.quorum_at = self.now;
            let host = leader.host;
            self.reconcile(host);
            self.end_removed(host);
            self.spread_state();
        } else if self.random.one_in(4) {
            // An election ends, if anybody can win one.
            let able: Vec<usize> = (0..self.hosts.len()).filter(|host| self.reaches_quorum(*host)).collect();
            if let Some(&host) = self.random.pick(&able) {
                self.elect(host);
            }
        }
        // The leader may change without a fault, too.
        if well && self.random.one_in(300) && self.quiet_until <= self.now {
            let able: Vec<usize> = (0..self.hosts.len()).filter(|host| self.reaches_quorum(*host)).collect();
            if let Some(&host) = self.random.pick(&able) {
                self.elect(host);
            }
        }
    }

    fn elect(&mut self, host: usize) {
        if let Some(old) = self.control.leader.take() {
            // Of what it had proposed, in order, any part may be in the new leader's log.
            let under_way = std::mem::take(&mut self.control.under_way);
            let kept = self.random.index(under_way.len() + 1);
            for (_, command) in under_way.into_iter().take(kept) {
                self.apply(&command);
            }
            self.control.former.push(old);
            if self.control.former.len() > 3 {
                self.control.former.remove(0);
            }
        }
        self.control.term += 1;
        let (term, state) = (self.control.term, self.control.state.clone());
        let clock = self.hosts[host].clock(self.now);
        self.log(|| format!("host {host} is elected in term {term}"));
        self.hosts[host].control.known = state.clone();
        self.control.leader = Some(Leader {
            host,
            life: self.hosts[host].control.life,
            term,
            leases: LeaseTable::new(clock, timing().leader_grace()),
            planner: Planner::default(),
            proposals: Vec::new(),
            quorum_at: self.now,
            committing: None,
            known: state,
        });
        self.spread_state();
    }

    /// Is it agreed, or only `decided`, that others lead the groups of a host?
    pub fn is_replaced(&self, host: usize, decided: bool) -> bool {
        let node = self.hosts[host].node;
        let groups = &self.control.state.map().groups;
        let leads = |group: &GroupId| groups.get(group).is_some_and(|group| group.primary == Some(node));
        let on_its_way = |command: &Command| match command {
            Command::ReconfigureGroups(changes) => changes
                .iter()
                .any(|change| !change.settle && change.primary != Some(node) && leads(&change.group)),
            _ => false,
        };
        let soon = decided && self.control.under_way.iter().any(|(_, command)| on_its_way(command));
        soon || !groups.keys().any(leads)
    }

    /// A command from the control process of `host`, for the leader: lost when it can not be reached.
    pub fn propose(&mut self, host: usize, command: Command) {
        let Some((leader, term)) = self.control.leader.as_ref().map(|leader| (leader.host, leader.term))
        else {
            return;
        };
        if !self.net.meets(host, leader) {
            return;
        }
        let latency = self.latency();
        self.log(|| format!("host {host} proposes: {command}"));
        self.after(latency, Event::Propose { term, command: Box::new(command) });
    }

    /// The leader appends a command to its log; it is committed when a quorum has it.
    pub fn on_propose(&mut self, term: u64, command: Command) {
        let Some(leader) = self.control.leader.as_ref().filter(|leader| leader.term == term) else { return };
        if !self.hosts[leader.host].control_runs(self.now) {
            return;
        }
        self.control.next_proposal += 1;
        let number = self.control.next_proposal;
        self.control.under_way.push((number, command));
        self.commit_later(term, number);
    }

    fn commit_later(&mut self, term: u64, number: u64) {
        let wait = 200 * US + self.random.below(4 * MS);
        let wait = if self.random.one_in(30) { wait + self.random.below(300 * MS) } else { wait };
        let slow = if self.plan.commit_ns > 0 { self.random.below(self.plan.commit_ns) } else { 0 };
        self.after(wait + slow, Event::Commit { term, number });
    }

    pub fn on_commit(&mut self, term: u64, number: u64) {
        let Some(leader) = self.control.leader.as_ref().filter(|leader| leader.term == term) else { return };
        let host = leader.host;
        if !self.reaches_quorum(host) {
            return self.after(50 * MS, Event::Commit { term, number });
        }
        // A log commits in order: everything before it, too.
        let before = self.control.under_way.iter().take_while(|(other, _)| *other <= number).count();
        let committed: Vec<_> = self.control.under_way.drain(..before).collect();
        for (other, command) in committed {
            self.log(|| format!("committed: {command}"));
            self.apply(&command);
            if let Some(leader) = &mut self.control.leader
                && leader.committing == Some(other)
            {
                leader.leases.release();
                leader.committing = None;
            }
        }
        self.hosts[host].control.known = self.control.state.clone();
        self.spread_state();
        self.after(1, Event::PlanNow);
    }

    fn apply(&mut self, command: &Command) {
        let before = self.control.state.clone();
        self.control.apply(command);
        let now = self.control.state.clone();
        match command {
            Command::ReconfigureGroups(changes) => {
                let settles = changes.iter().filter(|change| change.settle);
                settles.for_each(|change| self.check_settled(change.group));
            }
            Command::SetMaintenance { node, .. }
                if before.is_in_maintenance(*node) && !now.is_in_maintenance(*node) =>
            {
                self.count("maintenance ended");
            }
            Command::LeaveNode { node, departure: Departure::Stays }
                if before.departure(*node) != now.departure(*node) =>
            {
                self.count("removal taken back");
            }
            _ => {}
        }
    }

    /// Once an epoch is settled, each of its acting members alone has all that was acknowledged.
    fn check_settled(&mut self, id: GroupId) {
        let Some(group) = self.control.state.map().groups.get(&id).filter(|group| group.is_settled()) else {
            return;
        };
        let acknowledged = self.acknowledged.get(&id).copied().unwrap_or_default();
        let lacks = group.acting().find_map(|member| {
            let process = self.hosts[member.node.0 as usize - 1].process.as_ref()?;
            let durable = process.driver.replication.journal(id).map_or(Seq(0), |(_, durable)| durable);
            let same = process.incarnation == member.incarnation;
            (same && durable < acknowledged).then_some((member.node, durable))
        });
        if let Some((node, durable)) = lacks {
            let epoch = group.epoch;
            self.ledger.violation.get_or_insert_with(|| {
                format!("epoch {epoch} of group {id} is settled: {acknowledged} is acknowledged, node {node} has {durable}")
            });
        }
    }

    /// Sends the present state to every host that the leader reaches.
    pub fn spread_state(&mut self) {
        let Some(leader) = self.control.leader.as_ref().map(|leader| leader.host) else { return };
        for host in 0..self.hosts.len() {
            let latency = self.datagram_latency();
            let lacks = self.hosts[host].control.known.version() < self.control.state.version();
            if (lacks || host == leader) && self.net.meets(leader, host) {
                let state = self.control.state.clone();
                self.after(latency, Event::StateArrives { host, state });
            }
        }
    }

    pub fn on_state(&mut self, host: usize, state: Arc<ClusterState>) {
        if !self.hosts[host].control_runs(self.now) {
            return;
        }
        let known = &mut self.hosts[host].control.known;
        if known.version() < state.version() {
            *known = state;
        }
        self.send_map(host);
    }

    /// Tells the data process the newest map that its host knows.
    fn send_map(&mut self, host: usize) {
        let state = &self.hosts[host].control.known;
        let Some(process) = &self.hosts[host].process else { return };
        if process.map.version < state.version() && self.hosts[host].control.alive {
            let map = Arc::new(state.map().clone());
            let life = self.hosts[host].life;
            let wait = 20 * US + self.random.below(200 * US);
            self.after(wait, Event::Map { host, life, map });
        }
    }

    pub fn on_map_sent(&mut self, host: usize, life: u64, map: Arc<xsan_protocol::map::ClusterMap>) {
        if self.process_of(host, life).is_some() {
            self.input(host, Input::Map(map));
        }
    }

    /// A primary's wish reaches the leader.
    pub fn on_proposal(&mut self, host: usize, proposal: Proposal) {
        let Some(leader) = &mut self.control.leader else { return };
        if self.net.meets(host, leader.host) && self.hosts[host].control_runs(self.now) {
            leader.proposals.push(proposal);
            self.after(1, Event::PlanNow);
        }
    }

    pub fn plan(&mut self, again: bool) {
        if again {
            self.after(CONTROLLER_TICK.as_nanos() as u64, Event::Plan);
        }
        let now = self.now;
        let Some(leader) = &mut self.control.leader else { return };
        let host = &self.hosts[leader.host];
        let may_decide = now - leader.quorum_at < timing().quorum_ack_age_max().as_nanos() as u64;
        if !host.control_runs(now)
            || host.control.life != leader.life
            || leader.committing.is_some()
            || !may_decide
        {
            return;
        }
        let proposals = std::mem::take(&mut leader.proposals);
        let slow =
            self.hosts.iter().filter(|host| host.found_slow_until > now).map(|host| host.node).collect();
        let (clock, known) = (host.clock(now), &leader.known);
        let changes = leader.planner.plan(clock, known, &mut leader.leases, &proposals, &slow);
        let (term, out) = (leader.term, leader.planner.out().clone());
        for host in 0..self.hosts.len() {
            let is_out = out.contains(&self.hosts[host].node);
            if is_out && !self.hosts[host].out {
                self.log(|| format!("host {host} is left out"));
                self.count("host left out");
            }
            self.hosts[host].out = is_out;
        }
        if changes.is_empty() {
            return;
        }
        self.control.next_proposal += 1;
        let number = self.control.next_proposal;
        self.control.leader.as_mut().expect("it leads").committing = Some(number);
        self.log(|| format!("plan: {}", changes.iter().map(in_short).collect::<Vec<_>>().join(", ")));
        self.control.under_way.push((number, Command::ReconfigureGroups(changes)));
        self.commit_later(term, number);
    }

    /// The data process has died; its control process notices.
    pub fn on_death(&mut self, host: usize, incarnation: Incarnation) {
        let this = &self.hosts[host];
        if this.control_runs(self.now) {
            this.control.link.on_death(incarnation);
            let life = this.control.life;
            self.after(1, Event::Beat { host, life, again: false });
        }
    }

    /// A store that was replaced by an empty one has a number of its own.
    pub fn new_store_id(&mut self) -> StoreId {
        self.next_store += 1;
        StoreId(self.next_store)
    }
}
