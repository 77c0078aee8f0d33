//! The link to the control process of this node: a Unix socket, wire frames with a `LinkMessage` each.
//!
//! Run by shard 0 alone. The control process may go and come back at any time: the link is made again, and
//! what it carried before is not repeated, except the hello.
//!
//! Source: docs/decisions/0002-three-processes.md.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use monoio::io::{AsyncReadRentExt, AsyncWriteRentExt, Splitable};
use monoio::net::UnixStream;
use monoio::net::unix::{UnixOwnedReadHalf, UnixOwnedWriteHalf};
use prost::Message;
use xsan_protocol::checksum::crc32c;
use xsan_protocol::proto::LinkMessage;
use xsan_protocol::wire::header::{HEADER_SIZE, Header, HeaderError, Opcode};

use crate::net::notify::Notify;

/// Messages that wait for a control process that is stopped but not gone: a minute of them and more.
const MESSAGES_MAX: usize = 1024;
const RECONNECT_INTERVAL: Duration = Duration::from_millis(50);

/// Messages on their way to the control process.
#[derive(Clone, Default)]
pub struct LinkSender(Rc<Queue>);

#[derive(Default)]
struct Queue {
    messages: RefCell<VecDeque<LinkMessage>>,
    written: Notify,
    up: std::cell::Cell<bool>,
}

impl LinkSender {
    /// Queues a message; `false` while the control process is away, or takes nothing for long: nothing is kept for it.
    pub fn send(&self, message: LinkMessage) -> bool {
        if !self.0.up.get() || self.0.messages.borrow().len() >= MESSAGES_MAX {
            return false;
        }
        self.0.messages.borrow_mut().push_back(message);
        self.0.written.notify();
        true
    }
}

/// What the link tells its shard.
pub enum LinkEvent {
    Message(LinkMessage),
    /// The control process is gone: what was asked of it will not be answered.
    Down,
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("link socket: {0}")]
    Io(#[from] io::Error),
    #[error("link frame: {0}")]
    Header(#[from] HeaderError),
    #[error("link frame: a payload that does not match its checksum")]
    Checksum,
    #[error("link message: {0}")]
    Message(#[from] prost::DecodeError),
}

/// Keeps the link up for ever: connects, says hello, and hands every message to `on_event`.
pub async fn run(
    path: PathBuf,
    sender: LinkSender,
    hello: impl Fn() -> LinkMessage,
    on_event: impl Fn(LinkEvent),
) {
    loop {
        match UnixStream::connect(&path).await {
            Ok(stream) => {
                let error = serve(stream, &sender, hello(), &on_event).await;
                tracing::warn!(%error, "the link to the control process broke; connecting again");
                on_event(LinkEvent::Down);
            }
            Err(error) => {
                tracing::debug!(%error, path = %path.display(), "the control process does not listen yet")
            }
        }
        monoio::time::sleep(RECONNECT_INTERVAL).await;
    }
}

/// Serves one connection until it breaks.
async fn serve(
    stream: UnixStream,
    sender: &LinkSender,
    hello: LinkMessage,
    on_event: &impl Fn(LinkEvent),
) -> LinkError {
    let queue = sender.0.clone();
    queue.messages.borrow_mut().clear();
    queue.messages.borrow_mut().push_back(hello);
    queue.up.set(true);
    queue.written.notify();
    let (mut reader, writer) = stream.into_split();
    let writer = monoio::spawn(write_all(writer, queue.clone()));
    let error = loop {
        match read(&mut reader).await {
            Ok(message) => on_event(LinkEvent::Message(message)),
            Err(error) => break error,
        }
    };
    queue.up.set(false);
    queue.written.notify();
    writer.await;
    error
}

async fn write_all(mut writer: UnixOwnedWriteHalf, queue: Rc<Queue>) {
    while queue.up.get() {
        queue.written.notified().await;
        let mut bytes = Vec::new();
        for message in queue.messages.borrow_mut().drain(..) {
            encode(&message, &mut bytes);
        }
        if !bytes.is_empty() && writer.write_all(bytes).await.0.is_err() {
            // The reader meets the same broken socket and ends the connection.
            return;
        }
    }
}

fn encode(message: &LinkMessage, out: &mut Vec<u8>) {
    let payload = message.encode_to_vec();
    let mut header = Header::new(Opcode::Link);
    header.payload_length = payload.len() as u32;
    header.payload_crc = crc32c(&payload);
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&payload);
}

async fn read(reader: &mut UnixOwnedReadHalf) -> Result<LinkMessage, LinkError> {
    let (result, head) = reader.read_exact(vec![0; HEADER_SIZE]).await;
    result?;
    let head = head.as_slice().try_into().expect("read_exact fills the buffer");
    let header = Header::decode(head)?;
    let (result, payload) = reader.read_exact(vec![0; header.payload_length as usize]).await;
    result?;
    if crc32c(&payload) != header.payload_crc {
        return Err(LinkError::Checksum);
    }
    Ok(LinkMessage::decode(payload.as_slice())?)
}
