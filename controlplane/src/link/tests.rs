use super::*;
use xsan_protocol::ids::BootId;

const LEASE_MS: u64 = 1500;

fn at(ms: u64) -> BootTime {
    BootTime(ms * 1_000_000)
}

fn process(incarnation: u64) -> DataProcess {
    DataProcess {
        incarnation: Incarnation(incarnation),
        boot_id: BootId(1),
        shard_ports: vec![9100],
        nbd_port: 10809,
        stores: Vec::new(),
    }
}

fn linked() -> (Link, mpsc::Receiver<proto::LinkMessage>) {
    let link = Link::default();
    let (outbound, queued) = mpsc::channel(4);
    link.on_hello(at(0), process(11), vec![], outbound).expect("nobody else is linked");
    (link, queued)
}

fn status(map_version: u64) -> proto::DataStatus {
    proto::DataStatus { map_version, ..proto::DataStatus::default() }
}

fn grant(sent: u64, map_version: u64) -> Grant {
    Grant {
        node: NodeId(1),
        incarnation: Incarnation(11),
        sent: at(sent),
        length: Duration::from_millis(LEASE_MS),
        map_version: MapVersion(map_version),
    }
}

#[test]
fn a_lease_counts_once_the_data_process_acts_on_its_map() {
    let (link, _queued) = linked();
    let lease = link.watch_lease();
    link.on_grant(at(101), &grant(100, 5));
    assert_eq!(*lease.borrow(), None);
    link.on_status(at(110), status(4));
    assert_eq!(*lease.borrow(), None);
    link.on_status(at(120), status(5));
    assert_eq!(*lease.borrow(), Some(at(100 + LEASE_MS)));
    link.on_grant(at(90), &grant(80, 5));
    assert_eq!(*lease.borrow(), Some(at(100 + LEASE_MS)), "an older grant does not shorten it");
    link.on_grant(at(130), &grant(140, 5));
    assert_eq!(*lease.borrow(), Some(at(100 + LEASE_MS)), "a beat of the future was not sent");
}

#[test]
fn a_grant_for_another_life_is_dropped() {
    let (link, _queued) = linked();
    link.on_status(at(1), status(9));
    link.on_grant(at(101), &Grant { incarnation: Incarnation(12), ..grant(100, 5) });
    assert_eq!(*link.watch_lease().borrow(), None);
}

#[test]
fn a_beat_tells_which_answer_arrived_last() {
    let (link, _queued) = linked();
    assert_eq!(
        link.beat(NodeId(1), at(10)).heard,
        BootTime(1),
        "none yet, which is not the same as not saying"
    );
    link.on_status(at(20), status(9));
    link.on_grant(at(40), &grant(30, 5));
    link.on_grant(at(50), &grant(20, 5));
    assert_eq!(link.beat(NodeId(1), at(60)).heard, at(30));
    // One of length zero is heard, and takes no lease away.
    link.on_grant(at(2000), &Grant { length: Duration::ZERO, ..grant(1900, 5) });
    assert_eq!(link.beat(NodeId(1), at(2010)).heard, at(1900));
    assert_eq!(*link.watch_lease().borrow(), Some(at(30 + LEASE_MS)));
}

#[test]
fn a_silent_data_process_asks_for_no_lease() {
    let (link, _queued) = linked();
    assert_eq!(link.beat(NodeId(1), at(10)).incarnation, Some(Incarnation(11)));
    assert_eq!(link.beat(NodeId(1), at(1000)).incarnation, None);
    link.on_status(at(1100), status(3));
    let beat = link.beat(NodeId(1), at(1200));
    assert_eq!((beat.incarnation, beat.map_version), (Some(Incarnation(11)), MapVersion(3)));
}

#[test]
fn a_second_process_waits_for_the_death_of_the_first() {
    let (link, _queued) = linked();
    let (outbound, _other) = mpsc::channel(4);
    assert_eq!(link.on_hello(at(1), process(12), vec![], outbound.clone()), Err(LinkError::Taken));
    let again = link.on_hello(at(1), process(11), vec![], outbound.clone()).expect("the same links again");
    link.on_unlinked(again - 1);
    assert_eq!(link.beat(NodeId(1), at(2)).incarnation, Some(Incarnation(11)), "the old socket is old news");
    link.on_unlinked(again);
    assert_eq!(link.beat(NodeId(1), at(5000)).incarnation, None);
    link.on_death(Incarnation(11));
    assert_eq!(link.beat(NodeId(1), at(2)).stopped, Some(Incarnation(11)));
    assert!(link.on_hello(at(1), process(12), vec![], outbound).is_ok());
}

#[test]
fn a_store_is_reported_once() {
    let (link, _queued) = linked();
    let store = proto::StoreStatus { id: 5, failed: true, ..proto::StoreStatus::default() };
    let status = proto::DataStatus { stores: vec![store], ..status(1) };
    assert_eq!(link.on_status(at(1), status.clone()), [StoreId(5)]);
    assert!(link.on_status(at(2), status).is_empty());
}

#[tokio::test]
async fn a_request_meets_its_answer_or_its_deadline() {
    let (link, mut queued) = linked();
    let ask = || Body::PerfStatsRequest(proto::PerfStatsRequest::default());
    let answer = async {
        let message = queued.recv().await.expect("the request");
        link.on_answer(message.request_id, Body::PerfStats(proto::PerfStatsReply::default()));
    };
    let (result, ()) = tokio::join!(link.request(ask(), Duration::from_secs(5)), answer);
    assert!(matches!(result, Ok(Body::PerfStats(_))));
    assert_eq!(link.request(ask(), Duration::from_millis(5)).await, Err(LinkError::Timeout));
    assert_eq!(Link::default().request(ask(), Duration::from_secs(5)).await, Err(LinkError::NotLinked));
}

#[tokio::test]
async fn frames_survive_and_damage_is_noticed() {
    let message =
        proto::LinkMessage { request_id: 9, body: Some(Body::Lease(proto::Lease { until_boottime_ns: 7 })) };
    let mut bytes = frame::encode(&message);
    let read = frame::read(&mut bytes.as_slice()).await.expect("a whole frame");
    assert_eq!(read, Some(message));
    assert!(frame::read(&mut [].as_slice()).await.expect("closed between frames").is_none());
    assert!(frame::read(&mut &bytes[..bytes.len() - 1]).await.is_err());
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let error = frame::read(&mut bytes.as_slice()).await.expect_err("a flipped bit");
    assert!(matches!(error, frame::FrameError::Checksum { .. }));
}

#[test]
fn the_rate_of_resync_is_that_of_the_last_seconds() {
    let (link, _queued) = linked();
    assert_eq!(link.resync_rate(), 0);
    for second in 0..20 {
        let resync_bytes_moved = second * 1000;
        link.on_status(at(second * 1000), proto::DataStatus { resync_bytes_moved, ..status(1) });
        assert_eq!(link.resync_rate(), if second == 0 { 0 } else { 1000 });
    }
    for second in 20..30 {
        link.on_status(at(second * 1000), proto::DataStatus { resync_bytes_moved: 19_000, ..status(1) });
    }
    assert_eq!(link.resync_rate(), 0);
}
