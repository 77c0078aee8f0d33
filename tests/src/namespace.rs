//! Network namespaces without names, and tun devices in them.
//!
//! Used by `switch`. A namespace lives as long as something holds it open or runs in it, a tun device as long as
//! its descriptor: nothing is left behind however the harness ends, and no two harnesses meet.
//!
//! Invariants
//! - Only threads made for it enter a namespace: all others of the harness stay where they were.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::tools::run;

/// As Ethernet with jumbo frames: packets are few, and a lost one is not a whole window.
const MTU: &str = "9000";
/// Packets that a device holds before it drops some, as a bounded switch does.
const QUEUE_PACKETS: &str = "4000";

/// A network namespace, held open.
#[derive(Clone, Debug)]
pub struct Namespace(Arc<OwnedFd>);

impl Namespace {
    /// # Errors
    /// The harness has no right to make one.
    pub fn create() -> Result<Self> {
        // SAFETY: geteuid only returns a number.
        ensure!(unsafe { libc::geteuid() } == 0, "network namespaces need root: run this test as root");
        let make = || -> Result<File> {
            // SAFETY: unshare takes flags; it concerns this thread alone, which ends after it.
            ensure!(unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0, io::Error::last_os_error());
            Ok(File::open("/proc/thread-self/ns/net")?)
        };
        let made = on_a_thread_of_its_own(make).context("making a network namespace")?;
        let namespace = Self(Arc::new(made.into()));
        namespace.enter(|| run("ip", ["link", "set", "lo", "up"]))?;
        Ok(namespace)
    }

    /// Carries `work` out on a thread inside: sockets that it makes stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let fd = self.0.as_raw_fd();
        on_a_thread_of_its_own(move || {
            set_namespace(fd)?;
            work()
        })
    }

    /// Has the process that `command` starts run inside.
    pub fn confine(&self, command: &mut Command) {
        let namespace = self.clone();
        // SAFETY: setns is async-signal-safe; the descriptor is open until the child has replaced itself.
        unsafe {
            command.pre_exec(move || set_namespace(namespace.0.as_raw_fd()));
        }
    }
}

fn set_namespace(fd: i32) -> io::Result<()> {
    // SAFETY: setns takes a descriptor and a flag.
    if unsafe { libc::setns(fd, libc::CLONE_NEWNET) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn on_a_thread_of_its_own<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| scope.spawn(work).join()).expect("the work in a namespace does not panic")
}

/// A tun device of the calling thread's namespace that is up and has `address`/24: what is sent to others of that
/// network is read from the file, what is written to it arrives. Reads and writes do not wait.
pub fn tun(address: Ipv4Addr) -> Result<File> {
    let path = "/dev/net/tun";
    let device = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let device = device.with_context(|| format!("{path}: does the kernel have tun devices?"))?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"xsan%d") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request is an ifreq that outlives the call; the kernel writes the device's name into it.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    ensure!(result == 0, "making a tun device: {}", io::Error::last_os_error());
    let name: String =
        request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| *byte as u8 as char).collect();
    run("ip", ["address", "add", &format!("{address}/24"), "dev", &name])?;
    run("ip", ["link", "set", &name, "mtu", MTU, "txqueuelen", QUEUE_PACKETS, "up"])?;
    Ok(device)
}
