//! What makes a configuration valid beyond the type of each field: names, sizes, and how fields fit together.

use std::collections::BTreeSet;
use std::path::Path;

use xsan_protocol::limits::{NAME_BYTES_MAX, SHARDS_MAX};
use xsan_protocol::units::BLOCK_SIZE;

use super::{FieldError, MEMORY_PER_SHARD_MIN, NodeConfig, Role, Startup};
use crate::size::Size;

/// Smallest file-backed store: a journal and room for some blocks.
const FILE_SIZE_MIN: u64 = 256 << 20;
const FILE_SIZE_MAX: u64 = 64 << 40;
/// Longest path of a Unix socket: the kernel's 108 bytes end in NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// A log file too small for a few messages would rotate for ever.
const LOG_SIZE_MIN: u64 = 64 << 10;

pub(super) fn config(config: &NodeConfig) -> Result<(), FieldError> {
    cluster(config)?;
    storage(config)?;
    network(config)?;
    data_plane(config)?;
    shards(config, config.dataplane.core_count().unwrap_or(1))?;
    logging(config)
}

/// Letters, digits, `.`, `_` and `-`, beginning with a letter or digit: safe in paths, URLs and tables.
fn name(field: &str, text: &str) -> Result<(), FieldError> {
    let problem = if text.is_empty() {
        "is missing".to_owned()
    } else if text.len() > NAME_BYTES_MAX {
        format!("has {} characters, more than {NAME_BYTES_MAX}", text.len())
    } else if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        format!("{text:?} does not begin with a letter or digit")
    } else if let Some(bad) = text.chars().find(|c| !c.is_ascii_alphanumeric() && !"._-".contains(*c)) {
        format!("{text:?} contains {bad:?}; letters, digits, '.', '_' and '-' are allowed")
    } else {
        return Ok(());
    };
    Err(FieldError::new(field, problem))
}

fn absolute(field: &str, path: &Path) -> Result<(), FieldError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(FieldError::new(field, format!("{:?} is not an absolute path", path.display().to_string())))
}

fn cluster(config: &NodeConfig) -> Result<(), FieldError> {
    let cluster = &config.cluster;
    name("cluster.cluster_id", &cluster.cluster_id)?;
    name("cluster.node_id", &cluster.node_id)?;
    if !config.established && cluster.node_id.bytes().all(|byte| byte.is_ascii_digit()) {
        let problem =
            format!("{:?} has only digits, and would be taken for a node's number", cluster.node_id);
        return Err(FieldError::new("cluster.node_id", problem));
    }
    if !cluster.failure_domain.is_empty() {
        name("cluster.failure_domain", &cluster.failure_domain)?;
    }
    absolute("cluster.data_dir", &cluster.data_dir)?;
    for socket in [cluster.link_socket(), cluster.nbd_socket()] {
        let (bytes, data_dir_bytes) = (socket.as_os_str().len(), cluster.data_dir.as_os_str().len());
        if bytes > SOCKET_PATH_BYTES_MAX {
            let most = SOCKET_PATH_BYTES_MAX - (bytes - data_dir_bytes);
            let problem =
                format!("has {data_dir_bytes} bytes, more than {most}: the sockets in it could not be bound");
            return Err(FieldError::new("cluster.data_dir", problem));
        }
    }
    let ip = cluster.bind_ip;
    if ip.is_unspecified() || ip.is_multicast() {
        let problem =
            format!("\"{ip}\" is not an address that other nodes can reach; give one of this host's own");
        return Err(FieldError::new("cluster.bind_ip", problem));
    }
    if let Startup::Join { address } = &config.startup
        && *address == cluster.control_address()
    {
        return Err(FieldError::new("startup.address", format!("{address} is this node itself")));
    }
    Ok(())
}

fn storage(config: &NodeConfig) -> Result<(), FieldError> {
    let storage = &config.storage;
    if storage.block_size != BLOCK_SIZE as u64 {
        let problem =
            format!("{} is not supported; this release has blocks of {BLOCK_SIZE} bytes", storage.block_size);
        return Err(FieldError::new("storage.block_size", problem));
    }
    let mut paths = BTreeSet::new();
    for (index, device) in storage.devices.iter().enumerate() {
        let field = format!("storage.devices[{index}].path");
        absolute(&field, &device.path)?;
        if !paths.insert(&device.path) {
            return Err(FieldError::new(field, format!("{} is listed twice", device.path.display())));
        }
    }
    let capacity = storage.devices.iter().any(|device| device.role == Role::Capacity);
    if !storage.devices.is_empty() && !capacity {
        return Err(FieldError::new("storage.devices", "has no device of role capacity"));
    }
    let files = if storage.devices.is_empty() { config.store_files() } else { Vec::new() };
    for (index, path) in config.force_format.iter().enumerate() {
        absolute(&format!("force_format[{index}]"), path)?;
        if !paths.contains(path) && !files.contains(path) {
            let own = if files.is_empty() { "storage.devices" } else { "the files in data_dir/data" };
            let problem = format!("{} is not one of {own}", path.display());
            return Err(FieldError::new(format!("force_format[{index}]"), problem));
        }
    }
    Ok(())
}

fn network(config: &NodeConfig) -> Result<(), FieldError> {
    let network = &config.network;
    if network.election_timeout < network.heartbeat_interval * 3 {
        let problem = format!(
            "{} ms is less than three times network.heartbeat_interval ({} ms)",
            network.election_timeout.as_millis(),
            network.heartbeat_interval.as_millis()
        );
        return Err(FieldError::new("network.election_timeout", problem));
    }
    Ok(())
}

fn data_plane(config: &NodeConfig) -> Result<(), FieldError> {
    let dataplane = &config.dataplane;
    core_list(&dataplane.cores).map_err(|problem| FieldError::new("dataplane.cores", problem))?;
    if !(FILE_SIZE_MIN..=FILE_SIZE_MAX).contains(&dataplane.file_size) {
        let problem = format!(
            "{} is not from {} to {}",
            Size(dataplane.file_size),
            Size(FILE_SIZE_MIN),
            Size(FILE_SIZE_MAX)
        );
        return Err(FieldError::new("dataplane.file_size", problem));
    }
    Ok(())
}

/// Cores of a list as `0-3,6`; `None` for `auto`.
pub(super) fn core_list(text: &str) -> Result<Option<Vec<u16>>, String> {
    if text == "auto" {
        return Ok(None);
    }
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) else {
            return Err(format!("{text:?} is neither \"auto\" nor a list of cores, as \"0-3,6\""));
        };
        if first > last {
            return Err(format!("{text:?}: the range {first}-{last} runs backwards"));
        }
        if usize::from(last - first) >= SHARDS_MAX {
            return Err(format!("{text:?} has more than {SHARDS_MAX} cores"));
        }
        for core in first..=last {
            if cores.contains(&core) {
                return Err(format!("{text:?} names core {core} twice"));
            }
            cores.push(core);
        }
    }
    if cores.len() > SHARDS_MAX {
        return Err(format!("{text:?} has more than {SHARDS_MAX} cores"));
    }
    Ok(Some(cores))
}

/// What depends on the number of shards.
pub(super) fn shards(config: &NodeConfig, shards: usize) -> Result<(), FieldError> {
    let least = MEMORY_PER_SHARD_MIN * shards as u64;
    if let Some(memory) = config.dataplane.memory
        && memory < least
    {
        let problem =
            format!("{} is too little for {shards} shard(s); the least is {}", Size(memory), Size(least));
        return Err(FieldError::new("dataplane.memory", problem));
    }
    ports(config, shards)
}

/// All ports are on one address, so no two may meet.
fn ports(config: &NodeConfig, shards: usize) -> Result<(), FieldError> {
    let dataplane = &config.dataplane;
    let control = u32::from(config.cluster.bind_port);
    let nbd = u32::from(dataplane.nbd_port);
    let first = u32::from(dataplane.port);
    let last = first + shards as u32 - 1;
    if last > u32::from(u16::MAX) {
        let problem = format!("{first} leaves no ports for the shards after the first");
        return Err(FieldError::new("dataplane.port", problem));
    }
    if (first..=last).contains(&control) {
        let problem = format!("the shards' ports {first} to {last} contain cluster.bind_port {control}");
        return Err(FieldError::new("dataplane.port", problem));
    }
    if (first..=last).contains(&nbd) {
        let problem = format!("{nbd} is one of the shards' ports {first} to {last}");
        return Err(FieldError::new("dataplane.nbd_port", problem));
    }
    if nbd == control {
        return Err(FieldError::new("dataplane.nbd_port", format!("{nbd} is cluster.bind_port")));
    }
    Ok(())
}

fn logging(config: &NodeConfig) -> Result<(), FieldError> {
    let logging = &config.logging;
    if logging.max_size < LOG_SIZE_MIN {
        let problem = format!("{} is less than {}", Size(logging.max_size), Size(LOG_SIZE_MIN));
        return Err(FieldError::new("logging.max_size", problem));
    }
    if let Some(file) = &logging.file {
        absolute("logging.file", file)?;
        if file.file_name().is_none() {
            return Err(FieldError::new("logging.file", format!("{} names no file", file.display())));
        }
    }
    Ok(())
}
