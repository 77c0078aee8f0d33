//! Receiver: the reading half of a connection, with a buffer that one system call fills with many requests.
//!
//! Used by peer connections and by gateways. Knows bytes only.
//!
//! Small payloads are copied once out of the receive buffer; of large ones only what happened to arrive with
//! their header is, and the rest is received into its place. After a large payload just the next header is asked
//! for, because another large payload probably follows it.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use monoio::buf::IoBufMut;
use monoio::io::AsyncReadRent;

use crate::disk::buffers::BufferMut;

/// Size of the receive buffer at first: enough for a handshake.
const BYTES_FIRST: usize = 4096;
/// Payloads of which at least this much is outstanding are received in place.
const DIRECT_BYTES_MIN: usize = 32 * 1024;

/// Why nothing more comes.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("the connection ended in the middle of a message")]
    Truncated,
    #[error("receiving failed: {0}")]
    Io(#[from] io::Error),
}

pub struct Receiver<R> {
    stream: R,
    buffer: Box<[u8]>,
    /// Received and not taken: `buffer[start..end]`.
    start: usize,
    end: usize,
    headers_only: bool,
    /// Bytes of the header that messages begin with: what is asked for behind a large payload.
    header_bytes: usize,
    copied_bytes: u64,
    received_bytes: Rc<Cell<u64>>,
}

impl<R: AsyncReadRent> Receiver<R> {
    pub fn new(stream: R, header_bytes: usize) -> Self {
        let buffer = vec![0; BYTES_FIRST].into_boxed_slice();
        Self {
            stream,
            buffer,
            start: 0,
            end: 0,
            headers_only: false,
            header_bytes,
            copied_bytes: 0,
            received_bytes: Rc::default(),
        }
    }

    /// Enlarges the receive buffer to `bytes`, keeping what is in it.
    pub fn grow(&mut self, bytes: usize) {
        let mut buffer = vec![0; bytes.max(BYTES_FIRST)].into_boxed_slice();
        let held = self.end - self.start;
        buffer[..held].copy_from_slice(&self.buffer[self.start..self.end]);
        (self.buffer, self.start, self.end) = (buffer, 0, held);
    }

    /// Are `bytes` more held, so that taking them does not wait?
    pub fn holds(&self, bytes: usize) -> bool {
        self.end - self.start >= bytes
    }

    /// All bytes that ever came, for those who watch whether some do.
    pub fn received_bytes(&self) -> Rc<Cell<u64>> {
        self.received_bytes.clone()
    }

    fn count(&self, bytes: usize) {
        self.received_bytes.set(self.received_bytes.get() + bytes as u64);
    }

    /// Payload bytes copied since the last call.
    pub fn take_copied_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.copied_bytes)
    }

    /// The next `N` bytes; `None` when the client closed the connection before the first.
    pub async fn array<const N: usize>(&mut self) -> Result<Option<[u8; N]>, ReceiveError> {
        while self.end - self.start < N {
            let held = self.end - self.start;
            if self.fill().await? == 0 {
                return if held == 0 { Ok(None) } else { Err(ReceiveError::Truncated) };
            }
        }
        let bytes = self.buffer[self.start..self.start + N].try_into().expect("the range is N long");
        self.start += N;
        Ok(Some(bytes))
    }

    /// The next `length` bytes, which the caller has checked to be few.
    pub async fn bytes(&mut self, length: usize) -> Result<Vec<u8>, ReceiveError> {
        let mut bytes = Vec::with_capacity(length);
        self.fill_vec(&mut bytes, length).await?;
        Ok(bytes)
    }

    /// Fills `out` with the next `length` bytes, which the caller has checked to be few.
    pub async fn fill_vec(&mut self, out: &mut Vec<u8>, length: usize) -> Result<(), ReceiveError> {
        out.clear();
        while out.len() < length {
            if self.start == self.end && self.fill().await? == 0 {
                return Err(ReceiveError::Truncated);
            }
            let take = (length - out.len()).min(self.end - self.start);
            out.extend_from_slice(&self.buffer[self.start..self.start + take]);
            self.start += take;
        }
        Ok(())
    }

    /// Drops the next `length` bytes.
    pub async fn skip(&mut self, length: u32) -> Result<(), ReceiveError> {
        let mut left = length as usize;
        loop {
            let take = left.min(self.end - self.start);
            self.start += take;
            left -= take;
            if left == 0 {
                return Ok(());
            }
            if self.fill().await? == 0 {
                return Err(ReceiveError::Truncated);
            }
        }
    }

    /// Fills `buffer` from `begin` on with the next bytes.
    pub async fn payload(&mut self, mut buffer: BufferMut, begin: usize) -> Result<BufferMut, ReceiveError> {
        let mut next = begin;
        let length = buffer.len();
        loop {
            let take = (length - next).min(self.end - self.start);
            buffer[next..next + take].copy_from_slice(&self.buffer[self.start..self.start + take]);
            self.start += take;
            self.copied_bytes += take as u64;
            next += take;
            if length - next >= DIRECT_BYTES_MIN {
                break;
            }
            if next == length {
                self.headers_only = false;
                return Ok(buffer);
            }
            if self.fill().await? == 0 {
                return Err(ReceiveError::Truncated);
            }
        }
        self.headers_only = true;
        while next < length {
            let (result, slice) = self.stream.read(buffer.slice_mut(next..length)).await;
            buffer = slice.into_inner();
            match result? {
                0 => return Err(ReceiveError::Truncated),
                bytes => {
                    self.count(bytes);
                    next += bytes;
                }
            }
        }
        Ok(buffer)
    }

    /// One system call's worth of bytes, behind those that are held.
    async fn fill(&mut self) -> Result<usize, io::Error> {
        // Less than what is wanted next is held, so this moves next to nothing.
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let headers_only = std::mem::take(&mut self.headers_only);
        let limit = if headers_only { self.header_bytes.max(self.end + 1) } else { self.buffer.len() };
        let buffer = std::mem::take(&mut self.buffer);
        let (result, slice) = self.stream.read(buffer.slice_mut(self.end..limit)).await;
        self.buffer = slice.into_inner();
        let bytes = result?;
        self.count(bytes);
        self.end += bytes;
        Ok(bytes)
    }
}
