//! Memory of the data processes, lent to one run after the other: arenas are never freed.

use std::sync::{Mutex, PoisonError};

use xsan_dataplane::disk::buffers::{BufferPool, Claim};
use xsan_dataplane::net::connection::claim_of;
use xsan_dataplane::net::frame::Frame;

/// Of a cluster, with the host that joins.
const HOSTS_MAX: usize = 7;

#[derive(Clone, Copy)]
pub struct Memory {
    /// Of each host as much as a shard has by default.
    pub pools: [&'static BufferPool; HOSTS_MAX],
    /// What all of them together take beside.
    overflow: &'static BufferPool,
}

impl Memory {
    fn new() -> Self {
        let pool = |_| BufferPool::anonymous(64 << 20);
        Self { pools: std::array::from_fn(pool), overflow: BufferPool::anonymous(512 << 20) }
    }

    /// What runs of this thread use.
    pub fn of_thread() -> Self {
        MEMORY.with(|lent| lent.0)
    }

    /// A frame whose data is in nobody's pool.
    pub fn copy(&self, frame: Frame) -> Frame {
        let Some(sent) = &frame.data else { return frame };
        let mut buffer = self.overflow.alloc(sent.len()).expect("there is enough beside the pools");
        buffer.copy_from_slice(sent);
        Frame { data: Some(buffer.freeze()), ..frame }
    }

    /// Takes a frame's data into the memory of the host that it reaches, as a connection does.
    pub fn receive(&self, host: usize, frame: Frame) -> Frame {
        let Some(sent) = &frame.data else { return frame };
        let claim = claim_of(frame.header.opcode);
        match self.pools[host].alloc_for(claim, sent.len()) {
            Some(mut buffer) => {
                buffer.copy_from_slice(sent);
                Frame { data: Some(buffer.freeze()), ..frame }
            }
            None if claim == Claim::Replication => self.copy(frame),
            None => Frame::busy(frame.header),
        }
    }

    /// Buffers that somebody holds.
    pub fn held(&self) -> usize {
        let pools = self.pools.iter().chain([&self.overflow]);
        pools.flat_map(|pool| pool.occupancy()).map(|(free, all)| all - free).sum()
    }
}

/// Memory of threads that have ended.
static MEMORIES: Mutex<Vec<Memory>> = Mutex::new(Vec::new());

/// Memory of every run of one thread, and then of another.
struct Lent(Memory);

impl Drop for Lent {
    fn drop(&mut self) {
        MEMORIES.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

thread_local! {
    static MEMORY: Lent = {
        let lent = MEMORIES.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Lent(lent.unwrap_or_else(Memory::new))
    };
}
