use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use openraft::alias::LeaderIdOf;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, RaftLogReader};
use redb::backends::InMemoryBackend;
use redb::{Database, StorageBackend};
use tokio::sync::oneshot;

use super::WAITING_BYTES_MAX;
use crate::raft::log_store::LogStore;
use crate::raft::{Entry, LogId, TypeConfig, Vote};
use crate::state::command::{Command, NewNode};

const HANGS_MAX: Duration = Duration::from_secs(10);
/// Time enough for what should wait not to.
const A_WHILE: Duration = Duration::from_millis(100);

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
        let waits = changed
            .wait_timeout_while(state.lock().expect("no panic"), HANGS_MAX, |state| state.waiting == 0);
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
        // A test that fails must not wait for its own disk.
        state = changed
            .wait_timeout_while(state, HANGS_MAX, |state| state.mood == Mood::Hangs)
            .expect("no panic")
            .0;
        state.waiting -= 1;
        state.flushes += 1;
        if state.mood != Mood::Well { Err(io::Error::other("the disk is broken")) } else { Ok(()) }
    }
}

fn vote() -> Vote {
    Vote { leader_id: LeaderIdOf::<TypeConfig>::new(3, 2), committed: false }
}

fn id(index: u64) -> LogId {
    LogId::new_term_index(1, index)
}

async fn append(log: &mut LogStore, index: u64) -> oneshot::Receiver<Result<(), io::Error>> {
    append_entry(log, Entry::new(id(index), EntryPayload::Blank)).await
}

async fn append_entry(log: &mut LogStore, entry: Entry) -> oneshot::Receiver<Result<(), io::Error>> {
    let (done, flushed) = TypeConfig::oneshot();
    log.append([entry], IOFlushed::<TypeConfig>::signal(done)).await.expect("handed over");
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
        log.save_committed(Some(id(index - 1))).await.expect("handed over");
    }
    assert_eq!(indexes(&mut log).await, (0..=9).collect::<Vec<_>>());
    assert_eq!(log.try_get_log_entries(3..5).await.expect("readable").len(), 2);
    let last = log.get_log_state().await.expect("readable").last_log_id;
    assert_eq!(last, Some(id(9)));
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
    assert_eq!(log.read_committed().await.expect("readable"), Some(id(8)));
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
    disk.wait_hanging();
    let mut voter = log.clone();
    let ends = tokio::spawn(async move {
        voter.save_vote(&vote()).await?;
        voter.truncate_after(Some(id(1))).await
    });
    tokio::time::sleep(A_WHILE).await;
    assert!(!ends.is_finished(), "what is answered must be on stable media");
    assert_eq!(indexes(&mut log).await, [0, 1, 2, 3]);
    disk.turn(Mood::Well);
    ends.await.expect("no panic").expect("the disk is well");
    for flushed in &mut flushed {
        flushed.try_recv().expect("told before").expect("the disk is well");
    }
    assert_eq!(indexes(&mut log).await, [0, 1]);
    append(&mut log, 2).await.await.expect("told").expect("the disk is well");
    drop(log);
    let mut log = disk.log();
    assert_eq!(indexes(&mut log).await, [0, 1, 2]);
    assert_eq!(log.read_vote().await.expect("readable"), Some(vote()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_purged_is_gone_at_once_and_stays_gone() {
    let disk = Disk::default();
    let mut log = disk.log();
    for index in 0..4 {
        append(&mut log, index).await.await.expect("told").expect("the disk is well");
    }
    disk.turn(Mood::Hangs);
    let mut flushed = append(&mut log, 4).await;
    disk.wait_hanging();
    let behind = append(&mut log, 5).await;
    log.purge(id(2)).await.expect("handed over");
    assert_eq!(indexes(&mut log).await, [3, 4, 5]);
    assert_eq!(log.try_get_log_entries(1..4).await.expect("readable").len(), 1);
    let state = log.get_log_state().await.expect("readable");
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(2)), Some(id(5))));
    // With what its own disk does not have yet, as a leader may whose followers have it.
    log.purge(id(5)).await.expect("handed over");
    assert!(indexes(&mut log).await.is_empty());
    assert!(flushed.try_recv().is_err(), "nothing is on stable media");
    disk.turn(Mood::Well);
    behind.await.expect("told").expect("the disk is well");
    append(&mut log, 6).await.await.expect("told").expect("the disk is well");
    drop(log);
    let mut log = disk.log();
    assert_eq!(indexes(&mut log).await, [6]);
    let state = log.get_log_state().await.expect("readable");
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(5)), Some(id(6))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_bounded() {
    let disk = Disk::default();
    let mut log = disk.log();
    disk.turn(Mood::Hangs);
    let large = |index| {
        let new = NewNode {
            cluster_id: "c1".into(),
            name: "x".repeat(WAITING_BYTES_MAX / 4),
            address: "127.0.0.1".parse().expect("an address"),
            control_port: 1,
            failure_domain: String::new(),
            instance: 1,
            founder: false,
        };
        Entry::new(id(index), EntryPayload::Normal(Command::AddNode(new)))
    };
    for index in 0..3 {
        drop(append_entry(&mut log, large(index)).await);
    }
    let mut another = log.clone();
    let last = tokio::spawn(async move { drop(append_entry(&mut another, large(3)).await) });
    disk.wait_hanging();
    tokio::time::sleep(A_WHILE).await;
    assert!(!last.is_finished(), "Raft waits for its disk");
    disk.turn(Mood::Well);
    last.await.expect("no panic");
    drop(log);
    assert_eq!(indexes(&mut disk.log()).await, [0, 1, 2, 3]);
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
    log.save_vote(&vote()).await.expect_err("nothing is written any more");
    drop(log);
    let found = indexes(&mut disk.log()).await;
    assert!(found == [0] || found == [0, 1], "{found:?}");
}
