//! xsan-debug: what engineers look into. `args` → calls of the client → `show` (tables) or `json`.

use std::process::ExitCode;

use serde_json::Value;
use xsan_nodekit::exit;

mod args;
mod json;
mod layout;
mod show;

pub use args::Args;
use args::Command;

use crate::connection::completion;
use crate::failure::{About, Failure, Shown, block_on, finish};

/// Runs one command.
pub fn main(args: Args) -> ExitCode {
    let as_json = args.connection.json;
    if let Command::Completion { shell } = args.command {
        return finish(Ok(completion::<Args>(shell, "xsan-debug").into()), as_json);
    }
    finish(block_on(run(args)), as_json)
}

async fn run(args: Args) -> Result<Shown, Failure> {
    let client = args.connection.client();
    let pick = |json: &dyn Fn() -> Value, text: &dyn Fn() -> String| {
        if args.connection.json { format!("{:#}", json()) } else { text() }
    };
    let text = match args.command {
        Command::ClusterStatus => {
            let (status, map) = (client.cluster_status().await?, client.get_map().await?);
            pick(&|| json::cluster_status(&status, &map), &|| show::cluster_status(&status, &map))
        }
        Command::ClusterTopology => {
            let (status, map) = (client.cluster_status().await?, client.get_map().await?);
            pick(&|| json::topology(&status, &map), &|| show::topology(&status, &map))
        }
        Command::VolumeInfo { name } => {
            let (volume, map) =
                (client.get_volume(&name).await.about("volume", &name)?, client.get_map().await?);
            let nodes = client.cluster_status().await?.nodes;
            pick(&|| json::volume_info(&volume, &map, &nodes), &|| show::volume_info(&volume, &map, &nodes))
        }
        Command::VolumeLayout { name } => {
            let (volume, map) =
                (client.get_volume(&name).await.about("volume", &name)?, client.get_map().await?);
            let nodes = client.cluster_status().await?.nodes;
            let layout = layout::of(&volume.volume.unwrap_or_default(), &map, &nodes);
            pick(&|| json::layout(&layout, &map), &|| show::layout(&layout, &map))
        }
        Command::BlockLocation { block } => {
            let reply =
                client.locate_block(&block.volume, block.index).await.about("volume", &block.volume)?;
            let text = pick(&|| json::location(&block, &reply), &|| show::location(&block, &reply));
            return Ok(answered(text, reply.replicas.iter().any(|replica| replica.reachable)));
        }
        Command::PerfStats { node } => {
            let nodes = client.perf_stats(node.as_deref()).await?;
            let text = pick(&|| json::perf(&nodes), &|| show::perf(&nodes));
            return Ok(answered(text, node.is_none() || nodes.iter().any(|node| node.reachable)));
        }
        Command::Completion { .. } => unreachable!("handled before a cluster is asked"),
    };
    Ok(text.into())
}

/// What is shown of nodes that were asked, and a failure for scripts if it is nothing.
fn answered(text: String, any: bool) -> Shown {
    Shown { text, exit_code: if any { exit::DONE } else { exit::NO_ANSWER } }
}

#[cfg(test)]
mod tests;
