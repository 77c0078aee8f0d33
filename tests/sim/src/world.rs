//! The world: hosts, network and control plane, and the queue of what happens next.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use xsan_controlplane::lease::Beat;
use xsan_controlplane::membership::heartbeat::Grant;
use xsan_controlplane::placement::Proposal;
use xsan_controlplane::state::ClusterState;
use xsan_controlplane::state::command::Command;
use xsan_dataplane::disk::buffers::{BufferPool, Claim};
use xsan_dataplane::io::{Device, DeviceRole, DiskAction};
use xsan_dataplane::net::connection::claim_of;
use xsan_dataplane::net::frame::Frame;
use xsan_dataplane::replication::{Driver, Replication};
use xsan_dataplane::store::{FormatParameters, Options, Store, StoreStatus};
use xsan_dataplane::testing::{Random, SimDevice};
use xsan_protocol::ids::{BootId, Incarnation, MapVersion, NodeId, ShardIndex, StoreId};
use xsan_protocol::map::{ClusterMap, DamagedStore};

use crate::Summary;
use crate::check::Ledger;
use crate::control::ControlPlane;
use crate::host::{Control, Host, InFlight};
use crate::network::{ConnectionId, Network};
use crate::plan::{MS, Plan, SECOND, Strike, US};
use crate::process::{Input, Process};
use crate::workload::Workload;

/// Of a cluster, with the host that joins.
const HOSTS_MAX: usize = 6;
const JOURNAL_BYTES: u64 = 16 << 20;
pub const TICK: u64 = 20 * MS;
/// Lines of the log that are kept.
const LOG_MAX: usize = 4000;
/// How long it may take until the moment to strike.
const STRIKE_WAIT: u64 = SECOND;
/// How much longer every operation of a slow device takes.
const SLOW_FACTOR: u64 = 100;
/// For destage to begin.
const REST: u64 = 3 * SECOND;
/// For a cluster without faults to be whole and quiet.
const SETTLE_MAX: u64 = 120 * SECOND;
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
    /// Without faults until then.
    pub quiet_until: u64,
    pub faults: u64,
    pub events: u64,
    pub next_store: u64,
    next_incarnation: u64,
    next_operation: u64,
    log: VecDeque<String>,
}

/// Buffers of the data processes.
#[derive(Clone, Copy)]
pub struct Memory {
    /// Of each host as much as a shard has by default.
    pools: [&'static BufferPool; HOSTS_MAX],
    /// What all of them together take beside.
    overflow: &'static BufferPool,
}

impl Memory {
    fn new() -> Self {
        let pool = |_| BufferPool::anonymous(64 << 20);
        Self { pools: std::array::from_fn(pool), overflow: BufferPool::anonymous(512 << 20) }
    }

    /// A frame whose data is in nobody's pool.
    pub fn copy(&self, frame: Frame) -> Frame {
        let Some(sent) = &frame.data else { return frame };
        let mut buffer = self.overflow.alloc(sent.len()).expect("there is enough beside the pools");
        buffer.copy_from_slice(sent);
        Frame { data: Some(buffer.freeze()), ..frame }
    }
}

/// Memory of threads that have ended: arenas are never freed.
static MEMORIES: Mutex<Vec<Memory>> = Mutex::new(Vec::new());

/// Memory of every run of one thread, and then of another.
struct Lent(Memory);

impl Drop for Lent {
    fn drop(&mut self) {
        MEMORIES.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

thread_local! {
    static MEMORY: Lent = {
        let lent = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Lent(lent.unwrap_or_else(Memory::new))
    };
}

impl World {
    pub fn new(plan: Plan) -> Self {
        let mut random = Random::new(plan.seed ^ 0x5851_f42d_4c95_7f2d);
        let memory = MEMORY.with(|memory| memory.0);
        let host = |index| new_host(index, &plan, memory.pools[index], &mut random);
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
            quiet_until: u64::MAX,
            faults: 0,
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
        let host = new_host(index, &self.plan, self.memory.pools[index], &mut self.random);
        self.hosts.push(host);
        index
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

    pub fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log).into()
    }

    pub fn summary(&self) -> Summary {
        Summary {
            answered: self.ledger.answered,
            failed: self.ledger.failed,
            faults: self.faults,
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
            self.quiet_until = 0;
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
        self.ledger.check()?;
        self.check_buffers()?;
        self.check_replicas()
    }

    /// The faults end, and everything must come to rest.
    fn settle(&mut self) -> Result<(), String> {
        self.log(|| "all faults end".to_owned());
        self.quiet_until = u64::MAX;
        self.workload.running = false;
        self.end_faults();
        if self.plan.is_full() {
            // A learner may find no room: the operator frees some.
            self.free_half();
        }
        self.run_until(SETTLE_MAX, Self::is_quiet)
    }

    fn run_for(&mut self, end: u64) -> Result<(), String> {
        while self.now < end {
            self.step()?;
        }
        Ok(())
    }

    /// Runs to the moment at which all hosts are to go down, if it comes soon.
    fn wait_to_strike(&mut self) -> Result<(), String> {
        let strike = self.plan.strike;
        let fullest = (0..self.hosts.len())
            .max_by_key(|host| self.store_status(*host, |status| status.journal_used_bytes));
        let fullest = fullest.expect("there are hosts");
        let count = |world: &Self| match strike {
            Strike::AnyTime => 0,
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
        let capacity_ns = self.plan.device_ns * self.plan.capacity_factor;
        let most = match strike {
            Strike::AnyTime | Strike::AtPromise => 50 * US,
            Strike::AtDestage => 20 * capacity_ns,
            Strike::AtCheckpoint => 3 * capacity_ns,
        };
        let slow = strike == Strike::AtCheckpoint && self.hosts[fullest].slow_until > self.now;
        let moment = self.now + self.random.below(most) * if slow { SLOW_FACTOR } else { 1 };
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
                if self.hosts[host].life == life && self.hosts[host].powered {
                    self.start_data(host);
                }
            }
            Event::StartControl { host, life } => {
                let this = &self.hosts[host];
                if this.control.life == life && this.powered && !this.control.alive {
                    self.start_control(host);
                }
            }
            Event::PowerOn { host, boot } => {
                if self.hosts[host].boot == boot {
                    self.power_on(host);
                }
            }
            Event::Takeover { host, cut, until } => self.takeover(host, cut, until),
            Event::Client { client } => self.client(client),
            Event::Retry { operation } => self.try_operation(operation),
            Event::Fault => self.next_fault(),
        }
    }

    // Devices.

    /// Hands an operation to the host's device.
    pub fn submit(&mut self, host: usize, action: DiskAction) {
        self.next_operation += 1;
        let number = self.next_operation;
        let mean = self.plan.device_ns;
        let factor = if action.device() == DeviceRole::Capacity { self.plan.capacity_factor } else { 1 };
        let mut wait = (mean / 2 + self.random.below(mean)) * factor;
        if self.random.one_in(300) {
            wait += self.random.below(30 * MS);
        }
        let this = &mut self.hosts[host];
        if this.slow_until > self.now && (this.slow_cache || action.device() == DeviceRole::Capacity) {
            wait *= SLOW_FACTOR;
        }
        let mark = match &action {
            DiskAction::Flush { device, .. } => this.device(*device).mark(),
            DiskAction::Read { .. } | DiskAction::Write { .. } => 0,
        };
        this.in_flight.insert(number, InFlight { action, mark });
        let life = this.life;
        self.after(wait, Event::Disk { host, life, number });
    }

    fn on_disk(&mut self, host: usize, life: u64, number: u64) {
        let this = &mut self.hosts[host];
        if this.life != life {
            return;
        }
        let Some(InFlight { action, mark }) = this.in_flight.remove(&number) else { return };
        let of_capacity = action.device() == DeviceRole::Capacity;
        if matches!(action, DiskAction::Flush { .. }) && of_capacity && self.flush_may_fail(host) {
            self.log(|| format!("host {host}: a flush fails"));
            self.hosts[host].flush_to_fail = false;
            self.hosts[host].capacity.fail_next_flush();
        }
        let completion = self.hosts[host].device(action.device()).clone().carry_out(action, mark);
        self.input(host, Input::Disk(completion));
    }

    pub fn format(&mut self, host: usize) {
        let store = self.new_store_id();
        let this = &mut self.hosts[host];
        this.store = store;
        let parameters = FormatParameters {
            cluster_id: "sim".to_owned(),
            store,
            created_ns: 1,
            journal_bytes: Some(JOURNAL_BYTES),
        };
        let cache = this.cache.as_ref().map(|device| device as &dyn Device);
        Store::format(&this.capacity, cache, &parameters, this.pool).expect("the devices are large enough");
    }

    // Processes.

    /// Starts the data process of a host: opens its store, and links to the control process.
    pub fn start_data(&mut self, host: usize) {
        self.next_incarnation += 1;
        let incarnation = Incarnation(self.next_incarnation);
        let this = &mut self.hosts[host];
        assert!(this.process.is_none() && this.powered);
        let options = Options {
            now_ns: this.clock(self.now).0,
            cluster_id: Some("sim".to_owned()),
            ..Options::default()
        };
        let cache = this.cache.as_ref().map(|device| device as &dyn Device);
        let (store, recovered) = match Store::open(&this.capacity, cache, this.pool, options) {
            Ok(opened) => opened,
            Err(error) if this.damage_allowed => {
                // The operator replaces the device.
                self.log(|| format!("host {host}: its store does not open ({error}) and is replaced"));
                self.replace_devices(host);
                return self.start_data(host);
            }
            Err(error) => panic!("host {host}: a store without damage does not open: {error}"),
        };
        let is_damaged = recovered.damaged;
        let intact_groups = recovered.intact_groups();
        assert!(
            !is_damaged || this.damage_allowed,
            "host {host}: an undamaged store says that it is damaged"
        );
        let damaged = DamagedStore { store: this.store, intact_groups };
        this.damaged_stores = is_damaged.then_some(damaged).into_iter().collect();
        this.life += 1;
        let (node, life) = (this.node, this.life);
        let replication = Replication::new(node, incarnation, ShardIndex(0), this.pool);
        let mut driver = Driver::new(replication);
        driver.add_store(store, recovered);
        this.process = Some(Process::new(incarnation, driver));
        self.log(|| format!("host {host}: data process {incarnation} starts (damaged: {is_damaged})"));
        self.after(TICK, Event::Tick { host, life });
        self.after(1, Event::LinkUp { host, life });
    }

    pub fn replace_devices(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        this.capacity = SimDevice::new(self.plan.device_bytes);
        this.cache = this.cache.is_some().then(|| SimDevice::new(JOURNAL_BYTES + (1 << 20)));
        self.format(host);
    }

    /// Takes a frame's data into the memory of the host that it reaches, as a connection does.
    pub fn receive(&self, host: usize, frame: Frame) -> Frame {
        let Some(sent) = &frame.data else { return frame };
        let claim = claim_of(frame.header.opcode);
        let buffer = self.hosts[host].pool.alloc_for(claim, sent.len());
        let buffer = match claim {
            Claim::Replication => {
                let buffer = buffer.or_else(|| self.memory.overflow.alloc(sent.len()));
                Some(buffer.expect("there is enough beside the pools"))
            }
            _ => buffer,
        };
        let Some(mut buffer) = buffer else { return Frame::busy(frame.header) };
        buffer.copy_from_slice(sent);
        Frame { data: Some(buffer.freeze()), ..frame }
    }

    /// SIGKILL: what the device was doing may end in part.
    pub fn kill_data(&mut self, host: usize) {
        let Some(process) = self.hosts[host].process.take() else { return };
        let incarnation = process.incarnation;
        self.log(|| format!("host {host}: data process {incarnation} is killed"));
        drop(process);
        let in_flight = std::mem::take(&mut self.hosts[host].in_flight);
        for InFlight { action, .. } in in_flight.into_values() {
            self.hosts[host].device(action.device()).clone().tear(&action, &mut self.random);
        }
        self.hosts[host].life += 1;
        self.hosts[host].data_paused_until = 0;
        self.drop_connections(host);
        self.lose_operations(host);
        let noticed = self.random.below(20 * MS);
        self.after(noticed, Event::Death { host, incarnation });
    }

    pub fn kill_control(&mut self, host: usize) {
        let control = &mut self.hosts[host].control;
        if std::mem::replace(&mut control.alive, false) {
            control.life += 1;
            self.hosts[host].control_paused_until = 0;
            self.log(|| format!("host {host}: control process is killed"));
        }
    }

    /// The supervisor starts what should run and does not.
    pub fn restart(&mut self, host: usize, wait: u64) {
        let this = &self.hosts[host];
        let (life, control_life) = (this.life, this.control.life);
        if this.process.is_none() {
            self.after(wait, Event::StartData { host, life });
        }
        if !self.hosts[host].control.alive {
            self.after(wait / 2, Event::StartControl { host, life: control_life });
        }
    }

    pub fn power_off(&mut self, host: usize) {
        self.kill_data(host);
        self.kill_control(host);
        self.log(|| format!("host {host}: loses power"));
        let this = &mut self.hosts[host];
        this.powered = false;
        this.boot.0 += 1_000;
        for device in [Some(&this.capacity), this.cache.as_ref()].into_iter().flatten() {
            device.lose_power(&mut self.random);
        }
    }

    pub fn power_on(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        if std::mem::replace(&mut this.powered, true) {
            return;
        }
        this.booted_at = self.now;
        this.clock_base = self.random.below(1000 * SECOND);
        self.log(|| format!("host {host}: has power again"));
        self.restart(host, 50 * MS);
    }

    /// Power of all hosts at once: what was not flushed may be lost, what was flushed may not.
    fn blackout(&mut self) {
        let power = self.plan.weights.damage == 0 && self.random.chance(60);
        self.log(|| format!("all hosts {}", if power { "lose power" } else { "are killed" }));
        for host in 0..self.hosts.len() {
            if power {
                self.power_off(host);
            } else {
                self.kill_data(host);
                self.kill_control(host);
            }
        }
        if power {
            self.ledger.blackout();
        }
        // One may stay away for so long that the others go on without it.
        let late = if self.random.one_in(4) { self.random.index(self.hosts.len()) } else { usize::MAX };
        for host in 0..self.hosts.len() {
            let wait = self.random.below(3 * SECOND) + if host == late { 15 * SECOND } else { 0 };
            let boot = self.hosts[host].boot;
            if power {
                self.after(wait, Event::PowerOn { host, boot });
            } else {
                self.restart(host, wait);
            }
        }
    }

    // Rest.

    fn all_registered(&self) -> bool {
        let map = self.control.state.map();
        self.hosts.iter().all(|host| {
            let data = map.nodes.get(&host.node).and_then(|node| node.data.as_ref());
            let process = host.process.as_ref();
            data.zip(process).is_some_and(|(data, process)| data.incarnation == process.incarnation)
        })
    }

    /// Every group has all the replicas that it can have, all of them alive and up to date, and nothing is under way.
    pub fn is_quiet(&self) -> bool {
        self.unrest().is_empty()
    }

    /// What is not at rest.
    fn unrest(&self) -> String {
        let state = &self.control.state;
        let map = state.map();
        if !self.all_registered() {
            return "not every data process is registered".to_owned();
        }
        if let Some(operation) = self.workload.oldest() {
            return operation;
        }
        let alive = self.hosts.len();
        for group in map.groups.values() {
            let pool = &map.pools[&group.id.pool()];
            let wanted = usize::from(pool.replica_count).min(alive);
            let current = group.members.iter().all(|member| {
                let process = self.hosts[member.node.0 as usize - 1].process.as_ref();
                process.is_some_and(|process| process.incarnation == member.incarnation)
            });
            if group.acting().count() != wanted || group.learners().count() > 0 || !current {
                let members: Vec<_> =
                    group.members.iter().map(|m| (m.node.0, m.incarnation.0, m.learner)).collect();
                let states = group.members.iter().filter_map(|member| {
                    let process = self.hosts[member.node.0 as usize - 1].process.as_ref()?;
                    let store = process.driver.stores().next()?.status();
                    let group = process.driver.replication.describe(group.id);
                    Some(format!("\n node {}: {store:?} {group}", member.node))
                });
                let states: String = states.collect();
                return format!("group {} {} {:?} {members:?}{states}", group.id, group.epoch, group.primary);
            }
        }
        let mut active = 0;
        for host in &self.hosts {
            let process = host.process.as_ref().expect("all are registered");
            if process.map.version != state.version() {
                return format!("node {} does not have the newest map", host.node);
            }
            let status = process.driver.replication.status();
            active += status.groups_active;
            if status.writes_in_flight + status.requests_waiting > 0 || status.resync_bytes_left > 0 {
                return format!("node {}: {status:?}", host.node);
            }
            if let Some(group) = process.driver.replication.busy_group() {
                let state = process.driver.replication.describe(group);
                return format!("node {} has something to do for group {group}: {state}", host.node);
            }
        }
        if active != map.groups.len() {
            return format!("{active} of {} groups serve", map.groups.len());
        }
        String::new()
    }

    /// What nobody damaged is as it should be, whatever was lost with the power.
    fn check_checksums(&self) -> Result<(), String> {
        for host in self.hosts.iter().filter(|host| !host.damage_allowed) {
            let stores = host.process.iter().flat_map(|process| process.driver.stores());
            let errors: u64 = stores.map(|store| store.status().counters.checksum_errors).sum();
            if errors > 0 {
                return Err(format!("node {} met {errors} damaged pages that nobody damaged", host.node));
            }
        }
        Ok(())
    }

    /// At rest nobody holds a buffer: destage, which copies what is in the journals to its place, comes to its end.
    fn check_buffers(&mut self) -> Result<(), String> {
        self.run_for(self.now + REST)?;
        let at_rest = |world: &Self| world.buffers_held() == 0 && world.is_quiet();
        self.run_until(SETTLE_MAX, at_rest)
            .map_err(|violation| format!("{violation}; {} buffers are held", self.buffers_held()))
    }

    fn buffers_held(&self) -> usize {
        let pools = self.memory.pools.iter().chain([&self.memory.overflow]);
        pools.flat_map(|pool| pool.occupancy()).map(|(free, all)| all - free).sum()
    }

    /// Content of every replica, by a process that opens the stores anew.
    pub fn check_replicas(&mut self) -> Result<(), String> {
        let map = self.control.state.map().clone();
        let mut contents = BTreeMap::new();
        for host in 0..self.hosts.len() {
            let stores = self.hosts[host].process.iter().flat_map(|process| process.driver.stores());
            let given_away: u64 = stores.map(|store| store.status().used_bytes).sum();
            self.kill_data(host);
            let node = self.hosts[host].node;
            // What a store lost to damage shows when it is opened; its peers would make up for it.
            if !self.hosts[host].damage_allowed {
                let (content, used_bytes) = crate::check::contents(&self.hosts[host])?;
                if used_bytes != given_away {
                    return Err(format!(
                        "node {node} has given away {given_away} bytes, its blocks hold {used_bytes}"
                    ));
                }
                contents.insert(node, content);
            }
        }
        crate::check::compare(&map, &contents)
    }
}

fn new_host(index: usize, plan: &Plan, pool: &'static BufferPool, random: &mut Random) -> Host {
    let drift = random.below(2 * plan.drift_ppm + 1) as i64 - plan.drift_ppm as i64;
    Host {
        node: NodeId(index as u32 + 1),
        powered: true,
        boot: BootId(index as u64 + 1),
        clock_base: random.below(1000 * SECOND),
        booted_at: 0,
        drift_ppm: drift,
        store: StoreId(0),
        damaged_stores: Vec::new(),
        damage_allowed: false,
        capacity: SimDevice::new(plan.device_bytes),
        cache: plan.cached.then(|| SimDevice::new(JOURNAL_BYTES + (1 << 20))),
        in_flight: BTreeMap::new(),
        slow_until: 0,
        flush_to_fail: false,
        slow_cache: false,
        found_slow_until: 0,
        maps_late_until: 0,
        control: Control { alive: false, life: 0, link: Default::default(), known: Arc::default() },
        pool,
        process: None,
        life: 0,
        data_paused_until: 0,
        control_paused_until: 0,
    }
}
