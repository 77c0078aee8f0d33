//! Raft as the rest of the control plane sees it: propose, who leads, may leases be granted, the applied state.
//!
//! Used by `api`, `membership`, `link` and `controller`. Starts openraft; hides its types.
//!
//! Invariants
//! - `propose` returns a reply only of a command that is committed and applied, and only once this node's own
//!   state shows it (or within `CATCH_UP_WAIT`).
//! - A command may be committed twice when its leader dies meanwhile: each is made to bear that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::impls::BasicNode;
use openraft::{ChangeMembers, Instant as _, RaftMetrics, ServerState, SnapshotPolicy};
use tokio::sync::watch;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{MapVersion, NodeId};
use xsan_protocol::proto;

use super::log_store::LogStore;
use super::network::{COMMAND_BYTES_MAX, Channels, Network, SNAPSHOT_WAIT, cluster_hash};
use super::state_machine::StateMachine;
use super::{Raft, TypeConfig};
use crate::clock::{BootTime, Sleep};
use crate::state::ClusterState;
use crate::state::command::{Command, Reply};
use crate::state::error::Refusal;
use crate::timing::{BEAT_AGE_MAX, LEADER_WAIT, RaftTiming};

/// Commands between snapshots: the log stays short, and so does a restart.
const SNAPSHOT_EVERY: u64 = 1000;
/// Entries kept behind a snapshot for followers that are a little late.
const LOG_KEPT: u64 = 200;
/// Between two looks whether Raft still runs.
const STOPPED_POLL: Duration = Duration::from_millis(250);
/// Between two looks for a leader.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// One try at one leader: it either commits in this time or has lost its quorum.
const TRY_WAIT: Duration = Duration::from_secs(3);
/// How long a forwarded command's effect may take to arrive here.
const CATCH_UP_WAIT: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("no leader with a quorum was found within {} s", LEADER_WAIT.as_secs())]
    NoQuorum,
    #[error("this node is not the leader")]
    NotLeader,
    #[error("{}", .0.message)]
    Refused(Refusal),
    #[error("Raft has stopped on this node")]
    Stopped,
}

impl ProposeError {
    pub const fn code(&self) -> Code {
        match self {
            Self::NoQuorum => Code::NoQuorum,
            Self::NotLeader => Code::NotLeader,
            Self::Refused(refusal) => refusal.code,
            Self::Stopped => Code::Busy,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("Raft's settings: {0}")]
    Config(#[from] openraft::ConfigError),
    #[error("Raft could not start: {0}")]
    Fatal(#[from] openraft::errors::Fatal<TypeConfig>),
    #[error("the cluster could not be founded: {0}")]
    Found(#[from] Box<RaftError<TypeConfig, openraft::errors::InitializeError<TypeConfig>>>),
}

impl StartError {
    pub const fn code(&self) -> Code {
        Code::Internal
    }
}

/// This node as Raft's leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    /// A quorum acknowledged it lately, and all that was committed before its term is applied.
    pub may_grant: bool,
}

#[derive(Clone)]
pub struct RaftHandle {
    raft: Raft,
    node: NodeId,
    timing: RaftTiming,
    channels: Channels,
    state: watch::Receiver<Arc<ClusterState>>,
    sleep: Arc<Mutex<Sleep>>,
}

/// Raft's members: every node it replicates to, and which of them vote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    pub addresses: BTreeMap<u64, String>,
    /// In a joint membership, those that it leads to.
    pub voters: BTreeSet<u64>,
    /// Begun and not ended: quorums of the voters before and of these are needed.
    pub is_joint: bool,
    /// Those whose log is nearly as long as the leader's; empty on other nodes.
    pub caught_up: BTreeSet<u64>,
}

impl RaftHandle {
    /// Starts Raft as `node`; must be called on the runtime that it is to run on.
    ///
    /// # Errors
    /// The stores can not be read.
    pub async fn start(
        node: NodeId,
        cluster_id: &str,
        store: LogStore,
        machine: StateMachine,
        timing: RaftTiming,
        channels: Channels,
    ) -> Result<Self, StartError> {
        let state = machine.watch();
        let network = Network {
            node: u64::from(node.0),
            cluster: cluster_hash(cluster_id),
            channels: channels.clone(),
        };
        let config = Arc::new(config(cluster_id, timing)?);
        let raft = Raft::new(u64::from(node.0), config, network, store, machine).await?;
        let sleep = Arc::new(Mutex::new(Sleep::new(BootTime::now(), Instant::now())));
        Ok(Self { raft, node, timing, channels, state, sleep })
    }

    /// Makes this node the only voter of a new cluster; does nothing when it has a log already.
    ///
    /// # Errors
    /// The log can not be written.
    pub async fn found(&self, address: &str) -> Result<(), StartError> {
        if self.raft.is_initialized().await? {
            return Ok(());
        }
        let node = BasicNode { addr: address.to_owned() };
        let members = BTreeMap::from([(u64::from(self.node.0), node)]);
        Ok(self.raft.initialize(members).await.map_err(Box::new)?)
    }

    pub const fn node(&self) -> NodeId {
        self.node
    }

    pub const fn timing(&self) -> RaftTiming {
        self.timing
    }

    pub(super) const fn raft(&self) -> &Raft {
        &self.raft
    }

    /// The applied state, now.
    pub fn state(&self) -> Arc<ClusterState> {
        self.state.borrow().clone()
    }

    /// The applied state, and every later one.
    pub fn watch_state(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    pub fn metrics(&self) -> RaftMetrics<TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }

    /// `None`: this node does not lead.
    pub fn leadership(&self) -> Option<Leadership> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.state != ServerState::Leader || metrics.running_state.is_err() {
            return None;
        }
        let term = metrics.current_term;
        let age_max = self.timing.quorum_ack_age_max();
        let alone = metrics.membership_config.voter_ids().eq([u64::from(self.node.0)]);
        let (now, instant) = (BootTime::now(), Instant::now());
        let awake = self.sleep.lock().unwrap_or_else(PoisonError::into_inner).ended(now, instant);
        // What was said before this host slept says nothing: others may lead since.
        let age_max = age_max.min(instant.duration_since(awake));
        let acked = alone || metrics.last_quorum_acked.is_some_and(|acked| acked.elapsed() <= age_max);
        let applied = metrics.last_applied.is_some_and(|applied| applied.committed_leader_id().term == term);
        Some(Leadership { term, may_grant: acked && applied })
    }

    /// Waits for Raft's role, leader or term to change.
    pub async fn role_changed(&self, seen: &mut RoleWatch) {
        // The sender lives as long as Raft; when Raft has stopped, nothing changes any more.
        if seen.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    pub fn watch_role(&self) -> RoleWatch {
        RoleWatch(self.raft.server_metrics())
    }

    /// Waits until Raft has stopped with an error.
    pub async fn stopped(&self) {
        // The metrics change with every message of Raft: waiting for them would wake this thread all the time.
        while self.raft.metrics().borrow_watched().running_state.is_ok() {
            tokio::time::sleep(STOPPED_POLL).await;
        }
    }

    /// The leader's node id and address, as far as this node knows.
    pub fn leader(&self) -> Option<(NodeId, String)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        let address = metrics.membership_config.get_node(&leader)?.addr.clone();
        Some((NodeId(u32::try_from(leader).ok()?), address))
    }

    pub fn members(&self) -> Members {
        let metrics = self.metrics();
        let last = metrics.last_log_index.unwrap_or_default();
        let near = |matched: u64| matched + LOG_KEPT / 2 >= last;
        // Raft forgets nobody's position: that of a dead node stays near the end of a log that hardly grows.
        let answers = |node: &u64| {
            let heard = metrics.heartbeat.as_ref().and_then(|heard| heard.get(node).copied().flatten());
            heard.is_some_and(|heard| heard.elapsed() <= BEAT_AGE_MAX)
        };
        let caught_up = metrics.replication.iter().flatten().filter_map(|(node, matched)| {
            let near = matched.as_ref().is_some_and(|log_id| near(log_id.index()));
            (near && answers(node)).then_some(*node)
        });
        let membership = &metrics.membership_config;
        let configs = membership.membership().get_joint_config();
        Members {
            addresses: membership.nodes().map(|(node, peer)| (*node, peer.addr.clone())).collect(),
            voters: configs.last().cloned().unwrap_or_default(),
            is_joint: configs.len() > 1,
            caught_up: caught_up.collect(),
        }
    }

    /// Begins to replicate to a node, without a vote for it.
    ///
    /// # Errors
    /// This node does not lead, or another change is under way: try again later.
    pub async fn add_learner(&self, node: u64, address: &str) -> Result<(), ProposeError> {
        let peer = BasicNode { addr: address.to_owned() };
        self.raft.add_learner(node, peer, false).await.map_err(write_error)?;
        Ok(())
    }

    /// # Errors
    /// This node does not lead, or another change is under way: try again later.
    pub async fn change_voters(&self, voters: BTreeSet<u64>) -> Result<(), ProposeError> {
        self.raft.change_membership(voters, true).await.map_err(write_error)?;
        Ok(())
    }

    /// Replicates no more to a node, which must have no vote.
    ///
    /// # Errors
    /// This node does not lead, or another change is under way: try again later.
    pub async fn remove_learner(&self, node: u64) -> Result<(), ProposeError> {
        let change = ChangeMembers::RemoveNodes([node].into());
        self.raft.change_membership(change, false).await.map_err(write_error)?;
        Ok(())
    }

    /// Commits a command on this node, which must lead.
    ///
    /// # Errors
    /// 105 `NotLeader`, or 104 `NoQuorum` when it did not commit in time; it may still.
    pub async fn propose_here(&self, command: Command) -> Result<Reply, ProposeError> {
        if let Some(refusal) = too_large(&command) {
            return Ok(Reply::Refused(refusal));
        }
        match tokio::time::timeout(TRY_WAIT, self.raft.client_write(command)).await {
            Ok(Ok(written)) => Ok(written.data),
            Ok(Err(error)) => Err(write_error(error)),
            Err(_) => Err(ProposeError::NoQuorum),
        }
    }

    /// Like `propose_here`, but waits as long as this node leads in `term`: for callers who must know the outcome.
    ///
    /// # Errors
    /// 105 `NotLeader`: another term has begun; the command may be committed or not.
    pub async fn propose_until(&self, term: u64, command: Command) -> Result<Reply, ProposeError> {
        if let Some(refusal) = too_large(&command) {
            return Ok(Reply::Refused(refusal));
        }
        let mut role = self.watch_role();
        let write = self.raft.client_write(command);
        tokio::pin!(write);
        loop {
            tokio::select! {
                written = &mut write => return written.map(|w| w.data).map_err(write_error),
                () = self.role_changed(&mut role) => {
                    if self.leadership().is_none_or(|leadership| leadership.term != term) {
                        return Err(ProposeError::NotLeader);
                    }
                }
            }
        }
    }

    /// Commits a command, wherever the leader is; waits for one up to `LEADER_WAIT`.
    ///
    /// # Errors
    /// What the state refuses; 104 `NoQuorum`.
    pub async fn propose(&self, command: Command) -> Result<Reply, ProposeError> {
        let deadline = Instant::now() + LEADER_WAIT;
        let mut tried = false;
        loop {
            let result = match self.leader() {
                Some((leader, _)) if leader == self.node => self.propose_here(command.clone()).await,
                Some((_, address)) => self.forward(&address, &command).await,
                None => Err(ProposeError::NotLeader),
            };
            match result {
                Ok(Reply::Refused(refusal)) if tried && already_done(&command, &refusal) => {
                    return Ok(Reply::Done);
                }
                Ok(Reply::Refused(refusal)) => return Err(ProposeError::Refused(refusal)),
                Ok(reply) => return Ok(reply),
                Err(ProposeError::Stopped) => return Err(ProposeError::Stopped),
                Err(error) => tried |= error != ProposeError::NotLeader,
            }
            if Instant::now() >= deadline {
                return Err(ProposeError::NoQuorum);
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    async fn forward(&self, address: &str, command: &Command) -> Result<Reply, ProposeError> {
        let mut client = self.channels.client(address).map_err(|_| ProposeError::NotLeader)?;
        let call = client.propose(proto::ProposeRequest { command: command.encode() });
        let answer = match tokio::time::timeout(TRY_WAIT + RETRY_INTERVAL, call).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) if status.code() == tonic::Code::FailedPrecondition => {
                return Err(ProposeError::NotLeader);
            }
            // The command may have been committed.
            Ok(Err(_)) | Err(_) => return Err(ProposeError::NoQuorum),
        };
        let reply = Reply::decode(&answer.response).map_err(|_| ProposeError::NoQuorum)?;
        self.caught_up(MapVersion(answer.map_version)).await;
        Ok(reply)
    }

    /// Waits until this node's state is at `version`, but not for ever: then its answers are merely older.
    async fn caught_up(&self, version: MapVersion) {
        let mut state = self.state.clone();
        let arrived = state.wait_for(|state| state.version() >= version);
        if tokio::time::timeout(CATCH_UP_WAIT, arrived).await.is_err() {
            tracing::debug!(version = version.0, "the effect of a forwarded command is not here yet");
        }
    }

    /// Stops Raft's tasks.
    pub async fn shutdown(&self) {
        if self.raft.shutdown().await.is_err() {
            tracing::warn!("Raft's main task had failed before it was stopped");
        }
    }
}

/// What `RaftHandle::role_changed` has seen.
pub struct RoleWatch(
    openraft::alias::WatchReceiverOf<TypeConfig, openraft::metrics::RaftServerMetrics<TypeConfig>>,
);

/// A try whose outcome is unknown may have deleted the volume that is now not found.
fn already_done(command: &Command, refusal: &Refusal) -> bool {
    matches!(command, Command::DeleteVolume { .. }) && refusal.code == Code::VolumeNotFound
}

/// Once it is in the log, what no message holds could never be sent to the others, and nothing behind it either.
fn too_large(command: &Command) -> Option<Refusal> {
    let bytes = command.encode().len();
    (bytes > COMMAND_BYTES_MAX).then(|| Refusal {
        code: Code::InvalidArgument,
        object: "cluster".to_owned(),
        message: format!("a change of {bytes} bytes is more than {COMMAND_BYTES_MAX}; nothing was changed"),
    })
}

fn write_error(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> ProposeError {
    match error {
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => ProposeError::NoQuorum,
        RaftError::APIError(_) => ProposeError::NotLeader,
        RaftError::Fatal(_) => ProposeError::Stopped,
    }
}

fn config(cluster_id: &str, timing: RaftTiming) -> Result<openraft::Config, openraft::ConfigError> {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).expect("timeouts are seconds");
    openraft::Config {
        cluster_name: cluster_id.to_owned(),
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election_min),
        election_timeout_max: ms(timing.election_max),
        install_snapshot_timeout: ms(SNAPSHOT_WAIT),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: LOG_KEPT,
        replication_lag_threshold: 2 * SNAPSHOT_EVERY,
        enable_pre_vote: Some(true),
        // A restarted leader would think its leases of before were somebody else's; an election is cleaner. And it may have sent
        // entries that its own log did not have yet: in the same term it would send others in their place.
        enable_leader_restore: Some(false),
        backoff: "50ms 100ms 200ms ...500ms".to_owned(),
        ..openraft::Config::default()
    }
    .validate()
}
