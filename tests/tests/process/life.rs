//! The life of a cluster: nodes in maintenance, nodes that leave, what is refused, and what `health` finds.

use std::time::Duration;

use serde_json::{Value, json};
use xsan_protocol::error::Code;
use xsan_protocol::proto::NodeStatus;
use xsan_tests::cluster::{Cluster, RESYNC_DEADLINE, SETTLE_DEADLINE};
use xsan_tests::node::NodeOptions;
use xsan_tests::wait::{Look, until};
use xsan_tests::writer::{Work, Writer};

/// Small devices: laying them out is most of a start.
fn options() -> NodeOptions {
    NodeOptions { file_size: "1GiB".to_owned(), ..NodeOptions::default() }
}

/// Codes that `xsan-cli health` finds, and its exit code.
fn health(cluster: &Cluster) -> (Vec<String>, Option<i32>) {
    let answer = cluster.cli(&["--json", "health"]).unwrap();
    let findings: Value = serde_json::from_str(&answer.stdout).unwrap();
    let codes =
        findings.as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap().to_owned());
    (codes.collect(), answer.exit_code)
}

fn wait_health(cluster: &Cluster, what: &str, holds: impl Fn(&[String], Option<i32>) -> bool) {
    until(what, SETTLE_DEADLINE, || {
        let (codes, exit_code) = health(cluster);
        Ok(if holds(&codes, exit_code) { Look::Done(()) } else { Look::NotYet(codes.join(", ")) })
    })
    .unwrap();
}

fn event_kinds(cluster: &Cluster) -> Vec<String> {
    let events = cluster.cli_json(&["events"]).unwrap();
    let events = events["events"].as_array().unwrap();
    events.iter().map(|event| event["event"].as_str().unwrap().to_owned()).collect()
}

/// The node's log says that it was removed, and what to do.
fn wait_told(cluster: &Cluster, index: usize) {
    until("the node to be told that it was removed", SETTLE_DEADLINE, || {
        let log = cluster.node(index).log_text()?;
        let told = log.contains(&format!("error {} NodeRemoved", Code::NodeRemoved.number()))
            && log.contains(Code::NodeRemoved.remedy());
        Ok(if told { Look::Done(()) } else { Look::NotYet("its log does not say so".to_owned()) })
    })
    .unwrap();
}

#[test]
fn a_node_in_maintenance_goes_and_comes_back_without_a_rebuild_or_an_error() {
    let mut cluster = Cluster::start_with(4, options()).unwrap();
    cluster.create_volume("vm", "256MiB", 3).unwrap();
    // Soon enough to be seen, were it not for the maintenance.
    cluster.cli(&["cluster", "set", "down-out-interval", "5s"]).unwrap().succeeded().unwrap();
    assert_eq!(cluster.cli_json(&["cluster", "status"]).unwrap()["settings"]["down_out_interval_ms"], 5000);

    let plan = cluster.cli_json(&["node", "maintenance", "node-004", "on", "--dry-run"]).unwrap();
    assert_eq!((&plan["refusal"], &plan["groups_stopped"]), (&Value::Null, &Value::from(0)));
    assert!(plan["primary_groups"].as_u64().unwrap() > 0);
    assert_eq!(cluster.cli_json(&["node", "info", "node-004"]).unwrap()["maintenance"], false);

    cluster.cli(&["node", "maintenance", "node-004", "on"]).unwrap().succeeded().unwrap();
    cluster
        .wait_status("node-004 to lead no group", SETTLE_DEADLINE, |status| {
            status.nodes.iter().any(|node| node.maintenance && node.primary_groups == 0)
        })
        .unwrap();
    assert_eq!(cluster.cli_json(&["node", "info", "node-004"]).unwrap()["maintenance"], true);
    let shown = cluster.cli(&["node", "list"]).unwrap().succeeded().unwrap().stdout;
    assert!(shown.contains("up, maintenance"), "{shown}");

    let writer = Writer::start(Work::new(vec![cluster.node(0).nbd], "vm", 0..2000, 41)).unwrap();
    cluster.stop_node(3).unwrap();
    cluster
        .wait_status("node-004 to be counted out", SETTLE_DEADLINE, |status| {
            // A primary that misses it makes it a learner, until the control plane knows that it has stopped.
            status.groups.is_some_and(|groups| groups.degraded > 0 && groups.resyncing == 0)
        })
        .unwrap();
    // Longer than the interval: a node without maintenance would be left out by now.
    let until_left_out = std::time::Instant::now() + Duration::from_secs(7);
    cluster
        .wait_status("the interval to pass", SETTLE_DEADLINE, |status| {
            let groups = status.groups.unwrap_or_default();
            assert_eq!((groups.resyncing, groups.inactive), (0, 0), "no replica is made elsewhere");
            std::time::Instant::now() >= until_left_out
        })
        .unwrap();
    writer.wait_operations(200, SETTLE_DEADLINE).unwrap();
    // One more would stop groups.
    let another = ["node", "maintenance", "node-003", "on"];
    cluster
        .cli(&another)
        .unwrap()
        .refused_with(&[Code::MaintenanceStopsIo], &["node-003", "groups"])
        .unwrap();

    cluster.restart(3).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    cluster.cli(&["node", "maintenance", "node-004", "off"]).unwrap().succeeded().unwrap();
    let report = writer.stop().unwrap();
    assert_eq!(report.losses, 0, "the writer saw no error");
    report.verify(&mut cluster.connect(3, "vm").unwrap(), 41).unwrap();
    let kinds = event_kinds(&cluster);
    for kind in ["maintenance-on", "node-down", "node-up", "maintenance-off", "groups-reconfigured"] {
        assert!(kinds.iter().any(|found| found == kind), "{kind} is not in {kinds:?}");
    }
}

#[test]
fn a_removed_node_gives_its_replicas_away_under_a_writer_and_is_told_to_go() {
    let mut cluster = Cluster::start(4).unwrap();
    cluster.create_volume("vm", "256MiB", 3).unwrap();
    // The leader: the control plane changes hands on the way.
    let victim = cluster.leader().unwrap();
    let name = cluster.node(victim).name.clone();
    let others: Vec<usize> = (0..4).filter(|index| *index != victim).collect();
    let gateway = cluster.node(others[0]).nbd;
    // Mostly reads, on devices of the usual size: a replica that has left its group keeps the tail of its journal, so
    // that under many writes the journal of a small device fills up before the node is gone.
    let work = Work { read_percent: 75, ..Work::new(vec![gateway], "vm", 0..4000, 43) };
    let writer = Writer::start(work).unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();
    let plan = cluster.cli_json(&["node", "remove", &name, "--dry-run"]).unwrap();
    assert_eq!(plan["refusal"], Value::Null);
    assert!(plan["moves"].as_u64().unwrap() > 0, "{plan}");

    cluster.cli(&["node", "remove", &name, "--yes"]).unwrap().succeeded().unwrap();
    // While it goes, no group has fewer replicas than it should have.
    cluster
        .wait_status("the node to leave", RESYNC_DEADLINE, |status| {
            let groups = status.groups.unwrap_or_default();
            assert_eq!((groups.degraded, groups.inactive), (0, 0), "redundancy stays");
            status.nodes.len() == 3
        })
        .unwrap();
    let status = cluster.status().unwrap();
    assert!(status.nodes.iter().all(|status| status.node.as_ref().is_some_and(|node| node.name != name)));
    let voters = status.nodes.iter().filter(|node| node.node.as_ref().is_some_and(|node| node.voter)).count();
    assert_eq!(voters, 3, "another node votes in its place");
    wait_told(&cluster, victim);
    cluster.kill_node(victim).unwrap();

    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();
    let report = writer.stop().unwrap();
    assert_eq!(report.losses, 0, "the writer saw no error");
    // Every replica that is left holds everything: any of the others may go.
    for dead in [others[1], others[2]] {
        cluster.kill_node(dead).unwrap();
        report.verify(&mut cluster.connect(others[0], "vm").unwrap(), 43).unwrap();
        cluster.restart(dead).unwrap();
        cluster
            .wait_status("every replica to act", RESYNC_DEADLINE, |status| {
                let groups = status.groups.unwrap_or_default();
                groups.total > 0 && groups.healthy == groups.total && groups.resyncing == 0
            })
            .unwrap();
    }
}

#[test]
fn a_dead_node_is_replaced_and_a_new_one_takes_its_share_under_a_writer() {
    let mut cluster = Cluster::start_with(4, options()).unwrap();
    cluster.cli(&["cluster", "set", "down-out-interval", "5s"]).unwrap().succeeded().unwrap();
    cluster.create_volume("vm", "256MiB", 3).unwrap();
    let work = Work { read_percent: 50, ..Work::new(vec![cluster.node(0).nbd], "vm", 0..4000, 44) };
    let writer = Writer::start(work).unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();

    cluster.kill_node(3).unwrap();
    let mut missed = false;
    cluster
        .wait_status("three replicas of everything on three nodes", RESYNC_DEADLINE, |status| {
            let groups = status.groups.unwrap_or_default();
            let down = status.nodes.iter().any(|node| node.state == "down");
            missed |= groups.degraded > 0;
            assert_eq!(groups.inactive, 0, "two replicas are left of everything");
            down && missed && groups.healthy == groups.total && groups.resyncing == 0
        })
        .unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();

    let plan = cluster.cli_json(&["node", "join", "--dry-run", "--capacity", "8GiB"]).unwrap();
    assert!(plan["moves"].as_u64().unwrap() > 0, "{plan}");
    let joined = cluster.add_node().unwrap();
    let name = cluster.node(joined).name.clone();
    cluster
        .wait_status("the new node to have its share", RESYNC_DEADLINE, |status| {
            let groups = status.groups.unwrap_or_default();
            assert_eq!((groups.degraded, groups.inactive), (0, 0), "at no time are there fewer replicas");
            let is_it = |node: &&NodeStatus| node.node.as_ref().is_some_and(|node| node.name == name);
            // Three replicas of each group on four nodes.
            let share = status.nodes.iter().find(is_it).map_or(0, |node| node.member_groups);
            groups.resyncing == 0 && share * 4 > groups.total * 3 * 8 / 10
        })
        .unwrap();
    writer.wait_operations(500, SETTLE_DEADLINE).unwrap();
    let report = writer.stop().unwrap();
    assert_eq!(report.losses, 0, "the writer saw no error");
    // Whoever led saw them, and is still asked.
    let kinds = event_kinds(&cluster);
    for kind in ["node-down", "resync-finished", "node-joined"] {
        assert!(kinds.iter().any(|found| found == kind), "{kind} is not in {kinds:?}");
    }
    // What the new node has is worth as much: one of the others may go.
    cluster.kill_node(2).unwrap();
    report.verify(&mut cluster.connect(joined, "vm").unwrap(), 44).unwrap();
}

/// The volume is shown as attached at these nodes.
fn wait_attached(cluster: &Cluster, nodes: &[&str]) {
    until("the volume to be attached there alone", SETTLE_DEADLINE, || {
        let attached = cluster.cli_json(&["volume", "info", "vm"])?["attached"].clone();
        Ok(if attached == json!(nodes) { Look::Done(()) } else { Look::NotYet(attached.to_string()) })
    })
    .unwrap();
}

/// What a dead node had open could neither be closed nor deleted, and the node not be removed but by force.
#[test]
fn a_dead_node_keeps_no_volume_open_and_can_be_removed() {
    let mut cluster = Cluster::start_with(4, options()).unwrap();
    cluster.cli(&["cluster", "set", "down-out-interval", "5s"]).unwrap().succeeded().unwrap();
    cluster.create_volume("vm", "64MiB", 3).unwrap();
    let client = cluster.connect(3, "vm").unwrap();
    wait_attached(&cluster, &["node-004"]);
    let delete = ["volume", "delete", "vm", "--yes"];
    cluster.cli(&delete).unwrap().refused_with(&[Code::VolumeAttached], &["vm", "node-004"]).unwrap();

    cluster.kill_node(3).unwrap();
    drop(client);
    cluster.cli(&delete).unwrap().refused_with(&[Code::VolumeAttached], &["vm", "node-004"]).unwrap();
    wait_attached(&cluster, &[]);
    cluster.cli(&["node", "remove", "node-004", "--yes", "--wait"]).unwrap().succeeded().unwrap();
    assert_eq!(cluster.status().unwrap().nodes.len(), 3);
    cluster.cli(&delete).unwrap().succeeded().unwrap();
}

#[test]
fn what_would_lose_redundancy_is_refused_and_health_tells_what_is_missing() {
    let mut cluster = Cluster::start_with(3, options()).unwrap();
    cluster.create_volume("vm", "256MiB", 3).unwrap();
    wait_health(&cluster, "nothing to be found", |codes, exit_code| codes.is_empty() && exit_code == Some(0));

    let remove = ["node", "remove", "node-003", "--yes"];
    cluster.cli(&remove).unwrap().refused_with(&[Code::NodeNeeded], &["node-003", "add a node"]).unwrap();
    let dry_run = cluster.cli(&["--json", "node", "remove", "node-003", "--dry-run"]).unwrap();
    let plan: Value = serde_json::from_str(&dry_run.stdout).unwrap();
    assert_eq!(plan["refusal"]["number"], Code::NodeNeeded.number());
    assert_eq!(dry_run.exit_code, Some(1), "a script that goes on after it must not");
    let forced = ["node", "remove", "node-003", "--force", "--yes"];
    cluster.cli(&forced).unwrap().refused_with(&[Code::NodeIsUp], &["node-003"]).unwrap();
    let unknown = ["node", "remove", "node-009", "--yes"];
    cluster.cli(&unknown).unwrap().refused_with(&[Code::NodeNotFound], &["node-009"]).unwrap();
    let soon = ["cluster", "set", "down-out-interval", "1s"];
    cluster.cli(&soon).unwrap().refused_with(&[Code::InvalidArgument], &["down-out-interval"]).unwrap();
    assert!(cluster.status().unwrap().nodes.iter().all(|node| !node.leaving && !node.maintenance));

    cluster.kill_node(2).unwrap();
    wait_health(&cluster, "the dead node to be found", |codes, exit_code| {
        let has = |code: &str| codes.iter().any(|found| found == code);
        has("NODE_DOWN") && has("GROUPS_DEGRADED") && has("NO_QUORUM_MARGIN") && exit_code == Some(1)
    });
    let maintenance = ["node", "maintenance", "node-002", "on"];
    cluster.cli(&maintenance).unwrap().refused_with(&[Code::MaintenanceStopsIo], &["node-002"]).unwrap();
    cluster.cli(&["node", "maintenance", "node-003", "on"]).unwrap().succeeded().unwrap();
    cluster.cli(&["node", "maintenance", "node-003", "off"]).unwrap().succeeded().unwrap();
    cluster.restart(2).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();
    wait_health(&cluster, "nothing to be found again", |codes, exit_code| {
        codes.is_empty() && exit_code == Some(0)
    });

    // A leader without the other voters goes on believing that it leads; nothing that it says of the nodes is certain.
    let leader = cluster.leader().unwrap();
    let others: Vec<usize> = (0..3).filter(|node| *node != leader).collect();
    others.iter().for_each(|node| cluster.kill_node(*node).unwrap());
    wait_health(&cluster, "the lost quorum to be found", |codes, exit_code| {
        let has = |code: &str| codes.iter().any(|found| found == code);
        has("NO_LEADER") && has("GROUPS_UNAVAILABLE") && !has("NO_QUORUM_MARGIN") && exit_code == Some(2)
    });
    assert_eq!(cluster.cli_json(&["volume", "info", "vm"]).unwrap()["state"], "inactive");
    cluster.start_again(&others).unwrap();
    cluster.wait_healthy(RESYNC_DEADLINE).unwrap();

    // Given up for dead, with nothing lost; the others go on with two replicas.
    cluster.kill_node(2).unwrap();
    cluster
        .wait_status("node-003 to be down", SETTLE_DEADLINE, |status| {
            status.nodes.iter().any(|node| node.state == "down")
        })
        .unwrap();
    let given_up = cluster.cli(&[&forced[..], &["--wait"]].concat()).unwrap().succeeded().unwrap();
    assert!(given_up.stdout.contains("nothing is lost"), "{}", given_up.stdout);
    assert!(given_up.stdout.contains("node node-003 is removed"), "{}", given_up.stdout);
    assert_eq!(cluster.status().unwrap().nodes.len(), 2);
    cluster.connect(0, "vm").unwrap().read(0, &mut [0; 4096]).unwrap();
    // Its own log ends before that: the leader's answer to its beat tells it. It may look ready for a moment.
    drop(cluster.restart(2));
    wait_told(&cluster, 2);
}
