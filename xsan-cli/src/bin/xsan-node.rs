//! Starts and supervises a node; see `xsan_cli::node`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    xsan_cli::node::main(&xsan_cli::node::Args::parse())
}
