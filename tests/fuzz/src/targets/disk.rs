//! The records of a store's device: superblock, checkpoint, head of a journal batch, block record.
//!
//! Each opens with an 8-byte magic and a checksum over all that follows; `reseal` makes both right again.

use anyhow::ensure;
use xsan_dataplane::testing::Random;
use xsan_protocol::checksum::crc32c;
use xsan_protocol::disk::block_record::{self, BlockRecord, RECORD_SIZE, UnitRecord};
use xsan_protocol::disk::checkpoint::{self, Checkpoint, GROUPS_MAX, GroupRow};
use xsan_protocol::disk::journal::{
    self, BatchHead, BatchHeader, Descriptor, HEAD_BYTES_MAX, HeadWriter, Kind,
};
use xsan_protocol::disk::superblock::{self, Extent, Role, Superblock};
use xsan_protocol::ids::{GroupId, NodeId, Seq, StoreId, Version};
use xsan_protocol::units::{PAGE_SIZE, PageRange, UNITS_PER_BLOCK};

use super::wire::{VERSION, key};
use crate::measure::Bound;
use crate::target::{Form, Target, Verdict};

pub const TARGETS: &[Target] = &[
    Target {
        name: "superblock",
        what: "a superblock",
        fix: |bytes, random| reseal(bytes, superblock::MAGIC, PAGE_SIZE, random),
        seeds: superblock_seeds,
        check: check_superblock,
        bytes_max: PAGE_SIZE + 64,
        ..RECORD
    },
    Target {
        name: "checkpoint",
        what: "a slot of a checkpoint",
        fix: fix_checkpoint,
        seeds: checkpoint_seeds,
        check: check_checkpoint,
        bytes_max: checkpoint::SLOT_SIZE,
        ..RECORD
    },
    Target {
        name: "batch-head",
        what: "the head of a journal batch",
        fix: fix_head,
        seeds: head_seeds,
        check: check_head,
        bytes_max: HEAD_BYTES_MAX + PAGE_SIZE,
        ..RECORD
    },
    Target {
        name: "block-record",
        what: "half a slot of block records",
        fix: |bytes, random| reseal(bytes, block_record::MAGIC, RECORD_SIZE, random),
        seeds: record_seeds,
        check: check_record,
        bytes_max: RECORD_SIZE + 64,
        ..RECORD
    },
];

const RECORD: Target = Target {
    name: "",
    what: "",
    form: Form::Bytes,
    bytes_max: 0,
    test_inputs: 6_000,
    seeds: Vec::new,
    fix: |_, _| {},
    check: |_| Ok(Verdict::Refused),
    known: &[],
};

/// Stamps magic and checksum onto a record.
pub fn seal(record: &mut [u8], magic: [u8; 8]) {
    record[..8].copy_from_slice(&magic);
    let checksum = crc32c(&record[12..]);
    record[8..12].copy_from_slice(&checksum.to_le_bytes());
}

/// Gives a record the right length, mostly, and seals it.
fn reseal(bytes: &mut Vec<u8>, magic: [u8; 8], length: usize, random: &mut Random) {
    if bytes.len() < 12 || !random.one_in(16) {
        bytes.resize(length, 0);
    }
    seal(bytes, magic);
}

fn superblock_seeds() -> Vec<Vec<u8>> {
    let mib = 1 << 20;
    let plain = Superblock {
        role: Role::Capacity,
        store: StoreId(0xabcd),
        cluster_id: "cluster-1".to_owned(),
        node: NodeId(3),
        generation: 3,
        created_ns: 1,
        device_bytes: 64 * mib,
        cached: false,
        journal: Extent { offset: mib, bytes: 16 * mib },
        checkpoints: Extent { offset: 128 << 10, bytes: 512 << 10 },
        records: Extent { offset: 17 * mib, bytes: 2 * mib },
        units: Extent { offset: 19 * mib, bytes: 32 * mib },
    };
    let cached = Superblock { cached: true, journal: Extent::default(), ..plain.clone() };
    let cache = Superblock { role: Role::Cache, cluster_id: "x".repeat(128), ..plain.clone() };
    [plain, cached, cache].map(|superblock| superblock.encode()).to_vec()
}

fn check_superblock(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let decoded = Bound::new(1, 0).hold(bytes.len(), || Superblock::decode(bytes))?;
    if let Ok(superblock) = &decoded {
        ensure!(superblock.encode() == bytes, "{superblock:?} decodes from what no encoder makes");
        for extent in [superblock.journal, superblock.checkpoints, superblock.records, superblock.units] {
            ensure!(extent.end() <= superblock.device_bytes, "{extent:?} is not on the device");
        }
    }
    Ok(Verdict::of(&decoded))
}

fn checkpoint_seeds() -> Vec<Vec<u8>> {
    let seeds = [0, 1, 3, 130, GROUPS_MAX].map(|count| {
        let row = |number: u32| GroupRow {
            group: GroupId(number + 5),
            applied: VERSION,
            reset_position: u64::from(number) * 4096,
            damaged: number % 2 == 1,
        };
        let checkpoint = Checkpoint {
            store: StoreId(0xabcd),
            number: 9,
            tail: 1 << 20,
            flushed: 2 << 20,
            session: 4,
            session_start: 1 << 20,
            slots_mark: 64,
            generations: 77,
            damaged: count == 3,
            groups: (0..count as u32).map(row).collect(),
        };
        let mut bytes = vec![0; Checkpoint::size(count)];
        checkpoint.encode(&mut bytes);
        bytes
    });
    seeds.to_vec()
}

/// Seals as much as the number of groups says the checkpoint has, if that much is there.
fn fix_checkpoint(bytes: &mut Vec<u8>, random: &mut Random) {
    bytes.resize(bytes.len().max(PAGE_SIZE), 0);
    if random.one_in(16) {
        return;
    }
    let count = u32::from_le_bytes([bytes[68], bytes[69], bytes[70], bytes[71]]) as usize;
    let size = Checkpoint::size(count.min(GROUPS_MAX));
    bytes.resize(bytes.len().max(size), 0);
    seal(&mut bytes[..size], checkpoint::MAGIC);
}

fn check_checkpoint(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // A row is 32 bytes on disk and 40 in memory.
    let decoded = Bound::new(2, 0).hold(bytes.len(), || Checkpoint::decode(bytes))?;
    if let Ok(checkpoint) = &decoded {
        let mut encoded = vec![0; Checkpoint::size(checkpoint.groups.len())];
        checkpoint.encode(&mut encoded);
        // What is behind the record in its slot belongs to an older, longer one.
        ensure!(bytes.starts_with(&encoded), "a checkpoint decodes that no encoder makes: {checkpoint:?}");
        ensure!(
            Checkpoint::decode(&encoded).as_ref() == Ok(checkpoint),
            "it is not the same after its encoding"
        );
    }
    Ok(Verdict::of(&decoded))
}

fn descriptor(kind: Kind, pages: PageRange, data_page: u32) -> Descriptor {
    Descriptor {
        kind,
        group: GroupId(5),
        version: VERSION,
        acked: Seq(70),
        key: key(2),
        pages,
        previous_first: Version::ZERO,
        previous_last: VERSION,
        data_page,
        start: if kind == Kind::Carried { 4 << 20 } else { 0 },
        lost: if kind == Kind::Push { 4 } else { 0 },
    }
}

fn encode_head(header: BatchHeader, descriptors: &[Descriptor], checksums: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; header.head_bytes()];
    let mut writer = HeadWriter::new(header, &mut bytes);
    for descriptor in descriptors {
        let first = descriptor.data_page as usize;
        let count = if descriptor.kind.has_data() { usize::from(descriptor.pages.count) } else { 0 };
        writer.push(descriptor, &checksums[first.min(checksums.len())..][..count]);
    }
    writer.finish();
    bytes
}

fn head_seeds() -> Vec<Vec<u8>> {
    let unit = PageRange::of_unit(3);
    let all = [
        descriptor(Kind::Write, PageRange::new(2, 8), 0),
        descriptor(Kind::Zero, PageRange::new(0, 1024), 0),
        descriptor(Kind::Push, unit, 8),
        descriptor(Kind::PushZero, unit, 0),
        descriptor(Kind::Reset, PageRange::new(0, 1), 0),
        descriptor(Kind::Carry, PageRange::new(9, 2), 24),
        descriptor(Kind::CarryZero, PageRange::new(0, 1), 0),
        descriptor(Kind::Carried, PageRange::new(0, 1), 0),
    ];
    let many: Vec<_> =
        (0..100).map(|number| descriptor(Kind::Write, PageRange::new(4, 2), number * 2)).collect();
    let batches = [(&all[..], 26), (&all[1..2], 0), (&many[..], 200)];
    let seeds = batches.map(|(descriptors, data_pages)| {
        let header = BatchHeader {
            store: StoreId(0xabcd),
            position: 5 << 20,
            previous_end: 5 << 20,
            flushed: 4 << 20,
            durable: 5 << 20,
            session: 2,
            descriptor_count: descriptors.len() as u32,
            data_pages,
        };
        encode_head(header, descriptors, &vec![0x1234_5678; data_pages as usize])
    });
    seeds.to_vec()
}

/// Gives the head the length that its counts call for, if they are possible, and seals it.
fn fix_head(bytes: &mut Vec<u8>, random: &mut Random) {
    bytes.resize(bytes.len().max(PAGE_SIZE), 0);
    if let Ok(header) = BatchHeader::peek(bytes)
        && !random.one_in(16)
    {
        bytes.resize(header.head_bytes(), 0);
    }
    seal(bytes, journal::MAGIC);
}

fn check_head(bytes: &[u8]) -> anyhow::Result<Verdict> {
    // A descriptor is 96 bytes on disk and about 120 in memory.
    let decoded = Bound::new(3, 0).hold(bytes.len(), || journal::decode(bytes))?;
    if let Ok(BatchHead { header, descriptors, checksums }) = &decoded {
        ensure!(header.head_bytes() == bytes.len(), "a head of another length");
        ensure!(
            checksums.len() == header.data_pages as usize,
            "{} checksums for {header:?}",
            checksums.len()
        );
        for descriptor in descriptors {
            let end = descriptor.data_page as usize + usize::from(descriptor.pages.count);
            ensure!(!descriptor.kind.has_data() || end <= checksums.len(), "{descriptor:?} has no checksums");
        }
        ensure!(
            encode_head(*header, descriptors, checksums) == bytes,
            "a head decodes that no encoder makes"
        );
    }
    Ok(Verdict::of(&decoded))
}

fn record_seeds() -> Vec<Vec<u8>> {
    let free = BlockRecord {
        store: StoreId(0xabcd),
        slot: 3,
        generation: 6,
        group: GroupId(5),
        key: key(2),
        timestamp_ns: 1,
        cycle: 4,
        entry_position: 1 << 20,
        push_position: 0,
        acked: VERSION,
        units: Box::new([UnitRecord::EMPTY; UNITS_PER_BLOCK]),
    };
    let mut full = free.clone();
    for (number, unit) in full.units.iter_mut().enumerate() {
        *unit = UnitRecord {
            version: VERSION,
            capacity: number as u32,
            present: (number as u16).wrapping_mul(0x1357),
            checksums: [0x9abc_def0; 16],
        };
    }
    let encode = |record: BlockRecord| {
        let mut bytes = vec![0; RECORD_SIZE];
        record.encode(&mut bytes);
        bytes
    };
    vec![encode(free), encode(full)]
}

fn check_record(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let decoded = Bound::new(0, size_of::<[UnitRecord; UNITS_PER_BLOCK]>() as u64)
        .hold(bytes.len(), || BlockRecord::decode(bytes))?;
    if let Ok(record) = &decoded {
        let mut encoded = vec![0; RECORD_SIZE];
        record.encode(&mut encoded);
        ensure!(encoded == bytes, "a record decodes that no encoder makes: {record:?}");
    }
    Ok(Verdict::of(&decoded))
}
