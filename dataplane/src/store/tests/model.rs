//! What a store must hold, said in the simplest way: per group, the list of records in journal order.
//!
//! A crash may cut the list anywhere behind what is durable (or, when the power went, flushed); which entries of
//! what is left are applied follows from what recovery knows to be acknowledged: no more than was.

use std::collections::{BTreeMap, HashMap};

use xsan_protocol::ids::{BlockKey, GroupId, Seq, Version};
use xsan_protocol::units::PageRange;

use super::rig::{Rig, data, key, page_bytes};
use crate::store::{Entry, GroupTail, ReadError, StoreView};

pub const GROUPS: u32 = 3;
pub const KEYS: u32 = 3;
/// Pages of a block that tests use.
pub const PAGES: u16 = 256;

#[derive(Clone, Debug)]
pub enum Event {
    Entry {
        version: Version,
        key: BlockKey,
        pages: PageRange,
        /// 0: zeroes.
        content: u64,
        previous: (Version, Version),
    },
    Push {
        token: u64,
        key: BlockKey,
        unit: u8,
        version: Version,
        /// Everything up to here was acknowledged.
        as_of: Seq,
        content: u64,
    },
    Reset {
        last: Version,
        applied: Seq,
    },
}

impl Event {
    /// Is this the entry that was appended, to the byte?
    fn is(&self, entry: &Entry) -> bool {
        let Self::Entry { version, key, pages, content, previous } = self else { return false };
        let same_data = entry.data.as_ref().map_or(*content == 0, |found| {
            let appended = data(*content, pages.count);
            *content != 0 && found.bytes[..] == appended.bytes[..] && found.checksums == appended.checksums
        });
        (entry.version, entry.key, entry.pages) == (*version, *key, *pages)
            && (entry.previous_first, entry.previous_last) == *previous
            && same_data
    }
}

/// Content number of each page, version of each unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub pages: HashMap<(BlockKey, u16), u64>,
    pub versions: HashMap<(BlockKey, u8), Version>,
}

impl State {
    fn set(&mut self, key: BlockKey, pages: PageRange, content: u64) {
        for page in pages.pages() {
            if content == 0 {
                self.pages.remove(&(key, page));
            } else {
                self.pages.insert((key, page), content + u64::from(page - pages.first));
            }
        }
    }

    fn set_version(&mut self, key: BlockKey, unit: u8, version: Version) {
        if version == Version::ZERO {
            self.versions.remove(&(key, unit));
        } else {
            self.versions.insert((key, unit), version);
        }
    }

    pub fn version(&self, key: BlockKey, unit: u8) -> Version {
        self.versions.get(&(key, unit)).copied().unwrap_or(Version::ZERO)
    }

    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Entry { version, key, pages, content, previous } => {
                self.set(*key, *pages, *content);
                for unit in pages.units() {
                    let before = self.version(*key, unit);
                    let expected = if unit == pages.first_unit() { previous.0 } else { previous.1 };
                    let after = match (pages.covers_unit(unit), *content) {
                        (true, 0) => Version::ZERO,
                        (true, _) => *version,
                        // Zeroes where nothing is.
                        (false, 0) if before == expected && before == Version::ZERO => Version::ZERO,
                        (false, _) if before == expected && before != Version::UNKNOWN => *version,
                        (false, _) => Version::UNKNOWN,
                    };
                    self.set_version(*key, unit, after);
                }
            }
            Event::Push { key, unit, version, content, .. } => {
                self.set(*key, PageRange::of_unit(*unit), *content);
                self.set_version(*key, *unit, *version);
            }
            Event::Reset { .. } => {}
        }
    }
}

#[derive(Clone, Debug, Default)]
pub struct Group {
    base: State,
    base_last: Version,
    pub log: Vec<Event>,
    /// Records that are durable, and on stable media: a prefix of `log`.
    pub durable: usize,
    pub flushed: usize,
    /// Acknowledged, as far as the store was told.
    pub acked: Seq,
}

impl Group {
    fn last_of(&self, count: usize) -> Version {
        let ends = self.log[..count].iter().rev().find_map(|event| match event {
            Event::Entry { version, .. } => Some(*version),
            Event::Reset { last, .. } => Some(*last),
            Event::Push { .. } => None,
        });
        ends.unwrap_or(self.base_last)
    }

    pub fn last(&self) -> Version {
        self.last_of(self.log.len())
    }

    /// What the first `count` records, and what is in its place, say was acknowledged.
    fn said_acked(&self, count: usize) -> Seq {
        let said = self.log[..count].iter().rev().find_map(|event| match event {
            Event::Push { as_of, .. } => Some(*as_of),
            Event::Reset { last, .. } => Some(last.seq),
            Event::Entry { .. } => None,
        });
        said.unwrap_or(self.base_last.seq)
    }

    /// The most that anybody knew to be acknowledged with the first `count` records: before the next reset, which may have
    /// taken seqs back.
    fn acked_max(&self, count: usize) -> Seq {
        let at_reset = self.log[count..].iter().find_map(|event| match event {
            Event::Reset { applied, .. } => Some(*applied),
            Event::Entry { .. } | Event::Push { .. } => None,
        });
        at_reset.unwrap_or(self.acked)
    }

    /// The oldest reset that was not durable is.
    pub fn reset_is_durable(&mut self) {
        let mut later = self.log[self.durable..].iter();
        let reset = later.position(|event| matches!(event, Event::Reset { .. }));
        self.durable += reset.expect("it was appended") + 1;
    }

    pub fn last_durable(&self) -> Seq {
        self.last_of(self.durable).seq
    }

    /// Entries of the first `count` records that no later one of them dropped.
    fn kept(&self, count: usize) -> Vec<Event> {
        let mut kept: Vec<Event> = Vec::new();
        // What came since the last reset: what was kept before it, the next one does not drop, for all its seq.
        let mut later: Vec<Event> = Vec::new();
        for event in &self.log[..count] {
            if let Event::Reset { applied, .. } = event {
                later
                    .retain(|event| !matches!(event, Event::Entry { version, .. } if version.seq > *applied));
                kept.append(&mut later);
                kept.push(event.clone());
            } else {
                later.push(event.clone());
            }
        }
        kept.append(&mut later);
        kept
    }

    /// What is applied when the first `count` records are there and `acked` is known to be acknowledged.
    pub fn state(&self, count: usize, acked: Seq) -> State {
        let mut state = self.base.clone();
        self.split(count, acked).0.iter().for_each(|event| state.apply(event));
        state
    }

    /// The first `count` records: those that are applied, and the entries that are not acknowledged. What came before the last reset
    /// and was kept is applied, whatever seq it had.
    fn split(&self, count: usize, acked: Seq) -> (Vec<Event>, Vec<Event>) {
        let kept = self.kept(count);
        let reset = kept.iter().rposition(|event| matches!(event, Event::Reset { .. }));
        let waits = |index: usize, event: &Event| {
            matches!(event, Event::Entry { version, .. } if version.seq > acked)
                && reset.is_none_or(|reset| index > reset)
        };
        let (mut applied, mut pending) = (Vec::new(), Vec::new());
        for (index, event) in kept.into_iter().enumerate() {
            if waits(index, &event) { pending.push(event) } else { applied.push(event) }
        }
        (applied, pending)
    }

    /// With everything applied.
    pub fn head(&self) -> State {
        self.state(self.log.len(), Seq(u64::MAX))
    }

    /// Everything is destaged: the list starts anew.
    pub fn rebase(&mut self) {
        self.base = self.head();
        self.base_last = self.last();
        self.log.clear();
        (self.durable, self.flushed) = (0, 0);
    }

    /// Is there an entry of this unit that is not acknowledged?
    pub fn waits_to_write(&self, block: BlockKey, unit: u8) -> bool {
        self.pending(self.log.len(), self.acked).iter().any(|event| {
            matches!(event, Event::Entry { key, pages, .. } if *key == block && pages.units().contains(&unit))
        })
    }

    fn pending(&self, count: usize, acked: Seq) -> Vec<Event> {
        self.split(count, acked).1
    }
}

/// What the store holds of one group now.
fn observe(rig: &mut Rig, group: GroupId) -> State {
    let mut state = State::default();
    for index in 0..KEYS {
        let versions = rig.store.unit_versions(group, key(index));
        for (unit, version) in (0u8..).zip(versions) {
            state.set_version(key(index), unit, version);
        }
        let pages = PageRange::new(0, PAGES);
        let read = rig
            .read(group, key(index), pages)
            .unwrap_or_else(|error| panic!("nothing is damaged: {}", brief(&error)));
        for (page, bytes) in pages.pages().zip(read.buffer.chunks_exact(4096)) {
            // A page tells its content number by its first word; the rest must agree.
            let first = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            let content = first.wrapping_mul(0xf1de_83e1_9937_733d);
            assert!(bytes == page_bytes(content), "a page is a mix of contents");
            state.set(key(index), PageRange::new(page, 1), content);
        }
    }
    state
}

fn brief(error: &ReadError) -> String {
    match error {
        ReadError::Damaged { damaged, .. } => format!("pages {damaged:?}"),
        ReadError::Failed => "the store has failed".to_owned(),
    }
}

#[derive(Default)]
pub struct Model {
    pub groups: BTreeMap<GroupId, Group>,
}

impl Model {
    pub fn new() -> Self {
        Self { groups: (0..GROUPS).map(|group| (GroupId(group), Group::default())).collect() }
    }

    pub fn check_all(&self, rig: &mut Rig) {
        for (group, model) in &self.groups {
            let expected = model.state(model.log.len(), model.acked);
            assert!(observe(rig, *group) == expected, "group {group} holds something else");
            let tail = GroupTail { last: model.last(), acked: model.acked };
            assert_eq!(rig.store.tail(*group), tail);
        }
    }

    /// Takes over what recovery found, after checking that it may be so.
    pub fn recover(&mut self, rig: &mut Rig, power: bool) {
        assert!(!rig.recovered.damaged, "nothing was damaged");
        assert!(power || !rig.recovered.lost_end, "what was written is there when only the process died");
        for (group, model) in &mut self.groups {
            let found = rig.recovered.groups.iter().find(|found| found.group == *group);
            let tail = found.map(|found| found.tail).unwrap_or_default();
            let pending = found.map_or(Vec::new(), |found| found.pending.clone());
            for entry in &pending {
                assert_eq!(entry.group, *group);
                assert!(entry.acked <= tail.acked, "{} acknowledges up to {}", entry.version, entry.acked);
            }
            let least = if power { model.flushed } else { model.durable };
            let observed = observe(rig, *group);
            let same_pending = |count: usize| {
                let expected = model.pending(count, tail.acked);
                expected.len() == pending.len()
                    && expected.iter().zip(&pending).all(|(event, entry)| event.is(entry))
            };
            let fits = |count: &usize| {
                model.last_of(*count) == tail.last
                    && (model.said_acked(*count)..=model.acked_max(*count)).contains(&tail.acked)
                    && tail.acked <= tail.last.seq
                    && same_pending(*count)
                    && model.state(*count, tail.acked) == observed
            };
            let count = (least..=model.log.len()).rev().find(fits);
            let Some(count) = count else {
                let (all, last) = (model.log.len(), model.last());
                for count in least..=all {
                    let state = model.state(count, tail.acked);
                    eprintln!(
                        "with {count} of {all}: last {}, acknowledged {} to {}, {} pending, {} as found",
                        model.last_of(count),
                        model.said_acked(count),
                        model.acked_max(count),
                        model.pending(count, tail.acked).len(),
                        if same_pending(count) { "all" } else { "not all" },
                    );
                    let differs = |name: String, found: bool| {
                        if found {
                            eprintln!("  {name}")
                        }
                    };
                    for (page, content) in &state.pages {
                        let other = observed.pages.get(page);
                        differs(
                            format!("{page:?} should be {content}, is {other:?}"),
                            other != Some(content),
                        );
                    }
                    for (page, content) in &observed.pages {
                        differs(format!("{page:?} is {content}"), !state.pages.contains_key(page));
                    }
                    for unit in state.versions.keys().chain(observed.versions.keys()) {
                        let (should, is) = (state.version(unit.0, unit.1), observed.version(unit.0, unit.1));
                        differs(format!("{unit:?} should be {should}, is {is}"), should != is);
                    }
                }
                for event in &model.log {
                    eprintln!("{event:?}");
                }
                panic!(
                    "group {group}: {tail:?} with {} pending is no state of {least}..={all} up to {last}",
                    pending.len()
                );
            };
            model.log.truncate(count);
            (model.durable, model.flushed, model.acked) = (count, count, tail.acked);
        }
    }
}
