//! What operators ask for: maintenance, removal, and nodes that are given up.

use super::*;

#[test]
fn a_node_in_maintenance_hands_every_primary_over_and_leads_none_while_it_is_on() {
    let mut cluster = Cluster::new(3, 3);
    let resting = cluster.primary();
    let [left, right] = cluster.others(&[resting])[..] else { panic!() };
    let led = cluster.led_by(resting);
    cluster.set_maintenance(resting, true);
    assert_eq!(cluster.follow(), led);
    assert_eq!(cluster.led_by(resting), 0);
    assert!(cluster.led_by(left).abs_diff(cluster.led_by(right)) <= 2);
    assert!(cluster.acting().contains(&resting), "it keeps its replicas");
    cluster.confirm_all();
    // Balance would have it lead what it is preferred for.
    for _ in 0..20 {
        cluster.rest();
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        assert_eq!(cluster.led_by(resting), 0);
        assert_eq!(cluster.follow(), 0);
    }
    // Another primary dies: the third takes over, not the one in maintenance.
    cluster.set_health(left, Health::Gone);
    assert!(cluster.step());
    assert_eq!((cluster.led_by(resting), cluster.led_by(right)), (0, 256));
    // With nobody else left, it leads rather than that there is no I/O.
    cluster.set_health(left, Health::Up);
    let mut cluster = Cluster::new(1, 1);
    cluster.set_maintenance(NodeId(1), true);
    assert_eq!(cluster.follow(), 0);
    assert_eq!(cluster.led_by(NodeId(1)), 256);
}

#[test]
fn after_maintenance_a_node_leads_again() {
    let mut cluster = Cluster::new(3, 3);
    let resting = cluster.primary();
    let led = cluster.led_by(resting);
    cluster.set_maintenance(resting, true);
    cluster.follow();
    cluster.set_maintenance(resting, false);
    for _ in 0..64 {
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        cluster.confirm_all();
    }
    assert_eq!(cluster.led_by(resting), led);
}

#[test]
fn a_node_that_leaves_gives_its_replicas_away_and_no_group_ever_has_fewer() {
    let mut cluster = Cluster::new(4, 3);
    cluster.leave(NodeId(4), Departure::Leaving);
    let members = |cluster: &Cluster| {
        cluster.state.map().groups.values().filter(|group| group.member(NodeId(4)).is_some()).count()
    };
    assert!(members(&cluster) > 0);
    let mut steps = 0;
    while members(&cluster) > 0 {
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        promote_all(&mut cluster);
        for _ in 0..4 {
            cluster.confirm_all();
            cluster.step();
            let least = cluster.state.map().groups.values().map(|group| group.acting().count()).min();
            assert_eq!(least, Some(3));
        }
        steps += 1;
        assert!(steps < 100, "it comes to an end");
    }
    assert_eq!(cluster.led_by(NodeId(4)), 0);
    assert!(cluster.state.map().groups.values().all(|group| group.acting().count() == 3));
}

#[test]
fn a_group_goes_on_without_its_only_copy_once_the_operator_gave_that_up() {
    let mut cluster = Cluster::new(2, 1);
    let dead = cluster.primary();
    let other = cluster.others(&[dead])[0];
    cluster.set_health(dead, Health::Gone);
    cluster.rest();
    assert_eq!(cluster.follow(), 0, "nobody gave it up");
    let held = cluster.led_by(dead);
    cluster.leave(dead, Departure::Lost);
    cluster.rest();
    assert_eq!(cluster.follow(), held);
    assert_eq!((cluster.primary(), cluster.acting()), (other, vec![other]));
    assert_eq!(cluster.led_by(dead), 0);
    cluster.confirm_all();
    cluster.rest();
}

#[test]
fn a_lost_node_that_lives_keeps_its_groups_until_they_have_moved() {
    let mut cluster = Cluster::new(2, 1);
    let alive = cluster.primary();
    cluster.leave(alive, Departure::Lost);
    assert_eq!(cluster.follow(), 0);
    cluster.set_health(alive, Health::Assumed);
    assert_eq!(cluster.follow(), 0, "it may have a lease of an earlier leader");
}

#[test]
fn members_that_are_back_go_on_without_a_lost_one_and_those_that_are_not_are_waited_for() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    cluster.start(a.0, 2, 8, false);
    cluster.set_health(b, Health::Gone);
    cluster.leave(c, Departure::Lost);
    assert_eq!(cluster.follow(), 0, "b may come back with what a lost in the power cut");
    cluster.start(b.0, 2, 8, false);
    cluster.rest();
    assert!(cluster.follow() > 0);
    assert_eq!(cluster.acting(), [a, b]);
    assert!(cluster.group().member(c).is_none());
}

#[test]
fn a_damaged_member_does_not_act_beside_a_whole_one() {
    for damaged_is_first in [false, true] {
        let mut cluster = Cluster::new(3, 3);
        let [a, b, c] = cluster.others(&[])[..] else { panic!() };
        for node in [a, b, c] {
            cluster.set_health(node, Health::Gone);
        }
        cluster.leave(c, Departure::Lost);
        cluster.start(a.0, 2, 8, damaged_is_first);
        cluster.start(b.0, 2, 8, !damaged_is_first);
        cluster.rest();
        assert!(cluster.follow() > 0);
        assert_eq!(cluster.acting(), [if damaged_is_first { b } else { a }]);
    }
}

#[test]
fn a_group_that_went_on_without_a_lost_node_does_so_again_when_that_was_not_settled() {
    let mut cluster = Cluster::new(3, 3);
    cluster.settles = false;
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    cluster.leave(c, Departure::Lost);
    cluster.start(a.0, 2, 8, false);
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.follow() > 0);
    assert!(!cluster.group().is_settled());
    assert_eq!(cluster.follow(), 0, "it goes on already");
    cluster.start(a.0, 3, 9, false);
    cluster.start(b.0, 3, 9, false);
    cluster.rest();
    assert!(cluster.follow() > 0);
    assert_eq!(cluster.acting(), [a, b]);
}

/// Two replicas. One node is given up, the third is brought up in its place and has just been taken in: with it the group
/// is not settled when the last holder dies. Returns that holder, and who was taken in.
fn taken_in_when_the_holder_dies() -> (Cluster, NodeId, NodeId) {
    let mut cluster = Cluster::new(3, 2);
    let (holder, first_dead) = (cluster.primary(), cluster.secondary());
    let taken_in = cluster.others(&[holder, first_dead])[0];
    cluster.set_health(first_dead, Health::Gone);
    cluster.leave(first_dead, Departure::Lost);
    while !cluster.learners().contains(&taken_in) {
        assert!(cluster.step(), "it is brought up");
        cluster.confirm_all();
    }
    cluster.settles = false;
    cluster.wish(taken_in, ProposedChange::Promote);
    assert!(cluster.step());
    cluster.confirm_all();
    assert!(!cluster.group().is_settled());
    cluster.set_health(holder, Health::Gone);
    cluster.rest();
    (cluster, holder, taken_in)
}

/// The group waited for a node that was given up, for ever: who was taken in lived, and passed for one that serves.
#[test]
fn who_was_taken_in_goes_on_alone_when_the_holder_is_given_up() {
    let (mut cluster, holder, taken_in) = taken_in_when_the_holder_dies();
    assert_eq!(cluster.follow_group(), None, "the holder may come back");
    cluster.leave(holder, Departure::Lost);
    cluster.rest();
    assert_eq!(cluster.follow_group(), Some(vec![taken_in]));
    assert_eq!(cluster.primary(), taken_in);
    assert_eq!(cluster.follow_group(), None, "it goes on already");
}

/// It was ignored when it had started again, and the group went on empty, or with it beside empty replicas.
#[test]
fn who_was_taken_in_and_comes_back_is_no_worse_than_empty_replicas() {
    let (mut cluster, holder, taken_in) = taken_in_when_the_holder_dies();
    cluster.add_node(4);
    cluster.set_health(taken_in, Health::Gone);
    cluster.leave(holder, Departure::Lost);
    assert_eq!(cluster.follow_group(), None, "it may come back with what nobody else has");
    cluster.start(taken_in.0, 2, 8, false);
    cluster.rest();
    assert_eq!(cluster.follow_group(), Some(vec![taken_in]));
    assert_eq!(cluster.group().learners().count(), 0);
    assert_eq!(cluster.follow_group(), None, "it goes on already");
}

#[test]
fn when_who_was_taken_in_is_given_up_too_the_group_goes_on_empty() {
    let (mut cluster, holder, taken_in) = taken_in_when_the_holder_dies();
    cluster.add_node(4);
    cluster.set_health(taken_in, Health::Gone);
    cluster.leave(holder, Departure::Lost);
    cluster.leave(taken_in, Departure::Lost);
    assert_eq!(cluster.follow_group(), Some(vec![NodeId(4)]));
}

mod planner {
    //! The planner with its clock and leases: who is left out, and when.

    use super::*;
    use crate::lease::{Beat, LeaseTable};
    use crate::placement::planner::Planner;
    use crate::timing::OUT_AFTER;

    /// Four nodes, three replicas; node 4 has been silent since `0`, the others beat at every step of 1 s.
    struct Cluster4 {
        cluster: Cluster,
        leases: LeaseTable,
        planner: Planner,
    }

    impl Cluster4 {
        fn new() -> Self {
            let cluster = Cluster::new(4, 3);
            let leases = LeaseTable::new(BootTime(0), Duration::from_secs(2));
            Self { cluster, leases, planner: Planner::default() }
        }

        /// Lets time pass; returns the number of groups that have a learner then.
        fn pass(&mut self, seconds: u64) -> usize {
            for _ in 0..seconds {
                self.cluster.pass(Duration::from_secs(1));
                let now = self.cluster.now;
                for node in 1..=3 {
                    let data = self.cluster.state.map().nodes[&NodeId(node)].data.as_ref();
                    let incarnation = data.map(|data| data.incarnation);
                    let map_version = self.cluster.state.version();
                    let beat = Beat {
                        node: NodeId(node),
                        incarnation,
                        stopped: None,
                        sent: now,
                        map_version,
                        heard: now,
                    };
                    self.leases.on_beat(now, &beat, incarnation, true);
                }
                let changes =
                    self.planner.plan(now, &self.cluster.state, &mut self.leases, &[], &BTreeSet::new());
                self.cluster.apply(changes);
                self.cluster.settle();
                self.leases.release();
            }
            self.cluster.state.map().groups.values().filter(|group| group.learners().count() > 0).count()
        }
    }

    #[test]
    fn a_node_gone_for_the_default_time_is_rebuilt_elsewhere() {
        let mut cluster = Cluster4::new();
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() - 10), 0);
        assert!(cluster.pass(20) > 0);
    }

    #[test]
    fn the_time_is_a_setting_of_the_cluster() {
        let mut cluster = Cluster4::new();
        let down_out_interval = Some(Duration::from_secs(30));
        cluster
            .cluster
            .state
            .apply(&Command::ChangeSettings(SettingsChange { down_out_interval, ..Default::default() }));
        assert_eq!(cluster.pass(25), 0);
        assert!(cluster.pass(15) > 0);
    }

    #[test]
    fn a_node_in_maintenance_is_not_rebuilt_however_long_it_is_gone() {
        let mut cluster = Cluster4::new();
        cluster.cluster.set_maintenance(NodeId(4), true);
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() + 60), 0);
        assert!(cluster.cluster.state.map().groups.values().all(|group| group.acting().count() >= 2));
        // The time in maintenance does not count afterwards.
        cluster.cluster.set_maintenance(NodeId(4), false);
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() - 10), 0);
        assert!(cluster.pass(20) > 0);
    }

    #[test]
    fn a_dead_node_that_leaves_is_rebuilt_at_once() {
        let mut cluster = Cluster4::new();
        assert_eq!(cluster.pass(10), 0);
        cluster.cluster.leave(NodeId(4), Departure::Leaving);
        assert!(cluster.pass(2) > 0);
    }

    /// Its volumes stayed attached there, so that it could not be removed. Found by reading.
    #[test]
    fn nobody_waits_for_a_dead_node_in_maintenance_that_leaves() {
        let mut cluster = Cluster4::new();
        cluster.cluster.set_maintenance(NodeId(4), true);
        cluster.pass(OUT_AFTER.as_secs() + 10);
        assert!(cluster.planner.out().is_empty());
        cluster.cluster.leave(NodeId(4), Departure::Leaving);
        cluster.pass(OUT_AFTER.as_secs() + 10);
        assert_eq!(*cluster.planner.out(), [NodeId(4)].into());
    }
}
