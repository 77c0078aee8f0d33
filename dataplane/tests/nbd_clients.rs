//! The NBD gateway against clients that nobody here wrote, against a client that knows every corner of the
//! protocol, and against clients that break it. Needs nbdinfo and nbdcopy (libnbd), qemu-img and qemu-io, and fio.

#![expect(clippy::unwrap_used, reason = "everything here is a test or a helper of one")]

use std::path::Path;
use std::process::Command;

use raw::{Raw, pattern};
use server::{DISK_BYTES, Server};

#[path = "nbd/hostile.rs"]
mod hostile;
#[path = "nbd/memory.rs"]
mod memory;
#[path = "nbd/protocol.rs"]
mod protocol;
#[path = "nbd/raw.rs"]
mod raw;
#[path = "nbd/server.rs"]
mod server;
#[path = "nbd/stalls.rs"]
mod stalls;

const PACKAGES: &str = "libnbd-bin, qemu-utils and fio";

/// Runs a client to its end, which must be success; returns what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    // No client takes a minute for what these tests ask; one that hangs is the failure that we look for.
    let output = Command::new("timeout").arg("120").arg(program).args(arguments).output();
    let output = output.expect("`timeout` of coreutils runs");
    let code = output.status.code();
    assert!(code != Some(127), "{program} is missing: these tests need the packages {PACKAGES}");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

fn image(path: &Path, data: &[(u64, Vec<u8>)]) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    data.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let server = Server::start();
    let all = run("nbdinfo", &["--list", &format!("nbd://{}", server.address)]);
    for (name, _) in server::VOLUMES {
        assert!(all.contains(&format!("export=\"{name}\"")), "{all}");
    }
    for uri in [server.uri("disk"), server.unix_uri("disk")] {
        let info = run("nbdinfo", &[&uri]);
        for line in [
            "using structured packets",
            "base:allocation",
            "is_read_only: false",
            "can_cache: true",
            "can_df: true",
            "can_fast_zero: true",
            "can_flush: true",
            "can_fua: true",
            "can_multi_conn: true",
            "can_trim: true",
            "can_zero: true",
            "block_size_minimum: 512",
            "block_size_preferred: 4096",
            "block_size_maximum: 33554432",
        ] {
            assert!(info.contains(line), "{line}: {info}");
        }
    }
    assert_eq!(run("nbdinfo", &["--size", &server.uri("disk")]).trim(), DISK_BYTES.to_string());
    server.assert_quiet();
}

#[test]
fn images_go_in_and_come_out_the_same() {
    let server = Server::start();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (source, copy) = (path("source"), path("copy"));
    image(
        source.as_ref(),
        &[(0, pattern(1, 5 << 20)), (100 << 20, pattern(2, 3 << 20)), (200 << 20, pattern(3, 512))],
    );

    for uri in [server.uri("disk"), server.unix_uri("slow-disk")] {
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", &source, &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &source, &uri]);
        run("nbdcopy", &[&uri, &copy]);
        run("cmp", &[&source, &copy]);
        std::fs::remove_file(&copy).unwrap();
    }
    let map = run("nbdinfo", &["--map", "--totals", &server.uri("disk")]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");

    // Over several connections at once, and back onto a volume that holds something else.
    image(source.as_ref(), &[(3 << 20, pattern(4, 9 << 20))]);
    run("nbdcopy", &["--connections=4", "--requests=64", "--flush", &source, &server.uri("disk")]);
    run("nbdcopy", &["--connections=4", "--destination-is-zero", &server.uri("disk"), &copy]);
    run("cmp", &[&source, &copy]);
    run("nbdcopy", &[&server.uri("disk"), &server.unix_uri("slow-disk")]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &server.uri("disk"), &server.uri("slow-disk")]);
    server.assert_quiet();
}

#[test]
fn qemu_io_finds_the_patterns_it_wrote() {
    let server = Server::start();
    let commands = [
        "write -P 7 512 32M",
        "read -P 7 512 32M",
        "write -f -P 8 33M 4k",
        "aio_write -P 9 40M 1M",
        "aio_write -P 10 41M 64k",
        "aio_flush",
        "read -P 9 40M 1M",
        "read -P 10 41M 64k",
        "write -z 1M 3M",
        "read -P 0 1M 3M",
        "write -z -u 8M 4M",
        "read -P 0 8M 4M",
        "discard 16M 4M",
        "read -P 0 16M 4M",
        "read -P 7 20M 1M",
        "flush",
    ];
    for uri in [server.uri("disk"), server.unix_uri("slow-disk")] {
        let mut arguments = vec!["-f", "raw"];
        commands.iter().for_each(|command| arguments.extend(["-c", *command]));
        arguments.push(&uri);
        let output = run("qemu-io", &arguments);
        assert!(!output.contains("failed"), "{output}");
    }
    server.assert_quiet();
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Server::start();
    for (name, uri) in [("disk", server.uri("disk")), ("slow", server.unix_uri("slow-disk"))] {
        let output = run(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &format!("--uri={uri}"),
                "--rw=randwrite",
                "--bssplit=512/20:4k/40:36k/20:256k/15:1m/5",
                "--blockalign=512",
                "--iodepth=32",
                "--size=96M",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--fsync=64",
                "--randrepeat=1",
            ],
        );
        assert!(output.contains("err= 0"), "{name}: {output}");
    }
    server.assert_quiet();
}

#[test]
fn a_hundred_connections_work_at_once() {
    let server = Server::start();
    let mut clients: Vec<Raw> = (0..100).map(|_| Raw::open(&server, "slow-disk")).collect();
    assert_eq!(server.counters.connections(), 100);
    std::thread::scope(|scope| {
        for (index, raw) in clients.iter_mut().enumerate() {
            scope.spawn(move || {
                let offset = index as u64 * (1 << 20) + 512;
                for round in 0..5 {
                    let data = pattern(index as u64 * 8 + round, 70_144);
                    assert_eq!(raw.write(offset, &data), 0);
                    assert!(raw.read(offset, 70_144) == Ok(data));
                }
            });
        }
    });
    clients.into_iter().for_each(Raw::disconnect);
    server.assert_quiet();
}
