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
//! Replay counts the entries of a carry in place of the earlier ones if it has met the `Carried`, and otherwise not at all, whatever
//! became of the group since.
//!
//! Invariants
//! - Between the records of a carry no other entry of its group is queued.
//! - What the journal may give up is in it once more, complete, and so is the `Carried`.
//! - All that is carried takes a quarter of the journal at most, and the half of it has gone by since the last time: carrying
//!   writes at most half as much again as comes.
//!
//! Source: the copying of live blocks out of segments that are to be used again, in Rosenblum and Ousterhout, "The Design and
//! Implementation of a Log-Structured File System", SOSP '91.

use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::PAGE_SIZE;

use super::engine::Store;
use super::group::{Group, Pending};
use super::journal::{Item, Queued};

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
    /// Begins to carry what lies in the older half of a journal of which the half is in use.
    pub(super) fn carry_old_entries(&mut self) {
        let (used, all) = (self.journal.used_bytes(), self.journal.ring_bytes());
        if used <= all / 2 {
            return;
        }
        let old = self.journal.head.saturating_sub(all / 2);
        let held = self.groups.iter().filter_map(|(id, group)| Some((group.carriable()?, *id)));
        let mut held: Vec<(u64, GroupId)> = held.filter(|(position, _)| *position < old).collect();
        held.sort_unstable();
        let pages: usize =
            held.iter().flat_map(|(_, id)| &self.groups[id].pending).map(Pending::data_pages).sum();
        if (pages * PAGE_SIZE) as u64 > all / 4 {
            return;
        }
        for (_, id) in held {
            if !self.carry(id) {
                return;
            }
        }
    }

    /// Queues the entries of a group once more. `false`: there is no room.
    fn carry(&mut self, id: GroupId) -> bool {
        let group = self.groups.get_mut(&id).expect("it was found among them");
        let count = group.pending.len();
        let pages: usize = group.pending.iter().map(Pending::data_pages).sum();
        // Each may need a page of its own for its head; so does the `Carried`.
        if !self.journal.has_room(pages + count, 0) {
            return false;
        }
        tracing::debug!(store = %self.id, group = %id, entries = count, pages, "carrying entries that wait to be acknowledged");
        group.carries += 1;
        let number = group.carries;
        for entry in &group.pending {
            let item = Item::Carry(entry.entry(id, group.applied.seq), number);
            self.journal.push(Queued { item, life: group.life, applied: Seq(0) });
        }
        let stage = Stage::Copying { left: count, places: Vec::with_capacity(count) };
        group.carry = Some(Carry { number, stage });
        true
    }

    /// All copies of a group's carry are durable.
    pub(super) fn end_carry(&mut self, id: GroupId) {
        let group = self.groups.get_mut(&id).expect("it has a carry");
        if let Some(item) = group.take_places(id) {
            self.journal.push(Queued { item, life: group.life, applied: Seq(0) });
        }
    }
}
