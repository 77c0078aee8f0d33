//! What moving data costs: a node's return, rebuild, join, maintenance and removal, and a deep scrub, each under a foreground
//! load; and what a slow node costs, with and without the operator's leave to demote it.
//!
//! Started by `benches/moves`. Writes docs/moving-data.md: bytes moved beside what had to be moved, the time it took, and the
//! p99 of foreground writes meanwhile beside that of the quiet cluster. Nothing in that page is written by hand.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use xsan_protocol::proto::{ClusterStatusReply, NodeStatus};
use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::control::is_healthy;
use xsan_tests::fio::{Job, Target};
use xsan_tests::machine;
use xsan_tests::node::{NodeOptions, Part};

const GIB: u64 = 1 << 30;
const VOLUME: &str = "vm";
/// The foreground works on the first of these bytes; the rest was written before.
const FOREGROUND_BYTES: u64 = GIB / 4;
const REPLICAS: usize = 3;
/// Foreground operations a second, half of them writes: a load that leaves the machine room.
const FOREGROUND_RATE: u32 = 1000;
/// Data moves in units of it.
const UNIT_BYTES: u64 = 64 << 10;
const QUIET_SLICES: usize = 7;
/// So many slices are written while a node is in maintenance.
const MISSED_SLICES: usize = 10;
/// One measurement of the foreground; a phase is as many as it takes.
const SLICE: Duration = Duration::from_secs(2);
const PHASE_DEADLINE: Duration = Duration::from_secs(900);
/// The slow node's data process stands still for this long, and then runs for as long.
const STOPPED: Duration = Duration::from_millis(50);
const SLOW_SLICES: usize = 5;
/// Promised: bytes moved beside what had to be moved, and the foreground's p99 beside the quiet cluster's.
const MOVED_RATIO_MAX: f64 = 1.1;
const P99_RATIO_MAX: f64 = 2.0;

#[derive(Debug, Parser)]
struct Arguments {
    /// GiB that are written before anything moves
    #[arg(long, default_value_t = 2)]
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
    /// Medians over the slices of the quiet cluster just before, and of the phase.
    p99_quiet_us: f64,
    p99_us: f64,
    p99_worst_us: f64,
}

/// A node that is far slower than its peers: medians of p99.
struct SlowNode {
    p99_quiet_us: f64,
    p99_waiting_us: f64,
    p99_demoted_us: f64,
    /// From the order to demote slow nodes until it acted nowhere, and from its mending until it acted everywhere.
    demoted_after: Duration,
    back_after: Duration,
}

fn main() -> ExitCode {
    match moves(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("the measurement failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn moves(arguments: &Arguments) -> Result<bool> {
    let options =
        NodeOptions { file_size: "6GiB".to_owned(), memory: "128MiB".to_owned(), ..NodeOptions::default() };
    let mut cluster = Cluster::start_with(4, options)?;
    cluster.create_volume(VOLUME, &format!("{}GiB", arguments.gib + 1), REPLICAS)?;
    cluster.cli(&["cluster", "set", "down-out-interval", "5s"])?.succeeded()?;
    println!("writing {} GiB", arguments.gib);
    fill(&cluster, arguments.gib * GIB)?;
    let phases = vec![
        maintenance(&mut cluster)?,
        rebuild(&mut cluster)?,
        back(&mut cluster)?,
        join(&mut cluster)?,
        remove(&mut cluster)?,
        scrub(&cluster)?,
    ];
    let slow = slow_node(&cluster)?;
    let base = cluster.directory().to_owned();
    let page = page(arguments, &base, &phases, &slow)?;
    cluster.stop()?;
    print!("\n{page}");
    fs::write(&arguments.output, page)?;
    let kept = |phase: &Phase| phase.moved_ratio() <= MOVED_RATIO_MAX && phase.p99_ratio() <= P99_RATIO_MAX;
    Ok(phases.iter().all(kept) && slow.ratio() <= P99_RATIO_MAX)
}

impl Phase {
    fn moved_ratio(&self) -> f64 {
        self.moved_bytes as f64 / self.ideal_bytes.max(1) as f64
    }

    fn p99_ratio(&self) -> f64 {
        self.p99_us / self.p99_quiet_us
    }
}

impl SlowNode {
    fn ratio(&self) -> f64 {
        self.p99_demoted_us / self.p99_quiet_us
    }
}

/// A node away in order for a while, without a rebuild: it is sent the units that were written meanwhile.
fn maintenance(cluster: &mut Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    cluster.cli(&["node", "maintenance", "node-004", "on"])?.succeeded()?;
    cluster.stop_node(3)?;
    wait(cluster, "node-004 to be away", |status| {
        groups(status).degraded > 0 && groups(status).resyncing == 0
    })?;
    let missed = some_slices(cluster, MISSED_SLICES)?;
    let (before, started) = (moved(cluster)?, Instant::now());
    cluster.restart(3)?;
    let away = cluster.nodes().len();
    let measured = measure(cluster, started, move |status| is_healthy(status, away))?;
    cluster.cli(&["node", "maintenance", "node-004", "off"])?.succeeded()?;
    // Random writes touch so many units, of which it holds three of four.
    let writes: u64 = missed.iter().map(|slice| slice.writes).sum();
    let units = (FOREGROUND_BYTES / UNIT_BYTES) as f64;
    let touched = units * (1.0 - (1.0 - 1.0 / units).powf(writes as f64));
    phase(cluster, "return from maintenance", quiet, touched as u64 * UNIT_BYTES * 3 / 4, before, measured)
}

/// A node dies for good: its replicas are made anew on the others.
fn rebuild(cluster: &mut Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    let ideal = used(&cluster.status()?, "node-004");
    cluster.kill_node(3)?;
    wait(cluster, "node-004 to be missed", |status| groups(status).degraded > 0)?;
    let before = moved(cluster)?;
    let measured = measure(cluster, Instant::now(), all_whole)?;
    phase(cluster, "rebuild after a death", quiet, ideal, before, measured)
}

/// It comes back, with a store that is out of date, and takes its share again.
fn back(cluster: &mut Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    let (before, started) = (moved(cluster)?, Instant::now());
    cluster.restart(3)?;
    let measured = measure(cluster, started, |status| all_whole(status) && is_balanced(status))?;
    let ideal = share(&cluster.status()?);
    phase(cluster, "return after the rebuild", quiet, ideal, before, measured)
}

fn join(cluster: &mut Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    let (before, started) = (moved(cluster)?, Instant::now());
    cluster.add_node()?;
    let measured = measure(cluster, started, |status| all_whole(status) && is_balanced(status))?;
    let ideal = used(&cluster.status()?, "node-005");
    phase(cluster, "join of a fifth node", quiet, ideal, before, measured)
}

fn remove(cluster: &mut Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    let ideal = used(&cluster.status()?, "node-005");
    let (before, started) = (moved(cluster)?, Instant::now());
    cluster.cli(&["node", "remove", "node-005", "--yes"])?.succeeded()?;
    let measured = measure(cluster, started, |status| status.nodes.len() == 4 && all_whole(status))?;
    // It was told that the cluster has removed it, and has ended.
    cluster.kill_node(4)?;
    phase(cluster, "removal of a node", quiet, ideal, before, measured)
}

/// Every page of every replica is read, at the default rate. What the primaries read is counted.
fn scrub(cluster: &Cluster) -> Result<Phase> {
    let quiet = quiet(cluster)?;
    let ideal = cluster.status()?.used_bytes / REPLICAS as u64;
    let (before, started) = (scrubbed(cluster)?, Instant::now());
    cluster.cli(&["scrub", "start", "--deep"])?.succeeded()?;
    let wished = || Some(cluster.cli_json(&["scrub", "status"]).ok()?["wished"].as_u64()? > 0);
    let measured = measure(cluster, started, |_| wished() == Some(false))?;
    phase_of("deep scrub", quiet, ideal, scrubbed(cluster)? - before, measured)
}

/// The data process of the last node stands still half of the time, as one whose device does.
fn slow_node(cluster: &Cluster) -> Result<SlowNode> {
    let p99_quiet_us = quiet(cluster)?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let pulse = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                let paused = cluster.pause(3, Part::Data)?;
                thread::sleep(STOPPED);
                paused.resume();
                thread::sleep(STOPPED);
            }
            Ok(())
        });
        let watched = || {
            let p99_waiting_us = median(some_slices(cluster, SLOW_SLICES)?);
            cluster.cli(&["cluster", "set", "slow-nodes", "demote"])?.succeeded()?;
            let ordered = Instant::now();
            // The findings come of the foreground's writes.
            let acts = |status: &ClusterStatusReply| acting_on(status, "node-004") > 0;
            while acts(&cluster.status()?) {
                ensure!(ordered.elapsed() < PHASE_DEADLINE, "the slow node still acts");
                some_slices(cluster, 1)?;
            }
            let demoted_after = ordered.elapsed();
            let p99_demoted_us = median(some_slices(cluster, SLOW_SLICES)?);
            Ok((p99_waiting_us, p99_demoted_us, demoted_after))
        };
        let watched: Result<(f64, f64, Duration)> = watched();
        over.store(true, Ordering::Relaxed);
        pulse.join().expect("it does not panic")?;
        let (p99_waiting_us, p99_demoted_us, demoted_after) = watched?;
        let (back_after, _) = measure(cluster, Instant::now(), all_whole)?;
        let slow = SlowNode { p99_quiet_us, p99_waiting_us, p99_demoted_us, demoted_after, back_after };
        println!(
            "a slow node: p99 {:.0} µs quiet, {:.0} µs waiting for it, {:.0} µs without it, {:.2} of quiet; back after {:.0} s",
            slow.p99_quiet_us,
            slow.p99_waiting_us,
            slow.p99_demoted_us,
            slow.ratio(),
            slow.back_after.as_secs_f64()
        );
        Ok(slow)
    })
}

fn phase(
    cluster: &Cluster,
    name: &'static str,
    p99_quiet_us: f64,
    ideal_bytes: u64,
    moved_before: u64,
    measured: (Duration, Vec<Slice>),
) -> Result<Phase> {
    phase_of(name, p99_quiet_us, ideal_bytes, moved(cluster)?.saturating_sub(moved_before), measured)
}

fn phase_of(
    name: &'static str,
    p99_quiet_us: f64,
    ideal_bytes: u64,
    moved_bytes: u64,
    (time, slices): (Duration, Vec<Slice>),
) -> Result<Phase> {
    let p99_worst_us = slices.iter().map(|slice| slice.p99_us).fold(0.0, f64::max);
    let phase =
        Phase { name, ideal_bytes, moved_bytes, time, p99_quiet_us, p99_us: median(slices), p99_worst_us };
    println!(
        "{name}: {} MiB moved, {:.2} of what had to be, in {:.1} s; p99 {:.0} µs, {:.2} of quiet, worst slice {:.0} µs",
        moved_bytes >> 20,
        phase.moved_ratio(),
        time.as_secs_f64(),
        phase.p99_us,
        phase.p99_ratio(),
        p99_worst_us,
    );
    Ok(phase)
}

// The foreground.

/// What one slice of the foreground saw.
struct Slice {
    began: Instant,
    writes: u64,
    p99_us: f64,
}

fn slices(cluster: &Cluster, mut done: impl FnMut() -> Result<bool>) -> Result<Vec<Slice>> {
    let uri = cluster.uri(0, VOLUME);
    let report = cluster.directory().join("foreground.json");
    let mut slices = Vec::new();
    loop {
        let job = Job {
            target: Target::Nbd(&uri),
            pattern: "randrw",
            block_size: "4k",
            depth: 4,
            offset: 0,
            size: FOREGROUND_BYTES,
            runtime: Some(SLICE),
            verify: false,
            seed: slices.len() as u64 + 1,
        };
        let began = Instant::now();
        let outcome = job.run_at_rate(FOREGROUND_RATE / 2, &report)?;
        slices.push(Slice { began, writes: outcome.write.operations, p99_us: outcome.write.latency_us_p99 });
        if done()? {
            return Ok(slices);
        }
    }
}

fn some_slices(cluster: &Cluster, count: usize) -> Result<Vec<Slice>> {
    let mut left = count;
    slices(cluster, || {
        left -= 1;
        Ok(left == 0)
    })
}

/// The p99 of foreground writes while nothing moves.
fn quiet(cluster: &Cluster) -> Result<f64> {
    Ok(median(some_slices(cluster, QUIET_SLICES)?))
}

fn median(mut slices: Vec<Slice>) -> f64 {
    slices.sort_by(|a, b| a.p99_us.total_cmp(&b.p99_us));
    slices.get(slices.len() / 2).map_or(0.0, |slice| slice.p99_us)
}

/// Runs the foreground until the cluster is as `reached` wants it: how long that took from `started` on, and what the
/// foreground saw.
fn measure(
    cluster: &Cluster,
    started: Instant,
    reached: impl Fn(&ClusterStatusReply) -> bool + Sync,
) -> Result<(Duration, Vec<Slice>)> {
    let over = AtomicBool::new(false);
    let control = cluster.control();
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut since = None;
            while started.elapsed() < PHASE_DEADLINE {
                thread::sleep(Duration::from_millis(100));
                match control.status() {
                    Ok(status) if reached(&status) => {
                        // Between two steps of a plan all may look well for a moment.
                        let since = *since.get_or_insert_with(Instant::now);
                        if since.elapsed() > Duration::from_secs(4) {
                            over.store(true, Ordering::Relaxed);
                            return Some(since - started);
                        }
                    }
                    _ => since = None,
                }
            }
            over.store(true, Ordering::Relaxed);
            None
        });
        let mut slices = slices(cluster, || Ok(over.load(Ordering::Relaxed)))?;
        let time = watch.join().expect("it does not panic");
        let Some(time) = time else { anyhow::bail!("not over after {} s", PHASE_DEADLINE.as_secs()) };
        // Those of the time that it took to be sure saw nothing move.
        slices.retain(|slice| slice.began - started < time);
        Ok((time, slices))
    })
}

// The cluster.

fn fill(cluster: &Cluster, bytes: u64) -> Result<()> {
    let uri = cluster.uri(0, VOLUME);
    let job = Job {
        target: Target::Nbd(&uri),
        pattern: "write",
        block_size: "1m",
        depth: 4,
        offset: 0,
        size: bytes,
        runtime: None,
        verify: false,
        seed: 1,
    };
    let outcome = job.run(&cluster.directory().join("fill.json"))?;
    ensure!(outcome.write.bytes == bytes, "fio wrote {} bytes", outcome.write.bytes);
    Ok(())
}

fn wait(cluster: &Cluster, what: &str, holds: impl Fn(&ClusterStatusReply) -> bool) -> Result<()> {
    cluster.wait_status(what, SETTLE_DEADLINE, holds).map(drop)
}

fn groups(status: &ClusterStatusReply) -> xsan_protocol::proto::GroupCounts {
    status.groups.unwrap_or_default()
}

/// Has every group all its replicas, on whatever nodes?
fn all_whole(status: &ClusterStatusReply) -> bool {
    let groups = groups(status);
    groups.total > 0 && groups.healthy == groups.total && groups.resyncing == 0
}

/// Is every node a member of about as many groups as the others?
fn is_balanced(status: &ClusterStatusReply) -> bool {
    let members = || status.nodes.iter().map(|node| node.member_groups as usize);
    let mean = members().sum::<usize>() / status.nodes.len().max(1);
    members().min().unwrap_or(0) * 10 >= mean * 8
}

fn node<'a>(status: &'a ClusterStatusReply, name: &str) -> Option<&'a NodeStatus> {
    status.nodes.iter().find(|node| node.node.as_ref().is_some_and(|node| node.name == name))
}

fn used(status: &ClusterStatusReply, name: &str) -> u64 {
    node(status, name).and_then(|node| node.used_bytes).unwrap_or(0)
}

/// What a node of this cluster holds on average.
fn share(status: &ClusterStatusReply) -> u64 {
    status.used_bytes / status.nodes.len().max(1) as u64
}

fn moved(cluster: &Cluster) -> Result<u64> {
    Ok(groups(&cluster.status()?).resync_bytes_moved)
}

/// Bytes that scrubs have read of the replicas that the nodes lead.
fn scrubbed(cluster: &Cluster) -> Result<u64> {
    let counters = cluster.control().perf_stats()?.nodes.into_iter().flat_map(|node| node.counters);
    Ok(counters.filter(|counter| counter.name == "scrub_bytes").map(|counter| counter.value).sum())
}

/// Groups that a node is an acting member of.
fn acting_on(status: &ClusterStatusReply, name: &str) -> u32 {
    node(status, name).map_or(0, |node| node.member_groups)
}

fn page(arguments: &Arguments, base: &Path, phases: &[Phase], slow: &SlowNode) -> Result<String> {
    let mut page = String::from("# Moving data\n\n");
    writeln!(
        page,
        "Written by `benches/moves --gib {}`; not edited by hand. Four nodes on the loopback of one host, {} GiB of data \
         with {REPLICAS} replicas, and a foreground of {FOREGROUND_RATE} random 4 KiB operations a second, half of them \
         writes. \"Ideal\" is what the nodes in question hold, or what was written while one was away, by whole units of \
         64 KiB; a scrub has to read what the primaries hold. p99 is that of foreground writes: the median of slices of {} s, while data moves and on the quiet cluster \
         just before.\n",
        arguments.gib,
        arguments.gib,
        SLICE.as_secs()
    )?;
    page.push_str(
        "| what | ideal | moved | moved ÷ ideal | time | p99 quiet | p99 moving | ratio | worst slice |\n",
    );
    page.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for phase in phases {
        writeln!(
            page,
            "| {} | {} MiB | {} MiB | {:.2} | {:.1} s | {:.0} µs | {:.0} µs | {:.2} | {:.0} µs |",
            phase.name,
            phase.ideal_bytes >> 20,
            phase.moved_bytes >> 20,
            phase.moved_ratio(),
            phase.time.as_secs_f64(),
            phase.p99_quiet_us,
            phase.p99_us,
            phase.p99_ratio(),
            phase.p99_worst_us
        )?;
    }
    writeln!(
        page,
        "\nPromised: moved ÷ ideal ≤ {MOVED_RATIO_MAX}, p99 ratio ≤ {P99_RATIO_MAX}.\n\n## A slow node\n\n\
         The data process of one of the four nodes stands still for {} ms of every {} ms. With `slow-nodes report` clients wait for it, \
         with `slow-nodes demote` they do not, once it is found out.\n",
        STOPPED.as_millis(),
        2 * STOPPED.as_millis()
    )?;
    page.push_str(
        "| p99 quiet | waiting for it | demoted | demoted ÷ quiet | acts nowhere after | acts again after |\n\
         | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    writeln!(
        page,
        "| {:.0} µs | {:.0} µs | {:.0} µs | {:.2} | {:.1} s | {:.1} s |\n\nThe machine:\n",
        slow.p99_quiet_us,
        slow.p99_waiting_us,
        slow.p99_demoted_us,
        slow.ratio(),
        slow.demoted_after.as_secs_f64(),
        slow.back_after.as_secs_f64()
    )?;
    for (name, value) in machine::describe(base)? {
        writeln!(page, "- {name}: {value}")?;
    }
    Ok(page)
}
