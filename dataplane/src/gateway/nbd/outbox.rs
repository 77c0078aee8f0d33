//! Outbox: replies of one connection, gathered while the writer is busy and sent in one `writev`.
//!
//! Requests that complete in one turn of the loop add to one batch, because the writer's task runs after theirs;
//! at depth one it runs at once. Used by `session`.
//!
//! Invariants
//! - A reply is added whole or not at all, so replies never interleave.
//! - A permit ends after its reply is written, or once the outbox is aborted.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::task::{Poll, Waker};

use monoio::io::AsyncWriteRent;

use super::budget::Permit;
use super::wire;
use crate::disk::monoio_buffers::Gather;
use crate::volume::request::Segment;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// No reply will be added; what is there is still sent.
    Closing,
    /// Nothing is sent any more, replies are dropped.
    Aborted,
}

#[derive(Default)]
struct Batch {
    gather: Gather,
    permits: Vec<Permit>,
}

pub(super) struct Outbox {
    state: Cell<State>,
    batch: RefCell<Batch>,
    sent_bytes: Cell<u64>,
    sent_batches: Cell<u64>,
    /// The writer, while it waits for replies.
    idle_writer: RefCell<Option<Waker>>,
    /// The writer, while it waits for the socket.
    busy_writer: RefCell<Option<Waker>>,
    /// The session, while it waits for the client.
    reader: RefCell<Option<Waker>>,
}

impl Outbox {
    pub fn new() -> Self {
        Self {
            state: Cell::new(State::Open),
            batch: RefCell::default(),
            sent_bytes: Cell::new(0),
            sent_batches: Cell::new(0),
            idle_writer: RefCell::default(),
            busy_writer: RefCell::default(),
            reader: RefCell::default(),
        }
    }

    /// Adds one reply, or one chunk of a structured one, whose bytes `add` pushes.
    pub fn push(&self, permits: impl IntoIterator<Item = Permit>, add: impl FnOnce(&mut Gather)) {
        assert!(self.state.get() != State::Closing, "the session closes when no request is left");
        if self.is_aborted() {
            return;
        }
        let mut batch = self.batch.borrow_mut();
        add(&mut batch.gather);
        batch.permits.extend(permits);
        drop(batch);
        wake(&self.idle_writer);
    }

    /// Lets the writer end when all is written.
    pub fn close(&self) {
        if self.state.get() == State::Open {
            self.state.set(State::Closing);
        }
        wake(&self.idle_writer);
    }

    /// Drops what is not written, now and later, and ends the writer even if the socket takes nothing.
    pub fn abort(&self) {
        self.state.set(State::Aborted);
        let batch = self.batch.take();
        drop(batch);
        wake(&self.idle_writer);
        wake(&self.busy_writer);
        wake(&self.reader);
    }

    /// Has the session look whether it is to end.
    pub fn wake_reader(&self) {
        wake(&self.reader);
    }

    fn is_aborted(&self) -> bool {
        self.state.get() == State::Aborted
    }

    /// Bytes that the socket has taken; `None` while there is nothing to take.
    pub fn sent_bytes(&self) -> Option<u64> {
        self.busy_writer.borrow().is_some().then(|| self.sent_bytes.get())
    }

    /// Batches that the socket has taken whole; `None` while there is nothing to take.
    pub fn sent_batches(&self) -> Option<u64> {
        self.busy_writer.borrow().is_some().then(|| self.sent_batches.get())
    }

    /// Writes batches until the outbox is closed or aborted; a failure aborts it.
    pub async fn write_to<W: AsyncWriteRent>(&self, mut stream: W) -> Result<(), io::Error> {
        let mut batch = Batch::default();
        while self.next(&mut batch).await {
            batch.gather.seal();
            while !batch.gather.is_sent() {
                let write = stream.writev(batch.gather);
                let Some((result, gather)) = self.unless_aborted(&self.busy_writer, write).await else {
                    return Ok(());
                };
                batch.gather = gather;
                let written = match result {
                    Ok(0) => Err(io::ErrorKind::WriteZero.into()),
                    result => result,
                };
                match written {
                    Ok(bytes) => {
                        self.sent_bytes.set(self.sent_bytes.get() + bytes as u64);
                        batch.gather.advance(bytes);
                    }
                    Err(error) => {
                        self.abort();
                        return Err(error);
                    }
                }
            }
            self.sent_batches.set(self.sent_batches.get() + 1);
            batch.gather.clear();
            batch.permits.clear();
        }
        Ok(())
    }

    /// Exchanges the empty `batch` for the filled one; false when there will be none.
    async fn next(&self, batch: &mut Batch) -> bool {
        poll_fn(|context| {
            let mut filled = self.batch.borrow_mut();
            if !filled.gather.is_empty() {
                std::mem::swap(&mut *filled, batch);
                return Poll::Ready(true);
            }
            if self.state.get() != State::Open {
                return Poll::Ready(false);
            }
            self.idle_writer.replace(Some(context.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// Runs what the session does with the client's bytes; `None` if the outbox is aborted meanwhile.
    pub async fn read_unless_aborted<T>(&self, reading: impl Future<Output = T>) -> Option<T> {
        self.unless_aborted(&self.reader, reading).await
    }

    async fn unless_aborted<T>(
        &self,
        slot: &RefCell<Option<Waker>>,
        operation: impl Future<Output = T>,
    ) -> Option<T> {
        let mut operation = pin!(operation);
        poll_fn(|context| {
            if self.is_aborted() {
                return Poll::Ready(None);
            }
            let result = operation.as_mut().poll(context);
            let waker = result.is_pending().then(|| context.waker().clone());
            slot.replace(waker);
            result.map(Some)
        })
        .await
    }
}

fn wake(slot: &RefCell<Option<Waker>>) {
    if let Some(waker) = slot.take() {
        waker.wake();
    }
}

/// Adds data as it is, zeroes spelled out.
pub(super) fn push_plain(gather: &mut Gather, segments: Vec<Segment>) {
    for segment in segments {
        match segment {
            Segment::Data(buffer) => gather.push_data(buffer),
            Segment::Zero(bytes) => gather.push_zeroes(bytes as usize),
        }
    }
}

/// Adds data from `offset` on as chunks, zeroes as holes; the last chunk ends the reply if `done`.
pub(super) fn push_chunks(
    gather: &mut Gather,
    cookie: u64,
    mut offset: u64,
    segments: Vec<Segment>,
    done: bool,
) {
    let mut segments = segments.into_iter().peekable();
    while let Some(segment) = segments.next() {
        match segment {
            Segment::Zero(mut bytes) => {
                while let Some(Segment::Zero(more)) =
                    segments.next_if(|next| matches!(next, Segment::Zero(_)))
                {
                    bytes += more;
                }
                let last = done && segments.peek().is_none();
                gather.push_head(&wire::chunk_hole(cookie, offset, bytes, last));
                offset += u64::from(bytes);
            }
            Segment::Data(first) => {
                let mut bytes = first.len();
                let mut run = vec![];
                while let Some(Segment::Data(more)) =
                    segments.next_if(|next| matches!(next, Segment::Data(_)))
                {
                    bytes += more.len();
                    run.push(more);
                }
                let last = done && segments.peek().is_none();
                gather.push_head(&wire::chunk_data(cookie, offset, bytes, last));
                gather.push_data(first);
                run.into_iter().for_each(|buffer| gather.push_data(buffer));
                offset += bytes as u64;
            }
        }
    }
}
