//! `xsan-data`: the data plane of one node. Started by `xsan-node`; reads all it needs from the data directory.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use xsan_dataplane::disk::os;
use xsan_dataplane::shard::boot::Process;
use xsan_nodekit::config::NodeConfig;
use xsan_nodekit::{exit, logging, open_files};

/// The data plane of one XSAN node.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The node's data directory, prepared by xsan-node.
    #[arg(long)]
    data_dir: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Before there is any other thread, which would take the signals.
    let termination = os::block_termination_signals();
    let config = match NodeConfig::load(&arguments.data_dir) {
        Ok(config) => config,
        Err(error) => return exit::daemon_fails(error.code(), &error),
    };
    let _log = match logging::init(&config.logging, logging::Process::Data) {
        Ok(guard) => guard,
        Err(error) => return exit::daemon_fails(error.code(), &error),
    };
    open_files::raise_limit();
    // A broken invariant ends the process, in whichever profile it was built: the other replicas go on.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    match Process::start(config) {
        Ok(process) => {
            tracing::info!("serving");
            let signal = termination.wait();
            tracing::info!(signal, "stopping");
            process.stop();
            logging::flush();
            // Not a return: threads of shards still run, and what they own must not be dropped under the kernel.
            std::process::exit(0)
        }
        Err(error) => exit::daemon_fails(error.code(), &error),
    }
}
