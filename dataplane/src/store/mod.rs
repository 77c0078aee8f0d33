//! Store: one journal and capacity region of one device (or of a cache and a capacity device).
//!
//! A deterministic state machine: `shard` carries out its [`crate::io::DiskAction`]s and feeds back their completions.
//! Knows groups, blocks, pages and versions; no volume, gateway, peer or socket.

mod allocator;
mod carry;
mod destage;
mod engine;
mod format;
mod group;
mod index;
mod journal;
mod layout;
mod read;
mod recover;
mod reserve;
mod status;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, GroupId, Seq, Version};
use xsan_protocol::units::{PageRange, UNITS_PER_BLOCK};

use crate::disk::buffers::{Buffer, BufferMut};

pub use engine::{Options, Store};
pub use format::{Content, Foreign, FormatError, FormatParameters};
pub use index::version_after;
pub use recover::{OpenError, Recovered, RecoveredGroup};
pub use status::{Counters, StoreStatus, UnitLocation};

/// One thing to put into the journal. Records of a group are appended in the group's order.
#[derive(Clone, Debug)]
pub enum Record {
    /// An entry of the group's order. It is applied (readable, destaged) only when `Store::apply` reaches it.
    Entry(Entry),
    /// Content of one whole unit from the primary, for a learner. Applied at once, after every entry up to
    /// `as_of`; `data` is `None` for a unit of zeroes. Ends with `StoreEvent::Pushed`.
    Push {
        token: u64,
        group: GroupId,
        key: BlockKey,
        unit: u8,
        version: Version,
        as_of: Seq,
        data: Option<PageData>,
        /// Pages of the unit, by bit, that no replica has: they read as damaged.
        lost: u16,
    },
    /// Drops every entry of the group that is not applied; the next entry must follow `last`. Ends with
    /// `StoreEvent::Reset`.
    Reset { group: GroupId, last: Version },
}

impl Record {
    pub const fn group(&self) -> GroupId {
        match self {
            Self::Entry(entry) => entry.group,
            Self::Push { group, .. } | Self::Reset { group, .. } => *group,
        }
    }
}

/// An entry of a group's order.
#[derive(Clone, Debug)]
pub struct Entry {
    pub group: GroupId,
    pub version: Version,
    /// Every entry of the group up to this one is acknowledged.
    pub acked: Seq,
    pub key: BlockKey,
    pub pages: PageRange,
    /// `None`: zeroes (trim, write-zeroes).
    pub data: Option<PageData>,
    /// Versions that the first and last unit of `pages` had just before, where it covers them in part.
    pub previous_first: Version,
    pub previous_last: Version,
}

/// Whole pages and their CRC32Cs, one for each.
#[derive(Clone, Debug)]
pub struct PageData {
    pub bytes: Buffer,
    pub checksums: Arc<[u32]>,
}

/// What a store reports after `Store::end_turn` or `Store::on_disk`.
#[derive(Debug)]
pub enum StoreEvent {
    /// Every entry of `group` up to `seq` is in the journal (completed by the device).
    Durable {
        group: GroupId,
        seq: Seq,
    },
    Pushed {
        token: u64,
    },
    /// A reset of `group` is in the journal.
    Reset {
        group: GroupId,
    },
    /// Everything durable when `Store::flush(token)` was called is on stable media.
    Flushed {
        token: u64,
    },
    ReadDone {
        token: u64,
        result: Result<ReadPages, ReadError>,
    },
    /// `Store::repair(token)` has rewritten those of its pages that matched what the index expects.
    Repaired {
        token: u64,
        pages: PageRange,
    },
    /// Destage met pages that do not match their checksums, or that can not be read: all of these. They stay in the journal for now, or go
    /// to their place as they are; reading them ends with `ReadError::Damaged`, and `Store::repair` mends them.
    Damaged {
        group: GroupId,
        key: BlockKey,
        pages: PageRange,
    },
    /// The device failed a write or flush: the store takes nothing more.
    Failed,
}

/// Pages that were read and verified.
#[derive(Debug)]
pub struct ReadPages {
    pub buffer: BufferMut,
    pub checksums: Arc<[u32]>,
}

#[derive(Debug)]
pub enum ReadError {
    /// These pages of the request do not match their checksums (or the device could not read them); the others
    /// are in the buffer, verified. `expected` has the right checksum of each page of the request.
    Damaged { buffer: BufferMut, damaged: Vec<u16>, expected: Arc<[u32]> },
    /// The store has failed.
    Failed,
}

/// End of a group's journal as recovery or the present state has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupTail {
    /// The newest entry.
    pub last: Version,
    /// The newest entry known to be acknowledged, applied to the index.
    pub acked: Seq,
}

/// What `Store::withdraw` has left of a group.
#[derive(Debug)]
pub struct Withdrawn {
    /// The newest entry.
    pub last: Version,
    /// Tokens of the pushes that it took back.
    pub pushes: Vec<u64>,
}

/// A record that the store did not take.
#[derive(Debug)]
pub struct Refused {
    pub record: Box<Record>,
    pub error: StoreError,
}

/// Why the store does not take a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the journal has no room until destage moves on")]
    JournalFull,
    #[error("the capacity has no room for the write")]
    Full,
    #[error("the device failed earlier")]
    Failed,
}

impl StoreError {
    pub const fn code(self) -> Code {
        match self {
            Self::JournalFull => Code::JournalFull,
            Self::Full => Code::StorageFull,
            Self::Failed => Code::StoreFailed,
        }
    }
}

/// What replication may ask a store at any time: versions of what is applied.
pub trait StoreView {
    /// Version of one unit; `Version::ZERO` where nothing is stored.
    fn unit_version(&self, group: GroupId, key: BlockKey, unit: u8) -> Version;
    /// Versions of every unit of a block.
    fn unit_versions(&self, group: GroupId, key: BlockKey) -> [Version; UNITS_PER_BLOCK];
    /// Up to `max` blocks of the group that hold anything, in the order of their keys, after `after`, with digests.
    fn blocks_after(&self, group: GroupId, after: Option<BlockKey>, max: usize) -> Vec<(BlockKey, u64)>;
    /// Which pages of the range hold something.
    fn allocated(&self, group: GroupId, key: BlockKey, pages: PageRange) -> Vec<bool>;
    /// Is there room for `pages` more pages of entries (journal and capacity)? Asked by the primary before it gives a seq.
    fn admit(&self, pages: usize) -> Result<(), StoreError>;
    /// Is there no capacity for a page of a new block, whatever room the journal has?
    fn is_full(&self) -> bool {
        self.admit(1) == Err(StoreError::Full)
    }
    /// As `admit`, for known pages: a write to what holds capacity already is let in when the store is full.
    fn admit_write(&self, _group: GroupId, _key: BlockKey, pages: PageRange) -> Result<(), StoreError> {
        self.admit(usize::from(pages.count))
    }
    /// Is there capacity for a learner's entry of these pages?
    fn has_room(&self, _group: GroupId, _key: BlockKey, pages: PageRange) -> bool {
        self.admit(usize::from(pages.count)) != Err(StoreError::Full)
    }
    /// Does a write of these pages take capacity that they do not have yet?
    fn wants_room(&self, _group: GroupId, _key: BlockKey, _pages: PageRange) -> bool {
        true
    }
}
