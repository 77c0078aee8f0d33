//! What may change in the groups when all is well: primaries and replicas go where they belong, a few at a time.

use xsan_protocol::map::{Group, Member, Pool};

use super::{Memory, Standing, View};
use crate::lease::Health;
use crate::state::command::GroupChange;
use crate::timing::{BALANCE_AFTER, BALANCE_INTERVAL};

/// Primaries moved in one step: each pauses its group for one round of peering.
const PRIMARIES_PER_STEP: usize = 8;
/// Groups that may be moving a replica at once, so that resync leaves room for clients.
const MOVES_MAX: usize = 16;

/// Changes for balance; none unless every group has been well for some seconds.
pub fn balance(view: &View<'_>, memory: &mut Memory) -> Vec<GroupChange> {
    let map = view.state.map();
    let groups = || map.pools.values().flat_map(|pool| pool.groups().map(move |id| (pool, &map.groups[&id])));
    let mut moving = 0;
    for (pool, group) in groups() {
        match condition(view, pool, group) {
            Condition::Well => {}
            Condition::Moving => moving += 1,
            Condition::Unwell => {
                memory.well_since = None;
                return Vec::new();
            }
        }
    }
    let since = *memory.well_since.get_or_insert(view.now);
    let due = view.now.since(memory.balanced_at) >= BALANCE_INTERVAL;
    if view.now.since(since) < BALANCE_AFTER || !due {
        return Vec::new();
    }
    memory.balanced_at = view.now;
    let moves =
        groups().filter_map(|(_, group)| move_replica(view, group)).take(MOVES_MAX - moving.min(MOVES_MAX));
    let mut changes: Vec<GroupChange> = moves.collect();
    let taken: Vec<_> = changes.iter().map(|change| change.group).collect();
    let primaries = groups()
        .filter(|(_, group)| !taken.contains(&group.id))
        .filter_map(|(_, group)| move_primary(view, group));
    changes.extend(primaries.take(PRIMARIES_PER_STEP));
    changes
}

enum Condition {
    Well,
    /// Has all its replicas, and a learner where one is to move.
    Moving,
    Unwell,
}

fn condition(view: &View<'_>, pool: &Pool, group: &Group) -> Condition {
    let healthy = |member: &Member| {
        let up = view.nodes.get(&member.node).is_some_and(|node| node.health == Health::Up);
        up && view.standing(member) == Standing::Live
    };
    // A slow node's replica acts when it is needed.
    let held = group.learners().filter(|learner| view.is_slow(learner.node)).count();
    let acting = group.acting().count();
    let wanted = usize::from(pool.replica_count).min(view.targets.get(&group.id).map_or(0, Vec::len));
    if acting + held < wanted.max(1) || !group.is_settled() || !group.members.iter().all(healthy) {
        return Condition::Unwell;
    }
    if group.learners().count() > held || acting > usize::from(pool.replica_count) {
        return Condition::Moving;
    }
    Condition::Well
}

/// The preferred primary takes over, if it acts; in the place of one in maintenance, or slow, the next one is preferred.
fn move_primary(view: &View<'_>, group: &Group) -> Option<GroupChange> {
    let targets = view.targets.get(&group.id)?.iter().map(|target| target.node);
    let preferred = targets.into_iter().find(|node| !view.is_relieved(*node))?;
    let acts = group.acting().any(|member| member.node == preferred);
    let settled = group.learners().count() == 0;
    (acts && settled && group.primary != Some(preferred)).then(|| GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: Some(preferred),
        members: group.members.clone(),
        settle: false,
    })
}

/// A learner where the group belongs and is not; once promoted, `decide` lets the surplus member go.
fn move_replica(view: &View<'_>, group: &Group) -> Option<GroupChange> {
    if group.learners().any(|learner| !view.is_slow(learner.node)) {
        return None;
    }
    let targets = view.targets.get(&group.id)?;
    let missing =
        targets.iter().find(|target| group.member(target.node).is_none() && !view.is_slow(target.node))?;
    let learner = view.member(group.id, missing.node, missing.store, true)?;
    let mut members = group.members.clone();
    members.push(learner);
    Some(GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: group.primary,
        members,
        settle: false,
    })
}
