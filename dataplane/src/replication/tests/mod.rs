//! Tests of replication: scripted transcripts, and small clusters under random faults.
//!
//! Both run the state machine over [`model::ModelStore`], a store that keeps everything in memory; `leftovers` runs real stores.

mod cluster;
mod leftovers;
mod model;
mod script;

use std::sync::OnceLock;

use crate::disk::buffers::BufferPool;

/// One pool for every test: arenas are never freed.
fn pool() -> &'static BufferPool {
    static POOL: OnceLock<&'static BufferPool> = OnceLock::new();
    POOL.get_or_init(|| BufferPool::anonymous(1 << 30))
}
