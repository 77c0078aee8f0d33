//! Clients that are broken or malicious: they get an error or a closed connection, and hurt nobody else.

use std::time::Duration;

use xsan_protocol::error::Code;
use xsan_protocol::wire::header::{HEADER_SIZE, Header, Opcode};
use xsan_tests::cluster::Cluster;
use xsan_tests::garbage::{Garbage, framed, hello, pour};
use xsan_tests::nbd::{self, Client, NbdError};

const ROUNDS: u64 = 600;

#[test]
fn streams_of_garbage_kill_nothing() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("target", "64MiB", 3).unwrap();
    // No stream names this volume: what it holds stays.
    cluster.create_volume("kept", "64MiB", 3).unwrap();
    let mut client = cluster.connect(0, "kept").unwrap();
    client.write(0, &[5; 4096]).unwrap();
    let before = cluster.processes().unwrap();
    let mut garbage = Garbage::new("target", 20_261_121);
    for _ in 0..ROUNDS {
        garbage.send_to(cluster.node(1)).unwrap();
    }
    assert_eq!(cluster.processes().unwrap(), before, "a process has died");
    // The connection from before is served.
    let mut bytes = [0; 4096];
    client.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 4096]);
    cluster.connect(1, "kept").unwrap().write(0, &[6; 4096]).unwrap();
    client.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [6; 4096]);
}

#[test]
fn wrong_requests_get_the_protocols_answer() {
    let cluster = Cluster::start(1).unwrap();
    cluster.create_volume("strict", "64MiB", 1).unwrap();
    let address = cluster.node(0).nbd;
    let connect = |export: &str| Client::connect(address, export, Duration::from_secs(10));

    let unknown = connect("absent");
    // NBD_REP_ERR_UNKNOWN.
    assert!(matches!(unknown, Err(NbdError::Refused(0x8000_0006))), "{unknown:?}");

    let mut good = connect("strict").unwrap();
    let mut bad = connect("strict").unwrap();
    let mut header = nbd::request_header(nbd::COMMAND_READ, 0, 1, 0, 4096);
    header[0] ^= 0xff;
    bad.send_raw(&header).unwrap();
    assert!(bad.is_closed_by_server(), "a request without the magic must end its connection");

    let mut huge = connect("strict").unwrap();
    let answer = huge.command(nbd::COMMAND_READ, 0, 1 << 30);
    assert!(answer.is_err(), "a read of 1 GiB was answered");
    let mut huge = connect("strict").unwrap();
    huge.send_raw(&nbd::request_header(nbd::COMMAND_WRITE, 0, 1, 0, u32::MAX)).unwrap();
    let unknown = connect("strict").unwrap().command(999, 0, 4096);
    assert!(matches!(unknown, Err(NbdError::Request(22))), "EINVAL expected: {unknown:?}");

    good.write(4096, &[3; 4096]).unwrap();
}

#[test]
fn a_wire_peer_of_another_cluster_or_version_is_told_so() {
    let cluster = Cluster::start(1).unwrap();
    let status_of = |bytes: &[u8]| {
        let answer = pour(cluster.node(0).data, bytes).unwrap();
        let mut header = [0; HEADER_SIZE];
        assert!(answer.len() >= HEADER_SIZE, "{} bytes are no answer", answer.len());
        header.copy_from_slice(&answer[..HEADER_SIZE]);
        Header::decode(&header).unwrap().status
    };
    assert_eq!(status_of(&hello("another-cluster")), Some(Code::ClusterIdMismatch));

    let mut payload = hello(xsan_tests::cluster::CLUSTER_ID)[HEADER_SIZE..].to_vec();
    // Oldest and newest version that the peer speaks: its first two bytes.
    payload[..2].copy_from_slice(&[200, 201]);
    assert_eq!(status_of(&framed(Opcode::Hello, &payload)), Some(Code::VersionMismatch));
}
