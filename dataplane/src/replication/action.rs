//! What replication is asked for and what it answers: requests in, actions out.
//!
//! Used by `shard`, `volume` and `gateway`. Plain data, no behaviour.

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, Epoch, GroupId, NodeId, Seq, ShardIndex, StoreId};
use xsan_protocol::map::Durability;
use xsan_protocol::units::PageRange;

use crate::disk::buffers::{Buffer, BufferMut};
use crate::net::frame::Frame;
use crate::store::{PageData, Record};

/// What the shard does for replication, in the order given.
#[derive(Debug)]
pub enum Action {
    /// To the shard of `to` that owns its store of the frame's group, over the one connection between the two shards.
    Send { to: NodeId, frame: Frame },
    /// Content of the group that is still to be sent to `to` need not be: it may stay away, or arrive.
    Unsend { to: NodeId, group: GroupId },
    /// `Store::append`; an error comes back through `Replication::on_append_refused`.
    Append { store: StoreId, record: Record },
    /// `Store::withdraw`; what is left is told by `Replication::on_withdrawn`.
    Withdraw { store: StoreId, group: GroupId },
    /// `Store::apply`: entries up to `through` are acknowledged.
    Apply { store: StoreId, group: GroupId, through: Seq },
    /// `Store::read`; ends with `StoreEvent::ReadDone`.
    Read { store: StoreId, token: u64, group: GroupId, key: BlockKey, pages: PageRange, buffer: BufferMut },
    /// `Store::flush`; ends with `StoreEvent::Flushed`.
    Flush { store: StoreId, token: u64 },
    /// `Store::repair`: rewrites damaged pages with content that matches the checksums the store expects.
    Repair { store: StoreId, token: u64, group: GroupId, key: BlockKey, pages: PageRange, data: PageData },
    /// Answers a client request.
    Complete { request: RequestId, result: Result<Reply, Code> },
    /// Asks the control plane to change the group.
    Propose { group: GroupId, epoch: Epoch, node: NodeId, change: Change },
}

/// What a primary asks for one of its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The learner has everything.
    Promote,
    /// It does not answer or does not get on: to be a learner, if enough members are left.
    Demote,
    /// Its journal does not continue into the group's: to be a learner, however few are left.
    Exclude,
    /// Its journal holds what the primary's lacks and can not be given: to be the primary.
    Lead,
    /// The learner was proposed, and lacks entries that are kept no more: it starts anew, which takes another epoch.
    Renew,
    /// Every acting member has in its journal what any had when the epoch began: the set before it does not count any more.
    Settle,
}

/// Names a client request at the primary: who sent it, and its number there. Requests of a fenced session are
/// dropped by [`Origin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId {
    pub origin: Origin,
    pub number: u64,
}

/// Where a request came from, and so where its answer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// A gateway on a shard of this process.
    Shard(ShardIndex),
    /// A connection of this shard.
    Connection(u64),
}

/// A client's request of one group.
#[derive(Debug)]
pub struct Request {
    pub id: RequestId,
    pub group: GroupId,
    pub epoch: Epoch,
    pub durability: Durability,
    pub operation: Operation,
}

#[derive(Clone, Debug)]
pub enum Operation {
    Read {
        key: BlockKey,
        pages: PageRange,
    },
    /// Whole pages.
    Write {
        key: BlockKey,
        pages: PageRange,
        data: PageData,
        fua: bool,
    },
    /// Part of one page: `bytes` at `offset` of the block, not crossing a page.
    WriteSectors {
        key: BlockKey,
        offset: u32,
        bytes: Buffer,
        fua: bool,
    },
    Zero {
        key: BlockKey,
        pages: PageRange,
        fua: bool,
    },
    /// Which pages of the range hold something.
    BlockStatus {
        key: BlockKey,
        pages: PageRange,
    },
    /// Everything acknowledged in this group is to be on stable media of every acting member.
    Flush,
}

impl Operation {
    /// The block concerned; `None` for a flush, which is of the whole group.
    pub fn key(&self) -> Option<BlockKey> {
        match self {
            Self::Read { key, .. }
            | Self::Write { key, .. }
            | Self::WriteSectors { key, .. }
            | Self::Zero { key, .. }
            | Self::BlockStatus { key, .. } => Some(*key),
            Self::Flush => None,
        }
    }
}

#[derive(Debug)]
pub enum Reply {
    Done,
    /// `None`: all of it is zero and not stored.
    Data(Option<PageData>),
    /// One flag a page.
    Status(Vec<bool>),
}
