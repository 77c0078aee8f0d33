//! A host: its clock, its devices, its control process, and (if it runs) its data process.

use std::collections::BTreeMap;
use std::sync::Arc;

use xsan_controlplane::clock::BootTime;
use xsan_controlplane::link::Link;
use xsan_controlplane::state::ClusterState;
use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::io::{Device, DeviceRole, DiskAction};
use xsan_dataplane::replication::{Driver, Replication};
use xsan_dataplane::store::{FormatParameters, Options, Store};
use xsan_dataplane::testing::{Random, SimDevice};
use xsan_protocol::ids::{BootId, Incarnation, NodeId, ShardIndex, StoreId};
use xsan_protocol::map::DamagedStore;

use crate::plan::{MS, Plan, SECOND, Strike};
use crate::process::{Input, Process};
use crate::world::{Event, TICK, World};

const JOURNAL_BYTES: u64 = 16 << 20;
/// How much longer every operation of a slow device takes.
pub const SLOW_FACTOR: u64 = 100;
/// A device that has had an operation for so long hangs.
const HANGS_AFTER: u64 = 500 * MS;

pub struct Host {
    pub node: NodeId,
    pub powered: bool,
    pub boot: BootId,
    /// CLOCK_BOOTTIME at virtual time 0 of this boot, and how much faster it runs than true time.
    pub clock_base: u64,
    pub booted_at: u64,
    pub drift_ppm: i64,
    pub store: StoreId,
    /// Its store was damaged behind its back, in this run.
    pub damage_allowed: bool,
    /// A device of it failed an operation, or was to, in this run.
    pub failure_allowed: bool,
    /// The life of the data process in which a flush failed: stopped, it may not have heard of it yet.
    pub flush_failed_in: Option<u64>,
    /// Damaged pages that earlier lives of its data process met.
    pub checksum_errors: u64,
    /// Its store failed, in this life of its data process or in an earlier one of which the cluster does not know yet.
    pub failed: bool,
    pub failed_before: bool,
    /// It never runs again: it has heard that it is removed, or was lost with all that it held.
    pub gone: bool,
    /// The leader has left it out of placement.
    pub out: bool,
    /// Its store, if it lost records.
    pub damaged_stores: Vec<DamagedStore>,
    pub capacity: SimDevice,
    pub cache: Option<SimDevice>,
    /// Device operations under way, by number.
    pub in_flight: BTreeMap<u64, InFlight>,
    /// Until then every operation of the capacity device takes a hundred times as long.
    pub slow_until: u64,
    /// And of the cache device.
    pub slow_cache: bool,
    /// The next flush of this device fails whose loss can be borne, and takes what it was to cover with it.
    pub flush_to_fail: Option<DeviceRole>,
    /// Until then the others find it slow, whether it is or not.
    pub found_slow_until: u64,
    pub control: Control,
    /// Memory of the data process.
    pub pool: &'static BufferPool,
    /// `None`: it does not run.
    pub process: Option<Process>,
    /// Counts the lives of the data process: events of an earlier one are void.
    pub life: u64,
    /// Stopped (SIGSTOP) until then.
    pub data_paused_until: u64,
    pub control_paused_until: u64,
    /// What the cluster agreed on reaches it no sooner; beats do.
    pub maps_late_until: u64,
}

/// A device operation, with what a flush covers, and when it was handed over.
pub struct InFlight {
    pub action: DiskAction,
    pub mark: u64,
    pub since: u64,
}

/// The control process: what its host knows of the cluster, and the link to the data process.
pub struct Control {
    pub alive: bool,
    pub life: u64,
    pub link: Link,
    pub known: Arc<ClusterState>,
}

impl Host {
    pub fn new(index: usize, plan: &Plan, pool: &'static BufferPool, random: &mut Random) -> Self {
        let drift = random.below(2 * plan.drift_ppm + 1) as i64 - plan.drift_ppm as i64;
        Self {
            node: NodeId(index as u32 + 1),
            powered: true,
            boot: BootId(index as u64 + 1),
            clock_base: random.below(1000 * SECOND),
            booted_at: 0,
            drift_ppm: drift,
            store: StoreId(0),
            failed: false,
            failed_before: false,
            gone: false,
            out: false,
            damaged_stores: Vec::new(),
            damage_allowed: false,
            failure_allowed: false,
            flush_failed_in: None,
            checksum_errors: 0,
            capacity: SimDevice::new(plan.device_bytes),
            cache: plan.cached.then(|| SimDevice::new(JOURNAL_BYTES + (1 << 20))),
            in_flight: BTreeMap::new(),
            slow_until: 0,
            flush_to_fail: None,
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

    /// This host's CLOCK_BOOTTIME at a true time.
    pub fn clock(&self, now: u64) -> BootTime {
        let since = (now - self.booted_at) as i128;
        let drift = since * i128::from(self.drift_ppm) / 1_000_000;
        BootTime(self.clock_base + (since + drift) as u64)
    }

    pub fn device(&self, role: DeviceRole) -> &SimDevice {
        match role {
            DeviceRole::Capacity => &self.capacity,
            DeviceRole::Cache => self.cache.as_ref().expect("the store was opened with it"),
        }
    }

    pub fn devices(&self) -> impl Iterator<Item = &SimDevice> {
        [&self.capacity].into_iter().chain(&self.cache)
    }

    /// Is there an operation that its devices have had for longer than a device that is only busy takes?
    pub fn device_hangs(&self, now: u64) -> bool {
        self.in_flight.values().any(|operation| now >= operation.since + HANGS_AFTER)
    }

    /// Are there processes that can answer?
    pub fn control_runs(&self, now: u64) -> bool {
        self.powered && self.control.alive && self.control_paused_until <= now
    }
}

impl World {
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
        this.in_flight.insert(number, InFlight { action, mark, since: self.now });
        let life = this.life;
        self.after(wait, Event::Disk { host, life, number });
    }

    pub fn on_disk(&mut self, host: usize, life: u64, number: u64) {
        let this = &mut self.hosts[host];
        if this.life != life {
            return;
        }
        let Some(InFlight { action, mark, .. }) = this.in_flight.remove(&number) else { return };
        let role = action.device();
        if matches!(action, DiskAction::Flush { .. }) && self.flush_may_fail(host, role) {
            self.log(|| format!("host {host}: a flush fails ({role:?})"));
            self.count("flush failed, the next one did not");
            self.hosts[host].flush_to_fail = None;
            self.hosts[host].failure_allowed = true;
            self.hosts[host].flush_failed_in = Some(life);
            self.hosts[host].device(role).fail_next_flush();
        }
        let device = self.hosts[host].device(role).clone();
        let completion = device.carry_out(action, mark);
        let (lost, misdirected) = device.take_wrong_writes();
        (0..lost).for_each(|_| self.count("write lost by a device"));
        (0..misdirected).for_each(|_| self.count("write misdirected by a device"));
        self.input(host, Input::Disk(completion));
    }

    pub fn format(&mut self, host: usize) {
        let store = self.new_store_id();
        let this = &mut self.hosts[host];
        this.store = store;
        let parameters = FormatParameters {
            cluster_id: "sim".to_owned(),
            node: this.node,
            store,
            created_ns: 1,
            journal_bytes: Some(JOURNAL_BYTES),
        };
        let cache = this.cache.as_ref().map(|device| device as &dyn Device);
        Store::format(&this.capacity, cache, &parameters, this.pool).expect("the devices are large enough");
    }

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
                self.count("store replaced");
                self.replace_devices(host);
                return self.start_data(host);
            }
            Err(error) => panic!("host {host}: a store without damage does not open: {error}"),
        };
        let (is_damaged, lost_end) = (recovered.damaged, recovered.lost_end);
        if is_damaged {
            self.count("store found damaged");
        }
        let this = &mut self.hosts[host];
        let intact_groups = recovered.intact_groups();
        assert!(
            !is_damaged || this.damage_allowed,
            "host {host}: an undamaged store says that it is damaged"
        );
        let damaged = DamagedStore { store: this.store, intact_groups };
        this.damaged_stores = is_damaged.then_some(damaged).into_iter().collect();
        this.failed_before |= std::mem::take(&mut this.failed) | lost_end;
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
        (this.failed, this.failed_before) = (false, false);
        this.cache = this.cache.is_some().then(|| SimDevice::new(JOURNAL_BYTES + (1 << 20)));
        self.format(host);
    }

    /// SIGKILL: what the device was doing may end in part.
    pub fn kill_data(&mut self, host: usize) {
        let Some(process) = self.hosts[host].process.take() else { return };
        let incarnation = process.incarnation;
        self.log(|| format!("host {host}: data process {incarnation} is killed"));
        self.hosts[host].checksum_errors += process.checksum_errors();
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
        if this.gone {
            return;
        }
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
        this.devices().for_each(|device| device.lose_power(&mut self.random));
    }

    pub fn power_on(&mut self, host: usize) {
        let this = &mut self.hosts[host];
        if this.gone {
            return;
        }
        if std::mem::replace(&mut this.powered, true) {
            return;
        }
        this.booted_at = self.now;
        this.clock_base = self.random.below(1000 * SECOND);
        self.log(|| format!("host {host}: has power again"));
        self.restart(host, 50 * MS);
    }

    /// Power of all hosts at once: what was not flushed may be lost, what was flushed may not.
    pub fn blackout(&mut self) {
        let always = self.plan.strike == Strike::WhenAlone;
        let power = self.plan.weights.damage == 0 && (always || self.random.chance(60));
        self.log(|| format!("all hosts {}", if power { "lose power" } else { "are killed" }));
        self.count(if power { "power of all hosts lost" } else { "all hosts killed" });
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
            self.acknowledged.clear();
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
}
