//! Rules: which requests are carried out, how they are cut into pieces, and which errno a failure is.
//!
//! Pure functions for `session`. Knows the protocol and the error table, no sockets and no volumes.

use xsan_protocol::error::Code;
use xsan_protocol::limits::FRAME_DATA_MAX;
use xsan_protocol::units::{BLOCK_SIZE, PAGE_SIZE, SECTOR_SIZE};

use super::wire::{Errno, Request, command, flag};
use crate::volume::request::{ZEROES_BYTES, ZEROES_PARTS_MAX};

/// Most bytes that one read or write carries; told to clients in the handshake.
pub const REQUEST_BYTES_MAX: u32 = 32 * 1024 * 1024;
/// Longest read whose reply is held back until all of its pieces are there: such a reply is one header and one
/// run of data (no structured replies, or "do not fragment"), which can not tell of an error once it has begun.
pub(super) const ASSEMBLED_BYTES_MAX: u32 = 4 * 1024 * 1024;
/// Longest payload of a refused write that is skipped rather than answered by closing the connection.
pub(super) const SKIPPED_BYTES_MAX: u32 = 2 * REQUEST_BYTES_MAX;

const _: () = assert!(FRAME_DATA_MAX.is_multiple_of(PAGE_SIZE));
const _: () = assert!(BLOCK_SIZE.is_multiple_of(FRAME_DATA_MAX));

/// A request that may be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Read { dont_fragment: bool },
    Write { fua: bool },
    Flush,
    Trim { fua: bool },
    Cache,
    WriteZeroes { fua: bool, no_hole: bool },
    BlockStatus { one: bool },
}

/// What the client agreed to in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub structured: bool,
    pub allocation: bool,
}

/// The command of a request, if it can be carried out on a volume of `size_bytes`.
///
/// Reads past the end are `Inval`, writes past it `NoSpc`, as the protocol has it.
pub fn check(request: &Request, agreed: Agreed, size_bytes: u64) -> Result<Command, Errno> {
    // The protocol allows FUA on every command, and known clients set it on reads.
    let allowed = flag::FUA
        | match request.command {
            command::READ if agreed.structured => flag::DF,
            command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::REQ_ONE,
            _ => 0,
        };
    if request.flags & !allowed != 0 {
        return Err(Errno::Inval);
    }
    let has = |bit| request.flags & bit != 0;
    let fua = has(flag::FUA);
    let (found, past_end) = match request.command {
        command::READ => (Command::Read { dont_fragment: has(flag::DF) }, Errno::Inval),
        command::WRITE => (Command::Write { fua }, Errno::NoSpc),
        command::TRIM => (Command::Trim { fua }, Errno::Inval),
        command::CACHE => (Command::Cache, Errno::Inval),
        // Zeroes are fast because they free what was there; space that must stay allocated is written.
        command::WRITE_ZEROES if has(flag::FAST_ZERO) && has(flag::NO_HOLE) => return Err(Errno::NotSup),
        command::WRITE_ZEROES => (Command::WriteZeroes { fua, no_hole: has(flag::NO_HOLE) }, Errno::NoSpc),
        command::BLOCK_STATUS if agreed.allocation => {
            (Command::BlockStatus { one: has(flag::REQ_ONE) }, Errno::Inval)
        }
        command::FLUSH if request.offset == 0 && request.length == 0 => return Ok(Command::Flush),
        _ => return Err(Errno::Inval),
    };
    let sector = u64::from(SECTOR_SIZE);
    let aligned = request.offset.is_multiple_of(sector) && u64::from(request.length).is_multiple_of(sector);
    if request.length == 0 || !aligned {
        return Err(Errno::Inval);
    }
    if matches!(found, Command::Read { .. } | Command::Write { .. }) && request.length > REQUEST_BYTES_MAX {
        return Err(Errno::Inval);
    }
    if matches!(found, Command::Read { dont_fragment: true }) && request.length > ASSEMBLED_BYTES_MAX {
        return Err(Errno::Overflow);
    }
    match request.offset.checked_add(u64::from(request.length)) {
        Some(end) if end <= size_bytes => Ok(found),
        _ => Err(past_end),
    }
}

/// The errno that a client gets for a failure of its volume.
pub(super) fn errno(code: Code, writes: bool) -> Errno {
    match code {
        Code::StorageFull => Errno::NoSpc,
        Code::OutOfRange if writes => Errno::NoSpc,
        Code::OutOfRange | Code::InvalidArgument => Errno::Inval,
        Code::Unsupported => Errno::NotSup,
        Code::MemoryShort => Errno::NoMem,
        // The volume is deleted, or another client has taken it over: nothing more will come of this export.
        Code::VolumeNotFound | Code::NotFound | Code::Fenced => Errno::Shutdown,
        _ => Errno::Io,
    }
}

/// A part of a read or write: within one block, at most `FRAME_DATA_MAX` bytes, and ending on a page boundary
/// unless the request itself does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub length: usize,
}

/// Cuts a request, in order.
pub fn pieces(offset: u64, length: u32) -> impl Iterator<Item = Piece> + Clone {
    let end = offset + u64::from(length);
    let mut next = offset;
    std::iter::from_fn(move || {
        if next == end {
            return None;
        }
        let start = next;
        let page_end = (start + FRAME_DATA_MAX as u64) / PAGE_SIZE as u64 * PAGE_SIZE as u64;
        let block_end = (start / BLOCK_SIZE as u64 + 1) * BLOCK_SIZE as u64;
        next = end.min(page_end).min(block_end);
        Some(Piece { offset: start, length: (next - start) as usize })
    })
}

/// Cuts a write-zeroes that is written into ranges of what goes at once, in order.
pub(super) fn zero_pieces(offset: u64, length: u32) -> impl Iterator<Item = (u64, u64)> + Clone {
    const SPAN: u64 = (ZEROES_PARTS_MAX * ZEROES_BYTES) as u64;
    let end = offset + u64::from(length);
    let starts =
        std::iter::once(offset).chain((offset / SPAN + 1..end.div_ceil(SPAN)).map(|span| span * SPAN));
    starts.map(move |start| (start, end.min((start / SPAN + 1) * SPAN) - start))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;
    const FULL: Agreed = Agreed { structured: true, allocation: true };

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        Request { flags, command, cookie: 1, offset, length }
    }

    #[test]
    fn the_end_of_the_volume_is_told_as_the_protocol_wants() {
        let past = |command| check(&request(command, 0, SIZE - 512, 1024), FULL, SIZE);
        assert_eq!(past(command::READ), Err(Errno::Inval));
        assert_eq!(past(command::WRITE), Err(Errno::NoSpc));
        assert_eq!(past(command::WRITE_ZEROES), Err(Errno::NoSpc));
        assert_eq!(past(command::TRIM), Err(Errno::Inval));
        let last = check(&request(command::WRITE, flag::FUA, SIZE - 512, 512), FULL, SIZE);
        assert_eq!(last, Ok(Command::Write { fua: true }));
        let wraps = check(&request(command::READ, 0, u64::MAX - 511, 1024), FULL, SIZE);
        assert_eq!(wraps, Err(Errno::Inval));
    }

    #[test]
    fn what_was_not_agreed_is_invalid() {
        let plain = Agreed::default();
        let status = request(command::BLOCK_STATUS, 0, 0, 512);
        assert_eq!(check(&status, FULL, SIZE), Ok(Command::BlockStatus { one: false }));
        assert_eq!(check(&status, plain, SIZE), Err(Errno::Inval));
        let whole = request(command::READ, flag::DF, 0, 512);
        assert_eq!(check(&whole, FULL, SIZE), Ok(Command::Read { dont_fragment: true }));
        assert_eq!(check(&whole, plain, SIZE), Err(Errno::Inval));
        for (command, flags) in [(command::WRITE, flag::DF), (command::TRIM, flag::NO_HOLE), (99, 0)] {
            assert_eq!(check(&request(command, flags, 0, 512), FULL, SIZE), Err(Errno::Inval));
        }
    }

    #[test]
    fn odd_and_large_requests_are_refused() {
        for (offset, length) in [(1, 512), (0, 511), (0, 0)] {
            assert_eq!(check(&request(command::READ, 0, offset, length), FULL, SIZE), Err(Errno::Inval));
        }
        let large = |flags, length| check(&request(command::READ, flags, 0, length), FULL, SIZE);
        assert!(large(0, REQUEST_BYTES_MAX).is_ok());
        assert_eq!(large(0, REQUEST_BYTES_MAX + 512), Err(Errno::Inval));
        assert_eq!(large(flag::DF, ASSEMBLED_BYTES_MAX + 512), Err(Errno::Overflow));
        assert!(check(&request(command::TRIM, 0, 0, 1 << 30), FULL, SIZE).is_ok());
    }

    #[test]
    fn zeroes_that_stay_allocated_are_not_fast() {
        let zeroes = |flags| check(&request(command::WRITE_ZEROES, flags, 0, 4096), FULL, SIZE);
        assert_eq!(zeroes(flag::FAST_ZERO | flag::NO_HOLE), Err(Errno::NotSup));
        assert_eq!(zeroes(flag::FAST_ZERO), Ok(Command::WriteZeroes { fua: false, no_hole: false }));
        assert_eq!(zeroes(flag::NO_HOLE), Ok(Command::WriteZeroes { fua: false, no_hole: true }));
    }

    #[test]
    fn written_zeroes_are_cut_into_what_goes_at_once() {
        const SPAN: u64 = 512 * 1024;
        let cut = |offset, length| zero_pieces(offset, length).collect::<Vec<_>>();
        assert_eq!(cut(512, 512), [(512, 512)]);
        assert_eq!(cut(0, SPAN as u32), [(0, SPAN)]);
        assert_eq!(cut(SPAN - 512, SPAN as u32 + 1024), [(SPAN - 512, 512), (SPAN, SPAN), (2 * SPAN, 512)]);
        assert_eq!(cut(0, u32::MAX / 512 * 512).len(), 8192);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_request_and_end_on_boundaries(sector in 0u64..1 << 24, sectors in 1u32..1 << 16) {
            let (offset, length) = (sector * 512, sectors * 512);
            let mut next = offset;
            let all: Vec<Piece> = pieces(offset, length).collect();
            for (index, piece) in all.iter().enumerate() {
                prop_assert_eq!(piece.offset, next);
                prop_assert!(piece.length > 0);
                let pages = (piece.offset % 4096) as usize + piece.length;
                prop_assert!(pages <= FRAME_DATA_MAX);
                let block = |byte: u64| byte / BLOCK_SIZE as u64;
                next += piece.length as u64;
                prop_assert_eq!(block(piece.offset), block(next - 1));
                prop_assert!(next.is_multiple_of(4096) || index + 1 == all.len());
            }
            prop_assert_eq!(next, offset + u64::from(length));
        }
    }
}
