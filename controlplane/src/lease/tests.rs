use super::*;

const NODE: NodeId = NodeId(1);
const FIRST: Option<Incarnation> = Some(Incarnation(11));
const SECOND: Option<Incarnation> = Some(Incarnation(12));
const GRACE: Duration = Duration::from_millis(1800);

fn at(ms: u64) -> BootTime {
    BootTime(ms * 1_000_000)
}

fn beat(incarnation: Option<Incarnation>, map_version: u64) -> Beat {
    Beat {
        node: NODE,
        incarnation,
        stopped: None,
        sent: at(5),
        map_version: MapVersion(map_version),
        heard: at(0),
    }
}

#[test]
fn a_new_leader_assumes_the_leases_of_its_predecessor() {
    let table = LeaseTable::new(at(1000), GRACE);
    assert_eq!(table.health(at(2799), NODE, FIRST), Health::Assumed);
    assert_eq!(table.health(at(2800), NODE, FIRST), Health::Gone);
    assert_eq!(table.health(at(1000), NODE, None), Health::Gone, "it never had a data process");
}

#[test]
fn a_lease_runs_from_the_beat_with_slack() {
    let mut table = LeaseTable::new(at(0), Duration::ZERO);
    assert_eq!(table.on_beat(at(100), &beat(FIRST, 1), FIRST, true), Some(LEASE));
    assert_eq!(table.health(at(100 + 1549), NODE, FIRST), Health::Up);
    assert_eq!(table.health(at(100 + 1550), NODE, FIRST), Health::Gone);
    assert_eq!(table.on_beat(at(3000), &beat(FIRST, 1), FIRST, true), Some(LEASE), "it may come back");
    assert_eq!(table.health(at(3001), NODE, FIRST), Health::Up);
}

#[test]
fn nothing_is_granted_without_quorum_or_to_what_is_not_registered() {
    let mut table = LeaseTable::new(at(0), Duration::ZERO);
    assert_eq!(table.on_beat(at(100), &beat(FIRST, 1), FIRST, false), None);
    assert_eq!(table.on_beat(at(100), &beat(SECOND, 1), FIRST, true), None);
    assert_eq!(table.on_beat(at(100), &beat(None, 1), FIRST, true), None);
    assert_eq!(table.health(at(101), NODE, FIRST), Health::Gone);
}

#[test]
fn a_reported_death_ends_the_lease_at_once_and_a_new_life_is_not_the_old_one() {
    let mut table = LeaseTable::new(at(0), GRACE);
    assert_eq!(table.on_beat(at(100), &beat(FIRST, 7), FIRST, true), Some(LEASE));
    table.on_beat(at(200), &Beat { incarnation: None, stopped: FIRST, ..beat(None, 7) }, FIRST, true);
    assert_eq!(table.health(at(201), NODE, FIRST), Health::Gone);
    assert_eq!(table.on_beat(at(210), &beat(FIRST, 7), FIRST, true), None, "a late beat does not revive it");
    assert_eq!(table.on_beat(at(300), &beat(SECOND, 0), SECOND, true), Some(LEASE));
    assert_eq!(table.health(at(301), NODE, SECOND), Health::Up);
    assert_eq!(table.confirmed(NODE, Incarnation(12)), MapVersion(0), "it has confirmed nothing yet");
    assert_eq!(table.confirmed(NODE, Incarnation(11)), MapVersion(0));
}

#[test]
fn confirmation_only_grows() {
    let mut table = LeaseTable::new(at(0), GRACE);
    table.on_beat(at(1), &beat(FIRST, 9), FIRST, true);
    table.on_beat(at(2), &beat(FIRST, 8), FIRST, true);
    assert_eq!(table.confirmed(NODE, Incarnation(11)), MapVersion(9));
}

#[test]
fn a_node_that_a_decision_takes_for_gone_is_granted_nothing_meanwhile() {
    let mut table = LeaseTable::new(at(0), Duration::ZERO);
    table.hold([NODE].into());
    assert_eq!(table.on_beat(at(100), &beat(FIRST, 1), FIRST, true), None);
    table.release();
    assert_eq!(table.on_beat(at(110), &beat(FIRST, 1), FIRST, true), Some(LEASE));
}

/// A node that heard nobody and was heard by all held every group that it led for as long as that lasted: its beats
/// renewed a lease that it did not know of. Found by the process-level test of one-way cuts.
#[test]
fn a_node_that_hears_nothing_is_gone_and_is_granted_leases_again_when_it_hears() {
    let mut table = LeaseTable::new(at(0), Duration::ZERO);
    // The answer to each beat arrives before the next.
    let hearing = |ms: u64| Beat { heard: at(ms - 250), ..beat(FIRST, 1) };
    for ms in (500..5000).step_by(250) {
        assert_eq!(table.on_beat(at(ms), &hearing(ms), FIRST, true), Some(LEASE), "at {ms}");
    }
    // The answer to the beat of 4,750 and all later ones are lost: for a while that may be chance.
    let deaf = hearing(4750);
    for ms in (5000..5750).step_by(250) {
        assert_eq!(table.on_beat(at(ms), &deaf, FIRST, true), Some(LEASE), "at {ms}");
    }
    for ms in (5750..9000).step_by(250) {
        assert_eq!(table.on_beat(at(ms), &deaf, FIRST, true), Some(Duration::ZERO), "at {ms}");
    }
    assert_eq!(table.health(at(5500 + 1549), NODE, FIRST), Health::Up, "its last lease may have arrived");
    assert_eq!(table.health(at(5500 + 1550), NODE, FIRST), Health::Gone);
    assert_eq!(table.on_beat(at(9000), &hearing(9000), FIRST, true), Some(LEASE));
    assert_eq!(table.health(at(9001), NODE, FIRST), Health::Up);
}

#[test]
fn a_node_of_a_release_that_does_not_say_what_it_heard_is_taken_to_hear() {
    let mut table = LeaseTable::new(at(0), Duration::ZERO);
    for ms in (0..5000).step_by(250) {
        assert_eq!(table.on_beat(at(ms), &beat(FIRST, 1), FIRST, true), Some(LEASE));
    }
}
