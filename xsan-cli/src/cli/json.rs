//! What xsan-cli shows to programs: the same replies as JSON, with names that stay.
//!
//! Sizes are in bytes. Ids of 64 bits are hexadecimal text, as not every reader of JSON keeps 64-bit numbers.

use serde_json::{Value, json};
use xsan_protocol::proto::{
    ClusterMap, ClusterSettings, ClusterStatusReply, Finding, ListEventsReply, NodePlan, NodeStatus,
    StoreStatus, Volume, VolumeStatus,
};

use super::show;

/// A 64-bit id.
pub fn id(id: u64) -> String {
    format!("{id:016x}")
}

pub fn cluster_status(status: &ClusterStatusReply) -> Value {
    let groups = status.groups.unwrap_or_default();
    json!({
        "cluster_id": status.cluster_id,
        "health": show::health(&groups),
        "leader": (status.leader != 0).then(|| show::node_name(&status.nodes, status.leader)),
        "raft_term": status.raft_term,
        "map_version": status.map_version,
        "volume_count": status.volume_count,
        "capacity_bytes": status.capacity_bytes,
        "used_bytes": status.used_bytes,
        "groups": {
            "total": groups.total,
            "healthy": groups.healthy,
            "degraded": groups.degraded,
            "inactive": groups.inactive,
            "resyncing": groups.resyncing,
            "at_risk": groups.at_risk,
        },
        "resync": {
            "moved_bytes": groups.resync_bytes_moved,
            "left_bytes": groups.resync_bytes_left,
            "bytes_per_second": groups.resync_bytes_per_second,
            "left_ms": show::resync_ms_left(&groups),
        },
        "settings": status.settings.as_ref().map(settings),
        "findings": health(&status.findings),
        "nodes": nodes(&status.nodes),
    })
}

pub fn settings(settings: &ClusterSettings) -> Value {
    json!({
        "down_out_interval_ms": settings.down_out_interval_ms,
        "scrub_bytes_per_second": settings.scrub_bytes_per_second,
        "scrub_interval_ms": settings.scrub_interval_ms,
        "deep_scrub_interval_ms": settings.deep_scrub_interval_ms,
        "demote_slow_nodes": settings.demote_slow_nodes,
    })
}

/// What a change of a node does, or would do.
pub fn plan(plan: &NodePlan, dry_run: bool) -> Value {
    json!({
        "node": plan.name,
        "id": (plan.node != 0).then_some(plan.node),
        "dry_run": dry_run,
        "groups": plan.groups,
        "primary_groups": plan.primary_groups,
        "moves": plan.moves,
        "bytes_to_move": plan.bytes_to_move,
        "bytes_per_second": plan.bytes_per_second,
        "rate_is_measured": plan.rate_is_measured,
        "move_ms": show::move_ms(plan),
        "groups_stopped": plan.groups_stopped,
        "groups_at_risk": plan.groups_at_risk,
        "groups_in_doubt": plan.groups_in_doubt,
        "groups_lost": plan.groups_lost,
        "volumes_lost": plan.volumes_lost,
        "refusal": plan.refusal.as_ref().map(|detail| json!({
            "number": detail.code,
            "object": detail.object,
            "message": detail.message,
        })),
    })
}

pub fn health(findings: &[Finding]) -> Value {
    let finding = |finding: &Finding| {
        json!({
            "code": finding.code,
            "severity": finding.severity,
            "object": finding.object,
            "message": finding.message,
            "remedy": finding.remedy,
        })
    };
    findings.iter().map(finding).collect()
}

pub fn events(reply: &ListEventsReply) -> Value {
    let events = reply.events.iter().map(|event| {
        json!({
            "unix_ms": event.unix_ms,
            "event": event.kind,
            "object": event.object,
            "message": event.message,
            "seen_by": event.seen_by,
        })
    });
    json!({
        "events": events.collect::<Value>(),
        "silent_nodes": reply.silent_nodes,
        "left_out": reply.left_out,
    })
}

pub fn nodes(nodes: &[NodeStatus]) -> Value {
    nodes.iter().map(node).collect()
}

pub fn node(status: &NodeStatus) -> Value {
    let node = status.node.clone().unwrap_or_default();
    let data = node.data.as_ref();
    json!({
        "name": node.name,
        "id": node.id,
        "state": status.state,
        "leader": status.leader,
        "maintenance": status.maintenance,
        "leaving": status.leaving,
        "lost": status.lost,
        "voter": node.voter,
        "address": node.address,
        "control_port": node.control_port,
        "failure_domain": node.failure_domain,
        "nbd_port": data.map(|data| data.nbd_port),
        "shard_ports": data.map(|data| data.shard_ports.clone()),
        "incarnation": data.map(|data| id(data.incarnation)),
        "boot_id": data.map(|data| id(data.boot_id)),
        "last_heartbeat_age_ms": status.last_heartbeat_age_ms,
        "primary_groups": status.primary_groups,
        "member_groups": status.member_groups,
        "learner_groups": status.learner_groups,
        "used_bytes": status.used_bytes,
        "capacity_bytes": status.capacity_bytes,
        "release": status.release,
        "stores": status.stores.iter().map(|known| store(known, status.used_bytes.is_some())).collect::<Value>(),
    })
}

/// What the node has not `told` is null.
fn store(store: &StoreStatus, told: bool) -> Value {
    let told = |figure: u64| told.then_some(figure);
    json!({
        "id": id(store.id),
        "device": store.device,
        "cache_device": (!store.cache_device.is_empty()).then_some(&store.cache_device),
        "media": store.media,
        "failed": store.failed,
        "problem": (!store.problem.is_empty()).then_some(&store.problem),
        "capacity_bytes": store.capacity_bytes,
        "used_bytes": told(store.used_bytes),
        "journal_bytes": told(store.journal_bytes),
        "journal_used_bytes": told(store.journal_used_bytes),
        "checksum_errors": told(store.checksum_errors),
        "repaired_pages": told(store.repaired_pages),
        "write_us_p99": store.write_us_p99,
    })
}

pub fn volumes(volumes: &[VolumeStatus]) -> Value {
    volumes.iter().map(volume_fields).collect()
}

/// One volume, with the addresses that it can be opened at.
pub fn volume(status: &VolumeStatus, map: &ClusterMap) -> Value {
    let mut value = volume_fields(status);
    let name = status.volume.as_ref().map(|volume| volume.name.as_str()).unwrap_or_default();
    value["nbd"] = json!(show::nbd_addresses(map, name));
    value
}

/// A volume as the answer to a change tells it; what only the cluster's state tells is null.
pub fn changed_volume(volume: &Volume) -> Value {
    let mut value = volume_fields(&VolumeStatus { volume: Some(volume.clone()), ..VolumeStatus::default() });
    for unknown in ["replica_count", "min_replicas", "state", "attached", "nbd"] {
        value[unknown] = Value::Null;
    }
    value
}

fn volume_fields(status: &VolumeStatus) -> Value {
    let volume = status.volume.clone().unwrap_or_default();
    json!({
        "name": volume.name,
        "id": volume.id,
        "size_bytes": volume.size_bytes,
        "replica_count": status.replica_count,
        "min_replicas": status.min_replicas,
        "state": status.state,
        "attached": status.attached,
        "durability": show::durability(volume.durability),
        "policy": volume.policy,
        "created_unix_ms": volume.created_unix_ms,
        "lineage": id(volume.lineage),
        "layer": volume.layer,
        "pool": volume.pool,
    })
}
