//! The frame header, and the fixed parts of frames: hello, the replication family's meta, its lists.

use anyhow::ensure;
use xsan_dataplane::testing::Random;
use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{
    BlockIndex, BlockKey, Epoch, GroupId, Incarnation, Layer, Lineage, NodeId, Seq, ShardIndex, Version,
};
use xsan_protocol::units::{PAGES_PER_UNIT, UNITS_PER_BLOCK};
use xsan_protocol::wire::header::{self, HEADER_SIZE, Header, Opcode, flags};
use xsan_protocol::wire::replication::{
    AppendMeta, BlockDigest, BlockVersions, EntryKind, FetchMeta, PeerInfo, PushMeta, UnitChecksums,
};
use xsan_protocol::wire::session::Hello;

use crate::measure::Bound;
use crate::target::{Form, Target, Verdict, no_checksum};

/// Decoders of fixed structures allocate nothing.
const NOTHING: Bound = Bound::new(0, 0);

pub const TARGETS: &[Target] = &[
    Target {
        what: "the header of every frame",
        seeds: header_seeds,
        fix: fix_header,
        check: check_header,
        ..fixed("wire-header", 256)
    },
    Target {
        what: "the payload of a Hello frame",
        seeds: || vec![hello("").encode(), hello("cluster-1").encode(), hello(&"x".repeat(128)).encode()],
        check: check_hello,
        ..fixed("hello", 512)
    },
    Target {
        what: "meta of Append and FetchReply",
        seeds: append_seeds,
        check: check_append,
        ..fixed("append-meta", 96)
    },
    Target {
        what: "meta of PeerInfo",
        seeds: || vec![PeerInfo { last: VERSION, durable: Seq(9), acked: Seq(8) }.encode().to_vec()],
        check: check_peer_info,
        ..fixed("peer-info", 64)
    },
    Target {
        what: "meta of Fetch",
        seeds: || vec![FetchMeta { from: Seq(4), to: Seq(900) }.encode().to_vec()],
        check: check_fetch,
        ..fixed("fetch-meta", 64)
    },
    Target {
        what: "meta of Push",
        seeds: || vec![PushMeta { version: VERSION, as_of: Seq(10), lost: 4 }.encode().to_vec()],
        check: check_push,
        ..fixed("push-meta", 64)
    },
    Target {
        what: "the lists of Compare, CompareReply and CheckReply",
        seeds: || vec![digests(3), versions(2), units(2), Vec::new()],
        check: check_lists,
        ..fixed("lists", 8192)
    },
];

pub const VERSION: Version = Version::new(Epoch(3), Seq(77));

const fn fixed(name: &'static str, bytes_max: usize) -> Target {
    Target {
        name,
        what: "",
        form: Form::Bytes,
        bytes_max,
        test_inputs: 20_000,
        seeds: Vec::new,
        fix: no_checksum,
        check: |_| Ok(Verdict::Refused),
        known: &[],
    }
}

pub fn key(index: u32) -> BlockKey {
    BlockKey { lineage: Lineage(0x1122_3344_5566_7788), layer: Layer(1), index: BlockIndex(index) }
}

fn header_seeds() -> Vec<Vec<u8>> {
    let headers = Opcode::ALL.iter().map(|opcode| {
        let mut header = Header::new(*opcode);
        header.request_id = 0x0102_0304;
        header.group = GroupId(0x0001_0005);
        header.epoch = Epoch(3);
        header.key = key(9);
        header.offset = 8192;
        header.length = 4096;
        header.payload_length = 4100;
        if *opcode == Opcode::WriteReply {
            header.status = Some(Code::Busy);
        }
        if *opcode == Opcode::Write {
            header.flags = flags::ALL;
        }
        header.encode().to_vec()
    });
    headers.collect()
}

/// Magic, version and checksum of the header that `bytes` open with, mostly.
pub fn fix_header(bytes: &mut Vec<u8>, random: &mut Random) {
    bytes.resize(bytes.len().max(HEADER_SIZE), 0);
    bytes[..4].copy_from_slice(&header::MAGIC.to_le_bytes());
    if !random.one_in(8) {
        bytes[8] = header::VERSION;
        bytes[14..16].fill(0);
    }
    seal_header(&mut bytes[..HEADER_SIZE]);
}

pub fn seal_header(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let checksum = crc32c(&bytes[..HEADER_SIZE]);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
}

fn check_header(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Some(bytes) = bytes.first_chunk::<HEADER_SIZE>() else { return Ok(Verdict::Refused) };
    let decoded = NOTHING.hold(bytes.len(), || Header::decode(bytes))?;
    match decoded {
        Ok(header) => {
            ensure!(header.encode() == *bytes, "a header decodes that no encoder makes");
            ensure!(
                header.payload_length as usize <= Header::payload_max(header.opcode),
                "payload_length is too large"
            );
        }
        Err(error) => ensure!(error.code().number() > 0, "an error without a number"),
    }
    Ok(Verdict::of(&decoded))
}

pub fn hello(cluster_id: &str) -> Hello {
    Hello {
        node: NodeId(2),
        incarnation: Incarnation(0xaabb),
        client_id: 0x2_0001,
        session: 5,
        shard: ShardIndex(1),
        shard_count: 4,
        cluster_id: cluster_id.to_owned(),
    }
}

fn check_hello(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // The cluster id is all that is copied.
    let decoded = Bound::new(1, 0).hold(bytes.len(), || Hello::decode(bytes))?;
    if let Ok(hello) = &decoded {
        let encoded = hello.encode();
        ensure!(Hello::decode(&encoded).as_ref() == Ok(hello), "a hello is not the same after its encoding");
        // The range of versions that a peer speaks is not kept: it is ours to say which one is spoken.
        ensure!(encoded[2..] == bytes[2..], "a hello decodes that no encoder makes");
    }
    Ok(Verdict::of(&decoded))
}

fn append_seeds() -> Vec<Vec<u8>> {
    let kinds = [EntryKind::Write, EntryKind::Zero];
    let metas = kinds.map(|kind| AppendMeta {
        kind,
        version: VERSION,
        acked: Seq(70),
        previous_first: Version::ZERO,
        previous_last: Version::UNKNOWN,
    });
    metas.map(|meta| meta.encode().to_vec()).to_vec()
}

/// A fixed meta: what decodes is what the encoder makes of it, byte for byte.
macro_rules! check_meta {
    ($name:ident, $type:ty) => {
        fn $name(bytes: &[u8]) -> anyhow::Result<Verdict> {
            let decoded = NOTHING.hold(bytes.len(), || <$type>::decode(bytes))?;
            if let Ok(meta) = &decoded {
                ensure!(meta.encode() == *bytes, "{meta:?} decodes from what no encoder makes");
            }
            Ok(Verdict::of(&decoded))
        }
    };
}

check_meta!(check_append, AppendMeta);
check_meta!(check_peer_info, PeerInfo);
check_meta!(check_fetch, FetchMeta);
check_meta!(check_push, PushMeta);

pub fn digests(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..count {
        let key = key(index);
        bytes.extend_from_slice(&key.lineage.0.to_le_bytes());
        bytes.extend_from_slice(&key.layer.0.to_le_bytes());
        bytes.extend_from_slice(&key.index.0.to_le_bytes());
        bytes.extend_from_slice(&(u64::from(index) << 40).to_le_bytes());
    }
    bytes
}

pub fn versions(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..count {
        bytes.extend_from_slice(&digests(index + 1)[index as usize * 24..][..16]);
        for unit in 0..UNITS_PER_BLOCK as u64 {
            bytes.extend_from_slice(&unit.to_le_bytes());
            bytes.extend_from_slice(&3_u32.to_le_bytes());
        }
    }
    bytes
}

pub fn units(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for unit in 0..count {
        bytes.extend_from_slice(&u64::from(unit).to_le_bytes());
        bytes.extend_from_slice(&[3, 0, 0, 0, 1, 0x80, 0, 0]);
        (0..PAGES_PER_UNIT as u32)
            .for_each(|page| bytes.extend_from_slice(&(page * 0x0101_0101).to_le_bytes()));
    }
    bytes
}

fn check_lists(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let digests = NOTHING.hold(bytes.len(), || BlockDigest::list(bytes))?;
    let versions = NOTHING.hold(bytes.len(), || BlockVersions::list(bytes))?;
    ensure!(
        digests.is_ok() == bytes.len().is_multiple_of(size_of::<BlockDigest>()),
        "a list of part of a digest"
    );
    ensure!(
        versions.is_ok() == bytes.len().is_multiple_of(size_of::<BlockVersions>()),
        "a list of part of a block"
    );
    for entry in digests.iter().copied().flatten() {
        ensure!(BlockDigest::new(entry.key(), entry.digest()) == *entry, "{entry:?} is not the same again");
    }
    for entry in versions.iter().copied().flatten() {
        ensure!(
            BlockVersions::new(entry.key(), &entry.versions()) == *entry,
            "{entry:?} is not the same again"
        );
    }
    let units = NOTHING.hold(bytes.len(), || UnitChecksums::list(bytes))?;
    let whole = bytes.len().is_multiple_of(size_of::<UnitChecksums>());
    ensure!(units.is_err() || whole, "a list of part of a unit");
    for entry in units.iter().copied().flatten() {
        let again = UnitChecksums::new(entry.version(), entry.damaged(), &entry.checksums());
        ensure!(again == *entry, "{entry:?} is not the same again");
    }
    let accepted = digests.is_ok() || versions.is_ok() || units.is_ok();
    Ok(if accepted { Verdict::Accepted } else { Verdict::Refused })
}
