//! What goes wrong, and when. Every fault ends by itself, or with `end_faults`. It counts when it takes effect.
//!
//! Faults keep to what XSAN promises to bear: at most what one node alone holds is lost for good. So one host loses its power
//! only while every group has another live member (all hosts at once is `World::blackout`), and one host's device
//! rots only, never in a run in which others lose what they did not flush.

use xsan_controlplane::state::Departure;
use xsan_controlplane::state::command::Command;
use xsan_dataplane::io::DeviceRole;
use xsan_dataplane::testing::SimDevice;
use xsan_protocol::ids::{NodeId, Seq};
use xsan_protocol::map::{Group, Pool};
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT};

use crate::plan::{MS, OUT_MIN, SECOND, US};
use crate::workload::{POOL, key};
use crate::world::{Event, World};

/// Everything that goes wrong, as it is counted. A thousand seeds meet each of these.
pub const FAULTS: [&str; 34] = [
    "all hosts down at a checkpoint",
    "all hosts down during destage",
    "all hosts down right after a promise",
    "all hosts down when the last one taken in acts alone",
    "all hosts killed",
    "bit flipped",
    "both processes of a host killed",
    "connection broken",
    "control process killed",
    "data process killed",
    "device failed",
    "device slow",
    "flush failed, the next one did not",
    "host back when others had begun to lead",
    "host cut off one way, from one or all",
    "host cut off, from one or all",
    "host found slow",
    "host left out",
    "maintenance ended",
    "maps late",
    "node given up",
    "node joins",
    "node removed",
    "page unreadable",
    "power of a host lost",
    "power of a primary lost before a newcomer counts",
    "power of all hosts lost",
    "processes stopped for a while",
    "removal taken back",
    "scrub found damage",
    "store failed",
    "store found damaged",
    "write lost by a device",
    "write misdirected by a device",
];
/// And what not every thousand does.
pub const FAULTS_RARE: [&str; 2] = ["store found damaged at the end", "store replaced"];

/// A fault, of a host and perhaps another.
type Kind = fn(&mut World, usize, usize);

/// Hosts that a run may add, and lose.
const NODES_ADDED_MAX: usize = 1;
const NODES_REMOVED_MAX: usize = 1;
/// As long as hosts that are cut off are waited for.
const TAKEOVER_MAX: u64 = 6 * SECOND;
const OPERATOR_RETRY: u64 = SECOND;
const TAKEOVER_POLL: u64 = 5 * MS;
const NEWCOMER_POLL: u64 = 100 * US;

impl World {
    pub fn next_fault(&mut self) {
        let mean = self.plan.fault_ns;
        let wait = mean / 4 + self.random.below(mean * 3 / 2);
        self.after(wait, Event::Fault);
        if self.quiet_until <= self.now {
            self.fault();
        }
    }

    fn fault(&mut self) {
        let present: Vec<usize> = self.present().collect();
        let place = self.random.index(present.len());
        let host = present[place];
        let other = present[(place + 1 + self.random.index(present.len() - 1)) % present.len()];
        let weights = self.plan.weights;
        let kinds: [(u64, Kind); 21] = [
            (weights.kill_data, Self::fault_kill_data),
            (weights.kill_control, Self::fault_kill_control),
            (weights.kill_host, Self::fault_kill_host),
            (weights.lose_power, Self::fault_lose_power),
            (weights.pause, Self::fault_pause),
            (weights.reset, Self::fault_reset),
            (weights.partition, Self::fault_partition),
            (weights.one_way, Self::fault_one_way),
            (weights.takeover, Self::fault_takeover),
            (weights.newcomer, Self::fault_newcomer),
            (weights.heal, Self::fault_heal),
            (weights.slow, Self::fault_slow),
            (weights.fail_device, Self::fault_fail_device),
            (weights.fail_flush, Self::fault_fail_flush),
            (weights.damage, Self::fault_damage),
            (weights.add_node, Self::fault_add_node),
            (weights.late_maps, Self::fault_late_maps),
            (weights.away, Self::fault_away),
            (weights.maintenance, Self::fault_maintenance),
            (weights.remove_node, Self::fault_remove_node),
            (weights.give_up, Self::fault_give_up),
        ];
        let mut choice = self.random.below(kinds.iter().map(|(weight, _)| weight).sum());
        for (weight, kind) in kinds {
            if choice < weight {
                return kind(self, host, other);
            }
            choice -= weight;
        }
    }

    /// Mostly soon, sometimes late.
    fn down_time(&mut self) -> u64 {
        if self.random.one_in(5) {
            self.random.below(5 * SECOND)
        } else {
            10 * MS + self.random.below(400 * MS)
        }
    }

    fn fault_kill_data(&mut self, host: usize, _: usize) {
        if self.hosts[host].process.is_some() {
            self.count("data process killed");
        }
        self.kill_data(host);
        let wait = self.down_time();
        self.restart(host, wait);
    }

    fn fault_kill_control(&mut self, host: usize, _: usize) {
        if self.hosts[host].control.alive {
            self.count("control process killed");
        }
        self.kill_control(host);
        let wait = self.down_time();
        self.restart(host, wait);
    }

    fn fault_kill_host(&mut self, host: usize, _: usize) {
        if self.hosts[host].process.is_some() && self.hosts[host].control.alive {
            self.count("both processes of a host killed");
        }
        self.kill_control(host);
        self.kill_data(host);
        let wait = self.down_time();
        self.restart(host, wait);
    }

    /// For so long that it is left out, mostly, and its replicas are made elsewhere.
    fn fault_away(&mut self, host: usize, _: usize) {
        self.log(|| format!("host {host} is away"));
        self.kill_control(host);
        self.kill_data(host);
        let wait = OUT_MIN / 2 + self.random.below(2 * OUT_MIN);
        self.restart(host, wait);
        if self.random.one_in(2) {
            self.quiet_until = self.now + wait;
        }
    }

    /// An operator begins or ends the maintenance of a node, and may take the host down meanwhile.
    fn fault_maintenance(&mut self, host: usize, other: usize) {
        let node = self.hosts[host].node;
        let on = !self.control.state.is_in_maintenance(node);
        let force = self.random.one_in(4);
        self.propose(other, Command::SetMaintenance { node, on, force });
        if on && self.random.one_in(2) {
            self.fault_kill_host(host, other);
        }
    }

    /// Goes on while there are no faults: what was asked for before may come late.
    pub fn end_maintenance(&mut self) {
        if self.faults_end == u64::MAX {
            return;
        }
        self.after(OPERATOR_RETRY, Event::EndMaintenance);
        let state = self.control.state.clone();
        let mut nodes = state.map().nodes.keys().filter(|node| state.is_in_maintenance(**node));
        if let Some(&node) = nodes.next() {
            let asks = self.some_host();
            self.propose(asks, Command::SetMaintenance { node, on: false, force: false });
        }
    }

    /// An operator has a node leave, or stay after all.
    fn fault_remove_node(&mut self, host: usize, other: usize) {
        let leaving = self.present().find(|host| self.leaves(*host));
        let (host, departure) = match leaving {
            Some(host) if self.random.one_in(2) => (host, Departure::Stays),
            None if self.may_lose_another() => (host, Departure::Leaving),
            _ => return,
        };
        let node = self.hosts[host].node;
        self.propose(other, Command::LeaveNode { node, departure });
    }

    fn may_lose_another(&self) -> bool {
        self.present().count() + NODES_REMOVED_MAX > self.hosts.len()
    }

    /// A host is gone for good, and so is what it held; once its lease has ended, an operator gives it up.
    fn fault_give_up(&mut self, host: usize, _: usize) {
        if self.may_lose_another() && !self.leaves(host) && self.bears_loss_of(host) {
            self.log(|| format!("host {host} is gone for good"));
            self.power_off(host);
            self.hosts[host].gone = true;
            self.after(OPERATOR_RETRY, Event::GiveUp { host });
        }
    }

    /// Asks for it again until it is done.
    pub fn give_up(&mut self, host: usize) {
        let node = self.hosts[host].node;
        if self.control.state.was_removed(node) {
            self.log(|| format!("host {host} is given up"));
            return self.count("node given up");
        }
        self.after(OPERATOR_RETRY, Event::GiveUp { host });
        let asks = self.some_host();
        if self.is_gone(node) && !self.leaves(host) {
            self.propose(asks, Command::LeaveNode { node, departure: Departure::Lost });
        }
    }

    /// Was it asked to leave?
    pub fn leaves(&self, host: usize) -> bool {
        self.control.state.departure(self.hosts[host].node) != Departure::Stays
    }

    fn fault_lose_power(&mut self, host: usize, _: usize) {
        if !self.hosts[host].powered || !self.bears_loss_of(host) {
            return;
        }
        self.count("power of a host lost");
        self.power_off(host);
        let wait = self.down_time();
        let boot = self.hosts[host].boot;
        self.after(wait, Event::PowerOn { host, boot });
    }

    /// Does every group have a live acting member elsewhere, in a state that all agree on, with all that is acknowledged in its journal?
    fn bears_loss_of(&self, lost: usize) -> bool {
        let map = self.control.state.map();
        let safe = |group: &Group| {
            let acked = self.acknowledged(group);
            group.acting().any(|member| {
                let host = member.node.0 as usize - 1;
                let holds = self.hosts[host].process.as_ref().is_some_and(|process| {
                    let journal = process.driver.replication.journal(group.id);
                    process.incarnation == member.incarnation
                        && journal.is_some_and(|(_, durable)| durable >= acked)
                });
                host != lost && holds && !self.has_failed(host)
            })
        };
        let active: usize = self
            .hosts
            .iter()
            .filter_map(|host| host.process.as_ref())
            .map(|process| process.driver.replication.status().groups_active)
            .sum();
        active == map.groups.len() && map.groups.values().all(safe)
    }

    /// What any member of the group knows to be acknowledged.
    pub fn acknowledged(&self, group: &Group) -> Seq {
        let process = |node: NodeId| self.hosts[node.0 as usize - 1].process.as_ref();
        let processes = group.acting().filter_map(|member| process(member.node));
        let journals = processes.filter_map(|process| process.driver.replication.journal(group.id));
        journals.map(|(acked, _)| acked).max().unwrap_or(Seq(0))
    }

    /// Has a store of it failed, or is it about to?
    fn has_failed(&self, host: usize) -> bool {
        let this = &self.hosts[host];
        let mut stores = this.process.iter().flat_map(|process| process.driver.stores());
        let unheard = this.flush_failed_in == Some(this.life);
        unheard || this.devices().any(SimDevice::is_failing) || stores.any(|store| store.status().failed)
    }

    /// SIGSTOP, for a while: of the data process, the control process or both.
    fn fault_pause(&mut self, host: usize, _: usize) {
        let time =
            if self.random.one_in(2) { self.random.below(4 * SECOND) } else { self.random.below(300 * MS) };
        let until = self.now + time;
        let which = self.random.below(3);
        self.log(|| format!("host {host}: processes stop for {} ms ({which})", time / MS));
        self.count("processes stopped for a while");
        if which != 1 {
            self.hosts[host].data_paused_until = until;
        }
        if which != 0 {
            self.hosts[host].control_paused_until = until;
        }
        self.maybe_let_be();
    }

    fn fault_reset(&mut self, host: usize, other: usize) {
        let between: Vec<_> = self
            .net
            .connections
            .iter()
            .filter(|(_, connection)| {
                let hosts = connection.ends.map(|end| end.host);
                hosts == [host, other] || hosts == [other, host]
            })
            .map(|(id, _)| *id)
            .collect();
        if let Some(&id) = self.random.pick(&between) {
            self.log(|| format!("connection between hosts {host} and {other} breaks"));
            self.count("connection broken");
            self.break_connection(id);
        }
    }

    /// One host is cut off from the others, or from one of them.
    fn fault_partition(&mut self, host: usize, other: usize) {
        let others: Vec<usize> =
            if self.random.one_in(2) { vec![other] } else { (0..self.hosts.len()).collect() };
        self.log(|| format!("host {host} is cut off from {others:?}"));
        self.count("host cut off, from one or all");
        for other in others {
            self.block(host, other);
            self.block(other, host);
        }
        self.maybe_let_be();
    }

    /// Sometimes nothing else happens until leases have ended and others have taken over.
    fn maybe_let_be(&mut self) {
        if self.random.one_in(3) {
            self.quiet_until = self.now + 1500 * MS + self.random.below(2500 * MS);
        }
    }

    /// One host is not heard by another; by none; or hears none.
    fn fault_one_way(&mut self, host: usize, other: usize) {
        self.count("host cut off one way, from one or all");
        let all = 0..self.hosts.len();
        let (what, pairs): (&str, Vec<_>) = match self.random.below(4) {
            0 => ("is heard by none", all.map(|other| (host, other)).collect()),
            1 => ("hears none", all.map(|other| (other, host)).collect()),
            _ => ("is not heard by one", vec![(host, other)]),
        };
        self.log(|| format!("host {host} {what}: {pairs:?}"));
        pairs.into_iter().for_each(|(from, to)| self.block(from, to));
        self.maybe_let_be();
    }

    /// A host is away until others lead its groups, and not a moment longer. Either it is cut off: what it sent as their primary
    /// arrives when its successors begin. Or its control process stands still, goes on as soon as it is decided that others are to
    /// lead, and hears of everything but of that.
    fn fault_takeover(&mut self, host: usize, _: usize) {
        let cut = self.random.one_in(2);
        self.log(|| format!("host {host} is away until others lead its groups (cut off: {cut})"));
        if cut {
            for other in 0..self.hosts.len() {
                self.block(host, other);
                self.block(other, host);
            }
        }
        let until = self.now + TAKEOVER_MAX;
        self.quiet_until = until;
        self.takeover(host, cut, until);
    }

    /// Do others lead the groups of a host that is away?
    pub fn takeover(&mut self, host: usize, cut: bool, until: u64) {
        if self.quiet_until != until {
            // The faults have ended meanwhile.
            return;
        }
        if !self.is_replaced(host, !cut) && self.now < until {
            if !cut {
                self.hosts[host].control_paused_until = self.now + TAKEOVER_POLL;
            }
            return self.after(TAKEOVER_POLL, Event::Takeover { host, cut, until });
        }
        self.quiet_until = self.now;
        if self.is_replaced(host, !cut) {
            self.count("host back when others had begun to lead");
        }
        if cut {
            self.heal_network();
        } else {
            let late = self.now + self.random.below(1500 * MS);
            let maps_late_until = &mut self.hosts[host].maps_late_until;
            *maps_late_until = late.max(*maps_late_until);
        }
    }

    /// A data process is killed, and has just been taken in again, but that is not settled, when the primary's host loses its power;
    /// soon after, the process is killed again.
    fn fault_newcomer(&mut self, host: usize, _: usize) {
        self.log(|| format!("host {host} is to be a newcomer"));
        self.kill_data(host);
        let wait = 5 * MS + self.random.below(100 * MS);
        self.restart(host, wait);
        let until = self.now + TAKEOVER_MAX;
        self.quiet_until = until;
        self.newcomer(host, until);
    }

    /// Is the host a newcomer now?
    pub fn newcomer(&mut self, host: usize, until: u64) {
        if self.quiet_until != until {
            return;
        }
        let primary = self.primary_beside(host).filter(|primary| self.bears_loss_of(*primary));
        let Some(primary) = primary else {
            if self.now < until {
                return self.after(NEWCOMER_POLL, Event::Newcomer { host, until });
            }
            self.quiet_until = self.now;
            return;
        };
        self.quiet_until = self.now;
        self.count("power of a primary lost before a newcomer counts");
        self.power_off(primary);
        let (wait, boot) = (self.down_time(), self.hosts[primary].boot);
        self.after(wait, Event::PowerOn { host: primary, boot });
        let most = if self.random.one_in(2) { 20 * MS } else { 2 * SECOND };
        let (wait, life) = (self.random.below(most), self.hosts[host].life);
        self.after(wait, Event::NewcomerDies { host, life });
    }

    pub fn newcomer_dies(&mut self, host: usize, life: u64) {
        if self.hosts[host].life == life {
            self.fault_kill_data(host, host);
        }
    }

    /// The host of a primary that counts on this one as a member, in an epoch that is not settled.
    fn primary_beside(&self, host: usize) -> Option<usize> {
        let (state, node) = (&self.control.state, self.hosts[host].node);
        let unsettled = state.map().groups.values().filter(|group| !group.is_settled());
        let mut primaries = unsettled
            .filter(|group| group.newcomers().any(|member| member.node == node && group.acts(member)))
            .filter_map(|group| group.primary.filter(|primary| *primary != node))
            .map(|primary| primary.0 as usize - 1);
        primaries.find(|primary| {
            let process = self.hosts[*primary].process.as_ref();
            process.is_some_and(|process| process.map.version == state.version())
        })
    }

    fn fault_heal(&mut self, _: usize, _: usize) {
        self.heal_network();
    }

    fn heal_network(&mut self) {
        let blocked: Vec<_> = self.net.blocked.iter().copied().collect();
        if !blocked.is_empty() {
            self.log(|| "the network is whole again".to_owned());
        }
        for (from, to) in blocked {
            self.unblock(from, to);
            // Streams wait longer and longer between two tries, datagrams come at once.
            if self.random.one_in(3) {
                let late = self.now + self.random.below(SECOND);
                let host = &mut self.hosts[to];
                host.maps_late_until = host.maps_late_until.max(late);
            }
        }
    }

    fn fault_slow(&mut self, host: usize, _: usize) {
        let time = self.random.below(2 * SECOND);
        self.log(|| format!("host {host}: its device is slow for {} ms", time / MS));
        self.count("device slow");
        self.hosts[host].slow_until = self.now + time;
        self.hosts[host].slow_cache = self.random.one_in(2);
        if self.plan.demotes {
            let found = self.random.below(2 * time + MS);
            self.log(|| format!("host {host}: found slow for {} ms", found / MS));
            self.count("host found slow");
            self.hosts[host].found_slow_until = self.now + found;
        }
    }

    /// Its stream from the leader stands still, datagrams do not.
    fn fault_late_maps(&mut self, host: usize, _: usize) {
        let time = self.random.below(4 * SECOND);
        self.log(|| format!("host {host}: maps are late for {} ms", time / MS));
        self.count("maps late");
        self.hosts[host].maps_late_until = self.now + time;
    }

    /// Writes and flushes fail; after a while the device works again, and the process is started anew.
    fn fault_fail_device(&mut self, host: usize, _: usize) {
        if !self.bears_loss_of(host) {
            return;
        }
        let role = self.some_role(host);
        self.log(|| format!("host {host}: its device fails ({role:?})"));
        self.count("device failed");
        self.hosts[host].failure_allowed = true;
        self.hosts[host].device(role).fail();
    }

    /// A flush fails and takes with it what it was to cover; the next one ends well.
    fn fault_fail_flush(&mut self, host: usize, _: usize) {
        self.hosts[host].flush_to_fail = Some(self.some_role(host));
    }

    /// Is a flush of this device to fail now?
    pub fn flush_may_fail(&self, host: usize, role: DeviceRole) -> bool {
        self.hosts[host].flush_to_fail == Some(role) && self.bears_loss_of(host)
    }

    /// One of the devices of a host.
    fn some_role(&mut self, host: usize) -> DeviceRole {
        let cached = self.hosts[host].cache.is_some();
        if cached && self.random.one_in(2) { DeviceRole::Cache } else { DeviceRole::Capacity }
    }

    /// A page of the one host that may rot: a flipped bit, an unreadable page, writes that do nothing or land elsewhere.
    fn fault_damage(&mut self, _: usize, _: usize) {
        let host = (self.plan.seed % self.plan.nodes as u64) as usize;
        // Else it could be the only copy.
        let map = self.control.state.map();
        let whole =
            map.groups.values().all(|group| group.acting().count() >= usize::from(self.plan.replica_count));
        if !whole || self.hosts[host].process.is_none() {
            return;
        }
        self.hosts[host].damage_allowed = true;
        let role = self.some_role(host);
        let device = self.hosts[host].device(role).clone();
        let Some(offset) = device.some_page(&mut self.random) else { return };
        match self.random.below(6) {
            0 => {
                self.log(|| format!("host {host}: page at {offset} can not be read ({role:?})"));
                self.count("page unreadable");
                device.make_unreadable(offset);
            }
            1 => {
                self.log(|| format!("host {host}: its device loses writes ({role:?})"));
                let pages = 1 + self.random.below(4);
                device.lose_writes(pages);
            }
            2 => {
                self.log(|| format!("host {host}: its device misdirects writes ({role:?})"));
                let pages = 1 + self.random.below(4);
                device.misdirect_writes(pages, 1 + self.random.below(1000));
            }
            3 => self.rot_in_place(host),
            _ => self.flip_bit(host, role, offset),
        }
    }

    /// A page rots that holds what clients wrote, in its place.
    pub fn rot_in_place(&mut self, host: usize) {
        let Some(process) = &self.hosts[host].process else { return };
        let device = &self.hosts[host].capacity;
        let mut pages = Vec::new();
        for block in 0..self.plan.blocks {
            let key = key(block);
            let group = Pool::group_in(POOL, self.plan.group_count, key.lineage, key.index);
            let units = process.driver.stores().flat_map(|store| store.locate(group, key));
            let offsets = units.filter_map(|unit| unit.device_offset);
            let in_unit =
                |offset: u64| (0..PAGES_PER_UNIT as u64).map(move |page| offset + page * PAGE_SIZE as u64);
            pages.extend(offsets.flat_map(in_unit).filter(|offset| device.holds_something(*offset)));
        }
        if let Some(&offset) = self.random.pick(&pages) {
            self.flip_bit(host, DeviceRole::Capacity, offset);
        }
    }

    fn flip_bit(&mut self, host: usize, role: DeviceRole, offset: u64) {
        let device = self.hosts[host].device(role).clone();
        let bit = self.random.below(8 * PAGE_SIZE as u64);
        self.log(|| format!("host {host}: a bit of the page at {offset} flips ({role:?})"));
        self.count("bit flipped");
        device.flip_bit(offset, bit);
    }

    fn fault_add_node(&mut self, _: usize, _: usize) {
        if self.hosts.len() >= self.plan.nodes + NODES_ADDED_MAX || self.control.leader.is_none() {
            return;
        }
        let host = self.add_host();
        self.hosts[host].booted_at = self.now;
        self.log(|| format!("host {host} joins"));
        self.count("node joins");
        self.add_to_cluster(host);
        self.format(host);
        self.start_control(host);
        self.start_data(host);
    }

    /// Everything works again, at once or soon; a host without power, when it gets it.
    pub fn end_faults(&mut self) {
        self.heal_network();
        self.after(1, Event::EndMaintenance);
        for host in 0..self.hosts.len() {
            let this = &mut self.hosts[host];
            this.data_paused_until = this.data_paused_until.min(self.now);
            this.control_paused_until = this.control_paused_until.min(self.now);
            (this.slow_until, this.found_slow_until) = (0, 0);
            this.flush_to_fail = None;
            this.devices().for_each(SimDevice::end_failures);
            if self.has_failed(host) {
                self.kill_data(host);
            }
            self.restart(host, 20 * MS);
        }
    }
}
