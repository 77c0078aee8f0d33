//! The first frame of each side of a connection: who it is and what it speaks.
//!
//! The meta part is fixed; the cluster id follows as UTF-8. A data process that connects to a shard
//! says so with its node id and incarnation; its session number orders its connections: a shard that has
//! seen session n of a client takes nothing more from sessions below n.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{VERSION, VERSION_MIN};
use crate::error::Code;
use crate::ids::{Incarnation, NodeId, ShardIndex};
use crate::limits::NAME_BYTES_MAX;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    version_min: u8,        // 0
    version_max: u8,        // 1
    cluster_id_length: U16, // 2
    node: U32,              // 4: 0 for a client that is no node
    incarnation: U64,       // 8
    client_id: U64,         // 16
    session: U64,           // 24
    shard: U16,             // 32: the sender's shard
    shard_count: U16,       // 34
    reserved: U32,          // 36
}

const META_SIZE: usize = 40;
const _: () = assert!(size_of::<RawHello>() == META_SIZE);

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// `NodeId(0)`: a client outside the cluster's nodes.
    pub node: NodeId,
    pub incarnation: Incarnation,
    /// Names the sender across its sessions: for a shard, its node and number.
    pub client_id: u64,
    pub session: u64,
    pub shard: ShardIndex,
    pub shard_count: u16,
    pub cluster_id: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    #[error("hello of {found} bytes is too short or too long")]
    Length { found: usize },
    #[error("protocol versions {min} to {max}, this release speaks {VERSION_MIN} to {VERSION}")]
    Version { min: u8, max: u8 },
    #[error("the cluster id is not UTF-8, or a reserved field is set")]
    Malformed,
}

impl HelloError {
    pub const fn code(self) -> Code {
        match self {
            Self::Version { .. } => Code::VersionMismatch,
            Self::Length { .. } | Self::Malformed => Code::FrameInvalid,
        }
    }
}

impl Hello {
    /// The payload of a Hello frame.
    ///
    /// # Panics
    /// A cluster id longer than `NAME_BYTES_MAX`: the control plane refuses those.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.cluster_id.len() <= NAME_BYTES_MAX);
        let raw = RawHello {
            version_min: VERSION_MIN,
            version_max: VERSION,
            cluster_id_length: (self.cluster_id.len() as u16).into(),
            node: self.node.0.into(),
            incarnation: self.incarnation.0.into(),
            client_id: self.client_id.into(),
            session: self.session.into(),
            shard: self.shard.0.into(),
            shard_count: self.shard_count.into(),
            reserved: 0.into(),
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(self.cluster_id.as_bytes());
        bytes
    }

    /// Decodes the payload of a Hello frame.
    ///
    /// # Errors
    /// 308 `FrameInvalid`, 102 `VersionMismatch`.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloError> {
        let length = HelloError::Length { found: bytes.len() };
        let (raw, rest) = RawHello::read_from_prefix(bytes).map_err(|_| length)?;
        if rest.len() != usize::from(raw.cluster_id_length.get()) || rest.len() > NAME_BYTES_MAX {
            return Err(length);
        }
        let (min, max) = (raw.version_min, raw.version_max);
        if min > max || max < VERSION_MIN || min > VERSION {
            return Err(HelloError::Version { min, max });
        }
        let cluster_id = std::str::from_utf8(rest).map_err(|_| HelloError::Malformed)?;
        if raw.reserved.get() != 0 {
            return Err(HelloError::Malformed);
        }
        Ok(Self {
            node: NodeId(raw.node.get()),
            incarnation: Incarnation(raw.incarnation.get()),
            client_id: raw.client_id.get(),
            session: raw.session.get(),
            shard: ShardIndex(raw.shard.get()),
            shard_count: raw.shard_count.get(),
            cluster_id: cluster_id.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests;
