//! Clients that nobody here wrote: QEMU, libnbd, fio; and very many of ours at once.

use std::fs;
use std::thread;
use std::time::Duration;

use xsan_tests::cluster::Cluster;
use xsan_tests::fio::Job;
use xsan_tests::nbd::Client;
use xsan_tests::random::Random;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::tools::run;

const CONNECTION_COUNT: usize = 100;
const MIB: u64 = 1 << 20;

#[test]
fn an_image_goes_in_and_comes_out_the_same_by_qemu_and_libnbd() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("image", "128MiB", 3).unwrap();
    let (raw, qcow2, back) = (
        cluster.directory().join("image.raw"),
        cluster.directory().join("image.qcow2"),
        cluster.directory().join("back.raw"),
    );
    // Data, a hole, data: what a disk looks like.
    let mut content = vec![0; 128 * MIB as usize];
    Random::new(1).fill(&mut content[..20 * MIB as usize]);
    Random::new(2).fill(&mut content[90 * MIB as usize..]);
    fs::write(&raw, &content).unwrap();
    let path = |path: &std::path::Path| path.display().to_string();
    run("qemu-img", ["convert", "-O", "qcow2", &path(&raw), &path(&qcow2)]).unwrap();

    run("qemu-img", ["convert", "-n", "-O", "raw", &path(&qcow2), &cluster.uri(1, "image")]).unwrap();
    // Through each of the other nodes, by each of the other clients.
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", &path(&raw), &cluster.uri(2, "image")]).unwrap();
    run("nbdcopy", [&cluster.uri(0, "image"), &path(&back)]).unwrap();
    assert!(fs::read(&back).unwrap() == content, "nbdcopy read something else");

    run("nbdcopy", [&path(&raw), &cluster.uri(2, "image")]).unwrap();
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", &path(&raw), &cluster.uri(1, "image")]).unwrap();
}

#[test]
fn nbdinfo_sees_the_export_as_it_is() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("shown", "256MiB", 3).unwrap();
    cluster.connect(0, "shown").unwrap().write(64 * MIB, &[7; 1 << 16]).unwrap();
    // Zeroes that keep their space, as QEMU asks for them, and zeroes that give it back.
    let (kept, given_back) = ("write -z 8M 1M", "write -z -u 64M 16k");
    run("qemu-io", ["-f", "raw", "-c", kept, "-c", given_back, &cluster.uri(1, "shown")]).unwrap();

    let answer = run("nbdinfo", ["--json", &cluster.uri(1, "shown")]).unwrap();
    let info: serde_json::Value = serde_json::from_str(&answer.stdout).unwrap();
    let export = &info["exports"][0];
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-size"], 256 * MIB);
    for capability in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_cache"] {
        assert_eq!(export[capability], true, "{capability}: {export}");
    }
    assert_eq!(export["is_read_only"], false);

    let map = run("nbdinfo", ["--map", "--json", &cluster.uri(2, "shown")]).unwrap();
    let extents: Vec<serde_json::Value> = serde_json::from_str(&map.stdout).unwrap();
    let total: u64 = extents.iter().map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 256 * MIB);
    let holds_data = |offset: u64| {
        let covers = |extent: &&serde_json::Value| {
            let (from, length) = (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
            (from..from + length).contains(&offset)
        };
        extents.iter().find(covers).unwrap()["type"].as_u64() == Some(0)
    };
    for (offset, held) in [(8, true), (9, false), (64, false), (200, false)] {
        assert_eq!(holds_data(offset * MIB), held, "{offset} MiB: {}", map.stdout);
    }
    assert!(holds_data(64 * MIB + (1 << 15)), "{}", map.stdout);

    let list = run("nbdinfo", ["--list", &format!("nbd://{}", cluster.node(0).nbd)]).unwrap();
    assert!(list.stdout.contains("shown"), "{}", list.stdout);
    let socket = cluster.node(0).data_dir.join("nbd.sock");
    let unix = format!("nbd+unix:///shown?socket={}", socket.display());
    assert_eq!(run("nbdinfo", ["--size", &unix]).unwrap().stdout.trim(), (256 * MIB).to_string());
}

#[test]
fn qemu_io_does_every_kind_of_request() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("io", "128MiB", 3).unwrap();
    let uri = cluster.uri(1, "io");
    let mut arguments = vec!["-f", "raw"];
    for command in [
        "write -P 0xaa 0 1M",
        "write -f -P 0xbb 512 512",
        "write -z 2M 1M",
        "write -P 0xcc 40M 32M",
        "read -P 0xaa 0 512",
        "read -P 0xbb 512 512",
        "read -P 0xaa 1024 1023k",
        "read -P 0 2M 1M",
        "read -P 0xcc 40M 32M",
        "discard 40M 16M",
        "read -P 0xcc 56M 16M",
        "flush",
    ] {
        arguments.extend(["-c", command]);
    }
    arguments.push(&uri);
    let answer = run("qemu-io", &arguments).unwrap();
    // qemu-io says "Pattern verification failed" and goes on.
    assert!(!answer.stdout.contains("failed"), "{}", answer.stdout);
}

#[test]
fn fio_verifies_what_it_wrote_through_two_gateways_at_once() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("fio", "1GiB", 3).unwrap();
    let uris = [cluster.uri(0, "fio"), cluster.uri(2, "fio")];
    thread::scope(|scope| {
        for (index, uri) in uris.iter().enumerate() {
            let report = cluster.directory().join(format!("fio-{index}.json"));
            scope.spawn(move || {
                let job = Job::verified(uri, index as u64 * 512 * MIB, 256 * MIB, index as u64 + 1);
                let outcome = job.run(&report).unwrap();
                assert!(outcome.write.bytes >= 256 * MIB && outcome.read.bytes >= 256 * MIB, "{outcome:?}");
            });
        }
    });
}

#[test]
fn a_hundred_connections_work_at_once() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("many", "256MiB", 3).unwrap();
    let connect =
        |index: usize| Client::connect(cluster.node(index % 3).nbd, "many", Duration::from_secs(30)).unwrap();
    let mut clients: Vec<Client> = (0..CONNECTION_COUNT).map(connect).collect();
    thread::scope(|scope| {
        for (index, client) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                for generation in 1..=20 {
                    let page = (index * 97) as u64;
                    let stamp = Stamp { page, generation, seed: index as u64 };
                    client.write(page * PAGE_SIZE as u64, &stamp.to_page()).unwrap();
                    let mut bytes = vec![0; PAGE_SIZE];
                    client.read(page * PAGE_SIZE as u64, &mut bytes).unwrap();
                    assert_eq!(Stamp::generation_of(&bytes, page, index as u64), Ok(generation));
                }
            });
        }
    });
}
