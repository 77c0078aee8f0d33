//! Layout: where the parts of a store lie on its devices.
//!
//! Worked out once at format, written into the superblock and taken from there ever after. Used by the whole store.
//!
//! Invariants
//! - Parts are whole pages, in the order superblocks, checkpoints, journal, records, units; they do not overlap.
//! - The journal has room for eight of its largest batches, so a jump over the ring's end always fits.

use xsan_protocol::disk::block_record::SLOT_SIZE;
use xsan_protocol::disk::superblock::{Extent, Superblock};
use xsan_protocol::disk::{checkpoint, journal, superblock};
use xsan_protocol::limits::PAGES_PER_WRITE_MAX;
use xsan_protocol::units::{PAGE_SIZE, UNIT_SIZE};

use crate::io::DeviceRole;

/// Smallest journal: a batch, an eighth of it, holds the largest write.
pub const JOURNAL_BYTES_MIN: u64 = 16 << 20;
const JOURNAL_BYTES_DEFAULT_MIN: u64 = 64 << 20;
const JOURNAL_BYTES_DEFAULT_MAX: u64 = 4 << 30;
/// Fewest units of a store worth having (16 MiB).
const UNITS_MIN: u64 = 256;
/// Slots of block records: one for so many units, so that a store of blocks with 8 of 64 units each still fills up.
const UNITS_PER_SLOT: u64 = 8;
const CHECKPOINTS_OFFSET: u64 = 2 * UNIT_SIZE as u64;
const JOURNAL_OFFSET: u64 = 1 << 20;

const _: () = assert!(superblock::OFFSETS[1] + Superblock::SIZE as u64 <= CHECKPOINTS_OFFSET);
const _: () = assert!(CHECKPOINTS_OFFSET + 2 * checkpoint::SLOT_SIZE as u64 <= JOURNAL_OFFSET);
const _: () =
    assert!(batch_bytes_max(JOURNAL_BYTES_MIN) > journal::HEAD_BYTES_MAX + PAGES_PER_WRITE_MAX * PAGE_SIZE);

/// Largest batch of a journal of that size.
const fn batch_bytes_max(journal_bytes: u64) -> usize {
    let whole = (journal::HEAD_BYTES_MAX + journal::DATA_PAGES_MAX * PAGE_SIZE) as u64;
    let eighth = journal_bytes / 8;
    (if eighth < whole { eighth } else { whole }) as usize
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub journal: Extent,
    pub journal_device: DeviceRole,
    pub checkpoints: Extent,
    pub records: Extent,
    pub units: Extent,
}

/// The device is smaller than the smallest store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    pub found_bytes: u64,
    pub needed_bytes: u64,
}

impl Layout {
    /// The parts of a new store.
    pub fn plan(
        device_bytes: u64,
        cache_bytes: Option<u64>,
        journal_bytes: Option<u64>,
    ) -> Result<Self, TooSmall> {
        let journal_home = cache_bytes.unwrap_or(device_bytes);
        let wanted = (journal_home / 16).clamp(JOURNAL_BYTES_DEFAULT_MIN, JOURNAL_BYTES_DEFAULT_MAX);
        // By default at most a quarter of a small device; a whole cache device if need be.
        let most = if cache_bytes.is_some() {
            journal_home.saturating_sub(JOURNAL_OFFSET)
        } else {
            journal_home / 4
        };
        let journal_bytes = journal_bytes.unwrap_or(wanted.min(most)).max(JOURNAL_BYTES_MIN);
        let journal_bytes = journal_bytes / UNIT_SIZE as u64 * UNIT_SIZE as u64;
        let journal = Extent { offset: JOURNAL_OFFSET, bytes: journal_bytes };
        if let Some(found_bytes) = cache_bytes.filter(|bytes| *bytes < journal.end()) {
            return Err(TooSmall { found_bytes, needed_bytes: journal.end() });
        }
        let records_offset = if cache_bytes.is_some() { JOURNAL_OFFSET } else { journal.end() };
        let group_bytes = UNITS_PER_SLOT * UNIT_SIZE as u64 + SLOT_SIZE as u64;
        let needed_bytes = records_offset + UNITS_MIN / UNITS_PER_SLOT * group_bytes;
        if device_bytes < needed_bytes {
            return Err(TooSmall { found_bytes: device_bytes, needed_bytes });
        }
        let groups =
            ((device_bytes - records_offset) / group_bytes).min(u64::from(u32::MAX) / UNITS_PER_SLOT - 1);
        // Slots are a quarter of a unit: units stay aligned to their size when the slots are a multiple of 4.
        let slots = groups / 4 * 4;
        let records = Extent { offset: records_offset, bytes: slots * SLOT_SIZE as u64 };
        let unit_bytes = slots * UNITS_PER_SLOT * UNIT_SIZE as u64;
        Ok(Self {
            journal,
            journal_device: if cache_bytes.is_some() { DeviceRole::Cache } else { DeviceRole::Capacity },
            checkpoints: Extent { offset: CHECKPOINTS_OFFSET, bytes: 2 * checkpoint::SLOT_SIZE as u64 },
            records,
            units: Extent { offset: records.end(), bytes: unit_bytes },
        })
    }

    /// The parts as the superblocks have them; `None` when they can not be those of a store.
    pub fn of(superblock: &Superblock, cache: Option<&Superblock>) -> Option<Self> {
        let journal = cache.unwrap_or(superblock).journal;
        let layout = Self {
            journal,
            journal_device: if cache.is_some() { DeviceRole::Cache } else { DeviceRole::Capacity },
            checkpoints: superblock.checkpoints,
            records: superblock.records,
            units: superblock.units,
        };
        let counts = layout.records.bytes / SLOT_SIZE as u64 <= u64::from(u32::MAX)
            && layout.units.bytes / (UNIT_SIZE as u64) < u64::from(u32::MAX);
        let sizes = journal.bytes >= JOURNAL_BYTES_MIN
            && layout.checkpoints.bytes == 2 * checkpoint::SLOT_SIZE as u64
            && layout.records.bytes >= SLOT_SIZE as u64
            && layout.units.bytes >= UNIT_SIZE as u64;
        (counts && sizes).then_some(layout)
    }

    pub fn slot_count(&self) -> u32 {
        (self.records.bytes / SLOT_SIZE as u64) as u32
    }

    pub fn unit_count(&self) -> u32 {
        (self.units.bytes / UNIT_SIZE as u64) as u32
    }

    /// Largest batch of this store's journal.
    pub fn batch_bytes_max(&self) -> usize {
        batch_bytes_max(self.journal.bytes)
    }

    /// Device offset of a journal position.
    pub fn journal_offset(&self, position: u64) -> u64 {
        self.journal.offset + position % self.journal.bytes
    }

    /// Device offset of capacity unit `unit`.
    pub fn unit_offset(&self, unit: u32) -> u64 {
        self.units.offset + u64::from(unit) * UNIT_SIZE as u64
    }

    /// Device offset of the half of slot `slot` that `generation` goes to.
    pub fn record_offset(&self, slot: u32, generation: u64) -> u64 {
        let half = (generation % 2) * (SLOT_SIZE as u64 / 2);
        self.records.offset + u64::from(slot) * SLOT_SIZE as u64 + half
    }

    /// Device offset of the slot that checkpoint `number` goes to.
    pub fn checkpoint_offset(&self, number: u64) -> u64 {
        self.checkpoints.offset + (number % 2) * checkpoint::SLOT_SIZE as u64
    }
}
