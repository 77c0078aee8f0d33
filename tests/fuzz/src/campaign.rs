//! Running inputs: one under the eyes of the panic hook, many from a seed, and a finding made small.

use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::time::{Duration, Instant};

use xsan_dataplane::testing::Random;
use xsan_protocol::checksum::crc64;

use crate::mutate;
use crate::target::{Target, Verdict};

/// A finding is made smaller for no longer than this.
const MINIMISE_MAX: Duration = Duration::from_secs(20);

thread_local! {
    /// Where the last panic of this thread was, and what it said.
    static PANIC: RefCell<Option<Panic>> = const { RefCell::new(None) };
}

#[derive(Clone, Debug)]
struct Panic {
    file: String,
    line: u32,
    message: String,
}

/// What came of one input.
#[derive(Debug)]
pub enum Outcome {
    Passed(Verdict),
    /// A panic that the target names as known.
    Known,
    Finding(String),
}

/// Panics are caught and told with the input that made them, so they print nothing by themselves.
fn keep_panics_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // A panic outside a decoder (an assertion of a test) is nobody's finding.
            if !PANIC.with_borrow(|panic| panic.is_some()) {
                return loud(info);
            }
            let (file, line) =
                info.location().map_or((String::new(), 0), |at| (at.file().to_owned(), at.line()));
            let (file, line) =
                if file.starts_with("/rustc/") { caller().unwrap_or((file, line)) } else { (file, line) };
            let message = info.payload_as_str().unwrap_or("a panic without a message").to_owned();
            PANIC.set(Some(Panic { file, line, message }));
        }));
    });
}

/// The first place of ours on the stack: where the standard library panics says little.
fn caller() -> Option<(String, u32)> {
    let stack = Backtrace::force_capture().to_string();
    let own = ["/dataplane/src/", "/protocol/src/", "/controlplane/src/", "/nodekit/src/"];
    let line = stack.lines().find(|line| own.iter().any(|part| line.contains(part)))?;
    let mut parts = line.trim().trim_start_matches("at ").rsplitn(3, ':').skip(1);
    let number = parts.next()?.parse().ok()?;
    Some((parts.next()?.to_owned(), number))
}

/// Decodes one input and checks it.
pub fn run_one(target: &Target, input: &[u8]) -> Outcome {
    keep_panics_quiet();
    // Tells the hook that this panic, if one comes, is a finding.
    PANIC.set(Some(Panic { file: String::new(), line: 0, message: String::new() }));
    let result = catch_unwind(AssertUnwindSafe(|| (target.check)(input)));
    let panic = PANIC.take();
    match result {
        Ok(Ok(verdict)) => Outcome::Passed(verdict),
        Ok(Err(error)) => Outcome::Finding(format!("{error:#}")),
        Err(_) => {
            let Some(Panic { file, line, message }) = panic else {
                return Outcome::Finding("a panic that the hook did not see".to_owned());
            };
            let known = target
                .known
                .iter()
                .any(|known| file.ends_with(known.file) && message.contains(known.message));
            if known {
                Outcome::Known
            } else {
                Outcome::Finding(format!("panic at {file}:{line}: {message}"))
            }
        }
    }
}

/// Input `number` of a seed.
pub fn input(target: &Target, seeds: &[Vec<u8>], seed: u64, number: u64) -> Vec<u8> {
    let name = crc64(target.name.as_bytes());
    let mut random = Random::new(name ^ seed.rotate_left(32) ^ number.wrapping_mul(0x9fb2_1c65_1e98_df25));
    mutate::input(target, seeds, &mut random)
}

/// When a campaign ends, if it finds nothing.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    Inputs(u64),
    Time(Instant),
}

/// What a campaign did.
#[derive(Debug, Default)]
pub struct Summary {
    pub inputs: u64,
    pub accepted: u64,
    pub known: u64,
    pub elapsed: Duration,
    /// The number of the input, the input, and what is wrong.
    pub finding: Option<(u64, Vec<u8>, String)>,
}

/// Runs inputs `first..` of a seed until the end or the first finding.
pub fn run(
    target: &Target,
    seed: u64,
    first: u64,
    until: Until,
    mut before: impl FnMut(u64, &[u8]),
) -> Summary {
    let seeds = (target.seeds)();
    let started = Instant::now();
    let mut summary = Summary::default();
    for number in first.. {
        let over = match until {
            Until::Inputs(count) => number - first >= count,
            Until::Time(deadline) => number.is_multiple_of(16) && Instant::now() >= deadline,
        };
        if over {
            break;
        }
        let input = input(target, &seeds, seed, number);
        before(number, &input);
        summary.inputs += 1;
        match run_one(target, &input) {
            Outcome::Passed(Verdict::Accepted) => summary.accepted += 1,
            Outcome::Passed(Verdict::Refused) => {}
            Outcome::Known => summary.known += 1,
            Outcome::Finding(what) => {
                summary.finding = Some((number, input, what));
                break;
            }
        }
    }
    summary.elapsed = started.elapsed();
    summary
}

/// A smaller input that is a finding too: cut at the end, cut out of the middle, zeroed.
pub fn minimise(target: &Target, input: &[u8]) -> Vec<u8> {
    let deadline = Instant::now() + MINIMISE_MAX;
    let fails = |candidate: &[u8]| matches!(run_one(target, candidate), Outcome::Finding(_));
    let mut best = input.to_vec();
    let mut step = best.len().div_ceil(2).max(1);
    while Instant::now() < deadline {
        let before = best.clone();
        let mut at = 0;
        while at < best.len() && Instant::now() < deadline {
            let end = (at + step).min(best.len());
            let without = [&best[..at], &best[end..]].concat();
            let mut zeroed = best.clone();
            zeroed[at..end].fill(0);
            if fails(&without) {
                best = without;
                continue;
            }
            if zeroed != best && fails(&zeroed) {
                best = zeroed;
            }
            at = end;
        }
        if step == 1 && best == before {
            break;
        }
        step = (step / 2).max(1);
    }
    best
}
