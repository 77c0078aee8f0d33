use super::*;

const MS: u64 = 1_000_000;

fn order(group: u32, number: u64) -> ScrubOrder {
    ScrubOrder { group: GroupId(group), deep: true, number }
}

/// Bytes that may be read in so many ticks, each of them as much as it can in pieces of 128 KiB.
fn read_in(scrubber: &mut Scrubber, ticks: u64, resyncing: bool) -> u64 {
    let mut read = 0;
    for _ in 0..ticks {
        let now_ns = scrubber.refilled_ns + 20 * MS;
        scrubber.refill(now_ns, resyncing);
        while scrubber.take(128 << 10) {
            read += 128 << 10;
        }
    }
    read
}

#[test]
fn the_rate_is_kept_and_gives_way_to_resync() {
    let mut scrubber = Scrubber::default();
    scrubber.set_orders(50 << 20, vec![order(1, 1)]);
    scrubber.refill(1_000 * MS, false);
    // Half a second.
    let (quiet, allowed) = (read_in(&mut scrubber, 25, false), 25 << 20);
    assert!(quiet.abs_diff(allowed) <= 3 << 20, "{quiet}");
    assert_eq!(read_in(&mut scrubber, 25, true) / (1 << 20), 0, "nothing beside a resync");
    // What was not used in an hour is not used at once.
    scrubber.refill(scrubber.refilled_ns + 3_600_000 * MS, false);
    assert!(read_in(&mut scrubber, 1, false) <= 4 << 20);
}

#[test]
fn outcomes_are_kept_as_long_as_their_order_stands() {
    let mut scrubber = Scrubber::default();
    scrubber.set_orders(1, vec![order(1, 1), order(2, 1)]);
    assert_eq!(scrubber.open(), [order(1, 1), order(2, 1)]);
    scrubber.outcomes.push(ScrubOutcome { order: order(1, 1), findings: ScrubFindings::default() });
    assert_eq!(scrubber.open(), [order(2, 1)]);
    scrubber.set_orders(1, vec![order(1, 1), order(2, 2)]);
    assert_eq!(scrubber.outcomes().len(), 1);
    assert!(!scrubber.is_wanted(&order(2, 1)));
    scrubber.set_orders(1, vec![order(1, 2)]);
    assert!(scrubber.outcomes().is_empty());
    assert_eq!(scrubber.open(), [order(1, 2)]);
    for number in 0..OUTCOMES_MAX as u64 {
        scrubber.outcomes.push(ScrubOutcome { order: order(9, number), findings: ScrubFindings::default() });
    }
    assert_eq!(scrubber.open(), [], "nobody takes the outcomes");
}

#[test]
fn versions_say_who_lacks_a_write_or_nobody_knows() {
    use xsan_protocol::ids::{Epoch, Seq};
    let version = |seq| Version::new(Epoch(1), Seq(seq));
    let key = BlockKey::default();
    let judge = |ours: Version, theirs: Version| {
        let mut scrub = Scrub::new(order(1, 1));
        let of = |version| std::array::from_fn(|unit| if unit == 5 { version } else { Version::ZERO });
        scrub.blocks.insert(key, of(ours));
        scrub.on_differing(NodeId(2), &[BlockVersions::new(key, &of(theirs))], KEY_MAX);
        assert_eq!(scrub.findings.differences, u64::from(ours != theirs));
        scrub.differences.get(&NodeId(2)).map(|found| (found.behind, found.unclear))
    };
    assert_eq!(judge(version(7), version(7)), None);
    assert_eq!(judge(version(7), version(6)), Some((1, 0)));
    assert_eq!(judge(version(7), Version::UNKNOWN), Some((1, 0)));
    assert_eq!(judge(version(6), version(7)), Some((0, 1)), "the primary lacks it");
    assert_eq!(judge(version(7), Version::ZERO), Some((0, 1)), "zeroed there, or lost?");
    assert_eq!(judge(Version::ZERO, version(7)), Some((0, 1)));
    assert_eq!(judge(Version::UNKNOWN, version(7)), Some((0, 1)));
}
