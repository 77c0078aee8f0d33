//! Clients that are broken or malicious: they get an error or a closed connection, and hurt nobody else.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use xsan_protocol::checksum::crc32c;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Incarnation, NodeId, ShardIndex};
use xsan_protocol::wire::header::{HEADER_SIZE, Header, Opcode};
use xsan_protocol::wire::session::Hello;
use xsan_tests::cluster::Cluster;
use xsan_tests::nbd::{self, Client, NbdError};
use xsan_tests::random::Random;

const TIMEOUT: Duration = Duration::from_millis(200);
const STREAM_COUNT: u64 = 600;

/// A connection that takes whatever is sent to it, and sends no more than it is told to.
fn pour(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    // The server may close while it is being sent to: that is an answer too.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = vec![0; 4096];
    let count = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(count);
    answer
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.index(4) {
        let position = random.index(bytes.len());
        match random.index(4) {
            0 => bytes[position] = random.next() as u8,
            1 => bytes[position] ^= 1 << random.index(8),
            2 => bytes.truncate(position + 1),
            _ => bytes[position..].iter_mut().take(4).for_each(|byte| *byte = 0xff),
        }
    }
}

fn hello(cluster_id: &str) -> Vec<u8> {
    let payload = Hello {
        node: NodeId(0),
        incarnation: Incarnation(0),
        client_id: 77,
        session: 1,
        shard: ShardIndex(0),
        shard_count: 1,
        cluster_id: cluster_id.to_owned(),
    }
    .encode();
    framed(Opcode::Hello, &payload)
}

fn framed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        payload_length: payload.len() as u32,
        payload_crc: crc32c(payload),
        request_id: 1,
        ..Header::new(opcode)
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(payload);
    bytes
}

/// The data and control processes that run; a fuzzed cluster must have the same ones afterwards.
fn processes(cluster: &Cluster) -> Vec<u32> {
    let children = ["xsan-control", "xsan-data"];
    cluster.nodes().iter().flat_map(|node| children.map(|name| node.child(name).unwrap().pid)).collect()
}

#[test]
fn streams_of_garbage_kill_nothing() {
    let cluster = Cluster::start(3).unwrap();
    cluster.create_volume("target", "64MiB", 3).unwrap();
    // No stream names this volume: what it holds stays.
    cluster.create_volume("kept", "64MiB", 3).unwrap();
    let mut client = cluster.connect(0, "kept").unwrap();
    client.write(0, &[5; 4096]).unwrap();
    let before = processes(&cluster);

    let mut handshake = 1_u32.to_be_bytes().to_vec();
    handshake.extend(nbd::go_option("target"));
    let mut session = handshake.clone();
    session.extend(nbd::request_header(nbd::COMMAND_READ, 0, 1, 0, 4096));
    session.extend(nbd::request_header(nbd::COMMAND_WRITE, 0, 2, 60 << 20, 4096));
    session.extend(vec![9; 4096]);
    session.extend(nbd::request_header(nbd::COMMAND_FLUSH, 0, 3, 0, 0));
    let greeting = hello(xsan_tests::cluster::CLUSTER_ID);
    let mut frames = greeting.clone();
    frames.extend(framed(Opcode::Ping, &[]));
    frames.extend(framed(Opcode::Append, &[1; 200]));
    frames.extend(framed(Opcode::Read, &[]));
    frames.extend(framed(Opcode::PeerInfo, &[3; 48]));

    let mut random = Random::new(20_261_121);
    let node = cluster.node(1);
    let targets =
        [(node.nbd, &handshake), (node.nbd, &session), (node.data, &greeting), (node.data, &frames)];
    for round in 0..STREAM_COUNT {
        let (address, seed) = targets[round as usize % targets.len()];
        let mut bytes = if round % 10 == 9 {
            let mut noise = vec![0; 1 + random.index(3000)];
            random.fill(&mut noise);
            noise
        } else {
            seed.clone()
        };
        mutate(&mut bytes, &mut random);
        pour(address, &bytes);
    }
    let noise = UdpSocket::bind((node.control.ip(), 0)).unwrap();
    for _ in 0..STREAM_COUNT {
        let mut datagram = vec![0; 1 + random.index(1400)];
        random.fill(&mut datagram);
        noise.send_to(&datagram, node.control).unwrap();
        if random.index(20) == 0 {
            pour(node.control, &datagram);
        }
    }

    assert_eq!(processes(&cluster), before, "a process has died");
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
        let answer = pour(cluster.node(0).data, bytes);
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
