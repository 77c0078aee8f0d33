//! What tests and the simulator share: a seeded generator, a device that fails on demand, what is written, a check of
//! histories, and a node as maps have it.
//!
//! Compiled for this crate's own tests and with the feature `testing`; no part of the data process.

mod content;
mod device;
mod history;
mod map;
mod random;

pub use content::{fill, value_of};
pub use device::{NOTHING, Sectors, SimDevice, WHOLE};
pub use history::{History, Sector, Span};
pub use map::node_of_map;
pub use random::Random;
