//! What an NBD client sends: options and their payloads, requests, and whole conversations with a gateway.

use anyhow::ensure;
use xsan_dataplane::gateway::nbd::rules::{self, Agreed, Command, REQUEST_BYTES_MAX};
use xsan_dataplane::gateway::nbd::wire::{
    self, ContextQuery, ExportQuery, OptionHeader, Request, command, flag, option,
};
use xsan_dataplane::testing::Random;
use xsan_protocol::limits::FRAME_DATA_MAX;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE};

use crate::measure::Bound;
use crate::target::{Form, Target, Verdict};

pub const TARGETS: &[Target] = &[
    Target {
        name: "nbd-option",
        what: "an option of the NBD handshake with its payload",
        bytes_max: 8192,
        seeds: option_seeds,
        fix: fix_option,
        check: check_option,
        ..NBD
    },
    Target {
        name: "nbd-request",
        what: "a request of the NBD transmission phase, and how it is cut into pieces",
        bytes_max: 64,
        seeds: request_seeds,
        fix: |bytes, random| {
            if !random.one_in(16) {
                bytes.resize(bytes.len().max(4), 0);
                bytes[..4].copy_from_slice(&request_seeds()[0][..4]);
            }
        },
        check: check_request,
        ..NBD
    },
];

const NBD: Target = Target {
    name: "",
    what: "",
    form: Form::Bytes,
    bytes_max: 0,
    test_inputs: 20_000,
    seeds: Vec::new,
    fix: |_, _| {},
    check: |_| Ok(Verdict::Refused),
    known: &[],
};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const SIZES: [u64; 4] = [0, 4096, 1 << 30, 1 << 50];

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

fn encode_option(number: u32, payload: &[u8]) -> Vec<u8> {
    [&OPTION_MAGIC[..], &number.to_be_bytes(), &(payload.len() as u32).to_be_bytes(), payload].concat()
}

fn option_seeds() -> Vec<Vec<u8>> {
    let query =
        [&string("vm-1")[..], &2_u16.to_be_bytes(), &3_u16.to_be_bytes(), &1_u16.to_be_bytes()].concat();
    let contexts =
        [&string("vm-1")[..], &2_u32.to_be_bytes(), &string("base:"), &string(wire::CONTEXT_ALLOCATION)]
            .concat();
    let none = [&string("größe")[..], &0_u32.to_be_bytes()].concat();
    vec![
        encode_option(option::EXPORT_NAME, b"vm-1"),
        encode_option(option::ABORT, &[]),
        encode_option(option::LIST, &[]),
        encode_option(option::STRUCTURED_REPLY, &[]),
        encode_option(option::INFO, &query),
        encode_option(option::GO, &query),
        encode_option(option::LIST_META_CONTEXT, &none),
        encode_option(option::SET_META_CONTEXT, &contexts),
    ]
}

fn fix_option(bytes: &mut Vec<u8>, random: &mut Random) {
    bytes.resize(bytes.len().max(OptionHeader::SIZE), 0);
    bytes[..8].copy_from_slice(OPTION_MAGIC);
    if !random.one_in(16) {
        let length = (bytes.len() - OptionHeader::SIZE) as u32;
        bytes[12..16].copy_from_slice(&length.to_be_bytes());
    }
}

fn check_option(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Some((head, payload)) = bytes.split_first_chunk() else { return Ok(Verdict::Refused) };
    let nothing = Bound::new(0, 0);
    let Ok(header) = nothing.hold(bytes.len(), || OptionHeader::decode(head))? else {
        return Ok(Verdict::Refused);
    };
    ensure!(
        encode_option(header.option, &[])[..12] == head[..12],
        "an option decodes from what no encoder makes"
    );
    let payload = &payload[..payload.len().min(header.length as usize)];
    // Any option may be taken for any other by the fuzzer: each decoder must stand each payload.
    let export = nothing.hold(payload.len(), || ExportQuery::decode(payload))?;
    // A query of 4 bytes is a slice of 16, in a vector that grows by doubling.
    let contexts = Bound::new(17, 64).hold(payload.len(), || ContextQuery::decode(payload))?;
    let name = nothing.hold(payload.len(), || wire::export_name(payload))?;
    if let Ok(query) = &export {
        ensure!(payload[4..].starts_with(query.name.as_bytes()), "another name than was sent");
    }
    if let Ok(query) = &contexts {
        let mut encoded = [&string(query.name)[..], &(query.queries.len() as u32).to_be_bytes()].concat();
        query.queries.iter().for_each(|text| encoded.extend_from_slice(&string(text)));
        ensure!(encoded == payload, "contexts decode from what no encoder makes");
        ensure!(!query.sets_allocation() || query.lists_allocation(), "it is set and not listed");
    }
    if let Ok(name) = name {
        ensure!(name.len() <= wire::STRING_BYTES_MAX, "a name of {} bytes", name.len());
    }
    Ok(if export.is_ok() || contexts.is_ok() { Verdict::Accepted } else { Verdict::Refused })
}

fn request_seeds() -> Vec<Vec<u8>> {
    let commands = [
        (command::READ, flag::DF),
        (command::WRITE, flag::FUA),
        (command::DISCONNECT, 0),
        (command::FLUSH, 0),
        (command::TRIM, 0),
        (command::CACHE, 0),
        (command::WRITE_ZEROES, flag::NO_HOLE),
        (command::BLOCK_STATUS, flag::REQ_ONE),
    ];
    let encode = |(command, flags)| {
        let (offset, length) = if command == command::FLUSH { (0, 0) } else { ((4 << 20) - 4096, 1 << 20) };
        Request { flags, command, cookie: 0x1122_3344_5566_7788, offset, length }.encode().to_vec()
    };
    commands.map(encode).to_vec()
}

fn check_request(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Some(bytes) = bytes.first_chunk() else { return Ok(Verdict::Refused) };
    let decoded = Bound::new(0, 0).hold(bytes.len(), || Request::decode(bytes))?;
    let Ok(request) = decoded else { return Ok(Verdict::Refused) };
    ensure!(request.encode() == *bytes, "a request decodes that no encoder makes");
    let mut verdict = Verdict::Refused;
    for size_bytes in SIZES {
        for (structured, allocation) in [(false, false), (true, true)] {
            let allowed = rules::check(&request, Agreed { structured, allocation }, size_bytes);
            let Ok(found) = allowed else { continue };
            verdict = Verdict::Accepted;
            if found == Command::Flush {
                continue;
            }
            let end = u128::from(request.offset) + u128::from(request.length);
            ensure!(request.length > 0 && end <= u128::from(size_bytes), "{found:?} is let in past the end");
            if matches!(found, Command::Read { .. } | Command::Write { .. }) {
                ensure!(
                    request.length <= REQUEST_BYTES_MAX,
                    "{found:?} of {} bytes is let in",
                    request.length
                );
                check_pieces(&request)?;
            }
        }
    }
    Ok(verdict)
}

fn check_pieces(request: &Request) -> anyhow::Result<()> {
    let mut next = request.offset;
    for piece in rules::pieces(request.offset, request.length) {
        ensure!(piece.offset == next && piece.length > 0, "{piece:?} does not follow {next}");
        next += piece.length as u64;
        let block = |byte: u64| byte / BLOCK_SIZE as u64;
        ensure!(block(piece.offset) == block(next - 1), "{piece:?} is in two blocks");
        let pages = piece.offset as usize % PAGE_SIZE + piece.length;
        ensure!(pages <= FRAME_DATA_MAX, "{piece:?} does not fit a frame");
    }
    ensure!(next == request.offset + u64::from(request.length), "the pieces end at {next}");
    Ok(())
}
