//! Commands of the cluster state machine and their replies, with their one encoding.
//!
//! Made by `api`, `membership`, `link` and `controller`; carried by `raft`; applied by `state`.
//!
//! Invariants
//! - `decode(encode(x)) == x`: what a leader proposed is what every node applies, now and after a restart.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use prost::Message;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, Incarnation, NodeId, StoreId, VolumeId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{DamagedStore, DataProcess, Durability, MapError, Member, Volume};
use xsan_protocol::proto;
use xsan_protocol::proto::command as body;

use super::Departure;
use super::error::Refusal;
use super::scrub::ScrubEnd;

#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    AddNode(NewNode),
    /// A data process came up; replaces the node's earlier life, if that is still the one that is registered.
    DataStarted {
        node: NodeId,
        process: DataProcess,
        damaged_stores: Vec<DamagedStore>,
        replaces: Option<Incarnation>,
    },
    StoreFailed {
        node: NodeId,
        incarnation: Incarnation,
        store: StoreId,
    },
    ReconfigureGroups(Vec<GroupChange>),
    CreateVolume(NewVolume),
    ResizeVolume {
        name: String,
        size_bytes: u64,
        allow_shrink: bool,
    },
    /// By number: by the time a request is tried again, the name may be another volume's.
    DeleteVolume {
        volume: VolumeId,
    },
    /// A data process opens a volume; refused unless this life of it is registered.
    Attach {
        volume: String,
        node: NodeId,
        incarnation: Incarnation,
    },
    /// It has it open no more. Of a life that is not registered nothing is attached.
    Detach {
        volume: VolumeId,
        node: NodeId,
        incarnation: Incarnation,
    },
    SetMaintenance {
        node: NodeId,
        on: bool,
        /// Also when groups stop without the node.
        force: bool,
    },
    /// A node is to leave, or stays after all.
    LeaveNode {
        node: NodeId,
        departure: Departure,
    },
    /// A node that has left everything leaves the map.
    RemoveNode {
        node: NodeId,
    },
    ChangeSettings(SettingsChange),
    /// Groups are to be scrubbed; without a wish, no more than the intervals say.
    WishScrubs {
        groups: Vec<GroupId>,
        wish: Option<proto::ScrubWish>,
    },
    /// Scrubs of one node have ended.
    EndScrubs {
        unix_ms: u64,
        ends: Vec<ScrubEnd>,
    },
}

/// Settings that change; the others stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SettingsChange {
    pub down_out_interval: Option<Duration>,
    pub scrub_bytes_per_second: Option<u64>,
    /// Zero: off.
    pub scrub_interval: Option<Duration>,
    pub deep_scrub_interval: Option<Duration>,
    pub demote_slow_nodes: Option<bool>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NewNode {
    pub cluster_id: String,
    pub name: String,
    pub address: IpAddr,
    pub control_port: u16,
    pub failure_domain: String,
    /// Drawn once by the node's data directory: tells a repeated request from another node of that name.
    pub instance: u64,
    /// The node founds the cluster; until it has, no other is taken in.
    pub founder: bool,
}

/// The next configuration of one group; refused unless the group is at epoch `expected`.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupChange {
    pub group: GroupId,
    pub expected: Epoch,
    pub primary: Option<NodeId>,
    pub members: Vec<Member>,
    /// The present epoch is settled: former members are forgotten, nothing else changes.
    pub settle: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct NewVolume {
    pub name: String,
    pub size_bytes: u64,
    pub replica_count: u8,
    pub policy: String,
    pub durability: Durability,
    pub created_unix_ms: u64,
    /// Drawn by whoever asks: the same request twice makes one volume.
    pub request: u64,
    /// Groups of its pool, a power of two, if the volume is the first there.
    pub group_count: u16,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Done,
    Node(NodeId),
    Volume(Box<Volume>),
    Groups { changed: u32, refused: u32 },
    Refused(Refusal),
}

/// Bytes that are not a command, or a reply, of this release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("the message does not decode")]
    Encoding,
    #[error("{0}")]
    Map(#[from] MapError),
    #[error("{field} is missing or out of range")]
    Field { field: &'static str },
}

impl CommandError {
    pub const fn code(self) -> Code {
        Code::FrameInvalid
    }
}

fn narrow<T: TryFrom<u32>>(value: u32, field: &'static str) -> Result<T, CommandError> {
    T::try_from(value).map_err(|_| CommandError::Field { field })
}

fn durability(value: i32) -> Result<Durability, CommandError> {
    match proto::Durability::try_from(value) {
        Ok(proto::Durability::OnFlush) => Ok(Durability::OnFlush),
        Ok(proto::Durability::EveryWrite) => Ok(Durability::EveryWrite),
        Err(_) => Err(CommandError::Field { field: "durability" }),
    }
}

impl Command {
    pub fn encode(&self) -> Vec<u8> {
        proto::Command::from(self).encode_to_vec()
    }

    /// # Errors
    /// 308 `FrameInvalid`: not a command, or of a newer release.
    pub fn decode(bytes: &[u8]) -> Result<Self, CommandError> {
        proto::Command::decode(bytes).map_err(|_| CommandError::Encoding)?.try_into()
    }
}

impl From<&Command> for proto::Command {
    fn from(command: &Command) -> Self {
        use proto::command::Body;
        let body = match command {
            Command::AddNode(new) => Body::AddNode(body::AddNode {
                cluster_id: new.cluster_id.clone(),
                name: new.name.clone(),
                address: new.address.to_string(),
                control_port: u32::from(new.control_port),
                failure_domain: new.failure_domain.clone(),
                instance: new.instance,
                founder: new.founder,
            }),
            Command::DataStarted { node, process, damaged_stores, replaces } => {
                Body::DataStarted(body::DataStarted {
                    node: node.0,
                    process: Some(process.into()),
                    damaged_stores: damaged_stores.iter().map(proto::DamagedStore::from).collect(),
                    replaces: replaces.map_or(0, |incarnation| incarnation.0),
                })
            }
            Command::StoreFailed { node, incarnation, store } => Body::StoreFailed(body::StoreFailed {
                node: node.0,
                incarnation: incarnation.0,
                store: store.0,
            }),
            Command::ReconfigureGroups(changes) => Body::ReconfigureGroups(body::ReconfigureGroups {
                changes: changes.iter().map(body::GroupChange::from).collect(),
            }),
            Command::CreateVolume(new) => Body::CreateVolume(body::CreateVolume::from(new)),
            Command::ResizeVolume { name, size_bytes, allow_shrink } => {
                Body::ResizeVolume(body::ResizeVolume {
                    name: name.clone(),
                    size_bytes: *size_bytes,
                    allow_shrink: *allow_shrink,
                })
            }
            Command::DeleteVolume { volume } => Body::DeleteVolume(body::DeleteVolume { volume: volume.0 }),
            Command::Attach { volume, node, incarnation } => Body::Attach(body::Attach {
                volume: volume.clone(),
                node: node.0,
                incarnation: incarnation.0,
            }),
            Command::Detach { volume, node, incarnation } => {
                Body::Detach(body::Detach { volume: volume.0, node: node.0, incarnation: incarnation.0 })
            }
            Command::SetMaintenance { node, on, force } => {
                Body::SetMaintenance(body::SetMaintenance { node: node.0, on: *on, force: *force })
            }
            Command::LeaveNode { node, departure } => Body::LeaveNode(body::LeaveNode {
                node: node.0,
                departure: proto::Departure::from(*departure) as i32,
            }),
            Command::RemoveNode { node } => Body::RemoveNode(body::RemoveNode { node: node.0 }),
            Command::ChangeSettings(change) => Body::ChangeSettings(body::ChangeSettings {
                down_out_interval_ms: change.down_out_interval.map_or(0, milliseconds),
                scrub_bytes_per_second: change.scrub_bytes_per_second,
                scrub_interval_ms: change.scrub_interval.map(milliseconds),
                deep_scrub_interval_ms: change.deep_scrub_interval.map(milliseconds),
                demote_slow_nodes: change.demote_slow_nodes,
            }),
            Command::WishScrubs { groups, wish } => Body::WishScrubs(body::WishScrubs {
                groups: groups.iter().map(|group| group.0).collect(),
                wish: *wish,
            }),
            Command::EndScrubs { unix_ms, ends } => Body::EndScrubs(body::EndScrubs {
                unix_ms: *unix_ms,
                scrubs: ends.iter().map(proto::ScrubReport::from).collect(),
            }),
        };
        Self { body: Some(body) }
    }
}

/// Whole milliseconds, as settings are kept.
pub fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl From<Departure> for proto::Departure {
    fn from(departure: Departure) -> Self {
        match departure {
            Departure::Stays => Self::Stays,
            Departure::Leaving => Self::Leaving,
            Departure::Lost => Self::Lost,
        }
    }
}

impl Departure {
    /// `None`: of a newer release.
    pub fn from_number(number: i32) -> Option<Self> {
        Some(match proto::Departure::try_from(number).ok()? {
            proto::Departure::Stays => Self::Stays,
            proto::Departure::Leaving => Self::Leaving,
            proto::Departure::Lost => Self::Lost,
        })
    }
}

impl From<&GroupChange> for body::GroupChange {
    fn from(change: &GroupChange) -> Self {
        Self {
            group: change.group.0,
            expected_epoch: change.expected.0,
            primary: change.primary.map_or(0, |node| node.0),
            members: change.members.iter().map(proto::Member::from).collect(),
            settle: change.settle,
        }
    }
}

impl From<&NewVolume> for body::CreateVolume {
    fn from(new: &NewVolume) -> Self {
        Self {
            name: new.name.clone(),
            size_bytes: new.size_bytes,
            replica_count: u32::from(new.replica_count),
            policy: new.policy.clone(),
            durability: match new.durability {
                Durability::OnFlush => proto::Durability::OnFlush,
                Durability::EveryWrite => proto::Durability::EveryWrite,
            } as i32,
            created_unix_ms: new.created_unix_ms,
            request: new.request,
            group_count: u32::from(new.group_count),
        }
    }
}

impl TryFrom<proto::Command> for Command {
    type Error = CommandError;

    fn try_from(command: proto::Command) -> Result<Self, CommandError> {
        use proto::command::Body;
        let missing = CommandError::Field { field: "command.body" };
        Ok(match command.body.ok_or(missing)? {
            Body::AddNode(new) => Self::AddNode(NewNode::try_from(new)?),
            Body::DataStarted(started) => {
                let process = started.process.ok_or(CommandError::Field { field: "process" })?;
                Self::DataStarted {
                    node: NodeId(started.node),
                    process: DataProcess::from_message(process, u64::from(started.node))?,
                    damaged_stores: started.damaged_stores.into_iter().map(DamagedStore::from).collect(),
                    replaces: (started.replaces != 0).then_some(Incarnation(started.replaces)),
                }
            }
            Body::StoreFailed(failed) => Self::StoreFailed {
                node: NodeId(failed.node),
                incarnation: Incarnation(failed.incarnation),
                store: StoreId(failed.store),
            },
            Body::ReconfigureGroups(batch) => {
                Self::ReconfigureGroups(batch.changes.into_iter().map(GroupChange::from).collect())
            }
            Body::CreateVolume(new) => Self::CreateVolume(NewVolume::try_from(new)?),
            Body::ResizeVolume(resize) => Self::ResizeVolume {
                name: resize.name,
                size_bytes: resize.size_bytes,
                allow_shrink: resize.allow_shrink,
            },
            Body::DeleteVolume(delete) => Self::DeleteVolume { volume: VolumeId(delete.volume) },
            Body::Attach(attach) => Self::Attach {
                volume: attach.volume,
                node: NodeId(attach.node),
                incarnation: Incarnation(attach.incarnation),
            },
            Body::Detach(detach) => Self::Detach {
                volume: VolumeId(detach.volume),
                node: NodeId(detach.node),
                incarnation: Incarnation(detach.incarnation),
            },
            Body::SetMaintenance(set) => {
                Self::SetMaintenance { node: NodeId(set.node), on: set.on, force: set.force }
            }
            Body::LeaveNode(leave) => Self::LeaveNode {
                node: NodeId(leave.node),
                departure: Departure::from_number(leave.departure)
                    .ok_or(CommandError::Field { field: "departure" })?,
            },
            Body::RemoveNode(remove) => Self::RemoveNode { node: NodeId(remove.node) },
            Body::ChangeSettings(settings) => {
                let interval = settings.down_out_interval_ms;
                Self::ChangeSettings(SettingsChange {
                    down_out_interval: (interval != 0).then(|| Duration::from_millis(interval)),
                    scrub_bytes_per_second: settings.scrub_bytes_per_second,
                    scrub_interval: settings.scrub_interval_ms.map(Duration::from_millis),
                    deep_scrub_interval: settings.deep_scrub_interval_ms.map(Duration::from_millis),
                    demote_slow_nodes: settings.demote_slow_nodes,
                })
            }
            Body::WishScrubs(wish) => {
                Self::WishScrubs { groups: wish.groups.into_iter().map(GroupId).collect(), wish: wish.wish }
            }
            Body::EndScrubs(ended) => Self::EndScrubs {
                unix_ms: ended.unix_ms,
                ends: ended.scrubs.into_iter().map(ScrubEnd::try_from).collect::<Result<_, _>>()?,
            },
        })
    }
}

impl TryFrom<body::AddNode> for NewNode {
    type Error = CommandError;

    fn try_from(new: body::AddNode) -> Result<Self, CommandError> {
        Ok(Self {
            cluster_id: new.cluster_id,
            name: new.name,
            address: new.address.parse().map_err(|_| CommandError::Field { field: "address" })?,
            control_port: narrow(new.control_port, "control_port")?,
            failure_domain: new.failure_domain,
            instance: new.instance,
            founder: new.founder,
        })
    }
}

impl From<body::GroupChange> for GroupChange {
    fn from(change: body::GroupChange) -> Self {
        Self {
            group: GroupId(change.group),
            expected: Epoch(change.expected_epoch),
            primary: (change.primary != 0).then_some(NodeId(change.primary)),
            members: change.members.into_iter().map(Member::from).collect(),
            settle: change.settle,
        }
    }
}

impl TryFrom<body::CreateVolume> for NewVolume {
    type Error = CommandError;

    fn try_from(new: body::CreateVolume) -> Result<Self, CommandError> {
        let group_count = match new.group_count {
            0 => GROUPS_PER_POOL,
            count => narrow(count, "group_count")?,
        };
        if !group_count.is_power_of_two() {
            return Err(CommandError::Field { field: "group_count" });
        }
        Ok(Self {
            name: new.name,
            size_bytes: new.size_bytes,
            replica_count: narrow(new.replica_count, "replica_count")?,
            policy: new.policy,
            durability: durability(new.durability)?,
            created_unix_ms: new.created_unix_ms,
            request: new.request,
            group_count,
        })
    }
}

impl Reply {
    pub fn encode(&self) -> Vec<u8> {
        use proto::command_reply::{Body, GroupsReconfigured};
        let body = match self {
            Self::Done => None,
            Self::Node(node) => Some(Body::Node(node.0)),
            Self::Volume(volume) => Some(Body::Volume(proto::Volume::from(&**volume))),
            Self::Groups { changed, refused } => {
                Some(Body::Groups(GroupsReconfigured { changed: *changed, refused: *refused }))
            }
            Self::Refused(refusal) => Some(Body::Refused(refusal.into())),
        };
        proto::CommandReply { body }.encode_to_vec()
    }

    /// # Errors
    /// 308 `FrameInvalid`: not a reply, or of a newer release.
    pub fn decode(bytes: &[u8]) -> Result<Self, CommandError> {
        use proto::command_reply::Body;
        let reply = proto::CommandReply::decode(bytes).map_err(|_| CommandError::Encoding)?;
        Ok(match reply.body {
            None => Self::Done,
            Some(Body::Node(node)) => Self::Node(NodeId(node)),
            Some(Body::Volume(volume)) => Self::Volume(Box::new(Volume::try_from(volume)?)),
            Some(Body::Groups(groups)) => Self::Groups { changed: groups.changed, refused: groups.refused },
            Some(Body::Refused(detail)) => Self::Refused(detail.into()),
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddNode(new) => write!(f, "add node {}", new.name),
            Self::DataStarted { node, process, .. } => {
                write!(f, "data process {} of node {node} started", process.incarnation)
            }
            Self::StoreFailed { node, store, .. } => write!(f, "store {store} of node {node} failed"),
            Self::ReconfigureGroups(changes) => write!(f, "reconfigure {} groups", changes.len()),
            Self::CreateVolume(new) => write!(f, "create volume {}", new.name),
            Self::ResizeVolume { name, size_bytes, .. } => write!(f, "resize volume {name} to {size_bytes}"),
            Self::DeleteVolume { volume } => write!(f, "delete volume {volume}"),
            Self::Attach { volume, node, .. } => write!(f, "attach volume {volume} to node {node}"),
            Self::Detach { volume, node, .. } => write!(f, "detach volume {volume} from node {node}"),
            Self::SetMaintenance { node, on, .. } => {
                write!(f, "maintenance of node {node} {}", if *on { "on" } else { "off" })
            }
            Self::LeaveNode { node, departure } => write!(f, "node {node}: {departure:?}"),
            Self::RemoveNode { node } => write!(f, "remove node {node}"),
            Self::ChangeSettings(_) => f.write_str("change settings"),
            Self::WishScrubs { groups, .. } => write!(f, "scrubs of {} groups asked for", groups.len()),
            Self::EndScrubs { ends, .. } => write!(f, "{} scrubs ended", ends.len()),
        }
    }
}

/// openraft's messages between nodes are JSON; commands travel in them as the hex of their own encoding, so
/// that one declaration (the proto file) holds on the wire and on disk.
macro_rules! serde_as_hex {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&hex(&self.encode()))
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                use serde::de::Error;
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                let bytes = unhex(&text).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
                <$type>::decode(&bytes).map_err(D::Error::custom)
            }
        }
    };
}

serde_as_hex!(Command);
serde_as_hex!(Reply);

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = |byte: &u8| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    bytes.iter().flat_map(digits).map(char::from).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes().chunks_exact(2).map(|pair| Some((digit(pair[0])? << 4) | digit(pair[1])?)).collect()
}
