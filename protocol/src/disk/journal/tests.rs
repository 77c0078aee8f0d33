use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::super::assert_damage_is_refused;
use super::*;
use crate::ids::{BlockIndex, Epoch, Layer, Lineage};

fn any_version() -> impl Strategy<Value = Version> {
    any::<(u32, u64)>().prop_map(|(epoch, seq)| Version::new(Epoch(epoch), Seq(seq)))
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let key = any::<(u64, u32, u32)>().prop_map(|(lineage, layer, index)| BlockKey {
        lineage: Lineage(lineage),
        layer: Layer(layer),
        index: BlockIndex(index),
    });
    let range = (0u8..8, 0u16..900, 1u16..17);
    (range, any::<(u32, u64)>(), key, any_version(), any_version(), any_version()).prop_map(
        |((kind, first, count), (group, acked), key, version, previous_first, previous_last)| {
            let unit = PageRange::of_unit((first / 16) as u8);
            let (kind, pages) = match kind {
                0 => (Kind::Write, PageRange::new(first, count)),
                1 => (Kind::Zero, PageRange::new(first, count)),
                2 => (Kind::Push, unit),
                3 => (Kind::PushZero, unit),
                4 => (Kind::Reset, unit),
                5 => (Kind::Carry, PageRange::new(first, count)),
                6 => (Kind::CarryZero, PageRange::new(first, count)),
                _ => (Kind::Carried, unit),
            };
            let start = if kind == Kind::Carried { u64::from(first) << 12 } else { 0 };
            let (group, acked) = (GroupId(group), Seq(acked));
            Descriptor {
                kind,
                group,
                version,
                acked,
                key,
                pages,
                previous_first,
                previous_last,
                data_page: 0,
                start,
                lost: if kind == Kind::Push { first } else { 0 },
            }
        },
    )
}

fn encode(mut descriptors: Vec<Descriptor>) -> (Vec<u8>, BatchHead) {
    let mut checksums = Vec::new();
    let mut pages = 0;
    for descriptor in &mut descriptors {
        if descriptor.kind.has_data() {
            descriptor.data_page = pages;
            pages += u32::from(descriptor.pages.count);
        }
    }
    let header = BatchHeader {
        store: StoreId(5),
        position: 1 << 40,
        previous_end: (1 << 40) - 4096,
        flushed: 8192,
        durable: 12288,
        session: 3,
        descriptor_count: descriptors.len() as u32,
        data_pages: pages,
    };
    let mut head = vec![0xaa; header.head_bytes()];
    let mut writer = HeadWriter::new(header, &mut head);
    for descriptor in &descriptors {
        let count = if descriptor.kind.has_data() { descriptor.pages.count } else { 0 };
        let own: Vec<u32> = (0..u32::from(count)).map(|page| page * 31 + descriptor.data_page).collect();
        writer.push(descriptor, &own);
        checksums.extend(own);
    }
    writer.finish();
    (head, BatchHead { header, descriptors, checksums })
}

proptest! {
    #[test]
    fn batches_round_trip(descriptors in proptest::collection::vec(any_descriptor(), 1..60)) {
        let (head, batch) = encode(descriptors);
        prop_assert_eq!(decode(&head), Ok(batch));
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 512)) {
        bytes.resize(PAGE_SIZE, 0);
        bytes[12..16].copy_from_slice(&[1, 0, 0, 0]);
        let counts = [bytes[56] % 4, 0, 0, 0, bytes[60] % 32, 0, 0, 0];
        bytes[56..64].copy_from_slice(&counts);
        seal(MAGIC, &mut bytes);
        let _outcome = decode(&bytes);
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let strategy = proptest::collection::vec(any_descriptor(), 3..4);
    let descriptors = strategy.new_tree(&mut runner).unwrap().current();
    assert_damage_is_refused(&encode(descriptors).0, 1, decode);
}
