//! Commands about the life of a cluster: nodes in maintenance, nodes that leave, settings.
//!
//! What they lead to is done by `placement` (replicas and primaries move) and `membership::voters` (the node goes).
//! What depends on the health of other nodes is checked before, by `api::life`: this file knows the state alone.
//!
//! Invariants
//! - A node leaves the map only when it is a member of no group and votes no more; unless it is given up for lost, it
//!   serves no client either.

use xsan_protocol::ids::{GroupId, NodeId};
use xsan_protocol::map::{Group, Pool};
use xsan_protocol::placement;

use super::command::{Reply, SettingsChange, milliseconds};
use super::error::StateError;
use super::scrub::check_settings;
use super::{ClusterState, Departure, NodePrivate, Settings, Touched};
use crate::timing::{DOWN_OUT_MAX, DOWN_OUT_MIN};

impl ClusterState {
    pub fn is_in_maintenance(&self, node: NodeId) -> bool {
        self.nodes.get(&node).is_some_and(|private| private.maintenance)
    }

    pub fn departure(&self, node: NodeId) -> Departure {
        self.nodes.get(&node).map_or(Departure::Stays, |private| private.departure)
    }

    /// Is another node the better primary?
    pub fn avoids(&self, node: NodeId) -> bool {
        self.is_in_maintenance(node) || self.departure(node) != Departure::Stays
    }

    /// Was a node with that number a member once, and is no more? Numbers are never given twice.
    pub fn was_removed(&self, node: NodeId) -> bool {
        node.0 != 0 && node < self.next.node && !self.map.nodes.contains_key(&node)
    }

    pub const fn settings(&self) -> Settings {
        self.settings
    }

    /// Every group, with its pool.
    pub fn groups(&self) -> impl Iterator<Item = (&Pool, &Group)> {
        let map = &self.map;
        map.pools.values().flat_map(move |pool| pool.groups().map(move |id| (pool, &map.groups[&id])))
    }

    /// Is `node` a member of any group, or was it since the last settled epoch of one?
    pub fn has_replicas(&self, node: NodeId) -> bool {
        let mut groups = self.map.groups.values();
        groups.any(|group| group.replicas().any(|member| member.node == node))
    }

    /// Groups that have an acting member on `node`, and without it fewer than `min_replicas` on nodes that `serve`.
    pub fn stopped_without(&self, node: NodeId, serves: impl Fn(NodeId) -> bool) -> Vec<GroupId> {
        let stops = |(pool, group): &(&Pool, &Group)| {
            let acts = group.acting().any(|member| member.node == node);
            let others = group.acting().filter(|member| member.node != node && serves(member.node)).count();
            acts && others < usize::from(pool.min_replicas)
        };
        self.groups().filter(stops).map(|(_, group)| group.id).collect()
    }

    fn private_mut(&mut self, id: NodeId) -> Result<(&mut NodePrivate, String), StateError> {
        let missing = StateError::NodeNotFound { node: id };
        let name = self.map.nodes.get(&id).map(|node| node.name.clone());
        match (self.nodes.get_mut(&id), name) {
            (Some(private), Some(name)) => Ok((private, name)),
            _ => Err(missing),
        }
    }

    pub(super) fn set_maintenance(
        &mut self,
        id: NodeId,
        on: bool,
        force: bool,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let (private, name) = self.private_mut(id)?;
        if private.maintenance == on {
            return Ok(Reply::Done);
        }
        if on && !force {
            // Every node in maintenance may be down at any time, so they count together.
            let groups = self.stopped_without(id, |node| !self.is_in_maintenance(node)).len();
            if groups > 0 {
                return Err(StateError::MaintenanceStopsIo { name, groups });
            }
        }
        self.private_mut(id)?.0.maintenance = on;
        touched.nodes.insert(id);
        Ok(Reply::Done)
    }

    /// A node begins to leave, is given up, or stays after all.
    pub(super) fn leave_node(
        &mut self,
        id: NodeId,
        departure: Departure,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let (private, name) = self.private_mut(id)?;
        if private.departure == departure {
            return Ok(Reply::Done);
        }
        if departure != Departure::Stays {
            let stays = |node: &&NodeId| **node != id && self.departure(**node) == Departure::Stays;
            if !self.map.nodes.keys().any(|node| stays(&node)) {
                return Err(StateError::LastNode { name });
            }
        }
        if departure == Departure::Leaving {
            let candidates = self.candidates(&[id].into());
            for pool in self.map.pools.values() {
                placement::place(pool, &candidates)
                    .map_err(|error| StateError::NodeNeeded { name: name.clone(), error })?;
            }
        }
        self.private_mut(id)?.0.departure = departure;
        touched.nodes.insert(id);
        Ok(Reply::Done)
    }

    /// A node that was asked to leave, and holds nothing any more, is gone from the map. May be asked again.
    pub(super) fn remove_node(&mut self, id: NodeId, touched: &mut Touched) -> Result<Reply, StateError> {
        if self.was_removed(id) {
            return Ok(Reply::Done);
        }
        let (private, name) = self.private_mut(id)?;
        let departure = private.departure;
        let attached = |volume: &xsan_protocol::map::Volume| volume.attached_nodes.contains(&id);
        let busy = |reason| Err(StateError::NodeBusy { name: name.clone(), reason });
        if departure == Departure::Stays {
            return Err(StateError::NodeStays { name });
        }
        if self.has_replicas(id) {
            return busy("it has replicas");
        }
        if self.voters.contains(&id) {
            return busy("it votes in Raft");
        }
        if departure == Departure::Leaving && self.map.volumes.values().any(attached) {
            return busy("a volume is attached there");
        }
        for volume in self.map.volumes.values_mut().filter(|volume| attached(volume)) {
            volume.attached_nodes.retain(|node| *node != id);
            touched.volumes.insert(volume.id);
        }
        self.map.nodes.remove(&id);
        self.nodes.remove(&id);
        touched.nodes.insert(id);
        Ok(Reply::Done)
    }

    pub(super) fn change_settings(
        &mut self,
        change: &SettingsChange,
        touched: &mut Touched,
    ) -> Result<Reply, StateError> {
        let intervals = DOWN_OUT_MIN..=DOWN_OUT_MAX;
        if let Some(interval) = change.down_out_interval.filter(|interval| !intervals.contains(interval)) {
            return Err(StateError::SettingInvalid {
                field: "down-out-interval",
                value: milliseconds(interval),
                unit: "ms",
                min: milliseconds(DOWN_OUT_MIN),
                max: milliseconds(DOWN_OUT_MAX),
            });
        }
        check_settings(change)?;
        let before = self.settings;
        let SettingsChange {
            down_out_interval,
            scrub_bytes_per_second,
            scrub_interval,
            deep_scrub_interval,
            demote_slow_nodes,
        } = *change;
        self.settings = Settings {
            down_out_interval: down_out_interval.unwrap_or(before.down_out_interval),
            scrub_bytes_per_second: scrub_bytes_per_second.unwrap_or(before.scrub_bytes_per_second),
            scrub_interval: scrub_interval.unwrap_or(before.scrub_interval),
            deep_scrub_interval: deep_scrub_interval.unwrap_or(before.deep_scrub_interval),
            demote_slow_nodes: demote_slow_nodes.unwrap_or(before.demote_slow_nodes),
        };
        touched.settings = self.settings != before;
        Ok(Reply::Done)
    }
}
