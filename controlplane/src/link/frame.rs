//! Frames of the link: a wire header with opcode `Link`, then a `LinkMessage`.
//!
//! Invariants
//! - No more is allocated for a payload than its checked header allows.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::limits::LINK_FRAME_MAX;
use xsan_protocol::proto::LinkMessage;
use xsan_protocol::wire::header::{HEADER_SIZE, Header, HeaderError, Opcode};

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Header(#[from] HeaderError),
    #[error("a frame with opcode {0:?} on the link")]
    Opcode(Opcode),
    #[error("payload checksum {found:#010x}, computed {computed:#010x}")]
    Checksum { found: u32, computed: u32 },
    #[error("the payload is no link message")]
    Encoding,
}

impl FrameError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Header(error) => error.code(),
            _ => Code::FrameInvalid,
        }
    }
}

/// # Panics
/// A message larger than `LINK_FRAME_MAX`: limits keep the largest, a map, below it.
pub fn encode(message: &LinkMessage) -> Vec<u8> {
    let length = message.encoded_len();
    assert!(length <= LINK_FRAME_MAX);
    let payload = message.encode_to_vec();
    let mut header = Header::new(Opcode::Link);
    header.request_id = message.request_id;
    header.payload_length = u32::try_from(length).expect("checked above");
    header.payload_crc = crc32c(&payload);
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&payload);
    bytes
}

/// # Errors
/// The socket failed.
pub async fn write(writer: &mut (impl AsyncWrite + Unpin), message: &LinkMessage) -> io::Result<()> {
    writer.write_all(&encode(message)).await
}

/// The next message; `None` when the other side closed between two.
///
/// # Errors
/// 308 `FrameInvalid`: close the socket, what follows can not be trusted.
pub async fn read(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<LinkMessage>, FrameError> {
    let mut head = [0; HEADER_SIZE];
    match reader.read_exact(&mut head).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    };
    let header = Header::decode(&head)?;
    if header.opcode != Opcode::Link {
        return Err(FrameError::Opcode(header.opcode));
    }
    let mut payload = vec![0; header.payload_length as usize];
    reader.read_exact(&mut payload).await?;
    let computed = crc32c(&payload);
    if computed != header.payload_crc {
        return Err(FrameError::Checksum { found: header.payload_crc, computed });
    }
    LinkMessage::decode(payload.as_slice()).map(Some).map_err(|_| FrameError::Encoding)
}
