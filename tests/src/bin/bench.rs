//! The benchmark: XSAN over NBD beside raw fio and an unreplicated qemu-nbd export, each alone, in one run.
//!
//! Started by `benches/run`. Writes docs/performance.md: medians of the repeats, ratios to what ran beside
//! it, CPU of the serving processes for each operation, and the machine. Nothing in that page is written by
//! hand.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use xsan_tests::cluster::Cluster;
use xsan_tests::fio::{Direction, Job, Target};
use xsan_tests::machine;
use xsan_tests::network::Network;
use xsan_tests::node::NodeOptions;
use xsan_tests::process::{self, Usage};
use xsan_tests::tools::raw_export;

const GIB: u64 = 1 << 30;
/// What is read and written: larger than any cache of a gateway, small enough for three replicas on one disk.
const REGION_BYTES: u64 = GIB;
const VOLUME: &str = "bench";
/// Floors of the first release.
const WRITE_LATENCY_RATIO_MAX: f64 = 12.0;
const RANDOM_WRITE_RATE_MIN: f64 = 12_000.0;
const RANDOM_READ_RATE_MIN: f64 = 25_000.0;

#[derive(Debug, Parser)]
struct Arguments {
    /// Seconds of each measurement
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Measurements of which the median is taken
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// The page that is written
    #[arg(long, default_value = "docs/performance.md", overrides_with = "output")]
    output: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    MicrosecondsP50,
    OperationsPerSecond,
    MegabytesPerSecond,
}

#[derive(Clone, Copy, Debug)]
struct Work {
    name: &'static str,
    pattern: &'static str,
    block_size: &'static str,
    depth: u32,
    unit: Unit,
}

const SEQUENTIAL_WRITE: Work = Work {
    name: "1 MiB sequential write, depth 8",
    pattern: "write",
    block_size: "1m",
    depth: 8,
    unit: Unit::MegabytesPerSecond,
};

const WORKS: [Work; 6] = [
    Work::small("4 KiB random write, depth 1", "randwrite", 1, Unit::MicrosecondsP50),
    Work::small("4 KiB random write, depth 32", "randwrite", 32, Unit::OperationsPerSecond),
    Work::small("4 KiB random read, depth 1", "randread", 1, Unit::MicrosecondsP50),
    Work::small("4 KiB random read, depth 32", "randread", 32, Unit::OperationsPerSecond),
    SEQUENTIAL_WRITE,
    Work { name: "1 MiB sequential read, depth 8", pattern: "read", ..SEQUENTIAL_WRITE },
];

impl Work {
    const fn small(name: &'static str, pattern: &'static str, depth: u32, unit: Unit) -> Self {
        Self { name, pattern, block_size: "4k", depth, unit }
    }
}

/// Medians of one work on one system.
#[derive(Clone, Copy, Debug, Default)]
struct Figure {
    value: f64,
    /// CPU of the serving processes for each operation; `None` where nothing serves.
    cpu_us: Option<f64>,
}

fn main() -> ExitCode {
    match bench(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the benchmark failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    let base = PathBuf::from(std::env::var_os("XSAN_WORK_DIR").unwrap_or_else(|| ".".into()));
    let raw = raw(arguments, &base)?;
    let qemu = qemu_nbd(arguments, &base)?;
    let xsan = xsan(arguments)?;
    let page = page(arguments, &base, &raw, &qemu, &xsan)?;
    print!("\n{page}");
    fs::write(&arguments.output, &page)?;
    println!("\nwritten to {} after {:.0} s", arguments.output.display(), started.elapsed().as_secs_f64());
    Ok(())
}

fn raw(arguments: &Arguments, base: &Path) -> Result<Vec<Figure>> {
    println!("raw: fio with io_uring and O_DIRECT on a file");
    let path = base.join("raw.img");
    make_file(&path)?;
    let figures = measure(arguments, base, &Target::File(&path), None)?;
    fs::remove_file(&path)?;
    Ok(figures)
}

fn qemu_nbd(arguments: &Arguments, base: &Path) -> Result<Vec<Figure>> {
    println!("qemu-nbd: the same file behind NBD, one copy");
    let path = base.join("qemu.img");
    make_file(&path)?;
    let network = Network::take()?;
    let address = network.nbd(0);
    let server = raw_export(address, &path)?;
    let uri = format!("nbd://{address}");
    let usage = || process::usage(server.pid());
    let figures = measure(arguments, base, &Target::Nbd(&uri), Some(&usage))?;
    drop(server);
    fs::remove_file(&path)?;
    Ok(figures)
}

fn xsan(arguments: &Arguments) -> Result<Vec<Figure>> {
    println!("XSAN: three nodes, three replicas");
    let options =
        NodeOptions { file_size: "6GiB".to_owned(), memory: "128MiB".to_owned(), ..NodeOptions::one_shard() };
    let cluster = Cluster::start_with(3, options)?;
    cluster.create_volume(VOLUME, "1GiB", 3)?;
    let uri = cluster.uri(0, VOLUME);
    let usage = || cluster.usage();
    let figures = measure(arguments, cluster.directory(), &Target::Nbd(&uri), Some(&usage))?;
    cluster.stop()?;
    Ok(figures)
}

fn make_file(path: &Path) -> Result<()> {
    File::create(path)?.set_len(REGION_BYTES)?;
    Ok(())
}

/// Fills the region once, so that everything read was written, and then measures each work.
fn measure(
    arguments: &Arguments,
    directory: &Path,
    target: &Target<'_>,
    usage: Option<&dyn Fn() -> Result<Usage>>,
) -> Result<Vec<Figure>> {
    let report = directory.join("bench.json");
    job(&SEQUENTIAL_WRITE, target, None, 0).run(&report).context("filling the region")?;
    let mut figures = Vec::new();
    for work in &WORKS {
        let mut values = Vec::new();
        let mut cpus = Vec::new();
        for repeat in 0..arguments.repeats {
            let before = usage.map(|usage| usage()).transpose()?;
            let runtime = Duration::from_secs(arguments.seconds);
            let outcome = job(work, target, Some(runtime), repeat as u64 + 1).run(&report)?;
            let direction = if work.pattern.ends_with("write") { outcome.write } else { outcome.read };
            values.push(value(work.unit, &direction));
            if let (Some(before), Some(usage)) = (before, usage) {
                let spent = usage()?.cpu.saturating_sub(before.cpu);
                cpus.push(spent.as_secs_f64() * 1e6 / direction.operations.max(1) as f64);
            }
        }
        let figure = Figure { value: median(&mut values), cpu_us: usage.map(|_| median(&mut cpus)) };
        println!("  {:34} {}", work.name, shown(work.unit, figure.value));
        figures.push(figure);
    }
    Ok(figures)
}

fn job<'a>(work: &Work, target: &Target<'a>, runtime: Option<Duration>, seed: u64) -> Job<'a> {
    Job {
        target: target.clone(),
        pattern: work.pattern,
        block_size: work.block_size,
        depth: work.depth,
        offset: 0,
        size: REGION_BYTES,
        runtime,
        verify: false,
        seed,
    }
}

fn value(unit: Unit, direction: &Direction) -> f64 {
    match unit {
        Unit::MicrosecondsP50 => direction.latency_us_p50,
        Unit::OperationsPerSecond => direction.operations_per_second,
        Unit::MegabytesPerSecond => direction.bytes_per_second / 1e6,
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn shown(unit: Unit, value: f64) -> String {
    match unit {
        Unit::MicrosecondsP50 => format!("{value:.0} µs"),
        Unit::OperationsPerSecond => format!("{}/s", thousands(value)),
        Unit::MegabytesPerSecond => format!("{} MB/s", thousands(value)),
    }
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn page(
    arguments: &Arguments,
    base: &Path,
    raw: &[Figure],
    qemu: &[Figure],
    xsan: &[Figure],
) -> Result<String> {
    let mut page = String::from("# Performance\n\n");
    writeln!(
        page,
        "Written by `benches/run --seconds {} --repeats {}`; not edited by hand. Three nodes on the loopback of \
         one host, all of their devices files on one disk, checksums and replication on. Each system was measured \
         alone, in the same run, after its region of 1 GiB was filled; medians. Figures differ between machines: \
         compare what stands side by side.\n",
        arguments.seconds, arguments.repeats
    )?;
    page.push_str(
        "| work | raw fio | qemu-nbd, 1 copy | XSAN over NBD, 3 copies | XSAN ÷ raw | XSAN ÷ qemu-nbd |\n",
    );
    page.push_str("| --- | ---: | ---: | ---: | ---: | ---: |\n");
    for (index, work) in WORKS.iter().enumerate() {
        let [raw, qemu, xsan] = [raw, qemu, xsan].map(|figures| figures[index].value);
        let name = match work.unit {
            Unit::MicrosecondsP50 => format!("{}, p50", work.name),
            _ => work.name.to_owned(),
        };
        let [raw_shown, qemu_shown, xsan_shown] = [raw, qemu, xsan].map(|value| shown(work.unit, value));
        writeln!(
            page,
            "| {name} | {raw_shown} | {qemu_shown} | {xsan_shown} | {:.2} | {:.2} |",
            xsan / raw,
            xsan / qemu
        )?;
    }
    page.push_str("\nCPU of the serving processes (user and system, all nodes) for each operation:\n\n");
    page.push_str("| work | qemu-nbd, 1 copy | XSAN over NBD, 3 copies |\n| --- | ---: | ---: |\n");
    for (index, work) in WORKS.iter().enumerate() {
        let cpu = |figures: &[Figure]| {
            figures[index].cpu_us.map_or_else(|| "–".to_owned(), |cpu| format!("{} µs", thousands(cpu)))
        };
        writeln!(page, "| {} | {} | {} |", work.name, cpu(qemu), cpu(xsan))?;
    }
    page.push_str("\nFloors of the first release:\n\n| floor | measured | met |\n| --- | ---: | --- |\n");
    let ratio = xsan[0].value / raw[0].value;
    let verdict = |met: bool| if met { "yes" } else { "**no**" };
    writeln!(
        page,
        "| depth-1 write latency ≤ {WRITE_LATENCY_RATIO_MAX} × raw | {ratio:.1} × | {} |",
        verdict(ratio <= WRITE_LATENCY_RATIO_MAX)
    )?;
    for (index, name, floor) in [
        (1, "random write, depth 32", RANDOM_WRITE_RATE_MIN),
        (3, "random read, depth 32", RANDOM_READ_RATE_MIN),
    ] {
        let rate = xsan[index].value;
        writeln!(
            page,
            "| {name} ≥ {}/s | {}/s | {} |",
            thousands(floor),
            thousands(rate),
            verdict(rate >= floor)
        )?;
    }
    page.push_str("\nThe machine:\n\n");
    for (name, value) in machine::describe(base)?.into_iter().chain(machine::tools()?) {
        writeln!(page, "- {name}: {value}")?;
    }
    Ok(page)
}
