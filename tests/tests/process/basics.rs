//! What works when nothing fails: volumes, data through every gateway, restarts, an idle cluster's cost.

use std::thread;
use std::time::{Duration, Instant};

use xsan_protocol::proto::ClusterStatusReply;
use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::nbd::NbdError;
use xsan_tests::process;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::wait::{Look, until};

/// Issue: an idle node uses less than 2 % of a core and less than 200 MiB.
/// Binaries without optimisation are granted three times that: what they need is not what is promised.
const IDLE_CPU_SHARE_MAX: f64 = if cfg!(debug_assertions) { 0.06 } else { 0.02 };
const IDLE_RESIDENT_BYTES_MAX: u64 = 200 << 20;

#[test]
fn data_written_through_one_node_is_read_through_every_other() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("shared", "1GiB", 3).unwrap();
    let size_bytes = 1 << 30;

    let mut writer = cluster.connect(0, "shared").unwrap();
    assert_eq!(writer.size_bytes(), size_bytes);
    // Pages at both ends, and on both sides of the boundary between two blocks.
    let pages = [0, 1, 1023, 1024, 100_000, size_bytes / PAGE_SIZE as u64 - 1];
    for page in pages {
        let bytes = Stamp { page, generation: 1, seed: 1 }.to_page();
        writer.write(page * PAGE_SIZE as u64, &bytes).unwrap();
    }
    for node in 0..3 {
        let mut reader = cluster.connect(node, "shared").unwrap();
        let mut bytes = vec![0; PAGE_SIZE];
        for page in pages {
            reader.read(page * PAGE_SIZE as u64, &mut bytes).unwrap();
            assert_eq!(Stamp::generation_of(&bytes, page, 1), Ok(1), "through node {node}");
        }
        reader.read(50_000 * PAGE_SIZE as u64, &mut bytes).unwrap();
        assert_eq!(Stamp::generation_of(&bytes, 50_000, 1), Ok(0), "a page that was never written");
    }
    drop(writer);
    cluster.stop().unwrap();
}

#[test]
fn sectors_zeroes_and_trims_are_exact() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("exact", "64MiB", 3).unwrap();
    let mut client = cluster.connect(1, "exact").unwrap();
    // The model is the first MiB; every operation is done to both.
    let mut model = vec![0_u8; 1 << 20];
    let mut random = xsan_tests::random::Random::new(42);
    for step in 0..400_u64 {
        let sector_count = random.within(1..40);
        let first = random.within(0..(model.len() as u64 / 512) - sector_count);
        let (offset, length) = (first * 512, sector_count * 512);
        let range = offset as usize..(offset + length) as usize;
        match step % 5 {
            0..=2 => {
                random.fill(&mut model[range.clone()]);
                client.write(offset, &model[range]).unwrap();
            }
            3 => {
                model[range].fill(0);
                client.write_zeroes(offset, length as u32).unwrap();
            }
            _ => {
                let mut bytes = vec![0; range.len()];
                client.read(offset, &mut bytes).unwrap();
                assert!(bytes == model[range], "step {step}: {length} bytes at {offset}");
            }
        }
    }
    // A trim may leave or clear what it covers, and touches nothing beside it.
    client.trim(256 << 10, 256 << 10).unwrap();
    let mut bytes = vec![0; model.len()];
    client.read(0, &mut bytes).unwrap();
    assert!(bytes[..256 << 10] == model[..256 << 10]);
    assert!(bytes[512 << 10..] == model[512 << 10..]);
    let pages = bytes.chunks_exact(PAGE_SIZE).zip(model.chunks_exact(PAGE_SIZE)).enumerate();
    for (page, (bytes, before)) in pages.skip((256 << 10) / PAGE_SIZE).take((256 << 10) / PAGE_SIZE) {
        let zero = bytes.iter().all(|byte| *byte == 0);
        assert!(zero || bytes == before, "page {page} was trimmed, and is neither old nor zero");
    }
    client.flush().unwrap();
}

#[test]
fn a_request_past_the_end_is_refused_and_the_connection_lives_on() {
    let cluster = Cluster::start(1).unwrap();
    cluster.create_volume("small", "64MiB", 1).unwrap();
    let mut client = cluster.connect(0, "small").unwrap();
    let end = 64 << 20;
    let refused = client.read(end - 4096, &mut [0; 8192]);
    assert!(matches!(refused, Err(NbdError::Request(22))), "EINVAL expected: {refused:?}");
    let refused = client.write(end, &[1; 4096]);
    assert!(matches!(refused, Err(NbdError::Request(28))), "ENOSPC expected: {refused:?}");
    client.write(end - 4096, &[1; 4096]).unwrap();
    let mut bytes = [0; 4096];
    client.read(end - 4096, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn volumes_are_listed_resized_and_deleted() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("vm-1", "1GiB", 3).unwrap();
    cluster.create_volume("vm-2", "2GiB", 2).unwrap();

    let listed = cluster.cli(&["volume", "list"]).unwrap().succeeded().unwrap().stdout;
    assert!(listed.contains("vm-1") && listed.contains("vm-2"), "{listed}");
    cluster.cli_json(&["volume", "info", "vm-1"]).unwrap();

    cluster.cli(&["volume", "resize", "vm-1", "--size", "3GiB"]).unwrap().succeeded().unwrap();
    assert_eq!(cluster.connect(2, "vm-1").unwrap().size_bytes(), 3 << 30);

    cluster.cli(&["volume", "delete", "vm-2", "--yes"]).unwrap().succeeded().unwrap();
    let listed = cluster.cli(&["volume", "list"]).unwrap().succeeded().unwrap().stdout;
    assert!(!listed.contains("vm-2"), "{listed}");

    for command in [["cluster", "status"], ["node", "list"]] {
        let shown = cluster.cli(&command).unwrap().succeeded().unwrap().stdout;
        assert!(shown.contains("node-003"), "{command:?} shows:\n{shown}");
        cluster.cli_json(&command).unwrap();
    }
    let commands: [&[&str]; 6] = [
        &["cluster-status"],
        &["cluster-topology"],
        &["volume-info", "vm-1"],
        &["volume-layout", "vm-1"],
        &["block-location", "vm-1:0"],
        &["perf-stats"],
    ];
    for command in commands {
        let shown = cluster.debug(command).unwrap().succeeded().unwrap().stdout;
        assert!(!shown.trim().is_empty(), "{command:?} shows nothing");
    }
}

#[test]
fn a_clean_stop_and_start_keeps_everything() {
    let mut cluster = Cluster::start(3).unwrap();
    cluster.create_volume("kept", "256MiB", 3).unwrap();
    let stamp = Stamp { page: 77, generation: 9, seed: 3 };
    cluster.connect(0, "kept").unwrap().write(77 * PAGE_SIZE as u64, &stamp.to_page()).unwrap();

    for node in 0..3 {
        cluster.stop_node(node).unwrap();
    }
    let started = Instant::now();
    cluster.start_again(&[0, 1, 2]).unwrap();
    let mut bytes = vec![0; PAGE_SIZE];
    cluster.connect(1, "kept").unwrap().read(77 * PAGE_SIZE as u64, &mut bytes).unwrap();
    println!("all three nodes stopped and started: served after {:?}", started.elapsed());
    assert_eq!(Stamp::generation_of(&bytes, 77, 3), Ok(9));
    cluster.wait_healthy(SETTLE_DEADLINE).unwrap();
}

#[test]
fn a_killed_supervisor_takes_its_processes_with_it() {
    let mut cluster = Cluster::start(1).unwrap();
    let children =
        [cluster.node(0).child("xsan-control").unwrap(), cluster.node(0).child("xsan-data").unwrap()];
    cluster.kill_node(0).unwrap();
    for child in &children {
        assert!(child.has_ended().unwrap());
    }
    cluster.restart(0).unwrap();
}

#[test]
fn an_idle_cluster_costs_little() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("idle", "1GiB", 3).unwrap();
    let span = Duration::from_secs(10);
    let before: Vec<process::Usage> = cluster.nodes().iter().map(|node| node.usage().unwrap()).collect();
    // The measured quantity is time itself: here a sleep is the condition.
    thread::sleep(span);
    for (node, before) in cluster.nodes().iter().zip(before) {
        let after = node.usage().unwrap();
        let share = (after.cpu - before.cpu).as_secs_f64() / span.as_secs_f64();
        println!("{} idle: {:.2} % of a core, {} MiB", node.name, share * 100.0, after.resident_bytes >> 20);
        assert!(share < IDLE_CPU_SHARE_MAX, "{} uses {:.2} % of a core", node.name, share * 100.0);
        assert!(
            after.resident_bytes < IDLE_RESIDENT_BYTES_MAX,
            "{} uses {} bytes",
            node.name,
            after.resident_bytes
        );
    }
}

#[test]
fn a_deleted_volume_gives_its_space_back() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("kept", "1GiB", 3).unwrap();
    cluster.create_volume("dropped", "1GiB", 3).unwrap();
    let (mebibyte, size_bytes) = (vec![7; 1 << 20], 32 << 20);
    let mut kept = cluster.connect(1, "kept").unwrap();
    kept.write(0, &mebibyte).unwrap();
    let mut dropped = cluster.connect(0, "dropped").unwrap();
    for offset in (0..size_bytes).step_by(mebibyte.len()) {
        dropped.write(offset, &mebibyte).unwrap();
    }
    let replicas_bytes = 3 * size_bytes;
    let holds = |status: &ClusterStatusReply| status.used_bytes >= replicas_bytes;
    cluster.wait_status("the space is taken", SETTLE_DEADLINE, holds).unwrap();
    drop(dropped);
    // The session may take a moment to be counted out.
    until("the volume to be deleted", SETTLE_DEADLINE, || {
        let answer = cluster.cli(&["volume", "delete", "dropped", "--yes"])?;
        Ok(if answer.succeeded().is_ok() {
            Look::Done(())
        } else {
            Look::NotYet("it is attached".to_owned())
        })
    })
    .unwrap();
    let freed = |status: &ClusterStatusReply| status.used_bytes < replicas_bytes / 4;
    cluster.wait_status("the space is free", SETTLE_DEADLINE, freed).unwrap();
    let mut bytes = vec![0; mebibyte.len()];
    kept.read(0, &mut bytes).unwrap();
    assert!(bytes == mebibyte, "the other volume is as it was");
}
