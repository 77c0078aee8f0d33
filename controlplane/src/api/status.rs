//! The state of the cluster, its nodes and its volumes, in the words of the API.

use std::collections::BTreeMap;

use xsan_protocol::ids::{NodeId, PoolId};
use xsan_protocol::map::{Group, Node, Pool, Volume};
use xsan_protocol::proto;

use super::health;
use super::life::waiting_bytes;
use super::survey::Survey;
use crate::state::command::milliseconds;
use crate::state::{ClusterState, Departure};

/// How a group serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Service {
    Healthy,
    Degraded,
    Inactive,
}

fn service(pool: &Pool, acting: usize) -> Service {
    if acting < usize::from(pool.min_replicas) {
        Service::Inactive
    } else if acting < usize::from(pool.replica_count) {
        Service::Degraded
    } else {
        Service::Healthy
    }
}

/// Does one more failure stop a group with so many acting members?
pub fn is_at_risk(pool: &Pool, acting: usize) -> bool {
    pool.replica_count > 1 && acting == usize::from(pool.min_replicas)
}

/// Every volume, in the order of their ids.
pub fn volumes(survey: &Survey) -> Vec<proto::VolumeStatus> {
    let mut worst: BTreeMap<PoolId, Service> = BTreeMap::new();
    for (pool, group) in survey.state.groups() {
        let service = service(pool, survey.acting(group));
        worst.entry(pool.id).and_modify(|worst| *worst = service.max(*worst)).or_insert(service);
    }
    let volumes = survey.state.map().volumes.values();
    volumes.map(|known| volume(&survey.state, known, worst.get(&known.pool).copied())).collect()
}

fn volume(state: &ClusterState, volume: &Volume, worst: Option<Service>) -> proto::VolumeStatus {
    let pool = &state.map().pools[&volume.pool];
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

pub fn settings(state: &ClusterState) -> proto::ClusterSettings {
    let settings = state.settings();
    proto::ClusterSettings {
        down_out_interval_ms: milliseconds(settings.down_out_interval),
        scrub_bytes_per_second: settings.scrub_bytes_per_second,
        scrub_interval_ms: milliseconds(settings.scrub_interval),
        deep_scrub_interval_ms: milliseconds(settings.deep_scrub_interval),
        demote_slow_nodes: settings.demote_slow_nodes,
    }
}

/// The whole cluster, with what is to be mended.
pub fn cluster(survey: &Survey) -> proto::ClusterStatusReply {
    let state = &*survey.state;
    let statuses: Vec<_> = state.map().nodes.values().map(|known| node(survey, known)).collect();
    let data = || survey.answers.values().filter_map(|answer| answer.status.data.as_ref());
    let groups = proto::GroupCounts {
        resync_bytes_moved: data().map(|data| data.resync_bytes_moved).sum(),
        resync_bytes_left: data().map(|data| data.resync_bytes_left).sum::<u64>() + waiting_bytes(survey),
        resync_bytes_per_second: survey.resync_rate(),
        ..counts(survey)
    };
    // Capacity of which nobody knows how much is used would make the rest look emptier than it is.
    let known = || statuses.iter().filter_map(|node| Some((node.capacity_bytes, node.used_bytes?)));
    let mut status = proto::ClusterStatusReply {
        cluster_id: state.map().cluster_id.clone(),
        map_version: state.version().0,
        leader: survey.leader.0,
        raft_term: survey.term,
        groups: Some(groups),
        volume_count: u32::try_from(state.map().volumes.len()).expect("volume ids are 32 bits"),
        capacity_bytes: known().map(|(capacity, _)| capacity).sum(),
        used_bytes: known().map(|(_, used)| used).sum(),
        nodes: statuses,
        settings: Some(settings(state)),
        findings: Vec::new(),
    };
    status.findings = health::findings(survey, &status);
    status
}

fn counts(survey: &Survey) -> proto::GroupCounts {
    let mut counts = proto::GroupCounts::default();
    for (pool, group) in survey.state.groups() {
        let acting = survey.acting(group);
        counts.total += 1;
        match service(pool, acting) {
            Service::Healthy => counts.healthy += 1,
            Service::Degraded => counts.degraded += 1,
            Service::Inactive => counts.inactive += 1,
        }
        counts.resyncing += u32::from(group.learners().count() > 0);
        counts.at_risk += u32::from(is_at_risk(pool, acting));
    }
    counts
}

fn node(survey: &Survey, node: &Node) -> proto::NodeStatus {
    let state = &*survey.state;
    let answer = survey.answers.get(&node.id).map(|answer| &answer.status);
    let health = survey.health.get(&node.id);
    let count =
        |holds: &dyn Fn(&Group) -> bool| state.groups().filter(|(_, group)| holds(group)).count() as u32;
    let member =
        |learner: bool| count(&|group| group.member(node.id).is_some_and(|member| member.learner == learner));
    let departure = state.departure(node.id);
    let heard = health.map_or(answer.is_some(), |health| health.heard || answer.is_some());
    let word = match (heard, survey.serves(node.id)) {
        (_, true) => "up",
        (true, false) => "data-down",
        (false, false) => "down",
    };
    let told = answer.and_then(|answer| answer.data.as_ref());
    let stores = told.map_or_else(|| known_stores(node), |data| data.stores.clone());
    proto::NodeStatus {
        node: Some(node.into()),
        state: word.to_owned(),
        leader: node.id == survey.leader,
        last_heartbeat_age_ms: health.and_then(|health| health.heartbeat_age_ms),
        primary_groups: count(&|group| group.primary == Some(node.id)),
        member_groups: member(false),
        learner_groups: member(true),
        used_bytes: told.map(|data| data.stores.iter().map(|store| store.used_bytes).sum()),
        capacity_bytes: stores.iter().map(|store| store.capacity_bytes).sum(),
        release: answer.map(|answer| answer.release.clone()).unwrap_or_default(),
        stores,
        maintenance: state.is_in_maintenance(node.id),
        leaving: departure != Departure::Stays,
        lost: departure == Departure::Lost,
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
