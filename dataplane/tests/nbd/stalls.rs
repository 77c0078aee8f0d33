//! Clients that stop in the middle of something, beside others that share their shard's buffers.

use std::time::{Duration, Instant};

use xsan_dataplane::gateway::nbd::Options;
use xsan_dataplane::gateway::nbd::wire::{Request, command};

use crate::raw::{Raw, pattern};
use crate::server::{Server, eventually};

const MIB: usize = 1024 * 1024;
/// The pool of a shard, when nothing else is configured: 24 buffers of the largest class.
const POOL_BYTES: usize = 64 << 20;

fn server(stall_timeout: Duration) -> Server {
    Server::with(Options { stall_timeout, ..Options::default() }, POOL_BYTES)
}

/// Begins a write of 1 MiB at 0, and sends `sent` bytes of its payload.
fn begin_write(raw: &mut Raw, sent: usize) {
    let header = Request { flags: 0, command: command::WRITE, cookie: 99, offset: 0, length: MIB as u32 };
    raw.send(&[&header.encode(), &pattern(7, MIB)[..sent]].concat());
}

/// Twelve clients sent the header of a large write and no payload: nobody else of the shard could write more than
/// 128 KiB at once, for ever. Found by reading.
#[test]
fn clients_that_owe_a_payload_are_sent_away() {
    let server = server(Duration::from_millis(600));
    let mut idle = Raw::open(&server, "disk");
    let mut stalled: Vec<Raw> = (0..12).map(|_| Raw::open(&server, "disk")).collect();
    stalled.iter_mut().enumerate().for_each(|(index, raw)| begin_write(raw, index * 1000));
    let mut good = Raw::open(&server, "disk");
    assert_eq!(good.write(0, &pattern(1, MIB)), 0);
    stalled.iter_mut().for_each(Raw::assert_closed);
    // Who owes nothing may be silent for as long as it likes.
    eventually("the stalled clients are gone", || server.counters.connections() == 2);
    assert_eq!(idle.write(0, &pattern(2, MIB)), 0);
    idle.disconnect();
    good.disconnect();
    server.assert_quiet();
}

#[test]
fn a_slow_payload_is_waited_for() {
    let server = server(Duration::from_millis(400));
    let mut slow = Raw::open(&server, "disk");
    begin_write(&mut slow, 0);
    // Longer than the limit, in steps that are shorter.
    for part in pattern(7, MIB).chunks(MIB / 16) {
        std::thread::sleep(Duration::from_millis(50));
        slow.send(part);
    }
    assert_eq!(slow.simple(), (99, 0));
    slow.disconnect();
    server.assert_quiet();
}

/// One client asked for 64 times 256 KiB and took nothing: its 16 MiB were every large buffer of the shard, until it
/// was sent away after the requests of others had failed. Found by reading.
#[test]
fn unread_replies_of_one_client_leave_buffers_for_the_others() {
    // Nobody is sent away in this test.
    let server = server(Duration::from_secs(3600));
    let mut good = Raw::open(&server, "disk");
    assert_eq!(good.write(0, &pattern(1, MIB)), 0);
    let mut greedy = Raw::open_structured(&server, "disk");
    // Enough to fill the socket's buffers, too.
    for _ in 0..256 {
        greedy.request(command::READ, 0, 0, 256 * 1024, &[]);
    }
    eventually("replies wait for the client", || server.pool.occupancy()[3].0 < 24);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(1) {
        assert_eq!(good.write(0, &pattern(1, MIB)), 0);
        assert!(good.read(0, MIB as u32).is_ok());
    }
    let (free, all) = server.pool.occupancy()[3];
    assert!(free >= all / 2, "{free} of {all} buffers are free");
    drop(greedy);
    good.disconnect();
    server.assert_quiet();
}
