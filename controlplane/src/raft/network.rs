//! The sending end of Raft's messages: one gRPC channel per peer, kept open.
//!
//! Driven by openraft; `channels` are shared with everything else that calls other control processes.
//!
//! Invariants
//! - Every call ends within openraft's deadline for it.
//! - Every message names the node and the cluster that it is for: another node at that address refuses it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::impls::BasicNode;
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};
use xsan_protocol::checksum::crc64;
use xsan_protocol::proto;
use xsan_protocol::proto::raft_client::RaftClient;

use super::{Snapshot, SnapshotMeta, TypeConfig, Vote};

/// Largest message between control processes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Largest command: a change of every group of every pool is a quarter of it.
pub const COMMAND_BYTES_MAX: usize = 1024 * 1024;
/// Entries that are sent at once, unless one alone is larger. In a message they take a little more than twice that.
pub const BATCH_BYTES_MAX: usize = 1024 * 1024;
const _: () = assert!(4 * (COMMAND_BYTES_MAX + BATCH_BYTES_MAX) <= MESSAGE_BYTES_MAX);
const CONNECT_WAIT: Duration = Duration::from_millis(500);
/// A peer that does not answer a ping is dead: its connection is made anew.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_WAIT: Duration = Duration::from_secs(2);
const SNAPSHOT_PART_BYTES: usize = 256 * 1024;
/// A snapshot is some MiB: sending and installing it may take longer than openraft's default.
pub const SNAPSHOT_WAIT: Duration = Duration::from_secs(20);

/// Names a cluster in every message, shorter than its id.
pub fn cluster_hash(cluster_id: &str) -> u64 {
    crc64(cluster_id.as_bytes())
}

/// Connections to other control processes, by address.
#[derive(Clone, Debug, Default)]
pub struct Channels {
    open: Arc<Mutex<HashMap<String, Channel>>>,
}

impl Channels {
    /// A channel that connects when first used, and again when it broke.
    ///
    /// # Errors
    /// The address is not `host:port`.
    pub fn to(&self, address: &str) -> Result<Channel, Status> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = open.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| Status::invalid_argument("the address is not host:port"))?
            .connect_timeout(CONNECT_WAIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_WAIT)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_lazy();
        open.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// A client of the internal service at `address`.
    ///
    /// # Errors
    /// The address is not `host:port`.
    pub fn client(&self, address: &str) -> Result<RaftClient<Channel>, Status> {
        Ok(RaftClient::new(self.to(address)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}

/// Makes the clients that openraft asks for.
#[derive(Clone, Debug)]
pub struct Network {
    pub node: u64,
    pub cluster: u64,
    pub channels: Channels,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        let network = self.clone();
        Peer { network, target, address: node.addr.clone() }
    }
}

/// One peer, for one of openraft's tasks.
#[derive(Debug)]
pub struct Peer {
    network: Network,
    target: u64,
    address: String,
}

/// The head of a snapshot's stream. A stream that its sender gave up may look as if it had ended: length and checksum tell.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub struct SnapshotHead {
    pub vote: Vote,
    pub meta: SnapshotMeta,
    pub bytes: usize,
    pub crc64: u64,
}

impl SnapshotHead {
    pub fn new(vote: Vote, meta: SnapshotMeta, data: &[u8]) -> Self {
        Self { vote, meta, bytes: data.len(), crc64: crc64(data) }
    }

    /// Is `data` the whole snapshot, as it was sent?
    pub fn fits(&self, data: &[u8]) -> bool {
        (data.len(), crc64(data)) == (self.bytes, self.crc64)
    }
}

type CallResult<R> = Result<R, RPCError<TypeConfig>>;

impl Peer {
    fn message(&self, body: Vec<u8>) -> proto::RaftMessage {
        let to = u32::try_from(self.target).expect("a membership is checked when it is decoded");
        proto::RaftMessage { body, to, cluster: self.network.cluster }
    }

    fn client(&self) -> CallResult<RaftClient<Channel>> {
        self.network.channels.client(&self.address).map_err(|status| Unreachable::new(&status).into())
    }

    /// One call, its messages as JSON, ended by `deadline`.
    async fn call<Q, R, F>(
        &self,
        action: RPCTypes,
        request: &Q,
        deadline: Duration,
        send: impl FnOnce(RaftClient<Channel>, Request<proto::RaftMessage>) -> F,
    ) -> CallResult<R>
    where
        Q: Serialize,
        R: DeserializeOwned,
        F: Future<Output = Result<Response<proto::RaftMessage>, Status>>,
    {
        let body = serde_json::to_vec(request).map_err(|error| NetworkError::new(&error))?;
        let answer = send(self.client()?, Request::new(self.message(body)));
        match tokio::time::timeout(deadline, answer).await {
            Err(_) => {
                Err(Timeout { action, id: self.network.node, target: self.target, timeout: deadline }.into())
            }
            Ok(Err(status)) => Err(Unreachable::new(&status).into()),
            Ok(Ok(answer)) => {
                let answer = serde_json::from_slice(&answer.into_inner().body);
                answer.map_err(|error| NetworkError::new(&error).into())
            }
        }
    }
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> CallResult<AppendEntriesResponse<TypeConfig>> {
        let send =
            |mut client: RaftClient<Channel>, request| async move { client.append_entries(request).await };
        self.call(RPCTypes::AppendEntries, &rpc, option.soft_ttl(), send).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> CallResult<VoteResponse<TypeConfig>> {
        // The voter's disk needs its time.
        let send = |mut client: RaftClient<Channel>, request| async move { client.vote(request).await };
        self.call(RPCTypes::Vote, &rpc, option.hard_ttl(), send).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> CallResult<VoteResponse<TypeConfig>> {
        let send = |mut client: RaftClient<Channel>, request| async move { client.pre_vote(request).await };
        self.call(RPCTypes::Vote, &rpc, option.soft_ttl(), send).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let head = SnapshotHead::new(vote, snapshot.meta, &snapshot.snapshot);
        let head = serde_json::to_vec(&head).map_err(|error| NetworkError::new(&error))?;
        let mut messages = vec![self.message(head)];
        messages
            .extend(snapshot.snapshot.chunks(SNAPSHOT_PART_BYTES).map(|part| self.message(part.to_vec())));
        let mut client = self.client()?;
        let call = client.install_snapshot(tokio_stream::iter(messages));
        let answer = tokio::select! {
            closed = cancel => return Err(closed.into()),
            answer = tokio::time::timeout(SNAPSHOT_WAIT, call) => answer,
        };
        match answer {
            Err(_) => Err(StreamingError::Timeout(Timeout {
                action: RPCTypes::InstallSnapshot,
                id: self.network.node,
                target: self.target,
                timeout: SNAPSHOT_WAIT,
            })),
            Ok(Err(status)) => Err(Unreachable::new(&status).into()),
            Ok(Ok(answer)) => serde_json::from_slice(&answer.into_inner().body)
                .map_err(|error| NetworkError::new(&error).into()),
        }
    }
}
