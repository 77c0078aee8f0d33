//! Other messages of the control plane: heartbeats, the link between a node's processes, records of Raft's log.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use anyhow::ensure;
use prost::Message;
use xsan_controlplane::clock::BootTime;
use xsan_controlplane::lease::Beat;
use xsan_controlplane::link::frame::{self, FrameError};
use xsan_controlplane::membership::heartbeat::{self, Datagram, Grant};
use xsan_controlplane::raft::network::SnapshotHead;
use xsan_controlplane::raft::service::{self, Append, AppendAnswer, SnapshotAnswer, Vote, VoteAnswer};
use xsan_controlplane::raft::{Entry, LogId, SnapshotMeta, encoding};
use xsan_controlplane::timing::LEASE;
use xsan_dataplane::testing::Random;
use xsan_protocol::checksum::crc32c;
use xsan_protocol::ids::{Incarnation, MapVersion, NodeId};
use xsan_protocol::map::{ClusterMap, DataProcess};
use xsan_protocol::proto;
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::wire::header::HEADER_SIZE;

use super::cluster::{MESSAGE, MESSAGE_BOUND, commands, process, state};
use super::wire::{fix_header, seal_header};
use crate::measure::Bound;
use crate::target::{Form, Target, Verdict};

pub const TARGETS: &[Target] = &[
    Target {
        name: "heartbeat",
        what: "a datagram between control processes",
        bytes_max: 512,
        test_inputs: 10_000,
        seeds: heartbeat_seeds,
        check: check_heartbeat,
        ..MESSAGE
    },
    Target {
        name: "link",
        what: "frames of the link between a node's two processes",
        form: Form::Bytes,
        seeds: link_seeds,
        fix: fix_link,
        check: check_link,
        ..MESSAGE
    },
    Target {
        name: "link-message",
        what: "a message of the link",
        seeds: || messages().iter().map(Message::encode_to_vec).collect(),
        check: |bytes| check_link(&framed(bytes)),
        ..MESSAGE
    },
    Target {
        name: "log-record",
        what: "an entry of Raft's log as its database holds it",
        seeds: log_seeds,
        // The format byte stands before the message.
        check: |bytes| check_log(&[&[encoding::FORMAT], bytes].concat()),
        ..MESSAGE
    },
    Target {
        name: "raft-rpc",
        what: "the body of a call or an answer of Raft",
        form: Form::Json,
        seeds: rpc_seeds,
        check: check_rpc,
        ..MESSAGE
    },
];

const CLUSTER: u64 = 0x0123_4567_89ab_cdef;

fn heartbeat_seeds() -> Vec<Vec<u8>> {
    let beat = Beat {
        node: NodeId(3),
        incarnation: Some(Incarnation(4)),
        stopped: Some(Incarnation(2)),
        sent: BootTime(5_000_000_000),
        map_version: MapVersion(6),
        heard: BootTime(4_750_000_000),
    };
    let silent = Beat { incarnation: None, stopped: None, ..beat };
    let grant = Grant::answer(&beat, Incarnation(4), LEASE, MapVersion(9));
    vec![
        heartbeat::encode_beat(CLUSTER, &beat),
        heartbeat::encode_beat(CLUSTER, &silent),
        heartbeat::encode_grant(CLUSTER, &grant),
        heartbeat::encode_grant(CLUSTER + 1, &grant),
        heartbeat::encode_removed(CLUSTER, NodeId(2)),
    ]
}

fn check_heartbeat(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // What does not decode is told by an error that prost allocates.
    let decoded = Bound::new(0, 512).hold(bytes.len(), || heartbeat::decode(CLUSTER, bytes))?;
    let encoded = match &decoded {
        None => return Ok(Verdict::Refused),
        Some(Datagram::Beat(beat)) => heartbeat::encode_beat(CLUSTER, beat),
        Some(Datagram::Grant(grant)) => {
            ensure!(grant.length <= LEASE, "a lease of {:?}, longer than any leader counts on", grant.length);
            ensure!(grant.length.subsec_nanos().is_multiple_of(1_000_000), "a lease is whole milliseconds");
            heartbeat::encode_grant(CLUSTER, grant)
        }
        Some(Datagram::Removed(node)) => heartbeat::encode_removed(CLUSTER, *node),
    };
    ensure!(heartbeat::decode(CLUSTER, &encoded) == decoded, "a datagram is not the same after its encoding");
    Ok(Verdict::Accepted)
}

fn messages() -> Vec<proto::LinkMessage> {
    let state = state();
    let hello = proto::DataHello {
        pid: 77,
        process: Some((&process(2)).into()),
        damaged_stores: vec![proto::DamagedStore { store: 200, intact_groups: vec![5] }],
    };
    let order = proto::ScrubOrder { group: 5, deep: true, number: 9 };
    let findings = Some(proto::ScrubFindings { bytes: 77, lost_pages: 1, ..proto::ScrubFindings::default() });
    let status = proto::DataStatus {
        map_version: 9,
        scrubs_ended: vec![proto::ScrubReport { order: Some(order), findings }],
        slow_members: vec![proto::SlowMember { node: 2, us_p99: 900, us_p99_peers: 80 }],
        open_volumes: vec![1],
        opening_volumes: vec!["vm-2".to_owned()],
        ..proto::DataStatus::default()
    };
    let volume = state.map().volumes.values().next().map(proto::Volume::from);
    let bodies = [
        Body::Hello(hello),
        Body::Status(status),
        Body::Map(state.map().into()),
        Body::Lease(proto::Lease { until_boottime_ns: 5 }),
        Body::Welcome(proto::DataWelcome { node_id: 2, cluster_id: "c1".to_owned() }),
        Body::OpenVolume(proto::OpenVolume { name: "vm-1".to_owned() }),
        Body::OpenVolumeReply(proto::OpenVolumeReply { volume, map_version: 8 }),
        Body::CloseVolume(proto::CloseVolume { volume: 1 }),
        Body::Error(proto::LinkError { code: 304, object: "volume vm-9".to_owned() }),
        Body::Proposals(proto::GroupProposals {
            proposals: vec![proto::GroupProposal { group: 5, epoch: 2, node: 3, change: 1 }],
        }),
        Body::ScrubOrders(proto::ScrubOrders { bytes_per_second: 1 << 20, orders: vec![order] }),
    ];
    bodies.map(|body| proto::LinkMessage { request_id: 9, body: Some(body) }).to_vec()
}

fn link_seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = messages().iter().map(frame::encode).collect();
    seeds.push(seeds.concat());
    seeds
}

/// A frame around what may be a message.
fn framed(payload: &[u8]) -> Vec<u8> {
    let mut bytes = frame::encode(&proto::LinkMessage::default());
    bytes.truncate(HEADER_SIZE);
    bytes.extend_from_slice(payload);
    bytes[56..60].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes[60..64].copy_from_slice(&crc32c(payload).to_le_bytes());
    seal_header(&mut bytes);
    bytes
}

/// Makes the first frame right; those behind it are so from their seeds.
fn fix_link(bytes: &mut Vec<u8>, random: &mut Random) {
    fix_header(bytes, random);
    let claimed = u32::from_le_bytes([bytes[56], bytes[57], bytes[58], bytes[59]]) as usize;
    let length = if random.one_in(16) { claimed } else { claimed.min(bytes.len() - HEADER_SIZE) };
    bytes[56..60].copy_from_slice(&(length as u32).to_le_bytes());
    if let Some(payload) = bytes[HEADER_SIZE..].get(..length) {
        let checksum = crc32c(payload);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
    }
    seal_header(bytes);
}

/// Runs what never waits: all bytes are there.
fn ready<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Ok(value),
        Poll::Pending => anyhow::bail!("it waits, though all bytes are there"),
    }
}

fn check_link(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // A header may claim a payload that never comes: as much as a frame may have, and no more.
    let bound = Bound::new(
        MESSAGE_BOUND.factor,
        xsan_protocol::limits::LINK_FRAME_MAX as u64 + MESSAGE_BOUND.constant,
    );
    let mut rest = bytes;
    let mut verdict = Verdict::Refused;
    loop {
        let message = match bound.hold(bytes.len(), || ready(frame::read(&mut rest)))?? {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(verdict),
            Err(error) => {
                let at_end = matches!(&error, FrameError::Io(error) if error.kind() == std::io::ErrorKind::UnexpectedEof);
                ensure!(at_end || !matches!(error, FrameError::Io(_)), "a slice of bytes failed: {error}");
                return Ok(verdict);
            }
        };
        verdict = Verdict::Accepted;
        let encoded = frame::encode(&message);
        let again = ready(frame::read(&mut &encoded[..]))??;
        ensure!(again.as_ref() == Some(&message), "a message is not the same after its encoding");
        // What either side makes of what it was told.
        match message.body {
            Some(Body::Map(map)) => drop(MESSAGE_BOUND.hold(bytes.len(), || ClusterMap::try_from(map))?),
            Some(Body::Hello(hello)) => {
                let process = hello.process.unwrap_or_default();
                drop(MESSAGE_BOUND.hold(bytes.len(), || DataProcess::from_message(process, 0))?);
            }
            _ => {}
        }
    }
}

fn log_seeds() -> Vec<Vec<u8>> {
    let set = |nodes: &[u64]| proto::VoterSet { nodes: nodes.to_vec() };
    let peer = |node| proto::RaftPeer { node, address: "10.0.0.1:8080".to_owned() };
    let membership = proto::RaftMembership {
        voters: vec![set(&[1, 2]), set(&[2, 3])],
        peers: vec![peer(1), peer(2), peer(3), peer(4)],
    };
    let mut payloads = vec![None, Some(proto::log_record::Payload::Membership(membership))];
    let commands = commands();
    payloads.extend(commands.iter().map(|command| Some(proto::log_record::Payload::Command(command.into()))));
    let record = |payload| proto::LogRecord { term: 3, index: 99, payload };
    payloads.into_iter().map(|payload| record(payload).encode_to_vec()).collect()
}

fn check_log(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Ok(record) = MESSAGE_BOUND.hold(bytes.len(), || encoding::unseal::<proto::LogRecord>(bytes))? else {
        return Ok(Verdict::Refused);
    };
    let decoded = MESSAGE_BOUND.hold(bytes.len(), || encoding::entry(record))?;
    if let Ok(entry) = &decoded {
        let sealed = encoding::seal(&encoding::entry_record(entry));
        let again = encoding::entry(encoding::unseal(&sealed)?)?;
        ensure!(again == *entry, "an entry is not the same after its record");
    }
    Ok(Verdict::of(&decoded))
}

/// A value of JSON is 2 bytes in the text; an entry that it becomes has a command in it.
const RPC_BOUND: Bound = Bound::new(1_000, 64 * 1024);

/// Every entry that a log can have.
fn entries() -> Vec<Entry> {
    let record = |bytes: Vec<u8>| proto::LogRecord::decode(&bytes[..]).expect("a seed decodes");
    log_seeds().into_iter().map(|bytes| encoding::entry(record(bytes)).expect("a seed is an entry")).collect()
}

fn rpc_seeds() -> Vec<Vec<u8>> {
    let vote = encoding::vote(&proto::VoteRecord { term: 3, node: 2, committed: true });
    let last = LogId::new_term_index(3, 98);
    let append = |entries| Append { vote, prev_log_id: Some(last), entries, leader_commit: Some(last) };
    let membership = log_seeds().into_iter().find_map(|bytes| {
        match proto::LogRecord::decode(&bytes[..]).expect("a seed decodes").payload {
            Some(proto::log_record::Payload::Membership(membership)) => Some(membership),
            _ => None,
        }
    });
    let position = encoding::position(&last);
    let last_membership = encoding::stored_membership(Some(&position), membership).expect("a seed is right");
    let meta = SnapshotMeta { last_log_id: Some(last), last_membership };
    let json = [
        serde_json::to_vec(&Vote::new(vote, Some(last))),
        serde_json::to_vec(&Vote::new(vote, None)),
        serde_json::to_vec(&append(Vec::new())),
        serde_json::to_vec(&append(entries())),
        serde_json::to_vec(&SnapshotHead::new(vote, meta, &[7; 100])),
        serde_json::to_vec(&VoteAnswer::new(vote, Some(last), true)),
        serde_json::to_vec(&AppendAnswer::Success),
        serde_json::to_vec(&AppendAnswer::PartialSuccess(Some(last))),
        serde_json::to_vec(&AppendAnswer::Conflict),
        serde_json::to_vec(&AppendAnswer::HigherVote(vote)),
        serde_json::to_vec(&SnapshotAnswer::new(vote)),
    ];
    json.into_iter().map(|json| json.expect("a message of Raft is JSON")).collect()
}

/// A body does not say of which call it is, so it is given to the decoders of all.
fn check_rpc(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let votes = of_rpc(bytes, service::decode_vote)?;
    let appends = of_rpc(bytes, service::decode_append)?;
    let snapshots = of_rpc(bytes, service::decode_snapshot_head)?;
    if let Some(append) = &appends {
        for entry in &append.entries {
            let sealed = encoding::seal(&encoding::entry_record(entry));
            let read = encoding::entry(encoding::unseal(&sealed)?)?;
            ensure!(read == *entry, "an entry is another once the log has had it");
        }
    }
    if let Some(SnapshotHead { meta, .. }) = &snapshots {
        let record = encoding::membership_record(meta.last_membership.membership());
        ensure!(
            encoding::membership(record)? == *meta.last_membership.membership(),
            "a membership is another once a snapshot has had it"
        );
    }
    // The answers; `network` decodes them as they come.
    let answers = [
        of_rpc(bytes, |body| serde_json::from_slice::<VoteAnswer>(body))?.is_some(),
        of_rpc(bytes, |body| serde_json::from_slice::<AppendAnswer>(body))?.is_some(),
        of_rpc(bytes, |body| serde_json::from_slice::<SnapshotAnswer>(body))?.is_some(),
    ];
    let taken = votes.is_some() || appends.is_some() || snapshots.is_some() || answers.contains(&true);
    Ok(if taken { Verdict::Accepted } else { Verdict::Refused })
}

/// What decodes must be the same after its own encoding.
fn of_rpc<T: serde::Serialize, E>(
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, E>,
) -> anyhow::Result<Option<T>> {
    let Ok(decoded) = RPC_BOUND.hold(bytes.len(), || decode(bytes))? else { return Ok(None) };
    let encoded = serde_json::to_vec(&decoded)?;
    let again = decode(&encoded).ok().map(|again| serde_json::to_vec(&again)).transpose()?;
    ensure!(again.as_deref() == Some(&encoded[..]), "a body is not the same after its encoding");
    Ok(Some(decoded))
}
