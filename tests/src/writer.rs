//! A depth-1 writer that measures how long it was held up, and remembers what it was promised.
//!
//! It writes stamped pages of its own range, each by itself, and reconnects when its gateway goes away, as
//! a client with several addresses does; how often that happened is counted, for a test to explain. A request without an
//! answer is a failure. The longest gap between two answers is the stall that a guest would
//! have seen; its pages can be verified afterwards against what was acknowledged and what was flushed.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::history::{History, Operation};
use crate::nbd::{Client, NbdError};
use crate::random::Random;
use crate::stamp::{PAGE_SIZE, Stamp};
use crate::wait::{Look, until};

/// Longer than any stall that is allowed, so that a slow answer is measured and not cut off.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(40);
const RECONNECT_PAUSE: Duration = Duration::from_millis(10);

/// Pages `step` apart, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    pub first: u64,
    pub step: u64,
    pub count: u64,
}

impl Pages {
    fn choose(self, random: &mut Random) -> u64 {
        self.first + random.within(0..self.count) * self.step
    }
}

impl From<Range<u64>> for Pages {
    fn from(range: Range<u64>) -> Self {
        Self { first: range.start, step: 1, count: range.end - range.start }
    }
}

/// What the writer works on.
#[derive(Clone, Debug)]
pub struct Work {
    /// Tried in order, from the one that worked last.
    pub gateways: Vec<SocketAddr>,
    pub export: String,
    /// Written by this writer alone.
    pub pages: Pages,
    /// Read: its own, and those of others with the same seed.
    pub read_pages: Vec<Pages>,
    /// A flush after so many writes; 0: never.
    pub flush_interval: u64,
    /// In hundred: how many of the operations read a page back instead of writing one.
    pub read_percent: u64,
    pub seed: u64,
}

impl Work {
    /// Writes `pages`, and reads nothing but them.
    pub fn new(gateways: Vec<SocketAddr>, export: &str, pages: impl Into<Pages>, seed: u64) -> Self {
        let pages = pages.into();
        let (export, read_pages) = (export.to_owned(), vec![pages]);
        Self { gateways, export, pages, read_pages, flush_interval: 0, read_percent: 0, seed }
    }
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promise {
    pub flushed: u64,
    pub acknowledged: u64,
    /// The newest generation that was sent: it may have arrived though no answer did.
    pub sent: u64,
}

/// By page of the volume.
pub type Promises = BTreeMap<u64, Promise>;

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub operations: u64,
    /// Of these.
    pub writes: u64,
    pub flushes: u64,
    /// Connections that broke: each must be explained by the death of a gateway's process.
    pub losses: u64,
    pub stall: Duration,
    pub pages: Promises,
    pub history: History,
}

pub struct Writer {
    stop: Arc<AtomicBool>,
    operations: Arc<AtomicU64>,
    measure_anew: Arc<AtomicBool>,
    /// Why its thread ended, when it was not told to.
    failure: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<Result<Report>>>,
    seed: u64,
}

impl Writer {
    /// Starts, and waits for the first answers: what comes before them is set-up, not a stall.
    pub fn start(work: Work) -> Result<Self> {
        Self::start_at(work, Instant::now())
    }

    /// Several writers whose histories are merged share one `origin` of time.
    pub fn start_at(work: Work, origin: Instant) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let operations = Arc::new(AtomicU64::new(0));
        let failure = Arc::new(Mutex::new(None));
        let seed = work.seed;
        let measure_anew = Arc::new(AtomicBool::new(false));
        let mut task = Task::connect(work, origin, Arc::clone(&measure_anew))?;
        let thread = {
            let (stop, operations, failure) =
                (Arc::clone(&stop), Arc::clone(&operations), Arc::clone(&failure));
            thread::Builder::new().name("writer".to_owned()).spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = task.step() {
                        let gateway = task.work.gateways[task.gateway];
                        let message = format!("{error:#}, through {gateway}");
                        *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
                        return Err(error);
                    }
                    operations.store(task.report.operations, Ordering::Relaxed);
                }
                Ok(task.report)
            })?
        };
        let writer = Self { stop, operations, measure_anew, failure, thread: Some(thread), seed };
        writer.wait_operations(10, REQUEST_TIMEOUT)?;
        Ok(writer)
    }

    /// Waits until so many more operations were answered.
    pub fn wait_operations(&self, more: u64, deadline: Duration) -> Result<()> {
        let goal = self.operations() + more;
        until("the writer's answers", deadline, || {
            let answered = self.operations();
            if answered >= goal {
                return Ok(Look::Done(()));
            }
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
                bail!("the writer of seed {} has failed: {}", self.seed, failure.unwrap_or_default());
            }
            Ok(Look::NotYet(format!("{answered} of {goal}")))
        })
    }

    /// The stall is that of what follows: of the gap under way, and of those behind it.
    pub fn measure_anew(&self) {
        self.measure_anew.store(true, Ordering::Relaxed);
    }

    /// The answers so far.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().context("the writer was stopped already")?;
        thread.join().map_err(|_| anyhow!("the writer panicked"))?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The writer's own thread's state.
struct Task {
    work: Work,
    client: Option<Client>,
    gateway: usize,
    random: Random,
    origin: Instant,
    last_answer: Instant,
    measure_anew: Arc<AtomicBool>,
    buffer: Vec<u8>,
    report: Report,
}

impl Task {
    fn connect(work: Work, origin: Instant, measure_anew: Arc<AtomicBool>) -> Result<Self> {
        ensure!(!work.gateways.is_empty(), "a writer needs a gateway");
        let client = Client::connect(work.gateways[0], &work.export, REQUEST_TIMEOUT)?;
        // Writers of one seed do not do the same at the same time.
        let random = Random::new(work.seed ^ work.pages.first.rotate_left(32));
        let (last_answer, buffer) = (Instant::now(), vec![0; PAGE_SIZE]);
        let (client, report) = (Some(client), Report::default());
        Ok(Self { work, client, gateway: 0, random, origin, last_answer, measure_anew, buffer, report })
    }

    fn step(&mut self) -> Result<()> {
        let Some(mut client) = self.client.take() else { return self.reconnect() };
        let reads = self.random.within(0..100) < self.work.read_percent;
        let pages = if reads {
            self.work.read_pages[self.random.index(self.work.read_pages.len())]
        } else {
            self.work.pages
        };
        let page = pages.choose(&mut self.random);
        let result = if reads { self.read(&mut client, page) } else { self.write(&mut client, page) };
        match result {
            Ok(()) => {
                self.measure();
                self.report.operations += 1;
                self.client = Some(client);
                Ok(())
            }
            // A gateway that lives and does not answer is no gateway that died.
            Err(Failure::Nbd(NbdError::Connection(error))) if is_timeout(&error) => {
                bail!("no answer for {:?} at page {page}", self.last_answer.elapsed())
            }
            Err(Failure::Nbd(NbdError::Connection(_))) => {
                self.report.losses += 1;
                Ok(())
            }
            Err(Failure::Nbd(error)) => Err(error).with_context(|| format!("at page {page}")),
            Err(Failure::Content(message)) => bail!(message),
        }
    }

    fn write(&mut self, client: &mut Client, page: u64) -> Result<(), Failure> {
        let promise = self.report.pages.entry(page).or_default();
        promise.sent += 1;
        let generation = promise.sent;
        Stamp { page, generation, seed: self.work.seed }.fill(&mut self.buffer);
        let began = self.origin.elapsed();
        let result = client.write(page * PAGE_SIZE as u64, &self.buffer);
        let ended = result.is_ok().then(|| self.origin.elapsed());
        self.report.history.record(page, Operation::Write { generation, began, ended });
        result?;
        promise.acknowledged = generation;
        self.measure();
        self.report.writes += 1;
        let interval = self.work.flush_interval;
        if interval > 0 && self.report.writes.is_multiple_of(interval) {
            client.flush()?;
            self.report.flushes += 1;
            for promise in self.report.pages.values_mut() {
                promise.flushed = promise.acknowledged;
            }
        }
        Ok(())
    }

    fn read(&mut self, client: &mut Client, page: u64) -> Result<(), Failure> {
        let began = self.origin.elapsed();
        client.read(page * PAGE_SIZE as u64, &mut self.buffer)?;
        let ended = self.origin.elapsed();
        let generation =
            Stamp::generation_of(&self.buffer, page, self.work.seed).map_err(Failure::Content)?;
        self.report.history.record(page, Operation::Read { generation, began, ended });
        Ok(())
    }

    /// An answer has come.
    fn measure(&mut self) {
        if self.measure_anew.swap(false, Ordering::Relaxed) {
            self.report.stall = Duration::ZERO;
        }
        self.report.stall = self.report.stall.max(self.last_answer.elapsed());
        self.last_answer = Instant::now();
    }

    fn reconnect(&mut self) -> Result<()> {
        let address = self.work.gateways[self.gateway];
        match Client::connect(address, &self.work.export, REQUEST_TIMEOUT) {
            Ok(client) => self.client = Some(client),
            Err(error) => {
                let waited = self.last_answer.elapsed();
                ensure!(waited < REQUEST_TIMEOUT, "no gateway for {waited:?}; {address} last said: {error}");
                self.gateway = (self.gateway + 1) % self.work.gateways.len();
                thread::sleep(RECONNECT_PAUSE);
            }
        }
        Ok(())
    }
}

/// A socket whose time is up says either.
fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

enum Failure {
    Nbd(NbdError),
    Content(String),
}

impl From<NbdError> for Failure {
    fn from(error: NbdError) -> Self {
        Self::Nbd(error)
    }
}

impl Report {
    /// Reads every page that was written: each holds what was acknowledged, or a newer one that was sent.
    /// Returns the number of bytes verified.
    pub fn verify(&self, client: &mut Client, seed: u64) -> Result<u64> {
        verify(&self.pages, client, seed, |promise| promise.acknowledged)
    }

    /// As `verify`, for a fault that may take what was not flushed.
    pub fn verify_flushed(&self, client: &mut Client, seed: u64) -> Result<u64> {
        verify(&self.pages, client, seed, |promise| promise.flushed)
    }
}

/// Reads every page: each holds what `floor` says, or a newer one that was sent. Returns the number of bytes verified.
pub fn verify(
    pages: &Promises,
    client: &mut Client,
    seed: u64,
    floor: impl Fn(&Promise) -> u64,
) -> Result<u64> {
    let mut bytes = vec![0; PAGE_SIZE];
    for (page, promise) in pages {
        client.read(page * PAGE_SIZE as u64, &mut bytes).with_context(|| format!("reading page {page}"))?;
        let generation = Stamp::generation_of(&bytes, *page, seed).map_err(|message| anyhow!(message))?;
        let expected = floor(promise)..=promise.sent;
        ensure!(
            expected.contains(&generation),
            "page {page} holds generation {generation}, expected {expected:?}"
        );
    }
    Ok(pages.len() as u64 * PAGE_SIZE as u64)
}
