//! The commands of XSAN: `xsan-node` (a node's supervisor), `xsan-cli` (for operators) and `xsan-debug` (for engineers).
//!
//! Each command is a module; the binaries only call it. What is shown is made by pure functions from the
//! cluster's replies (`*/show.rs`), so that it is tested without a cluster.

pub mod cli;
mod connection;
pub mod debug;
mod failure;
pub mod node;
#[cfg(test)]
mod sample;
mod text;
