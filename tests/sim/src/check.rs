//! What must hold, kept apart from the code that it checks.
//!
//! - Every sector is a linearizable register: `History`, which is itself tested on histories known to be bad.
//! - After all hosts lost power at once, a sector holds what a flush (or FUA) that was answered covered, or something newer.
//! - Replicas at rest are the same: blocks, versions, every byte.
//! - At rest no buffer is held, and every store has given away what its blocks hold, to the unit.

use std::collections::BTreeMap;

use xsan_dataplane::io::{Device, DiskAction};
use xsan_dataplane::store::{Options, Store, StoreEvent, StoreView};
use xsan_dataplane::testing::{History, Span, value_of};
use xsan_protocol::ids::{BlockKey, GroupId, NodeId, Version};
use xsan_protocol::map::ClusterMap;
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, SECTOR_SIZE, UNITS_PER_BLOCK};

use crate::host::Host;

const SECTORS_PER_PAGE: u16 = (PAGE_SIZE / SECTOR_SIZE as usize) as u16;

/// Sectors of one block, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct SectorRange {
    pub block: u32,
    pub first: u16,
    pub count: u16,
}

impl SectorRange {
    fn sectors(self) -> impl Iterator<Item = Sector> {
        (self.first..self.first + self.count).map(move |sector| (self.block, sector))
    }
}

type Sector = (u32, u16);

/// Fills sectors with what a write of `value` there leaves.
pub fn fill(bytes: &mut [u8], range: SectorRange, value: u64) {
    xsan_dataplane::testing::fill(bytes, range.sectors().map(in_history), value);
}

fn in_history(sector: Sector) -> xsan_dataplane::testing::Sector {
    (u64::from(sector.0), sector.1 / SECTORS_PER_PAGE, sector.1 % SECTORS_PER_PAGE)
}

/// What an operation reads or writes. Every write has a value of its own; 0 is zeroes.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    Read(SectorRange),
    Write {
        sectors: SectorRange,
        value: u64,
        /// On stable media once it is answered.
        durable: bool,
    },
    Flush,
}

/// One write of a sector, as far as a loss of power is concerned.
#[derive(Clone, Copy, Debug)]
struct Written {
    value: u64,
    span: Span,
    answered: bool,
    durable: bool,
    repeated: bool,
}

impl Written {
    /// What a sector began with.
    fn before_all(value: u64, moment: u64) -> Self {
        let span = Span { start: moment, end: moment };
        Self { value, span, answered: true, durable: true, repeated: false }
    }
}

/// What clients did and saw. Its clock counts beginnings and ends of operations.
#[derive(Default)]
pub struct Ledger {
    clock: u64,
    under_way: BTreeMap<u64, (u64, Access)>,
    history: History,
    written: BTreeMap<Sector, Vec<Written>>,
    /// Flushes that were answered well: when each began.
    flushed: Vec<u64>,
    /// After a loss of power: what each sector may hold, until it is read.
    possible: BTreeMap<Sector, Vec<u64>>,
    pub answered: u64,
    /// Of them, those that promise stable media.
    pub stable: u64,
    pub failed: u64,
    pub longest_ns: u64,
    pub violation: Option<String>,
}

impl Ledger {
    pub fn begin(&mut self, number: u64, access: Access) {
        self.clock += 1;
        self.under_way.insert(number, (self.clock, access));
    }

    /// The operation ended well; a read with this data, `None` being zeroes.
    pub fn answered(&mut self, number: u64, data: Option<&[u8]>, repeated: bool) {
        let Some((start, access)) = self.under_way.remove(&number) else {
            return self.violation = Some(format!("operation {number} was answered twice"));
        };
        self.clock += 1;
        self.answered += 1;
        let span = Span { start, end: self.clock };
        match access {
            Access::Read(range) => {
                for (index, sector) in range.sectors().enumerate() {
                    let offset = index * SECTOR_SIZE as usize;
                    let bytes = data.map(|data| &data[offset..offset + SECTOR_SIZE as usize]);
                    match bytes.map_or(Ok(0), |bytes| value_of(bytes, in_history(sector))) {
                        Ok(value) => self.saw(sector, value, span),
                        Err(violation) => self.violation = Some(violation),
                    }
                }
            }
            Access::Write { sectors, value, durable } => {
                self.stable += u64::from(durable);
                self.wrote(sectors, Written { value, span, answered: true, durable, repeated });
            }
            Access::Flush => {
                self.stable += 1;
                self.flushed.push(start);
            }
        }
    }

    fn saw(&mut self, sector: Sector, value: u64, span: Span) {
        if let Some(possible) = self.possible.remove(&sector) {
            if !possible.contains(&value) {
                self.violation = Some(format!(
                    "block {} sector {} holds {value} after power was lost; what was flushed, or is newer, is {possible:?}",
                    sector.0, sector.1
                ));
            }
            // From here on it is what the sector began with.
            let begin = Written::before_all(value, 1);
            self.history.wrote(in_history(sector), value, begin.span);
            self.written.entry(sector).or_default().push(begin);
        }
        self.history.read(in_history(sector), value, span);
    }

    fn wrote(&mut self, range: SectorRange, written: Written) {
        for sector in range.sectors() {
            // Written before anybody read what the loss of power had left.
            if let Some(possible) = self.possible.get_mut(&sector) {
                possible.push(written.value);
            }
            if written.repeated {
                self.history.wrote_repeatedly(in_history(sector), written.value, written.span);
            } else {
                self.history.wrote(in_history(sector), written.value, written.span);
            }
            self.written.entry(sector).or_default().push(written);
        }
    }

    /// Nobody knows what became of the operation: a write of it may take effect at any time, or never.
    pub fn lost(&mut self, number: u64, repeated: bool) {
        let Some((start, access)) = self.under_way.remove(&number) else { return };
        self.clock += 1;
        self.failed += 1;
        if let Access::Write { sectors, value, .. } = access {
            let span = Span { start, end: u64::MAX };
            self.wrote(sectors, Written { value, span, answered: false, durable: false, repeated });
        }
    }

    /// Nothing is under way any more: what was not answered has taken effect by now, or never will.
    pub fn rest(&mut self) {
        self.clock += 1;
        self.history.rest(self.clock);
        for written in self.written.values_mut().flatten() {
            written.span.end = written.span.end.min(self.clock);
        }
    }

    /// Is one order of all operations an explanation of what was seen?
    pub fn check(&self) -> Result<(), String> {
        self.history.check()
    }

    /// Every host lost its power at once: a new history begins, from what flushes cover.
    pub fn blackout(&mut self) {
        if let Err(violation) = self.check() {
            self.violation = Some(violation);
        }
        let flushed = self.flushed.iter().copied().max().unwrap_or(0);
        let durable = |write: &Written| write.answered && (write.durable || write.span.end < flushed);
        // What no read has settled since the last time stays as open as it was.
        let mut possible = std::mem::take(&mut self.possible);
        for (sector, writes) in std::mem::take(&mut self.written) {
            let mut all = writes;
            let before = possible.remove(&sector).unwrap_or_else(|| vec![0]);
            if !all.iter().any(|write| write.span.end <= 1) {
                all.extend(before.iter().map(|value| Written::before_all(*value, 0)));
            }
            let seen = self.history.last_seen(in_history(sector));
            // What ended before another value was written, or was asked for and returned, came before it.
            let replaced = |write: &Written| {
                let seen_later = |other: &Written| {
                    let others = other.value != write.value && other.value != 0;
                    others && seen.get(&other.value).is_some_and(|start| write.span.end < *start)
                };
                let by = |other: &Written| write.span.end < other.span.start || seen_later(other);
                all.iter().any(|other| durable(other) && by(other))
            };
            let left = all.iter().filter(|write| !replaced(write)).map(|write| write.value).collect();
            possible.insert(sector, left);
        }
        self.possible = possible;
        self.history = History::default();
        self.flushed.clear();
    }

    /// Does a block on a device hold what its sectors were last read as? For when all was read, and nothing written since.
    pub fn holds(&self, block: u32, pages: u16, content: Option<&Content>) -> Result<(), String> {
        for sector in (0..pages * SECTORS_PER_PAGE).map(|sector| (block, sector)) {
            let seen = self.history.last_seen(in_history(sector));
            let Some((read, _)) = seen.into_iter().max_by_key(|(_, start)| *start) else {
                return Err(format!("sector {sector:?} was not read"));
            };
            let offset = usize::from(sector.1 % SECTORS_PER_PAGE) * SECTOR_SIZE as usize;
            let page = content.and_then(|content| content.pages.get(&(sector.1 / SECTORS_PER_PAGE)));
            let bytes = page.map(|page| &page[offset..offset + SECTOR_SIZE as usize]);
            let held = bytes.map_or(Ok(0), |bytes| value_of(bytes, in_history(sector)))?;
            if held != read {
                return Err(format!("sector {sector:?} holds {held}, and was last read as {read}"));
            }
        }
        Ok(())
    }

    /// After everything was read: no sector may be left open.
    pub fn everything_was_read(&mut self) -> Result<(), String> {
        match self.possible.first_key_value() {
            Some((sector, _)) => Err(format!("sector {sector:?} was not read after power was lost")),
            None => Ok(()),
        }
    }
}

/// A block as a store holds it.
#[derive(Debug, PartialEq)]
pub struct Content {
    versions: [Version; UNITS_PER_BLOCK],
    /// Pages that are not zero.
    pages: BTreeMap<u16, Vec<u8>>,
}

pub type Contents = BTreeMap<GroupId, BTreeMap<BlockKey, Content>>;

/// Opens a host's store, and reads all of it. Also tells how many bytes it has given away. `None`: it says that it is
/// damaged, where that may be.
///
/// # Errors
/// It says so where it may not, or does not open.
pub fn contents(host: &Host) -> Result<Option<(Contents, u64)>, String> {
    let cache = host.cache.as_ref().map(|device| device as &dyn Device);
    let opened = Store::open(&host.capacity, cache, host.pool, Options::default());
    let (mut store, recovered) = opened.map_err(|error| format!("node {}: {error}", host.node))?;
    if recovered.damaged {
        let nobody_did = || format!("node {}: an undamaged store says that it is damaged", host.node);
        return if host.damage_allowed { Ok(None) } else { Err(nobody_did()) };
    }
    for group in &recovered.groups {
        store.apply(group.group, group.tail.last.seq);
    }
    let used_bytes = store.status().used_bytes;
    let mut contents = Contents::new();
    for group in &recovered.groups {
        let mut after = None;
        loop {
            let blocks = store.blocks_after(group.group, after, 64);
            let Some((last, _)) = blocks.last() else { break };
            after = Some(*last);
            for (key, _) in blocks {
                let content = content(&mut store, host, group.group, key)?;
                contents.entry(group.group).or_default().insert(key, content);
            }
        }
    }
    Ok(Some((contents, used_bytes)))
}

fn content(store: &mut Store, host: &Host, group: GroupId, key: BlockKey) -> Result<Content, String> {
    let versions = store.unit_versions(group, key);
    let mut pages = BTreeMap::new();
    for unit in (0..UNITS_PER_BLOCK as u8).filter(|unit| versions[usize::from(*unit)] != Version::ZERO) {
        let range = PageRange::of_unit(unit);
        let buffer = host.pool.alloc(range.bytes()).expect("the pool is large");
        store.read(1, group, key, range, buffer);
        let read = loop {
            let (mut actions, mut events) = (Vec::new(), Vec::new());
            store.end_turn(&mut actions);
            for action in actions {
                // Only the reads: this look at the store changes nothing.
                if matches!(action, DiskAction::Read { .. }) {
                    store.on_disk(host.device(action.device()).carry_out(action, 0));
                }
            }
            store.take_events(&mut events);
            if let Some(StoreEvent::ReadDone { result, .. }) =
                events.into_iter().find(|event| matches!(event, StoreEvent::ReadDone { .. }))
            {
                break result;
            }
        };
        let read = read.map_err(|error| format!("node {} block {key} unit {unit}: {error:?}", host.node))?;
        for (index, page) in read.buffer.chunks_exact(PAGE_SIZE).enumerate().take(PAGES_PER_UNIT) {
            if page.iter().any(|byte| *byte != 0) {
                pages.insert(range.first + index as u16, page.to_vec());
            }
        }
    }
    Ok(Content { versions, pages })
}

/// Do all the replicas of each group hold the same?
pub fn compare(map: &ClusterMap, contents: &BTreeMap<NodeId, Contents>) -> Result<(), String> {
    let nothing = BTreeMap::new();
    for group in map.groups.values() {
        let of = |node: NodeId| contents[&node].get(&group.id).unwrap_or(&nothing);
        let mut members = group.acting().map(|member| member.node).filter(|node| contents.contains_key(node));
        let Some(first) = members.next() else { continue };
        for other in members {
            let (a, b) = (of(first), of(other));
            if !a.keys().eq(b.keys()) {
                return Err(format!("group {}: nodes {first} and {other} hold other blocks", group.id));
            }
            for (key, content) in a {
                let theirs = &b[key];
                if content.versions != theirs.versions {
                    return Err(format!("block {key}: versions differ on nodes {first} and {other}"));
                }
                if content.pages != theirs.pages {
                    return Err(format!("block {key}: content differs on nodes {first} and {other}"));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
