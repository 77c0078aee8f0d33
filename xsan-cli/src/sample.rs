//! A three-node cluster in replies, for the tests of what is shown: node-003 is down, one group lacks a replica.

use xsan_protocol::health::Check;
use xsan_protocol::proto::*;

const GIB: u64 = 1 << 30;

pub fn data_process(incarnation: u64) -> DataProcess {
    DataProcess {
        incarnation,
        boot_id: 0xb007,
        shard_ports: vec![9100, 9101],
        nbd_port: 10809,
        stores: vec![Store {
            id: 0x0123_4567_89ab_cdef,
            capacity_bytes: 8 * GIB,
            shard: 0,
            device: "/var/lib/xsan/data/store-0.img".into(),
            media: "ssd".into(),
            failed: false,
            failed_before: false,
        }],
    }
}

pub fn node(id: u32) -> Node {
    Node {
        id,
        name: format!("node-{id:03}"),
        address: format!("127.0.0.{id}"),
        control_port: 8080,
        failure_domain: if id == 3 { "rack-2".into() } else { "rack-1".into() },
        voter: true,
        data: Some(data_process(u64::from(id) + 10)),
    }
}

pub fn node_status(id: u32) -> NodeStatus {
    NodeStatus {
        node: Some(node(id)),
        state: if id == 3 { "down".into() } else { "up".into() },
        leader: id == 1,
        last_heartbeat_age_ms: Some(if id == 3 { 42_000 } else { 120 }),
        primary_groups: if id == 3 { 0 } else { 128 },
        member_groups: if id == 3 { 0 } else { 256 },
        learner_groups: if id == 3 { 256 } else { 0 },
        used_bytes: Some(1_500_000_000),
        capacity_bytes: 8 * GIB,
        release: "0.1.0".into(),
        stores: vec![StoreStatus {
            id: 0x0123_4567_89ab_cdef,
            device: "/var/lib/xsan/data/store-0.img".into(),
            media: "ssd".into(),
            capacity_bytes: 8 * GIB,
            used_bytes: 1_500_000_000,
            journal_bytes: GIB,
            journal_used_bytes: 300 << 20,
            failed: false,
            checksum_errors: u64::from(id == 2),
            repaired_pages: u64::from(id == 2),
            problem: String::new(),
            write_us_p99: Some(180),
            cache_device: if id == 2 { "/dev/nvme0n1".into() } else { String::new() },
        }],
        ..NodeStatus::default()
    }
}

pub fn cluster_status() -> ClusterStatusReply {
    ClusterStatusReply {
        cluster_id: "xsan-cluster-001".into(),
        map_version: 42,
        leader: 1,
        raft_term: 3,
        nodes: (1..=3).map(node_status).collect(),
        groups: Some(GroupCounts {
            total: 256,
            healthy: 0,
            degraded: 256,
            inactive: 0,
            resyncing: 12,
            at_risk: 256,
            resync_bytes_moved: 12 << 20,
            resync_bytes_left: 100 << 20,
            resync_bytes_per_second: 10 << 20,
        }),
        volume_count: 1,
        capacity_bytes: 24 * GIB,
        used_bytes: 4_500_000_000,
        settings: Some(ClusterSettings {
            down_out_interval_ms: 600_000,
            scrub_bytes_per_second: 50 << 20,
            scrub_interval_ms: 86_400_000,
            deep_scrub_interval_ms: 7 * 86_400_000,
            demote_slow_nodes: false,
        }),
        findings: vec![
            finding(Check::NodeDown, "node node-003", "no beat for 42 s"),
            finding(
                Check::GroupsDegraded,
                "groups",
                "256 of 256 groups have fewer live replicas than wanted",
            ),
            finding(Check::Resync, "groups", "12 of 256 groups bring a replica up to date"),
        ],
    }
}

pub fn finding(check: Check, object: &str, message: &str) -> Finding {
    Finding {
        code: check.code().into(),
        severity: check.severity().name().into(),
        object: object.into(),
        message: message.into(),
        remedy: check.remedy().into(),
    }
}

pub fn volume() -> Volume {
    Volume {
        id: 1,
        name: "vm-1".into(),
        lineage: 0xfeed_beef,
        layer: 1,
        size_bytes: 100_000_000_000,
        pool: 0,
        durability: Durability::OnFlush as i32,
        policy: String::new(),
        created_unix_ms: 1_795_235_400_000,
        attached_nodes: vec![2],
    }
}

pub fn volume_status() -> VolumeStatus {
    VolumeStatus {
        volume: Some(volume()),
        replica_count: 3,
        min_replicas: 2,
        state: "degraded".into(),
        attached: vec!["node-002".into()],
    }
}

fn member(node: u32, learner: bool) -> Member {
    Member {
        node,
        store: 0x0123_4567_89ab_cdef,
        incarnation: u64::from(node) + 10,
        boot_id: 0xb007,
        learner,
        damaged: false,
    }
}

/// Four groups; node 3 is a learner of all, group 3 has no primary.
pub fn map() -> ClusterMap {
    let group = |id: u32| Group {
        id,
        epoch: 5 + id,
        primary: [1, 2, 1, 0][id as usize],
        members: vec![member(1, false), member(2, id == 3), member(3, true)],
        former: Vec::new(),
        dropped: Vec::new(),
    };
    ClusterMap {
        version: 42,
        cluster_id: "xsan-cluster-001".into(),
        nodes: (1..=3).map(node).collect(),
        pools: vec![Pool { id: 0, replica_count: 3, min_replicas: 2, group_count: 4 }],
        groups: (0..4).map(group).collect(),
        lineage_end: 8,
        volumes: vec![volume()],
    }
}
