//! Check: every acting replica reads and verifies the same range of a block, and what they have is compared.
//!
//! Only checksums travel. A range may be written meanwhile: a unit is compared when all replicas had the same version of it,
//! before and after they read it, since a version names content; else the range is looked at again. Damaged pages of the
//! primary are mended as in any read (`reads`), those of a member with the primary's. Used by `scrub`.
//!
//! Invariants
//! - A member takes a page only when it has the checksum that its own store expects.
//! - Equal versions with different content are told and left alone.

use std::collections::BTreeSet;

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockKey, NodeId, Version};
use xsan_protocol::limits::FRAME_DATA_MAX;
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange};
use xsan_protocol::wire::header::{Header, Opcode};
use xsan_protocol::wire::replication::UnitChecksums;
use zerocopy::IntoBytes;

use super::action::Action;
use super::call::{Call, ReadJob, ReadPurpose};
use super::frames;
use super::group::{Group, refuse};
use super::scrub::{Scrub, Step};
use crate::net::frame::Frame;
use crate::store::{PageData, ReadError, ReadPages};

/// Looks at a range that is being written, before it is left uncompared.
const LOOKS_WRITTEN_MAX: u32 = 4;
/// Looks at a range with damage: a repair waits for the end of a destage cycle.
const LOOKS_DAMAGED_MAX: u32 = 50;
/// Between two looks at a range.
const LOOK_AGAIN_NS: u64 = 100_000_000;

/// A range that the replicas are reading.
#[derive(Debug)]
pub(super) struct Check {
    number: u64,
    pub since_ns: u64,
    key: BlockKey,
    pages: PageRange,
    /// Of the units, before this node read them.
    versions: Vec<Version>,
    own: Own,
    members: Vec<(NodeId, Option<Vec<UnitChecksums>>)>,
}

/// The primary's part of the range.
#[derive(Debug)]
enum Own {
    Reading,
    /// Verified, after some pages were mended, but for those that are lost: no replica has what they should be.
    Read {
        data: PageData,
        mended: Vec<u16>,
        /// Counted from the range's first, as members tell theirs.
        lost: Vec<u16>,
    },
}

impl Group {
    fn versions_of(&self, call: &Call<'_>, key: BlockKey, pages: PageRange) -> Vec<Version> {
        let view = call.stores.view(self.replica.store);
        pages.units().map(|unit| view.unit_version(self.id, key, unit)).collect()
    }

    /// Has all replicas read the first range; `false` when that has to wait.
    pub(super) fn begin_check(&mut self, call: &mut Call<'_>) -> bool {
        let (own, acked, store) = (call.node(), self.replica.acked, self.replica.store);
        let Some(primary) = &self.primary else { return false };
        let (epoch, reign) = (primary.epoch, primary.reign);
        let nodes: Vec<NodeId> =
            primary.members.iter().map(|member| member.node).filter(|node| *node != own).collect();
        let Some(scrub) = &primary.scrub else { return false };
        let Some(&(key, pages)) = scrub.ranges.front() else { return false };
        if call.now_ns < scrub.resume_ns || !call.core.grant_scrub(call.now_ns, pages.bytes()) {
            return false;
        }
        let number = call.core.fresh_token();
        let versions = self.versions_of(call, key, pages);
        let purpose = ReadPurpose::Scrub { check: number, damaged: Vec::new() };
        if !call.read(store, ReadJob { group: self.id, reign, key, pages, purpose, attempt: 1 }) {
            return false;
        }
        for &node in &nodes {
            call.send(node, frames::numbered(Opcode::Commit, self.id, epoch, acked.0));
            let mut frame = frames::about(Opcode::Check, self.id, epoch, key, pages);
            frame.header.request_id = number;
            call.send(node, frame);
        }
        let members = nodes.into_iter().map(|node| (node, None)).collect();
        let check = Check { number, since_ns: call.now_ns, key, pages, versions, own: Own::Reading, members };
        if let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) {
            scrub.step = Step::Checking(check);
        }
        true
    }

    fn check(&mut self, number: u64) -> Option<&mut Check> {
        match &mut self.primary.as_mut()?.scrub.as_mut()?.step {
            Step::Checking(check) if check.number == number => Some(check),
            _ => None,
        }
    }

    /// This node has read its part; `mended` pages were damaged, those `lost` have no good copy.
    pub(super) fn on_check_read(
        &mut self,
        call: &mut Call<'_>,
        number: u64,
        data: PageData,
        mended: Vec<u16>,
        lost: Vec<u16>,
    ) {
        if let Some(check) = self.check(number) {
            check.own = Own::Read { data, mended, lost };
            self.maybe_conclude(call);
        }
    }

    /// A member's part.
    pub(super) fn on_check_reply(&mut self, call: &mut Call<'_>, from: NodeId, frame: &Frame) {
        let Some(check) = self.check(frame.header.request_id) else { return };
        let bytes: &[u8] = frame.data.as_deref().unwrap_or_default();
        let list = UnitChecksums::list(bytes).ok().filter(|list| list.len() == check.versions.len());
        let member = check.members.iter_mut().find(|(node, _)| *node == from);
        match (frame.header.status, list, member) {
            (None, Some(list), Some(member)) => member.1 = Some(list.to_vec()),
            (_, _, Some(_)) => {
                // Too busy, or on its way to another epoch.
                self.look_again(call);
            }
            (_, _, None) => {}
        }
        self.maybe_conclude(call);
    }

    pub(super) fn look_again(&mut self, call: &Call<'_>) {
        if let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) {
            scrub.step_back();
            scrub.resume_ns = call.now_ns + LOOK_AGAIN_NS;
        }
    }

    /// Once all replicas have read the range: what is damaged is mended, and what differs told.
    fn maybe_conclude(&mut self, call: &mut Call<'_>) {
        let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) else { return };
        let complete = |check: &Check| {
            !matches!(check.own, Own::Reading) && check.members.iter().all(|(_, units)| units.is_some())
        };
        if !matches!(&scrub.step, Step::Checking(check) if complete(check)) {
            return;
        }
        let Step::Checking(check) = std::mem::replace(&mut scrub.step, Step::Check) else { return };
        let now = self.versions_of(call, check.key, check.pages);
        for frame in self.mends(&check) {
            call.send(frame.0, frame.1);
        }
        let own = call.node();
        let Some(scrub) = self.primary.as_mut().and_then(|primary| primary.scrub.as_mut()) else { return };
        if scrub.judge(&check, &now, own) {
            scrub.next_range();
        } else {
            scrub.resume_ns = call.now_ns + LOOK_AGAIN_NS;
        }
        call.core.counters.scrub_bytes += check.pages.bytes() as u64;
        self.go_on_scrubbing(call);
    }

    /// The primary's pages for those that are damaged at members, where they have the checksum that the member expects.
    fn mends(&self, check: &Check) -> Vec<(NodeId, Frame)> {
        let Own::Read { data, lost, .. } = &check.own else { return Vec::new() };
        let mut frames = Vec::new();
        for (node, units) in &check.members {
            let expected = expected(units);
            let same = |index: usize| data.checksums[index] == expected[index];
            let mendable = |index: &u16| same(usize::from(*index)) && !lost.contains(index);
            let pages: Vec<u16> = damaged(units).filter(mendable).collect();
            for run in pages.chunk_by(|a, b| *a + 1 == *b) {
                let (first, end) = (usize::from(run[0]), usize::from(run[0]) + run.len());
                let range = PageRange::new(check.pages.first + run[0], run.len() as u16);
                let mut frame = frames::about(Opcode::Mend, self.id, self.epoch, check.key, range);
                frame.data = Some(data.bytes.slice(first * PAGE_SIZE..end * PAGE_SIZE));
                frame.checksums = Some(data.checksums[first..end].into());
                frames.push((*node, frame));
            }
        }
        frames
    }

    /// The primary has this member read a range.
    pub(super) fn on_check(&mut self, call: &mut Call<'_>, from: NodeId, header: &Header) {
        let whole = |pages: &PageRange| {
            let ends = [pages.first, pages.count].map(usize::from);
            ends.iter().all(|end| end.is_multiple_of(PAGES_PER_UNIT)) && pages.bytes() <= FRAME_DATA_MAX
        };
        let Some(pages) = frames::pages_of(header).filter(whole) else {
            return refuse(call, from, header, Code::FrameInvalid);
        };
        let versions = self.versions_of(call, header.key, pages);
        let purpose = ReadPurpose::Check { to: from, header: *header, versions };
        let job = ReadJob { group: self.id, reign: 0, key: header.key, pages, purpose, attempt: 1 };
        if !call.read(self.replica.store, job) {
            refuse(call, from, header, Code::Busy);
        }
    }

    /// Answers Check with what the store read.
    pub(super) fn answer_check(
        &mut self,
        call: &mut Call<'_>,
        (to, header): (NodeId, &Header),
        (pages, before): (PageRange, &[Version]),
        result: Result<ReadPages, ReadError>,
    ) {
        let (checksums, damaged): (_, Vec<u16>) = match result {
            Ok(read) => (read.checksums, Vec::new()),
            Err(ReadError::Damaged { damaged, expected, .. }) => {
                (expected, damaged.into_iter().map(|index| pages.first + index).collect())
            }
            Err(ReadError::Failed) => return refuse(call, to, header, Code::StoreFailed),
        };
        if !damaged.is_empty() {
            tracing::warn!(group = %self.id, block = %header.key, pages = ?damaged, "a scrub met damaged pages here");
        }
        let now = self.versions_of(call, header.key, pages);
        let units = checksums.as_chunks::<PAGES_PER_UNIT>().0.iter().enumerate().map(|(index, checksums)| {
            let unchanged = before[index] == now[index];
            let first = usize::from(pages.first) + index * PAGES_PER_UNIT;
            let bit =
                |page: &u16| usize::from(*page).checked_sub(first).filter(|page| *page < PAGES_PER_UNIT);
            let mask = damaged.iter().filter_map(bit).fold(0, |mask, page| mask | 1 << page);
            UnitChecksums::new(if unchanged { now[index] } else { Version::UNKNOWN }, mask, checksums)
        });
        let list: Vec<UnitChecksums> = units.collect();
        let Some(mut buffer) = call.core.pool.alloc(size_of_val(list.as_slice())) else {
            return refuse(call, to, header, Code::Busy);
        };
        buffer.copy_from_slice(list.as_slice().as_bytes());
        let mut answer = frames::numbered(Opcode::CheckReply, self.id, header.epoch, header.request_id);
        answer.header.key = header.key;
        answer.data = Some(buffer.freeze());
        call.send(to, answer);
    }

    /// The primary's pages for damaged ones here: the store takes those that it expects.
    pub(super) fn on_mend(&mut self, call: &mut Call<'_>, from: NodeId, mut frame: Frame) {
        let header = frame.header;
        let pages = frames::pages_of(&header);
        let data = pages.and_then(|pages| frames::page_data(&mut frame, pages).map(|data| (pages, data)));
        let Some((pages, data)) = data else { return refuse(call, from, &header, Code::FrameInvalid) };
        let (store, token) = (self.replica.store, call.core.fresh_token());
        call.out.push(Action::Repair { store, token, group: self.id, key: header.key, pages, data });
    }
}

impl Scrub {
    /// Counts what a check of the first range found; `false`: it is to be looked at again.
    fn judge(&mut self, check: &Check, now: &[Version], own: NodeId) -> bool {
        self.looks += 1;
        let mut damage: BTreeSet<(NodeId, u16)> = BTreeSet::new();
        for (node, units) in &check.members {
            damage.extend(damaged(units).map(|page| (*node, page)));
        }
        let Own::Read { mended, lost, .. } = &check.own else { return false };
        damage.extend(lost.iter().map(|page| (own, *page)));
        // One that was told as damaged at an earlier look is counted below.
        let is_new = |page: &&u16| {
            self.mended.insert(**page) && !self.damaged.contains(&(own, **page - check.pages.first))
        };
        let news = mended.iter().filter(is_new).count() as u64;
        self.findings.damaged_pages += news;
        self.findings.mended_pages += news;
        self.findings.damaged_pages += damage.difference(&self.damaged).count() as u64;
        self.findings.mended_pages += self.damaged.difference(&damage).count() as u64;
        self.damaged = damage;
        let (mut written, mut differences) = (0, 0);
        for (index, before) in check.versions.iter().enumerate() {
            match check.differing(index, *before == now[index]) {
                None => written += 1,
                Some(nodes) => {
                    for node in &nodes {
                        tracing::error!(
                            group = %self.order.group, block = %check.key, unit = check.pages.first_unit() + index as u8,
                            version = %before, %node, "a unit has the same version and other content there"
                        );
                    }
                    differences += nodes.len() as u64;
                }
            }
        }
        // Lost is what no replica has. One that has it may have been too busy to give it.
        let hopeful = self.damaged.iter().any(|(_, page)| !lost.contains(page) || check.has_at_member(*page));
        let damaged = hopeful && self.looks < LOOKS_DAMAGED_MAX;
        let moving = written > 0 && self.looks < LOOKS_WRITTEN_MAX;
        if damaged || moving {
            return false;
        }
        self.findings.bytes += check.pages.bytes() as u64;
        self.findings.lost_pages += self.damaged.len() as u64;
        self.findings.skipped_units += written;
        self.findings.differences += differences;
        true
    }
}

impl Check {
    /// Has a member a page, counted from the range's first, as this node should have it?
    fn has_at_member(&self, page: u16) -> bool {
        let Own::Read { data, .. } = &self.own else { return false };
        let has = |units| {
            let wanted = data.checksums.get(usize::from(page));
            expected(units).get(usize::from(page)) == wanted && !damaged(units).any(|own| own == page)
        };
        self.members.iter().any(|(_, units)| has(units))
    }

    /// Members that have, or should have, other content of the unit than the primary; `None`: it was written meanwhile.
    fn differing(&self, index: usize, unchanged: bool) -> Option<Vec<NodeId>> {
        let Own::Read { data, .. } = &self.own else { return None };
        let (own, version) = (&data.checksums.as_chunks::<PAGES_PER_UNIT>().0[index], self.versions[index]);
        let units =
            || self.members.iter().map(|(node, units)| (*node, &units.as_deref().unwrap_or_default()[index]));
        let same =
            unchanged && version != Version::UNKNOWN && units().all(|(_, unit)| unit.version() == version);
        same.then(|| units().filter(|(_, unit)| unit.checksums() != *own).map(|(node, _)| node).collect())
    }
}

/// Damaged pages that a member told of, counted from the range's first.
fn damaged(units: &Option<Vec<UnitChecksums>>) -> impl Iterator<Item = u16> {
    let pages = |(index, unit): (usize, &UnitChecksums)| {
        let (first, mask) = ((index * PAGES_PER_UNIT) as u16, unit.damaged());
        (0..PAGES_PER_UNIT as u16).filter(move |page| mask & 1 << page != 0).map(move |page| first + page)
    };
    units.iter().flatten().enumerate().flat_map(pages)
}

/// What a member expects of the range's pages.
fn expected(units: &Option<Vec<UnitChecksums>>) -> Vec<u32> {
    units.iter().flatten().flat_map(UnitChecksums::checksums).collect()
}
