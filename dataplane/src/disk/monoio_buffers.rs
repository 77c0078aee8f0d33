//! What lets monoio receive into pool buffers and send from many of them at once.
//!
//! Used by gateways and peer connections. Knows the buffers and monoio's traits, nothing of what is sent.
//!
//! Invariants
//! - Every address handed to monoio is in the arena, in static memory or on the heap behind a `Vec` that the
//!   operation owns: none moves or is freed while the operation is in flight.

use std::ops::Range;

use monoio::buf::{IoBuf, IoBufMut, IoVecBuf};

use super::buffers::{Buffer, BufferMut};

// SAFETY: the slot is in the arena, which is never moved or unmapped; all `len()` bytes are initialised,
// because the arena was mapped zeroed.
unsafe impl IoBuf for BufferMut {
    fn read_ptr(&self) -> *const u8 {
        self.as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.len()
    }
}

// SAFETY: as above; this is the only handle to the slot, so that the kernel may write it.
unsafe impl IoBufMut for BufferMut {
    fn write_ptr(&mut self) -> *mut u8 {
        self.as_mut_ptr()
    }

    fn bytes_total(&mut self) -> usize {
        self.len()
    }

    unsafe fn set_init(&mut self, _bytes: usize) {}
}

/// Most parts that one `writev` takes (`IOV_MAX` of Linux).
pub const VECTORS_PER_WRITE_MAX: usize = 1024;

/// What zeroes are sent from.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

enum Part {
    /// A range of `heads`.
    Head(Range<usize>),
    Data(Buffer),
    Zeroes(usize),
}

/// Bytes to send, in order, from many places: small heads, which are gathered in one vector, and pool buffers,
/// which are not copied.
///
/// Filled with `push_*`, then sealed, then written (as often as the socket takes only a part), then cleared for
/// the next batch; its vectors keep their capacity.
#[derive(Default)]
pub struct Gather {
    heads: Vec<u8>,
    parts: Vec<Part>,
    vectors: Vec<libc::iovec>,
    /// First of `vectors` that is not sent whole.
    next: usize,
}

impl Gather {
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Adds a copy of `bytes`, which should be few.
    ///
    /// # Panics
    /// It is sealed: the kernel may read what would move.
    pub fn push_head(&mut self, bytes: &[u8]) {
        assert!(self.vectors.is_empty());
        let start = self.heads.len();
        self.heads.extend_from_slice(bytes);
        let end = self.heads.len();
        match self.parts.last_mut() {
            Some(Part::Head(range)) => range.end = end,
            _ => self.parts.push(Part::Head(start..end)),
        }
    }

    pub fn push_data(&mut self, buffer: Buffer) {
        self.parts.push(Part::Data(buffer));
    }

    pub fn push_zeroes(&mut self, bytes: usize) {
        self.parts.push(Part::Zeroes(bytes));
    }

    /// Ends filling: what was pushed is ready to be written.
    ///
    /// # Panics
    /// It was sealed before.
    pub fn seal(&mut self) {
        assert!(self.vectors.is_empty() && self.next == 0);
        for part in &self.parts {
            match part {
                Part::Head(range) => self.vectors.push(vector(&self.heads[range.clone()])),
                Part::Data(buffer) => self.vectors.push(vector(buffer)),
                Part::Zeroes(bytes) => {
                    let (whole, rest) = (bytes / ZEROES.len(), bytes % ZEROES.len());
                    self.vectors.extend((0..whole).map(|_| vector(&ZEROES)));
                    self.vectors.push(vector(&ZEROES[..rest]));
                }
            }
        }
        self.advance(0);
    }

    /// Takes note that `bytes` were written.
    ///
    /// # Panics
    /// More than there were.
    pub fn advance(&mut self, mut bytes: usize) {
        while let Some(vector) = self.vectors.get_mut(self.next) {
            if bytes < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(bytes);
                vector.iov_len -= bytes;
                return;
            }
            bytes -= vector.iov_len;
            self.next += 1;
        }
        assert!(bytes == 0, "{bytes} more bytes were written than there were");
    }

    /// Is everything written?
    pub fn is_sent(&self) -> bool {
        self.next == self.vectors.len()
    }

    /// Lets go of the buffers; the next batch begins.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.next = 0;
        self.parts.clear();
        self.heads.clear();
    }
}

fn vector(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

// SAFETY: the vectors point into the heap of `heads`, which nobody changes between `seal` and `clear`, into pool
// buffers that `parts` keeps alive, or into static memory; moving the `Gather` moves none of these. They are
// only read.
unsafe impl IoVecBuf for Gather {
    fn read_iovec_ptr(&self) -> *const libc::iovec {
        self.vectors[self.next..].as_ptr()
    }

    fn read_iovec_len(&self) -> usize {
        (self.vectors.len() - self.next).min(VECTORS_PER_WRITE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::buffers::BufferPool;

    /// What the kernel would read, written `step` bytes at a time.
    fn written(gather: &mut Gather, step: usize) -> Vec<u8> {
        let mut out = Vec::new();
        gather.seal();
        while !gather.is_sent() {
            let mut left = step;
            for vector in &gather.vectors[gather.next..][..gather.read_iovec_len()] {
                let take = left.min(vector.iov_len);
                // SAFETY: what the vectors point to lives as long as the gather.
                out.extend_from_slice(unsafe { std::slice::from_raw_parts(vector.iov_base.cast(), take) });
                left -= take;
            }
            gather.advance(step - left);
        }
        out
    }

    #[test]
    fn parts_are_sent_in_order_however_the_socket_cuts_them() {
        let pool = BufferPool::anonymous(16 << 20);
        let free = pool.occupancy();
        for step in [1, 7, 4096, 100_000, usize::MAX] {
            let mut gather = Gather::default();
            for _ in 0..2 {
                let mut data = pool.alloc(5000).unwrap();
                data.fill(9);
                gather.push_head(b"ab");
                gather.push_head(b"cd");
                gather.push_data(data.freeze().slice(1000..4000));
                gather.push_zeroes(ZEROES.len() + 3);
                gather.push_zeroes(ZEROES.len());
                gather.push_head(b"ef");
                let expected =
                    [b"abcd".to_vec(), vec![9; 3000], vec![0; 2 * ZEROES.len() + 3], b"ef".to_vec()].concat();
                assert!(written(&mut gather, step) == expected, "step {step}");
                gather.clear();
                assert!(gather.is_empty());
            }
            assert_eq!(pool.occupancy(), free);
        }
    }

    #[test]
    fn one_write_takes_no_more_vectors_than_the_kernel() {
        let pool = BufferPool::anonymous(16 << 20);
        let data = pool.alloc(4096).unwrap().freeze();
        let mut gather = Gather::default();
        (0..3000).for_each(|index| gather.push_data(data.slice(index..index + 1)));
        gather.seal();
        assert_eq!(gather.read_iovec_len(), VECTORS_PER_WRITE_MAX);
        gather.advance(2999);
        assert_eq!(gather.read_iovec_len(), 1);
        gather.advance(1);
        assert!(gather.is_sent());
    }
}
