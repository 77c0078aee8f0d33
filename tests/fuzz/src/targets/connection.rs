//! What comes over a connection between data processes, through the code that receives it: hello, then frames, and
//! what client I/O is made of them.

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use anyhow::{Context as _, ensure};
use monoio::BufResult;
use monoio::buf::{IoBufMut, IoVecBufMut};
use monoio::io::AsyncReadRent;
use xsan_dataplane::disk::buffers::{Buffer, BufferPool};
use xsan_dataplane::net::connection::{ConnectionError, Counters, Memory, read_frames, receive_hello};
use xsan_dataplane::net::frame::{Frame, Meta, Shape};
use xsan_dataplane::net::receive::{ReceiveError, Receiver};
use xsan_dataplane::replication::{Origin, RequestId};
use xsan_dataplane::testing::Random;
use xsan_dataplane::volume::wire::{frame_answer, frame_request, request_frame};
use xsan_protocol::checksum::{crc32c, page_checksums};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, Seq, Version};
use xsan_protocol::units::PAGE_SIZE;
use xsan_protocol::wire::header::{self, HEADER_SIZE, Header, Opcode, flags};
use xsan_protocol::wire::replication::{AppendMeta, EntryKind, FetchMeta, PeerInfo, PushMeta};

use super::wire::{VERSION, digests, hello, key, seal_header, units, versions};
use crate::measure::Bound;
use crate::target::{Form, Target, Verdict};

pub const TARGETS: &[Target] = &[Target {
    name: "connection",
    what: "the byte stream of a connection: hello, frames, requests and answers of client I/O",
    form: Form::Bytes,
    bytes_max: 256 * 1024,
    test_inputs: 2_000,
    seeds,
    fix,
    check,
    known: &[],
}];

thread_local! {
    static POOL: &'static BufferPool = BufferPool::anonymous(128 << 20);
}

/// A frame takes 200 bytes in memory and 64 on the wire; batches of them grow by doubling. The receive buffer is one of
/// 4 KiB and one of 64 KiB. Data goes to the pool.
const BOUND: Bound = Bound::new(24, 128 * 1024);

fn pages(count: usize) -> Buffer {
    let mut buffer =
        POOL.with(|pool| pool.alloc(count * PAGE_SIZE)).expect("the pool is larger than any input");
    for (number, byte) in buffer.iter_mut().enumerate() {
        *byte = (number / 7) as u8;
    }
    buffer.freeze()
}

fn list(bytes: &[u8]) -> Buffer {
    let mut buffer = POOL.with(|pool| pool.alloc(bytes.len())).expect("the pool is larger than any input");
    buffer.copy_from_slice(bytes);
    buffer.freeze()
}

fn frame(opcode: Opcode) -> Frame {
    let mut header = Header::new(opcode);
    header.request_id = 9;
    header.group = GroupId(0x0001_0005);
    header.epoch = Epoch(3);
    header.key = key(2);
    header.offset = 8192;
    header.length = 8192;
    Frame::new(header)
}

fn with_pages(mut frame: Frame, count: usize) -> Frame {
    let data = pages(count);
    frame.header.length = data.len() as u32;
    frame.checksums = Some(page_checksums(&data));
    frame.data = Some(data);
    frame
}

fn with_list(mut frame: Frame, bytes: &[u8]) -> Frame {
    frame.header.length = bytes.len() as u32;
    frame.data = Some(list(bytes));
    frame
}

/// A frame of each opcode, as the processes make them.
fn frames() -> Vec<Frame> {
    let append = |kind| {
        Meta::Append(AppendMeta {
            kind,
            version: VERSION,
            acked: Seq(70),
            previous_first: Version::ZERO,
            previous_last: VERSION,
        })
    };
    let frames = Opcode::ALL.iter().filter(|opcode| !matches!(opcode, Opcode::Hello | Opcode::Link));
    let mut frames: Vec<Frame> = frames
        .map(|opcode| {
            let frame = frame(*opcode);
            let meta = |meta| Frame { meta, ..frame.clone() };
            match opcode {
                Opcode::Append | Opcode::FetchReply => with_pages(meta(append(EntryKind::Write)), 2),
                Opcode::PeerInfo => {
                    meta(Meta::PeerInfo(PeerInfo { last: VERSION, durable: Seq(9), acked: Seq(8) }))
                }
                Opcode::Fetch => meta(Meta::Fetch(FetchMeta { from: Seq(4), to: Seq(900) })),
                Opcode::Push => {
                    with_pages(meta(Meta::Push(PushMeta { version: VERSION, as_of: Seq(10), lost: 4 })), 16)
                }
                Opcode::Write | Opcode::ReadReply | Opcode::FetchPagesReply | Opcode::Mend => {
                    with_pages(frame, 1)
                }
                Opcode::FlushReply => with_list(frame, &[5, 0, 1, 0, 6, 0, 1, 0]),
                Opcode::BlockStatusReply => {
                    let mut frame = with_list(frame, &[0b1010_0101]);
                    frame.header.length = 8;
                    frame
                }
                Opcode::Compare => with_list(frame, &digests(3)),
                Opcode::CompareReply => with_list(frame, &versions(2)),
                Opcode::CheckReply => with_list(frame, &units(2)),
                _ => frame,
            }
        })
        .collect();
    frames.push(Frame { meta: append(EntryKind::Zero), ..frame(Opcode::Append) });
    frames.push(with_pages(frame(Opcode::Write), 17));
    let mut sectors = with_list(frame(Opcode::Write), &[7; 512]);
    sectors.header.flags = flags::SUB_PAGE | flags::FUA;
    frames.push(sectors);
    let mut refused = frame(Opcode::FetchReply);
    refused.header.status = Some(Code::Busy);
    frames.push(refused);
    frames
}

fn encode(frame: &Frame, out: &mut Vec<u8>) {
    frame.encode_head(out);
    out.extend_from_slice(frame.data.as_deref().unwrap_or_default());
}

fn seeds() -> Vec<Vec<u8>> {
    let mut hello_frame = {
        let payload = hello("cluster-1").encode();
        let mut header = Header::new(Opcode::Hello);
        header.payload_length = payload.len() as u32;
        header.payload_crc = crc32c(&payload);
        [&header.encode()[..], &payload].concat()
    };
    let mut seeds: Vec<Vec<u8>> = Vec::new();
    let mut all = Vec::new();
    for frame in frames() {
        let mut bytes = Vec::new();
        encode(&frame, &mut bytes);
        all.extend_from_slice(&bytes);
        seeds.push(bytes);
    }
    seeds.push(hello_frame.clone());
    hello_frame.extend_from_slice(&all);
    seeds.push(hello_frame);
    seeds.push(all);
    seeds
}

/// Makes the lengths and checksums of every frame of the stream right, as far as it is one.
#[expect(clippy::ptr_arg, reason = "the type of every target's `fix`")]
fn fix(bytes: &mut Vec<u8>, random: &mut Random) {
    let mut rest = &mut bytes[..];
    while let Some((head, behind)) = rest.split_at_mut_checked(HEADER_SIZE) {
        head[..4].copy_from_slice(&header::MAGIC.to_le_bytes());
        if !random.one_in(16) {
            head[8] = header::VERSION;
            head[14..16].fill(0);
            let claimed = u32::from_le_bytes([head[56], head[57], head[58], head[59]]);
            head[56..60].copy_from_slice(&claimed.min(behind.len() as u32).to_le_bytes());
        }
        seal_header(head);
        let decode =
            |head: &[u8]| Header::decode(head.first_chunk().expect("cut to the size of a header")).ok();
        let Some(header) = decode(head) else { return };
        let Some((payload, next)) = behind.split_at_mut_checked(header.payload_length as usize) else {
            return;
        };
        let Ok(shape) = Shape::of(&header) else { return };
        let (covered, data) = payload.split_at_mut(shape.head());
        for (entry, page) in covered[shape.meta..].chunks_exact_mut(4).zip(data.chunks_exact(PAGE_SIZE)) {
            entry.copy_from_slice(&crc32c(page).to_le_bytes());
        }
        let checksum = crc32c(if covered.is_empty() { data } else { covered });
        head[60..64].copy_from_slice(&checksum.to_le_bytes());
        seal_header(head);
        rest = next;
    }
}

/// A socket that holds all that will ever come, and gives at most `chunk` bytes at once.
struct Stream<'a> {
    bytes: &'a [u8],
    chunk: usize,
}

impl AsyncReadRent for Stream<'_> {
    async fn read<T: IoBufMut>(&mut self, buf: T) -> BufResult<usize, T> {
        let mut next = &self.bytes[..self.bytes.len().min(self.chunk)];
        let (result, buf) = next.read(buf).await;
        if let Ok(bytes) = &result {
            self.bytes = &self.bytes[*bytes..];
        }
        (result, buf)
    }

    async fn readv<T: IoVecBufMut>(&mut self, buf: T) -> BufResult<usize, T> {
        self.bytes.readv(buf).await
    }
}

/// Runs what never waits.
fn ready<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Ok(value),
        Poll::Pending => anyhow::bail!("it waits, though all bytes and a large pool are there"),
    }
}

fn receive(bytes: &[u8], pool: &'static BufferPool) -> anyhow::Result<(Vec<Frame>, ConnectionError)> {
    // Chunks of an odd size cut headers and payloads; which, is as random as the input.
    let chunk = [61, 509, 4096, 70_000, usize::MAX][crc32c(bytes) as usize % 5];
    let mut receiver = Receiver::new(Stream { bytes, chunk }, HEADER_SIZE);
    let mut received = Vec::new();
    ready(async {
        if bytes.get(9) == Some(&(Opcode::Hello as u8)) {
            if let Err(error) = receive_hello(&mut receiver).await {
                return error;
            }
            receiver.grow(64 * 1024);
        }
        let memory = Memory { pool, overflow: Rc::default() };
        read_frames(&mut receiver, &memory, &Counters::default(), &mut |frames| received.extend(frames)).await
    })
    .map(|error| (received, error))
}

fn check(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // Made before anything is counted: a process has one before it has connections.
    let pool = POOL.with(|pool| *pool);
    let (received, error) = BOUND.hold(bytes.len(), || receive(bytes, pool))??;
    let mut encoded = Vec::new();
    for frame in &received {
        encode(frame, &mut encoded);
    }
    // A hello is checked by a target of its own; here it only opens the stream.
    let skipped =
        if bytes.get(9) == Some(&(Opcode::Hello as u8)) && !matches!(error, ConnectionError::Hello(_)) {
            let header = bytes.first_chunk().and_then(|bytes| Header::decode(bytes).ok());
            header.map_or(bytes.len(), |header| HEADER_SIZE + header.payload_length as usize).min(bytes.len())
        } else {
            0
        };
    ensure!(bytes[skipped..].starts_with(&encoded), "the frames received are not those that were sent");
    let whole = matches!(error, ConnectionError::Ended);
    ensure!(!whole || skipped + encoded.len() == bytes.len(), "bytes were dropped: {error}");
    let known = matches!(
        error,
        ConnectionError::Ended
            | ConnectionError::Receive(ReceiveError::Truncated)
            | ConnectionError::Header(_)
            | ConnectionError::Payload(_)
            | ConnectionError::Hello(_)
            | ConnectionError::Refused(_)
    );
    ensure!(known, "the stream ends with {error}");
    let accepted = !received.is_empty();
    BOUND.hold(bytes.len(), || received.into_iter().try_for_each(client_io))??;
    Ok(if accepted { Verdict::Accepted } else { Verdict::Refused })
}

/// What the client I/O above makes of a frame.
fn client_io(frame: Frame) -> anyhow::Result<()> {
    let id = RequestId { origin: Origin::Connection(1), number: frame.header.request_id };
    if let Ok(request) = frame_request(id, frame.clone()) {
        let again = request_frame(&request);
        let same = |header: Header| {
            (header.request_id, header.group, header.epoch, header.key, header.offset, header.length)
        };
        ensure!(same(again.header) == same(frame.header), "{:?} became {:?}", frame.header, again.header);
        let reply = frame_request(id, again);
        ensure!(reply.is_ok(), "the frame of a request is refused: {:?}", reply.err());
    }
    frame_answer(frame)
        .map(drop)
        .or_else(|code| Code::from_number(code.number()).map(drop).context("no such code"))
}
