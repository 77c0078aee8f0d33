//! Clients that stop in the middle of something, beside others that share their shard's buffers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use xsan_dataplane::gateway::nbd::Options;
use xsan_dataplane::gateway::nbd::wire::{Request, command};
use xsan_protocol::ids::VolumeId;

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

/// The same with clients that send a little all the time: each got as long as it took, minutes over a slow line. Found by reading.
#[test]
fn clients_that_trickle_are_sent_away_when_others_wait() {
    let timeout = Duration::from_millis(800);
    let server = server(timeout);
    let mut slow: Vec<Raw> = (0..12).map(|_| Raw::open(&server, "disk")).collect();
    slow.iter_mut().for_each(|raw| begin_write(raw, 0));
    let mut good = Raw::open(&server, "disk");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Far more than is asked of them in any time, and four seconds for all of it.
            for part in pattern(7, MIB).chunks(MIB / 40) {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                slow.iter_mut().for_each(|raw| raw.try_send(part));
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        let started = Instant::now();
        assert_eq!(good.write(0, &pattern(1, MIB)), 0);
        let waited = started.elapsed();
        done.store(true, Ordering::Relaxed);
        assert!(waited < 3 * timeout, "{waited:?}");
    });
    good.disconnect();
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

/// A client, and a write of it that waits for its volume.
fn stuck_write(server: &Server) -> Raw {
    let requests = server.counters.requests.load(Ordering::Relaxed);
    let mut raw = Raw::open(server, "stuck-disk");
    raw.request(command::WRITE, 0, 0, 4096, &pattern(1, 4096));
    eventually("the write has begun", || server.counters.requests.load(Ordering::Relaxed) > requests);
    raw
}

/// A client was killed, started again and wrote; what it had asked for before was still tried, and could land on
/// what it wrote. Found by reading.
#[test]
fn requests_of_a_client_that_is_gone_are_given_up() {
    let server = Server::start();
    let killed = stuck_write(&server);
    drop(killed);
    server.assert_quiet();
    let half_closed = stuck_write(&server);
    half_closed.half_close();
    server.assert_quiet();
    let mut broken = stuck_write(&server);
    broken.send(&[0xff; 28]);
    broken.assert_closed();
    server.assert_quiet();
    assert_eq!(server.volumes[3].carried_out.load(Ordering::Relaxed), 0);
}

/// A client came back by another connection and wrote; what it had sent before could still land on that. And where its
/// requests filled the gateway's room, nobody had read yet that it was gone. Found by reading.
#[test]
fn a_volume_is_swept_of_clients_that_are_gone() {
    let options = Options { operations_in_flight_max: 1, ..Options::default() };
    let server = Server::with(options, 256 << 20);
    let (volume, shared) = (VolumeId(5), &server.volumes[4]);
    let mut gone = Raw::open(&server, "sent-disk");
    for _ in 0..4 {
        gone.request(command::WRITE, 0, 0, 4096, &pattern(1, 4096));
    }
    eventually("the first write has begun", || server.counters.requests.load(Ordering::Relaxed) > 0);
    let swept = server.sweep(volume);
    swept.recv_timeout(Duration::from_secs(5)).expect("nobody is gone");
    drop(gone);
    std::thread::sleep(Duration::from_millis(50));
    let swept = server.sweep(volume);
    swept.recv_timeout(Duration::from_millis(200)).expect_err("a write is on its way");
    shared.released.store(true, Ordering::Relaxed);
    swept.recv_timeout(Duration::from_secs(5)).expect("it has ended");
    assert_eq!(shared.carried_out.load(Ordering::Relaxed), 1, "the others were not begun");
    server.assert_quiet();
}

#[test]
fn requests_of_a_client_that_disconnects_are_finished() {
    let server = Server::start();
    let mut raw = stuck_write(&server);
    raw.request(command::DISCONNECT, 0, 0, 0, &[]);
    std::thread::sleep(Duration::from_millis(100));
    server.volumes[3].released.store(true, Ordering::Relaxed);
    assert_eq!(raw.simple(), (1, 0));
    raw.assert_closed();
    server.assert_quiet();
    assert_eq!(server.volumes[3].carried_out.load(Ordering::Relaxed), 1);
}
