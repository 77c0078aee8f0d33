//! What must change in the groups, now.
//!
//! For a group with acting set A, of which the members C are live:
//!
//! 1. C = A: learners are added where the group belongs, dead ones dropped, wishes of the primary granted, slow members made learners.
//! 2. |C| ≥ `min_replicas`: A becomes C.
//! 3. |C| < `min_replicas`: A becomes C and the members that are back, when that holds everything that was
//!    acknowledged: C is not empty (it has it all), or one of them lost nothing, or all of A are back. Learners that are up to
//!    date join them where they are too few.
//!    So it goes for any C < A while the epoch is not settled, with the last settled acting set as A. Where all of that have
//!    lost something, newcomers must be back, too, and join them: what was acknowledged may be theirs alone.
//! 4. After `REGROUP_AFTER` A becomes what there is of that, below `min_replicas`: no I/O yet, but learners can
//!    be brought up from it.
//!
//! Source: docs/decisions/0009-settled-epochs.md.

use std::collections::HashMap;

use xsan_protocol::ids::{GroupId, NodeId};
use xsan_protocol::map::{Group, Member, Pool};

use super::{Memory, PrimaryCounts, Proposal, ProposedChange, Standing, View};
use crate::state::command::GroupChange;
use crate::timing::{REGROUP_AFTER, SHORT_FOR};

/// Every change that is due. `proposals` that do not fit the present epochs are ignored: who made them looks
/// at the new map and asks again.
pub fn decide(view: &View<'_>, memory: &mut Memory, proposals: &[Proposal]) -> Vec<GroupChange> {
    let mut wishes: HashMap<GroupId, Vec<Proposal>> = HashMap::new();
    proposals.iter().for_each(|proposal| wishes.entry(proposal.group).or_default().push(*proposal));
    let mut counts = PrimaryCounts::of(view.state);
    let map = view.state.map();
    let mut changes = Vec::new();
    for pool in map.pools.values() {
        for group in pool.groups().map(|id| &map.groups[&id]) {
            let wishes = wishes.get(&group.id).map_or(&[][..], Vec::as_slice);
            let Some(change) = next(view, memory, pool, group, wishes, &counts) else { continue };
            counts.moved(group.primary, change.primary);
            changes.push(change);
        }
    }
    memory.waiting.retain(|group, _| map.groups.contains_key(group));
    memory.short.retain(|_, said| view.now.since(*said) < SHORT_FOR);
    changes
}

fn next(
    view: &View<'_>,
    memory: &mut Memory,
    pool: &Pool,
    group: &Group,
    wishes: &[Proposal],
    counts: &PrimaryCounts,
) -> Option<GroupChange> {
    let live = group.acting().filter(|member| view.standing(member) == Standing::Live).count();
    let acting = if live == group.acting().count() {
        memory.waiting.remove(&group.id);
        return steady(view, memory, pool, group, wishes, counts);
    } else if group.is_settled() && live >= usize::from(pool.min_replicas) {
        memory.waiting.remove(&group.id);
        live_members(view, group)
    } else {
        regroup(view, memory, pool, group, wishes)?
    };
    let members = with_the_rest(view, group, acting);
    change(view, group, members, counts)
}

fn live_members(view: &View<'_>, group: &Group) -> Vec<Member> {
    group.acting().filter(|member| view.standing(member) == Standing::Live).copied().collect()
}

/// Cases 3 and 4: the acting set that holds everything acknowledged, or `None` to wait.
fn regroup(
    view: &View<'_>,
    memory: &mut Memory,
    pool: &Pool,
    group: &Group,
    wishes: &[Proposal],
) -> Option<Vec<Member>> {
    let live: Vec<Member> = group.holders().filter(|m| view.standing(m) == Standing::Live).copied().collect();
    let back: Vec<&Member> = group.holders().filter(|m| view.standing(m) == Standing::Back).collect();
    let all_are_there = live.len() + back.len() == group.holders().count();
    let surely = group.holders().any(|holder| view.has_everything(group, holder.node));
    let since = *memory.waiting.entry(group.id).or_insert(view.now);
    let newcomers = match surely {
        true => {
            let lives = |m: &&Member| group.acts(m) && view.standing(m) == Standing::Live;
            group.newcomers().filter(lives).copied().collect()
        }
        // What was acknowledged may be theirs alone: all holders have lost something.
        false if all_are_there => view.intact_newcomers(group)?,
        false => return None,
    };
    let mut all = live;
    all.extend(back.iter().filter_map(|member| view.renewed(group.id, member, false)));
    all.extend(newcomers);
    let mut chosen = sources(all);
    if chosen.len() < usize::from(pool.min_replicas) {
        chosen.extend(up_to_date(view, group, &chosen, wishes));
    }
    let enough = chosen.len() >= usize::from(pool.min_replicas);
    let waited = view.now.since(since) >= REGROUP_AFTER;
    if chosen.is_empty() || !(enough || waited) {
        return None;
    }
    memory.waiting.remove(&group.id);
    Some(chosen)
}

/// Of those who may act: a member that lost records is no source, unless there is no other.
pub(super) fn sources(all: Vec<Member>) -> Vec<Member> {
    let whole: Vec<Member> = all.iter().filter(|member| !member.damaged).copied().collect();
    if whole.is_empty() { all } else { whole }
}

/// Learners that their primary, which is among the `chosen`, says have everything: they were held back, or were about to act.
fn up_to_date<'a>(
    view: &'a View<'_>,
    group: &'a Group,
    chosen: &[Member],
    wishes: &'a [Proposal],
) -> impl Iterator<Item = Member> + use<'a> {
    let led = group.acting().any(|member| {
        Some(member.node) == group.primary
            && view.standing(member) == Standing::Live
            && chosen.iter().any(|other| other.node == member.node)
    });
    let promoted = move |learner: &&Member| {
        let wish = |wish: &Proposal| {
            wish.epoch == group.epoch && wish.node == learner.node && wish.change == ProposedChange::Promote
        };
        led && view.standing(learner) == Standing::Live && wishes.iter().any(wish)
    };
    group.learners().filter(promoted).map(|learner| Member { learner: false, damaged: false, ..*learner })
}

/// `acting`, those who may not leave yet, and as learners whoever else is there.
fn with_the_rest(view: &View<'_>, group: &Group, acting: Vec<Member>) -> Vec<Member> {
    let mut members = acting;
    for member in &group.members {
        if members.iter().any(|m| m.node == member.node) {
            continue;
        }
        if !member.learner && !view.may_leave(group, member) {
            members.push(*member);
        } else {
            members.extend(as_learner(view, group, member));
        }
    }
    members
}

/// A member as a learner of the present life of its data process; `None` when it can not be one.
fn as_learner(view: &View<'_>, group: &Group, member: &Member) -> Option<Member> {
    match view.standing(member) {
        Standing::Live => Some(Member { learner: true, ..*member }),
        Standing::Back => view.renewed(group.id, member, true),
        Standing::Failed | Standing::Gone => None,
    }
}

/// Case 1: every acting member is live.
fn steady(
    view: &View<'_>,
    memory: &mut Memory,
    pool: &Pool,
    group: &Group,
    wishes: &[Proposal],
    counts: &PrimaryCounts,
) -> Option<GroupChange> {
    let of_epoch = |wish: &&Proposal| wish.epoch == group.epoch;
    let settles = |wish: &Proposal| wish.change == ProposedChange::Settle && group.primary == Some(wish.node);
    if !group.is_settled() && wishes.iter().filter(of_epoch).any(settles) {
        return Some(GroupChange { settle: true, ..changed(group, group.primary, group.members.clone()) });
    }
    let renews = |wish: &Proposal| {
        let learner = group.learners().any(|learner| learner.node == wish.node);
        wish.change == ProposedChange::Renew && learner && !view.is_slow(wish.node)
    };
    if wishes.iter().filter(of_epoch).any(renews) {
        return Some(changed(group, group.primary, group.members.clone()));
    }
    let mut members: Vec<Member> = group.acting().copied().collect();
    members.extend(group.learners().filter_map(|learner| as_learner(view, group, learner)));
    let mut leads = None;
    for wish in wishes.iter().filter(of_epoch) {
        leads = grant(view, memory, pool, group, wish, &mut members).or(leads);
    }
    if leads.is_some_and(|node| group.primary != Some(node)) {
        // Nothing else in the same step: who leaves is told by the one that leads.
        return Some(changed(group, leads, group.members.clone()));
    }
    if !group.is_settled() {
        // Each change of members begins peering anew: only what a wish asks for is worth that now.
        return change(view, group, members, counts);
    }
    if !memory.is_short(view.now, group.id) {
        demote_slow(view, pool, group, &mut members);
    }
    drop_surplus(view, pool, group, &mut members);
    let wanted = usize::from(pool.replica_count);
    if members.iter().filter(|member| !member.learner).count() < wanted {
        for target in view.targets.get(&group.id).into_iter().flatten() {
            // A slow learner that does not belong here stands in for none.
            let counts = |member: &&Member| {
                !member.learner || !view.is_slow(member.node) || view.is_target(group.id, member.node)
            };
            let enough = members.iter().filter(counts).count() >= wanted;
            if !enough && members.iter().all(|member| member.node != target.node) {
                members.extend(view.member(group.id, target.node, target.store, true));
            }
        }
    }
    change(view, group, members, counts)
}

/// Grants a wish of the group's primary, if the group's safety allows it. Returns who is to be the primary, if
/// another.
fn grant(
    view: &View<'_>,
    memory: &mut Memory,
    pool: &Pool,
    group: &Group,
    wish: &Proposal,
    members: &mut [Member],
) -> Option<NodeId> {
    let acting = members.iter().filter(|member| !member.learner).count();
    let serving = serving(view, members);
    let able = |member: &Member| !member.learner && view.standing(member) == Standing::Live;
    let member = members.iter_mut().find(|member| member.node == wish.node)?;
    match wish.change {
        ProposedChange::Promote => {
            // The cluster would wait for it again.
            let enough = serving >= usize::from(pool.min_replicas) && !memory.is_short(view.now, group.id);
            let held = view.is_held(wish.node) && enough;
            // The primary speaks of the learner that it knows, not of a later life of it.
            let known = group.learners().any(|learner| learner.incarnation == member.incarnation);
            if member.learner && known && view.standing(member) == Standing::Live && !held {
                (member.learner, member.damaged) = (false, false);
            }
        }
        ProposedChange::Demote if group.primary == Some(wish.node) => {
            if acting <= usize::from(pool.min_replicas) {
                let asked_before = memory.is_short(view.now, group.id);
                memory.short.insert(group.id, view.now);
                // A new primary would not know whether a slow learner has everything: the old one has it act first.
                let stands_in =
                    |learner: &Member| view.is_held(learner.node) && view.standing(learner) == Standing::Live;
                if !asked_before && group.learners().any(stands_in) {
                    return None;
                }
            }
            let other = members.iter().find(|other| other.node != wish.node && able(other));
            return other.map(|other| other.node);
        }
        ProposedChange::Demote | ProposedChange::Exclude => {
            // Before the epoch is settled, who does not answer may be the only one that has everything.
            let alone = group.primary.is_some_and(|primary| view.has_everything(group, primary));
            let enough = acting > usize::from(pool.min_replicas) && (group.is_settled() || alone);
            // All journals were compared before a member is excluded: the primary has what any of them has.
            let spare = enough || wish.change == ProposedChange::Exclude;
            if !member.learner && spare && view.may_leave(group, member) {
                member.learner = true;
            } else if !member.learner && acting <= usize::from(pool.min_replicas) {
                memory.short.insert(group.id, view.now);
            }
        }
        // `steady` has looked at it.
        ProposedChange::Renew => {}
        ProposedChange::Lead => return able(member).then_some(wish.node),
        ProposedChange::Settle => {}
    }
    None
}

/// Acting members that are not in maintenance: those may be down at any time.
fn serving(view: &View<'_>, members: &[Member]) -> usize {
    members.iter().filter(|member| !member.learner && !view.state.is_in_maintenance(member.node)).count()
}

/// Slow members become learners while `min_replicas` are left: they get every write, and nobody waits for them.
fn demote_slow(view: &View<'_>, pool: &Pool, group: &Group, members: &mut [Member]) {
    let spare = serving(view, members).saturating_sub(usize::from(pool.min_replicas));
    let slow = members.iter_mut().filter(|member| !member.learner && view.is_slow(member.node));
    let slow = slow.filter(|member| view.may_leave(group, member));
    slow.take(spare).for_each(|member| member.learner = true);
}

/// With all the replicas that are wanted, learners elsewhere and acting members too many are let go.
fn drop_surplus(view: &View<'_>, pool: &Pool, group: &Group, members: &mut Vec<Member>) {
    let wanted = usize::from(pool.replica_count);
    let acting = |members: &[Member]| members.iter().filter(|member| !member.learner).count();
    if acting(members) >= wanted {
        members.retain(|member| !member.learner || view.is_target(group.id, member.node));
    }
    while acting(members) > wanted {
        let surplus = members.iter().position(|member| {
            let elsewhere = !member.learner && !view.is_target(group.id, member.node);
            elsewhere && view.may_leave(group, member)
        });
        let Some(surplus) = surplus else { return };
        members.remove(surplus);
    }
}

/// The change that leads to `members`; `None` when that is what the group is already.
fn change(
    view: &View<'_>,
    group: &Group,
    mut members: Vec<Member>,
    counts: &PrimaryCounts,
) -> Option<GroupChange> {
    let primary = pick_primary(view, group, &members, counts);
    let mut present = group.members.clone();
    members.sort_by_key(|member| member.node);
    present.sort_by_key(|member| member.node);
    if members == present && primary == group.primary {
        return None;
    }
    assert!(members.iter().any(|m| !m.learner && Some(m.node) == primary), "the primary is an acting member");
    Some(changed(group, primary, members))
}

fn changed(group: &Group, primary: Option<NodeId>, members: Vec<Member>) -> GroupChange {
    GroupChange { group: group.id, expected: group.epoch, primary, members, settle: false }
}

/// The present primary while it can be; else the acting member with the fewest primaries. One that is leaving
/// because replicas moved elsewhere hands over first, but not before the epoch is settled: it may be the only one that can lead.
fn pick_primary(
    view: &View<'_>,
    group: &Group,
    members: &[Member],
    counts: &PrimaryCounts,
) -> Option<NodeId> {
    let acting = || members.iter().filter(|member| !member.learner);
    // A member with its new incarnation stands as live; one that merely may not leave yet does not.
    let live = |member: &&Member| view.standing(member) == Standing::Live;
    let surely = |member: &&Member| live(member) && view.has_everything(group, member.node);
    let sure = acting().any(|member| surely(&member));
    let able = |member: &&Member| if sure { surely(member) } else { live(member) };
    let wanted = view.targets.get(&group.id).map_or(0, Vec::len);
    let leaving = |node: NodeId| wanted > 0 && acting().count() > wanted && !view.is_target(group.id, node);
    let keep = group.primary.filter(|primary| {
        let stays = !(group.is_settled() && leaving(*primary));
        stays && acting().filter(able).any(|member| member.node == *primary)
    });
    keep.or_else(|| {
        let wanted = |node: &NodeId| !leaving(*node) && !view.avoids(*node);
        counts.least(acting().filter(able).map(|member| member.node).filter(wanted))
    })
    .or_else(|| counts.least(acting().filter(able).map(|member| member.node)))
    .or(group.primary)
}
