//! What the state machines ask of the world and what it answers: device operations.
//!
//! Carried out by `disk` (io_uring) and by the simulator; decided in `store`.

use std::io;

use crate::disk::buffers::{Buffer, BufferMut};

/// Which device of a store an operation is for. Without a cache device all of them are for the capacity device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceRole {
    Capacity,
    /// Holds the journal alone.
    Cache,
}

/// One operation for the device of a store. `id` returns in its completion; completions come in any order.
#[derive(Debug)]
pub enum DiskAction {
    /// Fill `buffer` (whole pages) from `offset`.
    Read { id: u64, device: DeviceRole, offset: u64, buffer: BufferMut },
    /// Write `parts` (whole pages each) one behind the other at `offset`.
    Write { id: u64, device: DeviceRole, offset: u64, parts: Vec<Buffer> },
    /// Force everything completed before to stable media.
    Flush { id: u64, device: DeviceRole },
}

impl DiskAction {
    pub const fn device(&self) -> DeviceRole {
        match self {
            Self::Read { device, .. } | Self::Write { device, .. } | Self::Flush { device, .. } => *device,
        }
    }
}

/// The end of a [`DiskAction`].
#[derive(Debug)]
pub struct DiskCompletion {
    pub id: u64,
    pub result: Result<DiskOk, DiskError>,
}

#[derive(Debug)]
pub enum DiskOk {
    Read(BufferMut),
    Written,
    Flushed,
}

/// The device refused an operation; short transfers count as failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device operation failed (errno {errno})")]
pub struct DiskError {
    pub errno: i32,
}

/// A device as format and recovery see it, before the shard serves: plain blocking calls.
///
/// Offsets and lengths are whole pages; buffers come from [`crate::disk::buffers`].
pub trait Device {
    fn size_bytes(&self) -> u64;
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()>;
    fn flush(&self) -> io::Result<()>;
}
