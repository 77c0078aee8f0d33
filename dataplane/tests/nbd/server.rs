//! A gateway over volumes in memory, on a thread and a runtime of its own, for one test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use monoio::net::{TcpListener, UnixListener};
use monoio::{IoUringDriver, RuntimeBuilder};
use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::gateway::nbd::{Counters, Gateway, Options};
use xsan_protocol::ids::VolumeId;

use crate::memory::{MemoryVolumes, Shared};

pub const DISK_BYTES: u64 = 256 << 20;
pub const VOLUMES: [(&str, u64); 5] = [
    ("disk", DISK_BYTES),
    ("slow-disk", DISK_BYTES),
    ("faulty-disk", DISK_BYTES),
    ("stuck-disk", DISK_BYTES),
    ("sent-disk", DISK_BYTES),
];

pub struct Server {
    pub address: SocketAddr,
    pub unix: PathBuf,
    pub counters: Arc<Counters>,
    pub pool: &'static BufferPool,
    /// One for each of [`VOLUMES`].
    pub volumes: Vec<Arc<Shared>>,
    stop: Arc<AtomicBool>,
    /// Volume of the sweep that is asked for.
    sweep: mpsc::Sender<(VolumeId, mpsc::Sender<()>)>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        Self::with(Options::default(), 256 << 20)
    }

    /// Listens on a free port of the loopback and on a Unix socket. The thread lives as long as the test process.
    pub fn with(options: Options, pool_bytes: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let unix = directory.path().join("nbd.sock");
        let pool = BufferPool::anonymous(pool_bytes);
        let counters = Arc::new(Counters::default());
        let (ready, started) = mpsc::channel();
        let (path, shared) = (unix.clone(), Arc::clone(&counters));
        let stop = Arc::new(AtomicBool::new(false));
        let stops = Arc::clone(&stop);
        let (sweep, sweeps) = mpsc::channel::<(VolumeId, mpsc::Sender<()>)>();
        thread::spawn(move || {
            let mut runtime = RuntimeBuilder::<IoUringDriver>::new().enable_timer().build().unwrap();
            runtime.block_on(async move {
                let (volumes, states) = MemoryVolumes::new(pool, &VOLUMES);
                let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
                // monoio's own `bind` asks for SO_REUSEPORT, which newer kernels refuse on Unix sockets.
                let unix = std::os::unix::net::UnixListener::bind(path).unwrap();
                let unix = UnixListener::from_std(unix).unwrap();
                ready.send((tcp.local_addr().unwrap(), states)).unwrap();
                let gateway = Gateway::new(volumes, pool, options, shared);
                monoio::spawn(gateway.clone().serve_unix(unix));
                monoio::spawn(gateway.clone().serve_tcp(tcp));
                while !stops.load(Ordering::Relaxed) {
                    monoio::time::sleep(Duration::from_millis(1)).await;
                    while let Ok((volume, done)) = sweeps.try_recv() {
                        let gateway = gateway.clone();
                        monoio::spawn(async move {
                            gateway.sweep(volume).await;
                            let _ = done.send(());
                        });
                    }
                }
                gateway.stop();
                std::future::pending::<()>().await;
            });
        });
        let (address, volumes) = started.recv().expect("the server started");
        Self { address, unix, counters, pool, volumes, stop, sweep, _directory: directory }
    }

    /// Has the gateway look for clients of a volume that are gone; it says when nothing of them is under way.
    pub fn sweep(&self, volume: VolumeId) -> mpsc::Receiver<()> {
        let (done, swept) = mpsc::channel();
        self.sweep.send((volume, done)).unwrap();
        swept
    }

    /// Has the gateway stop, soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.address)
    }

    pub fn unix_uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.unix.display())
    }

    /// Waits until no connection is left, and checks that nothing is left of them.
    pub fn assert_quiet(&self) {
        eventually("all connections end", || self.counters.connections() == 0);
        assert!(self.pool.occupancy().iter().all(|(free, all)| free == all), "{:?}", self.pool);
        assert!(self.volumes.iter().all(|volume| volume.opens.load(Ordering::Relaxed) == 0));
    }
}

pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
