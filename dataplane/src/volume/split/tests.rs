use proptest::prelude::*;
use xsan_protocol::limits::FRAME_DATA_MAX;

use super::*;
use crate::disk::buffers::BufferPool;

const ADDRESS: Address = Address { lineage: Lineage(9), layer: Layer(1) };
const SECTOR: u64 = 512;

fn volume_offset(key: BlockKey, in_block: u32) -> u64 {
    u64::from(key.index.0) * BLOCK + u64::from(in_block)
}

fn any_range(length_max: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..40 * BLOCK / SECTOR, 1..=length_max / SECTOR)
        .prop_map(|(offset, length)| (offset * SECTOR, length * SECTOR))
}

proptest! {
    #[test]
    fn reads_cover_every_byte_once((offset, length) in any_range(FRAME_DATA_MAX as u64)) {
        let mut next = offset;
        for part in read(ADDRESS, offset, length) {
            prop_assert_eq!(volume_offset(part.key, part.pages.byte_offset() + part.skip), next);
            prop_assert!(part.skip < PAGE as u32);
            prop_assert!((part.skip + part.length) as usize <= part.pages.bytes());
            prop_assert!(usize::from(part.pages.count) <= PAGES_PER_WRITE_MAX);
            next += u64::from(part.length);
        }
        prop_assert_eq!(next, offset + length);
    }

    #[test]
    fn cover_counts_every_byte_once((offset, length) in any_range(5 * BLOCK)) {
        let parts = cover(ADDRESS, offset, length);
        let pages = parts.iter().flat_map(|part| (0..usize::from(part.pages.count)).map(|page| part.bytes_of_page(page)));
        prop_assert_eq!(pages.sum::<u64>(), length);
    }

    #[test]
    fn zeroes_cover_every_byte_once(
        (offset, length) in any_range(20 * BLOCK),
        span_max in (1..=BLOCK / PAGE).prop_map(|pages| pages * PAGE),
    ) {
        let mut next = offset;
        for part in zero(ADDRESS, offset, length, span_max) {
            let (at, count) = match part {
                ZeroPart::Pages { key, pages } => {
                    prop_assert!(pages.bytes() as u64 <= span_max);
                    (volume_offset(key, pages.byte_offset()), pages.bytes() as u64)
                }
                ZeroPart::Sectors { key, offset, length } => {
                    prop_assert!(u64::from(offset) % PAGE + u64::from(length) <= PAGE);
                    prop_assert!(u64::from(length) < PAGE);
                    (volume_offset(key, offset), u64::from(length))
                }
            };
            prop_assert_eq!(at, next);
            next += count;
        }
        prop_assert_eq!(next, offset + length);
    }

    #[test]
    fn writes_keep_every_byte_in_its_place((offset, length) in any_range(FRAME_DATA_MAX as u64)) {
        thread_local!(static POOL: &'static BufferPool = BufferPool::anonymous(16 << 20));
        let (place, length) = ((offset % PAGE) as usize, length as usize);
        let mut buffer = POOL.with(|pool| pool.alloc(place + length)).unwrap();
        for (index, byte) in buffer[place..].iter_mut().enumerate() {
            *byte = (index % 251) as u8;
        }
        let data = buffer.freeze().slice(place..place + length);
        let mut next = offset;
        for part in write(ADDRESS, offset, &data, false) {
            let (at, bytes) = match &part {
                Operation::Write { key, pages, data, .. } => {
                    prop_assert_eq!(data.bytes.len(), pages.bytes());
                    prop_assert_eq!(data.checksums.len(), usize::from(pages.count));
                    prop_assert!((data.bytes.as_ptr() as usize).is_multiple_of(PAGE_SIZE));
                    (volume_offset(*key, pages.byte_offset()), &data.bytes)
                }
                Operation::WriteSectors { key, offset, bytes, .. } => {
                    prop_assert!(u64::from(*offset) % PAGE + bytes.len() as u64 <= PAGE);
                    (volume_offset(*key, *offset), bytes)
                }
                other => panic!("{other:?} is no write"),
            };
            prop_assert_eq!(at, next);
            let start = (at - offset) as usize;
            prop_assert!(bytes.iter().enumerate().all(|(index, byte)| *byte == ((start + index) % 251) as u8));
            next += bytes.len() as u64;
        }
        prop_assert_eq!(next, offset + length as u64);
    }
}
