//! A node that works, but far slower than its peers: it is found and told; when the operator wants that, clients wait for it
//! no more, and it acts again once it keeps up. And a leader of the control plane whose disk is slow.
//!
//! Links are slow, each node being in a network namespace of its own; a device is, by a control group; and flushes are, by strace. All need root.

use std::time::{Duration, Instant};

use xsan_protocol::proto::{ClusterStatusReply, NodeStatus};
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field};
use xsan_tests::device::LoopDevice;
use xsan_tests::flushes::SlowFlushes;
use xsan_tests::node::NodeOptions;
use xsan_tests::random::Random;
use xsan_tests::switch::Link;
use xsan_tests::throttle::SlowWrites;
use xsan_tests::wait::{Look, until};
use xsan_tests::writer::{Pages, Work, Writer};

const VOLUME: &str = "gray";
const VOLUME_PAGES: u64 = (256 << 20) / 4096;
/// One way; what a node writes comes twice that later to its disk, as its primary sees it.
const DELAY: Duration = Duration::from_millis(30);
const LATENCY_SLOW: Duration = Duration::from_millis(60);
const WRITES: usize = 200;
/// Of a disk in a bad moment: more than a follower waits before it calls for an election, and than a lease lasts.
const FLUSH_TAKES: Duration = Duration::from_secs(3);
/// The node whose device takes few writes.
const SLOW_DISK: usize = 1;
const WRITES_PER_SECOND: u32 = 20;
const SLOW_DISK_STALL_MAX: Duration = Duration::from_secs(1);
const OPERATIONS_AFTER: u64 = 200;

/// Waits until `health` finds the node slow, with `reason` in what it says.
fn wait_slow(cluster: &Cluster, node: usize, reason: &str) {
    let object = format!("node {}", xsan_tests::node::node_name(node));
    until("the slow node to be told", SETTLE_DEADLINE, || {
        let findings: serde_json::Value = serde_json::from_str(&cluster.cli(&["--json", "health"])?.stdout)?;
        let is_it = |finding: &serde_json::Value| {
            finding["code"] == "SLOW_MEMBER"
                && finding["object"] == object
                && finding["message"].as_str().is_some_and(|message| message.contains(reason))
        };
        let found = findings.as_array().into_iter().flatten().any(is_it);
        Ok(if found { Look::Done(()) } else { Look::NotYet(findings.to_string()) })
    })
    .unwrap();
}

fn wait_event(cluster: &Cluster, kind: &str) {
    until(kind, SETTLE_DEADLINE, || {
        let events = cluster.cli_json(&["events"])?;
        let found = events["events"].as_array().into_iter().flatten().any(|event| event["event"] == kind);
        Ok(if found { Look::Done(()) } else { Look::NotYet(events.to_string()) })
    })
    .unwrap();
}

fn node(status: &ClusterStatusReply, index: usize) -> &NodeStatus {
    let name = xsan_tests::node::node_name(index);
    status.nodes.iter().find(|node| node.node.as_ref().is_some_and(|node| node.name == name)).unwrap()
}

/// Median of single writes through a gateway.
fn write_latency(cluster: &Cluster, gateway: usize) -> Duration {
    let mut client = cluster.connect(gateway, VOLUME).unwrap();
    let mut random = Random::new(1);
    let page = vec![7; 4096];
    let mut taken: Vec<Duration> = (0..WRITES)
        .map(|_| {
            let begun = Instant::now();
            // Behind the pages that the crowd works on.
            client.write((VOLUME_PAGES + random.within(0..1024)) * 4096, &page).unwrap();
            begun.elapsed()
        })
        .collect();
    taken.sort_unstable();
    taken[taken.len() / 2]
}

#[test]
fn clients_wait_for_a_slow_node_only_as_long_as_the_operator_wants_it() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::start_switched(3, options, 41).unwrap();
    cluster.create_volume(VOLUME, "512MiB", 3).unwrap();
    let leader = cluster.leader().unwrap();
    let (slow, gateway) = ((leader + 1) % 3, (leader + 2) % 3);
    let field = Field { first: 0, pages: VOLUME_PAGES, round: 1 };
    let crowd = Crowd::start(&cluster, VOLUME, field, 41).unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();

    cluster.set_links(slow, Link::slow(DELAY));
    wait_slow(&cluster, slow, "it is its network");
    // It is told, and no more than that: every write waits for it.
    assert!(node(&cluster.status().unwrap(), slow).member_groups == 256);
    let waited = write_latency(&cluster, gateway);
    assert!(waited >= LATENCY_SLOW, "{waited:?}");

    cluster.cli(&["cluster", "set", "slow-nodes", "demote"]).unwrap().succeeded().unwrap();
    let demoted = Instant::now();
    cluster
        .wait_status("the slow node to be demoted", SETTLE_DEADLINE, |status| {
            let node = node(status, slow);
            let groups = status.groups.unwrap_or_default();
            node.learner_groups == 256 && node.member_groups == 0 && groups.inactive == 0
        })
        .unwrap();
    let demoted = demoted.elapsed();
    let latency = write_latency(&cluster, gateway);
    println!("median write {waited:?} with the slow node, {latency:?} without; demoted in {demoted:?}");
    assert!(latency < waited / 2, "{latency:?}");
    wait_event(&cluster, "node-slow");

    cluster.heal();
    let healed = Instant::now();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    println!("acts again {:?} after it was mended", healed.elapsed());
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    crowd.finish(&cluster, &[slow]).unwrap();
    cluster.stop().unwrap();
}

#[test]
fn a_slow_disk_is_told_with_the_device() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::prepare(options).unwrap();
    let device = LoopDevice::over_file(&cluster.directory().join("disk.img"), 1 << 30).unwrap();
    let path = device.path().to_owned();
    cluster.use_device(SLOW_DISK, device);
    cluster.add_nodes(3).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    let pages = Pages { first: 0, step: 16, count: VOLUME_PAGES / 16 };
    let writer = Writer::start(Work::new(vec![cluster.node(0).nbd], VOLUME, pages, 8)).unwrap();
    writer.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();

    let data = cluster.node(SLOW_DISK).child("xsan-data").unwrap();
    let slow = SlowWrites::of(data.pid, &path, WRITES_PER_SECOND).unwrap();
    wait_slow(&cluster, SLOW_DISK, &format!("its device {} takes", path.display()));
    drop(slow);
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    writer.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();
    let report = writer.stop().unwrap();
    println!("a device took {WRITES_PER_SECOND} writes a second: stall {:?}", report.stall);
    report.verify(&mut cluster.connect(0, VOLUME).unwrap(), 8).unwrap();
    cluster.stop().unwrap();
}

/// Raft answered and sent no heartbeat while its log was written: a leader lost its office to a slow disk, nobody was granted a
/// lease meanwhile, and clients of all groups waited for seconds.
#[test]
fn a_slow_disk_of_the_control_planes_leader_holds_up_nobody() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let cluster = Cluster::start_with(3, options).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    let leader = cluster.leader().unwrap();
    let (victim, gateway) = ((leader + 1) % 3, (leader + 2) % 3);
    // All over the groups.
    let pages = Pages { first: 0, step: 16, count: VOLUME_PAGES / 16 };
    let writer = Writer::start(Work::new(vec![cluster.node(gateway).nbd], VOLUME, pages, 7)).unwrap();
    writer.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();

    let control = cluster.node(leader).child("xsan-control").unwrap();
    let slow = SlowFlushes::of(control.pid, FLUSH_TAKES).unwrap();
    writer.measure_anew();
    // Every group changes, and each change goes into the log.
    cluster.kill_data(victim).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    writer.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE).unwrap();
    assert_eq!(cluster.leader().unwrap(), leader, "it leads on");
    drop(slow);
    let report = writer.stop().unwrap();
    println!(
        "a data process died while the leader's disk took {FLUSH_TAKES:?} for a flush: stall {:?}",
        report.stall
    );
    assert!(report.stall < SLOW_DISK_STALL_MAX, "stall {:?}", report.stall);
    report.verify(&mut cluster.connect(victim, VOLUME).unwrap(), 7).unwrap();
}
