//! A node's control plane, put together: stores, Raft, heartbeats, controller, link and API.
//!
//! Used by `main`, and by tests that run several in one process.
//!
//! Invariants
//! - A node has its id, durably, before it starts Raft; it starts Raft before it serves anything.
//! - A node that has served never starts with a new log: what it voted and acknowledged is in the old one.
//! - Raft and the network run on a runtime of their own; everything else on the caller's.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use xsan_nodekit::config::{NodeConfig, Startup};
use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::placement::DEFAULT_FAILURE_DOMAIN;
use xsan_protocol::proto::cluster_server::ClusterServer;
use xsan_protocol::proto::raft_server::RaftServer;

use crate::api::Context;
use crate::api::internal::Internal;
use crate::controller::{Controller, Leader};
use crate::events::EventLog;
use crate::events::file::{EventFile, EventSaver};
use crate::link::Link;
use crate::link::server::{LinkServer, bind};
use crate::membership::heartbeat::Heartbeats;
use crate::raft::encoding::RecordError;
use crate::raft::handle::{ProposeError, RaftHandle, StartError};
use crate::raft::log_store::{LogStore, RaftIdentity};
use crate::raft::network::{Channels, MESSAGE_BYTES_MAX, cluster_hash};
use crate::raft::service::Receiver;
use crate::raft::state_machine::StateMachine;
use crate::scrub::Scrubs;
use crate::state::command::{Command, NewNode};
use crate::timing::RaftTiming;

/// Threads of Raft's runtime: one may wait for the disk while the other serves the network.
const RAFT_THREADS: usize = 2;
/// How long a stopping node waits for requests in progress, and for its last events to be saved.
const STOP_WAIT: Duration = Duration::from_secs(2);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// What a node needs to know to start.
#[derive(Clone, Debug)]
pub struct Settings {
    pub cluster_id: String,
    pub name: String,
    pub bind_ip: IpAddr,
    pub bind_port: u16,
    pub failure_domain: String,
    pub data_dir: PathBuf,
    pub startup: Startup,
    pub heartbeat_interval: Duration,
    pub election_timeout: Duration,
    pub default_replica_count: u8,
    /// The node's number and the instance that it was given to; xsan-node got them from the cluster.
    pub identity: RaftIdentity,
    /// The node has served: it has voted, perhaps, and its log must be there.
    pub established: bool,
}

impl Settings {
    pub fn new(config: NodeConfig) -> Self {
        let cluster = config.cluster;
        Self {
            cluster_id: cluster.cluster_id,
            name: cluster.node_id,
            bind_ip: cluster.bind_ip,
            bind_port: cluster.bind_port,
            failure_domain: cluster.failure_domain,
            data_dir: cluster.data_dir,
            startup: config.startup,
            heartbeat_interval: config.network.heartbeat_interval,
            election_timeout: config.network.election_timeout,
            default_replica_count: config.storage.default_replica_count,
            identity: RaftIdentity { instance: config.instance, node: config.numeric_id.0 },
            established: config.established,
        }
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.bind_ip, self.bind_port)
    }

    /// Where the control process keeps its state.
    fn control_dir(&self) -> PathBuf {
        self.data_dir.join("control")
    }

    fn new_node(&self, instance: u64) -> NewNode {
        let named = !self.failure_domain.is_empty();
        let failure_domain = if named { &self.failure_domain } else { DEFAULT_FAILURE_DOMAIN };
        NewNode {
            cluster_id: self.cluster_id.clone(),
            name: self.name.clone(),
            address: self.bind_ip,
            control_port: self.bind_port,
            failure_domain: failure_domain.to_owned(),
            instance,
            founder: self.startup == Startup::Init,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("{path}: {source}")]
    Storage { path: PathBuf, source: io::Error },
    #[error("{path}: is gone or empty, and node {name} can not vote again without what it held")]
    LogLost { path: PathBuf, name: String },
    #[error("address {address}: {source}")]
    Address { address: SocketAddr, source: io::Error },
    #[error("{0}")]
    Raft(#[from] StartError),
    #[error("threads could not be started: {0}")]
    Threads(io::Error),
}

impl NodeError {
    pub fn code(&self) -> Code {
        match self {
            Self::Storage { source, .. } => {
                match source.get_ref().and_then(|inner| inner.downcast_ref::<RecordError>()) {
                    Some(RecordError::Format { .. }) => Code::FormatUnsupported,
                    _ => Code::DataDirUnusable,
                }
            }
            Self::LogLost { .. } => Code::RaftLogLost,
            Self::Address { .. } => Code::AddressInUse,
            Self::Raft(error) => error.code(),
            Self::Threads(_) => Code::MemoryShort,
        }
    }
}

/// A running node. Dropping it ends its tasks at once, as the death of the process would.
pub struct ControlNode {
    handle: RaftHandle,
    tasks: JoinSet<()>,
    stop: Option<oneshot::Sender<()>>,
    raft_runtime: RaftRuntime,
    context: Context,
    heartbeats: Heartbeats,
    events: EventSaver,
}

/// Raft's runtime; dropped on another runtime's thread it must not wait for its tasks.
struct RaftRuntime(Option<Runtime>);

impl Drop for RaftRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// The sockets of a node, bound before anything is said to others.
struct Sockets {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl ControlNode {
    /// Starts a node: founds or joins its cluster the first time, and takes up where it was later.
    ///
    /// # Errors
    /// The data directory or the addresses can not be used; the cluster refuses the node (100 to 103, 110); the log of
    /// a node that has served is gone (117).
    pub async fn start(settings: Settings) -> Result<Self, NodeError> {
        let (store, machine) = open_stores(&settings)?;
        let channels = Channels::default();
        let raft_runtime = Builder::new_multi_thread()
            .worker_threads(RAFT_THREADS)
            .thread_name("raft")
            .enable_all()
            .build()
            .map_err(NodeError::Threads)?;
        let on = raft_runtime.handle().clone();
        let raft_runtime = RaftRuntime(Some(raft_runtime));
        let file = EventFile::new(&settings.control_dir());
        let events = EventLog::after(file.load());
        let (handle, tasks, stop, context, heartbeats) =
            Self::start_on(&settings, &on, store, machine, channels, events).await?;
        let events = EventSaver::start(file, Arc::clone(&context.leader)).map_err(NodeError::Threads)?;
        Ok(Self { handle, tasks, stop: Some(stop), raft_runtime, context, heartbeats, events })
    }

    async fn start_on(
        settings: &Settings,
        raft_runtime: &Handle,
        store: LogStore,
        machine: StateMachine,
        channels: Channels,
        events: EventLog,
    ) -> Result<(RaftHandle, JoinSet<()>, oneshot::Sender<()>, Context, Heartbeats), NodeError> {
        let sockets = bind_sockets(settings, raft_runtime).await?;
        let identity = identify(settings, &store)?;
        let node = NodeId(identity.node);
        let handle = {
            let timing = RaftTiming::new(settings.election_timeout);
            let (cluster_id, channels) = (settings.cluster_id.clone(), channels.clone());
            let start =
                async move { RaftHandle::start(node, &cluster_id, store, machine, timing, channels).await };
            raft_runtime.spawn(start).await.expect("starting Raft does not panic")?
        };
        if settings.startup == Startup::Init {
            handle.found(&settings.address().to_string()).await?;
        }
        let leader = Arc::new(Leader::new(handle.clone(), events));
        let link = Arc::new(Link::default());
        let context = Context {
            handle: handle.clone(),
            leader,
            link,
            channels,
            default_replica_count: settings.default_replica_count,
            runtime: Handle::current(),
        };
        let (stop, stopped) = oneshot::channel();
        serve(settings, raft_runtime, sockets.tcp, &context, stopped);
        let mut tasks = JoinSet::new();
        let heartbeats = Heartbeats {
            socket: Arc::new(sockets.udp),
            cluster: cluster_hash(&settings.cluster_id),
            node,
            interval: settings.heartbeat_interval,
            state: handle.watch_state(),
            link: Arc::clone(&context.link),
            leader: Arc::clone(&context.leader),
            removed: Arc::new(Notify::new()),
        };
        spawn_tasks(settings, raft_runtime, &mut tasks, &heartbeats, &context)?;
        let registered = settings.new_node(identity.instance);
        tasks.spawn(keep_registered(handle.clone(), registered));
        Ok((handle, tasks, stop, context, heartbeats))
    }

    pub const fn handle(&self) -> &RaftHandle {
        &self.handle
    }

    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Waits until Raft has stopped with an error: the process must end then.
    pub async fn failed(&self) {
        self.handle.stopped().await;
    }

    /// Waits until the cluster has removed this node, as its own log or the leader says: it must serve no more.
    pub async fn removed(&self) {
        let node = self.handle.node();
        let mut state = self.handle.watch_state();
        tokio::select! {
            () = self.heartbeats.removed.notified() => {}
            Ok(_) = state.wait_for(|state| state.was_removed(node)) => {}
        }
    }

    /// Ends the node in order: no new requests, a last beat, Raft stopped, stores closed.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take()
            && stop.send(()).is_err()
        {
            tracing::warn!("the API had ended already");
        }
        self.heartbeats.beat().await;
        self.tasks.shutdown().await;
        self.handle.shutdown().await;
        self.events.stop(STOP_WAIT).await;
        if let Some(runtime) = self.raft_runtime.0.take() {
            let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(STOP_WAIT)).await;
            ended.expect("ending a runtime does not panic");
        }
    }
}

fn open_stores(settings: &Settings) -> Result<(LogStore, StateMachine), NodeError> {
    let directory = settings.control_dir();
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| NodeError::Storage { path, source }
    };
    std::fs::create_dir_all(&directory).map_err(failed(&directory))?;
    let (log, state) = (directory.join("raft.redb"), directory.join("state.sled"));
    let lost = || NodeError::LogLost { path: log.clone(), name: settings.name.clone() };
    // A new log in its place would let the node vote a second time in a term, and a founder found a second cluster.
    if settings.established && !log.exists() {
        return Err(lost());
    }
    let store = LogStore::open(&log).map_err(failed(&log))?;
    if settings.established && store.read_identity().map_err(failed(&log))?.is_none() {
        return Err(lost());
    }
    let machine = StateMachine::open(&state, store.clone()).map_err(failed(&state))?;
    Ok((store, machine))
}

async fn bind_sockets(settings: &Settings, raft_runtime: &Handle) -> Result<Sockets, NodeError> {
    let address = settings.address();
    let failed = move |source| NodeError::Address { address, source };
    // Bound on the runtime that polls them.
    let bind = async move {
        Ok(Sockets { tcp: TcpListener::bind(address).await?, udp: UdpSocket::bind(address).await? })
    };
    raft_runtime.spawn(bind).await.expect("binding does not panic").map_err(failed)
}

/// This node's identity, which its Raft log must be of.
fn identify(settings: &Settings, store: &LogStore) -> Result<RaftIdentity, NodeError> {
    let path = settings.control_dir().join("raft.redb");
    let failed = |source| NodeError::Storage { path: path.clone(), source };
    match store.read_identity().map_err(failed)? {
        Some(found) if found != settings.identity => {
            let other = format!("the log is of node {}, this is node {}", found.node, settings.identity.node);
            Err(failed(io::Error::other(other)))
        }
        Some(found) => Ok(found),
        None => {
            store.save_identity(settings.identity).map_err(failed)?;
            Ok(settings.identity)
        }
    }
}

/// Serves the API and the internal service, on Raft's runtime.
fn serve(
    settings: &Settings,
    raft_runtime: &Handle,
    listener: TcpListener,
    context: &Context,
    stopped: oneshot::Receiver<()>,
) {
    let receiver = Receiver { handle: context.handle.clone(), cluster: cluster_hash(&settings.cluster_id) };
    let internal = RaftServer::new(Internal { context: context.clone(), receiver })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let server = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .add_service(internal)
        .add_service(ClusterServer::new(context.clone()));
    raft_runtime.spawn(async move {
        let end = async { drop(stopped.await) };
        if let Err(error) = server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), end).await {
            tracing::error!("the API has ended: {error}");
        }
    });
}

/// Starts what runs as long as the node: heartbeats beside Raft, the rest here.
fn spawn_tasks(
    settings: &Settings,
    raft_runtime: &Handle,
    tasks: &mut JoinSet<()>,
    heartbeats: &Heartbeats,
    context: &Context,
) -> Result<(), NodeError> {
    tasks.spawn_on(heartbeats.clone().send(), raft_runtime);
    tasks.spawn_on(heartbeats.clone().receive(), raft_runtime);
    tasks.spawn_on(heartbeats.clone().catch_up(), raft_runtime);
    let leader = Arc::clone(&context.leader);
    tasks.spawn_on(async move { leader.watch_elections().await }, raft_runtime);
    tasks.spawn(Controller::new(context.handle.clone(), Arc::clone(&context.leader)).run());
    tasks.spawn(Controller::watch_voters(context.handle.clone()));
    tasks.spawn(Scrubs::new(context.handle.clone(), Arc::clone(&context.link)).run());
    let path = settings.data_dir.join("link.sock");
    let listener = bind(&path).map_err(|source| NodeError::Storage { path, source })?;
    let server = LinkServer {
        link: Arc::clone(&context.link),
        handle: context.handle.clone(),
        leader: Arc::clone(&context.leader),
        channels: context.channels.clone(),
        cluster_id: settings.cluster_id.clone(),
    };
    tasks.spawn(server.clone().report_slow());
    tasks.spawn(server.run(listener));
    Ok(())
}

/// The founder adds itself to the state it founded: again, if it died in between.
async fn keep_registered(handle: RaftHandle, new: NewNode) {
    let node = handle.node();
    let known = |handle: &RaftHandle| handle.state().map().nodes.contains_key(&node);
    while !known(&handle) {
        tokio::time::sleep(RETRY_INTERVAL).await;
        let leads = handle.leadership().is_some_and(|leadership| leadership.may_grant);
        if leads && !known(&handle) {
            match handle.propose_here(Command::AddNode(new.clone())).await {
                Ok(reply) => tracing::info!(?reply, "the cluster is founded"),
                Err(error @ (ProposeError::NotLeader | ProposeError::NoQuorum)) => {
                    tracing::debug!("the cluster is not founded yet: {error}");
                }
                Err(error) => {
                    tracing::error!(code = error.code().number(), "the cluster is not founded: {error}");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_another_format_is_told_as_that() {
        let code = |record: RecordError| {
            let source = io::Error::from(record);
            NodeError::Storage { path: "raft.redb".into(), source }.code()
        };
        assert_eq!(code(RecordError::Format { found: 9 }), Code::FormatUnsupported);
        assert_eq!(code(RecordError::Empty), Code::DataDirUnusable);
    }
}
