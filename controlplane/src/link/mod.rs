//! The link to the node's data process: who it is, whether it lives, what it has confirmed, its lease.
//!
//! `server` accepts it and moves frames, `sessions` opens volumes for it; `pidfd` knows when it is dead; this file keeps what both, the heartbeats
//! and the API share.
//!
//! Invariants
//! - At most one data process is linked. A second one is refused while the first lives.
//! - A lease is passed on only once the data process acts on the map that it was granted under.
//! - A data process that does not tell its status is asked no lease for.

pub mod attachments;
pub mod frame;
pub mod pidfd;
pub mod server;
mod sessions;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Incarnation, MapVersion, NodeId, StoreId};
use xsan_protocol::map::{DamagedStore, DataProcess};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::proto;
use xsan_protocol::proto::link_message::Body;

use crate::clock::BootTime;
use crate::lease::Beat;
use crate::membership::heartbeat::Grant;
use crate::timing::STATUS_AGE_MAX;

/// Grants that wait for the data process to act on a newer map; more are dropped, newer ones come.
const GRANTS_MAX: usize = 16;

/// The rates of resync and scrubs are measured over this time: some beats of the status, and soon zero when it ends.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// Shared by the server of the link, the heartbeats and the API.
pub struct Link {
    inner: Mutex<Inner>,
    /// The data process came, went, or fell silent: beat at once.
    changed: Notify,
    lease: watch::Sender<Option<BootTime>>,
}

#[derive(Default)]
struct Inner {
    linked: Option<Linked>,
    /// When the newest beat was sent whose answer arrived.
    answered: BootTime,
    stopped: Option<Incarnation>,
    next_request: u64,
    next_connection: u64,
}

struct Linked {
    /// Tells this connection from an earlier one of the same process.
    connection: u64,
    process: DataProcess,
    damaged_stores: Vec<DamagedStore>,
    heard: BootTime,
    status: Option<proto::DataStatus>,
    confirmed: MapVersion,
    /// Lease ends that count from a map version on.
    grants: Vec<(BootTime, MapVersion)>,
    outbound: mpsc::Sender<proto::LinkMessage>,
    requests: HashMap<u64, oneshot::Sender<Body>>,
    failed_stores: BTreeSet<StoreId>,
    /// Bytes that resync has moved, and that scrubs have read.
    moved: Rate,
    scrubbed: Rate,
}

/// A number that grows, at times of the last `RATE_WINDOW`, oldest first.
#[derive(Default)]
struct Rate(VecDeque<(BootTime, u64)>);

impl Rate {
    fn add(&mut self, now: BootTime, number: u64) {
        self.0.push_back((now, number));
        while self.0.front().is_some_and(|(at, _)| now.since(*at) > RATE_WINDOW) {
            self.0.pop_front();
        }
    }

    fn per_second(&self) -> u64 {
        let (Some((from, before)), Some((to, after))) = (self.0.front(), self.0.back()) else { return 0 };
        let ms = u64::try_from(to.since(*from).as_millis()).unwrap_or(u64::MAX);
        after.saturating_sub(*before).saturating_mul(1000).checked_div(ms).unwrap_or(0)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("no data process is linked")]
    NotLinked,
    #[error("the data process does not answer")]
    Timeout,
    #[error("another data process is linked")]
    Taken,
}

impl LinkError {
    pub const fn code(self) -> Code {
        match self {
            Self::NotLinked | Self::Taken => Code::Busy,
            Self::Timeout => Code::Timeout,
        }
    }
}

impl Default for Link {
    fn default() -> Self {
        let (lease, _) = watch::channel(None);
        Self { inner: Mutex::default(), changed: Notify::new(), lease }
    }
}

impl Link {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is something to beat about at once.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What this node says of itself now.
    pub fn beat(&self, node: NodeId, now: BootTime) -> Beat {
        let inner = self.lock();
        let answering = inner.linked.as_ref().filter(|linked| now.since(linked.heard) < STATUS_AGE_MAX);
        Beat {
            node,
            incarnation: answering.map(|linked| linked.process.incarnation),
            stopped: inner.stopped,
            sent: now,
            map_version: answering.map_or(MapVersion(0), |linked| linked.confirmed),
            // 0 would say that this release does not tell.
            heard: inner.answered.max(BootTime(1)),
        }
    }

    /// A lease arrived.
    pub fn on_grant(&self, now: BootTime, grant: &Grant) {
        let mut inner = self.lock();
        // A beat of the future was not sent by this boot of the host.
        if grant.sent > now {
            return;
        }
        inner.answered = inner.answered.max(grant.sent);
        let Some(linked) = &mut inner.linked else { return };
        // One of length zero only wants to be heard.
        if linked.process.incarnation != grant.incarnation || grant.length.is_zero() {
            return;
        }
        if linked.grants.len() == GRANTS_MAX {
            linked.grants.remove(0);
        }
        let since = if Mutation::LeaseFromArrival.is_on() { now } else { grant.sent };
        linked.grants.push((since + grant.length, grant.map_version));
        self.pass_on(linked);
    }

    /// Passes the longest lease on that counts by now.
    fn pass_on(&self, linked: &mut Linked) {
        let confirmed = linked.confirmed;
        let counts = |version| version <= confirmed || Mutation::LeaseWithoutMap.is_on();
        let counting = linked.grants.iter().filter(|(_, version)| counts(*version));
        let until = counting.map(|(until, _)| *until).max();
        linked.grants.retain(|(_, version)| *version > confirmed);
        if let Some(until) = until {
            self.lease.send_if_modified(|lease| {
                let longer = lease.is_none_or(|present| present < until);
                if longer {
                    *lease = Some(until);
                }
                longer
            });
        }
    }

    /// The lease to tell the data process, and every later one.
    pub fn watch_lease(&self) -> watch::Receiver<Option<BootTime>> {
        self.lease.subscribe()
    }

    /// A data process introduced itself. Returns the number of this connection.
    ///
    /// # Errors
    /// `Taken`: another life of it is linked and not known to be dead.
    pub fn on_hello(
        &self,
        now: BootTime,
        process: DataProcess,
        damaged_stores: Vec<DamagedStore>,
        outbound: mpsc::Sender<proto::LinkMessage>,
    ) -> Result<u64, LinkError> {
        let mut inner = self.lock();
        if inner.linked.as_ref().is_some_and(|linked| linked.process.incarnation != process.incarnation) {
            return Err(LinkError::Taken);
        }
        if inner.linked.is_none() {
            self.lease.send_replace(None);
        }
        let failed_stores = process.stores.iter().filter(|s| s.failed).map(|s| s.id).collect();
        inner.next_connection += 1;
        let connection = inner.next_connection;
        inner.linked = Some(Linked {
            connection,
            process,
            damaged_stores,
            heard: now,
            status: None,
            confirmed: MapVersion(0),
            grants: Vec::new(),
            outbound,
            requests: HashMap::new(),
            failed_stores,
            moved: Rate::default(),
            scrubbed: Rate::default(),
        });
        self.changed.notify_one();
        Ok(connection)
    }

    /// The data process is registered: it may have a lease now.
    pub fn on_registered(&self) {
        self.changed.notify_one();
    }

    /// The data process told its status. Returns its stores that failed since.
    pub fn on_status(&self, now: BootTime, status: proto::DataStatus) -> Vec<StoreId> {
        let mut inner = self.lock();
        let Some(linked) = &mut inner.linked else { return Vec::new() };
        let was_silent = now.since(linked.heard) >= STATUS_AGE_MAX;
        let first = linked.status.is_none();
        linked.heard = now;
        linked.confirmed = linked.confirmed.max(MapVersion(status.map_version));
        let failed = status.stores.iter().filter(|store| store.failed).map(|store| StoreId(store.id));
        let news: Vec<_> = failed.filter(|store| linked.failed_stores.insert(*store)).collect();
        linked.moved.add(now, status.resync_bytes_moved);
        linked.scrubbed.add(now, status.scrub_bytes);
        linked.status = Some(status);
        self.pass_on(linked);
        if was_silent || first {
            self.changed.notify_one();
        }
        news
    }

    /// The process with this incarnation is dead.
    pub fn on_death(&self, incarnation: Incarnation) {
        let mut inner = self.lock();
        if inner.linked.as_ref().is_some_and(|linked| linked.process.incarnation == incarnation) {
            inner.linked = None;
        }
        inner.stopped = Some(incarnation);
        self.changed.notify_one();
    }

    /// The socket closed, but the process lives: its lease runs out by itself, unless it links again.
    pub fn on_unlinked(&self, connection: u64) {
        let mut inner = self.lock();
        if let Some(linked) = inner.linked.as_mut().filter(|linked| linked.connection == connection) {
            linked.heard = BootTime(0);
            linked.requests.clear();
        }
    }

    /// The data process to register with the cluster, and its stores that lost records.
    pub fn process(&self) -> Option<(DataProcess, Vec<DamagedStore>)> {
        self.lock().linked.as_ref().map(|linked| (linked.process.clone(), linked.damaged_stores.clone()))
    }

    pub fn status(&self) -> Option<proto::DataStatus> {
        let inner = self.lock();
        inner.linked.as_ref().map(|linked| linked.status.clone().unwrap_or_default())
    }

    /// Nodes that the data process finds slow, by what it said last; none when that is too long ago.
    pub fn slow_nodes(&self, now: BootTime) -> BTreeSet<NodeId> {
        let inner = self.lock();
        let answering = inner.linked.as_ref().filter(|linked| now.since(linked.heard) < STATUS_AGE_MAX);
        let members = answering.and_then(|linked| linked.status.as_ref()).map(|status| &status.slow_members);
        members.into_iter().flatten().map(|member| NodeId(member.node)).collect()
    }

    /// Bytes a second that resync has moved to or from the data process, lately.
    pub fn resync_rate(&self) -> u64 {
        self.lock().linked.as_ref().map_or(0, |linked| linked.moved.per_second())
    }

    /// Bytes a second that the data process has scrubbed of the groups it leads, lately.
    pub fn scrub_rate(&self) -> u64 {
        self.lock().linked.as_ref().map_or(0, |linked| linked.scrubbed.per_second())
    }

    /// Names the present connection, while the data process answers on it.
    pub fn connection(&self) -> Option<u64> {
        let inner = self.lock();
        inner.linked.as_ref().filter(|linked| linked.status.is_some()).map(|linked| linked.connection)
    }

    /// Tells the data process something that is not answered; `false` when it can not be told now.
    pub fn tell(&self, body: Body) -> bool {
        let message = proto::LinkMessage { request_id: 0, body: Some(body) };
        self.lock().linked.as_ref().is_some_and(|linked| linked.outbound.try_send(message).is_ok())
    }

    /// An answer of the data process to `request`.
    pub fn on_answer(&self, id: u64, body: Body) {
        let waiting = self.lock().linked.as_mut().and_then(|linked| linked.requests.remove(&id));
        if let Some(waiting) = waiting
            && waiting.send(body).is_err()
        {
            tracing::debug!(id, "an answer of the data process came too late");
        }
    }

    /// Asks the data process something.
    ///
    /// # Errors
    /// 6 `Busy` when none is linked, 5 `Timeout`.
    pub async fn request(&self, body: Body, wait: Duration) -> Result<Body, LinkError> {
        let (answer, outbound, message) = {
            let mut inner = self.lock();
            inner.next_request += 1;
            let request_id = inner.next_request;
            let linked = inner.linked.as_mut().ok_or(LinkError::NotLinked)?;
            let (sender, answer) = oneshot::channel();
            linked.requests.insert(request_id, sender);
            (answer, linked.outbound.clone(), proto::LinkMessage { request_id, body: Some(body) })
        };
        let id = message.request_id;
        let exchange = async {
            outbound.send(message).await.map_err(|_| LinkError::NotLinked)?;
            answer.await.map_err(|_| LinkError::NotLinked)
        };
        let result = tokio::time::timeout(wait, exchange).await.unwrap_or(Err(LinkError::Timeout));
        if result.is_err()
            && let Some(linked) = &mut self.lock().linked
        {
            linked.requests.remove(&id);
        }
        result
    }
}

#[cfg(test)]
mod tests;
