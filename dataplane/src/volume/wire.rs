//! Client I/O as frames: a request of one group there, its answer back.
//!
//! Pure. What comes from the wire is checked here, before any range is made of it.

use xsan_protocol::error::Code;
use xsan_protocol::ids::GroupId;
use xsan_protocol::limits::{FRAME_DATA_MAX, PAGES_PER_WRITE_MAX};
use xsan_protocol::map::Durability;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE, PageRange, SECTOR_SIZE};
use xsan_protocol::wire::header::{Header, Opcode, flags};

use super::calls::Answer;
use crate::disk::buffers::{Buffer, BufferPool};
use crate::net::frame::Frame;
use crate::replication::{Operation, Reply, Request, RequestId};
use crate::store::PageData;

const PAGE: u32 = PAGE_SIZE as u32;

/// The frame of `request`, to its group's primary.
pub fn request_frame(request: &Request) -> Frame {
    let mut header = Header::new(Opcode::Read);
    header.request_id = request.id.number;
    header.group = request.group;
    header.epoch = request.epoch;
    if request.durability == Durability::EveryWrite {
        header.flags |= flags::EVERY_WRITE;
    }
    let mut set = |opcode, key, offset, length, fua| {
        header.opcode = opcode;
        header.key = key;
        header.offset = offset;
        header.length = length;
        if fua {
            header.flags |= flags::FUA;
        }
    };
    let mut pages_of = |opcode, key, pages: PageRange, fua| {
        set(opcode, key, pages.byte_offset(), pages.bytes() as u32, fua);
    };
    let (mut checksums, mut data) = (None, None);
    match &request.operation {
        Operation::Read { key, pages } => pages_of(Opcode::Read, *key, *pages, false),
        Operation::BlockStatus { key, pages } => pages_of(Opcode::BlockStatus, *key, *pages, false),
        Operation::Zero { key, pages, fua } => pages_of(Opcode::WriteZeroes, *key, *pages, *fua),
        Operation::Write { key, pages, data: content, fua } => {
            pages_of(Opcode::Write, *key, *pages, *fua);
            checksums = Some(content.checksums.clone());
            data = Some(content.bytes.clone());
        }
        Operation::WriteSectors { key, offset, bytes, fua } => {
            set(Opcode::Write, *key, *offset, bytes.len() as u32, *fua);
            header.flags |= flags::SUB_PAGE;
            data = Some(bytes.clone());
        }
        Operation::Flush => unreachable!("a flush goes to a shard, not to one group: flush_frame"),
    }
    Frame { checksums, data, ..Frame::new(header) }
}

/// The frame that asks a shard to flush every group of `pool_group`'s pool that it is primary of.
pub fn flush_frame(number: u64, pool_group: GroupId) -> Frame {
    let mut header = Header::new(Opcode::Flush);
    header.request_id = number;
    header.group = pool_group;
    Frame::new(header)
}

fn pages(header: &Header, count_max: usize) -> Result<PageRange, Code> {
    let (offset, length) = (header.offset, header.length);
    let in_block = u64::from(offset) + u64::from(length) <= BLOCK_SIZE as u64;
    if length == 0 || !in_block || !offset.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE) {
        return Err(Code::InvalidArgument);
    }
    if length as usize > count_max * PAGE_SIZE {
        return Err(Code::InvalidArgument);
    }
    Ok(PageRange::around(offset, length))
}

/// The request that a client's frame asks for.
///
/// # Errors
/// 2 `InvalidArgument`: a range or payload that is not what the opcode says. 7 `Unsupported`: no client I/O.
pub fn frame_request(id: RequestId, frame: Frame) -> Result<Request, Code> {
    let header = frame.header;
    let key = header.key;
    let fua = header.flags & flags::FUA != 0;
    let length = header.length as usize;
    let carries = frame.data.as_ref().map_or(0, |data| data.len());
    let operation = match header.opcode {
        Opcode::Read => Operation::Read { key, pages: pages(&header, PAGES_PER_WRITE_MAX)? },
        Opcode::BlockStatus => Operation::BlockStatus { key, pages: pages(&header, usize::MAX / PAGE_SIZE)? },
        Opcode::WriteZeroes | Opcode::Trim => {
            Operation::Zero { key, pages: pages(&header, usize::MAX / PAGE_SIZE)?, fua }
        }
        Opcode::Write if carries != length || length == 0 => return Err(Code::InvalidArgument),
        Opcode::Write if header.flags & flags::SUB_PAGE != 0 => {
            let sectors =
                header.offset.is_multiple_of(SECTOR_SIZE) && header.length.is_multiple_of(SECTOR_SIZE);
            let in_page = u64::from(header.offset % PAGE) + u64::from(header.length) <= u64::from(PAGE);
            if !sectors || !in_page || header.offset as usize >= BLOCK_SIZE {
                return Err(Code::InvalidArgument);
            }
            let bytes = frame.data.ok_or(Code::InvalidArgument)?;
            Operation::WriteSectors { key, offset: header.offset, bytes, fua }
        }
        Opcode::Write => {
            let pages = pages(&header, PAGES_PER_WRITE_MAX)?;
            let (Some(bytes), Some(checksums)) = (frame.data, frame.checksums) else {
                return Err(Code::InvalidArgument);
            };
            if checksums.len() != usize::from(pages.count) {
                return Err(Code::InvalidArgument);
            }
            Operation::Write { key, pages, data: PageData { bytes, checksums }, fua }
        }
        _ => return Err(Code::Unsupported),
    };
    let every_write = header.flags & flags::EVERY_WRITE != 0;
    Ok(Request {
        id,
        group: header.group,
        epoch: header.epoch,
        durability: if every_write { Durability::EveryWrite } else { Durability::OnFlush },
        operation,
    })
}

/// The opcode that answers a client's request.
pub const fn answer_opcode(request: Opcode) -> Opcode {
    match request {
        Opcode::Read => Opcode::ReadReply,
        Opcode::Flush => Opcode::FlushReply,
        Opcode::BlockStatus => Opcode::BlockStatusReply,
        _ => Opcode::WriteReply,
    }
}

/// The frame that answers request `number` with a failure.
pub fn failure_frame(opcode: Opcode, number: u64, code: Code) -> Frame {
    let mut header = Header::new(opcode);
    header.request_id = number;
    header.status = Some(code);
    Frame::new(header)
}

/// The frame of a group's reply to request `number`.
///
/// # Errors
/// 6 `Busy`: no buffer for a list.
pub fn reply_frame(pool: &'static BufferPool, number: u64, reply: Reply) -> Result<Frame, Code> {
    let opcode = match &reply {
        Reply::Done => Opcode::WriteReply,
        Reply::Data(_) => Opcode::ReadReply,
        Reply::Status(_) => Opcode::BlockStatusReply,
    };
    let mut header = Header::new(opcode);
    header.request_id = number;
    let mut frame = Frame::new(header);
    match reply {
        Reply::Done | Reply::Data(None) => {}
        Reply::Data(Some(content)) => {
            frame.header.length = content.bytes.len() as u32;
            frame.checksums = Some(content.checksums);
            frame.data = Some(content.bytes);
        }
        Reply::Status(pages) => {
            frame.header.length = pages.len() as u32;
            let mut bits = pool.alloc(pages.len().div_ceil(8)).ok_or(Code::Busy)?;
            bits.fill(0);
            for (page, held) in pages.iter().enumerate() {
                bits[page / 8] |= u8::from(*held) << (page % 8);
            }
            frame.data = Some(bits.freeze());
        }
    }
    Ok(frame)
}

/// The frame that answers a flush with the groups it covered.
///
/// # Errors
/// 6 `Busy`: no buffer for the list.
pub fn flushed_frame(pool: &'static BufferPool, number: u64, groups: &[GroupId]) -> Result<Frame, Code> {
    let mut header = Header::new(Opcode::FlushReply);
    header.request_id = number;
    let mut frame = Frame::new(header);
    if !groups.is_empty() {
        assert!(groups.len() * 4 <= FRAME_DATA_MAX);
        let mut list = pool.alloc(groups.len() * 4).ok_or(Code::Busy)?;
        for (entry, group) in list.chunks_exact_mut(4).zip(groups) {
            entry.copy_from_slice(&group.0.to_le_bytes());
        }
        frame.data = Some(list.freeze());
    }
    Ok(frame)
}

/// The answer that a primary's frame carries.
///
/// # Errors
/// The frame's status, or 308 `FrameInvalid` for one that does not hold together.
pub fn frame_answer(frame: Frame) -> Result<Answer, Code> {
    if let Some(code) = frame.header.status {
        return Err(code);
    }
    let bytes = |data: Option<Buffer>| data.ok_or(Code::FrameInvalid);
    match frame.header.opcode {
        Opcode::WriteReply => Ok(Answer::Reply(Reply::Done)),
        Opcode::ReadReply if frame.data.is_none() => Ok(Answer::Reply(Reply::Data(None))),
        Opcode::ReadReply => {
            let checksums = frame.checksums.ok_or(Code::FrameInvalid)?;
            Ok(Answer::Reply(Reply::Data(Some(PageData { bytes: bytes(frame.data)?, checksums }))))
        }
        Opcode::BlockStatusReply => {
            let (bits, count) = (bytes(frame.data)?, frame.header.length as usize);
            if count.div_ceil(8) != bits.len() {
                return Err(Code::FrameInvalid);
            }
            let pages = (0..count).map(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect();
            Ok(Answer::Reply(Reply::Status(pages)))
        }
        Opcode::FlushReply => {
            let list = frame.data.as_deref().unwrap_or_default();
            let groups = list
                .chunks_exact(4)
                .map(|entry| GroupId(u32::from_le_bytes(entry.try_into().expect("chunks of four bytes"))));
            Ok(Answer::Flushed(groups.collect()))
        }
        _ => Err(Code::FrameInvalid),
    }
}

#[cfg(test)]
mod tests;
