//! Bytes of a device changed behind XSAN's back: reads return right data, and the damage is repaired.

use std::fs::File;

use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::control::repaired_pages;
use xsan_tests::random::Random;
use xsan_tests::rot::{find_pages, overwrite, wait_destaged};
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::wait::{Look, until};

const PAGE_COUNT: u64 = 32;
const DAMAGED_COUNT: u64 = 5;
const SEED: u64 = 21;

fn content(page: u64) -> Vec<u8> {
    Stamp { page, generation: 1, seed: SEED }.to_page()
}

#[test]
fn a_page_overwritten_behind_its_back_is_never_returned_and_is_repaired() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("rot", "256MiB", 3).unwrap();
    let mut client = cluster.connect(0, "rot").unwrap();
    for page in 0..PAGE_COUNT {
        client.write(page * PAGE_SIZE as u64, &content(page)).unwrap();
    }
    client.flush().unwrap();
    wait_destaged(&cluster, "rot", 1).unwrap();

    let block = cluster.control().locate("rot", 0).unwrap();
    let primary = block.replicas.iter().find(|replica| replica.role == "primary").unwrap();
    let node = cluster.nodes().iter().find(|node| node.name == primary.node_name).unwrap();

    let mut random = Random::new(SEED);
    let repaired = repaired_pages(&cluster.status().unwrap());
    for page in 0..DAMAGED_COUNT {
        let wanted = content(page);
        let overwritten = overwrite(&node.device_file(), |found| found == wanted, &mut random).unwrap();
        assert!(overwritten > 0, "page {page} is nowhere in {}", node.device_file().display());
        let mut bytes = vec![0; PAGE_SIZE];
        client.read(page * PAGE_SIZE as u64, &mut bytes).unwrap();
        assert_eq!(Stamp::generation_of(&bytes, page, SEED), Ok(1), "page {page} was returned damaged");
    }
    for page in 0..DAMAGED_COUNT {
        let wanted = content(page);
        until("the page to be mended", SETTLE_DEADLINE, || {
            let file = File::open(node.device_file())?;
            let back = !find_pages(&file, |found| found == wanted)?.is_empty();
            Ok(if back { Look::Done(()) } else { Look::NotYet(format!("page {page} is not there")) })
        })
        .unwrap();
    }
    cluster
        .wait_status("the repairs to be counted", SETTLE_DEADLINE, |status| {
            repaired_pages(status) >= repaired + DAMAGED_COUNT
        })
        .unwrap();
    assert!(node.log_text().unwrap().to_lowercase().contains("damaged"), "no log line tells of the repair");
    // Every page is right through every gateway, on the repaired primary too.
    for gateway in 0..3 {
        let mut client = cluster.connect(gateway, "rot").unwrap();
        for page in 0..PAGE_COUNT {
            let mut bytes = vec![0; PAGE_SIZE];
            client.read(page * PAGE_SIZE as u64, &mut bytes).unwrap();
            assert_eq!(Stamp::generation_of(&bytes, page, SEED), Ok(1));
        }
    }
}
