//! Leases as the Raft leader keeps them: whom it granted one, until when, and who is surely not serving.
//!
//! Driven by `membership::heartbeat` (beats) and `controller` (what follows from them); one table per term of
//! leadership. Knows no socket and reads no clock.
//!
//! Invariants
//! - A node is `Gone` only when no lease of its present incarnation can still run, on any clock, or its death
//!   was reported by its own host.
//! - While a decision that rests on a node being `Gone` is on its way into Raft's log, that node is granted
//!   nothing: see `hold`.
//!
//! Source: see `timing`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use xsan_protocol::ids::{Incarnation, MapVersion, NodeId};
use xsan_protocol::mutation::Mutation;

use crate::clock::BootTime;
use crate::timing::{DEAF_AFTER, LEASE, LEASE_SLACK};

/// What a node says of itself in a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    pub node: NodeId,
    /// Of the data process that is linked and answers; `None`: no lease is asked for.
    pub incarnation: Option<Incarnation>,
    /// The newest incarnation that its host knows to be dead.
    pub stopped: Option<Incarnation>,
    /// The sender's clock, given back with the grant.
    pub sent: BootTime,
    /// The map that every shard of the data process acts on.
    pub map_version: MapVersion,
    /// When the newest beat was sent whose answer arrived, on the sender's clock; 0: it does not say.
    pub heard: BootTime,
}

/// Whether a node's data process may be serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It has a lease from this leader.
    Up,
    /// Not heard of yet; it may have a lease from an earlier leader.
    Assumed,
    /// It surely serves nothing.
    Gone,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    incarnation: Option<Incarnation>,
    /// On the leader's clock, with slack: when the newest lease has surely ended.
    until: BootTime,
    confirmed: MapVersion,
    stopped: Option<Incarnation>,
    heard: BootTime,
    /// As the newest beat had it: a change says that an answer arrived.
    answer_heard: BootTime,
    /// When the oldest lease was granted of those that no beat says have arrived.
    unheard_since: Option<BootTime>,
}

#[derive(Debug)]
pub struct LeaseTable {
    /// Until then an earlier leader's leases may run.
    grace_until: BootTime,
    nodes: BTreeMap<NodeId, Entry>,
    held: BTreeSet<NodeId>,
}

impl LeaseTable {
    /// A table of a leader that found itself elected at `since`.
    pub fn new(since: BootTime, grace: Duration) -> Self {
        Self { grace_until: since + grace, nodes: BTreeMap::new(), held: BTreeSet::new() }
    }

    /// Takes a beat in. Returns the length of the lease to answer with; `None`: no answer. A node that is heard and
    /// hears nothing is granted none, or its groups would stand still with it for as long as it is deaf: an answer of
    /// length zero is to find out when it hears again.
    ///
    /// - `registered`: the incarnation of the node's data process in the cluster's state.
    /// - `may_grant`: a quorum acknowledged this leader lately, and all that was committed before it is applied.
    pub fn on_beat(
        &mut self,
        now: BootTime,
        beat: &Beat,
        registered: Option<Incarnation>,
        may_grant: bool,
    ) -> Option<Duration> {
        let fresh = Entry {
            incarnation: None,
            until: BootTime(0),
            confirmed: MapVersion(0),
            stopped: None,
            heard: now,
            answer_heard: beat.heard,
            unheard_since: None,
        };
        let entry = self.nodes.entry(beat.node).or_insert(fresh);
        // Not "newer": the clock of a host that was started again begins anew. Who was silent need not be deaf.
        let hears = beat.heard != entry.answer_heard || now.since(entry.heard) >= DEAF_AFTER;
        if hears || beat.heard == BootTime(0) {
            (entry.answer_heard, entry.unheard_since) = (beat.heard, None);
        }
        entry.heard = now;
        entry.stopped = beat.stopped.or(entry.stopped);
        let incarnation = beat.incarnation.filter(|incarnation| Some(*incarnation) == registered)?;
        if entry.incarnation != Some(incarnation) {
            // The earlier life is over: a data process holds its devices locked as long as it lives.
            entry.incarnation = Some(incarnation);
            entry.confirmed = MapVersion(0);
        }
        // Beats may overtake each other on their way.
        entry.confirmed = entry.confirmed.max(beat.map_version);
        let held = self.held.contains(&beat.node) && !Mutation::LeaseGrantedMeanwhile.is_on();
        if !may_grant || entry.stopped == Some(incarnation) || held {
            return None;
        }
        let unheard_since = *entry.unheard_since.get_or_insert(now);
        if now.since(unheard_since) >= DEAF_AFTER {
            return Some(Duration::ZERO);
        }
        let length = if Mutation::DeadBeforeLeaseEnds.is_on() { LEASE / 2 } else { LEASE + LEASE_SLACK };
        entry.until = entry.until.max(now + length);
        Some(LEASE)
    }

    pub fn health(&self, now: BootTime, node: NodeId, registered: Option<Incarnation>) -> Health {
        let Some(registered) = registered else { return Health::Gone };
        let entry = self.nodes.get(&node);
        if entry.is_some_and(|entry| entry.stopped == Some(registered)) {
            return Health::Gone;
        }
        if entry.is_some_and(|entry| entry.incarnation == Some(registered) && now < entry.until) {
            return Health::Up;
        }
        if now < self.grace_until && !Mutation::LeasesOfOldLeaderIgnored.is_on() {
            Health::Assumed
        } else {
            Health::Gone
        }
    }

    /// The newest map that the data process `incarnation` of `node` acts on, as far as it has said.
    pub fn confirmed(&self, node: NodeId, incarnation: Incarnation) -> MapVersion {
        let entry = self.nodes.get(&node).filter(|entry| entry.incarnation == Some(incarnation));
        entry.map_or(MapVersion(0), |entry| entry.confirmed)
    }

    /// Grants nothing to `nodes` until `release`.
    ///
    /// Without it: (1) the lease of node A ends; (2) the leader proposes that A's groups move on; (3) A is heard
    /// again and granted a lease; (4) the proposal commits, B serves; (5) A, with a valid lease and the map of
    /// before, still answers reads.
    pub fn hold(&mut self, nodes: BTreeSet<NodeId>) {
        self.held = nodes;
    }

    /// What was proposed is applied: grants from now on carry a map version that includes it.
    pub fn release(&mut self) {
        self.held.clear();
    }
}

#[cfg(test)]
mod tests;
