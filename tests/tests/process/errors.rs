//! Bad input: each gets a numbered error that names the object, a failing exit code, and nothing half done.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use serde_json::json;
use xsan_protocol::error::Code;
use xsan_tests::cluster::{Answer, CLUSTER_ID, Cluster};
use xsan_tests::node::{FirstStart, Node, NodeOptions, program};

/// Runs a node's first start that must be refused before it serves.
fn refused(command: &mut Command, codes: &[Code], words: &[&str]) {
    Answer::of(command).unwrap().refused_with(codes, words).unwrap();
}

/// The same first start with a change to its arguments.
fn changed(node: &Node, how: FirstStart, option: &str, value: &str) -> Command {
    let original = node.first_command(CLUSTER_ID, how);
    let mut arguments: Vec<_> = original.get_args().map(ToOwned::to_owned).collect();
    let position = arguments.iter().position(|argument| argument == option).expect("the option is there");
    arguments[position + 1] = value.into();
    let mut command = Command::new(original.get_program());
    command.args(arguments);
    command
}

fn holds_no_node(data_dir: &Path) {
    let file = data_dir.join("node.json");
    assert!(!file.exists(), "{} was left behind", file.display());
}

#[test]
fn a_join_that_is_refused_leaves_nothing_and_can_be_put_right() {
    let mut cluster = Cluster::start(1).unwrap();
    let spare = cluster.spare_node().unwrap();
    let join = cluster.next_start();

    refused(
        &mut changed(&spare, join, "--cluster-id", "another-cluster"),
        &[Code::ClusterIdMismatch],
        &["another-cluster"],
    );
    holds_no_node(&spare.data_dir);
    refused(&mut changed(&spare, join, "--node-id", "node-001"), &[Code::NodeIdTaken], &["node-001"]);
    holds_no_node(&spare.data_dir);
    let nobody = "127.63.200.200:8080";
    refused(&mut changed(&spare, join, "--join-address", nobody), &[Code::JoinAddressDead], &[nobody]);
    holds_no_node(&spare.data_dir);

    assert_eq!(cluster.status().unwrap().nodes.len(), 1, "a refused node is counted");
    drop(spare);
    cluster.add_node().unwrap();
    assert_eq!(cluster.status().unwrap().nodes.len(), 2);
}

#[test]
fn a_data_directory_that_holds_a_node_is_not_founded_again() {
    let mut cluster = Cluster::start(1).unwrap();
    cluster.stop_node(0).unwrap();
    let node = cluster.node(0);
    let command = node.first_command("xsan-other", FirstStart::Init);
    let mut again = Command::new(command.get_program());
    again.args(command.get_args());
    refused(&mut again, &[Code::ClusterExists], &[&node.data_dir.display().to_string()]);
    cluster.restart(0).unwrap();
}

#[test]
fn an_unusable_data_directory_is_named() {
    let cluster = Cluster::prepare(NodeOptions::default()).unwrap();
    let node = cluster.spare_node().unwrap();
    // Not even root makes a directory there.
    let place = "/proc/xsan/node";
    refused(
        &mut changed(&node, FirstStart::Init, "--data-dir", place),
        &[Code::DataDirUnusable],
        &["/proc/xsan"],
    );

    let file = cluster.directory().join("a-file");
    fs::write(&file, "not a directory").unwrap();
    let place = file.display().to_string();
    refused(&mut changed(&node, FirstStart::Init, "--data-dir", &place), &[Code::DataDirUnusable], &[&place]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "not a directory");
}

#[test]
fn a_data_directory_without_space_is_refused_before_anything_is_written() {
    let options = NodeOptions { file_size: "60TiB".to_owned(), ..NodeOptions::default() };
    let cluster = Cluster::prepare(options).unwrap();
    let node = cluster.spare_node().unwrap();
    refused(
        &mut node.first_command(CLUSTER_ID, FirstStart::Init),
        &[Code::DataDirUnusable],
        &[&node.data_dir.display().to_string()],
    );
    holds_no_node(&node.data_dir);
}

#[test]
fn a_busy_port_is_named() {
    let cluster = Cluster::prepare(NodeOptions::default()).unwrap();
    let node = cluster.spare_node().unwrap();
    for address in [node.control, node.nbd, node.data] {
        let taken = TcpListener::bind(address).unwrap();
        refused(
            &mut node.first_command(CLUSTER_ID, FirstStart::Init),
            &[Code::AddressInUse],
            &[&address.to_string()],
        );
        drop(taken);
        holds_no_node(&node.data_dir);
    }
}

#[test]
fn a_second_process_in_a_data_directory_is_refused() {
    let cluster = Cluster::start(1).unwrap();
    let node = cluster.node(0);
    let mut second = Command::new(program("xsan-node"));
    second.arg("--data-dir").arg(&node.data_dir);
    refused(&mut second, &[Code::DataDirUnusable], &[&node.data_dir.display().to_string()]);
    cluster.status().unwrap();
}

#[test]
fn a_wrong_configuration_names_the_path_of_the_field() {
    let cluster = Cluster::prepare(NodeOptions::default()).unwrap();
    let node = cluster.spare_node().unwrap();
    let path = cluster.directory().join("wrong.conf");
    let device = |role: &str| json!({"path": "/dev/null", "type": "ssd", "role": role});
    let cases = [
        (json!({"storage": {"devices": [device("cache"), device("cach")]}}), "storage.devices[1].role"),
        (json!({"storage": {"block_size": 1000}}), "storage.block_size"),
        (json!({"storage": {"blocksize": 4_194_304}}), "blocksize"),
        (json!({"network": {"heartbeat_interval": "often"}}), "network.heartbeat_interval"),
        (json!({"dataplane": {"memory": "2 GiBi"}}), "dataplane.memory"),
        (json!({"dataplane": {"cores": "3-1"}}), "dataplane.cores"),
        (json!({"logging": {"level": "loud"}}), "logging.level"),
    ];
    for (config, field) in cases {
        fs::write(&path, config.to_string()).unwrap();
        let text = path.display().to_string();
        refused(&mut changed(&node, FirstStart::Init, "--config", &text), &[Code::ConfigInvalid], &[field]);
        holds_no_node(&node.data_dir);
    }
    fs::write(&path, "{ \"cluster\": ").unwrap();
    let text = path.display().to_string();
    refused(
        &mut changed(&node, FirstStart::Init, "--config", &text),
        &[Code::ConfigInvalid],
        &["wrong.conf"],
    );
}

#[test]
fn a_device_that_holds_something_is_refused_and_untouched() {
    let cluster = Cluster::prepare(NodeOptions::default()).unwrap();
    let node = cluster.spare_node().unwrap();
    let device = cluster.directory().join("disk.img");
    fs::File::create(&device).unwrap().set_len(1 << 30).unwrap();
    let name = device.display().to_string();
    xsan_tests::tools::run("mke2fs", ["-q", "-t", "ext4", &name]).unwrap();
    let config = json!({
        "cluster": { "bind_port": node.control.port() },
        "storage": { "devices": [{ "path": name, "type": "ssd", "role": "capacity" }] },
        "dataplane": { "cores": "0", "port": node.data.port(), "nbd_port": node.nbd.port() },
    });
    let path = cluster.directory().join("device.conf");
    fs::write(&path, config.to_string()).unwrap();
    let text = path.display().to_string();
    refused(&mut changed(&node, FirstStart::Init, "--config", &text), &[Code::DeviceInUse], &[&name]);
    xsan_tests::tools::run("e2fsck", ["-fn", &name]).unwrap();
}

#[test]
fn refused_volumes_leave_the_list_as_it_was() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("taken", "64MiB", 3).unwrap();
    let refused = |arguments: &[&str], codes: &[Code], words: &[&str]| {
        cluster.cli(arguments).unwrap().refused_with(codes, words).unwrap();
    };
    let create = |name: &'static str, size: &'static str, count: &'static str| {
        ["volume", "create", "--name", name, "--size", size, "--replica-count", count]
    };
    refused(&create("taken", "1GiB", "3"), &[Code::VolumeExists], &["taken"]);
    refused(&create("wide", "1GiB", "5"), &[Code::TooFewNodes], &[]);
    refused(&["volume", "info", "absent"], &[Code::VolumeNotFound], &["absent"]);
    refused(&["volume", "delete", "absent", "--yes"], &[Code::VolumeNotFound], &["absent"]);
    refused(&["volume", "resize", "taken", "--size", "32MiB"], &[Code::ShrinkLosesData], &["taken"]);
    refused(&["node", "info", "node-077"], &[Code::NodeNotFound], &["node-077"]);
    // To nothing or below is no size at all, confirmed or not; the command line may know that by itself.
    for size in ["0", "-1GiB", "many"] {
        let size = format!("--size={size}");
        let answer = cluster.cli(&["volume", "resize", "taken", "--allow-shrink", &size]).unwrap();
        assert!(answer.exit_code.is_some_and(|code| code != 0), "{answer:?}");
        assert!(!answer.stderr.is_empty(), "{answer:?}");
    }

    let client = cluster.connect(1, "taken").unwrap();
    refused(&["volume", "delete", "taken", "--yes"], &[Code::VolumeAttached], &["taken"]);
    assert_eq!(client.size_bytes(), 64 << 20);
    drop(client);

    let status = cluster.status().unwrap();
    assert_eq!(status.volume_count, 1);
    assert_eq!(cluster.connect(0, "taken").unwrap().size_bytes(), 64 << 20);
}

#[test]
fn a_cluster_that_does_not_answer_is_an_error_of_its_own() {
    let answer = Answer::of(Command::new(program("xsan-cli")).args([
        "--address",
        "127.63.200.201:8080",
        "cluster",
        "status",
    ]))
    .unwrap();
    assert_eq!(answer.exit_code, Some(3), "{answer:?}");
    assert!(answer.stderr.contains("127.63.200.201:8080"), "{answer:?}");
}
