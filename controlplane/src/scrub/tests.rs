use super::*;
use crate::api::sample::{NOW_UNIX_MS, state};
use crate::state::command::SettingsChange;

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;

fn all_orders(state: &ClusterState, now: u64) -> Vec<ScrubOrder> {
    (1..=3).flat_map(|node| orders(state, NodeId(node), now).orders).collect()
}

fn end(state: &mut ClusterState, order: &ScrubOrder, now: u64) {
    let findings = xsan_protocol::proto::ScrubFindings::default();
    let group = GroupId(order.group);
    let end = ScrubEnd { group, deep: order.deep, number: order.number, findings };
    assert!(is_open(state, &end));
    state.apply(&Command::EndScrubs { unix_ms: now, ends: vec![end] });
    assert!(!is_open(state, &end), "an end counts once");
    assert!(state.apply(&Command::EndScrubs { unix_ms: now, ends: vec![end] }).1.is_empty());
}

#[test]
fn the_scrubs_of_a_pool_are_spread_over_the_interval() {
    let mut state = state(3, 3);
    assert_eq!(all_orders(&state, NOW_UNIX_MS), []);
    let half = all_orders(&state, NOW_UNIX_MS + 12 * HOUR).len();
    assert!((128..=147).contains(&half), "{half}: half of 256 groups after half a day, and some deep ones");
    let mut deep_ones = 0;
    for day in 1..=14 {
        let now = NOW_UNIX_MS + day * DAY;
        let due = all_orders(&state, now);
        assert_eq!(due.len(), 256);
        let deep = due.iter().filter(|order| order.deep).count();
        assert!((36..=37).contains(&deep), "a seventh a day, not {deep}");
        deep_ones += deep;
        for order in due {
            end(&mut state, &order, now);
        }
        assert_eq!(all_orders(&state, now), []);
    }
    assert_eq!(deep_ones, 512);
}

#[test]
fn a_wish_comes_first_and_is_kept_until_it_is_fulfilled() {
    let mut state = state(3, 3);
    let group = state.groups().next().expect("a group").1.id;
    let now = NOW_UNIX_MS + DAY;
    let before = all_orders(&state, now).into_iter().find(|order| order.group == group.0).expect("it is due");
    let wish = xsan_protocol::proto::ScrubWish { deep: true, unix_ms: now };
    state.apply(&Command::WishScrubs { groups: vec![group, GroupId(1)], wish: Some(wish) });
    let primary = state.map().groups[&group].primary.expect("it has one");
    let wished = orders(&state, primary, now).orders[0];
    assert_eq!(wished, ScrubOrder { group: group.0, deep: true, number: now });
    // The end of what ran before does not fulfil it.
    end(&mut state, &before, now + 1);
    assert_eq!(orders(&state, primary, now).orders[0], wished);
    end(&mut state, &wished, now + 2);
    assert!(all_orders(&state, now + 2).iter().all(|order| order.group != group.0));
    state.apply(&Command::WishScrubs { groups: vec![group], wish: Some(wish) });
    state.apply(&Command::WishScrubs { groups: vec![group], wish: None });
    assert!(all_orders(&state, now + 2).iter().all(|order| order.group != group.0));
}

#[test]
fn what_is_off_is_never_due_and_what_is_late_is_told() {
    let mut state = state(3, 3);
    let late = |state: &ClusterState, now| {
        state
            .groups()
            .filter(|(_, group)| is_overdue(&state.settings(), &state.scrubs(group.id), now))
            .count()
    };
    assert_eq!(late(&state, NOW_UNIX_MS + 2 * DAY), 0);
    assert_eq!(late(&state, NOW_UNIX_MS + 2 * DAY + 1), 256);
    let off = SettingsChange { scrub_interval: Some(Duration::ZERO), ..SettingsChange::default() };
    state.apply(&Command::ChangeSettings(off));
    assert_eq!(late(&state, NOW_UNIX_MS + 3 * DAY), 0);
    assert!(all_orders(&state, NOW_UNIX_MS + 3 * DAY).iter().all(|order| order.deep));
    assert_eq!(late(&state, NOW_UNIX_MS + 15 * DAY), 256);
    let off = SettingsChange { deep_scrub_interval: Some(Duration::ZERO), ..off };
    state.apply(&Command::ChangeSettings(off));
    assert_eq!(all_orders(&state, NOW_UNIX_MS + 99 * DAY), []);
}

/// One node's clock was a year ahead for a day: what it scrubbed was not due again for that year, and its times stayed when the
/// clock was right again.
#[test]
fn times_of_a_wrong_clock_are_due_at_once_and_are_put_right() {
    let mut state = state(3, 3);
    let now = NOW_UNIX_MS + DAY;
    let wrong = [now + 365 * DAY, u64::MAX];
    for (index, order) in all_orders(&state, now).iter().enumerate() {
        end(&mut state, order, wrong[index % 2]);
    }
    let due = all_orders(&state, now);
    assert_eq!(due.len(), 256);
    let group = GroupId(due[0].group);
    assert!(is_overdue(&state.settings(), &state.scrubs(group), now), "nobody knows when it was");
    for order in due {
        end(&mut state, &order, now);
    }
    assert!(!is_overdue(&state.settings(), &state.scrubs(group), now));
    // Those that had a light scrub ahead have had a deep one now, or have one coming.
    for order in all_orders(&state, now) {
        end(&mut state, &order, now);
    }
    assert_eq!(all_orders(&state, now), []);
    // A little ahead is no other clock than ours.
    let due = all_orders(&state, now + 8 * DAY);
    for order in due {
        end(&mut state, &order, now + 8 * DAY + 5_000);
    }
    assert_eq!(all_orders(&state, now + 8 * DAY), []);
}
