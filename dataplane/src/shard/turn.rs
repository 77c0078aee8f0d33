//! The turn: events in, actions out. See `shard` for what a turn is.

use std::io;

use super::control::Outcome;
use super::peers::{Accepted, Closed, Dialled};
use super::*;
use crate::io::{DeviceRole, DiskOk};
use crate::stats::{Counter, Stage};

impl Shard {
    /// Runs one turn over `events`.
    pub(super) fn turn(&mut self, events: &mut VecDeque<Event>) {
        self.stats.borrow_mut().add(Counter::Turns, 1);
        self.driver.replication.on_lease(self.lease_until_ns.load(Ordering::Acquire));
        for event in events.drain(..) {
            self.on_event(event);
        }
        self.run_stores();
        self.submit();
        self.send_proposals();
        self.peers.flush();
        self.mesh.borrow_mut().flush();
    }

    fn on_event(&mut self, event: Event) {
        // A call that ended since it was queued (a connection broke, a map came) is tried again by its starter: its
        // first copy must not be on the way beside.
        if call_of(&event).is_some_and(|number| !self.calls.is_waiting(number)) {
            return;
        }
        match event {
            Event::Frames { connection, frames } => {
                for frame in frames {
                    self.on_frame(connection, frame);
                }
            }
            Event::Accepted { connection, hello, outbox } => self.on_accepted(connection, &hello, outbox),
            Event::Dialled { connection, peer, outbox, wanted } => {
                self.on_dialled(connection, peer, outbox, &wanted);
            }
            Event::Closed(connection) => self.on_closed(connection),
            Event::Request(request) => self.on_request(*request),
            Event::Send { number, peer, frame } => {
                if !self.peers.send(peer, frame) {
                    self.calls.complete(number, Err(Code::GroupInactive));
                }
            }
            Event::Tell(shard, message) => self.tell(shard, message),
            Event::Message(from, message) => self.on_message(from, message),
            Event::Flushed { asker, number, groups } => self.on_flushed(asker, number, groups),
            Event::Link(event) => {
                let outcome = self.control.as_mut().map(|control| control.on_link(event));
                self.on_outcome(outcome);
            }
            Event::Status => {
                let outcome = self.control.as_mut().map(Control::ask_status);
                self.on_outcome(outcome);
            }
            Event::Wake => {}
            Event::Tick => {
                let now_ns = os::boottime_ns();
                self.devices.values_mut().for_each(|devices| devices.writes.on_tick(now_ns));
                let mut outputs = std::mem::take(&mut self.scratch.outputs);
                self.driver.on_tick(now_ns, &mut outputs);
                self.carry_out(outputs);
            }
        }
    }

    /// Calls into replication, and carries out what comes out of it.
    fn replicate(&mut self, call: impl FnOnce(&mut Replication, &StoreTable, u64, &mut Vec<Action>)) {
        let mut outputs = std::mem::take(&mut self.scratch.outputs);
        self.driver.call(os::boottime_ns(), &mut outputs, call);
        self.carry_out(outputs);
    }

    fn carry_out(&mut self, mut outputs: Vec<Output>) {
        for output in outputs.drain(..) {
            match output {
                Output::Send { to, frame } => self.send(to, frame),
                Output::Unsend { to, group } => self.peers.unsend(to, group),
                Output::Complete { request, result } => self.complete(request, result),
                Output::Propose { group, epoch, node, change } => {
                    let change = match change {
                        Change::Promote => proto::group_proposal::Change::Promote,
                        Change::Demote => proto::group_proposal::Change::Demote,
                        Change::Exclude => proto::group_proposal::Change::Exclude,
                        Change::Lead => proto::group_proposal::Change::Lead,
                        Change::Settle => proto::group_proposal::Change::Settle,
                        Change::Renew => proto::group_proposal::Change::Renew,
                    };
                    self.scratch.proposals.push(proto::GroupProposal {
                        group: group.0,
                        epoch: epoch.0,
                        node: node.0,
                        change: change as i32,
                    });
                }
                Output::StoreFailed(store) => {
                    tracing::error!(%store, code = %Code::StoreFailed, "the device failed; its groups fail over");
                    self.tell(ShardIndex(0), Message::StatusDue);
                    self.note_failure(store);
                }
                Output::StoreStopped(_) => {
                    self.stopping = self.stopping.map(|left| left - 1);
                    self.maybe_stopped();
                }
            }
        }
        self.scratch.outputs = outputs;
    }

    /// Keeps in mind that a store failed, whatever becomes of this process.
    fn note_failure(&mut self, store: StoreId) {
        let problem = format!("the failure of store {store} can not be noted");
        let thread = self.in_data_directory(problem, move |failures| failures.note(store));
        self.notes.extend(thread);
    }

    /// Does something with what failed, on a thread of its own: the directory may be on a device that hangs.
    fn in_data_directory(
        &self,
        problem: String,
        work: impl FnOnce(&Failures) -> io::Result<()> + Send + 'static,
    ) -> Option<JoinHandle<()>> {
        let failures = self.failures.clone();
        let without_thread = format!("no thread can be had for the data directory: {problem}");
        let work = move || {
            if let Err(error) = work(&failures) {
                tracing::error!(%error, "the data directory: {problem}");
            }
        };
        let thread = std::thread::Builder::new().name("data-dir".to_owned()).spawn(work);
        thread.inspect_err(|error| tracing::error!(%error, "{without_thread}")).ok()
    }

    /// The cluster has taken this life of the process in, and knows what failed in earlier ones.
    fn forget_failures(&mut self) {
        let own = self.map.nodes.get(&self.identity.node).and_then(|node| node.data.as_ref());
        let Some(own) = own.filter(|data| data.incarnation == self.identity.incarnation) else { return };
        let told = own.stores.iter().filter(|store| store.failed_before).map(|store| store.id).collect();
        self.tells_failures = false;
        let problem = "what failed in earlier lives can not be removed".to_owned();
        self.in_data_directory(problem, move |failures| failures.forget_earlier(&told));
    }

    /// Feeds the ring's completions to the stores.
    fn run_stores(&mut self) {
        let mut completions = std::mem::take(&mut self.scratch.completions);
        self.ring.completions(&mut completions);
        for Completed { slot, took_ns, completion } in completions.drain(..) {
            let of_slot = self.devices.iter_mut().find(|(_, devices)| devices.has_slot(slot));
            let (store, devices) = of_slot.expect("the ring has only slots of this shard's stores");
            let stage = match &completion.result {
                Ok(DiskOk::Read(_)) => Some(Stage::DeviceRead),
                Ok(DiskOk::Written) => Some(Stage::DeviceWrite),
                Ok(DiskOk::Flushed) => Some(Stage::DeviceFlush),
                Err(_) => None,
            };
            if let Some(stage) = stage {
                self.stats.borrow_mut().record(stage, took_ns);
            }
            if stage == Some(Stage::DeviceWrite) && slot == devices.journal_slot() {
                devices.writes.record(took_ns);
            }
            self.driver.on_disk(*store, completion);
        }
        self.scratch.completions = completions;
    }

    /// Ends the state machines' turn: the stores' operations of the whole turn, in one submission.
    fn submit(&mut self) {
        let mut operations = std::mem::take(&mut self.scratch.operations);
        let mut outputs = std::mem::take(&mut self.scratch.outputs);
        self.driver.end_turn(os::boottime_ns(), &mut operations, &mut outputs);
        for (store, operation) in operations.drain(..) {
            let devices = &self.devices[&store];
            let slot = match (operation.device(), devices.cache_slot) {
                (DeviceRole::Cache, Some(slot)) => slot,
                _ => devices.capacity_slot,
            };
            self.ring.submit(slot, operation);
        }
        self.scratch.operations = operations;
        self.carry_out(outputs);
        // A ring that takes nothing more is the end of this process, whose replicas elsewhere go on.
        self.ring.flush_submissions().unwrap_or_else(|error| panic!("{error}"));
    }

    /// Begins a clean stop: what the stores hold is flushed, then the main thread ends the process.
    fn shut_down(&mut self) {
        tracing::info!(shard = %self.identity.shard, calls = self.calls.count(), "the shard stops");
        self.stopping = Some(self.devices.len());
        let mut outputs = std::mem::take(&mut self.scratch.outputs);
        self.driver.stop(&mut outputs);
        self.carry_out(outputs);
        self.maybe_stopped();
    }

    fn maybe_stopped(&mut self) {
        if self.stopping == Some(0) {
            // The next life must know what failed in this one. The main thread does not wait for ever.
            self.notes.drain(..).for_each(|note| drop(note.join()));
            // The main thread may have given up waiting: then the process ends anyway.
            let _ = self.stopped.send(self.identity.shard);
        }
    }

    /// Sends a replication frame to the shard of `to` that holds its replica of the frame's group.
    fn send(&mut self, to: NodeId, frame: Frame) {
        let group = self.map.groups.get(&frame.header.group);
        let member = group.and_then(|group| group.member(to));
        let shard = member.and_then(|member| self.map.nodes.get(&to)?.shard_of(member.store));
        // Without a member or a connection the frame is lost, as on a connection that breaks: replication sends again.
        if let Some(shard) = shard {
            self.peers.send((to, shard), frame);
        }
    }

    fn on_frame(&mut self, connection: ConnectionId, frame: Frame) {
        // A fenced or closed connection's frames are not carried out.
        let Some(peer) = self.peers.peer_of(connection) else { return };
        let opcode = frame.header.opcode;
        match opcode {
            Opcode::Ping => {
                let mut header = frame.header;
                header.opcode = Opcode::Pong;
                self.peers.send_on(connection, Frame::new(header));
            }
            Opcode::Hello | Opcode::Pong | Opcode::Link => {}
            Opcode::ReadReply | Opcode::WriteReply | Opcode::FlushReply | Opcode::BlockStatusReply => {
                let number = frame.header.request_id;
                self.calls.complete(number, wire::frame_answer(frame));
            }
            Opcode::Flush => self.start_flush(
                Asker::Connection(connection),
                frame.header.request_id,
                frame.header.group.pool(),
            ),
            Opcode::Read | Opcode::Write | Opcode::WriteZeroes | Opcode::Trim | Opcode::BlockStatus => {
                let number = frame.header.request_id;
                if let Some(code) = frame.header.status {
                    // Its data found no buffer.
                    self.peers
                        .send_on(connection, wire::failure_frame(wire::answer_opcode(opcode), number, code));
                    return;
                }
                match wire::frame_request(RequestId { origin: Origin::Connection(connection), number }, frame)
                {
                    Ok(request) => self.on_request(request),
                    Err(code) => {
                        let frame = wire::failure_frame(wire::answer_opcode(opcode), number, code);
                        self.peers.send_on(connection, frame);
                    }
                }
            }
            _ if peer.0 == NodeId(0) => {
                tracing::warn!(
                    connection,
                    ?opcode,
                    "a client sent a frame that only nodes may send; it is ignored"
                );
            }
            _ => self.replicate(|replication, stores, now, out| {
                replication.on_frame(peer.0, frame, stores, now, out)
            }),
        }
    }

    fn on_request(&mut self, request: Request) {
        self.replicate(|replication, stores, now, out| replication.on_request(request, stores, now, out));
    }

    /// Has every group of the pool that this shard leads flushed; a task waits for them.
    fn start_flush(&mut self, asker: Asker, number: u64, pool: PoolId) {
        let (client, handle) = (self.client.clone(), self.handle.clone());
        let own = (self.identity.node, self.identity.shard);
        monoio::spawn(async move {
            let groups = client.flush_own(pool, own).await;
            handle.push(Event::Flushed { asker, number, groups });
        });
    }

    fn on_flushed(&mut self, asker: Asker, number: u64, groups: Vec<GroupId>) {
        match asker {
            Asker::Shard(shard) => self.tell(shard, Message::Flushed { number, groups }),
            Asker::Connection(connection) => {
                let frame = wire::flushed_frame(self.buffers, number, &groups)
                    .unwrap_or_else(|code| wire::failure_frame(Opcode::FlushReply, number, code));
                self.peers.send_on(connection, frame);
            }
        }
    }

    /// Answers a request to where it came from; an origin that is gone gets nothing.
    fn complete(&mut self, request: RequestId, result: Result<Reply, Code>) {
        let number = request.number;
        match request.origin {
            // Without the queue: a gateway of this shard waits for nothing else.
            Origin::Shard(shard) if shard == self.identity.shard => {
                self.calls.complete(number, result.map(Answer::Reply));
            }
            Origin::Shard(shard) => self.tell(shard, Message::Reply { number, result }),
            Origin::Connection(connection) => {
                let frame = result
                    .and_then(|reply| wire::reply_frame(self.buffers, number, reply))
                    .unwrap_or_else(|code| wire::failure_frame(Opcode::WriteReply, number, code));
                self.peers.send_on(connection, frame);
            }
        }
    }

    fn on_dialled(&mut self, connection: ConnectionId, peer: PeerShard, outbox: Outbox, wanted: &Cell<bool>) {
        match self.peers.add_dialled(connection, peer, outbox, wanted) {
            Dialled::Unwanted => return,
            Dialled::Replaces(older) => self.on_lost(older),
            Dialled::Kept => {}
        }
        self.replicate(|replication, stores, now, out| replication.on_peer_up(peer.0, stores, now, out));
    }

    fn on_accepted(&mut self, connection: ConnectionId, hello: &Hello, outbox: Outbox) {
        match self.peers.add_accepted(connection, hello, outbox) {
            Accepted::Kept => {}
            Accepted::Replaces(older) => self.on_closed(older),
            Accepted::Outdated(outbox) => {
                outbox.close();
                tracing::warn!(
                    connection,
                    client = hello.client_id,
                    session = hello.session,
                    "an outdated session is refused"
                );
            }
        }
    }

    fn on_closed(&mut self, connection: ConnectionId) {
        if let Some(closed) = self.peers.remove(connection) {
            self.on_lost(closed);
        }
    }

    /// A connection that was served is not any more.
    fn on_lost(&mut self, closed: Closed) {
        self.driver.replication.on_origin_gone(Origin::Connection(closed.id));
        if closed.dialled {
            let (node, shard) = closed.peer;
            let map = self.map.clone();
            self.calls.fail_where(Code::GroupInactive, |destination| {
                let there = |group| map.route(group).is_some_and(|(_, owner, _)| owner == shard);
                destination.node == node && destination.group.is_none_or(there)
            });
            // Where the map does not tell the shard of a replica, it may be any.
            let holds = |group| {
                let store =
                    map.groups.get(&group).and_then(|group| group.member(node)).map(|member| member.store);
                let owner = store.and_then(|store| map.nodes.get(&node)?.shard_of(store));
                owner.is_none_or(|owner| owner == shard)
            };
            self.replicate(|replication, stores, now, out| {
                replication.on_peer_lost(node, &holds, stores, now, out);
            });
        }
    }

    fn on_map(&mut self, map: Arc<ClusterMap>) {
        if map.version <= self.map.version {
            return;
        }
        self.map = map.clone();
        *self.handle.0.map.borrow_mut() = map.clone();
        self.dial_peers(&map);
        self.replicate(|replication, stores, now, out| replication.on_map(&map, stores, now, out));
        self.calls.on_map(&map);
        if self.tells_failures {
            self.forget_failures();
        }
        // The control plane counts on hearing at once that the map is acted on.
        self.tell(ShardIndex(0), Message::StatusDue);
    }

    fn on_message(&mut self, from: ShardIndex, message: Message) {
        match message {
            Message::Request(request) => self.on_request(*request),
            Message::Reply { number, result } => self.calls.complete(number, result.map(Answer::Reply)),
            Message::Flush { number, pool } => self.start_flush(Asker::Shard(from), number, pool),
            Message::Flushed { number, groups } => self.calls.complete(number, Ok(Answer::Flushed(groups))),
            Message::Map(map) => self.on_map(map),
            Message::Ask { number, question } => {
                let report = Box::new(self.answer(question));
                self.tell(from, Message::Report { number, report });
            }
            Message::Opened { number, result } => {
                port::on_opened(&self.handle, &self.opens, number, result);
            }
            Message::Scrub { bytes_per_second, orders } => {
                self.replicate(|replication, stores, now, out| {
                    replication.set_scrubs(bytes_per_second, orders.to_vec(), stores, now, out)
                });
            }
            Message::Sweep { number, volume } => {
                let (gateway, handle) = (self.gateway.clone(), self.handle.clone());
                monoio::spawn(async move {
                    gateway.sweep(volume).await;
                    handle.push(Event::Tell(ShardIndex(0), Message::Swept(number)));
                });
            }
            Message::CloseGateways => self.gateway.stop(),
            Message::Shutdown => self.shut_down(),
            Message::StatusDue
            | Message::Open { .. }
            | Message::Close(_)
            | Message::Swept(_)
            | Message::Propose(_)
            | Message::Report { .. } => {
                let control = self.control.as_mut().expect("these are sent to shard 0 alone");
                let outcome = control.on_message(from, message);
                self.on_outcome(Some(outcome));
            }
        }
    }

    fn on_outcome(&mut self, outcome: Option<Outcome>) {
        let shards = || (0..self.identity.shard_count).map(ShardIndex);
        match outcome {
            None | Some(Outcome::Nothing) => {}
            Some(Outcome::Ask { number, question }) => {
                shards().for_each(|shard| self.tell(shard, Message::Ask { number, question }));
            }
            Some(Outcome::Map(map)) => {
                shards().for_each(|shard| self.tell(shard, Message::Map(map.clone())));
            }
            Some(Outcome::Scrub { bytes_per_second, orders }) => shards().for_each(|shard| {
                self.tell(shard, Message::Scrub { bytes_per_second, orders: orders.clone() });
            }),
            Some(Outcome::Tell(messages)) => {
                messages.into_iter().for_each(|(shard, message)| self.tell(shard, message));
            }
        }
    }

    /// To another shard through the mesh; to this one through its own queue.
    fn tell(&self, shard: ShardIndex, message: Message) {
        if shard == self.identity.shard {
            self.handle.push(Event::Message(shard, message));
        } else {
            self.mesh.borrow_mut().send(shard, message);
        }
    }

    fn send_proposals(&mut self) {
        if !self.scratch.proposals.is_empty() {
            let proposals = std::mem::take(&mut self.scratch.proposals);
            self.tell(ShardIndex(0), Message::Propose(proposals));
        }
    }
}

/// The call of this shard's gateways that the event is to send.
fn call_of(event: &Event) -> Option<u64> {
    match event {
        Event::Request(request) => Some(request.id.number),
        Event::Send { number, .. } | Event::Tell(_, Message::Flush { number, .. }) => Some(*number),
        Event::Tell(_, Message::Request(request)) => Some(request.id.number),
        _ => None,
    }
}
