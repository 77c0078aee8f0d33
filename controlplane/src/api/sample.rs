//! A cluster of a few nodes and what they answer, for the tests of what is worked out from a survey.

use std::collections::HashMap;
use std::sync::Arc;

use xsan_protocol::ids::{BootId, Incarnation, NodeId, ShardIndex, StoreId};
use xsan_protocol::map::{DataProcess, Durability, Store};
use xsan_protocol::proto;

use super::survey::{Answer, Survey};
use crate::state::ClusterState;
use crate::state::command::{Command, NewNode, NewVolume};

/// When surveys are taken; the volume was made then, too.
pub const NOW_UNIX_MS: u64 = 1_795_000_000_000;
/// Of each node's one store.
pub const CAPACITY: u64 = 1000;

/// A life of a data process with one store, on its host's first boot.
pub fn process(store: StoreId, incarnation: Incarnation) -> DataProcess {
    let store = Store {
        id: store,
        capacity_bytes: CAPACITY,
        shard: ShardIndex(0),
        device: "/dev/x".into(),
        media: "ssd".into(),
        failed: false,
        failed_before: false,
    };
    DataProcess {
        incarnation,
        boot_id: BootId(7),
        shard_ports: vec![9100],
        nbd_port: 10809,
        stores: vec![store],
    }
}

/// So many nodes, the first three voters, and one volume with so many replicas.
pub fn state(node_count: u32, replica_count: u8) -> ClusterState {
    let mut state = ClusterState::default();
    (1..=node_count).for_each(|node| add_node(&mut state, node));
    state.apply(&Command::CreateVolume(NewVolume {
        name: "vm".into(),
        size_bytes: 1 << 30,
        replica_count,
        policy: String::new(),
        durability: Durability::OnFlush,
        created_unix_ms: NOW_UNIX_MS,
        request: 1,
        group_count: 256,
    }));
    state.set_voters([NodeId(1), NodeId(2), NodeId(3)].into());
    state
}

/// One more node, the first life of its data process, and no replica.
pub fn add_node(state: &mut ClusterState, node: u32) {
    state.apply(&Command::AddNode(NewNode {
        cluster_id: "c1".into(),
        name: format!("n{node}"),
        address: "127.0.0.1".parse().expect("an address"),
        control_port: 8080,
        failure_domain: "default".into(),
        instance: u64::from(node),
        founder: node == 1,
    }));
    let process = process(StoreId(u64::from(node)), Incarnation(u64::from(node)));
    let node = NodeId(node);
    state.apply(&Command::DataStarted { node, process, damaged_stores: vec![], replaces: None });
}

fn store_status(node: u32, used_bytes: u64) -> proto::StoreStatus {
    proto::StoreStatus {
        id: u64::from(node),
        device: "/dev/x".into(),
        capacity_bytes: CAPACITY,
        used_bytes,
        ..Default::default()
    }
}

/// Answers of so many nodes but those that are `down`; node 1 leads. Each has used 100 bytes.
pub fn answers(node_count: u32, down: &[u32]) -> HashMap<NodeId, Answer> {
    let health = |node: u32| {
        let up = !down.contains(&node);
        let heartbeat_age_ms = Some(if up { 100 } else { 42_000 });
        proto::NodeHealth { node, up, heard: up, heartbeat_age_ms, out: false }
    };
    let answer = |node: u32| proto::LocalStatusReply {
        data: Some(proto::DataStatus { stores: vec![store_status(node, 100)], ..Default::default() }),
        release: "0.1.0".into(),
        health: if node == 1 { (1..=node_count).map(health).collect() } else { vec![] },
        ..Default::default()
    };
    let up = (1..=node_count).filter(|node| !down.contains(node));
    up.map(|node| (NodeId(node), Answer { status: answer(node), skew_ms: 0 })).collect()
}

pub fn survey(state: &ClusterState, answers: HashMap<NodeId, Answer>) -> Survey {
    Survey::new(Arc::new(state.clone()), answers, NodeId(1), 1, NOW_UNIX_MS)
}
