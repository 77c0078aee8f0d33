//! Carry: entries that wait for their acknowledgement are written to the journal once more, so that it can be used again behind
//! them.
//!
//! An entry may have to wait for as long as a primary is cut off, or as too few members of its group are up. The journal goes on
//! only behind the oldest entry that it must keep: one such entry would stop all the other groups of the store once they
//! had written a journal full.
//!
//! 1. All entries of the group that are not applied are queued once more, in their order and without a gap (`Kind::Carry`).
//! 2. When the last of them is durable, the group takes their places for its own, but for entries applied meanwhile, and a
//!    `Kind::Carried` is queued that says so.
//! 3. When that is durable, the first places are not kept any more.
//!
//! Replay counts the entries of a carry in place of the earlier ones if the `Carried` lies before its end, and otherwise not at all,
//! whatever became of the group since.
//!
//! Invariants
//! - Between the records of a carry no other entry of its group is queued.
//! - What the journal may give up is in it once more, complete, and so is the `Carried`.
//! - No block record names a place in a carry whose `Carried` is not on stable media.
//! - Room is kept to carry all that is pending, up to an eighth of the journal. If more than that waits, nothing is carried; as long as
//!   an eighth has not gone by since, an entry does not count as waiting but as on its way. Three eighths go by before it is
//!   carried again: so carrying an eighth writes half as much as comes.
//!
//! Source: the copying of live blocks out of segments that are to be used again, in Rosenblum and Ousterhout, "The Design and
//! Implementation of a Log-Structured File System", SOSP '91.

use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::PAGE_SIZE;

use super::engine::Store;
use super::group::Group;
use super::journal::{Item, Queued};

/// Groups are carried together up to so many pages, then the next: clients' writes wait behind them.
const BURST_PAGES: u32 = 256;

/// As long as nothing can be carried, it is looked again so often.
const AGAIN_NS: u64 = 10_000_000;

/// Pages of the journal that it takes to carry an entry with this many: it may need one for its head, and its group one for the
/// `Carried`.
pub(super) fn carried_pages(pages: usize) -> u32 {
    pages as u32 + 2
}

/// Where an entry of a carry went: its descriptor and its data.
#[derive(Clone, Copy, Debug)]
pub(super) struct CarryPlace {
    pub seq: Seq,
    pub position: u64,
    pub data_position: u64,
}

/// The carry of a group that is under way.
#[derive(Debug)]
pub(super) struct Carry {
    number: u32,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Records that are not durable yet, and the places of those that are.
    Copying { left: usize, places: Vec<CarryPlace> },
    /// `Carried` is not durable yet: replay may need what lies at `kept`.
    Marking { kept: u64 },
}

impl Group {
    /// Where its oldest pending entry is, if a carry may begin.
    fn carriable(&self) -> Option<u64> {
        if self.carry.is_some() || self.is_resetting() { None } else { self.oldest_pending() }
    }

    /// Pages that it takes to carry what is pending up to a position.
    fn pages_waiting(&self, through: u64) -> u32 {
        let waiting = self.pending.iter().take_while(|entry| (1..=through).contains(&entry.position));
        waiting.map(|entry| entry.claim.journal_pages).sum()
    }

    fn is_copying(&self) -> bool {
        self.carry.as_ref().is_some_and(|carry| matches!(carry.stage, Stage::Copying { .. }))
    }

    /// May replay find its copies not to count, though their places were taken? What is applied from there must not be in records.
    pub(super) fn is_marking(&self) -> bool {
        self.carried_position().is_some()
    }

    /// What must be kept until the carry is complete.
    pub(super) fn carried_position(&self) -> Option<u64> {
        match self.carry.as_ref()?.stage {
            Stage::Copying { .. } => None,
            Stage::Marking { kept } => Some(kept),
        }
    }

    /// Some of its entries were taken back, and with them what is queued of the carry.
    pub(super) fn cancel_carry(&mut self) {
        self.carry.take_if(|carry| matches!(carry.stage, Stage::Copying { .. }));
    }

    /// A record of carry `number` is durable. Was it the last?
    pub(super) fn on_copy_durable(&mut self, number: u32, place: CarryPlace) -> bool {
        let carry = self.carry.as_mut().filter(|carry| carry.number == number);
        let Some(Stage::Copying { left, places }) = carry.map(|carry| &mut carry.stage) else { return false };
        places.push(place);
        *left -= 1;
        *left == 0
    }

    /// The carry's entries take the places of their copies. Returns the `Carried` that makes it so for good, if it is needed.
    fn take_places(&mut self, group: GroupId) -> Option<Item> {
        let Carry { number, stage: Stage::Copying { places, .. } } = self.carry.take()? else {
            unreachable!("its last copy has just become durable")
        };
        let (after, start, kept) = (self.applied.seq, places.first()?.position, self.oldest_pending()?);
        let mut taken = false;
        for place in places.iter().filter(|place| place.seq > after) {
            let entry = self.entry_mut(place.seq).expect("what is not applied is pending");
            (entry.position, entry.data_position) = (place.position, place.data_position);
            taken = true;
        }
        if !taken {
            return None;
        }
        if !Mutation::CarriedEarly.is_on() {
            self.carry = Some(Carry { number, stage: Stage::Marking { kept } });
        }
        Some(Item::Carried { group, carry: number, after, start })
    }

    pub(super) fn on_carried_durable(&mut self, number: u32) {
        self.carry.take_if(|carry| carry.number == number);
    }
}

impl Store {
    /// Most that is carried, and that room is kept for.
    fn carry_bytes_max(&self) -> u64 {
        self.journal.ring_bytes() / 8
    }

    /// Room that is kept to carry what is pending and so many pages more.
    pub(super) fn carry_reserve(&self, more_pages: u32) -> u64 {
        let all = u64::from(self.reserved.journal_pages() + more_pages) * PAGE_SIZE as u64;
        all.min(self.carry_bytes_max())
    }

    /// Pages for the `Carried` that are not queued yet.
    pub(super) fn carried_due(&self) -> usize {
        self.groups.values().filter(|group| group.is_copying()).count()
    }

    /// Begins to carry what three eighths of a journal have gone by since, oldest first. Less than writes are let in for, whatever
    /// is kept for others: the journal must not be full before.
    pub(super) fn carry_old_entries(&mut self) {
        let all = self.journal.ring_bytes();
        let age = all * 3 / 8;
        let end = self.journal.tail + self.journal.used_bytes();
        if end < self.carry_at && self.now_ns < self.carry_again_ns {
            return;
        }
        // As long as nothing that the carry depends on has changed.
        (self.carry_at, self.carry_again_ns) = (u64::MAX, u64::MAX);
        if self.carried_due() > 0 {
            return;
        }
        if !self.may_carry(end.saturating_sub(all / 8)) {
            self.carry_again_ns = self.now_ns + AGAIN_NS;
            return;
        }
        let pending = self.groups.iter().filter_map(|(id, group)| Some((group.carriable()?, *id)));
        let mut pending: Vec<(u64, GroupId)> = pending.collect();
        pending.sort_unstable();
        let mut pages = 0;
        for (position, id) in pending {
            if position + age > end {
                self.carry_at = position + age;
                return;
            }
            if pages >= BURST_PAGES {
                return;
            }
            match self.carry(id) {
                Some(more) => pages += more,
                None => {
                    self.carry_again_ns = self.now_ns + AGAIN_NS;
                    return;
                }
            }
        }
        // What comes now lies behind the head.
        self.carry_at = self.journal.head + age;
    }

    /// Is what waits since a position, or longer, no more than is carried?
    fn may_carry(&self, through: u64) -> bool {
        let pages_max = self.carry_bytes_max() / PAGE_SIZE as u64;
        let mut pages = 0;
        self.groups.values().all(|group| {
            pages += u64::from(group.pages_waiting(through));
            pages <= pages_max
        })
    }

    /// Queues the entries of a group once more; `None`: there is no room. Returns the pages that it takes.
    fn carry(&mut self, id: GroupId) -> Option<u32> {
        let carried_due = self.carried_due();
        let group = self.groups.get_mut(&id).expect("it was found among them");
        let pages = group.pending.iter().map(|entry| entry.claim.journal_pages).sum();
        if !self.journal.has_room(pages as usize + carried_due, 0) {
            return None;
        }
        let count = group.pending.len();
        tracing::debug!(store = %self.id, group = %id, entries = count, pages, "carrying entries that wait to be acknowledged");
        group.carries += 1;
        let number = group.carries;
        for entry in &group.pending {
            let item = Item::Carry(entry.entry(id, group.applied.seq), number);
            self.journal.push(Queued { item, life: group.life, applied: Seq(0) });
        }
        let stage = Stage::Copying { left: count, places: Vec::with_capacity(count) };
        group.carry = Some(Carry { number, stage });
        Some(pages)
    }

    /// All copies of a group's carry are durable.
    pub(super) fn end_carry(&mut self, id: GroupId) {
        let group = self.groups.get_mut(&id).expect("it has a carry");
        if let Some(item) = group.take_places(id) {
            self.journal.push(Queued { item, life: group.life, applied: Seq(0) });
        }
        // More may be waiting for its turn.
        self.carry_at = 0;
    }
}
