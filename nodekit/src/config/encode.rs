//! `NodeConfig` to the JSON of `node.json`: the fields of the configuration file, and what the node remembers.

use serde_json::{Value, json};

use super::decode::NODE_FILE_FORMAT;
use super::{Level, Media, NodeConfig, Numa, Role, Startup};

pub(super) fn node_file(config: &NodeConfig) -> Value {
    let NodeConfig { cluster, storage, network, dataplane, logging, .. } = config;
    let devices: Vec<_> = storage
        .devices
        .iter()
        .map(|device| {
            json!({
                "path": device.path,
                "type": match device.media { Media::Ssd => "ssd", Media::Hdd => "hdd" },
                "role": match device.role { Role::Cache => "cache", Role::Capacity => "capacity" },
            })
        })
        .collect();
    json!({
        "format": NODE_FILE_FORMAT,
        "numeric_id": config.numeric_id.0,
        "instance": format!("{:016x}", config.instance),
        "established": config.established,
        "startup": match &config.startup {
            Startup::Init => json!({"mode": "init"}),
            Startup::Join { address } => json!({"mode": "join", "address": address.to_string()}),
        },
        "force_format": config.force_format,
        "config_file": config.config_file,
        "overridden": config.overridden,
        "cluster": {
            "cluster_id": cluster.cluster_id,
            "node_id": cluster.node_id,
            "bind_ip": cluster.bind_ip.to_string(),
            "bind_port": cluster.bind_port,
            "data_dir": cluster.data_dir,
            "failure_domain": cluster.failure_domain,
        },
        "storage": {
            "devices": devices,
            "block_size": storage.block_size,
            "default_replica_count": storage.default_replica_count,
        },
        "network": {
            "heartbeat_interval": network.heartbeat_interval.as_millis() as u64,
            "election_timeout": network.election_timeout.as_millis() as u64,
            "max_connections": network.max_connections,
        },
        "dataplane": {
            "cores": dataplane.cores,
            "numa": match dataplane.numa { Numa::Auto => "auto", Numa::Off => "off" },
            "memory": dataplane.memory,
            "port": dataplane.port,
            "nbd_port": dataplane.nbd_port,
            "stores": dataplane.stores,
            "file_size": dataplane.file_size,
        },
        "logging": {
            "level": logging.level.word(),
            "file": logging.file,
            "max_size": logging.max_size,
            "max_files": logging.max_files,
            "json": logging.json,
        },
    })
}

impl Level {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
