use proptest::prelude::*;

use super::super::assert_damage_is_refused;
use super::*;
use crate::ids::{Epoch, Seq};

fn example(group_count: usize) -> Checkpoint {
    let groups = (0..group_count as u32).map(|group| GroupRow {
        group: GroupId(group * 3),
        applied: Version::new(Epoch(group + 1), Seq(u64::from(group) * 7)),
        reset_position: u64::from(group) * 4096,
        damaged: group % 5 == 0,
    });
    Checkpoint {
        store: StoreId(77),
        number: 9,
        tail: 8192,
        flushed: 16384,
        session: 2,
        session_start: 4096,
        slots_mark: 64,
        generations: 77,
        damaged: true,
        groups: groups.collect(),
    }
}

fn encoded(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut bytes = vec![0xaa; Checkpoint::size(checkpoint.groups.len())];
    checkpoint.encode(&mut bytes);
    bytes
}

proptest! {
    #[test]
    fn checkpoints_round_trip(group_count in 0usize..600, number in 0..super::super::COUNTER_END, mark in any::<u32>()) {
        let checkpoint = Checkpoint { number, slots_mark: mark, ..example(group_count) };
        let mut slot = encoded(&checkpoint);
        prop_assert_eq!(Checkpoint::decode(&slot), Ok(checkpoint.clone()));
        // What lay behind it in the slot before does not matter.
        slot.resize(SLOT_SIZE, 0xee);
        prop_assert_eq!(Checkpoint::decode(&slot), Ok(checkpoint));
    }

    #[test]
    fn any_bytes_are_decoded_without_a_panic(mut bytes in proptest::collection::vec(any::<u8>(), 256)) {
        bytes.resize(PAGE_SIZE, 0);
        seal(MAGIC, &mut bytes);
        let _outcome = Checkpoint::decode(&bytes);
    }
}

#[test]
fn every_flipped_bit_is_refused() {
    assert_damage_is_refused(&encoded(&example(20)), 1, Checkpoint::decode);
    assert_damage_is_refused(&encoded(&example(500)), 97, Checkpoint::decode);
}

#[test]
fn the_largest_table_fits_its_slot() {
    assert!(Checkpoint::size(GROUPS_MAX) <= SLOT_SIZE);
    let checkpoint = example(GROUPS_MAX);
    assert_eq!(Checkpoint::decode(&encoded(&checkpoint)), Ok(checkpoint));
}

/// Fuzzed checkpoints, sealed again, made recovery add to the largest number there is.
#[test]
fn counters_without_room_are_refused() {
    let refused = Err(DiskFormatError::Field { field: "counters" });
    let largest = u64::MAX - 4095;
    let example = example(3);
    let wrong = [
        Checkpoint { session: u64::MAX, ..example.clone() },
        Checkpoint { number: u64::MAX, ..example.clone() },
        Checkpoint { tail: largest, flushed: largest, ..example.clone() },
        Checkpoint { session_start: largest, ..example },
    ];
    for checkpoint in wrong {
        assert_eq!(Checkpoint::decode(&encoded(&checkpoint)), refused);
    }
}

/// The fuzzer's first finding: bytes behind the rows were taken whatever they were.
#[test]
fn padding_is_zero() {
    let mut bytes = encoded(&example(3));
    bytes[4000] = 1;
    seal(MAGIC, &mut bytes);
    assert_eq!(Checkpoint::decode(&bytes), Err(DiskFormatError::Field { field: "padding" }));
}
