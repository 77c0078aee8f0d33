//! Process-level tests: real nodes, on loopback or behind a switch, clients that nobody here wrote, and faults.
//!
//! One cluster runs at a time. A test that fails keeps its nodes' logs and names their directory.

#![expect(clippy::unwrap_used, reason = "a test's unwrap is its assertion")]

#[path = "process/basics.rs"]
mod basics;
#[path = "process/clients.rs"]
mod clients;
#[path = "process/corruption.rs"]
mod corruption;
#[path = "process/devices.rs"]
mod devices;
#[path = "process/durability.rs"]
mod durability;
#[path = "process/errors.rs"]
mod errors;
#[path = "process/faults.rs"]
mod faults;
#[path = "process/hostile.rs"]
mod hostile;
#[path = "process/life.rs"]
mod life;
#[path = "process/mix.rs"]
mod mix;
#[path = "process/network.rs"]
mod network;
#[path = "process/pauses.rs"]
mod pauses;
#[path = "process/resync.rs"]
mod resync;
#[path = "process/scrub.rs"]
mod scrub;
#[path = "process/shards.rs"]
mod shards;
#[path = "process/slow.rs"]
mod slow;
#[path = "process/stalls.rs"]
mod stalls;
