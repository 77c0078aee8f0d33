//! The planner: one term's decisions about the groups, from the state, the leases and the primaries' wishes.
//!
//! `controller` runs it on the Raft leader and has its changes committed; the simulator runs it as it is. Reads no clock.
//!
//! Invariants
//! - The nodes that a plan takes for gone are held before it is given out: see `LeaseTable::hold`.

use std::collections::{BTreeMap, BTreeSet};

use xsan_protocol::ids::NodeId;
use xsan_protocol::map::Pool;
use xsan_protocol::placement::{Candidate, place_what_fits};

use super::balance::balance;
use super::decide::decide;
use super::life::follow_wishes;
use super::{Memory, NodeView, Proposal, Targets, View};
use crate::clock::BootTime;
use crate::lease::{Health, LeaseTable};
use crate::state::command::GroupChange;
use crate::state::{ClusterState, Departure};
use crate::timing::SLOW_REPORT_AGE_MAX;

/// What is remembered from one plan to the next, for one term of leadership.
#[derive(Default)]
pub struct Planner {
    memory: Memory,
    gone_since: BTreeMap<NodeId, BootTime>,
    /// Gone for so long that their groups are rebuilt elsewhere.
    out: BTreeSet<NodeId>,
    /// When the first plan was made.
    began: Option<BootTime>,
    placed: Placed,
}

/// Targets, and what they were computed from.
#[derive(Default)]
struct Placed {
    pools: Vec<Pool>,
    candidates: Vec<Candidate>,
    targets: Targets,
}

impl Placed {
    fn update(&mut self, state: &ClusterState, left_out: &BTreeSet<NodeId>) {
        let candidates = state.candidates(left_out);
        let pools: Vec<_> = state.map().pools.values().cloned().collect();
        if candidates != self.candidates || pools != self.pools {
            let placed = pools.iter().flat_map(|pool| place_what_fits(pool, &candidates));
            self.targets = placed.map(|placement| (placement.group, placement.replicas)).collect();
            (self.pools, self.candidates) = (pools, candidates);
        }
    }
}

impl Planner {
    /// The changes that are due, where these nodes are `slow`; what safety asks for first, balance when there is nothing of that.
    pub fn plan(
        &mut self,
        now: BootTime,
        state: &ClusterState,
        leases: &mut LeaseTable,
        proposals: &[Proposal],
        slow: &BTreeSet<NodeId>,
    ) -> Vec<GroupChange> {
        let demotes = state.settings().demote_slow_nodes;
        let view = |node: &xsan_protocol::map::Node| {
            let registered = node.data.as_ref().map(|data| data.incarnation);
            let confirmed = registered.map(|incarnation| leases.confirmed(node.id, incarnation));
            let health = leases.health(now, node.id, registered);
            let slow = demotes && slow.contains(&node.id);
            (node.id, NodeView { health, confirmed: confirmed.unwrap_or_default(), slow })
        };
        let nodes: BTreeMap<NodeId, NodeView> = state.map().nodes.values().map(view).collect();
        let is_gone = |(_, view): &(&NodeId, &NodeView)| view.health == Health::Gone;
        let gone: BTreeSet<NodeId> = nodes.iter().filter(is_gone).map(|(node, _)| *node).collect();
        self.leave_out(now, state, &gone);
        self.placed.update(state, &self.out);
        let began = *self.began.get_or_insert(now);
        let unsure = demotes && now.since(began) < SLOW_REPORT_AGE_MAX;
        let view = View { now, state, nodes: &nodes, targets: &self.placed.targets, unsure };
        let mut changes = decide(&view, &mut self.memory, proposals);
        changes.extend(follow_wishes(&view, &changes));
        if changes.is_empty() {
            changes = balance(&view, &mut self.memory);
        }
        if !changes.is_empty() {
            leases.hold(gone);
        }
        changes
    }

    /// Nodes that nobody waits for any more, by the last plan.
    pub const fn out(&self) -> &BTreeSet<NodeId> {
        &self.out
    }

    /// The time in maintenance does not count, unless the node is to leave: nobody expects it back.
    fn leave_out(&mut self, now: BootTime, state: &ClusterState, gone: &BTreeSet<NodeId>) {
        let stays = |node: NodeId| state.departure(node) == Departure::Stays;
        let waits = |node: NodeId| state.is_in_maintenance(node) && stays(node);
        let counts = |node: &NodeId| gone.contains(node) && !waits(*node);
        self.gone_since.retain(|node, _| counts(node));
        gone.iter().filter(|node| counts(node)).for_each(|node| {
            self.gone_since.entry(*node).or_insert(now);
        });
        let interval = state.settings().down_out_interval;
        let long = self.gone_since.iter().filter(|(_, since)| now.since(**since) >= interval);
        self.out = long.map(|(node, _)| *node).collect();
    }
}
