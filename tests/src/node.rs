//! One node: its configuration, its three processes, its log.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::namespace::Namespace;
use crate::network::Network;
use crate::process::{self, Handle, Running, Usage};
use crate::wait::{Look, until};

/// A node says that it serves within this time, also when it has a journal to replay.
pub const READY_DEADLINE: Duration = Duration::from_secs(30);
/// A clean stop drains, flushes and closes.
const STOP_DEADLINE: Duration = Duration::from_secs(20);
const LOG_TAIL_LINES: usize = 25;

/// What of a node a test may choose.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Of each file-backed device.
    pub file_size: String,
    /// File-backed devices, each with its store.
    pub stores: usize,
    pub memory: String,
    /// Cores of each node's data process, as its configuration has it; the nodes take them in turn.
    pub cores: Vec<String>,
    pub log_level: String,
    /// Block devices of the nodes that do not keep their store in a file, by the nodes' indexes.
    pub devices: BTreeMap<usize, Vec<PathBuf>>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        let core_count = std::thread::available_parallelism().map_or(1, usize::from);
        let core = |index: usize| (index % core_count).to_string();
        // Two nodes of one shard, and one of two, of which one has no store.
        let two = if core_count > 1 { format!("{},{}", core(2), core(3)) } else { core(0) };
        Self {
            file_size: "4GiB".to_owned(),
            stores: 1,
            memory: "64MiB".to_owned(),
            cores: vec![core(0), core(1), two],
            log_level: "info".to_owned(),
            devices: BTreeMap::new(),
        }
    }
}

impl NodeOptions {
    /// Every node with one shard, on a core of its own as far as there are so many: for measurements.
    pub fn one_shard() -> Self {
        let core_count = std::thread::available_parallelism().map_or(1, usize::from);
        Self { cores: (0..core_count).map(|core| core.to_string()).collect(), ..Self::default() }
    }

    /// Every node with two shards and two stores.
    pub fn two_shards() -> Self {
        let cores =
            if std::thread::available_parallelism().is_ok_and(|count| count.get() > 1) { "0,1" } else { "0" };
        Self { cores: vec![cores.to_owned()], stores: 2, ..Self::default() }
    }
}

#[derive(Debug)]
pub struct Node {
    pub index: usize,
    pub name: String,
    pub data_dir: PathBuf,
    pub control: SocketAddr,
    pub nbd: SocketAddr,
    pub data: SocketAddr,
    config: PathBuf,
    log: PathBuf,
    namespace: Option<Namespace>,
    running: Option<Running>,
}

/// Which of a node's processes a fault concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Data,
    Control,
    All,
}

/// How a node's first start goes.
#[derive(Clone, Copy, Debug)]
pub enum FirstStart {
    Init,
    Join(SocketAddr),
}

impl Node {
    /// Lays out the node's directory and configuration file; starts nothing.
    pub fn prepare(directory: &Path, network: &Network, index: usize, options: &NodeOptions) -> Result<Self> {
        let name = node_name(index);
        let ports = network.ports();
        let device = |path: &PathBuf| json!({ "path": path, "type": "ssd", "role": "capacity" });
        let devices: Vec<_> = options.devices.get(&index).into_iter().flatten().map(device).collect();
        let config = json!({
            "cluster": { "bind_port": ports.control },
            "dataplane": {
                "cores": options.cores[index % options.cores.len()],
                "memory": options.memory,
                "port": ports.data,
                "nbd_port": ports.nbd,
                "file_size": options.file_size,
                "stores": options.stores,
            },
            "storage": { "devices": devices },
            "logging": { "level": options.log_level },
        });
        let path = directory.join(format!("{name}.conf"));
        fs::write(&path, serde_json::to_string_pretty(&config)?)?;
        Ok(Self {
            index,
            data_dir: directory.join(&name),
            control: network.control(index),
            nbd: network.nbd(index),
            data: network.data(index),
            config: path,
            log: directory.join(format!("{name}.log")),
            namespace: network.namespace(index),
            running: None,
            name,
        })
    }

    /// The command of the first start, for those who want to change it before it runs.
    pub fn first_command(&self, cluster_id: &str, how: FirstStart) -> Command {
        let mut command = Command::new(program("xsan-node"));
        match how {
            FirstStart::Init => command.arg("--init-cluster"),
            FirstStart::Join(address) => {
                command.args(["--join-cluster", "--join-address"]).arg(address.to_string())
            }
        };
        command.args(["--cluster-id", cluster_id, "--node-id", &self.name]);
        command.arg("--bind-ip").arg(self.control.ip().to_string());
        command.arg("--data-dir").arg(&self.data_dir).arg("--config").arg(&self.config);
        command
    }

    pub fn start_first(&mut self, cluster_id: &str, how: FirstStart) -> Result<()> {
        self.start(self.first_command(cluster_id, how))
    }

    /// A later start, which needs the data directory only.
    pub fn start_again(&mut self) -> Result<()> {
        let mut command = Command::new(program("xsan-node"));
        command.arg("--data-dir").arg(&self.data_dir);
        self.start(command)
    }

    fn start(&mut self, mut command: Command) -> Result<()> {
        assert!(self.running.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(&self.log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        if let Some(namespace) = &self.namespace {
            namespace.confine(&mut command);
        }
        self.running = Some(Running::start(&mut command)?);
        Ok(())
    }

    /// Waits until this start of the node answers: `xsan-node` says so, once each start.
    pub fn wait_ready(&mut self, starts: usize) -> Result<()> {
        let line = format!("node {} serves", self.name);
        let (name, log) = (self.name.clone(), self.log.clone());
        let running = self.running.as_mut().with_context(|| format!("{name} was not started"))?;
        until(&format!("{name} to serve"), READY_DEADLINE, || {
            if let Some(status) = running.exit_status()? {
                bail!("{name} ended with {status}; its log ends:\n{}", tail(&log));
            }
            let ready = fs::read_to_string(&log)?.matches(&line).count();
            Ok(if ready >= starts { Look::Done(()) } else { Look::NotYet(format!("log:\n{}", tail(&log))) })
        })
    }

    /// How many times the log says that the node serves.
    pub fn ready_count(&self) -> Result<usize> {
        let text = if self.log.exists() { fs::read_to_string(&self.log)? } else { String::new() };
        Ok(text.matches(&format!("node {} serves", self.name)).count())
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Kills the data process; the node's supervisor starts another.
    pub fn kill_data(&self) -> Result<u32> {
        self.kill_child("xsan-data")
    }

    /// Kills the control process; the node's supervisor starts another.
    pub fn kill_control(&self) -> Result<u32> {
        self.kill_child("xsan-control")
    }

    fn kill_child(&self, name: &str) -> Result<u32> {
        let child = self.child(name)?;
        child.kill()?;
        Ok(child.pid)
    }

    /// A process of the node; waits while its supervisor is starting it.
    pub fn child(&self, name: &str) -> Result<Handle> {
        let parent = self.running()?.pid();
        until(&format!("{name} of {}", self.name), READY_DEADLINE, || {
            Ok(match process::child_named(parent, name)? {
                Some(child) => Look::Done(child),
                None => Look::NotYet("it does not run".to_owned()),
            })
        })
    }

    /// Stops processes with SIGSTOP, the supervisor first: they stand still until `Paused` is resumed or dropped.
    pub fn pause(&self, part: Part) -> Result<Paused> {
        let mut handles = Vec::new();
        if part == Part::All {
            handles.push(Handle::open(self.running()?.pid())?);
        }
        for (child, name) in [(Part::Control, "xsan-control"), (Part::Data, "xsan-data")] {
            if part == child || part == Part::All {
                handles.push(self.child(name)?);
            }
        }
        let paused = Paused { handles };
        paused.handles.iter().try_for_each(|handle| handle.signal(libc::SIGSTOP))?;
        Ok(paused)
    }

    /// SIGKILL to all three processes, as a power cut would; the supervisor first, so that it starts nothing.
    pub fn kill(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        let children: Vec<Handle> =
            process::children(running.pid())?.into_iter().filter_map(|pid| Handle::open(pid).ok()).collect();
        running.kill()?;
        for child in &children {
            child.signal(libc::SIGKILL)?;
        }
        children.iter().try_for_each(|child| child.wait_ended(STOP_DEADLINE))
    }

    /// SIGTERM, as a service manager stops it. Its children must be gone when it is.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        let children: Vec<Handle> =
            process::children(running.pid())?.into_iter().filter_map(|pid| Handle::open(pid).ok()).collect();
        let log = &self.log;
        running.terminate(STOP_DEADLINE).with_context(|| format!("the log ends:\n{}", tail(log)))?;
        for child in &children {
            if !child.has_ended()? {
                bail!("process {} of {} outlived it", child.pid, self.name);
            }
        }
        Ok(())
    }

    /// What all the processes of the node have used.
    pub fn usage(&self) -> Result<Usage> {
        let parent = self.running()?.pid();
        let children = process::children(parent)?;
        children
            .into_iter()
            .chain([parent])
            .try_fold(Usage::default(), |sum, pid| Ok(sum + process::usage(pid)?))
    }

    pub fn log_text(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// The file behind the node's store.
    pub fn device_file(&self) -> PathBuf {
        self.data_dir.join("data/store-0.img")
    }

    fn running(&self) -> Result<&Running> {
        self.running.as_ref().with_context(|| format!("{} does not run", self.name))
    }
}

/// Processes that were stopped; they go on when it is dropped.
#[derive(Debug)]
pub struct Paused {
    handles: Vec<Handle>,
}

impl Paused {
    pub fn resume(self) {
        drop(self);
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        for handle in self.handles.iter().rev() {
            if let Err(error) = handle.signal(libc::SIGCONT) {
                eprintln!("process {} does not go on: {error}", handle.pid);
            }
        }
    }
}

pub fn node_name(index: usize) -> String {
    format!("node-{:03}", index + 1)
}

/// The path of one of XSAN's programs: in `XSAN_BIN_DIR`, or built beside this one.
pub fn program(name: &str) -> PathBuf {
    binary_directory().join(name)
}

pub fn binary_directory() -> PathBuf {
    if let Some(directory) = std::env::var_os("XSAN_BIN_DIR") {
        return directory.into();
    }
    let mut directory = std::env::current_exe().expect("a running program has a path");
    directory.pop();
    // Test programs are one directory below the binaries.
    if directory.ends_with("deps") {
        directory.pop();
    }
    directory
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}
