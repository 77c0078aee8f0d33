//! Latencies by stage and counters of one shard: what `perf-stats` shows.
//!
//! Local to a shard's thread and without locks; the reports of all shards are merged when somebody asks.
//! Histograms are made when their stage is met first, so that an idle node stays small.

use hdrhistogram::Histogram;
use xsan_protocol::proto;

macro_rules! names {
    ($(#[$doc:meta])* $kind:ident { $( $(#[$entry:meta])* $variant:ident $name:literal, )* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $kind { $( $(#[$entry])* $variant, )* }

        impl $kind {
            pub const ALL: &'static [$kind] = &[ $( $kind::$variant, )* ];

            pub const fn name(self) -> &'static str {
                match self { $( $kind::$variant => $name, )* }
            }
        }
    };
}

names! {
    /// A part of a request's way that is timed.
    Stage {
        /// From a gateway's request to its answer, with every retry.
        Read "read.total",
        Write "write.total",
        Zero "zero.total",
        Flush "flush.total",
        BlockStatus "block_status.total",
        /// At the primary, from a write's seq to the completion of its own journal.
        JournalLocal "write.journal_local",
        /// At the primary, from a write's seq to the last acting member's answer.
        Acknowledge "write.acknowledge",
        /// At the primary, from the read's start to its answer.
        PrimaryRead "read.primary",
        /// From a group's new epoch to its serving again.
        Peering "group.peering",
        /// From a store's order to its device to the end of that, with what waits before it.
        DeviceRead "device.read",
        DeviceWrite "device.write",
        DeviceFlush "device.flush",
    }
}

names! {
    /// A number that only grows while the process lives.
    Counter {
        Turns "turns",
        FramesSent "frames_sent",
        FramesReceived "frames_received",
        SentBytes "sent_bytes",
        ReceivedBytes "received_bytes",
        /// Payload bytes copied in user space.
        CopiedBytes "copied_bytes",
        /// Data bytes of entries that the stores took.
        EntryBytes "entry_bytes",
        /// Bytes that the stores wrote to their devices, for all purposes.
        WrittenBytes "written_bytes",
        ReadBytes "read_bytes",
        DeviceFlushes "device_flushes",
        GroupWrites "group_writes",
        GroupReads "group_reads",
        ResyncBytesMoved "resync_bytes_moved",
        ChecksumErrors "checksum_errors",
        RepairedPages "repaired_pages",
        /// Reads that were answered with another replica's pages.
        MendedPages "mended_pages",
        Scrubs "scrubs",
        /// Bytes that scrubs read of the replicas led here.
        ScrubBytes "scrub_bytes",
        /// Pages, of any replica, that scrubs found damaged.
        ScrubDamagedPages "scrub_damaged_pages",
        /// Those of them that no replica could mend.
        ScrubLostPages "scrub_lost_pages",
        /// Units that scrubs found to differ between replicas.
        ScrubDifferences "scrub_differences",
    }
}

/// Longest latency told apart; a request never lives longer than its timeout.
const NS_MAX: u64 = 60_000_000_000;
/// Finest difference of interest.
const NS_MIN: u64 = 1_000;

/// An empty histogram of nanoseconds.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(NS_MIN, NS_MAX, 2).expect("the bounds are constants in order")
}

/// Latencies of the last seconds: of the present span and the one before.
#[derive(Debug)]
pub struct Recent {
    present: Histogram<u64>,
    before: Histogram<u64>,
    /// When the present span began.
    since_ns: u64,
}

impl Default for Recent {
    fn default() -> Self {
        Self { present: histogram(), before: histogram(), since_ns: 0 }
    }
}

impl Recent {
    pub const SPAN_NS: u64 = 5_000_000_000;
    /// Fewer say nothing.
    pub const SAMPLES_MIN: u64 = 30;

    pub fn record(&mut self, ns: u64) {
        self.present.saturating_record(ns);
    }

    pub fn on_tick(&mut self, now_ns: u64) {
        if now_ns.saturating_sub(self.since_ns) >= Self::SPAN_NS {
            self.since_ns = now_ns;
            std::mem::swap(&mut self.present, &mut self.before);
            self.present.reset();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.present.is_empty() && self.before.is_empty()
    }

    /// In nanoseconds; `None` of too few.
    pub fn p99(&self) -> Option<u64> {
        let mut both = self.present.clone();
        both.add(&self.before).expect("all histograms have the same bounds");
        (both.len() >= Self::SAMPLES_MIN).then(|| both.value_at_quantile(0.99))
    }
}

#[derive(Clone, Debug, Default)]
pub struct Stats {
    latencies: [Option<Box<Histogram<u64>>>; Stage::ALL.len()],
    counters: [u64; Counter::ALL.len()],
}

impl Stats {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn record(&mut self, stage: Stage, ns: u64) {
        let histogram = self.latencies[stage as usize].get_or_insert_with(|| Box::new(histogram()));
        histogram.saturating_record(ns);
    }

    pub fn add(&mut self, counter: Counter, amount: u64) {
        self.counters[counter as usize] += amount;
    }

    /// Takes in another shard's numbers.
    pub fn merge(&mut self, other: &Self) {
        for (own, other) in self.latencies.iter_mut().zip(&other.latencies) {
            match (own, other) {
                (Some(own), Some(other)) => own.add(&**other).expect("all histograms have the same bounds"),
                (own @ None, Some(other)) => *own = Some(other.clone()),
                (_, None) => {}
            }
        }
        for (own, other) in self.counters.iter_mut().zip(other.counters) {
            *own += other;
        }
    }

    /// As the API tells it, in microseconds.
    pub fn to_messages(&self) -> (Vec<proto::Latency>, Vec<proto::Counter>) {
        let latency = |stage: &Stage| {
            let histogram = self.latencies[*stage as usize].as_deref()?;
            let us_at = |quantile| histogram.value_at_quantile(quantile) / 1000;
            Some(proto::Latency {
                name: stage.name().to_owned(),
                count: histogram.len(),
                us_p50: us_at(0.50),
                us_p99: us_at(0.99),
                us_p999: us_at(0.999),
                us_max: histogram.max() / 1000,
                us_mean: histogram.mean() / 1000.0,
            })
        };
        let counter = |counter: &Counter| proto::Counter {
            name: counter.name().to_owned(),
            value: self.counters[*counter as usize],
        };
        (Stage::ALL.iter().filter_map(latency).collect(), Counter::ALL.iter().map(counter).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_merged_and_told_in_microseconds() {
        let (mut one, mut two) = (Stats::new(), Stats::new());
        for _ in 0..99 {
            one.record(Stage::Write, 100_000);
        }
        two.record(Stage::Write, 900_000_000);
        two.record(Stage::Read, 1);
        two.add(Counter::FramesSent, 3);
        one.add(Counter::FramesSent, 4);
        one.merge(&two);
        let (latencies, counters) = one.to_messages();
        let write = latencies.iter().find(|latency| latency.name == "write.total").unwrap();
        assert_eq!(write.count, 100);
        assert!((99..=101).contains(&write.us_p50), "{write:?}");
        assert!((890_000..=910_000).contains(&write.us_max), "{write:?}");
        assert!(latencies.iter().any(|latency| latency.name == "read.total"));
        assert!(counters.iter().any(|counter| counter.name == "frames_sent" && counter.value == 7));
    }

    #[test]
    fn a_latency_beyond_the_bounds_is_kept_at_the_bound() {
        let mut stats = Stats::new();
        stats.record(Stage::Flush, u64::MAX);
        assert!(stats.to_messages().0[0].us_max >= 59_000_000);
    }
}
