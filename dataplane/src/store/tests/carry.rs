//! Entries that wait for their acknowledgement while the journal goes on.

use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::units::{PAGE_SIZE, PageRange};

use super::rig::{JOURNAL_BYTES, Rig, key, open, version};
use crate::store::reserve::Reserved;
use crate::store::{Entry, Record, StoreError, StoreView};

const GROUP: GroupId = GroupId(3);
/// Writes as much as it can.
const BUSY: GroupId = GroupId(4);
const OTHER: GroupId = GroupId(5);
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
    for number in 0..20 {
        rig.write(BUSY, key(number % 3), WHOLE, 5000 + u64::from(number) * 1000);
        rig.end_turn();
        if carries(rig) > 0 {
            return;
        }
        rig.settle();
        rig.store.apply(BUSY, Seq(u64::MAX));
    }
    panic!("nothing is carried");
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
        assert_eq!(rig.store.reserved, Reserved::default());
    }
}

#[test]
fn as_much_as_an_eighth_of_the_journal_may_wait() {
    // In the first run of one group, in the second of three that come one behind the other.
    for (groups, apart_mib) in [(1, 0), (3, 3)] {
        let mut rig = Rig::new(24, false);
        for number in 0..11u64 {
            let group = GroupId(10 + (number / 4) as u32 % groups);
            rig.write(group, key(number as u32), PageRange::new(0, 44), 1 + number * 100);
            rig.settle();
            if number % 4 == 3 {
                write_mib(&mut rig, apart_mib);
            }
        }
        let before = rig.store.status().counters;
        let mut trims = 0;
        let laps = 6;
        for number in 0..laps * (JOURNAL_BYTES >> 20) {
            write_mib(&mut rig, 1);
            // Many at once, and they may use what writes must not.
            for index in 0..50 {
                let last = rig.store.tail(BUSY).last.seq;
                let block = key(100 + (number % 7) as u32 * 50 + index);
                let entry = Entry {
                    group: BUSY,
                    version: version(1, last.0 + 1),
                    acked: last,
                    key: block,
                    pages: PageRange::new(0, 1),
                    data: None,
                    previous_first: version(0, 0),
                    previous_last: version(0, 0),
                };
                trims += u64::from(rig.store.append(Record::Entry(entry)).is_ok());
            }
            rig.end_turn();
            rig.store.apply(BUSY, Seq(u64::MAX));
        }
        rig.settle();
        assert!(trims > 0);
        let after = rig.store.status().counters;
        let (all, wanted) = (
            after.written_journal_bytes - before.written_journal_bytes,
            after.entry_bytes - before.entry_bytes,
        );
        assert!(all < 2 * wanted, "{all} bytes for {wanted}");
        let mut rig = rig.crash(true);
        for number in 0..11u64 {
            let group = GroupId(10 + (number / 4) as u32 % groups);
            rig.store.apply(group, Seq(u64::MAX));
            rig.expect(group, key(number as u32), PageRange::new(0, 44), |page| {
                1 + number * 100 + u64::from(page)
            });
        }
    }
}

/// The copies have taken the places of their entries, and what says so does not get to the device: whatever is destaged meanwhile,
/// nothing may pass for newer than the entries that count after all.
#[test]
fn an_unfinished_carry_hides_no_entry() {
    for case in 0..8 {
        let [cached, power, reset] = [1, 2, 4].map(|bit| case & bit != 0);
        let mut rig = Rig::new(25, cached);
        three_entries(&mut rig);
        rig.flush();
        begin_carry(&mut rig);
        while !rig.store.groups[&GROUP].is_marking() {
            rig.end_turn();
            assert!(rig.complete_one(), "the carry gets on");
        }
        rig.hold_next_write = true;
        rig.end_turn();
        assert!(!rig.hold_next_write);
        rig.store.apply(GROUP, Seq(1));
        if reset {
            // It is behind the carry's end, and gets as far.
            rig.store.append(Record::Reset { group: GROUP, last: version(2, 1) }).unwrap();
        }
        rig.store.destage.drain = true;
        rig.settle();
        assert!(rig.store.groups[&GROUP].is_marking());
        let mut rig = rig.crash(power);
        assert_eq!(rig.store.tail(GROUP).last.seq, Seq(3));
        rig.store.apply(GROUP, Seq(3));
        expect_three_entries(&mut rig);
        rig.idle();
        expect_three_entries(&mut rig.crash(true));
    }
}

/// Seqs may go back with a reset: what was acknowledged before it says nothing of the entries after it.
#[test]
fn a_carry_acknowledges_nothing_across_a_reset() {
    let mut checked = 0;
    for operations in 0..60 {
        let mut rig = Rig::new(26, false);
        rig.store.append(Record::Reset { group: GROUP, last: version(1, 120) }).unwrap();
        three_entries(&mut rig);
        begin_carry(&mut rig);
        while rig.store.groups[&GROUP].carry.is_some() {
            rig.end_turn();
            assert!(rig.complete_one(), "the carry gets on");
        }
        rig.store.append(Record::Reset { group: GROUP, last: version(2, 112) }).unwrap();
        three_entries(&mut rig);
        for _ in 0..operations {
            rig.now_ns += 1_000_000_000;
            rig.store.tick(rig.now_ns);
            rig.end_turn();
            checked += u32::from(rig.complete_one());
        }
        let mut rig = rig.crash(false);
        let found = rig.recovered.groups.iter().find(|found| found.group == GROUP).unwrap();
        assert_eq!((found.tail.last, found.tail.acked), (version(2, 115), Seq(112)));
        assert_eq!(found.pending.len(), 3);
        rig.expect(GROUP, key(0), PageRange::new(0, 40), |_| 0);
    }
    assert!(checked > 100);
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

/// An opening reads the journal more than once. A read that fails once hides nothing; one that fails twice, and not in the next
/// pass, nothing that was flushed, but the store says that it is damaged.
#[test]
fn reads_that_fail_for_a_moment_hide_no_entry() {
    for (mib, fails) in [(1, 1), (1, 2), (JOURNAL_BYTES >> 20, 1), (JOURNAL_BYTES >> 20, 2)] {
        let mut rig = Rig::new(29, false);
        three_entries(&mut rig);
        write_mib(&mut rig, mib);
        assert_eq!(carries(&rig) > 0, mib > 1);
        if fails == 2 {
            rig.flush();
            write_mib(&mut rig, 1);
        }
        let (mut refused, mut damaged, mut whole) = (0, 0, 0);
        for after in 0.. {
            let device = rig.capacity.fork();
            device.fail_reads(after, fails);
            let Ok((_, recovered)) = open(&device, None) else {
                refused += 1;
                continue;
            };
            if device.has_failing_reads() {
                break;
            }
            let found = recovered.groups.iter().find(|found| found.group == GROUP);
            let seqs = found.map(|found| found.pending.iter().map(|entry| entry.version.seq.0).collect());
            if seqs == Some(vec![1, 2, 3]) {
                whole += 1;
            } else {
                assert!(recovered.damaged, "read {after} and the next fail");
                damaged += 1;
            }
        }
        let twice = fails == 2;
        assert!(whole > 0 && (refused > 0) == twice && (damaged > 0) == twice, "{refused} {damaged} {whole}");
    }
}

#[test]
fn what_is_taken_back_is_not_carried() {
    let mut rig = Rig::new(22, false);
    three_entries(&mut rig);
    // Batches are under way, so that the next entry waits for its own.
    for _ in 0..20 {
        rig.write_through(BUSY, key(0), WHOLE, 7000);
        for _ in 0..super::super::journal::BATCHES_MAX {
            rig.write(BUSY, key(1), PageRange::new(0, 1), 8000);
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
    assert!(carries(&rig) > 0);
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
fn what_is_on_its_way_stops_no_carry() {
    let mut rig = Rig::new(27, false);
    three_entries(&mut rig);
    let mut behind = 0;
    for number in 0..5 * (JOURNAL_BYTES / PAGE_SIZE as u64 / 130) {
        // Five are always pending, more than an eighth of the journal.
        assert_eq!(rig.store.admit(130), Ok(()), "after {number} writes");
        rig.write(BUSY, key(number as u32 % 3), PageRange::new(0, 130), 1 + number * 1000);
        rig.settle();
        behind += u64::from(number >= 4);
        rig.store.apply(BUSY, Seq(behind));
        rig.settle();
    }
    assert!(carries(&rig) >= 4);
    rig.store.apply(GROUP, Seq(3));
    expect_three_entries(&mut rig);
}

/// The journal is as full as it gets, wherever in the ring: there is room to carry what waits.
#[test]
fn a_full_journal_has_room_for_a_carry() {
    for start in (0..JOURNAL_BYTES / PAGE_SIZE as u64).step_by(32) {
        let mut rig = Rig::new(28, false);
        for number in 0..start / 32 {
            rig.write_through(BUSY, key(0), PageRange::new(0, 31), 1 + number * 1000);
        }
        rig.idle();
        for number in 0..2 {
            rig.write(GROUP, key(number), PageRange::new(0, 250), 1 + u64::from(number) * 1000);
            rig.settle();
        }
        // With what another group waits for it is more than an eighth, and not carried. Zeroes where nothing is: when they are
        // acknowledged, nothing is destaged.
        for number in 0..100 {
            rig.write(OTHER, key(number), PageRange::of_unit(0), 0);
        }
        while rig.try_write(BUSY, key(1), PageRange::new(0, 128), 9).is_ok() {
            for number in 0..2 {
                let _ = rig.try_write(BUSY, key(number), PageRange::new(128, 128), 9);
            }
            rig.settle();
        }
        while rig.try_write(BUSY, key(0), PageRange::of_unit(0), 0).is_ok() {
            rig.settle();
        }
        rig.store.apply(BUSY, Seq(u64::MAX));
        rig.idle();
        assert_eq!((rig.store.admit(256), carries(&rig)), (Err(StoreError::JournalFull), 0));
        rig.store.apply(OTHER, Seq(u64::MAX));
        rig.now_ns += 1_000_000_000;
        rig.store.tick(rig.now_ns);
        rig.end_turn();
        assert_eq!(carries(&rig), 1);
        // Resets come between the copies and what ends the carry, as many as are let in.
        let resets = (100..).map(|number| Record::Reset { group: GroupId(number), last: version(1, 1) });
        assert!(resets.take_while(|reset| rig.store.append(reset.clone()).is_ok()).count() > 0);
        rig.idle();
        write_mib(&mut rig, JOURNAL_BYTES >> 20);
    }
}

#[test]
fn what_waits_and_is_more_than_an_eighth_of_the_journal_holds_it_up() {
    let mut rig = Rig::new(23, false);
    for number in 0..3 {
        rig.write(GROUP, key(number), WHOLE, 1 + u64::from(number) * 1000);
        rig.settle();
    }
    while rig.store.admit(256).is_ok() {
        rig.write_through(BUSY, key(0), WHOLE, 9);
        rig.settle();
    }
    assert_eq!((rig.store.admit(256), carries(&rig)), (Err(StoreError::JournalFull), 0));
    rig.store.apply(GROUP, Seq(3));
    rig.settle();
    write_mib(&mut rig, JOURNAL_BYTES >> 20);
}
