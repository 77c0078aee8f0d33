//! One frame as the state machines see it: header, meta, page checksums, data.
//!
//! Decoded and verified by `connection`; built by `replication` and `volume`.

use std::sync::Arc;

use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::limits::{FRAME_MAX, PAGES_PER_WRITE_MAX};
use xsan_protocol::units::PAGE_SIZE;
use xsan_protocol::wire::header::{HEADER_SIZE, Header, Opcode, flags};
use xsan_protocol::wire::replication::{AppendMeta, FetchMeta, MetaError, PeerInfo, PushMeta};

use crate::disk::buffers::Buffer;

/// Largest meta part of any opcode but Hello, whose meta is its data.
pub const META_MAX: usize = AppendMeta::SIZE;

#[derive(Clone, Debug)]
pub struct Frame {
    /// `payload_length` and `payload_crc` are filled in by [`Frame::encode_head`].
    pub header: Header,
    pub meta: Meta,
    /// CRC32C of each page of `data`; `None` when `data` is not pages (lists, sub-page writes).
    pub checksums: Option<Arc<[u32]>>,
    pub data: Option<Buffer>,
}

/// The fixed part of a frame's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    None,
    Append(AppendMeta),
    PeerInfo(PeerInfo),
    Fetch(FetchMeta),
    Push(PushMeta),
}

impl Meta {
    pub const fn size(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Append(_) => AppendMeta::SIZE,
            Self::PeerInfo(_) => PeerInfo::SIZE,
            Self::Fetch(_) => FetchMeta::SIZE,
            Self::Push(_) => PushMeta::SIZE,
        }
    }

    /// Bytes of meta that a frame of `opcode` carries: known from the header, before the payload.
    pub const fn size_of(opcode: Opcode) -> usize {
        match opcode {
            Opcode::Append | Opcode::FetchReply => AppendMeta::SIZE,
            Opcode::PeerInfo => PeerInfo::SIZE,
            Opcode::Fetch => FetchMeta::SIZE,
            Opcode::Push => PushMeta::SIZE,
            _ => 0,
        }
    }
}

/// Does a frame of `opcode` carry pages with a checksum table (rather than a list or nothing)?
pub const fn carries_pages(opcode: Opcode, flag_bits: u16) -> bool {
    match opcode {
        Opcode::Write => flag_bits & flags::SUB_PAGE == 0,
        Opcode::ReadReply
        | Opcode::Append
        | Opcode::FetchReply
        | Opcode::Push
        | Opcode::FetchPagesReply
        | Opcode::Mend => true,
        _ => false,
    }
}

impl Frame {
    pub fn new(header: Header) -> Self {
        Self { header, meta: Meta::None, checksums: None, data: None }
    }

    /// What is left of a frame whose data found no buffer.
    pub fn busy(header: Header) -> Self {
        Self::new(Header { status: Some(Code::Busy), ..header })
    }

    /// Header, meta and checksum table as bytes; the data follows them on the wire.
    ///
    /// # Panics
    /// The parts do not fit the opcode: our bug.
    pub fn encode_head(&self, out: &mut Vec<u8>) {
        let mut header = self.header;
        let start = out.len();
        assert!(self.meta.size() == Meta::size_of(header.opcode) || header.status.is_some());
        out.resize(start + HEADER_SIZE, 0);
        match &self.meta {
            Meta::None => {}
            Meta::Append(meta) => out.extend_from_slice(&meta.encode()),
            Meta::PeerInfo(meta) => out.extend_from_slice(&meta.encode()),
            Meta::Fetch(meta) => out.extend_from_slice(&meta.encode()),
            Meta::Push(meta) => out.extend_from_slice(&meta.encode()),
        }
        if let Some(checksums) = &self.checksums {
            for checksum in checksums.iter() {
                out.extend_from_slice(&checksum.to_le_bytes());
            }
        }
        let data: &[u8] = self.data.as_deref().unwrap_or_default();
        let covered = &out[start + HEADER_SIZE..];
        header.payload_length = (covered.len() + data.len()) as u32;
        header.payload_crc = match (&self.checksums, data.is_empty()) {
            (Some(_), _) | (None, true) => crc32c(covered),
            // Lists and sub-page data have no table of their own, and no meta: the payload's checksum covers them.
            (None, false) => {
                assert!(covered.is_empty());
                crc32c(data)
            }
        };
        out[start..start + HEADER_SIZE].copy_from_slice(&header.encode());
    }
}

/// What follows a frame's header: how many bytes of meta and table, and of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub meta: usize,
    pub pages: usize,
    pub data: usize,
}

/// A payload that is not what its header says, or not what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    #[error("a payload of {found} bytes does not fit {opcode:?}")]
    Length { opcode: Opcode, found: usize },
    #[error("payload checksum {found:#010x}, computed {computed:#010x}")]
    Checksum { found: u32, computed: u32 },
    #[error("page {page} of the payload does not match its checksum")]
    Page { page: usize },
    #[error(transparent)]
    Meta(#[from] MetaError),
}

impl Shape {
    /// The shape of the payload behind `header`.
    ///
    /// # Errors
    /// The length fits no payload of the opcode.
    pub fn of(header: &Header) -> Result<Self, PayloadError> {
        let found = header.payload_length as usize;
        let error = PayloadError::Length { opcode: header.opcode, found };
        // Frames of the link between a node's processes may be larger, and do not come here.
        if found > FRAME_MAX {
            return Err(error);
        }
        let meta = Meta::size_of(header.opcode);
        if found == 0 && (meta == 0 || header.status.is_some()) {
            return Ok(Self { meta: 0, pages: 0, data: 0 });
        }
        let rest = found.checked_sub(meta).ok_or(error)?;
        if !carries_pages(header.opcode, header.flags) {
            // Meta and free data never come together: there would be no checksum for one of them.
            return if meta == 0 || rest == 0 { Ok(Self { meta, pages: 0, data: rest }) } else { Err(error) };
        }
        let pages = rest / (PAGE_SIZE + 4);
        if rest % (PAGE_SIZE + 4) != 0 || pages > PAGES_PER_WRITE_MAX {
            return Err(error);
        }
        Ok(Self { meta, pages, data: pages * PAGE_SIZE })
    }

    /// Bytes of meta and checksum table.
    pub const fn head(&self) -> usize {
        self.meta + self.pages * 4
    }
}

impl Frame {
    /// Puts a frame together from what was received, and verifies every checksum.
    ///
    /// # Errors
    /// The connection is to be closed: what follows can not be trusted.
    ///
    /// # Panics
    /// `head` or `data` is not of the shape: the receiver's bug.
    pub fn decode(
        header: Header,
        shape: Shape,
        head: &[u8],
        data: Option<Buffer>,
    ) -> Result<Self, PayloadError> {
        assert!(head.len() == shape.head() && data.as_ref().map_or(0, |data| data.len()) == shape.data);
        let bytes: &[u8] = data.as_deref().unwrap_or_default();
        let computed = crc32c(if head.is_empty() { bytes } else { head });
        if computed != header.payload_crc {
            return Err(PayloadError::Checksum { found: header.payload_crc, computed });
        }
        let (meta, table) = head.split_at(shape.meta);
        let meta = match header.opcode {
            _ if meta.is_empty() => Meta::None,
            Opcode::Append | Opcode::FetchReply => Meta::Append(AppendMeta::decode(meta)?),
            Opcode::PeerInfo => Meta::PeerInfo(PeerInfo::decode(meta)?),
            Opcode::Fetch => Meta::Fetch(FetchMeta::decode(meta)?),
            Opcode::Push => Meta::Push(PushMeta::decode(meta)?),
            _ => unreachable!("no other opcode has meta"),
        };
        let mut checksums = None;
        if shape.pages > 0 {
            let entry = |entry: &[u8]| u32::from_le_bytes(entry.try_into().expect("chunks of four bytes"));
            let table: Arc<[u32]> = table.chunks_exact(4).map(entry).collect();
            let lost = if let Meta::Push(push) = meta { push.lost } else { 0 };
            let is_lost = |page: usize| page < u16::BITS as usize && lost >> page & 1 == 1;
            let mut pages = bytes.chunks_exact(PAGE_SIZE).zip(table.iter()).enumerate();
            let wrong = pages.find(|(page, (bytes, crc))| crc32c(bytes) != **crc && !is_lost(*page));
            if let Some((page, _)) = wrong {
                return Err(PayloadError::Page { page });
            }
            checksums = Some(table);
        }
        Ok(Self { header, meta, checksums, data })
    }
}

#[cfg(test)]
mod tests;
