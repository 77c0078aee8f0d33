//! Changes of groups: compare-and-set on the epoch, each on its own within a batch.
//!
//! When the acting set changes, the old one is kept in `Group::former` until the new epoch is settled, and with it, in `Group::dropped`, who
//! was taken in meanwhile and does not act any more.

use std::collections::BTreeSet;

use xsan_protocol::ids::BootId;
use xsan_protocol::limits::REPLICAS_MAX;
use xsan_protocol::map::{Group, Member};
use xsan_protocol::mutation::Mutation;

use super::command::{GroupChange, Reply};
use super::error::StateError;
use super::{ClusterState, Touched};

impl ClusterState {
    /// Makes those changes of a batch whose group is still at the expected epoch.
    pub(super) fn reconfigure(&mut self, changes: &[GroupChange], touched: &mut Touched) -> Reply {
        let mut changed = 0;
        let mut refused = 0;
        for change in changes {
            match self.reconfigure_one(change, touched) {
                Ok(true) => changed += 1,
                Ok(false) => refused += 1,
                Err(error) => {
                    // The same on every node: a leader's bug is refused everywhere alike and stops nobody.
                    tracing::error!(code = error.code().number(), "group change refused: {error}");
                    refused += 1;
                }
            }
        }
        Reply::Groups { changed, refused }
    }

    fn reconfigure_one(&mut self, change: &GroupChange, touched: &mut Touched) -> Result<bool, StateError> {
        self.check_change(change)?;
        let version = self.next_version();
        let group = self.map.groups.get_mut(&change.group).expect("checked above");
        if group.epoch != change.expected {
            return Ok(false);
        }
        if change.settle {
            group.former.clear();
            group.dropped.clear();
            touched.groups.insert(change.group);
            return Ok(true);
        }
        let promoted: Vec<Member> = change
            .members
            .iter()
            .filter(|member| !member.learner && !member.damaged)
            .filter(|member| group.learners().any(|learner| learner.node == member.node))
            .copied()
            .collect();
        if group.primary != change.primary {
            self.primary_since.insert(change.group, version);
        }
        let life = |member: &Member| (member.node, member.store, member.incarnation);
        let before: BTreeSet<_> = group.acting().map(life).collect();
        let after = change.members.iter().filter(|member| !member.learner).map(life).collect();
        if !group.is_settled() {
            let acts = |member: &&Member| {
                change.members.iter().any(|m| !m.learner && (m.node, m.store) == (member.node, member.store))
            };
            group.dropped = group.newcomers().filter(|member| !acts(member)).copied().collect();
            if Mutation::NewcomersForgotten.is_on() {
                group.dropped.clear();
            }
        } else if before != after {
            group.former = group.acting().copied().collect();
        }
        group.epoch = group.epoch.next();
        group.primary = change.primary;
        // The change may be older than the news that a member may lack writes.
        let may_lack: BTreeSet<_> =
            group.replicas().filter(|member| member.boot_id == BootId(0)).map(life).collect();
        group.members.clone_from(&change.members);
        for member in group.members.iter_mut().filter(|member| may_lack.contains(&life(member))) {
            member.boot_id = BootId(0);
        }
        touched.groups.insert(change.group);
        for replica in &promoted {
            self.healed(replica, change.group, touched);
        }
        Ok(true)
    }

    fn check_change(&self, change: &GroupChange) -> Result<(), StateError> {
        let invalid = |problem| Err(StateError::GroupInvalid { group: change.group, problem });
        let Some(pool) = self.map.pools.get(&change.group.pool()) else {
            return invalid("its pool does not exist");
        };
        if !self.map.groups.contains_key(&change.group) {
            return invalid("it does not exist");
        }
        let nodes: BTreeSet<_> = change.members.iter().map(|member| member.node).collect();
        if nodes.len() != change.members.len() {
            return invalid("two members are on one node");
        }
        if !nodes.iter().all(|node| self.map.nodes.contains_key(node)) {
            return invalid("a member is on no node of the cluster");
        }
        let acting: Vec<_> = change.members.iter().filter(|member| !member.learner).collect();
        if acting.is_empty() || acting.len() > REPLICAS_MAX.max(usize::from(pool.replica_count)) + 1 {
            return invalid("the acting set is empty or too large");
        }
        match change.primary {
            Some(primary) if acting.iter().any(|member| member.node == primary) => Ok(()),
            _ => invalid("the primary is no acting member"),
        }
    }

    /// A group as it is when its pool is made.
    pub(super) fn insert_group(&mut self, group: Group, touched: &mut Touched) {
        self.primary_since.insert(group.id, self.next_version());
        touched.groups.insert(group.id);
        self.map.groups.insert(group.id, group);
    }
}
