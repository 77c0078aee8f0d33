//! The world: hosts, network and control plane, and the queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use xsan_controlplane::lease::Beat;
use xsan_controlplane::membership::heartbeat::Grant;
use xsan_controlplane::placement::Proposal;
use xsan_controlplane::state::ClusterState;
use xsan_controlplane::state::command::Command;
use xsan_dataplane::store::StoreStatus;
use xsan_dataplane::testing::Random;
use xsan_protocol::ids::{BootId, GroupId, Incarnation, MapVersion, Seq};
use xsan_protocol::map::{ClusterMap, Group};

use crate::Summary;
use crate::check::Ledger;
use crate::control::ControlPlane;
use crate::faults::{FAULTS, FAULTS_RARE};
use crate::host::{Host, SLOW_FACTOR};
use crate::memory::Memory;
use crate::network::{ConnectionId, Network};
use crate::plan::{MS, Plan, SECOND, Strike, US};
use crate::process::Input;
use crate::workload::Workload;

pub const TICK: u64 = 20 * MS;
/// Lines of the log that are kept.
const LOG_MAX: usize = 4000;
/// How long it may take until the moment to strike.
const STRIKE_WAIT: u64 = SECOND;
/// And for one member to act alone.
const ALONE_WAIT: u64 = 3 * SECOND;
/// For a cluster without faults to be whole and quiet.
pub const SETTLE_MAX: u64 = 120 * SECOND;
/// A run that is not over after so many events goes round in circles.
const EVENTS_MAX: u64 = 20_000_000;

/// What happens at some moment. A `life` or `term` that has passed makes it void.
pub enum Event {
    Turn { host: usize, life: u64 },
    Tick { host: usize, life: u64 },
    Disk { host: usize, life: u64, number: u64 },
    Dial { host: usize, life: u64, peer: usize, wait: u64 },
    Hello { connection: ConnectionId },
    Welcome { connection: ConnectionId },
    Deliver { connection: ConnectionId, side: usize },
    Closed { connection: ConnectionId, end: usize, since: u64 },
    Silence { from: usize, to: usize, since: u64 },
    LinkUp { host: usize, life: u64 },
    Register { host: usize, life: u64 },
    Status { host: usize, life: u64, again: bool },
    StatusArrives { host: usize, life: u64, version: MapVersion, failed: bool },
    Beat { host: usize, life: u64, again: bool },
    BeatArrives { from: usize, term: u64, beat: Beat },
    Grant { host: usize, grant: Grant },
    Lease { host: usize, life: u64, until: u64 },
    Map { host: usize, life: u64, map: Arc<ClusterMap> },
    StateArrives { host: usize, state: Arc<ClusterState> },
    RaftBeat,
    Plan,
    PlanNow,
    Proposal { host: usize, proposal: Proposal },
    Propose { term: u64, command: Box<Command> },
    Commit { term: u64, number: u64 },
    Death { host: usize, incarnation: Incarnation },
    StartData { host: usize, life: u64 },
    StartControl { host: usize, life: u64 },
    PowerOn { host: usize, boot: BootId },
    Takeover { host: usize, cut: bool, until: u64 },
    Newcomer { host: usize, until: u64 },
    NewcomerDies { host: usize, life: u64 },
    GiveUp { host: usize },
    EndMaintenance,
    Client { client: usize },
    Retry { operation: u64 },
    Fault,
}

struct Scheduled {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

pub struct World {
    pub plan: Plan,
    pub random: Random,
    /// True time, in nanoseconds.
    pub now: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    pub memory: Memory,
    pub hosts: Vec<Host>,
    pub net: Network,
    pub control: ControlPlane,
    pub workload: Workload,
    pub ledger: Ledger,
    /// What was acknowledged in each group when a client was last answered, since all hosts lost their power.
    pub acknowledged: BTreeMap<GroupId, Seq>,
    /// Without faults until then.
    pub quiet_until: u64,
    /// When the faults of this part ended; `u64::MAX` while they go on.
    pub faults_end: u64,
    /// What went wrong, by kind, and how often.
    faults: BTreeMap<&'static str, u64>,
    pub events: u64,
    pub next_store: u64,
    pub next_incarnation: u64,
    pub next_operation: u64,
    log: VecDeque<String>,
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let mut random = Random::new(plan.seed ^ 0x5851_f42d_4c95_7f2d);
        let memory = Memory::of_thread();
        let host = |index| Host::new(index, &plan, memory.pools[index], &mut random);
        let hosts = (0..plan.nodes).map(host).collect();
        Self {
            random,
            now: 0,
            queue: BinaryHeap::new(),
            scheduled: 0,
            memory,
            hosts,
            net: Network::default(),
            control: ControlPlane::new(),
            workload: Workload::new(&plan),
            ledger: Ledger::default(),
            acknowledged: BTreeMap::new(),
            quiet_until: u64::MAX,
            faults_end: 0,
            faults: BTreeMap::new(),
            events: 0,
            next_store: 1000,
            next_incarnation: 0,
            next_operation: 0,
            log: VecDeque::new(),
            plan,
        }
    }

    pub fn add_host(&mut self) -> usize {
        let index = self.hosts.len();
        let host = Host::new(index, &self.plan, self.memory.pools[index], &mut self.random);
        self.hosts.push(host);
        index
    }

    /// The hosts that are members of the cluster.
    pub fn present(&self) -> impl Iterator<Item = usize> {
        let state = &self.control.state;
        (0..self.hosts.len())
            .filter(|host| !self.hosts[*host].gone && !state.was_removed(self.hosts[*host].node))
    }

    /// One that clients use: they leave one that is to be removed.
    pub fn some_host(&mut self) -> usize {
        let able: Vec<usize> = self.present().filter(|host| !self.leaves(*host)).collect();
        *self.random.pick(&able).expect("the last node is never removed")
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.scheduled += 1;
        self.queue.push(Reverse(Scheduled { at: at.max(self.now), number: self.scheduled, event }));
    }

    pub fn after(&mut self, wait: u64, event: Event) {
        self.at(self.now + wait, event);
    }

    /// Notes what happens, for those who look for the cause of a violation.
    pub fn log(&mut self, line: impl FnOnce() -> String) {
        if self.log.len() == LOG_MAX {
            self.log.pop_front();
        }
        let line = line();
        self.log.push_back(format!("{:>14.6} ms  {line}", self.now as f64 / MS as f64));
    }

    /// Something goes wrong, of this kind.
    pub fn count(&mut self, fault: &'static str) {
        assert!(FAULTS.contains(&fault) || FAULTS_RARE.contains(&fault), "{fault} is not listed");
        *self.faults.entry(fault).or_default() += 1;
    }

    pub fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log).into()
    }

    pub fn summary(&self) -> Summary {
        Summary {
            answered: self.ledger.answered,
            failed: self.ledger.failed,
            faults: self.faults.clone(),
            ended: self.workload.ended.clone(),
            events: self.events,
            virtual_ns: self.now,
            longest_ns: self.ledger.longest_ns,
        }
    }

    /// The whole run: parts with faults, between them a blackout, at the end a look at everything.
    pub fn run(&mut self) -> Result<(), String> {
        self.found();
        for host in 0..self.hosts.len() {
            self.format(host);
            self.start_data(host);
        }
        self.run_until(SETTLE_MAX, |world| world.all_registered())?;
        self.create_volume();
        self.run_until(SETTLE_MAX, Self::is_quiet)?;
        self.start_clients();
        self.after(1, Event::Fault);
        for part in 1..=self.plan.parts {
            (self.quiet_until, self.faults_end) = (0, u64::MAX);
            self.workload.running = true;
            let end = self.now + self.plan.part_ns;
            self.run_for(end)?;
            if part < self.plan.parts {
                self.wait_to_strike()?;
                self.blackout();
            }
            self.settle()?;
            self.read_everything()?;
            self.check_checksums()?;
        }
        self.check_destage()?;
        self.write_everything()?;
        self.check_destage()?;
        self.check_scrubs()?;
        self.read_everything()?;
        self.ledger.check()?;
        self.check_buffers()?;
        self.check_replicas()
    }

    /// The faults end, and everything must come to rest.
    fn settle(&mut self) -> Result<(), String> {
        self.log(|| "all faults end".to_owned());
        (self.quiet_until, self.faults_end) = (u64::MAX, self.now);
        self.workload.running = false;
        self.end_faults();
        if self.plan.is_full() {
            // A learner may find no room: the operator frees some.
            self.free(2);
        }
        self.run_until(SETTLE_MAX, Self::is_quiet)
    }

    pub fn run_for(&mut self, end: u64) -> Result<(), String> {
        while self.now < end {
            self.step()?;
        }
        Ok(())
    }

    /// Runs to the moment at which all hosts are to go down, if it comes soon.
    fn wait_to_strike(&mut self) -> Result<(), String> {
        let strike = self.plan.strike;
        if strike == Strike::WhenAlone {
            return self.wait_until_alone();
        }
        let fullest = (0..self.hosts.len())
            .max_by_key(|host| self.store_status(*host, |status| status.journal_used_bytes));
        let fullest = fullest.expect("there are hosts");
        let count = |world: &Self| match strike {
            Strike::AnyTime | Strike::WhenAlone => 0,
            Strike::AtPromise => world.ledger.stable,
            Strike::AtDestage => {
                let copied = |host| world.store_status(host, |status| status.counters.written_capacity_bytes);
                (0..world.hosts.len()).map(copied).sum()
            }
            Strike::AtCheckpoint => {
                world.store_status(fullest, |status| status.counters.written_checkpoint_bytes)
            }
        };
        // What is idle is destaged.
        self.workload.running = strike != Strike::AtDestage || self.random.one_in(2);
        let (before, limit) = (count(self), self.now + STRIKE_WAIT);
        while strike != Strike::AnyTime && count(self) == before && self.now < limit {
            self.step()?;
        }
        if count(self) != before {
            self.count(strike.name());
        }
        let capacity_ns = self.plan.device_ns * self.plan.capacity_factor;
        let most = match strike {
            Strike::AnyTime | Strike::AtPromise | Strike::WhenAlone => 50 * US,
            Strike::AtDestage => 20 * capacity_ns,
            Strike::AtCheckpoint => 3 * capacity_ns,
        };
        let slow = strike == Strike::AtCheckpoint && self.hosts[fullest].slow_until > self.now;
        let moment = self.now + self.random.below(most) * if slow { SLOW_FACTOR } else { 1 };
        self.run_for(moment)
    }

    /// A member is taken in anew, and then all that acted without it are killed.
    fn wait_until_alone(&mut self) -> Result<(), String> {
        let host = self.some_host();
        let (node, limit) = (self.hosts[host].node, self.now + ALONE_WAIT);
        self.quiet_until = u64::MAX;
        self.kill_data(host);
        let wait = 5 * MS + self.random.below(50 * MS);
        self.restart(host, wait);
        // Once it acts, a flush would cover what this is about.
        let goes_on = self.random.one_in(3);
        let mut groups = Vec::new();
        while groups.is_empty() && self.now < limit {
            self.step()?;
            let life = self.hosts[host].process.as_ref().map(|process| process.incarnation);
            let acts = |group: &&Group| {
                group.acting().any(|member| member.node == node && Some(member.incarnation) == life)
            };
            let all = self.control.state.map().groups.values();
            let acting: Vec<&Group> = all.filter(acts).collect();
            self.workload.running &= goes_on || acting.is_empty();
            groups = acting.iter().filter(|group| group.is_settled()).map(|group| group.id).collect();
        }
        let most = if self.random.one_in(2) { 200 * US } else { 5 * MS };
        let wait = self.random.below(most);
        self.run_for(self.now + wait)?;
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            self.kill_data(other);
        }
        let is_alone = |world: &Self| {
            groups
                .iter()
                .map(|group| &world.control.state.map().groups[group])
                .any(|group| group.is_settled() && group.acting().map(|member| member.node).eq([node]))
        };
        while !is_alone(self) && self.now < limit {
            self.step()?;
        }
        if is_alone(self) {
            self.count(Strike::WhenAlone.name());
        }
        let moment = self.now + self.random.below(200 * US);
        self.run_for(moment)
    }

    /// Something that the store of a host tells; 0 while it has none.
    fn store_status(&self, host: usize, of: fn(&StoreStatus) -> u64) -> u64 {
        let stores = self.hosts[host].process.iter().flat_map(|process| process.driver.stores());
        stores.map(|store| of(&store.status())).sum()
    }

    /// Runs until `done` has held for a while.
    pub fn run_until(&mut self, limit: u64, done: impl Fn(&Self) -> bool) -> Result<(), String> {
        let deadline = self.now + limit;
        let mut since = None;
        while self.now < deadline {
            let before = self.now;
            self.step()?;
            // What holds is looked at now and then.
            if self.now / MS == before / MS {
                continue;
            }
            if !done(self) {
                since = None;
            } else if self.now - *since.get_or_insert(self.now) > 300 * MS {
                return Ok(());
            }
        }
        Err(format!("not at rest after {} s without faults: {}", limit / SECOND, self.unrest()))
    }

    fn step(&mut self) -> Result<(), String> {
        let Reverse(Scheduled { at, event, .. }) = self.queue.pop().expect("ticks go on for ever");
        self.now = at;
        self.events += 1;
        self.on_event(event);
        if self.events > EVENTS_MAX {
            return Err(format!("not over after {EVENTS_MAX} events"));
        }
        match self.ledger.violation.take() {
            Some(violation) => Err(violation),
            None => Ok(()),
        }
    }

    /// The host whose control process an event is for: while it is stopped, the event waits.
    fn control_of(&self, event: &Event) -> Option<usize> {
        match event {
            Event::StatusArrives { host, .. }
            | Event::Beat { host, .. }
            | Event::Grant { host, .. }
            | Event::StateArrives { host, .. }
            | Event::Proposal { host, .. }
            | Event::Death { host, .. }
            | Event::LinkUp { host, .. }
            | Event::Register { host, .. } => Some(*host),
            _ => None,
        }
    }

    fn on_event(&mut self, event: Event) {
        if let Some(host) = self.control_of(&event)
            && self.hosts[host].control_paused_until > self.now
        {
            return self.at(self.hosts[host].control_paused_until, event);
        }
        if let Event::StateArrives { host, .. } = event
            && self.hosts[host].maps_late_until > self.now
        {
            return self.at(self.hosts[host].maps_late_until, event);
        }
        match event {
            Event::Turn { host, life } => self.turn(host, life),
            Event::Tick { host, life } => {
                if self.process_of(host, life).is_some() {
                    self.input(host, Input::Tick);
                    self.watch_starved(host);
                    let at = self.hosts[host].data_paused_until.max(self.now) + TICK;
                    self.at(at, Event::Tick { host, life });
                }
            }
            Event::Disk { host, life, number } => self.on_disk(host, life, number),
            Event::Dial { host, life, peer, wait } => self.dial(host, life, peer, wait),
            Event::Hello { connection } => self.on_hello(connection),
            Event::Welcome { connection } => self.on_welcome(connection),
            Event::Deliver { connection, side } => self.deliver(connection, side),
            Event::Closed { connection, end, since } => self.on_closed(connection, end, since),
            Event::Silence { from, to, since } => self.on_silence(from, to, since),
            Event::LinkUp { host, life } => {
                if self.process_of(host, life).is_some() {
                    self.link_up(host);
                }
            }
            Event::Register { host, life } => self.register(host, life),
            Event::Status { host, life, again } => self.status(host, life, again),
            Event::StatusArrives { host, life, version, failed } => {
                self.on_status(host, life, version, failed);
            }
            Event::Beat { host, life, again } => self.beat(host, life, again),
            Event::BeatArrives { from, term, beat } => self.on_beat(from, term, beat),
            Event::Grant { host, grant } => self.on_grant(host, &grant),
            Event::Lease { host, life, until } => {
                if self.process_of(host, life).is_some() {
                    let process = self.hosts[host].process.as_mut().expect("checked");
                    process.lease_until = process.lease_until.max(until);
                }
            }
            Event::Map { host, life, map } => self.on_map_sent(host, life, map),
            Event::StateArrives { host, state } => self.on_state(host, state),
            Event::RaftBeat => self.raft_beat(),
            Event::Plan => self.plan(true),
            Event::PlanNow => self.plan(false),
            Event::Proposal { host, proposal } => self.on_proposal(host, proposal),
            Event::Propose { term, command } => self.on_propose(term, *command),
            Event::Commit { term, number } => self.on_commit(term, number),
            Event::Death { host, incarnation } => self.on_death(host, incarnation),
            Event::StartData { host, life } => {
                let this = &self.hosts[host];
                if this.life == life && this.powered && !this.gone {
                    self.start_data(host);
                }
            }
            Event::StartControl { host, life } => {
                let this = &self.hosts[host];
                if this.control.life == life && this.powered && !this.control.alive && !this.gone {
                    self.start_control(host);
                }
            }
            Event::PowerOn { host, boot } => {
                if self.hosts[host].boot == boot {
                    self.power_on(host);
                }
            }
            Event::Takeover { host, cut, until } => self.takeover(host, cut, until),
            Event::Newcomer { host, until } => self.newcomer(host, until),
            Event::NewcomerDies { host, life } => self.newcomer_dies(host, life),
            Event::GiveUp { host } => self.give_up(host),
            Event::EndMaintenance => self.end_maintenance(),
            Event::Client { client } => self.client(client),
            Event::Retry { operation } => self.try_operation(operation),
            Event::Fault => self.next_fault(),
        }
    }
}
