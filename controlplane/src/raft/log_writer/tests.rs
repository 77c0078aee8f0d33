use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, RaftLogReader};
use redb::backends::InMemoryBackend;
use redb::{Database, StorageBackend};
use tokio::sync::oneshot;

use crate::raft::log_store::LogStore;
use crate::raft::{Entry, LogId, TypeConfig, Vote};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mood {
    #[default]
    Well,
    /// Every flush waits.
    Hangs,
    Fails,
}

#[derive(Debug, Default)]
struct State {
    mood: Mood,
    flushes: u64,
    waiting: u64,
}

/// A disk in memory whose flushes do as they are told.
#[derive(Clone, Debug, Default)]
struct Disk {
    media: Arc<InMemoryBackend>,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl Disk {
    fn log(&self) -> LogStore {
        LogStore::of(Database::builder().create_with_backend(self.clone()).expect("an empty disk"))
            .expect("the disk is well")
    }

    fn turn(&self, mood: Mood) {
        self.state.0.lock().expect("no panic").mood = mood;
        self.state.1.notify_all();
    }

    /// Returns once a flush waits.
    fn wait_hanging(&self) {
        let (state, changed) = &*self.state;
        let waits =
            changed.wait_timeout_while(state.lock().expect("no panic"), Duration::from_secs(10), |state| {
                state.waiting == 0
            });
        assert!(!waits.expect("no panic").1.timed_out(), "no flush came");
    }

    fn flushes(&self) -> u64 {
        self.state.0.lock().expect("no panic").flushes
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.media.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.media.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.media.set_len(len)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.media.write(offset, data)
    }

    fn sync_data(&self) -> io::Result<()> {
        let (state, changed) = &*self.state;
        let mut state = state.lock().expect("no panic");
        state.waiting += 1;
        changed.notify_all();
        state = changed.wait_while(state, |state| state.mood == Mood::Hangs).expect("no panic");
        state.waiting -= 1;
        state.flushes += 1;
        if state.mood == Mood::Fails { Err(io::Error::other("the disk is broken")) } else { Ok(()) }
    }
}

fn entry(index: u64) -> Entry {
    Entry::new(LogId::new_term_index(1, index), EntryPayload::Blank)
}

async fn append(log: &mut LogStore, index: u64) -> oneshot::Receiver<Result<(), io::Error>> {
    let (done, flushed) = TypeConfig::oneshot();
    log.append([entry(index)], IOFlushed::<TypeConfig>::signal(done)).await.expect("handed over");
    flushed
}

async fn indexes(log: &mut LogStore) -> Vec<u64> {
    let entries = log.try_get_log_entries(..).await.expect("readable");
    entries.iter().map(|entry| entry.log_id.index()).collect()
}

/// A disk that hung for longer than an election timeout cost the leader its office: Raft answered and sent no heartbeat
/// while its log waited, and each new leader began with an entry that waited as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_goes_on_while_the_disk_hangs() {
    let disk = Disk::default();
    let mut log = disk.log();
    disk.turn(Mood::Hangs);
    let mut first = append(&mut log, 0).await;
    disk.wait_hanging();
    let before = disk.flushes();
    let mut others = Vec::new();
    for index in 1..=9 {
        others.push(append(&mut log, index).await);
        log.save_committed(Some(LogId::new_term_index(1, index - 1))).await.expect("handed over");
    }
    assert_eq!(indexes(&mut log).await, (0..=9).collect::<Vec<_>>());
    assert_eq!(log.try_get_log_entries(3..5).await.expect("readable").len(), 2);
    let last = log.get_log_state().await.expect("readable").last_log_id;
    assert_eq!(last, Some(LogId::new_term_index(1, 9)));
    for flushed in others.iter_mut().chain([&mut first]) {
        assert!(flushed.try_recv().is_err(), "nothing is on stable media");
    }

    disk.turn(Mood::Well);
    for flushed in others.into_iter().chain([first]) {
        flushed.await.expect("told").expect("the disk is well");
    }
    assert_eq!(disk.flushes() - before, 2, "those that waited were written together");
    assert_eq!(indexes(&mut log).await, (0..=9).collect::<Vec<_>>());
    drop(log);
    let mut log = disk.log();
    assert_eq!(indexes(&mut log).await, (0..=9).collect::<Vec<_>>());
    assert_eq!(log.read_committed().await.expect("readable"), Some(LogId::new_term_index(1, 8)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vote_and_a_truncation_come_after_what_was_appended_before() {
    let disk = Disk::default();
    let mut log = disk.log();
    disk.turn(Mood::Hangs);
    let mut flushed = Vec::new();
    for index in 0..4 {
        flushed.push(append(&mut log, index).await);
    }
    let mut voter = log.clone();
    let vote = Vote { leader_id: openraft::alias::LeaderIdOf::<TypeConfig>::new(3, 2), committed: false };
    let saved = tokio::spawn(async move { voter.save_vote(&vote).await });
    disk.wait_hanging();
    disk.turn(Mood::Well);
    saved.await.expect("no panic").expect("the disk is well");
    for flushed in &mut flushed {
        flushed.try_recv().expect("told before").expect("the disk is well");
    }
    log.truncate_after(Some(LogId::new_term_index(1, 1))).await.expect("the disk is well");
    assert_eq!(indexes(&mut log).await, [0, 1]);
    append(&mut log, 2).await.await.expect("told").expect("the disk is well");
    assert_eq!(indexes(&mut log).await, [0, 1, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_failure_nothing_more_is_written() {
    let disk = Disk::default();
    let mut log = disk.log();
    append(&mut log, 0).await.await.expect("told").expect("the disk is well");
    disk.turn(Mood::Hangs);
    let failed = append(&mut log, 1).await;
    disk.wait_hanging();
    let behind = append(&mut log, 2).await;
    disk.turn(Mood::Fails);
    failed.await.expect("told").expect_err("the disk is broken");
    behind.await.expect("told").expect_err("there would be a hole");
    disk.turn(Mood::Well);
    append(&mut log, 3).await.await.expect("told").expect_err("there would be a hole");
    let vote = Vote { leader_id: openraft::alias::LeaderIdOf::<TypeConfig>::new(3, 2), committed: false };
    log.save_vote(&vote).await.expect_err("nothing is written any more");
    drop(log);
    let found = indexes(&mut disk.log()).await;
    assert!(found == [0] || found == [0, 1], "{found:?}");
}
