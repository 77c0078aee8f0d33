//! The NBD protocol's bytes: decoded from clients, encoded for them. No I/O, no state.
//!
//! Used by `handshake` and `session`; knows nothing of volumes and sockets.
//!
//! Invariants
//! - Decoding any bytes ends in a value or a [`Malformed`], never in a panic, and allocates at most in proportion
//!   to the bytes that are there.
//!
//! Source: <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, all integers big-endian.

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[cfg(test)]
mod tests;

const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Longest string of the protocol (export names, queries).
pub const STRING_BYTES_MAX: usize = 4096;
/// The only metadata context: which parts hold data.
pub const CONTEXT_ALLOCATION: &str = "base:allocation";
pub const CONTEXT_ALLOCATION_ID: u32 = 1;
/// Zeroes that end the reply to `EXPORT_NAME`, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;

/// Bits of the handshake, the same for both sides.
pub mod hello {
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Numbers of options.
pub mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of replies to options; errors have bit 31 set.
pub mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
}

/// Kinds of information about an export.
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export offers.
mod export {
    pub const HAS_FLAGS: u16 = 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Bits of a request.
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Numbers of requests.
pub mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Kinds of chunks of a structured reply.
pub mod chunk {
    pub const DATA: u16 = 1;
    pub const HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

const CHUNK_DONE: u16 = 1;
const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 1 << 1;

/// Error numbers of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

/// Bytes from a client that the protocol does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("option with magic {0:#x}")]
    OptionMagic(u64),
    #[error("request with magic {0:#x}")]
    RequestMagic(u32),
    #[error("payload of an option is cut short or too long")]
    OptionPayload,
    #[error("string is longer than {STRING_BYTES_MAX} bytes or not UTF-8")]
    String,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct GreetingBytes {
    magic: U64,        // 0
    option_magic: U64, // 8
    flags: U16,        // 16
}
const _: () = assert!(size_of::<GreetingBytes>() == 18);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OptionBytes {
    magic: U64,  // 0
    option: U32, // 8
    length: U32, // 12
}
const _: () = assert!(size_of::<OptionBytes>() == OptionHeader::SIZE);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct OptionReplyBytes {
    magic: U64,  // 0
    option: U32, // 8
    kind: U32,   // 12
    length: U32, // 16
}
const _: () = assert!(size_of::<OptionReplyBytes>() == 20);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RequestBytes {
    magic: U32,   // 0
    flags: U16,   // 4
    command: U16, // 6
    cookie: U64,  // 8
    offset: U64,  // 16
    length: U32,  // 24
}
const _: () = assert!(size_of::<RequestBytes>() == Request::SIZE);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct SimpleReplyBytes {
    magic: U32,  // 0
    error: U32,  // 4
    cookie: U64, // 8
}
const _: () = assert!(size_of::<SimpleReplyBytes>() == SIMPLE_REPLY_SIZE);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ChunkBytes {
    magic: U32,  // 0
    flags: U16,  // 4
    kind: U16,   // 6
    cookie: U64, // 8
    length: U32, // 16
}
const _: () = assert!(size_of::<ChunkBytes>() == 20);

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ChunkDataBytes {
    head: ChunkBytes, // 0
    offset: U64,      // 20
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ChunkHoleBytes {
    head: ChunkBytes, // 0
    offset: U64,      // 20
    length: U32,      // 28
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ChunkErrorBytes {
    head: ChunkBytes,    // 0
    error: U32,          // 20
    message_length: U16, // 24
}

#[derive(IntoBytes, Immutable, Unaligned)]
#[repr(C)]
struct ChunkErrorOffsetBytes {
    head: ChunkBytes,    // 0
    error: U32,          // 20
    message_length: U16, // 24
    offset: U64,         // 26
}

pub const SIMPLE_REPLY_SIZE: usize = 16;
pub const CHUNK_DATA_SIZE: usize = 28;
pub const CHUNK_HOLE_SIZE: usize = 32;
pub const CHUNK_ERROR_SIZE: usize = 26;
pub const CHUNK_ERROR_OFFSET_SIZE: usize = 34;

/// First bytes of the server.
pub fn greeting() -> Vec<u8> {
    let greeting = GreetingBytes {
        magic: GREETING_MAGIC.into(),
        option_magic: OPTION_MAGIC.into(),
        flags: (hello::FIXED_NEWSTYLE | hello::NO_ZEROES).into(),
    };
    greeting.as_bytes().to_vec()
}

/// Head of an option; `length` bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    pub length: u32,
}

impl OptionHeader {
    pub const SIZE: usize = 16;

    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let bytes: OptionBytes = zerocopy::transmute!(*bytes);
        if bytes.magic != OPTION_MAGIC {
            return Err(Malformed::OptionMagic(bytes.magic.get()));
        }
        Ok(Self { option: bytes.option.get(), length: bytes.length.get() })
    }
}

/// Payload of `INFO` and `GO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportQuery<'a> {
    pub name: &'a str,
    /// Was [`info::NAME`] asked for? The other kinds are sent always or never.
    pub wants_name: bool,
}

impl<'a> ExportQuery<'a> {
    pub fn decode(payload: &'a [u8]) -> Result<Self, Malformed> {
        let (name, rest) = string(payload)?;
        let (count, rest) = U16::read_from_prefix(rest).map_err(|_| Malformed::OptionPayload)?;
        let kinds = <[U16]>::ref_from_bytes(rest).map_err(|_| Malformed::OptionPayload)?;
        if kinds.len() != usize::from(count.get()) {
            return Err(Malformed::OptionPayload);
        }
        Ok(Self { name, wants_name: kinds.iter().any(|kind| *kind == info::NAME) })
    }
}

/// Payload of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery<'a> {
    pub name: &'a str,
    pub queries: Vec<&'a str>,
}

impl<'a> ContextQuery<'a> {
    pub fn decode(payload: &'a [u8]) -> Result<Self, Malformed> {
        let (name, rest) = string(payload)?;
        let (count, mut rest) = U32::read_from_prefix(rest).map_err(|_| Malformed::OptionPayload)?;
        // Grown as they come: the claimed count is not believed.
        let mut queries = Vec::new();
        for _ in 0..count.get() {
            let (query, behind) = string(rest)?;
            queries.push(query);
            rest = behind;
        }
        if rest.is_empty() { Ok(Self { name, queries }) } else { Err(Malformed::OptionPayload) }
    }

    /// Does a list query match `base:allocation`? No queries at all means all contexts.
    pub fn lists_allocation(&self) -> bool {
        self.queries.is_empty() || self.queries.iter().any(|q| *q == "base:" || *q == CONTEXT_ALLOCATION)
    }

    pub fn sets_allocation(&self) -> bool {
        self.queries.contains(&CONTEXT_ALLOCATION)
    }
}

/// A string behind its 32-bit length, and what follows it.
fn string(bytes: &[u8]) -> Result<(&str, &[u8]), Malformed> {
    let (length, rest) = U32::read_from_prefix(bytes).map_err(|_| Malformed::OptionPayload)?;
    let length = length.get() as usize;
    if length > STRING_BYTES_MAX {
        return Err(Malformed::String);
    }
    let (string, rest) = rest.split_at_checked(length).ok_or(Malformed::OptionPayload)?;
    Ok((export_name(string)?, rest))
}

/// A name that is a whole payload, as of `EXPORT_NAME`.
pub fn export_name(payload: &[u8]) -> Result<&str, Malformed> {
    if payload.len() > STRING_BYTES_MAX {
        return Err(Malformed::String);
    }
    std::str::from_utf8(payload).map_err(|_| Malformed::String)
}

/// Appends the reply `kind` to `option`.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("replies to options are short");
    let header = OptionReplyBytes {
        magic: OPTION_REPLY_MAGIC.into(),
        option: option.into(),
        kind: kind.into(),
        length: length.into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(payload);
}

/// Payload of [`reply::SERVER`]: one export of a list.
pub fn server_payload(name: &str) -> Vec<u8> {
    let length = u32::try_from(name.len()).expect("names of volumes are short");
    [&length.to_be_bytes(), name.as_bytes()].concat()
}

/// Payload of [`reply::META_CONTEXT`].
pub fn context_payload(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// Payload of [`reply::INFO`] with [`info::EXPORT`].
pub fn info_export(size_bytes: u64, flags: u16) -> Vec<u8> {
    [&info::EXPORT.to_be_bytes()[..], &size_bytes.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// Payload of [`reply::INFO`] with [`info::NAME`].
pub fn info_name(name: &str) -> Vec<u8> {
    [&info::NAME.to_be_bytes()[..], name.as_bytes()].concat()
}

/// Payload of [`reply::INFO`] with [`info::BLOCK_SIZE`].
pub fn info_block_size(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let kind = info::BLOCK_SIZE.to_be_bytes();
    [&kind[..], &min.to_be_bytes(), &preferred.to_be_bytes(), &max.to_be_bytes()].concat()
}

/// End of the handshake that answers `EXPORT_NAME`.
pub fn export_name_reply(out: &mut Vec<u8>, size_bytes: u64, flags: u16, no_zeroes: bool) {
    out.extend_from_slice(&size_bytes.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    if !no_zeroes {
        out.resize(out.len() + EXPORT_NAME_ZEROES, 0);
    }
}

/// What a volume offers.
///
/// `CAN_MULTI_CONN` holds because a flush is one of the whole volume, whatever connection its writes came over.
/// `DF` exists in structured replies only.
pub const fn export_flags(structured: bool) -> u16 {
    let flags = export::HAS_FLAGS
        | export::SEND_FLUSH
        | export::SEND_FUA
        | export::SEND_TRIM
        | export::SEND_WRITE_ZEROES
        | export::CAN_MULTI_CONN
        | export::SEND_CACHE
        | export::SEND_FAST_ZERO;
    if structured { flags | export::SEND_DF } else { flags }
}

/// Head of a request; `length` bytes of data follow a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    /// Names the request in its reply.
    pub cookie: u64,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub const SIZE: usize = 28;

    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, Malformed> {
        let bytes: RequestBytes = zerocopy::transmute!(*bytes);
        if bytes.magic != REQUEST_MAGIC {
            return Err(Malformed::RequestMagic(bytes.magic.get()));
        }
        Ok(Self {
            flags: bytes.flags.get(),
            command: bytes.command.get(),
            cookie: bytes.cookie.get(),
            offset: bytes.offset.get(),
            length: bytes.length.get(),
        })
    }

    pub fn encode(&self) -> [u8; Self::SIZE] {
        let bytes = RequestBytes {
            magic: REQUEST_MAGIC.into(),
            flags: self.flags.into(),
            command: self.command.into(),
            cookie: self.cookie.into(),
            offset: self.offset.into(),
            length: self.length.into(),
        };
        zerocopy::transmute!(bytes)
    }
}

/// A reply without structure; data follows that of a read.
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> [u8; SIMPLE_REPLY_SIZE] {
    let bytes = SimpleReplyBytes {
        magic: SIMPLE_REPLY_MAGIC.into(),
        error: error.map_or(0, |error| error as u32).into(),
        cookie: cookie.into(),
    };
    zerocopy::transmute!(bytes)
}

fn chunk_head(cookie: u64, kind: u16, done: bool, length: usize) -> ChunkBytes {
    ChunkBytes {
        magic: CHUNK_MAGIC.into(),
        flags: if done { CHUNK_DONE } else { 0 }.into(),
        kind: kind.into(),
        cookie: cookie.into(),
        length: u32::try_from(length).expect("a chunk is no longer than the longest request").into(),
    }
}

/// Head of `length` bytes of data at `offset`, which follow.
pub fn chunk_data(cookie: u64, offset: u64, length: usize, done: bool) -> [u8; CHUNK_DATA_SIZE] {
    let head = chunk_head(cookie, chunk::DATA, done, 8 + length);
    zerocopy::transmute!(ChunkDataBytes { head, offset: offset.into() })
}

/// `length` bytes of zeroes at `offset`.
pub fn chunk_hole(cookie: u64, offset: u64, length: u32, done: bool) -> [u8; CHUNK_HOLE_SIZE] {
    let head = chunk_head(cookie, chunk::HOLE, done, 12);
    zerocopy::transmute!(ChunkHoleBytes { head, offset: offset.into(), length: length.into() })
}

/// The request failed as a whole; always the last chunk.
pub fn chunk_error(cookie: u64, error: Errno) -> [u8; CHUNK_ERROR_SIZE] {
    let head = chunk_head(cookie, chunk::ERROR, true, 6);
    zerocopy::transmute!(ChunkErrorBytes { head, error: (error as u32).into(), message_length: 0.into() })
}

/// The part of the request that begins at `offset` failed.
pub fn chunk_error_offset(
    cookie: u64,
    error: Errno,
    offset: u64,
    done: bool,
) -> [u8; CHUNK_ERROR_OFFSET_SIZE] {
    let head = chunk_head(cookie, chunk::ERROR_OFFSET, done, 14);
    let error = (error as u32).into();
    zerocopy::transmute!(ChunkErrorOffsetBytes {
        head,
        error,
        message_length: 0.into(),
        offset: offset.into()
    })
}

/// The whole answer to a block status request: extents as their length and whether they hold data.
pub fn chunk_block_status(out: &mut Vec<u8>, cookie: u64, extents: &[(u32, bool)]) {
    let head = chunk_head(cookie, chunk::BLOCK_STATUS, true, 4 + 8 * extents.len());
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(&CONTEXT_ALLOCATION_ID.to_be_bytes());
    for (length, data) in extents {
        let state = if *data { 0 } else { STATE_HOLE | STATE_ZERO };
        out.extend_from_slice(&length.to_be_bytes());
        out.extend_from_slice(&state.to_be_bytes());
    }
}
