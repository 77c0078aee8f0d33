//! Every time constant of leases and elections, with the reasons and the relations between them.
//!
//! Used by `raft`, `lease`, `membership`, `controller` and `link`.
//!
//! Why a lease is safe. A node counts its lease from when it *sent* the beat that the leader granted. A leader
//! grants only while a quorum has acknowledged it within `QUORUM_ACK_AGE_MAX`. Let a new leader be elected
//! at E. One of its voters was in that quorum, and voted after it acknowledged, so the old leader's last
//! acknowledged message was sent before E, and its last grant made before E + `QUORUM_ACK_AGE_MAX`; the beat was
//! sent before that. So every lease of the old leader has ended at E + `QUORUM_ACK_AGE_MAX` + `LEASE`: that,
//! with some slack, is how long a new leader waits before it takes a node for dead. It does not rest on what
//! the Raft library promises about its own leases, nor on the election timeout of any node: each has its own in its
//! configuration, and while that is changed node by node they differ.
//!
//! The library counts on a clock that stands still while a host sleeps, so an acknowledgement from before a sleep counts as none
//! (`clock::Sleep`).
//!
//! Source: Gray and Cheriton, "Leases", SOSP '89.

use std::time::Duration;

use xsan_nodekit::config::HEARTBEAT_INTERVAL_MS_MAX;

/// How long a node may serve after it sent a beat that was granted. Longer rides out longer elections; shorter
/// fails over sooner from a host that is gone.
pub const LEASE: Duration = Duration::from_millis(1500);
/// Added by the leader before it takes a lease for ended: clock drift over one lease (CLOCK_BOOTTIME, at
/// most 500 ppm: under 1 ms) and late timers on a loaded host.
pub const LEASE_SLACK: Duration = Duration::from_millis(50);
/// No leader grants a lease whose quorum has not acknowledged it for this long. The same on every node: a new leader counts on it
/// of the one before.
pub const QUORUM_ACK_AGE_MAX: Duration = Duration::from_millis(250);
/// Raft's heartbeats are never further apart, or a leader with a long election timeout could hardly grant.
pub const RAFT_HEARTBEAT_MAX: Duration = Duration::from_millis(100);
/// Beats are sent this often when the configuration does not say: six chances a lease.
pub const BEAT_INTERVAL: Duration = Duration::from_millis(250);
/// A data process that has not told its status for this long is taken to hang: no lease is asked for it.
pub const STATUS_AGE_MAX: Duration = Duration::from_millis(1000);
/// A node that is heard, and that no answer of the leader has reached for this long, is deaf: it is granted no lease that it
/// would not know of.
pub const DEAF_AFTER: Duration = Duration::from_millis(1000);
/// A control process not heard of for this long is shown as down.
pub const BEAT_AGE_MAX: Duration = Duration::from_millis(2000);
/// Groups that can not reach `min_replicas` wait this long for their members before they go on below it.
pub const REGROUP_AFTER: Duration = Duration::from_secs(10);
/// A node gone for this long is left out of placement, if the cluster has no setting of its own: its groups are
/// rebuilt on the others. Long enough for a reboot, which costs less than a rebuild.
pub const OUT_AFTER: Duration = Duration::from_secs(600);
/// The least that may be set: below, an election or a busy host would start a rebuild.
pub const DOWN_OUT_MIN: Duration = Duration::from_secs(5);
/// The most that may be set; a node in maintenance is not left out at all.
pub const DOWN_OUT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// A data process's word that a node is slow is passed to the leader this often, and counts for so long.
pub const SLOW_REPORT_INTERVAL: Duration = Duration::from_secs(1);
pub const SLOW_REPORT_AGE_MAX: Duration = Duration::from_secs(5);
/// A node counts as slow for this long after it was last seen to be: what failed slowly fails again.
pub const SLOW_HOLD: Duration = Duration::from_secs(30);
/// A primary's wish to leave a member out where too few would be left has slow replicas act for so long: the primary says it
/// again twice a second, and needs some seconds after a change of the acting set.
pub const SHORT_FOR: Duration = Duration::from_secs(10);
/// Looks at what is to be scrubbed, and commits of what was.
pub const SCRUB_TICK: Duration = Duration::from_secs(1);
/// Between two scrubs of a group, and two deep ones, where the cluster has no settings of its own.
pub const SCRUB_INTERVAL: Duration = Duration::from_secs(24 * 3600);
pub const DEEP_SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);
/// A scrub that ended later than this from now was told by a wrong clock: nobody knows when it was.
pub const SCRUB_AHEAD_MAX: Duration = Duration::from_secs(60);
/// The least and the most that may be set.
pub const SCRUB_INTERVAL_MIN: Duration = Duration::from_secs(10);
pub const SCRUB_INTERVAL_MAX: Duration = Duration::from_secs(365 * 24 * 3600);
/// Bytes a second that a shard's scrubs read of the replicas that it leads: a TiB in six hours.
pub const SCRUB_RATE: u64 = 50 << 20;
pub const SCRUB_RATE_MIN: u64 = 64 << 10;
pub const SCRUB_RATE_MAX: u64 = 100 << 30;
/// Everything must have been well for this long before primaries are moved for balance.
pub const BALANCE_AFTER: Duration = Duration::from_secs(5);
/// Between two steps of moving primaries or replicas for balance.
pub const BALANCE_INTERVAL: Duration = Duration::from_secs(1);
/// The controller looks at deadlines this often; changes wake it at once.
pub const CONTROLLER_TICK: Duration = Duration::from_millis(100);
/// How long an API request may look for a leader.
pub const LEADER_WAIT: Duration = Duration::from_secs(10);
/// How long the API waits for another node's own part of an answer.
pub const GATHER_WAIT: Duration = Duration::from_millis(1500);

const _: () = assert!(2 * RAFT_HEARTBEAT_MAX.as_millis() < QUORUM_ACK_AGE_MAX.as_millis());
const _: () = assert!(LEASE.as_millis() >= 4 * BEAT_INTERVAL.as_millis());
const _: () = assert!(LEASE.as_millis() >= 4 * HEARTBEAT_INTERVAL_MS_MAX as u128);
const _: () = assert!(STATUS_AGE_MAX.as_millis() > 2 * HEARTBEAT_INTERVAL_MS_MAX as u128);
const _: () = assert!(DOWN_OUT_MIN.as_millis() > 2 * LEASE.as_millis());
const _: () = assert!(DOWN_OUT_MIN.as_millis() <= OUT_AFTER.as_millis());
const _: () = assert!(OUT_AFTER.as_millis() <= DOWN_OUT_MAX.as_millis());
const _: () = assert!(2 * SLOW_REPORT_INTERVAL.as_millis() < SLOW_REPORT_AGE_MAX.as_millis());
const _: () = assert!(SCRUB_TICK.as_millis() < SCRUB_INTERVAL_MIN.as_millis());
const _: () = assert!(LEASE_SLACK.as_micros() > LEASE.as_micros() / 1000);
const _: () = assert!(STATUS_AGE_MAX.as_millis() < LEASE.as_millis());
const _: () = assert!(DEAF_AFTER.as_millis() >= 4 * BEAT_INTERVAL.as_millis());
const _: () = assert!(DEAF_AFTER.as_millis() < LEASE.as_millis());

/// Raft's times, from the configured election timeout T: the longest a cluster should be without a leader.
///
/// A follower calls an election once the leader's Raft lease (T/2 after its last message) and a random T/4 to
/// T/2 have passed: 0.75 T to T after the last message, then two rounds of votes. With T = 1,000 ms a
/// leader that dies is replaced 0.65 to 1.05 s later, before leases renewed 250 ms before its death
/// (1,250 ms left) end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftTiming {
    pub heartbeat: Duration,
    pub election_min: Duration,
    /// Also the length of the leader's Raft lease.
    pub election_max: Duration,
}

impl RaftTiming {
    /// Below this a loaded host would lose its leader for no reason.
    pub const ELECTION_TIMEOUT_MIN: Duration = Duration::from_millis(400);

    pub fn new(election_timeout: Duration) -> Self {
        let total = election_timeout.max(Self::ELECTION_TIMEOUT_MIN);
        let heartbeat = (total / 10).min(RAFT_HEARTBEAT_MAX);
        Self { heartbeat, election_min: total / 4, election_max: total / 2 }
    }

    /// A leader grants leases only while a quorum acknowledged it this lately.
    pub fn quorum_ack_age_max(&self) -> Duration {
        self.election_min.min(QUORUM_ACK_AGE_MAX)
    }

    /// How long a new leader takes every node for alive: see the argument above. Whatever its own times are, the leader before
    /// may have had longer ones.
    pub fn leader_grace(&self) -> Duration {
        LEASE + LEASE_SLACK + QUORUM_ACK_AGE_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The grace was of the new leader's election timeout, and the last grant of the old leader's: 10 s there, 1 s here, and a
    /// lease ran 700 ms longer than it was counted.
    #[test]
    fn the_grace_covers_every_lease_of_the_leader_before_whatever_its_times_are() {
        let all = || (200..=10_000).step_by(100).map(|ms| RaftTiming::new(Duration::from_millis(ms)));
        for (old, new) in all().flat_map(|old| all().map(move |new| (old, new))) {
            let leases_end = old.quorum_ack_age_max() + LEASE;
            assert!(leases_end < new.leader_grace(), "{old:?} before {new:?}");
            assert!(2 * old.heartbeat < old.quorum_ack_age_max(), "{old:?} can grant");
        }
    }

    #[test]
    fn with_the_default_election_timeout_times_are_as_documented() {
        let timing = RaftTiming::new(Duration::from_secs(1));
        assert_eq!(timing.quorum_ack_age_max(), Duration::from_millis(250));
        assert_eq!(timing.heartbeat, Duration::from_millis(100));
        assert_eq!(timing.leader_grace(), Duration::from_millis(1800));
    }
}
