//! `xsan-sim`: runs seeds of the simulator, and says how to run the failing one again.

use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use xsan_sim::{Plan, Summary, Violation};

/// Simulates whole clusters under faults, a seed at a time, and checks that nothing acknowledged is lost.
#[derive(Parser)]
#[command(name = "xsan-sim")]
struct Options {
    /// How many seeds to run, from --first on.
    #[arg(long, default_value_t = 1000)]
    seeds: u64,
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Runs this seed alone, and prints its log when it fails; with XSAN_LOG=debug also what the code under test logs.
    #[arg(long)]
    seed: Option<u64>,
    /// Stops after so many minutes, whatever is left.
    #[arg(long)]
    minutes: Option<f64>,
    /// Threads; each runs seeds of its own.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Lines of a failing seed's log that are printed.
    #[arg(long, default_value_t = 60)]
    log_lines: usize,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (first, count) = options.seed.map_or((options.first, options.seeds), |seed| (seed, 1));
    let deadline = options.minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0));
    // A panic is reported with its seed, by the thread that ran it.
    std::panic::set_hook(Box::new(|panic| {
        if let Some(location) = panic.location() {
            eprintln!("panic at {location}");
        }
    }));
    if let Ok(filter) = std::env::var("XSAN_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    let next = AtomicU64::new(first);
    let stop = AtomicBool::new(false);
    let total = Mutex::new((0_u64, Summary::default()));
    let failure: Mutex<Option<(u64, Violation)>> = Mutex::new(None);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
                    if seed >= first + count || late || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    match xsan_sim::run(&Plan::of(seed)) {
                        Ok(summary) => {
                            let mut total = total.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            total.0 += 1;
                            total.1.add(&summary);
                            if total.0 % 100 == 0 {
                                print_progress(total.0, &total.1, started);
                            }
                        }
                        Err(violation) => {
                            stop.store(true, Ordering::Relaxed);
                            let mut failure =
                                failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            if failure.as_ref().is_none_or(|(other, _)| seed < *other) {
                                *failure = Some((seed, violation));
                            }
                        }
                    }
                }
            });
        }
    });
    let total = total.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    print_progress(total.0, &total.1, started);
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        None => ExitCode::SUCCESS,
        Some((seed, violation)) => {
            println!("seed {seed}: {}", violation.what);
            let skip = violation.log.len().saturating_sub(options.log_lines);
            violation.log.iter().skip(skip).for_each(|line| println!("  {line}"));
            println!("replay: tools/sim --seed {seed}");
            ExitCode::FAILURE
        }
    }
}

fn print_progress(seeds: u64, total: &Summary, started: Instant) {
    println!(
        "{seeds} seeds, {} operations answered, {} lost, {} faults, {:.1} h of virtual time in {:.0} s, longest {:.1} s",
        total.answered,
        total.failed,
        total.faults,
        total.virtual_ns as f64 / 3.6e12,
        started.elapsed().as_secs_f64(),
        total.longest_ns as f64 / 1e9,
    );
}
