use std::net::Ipv4Addr;

use monoio::net::TcpListener;
use xsan_protocol::checksum::page_checksums;
use xsan_protocol::ids::{Incarnation, NodeId, ShardIndex};
use xsan_protocol::units::PAGE_SIZE;

use super::*;

fn hello(node: u32, cluster_id: &str) -> Hello {
    Hello {
        node: NodeId(node),
        incarnation: Incarnation(1),
        client_id: u64::from(node),
        session: 1,
        shard: ShardIndex(0),
        shard_count: 1,
        cluster_id: cluster_id.to_owned(),
    }
}

fn run<F: Future>(work: F) -> F::Output {
    let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build().unwrap();
    runtime.block_on(work)
}

fn listener() -> (TcpListener, SocketAddr) {
    let listener = crate::net::listener::bind((Ipv4Addr::LOCALHOST, 0).into(), false).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn memory(pool: &'static BufferPool) -> Memory {
    Memory { pool, overflow: Rc::default() }
}

fn write_frame(pool: &'static BufferPool, number: u64, pages: usize) -> Frame {
    let mut header = Header::new(Opcode::Write);
    header.request_id = number;
    let mut frame = Frame::new(header);
    if pages > 0 {
        let mut data = pool.alloc(pages * PAGE_SIZE).unwrap();
        data.fill(number as u8);
        frame.checksums = Some(page_checksums(&data));
        frame.data = Some(data.freeze());
    }
    frame
}

#[test]
fn frames_of_every_size_come_back_in_order() {
    run(async {
        let pool = BufferPool::anonymous(32 << 20);
        let (listener, address) = listener();
        let counters = Rc::new(Counters::default());
        let echo_counters = counters.clone();
        monoio::spawn(async move {
            let stream = crate::net::listener::accept(&listener).await;
            let connection = Connection::accept(stream.0, &hello(2, "c")).await.unwrap();
            assert_eq!(connection.hello.node, NodeId(1));
            let outbox = Outbox::default();
            let echo = outbox.clone();
            connection
                .run(outbox, memory(pool), echo_counters, |frames| {
                    frames.into_iter().for_each(|frame| echo.push(frame));
                    echo.wake();
                })
                .await;
        });
        let connection = Connection::dial(address, &hello(1, "c")).await.unwrap();
        assert_eq!(connection.hello.node, NodeId(2));
        let outbox = Outbox::default();
        let (sender, expected) = (outbox.clone(), Rc::new(Cell::new(0u64)));
        let received = expected.clone();
        const COUNT: u64 = 2000;
        let sizes = [0, 1, 1, 1, 3, 16, 40, 256];
        let pages = move |number: u64| sizes[(number * 5 % 8) as usize];
        let mut next = 0u64;
        let mut send_some = move |done: u64| {
            while next < COUNT && next < done + 8 {
                sender.push(write_frame(pool, next, pages(next)));
                next += 1;
            }
            sender.wake();
        };
        send_some(0);
        let closer = outbox.clone();
        let error = connection
            .run(outbox, memory(pool), counters.clone(), move |frames| {
                for frame in frames {
                    let number = received.get();
                    assert_eq!(frame.header.request_id, number);
                    let data = frame.data.as_deref().unwrap_or_default();
                    assert_eq!(data.len(), pages(number) * PAGE_SIZE);
                    assert!(data.iter().all(|byte| *byte == number as u8));
                    received.set(number + 1);
                }
                send_some(received.get());
                if received.get() == COUNT {
                    closer.close();
                }
            })
            .await;
        assert!(matches!(error, ConnectionError::Closed), "{error}");
        assert_eq!(expected.get(), COUNT);
        assert_eq!(counters.frames_received.get(), 2 * COUNT);
        assert!(
            counters.copied_bytes.get() < counters.received_bytes.get() / 2,
            "large payloads are not copied"
        );
    });
}

#[test]
fn a_node_of_another_cluster_is_told_so() {
    run(async {
        let (listener, address) = listener();
        monoio::spawn(async move {
            let stream = crate::net::listener::accept(&listener).await;
            let refused = Connection::accept(stream.0, &hello(2, "ours")).await.err();
            assert!(matches!(refused, Some(ConnectionError::Refused(Code::ClusterIdMismatch))));
        });
        let refused = Connection::dial(address, &hello(1, "theirs")).await.err();
        assert!(matches!(refused, Some(ConnectionError::Refused(Code::ClusterIdMismatch))), "{refused:?}");
    });
}

/// Frames of a peer with this node's own id met an assert: whoever said such a hello ended the process. Found by
/// reading.
#[test]
fn a_node_that_claims_to_be_this_one_is_told_so() {
    run(async {
        let (listener, address) = listener();
        monoio::spawn(async move {
            let stream = crate::net::listener::accept(&listener).await;
            let refused = Connection::accept(stream.0, &hello(2, "c")).await.err();
            assert!(matches!(refused, Some(ConnectionError::Refused(Code::NodeIdTaken))));
        });
        let refused = Connection::dial(address, &hello(2, "c")).await.err();
        assert!(matches!(refused, Some(ConnectionError::Refused(Code::NodeIdTaken))), "{refused:?}");
    });
}

#[test]
fn a_flipped_bit_closes_the_connection_and_hands_over_nothing() {
    run(async {
        let pool = BufferPool::anonymous(16 << 20);
        let (listener, address) = listener();
        monoio::spawn(async move {
            let connection = Connection::dial(address, &hello(1, "c")).await.unwrap();
            let frame = write_frame(pool, 1, 1);
            let mut bytes = Vec::new();
            frame.encode_head(&mut bytes);
            bytes.extend_from_slice(frame.data.as_deref().unwrap());
            *bytes.last_mut().unwrap() ^= 1;
            let mut writer = connection.writer;
            writer.write_all(bytes).await.0.unwrap();
            monoio::time::sleep(Duration::from_secs(60)).await;
        });
        let stream = crate::net::listener::accept(&listener).await;
        let connection = Connection::accept(stream.0, &hello(2, "c")).await.unwrap();
        let error = connection
            .run(Outbox::default(), memory(pool), Rc::default(), |_| {
                panic!("a damaged frame was handed over")
            })
            .await;
        assert!(matches!(error, ConnectionError::Payload(PayloadError::Page { page: 0 })), "{error}");
    });
}

#[test]
fn a_request_that_finds_no_buffer_is_handed_over_as_busy_and_what_follows_it_whole() {
    run(async {
        let pool = BufferPool::anonymous(16 << 20);
        let senders = BufferPool::anonymous(16 << 20);
        let mut held = Vec::new();
        while let Some(buffer) = pool.alloc_for(Claim::Request, 1) {
            held.push(buffer);
        }
        let (listener, address) = listener();
        monoio::spawn(async move {
            let connection = Connection::dial(address, &hello(1, "c")).await.unwrap();
            let outbox = Outbox::default();
            outbox.push(write_frame(senders, 1, 3));
            outbox.push(write_frame(senders, 2, 0));
            outbox.wake();
            connection.run(outbox, memory(senders), Rc::default(), drop).await;
        });
        let stream = crate::net::listener::accept(&listener).await;
        let connection = Connection::accept(stream.0, &hello(2, "c")).await.unwrap();
        let (outbox, received) = (Outbox::default(), RefCell::new(Vec::new()));
        let closer = outbox.clone();
        connection
            .run(outbox, memory(pool), Rc::default(), |frames| {
                received
                    .borrow_mut()
                    .extend(frames.iter().map(|frame| (frame.header.request_id, frame.header.status)));
                if received.borrow().len() == 2 {
                    closer.close();
                }
            })
            .await;
        assert_eq!(*received.borrow(), [(1, Some(Code::Busy)), (2, None)]);
    });
}
