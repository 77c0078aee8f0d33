//! Quorum: when an entry of a group is acknowledged. The only place that decides it.
//!
//! Used by `primary` and `peering`. Knows members and seqs; no frame, store or request.
//!
//! Invariants
//! - `acked` only grows.
//! - An entry counts as acknowledged only when every acting member has it, and all before it, in its journal.
//!
//! Source: Lin et al., "PacificA: Replication in Log-Based Distributed Storage Systems", 2008.

use xsan_protocol::ids::{NodeId, Seq};
use xsan_protocol::mutation::Mutation;

#[derive(Debug)]
pub(super) struct Quorum {
    members: Vec<(NodeId, Seq)>,
    acked: Seq,
}

impl Quorum {
    /// The acting set, with what each member has in its journal, and what is known to be acknowledged.
    ///
    /// # Panics
    /// An empty acting set: nothing could ever be refused.
    pub fn new(members: Vec<(NodeId, Seq)>, acked: Seq) -> Self {
        assert!(!members.is_empty());
        let mut quorum = Self { members, acked };
        quorum.acked = acked.max(quorum.durable_everywhere());
        quorum
    }

    /// `node` has every entry up to `durable` in its journal. Returns how far the group is acknowledged now, if
    /// that is further than before.
    pub fn record(&mut self, node: NodeId, durable: Seq) -> Option<Seq> {
        let member = self.members.iter_mut().find(|(member, _)| *member == node)?;
        if durable <= member.1 {
            return None;
        }
        member.1 = durable;
        let everywhere = self.durable_everywhere();
        if everywhere <= self.acked {
            return None;
        }
        self.acked = everywhere;
        Some(everywhere)
    }

    pub fn acked(&self) -> Seq {
        self.acked
    }

    /// What `node` has in its journal, as far as is known.
    pub fn durable(&self, node: NodeId) -> Option<Seq> {
        self.members.iter().find(|(member, _)| *member == node).map(|(_, durable)| *durable)
    }

    pub fn durable_everywhere(&self) -> Seq {
        if Mutation::AckedByFastest.is_on() {
            return self
                .members
                .iter()
                .map(|(_, durable)| *durable)
                .max()
                .expect("the acting set is not empty");
        }
        self.members.iter().map(|(_, durable)| *durable).min().expect("the acting set is not empty")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_member_decides() {
        let mut quorum =
            Quorum::new(vec![(NodeId(1), Seq(4)), (NodeId(2), Seq(3)), (NodeId(3), Seq(5))], Seq(2));
        assert_eq!(quorum.acked(), Seq(3));
        assert_eq!(quorum.record(NodeId(1), Seq(9)), None);
        assert_eq!(quorum.record(NodeId(2), Seq(7)), Some(Seq(5)));
        assert_eq!(quorum.record(NodeId(2), Seq(6)), None);
        assert_eq!(quorum.record(NodeId(4), Seq(60)), None);
        assert_eq!(quorum.record(NodeId(3), Seq(8)), Some(Seq(7)));
    }

    #[test]
    fn what_was_acknowledged_stays_so_when_a_member_is_behind() {
        let mut quorum = Quorum::new(vec![(NodeId(1), Seq(4)), (NodeId(2), Seq(1))], Seq(4));
        assert_eq!(quorum.record(NodeId(2), Seq(3)), None);
        assert_eq!(quorum.acked(), Seq(4));
    }
}
