use std::collections::HashMap;

use xsan_protocol::ids::Incarnation;

use super::super::sample::{self, NOW_UNIX_MS, answers, state, survey};
use super::super::status;
use super::super::survey::Answer;
use super::*;
use crate::state::command::{Command, GroupChange};
use crate::state::scrub::ScrubEnd;
use crate::state::{ClusterState, Departure};

fn found(state: &ClusterState, answers: HashMap<NodeId, Answer>) -> Vec<(String, String)> {
    status::cluster(&survey(state, answers))
        .findings
        .into_iter()
        .map(|finding| (finding.code, finding.object))
        .collect()
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(code, object)| ((*code).to_owned(), (*object).to_owned())).collect()
}

#[test]
fn nothing_is_found_where_all_is_well() {
    assert_eq!(found(&state(3, 3), answers(3, &[])), []);
}

#[test]
fn a_dead_node_is_found_with_what_follows_from_it() {
    let expected = [
        ("NODE_DOWN", "node n3"),
        ("NO_QUORUM_MARGIN", "cluster c1"),
        ("GROUPS_DEGRADED", "groups"),
        ("GROUPS_AT_RISK", "groups"),
    ];
    assert_eq!(found(&state(3, 3), answers(3, &[3])), pairs(&expected));
    let two = found(&state(3, 3), answers(3, &[2, 3]));
    assert_eq!(two[0], ("GROUPS_UNAVAILABLE".to_owned(), "groups".to_owned()));
}

#[test]
fn without_a_leader_nobody_knows() {
    let mut answers = answers(3, &[]);
    answers.remove(&NodeId(1));
    assert_eq!(found(&state(3, 3), answers)[0].0, "NO_LEADER");
}

#[test]
fn a_data_process_that_does_not_serve_is_told_from_a_dead_node() {
    let mut answers = answers(3, &[]);
    let leader = answers.get_mut(&NodeId(1)).expect("it answers");
    leader.status.health[1].up = false;
    let codes: Vec<_> = found(&state(3, 3), answers).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, ["DATA_DOWN", "GROUPS_DEGRADED", "GROUPS_AT_RISK"]);
}

#[test]
fn stores_are_found_full_failed_and_damaged() {
    let state = state(3, 3);
    let check = |change: &dyn Fn(&mut proto::StoreStatus), expected: &[&str]| {
        let mut answers = answers(3, &[]);
        let data = answers.get_mut(&NodeId(2)).expect("it answers").status.data.as_mut().expect("data");
        change(&mut data.stores[0]);
        let object = "store 0000000000000002 of node n2";
        let expected: Vec<_> = expected.iter().map(|code| (*code, object)).collect();
        assert_eq!(found(&state, answers), pairs(&expected));
    };
    check(&|store| store.used_bytes = 850, &[]);
    check(&|store| store.used_bytes = 860, &["STORE_NEARFULL"]);
    check(&|store| store.used_bytes = 960, &["STORE_FULL"]);
    check(&|store| store.failed = true, &["STORE_FAILED"]);
    check(&|store| store.checksum_errors = 1, &["CHECKSUM_ERRORS"]);
    check(&|store| (store.capacity_bytes, store.used_bytes) = (0, 5), &[]);
}

#[test]
fn a_store_that_could_not_be_opened_is_told_with_the_reason() {
    let mut answers = answers(3, &[]);
    let data = answers.get_mut(&NodeId(2)).expect("it answers").status.data.as_mut().expect("data");
    data.stores[0].failed = true;
    let message = |answers| status::cluster(&survey(&state(3, 3), answers)).findings.remove(0).message;
    assert_eq!(message(answers.clone()), "/dev/x failed");
    let data = answers.get_mut(&NodeId(2)).expect("it answers").status.data.as_mut().expect("data");
    data.stores[0].problem = "can not be opened: neither checkpoint is valid".to_owned();
    assert_eq!(message(answers), "/dev/x can not be opened: neither checkpoint is valid");
}

#[test]
fn wishes_of_the_operator_slow_members_clocks_and_releases_are_told() {
    let mut state = state(3, 3);
    state.apply(&Command::SetMaintenance { node: NodeId(2), on: true, force: true });
    state.apply(&Command::LeaveNode { node: NodeId(3), departure: Departure::Lost });
    let mut answers = answers(3, &[]);
    let first = answers.get_mut(&NodeId(1)).expect("it answers");
    first.skew_ms = 5000;
    first.status.release = "0.2.0".into();
    let slow = proto::SlowMember { node: 2, us_p99: 9000, us_p99_peers: 100 };
    first.status.data.as_mut().expect("data").slow_members.push(slow);
    let expected = [
        ("SLOW_MEMBER", "node n2"),
        ("CLOCK_SKEW", "node n1"),
        ("NODE_MAINTENANCE", "node n2"),
        ("NODE_LEAVING", "node n3"),
        ("RELEASES_MIXED", "cluster c1"),
    ];
    assert_eq!(found(&state, answers), pairs(&expected));
}

/// A reason is told only where that node says how long its devices take.
#[test]
fn a_slow_node_is_told_with_the_part_that_is_slow() {
    let told = |us_p99: Option<u64>, cache: &str| {
        let mut answers = answers(3, &[]);
        let data = |answers: &mut HashMap<NodeId, Answer>, node, change: &dyn Fn(&mut proto::DataStatus)| {
            change(answers.get_mut(&NodeId(node)).expect("it answers").status.data.as_mut().expect("data"));
        };
        let slow = proto::SlowMember { node: 2, us_p99: 9000, us_p99_peers: 100 };
        data(&mut answers, 1, &|data| data.slow_members.push(slow));
        data(&mut answers, 2, &|data| data.stores[0].write_us_p99 = us_p99);
        data(&mut answers, 2, &|data| data.stores[0].cache_device = cache.into());
        let status = status::cluster(&survey(&state(3, 3), answers));
        status.findings.into_iter().find(|finding| finding.code == "SLOW_MEMBER").expect("it is told").message
    };
    let numbers = "p99 9000 µs, its peers 100 µs, seen by node n1";
    assert_eq!(told(None, ""), numbers);
    assert_eq!(told(Some(8000), ""), format!("{numbers}; its device /dev/x takes 8000 µs for a write"));
    assert_eq!(told(Some(8000), "/dev/y"), format!("{numbers}; its device /dev/y takes 8000 µs for a write"));
    let elsewhere = "its devices take 90 µs for a write at most: it is its network, or the host is busy";
    assert_eq!(told(Some(90), ""), format!("{numbers}; {elsewhere}"));
}

#[test]
fn a_node_that_only_serves_clients_waits_with_its_removal() {
    let mut state = state(3, 3);
    sample::add_node(&mut state, 4);
    state.apply(&Command::LeaveNode { node: NodeId(4), departure: Departure::Leaving });
    assert_eq!(found(&state, answers(4, &[])), pairs(&[("NODE_LEAVING", "node n4")]));
    let incarnation = Incarnation(4);
    state.apply(&Command::Attach { volume: "vm".into(), node: NodeId(4), incarnation });
    assert_eq!(found(&state, answers(4, &[])), pairs(&[("REMOVAL_WAITS", "node n4")]));
}

#[test]
fn replicas_that_are_behind_are_told() {
    let mut state = state(3, 3);
    let group = state.groups().next().expect("a group").1.clone();
    let mut members = group.members.clone();
    let primary = group.primary;
    members.iter_mut().filter(|member| Some(member.node) != primary).for_each(|member| member.learner = true);
    let change = GroupChange { group: group.id, expected: group.epoch, primary, members, settle: false };
    state.apply(&Command::ReconfigureGroups(vec![change]));
    let codes: Vec<_> = found(&state, answers(3, &[])).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes, ["GROUPS_UNAVAILABLE", "RESYNC"]);
}

#[test]
fn scrubs_that_found_something_or_are_late_are_told() {
    let mut state = state(3, 3);
    let groups: Vec<_> = state.groups().map(|(_, group)| group.id).collect();
    let end = |group, findings| ScrubEnd { group, deep: true, number: NOW_UNIX_MS, findings };
    let mended = proto::ScrubFindings { damaged_pages: 2, mended_pages: 2, ..Default::default() };
    let lost = proto::ScrubFindings { damaged_pages: 1, lost_pages: 1, ..Default::default() };
    let ends = vec![end(groups[3], mended), end(groups[4], lost)];
    state.apply(&Command::EndScrubs { unix_ms: NOW_UNIX_MS + 1, ends });
    let object = format!("group {}", groups[4]);
    let expected = [("SCRUB_ERRORS", object.as_str()), ("SCRUB_REPAIRED", "groups")];
    assert_eq!(found(&state, answers(3, &[])), pairs(&expected));
    let mut late = survey(&state, answers(3, &[]));
    late.unix_ms += 2 * 24 * 3_600_000 + 1;
    let codes: Vec<_> = status::cluster(&late).findings.into_iter().map(|finding| finding.code).collect();
    assert_eq!(codes, ["SCRUB_ERRORS", "SCRUB_OVERDUE", "SCRUB_REPAIRED"]);
}

/// A light scrub reads no page: its end, a day after that of the deep one, said that nothing was lost.
#[test]
fn a_light_scrub_does_not_clear_what_a_deep_one_found() {
    let mut state = state(3, 3);
    let group = state.groups().next().expect("a group").1.id;
    let lost = proto::ScrubFindings { damaged_pages: 1, lost_pages: 1, ..Default::default() };
    let mut scrub = |deep, findings| {
        let number = state.scrubs(group).order_number(deep);
        let ends = vec![ScrubEnd { group, deep, number, findings }];
        state.apply(&Command::EndScrubs { unix_ms: number + 1, ends });
        (found(&state, answers(3, &[])), state.scrubs(group).last().expect("it was scrubbed").deep)
    };
    let object = format!("group {group}");
    let errors = pairs(&[("SCRUB_ERRORS", &object)]);
    assert_eq!(scrub(true, lost), (errors.clone(), true));
    assert_eq!(scrub(false, proto::ScrubFindings::default()), (errors, false));
    assert_eq!(scrub(true, proto::ScrubFindings::default()), (vec![], true));
    let different = proto::ScrubFindings { differences: 1, ..Default::default() };
    assert_eq!(scrub(false, different).0, pairs(&[("SCRUB_ERRORS", &object)]));
    assert_eq!(scrub(false, proto::ScrubFindings::default()).0, []);
}

/// The leader of a term that has lost its quorum does not know it by Raft alone; its answers said that all but the dead is well.
#[test]
fn without_a_quorum_there_is_no_leader() {
    let mut answers = answers(3, &[2, 3]);
    answers.get_mut(&NodeId(1)).expect("it answers").status.health.clear();
    let codes: Vec<_> = found(&state(3, 3), answers).into_iter().map(|(code, _)| code).collect();
    assert_eq!(codes[..2], ["NO_LEADER", "GROUPS_UNAVAILABLE"]);
    assert!(!codes.contains(&"NO_QUORUM_MARGIN".to_owned()), "{codes:?}");
}

/// A code that no test provokes may never be told.
#[test]
fn every_code_is_told_in_some_test() {
    let tests = include_str!("tests.rs");
    for check in Check::ALL {
        assert!(tests.contains(&format!("\"{}\"", check.code())), "{}", check.code());
    }
}
