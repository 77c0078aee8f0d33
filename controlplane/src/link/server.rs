//! The socket on which the node's data process links: accepts it, watches it, moves its messages.
//!
//! Runs on every node. Registers the data process with the cluster, pushes maps and leases to it, passes its wishes
//! to the leader and its sessions to the cluster's state. Knows nothing of what they mean.
//!
//! Invariants
//! - The death of the process is watched from its hello on, whatever becomes of its socket.
//! - Every open is answered, within a time limit; what a close would say is in every status.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::BufReader;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, Incarnation, NodeId, StoreId, VolumeId};
use xsan_protocol::map::{DamagedStore, DataProcess, MapError};
use xsan_protocol::proto;
use xsan_protocol::proto::LinkMessage;
use xsan_protocol::proto::group_proposal::Change;
use xsan_protocol::proto::link_message::Body;

use super::attachments::Attachments;
use super::frame::{self, FrameError};
use super::pidfd::ProcessWatch;
use super::sessions::{OPENS_MAX, WaitingOpen};
use super::{Link, LinkError};
use crate::clock::BootTime;
use crate::controller::Leader;
use crate::placement::{Proposal, ProposedChange};
use crate::raft::handle::RaftHandle;
use crate::raft::network::Channels;
use crate::state::command::Command;
use crate::timing::SLOW_REPORT_INTERVAL;

const HELLO_WAIT: Duration = Duration::from_secs(10);
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(300);
const FORWARD_WAIT: Duration = Duration::from_secs(1);
/// Messages that wait to be written; maps and leases do not queue, only the newest counts.
const OUTBOUND_MAX: usize = 64;

#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Map(#[from] MapError),
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("the first message was no hello, or did not come in time")]
    NoHello,
    #[error("the hello says process {said}, the socket belongs to process {found}")]
    Pid { said: u32, found: i32 },
}

impl ConnectionError {
    const fn code(&self) -> Code {
        match self {
            Self::Frame(error) => error.code(),
            Self::Link(error) => error.code(),
            Self::Io(_) => Code::Internal,
            Self::Map(error) => error.code(),
            Self::NoHello | Self::Pid { .. } => Code::FrameInvalid,
        }
    }
}

/// Binds the socket, for this user only. One left behind by an earlier life is replaced.
///
/// # Errors
/// The path can not be bound.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[derive(Clone)]
pub struct LinkServer {
    pub link: Arc<Link>,
    pub handle: RaftHandle,
    pub leader: Arc<Leader>,
    pub channels: Channels,
    pub cluster_id: String,
}

impl LinkServer {
    /// Serves one data process after the other. Runs for ever.
    pub async fn run(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = server.serve(stream).await {
                            let code = error.code().number();
                            tracing::warn!(code, "link to the data process: {error}");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!("link socket: {error}");
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    async fn serve(&self, stream: UnixStream) -> Result<(), ConnectionError> {
        let pid = stream.peer_cred()?.pid().ok_or(ConnectionError::NoHello)?;
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let first = tokio::time::timeout(HELLO_WAIT, frame::read(&mut reader)).await;
        let Ok(Some(LinkMessage { body: Some(Body::Hello(hello)), .. })) = first.unwrap_or(Ok(None)) else {
            return Err(ConnectionError::NoHello);
        };
        if i32::try_from(hello.pid) != Ok(pid) {
            return Err(ConnectionError::Pid { said: hello.pid, found: pid });
        }
        let process = hello.process.ok_or(ConnectionError::NoHello)?;
        let process = DataProcess::from_message(process, u64::from(self.handle.node().0))?;
        let damaged = hello.damaged_stores.into_iter().map(DamagedStore::from).collect();
        let incarnation = process.incarnation;
        let watch = ProcessWatch::open(pid)?;
        let (outbound, queued) = mpsc::channel(OUTBOUND_MAX);
        let connection = self.link.on_hello(BootTime::now(), process, damaged, outbound.clone())?;
        tracing::info!(pid, %incarnation, "data process linked");
        let attachments = Attachments::default();
        tokio::spawn(self.clone().watch_death(watch, incarnation));
        let result = tokio::select! {
            result = self.read(reader, outbound, incarnation, &attachments) => result,
            result = self.write(writer, queued) => result.map_err(ConnectionError::from),
            never = self.register(incarnation) => match never {},
            never = self.keep_attached(incarnation, &attachments) => match never {},
        };
        self.link.on_unlinked(connection);
        result
    }

    async fn watch_death(self, watch: ProcessWatch, incarnation: Incarnation) {
        if let Err(error) = watch.dead().await {
            tracing::warn!("the data process is no longer watched: {error}");
            return;
        }
        tracing::warn!(%incarnation, "the data process is dead");
        self.link.on_death(incarnation);
        self.detach_all(incarnation).await;
    }

    /// Keeps the cluster's state naming this life of the data process.
    async fn register(&self, incarnation: Incarnation) -> std::convert::Infallible {
        let node = self.handle.node();
        let mut state = self.handle.watch_state();
        loop {
            let replaces = state.borrow_and_update().registered(node);
            if replaces == Some(incarnation) {
                self.link.on_registered();
                if state.wait_for(|state| !state.is_registered(node, incarnation)).await.is_err() {
                    std::future::pending::<()>().await;
                }
                continue;
            }
            let Some((process, damaged_stores)) =
                self.link.process().filter(|(process, _)| process.incarnation == incarnation)
            else {
                tokio::time::sleep(RETRY_INTERVAL).await;
                continue;
            };
            let command = Command::DataStarted { node, process, damaged_stores, replaces };
            if let Err(error) = self.handle.propose(command).await {
                tracing::warn!(
                    code = error.code().number(),
                    "the data process is not registered yet: {error}"
                );
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }

    async fn write(
        &self,
        mut writer: OwnedWriteHalf,
        mut queued: mpsc::Receiver<LinkMessage>,
    ) -> io::Result<()> {
        let push = |body| LinkMessage { request_id: 0, body: Some(body) };
        let welcome =
            proto::DataWelcome { node_id: self.handle.node().0, cluster_id: self.cluster_id.clone() };
        frame::write(&mut writer, &push(Body::Welcome(welcome))).await?;
        let mut state = self.handle.watch_state();
        state.mark_changed();
        let mut lease: watch::Receiver<Option<BootTime>> = self.link.watch_lease();
        lease.mark_changed();
        loop {
            let message = tokio::select! {
                // A map before the leases that were granted under it.
                biased;
                changed = state.changed() => {
                    if changed.is_err() { return Ok(()) }
                    let map = proto::ClusterMap::from(state.borrow_and_update().map());
                    push(Body::Map(map))
                }
                changed = lease.changed() => {
                    if changed.is_err() { return Ok(()) }
                    // A control process that starts anew knows of none; what the one before passed on holds.
                    let Some(BootTime(until_boottime_ns)) = *lease.borrow_and_update() else { continue };
                    push(Body::Lease(proto::Lease { until_boottime_ns }))
                }
                message = queued.recv() => match message {
                    Some(message) => message,
                    None => return Ok(()),
                },
            };
            frame::write(&mut writer, &message).await?;
        }
    }

    async fn read(
        &self,
        reader: BufReader<OwnedReadHalf>,
        outbound: mpsc::Sender<LinkMessage>,
        incarnation: Incarnation,
        attachments: &Attachments,
    ) -> Result<(), ConnectionError> {
        let (opens, waiting) = mpsc::channel(OPENS_MAX);
        tokio::select! {
            result = self.read_messages(reader, &outbound, opens, attachments) => result,
            () = self.serve_opens(waiting, &outbound, incarnation, attachments) => Ok(()),
        }
    }

    async fn read_messages(
        &self,
        mut reader: BufReader<OwnedReadHalf>,
        outbound: &mpsc::Sender<LinkMessage>,
        opens: mpsc::Sender<WaitingOpen>,
        attachments: &Attachments,
    ) -> Result<(), ConnectionError> {
        loop {
            let message = frame::read(&mut reader).await?;
            let Some(LinkMessage { request_id, body: Some(body) }) = message else { return Ok(()) };
            match body {
                Body::Status(status) => {
                    attachments.on_status(&status);
                    self.on_status(status);
                }
                Body::Proposals(proposals) => {
                    tokio::spawn(self.clone().forward(proposals));
                }
                Body::OpenVolume(open) => {
                    let waiting = WaitingOpen::new(request_id, open.name);
                    attachments.on_open(&waiting.name);
                    if let Err(error) = opens.try_send(waiting) {
                        let answer = link_error(Code::Busy, format!("volume {}", error.into_inner().name));
                        let answer = LinkMessage { request_id, body: Some(answer) };
                        if outbound.send(answer).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                Body::CloseVolume(close) => attachments.on_closed(VolumeId(close.volume)),
                Body::PerfStats(_) | Body::BlockReplica(_) | Body::Error(_) => {
                    self.link.on_answer(request_id, body);
                }
                _ => tracing::warn!("a message on the link that only this side sends"),
            }
        }
    }

    fn on_status(&self, status: proto::DataStatus) {
        let failed = self.link.on_status(BootTime::now(), status);
        let Some((process, _)) = self.link.process().filter(|_| !failed.is_empty()) else { return };
        for store in failed {
            tokio::spawn(self.clone().report_store(process.incarnation, store));
        }
    }

    /// Tells the cluster that a store failed, until it knows.
    async fn report_store(self, incarnation: Incarnation, store: StoreId) {
        tracing::error!(code = Code::StoreFailed.number(), %store, "a store failed; its groups move on");
        let node = self.handle.node();
        let command = Command::StoreFailed { node, incarnation, store };
        while let Err(error) = self.handle.propose(command.clone()).await {
            tracing::warn!(code = error.code().number(), "the failed store is not reported yet: {error}");
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Tells the leader which nodes the data process finds slow. Runs for ever.
    pub async fn report_slow(self) {
        loop {
            tokio::time::sleep(SLOW_REPORT_INTERVAL).await;
            let nodes = self.link.slow_nodes(BootTime::now());
            if nodes.is_empty() {
                continue;
            }
            let from = self.handle.node();
            match self.handle.leader() {
                Some((leader, _)) if leader == from => {
                    self.leader.on_slow_report(BootTime::now(), from, nodes);
                }
                Some((_, address)) => {
                    let Ok(mut client) = self.channels.client(&address) else { continue };
                    let nodes = nodes.iter().map(|node| node.0).collect();
                    let call = client.report_slow(proto::SlowReport { from: from.0, nodes });
                    if !matches!(tokio::time::timeout(FORWARD_WAIT, call).await, Ok(Ok(_))) {
                        tracing::debug!("the slow nodes were not passed on");
                    }
                }
                None => tracing::debug!("no leader to pass the slow nodes to"),
            }
        }
    }

    /// Passes wishes of primaries to the leader; what is lost on the way is wished again.
    async fn forward(self, proposals: proto::GroupProposals) {
        match self.handle.leader() {
            Some((leader, _)) if leader == self.handle.node() => {
                self.leader.on_proposals(decode_proposals(&proposals));
            }
            Some((_, address)) => {
                let Ok(mut client) = self.channels.client(&address) else { return };
                let call = client.propose_groups(proposals);
                match tokio::time::timeout(FORWARD_WAIT, call).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(status)) => tracing::debug!("wishes of primaries were not passed on: {status}"),
                    Err(_) => tracing::debug!("wishes of primaries were not passed on in time"),
                }
            }
            None => tracing::debug!("no leader to pass wishes of primaries to"),
        }
    }
}

pub(super) fn link_error(code: Code, object: String) -> Body {
    Body::Error(proto::LinkError { code: u32::from(code.number()), object })
}

/// Wishes that this release understands.
pub fn decode_proposals(message: &proto::GroupProposals) -> Vec<Proposal> {
    let decode = |proposal: &proto::GroupProposal| {
        let change = match Change::try_from(proposal.change) {
            Ok(Change::Promote) => ProposedChange::Promote,
            Ok(Change::Demote) => ProposedChange::Demote,
            Ok(Change::Exclude) => ProposedChange::Exclude,
            Ok(Change::Lead) => ProposedChange::Lead,
            Ok(Change::Settle) => ProposedChange::Settle,
            Ok(Change::Renew) => ProposedChange::Renew,
            Ok(Change::Unspecified) | Err(_) => return None,
        };
        Some(Proposal {
            group: GroupId(proposal.group),
            epoch: Epoch(proposal.epoch),
            node: NodeId(proposal.node),
            change,
        })
    };
    message.proposals.iter().filter_map(decode).collect()
}

#[cfg(test)]
mod tests;
