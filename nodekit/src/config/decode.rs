//! JSON to `NodeConfig`: takes each known field out of its object, and refuses what is left.
//!
//! By hand and not by derived deserialisation, because a wrong value must be told with its path.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};
use xsan_protocol::limits::REPLICAS_MAX;

use super::{
    Cluster, DataPlane, Device, FieldError, HEARTBEAT_INTERVAL_MS_MAX, Level, Logging, Media, Network,
    NodeConfig, Numa, Role, Startup, Storage,
};
use crate::size;

/// Format of `node.json`; a newer one is not understood.
pub(super) const NODE_FILE_FORMAT: u32 = 1;

/// What the file does not say of the cluster is as in `cluster`.
pub(super) fn config_file(value: Value, cluster: Cluster) -> Result<NodeConfig, FieldError> {
    let mut root = Fields::of(String::new(), value)?;
    let config = sections(&mut root, NodeConfig { cluster, ..NodeConfig::default() })?;
    root.end()?;
    Ok(config)
}

pub(super) fn node_file(value: Value) -> Result<NodeConfig, FieldError> {
    let mut root = Fields::of(String::new(), value)?;
    let mut format = 0;
    root.integer("format", 1..=u32::MAX, &mut format)?;
    if format != NODE_FILE_FORMAT {
        return Err(
            root.wrong("format", format!("{format} is not the format {NODE_FILE_FORMAT} of this release"))
        );
    }
    let mut config = sections(&mut root, NodeConfig::default())?;
    root.integer("numeric_id", 0..=u32::MAX, &mut config.numeric_id.0)?;
    config.instance = match root.text("instance")? {
        Some(text) => u64::from_str_radix(&text, 16)
            .map_err(|_| root.wrong("instance", format!("{text:?} is not a hexadecimal number")))?,
        None => return Err(root.wrong("instance", "is missing")),
    };
    root.boolean("established", &mut config.established)?;
    if let Some(path) = root.text("config_file")? {
        config.config_file = Some(PathBuf::from(path));
    }
    config.overridden = root.texts("overridden")?;
    config.force_format = root.texts("force_format")?.into_iter().map(PathBuf::from).collect();
    let mut startup = root.section("startup")?;
    config.startup = match startup.choice("mode", &[("init", false), ("join", true)])? {
        None => return Err(startup.wrong("mode", "is missing")),
        Some(false) => Startup::Init,
        Some(true) => match startup.parsed("address", "an address and port, as 10.0.0.1:8080")? {
            Some(address) => Startup::Join { address },
            None => return Err(startup.wrong("address", "is missing")),
        },
    };
    startup.end()?;
    root.end()?;
    Ok(config)
}

fn sections(root: &mut Fields, mut config: NodeConfig) -> Result<NodeConfig, FieldError> {
    cluster(root.section("cluster")?, &mut config)?;
    storage(root.section("storage")?, &mut config.storage)?;
    network(root.section("network")?, &mut config.network)?;
    data_plane(root.section("dataplane")?, &mut config.dataplane)?;
    logging(root.section("logging")?, &mut config.logging)?;
    Ok(config)
}

fn cluster(mut fields: Fields, config: &mut NodeConfig) -> Result<(), FieldError> {
    let cluster = &mut config.cluster;
    fields.set_text("cluster_id", &mut cluster.cluster_id)?;
    fields.set_text("node_id", &mut cluster.node_id)?;
    if let Some(ip) = fields.parsed("bind_ip", "an IP address")? {
        cluster.bind_ip = ip;
    }
    fields.integer("bind_port", 1..=u16::MAX, &mut cluster.bind_port)?;
    if let Some(path) = fields.text("data_dir")? {
        cluster.data_dir = PathBuf::from(path);
    }
    fields.set_text("failure_domain", &mut cluster.failure_domain)?;
    fields.end()
}

fn storage(mut fields: Fields, storage: &mut Storage) -> Result<(), FieldError> {
    for (index, entry) in fields.list("devices")?.into_iter().enumerate() {
        storage.devices.push(device(Fields::of(format!("storage.devices[{index}]"), entry)?)?);
    }
    fields.size("block_size", &mut storage.block_size)?;
    fields.integer("default_replica_count", 1..=REPLICAS_MAX as u8, &mut storage.default_replica_count)?;
    fields.end()
}

fn device(mut fields: Fields) -> Result<Device, FieldError> {
    let Some(path) = fields.text("path")? else {
        return Err(fields.wrong("path", "is missing"));
    };
    let media = fields.choice("type", &[("ssd", Media::Ssd), ("hdd", Media::Hdd)])?.unwrap_or(Media::Ssd);
    let role = fields.choice("role", &[("cache", Role::Cache), ("capacity", Role::Capacity)])?;
    fields.end()?;
    Ok(Device { path: PathBuf::from(path), media, role: role.unwrap_or(Role::Capacity) })
}

fn network(mut fields: Fields, network: &mut Network) -> Result<(), FieldError> {
    fields.milliseconds(
        "heartbeat_interval",
        50..=HEARTBEAT_INTERVAL_MS_MAX,
        &mut network.heartbeat_interval,
    )?;
    fields.milliseconds("election_timeout", 200..=10_000, &mut network.election_timeout)?;
    fields.integer("max_connections", 1..=65_536, &mut network.max_connections)?;
    fields.end()
}

fn data_plane(mut fields: Fields, dataplane: &mut DataPlane) -> Result<(), FieldError> {
    fields.set_text("cores", &mut dataplane.cores)?;
    if let Some(numa) = fields.choice("numa", &[("auto", Numa::Auto), ("off", Numa::Off)])? {
        dataplane.numa = numa;
    }
    let mut memory = 0;
    if fields.size("memory", &mut memory)? {
        dataplane.memory = Some(memory);
    }
    fields.integer("port", 1..=u16::MAX, &mut dataplane.port)?;
    fields.integer("nbd_port", 1..=u16::MAX, &mut dataplane.nbd_port)?;
    fields.integer("stores", 1..=64, &mut dataplane.stores)?;
    fields.size("file_size", &mut dataplane.file_size)?;
    fields.end()
}

fn logging(mut fields: Fields, logging: &mut Logging) -> Result<(), FieldError> {
    let levels = [
        ("fatal", Level::Error),
        ("error", Level::Error),
        ("warn", Level::Warn),
        ("info", Level::Info),
        ("debug", Level::Debug),
        ("trace", Level::Trace),
    ];
    if let Some(level) = fields.choice("level", &levels)? {
        logging.level = level;
    }
    if let Some(path) = fields.text("file")? {
        logging.file = Some(PathBuf::from(path));
    }
    fields.size("max_size", &mut logging.max_size)?;
    fields.integer("max_files", 1..=1_000, &mut logging.max_files)?;
    fields.boolean("json", &mut logging.json)?;
    fields.end()
}

/// One object of the file while its fields are taken out. `null` stands for a field that is not there.
struct Fields {
    path: String,
    object: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Fields {
    fn of(path: String, value: Value) -> Result<Self, FieldError> {
        match value {
            Value::Object(object) => Ok(Self { path, object, known: Vec::new() }),
            other => {
                let path = if path.is_empty() { String::from("the whole file") } else { path };
                Err(FieldError::new(path, format!("{other} is not an object, as {{\"field\": value}}")))
            }
        }
    }

    fn path_of(&self, name: &str) -> String {
        // JSON allows a field without a name; an error must point at it all the same.
        let name = if name.is_empty() { "\"\"" } else { name };
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    fn wrong(&self, name: &str, problem: impl Into<String>) -> FieldError {
        FieldError::new(self.path_of(name), problem)
    }

    fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.object.remove(name).filter(|value| !value.is_null())
    }

    fn section(&mut self, name: &'static str) -> Result<Self, FieldError> {
        let value = self.take(name).unwrap_or_else(|| Value::Object(Map::new()));
        Self::of(self.path_of(name), value)
    }

    fn list(&mut self, name: &'static str) -> Result<Vec<Value>, FieldError> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(entries)) => Ok(entries),
            Some(other) => Err(self.wrong(name, format!("{other} is not a list"))),
        }
    }

    fn texts(&mut self, name: &'static str) -> Result<Vec<String>, FieldError> {
        let text_of = |(index, entry)| match entry {
            Value::String(text) => Ok(text),
            other => Err(FieldError::new(format!("{name}[{index}]"), format!("{other} is not a string"))),
        };
        self.list(name)?.into_iter().enumerate().map(text_of).collect()
    }

    fn text(&mut self, name: &'static str) -> Result<Option<String>, FieldError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(name, format!("{other} is not a string"))),
        }
    }

    fn set_text(&mut self, name: &'static str, target: &mut String) -> Result<(), FieldError> {
        if let Some(text) = self.text(name)? {
            *target = text;
        }
        Ok(())
    }

    fn parsed<T: std::str::FromStr>(
        &mut self,
        name: &'static str,
        what: &str,
    ) -> Result<Option<T>, FieldError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.wrong(name, format!("{text:?} is not {what}")))
    }

    fn choice<T: Copy>(
        &mut self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, FieldError> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        if let Some((_, value)) = choices.iter().find(|(word, _)| *word == text) {
            return Ok(Some(*value));
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        Err(self.wrong(name, format!("{text:?} is not one of {}", words.join(", "))))
    }

    fn boolean(&mut self, name: &'static str, target: &mut bool) -> Result<(), FieldError> {
        match self.take(name) {
            None => {}
            Some(Value::Bool(value)) => *target = value,
            Some(other) => return Err(self.wrong(name, format!("{other} is not true or false"))),
        }
        Ok(())
    }

    fn integer<T: TryFrom<u64> + PartialOrd + std::fmt::Display>(
        &mut self,
        name: &'static str,
        range: RangeInclusive<T>,
        target: &mut T,
    ) -> Result<(), FieldError> {
        let Some(value) = self.take(name) else { return Ok(()) };
        match value.as_u64().and_then(|value| T::try_from(value).ok()).filter(|value| range.contains(value)) {
            Some(value) => *target = value,
            None => {
                let problem =
                    format!("{value} is not a whole number from {} to {}", range.start(), range.end());
                return Err(self.wrong(name, problem));
            }
        }
        Ok(())
    }

    fn milliseconds(
        &mut self,
        name: &'static str,
        range: RangeInclusive<u64>,
        target: &mut Duration,
    ) -> Result<(), FieldError> {
        let mut value = u64::try_from(target.as_millis()).expect("defaults are seconds");
        let problem = format!("from {} to {} milliseconds", range.start(), range.end());
        self.integer(name, range, &mut value).map_err(|error| {
            let given = error.problem.split(" is not ").next().unwrap_or_default();
            FieldError::new(error.field, format!("{given} is not a whole number {problem}"))
        })?;
        *target = Duration::from_millis(value);
        Ok(())
    }

    /// A size as `"2GiB"`, or a number of bytes. True if it was there.
    fn size(&mut self, name: &'static str, target: &mut u64) -> Result<bool, FieldError> {
        match self.take(name) {
            None => return Ok(false),
            Some(Value::String(text)) => {
                *target =
                    size::parse(&text).map_err(|error| self.wrong(name, format!("{text:?} {error}")))?;
            }
            Some(value) => match value.as_u64() {
                Some(bytes) => *target = bytes,
                None => {
                    let problem = format!("{value} is not a size, as \"2GiB\" or a number of bytes");
                    return Err(self.wrong(name, problem));
                }
            },
        }
        Ok(true)
    }

    /// Refuses fields that nobody asked for.
    fn end(self) -> Result<(), FieldError> {
        match self.object.keys().next() {
            None => Ok(()),
            Some(name) => {
                Err(self.wrong(name, format!("unknown field; known here: {}", self.known.join(", "))))
            }
        }
    }
}
