//! Raft's entries, votes and memberships as records on disk: messages of `raft.proto` after a format byte.
//!
//! Used by `log_store` and `state_machine`. Our own, so that a new openraft does not change what disks hold.
//!
//! Invariants
//! - A record of another format is refused, never guessed at.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use openraft::entry::RaftEntry;
use openraft::impls::BasicNode;
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, Membership};
use prost::Message;
use xsan_protocol::error::Code;
use xsan_protocol::proto;
use xsan_protocol::proto::log_record::Payload;

use super::{Entry, LogId, StoredMembership, TypeConfig, Vote};
use crate::state::command::{Command, CommandError};

/// Format of every record of the control plane's databases.
pub const FORMAT: u8 = 1;

type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;

/// Bytes on disk that are no record of this release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("a record is empty")]
    Empty,
    #[error("a record has format {found}, this release reads {FORMAT}")]
    Format { found: u8 },
    #[error("a record does not decode")]
    Encoding,
    #[error("a command in the log: {0}")]
    Command(#[from] CommandError),
    #[error("a membership names a voter that is no peer")]
    Membership,
    #[error("a snapshot is not whole")]
    Incomplete,
    #[error("no state can be made of a snapshot")]
    State,
}

impl RecordError {
    pub const fn code(self) -> Code {
        match self {
            Self::Format { .. } => Code::FormatUnsupported,
            _ => Code::StoreCorrupt,
        }
    }
}

impl From<RecordError> for io::Error {
    fn from(error: RecordError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

/// A message with the format byte before it.
pub fn seal(message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + message.encoded_len());
    bytes.push(FORMAT);
    message.encode(&mut bytes).expect("a vector grows as needed");
    bytes
}

/// The message after the format byte.
///
/// # Errors
/// 208 `FormatUnsupported`, 206 `StoreCorrupt`.
pub fn unseal<M: Message + Default>(bytes: &[u8]) -> Result<M, RecordError> {
    match bytes.split_first() {
        None => Err(RecordError::Empty),
        Some((&FORMAT, rest)) => M::decode(rest).map_err(|_| RecordError::Encoding),
        Some((&found, _)) => Err(RecordError::Format { found }),
    }
}

pub fn position(log_id: &LogId) -> proto::LogPosition {
    proto::LogPosition { term: log_id.committed_leader_id().term, index: log_id.index() }
}

pub fn log_id(position: &proto::LogPosition) -> LogId {
    LogId::new_term_index(position.term, position.index)
}

pub fn vote_record(vote: &Vote) -> proto::VoteRecord {
    proto::VoteRecord { term: vote.leader_id.term, node: vote.leader_id.voted_for, committed: vote.committed }
}

pub fn vote(record: &proto::VoteRecord) -> Vote {
    let leader_id = LeaderId::new(record.term, record.node);
    Vote { leader_id, committed: record.committed }
}

pub fn membership_record(membership: &Membership<u64, BasicNode>) -> proto::RaftMembership {
    let set = |set: &BTreeSet<u64>| proto::VoterSet { nodes: set.iter().copied().collect() };
    let peer = |(node, peer): (&u64, &BasicNode)| proto::RaftPeer { node: *node, address: peer.addr.clone() };
    proto::RaftMembership {
        voters: membership.get_joint_config().iter().map(set).collect(),
        peers: membership.nodes().map(peer).collect(),
    }
}

pub fn membership(record: proto::RaftMembership) -> Result<Membership<u64, BasicNode>, RecordError> {
    let voters: Vec<BTreeSet<u64>> =
        record.voters.into_iter().map(|set| set.nodes.into_iter().collect()).collect();
    let peers: BTreeMap<u64, BasicNode> =
        record.peers.into_iter().map(|peer| (peer.node, BasicNode { addr: peer.address })).collect();
    if voters.is_empty() && peers.is_empty() {
        return Ok(Membership::default());
    }
    let is_node = |id: &u64| u32::try_from(*id).is_ok_and(|id| id > 0);
    if !voters.iter().flatten().chain(peers.keys()).all(is_node) {
        return Err(RecordError::Membership);
    }
    Membership::new(voters, peers).map_err(|_| RecordError::Membership)
}

pub fn stored_membership(
    position: Option<&proto::LogPosition>,
    record: Option<proto::RaftMembership>,
) -> Result<StoredMembership, RecordError> {
    Ok(StoredMembership::new(position.map(log_id), membership(record.unwrap_or_default())?))
}

pub fn entry_record(entry: &Entry) -> proto::LogRecord {
    let position = position(&entry.log_id);
    let payload = match &entry.payload {
        EntryPayload::Blank => None,
        EntryPayload::Normal(command) => Some(Payload::Command(command.into())),
        EntryPayload::Membership(membership) => Some(Payload::Membership(membership_record(membership))),
    };
    proto::LogRecord { term: position.term, index: position.index, payload }
}

pub fn entry(record: proto::LogRecord) -> Result<Entry, RecordError> {
    let log_id = LogId::new_term_index(record.term, record.index);
    let payload = match record.payload {
        None => EntryPayload::Blank,
        Some(Payload::Command(command)) => EntryPayload::Normal(Command::try_from(command)?),
        Some(Payload::Membership(record)) => EntryPayload::Membership(membership(record)?),
    };
    Ok(Entry::new(log_id, payload))
}
