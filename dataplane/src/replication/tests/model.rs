//! A store in memory, as simple as it can be: a log of records, and what applying them gives.
//!
//! It asserts what replication promises to a store: order without gaps, nothing applied before it is durable.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use xsan_protocol::checksum::crc32c;
use xsan_protocol::ids::{BlockKey, GroupId, Seq, StoreId, Version};
use xsan_protocol::units::{PAGE_SIZE, PageRange, UNITS_PER_BLOCK};
use xsan_protocol::wire::replication::block_digest;

use crate::disk::buffers::{Buffer, BufferMut};
use crate::replication::replica::version_after;
use crate::replication::{RecoveredGroup, Stores};
use crate::store::{
    Entry, GroupTail, PageData, ReadError, ReadPages, Record, StoreError, StoreEvent, StoreView, Withdrawn,
};

#[derive(Clone, Debug)]
pub struct Block {
    pub versions: [Version; UNITS_PER_BLOCK],
    pub pages: BTreeMap<u16, Buffer>,
}

impl Default for Block {
    fn default() -> Self {
        Self { versions: [Version::ZERO; UNITS_PER_BLOCK], pages: BTreeMap::new() }
    }
}

#[derive(Clone, Debug, Default)]
struct ModelGroup {
    tail: GroupTail,
    applied: Version,
    durable: Seq,
    pending: VecDeque<Entry>,
    blocks: BTreeMap<BlockKey, Block>,
}

impl ModelGroup {
    fn take(&mut self, record: &Record) {
        match record {
            Record::Entry(entry) => {
                assert_eq!(entry.version.seq, self.tail.last.seq.next(), "entries have no gap");
                assert!(entry.version.epoch >= self.tail.last.epoch);
                self.tail.last = entry.version;
                self.pending.push_back(entry.clone());
            }
            Record::Push { key, unit, version, as_of, data, .. } => {
                self.apply(*as_of);
                let block = self.blocks.entry(*key).or_default();
                block.versions[usize::from(*unit)] = *version;
                let pages = PageRange::of_unit(*unit);
                match data {
                    None => block.pages.retain(|page, _| !pages.contains(*page)),
                    Some(data) => set_pages(block, pages, data),
                }
            }
            Record::Reset { last, .. } => {
                self.pending.clear();
                self.tail = GroupTail { last: *last, acked: last.seq };
                self.applied = *last;
                self.durable = last.seq;
            }
        }
    }

    fn apply(&mut self, through: Seq) {
        assert!(through <= self.tail.last.seq);
        while let Some(entry) = self.pending.pop_front_if(|entry| entry.version.seq <= through) {
            self.applied = entry.version;
            let block = self.blocks.entry(entry.key).or_default();
            for unit in entry.pages.units() {
                let version = &mut block.versions[usize::from(unit)];
                *version = version_after(&entry, unit, *version);
            }
            match &entry.data {
                None => block.pages.retain(|page, _| !entry.pages.contains(*page)),
                Some(data) => set_pages(block, entry.pages, data),
            }
        }
        self.tail.acked = self.tail.acked.max(through);
    }
}

fn set_pages(block: &mut Block, pages: PageRange, data: &PageData) {
    for (index, page) in pages.pages().enumerate() {
        let bytes = data.bytes.slice(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
        assert_eq!(crc32c(&bytes), data.checksums[index]);
        block.pages.insert(page, bytes);
    }
}

#[derive(Debug)]
pub struct ModelStore {
    pub id: StoreId,
    /// Each with the entry up to which its group was applied when it came: a reset drops only what lies behind, also when
    /// it is played again.
    log: Vec<(Record, Seq)>,
    durable: usize,
    flushed: usize,
    groups: BTreeMap<GroupId, ModelGroup>,
    pub flushes: VecDeque<(u64, usize)>,
    pub reads: VecDeque<StoreEvent>,
    damaged: BTreeSet<(GroupId, BlockKey, u16)>,
    /// Refuses every record.
    pub refusing: Option<StoreError>,
    /// Says that there is no room for new places.
    pub full: bool,
}

impl ModelStore {
    pub fn new(id: StoreId) -> Self {
        Self {
            id,
            log: Vec::new(),
            durable: 0,
            flushed: 0,
            groups: BTreeMap::new(),
            flushes: VecDeque::new(),
            reads: VecDeque::new(),
            damaged: BTreeSet::new(),
            refusing: None,
            full: false,
        }
    }

    pub fn append(&mut self, record: Record) -> Result<(), StoreError> {
        if let Some(error) = self.refusing {
            return Err(error);
        }
        let group = self.groups.entry(group_of(&record)).or_default();
        let applied = group.tail.acked;
        group.take(&record);
        if let Record::Push { group, key, unit, lost, .. } = &record {
            let first = PageRange::of_unit(*unit).first;
            let lost = (0..16).filter(|page| lost >> page & 1 == 1);
            self.damaged.extend(lost.map(|page| (*group, *key, first + page)));
        }
        self.log.push((record, applied));
        Ok(())
    }

    /// Takes back the newest entries of a group, up to a push or to what the device has.
    pub fn withdraw(&mut self, id: GroupId) -> Withdrawn {
        let group = self.groups.entry(id).or_default();
        for place in (self.durable..self.log.len()).rev() {
            match &self.log[place].0 {
                Record::Entry(entry) if entry.group == id => {
                    self.log.remove(place);
                    group.pending.pop_back();
                }
                record if group_of(record) == id => break,
                _ => {}
            }
        }
        group.tail.last = group.pending.back().map_or(group.applied, |entry| entry.version);
        Withdrawn { last: group.tail.last, pushes: Vec::new() }
    }

    pub fn apply(&mut self, group: GroupId, through: Seq) {
        let group = self.groups.entry(group).or_default();
        assert!(through <= group.durable, "applied {through} before it is durable ({})", group.durable);
        group.apply(through);
    }

    pub fn in_flight(&self) -> usize {
        self.log.len() - self.durable
    }

    /// The device completes `count` records.
    pub fn complete(&mut self, count: usize) -> Vec<StoreEvent> {
        let mut events = Vec::new();
        let mut durable = BTreeMap::new();
        for (record, _) in &self.log[self.durable..self.durable + count] {
            let group = group_of(record);
            match record {
                Record::Entry(entry) => {
                    durable.insert(group, entry.version.seq);
                }
                Record::Push { token, .. } => events.push(StoreEvent::Pushed { token: *token }),
                Record::Reset { .. } => {
                    assert!(!durable.contains_key(&group), "a reset waits for what came before");
                    events.push(StoreEvent::Reset { group });
                }
            }
        }
        self.durable += count;
        for (group, seq) in durable {
            self.groups.get_mut(&group).unwrap().durable = seq;
            events.insert(0, StoreEvent::Durable { group, seq });
        }
        events
    }

    pub fn flush(&mut self, token: u64) {
        self.flushes.push_back((token, self.durable));
    }

    pub fn complete_flush(&mut self) -> Option<StoreEvent> {
        let (token, durable) = self.flushes.pop_front()?;
        self.flushed = self.flushed.max(durable);
        Some(StoreEvent::Flushed { token })
    }

    pub fn read(
        &mut self,
        token: u64,
        group: GroupId,
        key: BlockKey,
        pages: PageRange,
        mut buffer: BufferMut,
    ) {
        assert_eq!(buffer.len(), pages.bytes());
        buffer.fill(0);
        let block = self.block(group, key);
        for page in pages.pages() {
            if let Some(bytes) = block.and_then(|block| block.pages.get(&page)) {
                let start = usize::from(page - pages.first) * PAGE_SIZE;
                buffer[start..start + PAGE_SIZE].copy_from_slice(bytes);
            }
        }
        let checksums: Arc<[u32]> = buffer.chunks_exact(PAGE_SIZE).map(crc32c).collect();
        let is_damaged = |index: &u16| self.damaged.contains(&(group, key, pages.first + index));
        let damaged: Vec<u16> = (0..pages.count).filter(is_damaged).collect();
        for index in &damaged {
            buffer[usize::from(*index) * PAGE_SIZE + 100] ^= 0x40;
        }
        let result = if damaged.is_empty() {
            Ok(ReadPages { buffer, checksums })
        } else {
            Err(ReadError::Damaged { buffer, damaged, expected: checksums })
        };
        self.reads.push_back(StoreEvent::ReadDone { token, result });
    }

    /// Flips a bit of a stored page.
    pub fn damage(&mut self, group: GroupId, key: BlockKey, page: u16) -> bool {
        let stored = self.block(group, key).is_some_and(|block| block.pages.contains_key(&page));
        stored && self.damaged.insert((group, key, page))
    }

    pub fn heal(&mut self) {
        self.damaged.clear();
    }

    pub fn repair(&mut self, group: GroupId, key: BlockKey, pages: PageRange, data: &PageData) {
        for (index, page) in pages.pages().enumerate() {
            let stored = self.block(group, key).and_then(|block| block.pages.get(&page));
            if stored.is_some_and(|bytes| crc32c(bytes) == data.checksums[index]) {
                self.damaged.remove(&(group, key, page));
            }
        }
    }

    /// The process is killed, or the node loses its power: records not yet on the device (or not on stable media) survive up
    /// to a point that `keep` chooses.
    pub fn restart(&mut self, power: bool, keep: impl FnOnce(usize) -> usize) -> Vec<RecoveredGroup> {
        let safe = if power { self.flushed } else { self.durable };
        let kept = safe + keep(self.log.len() - safe);
        self.log.truncate(kept);
        self.durable = kept;
        self.flushed = self.flushed.min(kept);
        self.groups.clear();
        self.flushes.clear();
        self.reads.clear();
        self.refusing = None;
        for (record, applied) in &self.log {
            let group = self.groups.entry(group_of(record)).or_default();
            if matches!(record, Record::Reset { .. }) {
                group.apply(*applied);
            }
            group.take(record);
            if let Record::Entry(entry) = record {
                group.apply(entry.acked.min(entry.version.seq));
            }
        }
        let recovered = |(id, group): (&GroupId, &mut ModelGroup)| {
            group.durable = group.tail.last.seq;
            RecoveredGroup { group: *id, tail: group.tail, pending: group.pending.iter().cloned().collect() }
        };
        self.groups.iter_mut().map(recovered).collect()
    }

    fn block(&self, group: GroupId, key: BlockKey) -> Option<&Block> {
        self.groups.get(&group)?.blocks.get(&key)
    }

    /// Blocks of a group that hold anything.
    pub fn blocks(&self, group: GroupId) -> BTreeMap<BlockKey, Block> {
        let blocks = self.groups.get(&group).map(|group| group.blocks.clone()).unwrap_or_default();
        blocks.into_iter().filter(|(_, block)| holds(block)).collect()
    }
}

fn holds(block: &Block) -> bool {
    block.versions.iter().any(|version| *version != Version::ZERO)
}

fn group_of(record: &Record) -> GroupId {
    match record {
        Record::Entry(entry) => entry.group,
        Record::Push { group, .. } | Record::Reset { group, .. } => *group,
    }
}

impl StoreView for ModelStore {
    fn unit_version(&self, group: GroupId, key: BlockKey, unit: u8) -> Version {
        self.unit_versions(group, key)[usize::from(unit)]
    }

    fn unit_versions(&self, group: GroupId, key: BlockKey) -> [Version; UNITS_PER_BLOCK] {
        self.block(group, key).map_or([Version::ZERO; UNITS_PER_BLOCK], |block| block.versions)
    }

    fn blocks_after(&self, group: GroupId, after: Option<BlockKey>, max: usize) -> Vec<(BlockKey, u64)> {
        let Some(group) = self.groups.get(&group) else { return Vec::new() };
        let blocks = group.blocks.iter().filter(|(key, block)| Some(**key) > after && holds(block));
        blocks.map(|(key, block)| (*key, block_digest(&block.versions))).take(max).collect()
    }

    fn allocated(&self, group: GroupId, key: BlockKey, pages: PageRange) -> Vec<bool> {
        let block = self.block(group, key);
        pages.pages().map(|page| block.is_some_and(|block| block.pages.contains_key(&page))).collect()
    }

    fn admit(&self, pages: usize) -> Result<(), StoreError> {
        if self.full && pages > 0 { Err(StoreError::Full) } else { Ok(()) }
    }
}

impl Stores for ModelStore {
    fn view(&self, store: StoreId) -> &dyn StoreView {
        assert_eq!(store, self.id);
        self
    }
}
