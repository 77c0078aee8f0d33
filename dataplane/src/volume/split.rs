//! Splits a request of a volume into requests of blocks: the pieces that one group carries out.
//!
//! Pure. A write's first and last page may be covered in part: those become sector writes, which the
//! primary merges; everything between is whole pages, without a copy.

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::ids::{BlockIndex, BlockKey, Layer, Lineage};
use xsan_protocol::limits::PAGES_PER_WRITE_MAX;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE, PageRange};

use crate::disk::buffers::Buffer;
use crate::replication::Operation;
use crate::store::PageData;

const BLOCK: u64 = BLOCK_SIZE as u64;
const PAGE: u64 = PAGE_SIZE as u64;

/// Where in the cluster a volume's bytes are named: its lineage and the layer that is written.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    pub lineage: Lineage,
    pub layer: Layer,
}

impl Address {
    fn key(self, offset: u64) -> BlockKey {
        BlockKey { lineage: self.lineage, layer: self.layer, index: BlockIndex((offset / BLOCK) as u32) }
    }
}

/// Calls `each` with the bytes `offset..offset + length`, cut at every block and at `span_max` bytes.
fn spans(offset: u64, length: u64, span_max: u64, mut each: impl FnMut(u64, u64)) {
    let end = offset + length;
    let mut start = offset;
    while start < end {
        let stop = end.min((start / BLOCK + 1) * BLOCK).min(start + span_max);
        each(start, stop - start);
        start = stop;
    }
}

/// A read: the pages around the bytes of each piece, and which of those bytes were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPart {
    pub key: BlockKey,
    pub pages: PageRange,
    /// Bytes to leave out at the start of the pages.
    pub skip: u32,
    pub length: u32,
}

/// Splits a read of at most `FRAME_DATA_MAX` bytes.
pub fn read(address: Address, offset: u64, length: u64) -> Vec<ReadPart> {
    let mut parts = Vec::with_capacity(2);
    // One page less than the largest range: the bytes need not start at a page.
    let span_max = (PAGES_PER_WRITE_MAX as u64 - u64::from(!offset.is_multiple_of(PAGE))) * PAGE;
    spans(offset, length, span_max, |start, count| {
        let in_block = (start % BLOCK) as u32;
        let pages = PageRange::around(in_block, count as u32);
        parts.push(ReadPart {
            key: address.key(start),
            pages,
            skip: in_block - pages.byte_offset(),
            length: count as u32,
        });
    });
    parts
}

/// A part of a range of any length, by blocks: for block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoverPart {
    pub key: BlockKey,
    pub pages: PageRange,
    skip: u32,
    length: u32,
}

impl CoverPart {
    /// How many of the bytes asked for lie in page `index` of the part.
    pub fn bytes_of_page(&self, index: usize) -> u64 {
        let start = (index as u64 * PAGE).max(u64::from(self.skip));
        let end = ((index as u64 + 1) * PAGE).min(u64::from(self.skip + self.length));
        end - start
    }
}

/// Splits a range of any length by blocks.
pub fn cover(address: Address, offset: u64, length: u64) -> Vec<CoverPart> {
    let mut parts = Vec::with_capacity(1);
    spans(offset, length, BLOCK, |start, count| {
        let in_block = (start % BLOCK) as u32;
        let pages = PageRange::around(in_block, count as u32);
        let skip = in_block - pages.byte_offset();
        parts.push(CoverPart { key: address.key(start), pages, skip, length: count as u32 });
    });
    parts
}

/// Splits a write of `data` at `offset`.
///
/// # Panics
/// `data` is not placed like `offset` modulo the page size: a gateway's bug.
pub fn write(address: Address, offset: u64, data: &Buffer, fua: bool) -> Vec<Operation> {
    assert!(data.as_ptr() as u64 % PAGE == offset % PAGE, "write data is placed like its offset");
    let mut parts = Vec::with_capacity(1);
    let mut taken = 0usize;
    let length = data.len() as u64;
    // Aligned spans, so that only the ends of the request can be partial pages.
    let first = (PAGE - offset % PAGE) % PAGE;
    let mut piece = |start: u64, count: u64| {
        let bytes = data.slice(taken..taken + count as usize);
        taken += count as usize;
        let key = address.key(start);
        let in_block = (start % BLOCK) as u32;
        parts.push(if start.is_multiple_of(PAGE) && count.is_multiple_of(PAGE) {
            let checksums = page_checksums(&bytes);
            let pages = PageRange::around(in_block, count as u32);
            Operation::Write { key, pages, data: PageData { bytes, checksums }, fua }
        } else {
            Operation::WriteSectors { key, offset: in_block, bytes, fua }
        });
    };
    let head = first.min(length);
    let body = (length - head) / PAGE * PAGE;
    let tail = length - head - body;
    if head > 0 {
        piece(offset, head);
    }
    spans(offset + head, body, (PAGES_PER_WRITE_MAX * PAGE_SIZE) as u64, &mut piece);
    if tail > 0 {
        piece(offset + head + body, tail);
    }
    parts
}

/// A piece of a write-zeroes or trim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroPart {
    Pages {
        key: BlockKey,
        pages: PageRange,
    },
    /// Part of one page, to be written with zeroes.
    Sectors {
        key: BlockKey,
        offset: u32,
        length: u32,
    },
}

/// Splits a write-zeroes into parts of at most `span_max` bytes, whole pages. A trim leaves out the partial pages: they
/// are not worth a write.
pub fn zero(address: Address, offset: u64, length: u64, span_max: u64) -> impl Iterator<Item = ZeroPart> {
    let end = offset + length;
    let mut start = offset;
    std::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let key = address.key(start);
        let in_block = (start % BLOCK) as u32;
        let stop = end.min((start / BLOCK + 1) * BLOCK);
        let whole_end = (stop / PAGE * PAGE).min(start + span_max);
        let (part, stop) = if start.is_multiple_of(PAGE) && whole_end > start {
            let pages = PageRange::around(in_block, (whole_end - start) as u32);
            (ZeroPart::Pages { key, pages }, whole_end)
        } else {
            let stop = stop.min((start / PAGE + 1) * PAGE);
            (ZeroPart::Sectors { key, offset: in_block, length: (stop - start) as u32 }, stop)
        };
        start = stop;
        Some(part)
    })
}

#[cfg(test)]
mod tests;
