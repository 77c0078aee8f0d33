//! The 64-byte header of every frame, and the opcodes.
//!
//! Invariants
//! - `Header::decode` accepts nothing whose checksum, magic, version, opcode, flags or lengths are wrong,
//!   so the lengths of a decoded header can be trusted before its payload is read.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::checksum::crc32c;
use crate::error::Code;
use crate::ids::{BlockIndex, BlockKey, Epoch, GroupId, Layer, Lineage};
use crate::limits::{FRAME_MAX, LINK_FRAME_MAX};

pub const MAGIC: u32 = u32::from_le_bytes(*b"XSAN");
/// Newest and oldest protocol version that this release speaks.
pub const VERSION: u8 = 1;
pub const VERSION_MIN: u8 = 1;
pub const HEADER_SIZE: usize = 64;

macro_rules! opcodes {
    ($( $(#[$doc:meta])* $number:literal $name:ident; )*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Opcode { $( $(#[$doc])* $name = $number, )* }

        impl Opcode {
            pub const ALL: &'static [Opcode] = &[ $( Opcode::$name, )* ];

            pub const fn from_number(number: u8) -> Option<Self> {
                match number { $( $number => Some(Opcode::$name), )* _ => None }
            }
        }
    };
}

opcodes! {
    // session
    /// First frame of each side of a connection; meta: `session::Hello`.
    1 Hello;
    2 Ping;
    3 Pong;
    // client I/O: request_id names the request, the reply repeats it with a status
    16 Read;
    17 ReadReply;
    18 Write;
    19 WriteZeroes;
    20 Trim;
    /// Forces to stable media every acknowledged write, in every group of the header's pool that this shard is
    /// primary of.
    21 Flush;
    /// Status of a write, write-zeroes or trim.
    22 WriteReply;
    /// Data: the list of the groups covered (u32 each).
    23 FlushReply;
    /// Which pages of a range hold something; answered with `BlockStatusReply`.
    24 BlockStatus;
    /// Data: one bit a page, least significant first, set where the page holds data.
    25 BlockStatusReply;
    // replication
    /// One entry of a group's order; meta: `replication::AppendMeta`.
    32 Append;
    /// request_id: every entry up to this seq is in the member's journal.
    33 AppendOk;
    /// request_id: every entry up to this seq is acknowledged.
    34 Commit;
    /// A primary asks a member for its journal's end, at a new epoch.
    35 Peer;
    /// meta: `replication::PeerInfo`.
    36 PeerInfo;
    /// The new primary asks the member with the longest journal for entries; meta: `replication::FetchMeta`.
    37 Fetch;
    /// One entry of the answer, in order, then one with status and no data; meta: `replication::AppendMeta`.
    38 FetchReply;
    /// Force the member's journal to stable media.
    39 MemberFlush;
    40 MemberFlushReply;
    /// The learner starts anew: it drops its tail and takes appends after a version: `request_id` is its seq,
    /// `length` its epoch, `offset` counts the attempts. The reply repeats all three, once the learner's journal has
    /// dropped the tail.
    41 LearnStart;
    42 LearnStartReply;
    /// Digests of the primary's blocks from the header's key to the key of the last entry, all there are in
    /// between; data: `replication::BlockDigest` entries, digest 0 where the primary has no such block.
    43 Compare;
    /// The blocks that differ here, up to the header's key; data: `replication::BlockVersions` entries.
    44 CompareReply;
    /// Content and version of one unit; meta: `replication::PushMeta`.
    45 Push;
    46 PushReply;
    /// Pages of a replica, to repair a primary's damaged ones.
    47 FetchPages;
    48 FetchPagesReply;
    /// The member reads and verifies whole units of a block.
    49 Check;
    /// What it found; data: one `replication::UnitChecksums` a unit.
    50 CheckReply;
    /// Pages of the primary for a member's damaged ones, which it takes when they have the checksums that it expects.
    /// Not answered: the next Check tells, or Damaged.
    51 Mend;
    /// A member met damaged pages, and asks its primary for them. Answered with Mend or not at all: what stays damaged is met
    /// again, some times.
    52 Damaged;
    // link between the two processes of a node; payload: a LinkMessage
    64 Link;
}

/// Bits of `Header::flags`.
pub mod flags {
    /// The write must be on stable media before its reply.
    pub const FUA: u16 = 1;
    /// Keep capacity allocated (write-zeroes without a hole).
    pub const NO_HOLE: u16 = 2;
    /// Data is not whole pages: `payload_crc` covers it too and there is no checksum table.
    pub const SUB_PAGE: u16 = 4;
    /// The volume's durability is `every-write`.
    pub const EVERY_WRITE: u16 = 8;
    /// The sender's store has no room for new places (AppendOk, PeerInfo).
    pub const STORE_FULL: u16 = 16;
    pub const ALL: u16 = FUA | NO_HOLE | SUB_PAGE | EVERY_WRITE | STORE_FULL;
}

/// Offsets in bytes; all little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,          // 0
    header_crc: U32,     // 4: of the 64 bytes with this field zero
    version: u8,         // 8
    opcode: u8,          // 9
    flags: U16,          // 10
    status: U16,         // 12: 0 or an error number
    reserved: U16,       // 14: zero
    request_id: U64,     // 16
    group: U32,          // 24
    epoch: U32,          // 28
    lineage: U64,        // 32
    layer: U32,          // 40
    block: U32,          // 44
    offset: U32,         // 48: in the block
    length: U32,         // 52: bytes of the block concerned
    payload_length: U32, // 56: bytes that follow
    payload_crc: U32,    // 60
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub opcode: Opcode,
    pub flags: u16,
    /// `None`: success.
    pub status: Option<Code>,
    pub request_id: u64,
    pub group: GroupId,
    pub epoch: Epoch,
    pub key: BlockKey,
    pub offset: u32,
    pub length: u32,
    pub payload_length: u32,
    pub payload_crc: u32,
}

/// Why bytes are not a header. The connection is closed: what follows can not be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("magic {found:#010x}, expected {MAGIC:#010x}")]
    Magic { found: u32 },
    #[error("header checksum {found:#010x}, computed {computed:#010x}")]
    Checksum { found: u32, computed: u32 },
    #[error("protocol version {found}, this release speaks {VERSION_MIN} to {VERSION}")]
    Version { found: u8 },
    #[error("opcode {found} is unknown")]
    Opcode { found: u8 },
    #[error("flags {found:#06x} or reserved field {reserved:#06x} are unknown")]
    Flags { found: u16, reserved: u16 },
    #[error("status {found} is unknown")]
    Status { found: u16 },
    #[error("payload of {found} bytes, at most {max} are allowed")]
    PayloadLength { found: u32, max: usize },
}

impl HeaderError {
    pub const fn code(self) -> Code {
        match self {
            Self::Version { .. } => Code::VersionMismatch,
            _ => Code::FrameInvalid,
        }
    }
}

impl Header {
    /// A header of `opcode` with everything else zero.
    pub fn new(opcode: Opcode) -> Self {
        Self {
            opcode,
            flags: 0,
            status: None,
            request_id: 0,
            group: GroupId(0),
            epoch: Epoch(0),
            key: BlockKey::default(),
            offset: 0,
            length: 0,
            payload_length: 0,
            payload_crc: 0,
        }
    }

    /// Largest payload of a frame of `opcode`.
    pub const fn payload_max(opcode: Opcode) -> usize {
        match opcode {
            Opcode::Link => LINK_FRAME_MAX,
            _ => FRAME_MAX,
        }
    }

    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut raw = RawHeader {
            magic: MAGIC.into(),
            header_crc: 0.into(),
            version: VERSION,
            opcode: self.opcode as u8,
            flags: self.flags.into(),
            status: self.status.map_or(0, Code::number).into(),
            reserved: 0.into(),
            request_id: self.request_id.into(),
            group: self.group.0.into(),
            epoch: self.epoch.0.into(),
            lineage: self.key.lineage.0.into(),
            layer: self.key.layer.0.into(),
            block: self.key.index.0.into(),
            offset: self.offset.into(),
            length: self.length.into(),
            payload_length: self.payload_length.into(),
            payload_crc: self.payload_crc.into(),
        };
        raw.header_crc = crc32c(raw.as_bytes()).into();
        let mut bytes = [0; HEADER_SIZE];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Decodes a header.
    ///
    /// # Errors
    /// 308 `FrameInvalid` or 102 `VersionMismatch`: close the connection.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, HeaderError> {
        let mut raw = RawHeader::read_from_bytes(bytes).expect("the sizes are equal");
        if raw.magic.get() != MAGIC {
            return Err(HeaderError::Magic { found: raw.magic.get() });
        }
        let found = raw.header_crc.get();
        raw.header_crc = 0.into();
        let computed = crc32c(raw.as_bytes());
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        if !(VERSION_MIN..=VERSION).contains(&raw.version) {
            return Err(HeaderError::Version { found: raw.version });
        }
        let opcode = Opcode::from_number(raw.opcode).ok_or(HeaderError::Opcode { found: raw.opcode })?;
        let (flags, reserved) = (raw.flags.get(), raw.reserved.get());
        if flags & !flags::ALL != 0 || reserved != 0 {
            return Err(HeaderError::Flags { found: flags, reserved });
        }
        let status = match raw.status.get() {
            0 => None,
            number => Some(Code::from_number(number).ok_or(HeaderError::Status { found: number })?),
        };
        let (payload_length, max) = (raw.payload_length.get(), Self::payload_max(opcode));
        if payload_length as usize > max {
            return Err(HeaderError::PayloadLength { found: payload_length, max });
        }
        Ok(Self {
            opcode,
            flags,
            status,
            request_id: raw.request_id.get(),
            group: GroupId(raw.group.get()),
            epoch: Epoch(raw.epoch.get()),
            key: BlockKey {
                lineage: Lineage(raw.lineage.get()),
                layer: Layer(raw.layer.get()),
                index: BlockIndex(raw.block.get()),
            },
            offset: raw.offset.get(),
            length: raw.length.get(),
            payload_length,
            payload_crc: raw.payload_crc.get(),
        })
    }
}

#[cfg(test)]
mod tests;
