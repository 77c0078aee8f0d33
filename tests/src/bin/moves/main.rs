//! What moving data costs: a node's maintenance, a rebuild, a return, a join, a removal and a deep scrub, each under a foreground
//! load; and what a slow node costs, with and without the operator's leave to demote it.
//!
//! Started by `benches/moves`. Writes docs/moving-data.md: bytes moved beside what had to be moved, the time it took, and the
//! p99 of foreground writes meanwhile beside that of the quiet cluster. Nothing in that page is written by hand. It fails when
//! something promised was missed, and names it; at the end every byte of the foreground's is read back.

mod page;
mod phases;
mod watch;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use xsan_tests::cluster::Cluster;
use xsan_tests::foreground::{Foreground, Load, Write, percentile};
use xsan_tests::node::NodeOptions;
use xsan_tests::stamp::PAGE_SIZE;

use crate::phases::Bench;

const GIB: u64 = 1 << 30;
const NODES: usize = 4;
const VOLUME: &str = "vm";
const REPLICAS: usize = 3;
/// Foreground operations a second, half of them writes: a load that leaves the machine room.
const FOREGROUND_RATE: u32 = 1000;
/// Of one operation at a time each.
const FOREGROUND_CLIENTS: u32 = 16;
/// Through another gateway than the load's.
const VERIFYING_GATEWAY: usize = 1;
/// The least that may be set, so that nobody waits.
const DOWN_OUT: &str = "5s";
/// Promised: bytes moved beside what had to be moved, and the foreground's p99 beside the quiet cluster's.
const MOVED_RATIO_MAX: f64 = 1.1;
const P99_RATIO_MAX: f64 = 2.0;
/// Below it the bytes, or what had to be moved, were counted wrong.
const MOVED_RATIO_MIN: f64 = 0.9;
/// The worst of these is shown.
const SLICE: Duration = Duration::from_secs(10);

#[derive(Debug, Parser)]
struct Arguments {
    /// GiB that are written before anything moves
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=16))]
    gib: u64,
    /// The page that is written
    #[arg(long, default_value = "docs/moving-data.md", overrides_with = "output")]
    output: PathBuf,
}

/// One way of moving data, measured.
struct Phase {
    name: &'static str,
    ideal_bytes: u64,
    moved_bytes: u64,
    time: Duration,
    /// Of the quiet cluster just before and just after, and meanwhile.
    quiet: Vec<Write>,
    during: Vec<Write>,
}

/// A node that is far slower than its peers.
struct SlowNode {
    quiet: Vec<Write>,
    waiting: Vec<Write>,
    demoted: Vec<Write>,
    /// From its mending until it acts everywhere.
    returning: Vec<Write>,
    ideal_bytes: u64,
    moved_bytes: u64,
    /// From the order to demote slow nodes until it acted nowhere.
    demoted_after: Duration,
    back_after: Duration,
}

fn main() -> ExitCode {
    match moves(&Arguments::parse()) {
        Ok(missed) if missed.is_empty() => ExitCode::SUCCESS,
        Ok(missed) => {
            eprintln!("promised and missed: {}", missed.join("; "));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("the measurement failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn moves(arguments: &Arguments) -> Result<Vec<String>> {
    let options =
        NodeOptions { file_size: "6GiB".to_owned(), memory: "128MiB".to_owned(), ..NodeOptions::one_shard() };
    let cluster = Cluster::start_with(NODES, options)?;
    cluster.create_volume(VOLUME, &format!("{}GiB", arguments.gib), REPLICAS)?;
    cluster.cli(&["cluster", "set", "down-out-interval", DOWN_OUT])?.succeeded()?;
    println!("writing {} GiB", arguments.gib);
    let load = Foreground::start(Load {
        gateway: cluster.node(0).nbd,
        export: VOLUME.to_owned(),
        pages: arguments.gib * GIB / PAGE_SIZE as u64,
        rate: FOREGROUND_RATE,
        clients: FOREGROUND_CLIENTS,
        seed: 1,
    })?;
    let mut bench = Bench::new(cluster, load)?;
    let phases = vec![
        bench.maintenance()?,
        bench.rebuild()?,
        bench.back()?,
        bench.join()?,
        bench.remove()?,
        bench.scrub()?,
    ];
    let slow = bench.slow_node()?;
    let Bench { cluster, load, .. } = bench;
    let verified = load.finish(cluster.node(VERIFYING_GATEWAY).nbd)?;
    let page = page::page(arguments, cluster.directory(), &phases, &slow, verified)?;
    cluster.stop()?;
    print!("\n{page}");
    fs::write(&arguments.output, page)?;
    Ok(phases.iter().flat_map(Phase::missed).chain(slow.missed()).collect())
}

impl Phase {
    fn moved_ratio(&self) -> f64 {
        self.moved_bytes as f64 / self.ideal_bytes.max(1) as f64
    }

    fn p99_ratio(&self) -> f64 {
        ratio(&self.during, &self.quiet)
    }

    /// What was promised and did not hold.
    fn missed(&self) -> Vec<String> {
        let moved = (MOVED_RATIO_MIN..=MOVED_RATIO_MAX).contains(&self.moved_ratio());
        let mut missed = Vec::new();
        if !moved {
            missed.push(format!("{}: {:.2} of what had to be moved", self.name, self.moved_ratio()));
        }
        missed.extend(missed_p99(self.name, self.p99_ratio()));
        missed
    }
}

impl SlowNode {
    fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        if self.moved_bytes as f64 > self.ideal_bytes as f64 * MOVED_RATIO_MAX {
            missed.push(format!("a slow node: {} bytes moved of {}", self.moved_bytes, self.ideal_bytes));
        }
        missed.extend(missed_p99("a slow node, demoted", ratio(&self.demoted, &self.quiet)));
        missed.extend(missed_p99("a slow node, returning", ratio(&self.returning, &self.quiet)));
        missed
    }
}

fn missed_p99(what: &str, ratio: f64) -> Option<String> {
    (ratio > P99_RATIO_MAX).then(|| format!("{what}: p99 of {ratio:.2} times quiet"))
}

/// The 99th percentile; without writes there is none, and nothing is within any bound.
fn p99_us(writes: &[Write]) -> f64 {
    percentile(writes, 99).map_or(f64::INFINITY, |wait| wait.as_secs_f64() * 1e6)
}

fn ratio(during: &[Write], quiet: &[Write]) -> f64 {
    p99_us(during) / p99_us(quiet)
}

/// The highest p99 of all slices that lie wholly in the time of the writes.
fn worst_slice_us(writes: &[Write]) -> f64 {
    let Some(first) = writes.iter().map(|write| write.due).min() else { return f64::INFINITY };
    let slice_of = |write: &Write| ((write.due - first).as_secs_f64() / SLICE.as_secs_f64()) as u64;
    let last = writes.iter().map(slice_of).max().unwrap_or(0).max(1);
    let slice = |index| writes.iter().filter(|write| slice_of(write) == index).copied().collect::<Vec<_>>();
    (0..last).map(|index| p99_us(&slice(index))).fold(0.0, f64::max)
}
