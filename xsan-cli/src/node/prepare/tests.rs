//! What is started for which options, file and data directory; and that a refusal changes nothing.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Parser;
use prost::Message;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::server::{NamedService, UnaryService};
use tonic::{Request, Response, Status};
use xsan_nodekit::config::Level;
use xsan_protocol::proto::{ErrorDetail, JoinReply};

use super::*;

struct Host {
    root: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        Self { root: tempfile::tempdir().expect("a directory") }
    }

    fn data_dir(&self) -> PathBuf {
        self.root.path().join("data")
    }

    /// A file with small stores and ports of its own, so that tests do not meet.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.root.path().join(name);
        fs::write(&path, text).expect("it writes");
        path
    }

    fn args(&self, options: &str) -> Args {
        let mut words = vec!["xsan-node", "--data-dir"];
        let data_dir = self.data_dir();
        words.push(data_dir.to_str().expect("a plain path"));
        words.extend(options.split_whitespace());
        Args::try_parse_from(words).expect("valid options")
    }

    fn plan(&self, options: &str) -> Result<Plan, NodeError> {
        plan(&self.args(options), &self.root.path().join("default.conf"))
    }

    /// A node that is in its data directory already.
    fn settle(&self, options: &str, established: bool) -> NodeConfig {
        let mut config = self.plan(options).expect("a good plan").config;
        config.numeric_id = NodeId(1);
        config.established = established;
        fs::create_dir_all(self.data_dir()).expect("a directory");
        config.save().expect("it saves");
        config
    }
}

const INIT: &str = "--init-cluster --cluster-id c --node-id n1 --bind-ip 127.0.78.1";

/// Small stores, for hosts with little space.
const SMALL: &str = r#"{"dataplane": {"file_size": "256MiB"}}"#;

#[test]
fn options_exclude_each_other_and_need_each_other() {
    for words in [
        "--init-cluster --join-cluster --join-address 127.0.0.1:1",
        "--join-cluster",
        "--join-address 127.0.0.1:1",
        "--bind-port 0",
        "--bind-ip host",
    ] {
        let words = ["xsan-node"].into_iter().chain(words.split_whitespace());
        Args::try_parse_from(words).expect_err("not valid");
    }
}

#[test]
fn options_win_over_the_file() {
    let host = Host::new();
    let file = host.file(
        "node.conf",
        r#"{"cluster": {"cluster_id": "f", "node_id": "f", "bind_port": 81, "failure_domain": "r"},
            "dataplane": {"nbd_port": 82}}"#,
    );
    let plan = host.plan(&format!("{INIT} --config {}", file.display())).expect("a good plan");
    assert!(plan.fresh);
    let cluster = &plan.config.cluster;
    assert_eq!((cluster.cluster_id.as_str(), cluster.node_id.as_str()), ("c", "n1"));
    assert_eq!((cluster.bind_port, cluster.failure_domain.as_str()), (81, "r"));
    assert_eq!(plan.config.dataplane.nbd_port, 82);
    assert_eq!(plan.config.config_file, Some(file));
    assert_eq!(cluster.data_dir, host.data_dir());
}

#[test]
fn the_default_file_is_read_if_it_is_there() {
    let host = Host::new();
    host.file("default.conf", r#"{"dataplane": {"nbd_port": 83}}"#);
    assert_eq!(host.plan(INIT).expect("a good plan").config.dataplane.nbd_port, 83);
}

#[test]
fn what_is_missing_or_wrong_is_told_with_its_option() {
    let host = Host::new();
    let error = host.plan("--init-cluster --node-id n1").err().expect("no cluster id");
    assert_eq!(error.to_string(), "cluster.cluster_id: is missing (option --cluster-id)");
    assert_eq!(error.code(), Code::ConfigInvalid);
    let error = host.plan(&format!("{INIT} --force-format /dev/none")).err().expect("not a device of ours");
    assert!(error.to_string().ends_with("(option --force-format)"), "{error}");
    let error = host.plan("").err().expect("there is no node");
    assert_eq!(error.code(), Code::DataDirUnusable);
    let join =
        "--join-cluster --cluster-id c --node-id n --bind-ip 127.0.78.1 --join-address 127.0.78.1:8080";
    let error = host.plan(join).err().expect("joining itself");
    assert!(error.to_string().starts_with("startup.address: 127.0.78.1:8080 is this node itself"), "{error}");
}

#[test]
fn a_node_is_founded_once() {
    let host = Host::new();
    host.settle(INIT, true);
    let error = host.plan(INIT).err().expect("it is there");
    assert_eq!(error.code(), Code::ClusterExists);
    assert!(error.to_string().ends_with("holds node n1 of cluster c already"), "{error}");
}

/// A device was refused at the first start; the operator repeats the command with --force-format.
#[test]
fn a_first_start_that_never_served_may_be_repeated() {
    let host = Host::new();
    host.settle(INIT, false);
    let plan = host.plan(INIT).expect("the same again");
    assert!(!plan.fresh);
    let other = INIT.replace("n1", "n2");
    assert_eq!(host.plan(&other).err().expect("another node").code(), Code::ClusterExists);
    let join = "--join-cluster --cluster-id c --node-id n1 --bind-ip 127.0.78.1 --join-address 127.0.0.9:1";
    assert_eq!(host.plan(join).err().expect("another start").code(), Code::ClusterExists);
}

#[test]
fn a_later_start_remembers_and_reads_its_file_again() {
    let host = Host::new();
    let file = host.file("node.conf", r#"{"logging": {"level": "warn"}}"#);
    let first = host.settle(&format!("{INIT} --config {}", file.display()), true);
    host.file("default.conf", r#"{"logging": {"level": "error"}}"#);

    let plan = host.plan("").expect("a good plan");
    assert!(!plan.fresh && plan.warnings.is_empty());
    assert_eq!(plan.config, first);

    host.file(
        "node.conf",
        r#"{"cluster": {"cluster_id": "c", "bind_port": 81}, "logging": {"level": "debug"}}"#,
    );
    let plan = host.plan("").expect("a good plan");
    assert_eq!(plan.config.logging.level, Level::Debug);
    assert_eq!(plan.config.cluster, first.cluster);
    assert_eq!(plan.warnings, ["cluster.bind_port is \"81\" in the file; the node is, and stays, \"8080\""]);

    fs::remove_file(&file).expect("it was there");
    let plan = host.plan("").expect("a good plan");
    assert_eq!(plan.config, first);
    assert_eq!(plan.warnings.len(), 1);
}

/// Which node a file is for is said by its ids and by its directory.
fn identities(host: &Host) -> [(String, &'static str); 3] {
    let elsewhere = host.root.path().join("elsewhere").display().to_string();
    [
        (r#"{"cluster": {"cluster_id": "other"}}"#.into(), "cluster.cluster_id"),
        (r#"{"cluster": {"node_id": "other"}}"#.into(), "cluster.node_id"),
        (format!(r#"{{"cluster": {{"data_dir": {elsewhere:?}}}}}"#), "cluster.data_dir"),
    ]
}

/// The file of another node was read, its devices with it, and a warning was all.
#[test]
fn a_file_may_not_make_it_another_node() {
    let host = Host::new();
    let file = host.file("node.conf", "{}");
    let named = format!("--config {}", file.display());
    host.settle(&format!("{INIT} {named}"), true);
    for (text, field) in identities(&host) {
        host.file("node.conf", &text);
        let error = host.plan("").err().expect(field);
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert!(error.to_string().starts_with(&format!("{}: {field}: ", file.display())), "{error}");
        assert!(error.to_string().contains("contradicts the data directory"), "{error}");
    }
    host.file("node.conf", r#"{"cluster": {"node_id": "other"}}"#);
    host.plan(&named).err().expect("it is not for n1");
    host.plan(&format!("{named} --node-id n1")).expect("options win");
}

/// One file for several nodes, each with options of its own: they start again as they started first.
#[test]
fn what_options_won_over_is_no_contradiction_later() {
    let host = Host::new();
    for (text, field) in identities(&host) {
        let file = host.file("node.conf", &text);
        let first = host.settle(&format!("{INIT} --config {}", file.display()), true);
        assert_eq!(first.overridden, [field]);
        let plan = host.plan("").expect("it has not changed");
        assert_eq!((&plan.config, plan.warnings.len()), (&first, 0));
        fs::remove_dir_all(host.data_dir()).expect("it is there");
    }
}

#[test]
fn a_data_directory_may_have_several_names() {
    let host = Host::new();
    let link = host.root.path().join("link");
    std::os::unix::fs::symlink(host.data_dir(), &link).expect("a link");
    let text = format!(r#"{{"cluster": {{"data_dir": {:?}}}}}"#, link.display().to_string());
    let file = host.file("node.conf", "{}");
    host.settle(&format!("{INIT} --config {}", file.display()), true);
    host.file("node.conf", &text);
    host.plan("").expect("it is the same directory");
}

/// What was started with options alone, or with another file, stopped when somebody wrote the default file for another node.
#[test]
fn the_default_file_is_for_those_who_have_no_other() {
    let host = Host::new();
    let first = host.settle(INIT, true);
    for (text, field) in identities(&host) {
        host.file("default.conf", &text.replacen('{', r#"{"logging": {"level": "debug"}, "#, 1));
        let plan = host.plan("").expect("it is not its file");
        assert_eq!(plan.config, first);
        assert!(plan.warnings[0].contains(&format!("is not read: its {field} ")), "{:?}", plan.warnings);
    }
    host.file("default.conf", r#"{"cluster": {"node_id": "n1"}, "logging": {"level": "debug"}}"#);
    let plan = host.plan("").expect("it is its file");
    assert_eq!(plan.config.logging.level, Level::Debug);
    assert_eq!(plan.config.config_file, Some(host.root.path().join("default.conf")));

    let file = host.file("node.conf", "{}");
    let first = host.plan(&format!("--config {}", file.display())).expect("a good plan").config;
    first.save().expect("it saves");
    host.file("default.conf", "not even JSON");
    assert_eq!(host.plan("").expect("it is not read").config, first);
}

#[test]
fn options_may_not_make_it_another_node() {
    let host = Host::new();
    host.settle(INIT, true);
    for (option, field) in [
        ("--cluster-id d", "cluster.cluster_id"),
        ("--node-id n2", "cluster.node_id"),
        ("--bind-ip 127.0.0.2", "cluster.bind_ip"),
        ("--bind-port 81", "cluster.bind_port"),
        ("--failure-domain r", "cluster.failure_domain"),
    ] {
        let error = host.plan(option).err().expect(option);
        assert_eq!(error.code(), Code::ConfigInvalid);
        assert!(error.to_string().starts_with(field), "{error}");
        assert!(error.to_string().contains("contradicts the data directory"), "{error}");
    }
    host.plan("--node-id n1 --bind-ip 127.0.78.1").expect("what it is may be said again");
}

/// What a member answers to a join; `None` is silence.
type Answer = Option<Result<u32, (Code, &'static str)>>;

/// A member of the cluster, as far as a node that joins sees it.
#[derive(Clone)]
struct Member {
    answer: Answer,
    asked: Arc<Mutex<Vec<JoinRequest>>>,
}

impl UnaryService<JoinRequest> for Member {
    type Response = JoinReply;
    type Future = BoxFuture<Response<JoinReply>, Status>;

    fn call(&mut self, request: Request<JoinRequest>) -> Self::Future {
        self.asked.lock().expect("no test panics with it").push(request.into_inner());
        let answer = self.answer;
        Box::pin(async move {
            match answer {
                None => std::future::pending().await,
                Some(Ok(node_id)) => Ok(Response::new(JoinReply { node_id })),
                // What the caller gets when the connection breaks off.
                Some(Err((Code::Unreachable, _))) => Err(Status::unavailable("")),
                Some(Err((code, message))) => {
                    let code = code.number().into();
                    let detail = ErrorDetail { code, object: String::new(), message: message.into() };
                    let details = detail.encode_to_vec().into();
                    Err(Status::with_details(tonic::Code::FailedPrecondition, "", details))
                }
            }
        })
    }
}

impl NamedService for Member {
    const NAME: &'static str = "xsan.v1.Raft";
}

/// Only `Join` of the service, so that what control processes say to each other does not matter here.
impl Service<http::Request<Body>> for Member {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        assert_eq!(request.uri().path(), "/xsan.v1.Raft/Join");
        let member = self.clone();
        Box::pin(async move {
            let codec = tonic_prost::ProstCodec::<JoinReply, JoinRequest>::default();
            Ok(tonic::server::Grpc::new(codec).unary(member, request).await)
        })
    }
}

async fn member(answer: Answer) -> (SocketAddr, Arc<Mutex<Vec<JoinRequest>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let asked = Arc::default();
    let server =
        tonic::transport::Server::builder().add_service(Member { answer, asked: Arc::clone(&asked) });
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, asked)
}

/// A plan to join at `address` from an IP that no other test uses.
fn join_plan(host: &Host, ip: &str, address: SocketAddr) -> Plan {
    let file = host.file("node.conf", SMALL);
    let options = format!(
        "--join-cluster --cluster-id c --node-id n2 --bind-ip {ip} --failure-domain r2 \
         --join-address {address} --config {}",
        file.display()
    );
    host.plan(&options).expect("a good plan")
}

#[tokio::test]
async fn a_node_that_joins_has_the_id_that_the_cluster_gave() {
    let host = Host::new();
    let (address, asked) = member(Some(Ok(7))).await;
    let prepared = carry_out(join_plan(&host, "127.0.78.2", address)).await.expect("it joins");
    assert_eq!(prepared.config.numeric_id, NodeId(7));
    assert_eq!(NodeConfig::load(&host.data_dir()).expect("saved"), prepared.config);
    let asked = asked.lock().expect("no panic");
    let [request] = asked.as_slice() else { panic!("asked once: {asked:?}") };
    assert_eq!((request.cluster_id.as_str(), request.name.as_str()), ("c", "n2"));
    assert_eq!((request.address.as_str(), request.control_port), ("127.0.78.2", 8080));
    assert_eq!(request.failure_domain, "r2");
    assert_eq!(request.instance, prepared.config.instance);
    assert_ne!(request.instance, 0);
}

/// The answer to a join was lost, or the node was killed before it had written its number down. The cluster gives
/// the number to the instance that asked first, so the next try has to be that instance.
#[tokio::test]
async fn a_join_without_an_answer_is_asked_again_by_the_same_instance() {
    let host = Host::new();
    let (silent, first) = member(None).await;
    let options = Options {
        attempt_timeout: Duration::from_millis(200),
        deadline: Duration::from_millis(300),
        ..Options::default()
    };
    let error = carry_out_with(join_plan(&host, "127.0.78.6", silent), options).await.err().expect("silence");
    assert_eq!(error.code(), Code::Timeout);
    let (address, second) = member(Some(Ok(3))).await;
    let plan = join_plan(&host, "127.0.78.6", address);
    assert!(!plan.fresh);
    let prepared = carry_out(plan).await.expect("it joins");
    assert_eq!(prepared.config.numeric_id, NodeId(3));
    let instance = |asked: &Mutex<Vec<JoinRequest>>| asked.lock().expect("no panic")[0].instance;
    assert_eq!(instance(&first), instance(&second));
}

/// The node that was asked had proposed the new node and found no quorum in time, or died. The instance was forgotten, the
/// cluster had the node all the same, and the next try was told that its name is taken.
#[tokio::test]
async fn a_join_that_may_have_been_carried_out_is_not_forgotten() {
    let options = Options { deadline: Duration::from_millis(300), ..Options::default() };
    let host = Host::new();
    let (address, _) = member(Some(Err((Code::NoQuorum, "not now")))).await;
    let plan = join_plan(&host, "127.0.78.7", address);
    let error = carry_out_with(plan, options).await.err().expect("no quorum");
    assert_eq!(error.code(), Code::NoQuorum);
    assert!(host.data_dir().exists());

    let host = Host::new();
    let (broken, _) = member(Some(Err((Code::Unreachable, "")))).await;
    let plan = join_plan(&host, "127.0.78.8", broken);
    let error = carry_out_with(plan, options).await.err().expect("no answer");
    assert_eq!(error.code(), Code::Unreachable);
    assert!(host.data_dir().exists());
}

#[tokio::test]
async fn a_refused_join_leaves_nothing_behind() {
    for code in [Code::ClusterIdMismatch, Code::NodeIdTaken, Code::VersionMismatch] {
        let host = Host::new();
        let (address, _) = member(Some(Err((code, "no")))).await;
        let error = carry_out(join_plan(&host, "127.0.78.3", address)).await.err().expect("refused");
        assert_eq!(error.code(), code);
        assert_eq!(error.to_string(), "node n2 can not join cluster c: no");
        assert!(!host.data_dir().exists());
    }
}

#[tokio::test]
async fn a_join_to_a_dead_address_leaves_nothing_behind() {
    let host = Host::new();
    let dead = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
    let error = carry_out(join_plan(&host, "127.0.78.4", dead)).await.err().expect("nobody there");
    assert_eq!(error.code(), Code::JoinAddressDead);
    assert_eq!(error.to_string(), format!("join address {dead}: nothing answers (connection refused)"));
    assert_eq!(error.exit_code(), xsan_nodekit::exit::UNREACHABLE);
    assert!(!host.data_dir().exists());
}

#[tokio::test]
async fn a_founder_is_number_one_and_a_missing_device_stops_it() {
    let host = Host::new();
    let small = host.file("small.conf", SMALL);
    let init = INIT.replace("127.0.78.1", "127.0.78.5");
    let device = host.root.path().join("none.img");
    let text = format!(r#"{{"storage": {{"devices": [{{"path": {:?}}}]}}}}"#, device.display().to_string());
    let file = host.file("node.conf", &text);
    let plan = host.plan(&format!("{init} --config {}", file.display())).expect("a good plan");
    let error = carry_out(plan).await.err().expect("no such device");
    assert_eq!(error.code(), Code::DeviceUnusable);
    assert!(!host.data_dir().exists());

    let plan = host.plan(&format!("{init} --config {}", small.display())).expect("a good plan");
    let prepared = carry_out(plan).await.expect("it is founded");
    assert_eq!(prepared.config.numeric_id, NodeId(1));
    assert!(!prepared.config.established);
    assert_eq!(NodeConfig::load(&host.data_dir()).expect("saved"), prepared.config);
}
