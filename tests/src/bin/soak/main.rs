//! The soak: random faults under a verifying load, for as many minutes as wanted. Started by `tools/soak`.
//!
//! fio works through a bridge that reconnects, so that its own gateway's process may die as well. Beside it a crowd
//! of depth-1 clients, one through each gateway, reads and writes the same pages; a new one for each fault, so that its
//! stalls are the fault's. Between two faults the cluster must become whole again: two nodes are away at once only when
//! two, or all, are killed. A stall that is longer than what docs/testing.md promises ends it, and so does a connection that broke
//! though its gateway's process lived.

mod faults;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use xsan_tests::cluster::Cluster;
use xsan_tests::crowd::{Field, Summary};
use xsan_tests::fio::{Job, Load};
use xsan_tests::node::NodeOptions;
use xsan_tests::tools::Export;

use crate::faults::{ALL, Fault, Faults, KILLS};

const MIB: u64 = 1 << 20;
const NODES: usize = 3;
const VOLUME: &str = "soak";
const FIO_BYTES: u64 = 512 * MIB;
/// Where the crowds work, behind what fio writes: room for 7,722 faults, 17 hours with one every 8 seconds.
const FIELD: Field = Field { first: 600 * MIB / 4096, pages: (2048 - 600) * MIB / 4096, round: 0 };
const RECONNECT: Duration = Duration::from_secs(30);
/// Strikes at a rotten disk, of which one at least must hit what is read.
const CHANGES_ENOUGH: u64 = 3;

/// Strikes at random under a verifying load.
#[derive(Debug, Parser)]
struct Arguments {
    /// How long the load runs
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Repeats the order of faults of an earlier run
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds between two faults
    #[arg(long, default_value_t = 8.0)]
    interval: f64,
    /// Not only kills: pauses, cut, lossy and slow links, slow, failing, full and rotting devices, garbage from clients and
    /// peers, and two or all nodes killed at once (needs root)
    #[arg(long)]
    all: bool,
    /// Of these, only one kind (may be given more than once)
    #[arg(long, value_enum, requires = "all")]
    only: Vec<Fault>,
}

/// Of all the faults of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    faults: u64,
    operations: usize,
    stall: Duration,
    stall_elsewhere: Duration,
}

impl Tally {
    fn add(&mut self, summary: &Summary) {
        self.faults += 1;
        self.operations += summary.operations;
        self.stall = self.stall.max(summary.stall);
        self.stall_elsewhere = self.stall_elsewhere.max(summary.stall_elsewhere);
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}");
    match soak(&arguments, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the soak failed: {error:#}");
            let all = if arguments.all { " --all" } else { "" };
            let only: String =
                arguments.only.iter().map(|fault| format!(" --only {}", fault.name())).collect();
            let (minutes, interval) = (arguments.minutes, arguments.interval);
            eprintln!("again: tools/soak --minutes {minutes} --interval {interval} --seed {seed}{all}{only}");
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &Arguments, seed: u64) -> Result<()> {
    let (mut cluster, kinds) = if arguments.all {
        (faults::prepare(seed)?, if arguments.only.is_empty() { ALL } else { &arguments.only })
    } else {
        (Cluster::start_with(NODES, NodeOptions::default())?, KILLS)
    };
    cluster.create_volume(VOLUME, "2GiB", NODES)?;
    let bridge = Export::bridge(cluster.directory(), cluster.node(0).nbd, VOLUME, RECONNECT)?;
    let uri = bridge.uri();
    let runtime = Duration::from_secs_f64(arguments.minutes * 60.0);
    let job = Job { runtime: Some(runtime), ..Job::verified(&uri, 0, FIO_BYTES, seed) };
    let mut load = Load::start(&job, &cluster.directory().join("fio.json"))?;

    let mut faults = Faults::new(kinds, seed);
    let interval = Duration::from_secs_f64(arguments.interval);
    let mut tallies: BTreeMap<Fault, Tally> = BTreeMap::new();
    let (started, mut next) = (Instant::now(), Instant::now() + interval);
    while load.exit_status()?.is_none() {
        if Instant::now() < next || started.elapsed() + interval > runtime {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let at = started.elapsed().as_secs_f64();
        let (fault, what, summary) = faults.strike(&mut cluster)?;
        tallies.entry(fault).or_default().add(&summary);
        println!(
            "{at:6.1} s  {what}; whole and linearizable, {} operations, stalls {} ms, elsewhere {} ms",
            summary.operations,
            summary.stall.as_millis(),
            summary.stall_elsewhere.as_millis()
        );
        next = (next + interval).max(Instant::now());
    }

    let struck: u64 = tallies.values().map(|tally| tally.faults).sum();
    ensure!(struck > 0, "no fault was injected; run for longer, or with a shorter --interval");
    let changes = tallies.get(&Fault::ChangeBytes).map_or(0, |tally| tally.faults);
    ensure!(changes < CHANGES_ENOUGH || faults.repaired > 0, "bytes were changed, and no page was repaired");
    let outcome = load.finish(Duration::from_secs(1))?;
    ensure!(outcome.read.bytes > 0, "fio verified nothing; run for longer");
    print(&tallies);
    println!(
        "{struck} faults, no violation, {} pages repaired; fio wrote {} MiB and verified {} MiB without an error",
        faults.repaired,
        outcome.write.bytes / MIB,
        outcome.read.bytes / MIB
    );
    cluster.stop()
}

fn print(tallies: &BTreeMap<Fault, Tally>) {
    println!(
        "{:<18}{:>8}{:>14}{:>18}{:>24}",
        "fault", "times", "operations", "longest stall", "stall of other clients"
    );
    for (fault, tally) in tallies {
        println!(
            "{:<18}{:>8}{:>14}{:>15} ms{:>21} ms",
            fault.name(),
            tally.faults,
            tally.operations,
            tally.stall.as_millis(),
            tally.stall_elsewhere.as_millis()
        );
    }
}
