//! A node that was away is brought up to date by difference, and then stands in for the others.

use std::time::Instant;

use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::fio::{Job, Load, Target};
use xsan_tests::writer::{Work, Writer};

const GIB: u64 = 1 << 30;
const MISSED_BYTES: u64 = 100 << 20;
const WRITE_BYTES: u64 = 4096;
const UNIT_BYTES: u64 = 64 << 10;
/// Issue: bytes moved for 100 MiB of random 4 KiB writes into a 10 GiB volume.
const MOVED_BYTES_MAX: u64 = 2 * GIB;

#[test]
fn a_returning_node_is_sent_what_it_missed_and_little_more() {
    let mut cluster = Cluster::start(3).unwrap();
    cluster.create_volume("big", "10GiB", 3).unwrap();
    let known = Work::new(vec![cluster.node(0).nbd], "big", 0..10 * GIB / WRITE_BYTES, 5);
    let writer = Writer::start(known).unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();
    cluster.kill_node(2).unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();
    let report = writer.stop().unwrap();

    let uri = cluster.uri(0, "big");
    let job = Job {
        target: Target::Nbd(&uri),
        pattern: "randwrite",
        block_size: "4k",
        depth: 32,
        offset: 0,
        size: 10 * GIB,
        runtime: None,
        verify: false,
        seed: 9,
    };
    // Pages of the known writer are overwritten by fio here and there, so it is verified before.
    report.verify(&mut cluster.connect(1, "big").unwrap(), 5).unwrap();
    let outcome = job.run_bytes(MISSED_BYTES, &cluster.directory().join("fio.json")).unwrap();
    assert_eq!(outcome.write.bytes, MISSED_BYTES);

    let moved = |cluster: &Cluster| cluster.status().unwrap().groups.unwrap_or_default().resync_bytes_moved;
    let before = moved(&cluster);
    cluster.restart(2).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    let moved_bytes = moved(&cluster) - before;
    let missed_writes = outcome.write.operations + report.operations;
    println!("missed {missed_writes} writes of 4 KiB; moved {} MiB", moved_bytes >> 20);
    assert!(moved_bytes >= MISSED_BYTES / 2, "{moved_bytes} bytes can not be all that was missed");
    // Every write dirties one unit; writes in flight when the node died may be sent twice.
    assert!(
        moved_bytes <= (missed_writes + 512) * UNIT_BYTES,
        "{moved_bytes} bytes for {missed_writes} writes"
    );
    assert!(moved_bytes <= MOVED_BYTES_MAX, "{moved_bytes} bytes");
}

#[test]
fn a_returned_node_holds_everything_when_another_is_killed() {
    let mut cluster = Cluster::start(3).unwrap();
    cluster.create_volume("turns", "1GiB", 3).unwrap();
    // Two at a time out of three, in turn: whoever came back must have all that it missed.
    let mut reports = Vec::new();
    for victim in [2, 1, 0] {
        let gateway = (victim + 1) % 3;
        let first = victim as u64 * 20_000;
        cluster.kill_node(victim).unwrap();
        let work =
            Work::new(vec![cluster.node(gateway).nbd], "turns", first..first + 5000, 70 + victim as u64);
        let writer = Writer::start(work).unwrap();
        writer.wait_operations(1500, SETTLE_DEADLINE).unwrap();
        reports.push((victim, writer.stop().unwrap()));
        cluster.restart(victim).unwrap();
        cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    }
    for victim in [0, 1, 2] {
        cluster.kill_node(victim).unwrap();
        let mut client = cluster.connect((victim + 2) % 3, "turns").unwrap();
        for (writer, report) in &reports {
            report.verify(&mut client, 70 + *writer as u64).unwrap();
        }
        cluster.restart(victim).unwrap();
        cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    }
}

#[test]
fn a_node_catches_up_with_large_writes_that_never_pause() {
    let mut cluster = Cluster::start(3).unwrap();
    cluster.create_volume("stream", "2GiB", 3).unwrap();
    let known =
        Work::new(vec![cluster.node(0).nbd], "stream", GIB / WRITE_BYTES..GIB / WRITE_BYTES + 2000, 17);
    let writer = Writer::start(known).unwrap();
    // What is kept for a learner takes the large buffers, and clients need them: neither may starve the other.
    let uri = cluster.uri(0, "stream");
    let job = Job {
        target: Target::Nbd(&uri),
        pattern: "randwrite",
        block_size: "256k-1024k",
        depth: 16,
        offset: 0,
        size: GIB,
        runtime: Some(2 * RESYNC_DEADLINE),
        verify: false,
        seed: 3,
    };
    let mut load = Load::start(&job, &cluster.directory().join("stream.json")).unwrap();
    writer.wait_operations(50, SETTLE_DEADLINE).unwrap();
    cluster.kill_node(2).unwrap();
    writer.wait_operations(200, SETTLE_DEADLINE).unwrap();
    let began = Instant::now();
    cluster.restart(2).unwrap();
    let healthy = cluster.wait_healthy(RESYNC_DEADLINE);
    println!("whole again after {:?}", began.elapsed());
    assert!(load.exit_status().unwrap().is_none(), "the load goes on");
    healthy.unwrap();
    let report = writer.stop().unwrap();
    println!("stall {:?}, {} operations", report.stall, report.operations);
    cluster.kill_node(1).unwrap();
    report.verify(&mut cluster.connect(2, "stream").unwrap(), 17).unwrap();
}
