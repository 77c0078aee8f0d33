//! Bits that rot and sectors that can not be read: found, told apart from torn writes, mended.

use xsan_protocol::disk::COUNTER_END;
use xsan_protocol::disk::block_record::{BlockRecord, RECORD_SIZE};
use xsan_protocol::disk::checkpoint::{self, Checkpoint};
use xsan_protocol::disk::superblock::{self, Superblock};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::units::{PAGE_SIZE, PageRange};

use super::rig::{JOURNAL_BYTES, Rig, data, key, open, page_bytes, pool, version};
use crate::io::Device;
use crate::store::{OpenError, Options, PageData, ReadError, Record, Store, StoreEvent, StoreView};
use crate::testing::{Random, SimDevice};

const GROUP: GroupId = GroupId(3);
const PAGES: PageRange = PageRange::new(2, 8);

fn superblock(rig: &Rig) -> Superblock {
    let mut page = vec![0; PAGE_SIZE];
    rig.capacity.read_at(0, &mut page).unwrap();
    Superblock::decode(&page).unwrap()
}

/// Device offset of the journal's first batch.
fn journal_start(rig: &Rig) -> u64 {
    superblock(rig).journal.offset
}

fn damaged_pages(result: Result<crate::store::ReadPages, ReadError>) -> Vec<u16> {
    match result {
        Err(ReadError::Damaged { damaged, expected, .. }) => {
            assert_eq!(expected[..], data(100, PAGES.count).checksums[..]);
            damaged
        }
        other => panic!("not damaged: {other:?}"),
    }
}

fn repaired(rig: &mut Rig, content: u64) {
    let token = rig.token();
    rig.store.repair(token, GROUP, key(1), PAGES, data(content, PAGES.count));
    rig.settle();
    let done = rig
        .events
        .iter()
        .any(|event| matches!(event, StoreEvent::Repaired { token: own, .. } if *own == token));
    assert!(done);
}

#[test]
fn a_rotten_page_is_never_returned_and_can_be_mended_in_its_place() {
    let mut rig = Rig::new(1, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    rig.idle();
    let offset = rig.store.locate(GROUP, key(1))[0].device_offset.unwrap();
    rig.capacity.flip_bit(offset + 4 * PAGE_SIZE as u64, 77);
    let result = rig.read(GROUP, key(1), PAGES);
    let Err(ReadError::Damaged { buffer, .. }) = &result else { panic!("not seen") };
    // The others are in the buffer.
    assert!(buffer[..PAGE_SIZE] == page_bytes(100));
    assert_eq!(damaged_pages(result), [2]);
    assert_eq!(rig.store.status().counters.checksum_errors, 1);
    // Other content is not taken; the right one is.
    repaired(&mut rig, 500);
    assert_eq!(rig.store.status().counters.repaired_pages, 0);
    assert_eq!(damaged_pages(rig.read(GROUP, key(1), PAGES)), [2]);
    repaired(&mut rig, 100);
    rig.expect(GROUP, key(1), PAGES, |page| 98 + u64::from(page));
}

#[test]
fn an_unreadable_sector_is_one_damaged_page() {
    let mut rig = Rig::new(2, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    rig.idle();
    let offset = rig.store.locate(GROUP, key(1))[0].device_offset.unwrap();
    rig.capacity.make_unreadable(offset + 5 * PAGE_SIZE as u64);
    assert_eq!(damaged_pages(rig.read(GROUP, key(1), PAGES)), [3]);
    repaired(&mut rig, 100);
    rig.expect(GROUP, key(1), PAGES, |page| 98 + u64::from(page));
}

/// Any one write of a destage does nothing, though the device says that it has ended well.
#[test]
fn a_write_that_the_device_lost_is_noticed() {
    let (mut told, mut unread, mut whole) = (0, 0, 0);
    for lost in 0.. {
        let mut rig = Rig::new(4, false);
        // The one block is made anew, the other is there already.
        rig.write_through(GROUP, key(1), PAGES, 100);
        rig.idle();
        rig.write_through(GROUP, key(1), PAGES, 500);
        rig.write_through(GROUP, key(2), PAGES, 900);
        rig.now_ns += 20_000_000_000;
        rig.store.tick(rig.now_ns);
        rig.end_turn();
        for _ in 0..lost {
            rig.complete_one();
            rig.end_turn();
        }
        rig.capacity.lose_writes(u64::MAX);
        let any = rig.complete_one();
        rig.capacity.end_failures();
        if !any {
            break;
        }
        rig.settle();
        let mut rig = rig.crash(false);
        if rig.recovered.damaged {
            told += 1;
            continue;
        }
        for (block, content) in [(1, 500), (2, 900)] {
            match rig.read(GROUP, key(block), PAGES) {
                Ok(read) => {
                    assert!(read.buffer[..PAGE_SIZE] == page_bytes(content), "lost write {lost}");
                    whole += 1;
                }
                Err(ReadError::Damaged { .. }) => unread += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
    // Two are of records, two of pages.
    assert_eq!((told, unread, whole > 0), (2, 2, true));
}

#[test]
fn what_is_there_twice_may_be_unreadable_once() {
    let mut rig = Rig::new(15, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    rig.idle();
    let rig = rig.crash(false);
    let checkpoints = superblock(&rig).checkpoints.offset;
    let slots = [checkpoints, checkpoints + checkpoint::SLOT_SIZE as u64];
    for copies in [superblock::OFFSETS, slots] {
        for (index, offset) in copies.into_iter().enumerate() {
            let device = rig.capacity.fork();
            device.make_unreadable(offset);
            let opened = Store::open(&device, None, pool(), Options::default());
            assert!(opened.is_ok(), "copy {index} at {offset}: {:?}", opened.err());
            let device = rig.capacity.fork();
            copies.into_iter().for_each(|offset| device.make_unreadable(offset));
            let opened = Store::open(&device, None, pool(), Options::default());
            assert_eq!(opened.err().map(|error| error.code()), Some(Code::DeviceUnusable), "both copies");
        }
    }
}

/// A sector behind a checkpoint's end could not be read: its slot was of no use any more, though every second checkpoint
/// was written there. Found by the simulator, seed 70999.
#[test]
fn what_a_checkpoint_does_not_use_of_its_slot_may_be_unreadable() {
    let mut rig = Rig::new(29, false);
    let checkpoints = superblock(&rig).checkpoints.offset;
    for slot in 0..2 {
        rig.capacity
            .make_unreadable(checkpoints + (slot + 1) * checkpoint::SLOT_SIZE as u64 - PAGE_SIZE as u64);
    }
    for content in [100, 200, 300] {
        rig = rig.crash(false);
        assert!(!rig.recovered.damaged);
        rig.write_through(GROUP, key(1), PAGES, content);
        rig.flush();
    }
}

/// The batches of a session whose first checkpoint could not be read were taken for remainders: what had been flushed
/// was gone, and nobody was told. Found by reading.
#[test]
fn a_session_whose_checkpoints_are_lost_is_missed() {
    let mut rig = Rig::new(16, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    let checkpoints = superblock(&rig).checkpoints.offset;
    let slots = [checkpoints, checkpoints + checkpoint::SLOT_SIZE as u64];
    // A session alone with its first checkpoint, in one slot and in the other.
    for content in [200, 300] {
        rig = rig.crash(false);
        assert!(!rig.recovered.damaged);
        rig.write_through(GROUP, key(1), PAGES, content);
        let damaged = slots.map(|slot| {
            let device = rig.capacity.fork();
            device.flip_bit(slot, 9);
            let (_, recovered) = Store::open(&device, None, pool(), Options::default()).unwrap();
            recovered.damaged
        });
        assert!(damaged[0] != damaged[1], "{damaged:?}: the older slot is not needed");
    }
}

#[test]
fn destage_keeps_what_it_can_not_read_until_it_is_mended() {
    let mut rig = Rig::new(3, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    rig.write_through(GROUP, key(2), PAGES, 900);
    let data_start = journal_start(&rig) + PAGE_SIZE as u64;
    rig.capacity.flip_bit(data_start + PAGE_SIZE as u64, 5);
    rig.now_ns += 20_000_000_000;
    rig.store.tick(rig.now_ns);
    rig.settle();
    let told = rig.events.iter().any(
        |event| matches!(event, StoreEvent::Damaged { group: GROUP, key: of, pages } if *of == key(1) && *pages == PageRange::new(3, 1)),
    );
    assert!(told);
    // The other block went to its place, this one stays in the journal and is whole again after the repair.
    assert_eq!(rig.store.locate(GROUP, key(2))[0].journalled_pages, 0);
    rig.idle();
    assert_eq!(rig.store.locate(GROUP, key(1))[0].journalled_pages, 8);
    assert_eq!(damaged_pages(rig.read(GROUP, key(1), PAGES)), [1]);
    repaired(&mut rig, 100);
    rig.idle();
    assert_eq!(rig.store.locate(GROUP, key(1))[0].journalled_pages, 0);
    rig.expect(GROUP, key(1), PAGES, |page| 98 + u64::from(page));
    rig.expect(GROUP, key(2), PAGES, |page| 898 + u64::from(page));
}

/// One rotten page in the journal kept all that came behind it there: once the journal was full, no group of the store could write.
/// Found by the soak, the first time that it changed bytes under load.
#[test]
fn a_damaged_page_that_nobody_mends_stops_no_others() {
    for unreadable in [false, true] {
        let mut rig = Rig::new(3, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        let offset = journal_start(&rig) + 2 * PAGE_SIZE as u64;
        if unreadable {
            rig.capacity.make_unreadable(offset);
        } else {
            rig.capacity.flip_bit(offset, 5);
        }
        let (mut written, mut stayed, mut refused) = (0, 0, 0);
        while written < 3 * JOURNAL_BYTES {
            let block = key(2 + (written / (1 << 20)) as u32 % 4);
            let first = (written / PAGES.bytes() as u64 % 100) as u16 * PAGES.count;
            match rig.try_write(GROUP, block, PageRange::new(first, PAGES.count), 900) {
                Ok(version) => {
                    rig.settle();
                    rig.store.apply(GROUP, version.seq);
                    written += PAGES.bytes() as u64;
                }
                Err(_) => refused += 1,
            }
            rig.now_ns += 10_000_000;
            rig.store.tick(rig.now_ns);
            rig.settle();
            if rig.store.locate(GROUP, key(1))[0].journalled_pages > 0 {
                stayed = written;
            }
        }
        assert!(stayed > JOURNAL_BYTES / 2, "it is not given up while there is room: {stayed} bytes");
        assert!(refused <= 100, "writes waited for {refused} times 10 ms");
        assert_eq!(damaged_pages(rig.read(GROUP, key(1), PAGES)), [1]);
        rig = rig.crash(true);
        assert!(!rig.recovered.damaged, "the journal is whole without it");
        assert_eq!(damaged_pages(rig.read(GROUP, key(1), PAGES)), [1]);
        repaired(&mut rig, 100);
        rig.expect(GROUP, key(1), PAGES, |page| 98 + u64::from(page));
    }
}

/// Ranges that destage says are damaged, since the last time.
fn told(rig: &mut Rig) -> Vec<PageRange> {
    let damaged = |event: StoreEvent| match event {
        StoreEvent::Damaged { group: GROUP, key: of, pages } if of == key(1) => Some(pages),
        _ => None,
    };
    rig.events.drain(..).filter_map(damaged).collect()
}

fn seconds(rig: &mut Rig, count: u64) {
    for _ in 0..count {
        rig.now_ns += 1_000_000_000;
        rig.store.tick(rig.now_ns);
        rig.settle();
    }
}

/// Units far apart in the block adjoin in the journal and in capacity: what lay between them was told as damaged as well, 3 MiB of it,
/// which no buffer has.
#[test]
fn what_is_damaged_is_told_to_the_page() {
    let mut rig = Rig::new(3, false);
    let (first, second) = (PageRange::of_unit(0), PageRange::of_unit(50));
    for (pages, content) in [(first, 100), (second, 500)] {
        let version = rig.write(GROUP, key(1), pages, content);
        rig.store.apply(GROUP, version.seq);
    }
    rig.settle();
    rig.store.apply(GROUP, Seq(u64::MAX));
    let data_start = journal_start(&rig) + PAGE_SIZE as u64;
    let is_there = |rig: &Rig, page: u64| {
        let mut bytes = vec![0; PAGE_SIZE];
        rig.capacity.read_at(data_start + page * PAGE_SIZE as u64, &mut bytes).unwrap();
        bytes == page_bytes(if page < 16 { 100 + page } else { 500 + page - 16 })
    };
    assert!((0..32).all(|page| is_there(&rig, page)), "both are in one batch");
    for page in [3, 4, 20] {
        rig.capacity.make_unreadable(data_start + page * PAGE_SIZE as u64);
    }
    rig.capacity.flip_bit(data_start + 9 * PAGE_SIZE as u64, 5);
    rig.events.clear();
    rig.idle();
    let damaged = [PageRange::new(3, 2), PageRange::new(9, 1), PageRange::new(second.first + 4, 1)];
    assert_eq!(told(&mut rig), damaged);
    assert_eq!(rig.store.status().counters.checksum_errors, 4);
    for pages in damaged {
        let content = if pages.first < 16 { 100 + u64::from(pages.first) } else { 504 };
        let token = rig.token();
        rig.store.repair(token, GROUP, key(1), pages, data(content, pages.count));
    }
    rig.settle();
    assert_eq!(rig.store.status().counters.repaired_pages, 4);
    seconds(&mut rig, 2);
    assert_eq!((told(&mut rig), rig.store.status().journalled_pages), (vec![], 0));
    rig.expect(GROUP, key(1), first, |page| 100 + u64::from(page));
    rig.expect(GROUP, key(1), second, |page| 500 + u64::from(page - second.first));
}

/// A sector that takes every repair and returns something else held its block in the journal for ever, and was read without a pause.
#[test]
fn a_page_that_stays_damaged_is_moved_as_it_is_after_some_cycles() {
    for repairs in [false, true] {
        let mut rig = Rig::new(3, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        let offset = journal_start(&rig) + 2 * PAGE_SIZE as u64;
        rig.capacity.flip_bit(offset, 5);
        rig.events.clear();
        rig.idle();
        let mut met = told(&mut rig).len();
        for _ in 0..30 {
            if repairs {
                let token = rig.token();
                rig.store.repair(token, GROUP, key(1), PageRange::new(3, 1), data(101, 1));
                while !rig.events.iter().any(|event| matches!(event, StoreEvent::Repaired { .. })) {
                    rig.end_turn();
                    rig.complete_one();
                }
                rig.capacity.flip_bit(offset, 5);
            }
            seconds(&mut rig, 1);
            met += told(&mut rig).len();
        }
        assert_eq!(rig.store.status().journalled_pages, 0);
        assert!((2..=10).contains(&met), "it was met {met} times");
        rig = rig.crash(true);
        assert!(!rig.recovered.damaged);
        // Its last repair, if there was one, was of the place where it is now.
        let result = rig.read(GROUP, key(1), PAGES);
        if repairs {
            rig.expect(GROUP, key(1), PAGES, |page| 98 + u64::from(page));
        } else {
            assert_eq!(damaged_pages(result), [1]);
        }
    }
}

#[test]
fn a_torn_tail_is_cut_off_and_its_remainder_never_comes_back() {
    for seed in 1..60 {
        let mut rig = Rig::new(seed, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        rig.flush();
        // Four batches of the same size in flight, of which any may land or not.
        for number in 0..4 {
            rig.write(GROUP, key(1), PAGES, 200 + number * 100);
            rig.end_turn();
        }
        rig = rig.crash(true);
        assert!(!rig.recovered.damaged);
        let kept = rig.store.tail(GROUP).last.seq;
        // As many batches of that size again: a remainder of the old ones would fit behind any of them.
        for number in 0..2 {
            rig.write(GROUP, key(2), PAGES, 2000 + number * 100);
            rig.settle();
        }
        rig.flush();
        rig = rig.crash(seed % 2 == 0);
        assert!(!rig.recovered.damaged);
        assert_eq!(rig.store.tail(GROUP).last.seq, Seq(kept.0 + 2));
        rig.store.apply(GROUP, Seq(u64::MAX));
        rig.expect(GROUP, key(2), PAGES, |page| 2098 + u64::from(page));
    }
}

#[test]
fn damage_below_the_flushed_mark_is_told_until_the_group_is_relearned() {
    for victim in [0, 1, 3] {
        let mut rig = Rig::new(4, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        rig.flush();
        rig.write_through(GROUP, key(1), PAGES, 300);
        // The head of the first batch, or its data.
        let start = journal_start(&rig);
        rig.capacity.flip_bit(start + victim * PAGE_SIZE as u64, 9000 % 4096);
        rig = rig.crash(true);
        assert!(rig.recovered.damaged);
        // Said again at the next open, though the journal has been started anew.
        rig = rig.crash(false);
        assert!(rig.recovered.damaged);
        let pushed = version(9, 9);
        rig.store.append(Record::Reset { group: GROUP, last: version(3, 20) }).unwrap();
        let token = rig.token();
        let unit = data(7000, 16);
        let push = Record::Push {
            token,
            group: GROUP,
            key: key(1),
            unit: 0,
            version: pushed,
            as_of: Seq(20),
            data: Some(unit),
            lost: 0,
        };
        rig.store.append(push).unwrap();
        rig.settle();
        rig.flush();
        rig = rig.crash(true);
        // A group of which nothing was left is in no table: the store can not know that it was the only one.
        rig.expect(GROUP, key(1), PageRange::of_unit(0), |page| 7000 + u64::from(page));
        assert_eq!(rig.store.unit_version(GROUP, key(1), 0), pushed);
        assert_eq!(rig.store.tail(GROUP).last, version(3, 20));
        assert!(rig.recovered.groups.iter().all(|group| !group.damaged));
        rig.idle();
        rig = rig.crash(true);
        assert!(!rig.recovered.damaged);
    }
}

/// One bad page took acknowledged writes that another replica had, for as long as this one passed for having lost nothing.
#[test]
fn what_was_written_and_never_flushed_is_missed() {
    let batch = u64::from(1 + PAGES.count) * PAGE_SIZE as u64;
    let opened = |spoil: &dyn Fn(&Rig, u64)| {
        let mut rig = Rig::new(29, false);
        for number in 0..3 {
            rig.write_through(GROUP, key(number), PAGES, 100);
        }
        spoil(&rig, journal_start(&rig));
        let first = rig.crash(false);
        let told = first.recovered.lost_end;
        assert!(!first.recovered.damaged, "nothing of it was flushed");
        let second = first.crash(false);
        assert!(!second.recovered.lost_end, "it is told once");
        told
    };
    let page = PAGE_SIZE as u64;
    assert!(!opened(&|_, _| ()));
    assert!(
        opened(&|rig, start| rig.capacity.flip_bit(start + 2 * page, 5)),
        "later ones say that it was there"
    );
    assert!(opened(&|rig, start| rig.capacity.flip_bit(start + batch + 7, 5)));
    assert!(!opened(&|rig, start| rig.capacity.flip_bit(start + 2 * batch + page, 5)), "it passes for torn");
}

#[test]
fn an_end_that_can_not_be_read_is_missed() {
    for page in [0, 3] {
        let mut rig = Rig::new(30, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        rig.capacity.make_unreadable(journal_start(&rig) + page * PAGE_SIZE as u64);
        let rig = rig.crash(false);
        assert!(rig.recovered.lost_end && !rig.recovered.damaged);
    }
}

/// Pushes unit 0 of block 1 without its pages 3 and 15, which nobody has.
fn push_with_losses(rig: &mut Rig, whole: &PageData) {
    let mut bytes = pool().alloc(whole.bytes.len()).unwrap();
    bytes.copy_from_slice(&whole.bytes);
    for page in [3, 15] {
        bytes[page * PAGE_SIZE..(page + 1) * PAGE_SIZE].fill(0);
    }
    rig.store.append(Record::Reset { group: GROUP, last: version(1, 7) }).unwrap();
    let token = rig.token();
    let push = Record::Push {
        token,
        group: GROUP,
        key: key(1),
        unit: 0,
        version: version(1, 5),
        as_of: Seq(7),
        data: Some(PageData { bytes: bytes.freeze(), checksums: whole.checksums.clone() }),
        lost: 1 << 3 | 1 << 15,
    };
    rig.store.append(push).unwrap();
    rig.settle();
}

/// They go to their place as they are when the store is opened: that waits for nobody.
#[test]
fn a_damaged_store_with_lost_pages_in_its_journal_opens() {
    let mut rig = Rig::new(28, false);
    let unit = PageRange::of_unit(0);
    push_with_losses(&mut rig, &data(100, 16));
    rig.write_through(GROUP, key(2), PAGES, 300);
    rig.flush();
    rig.write_through(GROUP, key(2), PAGES, 400);
    // The head of the last batch but one: flushed, as the last one says. Reset, push and write are a batch each.
    let heads = [1, 1 + 16, 1 + PAGES.count].map(|pages| u64::from(pages) * PAGE_SIZE as u64);
    rig.capacity.flip_bit(journal_start(&rig) + heads[0] + heads[1], 99);
    for _ in 0..2 {
        rig = rig.crash(false);
        assert!(rig.recovered.damaged);
        assert_eq!(rig.store.locate(GROUP, key(1))[0].journalled_pages, 0);
        match rig.read(GROUP, key(1), unit) {
            Err(ReadError::Damaged { damaged, .. }) => assert_eq!(damaged, [3, 15]),
            other => panic!("not lost: {other:?}"),
        }
    }
}

/// A unit comes from a replica that could not read two of its pages, when nobody else has them. They are lost here too,
/// and only they: in the journal, over a restart, and in their place; and mended by who has them after all.
#[test]
fn lost_pages_of_a_pushed_unit_read_as_damaged() {
    let unit = PageRange::of_unit(0);
    let whole = data(100, 16);
    let mut rig = Rig::new(27, false);
    let check = |rig: &mut Rig, journalled: u8| {
        let at = rig.store.locate(GROUP, key(1))[0].journalled_pages;
        assert_eq!(at, journalled);
        match rig.read(GROUP, key(1), unit) {
            Err(ReadError::Damaged { damaged, expected, buffer }) => {
                assert_eq!(damaged, [3, 15]);
                assert_eq!(expected[..], whole.checksums[..]);
                assert!(buffer[4 * PAGE_SIZE..15 * PAGE_SIZE] == whole.bytes[4 * PAGE_SIZE..15 * PAGE_SIZE]);
            }
            other => panic!("not lost: {other:?}"),
        }
    };
    push_with_losses(&mut rig, &whole);
    check(&mut rig, 16);
    rig.flush();
    rig = rig.crash(true);
    assert!(!rig.recovered.damaged, "the batch is whole but for what was lost before");
    check(&mut rig, 16);
    // As damaged pages they stay in the journal for some cycles.
    (0..10).for_each(|_| rig.idle());
    check(&mut rig, 0);
    rig = rig.crash(false);
    check(&mut rig, 0);
    let token = rig.token();
    rig.store.repair(token, GROUP, key(1), unit, whole.clone());
    rig.settle();
    rig.expect(GROUP, key(1), unit, |page| 100 + u64::from(page));
}

#[test]
fn a_rotten_block_record_is_noticed_if_it_is_the_newest_of_its_slot() {
    for (generation, is_newest) in [(1, false), (2, true)] {
        let mut rig = Rig::new(5, false);
        rig.write_through(GROUP, key(1), PAGES, 100);
        rig.idle();
        rig.write_through(GROUP, key(1), PAGES, 200);
        rig.idle();
        let half = superblock(&rig).records.offset + generation % 2 * RECORD_SIZE as u64;
        rig.capacity.flip_bit(half, 3000);
        rig = rig.crash(false);
        assert_eq!(rig.recovered.damaged, is_newest);
        if is_newest {
            // What is left is used no further than its checksums hold.
            assert!(rig.read(GROUP, key(1), PAGES).is_err());
        } else {
            rig.expect(GROUP, key(1), PAGES, |page| 198 + u64::from(page));
        }
    }
}

/// Its generation is the largest that a record can have: the sum of all is larger, and the next record there would be none.
#[test]
fn a_store_with_a_record_that_nobody_wrote_opens_again() {
    let mut rig = Rig::new(7, false);
    rig.write_through(GROUP, key(1), PAGES, 100);
    rig.write_through(GROUP, key(2), PAGES, 200);
    rig.idle();
    let offset = superblock(&rig).records.offset + RECORD_SIZE as u64;
    let mut half = vec![0; RECORD_SIZE];
    rig.capacity.read_at(offset, &mut half).unwrap();
    let record = BlockRecord { generation: (1 << 63) - 1, ..BlockRecord::decode(&half).unwrap() };
    record.encode(&mut half);
    rig.capacity.write_at(offset, &half).unwrap();
    rig = rig.crash(false);
    assert!(rig.recovered.damaged, "block 1 is not there");
    rig.expect(GROUP, key(2), PAGES, |page| 198 + u64::from(page));
    rig.write_through(GROUP, key(1), PAGES, 300);
    rig.idle();
    rig = rig.crash(false);
    rig.expect(GROUP, key(1), PAGES, |page| 298 + u64::from(page));
    rig.expect(GROUP, key(2), PAGES, |page| 198 + u64::from(page));
}

/// It was opened, and its next checkpoints were none that an opening reads. Found by the fuzzer.
#[test]
fn a_store_whose_counters_near_their_end_is_refused_and_stays_as_it_is() {
    let rig = Rig::new(8, false);
    let first = superblock(&rig).checkpoints.offset;
    let slots = [first, first + checkpoint::SLOT_SIZE as u64];
    let read = |device: &SimDevice| {
        slots.map(|offset| {
            let mut slot = vec![0; checkpoint::SLOT_SIZE];
            device.read_at(offset, &mut slot).unwrap();
            slot
        })
    };
    let found = read(&rig.capacity).into_iter().filter_map(|slot| Checkpoint::decode(&slot).ok());
    let newest = found.max_by_key(|found| found.number).expect("the store was opened");
    let last = COUNTER_END - 1;
    for changed in [Checkpoint { number: last, ..newest.clone() }, Checkpoint { session: last, ..newest }] {
        let device = rig.capacity.fork();
        let mut record = vec![0; Checkpoint::size(changed.groups.len())];
        changed.encode(&mut record);
        device.write_at(slots[changed.number as usize % 2], &record).unwrap();
        let before = read(&device);
        let Err(error) = open(&device, None) else { panic!("opened") };
        assert!(matches!(error, OpenError::Counter { found } if found == last), "{error}");
        assert_eq!(error.code(), Code::StoreCorrupt);
        assert!(read(&device) == before);
    }
}

#[test]
fn any_flipped_bit_of_the_store_is_seen_or_harmless() {
    let mut random = Random::new(77);
    let mut rig = Rig::new(6, false);
    for index in 0..6 {
        rig.write_through(GROUP, key(index), PAGES, 100 * u64::from(index + 1));
    }
    rig.idle();
    for index in 0..3 {
        rig.write_through(GROUP, key(index), PageRange::new(4, 1), 5000 + u64::from(index));
    }
    rig.flush();
    rig.write_through(GROUP, key(5), PageRange::new(200, 1), 9000);
    let (journal, superblock) = (journal_start(&rig), superblock(&rig));
    assert_eq!(superblock.journal.bytes, JOURNAL_BYTES);
    let regions = [
        (0, 18),
        (superblock.checkpoints.offset, 4),
        (journal, 80),
        (superblock.records.offset, 6 * 4),
        (superblock.units.offset, 6 * 16),
    ];
    for _ in 0..400 {
        let (offset, pages) = regions[random.below(regions.len() as u64) as usize];
        let fork = rig.capacity.fork();
        fork.flip_bit(offset + random.below(pages) * PAGE_SIZE as u64, random.below(PAGE_SIZE as u64 * 8));
        let mut other = Rig::on(fork, None, 1);
        if other.recovered.damaged {
            continue;
        }
        other.store.apply(GROUP, Seq(u64::MAX));
        for index in 0..6 {
            let Ok(read) = other.read(GROUP, key(index), PAGES) else { continue };
            for (page, bytes) in PAGES.pages().zip(read.buffer.chunks_exact(PAGE_SIZE)) {
                let newer = index < 3 && page == 4;
                let content = if newer {
                    5000 + u64::from(index)
                } else {
                    98 + u64::from(page) + 100 * u64::from(index)
                };
                assert!(bytes == page_bytes(content), "{index}/{page} is silently wrong");
            }
        }
    }
}
