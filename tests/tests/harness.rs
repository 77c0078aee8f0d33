//! The instruments are tested before what they measure: the NBD client, the stall writer, fio through a
//! bridge and the image maker, against a plain `qemu-nbd` that stands in for a gateway.

#![expect(clippy::unwrap_used, reason = "a test's unwrap is its assertion")]

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use xsan_tests::fio::{Job, Load};
use xsan_tests::foreground::{self, Foreground};
use xsan_tests::image::Image;
use xsan_tests::nbd::{Client, NbdError};
use xsan_tests::network::Network;
use xsan_tests::process::{Handle, Running};
use xsan_tests::stamp::{PAGE_SIZE, Stamp};
use xsan_tests::switch::Link;
use xsan_tests::tools::{Export, raw_export, run};
use xsan_tests::writer::{Work, Writer};

const MIB: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(20);
/// How long the stand-in stays away; what is measured as a stall is at least this.
const PAUSE: Duration = Duration::from_millis(300);

fn disk(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("disk.raw");
    File::create(&path).unwrap().set_len(256 * MIB).unwrap();
    path
}

#[test]
fn the_client_reads_writes_and_reports_errors() {
    let (directory, network) = (work_directory(), Network::take().unwrap());
    let _server = raw_export(network.nbd(0), &disk(directory.path())).unwrap();
    let mut client = Client::connect(network.nbd(0), "", TIMEOUT).unwrap();
    assert_eq!(client.size_bytes(), 256 * MIB);
    let stamp = Stamp { page: 5, generation: 1, seed: 1 };
    client.write_fua(5 * PAGE_SIZE as u64, &stamp.to_page()).unwrap();
    client.flush().unwrap();
    let mut bytes = vec![0; PAGE_SIZE];
    client.read(5 * PAGE_SIZE as u64, &mut bytes).unwrap();
    assert_eq!(Stamp::parse(&bytes), Some(stamp));
    client.write_zeroes(5 * PAGE_SIZE as u64, PAGE_SIZE as u32).unwrap();
    client.trim(0, PAGE_SIZE as u32).unwrap();
    client.read(5 * PAGE_SIZE as u64, &mut bytes).unwrap();
    assert_eq!(bytes, vec![0; PAGE_SIZE]);
    assert!(matches!(client.read(256 * MIB, &mut bytes), Err(NbdError::Request(_))));
    let absent = Client::connect(network.nbd(0), "absent", TIMEOUT);
    assert!(matches!(absent, Err(NbdError::Refused(_))), "{absent:?}");
}

#[test]
fn the_writer_measures_a_stall_and_keeps_its_promises() {
    let (directory, network) = (work_directory(), Network::take().unwrap());
    let path = disk(directory.path());
    let server = raw_export(network.nbd(0), &path).unwrap();
    let work =
        Work { flush_interval: 20, read_percent: 30, ..Work::new(vec![network.nbd(0)], "", 0..500, 4) };
    let writer = Writer::start(work).unwrap();
    writer.wait_operations(200, TIMEOUT).unwrap();
    drop(server);
    std::thread::sleep(PAUSE);
    let _server = raw_export(network.nbd(0), &path).unwrap();
    writer.wait_operations(200, TIMEOUT).unwrap();
    let mut report = writer.stop().unwrap();
    assert!(report.stall >= PAUSE, "{:?}", report.stall);
    assert!(report.losses == 1 && report.flushes > 0, "{} {}", report.losses, report.flushes);
    report.history.check().unwrap();
    let mut client = Client::connect(network.nbd(0), "", TIMEOUT).unwrap();
    report.verify(&mut client, 4).unwrap();
    report.verify_flushed(&mut client, 4).unwrap();

    // A promise that was not kept is found.
    let promise = report.pages.values_mut().next().unwrap();
    promise.acknowledged += 1;
    promise.sent += 1;
    let message = format!("{:#}", report.clone().verify(&mut client, 4).unwrap_err());
    assert!(message.contains(&format!("page {}", report.pages.keys().next().unwrap())), "{message}");
}

/// Clients that have one operation under way each saw one slow write each, however long nobody answered.
#[test]
fn the_foreground_counts_all_that_fell_due_while_nobody_answered() {
    let (directory, network) = (work_directory(), Network::take().unwrap());
    let path = disk(directory.path());
    let server = raw_export(network.nbd(0), &path).unwrap();
    let (gateway, clients, rate) = (network.nbd(0), 4, 400);
    let pages = 16 * MIB / PAGE_SIZE as u64;
    let load = foreground::Load { gateway, export: String::new(), pages, rate, clients, seed: 6 };
    let foreground = Foreground::start(load).unwrap();
    let handle = Handle::open(server.pid()).unwrap();
    let began = foreground.now();
    handle.signal(libc::SIGSTOP).unwrap();
    std::thread::sleep(3 * PAUSE);
    handle.signal(libc::SIGCONT).unwrap();
    let ended = foreground.now();
    let writes = foreground.writes(began..ended).unwrap();
    // Half of what fell due is written, and a third of that waited for less than a third of the time.
    let due = (ended - began).as_secs_f64() * f64::from(rate) / 2.0;
    let slow = writes.iter().filter(|write| write.wait > PAUSE).count();
    assert!((writes.len() as f64 - due).abs() < due / 4.0, "{} writes, not {due}", writes.len());
    assert!(slow as f64 > due / 2.0 && slow < writes.len(), "{slow} of {due} waited long");
    assert!(foreground::percentile(&writes, 100).unwrap() > 2 * PAUSE);
    assert_eq!(foreground.finish(gateway).unwrap(), 16 * MIB);

    // A page that is not what was written last is found.
    let load = foreground::Load { gateway, export: String::new(), pages, rate, clients, seed: 7 };
    let foreground = Foreground::start(load).unwrap();
    let mut client = Client::connect(gateway, "", TIMEOUT).unwrap();
    std::thread::sleep(PAUSE);
    client.write(9 * PAGE_SIZE as u64, &Stamp { page: 9, generation: 99, seed: 7 }.to_page()).unwrap();
    let failed = foreground.finish(gateway).unwrap_err().to_string();
    assert!(failed.contains("page 9") && failed.contains("generation 99"), "{failed}");
}

#[test]
fn fio_behind_a_bridge_outlives_the_gateway() {
    let (directory, network) = (work_directory(), Network::take().unwrap());
    let path = disk(directory.path());
    let server = raw_export(network.nbd(0), &path).unwrap();
    let bridge = Export::bridge(directory.path(), network.nbd(0), "", TIMEOUT).unwrap();
    let uri = bridge.uri();
    let job = Job { runtime: Some(Duration::from_secs(4)), ..Job::verified(&uri, 0, 64 * MIB, 1) };
    let mut load = Load::start(&job, &directory.path().join("fio.json")).unwrap();
    std::thread::sleep(PAUSE);
    drop(server);
    std::thread::sleep(PAUSE);
    assert!(load.exit_status().unwrap().is_none(), "fio did not wait for its gateway");
    let _server = raw_export(network.nbd(0), &path).unwrap();
    let outcome = load.finish(TIMEOUT).unwrap();
    assert!(outcome.write.bytes > 0 && outcome.read.bytes > 0, "{outcome:?}");
}

#[test]
fn an_image_is_a_file_system_and_a_changed_byte_is_found() {
    let directory = work_directory();
    let image = Image::make(directory.path(), 256 * MIB, 32 * MIB).unwrap();
    assert!(image.file_count > 10 && image.content_bytes > 64 * MIB, "{image:?}");
    let copy = directory.path().join("copy.raw");
    let [qcow2, raw] = [&image.qcow2, &copy].map(|path| path.display().to_string());
    run("qemu-img", ["convert", "-O", "raw", &qcow2, &raw]).unwrap();
    assert_eq!(image.compare(&copy).unwrap(), 256 * MIB);
    run("e2fsck", ["-fn", &raw]).unwrap();

    let offset = 200 * MIB + 17;
    let file = File::options().write(true).open(&copy).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xa5], offset).unwrap();
    let message = image.compare(&copy).unwrap_err().to_string();
    assert!(message.ends_with(&format!("byte {offset}")), "{message}");
}

/// How many of `count` datagrams arrive, in their order, and how long the first took.
fn arrivals(from: &UdpSocket, to: &UdpSocket, address: SocketAddr, count: u32) -> (u32, Duration) {
    let (began, mut first, mut last, mut arrived) = (Instant::now(), Duration::ZERO, None, 0);
    for number in 0..count {
        from.send_to(&number.to_le_bytes(), address).unwrap();
    }
    let mut bytes = [0; 4];
    while to.recv_from(&mut bytes).is_ok() {
        first = if arrived == 0 { began.elapsed() } else { first };
        let number = u32::from_le_bytes(bytes);
        assert!(last.is_none_or(|last| last < number), "{number} came after {last:?}");
        (last, arrived) = (Some(number), arrived + 1);
        if arrived == count {
            break;
        }
    }
    (arrived, first)
}

#[test]
fn the_switch_does_to_packets_what_its_links_say() {
    let network = Network::switched(2, 1).unwrap();
    let switch = network.switch().unwrap();
    let address = |index| SocketAddr::new(network.address(index), 4000);
    let sockets = [0, 1].map(|index| {
        let bind = || {
            let socket = UdpSocket::bind(address(index))?;
            socket.set_read_timeout(Some(PAUSE))?;
            Ok(socket)
        };
        network.namespace(index).unwrap().enter(bind).unwrap()
    });
    let there = |count| arrivals(&sockets[0], &sockets[1], address(1), count);
    let back = |count| arrivals(&sockets[1], &sockets[0], address(0), count);
    assert_eq!((there(100).0, back(100).0), (100, 100));
    // One way.
    switch.set(0, 1, Link::CUT);
    assert_eq!((there(100).0, back(100).0), (0, 100));
    switch.set(0, 1, Link::lossy(10));
    // As many at once as a socket's buffer holds.
    let arrived: u32 = (0..4).map(|_| there(200).0).sum();
    assert!((685..=755).contains(&arrived), "{arrived} of 800 arrived");
    assert_eq!(switch.counts().lost, 100 + u64::from(800 - arrived));
    let delay = Duration::from_millis(50);
    switch.set(0, 1, Link::slow(delay));
    let (arrived, took) = there(100);
    assert!(
        arrived == 100 && took >= delay && took < delay * 3,
        "{arrived} arrived, the first after {took:?}"
    );
    // The harness is not disturbed, and a healed link is whole.
    switch.set_all(1, Link::CUT);
    let host = UdpSocket::bind("0.0.0.0:0").unwrap();
    assert_eq!(arrivals(&host, &sockets[1], address(1), 10).0, 10);
    assert_eq!((there(10).0, back(10).0), (0, 0));
    switch.heal();
    assert_eq!((there(10).0, back(10).0), (10, 10));
    assert_eq!(switch.counts().overflowed, 0);
}

#[test]
fn a_namespace_is_gone_with_its_last_user() {
    let network = Network::switched(1, 1).unwrap();
    let address = SocketAddr::new(network.address(0), 4000);
    let mut command = std::process::Command::new("sleep");
    network.namespace(0).unwrap().confine(command.arg("1000"));
    let running = Running::start(&mut command).unwrap();
    let inside = std::fs::read_link(format!("/proc/{}/ns/net", running.pid())).unwrap();
    assert_ne!(inside, std::fs::read_link("/proc/self/ns/net").unwrap(), "it runs where the harness does");
    drop((running, network));
    // No device of the harness is left that leads to its network.
    let routes = std::fs::read_to_string("/proc/net/route").unwrap();
    let std::net::IpAddr::V4(ip) = address.ip() else { unreachable!("networks are of IPv4") };
    let network = format!("\t{:08X}\t", u32::from_le_bytes(ip.octets()) & 0x00ff_ffff);
    assert!(!routes.contains(&network), "{network} is in\n{routes}");
}

/// On the disk that holds the build: direct I/O does not work in every temporary directory.
fn work_directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}
