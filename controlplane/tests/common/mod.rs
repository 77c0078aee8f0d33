//! Nodes in one process, each with a data process that is played by a task.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use xsan_controlplane::clock::BootTime;
use xsan_controlplane::link::frame;
use xsan_controlplane::node::{ControlNode, Settings};
use xsan_controlplane::raft::log_store::RaftIdentity;
use xsan_nodekit::config::Startup;
use xsan_protocol::proto;
use xsan_protocol::proto::cluster_client::ClusterClient;
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::proto::raft_client::RaftClient;

pub const DEADLINE: Duration = Duration::from_secs(30);

pub fn settings(directory: &Path, number: u8, startup: Startup) -> Settings {
    let ip = IpAddr::V4(Ipv4Addr::new(127, 0, 1, number));
    let free = TcpListener::bind(SocketAddr::new(ip, 0)).expect("loopback has all of 127/8");
    Settings {
        cluster_id: "test".into(),
        name: format!("node-{number}"),
        bind_ip: ip,
        bind_port: free.local_addr().expect("it is bound").port(),
        failure_domain: String::new(),
        data_dir: directory.join(format!("node-{number}")),
        identity: RaftIdentity { instance: 1, node: if startup == Startup::Init { 1 } else { 0 } },
        startup,
        heartbeat_interval: Duration::from_millis(100),
        election_timeout: Duration::from_millis(1000),
        default_replica_count: 3,
        established: false,
    }
}

pub fn address(settings: &Settings) -> SocketAddr {
    SocketAddr::new(settings.bind_ip, settings.bind_port)
}

pub async fn start(settings: &Settings) -> ControlNode {
    // Shown when RUST_LOG asks for it; another test of this process may have done the same.
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let shown = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    drop(shown);
    std::fs::create_dir_all(&settings.data_dir).expect("a temporary directory");
    ControlNode::start(settings.clone()).await.expect("the node starts")
}

/// Asks the cluster for the node's id, as xsan-node does, until the cluster is founded.
pub async fn join(settings: &mut Settings) -> Result<(), tonic::Status> {
    let Startup::Join { address } = settings.startup else { return Ok(()) };
    settings.identity.instance = u64::from(settings.bind_port);
    let mut client = RaftClient::connect(format!("http://{address}")).await.expect("a member answers");
    let end = tokio::time::Instant::now() + DEADLINE;
    loop {
        let request = proto::JoinRequest {
            cluster_id: settings.cluster_id.clone(),
            name: settings.name.clone(),
            address: settings.bind_ip.to_string(),
            control_port: u32::from(settings.bind_port),
            version_min: 1,
            version_max: 1,
            instance: settings.identity.instance,
            ..proto::JoinRequest::default()
        };
        match client.join(request).await {
            Ok(reply) => {
                settings.identity.node = reply.into_inner().node_id;
                return Ok(());
            }
            Err(status) if status.code() == tonic::Code::Unavailable => {
                assert!(tokio::time::Instant::now() < end, "the cluster is not founded");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(status) => return Err(status),
        }
    }
}

pub async fn client(settings: &Settings) -> ClusterClient<Channel> {
    ClusterClient::connect(format!("http://{}", address(settings))).await.expect("the API answers")
}

/// Waits for a condition; fails with its name after `DEADLINE`.
pub async fn wait_for(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let end = tokio::time::Instant::now() + DEADLINE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a played data process has been told.
#[derive(Clone, Debug, Default)]
pub struct Told {
    pub map: proto::ClusterMap,
    pub lease: u64,
    /// The least that was left of a lease, since the first one.
    pub margin_min: Option<Duration>,
    pub lapsed: bool,
}

/// A data process: says hello, acts on maps at once, tells its status.
pub struct FakeData {
    pub told: Arc<Mutex<Told>>,
    task: JoinHandle<()>,
}

impl FakeData {
    pub fn start(settings: &Settings, incarnation: u64) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let path = settings.data_dir.join("link.sock");
        let store = proto::Store {
            id: u64::from(settings.bind_port),
            capacity_bytes: 1 << 40,
            device: "/dev/x".into(),
            media: "ssd".into(),
            ..proto::Store::default()
        };
        let process = proto::DataProcess {
            incarnation,
            boot_id: 7,
            shard_ports: vec![9100],
            nbd_port: 10809,
            stores: vec![store],
        };
        let hello =
            proto::DataHello { pid: std::process::id(), process: Some(process), damaged_stores: vec![] };
        let task = tokio::spawn(run(path, hello, Arc::clone(&told)));
        Self { told, task }
    }

    pub fn told(&self) -> Told {
        self.told.lock().expect("no task panicked").clone()
    }

    pub fn has_lease(&self) -> bool {
        self.told().lease > BootTime::now().0
    }
}

impl Drop for FakeData {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(path: std::path::PathBuf, hello: proto::DataHello, told: Arc<Mutex<Told>>) {
    let stream = UnixStream::connect(path).await.expect("the link is served");
    let (reader, mut writer) = stream.into_split();
    let message = |body| proto::LinkMessage { request_id: 0, body: Some(body) };
    let hello_process = hello.process.clone().expect("it says what it is");
    frame::write(&mut writer, &message(Body::Hello(hello))).await.expect("linked");
    let incarnation = hello_process.incarnation;
    let map = {
        let told = Arc::clone(&told);
        move || told.lock().expect("no task panicked").map.clone()
    };
    let statuses = tokio::spawn(async move {
        loop {
            let map = map();
            let proposals = settled_by(&map, incarnation);
            let status = proto::DataStatus { map_version: map.version, ..proto::DataStatus::default() };
            for body in [Body::Status(status), Body::Proposals(proposals)] {
                if frame::write(&mut writer, &message(body)).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let watched = Arc::clone(&told);
    let margins = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            let mut told = watched.lock().expect("no task panicked");
            if told.lease != 0 {
                let left = BootTime(told.lease).since(BootTime::now());
                told.lapsed |= left.is_zero();
                told.margin_min = Some(told.margin_min.map_or(left, |least| least.min(left)));
            }
        }
    });
    let mut reader = BufReader::new(reader);
    while let Ok(Some(message)) = frame::read(&mut reader).await {
        let mut told = told.lock().expect("no task panicked");
        match message.body {
            Some(Body::Map(map)) => told.map = map,
            Some(Body::Lease(lease)) => {
                // Nothing takes away what was granted: it only runs out.
                told.lapsed |= lease.until_boottime_ns < told.lease.max(1);
                told.lease = lease.until_boottime_ns;
            }
            _ => {}
        }
    }
    statuses.abort();
    margins.abort();
}

/// A data process without peers to ask has every epoch that it leads settled at once.
fn settled_by(map: &proto::ClusterMap, incarnation: u64) -> proto::GroupProposals {
    let own = map.nodes.iter().find(|node| node.data.as_ref().is_some_and(|d| d.incarnation == incarnation));
    let own = own.map_or(0, |node| node.id);
    let open = map.groups.iter().filter(|group| group.primary == own && !group.former.is_empty());
    let settle = |group: &proto::Group| proto::GroupProposal {
        group: group.id,
        epoch: group.epoch,
        node: own,
        change: proto::group_proposal::Change::Settle as i32,
    };
    proto::GroupProposals { proposals: open.map(settle).collect() }
}
