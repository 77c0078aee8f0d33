//! Small clusters under random faults: three nodes, broken connections, killed processes, lost power, damaged pages,
//! full journals, and a controller that moves groups by the rules of the control plane.
//!
//! Checked: a sector that is read is, to the byte, what one write left there; clients' histories are linearizable, sector by sector, to
//! the last write; nothing stays unanswered; no scrub finds a difference; when all is quiet, every read is answered, and every group has
//! all its replicas and they are identical.
//!
//! `XSAN_SEED=n cargo test -p xsan-dataplane --lib replication::tests::cluster` replays one seed.

mod faults;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{
    BlockIndex, BlockKey, BootId, Epoch, GroupId, Incarnation, Layer, Lineage, MapVersion, NodeId, PoolId,
    ShardIndex, StoreId,
};
use xsan_protocol::map::{ClusterMap, Durability, Group, Member, Pool};
use xsan_protocol::units::{PAGE_SIZE, PageRange, SECTOR_SIZE};

use super::model::ModelStore;
use super::pool;
use crate::net::frame::Frame;
use crate::replication::{
    Action, Change, Operation, Origin, RecoveredGroup, Replication, Reply, Request, RequestId, ScrubOrder,
    is_content,
};
use crate::store::{PageData, ReadError, Record, StoreError, StoreEvent};
use crate::testing::{History, Random, Sector, Span, fill, value_of};

const NODES: u32 = 3;
const GROUPS: u16 = 2;
/// Of each group.
const BLOCKS: u32 = 3;
const SECTORS_PER_PAGE: usize = PAGE_SIZE / SECTOR_SIZE as usize;
/// Most requests that clients have outstanding.
const OUTSTANDING: usize = 24;
const MS: u64 = 1_000_000;
/// Seeds of a run that none are named for.
const SEEDS: u64 = 200;

struct Node {
    id: NodeId,
    incarnation: Incarnation,
    boot: BootId,
    /// `None`: the process is dead.
    replication: Option<Replication>,
    store: ModelStore,
    maps: VecDeque<Arc<ClusterMap>>,
    map_seen: MapVersion,
}

#[derive(Debug)]
struct Outstanding {
    node: NodeId,
    start: u64,
    group: GroupId,
    key: BlockKey,
    /// Page, sector and value (written), or just the place (read).
    sectors: Vec<(u16, u16, u64)>,
    reads: bool,
}

impl Outstanding {
    fn place(&self, page: u16, sector: u16) -> Sector {
        (block_number(self.group, self.key), page, sector)
    }
}

struct Proposal {
    group: GroupId,
    epoch: Epoch,
    node: NodeId,
    change: Change,
}

/// What happened in a run.
#[derive(Default)]
struct Counts {
    answered: u64,
    failed: u64,
    /// Reads of a store that met damaged pages.
    damaged: u64,
    scrubbed: u64,
}

struct Cluster {
    random: Random,
    now_ns: u64,
    step: u64,
    nodes: Vec<Node>,
    links: BTreeMap<(NodeId, NodeId), VecDeque<Frame>>,
    down: BTreeSet<(NodeId, NodeId)>,
    map: ClusterMap,
    /// Former primaries that may not know it yet.
    unconfirmed: BTreeMap<GroupId, (NodeId, MapVersion)>,
    proposals: Vec<Proposal>,
    outstanding: BTreeMap<u64, Outstanding>,
    next_request: u64,
    history: History,
    /// Groups and orders of the scrubs that ended.
    scrubbed: BTreeSet<(GroupId, u64)>,
    counts: Counts,
    faults: bool,
}

fn group_id(index: u16) -> GroupId {
    GroupId::new(PoolId(1), index)
}

fn pair(a: NodeId, b: NodeId) -> (NodeId, NodeId) {
    (a.min(b), a.max(b))
}

impl Cluster {
    fn new(seed: u64) -> Self {
        let mut map = ClusterMap { version: MapVersion(1), ..ClusterMap::default() };
        map.pools.insert(
            PoolId(1),
            Pool { id: PoolId(1), replica_count: 3, min_replicas: 2, group_count: GROUPS },
        );
        for index in 0..GROUPS {
            let member = |node: u32| Member {
                node: NodeId(node),
                store: StoreId(u64::from(node)),
                incarnation: Incarnation(u64::from(node)),
                boot_id: BootId(u64::from(node)),
                learner: false,
                damaged: false,
            };
            let group = Group {
                id: group_id(index),
                epoch: Epoch(1),
                primary: Some(NodeId(u32::from(index) % NODES + 1)),
                members: (1..=NODES).map(member).collect(),
                former: Vec::new(),
                dropped: Vec::new(),
            };
            map.groups.insert(group.id, group);
        }
        let mut cluster = Self {
            random: Random::new(seed),
            now_ns: MS,
            step: 1,
            nodes: Vec::new(),
            links: BTreeMap::new(),
            down: BTreeSet::new(),
            map,
            unconfirmed: BTreeMap::new(),
            proposals: Vec::new(),
            outstanding: BTreeMap::new(),
            next_request: 1,
            history: History::default(),
            scrubbed: BTreeSet::new(),
            counts: Counts::default(),
            faults: true,
        };
        for node in 1..=NODES {
            let id = NodeId(node);
            cluster.nodes.push(Node {
                id,
                incarnation: Incarnation(u64::from(node)),
                boot: BootId(u64::from(node)),
                replication: None,
                store: ModelStore::new(StoreId(u64::from(node))),
                maps: VecDeque::new(),
                map_seen: MapVersion(0),
            });
            cluster.boot(id, Vec::new());
            for other in (1..=NODES).filter(|other| *other != node) {
                cluster.links.insert((id, NodeId(other)), VecDeque::new());
            }
        }
        cluster.publish();
        cluster
    }

    fn boot(&mut self, id: NodeId, recovered: Vec<RecoveredGroup>) {
        let node = self.node(id);
        let mut replication = Replication::new(id, node.incarnation, ShardIndex(0), pool());
        replication.add_store(node.store.id, recovered, false);
        replication.on_lease(u64::MAX);
        node.replication = Some(replication);
        node.map_seen = MapVersion(0);
        node.maps.clear();
        let map = Arc::new(self.map.clone());
        self.node(id).maps.push_back(map);
    }

    fn node(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize - 1]
    }

    fn publish(&mut self) {
        let map = Arc::new(self.map.clone());
        for node in self.nodes.iter_mut().filter(|node| node.replication.is_some()) {
            node.maps.push_back(map.clone());
        }
    }

    /// One call of a node's state machine, and its actions.
    fn call(&mut self, id: NodeId, act: impl FnOnce(&mut Replication, &ModelStore, u64, &mut Vec<Action>)) {
        let now_ns = self.now_ns;
        let node = self.node(id);
        let Some(replication) = &mut node.replication else { return };
        let mut out = Vec::new();
        act(replication, &node.store, now_ns, &mut out);
        // Whatever else goes on, no replica ever differs from another.
        for outcome in replication.scrub_status().outcomes {
            assert_eq!(outcome.findings.differences, 0, "{outcome:?} on node {id}");
            let is_new = self.scrubbed.insert((outcome.order.group, outcome.order.number));
            self.counts.scrubbed += u64::from(is_new);
        }
        self.carry_out(id, out);
    }

    fn carry_out(&mut self, id: NodeId, out: Vec<Action>) {
        let mut refused: Vec<(Record, StoreError)> = Vec::new();
        let mut withdrawn = Vec::new();
        for action in out {
            match action {
                Action::Send { to, frame } => {
                    let broken = self.down.contains(&pair(id, to)) || self.node(to).replication.is_none();
                    if !broken {
                        self.links.get_mut(&(id, to)).unwrap().push_back(frame);
                    }
                }
                Action::Unsend { to, group } => {
                    // A part may be on its way already.
                    let link = self.links.get_mut(&(id, to)).unwrap();
                    let mut on_way = self.random.index(link.len() + 1);
                    link.retain(|frame| {
                        let stays = on_way > 0;
                        on_way -= usize::from(stays);
                        stays || frame.header.group != group || !is_content(frame.header.opcode)
                    });
                }
                Action::Append { record, .. } => {
                    let same = refused.iter().any(|(earlier, _)| group_of(earlier) == group_of(&record));
                    match self.node(id).store.append(record.clone()) {
                        Ok(()) => assert!(!same),
                        Err(error) => refused.push((record, error)),
                    }
                }
                Action::Withdraw { group, .. } => {
                    withdrawn.push((group, self.node(id).store.withdraw(group)));
                }
                Action::Apply { group, through, .. } => self.node(id).store.apply(group, through),
                Action::Read { token, group, key, pages, buffer, .. } => {
                    self.node(id).store.read(token, group, key, pages, buffer);
                }
                Action::Flush { token, .. } => self.node(id).store.flush(token),
                Action::Repair { group, key, pages, data, .. } => {
                    self.node(id).store.repair(group, key, pages, &data);
                }
                Action::Complete { request, result } => self.on_complete(id, request, result),
                Action::Propose { group, epoch, node, change } => {
                    self.proposals.push(Proposal { group, epoch, node, change });
                }
            }
        }
        if !withdrawn.is_empty() {
            self.call(id, |replication, store, now_ns, out| {
                replication.on_withdrawn(withdrawn, store, now_ns, out);
            });
        }
        for (record, error) in refused {
            self.call(id, |replication, store, now_ns, out| {
                replication.on_append_refused(store.id, record, error, store, now_ns, out);
            });
        }
    }

    fn on_complete(&mut self, node: NodeId, request: RequestId, result: Result<Reply, Code>) {
        let Some(outstanding) = self.outstanding.remove(&request.number) else {
            panic!("request {} was answered twice", request.number);
        };
        assert_eq!(outstanding.node, node);
        let span = Span { start: outstanding.start, end: self.step };
        if result.is_ok() {
            self.counts.answered += 1;
        } else {
            self.counts.failed += 1;
        }
        match result {
            Ok(Reply::Data(data)) => {
                let first = outstanding.sectors[0].0;
                for &(page, sector, _) in &outstanding.sectors {
                    let place = outstanding.place(page, sector);
                    let value = data.as_ref().map_or(0, |data| {
                        let offset = usize::from(page - first) * PAGE_SIZE
                            + usize::from(sector) * SECTOR_SIZE as usize;
                        value_of(&data.bytes[offset..offset + SECTOR_SIZE as usize], place).unwrap()
                    });
                    self.history.read(place, value, span);
                }
            }
            Ok(Reply::Done) => self.wrote(&outstanding, span),
            Ok(Reply::Status(_)) => {}
            Err(code) => {
                assert!(
                    matches!(
                        code,
                        Code::NotPrimary
                            | Code::StaleEpoch
                            | Code::GroupInactive
                            | Code::Busy
                            | Code::ChecksumMismatch
                    ),
                    "{code:?}"
                );
                self.lost(outstanding);
            }
        }
    }

    /// A request without a good answer: a write of it may have happened, or still happen.
    fn lost(&mut self, outstanding: Outstanding) {
        if outstanding.reads {
            return;
        }
        let span = Span { start: outstanding.start, end: u64::MAX };
        self.wrote(&outstanding, span);
    }

    fn wrote(&mut self, write: &Outstanding, span: Span) {
        for &(page, sector, value) in &write.sectors {
            self.history.wrote(write.place(page, sector), value, span);
        }
    }

    fn random_pages(&mut self) -> PageRange {
        let starts = [0, 1, 2, 13, 14, 15, 16, 30];
        let first = starts[self.random.index(starts.len())];
        match self.random.index(8) {
            0 => PageRange::new(0, 16),
            1 => PageRange::new(first, 4),
            _ => PageRange::new(first, 1 + self.random.index(2) as u16),
        }
    }

    fn client(&mut self) {
        let group = group_id(self.random.index(usize::from(GROUPS)) as u16);
        let Some(truth) = self.map.groups.get(&group) else { return };
        let (Some(primary), epoch) = (truth.primary, truth.epoch) else { return };
        let node = if self.random.one_in(20) {
            NodeId(self.random.index(NODES as usize) as u32 + 1)
        } else {
            primary
        };
        let key = BlockKey {
            lineage: Lineage(7),
            layer: Layer(1),
            index: BlockIndex(u32::from(group.index()) * 100 + self.random.index(BLOCKS as usize) as u32),
        };
        let pages = self.random_pages();
        let fua = self.random.one_in(6);
        let operation = match self.random.index(10) {
            0..3 => Operation::Read { key, pages },
            3 => Operation::Zero { key, pages, fua },
            4 => Operation::Flush,
            5..7 => {
                let sectors = 1 + self.random.index(3) as u32;
                let offset = pages.byte_offset() + self.random.index(6) as u32 * SECTOR_SIZE;
                let value = self.next_request;
                let mut bytes = pool().alloc((sectors * SECTOR_SIZE) as usize).unwrap();
                fill(&mut bytes, sectors_from(block_number(group, key), offset), value);
                Operation::WriteSectors { key, offset, bytes: bytes.freeze(), fua }
            }
            _ => {
                let mut bytes = pool().alloc(pages.bytes()).unwrap();
                let sectors = sectors_from(block_number(group, key), pages.byte_offset());
                fill(&mut bytes, sectors, self.next_request);
                let checksums = page_checksums(&bytes);
                Operation::Write { key, pages, data: PageData { bytes: bytes.freeze(), checksums }, fua }
            }
        };
        let durability = if self.random.one_in(5) { Durability::EveryWrite } else { Durability::OnFlush };
        self.request(node, group, epoch, durability, key, operation);
    }

    fn request(
        &mut self,
        node: NodeId,
        group: GroupId,
        epoch: Epoch,
        durability: Durability,
        key: BlockKey,
        operation: Operation,
    ) {
        if self.node(node).replication.is_none() {
            return;
        }
        let number = self.next_request;
        self.next_request += 1;
        let all = |pages: PageRange, value: u64| {
            let sectors = move |page| (0..SECTORS_PER_PAGE as u16).map(move |sector| (page, sector, value));
            pages.pages().flat_map(sectors).collect::<Vec<_>>()
        };
        let (sectors, reads) = match &operation {
            Operation::Read { pages, .. } => (all(*pages, 0), true),
            Operation::Write { pages, .. } => (all(*pages, number), false),
            Operation::Zero { pages, .. } => (all(*pages, 0), false),
            Operation::WriteSectors { offset, bytes, .. } => {
                let page = (*offset as usize / PAGE_SIZE) as u16;
                let first = (*offset as usize % PAGE_SIZE / SECTOR_SIZE as usize) as u16;
                let count = (bytes.len() / SECTOR_SIZE as usize) as u16;
                ((first..first + count).map(|sector| (page, sector, number)).collect(), false)
            }
            Operation::Flush | Operation::BlockStatus { .. } => (Vec::new(), true),
        };
        self.outstanding.insert(number, Outstanding { node, start: self.step, group, key, sectors, reads });
        let id = RequestId { origin: Origin::Shard(ShardIndex(0)), number };
        let request = Request { id, group, epoch, durability, operation };
        self.call(node, |replication, store, now_ns, out| {
            replication.on_request(request, store, now_ns, out)
        });
    }

    /// Lets one random thing happen.
    fn advance(&mut self) {
        self.step += 1;
        self.now_ns += self.random.below(200_000);
        let id = NodeId(self.random.index(NODES as usize) as u32 + 1);
        match self.random.index(100) {
            0..50 => self.deliver(),
            50..72 => self.device(id),
            72..76 => self.tick(id),
            76..80 => self.take_map(id),
            80..82 => {
                let group = group_id(self.random.index(usize::from(GROUPS)) as u16);
                self.control(group);
                self.on_proposals();
                if self.random.one_in(8) {
                    self.scrub(id);
                }
            }
            82..98 => {
                if self.faults && self.outstanding.len() < OUTSTANDING {
                    self.client();
                }
            }
            _ => {
                if self.faults && self.random.one_in(4) {
                    self.fault();
                }
            }
        }
    }

    /// A node is to scrub what it leads.
    fn scrub(&mut self, id: NodeId) {
        let number = self.step;
        let deep = self.random.one_in(2);
        let orders = (0..GROUPS).map(|group| ScrubOrder { group: group_id(group), deep, number }).collect();
        self.call(id, |replication, store, now_ns, out| {
            replication.set_scrubs(1 << 30, orders, store, now_ns, out);
        });
    }

    fn deliver(&mut self) {
        let ready: Vec<(NodeId, NodeId)> =
            self.links.iter().filter(|(_, frames)| !frames.is_empty()).map(|(link, _)| *link).collect();
        if ready.is_empty() {
            return;
        }
        let (from, to) = ready[self.random.index(ready.len())];
        let count = 1 + self.random.index(4);
        for _ in 0..count {
            let Some(frame) = self.links.get_mut(&(from, to)).unwrap().pop_front() else { return };
            self.call(to, |replication, store, now_ns, out| {
                replication.on_frame(from, frame, store, now_ns, out)
            });
        }
    }

    fn device(&mut self, id: NodeId) {
        if self.node(id).replication.is_none() {
            return;
        }
        let in_flight = self.node(id).store.in_flight();
        let events = match self.random.index(4) {
            0 | 1 if in_flight > 0 => {
                let count = 1 + self.random.index(in_flight);
                self.node(id).store.complete(count)
            }
            2 => self.node(id).store.complete_flush().into_iter().collect(),
            _ => self.node(id).store.reads.pop_front().into_iter().collect(),
        };
        for event in events {
            let damaged =
                matches!(event, StoreEvent::ReadDone { result: Err(ReadError::Damaged { .. }), .. });
            self.counts.damaged += u64::from(damaged);
            self.call(id, |replication, store, now_ns, out| {
                replication.on_store_event(store.id, event, store, now_ns, out);
            });
        }
    }

    fn tick(&mut self, id: NodeId) {
        self.now_ns += self.random.below(10) * MS;
        self.call(id, |replication, store, now_ns, out| replication.on_tick(now_ns, store, out));
    }

    fn take_map(&mut self, id: NodeId) {
        let Some(map) = self.node(id).maps.pop_front() else { return };
        if self.node(id).replication.is_some() {
            self.node(id).map_seen = map.version;
            self.call(id, |replication, store, now_ns, out| replication.on_map(&map, store, now_ns, out));
        }
    }

    fn is_whole(&self) -> bool {
        let whole = |group: &Group| {
            group.acting().count() == NODES as usize
                && group.members.iter().all(|member| self.is_live(member))
        };
        self.groups_active() == usize::from(GROUPS) && self.map.groups.values().all(whole)
    }

    fn is_quiet(&self) -> bool {
        self.is_whole()
            && self.outstanding.is_empty()
            && self.links.values().all(VecDeque::is_empty)
            && self.nodes.iter().all(|node| {
                let quiet = node.replication.as_ref().is_some_and(|replication| {
                    replication.core.ticking.is_empty() && !replication.has_deferred()
                });
                quiet && node.maps.is_empty() && node.store.in_flight() == 0 && node.store.reads.is_empty()
            })
    }

    /// All faults end; everything must come to rest.
    fn settle(&mut self) {
        self.faults = false;
        for node in 1..=NODES {
            self.node(NodeId(node)).store.refusing = None;
            self.restart(NodeId(node));
        }
        for node in &mut self.nodes {
            node.store.refusing = None;
        }
        for (a, b) in [(1, 2), (1, 3), (2, 3)] {
            self.mend_link(NodeId(a), NodeId(b));
        }
        for _ in 0..200_000 {
            if self.is_quiet() {
                return;
            }
            self.advance();
        }
        let groups: Vec<_> = self.map.groups.values().collect();
        let states: Vec<_> = self.nodes.iter().map(|node| &node.replication).collect();
        panic!("not quiet: outstanding {:?}\n{groups:#?}\n{states:#?}", self.outstanding);
    }

    /// At rest every read is answered.
    fn read_everything(&mut self) {
        let (answered, failed) = (self.counts.answered, self.counts.failed);
        for index in 0..GROUPS {
            let group = group_id(index);
            let truth = self.map.groups[&group].clone();
            for block in 0..BLOCKS {
                let index = BlockIndex(u32::from(index) * 100 + block);
                let key = BlockKey { lineage: Lineage(7), layer: Layer(1), index };
                let pages = PageRange::new(0, 34);
                let operation = Operation::Read { key, pages };
                self.request(truth.primary.unwrap(), group, truth.epoch, Durability::OnFlush, key, operation);
            }
        }
        self.settle();
        assert_eq!(self.counts.failed, failed, "reads are refused at rest");
        assert_eq!(self.counts.answered - answered, u64::from(GROUPS) * u64::from(BLOCKS));
    }

    fn check_replicas(&self) {
        for group in self.map.groups.keys() {
            let first = self.nodes[0].store.blocks(*group);
            for node in &self.nodes[1..] {
                let other = node.store.blocks(*group);
                assert!(
                    first.keys().eq(other.keys()),
                    "group {group}: {:?} {:?}",
                    first.keys(),
                    other.keys()
                );
                for (key, block) in &first {
                    let theirs = &other[key];
                    assert_eq!(block.versions, theirs.versions, "group {group} block {key} on {}", node.id);
                    let pages = |pages: &BTreeMap<u16, crate::disk::buffers::Buffer>| {
                        // A pushed unit brings the pages that hold nothing, too.
                        let stored = pages.iter().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0));
                        stored.map(|(page, bytes)| (*page, bytes.to_vec())).collect::<Vec<_>>()
                    };
                    assert!(
                        pages(&block.pages) == pages(&theirs.pages),
                        "group {group} block {key} on {}",
                        node.id
                    );
                }
            }
        }
    }
}

fn block_number(group: GroupId, key: BlockKey) -> u64 {
    u64::from(group.0) << 32 | u64::from(key.index.0)
}

/// The sectors of a block from `offset` on.
fn sectors_from(block: u64, offset: u32) -> impl Iterator<Item = Sector> {
    let sectors_per_page = SECTORS_PER_PAGE as u32;
    (offset / SECTOR_SIZE..)
        .map(move |number| (block, (number / sectors_per_page) as u16, (number % sectors_per_page) as u16))
}

fn group_of(record: &Record) -> GroupId {
    match record {
        Record::Entry(entry) => entry.group,
        Record::Push { group, .. } | Record::Reset { group, .. } => *group,
    }
}

struct OnPanic(u64);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "replay: XSAN_SEED={} cargo test -p xsan-dataplane --lib replication::tests::cluster",
                self.0
            );
        }
    }
}

fn run(seed: u64) -> Counts {
    let replay = OnPanic(seed);
    let mut cluster = Cluster::new(seed);
    for _ in 0..6000 {
        cluster.advance();
    }
    cluster.settle();
    cluster.read_everything();
    cluster.check_replicas();
    if let Err(error) = cluster.history.check() {
        panic!("{error}");
    }
    drop(replay);
    cluster.counts
}

#[test]
fn random_faults_lose_nothing_and_stop_nothing() {
    let one = std::env::var("XSAN_SEED").ok().and_then(|seed| seed.parse().ok());
    let count = std::env::var("XSAN_SEEDS").ok().and_then(|count| count.parse().ok());
    let seeds = one.map_or(1..=count.unwrap_or(SEEDS), |seed| seed..=seed);
    let mut all = Counts::default();
    for seed in seeds.clone() {
        let counts = run(seed);
        all.answered += counts.answered;
        all.failed += counts.failed;
        all.damaged += counts.damaged;
        all.scrubbed += counts.scrubbed;
    }
    let Counts { answered, failed, damaged, scrubbed } = all;
    println!(
        "{answered} requests answered, {failed} refused, {damaged} reads met damage, {scrubbed} groups scrubbed"
    );
    // A few seeds may lack any of this.
    if seeds.count() as u64 >= SEEDS {
        assert!(answered > failed, "most of the time the groups serve");
        assert!(damaged > 0, "no read met damage");
        assert!(scrubbed > 0, "no scrub ended");
    }
}
