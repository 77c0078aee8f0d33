//! A device in memory that loses what was not flushed, tears writes, rots and fails on demand.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use xsan_protocol::units::PAGE_SIZE;

use super::random::Random;
use crate::disk::buffers::Buffer;
use crate::io::{Device, DiskAction, DiskCompletion, DiskError, DiskOk};

type Page = Arc<[u8]>;

/// Which sectors of a page land, by bit: a device promises no more than whole ones.
pub type Sectors = u8;
pub const NOTHING: Sectors = 0;
pub const WHOLE: Sectors = !0;
const SECTORS: usize = Sectors::BITS as usize;

/// A page of which some sectors were written over others.
fn torn(old: Option<&Page>, new: &[u8], landed: Sectors) -> Page {
    let mut page = old.map_or_else(|| vec![0; PAGE_SIZE], |old| old.to_vec());
    let sectors = page.chunks_exact_mut(PAGE_SIZE / SECTORS).zip(new.chunks_exact(PAGE_SIZE / SECTORS));
    for (_, (to, from)) in sectors.enumerate().filter(|(sector, _)| landed >> sector & 1 == 1) {
        to.copy_from_slice(from);
    }
    page.into()
}

/// What lands of one page after another: of one moment mostly much or little, and in half of them some pages are torn.
fn some_sectors(random: &mut Random) -> impl FnMut() -> Sectors {
    let (kept, tears) = (random.below(101), random.one_in(2));
    move || match random.chance(kept) {
        true => WHOLE,
        false if tears && random.one_in(4) => random.below(1 << SECTORS) as Sectors,
        false => NOTHING,
    }
}

#[derive(Clone, Default)]
struct Inner {
    stable: BTreeMap<u64, Page>,
    /// Written and not flushed, in order: the number of the write, its page and content.
    volatile: VecDeque<(u64, u64, Page)>,
    current: BTreeMap<u64, Page>,
    /// Pages that can not be read until they are written.
    unreadable: BTreeSet<u64>,
    /// Reads until some in a row fail, though their pages can be read; and how many do.
    reads_to_failure: u64,
    failing_reads: u64,
    /// Page writes so far.
    written: u64,
    /// Page writes that end well and change nothing.
    to_lose: u64,
    /// Page writes that land so many pages further on.
    to_misdirect: u64,
    misdirected_by: u64,
    /// Page writes that were lost, and that landed elsewhere.
    wrong: (u64, u64),
    fails: bool,
    /// The next flush fails, and what it was to cover may be gone.
    flush_fails: bool,
}

impl Inner {
    /// Of what is not flushed only what `keep` says of each page is left.
    fn lose(&mut self, mut keep: impl FnMut() -> Sectors) {
        for (_, page, bytes) in std::mem::take(&mut self.volatile) {
            let landed = keep();
            if landed != NOTHING {
                let page_now = torn(self.stable.get(&page), &bytes, landed);
                self.stable.insert(page, page_now);
            }
        }
        self.current = self.stable.clone();
    }
}

/// Handles share the device.
#[derive(Clone)]
pub struct SimDevice {
    bytes: u64,
    inner: Rc<RefCell<Inner>>,
}

impl SimDevice {
    pub fn new(bytes: u64) -> Self {
        Self { bytes, inner: Rc::default() }
    }

    /// A device of its own with the same content.
    pub fn fork(&self) -> Self {
        Self { bytes: self.bytes, inner: Rc::new(RefCell::new(self.inner.borrow().clone())) }
    }

    pub fn write_page(&self, page: u64, bytes: &[u8]) {
        let mut inner = self.inner.borrow_mut();
        if inner.to_lose > 0 {
            inner.to_lose -= 1;
            inner.wrong.0 += 1;
            return;
        }
        let mut page = page;
        if inner.to_misdirect > 0 {
            inner.to_misdirect -= 1;
            inner.wrong.1 += 1;
            page = (page + inner.misdirected_by) % (self.bytes / PAGE_SIZE as u64);
        }
        let bytes: Page = bytes.into();
        inner.unreadable.remove(&page);
        inner.current.insert(page, Arc::clone(&bytes));
        let number = inner.written;
        inner.volatile.push_back((number, page, bytes));
        inner.written += 1;
    }

    /// What a flush issued now covers.
    pub fn mark(&self) -> u64 {
        self.inner.borrow().written
    }

    /// Makes the writes before `mark` stable.
    pub fn flush_to(&self, mark: u64) {
        let mut inner = self.inner.borrow_mut();
        while let Some((_, page, bytes)) = inner.volatile.pop_front_if(|(number, ..)| *number < mark) {
            inner.stable.insert(page, bytes);
        }
    }

    /// A flush fails: any subset of what was not flushed is lost at once, the rest is stable.
    fn lose_at_flush(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.flush_fails = false;
        let mut random = Random::new(inner.written);
        inner.lose(some_sectors(&mut random));
    }

    /// The power goes: any subset of what was not flushed is lost.
    pub fn lose_power(&self, random: &mut Random) {
        self.lose_power_but(some_sectors(random));
    }

    /// The same, and `keep` says of each page that is not flushed what of it is kept.
    pub fn lose_power_but(&self, keep: impl FnMut() -> Sectors) {
        self.inner.borrow_mut().lose(keep);
    }

    /// Pages that a loss of power may take.
    pub fn unflushed(&self) -> usize {
        self.inner.borrow().volatile.len()
    }

    pub fn flip_bit(&self, offset: u64, bit: u64) {
        let mut inner = self.inner.borrow_mut();
        let page = offset / PAGE_SIZE as u64;
        let mut bytes = inner.current.get(&page).map_or_else(|| vec![0; PAGE_SIZE], |page| page.to_vec());
        bytes[(bit / 8) as usize % PAGE_SIZE] ^= 1 << (bit % 8);
        let bytes: Page = bytes.into();
        inner.current.insert(page, Arc::clone(&bytes));
        inner.stable.insert(page, bytes);
    }

    pub fn make_unreadable(&self, offset: u64) {
        self.inner.borrow_mut().unreadable.insert(offset / PAGE_SIZE as u64);
    }

    /// After so many reads, so many in a row fail; then no more.
    pub fn fail_reads(&self, after: u64, count: u64) {
        let mut inner = self.inner.borrow_mut();
        (inner.reads_to_failure, inner.failing_reads) = (after, count);
    }

    /// Are some of these reads still to come?
    pub fn has_failing_reads(&self) -> bool {
        self.inner.borrow().failing_reads > 0
    }

    /// The next `pages` page writes end well and change nothing.
    pub fn lose_writes(&self, pages: u64) {
        self.inner.borrow_mut().to_lose += pages;
    }

    /// The next `pages` page writes end well and land `by` pages further on.
    pub fn misdirect_writes(&self, pages: u64, by: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.to_misdirect += pages;
        inner.misdirected_by = by;
    }

    /// Page writes that were lost and that landed elsewhere, since this was asked last.
    pub fn take_wrong_writes(&self) -> (u64, u64) {
        std::mem::take(&mut self.inner.borrow_mut().wrong)
    }

    /// The next flush fails, and no later one: what it was to cover may be gone.
    pub fn fail_next_flush(&self) {
        self.inner.borrow_mut().flush_fails = true;
    }

    /// From now on writes and flushes fail.
    pub fn fail(&self) {
        self.inner.borrow_mut().fails = true;
    }

    /// Does it fail, or will it?
    pub fn is_failing(&self) -> bool {
        let inner = self.inner.borrow();
        inner.fails || inner.flush_fails
    }

    /// No failure is to come any more.
    pub fn end_failures(&self) {
        let mut inner = self.inner.borrow_mut();
        (inner.fails, inner.flush_fails) = (false, false);
        (inner.to_lose, inner.to_misdirect) = (0, 0);
    }

    /// A page that was written, with something else than zeroes, chosen at random; its offset.
    pub fn some_page(&self, random: &mut Random) -> Option<u64> {
        let inner = self.inner.borrow();
        let pages = inner.current.iter().filter(|(_, bytes)| bytes.iter().any(|byte| *byte != 0));
        let pages: Vec<u64> = pages.map(|(page, _)| *page).collect();
        random.pick(&pages).map(|page| page * PAGE_SIZE as u64)
    }

    /// Is the page there, and not zeroes?
    pub fn holds_something(&self, offset: u64) -> bool {
        let inner = self.inner.borrow();
        let page = inner.current.get(&(offset / PAGE_SIZE as u64));
        page.is_some_and(|bytes| bytes.iter().any(|byte| *byte != 0))
    }

    /// Carries out one operation; `mark` is what a flush covers.
    pub fn carry_out(&self, action: DiskAction, mark: u64) -> DiskCompletion {
        let refused = Err(DiskError { errno: libc::EIO });
        let fails = self.inner.borrow().fails;
        let (id, result) = match action {
            DiskAction::Read { id, offset, mut buffer, .. } => {
                let read = self.read_at(offset, &mut buffer);
                (id, read.map(|()| DiskOk::Read(buffer)).or(refused))
            }
            DiskAction::Write { id, .. } | DiskAction::Flush { id, .. } if fails => (id, refused),
            DiskAction::Write { id, offset, parts, .. } => {
                for (page, bytes) in pages(offset, &parts) {
                    self.write_page(page, bytes);
                }
                (id, Ok(DiskOk::Written))
            }
            DiskAction::Flush { id, .. } if self.inner.borrow().flush_fails => {
                self.lose_at_flush();
                (id, refused)
            }
            DiskAction::Flush { id, .. } => {
                self.flush_to(mark);
                (id, Ok(DiskOk::Flushed))
            }
        };
        DiskCompletion { id, result }
    }

    /// The process ends while `action` is under way: of a write any sectors may have landed.
    pub fn tear(&self, action: &DiskAction, random: &mut Random) {
        self.tear_but(action, some_sectors(random));
    }

    /// The same, and `keep` says of each page what of it landed.
    pub fn tear_but(&self, action: &DiskAction, mut keep: impl FnMut() -> Sectors) {
        let DiskAction::Write { offset, parts, .. } = action else { return };
        for (page, bytes) in pages(*offset, parts) {
            let landed = keep();
            if landed != NOTHING {
                let old = self.inner.borrow().current.get(&page).cloned();
                self.write_page(page, &torn(old.as_ref(), bytes, landed));
            }
        }
    }

    /// Pages that `action` writes.
    pub fn pages_written(action: &DiskAction) -> usize {
        let DiskAction::Write { offset, parts, .. } = action else { return 0 };
        pages(*offset, parts).count()
    }
}

/// The pages of a write, with their numbers on the device.
fn pages(offset: u64, parts: &[Buffer]) -> impl Iterator<Item = (u64, &[u8])> {
    let bytes = parts.iter().flat_map(|part| part.chunks_exact(PAGE_SIZE));
    (offset / PAGE_SIZE as u64..).zip(bytes)
}

impl Device for SimDevice {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE_SIZE as u64) && offset + buffer.len() as u64 <= self.bytes);
        let mut inner = self.inner.borrow_mut();
        if inner.reads_to_failure > 0 {
            inner.reads_to_failure -= 1;
        } else if inner.failing_reads > 0 {
            inner.failing_reads -= 1;
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let first = offset / PAGE_SIZE as u64;
        for (page, to) in (first..).zip(buffer.chunks_exact_mut(PAGE_SIZE)) {
            if inner.unreadable.contains(&page) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            match inner.current.get(&page) {
                Some(bytes) => to.copy_from_slice(bytes),
                None => to.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE_SIZE as u64) && offset + buffer.len() as u64 <= self.bytes);
        let first = offset / PAGE_SIZE as u64;
        for (page, bytes) in (first..).zip(buffer.chunks_exact(PAGE_SIZE)) {
            self.write_page(page, bytes);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.flush_to(u64::MAX);
        Ok(())
    }
}
