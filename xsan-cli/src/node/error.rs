//! Why a node does not start, or stops by itself; each with its number.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use xsan_client::ClientError;
use xsan_nodekit::config::{ConfigError, FieldError};
use xsan_nodekit::exit;
use xsan_protocol::error::{Code, Retry};

#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// In what the command line adds to the file, or where both fit together.
    #[error("{source}{}", flag_of(&source.field))]
    Field { source: FieldError },
    #[error("data directory {}: holds node {node} of cluster {cluster} already", data_dir.display())]
    Exists { data_dir: PathBuf, node: String, cluster: String },
    #[error("data directory {}: {source}", data_dir.display())]
    DataDir { data_dir: PathBuf, source: io::Error },
    #[error("data directory {}: another xsan-node uses it{}", data_dir.display(), process(*pid))]
    DataDirLocked { data_dir: PathBuf, pid: Option<u32> },
    #[error("data directory {}: {free} free, and the node needs {needed}", data_dir.display())]
    DataDirFull { data_dir: PathBuf, free: xsan_nodekit::size::Amount, needed: xsan_nodekit::size::Amount },
    #[error("{what} {address} is in use")]
    AddressInUse { what: &'static str, address: SocketAddr },
    /// At a later start, when its interface may come up after the node does.
    #[error("cluster.bind_ip: \"{ip}\" is not an address of this host; bring up the interface that has it")]
    AddressMissing { ip: IpAddr },
    #[error("device {}: {source}", path.display())]
    Device { path: PathBuf, source: io::Error },
    #[error("join address {source}")]
    JoinDead { source: ClientError },
    #[error("node {node} can not join cluster {cluster}: {source}")]
    Join { node: String, cluster: String, source: ClientError },
    #[error("program {name}: neither beside xsan-node nor in PATH")]
    ProgramMissing { name: &'static str },
    /// A process of the node ended with the exit code that says so.
    #[error("{program} can not run: {message}")]
    ChildRefused { program: &'static str, message: String },
    #[error(transparent)]
    Logging(#[from] xsan_nodekit::logging::LoggingError),
    #[error("the operating system refused: {0}")]
    System(io::Error),
}

impl NodeError {
    pub fn code(&self) -> Code {
        match self {
            Self::Config(error) => error.code(),
            Self::Field { .. } | Self::ChildRefused { .. } => Code::ConfigInvalid,
            Self::Exists { .. } => Code::ClusterExists,
            Self::DataDir { .. } | Self::DataDirLocked { .. } | Self::DataDirFull { .. } => {
                Code::DataDirUnusable
            }
            Self::AddressInUse { .. } => Code::AddressInUse,
            Self::AddressMissing { .. } => Code::InvalidArgument,
            Self::Device { .. } => Code::DeviceUnusable,
            Self::JoinDead { .. } => Code::JoinAddressDead,
            Self::Join { source, .. } => source.code(),
            Self::ProgramMissing { .. } => Code::NotFound,
            Self::Logging(error) => error.code(),
            Self::System(_) => Code::Internal,
        }
    }

    /// The number to log: a refused child's own, if its last words had one.
    pub fn number(&self) -> Option<u16> {
        match self {
            Self::ChildRefused { message, .. } => {
                message.strip_prefix("error ")?.split(' ').next()?.parse().ok()
            }
            error => Some(error.code().number()),
        }
    }

    /// Did a join fail of which it is not known that the cluster did not carry it out? It did not when it was not asked, or when
    /// it said no for good before there was any doubt.
    pub fn may_have_joined(&self) -> bool {
        let Self::Join { source, .. } = self else { return false };
        let for_now = matches!(source, ClientError::Refused(_)) && source.code().retry() != Retry::Never;
        for_now || source.is_uncertain()
    }

    pub fn exit_code(&self) -> u8 {
        match self.code() {
            Code::JoinAddressDead => exit::UNREACHABLE,
            code => exit::of_daemon(code),
        }
    }
}

fn process(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// The option that sets a field, for those who use no file.
fn flag_of(field: &str) -> &'static str {
    match field {
        "cluster.cluster_id" => " (option --cluster-id)",
        "cluster.node_id" => " (option --node-id)",
        "cluster.data_dir" => " (option --data-dir)",
        "cluster.bind_ip" => " (option --bind-ip)",
        "cluster.bind_port" => " (option --bind-port)",
        "cluster.failure_domain" => " (option --failure-domain)",
        "startup.address" => " (option --join-address)",
        field if field.starts_with("force_format") => " (option --force-format)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_child_is_logged_with_its_own_number_if_it_told_one() {
        let refused =
            |message: &str| NodeError::ChildRefused { program: "xsan-data", message: message.into() };
        assert_eq!(refused("error 201 DeviceInUse: /dev/sda: ext4").number(), Some(201));
        assert_eq!(refused("it gave no reason; see its log").number(), None);
        assert_eq!(NodeError::ProgramMissing { name: "xsan-data" }.number(), Some(3));
    }
}
