//! What is promised to be on stable media: the devices of all acting members were flushed before the answer.
//!
//! The kernel counts the flushes of a loop device, whatever XSAN takes for one. Needs root.

use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::device::LoopDevice;
use xsan_tests::nbd::Client;
use xsan_tests::node::NodeOptions;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};

const NODE_COUNT: usize = 3;
const DEVICE_BYTES: u64 = 1 << 30;
/// Each in a block of its own, so that all nodes lead some of their groups.
const ROUNDS: u64 = 50;
const PAGES_APART: u64 = 1024;

/// A client of a new volume, which all nodes have.
fn create_volume(cluster: &Cluster, durability: &str) -> Client {
    let create = ["volume", "create", "--name", durability, "--size", "256MiB", "--replica-count", "3"];
    cluster.cli(&[&create[..], &["--durability", durability]].concat()).unwrap().succeeded().unwrap();
    let mut client = cluster.connect(0, durability).unwrap();
    client.read(0, &mut [0; PAGE_SIZE]).unwrap();
    cluster.wait_healthy(SETTLE_DEADLINE).unwrap();
    client
}

fn flush_counts(cluster: &Cluster) -> Vec<u64> {
    (0..NODE_COUNT).map(|node| cluster.device(node).flush_count().unwrap()).collect()
}

/// Every device is flushed between the start and the end of `write`, each time: flushes of destage, which waits for a
/// pause, can not stand in for all that are missing.
fn assert_flushed(cluster: &Cluster, what: &str, mut write: impl FnMut(u64, &[u8])) {
    for round in 0..ROUNDS {
        let page = round * PAGES_APART;
        let content = Stamp { page, generation: 1, seed: 1 }.to_page();
        let before = flush_counts(cluster);
        write(page * PAGE_SIZE as u64, &content);
        let after = flush_counts(cluster);
        let flushed = after.iter().zip(&before).all(|(after, before)| after > before);
        assert!(flushed, "round {round}, {what}: flushes of the devices went from {before:?} to {after:?}");
    }
}

#[test]
fn every_member_flushes_its_device_before_an_answer_that_promises_it() {
    let mut cluster = Cluster::prepare(NodeOptions::default()).unwrap();
    for node in 0..NODE_COUNT {
        let file = cluster.directory().join(format!("disk-{node}.img"));
        cluster.use_device(node, LoopDevice::over_file(&file, DEVICE_BYTES).unwrap());
    }
    cluster.add_nodes(NODE_COUNT).unwrap();

    let mut client = create_volume(&cluster, "on-flush");
    assert_flushed(&cluster, "a write and a flush", |offset, content| {
        client.write(offset, content).unwrap();
        client.flush().unwrap();
    });
    assert_flushed(&cluster, "a write with FUA", |offset, content| {
        client.write_fua(offset, content).unwrap();
    });
    let mut client = create_volume(&cluster, "every-write");
    assert_flushed(&cluster, "a write of a volume that is durable with every write", |offset, content| {
        client.write(offset, content).unwrap();
    });
}
