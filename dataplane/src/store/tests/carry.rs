//! Entries that wait for their acknowledgement while the journal goes on.

use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::units::PageRange;

use super::rig::{JOURNAL_BYTES, Rig, key, version};
use crate::store::{Record, StoreError, StoreView};

const GROUP: GroupId = GroupId(3);
/// Writes as much as it can.
const BUSY: GroupId = GroupId(4);
const WHOLE: PageRange = PageRange::new(0, 256);

/// Writes of whole blocks in the busy group, so many MiB, each applied; refused by none.
fn write_mib(rig: &mut Rig, count: u64) {
    for number in 0..count {
        if rig.store.admit(256).is_err() {
            rig.settle();
        }
        assert_eq!(rig.store.admit(256), Ok(()), "after {number} MiB");
        rig.write_through(BUSY, key((number % 3) as u32), WHOLE, 1_000_000 + number * 1000);
    }
}

/// Three entries that are not acknowledged.
fn three_entries(rig: &mut Rig) {
    rig.write(GROUP, key(0), PageRange::new(0, 40), 100);
    rig.write(GROUP, key(0), PageRange::new(10, 4), 200);
    rig.write(GROUP, key(1), PageRange::of_unit(2), 0);
    rig.settle();
}

fn expect_three_entries(rig: &mut Rig) {
    rig.expect(GROUP, key(0), PageRange::new(0, 40), |page| match page {
        10..=13 => 200 + u64::from(page) - 10,
        _ => 100 + u64::from(page),
    });
}

fn carries(rig: &Rig) -> u32 {
    rig.store.groups[&GROUP].carries
}

/// Fills the journal until a carry has begun, and leaves it queued.
fn begin_carry(rig: &mut Rig) {
    for number in 0.. {
        rig.write_through(BUSY, key(number % 3), WHOLE, 5000 + u64::from(number) * 1000);
        rig.end_turn();
        if carries(rig) > 0 {
            return;
        }
    }
}

#[test]
fn entries_that_wait_stop_no_other_group() {
    for cached in [false, true] {
        let mut rig = Rig::new(21, cached);
        three_entries(&mut rig);
        write_mib(&mut rig, 5 * (JOURNAL_BYTES >> 20));
        assert!(carries(&rig) >= 4);
        // Nobody has seen them; they are all there after a crash, and once they are acknowledged.
        rig.expect(GROUP, key(0), PageRange::new(0, 40), |_| 0);
        rig.flush();
        let mut rig = rig.crash(true);
        let found = rig.recovered.groups.iter().find(|found| found.group == GROUP).unwrap();
        assert_eq!(found.pending.iter().map(|entry| entry.version.seq.0).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(found.pending[1].data.as_ref().map(|data| data.checksums.len()), Some(4));
        assert!(found.pending[2].data.is_none());
        write_mib(&mut rig, 2 * (JOURNAL_BYTES >> 20));
        rig.store.apply(GROUP, Seq(3));
        expect_three_entries(&mut rig);
        let mut rig = rig.crash(false);
        rig.store.apply(GROUP, Seq(3));
        rig.store.apply(BUSY, Seq(u64::MAX));
        expect_three_entries(&mut rig);
        rig.idle();
        expect_three_entries(&mut rig);
        assert_eq!(rig.store.status().journal_used_bytes, 0);
    }
}

#[test]
fn what_a_reset_drops_is_not_carried_back() {
    for seed in 30..50 {
        let mut rig = Rig::new(seed, false);
        three_entries(&mut rig);
        begin_carry(&mut rig);
        // Somewhere on the way of the carry, or behind its end.
        for _ in 0..seed % 10 {
            rig.complete_one();
            rig.end_turn();
        }
        rig.store.append(Record::Reset { group: GROUP, last: version(2, 1) }).unwrap();
        let second = rig.write(GROUP, key(0), PageRange::new(0, 1), 900);
        assert_eq!(second, version(2, 2));
        rig.settle();
        let mut rig = rig.crash(seed % 2 == 0);
        write_mib(&mut rig, 1);
        rig.store.apply(GROUP, Seq(9));
        let last = rig.store.tail(GROUP).last;
        if last == second {
            rig.expect(GROUP, key(0), PageRange::new(0, 40), |page| if page == 0 { 900 } else { 0 });
        } else {
            assert!(seed % 2 == 0, "what was durable is lost by no kill: {last}");
        }
    }
}

#[test]
fn what_is_taken_back_is_not_carried() {
    let mut rig = Rig::new(22, false);
    three_entries(&mut rig);
    // Batches are under way, so that the next entry waits for its own.
    while carries(&rig) == 0 {
        rig.write_through(BUSY, key(0), WHOLE, 7000);
        for _ in 0..super::super::journal::BATCHES_MAX {
            rig.write(BUSY, key(1), WHOLE, 8000);
            rig.end_turn();
        }
        rig.write(GROUP, key(0), PageRange::new(20, 1), 300);
        rig.end_turn();
        let left = rig.store.withdraw(GROUP);
        assert_eq!(left.last.seq, Seq(3));
        rig.settle();
        rig.store.apply(BUSY, Seq(u64::MAX));
        rig.settle();
    }
    let fourth = rig.write(GROUP, key(0), PageRange::new(21, 1), 400);
    assert_eq!(fourth.seq, Seq(4));
    write_mib(&mut rig, 2 * (JOURNAL_BYTES >> 20));
    rig.flush();
    let mut rig = rig.crash(true);
    rig.store.apply(GROUP, Seq(4));
    rig.expect(
        GROUP,
        key(0),
        PageRange::new(19, 3),
        |page| if page == 21 { 400 } else { 100 + u64::from(page) },
    );
}

#[test]
fn what_waits_and_is_more_than_a_quarter_of_the_journal_holds_it_up() {
    let mut rig = Rig::new(23, false);
    for number in 0..6 {
        rig.write(GROUP, key(number), WHOLE, 1 + u64::from(number) * 1000);
        rig.settle();
    }
    while rig.store.admit(256).is_ok() {
        rig.write_through(BUSY, key(0), WHOLE, 9);
        rig.settle();
    }
    assert_eq!((rig.store.admit(256), carries(&rig)), (Err(StoreError::JournalFull), 0));
    rig.store.apply(GROUP, Seq(6));
    rig.settle();
    write_mib(&mut rig, JOURNAL_BYTES >> 20);
}
