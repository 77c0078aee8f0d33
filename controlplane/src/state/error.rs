//! Why the cluster state refuses a command: typed, with the object that it is about.
//!
//! A `StateError` becomes a `Refusal` (number, object, sentence) once, where a reply is made; that crosses the
//! wire and reaches the user.

use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, NodeId, VolumeId};
use xsan_protocol::limits::{NAME_BYTES_MAX, NODES_MAX, REPLICAS_MAX, VOLUME_BYTES_MAX, VOLUMES_MAX};
use xsan_protocol::placement::PlacementError;
use xsan_protocol::proto;
use xsan_protocol::units::SECTOR_SIZE;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error(
        "{what} name {name:?} must be 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-', the first a letter or digit"
    )]
    NameInvalid { what: &'static str, name: String },
    #[error("cluster {found} was asked for, this is cluster {expected}")]
    ClusterIdMismatch { found: String, expected: String },
    #[error("the cluster is being founded; try again in a moment")]
    NotFounded,
    #[error("node id {name} belongs to another node of the cluster already; choose another")]
    NodeIdTaken { name: String },
    #[error("the cluster has {NODES_MAX} nodes already")]
    ClusterFull,
    #[error("node {node} is not in the cluster")]
    NodeNotFound { node: NodeId },
    #[error("volume {name} exists already; choose another name")]
    VolumeExists { name: String },
    #[error("volume {name} does not exist; xsan-cli volume list shows the volumes")]
    VolumeNotFound { name: String },
    #[error("volume {id} does not exist")]
    VolumeIdNotFound { id: VolumeId },
    #[error("volume {name} is attached to {}; detach it first", nodes.join(", "))]
    VolumeAttached { name: String, nodes: Vec<String> },
    #[error(
        "volume {name}: {size_bytes} bytes is not between {SECTOR_SIZE} and {VOLUME_BYTES_MAX}, in steps of {SECTOR_SIZE}"
    )]
    SizeInvalid { name: String, size_bytes: u64 },
    #[error("volume {name} has {old_bytes} bytes, {new_bytes} would lose data; confirm with --allow-shrink")]
    ShrinkLosesData { name: String, old_bytes: u64, new_bytes: u64 },
    #[error("{replica_count} replicas were asked for, 1 to {REPLICAS_MAX} are possible")]
    ReplicaCountInvalid { replica_count: u8 },
    #[error("{error}; add nodes, or lower the replica count")]
    Placement { error: PlacementError },
    #[error("the cluster has no id left for another {what}")]
    IdsUsedUp { what: &'static str },
    #[error(
        "without node {name} {groups} groups have too few live replicas and stop; --force does it nevertheless"
    )]
    MaintenanceStopsIo { name: String, groups: usize },
    #[error("node {name} can not go: {error}")]
    NodeNeeded { name: String, error: PlacementError },
    #[error("node {name} is the last one that stays")]
    LastNode { name: String },
    #[error("node {name} was not asked to leave")]
    NodeStays { name: String },
    #[error("node {name} can not leave yet: {reason}")]
    NodeBusy { name: String, reason: &'static str },
    #[error("node {name} is registered with another life of its data process")]
    LifeNotRegistered { name: String },
    #[error("the cluster has {VOLUMES_MAX} volumes, and can have no more")]
    TooManyVolumes,
    #[error("{field}: {value} {unit} is not between {min} and {max}")]
    SettingInvalid { field: &'static str, value: u64, unit: &'static str, min: u64, max: u64 },
    #[error("group {group}: {problem}")]
    GroupInvalid { group: GroupId, problem: &'static str },
}

impl StateError {
    pub const fn code(&self) -> Code {
        match self {
            Self::NameInvalid { .. }
            | Self::SizeInvalid { .. }
            | Self::ReplicaCountInvalid { .. }
            | Self::NodeStays { .. }
            | Self::SettingInvalid { .. } => Code::InvalidArgument,
            Self::MaintenanceStopsIo { .. } => Code::MaintenanceStopsIo,
            Self::NodeNeeded { .. } => Code::NodeNeeded,
            Self::LastNode { .. } => Code::LastNode,
            Self::NodeBusy { .. } => Code::NodeBusy,
            Self::ClusterIdMismatch { .. } => Code::ClusterIdMismatch,
            // Try again: its founder, the only voter, has not taken its own place yet.
            Self::NotFounded => Code::NoQuorum,
            Self::NodeIdTaken { .. } => Code::NodeIdTaken,
            Self::ClusterFull | Self::TooManyVolumes | Self::IdsUsedUp { .. } => Code::ClusterFull,
            Self::LifeNotRegistered { .. } => Code::LifeNotRegistered,
            Self::NodeNotFound { .. } => Code::NodeNotFound,
            Self::VolumeExists { .. } => Code::VolumeExists,
            Self::VolumeNotFound { .. } | Self::VolumeIdNotFound { .. } => Code::VolumeNotFound,
            Self::VolumeAttached { .. } => Code::VolumeAttached,
            Self::ShrinkLosesData { .. } => Code::ShrinkLosesData,
            Self::Placement { error } => error.code(),
            Self::GroupInvalid { .. } => Code::Internal,
        }
    }

    /// What the error is about, as `volume vm-1`.
    pub fn object(&self) -> String {
        match self {
            Self::NameInvalid { what, name } => format!("{what} {name}"),
            Self::ClusterIdMismatch { found, .. } => format!("cluster {found}"),
            Self::NodeIdTaken { name }
            | Self::MaintenanceStopsIo { name, .. }
            | Self::NodeNeeded { name, .. }
            | Self::LastNode { name }
            | Self::NodeStays { name }
            | Self::LifeNotRegistered { name }
            | Self::NodeBusy { name, .. } => format!("node {name}"),
            Self::NodeNotFound { node } => format!("node {node}"),
            Self::VolumeExists { name }
            | Self::VolumeNotFound { name }
            | Self::VolumeAttached { name, .. }
            | Self::SizeInvalid { name, .. }
            | Self::ShrinkLosesData { name, .. } => format!("volume {name}"),
            Self::VolumeIdNotFound { id } => format!("volume {id}"),
            Self::GroupInvalid { group, .. } => format!("group {group}"),
            Self::ClusterFull
            | Self::TooManyVolumes
            | Self::NotFounded
            | Self::ReplicaCountInvalid { .. }
            | Self::SettingInvalid { .. }
            | Self::Placement { .. }
            | Self::IdsUsedUp { .. } => "cluster".to_owned(),
        }
    }
}

/// A refused command, as it crosses the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub code: Code,
    pub object: String,
    pub message: String,
}

impl From<StateError> for Refusal {
    fn from(error: StateError) -> Self {
        Self { code: error.code(), object: error.object(), message: error.to_string() }
    }
}

impl From<&Refusal> for proto::ErrorDetail {
    fn from(refusal: &Refusal) -> Self {
        Self {
            code: u32::from(refusal.code.number()),
            object: refusal.object.clone(),
            message: refusal.message.clone(),
        }
    }
}

impl From<proto::ErrorDetail> for Refusal {
    fn from(detail: proto::ErrorDetail) -> Self {
        let known = u16::try_from(detail.code).ok().and_then(Code::from_number);
        Self { code: known.unwrap_or(Code::Internal), object: detail.object, message: detail.message }
    }
}
