//! What a store tells about itself: sizes, counters, and where a block lies.

use xsan_protocol::ids::Version;

/// Counted since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Data bytes of entries and pushes: what write amplification is relative to.
    pub entry_bytes: u64,
    pub written_journal_bytes: u64,
    pub written_capacity_bytes: u64,
    pub written_record_bytes: u64,
    pub written_checkpoint_bytes: u64,
    pub read_bytes: u64,
    /// Bytes of reads that were put together from several places.
    pub copied_bytes: u64,
    pub flushes: u64,
    pub destage_cycles: u64,
    /// Pages that did not match their checksum, or could not be read.
    pub checksum_errors: u64,
    pub repaired_pages: u64,
}

impl Counters {
    /// Bytes written to devices for all purposes.
    pub const fn written_bytes(&self) -> u64 {
        self.written_journal_bytes
            + self.written_capacity_bytes
            + self.written_record_bytes
            + self.written_checkpoint_bytes
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    pub capacity_bytes: u64,
    /// Capacity that is taken, or promised to pages in the journal.
    pub used_bytes: u64,
    pub journal_bytes: u64,
    pub journal_used_bytes: u64,
    pub journalled_pages: u64,
    pub blocks: u64,
    pub failed: bool,
    pub damaged: bool,
    pub counters: Counters,
}

/// Where one unit of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitLocation {
    pub unit: u8,
    pub version: Version,
    /// Offset of its capacity on the capacity device; `None` when all of it is in the journal.
    pub device_offset: Option<u64>,
    pub present_pages: u8,
    pub journalled_pages: u8,
}
