//! What happens to a cluster under test: links break, processes die, power goes, and the controller answers by the
//! rules of the control plane.

use xsan_protocol::ids::{BlockKey, BootId, GroupId, Incarnation, NodeId};
use xsan_protocol::map::{Group, Member};

use super::{Cluster, GROUPS, MS, NODES, group_id, pair};
use crate::replication::Change;
use crate::store::StoreError;

impl Cluster {
    pub(super) fn break_link(&mut self, a: NodeId, b: NodeId) {
        if !self.down.insert(pair(a, b)) {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            self.links.get_mut(&(from, to)).unwrap().clear();
            self.call(from, |replication, store, now_ns, out| {
                replication.on_peer_lost(to, &|_| true, store, now_ns, out)
            });
        }
    }

    pub(super) fn mend_link(&mut self, a: NodeId, b: NodeId) {
        let alive = self.node(a).replication.is_some() && self.node(b).replication.is_some();
        if !alive || !self.down.remove(&pair(a, b)) {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            self.call(from, |replication, store, now_ns, out| replication.on_peer_up(to, store, now_ns, out));
        }
    }

    pub(super) fn kill(&mut self, id: NodeId, power: bool) {
        if self.node(id).replication.take().is_none() {
            return;
        }
        let requests: Vec<u64> = self
            .outstanding
            .iter()
            .filter(|(_, request)| request.node == id)
            .map(|(number, _)| *number)
            .collect();
        for number in requests {
            let outstanding = self.outstanding.remove(&number).unwrap();
            self.lost(outstanding);
        }
        for other in (1..=NODES).map(NodeId).filter(|other| *other != id) {
            self.break_link(id, other);
        }
        if power {
            self.node(id).boot.0 += 1000;
        }
        let keep = self.random.next();
        for node in &mut self.nodes {
            node.store.heal();
        }
        let recovered = self.node(id).store.restart(power, |most| (keep % (most as u64 + 1)) as usize);
        // Recovery is repeated at the start: it gives the same.
        drop(recovered);
    }

    pub(super) fn restart(&mut self, id: NodeId) {
        if self.node(id).replication.is_some() {
            return;
        }
        let node = self.node(id);
        node.incarnation.0 += 100;
        let recovered = node.store.restart(false, |most| most);
        self.boot(id, recovered);
        for other in (1..=NODES).map(NodeId).filter(|other| *other != id) {
            self.mend_link(id, other);
        }
    }

    /// May this node lose its power without losing what was acknowledged and not flushed?
    pub(super) fn can_lose_power(&self, id: NodeId) -> bool {
        let safe = |group: &Group| {
            group.member(id).is_none_or(|member| member.learner)
                || group.acting().filter(|member| member.node != id).any(|member| self.is_live(member))
        };
        self.groups_active() == usize::from(GROUPS) && self.map.groups.values().all(safe)
    }

    pub(super) fn groups_active(&self) -> usize {
        let alive = self.nodes.iter().filter_map(|node| node.replication.as_ref());
        alive.map(|replication| replication.status().groups_active).sum()
    }

    pub(super) fn is_live(&self, member: &Member) -> bool {
        let node = &self.nodes[member.node.0 as usize - 1];
        node.replication.is_some() && node.incarnation == member.incarnation
    }

    pub(super) fn publish_group(&mut self, mut group: Group, primary: Option<NodeId>, members: Vec<Member>) {
        let before = group.primary;
        group.epoch = group.epoch.next();
        group.primary = primary;
        group.members = members;
        self.map.version.0 += 1;
        if let Some(before) = before.filter(|before| Some(*before) != primary) {
            self.unconfirmed.insert(group.id, (before, self.map.version));
        }
        self.map.groups.insert(group.id, group);
        // Damage is a fault of its own: with fewer replicas it could be that of the only copy.
        for node in &mut self.nodes {
            node.store.heal();
        }
        self.publish();
    }

    /// The control plane's rules for one group; true if something changed.
    pub(super) fn control(&mut self, id: GroupId) -> bool {
        let group = self.map.groups[&id].clone();
        let (acting, learners): (Vec<Member>, Vec<Member>) =
            group.members.iter().partition(|member| !member.learner);
        let cont: Vec<Member> = acting.iter().copied().filter(|member| self.is_live(member)).collect();
        let fresh = |member: &Member, learner: bool| {
            let node = &self.nodes[member.node.0 as usize - 1];
            Member { incarnation: node.incarnation, boot_id: node.boot, learner, ..*member }
        };
        let up = |member: &Member| self.nodes[member.node.0 as usize - 1].replication.is_some();
        let minimum = 2;
        if cont.len() == acting.len() {
            let kept: Vec<Member> = learners.iter().copied().filter(|member| self.is_live(member)).collect();
            let mut members = cont;
            members.extend(&kept);
            for node in &self.nodes {
                if node.replication.is_some() && !members.iter().any(|member| member.node == node.id) {
                    let store = node.store.id;
                    let new = Member {
                        node: node.id,
                        store,
                        incarnation: Incarnation(0),
                        boot_id: BootId(0),
                        learner: true,
                        damaged: false,
                    };
                    members.push(fresh(&new, true));
                }
            }
            if members.len() != group.members.len() || kept.len() != learners.len() {
                let primary = group.primary;
                self.publish_group(group, primary, members);
                return true;
            }
            return false;
        }
        let back: Vec<Member> =
            acting.iter().copied().filter(|member| !self.is_live(member) && up(member)).collect();
        if cont.len() >= minimum {
            let kept = group.primary.filter(|primary| cont.iter().any(|member| member.node == *primary));
            let primary = kept.or_else(|| cont.first().map(|member| member.node));
            let mut members = cont;
            members.extend(back.iter().map(|member| fresh(member, true)));
            members.extend(learners.iter().copied().filter(|member| self.is_live(member)));
            self.publish_group(group, primary, members);
            return true;
        }
        let intact = |member: &Member| self.nodes[member.node.0 as usize - 1].boot == member.boot_id;
        let safe = !cont.is_empty() || back.iter().any(intact) || back.len() == acting.len();
        if safe && cont.len() + back.len() >= minimum.min(acting.len()) {
            let mut members = cont.clone();
            members.extend(back.iter().map(|member| fresh(member, false)));
            let primary =
                group.primary.filter(|primary| members.iter().any(|member| member.node == *primary));
            let primary = primary.or_else(|| members.first().map(|member| member.node));
            members.extend(learners.iter().copied().filter(|member| self.is_live(member)));
            self.publish_group(group, primary, members);
            return true;
        }
        false
    }

    pub(super) fn on_proposals(&mut self) {
        for proposal in std::mem::take(&mut self.proposals) {
            let group = self.map.groups[&proposal.group].clone();
            let Some(member) = group.member(proposal.node).copied() else { continue };
            if group.epoch != proposal.epoch || !self.is_live(&member) {
                continue;
            }
            let mut members = group.members.clone();
            let mut primary = group.primary;
            match proposal.change {
                Change::Promote if member.learner => {}
                Change::Renew if member.learner => {
                    self.publish_group(group, primary, members);
                    continue;
                }
                Change::Lead if !member.learner => {
                    let members = group.members.clone();
                    self.publish_group(group, Some(member.node), members);
                    continue;
                }
                Change::Demote | Change::Exclude if !member.learner => {
                    if let Some((node, version)) = self.unconfirmed.get(&group.id).copied()
                        && node == member.node
                        && self.node(node).map_seen < version
                    {
                        continue;
                    }
                    if primary == Some(member.node) {
                        // A live primary moves first; the next one proposes it out again if need be.
                        let Some(next) = group.acting().find(|other| other.node != member.node) else {
                            continue;
                        };
                        primary = Some(next.node);
                        self.publish_group(group, primary, members);
                        continue;
                    }
                }
                _ => continue,
            }
            for changed in members.iter_mut().filter(|changed| changed.node == member.node) {
                changed.learner = proposal.change != Change::Promote;
            }
            self.publish_group(group, primary, members);
        }
    }

    pub(super) fn fault(&mut self) {
        let a = NodeId(self.random.index(NODES as usize) as u32 + 1);
        let b = NodeId((a.0 + self.random.index(NODES as usize - 1) as u32) % NODES + 1);
        match self.random.index(13) {
            0 => {
                let alive = self.nodes.iter().filter(|node| node.replication.is_some()).count();
                if alive == NODES as usize || (alive > 0 && self.random.one_in(3)) {
                    self.kill(a, false);
                }
            }
            1 if self.random.one_in(2) && self.can_lose_power(a) => self.kill(a, true),
            2..5 => {
                for node in 1..=NODES {
                    if self.random.one_in(2) {
                        self.restart(NodeId(node));
                    }
                }
            }
            5 => self.break_link(a, b),
            6..8 => self.mend_link(a, b),
            8 => {
                let full = self.random.one_in(3).then_some(StoreError::JournalFull);
                self.node(a).store.refusing = full;
            }
            9 if self.is_whole() => {
                let group = group_id(self.random.index(usize::from(GROUPS)) as u16);
                let pages = self.random_pages();
                let keys: Vec<BlockKey> = self.node(a).store.blocks(group).into_keys().collect();
                if !keys.is_empty() {
                    let key = keys[self.random.index(keys.len())];
                    self.node(a).store.damage(group, key, pages.first);
                }
            }
            12 => {
                // Memory is short, and all learners are late.
                self.call(a, |replication, store, now_ns, out| {
                    replication.bound_retained(0, |learner, _| learner.is_running(), store, now_ns, out);
                    replication.bound_learned(0, now_ns + 1000 * MS, out);
                });
            }
            10 if self.random.one_in(2) => {
                // Balance: the primary moves, the old one stays in the acting set.
                let id = group_id(self.random.index(usize::from(GROUPS)) as u16);
                let group = self.map.groups[&id].clone();
                let next = group
                    .acting()
                    .find(|member| member.node == a && self.is_live(member))
                    .map(|member| member.node);
                if let Some(next) = next.filter(|next| Some(*next) != group.primary) {
                    let members = group.members.clone();
                    self.publish_group(group, Some(next), members);
                }
            }
            _ => {}
        }
    }
}
