//! Commands about volumes, and the pools that come with the first volume of a replica count.

use std::collections::BTreeSet;

use xsan_protocol::ids::{Epoch, Incarnation, Layer, NodeId, PoolId, VolumeId};
use xsan_protocol::limits::{REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUMES_MAX};
use xsan_protocol::map::{Group, Member, Pool, Volume, min_replicas};
use xsan_protocol::placement;
use xsan_protocol::units::SECTOR_SIZE;

use super::command::{NewVolume, Reply};
use super::error::StateError;
use super::{ClusterState, Touched, check_name, lineage_of};

impl ClusterState {
    pub(super) fn create_volume(
        &mut self,
        new: &NewVolume,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        check_name("volume", &new.name)?;
        if !new.policy.is_empty() {
            check_name("policy", &new.policy)?;
        }
        check_size(&new.name, new.size_bytes)?;
        if let Some(volume) = self.map.volume_named(&new.name) {
            let same = self.requests.get(&volume.id) == Some(&new.request);
            let exists = StateError::VolumeExists { name: new.name.clone() };
            return if same { Ok(Reply::Volume(Box::new(volume.clone()))) } else { Err(exists) };
        }
        if self.map.volumes.len() >= VOLUMES_MAX {
            return Err(StateError::TooManyVolumes);
        }
        let id = self.next.volume;
        let next = VolumeId(id.0.checked_add(1).ok_or(StateError::IdsUsedUp { what: "volume" })?);
        let pool = self.pool_for(new.replica_count, new.group_count, touched)?;
        self.count_scrubs_from(touched, new.created_unix_ms);
        self.next.volume = next;
        self.map.lineage_end = lineage_of(next);
        let volume = Volume {
            id,
            name: new.name.clone(),
            lineage: lineage_of(id),
            layer: Layer(0),
            size_bytes: new.size_bytes,
            pool,
            durability: new.durability,
            policy: new.policy.clone(),
            created_unix_ms: new.created_unix_ms,
            attached_nodes: Vec::new(),
        };
        self.map.volumes.insert(id, volume.clone());
        self.requests.insert(id, new.request);
        touched.volumes.insert(id);
        Ok(Reply::Volume(Box::new(volume)))
    }

    /// The pool of a replica count; made, with all its groups, when first used.
    fn pool_for(
        &mut self,
        replica_count: u8,
        group_count: u16,
        touched: &mut Touched,
    ) -> Result<PoolId, StateError> {
        if replica_count == 0 || usize::from(replica_count) > REPLICAS_MAX {
            return Err(StateError::ReplicaCountInvalid { replica_count });
        }
        if let Some(pool) = self.map.pools.values().find(|pool| pool.replica_count == replica_count) {
            return Ok(pool.id);
        }
        let id = self.next.pool;
        let next = PoolId(id.0.checked_add(1).ok_or(StateError::IdsUsedUp { what: "pool" })?);
        let pool = Pool { id, replica_count, min_replicas: min_replicas(replica_count), group_count };
        let candidates = self.candidates(&BTreeSet::new());
        let placed = placement::place(&pool, &candidates).map_err(|error| StateError::Placement { error })?;
        self.next.pool = next;
        self.map.pools.insert(id, pool);
        touched.pools.insert(id);
        for placement in placed {
            let members: Vec<_> =
                placement.replicas.iter().map(|replica| self.first_member(*replica)).collect();
            let primary = members.first().map(|member| member.node);
            self.insert_group(
                Group {
                    id: placement.group,
                    epoch: Epoch(1),
                    primary,
                    members,
                    former: Vec::new(),
                    dropped: Vec::new(),
                },
                touched,
            );
        }
        Ok(id)
    }

    /// An acting member of a group that holds nothing yet.
    fn first_member(&self, replica: placement::Replica) -> Member {
        let data = self.map.nodes.get(&replica.node).and_then(|node| node.data.as_ref());
        let data = data.expect("candidates have a data process");
        Member {
            node: replica.node,
            store: replica.store,
            incarnation: data.incarnation,
            boot_id: data.boot_id,
            learner: false,
            damaged: false,
        }
    }

    pub(super) fn resize_volume(
        &mut self,
        name: &str,
        size_bytes: u64,
        allow_shrink: bool,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        check_size(name, size_bytes)?;
        let volume = self.volume_mut(name)?;
        if size_bytes < volume.size_bytes && !allow_shrink {
            let (old_bytes, new_bytes) = (volume.size_bytes, size_bytes);
            return Err(StateError::ShrinkLosesData { name: name.to_owned(), old_bytes, new_bytes });
        }
        if size_bytes != volume.size_bytes {
            volume.size_bytes = size_bytes;
            touched.volumes.insert(volume.id);
        }
        Ok(Reply::Volume(Box::new(volume.clone())))
    }

    pub(super) fn delete_volume(&mut self, id: VolumeId, touched: &mut Touched) -> Result<Reply, StateError> {
        let volume = self.map.volumes.get(&id).ok_or(StateError::VolumeIdNotFound { id })?;
        if !volume.attached_nodes.is_empty() {
            let named = |node: &NodeId| self.map.nodes.get(node).map_or(node.to_string(), |n| n.name.clone());
            let nodes = volume.attached_nodes.iter().map(named).collect();
            return Err(StateError::VolumeAttached { name: volume.name.clone(), nodes });
        }
        self.map.volumes.remove(&id);
        self.requests.remove(&id);
        touched.volumes.insert(id);
        Ok(Reply::Done)
    }

    pub(super) fn attach(
        &mut self,
        name: &str,
        node: NodeId,
        incarnation: Incarnation,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let known = self.map.nodes.get(&node).ok_or(StateError::NodeNotFound { node })?;
        if !self.is_registered(node, incarnation) {
            return Err(StateError::LifeNotRegistered { name: known.name.clone() });
        }
        let volume = self.volume_mut(name)?;
        if !volume.attached_nodes.contains(&node) {
            volume.attached_nodes.push(node);
            touched.volumes.insert(volume.id);
        }
        Ok(Reply::Volume(Box::new(volume.clone())))
    }

    pub(super) fn detach(
        &mut self,
        id: VolumeId,
        node: NodeId,
        incarnation: Incarnation,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let is_present = self.is_registered(node, incarnation);
        let volume = self.map.volumes.get_mut(&id).ok_or(StateError::VolumeIdNotFound { id })?;
        if is_present && volume.attached_nodes.contains(&node) {
            volume.attached_nodes.retain(|attached| *attached != node);
            touched.volumes.insert(id);
        }
        Ok(Reply::Done)
    }

    fn volume_mut(&mut self, name: &str) -> Result<&mut Volume, StateError> {
        let found = self.map.volumes.values_mut().find(|volume| volume.name == name);
        found.ok_or_else(|| StateError::VolumeNotFound { name: name.to_owned() })
    }
}

fn check_size(name: &str, size_bytes: u64) -> Result<(), StateError> {
    let valid = (u64::from(SECTOR_SIZE)..=VOLUME_BYTES_MAX).contains(&size_bytes)
        && size_bytes.is_multiple_of(u64::from(SECTOR_SIZE));
    if valid { Ok(()) } else { Err(StateError::SizeInvalid { name: name.to_owned(), size_bytes }) }
}
