//! Connections of a shard: dialled ones to the shards of other nodes, accepted ones from them and from clients.
//!
//! Requests go out on the connection that this side dialled, answers return on the one that brought the
//! request: so the frames of one group to one member stay in order on one connection.
//! Knows frames and nodes; no group and no request.
//!
//! Invariants
//! - Of one sender (client id) only the newest session is kept: an older connection is closed when a newer
//!   session says hello, and its queued frames are dropped with it.
//! - To one peer there is at most one dialled connection, the one of the newest life that the map names.

use std::cell::Cell;
use std::collections::HashMap;

use xsan_protocol::ids::{GroupId, NodeId, ShardIndex};
use xsan_protocol::wire::header::Opcode;
use xsan_protocol::wire::session::Hello;

use crate::net::connection::Outbox;
use crate::net::frame::Frame;
use crate::replication::is_content;

/// Numbers a shard's connections; never reused in a process's life.
pub type ConnectionId = u64;

/// One shard of one node.
pub type PeerShard = (NodeId, ShardIndex);

pub struct Connection {
    pub outbox: Outbox,
    /// Who is at the other end; node 0 is a client.
    pub peer: PeerShard,
    dialled: bool,
    client_id: u64,
    session: u64,
}

#[derive(Default)]
pub struct Peers {
    connections: HashMap<ConnectionId, Connection>,
    dialled: HashMap<PeerShard, ConnectionId>,
    accepted: HashMap<PeerShard, ConnectionId>,
    /// Newest session of each sender, kept after its connection closed.
    sessions: HashMap<u64, (u64, Option<ConnectionId>)>,
    /// Connections with frames that were queued in this turn.
    dirty: Vec<ConnectionId>,
}

/// What came of a connection that was dialled.
#[derive(Debug, PartialEq, Eq)]
pub enum Dialled {
    Kept,
    /// Kept; this one was there before and is closed.
    Replaces(Closed),
    /// It leads to an older life of the peer: it is closed.
    Unwanted,
}

/// What came of an accepted hello.
pub enum Accepted {
    Kept,
    /// Kept; this older connection of the same sender is fenced.
    Replaces(ConnectionId),
    /// A newer session of the sender was seen: this one is to be closed.
    Outdated(Outbox),
}

impl Peers {
    /// Registers a connection that this side made, if it is still `wanted`; what it replaces is closed.
    ///
    /// Without the last look at `wanted`: (1) a life of the peer answers its hello late; (2) the map names the next
    /// life, which is dialled and registered; (3) the late connection takes its place; (4) it ends, and no frame
    /// reaches the peer until the living connection breaks, too.
    pub fn add_dialled(
        &mut self,
        id: ConnectionId,
        peer: PeerShard,
        outbox: Outbox,
        wanted: &Cell<bool>,
    ) -> Dialled {
        if !wanted.get() {
            outbox.close();
            return Dialled::Unwanted;
        }
        let older = self.dialled.get(&peer).copied().and_then(|older| self.remove(older));
        let connection = Connection { outbox, peer, dialled: true, client_id: 0, session: 0 };
        self.connections.insert(id, connection);
        self.dialled.insert(peer, id);
        older.map_or(Dialled::Kept, Dialled::Replaces)
    }

    pub fn add_accepted(&mut self, id: ConnectionId, hello: &Hello, outbox: Outbox) -> Accepted {
        let newest = self.sessions.entry(hello.client_id).or_insert((0, None));
        if hello.session < newest.0 {
            return Accepted::Outdated(outbox);
        }
        let older = std::mem::replace(newest, (hello.session, Some(id))).1;
        let peer = (hello.node, hello.shard);
        let (client_id, session) = (hello.client_id, hello.session);
        self.connections.insert(id, Connection { outbox, peer, dialled: false, client_id, session });
        if hello.node != NodeId(0) {
            self.accepted.insert(peer, id);
        }
        older.map_or(Accepted::Kept, Accepted::Replaces)
    }

    /// Forgets a connection; tells what it was.
    pub fn remove(&mut self, id: ConnectionId) -> Option<Closed> {
        let connection = self.connections.remove(&id)?;
        connection.outbox.close();
        let table = if connection.dialled { &mut self.dialled } else { &mut self.accepted };
        if table.get(&connection.peer) == Some(&id) {
            table.remove(&connection.peer);
        }
        if !connection.dialled
            && let Some(newest) = self.sessions.get_mut(&connection.client_id)
            && *newest == (connection.session, Some(id))
        {
            newest.1 = None;
        }
        Some(Closed { id, peer: connection.peer, dialled: connection.dialled })
    }

    pub fn peer_of(&self, id: ConnectionId) -> Option<PeerShard> {
        Some(self.connections.get(&id)?.peer)
    }

    /// Ends the dialled connection to `peer`, if there is one: it leads to an older life of it.
    pub fn close_dialled(&mut self, peer: PeerShard) {
        if let Some(connection) = self.dialled.get(&peer).and_then(|id| self.connections.get(id)) {
            connection.outbox.close();
        }
    }

    /// Queues a frame for `peer`; `false` when no connection is there: the frame is lost, as on a
    /// broken connection.
    pub fn send(&mut self, peer: PeerShard, frame: Frame) -> bool {
        let table = if is_answer(frame.header.opcode) { &self.accepted } else { &self.dialled };
        match table.get(&peer) {
            Some(&id) => self.send_on(id, frame),
            None => false,
        }
    }

    /// Drops content of `group` that is queued for `node` and that no socket has taken.
    pub fn unsend(&self, node: NodeId, group: GroupId) {
        let of_node = self.dialled.iter().filter(|((peer, _), _)| *peer == node);
        for connection in of_node.filter_map(|(_, id)| self.connections.get(id)) {
            connection.outbox.discard(|header| header.group == group && is_content(header.opcode));
        }
    }

    /// Queues a frame on one connection.
    pub fn send_on(&mut self, id: ConnectionId, frame: Frame) -> bool {
        let Some(connection) = self.connections.get(&id) else { return false };
        connection.outbox.push(frame);
        if self.dirty.last() != Some(&id) {
            self.dirty.push(id);
        }
        true
    }

    /// Starts sending what this turn queued: one wake for each connection.
    pub fn flush(&mut self) {
        for id in self.dirty.drain(..) {
            if let Some(connection) = self.connections.get(&id) {
                connection.outbox.wake();
            }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Closed {
    pub id: ConnectionId,
    pub peer: PeerShard,
    pub dialled: bool,
}

/// Does a frame of `opcode` answer one that came on an accepted connection?
pub const fn is_answer(opcode: Opcode) -> bool {
    matches!(
        opcode,
        Opcode::AppendOk
            | Opcode::PeerInfo
            | Opcode::FetchReply
            | Opcode::MemberFlushReply
            | Opcode::LearnStartReply
            | Opcode::CompareReply
            | Opcode::PushReply
            | Opcode::FetchPagesReply
            | Opcode::CheckReply
    )
}

#[cfg(test)]
mod tests {
    use xsan_protocol::wire::header::Header;

    use super::*;

    #[test]
    fn only_content_of_the_group_is_not_sent() {
        let (mut peers, near, far) =
            (Peers::default(), (NodeId(2), ShardIndex(0)), (NodeId(3), ShardIndex(1)));
        let outboxes = [near, far].map(|peer| {
            let outbox = Outbox::default();
            peers.add_dialled(u64::from(peer.0.0), peer, outbox.clone(), &Cell::new(true));
            outbox
        });
        for opcode in [Opcode::Append, Opcode::Write, Opcode::Push, Opcode::Peer, Opcode::FetchPages] {
            for (peer, group) in [(near, 7), (near, 8), (far, 7)] {
                let mut header = Header::new(opcode);
                header.group = GroupId(group);
                assert!(peers.send(peer, Frame::new(header)));
            }
        }
        peers.unsend(NodeId(2), GroupId(7));
        let left = |outbox: &Outbox, group: u32| {
            let opcodes = std::cell::RefCell::new(Vec::new());
            outbox.discard(|header| {
                if header.group == GroupId(group) {
                    opcodes.borrow_mut().push(header.opcode);
                }
                false
            });
            opcodes.into_inner()
        };
        assert_eq!(left(&outboxes[0], 7), [Opcode::Write, Opcode::Peer, Opcode::FetchPages]);
        assert_eq!(left(&outboxes[0], 8).len(), 5);
        assert_eq!(left(&outboxes[1], 7).len(), 5);
    }

    fn sends(peers: &mut Peers, peer: PeerShard) -> bool {
        peers.send(peer, Frame::new(Header::new(Opcode::Append)))
    }

    /// A connection to a life of the peer that is gone took the place of the living one, and left it empty when it
    /// ended. Found by reading.
    #[test]
    fn a_late_connection_to_an_older_life_leaves_the_living_one_alone() {
        let (mut peers, peer) = (Peers::default(), (NodeId(2), ShardIndex(0)));
        let (older, newer) = (Outbox::default(), Outbox::default());
        assert_eq!(peers.add_dialled(2, peer, newer, &Cell::new(true)), Dialled::Kept);
        assert_eq!(peers.add_dialled(1, peer, older, &Cell::new(false)), Dialled::Unwanted);
        assert_eq!(peers.remove(1), None);
        assert!(sends(&mut peers, peer));
        assert_eq!(peers.remove(2), Some(Closed { id: 2, peer, dialled: true }));
        assert!(!sends(&mut peers, peer));
    }

    #[test]
    fn a_connection_that_is_replaced_is_closed_and_its_end_takes_nothing_with_it() {
        let (mut peers, peer) = (Peers::default(), (NodeId(2), ShardIndex(0)));
        let (older, newer) = (Outbox::default(), Outbox::default());
        assert_eq!(peers.add_dialled(1, peer, older.clone(), &Cell::new(true)), Dialled::Kept);
        let closed = Closed { id: 1, peer, dialled: true };
        assert_eq!(peers.add_dialled(2, peer, newer, &Cell::new(true)), Dialled::Replaces(closed));
        assert!(older.is_closed());
        assert_eq!(peers.remove(1), None, "nothing follows when it ends");
        assert!(sends(&mut peers, peer));
    }
}
