//! The control plane of a node: membership, the cluster map, placement, leases, the API.
//!
//! `xsan-control` runs it; tests run several in one process. Knows no data plane code: the data process is
//! reached through the link socket, and through the map.

pub mod api;
pub mod clock;
pub mod controller;
pub mod events;
pub mod lease;
pub mod link;
pub mod membership;
pub mod node;
pub mod placement;
pub mod raft;
mod random;
pub mod scrub;
pub mod state;
pub mod timing;
