//! Where a volume's blocks are: computed from the map, as every shard computes it.

use std::collections::BTreeSet;

use xsan_protocol::ids::{BlockIndex, GroupId, Lineage, PoolId};
use xsan_protocol::map;
use xsan_protocol::proto::{ClusterMap, Group, Member, Node, NodeStatus, Volume};
use xsan_protocol::units::BLOCK_SIZE;

/// A group of the volume's pool, and how many of the volume's blocks fall into it.
#[derive(Clone, Debug)]
pub struct GroupBlocks {
    pub group: Group,
    pub blocks: u64,
}

pub struct Layout {
    pub volume: Volume,
    pub replica_count: u32,
    pub min_replicas: u32,
    pub blocks: u64,
    pub groups: Vec<GroupBlocks>,
    pub serving: Serving,
}

/// Stores that work, each in the present life of a node that serves: number of the node, incarnation, store.
pub struct Serving(BTreeSet<(u32, u64, u64)>);

impl Serving {
    /// As the cluster's status says.
    pub fn of(nodes: &[NodeStatus]) -> Self {
        let up = nodes.iter().filter(|status| status.state == "up").filter_map(|status| status.node.as_ref());
        let stores = up.filter_map(|node| Some((node.id, node.data.as_ref()?))).flat_map(|(node, data)| {
            let working = data.stores.iter().filter(|store| !store.failed);
            working.map(move |store| (node, data.incarnation, store.id))
        });
        Self(stores.collect())
    }

    fn has(&self, member: &Member) -> bool {
        self.0.contains(&(member.node, member.incarnation, member.store))
    }
}

/// The state of a group in one word. The map alone does not tell: it stays as it is when nobody is left to go on.
pub fn state(group: &Group, serving: &Serving, replica_count: u32, min_replicas: u32) -> &'static str {
    let acts = |member: &&Member| !member.learner && serving.has(member);
    let acting = group.members.iter().filter(acts).count() as u32;
    if group.primary == 0 || acting < min_replicas {
        "inactive"
    } else if acting < replica_count {
        "degraded"
    } else if group.members.iter().any(|member| member.learner) {
        "resyncing"
    } else {
        "healthy"
    }
}

/// The same, with the counts of its pool in the map.
pub fn state_in(map: &ClusterMap, group: &Group, serving: &Serving) -> &'static str {
    let id = u32::from(GroupId(group.id).pool().0);
    let pool = map.pools.iter().find(|pool| pool.id == id).copied().unwrap_or_default();
    state(group, serving, pool.replica_count, pool.min_replicas)
}

/// Counts the blocks of `volume` in each group of its pool.
pub fn of(volume: &Volume, map: &ClusterMap, nodes: &[NodeStatus]) -> Layout {
    let blocks = volume.size_bytes.div_ceil(BLOCK_SIZE as u64);
    let pool = map.pools.iter().find(|pool| pool.id == volume.pool).copied().unwrap_or_default();
    let mut counts = vec![0; pool.group_count as usize];
    // A map from a newer cluster may hold numbers that this release can not compute with: then nothing is counted.
    if let (Ok(id), Ok(group_count)) = (u16::try_from(pool.id), u16::try_from(pool.group_count))
        && group_count > 0
    {
        let hash = map::Pool { id: PoolId(id), replica_count: 0, min_replicas: 0, group_count };
        for index in 0..u32::try_from(blocks).unwrap_or(u32::MAX) {
            let group = hash.group_of(Lineage(volume.lineage), BlockIndex(index));
            counts[usize::from(group.index())] += 1;
        }
    }
    let groups = map.groups.iter().filter(|group| u32::from(GroupId(group.id).pool().0) == pool.id);
    let groups = groups.map(|group| GroupBlocks {
        blocks: counts.get(usize::from(GroupId(group.id).index())).copied().unwrap_or_default(),
        group: group.clone(),
    });
    Layout {
        volume: volume.clone(),
        replica_count: pool.replica_count,
        min_replicas: pool.min_replicas,
        blocks,
        groups: groups.collect(),
        serving: Serving::of(nodes),
    }
}

impl Layout {
    pub fn state(&self, group: &Group) -> &'static str {
        state(group, &self.serving, self.replica_count, self.min_replicas)
    }

    /// Groups in each state, in the order that an operator cares about.
    pub fn states(&self) -> Vec<(&'static str, usize)> {
        ["inactive", "degraded", "resyncing", "healthy"]
            .into_iter()
            .map(|word| {
                let of_state = self.groups.iter().filter(|g| self.state(&g.group) == word);
                (word, of_state.count())
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Blocks that `node` is primary of, and that it holds a replica of.
    pub fn blocks_of(&self, node: &Node) -> (u64, u64) {
        let primary = self.groups.iter().filter(|g| g.group.primary == node.id).map(|g| g.blocks).sum();
        let holds = |g: &&GroupBlocks| g.group.members.iter().any(|member| member.node == node.id);
        (primary, self.groups.iter().filter(holds).map(|g| g.blocks).sum())
    }
}

/// Name of a node in the map.
pub fn name_of(map: &ClusterMap, id: u32) -> String {
    match map.nodes.iter().find(|node| node.id == id) {
        Some(node) => node.name.clone(),
        None if id == 0 => String::new(),
        None => format!("node {id}"),
    }
}
