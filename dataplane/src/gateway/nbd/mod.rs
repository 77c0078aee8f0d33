//! The NBD gateway: fixed newstyle servers over TCP and Unix sockets, one [`Gateway`] per shard.
//!
//! `handshake` agrees on an export with the client, `session` carries out its requests; `receive`, `outbox` and
//! `budget` are the two directions of a connection and its bounds; `wire` is the codec and `rules` the decisions
//! that need no I/O. Hands every request to `volume`; knows nothing below it.
//!
//! Runs on a monoio runtime with timers enabled.
//!
//! Invariants
//! - Whatever a client sends, only its own connection suffers.
//! - A connection holds at most `bytes_in_flight_max` of the pool (or one piece, if that is larger), and no more of
//!   each class of buffers than the others leave free; all together hold no more than half of each.
//! - A client that holds buffers and takes nothing of its replies, or sends nothing of the payload that it owes, is
//!   sent away long before a request of another one times out; so is one that does it too slowly, while others wait
//!   for what it holds. One that holds none may be silent for ever, if its kernel takes what it is sent.
//! - A process that stops fails no request: those that it has read are finished, the connection is closed before the
//!   others, and a client that connects again sends them again.

mod budget;
mod handshake;
mod outbox;
pub mod rules;
mod session;
pub mod wire;

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use monoio::io::{AsyncReadRent, AsyncWriteRent, Split, Splitable};
use monoio::net::{TcpListener, UnixListener};
use xsan_protocol::error::Code;
use xsan_protocol::ids::VolumeId;

use crate::disk::buffers::BufferPool;
use crate::disk::os;
use crate::net::receive::{ReceiveError, Receiver};
use crate::volume::IO_TIMEOUT;
use crate::volume::request::{Export, Volumes};
use budget::{Budget, Share};
use wire::{Errno, Malformed};

/// A listener that fails (out of file descriptors, most likely) is asked again after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
/// A client host that is gone without a word is noticed after about `IDLE + 4 * INTERVAL`, also while replies are on
/// their way to it: the kernel sends no probes then, and would go on for a quarter of an hour. So is one that is
/// stopped, and whose socket is full.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 4;
const SILENCE_MAX: Duration =
    Duration::from_secs(KEEPALIVE_IDLE.as_secs() + KEEPALIVE_PROBES as u64 * KEEPALIVE_INTERVAL.as_secs());

/// Bounds of the gateway.
#[derive(Clone, Debug)]
pub struct Options {
    /// Connections of all gateways that share one [`Counters`].
    pub connections_max: usize,
    /// Bytes of buffers of one connection, until the replies are written.
    pub bytes_in_flight_max: usize,
    /// Operations under way on one connection; a request may be one per MiB.
    pub operations_in_flight_max: usize,
    /// Receive buffer of a connection: how much one system call takes.
    pub receive_bytes: usize,
    /// Longest wait for each step of the handshake.
    pub handshake_timeout: Duration,
    /// A client that holds buffers, and for this long (or a quarter longer) takes nothing of its replies or sends
    /// nothing of a payload, is sent away; while others wait for its buffers, also one that is not done with a batch
    /// of replies, or a payload, by then. They must not time out meanwhile.
    pub stall_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections_max: 1024,
            bytes_in_flight_max: 16 * 1024 * 1024,
            operations_in_flight_max: 256,
            receive_bytes: 256 * 1024,
            handshake_timeout: Duration::from_secs(10),
            stall_timeout: IO_TIMEOUT / 2,
        }
    }
}

/// State and statistics of the gateways of one process, readable from any thread.
#[derive(Debug, Default)]
pub struct Counters {
    /// Present connections.
    connections: AtomicUsize,
    /// No more requests are read, new connections closed.
    stopping: AtomicBool,
    pub accepted_connections: AtomicU64,
    /// Turned away because there were too many.
    pub refused_connections: AtomicU64,
    /// Closed because of an error or because the client broke the protocol.
    pub broken_connections: AtomicU64,
    pub requests: AtomicU64,
    pub failed_requests: AtomicU64,
    pub read_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    /// Payload bytes copied in user space on their way from the socket.
    pub copied_bytes: AtomicU64,
    /// Times that an operation waited for buffers.
    pub pool_waits: AtomicU64,
}

impl Counters {
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// From now on no connection is accepted; [`Gateway::stop`] ends those of one shard.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    fn enter(self: &Arc<Self>, max: usize) -> Option<Connection> {
        if self.is_stopping() {
            return None;
        }
        let enter = |count| (count < max).then_some(count + 1);
        self.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).ok()?;
        Some(Connection(Arc::clone(self)))
    }
}

/// One of the present connections, until dropped.
struct Connection(Arc<Counters>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An opened volume; closed when dropped.
struct Attachment<V: Volumes> {
    volumes: V,
    export: Export,
}

impl<V: Volumes> Drop for Attachment<V> {
    fn drop(&mut self) {
        self.volumes.close(self.export.volume);
    }
}

/// Why a connection was closed, other than by the client's wish.
#[derive(Debug, thiserror::Error)]
enum Closed {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("malformed: {0}")]
    Malformed(#[from] Malformed),
    #[error("a step of the handshake took too long")]
    HandshakeTimeout,
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    #[error("option {0} from a client without fixed newstyle")]
    NotFixedNewstyle(u32),
    #[error("option {option} claims {length} bytes")]
    OptionTooLong { option: u32, length: u32 },
    #[error("the handshake does not end")]
    TooManyOptions,
    #[error("the export can not be opened: {0}")]
    Open(Code),
    #[error(
        "the client holds buffers, and takes no replies or sends no payload, or too slowly for others that wait"
    )]
    Stalled,
    #[error("a write claims {0} bytes")]
    WriteTooLong(u32),
    #[error("a read failed ({0:?}) after its reply had begun")]
    ReadFailed(Errno),
}

/// The NBD server of one shard.
pub struct Gateway<V: Volumes> {
    volumes: V,
    pool: &'static BufferPool,
    options: Options,
    counters: Arc<Counters>,
    share: Rc<Share>,
    sessions: Rc<RefCell<Vec<Weak<session::Context<V>>>>>,
}

impl<V: Volumes> Clone for Gateway<V> {
    fn clone(&self) -> Self {
        Self {
            volumes: self.volumes.clone(),
            pool: self.pool,
            options: self.options.clone(),
            counters: Arc::clone(&self.counters),
            share: Rc::clone(&self.share),
            sessions: Rc::clone(&self.sessions),
        }
    }
}

impl<V: Volumes> Gateway<V> {
    /// - `counters`: shared by the gateways of all shards.
    ///
    /// # Panics
    /// A bound is 0.
    pub fn new(volumes: V, pool: &'static BufferPool, options: Options, counters: Arc<Counters>) -> Self {
        assert!(options.connections_max > 0);
        assert!(options.bytes_in_flight_max > 0);
        assert!(options.operations_in_flight_max > 0);
        let share = Share::new(pool, Arc::clone(&counters));
        Self { volumes, pool, options, counters, share, sessions: Rc::default() }
    }

    /// Ends every session when the requests are answered that it has read; no more are read or accepted.
    pub fn stop(&self) {
        self.counters.stop();
        self.sessions.borrow().iter().filter_map(Weak::upgrade).for_each(|session| session.wake());
    }

    /// Ends the sessions of `volume` whose clients have closed their connections, also behind requests that are unread.
    /// Returns when nothing of them is under way: a client that comes back must not be overtaken by its past.
    pub async fn sweep(&self, volume: VolumeId) {
        for budget in self.end_gone(volume) {
            budget.idle().await;
        }
    }

    /// What is under way of the sessions of `volume` that have ended, or end now because their clients are gone.
    fn end_gone(&self, volume: VolumeId) -> Vec<Rc<Budget>> {
        let sessions = self.sessions.borrow();
        let of_volume =
            sessions.iter().filter_map(Weak::upgrade).filter(|session| session.volume() == volume);
        of_volume.filter_map(|session| session.end_if_gone()).collect()
    }

    fn enter(&self, session: &Rc<session::Context<V>>) {
        let mut sessions = self.sessions.borrow_mut();
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Rc::downgrade(session));
    }

    /// Accepts connections for ever; each is served by a task of its own.
    pub async fn serve_tcp(self, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let keepalive = (Some(KEEPALIVE_IDLE), Some(KEEPALIVE_INTERVAL), Some(KEEPALIVE_PROBES));
                    let set = stream.set_nodelay(true);
                    let set =
                        set.and_then(|()| stream.set_tcp_keepalive(keepalive.0, keepalive.1, keepalive.2));
                    let set = set.and_then(|()| os::set_user_timeout(&stream, SILENCE_MAX));
                    if let Err(error) = set {
                        tracing::warn!(%peer, %error, "socket options of an NBD connection were not set");
                    }
                    monoio::spawn(self.clone().serve(stream, peer));
                }
                Err(error) => {
                    tracing::warn!(%error, "NBD connection not accepted");
                    monoio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// As [`Self::serve_tcp`], for a Unix socket.
    pub async fn serve_unix(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    monoio::spawn(self.clone().serve(stream, "unix"));
                }
                Err(error) => {
                    tracing::warn!(%error, "NBD connection not accepted");
                    monoio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// Serves one connection from its greeting to its end; `peer` names the client in the log.
    pub async fn serve<S>(self, stream: S, peer: impl fmt::Display)
    where
        S: AsyncReadRent + AsyncWriteRent + Split + AsRawFd + 'static,
    {
        let Some(connection) = self.counters.enter(self.options.connections_max) else {
            self.counters.refused_connections.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%peer, max = self.options.connections_max, "NBD connection refused");
            return;
        };
        self.counters.accepted_connections.fetch_add(1, Ordering::Relaxed);
        match self.converse(stream).await {
            Ok(()) => tracing::debug!(%peer, "NBD connection ended"),
            Err(reason) => {
                self.counters.broken_connections.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%peer, %reason, "NBD connection closed");
            }
        }
        drop(connection);
    }

    async fn converse<S>(&self, stream: S) -> Result<(), Closed>
    where
        S: AsyncReadRent + AsyncWriteRent + Split + AsRawFd + 'static,
    {
        let socket = stream.as_raw_fd();
        let (reader, mut writer) = stream.into_split();
        let mut receiver = Receiver::new(reader, wire::Request::SIZE);
        let timeout = self.options.handshake_timeout;
        match handshake::negotiate(&mut receiver, &mut writer, &self.volumes, timeout).await? {
            Some(negotiated) => session::run(receiver, writer, socket, negotiated, self).await,
            None => Ok(()),
        }
    }
}
