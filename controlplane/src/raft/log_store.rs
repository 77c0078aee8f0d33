//! What must survive: vote, log, committed position, snapshot and the node's own identity, in redb.
//!
//! Driven by openraft, and by `membership` for the identity. One transaction is one fdatasync.
//!
//! Invariants
//! - `append`, `save_vote`, `truncate_after` and `purge` are on stable media when they report so.
//! - The log has no holes: entries go in order, are truncated at the end and purged at the start.
//! - The committed position may lag after power loss: it is a hint, and only ever behind the truth.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::Path;
use std::sync::Arc;

use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use xsan_protocol::proto;

use super::encoding::{self, seal, unseal};
use super::{Entry, LogId, TypeConfig, Vote};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";
const SNAPSHOT: &str = "snapshot";
const IDENTITY: &str = "identity";

/// The log is short (snapshots every thousand entries): a small cache keeps the idle process small.
const CACHE_BYTES: usize = 8 * 1024 * 1024;

/// A handle; clones share the database.
#[derive(Clone, Debug)]
pub struct LogStore {
    database: Arc<Database>,
}

/// Who this node is in its cluster, kept beside the log because the two are worthless without each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftIdentity {
    /// Drawn when the data directory was made.
    pub instance: u64,
    /// 0 until the cluster has taken the node in.
    pub node: u32,
}

fn failed(error: impl Into<redb::Error>) -> io::Error {
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
        let database = Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(failed)?;
        let write = database.begin_write().map_err(failed)?;
        write.open_table(LOG).map_err(failed)?;
        write.open_table(META).map_err(failed)?;
        write.commit().map_err(failed)?;
        Ok(Self { database: Arc::new(database) })
    }

    fn read_meta<M: prost::Message + Default>(&self, key: &str) -> io::Result<Option<M>> {
        let read = self.database.begin_read().map_err(failed)?;
        let meta = read.open_table(META).map_err(failed)?;
        let value = meta.get(key).map_err(failed)?;
        value.map(|value| Ok(unseal(value.value())?)).transpose()
    }

    fn write_meta(&self, key: &str, value: &impl prost::Message, durability: Durability) -> io::Result<()> {
        blocking(|| {
            let mut write = self.database.begin_write().map_err(failed)?;
            write.set_durability(durability).map_err(failed)?;
            write.open_table(META).map_err(failed)?.insert(key, seal(value).as_slice()).map_err(failed)?;
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
        self.write_meta(IDENTITY, &record, Durability::Immediate)
    }

    pub fn read_snapshot(&self) -> io::Result<Option<proto::SnapshotRecord>> {
        self.read_meta(SNAPSHOT)
    }

    /// Durable when it returns. One that is older than what is there changes nothing: a snapshot may be installed, and the log
    /// behind it purged, while one of before is still being built.
    pub fn save_snapshot(&self, snapshot: &proto::SnapshotRecord) -> io::Result<()> {
        let index = |snapshot: &proto::SnapshotRecord| snapshot.last.as_ref().map(|last| last.index);
        blocking(|| {
            let write = self.database.begin_write().map_err(failed)?;
            {
                let mut meta = write.open_table(META).map_err(failed)?;
                let present = meta.get(SNAPSHOT).map_err(failed)?;
                let present: Option<proto::SnapshotRecord> =
                    present.map(|value| unseal(value.value())).transpose()?;
                if present.is_some_and(|present| index(&present) > index(snapshot)) {
                    return Ok(());
                }
                meta.insert(SNAPSHOT, seal(snapshot).as_slice()).map_err(failed)?;
            }
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
        let purged: Option<proto::LogPosition> = self.read_meta(PURGED)?;
        let purged = purged.as_ref().map(encoding::log_id);
        let read = self.database.begin_read().map_err(failed)?;
        let log = read.open_table(LOG).map_err(failed)?;
        let last = match log.last().map_err(failed)? {
            Some((_, value)) => Some(encoding::entry(unseal(value.value())?)?.log_id),
            None => purged,
        };
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    fn entries(&self, range: impl RangeBounds<u64>) -> io::Result<Vec<Entry>> {
        let read = self.database.begin_read().map_err(failed)?;
        let log = read.open_table(LOG).map_err(failed)?;
        let bounds = (range.start_bound().cloned(), range.end_bound().cloned());
        let mut entries = Vec::new();
        for pair in log.range::<u64>(bounds).map_err(failed)? {
            let (_, value) = pair.map_err(failed)?;
            entries.push(encoding::entry(unseal(value.value())?)?);
        }
        Ok(entries)
    }

    fn append_entries(&self, entries: impl IntoIterator<Item = Entry>) -> io::Result<()> {
        let write = self.database.begin_write().map_err(failed)?;
        {
            let mut log = write.open_table(LOG).map_err(failed)?;
            for entry in entries {
                let bytes = seal(&encoding::entry_record(&entry));
                log.insert(entry.log_id.index(), bytes.as_slice()).map_err(failed)?;
            }
        }
        write.commit().map_err(failed)
    }

    /// Removes the entries of `range`, and remembers `purged` as the last one before the log, if given.
    fn remove(&self, range: (Bound<u64>, Bound<u64>), purged: Option<&LogId>) -> io::Result<()> {
        let write = self.database.begin_write().map_err(failed)?;
        {
            let mut log = write.open_table(LOG).map_err(failed)?;
            log.retain_in::<u64, _>(range, |_, _| false).map_err(failed)?;
            if let Some(purged) = purged {
                let mut meta = write.open_table(META).map_err(failed)?;
                let bytes = seal(&encoding::position(purged));
                meta.insert(PURGED, bytes.as_slice()).map_err(failed)?;
            }
        }
        write.commit().map_err(failed)
    }
}

/// Runs what waits for the disk without holding up the other tasks of this thread.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        self.entries(range)
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
        self.write_meta(VOTE, &encoding::vote_record(vote), Durability::Immediate)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        match committed {
            // Written with the next durable transaction: Raft finds out again what was committed.
            Some(log_id) => self.write_meta(COMMITTED, &encoding::position(&log_id), Durability::None),
            None => Ok(()),
        }
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let record: Option<proto::LogPosition> = self.read_meta(COMMITTED)?;
        Ok(record.as_ref().map(encoding::log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        blocking(|| self.append_entries(entries))?;
        callback.io_completed(Ok(()));
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let start = last_log_id.map_or(Bound::Unbounded, |last| Bound::Excluded(last.index()));
        blocking(|| self.remove((start, Bound::Unbounded), None))
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        blocking(|| self.remove((Bound::Unbounded, Bound::Included(log_id.index())), Some(&log_id)))
    }
}
