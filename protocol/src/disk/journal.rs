//! Journal batch: header, descriptors and page checksums in whole pages, then the data pages.
//!
//! The header's checksum covers header, descriptors and checksum table; the table covers the data page by page.
//! A batch is whole when both match. Its place in the chain: `position` is the byte position it was written
//! for (growing for ever, so that a batch of an earlier lap of the ring is told apart) and `previous_end` the
//! end of the batch before it, which also names a jump over the end of the ring.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    DiskFormatError, FORMAT_VERSION, RawKey, check, check_counters, check_seal, check_version, seal,
};
use crate::ids::{BlockKey, GroupId, Seq, StoreId, Version};
use crate::limits::PAGES_PER_WRITE_MAX;
use crate::units::{PAGE_SIZE, PAGES_PER_BLOCK, PAGES_PER_UNIT, PageRange};
use crate::wire::replication::RawVersion;

pub const MAGIC: [u8; 8] = *b"XSANJRNL";
pub const HEADER_SIZE: usize = 128;
pub const DESCRIPTOR_SIZE: usize = 96;
/// Most descriptors of a batch: position + index names a descriptor, and positions are whole pages.
pub const DESCRIPTORS_MAX: usize = 1000;
/// Most data pages of a batch.
pub const DATA_PAGES_MAX: usize = 1024;

const _: () = assert!(DESCRIPTORS_MAX < PAGE_SIZE);
const _: () = assert!(DATA_PAGES_MAX >= PAGES_PER_WRITE_MAX);

/// What a descriptor says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// An entry of a group's order, with data.
    Write = 1,
    /// An entry that makes its pages zero.
    Zero = 2,
    /// A unit's content from the primary; `acked` is what it is as of.
    Push = 3,
    /// A unit that is all zero at the primary.
    PushZero = 4,
    /// Drops the group's entries that are not applied; `version` is where it goes on from.
    Reset = 5,
    /// An entry that is in the journal already, once more. It counts, instead of the one before, if a `Carried` follows.
    Carry = 6,
    /// The same, for an entry that makes its pages zero.
    CarryZero = 7,
    /// The carry that began at `start` is complete; it is of the group's entries above `acked`.
    Carried = 8,
}

impl Kind {
    pub const fn has_data(self) -> bool {
        matches!(self, Self::Write | Self::Push | Self::Carry)
    }
}

/// One record of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub kind: Kind,
    pub group: GroupId,
    pub version: Version,
    pub acked: Seq,
    pub key: BlockKey,
    /// For a Reset or a Carried: any one page.
    pub pages: PageRange,
    pub previous_first: Version,
    pub previous_last: Version,
    /// First data page, counted from the start of the batch's data; 0 without data.
    pub data_page: u32,
    /// For a Carried: position of its first record; 0 for all others.
    pub start: u64,
    /// For a Push: pages of the unit, by bit, that no replica has. What is there in their place does not match their
    /// checksums, which are those of what is lost.
    pub lost: u16,
}

/// The header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    pub store: StoreId,
    pub position: u64,
    pub previous_end: u64,
    /// Everything below this position was on stable media when the batch was written.
    pub flushed: u64,
    /// Everything below this position had been written then.
    pub durable: u64,
    /// Number of the opening of the store that wrote it.
    pub session: u64,
    pub descriptor_count: u32,
    pub data_pages: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],        // 0
    checksum: U32,         // 8
    version: U16,          // 12
    reserved: U16,         // 14
    store: U64,            // 16
    position: U64,         // 24
    previous_end: U64,     // 32
    flushed: U64,          // 40
    session: U64,          // 48
    descriptor_count: U32, // 56
    data_pages: U32,       // 60
    durable: U64,          // 64
    padding: [u8; 56],     // 72
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    kind: u8,                   // 0
    reserved: [u8; 3],          // 1
    group: U32,                 // 4
    key: RawKey,                // 8
    version: RawVersion,        // 24
    previous_first: RawVersion, // 36
    previous_last: RawVersion,  // 48
    acked: U64,                 // 60
    first_page: U16,            // 68
    page_count: U16,            // 70
    data_page: U32,             // 72
    start: U64,                 // 76
    lost: U16,                  // 84
    padding: [u8; 10],          // 86
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);
const _: () = assert!(size_of::<RawDescriptor>() == DESCRIPTOR_SIZE);

/// Bytes of header, descriptors and checksum table, in whole pages.
pub const fn head_bytes(descriptor_count: usize, data_pages: usize) -> usize {
    (HEADER_SIZE + descriptor_count * DESCRIPTOR_SIZE + data_pages * 4).next_multiple_of(PAGE_SIZE)
}

/// Largest head of any batch.
pub const HEAD_BYTES_MAX: usize = head_bytes(DESCRIPTORS_MAX, DATA_PAGES_MAX);

impl BatchHeader {
    pub const fn head_bytes(&self) -> usize {
        head_bytes(self.descriptor_count as usize, self.data_pages as usize)
    }

    /// Bytes of the whole batch.
    pub const fn batch_bytes(&self) -> usize {
        self.head_bytes() + self.data_pages as usize * PAGE_SIZE
    }

    /// The header of the batch that may start with `page`: enough to know how long its head is. Not verified
    /// but for magic and ranges; [`decode`] does.
    ///
    /// # Errors
    /// 200 `StoreNotFormatted` (no batch here), 206 `StoreCorrupt`.
    pub fn peek(page: &[u8]) -> Result<Self, DiskFormatError> {
        let length = DiskFormatError::Length { found: page.len(), expected: HEADER_SIZE };
        let (raw, _) = RawHeader::ref_from_prefix(page).map_err(|_| length)?;
        if raw.magic != MAGIC {
            return Err(DiskFormatError::Magic);
        }
        check(raw.descriptor_count.get() as usize <= DESCRIPTORS_MAX, "descriptor_count")?;
        check(raw.data_pages.get() as usize <= DATA_PAGES_MAX, "data_pages")?;
        Ok(Self {
            store: StoreId(raw.store.get()),
            position: raw.position.get(),
            previous_end: raw.previous_end.get(),
            flushed: raw.flushed.get(),
            durable: raw.durable.get(),
            session: raw.session.get(),
            descriptor_count: raw.descriptor_count.get(),
            data_pages: raw.data_pages.get(),
        })
    }
}

/// Builds the head of a batch in the caller's buffer: descriptors are put in place, nothing is allocated.
pub struct HeadWriter<'a> {
    out: &'a mut [u8],
    header: BatchHeader,
    descriptors: usize,
    checksums: usize,
}

impl<'a> HeadWriter<'a> {
    /// # Panics
    /// `out` is not [`BatchHeader::head_bytes`] long, or there is more in the batch than a reader takes: our bug.
    pub fn new(header: BatchHeader, out: &'a mut [u8]) -> Self {
        assert!(out.len() == header.head_bytes());
        assert!(header.descriptor_count as usize <= DESCRIPTORS_MAX);
        assert!(header.data_pages as usize <= DATA_PAGES_MAX);
        out.fill(0);
        Self { out, header, descriptors: 0, checksums: 0 }
    }

    /// Adds a record and the checksums of its data.
    ///
    /// # Panics
    /// More than the header says, or checksums that do not fit the record: our bug.
    pub fn push(&mut self, descriptor: &Descriptor, checksums: &[u32]) {
        assert!(self.descriptors < self.header.descriptor_count as usize);
        let count = if descriptor.kind.has_data() { descriptor.pages.count as usize } else { 0 };
        assert!(checksums.len() == count);
        let raw = RawDescriptor {
            kind: descriptor.kind as u8,
            reserved: [0; 3],
            group: descriptor.group.0.into(),
            key: descriptor.key.into(),
            version: descriptor.version.into(),
            previous_first: descriptor.previous_first.into(),
            previous_last: descriptor.previous_last.into(),
            acked: descriptor.acked.0.into(),
            first_page: descriptor.pages.first.into(),
            page_count: descriptor.pages.count.into(),
            data_page: descriptor.data_page.into(),
            start: descriptor.start.into(),
            lost: descriptor.lost.into(),
            padding: [0; 10],
        };
        let at = HEADER_SIZE + self.descriptors * DESCRIPTOR_SIZE;
        self.out[at..at + DESCRIPTOR_SIZE].copy_from_slice(raw.as_bytes());
        let table =
            HEADER_SIZE + self.header.descriptor_count as usize * DESCRIPTOR_SIZE + self.checksums * 4;
        for (checksum, to) in checksums.iter().zip(self.out[table..].chunks_exact_mut(4)) {
            to.copy_from_slice(&checksum.to_le_bytes());
        }
        self.descriptors += 1;
        self.checksums += checksums.len();
    }

    /// Writes the header and seals the head.
    ///
    /// # Panics
    /// Fewer records than the header says: our bug.
    pub fn finish(self) {
        assert!(self.descriptors == self.header.descriptor_count as usize);
        assert!(self.checksums == self.header.data_pages as usize);
        let raw = RawHeader {
            magic: MAGIC,
            checksum: 0.into(),
            version: FORMAT_VERSION.into(),
            reserved: 0.into(),
            store: self.header.store.0.into(),
            position: self.header.position.into(),
            previous_end: self.header.previous_end.into(),
            flushed: self.header.flushed.into(),
            session: self.header.session.into(),
            descriptor_count: self.header.descriptor_count.into(),
            data_pages: self.header.data_pages.into(),
            durable: self.header.durable.into(),
            padding: [0; 56],
        };
        self.out[..HEADER_SIZE].copy_from_slice(raw.as_bytes());
        seal(MAGIC, self.out);
    }
}

/// The head of a batch, verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHead {
    pub header: BatchHeader,
    pub descriptors: Vec<Descriptor>,
    /// CRC32C of each data page.
    pub checksums: Vec<u32>,
}

/// Decodes the head of a batch: exactly its pages.
///
/// # Errors
/// 200 `StoreNotFormatted` (no batch here), 206 `StoreCorrupt`, 208 `FormatUnsupported`.
pub fn decode(head: &[u8]) -> Result<BatchHead, DiskFormatError> {
    let header = BatchHeader::peek(head)?;
    let expected = header.head_bytes();
    if head.len() != expected {
        return Err(DiskFormatError::Length { found: head.len(), expected });
    }
    check_seal(MAGIC, head)?;
    let (raw, rest) = RawHeader::ref_from_prefix(head).expect("peek read it");
    check_version(raw.version.get())?;
    check(raw.reserved.get() == 0 && raw.padding == [0; 56], "reserved")?;
    check_counters(&[raw.position, raw.session], "counters")?;
    check(header.descriptor_count > 0, "descriptor_count")?;
    check(header.position.is_multiple_of(PAGE_SIZE as u64), "position")?;
    check(header.previous_end <= header.position, "previous_end")?;
    check(header.flushed <= header.position, "flushed")?;
    check(header.durable <= header.position, "durable")?;
    let (table, rest) = rest.split_at(header.descriptor_count as usize * DESCRIPTOR_SIZE);
    let (checksums, padding) = rest.split_at(header.data_pages as usize * 4);
    check(padding.iter().all(|byte| *byte == 0), "padding")?;
    let mut data_page = 0;
    let mut descriptors = Vec::with_capacity(header.descriptor_count as usize);
    for raw in <[RawDescriptor]>::ref_from_bytes(table).expect("cut to whole descriptors") {
        let descriptor = raw.decode(data_page)?;
        if descriptor.kind.has_data() {
            data_page += u32::from(descriptor.pages.count);
        }
        descriptors.push(descriptor);
    }
    check(data_page == header.data_pages, "data_pages")?;
    let checksums = checksums.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    Ok(BatchHead { header, descriptors, checksums })
}

impl RawDescriptor {
    /// `data_page`: where the data of this descriptor must start.
    fn decode(&self, data_page: u32) -> Result<Descriptor, DiskFormatError> {
        let kind = match self.kind {
            1 => Kind::Write,
            2 => Kind::Zero,
            3 => Kind::Push,
            4 => Kind::PushZero,
            5 => Kind::Reset,
            6 => Kind::Carry,
            7 => Kind::CarryZero,
            8 => Kind::Carried,
            _ => return Err(DiskFormatError::Field { field: "kind" }),
        };
        check(self.reserved == [0; 3] && self.padding == [0; 10], "descriptor reserved")?;
        let (first, count) = (self.first_page.get(), self.page_count.get());
        let end = usize::from(first) + usize::from(count);
        check(count > 0 && end <= PAGES_PER_BLOCK, "pages")?;
        check(!kind.has_data() || usize::from(count) <= PAGES_PER_WRITE_MAX, "pages")?;
        let pages = PageRange::new(first, count);
        if matches!(kind, Kind::Push | Kind::PushZero) {
            check(usize::from(count) == PAGES_PER_UNIT && pages.covers_unit(pages.first_unit()), "pages")?;
        }
        check(self.data_page.get() == if kind.has_data() { data_page } else { 0 }, "data_page")?;
        check(kind == Kind::Carried || self.start.get() == 0, "start")?;
        check_counters(&[self.start], "start")?;
        check(kind == Kind::Push || self.lost.get() == 0, "lost")?;
        Ok(Descriptor {
            kind,
            group: GroupId(self.group.get()),
            version: self.version.into(),
            acked: Seq(self.acked.get()),
            key: self.key.into(),
            pages,
            previous_first: self.previous_first.into(),
            previous_last: self.previous_last.into(),
            data_page: self.data_page.get(),
            start: self.start.get(),
            lost: self.lost.get(),
        })
    }
}

#[cfg(test)]
mod tests;
