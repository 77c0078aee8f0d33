//! On-disk records of a store: superblock, checkpoint, journal batch, block record.
//!
//! Written and read by the data plane's `store` and by xsan-debug. Every record opens with an 8-byte magic and
//! a CRC32C over all the bytes behind it, padding included, so a flipped bit anywhere is refused. `decode`
//! checks, in this order: length, magic, checksum, format version, ranges, reserved bits. `docs/format/store.md`
//! has the offsets and the reasoning about crashes.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::Code;
use crate::ids::{BlockIndex, BlockKey, Layer, Lineage};

pub mod block_record;
pub mod checkpoint;
pub mod journal;
pub mod superblock;

/// Version of all the on-disk formats of a store; a reader refuses any other.
pub const FORMAT_VERSION: u16 = 1;

/// Positions, generations and the like that grow for as long as a store lives stay below this (as a journal's position
/// does for 29 years at 10 GB/s), so that a reader may add to what it read.
pub const COUNTER_END: u64 = 1 << 63;

/// Bytes that the checksum does not cover: the magic, which is compared, and the checksum itself.
const SEAL_SIZE: usize = 12;

/// A record on disk that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskFormatError {
    #[error("{found} bytes, expected {expected}")]
    Length { found: usize, expected: usize },
    #[error("there is no such record here")]
    Magic,
    #[error("the checksum is {found:08x}, expected {expected:08x}")]
    Checksum { found: u32, expected: u32 },
    #[error("format version {found}, this release reads {FORMAT_VERSION}")]
    Version { found: u16 },
    #[error("field {field} is out of range")]
    Field { field: &'static str },
}

impl DiskFormatError {
    pub const fn code(self) -> Code {
        match self {
            Self::Magic => Code::StoreNotFormatted,
            Self::Version { .. } => Code::FormatUnsupported,
            Self::Length { .. } | Self::Checksum { .. } | Self::Field { .. } => Code::StoreCorrupt,
        }
    }
}

/// Stamps magic and checksum onto a record that is complete but for them.
fn seal(magic: [u8; 8], record: &mut [u8]) {
    record[..8].copy_from_slice(&magic);
    let checksum = crc32c(&record[SEAL_SIZE..]);
    record[8..SEAL_SIZE].copy_from_slice(&checksum.to_le_bytes());
}

/// Checks magic and checksum of a record.
fn check_seal(magic: [u8; 8], record: &[u8]) -> Result<(), DiskFormatError> {
    if record[..8] != magic {
        return Err(DiskFormatError::Magic);
    }
    let found = u32::from_le_bytes([record[8], record[9], record[10], record[11]]);
    let expected = crc32c(&record[SEAL_SIZE..]);
    if found == expected { Ok(()) } else { Err(DiskFormatError::Checksum { found, expected }) }
}

fn check_version(found: u16) -> Result<(), DiskFormatError> {
    if found == FORMAT_VERSION { Ok(()) } else { Err(DiskFormatError::Version { found }) }
}

fn check(condition: bool, field: &'static str) -> Result<(), DiskFormatError> {
    if condition { Ok(()) } else { Err(DiskFormatError::Field { field }) }
}

fn check_counters(counters: &[U64], field: &'static str) -> Result<(), DiskFormatError> {
    check(counters.iter().all(|counter| counter.get() < COUNTER_END), field)
}

/// A block's name on disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawKey {
    lineage: U64, // 0
    layer: U32,   // 8
    index: U32,   // 12
}

impl From<BlockKey> for RawKey {
    fn from(key: BlockKey) -> Self {
        Self { lineage: key.lineage.0.into(), layer: key.layer.0.into(), index: key.index.0.into() }
    }
}

impl From<RawKey> for BlockKey {
    fn from(raw: RawKey) -> Self {
        Self {
            lineage: Lineage(raw.lineage.get()),
            layer: Layer(raw.layer.get()),
            index: BlockIndex(raw.index.get()),
        }
    }
}

/// Asserts that every flipped bit and every truncation of a sealed record is refused.
#[cfg(test)]
fn assert_damage_is_refused<T>(
    record: &[u8],
    step: usize,
    decode: impl Fn(&[u8]) -> Result<T, DiskFormatError>,
) {
    assert!(decode(record).is_ok());
    let mut damaged = record.to_vec();
    for bit in (0..record.len() * 8).step_by(step) {
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&damaged).is_err(), "bit {bit} flipped and not seen");
        damaged[bit / 8] ^= 1 << (bit % 8);
    }
    for length in (0..record.len()).step_by(step.max(7)) {
        assert!(decode(&record[..length]).is_err(), "{length} bytes are not a record");
    }
}
