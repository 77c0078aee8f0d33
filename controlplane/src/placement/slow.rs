//! Which nodes are far slower than their peers, by what the nodes' data processes find.
//!
//! One that is slow to reach finds everybody else slow, so one word does not count: a node is slow when two nodes say so,
//! of which it may be one itself. Kept by the leader; whether anything follows from it is the operator's setting.
//!
//! Invariants
//! - A node stays slow for `SLOW_HOLD` after two nodes last said so: one that comes and goes changes its groups once.
//!
//! Source: Huang et al., "Gray Failure: The Achilles' Heel of Cloud-Scale Systems", HotOS '17.

use std::collections::{BTreeMap, BTreeSet};

use xsan_protocol::ids::NodeId;

use crate::clock::BootTime;
use crate::timing::{SLOW_HOLD, SLOW_REPORT_AGE_MAX};

/// Nodes that must find a node slow.
const WITNESSES_MIN: usize = 2;

#[derive(Debug, Default)]
pub struct SlowNodes {
    /// Who found whom slow, and when last.
    reports: BTreeMap<NodeId, BTreeMap<NodeId, BootTime>>,
    /// When enough last agreed.
    slow: BTreeMap<NodeId, BootTime>,
}

impl SlowNodes {
    /// `witness` finds these nodes slow.
    pub fn on_report(&mut self, now: BootTime, witness: NodeId, nodes: impl IntoIterator<Item = NodeId>) {
        for node in nodes {
            self.reports.entry(node).or_default().insert(witness, now);
        }
    }

    /// The nodes that count as slow now.
    pub fn at(&mut self, now: BootTime) -> BTreeSet<NodeId> {
        self.reports.retain(|node, witnesses| {
            witnesses.retain(|_, at| now.since(*at) < SLOW_REPORT_AGE_MAX);
            if witnesses.len() >= WITNESSES_MIN {
                self.slow.insert(*node, now);
            }
            !witnesses.is_empty()
        });
        self.slow.retain(|_, last| now.since(*last) < SLOW_HOLD);
        self.slow.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

    #[test]
    fn two_nodes_must_find_a_node_slow() {
        let mut slow = SlowNodes::default();
        let now = BootTime(1);
        // Node 3 is slow to reach: it finds the others slow, and they find it slow.
        slow.on_report(now, NODES[2], [NODES[0], NODES[1]]);
        slow.on_report(now, NODES[0], [NODES[2]]);
        assert_eq!(slow.at(now), BTreeSet::new());
        slow.on_report(now, NODES[1], [NODES[2]]);
        assert_eq!(slow.at(now), [NODES[2]].into());
    }

    #[test]
    fn words_grow_old_and_slowness_is_held() {
        let mut slow = SlowNodes::default();
        let start = BootTime(1);
        slow.on_report(start, NODES[0], [NODES[2]]);
        let late = start + SLOW_REPORT_AGE_MAX;
        slow.on_report(late, NODES[1], [NODES[2]]);
        assert_eq!(slow.at(late), BTreeSet::new(), "the first word is too old");
        slow.on_report(late, NODES[2], [NODES[2]]);
        assert_eq!(slow.at(late), [NODES[2]].into(), "its own word counts");
        let last = late + SLOW_HOLD;
        assert_eq!(slow.at(BootTime(last.0 - 1)), [NODES[2]].into());
        assert_eq!(slow.at(last), BTreeSet::new());
    }
}
