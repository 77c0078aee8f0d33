//! Page-aligned payload buffers in one arena, mapped once and never freed.
//!
//! A payload is received into a buffer, written to the device from it and sent to peers from it: what moves
//! between shards, state machines and rings is the handle. The arena outlives every operation in flight
//! because it is never unmapped.
//!
//! Invariants
//! - A slot is on its class's free list exactly when no handle to it exists.
//! - `BufferMut` is the only handle to its slot; `Buffer`s share it, read-only.
//!
//! Used by every module of the data plane and by its tests; knows none of them.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU32, Ordering, fence};

use crossbeam_queue::ArrayQueue;
use xsan_protocol::units::PAGE_SIZE;

/// Bytes of a slot of each size class; all whole pages, so that a slot is aligned.
pub const CLASS_BYTES: [usize; 4] = [PAGE_SIZE, 16 * 1024, 128 * 1024, 1024 * 1024 + 64 * 1024];

/// Share of the arena that each class gets, in percent.
const CLASS_PERCENT: [usize; 4] = [25, 15, 20, 40];

/// The smallest class whose slots hold `length` bytes.
///
/// # Panics
/// `length` is 0 or larger than the largest class.
pub fn size_class(length: usize) -> usize {
    assert!(length > 0);
    let smallest = CLASS_BYTES.iter().position(|bytes| length <= *bytes);
    smallest.expect("no payload is larger than the largest class")
}

const _: () = assert!(CLASS_PERCENT[0] + CLASS_PERCENT[1] + CLASS_PERCENT[2] + CLASS_PERCENT[3] == 100);

struct Class {
    bytes: usize,
    first_slot: u32,
    /// Offset of the first slot in the arena.
    offset: usize,
    free: ArrayQueue<u32>,
}

/// Who asks for a buffer. What was begun must be able to end, so those who begin things leave the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// What a gateway receives of its clients: it stops reading them.
    Client,
    /// Requests and reads at a primary: they are answered Busy, and tried again.
    Request,
    /// Replication of what primaries have ordered: it takes memory beside the pool, see [`Overflow`].
    Replication,
}

impl Claim {
    /// Eighths of each class that stay free for the claims after it; the last one for journal, destage and answers.
    const fn leaves_eighths(self) -> usize {
        match self {
            Self::Client => 4,
            Self::Request => 2,
            Self::Replication => 1,
        }
    }

    /// How many of a class's `slots` stay free for the claims after it.
    pub const fn leaves(self, slots: usize) -> usize {
        slots * self.leaves_eighths() / 8
    }
}

/// Arenas beside a shard's pool, for frames that must not wait for buffers: they are what frees buffers.
///
/// An append that waited would hold up the acknowledgements behind it on its connection, which other members'
/// buffers wait for. Made when they are needed first; only what was used of them takes memory.
#[derive(Debug, Default)]
pub struct Overflow(RefCell<Vec<&'static BufferPool>>);

impl Overflow {
    const ARENA_BYTES: usize = 64 << 20;
    const ARENAS_MAX: usize = 8;

    /// A buffer; `None` when even this is exhausted.
    pub fn alloc(&self, length: usize) -> Option<BufferMut> {
        let mut arenas = self.0.borrow_mut();
        if let Some(buffer) = arenas.iter().find_map(|arena| arena.alloc(length)) {
            return Some(buffer);
        }
        if arenas.len() == Self::ARENAS_MAX {
            return None;
        }
        tracing::warn!(
            arenas = arenas.len() + 1,
            "the shard's buffers are short: replication takes more; raise dataplane.memory"
        );
        let arena = BufferPool::mapped(Self::ARENA_BYTES)
            .inspect_err(|error| tracing::warn!(%error, "the host has no memory for more buffers"))
            .ok()?;
        arenas.push(arena);
        arena.alloc(length)
    }
}

/// One arena and its free lists. Leaked on purpose: handles are `'static`.
pub struct BufferPool {
    base: *mut u8,
    bytes: usize,
    classes: [Class; CLASS_BYTES.len()],
    /// Handles to each slot.
    references: Box<[AtomicU32]>,
}

// SAFETY: `base` points to a mapping that is never unmapped; slots are handed out through the lock-free
// free lists, to one `BufferMut` or to `Buffer`s that only read.
unsafe impl Send for BufferPool {}
// SAFETY: as above; all shared state is atomic.
unsafe impl Sync for BufferPool {}

impl BufferPool {
    /// Takes over `bytes` of page-aligned, zeroed, never freed memory at `base`.
    ///
    /// # Safety
    /// The memory is mapped read-write for the rest of the process's life and used by nobody else.
    ///
    /// # Panics
    /// `bytes` is too small for one slot of each class, or `base` is not aligned.
    pub unsafe fn from_memory(base: *mut u8, bytes: usize) -> &'static Self {
        assert!((base as usize).is_multiple_of(PAGE_SIZE));
        let (mut first_slot, mut offset) = (0, 0);
        let classes = std::array::from_fn(|index| {
            let slot_bytes = CLASS_BYTES[index];
            let count = bytes / 100 * CLASS_PERCENT[index] / slot_bytes;
            assert!(count > 0, "an arena of {bytes} bytes has no slot of {slot_bytes}");
            let free = ArrayQueue::new(count);
            for slot in 0..count as u32 {
                free.push(first_slot + slot).expect("the list was made for `count`");
            }
            let class = Class { bytes: slot_bytes, first_slot, offset, free };
            first_slot += count as u32;
            offset += count * slot_bytes;
            class
        });
        assert!(offset <= bytes);
        let references = (0..first_slot).map(|_| AtomicU32::new(0)).collect();
        Box::leak(Box::new(Self { base, bytes, classes, references }))
    }

    /// A pool over memory that belongs to it alone; zeroes it, and so gives every page its place in RAM.
    ///
    /// # Panics
    /// As [`BufferPool::from_memory`].
    pub fn from_static(memory: &'static mut [MaybeUninit<u8>]) -> &'static Self {
        memory.fill(MaybeUninit::new(0));
        // SAFETY: a `'static` exclusive borrow, given up here: nobody else reaches the memory, for ever.
        unsafe { Self::from_memory(memory.as_mut_ptr().cast(), memory.len()) }
    }

    /// A pool over fresh anonymous memory, as tests and tools need it.
    ///
    /// # Panics
    /// The memory can not be mapped.
    pub fn anonymous(bytes: usize) -> &'static Self {
        Self::mapped(bytes).expect("memory is free")
    }

    /// A pool over fresh anonymous memory.
    ///
    /// # Errors
    /// The memory can not be mapped.
    pub fn mapped(bytes: usize) -> io::Result<&'static Self> {
        // SAFETY: a fresh private mapping, checked below and never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: mapped above for this pool alone.
        Ok(unsafe { Self::from_memory(base.cast(), bytes) })
    }

    /// The whole arena, for registration with a ring.
    pub fn arena(&self) -> (*mut u8, usize) {
        (self.base, self.bytes)
    }

    /// A buffer of `length` bytes whose content is whatever was there; `None` when the pool is exhausted:
    /// stop reading the socket, or answer Busy.
    ///
    /// # Panics
    /// `length` is 0 or larger than the largest class.
    pub fn alloc(&'static self, length: usize) -> Option<BufferMut> {
        let slot = self.classes[size_class(length)..].iter().find_map(|class| class.free.pop())?;
        Some(self.handle(slot, length))
    }

    /// As [`BufferPool::alloc`], but leaves what `claim` must leave of each class.
    ///
    /// # Panics
    /// As [`BufferPool::alloc`].
    pub fn alloc_for(&'static self, claim: Claim, length: usize) -> Option<BufferMut> {
        let reserve = |class: &Class| claim.leaves(class.free.capacity());
        let mut classes =
            self.classes[size_class(length)..].iter().filter(|class| class.free.len() > reserve(class));
        let slot = classes.find_map(|class| class.free.pop())?;
        Some(self.handle(slot, length))
    }

    fn handle(&'static self, slot: u32, length: usize) -> BufferMut {
        let before = self.references[slot as usize].swap(1, Ordering::Relaxed);
        assert!(before == 0, "a free slot had {before} handles");
        BufferMut { pool: self, slot, length }
    }

    /// Free slots and all slots of each class.
    pub fn occupancy(&self) -> [(usize, usize); CLASS_BYTES.len()] {
        std::array::from_fn(|index| (self.classes[index].free.len(), self.classes[index].free.capacity()))
    }

    fn class_of(&self, slot: u32) -> &Class {
        let index = self.classes.partition_point(|class| class.first_slot <= slot) - 1;
        &self.classes[index]
    }

    fn slot_pointer(&self, slot: u32) -> *mut u8 {
        let class = self.class_of(slot);
        // SAFETY: the slot is within the arena, by construction.
        unsafe { self.base.add(class.offset + (slot - class.first_slot) as usize * class.bytes) }
    }

    fn release(&self, slot: u32) {
        if self.references[slot as usize].fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            self.class_of(slot).free.push(slot).expect("a slot is free once");
        }
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool").field("bytes", &self.bytes).field("free", &self.occupancy()).finish()
    }
}

/// The only handle to a slot: it may be written.
pub struct BufferMut {
    pool: &'static BufferPool,
    slot: u32,
    length: usize,
}

impl BufferMut {
    /// Gives up writing; the result can be shared.
    pub fn freeze(self) -> Buffer {
        let buffer = Buffer { pool: self.pool, slot: self.slot, offset: 0, length: self.length as u32 };
        std::mem::forget(self);
        buffer
    }

    /// Bytes that the buffer could be grown to.
    pub fn capacity(&self) -> usize {
        self.pool.class_of(self.slot).bytes
    }

    /// Changes the length within the capacity; content behind the old end is whatever was there.
    ///
    /// # Panics
    /// 0 or more than the capacity.
    pub fn set_length(&mut self, length: usize) {
        assert!(length > 0 && length <= self.capacity());
        self.length = length;
    }

    pub fn pool(&self) -> &'static BufferPool {
        self.pool
    }

    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pool.slot_pointer(self.slot)
    }
}

impl Deref for BufferMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `length` bytes of a live slot that only this handle refers to.
        unsafe { std::slice::from_raw_parts(self.pool.slot_pointer(self.slot), self.length) }
    }
}

impl DerefMut for BufferMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `length` bytes of a live slot that only this handle refers to.
        unsafe { std::slice::from_raw_parts_mut(self.pool.slot_pointer(self.slot), self.length) }
    }
}

impl Drop for BufferMut {
    fn drop(&mut self) {
        self.pool.release(self.slot);
    }
}

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferMut({} bytes)", self.length)
    }
}

/// A shared, read-only part of a slot.
pub struct Buffer {
    pool: &'static BufferPool,
    slot: u32,
    offset: u32,
    length: u32,
}

impl Buffer {
    /// Bytes `range` of this buffer, sharing the slot.
    ///
    /// # Panics
    /// Out of range.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.length as usize);
        let mut part = self.clone();
        part.offset += range.start as u32;
        part.length = (range.end - range.start) as u32;
        part
    }

    pub fn as_ptr(&self) -> *const u8 {
        // SAFETY: offset is within the slot.
        unsafe { self.pool.slot_pointer(self.slot).add(self.offset as usize) }
    }

    pub fn pool(&self) -> &'static BufferPool {
        self.pool
    }

    /// Bytes of the slot, which is not free as long as this handle lives.
    pub fn held_bytes(&self) -> usize {
        self.pool.class_of(self.slot).bytes
    }

    /// The handle for writing again, if this is the only one and covers the slot from its start.
    pub fn try_into_mut(self) -> Result<BufferMut, Self> {
        if self.offset != 0 || self.pool.references[self.slot as usize].load(Ordering::Acquire) != 1 {
            return Err(self);
        }
        let buffer = BufferMut { pool: self.pool, slot: self.slot, length: self.length as usize };
        std::mem::forget(self);
        Ok(buffer)
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        self.pool.references[self.slot as usize].fetch_add(1, Ordering::Relaxed);
        Self { pool: self.pool, slot: self.slot, offset: self.offset, length: self.length }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.release(self.slot);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: within a live slot that nobody writes while a `Buffer` exists.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.length as usize) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_returns_when_its_last_handle_goes() {
        let pool = BufferPool::anonymous(16 << 20);
        let free = pool.occupancy();
        let mut buffer = pool.alloc(PAGE_SIZE).unwrap();
        buffer.fill(7);
        let shared = buffer.freeze();
        let part = shared.slice(10..20);
        assert_eq!(part.held_bytes(), PAGE_SIZE);
        drop(shared);
        assert_ne!(pool.occupancy(), free);
        assert_eq!(&*part, &[7; 10]);
        drop(part);
        assert_eq!(pool.occupancy(), free);
    }

    #[test]
    fn an_exhausted_pool_says_so_and_recovers() {
        let pool = BufferPool::anonymous(16 << 20);
        let mut all = Vec::new();
        while let Some(buffer) = pool.alloc(CLASS_BYTES[3]) {
            assert!((buffer.as_ptr() as usize).is_multiple_of(PAGE_SIZE));
            all.push(buffer);
        }
        assert_eq!(all.len(), pool.occupancy()[3].1);
        all.pop();
        assert!(pool.alloc(CLASS_BYTES[3]).is_some());
    }

    #[test]
    fn every_claim_leaves_room_for_the_next() {
        let pool = BufferPool::anonymous(64 << 20);
        let mut all = Vec::new();
        for (claim, eighths) in [(Claim::Client, 4), (Claim::Request, 2), (Claim::Replication, 1)] {
            while let Some(buffer) = pool.alloc_for(claim, 1) {
                all.push(buffer);
            }
            assert!(pool.occupancy().iter().all(|(free, slots)| *free == slots * eighths / 8), "{claim:?}");
        }
        assert!(pool.alloc(1).is_some());
    }

    #[test]
    fn overflow_grows_to_its_bound() {
        let overflow = Overflow::default();
        let mut all = Vec::new();
        while let Some(buffer) = overflow.alloc(CLASS_BYTES[3]) {
            all.push(buffer);
        }
        assert_eq!(overflow.0.borrow().len(), Overflow::ARENAS_MAX);
        all.pop();
        assert!(overflow.alloc(CLASS_BYTES[3]).is_some());
    }

    #[test]
    fn small_requests_fall_to_larger_classes() {
        let pool = BufferPool::anonymous(16 << 20);
        let (small, _) = pool.occupancy()[0];
        let held: Vec<_> = (0..=small).map(|_| pool.alloc(1).unwrap()).collect();
        assert_eq!(held.last().unwrap().capacity(), CLASS_BYTES[1]);
    }
}
