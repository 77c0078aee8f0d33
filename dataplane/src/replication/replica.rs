//! Replica: one group's journal as this node holds it. The primary runs it too, for its own copy.
//!
//! Takes entries in order, hands them to the store, learns what is durable and what is acknowledged, and lets the
//! store apply that. Entries stay here with their payload until they are applied and every other replica has them: a new primary
//! sends from here. Used by `group`, `primary` and `peering`; knows no request and no other member.
//!
//! Invariants
//! - `pending` has no gap, and ends with `last`.
//! - `applied ≤ durable` and `applied ≤ acked`.
//! - Nothing is reported as durable before it is as stable as its writer asked.

use std::collections::VecDeque;

use xsan_protocol::ids::{BlockKey, GroupId, Seq, StoreId, Version};
use xsan_protocol::units::PageRange;

use super::action::Action;
use super::call::Call;
use super::flush::FlushWaiter;
use super::lag::Lag;
use crate::store::{self, Entry, GroupTail, Record};

#[derive(Debug)]
pub(super) struct Replica {
    pub group: GroupId,
    pub store: StoreId,
    pub last: Version,
    pub durable: Seq,
    /// The newest entry that this node knows to be acknowledged.
    pub acked: Seq,
    /// The store was told to apply everything up to here.
    pub applied: Seq,
    /// Nothing beyond is applied for now: a comparison of versions wants this state.
    pub apply_limit: Option<Seq>,
    /// `applied` when `turn` began; what came since does not show in the store's view during that turn.
    applied_before: Seq,
    turn: u64,
    pending: VecDeque<Entry>,
    /// Version of the entry before `pending`, where it is known.
    base: Option<Version>,
    /// The store refused this entry; it and those behind it are offered again at the next tick.
    refused: Option<Seq>,
    reset: ResetState,
    /// How its journal gets on with what it was sent.
    lag: Lag,
    /// Entries that count only once they are on stable media.
    must_sync: VecDeque<Seq>,
    /// The flush under way for this replica, and what it covers.
    syncing: Option<(u64, Seq)>,
}

/// What became of the record by which a replica drops its journal's tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResetState {
    Done,
    Offered(Version),
    /// It is offered again at the next tick, before any entry.
    Refused(Version),
}

impl Replica {
    /// A replica as the store has it; `recovered` are the entries that are not applied.
    ///
    /// # Panics
    /// The entries have a gap, or do not end with the tail.
    pub fn new(group: GroupId, store: StoreId, tail: GroupTail, recovered: Vec<Entry>) -> Self {
        let mut replica = Self {
            group,
            store,
            last: tail.last,
            durable: tail.last.seq,
            acked: tail.acked,
            applied: tail.acked,
            apply_limit: None,
            applied_before: tail.acked,
            turn: 0,
            pending: VecDeque::new(),
            base: None,
            refused: None,
            reset: ResetState::Done,
            lag: Lag::default(),
            must_sync: VecDeque::new(),
            syncing: None,
        };
        match recovered.first() {
            None => replica.base = Some(tail.last),
            Some(first) => assert!(first.version.seq == tail.acked.next()),
        }
        for entry in recovered {
            if let Some(before) = replica.pending.back() {
                assert!(entry.version.seq == before.version.seq.next());
            }
            replica.keep(entry);
        }
        if let Some(newest) = replica.pending.back() {
            assert!(newest.version == tail.last);
            // How stable these must be was forgotten: the strictest is right for all.
            replica.must_sync.push_back(tail.last.seq);
        }
        replica
    }

    fn keep(&mut self, entry: Entry) {
        self.pending.push_back(entry);
    }

    /// Takes the next entry: into the journal, not yet applied. `sync`: it counts once it is on stable media.
    ///
    /// # Panics
    /// The entry is not the next one.
    pub fn on_append(&mut self, call: &mut Call<'_>, entry: Entry, sync: bool) {
        assert!(entry.version.seq == self.last.seq.next(), "{} after {}", entry.version, self.last);
        assert!(entry.version.epoch >= self.last.epoch);
        if matches!(self.reset, ResetState::Refused(_)) {
            self.refused.get_or_insert(entry.version.seq);
        }
        if self.refused.is_none() {
            call.out.push(Action::Append { store: self.store, record: Record::Entry(entry.clone()) });
        }
        if sync {
            self.must_sync.push_back(entry.version.seq);
        }
        self.last = entry.version;
        self.keep(entry);
        call.core.ticking.insert(self.group);
    }

    /// What it has so far counts once it is on stable media, with what was pushed: that has no place in the order, and a flush that is under way may
    /// have begun before it came.
    pub fn sync_all(&mut self, call: &mut Call<'_>) {
        self.syncing = None;
        self.mark_unsynced(self.last.seq);
        self.maybe_sync(call);
    }

    fn mark_unsynced(&mut self, through: Seq) {
        if through > Seq(0) && self.must_sync.back() != Some(&through) {
            self.must_sync.push_back(through);
        }
    }

    /// The journal has everything up to `seq`. Stability asked for is forced now.
    pub fn on_durable(&mut self, call: &mut Call<'_>, seq: Seq) {
        assert!(seq <= self.last.seq, "durable {seq} beyond {}", self.last);
        self.durable = self.durable.max(seq);
        self.maybe_sync(call);
        self.maybe_apply(call);
    }

    /// Flushes the store if an entry in the journal waits for it.
    pub fn maybe_sync(&mut self, call: &mut Call<'_>) {
        let wanted = self.must_sync.front().is_some_and(|first| *first <= self.durable);
        if wanted && self.syncing.is_none() {
            let ticket = call.core.fresh_token();
            self.syncing = Some((ticket, self.durable));
            call.flush(self.store, FlushWaiter::Replica { group: self.group, ticket });
        }
    }

    /// The flush `ticket` ended: what was in the journal when it began is on stable media.
    pub fn on_stable(&mut self, call: &mut Call<'_>, ticket: u64) {
        let Some((current, through)) = self.syncing else { return };
        if current != ticket {
            return;
        }
        self.syncing = None;
        while self.must_sync.front().is_some_and(|first| *first <= through) {
            self.must_sync.pop_front();
        }
        self.maybe_sync(call);
    }

    /// What this replica vouches for: in the journal, and stable where that was asked for.
    pub fn vouched(&self) -> Seq {
        match self.must_sync.front() {
            Some(first) if *first <= self.durable => Seq(first.0 - 1),
            _ => self.durable,
        }
    }

    /// Everything up to `acked` is acknowledged: the store may apply it. What did not come yet is told again by what comes: this
    /// node may lead before, or follow one that gives those seqs to other entries.
    pub fn on_acked(&mut self, call: &mut Call<'_>, acked: Seq) {
        self.acked = self.acked.max(acked.min(self.last.seq));
        self.maybe_apply(call);
    }

    pub fn maybe_apply(&mut self, call: &mut Call<'_>) {
        let mut through = self.acked.min(self.durable);
        if let Some(limit) = self.apply_limit {
            through = through.min(limit);
        }
        if through <= self.applied {
            return;
        }
        self.touch(call.core.turn);
        self.applied = through;
        call.out.push(Action::Apply { store: self.store, group: self.group, through });
        call.core.ticking.insert(self.group);
    }

    /// The view of the store goes stale in this turn.
    pub fn touch(&mut self, turn: u64) {
        if self.turn != turn {
            self.turn = turn;
            self.applied_before = self.applied;
        }
    }

    /// Does the store's view show everything that was decided?
    pub fn is_view_fresh(&self, turn: u64) -> bool {
        self.turn != turn
    }

    /// What the store's view shows in this turn.
    fn visible(&self, turn: u64) -> Seq {
        if self.turn == turn { self.applied_before } else { self.applied }
    }

    /// Entries that the store's view does not show.
    pub fn unseen(&self, turn: u64) -> impl DoubleEndedIterator<Item = &Entry> {
        self.entries_from(self.visible(turn).next())
    }

    /// Entries from `seq` on, as far as they are kept.
    pub fn entries_from(&self, seq: Seq) -> impl DoubleEndedIterator<Item = &Entry> {
        let first = self.pending.front().map_or(seq.0, |entry| entry.version.seq.0);
        let skip = (seq.0.saturating_sub(first) as usize).min(self.pending.len());
        self.pending.range(skip..)
    }

    /// Are all the entries from `seq` to the last here, to be sent?
    pub fn has_from(&self, seq: Seq) -> bool {
        seq > self.last.seq || self.pending.front().is_some_and(|first| first.version.seq <= seq)
    }

    /// Version of the entry at `seq`, where it is known.
    pub fn version_at(&self, seq: Seq) -> Option<Version> {
        if seq == self.last.seq {
            return Some(self.last);
        }
        let first = self.pending.front()?.version.seq;
        if seq.next() == first {
            return self.base;
        }
        let index = seq.0.checked_sub(first.0)? as usize;
        self.pending.get(index).map(|entry| entry.version)
    }

    /// The newest entry that touches these pages and is not acknowledged.
    pub fn newest_unacked(&self, key: BlockKey, pages: PageRange) -> Option<Seq> {
        self.entries_from(self.acked.next())
            .rev()
            .find(|entry| entry.key == key && entry.pages.overlaps(pages))
            .map(|entry| entry.version.seq)
    }

    /// Version that `unit` has once every entry so far is applied, by the rule that the store follows too.
    pub fn unit_version(&self, call: &Call<'_>, key: BlockKey, unit: u8) -> Version {
        let view = call.stores.view(self.store);
        let mut version = view.unit_version(self.group, key, unit);
        for entry in self.unseen(call.core.turn) {
            if entry.key == key && entry.pages.units().contains(&unit) {
                version = version_after(entry, unit, version);
            }
        }
        version
    }

    /// Forgets entries up to `floor` that the store's view shows.
    pub fn trim(&mut self, turn: u64, floor: Seq) {
        let floor = floor.min(self.visible(turn));
        while let Some(entry) = self.pending.front()
            && entry.version.seq <= floor
        {
            self.base = Some(entry.version);
            self.pending.pop_front();
        }
    }

    /// Memory of the entries that are kept though they are acknowledged.
    pub fn retained_bytes(&self) -> usize {
        let acknowledged = self.pending.iter().take_while(|entry| entry.version.seq <= self.acked);
        acknowledged.map(held_bytes).sum()
    }

    /// Memory of the entries here.
    pub fn held_bytes(&self) -> usize {
        self.pending.iter().map(held_bytes).sum()
    }

    /// Notes how far the journal is behind what came.
    pub fn watch(&mut self, now_ns: u64) {
        self.lag.watch(self.durable, self.last.seq, now_ns);
    }

    /// Has the journal not got what came some time ago?
    pub fn is_late(&self, now_ns: u64) -> bool {
        self.lag.is_late(now_ns)
    }

    /// The store has taken back what comes behind `last`: it never came, and whether it is acknowledged is for those to know who
    /// have it.
    ///
    /// # Panics
    /// The journal had some of that.
    pub fn on_withdrawn(&mut self, last: Version) {
        assert!(last.seq >= self.durable, "{last} was taken back, and {} was durable", self.durable);
        while self.pending.pop_back_if(|entry| entry.version.seq > last.seq).is_some() {}
        let marks = self.must_sync.len();
        self.must_sync.retain(|seq| *seq <= last.seq);
        if self.must_sync.len() < marks {
            // What a mark stood for may lie below it.
            self.mark_unsynced(last.seq);
        }
        self.refused = None;
        self.last = last;
        self.acked = self.acked.min(last.seq);
    }

    /// Has this replica entries in memory that are applied and seen, or not yet applied?
    pub fn is_busy(&self) -> bool {
        !self.pending.is_empty() || matches!(self.reset, ResetState::Refused(_))
    }

    /// Is no entry and no reset on its way to the journal?
    pub fn is_settled(&self) -> bool {
        let no_entry = self.durable == self.last.seq || self.refused == Some(self.durable.next());
        no_entry && self.reset == ResetState::Done
    }

    /// Drops what is not applied and goes on behind `last`: this node becomes a learner. Until that is in the journal, what it
    /// dropped may come back with the next start: nothing may be built on it before `on_reset`.
    ///
    /// # Panics
    /// Something is on its way to the journal: its completion could be taken for that of something later.
    pub fn reset(&mut self, call: &mut Call<'_>, last: Version) {
        assert!(self.is_settled());
        self.touch(call.core.turn);
        self.pending.clear();
        self.must_sync.clear();
        self.syncing = None;
        self.refused = None;
        self.reset = ResetState::Offered(last);
        self.lag = Lag::default();
        self.apply_limit = None;
        self.base = Some(last);
        self.last = last;
        self.durable = last.seq;
        self.acked = last.seq;
        self.applied = last.seq;
        self.applied_before = last.seq;
        call.out
            .push(Action::Append { store: self.store, record: Record::Reset { group: self.group, last } });
    }

    /// Drops what is in memory: the store has failed, and what it holds is known when it is opened again.
    pub fn discard(&mut self) {
        self.pending.clear();
        self.must_sync.clear();
        self.refused = None;
        self.reset = ResetState::Done;
    }

    /// The store did not take an entry: it is offered again, in order, at the next tick.
    pub fn on_refused(&mut self, call: &mut Call<'_>, seq: Seq) {
        if seq > self.durable && seq <= self.last.seq {
            self.refused = Some(self.refused.map_or(seq, |refused| refused.min(seq)));
            call.core.ticking.insert(self.group);
        }
    }

    pub fn on_reset_refused(&mut self, call: &mut Call<'_>) {
        if let ResetState::Offered(last) = self.reset {
            self.reset = ResetState::Refused(last);
        }
        call.core.ticking.insert(self.group);
    }

    /// The reset is in the journal.
    pub fn on_reset(&mut self) {
        self.reset = ResetState::Done;
    }

    /// Is the last reset in the journal? Before, no primary was told that this learner has started.
    pub fn takes_entries(&self) -> bool {
        self.reset == ResetState::Done
    }

    /// Is there an entry that the store is to be offered again?
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Offers again what the store did not take.
    pub fn retry_refused(&mut self, call: &mut Call<'_>) {
        if call.core.has_failed(self.store) {
            return;
        }
        if let ResetState::Refused(last) = self.reset {
            self.reset = ResetState::Offered(last);
            let record = Record::Reset { group: self.group, last };
            call.out.push(Action::Append { store: self.store, record });
        }
        if let Some(from) = self.refused.take() {
            for entry in self.entries_from(from) {
                call.out.push(Action::Append { store: self.store, record: Record::Entry(entry.clone()) });
            }
        }
    }
}

fn held_bytes(entry: &Entry) -> usize {
    size_of::<Entry>() + entry.data.as_ref().map_or(0, |data| data.bytes.held_bytes())
}

/// Version of `unit` after `entry`, when it was `before`. An entry that covers the unit in part keeps the chain only when it
/// was written over the same content.
pub(super) fn version_after(entry: &Entry, unit: u8, before: Version) -> Version {
    let previous = if unit == entry.pages.first_unit() { entry.previous_first } else { entry.previous_last };
    let covers = entry.pages.covers_unit(unit);
    store::version_after(entry.version, entry.data.is_some(), covers, previous, before)
}
