//! What comes to rest once the faults have ended, and what must then be true of every host.

use std::collections::{BTreeMap, BTreeSet};

use xsan_dataplane::replication::{ScrubFindings, ScrubOrder};
use xsan_protocol::ids::{GroupId, NodeId};
use xsan_protocol::map::{ClusterMap, Pool};

use crate::check::Contents;
use crate::plan::SECOND;
use crate::process::{Input, Process};
use crate::workload::{PAGES_USED, POOL, key};
use crate::world::{SETTLE_MAX, World};

/// For destage to begin.
const REST: u64 = 3 * SECOND;
/// Pages of it that rot once all was read for the last time before: nobody but a scrub finds those.
const ROT_BEFORE_SCRUB: u32 = 4;
/// Scrubs until what one host's devices did is mended.
const SCRUBS_MAX: u32 = 3;

impl World {
    pub fn all_registered(&self) -> bool {
        let map = self.control.state.map();
        self.present().map(|host| &self.hosts[host]).all(|host| {
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
    pub fn unrest(&self) -> String {
        let state = &self.control.state;
        let map = state.map();
        if !self.all_registered() {
            return "not every data process is registered".to_owned();
        }
        if let Some(operation) = self.workload.oldest() {
            return operation;
        }
        let host = |node: &NodeId| node.0 as usize - 1;
        let leaves = |node: &&NodeId| self.leaves(host(node)) || self.hosts[host(node)].gone;
        if let Some(node) = map.nodes.keys().find(leaves) {
            return format!("node {node} is not removed yet");
        }
        if let Some(other) = self.hosts.iter().find(|host| !host.gone && state.was_removed(host.node)) {
            return format!("node {} has not heard that it is removed", other.node);
        }
        if let Some(node) = map.nodes.keys().find(|node| state.is_in_maintenance(**node)) {
            return format!("node {node} is in maintenance");
        }
        let alive = self.present().count();
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
        for host in self.present().map(|host| &self.hosts[host]) {
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
    pub fn check_checksums(&self) -> Result<(), String> {
        for host in self.hosts.iter().filter(|host| !host.damage_allowed) {
            let errors = host.checksum_errors + host.process.as_ref().map_or(0, Process::checksum_errors);
            if errors > 0 {
                return Err(format!("node {} met {errors} damaged pages that nobody damaged", host.node));
            }
        }
        Ok(())
    }

    /// What was damaged behind a store's back is mended: by opening it, which notices what it lost, and by scrubs of all groups.
    /// Then a scrub finds nothing; where nobody damaged anything, the first one does.
    pub fn check_scrubs(&mut self) -> Result<(), String> {
        let damaged: Vec<usize> = self.present().filter(|host| self.hosts[*host].damage_allowed).collect();
        for &host in &damaged {
            for _ in 0..ROT_BEFORE_SCRUB {
                self.rot_in_place(host);
            }
            self.kill_data(host);
            self.restart(host, SECOND);
        }
        self.run_until(SETTLE_MAX, Self::is_quiet)?;
        let mut rounds = if damaged.is_empty() { 1 } else { SCRUBS_MAX };
        for number in 1.. {
            let found = self.scrub(number)?;
            rounds -= 1;
            if found.lost_pages > 0 {
                return Err(format!("a scrub finds pages that nobody can mend: {found:?}"));
            }
            if found.damaged_pages + found.differences + found.skipped_units == 0 {
                break;
            }
            if rounds == 0 {
                return Err(format!("scrub {number} still finds something: {found:?}"));
            }
            self.count("scrub found damage");
        }
        Ok(())
    }

    /// A deep scrub of every group: what they found together.
    fn scrub(&mut self, number: u64) -> Result<ScrubFindings, String> {
        let groups: BTreeSet<GroupId> = self.control.state.map().groups.keys().copied().collect();
        let order = |group| ScrubOrder { group, deep: true, number };
        let orders: Vec<ScrubOrder> = groups.into_iter().map(order).collect();
        for host in self.present().collect::<Vec<_>>() {
            self.input(host, Input::Scrub(orders.clone()));
        }
        self.run_until(SETTLE_MAX, |world| {
            orders.iter().all(|order| world.outcome(order).is_some()) && world.is_quiet()
        })?;
        let mut all = ScrubFindings::default();
        for found in orders.iter().filter_map(|order| self.outcome(order)) {
            all.damaged_pages += found.damaged_pages;
            all.lost_pages += found.lost_pages;
            all.differences += found.differences;
            all.skipped_units += found.skipped_units;
        }
        Ok(all)
    }

    fn outcome(&self, order: &ScrubOrder) -> Option<ScrubFindings> {
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        let outcomes = processes.flat_map(|process| process.driver.replication.scrub_status().outcomes);
        outcomes.into_iter().find(|outcome| outcome.order == *order).map(|outcome| outcome.findings)
    }

    /// At rest destage brings all that is in the journals to its place, also where pages of it are damaged.
    pub fn check_destage(&mut self) -> Result<(), String> {
        self.run_for(self.now + REST)?;
        self.run_until(SETTLE_MAX, |world| world.journalled_pages() == 0 && world.is_quiet())
            .map_err(|violation| format!("{violation}; {} pages are in journals", self.journalled_pages()))
    }

    fn journalled_pages(&self) -> u64 {
        let processes = self.hosts.iter().filter_map(|host| host.process.as_ref());
        processes
            .flat_map(|process| process.driver.stores())
            .map(|store| store.status())
            // One that failed moves nothing any more.
            .filter(|status| !status.failed)
            .map(|status| status.journalled_pages)
            .sum()
    }

    /// And then nobody holds a buffer.
    pub fn check_buffers(&mut self) -> Result<(), String> {
        self.check_destage()?;
        let at_rest = |world: &Self| world.memory.held() == 0 && world.is_quiet();
        self.run_until(SETTLE_MAX, at_rest)
            .map_err(|violation| format!("{violation}; {} buffers are held", self.memory.held()))
    }

    /// Content of every replica, by a process that opens the stores anew.
    pub fn check_replicas(&mut self) -> Result<(), String> {
        let map = self.control.state.map().clone();
        let mut contents = BTreeMap::new();
        for host in self.present().collect::<Vec<_>>() {
            let stores = self.hosts[host].process.iter().flat_map(|process| process.driver.stores());
            let given_away: u64 = stores.map(|store| store.status().used_bytes).sum();
            self.kill_data(host);
            let node = self.hosts[host].node;
            let Some((content, used_bytes)) = crate::check::contents(&self.hosts[host])? else {
                self.count("store found damaged at the end");
                continue;
            };
            if used_bytes != given_away {
                return Err(format!(
                    "node {node} has given away {given_away} bytes, its blocks hold {used_bytes}"
                ));
            }
            contents.insert(node, content);
        }
        crate::check::compare(&map, &contents)?;
        self.check_content(&map, &contents)
    }

    /// What the clients read last is what is on the devices.
    fn check_content(&self, map: &ClusterMap, contents: &BTreeMap<NodeId, Contents>) -> Result<(), String> {
        for block in 0..self.plan.blocks {
            let key = key(block);
            let group = Pool::group_in(POOL, self.plan.group_count, key.lineage, key.index);
            let mut holders = map.groups[&group].acting().filter_map(|member| contents.get(&member.node));
            let Some(held) = holders.next() else { continue };
            let content = held.get(&group).and_then(|blocks| blocks.get(&key));
            self.ledger.holds(block, PAGES_USED, content)?;
        }
        Ok(())
    }
}
