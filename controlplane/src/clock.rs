//! CLOCK_BOOTTIME: the clock that leases are counted on, because it goes on while a host sleeps.
//!
//! Read by `membership`, `link` and `controller`, and passed as an argument into what decides.

use std::ops::Add;
use std::time::Duration;

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
