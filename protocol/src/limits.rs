//! Every bound of the system, in one place, with the relations between them checked at compile time.

use crate::units::{BLOCK_SIZE, PAGE_SIZE};

/// Most pages one write, read or append carries (1 MiB).
pub const PAGES_PER_WRITE_MAX: usize = 256;
/// Most data bytes one frame carries.
pub const FRAME_DATA_MAX: usize = PAGES_PER_WRITE_MAX * PAGE_SIZE;
/// Most payload bytes of one frame: data, its page checksums and the opcode's own part.
pub const FRAME_MAX: usize = FRAME_DATA_MAX + 64 * 1024;
/// Largest message between the two processes of a node (a whole cluster map).
pub const LINK_FRAME_MAX: usize = 16 * 1024 * 1024;
/// Groups of a pool.
pub const GROUPS_PER_POOL: u16 = 256;
/// Most replicas of a volume.
pub const REPLICAS_MAX: usize = 5;
/// Most nodes of a cluster.
pub const NODES_MAX: usize = 256;
/// Most voters of the Raft group.
pub const VOTERS_MAX: usize = 5;
/// Most shards of a data process.
pub const SHARDS_MAX: usize = 256;
/// Most volumes of a cluster: a map with all of them fits into one message between the two processes of a node.
pub const VOLUMES_MAX: usize = 4096;
/// Most bytes of one volume in the message of a map: two names, and attached at every node.
pub const VOLUME_MESSAGE_MAX: usize = 2 * NAME_BYTES_MAX + 6 * NODES_MAX + 128;
/// Largest volume: every block index fits 32 bits; 1 PiB keeps the block table in bounds.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Longest volume, node or cluster name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Writes of one group in flight at its primary.
pub const GROUP_WRITES_MAX: usize = 512;

const _: () = assert!(FRAME_DATA_MAX <= BLOCK_SIZE);
// The rest is for nodes and groups.
const _: () = assert!(VOLUMES_MAX * VOLUME_MESSAGE_MAX <= LINK_FRAME_MAX / 2);
const _: () = assert!(GROUPS_PER_POOL.is_power_of_two());
const _: () = assert!(VOLUME_BYTES_MAX / BLOCK_SIZE as u64 <= u32::MAX as u64);
