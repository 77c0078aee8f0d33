//! Frames of the replication family: how they are built, and what is accepted of a peer's.
//!
//! Used by the other files of `replication`. A peer's frame is never asserted, it is decoded.

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockIndex, BlockKey, Epoch, GroupId, Layer, Lineage, Seq, Version};
use xsan_protocol::limits::PAGES_PER_WRITE_MAX;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE, PageRange};
use xsan_protocol::wire::header::{Header, Opcode, flags};
use xsan_protocol::wire::replication::{AppendMeta, EntryKind, PushMeta};

use crate::net::frame::{Frame, Meta};
use crate::store::{Entry, PageData};

/// The last of all keys: where a comparison of everything ends.
pub(super) const KEY_MAX: BlockKey =
    BlockKey { lineage: Lineage(u64::MAX), layer: Layer(u32::MAX), index: BlockIndex(u32::MAX) };

/// Does it bring a member or learner content that it is to have, so that no answer is missed if it does not?
pub const fn is_content(opcode: Opcode) -> bool {
    matches!(opcode, Opcode::Append | Opcode::Push)
}

pub(super) fn frame(opcode: Opcode, group: GroupId, epoch: Epoch) -> Frame {
    let mut header = Header::new(opcode);
    header.group = group;
    header.epoch = epoch;
    Frame::new(header)
}

/// A frame whose only content is a number.
pub(super) fn numbered(opcode: Opcode, group: GroupId, epoch: Epoch, request_id: u64) -> Frame {
    let mut frame = frame(opcode, group, epoch);
    frame.header.request_id = request_id;
    frame
}

/// A frame about pages of a block.
pub(super) fn about(opcode: Opcode, group: GroupId, epoch: Epoch, key: BlockKey, pages: PageRange) -> Frame {
    let mut frame = frame(opcode, group, epoch);
    frame.header.key = key;
    (frame.header.offset, frame.header.length) = (pages.byte_offset(), pages.bytes() as u32);
    frame
}

/// `entry` as an Append or FetchReply. `sync`: it must be on stable media before it is answered.
pub(super) fn of_entry(opcode: Opcode, entry: &Entry, epoch: Epoch, acked: Seq, sync: bool) -> Frame {
    let mut frame = frame(opcode, entry.group, epoch);
    frame.header.key = entry.key;
    frame.header.offset = entry.pages.byte_offset();
    frame.header.length = entry.pages.bytes() as u32;
    frame.header.flags = if sync { flags::FUA } else { 0 };
    frame.meta = Meta::Append(AppendMeta {
        kind: if entry.data.is_some() { EntryKind::Write } else { EntryKind::Zero },
        version: entry.version,
        acked,
        previous_first: entry.previous_first,
        previous_last: entry.previous_last,
    });
    if let Some(data) = &entry.data {
        frame.checksums = Some(data.checksums.clone());
        frame.data = Some(data.bytes.clone());
    }
    frame
}

/// The answer of `request`'s family that refuses it; `None` for frames that are not answered.
pub(super) fn refusal(request: &Header, code: Code) -> Option<Frame> {
    let opcode = match request.opcode {
        Opcode::Append => Opcode::AppendOk,
        Opcode::Peer => Opcode::PeerInfo,
        Opcode::Fetch => Opcode::FetchReply,
        Opcode::MemberFlush => Opcode::MemberFlushReply,
        Opcode::LearnStart => Opcode::LearnStartReply,
        Opcode::Compare => Opcode::CompareReply,
        Opcode::Push => Opcode::PushReply,
        Opcode::FetchPages => Opcode::FetchPagesReply,
        Opcode::Check => Opcode::CheckReply,
        _ => return None,
    };
    let mut frame = numbered(opcode, request.group, request.epoch, request.request_id);
    frame.header.key = request.key;
    frame.header.offset = request.offset;
    frame.header.status = Some(code);
    Some(frame)
}

/// The whole pages that a header names, if it does.
pub(super) fn pages_of(header: &Header) -> Option<PageRange> {
    let page = PAGE_SIZE as u32;
    let (offset, length) = (header.offset, header.length);
    let end = u64::from(offset) + u64::from(length);
    let whole = offset.is_multiple_of(page) && length.is_multiple_of(page) && length > 0;
    (whole && end <= BLOCK_SIZE as u64)
        .then(|| PageRange::new((offset / page) as u16, (length / page) as u16))
}

/// The data of a frame that carries `pages`, if it does.
pub(super) fn page_data(frame: &mut Frame, pages: PageRange) -> Option<PageData> {
    let bytes = frame.data.take()?;
    let checksums = frame.checksums.take()?;
    (bytes.len() == pages.bytes() && checksums.len() == usize::from(pages.count))
        .then_some(PageData { bytes, checksums })
}

/// The entry that an Append or FetchReply carries.
///
/// # Errors
/// 308 `FrameInvalid`.
pub(super) fn entry_of(mut frame: Frame) -> Result<Entry, Code> {
    let Meta::Append(meta) = frame.meta else { return Err(Code::FrameInvalid) };
    let pages = pages_of(&frame.header).ok_or(Code::FrameInvalid)?;
    let data = match meta.kind {
        EntryKind::Zero if frame.data.is_none() => None,
        EntryKind::Write if usize::from(pages.count) <= PAGES_PER_WRITE_MAX => {
            Some(page_data(&mut frame, pages).ok_or(Code::FrameInvalid)?)
        }
        _ => return Err(Code::FrameInvalid),
    };
    Ok(Entry {
        group: frame.header.group,
        version: meta.version,
        acked: meta.acked,
        key: frame.header.key,
        pages,
        data,
        previous_first: meta.previous_first,
        previous_last: meta.previous_last,
    })
}

/// LearnStart and its reply: `request_id` and `length` are the version after which the learner takes appends, `offset` counts
/// the attempts, so that one sent twice starts the learner once.
pub(super) fn learn_start(
    opcode: Opcode,
    group: GroupId,
    epoch: Epoch,
    after: Version,
    attempt: u32,
) -> Frame {
    let mut frame = numbered(opcode, group, epoch, after.seq.0);
    frame.header.length = after.epoch.0;
    frame.header.offset = attempt;
    frame
}

/// The version and attempt of a LearnStart or its reply.
pub(super) fn learn_start_of(header: &Header) -> (Version, u32) {
    (Version::new(Epoch(header.length), Seq(header.request_id)), header.offset)
}

/// A whole unit for a learner.
pub(super) fn push(
    group: GroupId,
    epoch: Epoch,
    key: BlockKey,
    unit: u8,
    meta: PushMeta,
    data: Option<PageData>,
) -> Frame {
    let pages = PageRange::of_unit(unit);
    let mut frame = frame(Opcode::Push, group, epoch);
    frame.header.key = key;
    frame.header.offset = pages.byte_offset();
    frame.header.length = pages.bytes() as u32;
    frame.meta = Meta::Push(meta);
    if let Some(data) = data {
        frame.checksums = Some(data.checksums);
        frame.data = Some(data.bytes);
    }
    frame
}

/// The key behind `key` in the order of keys.
pub(super) fn successor(key: BlockKey) -> Option<BlockKey> {
    let BlockKey { lineage, layer, index } = key;
    if let Some(index) = index.0.checked_add(1) {
        return Some(BlockKey { index: BlockIndex(index), ..key });
    }
    if let Some(layer) = layer.0.checked_add(1) {
        return Some(BlockKey { lineage, layer: Layer(layer), index: BlockIndex(0) });
    }
    lineage.0.checked_add(1).map(|lineage| BlockKey { lineage: Lineage(lineage), ..BlockKey::default() })
}

/// The key before `key` in the order of keys.
pub(super) fn predecessor(key: BlockKey) -> Option<BlockKey> {
    let BlockKey { lineage, layer, index } = key;
    if let Some(index) = index.0.checked_sub(1) {
        return Some(BlockKey { index: BlockIndex(index), ..key });
    }
    if let Some(layer) = layer.0.checked_sub(1) {
        return Some(BlockKey { lineage, layer: Layer(layer), index: BlockIndex(u32::MAX) });
    }
    lineage.0.checked_sub(1).map(|lineage| BlockKey { lineage: Lineage(lineage), ..KEY_MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_neighbours() {
        let first = BlockKey::default();
        assert_eq!(predecessor(first), None);
        assert_eq!(successor(KEY_MAX), None);
        let edge = BlockKey { lineage: Lineage(3), layer: Layer(u32::MAX), index: BlockIndex(u32::MAX) };
        for key in [first, edge, BlockKey { layer: Layer(2), index: BlockIndex(u32::MAX), ..first }] {
            let next = successor(key).unwrap();
            assert!(next > key);
            assert_eq!(predecessor(next), Some(key));
        }
    }

    #[test]
    fn ranges_that_are_not_whole_pages_of_a_block_are_refused() {
        let range = |offset, length| {
            let mut header = Header::new(Opcode::Append);
            (header.offset, header.length) = (offset, length);
            pages_of(&header)
        };
        assert_eq!(range(8192, 4096), Some(PageRange::new(2, 1)));
        for (offset, length) in
            [(0, 0), (1, 4096), (0, 512), (BLOCK_SIZE as u32, 4096), (4096, u32::MAX - 4095)]
        {
            assert_eq!(range(offset, length), None);
        }
    }
}
