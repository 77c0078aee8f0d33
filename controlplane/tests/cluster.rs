//! Clusters in one process on loopback: founding, joining, fail-over of the leader, restarts.

mod common;

use std::time::{Duration, Instant};

use common::{FakeData, address, client, join, settings, start, wait_for};
use prost::Message;
use xsan_controlplane::node::{ControlNode, NodeError, Settings};
use xsan_nodekit::config::Startup;
use xsan_protocol::error::Code;
use xsan_protocol::proto;

struct Member {
    settings: Settings,
    node: ControlNode,
    data: FakeData,
}

/// Three nodes, all voters, their data processes under leases.
async fn three(directory: &std::path::Path, subnet: u8) -> Vec<Member> {
    let first = settings(directory, subnet + 1, Startup::Init);
    let other = Startup::Join { address: address(&first) };
    let all = [first, settings(directory, subnet + 2, other.clone()), settings(directory, subnet + 3, other)];
    let mut members = Vec::new();
    for (index, mut settings) in all.into_iter().enumerate() {
        join(&mut settings).await.expect("the cluster takes it in");
        let node = start(&settings).await;
        let data = FakeData::start(&settings, 1000 + index as u64);
        members.push(Member { settings, node, data });
    }
    wait_for("three voters", async || {
        members.iter().all(|m| m.node.handle().state().map().nodes.values().filter(|n| n.voter).count() == 3)
    })
    .await;
    wait_for("leases", async || members.iter().all(|member| member.data.has_lease())).await;
    members
}

fn leader(members: &[Member]) -> Option<usize> {
    members.iter().position(|member| member.node.handle().leadership().is_some_and(|l| l.may_grant))
}

fn volume(name: &str) -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest { name: name.into(), size_bytes: 1 << 30, ..Default::default() }
}

fn number(status: &tonic::Status) -> Option<Code> {
    let detail = proto::ErrorDetail::decode(status.details()).expect("every status has details");
    Code::from_number(u16::try_from(detail.code).expect("a number of the table"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_survives_its_leader() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut members = three(directory.path(), 10).await;
    let leads = leader(&members).expect("somebody leads");

    let follower = (leads + 1) % 3;
    let mut api = client(&members[follower].settings).await;
    let made = api.create_volume(volume("vm-1")).await.expect("through a follower").into_inner();
    let listed = api.list_volumes(proto::ListVolumesRequest {}).await.expect("a read").into_inner();
    assert_eq!(listed.volumes.len(), 1, "a follower shows what was made through it");
    assert_eq!(listed.volumes[0].state, "healthy");
    let refused = api.create_volume(volume("vm-1")).await.expect_err("it exists");
    assert_eq!(number(&refused), Some(Code::VolumeExists));
    wait_for("the map at every data process", async || {
        members.iter().all(|member| member.data.told().map.volumes.len() == 1)
    })
    .await;

    let dead = members.remove(leads);
    let dead_node = dead.node.handle().node().0;
    let killed = Instant::now();
    drop(dead);
    wait_for("a new leader", async || leader(&members).is_some()).await;
    let election = killed.elapsed();
    assert!(election < Duration::from_millis(2500), "{election:?}");

    wait_for("groups without the dead node", async || {
        members.iter().all(|member| {
            let map = member.data.told().map;
            map.groups.iter().all(|g| g.primary != dead_node && g.members.len() == 2)
        })
    })
    .await;
    let moved = killed.elapsed();
    println!("new leader after {election:?}, groups moved after {moved:?}");
    assert!(moved > Duration::from_millis(1500), "a lease that may run is waited out: {moved:?}");
    for member in &members {
        let told = member.data.told();
        println!("least lease left: {:?}", told.margin_min);
        assert!(!told.lapsed, "a live node's lease did not end for want of a leader");
    }

    let mut api = client(&members[0].settings).await;
    api.create_volume(volume("vm-2")).await.expect("two of three are a quorum");
    let status = api.cluster_status(proto::ClusterStatusRequest {}).await.expect("a read").into_inner();
    assert_eq!(status.volume_count, 2);
    let groups = status.groups.expect("counts");
    assert_eq!((groups.total, groups.degraded, groups.at_risk), (256, 256, 256));
    let states: Vec<_> = status.nodes.iter().map(|node| node.state.as_str()).collect();
    assert_eq!(states.iter().filter(|state| **state == "up").count(), 2, "{states:?}");
    let found = api.get_volume(proto::GetVolumeRequest { name: "vm-1".into() }).await.expect("a read");
    assert_eq!(found.into_inner().volume, Some(made));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_node_takes_its_place_again() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut members = three(directory.path(), 20).await;
    let mut api = client(&members[0].settings).await;
    api.create_volume(volume("vm-1")).await.expect("created");
    let leads = leader(&members).expect("somebody leads");
    let Member { settings, node, data } = members.remove((leads + 1) % 3);
    let id = node.handle().node();
    drop(data);
    node.stop().await;
    let mut api = client(&members[0].settings).await;
    api.create_volume(volume("vm-2")).await.expect("two of three are a quorum");

    let node = start(&settings).await;
    assert_eq!(node.handle().node(), id);
    wait_for("the volume that was made meanwhile", async || node.handle().state().map().volumes.len() == 2)
        .await;
    // Its data process is another one now: a learner until it has everything, then acting again.
    let data = FakeData::start(&settings, 5000);
    wait_for("its replicas as learners", async || {
        let groups = data.told().map.groups;
        let own = |group: &proto::Group| {
            group.members.iter().any(|m| m.node == id.0 && m.incarnation == 5000 && m.learner)
        };
        !groups.is_empty() && groups.iter().all(own)
    })
    .await;
    wait_for("its lease", async || data.has_lease()).await;
}

/// Kind and witness of each event that a node lists, and the nodes that did not answer it.
async fn events(settings: &Settings) -> (Vec<(String, String)>, Vec<String>) {
    let listed = client(settings).await.list_events(proto::ListEventsRequest {}).await;
    let listed = listed.expect("a read").into_inner();
    assert!(listed.events.is_sorted_by_key(|event| event.unix_ms));
    (listed.events.into_iter().map(|event| (event.kind, event.seen_by)).collect(), listed.silent_nodes)
}

/// Events were those of the present leader since its election: what came before it was in log files only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_earlier_leaders_saw_is_listed_too() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut members = three(directory.path(), 50).await;
    let leads = leader(&members).expect("somebody leads");
    let Member { settings, node, data } = members.remove(leads);
    let other = &members[0].settings;
    let elected = |settings: &Settings| ("leader-elected".to_owned(), settings.name.clone());
    let own = elected(&settings);
    wait_for("a follower to list what the leader saw", async || events(other).await.0.contains(&own)).await;
    let on = proto::SetMaintenanceRequest { node: settings.name.clone(), on: true, ..Default::default() };
    client(other).await.set_maintenance(on).await.expect("nothing speaks against it");
    let before = ("maintenance-on".to_owned(), settings.name.clone());
    wait_for("the leader to see it", async || events(other).await.0.contains(&before)).await;

    // A clean stop at once: what was just seen is saved, and what can not be asked for is told.
    drop(data);
    node.stop().await;
    let by_others =
        |listed: &[(String, String)]| members.iter().any(|m| listed.contains(&elected(&m.settings)));
    wait_for("a new leader's events", async || {
        let (listed, silent) = events(other).await;
        by_others(&listed) && !listed.contains(&before) && silent == [settings.name.clone()]
    })
    .await;

    let node = start(&settings).await;
    wait_for("the events of both", async || {
        let (listed, silent) = events(other).await;
        by_others(&listed) && listed.contains(&before) && silent.is_empty()
    })
    .await;
    drop(node);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_keeps_its_state_and_refuses_strangers() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let own = settings(directory.path(), 31, Startup::Init);
    let node = start(&own).await;
    let data = FakeData::start(&own, 1);
    wait_for("its lease", async || data.has_lease()).await;
    let mut api = client(&own).await;
    let refused = api.create_volume(volume("vm-1")).await.expect_err("one node, three replicas");
    assert_eq!(number(&refused), Some(Code::TooFewNodes));
    let one = proto::CreateVolumeRequest { replica_count: 1, ..volume("vm-1") };
    api.create_volume(one).await.expect("one replica fits");

    let other = Startup::Join { address: address(&own) };
    let refusal = async |change: &dyn Fn(&mut Settings)| {
        let mut stranger = settings(directory.path(), 32, other.clone());
        change(&mut stranger);
        number(&join(&mut stranger).await.expect_err("a stranger is not taken in")).expect("a number")
    };
    assert_eq!(refusal(&|s| s.name = "node-31".into()).await, Code::NodeIdTaken);
    assert_eq!(refusal(&|s| s.cluster_id = "other".into()).await, Code::ClusterIdMismatch);

    let before = node.handle().state();
    drop(data);
    node.stop().await;
    let again = start(&own).await;
    wait_for("the state of before", async || again.handle().state().map().volumes == before.map().volumes)
        .await;
    wait_for("a leader", async || again.handle().leadership().is_some_and(|l| l.may_grant)).await;
    let taken = ControlNode::start(Settings { data_dir: directory.path().join("x"), ..own.clone() }).await;
    let error = taken.err().expect("the address is in use");
    assert!(matches!(error, NodeError::Address { .. }));
}

/// The founder came back without its log and founded a second cluster of that name, with itself as the only voter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_served_does_not_start_without_its_log() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let fresh = settings(directory.path(), 41, Startup::Init);
    start(&fresh).await.stop().await;
    let established = Settings { established: true, ..fresh };
    start(&established).await.stop().await;
    let log = established.data_dir.join("control/raft.redb");
    std::fs::remove_file(&log).expect("it was there");
    for left_over in [None, Some("")] {
        if let Some(content) = left_over {
            std::fs::write(&log, content).expect("it writes");
        }
        let error = ControlNode::start(established.clone()).await.err().expect("the log is lost");
        assert_eq!(error.code(), Code::RaftLogLost);
        assert_eq!(xsan_nodekit::exit::of_daemon(error.code()), xsan_nodekit::exit::DO_NOT_RESTART);
        assert_eq!(log.exists(), left_over.is_some(), "nothing new in its place");
    }
}
