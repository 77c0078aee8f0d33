//! One thing at a time.

use xsan_protocol::ids::{GroupId, Seq, Version};
use xsan_protocol::units::{PAGES_PER_BLOCK, PageRange};

use super::rig::{Rig, data, key, pool, version};
use crate::io::Device;
use crate::store::{Content, Entry, Foreign, Record, Store, StoreError, StoreEvent, StoreView};
use crate::testing::SimDevice;

const GROUP: GroupId = GroupId(3);

fn durable(rig: &Rig) -> Option<Seq> {
    let seqs = rig.events.iter().filter_map(|event| match event {
        StoreEvent::Durable { group: GROUP, seq } => Some(*seq),
        _ => None,
    });
    seqs.max()
}

#[test]
fn a_write_is_durable_then_applied_then_destaged() {
    let mut rig = Rig::new(1, false);
    let pages = PageRange::new(3, 20);
    let written = rig.write(GROUP, key(1), pages, 100);
    rig.settle();
    assert_eq!(durable(&rig), Some(Seq(1)));
    // Not acknowledged: not readable.
    rig.expect(GROUP, key(1), pages, |_| 0);
    rig.store.apply(GROUP, Seq(1));
    rig.expect(GROUP, key(1), pages, |page| 97 + u64::from(page));
    assert_eq!(rig.store.locate(GROUP, key(1))[0].device_offset, None);
    assert_eq!(rig.store.unit_version(GROUP, key(1), 0), written);
    rig.idle();
    let units = rig.store.locate(GROUP, key(1));
    assert_eq!(units.len(), 2);
    assert!(units.iter().all(|unit| unit.journalled_pages == 0 && unit.device_offset.is_some()));
    rig.expect(GROUP, key(1), PageRange::new(0, 32), |page| {
        if pages.contains(page) { 97 + u64::from(page) } else { 0 }
    });
    assert_eq!(rig.store.status().journal_used_bytes, 0);
    assert_eq!(rig.store.status().used_bytes, 2 * 65536);
}

#[test]
fn many_records_of_a_turn_make_one_device_write() {
    let mut rig = Rig::new(1, false);
    for index in 0..20 {
        rig.write(GROUP, key(index), PageRange::new(0, 1), 1 + u64::from(index));
    }
    let mut actions = Vec::new();
    rig.store.end_turn(&mut actions);
    assert_eq!(actions.len(), 1);
    assert_eq!(rig.store.status().counters.written_journal_bytes, 21 * 4096);
}

#[test]
fn what_no_batch_has_is_taken_back() {
    let mut rig = Rig::new(4, false);
    let pages = PageRange::new(0, 16);
    let first = rig.write(GROUP, key(1), pages, 100);
    rig.end_turn();
    let holds = |rig: &Rig| {
        let reserved = &rig.store.reserved;
        let reserved = (reserved.units(), reserved.blocks(), reserved.journal_pages());
        (reserved, rig.store.status().journal_used_bytes)
    };
    let before = holds(&rig);
    rig.write(GROUP, key(2), pages, 200);
    let (group, unit) = (GROUP, 0);
    let push = Record::Push {
        token: 77,
        group,
        key: key(3),
        unit,
        version: version(1, 2),
        as_of: Seq(2),
        data: Some(data(300, 16)),
        lost: 0,
    };
    rig.store.append(push).unwrap();
    assert_ne!(holds(&rig), before);
    let left = rig.store.withdraw(GROUP);
    assert_eq!(holds(&rig), before);
    rig.write(GROUP, key(2), pages, 200);
    rig.write(GroupId(4), key(1), pages, 400);
    assert_eq!(rig.store.withdraw(GROUP).last, first);
    assert_eq!((left.last, left.pushes), (first, vec![77]));
    // It goes on behind what is left, also after a crash; the other group has lost nothing.
    let second = rig.write(GROUP, key(1), PageRange::new(3, 1), 500);
    assert_eq!(second.seq, Seq(2));
    rig.settle();
    assert_eq!(durable(&rig), Some(Seq(2)));
    let mut rig = rig.crash(false);
    let last = |id: GroupId| {
        rig.recovered.groups.iter().find(|group| group.group == id).map(|group| group.tail.last)
    };
    assert_eq!((last(GROUP), last(GroupId(4)).map(|last| last.seq)), (Some(second), Some(Seq(1))));
    rig.store.apply(GROUP, Seq(2));
    rig.expect(GROUP, key(1), pages, |page| if page == 3 { 500 } else { 100 + u64::from(page) });
    rig.expect(GROUP, key(2), pages, |_| 0);
    rig.expect(GROUP, key(3), pages, |_| 0);
    // Nothing to take back changes nothing.
    assert_eq!(rig.store.withdraw(GROUP).last, second);
}

#[test]
fn what_is_queued_at_once_is_cut_into_batches_that_can_be_read() {
    for pages in [1, 4, 16, 256] {
        let mut rig = Rig::with_journal(5, 64 << 20);
        let count = 3000 / u32::from(pages);
        for number in 0..count {
            rig.write(GROUP, key(number % 8), PageRange::new(0, pages), 1 + u64::from(number) * 300);
        }
        rig.settle();
        rig.flush();
        rig = rig.crash(true);
        assert!(!rig.recovered.damaged, "{pages} pages each");
        assert_eq!(rig.store.tail(GROUP).last.seq, Seq(u64::from(count)));
    }
}

#[test]
fn zeroes_free_what_they_cover() {
    let mut rig = Rig::new(2, false);
    let whole = PageRange::new(0, 64);
    rig.write_through(GROUP, key(1), whole, 50);
    rig.idle();
    assert_eq!(rig.store.status().used_bytes, 4 * 65536);
    rig.write_through(GROUP, key(1), PageRange::new(16, 40), 0);
    rig.expect(GROUP, key(1), whole, |page| if (16..56).contains(&page) { 0 } else { 50 + u64::from(page) });
    rig.idle();
    assert_eq!(rig.store.status().used_bytes, 2 * 65536);
    assert_eq!(rig.store.unit_version(GROUP, key(1), 1), Version::ZERO);
    // Covered in part, with a previous version that was wrong.
    assert_eq!(rig.store.unit_version(GROUP, key(1), 3), Version::UNKNOWN);
    // Covered in pieces: the version stays, the place does not, also over a restart; and it may be written again.
    rig.write_through(GROUP, key(1), PageRange::new(56, 4), 0);
    rig.idle();
    assert_eq!(rig.store.status().used_bytes, 2 * 65536);
    rig.write_through(GROUP, key(1), PageRange::new(60, 4), 0);
    rig.idle();
    assert_eq!(rig.store.status().used_bytes, 65536);
    rig = rig.crash(true);
    assert_eq!(rig.store.status().used_bytes, 65536);
    rig.expect(GROUP, key(1), whole, |page| if page >= 16 { 0 } else { 50 + u64::from(page) });
    rig.write_through(GROUP, key(1), PageRange::new(60, 4), 50 + 60);
    rig.idle();
    assert_eq!(rig.store.status().used_bytes, 2 * 65536);
    rig.expect(GROUP, key(1), whole, |page| if (16..60).contains(&page) { 0 } else { 50 + u64::from(page) });
    rig.write_through(GROUP, key(1), PageRange::new(0, PAGES_PER_BLOCK as u16), 0);
    rig.idle();
    let status = rig.store.status();
    assert_eq!((status.used_bytes, status.blocks), (0, 0));
    assert!(rig.store.blocks_after(GROUP, None, 10).is_empty());
    // Zeroes where nothing is take nothing, a record neither.
    rig.write_through(GROUP, key(2), PageRange::new(3, 2), 0);
    assert_eq!(rig.store.status().blocks, 0);
}

#[test]
fn a_partial_write_keeps_the_chain_only_over_what_it_knew() {
    let mut rig = Rig::new(3, false);
    let first = rig.write_through(GROUP, key(1), PageRange::of_unit(0), 10);
    let append = |rig: &mut Rig, previous: Version| {
        let seq = rig.store.tail(GROUP).last.seq.next();
        let entry = Entry {
            group: GROUP,
            version: Version { seq, ..first },
            acked: Seq(0),
            key: key(1),
            pages: PageRange::new(4, 2),
            data: Some(data(900, 2)),
            previous_first: previous,
            previous_last: Version::ZERO,
        };
        rig.store.append(Record::Entry(entry)).unwrap();
        rig.settle();
        rig.store.apply(GROUP, seq);
        rig.store.unit_version(GROUP, key(1), 0)
    };
    assert_eq!(append(&mut rig, first), version(1, 2));
    assert_eq!(append(&mut rig, first), Version::UNKNOWN);
    // Nothing follows from an unknown version, not even itself.
    assert_eq!(append(&mut rig, Version::UNKNOWN), Version::UNKNOWN);
    // A push brings the unit right again.
    let pushed = version(1, 2);
    let push = Record::Push {
        token: 9,
        group: GROUP,
        key: key(1),
        unit: 0,
        version: pushed,
        as_of: Seq(4),
        data: Some(data(5000, 16)),
        lost: 0,
    };
    rig.store.append(push).unwrap();
    rig.settle();
    assert!(rig.events.iter().any(|event| matches!(event, StoreEvent::Pushed { token: 9 })));
    assert_eq!(rig.store.unit_version(GROUP, key(1), 0), pushed);
    rig.expect(GROUP, key(1), PageRange::of_unit(0), |page| 5000 + u64::from(page));
}

/// A push is applied at once, an older entry of its block when it is acknowledged: the journal was given up from the push on, and with it
/// the entry's data.
#[test]
fn an_entry_that_is_applied_after_a_later_push_to_its_block_holds_the_journal() {
    for opened_twice in [false, true] {
        let mut rig = Rig::new(11, false);
        let pages = PageRange::new(0, 4);
        // A cycle is under way when it comes to that.
        rig.write_through(GROUP, key(2), pages, 700);
        if !opened_twice {
            rig.now_ns += 20_000_000_000;
            rig.store.tick(rig.now_ns);
            rig.end_turn();
        }
        let entry = rig.write(GROUP, key(1), pages, 100);
        let settle = |rig: &mut Rig, durable: &dyn Fn(&Rig) -> bool| {
            while !durable(rig) {
                rig.end_turn();
                assert!(rig.complete_one());
            }
        };
        settle(&mut rig, &|rig| rig.store.tail(GROUP).last == entry && durable(rig) == Some(entry.seq));
        let token = rig.token();
        let (unit, as_of) = (5, rig.store.tail(GROUP).acked);
        let push = Record::Push {
            token,
            group: GROUP,
            key: key(1),
            unit,
            version: version(9, 9),
            as_of,
            data: Some(data(900, 16)),
            lost: 0,
        };
        rig.store.append(push).unwrap();
        settle(&mut rig, &|rig| {
            rig.events
                .iter()
                .any(|event| matches!(event, StoreEvent::Pushed { token: done, .. } if *done == token))
        });
        rig.store.apply(GROUP, entry.seq);
        // What comes next says that it is acknowledged.
        let last = rig.write(GROUP, key(3), pages, 300);
        rig.settle();
        rig.flush();
        rig = rig.crash(true);
        assert_eq!(rig.store.tail(GROUP).last, last);
        if opened_twice {
            rig = rig.crash(true);
        }
        rig.store.apply(GROUP, Seq(u64::MAX));
        assert!(!rig.recovered.damaged);
        rig.expect(GROUP, key(1), pages, |page| 100 + u64::from(page));
        rig.expect(GROUP, key(1), PageRange::of_unit(unit), |page| 900 + u64::from(page % 16));
    }
}

/// An entry that is sent again tells what is acknowledged by now, of entries behind it too. When those never came and the
/// store was opened anew, the entries that got their seqs were applied before they were acknowledged. Found by reading.
#[test]
fn what_never_came_is_not_acknowledged() {
    let mut rig = Rig::new(24, false);
    let page = PageRange::new(0, 1);
    let entry = |seq, acked, content| {
        let (previous_first, previous_last) = (Version::ZERO, Version::ZERO);
        let (version, data) = (version(1, seq), Some(data(content, 1)));
        let (key, acked) = (key(1), Seq(acked));
        Record::Entry(Entry {
            group: GROUP,
            version,
            acked,
            key,
            pages: page,
            data,
            previous_first,
            previous_last,
        })
    };
    rig.store.append(entry(1, 0, 10)).unwrap();
    rig.store.append(entry(2, 4, 20)).unwrap();
    rig.settle();
    let mut rig = rig.crash(false);
    assert_eq!(rig.recovered.groups[0].tail.acked, Seq(2));
    rig.store.append(entry(3, 2, 30)).unwrap();
    rig.settle();
    rig.expect(GROUP, key(1), page, |_| 20);
    rig.store.apply(GROUP, Seq(3));
    rig.expect(GROUP, key(1), page, |_| 30);
}

#[test]
fn a_reset_drops_what_is_not_applied() {
    let mut rig = Rig::new(4, false);
    rig.write_through(GROUP, key(1), PageRange::new(0, 1), 10);
    rig.write(GROUP, key(1), PageRange::new(0, 1), 20);
    rig.end_turn();
    rig.write(GROUP, key(1), PageRange::new(0, 1), 30);
    rig.store.append(Record::Reset { group: GROUP, last: version(2, 1) }).unwrap();
    let again = rig.write(GROUP, key(1), PageRange::new(1, 1), 40);
    assert_eq!(again, version(2, 2));
    rig.settle();
    rig.store.apply(GROUP, again.seq);
    for _ in 0..2 {
        rig.expect(GROUP, key(1), PageRange::new(0, 2), |page| if page == 0 { 10 } else { 40 });
        assert_eq!(rig.store.tail(GROUP).last, again);
        rig.idle();
        rig = rig.crash(true);
    }
}

#[test]
fn entries_nobody_acknowledged_come_back_with_their_data() {
    let mut rig = Rig::new(5, false);
    rig.write_through(GROUP, key(1), PageRange::new(0, 4), 10);
    rig.write(GROUP, key(2), PageRange::new(8, 2), 20);
    rig.write(GROUP, key(2), PageRange::new(8, 1), 0);
    rig.flush();
    rig.idle();
    let rig = rig.crash(true);
    assert!(!rig.recovered.damaged);
    let [group] = &rig.recovered.groups[..] else { panic!("one group") };
    assert_eq!((group.tail.last, group.tail.acked), (version(1, 3), Seq(1)));
    let [write, zero] = &group.pending[..] else { panic!("two entries") };
    assert_eq!((write.version, write.key, write.pages), (version(1, 2), key(2), PageRange::new(8, 2)));
    let bytes = write.data.as_ref().unwrap();
    assert!(bytes.bytes[..] == data(20, 2).bytes[..]);
    assert!(bytes.checksums == data(20, 2).checksums);
    assert!(zero.data.is_none());
}

#[test]
fn flushes_are_shared_and_free_when_nothing_is_new() {
    let mut rig = Rig::new(6, false);
    rig.write(GROUP, key(1), PageRange::new(0, 1), 1);
    rig.settle();
    for token in 100..110 {
        rig.store.flush(token);
    }
    rig.settle();
    assert_eq!(rig.store.status().counters.flushes, 1);
    rig.flush();
    assert_eq!(rig.store.status().counters.flushes, 1);
}

#[test]
fn a_failed_flush_latches_the_store() {
    let mut rig = Rig::new(7, false);
    rig.write(GROUP, key(1), PageRange::new(0, 1), 1);
    rig.settle();
    rig.store.flush(50);
    rig.fail_next_flush = true;
    rig.settle();
    rig.store.flush(51);
    rig.settle();
    let failed = rig.events.iter().filter(|event| matches!(event, StoreEvent::Failed)).count();
    assert_eq!(failed, 1);
    assert!(!rig.events.iter().any(|event| matches!(event, StoreEvent::Flushed { .. })));
    let reset = Record::Reset { group: GROUP, last: Version::ZERO };
    assert_eq!(rig.store.append(reset).unwrap_err().error, StoreError::Failed);
    assert_eq!(rig.store.admit(1), Err(StoreError::Failed));
    assert!(rig.read(GROUP, key(1), PageRange::new(0, 1)).is_err());
}

#[test]
fn a_failed_store_lets_go_of_what_is_on_its_way() {
    let mut rig = Rig::new(7, false);
    rig.write(GROUP, key(1), PageRange::new(0, 1), 1);
    rig.settle();
    let pages = PageRange::new(0, 16);
    // Of an entry that waits to be acknowledged, the store has what replication has.
    let waiting = rig.store.groups[&GROUP].pending[0].bytes.clone().expect("it has data");
    let queued = data(2, 16);
    let held = queued.bytes.clone();
    let push = Record::Push {
        token: 77,
        group: GROUP,
        key: key(2),
        unit: 0,
        version: version(1, 1),
        as_of: Seq(1),
        data: Some(queued),
        lost: 0,
    };
    rig.store.flush(50);
    rig.fail_next_flush = true;
    rig.end_turn();
    rig.store.append(push).unwrap();
    let held = held.try_into_mut().expect_err("the store has it, too");
    assert!(rig.complete_one(), "the flush fails");
    rig.settle();
    assert!(held.try_into_mut().is_ok(), "nobody else has it");
    assert!(waiting.try_into_mut().is_ok(), "nobody else has it");
    assert!(rig.read(GROUP, key(2), pages).is_err());
}

#[test]
fn a_full_store_refuses_new_places_and_goes_on() {
    let mut rig = Rig::with_bytes(8, false, 40 << 20);
    let mut written = 0;
    while rig.store.admit_write(GROUP, key(written / 60), unit(written)).is_ok() {
        rig.write_through(GROUP, key(written / 60), unit(written), 1 + u64::from(written) * 16);
        written += 1;
        if written % 50 == 0 {
            rig.idle();
        }
    }
    rig.idle();
    assert_eq!(rig.store.admit(1), Err(StoreError::Full));
    let status = rig.store.status();
    assert!(status.used_bytes > status.capacity_bytes * 9 / 10, "{status:?}");
    // What has its place may be written again, read, and trimmed; then there is room.
    assert_eq!(rig.store.admit_write(GROUP, key(0), unit(0)), Ok(()));
    rig.write_through(GROUP, key(0), unit(0), 7777);
    rig.expect(GROUP, key(0), unit(0), |page| 7777 + u64::from(page));
    let last = written - 1;
    rig.expect(GROUP, key(last / 60), unit(last), |page| {
        1 + u64::from(last) * 16 + u64::from(page - unit(last).first)
    });
    rig.write_through(GROUP, key(1), PageRange::new(0, 1024), 0);
    rig.idle();
    assert_eq!(rig.store.admit(256), Ok(()));
    rig.write_through(GROUP, key(1), unit(2), 9);
    let mut rig = rig.crash(false);
    rig.store.apply(GROUP, Seq(u64::MAX));
    rig.expect(GROUP, key(0), unit(0), |page| 7777 + u64::from(page));
}

/// Each of many small writes to a new block counted as a block of its own until it was acknowledged: a store with a slow peer, or
/// a small one with many clients, said that it was full. Found by the simulator, seed 6794.
#[test]
fn a_new_block_under_many_pending_writes_is_one_block() {
    let mut rig = Rig::with_bytes(8, false, 40 << 20);
    let writes = rig.store.slots.count() as u16 + 20;
    for page in 0..writes {
        rig.write(GROUP, key(1), PageRange::new(page, 1), 1 + u64::from(page));
    }
    assert_eq!(rig.store.reserved.blocks(), 1);
    assert_eq!(rig.store.reserved.units(), u32::from(writes).div_ceil(16));
    assert_eq!(rig.store.admit_write(GROUP, key(2), unit(0)), Ok(()));
    rig.settle();
    // Also those that are still pending when it is opened again.
    let rig = rig.crash(false);
    assert_eq!(rig.store.reserved.blocks(), 1);
    assert_eq!(rig.store.admit_write(GROUP, key(2), unit(0)), Ok(()));
}

fn unit(number: u32) -> PageRange {
    PageRange::of_unit((number % 60) as u8)
}

#[test]
fn a_full_journal_refuses_until_destage_has_moved_on() {
    let mut rig = Rig::new(9, false);
    let mut refused = 0;
    for number in 0..40u64 {
        let pages = PageRange::new((number % 4) as u16 * 256, 256);
        if rig.store.admit(256).is_err() {
            refused += 1;
            assert_eq!(rig.store.admit(256), Err(StoreError::JournalFull));
            rig.store.apply(GROUP, Seq(u64::MAX));
            rig.settle();
            rig.store.apply(GROUP, Seq(u64::MAX));
            rig.settle();
            assert_eq!(rig.store.admit(256), Ok(()));
        }
        rig.write(GROUP, key(1), pages, 1 + number * 300);
    }
    assert!(refused > 1);
}

#[test]
fn blocks_are_listed_in_order_with_digests() {
    let mut rig = Rig::new(10, false);
    for index in [5, 1, 9] {
        rig.write_through(GROUP, key(index), PageRange::new(0, 1), 1);
    }
    rig.write_through(GroupId(4), key(2), PageRange::new(0, 1), 1);
    let listed = |rig: &Rig, after, max| -> Vec<u32> {
        rig.store.blocks_after(GROUP, after, max).iter().map(|(key, _)| key.index.0).collect()
    };
    assert_eq!(listed(&rig, None, 10), [1, 5, 9]);
    assert_eq!(listed(&rig, None, 2), [1, 5]);
    assert_eq!(listed(&rig, Some(key(5)), 10), [9]);
    assert_eq!(rig.store.allocated(GROUP, key(1), PageRange::new(0, 3)), [true, false, false]);
}

#[test]
fn a_device_is_known_for_what_it_holds() {
    let blank = SimDevice::new(64 << 20);
    assert_eq!(Store::probe(&blank, pool()).unwrap(), Content::Blank);
    let marks: [(u64, &[u8], Foreign); 8] = [
        (0x438, &[0x53, 0xef], Foreign::Ext),
        (0, b"XFSB", Foreign::Xfs),
        (512, b"LABELONE", Foreign::Lvm),
        (0, b"LUKS\xba\xbe", Foreign::Luks),
        (4086, b"SWAPSPACE2", Foreign::Swap),
        (512, b"EFI PART", Foreign::Gpt),
        (510, &[0x55, 0xaa], Foreign::Mbr),
        ((64 << 20) - 9, b"x", Foreign::Unknown),
    ];
    for (offset, magic, kind) in marks {
        let device = SimDevice::new(64 << 20);
        let mut page = vec![0; 4096];
        let start = (offset % 4096) as usize;
        page[start..start + magic.len()].copy_from_slice(magic);
        device.write_at(offset / 4096 * 4096, &page).unwrap();
        assert_eq!(Store::probe(&device, pool()).unwrap(), Content::Foreign(kind));
    }
    let rig = Rig::new(11, true);
    assert!(matches!(Store::probe(&rig.capacity, pool()).unwrap(), Content::Ours { .. }));
    let small = SimDevice::new(8 << 20);
    let parameters = crate::store::FormatParameters {
        cluster_id: String::new(),
        node: xsan_protocol::ids::NodeId(1),
        store: xsan_protocol::ids::StoreId(1),
        created_ns: 0,
        journal_bytes: None,
    };
    assert!(Store::format(&small, None, &parameters, pool()).is_err());
}

#[test]
fn a_superblock_survives_in_its_second_copy() {
    let rig = Rig::new(12, false);
    rig.capacity.flip_bit(0, 100);
    let rig = rig.crash(false);
    assert!(!rig.recovered.damaged);
}
