//! Scrub: the primary's walk over its group, which compares the replicas and, when deep, reads all of them.
//!
//! Light: the versions of a batch of blocks are compared with every other acting member, by the exchange that serves learners
//! (`learner`: each member answers from exactly the state that the primary compared). Deep: then every replica reads what the
//! batch holds, range by range (`check`). The control plane says which groups are due; a shard scrubs one at a time, at a
//! rate, and keeps the outcome until the control plane has it.
//!
//! Invariants
//! - Nothing is overwritten by a scrub but damaged pages, and those only with what their own checksums ask for.
//! - A replica is made anew only when every difference found is a write that it lacks: else nobody knows who is right.
//! - One batch of versions and one range of pages are in memory.
//!
//! Driven by ticks, frames and completed reads. Decision: docs/decisions/0011-scrub.md.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use xsan_protocol::ids::{BlockKey, GroupId, NodeId, Version};
use xsan_protocol::units::{PAGES_PER_UNIT, PageRange, UNITS_PER_BLOCK};
use xsan_protocol::wire::header::Opcode;
use xsan_protocol::wire::replication::{BlockDigest, BlockVersions, block_digest};
use zerocopy::IntoBytes;

use super::action::Change;
use super::call::Call;
use super::check::Check;
use super::frames::{self, KEY_MAX};
use super::group::Group;
use super::resync::COMPARE_BLOCKS;
use crate::net::frame::Frame;
use crate::store::StoreView;

/// Units read at once: one buffer of the class below the largest, and short enough not to hold up others' reads.
const RANGE_UNITS: usize = 2;
/// What a comparison of a batch takes of the rate.
const COMPARE_BYTES: usize = 64 << 10;
/// Unused rate is kept for so long.
const BURST_NS: u64 = 40_000_000;
/// Outcomes that wait for the control plane; beyond, no other group is begun.
const OUTCOMES_MAX: usize = 64;
/// A scrub whose group is not at rest for so long makes room for those of others, and begins anew later.
const BLOCKED_MAX_NS: u64 = 10_000_000_000;
/// An answer that does not come is asked for again.
const ASK_AGAIN_NS: u64 = 5_000_000_000;

/// A group to be scrubbed, if this shard leads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOrder {
    pub group: GroupId,
    pub deep: bool,
    /// Tells this order from earlier ones of the group.
    pub number: u64,
}

/// What a scrub has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubFindings {
    pub blocks: u64,
    /// Bytes read and verified at the primary.
    pub bytes: u64,
    /// Pages, of any replica, that did not match their checksum.
    pub damaged_pages: u64,
    pub mended_pages: u64,
    /// Damaged, and no replica had what they should be.
    pub lost_pages: u64,
    /// Units whose version or content differs between replicas, each at a state that must be the same.
    pub differences: u64,
    /// Replicas proposed to be made anew.
    pub rebuilt_replicas: u64,
    /// Units that were written whenever they were looked at: their checksums were verified, but not compared.
    pub skipped_units: u64,
}

/// A scrub that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOutcome {
    pub order: ScrubOrder,
    pub findings: ScrubFindings,
}

/// What a shard tells of its scrubs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    pub running: Option<ScrubOutcome>,
    pub outcomes: Vec<ScrubOutcome>,
}

/// The orders of one shard, and how fast they are carried out.
#[derive(Debug, Default)]
pub(super) struct Scrubber {
    bytes_per_second: u64,
    /// Bytes that may be read now; below 0 after a range that was larger than what was left.
    budget: i64,
    refilled_ns: u64,
    orders: Vec<ScrubOrder>,
    pub running: Option<ScrubOrder>,
    outcomes: Vec<ScrubOutcome>,
}

impl Scrubber {
    /// These are all the orders: what was asked for before and is not among them is forgotten.
    pub fn set_orders(&mut self, bytes_per_second: u64, orders: Vec<ScrubOrder>) {
        self.bytes_per_second = bytes_per_second;
        self.outcomes.retain(|outcome| orders.contains(&outcome.order));
        self.orders = orders;
    }

    /// The orders that are neither carried out nor under way.
    pub fn open(&self) -> Vec<ScrubOrder> {
        if self.outcomes.len() >= OUTCOMES_MAX {
            return Vec::new();
        }
        let open = |order: &&ScrubOrder| self.outcomes.iter().all(|outcome| outcome.order != **order);
        self.orders.iter().filter(open).copied().collect()
    }

    pub fn is_wanted(&self, order: &ScrubOrder) -> bool {
        self.orders.contains(order)
    }

    pub fn is_idle(&self) -> bool {
        self.orders.is_empty()
    }

    pub fn outcomes(&self) -> &[ScrubOutcome] {
        &self.outcomes
    }

    /// Time has passed; nothing is earned while learners are brought up to date.
    pub fn refill(&mut self, now_ns: u64, resyncing: bool) {
        let passed_ns = now_ns.saturating_sub(self.refilled_ns).min(BURST_NS);
        self.refilled_ns = now_ns;
        let rate = if resyncing { 0 } else { self.bytes_per_second };
        let bytes =
            |ns: u64| i64::try_from(u128::from(rate) * u128::from(ns) / 1_000_000_000).unwrap_or(i64::MAX);
        self.budget = self.budget.saturating_add(bytes(passed_ns)).min(bytes(BURST_NS));
    }

    /// May so many bytes be read now?
    pub fn take(&mut self, bytes: u64) -> bool {
        let allowed = self.budget > 0;
        if allowed {
            self.budget -= i64::try_from(bytes).unwrap_or(i64::MAX);
        }
        allowed
    }
}

/// What differs between the primary and one member.
#[derive(Debug, Default)]
struct Differences {
    /// Units of which the member lacks the newest write.
    behind: u64,
    /// Units of which versions do not say who is right.
    unclear: u64,
}

#[derive(Debug)]
pub(super) enum Step {
    /// The next batch of blocks is to be compared.
    Compare,
    Comparing {
        number: u64,
        since_ns: u64,
        waiting: Vec<NodeId>,
    },
    /// The next range of the batch is to be checked.
    Check,
    Checking(Check),
}

/// A scrub of one group under way.
#[derive(Debug)]
pub(super) struct Scrub {
    pub order: ScrubOrder,
    pub findings: ScrubFindings,
    pub step: Step,
    /// The batch: its first key, its blocks as the primary had them, and up to where every member compared it.
    from: BlockKey,
    blocks: BTreeMap<BlockKey, [Version; UNITS_PER_BLOCK]>,
    end: BlockKey,
    differences: BTreeMap<NodeId, Differences>,
    pub ranges: VecDeque<(BlockKey, PageRange)>,
    /// Times that the first range was looked at.
    pub looks: u32,
    /// Its damaged pages, when it was last looked at.
    pub damaged: BTreeSet<(NodeId, u16)>,
    /// Its pages that were mended here.
    pub mended: BTreeSet<u16>,
    /// It is not looked at before this.
    pub resume_ns: u64,
    /// Since when the group is not at rest.
    blocked_ns: Option<u64>,
}

impl Scrub {
    fn new(order: ScrubOrder) -> Self {
        Self {
            order,
            findings: ScrubFindings::default(),
            step: Step::Compare,
            from: BlockKey::default(),
            blocks: BTreeMap::new(),
            end: KEY_MAX,
            differences: BTreeMap::new(),
            ranges: VecDeque::new(),
            looks: 0,
            damaged: BTreeSet::new(),
            mended: BTreeSet::new(),
            resume_ns: 0,
            blocked_ns: None,
        }
    }

    /// Others act than before. Who left has been made anew when it comes back.
    pub fn on_acting(&mut self, acts: impl Fn(NodeId) -> bool) {
        self.differences.retain(|node, _| acts(*node));
        self.step_back();
    }

    /// What was asked will not be answered: it is asked again.
    pub fn step_back(&mut self) {
        match self.step {
            Step::Comparing { .. } => self.step = Step::Compare,
            Step::Checking(_) => self.step = Step::Check,
            Step::Compare | Step::Check => {}
        }
    }

    fn is_silent(&self, now_ns: u64) -> bool {
        let since_ns = match &self.step {
            Step::Comparing { since_ns, .. } => *since_ns,
            Step::Checking(check) => check.since_ns,
            Step::Compare | Step::Check => return false,
        };
        now_ns.saturating_sub(since_ns) >= ASK_AGAIN_NS
    }

    /// The next batch from `from` on, as a list of digests.
    fn begin_batch(&mut self, view: &dyn StoreView) -> Vec<BlockDigest> {
        let group = self.order.group;
        let found = view.blocks_after(group, frames::predecessor(self.from), COMPARE_BLOCKS);
        self.blocks = found.iter().map(|(key, _)| (*key, view.unit_versions(group, *key))).collect();
        let last = found.last().map(|(key, _)| *key);
        self.end = if found.len() < COMPARE_BLOCKS { KEY_MAX } else { last.unwrap_or(KEY_MAX) };
        let digest = |(key, versions): (&BlockKey, &[Version; UNITS_PER_BLOCK])| {
            BlockDigest::new(*key, block_digest(versions))
        };
        let mut list: Vec<BlockDigest> = self.blocks.iter().map(digest).collect();
        if last != Some(self.end) {
            list.push(BlockDigest::new(self.end, 0));
        }
        list
    }

    /// What `node` has of the batch that differs.
    fn on_differing(&mut self, node: NodeId, list: &[BlockVersions], covered: BlockKey) {
        self.end = self.end.min(covered.max(self.from));
        for block in list {
            let ours = self.blocks.get(&block.key()).copied().unwrap_or([Version::ZERO; UNITS_PER_BLOCK]);
            let theirs = block.versions();
            for (unit, (ours, theirs)) in
                ours.into_iter().zip(theirs).enumerate().filter(|(_, (a, b))| a != b)
            {
                tracing::error!(
                    group = %self.order.group, block = %block.key(), unit, %node, %ours, %theirs,
                    "a member has another version of a unit"
                );
                // Zeroes have no version: whether they are older nobody can tell.
                let known = ours != Version::UNKNOWN && ours != Version::ZERO && theirs != Version::ZERO;
                let of_node = self.differences.entry(node).or_default();
                if known && (theirs == Version::UNKNOWN || theirs < ours) {
                    of_node.behind += 1;
                } else {
                    of_node.unclear += 1;
                }
                self.findings.differences += 1;
            }
        }
    }

    /// Every member has compared the batch: what of it is to be read, when the scrub is deep.
    fn end_comparison(&mut self) {
        let end = self.end;
        self.blocks.retain(|key, _| *key <= end);
        self.findings.blocks += self.blocks.len() as u64;
        for (key, versions) in std::mem::take(&mut self.blocks) {
            if !self.order.deep {
                continue;
            }
            for (index, units) in versions.chunks(RANGE_UNITS).enumerate() {
                if units.iter().any(|version| *version != Version::ZERO) {
                    let first = index * RANGE_UNITS * PAGES_PER_UNIT;
                    let pages = PageRange::new(first as u16, (units.len() * PAGES_PER_UNIT) as u16);
                    self.ranges.push_back((key, pages));
                }
            }
        }
        self.step = Step::Check;
    }

    /// Goes on behind the batch; `false` when it was the last one.
    fn next_batch(&mut self) -> bool {
        self.step = Step::Compare;
        frames::successor(self.end).map(|next| self.from = next).is_some()
    }

    /// Goes on to the next range.
    pub fn next_range(&mut self) {
        self.ranges.pop_front();
        self.damaged.clear();
        self.mended.clear();
        self.looks = 0;
        self.step = Step::Check;
    }
}

impl Group {
    /// Is this node the primary of a group at rest: no replica lost or being made?
    pub(super) fn can_scrub(&self, call: &Call<'_>) -> bool {
        let Some(primary) = &self.primary else { return false };
        primary.is_active()
            && primary.settled
            && primary.learners.is_empty()
            && primary.members.iter().all(|member| member.synced)
            && !call.core.has_failed(self.replica.store)
    }

    pub(super) fn start_scrub(&mut self, call: &mut Call<'_>, order: ScrubOrder) {
        let Some(primary) = &mut self.primary else { return };
        primary.scrub = Some(Box::new(Scrub::new(order)));
        call.core.scrubber.running = Some(order);
        call.core.ticking.insert(self.id);
    }

    /// The scrub under way is not wanted any more, or this node leads the group no longer.
    pub(super) fn stop_scrub(&mut self, call: &mut Call<'_>) {
        let stopped = self.primary.as_mut().and_then(|primary| primary.scrub.take());
        if stopped.is_some() {
            call.core.scrubber.running = None;
        }
    }

    /// Moves the scrub on as far as it goes now.
    pub(super) fn go_on_scrubbing(&mut self, call: &mut Call<'_>) {
        let ready = self.can_scrub(call);
        let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) else { return };
        if !ready {
            let since_ns = *scrub.blocked_ns.get_or_insert(call.now_ns);
            if call.now_ns.saturating_sub(since_ns) >= BLOCKED_MAX_NS {
                self.stop_scrub(call);
            }
            return;
        }
        scrub.blocked_ns = None;
        while let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) {
            if scrub.is_silent(call.now_ns) {
                scrub.step_back();
            }
            let moved = match scrub.step {
                Step::Comparing { .. } | Step::Checking(_) => false,
                Step::Compare => self.begin_comparison(call),
                Step::Check if !scrub.ranges.is_empty() => self.begin_check(call),
                Step::Check => {
                    if !scrub.next_batch() {
                        return self.finish_scrub(call);
                    }
                    true
                }
            };
            if !moved {
                return;
            }
        }
    }

    /// Sends the digests of the next batch to the members; `false` when that has to wait.
    fn begin_comparison(&mut self, call: &mut Call<'_>) -> bool {
        // A write would make the view stale in its own turn: then the next tick looks again.
        let fresh = self.replica.is_view_fresh(call.core.turn);
        let applied = self.replica.applied == self.replica.acked;
        if !fresh || !applied || !call.core.grant_scrub(call.now_ns, COMPARE_BYTES) {
            return false;
        }
        let (own, acked) = (call.node(), self.replica.acked);
        let Some(primary) = &mut self.primary else { return false };
        let Some(scrub) = &mut primary.scrub else { return false };
        let list = scrub.begin_batch(call.stores.view(self.replica.store));
        let members = primary.members.iter().map(|member| member.node).filter(|node| *node != own);
        let waiting: Vec<NodeId> = members.collect();
        if waiting.is_empty() {
            scrub.end_comparison();
            return true;
        }
        let Some(mut buffer) = call.core.pool.alloc(size_of_val(list.as_slice())) else { return false };
        buffer.copy_from_slice(list.as_slice().as_bytes());
        let data = buffer.freeze();
        let number = call.core.fresh_token();
        let epoch = primary.epoch;
        for &node in &waiting {
            // The member answers from exactly this state.
            call.send(node, frames::numbered(Opcode::Commit, self.id, epoch, acked.0));
            let mut frame = frames::numbered(Opcode::Compare, self.id, epoch, number);
            frame.header.key = scrub.from;
            frame.data = Some(data.clone());
            call.send(node, frame);
        }
        scrub.step = Step::Comparing { number, since_ns: call.now_ns, waiting };
        true
    }

    /// A member's answer to a comparison; `false` when it is not one of a scrub.
    pub(super) fn on_scrub_compared(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) -> bool {
        let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) else {
            return false;
        };
        let Step::Comparing { number, waiting, .. } = &mut scrub.step else { return false };
        if *number != frame.header.request_id {
            return false;
        }
        let bytes: &[u8] = frame.data.as_deref().unwrap_or_default();
        let (None, Ok(list)) = (frame.header.status, BlockVersions::list(bytes)) else {
            // Nothing was counted of what it answers again, but of others: rare enough.
            scrub.step_back();
            return true;
        };
        let before = waiting.len();
        waiting.retain(|node| *node != from);
        if waiting.len() == before {
            return true;
        }
        let complete = waiting.is_empty();
        scrub.on_differing(from, list, frame.header.key);
        if complete {
            scrub.end_comparison();
            self.go_on_scrubbing(call);
        }
        true
    }

    /// The walk is over: replicas that surely lack writes are to be made anew, and the outcome is kept.
    fn finish_scrub(&mut self, call: &mut Call<'_>) {
        let Some(primary) = &mut self.primary else { return };
        let Some(mut scrub) = primary.scrub.take() else { return };
        let epoch = primary.epoch;
        for (node, found) in &scrub.differences {
            let (behind, unclear) = (found.behind, found.unclear);
            let rebuilt = behind > 0 && unclear == 0;
            tracing::error!(group = %self.id, %node, behind, unclear, rebuilt, "a replica differs from its primary's");
            if rebuilt {
                scrub.findings.rebuilt_replicas += 1;
                call.propose(self.id, epoch, *node, Change::Demote);
            }
        }
        let (order, findings) = (scrub.order, scrub.findings);
        tracing::info!(group = %self.id, deep = order.deep, ?findings, "the group is scrubbed");
        let counters = &mut call.core.counters;
        counters.scrubs += 1;
        counters.scrub_damaged_pages += findings.damaged_pages;
        counters.scrub_lost_pages += findings.lost_pages;
        counters.scrub_differences += findings.differences;
        call.core.scrubber.running = None;
        call.core.scrubber.outcomes.push(ScrubOutcome { order, findings });
    }
}

#[cfg(test)]
mod tests;
