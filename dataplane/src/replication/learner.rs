//! Learner: a replica that is being brought up to date, on its own side.
//!
//! It takes appends like any member from a start that the primary names, answers comparisons of versions and stores units pushed to it.
//! An acting member answers comparisons, too, for a scrub. The primary's sides are `resync` and `scrub`.
//!
//! Invariants
//! - A comparison is answered from exactly the state that the primary compared: every entry up to its `as_of` is
//!   applied and none behind it. So a difference is one, however many writes go on.
//! - A unit is stored after every entry up to its `as_of`, and before every later one of its pages.

use std::collections::VecDeque;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, NodeId, Seq, StoreId, Version};
use xsan_protocol::units::PAGES_PER_UNIT;
use xsan_protocol::wire::header::{Header, Opcode};
use xsan_protocol::wire::replication::{BlockDigest, BlockVersions, block_digest};
use zerocopy::IntoBytes;

use super::action::Action;
use super::call::{Call, Token};
use super::frames::{self, KEY_MAX};
use super::group::{Fence, Group, Role, refuse};
use crate::net::frame::{Frame, Meta};
use crate::store::{Record, StoreView};

/// Comparisons waiting for the journal; the primary has fewer than that under way.
const COMPARES_MAX: usize = 4;
/// Blocks in one CompareReply.
const BLOCKS_REPORTED_MAX: usize = 1024;
const BLOCKS_SCANNED: usize = 256;

const _: () =
    assert!(BLOCKS_REPORTED_MAX * size_of::<BlockVersions>() <= xsan_protocol::limits::FRAME_DATA_MAX);

#[derive(Debug, Default)]
pub(super) struct Learning {
    attempt: Option<u32>,
    starting: Option<Starting>,
    /// In order of arrival, with the entry up to which the state is to be applied.
    waiting: VecDeque<(NodeId, Seq, Frame)>,
}

/// LearnStart, until the journal has let go of the old tail.
#[derive(Debug)]
struct Starting {
    from: NodeId,
    header: Header,
    /// Nothing of the old tail is on its way there any more, and the store was offered the reset.
    is_reset: bool,
}

impl Learning {
    /// Does it take appends?
    pub fn is_started(&self) -> bool {
        self.attempt.is_some()
    }

    /// It is to act: it keeps what it has.
    pub fn forget_start(&mut self) {
        self.starting = None;
    }

    pub fn is_waiting(&self) -> bool {
        self.starting.is_some() || !self.waiting.is_empty()
    }
}

impl Group {
    pub(super) fn on_learn_start(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        if self.role != Role::Learner {
            return refuse(call, from, header, Code::ReplicaBehind);
        }
        let fence = self.fence.replace(Fence { epoch: header.epoch, primary: from });
        let same = fence.is_some_and(|fence| fence.epoch == header.epoch);
        let learning = self.learning.get_or_insert_default();
        let (_, attempt) = frames::learn_start_of(header);
        if same && learning.attempt == Some(attempt) {
            return answer_start(call, from, header);
        }
        let is_starting = |starting: &Starting| frames::learn_start_of(&starting.header).1 == attempt;
        if same && learning.starting.as_ref().is_some_and(is_starting) {
            return;
        }
        let starting = Starting { from, header: *header, is_reset: false };
        *learning = Learning { starting: Some(starting), ..Learning::default() };
        self.learn(call);
    }

    /// A comparison, which takes its turn, or a unit.
    pub(super) fn on_resync(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        let acked = self.replica.acked;
        let scrubbed = self.role == Role::Acting && is_compare(&frame);
        if scrubbed {
            self.learning.get_or_insert_default();
        }
        let Some(learning) = self.learning.as_mut().filter(|learning| learning.is_started() || scrubbed)
        else {
            return refuse(call, from, &frame.header, Code::ReplicaBehind);
        };
        if !is_compare(&frame) {
            return self.on_push(call, from, frame);
        }
        if learning.waiting.len() >= COMPARES_MAX {
            return refuse(call, from, &frame.header, Code::Busy);
        }
        learning.waiting.push_back((from, acked, frame));
        self.learn(call);
    }

    /// Does what of the waiting can be done now.
    pub(super) fn learn(&mut self, call: &mut Call<'_>) {
        self.maybe_start(call);
        while let Some(learning) = &mut self.learning {
            self.replica.apply_limit = learning.waiting.front().map(|(_, as_of, _)| *as_of);
            let Some((_, as_of, _)) = learning.waiting.front() else { break };
            let as_of = *as_of;
            if self.replica.durable < as_of {
                break;
            }
            self.replica.on_acked(call, as_of);
            if !self.replica.is_view_fresh(call.core.turn) {
                call.core.deferred.insert(self.id);
                return;
            }
            let Some((from, _, frame)) = learning.waiting.pop_front() else { break };
            self.on_compare(call, from, &frame);
        }
        self.replica.maybe_apply(call);
    }

    fn maybe_start(&mut self, call: &mut Call<'_>) {
        let Some(learning) = &mut self.learning else { return };
        if !self.replica.is_settled() {
            return;
        }
        let Some(starting) = &mut learning.starting else { return };
        let (after, attempt) = frames::learn_start_of(&starting.header);
        if !std::mem::replace(&mut starting.is_reset, true) {
            self.replica.reset(call, after);
            return self.restart_reports();
        }
        let Starting { from, header, .. } = *starting;
        learning.starting = None;
        learning.attempt = Some(attempt);
        answer_start(call, from, &header);
    }

    fn on_compare(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) {
        let header = &frame.header;
        let bytes: &[u8] = frame.data.as_deref().unwrap_or_default();
        let list = match BlockDigest::list(bytes) {
            Ok(list) if !list.is_empty() && list.is_sorted_by(|a, b| a.key() < b.key()) => list,
            _ => return refuse(call, from, header, Code::FrameInvalid),
        };
        let view = call.stores.view(self.replica.store);
        let (found, covered) = differing(view, self.id, header.key, list);
        let mut answer = frames::numbered(Opcode::CompareReply, self.id, header.epoch, header.request_id);
        answer.header.key = covered;
        if !found.is_empty() {
            let Some(mut buffer) = call.core.pool.alloc(found.len() * size_of::<BlockVersions>()) else {
                return refuse(call, from, header, Code::Busy);
            };
            buffer.copy_from_slice(found.as_slice().as_bytes());
            answer.data = Some(buffer.freeze());
        }
        call.send(from, answer);
    }

    /// A unit goes into the journal where it comes among the entries: behind those up to its `as_of`, before every later
    /// one of the unit, so that replay has them in this order, too.
    fn on_push(&mut self, call: &mut Call<'_>, from: NodeId, mut frame: Frame) {
        let header = frame.header;
        if self.replica.is_refused() {
            return refuse(call, from, &header, Code::Busy);
        }
        let pages = frames::pages_of(&header).filter(|pages| {
            usize::from(pages.count) == PAGES_PER_UNIT && pages.covers_unit(pages.first_unit())
        });
        let (Meta::Push(meta), Some(pages)) = (frame.meta, pages) else {
            return refuse(call, from, &header, Code::FrameInvalid);
        };
        let had_data = frame.data.is_some();
        let data = frames::page_data(&mut frame, pages);
        let is_blank = meta.version == Version::ZERO && meta.lost == 0;
        if had_data != data.is_some() || (data.is_none() && !is_blank) {
            return refuse(call, from, &header, Code::FrameInvalid);
        }
        if meta.as_of > self.replica.last.seq {
            return refuse(call, from, &header, Code::ReplicaBehind);
        }
        self.replica.on_acked(call, meta.as_of);
        let token = call.core.keep(Token::Pushed { group: self.id, to: from, header });
        self.replica.touch(call.core.turn);
        let store: StoreId = self.replica.store;
        let record = Record::Push {
            token,
            group: self.id,
            key: header.key,
            unit: pages.first_unit(),
            version: meta.version,
            as_of: meta.as_of,
            data,
            lost: meta.lost,
        };
        call.out.push(Action::Append { store, record });
    }
}

fn is_compare(frame: &Frame) -> bool {
    frame.header.opcode == Opcode::Compare
}

fn answer_start(call: &mut Call<'_>, to: NodeId, header: &Header) {
    let (after, attempt) = frames::learn_start_of(header);
    let answer = frames::learn_start(Opcode::LearnStartReply, header.group, header.epoch, after, attempt);
    call.send(to, answer);
}

/// Blocks from `first` to the last key of `list` whose versions differ from the list, and the key up to which that was found out:
/// less than asked when there are many.
fn differing(
    view: &dyn StoreView,
    group: xsan_protocol::ids::GroupId,
    first: BlockKey,
    list: &[BlockDigest],
) -> (Vec<BlockVersions>, BlockKey) {
    let end = list.last().map_or(KEY_MAX, BlockDigest::key);
    let mut found = Vec::new();
    let mut theirs = list.iter().peekable();
    let (mut own, mut after, mut exhausted) = (VecDeque::new(), frames::predecessor(first), false);
    loop {
        if own.is_empty() && !exhausted {
            let batch = view.blocks_after(group, after, BLOCKS_SCANNED);
            after = batch.last().map(|(key, _)| *key);
            exhausted = batch.len() < BLOCKS_SCANNED || after.is_some_and(|key| key >= end);
            own.extend(batch.into_iter().map(|(key, _)| key).take_while(|key| *key <= end));
        }
        let key = match (own.front().copied(), theirs.peek().map(|block| block.key())) {
            (Some(own), Some(their)) => own.min(their),
            (Some(key), None) | (None, Some(key)) => key,
            (None, None) => return (found, end),
        };
        if found.len() == BLOCKS_REPORTED_MAX {
            let covered = frames::predecessor(key).expect("keys were reported before this one");
            return (found, covered);
        }
        own.pop_front_if(|front| *front == key);
        let digest = theirs.next_if(|block| block.key() == key).map_or(0, BlockDigest::digest);
        let versions = view.unit_versions(group, key);
        if block_digest(&versions) != digest || versions.contains(&Version::UNKNOWN) {
            found.push(BlockVersions::new(key, &versions));
        }
    }
}
