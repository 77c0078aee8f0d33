//! Maintenance and removal of nodes: ask, tell what it means, follow the progress.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use xsan_client::{Address, ClientError, ControlClient, Refusal};
use xsan_nodekit::exit;
use xsan_protocol::proto::{
    AgreedLosses, ClusterStatusReply, Node, NodePlan, NodeStatus, RemoveNodeRequest, SetMaintenanceRequest,
};

use super::args::{RemoveOptions, Switch};
use super::{confirm, json, show};
use crate::failure::{About, Failure, Shown};
use crate::text::count;

/// Between two looks at a removal; people read the progress.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// How long the cluster may be silent before a wait ends: an election, or the restart of a host, is over by then.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// How far a node's answer may be behind the leader: until then it does not know that a removal has begun.
const LAG_MAX: Duration = Duration::from_secs(10);
/// Other nodes that are asked about a removal. Few, as where only those of --address are in reach their turn must come.
const OTHERS_MAX: usize = 3;

pub async fn maintenance(
    client: &ControlClient,
    id: String,
    state: Switch,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> Result<Shown, Failure> {
    let on = state == Switch::On;
    let request = SetMaintenanceRequest { node: id.clone(), on, force, dry_run };
    let plan = client.set_maintenance(request).await.about("node", &id)?;
    if dry_run {
        return Ok(self::dry_run(&plan, as_json));
    }
    let name = &plan.name;
    let done = if on {
        let leads = match plan.primary_groups {
            0 => "it leads no group".to_owned(),
            primaries => format!("other nodes take over as primary of {}", count(primaries, "group")),
        };
        format!("node {name} is in maintenance; {leads}, and no replica is made elsewhere while it is down")
    } else {
        format!("node {name} is in maintenance no more")
    };
    Ok(if as_json { format!("{:#}", json::plan(&plan, false)) } else { done }.into())
}

/// What would be; a failure for scripts if that is a refusal.
pub fn dry_run(plan: &NodePlan, as_json: bool) -> Shown {
    let text = if as_json { format!("{:#}", json::plan(plan, true)) } else { show::plan(plan) };
    Shown { text, exit_code: if plan.refusal.is_some() { exit::REFUSED } else { exit::DONE } }
}

pub async fn remove(client: &ControlClient, options: RemoveOptions, as_json: bool) -> Result<Shown, Failure> {
    let RemoveOptions { id, force, cancel, dry_run, wait, yes } = options;
    let mut request = RemoveNodeRequest { node: id.clone(), force, cancel, dry_run, agreed: None };
    if dry_run {
        let plan = client.remove_node(request).await.about("node", &id)?;
        return Ok(self::dry_run(&plan, as_json));
    }
    if !cancel && !yes {
        let look = RemoveNodeRequest { dry_run: true, ..request.clone() };
        let plan = client.remove_node(look).await.about("node", &id)?;
        // What is refused now may be taken a moment later, when nobody was asked.
        if let Some(refusal) = plan.refusal.clone().and_then(Refusal::from_detail) {
            return Err(ClientError::Refused(refusal).into());
        }
        if !confirm(&question(&plan, force))? {
            return Err(Failure::NotConfirmed);
        }
        // That node, and no more than was agreed to, whatever happened while we asked.
        request.node = plan.node.to_string();
        let (groups_lost, groups_in_doubt) = (plan.groups_lost.len() as u32, plan.groups_in_doubt);
        request.agreed = Some(AgreedLosses { groups_lost, groups_in_doubt });
    }
    // Before the change: a node without replicas is gone at once.
    let (node, others) = if wait { look_around(client, &request.node).await? } else { Default::default() };
    let plan = client.remove_node(request).await.about("node", &id)?;
    let name = &plan.name;
    if wait {
        client.ask_first(others);
        follow(client, Removal::new(node)).await?;
    }
    if as_json {
        return Ok(format!("{:#}", json::plan(&plan, false)).into());
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
    Ok(text.into())
}

fn question(plan: &NodePlan, force: bool) -> String {
    let losses = if force { format!("{}\n", show::losses(plan)) } else { String::new() };
    format!("{losses}Remove node {} ({})?", plan.name, show::moves(plan))
}

/// The node with that name or number, and some others to ask about it: its own processes end with its removal.
async fn look_around(client: &ControlClient, id: &str) -> Result<(Node, Vec<Address>), Failure> {
    let node = client.get_node(id).await.about("node", id)?.node.unwrap_or_default();
    let others = others(&client.cluster_status().await?.nodes, node.id);
    Ok((node, others))
}

fn others(nodes: &[NodeStatus], id: u32) -> Vec<Address> {
    let answering = nodes.iter().filter(|status| status.state != "down").filter_map(|s| s.node.as_ref());
    let address = |node: &Node| {
        let port = u16::try_from(node.control_port).ok()?;
        Some(Address::from(SocketAddr::new(node.address.parse().ok()?, port)))
    };
    answering.filter(|node| node.id != id).filter_map(address).take(OTHERS_MAX).collect()
}

/// Tells on stderr how far a removal is, until the node is gone.
async fn follow(client: &ControlClient, mut removal: Removal) -> Result<(), Failure> {
    let mut told = String::new();
    while let Some(line) = removal.look(client.cluster_status().await, Instant::now())? {
        if line != told {
            eprintln!("{line}");
            told = line;
        }
        tokio::time::sleep(PROGRESS_INTERVAL).await;
    }
    Ok(())
}

/// A removal as the cluster's answers tell it.
struct Removal {
    node: Node,
    /// Since when the cluster does not answer.
    silent_since: Option<Instant>,
    /// Since when it answers that the node stays.
    stays_since: Option<Instant>,
}

impl Removal {
    fn new(node: Node) -> Self {
        Self { node, silent_since: None, stays_since: None }
    }

    /// How far it is by the answer that came `now`; `None` when the node is gone.
    fn look(
        &mut self,
        answer: Result<ClusterStatusReply, ClientError>,
        now: Instant,
    ) -> Result<Option<String>, Failure> {
        let name = &self.node.name;
        let status = match answer {
            Ok(status) => status,
            Err(source) if now - *self.silent_since.get_or_insert(now) >= SILENCE_MAX => {
                return Err(Failure::OutOfSight { node: name.clone(), source });
            }
            Err(_) => return Ok(Some(format!("the cluster does not answer; the removal of {name} goes on"))),
        };
        self.silent_since = None;
        let is_it = |status: &&NodeStatus| status.node.as_ref().is_some_and(|node| node.id == self.node.id);
        let Some(node) = status.nodes.iter().find(is_it) else { return Ok(None) };
        if node.leaving {
            self.stays_since = None;
        } else if now - *self.stays_since.get_or_insert(now) >= LAG_MAX {
            return Err(Failure::TakenBack { node: name.clone() });
        }
        Ok(Some(show::progress(node, &status.groups.unwrap_or_default())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample;

    fn removal() -> (Removal, Instant) {
        (Removal::new(sample::node(2)), Instant::now())
    }

    fn answer(leaving: bool) -> Result<ClusterStatusReply, ClientError> {
        let mut status = sample::cluster_status();
        status.nodes[1].leaving = leaving;
        Ok(status)
    }

    fn silence() -> Result<ClusterStatusReply, ClientError> {
        let addresses = others(&sample::cluster_status().nodes, 2);
        Err(ClientError::Unreachable { addresses, reason: "connection refused".into() })
    }

    #[test]
    fn a_removal_ends_when_no_node_has_the_number() {
        let (mut removal, now) = removal();
        let line = removal.look(answer(true), now).expect("it goes on").expect("it is there");
        assert!(line.starts_with("256 replicas left"), "{line}");
        let mut gone = sample::cluster_status();
        gone.nodes.remove(1);
        // The host may join again under its old name.
        gone.nodes[1].node.as_mut().expect("a node").name = "node-002".into();
        assert_eq!(removal.look(Ok(gone), now).expect("it goes well"), None);
    }

    /// `--wait` went on for ever after `--cancel` in another terminal.
    #[test]
    fn a_removal_that_was_taken_back_is_a_failure_but_a_node_may_learn_of_it_late() {
        let (mut removal, now) = removal();
        removal.look(answer(false), now).expect("not known there yet");
        removal.look(answer(true), now + LAG_MAX).expect("it goes on");
        removal.look(answer(false), now + LAG_MAX * 2).expect("another node, which is behind");
        let failure = removal.look(answer(false), now + LAG_MAX * 3).expect_err("it stays");
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(failure.to_string(), "node node-002 stays in the cluster: its removal was taken back");
    }

    /// One answer that did not come ended a wait of hours.
    #[test]
    fn a_silent_cluster_is_waited_for_but_not_for_ever() {
        let (mut removal, now) = removal();
        let line = removal.look(silence(), now).expect("it may answer again").expect("not known to be gone");
        assert_eq!(line, "the cluster does not answer; the removal of node-002 goes on");
        removal.look(answer(true), now + SILENCE_MAX).expect("it answers");
        removal.look(silence(), now + SILENCE_MAX).expect("it may answer again");
        let failure = removal.look(silence(), now + SILENCE_MAX * 2).expect_err("for too long");
        assert_eq!(failure.exit_code(), exit::NO_ANSWER, "it may end well");
        let words = "nothing answers (connection refused); the removal of node node-002 goes on";
        assert!(failure.to_string().ends_with(words), "{failure}");
    }

    /// What may be the last good copy was given up after a question that did not say so.
    #[test]
    fn the_question_tells_what_force_gives_up() {
        let plan = NodePlan { name: "node-003".into(), groups_in_doubt: 256, ..NodePlan::default() };
        assert!(
            question(&plan, true).starts_with("AT RISK: of 256 groups no other node"),
            "{}",
            question(&plan, true)
        );
        assert_eq!(question(&plan, false), "Remove node node-003 (no replica to move)?");
    }

    #[test]
    fn other_nodes_are_asked_about_a_removal_not_itself_and_none_that_is_down() {
        let shown = |id| others(&sample::cluster_status().nodes, id).iter().map(Address::to_string).collect();
        let (of_2, of_3): (Vec<_>, Vec<_>) = (shown(2), shown(3));
        assert_eq!(of_2, ["127.0.0.1:8080"]);
        assert_eq!(of_3, ["127.0.0.1:8080", "127.0.0.2:8080"]);
    }
}
