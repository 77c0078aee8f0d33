//! The client against control planes that answer from a script, over real sockets.

use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, transport::Server};
use xsan_protocol::proto::cluster_server::{Cluster, ClusterServer};

use super::*;

/// What the node answers; the last answer repeats.
#[derive(Clone, Debug)]
enum Answer {
    Good,
    GoodAfter(Duration),
    No(Code, &'static str, &'static str),
    NoNumbered(u32),
    LeaderIs(Address),
    Hang,
    Plain(tonic::Code),
}

#[derive(Clone)]
struct Node {
    script: Arc<Vec<Answer>>,
    calls: Arc<AtomicUsize>,
}

fn refusal(code: u32, object: &str, message: &str) -> Status {
    let detail = proto::ErrorDetail { code, object: object.into(), message: message.into() };
    Status::with_details(tonic::Code::FailedPrecondition, message, detail.encode_to_vec().into())
}

impl Node {
    async fn next<T>(&self, good: T) -> Result<Response<T>, Status> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match self.script.get(call).or(self.script.last()).expect("a script has an answer").clone() {
            Answer::Good => Ok(Response::new(good)),
            Answer::GoodAfter(time) => {
                sleep(time).await;
                Ok(Response::new(good))
            }
            Answer::No(code, object, message) => Err(refusal(code.number().into(), object, message)),
            Answer::NoNumbered(number) => Err(refusal(number, "thing", "words of the future")),
            Answer::LeaderIs(address) => {
                Err(refusal(Code::NotLeader.number().into(), &address.to_string(), "not me"))
            }
            Answer::Hang => std::future::pending().await,
            Answer::Plain(code) => Err(Status::new(code, "plain")),
        }
    }
}

macro_rules! service {
    ($($method:ident($request:ident) -> $reply:ident;)*) => {
        #[tonic::async_trait]
        impl Cluster for Node {
            $(async fn $method(&self, _: Request<proto::$request>) -> Result<Response<proto::$reply>, Status> {
                self.next(proto::$reply::default()).await
            })*
        }
    };
}

service! {
    cluster_status(ClusterStatusRequest) -> ClusterStatusReply;
    get_map(GetMapRequest) -> ClusterMap;
    get_node(GetNodeRequest) -> NodeStatus;
    create_volume(CreateVolumeRequest) -> Volume;
    list_volumes(ListVolumesRequest) -> ListVolumesReply;
    get_volume(GetVolumeRequest) -> VolumeStatus;
    resize_volume(ResizeVolumeRequest) -> Volume;
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeReply;
    locate_block(LocateBlockRequest) -> LocateBlockReply;
    perf_stats(PerfStatsRequest) -> PerfStatsReply;
    set_maintenance(SetMaintenanceRequest) -> NodePlan;
    remove_node(RemoveNodeRequest) -> NodePlan;
    plan_join(PlanJoinRequest) -> NodePlan;
    change_settings(ChangeSettingsRequest) -> ClusterSettings;
    start_scrub(StartScrubRequest) -> StartScrubReply;
    stop_scrub(StopScrubRequest) -> StopScrubReply;
    scrub_status(ScrubStatusRequest) -> ScrubStatusReply;
    health(HealthRequest) -> HealthReply;
    list_events(ListEventsRequest) -> ListEventsReply;
}

async fn node(script: &[Answer]) -> (Address, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = Address::from(listener.local_addr().expect("bound"));
    let calls = Arc::new(AtomicUsize::new(0));
    let node = Node { script: Arc::new(script.to_vec()), calls: calls.clone() };
    let server = Server::builder().add_service(ClusterServer::new(node));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (address, calls)
}

/// An address at which nothing listens.
async fn dead() -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("bound").into()
}

/// An address at which no connection is made: nobody accepts, and the queue of the listener is full. It stays so as long
/// as what else is returned is kept.
async fn unaccepting() -> (Address, (TcpListener, Vec<TcpStream>)) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
    let listener = socket.listen(1).expect("it listens");
    let address = listener.local_addr().expect("bound");
    let mut queued = Vec::new();
    while let Ok(stream) = timeout(Duration::from_millis(50), TcpStream::connect(address)).await {
        queued.push(stream.expect("it listens"));
    }
    (address.into(), (listener, queued))
}

fn client(addresses: &[&Address]) -> ControlClient {
    let options = Options {
        connect_timeout: Duration::from_millis(500),
        attempt_timeout: Duration::from_millis(300),
        deadline: Duration::from_millis(1500),
        unreachable_deadline: Duration::from_millis(300),
    };
    ControlClient::new(addresses.iter().map(|address| (*address).clone()).collect(), options)
}

/// A client whose deadline alone bounds it, as the command line tools make it for a short --timeout.
fn hurried(addresses: &[&Address]) -> ControlClient {
    let limit = Duration::from_secs(2);
    let options = Options {
        connect_timeout: limit,
        attempt_timeout: limit,
        deadline: limit,
        unreachable_deadline: limit,
    };
    ControlClient::new(addresses.iter().map(|address| (*address).clone()).collect(), options)
}

fn create() -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest { name: "vm-1".into(), size_bytes: 1 << 30, ..Default::default() }
}

#[tokio::test]
async fn every_call_reaches_the_node() {
    let (address, calls) = node(&[Answer::Good]).await;
    let client = client(&[&address]);
    client.cluster_status().await.expect("an answer");
    client.get_map().await.expect("an answer");
    client.get_node("node-001").await.expect("an answer");
    client.create_volume(create()).await.expect("an answer");
    client.list_volumes().await.expect("an answer");
    client.get_volume("vm-1").await.expect("an answer");
    client.resize_volume(proto::ResizeVolumeRequest::default()).await.expect("an answer");
    client.delete_volume("vm-1").await.expect("an answer");
    client.locate_block("vm-1", 7).await.expect("an answer");
    client.perf_stats(None).await.expect("an answer");
    assert_eq!(calls.load(Ordering::SeqCst), 10);
}

#[tokio::test]
async fn the_next_node_answers_for_a_dead_one_and_is_asked_first_then() {
    let nobody = dead().await;
    let (address, calls) = node(&[Answer::Good]).await;
    let client = client(&[&nobody, &address]);
    client.create_volume(create()).await.expect("the second node answers");
    assert_eq!(client.addresses(), [address, nobody]);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nobody_there_is_told_with_the_addresses() {
    let nobody = dead().await;
    let error = client(&[&nobody]).cluster_status().await.expect_err("nothing listens");
    assert_eq!(error.code(), Code::Unreachable);
    assert!(!error.is_uncertain());
    assert_eq!(error.to_string(), format!("{nobody}: nothing answers (connection refused)"));
}

#[tokio::test]
async fn a_refusal_is_final_and_keeps_number_and_words() {
    let (address, calls) =
        node(&[Answer::No(Code::VolumeExists, "volume vm-1", "volume vm-1 exists already")]).await;
    let error = client(&[&address]).create_volume(create()).await.expect_err("refused");
    assert_eq!(error.code(), Code::VolumeExists);
    assert_eq!(error.to_string(), "volume vm-1 exists already");
    assert!(!error.is_uncertain());
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_number_of_a_newer_release_is_kept() {
    let (address, _) = node(&[Answer::NoNumbered(999)]).await;
    let error = client(&[&address]).get_map().await.expect_err("refused");
    assert!(matches!(&error, ClientError::Refused(refusal) if refusal.number == 999), "{error:?}");
    assert_eq!(error.to_string(), "thing: words of the future");
}

#[tokio::test]
async fn no_quorum_is_tried_again_until_it_is_there() {
    let no = Answer::No(Code::NoQuorum, "", "");
    let (address, calls) = node(&[no.clone(), no, Answer::Good]).await;
    client(&[&address]).cluster_status().await.expect("the third try is answered");
    assert_eq!(calls.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn no_quorum_for_good_ends_at_the_deadline() {
    let (address, calls) = node(&[Answer::No(Code::NoQuorum, "", "no leader")]).await;
    let begin = Instant::now();
    let error = client(&[&address]).cluster_status().await.expect_err("there is no quorum");
    assert_eq!(error.code(), Code::NoQuorum);
    assert!(begin.elapsed() < Duration::from_secs(2));
    assert!(calls.load(Ordering::SeqCst) > 2);
}

/// The entry of the first try may be committed by the next leader: the second try then meets its own volume. So it is where
/// the leader's log failed, or the leader stopped, which is told as busy.
#[tokio::test]
async fn a_refusal_after_a_doubtful_try_says_so() {
    for first in [Code::NoQuorum, Code::Busy] {
        let exists = Answer::No(Code::VolumeExists, "volume vm-1", "volume vm-1 exists already");
        let (address, _) = node(&[Answer::No(first, "", ""), exists]).await;
        let error = client(&[&address]).create_volume(create()).await.expect_err("refused");
        assert_eq!(error.code(), Code::VolumeExists);
        assert!(error.is_uncertain());
        assert!(error.to_string().contains("an earlier try"), "{error}");
    }
}

#[tokio::test]
async fn the_leader_that_a_follower_names_is_asked() {
    let (leader, _) = node(&[Answer::Good]).await;
    let (follower, calls) = node(&[Answer::LeaderIs(leader.clone())]).await;
    let client = client(&[&follower]);
    client.create_volume(create()).await.expect("the leader answers");
    assert_eq!(client.addresses(), [leader, follower]);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_read_goes_to_the_next_node_when_one_hangs() {
    let (hanging, _) = node(&[Answer::Hang]).await;
    let (good, _) = node(&[Answer::Good]).await;
    client(&[&hanging, &good]).get_map().await.expect("the second node answers");
}

#[tokio::test]
async fn a_change_is_not_repeated_after_silence() {
    let (hanging, _) = node(&[Answer::Hang]).await;
    let (good, calls) = node(&[Answer::Good]).await;
    let error = client(&[&hanging, &good]).create_volume(create()).await.expect_err("no answer");
    assert_eq!(error.code(), Code::Timeout);
    assert!(error.is_uncertain());
    assert!(error.to_string().contains("may or may not"), "{error}");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
}

/// The first node took all the time of `--timeout 10 --address A,B`, and B was blamed: "no answer within 0 s".
#[tokio::test]
async fn a_short_deadline_leaves_time_for_the_next_node() {
    let (hanging, _) = node(&[Answer::Hang]).await;
    let (good, _) = node(&[Answer::Good]).await;
    hurried(&[&hanging, &good]).get_map().await.expect("the second node answers");
    hurried(&[&hanging, &hanging, &good]).get_map().await.expect("the last node answers");
}

#[tokio::test]
async fn a_connection_that_is_not_made_leaves_time_for_the_next_node() {
    let (unconnected, _queue) = unaccepting().await;
    let (good, calls) = node(&[Answer::Good]).await;
    hurried(&[&unconnected, &good]).create_volume(create()).await.expect("the second node answers");
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    let begin = Instant::now();
    let error = hurried(&[&unconnected, &unconnected]).get_map().await.expect_err("no connection");
    assert_eq!(error.code(), Code::Unreachable);
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn when_all_hang_the_call_ends_at_the_deadline_and_none_is_asked_without_time() {
    let (first, first_calls) = node(&[Answer::Hang]).await;
    let (last, last_calls) = node(&[Answer::Hang]).await;
    let begin = Instant::now();
    let error = hurried(&[&first, &last]).get_map().await.expect_err("no answer");
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let ClientError::Timeout { address, after, uncertain: false } = &error else { panic!("{error:?}") };
    assert_eq!(*address, last);
    assert!(*after >= Duration::from_millis(800), "{error}");
    assert_eq!([first_calls, last_calls].map(|calls| calls.load(Ordering::SeqCst)), [1, 1]);
}

/// The node may hold it while a leader is elected, and no other may be asked meanwhile.
#[tokio::test]
async fn a_change_that_is_sent_once_has_all_the_time() {
    let (slow, _) = node(&[Answer::GoodAfter(Duration::from_millis(1400))]).await;
    let (good, calls) = node(&[Answer::Good]).await;
    hurried(&[&slow, &good]).create_volume(create()).await.expect("the first node answers");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
}

#[test]
fn each_node_has_its_share_of_the_time() {
    let seconds = Duration::from_secs;
    assert_eq!(share(seconds(15), 0), seconds(15));
    assert_eq!(share(seconds(10), 1), seconds(5));
    assert_eq!(share(seconds(15), 2), seconds(5));
    // Of many nodes the first ones still have the time that an answer may take.
    assert_eq!(share(seconds(15), 7), seconds(4));
    assert_eq!(share(seconds(3), 7), Duration::from_millis(1500));
    assert_eq!(share(Duration::ZERO, 1), Duration::ZERO);
}

#[tokio::test]
async fn added_nodes_are_asked_before_the_known_ones() {
    let (first, second, third) = (dead().await, dead().await, dead().await);
    let client = client(&[&first, &second]);
    client.ask_first(vec![third.clone(), second.clone()]);
    assert_eq!(client.addresses(), [third, second, first]);
}

#[tokio::test]
async fn a_resize_is_repeated_after_silence() {
    let (hanging, _) = node(&[Answer::Hang]).await;
    let (good, _) = node(&[Answer::Good]).await;
    let request = proto::ResizeVolumeRequest::default();
    client(&[&hanging, &good]).resize_volume(request).await.expect("the second node answers");
}

/// A node died after it had passed a join on. The next ones were not there, so the caller was told that nobody had been asked.
#[tokio::test]
async fn a_repeatable_change_that_was_sent_once_stays_in_doubt() {
    let (broken, calls) = node(&[Answer::Plain(tonic::Code::Unavailable)]).await;
    let error = client(&[&broken])
        .set_maintenance(proto::SetMaintenanceRequest::default())
        .await
        .expect_err("no answer");
    assert!(calls.load(Ordering::SeqCst) > 0);
    assert!(error.is_uncertain(), "{error}");
    let read = client(&[&broken]).list_volumes().await.expect_err("no answer");
    assert!(!read.is_uncertain(), "{read}");
    let unreachable =
        || ClientError::Unreachable { addresses: vec![broken.clone()], reason: "refused".into() };
    assert!(unreachable().after(Some(broken.clone())).is_uncertain());
    assert!(!unreachable().after(None).is_uncertain());
}

#[tokio::test]
async fn another_service_is_not_taken_for_a_control_plane() {
    let (address, _) = node(&[Answer::Plain(tonic::Code::Unimplemented)]).await;
    let error = client(&[&address]).get_map().await.expect_err("no such method");
    assert_eq!(error.code(), Code::Unsupported);
}

#[tokio::test]
async fn a_node_that_comes_back_is_connected_to_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let socket = listener.local_addr().expect("bound");
    let serve = |listener| {
        let node = Node { script: Arc::new(vec![Answer::Good]), calls: Arc::default() };
        let server = Server::builder().add_service(ClusterServer::new(node));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)))
    };
    let first = serve(listener);
    let client = client(&[&socket.into()]);
    client.get_map().await.expect("an answer");
    first.abort();
    let _ = first.await;
    let again = TcpListener::bind(socket).await.expect("the port is free again");
    serve(again);
    client.get_map().await.expect("an answer of the second life");
}

/// The sentence in the detail may be given with the number that the status' own message begins with.
#[tokio::test]
async fn the_number_is_not_told_twice() {
    let words = "error 305 VolumeExists: volume vm-1 exists already";
    let (address, _) = node(&[Answer::No(Code::VolumeExists, "volume vm-1", words)]).await;
    let error = client(&[&address]).create_volume(create()).await.expect_err("refused");
    assert_eq!(error.to_string(), "volume vm-1 exists already");
}

#[test]
fn addresses_have_a_default_port() {
    let show = |text: &str| text.parse::<Address>().map(|address| address.to_string());
    assert_eq!(show("10.0.0.1"), Ok("10.0.0.1:8080".into()));
    assert_eq!(show("10.0.0.1:81"), Ok("10.0.0.1:81".into()));
    assert_eq!(show("fd00::1"), Ok("[fd00::1]:8080".into()));
    assert_eq!(show("[fd00::1]:9"), Ok("[fd00::1]:9".into()));
    assert_eq!(show("node-1.example.com"), Ok("node-1.example.com:8080".into()));
    for bad in ["", ":8080", "host:", "host:0", "host:99999", "1.2.3.4:0", "a b", "http://x", "[fd00::1]"] {
        assert!(show(bad).is_err(), "{bad}");
    }
}
