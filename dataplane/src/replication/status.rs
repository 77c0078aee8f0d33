//! What replication tells of itself: counts, progress of resync, slow members, latencies of its stages.
//!
//! Filled by the groups; read and drained by `shard`.

use std::collections::BTreeMap;

use xsan_protocol::ids::NodeId;

use crate::stats::Recent;

/// Part of a request's way that is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// A write, from its seq to the completion of the primary's own journal.
    JournalLocal,
    /// A write, from its seq to its acknowledgement.
    Acknowledge,
    /// A read, from its start to its answer.
    Read,
    /// From a group's new epoch to its serving again.
    Peering,
}

/// Numbers that only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub writes: u64,
    pub reads: u64,
    /// Pages that were damaged here and replaced with another replica's.
    pub pages_mended: u64,
    /// Reads that no replica could serve.
    pub reads_lost: u64,
    pub resync_bytes_moved: u64,
    /// Scrubs of groups that ended here.
    pub scrubs: u64,
    /// Bytes that scrubs read and verified of the replicas led here.
    pub scrub_bytes: u64,
    /// Pages, of any replica, that scrubs found damaged, and those of them that could not be mended.
    pub scrub_damaged_pages: u64,
    pub scrub_lost_pages: u64,
    /// Units that scrubs found to differ between replicas.
    pub scrub_differences: u64,
    /// Frames that were malformed or came from who should not send them.
    pub frames_refused: u64,
}

/// The present state of a shard's groups.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReplicationStatus {
    pub groups_primary: usize,
    pub groups_secondary: usize,
    pub groups_learner: usize,
    /// Groups led here that serve requests.
    pub groups_active: usize,
    pub writes_in_flight: usize,
    pub requests_waiting: usize,
    pub resync_bytes_left: u64,
    pub counters: Counters,
    pub slow_members: Vec<SlowMember>,
}

/// A node that takes far longer than its peers to journal what this shard sends, be it itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowMember {
    pub node: NodeId,
    pub us_p99: u64,
    pub us_p99_peers: u64,
}

/// Samples kept between two drains; more are dropped, since they only serve statistics.
const SAMPLES_MAX: usize = 8192;
/// A member is slow when its p99 is this many times that of its fastest peer, and above the floor.
const SLOW_FACTOR: u64 = 5;
const SLOW_FLOOR_NS: u64 = 20_000_000;

#[derive(Debug, Default)]
pub(super) struct Latencies {
    samples: Vec<(Stage, u64)>,
    /// How long a member took for an entry.
    members: BTreeMap<NodeId, Recent>,
}

impl Latencies {
    pub fn add(&mut self, stage: Stage, ns: u64) {
        if self.samples.len() < SAMPLES_MAX {
            self.samples.push((stage, ns));
        }
    }

    /// `node` took so long from when an entry was made to when it had it in its journal.
    pub fn add_member(&mut self, node: NodeId, ns: u64) {
        self.members.entry(node).or_default().record(ns);
    }

    pub fn drain(&mut self, out: &mut Vec<(Stage, u64)>) {
        out.append(&mut self.samples);
    }

    pub fn on_tick(&mut self, now_ns: u64) {
        self.members.retain(|_, times| !times.is_empty());
        self.members.values_mut().for_each(|times| times.on_tick(now_ns));
    }

    pub fn slow_members(&self) -> Vec<SlowMember> {
        let judged = self.members.iter().filter_map(|(node, times)| Some((*node, times.p99()?)));
        let all: Vec<(NodeId, u64)> = judged.collect();
        let slow = |&(node, ns): &(NodeId, u64)| {
            let peers = all.iter().filter(|(peer, _)| *peer != node).map(|(_, ns)| *ns).min()?;
            (ns > SLOW_FLOOR_NS && ns > peers.saturating_mul(SLOW_FACTOR)).then_some(SlowMember {
                node,
                us_p99: ns / 1000,
                us_p99_peers: peers / 1000,
            })
        };
        all.iter().filter_map(slow).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW_NS: u64 = 40_000_000;

    fn slow_nodes(latencies: &Latencies) -> Vec<NodeId> {
        latencies.slow_members().iter().map(|member| member.node).collect()
    }

    #[test]
    fn a_member_far_behind_its_peers_is_slow_for_as_long_as_it_is() {
        let mut latencies = Latencies::default();
        for sample in 0..1000 {
            latencies.add_member(NodeId(1), 100_000 + sample);
            latencies.add_member(NodeId(2), 200_000 + sample);
            latencies.add_member(NodeId(3), SLOW_NS + sample);
        }
        assert_eq!(slow_nodes(&latencies), [NodeId(3)]);
        let peers = latencies.slow_members()[0].us_p99_peers;
        assert!((100..=103).contains(&peers), "{peers} µs");
        latencies.on_tick(Recent::SPAN_NS);
        assert_eq!(slow_nodes(&latencies), [NodeId(3)], "one span says as much as two");
        latencies.on_tick(2 * Recent::SPAN_NS);
        assert_eq!(slow_nodes(&latencies), [], "what was long ago is forgotten");
    }

    #[test]
    fn a_few_slow_entries_say_nothing() {
        let mut latencies = Latencies::default();
        for _ in 0..Recent::SAMPLES_MIN - 1 {
            latencies.add_member(NodeId(1), SLOW_NS);
        }
        (0..1000).for_each(|_| latencies.add_member(NodeId(2), 100_000));
        assert_eq!(slow_nodes(&latencies), []);
        latencies.add_member(NodeId(1), SLOW_NS);
        assert_eq!(slow_nodes(&latencies), [NodeId(1)]);
    }
}
