//! Session: the transmission phase of one connection, from its first request to its last reply.
//!
//! One task reads requests and starts one task for each piece of them; the pieces run concurrently and each
//! request is answered when its last piece ends. Knows `volume::request`, nothing of groups and stores.
//!
//! Invariants
//! - Every operation, also a refused one, holds a permit until its reply is written; without room nothing is
//!   read from the socket.
//! - The volume is closed after the last of its requests ended, however the connection ended.
//! - What a client asked for that disconnected is finished; for one that is gone without a word nothing more is begun, nor
//!   for one that left without waiting for its answers once another client opens the volume.
//!
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, "Transmission phase".

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::fd::RawFd;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use monoio::io::{AsyncReadRent, AsyncWriteRent};
use xsan_protocol::error::Code;
use xsan_protocol::ids::VolumeId;
use xsan_protocol::units::PAGE_SIZE;

use super::budget::{Budget, Permit, Slots};
use super::handshake::Negotiated;
use super::outbox::{Outbox, push_chunks, push_plain};
use super::rules::{self, ASSEMBLED_BYTES_MAX, Agreed, Command, Piece, SKIPPED_BYTES_MAX};
use super::wire::{self, Errno, Request, command};
use super::{Attachment, Closed, Counters, Gateway};
use crate::disk::buffers::{Buffer, BufferMut, BufferPool, Claim};
use crate::disk::os;
use crate::net::receive::Receiver;
use crate::volume::request::{
    BlockReply, BlockRequest, Client, Operation, Segment, Volumes, ZEROES_BYTES, ZEROES_PARTS_MAX,
};

/// Longest range that one block status request looks at; the answer covers that much and the client asks on.
const BLOCK_STATUS_BYTES_MAX: u64 = 256 << 20;
/// Most extents of one answer.
const EXTENTS_MAX: usize = 4096;
/// What a block status request takes until it is answered, a byte for each page at first and then the answer, is as
/// much as a buffer of this size: so it is counted, though it is no buffer.
const BLOCK_STATUS_HELD_BYTES: usize = BLOCK_STATUS_BYTES_MAX as usize / PAGE_SIZE;
const _: () = assert!(EXTENTS_MAX * 8 < BLOCK_STATUS_HELD_BYTES);
/// How often a client is looked at while its time to do something passes.
const STALL_LOOKS: u32 = 4;
/// Somebody who was seen to wait at so many looks has waited for at least half of that time.
const HUNGRY_LOOKS: u32 = STALL_LOOKS / 2 + 1;
/// A client that has something to take or to send, and moves less than this in that time, stands still.
const STALL_BYTES_MIN: u64 = 64 * 1024;
/// How soon an exhausted pool is asked again.
const POOL_RETRY: Duration = Duration::from_millis(1);

/// What the tasks of one connection share.
pub(super) struct Context<V: Volumes> {
    attachment: Attachment<V>,
    client: Client,
    /// The connection's, while its reader is there to keep it open.
    socket: Cell<Option<RawFd>>,
    /// It was ended because its client had closed the connection.
    swept: Cell<bool>,
    agreed: Agreed,
    pool: &'static BufferPool,
    budget: Rc<Budget>,
    outbox: Rc<Outbox>,
    /// The client owes the rest of a payload, whose buffer waits for it.
    payload_awaited: Cell<bool>,
    /// Payloads that came whole.
    payloads: Cell<u64>,
    received_bytes: Rc<Cell<u64>>,
    failure_logged: Cell<bool>,
    counters: Arc<Counters>,
}

impl<V: Volumes> Context<V> {
    pub fn volume(&self) -> VolumeId {
        self.attachment.export.volume
    }

    /// Has the session look whether it is to end.
    pub fn wake(&self) {
        self.outbox.wake_reader();
    }

    /// Ends the session if its client has closed the connection; what is under way of a session that has ended, or does now.
    pub fn end_if_gone(&self) -> Option<Rc<Budget>> {
        let present = self.socket.get();
        if present.is_some_and(os::is_hung_up) {
            self.swept.set(true);
            self.end();
        } else if present.is_some() {
            return None;
        }
        Some(Rc::clone(&self.budget))
    }

    /// Nobody waits for answers any more.
    fn end(&self) {
        self.client.leave();
        self.outbox.abort();
    }
}

struct Session<R, V: Volumes> {
    receiver: Receiver<R>,
    context: Rc<Context<V>>,
}

/// Serves one connection until the client ends it or breaks the protocol, or the process is to end, and every request
/// has ended.
pub(super) async fn run<R, W, V>(
    mut receiver: Receiver<R>,
    writer: W,
    socket: RawFd,
    negotiated: Negotiated<V>,
    gateway: &Gateway<V>,
) -> Result<(), Closed>
where
    R: AsyncReadRent,
    W: AsyncWriteRent + 'static,
    V: Volumes,
{
    let options = &gateway.options;
    receiver.grow(options.receive_bytes);
    let context = Rc::new(Context {
        attachment: negotiated.attachment,
        client: Client::default(),
        socket: Cell::new(Some(socket)),
        swept: Cell::new(false),
        agreed: negotiated.agreed,
        pool: gateway.pool,
        budget: Budget::new(
            options.bytes_in_flight_max,
            options.operations_in_flight_max,
            Rc::clone(&gateway.share),
        ),
        outbox: Rc::new(Outbox::new()),
        payload_awaited: Cell::new(false),
        payloads: Cell::new(0),
        received_bytes: receiver.received_bytes(),
        failure_logged: Cell::new(false),
        counters: Arc::clone(&gateway.counters),
    });
    gateway.enter(&context);
    monoio::spawn(end_when_stalled(Rc::downgrade(&context), options.stall_timeout));
    let sender = Rc::clone(&context);
    let writer = monoio::spawn(async move { sender.outbox.write_to(writer).await });
    let mut session = Session { receiver, context: Rc::clone(&context) };
    let end = context.outbox.read_unless_aborted(session.receive()).await;
    if !matches!(end, Some(Ok(()))) {
        context.end();
    }
    context.socket.set(None);
    drop(session);
    context.budget.idle().await;
    context.outbox.close();
    writer.await?;
    end.unwrap_or(if context.swept.get() { Ok(()) } else { Err(Closed::Stalled) })
}

/// Ends a connection whose client holds buffers and does next to nothing to free them for `timeout`, or a little
/// longer: what it holds of the pool is everybody's. While others that have nothing wait for it, also one that takes
/// as long for a single batch of replies or a single payload. A client that holds none may be silent, as one that is
/// paused is, if its kernel takes what it is sent.
async fn end_when_stalled<V: Volumes>(context: Weak<Context<V>>, timeout: Duration) {
    let (mut sending, mut receiving) = (Watch::of(STALL_BYTES_MIN), Watch::of(STALL_BYTES_MIN));
    let (mut batch, mut payload) = (Watch::of(1), Watch::of(1));
    let (mut hungry, mut hungry_looks) = (None, 0);
    loop {
        monoio::time::sleep(timeout / STALL_LOOKS).await;
        let Some(context) = context.upgrade() else { return };
        let holds = context.budget.holds_buffers();
        let owes = context.payload_awaited.get();
        let sent = context.outbox.sent_bytes().filter(|_| holds);
        let received = owes.then(|| context.received_bytes.get());
        let stalled = [sending.stands_still(sent), receiving.stands_still(received)];
        let sent = context.outbox.sent_batches().filter(|_| holds);
        let received = owes.then(|| context.payloads.get());
        let slow = [batch.stands_still(sent), payload.stands_still(received)];
        let before = std::mem::replace(&mut hungry, context.budget.starves());
        hungry_looks = match hungry {
            None => 0,
            same if same == before => hungry_looks + 1,
            _ => 1,
        };
        if stalled.contains(&true) || slow.contains(&true) && hungry_looks >= HUNGRY_LOOKS {
            return context.outbox.abort();
        }
    }
}

/// Sees whether a count grows.
struct Watch {
    /// By at least so much in `STALL_LOOKS` intervals.
    least: u64,
    /// The count when it had grown enough last.
    since: Option<u64>,
    looks: u32,
}

impl Watch {
    const fn of(least: u64) -> Self {
        Self { least, since: None, looks: 0 }
    }

    /// The count as it is now, `None` if it need not grow; has it grown too little for `STALL_LOOKS` intervals?
    fn stands_still(&mut self, now: Option<u64>) -> bool {
        match (self.since, now) {
            (Some(since), Some(now)) if now - since < self.least => self.looks += 1,
            _ => (self.since, self.looks) = (now, 0),
        }
        self.looks >= STALL_LOOKS
    }
}

impl<R: AsyncReadRent, V: Volumes> Session<R, V> {
    /// Takes requests until the client disconnects or is gone, or the process is to end.
    async fn receive(&mut self) -> Result<(), Closed> {
        while let Some(request) = self.next().await? {
            if request.command == command::DISCONNECT {
                return Ok(());
            }
            self.on_request(request).await?;
        }
        if !self.context.counters.is_stopping() {
            self.context.client.leave();
        }
        Ok(())
    }

    async fn next(&mut self) -> Result<Option<Request>, Closed> {
        let counters = &self.context.counters;
        let mut header = pin!(self.receiver.array::<{ Request::SIZE }>());
        let bytes = poll_fn(|context| match counters.is_stopping() {
            true => Poll::Ready(Ok(None)),
            false => header.as_mut().poll(context),
        })
        .await?;
        Ok(bytes.map(|bytes| Request::decode(&bytes)).transpose()?)
    }

    async fn on_request(&mut self, request: Request) -> Result<(), Closed> {
        let context = Rc::clone(&self.context);
        context.counters.requests.fetch_add(1, Ordering::Relaxed);
        match context.check(&request) {
            Err(error) => {
                if request.command == command::WRITE {
                    if request.length > SKIPPED_BYTES_MAX {
                        return Err(Closed::WriteTooLong(request.length));
                    }
                    self.receiver.skip(request.length).await?;
                }
                let permit = context.budget.admit(Slots::NONE).await;
                context.refuse(&request, error, permit);
                Ok(())
            }
            Ok(Command::Write { fua }) => self.on_write(&request, fua).await,
            Ok(Command::Read { dont_fragment }) => self.on_read(&request, dont_fragment).await,
            Ok(Command::BlockStatus { one }) => {
                let permit = context.budget.admit(Slots::new(1, BLOCK_STATUS_HELD_BYTES)).await;
                monoio::spawn(context.block_status(request, one, permit));
                Ok(())
            }
            Ok(Command::Cache) => {
                // Nothing lies above the stores that could be filled in advance; the hint is valid and done.
                let permit = context.budget.admit(Slots::NONE).await;
                context.outbox.push([permit], |out| out.push_head(&wire::simple_reply(request.cookie, None)));
                Ok(())
            }
            Ok(Command::Flush) => self.start(&request, Operation::Flush).await,
            Ok(Command::Trim { fua }) => self.start(&request, Operation::Trim { fua }).await,
            Ok(Command::WriteZeroes { fua, no_hole: true }) => self.on_write_zeroes(&request, fua).await,
            Ok(Command::WriteZeroes { fua, no_hole: false }) => {
                self.start(&request, Operation::WriteZeroes { fua, no_hole: false }).await
            }
        }
    }

    /// Starts a request without payload and without data in its answer.
    async fn start(&mut self, request: &Request, operation: Operation) -> Result<(), Closed> {
        let permit = self.context.budget.admit(Slots::NONE).await;
        let (offset, length) = (request.offset, u64::from(request.length));
        let progress = Progress::new(1);
        monoio::spawn(Rc::clone(&self.context).change(
            request.cookie,
            (offset, length),
            operation,
            permit,
            progress,
        ));
        Ok(())
    }

    /// Zeroes that are written. Counted piece by piece as if they took buffers: they take those of the nodes they go to.
    async fn on_write_zeroes(&mut self, request: &Request, fua: bool) -> Result<(), Closed> {
        let pieces = rules::zero_pieces(request.offset, request.length);
        let progress = Progress::new(pieces.clone().count());
        for range in pieces {
            let permit = self.context.budget.admit(Slots::new(ZEROES_PARTS_MAX, ZEROES_BYTES)).await;
            let operation = Operation::WriteZeroes { fua, no_hole: true };
            let progress = Rc::clone(&progress);
            let context = Rc::clone(&self.context);
            monoio::spawn(context.change(request.cookie, range, operation, permit, progress));
        }
        Ok(())
    }

    /// Receives the payload piece by piece; each piece is on its way while the next is received.
    async fn on_write(&mut self, request: &Request, fua: bool) -> Result<(), Closed> {
        let pieces = rules::pieces(request.offset, request.length);
        let progress = Progress::new(pieces.clone().count());
        for Piece { offset, length } in pieces {
            let begin = (offset % PAGE_SIZE as u64) as usize;
            let permit = self.context.budget.admit(Slots::new(1, begin + length)).await;
            let buffer = self.context.buffer(begin + length).await;
            self.context.payload_awaited.set(true);
            let buffer = self.receiver.payload(buffer, begin).await?;
            self.context.payload_awaited.set(false);
            self.context.payloads.set(self.context.payloads.get() + 1);
            let operation = Operation::Write { data: whole(buffer, begin), fua };
            monoio::spawn(Rc::clone(&self.context).change(
                request.cookie,
                (offset, length as u64),
                operation,
                permit,
                Rc::clone(&progress),
            ));
        }
        let counters = &self.context.counters;
        counters.written_bytes.fetch_add(u64::from(request.length), Ordering::Relaxed);
        counters.copied_bytes.fetch_add(self.receiver.take_copied_bytes(), Ordering::Relaxed);
        Ok(())
    }

    async fn on_read(&mut self, request: &Request, dont_fragment: bool) -> Result<(), Closed> {
        let context = &self.context;
        context.counters.read_bytes.fetch_add(u64::from(request.length), Ordering::Relaxed);
        let chunks = context.agreed.structured && !dont_fragment;
        if !chunks && request.length > ASSEMBLED_BYTES_MAX {
            return self.stream_read(request).await;
        }
        let pieces = rules::pieces(request.offset, request.length);
        let count = pieces.clone().count();
        if chunks {
            let progress = Progress::new(count);
            for piece in pieces {
                let permit = context.budget.admit(slots(piece)).await;
                let progress = Rc::clone(&progress);
                monoio::spawn(Rc::clone(context).read_chunk(request.cookie, piece, permit, progress));
            }
            return Ok(());
        }
        // All at once: one that waits for buffers while it holds others could wait for its like.
        let largest = pieces.clone().map(placed_bytes).max().expect("a read has pieces");
        let permit = context.budget.admit(Slots::new(count, largest)).await;
        let assembly = Assembly::new(count, permit);
        for (index, piece) in pieces.enumerate() {
            monoio::spawn(Rc::clone(context).read_part(*request, piece, index, Rc::clone(&assembly)));
        }
        Ok(())
    }

    /// A long read in one run of data: alone on the connection, because nothing may come between its pieces.
    ///
    /// # Errors
    /// `ReadFailed` after the reply has begun: it can only be ended by closing the connection.
    async fn stream_read(&mut self, request: &Request) -> Result<(), Closed> {
        let context = &self.context;
        context.budget.idle().await;
        for (index, piece) in rules::pieces(request.offset, request.length).enumerate() {
            let permit = context.budget.admit(slots(piece)).await;
            match context.read(piece).await {
                Ok(segments) => context.outbox.push([permit], |out| {
                    if index == 0 {
                        out.push_head(&wire::simple_reply(request.cookie, None));
                    }
                    push_plain(out, segments);
                }),
                Err(error) if index == 0 => {
                    context.refuse(request, error, permit);
                    break;
                }
                Err(error) => return Err(Closed::ReadFailed(error)),
            }
        }
        Ok(())
    }
}

/// How the pieces of a request stand.
struct Progress {
    left: Cell<usize>,
    /// The first failure.
    error: Cell<Option<Errno>>,
}

impl Progress {
    fn new(pieces: usize) -> Rc<Self> {
        assert!(pieces > 0);
        Rc::new(Self { left: Cell::new(pieces), error: Cell::new(None) })
    }

    /// Takes note of the end of one piece; true when it was the last.
    fn ended(&self, error: Option<Errno>) -> bool {
        self.error.set(self.error.get().or(error));
        self.left.set(self.left.get() - 1);
        self.left.get() == 0
    }
}

/// A read that is answered in one run of data.
struct Assembly {
    progress: Rc<Progress>,
    pieces: RefCell<Vec<Vec<Segment>>>,
    /// Of all that it holds, until the reply takes it.
    permit: Cell<Option<Permit>>,
}

impl Assembly {
    fn new(pieces: usize, permit: Permit) -> Rc<Self> {
        Rc::new(Self {
            progress: Progress::new(pieces),
            pieces: RefCell::new(vec![Vec::new(); pieces]),
            permit: Cell::new(Some(permit)),
        })
    }
}

/// Bytes of a buffer that holds the piece where its page begins.
fn placed_bytes(piece: Piece) -> usize {
    (piece.offset % PAGE_SIZE as u64) as usize + piece.length
}

fn slots(piece: Piece) -> Slots {
    Slots::new(1, placed_bytes(piece))
}

impl<V: Volumes> Context<V> {
    fn check(&self, request: &Request) -> Result<Command, Errno> {
        let size = self.attachment.volumes.size_bytes(self.attachment.export.volume);
        match size {
            Some(size_bytes) => rules::check(request, self.agreed, size_bytes),
            None => Err(Errno::Shutdown),
        }
    }

    /// Answers a request with an error: reads and block status in the form that was agreed on.
    fn refuse(&self, request: &Request, error: Errno, permit: Permit) {
        self.counters.failed_requests.fetch_add(1, Ordering::Relaxed);
        let chunk = matches!(request.command, command::READ | command::BLOCK_STATUS);
        self.outbox.push([permit], |out| {
            if chunk && self.agreed.structured {
                out.push_head(&wire::chunk_error(request.cookie, error));
            } else {
                out.push_head(&wire::simple_reply(request.cookie, Some(error)));
            }
        });
    }

    async fn buffer(&self, length: usize) -> BufferMut {
        loop {
            match self.pool.alloc_for(Claim::Client, length) {
                Some(buffer) => return buffer,
                None => {
                    self.counters.pool_waits.fetch_add(1, Ordering::Relaxed);
                    monoio::time::sleep(POOL_RETRY).await;
                }
            }
        }
    }

    async fn submit(
        &self,
        (offset, length): (u64, u64),
        operation: Operation,
        writes: bool,
    ) -> Result<BlockReply, Errno> {
        let volume = self.attachment.export.volume;
        let request = BlockRequest { volume, offset, length, operation, client: self.client.clone() };
        self.attachment.volumes.submit(request).await.map_err(|code| {
            // A full pool fails thousands of writes a second: one line tells it.
            if code != Code::ClientGone && !self.failure_logged.replace(true) {
                let export = &self.attachment.export.name;
                tracing::warn!(%export, offset, length, %code, "first failed request of an NBD connection");
            }
            rules::errno(code, writes)
        })
    }

    /// One piece of what changes the volume, or all of it; the last piece answers.
    async fn change(
        self: Rc<Self>,
        cookie: u64,
        range: (u64, u64),
        operation: Operation,
        mut permit: Permit,
        progress: Rc<Progress>,
    ) {
        let error = match self.submit(range, operation, true).await {
            Ok(BlockReply::Done) => None,
            Ok(reply) => panic!("a change is answered with Done, not {reply:?}"),
            Err(error) => Some(error),
        };
        permit.release_slots();
        if progress.ended(error) {
            let error = progress.error.get();
            self.counters.failed_requests.fetch_add(u64::from(error.is_some()), Ordering::Relaxed);
            self.outbox.push([permit], |out| out.push_head(&wire::simple_reply(cookie, error)));
        }
    }

    async fn read(&self, piece: Piece) -> Result<Vec<Segment>, Errno> {
        let range = (piece.offset, piece.length as u64);
        match self.submit(range, Operation::Read, false).await? {
            BlockReply::Data(mut segments) => {
                segments.retain(|segment| segment_bytes(segment) > 0);
                let bytes: usize = segments.iter().map(segment_bytes).sum();
                assert!(bytes == piece.length, "a read of {} bytes returned {bytes}", piece.length);
                Ok(segments)
            }
            reply => panic!("a read is answered with Data, not {reply:?}"),
        }
    }

    /// One piece of a read that is answered by chunks.
    async fn read_chunk(self: Rc<Self>, cookie: u64, piece: Piece, permit: Permit, progress: Rc<Progress>) {
        let result = self.read(piece).await;
        let done = progress.ended(result.as_ref().err().copied());
        if done && progress.error.get().is_some() {
            self.counters.failed_requests.fetch_add(1, Ordering::Relaxed);
        }
        self.outbox.push([permit], |out| match result {
            Ok(segments) => push_chunks(out, cookie, piece.offset, segments, done),
            Err(error) => out.push_head(&wire::chunk_error_offset(cookie, error, piece.offset, done)),
        });
    }

    /// One piece of a read that is answered in one run of data; the last piece answers.
    async fn read_part(self: Rc<Self>, request: Request, piece: Piece, index: usize, assembly: Rc<Assembly>) {
        let result = self.read(piece).await;
        let error = result.as_ref().err().copied();
        assembly.pieces.borrow_mut()[index] = result.unwrap_or_default();
        if !assembly.progress.ended(error) {
            return;
        }
        let pieces = assembly.pieces.take();
        let permit = assembly.permit.take().expect("one piece is the last");
        if let Some(error) = assembly.progress.error.get() {
            drop(pieces);
            return self.refuse(&request, error, permit);
        }
        self.outbox.push([permit], |out| {
            if self.agreed.structured {
                let length = request.length as usize;
                out.push_head(&wire::chunk_data(request.cookie, request.offset, length, true));
            } else {
                out.push_head(&wire::simple_reply(request.cookie, None));
            }
            pieces.into_iter().for_each(|segments| push_plain(out, segments));
        });
    }

    async fn block_status(self: Rc<Self>, request: Request, one: bool, permit: Permit) {
        let length = u64::from(request.length).min(BLOCK_STATUS_BYTES_MAX);
        let operation = Operation::BlockStatus { extents_max: if one { 1 } else { EXTENTS_MAX } };
        match self.submit((request.offset, length), operation, false).await {
            Ok(BlockReply::Extents(extents)) => {
                let bytes =
                    |bytes| u32::try_from(bytes).expect("the range is at most BLOCK_STATUS_BYTES_MAX");
                let extents: Vec<_> =
                    extents.into_iter().map(|(length, data)| (bytes(length), data)).collect();
                let mut chunk = Vec::new();
                wire::chunk_block_status(&mut chunk, request.cookie, &extents);
                self.outbox.push([permit], |out| out.push_head(&chunk));
            }
            Ok(reply) => panic!("block status is answered with Extents, not {reply:?}"),
            Err(error) => self.refuse(&request, error, permit),
        }
    }
}

fn segment_bytes(segment: &Segment) -> usize {
    match segment {
        Segment::Data(buffer) => buffer.len(),
        Segment::Zero(bytes) => *bytes as usize,
    }
}

/// Everything from `begin` on.
fn whole(buffer: BufferMut, begin: usize) -> Buffer {
    let length = buffer.len();
    let buffer = buffer.freeze();
    if begin == 0 { buffer } else { buffer.slice(begin..length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The looks at a count until it is found to stand still.
    fn looks(counts: impl IntoIterator<Item = Option<u64>>) -> Option<usize> {
        let mut watch = Watch::of(STALL_BYTES_MIN);
        counts.into_iter().position(|count| watch.stands_still(count))
    }

    /// A client that sent a byte now and then held its buffer for ever. Found by reading.
    #[test]
    fn a_trickle_is_no_progress() {
        assert_eq!(looks((0..100).map(|_| Some(7))), Some(STALL_LOOKS as usize));
        assert_eq!(looks((0..100).map(Some)), Some(STALL_LOOKS as usize));
        let step = STALL_BYTES_MIN / u64::from(STALL_LOOKS);
        assert_eq!(looks((0..100).map(|look| Some(look * (step - 1)))), Some(STALL_LOOKS as usize));
        assert_eq!(looks((0..100).map(|look| Some(look * step))), None);
        assert_eq!(
            looks((0..100).map(|look| (look % 4 != 0).then_some(7))),
            None,
            "nothing is owed now and then"
        );
    }
}
