//! CLOCK_BOOTTIME: the clock that leases are counted on, because it goes on while a host sleeps.
//!
//! Read by `membership`, `link` and `controller`, and passed as an argument into what decides.

use std::ops::Add;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Nanoseconds since this host booted; says nothing about another host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(pub u64);

impl BootTime {
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec to write to, for the length of the call.
        let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        assert_eq!(result, 0, "every Linux since 2.6.39 has CLOCK_BOOTTIME");
        let seconds = u64::try_from(time.tv_sec).expect("the time since boot is not negative");
        let nanoseconds = u64::try_from(time.tv_nsec).expect("nanoseconds are not negative");
        Self(seconds * 1_000_000_000 + nanoseconds)
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// When this host last slept. Raft counts on a clock that stands still meanwhile: what it takes for a moment ago may be long past.
#[derive(Clone, Copy, Debug)]
pub struct Sleep {
    /// How far CLOCK_BOOTTIME is ahead of the clock of `Instant`, at most.
    ahead: Duration,
    /// When that was first seen to have grown.
    ended: Instant,
}

/// What the two clocks may differ by, read one after the other; and what a sleep takes at least.
const CLOCKS_APART: Duration = Duration::from_millis(5);

impl Sleep {
    pub fn new(now: BootTime, instant: Instant) -> Self {
        Self { ahead: ahead(now, instant), ended: instant }
    }

    /// When the last sleep had surely ended. `now` was read before `instant`.
    pub fn ended(&mut self, now: BootTime, instant: Instant) -> Instant {
        let ahead = ahead(now, instant);
        if ahead > self.ahead + CLOCKS_APART {
            *self = Self { ahead, ended: instant };
        }
        self.ended
    }
}

fn ahead(now: BootTime, instant: Instant) -> Duration {
    Duration::from_nanos(now.0).saturating_sub(instant.duration_since(*ORIGIN))
}

/// An instant of this process; those of a process count from one origin.
static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since 1970, for people to read; nothing is decided by it.
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Add<Duration> for BootTime {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(self.0 + u64::try_from(duration.as_nanos()).expect("durations here are seconds"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_was_before_a_sleep_is_known_to_be() {
        let (boot, start) = (BootTime(7_000_000_000), Instant::now());
        let mut sleep = Sleep::new(boot, start);
        // Both clocks go on, one a little later than the other.
        assert_eq!(sleep.ended(boot + SECOND, start + SECOND), start);
        assert_eq!(sleep.ended(boot + SECOND * 2, start + SECOND * 2 + CLOCKS_APART), start);
        assert_eq!(sleep.ended(boot + SECOND * 3, start + SECOND * 3), start);
        // Only one does.
        let awake = start + SECOND * 3 + CLOCKS_APART;
        assert_eq!(sleep.ended(boot + SECOND * 4, awake), awake);
        assert_eq!(sleep.ended(boot + SECOND * 5, awake + SECOND), awake);
        assert_eq!(sleep.ended(boot + SECOND * 5, awake + SECOND * 2), awake);
        assert_eq!(sleep.ended(boot + SECOND * 8, awake + SECOND * 3), awake + SECOND * 3);
    }
}
