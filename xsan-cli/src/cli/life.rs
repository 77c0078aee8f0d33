//! Maintenance and removal of nodes: ask, tell what it means, follow the progress.

use std::time::Duration;

use xsan_client::ControlClient;
use xsan_protocol::proto::{NodePlan, RemoveNodeRequest, SetMaintenanceRequest};

use super::args::{RemoveOptions, Switch};
use super::{confirm, json, show};
use crate::failure::Failure;
use crate::text::count;

/// Between two looks at a removal; people read the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

pub async fn maintenance(
    client: &ControlClient,
    id: String,
    state: Switch,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> Result<String, Failure> {
    let on = state == Switch::On;
    let plan = client.set_maintenance(SetMaintenanceRequest { node: id, on, force, dry_run }).await?;
    let name = &plan.name;
    let done = match (dry_run, on) {
        (true, _) => show::plan(&plan),
        (false, true) => {
            let leads = match plan.primary_groups {
                0 => "it leads no group".to_owned(),
                primaries => format!("other nodes take over as primary of {}", count(primaries, "group")),
            };
            format!(
                "node {name} is in maintenance; {leads}, and no replica is made elsewhere while it is down"
            )
        }
        (false, false) => format!("node {name} is in maintenance no more"),
    };
    Ok(if as_json { format!("{:#}", json::plan(&plan, dry_run)) } else { done })
}

pub async fn remove(
    client: &ControlClient,
    options: RemoveOptions,
    as_json: bool,
) -> Result<String, Failure> {
    let RemoveOptions { id, force, cancel, dry_run, wait, yes } = options;
    let request = |dry_run| RemoveNodeRequest { node: id.clone(), force, cancel, dry_run };
    if dry_run {
        let plan = client.remove_node(request(true)).await?;
        return Ok(if as_json { format!("{:#}", json::plan(&plan, true)) } else { show::plan(&plan) });
    }
    if !cancel && !yes {
        let plan = client.remove_node(request(true)).await?;
        if plan.refusal.is_none() && !confirm(&question(&plan))? {
            return Err(Failure::NotConfirmed);
        }
    }
    let plan = client.remove_node(request(false)).await?;
    let name = &plan.name;
    if wait {
        follow(client, name).await?;
    }
    if as_json {
        return Ok(format!("{:#}", json::plan(&plan, false)));
    }
    let mut text = match (cancel, wait) {
        (true, _) => format!("node {name} stays; replicas that moved come back"),
        (false, true) => format!("node {name} is removed"),
        (false, false) => {
            format!("node {name} leaves: {}; xsan-cli node list shows the progress", show::moves(&plan))
        }
    };
    if force {
        text = format!("{}\n{text}", show::losses(&plan));
    }
    Ok(text)
}

fn question(plan: &NodePlan) -> String {
    let losses =
        if plan.groups_lost.is_empty() { String::new() } else { format!("{}\n", show::losses(plan)) };
    format!("{losses}Remove node {} ({})?", plan.name, show::moves(plan))
}

/// Tells on stderr how far a removal is, until the node is gone.
async fn follow(client: &ControlClient, name: &str) -> Result<(), Failure> {
    let mut last = String::new();
    loop {
        let status = client.cluster_status().await?;
        let node = status.nodes.iter().find(|status| status.node.as_ref().is_some_and(|n| n.name == name));
        let Some(node) = node else { return Ok(()) };
        let line = show::progress(node, &status.groups.unwrap_or_default());
        if line != last {
            eprintln!("{line}");
            last = line;
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
}
