//! xsan-cli: what operators do with a cluster. `args` → a call of the client → `show` (tables) or `json`.

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use xsan_client::ControlClient;
use xsan_protocol::health::Severity;
use xsan_protocol::proto::{
    ChangeSettingsRequest, CreateVolumeRequest, Finding, PlanJoinRequest, ResizeVolumeRequest, Volume,
};

mod args;
pub mod json;
mod life;
mod scrub;
mod show;

pub use args::Args;
use args::{ClusterCommand, Command, NodeCommand, Setting, SlowNodes, VolumeCommand};
pub(crate) use show::durability;

use crate::connection::completion;
use crate::failure::{About, Failure, Shown, block_on, finish};

/// Runs one command.
pub fn main(args: Args) -> ExitCode {
    let as_json = args.connection.json;
    if let Command::Completion { shell } = args.command {
        return finish(Ok(completion::<Args>(shell, "xsan-cli").into()), as_json);
    }
    finish(block_on(run(args)), as_json)
}

/// What a newer release finds may be bad.
fn worst_of(findings: &[Finding]) -> Severity {
    let severity = |finding: &Finding| Severity::named(&finding.severity).unwrap_or(Severity::Error);
    findings.iter().map(severity).max().unwrap_or(Severity::Info)
}

async fn run(args: Args) -> Result<Shown, Failure> {
    let client = args.connection.client();
    let as_json = args.connection.json;
    let text = match args.command {
        Command::Cluster { command: ClusterCommand::Status } => {
            let status = client.cluster_status().await?;
            if as_json {
                format!("{:#}", json::cluster_status(&status))
            } else {
                show::cluster_status(&status)
            }
        }
        Command::Cluster { command: ClusterCommand::Set { setting } } => {
            let settings = client.change_settings(change(&setting)).await?;
            if as_json { format!("{:#}", json::settings(&settings)) } else { show::settings(&settings) }
        }
        Command::Events => {
            let events = client.events().await?;
            if as_json { format!("{:#}", json::events(&events)) } else { show::events(&events) }
        }
        Command::Health => {
            let findings = client.health().await?;
            let text = format!("{:#}", json::health(&findings));
            let text = if as_json { text } else { show::findings(&findings) };
            return Ok(Shown { text, exit_code: worst_of(&findings) as u8 });
        }
        Command::Scrub { command } => scrub::run(&client, command, as_json).await?,
        Command::Node { command } => return node(&client, command, as_json).await,
        Command::Volume { command } => volume(&client, command, as_json).await?,
        Command::Completion { .. } => unreachable!("handled before"),
    };
    Ok(text.into())
}

fn change(setting: &Setting) -> ChangeSettingsRequest {
    let ms = |value: &Duration| u64::try_from(value.as_millis()).expect("the argument is in bounds");
    let mut change = ChangeSettingsRequest::default();
    match setting {
        Setting::DownOutInterval { value } => change.down_out_interval_ms = ms(value),
        Setting::SlowNodes { value } => change.demote_slow_nodes = Some(*value == SlowNodes::Demote),
        Setting::ScrubInterval { value } => change.scrub_interval_ms = Some(ms(value)),
        Setting::DeepScrubInterval { value } => change.deep_scrub_interval_ms = Some(ms(value)),
        Setting::ScrubRate { value } => change.scrub_bytes_per_second = Some(*value),
    }
    change
}

async fn node(client: &ControlClient, command: NodeCommand, as_json: bool) -> Result<Shown, Failure> {
    let text = match command {
        NodeCommand::List => {
            let status = client.cluster_status().await?;
            if as_json { format!("{:#}", json::nodes(&status.nodes)) } else { show::nodes(&status.nodes) }
        }
        NodeCommand::Info { id } => {
            let node = client.get_node(&id).await.about("node", &id)?;
            if as_json { format!("{:#}", json::node(&node)) } else { show::node(&node) }
        }
        NodeCommand::Maintenance { id, state, force, dry_run } => {
            return life::maintenance(client, id, state, force, dry_run, as_json).await;
        }
        NodeCommand::Join { capacity: capacity_bytes, failure_domain, dry_run: _ } => {
            let plan = client.plan_join(PlanJoinRequest { capacity_bytes, failure_domain }).await?;
            return Ok(life::dry_run(&plan, as_json));
        }
        NodeCommand::Remove(options) => return life::remove(client, options, as_json).await,
    };
    Ok(text.into())
}

async fn volume(client: &ControlClient, command: VolumeCommand, as_json: bool) -> Result<String, Failure> {
    match command {
        VolumeCommand::Create(options) => {
            let request = CreateVolumeRequest {
                name: options.name.get().to_owned(),
                size_bytes: options.size.0,
                replica_count: options.replica_count.map_or(0, u32::from),
                policy: options.policy.unwrap_or_default(),
                durability: options.durability.number(),
            };
            let volume = client.create_volume(request).await.about("volume", options.name.get())?;
            Ok(describe_changed(client, &volume, as_json, "created").await)
        }
        VolumeCommand::List => {
            let volumes = client.list_volumes().await?;
            Ok(if as_json { format!("{:#}", json::volumes(&volumes)) } else { show::volumes(&volumes) })
        }
        VolumeCommand::Info { name } => describe(client, name.get(), as_json).await,
        VolumeCommand::Resize { name, size, allow_shrink } => {
            let request =
                ResizeVolumeRequest { name: name.get().to_owned(), size_bytes: size.0, allow_shrink };
            let volume = client.resize_volume(request).await.about("volume", name.get())?;
            Ok(describe_changed(client, &volume, as_json, "resized").await)
        }
        VolumeCommand::Delete { name, yes } => {
            let name = name.get();
            if !yes && !confirm(&format!("Delete volume {name} and all its data?"))? {
                return Err(Failure::NotConfirmed);
            }
            client.delete_volume(name).await.about("volume", name)?;
            let deleted = serde_json::json!({ "deleted": name });
            Ok(if as_json { format!("{deleted:#}") } else { format!("volume {name} deleted") })
        }
    }
}

/// The volume as it is now.
async fn describe(client: &ControlClient, name: &str, as_json: bool) -> Result<String, Failure> {
    let volume = client.get_volume(name).await.about("volume", name)?;
    let map = client.get_map().await?;
    Ok(if as_json { format!("{:#}", json::volume(&volume, &map)) } else { show::volume(&volume, &map) })
}

/// The volume as it is after `done` was done to it. That is done even if the cluster does not answer any more: whoever
/// were told of a failure would do it again.
async fn describe_changed(client: &ControlClient, volume: &Volume, as_json: bool, done: &str) -> String {
    let name = &volume.name;
    let shown = describe(client, name, as_json).await.unwrap_or_else(|failure| {
        eprintln!("note: volume {name} is {done}, but its state can not be shown: {failure}");
        if as_json { format!("{:#}", json::changed_volume(volume)) } else { show::changed_volume(volume) }
    });
    if as_json { shown } else { format!("volume {name} {done}\n\n{shown}") }
}

/// Asks a person; where there is none to ask, --yes has to be given.
fn confirm(question: &str) -> Result<bool, Failure> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::NoTerminal);
    }
    eprint!("{question} [y/N] ");
    io::stderr().flush().map_err(Failure::System)?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(Failure::System)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests;
