//! `xsan-control`: the control process of a node. Started and restarted by `xsan-node`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use xsan_controlplane::node::{ControlNode, NodeError, Settings};
use xsan_nodekit::config::NodeConfig;
use xsan_nodekit::{exit, logging, open_files};
use xsan_protocol::error::Code;

/// The control plane of one XSAN node.
#[derive(Debug, Parser)]
#[command(name = "xsan-control", version)]
struct Arguments {
    /// The node's data directory, prepared by xsan-node.
    #[arg(long)]
    data_dir: PathBuf,
}

/// Why the process ends though nobody asked it to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error("the runtime or its signals could not be had: {0}")]
    System(#[from] std::io::Error),
    #[error("Raft has stopped: its storage failed")]
    Raft,
    #[error("the cluster has removed this node; what {data_dir} holds is of no use to it any more")]
    Removed { data_dir: PathBuf },
}

impl Failure {
    fn code(&self) -> Code {
        match self {
            Self::Node(error) => error.code(),
            Self::System(_) => Code::MemoryShort,
            Self::Raft => Code::DataDirUnusable,
            Self::Removed { .. } => Code::NodeRemoved,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match NodeConfig::load(&arguments.data_dir) {
        Ok(config) => config,
        Err(error) => return exit::daemon_fails(error.code(), &error),
    };
    let _log = match logging::init(&config.logging, logging::Process::Control) {
        Ok(guard) => guard,
        Err(error) => return exit::daemon_fails(error.code(), &error),
    };
    open_files::raise_limit();
    match run(Settings::new(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::daemon_fails(failure.code(), &failure),
    }
}

fn run(settings: Settings) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let data_dir = settings.data_dir.clone();
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let node = tokio::select! {
            node = ControlNode::start(settings) => node?,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            // The supervisor starts the process again.
            () = node.failed() => return Err(Failure::Raft),
            () = node.removed() => {
                node.stop().await;
                return Err(Failure::Removed { data_dir });
            }
        }
        tracing::info!("stopping");
        node.stop().await;
        Ok(())
    })
}
