//! The soak: random faults under a verifying load, for as many minutes as wanted. Started by `tools/soak`.
//!
//! fio works through a bridge that reconnects, so that its own gateway's process may die as well. Beside it a crowd
//! of depth-1 clients, one through each gateway, reads and writes the same pages; a new one for each fault, so that its
//! stalls are the fault's. Between two faults the cluster must become whole again: never are two nodes away at once, but
//! when all are killed. A stall that is longer than what docs/testing.md promises ends it, and so does a connection that broke
//! though its gateway's process lived.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field, Summary};
use xsan_tests::device::LoopDevice;
use xsan_tests::fio::{Job, Load};
use xsan_tests::node::{NodeOptions, Part};
use xsan_tests::random::Random;
use xsan_tests::switch::Link;
use xsan_tests::tools::Export;

const MIB: u64 = 1 << 20;
const NODES: usize = 3;
const VOLUME: &str = "soak";
const FIO_BYTES: u64 = 512 * MIB;
/// Where the crowds work, behind what fio writes: room for 7,722 faults, 17 hours with one every 8 seconds.
const FIELD_FIRST_PAGE: u64 = 600 * MIB / 4096;
const FIELD_PAGES: u64 = (2048 - 600) * MIB / 4096;
const DEVICE_BYTES: u64 = 4096 * MIB;
const RECONNECT: Duration = Duration::from_secs(30);
/// Answers that every client must have had before a fault, and after it.
const OPERATIONS: u64 = 100;
/// What docs/testing.md promises to clients of gateways that nothing was done to.
const STALL_MAX: Duration = Duration::from_secs(4);
const ONE_WAY_STALL_MAX: Duration = Duration::from_secs(6);

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
    /// Not only kills: pauses, cut, lossy and slow links, failing devices, and all nodes killed at once (needs root)
    #[arg(long)]
    all: bool,
}

/// What is done to one node, or to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    KillData,
    KillControl,
    KillNode,
    PauseData,
    PauseControl,
    PauseNode,
    /// From all others, both ways.
    CutOff,
    /// It hears nobody.
    Deaf,
    /// Nobody hears it.
    Mute,
    /// From one other, both ways; the third hears both.
    CutPair,
    Lossy,
    Slow,
    /// Its device turns read-only; it is mended, and the data process started again.
    FailDevice,
    KillAll,
}

impl Fault {
    /// How long clients of other gateways may wait; `None`: there are no others, or TCP alone decides.
    const fn stall_max(self) -> Option<Duration> {
        match self {
            Self::Deaf | Self::Mute => Some(ONE_WAY_STALL_MAX),
            Self::Lossy | Self::Slow | Self::KillAll => None,
            _ => Some(STALL_MAX),
        }
    }

    /// How many connections it ends: those whose gateway's process dies. When all nodes die, one after the other, a client
    /// may have gone on to the next one, which then dies as well.
    const fn losses(self) -> RangeInclusive<u64> {
        match self {
            Self::KillData | Self::KillNode | Self::FailDevice => 1..=1,
            Self::KillAll => 3..=6,
            _ => 0..=0,
        }
    }
}

const KILLS: &[Fault] = &[Fault::KillData, Fault::KillControl, Fault::KillNode];
const ALL: &[Fault] = &[
    Fault::KillData,
    Fault::KillControl,
    Fault::KillNode,
    Fault::PauseData,
    Fault::PauseControl,
    Fault::PauseNode,
    Fault::CutOff,
    Fault::Deaf,
    Fault::Mute,
    Fault::CutPair,
    Fault::Lossy,
    Fault::Slow,
    Fault::FailDevice,
    Fault::KillAll,
];

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
            eprintln!(
                "again: tools/soak --minutes {} --interval {} --seed {seed}{}",
                arguments.minutes,
                arguments.interval,
                if arguments.all { " --all" } else { "" }
            );
            ExitCode::FAILURE
        }
    }
}

/// A cluster behind a switch, each of its nodes on a device that can be made to fail.
fn on_devices(options: NodeOptions, seed: u64) -> Result<Cluster> {
    let mut cluster = Cluster::prepare_switched(NODES, options, seed)?;
    for node in 0..NODES {
        let file = cluster.directory().join(format!("device-{node}.img"));
        cluster.use_device(node, LoopDevice::over_file(&file, DEVICE_BYTES)?);
    }
    cluster.add_nodes(NODES)?;
    Ok(cluster)
}

fn soak(arguments: &Arguments, seed: u64) -> Result<()> {
    let options = NodeOptions::default();
    let (mut cluster, kinds) = if arguments.all {
        (on_devices(options, seed)?, ALL)
    } else {
        (Cluster::start_with(NODES, options)?, KILLS)
    };
    cluster.create_volume(VOLUME, "2GiB", NODES)?;
    let bridge = Export::bridge(cluster.directory(), cluster.node(0).nbd, VOLUME, RECONNECT)?;
    let uri = bridge.uri();
    let runtime = Duration::from_secs_f64(arguments.minutes * 60.0);
    let job = Job { runtime: Some(runtime), ..Job::verified(&uri, 0, FIO_BYTES, seed) };
    let mut load = Load::start(&job, &cluster.directory().join("fio.json"))?;

    let mut random = Random::new(seed);
    let interval = Duration::from_secs_f64(arguments.interval);
    let mut tallies: BTreeMap<Fault, Tally> = BTreeMap::new();
    let (started, mut next, mut round) = (Instant::now(), Instant::now() + interval, 0);
    while load.exit_status()?.is_none() {
        if Instant::now() < next || started.elapsed() + interval > runtime {
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        let fault = kinds[random.index(kinds.len())];
        let at = started.elapsed().as_secs_f64();
        let (what, summary) = strike(&mut cluster, &mut random, fault, round, seed)?;
        tallies.entry(fault).or_default().add(&summary);
        println!(
            "{at:6.1} s  {what}; whole and linearizable, {} operations, stalls {} ms, elsewhere {} ms",
            summary.operations,
            summary.stall.as_millis(),
            summary.stall_elsewhere.as_millis()
        );
        round += 1;
        next = (next + interval).max(Instant::now());
    }

    ensure!(round > 0, "no fault was injected; run for longer, or with a shorter --interval");
    let outcome = load.finish(Duration::from_secs(1))?;
    ensure!(outcome.read.bytes > 0, "fio verified nothing; run for longer");
    print(&tallies);
    println!(
        "{round} faults, no violation; fio wrote {} MiB and verified {} MiB without an error",
        outcome.write.bytes / MIB,
        outcome.read.bytes / MIB
    );
    cluster.stop()
}

fn print(tallies: &BTreeMap<Fault, Tally>) {
    println!(
        "{:<14}{:>8}{:>14}{:>18}{:>24}",
        "fault", "times", "operations", "longest stall", "stall of other clients"
    );
    for (fault, tally) in tallies {
        println!(
            "{:<14}{:>8}{:>14}{:>15} ms{:>21} ms",
            format!("{fault:?}"),
            tally.faults,
            tally.operations,
            tally.stall.as_millis(),
            tally.stall_elsewhere.as_millis()
        );
    }
}

/// One fault under a crowd, its end, and what the crowd saw.
fn strike(
    cluster: &mut Cluster,
    random: &mut Random,
    fault: Fault,
    round: u64,
    seed: u64,
) -> Result<(String, Summary)> {
    let crowd =
        Crowd::start(cluster, VOLUME, Field { first: FIELD_FIRST_PAGE, pages: FIELD_PAGES, round }, seed)?;
    crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[])?;
    let victim = random.index(NODES);
    let mut touched = vec![victim];
    // Sometimes shorter than a lease, sometimes longer.
    let held = Duration::from_millis(random.within(200..6000));
    let switched = |cluster: &mut Cluster, cuts: &[(usize, usize)], link: Link| {
        cuts.iter().for_each(|(from, to)| cluster.switch().set(*from, *to, link));
        cluster.avoid(victim);
        thread::sleep(held);
        cluster.heal();
    };
    let others = [(victim + 1) % NODES, (victim + 2) % NODES];
    let to_victim = others.map(|other| (other, victim));
    let from_victim = others.map(|other| (victim, other));
    let both = [to_victim, from_victim].concat();
    match fault {
        Fault::KillData => {
            cluster.kill_data(victim)?;
        }
        Fault::KillControl => {
            cluster.kill_control(victim)?;
        }
        Fault::KillNode => {
            cluster.kill_node(victim)?;
            thread::sleep(held);
            cluster.restart(victim)?;
        }
        Fault::PauseData => pause(cluster, victim, Part::Data, held)?,
        Fault::PauseControl => pause(cluster, victim, Part::Control, held)?,
        Fault::PauseNode => pause(cluster, victim, Part::All, held)?,
        Fault::CutOff => switched(cluster, &both, Link::CUT),
        Fault::Deaf => switched(cluster, &to_victim, Link::CUT),
        Fault::Mute => switched(cluster, &from_victim, Link::CUT),
        Fault::CutPair => {
            touched.push(others[0]);
            switched(cluster, &[to_victim[0], from_victim[0]], Link::CUT);
        }
        Fault::Lossy => switched(cluster, &both, Link::lossy(10)),
        Fault::Slow => switched(cluster, &both, Link::slow(Duration::from_millis(50))),
        Fault::FailDevice => {
            cluster.device(victim).set_read_only(true)?;
            thread::sleep(held);
            cluster.device(victim).set_read_only(false)?;
            cluster.kill_data(victim)?;
        }
        Fault::KillAll => {
            touched = (0..NODES).collect();
            cluster.kill_all()?;
            cluster.start_again(&touched)?;
        }
    }
    cluster.wait_healthy(RESYNC_DEADLINE)?;
    crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[])?;
    let summary = crowd.finish(cluster, &touched)?;
    let losses = summary.losses;
    ensure!(fault.losses().contains(&losses), "{fault:?}: {losses} connections broke");
    if let Some(most) = fault.stall_max() {
        ensure!(
            summary.stall_elsewhere < most,
            "{fault:?}: a client of another gateway waited {:?}, more than {most:?}",
            summary.stall_elsewhere
        );
    }
    let name = if fault == Fault::KillAll { "all nodes" } else { &cluster.node(victim).name };
    Ok((format!("{name}: {fault:?}, {} ms", held.as_millis()), summary))
}

fn pause(cluster: &mut Cluster, victim: usize, part: Part, held: Duration) -> Result<()> {
    cluster.avoid(victim);
    let paused = cluster.pause(victim, part)?;
    thread::sleep(held);
    paused.resume();
    cluster.heal();
    Ok(())
}
