//! What becomes of the groups: decided by the Raft leader from the cluster's state and the health of its nodes.
//!
//! `decide` says what must change now, `life` what the operator asked for, `balance` what may change when all is well:
//! pure functions, which `planner` runs for `controller`; `slow` judges which nodes drag the others down. Where replicas *belong* is `xsan_protocol::placement`.
//!
//! Invariants
//! - A member that may still serve as primary, or may not know yet that it is not any more, stays in the
//!   acting set.
//! - An acting set below `min_replicas` is made only from members that hold everything acknowledged.
//! - A former acting set counts on as the source until the journals of the new one are complete: until then nobody
//!   knows whether they were still there.
//!
//! Source: Lin et al., "PacificA: Replication in Log-Based Distributed Storage Systems", 2008.

pub mod balance;
pub mod decide;
pub mod life;
pub mod planner;
pub mod slow;
mod view;

pub use view::{NodeView, PrimaryCounts, Standing, View};

use std::collections::{BTreeMap, HashMap};

use xsan_protocol::ids::{Epoch, GroupId, NodeId};
use xsan_protocol::placement::Replica;

use crate::clock::BootTime;
use crate::timing::SHORT_FOR;

/// Where each group belongs, the preferred primary first.
pub type Targets = HashMap<GroupId, Vec<Replica>>;

/// A primary's wish for its group, good for one epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposal {
    pub group: GroupId,
    pub epoch: Epoch,
    pub node: NodeId,
    pub change: ProposedChange,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProposedChange {
    /// The learner has everything.
    Promote,
    /// The member does not answer or does not get on. It becomes a learner while `min_replicas` are left; the primary
    /// itself hands over.
    Demote,
    /// Its journal does not continue into the group's: it becomes a learner, however few are left. They hold all
    /// that the group has, and bring it up again.
    Exclude,
    /// Its journal holds what the primary's lacks and can not be given: it becomes the primary.
    Lead,
    /// The learner was proposed, and lacks entries that are kept no more: it starts anew, which takes another epoch.
    Renew,
    /// Every acting member has in its journal what any had when the epoch began: the set before it is forgotten.
    Settle,
}

/// What the controller remembers from one decision to the next, for one term of leadership.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Since when each group has waited for members to come back.
    pub waiting: BTreeMap<GroupId, BootTime>,
    /// Groups that do not get on with a member and have too few to leave it out, and when their primary last said so.
    pub short: BTreeMap<GroupId, BootTime>,
    /// Since when every group has been well.
    pub well_since: Option<BootTime>,
    /// When balance was last worked on.
    pub balanced_at: BootTime,
}

impl Memory {
    /// Does the group need every replica that it has?
    pub fn is_short(&self, now: BootTime, group: GroupId) -> bool {
        self.short.get(&group).is_some_and(|said| now.since(*said) < SHORT_FOR)
    }
}

#[cfg(test)]
mod tests;
