//! docs/moving-data.md, as it is written.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use xsan_tests::foreground::{Write, percentile};
use xsan_tests::machine;

use crate::phases::{QUIET, STOPPED};
use crate::{
    Arguments, DOWN_OUT, FOREGROUND_CLIENTS, FOREGROUND_RATE, MOVED_RATIO_MAX, NODES, P99_RATIO_MAX, Phase,
    REPLICAS, SLICE, SlowNode, p99_us, ratio, worst_slice_us,
};

pub fn page(
    arguments: &Arguments,
    directory: &Path,
    phases: &[Phase],
    slow: &SlowNode,
    verified: u64,
) -> Result<String> {
    let mut page = String::from("# Moving data\n\n");
    writeln!(
        page,
        "Written by `benches/moves --gib {gib}`; not edited by hand. {NODES} nodes on the loopback of one host, {gib} GiB of data \
         with {REPLICAS} replicas, all over which {FOREGROUND_CLIENTS} clients of one gateway do {FOREGROUND_RATE} random 4 KiB \
         operations a second, half of them writes, without flushes. The load is open: an operation that falls due while its client \
         waits for another has waited since then. `down-out-interval` is {DOWN_OUT}. At the end the clients' {} MiB were read through \
         another gateway, each page as it was written last.\n",
        verified >> 20,
        gib = arguments.gib,
    )?;
    writeln!(
        page,
        "\"Ideal\" is what the dead or leaving node held, an equal share of all for one that comes, the units of 64 KiB that \
         were written while one was away, and what primaries hold for a scrub. \"Moved\" is the units sent to learners, and what primaries \
         read. A phase lasts until nothing moves any more and no group changes; maintenance from `on`, with the stop, a minute \
         away, and the start; a rebuild from its begin, after others have taken over. p99 is that of all writes that were due in the phase, and in the \
         {} s before and after it, when nothing moved; the worst slice is the highest p99 of {} s.\n",
        QUIET.as_secs(),
        SLICE.as_secs(),
    )?;
    page.push_str(
        "| what | ideal | moved | moved ÷ ideal | time | p99 quiet | p99 moving | ratio | worst slice | longest wait | kept |\n",
    );
    page.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |\n");
    for phase in phases {
        writeln!(
            page,
            "| {} | {} MiB | {} MiB | {:.2} | {:.1} s | {:.0} µs | {:.0} µs | {:.2} | {:.0} µs | {} ms | {} |",
            phase.name,
            phase.ideal_bytes >> 20,
            phase.moved_bytes >> 20,
            phase.moved_ratio(),
            phase.time.as_secs_f64(),
            p99_us(&phase.quiet),
            p99_us(&phase.during),
            phase.p99_ratio(),
            worst_slice_us(&phase.during),
            longest_ms(&phase.during),
            verdict(phase.missed().is_empty()),
        )?;
    }
    writeln!(
        page,
        "\nPromised: moved ÷ ideal ≤ {MOVED_RATIO_MAX}, p99 ratio ≤ {P99_RATIO_MAX}.\n\n## A slow node\n\n\
         The data process of one of the nodes stands still for {} ms of every {} ms. With `slow-nodes report` clients wait for it, \
         with `slow-nodes demote` they do not, once it is found out. Then it is a learner, which is sent what is written as far as it takes it, and \
         once it is mended what it missed: at most the units that were written.\n",
        STOPPED.as_millis(),
        2 * STOPPED.as_millis()
    )?;
    page.push_str("| | p99 | of quiet | longest wait |\n| --- | ---: | ---: | ---: |\n");
    let rows = [
        ("quiet", &slow.quiet),
        ("`report`: waiting for it", &slow.waiting),
        ("`demote`: without it", &slow.demoted),
        ("mended, until it acts again", &slow.returning),
    ];
    for (name, writes) in rows {
        let (p99, of_quiet, longest) = (p99_us(writes), ratio(writes, &slow.quiet), longest_ms(writes));
        writeln!(page, "| {name} | {p99:.0} µs | {of_quiet:.2} | {longest} ms |")?;
    }
    writeln!(
        page,
        "\nIt acted nowhere {:.1} s after the order, and everywhere {:.1} s after its mending; {} MiB were moved of at most {} MiB. \
         Promised of the last two rows: p99 ≤ {P99_RATIO_MAX} of quiet, and as many bytes as above. Kept: {}.\n\nThe machine:\n",
        slow.demoted_after.as_secs_f64(),
        slow.back_after.as_secs_f64(),
        slow.moved_bytes >> 20,
        slow.ideal_bytes >> 20,
        verdict(slow.missed().is_empty()),
    )?;
    for (name, value) in machine::describe(directory)? {
        writeln!(page, "- {name}: {value}")?;
    }
    Ok(page)
}

fn verdict(kept: bool) -> &'static str {
    if kept { "yes" } else { "**no**" }
}

fn longest_ms(writes: &[Write]) -> u128 {
    percentile(writes, 100).map_or(0, |wait| wait.as_millis())
}
