//! A cluster of real nodes, on loopback or behind a switch: start, faults, waiting, stop.
//!
//! One cluster runs at a time in a process: what is timed is not disturbed by another test. The directory
//! is kept, and named, when nodes do not come up or their owner panics or asks for it, and is gone otherwise. That of a program
//! which tells failure by its exit status is left to its caller: `tools/lib.sh`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;
use xsan_protocol::error::Code;
use xsan_protocol::proto::ClusterStatusReply;

use crate::control::{self, Control};
use crate::device::LoopDevice;
use crate::nbd::Client;
use crate::network::Network;
use crate::node::{FirstStart, Node, NodeOptions, Part, Paused, binary_directory, node_name, program};
use crate::process::Usage;
use crate::switch::{Link, Switch};
use crate::wait::{Look, until};

pub const CLUSTER_ID: &str = "xsan-test";
/// For a state that is reached by messages alone.
pub const SETTLE_DEADLINE: Duration = Duration::from_secs(30);
/// For a state that is reached by moving data.
pub const RESYNC_DEADLINE: Duration = Duration::from_secs(180);
const NBD_TIMEOUT: Duration = Duration::from_secs(40);
/// The longest path of a Unix socket is 107 bytes, and a bridge's name takes 36 of them. `tools/lib.sh` knows it, too.
const WORK_PATH_MAX: usize = 70;
/// What `XSAN_KEEP` says when the directory is the caller's to remove.
const KEEP_FOR_CALLER: &str = "caller";

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    network: Network,
    options: NodeOptions,
    /// Asked nothing: they would answer late, or from the past.
    avoided: BTreeSet<usize>,
    devices: Vec<(usize, LoopDevice)>,
    /// The lives of data processes that were killed, by node. Until its lease ends the cluster shows a dead one as up:
    /// `wait_healthy` must not be satisfied by that.
    ended: Mutex<BTreeMap<usize, u64>>,
    // Dropped after the nodes: fields are dropped in order.
    directory: WorkDirectory,
    _turn: MutexGuard<'static, ()>,
}

impl Cluster {
    pub fn start(node_count: usize) -> Result<Self> {
        Self::start_with(node_count, NodeOptions::default())
    }

    /// Founds a cluster with node 0 and joins the others; all of them serve when this returns.
    pub fn start_with(node_count: usize, options: NodeOptions) -> Result<Self> {
        let mut cluster = Self::prepare(options)?;
        cluster.add_nodes(node_count)?;
        Ok(cluster)
    }

    /// As `start_with`, each node in a network namespace of its own: see `switch`.
    pub fn start_switched(node_count: usize, options: NodeOptions, seed: u64) -> Result<Self> {
        let mut cluster = Self::prepare_switched(node_count, options, seed)?;
        cluster.add_nodes(node_count)?;
        Ok(cluster)
    }

    /// As `prepare`, for so many nodes behind a switch.
    pub fn prepare_switched(node_count: usize, options: NodeOptions, seed: u64) -> Result<Self> {
        Self::prepare_on(|| Network::switched(node_count, seed), options)
    }

    /// A cluster without nodes, for what goes wrong before there is one.
    pub fn prepare(options: NodeOptions) -> Result<Self> {
        Self::prepare_on(Network::take, options)
    }

    fn prepare_on(network: impl FnOnce() -> Result<Network>, options: NodeOptions) -> Result<Self> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            program("xsan-node").exists(),
            "{} holds no xsan-node; build it: cargo build --workspace --bins",
            binary_directory().display()
        );
        let directory = WorkDirectory::create()?;
        let (nodes, avoided, devices) = (Vec::new(), BTreeSet::new(), Vec::new());
        let (network, ended) = (network()?, Mutex::default());
        Ok(Self { nodes, network, options, avoided, devices, ended, directory, _turn: turn })
    }

    pub fn add_nodes(&mut self, count: usize) -> Result<()> {
        let added = (0..count).try_for_each(|_| self.add_node().map(drop));
        let healthy = added.and_then(|()| self.wait_healthy(SETTLE_DEADLINE).map(drop));
        // Who starts a cluster drops it with the error, before a test panics at that.
        self.directory.failed |= healthy.is_err();
        healthy
    }

    /// Gives a node that is still to be added a block device instead of a file, or one more.
    pub fn use_device(&mut self, index: usize, device: LoopDevice) {
        assert!(index >= self.nodes.len(), "node {index} has its store already");
        self.options.devices.entry(index).or_default().push(device.path().to_owned());
        self.devices.push((index, device));
    }

    /// The first device that `use_device` gave to a node.
    pub fn device(&self, index: usize) -> &LoopDevice {
        let (_, device) = self.devices.iter().find(|(node, _)| *node == index).expect("it has a device");
        device
    }

    /// Adds a node, founding the cluster when it is the first, and waits until it serves.
    pub fn add_node(&mut self) -> Result<usize> {
        let mut node = self.spare_node()?;
        node.start_first(CLUSTER_ID, self.next_start())?;
        node.wait_ready(1)?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    /// The next node, laid out and not started; not part of the cluster yet.
    pub fn spare_node(&self) -> Result<Node> {
        Node::prepare(self.directory.path(), &self.network, self.nodes.len(), &self.options)
    }

    pub fn next_start(&self) -> FirstStart {
        self.nodes.first().map_or(FirstStart::Init, |first| FirstStart::Join(first.control))
    }

    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The network that the cluster lives on, for what stands beside it.
    pub const fn network(&self) -> &Network {
        &self.network
    }

    /// What is between the nodes of `start_switched`.
    pub fn switch(&self) -> &Switch {
        self.network.switch().expect("the cluster was started behind a switch")
    }

    // Faults.

    /// Sets all links of a node, both ways. A node that is cut off is asked nothing until `heal`.
    pub fn set_links(&mut self, index: usize, link: Link) {
        self.switch().set_all(index, link);
        if link.cut {
            self.avoid(index);
        }
    }

    /// Makes all links whole, and asks every node again.
    pub fn heal(&mut self) {
        if let Some(switch) = self.network.switch() {
            switch.heal();
        }
        self.avoided.clear();
    }

    /// Asks this node nothing until `heal`; it is cut off or stands still.
    pub fn avoid(&mut self, index: usize) {
        self.avoided.insert(index);
    }

    /// Stops processes of a node until the result is dropped.
    pub fn pause(&self, index: usize, part: Part) -> Result<Paused> {
        self.nodes[index].pause(part)
    }

    pub fn kill_data(&self, index: usize) -> Result<u32> {
        self.note_lives(index..index + 1)?;
        self.nodes[index].kill_data()
    }

    pub fn kill_control(&self, index: usize) -> Result<u32> {
        self.nodes[index].kill_control()
    }

    pub fn kill_node(&mut self, index: usize) -> Result<()> {
        self.kill_nodes(&[index])
    }

    /// As at once as can be.
    pub fn kill_nodes(&mut self, indexes: &[usize]) -> Result<()> {
        self.note_lives(indexes.iter().copied())?;
        indexes.iter().try_for_each(|index| self.nodes[*index].kill())
    }

    /// All the processes of all the nodes, as a power cut of the room would (without losing what disks hold).
    pub fn kill_all(&mut self) -> Result<()> {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.kill_nodes(&all)
    }

    fn ended(&self) -> MutexGuard<'_, BTreeMap<usize, u64>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These data processes are about to be killed.
    fn note_lives(&self, indexes: impl Iterator<Item = usize>) -> Result<()> {
        let status = self.status().context("before a kill")?;
        let life = |index: usize| Some((index, control::life(&status, &self.nodes[index].name)?));
        self.ended().extend(indexes.filter_map(life));
        Ok(())
    }

    /// The first node whose data process was killed and of which no new one is known yet.
    fn dead_in(&self, status: &ClusterStatusReply) -> Option<&Node> {
        let mut ended = self.ended();
        ended.retain(|index, ended| control::life(status, &self.nodes[*index].name) == Some(*ended));
        ended.keys().next().map(|index| &self.nodes[*index])
    }

    pub fn stop_node(&mut self, index: usize) -> Result<()> {
        self.nodes[index].stop()
    }

    pub fn restart(&mut self, index: usize) -> Result<()> {
        self.start_again(&[index])
    }

    /// Starts several nodes at once: alone, the first of them would wait for a quorum.
    pub fn start_again(&mut self, indexes: &[usize]) -> Result<()> {
        let mut starts = Vec::new();
        for &index in indexes {
            starts.push(self.nodes[index].ready_count()? + 1);
            self.nodes[index].start_again()?;
        }
        for (&index, starts) in indexes.iter().zip(starts) {
            self.nodes[index].wait_ready(starts)?;
        }
        Ok(())
    }

    /// Stops every node with SIGTERM; each must end cleanly.
    pub fn stop(mut self) -> Result<()> {
        self.nodes.iter_mut().try_for_each(Node::stop)
    }

    // State.

    /// Of the nodes that run and are not avoided.
    pub fn control(&self) -> Control {
        Control::new(self.asked().map(|node| node.control).collect())
    }

    fn asked(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.is_running() && !self.avoided.contains(&node.index))
    }

    pub fn status(&self) -> Result<ClusterStatusReply> {
        self.control().status()
    }

    pub fn wait_status(
        &self,
        what: &str,
        deadline: Duration,
        mut holds: impl FnMut(&ClusterStatusReply) -> bool,
    ) -> Result<ClusterStatusReply> {
        until(what, deadline, || match self.status() {
            Ok(status) if holds(&status) => Ok(Look::Done(status)),
            Ok(status) => Ok(Look::NotYet(control::summary(&status))),
            Err(error) => Ok(Look::NotYet(format!("{error:#}"))),
        })
    }

    /// A leader, every node up, every replica acting, and of every process that was killed a new life, as every node that is
    /// asked sees it: one that was away answers from an old map until it has caught up.
    pub fn wait_healthy(&self, deadline: Duration) -> Result<ClusterStatusReply> {
        until("every replica to act", deadline, || {
            let mut last = None;
            for node in self.asked() {
                let status = match Control::new(vec![node.control]).status() {
                    Ok(status) => status,
                    Err(error) => return Ok(Look::NotYet(format!("{}: {error:#}", node.name))),
                };
                if !control::is_healthy(&status, self.nodes.len()) {
                    return Ok(Look::NotYet(format!("{}: {}", node.name, control::summary(&status))));
                }
                if let Some(dead) = self.dead_in(&status) {
                    return Ok(Look::NotYet(format!("{}: no new data process is known", dead.name)));
                }
                let version = status.map_version;
                if last.replace(status).is_some_and(|other| other.map_version != version) {
                    return Ok(Look::NotYet(format!("the map of {} is another one", node.name)));
                }
            }
            Ok(last.map_or_else(|| Look::NotYet("no node runs".to_owned()), Look::Done))
        })
    }

    /// The sum of all groups' epochs: it grows by one with every change of a group.
    pub fn epochs(&self) -> Result<u64> {
        Ok(self.control().map()?.groups.iter().map(|group| u64::from(group.epoch)).sum())
    }

    /// The node whose control process leads.
    pub fn leader(&self) -> Result<usize> {
        let status = self.wait_status("a leader", SETTLE_DEADLINE, |status| {
            status.nodes.iter().any(|node| node.leader && node.state == "up")
        })?;
        let leader = status.nodes.iter().find(|node| node.leader).and_then(|node| node.node.as_ref());
        let name = &leader.context("the leader is no node")?.name;
        self.nodes.iter().position(|node| node.name == *name).context("the leader is no node of ours")
    }

    /// The data and control processes of all nodes.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let children = ["xsan-control", "xsan-data"];
        let nodes = self.nodes.iter();
        nodes.flat_map(|node| children.map(|name| Ok(node.child(name)?.pid))).collect()
    }

    /// What all the processes of all the running nodes have used.
    pub fn usage(&self) -> Result<Usage> {
        let running = self.nodes.iter().filter(|node| node.is_running());
        running.into_iter().try_fold(Usage::default(), |sum, node| Ok(sum + node.usage()?))
    }

    // Commands and clients.

    /// Runs `xsan-cli` against a node that runs.
    pub fn cli(&self, arguments: &[&str]) -> Result<Answer> {
        self.command("xsan-cli", arguments)
    }

    /// As `cli`, with `--json`; the command must succeed.
    pub fn cli_json(&self, arguments: &[&str]) -> Result<Value> {
        let answer = self.cli(&[&["--json"], arguments].concat())?.succeeded()?;
        serde_json::from_str(&answer.stdout).with_context(|| format!("this is not JSON: {}", answer.stdout))
    }

    pub fn debug(&self, arguments: &[&str]) -> Result<Answer> {
        self.command("xsan-debug", arguments)
    }

    fn command(&self, name: &str, arguments: &[&str]) -> Result<Answer> {
        let node = self.asked().next().context("no node runs")?;
        let mut command = Command::new(program(name));
        command.arg("--address").arg(node.control.to_string()).args(arguments);
        Answer::of(&mut command)
    }

    pub fn create_volume(&self, name: &str, size: &str, replica_count: usize) -> Result<()> {
        let count = replica_count.to_string();
        self.cli(&["volume", "create", "--name", name, "--size", size, "--replica-count", &count])?
            .succeeded()?;
        // Its groups have primaries that have peered when the first read is answered.
        self.connect(0, name)?.read(0, &mut [0; 4096])?;
        self.wait_healthy(SETTLE_DEADLINE)?;
        Ok(())
    }

    pub fn uri(&self, index: usize, volume: &str) -> String {
        format!("nbd://{}/{volume}", self.nodes[index].nbd)
    }

    /// Our own client, through the gateway of a node; waits until the gateway accepts.
    pub fn connect(&self, index: usize, volume: &str) -> Result<Client> {
        let address = self.nodes[index].nbd;
        until(&format!("{volume} at {address}"), SETTLE_DEADLINE, || {
            match Client::connect(address, volume, NBD_TIMEOUT) {
                Ok(client) => Ok(Look::Done(client)),
                Err(error) => Ok(Look::NotYet(error.to_string())),
            }
        })
    }
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Answer {
    pub line: String,
    pub exit_code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Answer {
    pub fn of(command: &mut Command) -> Result<Self> {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let line = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let started = Instant::now();
        let output =
            command.stdin(Stdio::null()).output().with_context(|| format!("{line} does not start"))?;
        let Output { status, stdout, stderr } = output;
        Ok(Self {
            line,
            exit_code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            took: started.elapsed(),
        })
    }

    pub fn succeeded(self) -> Result<Self> {
        ensure!(
            self.exit_code == Some(0),
            "{} ended with {:?}:\n{}{}",
            self.line,
            self.exit_code,
            self.stdout,
            self.stderr
        );
        Ok(self)
    }

    /// The command failed with one of these errors: number and name, and each of `words`, on standard error.
    pub fn refused_with(&self, codes: &[Code], words: &[&str]) -> Result<()> {
        ensure!(self.exit_code.is_some_and(|code| code != 0), "{} did not fail: {self:?}", self.line);
        let labels: Vec<String> =
            codes.iter().map(|code| format!("error {} {}", code.number(), code.name())).collect();
        if !labels.iter().any(|label| self.stderr.contains(label)) {
            bail!(
                "{} should have said {}; it said:\n{}{}",
                self.line,
                labels.join(" or "),
                self.stdout,
                self.stderr
            );
        }
        for word in words {
            ensure!(
                self.stderr.contains(word),
                "{} does not name {word:?}; it said:\n{}",
                self.line,
                self.stderr
            );
        }
        Ok(())
    }
}

/// Where a cluster's files are: under `XSAN_WORK_DIR`, or beside the binaries, on a real disk (a temporary
/// directory in memory would not do for direct I/O).
#[derive(Debug)]
struct WorkDirectory {
    directory: Option<TempDir>,
    /// Nodes did not come up.
    failed: bool,
}

impl WorkDirectory {
    fn create() -> Result<Self> {
        let base = match std::env::var_os("XSAN_WORK_DIR") {
            Some(base) => PathBuf::from(base),
            None => binary_directory().join("xsan-work"),
        };
        fs::create_dir_all(&base).with_context(|| format!("{} can not be made", base.display()))?;
        let directory = tempfile::Builder::new().prefix("c-").tempdir_in(base)?;
        let length = directory.path().as_os_str().len();
        ensure!(
            length <= WORK_PATH_MAX,
            "{} is too long for the Unix sockets in it; set XSAN_WORK_DIR to a shorter one",
            directory.path().display()
        );
        Ok(Self { directory: Some(directory), failed: false })
    }

    fn path(&self) -> &Path {
        self.directory.as_ref().expect("it is there until it is dropped").path()
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        let Some(directory) = self.directory.take() else { return };
        let keep = std::env::var_os("XSAN_KEEP");
        if keep.as_deref().is_some_and(|keep| keep == KEEP_FOR_CALLER) {
            let _ = directory.keep();
            return;
        }
        if !self.failed && !std::thread::panicking() && keep.is_none() {
            return;
        }
        // The devices of a failed test are seldom looked at, and large.
        let kept = directory.keep();
        for index in 0.. {
            let device = kept.join(node_name(index)).join("data/store-0.img");
            if !kept.join(format!("{}.conf", node_name(index))).exists() {
                break;
            }
            if keep.is_none() && device.exists() {
                let _ = fs::remove_file(device);
            }
        }
        eprintln!("logs and directories of the nodes are kept in {}", kept.display());
    }
}
