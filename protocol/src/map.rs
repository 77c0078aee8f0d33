//! The cluster map in memory: decoded and validated once from its message, then shared read-only.
//!
//! Written by the control plane's state machine; read by every shard for routing and membership.
//!
//! Invariants
//! - Every group's members are nodes of the map; the primary, if any, is an acting member.
//! - `groups` of a pool are complete: index 0 to its count.
//!
//! Source: docs/decisions/0001-raft-for-configuration-only.md, docs/decisions/0009-settled-epochs.md.

use std::collections::{BTreeMap, HashMap};

use crate::checksum::crc32c;
use crate::error::Code;
use crate::ids::{
    BlockIndex, BootId, Epoch, GroupId, Incarnation, Layer, Lineage, MapVersion, NodeId, PoolId, ShardIndex,
    StoreId, VolumeId,
};
use crate::proto;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterMap {
    pub version: MapVersion,
    pub cluster_id: String,
    pub nodes: BTreeMap<NodeId, Node>,
    pub pools: BTreeMap<PoolId, Pool>,
    pub groups: HashMap<GroupId, Group>,
    pub volumes: BTreeMap<VolumeId, Volume>,
    /// The first lineage that was not given out yet.
    pub lineage_end: Lineage,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub address: std::net::IpAddr,
    pub control_port: u16,
    pub failure_domain: String,
    pub voter: bool,
    pub data: Option<DataProcess>,
}

/// One life of a node's data process, and what it serves.
#[derive(Clone, Debug, PartialEq)]
pub struct DataProcess {
    pub incarnation: Incarnation,
    pub boot_id: BootId,
    pub shard_ports: Vec<u16>,
    pub nbd_port: u16,
    pub stores: Vec<Store>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Store {
    pub id: StoreId,
    pub capacity_bytes: u64,
    pub shard: ShardIndex,
    pub device: String,
    pub media: String,
    pub failed: bool,
    /// In an earlier life of the process it failed, which the cluster may not have heard of, or what it had written then is not there.
    pub failed_before: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    pub id: PoolId,
    pub replica_count: u8,
    pub min_replicas: u8,
    pub group_count: u16,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    pub id: GroupId,
    pub epoch: Epoch,
    pub primary: Option<NodeId>,
    pub members: Vec<Member>,
    /// While the present epoch is not settled: the acting set of the last one that was. All that is acknowledged is with
    /// them; that the present members have it is not known before their journals are complete (docs/decisions/0009).
    pub former: Vec<Member>,
    /// While the present epoch is not settled: members that were taken in since the last one that was, and do not act any more. They may
    /// have what those of `former` have lost (docs/decisions/0017).
    pub dropped: Vec<Member>,
}

/// A store that lost records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DamagedStore {
    pub store: StoreId,
    /// Its groups that were brought up to date since. All others may have lost something, also those it does not name.
    pub intact_groups: Vec<GroupId>,
}

/// A replica of a group, as one life of one store of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub node: NodeId,
    pub store: StoreId,
    pub incarnation: Incarnation,
    pub boot_id: BootId,
    pub learner: bool,
    pub damaged: bool,
}

/// When a write counts as in a member's journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The device has completed it; FLUSH and FUA force it to stable media.
    #[default]
    OnFlush,
    /// It is on stable media.
    EveryWrite,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Volume {
    pub id: VolumeId,
    pub name: String,
    pub lineage: Lineage,
    pub layer: Layer,
    pub size_bytes: u64,
    pub pool: PoolId,
    pub durability: Durability,
    pub policy: String,
    pub created_unix_ms: u64,
    pub attached_nodes: Vec<NodeId>,
}

/// Default of a pool: count − ⌊count / 2⌋, so 3 → 2, 2 → 1, 1 → 1.
pub const fn min_replicas(replica_count: u8) -> u8 {
    replica_count - replica_count / 2
}

impl Group {
    pub fn acting(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| !member.learner)
    }

    pub fn learners(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(|member| member.learner)
    }

    pub fn member(&self, node: NodeId) -> Option<&Member> {
        self.members.iter().find(|member| member.node == node)
    }

    /// Have all acting members answered at an epoch with this acting set, or one that it grew from?
    pub fn is_settled(&self) -> bool {
        self.former.is_empty()
    }

    /// Does this life of this replica act in the present epoch?
    pub fn acts(&self, replica: &Member) -> bool {
        let life = |member: &Member| (member.node, member.store, member.incarnation);
        self.acting().any(|member| life(member) == life(replica))
    }

    /// The newest members that surely held, among them, everything acknowledged.
    pub fn holders(&self) -> impl Iterator<Item = &Member> {
        let settled = self.is_settled().then(|| self.acting());
        settled.into_iter().flatten().chain(&self.former)
    }

    /// Who was taken into the acting set since the last settled epoch, and is no holder yet, whether it still acts or not.
    pub fn newcomers(&self) -> impl Iterator<Item = &Member> {
        let is_holder = |member: &Member| self.holders().any(|holder| holder.node == member.node);
        self.acting().filter(move |member| !is_holder(member)).chain(&self.dropped)
    }

    /// Whoever has a part in the group, or may be asked for what it had.
    pub fn replicas(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().chain(&self.former).chain(&self.dropped)
    }
}

impl Pool {
    /// The group of a block: all the layers of a lineage's block share it.
    pub fn group_of(&self, lineage: Lineage, index: BlockIndex) -> GroupId {
        Self::group_in(self.id, self.group_count, lineage, index)
    }

    /// [`Pool::group_of`] from the pool's id and size alone.
    pub fn group_in(pool: PoolId, group_count: u16, lineage: Lineage, index: BlockIndex) -> GroupId {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&lineage.0.to_le_bytes());
        bytes[8..].copy_from_slice(&index.0.to_le_bytes());
        GroupId::new(pool, (crc32c(&bytes) % u32::from(group_count)) as u16)
    }

    pub fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        let id = self.id;
        (0..self.group_count).map(move |index| GroupId::new(id, index))
    }
}

impl Node {
    /// The shard that owns `store` in the node's present life.
    pub fn shard_of(&self, store: StoreId) -> Option<ShardIndex> {
        self.data.as_ref()?.stores.iter().find(|s| s.id == store).map(|s| s.shard)
    }
}

impl ClusterMap {
    pub fn volume_named(&self, name: &str) -> Option<&Volume> {
        self.volumes.values().find(|volume| volume.name == name)
    }

    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.name == name)
    }

    /// The node and shard to send a client request of `group` to; `None` while it has no primary.
    pub fn route(&self, group: GroupId) -> Option<(NodeId, ShardIndex, Epoch)> {
        let group = self.groups.get(&group)?;
        let primary = group.primary?;
        let store = group.member(primary)?.store;
        Some((primary, self.nodes.get(&primary)?.shard_of(store)?, group.epoch))
    }
}

/// A map message that does not hold together; names the field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cluster map: {field} is not valid (in entry {entry})")]
pub struct MapError {
    pub field: &'static str,
    pub entry: u64,
}

impl MapError {
    pub const fn code(self) -> Code {
        Code::FrameInvalid
    }
}

fn narrow<T: TryFrom<u32>>(value: u32, field: &'static str, entry: u64) -> Result<T, MapError> {
    T::try_from(value).map_err(|_| MapError { field, entry })
}

impl TryFrom<proto::ClusterMap> for ClusterMap {
    type Error = MapError;

    fn try_from(message: proto::ClusterMap) -> Result<Self, MapError> {
        let mut map = Self {
            version: MapVersion(message.version),
            cluster_id: message.cluster_id,
            lineage_end: Lineage(message.lineage_end),
            ..Self::default()
        };
        for node in message.nodes {
            let node = Node::try_from(node)?;
            map.nodes.insert(node.id, node);
        }
        for pool in message.pools {
            let pool = Pool::try_from(pool)?;
            map.pools.insert(pool.id, pool);
        }
        for group in message.groups {
            let group = Group::try_from(group)?;
            let entry = u64::from(group.id.0);
            if group.replicas().any(|member| !map.nodes.contains_key(&member.node)) {
                return Err(MapError { field: "groups.members.node", entry });
            }
            map.groups.insert(group.id, group);
        }
        for pool in map.pools.values() {
            if !pool.groups().all(|group| map.groups.contains_key(&group)) {
                return Err(MapError { field: "pools.group_count", entry: u64::from(pool.id.0) });
            }
        }
        for volume in message.volumes {
            let volume = Volume::try_from(volume)?;
            if !map.pools.contains_key(&volume.pool) {
                return Err(MapError { field: "volumes.pool", entry: u64::from(volume.id.0) });
            }
            map.volumes.insert(volume.id, volume);
        }
        Ok(map)
    }
}

impl From<&ClusterMap> for proto::ClusterMap {
    fn from(map: &ClusterMap) -> Self {
        let mut groups: Vec<_> = map.groups.values().map(proto::Group::from).collect();
        groups.sort_unstable_by_key(|group| group.id);
        Self {
            version: map.version.0,
            cluster_id: map.cluster_id.clone(),
            nodes: map.nodes.values().map(proto::Node::from).collect(),
            pools: map.pools.values().map(proto::Pool::from).collect(),
            groups,
            volumes: map.volumes.values().map(proto::Volume::from).collect(),
            lineage_end: map.lineage_end.0,
        }
    }
}

impl TryFrom<proto::Node> for Node {
    type Error = MapError;

    fn try_from(node: proto::Node) -> Result<Self, MapError> {
        let entry = u64::from(node.id);
        Ok(Self {
            id: NodeId(node.id),
            name: node.name,
            address: node.address.parse().map_err(|_| MapError { field: "nodes.address", entry })?,
            control_port: narrow(node.control_port, "nodes.control_port", entry)?,
            failure_domain: node.failure_domain,
            voter: node.voter,
            data: node.data.map(|data| DataProcess::from_message(data, entry)).transpose()?,
        })
    }
}

impl From<&Node> for proto::Node {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.0,
            name: node.name.clone(),
            address: node.address.to_string(),
            control_port: u32::from(node.control_port),
            failure_domain: node.failure_domain.clone(),
            voter: node.voter,
            data: node.data.as_ref().map(proto::DataProcess::from),
        }
    }
}

impl DataProcess {
    /// Decodes one life of the data process of node `entry`.
    pub fn from_message(data: proto::DataProcess, entry: u64) -> Result<Self, MapError> {
        let shard_ports = data
            .shard_ports
            .into_iter()
            .map(|port| narrow(port, "nodes.data.shard_ports", entry))
            .collect::<Result<Vec<u16>, _>>()?;
        let mut stores = Vec::with_capacity(data.stores.len());
        for store in data.stores {
            let shard: u16 = narrow(store.shard, "nodes.data.stores.shard", entry)?;
            if usize::from(shard) >= shard_ports.len() {
                return Err(MapError { field: "nodes.data.stores.shard", entry });
            }
            stores.push(Store {
                id: StoreId(store.id),
                capacity_bytes: store.capacity_bytes,
                shard: ShardIndex(shard),
                device: store.device,
                media: store.media,
                failed: store.failed,
                failed_before: store.failed_before,
            });
        }
        Ok(Self {
            incarnation: Incarnation(data.incarnation),
            boot_id: BootId(data.boot_id),
            shard_ports,
            nbd_port: narrow(data.nbd_port, "nodes.data.nbd_port", entry)?,
            stores,
        })
    }
}

impl From<&DataProcess> for proto::DataProcess {
    fn from(data: &DataProcess) -> Self {
        let store = |store: &Store| proto::Store {
            id: store.id.0,
            capacity_bytes: store.capacity_bytes,
            shard: u32::from(store.shard.0),
            device: store.device.clone(),
            media: store.media.clone(),
            failed: store.failed,
            failed_before: store.failed_before,
        };
        Self {
            incarnation: data.incarnation.0,
            boot_id: data.boot_id.0,
            shard_ports: data.shard_ports.iter().copied().map(u32::from).collect(),
            nbd_port: u32::from(data.nbd_port),
            stores: data.stores.iter().map(store).collect(),
        }
    }
}

impl TryFrom<proto::Pool> for Pool {
    type Error = MapError;

    fn try_from(pool: proto::Pool) -> Result<Self, MapError> {
        let entry = u64::from(pool.id);
        let decoded = Self {
            id: PoolId(narrow(pool.id, "pools.id", entry)?),
            replica_count: narrow(pool.replica_count, "pools.replica_count", entry)?,
            min_replicas: narrow(pool.min_replicas, "pools.min_replicas", entry)?,
            group_count: narrow(pool.group_count, "pools.group_count", entry)?,
        };
        if !decoded.group_count.is_power_of_two() {
            return Err(MapError { field: "pools.group_count", entry });
        }
        if decoded.min_replicas == 0 || decoded.min_replicas > decoded.replica_count {
            return Err(MapError { field: "pools.min_replicas", entry });
        }
        Ok(decoded)
    }
}

impl From<&Pool> for proto::Pool {
    fn from(pool: &Pool) -> Self {
        Self {
            id: u32::from(pool.id.0),
            replica_count: u32::from(pool.replica_count),
            min_replicas: u32::from(pool.min_replicas),
            group_count: u32::from(pool.group_count),
        }
    }
}

impl TryFrom<proto::Group> for Group {
    type Error = MapError;

    fn try_from(group: proto::Group) -> Result<Self, MapError> {
        let decoded = Self {
            id: GroupId(group.id),
            epoch: Epoch(group.epoch),
            primary: (group.primary != 0).then_some(NodeId(group.primary)),
            members: group.members.into_iter().map(Member::from).collect(),
            former: group.former.into_iter().map(Member::from).collect(),
            dropped: group.dropped.into_iter().map(Member::from).collect(),
        };
        if let Some(primary) = decoded.primary
            && !decoded.acting().any(|member| member.node == primary)
        {
            return Err(MapError { field: "groups.primary", entry: u64::from(group.id) });
        }
        Ok(decoded)
    }
}

impl From<&Group> for proto::Group {
    fn from(group: &Group) -> Self {
        Self {
            id: group.id.0,
            epoch: group.epoch.0,
            primary: group.primary.map_or(0, |node| node.0),
            members: group.members.iter().map(proto::Member::from).collect(),
            former: group.former.iter().map(proto::Member::from).collect(),
            dropped: group.dropped.iter().map(proto::Member::from).collect(),
        }
    }
}

impl From<proto::DamagedStore> for DamagedStore {
    fn from(damaged: proto::DamagedStore) -> Self {
        let intact_groups = damaged.intact_groups.into_iter().map(GroupId).collect();
        Self { store: StoreId(damaged.store), intact_groups }
    }
}

impl From<&DamagedStore> for proto::DamagedStore {
    fn from(damaged: &DamagedStore) -> Self {
        let intact_groups = damaged.intact_groups.iter().map(|group| group.0).collect();
        Self { store: damaged.store.0, intact_groups }
    }
}

impl From<proto::Member> for Member {
    fn from(member: proto::Member) -> Self {
        Self {
            node: NodeId(member.node),
            store: StoreId(member.store),
            incarnation: Incarnation(member.incarnation),
            boot_id: BootId(member.boot_id),
            learner: member.learner,
            damaged: member.damaged,
        }
    }
}

impl From<&Member> for proto::Member {
    fn from(member: &Member) -> Self {
        Self {
            node: member.node.0,
            store: member.store.0,
            incarnation: member.incarnation.0,
            boot_id: member.boot_id.0,
            learner: member.learner,
            damaged: member.damaged,
        }
    }
}

impl TryFrom<proto::Volume> for Volume {
    type Error = MapError;

    fn try_from(volume: proto::Volume) -> Result<Self, MapError> {
        let entry = u64::from(volume.id);
        let durability = match proto::Durability::try_from(volume.durability) {
            Ok(proto::Durability::OnFlush) => Durability::OnFlush,
            Ok(proto::Durability::EveryWrite) => Durability::EveryWrite,
            Err(_) => return Err(MapError { field: "volumes.durability", entry }),
        };
        if volume.size_bytes > crate::limits::VOLUME_BYTES_MAX {
            return Err(MapError { field: "volumes.size_bytes", entry });
        }
        Ok(Self {
            id: VolumeId(volume.id),
            name: volume.name,
            lineage: Lineage(volume.lineage),
            layer: Layer(volume.layer),
            size_bytes: volume.size_bytes,
            pool: PoolId(narrow(volume.pool, "volumes.pool", entry)?),
            durability,
            policy: volume.policy,
            created_unix_ms: volume.created_unix_ms,
            attached_nodes: volume.attached_nodes.into_iter().map(NodeId).collect(),
        })
    }
}

impl From<&Volume> for proto::Volume {
    fn from(volume: &Volume) -> Self {
        Self {
            id: volume.id.0,
            name: volume.name.clone(),
            lineage: volume.lineage.0,
            layer: volume.layer.0,
            size_bytes: volume.size_bytes,
            pool: u32::from(volume.pool.0),
            durability: match volume.durability {
                Durability::OnFlush => proto::Durability::OnFlush,
                Durability::EveryWrite => proto::Durability::EveryWrite,
            } as i32,
            policy: volume.policy.clone(),
            created_unix_ms: volume.created_unix_ms,
            attached_nodes: volume.attached_nodes.iter().map(|node| node.0).collect(),
        }
    }
}
