//! Group: one placement group as this node takes part in it, and which of its roles an event belongs to.
//!
//! Used by `Replication`. The primary's part is in `primary`, `reads`, `peering`, `resync` and `scrub`, the learner's in
//! `learner`, everyone's in `replica` and `check`.
//!
//! Invariants
//! - `epoch` only grows; it is the map's.
//! - Between a new epoch of the map and the first Peer or LearnStart of it, frames of the old epoch's primary are still
//!   taken: a member is fenced by its own answer, so nothing that it vouched for before is missing from that answer.

use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, NodeId, Seq, Version};
use xsan_protocol::map;
use xsan_protocol::mutation::Mutation;
use xsan_protocol::units::PAGE_SIZE;
use xsan_protocol::wire::header::{Header, Opcode, flags};
use xsan_protocol::wire::replication::PeerInfo;

use super::call::{Call, Core, ReadJob, ReadPurpose, Token};
use super::flush::FlushWaiter;
use super::frames;
use super::learner::Learning;
use super::primary::Primary;
use super::replica::Replica;
use crate::disk::buffers::BufferMut;
use crate::net::frame::{Frame, Meta};
use crate::store::{Entry, ReadError, ReadPages};

/// Frames of a newer epoch kept until the map arrives; a primary sends few before it is answered.
const EARLY_FRAMES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    None,
    Learner,
    Acting,
    Primary,
}

/// Whom this member follows: the primary that it answered last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fence {
    pub epoch: Epoch,
    pub primary: NodeId,
}

#[derive(Debug)]
pub(super) struct Group {
    pub id: GroupId,
    pub epoch: Epoch,
    pub role: Role,
    /// The primary of `epoch`.
    pub leader: Option<NodeId>,
    pub fence: Option<Fence>,
    /// What was last reported to the primary that this member follows.
    reported: Seq,
    /// A gap or an overflow was reported; the primary peers again.
    broken: bool,
    pub replica: Replica,
    pub learning: Option<Learning>,
    pub primary: Option<Box<Primary>>,
}

impl Group {
    pub fn new(id: GroupId, replica: Replica) -> Self {
        Self {
            id,
            epoch: Epoch(0),
            role: Role::None,
            leader: None,
            fence: None,
            reported: Seq(0),
            broken: false,
            replica,
            learning: None,
            primary: None,
        }
    }

    /// The map has the group at a newer epoch, or this node has a part in it for the first time.
    pub fn on_map(&mut self, call: &mut Call<'_>, group: &map::Group, min_replicas: u8) {
        assert!(group.epoch > self.epoch);
        let member = group.member(call.node()).filter(|member| {
            member.incarnation == call.core.incarnation && member.store == self.replica.store
        });
        let role = match member {
            None => Role::None,
            Some(member) if member.learner => Role::Learner,
            Some(member) if group.primary == Some(member.node) => Role::Primary,
            Some(_) => Role::Acting,
        };
        let continues =
            role == Role::Primary && self.role == Role::Primary && group.epoch == self.epoch.next();
        self.unsend_all(call);
        if self.role == Role::Primary && !continues {
            self.abdicate(call);
        }
        self.epoch = group.epoch;
        self.role = role;
        self.leader = group.primary;
        if role != Role::Learner
            && let Some(learning) = &mut self.learning
        {
            learning.forget_start();
        }
        if matches!(role, Role::None | Role::Primary) {
            self.fence = None;
            self.stop_learning(call);
        }
        if role == Role::Primary {
            self.reign(call, group, min_replicas, continues);
        }
        self.give_up_failed(call.core);
        self.replica.maybe_sync(call);
        call.core.ticking.insert(self.id);
    }

    /// The replica acts from here on, or may later be asked for what it has. While it learnt, nobody waited for that when clients flushed, and
    /// that pushed units are missing could not be told from its journal's end: it vouches for all that once it is on stable media.
    fn stop_learning(&mut self, call: &mut Call<'_>) {
        let acted = self.learning.take().is_none_or(|learning| !learning.is_started());
        if !acted && !Mutation::PromotedUnflushed.is_on() {
            self.replica.sync_all(call);
        }
        self.replica.apply_limit = None;
    }

    /// Nobody asks for what a replica on a failed store had in memory once it is no member; others need the memory.
    pub fn give_up_failed(&mut self, core: &Core) {
        if self.role == Role::None && core.has_failed(self.replica.store) {
            self.replica.discard();
        }
    }

    /// Does it lead an epoch that the control plane has not settled?
    pub fn is_unsettled(&self) -> bool {
        self.primary.as_ref().is_some_and(|primary| !primary.settled)
    }

    pub fn on_frame(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        match frame.header.opcode {
            Opcode::Append
            | Opcode::Commit
            | Opcode::Peer
            | Opcode::Fetch
            | Opcode::MemberFlush
            | Opcode::LearnStart
            | Opcode::Compare
            | Opcode::Push
            | Opcode::FetchPages
            | Opcode::Check
            | Opcode::Mend => self.on_command(call, from, frame),
            _ => self.on_answer(call, from, frame),
        }
    }

    /// A frame from the primary to this member.
    fn on_command(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        let header = frame.header;
        if Mutation::OldEpochFollowed.is_on() && self.role != Role::None {
            self.fence = Some(Fence { epoch: header.epoch, primary: from });
        }
        let follows = self.fence.is_some_and(|fence| fence.epoch == header.epoch && fence.primary == from);
        if !follows {
            if header.epoch > self.epoch {
                return hold_early(call, from, frame);
            }
            if header.epoch < self.epoch {
                return refuse(call, from, &header, Code::StaleEpoch);
            }
            if self.role == Role::None || self.leader != Some(from) {
                return refuse(call, from, &header, Code::NotPrimary);
            }
            if !matches!(header.opcode, Opcode::Peer | Opcode::LearnStart) {
                return refuse(call, from, &header, Code::ReplicaBehind);
            }
        }
        if call.core.has_failed(self.replica.store) {
            return refuse(call, from, &header, Code::StoreFailed);
        }
        match header.opcode {
            Opcode::Append => self.on_append(call, from, frame),
            Opcode::Commit => self.on_commit(call, Seq(header.request_id)),
            Opcode::Peer => self.on_peer(call, from, &header),
            Opcode::Fetch => self.on_fetch(call, from, &frame),
            Opcode::MemberFlush => {
                let Header { epoch, request_id, .. } = header;
                let waiter = FlushWaiter::Member { group: self.id, epoch, to: from, request_id };
                call.flush(self.replica.store, waiter);
            }
            Opcode::LearnStart => self.on_learn_start(call, from, &header),
            Opcode::Compare | Opcode::Push => self.on_resync(call, from, frame),
            Opcode::FetchPages => self.on_fetch_pages(call, from, &header),
            Opcode::Check => self.on_check(call, from, &header),
            Opcode::Mend => self.on_mend(call, from, frame),
            _ => unreachable!("on_frame passes these opcodes only"),
        }
    }

    fn on_append(&mut self, call: &mut Call<'_>, from: NodeId, frame: Frame) {
        let header = frame.header;
        let sync = header.flags & flags::FUA != 0;
        let entry = match frames::entry_of(frame) {
            Ok(entry) => entry,
            Err(code) => return refuse(call, from, &header, code),
        };
        let (seq, last) = (entry.version.seq, self.replica.last);
        if seq <= last.seq {
            self.replica.on_acked(call, entry.acked);
            return self.report(call, true);
        }
        if seq != last.seq.next() || !self.replica.takes_entries() {
            if !std::mem::replace(&mut self.broken, true) {
                tracing::warn!(group = %self.id, %from, %seq, last = %last, "an append came out of order");
                refuse(call, from, &header, Code::ReplicaBehind);
            }
            return;
        }
        let of_another_past = entry.version.epoch < last.epoch && !Mutation::OldEpochFollowed.is_on();
        if of_another_past || entry.version.epoch > header.epoch {
            return refuse(call, from, &header, Code::FrameInvalid);
        }
        if self.role == Role::Learner && !self.has_room_for(call, &entry) {
            return refuse(call, from, &header, Code::StorageFull);
        }
        let acked = entry.acked;
        self.replica.on_append(call, entry, sync);
        self.replica.on_acked(call, acked);
        self.replica.trim(call.core.turn, Seq(u64::MAX));
    }

    fn on_commit(&mut self, call: &mut Call<'_>, acked: Seq) {
        self.replica.on_acked(call, acked);
        call.core.ticking.insert(self.id);
    }

    fn on_peer(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let resumes = self.role == Role::Learner
            && self.fence.is_some_and(|fence| fence.epoch == header.epoch)
            && self.learning.as_ref().is_some_and(Learning::is_started);
        if self.role != Role::Acting && !resumes {
            return refuse(call, from, header, Code::ReplicaBehind);
        }
        if resumes && self.replica.is_late(call.now_ns) {
            return refuse(call, from, header, Code::Busy);
        }
        if !resumes {
            self.stop_learning(call);
        }
        self.fence = Some(Fence { epoch: header.epoch, primary: from });
        self.broken = false;
        self.reported = self.replica.vouched();
        let mut answer = frames::numbered(Opcode::PeerInfo, self.id, header.epoch, header.request_id);
        answer.header.flags = self.room(call);
        answer.meta = Meta::PeerInfo(PeerInfo {
            last: self.replica.last,
            durable: self.reported,
            acked: self.replica.acked,
        });
        call.send(from, answer);
    }

    /// The new primary lacks entries that this member has.
    fn on_fetch(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) {
        let header = frame.header;
        let Meta::Fetch(meta) = frame.meta else { return refuse(call, from, &header, Code::FrameInvalid) };
        if !self.replica.has_from(meta.from) || meta.to > self.replica.last.seq {
            return refuse(call, from, &header, Code::ReplicaBehind);
        }
        let acked = self.replica.acked;
        for entry in self.replica.entries_from(meta.from).take_while(|entry| entry.version.seq <= meta.to) {
            call.send(from, frames::of_entry(Opcode::FetchReply, entry, header.epoch, acked, true));
        }
    }

    /// The primary's own copy is damaged.
    fn on_fetch_pages(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let pages = frames::pages_of(header);
        let Some(pages) = pages.filter(|pages| pages.bytes() <= xsan_protocol::limits::FRAME_DATA_MAX) else {
            return refuse(call, from, header, Code::FrameInvalid);
        };
        let purpose = ReadPurpose::Serve { to: from, header: *header };
        let job = ReadJob { group: self.id, reign: 0, key: header.key, pages, purpose, attempt: 0 };
        if !call.read(self.replica.store, job) {
            refuse(call, from, header, Code::Busy);
        }
    }

    /// Answers FetchPages with what the store read.
    pub fn serve_pages(
        &mut self,
        call: &mut Call<'_>,
        to: NodeId,
        header: &Header,
        result: Result<ReadPages, ReadError>,
    ) {
        let read = match result {
            Ok(read) => read,
            Err(ReadError::Damaged { buffer, damaged, expected }) => without(buffer, &damaged, &expected),
            Err(ReadError::Failed) => return refuse(call, to, header, Code::StoreFailed),
        };
        let mut answer = frames::numbered(Opcode::FetchPagesReply, self.id, header.epoch, header.request_id);
        (answer.header.key, answer.header.offset, answer.header.length) =
            (header.key, header.offset, header.length);
        (answer.data, answer.checksums) = (Some(read.buffer.freeze()), Some(read.checksums));
        call.send(to, answer);
    }

    /// The store has everything up to `seq` in its journal.
    pub fn on_durable(&mut self, call: &mut Call<'_>, seq: Seq) {
        self.replica.on_durable(call, seq);
        self.on_vouched(call);
    }

    /// The journal has let go of what the replica dropped.
    pub fn on_reset(&mut self, call: &mut Call<'_>) {
        self.replica.on_reset();
        self.learn(call);
    }

    /// What the replica vouches for may have grown.
    pub fn on_vouched(&mut self, call: &mut Call<'_>) {
        if self.primary.is_some() {
            self.on_own_durable(call);
        } else {
            self.report(call, false);
            self.learn(call);
        }
    }

    /// Tells the primary what is durable here, if that is news or it asked again.
    fn report(&mut self, call: &mut Call<'_>, again: bool) {
        let Some(fence) = self.fence else { return };
        let vouched = self.replica.vouched();
        if vouched > self.reported || again {
            self.reported = vouched;
            let mut answer = frames::numbered(Opcode::AppendOk, self.id, fence.epoch, vouched.0);
            answer.header.flags = self.room(call);
            call.send(fence.primary, answer);
        }
    }

    /// Is there room for the entry in a learner's store? What an acting member is sent has its place in the order, and is
    /// taken whatever it costs; a learner begins anew, and is asked again now and then.
    fn has_room_for(&self, call: &Call<'_>, entry: &Entry) -> bool {
        let view = call.stores.view(self.replica.store);
        entry.data.is_none() || view.has_room(self.id, entry.key, entry.pages)
    }

    /// Tells the primary whether the store here has room for new places.
    fn room(&self, call: &Call<'_>) -> u16 {
        if call.stores.view(self.replica.store).is_full() { flags::STORE_FULL } else { 0 }
    }

    /// What a learner holds in memory, and whether its journal is late with it.
    pub fn learner_holds(&self, now_ns: u64) -> Option<(usize, bool)> {
        let learner = self.role == Role::Learner && self.replica.takes_entries();
        learner.then(|| (self.replica.held_bytes(), self.replica.is_late(now_ns)))
    }

    /// What was sent to this learner and is not on its way to the device is gone: the primary sends it again, or begins anew.
    pub fn on_withdrawn(&mut self, call: &mut Call<'_>, last: Version) {
        if last == self.replica.last {
            return;
        }
        tracing::warn!(group = %self.id, %last, had = %self.replica.last, "a late learner forgets what its device has not taken");
        self.replica.on_withdrawn(last);
        if let Some(Fence { epoch, primary }) = self.fence
            && !std::mem::replace(&mut self.broken, true)
        {
            let header = frames::frame(Opcode::Append, self.id, epoch).header;
            refuse(call, primary, &header, Code::Busy);
        }
    }

    /// This node starts anew as a learner: nothing was reported yet.
    pub fn restart_reports(&mut self) {
        self.reported = self.replica.last.seq;
        self.broken = false;
    }

    pub fn on_tick(&mut self, call: &mut Call<'_>) {
        self.replica.retry_refused(call);
        if self.primary.is_some() {
            self.on_primary_tick(call);
        } else {
            self.learn(call);
            self.replica.trim(call.core.turn, Seq(u64::MAX));
            self.replica.watch(call.now_ns);
        }
        let busy = match &self.primary {
            Some(primary) => primary.is_busy(self.replica.acked) || self.replica.is_busy(),
            None => self.replica.is_busy() || self.learning.as_ref().is_some_and(Learning::is_waiting),
        };
        if !busy {
            call.core.ticking.remove(&self.id);
        }
    }

    /// Goes on with what had to wait for the store to show an earlier decision.
    pub fn on_deferred(&mut self, call: &mut Call<'_>) {
        if self.primary.is_some() {
            self.on_progress(call);
        } else {
            self.learn(call);
        }
    }
}

/// Refuses a frame of the primary with a code, when its family has an answer.
pub(super) fn refuse(call: &mut Call<'_>, to: NodeId, header: &Header, code: Code) {
    if !matches!(code, Code::StaleEpoch | Code::Busy | Code::StorageFull) {
        tracing::warn!(group = %header.group, from = %to, opcode = ?header.opcode, ?code, "frame refused");
        call.core.counters.frames_refused += 1;
    }
    if let Some(frame) = frames::refusal(header, code) {
        call.send(to, frame);
    }
}

/// Keeps a frame of an epoch that the map has not reached, within bounds.
pub(super) fn hold_early(call: &mut Call<'_>, from: NodeId, frame: Frame) {
    let worth = matches!(frame.header.opcode, Opcode::Peer | Opcode::LearnStart);
    if worth && call.core.early.len() < EARLY_FRAMES_MAX {
        // A primary repeats itself until it is answered: the newest of a kind is enough.
        let same = |(node, held): &(NodeId, Frame)| {
            *node == from
                && held.header.group == frame.header.group
                && held.header.opcode == frame.header.opcode
        };
        match call.core.early.iter_mut().find(|held| same(held)) {
            Some(held) => held.1 = frame,
            None => call.core.early.push((from, frame)),
        }
    } else {
        refuse(call, from, &frame.header, Code::Busy);
    }
}

/// A learner's unit is in its journal.
pub(super) fn answer_push(call: &mut Call<'_>, token: u64, code: Option<Code>) {
    let Some(Token::Pushed { group, to, header }) = call.core.take(token) else { return };
    let mut answer = frames::numbered(Opcode::PushReply, group, header.epoch, header.request_id);
    (answer.header.key, answer.header.offset, answer.header.status) = (header.key, header.offset, code);
    call.send(to, answer);
}

/// What was read, with zeroes for the damaged pages: the others may be all that is asked for. The primary takes no page that has
/// another checksum than it expects.
pub(super) fn without(mut buffer: BufferMut, damaged: &[u16], expected: &[u32]) -> ReadPages {
    let mut checksums = expected.to_vec();
    for index in damaged.iter().map(|index| usize::from(*index)) {
        let page = &mut buffer[index * PAGE_SIZE..(index + 1) * PAGE_SIZE];
        page.fill(0);
        checksums[index] = crc32c(page);
    }
    ReadPages { buffer, checksums: checksums.into() }
}
