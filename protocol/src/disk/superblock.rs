//! Superblock: what a device is, whose, and where its parts lie. Two copies, the newer valid one counts.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{DiskFormatError, FORMAT_VERSION, check, check_counters, check_seal, check_version, seal};
use crate::ids::{NodeId, StoreId};
use crate::limits::NAME_BYTES_MAX;
use crate::units::{PAGE_SIZE, UNIT_SIZE};

pub const MAGIC: [u8; 8] = *b"XSANSUPR";
/// Device offsets of the two copies: not both lost to one overwritten region.
pub const OFFSETS: [u64; 2] = [0, UNIT_SIZE as u64];

/// What a device does for its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Holds checkpoints, block records and capacity; the journal too unless there is a cache device.
    Capacity = 1,
    /// Holds the journal alone.
    Cache = 2,
}

/// A contiguous part of a device, in bytes, page-aligned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub bytes: u64,
}

impl Extent {
    pub const fn end(self) -> u64 {
        self.offset + self.bytes
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub role: Role,
    pub store: StoreId,
    pub cluster_id: String,
    /// Whose it is: in another node it would pass for a replica that nobody needs, and be emptied.
    pub node: NodeId,
    /// Grows with every rewrite; the copy with the higher one counts.
    pub generation: u64,
    pub created_ns: u64,
    pub device_bytes: u64,
    /// Does the journal lie on a device of its own?
    pub cached: bool,
    /// Empty on a capacity device whose journal is on a cache device.
    pub journal: Extent,
    /// Two slots of equal size.
    pub checkpoints: Extent,
    /// Slots of two block records each.
    pub records: Extent,
    /// Capacity units.
    pub units: Extent,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtent {
    offset: U64, // 0
    bytes: U64,  // 8
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],                   // 0
    checksum: U32,                    // 8
    version: U16,                     // 12
    role: u8,                         // 14
    cached: u8,                       // 15
    store: U64,                       // 16
    generation: U64,                  // 24
    created_ns: U64,                  // 32
    device_bytes: U64,                // 40
    journal: RawExtent,               // 48
    checkpoints: RawExtent,           // 64
    records: RawExtent,               // 80
    units: RawExtent,                 // 96
    page_bytes: U32,                  // 112
    unit_bytes: U32,                  // 116
    cluster_id_length: U16,           // 120
    reserved: [u8; 2],                // 122
    node: U32,                        // 124
    cluster_id: [u8; NAME_BYTES_MAX], // 128
    padding: [u8; PAGE_SIZE - 256],   // 256
}

const _: () = assert!(size_of::<RawSuperblock>() == Superblock::SIZE);

impl From<Extent> for RawExtent {
    fn from(extent: Extent) -> Self {
        Self { offset: extent.offset.into(), bytes: extent.bytes.into() }
    }
}

impl RawExtent {
    fn decode(self, device_bytes: u64, field: &'static str) -> Result<Extent, DiskFormatError> {
        let extent = Extent { offset: self.offset.get(), bytes: self.bytes.get() };
        let aligned =
            extent.offset.is_multiple_of(PAGE_SIZE as u64) && extent.bytes.is_multiple_of(PAGE_SIZE as u64);
        let end = extent.offset.checked_add(extent.bytes);
        check(aligned && end.is_some_and(|end| end <= device_bytes), field)?;
        Ok(extent)
    }
}

impl Superblock {
    pub const SIZE: usize = PAGE_SIZE;

    /// # Panics
    /// A cluster id longer than `NAME_BYTES_MAX`: the control plane refuses those.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.cluster_id.len() <= NAME_BYTES_MAX);
        let mut cluster_id = [0; NAME_BYTES_MAX];
        cluster_id[..self.cluster_id.len()].copy_from_slice(self.cluster_id.as_bytes());
        let raw = RawSuperblock {
            magic: MAGIC,
            checksum: 0.into(),
            version: FORMAT_VERSION.into(),
            role: self.role as u8,
            cached: self.cached.into(),
            store: self.store.0.into(),
            generation: self.generation.into(),
            created_ns: self.created_ns.into(),
            device_bytes: self.device_bytes.into(),
            journal: self.journal.into(),
            checkpoints: self.checkpoints.into(),
            records: self.records.into(),
            units: self.units.into(),
            page_bytes: (PAGE_SIZE as u32).into(),
            unit_bytes: (UNIT_SIZE as u32).into(),
            cluster_id_length: (self.cluster_id.len() as u16).into(),
            reserved: [0; 2],
            node: self.node.0.into(),
            cluster_id,
            padding: [0; PAGE_SIZE - 256],
        };
        let mut bytes = raw.as_bytes().to_vec();
        seal(MAGIC, &mut bytes);
        bytes
    }

    /// # Errors
    /// 200 `StoreNotFormatted` (no magic), 206 `StoreCorrupt`, 208 `FormatUnsupported`.
    pub fn decode(bytes: &[u8]) -> Result<Self, DiskFormatError> {
        let length = DiskFormatError::Length { found: bytes.len(), expected: Self::SIZE };
        let raw = RawSuperblock::ref_from_bytes(bytes).map_err(|_| length)?;
        check_seal(MAGIC, bytes)?;
        check_version(raw.version.get())?;
        let role = match raw.role {
            1 => Role::Capacity,
            2 => Role::Cache,
            _ => return Err(DiskFormatError::Field { field: "role" }),
        };
        check(raw.cached <= 1, "cached")?;
        check(raw.page_bytes.get() as usize == PAGE_SIZE, "page_bytes")?;
        check(raw.unit_bytes.get() as usize == UNIT_SIZE, "unit_bytes")?;
        check(raw.reserved == [0; 2], "reserved")?;
        check(raw.padding.iter().all(|byte| *byte == 0), "padding")?;
        let id_length = usize::from(raw.cluster_id_length.get());
        check(id_length <= NAME_BYTES_MAX, "cluster_id_length")?;
        check(raw.cluster_id[id_length..].iter().all(|byte| *byte == 0), "cluster_id")?;
        let cluster_id = std::str::from_utf8(&raw.cluster_id[..id_length]);
        let device_bytes = raw.device_bytes.get();
        check_counters(&[raw.generation], "generation")?;
        let superblock = Self {
            role,
            store: StoreId(raw.store.get()),
            cluster_id: cluster_id.map_err(|_| DiskFormatError::Field { field: "cluster_id" })?.to_owned(),
            node: NodeId(raw.node.get()),
            generation: raw.generation.get(),
            created_ns: raw.created_ns.get(),
            device_bytes,
            cached: raw.cached == 1,
            journal: raw.journal.decode(device_bytes, "journal")?,
            checkpoints: raw.checkpoints.decode(device_bytes, "checkpoints")?,
            records: raw.records.decode(device_bytes, "records")?,
            units: raw.units.decode(device_bytes, "units")?,
        };
        check(superblock.parts_are_apart(), "extents")?;
        Ok(superblock)
    }

    /// Does no part lie on another, or on a copy of the superblock?
    fn parts_are_apart(&self) -> bool {
        let copies = OFFSETS.map(|offset| Extent { offset, bytes: Self::SIZE as u64 });
        let parts = [copies[0], copies[1], self.journal, self.checkpoints, self.records, self.units];
        let overlap = |a: &Extent, b: &Extent| a.offset < b.end() && b.offset < a.end();
        parts.iter().enumerate().all(|(index, part)| {
            part.bytes == 0 || parts[..index].iter().all(|other| other.bytes == 0 || !overlap(part, other))
        })
    }
}

#[cfg(test)]
mod tests;
