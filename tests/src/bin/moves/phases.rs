//! Each way of moving data: how it is begun, what would have to be moved, and when it is over.

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use xsan_protocol::proto::ClusterStatusReply;
use xsan_protocol::units::{PAGES_PER_UNIT, UNIT_SIZE};
use xsan_tests::cluster::{Cluster, SETTLE_DEADLINE};
use xsan_tests::control::is_healthy;
use xsan_tests::foreground::{Foreground, Write, stretches};
use xsan_tests::node::Part;

use crate::watch::{Total, acting_on, all_whole, groups, is_member, part_of, share, used};
use crate::{Phase, REPLICAS, SlowNode, p99_us};

/// The node that things are done to, and the one that joins.
const NODE: usize = 3;
const NAME: &str = "node-004";
const JOINED: &str = "node-005";
pub const QUIET: Duration = Duration::from_secs(30);
/// How long a node is away for maintenance.
const AWAY: Duration = Duration::from_secs(60);
/// All is over when for this long nothing has moved and no group has changed: twice what the planner waits between two steps.
const STILL: Duration = Duration::from_secs(12);
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
const PHASE_DEADLINE: Duration = Duration::from_secs(900);
/// The slow node's data process stands still for this long, and then runs for as long.
pub const STOPPED: Duration = Duration::from_millis(50);
const SLOW_FOR: Duration = Duration::from_secs(20);

pub struct Bench {
    pub cluster: Cluster,
    pub load: Foreground,
    moved: Total,
    quiet_before: Vec<Write>,
}

/// A slow node, while it is slow.
struct Watched {
    waiting: Vec<Write>,
    ordered: Duration,
    acts_nowhere: Duration,
    demoted: Vec<Write>,
}

impl Bench {
    pub fn new(cluster: Cluster, load: Foreground) -> Result<Self> {
        let mut this =
            Self { cluster, load, moved: Total::of("resync_bytes_moved"), quiet_before: Vec::new() };
        this.quiet_before = this.quiet()?;
        Ok(this)
    }

    /// A node is stopped in order, away for a while, and started again, without a rebuild: it is sent the units that were written
    /// meanwhile.
    pub fn maintenance(&mut self) -> Result<Phase> {
        let (status, before, began) = (self.cluster.status()?, self.moved()?, self.load.now());
        self.cluster.cli(&["node", "maintenance", NAME, "on"])?.succeeded()?;
        self.cluster.stop_node(NODE)?;
        let left = self.load.now();
        thread::sleep(AWAY);
        self.cluster.restart(NODE)?;
        let missed = left..self.load.now();
        let count = self.cluster.nodes().len();
        let ended = self.rest(|status| is_healthy(status, count))?;
        self.cluster.cli(&["node", "maintenance", NAME, "off"])?.succeeded()?;
        let ideal = part_of(&status, NAME, self.written(missed)?);
        self.phase("maintenance", ideal, before, began..ended)
    }

    /// A node dies for good: its replicas are made anew on the others. That others take over for it is not part of this.
    pub fn rebuild(&mut self) -> Result<Phase> {
        let ideal = used(&self.cluster.status()?, NAME);
        let before = self.moved()?;
        self.cluster.kill_node(NODE)?;
        // At first it is a learner, which its primaries would have back: nobody knows yet that it is gone.
        self.wait("the rebuild to begin", |status| groups(status).resyncing > 0 && !is_member(status, NAME))?;
        let began = self.load.now();
        let ended = self.rest(all_whole)?;
        self.phase("rebuild after a death", ideal, before, began..ended)
    }

    /// It comes back, with a store that is out of date, and takes its share again.
    pub fn back(&mut self) -> Result<Phase> {
        let (before, began) = (self.moved()?, self.load.now());
        self.cluster.restart(NODE)?;
        let ended = self.rest(|status| all_whole(status) && acting_on(status, NAME) > 0)?;
        let ideal = share(&self.cluster.status()?);
        self.phase("return after the rebuild", ideal, before, began..ended)
    }

    pub fn join(&mut self) -> Result<Phase> {
        let (before, began) = (self.moved()?, self.load.now());
        self.cluster.add_node()?;
        let ended = self.rest(|status| all_whole(status) && acting_on(status, JOINED) > 0)?;
        let ideal = share(&self.cluster.status()?);
        self.phase("join of a fifth node", ideal, before, began..ended)
    }

    pub fn remove(&mut self) -> Result<Phase> {
        let ideal = used(&self.cluster.status()?, JOINED);
        let (before, began) = (self.moved()?, self.load.now());
        self.cluster.cli(&["node", "remove", JOINED, "--yes"])?.succeeded()?;
        let ended = self.rest(|status| status.nodes.len() == NODE + 1 && all_whole(status))?;
        // It was told that the cluster has removed it, and has ended.
        self.cluster.kill_node(NODE + 1)?;
        self.phase("removal of a node", ideal, before, began..ended)
    }

    /// Every page of every replica is read, at the default rate. What the primaries read is counted.
    pub fn scrub(&mut self) -> Result<Phase> {
        let ideal_bytes = self.cluster.status()?.used_bytes / REPLICAS as u64;
        let mut read = Total::of("scrub_bytes");
        let (before, began) = (read.look(&self.cluster)?, self.load.now());
        self.cluster.cli(&["scrub", "start", "--deep"])?.succeeded()?;
        let control = self.cluster.control();
        let is_over = |_: &_| {
            control.scrub_status().is_ok_and(|status| status.groups.iter().all(|group| group.wish.is_none()))
        };
        let ended = self.rest(is_over)?;
        let (time, during) = (ended - began, self.load.writes(began..ended)?);
        let moved_bytes = read.look(&self.cluster)? - before;
        let quiet = self.quiet_around()?;
        let phase = Phase { name: "deep scrub", ideal_bytes, moved_bytes, time, quiet, during };
        tell(&phase);
        Ok(phase)
    }

    /// The data process of a node stands still half of the time, as one whose device does.
    pub fn slow_node(&mut self) -> Result<SlowNode> {
        let (status, before) = (self.cluster.status()?, self.moved()?);
        let over = AtomicBool::new(false);
        let watched = thread::scope(|scope| {
            let pulse = scope.spawn(|| pulse(&self.cluster, &over));
            let watched = self.watch_slow();
            over.store(true, Ordering::Relaxed);
            pulse.join().expect("it does not panic")?;
            watched
        })?;
        let mended = self.load.now();
        let ended = self.rest(|status| all_whole(status) && acting_on(status, NAME) > 0)?;
        let Watched { waiting, ordered, acts_nowhere, demoted } = watched;
        let moved_bytes = self.moved()? - before;
        let slow = SlowNode {
            quiet: self.quiet_around()?,
            waiting,
            demoted,
            returning: self.load.writes(mended..ended)?,
            // A learner until it acts, it may miss all of them.
            ideal_bytes: part_of(&status, NAME, self.written(ordered..ended)?),
            moved_bytes,
            demoted_after: acts_nowhere - ordered,
            back_after: ended - mended,
        };
        println!(
            "a slow node: p99 {:.0} µs quiet, {:.0} µs waiting for it, {:.0} µs without it, {:.0} µs as it returns",
            p99_us(&slow.quiet),
            p99_us(&slow.waiting),
            p99_us(&slow.demoted),
            p99_us(&slow.returning)
        );
        Ok(slow)
    }

    fn watch_slow(&self) -> Result<Watched> {
        let waiting = self.window(SLOW_FOR)?;
        self.cluster.cli(&["cluster", "set", "slow-nodes", "demote"])?.succeeded()?;
        let ordered = self.load.now();
        self.wait("the slow node to act nowhere", |status| acting_on(status, NAME) == 0)?;
        let acts_nowhere = self.load.now();
        Ok(Watched { waiting, ordered, acts_nowhere, demoted: self.window(SLOW_FOR)? })
    }

    /// The writes of the next so many seconds.
    fn window(&self, long: Duration) -> Result<Vec<Write>> {
        let began = self.load.now();
        thread::sleep(long);
        self.load.writes(began..began + long)
    }

    fn phase(
        &mut self,
        name: &'static str,
        ideal_bytes: u64,
        moved_before: u64,
        time: Range<Duration>,
    ) -> Result<Phase> {
        let moved_bytes = self.moved()? - moved_before;
        let during = self.load.writes(time.clone())?;
        let (time, quiet) = (time.end - time.start, self.quiet_around()?);
        let phase = Phase { name, ideal_bytes, moved_bytes, time, quiet, during };
        tell(&phase);
        Ok(phase)
    }

    fn moved(&mut self) -> Result<u64> {
        self.moved.look(&self.cluster)
    }

    /// Bytes of the units that the foreground wrote to in this time: what a replica that missed them needs.
    fn written(&self, during: Range<Duration>) -> Result<u64> {
        Ok(stretches(&self.load.writes(during)?, PAGES_PER_UNIT as u64) * UNIT_SIZE as u64)
    }

    /// The quiet cluster's writes just before what was measured, and those just after it: what else the host does differs from
    /// minute to minute.
    fn quiet_around(&mut self) -> Result<Vec<Write>> {
        let after = self.quiet()?;
        let before = mem::replace(&mut self.quiet_before, after.clone());
        Ok([before, after].concat())
    }

    /// The foreground's writes in the first stretch of time in which nothing moves and no group changes.
    fn quiet(&mut self) -> Result<Vec<Write>> {
        let began = self.still(QUIET, |_| true)?;
        self.load.writes(began..began + QUIET)
    }

    /// Waits until the cluster is as `reached` wants it, and at rest; since when it is.
    fn rest(&mut self, reached: impl Fn(&ClusterStatusReply) -> bool) -> Result<Duration> {
        self.still(STILL, reached)
    }

    /// Waits until for so long nothing has moved, no group has changed and all was as `reached` wants it; since when.
    fn still(&mut self, long: Duration, reached: impl Fn(&ClusterStatusReply) -> bool) -> Result<Duration> {
        let started = Instant::now();
        let mut since: Option<(Duration, u64, u64)> = None;
        while started.elapsed() < PHASE_DEADLINE {
            self.load.ensure_runs()?;
            let now = self.load.now();
            let seen = (self.moved()?, self.cluster.epochs()?);
            let holds = self.cluster.status().is_ok_and(|status| reached(&status));
            since = match since {
                Some((since, moved, epochs)) if holds && seen == (moved, epochs) => {
                    if now >= since + long {
                        return Ok(since);
                    }
                    Some((since, moved, epochs))
                }
                _ => holds.then_some((now, seen.0, seen.1)),
            };
            thread::sleep(LOOK_INTERVAL);
        }
        bail!("not at rest after {} s", PHASE_DEADLINE.as_secs())
    }

    fn wait(&self, what: &str, holds: impl Fn(&ClusterStatusReply) -> bool) -> Result<()> {
        self.cluster.wait_status(what, SETTLE_DEADLINE, holds).map(drop)
    }
}

fn pulse(cluster: &Cluster, over: &AtomicBool) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        let paused = cluster.pause(NODE, Part::Data)?;
        thread::sleep(STOPPED);
        paused.resume();
        thread::sleep(STOPPED);
    }
    Ok(())
}

fn tell(phase: &Phase) {
    println!(
        "{}: {} MiB moved, {:.2} of what had to be, in {:.1} s; p99 {:.0} µs, {:.2} of quiet",
        phase.name,
        phase.moved_bytes >> 20,
        phase.moved_ratio(),
        phase.time.as_secs_f64(),
        p99_us(&phase.during),
        phase.p99_ratio(),
    );
}
