//! Making a device a store, and telling what is on a device before it is made one.
//!
//! Blocking; used before a shard serves, by `recover` and by tools.
//!
//! Invariant: the superblock is written last, after everything it names is on stable media, so a device whose format
//! was interrupted is no store.

use std::io;

use xsan_protocol::disk::DiskFormatError;
use xsan_protocol::disk::block_record::SLOT_SIZE;
use xsan_protocol::disk::checkpoint::{self, Checkpoint};
use xsan_protocol::disk::superblock::{self, Extent, Role, Superblock};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{NodeId, StoreId};
use xsan_protocol::units::PAGE_SIZE;

use super::engine::Store;
use super::layout::{Layout, TooSmall};
use crate::disk::buffers::BufferPool;
use crate::io::Device;

/// Slots zeroed at format; more when they are needed.
const SLOTS_MARK_FIRST: u32 = 64;
/// Bytes looked at by `probe` at either end of a device.
const PROBE_BYTES: u64 = 1 << 20;

/// What a new store is to be.
#[derive(Clone, Debug)]
pub struct FormatParameters {
    pub cluster_id: String,
    pub node: NodeId,
    /// Random: no two stores, and no two formats of one device, have the same.
    pub store: StoreId,
    /// Wall clock.
    pub created_ns: u64,
    /// `None`: by the size of the device.
    pub journal_bytes: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("the device has {found_bytes} bytes, a store needs {needed_bytes}")]
    TooSmall { found_bytes: u64, needed_bytes: u64 },
    #[error("the device refused an operation: {0}")]
    Device(#[from] io::Error),
    #[error("no buffer of {bytes} bytes is free")]
    Memory { bytes: usize },
}

impl FormatError {
    pub const fn code(&self) -> Code {
        match self {
            Self::TooSmall { .. } => Code::DeviceTooSmall,
            Self::Device(_) => Code::DeviceUnusable,
            Self::Memory { .. } => Code::MemoryShort,
        }
    }
}

impl From<TooSmall> for FormatError {
    fn from(TooSmall { found_bytes, needed_bytes }: TooSmall) -> Self {
        Self::TooSmall { found_bytes, needed_bytes }
    }
}

/// What is on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that we can see: both ends are zero.
    Blank,
    /// A device of a store of ours.
    Ours { cluster_id: String, node: NodeId, store: StoreId, role: Role },
    /// A device of a store that this release can not read.
    OtherVersion { found: u16 },
    /// Something else: it is not formatted without force.
    Foreign(Foreign),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Superblocks of ours, both damaged.
    DamagedStore,
    Gpt,
    Mbr,
    Ext,
    Xfs,
    Btrfs,
    Lvm,
    Luks,
    Swap,
    /// Not zero, and nothing we know.
    Unknown,
}

impl Foreign {
    pub const fn name(self) -> &'static str {
        match self {
            Self::DamagedStore => "a damaged XSAN store",
            Self::Gpt => "a GPT partition table",
            Self::Mbr => "an MBR partition table",
            Self::Ext => "an ext2/3/4 file system",
            Self::Xfs => "an XFS file system",
            Self::Btrfs => "a btrfs file system",
            Self::Lvm => "an LVM physical volume",
            Self::Luks => "a LUKS container",
            Self::Swap => "swap space",
            Self::Unknown => "data of an unknown kind",
        }
    }
}

/// A page-aligned buffer for blocking device calls.
pub(super) fn buffer(
    pool: &'static BufferPool,
    bytes: usize,
) -> Result<crate::disk::buffers::BufferMut, FormatError> {
    pool.alloc(bytes).ok_or(FormatError::Memory { bytes })
}

/// The newer valid superblock of a device, or why neither is valid.
pub(super) fn read_superblock(
    device: &dyn Device,
    pool: &'static BufferPool,
) -> Result<Result<Superblock, DiskFormatError>, FormatError> {
    let mut page = buffer(pool, Superblock::SIZE)?;
    let (mut copies, mut unread) = (Vec::new(), None);
    for offset in superblock::OFFSETS {
        match device.read_at(offset, &mut page) {
            Ok(()) => copies.push(Superblock::decode(&page)),
            Err(error) => unread = Some(error),
        }
    }
    let newest = copies.iter().flatten().max_by_key(|copy| copy.generation).cloned();
    match (newest, unread) {
        (Some(newest), _) => Ok(Ok(newest)),
        // What can not be read might be the only whole one.
        (None, Some(error)) => Err(error.into()),
        (None, None) => Ok(copies.swap_remove(0)),
    }
}

fn write_superblocks(
    device: &dyn Device,
    superblock: &Superblock,
    pool: &'static BufferPool,
) -> Result<(), FormatError> {
    let mut page = buffer(pool, Superblock::SIZE)?;
    page.copy_from_slice(&superblock.encode());
    device.flush()?;
    for offset in superblock::OFFSETS.into_iter().rev() {
        device.write_at(offset, &page)?;
        device.flush()?;
    }
    Ok(())
}

fn zero(device: &dyn Device, extent: Extent, pool: &'static BufferPool) -> Result<(), FormatError> {
    let mut zeroes = buffer(pool, 1024 * 1024)?;
    zeroes.fill(0);
    let mut offset = extent.offset;
    while offset < extent.end() {
        let bytes = (extent.end() - offset).min(zeroes.len() as u64) as usize;
        device.write_at(offset, &zeroes[..bytes])?;
        offset += bytes as u64;
    }
    Ok(())
}

fn erase_superblocks(device: &dyn Device, pool: &'static BufferPool) -> Result<(), FormatError> {
    for offset in superblock::OFFSETS {
        zero(device, Extent { offset, bytes: Superblock::SIZE as u64 }, pool)?;
    }
    Ok(device.flush()?)
}

impl Store {
    /// Makes the device (and the cache device, for the journal) an empty store, whatever they held.
    ///
    /// # Errors
    /// 207 `DeviceTooSmall`, 209 `DeviceUnusable`, 11 `MemoryShort`.
    pub fn format(
        device: &dyn Device,
        cache: Option<&dyn Device>,
        parameters: &FormatParameters,
        pool: &'static BufferPool,
    ) -> Result<(), FormatError> {
        let cache_bytes = cache.map(Device::size_bytes);
        let layout = Layout::plan(device.size_bytes(), cache_bytes, parameters.journal_bytes)?;
        for device in cache.into_iter().chain([device]) {
            erase_superblocks(device, pool)?;
        }
        let slots_mark = layout.slot_count().min(SLOTS_MARK_FIRST);
        let slots = u64::from(slots_mark) * SLOT_SIZE as u64;
        zero(device, Extent { offset: layout.records.offset, bytes: slots }, pool)?;
        zero(device, layout.checkpoints, pool)?;
        // Positions start at the second lap: position 0 is none.
        let start = layout.journal.bytes;
        let first = Checkpoint {
            store: parameters.store,
            number: 1,
            tail: start,
            flushed: start,
            session: 0,
            session_start: start,
            slots_mark,
            generations: 0,
            damaged: false,
            groups: Vec::new(),
        };
        let mut page = buffer(pool, Checkpoint::size(0))?;
        first.encode(&mut page);
        device.write_at(layout.checkpoint_offset(first.number), &page)?;
        let superblock = |device: &dyn Device, role: Role| Superblock {
            role,
            store: parameters.store,
            cluster_id: parameters.cluster_id.clone(),
            node: parameters.node,
            generation: 1,
            created_ns: parameters.created_ns,
            device_bytes: device.size_bytes(),
            cached: cache.is_some(),
            journal: if cache.is_some() == (role == Role::Cache) {
                layout.journal
            } else {
                Extent::default()
            },
            checkpoints: if role == Role::Capacity { layout.checkpoints } else { Extent::default() },
            records: if role == Role::Capacity { layout.records } else { Extent::default() },
            units: if role == Role::Capacity { layout.units } else { Extent::default() },
        };
        if let Some(cache) = cache {
            write_superblocks(cache, &superblock(cache, Role::Cache), pool)?;
        }
        write_superblocks(device, &superblock(device, Role::Capacity), pool)
    }

    /// What is on the device.
    ///
    /// # Errors
    /// 209 `DeviceUnusable`, 11 `MemoryShort`.
    pub fn probe(device: &dyn Device, pool: &'static BufferPool) -> Result<Content, FormatError> {
        let found = match read_superblock(device, pool)? {
            Ok(Superblock { cluster_id, node, store, role, .. }) => {
                Content::Ours { cluster_id, node, store, role }
            }
            Err(DiskFormatError::Version { found }) => Content::OtherVersion { found },
            Err(DiskFormatError::Magic) => probe_foreign(device, pool)?,
            Err(_) => Content::Foreign(Foreign::DamagedStore),
        };
        Ok(found)
    }
}

fn probe_foreign(device: &dyn Device, pool: &'static BufferPool) -> Result<Content, FormatError> {
    let size = device.size_bytes() / PAGE_SIZE as u64 * PAGE_SIZE as u64;
    let bytes = size.min(PROBE_BYTES);
    if bytes == 0 {
        return Ok(Content::Blank);
    }
    let mut start = buffer(pool, bytes as usize)?;
    device.read_at(0, &mut start)?;
    if let Some(known) = recognise(&start) {
        return Ok(Content::Foreign(known));
    }
    let mut blank = start.iter().all(|byte| *byte == 0);
    device.read_at(size - bytes, &mut start)?;
    blank &= start.iter().all(|byte| *byte == 0);
    // The second copy of a superblock whose first one was overwritten with zeroes makes the start not blank.
    Ok(if blank { Content::Blank } else { Content::Foreign(Foreign::Unknown) })
}

/// Names what the first bytes of a device are.
fn recognise(start: &[u8]) -> Option<Foreign> {
    let at = |offset: usize, magic: &[u8]| start.get(offset..offset + magic.len()) == Some(magic);
    let kinds = [
        (Foreign::Luks, at(0, b"LUKS\xba\xbe")),
        (Foreign::Lvm, (0..4).any(|sector| at(sector * 512, b"LABELONE"))),
        (Foreign::Xfs, at(0, b"XFSB")),
        (Foreign::Ext, at(0x438, &[0x53, 0xef])),
        (Foreign::Btrfs, at(0x1_0040, b"_BHRfS_M")),
        (Foreign::Swap, at(PAGE_SIZE - 10, b"SWAPSPACE2") || at(PAGE_SIZE - 10, b"SWAP-SPACE")),
        (Foreign::Gpt, at(512, b"EFI PART") || at(PAGE_SIZE, b"EFI PART")),
        (Foreign::Mbr, at(510, &[0x55, 0xaa])),
    ];
    kinds.into_iter().find(|(_, found)| *found).map(|(kind, _)| kind)
}

const _: () = assert!(PROBE_BYTES as usize <= 1024 * 1024);
const _: () = assert!(checkpoint::SLOT_SIZE.is_multiple_of(PAGE_SIZE));
