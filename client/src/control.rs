//! Client of the control plane: any node of a list answers, others are tried when it does not.
//!
//! Used by the command line tools and xsan-node. Knows no data path.
//!
//! Invariants
//! - A call that must not be carried out twice is sent again only if the try before it surely was not carried out,
//!   or its doubt is told in the error (`uncertain`).
//! - No call outlasts `Options::deadline`.

use std::collections::HashMap;
use std::future::Future;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fmt, net::SocketAddr};

use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use xsan_protocol::error::{Code, Retry};
use xsan_protocol::ids::NodeId;
use xsan_protocol::limits::LINK_FRAME_MAX;
use xsan_protocol::proto;
use xsan_protocol::proto::cluster_client::ClusterClient;
use xsan_protocol::proto::raft_client::RaftClient;

use crate::error::{ClientError, Refusal};

/// Port of the control plane where an address has none.
const PORT_DEFAULT: u16 = 8080;
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// What a good answer may take, as a node waits up to 3 s for what only other nodes know.
const ANSWER_MAX: Duration = Duration::from_secs(4);

/// Host and port of a node's control plane.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address(String);

/// A text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address; write HOST or HOST:PORT, as 192.168.1.10:8080 or [fd00::1]:8080")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.to_owned());
        if let Ok(ip) = text.parse() {
            return Ok(Self(SocketAddr::new(ip, PORT_DEFAULT).to_string()));
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 { Err(error()) } else { Ok(Self(address.to_string())) };
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0).ok_or_else(error)?),
            None => (text, PORT_DEFAULT),
        };
        let is_host =
            !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
        if is_host { Ok(Self(format!("{host}:{port}"))) } else { Err(error()) }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How long to wait for what.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// For a connection to one node.
    pub connect_timeout: Duration,
    /// For one answer, before another node is asked; less when the deadline must do for several.
    pub attempt_timeout: Duration,
    /// For the whole call, with all its tries.
    pub deadline: Duration,
    /// For the whole call while nothing answers at any address: a person who mistyped one wants to know soon.
    pub unreachable_deadline: Duration,
}

impl Default for Options {
    /// A node holds a change up to 10 s while the cluster elects a leader; the whole call outlasts that once.
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
            attempt_timeout: Duration::from_secs(12),
            deadline: Duration::from_secs(15),
            unreachable_deadline: Duration::from_secs(3),
        }
    }
}

/// What a second execution of a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// Changes nothing.
    Read,
    /// Changes something, and again to the same: may be repeated blindly.
    Repeatable,
    /// The second execution is refused or does more.
    Once,
}

/// A client of one cluster; clones share its connections.
#[derive(Clone)]
pub struct ControlClient {
    options: Options,
    state: Arc<Mutex<State>>,
}

struct State {
    /// Tried in this order; the one that answered last is first.
    addresses: Vec<Address>,
    channels: HashMap<Address, Channel>,
}

/// How one round over the addresses ended, if not with an answer.
enum Failed {
    /// The same call fails again, or must not be made again.
    ForGood(ClientError),
    /// Worth another round; `at_once` if a node named the one to ask.
    ForNow { error: ClientError, at_once: bool },
}

/// How one try at one address ended, if not with an answer.
enum Lost {
    /// Not sent.
    NoConnection(String),
    Refused(Refusal),
    /// Sent, perhaps carried out.
    Broken,
    TimedOut(Duration),
    NotXsan(String),
}

fn cluster(channel: Channel) -> ClusterClient<Channel> {
    ClusterClient::new(channel).max_decoding_message_size(LINK_FRAME_MAX)
}

impl ControlClient {
    /// A client that asks the nodes at `addresses`, the first one first. Connects with the first call.
    ///
    /// # Panics
    /// No addresses.
    pub fn new(addresses: Vec<Address>, options: Options) -> Self {
        assert!(!addresses.is_empty());
        Self { options, state: Arc::new(Mutex::new(State { addresses, channels: HashMap::new() })) }
    }

    /// Asks the nodes at `addresses` first from now on, and those known before after them.
    pub fn ask_first(&self, mut addresses: Vec<Address>) {
        let mut state = self.state();
        state.addresses.retain(|known| !addresses.contains(known));
        addresses.append(&mut state.addresses);
        state.addresses = addresses;
    }

    pub async fn cluster_status(&self) -> Result<proto::ClusterStatusReply, ClientError> {
        let request = proto::ClusterStatusRequest {};
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).cluster_status(request).await
        })
        .await
    }

    pub async fn get_map(&self) -> Result<proto::ClusterMap, ClientError> {
        let request = proto::GetMapRequest {};
        self.call(
            Effect::Read,
            request,
            |channel, request| async move { cluster(channel).get_map(request).await },
        )
        .await
    }

    /// The node with that name or numeric id.
    pub async fn get_node(&self, name: &str) -> Result<proto::NodeStatus, ClientError> {
        let request = proto::GetNodeRequest { name: name.to_owned() };
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).get_node(request).await
        })
        .await
    }

    /// Sets or ends the maintenance of a node.
    pub async fn set_maintenance(
        &self,
        request: proto::SetMaintenanceRequest,
    ) -> Result<proto::NodePlan, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).set_maintenance(request).await
        })
        .await
    }

    /// What the join of a node would move; changes nothing.
    pub async fn plan_join(&self, request: proto::PlanJoinRequest) -> Result<proto::NodePlan, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).plan_join(request).await
        })
        .await
    }

    /// Begins to remove a node, or takes that back.
    pub async fn remove_node(
        &self,
        request: proto::RemoveNodeRequest,
    ) -> Result<proto::NodePlan, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).remove_node(request).await
        })
        .await
    }

    pub async fn change_settings(
        &self,
        request: proto::ChangeSettingsRequest,
    ) -> Result<proto::ClusterSettings, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).change_settings(request).await
        })
        .await
    }

    /// Has groups scrubbed.
    pub async fn start_scrub(
        &self,
        request: proto::StartScrubRequest,
    ) -> Result<proto::StartScrubReply, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).start_scrub(request).await
        })
        .await
    }

    /// Takes back what `start_scrub` asked for.
    pub async fn stop_scrub(
        &self,
        request: proto::StopScrubRequest,
    ) -> Result<proto::StopScrubReply, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).stop_scrub(request).await
        })
        .await
    }

    pub async fn scrub_status(&self) -> Result<proto::ScrubStatusReply, ClientError> {
        let request = proto::ScrubStatusRequest {};
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).scrub_status(request).await
        })
        .await
    }

    /// What an operator should know or mend, the worst first.
    pub async fn health(&self) -> Result<Vec<proto::Finding>, ClientError> {
        let request = proto::HealthRequest {};
        let reply = self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).health(request).await
        });
        Ok(reply.await?.findings)
    }

    /// What happened, the oldest first, as the nodes saw it while they led.
    pub async fn events(&self) -> Result<proto::ListEventsReply, ClientError> {
        let request = proto::ListEventsRequest {};
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).list_events(request).await
        })
        .await
    }

    pub async fn create_volume(
        &self,
        request: proto::CreateVolumeRequest,
    ) -> Result<proto::Volume, ClientError> {
        self.call(Effect::Once, request, |channel, request| async move {
            cluster(channel).create_volume(request).await
        })
        .await
    }

    pub async fn list_volumes(&self) -> Result<Vec<proto::VolumeStatus>, ClientError> {
        let request = proto::ListVolumesRequest {};
        let reply = self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).list_volumes(request).await
        });
        Ok(reply.await?.volumes)
    }

    pub async fn get_volume(&self, name: &str) -> Result<proto::VolumeStatus, ClientError> {
        let request = proto::GetVolumeRequest { name: name.to_owned() };
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).get_volume(request).await
        })
        .await
    }

    pub async fn resize_volume(
        &self,
        request: proto::ResizeVolumeRequest,
    ) -> Result<proto::Volume, ClientError> {
        self.call(Effect::Repeatable, request, |channel, request| async move {
            cluster(channel).resize_volume(request).await
        })
        .await
    }

    pub async fn delete_volume(&self, name: &str) -> Result<(), ClientError> {
        let request = proto::DeleteVolumeRequest { name: name.to_owned() };
        let reply = self.call(Effect::Once, request, |channel, request| async move {
            cluster(channel).delete_volume(request).await
        });
        reply.await.map(|proto::DeleteVolumeReply {}| ())
    }

    pub async fn locate_block(
        &self,
        volume: &str,
        block_index: u64,
    ) -> Result<proto::LocateBlockReply, ClientError> {
        let request = proto::LocateBlockRequest { volume: volume.to_owned(), block_index };
        self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).locate_block(request).await
        })
        .await
    }

    /// Of the node with that name or id; of every node if `None`.
    pub async fn perf_stats(&self, node: Option<&str>) -> Result<Vec<proto::NodePerf>, ClientError> {
        let request = proto::PerfStatsRequest { node: node.map(str::to_owned) };
        let reply = self.call(Effect::Read, request, |channel, request| async move {
            cluster(channel).perf_stats(request).await
        });
        Ok(reply.await?.nodes)
    }

    /// Asks to be taken into the cluster. Repeatable: a node that has never served gets the same id again.
    pub async fn join(&self, request: proto::JoinRequest) -> Result<NodeId, ClientError> {
        let reply = self.call(Effect::Repeatable, request, |channel, request| async move {
            RaftClient::new(channel).join(request).await
        });
        Ok(NodeId(reply.await?.node_id))
    }

    /// Asks one node after the other until there is an answer, a refusal that lasts, or the deadline.
    async fn call<Q, T, F, Fut>(&self, effect: Effect, request: Q, ask: F) -> Result<T, ClientError>
    where
        Q: Clone,
        F: Fn(Channel, Q) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let begin = Instant::now();
        let deadline = begin + self.options.deadline;
        let mut backoff = BACKOFF_FIRST;
        // Whose try may have been carried out though it had no answer, or was refused.
        let mut doubt = None;
        loop {
            match self.round(effect, &request, &ask, deadline, &mut doubt).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::ForGood(error)) => return Err(error.after(doubt)),
                Err(Failed::ForNow { error, at_once }) => {
                    let last = match error {
                        ClientError::Unreachable { .. } => {
                            deadline.min(begin + self.options.unreachable_deadline)
                        }
                        _ => deadline,
                    };
                    if Instant::now() + backoff >= last {
                        return Err(error.after(doubt));
                    }
                    if !at_once {
                        sleep(backoff).await;
                    }
                    // A timer may be late.
                    if Instant::now() >= deadline {
                        return Err(error.after(doubt));
                    }
                    backoff = (backoff * 2).min(BACKOFF_MAX);
                }
            }
        }
    }

    /// Asks each node once, while there is time. The error of a node that answers tells more than that of one that
    /// does not.
    async fn round<Q, T, F, Fut>(
        &self,
        effect: Effect,
        request: &Q,
        ask: &F,
        deadline: Instant,
        doubt: &mut Option<Address>,
    ) -> Result<T, Failed>
    where
        Q: Clone,
        F: Fn(Channel, Q) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let addresses = self.addresses();
        let mut unreachable = None;
        let mut error = None;
        for (address, others) in addresses.iter().zip((0..addresses.len() as u32).rev()) {
            if Instant::now() >= deadline && (error.is_some() || unreachable.is_some()) {
                break;
            }
            let ask = |channel| ask(channel, request.clone());
            let lost = match self.attempt(address, effect, deadline, others, ask).await {
                Ok(answer) => {
                    self.prefer(address);
                    return Ok(answer);
                }
                Err(lost) => lost,
            };
            let address = address.clone();
            match lost {
                Lost::NoConnection(reason) => unreachable = Some(reason),
                Lost::Refused(mut refusal) => {
                    refusal.uncertain = doubt.is_some();
                    let retry = refusal.retry();
                    let leader = refusal.object.parse::<SocketAddr>().ok().map(Address::from);
                    // A leader that lost its quorum, or whose log failed or is being stopped, may have the request in its
                    // log already.
                    let in_log = matches!(refusal.code(), Some(Code::NoQuorum | Code::Busy));
                    doubt_if(in_log && effect != Effect::Read, doubt, &address);
                    let refused = ClientError::Refused(refusal);
                    match (retry, leader) {
                        (Retry::Never, _) => return Err(Failed::ForGood(refused)),
                        (Retry::Refresh, Some(leader)) if self.prefer(&leader) => {
                            return Err(Failed::ForNow { error: refused, at_once: true });
                        }
                        _ => error = Some(refused),
                    }
                }
                Lost::Broken | Lost::TimedOut(_) => {
                    let uncertain = effect != Effect::Read;
                    doubt_if(uncertain, doubt, &address);
                    let silence = match lost {
                        Lost::TimedOut(after) => ClientError::Timeout { address, after, uncertain },
                        _ => ClientError::Broken { address, uncertain },
                    };
                    if effect == Effect::Once {
                        return Err(Failed::ForGood(silence));
                    }
                    error = Some(silence);
                }
                Lost::NotXsan(reason) => error = Some(ClientError::NotXsan { address, reason }),
            }
        }
        let error = error.unwrap_or_else(|| {
            let reason = unreachable.expect("a round without an error met only nodes without a connection");
            ClientError::Unreachable { addresses, reason }
        });
        match error {
            ClientError::NotXsan { .. } => Err(Failed::ForGood(error)),
            error => Err(Failed::ForNow { error, at_once: false }),
        }
    }

    /// Asks the node at `address`, and leaves time for the `others` that are asked if it does not answer.
    async fn attempt<T, Fut>(
        &self,
        address: &Address,
        effect: Effect,
        deadline: Instant,
        others: u32,
        ask: impl FnOnce(Channel) -> Fut,
    ) -> Result<T, Lost>
    where
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let left = || deadline.saturating_duration_since(Instant::now());
        let too_late = || Lost::NoConnection("no connection in time".to_owned());
        let connecting = timeout(share(left(), others), self.channel(address));
        let channel = connecting.await.map_err(|_| too_late())?.map_err(Lost::NoConnection)?;
        // Once sent, a change that must not be repeated is asked of nobody else.
        let others = if effect == Effect::Once { 0 } else { others };
        let wait = self.options.attempt_timeout.min(share(left(), others));
        if wait.is_zero() {
            return Err(too_late());
        }
        let status = match timeout(wait, ask(channel)).await {
            Ok(Ok(answer)) => return Ok(answer.into_inner()),
            Ok(Err(status)) => status,
            Err(_) => {
                self.forget(address);
                return Err(Lost::TimedOut(wait));
            }
        };
        if let Some(refusal) = Refusal::from_status(&status) {
            return Err(Lost::Refused(refusal));
        }
        self.forget(address);
        Err(match status.code() {
            tonic::Code::Unavailable | tonic::Code::Cancelled => Lost::Broken,
            tonic::Code::DeadlineExceeded => Lost::TimedOut(wait),
            _ if is_transport(&status) => Lost::Broken,
            _ => Lost::NotXsan(status.message().to_owned()),
        })
    }

    /// The connection to `address`, made if there is none.
    async fn channel(&self, address: &Address) -> Result<Channel, String> {
        if let Some(channel) = self.state().channels.get(address) {
            return Ok(channel.clone());
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| error.to_string())?
            .connect_timeout(self.options.connect_timeout)
            .tcp_nodelay(true)
            .keep_alive_while_idle(true)
            .http2_keep_alive_interval(Duration::from_secs(10));
        let channel = endpoint.connect().await.map_err(|error| innermost(&error))?;
        self.state().channels.insert(address.clone(), channel.clone());
        Ok(channel)
    }

    fn forget(&self, address: &Address) {
        self.state().channels.remove(address);
    }

    fn addresses(&self) -> Vec<Address> {
        self.state().addresses.clone()
    }

    /// Asks `address` first from now on. False if it is first already.
    fn prefer(&self, address: &Address) -> bool {
        let addresses = &mut self.state().addresses;
        if addresses.first() == Some(address) {
            return false;
        }
        addresses.retain(|other| other != address);
        addresses.insert(0, address.clone());
        true
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing panics with the lock held, and a map of connections is right at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one node may take of the time that is `left`, when `others` wait for their turn: its even part, or what a
/// good answer may take, as long as half of the time remains for the others.
fn share(left: Duration, others: u32) -> Duration {
    (left / (others + 1)).max(ANSWER_MAX.min(left / 2))
}

fn doubt_if(uncertain: bool, doubt: &mut Option<Address>, address: &Address) {
    if uncertain {
        doubt.get_or_insert_with(|| address.clone());
    }
}

/// Did the status arise here, from a connection that failed, and not at the node? One that came over the wire has no source.
fn is_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// The cause at the bottom of `error`, as `connection refused`; those above it say "transport error".
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    // Without the number of the operating system's error: this one has a number of our own.
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

#[cfg(test)]
mod tests;
