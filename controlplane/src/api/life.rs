//! What becomes of a node: maintenance and removal, what they and a join would cost, and when they are refused.
//!
//! The state refuses what the log alone forbids (`state::life`); here is added what depends on the health of the nodes
//! and on the space that is used. A dry run tries the command on a copy of the state.

use std::collections::{BTreeMap, BTreeSet};

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockIndex, GroupId, NodeId, PoolId, StoreId};
use xsan_protocol::map::Node;
use xsan_protocol::placement::{Candidate, place, place_what_fits};
use xsan_protocol::proto;
use xsan_protocol::units::BLOCK_SIZE;

use super::error::ApiError;
use super::status::is_at_risk;
use super::survey::Survey;
use super::{Context, find_node};
use crate::state::Departure;
use crate::state::command::{Command, Reply};
use crate::state::error::{Refusal, StateError};

/// What resync is taken to move in a second when none is running: a 1 Gb/s network, nearly full.
const RATE_ASSUMED: u64 = 100 << 20;
/// A node may be filled so far, in percent, by what another one leaves to it.
const FILL_PERCENT_MAX: u64 = 90;
/// Blocks of a volume that are looked at to see whether it has one in a lost group: of so many, every group has one.
pub const BLOCKS_LOOKED_AT: u64 = 65_536;

/// # Errors
/// 111 `MaintenanceStopsIo`, 106 `NodeNotFound`.
pub async fn set_maintenance(
    context: &Context,
    request: proto::SetMaintenanceRequest,
) -> Result<proto::NodePlan, ApiError> {
    let survey = Survey::take(context).await;
    let node = find_node(&survey.state, &request.node)?;
    let serves = survey.serves(node.id);
    let mut plan = plan(&survey, node);
    if request.on && serves {
        let others = |other| survey.serves(other) && !survey.state.is_in_maintenance(other);
        plan.groups_stopped = count(survey.state.stopped_without(node.id, others).len());
        plan.groups_at_risk = at_risk_without(&survey, node.id);
    }
    // A node that is down takes nothing with it.
    let force = request.force || !serves;
    let refusal = (plan.groups_stopped > 0 && !force).then(|| {
        let (name, groups) = (node.name.clone(), plan.groups_stopped as usize);
        Refusal::from(StateError::MaintenanceStopsIo { name, groups })
    });
    let command = Command::SetMaintenance { node: node.id, on: request.on, force };
    carry_out(context, &survey, command, plan, refusal, request.dry_run).await
}

/// # Errors
/// 112 `NodeNeeded`, also for more groups given up than agreed to, 113 `LastNode`, 114 `NodeIsUp`, 106 `NodeNotFound`.
pub async fn remove_node(
    context: &Context,
    request: proto::RemoveNodeRequest,
) -> Result<proto::NodePlan, ApiError> {
    let survey = Survey::take(context).await;
    let node = find_node(&survey.state, &request.node)?;
    let mut plan = plan(&survey, node);
    if request.cancel {
        let command = Command::LeaveNode { node: node.id, departure: Departure::Stays };
        return carry_out(context, &survey, command, plan, None, request.dry_run).await;
    }
    let moves = moves(&survey, node.id);
    plan.moves = count(moves.values().sum::<u64>());
    let replica_bytes = replica_bytes(&survey, node.id);
    plan.bytes_to_move = u64::from(plan.moves).saturating_mul(replica_bytes);
    let lost = held_alone(&survey, node.id);
    let departure = if request.force { Departure::Lost } else { Departure::Leaving };
    let refusal = if request.force {
        plan.groups_lost = lost.iter().map(|group| group.0).collect();
        plan.volumes_lost = volumes_of(&survey, &lost);
        plan.groups_in_doubt = count(in_doubt(&survey, node.id));
        is_up(&survey, node).or_else(|| more_than_agreed(node, &plan, request.agreed))
    } else {
        too_few_others(&survey, node)
            .or_else(|| without_room(&survey, node, &moves, replica_bytes))
            .or_else(|| dead_and_alone(&survey, node, lost.len()))
    };
    let command = Command::LeaveNode { node: node.id, departure };
    carry_out(context, &survey, command, plan, refusal, request.dry_run).await
}

/// What a node with one store of this size takes over when it joins.
///
/// # Errors
/// 2 `InvalidArgument`: without capacity it takes nothing.
pub fn plan_join(survey: &Survey, request: proto::PlanJoinRequest) -> Result<proto::NodePlan, ApiError> {
    if request.capacity_bytes == 0 {
        return Err(ApiError::Invalid { field: "capacity_bytes", object: "a new node".to_owned() });
    }
    let newest = survey.state.map().nodes.keys().next_back();
    // Which groups move depends on the numbers that it gets, how many of them hardly does.
    let node = NodeId(newest.map_or(0, |node| node.0) + 1);
    let stores = vec![(StoreId(u64::MAX), request.capacity_bytes)];
    let mut candidates = survey.state.candidates(&survey.out());
    candidates.push(Candidate { node, failure_domain: request.failure_domain, stores });
    let missing = missing(survey, &candidates);
    let able = missing.iter().filter(|(to, _)| **to == node || survey.serves(**to));
    let moves: u64 = able.map(|(_, count)| count).sum();
    Ok(proto::NodePlan {
        name: "a new node".to_owned(),
        moves: count(moves),
        bytes_to_move: moves.saturating_mul(mean_replica_bytes(survey, survey.answers.keys())),
        ..at_rate(survey)
    })
}

/// Proposes `command`, or only says what would become of it.
async fn carry_out(
    context: &Context,
    survey: &Survey,
    command: Command,
    mut plan: proto::NodePlan,
    refusal: Option<Refusal>,
    dry_run: bool,
) -> Result<proto::NodePlan, ApiError> {
    if dry_run {
        let refusal = refusal.or_else(|| match (*survey.state).clone().apply(&command).0 {
            Reply::Refused(refusal) => Some(refusal),
            _ => None,
        });
        plan.refusal = refusal.as_ref().map(proto::ErrorDetail::from);
        return Ok(plan);
    }
    if let Some(refusal) = refusal {
        return Err(ApiError::Refused(refusal));
    }
    context.propose(command).await?;
    Ok(plan)
}

fn count(number: impl TryInto<u32>) -> u32 {
    number.try_into().unwrap_or(u32::MAX)
}

/// How fast data moves.
fn at_rate(survey: &Survey) -> proto::NodePlan {
    let rate = survey.resync_rate();
    let bytes_per_second = if rate > 0 { rate } else { RATE_ASSUMED };
    proto::NodePlan { bytes_per_second, rate_is_measured: rate > 0, ..proto::NodePlan::default() }
}

/// What the node has, and how fast data moves.
fn plan(survey: &Survey, node: &Node) -> proto::NodePlan {
    let groups = || survey.state.groups().map(|(_, group)| group);
    proto::NodePlan {
        name: node.name.clone(),
        node: node.id.0,
        groups: count(groups().filter(|group| group.member(node.id).is_some()).count()),
        primary_groups: count(groups().filter(|group| group.primary == Some(node.id)).count()),
        ..at_rate(survey)
    }
}

/// Groups that one more failure stops while `node` is down.
fn at_risk_without(survey: &Survey, node: NodeId) -> u32 {
    let groups = survey.state.groups().filter(|(pool, group)| {
        let acts = group.acting().any(|member| member.node == node);
        acts && is_at_risk(pool, survey.acting(group).saturating_sub(1))
    });
    count(groups.count())
}

/// Who can take replicas of `node` over: those that serve, and those in maintenance, which come back.
fn others(survey: &Survey, node: NodeId) -> Vec<Candidate> {
    let state = &*survey.state;
    let is_away = |other: &NodeId| !survey.serves(*other) && !state.is_in_maintenance(*other);
    let away = state.map().nodes.keys().copied().filter(is_away);
    state.candidates(&away.chain([node]).collect::<BTreeSet<_>>())
}

/// Replicas that each node gets when `node` leaves, as far as the nodes are up.
fn moves(survey: &Survey, node: NodeId) -> BTreeMap<NodeId, u64> {
    missing(survey, &others(survey, node))
}

/// Replicas that each of these nodes lacks, where groups have theirs there.
fn missing(survey: &Survey, candidates: &[Candidate]) -> BTreeMap<NodeId, u64> {
    let map = survey.state.map();
    let mut missing = BTreeMap::new();
    for placement in map.pools.values().flat_map(|pool| place_what_fits(pool, candidates)) {
        let group = &map.groups[&placement.group];
        for replica in placement.replicas.iter().filter(|replica| group.member(replica.node).is_none()) {
            *missing.entry(replica.node).or_default() += 1;
        }
    }
    missing
}

/// About so many bytes are in the replicas that are to be made, and are not begun: only some groups at a time move one.
pub fn waiting_bytes(survey: &Survey) -> u64 {
    let missing = missing(survey, &survey.state.candidates(&survey.out()));
    // What is missing on a node that is down waits for that.
    let replicas: u64 =
        missing.iter().filter(|(node, _)| survey.serves(**node)).map(|(_, count)| count).sum();
    replicas.saturating_mul(mean_replica_bytes(survey, survey.answers.keys()))
}

/// Used and total bytes of a node's stores, as it says.
fn space(survey: &Survey, node: NodeId) -> Option<(u64, u64)> {
    let data = survey.answers.get(&node)?.status.data.as_ref()?;
    let used = data.stores.iter().map(|store| store.used_bytes).sum();
    Some((used, data.stores.iter().map(|store| store.capacity_bytes).sum()))
}

/// Bytes of one replica of a group: on `node`, or on the others when it does not answer.
fn replica_bytes(survey: &Survey, node: NodeId) -> u64 {
    let answers = survey.answers.get(&node).is_some_and(|answer| answer.status.data.is_some());
    if answers {
        mean_replica_bytes(survey, [&node])
    } else {
        mean_replica_bytes(survey, survey.answers.keys())
    }
}

/// Of those on `nodes`, as far as they answer. What is in the journals counts as if it were all different, so this is more
/// rather than less.
fn mean_replica_bytes<'a>(survey: &Survey, nodes: impl IntoIterator<Item = &'a NodeId>) -> u64 {
    let held = |node: &NodeId| {
        let data = survey.answers.get(node)?.status.data.as_ref()?;
        let bytes: u64 = data.stores.iter().map(|store| store.used_bytes + store.journal_used_bytes).sum();
        let replicas = survey.state.groups().filter(|(_, group)| group.member(*node).is_some()).count();
        Some((bytes, replicas as u64))
    };
    let told = nodes.into_iter().filter_map(held);
    let (bytes, replicas) = told.fold((0, 0), |(bytes, replicas), more| (bytes + more.0, replicas + more.1));
    bytes.checked_div(replicas).unwrap_or(0)
}

/// Groups of which no other node that is not lost surely holds everything: who was only just taken in may lack the last of it.
fn held_alone(survey: &Survey, node: NodeId) -> Vec<GroupId> {
    let goes = |other: NodeId| other == node || survey.state.departure(other) == Departure::Lost;
    let alone = survey.state.groups().filter(|(_, group)| {
        group.holders().any(|member| member.node == node) && group.holders().all(|member| goes(member.node))
    });
    alone.map(|(_, group)| group.id).collect()
}

/// Groups of which others have a copy, but none that serves surely has everything: it is on nodes that are down, or lost some of it.
fn in_doubt(survey: &Survey, node: NodeId) -> usize {
    let stays = |other: NodeId| other != node && survey.state.departure(other) != Departure::Lost;
    let groups = survey.state.groups().filter(|(_, group)| {
        let mut others = group.holders().filter(|member| stays(member.node)).peekable();
        let holds = group.holders().any(|member| member.node == node);
        holds && others.peek().is_some() && others.all(|member| !survey.has_everything(group.id, member))
    });
    groups.count()
}

/// Names of the volumes that have a block in one of `groups`.
fn volumes_of(survey: &Survey, groups: &[GroupId]) -> Vec<String> {
    let map = survey.state.map();
    let groups: BTreeSet<&GroupId> = groups.iter().collect();
    let pools: BTreeSet<PoolId> = groups.iter().map(|group| group.pool()).collect();
    // What has no block there is told so only after all its blocks were looked at.
    let concerned = map.volumes.values().filter(|volume| pools.contains(&volume.pool)).filter(|volume| {
        let Some(pool) = map.pools.get(&volume.pool) else { return false };
        let blocks = volume.size_bytes.div_ceil(BLOCK_SIZE as u64).min(BLOCKS_LOOKED_AT);
        let index = |block: u64| BlockIndex(u32::try_from(block).expect("few are looked at"));
        (0..blocks).any(|block| groups.contains(&pool.group_of(volume.lineage, index(block))))
    });
    concerned.map(|volume| volume.name.clone()).collect()
}

/// Only a node that serves nothing can be given up.
fn is_up(survey: &Survey, node: &Node) -> Option<Refusal> {
    survey.serves(node.id).then(|| Refusal {
        code: Code::NodeIsUp,
        object: format!("node {}", node.name),
        message: format!("node {} is not down; --force gives up a node that does not come back", node.name),
    })
}

fn needed(node: &Node, message: String) -> Refusal {
    Refusal { code: Code::NodeNeeded, object: format!("node {}", node.name), message }
}

/// More would be given up than the operator has agreed to: others died, or were given up, while they were asked.
fn more_than_agreed(
    node: &Node,
    plan: &proto::NodePlan,
    agreed: Option<proto::AgreedLosses>,
) -> Option<Refusal> {
    let agreed = agreed?;
    let (lost, in_doubt) = (plan.groups_lost.len() as u32, plan.groups_in_doubt);
    let all_agreed = agreed.groups_lost.saturating_add(agreed.groups_in_doubt);
    let name = &node.name;
    (lost > agreed.groups_lost || lost + in_doubt > all_agreed).then(|| {
        let message = format!(
            "node {name}: by now {lost} groups would be lost and {in_doubt} at risk, more than was agreed to; look again"
        );
        needed(node, message)
    })
}

/// The nodes that are there can not hold as many replicas as every pool wants.
fn too_few_others(survey: &Survey, node: &Node) -> Option<Refusal> {
    let candidates = others(survey, node.id);
    let error = survey.state.map().pools.values().find_map(|pool| place(pool, &candidates).err())?;
    Some(needed(
        node,
        format!("node {} can not go: without it and the nodes that are down, {error}", node.name),
    ))
}

/// The nodes that get the replicas have too little space.
fn without_room(
    survey: &Survey,
    node: &Node,
    moves: &BTreeMap<NodeId, u64>,
    replica_bytes: u64,
) -> Option<Refusal> {
    let full = moves.iter().find_map(|(to, replicas)| {
        let (used, capacity) = space(survey, *to)?;
        let gets = replicas.saturating_mul(replica_bytes);
        (used.saturating_add(gets) > capacity / 100 * FILL_PERCENT_MAX).then_some((to, used, capacity, gets))
    });
    let (to, used, capacity, gets) = full?;
    let name = survey.state.map().nodes.get(to).map_or_else(|| to.to_string(), |node| node.name.clone());
    Some(needed(
        node,
        format!(
            "node {} can not go: node {name} would get {gets} bytes, has {used} of {capacity} in use, and may be \
             filled to {FILL_PERCENT_MAX} %",
            node.name
        ),
    ))
}

/// A node that is down can not give what only it has.
fn dead_and_alone(survey: &Survey, node: &Node, lost: usize) -> Option<Refusal> {
    (lost > 0 && !survey.serves(node.id)).then(|| {
        needed(
            node,
            format!(
                "node {} is down and holds the only copy of {lost} groups; bring it back, or give them up with --force",
                node.name
            ),
        )
    })
}

#[cfg(test)]
mod tests;
