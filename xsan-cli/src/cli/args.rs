//! The command line of xsan-cli.

use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum};
use xsan_nodekit::size::{self, Size};
use xsan_protocol::limits::{REPLICAS_MAX, VOLUME_BYTES_MAX};
use xsan_protocol::placement::DEFAULT_FAILURE_DOMAIN;
use xsan_protocol::proto::Durability as Message;
use xsan_protocol::units::SECTOR_SIZE;

use crate::connection::Connection;

const EXAMPLES: &str = "\
Examples:
  xsan-cli cluster status
  xsan-cli volume create --name vm-1 --size 100GB --replica-count 3
  xsan-cli --address 192.168.1.12 volume list
  xsan-cli --json node info node-001
  XSAN_ADDRESS=192.168.1.10,192.168.1.11 xsan-cli cluster status
  source <(xsan-cli completion bash)

Exit codes:
  0  done
  1  the cluster refused; the error's number and what to do are on stderr
  2  wrong usage
  3  nothing answers at any address
  4  no answer in time, or no quorum: a change may or may not have been made
  5  done, but what there was to show could not be written
  --dry-run ends with 1 where the change would be refused
  xsan-cli health, when the cluster answers: 0 well, 1 warnings, 2 errors";

/// Manages an XSAN cluster: its nodes and volumes. Any node answers.
#[derive(Clone, Debug, Parser)]
#[command(name = "xsan-cli", version, after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// The cluster as a whole
    Cluster {
        #[command(subcommand)]
        command: ClusterCommand,
    },
    /// The hosts of the cluster
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// The disks that the cluster provides
    Volume {
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// Reading and comparing of all replicas, in the background
    Scrub {
        #[command(subcommand)]
        command: ScrubCommand,
    },
    /// What should be known or mended, the worst first; the exit code is the worst severity
    #[command(
        after_help = "Examples:\n  xsan-cli health\n  xsan-cli --json health\n\nExit codes: 0 nothing or info, 1 warning, 2 error.\nCodes and remedies: docs/health.md"
    )]
    Health,
    /// What happened lately, as the nodes saw it while they led
    #[command(after_help = "Example:\n  xsan-cli events")]
    Events,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  xsan-cli completion bash > /etc/bash_completion.d/xsan-cli")]
    Completion { shell: clap_complete::Shell },
}

#[derive(Clone, Debug, Subcommand)]
pub enum ClusterCommand {
    /// Health, nodes, space and resync progress
    #[command(after_help = "Example:\n  xsan-cli cluster status")]
    Status,
    /// Change a setting of the whole cluster
    #[command(after_help = "Examples:\n  xsan-cli cluster set down-out-interval 600s\n  \
        xsan-cli cluster set scrub-rate 50MiB\n  xsan-cli cluster set deep-scrub-interval 7d\n  \
        xsan-cli cluster set slow-nodes demote")]
    Set {
        #[command(subcommand)]
        setting: Setting,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum Setting {
    /// How long a node may be gone before its replicas are made elsewhere
    #[command(after_help = "Example:\n  xsan-cli cluster set down-out-interval 30min")]
    DownOutInterval {
        /// As 600s, 10min, 2h or 1d
        #[arg(value_parser = interval)]
        value: Duration,
    },
    /// What becomes of nodes that are far slower than their peers
    #[command(after_help = "Example:\n  xsan-cli cluster set slow-nodes demote")]
    SlowNodes { value: SlowNodes },
    /// How often each group's replicas are compared
    #[command(
        after_help = "Examples:\n  xsan-cli cluster set scrub-interval 12h\n  xsan-cli cluster set scrub-interval off"
    )]
    ScrubInterval {
        /// As 12h or 1d, or off
        #[arg(value_parser = interval_or_off)]
        value: Duration,
    },
    /// How often every page of each group's replicas is read, too
    #[command(after_help = "Example:\n  xsan-cli cluster set deep-scrub-interval 7d")]
    DeepScrubInterval {
        /// As 7d, or off
        #[arg(value_parser = interval_or_off)]
        value: Duration,
    },
    /// Bytes a second that each shard's scrubs read; the other replicas of what it leads read as much
    #[command(after_help = "Example:\n  xsan-cli cluster set scrub-rate 50MiB")]
    ScrubRate {
        /// As 50MiB
        #[arg(value_parser = size::parse)]
        value: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SlowNodes {
    /// They are reported, and clients wait for them
    Report,
    /// Clients wait for them only where too few replicas would be left; they get every write none the less
    Demote,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ScrubCommand {
    /// Scrub groups now, in the background
    #[command(
        after_help = "Examples:\n  xsan-cli scrub start --deep\n  xsan-cli scrub start --deep --volume vm-1\n  \
        xsan-cli scrub start --group 1.17"
    )]
    Start {
        /// Read every page of every replica, too
        #[arg(long)]
        deep: bool,
        /// This group alone, as 1.17 or by its number
        #[arg(long, value_parser = group)]
        group: Option<u32>,
        /// The groups that may hold a block of this volume
        #[arg(long, conflicts_with = "group")]
        volume: Option<String>,
        /// Every group [default]
        #[arg(long, conflicts_with_all = ["group", "volume"])]
        all: bool,
    },
    /// What runs, how fast, what is left, and what the last ones found
    #[command(after_help = "Example:\n  xsan-cli scrub status")]
    Status,
    /// Take back what was asked for; what is due by the intervals goes on
    #[command(after_help = "Example:\n  xsan-cli scrub stop")]
    Stop,
}

#[derive(Clone, Debug, Subcommand)]
pub enum NodeCommand {
    /// All nodes
    #[command(after_help = "Example:\n  xsan-cli node list")]
    List,
    /// One node with its stores
    #[command(after_help = "Example:\n  xsan-cli node info node-001")]
    Info {
        /// Name of the node, or its number
        id: String,
    },
    /// Take a node out for a while: it leads no group, and its replicas are not made elsewhere while it is down
    #[command(after_help = "Example:\n  xsan-cli node maintenance node-003 on --dry-run")]
    Maintenance {
        /// Name of the node, or its number
        id: String,
        #[arg(value_enum)]
        state: Switch,
        /// Also when groups stop without the node
        #[arg(long)]
        force: bool,
        /// Change nothing, say what would be
        #[arg(long)]
        dry_run: bool,
    },
    /// What the join of a node would move (a node joins by itself: xsan-node --join-cluster)
    #[command(
        after_help = "Example:\n  xsan-cli node join --dry-run --capacity 4TiB --failure-domain rack-2"
    )]
    Join {
        /// Of all its devices together
        #[arg(long, value_parser = size::parse)]
        capacity: u64,
        /// As in its configuration
        #[arg(long, default_value = DEFAULT_FAILURE_DOMAIN)]
        failure_domain: String,
        /// Change nothing, say what would be
        #[arg(long, required = true)]
        dry_run: bool,
    },
    /// Move a node's replicas to the others, then take it out of the cluster
    #[command(
        after_help = "Examples:\n  xsan-cli node remove node-004 --dry-run\n  xsan-cli node remove node-004 --wait\n  \
        xsan-cli node remove --cancel node-004\n  xsan-cli node remove node-004 --force    # it is dead"
    )]
    Remove(RemoveOptions),
}

#[derive(Clone, Debug, clap::Args)]
pub struct RemoveOptions {
    /// Name of the node, or its number
    pub id: String,
    /// The node is dead: give up what only it holds
    #[arg(long, conflicts_with = "cancel")]
    pub force: bool,
    /// Take an earlier removal back
    #[arg(long, conflicts_with = "wait")]
    pub cancel: bool,
    /// Change nothing, say what would be
    #[arg(long, conflicts_with_all = ["cancel", "wait"])]
    pub dry_run: bool,
    /// Show the progress, and return when the node is gone
    #[arg(long)]
    pub wait: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    On,
    Off,
}

/// A volume's name, as argument or as --name.
#[derive(Clone, Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct VolumeName {
    /// Name of the volume
    #[arg(value_name = "NAME")]
    argument: Option<String>,
    /// Name of the volume
    #[arg(long = "name", value_name = "NAME")]
    option: Option<String>,
}

impl VolumeName {
    pub fn get(&self) -> &str {
        self.argument.as_deref().or(self.option.as_deref()).expect("clap requires one of them")
    }
}

#[derive(Clone, Debug, Subcommand)]
pub enum VolumeCommand {
    /// Make a volume
    #[command(
        after_help = "Example:\n  xsan-cli volume create --name vm-1 --size 100GiB --replica-count 3\n\n\
        Sizes: 100GB is 100 × 10⁹ bytes, 100GiB is 100 × 2³⁰ bytes."
    )]
    Create(CreateOptions),
    /// All volumes
    #[command(after_help = "Example:\n  xsan-cli volume list")]
    List,
    /// One volume, and where to open it
    #[command(after_help = "Example:\n  xsan-cli volume info vm-1")]
    Info {
        #[command(flatten)]
        name: VolumeName,
    },
    /// Grow a volume, or shrink it with --allow-shrink
    #[command(after_help = "Example:\n  xsan-cli volume resize vm-1 --size 200GB")]
    Resize {
        #[command(flatten)]
        name: VolumeName,
        /// New size, as 200GB or 200GiB
        #[arg(long, value_parser = volume_size, allow_hyphen_values = true)]
        size: Size,
        /// Accept that what lies behind a smaller new end is LOST. Its space is freed when the volume is deleted; a
        /// volume that grows again may show it again
        #[arg(long)]
        allow_shrink: bool,
    },
    /// Delete a volume and all its data
    #[command(after_help = "Example:\n  xsan-cli volume delete vm-1")]
    Delete {
        #[command(flatten)]
        name: VolumeName,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Clone, Debug, clap::Args)]
pub struct CreateOptions {
    #[command(flatten)]
    pub name: VolumeName,
    /// Size, as 100GB or 100GiB
    #[arg(long, value_parser = volume_size, allow_hyphen_values = true)]
    pub size: Size,
    /// Copies of every block, on as many nodes [default: storage.default_replica_count of the node that answers, 2 if not set]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u8).range(1..=REPLICAS_MAX as i64))]
    pub replica_count: Option<u8>,
    /// Storage policy
    #[arg(long)]
    pub policy: Option<String>,
    /// When a write counts as done
    #[arg(long, value_enum, default_value_t = Durability::OnFlush)]
    pub durability: Durability,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Durability {
    /// The devices have it; a flush forces it to stable media, as for any disk
    OnFlush,
    /// It is on stable media of every replica
    EveryWrite,
}

impl Durability {
    pub fn number(self) -> i32 {
        match self {
            Self::OnFlush => Message::OnFlush as i32,
            Self::EveryWrite => Message::EveryWrite as i32,
        }
    }
}

/// Why a size is none for a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VolumeSizeError {
    #[error(transparent)]
    Size(#[from] size::SizeError),
    #[error("is not more than 0")]
    Zero,
    #[error("is more than {}, the largest volume", Size(VOLUME_BYTES_MAX))]
    TooLarge,
    #[error("is not a multiple of {SECTOR_SIZE} bytes")]
    NotSectors,
}

/// Why a text is no interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntervalError {
    #[error("is not a whole number of s, min, h or d, as 600s")]
    Form,
    #[error("is not more than 0")]
    Zero,
    #[error("is too long")]
    TooLong,
}

fn interval(text: &str) -> Result<Duration, IntervalError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit.trim() {
        "s" => 1,
        "min" | "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(IntervalError::Form),
    };
    if number.is_empty() {
        return Err(IntervalError::Form);
    }
    // Digits alone are no number only when they are too many.
    let total = number.parse().ok().and_then(|number: u64| number.checked_mul(seconds));
    match total.filter(|total| *total <= u64::MAX / 1000).ok_or(IntervalError::TooLong)? {
        // Zero would mean "as it is"; the cluster refuses what is too short.
        0 => Err(IntervalError::Zero),
        total => Ok(Duration::from_secs(total)),
    }
}

/// Zero is off.
fn interval_or_off(text: &str) -> Result<Duration, IntervalError> {
    if text == "off" { Ok(Duration::ZERO) } else { interval(text) }
}

/// A text that is no group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a group, as 1.17: its pool and its number there")]
pub struct GroupError;

fn group(text: &str) -> Result<u32, GroupError> {
    let Some((pool, index)) = text.split_once('.') else { return text.parse().map_err(|_| GroupError) };
    let (pool, index): (u16, u16) =
        (pool.parse().map_err(|_| GroupError)?, index.parse().map_err(|_| GroupError)?);
    Ok(u32::from(pool) << 16 | u32::from(index))
}

fn volume_size(text: &str) -> Result<Size, VolumeSizeError> {
    if text.trim_start().starts_with('-') {
        return Err(VolumeSizeError::Zero);
    }
    match size::parse(text)? {
        0 => Err(VolumeSizeError::Zero),
        bytes if bytes > VOLUME_BYTES_MAX => Err(VolumeSizeError::TooLarge),
        bytes if bytes % u64::from(SECTOR_SIZE) != 0 => Err(VolumeSizeError::NotSectors),
        bytes => Ok(Size(bytes)),
    }
}
