//! The soak: random faults under a verifying load, for as many minutes as wanted. Started by `tools/soak`.
//!
//! fio works through a bridge that reconnects, so that its own gateway's process may die as well. Beside it a crowd
//! of depth-1 clients, one through each gateway, reads and writes the same pages; a new one for each fault, so that its
//! stalls are the fault's. Between two faults the cluster must become whole again: two nodes are away at once only when
//! two, or all, are killed. A stall that is longer than what docs/testing.md promises ends it, and so does a connection that broke
//! though its gateway's process lived, and a process that ended by itself. At the end the pages of all crowds are read once more, and
//! all replicas are compared.

mod faults;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use serde_json::Value;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE};
use xsan_tests::crowd::{Field, Summary};
use xsan_tests::fio::{Job, Load, Outcome};
use xsan_tests::node::NodeOptions;
use xsan_tests::tools::Export;
use xsan_tests::wait::{Look, until};
use xsan_tests::writer::{self, Promise, Promises};

use crate::faults::{ALL, Fault, Faults, KILLS};

const MIB: u64 = 1 << 20;
const NODES: usize = 3;
const VOLUME: &str = "soak";
const FIO_BYTES: u64 = 512 * MIB;
/// Where the crowds work, behind what fio writes: room for 7,720 faults, 17 hours with one every 8 seconds.
const FIELD: Field = Field { first: 600 * MIB / 4096, pages: (2048 - 600) * MIB / 4096, round: 0 };
/// qemu connects again after 1, 2, 4, 8 and then every 16 seconds: several tries may meet a gateway that was struck again.
const RECONNECT: Duration = Duration::from_secs(180);
/// For what is under way when its time is over.
const FIO_END_MAX: Duration = Duration::from_secs(300);
/// A soak that is longer meets every kind of fault.
const ALL_STRIKE_WITHIN: Duration = Duration::from_secs(15 * 60);
/// Nobody is at work any more when everything is scrubbed.
const SCRUB_RATE: &str = "1GiB";

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

type Tallies = BTreeMap<Fault, Tally>;

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
    let mut faults = Faults::new(kinds, seed);
    let mut tallies: Tallies = kinds.iter().map(|fault| (*fault, Tally::default())).collect();
    let result = strike(arguments, seed, &mut cluster, &mut faults, &mut tallies);
    print(&tallies);
    let fio = result?;
    let (pages, verified) = (faults.promises.len(), verify(&cluster, &faults.promises, seed)?);
    println!(
        "{pages} pages of all clients hold what they were promised: {verified} bytes through all gateways"
    );
    let scrubbed = scrub(&cluster)?;
    println!("a deep scrub of {scrubbed} bytes found no page that is lost, and no two replicas that differ");
    for node in cluster.nodes() {
        ensure!(!node.log_text()?.contains("panicked"), "{} has panicked; see its log", node.name);
    }
    println!(
        "{} faults, no violation, {} pages repaired; fio wrote {} MiB and verified {} MiB without an error, \
         and waited for {:.0} ms at most",
        tallies.values().map(|tally| tally.faults).sum::<u64>(),
        faults.repaired,
        fio.write.bytes / MIB,
        fio.read.bytes / MIB,
        fio.write.latency_us_max.max(fio.read.latency_us_max) / 1000.0,
    );
    cluster.stop()
}

/// The load, and faults one after the other until it ends.
fn strike(
    arguments: &Arguments,
    seed: u64,
    cluster: &mut Cluster,
    faults: &mut Faults<'_>,
    tallies: &mut Tallies,
) -> Result<Outcome> {
    let bridge = Export::bridge(cluster.directory(), cluster.node(0).nbd, VOLUME, RECONNECT)?;
    let uri = bridge.uri();
    let runtime = Duration::from_secs_f64(arguments.minutes * 60.0);
    let job = Job { runtime: Some(runtime), ..Job::verified(&uri, 0, FIO_BYTES, seed) };
    let mut load = Load::start(&job, &cluster.directory().join("fio.json"))?;
    let interval = Duration::from_secs_f64(arguments.interval);
    let (started, mut next) = (Instant::now(), Instant::now() + interval);
    while load.exit_status()?.is_none() {
        ensure!(started.elapsed() < runtime + FIO_END_MAX, "fio does not end");
        if Instant::now() < next || started.elapsed() + interval > runtime {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let at = started.elapsed().as_secs_f64();
        let (fault, what, summary) = faults.strike(cluster)?;
        tallies.entry(fault).or_default().add(&summary);
        println!(
            "{at:6.1} s  {what}; whole and linearizable, {} operations, stalls {} ms, elsewhere {}",
            summary.operations,
            summary.stall.as_millis(),
            elsewhere(fault, summary.stall_elsewhere)
        );
        next = (next + interval).max(Instant::now());
    }
    let outcome = load.finish(Duration::from_secs(1))?;
    ensure!(outcome.read.bytes > 0, "fio verified nothing; run for longer");
    let missing: Vec<String> =
        tallies.iter().filter(|(_, tally)| tally.faults == 0).map(|(fault, _)| fault.name()).collect();
    ensure!(missing.len() < tallies.len(), "no fault struck; run for longer, or with a shorter --interval");
    ensure!(runtime < ALL_STRIKE_WITHIN || missing.is_empty(), "never struck: {}", missing.join(", "));
    Ok(outcome)
}

/// Reads what the clients of all faults were promised once more, through every gateway.
fn verify(cluster: &Cluster, promises: &Promises, seed: u64) -> Result<u64> {
    let acknowledged = |promise: &Promise| promise.acknowledged;
    (0..NODES)
        .map(|gateway| writer::verify(promises, &mut cluster.connect(gateway, VOLUME)?, seed, acknowledged))
        .sum()
}

/// Everything is read and compared between replicas; bytes at the primaries.
fn scrub(cluster: &Cluster) -> Result<u64> {
    cluster.wait_healthy(RESYNC_DEADLINE)?;
    cluster.cli(&["cluster", "set", "scrub-rate", SCRUB_RATE])?.succeeded()?;
    cluster.cli(&["scrub", "start", "--deep"])?.succeeded()?;
    let status = until("the scrub to end", RESYNC_DEADLINE, || {
        let status = cluster.cli_json(&["scrub", "status"])?;
        let left = &status["wished"];
        Ok(if *left == 0 { Look::Done(status) } else { Look::NotYet(format!("{left} groups are left")) })
    })?;
    let found = &status["found"];
    ensure!(found["lost_pages"] == 0 && found["differences"] == 0, "the scrub found {found}");
    let bytes = |group: &Value| group["last_deep"]["findings"]["bytes"].as_u64();
    Ok(status["groups"].as_array().into_iter().flatten().filter_map(bytes).sum())
}

fn elsewhere(fault: Fault, stall: Duration) -> String {
    if fault.is_everywhere() { "-".to_owned() } else { format!("{} ms", stall.as_millis()) }
}

fn print(tallies: &Tallies) {
    let row = |name: &str, tally: &Tally, stall: &str, elsewhere: &str| {
        println!("{name:<20}{:>6}{:>12}{stall:>15}{elsewhere:>23}", tally.faults, tally.operations);
    };
    println!(
        "{:<20}{:>6}{:>12}{:>15}{:>23}",
        "fault", "times", "operations", "longest stall", "stall of other clients"
    );
    let mut all = Tally::default();
    for (fault, tally) in tallies {
        let stall = format!("{} ms", tally.stall.as_millis());
        row(&fault.name(), tally, &stall, &elsewhere(*fault, tally.stall_elsewhere));
        all.faults += tally.faults;
        all.operations += tally.operations;
    }
    row("all", &all, "", "");
}
