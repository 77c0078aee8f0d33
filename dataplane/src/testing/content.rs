//! What tests write: every byte of a sector tells which write it is from, and where that was to be.
//!
//! So a page in another's place is found, also one of the same write, and a sector of two writes.

use xsan_protocol::units::SECTOR_SIZE;

use super::history::Sector;

/// The word at `index` of a sector that was written with `value`: the first is the value. 0 is zeroes.
const fn word(value: u64, (block, page, sector): Sector, index: u64) -> u64 {
    if value == 0 || index == 0 {
        return value;
    }
    let place = block.rotate_left(40) ^ (page as u64) << 32 ^ (sector as u64) << 16 ^ index;
    (value ^ place.rotate_left(23)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Fills `bytes` with what a write of `value` leaves in these sectors.
pub fn fill(bytes: &mut [u8], sectors: impl Iterator<Item = Sector>, value: u64) {
    for (sector, bytes) in sectors.zip(bytes.chunks_exact_mut(SECTOR_SIZE as usize)) {
        for (index, bytes) in (0..).zip(bytes.chunks_exact_mut(size_of::<u64>())) {
            bytes.copy_from_slice(&word(value, sector, index).to_le_bytes());
        }
    }
}

/// The value that a sector was written with.
///
/// # Errors
/// Not all of it is from that write, and from its place.
pub fn value_of(bytes: &[u8], sector: Sector) -> Result<u64, String> {
    let words = bytes.chunks_exact(size_of::<u64>());
    let mut words = words.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
    let value = words.next().expect("sectors are longer");
    match (1..).zip(words).find(|(index, found)| *found != word(value, sector, *index)) {
        None => Ok(value),
        Some((index, found)) => Err(format!(
            "sector {sector:?} begins as if {value} was written there, and its word {index} is {found:#x}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Sector = (1, 1, 1);

    fn written(value: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; SECTOR_SIZE as usize];
        fill(&mut bytes, [PLACE].into_iter(), value);
        bytes
    }

    #[test]
    fn every_byte_counts_and_so_does_the_place() {
        assert_eq!((value_of(&written(5), PLACE), value_of(&written(0), PLACE)), (Ok(5), Ok(0)));
        for place in [(2, 1, 1), (1, 2, 1), (1, 1, 2)] {
            value_of(&written(5), place).expect_err("it was written elsewhere");
        }
        for byte in 0..SECTOR_SIZE as usize {
            for value in [0, 5] {
                let mut bytes = written(value);
                bytes[byte] ^= 1;
                assert_ne!(value_of(&bytes, PLACE), Ok(value), "byte {byte}");
            }
        }
    }
}
