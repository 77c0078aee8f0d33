//! Reclaim: space of what is not needed any more.
//!
//! Blocks of deleted volumes are zeroed by the primary of their group, as writes of the group's order. The replica of a
//! group that has moved to another node or store is a leftover, and emptied by the node that it has left, on its own.
//!
//! Invariants
//! - A lineage is deleted when the map has given it out and no volume has it: one that a newer map gives out is not.
//! - A leftover is emptied only while its group is whole without it: a node that comes back keeps what it has, to be
//!   brought up to date by difference.
//! - A leftover that is being emptied has no journal: it is never taken for a replica that has one.
//!
//! Used by `Replication` (what to reclaim) and `group` (at ticks).

use std::collections::BTreeSet;

use xsan_protocol::ids::{BlockKey, GroupId, Lineage, NodeId, Seq, StoreId, Version};
use xsan_protocol::map::{self, ClusterMap};
use xsan_protocol::units::{PAGES_PER_BLOCK, PageRange, UNITS_PER_BLOCK};

use super::action::Action;
use super::call::Call;
use super::group::Group;
use super::replica::Replica;
use crate::store::Record;

/// Blocks looked at in one tick of a group.
const BLOCKS_SCANNED: usize = 256;
/// Blocks zeroed in one tick of a group: clients' writes are to be held up by few.
const BLOCKS_ZEROED: usize = 16;

/// Which lineages volumes have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Lineages {
    used: BTreeSet<Lineage>,
    /// The first that was not given out yet.
    end: Lineage,
}

impl Lineages {
    pub fn of(map: &ClusterMap) -> Self {
        let used = map.volumes.values().map(|volume| volume.lineage).collect();
        Self { used, end: map.lineage_end }
    }

    fn is_deleted(&self, lineage: Lineage) -> bool {
        lineage < self.end && !self.used.contains(&lineage)
    }

    /// Has any lineage been deleted since `before`?
    pub fn lost_any_of(&self, before: &Self) -> bool {
        before.used.iter().any(|lineage| self.is_deleted(*lineage))
    }
}

/// Is what `store` of `node` holds of the group of any use, or may it be soon?
pub(super) fn is_needed(map: &ClusterMap, group: GroupId, node: NodeId, store: StoreId) -> bool {
    let (Some(group), Some(pool)) = (map.groups.get(&group), map.pools.get(&group.pool())) else {
        return true;
    };
    let here = |member: &map::Member| member.node == node && member.store == store;
    let whole = group.acting().count() >= usize::from(pool.replica_count);
    !whole || !group.is_settled() || group.members.iter().any(here)
}

/// What a store holds of a group that the map does not have there.
#[derive(Debug)]
pub(super) struct Leftover {
    pub replica: Replica,
    /// It is of no use any more, by the newest map.
    pub is_emptied: bool,
}

impl Leftover {
    /// Empties it, a few blocks at a time; `true` when nothing is left.
    pub fn on_tick(&mut self, call: &mut Call<'_>) -> bool {
        let Self { replica, is_emptied } = self;
        if !*is_emptied || !replica.is_settled() || !replica.is_view_fresh(call.core.turn) {
            replica.retry_refused(call);
            replica.trim(call.core.turn, Seq(u64::MAX));
            return false;
        }
        if replica.last != Version::ZERO {
            // What was never acknowledged would hold its place in the journal for ever; and what was is worth nothing
            // without the blocks.
            replica.reset(call, Version::ZERO);
            return false;
        }
        let view = call.stores.view(replica.store);
        let blocks = view.blocks_after(replica.group, None, BLOCKS_ZEROED);
        let mut empty = Vec::new();
        for (key, _) in &blocks {
            let versions = view.unit_versions(replica.group, *key);
            let held = (0..UNITS_PER_BLOCK).filter(|unit| versions[*unit] != Version::ZERO);
            empty.extend(held.map(|unit| (*key, unit as u8)));
        }
        replica.touch(call.core.turn);
        for (key, unit) in empty {
            let record = Record::Push {
                token: call.core.fresh_token(),
                group: replica.group,
                key,
                unit,
                version: Version::ZERO,
                as_of: replica.applied,
                data: None,
                lost: 0,
            };
            call.out.push(Action::Append { store: replica.store, record });
        }
        blocks.is_empty()
    }
}

/// Where a primary is in its search for blocks of deleted volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Search {
    Done,
    /// Behind this block; `None`: at the first.
    After(Option<BlockKey>),
}

impl Group {
    /// Volumes were deleted, or may have been before this node led the group.
    pub(super) fn search_for_deleted(&mut self, call: &mut Call<'_>) {
        if let Some(primary) = &mut self.primary {
            primary.search = Search::After(None);
            call.core.ticking.insert(self.id);
        }
    }

    /// Zeroes some blocks of deleted volumes.
    pub(super) fn go_on_searching(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &self.primary else { return };
        let Search::After(mut after) = primary.search else { return };
        if !primary.is_active() || !primary.serves() || !call.has_lease() {
            return;
        }
        let view = call.stores.view(self.replica.store);
        let found = view.blocks_after(self.id, after, BLOCKS_SCANNED);
        let complete = found.len() < BLOCKS_SCANNED;
        let mut zeroed = 0;
        for (key, _) in found {
            if call.core.lineages.is_deleted(key.lineage) {
                if zeroed == BLOCKS_ZEROED || !self.zero_block(call, key) {
                    return self.set_search(Search::After(after));
                }
                zeroed += 1;
            }
            after = Some(key);
        }
        self.set_search(if complete { Search::Done } else { Search::After(after) });
    }

    fn set_search(&mut self, search: Search) {
        if let Some(primary) = &mut self.primary {
            primary.search = search;
        }
    }

    /// Zeroes a whole block in the group's order, for nobody; `false` when that has to wait.
    fn zero_block(&mut self, call: &mut Call<'_>, key: BlockKey) -> bool {
        let pages = PageRange::new(0, PAGES_PER_BLOCK as u16);
        let free = self.primary.as_ref().is_some_and(|primary| primary.takes_writes_of(key, pages));
        if !free || call.stores.view(self.replica.store).admit(0).is_err() {
            return false;
        }
        self.sequence(call, None, key, pages, None, false, map::Durability::OnFlush);
        true
    }
}
