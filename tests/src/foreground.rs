//! An open load: operations fall due at a fixed rate, whatever becomes of those before, so that while a cluster stands still all that
//! would have been asked of it meanwhile is counted as waiting. Used to measure what clients see while data moves.
//!
//! Every page of the load's range has one owner among its clients, who knows what it holds: each read is verified when it comes, and all
//! pages at the end.
//!
//! Source: Tene, "How NOT to Measure Latency" (coordinated omission).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::nbd::Client;
use crate::random::Random;
use crate::stamp::{PAGE_SIZE, Stamp};
use crate::wait::{Look, until};

/// Longer than any stall that is allowed, so that a slow answer is measured and not cut off.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(40);
/// Of what fills the range, and reads it back.
const CHUNK_PAGES: u64 = 256;

/// What is asked of the volume.
#[derive(Clone, Debug)]
pub struct Load {
    pub gateway: SocketAddr,
    pub export: String,
    /// From the start of the volume.
    pub pages: u64,
    /// Single pages a second at random places, half of them written.
    pub rate: u32,
    /// Each has a connection, and one operation under way.
    pub clients: u32,
    pub seed: u64,
}

/// One write that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Since the load began.
    pub due: Duration,
    /// From when it was due where an earlier one held it up, and else from when it was sent.
    pub wait: Duration,
    pub page: u64,
}

/// The load runs until it is told to finish, or dropped.
pub struct Foreground {
    load: Load,
    origin: Instant,
    stop: Arc<AtomicBool>,
    owners: Vec<Owner>,
}

struct Owner {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<Vec<u64>>>>,
}

/// What an owner's thread has done so far.
#[derive(Default)]
struct Shared {
    writes: Mutex<Vec<Write>>,
    /// Nanoseconds since the origin: all that was due before was answered.
    answered_until: AtomicU64,
}

impl Foreground {
    /// Fills the range, and starts.
    pub fn start(load: Load) -> Result<Self> {
        assert!(load.pages.is_multiple_of(CHUNK_PAGES * u64::from(load.clients)), "owners own the same");
        fill(&load)?;
        let (origin, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
        let owners: Result<Vec<Owner>> = (0..load.clients)
            .map(|index| {
                let shared = Arc::new(Shared::default());
                let mut task = Task::new(&load, index, origin, Arc::clone(&shared))?;
                let stop = Arc::clone(&stop);
                let run = move || {
                    while !stop.load(Ordering::Relaxed) {
                        task.step()?;
                    }
                    Ok(task.generations)
                };
                let thread = thread::Builder::new().name("foreground".to_owned()).spawn(run)?;
                Ok(Owner { shared, thread: Some(thread) })
            })
            .collect();
        Ok(Self { owners: owners?, load, origin, stop })
    }

    /// The time by which `writes` goes.
    pub fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The writes that were due in this time, once all of them are answered.
    ///
    /// # Errors
    /// A client has failed: a request did, or a page held what it should not.
    pub fn writes(&self, during: Range<Duration>) -> Result<Vec<Write>> {
        until("the answers to all that was due", REQUEST_TIMEOUT, || {
            let answered =
                self.owners.iter().map(|owner| owner.shared.answered_until.load(Ordering::Acquire));
            let answered = Duration::from_nanos(answered.min().unwrap_or(0));
            if answered >= during.end {
                return Ok(Look::Done(()));
            }
            self.ensure_runs()?;
            Ok(Look::NotYet(format!("answers to what was due until {answered:?}, not {:?}", during.end)))
        })?;
        let mut found = Vec::new();
        for owner in &self.owners {
            let writes = owner.shared.writes.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(writes.iter().filter(|write| during.contains(&write.due)));
        }
        Ok(found)
    }

    /// # Errors
    /// A client has failed; `finish` says why.
    pub fn ensure_runs(&self) -> Result<()> {
        let ended = |owner: &Owner| owner.thread.as_ref().is_none_or(JoinHandle::is_finished);
        ensure!(!self.owners.iter().any(ended), "a client of the foreground has failed");
        Ok(())
    }

    /// Stops, and reads everything back through `gateway`: each page holds what was written last. Returns the number of bytes.
    pub fn finish(mut self, gateway: SocketAddr) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut generations = Vec::new();
        for owner in &mut self.owners {
            let thread = owner.thread.take().context("it was stopped already")?;
            generations.push(thread.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        let load = &self.load;
        let mut client = Client::connect(gateway, &load.export, REQUEST_TIMEOUT)?;
        let mut chunk = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
        for first in (0..load.pages).step_by(CHUNK_PAGES as usize) {
            client.read(first * PAGE_SIZE as u64, &mut chunk)?;
            for (page, bytes) in (first..).zip(chunk.chunks_exact(PAGE_SIZE)) {
                let (owner, place) = load.owner_of(page);
                check(bytes, page, load.seed, generations[owner][place])?;
            }
        }
        Ok(load.pages * PAGE_SIZE as u64)
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Load {
    fn owner_of(&self, page: u64) -> (usize, usize) {
        let clients = u64::from(self.clients);
        ((page % clients) as usize, (page / clients) as usize)
    }
}

fn check(bytes: &[u8], page: u64, seed: u64, expected: u64) -> Result<()> {
    let generation = Stamp::generation_of(bytes, page, seed).map_err(|message| anyhow!(message))?;
    ensure!(generation == expected, "page {page} holds generation {generation}, not {expected}");
    Ok(())
}

/// Writes generation 1 of every page, as many chunks at once as there are clients.
fn fill(load: &Load) -> Result<()> {
    let chunks = load.pages / CHUNK_PAGES;
    thread::scope(|scope| {
        let fillers: Vec<_> = (0..load.clients)
            .map(|index| {
                scope.spawn(move || -> Result<()> {
                    let mut client = Client::connect(load.gateway, &load.export, REQUEST_TIMEOUT)?;
                    let mut bytes = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
                    for chunk in (u64::from(index)..chunks).step_by(load.clients as usize) {
                        let first = chunk * CHUNK_PAGES;
                        for (page, bytes) in (first..).zip(bytes.chunks_exact_mut(PAGE_SIZE)) {
                            Stamp { page, generation: 1, seed: load.seed }.fill(bytes);
                        }
                        client.write(first * PAGE_SIZE as u64, &bytes)?;
                    }
                    client.flush()?;
                    Ok(())
                })
            })
            .collect();
        fillers.into_iter().try_for_each(|filler| filler.join().map_err(|_| anyhow!("a client panicked"))?)
    })
}

/// One owner's thread's state.
struct Task {
    client: Client,
    /// Of the owner's pages, in their order.
    generations: Vec<u64>,
    index: u64,
    clients: u64,
    seed: u64,
    random: Random,
    origin: Instant,
    period: Duration,
    due: Duration,
    /// When the last operation was answered.
    free_at: Duration,
    buffer: Vec<u8>,
    shared: Arc<Shared>,
}

impl Task {
    fn new(load: &Load, index: u32, origin: Instant, shared: Arc<Shared>) -> Result<Self> {
        let period = Duration::from_secs(1) * load.clients / load.rate;
        Ok(Self {
            client: Client::connect(load.gateway, &load.export, REQUEST_TIMEOUT)?,
            generations: vec![1; (load.pages / u64::from(load.clients)) as usize],
            index: u64::from(index),
            clients: u64::from(load.clients),
            seed: load.seed,
            random: Random::new(load.seed ^ u64::from(index).rotate_left(32)),
            origin,
            period,
            // Not all at the same moments.
            due: period * index / load.clients,
            free_at: Duration::ZERO,
            buffer: vec![0; PAGE_SIZE],
            shared,
        })
    }

    fn step(&mut self) -> Result<()> {
        thread::sleep(self.due.saturating_sub(self.origin.elapsed()));
        let begun = if self.free_at > self.due { self.due } else { self.origin.elapsed() };
        let place = self.random.index(self.generations.len());
        let page = place as u64 * self.clients + self.index;
        let writes = self.random.within(0..2) == 0;
        let result = if writes { self.write(page, place) } else { self.read(page, place) };
        if let Err(error) = result {
            bail!("page {page}, after {:?}: {error:#}", self.origin.elapsed() - begun);
        }
        self.free_at = self.origin.elapsed();
        if writes {
            let write = Write { due: self.due, wait: self.free_at - begun, page };
            self.shared.writes.lock().unwrap_or_else(PoisonError::into_inner).push(write);
        }
        self.due += self.period;
        self.shared.answered_until.store(self.due.as_nanos() as u64, Ordering::Release);
        Ok(())
    }

    fn write(&mut self, page: u64, place: usize) -> Result<()> {
        let generation = self.generations[place] + 1;
        Stamp { page, generation, seed: self.seed }.fill(&mut self.buffer);
        self.client.write(page * PAGE_SIZE as u64, &self.buffer)?;
        self.generations[place] = generation;
        Ok(())
    }

    fn read(&mut self, page: u64, place: usize) -> Result<()> {
        self.client.read(page * PAGE_SIZE as u64, &mut self.buffer)?;
        check(&self.buffer, page, self.seed, self.generations[place])
    }
}

/// The wait that so many of a hundred do not exceed; `None` of no writes.
pub fn percentile(writes: &[Write], percent: usize) -> Option<Duration> {
    let mut waits: Vec<Duration> = writes.iter().map(|write| write.wait).collect();
    waits.sort_unstable();
    let last = waits.len().checked_sub(1)?;
    Some(waits[(waits.len() * percent).div_ceil(100).saturating_sub(1).min(last)])
}

/// How many stretches of so many pages the writes fell into.
pub fn stretches(writes: &[Write], pages: u64) -> u64 {
    writes.iter().map(|write| write.page / pages).collect::<BTreeSet<u64>>().len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writes(waits: impl IntoIterator<Item = u64>) -> Vec<Write> {
        let write = |(page, ms)| Write { due: Duration::ZERO, wait: Duration::from_millis(ms), page };
        (0..).zip(waits).map(write).collect()
    }

    #[test]
    fn percentiles_are_those_of_the_nearest_rank() {
        let hundred = writes((1..=100).rev());
        let of = |percent| percentile(&hundred, percent).map(|wait| wait.as_millis());
        assert_eq!((of(50), of(99), of(100)), (Some(50), Some(99), Some(100)));
        assert_eq!(percentile(&writes([7]), 99), Some(Duration::from_millis(7)));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn a_stretch_counts_once_however_often_it_is_written() {
        assert_eq!(stretches(&writes(vec![1; 40]), 16), 3);
        assert_eq!(stretches(&[], 16), 0);
    }

    #[test]
    fn each_page_has_one_owner() {
        let gateway = SocketAddr::from(([127, 0, 0, 1], 1));
        let load = Load { gateway, export: String::new(), pages: 2048, rate: 1, clients: 8, seed: 1 };
        let owners: BTreeSet<(usize, usize)> = (0..load.pages).map(|page| load.owner_of(page)).collect();
        assert_eq!(owners.len(), 2048);
        assert!(owners.iter().all(|(owner, place)| *owner < 8 && *place < 256));
    }
}
