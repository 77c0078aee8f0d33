//! What must survive: vote, log, committed position, snapshot and the node's own identity, in redb.
//!
//! Driven by openraft, and by `membership` for the identity. One transaction is one fdatasync, and `log_writer` makes them all.
//!
//! Invariants
//! - `append`, `save_vote` and `truncate_after` are on stable media when they report so; `append` reports later than it returns, and
//!   `purge` is seen at once and written in its turn.
//! - The log has no holes: entries go in order, are truncated at the end and purged at the start.
//! - The committed position may lag after power loss: it is a hint, and only ever behind the truth.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use xsan_protocol::proto;

use super::encoding::{self, seal, unseal};
use super::log_writer::{LogWriter, blocking};
use super::network::BATCH_BYTES_MAX;
use super::{Entry, LogId, TypeConfig, Vote};

pub(super) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

const VOTE: &str = "vote";
pub(super) const COMMITTED: &str = "committed";
pub(super) const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";
const IDENTITY: &str = "identity";

/// The log is short (snapshots every thousand entries): a small cache keeps the idle process small.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

/// A handle; clones share the database.
#[derive(Clone, Debug)]
pub struct LogStore {
    database: Arc<Database>,
    writer: Arc<LogWriter>,
}

/// Who this node is in its cluster, kept beside the log because the two are worthless without each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftIdentity {
    /// Drawn when the data directory was made.
    pub instance: u64,
    /// 0 until the cluster has taken the node in.
    pub node: u32,
}

pub(super) fn failed(error: impl Into<redb::Error>) -> io::Error {
    match error.into() {
        redb::Error::Io(error) => error,
        error => io::Error::other(error),
    }
}

impl LogStore {
    /// Opens or makes the database.
    ///
    /// # Errors
    /// The file can not be opened, is in use, or is damaged.
    pub fn open(path: &Path) -> io::Result<Self> {
        forget_cached(path)?;
        Self::of(Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(failed)?)
    }

    pub(super) fn of(database: Database) -> io::Result<Self> {
        let write = database.begin_write().map_err(failed)?;
        write.open_table(LOG).map_err(failed)?;
        write.open_table(META).map_err(failed)?;
        write.commit().map_err(failed)?;
        let database = Arc::new(database);
        Ok(Self { writer: Arc::new(LogWriter::start(Arc::clone(&database))?), database })
    }

    fn read_meta<M: prost::Message + Default>(&self, key: &str) -> io::Result<Option<M>> {
        blocking(|| read_meta(&self.database, key))
    }

    /// Durable when it returns.
    fn write_meta(&self, key: &'static str, value: &impl prost::Message) -> io::Result<()> {
        let sealed = seal(value);
        self.writer.run(move |database| {
            let write = database.begin_write().map_err(failed)?;
            write.open_table(META).map_err(failed)?.insert(key, sealed.as_slice()).map_err(failed)?;
            write.commit().map_err(failed)
        })
    }

    pub fn read_identity(&self) -> io::Result<Option<RaftIdentity>> {
        let record: Option<proto::NodeRecord> = self.read_meta(IDENTITY)?;
        Ok(record.map(|record| RaftIdentity {
            instance: record.instance,
            node: record.node.map_or(0, |node| node.id),
        }))
    }

    /// Durable when it returns.
    pub fn save_identity(&self, identity: RaftIdentity) -> io::Result<()> {
        let node = proto::Node { id: identity.node, ..proto::Node::default() };
        let record = proto::NodeRecord {
            node: Some(node),
            instance: identity.instance,
            ..proto::NodeRecord::default()
        };
        self.write_meta(IDENTITY, &record)
    }

    pub fn read_snapshot(&self) -> io::Result<Option<proto::SnapshotRecord>> {
        self.read_meta(SNAPSHOT)
    }

    /// Durable when it returns. One that is older than what is there changes nothing: a snapshot may be installed, and the log
    /// behind it purged, while one of before is still being built.
    pub fn save_snapshot(&self, snapshot: &proto::SnapshotRecord) -> io::Result<()> {
        let index = |snapshot: &proto::SnapshotRecord| snapshot.last.as_ref().map(|last| last.index);
        let (new, sealed) = (index(snapshot), seal(snapshot));
        self.writer.run(move |database| {
            let present: Option<proto::SnapshotRecord> = read_meta(database, SNAPSHOT)?;
            if present.is_some_and(|present| index(&present) > new) {
                return Ok(());
            }
            let write = database.begin_write().map_err(failed)?;
            write.open_table(META).map_err(failed)?.insert(SNAPSHOT, sealed.as_slice()).map_err(failed)?;
            write.commit().map_err(failed)
        })
    }

    /// Could `applied` have been applied by this log? Not when it is beyond its end, or of another term.
    pub fn holds(&self, applied: &LogId) -> io::Result<bool> {
        let state = self.log_state()?;
        let snapshot = self.read_snapshot()?.and_then(|snapshot| snapshot.last);
        if snapshot.is_some_and(|last| applied.index() <= last.index) {
            return Ok(true);
        }
        if state.last_purged_log_id.is_some_and(|purged| applied.index() <= purged.index()) {
            return Ok(true);
        }
        let index = applied.index();
        Ok(self.entries(index..=index)?.first().is_some_and(|entry| entry.log_id == *applied))
    }

    fn log_state(&self) -> io::Result<LogState<TypeConfig>> {
        let (purged_here, last_here) = {
            let tail = self.writer.tail();
            (tail.purged, tail.entries.back().map(|entry| entry.log_id))
        };
        let purged: Option<proto::LogPosition> = self.read_meta(PURGED)?;
        let purged = purged_here.or_else(|| purged.as_ref().map(encoding::log_id));
        let last = match last_here {
            Some(last) => Some(last),
            None => self.last_written()?,
        };
        let is_left = |last: &LogId| purged.is_none_or(|purged| last.index() > purged.index());
        Ok(LogState { last_purged_log_id: purged, last_log_id: last.filter(is_left).or(purged) })
    }

    fn last_written(&self) -> io::Result<Option<LogId>> {
        let read = self.database.begin_read().map_err(failed)?;
        let log = read.open_table(LOG).map_err(failed)?;
        let last = log.last().map_err(failed)?;
        last.map(|(_, value)| Ok(encoding::entry(unseal(value.value())?)?.log_id)).transpose()
    }

    fn entries(&self, range: impl RangeBounds<u64>) -> io::Result<Vec<Entry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let (first, start, mut newest) = {
            let tail = self.writer.tail();
            let first = tail.entries.front().map_or(u64::MAX, |entry| entry.log_id.index());
            let wanted = |index| range.contains(&index) && !tail.is_purged(index);
            let newest = tail.entries.iter().filter(|entry| wanted(entry.log_id.index()));
            let purged = tail.purged.map_or(0, |purged| purged.index() + 1);
            (first, start.max(purged), newest.cloned().collect())
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        let mut entries =
            if start < end.min(first) { self.written(start..end.min(first))? } else { Vec::new() };
        entries.append(&mut newest);
        Ok(entries)
    }

    fn written(&self, range: Range<u64>) -> io::Result<Vec<Entry>> {
        blocking(|| {
            let read = self.database.begin_read().map_err(failed)?;
            let log = read.open_table(LOG).map_err(failed)?;
            let mut entries = Vec::new();
            for pair in log.range::<u64>(range).map_err(failed)? {
                let (_, value) = pair.map_err(failed)?;
                entries.push(encoding::entry(unseal(value.value())?)?);
            }
            Ok(entries)
        })
    }
}

/// Has the kernel read the file anew from its device. After a flush that failed it takes what it has in memory for what
/// is there: a process that is started again would go on from a vote, or entries, that the next loss of power takes.
///
/// Source: Rebello et al., "Can Applications Recover from fsync Failures?", ATC '20.
fn forget_cached(path: &Path) -> io::Result<()> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result?,
    };
    // SAFETY: the descriptor is open, and no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn read_meta<M: prost::Message + Default>(database: &Database, key: &str) -> io::Result<Option<M>> {
    let read = database.begin_read().map_err(failed)?;
    let meta = read.open_table(META).map_err(failed)?;
    let value = meta.get(key).map_err(failed)?;
    value.map(|value| Ok(unseal(value.value())?)).transpose()
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.entries(range)
    }

    /// As many as a message holds and a slow link takes in time, but one at least.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let mut entries = self.entries(start..end)?;
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += encoding::entry_record(entry).encoded_len();
            bytes <= BATCH_BYTES_MAX
        };
        let count = entries.iter().take_while(fits).count();
        entries.truncate(count.max(1));
        Ok(entries)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let record: Option<proto::VoteRecord> = self.read_meta(VOTE)?;
        Ok(record.as_ref().map(encoding::vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.log_state()
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.write_meta(VOTE, &encoding::vote_record(vote))
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        match committed {
            Some(log_id) => self.writer.committed(seal(&encoding::position(&log_id))),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let record: Option<proto::LogPosition> =
            self.writer.run(|database| read_meta(database, COMMITTED))?;
        Ok(record.as_ref().map(encoding::log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let sealed = |entry: &Entry| (entry.log_id.index(), seal(&encoding::entry_record(entry)));
        let records = entries.iter().map(sealed).collect();
        self.writer.append(entries, records, callback)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let first = last_log_id.map_or(0, |last| last.index() + 1);
        self.writer.run(move |database| {
            let write = database.begin_write().map_err(failed)?;
            let mut log = write.open_table(LOG).map_err(failed)?;
            log.retain_in::<u64, _>(first.., |_, _| false).map_err(failed)?;
            drop(log);
            write.commit().map_err(failed)
        })
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.writer.purge(log_id, seal(&encoding::position(&log_id)))
    }
}
