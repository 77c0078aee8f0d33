//! The SDK: how a program talks to an XSAN cluster.
//!
//! Used by the command line tools and xsan-node; the file and object clients build on it. Imports neither plane.

mod control;
mod error;

pub use control::{Address, AddressError, ControlClient, Options};
pub use error::{ClientError, Refusal};
