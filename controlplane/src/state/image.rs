//! The state as records: object by object for the store of the applied state, whole for snapshots.
//!
//! Used by `raft::state_machine`. A key is one letter and the object's id, big-endian; a record is its message
//! of `raft.proto`.
//!
//! Invariants
//! - `ClusterState::load` of every record of a state is that state again.

use std::collections::BTreeSet;
use std::time::Duration;

use prost::Message;
use xsan_protocol::ids::{GroupId, MapVersion, NodeId, PoolId, VolumeId};
use xsan_protocol::map::{Group, MapError, Node, Pool, Volume};
use xsan_protocol::proto;

use super::command::{SettingsChange, milliseconds};
use super::scrub::GroupScrubs;
use super::{ClusterState, Departure, NextIds, NodePrivate, Touched, lineage_of};

/// Names a record of the applied state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Head,
    Node(NodeId),
    Pool(PoolId),
    Group(GroupId),
    Volume(VolumeId),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("a record does not decode")]
    Encoding,
    #[error("a record has a key of {length} bytes that is none of the known ones")]
    Key { length: usize },
    #[error("{0}")]
    Map(#[from] MapError),
    #[error("{field} is missing or out of range")]
    Field { field: &'static str },
}

impl Key {
    pub fn encode(self) -> Vec<u8> {
        let (letter, id) = match self {
            Self::Head => (b'h', 0),
            Self::Node(id) => (b'n', id.0),
            Self::Pool(id) => (b'p', u32::from(id.0)),
            Self::Group(id) => (b'g', id.0),
            Self::Volume(id) => (b'v', id.0),
        };
        let mut bytes = vec![letter];
        bytes.extend_from_slice(&id.to_be_bytes());
        bytes
    }
}

impl ClusterState {
    /// The head and every touched object: its record, or `None` when it is gone.
    pub fn records(&self, touched: &Touched) -> Vec<(Key, Option<Vec<u8>>)> {
        let mut records = vec![(Key::Head, Some(self.head().encode_to_vec()))];
        let node = |id: &NodeId| (Key::Node(*id), self.node_record(*id).map(|r| r.encode_to_vec()));
        let pool = |id: &PoolId| {
            (Key::Pool(*id), self.map.pools.get(id).map(|p| proto::Pool::from(p).encode_to_vec()))
        };
        let group = |id: &GroupId| (Key::Group(*id), self.group_record(*id).map(|r| r.encode_to_vec()));
        let volume = |id: &VolumeId| (Key::Volume(*id), self.volume_record(*id).map(|r| r.encode_to_vec()));
        records.extend(touched.nodes.iter().map(node));
        records.extend(touched.pools.iter().map(pool));
        records.extend(touched.groups.iter().map(group));
        records.extend(touched.volumes.iter().map(volume));
        records
    }

    /// Every object, as if all had been touched.
    pub fn all(&self) -> Touched {
        Touched {
            nodes: self.map.nodes.keys().copied().collect(),
            pools: self.map.pools.keys().copied().collect(),
            groups: self.map.groups.keys().copied().collect(),
            volumes: self.map.volumes.keys().copied().collect(),
            settings: true,
        }
    }

    pub fn image(&self) -> proto::StateImage {
        let mut groups: Vec<_> = self.map.groups.keys().copied().collect();
        groups.sort_unstable();
        proto::StateImage {
            head: Some(self.head()),
            nodes: self.map.nodes.keys().filter_map(|id| self.node_record(*id)).collect(),
            pools: self.map.pools.values().map(proto::Pool::from).collect(),
            groups: groups.into_iter().filter_map(|id| self.group_record(id)).collect(),
            volumes: self.map.volumes.keys().filter_map(|id| self.volume_record(*id)).collect(),
        }
    }

    /// # Errors
    /// The image is damaged, or of a newer release.
    pub fn from_image(image: proto::StateImage) -> Result<Self, ImageError> {
        let mut state = Self::default();
        state.load_head(image.head.ok_or(ImageError::Field { field: "head" })?)?;
        image.nodes.into_iter().try_for_each(|record| state.load_node(record))?;
        image.pools.into_iter().try_for_each(|pool| state.load_pool(pool))?;
        image.groups.into_iter().try_for_each(|record| state.load_group(record))?;
        image.volumes.into_iter().try_for_each(|record| state.load_volume(record))?;
        state.check()?;
        Ok(state)
    }

    /// Rebuilds the state from its records, in any order.
    ///
    /// # Errors
    /// A record is damaged, or they do not hold together.
    pub fn load<'a>(records: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Result<Self, ImageError> {
        let mut state = Self::default();
        for (key, value) in records {
            match key.first() {
                Some(b'h') => state.load_head(decode(value)?)?,
                Some(b'n') => state.load_node(decode(value)?)?,
                Some(b'p') => state.load_pool(decode(value)?)?,
                Some(b'g') => state.load_group(decode(value)?)?,
                Some(b'v') => state.load_volume(decode(value)?)?,
                _ => return Err(ImageError::Key { length: key.len() }),
            }
        }
        state.check()?;
        Ok(state)
    }

    /// The records hold together as a map does.
    fn check(&self) -> Result<(), ImageError> {
        let map = xsan_protocol::map::ClusterMap::try_from(proto::ClusterMap::from(&self.map))?;
        assert_eq!(map, self.map, "a map is the same after its message");
        Ok(())
    }

    fn head(&self) -> proto::StateHead {
        proto::StateHead {
            map_version: self.map.version.0,
            cluster_id: self.map.cluster_id.clone(),
            next_node: self.next.node.0,
            next_volume: self.next.volume.0,
            next_pool: u32::from(self.next.pool.0),
            voters: self.voters.iter().map(|node| node.0).collect(),
            down_out_interval_ms: milliseconds(self.settings.down_out_interval),
            scrub_bytes_per_second: Some(self.settings.scrub_bytes_per_second),
            scrub_interval_ms: Some(milliseconds(self.settings.scrub_interval)),
            deep_scrub_interval_ms: Some(milliseconds(self.settings.deep_scrub_interval)),
            demote_slow_nodes: self.settings.demote_slow_nodes,
        }
    }

    fn node_record(&self, id: NodeId) -> Option<proto::NodeRecord> {
        let node = self.map.nodes.get(&id)?;
        let private = self.nodes.get(&id).expect("every node of the map has a private part");
        Some(proto::NodeRecord {
            node: Some(node.into()),
            instance: private.instance,
            damaged: private.damaged.iter().map(|group| group.0).collect(),
            maintenance: private.maintenance,
            departure: proto::Departure::from(private.departure) as i32,
        })
    }

    fn group_record(&self, id: GroupId) -> Option<proto::GroupRecord> {
        let group = self.map.groups.get(&id)?;
        let scrubs = self.scrubs(id);
        Some(proto::GroupRecord {
            group: Some(group.into()),
            primary_since: self.primary_since(id).0,
            light_scrub_unix_ms: scrubs.light_unix_ms,
            deep_scrub_unix_ms: scrubs.deep_unix_ms,
            last_light_scrub: scrubs.last_light,
            last_deep_scrub: scrubs.last_deep,
            scrub_wish: scrubs.wish,
        })
    }

    fn volume_record(&self, id: VolumeId) -> Option<proto::VolumeRecord> {
        let volume = self.map.volumes.get(&id)?;
        let request = self.requests.get(&id).copied().unwrap_or_default();
        Some(proto::VolumeRecord { volume: Some(volume.into()), request })
    }

    fn load_head(&mut self, head: proto::StateHead) -> Result<(), ImageError> {
        let pool = u16::try_from(head.next_pool).map_err(|_| ImageError::Field { field: "next_pool" })?;
        let change = SettingsChange {
            down_out_interval: Some(head.down_out_interval_ms)
                .filter(|interval| *interval != 0)
                .map(Duration::from_millis),
            scrub_bytes_per_second: head.scrub_bytes_per_second,
            scrub_interval: head.scrub_interval_ms.map(Duration::from_millis),
            deep_scrub_interval: head.deep_scrub_interval_ms.map(Duration::from_millis),
            demote_slow_nodes: Some(head.demote_slow_nodes),
        };
        self.change_settings(&change, &mut Touched::default())
            .map_err(|_| ImageError::Field { field: "settings" })?;
        self.map.version = MapVersion(head.map_version);
        self.map.cluster_id = head.cluster_id;
        self.voters = head.voters.into_iter().map(NodeId).collect::<BTreeSet<_>>();
        self.next =
            NextIds { node: NodeId(head.next_node), volume: VolumeId(head.next_volume), pool: PoolId(pool) };
        self.map.lineage_end = lineage_of(self.next.volume);
        Ok(())
    }

    fn load_node(&mut self, record: proto::NodeRecord) -> Result<(), ImageError> {
        let node = Node::try_from(record.node.ok_or(ImageError::Field { field: "node" })?)?;
        let damaged = record.damaged.into_iter().map(GroupId).collect();
        let departure =
            Departure::from_number(record.departure).ok_or(ImageError::Field { field: "departure" })?;
        let private =
            NodePrivate { instance: record.instance, damaged, maintenance: record.maintenance, departure };
        self.nodes.insert(node.id, private);
        self.map.nodes.insert(node.id, node);
        Ok(())
    }

    fn load_pool(&mut self, pool: proto::Pool) -> Result<(), ImageError> {
        let pool = Pool::try_from(pool)?;
        self.map.pools.insert(pool.id, pool);
        Ok(())
    }

    fn load_group(&mut self, record: proto::GroupRecord) -> Result<(), ImageError> {
        let group = Group::try_from(record.group.ok_or(ImageError::Field { field: "group" })?)?;
        let scrubs = GroupScrubs {
            light_unix_ms: record.light_scrub_unix_ms,
            deep_unix_ms: record.deep_scrub_unix_ms,
            last_light: record.last_light_scrub,
            last_deep: record.last_deep_scrub,
            wish: record.scrub_wish,
        };
        self.set_scrubs(group.id, scrubs);
        self.primary_since.insert(group.id, MapVersion(record.primary_since));
        self.map.groups.insert(group.id, group);
        Ok(())
    }

    fn load_volume(&mut self, record: proto::VolumeRecord) -> Result<(), ImageError> {
        let volume = Volume::try_from(record.volume.ok_or(ImageError::Field { field: "volume" })?)?;
        self.requests.insert(volume.id, record.request);
        self.map.volumes.insert(volume.id, volume);
        Ok(())
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, ImageError> {
    M::decode(bytes).map_err(|_| ImageError::Encoding)
}
