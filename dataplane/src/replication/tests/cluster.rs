//! Small clusters under random faults: three nodes, broken connections, killed processes, lost power, damaged pages,
//! full journals, and a controller that moves groups by the rules of the control plane.
//!
//! Checked: clients' histories are linearizable, sector by sector, to the last write; nothing stays unanswered; when all is quiet,
//! every group has all its replicas and they are identical.
//!
//! `XSAN_SEED=n cargo test -p xsan-dataplane --lib replication::tests::cluster` replays one seed.

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

use super::history::{History, Span};
use super::model::ModelStore;
use super::pool;
use crate::net::frame::Frame;
use crate::replication::{
    Action, Change, Operation, Origin, RecoveredGroup, Replication, Reply, Request, RequestId,
};
use crate::store::{PageData, Record, StoreError};

const NODES: u32 = 3;
const GROUPS: u16 = 2;
const SECTORS_PER_PAGE: usize = PAGE_SIZE / SECTOR_SIZE as usize;
/// Most requests that clients have outstanding.
const OUTSTANDING: usize = 24;
const MS: u64 = 1_000_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

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

struct Proposal {
    group: GroupId,
    epoch: Epoch,
    node: NodeId,
    change: Change,
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
    answered: u64,
    failed: u64,
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
            };
            map.groups.insert(group.id, group);
        }
        let mut cluster = Self {
            random: Random(seed),
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
            answered: 0,
            failed: 0,
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
        self.carry_out(id, out);
    }

    fn carry_out(&mut self, id: NodeId, out: Vec<Action>) {
        let mut refused: Vec<(Record, StoreError)> = Vec::new();
        for action in out {
            match action {
                Action::Send { to, frame } => {
                    let broken = self.down.contains(&pair(id, to)) || self.node(to).replication.is_none();
                    if !broken {
                        self.links.get_mut(&(id, to)).unwrap().push_back(frame);
                    }
                }
                Action::Append { record, .. } => {
                    let same = refused.iter().any(|(earlier, _)| group_of(earlier) == group_of(&record));
                    match self.node(id).store.append(record.clone()) {
                        Ok(()) => assert!(!same),
                        Err(error) => refused.push((record, error)),
                    }
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
        let block = u64::from(outstanding.group.0) << 32 | u64::from(outstanding.key.index.0);
        if result.is_ok() {
            self.answered += 1;
        } else {
            self.failed += 1;
        }
        match result {
            Ok(Reply::Data(data)) => {
                let first = outstanding.sectors[0].0;
                for (page, sector, _) in outstanding.sectors {
                    let value = data.as_ref().map_or(0, |data| {
                        let offset = usize::from(page - first) * PAGE_SIZE
                            + usize::from(sector) * SECTOR_SIZE as usize;
                        u64::from_le_bytes(data.bytes[offset..offset + 8].try_into().unwrap())
                    });
                    self.history.read((block, page, sector), value, span);
                }
            }
            Ok(Reply::Done) => {
                for (page, sector, value) in outstanding.sectors {
                    self.history.wrote((block, page, sector), value, span);
                }
            }
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
        let block = u64::from(outstanding.group.0) << 32 | u64::from(outstanding.key.index.0);
        for (page, sector, value) in outstanding.sectors {
            self.history.wrote((block, page, sector), value, span);
        }
    }

    fn random_pages(&mut self) -> PageRange {
        let starts = [0, 1, 2, 13, 14, 15, 16, 30];
        let first = starts[self.random.below(starts.len())];
        match self.random.below(8) {
            0 => PageRange::new(0, 16),
            1 => PageRange::new(first, 4),
            _ => PageRange::new(first, 1 + self.random.below(2) as u16),
        }
    }

    fn client(&mut self) {
        let group = group_id(self.random.below(usize::from(GROUPS)) as u16);
        let Some(truth) = self.map.groups.get(&group) else { return };
        let (Some(primary), epoch) = (truth.primary, truth.epoch) else { return };
        let node = if self.random.one_in(20) {
            NodeId(self.random.below(NODES as usize) as u32 + 1)
        } else {
            primary
        };
        let key = BlockKey {
            lineage: Lineage(7),
            layer: Layer(1),
            index: BlockIndex(u32::from(group.index()) * 100 + self.random.below(3) as u32),
        };
        let pages = self.random_pages();
        let fua = self.random.one_in(6);
        let operation = match self.random.below(10) {
            0..3 => Operation::Read { key, pages },
            3 => Operation::Zero { key, pages, fua },
            4 => Operation::Flush,
            5..7 => {
                let sectors = 1 + self.random.below(3) as u32;
                let offset = pages.byte_offset() + self.random.below(6) as u32 * SECTOR_SIZE;
                let value = self.next_request;
                let mut bytes = pool().alloc((sectors * SECTOR_SIZE) as usize).unwrap();
                fill(&mut bytes, value);
                Operation::WriteSectors { key, offset, bytes: bytes.freeze(), fua }
            }
            _ => {
                let mut bytes = pool().alloc(pages.bytes()).unwrap();
                fill(&mut bytes, self.next_request);
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

    fn break_link(&mut self, a: NodeId, b: NodeId) {
        if !self.down.insert(pair(a, b)) {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            self.links.get_mut(&(from, to)).unwrap().clear();
            self.call(from, |replication, store, now_ns, out| {
                replication.on_peer_lost(to, store, now_ns, out)
            });
        }
    }

    fn mend_link(&mut self, a: NodeId, b: NodeId) {
        let alive = self.node(a).replication.is_some() && self.node(b).replication.is_some();
        if !alive || !self.down.remove(&pair(a, b)) {
            return;
        }
        for (from, to) in [(a, b), (b, a)] {
            self.call(from, |replication, store, now_ns, out| replication.on_peer_up(to, store, now_ns, out));
        }
    }

    fn kill(&mut self, id: NodeId, power: bool) {
        if self.node(id).replication.take().is_none() {
            return;
        }
        let requests: Vec<u64> = self
            .outstanding
            .iter()
            .filter(|(_, request)| request.node == id)
            .map(|(number, _)| *number)
            .collect();
        for number in requests {
            let outstanding = self.outstanding.remove(&number).unwrap();
            self.lost(outstanding);
        }
        for other in (1..=NODES).map(NodeId).filter(|other| *other != id) {
            self.break_link(id, other);
        }
        if power {
            self.node(id).boot.0 += 1000;
        }
        let keep = self.random.next();
        for node in &mut self.nodes {
            node.store.heal();
        }
        let recovered = self.node(id).store.restart(power, |most| (keep % (most as u64 + 1)) as usize);
        // Recovery is repeated at the start: it gives the same.
        drop(recovered);
    }

    fn restart(&mut self, id: NodeId) {
        if self.node(id).replication.is_some() {
            return;
        }
        let node = self.node(id);
        node.incarnation.0 += 100;
        let recovered = node.store.restart(false, |most| most);
        self.boot(id, recovered);
        for other in (1..=NODES).map(NodeId).filter(|other| *other != id) {
            self.mend_link(id, other);
        }
    }

    /// May this node lose its power without losing what was acknowledged and not flushed?
    fn can_lose_power(&self, id: NodeId) -> bool {
        let safe = |group: &Group| {
            group.member(id).is_none_or(|member| member.learner)
                || group.acting().filter(|member| member.node != id).any(|member| self.is_live(member))
        };
        self.groups_active() == usize::from(GROUPS) && self.map.groups.values().all(safe)
    }

    fn groups_active(&self) -> usize {
        let alive = self.nodes.iter().filter_map(|node| node.replication.as_ref());
        alive.map(|replication| replication.status().groups_active).sum()
    }

    fn is_live(&self, member: &Member) -> bool {
        let node = &self.nodes[member.node.0 as usize - 1];
        node.replication.is_some() && node.incarnation == member.incarnation
    }

    fn publish_group(&mut self, mut group: Group, primary: Option<NodeId>, members: Vec<Member>) {
        let before = group.primary;
        group.epoch = group.epoch.next();
        group.primary = primary;
        group.members = members;
        self.map.version.0 += 1;
        if let Some(before) = before.filter(|before| Some(*before) != primary) {
            self.unconfirmed.insert(group.id, (before, self.map.version));
        }
        self.map.groups.insert(group.id, group);
        // Damage is a fault of its own: with fewer replicas it could be that of the only copy.
        for node in &mut self.nodes {
            node.store.heal();
        }
        self.publish();
    }

    /// The control plane's rules for one group; true if something changed.
    fn control(&mut self, id: GroupId) -> bool {
        let group = self.map.groups[&id].clone();
        let (acting, learners): (Vec<Member>, Vec<Member>) =
            group.members.iter().partition(|member| !member.learner);
        let cont: Vec<Member> = acting.iter().copied().filter(|member| self.is_live(member)).collect();
        let fresh = |member: &Member, learner: bool| {
            let node = &self.nodes[member.node.0 as usize - 1];
            Member { incarnation: node.incarnation, boot_id: node.boot, learner, ..*member }
        };
        let up = |member: &Member| self.nodes[member.node.0 as usize - 1].replication.is_some();
        let minimum = 2;
        if cont.len() == acting.len() {
            let kept: Vec<Member> = learners.iter().copied().filter(|member| self.is_live(member)).collect();
            let mut members = cont;
            members.extend(&kept);
            for node in &self.nodes {
                if node.replication.is_some() && !members.iter().any(|member| member.node == node.id) {
                    let store = node.store.id;
                    let new = Member {
                        node: node.id,
                        store,
                        incarnation: Incarnation(0),
                        boot_id: BootId(0),
                        learner: true,
                        damaged: false,
                    };
                    members.push(fresh(&new, true));
                }
            }
            if members.len() != group.members.len() || kept.len() != learners.len() {
                let primary = group.primary;
                self.publish_group(group, primary, members);
                return true;
            }
            return false;
        }
        let back: Vec<Member> =
            acting.iter().copied().filter(|member| !self.is_live(member) && up(member)).collect();
        if cont.len() >= minimum {
            let kept = group.primary.filter(|primary| cont.iter().any(|member| member.node == *primary));
            let primary = kept.or_else(|| cont.first().map(|member| member.node));
            let mut members = cont;
            members.extend(back.iter().map(|member| fresh(member, true)));
            members.extend(learners.iter().copied().filter(|member| self.is_live(member)));
            self.publish_group(group, primary, members);
            return true;
        }
        let intact = |member: &Member| self.nodes[member.node.0 as usize - 1].boot == member.boot_id;
        let safe = !cont.is_empty() || back.iter().any(intact) || back.len() == acting.len();
        if safe && cont.len() + back.len() >= minimum.min(acting.len()) {
            let mut members = cont.clone();
            members.extend(back.iter().map(|member| fresh(member, false)));
            let primary =
                group.primary.filter(|primary| members.iter().any(|member| member.node == *primary));
            let primary = primary.or_else(|| members.first().map(|member| member.node));
            members.extend(learners.iter().copied().filter(|member| self.is_live(member)));
            self.publish_group(group, primary, members);
            return true;
        }
        false
    }

    fn on_proposals(&mut self) {
        for proposal in std::mem::take(&mut self.proposals) {
            let group = self.map.groups[&proposal.group].clone();
            let Some(member) = group.member(proposal.node).copied() else { continue };
            if group.epoch != proposal.epoch || !self.is_live(&member) {
                continue;
            }
            let mut members = group.members.clone();
            let mut primary = group.primary;
            match proposal.change {
                Change::Promote if member.learner => {}
                Change::Demote if !member.learner => {
                    if let Some((node, version)) = self.unconfirmed.get(&group.id).copied()
                        && node == member.node
                        && self.node(node).map_seen < version
                    {
                        continue;
                    }
                    if primary == Some(member.node) {
                        // A live primary moves first; the next one proposes it out again if need be.
                        let Some(next) = group.acting().find(|other| other.node != member.node) else {
                            continue;
                        };
                        primary = Some(next.node);
                        self.publish_group(group, primary, members);
                        continue;
                    }
                }
                _ => continue,
            }
            for changed in members.iter_mut().filter(|changed| changed.node == member.node) {
                changed.learner = proposal.change == Change::Demote;
            }
            self.publish_group(group, primary, members);
        }
    }

    fn fault(&mut self) {
        let a = NodeId(self.random.below(NODES as usize) as u32 + 1);
        let b = NodeId((a.0 + self.random.below(NODES as usize - 1) as u32) % NODES + 1);
        match self.random.below(12) {
            0 => {
                let alive = self.nodes.iter().filter(|node| node.replication.is_some()).count();
                if alive == NODES as usize || (alive > 0 && self.random.one_in(3)) {
                    self.kill(a, false);
                }
            }
            1 if self.random.one_in(2) && self.can_lose_power(a) => self.kill(a, true),
            2..5 => {
                for node in 1..=NODES {
                    if self.random.one_in(2) {
                        self.restart(NodeId(node));
                    }
                }
            }
            5 => self.break_link(a, b),
            6..8 => self.mend_link(a, b),
            8 => {
                let full = self.random.one_in(3).then_some(StoreError::JournalFull);
                self.node(a).store.refusing = full;
            }
            9 if self.is_whole() => {
                let group = group_id(self.random.below(usize::from(GROUPS)) as u16);
                let pages = self.random_pages();
                let keys: Vec<BlockKey> = self.node(a).store.blocks(group).into_keys().collect();
                if !keys.is_empty() {
                    let key = keys[self.random.below(keys.len())];
                    self.node(a).store.damage(group, key, pages.first);
                }
            }
            10 if self.random.one_in(2) => {
                // Balance: the primary moves, the old one stays in the acting set.
                let id = group_id(self.random.below(usize::from(GROUPS)) as u16);
                let group = self.map.groups[&id].clone();
                let next = group
                    .acting()
                    .find(|member| member.node == a && self.is_live(member))
                    .map(|member| member.node);
                if let Some(next) = next.filter(|next| Some(*next) != group.primary) {
                    let members = group.members.clone();
                    self.publish_group(group, Some(next), members);
                }
            }
            _ => {}
        }
    }

    /// Lets one random thing happen.
    fn advance(&mut self) {
        self.step += 1;
        self.now_ns += self.random.below(200_000) as u64;
        let id = NodeId(self.random.below(NODES as usize) as u32 + 1);
        match self.random.below(100) {
            0..50 => self.deliver(),
            50..72 => self.device(id),
            72..76 => self.tick(id),
            76..80 => self.take_map(id),
            80..82 => {
                let group = group_id(self.random.below(usize::from(GROUPS)) as u16);
                self.control(group);
                self.on_proposals();
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

    fn deliver(&mut self) {
        let ready: Vec<(NodeId, NodeId)> =
            self.links.iter().filter(|(_, frames)| !frames.is_empty()).map(|(link, _)| *link).collect();
        if ready.is_empty() {
            return;
        }
        let (from, to) = ready[self.random.below(ready.len())];
        let count = 1 + self.random.below(4);
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
        let events = match self.random.below(4) {
            0 | 1 if in_flight > 0 => {
                let count = 1 + self.random.below(in_flight);
                self.node(id).store.complete(count)
            }
            2 => self.node(id).store.complete_flush().into_iter().collect(),
            _ => self.node(id).store.reads.pop_front().into_iter().collect(),
        };
        for event in events {
            self.call(id, |replication, store, now_ns, out| {
                replication.on_store_event(store.id, event, store, now_ns, out);
            });
        }
    }

    fn tick(&mut self, id: NodeId) {
        self.now_ns += self.random.below(10) as u64 * MS;
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

    fn read_everything(&mut self) {
        for index in 0..GROUPS {
            let group = group_id(index);
            let truth = self.map.groups[&group].clone();
            for block in 0..3 {
                let index = BlockIndex(u32::from(index) * 100 + block);
                let key = BlockKey { lineage: Lineage(7), layer: Layer(1), index };
                let pages = PageRange::new(0, 34);
                let operation = Operation::Read { key, pages };
                self.request(truth.primary.unwrap(), group, truth.epoch, Durability::OnFlush, key, operation);
            }
        }
        self.settle();
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

fn fill(bytes: &mut [u8], value: u64) {
    bytes.fill(0);
    for sector in bytes.chunks_exact_mut(SECTOR_SIZE as usize) {
        sector[..8].copy_from_slice(&value.to_le_bytes());
    }
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

fn run(seed: u64) -> (u64, u64) {
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
    (cluster.answered, cluster.failed)
}

#[test]
fn random_faults_lose_nothing_and_stop_nothing() {
    let one = std::env::var("XSAN_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = std::env::var("XSAN_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(200);
    let (mut answered, mut failed) = (0, 0);
    for seed in one.map_or(1..=seeds, |seed| seed..=seed) {
        let counts = run(seed);
        answered += counts.0;
        failed += counts.1;
    }
    println!("{answered} requests answered, {failed} refused");
    assert!(answered > failed, "{answered} answered, {failed} refused: most of the time the groups serve");
}
