//! The faults of the soak: how each strikes, under a crowd of clients, and what it may do to them.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::ValueEnum;
use xsan_protocol::proto::{ClusterStatusReply, NodeStatus};
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::crowd::{Crowd, Field, Summary};
use xsan_tests::device::LoopDevice;
use xsan_tests::flushes::SlowFlushes;
use xsan_tests::garbage::Garbage;
use xsan_tests::node::{NodeOptions, Part};
use xsan_tests::random::Random;
use xsan_tests::rot;
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::switch::Link;
use xsan_tests::throttle::SlowWrites;
use xsan_tests::wait::{Look, until};
use xsan_tests::writer::Promises;

use crate::{FIELD, MIB, NODES, VOLUME};

/// What garbage is written to.
const GARBAGE_VOLUME: &str = "garbage";
/// Thin, and always written to where nothing was: half for stamped pages that will rot, half to fill a pool.
const SCRATCH_VOLUME: &str = "scratch";
const SCRATCH_SIZE: &str = "128GiB";
const FILL_FIRST_BYTE: u64 = 64 << 30;
const DEVICE_BYTES: u64 = 4096 * MIB;
/// The node whose device is over memory, with a pool that can be full.
const THIN: usize = 2;
const POOL_BYTES: u64 = DEVICE_BYTES + 64 * MIB;
/// What a store takes at most before it must notice that its pool is full.
const FILL_BYTES_MAX: u64 = 512 * MIB;
/// The only node whose bytes are changed: what rots on one is whole on the others.
const ROTTEN: usize = 0;
/// Each in a block of its own, and so in many groups.
const ROTTEN_PAGES: u64 = 32;
const BLOCK_BYTES: u64 = 4 * MIB;
/// When a repair is counted, at the latest.
const COUNTED_WITHIN: Duration = Duration::from_secs(3);
/// Answers that every client must have had before a fault, and after it.
const OPERATIONS: u64 = 100;
/// What docs/testing.md promises to clients of gateways that nothing was done to.
const STALL_MAX: Duration = Duration::from_secs(4);
const ONE_WAY_STALL_MAX: Duration = Duration::from_secs(6);

const SLOW_LINK: Duration = Duration::from_millis(50);
const SLOW_WRITES_PER_SECOND: u32 = 20;
/// Longer than a follower of Raft waits for its leader.
const SLOW_FLUSH: Duration = Duration::from_secs(2);

/// What is done to one node, to two, or to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Fault {
    KillData,
    KillControl,
    KillNode,
    PauseData,
    PauseControl,
    PauseNode,
    /// From all others, both ways.
    CutOff,
    /// It hears nobody.
    Deaf,
    /// Nobody hears it.
    Mute,
    /// From one other, both ways; the third hears both.
    CutPair,
    /// One other does not hear it.
    CutPairOneWay,
    Lossy,
    Slow,
    LossySlow,
    /// Its device takes few writes.
    SlowDevice,
    /// Its control process waits long for each flush.
    SlowControlDisk,
    /// Its device turns read-only; it is mended, and the data process started again.
    FailDevice,
    /// Its device takes nothing where it was never written to; it is mended, and the data process started again.
    FullPool,
    /// Pages on its device hold other bytes.
    ChangeBytes,
    /// Broken clients and peers.
    Garbage,
    /// And another one.
    KillTwo,
    KillAll,
    /// All nodes, while one is cut off.
    KillDuringCut,
}

pub const KILLS: &[Fault] = &[Fault::KillData, Fault::KillControl, Fault::KillNode];
pub const ALL: &[Fault] = &[
    Fault::KillData,
    Fault::KillControl,
    Fault::KillNode,
    Fault::PauseData,
    Fault::PauseControl,
    Fault::PauseNode,
    Fault::CutOff,
    Fault::Deaf,
    Fault::Mute,
    Fault::CutPair,
    Fault::CutPairOneWay,
    Fault::Lossy,
    Fault::Slow,
    Fault::LossySlow,
    Fault::SlowDevice,
    Fault::SlowControlDisk,
    Fault::FailDevice,
    Fault::FullPool,
    Fault::ChangeBytes,
    Fault::Garbage,
    Fault::KillTwo,
    Fault::KillAll,
    Fault::KillDuringCut,
];

impl Fault {
    pub fn name(self) -> String {
        let value = self.to_possible_value().expect("no fault is hidden");
        value.get_name().to_owned()
    }

    /// How long clients of other gateways may wait; `None`: there are none, TCP or the slow device decides, or too few are left.
    const fn stall_max(self) -> Option<Duration> {
        match self {
            Self::Deaf | Self::Mute | Self::CutPairOneWay => Some(ONE_WAY_STALL_MAX),
            Self::Lossy | Self::Slow | Self::LossySlow | Self::SlowDevice => None,
            Self::KillTwo | Self::KillAll | Self::KillDuringCut => None,
            _ => Some(STALL_MAX),
        }
    }

    /// Whether it takes some time that is drawn.
    pub const fn is_held(self) -> bool {
        !matches!(self, Self::KillData | Self::KillControl | Self::KillAll | Self::ChangeBytes)
    }

    /// Whether it reaches all nodes: no client is another one's then.
    pub const fn is_everywhere(self) -> bool {
        matches!(self, Self::KillAll | Self::KillDuringCut)
    }

    /// Whether it ends the control process, and the data process, of the nodes that it touches.
    const fn ends(self) -> [bool; 2] {
        match self {
            Self::KillControl => [true, false],
            Self::KillData | Self::FailDevice | Self::FullPool => [false, true],
            Self::KillNode | Self::KillTwo | Self::KillAll | Self::KillDuringCut => [true, true],
            _ => [false, false],
        }
    }

    /// How many connections it ends: those whose gateway's process dies. When all nodes die, one after the other, a client
    /// may have gone on to the next one, which then dies as well.
    const fn losses(self) -> RangeInclusive<u64> {
        match self {
            Self::KillData | Self::KillNode | Self::FailDevice | Self::FullPool => 1..=1,
            Self::KillTwo => 2..=4,
            Self::KillAll | Self::KillDuringCut => 3..=6,
            _ => 0..=0,
        }
    }
}

/// A cluster on which all of [`ALL`] can be done.
pub fn prepare(seed: u64) -> Result<Cluster> {
    let mut cluster = Cluster::prepare_switched(NODES, NodeOptions::default(), seed)?;
    for node in 0..NODES {
        let device = match node {
            THIN => LoopDevice::over_memory(DEVICE_BYTES, POOL_BYTES)?,
            _ => LoopDevice::over_file(&device_file(&cluster, node), DEVICE_BYTES)?,
        };
        cluster.use_device(node, device);
    }
    cluster.add_nodes(NODES)?;
    cluster.create_volume(GARBAGE_VOLUME, "64MiB", NODES)?;
    cluster.create_volume(SCRATCH_VOLUME, SCRATCH_SIZE, NODES)?;
    Ok(cluster)
}

fn device_file(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.directory().join(format!("device-{node}.img"))
}

/// The order of the faults of a seed, and what they need.
pub struct Faults<'a> {
    kinds: &'a [Fault],
    /// Kinds whose turn is still to come: every kind strikes before one does again.
    left: Vec<Fault>,
    seed: u64,
    random: Random,
    garbage: Garbage,
    rounds: u64,
    /// Of the scratch volume.
    rotten_blocks: u64,
    filled_bytes: u64,
    /// The processes as the last fault left them.
    processes: Vec<u32>,
    /// Pages whose repair was counted.
    pub repaired: u64,
    /// Of the crowds of all faults.
    pub promises: Promises,
}

impl<'a> Faults<'a> {
    pub fn new(kinds: &'a [Fault], seed: u64) -> Self {
        Self {
            kinds,
            left: Vec::new(),
            seed,
            random: Random::new(seed),
            garbage: Garbage::new(GARBAGE_VOLUME, seed),
            rounds: 0,
            rotten_blocks: 0,
            filled_bytes: 0,
            processes: Vec::new(),
            repaired: 0,
            promises: Promises::new(),
        }
    }

    /// The next fault under a crowd, its end, and what the crowd saw.
    ///
    /// # Errors
    /// Something that docs/testing.md promises did not hold.
    pub fn strike(&mut self, cluster: &mut Cluster) -> Result<(Fault, String, Summary)> {
        if self.left.is_empty() {
            self.left.extend(self.kinds);
        }
        let fault = self.left.swap_remove(self.random.index(self.left.len()));
        let (what, summary) = self.strike_with(cluster, fault).with_context(|| fault.name())?;
        Ok((fault, what, summary))
    }

    /// What was done to whom, and what the crowd saw.
    fn strike_with(&mut self, cluster: &mut Cluster, fault: Fault) -> Result<(String, Summary)> {
        let crowd = Crowd::start(cluster, VOLUME, Field { round: self.rounds, ..FIELD }, self.seed)?;
        self.rounds += 1;
        crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[])?;
        let before = cluster.processes()?;
        let known = self.processes.is_empty() || self.processes == before;
        ensure!(known, "a process ended by itself: {:?} ran, {before:?} do", self.processes);
        let victim = match (fault, self.random.index(NODES)) {
            (Fault::FullPool, _) => THIN,
            (Fault::ChangeBytes, _) => ROTTEN,
            (_, victim) => victim,
        };
        // Sometimes shorter than a lease, sometimes longer.
        let held = Duration::from_millis(self.random.within(200..6000));
        let touched = self.inject(cluster, fault, victim, held)?;
        cluster.wait_healthy(RESYNC_DEADLINE)?;
        crowd.wait_operations(OPERATIONS, SETTLE_DEADLINE, &[])?;
        let summary = crowd.finish_keeping(cluster, &touched, &mut self.promises)?;
        self.processes = cluster.processes()?;
        ended_are(fault, &touched, &before, &self.processes)?;
        ensure!(fault.losses().contains(&summary.losses), "{} connections broke", summary.losses);
        if let Some(most) = fault.stall_max() {
            let stall = summary.stall_elsewhere;
            ensure!(stall < most, "a client of another gateway waited {stall:?}, more than {most:?}");
        }
        let who = if fault.is_everywhere() { "all nodes" } else { &cluster.node(victim).name };
        let time = if fault.is_held() { format!(", {} ms", held.as_millis()) } else { String::new() };
        Ok((format!("{who}: {}{time}", fault.name()), summary))
    }

    /// Does it and ends it; the nodes whose clients may notice.
    fn inject(
        &mut self,
        cluster: &mut Cluster,
        fault: Fault,
        victim: usize,
        held: Duration,
    ) -> Result<Vec<usize>> {
        let others = [(victim + 1) % NODES, (victim + 2) % NODES];
        let to_victim = others.map(|other| (other, victim));
        let from_victim = others.map(|other| (victim, other));
        let both = [to_victim, from_victim].concat();
        let all: Vec<usize> = (0..NODES).collect();
        let hold = |cluster: &mut Cluster, cuts: &[(usize, usize)], link: Link| {
            let before = cluster.switch().counts().lost;
            cuts.iter().for_each(|(from, to)| cluster.switch().set(*from, *to, link));
            cluster.avoid(victim);
            thread::sleep(held);
            let lost = cluster.switch().counts().lost - before;
            ensure!(lost > 0 || !(link.cut || link.loss_percent > 0), "no packet was lost");
            Ok(())
        };
        match fault {
            Fault::KillData => {
                cluster.kill_data(victim)?;
            }
            Fault::KillControl => {
                cluster.kill_control(victim)?;
            }
            Fault::KillNode => {
                cluster.kill_node(victim)?;
                thread::sleep(held);
                cluster.restart(victim)?;
            }
            Fault::PauseData => pause(cluster, victim, Part::Data, held)?,
            Fault::PauseControl => pause(cluster, victim, Part::Control, held)?,
            Fault::PauseNode => pause(cluster, victim, Part::All, held)?,
            Fault::CutOff => hold(cluster, &both, Link::CUT)?,
            Fault::Deaf => hold(cluster, &to_victim, Link::CUT)?,
            Fault::Mute => hold(cluster, &from_victim, Link::CUT)?,
            Fault::CutPair => hold(cluster, &[to_victim[0], from_victim[0]], Link::CUT)?,
            Fault::CutPairOneWay => hold(cluster, &[from_victim[0]], Link::CUT)?,
            Fault::Lossy => hold(cluster, &both, Link::lossy(10))?,
            Fault::Slow => hold(cluster, &both, Link::slow(SLOW_LINK))?,
            Fault::LossySlow => hold(cluster, &both, Link { delay: SLOW_LINK, ..Link::lossy(10) })?,
            Fault::SlowDevice => {
                let data = cluster.node(victim).child("xsan-data")?;
                let device = cluster.device(victim).path();
                let _slow = SlowWrites::of(data.pid, device, SLOW_WRITES_PER_SECOND)?;
                thread::sleep(held);
            }
            Fault::SlowControlDisk => {
                let control = cluster.node(victim).child("xsan-control")?;
                let _slow = SlowFlushes::of(control.pid, SLOW_FLUSH)?;
                thread::sleep(held);
            }
            Fault::FailDevice => {
                cluster.device(victim).set_read_only(true)?;
                until("the store to fail", SETTLE_DEADLINE, || {
                    let failed = store_failed(cluster, victim)?;
                    Ok(if failed { Look::Done(()) } else { Look::NotYet("it has not".to_owned()) })
                })?;
                thread::sleep(held);
                cluster.device(victim).set_read_only(false)?;
                cluster.kill_data(victim)?;
            }
            Fault::FullPool => {
                self.fill_pool(cluster, victim)?;
                thread::sleep(held);
                cluster.device(victim).limit_pool(Some(POOL_BYTES))?;
                cluster.kill_data(victim)?;
            }
            Fault::ChangeBytes => self.change_bytes(cluster, victim)?,
            Fault::Garbage => {
                let (before, end) = (cluster.processes()?, Instant::now() + held);
                while Instant::now() < end {
                    self.garbage.send_to(cluster.node(victim))?;
                }
                ensure!(cluster.processes()? == before, "a process died");
            }
            Fault::KillTwo => {
                let pair = [victim, others[0]];
                cluster.kill_nodes(&pair)?;
                thread::sleep(held);
                cluster.start_again(&pair)?;
            }
            Fault::KillAll => {
                cluster.kill_all()?;
                cluster.start_again(&all)?;
            }
            Fault::KillDuringCut => {
                hold(cluster, &both, Link::CUT)?;
                cluster.kill_all()?;
                cluster.heal();
                cluster.start_again(&all)?;
            }
        }
        cluster.heal();
        Ok(match fault {
            Fault::KillAll | Fault::KillDuringCut => all,
            Fault::CutPair | Fault::CutPairOneWay | Fault::KillTwo => vec![victim, others[0]],
            _ => vec![victim],
        })
    }

    /// Leaves the victim's device no room, and writes until its store has noticed.
    fn fill_pool(&mut self, cluster: &Cluster, victim: usize) -> Result<()> {
        cluster.device(victim).limit_pool(None)?;
        let mut client = cluster.connect((victim + 1) % NODES, SCRATCH_VOLUME)?;
        let bytes = vec![0xa5; MIB as usize];
        let before = self.filled_bytes;
        while !store_failed(cluster, victim)? {
            let written = self.filled_bytes - before;
            ensure!(written < FILL_BYTES_MAX, "{written} bytes went to a device that is full");
            client.write(FILL_FIRST_BYTE + self.filled_bytes, &bytes)?;
            self.filled_bytes += MIB;
        }
        Ok(())
    }

    /// Writes stamped pages, changes them and those of the time before on the victim's device, and reads them through every
    /// gateway. The new ones are in its journal for the most part, the others in their place.
    fn change_bytes(&mut self, cluster: &Cluster, victim: usize) -> Result<()> {
        let blocks = self.rotten_blocks..self.rotten_blocks + ROTTEN_PAGES;
        self.rotten_blocks = blocks.end;
        let changed_blocks = blocks.start.saturating_sub(ROTTEN_PAGES)..blocks.end;
        ensure!(blocks.end * BLOCK_BYTES <= FILL_FIRST_BYTE, "the scratch volume has no room left");
        // No stamp of the crowd's.
        let seed = !self.seed;
        let mut client = cluster.connect((victim + 1) % NODES, SCRATCH_VOLUME)?;
        for page in blocks.clone() {
            client.write(page * BLOCK_BYTES, &Stamp { page, generation: 1, seed }.to_page())?;
        }
        client.flush()?;
        let wanted = |bytes: &[u8]| {
            Stamp::parse(bytes)
                .is_some_and(|stamp| stamp.seed == seed && changed_blocks.contains(&stamp.page))
        };
        // Who leads none of the groups reads none of the pages.
        cluster.wait_status("the node to lead groups", SETTLE_DEADLINE, |status| {
            let led = node(status, cluster, victim).map_or(0, |node| node.primary_groups);
            led * 6 >= status.groups.unwrap_or_default().total
        })?;
        let before = repaired_pages(cluster, victim)?;
        // The number of copies depends on the time, and draws must not.
        let mut random = Random::new(seed ^ blocks.end);
        let changed = rot::overwrite(&device_file(cluster, victim), wanted, &mut random)?;
        ensure!(changed as u64 >= blocks.end - blocks.start, "only {changed} pages are on the device");
        for gateway in 0..NODES {
            let mut client = cluster.connect(gateway, SCRATCH_VOLUME)?;
            for page in changed_blocks.clone() {
                let mut bytes = [0; PAGE_SIZE];
                client.read(page * BLOCK_BYTES, &mut bytes)?;
                let found = Stamp::generation_of(&bytes, page, seed).map_err(|what| anyhow!(what))?;
                ensure!(found == 1, "page {page} of the scratch volume is gone");
            }
        }
        thread::sleep(COUNTED_WITHIN);
        let repaired = repaired_pages(cluster, victim)?.saturating_sub(before);
        ensure!(repaired > 0, "{changed} pages were changed, and none was repaired");
        self.repaired += repaired;
        Ok(())
    }
}

/// Those that the fault was to end are others now, and all others are the same.
fn ended_are(fault: Fault, touched: &[usize], before: &[u32], after: &[u32]) -> Result<()> {
    for (place, (old, new)) in before.iter().zip(after).enumerate() {
        let (node, kind) = (place / 2, place % 2);
        let wanted = touched.contains(&node) && fault.ends()[kind];
        let name = ["control", "data"][kind];
        ensure!(wanted == (old != new), "the {name} process {old} of node {node} is {new} now");
    }
    Ok(())
}

fn node<'a>(status: &'a ClusterStatusReply, cluster: &Cluster, index: usize) -> Option<&'a NodeStatus> {
    let name = &cluster.node(index).name;
    status.nodes.iter().find(|found| found.node.as_ref().is_some_and(|node| node.name == *name))
}

fn store_failed(cluster: &Cluster, index: usize) -> Result<bool> {
    let status = cluster.status()?;
    Ok(node(&status, cluster, index).is_some_and(|node| node.stores.iter().any(|store| store.failed)))
}

/// Of the damaged pages of a node, those that were rewritten from other replicas, as its data process says.
fn repaired_pages(cluster: &Cluster, index: usize) -> Result<u64> {
    until("the node to answer for its stores", SETTLE_DEADLINE, || {
        let status = cluster.status()?;
        let answers = node(&status, cluster, index).filter(|node| node.used_bytes.is_some());
        let repaired = answers.map(|node| node.stores.iter().map(|store| store.repaired_pages).sum());
        Ok(repaired.map_or_else(|| Look::NotYet("it does not".to_owned()), Look::Done))
    })
}

fn pause(cluster: &mut Cluster, victim: usize, part: Part, held: Duration) -> Result<()> {
    cluster.avoid(victim);
    let paused = cluster.pause(victim, part)?;
    thread::sleep(held);
    paused.resume();
    Ok(())
}
