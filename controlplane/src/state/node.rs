//! Commands about nodes and their data processes.

use xsan_protocol::ids::{BootId, GroupId, Incarnation, NodeId, StoreId};
use xsan_protocol::limits::NODES_MAX;
use xsan_protocol::map::{DamagedStore, DataProcess, Group, Member, Node};

use super::command::{NewNode, Reply};
use super::error::StateError;
use super::{ClusterState, NodePrivate, Touched, check_name};

impl ClusterState {
    /// Takes a node in; the first one names the cluster. The same node may ask again.
    pub(super) fn add_node(&mut self, new: &NewNode, touched: &mut Touched) -> Result<Reply, StateError> {
        check_name("cluster", &new.cluster_id)?;
        check_name("node", &new.name)?;
        if !new.failure_domain.is_empty() {
            check_name("failure domain", &new.failure_domain)?;
        }
        let founding = self.map.cluster_id.is_empty();
        if founding && !new.founder {
            return Err(StateError::NotFounded);
        }
        if !founding && self.map.cluster_id != new.cluster_id {
            return Err(StateError::ClusterIdMismatch {
                found: new.cluster_id.clone(),
                expected: self.map.cluster_id.clone(),
            });
        }
        if let Some(node) = self.map.node_named(&new.name) {
            let same = self.nodes.get(&node.id).is_some_and(|private| private.instance == new.instance);
            let taken = StateError::NodeIdTaken { name: new.name.clone() };
            return if same { Ok(Reply::Node(node.id)) } else { Err(taken) };
        }
        if self.map.nodes.len() >= NODES_MAX {
            return Err(StateError::ClusterFull);
        }
        let id = self.next.node;
        self.next.node = NodeId(id.0.checked_add(1).ok_or(StateError::IdsUsedUp { what: "node" })?);
        if founding {
            self.map.cluster_id = new.cluster_id.clone();
        }
        let node = Node {
            id,
            name: new.name.clone(),
            address: new.address,
            control_port: new.control_port,
            failure_domain: new.failure_domain.clone(),
            voter: self.voters.contains(&id),
            data: None,
        };
        self.map.nodes.insert(id, node);
        self.nodes.insert(id, NodePrivate { instance: new.instance, ..NodePrivate::default() });
        touched.nodes.insert(id);
        Ok(Reply::Node(id))
    }

    /// A new life of a data process, in place of `replaces`. A command of a life that has ended may come late: it does not take
    /// the place of the one that serves.
    pub(super) fn data_started(
        &mut self,
        id: NodeId,
        process: &DataProcess,
        damaged_stores: &[DamagedStore],
        replaces: Option<Incarnation>,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let node = self.map.nodes.get_mut(&id).ok_or(StateError::NodeNotFound { node: id })?;
        let present = node.data.as_ref().map(|data| data.incarnation);
        if present == Some(process.incarnation) {
            // The link broke and came back: what is known by now, healed groups and failed stores, stays.
            return Ok(Reply::Done);
        }
        if present != replaces {
            return Err(StateError::LifeNotRegistered { name: node.name.clone() });
        }
        node.data = Some(process.clone());
        let private = self.nodes.get_mut(&id).expect("every node of the map has a private part");
        // Also the groups that the store does not name: all that it had of them may be what it lost. It forgets that it is damaged once it
        // has learnt those that it knows: what it never named stays damaged until it was a learner here.
        let lost = |group: &&Group| {
            group.replicas().filter(|member| member.node == id).any(|member| {
                let store = damaged_stores.iter().find(|store| store.store == member.store);
                private.damaged.contains(&group.id)
                    || store.is_some_and(|store| !store.intact_groups.contains(&group.id))
            })
        };
        private.damaged = self.map.groups.values().filter(lost).map(|group| group.id).collect();
        touched.nodes.insert(id);
        for store in process.stores.iter().filter(|store| store.failed_before) {
            self.may_lack_writes(id, store.id, touched);
        }
        // Its gateway sessions ended with the earlier life.
        for volume in self.map.volumes.values_mut() {
            if volume.attached_nodes.contains(&id) {
                volume.attached_nodes.retain(|node| *node != id);
                touched.volumes.insert(volume.id);
            }
        }
        Ok(Reply::Done)
    }

    /// A store takes no more writes. News of an earlier life of the data process are out of date.
    pub(super) fn store_failed(
        &mut self,
        id: NodeId,
        incarnation: Incarnation,
        store: StoreId,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let node = self.map.nodes.get_mut(&id).ok_or(StateError::NodeNotFound { node: id })?;
        let data = node.data.as_mut().filter(|data| data.incarnation == incarnation);
        let store = data.and_then(|data| data.stores.iter_mut().find(|s| s.id == store && !s.failed));
        let Some(store) = store else { return Ok(Reply::Done) };
        store.failed = true;
        touched.nodes.insert(id);
        let store = store.id;
        self.may_lack_writes(id, store, touched);
        Ok(Reply::Done)
    }

    /// A flush that failed may have taken with it what it was to cover. Once the device works again, in another life of the
    /// process, that must not pass for nothing lost: its members count as those of a host that lost its power.
    fn may_lack_writes(&mut self, id: NodeId, store: StoreId, touched: &mut Touched) {
        for group in self.map.groups.values_mut() {
            let members = group.members.iter_mut().chain(&mut group.former).chain(&mut group.dropped);
            for member in members.filter(|member| member.node == id && member.store == store) {
                member.boot_id = BootId(0);
                touched.groups.insert(group.id);
            }
        }
    }

    /// The life of the node's data process that counts.
    pub fn registered(&self, node: NodeId) -> Option<Incarnation> {
        self.map.nodes.get(&node)?.data.as_ref().map(|data| data.incarnation)
    }

    pub fn is_registered(&self, node: NodeId, incarnation: Incarnation) -> bool {
        self.registered(node) == Some(incarnation)
    }

    /// The learner of `group` on `node` has everything again, if what was promoted is still alive: a later life has damage of its
    /// own.
    pub(super) fn healed(&mut self, replica: &Member, group: GroupId, touched: &mut Touched) {
        let node = replica.node;
        if !self.is_registered(node, replica.incarnation) {
            return;
        }
        let private = self.nodes.get_mut(&node).expect("members are nodes of the map");
        if private.damaged.remove(&group) {
            touched.nodes.insert(node);
        }
    }
}
