use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use openraft::entry::RaftEntry;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::vote::RaftLeaderId;
use openraft::{EntryPayload, Membership, RaftLogReader, RaftSnapshotBuilder, StorageError, StorageHelper};

use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto;

use super::handle::RaftHandle;
use super::log_store::{LogStore, RaftIdentity};
use super::network::{BATCH_BYTES_MAX, COMMAND_BYTES_MAX, Channels, SnapshotHead};
use super::state_machine::StateMachine;
use super::*;
use crate::state::ClusterState;
use crate::state::command::{NewNode, Reply};
use crate::timing::RaftTiming;

pub fn open(directory: &Path) -> (LogStore, StateMachine) {
    let log = LogStore::open(&directory.join("raft.redb")).expect("a fresh directory");
    let machine = StateMachine::open(&directory.join("state.sled"), log.clone()).expect("a fresh directory");
    (log, machine)
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (log, machine) = open(directory.path());
        Ok((directory, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openrafts_storage_suite_passes() {
    Suite::test_all(Builder).await.expect("every case passes");
}

fn command(index: u64, name: &str) -> Entry {
    let new = NewNode {
        cluster_id: "c1".into(),
        name: name.into(),
        address: "127.0.0.1".parse().expect("an address"),
        control_port: 8080,
        failure_domain: String::new(),
        instance: index,
        founder: index == 1,
    };
    Entry::new(LogId::new_term_index(1, index), EntryPayload::Normal(Command::AddNode(new)))
}

/// All that a follower lacked went into one message: one that was too large, or took too long on its way, was sent again for ever.
/// Found by reading.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_is_sent_what_a_message_holds() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (mut log, _machine) = open(directory.path());
    let small = "x".repeat(BATCH_BYTES_MAX / 3);
    let large = "x".repeat(BATCH_BYTES_MAX);
    let names = [&small, &small, &small, &large, &small];
    let entries: Vec<Entry> = (1..).zip(names).map(|(index, name)| command(index, name)).collect();
    log.blocking_append(entries.clone()).await.expect("they are written");
    let mut sent = async |start| {
        let entries = log.limited_get_log_entries(start, 6).await.expect("they are there");
        entries.iter().map(|entry| entry.log_id.index()).collect::<Vec<_>>()
    };
    assert_eq!(sent(1).await, [1, 2], "three and their frames are too much");
    assert_eq!(sent(3).await, [3]);
    assert_eq!(sent(4).await, [4], "one at least");
    assert_eq!(sent(5).await, [5]);
    assert_eq!(log.try_get_log_entries(1..6).await.expect("they are there").len(), 5);
}

/// A name of megabytes came into the log before anybody looked at it, and no message to the others held it. Found by reading.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_message_holds_is_refused_before_it_is_in_the_log() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (log, machine) = open(directory.path());
    let timing = RaftTiming::new(Duration::from_millis(400));
    let handle = RaftHandle::start(NodeId(1), "c1", log, machine, timing, Channels::default())
        .await
        .expect("it starts");
    handle.found("127.0.0.1:1").await.expect("an empty log");
    let propose = async |name: String| {
        let EntryPayload::Normal(command) = command(1, &name).payload else {
            unreachable!("it is a command")
        };
        handle.propose(command).await
    };
    let refused = propose("x".repeat(COMMAND_BYTES_MAX)).await.expect_err("it is too large");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let last = handle.metrics().last_log_index;
    assert!(propose("y".repeat(COMMAND_BYTES_MAX)).await.is_err());
    assert_eq!(handle.metrics().last_log_index, last, "it is not in the log");
    assert_eq!(propose("node-1".to_owned()).await, Ok(Reply::Node(NodeId(1))));
    handle.shutdown().await;
}

fn membership(index: u64) -> Entry {
    let peer = BasicNode { addr: "127.0.0.1:1".into() };
    let membership = Membership::new(
        vec![BTreeSet::from([1])],
        [(1, peer)].into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    );
    let payload = EntryPayload::Membership(membership.expect("one voter, one peer"));
    Entry::new(LogId::new_term_index(1, index), payload)
}

/// A log whose only entry is the first half of a change of the voters. Both halves are one and the same node, which is a
/// quorum of both.
pub async fn joint_membership(log: &mut LogStore) {
    let peer = BasicNode { addr: "127.0.0.1:1".into() };
    let halves = vec![BTreeSet::from([1]), BTreeSet::from([1])];
    let peers: std::collections::BTreeMap<_, _> = [(1, peer)].into();
    let membership = Membership::new(halves, peers).expect("voters that are peers");
    let entry = Entry::new(LogId::new_term_index(0, 0), EntryPayload::Membership(membership));
    log.blocking_append([entry]).await.expect("the disk is well");
}

/// Puts entries in the log, commits them and applies those from `applied_from` on.
async fn run(log: &mut LogStore, machine: &mut StateMachine, entries: Vec<Entry>) {
    let last = entries.last().map(|entry| entry.log_id);
    log.blocking_append(entries.clone()).await.expect("the disk is well");
    log.save_committed(last).await.expect("the disk is well");
    let items = entries.into_iter().map(|entry| Ok((entry, None)));
    machine.apply(futures::stream::iter(items)).await.expect("the disk is well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let vote = Vote { leader_id: openraft::alias::LeaderIdOf::<TypeConfig>::new(3, 2), committed: true };
    let identity = RaftIdentity { instance: 77, node: 2 };
    let state = {
        let (mut log, mut machine) = open(directory.path());
        log.save_vote(&vote).await.expect("saved");
        log.save_identity(identity).expect("saved");
        run(&mut log, &mut machine, vec![membership(0), command(1, "a"), command(2, "b")]).await;
        machine.watch().borrow().clone()
    };
    let (mut log, mut machine) = open(directory.path());
    assert_eq!(log.read_vote().await.expect("readable"), Some(vote));
    assert_eq!(log.read_identity().expect("readable"), Some(identity));
    assert_eq!(log.try_get_log_entries(..).await.expect("readable").len(), 3);
    let (applied, stored) = machine.applied_state().await.expect("readable");
    assert_eq!(applied, Some(LogId::new_term_index(1, 2)));
    assert_eq!(stored.voter_ids().collect::<Vec<_>>(), [1]);
    assert_eq!(*machine.watch().borrow(), state);
}

/// Rebuilds through openraft's own start-up, as a process does; returns the state.
async fn restart(directory: &Path) -> std::sync::Arc<ClusterState> {
    let (mut log, mut machine) = open(directory);
    StorageHelper::new(&mut log, &mut machine).with_id(1).get_initial_state().await.expect("it starts");
    machine.watch().borrow().clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_or_damaged_sled_is_rebuilt_from_snapshot_and_log() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let sled_path = directory.path().join("state.sled");
    let state = {
        let (mut log, mut machine) = open(directory.path());
        run(&mut log, &mut machine, vec![membership(0), command(1, "a"), command(2, "b")]).await;
        let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.expect("built");
        log.purge(snapshot.meta.last_log_id.expect("two were applied")).await.expect("purged");
        run(&mut log, &mut machine, vec![command(3, "c")]).await;
        machine.watch().borrow().clone()
    };
    assert_eq!(state.map().nodes.len(), 3);

    std::fs::remove_dir_all(&sled_path).expect("it was there");
    assert_eq!(restart(directory.path()).await, state, "from snapshot and log");

    {
        let database = sled::open(&sled_path).expect("it opens");
        database
            .remove(crate::state::image::Key::Node(xsan_protocol::ids::NodeId(2)).encode())
            .expect("removed");
    }
    assert_eq!(restart(directory.path()).await, state, "a record that is missing is noticed");

    std::fs::remove_dir_all(&sled_path).expect("it was there");
    std::fs::write(&sled_path, b"not a directory").expect("writable");
    std::fs::remove_file(&sled_path).expect("writable");
    std::fs::create_dir(&sled_path).expect("writable");
    std::fs::write(sled_path.join("conf"), b"garbage").expect("writable");
    assert_eq!(restart(directory.path()).await, state, "what does not open is replaced");
}

/// A sender that gives up in the middle of a snapshot may look as if it had sent all. What was saved of that was taken over at every
/// start, or could not be, and the node did not start any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_not_whole_is_neither_passed_on_nor_saved() {
    let (ahead, behind) =
        (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let entries = || vec![membership(0), command(1, "a"), command(2, "b")];
    let (mut log, mut machine) = open(ahead.path());
    run(&mut log, &mut machine, entries()).await;
    let snapshot = machine.get_snapshot_builder().await.build_snapshot().await.expect("built");
    let vote = encoding::vote(&proto::VoteRecord { term: 1, node: 1, committed: true });
    let head = || SnapshotHead::new(vote, snapshot.meta.clone(), &snapshot.snapshot);
    for length in 0..snapshot.snapshot.len() {
        let cut = snapshot.snapshot[..length].to_vec();
        service::snapshot(head(), cut).expect_err("it is not whole");
    }
    assert!(service::snapshot(head(), snapshot.snapshot.clone()).is_ok());
    let empty = SnapshotHead::new(vote, snapshot.meta.clone(), &[]);
    service::snapshot(empty, Vec::new()).expect_err("it is whole, and no state");

    let (mut log, mut machine) = open(behind.path());
    run(&mut log, &mut machine, entries().drain(..2).collect()).await;
    machine.install_snapshot(&snapshot.meta, Vec::new()).await.expect_err("no state");
    assert!(machine.get_current_snapshot().await.expect("readable").is_none());
}

/// A builder had taken its view; then a newer snapshot was installed and the log purged up to it. The builder's, saved last,
/// took its place, and the entries between the two were nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_was_built_late_does_not_displace_a_newer_one() {
    let (ahead, behind) =
        (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    let entries = || vec![membership(0), command(1, "a"), command(2, "b"), command(3, "c")];
    let (mut log, mut machine) = open(ahead.path());
    run(&mut log, &mut machine, entries()).await;
    let newer = machine.get_snapshot_builder().await.build_snapshot().await.expect("built");

    let (mut log, mut machine) = open(behind.path());
    run(&mut log, &mut machine, entries().drain(..2).collect()).await;
    let mut late = machine.get_snapshot_builder().await;
    machine.install_snapshot(&newer.meta, newer.snapshot).await.expect("installed");
    late.build_snapshot().await.expect("built");
    let kept = machine.get_current_snapshot().await.expect("readable").expect("there is one");
    assert_eq!(kept.meta, newer.meta);
    // The same index again is written: that is how a damaged one is mended.
    machine.get_snapshot_builder().await.build_snapshot().await.expect("built");
    assert_eq!(log.read_snapshot().expect("readable").and_then(|s| s.last).map(|last| last.index), Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_ahead_of_its_log_is_rebuilt() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    {
        let (mut log, mut machine) = open(directory.path());
        run(&mut log, &mut machine, vec![membership(0), command(1, "a"), command(2, "b")]).await;
        log.truncate_after(Some(LogId::new_term_index(1, 1))).await.expect("truncated");
        log.save_committed(Some(LogId::new_term_index(1, 1))).await.expect("saved");
    }
    assert_eq!(restart(directory.path()).await.map().nodes.len(), 1);
}
