//! Bytes of a device changed behind XSAN's back: reads return right data, and the damage is repaired.

use std::fs::File;

use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::control::repaired_pages;
use xsan_tests::random::Random;
use xsan_tests::rot::{find_pages, overwrite};
use xsan_tests::stamp::{PAGE_SIZE, Stamp};

const PAGE_COUNT: u64 = 32;
const SEED: u64 = 21;
/// A page may be moved to its place just when it is overwritten; then the garbage hits nothing.
const ATTEMPTS: usize = 5;

#[test]
fn a_page_overwritten_behind_its_back_is_never_returned_and_is_repaired() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("rot", "256MiB", 3).unwrap();
    let mut client = cluster.connect(0, "rot").unwrap();
    for page in 0..PAGE_COUNT {
        client.write(page * PAGE_SIZE as u64, &Stamp { page, generation: 1, seed: SEED }.to_page()).unwrap();
    }
    client.flush().unwrap();

    let block = cluster.control().locate("rot", 0).unwrap();
    let primary = block.replicas.iter().find(|replica| replica.role == "primary").unwrap();
    let node = cluster.nodes().iter().find(|node| node.name == primary.node_name).unwrap();

    let mut random = Random::new(SEED);
    let mut hits = 0;
    for attempt in 0..ATTEMPTS {
        let page = attempt as u64;
        let content = Stamp { page, generation: 1, seed: SEED }.to_page();
        let overwritten = overwrite(&node.device_file(), |page| page == content, &mut random).unwrap();
        assert!(overwritten > 0, "page {page} is nowhere in {}", node.device_file().display());
        let repaired = repaired_pages(&cluster.status().unwrap());
        let mut bytes = vec![0; PAGE_SIZE];
        client.read(page * PAGE_SIZE as u64, &mut bytes).unwrap();
        assert_eq!(Stamp::generation_of(&bytes, page, SEED), Ok(1), "page {page} was returned damaged");
        let counted = cluster.wait_status("the repair to be counted", SETTLE_DEADLINE / 10, |status| {
            repaired_pages(status) > repaired
        });
        if counted.is_ok() {
            let file = File::open(node.device_file()).unwrap();
            assert!(
                !find_pages(&file, |page| page == content).unwrap().is_empty(),
                "the page is counted as repaired and is not there"
            );
            hits += 1;
            break;
        }
    }
    assert!(hits > 0, "{ATTEMPTS} pages were overwritten and none was counted as repaired");
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
