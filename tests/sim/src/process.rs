//! A data process: one shard with one store. Its turn mirrors `shard::turn`, over the same driver.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use xsan_controlplane::placement::{Proposal, ProposedChange};
use xsan_dataplane::io::DiskCompletion;
use xsan_dataplane::net::frame::Frame;
use xsan_dataplane::replication::{
    Change, Driver, Operation, Origin, Output, Reply, Request, RequestId, ScrubOrder,
};
use xsan_dataplane::volume::calls::Answer;
use xsan_dataplane::volume::wire;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, Incarnation, NodeId, PoolId, ShardIndex};
use xsan_protocol::map::{ClusterMap, Durability, Pool};
use xsan_protocol::wire::header::Opcode;

use crate::network::{ConnectionId, DIAL_WAIT_FIRST};
use crate::world::{Event, World};

const SHARD: ShardIndex = ShardIndex(0);
/// Bytes a second.
const SCRUB_RATE: u64 = 1 << 30;

pub struct Process {
    pub incarnation: Incarnation,
    pub driver: Driver,
    pub map: Arc<ClusterMap>,
    pub lease_until: u64,
    pub inbox: VecDeque<Input>,
    pub turn_due: bool,
    /// Which life of each peer the map names.
    pub wanted: BTreeMap<usize, Incarnation>,
    /// Peers that are connected, or being connected.
    pub dialling: BTreeSet<usize>,
    pub dialled: BTreeMap<usize, ConnectionId>,
    accepted: BTreeMap<usize, ConnectionId>,
    /// The newest connection that each peer made: older ones are fenced.
    sessions: BTreeMap<usize, ConnectionId>,
    peers: BTreeMap<ConnectionId, usize>,
    pub calls: BTreeMap<u64, Call>,
    next_call: u64,
    flushes: BTreeMap<u64, PoolFlush>,
}

/// A request under way, of a client on this host or of a pool flush.
pub struct Call {
    pub purpose: Purpose,
    node: NodeId,
    incarnation: Incarnation,
    group: Option<GroupId>,
}

#[derive(Clone, Copy, Debug)]
pub enum Purpose {
    /// Client operation `.0`.
    Client(u64),
    /// One group's part of pool flush `.0`.
    Flush(u64),
}

/// A flush of the groups that this process leads.
struct PoolFlush {
    asker: Asker,
    left: usize,
    covered: Vec<GroupId>,
}

enum Asker {
    /// Call `.0` of this process.
    Own(u64),
    Connection(ConnectionId, u64),
}

/// What the next turn takes.
pub enum Input {
    Frame { connection: ConnectionId, frame: Frame },
    Accepted { connection: ConnectionId, peer: usize },
    Dialled { connection: ConnectionId, peer: usize },
    Closed { connection: ConnectionId },
    Request(Request),
    Send { number: u64, peer: usize, frame: Frame },
    Flush { number: u64, pool: PoolId },
    Disk(DiskCompletion),
    Map(Arc<ClusterMap>),
    Scrub(Vec<ScrubOrder>),
    Tick,
}

impl Process {
    pub fn new(incarnation: Incarnation, driver: Driver) -> Self {
        Self {
            incarnation,
            driver,
            map: Arc::default(),
            lease_until: 0,
            inbox: VecDeque::new(),
            turn_due: false,
            wanted: BTreeMap::new(),
            dialling: BTreeSet::new(),
            dialled: BTreeMap::new(),
            accepted: BTreeMap::new(),
            sessions: BTreeMap::new(),
            peers: BTreeMap::new(),
            calls: BTreeMap::new(),
            next_call: 1,
            flushes: BTreeMap::new(),
        }
    }

    /// Damaged pages that this life has met.
    pub fn checksum_errors(&self) -> u64 {
        self.driver.stores().map(|store| store.status().counters.checksum_errors).sum()
    }

    fn call(&mut self, purpose: Purpose, node: NodeId, group: Option<GroupId>) -> Option<u64> {
        let incarnation = self.map.nodes.get(&node)?.data.as_ref()?.incarnation;
        let number = self.next_call;
        self.next_call += 1;
        self.calls.insert(number, Call { purpose, node, incarnation, group });
        Some(number)
    }
}

fn host_of(node: NodeId) -> usize {
    node.0 as usize - 1
}

impl World {
    /// The data process of a host, if it is still in that life.
    pub fn process_of(&self, host: usize, life: u64) -> Option<&Process> {
        let host = &self.hosts[host];
        host.process.as_ref().filter(|_| host.life == life)
    }

    /// Queues something for the next turn of a host's data process.
    pub fn input(&mut self, host: usize, input: Input) {
        let soon = self.random.below(5_000);
        let life = self.hosts[host].life;
        let Some(process) = &mut self.hosts[host].process else { return };
        process.inbox.push_back(input);
        if !std::mem::replace(&mut process.turn_due, true) {
            self.after(soon, Event::Turn { host, life });
        }
    }

    pub fn turn(&mut self, host: usize, life: u64) {
        let paused_until = self.hosts[host].data_paused_until;
        if self.process_of(host, life).is_none() {
            return;
        }
        if paused_until > self.now {
            return self.at(paused_until, Event::Turn { host, life });
        }
        let mut process = self.hosts[host].process.take().expect("it is in this life");
        process.turn_due = false;
        process.driver.replication.on_lease(process.lease_until);
        let mut out = Vec::new();
        for input in std::mem::take(&mut process.inbox) {
            self.take(host, &mut process, input, &mut out);
            self.carry_out(host, &mut process, &mut out);
        }
        let mut operations = Vec::new();
        let now = self.hosts[host].clock(self.now).0;
        process.driver.end_turn(now, &mut operations, &mut out);
        self.carry_out(host, &mut process, &mut out);
        // What was put into the inbox meanwhile came from this turn.
        let again = !process.inbox.is_empty();
        process.turn_due = again;
        self.hosts[host].process = Some(process);
        if again {
            self.after(1, Event::Turn { host, life });
        }
        for (_, operation) in operations {
            self.submit(host, operation);
        }
    }

    fn take(&mut self, host: usize, process: &mut Process, input: Input, out: &mut Vec<Output>) {
        let now = self.hosts[host].clock(self.now).0;
        match input {
            Input::Frame { connection, frame } => self.on_frame(host, process, connection, frame, now, out),
            Input::Accepted { connection, peer } => {
                let newest = process.sessions.get(&peer).copied().unwrap_or(0);
                if connection < newest {
                    return self.break_connection(connection);
                }
                process.sessions.insert(peer, connection);
                if process.peers.contains_key(&newest) {
                    self.forget(host, process, newest, now, out);
                }
                process.peers.insert(connection, peer);
                process.accepted.insert(peer, connection);
            }
            Input::Dialled { connection, peer } => {
                process.peers.insert(connection, peer);
                process.dialled.insert(peer, connection);
                let node = self.hosts[peer].node;
                process.driver.call(now, out, |replication, stores, now, out| {
                    replication.on_peer_up(node, stores, now, out);
                });
            }
            Input::Closed { connection } => self.forget(host, process, connection, now, out),
            Input::Request(request) => process.driver.call(now, out, |replication, stores, now, out| {
                replication.on_request(request, stores, now, out);
            }),
            Input::Send { number, peer, frame } => match process.dialled.get(&peer) {
                Some(&connection) => self.send_on(connection, host, frame),
                None => self.complete(host, process, number, Err(Code::GroupInactive)),
            },
            Input::Flush { number, pool } => self.start_flush(host, process, Asker::Own(number), pool, out),
            Input::Disk(completion) => process.driver.on_disk(self.hosts[host].store, completion),
            Input::Map(map) => self.on_map(host, process, map, now, out),
            Input::Scrub(orders) => process.driver.call(now, out, |replication, stores, now, out| {
                replication.set_scrubs(SCRUB_RATE, orders, stores, now, out);
            }),
            Input::Tick => process.driver.on_tick(now, out),
        }
    }

    /// A connection is gone, by itself or because a newer session fences it.
    fn forget(
        &mut self,
        host: usize,
        process: &mut Process,
        connection: ConnectionId,
        now: u64,
        out: &mut Vec<Output>,
    ) {
        let Some(peer) = process.peers.remove(&connection) else { return };
        process.accepted.retain(|_, id| *id != connection);
        process.driver.replication.on_origin_gone(Origin::Connection(connection));
        let dialled = process.dialled.get(&peer) == Some(&connection);
        self.break_connection(connection);
        if !dialled {
            return;
        }
        process.dialled.remove(&peer);
        let node = self.hosts[peer].node;
        let lost: Vec<u64> =
            process.calls.iter().filter(|(_, call)| call.node == node).map(|(number, _)| *number).collect();
        for number in lost {
            self.complete(host, process, number, Err(Code::GroupInactive));
        }
        process.driver.call(now, out, |replication, stores, now, out| {
            replication.on_peer_lost(node, &|_| true, stores, now, out);
        });
    }

    fn on_frame(
        &mut self,
        host: usize,
        process: &mut Process,
        connection: ConnectionId,
        frame: Frame,
        now: u64,
        out: &mut Vec<Output>,
    ) {
        let Some(&peer) = process.peers.get(&connection) else { return };
        let frame = self.memory.receive(host, frame);
        let number = frame.header.request_id;
        match frame.header.opcode {
            Opcode::ReadReply | Opcode::WriteReply | Opcode::FlushReply | Opcode::BlockStatusReply => {
                self.complete(host, process, number, wire::frame_answer(frame));
            }
            Opcode::Flush => {
                let pool = frame.header.group.pool();
                self.start_flush(host, process, Asker::Connection(connection, number), pool, out);
            }
            Opcode::Read | Opcode::Write | Opcode::WriteZeroes | Opcode::Trim | Opcode::BlockStatus => {
                if let Some(code) = frame.header.status {
                    let answer = wire::answer_opcode(frame.header.opcode);
                    return self.send_on(connection, host, wire::failure_frame(answer, number, code));
                }
                let id = RequestId { origin: Origin::Connection(connection), number };
                let request = wire::frame_request(id, frame).expect("clients of the simulation ask well");
                process.driver.call(now, out, |replication, stores, now, out| {
                    replication.on_request(request, stores, now, out);
                });
            }
            _ => {
                let node = self.hosts[peer].node;
                process.driver.call(now, out, |replication, stores, now, out| {
                    replication.on_frame(node, frame, stores, now, out);
                });
            }
        }
    }

    fn on_map(
        &mut self,
        host: usize,
        process: &mut Process,
        map: Arc<ClusterMap>,
        now: u64,
        out: &mut Vec<Output>,
    ) {
        if map.version <= process.map.version {
            return;
        }
        process.map = map.clone();
        let own = self.hosts[host].node;
        let data = map.nodes.get(&own).and_then(|node| node.data.as_ref());
        if data.is_some_and(|data| data.incarnation == process.incarnation) {
            self.hosts[host].failed_before = false;
        }
        let mut wanted = BTreeMap::new();
        for node in map.nodes.values().filter(|node| node.id != own) {
            wanted.extend(node.data.as_ref().map(|data| (host_of(node.id), data.incarnation)));
        }
        let life = self.hosts[host].life;
        for (&peer, &incarnation) in &wanted {
            if process.wanted.get(&peer) == Some(&incarnation) {
                continue;
            }
            // A connection to an older life is given up; then another is dialled.
            if let Some(&old) = process.dialled.get(&peer) {
                self.break_connection(old);
            }
            if process.dialling.insert(peer) {
                self.after(1, Event::Dial { host, life, peer, wait: DIAL_WAIT_FIRST });
            }
        }
        process.wanted = wanted;
        process.driver.call(now, out, |replication, stores, now, out| {
            replication.on_map(&map, stores, now, out);
        });
        let gone = |call: &Call| {
            let incarnation = |node: NodeId| map.nodes.get(&node)?.data.as_ref().map(|data| data.incarnation);
            let same = incarnation(call.node) == Some(call.incarnation);
            let leads = |group| map.route(group).is_some_and(|(node, ..)| node == call.node);
            // A flush of all that a node leads has no group.
            let leads_any = || map.groups.values().any(|group| group.primary == Some(call.node));
            !same || !call.group.map_or_else(leads_any, leads)
        };
        let gone: Vec<u64> =
            process.calls.iter().filter(|(_, call)| gone(call)).map(|(number, _)| *number).collect();
        for number in gone {
            self.complete(host, process, number, Err(Code::StaleEpoch));
        }
        self.after(1, Event::Status { host, life, again: false });
    }

    fn carry_out(&mut self, host: usize, process: &mut Process, out: &mut Vec<Output>) {
        for output in std::mem::take(out) {
            match output {
                Output::Send { to, frame } => {
                    let group = process.map.groups.get(&frame.header.group);
                    if group.and_then(|group| group.member(to)).is_none() {
                        continue;
                    }
                    let answers = xsan_dataplane::shard::is_answer(frame.header.opcode);
                    let table = if answers { &process.accepted } else { &process.dialled };
                    if let Some(&connection) = table.get(&host_of(to)) {
                        self.send_on(connection, host, frame);
                    }
                }
                Output::Unsend { to, group } => {
                    if let Some(&connection) = process.dialled.get(&host_of(to)) {
                        self.unsend(connection, host, group);
                    }
                }
                Output::Complete { request, result } => match request.origin {
                    Origin::Shard(_) => {
                        self.complete(host, process, request.number, result.map(Answer::Reply));
                    }
                    Origin::Connection(connection) => {
                        let number = request.number;
                        let frame =
                            result.and_then(|reply| wire::reply_frame(self.hosts[host].pool, number, reply));
                        let frame = frame
                            .unwrap_or_else(|code| wire::failure_frame(Opcode::WriteReply, number, code));
                        self.send_on(connection, host, frame);
                    }
                },
                Output::Propose { group, epoch, node, change } => {
                    let change = match change {
                        Change::Promote => ProposedChange::Promote,
                        Change::Demote => ProposedChange::Demote,
                        Change::Exclude => ProposedChange::Exclude,
                        Change::Lead => ProposedChange::Lead,
                        Change::Settle => ProposedChange::Settle,
                        Change::Renew => ProposedChange::Renew,
                    };
                    let proposal = Proposal { group, epoch, node, change };
                    let latency = self.latency();
                    self.after(latency, Event::Proposal { host, proposal });
                }
                Output::StoreFailed(_) => {
                    self.count("store failed");
                    if !self.hosts[host].failure_allowed {
                        self.ledger.violation =
                            Some(format!("the store of host {host} failed, and no device did"));
                    }
                    self.hosts[host].failed = true;
                    let life = self.hosts[host].life;
                    self.after(1, Event::Status { host, life, again: false });
                }
                Output::StoreStopped(_) => unreachable!("no process of the simulation stops cleanly"),
            }
        }
    }

    /// The answer to a call of this process.
    fn complete(&mut self, host: usize, process: &mut Process, number: u64, result: Result<Answer, Code>) {
        let Some(call) = process.calls.remove(&number) else { return };
        match call.purpose {
            Purpose::Client(operation) => self.on_answer(operation, result),
            Purpose::Flush(flush) => {
                let Some(pending) = process.flushes.get_mut(&flush) else { return };
                if result.is_ok() {
                    pending.covered.extend(call.group);
                }
                pending.left -= 1;
                if pending.left == 0 {
                    self.end_flush(host, process, flush);
                }
            }
        }
    }

    /// Flushes every group of the pool that this process leads.
    fn start_flush(
        &mut self,
        host: usize,
        process: &mut Process,
        asker: Asker,
        pool: PoolId,
        out: &mut Vec<Output>,
    ) {
        let own = self.hosts[host].node;
        let map = process.map.clone();
        let groups: Vec<GroupId> = map.pools.get(&pool).map(Pool::groups).into_iter().flatten().collect();
        let number = process.next_call;
        process.next_call += 1;
        let mine: Vec<_> = groups
            .into_iter()
            .filter_map(|group| Some((group, map.route(group)?)))
            .filter(|(_, (node, ..))| *node == own)
            .collect();
        let mut requests = Vec::new();
        for (group, (node, _, epoch)) in mine {
            let Some(call) = process.call(Purpose::Flush(number), node, Some(group)) else { continue };
            let id = RequestId { origin: Origin::Shard(SHARD), number: call };
            let durability = Durability::OnFlush;
            requests.push(Request { id, group, epoch, durability, operation: Operation::Flush });
        }
        process.flushes.insert(number, PoolFlush { asker, left: requests.len(), covered: Vec::new() });
        if requests.is_empty() {
            return self.end_flush(host, process, number);
        }
        let now = self.hosts[host].clock(self.now).0;
        for request in requests {
            process.driver.call(now, out, |replication, stores, now, out| {
                replication.on_request(request, stores, now, out);
            });
        }
    }

    fn end_flush(&mut self, host: usize, process: &mut Process, number: u64) {
        let flush = process.flushes.remove(&number).expect("it ends once");
        match flush.asker {
            Asker::Own(call) => self.complete(host, process, call, Ok(Answer::Flushed(flush.covered))),
            Asker::Connection(connection, number) => {
                let frame = wire::flushed_frame(self.hosts[host].pool, number, &flush.covered);
                let frame =
                    frame.unwrap_or_else(|code| wire::failure_frame(Opcode::FlushReply, number, code));
                self.send_on(connection, host, frame);
            }
        }
    }

    /// Sends an operation of one group to its primary, by the map of the client's host; `None` while it has none.
    pub fn start_call(
        &mut self,
        host: usize,
        operation: u64,
        group: GroupId,
        durability: Durability,
        what: Operation,
    ) -> Option<()> {
        let own = self.hosts[host].node;
        let process = self.hosts[host].process.as_mut()?;
        let (node, _, epoch) = process.map.route(group)?;
        let number = process.call(Purpose::Client(operation), node, Some(group))?;
        let id = RequestId { origin: Origin::Shard(SHARD), number };
        let request = Request { id, group, epoch, durability, operation: what };
        let input = if node == own {
            Input::Request(request)
        } else {
            Input::Send { number, peer: host_of(node), frame: wire::request_frame(&request) }
        };
        self.input(host, input);
        Some(())
    }

    /// Asks every primary of `missing` groups to flush; returns how many were asked.
    pub fn start_flushes(
        &mut self,
        host: usize,
        operation: u64,
        pool: PoolId,
        missing: &BTreeSet<GroupId>,
    ) -> usize {
        let own = self.hosts[host].node;
        let Some(process) = self.hosts[host].process.as_mut() else { return 0 };
        let routes = missing.iter().filter_map(|group| process.map.route(*group));
        let nodes: BTreeSet<NodeId> = routes.map(|(node, ..)| node).collect();
        let mut inputs = Vec::new();
        for node in nodes {
            let Some(number) = process.call(Purpose::Client(operation), node, None) else { continue };
            inputs.push(if node == own {
                Input::Flush { number, pool }
            } else {
                let frame = wire::flush_frame(number, GroupId::new(pool, 0));
                Input::Send { number, peer: host_of(node), frame }
            });
        }
        let count = inputs.len();
        inputs.into_iter().for_each(|input| self.input(host, input));
        count
    }
}

/// What a reply tells a client.
pub fn data_of(reply: Reply) -> Option<xsan_dataplane::store::PageData> {
    match reply {
        Reply::Data(data) => data,
        Reply::Done | Reply::Status(_) => None,
    }
}
