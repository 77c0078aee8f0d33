//! The receiving end of Raft's own messages; `node` adds the rest of the internal service.
//!
//! Invariants
//! - A message for another node or another cluster is refused before it is looked at.

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto::RaftMessage;

use super::handle::RaftHandle;
use super::network::{MESSAGE_BYTES_MAX, SnapshotHead};
use super::{Snapshot, state_machine};

type Answer = Result<Response<RaftMessage>, Status>;

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

    fn decode<Q: DeserializeOwned>(&self, request: Request<RaftMessage>) -> Result<Q, Status> {
        let message = request.into_inner();
        self.check(&message)?;
        serde_json::from_slice(&message.body)
            .map_err(|_| Status::invalid_argument("the message does not decode"))
    }

    fn answer<R: Serialize, E: std::error::Error>(&self, result: Result<R, E>) -> Answer {
        let answer = result.map_err(|error| Status::internal(error.to_string()))?;
        let body = serde_json::to_vec(&answer).map_err(|_| Status::internal("the answer does not encode"))?;
        Ok(Response::new(RaftMessage { body, ..RaftMessage::default() }))
    }

    pub async fn vote(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request)?;
        self.answer(self.handle.raft().vote(request).await)
    }

    pub async fn pre_vote(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request)?;
        self.answer(self.handle.raft().pre_vote(request).await)
    }

    pub async fn append_entries(&self, request: Request<RaftMessage>) -> Answer {
        let request = self.decode(request)?;
        self.answer(self.handle.raft().append_entries(request).await)
    }

    pub async fn install_snapshot(&self, request: Request<Streaming<RaftMessage>>) -> Answer {
        let mut stream = request.into_inner();
        let head = stream.next().await.ok_or_else(|| Status::invalid_argument("the stream is empty"))??;
        self.check(&head)?;
        let head: SnapshotHead = serde_json::from_slice(&head.body)
            .map_err(|_| Status::invalid_argument("the head does not decode"))?;
        let mut data: <state_machine::StateMachine as openraft::storage::RaftStateMachine<_>>::SnapshotData =
            Vec::new();
        while let Some(part) = stream.next().await {
            data.extend_from_slice(&part?.body);
            if data.len() > MESSAGE_BYTES_MAX {
                return Err(Status::resource_exhausted("the snapshot is too large"));
            }
        }
        let snapshot = Snapshot { meta: head.meta, snapshot: data };
        self.answer(self.handle.raft().install_full_snapshot(head.vote, snapshot).await)
    }
}
