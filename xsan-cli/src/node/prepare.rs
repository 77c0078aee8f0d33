//! From the command line and the file to a node that may start: everything is checked before anything is changed.
//!
//! Invariants
//! - A file that names another node is not read for this one, unless options have won over it.
//! - When a check fails, the data directory is as it was before, and the cluster has not heard of the node.
//! - The node's instance is in its data directory before it asks to join, and stays there unless the cluster surely
//!   refused: whatever is lost on the way, the next try is known for the same node.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use xsan_client::{Address, ClientError, ControlClient, Options};
use xsan_nodekit::config::{Cluster, ConfigError, DEFAULT_FILE, FieldError, NodeConfig, Startup};
use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto::JoinRequest;
use xsan_protocol::wire::header::{VERSION, VERSION_MIN};

use super::args::Args;
use super::data_dir::DataDir;
use super::error::NodeError;
use super::ports;

/// What the founder is called by number; everybody else's is given by the cluster.
const FOUNDER: NodeId = NodeId(1);

/// A node that has its identity, its configuration on disk, and its data directory for itself.
pub struct Prepared {
    pub config: NodeConfig,
    /// Held for the life of the process.
    pub data_dir: DataDir,
}

/// What is to be started, by the command line, the file and the data directory.
pub struct Plan {
    pub config: NodeConfig,
    /// Not known to its data directory yet.
    pub fresh: bool,
    /// For the log, which is not there yet when they arise.
    pub warnings: Vec<String>,
}

/// Decides what to start. Reads the disk, and changes nothing.
pub fn plan(args: &Args, default_file: &Path) -> Result<Plan, NodeError> {
    let named = args.config.as_deref().map(absolute).transpose()?;
    // For a node that is not there yet, and to find one that is; what else a later start reads, `again` says.
    let file = named.clone().or_else(|| Some(default_file.to_owned()).filter(|file| file.exists()));
    let data_dir = match (&args.data_dir, &file) {
        (Some(data_dir), _) => absolute(data_dir)?,
        (None, Some(file)) => NodeConfig::read_file(file)?.cluster.data_dir,
        (None, None) => NodeConfig::default().cluster.data_dir,
    };
    let exists = NodeConfig::exists(&data_dir)
        .map_err(|source| NodeError::DataDir { data_dir: data_dir.clone(), source })?;
    let founds_or_joins = args.init_cluster || args.join_cluster;
    let plan = if founds_or_joins && !exists {
        first(args, file.as_deref(), data_dir)?
    } else {
        let remembered = NodeConfig::load(&data_dir)?;
        if founds_or_joins {
            must_be_unfinished(args, named.as_deref(), &remembered)?;
        }
        again(args, named, default_file, remembered)?
    };
    plan.config.validate().map_err(|source| NodeError::Field { source })?;
    Ok(plan)
}

/// A first start.
fn first(args: &Args, file: Option<&Path>, data_dir: PathBuf) -> Result<Plan, NodeError> {
    let mut config = file.map(NodeConfig::read_file).transpose()?.unwrap_or_default();
    config.cluster.data_dir = data_dir;
    apply(args, &mut config)?;
    if let Some(file) = file {
        let read = NodeConfig::read_file_over(file, config.cluster.clone())?;
        let overridden = differences(&read.cluster, &config.cluster);
        config.overridden = overridden.into_iter().map(|difference| difference.field.into()).collect();
    }
    Ok(Plan { config, fresh: true, warnings: Vec::new() })
}

/// Lays the options over the file.
fn apply(args: &Args, config: &mut NodeConfig) -> Result<(), NodeError> {
    let cluster = &mut config.cluster;
    let args = args.clone();
    cluster.cluster_id = args.cluster_id.unwrap_or_else(|| cluster.cluster_id.clone());
    cluster.node_id = args.node_id.unwrap_or_else(|| cluster.node_id.clone());
    cluster.bind_ip = args.bind_ip.unwrap_or(cluster.bind_ip);
    cluster.bind_port = args.bind_port.unwrap_or(cluster.bind_port);
    cluster.failure_domain = args.failure_domain.unwrap_or_else(|| cluster.failure_domain.clone());
    config.startup = match args.join_address {
        Some(address) => Startup::Join { address },
        None => Startup::Init,
    };
    config.force_format = args.force_format.iter().map(|path| absolute(path)).collect::<Result<_, _>>()?;
    Ok(())
}

/// The same command may be repeated while the node has never served, as after a refused device. Nothing else may.
fn must_be_unfinished(args: &Args, named: Option<&Path>, remembered: &NodeConfig) -> Result<(), NodeError> {
    let cluster = &remembered.cluster;
    let exists = NodeError::Exists {
        data_dir: cluster.data_dir.clone(),
        node: cluster.node_id.clone(),
        cluster: cluster.cluster_id.clone(),
    };
    if remembered.established {
        return Err(exists);
    }
    let file = named.or(remembered.config_file.as_deref().filter(|file| file.exists()));
    let mut wanted = file.map(NodeConfig::read_file).transpose()?.unwrap_or_default();
    wanted.cluster.data_dir = cluster.data_dir.clone();
    apply(args, &mut wanted)?;
    let same = wanted.cluster == *cluster
        && matches!(
            (&wanted.startup, &remembered.startup),
            (Startup::Init, Startup::Init) | (Startup::Join { .. }, Startup::Join { .. })
        );
    if same { Ok(()) } else { Err(exists) }
}

/// A later start: who the node is stays as it is remembered, how it runs is read from its file again.
fn again(
    args: &Args,
    named: Option<PathBuf>,
    default_file: &Path,
    remembered: NodeConfig,
) -> Result<Plan, NodeError> {
    let mut warnings = Vec::new();
    let mut config = match (named, &remembered.config_file) {
        (Some(file), _) => reread(args, &file, &remembered, &mut warnings)?,
        (None, Some(file)) if file.exists() => reread(args, file, &remembered, &mut warnings)?,
        (None, Some(file)) => {
            warnings.push(format!("{} is gone; the node runs with what it remembers of it", file.display()));
            remembered.clone()
        }
        (None, None) if default_file.exists() => adopt(args, default_file, &remembered, &mut warnings)?,
        (None, None) => remembered.clone(),
    };
    let cluster = &remembered.cluster;
    config.cluster = cluster.clone();
    config.startup = match args.join_address {
        // A join that was not answered may be repeated at another member.
        Some(address) => Startup::Join { address },
        None => remembered.startup,
    };
    config.numeric_id = remembered.numeric_id;
    config.instance = remembered.instance;
    config.established = remembered.established;
    let mut wanted = config.clone();
    apply(args, &mut wanted)?;
    config.force_format = std::mem::take(&mut wanted.force_format);
    match differences(&wanted.cluster, cluster).into_iter().next() {
        None => Ok(Plan { config, fresh: false, warnings }),
        Some(difference) => Err(NodeError::Field { source: difference.contradiction() }),
    }
}

/// Reads the node's file again. It may say otherwise of the node only where options win over it, or won when the file was named.
fn reread(
    args: &Args,
    file: &Path,
    remembered: &NodeConfig,
    warnings: &mut Vec<String>,
) -> Result<NodeConfig, NodeError> {
    let mut config = NodeConfig::read_file_over(file, remembered.cluster.clone())?;
    let is_remembered = remembered.config_file.as_deref() == Some(file);
    for difference in differences(&config.cluster, &remembered.cluster) {
        let Difference { field, said, is } = &difference;
        let was_overridden = is_remembered && remembered.overridden.iter().any(|other| other == field);
        if was_overridden || sets(args, field) {
            config.overridden.push((*field).into());
        } else if IDENTITY.contains(field) {
            return Err(ConfigError::Field { file: file.into(), source: difference.contradiction() }.into());
        } else {
            warnings.push(format!("{field} is {said:?} in the file; the node is, and stays, {is:?}"));
        }
    }
    Ok(config)
}

/// Reads the default file for a node that was started without one, unless that was written for another node.
fn adopt(
    args: &Args,
    default_file: &Path,
    remembered: &NodeConfig,
    warnings: &mut Vec<String>,
) -> Result<NodeConfig, NodeError> {
    let read = NodeConfig::read_file_over(default_file, remembered.cluster.clone())?;
    let differences = differences(&read.cluster, &remembered.cluster);
    let Some(other) = differences.iter().find(|difference| IDENTITY.contains(&difference.field)) else {
        return reread(args, default_file, remembered, warnings);
    };
    warnings.push(format!(
        "{} is not read: its {} {:?} is another node's",
        default_file.display(),
        other.field,
        other.said
    ));
    Ok(remembered.clone())
}

/// Which node a file is for.
const IDENTITY: [&str; 3] = ["cluster.cluster_id", "cluster.node_id", "cluster.data_dir"];

/// A field of the node that a file or an option says is otherwise.
struct Difference {
    field: &'static str,
    said: String,
    is: String,
}

impl Difference {
    fn contradiction(&self) -> FieldError {
        let Self { field, said, is } = self;
        let problem = format!("{said:?} contradicts the data directory, whose node has {is:?}");
        FieldError { field: (*field).into(), problem }
    }
}

fn differences(said: &Cluster, is: &Cluster) -> Vec<Difference> {
    // The same directory has many names.
    let resolved = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.into()).display().to_string();
    let fields = [
        ("cluster.cluster_id", said.cluster_id.clone(), is.cluster_id.clone()),
        ("cluster.node_id", said.node_id.clone(), is.node_id.clone()),
        ("cluster.data_dir", resolved(&said.data_dir), resolved(&is.data_dir)),
        ("cluster.bind_ip", said.bind_ip.to_string(), is.bind_ip.to_string()),
        ("cluster.bind_port", said.bind_port.to_string(), is.bind_port.to_string()),
        ("cluster.failure_domain", said.failure_domain.clone(), is.failure_domain.clone()),
    ];
    let differing = fields.into_iter().filter(|(_, said, is)| said != is);
    differing.map(|(field, said, is)| Difference { field, said, is }).collect()
}

/// Does the command line set `field`, which wins over a file?
fn sets(args: &Args, field: &str) -> bool {
    match field {
        "cluster.cluster_id" => args.cluster_id.is_some(),
        "cluster.node_id" => args.node_id.is_some(),
        // Alone it tells where the node is, and nothing of a file.
        "cluster.data_dir" => args.data_dir.is_some() && args.config.is_some(),
        "cluster.bind_ip" => args.bind_ip.is_some(),
        "cluster.bind_port" => args.bind_port.is_some(),
        "cluster.failure_domain" => args.failure_domain.is_some(),
        _ => false,
    }
}

/// Checks what `plan` needs of this host, takes the data directory, joins if that is wanted, and saves the node.
pub async fn carry_out(plan: Plan) -> Result<Prepared, NodeError> {
    carry_out_with(plan, Options::default()).await
}

async fn carry_out_with(plan: Plan, options: Options) -> Result<Prepared, NodeError> {
    let Plan { mut config, fresh, .. } = plan;
    // Later one may be dead, and the others serve.
    if fresh {
        devices_exist(&config)?;
    }
    // First of all: of two processes in one directory the second is to hear that, and not of the first one's ports.
    let data_dir = DataDir::take(&config)?;
    let patience = if fresh { Duration::ZERO } else { ports::RESTART_WAIT };
    if let Err(error) = ports::check(&config, patience).await {
        if fresh {
            data_dir.give_back();
        }
        return Err(error);
    }
    if config.numeric_id == NodeId(0) {
        match identify(&mut config, fresh, options).await {
            Ok(()) => {}
            Err(error) => {
                // While the cluster may have taken the node in, the next try must come as the same instance.
                if fresh && !error.may_have_joined() && config.remove().is_ok() {
                    data_dir.give_back();
                }
                return Err(error);
            }
        }
    }
    config.save()?;
    Ok(Prepared { config, data_dir })
}

/// Gets the node its number: the founder's, or one from the cluster. Its instance is durable before it asks.
async fn identify(config: &mut NodeConfig, fresh: bool, options: Options) -> Result<(), NodeError> {
    if fresh {
        config.instance = draw_instance().map_err(NodeError::System)?;
        config.save()?;
    }
    config.numeric_id = match config.startup {
        Startup::Init => FOUNDER,
        Startup::Join { address } => {
            let client = ControlClient::new(vec![Address::from(address)], options);
            join(&client, config, address).await?
        }
    };
    Ok(())
}

fn draw_instance() -> io::Result<u64> {
    let mut bytes = [0; 8];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

async fn join(
    client: &ControlClient,
    config: &NodeConfig,
    address: std::net::SocketAddr,
) -> Result<NodeId, NodeError> {
    let cluster = &config.cluster;
    let request = JoinRequest {
        cluster_id: cluster.cluster_id.clone(),
        name: cluster.node_id.clone(),
        address: cluster.bind_ip.to_string(),
        control_port: u32::from(cluster.bind_port),
        failure_domain: cluster.failure_domain.clone(),
        version_min: u32::from(VERSION_MIN),
        version_max: u32::from(VERSION),
        instance: config.instance,
    };
    let source = match client.join(request).await {
        Ok(NodeId(0)) => ClientError::NotXsan { address: address.into(), reason: "it gave node id 0".into() },
        Ok(id) => return Ok(id),
        Err(source) => source,
    };
    if source.code() == Code::Unreachable && !source.is_uncertain() {
        return Err(NodeError::JoinDead { source });
    }
    Err(NodeError::Join { node: cluster.node_id.clone(), cluster: cluster.cluster_id.clone(), source })
}

fn devices_exist(config: &NodeConfig) -> Result<(), NodeError> {
    for device in &config.storage.devices {
        let fails = |source| NodeError::Device { path: device.path.clone(), source };
        let kind = fs::metadata(&device.path).map_err(fails)?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(fails(io::Error::other("is neither a block device nor a file")));
        }
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf, NodeError> {
    std::path::absolute(path).map_err(NodeError::System)
}

/// Where `plan` looks for a file if none is named.
pub fn default_file() -> &'static Path {
    Path::new(DEFAULT_FILE)
}

#[cfg(test)]
mod tests;
