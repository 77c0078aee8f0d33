//! The data plane of one node: `xsan-data`.
//!
//! Modules, each importing only those below it: shard, gateway, volume, replication, store, net and disk, io.
//! `replication` and `store` are deterministic state machines without I/O: they take events and return
//! actions, and never read a clock, a socket, a random number or a file.

pub mod disk;
pub mod gateway;
pub mod io;
pub mod net;
pub mod replication;
pub mod shard;
pub mod stats;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod volume;
