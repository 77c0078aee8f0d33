//! Shard: one pinned core's thread and all that it owns. Here events become actions, a turn at a time.
//!
//! A turn takes everything that is there (frames, requests, messages, device completions), runs the state
//! machines, carries out what they ask for, and only then issues one journal append for each store, one send
//! for each connection and one system call for the device ring. It waits for nothing to fill a batch: the
//! first event starts a turn, and what arrived meanwhile is in the next.
//!
//! Invariants
//! - State machines are entered from a turn alone: a task that receives something queues an [`Event`].
//! - Actions are carried out in order, right after the call that asked for them.
//!
//! Source: ARCHITECTURE.md, one write; docs/decisions/0003-two-rings.md.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicU64, Ordering};
use std::thread::JoinHandle;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, Incarnation, MapVersion, NodeId, PoolId, ShardIndex, StoreId};
use xsan_protocol::map::{ClusterMap, Volume};
use xsan_protocol::proto;
use xsan_protocol::wire::header::Opcode;
use xsan_protocol::wire::session::Hello;

use crate::disk::buffers::BufferPool;
use crate::disk::os;
use crate::disk::ring::{Completed, DiskRing};
use crate::gateway::nbd::Gateway;
use crate::io::DiskAction;
use crate::net::connection::Outbox;
use crate::net::frame::Frame;
use crate::net::notify::Notify;
use crate::replication::{
    Action, Change, Driver, Origin, Output, Replication, Reply, Request, RequestId, StoreTable,
};
use crate::stats::{Recent, Stats};
use crate::volume::calls::{Answer, Calls};
use crate::volume::{VolumeClient, wire};

pub mod boot;
mod control;
mod failures;
mod incarnation;
pub mod link;
pub mod mailbox;
mod message;
mod parker;
mod peers;
mod port;
mod report;
mod stores;
mod tasks;
pub mod topology;
mod turn;

use control::Control;
use failures::Failures;
use link::LinkEvent;
use mailbox::MeshEnd;
pub use message::{Message, Question, Report};
pub use peers::is_answer;
use peers::{ConnectionId, PeerShard, Peers};
use stores::BrokenStore;

/// What a task of the shard's thread has for the next turn.
pub enum Event {
    Frames {
        connection: ConnectionId,
        frames: Vec<Frame>,
    },
    Accepted {
        connection: ConnectionId,
        hello: Hello,
        outbox: Outbox,
    },
    Dialled {
        connection: ConnectionId,
        peer: PeerShard,
        outbox: Outbox,
        wanted: Rc<Cell<bool>>,
    },
    Closed(ConnectionId),
    /// A gateway's request of a group of this shard.
    Request(Box<Request>),
    /// A gateway's request of another node's group; call `number` waits for the answer.
    Send {
        number: u64,
        peer: PeerShard,
        frame: Frame,
    },
    /// A message for another shard of this process.
    Tell(ShardIndex, Message),
    /// A message from shard `.0` of this process.
    Message(ShardIndex, Message),
    /// The groups of a pool that this shard leads are flushed.
    Flushed {
        asker: Asker,
        number: u64,
        groups: Vec<GroupId>,
    },
    Link(LinkEvent),
    /// The device ring has completions, or another shard has sent something.
    Wake,
    Tick,
    /// The heartbeat interval has passed: tell the control process how the stores are.
    Status,
}

/// Who waits for a flush of this shard's groups.
#[derive(Clone, Copy, Debug)]
pub enum Asker {
    Shard(ShardIndex),
    Connection(ConnectionId),
}

/// What never changes in a shard's life.
#[derive(Debug)]
pub struct Identity {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub shard: ShardIndex,
    pub shard_count: u16,
    pub cluster_id: String,
}

/// The devices of one store of the shard, with their slots in the ring.
struct Devices {
    path: String,
    cache_path: Option<String>,
    media: String,
    capacity_slot: usize,
    cache_slot: Option<usize>,
    /// Writes to the device that holds the journal: what a client's write waits for.
    writes: Recent,
}

impl Devices {
    const fn journal_slot(&self) -> usize {
        match self.cache_slot {
            Some(cache) => cache,
            None => self.capacity_slot,
        }
    }

    fn has_slot(&self, slot: usize) -> bool {
        self.capacity_slot == slot || self.cache_slot == Some(slot)
    }
}

/// The shard's state: owned by the task that runs its turns.
pub struct Shard {
    identity: Rc<Identity>,
    handle: Handle,
    client: VolumeClient,
    gateway: Gateway<VolumeClient>,
    driver: Driver,
    devices: HashMap<StoreId, Devices>,
    /// Stores that could not be opened: told to the control plane, and otherwise not there.
    broken_stores: Vec<BrokenStore>,
    failures: Failures,
    /// Threads that note failures of stores: a clean stop waits for them.
    notes: Vec<JoinHandle<()>>,
    /// Shard 0 alone, until the cluster knows of this life, and so of failures in earlier ones.
    tells_failures: bool,
    ring: DiskRing,
    peers: Peers,
    connections: tasks::Connections,
    dialled: HashMap<PeerShard, tasks::Dialling>,
    map: Arc<ClusterMap>,
    calls: Calls,
    opens: Opens,
    buffers: &'static BufferPool,
    lease_until_ns: Arc<AtomicU64>,
    stats: Rc<RefCell<Stats>>,
    mesh: Rc<RefCell<MeshEnd<Message>>>,
    /// Shard 0 alone.
    control: Option<Control>,
    /// Set when the process is to end: the stores that are not flushed yet.
    stopping: Option<usize>,
    stopped: std::sync::mpsc::Sender<ShardIndex>,
    scratch: Scratch,
}

/// Calls that attach volumes.
type Opens = Calls<(), Opened>;
/// A volume that was attached, and a map that has it.
type Opened = Box<(Volume, MapVersion)>;

/// Vectors that every turn fills and empties.
#[derive(Default)]
struct Scratch {
    outputs: Vec<Output>,
    operations: Vec<(StoreId, DiskAction)>,
    completions: Vec<Completed>,
    proposals: Vec<proto::GroupProposal>,
}

/// How the tasks of the shard's thread reach its turn.
#[derive(Clone)]
pub struct Handle(Rc<Inner>);

struct Inner {
    events: RefCell<VecDeque<Event>>,
    wake: Notify,
    map: RefCell<Arc<ClusterMap>>,
    next_connection: Cell<ConnectionId>,
}

impl Handle {
    fn new() -> Self {
        Self(Rc::new(Inner {
            events: RefCell::default(),
            wake: Notify::default(),
            map: RefCell::default(),
            next_connection: Cell::new(1),
        }))
    }

    /// Queues an event; the next turn takes it.
    fn push(&self, event: Event) {
        self.0.events.borrow_mut().push_back(event);
        self.0.wake.notify();
    }

    fn map(&self) -> Arc<ClusterMap> {
        self.0.map.borrow().clone()
    }

    fn connection_id(&self) -> ConnectionId {
        let id = self.0.next_connection.get();
        self.0.next_connection.set(id + 1);
        id
    }
}
