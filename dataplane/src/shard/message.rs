//! What shards of one process tell each other, over `mailbox`: ownership moves, bytes stay where they are.

use std::sync::Arc;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, GroupId, MapVersion, PoolId, VolumeId};
use xsan_protocol::map::{ClusterMap, Volume};
use xsan_protocol::proto;

use crate::replication::{Reply, Request, ScrubOrder};
use crate::stats::Stats;

/// One message from shard to shard; `number` names the sender's call that the answer completes.
#[derive(Debug)]
pub enum Message {
    /// A gateway's request of a group that the receiver owns.
    Request(Box<Request>),
    Reply {
        number: u64,
        result: Result<Reply, Code>,
    },
    /// Flush every group of the pool that the receiver is primary of.
    Flush {
        number: u64,
        pool: PoolId,
    },
    Flushed {
        number: u64,
        groups: Vec<GroupId>,
    },
    /// From shard 0, which holds the link to the control process.
    Map(Arc<ClusterMap>),
    /// To shard 0: the control process is to hear at once that the sender acts on a newer map, or that a store has failed.
    StatusDue,
    /// To shard 0: attach a volume through the control plane.
    Open {
        number: u64,
        name: String,
    },
    Opened {
        number: u64,
        result: Result<Box<(Volume, MapVersion)>, Code>,
    },
    Close(VolumeId),
    /// From shard 0: end what clients that are gone have left under way in the volume; another one opens it.
    Sweep {
        number: u64,
        volume: VolumeId,
    },
    /// To shard 0: nothing of them is under way here.
    Swept(u64),
    /// To shard 0: ask the control plane to change groups.
    Propose(Vec<proto::GroupProposal>),
    /// From shard 0: a question of the control plane that concerns every shard.
    Ask {
        number: u64,
        question: Question,
    },
    Report {
        number: u64,
        report: Box<Report>,
    },
    /// From shard 0: the groups to be scrubbed, of whichever shard, and at how many bytes a second.
    Scrub {
        bytes_per_second: u64,
        orders: Arc<[ScrubOrder]>,
    },
    /// The process is to end: finish the requests of gateways' clients, and close their connections.
    CloseGateways,
    /// The process is to end: flush the stores, then say so.
    Shutdown,
}

#[derive(Clone, Copy, Debug)]
pub enum Question {
    /// Latencies and counters since the process started.
    Perf,
    /// State of the stores and of resync; the map version that the shard acts on.
    Status,
    /// Where a block is stored here.
    Block { group: GroupId, key: BlockKey },
}

/// One shard's part of the answer to a [`Question`].
#[derive(Debug)]
pub enum Report {
    Perf(Box<Stats>),
    Status(proto::DataStatus),
    Block(Option<proto::BlockReplica>),
}
