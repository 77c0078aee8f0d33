//! The tasks of a shard's thread: they wait for the world and queue events for the turn.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use monoio::net::TcpListener;
use xsan_nodekit::open_files;
use xsan_protocol::ids::{Incarnation, ShardIndex};
use xsan_protocol::map::ClusterMap;
use xsan_protocol::wire::session::Hello;

use super::mailbox::MeshEnd;
use super::peers::PeerShard;
use super::{Event, Handle, Identity, Message, Shard};
use crate::disk::eventfd::EventFd;
use crate::net::connection::{Connection, ConnectionError, Counters, Memory, Outbox};
use crate::net::listener;

/// What drives commits of idle groups, retries and destage.
const TICK: Duration = Duration::from_millis(20);
/// Waits between tries to connect to a peer that is down.
const DIAL_WAIT_FIRST: Duration = Duration::from_millis(20);
const DIAL_WAIT_MAX: Duration = Duration::from_millis(500);
/// Between two warnings of a shard that it can not dial for want of file descriptors.
const EXHAUSTED_WARN_INTERVAL: Duration = Duration::from_secs(10);
/// How long a peer may be out of reach before the log says why.
const TROUBLE_AFTER: Duration = Duration::from_secs(10);
/// Between two warnings of one peer.
const TROUBLE_INTERVAL: Duration = Duration::from_secs(60);
/// What a shard has open beside its connections: devices, rings, eventfds, sockets that listen.
const FILES_PER_SHARD: u64 = 32;

/// Turns that follow each other at once while there is work; then the runtime looks at sockets and timers.
const TURNS_AT_ONCE: u32 = 8;

impl Shard {
    /// Runs turns for ever.
    pub(super) async fn run(mut self) {
        let (handle, mesh, own) = (self.handle.clone(), self.mesh.clone(), self.identity.shard);
        run_turns(&handle, &mesh, own, |events| self.turn(events)).await;
    }
}

async fn run_turns(
    handle: &Handle,
    mesh: &RefCell<MeshEnd<Message>>,
    own: ShardIndex,
    mut turn: impl FnMut(&mut VecDeque<Event>),
) {
    let pause = EventFd::new().expect("a starting process has descriptors left");
    let mut paused = pause.waiter().expect("an eventfd can be duplicated");
    let (mut events, mut turns_at_once) = (VecDeque::new(), 0);
    loop {
        let parked = mesh.borrow().park();
        if !parked {
            // Messages came since the last look: take them without a wait.
            receive(handle, mesh, own);
        }
        turns_at_once = if parked && !handle.0.wake.is_set() { 0 } else { turns_at_once + 1 };
        if turns_at_once == TURNS_AT_ONCE {
            turns_at_once = 0;
            // Only what the kernel has to answer makes the runtime look.
            pause.signal();
            paused.wait().await.expect("the runtime's ring reads an eventfd");
        }
        handle.0.wake.notified().await;
        mesh.borrow().unpark();
        receive(handle, mesh, own);
        std::mem::swap(&mut events, &mut *handle.0.events.borrow_mut());
        turn(&mut events);
    }
}

/// Queues what other shards sent.
fn receive(handle: &Handle, mesh: &RefCell<MeshEnd<Message>>, own: ShardIndex) {
    let mut messages = Vec::new();
    mesh.borrow_mut().receive(own, &mut messages);
    for (from, message) in messages {
        handle.push(Event::Message(from, message));
    }
}

/// Starts a turn whenever `eventfd` is signalled: by the device ring, or by another shard.
pub(super) async fn watch(eventfd: EventFd, handle: Handle) {
    let mut waiter = eventfd.waiter().expect("an eventfd can be duplicated");
    loop {
        waiter.wait().await.expect("the runtime's ring reads an eventfd");
        handle.push(Event::Wake);
    }
}

pub(super) async fn tick(handle: Handle) {
    loop {
        monoio::time::sleep(TICK).await;
        handle.push(Event::Tick);
    }
}

/// Asks for the regular status; shard 0 alone.
pub(super) async fn status(handle: Handle, interval: Duration) {
    loop {
        monoio::time::sleep(interval).await;
        handle.push(Event::Status);
    }
}

/// What a shard has said of files that the process lacks, so that it does not repeat itself.
#[derive(Default)]
pub(super) struct Files {
    /// The most that were told to be needed.
    needed: Cell<u64>,
    exhausted: Cell<Option<Instant>>,
}

impl Files {
    /// Is `needed` more than `limit`, and more than was told before?
    fn are_short(&self, needed: u64, limit: u64) -> bool {
        let short = needed > limit && needed > self.needed.get();
        if short {
            self.needed.set(needed);
        }
        short
    }

    fn warning_is_due(&self, now: Instant) -> bool {
        let due = self.exhausted.get().is_none_or(|last| now - last >= EXHAUSTED_WARN_INTERVAL);
        if due {
            self.exhausted.set(Some(now));
        }
        due
    }
}

/// Files that a process may have open at once: each shard dials every peer shard and is dialled by it, clients have up to
/// `clients_max` connections.
const fn files_needed(shards: u64, peer_shards: u64, clients_max: u64) -> u64 {
    2 * shards * peer_shards + clients_max + shards * FILES_PER_SHARD
}

/// What the connections of a shard have in common.
#[derive(Clone)]
pub(super) struct Connections {
    pub identity: Rc<Identity>,
    pub handle: Handle,
    pub memory: Memory,
    pub counters: Rc<Counters>,
    pub open: Rc<Cell<u32>>,
    pub open_max: u32,
    pub files: Rc<Files>,
    pub sessions: Rc<Cell<u64>>,
}

impl Connections {
    fn hello(&self) -> Hello {
        let identity = &self.identity;
        let session = self.sessions.get() + 1;
        self.sessions.set(session);
        Hello {
            node: identity.node,
            incarnation: identity.incarnation,
            client_id: u64::from(identity.node.0) << 16 | u64::from(identity.shard.0),
            session,
            shard: identity.shard,
            shard_count: identity.shard_count,
            cluster_id: identity.cluster_id.clone(),
        }
    }

    /// Accepts connections of peers and clients for ever.
    pub async fn serve(self, listener: TcpListener) {
        loop {
            let (stream, from) = listener::accept(&listener).await;
            if self.open.get() >= self.open_max {
                tracing::warn!(
                    max = self.open_max,
                    %from,
                    "a connection is closed: network.max_connections are open"
                );
                continue;
            }
            let this = self.clone();
            monoio::spawn(async move {
                this.open.set(this.open.get() + 1);
                match Connection::accept(stream, &this.hello()).await {
                    Ok(connection) => {
                        let (hello, outbox) = (connection.hello.clone(), Outbox::default());
                        let accepted =
                            |connection, outbox| Event::Accepted { connection, hello: hello.clone(), outbox };
                        this.carry(connection, accepted, outbox).await;
                    }
                    Err(error) => tracing::warn!(%from, %error, "a connection was not accepted"),
                }
                this.open.set(this.open.get() - 1);
            });
        }
    }

    /// Announces a connection, carries its frames until it ends, and says that it has.
    async fn carry(&self, connection: Connection, announce: impl Fn(u64, Outbox) -> Event, outbox: Outbox) {
        let id = self.handle.connection_id();
        let node = connection.hello.node;
        self.handle.push(announce(id, outbox.clone()));
        let error = connection
            .run(outbox, self.memory.clone(), self.counters.clone(), |frames| {
                self.handle.push(Event::Frames { connection: id, frames });
            })
            .await;
        tracing::info!(connection = id, %node, %error, "a connection ended");
        self.handle.push(Event::Closed(id));
    }

    /// Keeps a connection to one shard of another node, for as long as `wanted`.
    async fn dial(self, peer: PeerShard, to: Peer, wanted: Rc<Cell<bool>>) {
        let mut wait = DIAL_WAIT_FIRST;
        let mut trouble = Trouble::default();
        while wanted.get() {
            match Connection::dial(to.address, &self.hello()).await {
                Ok(connection) if connection.hello.incarnation == to.incarnation => {
                    (wait, trouble) = (DIAL_WAIT_FIRST, Trouble::default());
                    let outbox = Outbox::default();
                    let dialled = |connection, outbox| Event::Dialled {
                        connection,
                        peer,
                        outbox,
                        wanted: wanted.clone(),
                    };
                    self.carry(connection, dialled, outbox).await;
                }
                Ok(connection) => {
                    tracing::debug!(node = %peer.0, found = %connection.hello.incarnation, "another life of the peer answers; the map will name it");
                }
                Err(ConnectionError::Io(error)) if listener::is_exhausted(&error) => {
                    if self.files.warning_is_due(Instant::now()) {
                        let limit = open_files::limit();
                        tracing::warn!(node = %peer.0, address = %to.address, limit, %error, "no file descriptor is left to dial a peer: raise LimitNOFILE of the service, or fs.file-max of the host");
                    }
                }
                Err(error) => {
                    let error = error.to_string();
                    if trouble.is_to_be_told(&error, Instant::now()) {
                        tracing::warn!(node = %peer.0, shard = %peer.1, address = %to.address, error, "a peer can not be reached");
                    } else {
                        tracing::debug!(node = %peer.0, shard = %peer.1, address = %to.address, error, "a peer can not be reached");
                    }
                }
            }
            monoio::time::sleep(wait).await;
            wait = (wait * 2).min(DIAL_WAIT_MAX);
        }
    }
}

/// Why a peer is not connected: told once it lasts longer than a restart, and again when the reason is another, now and then.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
    told: Option<(Instant, String)>,
}

impl Trouble {
    fn is_to_be_told(&mut self, error: &str, now: Instant) -> bool {
        let lasts = now - *self.since.get_or_insert(now) >= TROUBLE_AFTER;
        let is_new = |(when, told): &(Instant, String)| *told != error && now - *when >= TROUBLE_INTERVAL;
        let is_due = lasts && self.told.as_ref().is_none_or(is_new);
        if is_due {
            self.told = Some((now, error.to_owned()));
        }
        is_due
    }
}

/// One life of a peer shard, and where it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Peer {
    address: SocketAddr,
    incarnation: Incarnation,
}

/// A task that keeps a peer connected.
pub(super) struct Dialling {
    to: Peer,
    wanted: Rc<Cell<bool>>,
}

impl Shard {
    /// Warns of a limit on open files that the connections of this map may exceed; the process has one limit, so one shard looks.
    fn warn_of_short_files(&self, peer_shards: u64) {
        let (shards, clients_max) =
            (u64::from(self.identity.shard_count), u64::from(self.connections.open_max));
        let (needed, limit) = (files_needed(shards, peer_shards, clients_max), open_files::limit());
        if self.connections.files.are_short(needed, limit) {
            tracing::warn!(
                limit,
                needed,
                shards,
                peer_shards,
                max_connections = clients_max,
                "the limit on open files is too low for all connections: raise LimitNOFILE of the service"
            );
        }
    }

    /// Starts and ends dialling tasks, so that there is one for each peer shard of the map.
    pub(super) fn dial_peers(&mut self, map: &ClusterMap) {
        let own = self.identity.node;
        let mut peers = Vec::new();
        for node in map.nodes.values().filter(|node| node.id != own) {
            let Some(data) = &node.data else { continue };
            for (index, port) in data.shard_ports.iter().enumerate() {
                let address = SocketAddr::new(node.address, *port);
                let peer = (node.id, ShardIndex(index as u16));
                peers.push((peer, Peer { address, incarnation: data.incarnation }));
            }
        }
        if self.identity.shard == ShardIndex(0) {
            self.warn_of_short_files(peers.len() as u64);
        }
        self.dialled.retain(|peer, dialling| {
            let kept = peers.contains(&(*peer, dialling.to));
            dialling.wanted.set(kept);
            kept
        });
        for (peer, to) in peers {
            self.dialled.entry(peer).or_insert_with(|| {
                self.peers.close_dialled(peer);
                let wanted = Rc::new(Cell::new(true));
                monoio::spawn(self.connections.clone().dial(peer, to, wanted.clone()));
                Dialling { to, wanted }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;

    use super::super::mailbox::mesh;
    use super::*;

    /// Its sockets, its timers and the link with its lease waited until, by chance, nobody had sent it anything. Found by
    /// reading.
    #[test]
    fn a_shard_that_others_keep_busy_looks_at_its_timers() {
        let driver = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build();
        driver.unwrap().block_on(async {
            let mut ends = mesh(2, 64);
            let mut other = ends.pop().unwrap();
            let own = RefCell::new(ends.pop().unwrap());
            let (handle, fired, begin) = (Handle::new(), Rc::new(Cell::new(false)), Instant::now());
            let timer = fired.clone();
            monoio::spawn(async move {
                monoio::time::sleep(TICK).await;
                timer.set(true);
            });
            handle.push(Event::Wake);
            let mut turns = pin!(run_turns(&handle, &own, ShardIndex(0), |events| {
                events.clear();
                other.send(ShardIndex(0), Message::StatusDue);
                other.flush();
                assert!(begin.elapsed() < 50 * TICK, "the timer is late");
            }));
            poll_fn(|context| match fired.get() {
                true => Poll::Ready(()),
                false => turns.as_mut().poll(context),
            })
            .await;
        });
    }

    /// Every shard dials all shards of every other node: three hosts of 16 cores did not connect with 1024 files.
    #[test]
    fn three_hosts_of_16_cores_need_more_than_1024_files() {
        let needed = files_needed(16, 2 * 16, 1000);
        assert_eq!(needed, 2 * 512 + 1000 + 512);
        let files = Files::default();
        assert!(files.are_short(needed, 1024));
        assert!(!files.are_short(needed, 1024), "told already");
        assert!(files.are_short(needed + 1, 1024), "it got worse");
        assert!(!Files::default().are_short(needed, needed));
    }

    /// A firewall that left only the control port open was not to be seen in any log.
    #[test]
    fn a_peer_out_of_reach_is_told_when_it_lasts_and_again_when_the_reason_changes() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        assert!(!trouble.is_to_be_told("refused", start));
        assert!(!trouble.is_to_be_told("refused", start + TROUBLE_AFTER / 2), "it may be a restart");
        assert!(trouble.is_to_be_told("refused", start + TROUBLE_AFTER));
        assert!(!trouble.is_to_be_told("refused", start + TROUBLE_AFTER * 2));
        assert!(!trouble.is_to_be_told("no route to host", start + TROUBLE_AFTER * 2), "they may alternate");
        assert!(trouble.is_to_be_told("no route to host", start + TROUBLE_AFTER + TROUBLE_INTERVAL));
    }

    #[test]
    fn want_of_descriptors_is_told_now_and_then() {
        let (files, start) = (Files::default(), Instant::now());
        assert!(files.warning_is_due(start));
        assert!(!files.warning_is_due(start + EXHAUSTED_WARN_INTERVAL / 2));
        assert!(files.warning_is_due(start + EXHAUSTED_WARN_INTERVAL));
    }
}
