//! What xsan-debug shows to programs; sizes and ids as in `cli::json`.

use serde_json::{Value, json};
use xsan_protocol::proto::{
    ClusterMap, ClusterStatusReply, Group, LocateBlockReply, NodePerf, NodeStatus, VolumeStatus,
};

use super::args::Block;
use super::layout::{self, Layout, Serving, name_of};
use super::show::version;
use crate::cli::json::{self as cli, id};

pub fn cluster_status(status: &ClusterStatusReply, map: &ClusterMap) -> Value {
    let mut value = cli::cluster_status(status);
    let serving = Serving::of(&status.nodes);
    let entry = |entry| {
        let mut value = group(entry, map);
        value["state"] = json!(layout::state_in(map, entry, &serving));
        value
    };
    value["group_list"] = map.groups.iter().map(entry).collect();
    value
}

fn group(group: &Group, map: &ClusterMap) -> Value {
    let members = group.members.iter().map(|member| {
        json!({
            "node": name_of(map, member.node),
            "store": id(member.store),
            "incarnation": id(member.incarnation),
            "learner": member.learner,
            "damaged": member.damaged,
        })
    });
    json!({
        "id": group.id,
        "epoch": group.epoch,
        "primary": name_of(map, group.primary),
        "members": members.collect::<Value>(),
    })
}

pub fn topology(status: &ClusterStatusReply, map: &ClusterMap) -> Value {
    let nodes = map.nodes.iter().map(|node| {
        let known =
            status.nodes.iter().find(|known| known.node.as_ref().is_some_and(|known| known.id == node.id));
        let data = node.data.clone().unwrap_or_default();
        let stores = data.stores.iter().map(|store| {
            json!({
                "id": id(store.id),
                "shard": store.shard,
                "device": store.device,
                "media": store.media,
                "capacity_bytes": store.capacity_bytes,
                "failed": store.failed,
            })
        });
        json!({
            "name": node.name,
            "id": node.id,
            "failure_domain": node.failure_domain,
            "state": known.map(|known| known.state.clone()),
            "voter": node.voter,
            "address": node.address,
            "control_port": node.control_port,
            "nbd_port": data.nbd_port,
            "shard_ports": data.shard_ports,
            "incarnation": id(data.incarnation),
            "boot_id": id(data.boot_id),
            "stores": stores.collect::<Value>(),
        })
    });
    json!({
        "cluster_id": map.cluster_id,
        "map_version": map.version,
        "nodes": nodes.collect::<Value>(),
        "pools": map.pools.iter().map(|pool| json!({
            "id": pool.id,
            "replica_count": pool.replica_count,
            "min_replicas": pool.min_replicas,
            "group_count": pool.group_count,
        })).collect::<Value>(),
    })
}

pub fn volume_info(status: &VolumeStatus, map: &ClusterMap, nodes: &[NodeStatus]) -> Value {
    let mut value = cli::volume(status, map);
    let layout = layout::of(&status.volume.clone().unwrap_or_default(), map, nodes);
    value["block_count"] = json!(layout.blocks);
    value["groups"] =
        layout.states().into_iter().map(|(word, number)| (word.to_owned(), json!(number))).collect();
    value
}

pub fn layout(layout: &Layout, map: &ClusterMap) -> Value {
    let nodes = map.nodes.iter().map(|node| {
        let (primary, held) = layout.blocks_of(node);
        json!({ "node": node.name, "primary_blocks": primary, "replica_blocks": held })
    });
    let groups = layout.groups.iter().map(|entry| {
        let mut value = group(&entry.group, map);
        value["blocks"] = json!(entry.blocks);
        value["state"] = json!(layout.state(&entry.group));
        value
    });
    json!({
        "volume": layout.volume.name,
        "block_count": layout.blocks,
        "nodes": nodes.collect::<Value>(),
        "groups": groups.collect::<Value>(),
    })
}

pub fn location(block: &Block, reply: &LocateBlockReply) -> Value {
    let replicas = reply.replicas.iter().map(|replica| {
        let units = replica.units.iter().map(|unit| {
            json!({
                "unit": unit.unit,
                "version": version(unit),
                "device_offset": unit.device_offset,
                "journalled_pages": unit.journalled_pages,
            })
        });
        json!({
            "node": replica.node_name,
            "role": replica.role,
            "reachable": replica.reachable,
            "store": id(replica.store),
            "device": replica.device,
            "units": units.collect::<Value>(),
        })
    });
    json!({
        "volume": block.volume,
        "block_index": reply.block_index,
        "lineage": id(reply.lineage),
        "layer": reply.layer,
        "group": reply.group,
        "epoch": reply.epoch,
        "replicas": replicas.collect::<Value>(),
    })
}

pub fn perf(nodes: &[NodePerf]) -> Value {
    let node = |node: &NodePerf| {
        let latencies = node.latencies.iter().map(|stage| {
            let figures = json!({
                "count": stage.count,
                "us_mean": stage.us_mean,
                "us_p50": stage.us_p50,
                "us_p99": stage.us_p99,
                "us_p999": stage.us_p999,
                "us_max": stage.us_max,
            });
            (stage.name.clone(), figures)
        });
        let counters = node.counters.iter().map(|counter| (counter.name.clone(), json!(counter.value)));
        json!({
            "node": node.name,
            "reachable": node.reachable,
            "latencies": latencies.collect::<Value>(),
            "counters": counters.collect::<Value>(),
        })
    };
    nodes.iter().map(node).collect()
}
