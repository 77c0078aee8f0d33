//! The state of the cluster, its nodes and its volumes, in the words of the API.

use std::collections::HashMap;

use futures::future::join_all;
use xsan_protocol::ids::NodeId;
use xsan_protocol::map::{Group, Node, Pool, Volume};
use xsan_protocol::proto;

use super::{Context, gather};
use crate::state::ClusterState;

/// How a group serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Service {
    Healthy,
    Degraded,
    Inactive,
}

/// What the leader says of each node; empty when there is none.
type Health = HashMap<NodeId, proto::NodeHealth>;

/// A member counts when the leader has no reason to think otherwise.
fn acting(group: &Group, health: &Health) -> usize {
    group.acting().filter(|member| health.get(&member.node).is_none_or(|health| health.up)).count()
}

fn service(pool: &Pool, group: &Group, health: &Health) -> Service {
    let acting = acting(group, health);
    if acting < usize::from(pool.min_replicas) {
        Service::Inactive
    } else if acting < usize::from(pool.replica_count) {
        Service::Degraded
    } else {
        Service::Healthy
    }
}

fn groups(state: &ClusterState) -> impl Iterator<Item = (&Pool, &Group)> {
    let map = state.map();
    map.pools.values().flat_map(move |pool| pool.groups().map(move |id| (pool, &map.groups[&id])))
}

pub fn volume(state: &ClusterState, volume: &Volume) -> proto::VolumeStatus {
    let pool = &state.map().pools[&volume.pool];
    let none = Health::new();
    let worst = groups(state)
        .filter(|(other, _)| other.id == pool.id)
        .map(|(pool, group)| service(pool, group, &none))
        .max();
    let word = match worst {
        Some(Service::Inactive) => "inactive",
        Some(Service::Degraded) => "degraded",
        Some(Service::Healthy) | None => "healthy",
    };
    let name = |node: &NodeId| state.map().nodes.get(node).map_or(node.to_string(), |node| node.name.clone());
    proto::VolumeStatus {
        volume: Some(volume.into()),
        replica_count: u32::from(pool.replica_count),
        min_replicas: u32::from(pool.min_replicas),
        state: word.to_owned(),
        attached: volume.attached_nodes.iter().map(name).collect(),
    }
}

/// The whole cluster, with what its nodes answer within a deadline.
pub async fn cluster(context: &Context) -> proto::ClusterStatusReply {
    let state = context.handle.state();
    let nodes: Vec<&Node> = state.map().nodes.values().collect();
    let answers = join_all(nodes.iter().map(|node| gather::status(context, node))).await;
    let health: Health = answers
        .iter()
        .flatten()
        .flat_map(|answer| &answer.health)
        .map(|health| (NodeId(health.node), *health))
        .collect();
    let leader = context.handle.leader();
    let leading = leader.as_ref().map_or(NodeId(0), |(leader, _)| *leader);
    let statuses: Vec<_> = nodes
        .iter()
        .zip(&answers)
        .map(|(known, answer)| node(&state, known, answer.as_ref(), health.get(&known.id), leading))
        .collect();
    let data = || answers.iter().flatten().filter_map(|answer| answer.data.as_ref());
    let groups = proto::GroupCounts {
        resync_bytes_moved: data().map(|data| data.resync_bytes_moved).sum(),
        resync_bytes_left: data().map(|data| data.resync_bytes_left).sum(),
        ..counts(&state, &health)
    };
    proto::ClusterStatusReply {
        cluster_id: state.map().cluster_id.clone(),
        map_version: state.version().0,
        leader: leading.0,
        raft_term: context.handle.metrics().current_term,
        groups: Some(groups),
        volume_count: u32::try_from(state.map().volumes.len()).expect("volume ids are 32 bits"),
        capacity_bytes: statuses.iter().map(|node| node.capacity_bytes).sum(),
        used_bytes: statuses.iter().map(|node| node.used_bytes).sum(),
        nodes: statuses,
    }
}

fn counts(state: &ClusterState, health: &Health) -> proto::GroupCounts {
    let mut counts = proto::GroupCounts::default();
    for (pool, group) in groups(state) {
        counts.total += 1;
        match service(pool, group, health) {
            Service::Healthy => counts.healthy += 1,
            Service::Degraded => counts.degraded += 1,
            Service::Inactive => counts.inactive += 1,
        }
        let resyncing = group.learners().count() > 0;
        counts.resyncing += u32::from(resyncing);
        let at_risk = pool.replica_count > 1 && acting(group, health) == usize::from(pool.min_replicas);
        counts.at_risk += u32::from(at_risk);
    }
    counts
}

fn node(
    state: &ClusterState,
    node: &Node,
    answer: Option<&proto::LocalStatusReply>,
    health: Option<&proto::NodeHealth>,
    leader: NodeId,
) -> proto::NodeStatus {
    let member = |learner: bool| {
        groups(state)
            .filter(|(_, group)| group.member(node.id).is_some_and(|member| member.learner == learner))
            .count() as u32
    };
    let heard = health.map_or(answer.is_some(), |health| health.heard || answer.is_some());
    let up = health.map_or(answer.is_some_and(|answer| answer.data.is_some()), |health| health.up);
    let word = match (heard, up) {
        (_, true) => "up",
        (true, false) => "data-down",
        (false, false) => "down",
    };
    let told = answer.and_then(|answer| answer.data.as_ref());
    let stores = told.map_or_else(|| known_stores(node), |data| data.stores.clone());
    proto::NodeStatus {
        node: Some(node.into()),
        state: word.to_owned(),
        leader: node.id == leader,
        last_heartbeat_age_ms: health.map_or(0, |health| health.heartbeat_age_ms),
        primary_groups: groups(state).filter(|(_, group)| group.primary == Some(node.id)).count() as u32,
        member_groups: member(false),
        learner_groups: member(true),
        used_bytes: stores.iter().map(|store| store.used_bytes).sum(),
        capacity_bytes: stores.iter().map(|store| store.capacity_bytes).sum(),
        release: answer.map(|answer| answer.release.clone()).unwrap_or_default(),
        stores,
    }
}

/// The stores of a node that does not answer, as the map has them.
fn known_stores(node: &Node) -> Vec<proto::StoreStatus> {
    let stores = node.data.as_ref().map_or(&[][..], |data| &data.stores);
    stores
        .iter()
        .map(|store| proto::StoreStatus {
            id: store.id.0,
            device: store.device.clone(),
            media: store.media.clone(),
            capacity_bytes: store.capacity_bytes,
            failed: store.failed,
            ..proto::StoreStatus::default()
        })
        .collect()
}
