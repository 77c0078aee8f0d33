//! The entries of one group that are in the journal but not applied yet.
//!
//! Used by `engine` (live) and `recover` (replay). Payloads are held as long as entries are pending; so does replication, which
//! shares them.
//!
//! Invariants
//! - `pending` is gapless: its first entry follows `applied`, its last is `last`.
//! - An entry is applied only when it is durable here and acknowledged, in order.

use std::collections::VecDeque;
use std::sync::Arc;

use xsan_protocol::disk::checkpoint::GroupRow;
use xsan_protocol::ids::{BlockKey, GroupId, Seq, Version};
use xsan_protocol::units::PageRange;

use super::carry::Carry;
use super::index::{Change, Index};
use super::reserve::{Claim, Reserved};
use super::{Entry, PageData};
use crate::disk::buffers::Buffer;

#[derive(Debug)]
pub struct Pending {
    /// Journal position of the descriptor, 0 while it is queued; and of the data.
    pub position: u64,
    pub data_position: u64,
    pub durable: bool,
    pub version: Version,
    pub key: BlockKey,
    pub pages: PageRange,
    pub previous_first: Version,
    pub previous_last: Version,
    pub checksums: Option<Arc<[u32]>>,
    /// What the checksums are of; nothing more once the store has failed.
    pub bytes: Option<Buffer>,
    pub claim: Claim,
}

impl Pending {
    pub fn of(entry: &Entry, claim: Claim) -> Self {
        Self {
            position: 0,
            data_position: 0,
            durable: false,
            version: entry.version,
            key: entry.key,
            pages: entry.pages,
            previous_first: entry.previous_first,
            previous_last: entry.previous_last,
            checksums: entry.data.as_ref().map(|data| Arc::clone(&data.checksums)),
            bytes: entry.data.as_ref().map(|data| data.bytes.clone()),
            claim,
        }
    }

    /// The entry as it was appended; everything up to `acked` is acknowledged.
    pub fn entry(&self, group: GroupId, acked: Seq) -> Entry {
        let data = self.bytes.clone().zip(self.checksums.clone());
        Entry {
            group,
            version: self.version,
            acked,
            key: self.key,
            pages: self.pages,
            data: data.map(|(bytes, checksums)| PageData { bytes, checksums }),
            previous_first: self.previous_first,
            previous_last: self.previous_last,
        }
    }

    pub fn change(&self, group: GroupId) -> Change<'_> {
        Change {
            position: self.position,
            push: false,
            group,
            key: self.key,
            pages: self.pages,
            version: self.version,
            previous_first: self.previous_first,
            previous_last: self.previous_last,
            data: self.checksums.as_deref().map(|checksums| (self.data_position, checksums)),
        }
    }
}

#[derive(Debug, Default)]
pub struct Group {
    pub last: Version,
    pub applied: Version,
    /// Everything up to here is acknowledged; applied as far as it is durable here.
    pub acknowledged: Seq,
    pub pending: VecDeque<Pending>,
    /// Counts resets: completions of entries of an earlier life do not count.
    pub life: u32,
    pub damaged: bool,
    /// Journal position of the newest durable reset, 0 without one.
    pub reset_position: u64,
    /// While a reset is not durable: what had been applied before it. A checkpoint must not run ahead of the reset.
    unsettled: Option<Version>,
    /// And where the oldest entry is that it dropped: without the reset, replay needs it.
    dropped_position: Option<u64>,
    /// The carry under way, and how many there were.
    pub(super) carry: Option<Carry>,
    pub(super) carries: u32,
}

impl Group {
    pub fn recovered(row: &GroupRow) -> Self {
        let GroupRow { applied, reset_position, damaged, .. } = *row;
        Self { last: applied, applied, acknowledged: applied.seq, damaged, reset_position, ..Self::default() }
    }

    /// The pending entry with this seq.
    pub fn entry_mut(&mut self, seq: Seq) -> Option<&mut Pending> {
        let first = self.pending.front()?.version.seq.0;
        let index = seq.0.checked_sub(first)?;
        self.pending.get_mut(index as usize)
    }

    /// Applies what may be, for which nothing need be set aside any more.
    pub fn apply_ready(&mut self, group: GroupId, index: &mut Index, reserved: &mut Reserved) {
        let acknowledged = self.acknowledged;
        while let Some(entry) =
            self.pending.pop_front_if(|entry| entry.durable && entry.version.seq <= acknowledged)
        {
            index.apply(&entry.change(group));
            self.applied = entry.version;
            reserved.release(group, entry.key, entry.claim);
        }
    }

    /// What a checkpoint may say is applied.
    pub fn settled(&self) -> Version {
        self.unsettled.unwrap_or(self.applied)
    }

    /// The reset to `last`, of life `life`, is durable at `position`.
    pub fn on_reset_durable(&mut self, position: u64, last: Version, life: u32) {
        self.reset_position = position;
        if life == self.life {
            self.unsettled = None;
            self.dropped_position = None;
            self.damaged = false;
        } else {
            self.unsettled = Some(last);
        }
    }

    /// Drops what is pending and goes on from `last`.
    pub fn reset(&mut self, group: GroupId, last: Version, reserved: &mut Reserved) {
        self.unsettled = Some(self.settled());
        self.dropped_position = self.oldest_position();
        self.cancel_carry();
        self.pending.drain(..).for_each(|entry| reserved.release(group, entry.key, entry.claim));
        self.life += 1;
        self.last = last;
        self.applied = last;
        self.acknowledged = last.seq;
    }

    /// Drops what is pending at an opening that trusts nothing of it: the checkpoint that follows says so.
    pub fn forget_pending(&mut self, group: GroupId, reserved: &mut Reserved) {
        self.pending.drain(..).for_each(|entry| reserved.release(group, entry.key, entry.claim));
        self.last = self.applied;
        self.acknowledged = self.applied.seq;
    }

    /// Takes back the entries that are in no batch.
    pub fn withdraw(&mut self, group: GroupId, reserved: &mut Reserved) {
        while let Some(entry) = self.pending.pop_back_if(|entry| entry.position == 0) {
            reserved.release(group, entry.key, entry.claim);
        }
        self.last = self.pending.back().map_or(self.applied, |entry| entry.version);
    }

    /// Journal position that must be kept for the oldest entry that is pending, or dropped by a reset, or carried, where that is
    /// not durable.
    pub fn oldest_position(&self) -> Option<u64> {
        self.dropped_position.or_else(|| self.carried_position()).or_else(|| self.oldest_pending())
    }

    /// Is a reset on its way?
    pub(super) fn is_resetting(&self) -> bool {
        self.unsettled.is_some()
    }

    pub(super) fn oldest_pending(&self) -> Option<u64> {
        self.pending.front().map(|entry| entry.position).filter(|position| *position != 0)
    }
}
