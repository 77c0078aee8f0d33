//! How long something has been behind: a learner's journal behind what came, a learner behind what is acknowledged.

use xsan_protocol::ids::Seq;

/// How long a part of something has been missing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lag(Option<(Seq, u64)>);

impl Lag {
    /// What is missing for so long is late.
    const LATE_NS: u64 = 500_000_000;

    /// Up to `has` is there, of what goes up to `wanted`: that may be less than it was.
    pub fn watch(&mut self, has: Seq, wanted: Seq, now_ns: u64) {
        if self.0.is_none_or(|(seq, _)| has >= seq.min(wanted)) {
            self.0 = (has < wanted).then_some((wanted, now_ns));
        }
    }

    pub fn is_late(&self, now_ns: u64) -> bool {
        self.0.is_some_and(|(_, since_ns)| now_ns >= since_ns + Self::LATE_NS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_for_long_is_late_until_it_is_there_or_not_wanted_any_more() {
        let mut lag = Lag::default();
        let mut watch = |has: u64, wanted: u64, now_ms: u64| {
            lag.watch(Seq(has), Seq(wanted), now_ms * 1_000_000);
            lag.is_late(now_ms * 1_000_000)
        };
        assert!(!watch(5, 9, 0));
        // Getting on, it is not late however much is wanted; what was wanted first counts.
        assert!(!watch(8, 20, 499));
        assert!(watch(8, 20, 500));
        assert!(!watch(9, 30, 501));
        assert!(!watch(29, 40, 1000));
        assert!(watch(29, 40, 1001));
        // What is not there was taken back.
        assert!(!watch(29, 29, 1002));
        assert!(!watch(29, 40, 1003));
        assert!(watch(29, 41, 1503));
    }
}
