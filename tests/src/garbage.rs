//! Garbage: what broken and malicious clients and peers send. Most of it is nearly right: valid streams, changed a little.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use xsan_protocol::checksum::crc32c;
use xsan_protocol::ids::{Incarnation, NodeId, ShardIndex};
use xsan_protocol::wire::header::{Header, Opcode};
use xsan_protocol::wire::session::Hello;

use crate::cluster::CLUSTER_ID;
use crate::nbd;
use crate::node::Node;
use crate::random::Random;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ANSWER_TIMEOUT: Duration = Duration::from_millis(200);
const NOISE_BYTES_MAX: usize = 3000;
const DATAGRAM_BYTES_MAX: usize = 1400;

/// An endless supply of it; a seed repeats it.
#[derive(Debug)]
pub struct Garbage {
    random: Random,
    rounds: u64,
    /// What a client of the NBD gateway sends.
    client: [Vec<u8>; 2],
    /// What a peer of the data plane sends.
    peer: [Vec<u8>; 2],
}

impl Garbage {
    /// - `volume`: what clients open and overwrite.
    pub fn new(volume: &str, seed: u64) -> Self {
        let mut handshake = 1_u32.to_be_bytes().to_vec();
        handshake.extend(nbd::go_option(volume));
        let mut session = handshake.clone();
        session.extend(nbd::request_header(nbd::COMMAND_READ, 0, 1, 0, 4096));
        session.extend(nbd::request_header(nbd::COMMAND_WRITE, 0, 2, 60 << 20, 4096));
        session.extend(vec![9; 4096]);
        session.extend(nbd::request_header(nbd::COMMAND_FLUSH, 0, 3, 0, 0));
        let greeting = hello(CLUSTER_ID);
        let mut frames = greeting.clone();
        frames.extend(framed(Opcode::Ping, &[]));
        frames.extend(framed(Opcode::Append, &[1; 200]));
        frames.extend(framed(Opcode::Read, &[]));
        frames.extend(framed(Opcode::PeerInfo, &[3; 48]));
        Self { random: Random::new(seed), rounds: 0, client: [handshake, session], peer: [greeting, frames] }
    }

    /// One stream to a port of the data process, one datagram to the control process, and sometimes a stream.
    pub fn send_to(&mut self, node: &Node) -> Result<()> {
        let round = self.rounds;
        self.rounds += 1;
        let (address, streams) =
            if round % 4 < 2 { (node.nbd, &self.client) } else { (node.data, &self.peer) };
        let mut stream = streams[round as usize % 2].clone();
        if round % 10 == 9 {
            stream = self.noise(NOISE_BYTES_MAX);
        }
        self.change(&mut stream);
        pour(address, &stream)?;
        let datagram = self.noise(DATAGRAM_BYTES_MAX);
        UdpSocket::bind("0.0.0.0:0")?.send_to(&datagram, node.control)?;
        if self.random.index(20) == 0 {
            pour(node.control, &datagram)?;
        }
        Ok(())
    }

    fn noise(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; 1 + self.random.index(most)];
        self.random.fill(&mut bytes);
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>) {
        let random = &mut self.random;
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
}

/// A connection that takes whatever is sent to it, and sends no more than it is told to; what it was answered.
///
/// # Errors
/// It was not accepted.
pub fn pour(address: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let connected = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT);
    let mut stream = connected.with_context(|| format!("connecting to {address}"))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    // The server may close while it is being sent to: that is an answer too.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = vec![0; 4096];
    let count = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(count);
    Ok(answer)
}

/// The first frame of a client of the data plane.
pub fn hello(cluster_id: &str) -> Vec<u8> {
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

pub fn framed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
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
