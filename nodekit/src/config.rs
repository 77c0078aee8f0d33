//! Configuration of a node: what the file and the command line say, merged and valid.
//!
//! xsan-node reads the file, applies its flags and saves the result as `DATA_DIR/node.json`, whole; xsan-control
//! and xsan-data read that and nothing else. The file has the same fields, all of them optional.
//!
//! Invariants
//! - A `NodeConfig` from `load` is valid: it passed `validate` and has the identity that the cluster gave it.
//! - `node.json` is replaced as a whole (written aside, synced, renamed, directory synced) or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::units::BLOCK_SIZE;

mod decode;
mod encode;
mod validate;

/// Where the configuration file is looked for when none is named.
pub const DEFAULT_FILE: &str = "/etc/xsan/node.conf";
/// The node's identity and effective configuration, in its data directory.
const NODE_FILE: &str = "node.json";
/// Smallest `dataplane.memory` for each shard.
pub const MEMORY_PER_SHARD_MIN: u64 = 32 << 20;
const MEMORY_PER_SHARD_DEFAULT: u64 = 64 << 20;

/// Largest `network.heartbeat_interval`: a lease, which `xsan-control` grants as the answer to a beat, has four chances to be
/// renewed.
pub const HEARTBEAT_INTERVAL_MS_MAX: u64 = 375;

/// The effective configuration of one node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeConfig {
    pub cluster: Cluster,
    pub storage: Storage,
    pub network: Network,
    pub dataplane: DataPlane,
    pub logging: Logging,
    /// How the node came into the cluster; later starts find it in its data directory and start the same way.
    pub startup: Startup,
    /// The id that the cluster gave the node; the founder's is 1. 0 until it has one, and xsan-node starts neither
    /// process before.
    pub numeric_id: NodeId,
    /// Drawn once for the data directory, before the node asks for its id: whoever asks with the same one is the
    /// same node, so an answer that was lost costs nothing.
    pub instance: u64,
    /// Devices to be formatted at the next start, whatever they hold. The data process empties this when it has done so,
    /// before it serves: what it takes in from then on is not lost to a second start.
    pub force_format: Vec<PathBuf>,
    /// The configuration file that later starts read again.
    pub config_file: Option<PathBuf>,
    /// Fields in which options won over `config_file` when it was named: what it says there is not the node's, and need not be.
    pub overridden: Vec<String>,
    /// Has the node ever served? Until then the same --init-cluster or --join-cluster may be repeated.
    pub established: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// Found the cluster.
    Init,
    /// Join it by asking the control plane at `address`.
    Join { address: SocketAddr },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    pub cluster_id: String,
    /// The operator's name of the node; the number is `NodeConfig::numeric_id`.
    pub node_id: String,
    pub bind_ip: IpAddr,
    /// TCP for the API and Raft, UDP for heartbeats.
    pub bind_port: u16,
    pub data_dir: PathBuf,
    /// Replicas of a group are spread over failure domains; empty: the node is its own.
    pub failure_domain: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Empty: `dataplane.stores` files of `dataplane.file_size` in `DATA_DIR/data`.
    pub devices: Vec<Device>,
    pub block_size: u64,
    pub default_replica_count: u8,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    pub path: PathBuf,
    pub media: Media,
    pub role: Role,
}

/// `storage.devices[].type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    Ssd,
    Hdd,
}

/// `storage.devices[].role`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Carries the journals of the capacity devices.
    Cache,
    Capacity,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    pub heartbeat_interval: Duration,
    pub election_timeout: Duration,
    pub max_connections: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataPlane {
    /// `auto`, or a list as `0-3,6`; its form is valid, whether the machine has those cores is the data plane's to say.
    pub cores: String,
    pub numa: Numa,
    /// For all the shards together; `None`: a fixed amount for each, see `memory_bytes`.
    pub memory: Option<u64>,
    /// Wire protocol port of shard 0; shard n has `port + n`.
    pub port: u16,
    pub nbd_port: u16,
    /// File-backed stores of a node without `storage.devices`.
    pub stores: u16,
    /// Bytes of each file-backed store.
    pub file_size: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numa {
    /// Each shard's memory comes from the NUMA node of its core.
    Auto,
    Off,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logging {
    pub level: Level,
    /// `None`: stderr. Each process writes a file of its own: `node.log`, `node-control.log`, `node-data.log`.
    pub file: Option<PathBuf>,
    /// A file that would grow past this is renamed to `….1`.
    pub max_size: u64,
    /// Files kept for each process, with the one that is written to.
    pub max_files: u32,
    pub json: bool,
}

/// `logging.level`; the word `fatal` is taken as `error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            cluster: Cluster {
                cluster_id: String::new(),
                node_id: String::new(),
                bind_ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
                bind_port: 8080,
                data_dir: PathBuf::from("/var/lib/xsan"),
                failure_domain: String::new(),
            },
            storage: Storage { devices: Vec::new(), block_size: BLOCK_SIZE as u64, default_replica_count: 2 },
            network: Network {
                heartbeat_interval: Duration::from_millis(250),
                election_timeout: Duration::from_millis(1000),
                max_connections: 1000,
            },
            dataplane: DataPlane {
                cores: String::from("auto"),
                numa: Numa::Auto,
                memory: None,
                port: 9100,
                nbd_port: 10809,
                stores: 1,
                file_size: 8 << 30,
            },
            logging: Logging {
                level: Level::Info,
                file: None,
                max_size: 100_000_000,
                max_files: 10,
                json: false,
            },
            startup: Startup::Init,
            numeric_id: NodeId(0),
            instance: 0,
            force_format: Vec::new(),
            config_file: None,
            overridden: Vec::new(),
            established: false,
        }
    }
}

impl Cluster {
    /// Where the API, Raft and (on UDP) the heartbeats are.
    pub fn control_address(&self) -> SocketAddr {
        SocketAddr::new(self.bind_ip, self.bind_port)
    }

    /// The Unix socket between the two processes of the node; xsan-control listens.
    pub fn link_socket(&self) -> PathBuf {
        self.data_dir.join("link.sock")
    }

    /// The NBD gateway's Unix socket.
    pub fn nbd_socket(&self) -> PathBuf {
        self.data_dir.join("nbd.sock")
    }
}

impl DataPlane {
    /// Bytes of buffers for `shards` shards together.
    pub fn memory_bytes(&self, shards: usize) -> u64 {
        self.memory.unwrap_or(MEMORY_PER_SHARD_DEFAULT * shards as u64)
    }

    /// Cores that `cores` lists; `None` for `auto`.
    pub fn core_count(&self) -> Option<usize> {
        validate::core_list(&self.cores).ok().flatten().map(|cores| cores.len())
    }
}

/// A field whose value is wrong; `field` is its path in the file, as `storage.devices[1].role`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    pub field: String,
    pub problem: String,
}

impl FieldError {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// Why there is no valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("{}: not valid JSON: {source}", file.display())]
    Syntax { file: PathBuf, source: serde_json::Error },
    #[error("{}: {source}", file.display())]
    Field { file: PathBuf, source: FieldError },
    #[error("data directory {}: holds no node (found a cluster with --init-cluster, or join one with --join-cluster)", data_dir.display())]
    NoNode { data_dir: PathBuf },
    #[error("{}: {source}", file.display())]
    Write { file: PathBuf, source: io::Error },
}

impl ConfigError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Read { .. } | Self::Syntax { .. } | Self::Field { .. } => Code::ConfigInvalid,
            Self::NoNode { .. } | Self::Write { .. } => Code::DataDirUnusable,
        }
    }
}

impl NodeConfig {
    /// Reads a configuration file; what it does not say keeps its default. The caller applies its flags, then calls `validate`.
    ///
    /// # Errors
    /// The file can not be read, is no JSON, or has an unknown or malformed field.
    pub fn read_file(file: &Path) -> Result<Self, ConfigError> {
        Self::read_file_over(file, Self::default().cluster)
    }

    /// As [`NodeConfig::read_file`], but what the file does not say of the cluster is as in `cluster`.
    ///
    /// # Errors
    /// As [`NodeConfig::read_file`].
    pub fn read_file_over(file: &Path, cluster: Cluster) -> Result<Self, ConfigError> {
        let text = fs::read(file).map_err(|source| ConfigError::Read { file: file.into(), source })?;
        Self::decode_over(file, &text, cluster)
    }

    /// As [`NodeConfig::read_file`], of what was read.
    ///
    /// # Errors
    /// `text` is no JSON, or has an unknown or malformed field.
    pub fn decode_file(file: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        Self::decode_over(file, text, Self::default().cluster)
    }

    fn decode_over(file: &Path, text: &[u8], cluster: Cluster) -> Result<Self, ConfigError> {
        let value = serde_json::from_slice(text)
            .map_err(|source| ConfigError::Syntax { file: file.into(), source })?;
        let mut config = decode::config_file(value, cluster)
            .map_err(|source| ConfigError::Field { file: file.into(), source })?;
        config.config_file = Some(file.into());
        Ok(config)
    }

    /// Reads the node that lives in `data_dir`.
    ///
    /// # Errors
    /// There is none, or `node.json` is not readable and valid.
    pub fn load(data_dir: &Path) -> Result<Self, ConfigError> {
        let file = data_dir.join(NODE_FILE);
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ConfigError::NoNode { data_dir: data_dir.into() });
            }
            Err(source) => return Err(ConfigError::Read { file, source }),
        };
        Self::decode_node(data_dir, &text)
    }

    /// As [`NodeConfig::load`], of what `node.json` holds.
    ///
    /// # Errors
    /// `text` is not valid.
    pub fn decode_node(data_dir: &Path, text: &[u8]) -> Result<Self, ConfigError> {
        let file = data_dir.join(NODE_FILE);
        let value = match serde_json::from_slice(text) {
            Ok(value) => value,
            Err(source) => return Err(ConfigError::Syntax { file, source }),
        };
        let decoded = decode::node_file(value).and_then(|mut config| {
            // The directory may have been moved or mounted elsewhere; what it holds is this node all the same.
            config.cluster.data_dir = data_dir.into();
            config.validate().map(|()| config)
        });
        decoded.map_err(|source| ConfigError::Field { file, source })
    }

    /// Replaces `DATA_DIR/node.json`, durably.
    ///
    /// # Errors
    /// The data directory can not be written.
    pub fn save(&self) -> Result<(), ConfigError> {
        let file = self.cluster.data_dir.join(NODE_FILE);
        replace(&file, self.encode_node().as_bytes()).map_err(|source| ConfigError::Write { file, source })
    }

    /// The content of `node.json`.
    pub fn encode_node(&self) -> String {
        let text = serde_json::to_string_pretty(&encode::node_file(self));
        text.expect("a JSON value without maps of other keys can always be written") + "\n"
    }

    /// Takes the node out of its data directory, one that no cluster has taken in.
    ///
    /// # Errors
    /// The data directory can not be written.
    pub fn remove(&self) -> Result<(), ConfigError> {
        let file = self.cluster.data_dir.join(NODE_FILE);
        fs::remove_file(&file).map_err(|source| ConfigError::Write { file, source })
    }

    /// Does `data_dir` hold a node?
    ///
    /// # Errors
    /// It can not be told, as for want of permission.
    pub fn exists(data_dir: &Path) -> io::Result<bool> {
        data_dir.join(NODE_FILE).try_exists()
    }

    /// The files of the embedded stores, which a node without `storage.devices` has.
    pub fn store_files(&self) -> Vec<PathBuf> {
        let directory = self.cluster.data_dir.join("data");
        (0..self.dataplane.stores).map(|index| directory.join(format!("store-{index}.img"))).collect()
    }

    /// Checks names, ranges and what depends on several fields; the path of the first wrong one is in the error.
    ///
    /// # Errors
    /// A field is not valid.
    pub fn validate(&self) -> Result<(), FieldError> {
        validate::config(self)
    }

    /// Checks again what depends on the number of shards: of `auto` only the data plane knows how many cores it is.
    ///
    /// # Errors
    /// The memory or the ports are too few for `shards`, or ports meet.
    pub fn validate_shards(&self, shards: usize) -> Result<(), FieldError> {
        validate::shards(self, shards)
    }
}

/// Replaces `file` by `content` so that a crash at any moment leaves the old or the new one, whole.
///
/// # Errors
/// As the file system has them: the old one is there, or the new one may be lost with the host's power.
///
/// # Panics
/// `file` is in no directory.
pub fn replace(file: &Path, content: &[u8]) -> io::Result<()> {
    let mut aside = file.as_os_str().to_owned();
    aside.push(".new");
    let mut new = File::create(&aside)?;
    new.write_all(content)?;
    new.sync_all()?;
    fs::rename(&aside, file)?;
    let directory = file.parent().expect("a file is in a directory");
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests;
