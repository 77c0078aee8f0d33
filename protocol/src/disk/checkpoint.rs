//! Checkpoint: where replay of the journal starts, and what each group had applied there.
//!
//! Two slots, written in turn; the newer valid one counts. A torn write leaves the other slot.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{DiskFormatError, FORMAT_VERSION, check, check_counters, check_seal, check_version, seal};
use crate::ids::{GroupId, StoreId, Version};
use crate::units::PAGE_SIZE;
use crate::wire::replication::RawVersion;

pub const MAGIC: [u8; 8] = *b"XSANCKPT";
/// Bytes of a slot.
pub const SLOT_SIZE: usize = 256 * 1024;
/// Most groups of a store.
pub const GROUPS_MAX: usize = (SLOT_SIZE - HEADER_SIZE) / GROUP_SIZE;

const HEADER_SIZE: usize = 128;
const GROUP_SIZE: usize = 32;

/// One group at the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupRow {
    pub group: GroupId,
    /// The newest entry that was acknowledged and applied.
    pub applied: Version,
    /// Journal position of the newest reset that `applied` knows of: replay skips it, and what it dropped.
    pub reset_position: u64,
    /// The store lost part of this group: it must come back as a learner.
    pub damaged: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub store: StoreId,
    /// Grows with every checkpoint; odd ones go to slot 1.
    pub number: u64,
    /// Batches below this position are not needed any more.
    pub tail: u64,
    /// Everything below this position was on stable media.
    pub flushed: u64,
    /// Number of the present opening of the store, and the position of the first batch it may write: a batch at or
    /// above `session_start` of an older session is a torn-off remainder.
    pub session: u64,
    pub session_start: u64,
    /// Slots of block records below this one were zeroed before their first use.
    pub slots_mark: u32,
    /// Of the newest records of all slots, added up modulo 2^64: one that is not there after all is noticed.
    pub generations: u64,
    /// Part of the store was lost and not every group has been relearned since.
    pub damaged: bool,
    pub groups: Vec<GroupRow>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],     // 0
    checksum: U32,      // 8
    version: U16,       // 12
    damaged: u8,        // 14
    reserved: u8,       // 15
    store: U64,         // 16
    number: U64,        // 24
    tail: U64,          // 32
    flushed: U64,       // 40
    session: U64,       // 48
    session_start: U64, // 56
    slots_mark: U32,    // 64
    group_count: U32,   // 68
    generations: U64,   // 72
    padding: [u8; 48],  // 80
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGroup {
    group: U32,          // 0
    applied: RawVersion, // 4
    damaged: u8,         // 16
    reserved: [u8; 7],   // 17
    reset_position: U64, // 24
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);
const _: () = assert!(size_of::<RawGroup>() == GROUP_SIZE);
const _: () = assert!(SLOT_SIZE.is_multiple_of(PAGE_SIZE));

impl Checkpoint {
    /// Bytes of the encoded checkpoint: whole pages.
    pub const fn size(group_count: usize) -> usize {
        (HEADER_SIZE + group_count * GROUP_SIZE).next_multiple_of(PAGE_SIZE)
    }

    /// Writes the checkpoint to the start of `out`, which is [`Checkpoint::size`] bytes.
    ///
    /// # Panics
    /// More than [`GROUPS_MAX`] groups, or a wrong length: our bug.
    pub fn encode(&self, out: &mut [u8]) {
        assert!(self.groups.len() <= GROUPS_MAX);
        assert!(out.len() == Self::size(self.groups.len()));
        let header = RawHeader {
            magic: MAGIC,
            checksum: 0.into(),
            version: FORMAT_VERSION.into(),
            damaged: self.damaged.into(),
            reserved: 0,
            store: self.store.0.into(),
            number: self.number.into(),
            tail: self.tail.into(),
            flushed: self.flushed.into(),
            session: self.session.into(),
            session_start: self.session_start.into(),
            slots_mark: self.slots_mark.into(),
            group_count: (self.groups.len() as u32).into(),
            generations: self.generations.into(),
            padding: [0; 48],
        };
        out.fill(0);
        out[..HEADER_SIZE].copy_from_slice(header.as_bytes());
        for (row, to) in self.groups.iter().zip(out[HEADER_SIZE..].chunks_exact_mut(GROUP_SIZE)) {
            let raw = RawGroup {
                group: row.group.0.into(),
                applied: row.applied.into(),
                damaged: row.damaged.into(),
                reserved: [0; 7],
                reset_position: row.reset_position.into(),
            };
            to.copy_from_slice(raw.as_bytes());
        }
        seal(MAGIC, out);
    }

    /// Reads a checkpoint from a whole slot (or from exactly its own bytes).
    ///
    /// # Errors
    /// 200 `StoreNotFormatted` (none was ever written), 206 `StoreCorrupt`, 208 `FormatUnsupported`.
    pub fn decode(slot: &[u8]) -> Result<Self, DiskFormatError> {
        let length = DiskFormatError::Length { found: slot.len(), expected: PAGE_SIZE };
        let (raw, _) = RawHeader::ref_from_prefix(slot).map_err(|_| length)?;
        if raw.magic != MAGIC {
            return Err(DiskFormatError::Magic);
        }
        let group_count = raw.group_count.get() as usize;
        check(group_count <= GROUPS_MAX, "group_count")?;
        let size = Self::size(group_count);
        let record = slot.get(..size).ok_or(DiskFormatError::Length { found: slot.len(), expected: size })?;
        check_seal(MAGIC, record)?;
        check_version(raw.version.get())?;
        check(raw.damaged <= 1, "damaged")?;
        check(raw.reserved == 0 && raw.padding == [0; 48], "reserved")?;
        let RawHeader { number, tail, flushed, session, session_start, .. } = *raw;
        check_counters(&[number, tail, flushed, session, session_start], "counters")?;
        let page = PAGE_SIZE as u64;
        check(raw.tail.get().is_multiple_of(page), "tail")?;
        check(raw.flushed.get() >= raw.tail.get(), "flushed")?;
        check(raw.session_start.get().is_multiple_of(page), "session_start")?;
        let (rows, padding) = record[HEADER_SIZE..].split_at(group_count * GROUP_SIZE);
        check(padding.iter().all(|byte| *byte == 0), "padding")?;
        let rows = <[RawGroup]>::ref_from_bytes(rows);
        let mut groups = Vec::with_capacity(group_count);
        for row in rows.expect("cut to whole rows") {
            check(row.damaged <= 1 && row.reserved == [0; 7], "group reserved")?;
            check_counters(&[row.reset_position], "reset_position")?;
            let group = GroupId(row.group.get());
            groups.push(GroupRow {
                group,
                applied: row.applied.into(),
                reset_position: row.reset_position.get(),
                damaged: row.damaged == 1,
            });
        }
        check(groups.windows(2).all(|pair| pair[0].group < pair[1].group), "group order")?;
        Ok(Self {
            store: StoreId(raw.store.get()),
            number: raw.number.get(),
            tail: raw.tail.get(),
            flushed: raw.flushed.get(),
            session: raw.session.get(),
            session_start: raw.session_start.get(),
            slots_mark: raw.slots_mark.get(),
            generations: raw.generations.get(),
            damaged: raw.damaged == 1,
            groups,
        })
    }
}

#[cfg(test)]
mod tests;
