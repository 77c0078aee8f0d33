use proptest::prelude::*;

use super::super::assert_damage_is_refused;
use super::*;

fn example(name: &str) -> Superblock {
    let extent = |offset: u64, bytes: u64| Extent { offset: offset << 20, bytes: bytes << 20 };
    Superblock {
        role: Role::Capacity,
        store: StoreId(0x1122_3344_5566_7788),
        cluster_id: name.to_owned(),
        node: NodeId(7),
        generation: 3,
        created_ns: 12,
        device_bytes: 256 << 20,
        cached: false,
        journal: extent(1, 64),
        checkpoints: extent(65, 1),
        records: extent(66, 10),
        units: extent(76, 180),
    }
}

proptest! {
    #[test]
    fn superblocks_round_trip(name in "[a-zé-]{0,60}", generation in 0..super::super::COUNTER_END, cache in any::<bool>()) {
        let mut block = example(&name);
        block.generation = generation;
        if cache {
            block.role = Role::Cache;
            block.cached = true;
        }
        prop_assert_eq!(Superblock::decode(&block.encode()), Ok(block));
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 256)) {
        bytes.resize(Superblock::SIZE, 0);
        seal(MAGIC, &mut bytes);
        let _outcome = Superblock::decode(&bytes);
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    assert_damage_is_refused(&example("one").encode(), 1, Superblock::decode);
}

#[test]
fn a_newer_release_is_told_from_damage() {
    let mut bytes = example("one").encode();
    bytes[12] = 2;
    seal(MAGIC, &mut bytes);
    assert_eq!(Superblock::decode(&bytes), Err(DiskFormatError::Version { found: 2 }));
}

/// A fuzzed superblock, sealed again, whose block records lay on the superblocks: the store opened, wrote its records
/// and did not open again.
#[test]
fn parts_that_overlap_are_refused() {
    let refused = Err(DiskFormatError::Field { field: "extents" });
    for part in [Extent { offset: 0, bytes: 4096 }, Extent { offset: 64 << 20, bytes: 2 << 20 }] {
        let block = Superblock { records: part, ..example("one") };
        assert_eq!(Superblock::decode(&block.encode()), refused);
    }
    let without = Superblock { journal: Extent::default(), ..example("one") };
    assert_eq!(Superblock::decode(&without.encode()), Ok(without));
}
