//! Pace: how fast learners are brought up to date, or groups scrubbed, while clients are at work.
//!
//! Asked before every push (in what follows also a range that a scrub reads); told the latency of every write and read of clients. While nothing is pushed the 99th percentile
//! is learned; while something is, operations that take twice as long are counted: where they are more than few, the rate is
//! halved, else it grows. Without clients nothing is held back. One of a shard; knows no group, learner or frame.
//!
//! Invariants
//! - But for the windows of probes at least `RATE_MIN` is granted, whatever clients do: redundancy comes back.
//! - While clients are at work, grants of one window never exceed the rate by more than one push.
//!
//! Sources: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in Computer
//! Networks", 1989; Ma, Muthukrishnan and Sandler, "Frugal Streaming for Estimating Quantiles", 2013; Page, "Continuous
//! Inspection Schemes", 1954, for the count of slow operations.

const WINDOW_NS: u64 = 100_000_000;
/// In bytes a second.
const RATE_MIN: u64 = 4 << 20;
const RATE_MAX: u64 = 2 << 30;
const RATE_FIRST: u64 = 32 << 20;
/// In a window the rate grows by this part of itself: it doubles in five seconds.
const RATE_GROWTH_PART: u64 = 64;
/// At once at most what this part of a second earns.
const BURSTS_A_SECOND: u64 = 40;
/// An operation is slow that takes so many times the 99th percentile without pushes.
const SLOW_FACTOR: u64 = 2;
/// One slow operation in so many is no reason to push less.
const SLOW_ONE_IN: u64 = 200;
/// So many more than that are.
const SLOW_EXCESS: u64 = 3;
/// After so many windows without an operation of theirs clients are at work no more. Many of them pause for less.
const IDLE_WINDOWS: u64 = 20;
/// Every so many windows two go without pushes, while clients are at work: what they would see without resync changes. In the
/// first the last pushes end, the second is looked at.
const PROBE_EVERY: u64 = 32;
const PROBE_WINDOWS: u64 = 2;

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Write,
    Read,
}

/// The 99th percentile of what it is shown, nearly; it follows faster up than down.
#[derive(Clone, Copy, Debug, Default)]
struct Percentile99 {
    /// 0: shown nothing yet.
    ns: u64,
}

impl Percentile99 {
    /// At 99 of 100 below it, steps up and down are in balance.
    const STEP_PART: u64 = 512;

    fn learn(&mut self, ns: u64) {
        let step = self.ns / Self::STEP_PART + 1;
        self.ns = match self.ns {
            0 => ns.max(1),
            known if ns > known => known + 99 * step,
            known => known.saturating_sub(step).max(1),
        };
    }
}

#[derive(Debug)]
pub(super) struct Pace {
    window: u64,
    /// Of each kind of work, without pushes.
    quiet: [Percentile99; 2],
    /// Slow operations above one in `SLOW_ONE_IN`, in parts of `SLOW_ONE_IN`.
    excess: u64,
    halved: bool,
    /// Bytes granted in this window, and in the one before.
    granted: u64,
    granted_before: u64,
    /// Operations of clients in this window.
    operations: u64,
    /// Before this window clients are at work.
    busy_until: u64,
    rate: u64,
    /// Bytes that may be granted by `refilled_ns`; below zero by at most one push.
    allowance: i64,
    refilled_ns: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: 0,
            quiet: [Percentile99::default(); 2],
            excess: 0,
            halved: false,
            granted: 0,
            granted_before: 0,
            operations: 0,
            busy_until: 0,
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
        self.operations += 1;
        self.busy_until = self.window + 1 + IDLE_WINDOWS;
        let quiet = &mut self.quiet[work as usize];
        // Pushes of the window before may still be under way in this one.
        if self.granted == 0 && self.granted_before == 0 {
            return quiet.learn(ns);
        }
        if self.halved {
            // What was pushed before is still felt for a while.
            return;
        }
        if quiet.ns > 0 && ns > quiet.ns.saturating_mul(SLOW_FACTOR) {
            self.excess += SLOW_ONE_IN;
        } else {
            self.excess = self.excess.saturating_sub(1);
        }
        if self.excess >= SLOW_EXCESS * SLOW_ONE_IN {
            self.rate = (self.rate / 2).max(RATE_MIN);
            (self.excess, self.halved) = (0, true);
        }
    }

    /// May a push of so many bytes start now?
    pub fn grant(&mut self, now_ns: u64, bytes: usize) -> bool {
        let granted = self.has_room(now_ns);
        if granted {
            self.allowance -= bytes as i64;
            self.granted += bytes as u64;
        }
        granted
    }

    /// Would a push be granted now?
    pub fn has_room(&mut self, now_ns: u64) -> bool {
        self.roll(now_ns);
        self.refill(now_ns);
        if self.window >= self.busy_until {
            self.allowance = self.allowance.max(1);
        } else if self.window % PROBE_EVERY >= PROBE_EVERY - PROBE_WINDOWS {
            self.allowance = self.allowance.min(0);
        }
        self.allowance > 0
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
        if self.granted > 0 && self.operations > 0 && !self.halved {
            self.rate = (self.rate + self.rate / RATE_GROWTH_PART).min(RATE_MAX);
        }
        self.granted_before = if window == self.window + 1 { self.granted } else { 0 };
        (self.granted, self.operations, self.halved, self.window) = (0, 0, false, window);
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
        run(&mut pace, 6200, 20_000, |_| 100_000);
        let fast = run(&mut pace, 26_200, 1000, |_| 100_000);
        assert!(fast > 10 * slow, "{fast} bytes in a second");
    }

    #[test]
    fn a_rate_is_found_at_which_clients_wait_little_longer() {
        let mut pace = Pace::default();
        // A device that does 200 MiB/s: latency grows with what is pushed in a millisecond.
        let latency = |granted: usize| 100_000 + granted as u64 * 100_000 / 209_715;
        run(&mut pace, 2900, 20_000, latency);
        let rate = run(&mut pace, 22_900, 20_000, latency) as u64 / 20;
        assert!((80 << 20..220 << 20).contains(&rate), "{} MiB/s", rate >> 20);
    }

    #[test]
    fn few_slow_operations_are_no_reason_to_push_less() {
        let mut pace = Pace::default();
        run(&mut pace, 3000, 200, |_| 100_000);
        let count = std::cell::Cell::new(0);
        let latency = |_| {
            count.set(count.get() + 1);
            if count.get() % 400 == 0 { 1_000_000 } else { 100_000 }
        };
        run(&mut pace, 3200, 10_000, latency);
        assert!(pace.rate > 2 * RATE_FIRST, "{} MiB/s", pace.rate >> 20);
    }

    #[test]
    fn the_percentile_is_found() {
        let mut percentile = Percentile99::default();
        // 1 to 100 µs, each as often, in a scattered order.
        (0..20_000u64).for_each(|i| percentile.learn((i * 37 % 100 + 1) * 1000));
        assert!((90_000..=110_000).contains(&percentile.ns), "{} ns", percentile.ns);
        (0..20_000u64).for_each(|i| percentile.learn((i * 37 % 100 + 1) * 100));
        assert!((9_000..=11_000).contains(&percentile.ns), "{} ns", percentile.ns);
    }
}
