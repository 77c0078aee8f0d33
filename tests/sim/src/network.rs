//! The network: connections between data processes, and which hosts hear which.
//!
//! A connection carries frames in order, both ways, and loses none until it breaks; then what was on its way may arrive
//! in part, and each end learns of it in its own time. A blocked direction holds frames back until it is healed, as TCP does:
//! some in the sockets, which have copied them, the others in their sender's memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use xsan_dataplane::net::frame::Frame;
use xsan_dataplane::replication::is_content;
use xsan_protocol::ids::GroupId;
use xsan_protocol::wire::header::HEADER_SIZE;

use crate::plan::{MS, SECOND, US};
use crate::process::Input;
use crate::world::{Event, World};

pub type ConnectionId = u64;

/// What sockets take of what is sent, but for the last frame.
const SOCKET_BYTES: usize = 256 * 1024;
/// Silence after which a connection is given up.
const SILENCE_MAX: u64 = 10 * SECOND;
pub const DIAL_WAIT_FIRST: u64 = 20 * MS;
const DIAL_WAIT_MAX: u64 = 500 * MS;

/// One end of a connection: a life of a data process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub host: usize,
    pub life: u64,
}

#[derive(Debug)]
pub struct Connection {
    /// Who dialled, who accepted.
    pub ends: [End; 2],
    /// By sender.
    ways: [Way; 2],
    /// What is sent from now on is lost.
    broken: bool,
    /// By end: it has noticed.
    closed: [bool; 2],
}

/// One direction of a connection.
#[derive(Debug, Default)]
struct Way {
    outbox: VecDeque<Frame>,
    /// In the sockets and between them, and when each is due.
    wire: VecDeque<(u64, Frame)>,
    wire_bytes: usize,
    /// When the newest is due.
    due: u64,
}

#[derive(Default)]
pub struct Network {
    pub connections: BTreeMap<ConnectionId, Connection>,
    pub blocked: BTreeSet<(usize, usize)>,
    next: ConnectionId,
}

impl Network {
    pub fn hears(&self, from: usize, to: usize) -> bool {
        !self.blocked.contains(&(from, to))
    }

    pub fn meets(&self, a: usize, b: usize) -> bool {
        self.hears(a, b) && self.hears(b, a)
    }
}

fn bytes_of(frame: &Frame) -> usize {
    HEADER_SIZE + frame.data.as_ref().map_or(0, |data| data.len())
}

impl World {
    /// One way through the network: mostly short, rarely long.
    pub fn latency(&mut self) -> u64 {
        let mean = self.plan.network_ns;
        let usual = mean / 2 + self.random.below(mean);
        if self.random.one_in(200) { usual + self.random.below(20 * MS) } else { usual }
    }

    /// The same for what keeps no order with anything else: beats, grants, states. Some come very late.
    pub fn datagram_latency(&mut self) -> u64 {
        let usual = self.latency();
        if self.random.one_in(50) { usual + self.random.below(SECOND) } else { usual }
    }

    /// Tries to connect the data process to that of `peer`.
    pub fn dial(&mut self, host: usize, life: u64, peer: usize, wait: u64) {
        if self.process_of(host, life).is_none() {
            return;
        }
        let process = self.hosts[host].process.as_mut().expect("checked above");
        let Some(&wanted) = process.wanted.get(&peer) else {
            process.dialling.remove(&peer);
            return;
        };
        let there = self.hosts[peer].process.as_ref();
        let answers =
            there.is_some_and(|process| process.incarnation == wanted) && self.net.meets(host, peer);
        if !answers {
            let event = Event::Dial { host, life, peer, wait: (wait * 2).min(DIAL_WAIT_MAX) };
            return self.after(wait, event);
        }
        self.net.next += 1;
        let id = self.net.next;
        let ends = [End { host, life }, End { host: peer, life: self.hosts[peer].life }];
        let connection = Connection { ends, ways: Default::default(), broken: false, closed: [false; 2] };
        self.net.connections.insert(id, connection);
        let there = self.latency();
        self.after(there, Event::Hello { connection: id });
    }

    /// The hello has arrived; the answer goes back.
    pub fn on_hello(&mut self, id: ConnectionId) {
        let Some([dialler, acceptor]) = self.net.connections.get(&id).map(|connection| connection.ends)
        else {
            return;
        };
        if self.process_of(acceptor.host, acceptor.life).is_none()
            || !self.net.meets(dialler.host, acceptor.host)
        {
            return self.break_connection(id);
        }
        self.input(acceptor.host, Input::Accepted { connection: id, peer: dialler.host });
        let back = self.latency();
        self.after(back, Event::Welcome { connection: id });
    }

    pub fn on_welcome(&mut self, id: ConnectionId) {
        let Some([dialler, acceptor]) = self.net.connections.get(&id).map(|connection| connection.ends)
        else {
            return;
        };
        if self.process_of(dialler.host, dialler.life).is_some() {
            self.input(dialler.host, Input::Dialled { connection: id, peer: acceptor.host });
        }
    }

    /// Sends a frame from one end of a connection.
    pub fn send_on(&mut self, id: ConnectionId, from: usize, frame: Frame) {
        let Some(connection) = self.net.connections.get_mut(&id) else { return };
        if connection.broken {
            return;
        }
        let side = usize::from(connection.ends[0].host != from);
        connection.ways[side].outbox.push_back(frame);
        self.write(id, side);
    }

    /// Hands the socket what it takes.
    fn write(&mut self, id: ConnectionId, side: usize) {
        loop {
            let latency = self.latency();
            let Some(connection) = self.net.connections.get_mut(&id) else { return };
            let way = &mut connection.ways[side];
            if way.wire_bytes >= SOCKET_BYTES {
                return;
            }
            let Some(frame) = way.outbox.pop_front() else { return };
            way.wire_bytes += bytes_of(&frame);
            way.due = way.due.max(self.now + latency);
            let due = way.due;
            way.wire.push_back((due, self.memory.copy(frame)));
            self.at(due, Event::Deliver { connection: id, side });
        }
    }

    /// Drops content of a group that is to go by this connection and that no socket has taken.
    pub fn unsend(&mut self, id: ConnectionId, from: usize, group: GroupId) {
        let Some(connection) = self.net.connections.get_mut(&id) else { return };
        let side = usize::from(connection.ends[0].host != from);
        let unwanted = |frame: &Frame| frame.header.group == group && is_content(frame.header.opcode);
        connection.ways[side].outbox.retain(|frame| !unwanted(frame));
    }

    /// Hands the receiver what is due.
    pub fn deliver(&mut self, id: ConnectionId, side: usize) {
        let Some(connection) = self.net.connections.get_mut(&id) else { return };
        let (from, to) = (connection.ends[side], connection.ends[1 - side]);
        if self.net.blocked.contains(&(from.host, to.host)) || connection.closed[1 - side] {
            return;
        }
        let mut frames = Vec::new();
        let way = &mut connection.ways[side];
        while let Some((_, frame)) = way.wire.pop_front_if(|(due, _)| *due <= self.now) {
            way.wire_bytes -= bytes_of(&frame);
            frames.push(frame);
        }
        self.write(id, side);
        if self.process_of(to.host, to.life).is_some() {
            for frame in frames {
                self.input(to.host, Input::Frame { connection: id, frame });
            }
        }
    }

    /// The connection breaks: of what is on its way a part may arrive, then each end notices.
    pub fn break_connection(&mut self, id: ConnectionId) {
        self.break_silent(id, self.now);
    }

    /// As `break_connection`; nothing was heard on it since then.
    fn break_silent(&mut self, id: ConnectionId, since: u64) {
        let Some(mut connection) = self.net.connections.remove(&id) else { return };
        if !std::mem::replace(&mut connection.broken, true) {
            for side in 0..2 {
                let way = &mut connection.ways[side];
                way.outbox.clear();
                way.wire.truncate(self.random.index(way.wire.len() + 1));
                let last = way.wire.back().map_or(self.now, |(due, _)| *due);
                let noticed = last.max(self.now) + self.latency();
                self.at(noticed, Event::Closed { connection: id, end: 1 - side, since });
            }
        }
        self.net.connections.insert(id, connection);
    }

    /// One end learns that the connection is gone; if it can hear that.
    pub fn on_closed(&mut self, id: ConnectionId, end: usize, since: u64) {
        let Some(connection) = self.net.connections.get_mut(&id) else { return };
        let (own, other) = (connection.ends[end], connection.ends[1 - end]);
        let deaf = self.net.blocked.contains(&(other.host, own.host));
        if deaf && self.now < since + SILENCE_MAX {
            return self.after(100 * MS, Event::Closed { connection: id, end, since });
        }
        connection.closed[end] = true;
        if connection.closed == [true; 2] {
            self.net.connections.remove(&id);
        }
        if self.process_of(own.host, own.life).is_some() {
            self.input(own.host, Input::Closed { connection: id });
            if end == 0 {
                let (host, life, peer) = (own.host, own.life, other.host);
                self.after(DIAL_WAIT_FIRST, Event::Dial { host, life, peer, wait: DIAL_WAIT_FIRST });
            }
        }
    }

    /// The data process of a host is gone, and with it its ends of connections.
    pub fn drop_connections(&mut self, host: usize) {
        let of_host = |connection: &Connection| connection.ends.iter().any(|end| end.host == host);
        let ids: Vec<_> =
            self.net.connections.iter().filter(|(_, c)| of_host(c)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.break_connection(id));
    }

    /// `from` is not heard by `to` any more.
    pub fn block(&mut self, from: usize, to: usize) {
        if from == to || !self.net.blocked.insert((from, to)) {
            return;
        }
        self.after(SILENCE_MAX, Event::Silence { from, to, since: self.now });
    }

    pub fn unblock(&mut self, from: usize, to: usize) {
        if !self.net.blocked.remove(&(from, to)) {
            return;
        }
        let between = |connection: &Connection| {
            (0..2).find(|side| connection.ends[*side].host == from && connection.ends[1 - side].host == to)
        };
        let held: Vec<_> =
            self.net.connections.iter().filter_map(|(id, c)| Some((*id, between(c)?))).collect();
        for (connection, side) in held {
            // What was held back comes after a retransmission.
            let wait = self.random.below(200 * MS);
            if let Some(held) = self.net.connections.get_mut(&connection) {
                let due = self.now + wait;
                let way = &mut held.ways[side];
                way.due = way.due.max(due);
                way.wire.iter_mut().for_each(|(at, _)| *at = (*at).max(due));
                self.at(due.max(self.now + US), Event::Deliver { connection, side });
            }
        }
    }

    /// Nothing was heard for long: both ends give their connections up.
    pub fn on_silence(&mut self, from: usize, to: usize, since: u64) {
        if self.net.hears(from, to) || self.now < since + SILENCE_MAX {
            return;
        }
        let between = |connection: &Connection| {
            let hosts = connection.ends.map(|end| end.host);
            hosts == [from, to] || hosts == [to, from]
        };
        let ids: Vec<_> =
            self.net.connections.iter().filter(|(_, c)| between(c)).map(|(id, _)| *id).collect();
        let since = self.now.saturating_sub(SILENCE_MAX);
        ids.into_iter().for_each(|id| self.break_silent(id, since));
    }
}
