//! The tasks of a shard's thread: they wait for the world and queue events for the turn.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use monoio::net::TcpListener;
use xsan_protocol::ids::{Incarnation, ShardIndex};
use xsan_protocol::map::ClusterMap;
use xsan_protocol::wire::session::Hello;

use super::mailbox::MeshEnd;
use super::peers::PeerShard;
use super::{Event, Handle, Identity, Message, Shard};
use crate::disk::eventfd::EventFd;
use crate::net::connection::{Connection, Counters, Memory, Outbox};
use crate::net::listener;

/// What drives commits of idle groups, retries and destage.
const TICK: Duration = Duration::from_millis(20);
/// Waits between tries to connect to a peer that is down.
const DIAL_WAIT_FIRST: Duration = Duration::from_millis(20);
const DIAL_WAIT_MAX: Duration = Duration::from_millis(500);

impl Shard {
    /// Runs turns for ever.
    pub(super) async fn run(mut self) {
        let mut events = VecDeque::new();
        loop {
            if !self.mesh.borrow_mut().park() {
                // Messages came since the last look: take them without a wait.
                receive(&self.handle, &self.mesh, self.identity.shard);
            }
            self.handle.0.wake.notified().await;
            self.mesh.borrow_mut().unpark();
            receive(&self.handle, &self.mesh, self.identity.shard);
            std::mem::swap(&mut events, &mut *self.handle.0.events.borrow_mut());
            self.turn(&mut events);
        }
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

/// What the connections of a shard have in common.
#[derive(Clone)]
pub(super) struct Connections {
    pub identity: Rc<Identity>,
    pub handle: Handle,
    pub memory: Memory,
    pub counters: Rc<Counters>,
    pub open: Rc<Cell<u32>>,
    pub open_max: u32,
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
            let stream = listener::accept(&listener).await;
            if self.open.get() >= self.open_max {
                tracing::warn!(
                    max = self.open_max,
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
                    Err(error) => tracing::warn!(%error, "a connection was not accepted"),
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
        while wanted.get() {
            match Connection::dial(to.address, &self.hello()).await {
                Ok(connection) if connection.hello.incarnation == to.incarnation => {
                    wait = DIAL_WAIT_FIRST;
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
                Err(error) => {
                    tracing::debug!(node = %peer.0, address = %to.address, %error, "the peer can not be reached")
                }
            }
            monoio::time::sleep(wait).await;
            wait = (wait * 2).min(DIAL_WAIT_MAX);
        }
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
