//! xsan-node as a process, over scripts in place of xsan-control and xsan-data.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::server::{NamedService, UnaryService};
use tonic::{Request, Response, Status};
use xsan_nodekit::config::NodeConfig;
use xsan_protocol::proto::{ClusterStatusReply, ClusterStatusRequest, Node, NodeStatus};

const WAIT: Duration = Duration::from_secs(30);

/// Notes its pid, waits for SIGTERM, notes that. In short sleeps: killed, it leaves none behind that holds our pipes.
const OBEDIENT: &str = "#!/bin/sh\nname=${0##*/}\ntrap 'echo $name stops >> NOTES; exit 0' TERM\n\
                        echo $name $$ $* >> NOTES\nwhile :; do sleep 0.05; done\n";
const REFUSING: &str = "#!/bin/sh\necho 'error 201 DeviceInUse: /dev/sdb: holds ext4' >&2\nexit 78\n";

/// A directory with xsan-node and the scripts beside it, and a data directory.
struct Host {
    root: tempfile::TempDir,
    ip: &'static str,
}

impl Host {
    fn new(ip: &'static str, control: &str, data: &str) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let host = Self { root, ip };
        fs::copy(env!("CARGO_BIN_EXE_xsan-node"), host.path("xsan-node")).expect("it is built");
        for (name, script) in [("xsan-control", control), ("xsan-data", data)] {
            let script = script.replace("NOTES", host.path("notes").to_str().expect("a plain path"));
            fs::write(host.path(name), script).expect("it writes");
            fs::set_permissions(host.path(name), fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        fs::write(host.path("node.conf"), r#"{"dataplane": {"file_size": "256MiB"}}"#).expect("it writes");
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(self.path("xsan-node"));
        command.arg("--data-dir").arg(self.path("data")).args(options);
        command.arg("--config").arg(self.path("node.conf"));
        command
    }

    fn init(&self) -> Command {
        self.command(&["--init-cluster", "--cluster-id", "c", "--node-id", "n1", "--bind-ip", self.ip])
    }

    fn notes(&self) -> String {
        fs::read_to_string(self.path("notes")).unwrap_or_default()
    }

    /// Waits for both scripts to run; their pids, control's first.
    fn pids(&self) -> [u32; 2] {
        wait_until("both children run", || self.notes().lines().count() >= 2);
        let notes = self.notes();
        ["xsan-control", "xsan-data"].map(|name| {
            let line = notes.lines().find(|line| line.starts_with(name)).expect("it runs");
            line.split(' ').nth(1).and_then(|pid| pid.parse().ok()).expect("a pid")
        })
    }
}

/// Runs a program that was just written. Another test's fork may hold it open for writing for a moment, and the
/// kernel runs no program that is.
fn run<T>(mut start: impl FnMut() -> std::io::Result<T>) -> T {
    let deadline = Instant::now() + WAIT;
    loop {
        match start() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result.expect("it starts"),
        }
    }
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < deadline, "not within {WAIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")) {
        Ok(stat) => stat.contains(") Z"),
        Err(_) => true,
    }
}

fn signal(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill is there");
    assert!(sent.success());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A child that does not outlive a test that fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn sigterm_stops_data_then_control_and_exits_0() {
    let host = Host::new("127.0.79.1", OBEDIENT, OBEDIENT);
    let mut node = Running(run(|| host.init().spawn()));
    host.pids();
    let data_dir = host.path("data");
    assert!(host.notes().contains(&format!("--data-dir {}", data_dir.display())), "{}", host.notes());
    signal("-TERM", node.0.id());
    assert!(node.0.wait().expect("it ends").success());
    assert!(host.notes().ends_with("xsan-data stops\nxsan-control stops\n"), "{}", host.notes());
    assert_eq!(NodeConfig::load(&data_dir).expect("it is remembered").cluster.node_id, "n1");
}

#[test]
fn sigkill_takes_the_children_along() {
    let host = Host::new("127.0.79.2", OBEDIENT, OBEDIENT);
    let mut node = Running(run(|| host.init().spawn()));
    let pids = host.pids();
    node.0.kill().expect("it runs");
    node.0.wait().expect("it ends");
    wait_until("the children are gone", || pids.iter().all(|pid| is_gone(*pid)));
    assert!(!host.notes().contains("stops"), "they were killed: {}", host.notes());
}

#[test]
fn a_killed_child_is_started_again() {
    let host = Host::new("127.0.79.3", OBEDIENT, OBEDIENT);
    let mut node = Running(run(|| host.init().spawn()));
    let [_, data] = host.pids();
    signal("-KILL", data);
    wait_until("data runs again", || {
        host.notes().lines().filter(|line| line.starts_with("xsan-data")).count() == 2
    });
    signal("-TERM", node.0.id());
    assert!(node.0.wait().expect("it ends").success());
}

#[test]
fn a_refusing_child_stops_the_node_and_its_reason_is_seen() {
    let host = Host::new("127.0.79.4", OBEDIENT, REFUSING);
    let output = run(|| host.init().output());
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("error 201 DeviceInUse: /dev/sdb: holds ext4\n"), "{}", stderr(&output));
    assert!(stderr(&output).ends_with("xsan-node stops: xsan-data can not run\n"), "{}", stderr(&output));
}

#[test]
fn refusals_have_number_object_and_way_out_and_leave_nothing() {
    let host = Host::new("127.0.79.5", OBEDIENT, OBEDIENT);
    let taken = TcpListener::bind("127.0.79.5:10809").expect("a free port");
    let output = run(|| host.init().output());
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "error 10 AddressInUse: NBD address 127.0.79.5:10809 is in use\n  \
         what to do: stop the other program, or configure another port\n"
    );
    drop(taken);
    fs::write(host.path("node.conf"), r#"{"storage": {"devices": [{"path": "/dev/a", "role": "cach"}]}}"#)
        .expect("it writes");
    let output = run(|| host.init().output());
    assert_eq!(output.status.code(), Some(78));
    let expected = "node.conf: storage.devices[0].role: \"cach\" is not one of cache, capacity\n";
    assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    let output = run(|| host.command(&["--init-cluster", "--join-cluster"]).output());
    assert_eq!(output.status.code(), Some(2));
    assert!(!host.path("data").exists() && host.notes().is_empty());
}

/// A control plane that counts node 1 as up.
#[derive(Clone)]
struct Control;

impl UnaryService<ClusterStatusRequest> for Control {
    type Response = ClusterStatusReply;
    type Future = BoxFuture<Response<ClusterStatusReply>, Status>;

    fn call(&mut self, _: Request<ClusterStatusRequest>) -> Self::Future {
        let node = Node { id: 1, ..Node::default() };
        let nodes = vec![NodeStatus { node: Some(node), state: "up".into(), ..NodeStatus::default() }];
        Box::pin(async { Ok(Response::new(ClusterStatusReply { nodes, ..ClusterStatusReply::default() })) })
    }
}

impl NamedService for Control {
    const NAME: &'static str = "xsan.v1.Cluster";
}

impl Service<http::Request<Body>> for Control {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let codec = tonic_prost::ProstCodec::<ClusterStatusReply, ClusterStatusRequest>::default();
        Box::pin(async move { Ok(tonic::server::Grpc::new(codec).unary(Control, request).await) })
    }
}

#[test]
fn the_ready_line_comes_when_the_node_serves_and_settles_it() {
    let host = Host::new("127.0.79.6", OBEDIENT, OBEDIENT);
    let mut node = Running(run(|| host.init().stdout(Stdio::piped()).spawn()));
    host.pids();
    assert!(!NodeConfig::load(&host.path("data")).expect("it is there").established);

    // The node has looked at its ports; now somebody serves there.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let nbd = TcpListener::bind("127.0.79.6:10809").expect("a free port");
    let address: SocketAddr = "127.0.79.6:8080".parse().expect("an address");
    runtime.spawn(async move {
        let listener = tokio::net::TcpListener::bind(address).await.expect("a free port");
        let server = tonic::transport::Server::builder().add_service(Control);
        server.serve_with_incoming(TcpListenerStream::new(listener)).await
    });
    let mut line = String::new();
    let stdout = node.0.stdout.take().expect("it is piped");
    BufReader::new(stdout).read_line(&mut line).expect("it speaks");
    assert_eq!(line, "node n1 serves: control 127.0.79.6:8080, nbd 127.0.79.6:10809\n");
    wait_until("it is settled", || {
        NodeConfig::load(&host.path("data")).is_ok_and(|config| config.established)
    });
    signal("-TERM", node.0.id());
    assert!(node.0.wait().expect("it ends").success());
    drop(nbd);

    let output = run(|| host.init().output());
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("error 107 ClusterExists: data directory "), "{}", stderr(&output));
}
