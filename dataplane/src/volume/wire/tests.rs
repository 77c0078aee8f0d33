use xsan_protocol::checksum::page_checksums;
use xsan_protocol::ids::{BlockIndex, BlockKey, Epoch, Layer, Lineage};

use super::*;
use crate::replication::Origin;

const ID: RequestId = RequestId { origin: Origin::Connection(4), number: 11 };
const KEY: BlockKey = BlockKey { lineage: Lineage(5), layer: Layer(0), index: BlockIndex(6) };

fn request(operation: Operation) -> Request {
    Request { id: ID, group: GroupId(3), epoch: Epoch(2), durability: Durability::EveryWrite, operation }
}

fn buffer(pool: &'static BufferPool, length: usize) -> Buffer {
    let mut buffer = pool.alloc(length).unwrap();
    buffer.fill(0xab);
    buffer.freeze()
}

#[test]
fn every_request_survives_its_frame() {
    let pool = BufferPool::anonymous(16 << 20);
    let pages = PageRange::new(3, 2);
    let bytes = buffer(pool, pages.bytes());
    let data = PageData { checksums: page_checksums(&bytes), bytes };
    let operations = [
        Operation::Read { key: KEY, pages },
        Operation::BlockStatus { key: KEY, pages: PageRange::new(0, 1024) },
        Operation::Zero { key: KEY, pages: PageRange::new(0, 1024), fua: true },
        Operation::Write { key: KEY, pages, data, fua: true },
        Operation::WriteSectors { key: KEY, offset: 512, bytes: buffer(pool, 1024), fua: false },
    ];
    for operation in operations {
        let sent = request(operation);
        let received = frame_request(ID, request_frame(&sent)).unwrap();
        assert_eq!(format!("{received:?}"), format!("{sent:?}"));
    }
}

#[test]
fn ranges_that_are_not_pages_of_one_block_are_refused() {
    let sent = request(Operation::Read { key: KEY, pages: PageRange::new(0, 1) });
    let block = BLOCK_SIZE as u32;
    for (offset, length) in
        [(0, 0), (512, 4096), (0, 512), (block, 4096), (block - 4096, 8192), (u32::MAX - 4095, 8192)]
    {
        let mut frame = request_frame(&sent);
        (frame.header.offset, frame.header.length) = (offset, length);
        assert_eq!(frame_request(ID, frame).map(drop), Err(Code::InvalidArgument), "{offset} {length}");
    }
    let mut frame = request_frame(&sent);
    frame.header.opcode = Opcode::Write;
    assert_eq!(frame_request(ID, frame).map(drop), Err(Code::InvalidArgument), "a write without data");
    let mut frame = request_frame(&sent);
    frame.header.opcode = Opcode::Ping;
    assert_eq!(frame_request(ID, frame).map(drop), Err(Code::Unsupported));
}

#[test]
fn every_answer_survives_its_frame() {
    let pool = BufferPool::anonymous(16 << 20);
    let status: Vec<bool> = (0..1024).map(|page| page % 3 == 0).collect();
    let frame = reply_frame(pool, 11, Reply::Status(status.clone())).unwrap();
    match frame_answer(frame) {
        Ok(Answer::Reply(Reply::Status(pages))) => assert_eq!(pages, status),
        other => panic!("{other:?}"),
    }
    let groups: Vec<_> = (0..256).map(GroupId).collect();
    match frame_answer(flushed_frame(pool, 11, &groups).unwrap()) {
        Ok(Answer::Flushed(covered)) => assert_eq!(covered, groups),
        other => panic!("{other:?}"),
    }
    let failure = failure_frame(Opcode::ReadReply, 11, Code::NotPrimary);
    assert!(matches!(frame_answer(failure), Err(Code::NotPrimary)));
}
