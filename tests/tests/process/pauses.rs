//! SIGSTOP: processes that stand still, are gone on without, and wake up in a world that has moved on. They must
//! serve nothing of what they knew: histories through their own gateways, and others', are linearizable.

use std::thread;
use std::time::Duration;

use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field};
use xsan_tests::node::{NodeOptions, Part};

const VOLUME: &str = "pause";
const VOLUME_PAGES: u64 = (256 << 20) / 4096;
/// Longer than a lease and the silence after which a data process is taken to hang, together.
const PAUSE: Duration = Duration::from_secs(4);
/// Before the end of the pause.
const STALL_MAX: Duration = PAUSE;
const OPERATIONS_AFTER: u64 = 200;

#[test]
fn processes_that_stood_still_serve_nothing_from_the_past() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::start_with(3, options).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    let follower = (cluster.leader().unwrap() + 1) % 3;
    let rounds = [(Part::Data, Some(follower)), (Part::Data, None), (Part::All, None), (Part::Control, None)];
    for (round, (part, victim)) in rounds.into_iter().enumerate() {
        let leader = cluster.leader().unwrap();
        let victim = victim.unwrap_or(leader);
        let field = Field { first: 0, pages: VOLUME_PAGES, round: round as u64 };
        let crowd = Crowd::start(&cluster, VOLUME, field, 80 + round as u64).unwrap();
        crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
        let before = cluster.epochs().unwrap();

        cluster.avoid(victim);
        let paused = cluster.pause(victim, part).unwrap();
        // The fault is time itself.
        thread::sleep(PAUSE);
        crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[victim]).unwrap();
        let changes = cluster.epochs().unwrap() - before;
        paused.resume();
        cluster.heal();

        crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
        cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
        let summary = crowd.finish(&cluster, &[victim]).unwrap();
        let who = if victim == leader { "leader" } else { "follower" };
        println!("{part:?} of the {who} stood still for {PAUSE:?}: {changes} changes of groups, {summary:?}");
        assert!(changes > 0, "its groups were led by others");
        assert!(summary.stall_elsewhere < STALL_MAX, "stall {:?}", summary.stall_elsewhere);
        assert_eq!(summary.losses, 0, "no process died");
    }
}
