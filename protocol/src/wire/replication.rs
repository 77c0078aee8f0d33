//! Meta parts of the replication frames, as fixed little-endian structs.
//!
//! An append's data is whole pages; its checksum table has one CRC32C a page. Lists (digests, versions) are
//! the data part of their frame, covered by `payload_crc`.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc64;
use crate::error::Code;
use crate::ids::{BlockIndex, BlockKey, Epoch, Layer, Lineage, Seq, Version};
use crate::units::{PAGES_PER_UNIT, UNITS_PER_BLOCK};

/// A version on wire and disk.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RawVersion {
    pub seq: U64,   // 0
    pub epoch: U32, // 8
}

impl From<Version> for RawVersion {
    fn from(version: Version) -> Self {
        Self { seq: version.seq.0.into(), epoch: version.epoch.0.into() }
    }
}

impl From<RawVersion> for Version {
    fn from(raw: RawVersion) -> Self {
        Self { seq: Seq(raw.seq.get()), epoch: Epoch(raw.epoch.get()) }
    }
}

/// What an entry does to its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    Write = 1,
    /// Zeroes that free what whole units held: trim and write-zeroes.
    Zero = 2,
}

/// Meta of Append and FetchReply; position and range are in the header (`offset`, `length` in bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendMeta {
    pub kind: EntryKind,
    /// Epoch that gave the entry its seq (older than the frame's when rolled forward), and the seq.
    pub version: Version,
    /// Every entry up to this one is acknowledged.
    pub acked: Seq,
    /// Versions that the first and the last unit had just before, where the entry covers them in part.
    pub previous_first: Version,
    pub previous_last: Version,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAppendMeta {
    version: RawVersion,        // 0
    previous_first: RawVersion, // 12
    previous_last: RawVersion,  // 24
    acked: U64,                 // 36
    kind: u8,                   // 44
    reserved: [u8; 3],          // 45
}

/// A meta part that is not what its opcode says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    #[error("meta of {found} bytes, expected {expected}")]
    Length { found: usize, expected: usize },
    #[error("field {field} is out of range")]
    Field { field: &'static str },
}

impl MetaError {
    pub const fn code(self) -> Code {
        Code::FrameInvalid
    }
}

fn read<T: FromBytes>(bytes: &[u8]) -> Result<T, MetaError> {
    T::read_from_bytes(bytes).map_err(|_| MetaError::Length { found: bytes.len(), expected: size_of::<T>() })
}

impl AppendMeta {
    pub const SIZE: usize = 48;

    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw = RawAppendMeta {
            version: self.version.into(),
            previous_first: self.previous_first.into(),
            previous_last: self.previous_last.into(),
            acked: self.acked.0.into(),
            kind: self.kind as u8,
            reserved: [0; 3],
        };
        zerocopy::transmute!(raw)
    }

    /// # Errors
    /// 308 `FrameInvalid`.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let raw: RawAppendMeta = read(bytes)?;
        let kind = match raw.kind {
            1 => EntryKind::Write,
            2 => EntryKind::Zero,
            _ => return Err(MetaError::Field { field: "kind" }),
        };
        if raw.reserved != [0; 3] {
            return Err(MetaError::Field { field: "reserved" });
        }
        Ok(Self {
            kind,
            version: raw.version.into(),
            acked: Seq(raw.acked.get()),
            previous_first: raw.previous_first.into(),
            previous_last: raw.previous_last.into(),
        })
    }
}

const _: () = assert!(size_of::<RawAppendMeta>() == AppendMeta::SIZE);

/// Meta of PeerInfo: where the member's journal of the group ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    pub last: Version,
    /// Everything up to here is in the member's journal (a device completion was seen).
    pub durable: Seq,
    /// The member knows that everything up to here was acknowledged.
    pub acked: Seq,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPeerInfo {
    last: RawVersion, // 0
    durable: U64,     // 12
    acked: U64,       // 20
    reserved: U32,    // 28
}

impl PeerInfo {
    pub const SIZE: usize = 32;

    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw = RawPeerInfo {
            last: self.last.into(),
            durable: self.durable.0.into(),
            acked: self.acked.0.into(),
            reserved: 0.into(),
        };
        zerocopy::transmute!(raw)
    }

    /// # Errors
    /// 308 `FrameInvalid`.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let raw: RawPeerInfo = read(bytes)?;
        if raw.reserved.get() != 0 {
            return Err(MetaError::Field { field: "reserved" });
        }
        Ok(Self { last: raw.last.into(), durable: Seq(raw.durable.get()), acked: Seq(raw.acked.get()) })
    }
}

const _: () = assert!(size_of::<RawPeerInfo>() == PeerInfo::SIZE);

/// Meta of Fetch: entries `from..=to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchMeta {
    pub from: Seq,
    pub to: Seq,
}

impl FetchMeta {
    pub const SIZE: usize = 16;

    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw: [U64; 2] = [self.from.0.into(), self.to.0.into()];
        zerocopy::transmute!(raw)
    }

    /// # Errors
    /// 308 `FrameInvalid`.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let [from, to]: [U64; 2] = read(bytes)?;
        if from > to {
            return Err(MetaError::Field { field: "to" });
        }
        Ok(Self { from: Seq(from.get()), to: Seq(to.get()) })
    }
}

/// Meta of Push: the unit is `Header::offset`, one unit long; without data the unit is all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PushMeta {
    /// The unit's version at the primary.
    pub version: Version,
    /// The content holds every entry up to this one; all of them are acknowledged.
    pub as_of: Seq,
    /// Pages of the unit, by bit, that no replica has: their bytes mean nothing, their checksums are those of what is lost.
    pub lost: u16,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPushMeta {
    version: RawVersion, // 0
    lost: U16,           // 12
    reserved: U16,       // 14
    as_of: U64,          // 16
}

impl PushMeta {
    pub const SIZE: usize = 24;

    pub fn encode(&self) -> [u8; Self::SIZE] {
        let raw = RawPushMeta {
            version: self.version.into(),
            lost: self.lost.into(),
            reserved: 0.into(),
            as_of: self.as_of.0.into(),
        };
        zerocopy::transmute!(raw)
    }

    /// # Errors
    /// 308 `FrameInvalid`.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        let raw: RawPushMeta = read(bytes)?;
        if raw.reserved.get() != 0 {
            return Err(MetaError::Field { field: "reserved" });
        }
        Ok(Self { version: raw.version.into(), as_of: Seq(raw.as_of.get()), lost: raw.lost.get() })
    }
}

const _: () = assert!(size_of::<RawPushMeta>() == PushMeta::SIZE);

/// One entry of Compare's list: a block and the digest of its unit versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockDigest {
    lineage: U64, // 0
    layer: U32,   // 8
    index: U32,   // 12
    digest: U64,  // 16
}

impl BlockDigest {
    pub fn new(key: BlockKey, digest: u64) -> Self {
        Self {
            lineage: key.lineage.0.into(),
            layer: key.layer.0.into(),
            index: key.index.0.into(),
            digest: digest.into(),
        }
    }

    pub fn key(&self) -> BlockKey {
        BlockKey {
            lineage: Lineage(self.lineage.get()),
            layer: Layer(self.layer.get()),
            index: BlockIndex(self.index.get()),
        }
    }

    pub fn digest(&self) -> u64 {
        self.digest.get()
    }

    /// The entries of a list.
    ///
    /// # Errors
    /// 308 `FrameInvalid`: not whole entries.
    pub fn list(bytes: &[u8]) -> Result<&[Self], MetaError> {
        <[Self]>::ref_from_bytes(bytes)
            .map_err(|_| MetaError::Length { found: bytes.len(), expected: size_of::<Self>() })
    }
}

/// One entry of CompareReply's list: a block of the replica asked and its unit versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockVersions {
    lineage: U64,                            // 0
    layer: U32,                              // 8
    index: U32,                              // 12
    versions: [RawVersion; UNITS_PER_BLOCK], // 16
}

impl BlockVersions {
    pub fn new(key: BlockKey, versions: &[Version; UNITS_PER_BLOCK]) -> Self {
        Self {
            lineage: key.lineage.0.into(),
            layer: key.layer.0.into(),
            index: key.index.0.into(),
            versions: versions.map(RawVersion::from),
        }
    }

    pub fn key(&self) -> BlockKey {
        BlockKey {
            lineage: Lineage(self.lineage.get()),
            layer: Layer(self.layer.get()),
            index: BlockIndex(self.index.get()),
        }
    }

    pub fn versions(&self) -> [Version; UNITS_PER_BLOCK] {
        self.versions.map(Version::from)
    }

    /// The entries of a list.
    ///
    /// # Errors
    /// 308 `FrameInvalid`: not whole entries.
    pub fn list(bytes: &[u8]) -> Result<&[Self], MetaError> {
        <[Self]>::ref_from_bytes(bytes)
            .map_err(|_| MetaError::Length { found: bytes.len(), expected: size_of::<Self>() })
    }
}

/// One entry of CheckReply's list: what a replica knows of one unit, after it has read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UnitChecksums {
    version: RawVersion,              // 0
    damaged: U16,                     // 12: bit n: page n of the unit
    reserved: U16,                    // 14: zero
    checksums: [U32; PAGES_PER_UNIT], // 16
}

const _: () = assert!(PAGES_PER_UNIT == u16::BITS as usize);

impl UnitChecksums {
    /// `version`: `Version::UNKNOWN` when the unit was written while it was read. `damaged`: pages that do not match.
    pub fn new(version: Version, damaged: u16, checksums: &[u32; PAGES_PER_UNIT]) -> Self {
        Self {
            version: version.into(),
            damaged: damaged.into(),
            reserved: 0.into(),
            checksums: checksums.map(U32::from),
        }
    }

    pub fn version(&self) -> Version {
        self.version.into()
    }

    pub fn damaged(&self) -> u16 {
        self.damaged.get()
    }

    /// What each page's CRC32C is, or should be.
    pub fn checksums(&self) -> [u32; PAGES_PER_UNIT] {
        self.checksums.map(U32::get)
    }

    /// The entries of a list.
    ///
    /// # Errors
    /// 308 `FrameInvalid`: not whole entries, or not as this release makes them.
    pub fn list(bytes: &[u8]) -> Result<&[Self], MetaError> {
        let list = <[Self]>::ref_from_bytes(bytes)
            .map_err(|_| MetaError::Length { found: bytes.len(), expected: size_of::<Self>() })?;
        if list.iter().any(|unit| unit.reserved.get() != 0) {
            return Err(MetaError::Field { field: "reserved" });
        }
        Ok(list)
    }
}

/// Digest of a block's unit versions: equal digests, equal versions. A block that holds nothing has digest 0.
pub fn block_digest(versions: &[Version; UNITS_PER_BLOCK]) -> u64 {
    if versions.iter().all(|version| *version == Version::ZERO) {
        return 0;
    }
    crc64(versions.map(RawVersion::from).as_bytes()).max(1)
}

#[cfg(test)]
mod tests;
