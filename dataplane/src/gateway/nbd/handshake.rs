//! Handshake: fixed newstyle negotiation, from the greeting to the export that the client chose.
//!
//! Knows `wire` and the list of volumes. Driven by `Gateway::serve`; what it agrees on goes to `session`.
//!
//! Invariants
//! - Each option must arrive whole within `handshake_timeout`, and each reply be taken within it.
//! - No option makes the server hold more than `OPTION_BYTES_MAX`.

use std::future::Future;
use std::time::Duration;

use monoio::io::{AsyncReadRent, AsyncWriteRent, AsyncWriteRentExt};
use xsan_protocol::error::Code;
use xsan_protocol::units::{PAGE_SIZE, SECTOR_SIZE};

use super::rules::{Agreed, REQUEST_BYTES_MAX};
use super::wire::{self, ContextQuery, ExportQuery, OptionHeader, hello, option, reply};
use super::{Attachment, Closed};
use crate::net::receive::Receiver;
use crate::volume::request::{Export, Volumes};

/// Longest payload of an option; a client that claims more is not one.
const OPTION_BYTES_MAX: u32 = 64 * 1024;
/// Most options of one handshake.
const OPTIONS_MAX: usize = 4096;

/// The result of a handshake.
pub(super) struct Negotiated<V: Volumes> {
    pub attachment: Attachment<V>,
    pub agreed: Agreed,
}

/// What follows an option.
enum Next<V: Volumes> {
    Option,
    Transmission(Attachment<V>),
    /// The client said good-bye.
    End,
}

/// Speaks with a new client until it has chosen an export; `None` when it wanted none.
pub(super) async fn negotiate<R: AsyncReadRent, W: AsyncWriteRent, V: Volumes>(
    receiver: &mut Receiver<R>,
    writer: &mut W,
    volumes: &V,
    timeout: Duration,
) -> Result<Option<Negotiated<V>>, Closed> {
    send(writer, wire::greeting(), timeout).await?;
    let Some(flags) = in_time(timeout, receiver.array::<4>()).await? else { return Ok(None) };
    let mut handshake = Handshake::new(volumes, u32::from_be_bytes(flags))?;
    for _ in 0..OPTIONS_MAX {
        let Some((option, payload)) = in_time(timeout, next_option(receiver)).await? else {
            return Ok(None);
        };
        let mut out = Vec::new();
        let next = handshake.on_option(option, &payload, &mut out).await?;
        send(writer, out, timeout).await?;
        match next {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Transmission(attachment) => {
                let agreed = handshake.agreed_for(&attachment.export.name);
                return Ok(Some(Negotiated { attachment, agreed }));
            }
        }
    }
    Err(Closed::TooManyOptions)
}

async fn in_time<T, E>(timeout: Duration, step: impl Future<Output = Result<T, E>>) -> Result<T, Closed>
where
    Closed: From<E>,
{
    Ok(monoio::time::timeout(timeout, step).await.map_err(|_| Closed::HandshakeTimeout)??)
}

async fn send<W: AsyncWriteRent>(writer: &mut W, bytes: Vec<u8>, timeout: Duration) -> Result<(), Closed> {
    in_time(timeout, async { writer.write_all(bytes).await.0.map(drop) }).await
}

async fn next_option<R: AsyncReadRent>(receiver: &mut Receiver<R>) -> Result<Option<(u32, Vec<u8>)>, Closed> {
    let Some(bytes) = receiver.array::<{ OptionHeader::SIZE }>().await? else { return Ok(None) };
    let header = OptionHeader::decode(&bytes)?;
    if header.length > OPTION_BYTES_MAX {
        return Err(Closed::OptionTooLong { option: header.option, length: header.length });
    }
    let payload = receiver.bytes(header.length as usize).await?;
    Ok(Some((header.option, payload)))
}

struct Handshake<'a, V> {
    volumes: &'a V,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which the client selected `base:allocation`.
    allocation_of: Option<String>,
}

impl<'a, V: Volumes> Handshake<'a, V> {
    fn new(volumes: &'a V, flags: u32) -> Result<Self, Closed> {
        let known = u32::from(hello::FIXED_NEWSTYLE | hello::NO_ZEROES);
        if flags & !known != 0 {
            return Err(Closed::ClientFlags(flags));
        }
        let has = |bit| flags & u32::from(bit) != 0;
        Ok(Self {
            volumes,
            fixed: has(hello::FIXED_NEWSTYLE),
            no_zeroes: has(hello::NO_ZEROES),
            structured: false,
            allocation_of: None,
        })
    }

    fn agreed_for(&self, name: &str) -> Agreed {
        let allocation = self.allocation_of.as_deref() == Some(name);
        Agreed { structured: self.structured, allocation }
    }

    /// Answers one option into `out`.
    async fn on_option(&mut self, option: u32, payload: &[u8], out: &mut Vec<u8>) -> Result<Next<V>, Closed> {
        if option == option::EXPORT_NAME {
            return self.on_export_name(payload, out).await;
        }
        if !self.fixed {
            // A client of the old newstyle expects no replies to options.
            return Err(Closed::NotFixedNewstyle(option));
        }
        match option {
            option::ABORT => {
                wire::option_reply(out, option, reply::ACK, &[]);
                return Ok(Next::End);
            }
            option::GO => return Ok(self.on_go(payload, out).await),
            option::INFO => self.on_info(payload, out),
            option::LIST if payload.is_empty() => {
                for export in self.volumes.exports() {
                    wire::option_reply(out, option, reply::SERVER, &wire::server_payload(&export.name));
                }
                wire::option_reply(out, option, reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if payload.is_empty() => {
                self.structured = true;
                wire::option_reply(out, option, reply::ACK, &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => refuse(out, option, reply::ERR_INVALID, "no payload"),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.on_contexts(option, payload, out),
            _ => refuse(out, option, reply::ERR_UNSUP, "not supported"),
        }
        Ok(Next::Option)
    }

    /// The old way to choose an export: there is no way to refuse but to close.
    async fn on_export_name(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Result<Next<V>, Closed> {
        let name = wire::export_name(payload)?;
        let attachment = self.attach(name).await.map_err(Closed::Open)?;
        let flags = wire::export_flags(self.structured);
        wire::export_name_reply(out, attachment.export.size_bytes, flags, self.no_zeroes);
        Ok(Next::Transmission(attachment))
    }

    async fn on_go(&mut self, payload: &[u8], out: &mut Vec<u8>) -> Next<V> {
        let query = match ExportQuery::decode(payload) {
            Ok(query) => query,
            Err(malformed) => {
                refuse(out, option::GO, reply::ERR_INVALID, &malformed.to_string());
                return Next::Option;
            }
        };
        match self.attach(query.name).await {
            Ok(attachment) => {
                self.describe(out, option::GO, &attachment.export, query.wants_name);
                Next::Transmission(attachment)
            }
            Err(code) => {
                refuse(out, option::GO, refusal(code), code.what());
                Next::Option
            }
        }
    }

    fn on_info(&self, payload: &[u8], out: &mut Vec<u8>) {
        let query = match ExportQuery::decode(payload) {
            Ok(query) => query,
            Err(malformed) => return refuse(out, option::INFO, reply::ERR_INVALID, &malformed.to_string()),
        };
        match self.find(query.name) {
            Some(export) => self.describe(out, option::INFO, &export, query.wants_name),
            None => refuse(out, option::INFO, reply::ERR_UNKNOWN, Code::VolumeNotFound.what()),
        }
    }

    fn on_contexts(&mut self, option: u32, payload: &[u8], out: &mut Vec<u8>) {
        let query = match ContextQuery::decode(payload) {
            Ok(query) => query,
            Err(malformed) => return refuse(out, option, reply::ERR_INVALID, &malformed.to_string()),
        };
        let sets = option == option::SET_META_CONTEXT;
        if sets {
            // Each selection replaces the one before, also when it fails.
            self.allocation_of = None;
        }
        if !self.structured {
            return refuse(out, option, reply::ERR_INVALID, "structured replies come first");
        }
        if self.find(query.name).is_none() {
            return refuse(out, option, reply::ERR_UNKNOWN, Code::VolumeNotFound.what());
        }
        let matches = if sets { query.sets_allocation() } else { query.lists_allocation() };
        if matches {
            // The id means something in a selection only.
            let id = if sets { wire::CONTEXT_ALLOCATION_ID } else { 0 };
            let payload = wire::context_payload(id, wire::CONTEXT_ALLOCATION);
            wire::option_reply(out, option, reply::META_CONTEXT, &payload);
        }
        if sets && matches {
            self.allocation_of = Some(query.name.to_owned());
        }
        wire::option_reply(out, option, reply::ACK, &[]);
    }

    fn describe(&self, out: &mut Vec<u8>, option: u32, export: &Export, with_name: bool) {
        let flags = wire::export_flags(self.structured);
        wire::option_reply(out, option, reply::INFO, &wire::info_export(export.size_bytes, flags));
        if with_name {
            wire::option_reply(out, option, reply::INFO, &wire::info_name(&export.name));
        }
        // Also to clients which did not ask: they may take notice, and none may mind.
        let sizes = wire::info_block_size(SECTOR_SIZE, PAGE_SIZE as u32, REQUEST_BYTES_MAX);
        wire::option_reply(out, option, reply::INFO, &sizes);
        wire::option_reply(out, option, reply::ACK, &[]);
    }

    fn find(&self, name: &str) -> Option<Export> {
        self.volumes.exports().into_iter().find(|export| export.name == name)
    }

    async fn attach(&self, name: &str) -> Result<Attachment<V>, Code> {
        let export = self.volumes.open(name).await?;
        Ok(Attachment { volumes: self.volumes.clone(), export })
    }
}

/// Refuses an option, with a line for the user of the client.
fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, reason: &str) {
    wire::option_reply(out, option, kind, reason.as_bytes());
}

/// How a failed open is told: the client may go on with another option.
fn refusal(code: Code) -> u32 {
    match code {
        Code::VolumeAttached | Code::Fenced => reply::ERR_POLICY,
        _ => reply::ERR_UNKNOWN,
    }
}
