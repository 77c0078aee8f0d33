//! The thread that writes Raft's log: everything in the order in which it came, appends that wait together with one fdatasync.
//!
//! Driven by `log_store` alone. Raft goes on while the disk is busy: who waits for it answers no heartbeat and sends none, so that
//! a slow disk would cost a leader its office, and the election that follows would wait for that disk again.
//!
//! Invariants
//! - An entry is readable from when it is handed over, from `Tail` until the database has it; what is purged is not.
//! - Once a write has failed nothing more is written: the log has no holes.
//! - What waits is bounded: beyond `WAITING_BYTES_MAX` Raft waits, and loses its office, as if the disk had failed.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use openraft::storage::IOFlushed;
use redb::{Database, Durability};

use super::log_store::{COMMITTED, LOG, META, PURGED, failed};
use super::{Entry, LogId, TypeConfig};

/// Thousands of group changes; all other memory of the process is less.
const WAITING_BYTES_MAX: usize = 16 << 20;

/// Handed the database, or why nothing is written any more.
type Work = Box<dyn FnOnce(io::Result<&Database>) + Send>;

/// Index and sealed record of an entry.
pub type Record = (u64, Vec<u8>);

enum Job {
    Append {
        records: Vec<Record>,
        flushed: IOFlushed<TypeConfig>,
    },
    /// The committed position, sealed. Not durable by itself.
    Committed(Vec<u8>),
    /// Everything up to an index goes; the last of it, sealed.
    Purge(Record),
    Work(Work),
}

/// What was handed over and is not known to be in the database.
#[derive(Debug, Default)]
pub struct Tail {
    /// In order.
    pub entries: VecDeque<Entry>,
    /// Nothing up to here is to be seen any more.
    pub purged: Option<LogId>,
}

impl Tail {
    pub fn is_purged(&self, index: u64) -> bool {
        self.purged.is_some_and(|purged| index <= purged.index())
    }
}

#[derive(Debug, Default)]
struct Shared {
    tail: Mutex<Tail>,
    /// Of records that are not written yet.
    waiting_bytes: AtomicUsize,
}

impl Shared {
    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_until(&self, last: u64) {
        let entries = &mut self.tail().entries;
        while entries.front().is_some_and(|entry| entry.log_id.index() <= last) {
            entries.pop_front();
        }
    }
}

fn bytes_of(records: &[Record]) -> usize {
    records.iter().map(|(_, record)| record.len()).sum()
}

/// Dropping it waits until all that was handed over is written.
#[derive(Debug)]
pub struct LogWriter {
    /// `None` once it is dropped.
    jobs: Option<Sender<Job>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes Raft's log has panicked");
        }
    }
}

impl LogWriter {
    pub fn start(database: Arc<Database>) -> io::Result<Self> {
        let (jobs, to_do) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let done = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("raft-log".to_owned())
            .spawn(move || Writing { database: &database, shared: &done, failure: None }.run(&to_do))?;
        Ok(Self { jobs: Some(jobs), shared, thread: Some(thread) })
    }

    fn hand_over(&self, job: Job) -> io::Result<()> {
        let ended = || io::Error::other("the thread that writes Raft's log has ended");
        self.jobs.as_ref().ok_or_else(ended)?.send(job).map_err(|_| ended())
    }

    /// Returns at once; `flushed` is told when the entries are on stable media.
    pub fn append(
        &self,
        entries: Vec<Entry>,
        records: Vec<Record>,
        flushed: IOFlushed<TypeConfig>,
    ) -> io::Result<()> {
        let bytes = bytes_of(&records);
        self.shared.tail().entries.extend(entries);
        let waiting = self.shared.waiting_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.hand_over(Job::Append { records, flushed })?;
        if waiting > WAITING_BYTES_MAX { self.run(|_| Ok(())) } else { Ok(()) }
    }

    /// Returns at once; what is purged is not seen any more.
    pub fn purge(&self, last: LogId, sealed: Vec<u8>) -> io::Result<()> {
        self.shared.tail().purged = Some(last);
        self.hand_over(Job::Purge((last.index(), sealed)))
    }

    pub fn committed(&self, sealed: Vec<u8>) -> io::Result<()> {
        self.hand_over(Job::Committed(sealed))
    }

    /// Does `work` after all that was handed over before, and waits for it.
    ///
    /// # Errors
    /// Those of `work`; the log could not be written before.
    pub fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, answered) = mpsc::sync_channel(1);
        let work: Work = Box::new(move |database| {
            // Who asked waits for nothing else.
            let _ = answer.send(database.and_then(work));
        });
        blocking(|| {
            self.hand_over(Job::Work(work))?;
            answered.recv().map_err(io::Error::other)?
        })
    }

    /// To be looked at before the database: what is not here any more is there.
    pub fn tail(&self) -> MutexGuard<'_, Tail> {
        self.shared.tail()
    }
}

/// Runs what waits for the disk without holding up the other tasks of this thread.
pub fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// What one transaction holds.
#[derive(Default)]
struct Batch {
    records: Vec<Record>,
    flushed: Vec<IOFlushed<TypeConfig>>,
    committed: Option<Vec<u8>>,
    purged: Option<Record>,
}

impl Batch {
    /// Takes the job in, or gives back what stands for itself.
    fn add(&mut self, job: Job) -> Option<Work> {
        match job {
            Job::Append { records, flushed } => {
                self.records.extend(records);
                self.flushed.push(flushed);
            }
            Job::Committed(sealed) => self.committed = Some(sealed),
            Job::Purge(last) => self.purged = Some(last),
            Job::Work(work) => return Some(work),
        }
        None
    }

    fn commit(&self, database: &Database) -> io::Result<()> {
        let mut write = database.begin_write().map_err(failed)?;
        if self.records.is_empty() && self.purged.is_none() {
            // Written with the next durable transaction: Raft finds out again what was committed.
            write.set_durability(Durability::None).map_err(failed)?;
        }
        {
            let mut log = write.open_table(LOG).map_err(failed)?;
            for (index, record) in &self.records {
                log.insert(index, record.as_slice()).map_err(failed)?;
            }
            let mut meta = write.open_table(META).map_err(failed)?;
            if let Some((last, sealed)) = &self.purged {
                log.retain_in::<u64, _>(..=*last, |_, _| false).map_err(failed)?;
                meta.insert(PURGED, sealed.as_slice()).map_err(failed)?;
            }
            if let Some(sealed) = &self.committed {
                meta.insert(COMMITTED, sealed.as_slice()).map_err(failed)?;
            }
        }
        write.commit().map_err(failed)
    }
}

/// The thread's own state.
struct Writing<'a> {
    database: &'a Database,
    shared: &'a Shared,
    /// Why nothing is written any more.
    failure: Option<(io::ErrorKind, String)>,
}

impl Writing<'_> {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut batch = Batch::default();
            let mut work = batch.add(first);
            while work.is_none()
                && let Ok(job) = jobs.try_recv()
            {
                work = batch.add(job);
            }
            self.write(batch);
            if let Some(work) = work {
                work(self.usable().map(|()| self.database));
            }
        }
    }

    fn usable(&self) -> io::Result<()> {
        match &self.failure {
            None => Ok(()),
            Some((kind, message)) => Err(io::Error::new(*kind, message.clone())),
        }
    }

    fn write(&mut self, batch: Batch) {
        if batch.flushed.is_empty() && batch.committed.is_none() && batch.purged.is_none() {
            return;
        }
        if let Err(error) = self.usable().and_then(|()| batch.commit(self.database)) {
            self.failure = Some((error.kind(), error.to_string()));
        } else if let Some((last, _)) = batch.records.last() {
            self.shared.drop_until(*last);
        }
        self.shared.waiting_bytes.fetch_sub(bytes_of(&batch.records), Ordering::Relaxed);
        for flushed in batch.flushed {
            flushed.io_completed(self.usable());
        }
    }
}

#[cfg(test)]
mod tests;
