//! One look at the whole cluster: this node's state, and what the nodes answer within a deadline.
//!
//! Taken by the API for what is more than the state: `status`, `health` and `life` are worked out from it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use futures::future::join_all;
use xsan_protocol::ids::{GroupId, NodeId};
use xsan_protocol::map::{DataProcess, Group, Member, Node};
use xsan_protocol::proto;

use super::{Context, gather};
use crate::clock::unix_ms;
use crate::state::ClusterState;

/// A node's clock may be off by this before it is told.
const SKEW_MS_MAX: u64 = 1000;

/// A node's answer, and by how much its wall clock surely is off.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: proto::LocalStatusReply,
    pub skew_ms: u64,
}

#[derive(Clone, Debug)]
pub struct Survey {
    pub state: Arc<ClusterState>,
    pub answers: HashMap<NodeId, Answer>,
    /// What the leader says of each node; empty when there is none, or a quorum does not answer it.
    pub health: HashMap<NodeId, proto::NodeHealth>,
    /// 0: none.
    pub leader: NodeId,
    pub term: u64,
    /// When it was taken, by this node's wall clock.
    pub unix_ms: u64,
}

impl Survey {
    pub async fn take(context: &Context) -> Self {
        Self::ask(context, |_| true).await
    }

    /// For what needs no more than the health of the nodes: asks the leader, and the others only if that does not tell.
    pub async fn of_leader(context: &Context) -> Self {
        let leader = context.handle.leader().map(|(leader, _)| leader);
        let survey = Self::ask(context, |node| Some(node) == leader).await;
        if survey.health.is_empty() { Self::take(context).await } else { survey }
    }

    async fn ask(context: &Context, whom: impl Fn(NodeId) -> bool) -> Self {
        let state = context.handle.state();
        let ask = async |node: &Node| {
            let asked = unix_ms();
            let status = gather::status(context, node).await?;
            let skew_ms = skew_ms(asked, status.unix_ms, unix_ms());
            Some((node.id, Answer { status, skew_ms }))
        };
        let asked = state.map().nodes.values().filter(|node| whom(node.id));
        let answers = join_all(asked.map(ask)).await;
        let leader = context.handle.leader().map_or(NodeId(0), |(leader, _)| leader);
        Self::new(
            state,
            answers.into_iter().flatten().collect(),
            leader,
            context.handle.metrics().current_term,
            unix_ms(),
        )
    }

    pub fn new(
        state: Arc<ClusterState>,
        answers: HashMap<NodeId, Answer>,
        leader: NodeId,
        term: u64,
        unix_ms: u64,
    ) -> Self {
        let health = answers.values().flat_map(|answer| &answer.status.health);
        let health: HashMap<_, _> = health.map(|health| (NodeId(health.node), *health)).collect();
        let leader = if health.is_empty() { NodeId(0) } else { leader };
        Self { state, answers, health, leader, term, unix_ms }
    }

    /// Does `node` serve, as far as is known? Without a leader: does its data process run?
    pub fn serves(&self, node: NodeId) -> bool {
        let runs = || self.answers.get(&node).is_some_and(|answer| answer.status.data.is_some());
        self.health.get(&node).map_or_else(runs, |health| health.up)
    }

    /// Nodes that nobody waits for any more, as the leader says.
    pub fn out(&self) -> BTreeSet<NodeId> {
        self.health.iter().filter(|(_, health)| health.out).map(|(node, _)| *node).collect()
    }

    /// Acting members that serve, in the life that acts.
    pub fn acting(&self, group: &Group) -> usize {
        let lives = |member: &&Member| {
            let data = self.state.map().nodes.get(&member.node).and_then(|node| node.data.as_ref());
            data.is_some_and(|data| data.incarnation == member.incarnation)
        };
        group.acting().filter(|member| self.has(member)).filter(lives).count()
    }

    /// Does the member's node serve, with a store that works?
    pub fn has(&self, member: &Member) -> bool {
        let data = self.state.map().nodes.get(&member.node).and_then(|node| node.data.as_ref());
        let works =
            |data: &DataProcess| data.stores.iter().any(|store| store.id == member.store && !store.failed);
        self.serves(member.node) && data.is_some_and(works)
    }

    /// Does a holder of `group` surely have everything that is acknowledged there: in the life that held it, or back with
    /// nothing lost? As `placement::View::has_everything`.
    pub fn has_everything(&self, group: GroupId, holder: &Member) -> bool {
        let data = self.state.map().nodes.get(&holder.node).and_then(|node| node.data.as_ref());
        let is_whole = !holder.damaged && !self.state.is_damaged(holder.node, group);
        let kept = |data: &DataProcess| {
            data.incarnation == holder.incarnation || data.boot_id == holder.boot_id && is_whole
        };
        self.has(holder) && data.is_some_and(kept)
    }

    /// Bytes that resync moves in a second, all nodes together.
    pub fn resync_rate(&self) -> u64 {
        self.answers.values().map(|answer| answer.status.resync_bytes_per_second).sum()
    }
}

/// By how much a clock that said `told`, between `asked` and `answered` here, surely is off; 0 when that is little.
fn skew_ms(asked: u64, told: u64, answered: u64) -> u64 {
    let off = told.saturating_sub(answered).max(asked.saturating_sub(told));
    // An older release tells no time.
    if told == 0 || off < SKEW_MS_MAX { 0 } else { off }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{answers, process, state, survey};
    use super::*;
    use crate::state::command::Command;
    use xsan_protocol::ids::{Incarnation, StoreId};

    /// The map stays as it is when nobody is left to go on, and volumes were shown as healthy on dead nodes and failed stores.
    #[test]
    fn who_acts_by_the_map_and_does_not_serve_does_not_count() {
        let mut state = state(3, 3);
        let acting = |state: &ClusterState, down: &[u32]| {
            let survey = survey(state, answers(3, down));
            survey.acting(survey.state.groups().next().expect("a group").1)
        };
        assert_eq!((acting(&state, &[]), acting(&state, &[2]), acting(&state, &[1, 2, 3])), (3, 2, 0));
        let (node, incarnation, store) = (NodeId(2), Incarnation(2), StoreId(2));
        state.apply(&Command::StoreFailed { node, incarnation, store });
        assert_eq!(acting(&state, &[]), 2);
        state.apply(&Command::DataStarted {
            node: NodeId(3),
            process: process(StoreId(3), Incarnation(9)),
            damaged_stores: vec![],
            replaces: Some(Incarnation(3)),
        });
        assert_eq!(acting(&state, &[]), 1, "it acts in another life");
    }

    #[test]
    fn a_clock_is_off_only_when_the_wait_for_the_answer_can_not_explain_it() {
        assert_eq!(skew_ms(10_000, 10_500, 11_000), 0);
        assert_eq!(skew_ms(10_000, 8_500, 10_001), 1_500);
        assert_eq!(skew_ms(10_000, 13_000, 11_000), 2_000);
        assert_eq!(skew_ms(10_000, 11_900, 11_000), 0);
        assert_eq!(skew_ms(10_000, 0, 11_000), 0);
    }
}
