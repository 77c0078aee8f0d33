//! Reads at the primary: for clients, for merging parts of pages, for pushing units and for scrubs; and the mending of damaged pages.
//!
//! A page that does not match its checksum is fetched from another replica, accepted only when it has the checksum that
//! this store expects, and written back. Used by `group`, `primary` and `resync`.
//!
//! Invariants
//! - What a client gets was read under a lease that holds when it is answered, in one reign of this primary.
//! - No page is returned or merged that does not match its checksum. One that nobody has is pushed as lost, under the
//!   checksum that it should have.

use std::sync::Arc;

use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, NodeId, Seq, Version};
use xsan_protocol::limits::FRAME_DATA_MAX;
use xsan_protocol::units::{PAGE_SIZE, PageRange};
use xsan_protocol::wire::header::{Header, Opcode};
use xsan_protocol::wire::replication::PushMeta;

use super::action::{Action, Operation, Reply, Request, RequestId};
use super::call::{Call, MendJob, Merge, ReadJob, ReadPurpose, Token};
use super::frames;
use super::group::{Group, Role, without};
use super::pace::Work;
use super::primary::{MergeLock, Waiting};
use super::status::Stage;
use crate::disk::buffers::BufferMut;
use crate::net::frame::Frame;
use crate::store::{PageData, ReadError, ReadPages};

/// Reads of the store for one request: a page may be overwritten while its older content is being mended.
const READ_ATTEMPTS_MAX: u8 = 3;
/// Reads under way because destage met damage. What it meets beyond, it meets again, some times; then reads and scrubs do.
const MENDS_MAX: usize = 32;

impl Group {
    fn reign_now(&self) -> u64 {
        self.primary.as_ref().map_or(0, |primary| primary.reign)
    }

    /// Does the store hold nothing in these pages, neither now nor once it applies what it was told to?
    fn is_empty(&self, call: &Call<'_>, key: BlockKey, pages: PageRange) -> bool {
        let view = call.stores.view(self.replica.store);
        let empty = |unit: u8| view.unit_version(self.id, key, unit) == Version::ZERO;
        let mut unseen =
            self.replica.unseen(call.core.turn).take_while(|entry| entry.version.seq <= self.replica.applied);
        pages.units().all(empty) && !unseen.any(|entry| entry.key == key && entry.pages.overlaps(pages))
    }

    pub(super) fn start_read(
        &mut self,
        call: &mut Call<'_>,
        request: RequestId,
        key: BlockKey,
        pages: PageRange,
    ) {
        call.core.counters.reads += 1;
        if self.is_empty(call, key, pages) {
            return self.answer_read(call, request, Reply::Data(None));
        }
        let purpose = ReadPurpose::Client { request, started_ns: call.now_ns };
        let job = ReadJob { group: self.id, reign: self.reign_now(), key, pages, purpose, attempt: 1 };
        if !call.read(self.replica.store, job) {
            call.complete(request, Err(Code::Busy));
        }
    }

    /// What was read is answered under the lease or not at all: later it may be the past.
    fn answer_read(&mut self, call: &mut Call<'_>, request: RequestId, reply: Reply) {
        let result = if call.has_lease() { Ok(reply) } else { Err(Code::LeaseEnded) };
        call.complete(request, result);
    }

    pub(super) fn answer_status(
        &mut self,
        call: &mut Call<'_>,
        request: RequestId,
        key: BlockKey,
        pages: PageRange,
    ) {
        let mut flags = call.stores.view(self.replica.store).allocated(self.id, key, pages);
        let unseen = self.replica.unseen(call.core.turn);
        let applied = unseen.take_while(|entry| entry.version.seq <= self.replica.applied);
        for entry in applied.filter(|entry| entry.key == key && entry.pages.overlaps(pages)) {
            for page in pages.pages().filter(|page| entry.pages.contains(*page)) {
                flags[usize::from(page - pages.first)] = entry.data.is_some();
            }
        }
        self.answer_read(call, request, Reply::Status(flags));
    }

    /// Begins a write of part of a page: nothing else starts on the page until it has its place in the order.
    pub(super) fn start_merge(&mut self, call: &mut Call<'_>, key: BlockKey, pages: PageRange, merge: Merge) {
        let request = merge.request;
        if self.is_empty(call, key, pages) {
            let Some(mut buffer) = call.core.pool.alloc(PAGE_SIZE) else {
                return call.complete(request, Err(Code::Busy));
            };
            buffer.fill(0);
            return self.finish_merge(call, key, pages, merge, buffer);
        }
        let purpose = ReadPurpose::Merge(merge);
        let job = ReadJob { group: self.id, reign: self.reign_now(), key, pages, purpose, attempt: 1 };
        if !call.read(self.replica.store, job) {
            return call.complete(request, Err(Code::Busy));
        }
        if let Some(primary) = &mut self.primary {
            primary.merges.push(MergeLock { request, key, pages });
        }
    }

    /// The page is there: puts the sectors into it, and goes on as a write of the whole page.
    fn finish_merge(
        &mut self,
        call: &mut Call<'_>,
        key: BlockKey,
        pages: PageRange,
        merge: Merge,
        mut buffer: BufferMut,
    ) {
        let Some(primary) = &mut self.primary else { return };
        let start = merge.offset as usize % PAGE_SIZE;
        buffer[start..start + merge.bytes.len()].copy_from_slice(&merge.bytes);
        let checksums = Arc::from([crc32c(&buffer)]);
        let data = PageData { bytes: buffer.freeze(), checksums };
        if primary.is_active() {
            return self.on_write(call, merge.request, key, pages, Some(data), merge.fua, merge.durability);
        }
        // A new epoch began meanwhile. At the head of the queue the write keeps its place before all that waited for it.
        let operation = Operation::Write { key, pages, data, fua: merge.fua };
        let request = Request {
            id: merge.request,
            group: self.id,
            epoch: primary.epoch,
            durability: merge.durability,
            operation,
        };
        primary.waiting.push_front(Waiting { request, after: Seq(0) });
    }

    pub(super) fn on_read_done(
        &mut self,
        call: &mut Call<'_>,
        job: ReadJob,
        result: Result<ReadPages, ReadError>,
    ) {
        match &job.purpose {
            ReadPurpose::Serve { to, header } => return self.serve_pages(call, *to, header, result),
            ReadPurpose::Check { to, header, versions } => {
                return self.answer_check(call, (*to, header), (job.pages, versions), result);
            }
            _ => {}
        }
        if job.reign != self.reign_now() {
            return self.fail_read(call, job, Code::NotPrimary);
        }
        match result {
            Ok(read) => self.finish_read(call, job, read),
            Err(ReadError::Failed) => self.fail_read(call, job, Code::StoreFailed),
            Err(ReadError::Damaged { buffer, damaged, expected }) => {
                self.start_mending(call, job, buffer, damaged, expected)
            }
        }
    }

    fn finish_read(&mut self, call: &mut Call<'_>, job: ReadJob, read: ReadPages) {
        let ReadJob { key, pages, .. } = job;
        match job.purpose {
            ReadPurpose::Client { request, started_ns } => {
                call.sample(Stage::Read, started_ns);
                call.core.pace.add(call.now_ns, Work::Read, call.now_ns.saturating_sub(started_ns));
                let data = PageData { bytes: read.buffer.freeze(), checksums: read.checksums };
                self.answer_read(call, request, Reply::Data(Some(data)));
            }
            ReadPurpose::Merge(merge) => {
                // Without its lock, it was answered or fenced meanwhile.
                if self.release_merge(merge.request) {
                    self.finish_merge(call, key, pages, merge, read.buffer);
                    self.on_progress(call);
                }
            }
            ReadPurpose::Push { learner, attempt, unit, version, as_of } => {
                let data = PageData { bytes: read.buffer.freeze(), checksums: read.checksums };
                let meta = PushMeta { version, as_of, lost: 0 };
                self.send_push(call, (learner, attempt), (key, unit), meta, Some(data));
                self.on_progress(call);
            }
            ReadPurpose::Scrub { check, damaged } => {
                let data = PageData { bytes: read.buffer.freeze(), checksums: read.checksums };
                self.on_check_read(call, check, data, damaged, Vec::new());
            }
            ReadPurpose::Mend { at } if at != call.node() => {
                let mut frame = frames::about(Opcode::Mend, self.id, self.epoch, key, pages);
                (frame.data, frame.checksums) = (Some(read.buffer.freeze()), Some(read.checksums));
                call.send(at, frame);
            }
            // Its own pages were mended when they were read.
            ReadPurpose::Mend { .. } => {}
            ReadPurpose::Serve { .. } | ReadPurpose::Check { .. } | ReadPurpose::Dropped => {}
        }
    }

    fn release_merge(&mut self, request: RequestId) -> bool {
        let Some(primary) = &mut self.primary else { return false };
        let before = primary.merges.len();
        primary.merges.retain(|lock| lock.request != request);
        primary.merges.len() < before
    }

    fn fail_read(&mut self, call: &mut Call<'_>, job: ReadJob, code: Code) {
        let current = job.reign == self.reign_now();
        match job.purpose {
            ReadPurpose::Client { request, .. } => call.complete(request, Err(code)),
            ReadPurpose::Merge(merge) => {
                // Without its lock, it was answered or fenced when the reign or the service ended.
                if current && self.release_merge(merge.request) {
                    call.complete(merge.request, Err(code));
                }
            }
            ReadPurpose::Push { learner, attempt, unit, .. } if current => {
                self.drop_push(call, (learner, attempt), (job.key, unit));
            }
            ReadPurpose::Scrub { .. } if current => self.look_again(call),
            ReadPurpose::Push { .. }
            | ReadPurpose::Scrub { .. }
            | ReadPurpose::Mend { .. }
            | ReadPurpose::Dropped => {}
            ReadPurpose::Serve { .. } | ReadPurpose::Check { .. } => {
                unreachable!("on_read_done answers these")
            }
        }
        if current {
            self.on_progress(call);
        }
    }

    /// Destage met damaged pages here. The primary mends its own like any that it reads; a member asks it for them.
    pub(super) fn on_destage_damaged(&mut self, call: &mut Call<'_>, key: BlockKey, pages: PageRange) {
        let follows = self.fence.filter(|fence| fence.epoch == self.epoch);
        match (self.role, follows) {
            (Role::Primary, _) => self.mend_at(call, call.node(), key, pages),
            (Role::Acting | Role::Learner, Some(fence)) => {
                call.send(fence.primary, frames::about(Opcode::Damaged, self.id, self.epoch, key, pages));
            }
            // Whom to ask is not known yet.
            (Role::Acting | Role::Learner | Role::None, _) => {}
        }
    }

    /// A member tells of damaged pages there.
    pub(super) fn on_damaged(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let is_member = self.primary.as_ref().is_some_and(|primary| {
            primary.members.iter().any(|member| member.node == from)
                || primary.learners.iter().any(|learner| learner.node == from)
        });
        let pages = frames::pages_of(header).filter(|pages| pages.bytes() <= FRAME_DATA_MAX);
        if let Some(pages) = pages.filter(|_| is_member) {
            self.mend_at(call, from, header.key, pages);
        }
    }

    /// Reads what is damaged at `node`, to mend it there.
    fn mend_at(&mut self, call: &mut Call<'_>, node: NodeId, key: BlockKey, pages: PageRange) {
        let is_active = self.primary.as_ref().is_some_and(|primary| primary.is_active());
        if !is_active || call.core.mends() >= MENDS_MAX {
            return;
        }
        let purpose = ReadPurpose::Mend { at: node };
        let job = ReadJob { group: self.id, reign: self.reign_now(), key, pages, purpose, attempt: 1 };
        call.read(self.replica.store, job);
    }

    fn start_mending(
        &mut self,
        call: &mut Call<'_>,
        mut job: ReadJob,
        buffer: BufferMut,
        damaged: Vec<u16>,
        expected: Arc<[u32]>,
    ) {
        let damaged: Vec<u16> = damaged.into_iter().map(|index| job.pages.first + index).collect();
        if let ReadPurpose::Scrub { damaged: told, .. } = &mut job.purpose {
            // Of every attempt: what was mended in one is sound in the next.
            let news: Vec<u16> = damaged.iter().copied().filter(|page| !told.contains(page)).collect();
            told.extend(news);
        }
        tracing::warn!(
            group = %self.id, block = %job.key, pages = ?damaged,
            "stored pages do not match their checksums, asking another replica"
        );
        let (asked, tried, is_unsure) = (NodeId(0), Vec::new(), false);
        let mend = MendJob { read: job, buffer, damaged, expected, asked, tried, is_unsure };
        self.go_on_mending(call, mend);
    }

    /// Who was asked will not answer, or not in this epoch.
    pub(super) fn on_unanswered_mend(&mut self, call: &mut Call<'_>, mend: MendJob) {
        self.go_on_mending(call, MendJob { is_unsure: true, ..mend });
    }

    /// Asks the next member for the damaged pages, once the last one answered or is gone; or gives up.
    fn go_on_mending(&mut self, call: &mut Call<'_>, mut mend: MendJob) {
        if mend.read.reign != self.reign_now() {
            return self.fail_read(call, mend.read, Code::NotPrimary);
        }
        if mend.damaged.is_empty() {
            let read = ReadPages { buffer: mend.buffer, checksums: mend.expected };
            return self.finish_read(call, mend.read, read);
        }
        let Some(primary) = &self.primary else { return };
        let own = call.node();
        let members = primary.members.iter().filter(|member| member.synced && member.node != own);
        let learners = primary.learners.iter().filter(|learner| learner.is_running());
        // A learner's page is as good when it has the checksum; it may be the only other copy.
        let mut nodes = members.map(|member| member.node).chain(learners.map(|learner| learner.node));
        let Some(next) = nodes.find(|node| !mend.tried.contains(node)) else {
            return self.give_up_mending(call, mend);
        };
        let epoch = primary.epoch;
        // The newest entry of a unit that is pushed: who has that, shows the unit as it is, since nobody writes it meanwhile.
        let needed = match mend.read.purpose {
            ReadPurpose::Push { version, as_of, .. } if version == Version::UNKNOWN => as_of,
            ReadPurpose::Push { version, .. } => version.seq,
            _ => Seq(0),
        };
        let learner = primary.learners.iter().find(|learner| learner.node == next);
        let member = primary.quorum.as_ref().and_then(|quorum| quorum.durable(next));
        mend.is_unsure |= learner.map(|learner| learner.durable).or(member).is_some_and(|has| has < needed);
        mend.asked = next;
        mend.tried.push(next);
        let (key, pages) = (mend.read.key, mend.read.pages);
        let number = call.core.keep(Token::Mend(mend));
        // The member must have applied what this store had when it read.
        call.send(next, frames::numbered(Opcode::Commit, self.id, epoch, self.replica.acked.0));
        let mut ask = frames::about(Opcode::FetchPages, self.id, epoch, key, pages);
        ask.header.request_id = number;
        call.send(next, ask);
    }

    fn give_up_mending(&mut self, call: &mut Call<'_>, mend: MendJob) {
        let MendJob { mut read, mut buffer, damaged, expected, is_unsure, .. } = mend;
        if read.attempt < READ_ATTEMPTS_MAX && !matches!(read.purpose, ReadPurpose::Dropped) {
            // The others may hold newer content of these pages, which this store has by now.
            read.attempt += 1;
            return call.read_into(self.replica.store, read, buffer);
        }
        let own = call.node();
        let all_asked = self
            .primary
            .as_ref()
            .is_some_and(|primary| primary.members.iter().all(|member| member.node == own || member.synced));
        if matches!(read.purpose, ReadPurpose::Push { .. }) && (is_unsure || !all_asked) {
            // What is pushed as lost would overwrite the page where it is.
            return self.fail_read(call, read, Code::Busy);
        }
        tracing::error!(group = %self.id, block = %read.key, pages = ?damaged, "no replica has undamaged pages");
        call.core.counters.reads_lost += u64::from(!matches!(read.purpose, ReadPurpose::Mend { .. }));
        let lost: Vec<u16> = damaged.iter().map(|page| page - read.pages.first).collect();
        match read.purpose {
            // The learner gets all the rest, and meets the loss as this replica does: else nobody would ever be made of it.
            ReadPurpose::Push { learner, attempt, unit, version, as_of } => {
                let mut mask = 0;
                for page in lost.into_iter().map(usize::from) {
                    buffer[page * PAGE_SIZE..(page + 1) * PAGE_SIZE].fill(0);
                    mask |= 1 << page;
                }
                let data = PageData { bytes: buffer.freeze(), checksums: expected };
                let meta = PushMeta { version, as_of, lost: mask };
                self.send_push(call, (learner, attempt), (read.key, unit), meta, Some(data));
                self.on_progress(call);
            }
            // The others of these pages are sound: they can be compared, and mend those of members.
            ReadPurpose::Scrub { check, damaged: mut told } => {
                told.retain(|page| !damaged.contains(page));
                let data = PageData { bytes: buffer.freeze(), checksums: expected };
                self.on_check_read(call, check, data, told, lost);
            }
            ReadPurpose::Mend { .. } => self.finish_read(call, read, without(buffer, &lost, &expected)),
            _ => self.fail_read(call, read, Code::ChecksumMismatch),
        }
    }

    /// A member's pages, or its refusal.
    pub(super) fn on_pages(&mut self, call: &mut Call<'_>, from: NodeId, mut frame: Frame) {
        let number = frame.header.request_id;
        let mut mend = match call.core.take(number) {
            Some(Token::Mend(mend)) if mend.read.group == self.id && mend.asked == from => mend,
            Some(other) => return call.core.put_back(number, other),
            None => return,
        };
        match frames::page_data(&mut frame, mend.read.pages) {
            Some(data) if frame.header.status.is_none() => self.mend(call, from, &mut mend, &data),
            _ => mend.is_unsure = true,
        }
        self.go_on_mending(call, mend);
    }

    /// Takes those of the member's pages that are what this store should have.
    fn mend(&mut self, call: &mut Call<'_>, from: NodeId, mend: &mut MendJob, data: &PageData) {
        let pages = mend.read.pages;
        let index = |page: u16| usize::from(page - pages.first);
        let good = |page: &u16| data.checksums[index(*page)] == mend.expected[index(*page)];
        let mended: Vec<u16> = mend.damaged.iter().copied().filter(good).collect();
        mend.damaged.retain(|page| !mended.contains(page));
        for &page in &mended {
            let bytes = index(page) * PAGE_SIZE..(index(page) + 1) * PAGE_SIZE;
            mend.buffer[bytes.clone()].copy_from_slice(&data.bytes[bytes]);
        }
        tracing::warn!(
            group = %self.id, block = %mend.read.key, pages = ?mended, node = %from,
            "damaged pages replaced with another replica's"
        );
        call.core.counters.pages_mended += mended.len() as u64;
        for run in mended.chunk_by(|a, b| *a + 1 == *b) {
            let range = PageRange::new(run[0], run.len() as u16);
            let (first, end) = (index(range.first), index(range.first) + run.len());
            let part = PageData {
                bytes: data.bytes.slice(first * PAGE_SIZE..end * PAGE_SIZE),
                checksums: Arc::from(&data.checksums[first..end]),
            };
            let token = call.core.fresh_token();
            let (store, group, key) = (self.replica.store, self.id, mend.read.key);
            call.out.push(Action::Repair { store, token, group, key, pages: range, data: part });
        }
    }
}
