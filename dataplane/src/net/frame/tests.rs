use proptest::prelude::*;
use xsan_protocol::checksum::page_checksums;
use xsan_protocol::ids::{Epoch, Seq, Version};
use xsan_protocol::wire::header::HEADER_SIZE;
use xsan_protocol::wire::replication::EntryKind;

use super::*;
use crate::disk::buffers::BufferPool;

thread_local!(static POOL: &'static BufferPool = BufferPool::anonymous(16 << 20));

fn filled(length: usize, seed: u8) -> Buffer {
    let mut buffer = POOL.with(|pool| pool.alloc(length)).unwrap();
    buffer
        .iter_mut()
        .enumerate()
        .for_each(|(index, byte)| *byte = (index as u8).wrapping_mul(7).wrapping_add(seed));
    buffer.freeze()
}

fn append(pages: usize, seed: u8) -> Frame {
    let version = Version::new(Epoch(3), Seq(u64::from(seed) + 1));
    let meta = AppendMeta {
        kind: EntryKind::Write,
        version,
        acked: Seq(u64::from(seed)),
        previous_first: Version::ZERO,
        previous_last: version,
    };
    let mut frame = Frame { meta: Meta::Append(meta), ..Frame::new(Header::new(Opcode::Append)) };
    if pages > 0 {
        let data = filled(pages * PAGE_SIZE, seed);
        frame.checksums = Some(page_checksums(&data));
        frame.data = Some(data);
    }
    frame
}

fn list(length: usize) -> Frame {
    Frame { data: Some(filled(length, 1)), ..Frame::new(Header::new(Opcode::Compare)) }
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame.encode_head(&mut bytes);
    bytes.extend_from_slice(frame.data.as_deref().unwrap_or_default());
    bytes
}

/// What a receiver makes of `bytes`; `None` while more are to come.
fn decode(bytes: &[u8]) -> Option<Result<Frame, ()>> {
    let header = match Header::decode(bytes.get(..HEADER_SIZE)?.try_into().unwrap()) {
        Ok(header) => header,
        Err(_) => return Some(Err(())),
    };
    let Ok(shape) = Shape::of(&header) else { return Some(Err(())) };
    let (head, data) = (shape.head(), shape.data);
    let payload = bytes.get(HEADER_SIZE..HEADER_SIZE + head + data)?;
    let buffer = (data > 0).then(|| {
        let mut buffer = POOL.with(|pool| pool.alloc(data)).unwrap();
        buffer.copy_from_slice(&payload[head..]);
        buffer.freeze()
    });
    Some(Frame::decode(header, shape, &payload[..head], buffer).map_err(|_| ()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_encoded_is_decoded(pages in 0usize..6, seed in any::<u8>(), length in 1usize..9000) {
        for frame in [append(pages, seed), list(length), Frame::new(Header::new(Opcode::Ping))] {
            let decoded = decode(&bytes_of(&frame)).unwrap().unwrap();
            prop_assert_eq!(decoded.meta, frame.meta);
            prop_assert_eq!(&decoded.checksums, &frame.checksums);
            prop_assert_eq!(decoded.data.as_deref(), frame.data.as_deref());
        }
    }

    #[test]
    fn every_truncation_waits_for_more(pages in 0usize..2, length in 1usize..200) {
        for frame in [append(pages, 1), list(length)] {
            let bytes = bytes_of(&frame);
            for end in 0..bytes.len() {
                prop_assert!(decode(&bytes[..end]).is_none());
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_refused(seed in any::<u8>(), at in any::<prop::sample::Index>()) {
        for frame in [append(1, seed), list(300)] {
            let bytes = bytes_of(&frame);
            let head = bytes.len().min(HEADER_SIZE + 52) * 8;
            for bit in (0..head).chain([head + at.index(bytes.len() * 8 - head)]) {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(!matches!(decode(&flipped), Some(Ok(_))), "bit {} was accepted", bit);
            }
        }
    }
}

#[test]
fn lengths_that_fit_no_payload_are_refused() {
    let mut header = Header::new(Opcode::Append);
    for length in [1, 47, 49, 48 + 4096, 48 + 4100 * 300] {
        header.payload_length = length;
        assert!(Shape::of(&header).is_err(), "{length}");
    }
    // No buffer is as large.
    header.opcode = Opcode::Link;
    header.payload_length = FRAME_MAX as u32 + 1;
    assert!(Shape::of(&Header::decode(&header.encode()).unwrap()).is_err());
    header.opcode = Opcode::PeerInfo;
    header.payload_length = 33;
    assert!(Shape::of(&header).is_err());
}
