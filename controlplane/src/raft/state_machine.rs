//! The applied state: in memory for readers, in sled for a quick start, in redb as snapshots.
//!
//! Driven by openraft. Publishes every new state through a watch channel; never waits for a reader.
//!
//! Invariants
//! - The records in sled, their digest and the applied position change in one batch: a crash leaves all or none.
//! - What does not open, decode, match its digest or fit the log is wiped and rebuilt from snapshot and log.
//! - A snapshot is durable in redb before openraft purges the log it stands for.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use prost::Message;
use tokio::sync::watch;
use xsan_protocol::checksum::crc64;
use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto;

use super::encoding::{self, FORMAT, RecordError, seal, unseal};
use super::log_store::LogStore;
use super::log_writer::blocking;
use super::{LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig};
use crate::state::command::Reply;
use crate::state::image::ImageError;
use crate::state::{ClusterState, Touched};

const APPLIED: &[u8] = b"applied";
/// Enough for thousands of groups; the whole state is in memory anyway.
const CACHE_BYTES: u64 = 8 * 1024 * 1024;
/// sled's background flush. Losing it costs only a replay of the log, so it need not keep the disk awake.
const FLUSH_EVERY_MS: u64 = 2000;

#[derive(Debug)]
pub struct StateMachine {
    database: sled::Db,
    store: LogStore,
    state: ClusterState,
    applied: Option<LogId>,
    membership: StoredMembership,
    digest: u64,
    published: watch::Sender<Arc<ClusterState>>,
}

/// Why the applied state is rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum StateStoreError {
    #[error("sled: {0}")]
    Sled(#[from] sled::Error),
    #[error("{0}")]
    Record(#[from] RecordError),
    #[error("{0}")]
    Image(#[from] ImageError),
    #[error("the digest of its records is {found:016x}, it was written as {expected:016x}")]
    Digest { found: u64, expected: u64 },
    #[error("entry {index} of term {term} that it has applied is not in the log")]
    NotInLog { term: u64, index: u64 },
    #[error("the log: {0}")]
    Log(io::Error),
}

impl StateStoreError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Record(error) => error.code(),
            _ => Code::StoreCorrupt,
        }
    }
}

impl From<StateStoreError> for io::Error {
    fn from(error: StateStoreError) -> Self {
        Self::other(error)
    }
}

/// What sled held.
#[derive(Default)]
struct Loaded {
    state: ClusterState,
    applied: Option<LogId>,
    membership: StoredMembership,
    digest: u64,
}

impl StateMachine {
    /// Opens the applied state; wipes it when it is not what the log led to.
    ///
    /// # Errors
    /// The directory can not be written.
    pub fn open(path: &Path, store: LogStore) -> io::Result<Self> {
        let opened = open_sled(path).and_then(|database| Ok((load(&database, &store)?, database)));
        let (loaded, database) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                let code = error.code().number();
                tracing::warn!(code, "the applied state is rebuilt from snapshot and log: {error}");
                wipe(path)?;
                (Loaded::default(), open_sled(path)?)
            }
        };
        let Loaded { state, applied, membership, digest } = loaded;
        let (published, _) = watch::channel(Arc::new(state.clone()));
        Ok(Self { database, store, state, applied, membership, digest, published })
    }

    /// Every state from now on.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.published.subscribe()
    }

    /// Writes what `touched` names, and the applied position, as one batch.
    fn persist(&mut self, touched: &Touched) -> Result<(), StateStoreError> {
        let mut batch = sled::Batch::default();
        for (key, value) in self.state.records(touched) {
            let key = key.encode();
            if let Some(old) = self.database.get(&key)? {
                self.digest = self.digest.wrapping_sub(record_digest(&key, &old));
            }
            match value {
                Some(value) => {
                    self.digest = self.digest.wrapping_add(record_digest(&key, &value));
                    batch.insert(key, value);
                }
                None => batch.remove(key),
            }
        }
        batch.insert(APPLIED, self.applied_record());
        self.database.apply_batch(batch)?;
        Ok(())
    }

    fn applied_record(&self) -> Vec<u8> {
        seal(&proto::AppliedRecord {
            format: u32::from(FORMAT),
            applied: self.applied.as_ref().map(encoding::position),
            membership_position: self.membership.log_id().as_ref().map(encoding::position),
            membership: Some(encoding::membership_record(self.membership.membership())),
            digest: self.digest,
        })
    }

    fn publish(&self) {
        self.published.send_replace(Arc::new(self.state.clone()));
    }

    fn apply_one(
        &mut self,
        log_id: LogId,
        payload: &openraft::alias::EntryPayloadOf<TypeConfig>,
        touched: &mut Touched,
    ) -> Reply {
        self.applied = Some(log_id);
        match payload {
            EntryPayload::Blank => Reply::Done,
            EntryPayload::Normal(command) => {
                let (reply, changed) = self.state.apply(command);
                touched.add(changed);
                reply
            }
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(log_id), membership.clone());
                touched.add(self.state.set_voters(voters(&self.membership)));
                Reply::Done
            }
        }
    }

    /// Takes a snapshot's state over, in memory and in sled.
    fn replace(&mut self, record: proto::SnapshotRecord) -> Result<(), StateStoreError> {
        let image = record.image.ok_or(ImageError::Field { field: "image" })?;
        self.state = ClusterState::from_image(image)?;
        self.applied = record.last.as_ref().map(encoding::log_id);
        self.membership =
            encoding::stored_membership(record.membership_position.as_ref(), record.membership)?;
        let mut batch = sled::Batch::default();
        for key in self.database.iter().keys() {
            batch.remove(key?);
        }
        self.digest = 0;
        for (key, value) in self.state.records(&self.state.all()) {
            let value = value.expect("all objects exist");
            self.digest = self.digest.wrapping_add(record_digest(&key.encode(), &value));
            batch.insert(key.encode(), value);
        }
        batch.insert(APPLIED, self.applied_record());
        self.database.apply_batch(batch)?;
        Ok(())
    }
}

/// The image of a snapshot's data, and the state that it is.
///
/// # Errors
/// It is none.
pub fn state_of(data: &[u8]) -> Result<(proto::StateImage, ClusterState), RecordError> {
    let image = proto::StateImage::decode(data).map_err(|_| RecordError::Encoding)?;
    let state = ClusterState::from_image(image.clone()).map_err(|error| {
        tracing::error!("a snapshot has no state: {error}");
        RecordError::State
    })?;
    Ok((image, state))
}

fn voters(membership: &StoredMembership) -> BTreeSet<NodeId> {
    membership.voter_ids().filter_map(|id| u32::try_from(id).ok()).map(NodeId).collect()
}

fn open_sled(path: &Path) -> Result<sled::Db, StateStoreError> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(CACHE_BYTES)
        .mode(sled::Mode::LowSpace)
        .flush_every_ms(Some(FLUSH_EVERY_MS));
    Ok(config.open()?)
}

fn wipe(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn record_digest(key: &[u8], value: &[u8]) -> u64 {
    crc64(&[key, value].concat())
}

/// Reads the applied state back and verifies it.
fn load(database: &sled::Db, store: &LogStore) -> Result<Loaded, StateStoreError> {
    let Some(record) = database.get(APPLIED)? else {
        return match database.is_empty() {
            true => Ok(Loaded::default()),
            false => Err(RecordError::Empty.into()),
        };
    };
    let record: proto::AppliedRecord = unseal(&record)?;
    let pairs = database.iter().collect::<Result<Vec<_>, _>>()?;
    let records = || pairs.iter().filter(|(key, _)| key != APPLIED).map(|(k, v)| (k.as_ref(), v.as_ref()));
    let found = records().fold(0u64, |sum, (key, value)| sum.wrapping_add(record_digest(key, value)));
    if found != record.digest {
        return Err(StateStoreError::Digest { found, expected: record.digest });
    }
    let applied = record.applied.as_ref().map(encoding::log_id);
    if let Some(log_id) = &applied
        && !store.holds(log_id).map_err(StateStoreError::Log)?
    {
        let position = encoding::position(log_id);
        return Err(StateStoreError::NotInLog { term: position.term, index: position.index });
    }
    let membership = encoding::stored_membership(record.membership_position.as_ref(), record.membership)?;
    Ok(Loaded { state: ClusterState::load(records())?, applied, membership, digest: found })
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.applied, self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut touched = Touched::default();
        let mut replies = Vec::new();
        while let Some((entry, responder)) = entries.try_next().await? {
            let reply = self.apply_one(entry.log_id, &entry.payload, &mut touched);
            if let Some(responder) = responder {
                replies.push((responder, reply));
            }
        }
        // sled writes when it likes, and waits for its disk then.
        blocking(|| self.persist(&touched))?;
        // Published before it is answered: whoever waited for the answer finds its effect.
        if !touched.is_empty() {
            self.publish();
        }
        for (responder, reply) in replies {
            responder.send(reply);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            store: self.store.clone(),
            record: proto::SnapshotRecord {
                format: u32::from(FORMAT),
                last: self.applied.as_ref().map(encoding::position),
                membership_position: self.membership.log_id().as_ref().map(encoding::position),
                membership: Some(encoding::membership_record(self.membership.membership())),
                image: Some(self.state.image()),
            },
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Vec<u8>) -> Result<(), io::Error> {
        // What is saved is taken over at every start: it must be right before.
        let (image, _) = state_of(&snapshot)?;
        let record = proto::SnapshotRecord {
            format: u32::from(FORMAT),
            last: meta.last_log_id.as_ref().map(encoding::position),
            membership_position: meta.last_membership.log_id().as_ref().map(encoding::position),
            membership: Some(encoding::membership_record(meta.last_membership.membership())),
            image: Some(image),
        };
        self.store.save_snapshot(&record)?;
        blocking(|| self.replace(record))?;
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.store.read_snapshot()?.map(into_snapshot).transpose()?)
    }
}

/// A view of the state, to be made durable as a snapshot.
#[derive(Debug)]
pub struct SnapshotBuilder {
    store: LogStore,
    record: proto::SnapshotRecord,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        self.store.save_snapshot(&self.record)?;
        Ok(into_snapshot(self.record.clone())?)
    }
}

fn into_snapshot(record: proto::SnapshotRecord) -> Result<Snapshot, RecordError> {
    let last_membership =
        encoding::stored_membership(record.membership_position.as_ref(), record.membership)?;
    let meta = SnapshotMeta { last_log_id: record.last.as_ref().map(encoding::log_id), last_membership };
    Ok(Snapshot { meta, snapshot: record.image.unwrap_or_default().encode_to_vec() })
}
