//! What is set aside for entries that are pending: capacity that they may need, and journal to carry them.
//!
//! Used by `engine`, `group`, `carry` and `recover`. What several entries write to is set aside once: a new block under many small
//! writes is one block.
//!
//! Invariants
//! - `units` and `blocks` count each of them once that a pending entry claims.

use std::collections::hash_map;

use xsan_protocol::ids::{BlockKey, GroupId};
use xsan_protocol::units::UNITS_PER_BLOCK;

use super::index::MixMap;

const _: () = assert!(UNITS_PER_BLOCK <= u64::BITS as usize);

/// What a write needs of one block that has no place yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// By bit.
    pub units: u64,
    /// The block itself.
    pub block: bool,
}

impl Wanted {
    pub const fn is_none(self) -> bool {
        self.units == 0 && !self.block
    }

    /// Units and blocks.
    pub fn counts(self) -> (u32, u32) {
        (self.units.count_ones(), u32::from(self.block))
    }

    fn units(self) -> impl Iterator<Item = usize> {
        (0..UNITS_PER_BLOCK).filter(move |unit| self.units >> unit & 1 == 1)
    }
}

/// What is set aside for one entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    pub wanted: Wanted,
    /// Of the journal, to carry it.
    pub journal_pages: u32,
}

/// For all pending entries.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    journal_pages: u32,
    units: u32,
    blocks: u32,
    claimed: MixMap<(GroupId, BlockKey), Claimed>,
}

/// How many entries claim a block, it or one of its units, and each of these.
#[derive(Debug, PartialEq, Eq)]
struct Claimed {
    entries: u32,
    block: u32,
    units: [u32; UNITS_PER_BLOCK],
}

impl Reserved {
    pub const fn journal_pages(&self) -> u32 {
        self.journal_pages
    }

    pub const fn units(&self) -> u32 {
        self.units
    }

    pub const fn blocks(&self) -> u32 {
        self.blocks
    }

    pub fn add(&mut self, group: GroupId, key: BlockKey, claim: Claim) {
        self.journal_pages += claim.journal_pages;
        if claim.wanted.is_none() {
            return;
        }
        let none = Claimed { entries: 0, block: 0, units: [0; UNITS_PER_BLOCK] };
        let claimed = self.claimed.entry((group, key)).or_insert(none);
        claimed.entries += 1;
        if claim.wanted.block {
            self.blocks += u32::from(claimed.block == 0);
            claimed.block += 1;
        }
        for unit in claim.wanted.units() {
            self.units += u32::from(claimed.units[unit] == 0);
            claimed.units[unit] += 1;
        }
    }

    /// # Panics
    /// It was not added, or was released: our bug.
    pub fn release(&mut self, group: GroupId, key: BlockKey, claim: Claim) {
        self.journal_pages -= claim.journal_pages;
        if claim.wanted.is_none() {
            return;
        }
        let hash_map::Entry::Occupied(mut found) = self.claimed.entry((group, key)) else {
            panic!("{group} {key:?} is claimed by nobody");
        };
        let claimed = found.get_mut();
        claimed.entries -= 1;
        if claim.wanted.block {
            claimed.block -= 1;
            self.blocks -= u32::from(claimed.block == 0);
        }
        for unit in claim.wanted.units() {
            claimed.units[unit] -= 1;
            self.units -= u32::from(claimed.units[unit] == 0);
        }
        if claimed.entries == 0 {
            found.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use xsan_protocol::ids::{BlockIndex, Layer, Lineage, PoolId};

    use super::*;

    const fn claim(units: u64, block: bool) -> Claim {
        Claim { wanted: Wanted { units, block }, journal_pages: 2 }
    }

    #[test]
    fn what_many_entries_claim_is_set_aside_once_until_the_last_of_them_is_done() {
        let group = GroupId::new(PoolId(1), 0);
        let key = |index| BlockKey { lineage: Lineage(1), layer: Layer(0), index: BlockIndex(index) };
        let mut reserved = Reserved::default();
        reserved.add(group, key(0), claim(0b011, true));
        reserved.add(group, key(0), claim(0b110, true));
        reserved.add(group, key(1), claim(1 << 63, false));
        reserved.add(group, key(2), claim(0, false));
        assert_eq!((reserved.units(), reserved.blocks(), reserved.journal_pages()), (4, 1, 8));
        reserved.release(group, key(0), claim(0b011, true));
        assert_eq!((reserved.units(), reserved.blocks()), (3, 1), "the other one still needs it");
        reserved.release(group, key(0), claim(0b110, true));
        reserved.release(group, key(1), claim(1 << 63, false));
        reserved.release(group, key(2), claim(0, false));
        assert_eq!(reserved, Reserved::default());
    }
}
