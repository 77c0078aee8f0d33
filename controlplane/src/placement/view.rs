//! The cluster as one decision sees it: state, health of the nodes, and where groups belong.

use std::collections::BTreeMap;

use xsan_protocol::ids::{GroupId, MapVersion, NodeId, StoreId};
use xsan_protocol::map::{Group, Member};

use super::Targets;
use crate::clock::BootTime;
use crate::lease::Health;
use crate::state::{ClusterState, Departure};

#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub now: BootTime,
    pub state: &'a ClusterState,
    pub nodes: &'a BTreeMap<NodeId, NodeView>,
    pub targets: &'a Targets,
    /// Just elected: which nodes are slow is not known yet.
    pub unsure: bool,
}

/// What the leader knows of a node beyond the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeView {
    pub health: Health,
    /// The newest map that its present data process acts on.
    pub confirmed: MapVersion,
    /// It is far slower than its peers, and the operator wants nobody to wait for it.
    pub slow: bool,
}

/// How a member stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its data process is the one that the membership counts for, and its store works.
    Live,
    /// The same, but its store takes no more writes. It may still act as primary until it knows better.
    Failed,
    /// A later life of its data process is up, and has the store.
    Back,
    /// Its data process is surely not serving, and no later one is up.
    Gone,
}

impl View<'_> {
    pub fn standing(&self, member: &Member) -> Standing {
        let data = self.state.map().nodes.get(&member.node).and_then(|node| node.data.as_ref());
        let (Some(data), Some(node)) = (data, self.nodes.get(&member.node)) else { return Standing::Gone };
        let store_works = data.stores.iter().any(|store| store.id == member.store && !store.failed);
        let same_life = data.incarnation == member.incarnation;
        match (same_life, node.health, store_works) {
            (true, Health::Up | Health::Assumed, true) => Standing::Live,
            (true, Health::Up | Health::Assumed, false) => Standing::Failed,
            (false, Health::Up, true) => Standing::Back,
            _ => Standing::Gone,
        }
    }

    pub fn is_slow(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|node| node.slow)
    }

    /// Is a learner on this node better left one, where enough others act?
    pub fn is_held(&self, node: NodeId) -> bool {
        self.unsure || self.is_slow(node)
    }

    /// Is another node the better primary?
    pub fn avoids(&self, node: NodeId) -> bool {
        self.state.avoids(node) || self.is_slow(node)
    }

    /// Should it hand over what it leads to any other that can?
    pub fn is_relieved(&self, node: NodeId) -> bool {
        self.state.is_in_maintenance(node) || self.is_slow(node)
    }

    /// May `member` leave the acting set of `group`? Not while it might answer as its primary: it must be
    /// surely silent, or act on a map in which another is.
    pub fn may_leave(&self, group: &Group, member: &Member) -> bool {
        match self.standing(member) {
            Standing::Gone | Standing::Back => true,
            Standing::Live | Standing::Failed => {
                let confirmed = self.nodes.get(&member.node).map_or(MapVersion(0), |node| node.confirmed);
                group.primary != Some(member.node) && confirmed >= self.state.primary_since(group.id)
            }
        }
    }

    /// A membership of `group` for the present life of `node`; `None` when it is not up.
    pub fn member(&self, group: GroupId, node: NodeId, store: StoreId, learner: bool) -> Option<Member> {
        let data = self.state.map().nodes.get(&node)?.data.as_ref()?;
        let up = self.nodes.get(&node)?.health == Health::Up;
        let works = data.stores.iter().any(|s| s.id == store && !s.failed);
        (up && works).then(|| Member {
            node,
            store,
            incarnation: data.incarnation,
            boot_id: data.boot_id,
            learner,
            damaged: self.state.is_damaged(node, group),
        })
    }

    /// `member` in the present life of its node; `None` when that is not up.
    pub fn renewed(&self, group: GroupId, member: &Member, learner: bool) -> Option<Member> {
        let new = self.member(group, member.node, member.store, learner)?;
        Some(Member { damaged: self.damaged(group, member), ..new })
    }

    /// Did nothing that `member` wrote get lost: the host has not restarted, and its records are whole?
    pub fn intact(&self, group: GroupId, member: &Member) -> bool {
        let data = self.state.map().nodes.get(&member.node).and_then(|node| node.data.as_ref());
        data.is_some_and(|data| data.boot_id == member.boot_id) && !self.damaged(group, member)
    }

    /// Does `node` surely have everything that is acknowledged in the group: as a member of the last settled epoch
    /// that still runs, or that has come back without having lost anything?
    pub fn has_everything(&self, group: &Group, node: NodeId) -> bool {
        let held = |holder: &&Member| match self.standing(holder) {
            Standing::Live => true,
            Standing::Back => self.intact(group.id, holder),
            Standing::Failed | Standing::Gone => false,
        };
        group.holders().filter(|holder| holder.node == node).any(|holder| held(&holder))
    }

    /// Has the operator given the node of `member` up, and is it gone?
    pub fn is_given_up(&self, member: &Member) -> bool {
        self.state.departure(member.node) == Departure::Lost && self.standing(member) == Standing::Gone
    }

    /// The newcomers of `group` that live, or have come back and lost nothing; `None` while one may still come back with what
    /// nobody else has.
    pub fn intact_newcomers(&self, group: &Group) -> Option<Vec<Member>> {
        let mut members = Vec::new();
        for newcomer in group.newcomers().filter(|newcomer| !self.is_given_up(newcomer)) {
            let intact = self.intact(group.id, newcomer);
            match self.standing(newcomer) {
                Standing::Live => members.push(*newcomer),
                Standing::Back if intact => {
                    members.extend(self.member(group.id, newcomer.node, newcomer.store, false));
                }
                Standing::Gone if intact => return None,
                Standing::Back | Standing::Gone | Standing::Failed => {}
            }
        }
        Some(members)
    }

    pub fn damaged(&self, group: GroupId, member: &Member) -> bool {
        member.damaged || self.state.is_damaged(member.node, group)
    }

    pub fn is_target(&self, group: GroupId, node: NodeId) -> bool {
        self.targets.get(&group).is_some_and(|replicas| replicas.iter().any(|r| r.node == node))
    }
}

/// Primaries per node, kept current over a batch of changes so that they spread evenly.
#[derive(Clone, Debug, Default)]
pub struct PrimaryCounts(BTreeMap<NodeId, u32>);

impl PrimaryCounts {
    pub fn of(state: &ClusterState) -> Self {
        let mut counts = Self::default();
        state.map().groups.values().for_each(|group| counts.moved(None, group.primary));
        counts
    }

    pub fn moved(&mut self, from: Option<NodeId>, to: Option<NodeId>) {
        if let Some(from) = from {
            let count = self.0.entry(from).or_default();
            *count = count.saturating_sub(1);
        }
        if let Some(to) = to {
            *self.0.entry(to).or_default() += 1;
        }
    }

    /// Of `nodes`, the one with the fewest primaries.
    pub fn least(&self, nodes: impl Iterator<Item = NodeId>) -> Option<NodeId> {
        nodes.min_by_key(|node| (self.0.get(node).copied().unwrap_or_default(), *node))
    }
}
