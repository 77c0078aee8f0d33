//! Shows how a cluster works inside; see `xsan_cli::debug`.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    xsan_cli::debug::main(xsan_cli::debug::Args::parse())
}
