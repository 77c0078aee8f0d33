//! Nodes with several shards: with a store each, or without; clients of one node meet all of them.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use xsan_protocol::disk::checkpoint;
use xsan_protocol::disk::superblock::Superblock;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field};
use xsan_tests::node::NodeOptions;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::wait::{Look, until};

const VOLUME: &str = "shards";
const VOLUME_PAGES: u64 = (256 << 20) / PAGE_SIZE as u64;
const OPERATIONS: u64 = 300;
const VICTIM: usize = 1;

/// No test had ever run a process of more than one shard.
#[test]
fn nodes_of_two_shards_and_two_stores_lose_nothing_when_their_processes_die() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::two_shards() };
    let cluster = Cluster::start_with(3, options).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    let field = Field { first: 0, pages: VOLUME_PAGES, round: 0 };
    let crowd = Crowd::start(&cluster, VOLUME, field, 93).unwrap();
    crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[]).unwrap();
    for node in [1, 0, 2] {
        cluster.kill_data(node).unwrap();
        cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
        crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[]).unwrap();
    }
    let status = cluster.status().unwrap();
    for node in &status.nodes {
        let data = node.node.as_ref().and_then(|node| node.data.as_ref()).unwrap();
        let shards: BTreeSet<_> = data.stores.iter().map(|store| store.shard).collect();
        let expected: BTreeSet<_> = (0..data.shard_ports.len() as u32).collect();
        assert_eq!(shards, expected, "{node:?}");
        assert_eq!(
            data.shard_ports.len(),
            2.min(std::thread::available_parallelism().unwrap().get()),
            "{node:?}"
        );
        assert!(
            node.stores.iter().all(|store| store.used_bytes > 0 && store.checksum_errors == 0),
            "{node:?}"
        );
    }
    let summary = crowd.finish(&cluster, &[]).unwrap();
    println!("three nodes of two shards, each killed once: {summary:?}");
}

/// The process ended, and was started again and again, though it could serve its clients from the other nodes.
#[test]
fn a_node_whose_only_store_is_damaged_serves_its_clients() {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::start_with(3, options).unwrap();
    cluster.create_volume(VOLUME, "64MiB", 3).unwrap();
    let page = Stamp { page: 7, generation: 1, seed: 1 }.to_page();
    cluster.connect(0, VOLUME).unwrap().write(7 * PAGE_SIZE as u64, &page).unwrap();
    cluster.stop_node(VICTIM).unwrap();
    lose_checkpoints(&cluster.node(VICTIM).data_dir.join("data/store-0.img"));
    cluster.start_again(&[VICTIM]).unwrap();
    until("health to name the damaged store", SETTLE_DEADLINE, || {
        let health = cluster.cli(&["--json", "health"])?.stdout;
        Ok(if health.contains("STORE_FAILED") { Look::Done(()) } else { Look::NotYet(health) })
    })
    .unwrap();
    let mut client = cluster.connect(VICTIM, VOLUME).unwrap();
    let mut bytes = vec![0; PAGE_SIZE];
    client.read(7 * PAGE_SIZE as u64, &mut bytes).unwrap();
    assert!(bytes == page);
    client.write(0, &page).unwrap();
    client.flush().unwrap();
}

/// What no crash does to a store: neither of its checkpoints is left.
fn lose_checkpoints(store: &Path) {
    let file = OpenOptions::new().read(true).write(true).open(store).unwrap();
    let mut superblock = vec![0; PAGE_SIZE];
    file.read_exact_at(&mut superblock, 0).unwrap();
    let checkpoints = Superblock::decode(&superblock).unwrap().checkpoints;
    file.write_all_at(&vec![0; 2 * checkpoint::SLOT_SIZE], checkpoints.offset).unwrap();
}
