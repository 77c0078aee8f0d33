//! The receiving end of Raft's own messages; `node` adds the rest of the internal service.
//!
//! Invariants
//! - A message for another node or another cluster is refused before it is looked at.
//! - Nothing is passed on that this node could write to its log and not read again: it would never start any more.

use openraft::EntryPayload;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use serde::Serialize;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto::RaftMessage;

use super::encoding::{self, RecordError};
use super::handle::RaftHandle;
use super::network::{MESSAGE_BYTES_MAX, SnapshotHead};
use super::{Snapshot, TypeConfig, state_machine};

type Answer = Result<Response<RaftMessage>, Status>;
pub type Vote = VoteRequest<TypeConfig>;
pub type VoteAnswer = VoteResponse<TypeConfig>;
pub type Append = AppendEntriesRequest<TypeConfig>;
pub type AppendAnswer = AppendEntriesResponse<TypeConfig>;
pub type SnapshotAnswer = SnapshotResponse<TypeConfig>;

/// # Errors
/// 206 `StoreCorrupt`: the body is none.
pub fn decode_vote(body: &[u8]) -> Result<Vote, RecordError> {
    serde_json::from_slice(body).map_err(|_| RecordError::Encoding)
}

/// # Errors
/// 206 `StoreCorrupt`: the body is none, or has a membership that the log would not give back.
pub fn decode_append(body: &[u8]) -> Result<Append, RecordError> {
    let append: Append = serde_json::from_slice(body).map_err(|_| RecordError::Encoding)?;
    for entry in &append.entries {
        if let EntryPayload::Membership(membership) = &entry.payload {
            encoding::membership(encoding::membership_record(membership))?;
        }
    }
    Ok(append)
}

/// # Errors
/// As `decode_append`.
pub fn decode_snapshot_head(body: &[u8]) -> Result<SnapshotHead, RecordError> {
    let head: SnapshotHead = serde_json::from_slice(body).map_err(|_| RecordError::Encoding)?;
    encoding::membership(encoding::membership_record(head.meta.last_membership.membership()))?;
    Ok(head)
}

/// The snapshot of a stream.
///
/// # Errors
/// 206 `StoreCorrupt`: it is not whole, or no state can be made of it.
pub fn snapshot(head: SnapshotHead, data: Vec<u8>) -> Result<Snapshot, RecordError> {
    if !head.fits(&data) {
        return Err(RecordError::Incomplete);
    }
    state_machine::state_of(&data)?;
    Ok(Snapshot { meta: head.meta, snapshot: data })
}

fn malformed(error: RecordError) -> Status {
    Status::invalid_argument(format!("a message of Raft: {error}"))
}

/// Checks and passes Raft's messages on.
#[derive(Clone)]
pub struct Receiver {
    pub handle: RaftHandle,
    pub cluster: u64,
}

impl Receiver {
    fn check(&self, message: &RaftMessage) -> Result<(), Status> {
        if message.cluster != self.cluster {
            return Err(Status::permission_denied("the message is of another cluster"));
        }
        if NodeId(message.to) != self.handle.node() {
            return Err(Status::permission_denied("the message is for another node"));
        }
        Ok(())
    }

    fn decode<Q>(
        &self,
        request: Request<RaftMessage>,
        decode: fn(&[u8]) -> Result<Q, RecordError>,
    ) -> Result<Q, Status> {
        let message = request.into_inner();
        self.check(&message)?;
        decode(&message.body).map_err(malformed)
    }

    fn answer<R: Serialize, E: std::error::Error>(&self, result: Result<R, E>) -> Answer {
        let answer = result.map_err(|error| Status::internal(error.to_string()))?;
        let body = serde_json::to_vec(&answer).map_err(|_| Status::internal("the answer does not encode"))?;
        Ok(Response::new(RaftMessage { body, ..RaftMessage::default() }))
    }

    pub async fn vote(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request, decode_vote)?;
        self.answer(self.handle.raft().vote(request).await)
    }

    pub async fn pre_vote(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request, decode_vote)?;
        self.answer(self.handle.raft().pre_vote(request).await)
    }

    pub async fn append_entries(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request, decode_append)?;
        self.answer(self.handle.raft().append_entries(request).await)
    }

    pub async fn install_snapshot(&self, request: Request<Streaming<RaftMessage>>) -> Answer {
        let mut stream = request.into_inner();
        let head = stream.next().await.ok_or_else(|| Status::invalid_argument("the stream is empty"))??;
        self.check(&head)?;
        let head = decode_snapshot_head(&head.body).map_err(malformed)?;
        let mut data = Vec::new();
        while let Some(part) = stream.next().await {
            data.extend_from_slice(&part?.body);
            if data.len() > MESSAGE_BYTES_MAX {
                return Err(Status::resource_exhausted("the snapshot is too large"));
            }
        }
        let vote = head.vote;
        let snapshot = snapshot(head, data).map_err(malformed)?;
        self.answer(self.handle.raft().install_full_snapshot(vote, snapshot).await)
    }
}
