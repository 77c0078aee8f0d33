//! One TCP connection between two shards, or from a client: hello, then frames both ways.
//!
//! The reader hands over every frame that one system call brought as one batch; the writer sends all that a
//! turn queued with one `writev`. Used by `shard`. Knows frames and buffers; no group and no request.
//!
//! Invariants
//! - A frame is handed over only when all of its checksums are right; else the connection is closed.
//! - A short pool never stops the reader for long: requests and read data that find no buffer are handed over as
//!   failed with Busy, without their data; replication has memory beside the pool. Else the acknowledgements behind
//!   them would wait, and with them the buffers of others: nodes would wait for one another in a circle.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use monoio::io::{
    AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt, OwnedReadHalf, OwnedWriteHalf, Splitable,
};
use monoio::net::TcpStream;
use xsan_protocol::error::Code;
use xsan_protocol::wire::header::{HEADER_SIZE, Header, HeaderError, Opcode};
use xsan_protocol::wire::session::{Hello, HelloError};

use super::frame::{Frame, PayloadError, Shape};
use super::notify::Notify;
use super::receive::{ReceiveError, Receiver};
use crate::disk::buffers::{BufferMut, BufferPool, Claim, Overflow};
use crate::disk::monoio_buffers::Gather;
use crate::disk::os;

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// A peer that acknowledges nothing for so long is gone: its packets are dropped somewhere, or its host is. A full
/// receive buffer counts as silence too, so this is longer than any queue of ours takes to drain.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// How soon after the end of a cut a connection goes on, at the latest.
const RETRANSMISSION_MAX: Duration = Duration::from_secs(1);
/// How long an exhausted pool is waited for before it is asked again.
const POOL_RETRY: Duration = Duration::from_micros(500);
/// What one system call receives at most, but for large payloads.
const RECEIVE_BYTES: usize = 64 * 1024;

/// Why a connection ended or was never made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error("the peer closed the connection")]
    Ended,
    #[error("closed by this side")]
    Closed,
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("socket: {0}")]
    Io(#[from] io::Error),
    #[error("frame header: {0}")]
    Header(#[from] HeaderError),
    #[error("frame payload: {0}")]
    Payload(#[from] PayloadError),
    #[error("hello: {0}")]
    Hello(#[from] HelloError),
    #[error("no hello within {} s", HELLO_TIMEOUT.as_secs())]
    NoHello,
    #[error("{0}")]
    Refused(Code),
}

/// Counts of one shard's connections.
#[derive(Debug, Default)]
pub struct Counters {
    pub frames_sent: Cell<u64>,
    pub frames_received: Cell<u64>,
    pub sent_bytes: Cell<u64>,
    pub received_bytes: Cell<u64>,
    /// Payload bytes copied between the receive buffer and their own.
    pub copied_bytes: Cell<u64>,
}

/// Frames on their way out of one connection; bounded by what the protocols above allow in flight.
#[derive(Clone, Default)]
pub struct Outbox(Rc<Queue>);

#[derive(Default)]
struct Queue {
    frames: RefCell<Vec<Frame>>,
    wake: Notify,
    closed: Cell<bool>,
    reader_wake: Notify,
}

impl Outbox {
    /// Queues a frame; `wake` sends it.
    pub fn push(&self, frame: Frame) {
        if !self.0.closed.get() {
            self.0.frames.borrow_mut().push(frame);
        }
    }

    pub fn wake(&self) {
        self.0.wake.notify();
    }

    /// Drops what is `unwanted` and the writer has not taken: a socket that takes nothing more keeps one batch of frames in
    /// memory, and the others are here.
    pub fn discard(&self, unwanted: impl Fn(&Header) -> bool) {
        self.0.frames.borrow_mut().retain(|frame| !unwanted(&frame.header));
    }

    pub fn is_closed(&self) -> bool {
        self.0.closed.get()
    }

    /// Ends the connection; what is queued is dropped.
    pub fn close(&self) {
        self.0.closed.set(true);
        self.0.frames.borrow_mut().clear();
        self.0.wake.notify();
        self.0.reader_wake.notify();
    }
}

/// A connection whose hellos were exchanged.
pub struct Connection {
    pub hello: Hello,
    receiver: Receiver<OwnedReadHalf<TcpStream>>,
    writer: OwnedWriteHalf<TcpStream>,
}

impl Connection {
    /// Connects to `address` and says `hello`.
    ///
    /// # Errors
    /// Nobody answers there in time, or the peer refuses.
    pub async fn dial(address: SocketAddr, hello: &Hello) -> Result<Self, ConnectionError> {
        timeout(async {
            let (receiver, mut writer) = split(TcpStream::connect_addr(address).await?)?;
            send_hello(&mut writer, hello).await?;
            let mut connection = Self { hello: hello.clone(), receiver, writer };
            connection.hello = receive_hello(&mut connection.receiver).await?;
            connection.receiver.grow(RECEIVE_BYTES);
            Ok(connection)
        })
        .await
    }

    /// Receives the hello of whoever connected, and answers with `hello`.
    ///
    /// # Errors
    /// It says none in time, is of another cluster or release, or claims to be this node: it is told so.
    pub async fn accept(stream: TcpStream, hello: &Hello) -> Result<Self, ConnectionError> {
        timeout(async {
            let (mut receiver, mut writer) = split(stream)?;
            let theirs = match receive_hello(&mut receiver).await {
                Ok(theirs) if theirs.cluster_id != hello.cluster_id => {
                    return Err(refuse(&mut writer, Code::ClusterIdMismatch).await);
                }
                // Nothing above expects a node to send frames to itself.
                Ok(theirs) if theirs.node == hello.node => {
                    return Err(refuse(&mut writer, Code::NodeIdTaken).await);
                }
                Ok(theirs) => theirs,
                Err(ConnectionError::Hello(error)) => return Err(refuse(&mut writer, error.code()).await),
                Err(ConnectionError::Header(error)) => return Err(refuse(&mut writer, error.code()).await),
                Err(error) => return Err(error),
            };
            send_hello(&mut writer, hello).await?;
            receiver.grow(RECEIVE_BYTES);
            Ok(Self { hello: theirs, receiver, writer })
        })
        .await
    }

    /// Carries frames until the connection ends: those of `outbox` out, batches of received ones to `on_frames`.
    pub async fn run(
        self,
        outbox: Outbox,
        memory: Memory,
        counters: Rc<Counters>,
        mut on_frames: impl FnMut(Vec<Frame>),
    ) -> ConnectionError {
        monoio::spawn(write_frames(self.writer, outbox.clone(), counters.clone()));
        let mut receiver = self.receiver;
        let reading = read_frames(&mut receiver, &memory, &counters, &mut on_frames);
        let closing = async {
            while !outbox.0.closed.get() {
                outbox.0.reader_wake.notified().await;
            }
            ConnectionError::Closed
        };
        let error = race(reading, closing).await;
        outbox.close();
        error
    }
}

/// The first of two futures to end; the other is dropped (monoio keeps the buffers of its operation).
async fn race<T>(first: impl Future<Output = T>, second: impl Future<Output = T>) -> T {
    let (mut first, mut second) = (pin!(first), pin!(second));
    poll_fn(|context| match first.as_mut().poll(context) {
        Poll::Pending => second.as_mut().poll(context),
        ready => ready,
    })
    .await
}

async fn timeout<T>(work: impl Future<Output = Result<T, ConnectionError>>) -> Result<T, ConnectionError> {
    let expiry = async {
        monoio::time::sleep(HELLO_TIMEOUT).await;
        Err(ConnectionError::NoHello)
    };
    race(work, expiry).await
}

type Halves = (Receiver<OwnedReadHalf<TcpStream>>, OwnedWriteHalf<TcpStream>);

fn split(stream: TcpStream) -> Result<Halves, ConnectionError> {
    stream.set_nodelay(true)?;
    os::set_user_timeout(&stream, SILENCE_MAX)?;
    match os::set_retransmission_interval(&stream, RETRANSMISSION_MAX) {
        // An older kernel: connections take longer to go on after a cut.
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {}
        set => set?,
    }
    stream.set_tcp_keepalive(Some(Duration::from_secs(1)), Some(Duration::from_secs(1)), Some(3))?;
    let (reader, writer) = stream.into_split();
    Ok((Receiver::new(reader, HEADER_SIZE), writer))
}

async fn send_hello(writer: &mut OwnedWriteHalf<TcpStream>, hello: &Hello) -> Result<(), ConnectionError> {
    let payload = hello.encode();
    let mut header = Header::new(Opcode::Hello);
    header.payload_length = payload.len() as u32;
    header.payload_crc = xsan_protocol::checksum::crc32c(&payload);
    let bytes = [&header.encode()[..], &payload].concat();
    Ok(writer.write_all(bytes).await.0.map(drop)?)
}

/// Tells the peer why it is not served.
async fn refuse(writer: &mut OwnedWriteHalf<TcpStream>, code: Code) -> ConnectionError {
    let mut header = Header::new(Opcode::Hello);
    header.status = Some(code);
    match writer.write_all(header.encode().to_vec()).await.0 {
        Ok(_) => ConnectionError::Refused(code),
        Err(error) => ConnectionError::Io(error),
    }
}

/// Receives the hello that opens a connection.
///
/// # Errors
/// It is none, or the peer refuses.
pub async fn receive_hello<R: AsyncReadRent>(receiver: &mut Receiver<R>) -> Result<Hello, ConnectionError> {
    let bytes = receiver.array::<HEADER_SIZE>().await?.ok_or(ConnectionError::Ended)?;
    let header = Header::decode(&bytes)?;
    if let Some(code) = header.status {
        return Err(ConnectionError::Refused(code));
    }
    let length = header.payload_length as usize;
    if header.opcode != Opcode::Hello || length > 4096 {
        return Err(HelloError::Length { found: length }.into());
    }
    let payload = receiver.bytes(length).await?;
    let computed = xsan_protocol::checksum::crc32c(&payload);
    if computed != header.payload_crc {
        return Err(PayloadError::Checksum { found: header.payload_crc, computed }.into());
    }
    Ok(Hello::decode(&payload)?)
}

/// Receives frames until the stream ends or breaks; a batch is handed over before anything is waited for.
pub async fn read_frames<R: AsyncReadRent>(
    receiver: &mut Receiver<R>,
    memory: &Memory,
    counters: &Counters,
    on_frames: &mut impl FnMut(Vec<Frame>),
) -> ConnectionError {
    let mut batch = Vec::new();
    let mut head = Vec::new();
    loop {
        let more = read_frame(receiver, memory, &mut head, &mut batch, on_frames).await;
        counters.copied_bytes.set(counters.copied_bytes.get() + receiver.take_copied_bytes());
        match more {
            Ok(frame) => {
                counters.frames_received.set(counters.frames_received.get() + 1);
                let bytes = HEADER_SIZE + frame.header.payload_length as usize;
                counters.received_bytes.set(counters.received_bytes.get() + bytes as u64);
                batch.push(frame);
            }
            Err(error) => {
                hand_over(&mut batch, on_frames);
                return error;
            }
        }
    }
}

fn hand_over(batch: &mut Vec<Frame>, on_frames: &mut impl FnMut(Vec<Frame>)) {
    if !batch.is_empty() {
        on_frames(std::mem::take(batch));
    }
}

async fn read_frame<R: AsyncReadRent>(
    receiver: &mut Receiver<R>,
    memory: &Memory,
    head: &mut Vec<u8>,
    batch: &mut Vec<Frame>,
    on_frames: &mut impl FnMut(Vec<Frame>),
) -> Result<Frame, ConnectionError> {
    if !receiver.holds(HEADER_SIZE) {
        hand_over(batch, on_frames);
    }
    let bytes = receiver.array::<HEADER_SIZE>().await?.ok_or(ConnectionError::Ended)?;
    let header = Header::decode(&bytes)?;
    let shape = Shape::of(&header)?;
    if !receiver.holds(shape.head() + shape.data) {
        hand_over(batch, on_frames);
    }
    receiver.fill_vec(head, shape.head()).await?;
    if shape.data == 0 {
        return Ok(Frame::decode(header, shape, head, None)?);
    }
    let claim = claim_of(header.opcode);
    let buffer = match memory.alloc(claim, shape.data) {
        Some(buffer) => buffer,
        None if claim == Claim::Replication => {
            hand_over(batch, on_frames);
            memory.wait(shape.data).await
        }
        None => {
            receiver.skip(shape.data as u32).await?;
            return Ok(Frame::busy(header));
        }
    };
    let data = receiver.payload(buffer, 0).await?.freeze();
    Ok(Frame::decode(header, shape, head, Some(data))?)
}

/// What the payload of a frame may take of a pool.
pub const fn claim_of(opcode: Opcode) -> Claim {
    match opcode {
        Opcode::Write | Opcode::ReadReply => Claim::Request,
        _ => Claim::Replication,
    }
}

/// Where received payloads go.
#[derive(Clone)]
pub struct Memory {
    pub pool: &'static BufferPool,
    pub overflow: Rc<Overflow>,
}

impl Memory {
    fn alloc(&self, claim: Claim, length: usize) -> Option<BufferMut> {
        let buffer = self.pool.alloc_for(claim, length);
        if claim == Claim::Replication { buffer.or_else(|| self.overflow.alloc(length)) } else { buffer }
    }

    async fn wait(&self, length: usize) -> BufferMut {
        loop {
            monoio::time::sleep(POOL_RETRY).await;
            if let Some(buffer) = self.alloc(Claim::Replication, length) {
                return buffer;
            }
        }
    }
}

/// Sends what is queued, all of it at each wake, until the connection is closed.
async fn write_frames(mut writer: OwnedWriteHalf<TcpStream>, outbox: Outbox, counters: Rc<Counters>) {
    let mut gather = Gather::default();
    let mut head = Vec::new();
    let queue = &outbox.0;
    while !queue.closed.get() {
        queue.wake.notified().await;
        let frames = std::mem::take(&mut *queue.frames.borrow_mut());
        if frames.is_empty() {
            continue;
        }
        let mut bytes = 0;
        counters.frames_sent.set(counters.frames_sent.get() + frames.len() as u64);
        for frame in frames {
            head.clear();
            frame.encode_head(&mut head);
            gather.push_head(&head);
            bytes += head.len();
            if let Some(data) = frame.data {
                bytes += data.len();
                gather.push_data(data);
            }
        }
        counters.sent_bytes.set(counters.sent_bytes.get() + bytes as u64);
        gather.seal();
        while !gather.is_sent() {
            let (result, back) = writer.writev(gather).await;
            gather = back;
            match result {
                Ok(sent) if sent > 0 => gather.advance(sent),
                _ => {
                    // The reader meets the same broken socket, and reports it; closing makes sure that it does.
                    outbox.close();
                    return;
                }
            }
        }
        gather.clear();
    }
}

#[cfg(test)]
mod tests;
