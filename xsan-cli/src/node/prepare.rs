//! From the command line and the file to a node that may start: everything is checked before anything is changed.
//!
//! Invariants
//! - When a check fails, the data directory is as it was before, and the cluster has not heard of the node.
//! - The node's instance is in its data directory before it asks to join, and stays there unless the cluster surely
//!   refused: whatever is lost on the way, the next try is known for the same node.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use xsan_client::{Address, ClientError, ControlClient, Options};
use xsan_nodekit::config::{DEFAULT_FILE, NodeConfig, Startup};
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
    let named = match &args.config {
        Some(file) => Some(file.as_path()),
        None => Some(default_file).filter(|file| file.exists()),
    };
    let from_file =
        named.map(|file| NodeConfig::read_file(&absolute(file)?).map_err(NodeError::from)).transpose()?;
    let data_dir = match (&args.data_dir, &from_file) {
        (Some(data_dir), _) => absolute(data_dir)?,
        (None, Some(config)) => config.cluster.data_dir.clone(),
        (None, None) => NodeConfig::default().cluster.data_dir,
    };
    let exists = NodeConfig::exists(&data_dir)
        .map_err(|source| NodeError::DataDir { data_dir: data_dir.clone(), source })?;
    let founds_or_joins = args.init_cluster || args.join_cluster;
    let plan = if founds_or_joins && !exists {
        let mut config = from_file.unwrap_or_default();
        config.cluster.data_dir = data_dir;
        apply(args, &mut config)?;
        Plan { config, fresh: true, warnings: Vec::new() }
    } else {
        let remembered = NodeConfig::load(&data_dir)?;
        if founds_or_joins {
            must_be_unfinished(args, from_file.as_ref(), &remembered)?;
        }
        // The default file does not displace the one that the node was started with.
        let named = from_file.filter(|_| args.config.is_some() || remembered.config_file.is_none());
        again(args, named, remembered)?
    };
    plan.config.validate().map_err(|source| NodeError::Field { source })?;
    Ok(plan)
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
fn must_be_unfinished(
    args: &Args,
    from_file: Option<&NodeConfig>,
    remembered: &NodeConfig,
) -> Result<(), NodeError> {
    let mut wanted = from_file.cloned().unwrap_or_default();
    wanted.cluster.data_dir = remembered.cluster.data_dir.clone();
    apply(args, &mut wanted)?;
    let same = wanted.cluster == remembered.cluster
        && matches!(
            (&wanted.startup, &remembered.startup),
            (Startup::Init, Startup::Init) | (Startup::Join { .. }, Startup::Join { .. })
        );
    if same && !remembered.established {
        return Ok(());
    }
    let cluster = &remembered.cluster;
    Err(NodeError::Exists {
        data_dir: cluster.data_dir.clone(),
        node: cluster.node_id.clone(),
        cluster: cluster.cluster_id.clone(),
    })
}

/// A later start: who the node is stays as it is remembered, how it runs is read from its file again.
fn again(args: &Args, named: Option<NodeConfig>, remembered: NodeConfig) -> Result<Plan, NodeError> {
    let mut warnings = Vec::new();
    let mut config = match (named, &remembered.config_file) {
        (Some(config), _) => config,
        (None, Some(file)) if file.exists() => NodeConfig::read_file(file)?,
        (None, Some(file)) => {
            warnings.push(format!("{} is gone; the node runs with what it remembers of it", file.display()));
            remembered.clone()
        }
        (None, None) => remembered.clone(),
    };
    let cluster = &remembered.cluster;
    for (field, in_file, kept) in [
        ("cluster.cluster_id", &config.cluster.cluster_id, &cluster.cluster_id),
        ("cluster.node_id", &config.cluster.node_id, &cluster.node_id),
        ("cluster.failure_domain", &config.cluster.failure_domain, &cluster.failure_domain),
    ] {
        if !in_file.is_empty() && in_file != kept {
            warnings.push(format!("{field} is {in_file:?} in the file; the node is, and stays, {kept:?}"));
        }
    }
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
    if wanted.cluster != config.cluster {
        return Err(contradiction(&wanted, &config));
    }
    Ok(Plan { config, fresh: false, warnings })
}

/// An option says that the node is another than its data directory does.
fn contradiction(wanted: &NodeConfig, config: &NodeConfig) -> NodeError {
    let (wanted, is) = (&wanted.cluster, &config.cluster);
    let (field, wanted, is) = if wanted.cluster_id != is.cluster_id {
        ("cluster.cluster_id", wanted.cluster_id.clone(), is.cluster_id.clone())
    } else if wanted.node_id != is.node_id {
        ("cluster.node_id", wanted.node_id.clone(), is.node_id.clone())
    } else if wanted.bind_ip != is.bind_ip {
        ("cluster.bind_ip", wanted.bind_ip.to_string(), is.bind_ip.to_string())
    } else if wanted.bind_port != is.bind_port {
        ("cluster.bind_port", wanted.bind_port.to_string(), is.bind_port.to_string())
    } else {
        ("cluster.failure_domain", wanted.failure_domain.clone(), is.failure_domain.clone())
    };
    let problem = format!("{wanted:?} contradicts the data directory, whose node has {is:?}");
    NodeError::Field { source: xsan_nodekit::config::FieldError { field: field.into(), problem } }
}

/// Checks what `plan` needs of this host, takes the data directory, joins if that is wanted, and saves the node.
pub async fn carry_out(plan: Plan) -> Result<Prepared, NodeError> {
    carry_out_with(plan, Options::default()).await
}

async fn carry_out_with(plan: Plan, options: Options) -> Result<Prepared, NodeError> {
    let Plan { mut config, fresh, .. } = plan;
    devices_exist(&config)?;
    // First of all: of two processes in one directory the second is to hear that, and not of the first one's ports.
    let data_dir = DataDir::take(&config)?;
    // The ports of a node that is starting again may be held for a moment by the process before it.
    let patience = if fresh { ports::Patience::None } else { ports::Patience::Predecessor };
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
