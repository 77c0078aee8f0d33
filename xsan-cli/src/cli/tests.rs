//! What the commands print, in full: reading these tests is looking at the screen.

use clap::{CommandFactory, Parser};
use xsan_protocol::health::Check;
use xsan_protocol::proto::{
    ClusterStatusReply, ErrorDetail, Event, GroupCounts, ListEventsReply, NodePlan, NodeStatus,
};

use super::args::Durability;
use super::*;
use crate::sample;

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

fn parse(command: &str) -> Result<Args, clap::Error> {
    Args::try_parse_from(["xsan-cli"].into_iter().chain(command.split_whitespace()))
}

#[test]
fn cluster_status_tells_health_nodes_and_what_to_look_at() {
    let shown = show::cluster_status(&sample::cluster_status());
    assert_eq!(
        lines(&shown),
        [
            "Cluster    xsan-cluster-001",
            "Health     degraded: 256 of 256 groups with fewer replicas; one more failure stops 256",
            "Nodes      2 of 3 up, 1 down, 3 voters",
            "Leader     node-001 (term 3, map version 42)",
            "Volumes    1",
            "Space      4.19 GiB of 24 GiB used (17 %)",
            "Groups     256: 256 degraded, 12 resyncing, 256 at risk",
            "Resync     12 MiB moved, 100 MiB left, 10 MiB/s, 10.0 s to go",
            "Out after  600 s down (down-out-interval)",
            "",
            "NODE      ID  STATE        ADDRESS         DOMAIN  PRIMARY  REPLICAS  LEARNERS      USED  CAPACITY",
            "node-001   1  up (leader)  127.0.0.1:8080  rack-1      128       256         0  1.40 GiB     8 GiB",
            "node-002   2  up           127.0.0.2:8080  rack-1      128       256         0  1.40 GiB     8 GiB",
            "node-003   3  down         127.0.0.3:8080  rack-2        0         0       256  1.40 GiB     8 GiB",
            "",
            "warning NODE_DOWN: node node-003: no beat for 42 s",
            "warning GROUPS_DEGRADED: groups: 256 of 256 groups have fewer live replicas than wanted",
        ]
    );
}

#[test]
fn a_status_does_not_drown_in_findings() {
    let damage = sample::finding(Check::ScrubErrors, "group 1.7", "1 pages can not be mended");
    let status = ClusterStatusReply { findings: vec![damage; 256], ..sample::cluster_status() };
    let shown = show::cluster_status(&status);
    assert_eq!(shown.matches("error SCRUB_ERRORS: group 1.7: ").count(), 10);
    assert_eq!(lines(&shown).last(), Some(&"246 more: xsan-cli health"));
}

#[test]
fn health_is_the_worst_that_is_true() {
    let groups = |degraded, inactive, resyncing| GroupCounts {
        total: 256,
        degraded,
        inactive,
        resyncing,
        ..GroupCounts::default()
    };
    let shown = |groups: GroupCounts| {
        let status = ClusterStatusReply { groups: Some(groups), ..ClusterStatusReply::default() };
        lines(&show::cluster_status(&status))[1].to_owned()
    };
    assert_eq!(
        shown(groups(9, 1, 9)),
        "Health     inactive: 1 of 256 groups without enough replicas, no I/O there"
    );
    assert_eq!(
        shown(groups(9, 0, 9)),
        "Health     degraded: 9 of 256 groups with fewer replicas, all I/O goes on"
    );
    assert_eq!(shown(groups(0, 0, 9)), "Health     resyncing: 9 of 256 groups bringing a replica up to date");
    assert_eq!(shown(groups(0, 0, 0)), "Health     healthy: every replica is up to date");
    assert_eq!(shown(GroupCounts::default()), "Health     healthy: no volumes yet");
}

#[test]
fn node_info_shows_addresses_and_stores() {
    let shown = show::node(&sample::node_status(2));
    assert_eq!(
        lines(&shown),
        [
            "Node            node-002 (number 2)",
            "State           up",
            "Last heartbeat  120 ms ago",
            "Voter           yes",
            "Failure domain  rack-1",
            "Control plane   127.0.0.2:8080",
            "Data plane      127.0.0.2:9100, 127.0.0.2:9101",
            "NBD             nbd://127.0.0.2:10809",
            "Groups          primary of 128, replica of 256, learner of 0",
            "Space           1.40 GiB of 8 GiB used (17 %)",
            "Release         0.1.0",
            "",
            "STORE             DEVICE                          CACHE         MEDIA  STATE      USED  CAPACITY  JOURNAL  WRITE P99 µs  CHECKSUM ERRORS  REPAIRED PAGES",
            "0123456789abcdef  /var/lib/xsan/data/store-0.img  /dev/nvme0n1  ssd    ok     1.40 GiB     8 GiB     29 %           180                1               1",
        ]
    );
}

#[test]
fn volumes_are_listed_and_described() {
    let shown = show::volumes(&[sample::volume_status()]);
    assert_eq!(
        lines(&shown),
        [
            "VOLUME    SIZE  REPLICAS  STATE     ATTACHED  POLICY",
            "vm-1    100 GB         3  degraded  node-002  -",
        ]
    );
    assert!(show::volumes(&[]).contains("xsan-cli volume create"));
    let shown = show::volume(&sample::volume_status(), &sample::map());
    assert_eq!(
        lines(&shown),
        [
            "Volume      vm-1 (number 1)",
            "State       degraded",
            "Size        100 GB (100000000000 bytes)",
            "Replicas    3, I/O needs 2",
            "Durability  on-flush",
            "Policy      none",
            "Created     2026-11-21 04:30:00 UTC",
            "Attached    node-002",
            "Open at     nbd://127.0.0.1:10809/vm-1",
            "            nbd://127.0.0.2:10809/vm-1",
            "            nbd://127.0.0.3:10809/vm-1",
        ]
    );
}

/// The volume was made, then a read failed: the command failed as if nothing had been done.
#[tokio::test]
async fn a_change_that_was_made_is_told_though_the_cluster_answers_no_more() {
    let deadline = Duration::from_millis(50);
    let options = xsan_client::Options {
        connect_timeout: deadline,
        attempt_timeout: deadline,
        deadline,
        unreachable_deadline: deadline,
    };
    let dead = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
    let client = ControlClient::new(vec![dead.into()], options);
    let shown = describe_changed(&client, &sample::volume(), false, "created").await;
    assert_eq!(
        lines(&shown),
        [
            "volume vm-1 created",
            "",
            "Volume      vm-1 (number 1)",
            "Size        100 GB (100000000000 bytes)",
            "Durability  on-flush",
            "Policy      none",
            "Created     2026-11-21 04:30:00 UTC",
        ]
    );
    let shown = describe_changed(&client, &sample::volume(), true, "resized").await;
    let value: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    assert_eq!((&value["name"], &value["size_bytes"]), (&"vm-1".into(), &100_000_000_000u64.into()));
    assert_eq!((&value["state"], &value["nbd"]), (&serde_json::Value::Null, &serde_json::Value::Null));
}

#[test]
fn what_is_wrong_with_a_store_is_told() {
    let mut status = sample::node_status(2);
    assert_eq!(json::node(&status)["stores"][0]["problem"], serde_json::Value::Null);
    status.stores[0].problem = "can not be opened: neither checkpoint is valid".into();
    let shown = show::node(&status);
    assert_eq!(
        lines(&shown)[14..],
        ["", "warning: /var/lib/xsan/data/store-0.img can not be opened: neither checkpoint is valid"]
    );
    assert_eq!(json::node(&status)["stores"][0]["problem"], status.stores[0].problem);
}

#[test]
fn json_has_numbers_for_sizes_and_text_for_ids() {
    let value = json::cluster_status(&sample::cluster_status());
    assert_eq!(value["health"], "degraded");
    assert_eq!(value["leader"], "node-001");
    assert_eq!(json::cluster_status(&ClusterStatusReply::default())["leader"], serde_json::Value::Null);
    assert_eq!(value["groups"]["degraded"], 256);
    assert_eq!(value["resync"]["moved_bytes"], 12 << 20);
    assert_eq!(value["nodes"][1]["stores"][0]["id"], "0123456789abcdef");
    assert_eq!(value["nodes"][2]["state"], "down");
    let value = json::volume(&sample::volume_status(), &sample::map());
    assert_eq!(value["size_bytes"], 100_000_000_000u64);
    assert_eq!(value["durability"], "on-flush");
    assert_eq!(value["nbd"][1], "nbd://127.0.0.2:10809/vm-1");
    assert_eq!(json::volumes(&[]), serde_json::json!([]));
}

#[test]
fn a_volume_is_made_from_sizes_as_people_write_them() {
    let args = parse("volume create --name vm-1 --size 100GB --replica-count 3").expect("valid");
    let Command::Volume { command: VolumeCommand::Create(options) } = args.command else {
        panic!("{args:?}")
    };
    assert_eq!((options.name.get(), options.size.0), ("vm-1", 100_000_000_000));
    assert_eq!((options.replica_count, options.durability), (Some(3), Durability::OnFlush));
}

#[test]
fn names_are_taken_with_and_without_the_option() {
    for command in [
        "volume info vm-1",
        "volume info --name vm-1",
        "volume delete vm-1 --yes",
        "volume delete -y --name vm-1",
    ] {
        let args = parse(command).expect(command);
        match args.command {
            Command::Volume {
                command: VolumeCommand::Info { name } | VolumeCommand::Delete { name, .. },
            } => {
                assert_eq!(name.get(), "vm-1");
            }
            other => panic!("{other:?}"),
        }
    }
    parse("volume info").expect_err("no name");
    parse("volume info a --name b").expect_err("two names");
}

#[test]
fn options_of_the_connection_go_anywhere() {
    let args = parse("--address 127.0.0.3:8080 cluster status --json").expect("valid");
    assert_eq!(args.connection.address[0].to_string(), "127.0.0.3:8080");
    assert!(args.connection.json);
    let args = parse("cluster status --address 10.0.0.1,10.0.0.2:81").expect("valid");
    let shown: Vec<_> = args.connection.address.iter().map(ToString::to_string).collect();
    assert_eq!(shown, ["10.0.0.1:8080", "10.0.0.2:81"]);
}

#[test]
fn wrong_usage_is_exit_code_2_and_says_what_is_wrong() {
    for (command, expected) in [
        ("volume create --name a", "--size"),
        ("volume create --name a --size 10G", "has an unknown unit; the units are B, kB, MB"),
        ("volume create --name a --size 0", "is not more than 0"),
        ("volume resize a --size -5GB", "is not more than 0"),
        ("volume create --name a --size 2PB", "is more than 1 PiB, the largest volume"),
        ("volume create --name a --size 1000", "is not a multiple of 512 bytes"),
        ("volume create --name a --size 1GB --replica-count 6", "6 is not in 1..=5"),
        ("volume create --name a --size 1GB --replica-count 0", "0 is not in 1..=5"),
        ("--address http://x cluster status", "is not an address; write HOST or HOST:PORT"),
        ("--timeout 0 cluster status", "0 is not in 1..=3600"),
        ("volumes list", "unrecognized subcommand"),
        ("cluster set scrub-interval 5", "is not a whole number of s, min, h or d"),
        ("cluster set scrub-interval d", "is not a whole number of s, min, h or d"),
        ("cluster set scrub-interval 0s", "is not more than 0"),
        ("cluster set scrub-interval 99999999999999999999d", "is too long"),
    ] {
        let error = parse(command).expect_err(command);
        assert_eq!(error.exit_code(), 2, "{command}");
        assert!(error.to_string().contains(expected), "{command}: {error}");
    }
}

#[test]
fn help_has_examples_and_exit_codes() {
    let help = Args::command().render_long_help().to_string();
    assert!(help.contains("xsan-cli volume create --name vm-1 --size 100GB --replica-count 3"));
    assert!(help.contains("3  nothing answers at any address"));
    Args::command().debug_assert();
}

/// The commands that do something, whose help shows no call of them.
fn without_example(command: &clap::Command, path: &str) -> Vec<String> {
    let path = format!("{path} {}", command.get_name());
    if command.has_subcommands() {
        return command.get_subcommands().flat_map(|command| without_example(command, &path)).collect();
    }
    let help = command.get_after_long_help().or(command.get_after_help());
    let text = help.map(ToString::to_string).unwrap_or_default();
    // Options of the program may stand before the command.
    let words: Vec<&str> = path.split_whitespace().collect();
    let shown = text.lines().any(|line| {
        let rest = line.trim_start().strip_prefix(words[0]).map(|rest| rest.replace(" --json", ""));
        rest.is_some_and(|rest| {
            format!("{rest} ").starts_with(&format!(" {} ", words[1..].join(" ")).replace("  ", " "))
        })
    });
    if shown { Vec::new() } else { vec![path.trim().to_owned()] }
}

/// README.md and docs/operations promise them.
#[test]
fn every_command_has_an_example() {
    let programs = [Args::command(), crate::debug::Args::command(), crate::node::Args::command()];
    let missing: Vec<String> = programs.iter().flat_map(|program| without_example(program, "")).collect();
    assert!(missing.is_empty(), "no example in the help of: {missing:?}");
}

#[test]
fn completion_knows_the_commands() {
    let script = completion::<Args>(clap_complete::Shell::Bash, "xsan-cli");
    assert!(script.contains("volume") && script.contains("--replica-count"));
}

#[test]
fn a_node_in_maintenance_or_leaving_is_seen_in_every_list() {
    let leaving = NodeStatus { leaving: true, ..sample::node_status(2) };
    let resting = NodeStatus { maintenance: true, ..sample::node_status(3) };
    let lost = NodeStatus { leaving: true, lost: true, ..sample::node_status(3) };
    let shown = show::nodes(&[sample::node_status(1), leaving.clone(), resting.clone(), lost]);
    let states: Vec<_> =
        lines(&shown)[1..].iter().map(|line| line[14..].split("  ").next().expect("a state")).collect();
    assert_eq!(states, ["up (leader)", "up, leaving", "down, maintenance", "down, given up"]);
    let status = ClusterStatusReply { nodes: vec![leaving, resting.clone()], ..sample::cluster_status() };
    let shown = show::cluster_status(&status);
    assert_eq!(lines(&shown)[2], "Nodes      1 of 2 up, 1 down, 1 in maintenance, 1 leaving, 2 voters");
    assert_eq!(json::node(&resting)["maintenance"], true);
    assert_eq!(json::cluster_status(&status)["settings"]["down_out_interval_ms"], 600_000);
    assert_eq!(json::cluster_status(&status)["resync"]["left_ms"], 10_000);
}

fn plan() -> NodePlan {
    NodePlan {
        name: "node-004".into(),
        groups: 192,
        primary_groups: 64,
        moves: 192,
        bytes_to_move: 3 << 30,
        bytes_per_second: 100 << 20,
        ..NodePlan::default()
    }
}

#[test]
fn a_dry_run_tells_moves_time_risk_and_verdict() {
    assert_eq!(
        lines(&show::plan(&plan())),
        [
            "Node      node-004",
            "Groups    replica of 192, primary of 64",
            "Moves     192 replicas and 3 GiB to move, 30.7 s at 100 MiB/s (assumed)",
            "Risk      none",
            "Would be  accepted",
            "Changed   nothing: dry run",
        ]
    );
    let detail = ErrorDetail { code: 112, object: "node node-004".into(), message: "no room".into() };
    let refused = NodePlan { refusal: Some(detail), groups_at_risk: 1, ..plan() };
    let shown = show::plan(&refused);
    assert_eq!(
        lines(&shown)[3..5],
        ["Risk      one more failure stops 1 group", "Would be  refused, error 112: no room"]
    );
    let lost = NodePlan { groups_lost: vec![7, 8], volumes_lost: vec!["vm-1".into()], ..plan() };
    let shown = show::plan(&lost);
    assert_eq!(
        lines(&shown)[3],
        "Risk      LOST: the only copy of 2 groups; blocks of vm-1 read as zeros there"
    );
    assert_eq!(json::plan(&lost, true)["groups_lost"][1], 8);
    // A script that powers a node off when the dry run went well must not.
    assert_eq!(life::dry_run(&refused, true).exit_code, 1);
    assert_eq!(life::dry_run(&plan(), false).exit_code, 0);
}

/// A monitor saw the errors of a bad disk fall to 0 when its host died.
#[test]
fn what_a_silent_node_does_not_tell_is_unknown() {
    let silent = NodeStatus { used_bytes: None, ..sample::node_status(2) };
    let value = json::node(&silent);
    assert_eq!(
        (&value["stores"][0]["checksum_errors"], &value["stores"][0]["capacity_bytes"]),
        (&serde_json::Value::Null, &(8u64 << 30).into())
    );
    let shown = show::node(&silent);
    let row = shown.lines().last().expect("its store");
    assert_eq!(row.split_whitespace().filter(|word| *word == "?").count(), 4, "{row}");
}

#[test]
fn findings_are_listed_and_the_worst_is_the_exit_code() {
    let finding = |code: &str, severity: &str| Finding {
        code: code.into(),
        severity: severity.into(),
        object: "node node-003".into(),
        message: "no beat for 42 s".into(),
        remedy: "start it".into(),
    };
    let found = [finding("NODE_DOWN", "warning"), finding("NODE_LEAVING", "info")];
    assert_eq!(
        lines(&show::findings(&found)),
        [
            "SEVERITY  CODE          OBJECT         WHAT",
            "warning   NODE_DOWN     node node-003  no beat for 42 s; start it",
            "info      NODE_LEAVING  node node-003  no beat for 42 s; start it",
        ]
    );
    assert_eq!(show::findings(&[]), "healthy: nothing was found\n");
    assert_eq!(worst_of(&[]) as u8, 0);
    assert_eq!(worst_of(&found[1..]) as u8, 0);
    assert_eq!(worst_of(&found) as u8, 1);
    assert_eq!(worst_of(&[finding("X", "error")]) as u8, 2);
    assert_eq!(worst_of(&[finding("X", "of the future")]) as u8, 2);
    assert_eq!(json::health(&found)[0]["code"], "NODE_DOWN");
}

#[test]
fn events_are_listed_with_their_times() {
    let event = Event {
        unix_ms: 1_795_235_400_000,
        kind: "node-down".into(),
        object: "node node-003".into(),
        message: "node node-003 is down: it has no lease".into(),
        seen_by: "node-001".into(),
    };
    let silent_nodes = vec!["node-003".into()];
    let reply = ListEventsReply { silent_nodes, events: vec![event], left_out: 40 };
    let shown = show::events(&reply);
    assert_eq!(
        lines(&shown)[1..],
        [
            "2026-11-21 04:30:00 UTC  node-down  node-001  node node-003 is down: it has no lease",
            "note: node node-003 does not answer; what it saw while it led is not listed",
            "note: 40 older events are in the logs of the nodes",
        ]
    );
    let shown = json::events(&reply);
    assert_eq!(
        (&shown["events"][0]["event"], &shown["silent_nodes"][0]),
        (&"node-down".into(), &"node-003".into())
    );
    assert_eq!(show::events(&ListEventsReply::default()), "no events\n");
}

#[test]
fn commands_of_a_nodes_life_are_taken_as_documented() {
    for command in [
        "node maintenance node-003 on --dry-run",
        "node join --dry-run --capacity 4TiB --failure-domain rack-2",
        "node maintenance node-003 off",
        "node remove node-004 --wait --yes",
        "node remove --cancel node-004",
        "node remove node-004 --force",
        "cluster set down-out-interval 600s",
        "cluster set down-out-interval 10min",
        "cluster set scrub-interval off",
        "cluster set deep-scrub-interval 7d",
        "cluster set scrub-rate 50MiB",
        "scrub start",
        "scrub start --deep --group 1.17",
        "scrub start --deep --volume vm-1",
        "scrub status --json",
        "scrub stop",
        "health --json",
        "events --json",
    ] {
        parse(command).expect(command);
    }
    for command in [
        "node maintenance node-003",
        "node maintenance node-003 perhaps",
        "node remove node-004 --cancel --force",
        "node remove node-004 --wait --dry-run",
        "cluster set down-out-interval 600",
        "cluster set down-out-interval 0s",
        "cluster set down-out-interval s",
        "cluster set down-out-interval off",
        "cluster set scrub-rate fast",
        "scrub start --group 1.17 --volume vm-1",
        "scrub start --group 1.x",
    ] {
        assert_eq!(parse(command).expect_err(command).exit_code(), 2, "{command}");
    }
}
