//! The command line of xsan-node.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;

const EXAMPLES: &str = "\
Examples:
  Found a cluster:
    xsan-node --init-cluster --cluster-id xsan-cluster-001 --node-id node-001 \\
              --bind-ip 192.168.1.10 --data-dir /var/lib/xsan
  Join it from another host:
    xsan-node --join-cluster --cluster-id xsan-cluster-001 --node-id node-002 \\
              --bind-ip 192.168.1.11 --join-address 192.168.1.10:8080 --data-dir /var/lib/xsan
  Start the node again, as it was:
    xsan-node --data-dir /var/lib/xsan

Exit codes:
  0   stopped cleanly, by SIGTERM, SIGINT or SIGHUP
  1   an error; its number and what to do are on stderr
  2   wrong usage
  3   nothing answers at the join address
  78  starting again can not help before someone has changed the configuration or a device";

/// Starts and supervises a node of an XSAN cluster.
///
/// Runs xsan-control and xsan-data, starts them again when they end, and stops them cleanly on SIGTERM, SIGINT or SIGHUP. Prints
/// one line when the node serves. Options win over the configuration file; once the node has started, everything is
/// remembered in its data directory.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "xsan-node", version, after_help = EXAMPLES)]
pub struct Args {
    /// Found a new cluster with this node
    #[arg(long, conflicts_with = "join_cluster")]
    pub init_cluster: bool,
    /// Join the cluster of --join-address
    #[arg(long, requires = "join_address")]
    pub join_cluster: bool,
    /// Name of the cluster [file: cluster.cluster_id]
    #[arg(long, value_name = "NAME")]
    pub cluster_id: Option<String>,
    /// Name of this node, unique in the cluster [file: cluster.node_id]
    #[arg(long, value_name = "NAME")]
    pub node_id: Option<String>,
    /// Address of this host that everything listens on [file: cluster.bind_ip] [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    pub bind_ip: Option<IpAddr>,
    /// Port of the API, Raft and heartbeats [file: cluster.bind_port] [default: 8080]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub bind_port: Option<u16>,
    /// Any node of the cluster to join
    #[arg(long, value_name = "IP:PORT", requires = "join_cluster")]
    pub join_address: Option<SocketAddr>,
    /// Rack, row or room: replicas are spread over them [file: cluster.failure_domain]
    #[arg(long, value_name = "NAME")]
    pub failure_domain: Option<String>,
    /// Where the node keeps its state [file: cluster.data_dir] [default: /var/lib/xsan]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Configuration file, in JSON [default: the one that the node was started with; before that /etc/xsan/node.conf if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Format this device at this start, whatever it holds, a store of this cluster too: that is LOST. Only empty devices are
    /// formatted unasked. A store with a cache device needs both named, or empty (may be repeated)
    #[arg(long, value_name = "PATH")]
    pub force_format: Vec<PathBuf>,
}
