//! One connection against a Raft of its own: without a leader, and as a cluster of one.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use xsan_protocol::map::Durability;

use super::*;
use crate::api::sample;
use crate::events::EventLog;
use crate::raft::tests::open;
use crate::state::command::{NewNode, NewVolume};
use crate::timing::{LEADER_WAIT, RaftTiming};

const INCARNATION: Incarnation = Incarnation(5);
const VM: VolumeId = VolumeId(1);

async fn server(directory: &Path) -> LinkServer {
    let (log, machine) = open(directory);
    let (timing, channels) = (RaftTiming::new(Duration::from_millis(400)), Channels::default());
    let started = RaftHandle::start(NodeId(1), "c1", log, machine, timing, channels.clone());
    let handle = started.await.expect("it starts");
    let leader = Arc::new(Leader::new(handle.clone(), EventLog::default()));
    LinkServer { link: Arc::default(), handle, leader, channels, cluster_id: "c1".into() }
}

/// The node, its data process and a volume.
async fn found(server: &LinkServer) {
    server.handle.found("127.0.0.1:1").await.expect("it has no log yet");
    let node = Command::AddNode(NewNode {
        cluster_id: "c1".into(),
        name: "n1".into(),
        address: "127.0.0.1".parse().expect("an address"),
        control_port: 1,
        failure_domain: String::new(),
        instance: 1,
        founder: true,
    });
    let process = sample::process(StoreId(1), INCARNATION);
    let node_id = NodeId(1);
    let started = Command::DataStarted { node: node_id, process, damaged_stores: vec![], replaces: None };
    let volume = Command::CreateVolume(NewVolume {
        name: "vm".into(),
        size_bytes: 1 << 30,
        replica_count: 1,
        policy: String::new(),
        durability: Durability::OnFlush,
        created_unix_ms: 1,
        request: 1,
        group_count: 4,
    });
    for command in [node, started, volume] {
        server.handle.propose(command).await.expect("it is committed");
    }
}

fn message(request_id: u64, body: Body) -> LinkMessage {
    LinkMessage { request_id, body: Some(body) }
}

fn opens(name: &str) -> Body {
    Body::OpenVolume(proto::OpenVolume { name: name.into() })
}

fn status(open_volumes: &[u32]) -> Body {
    Body::Status(proto::DataStatus { open_volumes: open_volumes.to_vec(), ..proto::DataStatus::default() })
}

async fn wait_until_attached(server: &LinkServer, wanted: bool) {
    let mut state = server.handle.watch_state();
    let is = |state: &Arc<crate::state::ClusterState>| {
        state.map().volumes[&VM].attached_nodes.is_empty() != wanted
    };
    let reached = tokio::time::timeout(Duration::from_secs(20), state.wait_for(is)).await;
    assert!(reached.is_ok(), "attached should be {wanted}");
}

/// Opens were carried out one after the other, each up to 10 s, and those that did not fit into the queue were dropped without an
/// answer, closes as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_open_is_answered_in_time_though_there_is_no_leader() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = server(directory.path()).await;
    let (mut data, control) = UnixStream::pair().expect("sockets");
    let (reader, _writer) = control.into_split();
    let (outbound, mut answers) = mpsc::channel::<LinkMessage>(OUTBOUND_MAX);
    let attachments = Attachments::default();
    let count = 2 * OPENS_MAX as u64 + 10;
    let begin = Instant::now();
    let ask = async {
        for request in 1..=count {
            frame::write(&mut data, &message(request, opens("vm"))).await.expect("it is read");
        }
        std::future::pending::<()>().await;
    };
    let hear = async {
        let (mut answered, mut codes) = (BTreeSet::new(), BTreeMap::new());
        while (answered.len() as u64) < count {
            let answer = answers.recv().await.expect("the connection stands");
            let Some(Body::Error(error)) = answer.body else { panic!("{answer:?}") };
            assert!(answered.insert(answer.request_id), "answered twice");
            *codes.entry(error.code).or_insert(0) += 1;
        }
        codes
    };
    let codes = tokio::select! {
        _ = server.read(BufReader::new(reader), outbound, INCARNATION, &attachments) => panic!("it ends"),
        () = ask => unreachable!("it waits"),
        codes = hear => codes,
    };
    let [busy, timeout] = [Code::Busy, Code::Timeout].map(|code| u32::from(code.number()));
    assert!(codes[&busy] >= 10, "{codes:?}");
    assert_eq!(codes[&busy] + codes[&timeout], count);
    assert!(begin.elapsed() < 2 * LEADER_WAIT, "{:?}", begin.elapsed());
    server.handle.shutdown().await;
}

/// A close that was lost on its way left the volume attached, and a detach that came late left it open and not attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_attached_follows_what_the_statuses_say_is_open() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let server = server(directory.path()).await;
    found(&server).await;
    let (mut data, control) = UnixStream::pair().expect("sockets");
    let (reader, _writer) = control.into_split();
    let (outbound, mut answers) = mpsc::channel::<LinkMessage>(OUTBOUND_MAX);
    let attachments = Attachments::default();
    let play = async {
        let mut say = async |request, body| {
            frame::write(&mut data, &message(request, body)).await.expect("it is read");
        };
        say(0, status(&[])).await;
        say(1, opens("vm")).await;
        let answer = answers.recv().await.expect("an answer");
        assert!(matches!(answer.body, Some(Body::OpenVolumeReply(_))), "{answer:?}");
        wait_until_attached(&server, true).await;
        say(0, status(&[VM.0])).await;
        // The death of an earlier life is noticed late.
        server.detach_all(Incarnation(4)).await;
        say(2, opens("none")).await;
        let answer = answers.recv().await.expect("an answer");
        assert!(matches!(answer.body, Some(Body::Error(_))), "{answer:?}");
        wait_until_attached(&server, true).await;
        say(0, status(&[])).await;
        wait_until_attached(&server, false).await;
        say(0, status(&[VM.0])).await;
        wait_until_attached(&server, true).await;
        say(0, Body::CloseVolume(proto::CloseVolume { volume: VM.0 })).await;
        wait_until_attached(&server, false).await;
    };
    tokio::select! {
        _ = server.read(BufReader::new(reader), outbound, INCARNATION, &attachments) => panic!("it ends"),
        never = server.keep_attached(INCARNATION, &attachments) => match never {},
        () = play => {}
    }
    server.handle.shutdown().await;
}
