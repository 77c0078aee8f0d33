//! xsan-debug: what engineers look into. `args` → calls of the client → `show` (tables) or `json`.

use std::process::ExitCode;

use serde_json::Value;

mod args;
mod json;
mod layout;
mod show;

pub use args::Args;
use args::Command;

use crate::connection::completion;
use crate::failure::{Failure, block_on, finish};

/// Runs one command.
pub fn main(args: Args) -> ExitCode {
    let as_json = args.connection.json;
    if let Command::Completion { shell } = args.command {
        return finish(Ok(completion::<Args>(shell, "xsan-debug")), as_json);
    }
    finish(block_on(run(args)), as_json)
}

async fn run(args: Args) -> Result<String, Failure> {
    let client = args.connection.client();
    let pick = |json: &dyn Fn() -> Value, text: &dyn Fn() -> String| {
        if args.connection.json { format!("{:#}", json()) } else { text() }
    };
    match args.command {
        Command::ClusterStatus => {
            let (status, map) = (client.cluster_status().await?, client.get_map().await?);
            Ok(pick(&|| json::cluster_status(&status, &map), &|| show::cluster_status(&status, &map)))
        }
        Command::ClusterTopology => {
            let (status, map) = (client.cluster_status().await?, client.get_map().await?);
            Ok(pick(&|| json::topology(&status, &map), &|| show::topology(&status, &map)))
        }
        Command::VolumeInfo { name } => {
            let (volume, map) = (client.get_volume(&name).await?, client.get_map().await?);
            let nodes = client.cluster_status().await?.nodes;
            Ok(pick(&|| json::volume_info(&volume, &map, &nodes), &|| {
                show::volume_info(&volume, &map, &nodes)
            }))
        }
        Command::VolumeLayout { name } => {
            let (volume, map) = (client.get_volume(&name).await?, client.get_map().await?);
            let nodes = client.cluster_status().await?.nodes;
            let layout = layout::of(&volume.volume.unwrap_or_default(), &map, &nodes);
            Ok(pick(&|| json::layout(&layout, &map), &|| show::layout(&layout, &map)))
        }
        Command::BlockLocation { block } => {
            let reply = client.locate_block(&block.volume, block.index).await?;
            Ok(pick(&|| json::location(&block, &reply), &|| show::location(&block, &reply)))
        }
        Command::PerfStats { node } => {
            let nodes = client.perf_stats(node.as_deref()).await?;
            Ok(pick(&|| json::perf(&nodes), &|| show::perf(&nodes)))
        }
        Command::Completion { .. } => unreachable!("handled before a cluster is asked"),
    }
}

#[cfg(test)]
mod tests;
