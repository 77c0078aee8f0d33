//! What replication tells of itself: counts, progress of resync, slow members, latencies of its stages.
//!
//! Filled by the groups; read and drained by `shard`.

use std::collections::BTreeMap;

use xsan_protocol::ids::NodeId;

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

/// A node that takes far longer than its peers to journal what this shard sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowMember {
    pub node: NodeId,
    pub us_p99: u64,
    pub us_p99_peers: u64,
}

/// Samples kept between two drains; more are dropped, since they only serve statistics.
const SAMPLES_MAX: usize = 8192;
const MEMBER_SAMPLES: usize = 256;
/// A member is slow when its p99 is this many times that of its fastest peer, and above the floor.
const SLOW_FACTOR: u64 = 5;
const SLOW_FLOOR_NS: u64 = 20_000_000;

#[derive(Debug)]
struct MemberSamples {
    ring: [u64; MEMBER_SAMPLES],
    count: usize,
}

#[derive(Debug, Default)]
pub(super) struct Latencies {
    samples: Vec<(Stage, u64)>,
    members: BTreeMap<NodeId, MemberSamples>,
}

impl Latencies {
    pub fn add(&mut self, stage: Stage, ns: u64) {
        if self.samples.len() < SAMPLES_MAX {
            self.samples.push((stage, ns));
        }
    }

    pub fn add_member(&mut self, node: NodeId, ns: u64) {
        let samples =
            self.members.entry(node).or_insert(MemberSamples { ring: [0; MEMBER_SAMPLES], count: 0 });
        samples.ring[samples.count % MEMBER_SAMPLES] = ns;
        samples.count += 1;
    }

    pub fn drain(&mut self, out: &mut Vec<(Stage, u64)>) {
        out.append(&mut self.samples);
    }

    pub fn slow_members(&self) -> Vec<SlowMember> {
        let p99 = |samples: &MemberSamples| {
            let mut sorted = samples.ring[..samples.count.min(MEMBER_SAMPLES)].to_vec();
            sorted.sort_unstable();
            sorted[(sorted.len() * 99 / 100).min(sorted.len() - 1)]
        };
        let all: Vec<(NodeId, u64)> =
            self.members.iter().map(|(node, samples)| (*node, p99(samples))).collect();
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

    #[test]
    fn a_member_far_behind_its_peers_is_slow() {
        let mut latencies = Latencies::default();
        for sample in 0..1000 {
            latencies.add_member(NodeId(1), 100_000 + sample);
            latencies.add_member(NodeId(2), 200_000 + sample);
            latencies.add_member(NodeId(3), 40_000_000 + sample);
        }
        let slow = latencies.slow_members();
        assert_eq!(slow.iter().map(|member| member.node).collect::<Vec<_>>(), [NodeId(3)]);
        assert_eq!(slow[0].us_p99_peers, 100);
    }
}
