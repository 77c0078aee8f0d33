//! The language of transcripts: what the words of a command mean, and how frames and entries are shown.

use std::fmt::Write;

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockIndex, BlockKey, Epoch, Layer, Lineage, Seq, Version};
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, SECTOR_SIZE, UNITS_PER_BLOCK};
use xsan_protocol::wire::header::{Header, Opcode, flags};
use xsan_protocol::wire::replication::{
    BlockDigest, BlockVersions, FetchMeta, PeerInfo, PushMeta, UnitChecksums, block_digest,
};
use zerocopy::IntoBytes;

use super::super::pool;
use super::group_id;
use crate::disk::buffers::Buffer;
use crate::net::frame::{Frame, Meta};
use crate::replication::frames::{self, KEY_MAX};
use crate::store::{Entry, PageData};

/// The words of one command after its first.
pub struct Words<'a> {
    pub words: Vec<&'a str>,
}

impl<'a> Words<'a> {
    pub fn named(&self, name: &str) -> Option<&'a str> {
        self.words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    pub fn has(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    pub fn number(&self, name: &str) -> Option<u64> {
        self.named(name).map(|value| value.parse().unwrap())
    }

    pub fn nodes(&self, name: &str) -> Vec<u32> {
        let list = self.named(name).unwrap_or_default();
        list.split(',').filter(|part| !part.is_empty()).map(|part| part.parse().unwrap()).collect()
    }

    pub fn version(&self, name: &str) -> Version {
        self.named(name).map_or(Version::ZERO, version)
    }

    pub fn key(&self) -> BlockKey {
        let is_block =
            |word: &&&str| word.strip_prefix('b').is_some_and(|index| index.parse::<u32>().is_ok());
        key(self.words.iter().find(is_block).expect("a block"))
    }

    /// `3+2`: pages 3 and 4.
    pub fn pages(&self) -> PageRange {
        let word = self.words.iter().find(|word| word.contains('+')).expect("pages");
        let (first, count) = word.split_once('+').unwrap();
        PageRange::new(first.parse().unwrap(), count.parse().unwrap())
    }

    /// The frame that comes; `answered`: the header of the last frame of a kind that was sent to that node.
    pub fn frame(&self, epoch: Epoch, answered: impl Fn(Opcode) -> Header) -> Frame {
        let number = || self.words[2].parse::<u64>().unwrap();
        let numbered = |opcode, number| frames::numbered(opcode, group_id(), epoch, number);
        let mut frame = match self.words[1] {
            "append-ok" => numbered(Opcode::AppendOk, number()),
            "commit" => numbered(Opcode::Commit, number()),
            "peer" => numbered(Opcode::Peer, 0),
            "member-flush" => numbered(Opcode::MemberFlush, 1),
            "flushed" => numbered(Opcode::MemberFlushReply, answered(Opcode::MemberFlush).request_id),
            "peer-info" => {
                let last = self.version("last");
                let durable = Seq(self.number("durable").unwrap_or(last.seq.0));
                let mut frame = numbered(Opcode::PeerInfo, 0);
                frame.meta =
                    Meta::PeerInfo(PeerInfo { last, durable, acked: Seq(self.number("acked").unwrap_or(0)) });
                frame
            }
            word @ ("append" | "fetched") => {
                let opcode = if word == "append" { Opcode::Append } else { Opcode::FetchReply };
                let entry = self.entry();
                frames::of_entry(opcode, &entry, epoch, entry.acked, self.has("stable"))
            }
            "fetch" => {
                let mut frame = numbered(Opcode::Fetch, 0);
                frame.meta = Meta::Fetch(FetchMeta {
                    from: Seq(self.number("first").unwrap()),
                    to: Seq(self.number("to").unwrap()),
                });
                frame
            }
            "learn-start" => {
                let attempt = self.number("attempt").unwrap_or(1) as u32;
                frames::learn_start(Opcode::LearnStart, group_id(), epoch, self.version("after"), attempt)
            }
            "learn-started" => {
                let (after, attempt) = frames::learn_start_of(&answered(Opcode::LearnStart));
                frames::learn_start(Opcode::LearnStartReply, group_id(), epoch, after, attempt)
            }
            "compare" => self.compare(epoch),
            "compared" => {
                let mut frame = numbered(Opcode::CompareReply, answered(Opcode::Compare).request_id);
                frame.header.key = KEY_MAX;
                frame.data = self.versions();
                frame
            }
            "push" => {
                let lost = self.number("lost").map_or(0, |page| 1 << page);
                let meta = PushMeta {
                    version: self.version("version"),
                    as_of: Seq(self.number("as-of").unwrap()),
                    lost,
                };
                let unit = self.number("unit").unwrap() as u8;
                let data = self.named("fill").map(|letter| pages_of(letter, PageRange::of_unit(unit)));
                frames::push(group_id(), epoch, self.key(), unit, meta, data)
            }
            "pushed" => numbered(Opcode::PushReply, answered(Opcode::Push).request_id),
            "fetch-pages" => {
                let mut frame = numbered(Opcode::FetchPages, 1);
                let pages = self.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (self.key(), pages.byte_offset(), pages.bytes() as u32);
                frame
            }
            "check" => {
                let mut frame = numbered(Opcode::Check, 1);
                let pages = self.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (self.key(), pages.byte_offset(), pages.bytes() as u32);
                frame
            }
            "damaged" => {
                let mut frame = numbered(Opcode::Damaged, 0);
                let pages = self.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (self.key(), pages.byte_offset(), pages.bytes() as u32);
                frame
            }
            "checked" => self.checked(epoch, &answered(Opcode::Check)),
            "mend" => {
                let mut frame = numbered(Opcode::Mend, 0);
                let pages = self.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (self.key(), pages.byte_offset(), pages.bytes() as u32);
                let data = pages_of(self.named("fill").unwrap(), pages);
                (frame.data, frame.checksums) = (Some(data.bytes), Some(data.checksums));
                frame
            }
            "pages" => {
                let mut frame = numbered(Opcode::FetchPagesReply, answered(Opcode::FetchPages).request_id);
                let pages = frames::pages_of(&answered(Opcode::FetchPages)).unwrap();
                let data = pages_of(self.named("fill").unwrap_or("x"), pages);
                (frame.data, frame.checksums) = (Some(data.bytes), Some(data.checksums));
                frame
            }
            other => panic!("no frame {other}"),
        };
        if let Some(number) = self.number("status") {
            let code = Code::from_number(number as u16).unwrap();
            frame = Frame::new(frame.header);
            frame.header.status = Some(code);
        }
        frame
    }
    fn entry(&self) -> Entry {
        let pages = self.pages();
        Entry {
            group: group_id(),
            version: self.version("version"),
            acked: Seq(self.number("acked").unwrap_or(0)),
            key: self.key(),
            pages,
            data: self.named("fill").map(|letter| pages_of(letter, pages)),
            previous_first: self.version("over"),
            previous_last: self.version("and"),
        }
    }

    /// `compare b1:1.4,zero b3:2.7`: versions of the first units of blocks, sent as digests.
    fn compare(&self, epoch: Epoch) -> Frame {
        let mut list: Vec<BlockDigest> = self
            .blocks()
            .iter()
            .map(|(key, versions)| BlockDigest::new(*key, block_digest(versions)))
            .collect();
        list.push(BlockDigest::new(KEY_MAX, 0));
        let mut buffer = pool().alloc(size_of_val(list.as_slice())).unwrap();
        buffer.copy_from_slice(list.as_slice().as_bytes());
        let mut frame = frames::numbered(Opcode::Compare, group_id(), epoch, 9);
        frame.data = Some(buffer.freeze());
        frame
    }

    /// `checked versions=1.4,zero pages=ab damaged=1`: what a member answers to the last Check.
    fn checked(&self, epoch: Epoch, asked: &Header) -> Frame {
        let range = frames::pages_of(asked).unwrap();
        let data = pages_of(&format!("{}.", self.named("pages").unwrap()), range);
        let damaged = self.nodes("damaged");
        let versions = self.named("versions").unwrap().split(',').map(version);
        let units = data.checksums.as_chunks::<PAGES_PER_UNIT>().0;
        let list: Vec<UnitChecksums> = versions
            .zip(units)
            .enumerate()
            .map(|(index, (version, checksums))| {
                let first = (index * PAGES_PER_UNIT) as u32;
                let bits =
                    damaged.iter().filter_map(|page| page.checked_sub(first)).filter(|page| *page < 16);
                UnitChecksums::new(version, bits.fold(0, |mask, page| mask | 1 << page), checksums)
            })
            .collect();
        let mut buffer = pool().alloc(size_of_val(list.as_slice())).unwrap();
        buffer.copy_from_slice(list.as_slice().as_bytes());
        let mut frame = frames::numbered(Opcode::CheckReply, group_id(), epoch, asked.request_id);
        frame.data = Some(buffer.freeze());
        frame
    }

    fn versions(&self) -> Option<Buffer> {
        let list: Vec<BlockVersions> =
            self.blocks().iter().map(|(key, versions)| BlockVersions::new(*key, versions)).collect();
        (!list.is_empty()).then(|| {
            let mut buffer = pool().alloc(size_of_val(list.as_slice())).unwrap();
            buffer.copy_from_slice(list.as_slice().as_bytes());
            buffer.freeze()
        })
    }

    fn blocks(&self) -> Vec<(BlockKey, [Version; UNITS_PER_BLOCK])> {
        let blocks = self.words.iter().filter_map(|word| word.split_once(':'));
        let parse = |(name, list): (&str, &str)| {
            let mut versions = [Version::ZERO; UNITS_PER_BLOCK];
            for (unit, text) in list.split(',').enumerate() {
                versions[unit] = version(text);
            }
            (key(name), versions)
        };
        blocks.map(parse).collect()
    }
}

pub fn key(word: &str) -> BlockKey {
    let index = BlockIndex(word[1..].parse().unwrap());
    BlockKey { lineage: Lineage(7), layer: Layer(1), index }
}

pub fn version(text: &str) -> Version {
    match text {
        "zero" => return Version::ZERO,
        "unknown" => return Version::UNKNOWN,
        _ => {}
    }
    let (epoch, seq) = text.split_once('.').unwrap();
    Version::new(Epoch(epoch.parse().unwrap()), Seq(seq.parse().unwrap()))
}

pub fn filled(letter: &str, length: usize) -> Buffer {
    let mut buffer = pool().alloc(length).unwrap();
    buffer.fill(letter.as_bytes()[0]);
    buffer.freeze()
}

/// One letter for all pages, or one for each: `.` is zeroes, and so are those that are left out.
pub fn pages_of(letters: &str, pages: PageRange) -> PageData {
    let bytes = match letters.len() {
        1 => filled(letters, pages.bytes()),
        _ => {
            let mut buffer = pool().alloc(pages.bytes()).unwrap();
            let letters = letters.bytes().chain(std::iter::repeat(b'.'));
            for (page, letter) in buffer.chunks_exact_mut(PAGE_SIZE).zip(letters) {
                page.fill(if letter == b'.' { 0 } else { letter });
            }
            buffer.freeze()
        }
    };
    let checksums = page_checksums(&bytes);
    PageData { bytes, checksums }
}

/// One letter a page; a page of several is shown sector by sector.
pub fn content(data: &PageData) -> String {
    let letter = |byte: u8| if byte == 0 { '.' } else { char::from(byte) };
    let page = |bytes: &[u8]| {
        let sectors: String = bytes.chunks(SECTOR_SIZE as usize).map(|sector| letter(sector[0])).collect();
        let same = sectors.chars().all(|sector| sectors.starts_with(sector));
        if same { sectors[..1].to_owned() } else { format!("[{sectors}]") }
    };
    data.bytes.chunks(PAGE_SIZE).map(page).collect()
}

pub fn place(key: BlockKey, pages: PageRange) -> String {
    format!("b{} {}+{}", key.index, pages.first, pages.count)
}

pub fn show_entry(entry: &Entry) -> String {
    let mut text = format!("{} {}", entry.version, place(entry.key, entry.pages));
    match &entry.data {
        Some(data) => write!(text, " {}", content(data)).unwrap(),
        None => text.push_str(" zeroes"),
    }
    for (name, unit, previous) in [
        ("over", entry.pages.first_unit(), entry.previous_first),
        ("and", entry.pages.last_unit(), entry.previous_last),
    ] {
        let second = name == "and" && entry.pages.first_unit() == entry.pages.last_unit();
        if !second && !entry.pages.covers_unit(unit) {
            write!(text, " {name} {previous}").unwrap();
        }
    }
    text
}

/// Which pages of a unit are lost, if any.
pub fn lost_pages(lost: u16) -> String {
    let pages: Vec<u32> = (0..u16::BITS).filter(|page| lost >> page & 1 == 1).collect();
    if pages.is_empty() { String::new() } else { format!(", lost {pages:?}") }
}

pub fn show_frame(frame: &Frame) -> String {
    let header = &frame.header;
    let mut text = format!("{:?} e{}", header.opcode, header.epoch);
    if let Some(code) = header.status {
        write!(text, " refused: {code:?}").unwrap();
        return text;
    }
    match (header.opcode, frame.meta) {
        (Opcode::Append | Opcode::FetchReply, Meta::Append(meta)) => {
            let entry = frames::entry_of(frame.clone()).unwrap();
            write!(text, " {} acked {}", show_entry(&entry), meta.acked).unwrap();
            if header.flags & flags::FUA != 0 {
                text.push_str(" stable");
            }
        }
        (_, Meta::PeerInfo(info)) => {
            write!(text, " last {} durable {} acked {}", info.last, info.durable, info.acked).unwrap();
        }
        (_, Meta::Fetch(meta)) => write!(text, " {} to {}", meta.from, meta.to).unwrap(),
        (_, Meta::Push(meta)) => {
            let pages = frames::pages_of(header).unwrap();
            write!(text, " {} version {} as of {}", place(header.key, pages), meta.version, meta.as_of)
                .unwrap();
            let data = frame.data.clone().zip(frame.checksums.clone());
            let shown = data
                .map_or("zeroes".to_owned(), |(bytes, checksums)| content(&PageData { bytes, checksums }));
            write!(text, " {shown}{}", lost_pages(meta.lost)).unwrap();
        }
        (Opcode::AppendOk | Opcode::Commit, _) => {
            let full = if header.flags & flags::STORE_FULL != 0 { ", no room" } else { "" };
            write!(text, " {}{full}", header.request_id).unwrap();
        }
        (Opcode::LearnStart | Opcode::LearnStartReply, _) => {
            write!(text, " after {}", frames::learn_start_of(header).0).unwrap();
        }
        (Opcode::Compare, _) => {
            for block in BlockDigest::list(frame.data.as_deref().unwrap()).unwrap() {
                let empty = if block.digest() == 0 { " empty" } else { "" };
                let name =
                    if block.key() == KEY_MAX { "end".to_owned() } else { format!("b{}", block.key().index) };
                write!(text, " {name}{empty}").unwrap();
            }
        }
        (Opcode::CompareReply, _) => {
            let list = BlockVersions::list(frame.data.as_deref().unwrap_or_default()).unwrap();
            if list.is_empty() {
                text.push_str(" nothing differs");
            }
            for block in list {
                write!(text, " b{}:", block.key().index).unwrap();
                for version in &block.versions()[..3] {
                    write!(text, " {version}").unwrap();
                }
            }
        }
        (Opcode::FetchPages, _) => {
            write!(text, " {}", place(header.key, frames::pages_of(header).unwrap())).unwrap();
        }
        (Opcode::FetchPagesReply, _) => {
            let data =
                PageData { bytes: frame.data.clone().unwrap(), checksums: frame.checksums.clone().unwrap() };
            write!(text, " {}", content(&data)).unwrap();
        }
        (Opcode::Check | Opcode::Damaged, _) => {
            write!(text, " {}", place(header.key, frames::pages_of(header).unwrap())).unwrap();
        }
        (Opcode::CheckReply, _) => {
            for unit in UnitChecksums::list(frame.data.as_deref().unwrap()).unwrap() {
                write!(text, " {}", unit.version()).unwrap();
                if unit.damaged() != 0 {
                    write!(text, " damaged {:#b}", unit.damaged()).unwrap();
                }
            }
        }
        (Opcode::Mend, _) => {
            let data =
                PageData { bytes: frame.data.clone().unwrap(), checksums: frame.checksums.clone().unwrap() };
            let pages = frames::pages_of(header).unwrap();
            write!(text, " {} {}", place(header.key, pages), content(&data)).unwrap();
        }
        (Opcode::PushReply, _) => {
            write!(text, " b{} unit {}", header.key.index, header.offset / 65536).unwrap()
        }
        _ => {}
    }
    text
}
