use super::*;
use crate::api::sample;
use crate::state::command::Command;
use crate::state::scrub::ScrubEnd;

const NOBODY: BTreeSet<NodeId> = BTreeSet::new();

fn cluster(count: u32) -> ClusterState {
    let mut state = ClusterState::default();
    (1..=count).for_each(|node| sample::add_node(&mut state, node));
    state
}

fn kinds(log: &EventLog) -> Vec<(String, String)> {
    log.list().into_iter().map(|event| (event.kind, event.object)).collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(kind, object)| ((*kind).to_owned(), (*object).to_owned())).collect()
}

#[test]
fn what_changes_between_two_looks_is_an_event() {
    let (mut observer, mut log) = (Observer::default(), EventLog::default());
    let mut state = cluster(2);
    observer.look(1, &state, |_| Health::Up, &NOBODY, &mut log);
    assert!(log.list().is_empty(), "the first look only remembers");
    let one_gone = |node| if node == NodeId(2) { Health::Gone } else { Health::Up };
    observer.look(2, &state, one_gone, &NOBODY, &mut log);
    observer.look(3, &state, one_gone, &NOBODY, &mut log);
    let assumed = |node| if node == NodeId(2) { Health::Assumed } else { Health::Up };
    observer.look(4, &state, assumed, &NOBODY, &mut log);
    observer.look(5, &state, |_| Health::Up, &NOBODY, &mut log);
    assert_eq!(kinds(&log), pairs(&[("node-down", "node n2"), ("node-up", "node n2")]));

    let mut log = EventLog::default();
    state.apply(&Command::SetMaintenance { node: NodeId(1), on: true, force: false });
    state.apply(&Command::LeaveNode { node: NodeId(2), departure: Departure::Leaving });
    observer.look(6, &state, |_| Health::Up, &[NodeId(1)].into(), &mut log);
    state.apply(&Command::RemoveNode { node: NodeId(2) });
    observer.look(7, &state, |_| Health::Up, &NOBODY, &mut log);
    let expected = [
        ("maintenance-on", "node n1"),
        ("node-slow", "node n1"),
        ("node-leaving", "node n2"),
        ("node-slow-ended", "node n1"),
        ("node-removed", "node n2"),
    ];
    assert_eq!(kinds(&log), pairs(&expected));
}

#[test]
fn changes_of_groups_with_nothing_between_them_are_one_event() {
    let mut log = EventLog::default();
    log.reconfigured(1000, 3);
    assert_eq!(log.take_unsaved(false).map(|events| events.len()), Some(1));
    log.reconfigured(2000, 4);
    assert_eq!(log.take_unsaved(false), None, "only a summary has grown");
    assert_eq!(log.take_unsaved(true), Some(log.list()), "the last time");
    assert_eq!(log.take_unsaved(true), None);
    log.not_saved();
    assert_eq!(log.take_unsaved(false), Some(log.list()));
    log.reconfigured(1000 + SUMMARY_MS, 1);
    let messages: Vec<_> = log.list().into_iter().map(|event| event.message).collect();
    assert_eq!(messages, ["7 changes of groups within 1 s", "1 change of a group"]);
    log.add(2000 + SUMMARY_MS, "node-down", "node n1".into(), "node n1 is down".into());
    log.reconfigured(2001 + SUMMARY_MS, 2);
    assert_eq!(log.list().len(), 4, "in the order in which they happened");
}

#[test]
fn the_oldest_events_are_dropped() {
    let mut log = EventLog::default();
    for number in 0..EVENTS_MAX as u64 + 7 {
        log.add(number, "node-up", "node n1".into(), String::new());
    }
    let events = log.list();
    assert_eq!((events.len(), events[0].unix_ms), (EVENTS_MAX, 7));
    let mut saved = events.clone();
    saved.insert(0, proto::Event::default());
    assert_eq!(EventLog::after(saved).list(), events, "of a release that kept more");
}

#[test]
fn scrubs_are_told_when_somebody_asked_for_them_or_they_found_something() {
    let mut state = crate::api::sample::state(3, 3);
    let (mut observer, mut log) = (Observer::default(), EventLog::default());
    let group = state.groups().next().expect("a group").1.id;
    observer.look(1, &state, |_| Health::Up, &NOBODY, &mut log);
    let wish = proto::ScrubWish { deep: true, unix_ms: 5 };
    state.apply(&Command::WishScrubs { groups: vec![group], wish: Some(wish) });
    observer.look(2, &state, |_| Health::Up, &NOBODY, &mut log);
    let findings = ScrubFindings { damaged_pages: 2, mended_pages: 2, ..Default::default() };
    let mut end = ScrubEnd { group, deep: true, number: 5, findings };
    state.apply(&Command::EndScrubs { unix_ms: 6, ends: vec![end] });
    observer.look(3, &state, |_| Health::Up, &NOBODY, &mut log);
    // A regular one, which nobody asked for and which is clean, and one that is not.
    (end.number, end.findings) = (state.scrubs(group).deep_unix_ms, ScrubFindings::default());
    state.apply(&Command::EndScrubs { unix_ms: u64::MAX - 9, ends: vec![end] });
    observer.look(4, &state, |_| Health::Up, &NOBODY, &mut log);
    (end.number, end.findings.differences) = (state.scrubs(group).deep_unix_ms, 1);
    state.apply(&Command::EndScrubs { unix_ms: u64::MAX - 8, ends: vec![end] });
    observer.look(5, &state, |_| Health::Up, &NOBODY, &mut log);
    let object = format!("group {group}");
    let expected = [
        ("scrub-started", "groups"),
        ("scrub-repaired", &object),
        ("scrub-ended", "groups"),
        ("scrub-errors", &object),
    ];
    assert_eq!(kinds(&log), pairs(&expected));
    assert!(log.list()[2].message.contains("1 groups were scrubbed: 2 pages damaged, 2 mended"));
}
