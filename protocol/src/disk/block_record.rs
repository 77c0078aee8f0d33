//! Block record: which capacity units hold a block, their versions and the checksums of their pages.
//!
//! A slot has two halves, written in turn: the higher generation counts, so a torn write leaves the one before.
//! A record stands for the block's whole state at one moment: `entry_position` and `push_position` name
//! the newest entry and push in it, so that replay of the journal skips what it holds already.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    DiskFormatError, FORMAT_VERSION, RawKey, check, check_counters, check_seal, check_version, seal,
};
use crate::ids::{BlockKey, GroupId, StoreId, Version};
use crate::units::{PAGE_SIZE, PAGES_PER_BLOCK, PAGES_PER_UNIT, UNITS_PER_BLOCK};
use crate::wire::replication::RawVersion;

pub const MAGIC: [u8; 8] = *b"XSANBLCK";
/// Bytes of a record, one half of a slot.
pub const RECORD_SIZE: usize = 2 * PAGE_SIZE;
/// Bytes of a slot.
pub const SLOT_SIZE: usize = 2 * RECORD_SIZE;
/// A unit without capacity: none of its pages was ever written to its place.
pub const NO_CAPACITY: u32 = u32::MAX;

/// One unit of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitRecord {
    pub version: Version,
    /// Number of the capacity unit, or [`NO_CAPACITY`].
    pub capacity: u32,
    /// Bit n: page n is in the capacity unit; the others read as zero.
    pub present: u16,
    pub checksums: [u32; PAGES_PER_UNIT],
}

impl UnitRecord {
    pub const EMPTY: Self =
        Self { version: Version::ZERO, capacity: NO_CAPACITY, present: 0, checksums: [0; PAGES_PER_UNIT] };
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockRecord {
    pub store: StoreId,
    pub slot: u32,
    pub generation: u64,
    pub group: GroupId,
    pub key: BlockKey,
    pub timestamp_ns: u64,
    /// Number of the checkpoint in force when the record was written, which does not count it.
    pub cycle: u64,
    pub entry_position: u64,
    pub push_position: u64,
    /// What the group had applied when the record was made.
    pub acked: Version,
    /// All of it empty: the slot is free.
    pub units: Box<[UnitRecord; UNITS_PER_BLOCK]>,
}

/// The block header: id (group, key), volume's lineage (in the key), size, checksum, timestamp, compression, encryption.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],      // 0
    checksum: U32,       // 8
    version: U16,        // 12
    compression: u8,     // 14: 0 none
    encryption: u8,      // 15: 0 none
    store: U64,          // 16
    generation: U64,     // 24
    key: RawKey,         // 32
    group: U32,          // 48
    slot: U32,           // 52
    timestamp_ns: U64,   // 56
    size_bytes: U32,     // 64: of the pages present
    acked: RawVersion,   // 68
    entry_position: U64, // 80
    push_position: U64,  // 88
    cycle: U64,          // 96
    reserved: [u8; 24],  // 104
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawUnit {
    version: RawVersion, // 0
    capacity: U32,       // 12
    present: U16,        // 16
    reserved: U16,       // 18
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    header: RawHeader,                                       // 0
    units: [RawUnit; UNITS_PER_BLOCK],                       // 128
    checksums: [[U32; PAGES_PER_UNIT]; UNITS_PER_BLOCK],     // 1408
    padding: [u8; RECORD_SIZE - 1408 - PAGES_PER_BLOCK * 4], // 5504
}

const _: () = assert!(size_of::<RawHeader>() == 128);
const _: () = assert!(size_of::<RawUnit>() == 20);
const _: () = assert!(size_of::<RawRecord>() == RECORD_SIZE);

impl BlockRecord {
    /// Writes the record over `out`.
    ///
    /// # Panics
    /// `out` is not [`RECORD_SIZE`] bytes.
    pub fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        let raw = RawRecord::mut_from_bytes(out).expect("the caller gives one record's bytes");
        let present: u32 = self.units.iter().map(|unit| unit.present.count_ones()).sum();
        raw.header = RawHeader {
            magic: MAGIC,
            checksum: 0.into(),
            version: FORMAT_VERSION.into(),
            compression: 0,
            encryption: 0,
            store: self.store.0.into(),
            generation: self.generation.into(),
            key: self.key.into(),
            group: self.group.0.into(),
            slot: self.slot.into(),
            timestamp_ns: self.timestamp_ns.into(),
            size_bytes: (present * PAGE_SIZE as u32).into(),
            acked: self.acked.into(),
            entry_position: self.entry_position.into(),
            push_position: self.push_position.into(),
            cycle: self.cycle.into(),
            reserved: [0; 24],
        };
        for (index, unit) in self.units.iter().enumerate() {
            raw.units[index] = RawUnit {
                version: unit.version.into(),
                capacity: unit.capacity.into(),
                present: unit.present.into(),
                reserved: 0.into(),
            };
            raw.checksums[index] = unit.checksums.map(U32::from);
        }
        seal(MAGIC, out);
    }

    /// # Errors
    /// 200 `StoreNotFormatted` (never written), 206 `StoreCorrupt`, 208 `FormatUnsupported`.
    pub fn decode(bytes: &[u8]) -> Result<Self, DiskFormatError> {
        let length = DiskFormatError::Length { found: bytes.len(), expected: RECORD_SIZE };
        let raw = RawRecord::ref_from_bytes(bytes).map_err(|_| length)?;
        check_seal(MAGIC, bytes)?;
        let header = &raw.header;
        check_version(header.version.get())?;
        check(header.compression == 0, "compression")?;
        check(header.encryption == 0, "encryption")?;
        check(header.reserved == [0; 24], "reserved")?;
        let RawHeader { generation, cycle, entry_position, push_position, .. } = *header;
        check_counters(&[generation, cycle, entry_position, push_position], "counters")?;
        check(raw.padding.iter().all(|byte| *byte == 0), "padding")?;
        let mut units = Box::new([UnitRecord::EMPTY; UNITS_PER_BLOCK]);
        let mut size = 0;
        for (index, unit) in raw.units.iter().enumerate() {
            check(unit.reserved.get() == 0, "unit reserved")?;
            check(unit.present.get() == 0 || unit.capacity.get() != NO_CAPACITY, "present")?;
            size += unit.present.get().count_ones() * PAGE_SIZE as u32;
            units[index] = UnitRecord {
                version: unit.version.into(),
                capacity: unit.capacity.get(),
                present: unit.present.get(),
                checksums: raw.checksums[index].map(U32::get),
            };
        }
        check(size == header.size_bytes.get(), "size_bytes")?;
        Ok(Self {
            store: StoreId(header.store.get()),
            slot: header.slot.get(),
            generation: header.generation.get(),
            group: GroupId(header.group.get()),
            key: header.key.into(),
            timestamp_ns: header.timestamp_ns.get(),
            cycle: header.cycle.get(),
            entry_position: header.entry_position.get(),
            push_position: header.push_position.get(),
            acked: header.acked.into(),
            units,
        })
    }

    /// Does the slot hold no block?
    pub fn is_free(&self) -> bool {
        self.units.iter().all(|unit| unit.capacity == NO_CAPACITY && unit.version == Version::ZERO)
    }
}

#[cfg(test)]
mod tests;
