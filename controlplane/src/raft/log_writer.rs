//! The thread that writes Raft's log: everything in the order in which it came, appends that wait together with one fdatasync.
//!
//! Driven by `log_store` alone. Raft goes on while the disk is busy: who waits for it answers no heartbeat and sends none, so that
//! a slow disk would cost a leader its office, and the election that follows would wait for that disk again.
//!
//! Invariants
//! - An entry is readable from when it is handed over: from `Tail`, until the database has it.
//! - Once an append has failed nothing more is written: the log has no holes.

use std::collections::VecDeque;
use std::io;
use std::ops::RangeBounds;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use openraft::storage::IOFlushed;
use redb::{Database, Durability};

use super::log_store::{COMMITTED, LOG, META, failed};
use super::{Entry, LogId, TypeConfig};

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
    Work(Work),
}

/// Entries that were handed over and are not known to be in the database, in order.
#[derive(Debug, Default)]
struct Tail(Mutex<VecDeque<Entry>>);

impl Tail {
    fn entries(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_until(&self, last: u64) {
        let mut entries = self.entries();
        while entries.front().is_some_and(|entry| entry.log_id.index() <= last) {
            entries.pop_front();
        }
    }
}

/// Dropping it waits until all that was handed over is written.
#[derive(Debug)]
pub struct LogWriter {
    /// `None` once it is dropped.
    jobs: Option<Sender<Job>>,
    tail: Arc<Tail>,
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
        let tail = Arc::new(Tail::default());
        let done = Arc::clone(&tail);
        let thread = thread::Builder::new()
            .name("raft-log".to_owned())
            .spawn(move || Writing { database: &database, tail: &done, failure: None }.run(&to_do))?;
        Ok(Self { jobs: Some(jobs), tail, thread: Some(thread) })
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
        self.tail.entries().extend(entries);
        self.hand_over(Job::Append { records, flushed })
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

    /// What of `range` is here, and from which index on everything is.
    pub fn tail(&self, range: &impl RangeBounds<u64>) -> (Option<u64>, Vec<Entry>) {
        let entries = self.tail.entries();
        let first = entries.front().map(|entry| entry.log_id.index());
        let within = entries.iter().filter(|entry| range.contains(&entry.log_id.index()));
        (first, within.cloned().collect())
    }

    pub fn last(&self) -> Option<LogId> {
        self.tail.entries().back().map(|entry| entry.log_id)
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
            Job::Work(work) => return Some(work),
        }
        None
    }

    fn commit(&self, database: &Database) -> io::Result<()> {
        let mut write = database.begin_write().map_err(failed)?;
        if self.records.is_empty() {
            // Written with the next durable transaction: Raft finds out again what was committed.
            write.set_durability(Durability::None).map_err(failed)?;
        }
        {
            let mut log = write.open_table(LOG).map_err(failed)?;
            for (index, record) in &self.records {
                log.insert(index, record.as_slice()).map_err(failed)?;
            }
            let mut meta = write.open_table(META).map_err(failed)?;
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
    tail: &'a Tail,
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
        if batch.flushed.is_empty() && batch.committed.is_none() {
            return;
        }
        if let Err(error) = self.usable().and_then(|()| batch.commit(self.database)) {
            self.failure = Some((error.kind(), error.to_string()));
        } else if let Some((last, _)) = batch.records.last() {
            self.tail.drop_until(*last);
        }
        for flushed in batch.flushed {
            flushed.io_completed(self.usable());
        }
    }
}

#[cfg(test)]
mod tests;
