//! Bytes of a device changed behind a node's back, as a disk that rots does.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;

use crate::cluster::{Cluster, SETTLE_DEADLINE};
use crate::random::Random;
use crate::stamp::PAGE_SIZE;
use crate::wait::{Look, until};

const CHUNK_BYTES: usize = 1 << 20;

/// Where the file holds a page that is wanted: holes are skipped.
pub fn find_pages(file: &File, wanted: impl Fn(&[u8]) -> bool) -> io::Result<Vec<u64>> {
    let length = file.metadata()?.len();
    let mut found = Vec::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut offset = 0;
    while let Some(start) = next_data(file, offset).filter(|start| *start < length) {
        offset = start / PAGE_SIZE as u64 * PAGE_SIZE as u64;
        let count = chunk.len().min((length - offset) as usize);
        file.read_exact_at(&mut chunk[..count], offset)?;
        for (index, candidate) in chunk[..count].chunks_exact(PAGE_SIZE).enumerate() {
            if wanted(candidate) {
                found.push(offset + (index * PAGE_SIZE) as u64);
            }
        }
        offset += count as u64;
    }
    Ok(found)
}

/// The next offset that holds data, from `offset` on.
fn next_data(file: &File, offset: u64) -> Option<u64> {
    let offset = i64::try_from(offset).expect("files are smaller than 8 EiB");
    // SAFETY: the descriptor is open for the length of the call; no memory is passed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    u64::try_from(found).ok()
}

/// Overwrites every page of the device file that is wanted; how many there were.
pub fn overwrite(path: &Path, wanted: impl Fn(&[u8]) -> bool, random: &mut Random) -> io::Result<usize> {
    let file = File::options().read(true).write(true).open(path)?;
    let places = find_pages(&file, wanted)?;
    for place in &places {
        let mut garbage = vec![0; PAGE_SIZE];
        random.fill(&mut garbage);
        file.write_all_at(&garbage, *place)?;
    }
    // The store reads past the page cache.
    file.sync_all()?;
    Ok(places.len())
}

/// Waits until the first blocks of a volume are in their place on every node: what is overwritten there stays overwritten.
pub fn wait_destaged(cluster: &Cluster, volume: &str, block_count: u64) -> Result<()> {
    until("the journals to be empty", SETTLE_DEADLINE, || {
        let journalled: u32 = (0..block_count)
            .map(|block| cluster.control().locate(volume, block))
            .collect::<Result<Vec<_>, _>>()?
            .iter()
            .flat_map(|block| &block.replicas)
            .flat_map(|replica| &replica.units)
            .map(|unit| unit.journalled_pages)
            .sum();
        Ok(if journalled == 0 { Look::Done(()) } else { Look::NotYet(format!("{journalled} pages")) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::Stamp;

    #[test]
    fn pages_are_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        let page = Stamp { page: 1, generation: 1, seed: 1 }.to_page();
        let find = || find_pages(&file, |candidate| candidate == page).unwrap();
        assert!(find().is_empty());
        file.write_all_at(&page, 3 << 20).unwrap();
        assert_eq!(find(), [3 << 20]);
    }
}
