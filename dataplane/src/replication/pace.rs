//! Pace: how fast learners are brought up to date while clients are at work.
//!
//! Asked before every push; told the latency of every write and read of clients. Windows in which something was pushed are held
//! against windows in which nothing was: where clients wait too much longer, the rate is halved, else it grows by a step.
//! Without clients nothing is held back. One of a shard; knows no group, learner or frame.
//!
//! Invariants
//! - At least `RATE_MIN` is granted, whatever clients do: redundancy comes back.
//! - Grants of one window never exceed the rate by more than one push.
//!
//! Source: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in Computer
//! Networks", 1989, for additive increase and multiplicative decrease.

const WINDOW_NS: u64 = 100_000_000;
/// In bytes a second.
const RATE_MIN: u64 = 8 << 20;
const RATE_MAX: u64 = 2 << 30;
const RATE_FIRST: u64 = 64 << 20;
const RATE_STEP: u64 = 4 << 20;
/// At once at most what this part of a second earns.
const BURSTS_A_SECOND: u64 = 40;
/// Mean latency of clients in a window with pushes, in percent of that without, up to which the rate grows.
const LATENCY_PERCENT_MAX: u64 = 140;
/// Every so many windows two go without pushes, while clients are at work: what they would see without resync changes. In the
/// first the last pushes end, the second is looked at.
const PROBE_EVERY: u64 = 32;
const PROBE_WINDOWS: u64 = 2;
/// A window of fewer operations says nothing.
const OPERATIONS_MIN: u64 = 8;

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Write,
    Read,
}

/// Latencies of one kind of work.
#[derive(Clone, Copy, Debug, Default)]
struct Latency {
    count: u64,
    sum_ns: u64,
    /// Mean of windows without pushes, moved by a quarter with each; 0: not known.
    quiet_ns: u64,
}

impl Latency {
    /// Mean of this window.
    fn mean_ns(&self) -> Option<u64> {
        (self.count >= OPERATIONS_MIN).then(|| self.sum_ns / self.count)
    }

    fn learn_quiet(&mut self) {
        if let Some(mean) = self.mean_ns() {
            self.quiet_ns = if self.quiet_ns == 0 { mean } else { (3 * self.quiet_ns + mean) / 4 };
        }
    }

    /// Do clients wait too much longer than without pushes?
    fn is_worse(&self) -> bool {
        self.mean_ns()
            .is_some_and(|mean| self.quiet_ns > 0 && mean * 100 > self.quiet_ns * LATENCY_PERCENT_MAX)
    }
}

#[derive(Debug)]
pub(super) struct Pace {
    window: u64,
    latencies: [Latency; 2],
    /// Bytes granted in this window, and in the one before.
    granted: u64,
    granted_before: u64,
    /// Did clients do anything in the window before?
    busy: bool,
    rate: u64,
    /// Bytes that may be granted by `refilled_ns`; below zero by at most one push.
    allowance: i64,
    refilled_ns: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: 0,
            latencies: [Latency::default(); 2],
            granted: 0,
            granted_before: 0,
            busy: false,
            rate: RATE_FIRST,
            allowance: (RATE_FIRST / BURSTS_A_SECOND) as i64,
            refilled_ns: 0,
        }
    }
}

impl Pace {
    /// A client's operation took so long.
    pub fn add(&mut self, now_ns: u64, work: Work, ns: u64) {
        self.roll(now_ns);
        let latency = &mut self.latencies[work as usize];
        latency.count += 1;
        latency.sum_ns += ns;
    }

    /// May a push of so many bytes start now?
    pub fn grant(&mut self, now_ns: u64, bytes: usize) -> bool {
        self.roll(now_ns);
        let at_work = self.busy || self.latencies.iter().any(|latency| latency.count > 0);
        if at_work {
            self.refill(now_ns);
            if self.window % PROBE_EVERY >= PROBE_EVERY - PROBE_WINDOWS || self.allowance <= 0 {
                return false;
            }
            self.allowance -= bytes as i64;
        }
        self.granted += bytes as u64;
        true
    }

    fn refill(&mut self, now_ns: u64) {
        let since = now_ns.saturating_sub(self.refilled_ns).min(WINDOW_NS);
        self.refilled_ns = self.refilled_ns.max(now_ns);
        let earned = (u128::from(self.rate) * u128::from(since) / 1_000_000_000) as i64;
        // What was not used is not saved up: a burst is what clients would feel.
        let most = (self.rate / BURSTS_A_SECOND).max(1) as i64;
        self.allowance = (self.allowance + earned).min(most);
    }

    /// Ends the windows that are over.
    fn roll(&mut self, now_ns: u64) {
        let window = now_ns / WINDOW_NS;
        if window <= self.window {
            return;
        }
        // Pushes of the window before may still be under way in this one.
        if self.granted == 0 && self.granted_before == 0 {
            self.latencies.iter_mut().for_each(Latency::learn_quiet);
        } else if self.latencies.iter().any(Latency::is_worse) {
            self.rate = (self.rate / 2).max(RATE_MIN);
        } else {
            self.rate = (self.rate + RATE_STEP).min(RATE_MAX);
        }
        self.busy = window == self.window + 1 && self.latencies.iter().any(|latency| latency.count > 0);
        self.granted_before = if window == self.window + 1 { self.granted } else { 0 };
        self.granted = 0;
        for latency in &mut self.latencies {
            (latency.count, latency.sum_ns) = (0, 0);
        }
        self.window = window;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: usize = 64 << 10;
    const MS: u64 = 1_000_000;

    /// Pushes what is granted for so many ms, while clients do ten writes a ms; `latency_ns` by bytes granted in the last ms.
    fn run(pace: &mut Pace, from_ms: u64, ms: u64, latency_ns: impl Fn(usize) -> u64) -> usize {
        let mut total = 0;
        for ms in from_ms..from_ms + ms {
            pace.add(ms * MS, Work::Write, latency_ns(0));
            let mut granted = 0;
            while granted < 16 * UNIT && pace.grant(ms * MS, UNIT) {
                granted += UNIT;
            }
            for _ in 0..9 {
                pace.add(ms * MS, Work::Write, latency_ns(granted));
            }
            total += granted;
        }
        total
    }

    #[test]
    fn without_clients_nothing_is_held_back() {
        let mut pace = Pace::default();
        assert!((0..10_000).all(|_| pace.grant(5 * MS, UNIT)));
    }

    #[test]
    fn the_rate_falls_to_the_least_while_clients_suffer_and_rises_when_they_do_not() {
        let mut pace = Pace::default();
        let quiet = run(&mut pace, 3000, 200, |_| 100_000);
        assert_eq!(quiet, 0, "two windows are a probe");
        run(&mut pace, 3200, 2000, |granted| if granted > 0 { 100_000_000 } else { 100_000 });
        let slow = run(&mut pace, 5200, 1000, |granted| if granted > 0 { 100_000_000 } else { 100_000 });
        let least = RATE_MIN as usize;
        assert!((least * 8 / 10..least * 2).contains(&slow), "{slow} bytes in a second");
        run(&mut pace, 6200, 4000, |_| 100_000);
        let fast = run(&mut pace, 10_200, 1000, |_| 100_000);
        assert!(fast > 10 * slow, "{fast} bytes in a second");
    }

    #[test]
    fn a_rate_is_found_at_which_clients_wait_little_longer() {
        let mut pace = Pace::default();
        // A device that does 200 MiB/s: latency grows with what is pushed in a millisecond.
        let latency = |granted: usize| 100_000 + granted as u64 * 100_000 / 209_715;
        run(&mut pace, 0, 10_000, latency);
        let rate = run(&mut pace, 10_000, 2000, latency) as u64 / 2;
        assert!((40 << 20..160 << 20).contains(&rate), "{} MiB/s", rate >> 20);
    }
}
