//! The soak: random deaths under a verifying load, for as many minutes as wanted. Started by `tools/soak`.
//!
//! fio works through a bridge that reconnects, so that its own gateway's process may die as well. A second,
//! depth-1 writer with the addresses of all gateways measures the longest stall and keeps a history of its
//! own. Between two faults the cluster must become whole again: never are two nodes away at once.

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Parser;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE};
use xsan_tests::fio::{Job, Load};
use xsan_tests::random::Random;
use xsan_tests::tools::Export;
use xsan_tests::writer::{Work, Writer};

const MIB: u64 = 1 << 20;
const VOLUME: &str = "soak";
const FIO_BYTES: u64 = 512 * MIB;
const WRITER_FIRST_PAGE: u64 = 600 * MIB / 4096;
const WRITER_PAGES: u64 = 256;
const RECONNECT: Duration = Duration::from_secs(30);

/// Kills processes at random under a verifying load.
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}");
    match soak(&arguments, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the soak failed: {error:#}");
            eprintln!(
                "again: tools/soak --minutes {} --interval {} --seed {seed}",
                arguments.minutes, arguments.interval
            );
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &Arguments, seed: u64) -> Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.create_volume(VOLUME, "1GiB", 3)?;
    let bridge = Export::bridge(cluster.directory(), cluster.node(0).nbd, VOLUME, RECONNECT)?;
    let uri = bridge.uri();
    let runtime = Duration::from_secs_f64(arguments.minutes * 60.0);
    let job = Job { runtime: Some(runtime), ..Job::verified(&uri, 0, FIO_BYTES, seed) };
    let mut load = Load::start(&job, &cluster.directory().join("fio.json"))?;
    let gateways = cluster.nodes().iter().map(|node| node.nbd).collect();
    let pages = WRITER_FIRST_PAGE..WRITER_FIRST_PAGE + WRITER_PAGES;
    let work = Work { read_percent: 30, ..Work::new(gateways, VOLUME, pages, seed) };
    let writer = Writer::start(work)?;

    let mut random = Random::new(seed);
    let interval = Duration::from_secs_f64(arguments.interval);
    let (started, mut next, mut fault_count) = (Instant::now(), Instant::now() + interval, 0);
    while load.exit_status()?.is_none() {
        if Instant::now() < next || started.elapsed() + interval > runtime {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let what = strike(&mut cluster, &mut random)?;
        fault_count += 1;
        let healthy = cluster.wait_healthy(RESYNC_DEADLINE)?;
        let moved = healthy.groups.unwrap_or_default().resync_bytes_moved / MIB;
        println!(
            "{:6.1} s  {what}; whole again, {moved} MiB resynced so far",
            started.elapsed().as_secs_f64()
        );
        next = (next + interval).max(Instant::now());
        writer.wait_operations(10, RECONNECT)?;
    }

    let outcome = load.finish(Duration::from_secs(1))?;
    ensure!(outcome.read.bytes > 0, "fio verified nothing; run for longer");
    let report = writer.stop()?;
    report.verify(&mut cluster.connect(1, VOLUME)?, seed)?;
    if let Err(violation) = report.history.check() {
        bail!(violation);
    }
    println!(
        "{fault_count} faults; fio wrote {} MiB and verified {} MiB without an error; the writer made {} operations, \
         reconnected {} times and stalled {} ms at most; its history of {} operations is linearizable",
        outcome.write.bytes / MIB,
        outcome.read.bytes / MIB,
        report.operations,
        report.reconnects,
        report.stall.as_millis(),
        report.history.operation_count(),
    );
    cluster.stop()
}

/// One fault at a random node, and its repair where the node does not do that itself.
fn strike(cluster: &mut Cluster, random: &mut Random) -> Result<String> {
    let victim = random.index(cluster.nodes().len());
    let name = cluster.node(victim).name.clone();
    Ok(match random.index(3) {
        0 => {
            cluster.kill_data(victim)?;
            format!("{name}: data process killed")
        }
        1 => {
            cluster.kill_control(victim)?;
            format!("{name}: control process killed")
        }
        _ => {
            cluster.kill_node(victim)?;
            // Away for a random while: sometimes shorter than its lease, sometimes longer.
            thread::sleep(Duration::from_millis(random.within(0..4000)));
            cluster.restart(victim)?;
            format!("{name}: killed whole and started again")
        }
    })
}
