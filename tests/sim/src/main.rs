//! `xsan-sim`: runs seeds of the simulator, and says how to run the failing one again.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use xsan_protocol::mutation::Mutation;
use xsan_sim::{FAULTS, FAULTS_RARE, Plan, Summary, Violation};

/// So many seeds meet every kind of fault.
const SEEDS_OF_ALL_FAULTS: u64 = 1000;

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
    /// Sows each known bug in turn, or each of these: every one of them must be found within --seeds seeds.
    #[arg(long, value_name = "NAME", value_parser = mutation, num_args = 0.., value_delimiter = ',')]
    mutations: Option<Vec<Mutation>>,
    /// Sows this bug.
    #[arg(long, value_parser = mutation)]
    mutation: Option<Mutation>,
}

fn mutation(name: &str) -> Result<Mutation, String> {
    let known = Mutation::ALL.iter().find(|known| format!("{known:?}") == name);
    known.copied().ok_or_else(|| format!("no such mutation; there are {:?}", Mutation::ALL))
}

/// What a number of seeds came to.
struct Outcome {
    seeds: u64,
    summary: Summary,
    /// The first seed that failed.
    failure: Option<(u64, Failure)>,
}

struct Failure {
    violation: Violation,
    /// A bug was sown, and the seed fails without it, too.
    without_it: bool,
}

/// Seeds to run, and how.
struct Campaign {
    first: u64,
    seeds: u64,
    deadline: Option<Instant>,
    jobs: usize,
    mutation: Option<Mutation>,
    progress: bool,
}

impl Campaign {
    fn run(&self) -> Outcome {
        let next = AtomicU64::new(self.first);
        let stop = AtomicBool::new(false);
        let started = Instant::now();
        let outcome = Mutex::new(Outcome { seeds: 0, summary: Summary::default(), failure: None });
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.max(1) {
                scope.spawn(|| {
                    sow(self.mutation);
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                        if seed >= self.first + self.seeds || late || stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let result = self.try_seed(seed);
                        let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
                        outcome.seeds += 1;
                        match result {
                            Ok(summary) => outcome.summary.add(&summary),
                            Err(failure) => {
                                stop.store(true, Ordering::Relaxed);
                                if outcome.failure.as_ref().is_none_or(|(other, _)| seed < *other) {
                                    outcome.failure = Some((seed, failure));
                                }
                            }
                        }
                        if self.progress && outcome.seeds.is_multiple_of(100) {
                            print_progress(&outcome, started);
                        }
                    }
                });
            }
        });
        let outcome = outcome.into_inner().unwrap_or_else(PoisonError::into_inner);
        if self.progress {
            print_progress(&outcome, started);
        }
        outcome
    }

    /// Runs one seed. What it finds without the bug, too, the bug did not do.
    fn try_seed(&self, seed: u64) -> Result<Summary, Failure> {
        let failed = |violation, without_it| Failure { violation, without_it };
        let violation = match xsan_sim::run(&Plan::of(seed)) {
            Err(violation) if self.mutation.is_some() => violation,
            result => return result.map_err(|violation| failed(violation, false)),
        };
        sow(None);
        let without = xsan_sim::run(&Plan::of(seed));
        sow(self.mutation);
        match without {
            Ok(_) => Err(failed(violation, false)),
            Err(violation) => Err(failed(violation, true)),
        }
    }
}

#[cfg(feature = "mutations")]
fn sow(mutation: Option<Mutation>) {
    Mutation::sow(mutation);
}

#[cfg(not(feature = "mutations"))]
fn sow(mutation: Option<Mutation>) {
    assert!(mutation.is_none(), "built without bugs: tools/sim --mutations builds them in");
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Ok(filter) = std::env::var("XSAN_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    let minutes = |minutes: f64| Instant::now() + Duration::from_secs_f64(minutes * 60.0);
    let (first, seeds) = options.seed.map_or((options.first, options.seeds), |seed| (seed, 1));
    let campaign = Campaign {
        first,
        seeds,
        deadline: options.minutes.map(minutes),
        jobs: options.jobs,
        mutation: options.mutation,
        progress: true,
    };
    if let Some(mut mutations) = options.mutations {
        if mutations.is_empty() {
            mutations = Mutation::ALL.iter().copied().filter(|one| !one.needs_every_crash()).collect();
        }
        return find_mutations(&campaign, &mutations);
    }
    // A panic is reported with its seed, by the thread that ran it.
    std::panic::set_hook(Box::new(|panic| {
        if let Some(location) = panic.location() {
            eprintln!("panic at {location}");
        }
    }));
    let outcome = campaign.run();
    print_counts(&outcome.summary);
    let Some((seed, Failure { violation, without_it })) = outcome.failure else {
        let missing = faults_missing(&outcome);
        if !missing.is_empty() {
            println!("{} seeds met none of these: {}", outcome.seeds, missing.join(", "));
        }
        let is_good = outcome.seeds > 0 && missing.is_empty();
        return if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    };
    println!("seed {seed}: {}", violation.what);
    let skip = violation.log.len().saturating_sub(options.log_lines);
    violation.log.iter().skip(skip).for_each(|line| println!("  {line}"));
    let mutation = options.mutation.filter(|_| !without_it);
    let mutation = mutation.map(|mutation| format!(" --mutation {mutation:?}")).unwrap_or_default();
    println!("replay: tools/sim --seed {seed}{mutation}");
    ExitCode::FAILURE
}

/// What so many seeds should have met, and did not: without it, they say less than they seem to.
fn faults_missing(outcome: &Outcome) -> Vec<&'static str> {
    let met = |fault: &&str| outcome.summary.faults.contains_key(fault);
    if outcome.seeds < SEEDS_OF_ALL_FAULTS {
        Vec::new()
    } else {
        FAULTS.into_iter().filter(|fault| !met(fault)).collect()
    }
}

/// Sows the bugs in turn, and prints after how many seeds each was found, as a table of Markdown.
fn find_mutations(campaign: &Campaign, mutations: &[Mutation]) -> ExitCode {
    std::panic::set_hook(Box::new(|_| {}));
    println!("| bug | what goes wrong | found after seeds | as |");
    println!("| --- | --- | ---: | --- |");
    let mut missed = 0;
    for &mutation in mutations {
        let outcome = Campaign { mutation: Some(mutation), progress: false, ..*campaign }.run();
        let found = match outcome.failure {
            Some((seed, failure)) if failure.without_it => {
                missed += 1;
                format!("seed {seed} fails without it | {}", in_short(&failure.violation.what))
            }
            Some((seed, failure)) => {
                format!("{} | {}", seed - campaign.first + 1, in_short(&failure.violation.what))
            }
            None => {
                missed += 1;
                format!("not after {} | ", outcome.seeds)
            }
        };
        println!("| {mutation:?} | {} | {found} |", mutation.what());
    }
    println!("\n{} of {} found", mutations.len() - missed, mutations.len());
    if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The first words of what was violated.
fn in_short(what: &str) -> String {
    let line = what.lines().next().unwrap_or_default().replace('|', "/");
    if line.chars().count() > 80 { line.chars().take(80).chain(['…']).collect() } else { line }
}

/// What went wrong in all the seeds together, and why operations ended, as tables of Markdown.
fn print_counts(summary: &Summary) {
    println!("\n| fault | times |\n| --- | ---: |");
    for fault in FAULTS.iter().chain(&FAULTS_RARE) {
        println!("| {fault} | {} |", summary.faults.get(fault).copied().unwrap_or(0));
    }
    println!("\n| operations that ended without a good answer | times |\n| --- | ---: |");
    summary.ended.iter().for_each(|(why, count)| println!("| {why} | {count} |"));
    println!();
}

fn print_progress(outcome: &Outcome, started: Instant) {
    let Outcome { seeds, summary, .. } = outcome;
    println!(
        "{seeds} seeds, {} operations answered, {} lost, {} faults, {:.1} h of virtual time in {:.0} s, longest {:.1} s",
        summary.answered,
        summary.failed,
        summary.faults.values().sum::<u64>(),
        summary.virtual_ns as f64 / 3.6e12,
        started.elapsed().as_secs_f64(),
        summary.longest_ns as f64 / 1e9,
    );
}
