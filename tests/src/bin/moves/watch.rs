//! Looks at the cluster from outside: what has moved, and whether it has come to rest.

use std::collections::BTreeMap;

use anyhow::Result;
use xsan_protocol::proto::{ClusterStatusReply, GroupCounts, NodeStatus};
use xsan_tests::cluster::Cluster;

/// The sum of a counter over all data processes that there were: one that ends takes its count with it, and so does a node
/// that leaves.
pub struct Total {
    counter: &'static str,
    /// By node: of the lives before, and of the present one when it was last asked.
    nodes: BTreeMap<String, (u64, u64)>,
}

impl Total {
    pub const fn of(counter: &'static str) -> Self {
        Self { counter, nodes: BTreeMap::new() }
    }

    /// What it is now.
    pub fn look(&mut self, cluster: &Cluster) -> Result<u64> {
        for node in cluster.control().perf_stats()?.nodes.iter().filter(|node| node.reachable) {
            let counter = node.counters.iter().find(|counter| counter.name == self.counter);
            let Some(now) = counter.map(|counter| counter.value) else { continue };
            let (before, last) = self.nodes.entry(node.name.clone()).or_default();
            if now < *last {
                *before += *last;
            }
            *last = now;
        }
        Ok(self.nodes.values().map(|(before, last)| before + last).sum())
    }
}

pub fn groups(status: &ClusterStatusReply) -> GroupCounts {
    status.groups.unwrap_or_default()
}

/// Has every group all its replicas, on whatever nodes?
pub fn all_whole(status: &ClusterStatusReply) -> bool {
    let groups = groups(status);
    groups.total > 0 && groups.healthy == groups.total && groups.resyncing == 0
}

pub fn node<'a>(status: &'a ClusterStatusReply, name: &str) -> Option<&'a NodeStatus> {
    status.nodes.iter().find(|node| node.node.as_ref().is_some_and(|node| node.name == name))
}

pub fn used(status: &ClusterStatusReply, name: &str) -> u64 {
    node(status, name).and_then(|node| node.used_bytes).unwrap_or(0)
}

/// What a node of this cluster holds on average.
pub fn share(status: &ClusterStatusReply) -> u64 {
    status.used_bytes / status.nodes.len().max(1) as u64
}

/// Groups that a node is an acting member of.
pub fn acting_on(status: &ClusterStatusReply, name: &str) -> u32 {
    node(status, name).map_or(0, |node| node.member_groups)
}

/// Is a node a member or a learner of any group?
pub fn is_member(status: &ClusterStatusReply, name: &str) -> bool {
    node(status, name).is_some_and(|node| node.member_groups + node.learner_groups > 0)
}

/// Of so many bytes, those that groups of a node hold, when groups hold the same.
pub fn part_of(status: &ClusterStatusReply, name: &str, bytes: u64) -> u64 {
    bytes * u64::from(acting_on(status, name)) / u64::from(groups(status).total.max(1))
}
