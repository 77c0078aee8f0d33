use xsan_protocol::ids::{BootId, Incarnation};
use xsan_protocol::map::{DamagedStore, DataProcess};

use super::super::sample::{self, CAPACITY, answers, state, survey};
use super::*;
use crate::state::ClusterState;
use crate::state::command::{Command, GroupChange};

fn node(survey: &Survey, id: u32) -> &Node {
    &survey.state.map().nodes[&NodeId(id)]
}

#[test]
fn a_plan_counts_what_the_node_has_and_says_where_its_rate_is_from() {
    let mut answers = answers(3, &[]);
    let survey_assumed = survey(&state(3, 3), answers.clone());
    let planned = plan(&survey_assumed, node(&survey_assumed, 2));
    assert_eq!((planned.name.as_str(), planned.groups), ("n2", 256));
    assert!(planned.primary_groups > 0);
    assert_eq!((planned.bytes_per_second, planned.rate_is_measured), (RATE_ASSUMED, false));
    answers.get_mut(&NodeId(1)).expect("it answers").status.resync_bytes_per_second = 7;
    answers.get_mut(&NodeId(2)).expect("it answers").status.resync_bytes_per_second = 5;
    let measured = survey(&state(3, 3), answers);
    let planned = plan(&measured, node(&measured, 2));
    assert_eq!((planned.bytes_per_second, planned.rate_is_measured), (12, true));
}

#[test]
fn groups_are_at_risk_that_one_more_failure_stops() {
    let all = survey(&state(3, 3), answers(3, &[]));
    assert_eq!(at_risk_without(&all, NodeId(1)), 256);
    let five = survey(&state(5, 5), answers(5, &[]));
    assert_eq!(at_risk_without(&five, NodeId(1)), 0);
    let one_down = survey(&state(5, 5), answers(5, &[5]));
    assert_eq!(at_risk_without(&one_down, NodeId(1)), 256);
}

#[test]
fn replicas_of_a_node_that_leaves_go_to_those_that_are_there() {
    let state = state(5, 3);
    let held =
        |node: u32| state.groups().filter(|(_, group)| group.member(NodeId(node)).is_some()).count() as u64;
    let all = survey(&state, answers(5, &[]));
    let moved = moves(&all, NodeId(5));
    assert!(!moved.contains_key(&NodeId(5)));
    let sum: u64 = moved.values().sum();
    // Little more than its own share.
    assert!(sum >= held(5) && sum <= held(5) * 3 / 2, "{sum} of {}", held(5));
    let one_down = survey(&state, answers(5, &[4]));
    assert!(!moves(&one_down, NodeId(5)).contains_key(&NodeId(4)));
    assert_eq!(too_few_others(&one_down, node(&one_down, 5)), None);
    let two_down = survey(&state, answers(5, &[3, 4]));
    let refusal = too_few_others(&two_down, node(&two_down, 5)).expect("two nodes for three replicas");
    assert_eq!((refusal.code, refusal.object.as_str()), (Code::NodeNeeded, "node n5"));
}

#[test]
fn nodes_that_would_be_filled_up_are_named() {
    let mut answers = answers(4, &[]);
    let state = state(4, 3);
    let roomy = survey(&state, answers.clone());
    let moved = moves(&roomy, NodeId(4));
    assert_eq!(without_room(&roomy, node(&roomy, 4), &moved, 1), None);
    let data = answers.get_mut(&NodeId(2)).expect("it answers").status.data.as_mut().expect("data");
    data.stores[0].used_bytes = CAPACITY / 100 * FILL_PERCENT_MAX;
    let full = survey(&state, answers);
    let refusal = without_room(&full, node(&full, 4), &moved, 1).expect("no room");
    assert_eq!(refusal.code, Code::NodeNeeded);
    assert!(refusal.message.contains("node n2 would get"), "{}", refusal.message);
}

#[test]
fn what_only_a_dead_node_holds_is_told_and_a_live_node_is_not_given_up() {
    let state = state(2, 1);
    let dead = survey(&state, answers(2, &[2]));
    let lost = held_alone(&dead, NodeId(2));
    assert!(!lost.is_empty() && lost.len() < 256);
    assert_eq!(volumes_of(&dead, &lost), ["vm"]);
    assert_eq!(volumes_of(&dead, &[]), Vec::<String>::new());
    let refusal = dead_and_alone(&dead, node(&dead, 2), lost.len()).expect("nobody can give it");
    assert!(refusal.message.contains(&format!("{} groups", lost.len())), "{}", refusal.message);
    assert_eq!(is_up(&dead, node(&dead, 2)), None);
    assert_eq!(is_up(&dead, node(&dead, 1)).expect("it is up").code, Code::NodeIsUp);
    let alive = survey(&state, answers(2, &[]));
    assert_eq!(dead_and_alone(&alive, node(&alive, 2), lost.len()), None);
    let copied = survey(&super::super::sample::state(3, 3), answers(3, &[2]));
    assert!(held_alone(&copied, NodeId(2)).is_empty());
}

/// Node 2 acts in a group of node 1, and nobody knows yet whether it has all of it. The plan looked at who acts and said that
/// nothing is lost.
#[test]
fn a_copy_that_may_not_be_whole_yet_does_not_count_as_one() {
    let mut state = state(2, 1);
    let (_, group) = state.groups().find(|(_, group)| group.primary == Some(NodeId(1))).expect("some are");
    let (id, expected, mut members) = (group.id, group.epoch, group.members.clone());
    let (_, other) = state.groups().find(|(_, group)| group.primary == Some(NodeId(2))).expect("some are");
    members.extend(&other.members);
    let change = GroupChange { group: id, expected, primary: Some(NodeId(1)), members, settle: false };
    state.apply(&Command::ReconfigureGroups(vec![change.clone()]));
    let taken_in = survey(&state, answers(2, &[1]));
    assert!(held_alone(&taken_in, NodeId(1)).contains(&id));
    assert!(!held_alone(&taken_in, NodeId(2)).contains(&id));
    let settled = GroupChange { expected: expected.next(), settle: true, ..change };
    state.apply(&Command::ReconfigureGroups(vec![settled]));
    assert!(!held_alone(&survey(&state, answers(2, &[1])), NodeId(1)).contains(&id));
}

#[test]
fn bytes_are_taken_from_the_node_or_from_the_others_when_it_is_silent() {
    let state = state(3, 1);
    let mut answers = answers(3, &[3]);
    for node in [1, 2] {
        let data = answers.get_mut(&NodeId(node)).expect("it answers").status.data.as_mut().expect("data");
        (data.stores[0].used_bytes, data.stores[0].journal_used_bytes) = (100_000, 28_000);
    }
    let survey = survey(&state, answers);
    let held =
        |node: u32| state.groups().filter(|(_, group)| group.member(NodeId(node)).is_some()).count() as u64;
    assert_eq!(replica_bytes(&survey, NodeId(1)), 128_000 / held(1));
    assert_eq!(replica_bytes(&survey, NodeId(3)), 256_000 / (held(1) + held(2)));
}

#[test]
fn replicas_that_are_to_be_made_are_counted_where_a_node_can_take_them() {
    let waiting = |state: &ClusterState, nodes: u32, down: &[u32], out: &[u32]| {
        let mut answers = answers(nodes, down);
        for (node, answer) in &mut answers {
            let used_bytes = if state.has_replicas(*node) { 1 << 30 } else { 0 };
            answer.status.data.as_mut().expect("data").stores[0].used_bytes = used_bytes;
            answer.status.health.iter_mut().for_each(|health| health.out = out.contains(&health.node));
        }
        waiting_bytes(&survey(state, answers))
    };
    let mut state = state(4, 3);
    assert_eq!(waiting(&state, 4, &[], &[]), 0);
    assert_eq!(waiting(&state, 4, &[4], &[]), 0, "it is waited for");
    let rebuilt = waiting(&state, 4, &[4], &[4]);
    // Each of the three that are left has a third of what the replicas of the dead one come to.
    assert!((900 << 20..=1100 << 20).contains(&rebuilt), "{rebuilt}");
    sample::add_node(&mut state, 5);
    assert_eq!(waiting(&state, 5, &[5], &[]), 0, "nothing can be moved there now");
    let joined = waiting(&state, 5, &[], &[]);
    let share = (4u64 << 30) / 5;
    assert!((share * 4 / 5..=share * 6 / 5).contains(&joined), "{joined}, a share is {share}");
}

#[test]
fn a_join_moves_what_the_new_nodes_share_comes_to() {
    let state = state(4, 3);
    let mut answers = answers(4, &[]);
    for answer in answers.values_mut() {
        answer.status.data.as_mut().expect("data").stores[0].used_bytes = 1 << 30;
    }
    let survey = survey(&state, answers);
    let join = |capacity_bytes, failure_domain: &str| {
        let failure_domain = failure_domain.to_owned();
        plan_join(&survey, proto::PlanJoinRequest { capacity_bytes, failure_domain })
    };
    let code = |error: ApiError| error.code();
    assert_eq!(join(0, "").map_err(code), Err(Code::InvalidArgument));
    let plan = join(CAPACITY, "").expect("it has a size");
    // A fifth of all 768 replicas, and little else.
    assert!((140..=200).contains(&plan.moves), "{plan:?}");
    let replica_bytes = (4u64 << 30) / 768;
    assert_eq!(plan.bytes_to_move, u64::from(plan.moves) * replica_bytes);
    assert_eq!((plan.bytes_per_second, plan.rate_is_measured), (RATE_ASSUMED, false));
    let larger = join(u64::MAX, "").expect("it has a size");
    assert!(larger.moves > plan.moves, "a larger one takes more: {larger:?}");
}

/// Both copies are on nodes that are down, or on a store that has failed: giving one of them up was told to lose nothing, "every group has
/// another live copy".
#[test]
fn copies_on_nodes_that_are_down_as_well_are_told() {
    let state = state(3, 3);
    let two_down = survey(&state, answers(3, &[1, 2]));
    assert_eq!(in_doubt(&two_down, NodeId(2)), 0, "the third serves");
    let all_down = survey(&state, answers(3, &[1, 2, 3]));
    assert_eq!(in_doubt(&all_down, NodeId(2)), 256);
    let mut failed = super::super::sample::state(3, 3);
    let third = failed.map().nodes[&NodeId(3)].data.clone().expect("a data process");
    let (incarnation, store) = (third.incarnation, third.stores[0].id);
    failed.apply(&Command::StoreFailed { node: NodeId(3), incarnation, store });
    assert_eq!(in_doubt(&survey(&failed, answers(3, &[1, 2])), NodeId(2)), 256, "it can not be read");
    let single = super::super::sample::state(2, 1);
    assert_eq!(in_doubt(&survey(&single, answers(2, &[1, 2])), NodeId(2)), 0, "these are lost");
}

/// The other copy is on a node that came back after its host lost power, or whose records are damaged: it may lack what
/// was acknowledged, and giving the first one up was told to lose nothing.
#[test]
fn a_copy_that_came_back_with_losses_is_told() {
    let restarted = |boot, damaged: bool| {
        let mut state = state(2, 2);
        let process = DataProcess { boot_id: BootId(boot), ..sample::process(StoreId(2), Incarnation(9)) };
        let damaged_stores =
            if damaged { vec![DamagedStore { store: StoreId(2), intact_groups: vec![] }] } else { vec![] };
        let replaces = Some(Incarnation(2));
        state.apply(&Command::DataStarted { node: NodeId(2), process, damaged_stores, replaces });
        in_doubt(&survey(&state, answers(2, &[1])), NodeId(1))
    };
    assert_eq!(restarted(7, false), 0, "only its process was gone");
    assert_eq!(restarted(8, false), 256);
    assert_eq!(restarted(7, true), 256);
}

#[test]
fn no_more_is_given_up_than_was_agreed_to() {
    let survey = survey(&state(3, 3), answers(3, &[]));
    let plan = proto::NodePlan { groups_lost: vec![1, 2], groups_in_doubt: 3, ..Default::default() };
    let refused = |agreed: Option<(u32, u32)>| {
        let agreed =
            agreed.map(|(groups_lost, groups_in_doubt)| proto::AgreedLosses { groups_lost, groups_in_doubt });
        more_than_agreed(node(&survey, 2), &plan, agreed).map(|refusal| refusal.code)
    };
    assert_eq!(refused(None), None, "the operator did not want to be asked");
    assert_eq!((refused(Some((2, 3))), refused(Some((9, 0)))), (None, None));
    assert_eq!(refused(Some((2, 2))), Some(Code::NodeNeeded));
    assert_eq!(refused(Some((1, 9))), Some(Code::NodeNeeded), "what was at risk would be lost");
}
