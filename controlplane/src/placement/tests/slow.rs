//! Slow members: who is demoted, who is held back, and who acts none the less.

use super::*;

/// A cluster of so many nodes, one of which was slow and became a learner of the group.
fn with_demoted(node_count: u32, replica_count: u8) -> (Cluster, NodeId) {
    let mut cluster = Cluster::new(node_count, replica_count);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    (cluster, slow)
}

#[test]
fn a_slow_member_becomes_a_learner_and_stays_one_for_as_long_as_it_is_slow() {
    let (mut cluster, slow) = with_demoted(3, 3);
    cluster.wish(slow, ProposedChange::Promote);
    cluster.rest();
    let other = cluster.secondary();
    cluster.set_slow(other, true);
    cluster.rest();
    cluster.set_slow(other, false);
    cluster.set_slow(slow, false);
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), []);
    cluster.rest();
}

#[test]
fn a_slow_primary_hands_over_before_it_becomes_a_learner() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.primary();
    cluster.set_slow(slow, true);
    cluster.step();
    assert_eq!(cluster.primary(), slow, "`follow_wishes` relieves it");
    assert!(cluster.follow() > 0);
    cluster.settle();
    cluster.confirm_all();
    assert_ne!(cluster.primary(), slow);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.balance();
    cluster.pass(BALANCE_AFTER);
    cluster.balance();
    assert_ne!(cluster.primary(), slow, "nor does it lead again by balance");
}

#[test]
fn a_slow_learner_with_everything_acts_at_once_where_it_is_needed() {
    let (mut cluster, slow) = with_demoted(3, 3);
    let (primary, dead) = (cluster.primary(), cluster.secondary());
    cluster.set_health(dead, Health::Gone);
    cluster.rest();
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert!(cluster.acting().contains(&slow));
    assert!(cluster.acting().contains(&primary));
    assert_eq!(cluster.acting().len(), 2);
}

#[test]
fn a_slow_learner_acts_where_another_member_does_not_get_on() {
    let (mut cluster, slow) = with_demoted(3, 3);
    let silent = cluster.secondary();
    cluster.wish(silent, ProposedChange::Demote);
    cluster.rest();
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.acting().len(), 3);
    cluster.rest();
    cluster.wish(silent, ProposedChange::Demote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [silent]);
    cluster.wish(silent, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), []);
    cluster.pass(SHORT_FOR);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
}

#[test]
fn a_slow_learner_acts_where_the_primary_does_not_get_on() {
    for replica_count in [2, 3] {
        let (mut cluster, slow) = with_demoted(u32::from(replica_count), replica_count);
        let hung = cluster.primary();
        cluster.wish(hung, ProposedChange::Demote);
        cluster.rest();
        cluster.wish(slow, ProposedChange::Promote);
        assert!(cluster.step());
        assert!(cluster.acting().contains(&slow));
        assert_eq!(cluster.primary(), hung);
        cluster.wish(hung, ProposedChange::Demote);
        assert!(cluster.step());
        assert_ne!(cluster.primary(), hung);
    }
}

#[test]
fn a_primary_that_does_not_get_on_hands_over_though_no_slow_learner_has_everything() {
    let (mut cluster, _) = with_demoted(3, 3);
    let hung = cluster.primary();
    cluster.wish(hung, ProposedChange::Demote);
    cluster.rest();
    cluster.wish(hung, ProposedChange::Demote);
    assert!(cluster.step());
    assert_ne!(cluster.primary(), hung);
}

#[test]
fn a_slow_node_can_be_removed() {
    let (mut cluster, slow) = with_demoted(4, 3);
    cluster.leave(slow, Departure::Leaving);
    let new = *cluster.others(&[&cluster.acting()[..], &[slow]].concat()).first().expect("a fourth node");
    assert!(cluster.step());
    assert_eq!(cluster.learners().len(), 2);
    cluster.wish(new, ProposedChange::Promote);
    assert!(cluster.step());
    cluster.step();
    assert!(cluster.acting().contains(&new));
    assert_eq!(cluster.group().member(slow), None);
}

#[test]
fn a_slow_member_acts_on_while_another_is_in_maintenance() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    let resting = cluster.others(&[slow, cluster.primary()])[0];
    cluster.set_maintenance(resting, true);
    cluster.set_slow(slow, true);
    cluster.rest();
}

#[test]
fn a_learner_that_can_not_go_on_gets_another_epoch() {
    let (mut cluster, slow) = with_demoted(3, 3);
    cluster.wish(slow, ProposedChange::Renew);
    cluster.rest();
    cluster.set_slow(slow, false);
    cluster.wish(slow, ProposedChange::Renew);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.rest();
}
