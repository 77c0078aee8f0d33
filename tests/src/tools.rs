//! Clients that nobody here wrote: qemu-img, qemu-io, libnbd's tools, e2fsprogs.

use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::Answer;
use crate::process::Running;
use crate::wait::{Look, until};

/// Debian keeps e2fsprogs out of a user's path.
const SYSTEM_DIRECTORY: &str = "/usr/sbin";
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Runs a tool that must be installed (tools/setup does) and must succeed.
pub fn run<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Result<Answer> {
    try_run(name, arguments)?.succeeded()
}

/// Runs a tool that must be installed, and whose failure may be what is asked for.
pub fn try_run<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> Result<Answer> {
    let answer = Answer::of(Command::new(locate(name)).args(arguments));
    answer.with_context(|| format!("is {name} installed? tools/setup installs what is needed"))
}

fn locate(name: &str) -> PathBuf {
    let system = Path::new(SYSTEM_DIRECTORY).join(name);
    if system.exists() { system } else { PathBuf::from(name) }
}

/// A `qemu-nbd` that exports something on a Unix socket.
#[derive(Debug)]
pub struct Export {
    running: Running,
    socket: PathBuf,
}

impl Export {
    /// A bridge to a gateway that reconnects when the gateway goes away, for clients which give up at once.
    pub fn bridge(directory: &Path, gateway: SocketAddr, volume: &str, reconnect: Duration) -> Result<Self> {
        let (host, port, seconds) = (gateway.ip(), gateway.port(), reconnect.as_secs());
        let image = format!(
            "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host={host},file.server.port={port},\
             file.export={volume},file.reconnect-delay={seconds},file.open-timeout={seconds}"
        );
        let name = format!("bridge-{volume}-{port}-{}.sock", host.to_string().replace('.', "-"));
        Self::start(&directory.join(name), &["--image-opts", &image])
    }

    fn start(socket: &Path, arguments: &[&str]) -> Result<Self> {
        let mut command = Command::new(locate("qemu-nbd"));
        command.args(["--persistent", "--shared=32", "--socket"]).arg(socket).args(arguments);
        command.stdin(Stdio::null());
        let mut export = Self { running: Running::start(&mut command)?, socket: socket.to_owned() };
        let name = socket.display().to_string();
        until(&format!("qemu-nbd at {name}"), START_DEADLINE, || {
            ensure!(export.running.exit_status()?.is_none(), "qemu-nbd ended at once");
            Ok(match std::os::unix::net::UnixStream::connect(&export.socket) {
                Ok(_) => Look::Done(()),
                Err(error) => Look::NotYet(error.to_string()),
            })
        })?;
        Ok(export)
    }

    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

/// An unreplicated raw file behind `qemu-nbd` on TCP: what XSAN's gateway is compared with.
pub fn raw_export(address: SocketAddr, file: &Path) -> Result<Running> {
    let mut command = Command::new(locate("qemu-nbd"));
    command.args(["--persistent", "--shared=32", "--format=raw", "--cache=none", "--aio=native"]);
    command
        .arg("--bind")
        .arg(address.ip().to_string())
        .arg("--port")
        .arg(address.port().to_string())
        .arg(file);
    let mut running = Running::start(command.stdin(Stdio::null()))?;
    until(&format!("qemu-nbd at {address}"), START_DEADLINE, || {
        ensure!(running.exit_status()?.is_none(), "qemu-nbd ended at once");
        Ok(match std::net::TcpStream::connect(address) {
            Ok(_) => Look::Done(()),
            Err(error) => Look::NotYet(error.to_string()),
        })
    })?;
    Ok(running)
}
