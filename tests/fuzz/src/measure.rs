//! Counts what a decoder allocates, to hold it to a bound that depends on the bytes it was given.
//!
//! Invariants
//! - What is counted is what was asked for, never given back: a decoder that allocates and frees pays too.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static ALLOCATED_BYTES: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting for each thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(bytes: usize) {
    // A thread that ends allocates after its locals are gone; nothing measures that.
    let _ = ALLOCATED_BYTES.try_with(|total| total.set(total.get().wrapping_add(bytes as u64)));
}

// SAFETY: every call goes to `System` unchanged; counting touches a local that needs no allocation and no drop.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

/// What decoding n bytes may allocate: `factor * n + constant` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    pub factor: u64,
    pub constant: u64,
}

impl Bound {
    pub const fn new(factor: u64, constant: u64) -> Self {
        Self { factor, constant }
    }

    /// Runs `decode` on `input_bytes` bytes of input.
    ///
    /// # Errors
    /// It allocated more than the bound.
    pub fn hold<T>(self, input_bytes: usize, decode: impl FnOnce() -> T) -> anyhow::Result<T> {
        let before = ALLOCATED_BYTES.get();
        let decoded = decode();
        let bytes = ALLOCATED_BYTES.get().wrapping_sub(before);
        let limit = self.factor * input_bytes as u64 + self.constant;
        anyhow::ensure!(bytes <= limit, "{input_bytes} bytes made it allocate {bytes}, {limit} are allowed");
        Ok(decoded)
    }
}
