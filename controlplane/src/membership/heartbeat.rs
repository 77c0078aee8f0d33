//! Beats over UDP: every node's control process tells all voters that it lives; the leader answers with a lease.
//!
//! Runs beside Raft on every node. Passes beats to `controller::Leader`, grants to `link::Link`. Knows neither
//! Raft nor what follows from a beat.
//!
//! Invariants
//! - A datagram of another cluster, or one that does not decode, is dropped.
//! - A beat carries the time it was sent, and a grant gives it back: a late answer makes a short lease, not a
//!   wrong one.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::net::UdpSocket;
use tokio::sync::{Notify, watch};
use tokio::time::MissedTickBehavior;
use xsan_protocol::ids::{Incarnation, MapVersion, NodeId};
use xsan_protocol::proto;
use xsan_protocol::proto::heartbeat::Body;

use crate::clock::BootTime;
use crate::controller::Leader;
use crate::lease::Beat;
use crate::link::Link;
use crate::state::ClusterState;
use crate::timing::LEASE;

/// Beats and grants are under 100 bytes; what is longer is not ours.
const DATAGRAM_BYTES_MAX: usize = 512;

/// A lease as the leader answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    pub node: NodeId,
    pub incarnation: Incarnation,
    /// Of the beat, on the clock of the node that sent it.
    pub sent: BootTime,
    pub length: Duration,
    /// The lease counts once the data process acts on this map.
    pub map_version: MapVersion,
}

impl Grant {
    /// The answer to `beat` of a leader whose applied state is at `map_version`.
    pub const fn answer(
        beat: &Beat,
        incarnation: Incarnation,
        length: Duration,
        map_version: MapVersion,
    ) -> Self {
        Self { node: beat.node, incarnation, sent: beat.sent, length, map_version }
    }
}

pub fn encode_beat(cluster: u64, beat: &Beat) -> Vec<u8> {
    let beat = proto::Beat {
        node: beat.node.0,
        incarnation: beat.incarnation.map_or(0, |incarnation| incarnation.0),
        stopped: beat.stopped.map_or(0, |incarnation| incarnation.0),
        sent_boottime_ns: beat.sent.0,
        map_version: beat.map_version.0,
        heard_boottime_ns: beat.heard.0,
    };
    proto::Heartbeat { cluster, body: Some(Body::Beat(beat)) }.encode_to_vec()
}

pub fn encode_grant(cluster: u64, grant: &Grant) -> Vec<u8> {
    let grant = proto::Grant {
        node: grant.node.0,
        incarnation: grant.incarnation.0,
        sent_boottime_ns: grant.sent.0,
        lease_ms: u32::try_from(grant.length.as_millis()).expect("a lease is seconds"),
        map_version: grant.map_version.0,
    };
    proto::Heartbeat { cluster, body: Some(Body::Grant(grant)) }.encode_to_vec()
}

/// The answer to a beat of a node that was removed from the cluster.
pub fn encode_removed(cluster: u64, node: NodeId) -> Vec<u8> {
    let removed = proto::Removed { node: node.0 };
    proto::Heartbeat { cluster, body: Some(Body::Removed(removed)) }.encode_to_vec()
}

/// A datagram's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datagram {
    Beat(Beat),
    Grant(Grant),
    /// The cluster has removed this node.
    Removed(NodeId),
}

/// `None`: not of this cluster, or not ours at all.
pub fn decode(cluster: u64, bytes: &[u8]) -> Option<Datagram> {
    let message = proto::Heartbeat::decode(bytes).ok().filter(|message| message.cluster == cluster)?;
    let incarnation = |number: u64| (number != 0).then_some(Incarnation(number));
    Some(match message.body? {
        Body::Beat(beat) => Datagram::Beat(Beat {
            node: NodeId(beat.node),
            incarnation: incarnation(beat.incarnation),
            stopped: incarnation(beat.stopped),
            sent: BootTime(beat.sent_boottime_ns),
            map_version: MapVersion(beat.map_version),
            heard: BootTime(beat.heard_boottime_ns),
        }),
        Body::Grant(grant) => Datagram::Grant(Grant {
            node: NodeId(grant.node),
            incarnation: Incarnation(grant.incarnation),
            sent: BootTime(grant.sent_boottime_ns),
            // A grant can only be shorter than what the leader counts on.
            length: Duration::from_millis(u64::from(grant.lease_ms)).min(LEASE),
            map_version: MapVersion(grant.map_version),
        }),
        Body::Removed(removed) => Datagram::Removed(NodeId(removed.node)),
    })
}

/// What the tasks share.
#[derive(Clone)]
pub struct Heartbeats {
    pub socket: Arc<UdpSocket>,
    pub cluster: u64,
    pub node: NodeId,
    pub interval: Duration,
    pub state: watch::Receiver<Arc<ClusterState>>,
    pub link: Arc<Link>,
    pub leader: Arc<Leader>,
    /// Told when the cluster has removed this node.
    pub removed: Arc<Notify>,
}

impl Heartbeats {
    /// Sends beats, at intervals and at once when the data process comes or goes. Runs for ever.
    pub async fn send(self) {
        let mut ticks = tokio::time::interval(self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.link.changed() => {}
            }
            self.beat().await;
        }
    }

    /// Tells all voters how the data process is. A stopping node does so a last time: nobody is to wait for the lease of a
    /// data process that ended just before.
    pub async fn beat(&self) {
        let bytes = encode_beat(self.cluster, &self.link.beat(self.node, BootTime::now()));
        for address in self.voters() {
            self.send_to(&bytes, address).await;
        }
    }

    /// Receives beats and grants. Runs for ever.
    pub async fn receive(self) {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        loop {
            let (length, from) = match self.socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    // An ICMP error of an earlier send; nothing is wrong with the socket.
                    tracing::debug!("heartbeat socket: {error}");
                    continue;
                }
            };
            let now = BootTime::now();
            match decode(self.cluster, &buffer[..length]) {
                Some(Datagram::Beat(beat)) => {
                    if self.leader.has_removed(beat.node) {
                        self.send_to(&encode_removed(self.cluster, beat.node), from).await;
                    } else if let Some(grant) = self.leader.on_beat(now, beat, from) {
                        self.send_to(&encode_grant(self.cluster, &grant), from).await;
                    }
                }
                Some(Datagram::Grant(grant)) if grant.node == self.node => self.link.on_grant(now, &grant),
                Some(Datagram::Removed(node)) if node == self.node => self.removed.notify_one(),
                Some(Datagram::Grant(_) | Datagram::Removed(_)) | None => {}
            }
        }
    }

    /// Answers the beats that came just before this node was elected. Runs for ever.
    pub async fn catch_up(self) {
        let mut elected = self.leader.watch_elected();
        while elected.changed().await.is_ok() {
            for (grant, to) in self.leader.grant_latest(BootTime::now()) {
                self.send_to(&encode_grant(self.cluster, &grant), to).await;
            }
        }
    }

    async fn send_to(&self, bytes: &[u8], address: SocketAddr) {
        if let Err(error) = self.socket.send_to(bytes, address).await {
            tracing::debug!("heartbeat to {address}: {error}");
        }
    }

    fn voters(&self) -> BTreeSet<SocketAddr> {
        let state = self.state.borrow();
        let voters = state.map().nodes.values().filter(|node| node.voter);
        voters.map(|node| SocketAddr::new(node.address, node.control_port)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_survive_and_other_clusters_are_dropped() {
        let beat = Beat {
            node: NodeId(3),
            incarnation: Some(Incarnation(4)),
            stopped: None,
            sent: BootTime(5),
            map_version: MapVersion(6),
            heard: BootTime(4),
        };
        let bytes = encode_beat(7, &beat);
        assert_eq!(decode(7, &bytes), Some(Datagram::Beat(beat)));
        assert_eq!(decode(8, &bytes), None);
        assert_eq!(decode(7, &bytes[1..]), None);
        assert_eq!(decode(7, &encode_removed(7, NodeId(3))), Some(Datagram::Removed(NodeId(3))));
        let grant = Grant::answer(&beat, Incarnation(4), LEASE, MapVersion(9));
        assert_eq!(decode(7, &encode_grant(7, &grant)), Some(Datagram::Grant(grant)));
    }
}
