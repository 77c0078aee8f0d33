//! Thousands of broken conversations, after which a good client still finds everything in order.

use std::io::{Read, Write};
use std::time::Duration;

use xsan_dataplane::gateway::nbd::wire::{Request, command, option};

use crate::raw::{BOTH, Raw, context_query, export_query, option_bytes};
use crate::server::Server;

const CONVERSATIONS: u64 = 4000;

/// xorshift64*: the same conversations in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// What a client might send: a handshake and some requests.
fn conversation(random: &mut Random) -> Vec<u8> {
    let export = ["disk", "slow-disk", "faulty-disk"][random.below(3)];
    let mut bytes = BOTH.to_be_bytes().to_vec();
    if random.below(2) == 0 {
        bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
        bytes.extend(option_bytes(option::SET_META_CONTEXT, &context_query(export, &["base:allocation"])));
    }
    match random.below(4) {
        0 => bytes.extend(option_bytes(option::EXPORT_NAME, export.as_bytes())),
        1 => bytes.extend(option_bytes(option::INFO, &export_query(export))),
        _ => bytes.extend(option_bytes(option::GO, &export_query(export))),
    }
    for cookie in 0..random.below(12) as u64 {
        let command = [command::READ, command::WRITE, command::FLUSH, command::TRIM, command::CACHE, 6, 7, 8]
            [random.below(8)];
        let length = if command == command::FLUSH { 0 } else { 512 << random.below(10) };
        let offset = if length == 0 { 0 } else { (random.below(1 << 19) * 512) as u64 };
        let flags = if random.below(3) == 0 { 1 << random.below(6) } else { 0 };
        bytes.extend(Request { flags, command, cookie, offset, length }.encode());
        if command == command::WRITE {
            bytes.resize(bytes.len() + length as usize, 0xa5);
        }
    }
    bytes
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    for _ in 0..random.below(4) {
        let at = random.below(bytes.len().max(1)).min(bytes.len());
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = [0, 0xff, 0x80][random.below(3)],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, random.next() as u8),
            4 if at < bytes.len() => drop(bytes.remove(at)),
            _ => bytes.extend((0..random.below(64)).map(|index| index as u8)),
        }
    }
    if random.below(10) == 0 {
        let length = random.below(300);
        *bytes = (0..length).map(|_| random.next() as u8).collect();
    }
}

#[test]
fn broken_conversations_hurt_nobody_else() {
    let server = Server::start();
    let mut good = Raw::open(&server, "disk");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let server = &server;
            scope.spawn(move || {
                let mut random = Random(0x5eed_0000 + thread);
                for _ in 0..CONVERSATIONS / 4 {
                    let mut bytes = conversation(&mut random);
                    mutate(&mut random, &mut bytes);
                    converse(server, &bytes, random.below(8) == 0);
                }
            });
        }
    });
    assert_eq!(good.write(4096, &[1; 8192]), 0);
    assert_eq!(good.read(4096, 8192), Ok(vec![1; 8192]));
    good.disconnect();
    server.assert_quiet();
}

/// Sends `bytes`, then either reads until the server closes or goes away at once.
fn converse(server: &Server, bytes: &[u8], abrupt: bool) {
    let mut raw = Raw::connect(server);
    raw.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut reader = raw.stream.try_clone().unwrap();
    std::thread::scope(|scope| {
        if !abrupt {
            // Reads while it sends: a server that is held back reads no more.
            scope.spawn(move || match reader.read_to_end(&mut Vec::new()) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
            });
        }
        // The server may close the connection before it has read all of it.
        _ = raw.stream.write_all(bytes);
        raw.half_close();
    });
}
