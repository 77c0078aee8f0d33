//! Manages a cluster; see `xsan_cli::cli`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    xsan_cli::cli::main(xsan_cli::cli::Args::parse())
}
