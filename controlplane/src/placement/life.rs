//! What an operator's wishes change in the groups: primaries leave nodes in maintenance and slow ones, and groups go on without
//! nodes that are given up for lost.
//!
//! Run by `planner` after `decide`, for groups that it leaves as they are. Replicas of a node that leaves move by
//! `balance`, because it is no target any more.
//!
//! Invariants
//! - A group goes on without a lost node only when no member is left that could still serve, or come back and be told.

use std::collections::BTreeSet;

use xsan_protocol::ids::GroupId;
use xsan_protocol::map::{Group, Member};

use super::decide::sources;
use super::{PrimaryCounts, Standing, View};
use crate::lease::Health;
use crate::state::command::GroupChange;

/// Primaries that hand over in one batch: each pauses its group for one round of peering, and the next batch waits
/// until this one is committed.
const RELIEVED_PER_STEP: usize = 32;

/// Changes of the groups that are not in `taken`.
pub fn follow_wishes(view: &View<'_>, taken: &[GroupChange]) -> Vec<GroupChange> {
    let taken: BTreeSet<GroupId> = taken.iter().map(|change| change.group).collect();
    let is_free = |group: &&Group| !taken.contains(&group.id);
    let groups = || view.state.groups().map(|(_, group)| group).filter(is_free);
    let mut changes: Vec<GroupChange> = groups().filter_map(|group| go_on_without(view, group)).collect();
    let mut counts = PrimaryCounts::of(view.state);
    let relieved = groups().filter_map(|group| {
        let change = relieve(view, group, &counts)?;
        counts.moved(group.primary, change.primary);
        Some(change)
    });
    changes.extend(relieved.take(RELIEVED_PER_STEP));
    changes
}

/// Another live acting member takes over from a primary that is in maintenance, or slow. Not before the epoch is settled:
/// it may be the only one whose journal the group can go on from, and would be given the lead again.
fn relieve(view: &View<'_>, group: &Group, counts: &PrimaryCounts) -> Option<GroupChange> {
    let primary = group.primary.filter(|primary| group.is_settled() && view.is_relieved(*primary))?;
    let able = |member: &&Member| {
        let up = view.nodes.get(&member.node).is_some_and(|node| node.health == Health::Up);
        up && view.standing(member) == Standing::Live && !view.state.is_in_maintenance(member.node)
    };
    let able = || group.acting().filter(able).map(|member| member.node);
    let quick = || able().filter(|node| !view.is_slow(*node));
    // One that leaves the cluster would soon hand over again. Maintenance does not wait for one that is not slow.
    let to = counts
        .least(quick().filter(|node| !view.avoids(*node)))
        .or_else(|| counts.least(quick()))
        .or_else(|| counts.least(able().filter(|_| view.state.is_in_maintenance(primary))))?;
    Some(GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: Some(to),
        members: group.members.clone(),
        settle: false,
    })
}

/// The operator gave up a node that had what nobody else has: the group goes on with what is left.
///
/// That is, in this order: holders that are back, with intact newcomers beside them; newcomers alone; learners, which hold a part; empty
/// replicas. Empty ones never act beside others: they would pass for a source.
fn go_on_without(view: &View<'_>, group: &Group) -> Option<GroupChange> {
    let rest: Vec<&Member> = group.holders().filter(|member| !view.is_given_up(member)).collect();
    let is_live = |member: &Member| view.standing(member) == Standing::Live;
    // With a holder `decide` goes on, and with a whole acting set the primary does.
    let serves = group.holders().any(is_live) || group.acting().all(is_live);
    let waits = rest.iter().any(|member| view.standing(member) != Standing::Back);
    if serves || waits || rest.len() == group.holders().count() {
        return None;
    }
    let renewed = |member: &Member| view.renewed(group.id, member, false);
    let mut members: Vec<Member> = rest.iter().filter_map(|member| renewed(member)).collect();
    members.extend(view.intact_newcomers(group)?);
    members = sources(members);
    if members.is_empty() {
        members = sources(newcomers_with_losses(view, group)?);
    }
    if members.is_empty() {
        members = sources(group.learners().filter_map(renewed).collect());
    }
    if members.is_empty() {
        members = first_members(view, group.id);
    }
    let stays = |member: &Member| members.iter().any(|other| other.node == member.node);
    if group.acting().any(|member| !stays(member) && !view.may_leave(group, member)) {
        return None;
    }
    let primary = members.iter().map(|member| member.node).min_by_key(|node| (view.avoids(*node), *node));
    let primary = primary?;
    tracing::warn!(group = %group.id, %primary, "the group goes on without the node that was given up");
    let (group, expected, primary) = (group.id, group.epoch, Some(primary));
    Some(GroupChange { group, expected, primary, members, settle: false })
}

/// The newcomers, when all of them are back; `None` while one is not.
fn newcomers_with_losses(view: &View<'_>, group: &Group) -> Option<Vec<Member>> {
    let back = |member: &Member| {
        let is_back = view.standing(member) == Standing::Back;
        view.renewed(group.id, member, false).filter(|_| is_back)
    };
    group.newcomers().filter(|newcomer| !view.is_given_up(newcomer)).map(back).collect()
}

/// Empty replicas where the group belongs.
fn first_members(view: &View<'_>, group: GroupId) -> Vec<Member> {
    let targets = view.targets.get(&group).map_or(&[][..], Vec::as_slice);
    targets.iter().filter_map(|target| view.member(group, target.node, target.store, false)).collect()
}
