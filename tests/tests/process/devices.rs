//! Devices that fail under load: their replicas are made or led elsewhere, no client sees an error, `health` names
//! them. The devices are loop devices; needs root.

use std::time::{Duration, Instant};

use serde_json::Value;
use xsan_protocol::proto::NodeStatus;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field};
use xsan_tests::device::LoopDevice;
use xsan_tests::node::NodeOptions;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::wait::{Look, until};

const VOLUME: &str = "device";
const VOLUME_PAGES: u64 = (256 << 20) / PAGE_SIZE as u64;
const PAGES_AT_ONCE: u64 = 256;
const SEED: u64 = 91;
const DEVICE_BYTES: u64 = 1 << 30;
/// Less than the volume, more than a store lays out before it is written to.
const POOL_BYTES: u64 = 200 << 20;
/// A clean stop of a node with a failed store: far less than the 5 s that flushes may take.
const STOP_MAX: Duration = Duration::from_secs(4);
const OPERATIONS_AFTER: u64 = 200;
const VICTIM: usize = 1;

fn start(devices: &[&dyn Fn(&Cluster) -> LoopDevice]) -> Cluster {
    let options = NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::prepare(options).unwrap();
    for device in devices {
        let device = device(&cluster);
        cluster.use_device(VICTIM, device);
    }
    cluster.add_nodes(3).unwrap();
    cluster.create_volume(VOLUME, "256MiB", 3).unwrap();
    cluster
}

fn over_file(cluster: &Cluster, name: &str) -> LoopDevice {
    LoopDevice::over_file(&cluster.directory().join(name), DEVICE_BYTES).unwrap()
}

/// Waits until `health` says that the node's store failed, with the exit code of an error.
fn wait_named(cluster: &Cluster) {
    until("health to name the failed store", SETTLE_DEADLINE, || {
        let answer = cluster.cli(&["--json", "health"])?;
        let findings: Value = serde_json::from_str(&answer.stdout)?;
        let named = findings.as_array().into_iter().flatten().any(|finding| {
            finding["code"] == "STORE_FAILED" && finding.to_string().contains(&cluster.node(VICTIM).name)
        });
        Ok(if named && answer.exit_code == Some(2) { Look::Done(()) } else { Look::NotYet(answer.stdout) })
    })
    .unwrap();
}

#[test]
fn a_device_that_turns_read_only_is_gone_on_without_until_it_is_mended() {
    let cluster = start(&[&|cluster| over_file(cluster, "disk.img")]);
    let field = Field { first: 0, pages: VOLUME_PAGES, round: 0 };
    let crowd = Crowd::start(&cluster, VOLUME, field, 90).unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    cluster.device(VICTIM).set_read_only(true).unwrap();
    wait_named(&cluster);
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();

    cluster.device(VICTIM).set_read_only(false).unwrap();
    cluster.kill_data(VICTIM).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    let summary = crowd.finish(&cluster, &[VICTIM]).unwrap();
    println!("a device turned read-only, was mended and its data process started again: {summary:?}");
    assert_eq!(summary.losses, 1, "only the killed process's client lost its connection");
}

#[test]
fn a_node_goes_on_with_its_other_device_and_has_what_the_failed_one_held_made_there() {
    let mut cluster =
        start(&[&|cluster| over_file(cluster, "disk-1.img"), &|cluster| over_file(cluster, "disk-2.img")]);
    let processes = cluster.processes().unwrap();
    let field = Field { first: 0, pages: VOLUME_PAGES, round: 0 };
    let crowd = Crowd::start(&cluster, VOLUME, field, 92).unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    cluster.device(VICTIM).set_read_only(true).unwrap();
    wait_named(&cluster);
    let name = &cluster.node(VICTIM).name;
    cluster
        .wait_status("every replica of the node to act", RESYNC_DEADLINE, |status| {
            let groups = status.groups.unwrap_or_default();
            let is_it = |node: &&NodeStatus| node.node.as_ref().is_some_and(|node| node.name == *name);
            let node = status.nodes.iter().find(is_it).unwrap();
            let failed = node.stores.iter().filter(|store| store.failed).count();
            assert!(failed <= 1, "the other device works");
            failed == 1 && node.member_groups == groups.total && groups.healthy == groups.total
        })
        .unwrap();
    crowd.wait_operations(OPERATIONS_AFTER, SETTLE_DEADLINE, &[]).unwrap();
    let summary = crowd.finish(&cluster, &[VICTIM]).unwrap();
    println!("one of a node's two devices failed, and all of its replicas are on the other: {summary:?}");
    assert_eq!((summary.losses, cluster.processes().unwrap()), (0, processes), "nothing ended");
    // It had waited for the failed store, until it was killed.
    let begin = Instant::now();
    cluster.stop_node(VICTIM).unwrap();
    assert!(begin.elapsed() < STOP_MAX, "{:?}", begin.elapsed());
}

#[test]
fn a_thin_device_whose_pool_is_full_is_gone_on_without() {
    // What the store lays out at first fits; the volume's data do not.
    let cluster = start(&[&|_| LoopDevice::over_memory(DEVICE_BYTES, POOL_BYTES).unwrap()]);
    let mut client = cluster.connect(0, VOLUME).unwrap();
    // Every page says which one it is: another's data is found.
    let content = |first: u64| -> Vec<u8> {
        (first..first + PAGES_AT_ONCE)
            .flat_map(|page| Stamp { page, generation: 1, seed: SEED }.to_page())
            .collect()
    };
    let firsts = (0..VOLUME_PAGES).step_by(PAGES_AT_ONCE as usize);
    for first in firsts.clone() {
        client.write(first * PAGE_SIZE as u64, &content(first)).unwrap();
    }
    client.flush().unwrap();
    wait_named(&cluster);
    let mut read = vec![0; PAGES_AT_ONCE as usize * PAGE_SIZE];
    for first in firsts {
        client.read(first * PAGE_SIZE as u64, &mut read).unwrap();
        for (page, bytes) in (first..).zip(read.chunks_exact(PAGE_SIZE)) {
            assert_eq!(Stamp::generation_of(bytes, page, SEED), Ok(1));
        }
    }
}
