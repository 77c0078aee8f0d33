//! Pages that say what they are: every byte follows from (page, generation, seed).
//!
//! Generation 0 is the page of zeroes that was never written. A page that mixes two generations, or is
//! another page's, does not parse: torn and misplaced writes show up as such.

use crate::random::Random;

pub const PAGE_SIZE: usize = 4096;
const MAGIC: u64 = u64::from_le_bytes(*b"XSANSTMP");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub page: u64,
    pub generation: u64,
    pub seed: u64,
}

impl Stamp {
    pub fn fill(self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), PAGE_SIZE);
        let words = [MAGIC, self.page, self.generation, self.seed];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        self.stream().fill(&mut bytes[32..]);
    }

    pub fn to_page(self) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.fill(&mut bytes);
        bytes
    }

    /// The stamp of a page; `None` when any byte of it is not what its stamp says.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        assert_eq!(bytes.len(), PAGE_SIZE);
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        let stamp = Self { page: word(1), generation: word(2), seed: word(3) };
        (word(0) == MAGIC && stamp.to_page() == bytes).then_some(stamp)
    }

    /// The generation of `page` that these bytes hold; `Err` says what they are instead.
    pub fn generation_of(bytes: &[u8], page: u64, seed: u64) -> Result<u64, String> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        match Self::parse(bytes) {
            Some(stamp) if stamp.page == page && stamp.seed == seed => Ok(stamp.generation),
            Some(stamp) => Err(format!("page {page} of seed {seed} holds {stamp:?}")),
            None => Err(format!("page {page} holds bytes that were never written in one piece")),
        }
    }

    const fn stream(self) -> Random {
        Random::new(
            self.seed ^ self.page.rotate_left(32) ^ self.generation.wrapping_mul(0xD6E8_FEB8_6659_FD93),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_tells_its_stamp_and_a_changed_byte_is_seen() {
        let stamp = Stamp { page: 7, generation: 3, seed: 11 };
        let mut bytes = stamp.to_page();
        assert_eq!(Stamp::generation_of(&bytes, 7, 11), Ok(3));
        assert!(Stamp::generation_of(&bytes, 8, 11).is_err());
        for index in [0, 9, 31, 32, 2048, 4095] {
            bytes[index] ^= 1;
            assert_eq!(Stamp::parse(&bytes), None, "byte {index}");
            bytes[index] ^= 1;
        }
        assert_eq!(Stamp::generation_of(&vec![0; PAGE_SIZE], 7, 11), Ok(0));
    }

    #[test]
    fn halves_of_two_generations_do_not_parse() {
        let mut torn = Stamp { page: 1, generation: 1, seed: 5 }.to_page();
        torn[..2048].copy_from_slice(&Stamp { page: 1, generation: 2, seed: 5 }.to_page()[..2048]);
        assert!(Stamp::generation_of(&torn, 1, 5).is_err());
    }
}
