//! Index: where each page of each block is now, its checksum, and the version of each unit.
//!
//! Holds what is *applied*: entries that are acknowledged, and pushes. Fed by `engine` (live) and `recover` (replay),
//! emptied into block records by `destage`. Knows no device and no queue.
//!
//! Invariants
//! - `Unit::journalled` has exactly the pages of the unit that are in `Block::pages`; such a page is read from the
//!   journal whatever `present` says.
//! - A block is in `dirty` exactly when something applied to it is neither in its record nor in the running cycle,
//!   under the position of the oldest such thing: the journal is kept from there on.
//! - A unit with nothing in it stays while it holds capacity that the record on disk may still name.
//!
//! Memory: 88 bytes for a unit, about 130 for a block, 16 (to 32, while its list grows) for a journalled page.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use xsan_protocol::disk::block_record::{BlockRecord, NO_CAPACITY, UnitRecord};
use xsan_protocol::ids::{BlockKey, Epoch, GroupId, Seq, StoreId, Version};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, UNITS_PER_BLOCK};

use super::reserve::Wanted;

/// A slot number that is none.
pub const NO_SLOT: u32 = u32::MAX;
/// Position of the oldest change of a block that has none.
const CLEAN: u64 = u64::MAX;

/// A multiplicative hasher: fast, and the same in every run.
#[derive(Default)]
pub struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(26) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

pub type MixMap<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// A page that is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalPage {
    /// Journal position of the page's data.
    pub position: u64,
    pub checksum: u32,
    pub page: u16,
}

const _: () = assert!(size_of::<JournalPage>() == 16);

#[derive(Clone, Debug)]
pub struct Unit {
    checksums: [u32; PAGES_PER_UNIT],
    seq: Seq,
    epoch: Epoch,
    pub capacity: u32,
    /// Pages whose content is in the capacity unit (unless `journalled` overrides it).
    pub present: u16,
    pub journalled: u16,
}

const _: () = assert!(size_of::<Unit>() == 88);

impl Unit {
    const EMPTY: Self = Self {
        checksums: [0; PAGES_PER_UNIT],
        seq: Seq(0),
        epoch: Epoch(0),
        capacity: NO_CAPACITY,
        present: 0,
        journalled: 0,
    };

    pub fn version(&self) -> Version {
        Version::new(self.epoch, self.seq)
    }

    fn set_version(&mut self, version: Version) {
        self.epoch = version.epoch;
        self.seq = version.seq;
    }

    fn is_empty(&self) -> bool {
        self.version() == Version::ZERO && self.is_blank()
    }

    /// Do all its pages read as zero?
    fn is_blank(&self) -> bool {
        self.present == 0 && self.journalled == 0
    }

    /// Will destage need a capacity unit for it?
    fn needs_capacity(&self) -> bool {
        self.capacity == NO_CAPACITY && self.journalled != 0
    }
}

#[derive(Debug)]
pub struct Block {
    pub group: GroupId,
    pub key: BlockKey,
    /// Bit n: unit n is in `units`.
    mask: u64,
    units: Vec<Unit>,
    /// In the order of their page.
    pages: Vec<JournalPage>,
    pub slot: u32,
    in_cycle: bool,
    dirty_since: u64,
    entry_position: u64,
    push_position: u64,
    /// Destage leaves the block alone until then: pages of it are damaged in the journal.
    pub skip_until_ns: u64,
    /// Cycles in a row that met damaged pages of it.
    pub met_damaged: u8,
}

impl Block {
    fn rank(&self, unit: u8) -> usize {
        (self.mask & ((1u64 << unit) - 1)).count_ones() as usize
    }

    pub fn unit(&self, unit: u8) -> Option<&Unit> {
        (self.mask & (1 << unit) != 0).then(|| &self.units[self.rank(unit)])
    }

    fn unit_or_new(&mut self, unit: u8) -> &mut Unit {
        let rank = self.rank(unit);
        if self.mask & (1 << unit) == 0 {
            self.mask |= 1 << unit;
            self.units.insert(rank, Unit::EMPTY);
        }
        &mut self.units[rank]
    }

    fn remove_unit(&mut self, unit: u8) {
        let rank = self.rank(unit);
        self.mask &= !(1 << unit);
        self.units.remove(rank);
    }

    /// Units that the block holds, in order.
    pub fn units(&self) -> impl Iterator<Item = (u8, &Unit)> {
        let mask = self.mask;
        (0..UNITS_PER_BLOCK as u8).filter(move |unit| mask & (1 << unit) != 0).zip(&self.units)
    }

    fn pages_of(&self, range: PageRange) -> std::ops::Range<usize> {
        let first = self.pages.partition_point(|page| page.page < range.first);
        let end = self.pages.partition_point(|page| page.page < range.end());
        first..end
    }

    /// Units that need capacity before the block can be destaged.
    pub fn units_wanted(&self) -> u32 {
        self.units.iter().filter(|unit| unit.needs_capacity()).count() as u32
    }

    pub fn journalled_pages(&self) -> usize {
        self.pages.len()
    }
}

/// Where a page's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Zero,
    Journal {
        position: u64,
        checksum: u32,
    },
    /// `page`: number of the page among all the pages of the capacity units.
    Capacity {
        page: u64,
        checksum: u32,
    },
}

/// Something to apply: an entry or a push.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Position of its descriptor in the journal.
    pub position: u64,
    pub push: bool,
    pub group: GroupId,
    pub key: BlockKey,
    pub pages: PageRange,
    pub version: Version,
    pub previous_first: Version,
    pub previous_last: Version,
    /// Journal position of the data and the checksums of its pages; `None` for zeroes.
    pub data: Option<(u64, &'a [u32])>,
}

impl Change<'_> {
    /// The version `unit` has afterwards.
    fn version_of(&self, unit: u8, before: Version) -> Version {
        if self.push {
            return self.version;
        }
        let previous = if unit == self.pages.first_unit() { self.previous_first } else { self.previous_last };
        let covers = self.pages.covers_unit(unit);
        version_after(self.version, self.data.is_some(), covers, previous, before)
    }
}

/// A block in a destage cycle: its record as it will be, and the journal pages to be copied for it.
#[derive(Debug)]
pub struct Snapshot {
    pub id: u32,
    pub record: BlockRecord,
    pub pages: Vec<JournalPage>,
    dirty_since: u64,
    /// A page could not be read: the block stays as it was.
    pub failed: bool,
    /// Damaged pages are copied, too.
    pub as_it_is: bool,
}

impl Snapshot {
    /// Position of the oldest change that the snapshot was to settle.
    pub fn dirty_since(&self) -> u64 {
        self.dirty_since
    }
}

/// What the end of a block's destage gives back.
#[derive(Debug, Default)]
pub struct Freed {
    pub units: Vec<u32>,
    pub slot: Option<u32>,
}

/// Positions of the newest entry and of the newest push.
#[derive(Clone, Copy, Debug, Default)]
struct Newest {
    entry: u64,
    push: u64,
}

#[derive(Debug, Default)]
pub struct Index {
    blocks: Vec<Option<Block>>,
    free_ids: Vec<u32>,
    by_key: MixMap<(GroupId, BlockKey), u32>,
    ordered: BTreeSet<(GroupId, BlockKey)>,
    dirty: BTreeSet<(u64, u32)>,
    /// Units that will need capacity when they are destaged.
    promised_units: u32,
    /// Blocks that have no slot yet.
    slotless: u32,
    journalled: u64,
    /// Of each group's, those that were applied: a block that comes after them has seen them, though they found nothing to change.
    newest: MixMap<GroupId, Newest>,
}

impl Index {
    pub fn promised_units(&self) -> u32 {
        self.promised_units
    }

    pub fn slotless(&self) -> u32 {
        self.slotless
    }

    pub fn journalled_pages(&self) -> u64 {
        self.journalled
    }

    pub fn block_count(&self) -> usize {
        self.ordered.len()
    }

    pub fn get(&self, group: GroupId, key: BlockKey) -> Option<&Block> {
        self.by_key.get(&(group, key)).map(|id| self.block(*id))
    }

    pub fn block(&self, id: u32) -> &Block {
        self.blocks[id as usize].as_ref().expect("ids in the index are of live blocks")
    }

    pub fn block_mut(&mut self, id: u32) -> &mut Block {
        self.blocks[id as usize].as_mut().expect("ids in the index are of live blocks")
    }

    /// Keys of the group's blocks after `after`, in order.
    pub fn keys_after(&self, group: GroupId, after: Option<BlockKey>) -> impl Iterator<Item = BlockKey> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let start = after.map_or(Included((group, BlockKey::default())), |key| Excluded((group, key)));
        self.ordered.range((start, Unbounded)).take_while(move |(of, _)| *of == group).map(|(_, key)| *key)
    }

    pub fn versions(&self, group: GroupId, key: BlockKey) -> [Version; UNITS_PER_BLOCK] {
        let mut versions = [Version::ZERO; UNITS_PER_BLOCK];
        for (unit, state) in self.get(group, key).into_iter().flat_map(Block::units) {
            versions[usize::from(unit)] = state.version();
        }
        versions
    }

    /// Calls `each` for every page of `pages`, in order.
    pub fn places(&self, group: GroupId, key: BlockKey, pages: PageRange, mut each: impl FnMut(u16, Place)) {
        let Some(block) = self.get(group, key) else {
            pages.pages().for_each(|page| each(page, Place::Zero));
            return;
        };
        let mut journalled = block.pages[block.pages_of(pages)].iter().peekable();
        let mut current: (u8, Option<&Unit>) = (u8::MAX, None);
        for page in pages.pages() {
            if let Some(found) = journalled.next_if(|found| found.page == page) {
                each(page, Place::Journal { position: found.position, checksum: found.checksum });
                continue;
            }
            let unit = (page as usize / PAGES_PER_UNIT) as u8;
            if current.0 != unit {
                current = (unit, block.unit(unit));
            }
            let within = page as usize % PAGES_PER_UNIT;
            let place = match current.1 {
                Some(unit) if unit.present & (1 << within) != 0 => Place::Capacity {
                    page: u64::from(unit.capacity) * PAGES_PER_UNIT as u64 + within as u64,
                    checksum: unit.checksums[within],
                },
                _ => Place::Zero,
            };
            each(page, place);
        }
    }

    pub fn place(&self, group: GroupId, key: BlockKey, page: u16) -> Place {
        let mut place = Place::Zero;
        self.places(group, key, PageRange::new(page, 1), |_, found| place = found);
        place
    }

    /// Capacity units and blocks that a write of these pages would newly need.
    pub fn wanted(&self, group: GroupId, key: BlockKey, pages: PageRange) -> Wanted {
        let block = self.get(group, key);
        let has = |unit: u8| {
            block
                .and_then(|block| block.unit(unit))
                .is_some_and(|unit| unit.capacity != NO_CAPACITY || unit.journalled != 0)
        };
        let units = pages.units().filter(|unit| !has(*unit)).fold(0, |units, unit| units | 1 << unit);
        Wanted { units, block: block.is_none() }
    }

    /// Applies an entry or a push: its pages are read from the journal from now on, or are zero.
    ///
    /// Replay may offer what a block's record holds already: that is skipped.
    pub fn apply(&mut self, change: &Change<'_>) {
        let newest = self.newest.entry(change.group).or_default();
        let before = *newest;
        let of_kind = if change.push { &mut newest.push } else { &mut newest.entry };
        *of_kind = change.position.max(*of_kind);
        let id = match self.by_key.get(&(change.group, change.key)) {
            Some(id) => *id,
            None if change.data.is_none() && !leaves_versions(change) => return,
            None => self.create(change.group, change.key, before),
        };
        let block = self.blocks[id as usize].as_mut().expect("ids in the index are of live blocks");
        let held = if change.push { &mut block.push_position } else { &mut block.entry_position };
        if change.position <= *held {
            return;
        }
        *held = change.position;
        for unit in change.pages.units() {
            let bits = unit_bits(change.pages, unit);
            let state = block.unit_or_new(unit);
            let needed = state.needs_capacity();
            if change.data.is_some() {
                state.journalled |= bits;
            } else {
                state.journalled &= !bits;
                state.present &= !bits;
            }
            state.set_version(change.version_of(unit, state.version()));
            self.promised_units += u32::from(state.needs_capacity());
            self.promised_units -= u32::from(needed);
            if state.is_empty() && state.capacity == NO_CAPACITY {
                block.remove_unit(unit);
            }
        }
        let range = block.pages_of(change.pages);
        self.journalled -= range.len() as u64;
        if let Some((data, checksums)) = change.data {
            assert!(checksums.len() == usize::from(change.pages.count));
            let pages = change.pages.pages().zip(checksums).enumerate().map(|(index, (page, checksum))| {
                JournalPage { position: data + (index * PAGE_SIZE) as u64, checksum: *checksum, page }
            });
            self.journalled += u64::from(change.pages.count);
            block.pages.splice(range, pages);
        } else {
            block.pages.drain(range);
        }
        self.dirty_from(id, change.position);
        self.maybe_remove(id);
    }

    /// The block needs the journal from `position` on. That may be older than what it needed it for so far: a push is applied at once,
    /// an entry before it in the journal when it is acknowledged.
    fn dirty_from(&mut self, id: u32, position: u64) {
        let block = self.blocks[id as usize].as_mut().expect("ids in the index are of live blocks");
        let since = block.dirty_since.min(position);
        let before = std::mem::replace(&mut block.dirty_since, since);
        if since < before {
            self.dirty.remove(&(before, id));
            self.dirty.insert((since, id));
        }
    }

    fn create(&mut self, group: GroupId, key: BlockKey, seen: Newest) -> u32 {
        let block = Block {
            group,
            key,
            mask: 0,
            units: Vec::new(),
            pages: Vec::new(),
            slot: NO_SLOT,
            in_cycle: false,
            dirty_since: CLEAN,
            entry_position: seen.entry,
            push_position: seen.push,
            skip_until_ns: 0,
            met_damaged: 0,
        };
        let id = self.free_ids.pop().unwrap_or_else(|| {
            self.blocks.push(None);
            (self.blocks.len() - 1) as u32
        });
        self.blocks[id as usize] = Some(block);
        self.slotless += 1;
        assert!(self.by_key.insert((group, key), id).is_none());
        assert!(self.ordered.insert((group, key)));
        id
    }

    /// Forgets a block that holds nothing, here or on disk.
    fn maybe_remove(&mut self, id: u32) {
        let block = self.block(id);
        if block.in_cycle || block.slot != NO_SLOT || !block.units.is_empty() {
            return;
        }
        assert!(block.pages.is_empty());
        let (name, dirty_since) = ((block.group, block.key), block.dirty_since);
        self.dirty.remove(&(dirty_since, id));
        self.by_key.remove(&name);
        self.ordered.remove(&name);
        self.slotless -= 1;
        self.blocks[id as usize] = None;
        self.free_ids.push(id);
    }

    /// A block as its record has it, at open.
    pub fn insert_recovered(&mut self, record: &BlockRecord) {
        let seen = Newest { entry: record.entry_position, push: record.push_position };
        let id = self.create(record.group, record.key, seen);
        self.slotless -= 1;
        let block = self.block_mut(id);
        block.slot = record.slot;
        for (unit, stored) in record.units.iter().enumerate() {
            if *stored == UnitRecord::EMPTY {
                continue;
            }
            let state = block.unit_or_new(unit as u8);
            state.set_version(stored.version);
            state.capacity = stored.capacity;
            state.present = stored.present;
            state.checksums = stored.checksums;
        }
        block.units.shrink_to_fit();
    }

    /// Position of the oldest thing that is in no record yet; `None` when all of it is.
    pub fn oldest_dirty(&self) -> Option<u64> {
        self.dirty.first().map(|(position, _)| *position)
    }

    /// Lets destage try the block again: a damaged page of it was mended.
    pub fn unskip(&mut self, group: GroupId, key: BlockKey) {
        if let Some(id) = self.by_key.get(&(group, key)) {
            let id = *id;
            self.block_mut(id).skip_until_ns = 0;
        }
    }

    /// Dirty blocks, oldest first.
    pub fn dirty_blocks(&self) -> impl Iterator<Item = u32> {
        self.dirty.iter().map(|(_, id)| *id)
    }

    /// Takes the block into a destage cycle: everything applied to it so far goes to its place.
    ///
    /// `allocate` gives capacity units; the caller has made sure that there are enough.
    pub fn begin_destage(
        &mut self,
        id: u32,
        slot: u32,
        store: StoreId,
        mut allocate: impl FnMut() -> u32,
    ) -> Snapshot {
        let block = self.blocks[id as usize].as_mut().expect("ids in the index are of live blocks");
        assert!(!block.in_cycle);
        assert!(block.slot == NO_SLOT || block.slot == slot);
        assert!(self.dirty.remove(&(block.dirty_since, id)));
        let dirty_since = std::mem::replace(&mut block.dirty_since, CLEAN);
        block.in_cycle = true;
        if block.slot == NO_SLOT {
            block.slot = slot;
            self.slotless -= 1;
        }
        let mut units = Box::new([UnitRecord::EMPTY; UNITS_PER_BLOCK]);
        let mut mask = block.mask;
        for unit in &mut block.units {
            let index = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            if unit.is_empty() {
                continue;
            }
            if unit.needs_capacity() {
                unit.capacity = allocate();
                self.promised_units -= 1;
            }
            units[index] = UnitRecord {
                version: unit.version(),
                // What was trimmed page by page keeps its version, and no place.
                capacity: if unit.is_blank() { NO_CAPACITY } else { unit.capacity },
                present: unit.present | unit.journalled,
                checksums: unit.checksums,
            };
        }
        for page in &block.pages {
            let (unit, within) = (page.page as usize / PAGES_PER_UNIT, page.page as usize % PAGES_PER_UNIT);
            units[unit].checksums[within] = page.checksum;
        }
        let record = BlockRecord {
            store,
            slot,
            generation: 0,
            group: block.group,
            key: block.key,
            timestamp_ns: 0,
            cycle: 0,
            entry_position: block.entry_position,
            push_position: block.push_position,
            acked: Version::ZERO,
            units,
        };
        Snapshot { id, record, pages: block.pages.clone(), dirty_since, failed: false, as_it_is: false }
    }

    /// The block's record is on stable media (or, for a failed snapshot, was not written): its pages leave the
    /// journal unless something newer was applied meanwhile.
    pub fn end_destage(&mut self, snapshot: &Snapshot) -> Freed {
        let mut freed = Freed::default();
        let block = self.blocks[snapshot.id as usize].as_mut().expect("a block stays while it is in a cycle");
        assert!(block.in_cycle);
        block.in_cycle = false;
        if snapshot.failed {
            block.met_damaged = block.met_damaged.saturating_add(1);
            self.dirty_from(snapshot.id, snapshot.dirty_since);
            return freed;
        }
        (block.skip_until_ns, block.met_damaged) = (0, 0);
        let moved = block.retire(&snapshot.pages);
        self.journalled -= moved;
        for unit in 0..UNITS_PER_BLOCK as u8 {
            // The record on stable media does not name this unit's capacity (any more).
            let unnamed = snapshot.record.units[usize::from(unit)].capacity == NO_CAPACITY;
            if block.unit(unit).is_none_or(|state| !unnamed || !state.is_blank()) {
                continue;
            }
            let state = block.unit_or_new(unit);
            let capacity = std::mem::replace(&mut state.capacity, NO_CAPACITY);
            if state.is_empty() {
                block.remove_unit(unit);
            }
            freed.units.extend((capacity != NO_CAPACITY).then_some(capacity));
        }
        if snapshot.record.is_free() && block.units.is_empty() {
            freed.slot = Some(std::mem::replace(&mut block.slot, NO_SLOT));
            self.slotless += 1;
        }
        self.maybe_remove(snapshot.id);
        freed
    }
}

impl Block {
    /// Takes pages that are in their place now out of the journal list; returns how many.
    fn retire(&mut self, copied: &[JournalPage]) -> u64 {
        let mut copied = copied.iter().peekable();
        let before = self.pages.len();
        let mut pages = std::mem::take(&mut self.pages);
        pages.retain(|page| {
            while copied.next_if(|done| done.page < page.page).is_some() {}
            if copied.peek() != Some(&page) {
                return true;
            }
            let (unit, within) = (page.page as usize / PAGES_PER_UNIT, page.page as usize % PAGES_PER_UNIT);
            let rank = self.rank(unit as u8);
            let unit = &mut self.units[rank];
            unit.journalled &= !(1 << within);
            unit.present |= 1 << within;
            unit.checksums[within] = page.checksum;
            false
        });
        if pages.is_empty() {
            pages = Vec::new();
        }
        let moved = before - pages.len();
        self.pages = pages;
        moved as u64
    }
}

/// Bits of the pages of `unit` that are in `pages`.
fn unit_bits(pages: PageRange, unit: u8) -> u16 {
    let start = u16::from(unit) * PAGES_PER_UNIT as u16;
    let first = pages.first.max(start) - start;
    let end = pages.end().min(start + PAGES_PER_UNIT as u16) - start;
    (((1u32 << end) - 1) & !((1u32 << first) - 1)) as u16
}

/// The version a unit has after a write of `version`, when it was `before`. `covers`: all of it; `has_data`: more than zeroes;
/// `previous`: what the primary's had been. A version is kept only if the content before was right, too; a unit that never held
/// anything still does not after zeroes.
pub fn version_after(
    version: Version,
    has_data: bool,
    covers: bool,
    previous: Version,
    before: Version,
) -> Version {
    let continues = before == previous && before != Version::UNKNOWN;
    if covers {
        if has_data { version } else { Version::ZERO }
    } else if continues || Mutation::PreviousVersionIgnored.is_on() {
        if has_data || before != Version::ZERO { version } else { Version::ZERO }
    } else {
        Version::UNKNOWN
    }
}

/// Does a change without data leave anything behind in a block that was empty?
fn leaves_versions(change: &Change<'_>) -> bool {
    change.pages.units().any(|unit| change.version_of(unit, Version::ZERO) != Version::ZERO)
}
