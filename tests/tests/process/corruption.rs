//! Bytes of a device changed behind XSAN's back: reads return right data, and the damage is repaired.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::control::repaired_pages;
use xsan_tests::random::Random;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};

const PAGE_COUNT: u64 = 32;
const SEED: u64 = 21;
/// A page may be moved to its place just when it is overwritten; then the garbage hits nothing.
const ATTEMPTS: usize = 5;

/// Where the file holds exactly this page: holes are skipped.
pub fn find_page(file: &File, page: &[u8]) -> Vec<u64> {
    let length = file.metadata().unwrap().len();
    let mut found = Vec::new();
    let mut chunk = vec![0; 1 << 20];
    let mut offset = 0;
    while let Some(start) = next_data(file, offset).filter(|start| *start < length) {
        offset = start / PAGE_SIZE as u64 * PAGE_SIZE as u64;
        let count = chunk.len().min((length - offset) as usize);
        file.read_exact_at(&mut chunk[..count], offset).unwrap();
        for (index, candidate) in chunk[..count].chunks_exact(PAGE_SIZE).enumerate() {
            if candidate == page {
                found.push(offset + (index * PAGE_SIZE) as u64);
            }
        }
        offset += count as u64;
    }
    found
}

/// The next offset that holds data, from `offset` on.
fn next_data(file: &File, offset: u64) -> Option<u64> {
    let offset = i64::try_from(offset).expect("files are smaller than 8 EiB");
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    u64::try_from(found).ok()
}

/// Overwrites every copy of the page in the device file; how many there were.
pub fn overwrite(path: &Path, page: &[u8], random: &mut Random) -> usize {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let places = find_page(&file, page);
    for place in &places {
        let mut garbage = vec![0; PAGE_SIZE];
        random.fill(&mut garbage);
        file.write_all_at(&garbage, *place).unwrap();
    }
    // The store reads past the page cache.
    file.sync_all().unwrap();
    places.len()
}

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
        let overwritten = overwrite(&node.device_file(), &content, &mut random);
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
                !find_page(&file, &content).is_empty(),
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

#[test]
fn a_hole_has_no_data() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let page = Stamp { page: 1, generation: 1, seed: 1 }.to_page();
    assert!(find_page(&file, &page).is_empty());
    file.write_all_at(&page, 3 << 20).unwrap();
    assert_eq!(find_page(&file, &page), [3 << 20]);
}
