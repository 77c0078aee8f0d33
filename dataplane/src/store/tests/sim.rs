//! A device in memory that loses what was not flushed, tears writes, rots and fails on demand.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use xsan_protocol::units::PAGE_SIZE;

use super::Random;
use crate::io::Device;

type Page = Arc<[u8]>;

#[derive(Clone, Default)]
struct Inner {
    stable: BTreeMap<u64, Page>,
    /// Written and not flushed, in order.
    volatile: Vec<(u64, Page)>,
    current: BTreeMap<u64, Page>,
    /// Pages that can not be read until they are written.
    unreadable: BTreeSet<u64>,
    writes: u64,
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
        let bytes: Page = bytes.into();
        inner.unreadable.remove(&page);
        inner.current.insert(page, Arc::clone(&bytes));
        inner.volatile.push((page, bytes));
        inner.writes += 1;
    }

    /// What a flush issued now covers.
    pub fn mark(&self) -> usize {
        self.inner.borrow().volatile.len()
    }

    /// Makes the first `mark` volatile writes stable; returns how many, for marks taken before.
    pub fn flush_to(&self, mark: usize) -> usize {
        let mut inner = self.inner.borrow_mut();
        let count = mark.min(inner.volatile.len());
        let flushed: Vec<_> = inner.volatile.drain(..count).collect();
        inner.stable.extend(flushed);
        count
    }

    /// The power goes: any subset of what was not flushed is lost.
    pub fn lose_power(&self, random: &mut Random) {
        let mut inner = self.inner.borrow_mut();
        let kept = random.below(101);
        for (page, bytes) in std::mem::take(&mut inner.volatile) {
            if random.chance(kept) {
                inner.stable.insert(page, bytes);
            }
        }
        inner.current = inner.stable.clone();
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
}

impl Device for SimDevice {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(PAGE_SIZE as u64) && offset + buffer.len() as u64 <= self.bytes);
        let inner = self.inner.borrow();
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
        self.flush_to(usize::MAX);
        Ok(())
    }
}
