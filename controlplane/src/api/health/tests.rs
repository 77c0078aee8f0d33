use std::collections::HashMap;
use std::sync::Arc;

use xsan_protocol::ids::{BootId, Incarnation, ShardIndex, StoreId};
use xsan_protocol::map::{DataProcess, Durability, Store};

use super::super::survey::Answer;
use super::*;
use crate::state::command::{Command, NewNode, NewVolume};
use crate::state::{ClusterState, Departure};

const CAPACITY: u64 = 1000;

/// Three nodes, all voters, one volume of three replicas.
fn state() -> ClusterState {
    let mut state = ClusterState::default();
    for node in 1..=3 {
        state.apply(&Command::AddNode(NewNode {
            cluster_id: "c1".into(),
            name: format!("n{node}"),
            address: "127.0.0.1".parse().expect("an address"),
            control_port: 8080,
            failure_domain: "default".into(),
            instance: u64::from(node),
            founder: node == 1,
        }));
        let store = Store {
            id: StoreId(u64::from(node)),
            capacity_bytes: CAPACITY,
            shard: ShardIndex(0),
            device: "/dev/x".into(),
            media: "ssd".into(),
            failed: false,
        };
        let process = DataProcess {
            incarnation: Incarnation(u64::from(node)),
            boot_id: BootId(7),
            shard_ports: vec![9100],
            nbd_port: 10809,
            stores: vec![store],
        };
        state.apply(&Command::DataStarted { node: NodeId(node), process, damaged: vec![] });
    }
    state.apply(&Command::CreateVolume(NewVolume {
        name: "vm".into(),
        size_bytes: 1 << 30,
        replica_count: 3,
        policy: String::new(),
        durability: Durability::OnFlush,
        created_unix_ms: 1,
        request: 1,
        group_count: 256,
    }));
    state.set_voters([NodeId(1), NodeId(2), NodeId(3)].into());
    state
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

/// Answers of the nodes but `down`; node 1 leads.
fn answers(down: &[u32]) -> HashMap<NodeId, Answer> {
    let health = |node: u32| {
        let up = !down.contains(&node);
        proto::NodeHealth { node, up, heard: up, heartbeat_age_ms: if up { 100 } else { 42_000 } }
    };
    let answer = |node: u32| proto::LocalStatusReply {
        data: Some(proto::DataStatus { stores: vec![store_status(node, 100)], ..Default::default() }),
        release: "0.1.0".into(),
        health: if node == 1 { (1..=3).map(health).collect() } else { vec![] },
        ..Default::default()
    };
    let up = (1..=3).filter(|node| !down.contains(node));
    up.map(|node| (NodeId(node), Answer { status: answer(node), skew_ms: 0 })).collect()
}

fn found(state: &ClusterState, answers: HashMap<NodeId, Answer>) -> Vec<(String, String)> {
    let survey = Survey::new(Arc::new(state.clone()), answers, NodeId(1), 1);
    findings(&survey).findings.into_iter().map(|finding| (finding.code, finding.object)).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(code, object)| ((*code).to_owned(), (*object).to_owned())).collect()
}

#[test]
fn nothing_is_found_where_all_is_well() {
    assert_eq!(found(&state(), answers(&[])), []);
}

#[test]
fn a_dead_node_is_found_with_what_follows_from_it() {
    let expected = [
        ("NODE_DOWN", "node n3"),
        ("NO_QUORUM_MARGIN", "cluster c1"),
        ("GROUPS_DEGRADED", "groups"),
        ("GROUPS_AT_RISK", "groups"),
    ];
    assert_eq!(found(&state(), answers(&[3])), pairs(&expected));
    let two = found(&state(), answers(&[2, 3]));
    assert_eq!(two[0], ("GROUPS_UNAVAILABLE".to_owned(), "groups".to_owned()));
}

#[test]
fn without_a_leader_nobody_knows() {
    let mut answers = answers(&[]);
    answers.remove(&NodeId(1));
    assert_eq!(found(&state(), answers)[0].0, "NO_LEADER");
}

#[test]
fn a_data_process_that_does_not_serve_is_told_from_a_dead_node() {
    let mut answers = answers(&[]);
    let leader = answers.get_mut(&NodeId(1)).expect("it answers");
    leader.status.health[1].up = false;
    let codes: Vec<_> = found(&state(), answers).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, ["DATA_DOWN", "GROUPS_DEGRADED", "GROUPS_AT_RISK"]);
}

#[test]
fn stores_are_found_full_failed_and_damaged() {
    let state = state();
    let check = |change: &dyn Fn(&mut proto::StoreStatus), expected: &[&str]| {
        let mut answers = answers(&[]);
        let data = answers.get_mut(&NodeId(2)).expect("it answers").status.data.as_mut().expect("data");
        change(&mut data.stores[0]);
        let object = "store 0000000000000002 of node n2";
        let expected: Vec<_> = expected.iter().map(|code| (*code, object)).collect();
        assert_eq!(found(&state, answers), pairs(&expected));
    };
    check(&|store| store.used_bytes = 850, &[]);
    check(&|store| store.used_bytes = 860, &["STORE_NEARFULL"]);
    check(&|store| store.used_bytes = 960, &["STORE_FULL"]);
    check(&|store| store.failed = true, &["STORE_FAILED"]);
    check(&|store| store.checksum_errors = 1, &["CHECKSUM_ERRORS"]);
    check(&|store| (store.capacity_bytes, store.used_bytes) = (0, 5), &[]);
}

#[test]
fn wishes_of_the_operator_slow_members_clocks_and_releases_are_told() {
    let mut state = state();
    state.apply(&Command::SetMaintenance { node: NodeId(2), on: true, force: true });
    state.apply(&Command::LeaveNode { node: NodeId(3), departure: Departure::Lost });
    let mut answers = answers(&[]);
    let first = answers.get_mut(&NodeId(1)).expect("it answers");
    first.skew_ms = 5000;
    first.status.release = "0.2.0".into();
    let slow = proto::SlowMember { node: 2, us_p99: 9000, us_p99_peers: 100 };
    first.status.data.as_mut().expect("data").slow_members.push(slow);
    let expected = [
        ("SLOW_MEMBER", "node n2"),
        ("CLOCK_SKEW", "node n1"),
        ("NODE_MAINTENANCE", "node n2"),
        ("NODE_LEAVING", "node n3"),
        ("RELEASES_MIXED", "cluster c1"),
    ];
    assert_eq!(found(&state, answers), pairs(&expected));
}
