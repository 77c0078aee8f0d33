use std::cell::RefCell;

use xsan_protocol::ids::{BootId, Incarnation, Layer, Lineage, StoreId};
use xsan_protocol::map::{Group, Member, Store};
use xsan_protocol::units::BLOCK_SIZE;

use super::*;
use crate::testing::node_of_map;

const NODE: NodeId = NodeId(1);
const OTHER_NODE: NodeId = NodeId(2);
const POOL: PoolId = PoolId(1);
const VOLUME: VolumeId = VolumeId(1);
const BLOCK: u64 = BLOCK_SIZE as u64;
/// Longer than any wait between two tries.
const LONG: Duration = Duration::from_millis(BACKOFF_MAX.as_millis() as u64 * 4);

/// The only pool, with one group for each of these nodes, which leads it.
fn map(primaries: &[NodeId]) -> ClusterMap {
    let (incarnation, boot_id, shard) = (Incarnation(7), BootId(1), ShardIndex(0));
    let node = |node: &NodeId| {
        let store = Store {
            id: StoreId(node.0.into()),
            capacity_bytes: 1 << 30,
            shard,
            device: "".into(),
            media: "".into(),
            failed: false,
            failed_before: false,
        };
        (*node, node_of_map(*node, incarnation, vec![store]))
    };
    let group = |(index, node): (usize, &NodeId)| {
        let (node, store, id) = (*node, StoreId(node.0.into()), GroupId::new(POOL, index as u16));
        let member = Member { node, store, incarnation, boot_id, learner: false, damaged: false };
        let (former, dropped) = (Vec::new(), Vec::new());
        (id, Group { id, epoch: Epoch(1), primary: Some(node), members: vec![member], former, dropped })
    };
    let group_count = primaries.len() as u16;
    let volume = Volume {
        id: VOLUME,
        name: "disk".to_owned(),
        lineage: Lineage(1),
        layer: Layer(0),
        size_bytes: 1 << 30,
        pool: POOL,
        durability: Durability::OnFlush,
        policy: String::new(),
        created_unix_ms: 0,
        attached_nodes: Vec::new(),
    };
    ClusterMap {
        nodes: primaries.iter().map(node).collect(),
        pools: [(POOL, Pool { id: POOL, replica_count: 1, min_replicas: 1, group_count })].into(),
        groups: primaries.iter().enumerate().map(group).collect(),
        volumes: [(VOLUME, volume)].into(),
        ..ClusterMap::default()
    }
}

/// A port whose clock stands still, and that keeps what is sent for the test to answer.
struct FakePort {
    map: Arc<ClusterMap>,
    sent: RefCell<Vec<u64>>,
    operations: RefCell<Vec<(Durability, Operation)>>,
    /// The nodes that were asked to flush.
    flushes: RefCell<Vec<NodeId>>,
    now_ns: Cell<u64>,
}

impl Port for FakePort {
    fn map(&self) -> Arc<ClusterMap> {
        self.map.clone()
    }

    fn send(&self, number: u64, _: Target, durability: Durability, operation: Operation) {
        self.sent.borrow_mut().push(number);
        self.operations.borrow_mut().push((durability, operation));
    }

    fn send_flush(&self, number: u64, node: NodeId, _: ShardIndex, _: PoolId) {
        self.sent.borrow_mut().push(number);
        self.flushes.borrow_mut().push(node);
    }

    fn open(&self, _: &str) -> std::pin::Pin<Box<dyn Future<Output = Result<Volume, Code>>>> {
        Box::pin(async { Err(Code::NotFound) })
    }

    fn close(&self, _: VolumeId) {}

    fn now_ns(&self) -> u64 {
        self.now_ns.get()
    }

    fn observe(&self, _: Stage, _: u64) {}
}

/// A client, and what a test does to it.
struct Rig {
    port: Rc<FakePort>,
    calls: Calls,
    client: VolumeClient,
    connection: Client,
    pool: &'static BufferPool,
}

/// What a request ended with, once it has.
type Outcome = Rc<RefCell<Option<Result<BlockReply, Code>>>>;

impl Rig {
    fn new() -> Self {
        Self::with(map(&[NODE]))
    }

    fn with(map: ClusterMap) -> Self {
        let port = Rc::new(FakePort {
            map: Arc::new(map),
            sent: RefCell::default(),
            operations: RefCell::default(),
            flushes: RefCell::default(),
            now_ns: Cell::new(1),
        });
        let (calls, pool) = (Calls::default(), BufferPool::anonymous(16 << 20));
        let client = VolumeClient::new(port.clone(), calls.clone(), pool);
        Self { port, calls, client, connection: Client::default(), pool }
    }

    /// Starts a write-zeroes.
    fn zero(&self, offset: u64, length: u64) -> Outcome {
        self.start(Wanted::WriteZeroes { fua: false, no_hole: false }, offset, length)
    }

    fn start(&self, operation: Wanted, offset: u64, length: u64) -> Outcome {
        let (client, outcome) = (self.client.clone(), Outcome::default());
        let cell = outcome.clone();
        let connection = self.connection.clone();
        let request = BlockRequest { volume: VOLUME, offset, length, operation, client: connection };
        monoio::spawn(async move {
            let ended = client.submit(request).await;
            *cell.borrow_mut() = Some(ended);
        });
        outcome
    }

    fn sent(&self) -> usize {
        self.port.sent.borrow().len()
    }

    async fn until_sent(&self, count: usize) {
        for _ in 0..1000 {
            if self.sent() >= count {
                return;
            }
            monoio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("{} parts were sent, not {count}", self.sent());
    }

    /// Answers what was sent as number `index`.
    fn answer(&self, index: usize, result: Result<(), Code>) {
        let number = self.port.sent.borrow()[index];
        self.calls.complete(number, result.map(|()| Answer::Reply(Reply::Done)));
    }

    /// As `answer`, for a flush that covered these groups of the pool.
    fn answer_flush(&self, index: usize, covered: &[u16]) {
        let number = self.port.sent.borrow()[index];
        let covered = covered.iter().map(|group| GroupId::new(POOL, *group)).collect();
        self.calls.complete(number, Ok(Answer::Flushed(covered)));
    }
}

fn run<F: Future>(work: F) -> F::Output {
    let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build().unwrap();
    runtime.block_on(work)
}

/// The head of a write-zeroes met a full store, and the client was told at once. Other parts of it, which had met a
/// full journal, were sent again and again, up to 30 s later: they zeroed what the client had written since. Found by
/// reading.
#[test]
fn a_request_that_fails_ends_when_its_last_part_has() {
    run(async {
        let rig = Rig::new();
        // A head of some sectors, and one part of each of eight blocks.
        let result = rig.zero(512, 8 * BLOCK - 512);
        rig.until_sent(9).await;
        rig.answer(2, Err(Code::JournalFull));
        rig.answer(0, Err(Code::StorageFull));
        (3..9).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(result.borrow().is_none(), "part 1 can still land");
        rig.answer(1, Err(Code::JournalFull));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Err(Code::StorageFull))), "{result:?}");
        assert_eq!(rig.sent(), 9, "nothing is sent after the first failure");
        assert_eq!(rig.calls.count(), 0);
    });
}

#[test]
fn after_a_failure_no_more_parts_are_begun() {
    run(async {
        let rig = Rig::new();
        let result = rig.zero(0, 2 * PARTS_MAX as u64 * BLOCK);
        rig.until_sent(PARTS_MAX).await;
        rig.answer(5, Err(Code::StorageFull));
        (0..PARTS_MAX).filter(|part| *part != 5).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Err(Code::StorageFull))), "{result:?}");
        assert_eq!(rig.sent(), PARTS_MAX);
    });
}

#[test]
fn all_parts_are_tried_until_they_succeed() {
    run(async {
        let rig = Rig::new();
        let result = rig.zero(0, 2 * BLOCK);
        rig.until_sent(2).await;
        rig.answer(0, Err(Code::JournalFull));
        rig.answer(1, Ok(()));
        rig.until_sent(3).await;
        rig.answer(2, Ok(()));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Ok(BlockReply::Done))), "{result:?}");
    });
}

/// The time limit was looked at before a wait alone: a part was sent once more after its request had timed out.
#[test]
fn nothing_is_sent_after_the_time_limit() {
    run(async {
        let rig = Rig::new();
        let result = rig.zero(0, BLOCK);
        rig.until_sent(1).await;
        rig.answer(0, Err(Code::JournalFull));
        // The part looks at the clock and waits; the limit passes meanwhile.
        monoio::time::sleep(Duration::ZERO).await;
        rig.port.now_ns.set(1 + IO_TIMEOUT.as_nanos() as u64);
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Err(Code::Timeout))), "{result:?}");
        assert_eq!(rig.sent(), 1);
    });
}

/// A client was killed, started again at once and wrote; what it had sent before was still tried, for up to 30 s, and
/// the rest of a long write-zeroes was still begun. Found by reading.
#[test]
fn nothing_is_sent_for_a_client_that_is_gone() {
    run(async {
        let rig = Rig::new();
        let result = rig.zero(0, 2 * PARTS_MAX as u64 * BLOCK);
        rig.until_sent(PARTS_MAX).await;
        rig.connection.leave();
        rig.answer(0, Err(Code::JournalFull));
        (1..PARTS_MAX - 1).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(result.borrow().is_none(), "the last part can still land");
        rig.answer(PARTS_MAX - 1, Ok(()));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Err(Code::ClientGone))), "{result:?}");
        assert_eq!(rig.sent(), PARTS_MAX, "nothing is sent again, and no part is begun");
    });
}

/// Each write-zeroes took a buffer that nobody counted, 128 of one client all that there were; and waited for it while
/// what it waited for could need one. Found by reading.
#[test]
fn zeroing_needs_no_buffer() {
    run(async {
        let rig = Rig::new();
        let held: Vec<_> = std::iter::from_fn(|| rig.pool.alloc(1)).collect();
        let result = rig.zero(512, BLOCK);
        rig.until_sent(3).await;
        (0..3).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Ok(BlockReply::Done))), "{result:?}");
        drop(held);
    });
}

/// The flag was taken, and the space given back all the same. Found by reading.
#[test]
fn zeroes_without_a_hole_are_written() {
    run(async {
        let rig = Rig::new();
        let (begin, length) = (BLOCK - 512, 3 * ZEROES_BYTES as u64);
        let result = rig.start(Wanted::WriteZeroes { fua: true, no_hole: true }, begin, length);
        // Sectors, two times as many pages as go at once, some more, and sectors again.
        rig.until_sent(ZEROES_PARTS_MAX).await;
        monoio::time::sleep(LONG).await;
        assert_eq!(rig.sent(), ZEROES_PARTS_MAX, "no more at once");
        rig.answer(0, Ok(()));
        rig.until_sent(5).await;
        let mut next = begin;
        for (_, operation) in rig.port.operations.borrow().iter() {
            let (key, offset, bytes, fua) = match operation {
                Operation::Write { key, pages, data, fua } => {
                    assert_eq!(&*data.checksums, &*page_checksums(&data.bytes));
                    assert_eq!(data.bytes.len(), pages.bytes());
                    (key, pages.byte_offset(), &data.bytes, fua)
                }
                Operation::WriteSectors { key, offset, bytes, fua } => (key, *offset, bytes, fua),
                other => panic!("{other:?} writes nothing"),
            };
            assert_eq!(u64::from(key.index.0) * BLOCK + u64::from(offset), next);
            assert!(bytes.iter().all(|byte| *byte == 0) && *fua);
            next += bytes.len() as u64;
        }
        assert_eq!(next, begin + length);
        (1..5).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Ok(BlockReply::Done))), "{result:?}");
    });
}

/// A request that takes long because it is long is not one that gets no answer.
#[test]
fn each_part_has_the_time_limit_of_a_request() {
    run(async {
        let rig = Rig::new();
        let result = rig.zero(0, 2 * PARTS_MAX as u64 * BLOCK);
        rig.until_sent(PARTS_MAX).await;
        rig.port.now_ns.set(2 * IO_TIMEOUT.as_nanos() as u64);
        (0..PARTS_MAX).for_each(|part| rig.answer(part, Ok(())));
        rig.until_sent(2 * PARTS_MAX).await;
        rig.answer(PARTS_MAX, Err(Code::JournalFull));
        rig.until_sent(2 * PARTS_MAX + 1).await;
        (PARTS_MAX + 1..2 * PARTS_MAX + 1).for_each(|part| rig.answer(part, Ok(())));
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Ok(BlockReply::Done))), "{result:?}");
    });
}

#[test]
fn extents_are_joined_and_bounded() {
    run(async {
        let rig = Rig::new();
        let extents = |extents_max| {
            let first = rig.sent();
            let result =
                rig.start(Wanted::BlockStatus { extents_max }, BLOCK - 4096 - 512, 4096 + 512 + 8192);
            (result, first)
        };
        for (extents_max, expected) in
            [(9, vec![(4608, true), (4096, false), (4096, true)]), (2, vec![(4608, true), (4096, false)])]
        {
            let (result, first) = extents(extents_max);
            rig.until_sent(first + 2).await;
            for (part, held) in [(first, vec![true, true]), (first + 1, vec![false, true])] {
                let number = rig.port.sent.borrow()[part];
                rig.calls.complete(number, Ok(Answer::Reply(Reply::Status(held))));
            }
            monoio::time::sleep(LONG).await;
            let Some(Ok(BlockReply::Extents(extents))) = result.take() else { panic!("no extents") };
            assert_eq!(extents, expected);
        }
    });
}

/// A write that a client wants on stable media, and a volume whose writes all are, differ from others in these two
/// words alone: nothing else notices when one is lost on the way.
#[test]
fn fua_and_durability_reach_every_part() {
    // Sectors and a page on both sides of the boundary between two blocks.
    let (begin, length) = (BLOCK - 4096 - 512, 2 * (4096 + 512));
    for (durability, fua) in [
        (Durability::OnFlush, false),
        (Durability::OnFlush, true),
        (Durability::EveryWrite, false),
        (Durability::EveryWrite, true),
    ] {
        run(async {
            let mut map = map(&[NODE]);
            map.volumes.get_mut(&VOLUME).unwrap().durability = durability;
            let rig = Rig::with(map);
            let placed = rig.pool.alloc(8192 + 4096 + 512).unwrap().freeze();
            let data = placed.slice(4096 - 512..4096 - 512 + length as usize);
            let mut results = Vec::new();
            for (operation, count) in [
                (Wanted::Write { data, fua }, 4),
                (Wanted::WriteZeroes { fua, no_hole: true }, 4),
                (Wanted::WriteZeroes { fua, no_hole: false }, 4),
                (Wanted::Trim { fua }, 2),
            ] {
                let first = rig.sent();
                results.push(rig.start(operation, begin, length));
                rig.until_sent(first + count).await;
                (first..first + count).for_each(|part| rig.answer(part, Ok(())));
            }
            monoio::time::sleep(LONG).await;
            assert_eq!(rig.sent(), 4 + 4 + 4 + 2);
            let done = |result: &Outcome| matches!(*result.borrow(), Some(Ok(BlockReply::Done)));
            assert!(results.iter().all(done), "{results:?}");
            for (sent_with, operation) in rig.port.operations.borrow().iter() {
                let (Operation::Write { fua: sent, .. }
                | Operation::WriteSectors { fua: sent, .. }
                | Operation::Zero { fua: sent, .. }) = operation
                else {
                    panic!("{operation:?} changes nothing");
                };
                assert_eq!((*sent_with, *sent), (durability, fua), "{operation:?}");
            }
        });
    }
}

#[test]
fn a_flush_is_done_when_every_primary_has_covered_its_groups() {
    run(async {
        let rig = Rig::with(map(&[NODE, OTHER_NODE]));
        let result = rig.start(Wanted::Flush, 0, 0);
        rig.until_sent(2).await;
        assert_eq!(*rig.port.flushes.borrow(), [NODE, OTHER_NODE]);
        rig.answer_flush(0, &[0]);
        // It has failed, it refuses, it covers nothing: what was written to its group may be on no stable media.
        rig.answer(1, Err(Code::StoreFailed));
        rig.until_sent(3).await;
        rig.answer(2, Err(Code::GroupInactive));
        rig.until_sent(4).await;
        rig.answer_flush(3, &[]);
        rig.until_sent(5).await;
        monoio::time::sleep(LONG).await;
        assert!(result.borrow().is_none(), "{result:?}");
        assert_eq!(rig.port.flushes.borrow()[2..], [OTHER_NODE; 3], "the first has covered its group");
        rig.answer_flush(4, &[1]);
        monoio::time::sleep(LONG).await;
        assert!(matches!(*result.borrow(), Some(Ok(BlockReply::Done))), "{result:?}");
        assert_eq!(rig.sent(), 5);
    });
}

#[test]
fn a_flush_that_one_primary_never_carries_out_fails() {
    for (code, ends_with) in [(Code::GroupInactive, Code::Timeout), (Code::Internal, Code::Internal)] {
        run(async {
            let rig = Rig::with(map(&[NODE, OTHER_NODE]));
            let result = rig.start(Wanted::Flush, 0, 0);
            rig.until_sent(2).await;
            rig.port.now_ns.set(1 + IO_TIMEOUT.as_nanos() as u64);
            rig.answer_flush(0, &[0]);
            rig.answer(1, Err(code));
            monoio::time::sleep(LONG).await;
            let Some(Err(ended_with)) = result.take() else { panic!("the flush did not fail") };
            assert_eq!(ended_with, ends_with);
        });
    }
}
