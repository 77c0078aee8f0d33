//! Volumes: from a gateway's request to the groups that hold its blocks, and back.
//!
//! Splits by block, routes by the map, sends to primaries, tries again after fail-overs until `IO_TIMEOUT`.
//! Used by gateways through [`request::Volumes`]; sends through [`Port`], which the shard implements.
//! Knows no store and no socket.
//!
//! Invariants
//! - A fail-over within `IO_TIMEOUT` is never an error of the request.
//! - A request is sent again only when its last copy was answered, or can not be carried out any more.
//! - A request ends when the last of its parts has, also after an error.

pub mod calls;
pub mod request;
pub mod split;
pub mod wire;

mod client;

pub use client::{IO_TIMEOUT, Port, Target, VolumeClient};
