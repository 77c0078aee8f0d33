//! What the processes of a node share and no other crate should know: configuration, logging, sizes
//! as people write them, the limit on open files, and exit codes.
//!
//! Used by xsan-node, xsan-control, xsan-data and the command line tools. Knows no network, no gRPC and no device.

pub mod config;
pub mod exit;
pub mod logging;
pub mod open_files;
pub mod size;
