//! One call of the state machine: what all groups share, and where actions go.
//!
//! Used by every other file of `replication`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, GroupId, Incarnation, NodeId, Seq, StoreId, Version};
use xsan_protocol::map::Durability;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::PageRange;

use super::action::{Action, Change, Reply, RequestId};
use super::flush::{FlushWaiter, Flushes};
use super::pace::Pace;
use super::reclaim::Lineages;
use super::scrub::Scrubber;
use super::status::{Counters, Latencies, Stage};
use crate::disk::buffers::{Buffer, BufferMut, BufferPool, Claim};
use crate::net::frame::Frame;
use crate::store::StoreView;

/// The stores of the shard, to look at between calls.
pub trait Stores {
    /// The store that `Replication::add_store` made known.
    fn view(&self, store: StoreId) -> &dyn StoreView;
}

/// What a token given to the store or a peer stands for.
#[derive(Debug)]
pub(super) enum Token {
    Read(ReadJob),
    Mend(MendJob),
    Flush(StoreId),
    /// A unit pushed to this learner; the header of the Push, for its answer.
    Pushed {
        group: GroupId,
        to: NodeId,
        header: xsan_protocol::wire::header::Header,
    },
}

/// A read of the store under way.
#[derive(Debug)]
pub(super) struct ReadJob {
    pub group: GroupId,
    /// The reign of the primary that asked; 0 when it was asked for by another node.
    pub reign: u64,
    pub key: BlockKey,
    pub pages: PageRange,
    pub purpose: ReadPurpose,
    /// Reads made so far; content may move on while damage is being mended.
    pub attempt: u8,
}

#[derive(Debug)]
pub(super) enum ReadPurpose {
    Client {
        request: RequestId,
        started_ns: u64,
    },
    Merge(Merge),
    Push {
        learner: NodeId,
        attempt: u32,
        unit: u8,
        version: Version,
        as_of: Seq,
    },
    Serve {
        to: NodeId,
        header: xsan_protocol::wire::header::Header,
    },
    /// The primary's part of check number `check`; these pages were damaged.
    Scrub {
        check: u64,
        damaged: Vec<u16>,
    },
    /// A member's part of a check; the versions of the units before it.
    Check {
        to: NodeId,
        header: xsan_protocol::wire::header::Header,
        versions: Vec<Version>,
    },
    /// Destage met damage at this node.
    Mend {
        at: NodeId,
    },
    /// The session that asked is fenced.
    Dropped,
}

/// A write of part of one page, waiting for the rest of it.
#[derive(Debug)]
pub(super) struct Merge {
    pub request: RequestId,
    pub offset: u32,
    pub bytes: Buffer,
    pub fua: bool,
    pub durability: Durability,
}

/// A read that met damaged pages and asks other replicas for them.
#[derive(Debug)]
pub(super) struct MendJob {
    pub read: ReadJob,
    pub buffer: BufferMut,
    /// Pages of the block.
    pub damaged: Vec<u16>,
    pub expected: Arc<[u32]>,
    pub asked: NodeId,
    pub tried: Vec<NodeId>,
    /// Somebody may have them who did not say so: it refused, or lags.
    pub is_unsure: bool,
}

#[derive(Debug)]
pub(super) struct Core {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub pool: &'static BufferPool,
    pub lease_until_ns: u64,
    /// Counts calls: what a call decided shows in the stores from the next one on.
    pub turn: u64,
    next_token: u64,
    tokens: HashMap<u64, Token>,
    pub flushes: Flushes,
    /// Stores known, and whether they have failed.
    pub stores: BTreeMap<StoreId, bool>,
    /// Groups that have something to do at a tick.
    pub ticking: BTreeSet<GroupId>,
    /// Groups that go on in the next call, when the stores show what this one decided.
    pub deferred: BTreeSet<GroupId>,
    /// Frames of an epoch that the map has not reached.
    pub early: Vec<(NodeId, Frame)>,
    /// Units being pushed to learners, over all groups.
    pub pushes: usize,
    pub pace: Pace,
    /// Groups whose next push the pace refused.
    pub paced: BTreeSet<GroupId>,
    /// Of the newest map.
    pub lineages: Lineages,
    pub scrubber: Scrubber,
    pub counters: Counters,
    pub latencies: Latencies,
}

impl Core {
    pub fn new(node: NodeId, incarnation: Incarnation, pool: &'static BufferPool) -> Self {
        Self {
            node,
            incarnation,
            pool,
            lease_until_ns: 0,
            turn: 0,
            next_token: 1,
            tokens: HashMap::new(),
            flushes: Flushes::default(),
            stores: BTreeMap::new(),
            ticking: BTreeSet::new(),
            deferred: BTreeSet::new(),
            early: Vec::new(),
            pushes: 0,
            pace: Pace::default(),
            paced: BTreeSet::new(),
            lineages: Lineages::default(),
            scrubber: Scrubber::default(),
            counters: Counters::default(),
            latencies: Latencies::default(),
        }
    }

    pub fn fresh_token(&mut self) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        token
    }

    pub fn keep(&mut self, token: Token) -> u64 {
        let number = self.fresh_token();
        self.tokens.insert(number, token);
        number
    }

    pub fn take(&mut self, number: u64) -> Option<Token> {
        self.tokens.remove(&number)
    }

    /// Puts back a token that was not the one meant.
    pub fn put_back(&mut self, number: u64, token: Token) {
        self.tokens.insert(number, token);
    }

    /// Reads of a fenced session end in nothing.
    pub fn drop_reads(&mut self, of: impl Fn(&RequestId) -> bool) {
        for token in self.tokens.values_mut() {
            let (Token::Read(job) | Token::Mend(MendJob { read: job, .. })) = token else { continue };
            let request = match &job.purpose {
                ReadPurpose::Client { request, .. } => request,
                ReadPurpose::Merge(merge) => &merge.request,
                _ => continue,
            };
            if of(request) {
                job.purpose = ReadPurpose::Dropped;
            }
        }
    }

    /// Takes the repairs under way that are `which`, in the order in which they asked.
    pub fn take_mends(&mut self, which: impl Fn(&MendJob) -> bool) -> Vec<MendJob> {
        let waits = |_: &u64, token: &mut Token| matches!(token, Token::Mend(mend) if which(mend));
        let mut taken: Vec<(u64, Token)> = self.tokens.extract_if(waits).collect();
        taken.sort_unstable_by_key(|(number, _)| *number);
        let mend = |(_, token)| match token {
            Token::Mend(mend) => Some(mend),
            _ => None,
        };
        taken.into_iter().filter_map(mend).collect()
    }

    /// Reads under way because destage met damage.
    pub fn mends(&self) -> usize {
        let mends = |token: &&Token| match token {
            Token::Read(job) | Token::Mend(MendJob { read: job, .. }) => {
                matches!(job.purpose, ReadPurpose::Mend { .. })
            }
            _ => false,
        };
        self.tokens.values().filter(mends).count()
    }

    /// May a scrub read so many bytes now: by its own rate, and by what clients at work allow?
    pub fn grant_scrub(&mut self, now_ns: u64, bytes: usize) -> bool {
        self.pace.has_room(now_ns) && self.scrubber.take(bytes as u64) && self.pace.grant(now_ns, bytes)
    }

    pub fn has_failed(&self, store: StoreId) -> bool {
        self.stores.get(&store).copied().unwrap_or(true)
    }
}

/// What a group works with during one call.
pub(super) struct Call<'a> {
    pub core: &'a mut Core,
    pub stores: &'a dyn Stores,
    pub now_ns: u64,
    pub out: &'a mut Vec<Action>,
}

impl Call<'_> {
    pub fn node(&self) -> NodeId {
        self.core.node
    }

    pub fn send(&mut self, to: NodeId, frame: Frame) {
        assert!(to != self.core.node, "a node does not send to itself");
        self.out.push(Action::Send { to, frame });
    }

    /// Content that is still to be sent to `to` is of no use any more there; its buffers are, here.
    pub fn unsend(&mut self, to: NodeId, group: GroupId) {
        self.out.push(Action::Unsend { to, group });
    }

    pub fn complete(&mut self, request: RequestId, result: Result<Reply, Code>) {
        self.out.push(Action::Complete { request, result });
    }

    pub fn propose(
        &mut self,
        group: GroupId,
        epoch: xsan_protocol::ids::Epoch,
        node: NodeId,
        change: Change,
    ) {
        self.out.push(Action::Propose { group, epoch, node, change });
    }

    pub fn has_lease(&self) -> bool {
        self.now_ns < self.core.lease_until_ns || Mutation::LeaseIgnored.is_on()
    }

    pub fn flush(&mut self, store: StoreId, waiter: FlushWaiter) {
        let token = self.core.keep(Token::Flush(store));
        let before = self.out.len();
        self.core.flushes.request(store, waiter, token, self.out);
        if self.out.len() == before {
            self.core.take(token);
        }
    }

    /// Releases those whom the flush `token` served.
    pub fn flushed(&mut self, store: StoreId, token: u64) -> Vec<FlushWaiter> {
        let next = self.core.keep(Token::Flush(store));
        let before = self.out.len();
        let released = self.core.flushes.on_flushed(store, token, next, self.out);
        if self.out.len() == before {
            self.core.take(next);
        }
        released
    }

    /// Starts a read of the store; false when no buffer is free.
    pub fn read(&mut self, store: StoreId, job: ReadJob) -> bool {
        let Some(buffer) = self.core.pool.alloc_for(Claim::Request, job.pages.bytes()) else { return false };
        self.read_into(store, job, buffer);
        true
    }

    pub fn read_into(&mut self, store: StoreId, job: ReadJob, buffer: BufferMut) {
        let (group, key, pages) = (job.group, job.key, job.pages);
        let token = self.core.keep(Token::Read(job));
        self.out.push(Action::Read { store, token, group, key, pages, buffer });
    }

    pub fn sample(&mut self, stage: Stage, since_ns: u64) {
        self.core.latencies.add(stage, self.now_ns.saturating_sub(since_ns));
    }
}
