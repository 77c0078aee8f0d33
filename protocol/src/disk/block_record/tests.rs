use proptest::prelude::*;

use super::super::assert_damage_is_refused;
use super::*;
use crate::ids::{BlockIndex, Epoch, Layer, Lineage, Seq};

fn example() -> BlockRecord {
    let mut record = BlockRecord {
        store: StoreId(99),
        slot: 4,
        generation: 12,
        group: GroupId(0x10007),
        key: BlockKey { lineage: Lineage(8), layer: Layer(1), index: BlockIndex(44) },
        timestamp_ns: 1_000_000,
        cycle: 6,
        entry_position: 4097,
        push_position: 0,
        acked: Version::new(Epoch(3), Seq(90)),
        units: Box::new([UnitRecord::EMPTY; UNITS_PER_BLOCK]),
    };
    record.units[7] = UnitRecord {
        version: Version::new(Epoch(3), Seq(88)),
        capacity: 1234,
        present: 0x8001,
        checksums: std::array::from_fn(|page| page as u32 * 17),
    };
    record
}

fn encoded(record: &BlockRecord) -> Vec<u8> {
    let mut bytes = vec![0xaa; RECORD_SIZE];
    record.encode(&mut bytes);
    bytes
}

proptest! {
    #[test]
    fn records_round_trip(unit in 0..UNITS_PER_BLOCK, present in any::<u16>(), capacity in 0..NO_CAPACITY, seq in any::<u64>()) {
        let mut record = example();
        let version = Version::new(Epoch(9), Seq(seq));
        record.units[unit] = UnitRecord { version, capacity, present, checksums: [5; PAGES_PER_UNIT] };
        prop_assert_eq!(BlockRecord::decode(&encoded(&record)), Ok(record));
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 512)) {
        bytes.resize(RECORD_SIZE, 0);
        bytes[12..16].copy_from_slice(&[1, 0, 0, 0]);
        seal(MAGIC, &mut bytes);
        let _outcome = BlockRecord::decode(&bytes);
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    assert_damage_is_refused(&encoded(&example()), 1, BlockRecord::decode);
}

#[test]
fn an_empty_record_frees_its_slot() {
    let mut record = example();
    assert!(!record.is_free());
    record.units[7] = UnitRecord::EMPTY;
    assert!(record.is_free());
    assert_eq!(BlockRecord::decode(&encoded(&record)), Ok(record));
}
