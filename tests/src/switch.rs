//! A switch between nodes in network namespaces of their own, whose every link can be cut, made slow and lossy.
//!
//! Each node has a tun device, and so has the harness; one thread of the harness carries packets from one to the other
//! as the links say. Used by `network`. It knows addresses, no process: what a link does is exact, one way and
//! from one packet to the next, and needs nothing of the kernel but tun devices (no netem, no netfilter).
//!
//! Invariants
//! - Packets of one link are delivered in their order, however its delay changes.
//! - What the harness and a node say to each other is never disturbed.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::namespace::{Namespace, tun};
use crate::random::Random;

/// The harness's own end of the network: below it are the nodes.
const HOST: u8 = 254;
const PACKET_BYTES_MAX: usize = 65_536;
/// Packets taken from one device before the others get their turn.
const BURST: usize = 64;
const IPV4_HEADER_BYTES: usize = 20;
/// Where packets may wait because of a delay, all links together.
const DELAYED_MAX: usize = 50_000;

/// What becomes of packets from one node to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub cut: bool,
    pub loss_percent: u64,
    pub delay: Duration,
}

impl Link {
    pub const CUT: Self = Self { cut: true, loss_percent: 0, delay: Duration::ZERO };

    pub const fn lossy(loss_percent: u64) -> Self {
        Self { cut: false, loss_percent, delay: Duration::ZERO }
    }

    pub const fn slow(delay: Duration) -> Self {
        Self { cut: false, loss_percent: 0, delay }
    }
}

/// Packets since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub delivered: u64,
    /// By a link that is cut or lossy.
    pub lost: u64,
    /// For want of space in a queue: a load that is too high for this switch.
    pub overflowed: u64,
}

#[derive(Debug, Default)]
struct State {
    /// By (from, to); absent: whole.
    links: HashMap<(usize, usize), Link>,
    counts: Counts,
}

#[derive(Debug)]
pub struct Switch {
    namespaces: Vec<Namespace>,
    state: Arc<Mutex<State>>,
    /// Closed to end the thread.
    running: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Switch {
    /// A switch of the network `prefix`.0/24 with a namespace for each node; all links are whole.
    pub fn start(prefix: [u8; 3], node_count: usize, seed: u64) -> Result<Self> {
        let address = |host| Ipv4Addr::new(prefix[0], prefix[1], prefix[2], host);
        let mut namespaces = Vec::new();
        let mut ports = Vec::new();
        for index in 0..node_count {
            let namespace = Namespace::create()?;
            ports.push(namespace.enter(|| tun(address(index as u8 + 1)))?);
            namespaces.push(namespace);
        }
        ports.push(tun(address(HOST))?);
        let state = Arc::new(Mutex::new(State::default()));
        let (running, stop) = UnixStream::pair()?;
        let forwarder = Forwarder {
            prefix,
            ports,
            stop,
            state: Arc::clone(&state),
            random: Random::new(seed),
            delayed: BinaryHeap::new(),
            last_due: HashMap::new(),
            sequence: 0,
        };
        let thread = thread::Builder::new().name("switch".to_owned()).spawn(move || forwarder.run())?;
        Ok(Self { namespaces, state, running: Some(running), thread: Some(thread) })
    }

    pub fn namespace(&self, index: usize) -> &Namespace {
        &self.namespaces[index]
    }

    /// Sets what becomes of packets from one node to another, one way.
    pub fn set(&self, from: usize, to: usize, link: Link) {
        assert!(from != to && from.max(to) < self.namespaces.len(), "{from} to {to} is no link");
        self.lock().links.insert((from, to), link);
    }

    pub fn set_both(&self, one: usize, other: usize, link: Link) {
        self.set(one, other, link);
        self.set(other, one, link);
    }

    /// Sets all links of a node, both ways; the harness still reaches it.
    pub fn set_all(&self, index: usize, link: Link) {
        let others = (0..self.namespaces.len()).filter(|other| *other != index);
        others.for_each(|other| self.set_both(index, other, link));
    }

    /// All links are whole again.
    pub fn heal(&self) {
        self.lock().links.clear();
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the switch's thread panicked");
        }
    }
}

/// A packet that waits: when it is due, its place in the order of arrival, where it goes, its bytes.
type Waiting = Reverse<(Instant, u64, usize, Vec<u8>)>;

/// The thread's own state. Ports are numbered as the nodes; the harness's is the last.
struct Forwarder {
    prefix: [u8; 3],
    ports: Vec<File>,
    stop: UnixStream,
    state: Arc<Mutex<State>>,
    random: Random,
    delayed: BinaryHeap<Waiting>,
    /// Of the newest packet that each link delays.
    last_due: HashMap<(usize, usize), Instant>,
    sequence: u64,
}

impl Forwarder {
    fn run(mut self) {
        let mut packet = vec![0; PACKET_BYTES_MAX];
        let mut polled: Vec<libc::pollfd> = self
            .ports
            .iter()
            .map(AsRawFd::as_raw_fd)
            .chain([self.stop.as_raw_fd()])
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        loop {
            let timeout = self.next_due().map(|due| due.saturating_duration_since(Instant::now()));
            let timeout_ms = timeout.map_or(-1, |timeout| timeout.as_micros().div_ceil(1000) as i32);
            // SAFETY: the descriptors belong to `self`, and the array is as long as it says.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, timeout_ms) };
            if ready < 0 {
                let error = std::io::Error::last_os_error();
                assert!(error.kind() == std::io::ErrorKind::Interrupted, "polling the switch: {error}");
                continue;
            }
            if polled[self.ports.len()].revents != 0 {
                return;
            }
            self.deliver_due();
            for port in (0..self.ports.len()).filter(|port| polled[*port].revents != 0) {
                for _ in 0..BURST {
                    let Ok(length) = self.ports[port].read(&mut packet) else { break };
                    self.forward(port, &packet[..length]);
                }
            }
        }
    }

    fn forward(&mut self, from: usize, packet: &[u8]) {
        let Some(to) = self.destination(packet) else { return };
        let link = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.links.get(&(from, to)).copied().unwrap_or_default()
        };
        if link.cut || (link.loss_percent > 0 && self.random.within(0..100) < link.loss_percent) {
            return self.count(|counts| counts.lost += 1);
        }
        let now = Instant::now();
        let behind = self.last_due.get(&(from, to)).filter(|last| **last > now).copied();
        if link.delay.is_zero() && behind.is_none() {
            return self.deliver(to, packet);
        }
        if self.delayed.len() >= DELAYED_MAX {
            return self.count(|counts| counts.overflowed += 1);
        }
        let due = (now + link.delay).max(behind.unwrap_or(now));
        self.last_due.insert((from, to), due);
        self.sequence += 1;
        self.delayed.push(Reverse((due, self.sequence, to, packet.to_vec())));
    }

    /// The port of an IPv4 packet's destination; nobody here speaks anything else.
    fn destination(&self, packet: &[u8]) -> Option<usize> {
        if packet.len() < IPV4_HEADER_BYTES || packet[0] >> 4 != 4 || packet[16..19] != self.prefix {
            return None;
        }
        let host_port = self.ports.len() - 1;
        match packet[19] {
            HOST => Some(host_port),
            host => usize::from(host).checked_sub(1).filter(|port| *port < host_port),
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.delayed.peek().map(|Reverse((due, ..))| *due)
    }

    fn deliver_due(&mut self) {
        let now = Instant::now();
        while self.next_due().is_some_and(|due| due <= now) {
            let Some(Reverse((_, _, to, packet))) = self.delayed.pop() else { return };
            self.deliver(to, &packet);
        }
    }

    fn deliver(&mut self, to: usize, packet: &[u8]) {
        // A tun device takes a packet whole or not at all.
        match self.ports[to].write_all(packet) {
            Ok(()) => self.count(|counts| counts.delivered += 1),
            Err(_) => self.count(|counts| counts.overflowed += 1),
        }
    }

    fn count(&self, add: impl FnOnce(&mut Counts)) {
        add(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).counts);
    }
}
