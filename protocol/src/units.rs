//! Sizes of the things XSAN counts in, and ranges of pages.

/// Bytes of a sector, the smallest thing a client may address.
pub const SECTOR_SIZE: u32 = 512;
/// Bytes of a page: the unit of checksum, of the journal and of device I/O.
pub const PAGE_SIZE: usize = 4096;
/// Bytes of a unit: what capacity is allocated in and what carries a version.
pub const UNIT_SIZE: usize = 64 * 1024;
/// Bytes of a block: what is placed.
pub const BLOCK_SIZE: usize = 4 * 1024 * 1024;

pub const PAGES_PER_UNIT: usize = UNIT_SIZE / PAGE_SIZE;
pub const PAGES_PER_BLOCK: usize = BLOCK_SIZE / PAGE_SIZE;
pub const UNITS_PER_BLOCK: usize = BLOCK_SIZE / UNIT_SIZE;

const _: () = assert!(PAGES_PER_UNIT == 16);
const _: () = assert!(UNITS_PER_BLOCK == 64);
const _: () = assert!(PAGES_PER_BLOCK <= u16::MAX as usize);

/// Pages of one block: `first .. first + count`, within the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRange {
    pub first: u16,
    pub count: u16,
}

impl PageRange {
    /// Pages `first .. first + count`.
    ///
    /// # Panics
    /// Empty, or past the end of a block.
    pub const fn new(first: u16, count: u16) -> Self {
        assert!(count > 0);
        assert!(first as usize + count as usize <= PAGES_PER_BLOCK);
        Self { first, count }
    }

    /// All the pages of unit `unit`.
    pub const fn of_unit(unit: u8) -> Self {
        Self::new(unit as u16 * PAGES_PER_UNIT as u16, PAGES_PER_UNIT as u16)
    }

    /// The smallest range of pages around bytes `offset .. offset + length` of a block.
    ///
    /// # Panics
    /// Empty, or past the end of a block.
    pub const fn around(offset: u32, length: u32) -> Self {
        assert!(length > 0);
        let first = offset as usize / PAGE_SIZE;
        let end = (offset as usize + length as usize).div_ceil(PAGE_SIZE);
        Self::new(first as u16, (end - first) as u16)
    }

    pub const fn end(self) -> u16 {
        self.first + self.count
    }

    pub const fn bytes(self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Offset of the first page in its block, in bytes.
    pub const fn byte_offset(self) -> u32 {
        self.first as u32 * PAGE_SIZE as u32
    }

    pub const fn overlaps(self, other: Self) -> bool {
        self.first < other.end() && other.first < self.end()
    }

    pub const fn contains(self, page: u16) -> bool {
        self.first <= page && page < self.end()
    }

    pub const fn first_unit(self) -> u8 {
        (self.first as usize / PAGES_PER_UNIT) as u8
    }

    pub const fn last_unit(self) -> u8 {
        ((self.end() as usize - 1) / PAGES_PER_UNIT) as u8
    }

    /// Does the range hold every page of `unit`?
    pub const fn covers_unit(self, unit: u8) -> bool {
        let start = unit as u16 * PAGES_PER_UNIT as u16;
        self.first <= start && start + PAGES_PER_UNIT as u16 <= self.end()
    }

    pub fn units(self) -> std::ops::RangeInclusive<u8> {
        self.first_unit()..=self.last_unit()
    }

    pub fn pages(self) -> std::ops::Range<u16> {
        self.first..self.end()
    }
}
