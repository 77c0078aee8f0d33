//! xsan-node: makes a node of a data directory, and keeps its two processes running.
//!
//! `args` → `prepare` (what to start; all the checks) → `supervise` (the two processes) and `ready` (when they serve).
//! Everything runs on the main thread; only it may start the children, see `sys::kill_with_parent`.

use std::env;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};
use xsan_nodekit::config::NodeConfig;
use xsan_nodekit::exit::Report;
use xsan_nodekit::logging::{self, Process};

mod args;
mod data_dir;
mod error;
mod ports;
mod prepare;
mod ready;
mod supervise;
mod sys;

pub use args::Args;
pub use error::NodeError;

use supervise::{Policy, Program};

/// Runs a node to its end.
pub fn main(args: &Args) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(args)),
        Err(error) => Err(NodeError::System(error)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if logging::is_to_file() {
                tracing::error!(code = error.number(), "{error}");
            }
            logging::flush();
            // The refused child has put its own numbered error on our stderr, and that is the one to read.
            match &error {
                NodeError::ChildRefused { program, .. } => {
                    eprintln!("xsan-node stops: {program} can not run")
                }
                error => eprintln!("{}", Report { code: error.code(), message: error }),
            }
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(args: &Args) -> Result<(), NodeError> {
    // Before anything else, so that no signal finds a node half made.
    let mut signals = Signals::new().map_err(NodeError::System)?;
    let (control, data) = (program("xsan-control")?, program("xsan-data")?);
    let plan = prepare::plan(args, prepare::default_file())?;
    // First of all changes: a node whose log can not be written does not start.
    let _log = logging::init(&plan.config.logging, Process::Node)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let prepared = tokio::select! {
        prepared = prepare::carry_out(plan) => prepared?,
        () = signals.stop() => return Ok(()),
    };
    let config = prepared.config;
    let cluster = &config.cluster;
    tracing::info!(
        node = %cluster.node_id, id = config.numeric_id.0, cluster = %cluster.cluster_id,
        data_dir = %cluster.data_dir.display(), "xsan-node {} starts", env!("CARGO_PKG_VERSION")
    );
    let arguments = [OsString::from("--data-dir"), cluster.data_dir.clone().into_os_string()];
    let (control, data) = (control.with(&arguments), data.with(&arguments));
    let supervised = supervise::run(control, data, Policy::default(), signals.stop());
    tokio::select! {
        end = supervised => end?,
        never = announce(config.clone()) => match never {},
    }
    drop(prepared.data_dir);
    Ok(())
}

/// Says when the node serves, and remembers that it has.
async fn announce(mut config: NodeConfig) -> std::convert::Infallible {
    ready::wait(&config).await;
    let line = ready::line(&config);
    tracing::info!("{line}");
    // A closed stdout is no reason to stop serving.
    let mut stdout = std::io::stdout();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    // The data process has formatted them, and forgot the names before it served: here they are forgotten as well.
    config.established = true;
    config.force_format.clear();
    if let Err(error) = config.save() {
        tracing::warn!(code = error.code().number(), "{error}");
    }
    std::future::pending().await
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// The terminal has gone. `None`: the node was started to outlive it, as by nohup.
    hangup: Option<Signal>,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: (!sys::hangup_is_ignored()).then(|| signal(SignalKind::hangup())).transpose()?,
        })
    }

    /// Done when the node is asked to stop.
    async fn stop(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = hangup => {}
        }
    }
}

/// Finds a program: beside our own executable, else in PATH.
fn program(name: &'static str) -> Result<Program, NodeError> {
    let own = env::current_exe().ok().and_then(|path| Some(path.parent()?.to_owned()));
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = own.into_iter().chain(env::split_paths(&path)).map(|directory| directory.join(name));
    let path: PathBuf =
        candidates.into_iter().find(|path| path.is_file()).ok_or(NodeError::ProgramMissing { name })?;
    Ok(Program { name, path, arguments: Vec::new() })
}

impl Program {
    fn with(mut self, arguments: &[OsString]) -> Self {
        self.arguments = arguments.to_vec();
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The children died with the node, without a flush, when its terminal was closed.
    #[tokio::test]
    async fn a_hangup_stops_the_node_unless_it_is_ignored() {
        let set = |action| {
            // SAFETY: plain system call; no other test of this process has to do with the signal.
            unsafe { libc::signal(libc::SIGHUP, action) };
        };
        set(libc::SIG_IGN);
        assert!(Signals::new().expect("signals").hangup.is_none());
        set(libc::SIG_DFL);
        let mut signals = Signals::new().expect("signals");
        // SAFETY: plain system call; the signal is handled.
        unsafe { libc::raise(libc::SIGHUP) };
        let stopped = tokio::time::timeout(std::time::Duration::from_secs(20), signals.stop()).await;
        stopped.expect("it is asked to stop");
    }
}
