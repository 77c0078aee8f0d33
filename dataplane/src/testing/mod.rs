//! What tests and the simulator share: a seeded generator, a device that fails on demand, and a check of histories.
//!
//! Compiled for this crate's own tests and with the feature `testing`; no part of the data process.

mod device;
mod history;
mod random;

pub use device::SimDevice;
pub use history::{History, Sector, Span};
pub use random::Random;
