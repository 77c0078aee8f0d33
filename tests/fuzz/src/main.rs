//! `xsan-fuzz`: runs targets for as long as it is told to, and keeps the inputs that are findings.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use xsan_fuzz::campaign::{self, Outcome, Until};
use xsan_fuzz::target::Target;
use xsan_fuzz::{corpus, targets};

/// An input on which a decoder works longer than this is a finding.
const HANG_AFTER: Duration = Duration::from_secs(20);

/// A year, and no longer than clocks reckon with.
const MINUTES_MAX: f64 = 525_600.0;

/// Gives mutated encodings to the decoders of XSAN, and checks what they make of them.
#[derive(Parser)]
#[command(name = "fuzz")]
struct Options {
    /// Targets to run, one after the other; without any, all.
    targets: Vec<String>,
    /// Minutes for each target.
    #[arg(long, default_value_t = 2.0, value_parser = minutes)]
    minutes: f64,
    /// The same seed makes the same inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs input N of the seed alone.
    #[arg(long, value_name = "N")]
    at: Option<u64>,
    /// Runs the content of FILE as an input.
    #[arg(long, value_name = "FILE")]
    file: Option<std::path::PathBuf>,
    /// Prints the number of each input before it runs: names the one that ends the whole process.
    #[arg(long)]
    trace: bool,
    /// Lists the targets.
    #[arg(long)]
    list: bool,
}

/// In no time at all nothing is run, and nothing found.
fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "is not a number".to_owned())?;
    if minutes > 0.0 && minutes <= MINUTES_MAX {
        Ok(minutes)
    } else {
        Err(format!("is not above 0 and at most {MINUTES_MAX}"))
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// `false`: there was a finding.
fn run(options: &Options) -> anyhow::Result<bool> {
    if options.list {
        for target in targets::all() {
            println!("{:14} {}", target.name, target.what);
        }
        return Ok(true);
    }
    let find =
        |name: &String| targets::named(name).with_context(|| format!("no target {name}; --list shows them"));
    let chosen = options.targets.iter().map(find).collect::<anyhow::Result<Vec<_>>>()?;
    if let Some(file) = &options.file {
        ensure!(chosen.len() == 1, "name the one target that {} is for", file.display());
        let input = std::fs::read(file).with_context(|| file.display().to_string())?;
        let outcome = campaign::run_one(chosen[0], &input);
        println!("{}: {outcome:?}", chosen[0].name);
        return Ok(!matches!(outcome, Outcome::Finding(_)));
    }
    watch_for_hangs(options.seed);
    let mut clean = true;
    let every: Vec<_> = targets::all().collect();
    for target in if chosen.is_empty() { every } else { chosen } {
        clean &= run_target(target, options)?;
    }
    Ok(clean)
}

fn run_target(target: &'static Target, options: &Options) -> anyhow::Result<bool> {
    let (first, until) = match options.at {
        Some(number) => (number, Until::Inputs(1)),
        None => (0, Until::Time(Instant::now() + Duration::from_secs_f64(options.minutes * 60.0))),
    };
    let summary = campaign::run(target, options.seed, first, until, |number, input| {
        set_running(Some((target.name, number, Instant::now())));
        if options.trace {
            println!("{} input {number}, {} bytes", target.name, input.len());
        }
    });
    set_running(None);
    ensure!(summary.inputs > 0, "{}: the time was over before the first input; give it more", target.name);
    let seconds = summary.elapsed.as_secs_f64().max(1e-9);
    println!(
        "{:14} {:>10} inputs in {seconds:>6.1} s, {:>7.0} a second, {:>5.1} % accepted{}",
        target.name,
        summary.inputs,
        summary.inputs as f64 / seconds,
        100.0 * summary.accepted as f64 / summary.inputs.max(1) as f64,
        if summary.known > 0 { format!(", {} known panics", summary.known) } else { String::new() },
    );
    let Some((number, input, what)) = summary.finding else { return Ok(true) };
    println!("FINDING in {}: {what}", target.name);
    println!("  again: tools/fuzz {} --seed {} --at {number}", target.name, options.seed);
    let small = campaign::minimise(target, &input);
    if let Outcome::Finding(what) = campaign::run_one(target, &small) {
        println!("  made small, {} of {} bytes: {what}", small.len(), input.len());
    }
    let file = corpus::save(target.name, &small)?;
    println!("  kept: {}", file.display());
    Ok(false)
}

/// The input that runs now and when it began.
static RUNNING: Mutex<Option<(&str, u64, Instant)>> = Mutex::new(None);

fn set_running(running: Option<(&'static str, u64, Instant)>) {
    *RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = running;
}

/// Ends the process when an input takes too long, and says which.
fn watch_for_hangs(seed: u64) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let running = *RUNNING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some((name, number, began)) = running
                && began.elapsed() > HANG_AFTER
            {
                println!("FINDING in {name}: an input takes more than {} s", HANG_AFTER.as_secs());
                println!("  again: tools/fuzz {name} --seed {seed} --at {number}");
                std::process::exit(1);
            }
        }
    });
}
