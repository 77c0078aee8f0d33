//! What operators write: the configuration of a node, and sizes.

use std::path::Path;

use anyhow::ensure;
use serde_json::json;
use xsan_nodekit::config::{ConfigError, NodeConfig};
use xsan_nodekit::size::{self, Amount, Size};

use crate::measure::Bound;
use crate::target::{Form, Target, Verdict, no_checksum};

pub const TARGETS: &[Target] = &[
    Target {
        name: "node-config",
        what: "the configuration file of a node",
        seeds: config_seeds,
        check: check_config,
        ..TEXT
    },
    Target {
        name: "node-json",
        what: "node.json of a data directory",
        seeds: node_seeds,
        check: check_node,
        ..TEXT
    },
    Target {
        name: "size",
        what: "a size as people write it",
        form: Form::Text,
        bytes_max: 128,
        test_inputs: 20_000,
        seeds: || {
            ["100GB", "1.5 TiB", "4096", "0.5kB", "16384PiB", "1.500000MB"]
                .map(|s| s.as_bytes().to_vec())
                .to_vec()
        },
        check: check_size,
        ..TEXT
    },
];

const TEXT: Target = Target {
    name: "",
    what: "",
    form: Form::Json,
    bytes_max: 16 * 1024,
    test_inputs: 4_000,
    seeds: Vec::new,
    fix: no_checksum,
    check: |_| Ok(Verdict::Refused),
    known: &[],
};

/// A value of JSON is 2 bytes in the text and 32 in memory, in vectors and maps that grow; a refusal quotes what it
/// refuses, and the core lists of a configuration are made several times.
const BOUND: Bound = Bound::new(600, 64 * 1024);

fn config_seeds() -> Vec<Vec<u8>> {
    let full = json!({
        "cluster": {
            "cluster_id": "cluster-1", "node_id": "node-001", "bind_ip": "10.0.0.1", "bind_port": 8080,
            "data_dir": "/var/lib/xsan", "failure_domain": "rack-1",
        },
        "storage": {
            "devices": [
                {"path": "/dev/nvme0n1", "type": "ssd", "role": "cache"},
                {"path": "/dev/sdb", "type": "hdd", "role": "capacity"},
            ],
            "block_size": "4MiB", "default_replica_count": 3,
        },
        "network": {"heartbeat_interval": 250, "election_timeout": 1000, "max_connections": 1000},
        "dataplane": {
            "cores": "0-3,6", "numa": "auto", "memory": "2GiB", "port": 9100, "nbd_port": 10809, "stores": 2,
            "file_size": "8GiB",
        },
        "logging": {"level": "info", "file": "/var/log/xsan/node.log", "max_size": "100MB", "max_files": 10, "json": true},
    });
    vec![b"{}".to_vec(), full.to_string().into_bytes()]
}

fn node_seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for text in config_seeds() {
        let mut config =
            NodeConfig::decode_file(Path::new("/etc/xsan/node.conf"), &text).expect("a seed is valid");
        config.cluster.cluster_id = "cluster-1".to_owned();
        config.cluster.node_id = "node-001".to_owned();
        seeds.push(config.encode_node().into_bytes());
    }
    seeds
}

fn named(error: &ConfigError) -> anyhow::Result<()> {
    if let ConfigError::Field { source, .. } = error {
        ensure!(
            !source.field.is_empty() && !source.problem.is_empty(),
            "an error that names no field: {error}"
        );
    }
    Ok(())
}

fn check_config(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let file = Path::new("/etc/xsan/node.conf");
    let decoded = BOUND.hold(bytes.len(), || NodeConfig::decode_file(file, bytes))?;
    match &decoded {
        Ok(config) => {
            let valid = BOUND.hold(bytes.len(), || config.validate())?;
            if valid.is_ok() {
                survives(config)?;
            }
        }
        Err(error) => named(error)?,
    }
    Ok(Verdict::of(&decoded))
}

/// A configuration is the same after node.json.
fn survives(config: &NodeConfig) -> anyhow::Result<()> {
    let again = NodeConfig::decode_node(&config.cluster.data_dir, config.encode_node().as_bytes());
    let again = again.map_err(|error| anyhow::anyhow!("what was saved is refused: {error}"))?;
    ensure!(again == *config, "a configuration is not the same after node.json:\n{config:?}\n{again:?}");
    Ok(())
}

fn check_node(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let decoded = BOUND.hold(bytes.len(), || NodeConfig::decode_node(Path::new("/var/lib/xsan"), bytes))?;
    match &decoded {
        Ok(config) => {
            ensure!(config.validate().is_ok(), "what was loaded is not valid");
            let shards = config.dataplane.core_count().unwrap_or(1);
            ensure!((1..=xsan_protocol::limits::SHARDS_MAX).contains(&shards), "{shards} shards");
            let last = usize::from(config.dataplane.port) + shards - 1;
            ensure!(last <= usize::from(u16::MAX), "a shard has port {last}");
            config.dataplane.memory_bytes(shards);
            survives(config)?;
        }
        Err(error) => named(error)?,
    }
    Ok(Verdict::of(&decoded))
}

fn check_size(bytes: &[u8]) -> anyhow::Result<Verdict> {
    let Ok(text) = std::str::from_utf8(bytes) else { return Ok(Verdict::Refused) };
    let parsed = Bound::new(0, 0).hold(bytes.len(), || size::parse(text))?;
    if let Ok(bytes) = parsed {
        ensure!(size::parse(&format!("{bytes} B")) == Ok(bytes), "{bytes} bytes are not the same again");
        let (size, amount) = (Size(bytes).to_string(), Amount(bytes).to_string());
        // Shown exactly or rounded: never off by more than a hundredth.
        for shown in [size, amount] {
            let again = size::parse(&shown)
                .or_else(|error| if error == size::SizeError::Fraction { Ok(bytes) } else { Err(error) });
            match again {
                Ok(again) => {
                    ensure!(again.abs_diff(bytes) <= bytes / 100, "{bytes} bytes are shown as {shown}")
                }
                // 16 EiB less something are rounded up to more than there is.
                Err(size::SizeError::TooLarge) => {
                    ensure!(bytes > u64::MAX / 100 * 99, "{bytes} bytes are shown as {shown}")
                }
                Err(error) => anyhow::bail!("{bytes} bytes are shown as {shown}, which {error}"),
            }
        }
    }
    Ok(Verdict::of(&parsed))
}
