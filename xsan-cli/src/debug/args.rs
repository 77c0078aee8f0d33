//! The command line of xsan-debug.

use std::str::FromStr;

use clap::{Parser, Subcommand};
use xsan_protocol::units::BLOCK_SIZE;

use crate::connection::Connection;

const EXAMPLES: &str = "\
Examples:
  xsan-debug cluster-status
  xsan-debug volume-layout vm-1
  xsan-debug block-location vm-1:17         the block with index 17
  xsan-debug block-location vm-1@68000000   the block that holds that byte
  xsan-debug perf-stats --node node-002
  xsan-debug --json cluster-topology

Exit codes: as xsan-cli's; 4 also when the node that was named, or every replica of the block, does not answer.";

/// Shows how an XSAN cluster works inside: placement, replicas, versions, latencies.
#[derive(Clone, Debug, Parser)]
#[command(name = "xsan-debug", version, after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Raft, heartbeats, incarnations and groups that are not healthy; with --json all groups
    #[command(
        after_help = "Examples:\n  xsan-debug cluster-status\n  xsan-debug --json cluster-status | jq '.group_list[] | select(.state != \"healthy\")'"
    )]
    ClusterStatus,
    /// Failure domains, nodes, shards and stores
    #[command(after_help = "Example:\n  xsan-debug --json cluster-topology")]
    ClusterTopology,
    /// A volume's ids, and the state of its groups
    #[command(after_help = "Example:\n  xsan-debug volume-info vm-1")]
    VolumeInfo {
        #[arg(value_name = "VOLUME")]
        name: String,
    },
    /// Which nodes hold a volume, group by group
    #[command(after_help = "Example:\n  xsan-debug volume-layout vm-1")]
    VolumeLayout {
        #[arg(value_name = "VOLUME")]
        name: String,
    },
    /// Where one block is, on every replica, with versions and device offsets
    #[command(
        after_help = "Examples:\n  xsan-debug block-location vm-1:17         the block with index 17\n  xsan-debug block-location vm-1@68000000   the block that holds that byte"
    )]
    BlockLocation {
        /// VOLUME:INDEX of the block, or VOLUME@BYTE in the volume
        block: Block,
    },
    /// Latencies and counters of the data processes, since they started
    #[command(after_help = "Examples:\n  xsan-debug perf-stats\n  xsan-debug perf-stats --node node-002")]
    PerfStats {
        /// Only this node
        #[arg(long)]
        node: Option<String>,
    },
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  xsan-debug completion bash > /etc/bash_completion.d/xsan-debug")]
    Completion { shell: clap_complete::Shell },
}

/// A block as people name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub volume: String,
    pub index: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    #[error("write VOLUME:INDEX or VOLUME@BYTE, as vm-1:17 or vm-1@68MiB")]
    Malformed,
    #[error("{0}")]
    Offset(xsan_nodekit::size::SizeError),
}

impl FromStr for Block {
    type Err = BlockError;

    fn from_str(text: &str) -> Result<Self, BlockError> {
        let (volume, index) = if let Some((volume, offset)) = text.rsplit_once('@') {
            let byte = xsan_nodekit::size::parse(offset).map_err(BlockError::Offset)?;
            (volume, byte / BLOCK_SIZE as u64)
        } else if let Some((volume, index)) = text.rsplit_once(':') {
            (volume, index.parse().map_err(|_| BlockError::Malformed)?)
        } else {
            return Err(BlockError::Malformed);
        };
        if volume.is_empty() {
            return Err(BlockError::Malformed);
        }
        Ok(Self { volume: volume.to_owned(), index })
    }
}
