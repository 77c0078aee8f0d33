//! The protocol's corners that the usual clients do not reach.

use std::collections::HashSet;
use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::Duration;

use xsan_dataplane::gateway::nbd::Options;
use xsan_dataplane::gateway::nbd::wire::{Request, chunk, command, flag, option, reply};

use crate::raw::{
    BOTH, FIXED, INVAL, IO, NO_ZEROES, NOSPC, Raw, context_query, export_query, option_bytes, pattern,
};
use crate::server::{DISK_BYTES, Server, VOLUMES, eventually};

const MIB: usize = 1 << 20;

#[test]
fn the_oldest_handshake_works_with_and_without_zeroes() {
    let server = Server::start();
    for (flags, zeroes) in [(FIXED, 124), (BOTH, 0), (0, 124), (NO_ZEROES, 0)] {
        let mut raw = Raw::greet(&server, flags);
        raw.send(&option_bytes(option::EXPORT_NAME, b"disk"));
        assert_eq!(raw.take(8), DISK_BYTES.to_be_bytes());
        raw.take(2);
        assert_eq!(raw.take(zeroes), vec![0; zeroes]);
        assert_eq!(raw.write(512, &[7; 512]), 0);
        assert_eq!(raw.read(0, 1024), Ok([[0; 512], [7; 512]].concat()));
        raw.disconnect();
    }
    let mut raw = Raw::greet(&server, FIXED);
    raw.send(&option_bytes(option::EXPORT_NAME, b"no such volume"));
    raw.assert_closed();
    server.assert_quiet();
}

#[test]
fn options_are_refused_one_by_one_and_the_handshake_goes_on() {
    let server = Server::start();
    let mut raw = Raw::greet(&server, BOTH);
    let mut kind = |option, payload: &[u8]| raw.option(option, payload).pop().unwrap().0;
    assert_eq!(kind(option::STARTTLS, &[]), reply::ERR_UNSUP);
    assert_eq!(kind(77, &[1; 60_000]), reply::ERR_UNSUP);
    assert_eq!(kind(option::LIST, &[1]), reply::ERR_INVALID);
    assert_eq!(kind(option::STRUCTURED_REPLY, &[1]), reply::ERR_INVALID);
    assert_eq!(kind(option::INFO, &export_query("none")), reply::ERR_UNKNOWN);
    assert_eq!(kind(option::GO, &export_query("none")), reply::ERR_UNKNOWN);
    assert_eq!(kind(option::GO, &[0, 0, 0, 99]), reply::ERR_INVALID);
    let contexts = context_query("disk", &["base:allocation"]);
    assert_eq!(kind(option::SET_META_CONTEXT, &contexts), reply::ERR_INVALID);
    assert_eq!(kind(option::STRUCTURED_REPLY, &[]), reply::ACK);
    assert_eq!(kind(option::LIST_META_CONTEXT, &context_query("none", &[])), reply::ERR_UNKNOWN);
    assert_eq!(raw.option(option::LIST_META_CONTEXT, &context_query("disk", &["base:"])).len(), 2);
    assert_eq!(raw.option(option::LIST_META_CONTEXT, &context_query("disk", &["qemu:"])).len(), 1);
    let name =
        |volume: &str| (reply::SERVER, [&(volume.len() as u32).to_be_bytes(), volume.as_bytes()].concat());
    let listed: Vec<_> =
        VOLUMES.iter().map(|(volume, _)| name(volume)).chain([(reply::ACK, vec![])]).collect();
    assert_eq!(raw.option(option::LIST, &[]), listed);
    assert_eq!(raw.option(option::INFO, &export_query("disk")).len(), 3);
    assert_eq!(raw.option(option::ABORT, &[]), [(reply::ACK, vec![])]);
    raw.assert_closed();
    server.assert_quiet();
}

#[test]
fn a_context_counts_for_the_export_it_was_selected_for() {
    let server = Server::start();
    let mut raw = Raw::greet(&server, BOTH);
    raw.option(option::STRUCTURED_REPLY, &[]);
    raw.option(option::SET_META_CONTEXT, &context_query("disk", &["base:allocation"]));
    raw.go("slow-disk");
    raw.request(command::BLOCK_STATUS, 0, 0, 4096, &[]);
    let chunk = raw.chunk();
    assert_eq!((chunk.kind, chunk.done), (chunk::ERROR, true));
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn a_client_may_send_everything_at_once() {
    let server = Server::start();
    let mut raw = Raw::connect(&server);
    let request =
        |command, cookie, length| Request { flags: 0, command, cookie, offset: 0, length }.encode().to_vec();
    let all = [
        BOTH.to_be_bytes().to_vec(),
        option_bytes(option::GO, &export_query("disk")),
        request(command::WRITE, 1, 4096),
        vec![9; 4096],
        request(command::FLUSH, 2, 0),
        request(command::DISCONNECT, 3, 0),
    ];
    raw.send(&all.concat());
    raw.take(18 + (20 + 12) + (20 + 14) + 20);
    let mut answers = [raw.simple(), raw.simple()];
    answers.sort_unstable();
    assert_eq!(answers, [(1, 0), (2, 0)]);
    raw.assert_closed();
    assert_eq!(Raw::open(&server, "disk").read(0, 4096), Ok(vec![9; 4096]));
    server.assert_quiet();
}

#[test]
fn long_and_odd_requests_arrive_whole() {
    let server = Server::start();
    let mut raw = Raw::open(&server, "disk");
    for (seed, (offset, length)) in
        [(0, 32 * MIB), (512, 32 * MIB), (3584, 5 * MIB + 512), (4096, 512), (MIB - 512, 1024)]
            .iter()
            .enumerate()
    {
        let data = pattern(seed as u64, *length);
        assert_eq!(raw.write(*offset as u64, &data), 0);
        // In one run of data: streamed when long, assembled otherwise.
        assert!(raw.read(*offset as u64, *length as u32) == Ok(data), "{length} bytes at {offset}");
    }
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn structured_reads_tell_holes_and_may_be_whole() {
    let server = Server::start();
    let mut raw = Raw::open_structured(&server, "disk");
    assert_eq!(raw.write(64 << 10, &[5; 4096]), 0);
    raw.request(command::READ, flag::DF, (64 << 10) - 512, 1024, &[]);
    let whole = raw.chunk();
    assert_eq!((whole.kind, whole.done), (chunk::DATA, true));
    assert_eq!(whole.payload[8..], [[0; 512], [5; 512]].concat());
    raw.request(command::READ, 0, (64 << 10) - 512, 1024, &[]);
    let (hole, data) = (raw.chunk(), raw.chunk());
    assert_eq!((hole.kind, hole.done, data.kind, data.done), (chunk::HOLE, false, chunk::DATA, true));
    raw.request(command::READ, flag::DF, 0, 5 * MIB as u32, &[]);
    assert_eq!(raw.chunk().payload[..4], 75u32.to_be_bytes());

    let status = |raw: &mut Raw, flags| {
        raw.request(command::BLOCK_STATUS, flags, 0, MIB as u32, &[]);
        let chunk = raw.chunk();
        assert_eq!((chunk.kind, chunk.done), (chunk::BLOCK_STATUS, true));
        chunk.payload[4..]
            .chunks(4)
            .map(|word| u32::from_be_bytes(word.try_into().unwrap()))
            .collect::<Vec<_>>()
    };
    let unit = 64 << 10;
    assert_eq!(status(&mut raw, 0), [unit, 3, unit, 0, 14 * unit, 3]);
    assert_eq!(status(&mut raw, flag::REQ_ONE), [unit, 3]);
    assert_eq!(raw.done(command::TRIM, 0, 0, MIB as u32), 0);
    assert_eq!(status(&mut raw, 0), [MIB as u32, 3]);
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn what_is_to_be_on_stable_media_is_passed_on() {
    let server = Server::start();
    let disk = &server.volumes[0];
    let mut raw = Raw::open(&server, "disk");
    // In more than one piece.
    let data = vec![1; 2 * MIB];
    let mut asked_bytes = 0;
    for (command, flags, data) in [
        (command::WRITE, 0, &data[..]),
        (command::WRITE_ZEROES, 0, &[]),
        (command::WRITE_ZEROES, flag::NO_HOLE, &[]),
        (command::TRIM, 0, &[]),
    ] {
        for fua in [0, flag::FUA] {
            raw.request(command, flags | fua, 0, 2 * MIB as u32, data);
            assert_eq!(raw.simple().1, 0);
            asked_bytes += if fua == 0 { 0 } else { 2 * MIB as u64 };
            let passed_on = disk.fua_bytes.load(Ordering::Relaxed);
            assert_eq!(passed_on, asked_bytes, "command {command} with flags {flags}");
        }
    }
    assert_eq!(disk.flushes.load(Ordering::Relaxed), 0);
    assert_eq!(raw.done(command::FLUSH, 0, 0, 0), 0);
    assert_eq!(disk.flushes.load(Ordering::Relaxed), 1);
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn failures_are_told_and_the_connection_goes_on() {
    let server = Server::start();
    let half = DISK_BYTES / 2;
    let mut raw = Raw::open(&server, "faulty-disk");
    assert_eq!(raw.write(half, &[1; 4096]), NOSPC);
    assert_eq!(raw.read(half, 4096), Err(IO));
    // Its last piece fails.
    assert_eq!(raw.read(half - MIB as u64, 2 * MIB as u32), Err(IO));
    assert_eq!(raw.write(half - MIB as u64, &vec![1; 2 * MIB]), NOSPC);
    assert_eq!(raw.read(DISK_BYTES, 512), Err(INVAL));
    assert_eq!(raw.write(DISK_BYTES - 512, &[1; 1024]), NOSPC);
    assert_eq!(raw.write(1, &[1; 512]), INVAL);
    assert_eq!(raw.read(0, 32 * MIB as u32 + 512), Err(INVAL));
    assert_eq!(raw.write(0, &vec![1; 33 * MIB]), INVAL);
    assert_eq!(raw.done(command::FLUSH, flag::FUA, 0, 0), 0);
    assert_eq!(raw.done(command::CACHE, 0, 0, 4096), 0);
    assert_eq!(raw.done(command::WRITE_ZEROES, flag::FAST_ZERO | flag::NO_HOLE, 0, 4096), 95);
    assert_eq!(raw.done(command::WRITE_ZEROES, flag::FAST_ZERO, 0, 4096), 0);
    assert_eq!(raw.done(99, 0, 0, 512), INVAL);
    // A long read in one run has begun when its failure is known: it can only end.
    raw.request(command::READ, 0, half - 16 * MIB as u64, 32 * MIB as u32, &[]);
    raw.assert_closed();

    let mut raw = Raw::open_structured(&server, "faulty-disk");
    raw.request(command::READ, 0, half - MIB as u64, 2 * MIB as u32, &[]);
    let chunks = [raw.chunk(), raw.chunk()];
    assert_eq!(chunks.iter().filter(|chunk| chunk.kind == chunk::ERROR_OFFSET).count(), 1);
    assert!(!chunks[0].done && chunks[1].done);
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn a_connection_that_breaks_the_protocol_ends_alone() {
    let server = Server::start();
    let mut good = Raw::open(&server, "disk");
    let mut bad = Raw::open(&server, "disk");
    bad.send(&[0xee; 28]);
    bad.assert_closed();
    let mut bad = Raw::open(&server, "disk");
    bad.request(command::WRITE, 0, 0, u32::MAX, &[]);
    bad.assert_closed();
    let mut bad = Raw::greet(&server, BOTH);
    bad.send(&[&b"IHAVEOPT"[..], &option::GO.to_be_bytes(), &[0xff; 4]].concat());
    bad.assert_closed();
    let mut bad = Raw::greet(&server, 1 << 20);
    bad.assert_closed();
    assert_eq!(good.write(0, &[1; 4096]), 0);
    assert_eq!(server.counters.broken_connections.load(Ordering::Relaxed), 4);
    good.disconnect();
    server.assert_quiet();
}

#[test]
fn requests_run_concurrently_and_are_answered_as_they_end() {
    let server = Server::start();
    let mut raw = Raw::open(&server, "slow-disk");
    let cookies: Vec<u64> = (0..64).map(|_| raw.request(command::TRIM, 0, 0, 512, &[])).collect();
    let answers: Vec<u64> = cookies.iter().map(|_| raw.simple().0).collect();
    assert_ne!(answers, cookies, "delays of 0 to 3 ms change the order");
    assert_eq!(answers.into_iter().collect::<HashSet<_>>(), cookies.into_iter().collect());
    raw.disconnect();
    server.assert_quiet();
}

#[test]
fn a_client_that_does_not_read_is_held_back() {
    let options = Options { bytes_in_flight_max: 4 * MIB, ..Options::default() };
    let server = Server::with(options, 256 << 20);
    let mut writer = Raw::open(&server, "disk");
    assert_eq!(writer.write(0, &vec![3; MIB]), 0);
    let mut greedy = Raw::open_structured(&server, "disk");
    for _ in 0..500 {
        greedy.request(command::READ, 0, 0, MIB as u32, &[]);
    }
    // Reads are counted when they start; they stop far short of what was asked for.
    eventually("the server stops", || {
        let before = server.counters.requests.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(100));
        before == server.counters.requests.load(Ordering::Relaxed)
    });
    assert!(server.counters.requests.load(Ordering::Relaxed) < 100);
    let held: usize = server.pool.occupancy().iter().map(|(free, all)| all - free).sum();
    assert!(held <= 4 * 16, "{held} units of 64 KiB are held");
    assert_eq!(writer.write(0, &[4; 4096]), 0);
    drop(greedy);
    writer.disconnect();
    server.assert_quiet();
}

#[test]
fn a_client_that_never_reads_is_sent_away() {
    let options = Options { stall_timeout: Duration::from_millis(200), ..Options::default() };
    let server = Server::with(options, 64 << 20);
    let mut idle = Raw::open(&server, "disk");
    assert_eq!(idle.write(0, &vec![3; MIB]), 0);
    let mut stalled = Raw::open_structured(&server, "disk");
    // Few enough that the server reads them all, and then waits for a request and for room at once.
    for _ in 0..12 {
        stalled.request(command::READ, 0, 0, MIB as u32, &[]);
    }
    eventually("the stalled client is sent away", || server.counters.connections() == 1);
    assert_eq!(idle.write(0, &[4; 4096]), 0);
    idle.disconnect();
    server.assert_quiet();
}

#[test]
fn an_exhausted_pool_delays_and_fails_nothing() {
    // Six buffers of the largest class for eight clients with 32 MiB each.
    let server = Server::with(Options::default(), 16 << 20);
    std::thread::scope(|scope| {
        for client in 0..8u64 {
            let server = &server;
            scope.spawn(move || {
                let mut raw = Raw::open(server, "slow-disk");
                let (offset, data) = (client * 32 * MIB as u64, pattern(client, 32 * MIB));
                assert_eq!(raw.write(offset, &data), 0);
                assert!(raw.read(offset, data.len() as u32) == Ok(data));
                // Reads that are assembled hold some buffers while they wait for others.
                let reads: Vec<u64> =
                    (0..8).map(|_| raw.request(command::READ, 0, offset, 4 * MIB as u32, &[])).collect();
                reads.iter().for_each(|_| drop((raw.simple(), raw.take(4 * MIB))));
                raw.disconnect();
            });
        }
    });
    assert!(server.counters.pool_waits.load(Ordering::Relaxed) > 0);
    server.assert_quiet();
}

#[test]
fn a_silent_client_is_sent_away_and_there_is_room_for_the_next() {
    let options =
        Options { connections_max: 3, handshake_timeout: Duration::from_millis(300), ..Options::default() };
    let server = Server::with(options, 64 << 20);
    let mut silent = [Raw::connect(&server), Raw::greet(&server, BOTH)];
    silent[0].take(18);
    let good = Raw::open(&server, "disk");
    let mut refused = Raw::connect(&server);
    refused.assert_closed();
    assert_eq!(server.counters.refused_connections.load(Ordering::Relaxed), 1);
    silent.iter_mut().for_each(Raw::assert_closed);
    let other = Raw::open(&server, "disk");
    // Once it has opened an export a client may be silent.
    std::thread::sleep(Duration::from_millis(400));
    other.disconnect();
    good.disconnect();
    server.assert_quiet();
}

#[test]
fn a_volume_may_grow_and_go_while_it_is_open() {
    let server = Server::start();
    let mut raw = Raw::open(&server, "disk");
    assert_eq!(raw.write(DISK_BYTES, &[1; 4096]), NOSPC);
    server.volumes[0].size_bytes.store(2 * DISK_BYTES, Ordering::Relaxed);
    assert_eq!(raw.write(DISK_BYTES, &[1; 4096]), 0);
    server.volumes[0].size_bytes.store(0, Ordering::Relaxed);
    assert_eq!(raw.write(0, &[1; 4096]), 108);
    raw.disconnect();
    server.assert_quiet();
}

/// Requests that came while the process stopped were answered ESHUTDOWN: clients that would have connected again, and
/// sent them again, saw I/O errors. Found by reading.
#[test]
fn a_stop_fails_no_request() {
    let server = Server::start();
    let mut idle = Raw::open(&server, "disk");
    let mut writer = Raw::open(&server, "disk");
    let mut busy = Raw::open(&server, "slow-disk");
    let before = server.counters.requests.load(Ordering::Relaxed);
    let write = Request { flags: 0, command: command::WRITE, cookie: 7, offset: 0, length: MIB as u32 };
    let requests = || server.counters.requests.load(Ordering::Relaxed) - before;
    writer.send(&write.encode());
    eventually("the write has begun", || requests() == 1);
    for _ in 0..2000 {
        busy.request(command::TRIM, 0, 0, 512, &[]);
    }
    eventually("requests are under way", || requests() > 100);
    server.stop();
    idle.assert_closed();
    // What has begun goes on to its end.
    writer.send(&vec![1; MIB]);
    assert_eq!(writer.simple(), (7, 0));
    writer.assert_closed();
    let mut replies = Vec::new();
    // What was sent and not read resets the connection.
    _ = busy.stream.read_to_end(&mut replies);
    let replies = replies.chunks_exact(16);
    assert!(replies.len() >= 100, "of all that was under way {} requests were answered", replies.len());
    assert!(replies.clone().all(|reply| reply[4..8] == [0; 4]), "a request failed");
    Raw::connect(&server).assert_closed();
    server.assert_quiet();
    assert_eq!(server.counters.failed_requests.load(Ordering::Relaxed), 0);
}
