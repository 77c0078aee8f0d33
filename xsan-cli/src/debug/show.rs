//! What xsan-debug shows to people: pure functions of the cluster's replies.

use std::collections::{BTreeMap, BTreeSet};

use xsan_nodekit::size::{Amount, Size};
use xsan_protocol::ids::{Epoch, GroupId, Seq, Version};
use xsan_protocol::proto::{
    BlockReplica, ClusterMap, ClusterStatusReply, Group, LocateBlockReply, Node, NodePerf, NodeStatus,
    UnitLocation, VolumeStatus,
};
use xsan_protocol::units::{BLOCK_SIZE, UNIT_SIZE};

use super::args::Block;
use super::layout::{self, Layout, Serving, name_of};
use crate::cli::json::id;
use crate::text::{Number, Text, age, count, facts, join, latency, table, yes_or_no};

/// Sick groups listed one by one; more are counted.
const SICK_GROUPS_SHOWN: usize = 20;

/// `pool.index`, as `0.17`.
fn members(group: &Group, map: &ClusterMap, learners: bool) -> String {
    join(group.members.iter().filter(|member| member.learner == learners).map(|member| {
        let name = name_of(map, member.node);
        if member.damaged { format!("{name} (damaged)") } else { name }
    }))
}

pub fn cluster_status(status: &ClusterStatusReply, map: &ClusterMap) -> String {
    let groups = status.groups.unwrap_or_default();
    let mut text = facts(&[
        ("Cluster", status.cluster_id.clone()),
        ("Raft", format!("term {}, leader {}", status.raft_term, name_of(map, status.leader))),
        ("Map", format!("version {}", map.version)),
        (
            "Groups",
            format!(
                "{} ({} healthy, {} degraded, {} inactive, {} resyncing, {} at risk)",
                groups.total,
                groups.healthy,
                groups.degraded,
                groups.inactive,
                groups.resyncing,
                groups.at_risk
            ),
        ),
        (
            "Resync",
            format!("{} moved, {} left", Amount(groups.resync_bytes_moved), Amount(groups.resync_bytes_left)),
        ),
    ]);
    let rows = status.nodes.iter().map(|status| {
        let node = status.node.clone().unwrap_or_default();
        let data = node.data.unwrap_or_default();
        vec![
            node.name,
            node.id.to_string(),
            status.state.clone(),
            yes_or_no(node.voter).into(),
            status.last_heartbeat_age_ms.map_or_else(|| "unknown".into(), age),
            id(data.incarnation),
            id(data.boot_id),
            status.primary_groups.to_string(),
            status.member_groups.to_string(),
            status.learner_groups.to_string(),
        ]
    });
    let columns = [
        Text("NODE"),
        Number("ID"),
        Text("STATE"),
        Text("VOTER"),
        Number("HEARTBEAT"),
        Text("INCARNATION"),
        Text("BOOT"),
        Number("PRIMARY"),
        Number("REPLICAS"),
        Number("LEARNERS"),
    ];
    text.push('\n');
    text += &table(&columns, rows);
    text += &sick_groups(map, &Serving::of(&status.nodes));
    text
}

/// Groups that are not healthy, as a table; empty if there are none.
fn sick_groups(map: &ClusterMap, serving: &Serving) -> String {
    let sick: Vec<_> = map
        .groups
        .iter()
        .filter_map(|group| {
            let state = layout::state_in(map, group, serving);
            (state != "healthy").then_some((group, state))
        })
        .collect();
    if sick.is_empty() {
        return String::new();
    }
    let rows = sick.iter().take(SICK_GROUPS_SHOWN).map(|(group, state)| group_row(group, state, map));
    let mut text = format!("\n{}", table(&GROUP_COLUMNS, rows));
    if sick.len() > SICK_GROUPS_SHOWN {
        let more = count((sick.len() - SICK_GROUPS_SHOWN) as u64, "group");
        text += &format!("… and {more} more; --json lists them all\n");
    }
    text
}

const GROUP_COLUMNS: [crate::text::Column; 6] =
    [Text("GROUP"), Number("EPOCH"), Text("STATE"), Text("PRIMARY"), Text("ACTING"), Text("LEARNERS")];

fn group_row(group: &Group, state: &str, map: &ClusterMap) -> Vec<String> {
    vec![
        GroupId(group.id).to_string(),
        group.epoch.to_string(),
        state.to_owned(),
        name_of(map, group.primary),
        members(group, map, false),
        members(group, map, true),
    ]
}

pub fn topology(status: &ClusterStatusReply, map: &ClusterMap) -> String {
    let mut domains: BTreeMap<&str, Vec<&Node>> = BTreeMap::new();
    for node in &map.nodes {
        domains.entry(&node.failure_domain).or_default().push(node);
    }
    let mut text = format!("cluster {} (map version {})\n", map.cluster_id, map.version);
    for (domain, nodes) in domains {
        let title = if domain.is_empty() { "no failure domain (each node is its own)" } else { domain };
        text += &format!("  {title}\n");
        for node in nodes {
            text += &topology_of(node, status);
        }
    }
    text
}

fn topology_of(node: &Node, status: &ClusterStatusReply) -> String {
    let known =
        status.nodes.iter().find(|known| known.node.as_ref().is_some_and(|known| known.id == node.id));
    let state = known.map_or("unknown", |known| known.state.as_str());
    let role = if node.voter { "voter" } else { "learner of Raft" };
    let mut text = format!(
        "    {} (number {}, {state}, {role})  {} control {}",
        node.name, node.id, node.address, node.control_port
    );
    let Some(data) = &node.data else {
        return text + "\n      no data process yet\n";
    };
    text += &format!(" nbd {}\n", data.nbd_port);
    for (shard, port) in data.shard_ports.iter().enumerate() {
        text += &format!("      shard {shard}  port {port}\n");
        for store in data.stores.iter().filter(|store| store.shard as usize == shard) {
            let failed = if store.failed { "  FAILED" } else { "" };
            text += &format!(
                "        store {}  {}  {}  {}{failed}\n",
                id(store.id),
                store.media,
                Amount(store.capacity_bytes),
                store.device
            );
        }
    }
    text
}

pub fn volume_info(status: &VolumeStatus, map: &ClusterMap, nodes: &[NodeStatus]) -> String {
    let volume = status.volume.clone().unwrap_or_default();
    let layout = layout::of(&volume, map, nodes);
    let states = join(layout.states().into_iter().map(|(word, number)| format!("{number} {word}")));
    facts(&[
        ("Volume", format!("{} (number {})", volume.name, volume.id)),
        ("State", status.state.clone()),
        ("Lineage", format!("{}, layer {}", id(volume.lineage), volume.layer)),
        ("Size", format!("{} ({} bytes)", Size(volume.size_bytes), volume.size_bytes)),
        ("Blocks", format!("{} of {}", layout.blocks, Amount(BLOCK_SIZE as u64))),
        (
            "Pool",
            format!("{} ({} replicas, I/O needs {})", volume.pool, status.replica_count, status.min_replicas),
        ),
        ("Groups", format!("{}: {states}", layout.groups.len())),
        ("Durability", crate::cli::durability(volume.durability).into()),
        ("Attached", if status.attached.is_empty() { "nowhere".into() } else { join(&status.attached) }),
    ])
}

pub fn layout(layout: &Layout, map: &ClusterMap) -> String {
    let rows = map.nodes.iter().map(|node| {
        let (primary, held) = layout.blocks_of(node);
        vec![node.name.clone(), primary.to_string(), held.to_string()]
    });
    let mut text = table(&[Text("NODE"), Number("PRIMARY BLOCKS"), Number("REPLICA BLOCKS")], rows);
    let rows = layout.groups.iter().map(|entry| {
        let state = layout.state(&entry.group);
        let mut row = group_row(&entry.group, state, map);
        row.push(entry.blocks.to_string());
        row
    });
    let mut columns = GROUP_COLUMNS.to_vec();
    columns.push(Number("BLOCKS"));
    text.push('\n');
    text += &table(&columns, rows);
    text
}

/// Version of a unit, as `EPOCH.SEQ`.
pub fn version(unit: &UnitLocation) -> String {
    Version::new(Epoch(unit.version_epoch), Seq(unit.version_seq)).to_string()
}

pub fn location(block: &Block, reply: &LocateBlockReply) -> String {
    let first = block.index.saturating_mul(BLOCK_SIZE as u64);
    let last = first.saturating_add(BLOCK_SIZE as u64 - 1);
    let mut text = facts(&[
        ("Block", format!("{}:{} (bytes {first} to {last} of the volume)", block.volume, block.index)),
        ("Key", format!("lineage {}, layer {}, index {}", id(reply.lineage), reply.layer, reply.block_index)),
        ("Group", format!("{} at epoch {}", GroupId(reply.group), reply.epoch)),
    ]);
    let rows = reply.replicas.iter().map(|replica| {
        let pages: u32 = replica.units.iter().map(|unit| unit.journalled_pages).sum();
        vec![
            replica.node_name.clone(),
            replica.role.clone(),
            if replica.reachable { "yes".into() } else { "no".into() },
            id(replica.store),
            replica.device.clone(),
            if replica.reachable { replica.units.len().to_string() } else { String::new() },
            if replica.reachable { pages.to_string() } else { String::new() },
        ]
    });
    let columns = [
        Text("NODE"),
        Text("ROLE"),
        Text("REACHABLE"),
        Text("STORE"),
        Text("DEVICE"),
        Number("UNITS"),
        Number("JOURNALLED PAGES"),
    ];
    text.push('\n');
    text += &table(&columns, rows);
    text.push('\n');
    text += &units(&reply.replicas);
    text
}

/// Units that any replica holds, one line each, with the version and place on every replica.
fn units(replicas: &[BlockReplica]) -> String {
    let numbers: BTreeSet<u32> =
        replicas.iter().flat_map(|replica| replica.units.iter().map(|unit| unit.unit)).collect();
    if numbers.is_empty() {
        let asked = replicas.iter().filter(|replica| replica.reachable).count();
        let text = match asked {
            0 => "no replica could be asked\n",
            _ if asked < replicas.len() => "the replicas that could be asked hold nothing of it\n",
            _ => "nothing was written to this block: it reads as zeroes\n",
        };
        return text.to_owned();
    }
    let mut columns = vec!["UNIT".to_owned(), "OFFSET".to_owned(), "SAME".to_owned()];
    columns.extend(replicas.iter().map(|replica| replica.node_name.to_uppercase()));
    let mut rows = vec![columns];
    for number in numbers {
        let held: Vec<_> =
            replicas.iter().map(|replica| replica.units.iter().find(|unit| unit.unit == number)).collect();
        let versions: BTreeSet<_> = held
            .iter()
            .zip(replicas)
            .filter(|(_, replica)| replica.reachable)
            .map(|(unit, _)| unit.map(version))
            .collect();
        let mut row = vec![
            number.to_string(),
            format!("{} KiB", u64::from(number) * UNIT_SIZE as u64 / 1024),
            yes_or_no(versions.len() == 1).to_owned(),
        ];
        row.extend(held.into_iter().zip(replicas).map(|(unit, replica)| unit_cell(unit, replica)));
        rows.push(row);
    }
    crate::text::grid(&rows)
}

fn unit_cell(unit: Option<&UnitLocation>, replica: &BlockReplica) -> String {
    match unit {
        None if !replica.reachable => String::from("?"),
        None => String::from("zero"),
        Some(unit) if unit.device_offset == 0 => format!("{} in the journal", version(unit)),
        Some(unit) if unit.journalled_pages == 0 => format!("{} at {:#x}", version(unit), unit.device_offset),
        Some(unit) => {
            let pages = count(unit.journalled_pages, "page");
            format!("{} at {:#x}, {pages} in the journal", version(unit), unit.device_offset)
        }
    }
}

pub fn perf(nodes: &[NodePerf]) -> String {
    let mut text = String::new();
    for node in nodes {
        if !text.is_empty() {
            text.push('\n');
        }
        if !node.reachable {
            text += &format!("{}: does not answer\n", node.name);
            continue;
        }
        text += &format!("{}\n", node.name);
        let rows = node.latencies.iter().map(|stage| {
            let us = |us: u64| latency(us as f64);
            vec![
                stage.name.clone(),
                stage.count.to_string(),
                latency(stage.us_mean),
                us(stage.us_p50),
                us(stage.us_p99),
                us(stage.us_p999),
                us(stage.us_max),
            ]
        });
        let columns = [
            Text("STAGE"),
            Number("COUNT"),
            Number("MEAN"),
            Number("P50"),
            Number("P99"),
            Number("P99.9"),
            Number("MAX"),
        ];
        text += &indent(&table(&columns, rows));
        if !node.counters.is_empty() {
            text.push('\n');
            let rows = node.counters.iter().map(|counter| {
                let readable = if counter.name.ends_with("_bytes") {
                    Amount(counter.value).to_string()
                } else {
                    " ".into()
                };
                vec![counter.name.clone(), counter.value.to_string(), readable]
            });
            text += &indent(&table(&[Text("COUNTER"), Number("VALUE"), Number(" ")], rows));
        }
    }
    text
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
