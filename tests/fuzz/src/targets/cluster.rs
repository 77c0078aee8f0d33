//! The cluster's state and its messages: the map, commands and replies, images and records of the state.
//!
//! A message that decodes is not held to its own bytes: fields may come in any order, twice or unknown, and are then
//! dropped or merged, as protocol buffers have it. What it decodes to must survive its own encoding.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use prost::Message;
use xsan_controlplane::events::{self, EVENTS_MAX, EventLog};
use xsan_controlplane::state::command::{Command, GroupChange, NewNode, NewVolume, Reply, SettingsChange};
use xsan_controlplane::state::error::Refusal;
use xsan_controlplane::state::image::Key;
use xsan_controlplane::state::scrub::ScrubEnd;
use xsan_controlplane::state::{ClusterState, Departure};
use xsan_protocol::checksum::crc64;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{
    BlockIndex, BootId, GroupId, Incarnation, NodeId, PoolId, ShardIndex, StoreId, VolumeId,
};
use xsan_protocol::map::{ClusterMap, DamagedStore, DataProcess, Durability, Group, Member, Store};
use xsan_protocol::proto;

use crate::measure::Bound;
use crate::target::{Form, Target, Verdict, no_checksum};

pub const TARGETS: &[Target] = &[
    Target { name: "map", what: "the cluster map", seeds: map_seeds, check: check_map, ..MESSAGE },
    Target {
        name: "command",
        what: "a command of Raft's log, then applied to a cluster's state",
        seeds: || commands().iter().map(Command::encode).collect(),
        check: check_command,
        ..MESSAGE
    },
    Target {
        name: "command-reply",
        what: "the reply to a command",
        seeds: || replies().iter().map(Reply::encode).collect(),
        check: check_reply,
        ..MESSAGE
    },
    Target {
        name: "state-image",
        what: "a snapshot of the state",
        seeds: image_seeds,
        check: check_image,
        ..MESSAGE
    },
    Target {
        name: "events",
        what: "the file of a node's events, its checksum made right",
        seeds: || vec![event_file()[8..].to_vec()],
        check: check_events,
        ..MESSAGE
    },
    Target {
        name: "state-records",
        what: "the state's records, as a database holds them",
        form: Form::Bytes,
        seeds: record_seeds,
        check: check_records,
        ..MESSAGE
    },
];

pub const MESSAGE: Target = Target {
    name: "",
    what: "",
    form: Form::Message,
    bytes_max: 32 * 1024,
    test_inputs: 2_000,
    seeds: Vec::new,
    fix: no_checksum,
    check: |_| Ok(Verdict::Refused),
    known: &[],
};

/// An empty message of a list takes 2 bytes on the wire and some 200 in memory, and again as much while the list grows and
/// while it is turned into the type that it is kept as.
pub const MESSAGE_BOUND: Bound = Bound::new(1_000, 16 * 1024);
/// A pool names its groups; the state of one has at most 2^15.
const IMAGE_BOUND: Bound = Bound::new(3_000, 64 * 1024);

pub fn process(node: u32) -> DataProcess {
    let store = |shard: u16| Store {
        id: StoreId(u64::from(node) * 100 + u64::from(shard)),
        capacity_bytes: 1 << 40,
        shard: ShardIndex(shard),
        device: "/dev/x".to_owned(),
        media: "ssd".to_owned(),
        failed: false,
        failed_before: false,
    };
    DataProcess {
        incarnation: Incarnation(u64::from(node) * 1000),
        boot_id: BootId(7),
        shard_ports: vec![9100, 9101],
        nbd_port: 10809,
        stores: vec![store(0), store(1)],
    }
}

fn new_node(node: u32) -> Command {
    let address = if node == 3 { "fd00::3" } else { "10.0.0.1" };
    Command::AddNode(NewNode {
        cluster_id: "c1".to_owned(),
        name: format!("node-{node}"),
        address: address.parse().expect("an address"),
        control_port: 8080,
        failure_domain: if node == 2 { "rack-2".to_owned() } else { String::new() },
        instance: u64::from(node),
        founder: node == 1,
    })
}

fn new_volume(name: &str, replica_count: u8) -> Command {
    Command::CreateVolume(NewVolume {
        name: name.to_owned(),
        size_bytes: 1 << 30,
        replica_count,
        policy: "gold".to_owned(),
        durability: Durability::EveryWrite,
        created_unix_ms: 1,
        request: 77,
        group_count: 4,
    })
}

fn damaged_stores() -> Vec<DamagedStore> {
    vec![DamagedStore { store: StoreId(300), intact_groups: vec![GroupId::new(PoolId(1), 2)] }]
}

/// Three nodes, two volumes in pools of four groups, one of them attached.
pub fn state() -> ClusterState {
    let mut state = ClusterState::default();
    for node in 1..=3 {
        state.apply(&new_node(node));
        let damaged_stores = if node == 3 { damaged_stores() } else { Vec::new() };
        let process = process(node);
        state.apply(&Command::DataStarted { node: NodeId(node), process, damaged_stores, replaces: None });
    }
    state.set_voters([NodeId(1), NodeId(2)].into());
    state.apply(&new_volume("vm-1", 3));
    state.apply(&new_volume("vm-2", 2));
    state.apply(&Command::Attach {
        volume: "vm-1".to_owned(),
        node: NodeId(1),
        incarnation: process(1).incarnation,
    });
    state
}

pub fn commands() -> Vec<Command> {
    let state = state();
    let mut groups: Vec<_> = state.map().groups.values().collect();
    groups.sort_unstable_by_key(|group| group.id);
    let change = |group: &&Group| {
        let mut members: Vec<Member> = group.members.clone();
        members.rotate_left(1);
        let primary = members.first().map(|member| member.node);
        GroupChange { group: group.id, expected: group.epoch, primary, members, settle: false }
    };
    vec![
        new_node(1),
        new_node(4),
        Command::DataStarted {
            node: NodeId(2),
            process: process(4),
            damaged_stores: damaged_stores(),
            replaces: Some(process(2).incarnation),
        },
        Command::StoreFailed { node: NodeId(1), incarnation: Incarnation(1000), store: StoreId(100) },
        Command::ReconfigureGroups(groups.iter().take(3).map(change).collect()),
        new_volume("vm-3", 1),
        new_volume("vm-1", 3),
        Command::ResizeVolume { name: "vm-2".to_owned(), size_bytes: 2 << 30, allow_shrink: false },
        Command::DeleteVolume { volume: VolumeId(2) },
        Command::Attach { volume: "vm-2".to_owned(), node: NodeId(3), incarnation: process(3).incarnation },
        Command::Detach { volume: VolumeId(1), node: NodeId(1), incarnation: process(1).incarnation },
        Command::SetMaintenance { node: NodeId(2), on: true, force: false },
        Command::LeaveNode { node: NodeId(3), departure: Departure::Lost },
        Command::RemoveNode { node: NodeId(3) },
        Command::ChangeSettings(SettingsChange {
            down_out_interval: Some(Duration::from_secs(60)),
            ..Default::default()
        }),
        Command::ChangeSettings(SettingsChange {
            scrub_bytes_per_second: Some(1 << 20),
            scrub_interval: Some(Duration::ZERO),
            deep_scrub_interval: Some(Duration::from_secs(60)),
            demote_slow_nodes: Some(true),
            ..Default::default()
        }),
        Command::WishScrubs {
            groups: groups.iter().take(2).map(|group| group.id).collect(),
            wish: Some(proto::ScrubWish { deep: true, unix_ms: 9 }),
        },
        Command::EndScrubs {
            unix_ms: 10,
            ends: vec![ScrubEnd {
                group: groups[0].id,
                deep: true,
                number: 9,
                findings: proto::ScrubFindings { bytes: 77, lost_pages: 1, ..Default::default() },
            }],
        },
    ]
}

fn replies() -> Vec<Reply> {
    let volume = state().map().volumes[&VolumeId(1)].clone();
    let refusal = Refusal {
        code: Code::VolumeExists,
        object: "volume vm-1".to_owned(),
        message: "it exists".to_owned(),
    };
    vec![
        Reply::Done,
        Reply::Node(NodeId(3)),
        Reply::Volume(Box::new(volume)),
        Reply::Groups { changed: 3, refused: 1 },
        Reply::Refused(refusal),
    ]
}

fn map_seeds() -> Vec<Vec<u8>> {
    let one = {
        let mut state = ClusterState::default();
        state.apply(&new_node(1));
        state
    };
    [ClusterState::default(), one, state()]
        .map(|state| proto::ClusterMap::from(state.map()).encode_to_vec())
        .to_vec()
}

fn check_map(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Ok(message) = MESSAGE_BOUND.hold(bytes.len(), || proto::ClusterMap::decode(bytes))? else {
        return Ok(Verdict::Refused);
    };
    let decoded = MESSAGE_BOUND.hold(bytes.len(), || ClusterMap::try_from(message))?;
    if let Ok(map) = &decoded {
        check_routes(map)?;
        let encoded = proto::ClusterMap::from(map).encode_to_vec();
        let again = ClusterMap::try_from(proto::ClusterMap::decode(&encoded[..])?)?;
        ensure!(again == *map, "a map is not the same after its encoding");
        ensure!(proto::ClusterMap::from(&again).encode_to_vec() == encoded, "a map has two encodings");
    }
    Ok(Verdict::of(&decoded))
}

/// What every shard does with a map: routes to the groups of its pools.
fn check_routes(map: &ClusterMap) -> anyhow::Result<()> {
    for pool in map.pools.values() {
        for group in pool.groups() {
            let members = &map.groups.get(&group).context("a pool without one of its groups")?.members;
            ensure!(
                members.iter().all(|member| map.nodes.contains_key(&member.node)),
                "a member that is no node"
            );
            map.route(group);
        }
    }
    for volume in map.volumes.values() {
        let pool = map.pools.get(&volume.pool).context("a volume without its pool")?;
        let group = pool.group_of(volume.lineage, BlockIndex(1));
        ensure!(map.groups.contains_key(&group), "a block without a group");
    }
    Ok(())
}

fn check_command(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let decoded = MESSAGE_BOUND.hold(bytes.len(), || Command::decode(bytes))?;
    if let Ok(command) = &decoded {
        ensure!(
            Command::decode(&command.encode()).as_ref() == Ok(command),
            "a command is not the same after its encoding"
        );
        let json = serde_json::to_vec(command)?;
        ensure!(
            serde_json::from_slice::<Command>(&json)? == *command,
            "a command is not the same after its JSON"
        );
        // Every node applies what is in the log: a command that ends one ends the cluster.
        let mut state = state();
        let (reply, _) = state.apply(command);
        ensure!(
            Reply::decode(&reply.encode()).as_ref() == Ok(&reply),
            "{reply:?} is not the same after its encoding"
        );
        survives(&state).with_context(|| format!("after {command:?}"))?;
        command.to_string();
    }
    Ok(Verdict::of(&decoded))
}

fn check_reply(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let decoded = MESSAGE_BOUND.hold(bytes.len(), || Reply::decode(bytes))?;
    if let Ok(reply) = &decoded {
        ensure!(
            Reply::decode(&reply.encode()).as_ref() == Ok(reply),
            "a reply is not the same after its encoding"
        );
    }
    Ok(Verdict::of(&decoded))
}

fn image_seeds() -> Vec<Vec<u8>> {
    [ClusterState::default(), state()].map(|state| state.image().encode_to_vec()).to_vec()
}

/// A state is the same after its image and after its records.
fn survives(state: &ClusterState) -> anyhow::Result<()> {
    ensure!(ClusterState::from_image(state.image())? == *state, "a state is not the same after its image");
    let records: Vec<(Vec<u8>, Vec<u8>)> = records(state);
    let loaded = ClusterState::load(records.iter().map(|(key, value)| (&key[..], &value[..])))?;
    ensure!(loaded == *state, "a state is not the same after its records");
    Ok(())
}

fn records(state: &ClusterState) -> Vec<(Vec<u8>, Vec<u8>)> {
    let records = state.records(&state.all()).into_iter();
    records.filter_map(|(key, value): (Key, _)| Some((key.encode(), value?))).collect()
}

fn check_image(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Ok(image) = MESSAGE_BOUND.hold(bytes.len(), || proto::StateImage::decode(bytes))? else {
        return Ok(Verdict::Refused);
    };
    let decoded = IMAGE_BOUND.hold(bytes.len(), || ClusterState::from_image(image))?;
    if let Ok(state) = &decoded {
        survives(state)?;
        check_routes(state.map())?;
    }
    Ok(Verdict::of(&decoded))
}

/// Behind its checksum: the protocol buffer of the inputs.
fn event_file() -> Vec<u8> {
    let event = |unix_ms, kind: &str| proto::Event {
        unix_ms,
        kind: kind.to_owned(),
        object: "node node-003".to_owned(),
        message: "node node-003 is down: it has no lease".to_owned(),
        seen_by: String::new(),
    };
    events::file::encode(vec![event(1_795_235_400_000, "node-down"), event(u64::MAX, "node-up")])
}

fn check_events(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // As it is, it has its checksum as good as never.
    events::file::decode(bytes).ok();
    let content = [&crc64(bytes).to_le_bytes()[..], bytes].concat();
    let decoded = MESSAGE_BOUND.hold(bytes.len(), || events::file::decode(&content))?;
    if let Ok(found) = &decoded {
        let again = events::file::decode(&events::file::encode(found.clone()))?;
        ensure!(again == *found, "events are not the same after their encoding");
        let kept = EventLog::after(found.clone()).list();
        ensure!(
            kept.len() == found.len().min(EVENTS_MAX),
            "{} of {} events are kept",
            kept.len(),
            found.len()
        );
    }
    Ok(Verdict::of(&decoded))
}

/// Records one behind the other: length of the key, key, length of the value in two bytes, value.
fn record_seeds() -> Vec<Vec<u8>> {
    let records = records(&state());
    let mut bytes = Vec::new();
    for (key, value) in &records {
        bytes.push(key.len() as u8);
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&(value.len() as u16).to_le_bytes());
        bytes.extend_from_slice(value);
    }
    vec![bytes]
}

fn cut_records(mut bytes: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut records = Vec::new();
    while let Some((length, rest)) = bytes.split_first() {
        let (key, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        let Some((length, rest)) = rest.split_first_chunk() else { break };
        let (value, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        records.push((key, value));
        bytes = rest;
    }
    records
}

fn check_records(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let records = cut_records(bytes);
    let decoded = IMAGE_BOUND.hold(bytes.len(), || ClusterState::load(records.into_iter()))?;
    if let Ok(state) = &decoded {
        survives(state)?;
    }
    Ok(Verdict::of(&decoded))
}
