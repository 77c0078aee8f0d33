//! A short run of the simulator with every test run, and the seeds that once found something.

use xsan_sim::{FAULTS, Plan, Summary};

/// Seeds that found a fault of XSAN, now mended: docs/testing.md says which. Their plans may have changed since.
const FOUND: [u64; 19] = [
    83, 115, 130, 246, 286, 323, 430, 487, 516, 765, 1436, 2040, 2264, 3040, 3300, 5154, 5788, 10273, 102178,
];
/// Kinds of fault that so few seeds need not meet.
const RARE: [&str; 6] = [
    "all hosts down when the last one taken in acts alone",
    "node joins",
    "page unreadable",
    "power of a primary lost before a newcomer counts",
    "write lost by a device",
    "write misdirected by a device",
];
const FRESH: std::ops::Range<u64> = 1..34;

fn run(seed: u64) -> Summary {
    match xsan_sim::run(&Plan::of(seed)) {
        Ok(summary) => summary,
        Err(violation) => {
            let skip = violation.log.len().saturating_sub(40);
            violation.log.iter().skip(skip).for_each(|line| println!("{line}"));
            panic!("tools/sim --seed {seed}: {}", violation.what)
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost() {
    let mut total = Summary::default();
    FOUND.into_iter().chain(FRESH).for_each(|seed| total.add(&run(seed)));
    println!("{total:?}");
    for fault in FAULTS.into_iter().filter(|fault| !RARE.contains(fault)) {
        assert!(total.faults.contains_key(fault), "no seed had this: {fault}");
    }
    assert!(total.answered > 20 * total.failed, "most of the time the clusters serve: {total:?}");
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let (once, again) = (run(83), run(83));
    assert_eq!(
        (once.events, once.virtual_ns, once.answered),
        (again.events, again.virtual_ns, again.answered)
    );
}
