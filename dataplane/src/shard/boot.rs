//! Start of the data process: devices and stores are opened, each shard gets its thread, and all begin to serve.
//!
//! Every shard opens its own stores on its own thread, with its own memory; only when all have, the process
//! tells the control plane what it is. Used by `main`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use monoio::net::{TcpListener, UnixListener};
use xsan_nodekit::config::{ConfigError, FieldError, NodeConfig};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{BootId, Incarnation, ShardIndex, StoreId};
use xsan_protocol::map;
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::proto::{self, LinkMessage};

use super::failures::Failures;
use super::incarnation;
use super::link::{self, LinkSender};
use super::mailbox::{Inbox, MeshEnd, mesh};
use super::port::ShardPort;
use super::stores::{self, OpenStore, Opened, Owner, StorePlan, media_name, wall_clock_ns};
use super::tasks::{self, Connections};
use super::topology::{self, Core, TopologyError};
use super::{Control, Devices, Event, Handle, Identity, Message, Opens, Peers, Scratch, Shard};
use crate::disk::buffers::BufferPool;
use crate::disk::device::{DeviceError, FileDevice};
use crate::disk::ring::{DiskRing, RingError};
use crate::gateway::nbd;
use crate::net::connection::Memory;
use crate::net::listener::{self, BindError};
use crate::replication::{Driver, Replication};
use crate::stats::{Recent, Stats};
use crate::store::{FormatError, OpenError};
use crate::volume::VolumeClient;
use crate::volume::calls::Calls;

/// Messages that a shard may have under way to another.
const MESH_CAPACITY: usize = 1024;
/// Device operations of one shard at the kernel at once.
const RING_DEPTH: u32 = 256;
/// How long the requests of clients may take to end when the process stops, and how often they are looked at.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
const CLOSE_POLL: Duration = Duration::from_millis(5);
/// How long the flush of all stores may take then.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the data process can not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{}: {}", path.display(), content)]
    Foreign { path: PathBuf, content: String, code: Code },
    #[error("{}: {source}", path.display())]
    Format { path: PathBuf, source: FormatError },
    #[error("{}: {source}", path.display())]
    Open { path: PathBuf, source: OpenError },
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("{}: {source}", path.display())]
    Path { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("{what}: {source}")]
    System { what: &'static str, source: std::io::Error },
}

impl BootError {
    pub fn code(&self) -> Code {
        match self {
            Self::Topology(error) => error.code(),
            Self::Device(error) => error.code(),
            Self::Foreign { code, .. } => *code,
            Self::Format { source, .. } => source.code(),
            Self::Open { source, .. } => source.code(),
            Self::Ring(error) => error.code(),
            Self::Bind(error) => error.code(),
            Self::Path { .. } => Code::DataDirUnusable,
            Self::Config(error) => error.code(),
            Self::Field(_) => Code::ConfigInvalid,
            Self::System { .. } => Code::Internal,
        }
    }
}

/// This power-on of the host.
fn boot_id() -> Result<BootId, BootError> {
    let what = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read(what).map_err(|source| BootError::System { what, source })?;
    Ok(BootId(xsan_protocol::checksum::crc64(&text)))
}

/// What a shard says when its stores are open.
struct Ready {
    shard: ShardIndex,
    stores: Vec<map::Store>,
    damaged_stores: Vec<map::DamagedStore>,
    /// What was wrong with a device that is gone.
    dead: Option<BootError>,
}

/// What every shard learns when all are ready.
#[derive(Clone)]
struct Go {
    process: Arc<map::DataProcess>,
    damaged_stores: Arc<Vec<map::DamagedStore>>,
}

/// What a shard's thread begins with.
struct ShardPlan {
    config: Arc<NodeConfig>,
    shard: ShardIndex,
    shard_count: u16,
    core: Core,
    stores: Vec<StorePlan>,
    incarnation: Incarnation,
    failures: Failures,
    failed_before: Arc<BTreeSet<StoreId>>,
    lease_until_ns: Arc<AtomicU64>,
    nbd: Arc<nbd::Counters>,
    mesh: MeshEnd<Message>,
    ready: mpsc::Sender<Result<Ready, BootError>>,
    go: mpsc::Receiver<Go>,
    stopped: mpsc::Sender<ShardIndex>,
}

/// The running process, as the main thread holds it.
pub struct Process {
    inboxes: Vec<Inbox<Message>>,
    nbd: Arc<nbd::Counters>,
    stopped: mpsc::Receiver<ShardIndex>,
}

impl Process {
    /// Starts every shard; returns when all of them serve.
    ///
    /// # Errors
    /// A device, port, core or memory that can not be had. Shards may still run then, until the process ends.
    pub fn start(config: NodeConfig) -> Result<Self, BootError> {
        let config = Arc::new(config);
        let cores = topology::cores(&config.dataplane.cores)?;
        config.validate_shards(cores.len())?;
        let shard_count = cores.len() as u16;
        let lease_until_ns = Arc::new(AtomicU64::new(0));
        let counters = Arc::new(nbd::Counters::default());
        let (ready, from_shards) = mpsc::channel();
        let (stopped, all_stopped) = mpsc::channel();
        let directory = config.cluster.data_dir.join("data");
        let path_error = |source| BootError::Path { path: directory.clone(), source };
        std::fs::create_dir_all(&directory).map_err(path_error)?;
        let incarnation = incarnation::begin(&directory, wall_clock_ns())
            .map_err(|source| BootError::Path { path: directory.join(incarnation::FILE), source })?;
        let failures = Failures::new(directory.clone(), incarnation);
        let failed_before = Arc::new(failures.before().map_err(path_error)?);
        let plans = stores::plan(&config);
        let (mut inboxes, mut starts) = (Vec::new(), Vec::new());
        for (index, (core, mesh)) in
            cores.into_iter().zip(mesh(usize::from(shard_count), MESH_CAPACITY)).enumerate()
        {
            let (start, go) = mpsc::channel();
            inboxes.push(mesh.inbox());
            starts.push(start);
            let own = plans.iter().skip(index).step_by(usize::from(shard_count));
            let shard_plan = ShardPlan {
                config: config.clone(),
                shard: ShardIndex(index as u16),
                shard_count,
                core,
                stores: own.cloned().collect(),
                incarnation,
                failures: failures.clone(),
                failed_before: failed_before.clone(),
                lease_until_ns: lease_until_ns.clone(),
                nbd: counters.clone(),
                mesh,
                ready: ready.clone(),
                go,
                stopped: stopped.clone(),
            };
            let spawned =
                std::thread::Builder::new().name(format!("shard-{index}")).spawn(|| run(shard_plan));
            spawned.map_err(|source| BootError::System { what: "starting a thread", source })?;
        }
        let mut stores = Vec::new();
        let (mut damaged_stores, mut dead) = (Vec::new(), None);
        for _ in 0..shard_count {
            let shard = from_shards.recv().expect("every shard answers before it ends")?;
            tracing::debug!(shard = %shard.shard, stores = shard.stores.len(), "shard ready");
            stores.extend(shard.stores);
            damaged_stores.extend(shard.damaged_stores);
            dead = dead.or(shard.dead);
        }
        // Without any store it has nothing to serve; the supervisor starts it again, and a device may be back by then.
        if stores.is_empty()
            && let Some(error) = dead
        {
            return Err(error);
        }
        forget_forced(&config)?;
        let port = config.dataplane.port;
        let process = map::DataProcess {
            incarnation,
            boot_id: boot_id()?,
            shard_ports: (0..shard_count).map(|shard| port + shard).collect(),
            nbd_port: config.dataplane.nbd_port,
            stores,
        };
        let go = Go { process: Arc::new(process), damaged_stores: Arc::new(damaged_stores) };
        for start in starts {
            start.send(go.clone()).expect("a shard that is ready waits for this");
        }
        for _ in 0..shard_count {
            from_shards.recv().expect("every shard answers before it ends")?;
        }
        Ok(Self { inboxes, nbd: counters, stopped: all_stopped })
    }

    /// Stops cleanly: clients are let go, then stores flushed; gives up after a while, since a crash loses nothing either.
    pub fn stop(self) {
        self.nbd.stop();
        self.tell_all(|| Message::CloseGateways);
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while self.nbd.connections() > 0 && Instant::now() < deadline {
            std::thread::sleep(CLOSE_POLL);
        }
        if self.nbd.connections() > 0 {
            let connections = self.nbd.connections();
            tracing::warn!(connections, "clients with requests under way lose their connections");
        }
        self.tell_all(|| Message::Shutdown);
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut late: BTreeSet<u16> = (0..self.inboxes.len() as u16).collect();
        while !late.is_empty() {
            match self.stopped.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(shard) => late.remove(&shard.0),
                Err(_) => {
                    tracing::warn!(shards = ?late, "shards did not flush their stores in time");
                    break;
                }
            };
        }
    }

    fn tell_all(&self, message: impl Fn() -> Message) {
        for inbox in &self.inboxes {
            if inbox.send(message()).is_err() {
                tracing::warn!("a shard takes no messages: it is stuck");
            }
        }
    }
}

/// What was named with `--force-format` is formatted, and holds nothing yet that a second format would lose: from here on it would.
fn forget_forced(config: &NodeConfig) -> Result<(), ConfigError> {
    if config.force_format.is_empty() {
        return Ok(());
    }
    NodeConfig { force_format: Vec::new(), ..config.clone() }.save()
}

/// A shard's thread.
fn run(plan: ShardPlan) {
    let ready = plan.ready.clone();
    if let Err(error) = serve(plan) {
        // The main thread ends the process. If another shard has failed before, it does so already, and nobody listens.
        let _ = ready.send(Err(error));
    }
}

/// Sockets that must be there before the shard says that it serves.
struct Sockets {
    wire: TcpListener,
    nbd: TcpListener,
    nbd_unix: Option<UnixListener>,
}

fn serve(plan: ShardPlan) -> Result<(), BootError> {
    let config = plan.config.clone();
    topology::pin(&plan.core);
    let memory = config.dataplane.memory_bytes(usize::from(plan.shard_count)) / u64::from(plan.shard_count);
    let pool = topology::memory(&plan.core, memory as usize, config.dataplane.numa)?;
    let owner = Owner { cluster_id: &config.cluster.cluster_id, node: config.numeric_id };
    let mut opened = stores::open(&plan.stores, owner, &plan.failures, pool)?;
    let ready = Ready {
        shard: plan.shard,
        stores: opened.for_map(plan.shard, &plan.failed_before),
        damaged_stores: opened.damaged(),
        dead: opened.dead.take(),
    };
    // The main thread gives up when another shard fails; there is nobody left to tell, here and below.
    if plan.ready.send(Ok(ready)).is_err() {
        return Ok(());
    }
    let Ok(go) = plan.go.recv() else { return Ok(()) };
    let driver = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build();
    let mut runtime = driver.map_err(|source| RingError::Unavailable { source })?;
    runtime.block_on(async {
        let sockets = bind(&config, plan.shard)?;
        let (index, ready) = (plan.shard, plan.ready.clone());
        let shard = assemble(plan, pool, opened, &go, sockets)?;
        let serves = Ready { shard: index, stores: Vec::new(), damaged_stores: Vec::new(), dead: None };
        if ready.send(Ok(serves)).is_ok() {
            shard.run().await;
        }
        Ok(())
    })
}

fn bind(config: &NodeConfig, shard: ShardIndex) -> Result<Sockets, BootError> {
    let address = |port| SocketAddr::new(config.cluster.bind_ip, port);
    let mut nbd_unix = None;
    if shard == ShardIndex(0) {
        let path = config.cluster.nbd_socket();
        // What a dead predecessor left; the device locks say that none lives.
        let removed = std::fs::remove_file(&path);
        let bound = match removed {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(source),
            _ => std::os::unix::net::UnixListener::bind(&path).and_then(UnixListener::from_std),
        };
        nbd_unix = Some(bound.map_err(|source| BootError::Path { path, source })?);
    }
    Ok(Sockets {
        wire: listener::bind(address(config.dataplane.port + shard.0), false)?,
        nbd: listener::bind(address(config.dataplane.nbd_port), true)?,
        nbd_unix,
    })
}

/// Puts the shard together and starts its tasks.
fn assemble(
    plan: ShardPlan,
    pool: &'static BufferPool,
    opened: Opened,
    go: &Go,
    sockets: Sockets,
) -> Result<Shard, BootError> {
    let config = plan.config.clone();
    let identity = Rc::new(Identity {
        node: config.numeric_id,
        incarnation: plan.incarnation,
        shard: plan.shard,
        shard_count: plan.shard_count,
        cluster_id: config.cluster.cluster_id.clone(),
    });
    let handle = Handle::new();
    let stats = Rc::new(RefCell::new(Stats::new()));
    let (calls, opens) = (Calls::default(), Opens::default());
    let port = ShardPort {
        identity: identity.clone(),
        handle: handle.clone(),
        opens: opens.clone(),
        stats: stats.clone(),
    };
    let client = VolumeClient::new(Rc::new(port), calls.clone(), pool);
    let connections = Connections {
        identity: identity.clone(),
        handle: handle.clone(),
        memory: Memory { pool, overflow: Rc::default() },
        counters: Rc::default(),
        open: Rc::default(),
        open_max: config.network.max_connections,
        files: Rc::default(),
        sessions: Rc::new(Cell::new(plan.incarnation.0)),
    };
    let replication = Replication::new(identity.node, identity.incarnation, identity.shard, pool);
    let mut driver = Driver::new(replication);
    let (devices, ring) = take_stores(opened.stores, pool, &mut driver)?;
    monoio::spawn(tasks::watch(ring.eventfd().clone(), handle.clone()));
    monoio::spawn(tasks::watch(plan.mesh.eventfd().clone(), handle.clone()));
    monoio::spawn(tasks::tick(handle.clone()));
    monoio::spawn(connections.clone().serve(sockets.wire));
    let options =
        nbd::Options { connections_max: config.network.max_connections as usize, ..nbd::Options::default() };
    let gateway = nbd::Gateway::new(client.clone(), pool, options, plan.nbd.clone());
    if let Some(unix) = sockets.nbd_unix {
        monoio::spawn(gateway.clone().serve_unix(unix));
    }
    monoio::spawn(gateway.clone().serve_tcp(sockets.nbd));
    let control = (plan.shard == ShardIndex(0)).then(|| start_link(&plan, &handle, go));
    Ok(Shard {
        identity,
        handle,
        client,
        gateway,
        driver,
        devices,
        broken_stores: opened.broken,
        failures: plan.failures,
        notes: Vec::new(),
        tells_failures: plan.shard == ShardIndex(0),
        ring,
        peers: Peers::default(),
        connections,
        dialled: Default::default(),
        map: Arc::default(),
        calls,
        opens,
        buffers: pool,
        lease_until_ns: plan.lease_until_ns,
        stats,
        mesh: Rc::new(RefCell::new(plan.mesh)),
        control,
        stopping: None,
        stopped: plan.stopped,
        scratch: Scratch::default(),
    })
}

/// Registers the stores' devices with a ring, and gives the stores to the driver.
fn take_stores(
    opened: Vec<OpenStore>,
    pool: &'static BufferPool,
    driver: &mut Driver,
) -> Result<(HashMap<StoreId, Devices>, DiskRing), BootError> {
    let files: Vec<&FileDevice> =
        opened.iter().flat_map(|open| std::iter::once(&open.capacity).chain(&open.cache)).collect();
    let ring = DiskRing::new(&files, &[pool], RING_DEPTH)?;
    let mut table = HashMap::new();
    let mut slot = 0;
    for OpenStore { store, recovered, capacity, cache, media } in opened {
        let cache_slot = cache.as_ref().map(|_| slot + 1);
        let path = capacity.path().display().to_string();
        let devices = Devices {
            path,
            cache_path: cache.as_ref().map(|cache| cache.path().display().to_string()),
            media: media_name(media).to_owned(),
            capacity_slot: slot,
            cache_slot,
            writes: Recent::default(),
        };
        table.insert(store.id(), devices);
        slot += 1 + usize::from(cache.is_some());
        driver.add_store(store, recovered);
        // The devices stay open and locked for the life of the process.
        std::mem::forget((capacity, cache));
    }
    Ok((table, ring))
}

/// Starts the link to the control process; shard 0 alone.
fn start_link(plan: &ShardPlan, handle: &Handle, go: &Go) -> Control {
    let config = &plan.config;
    let sender = LinkSender::default();
    let hello = proto::DataHello {
        pid: std::process::id(),
        process: Some(proto::DataProcess::from(&*go.process)),
        damaged_stores: go.damaged_stores.iter().map(proto::DamagedStore::from).collect(),
    };
    let hello = LinkMessage { request_id: 0, body: Some(Body::Hello(hello)) };
    let events = handle.clone();
    let on_event = move |event| events.push(Event::Link(event));
    monoio::spawn(link::run(config.cluster.link_socket(), sender.clone(), move || hello.clone(), on_event));
    monoio::spawn(tasks::status(handle.clone(), config.network.heartbeat_interval));
    let cluster_id = config.cluster.cluster_id.as_str().into();
    Control::new(sender, usize::from(plan.shard_count), cluster_id, plan.lease_until_ns.clone())
}
