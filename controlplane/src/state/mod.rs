//! The cluster's state: nodes, pools, groups and volumes, changed only by commands from Raft's log.
//!
//! `raft::state_machine` applies and stores it; everyone else reads snapshots of it. Deterministic: knows no
//! clock, no random number and no health of any node; two nodes that applied the same log are equal.
//!
//! Invariants
//! - The map version grows with every command that changed something, and with no other.
//! - Ids of nodes, volumes and pools are never given twice.
//! - Every group's members are nodes of the map; its primary is an acting member; its epoch only grows.
//!
//! Source: DESIGN.md, placement and replication.

pub mod command;
pub mod error;
mod group;
pub mod image;
mod life;
mod node;
pub mod scrub;
mod volume;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use xsan_protocol::ids::{GroupId, Lineage, MapVersion, NodeId, PoolId, VolumeId};
use xsan_protocol::limits::NAME_BYTES_MAX;
use xsan_protocol::map::ClusterMap;
use xsan_protocol::placement::Candidate;

use command::{Command, Reply};
use error::StateError;
use scrub::GroupScrubs;

use crate::timing::{DEEP_SCRUB_INTERVAL, OUT_AFTER, SCRUB_INTERVAL, SCRUB_RATE};

#[derive(Clone, Debug, PartialEq)]
pub struct ClusterState {
    map: ClusterMap,
    voters: BTreeSet<NodeId>,
    nodes: BTreeMap<NodeId, NodePrivate>,
    /// Map version at which each group's primary became primary: a member that acts on that map or a newer
    /// one can not take itself for the primary any more.
    primary_since: HashMap<GroupId, MapVersion>,
    /// The request that made each volume.
    requests: BTreeMap<VolumeId, u64>,
    scrubs: HashMap<GroupId, GroupScrubs>,
    settings: Settings,
    next: NextIds,
}

impl Default for ClusterState {
    fn default() -> Self {
        let next = NextIds::default();
        Self {
            map: ClusterMap { lineage_end: lineage_of(next.volume), ..ClusterMap::default() },
            voters: BTreeSet::new(),
            nodes: BTreeMap::new(),
            primary_since: HashMap::new(),
            requests: BTreeMap::new(),
            scrubs: HashMap::new(),
            settings: Settings::default(),
            next,
        }
    }
}

/// The lineage of a volume that is no clone.
fn lineage_of(volume: VolumeId) -> Lineage {
    Lineage(u64::from(volume.0))
}

/// What the map does not show of a node.
#[derive(Clone, Debug, Default, PartialEq)]
struct NodePrivate {
    instance: u64,
    /// Groups whose records the present life of its data process has lost.
    damaged: BTreeSet<GroupId>,
    maintenance: bool,
    departure: Departure,
}

/// How a node is on its way out of the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Departure {
    #[default]
    Stays,
    /// Its replicas move to the other nodes first.
    Leaving,
    /// It is dead and does not come back: what only it held is given up.
    Lost,
}

/// What an operator may set for the whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A node gone for this long is left out of placement.
    pub down_out_interval: Duration,
    /// That each shard reads of the groups it leads.
    pub scrub_bytes_per_second: u64,
    /// Zero: only when asked for.
    pub scrub_interval: Duration,
    pub deep_scrub_interval: Duration,
    /// Nodes far slower than their peers lead and act in no group that has enough members without them.
    pub demote_slow_nodes: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            down_out_interval: OUT_AFTER,
            scrub_bytes_per_second: SCRUB_RATE,
            scrub_interval: SCRUB_INTERVAL,
            deep_scrub_interval: DEEP_SCRUB_INTERVAL,
            demote_slow_nodes: false,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct NextIds {
    node: NodeId,
    volume: VolumeId,
    pool: PoolId,
}

impl Default for NextIds {
    fn default() -> Self {
        Self { node: NodeId(1), volume: VolumeId(1), pool: PoolId(1) }
    }
}

/// The objects that a command changed, so that only they are written to disk.
#[derive(Debug, Default, PartialEq)]
pub struct Touched {
    pub nodes: BTreeSet<NodeId>,
    pub pools: BTreeSet<PoolId>,
    pub groups: BTreeSet<GroupId>,
    pub volumes: BTreeSet<VolumeId>,
    /// They are in the head, which is written every time.
    pub settings: bool,
}

impl Touched {
    pub fn is_empty(&self) -> bool {
        let no_object = self.nodes.is_empty()
            && self.pools.is_empty()
            && self.groups.is_empty()
            && self.volumes.is_empty();
        no_object && !self.settings
    }

    pub fn add(&mut self, other: Self) {
        self.nodes.extend(other.nodes);
        self.pools.extend(other.pools);
        self.groups.extend(other.groups);
        self.volumes.extend(other.volumes);
        self.settings |= other.settings;
    }
}

impl ClusterState {
    pub const fn map(&self) -> &ClusterMap {
        &self.map
    }

    pub const fn version(&self) -> MapVersion {
        self.map.version
    }

    /// Map version at which the group's present primary became it.
    pub fn primary_since(&self, group: GroupId) -> MapVersion {
        self.primary_since.get(&group).copied().unwrap_or_default()
    }

    /// Did the present data process of `node` report the loss of records of `group`?
    pub fn is_damaged(&self, node: NodeId, group: GroupId) -> bool {
        self.nodes.get(&node).is_some_and(|private| private.damaged.contains(&group))
    }

    /// Applies one committed command. Refusals change nothing.
    pub fn apply(&mut self, command: &Command) -> (Reply, Touched) {
        let mut touched = Touched::default();
        let result = match command {
            Command::AddNode(new) => self.add_node(new, &mut touched),
            Command::DataStarted { node, process, damaged_stores, replaces } => {
                self.data_started(*node, process, damaged_stores, *replaces, &mut touched)
            }
            Command::StoreFailed { node, incarnation, store } => {
                self.store_failed(*node, *incarnation, *store, &mut touched)
            }
            Command::ReconfigureGroups(changes) => Ok(self.reconfigure(changes, &mut touched)),
            Command::CreateVolume(new) => self.create_volume(new, &mut touched),
            Command::ResizeVolume { name, size_bytes, allow_shrink } => {
                self.resize_volume(name, *size_bytes, *allow_shrink, &mut touched)
            }
            Command::DeleteVolume { volume } => self.delete_volume(*volume, &mut touched),
            Command::Attach { volume, node, incarnation } => {
                self.attach(volume, *node, *incarnation, &mut touched)
            }
            Command::Detach { volume, node, incarnation } => {
                self.detach(*volume, *node, *incarnation, &mut touched)
            }
            Command::SetMaintenance { node, on, force } => {
                self.set_maintenance(*node, *on, *force, &mut touched)
            }
            Command::LeaveNode { node, departure } => self.leave_node(*node, *departure, &mut touched),
            Command::RemoveNode { node } => self.remove_node(*node, &mut touched),
            Command::ChangeSettings(change) => self.change_settings(change, &mut touched),
            Command::WishScrubs { groups, wish } => Ok(self.wish_scrubs(groups, *wish, &mut touched)),
            Command::EndScrubs { unix_ms, ends } => Ok(self.end_scrubs(ends, *unix_ms, &mut touched)),
        };
        if !touched.is_empty() {
            self.map.version = self.next_version();
        }
        match result {
            Ok(reply) => (reply, touched),
            Err(error) => {
                assert!(touched.is_empty(), "a refused command changes nothing");
                (Reply::Refused(error.into()), touched)
            }
        }
    }

    /// Raft's membership changed: `voters` is the new set.
    pub fn set_voters(&mut self, voters: BTreeSet<NodeId>) -> Touched {
        let mut touched = Touched::default();
        for node in self.map.nodes.values_mut() {
            if node.voter != voters.contains(&node.id) {
                node.voter = !node.voter;
                touched.nodes.insert(node.id);
            }
        }
        self.voters = voters;
        if !touched.is_empty() {
            self.map.version = self.next_version();
        }
        touched
    }

    /// Nodes that can hold replicas: those with a store that works, but for `left_out` and those that leave.
    pub fn candidates(&self, left_out: &BTreeSet<NodeId>) -> Vec<Candidate> {
        let stays = |id| self.departure(id) == Departure::Stays && !left_out.contains(&id);
        let nodes = self.map.nodes.values().filter(|node| stays(node.id));
        nodes
            .filter_map(|node| {
                let data = node.data.as_ref()?;
                let working = data.stores.iter().filter(|store| !store.failed);
                let stores: Vec<_> = working.map(|store| (store.id, store.capacity_bytes)).collect();
                let failure_domain = node.failure_domain.clone();
                (!stores.is_empty()).then_some(Candidate { node: node.id, failure_domain, stores })
            })
            .collect()
    }

    /// The version that the command being applied leads to.
    fn next_version(&self) -> MapVersion {
        MapVersion(self.map.version.0 + 1)
    }
}

/// Names are shown in logs and file names, so they are plain.
fn check_name(what: &'static str, name: &str) -> Result<(), StateError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let valid = name.len() <= NAME_BYTES_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(plain);
    if valid { Ok(()) } else { Err(StateError::NameInvalid { what, name: name.to_owned() }) }
}

#[cfg(test)]
mod tests;
