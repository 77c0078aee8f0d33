//! Every field's way to be wrong, with the path it is reported at; and that `node.json` survives a round trip.

use super::*;

fn parse(text: &str) -> Result<NodeConfig, FieldError> {
    let value = serde_json::from_str(text).expect("the test's JSON is well formed");
    decode::config_file(value, NodeConfig::default().cluster)
}

/// A valid node with the fields of `text`.
fn node(text: &str) -> Result<NodeConfig, FieldError> {
    let mut config = parse(text)?;
    if config.cluster.cluster_id.is_empty() {
        config.cluster.cluster_id = "xsan-cluster-001".into();
    }
    if config.cluster.node_id.is_empty() {
        config.cluster.node_id = "node-001".into();
    }
    config.validate().map(|()| config)
}

#[test]
fn an_empty_file_gives_a_small_node() {
    let config = node("{}").expect("the defaults are valid");
    assert_eq!(config.cluster.control_address().to_string(), "127.0.0.1:8080");
    assert_eq!(config.storage.block_size, 4 << 20);
    assert_eq!(config.dataplane.memory_bytes(2), 128 << 20);
    assert_eq!(config.dataplane.core_count(), None);
    assert_eq!(config.logging.level, Level::Info);
}

#[test]
fn the_example_of_the_manual_is_valid() {
    let config = node(
        r#"{"cluster": {"cluster_id": "xsan-cluster-001", "node_id": "node-001", "bind_ip": "192.168.1.10",
              "bind_port": 8080, "data_dir": "/var/lib/xsan", "failure_domain": "rack-1"},
            "storage": {"devices": [{"path": "/dev/nvme0n1", "type": "ssd", "role": "cache"},
                                    {"path": "/dev/sda", "type": "hdd", "role": "capacity"}],
              "block_size": 4194304, "default_replica_count": 2},
            "network": {"heartbeat_interval": 250, "election_timeout": 1000, "max_connections": 1000},
            "dataplane": {"cores": "0-3", "numa": "auto", "memory": "2GiB", "port": 9100, "nbd_port": 10809},
            "logging": {"level": "info", "file": "/var/log/xsan/node.log", "max_size": "100MB", "max_files": 10}}"#,
    )
    .expect("it is valid");
    assert_eq!(config.storage.devices[0].role, Role::Cache);
    assert_eq!(config.storage.devices[1].media, Media::Hdd);
    assert_eq!(config.dataplane.core_count(), Some(4));
    assert_eq!(config.dataplane.memory_bytes(4), 2 << 30);
    assert_eq!(config.logging.max_size, 100_000_000);
}

#[test]
fn every_wrong_field_is_told_with_its_path() {
    let table = [
        (r#"[]"#, "the whole file: [] is not an object"),
        (
            r#"{"clutser": {}}"#,
            "clutser: unknown field; known here: cluster, storage, network, dataplane, logging",
        ),
        (r#"{"cluster": 3}"#, "cluster: 3 is not an object"),
        (r#"{"cluster": {"cluster_id": 7}}"#, "cluster.cluster_id: 7 is not a string"),
        (r#"{"cluster": {"cluster_id": "a b"}}"#, "cluster.cluster_id: \"a b\" contains ' '"),
        (r#"{"cluster": {"node_id": "-n"}}"#, "cluster.node_id: \"-n\" does not begin with"),
        (r#"{"cluster": {"bind_ip": "host"}}"#, "cluster.bind_ip: \"host\" is not an IP address"),
        (
            r#"{"cluster": {"bind_ip": "0.0.0.0"}}"#,
            "cluster.bind_ip: \"0.0.0.0\" is not an address that other",
        ),
        (r#"{"cluster": {"bind_port": 0}}"#, "cluster.bind_port: 0 is not a whole number from 1 to 65535"),
        (
            r#"{"cluster": {"bind_port": 65536}}"#,
            "cluster.bind_port: 65536 is not a whole number from 1 to 65535",
        ),
        (r#"{"cluster": {"bind_port": "8080"}}"#, "cluster.bind_port: \"8080\" is not a whole number"),
        (r#"{"cluster": {"data_dir": "xsan"}}"#, "cluster.data_dir: \"xsan\" is not an absolute path"),
        (r#"{"cluster": {"failure_domain": "rack 1"}}"#, "cluster.failure_domain: \"rack 1\" contains"),
        (r#"{"storage": {"devices": {}}}"#, "storage.devices: {} is not a list"),
        (r#"{"storage": {"devices": ["/dev/sda"]}}"#, "storage.devices[0]: \"/dev/sda\" is not an object"),
        (r#"{"storage": {"devices": [{"type": "ssd"}]}}"#, "storage.devices[0].path: is missing"),
        (
            r#"{"storage": {"devices": [{"path": "/dev/a"}, {"path": "/dev/b", "role": "cach"}]}}"#,
            "storage.devices[1].role: \"cach\" is not one of cache, capacity",
        ),
        (
            r#"{"storage": {"devices": [{"path": "/dev/a", "type": "tape"}]}}"#,
            "storage.devices[0].type: \"tape\" is not one of ssd, hdd",
        ),
        (
            r#"{"storage": {"devices": [{"path": "sda"}]}}"#,
            "storage.devices[0].path: \"sda\" is not an absolute path",
        ),
        (
            r#"{"storage": {"devices": [{"path": "/dev/a"}, {"path": "/dev/a"}]}}"#,
            "storage.devices[1].path: /dev/a is listed twice",
        ),
        (
            r#"{"storage": {"devices": [{"path": "/dev/a", "role": "cache"}]}}"#,
            "storage.devices: has no device of role capacity",
        ),
        (
            r#"{"storage": {"devices": [{"path": "/dev/a", "size": 3}]}}"#,
            "storage.devices[0].size: unknown field; known here: path, type, role",
        ),
        (r#"{"storage": {"block_size": 65536}}"#, "storage.block_size: 65536 is not supported"),
        (
            r#"{"storage": {"default_replica_count": 6}}"#,
            "storage.default_replica_count: 6 is not a whole number from 1 to 5",
        ),
        (
            r#"{"network": {"heartbeat_interval": 5}}"#,
            "network.heartbeat_interval: 5 is not a whole number from 50 to 375 milliseconds",
        ),
        (
            r#"{"network": {"election_timeout": 1.5}}"#,
            "network.election_timeout: 1.5 is not a whole number from 200 to 10000 milliseconds",
        ),
        (
            r#"{"network": {"heartbeat_interval": 376}}"#,
            "network.heartbeat_interval: 376 is not a whole number from 50 to 375 milliseconds",
        ),
        (
            r#"{"network": {"heartbeat_interval": 350}}"#,
            "network.election_timeout: 1000 ms is less than three times network.heartbeat_interval (350 ms)",
        ),
        (r#"{"network": {"max_connections": -1}}"#, "network.max_connections: -1 is not a whole number"),
        (r#"{"dataplane": {"cores": "0-"}}"#, "dataplane.cores: \"0-\" is neither \"auto\" nor a list"),
        (r#"{"dataplane": {"cores": "3-1"}}"#, "dataplane.cores: \"3-1\": the range 3-1 runs backwards"),
        (r#"{"dataplane": {"cores": "0,0"}}"#, "dataplane.cores: \"0,0\" names core 0 twice"),
        (r#"{"dataplane": {"cores": "0-65535"}}"#, "dataplane.cores: \"0-65535\" has more than 256 cores"),
        (r#"{"dataplane": {"cores": 2}}"#, "dataplane.cores: 2 is not a string"),
        (r#"{"dataplane": {"numa": "on"}}"#, "dataplane.numa: \"on\" is not one of auto, off"),
        (r#"{"dataplane": {"memory": "2G"}}"#, "dataplane.memory: \"2G\" has an unknown unit"),
        (r#"{"dataplane": {"memory": -2}}"#, "dataplane.memory: -2 is not a size"),
        (
            r#"{"dataplane": {"memory": "32MiB", "cores": "0,1"}}"#,
            "dataplane.memory: 32 MiB is too little for 2 shard(s); the least is 64 MiB",
        ),
        (r#"{"dataplane": {"port": 70000}}"#, "dataplane.port: 70000 is not a whole number"),
        (
            r#"{"dataplane": {"port": 8079, "cores": "0-3"}}"#,
            "dataplane.port: the shards' ports 8079 to 8082 contain cluster.bind_port 8080",
        ),
        (r#"{"dataplane": {"port": 65535, "cores": "0,1"}}"#, "dataplane.port: 65535 leaves no ports"),
        (
            r#"{"dataplane": {"nbd_port": 9100}}"#,
            "dataplane.nbd_port: 9100 is one of the shards' ports 9100 to 9100",
        ),
        (r#"{"dataplane": {"nbd_port": 8080}}"#, "dataplane.nbd_port: 8080 is cluster.bind_port"),
        (r#"{"dataplane": {"stores": 0}}"#, "dataplane.stores: 0 is not a whole number from 1 to 64"),
        (
            r#"{"dataplane": {"file_size": "1MiB"}}"#,
            "dataplane.file_size: 1 MiB is not from 256 MiB to 64 TiB",
        ),
        (
            r#"{"logging": {"level": "loud"}}"#,
            "logging.level: \"loud\" is not one of fatal, error, warn, info, debug, trace",
        ),
        (r#"{"logging": {"file": "node.log"}}"#, "logging.file: \"node.log\" is not an absolute path"),
        (r#"{"logging": {"max_size": "1kB"}}"#, "logging.max_size: 1000 B is less than 64 KiB"),
        (r#"{"logging": {"max_files": 0}}"#, "logging.max_files: 0 is not a whole number from 1 to 1000"),
        (r#"{"logging": {"json": "yes"}}"#, "logging.json: \"yes\" is not true or false"),
    ];
    for (text, expected) in table {
        let error = node(text).expect_err(text).to_string();
        assert!(error.starts_with(expected), "{text}\n  gives    {error}\n  expected {expected}");
    }
}

#[test]
fn names_must_be_there_and_short() {
    let missing = parse("{}").expect("fields are optional").validate().expect_err("who is it?");
    assert_eq!(missing.to_string(), "cluster.cluster_id: is missing");
    let long = format!(r#"{{"cluster": {{"node_id": "{}"}}}}"#, "n".repeat(129));
    assert_eq!(
        node(&long).expect_err("too long").to_string(),
        "cluster.node_id: has 129 characters, more than 128"
    );
    // Commands take a name or a number: `node remove 5` could mean two nodes.
    assert_eq!(
        node(r#"{"cluster": {"node_id": "005"}}"#).expect_err("a number").to_string(),
        "cluster.node_id: \"005\" has only digits, and would be taken for a node's number"
    );
}

/// A node was founded and its processes then ended for ever, as their sockets could not be bound.
#[test]
fn a_data_directory_has_room_for_the_paths_of_its_sockets() {
    let mut config = node("{}").expect("valid");
    config.cluster.data_dir = format!("/{}", "d".repeat(96)).into();
    assert_eq!(config.validate(), Ok(()));
    config.cluster.data_dir = format!("/{}", "d".repeat(97)).into();
    let error = config.validate().expect_err("a byte too long").to_string();
    assert!(error.starts_with("cluster.data_dir: has 98 bytes, more than 97: the sockets"), "{error}");
}

#[test]
fn what_depends_on_the_number_of_shards_is_checked_for_that_number() {
    let check = |text, shards| node(text).expect("valid for one shard").validate_shards(shards);
    let memory = r#"{"dataplane": {"memory": "64MiB"}}"#;
    assert_eq!(check(memory, 2), Ok(()));
    let error = check(memory, 3).expect_err("32 MiB for each").to_string();
    assert_eq!(error, "dataplane.memory: 64 MiB is too little for 3 shard(s); the least is 96 MiB");
    let ports = r#"{"dataplane": {"port": 65530}}"#;
    assert_eq!(check(ports, 6), Ok(()));
    let error = check(ports, 7).expect_err("65535 is the last").to_string();
    assert!(error.starts_with("dataplane.port: 65530 leaves no ports"), "{error}");
    let error = check(r#"{"dataplane": {"port": 10800}}"#, 10).expect_err("they meet").to_string();
    assert_eq!(error, "dataplane.nbd_port: 10809 is one of the shards' ports 10800 to 10809");
}

/// The same file, for a node that is somewhere else already.
#[test]
fn what_a_file_does_not_say_of_the_cluster_can_be_given() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("node.conf");
    fs::write(&file, r#"{"cluster": {"node_id": "other"}, "logging": {"level": "warn"}}"#)
        .expect("it writes");
    let node = full(directory.path());
    let config = NodeConfig::read_file_over(&file, node.cluster.clone()).expect("a good file");
    assert_eq!(config.cluster, Cluster { node_id: "other".into(), ..node.cluster });
    assert_eq!(config.logging.level, Level::Warn);
    assert_eq!(config.storage, NodeConfig::default().storage);
}

#[test]
fn fatal_is_error_and_null_is_absent() {
    let config = node(r#"{"logging": {"level": "fatal", "file": null}, "network": null}"#).expect("valid");
    assert_eq!(config.logging.level, Level::Error);
    assert_eq!(config.logging.file, None);
}

#[test]
fn only_listed_devices_can_be_forced() {
    let mut config = node(r#"{"storage": {"devices": [{"path": "/dev/a"}]}}"#).expect("valid");
    config.force_format = vec!["/dev/a".into()];
    assert_eq!(config.validate(), Ok(()));
    config.force_format.push("/dev/b".into());
    let error = config.validate().expect_err("a slip of the finger").to_string();
    assert_eq!(error, "force_format[1]: /dev/b is not one of storage.devices");

    // A node without devices has files, which can be named as well.
    let mut config = node(r#"{"dataplane": {"stores": 2}}"#).expect("valid");
    config.cluster.data_dir = "/x".into();
    config.force_format = vec!["/x/data/store-1.img".into()];
    assert_eq!(config.validate(), Ok(()));
    config.force_format.push("/x/data/store-2.img".into());
    let error = config.validate().expect_err("there are two").to_string();
    assert_eq!(error, "force_format[1]: /x/data/store-2.img is not one of the files in data_dir/data");
}

/// A configuration that differs from the default in every field.
fn full(data_dir: &Path) -> NodeConfig {
    let mut config = node(
        r#"{"cluster": {"bind_ip": "::1", "bind_port": 81, "failure_domain": "rack-1"},
            "storage": {"devices": [{"path": "/dev/a", "type": "hdd", "role": "cache"}, {"path": "/dev/b"}],
                        "default_replica_count": 3},
            "network": {"heartbeat_interval": 100, "election_timeout": 900, "max_connections": 7},
            "dataplane": {"cores": "1,2", "numa": "off", "memory": "1GiB", "port": 82, "nbd_port": 84,
                          "stores": 2, "file_size": "1GiB"},
            "logging": {"level": "trace", "file": "/tmp/l", "max_size": "1MB", "max_files": 2, "json": true}}"#,
    )
    .expect("valid");
    config.cluster.data_dir = data_dir.into();
    config.startup = Startup::Join { address: "[::2]:8080".parse().expect("an address") };
    config.numeric_id = NodeId(3);
    config.instance = u64::MAX - 1;
    config.force_format = vec!["/dev/a".into()];
    config.config_file = Some("/etc/node.conf".into());
    config.overridden = vec!["cluster.node_id".into()];
    config.established = true;
    config
}

#[test]
fn what_is_saved_is_loaded() {
    let directory = tempfile::tempdir().expect("a directory");
    let data_dir = directory.path();
    assert!(!NodeConfig::exists(data_dir).expect("readable"));
    let config = full(data_dir);
    config.save().expect("it saves");
    assert!(NodeConfig::exists(data_dir).expect("readable"));
    assert_eq!(NodeConfig::load(data_dir).expect("it loads"), config);

    let mut small = node("{}").expect("valid");
    small.cluster.data_dir = data_dir.into();
    small.numeric_id = NodeId(1);
    small.save().expect("it replaces");
    assert_eq!(NodeConfig::load(data_dir).expect("it loads"), small);
    let names: Vec<_> =
        fs::read_dir(data_dir).expect("readable").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(names, ["node.json"], "nothing is left beside it");
    small.remove().expect("it is removed");
    assert!(!NodeConfig::exists(data_dir).expect("readable"));
}

#[test]
fn a_damaged_or_missing_node_file_is_told() {
    let directory = tempfile::tempdir().expect("a directory");
    let data_dir = directory.path();
    let error = NodeConfig::load(data_dir).expect_err("there is none");
    assert_eq!(error.code(), Code::DataDirUnusable);
    assert!(error.to_string().contains("holds no node"), "{error}");

    full(data_dir).save().expect("it saves");
    let text = fs::read_to_string(data_dir.join(NODE_FILE)).expect("saved");
    for (from, to, expected) in [
        ("\"format\": 1", "\"format\": 2", "format: 2 is not the format 1"),
        ("\"numeric_id\": 3", "\"numeric_id\": -1", "numeric_id: -1 is not a whole number"),
        ("\"fffffffffffffffe\"", "\"x\"", "instance: \"x\" is not a hexadecimal number"),
        ("\"mode\": \"join\"", "\"mode\": \"leave\"", "startup.mode: \"leave\" is not one of init, join"),
        ("\"[::2]:8080\"", "\"nowhere\"", "startup.address: \"nowhere\" is not an address and port"),
        ("\"cluster.node_id\"\n", "7\n", "overridden[0]: 7 is not a string"),
        ("\"established\": true", "\"other\": true", "other: unknown field"),
        ("{", "{,", "not valid JSON"),
    ] {
        assert!(text.contains(from), "{from}");
        fs::write(data_dir.join(NODE_FILE), text.replacen(from, to, 1)).expect("it writes");
        let error = NodeConfig::load(data_dir).expect_err(to);
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_file_error_names_the_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("node.conf");
    fs::write(&file, r#"{"logging": {"level": 4}}"#).expect("it writes");
    let error = NodeConfig::read_file(&file).expect_err("4 is no level").to_string();
    assert_eq!(error, format!("{}: logging.level: 4 is not a string", file.display()));
}
