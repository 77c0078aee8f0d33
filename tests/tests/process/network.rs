//! Links between nodes that are cut, both ways and one way, lossy and slow: nothing acknowledged is lost, no client
//! sees an error, every history is linearizable, and the cluster comes to rest, during the fault and after it.
//!
//! Each node is in a network namespace of its own; needs root.

use std::thread;
use std::time::{Duration, Instant};

use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field, Summary};
use xsan_tests::node::NodeOptions;
use xsan_tests::switch::Link;
use xsan_tests::writer::{Pages, Work, Writer};

const VOLUME: &str = "net";
const VOLUME_PAGES: u64 = (256 << 20) / 4096;
/// Issue: how long a client of another gateway may wait when a node is cut off.
const CUT_STALL_MAX: Duration = Duration::from_secs(4);
/// And when it takes two steps: a leader that hears nobody is replaced, and then its lease must end; a follower must first be found
/// to be deaf.
const ONE_WAY_STALL_MAX: Duration = Duration::from_secs(6);
/// How long links are lossy and slow.
const DISTURBED: Duration = Duration::from_secs(4);
/// Longer than a lease and an election together.
const CUT_HELD: Duration = Duration::from_secs(6);
/// When the cluster has come to terms with a node that it can not reach.
const SETTLED_AFTER: Duration = Duration::from_secs(4);
/// And with two that reach the leader, and not each other: their primaries find out write by write, and about all groups
/// when the connection has been silent for 10 s.
const PAIR_SETTLED_AFTER: Duration = Duration::from_secs(13);
/// How long it is then looked at.
const LOOKED_AT: Duration = Duration::from_secs(4);
/// A node without a lease answers nothing; its lease, and an answer that was on its way.
const LEASE_SURELY_ENDED: Duration = Duration::from_secs(2);
/// Changes of groups for each second of a cut that the cluster has come to terms with. Every group that flaps would make
/// hundreds.
const CHANGES_PER_SECOND_MAX: u64 = 3;
const OPERATIONS_AFTER: u64 = 200;

fn start(seed: u64) -> Cluster {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let cluster = Cluster::start_switched(3, options, seed).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    cluster
}

fn crowd(cluster: &Cluster, round: u64, seed: u64) -> Crowd {
    let crowd = Crowd::start(cluster, VOLUME, Field { first: 0, pages: VOLUME_PAGES, round }, seed).unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    crowd
}

/// The links are whole: everybody goes on, and nobody has seen what must not be. Where no process died, nobody lost a connection.
fn finish(cluster: &Cluster, crowd: Crowd, touched: &[usize]) -> Summary {
    let summary = finish_after_deaths(cluster, crowd, touched);
    assert_eq!(summary.losses, 0, "no gateway's process died");
    summary
}

fn finish_after_deaths(cluster: &Cluster, crowd: Crowd, touched: &[usize]) -> Summary {
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    crowd.finish(cluster, touched).unwrap()
}

#[test]
fn a_node_that_is_cut_off_is_gone_on_without_and_comes_back() {
    let mut cluster = start(1);
    let leader = cluster.leader().unwrap();
    let (victim, gateway) = ((leader + 1) % 3, (leader + 2) % 3);
    // All over the groups, and few enough to be moved soon, each with its unit, and read back twice.
    let pages = Pages { first: 0, step: 64, count: VOLUME_PAGES / 64 };
    let work = Work { flush_interval: 50, ..Work::new(vec![cluster.node(gateway).nbd], VOLUME, pages, 1) };
    let writer = Writer::start(work).unwrap();
    writer.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();

    cluster.set_links(victim, Link::CUT);
    cluster
        .wait_status("the node to be counted out", SETTLE_DEADLINE, |status| {
            status.groups.is_some_and(|groups| groups.degraded == groups.total && groups.inactive == 0)
        })
        .unwrap();
    writer.wait_operations(5 * OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();
    let healed = Instant::now();
    cluster.heal();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    let whole = healed.elapsed();
    let report = writer.stop().unwrap();
    println!(
        "cut off: stall {:?}; whole {whole:?} after the healing; {:?}",
        report.stall,
        cluster.switch().counts()
    );
    assert_eq!(report.losses, 0, "the writer's own gateway was not cut off");
    assert!(report.stall < CUT_STALL_MAX, "stall {:?}", report.stall);
    // Through the gateway that was cut off, and with only what it holds beside one other.
    report.verify(&mut cluster.connect(victim, VOLUME).unwrap(), 1).unwrap();
    cluster.kill_node(gateway).unwrap();
    report.verify(&mut cluster.connect(victim, VOLUME).unwrap(), 1).unwrap();
}

#[test]
fn a_leader_that_is_cut_off_serves_nothing_from_the_past() {
    let mut cluster = start(2);
    for round in 0..2 {
        let victim = cluster.leader().unwrap();
        let crowd = crowd(&cluster, round, 20 + round);
        let before = cluster.control().map().unwrap().groups;
        let led = before.iter().filter(|group| group.primary == victim as u32 + 1).count();

        cluster.set_links(victim, Link::CUT);
        thread::sleep(LEASE_SURELY_ENDED);
        let answered = crowd.operations(victim);
        crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[victim]).unwrap();
        // What is looked for is an answer in all this time.
        thread::sleep(CUT_HELD - LEASE_SURELY_ENDED);
        assert_eq!(crowd.operations(victim), answered, "a node without a lease answered");
        assert_ne!(cluster.leader().unwrap(), victim);
        cluster.heal();
        let summary = finish(&cluster, crowd, &[victim]);
        println!("leader of the control plane and {led} groups cut off: {summary:?}");
        assert!(led > 0, "it led no group");
        assert!(summary.stall_elsewhere < CUT_STALL_MAX, "stall {:?}", summary.stall_elsewhere);
    }
}

/// Cuts links, one way each, and holds them; the changes of groups in each second once it has settled.
fn hold_cut(
    cluster: &mut Cluster,
    crowd: &Crowd,
    cuts: &[(usize, usize)],
    settled_after: Duration,
    goes_on: usize,
) -> u64 {
    for (from, to) in cuts {
        cluster.switch().set(*from, *to, Link::CUT);
    }
    let but: Vec<usize> = (0..3).filter(|client| *client != goes_on).collect();
    but.iter().for_each(|node| cluster.avoid(*node));
    thread::sleep(settled_after);
    let epochs = cluster.epochs().unwrap();
    let started = Instant::now();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &but).unwrap();
    // Whether it stays as it is.
    thread::sleep(LOOKED_AT.saturating_sub(started.elapsed()));
    let changes = cluster.epochs().unwrap() - epochs;
    cluster.heal();
    changes.div_ceil(started.elapsed().as_secs())
}

#[test]
fn one_way_cuts_of_a_node_are_come_to_terms_with() {
    let mut cluster = start(3);
    for round in 0..4 {
        let (deaf, leads) = (round % 2 == 0, round >= 2);
        let leader = cluster.leader().unwrap();
        let victim = if leads { leader } else { (leader + 1) % 3 };
        let others = [(victim + 1) % 3, (victim + 2) % 3];
        let cuts = others.map(|other| if deaf { (other, victim) } else { (victim, other) });
        let crowd = crowd(&cluster, round, 30 + round);
        let changes = hold_cut(&mut cluster, &crowd, &cuts, SETTLED_AFTER, others[1]);
        let summary = finish(&cluster, crowd, &[victim]);
        let who = if leads { "leader" } else { "follower" };
        let what = if deaf { "hears nobody" } else { "is heard by nobody" };
        println!("a {who} {what}: {changes} changes of groups a second; {summary:?}");
        assert!(changes <= CHANGES_PER_SECOND_MAX, "{changes} changes of groups a second");
        assert!(summary.stall_elsewhere < ONE_WAY_STALL_MAX, "stall {:?}", summary.stall_elsewhere);
    }
}

#[test]
fn two_nodes_that_only_the_third_hears_are_come_to_terms_with() {
    let mut cluster = start(4);
    for round in 0..3 {
        let leader = cluster.leader().unwrap();
        let [second, third] = [(leader + 1) % 3, (leader + 2) % 3];
        let (what, cuts, settled_after, goes_on) = match round {
            0 => ("two followers", vec![(second, third), (third, second)], PAIR_SETTLED_AFTER, leader),
            1 => ("the leader and a follower", vec![(leader, third), (third, leader)], SETTLED_AFTER, second),
            _ => ("one way from a follower to the leader", vec![(third, leader)], SETTLED_AFTER, second),
        };
        let crowd = crowd(&cluster, round, 40 + round);
        let changes = hold_cut(&mut cluster, &crowd, &cuts, settled_after, goes_on);
        let touched: Vec<usize> = (0..3).filter(|node| *node != goes_on).collect();
        let summary = finish(&cluster, crowd, &touched);
        println!("cut: {what}: {changes} changes of groups a second; {summary:?}");
        assert!(changes <= CHANGES_PER_SECOND_MAX, "{changes} changes of groups a second");
        assert!(summary.stall_elsewhere < CUT_STALL_MAX, "stall {:?}", summary.stall_elsewhere);
    }
}

#[test]
fn loss_and_delay_are_no_errors() {
    let mut cluster = start(5);
    let leader = cluster.leader().unwrap();
    let rounds = [
        (Link::lossy(10), (leader + 1) % 3),
        (Link::slow(Duration::from_millis(50)), (leader + 2) % 3),
        (Link { loss_percent: 5, delay: Duration::from_millis(20), cut: false }, leader),
    ];
    for (round, (link, victim)) in rounds.into_iter().enumerate() {
        let crowd = crowd(&cluster, round as u64, 50 + round as u64);
        let (before, lost_before) = (cluster.epochs().unwrap(), cluster.switch().counts().lost);
        cluster.set_links(victim, link);
        thread::sleep(DISTURBED);
        crowd.wait_operations(20, SETTLE_DEADLINE, &[]).unwrap();
        let changes = cluster.epochs().unwrap() - before;
        let lost = cluster.switch().counts().lost - lost_before;
        cluster.heal();
        let summary = finish(&cluster, crowd, &[victim]);
        println!("{link:?}: {lost} packets lost, {changes} changes of groups, {summary:?}");
        assert_eq!(lost > 0, link.loss_percent > 0, "{lost} packets were lost");
    }
}

#[test]
fn all_nodes_killed_during_a_cut_lose_nothing_acknowledged() {
    let mut cluster = start(6);
    let leader = cluster.leader().unwrap();
    for (round, victim) in [(leader + 1) % 3, leader].into_iter().enumerate() {
        let crowd = crowd(&cluster, round as u64, 60 + round as u64);
        cluster.set_links(victim, Link::CUT);
        // Long enough to write what the one that is cut off knows nothing of.
        thread::sleep(SETTLED_AFTER);
        crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[victim]).unwrap();
        cluster.kill_all().unwrap();
        cluster.heal();
        let started = Instant::now();
        cluster.start_again(&[0, 1, 2]).unwrap();
        let summary = finish_after_deaths(&cluster, crowd, &[0, 1, 2]);
        println!("killed during a cut: whole after {:?}; {summary:?}", started.elapsed());
        // Nodes die one after the other: a client that went on to the next one loses that as well.
        assert!(
            (3..=6).contains(&summary.losses),
            "every client lost its gateway: {} losses",
            summary.losses
        );
    }
}
