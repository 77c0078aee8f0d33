//! `Store::open` on images whose pages were damaged, and what the store then does.
//!
//! An input is a list of edits of a small image, 16 bytes each, so that inputs are short and every one is an edit:
//! which image, then region, operation, page, place and value. Bit 7 of the operation seals the record that the edit
//! hit again (a bug in our own writer, or malice; damage alone never does that).
//!
//! Oracle: opening ends in a store or an error; what the store gives matches its checksums; unless an edit was
//! sealed, it is zero or something that was once written there; what was flushed is there, unless an edit hit the journal, the
//! store says that it is damaged, or the page does not match its checksum; a store that opened opens again; it takes a write,
//! which then is what it returns.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::io::{Device, DiskAction};
use xsan_dataplane::store::{
    Entry, FormatParameters, Options, PageData, ReadError, Record, Recovered, Store, StoreEvent, StoreView,
};
use xsan_dataplane::testing::{Random, SimDevice};
use xsan_protocol::checksum::{crc32c, page_checksums};
use xsan_protocol::disk::journal::BatchHeader;
use xsan_protocol::disk::superblock::Superblock;
use xsan_protocol::disk::{block_record, checkpoint, journal, superblock};
use xsan_protocol::ids::{BlockKey, Epoch, GroupId, NodeId, Seq, StoreId, Version};
use xsan_protocol::units::{PAGE_SIZE, PageRange, UNIT_SIZE};

use super::disk::seal;
use super::wire::key;
use crate::mutate::interesting;
use crate::target::{Form, Known, Target, Verdict};

pub const TARGETS: &[Target] = &[
    Target {
        name: "store-damage",
        what: "a store whose pages rot, are lost, stale or unreadable",
        check: |edits| check(edits, false),
        ..STORE
    },
    Target {
        name: "store-sealed",
        what: "a store with wrong records whose checksums are right",
        check: |edits| check(edits, true),
        known: KNOWN,
        ..STORE
    },
];

const STORE: Target = Target {
    name: "",
    what: "",
    form: Form::Bytes,
    bytes_max: 16 * EDIT_BYTES,
    test_inputs: 250,
    seeds,
    fix,
    check: |_| Ok(Verdict::Refused),
    known: &[],
};

/// Findings in `store`, reported and not mended yet; see docs/testing.md.
const KNOWN: &[Known] = &[];

const EDIT_BYTES: usize = 16;
const GROUPS: [GroupId; 2] = [GroupId(3), GroupId(4)];
const BLOCKS: u32 = 3;
const PAGES: PageRange = PageRange::new(0, 48);
const JOURNAL_BYTES: u64 = 16 << 20;
const DEVICE_BYTES: u64 = 40 << 20;
const PAGE: u64 = PAGE_SIZE as u64;

thread_local! {
    static POOL: &'static BufferPool = BufferPool::anonymous(96 << 20);
    static IMAGES: OnceCell<Vec<Image>> = const { OnceCell::new() };
}

fn pool() -> &'static BufferPool {
    POOL.with(|pool| *pool)
}

/// A store on its device, carried out at once.
struct Rig {
    device: SimDevice,
    store: Store,
    events: Vec<StoreEvent>,
}

impl Rig {
    fn open(device: &SimDevice) -> Result<(Self, Recovered), xsan_dataplane::store::OpenError> {
        let options = Options { cluster_id: Some("fuzz".to_owned()), ..Options::default() };
        let (store, recovered) = Store::open(device, None, pool(), options)?;
        Ok((Self { device: device.clone(), store, events: Vec::new() }, recovered))
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        for _ in 0..100_000 {
            let mut actions = Vec::new();
            self.store.end_turn(&mut actions);
            self.store.take_events(&mut self.events);
            if actions.is_empty() {
                return Ok(());
            }
            for action in actions {
                if let Some((offset, length)) = extent(&action) {
                    ensure!(
                        offset + length <= DEVICE_BYTES,
                        "{length} bytes at {offset} are beyond the device"
                    );
                }
                let mark = self.device.mark();
                self.store.on_disk(self.device.carry_out(action, mark));
            }
        }
        anyhow::bail!("the store does not come to rest")
    }

    fn write(&mut self, group: GroupId, block: BlockKey, pages: PageRange, content: Option<u64>) -> bool {
        let tail = self.store.tail(group);
        let Some(seq) = tail.last.seq.0.checked_add(1) else { return false };
        let entry = Entry {
            group,
            version: Version::new(Epoch(tail.last.epoch.0.max(1)), Seq(seq)),
            acked: tail.acked,
            key: block,
            pages,
            data: content.map(|content| data(content, pages.count)),
            previous_first: Version::ZERO,
            previous_last: Version::ZERO,
        };
        self.store.append(Record::Entry(entry)).is_ok()
    }

    fn write_through(&mut self, group: GroupId, block: u32, pages: PageRange, content: Option<u64>) {
        assert!(self.write(group, key(block), pages, content), "a new store has room");
        self.settle().expect("a new store comes to rest");
        self.store.apply(group, self.store.tail(group).last.seq);
    }

    fn push(&mut self, group: GroupId, block: u32, unit: u8, content: u64) {
        let as_of = self.store.tail(group).last.seq;
        let push = Record::Push {
            token: 1,
            group,
            key: key(block),
            unit,
            version: Version::new(Epoch(2), as_of),
            as_of,
            data: Some(data(content, 16)),
            lost: 0,
        };
        self.store.append(push).expect("a new store has room");
        self.settle().expect("a new store comes to rest");
    }

    fn flush(&mut self) {
        self.store.flush(7);
        self.settle().expect("a new store comes to rest");
    }

    /// Long enough without a write that everything goes to its place.
    fn idle(&mut self, now_ns: u64) -> anyhow::Result<()> {
        self.store.tick(now_ns);
        self.settle()
    }

    /// The pages that could be read and their bytes.
    fn read(
        &mut self,
        group: GroupId,
        block: BlockKey,
        pages: PageRange,
    ) -> anyhow::Result<Vec<(u16, Vec<u8>)>> {
        let buffer = pool().alloc(pages.bytes()).context("the pool is short")?;
        self.store.read(99, group, block, pages, buffer);
        self.settle()?;
        let at = self.events.iter().position(|event| matches!(event, StoreEvent::ReadDone { token: 99, .. }));
        let StoreEvent::ReadDone { result, .. } = self.events.swap_remove(at.context("a read does not end")?)
        else {
            anyhow::bail!("found as such")
        };
        let (buffer, checksums, damaged) = match result {
            Ok(read) => (read.buffer, read.checksums, Vec::new()),
            Err(ReadError::Damaged { buffer, damaged, expected }) => (buffer, expected, damaged),
            Err(ReadError::Failed) => anyhow::bail!("the store has failed on a device that has not"),
        };
        let mut good = Vec::new();
        for (index, bytes) in buffer.chunks_exact(PAGE_SIZE).enumerate() {
            if damaged.contains(&(index as u16)) {
                continue;
            }
            ensure!(crc32c(bytes) == checksums[index], "page {index} of {block} does not match its checksum");
            good.push((pages.first + index as u16, bytes.to_vec()));
        }
        Ok(good)
    }
}

fn extent(action: &DiskAction) -> Option<(u64, u64)> {
    match action {
        DiskAction::Read { offset, buffer, .. } => Some((*offset, buffer.len() as u64)),
        DiskAction::Write { offset, parts, .. } => {
            Some((*offset, parts.iter().map(|part| part.len() as u64).sum()))
        }
        DiskAction::Flush { .. } => None,
    }
}

fn page_bytes(content: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(content.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64).to_le_bytes());
    }
    page
}

/// Pages with contents `first..`.
fn data(first: u64, count: u16) -> PageData {
    let mut buffer = pool().alloc(usize::from(count) * PAGE_SIZE).expect("the pool is large");
    for (content, page) in (first..).zip(buffer.chunks_exact_mut(PAGE_SIZE)) {
        page.copy_from_slice(&page_bytes(content));
    }
    let checksums = page_checksums(&buffer);
    PageData { bytes: buffer.freeze(), checksums }
}

/// Group, block, page and checksum of all that was ever written.
type Written = BTreeSet<(GroupId, u32, u16, u32)>;

/// Checksums of what a page held, the newest last; the first is of what the last flush covered.
type Flushed = BTreeMap<(GroupId, u32, u16), Vec<u32>>;

/// What was done to a store.
#[derive(Default)]
struct Story {
    written: Written,
    flushed: Flushed,
}

impl Story {
    fn note(&mut self, group: GroupId, block: u32, pages: PageRange, content: Option<u64>) {
        for (index, page) in pages.pages().enumerate() {
            let bytes = content.map_or([0; PAGE_SIZE], |content| page_bytes(content + index as u64));
            self.written.insert((group, block, page, crc32c(&bytes)));
            let never_written = || vec![crc32c(&[0; PAGE_SIZE])];
            self.flushed.entry((group, block, page)).or_insert_with(never_written).push(crc32c(&bytes));
        }
    }

    /// From here on only what each page now holds will do, or something newer.
    fn on_flush(&mut self) {
        self.flushed.values_mut().for_each(|contents| drop(contents.drain(..contents.len() - 1)));
    }
}

/// A store to damage.
struct Image {
    device: SimDevice,
    superblock: Superblock,
    story: Story,
    /// Pages of the journal: those that hold the heads of batches, and those behind them.
    heads: Vec<u64>,
    data: Vec<u64>,
}

impl Image {
    /// Writes of all kinds; `stage` 0: all in the journal, 1: all in its place, 2: some of both, cut off and opened once.
    fn make(stage: u32) -> Self {
        let device = SimDevice::new(DEVICE_BYTES);
        let parameters = FormatParameters {
            cluster_id: "fuzz".to_owned(),
            node: NodeId(1),
            store: StoreId(0xabcd),
            created_ns: 1,
            journal_bytes: Some(JOURNAL_BYTES),
        };
        Store::format(&device, None, &parameters, pool()).expect("the device is large enough");
        let (mut rig, _) = Rig::open(&device).expect("a new store opens");
        let mut story = Story::default();
        let mut content = 1000;
        let mut round = |rig: &mut Rig, story: &mut Story| {
            for group in GROUPS {
                for (block, pages) in
                    [(0, PageRange::new(0, 20)), (1, PageRange::new(14, 6)), (0, PageRange::new(3, 1))]
                {
                    content += 100;
                    story.note(group, block, pages, Some(content));
                    rig.write_through(group, block, pages, Some(content));
                }
                story.note(group, 1, PageRange::new(16, 16), None);
                rig.write_through(group, 1, PageRange::new(16, 16), None);
                content += 100;
                story.note(group, 2, PageRange::of_unit(1), Some(content));
                rig.push(group, 2, 1, content);
            }
        };
        round(&mut rig, &mut story);
        rig.flush();
        story.on_flush();
        if stage > 0 {
            rig.idle(20_000_000_000).expect("a new store comes to rest");
        }
        if stage > 1 {
            round(&mut rig, &mut story);
            rig.flush();
            story.on_flush();
            let last = rig.store.tail(GROUPS[1]).last;
            let last = Version::new(Epoch(2), Seq(last.seq.0 + 5));
            rig.store.append(Record::Reset { group: GROUPS[1], last }).expect("a new store has room");
            rig.settle().expect("a new store comes to rest");
            (rig, _) = Rig::open(&device).expect("an undamaged store opens");
            round(&mut rig, &mut story);
        }
        // Entries that are in the journal and not acknowledged.
        for block in 0..2 {
            assert!(
                rig.write(GROUPS[0], key(block), PageRange::new(5, 2), Some(9000)),
                "a new store has room"
            );
            story.note(GROUPS[0], block, PageRange::new(5, 2), Some(9000));
        }
        rig.settle().expect("a new store comes to rest");
        let mut page = vec![0; PAGE_SIZE];
        device.read_at(0, &mut page).expect("a simulated device reads");
        let superblock = Superblock::decode(&page).expect("a new store has a superblock");
        let (mut heads, mut data) = (Vec::new(), Vec::new());
        for offset in (superblock.journal.offset..superblock.journal.end()).step_by(PAGE_SIZE) {
            device.read_at(offset, &mut page).expect("a simulated device reads");
            if page.starts_with(&journal::MAGIC) {
                heads.push(offset);
            } else if page.iter().any(|byte| *byte != 0) {
                data.push(offset);
            }
        }
        Self { device, superblock, story, heads, data }
    }

    /// Device offset of a page of a region, all of whose pages hold something.
    fn offset(&self, region: u8, page: u64) -> u64 {
        let nth = |list: &[u64]| list[(page % list.len() as u64) as usize];
        let within = |start: u64, pages: u64| start + page % pages * PAGE;
        match region % 8 {
            0 => superblock::OFFSETS[0],
            1 => superblock::OFFSETS[1],
            2 => self.superblock.checkpoints.offset,
            3 => self.superblock.checkpoints.offset + checkpoint::SLOT_SIZE as u64,
            4 => nth(&self.heads),
            5 => nth(&self.data),
            6 => within(self.superblock.records.offset, 8 * 4),
            _ => within(self.superblock.units.offset, 8 * (UNIT_SIZE / PAGE_SIZE) as u64),
        }
    }
}

/// One change of an image.
struct Edit<'a> {
    image: u8,
    region: u8,
    operation: u8,
    /// Bits 0 and 1: times it is repeated, on the pages behind; bits 2 and 3: the size of the value, as a power of 2.
    repeat: u8,
    page: u16,
    place: u16,
    value: &'a [u8; 8],
}

const SEALED: u8 = 0x80;

impl<'a> Edit<'a> {
    fn of(bytes: &'a [u8]) -> Option<Self> {
        let (head, value) = bytes.split_first_chunk::<8>()?;
        let [image, region, operation, repeat, page_low, page_high, place_low, place_high] = *head;
        Some(Self {
            image,
            region,
            operation,
            repeat,
            page: u16::from_le_bytes([page_low, page_high]),
            place: u16::from_le_bytes([place_low, place_high]),
            value: value.first_chunk()?,
        })
    }

    fn hits_journal(&self, image: &Image) -> bool {
        let journal = image.superblock.journal;
        let steps = 0..=u64::from(self.repeat % 4);
        let mut places = steps.map(|step| image.offset(self.region, u64::from(self.page) + step));
        places.any(|offset| (journal.offset..journal.end()).contains(&offset))
    }

    /// Damages `device`. Sealed edits seal the record again that holds the page.
    fn apply(&self, image: &Image, device: &SimDevice, may_seal: bool) {
        for step in 0..=u64::from(self.repeat % 4) {
            let offset = image.offset(self.region, u64::from(self.page) + step);
            let mut page = vec![0; PAGE_SIZE];
            if device.read_at(offset, &mut page).is_err() {
                continue;
            }
            let width: usize = 1 << (self.repeat >> 2 & 3);
            // Fields of 8 bytes lie at multiples of 4.
            let at = usize::from(self.place) % (PAGE_SIZE - 4) / width.min(4) * width.min(4);
            match self.operation % 8 {
                0 => page[at] ^= 1 << (self.value[0] % 8),
                1 | 2 => page[at..at + width].copy_from_slice(&self.value[..width]),
                3 => page.fill(self.value[0]),
                4 => {
                    // A misdirected or stale page: what another place of the device has.
                    let from = image.offset(self.value[0], u64::from(self.place));
                    if device.read_at(from, &mut page).is_err() {
                        continue;
                    }
                }
                5 => page[at..].fill(0),
                6 => {
                    device.make_unreadable(offset);
                    continue;
                }
                // A field that is a little more or less than it was.
                _ => {
                    let mut number = [0; 8];
                    number[..width].copy_from_slice(&page[at..at + width]);
                    let step = i64::from(self.value[0].cast_signed()) << (self.value[1] % 16);
                    let number = u64::from_le_bytes(number).wrapping_add_signed(step);
                    page[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
                }
            }
            device.write_page(offset / PAGE, &page);
            if may_seal && self.operation & SEALED != 0 {
                reseal(image, device, offset);
            }
        }
    }
}

/// Seals the record that the page at `offset` belongs to.
fn reseal(image: &Image, device: &SimDevice, offset: u64) {
    let superblock = &image.superblock;
    let within = |extent: superblock::Extent| (extent.offset..extent.end()).contains(&offset);
    let (start, bytes, magic) = if superblock::OFFSETS.contains(&offset) {
        (offset, PAGE_SIZE, superblock::MAGIC)
    } else if within(superblock.checkpoints) {
        (offset, PAGE_SIZE, checkpoint::MAGIC)
    } else if within(superblock.records) {
        let start = offset - (offset - superblock.records.offset) % block_record::RECORD_SIZE as u64;
        (start, block_record::RECORD_SIZE, block_record::MAGIC)
    } else if within(superblock.journal) {
        let mut page = vec![0; PAGE_SIZE];
        let read = device.read_at(offset, &mut page);
        let Some(header) = read.ok().and_then(|()| BatchHeader::peek(&page).ok()) else { return };
        (offset, header.head_bytes(), journal::MAGIC)
    } else {
        return;
    };
    let mut record = vec![0; bytes];
    if device.read_at(start, &mut record).is_ok() {
        seal(&mut record, magic);
        device.write_at(start, &record).expect("a simulated device writes");
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![Vec::new()];
    for image in 0..3_u8 {
        for region in 0..8_u8 {
            // One edit of each kind; mutations do the rest.
            for operation in [0, 1, 3, 4, 6, 7, SEALED | 1, SEALED | 7] {
                let place = 24 + u16::from(region) * 8;
                let mut edit = vec![image, region, operation, 12, operation, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
                edit[6..8].copy_from_slice(&place.to_le_bytes());
                seeds.push(edit);
            }
        }
    }
    seeds
}

/// Makes some of the edits ones that go far: a likely number in the head of a record, mostly sealed.
fn fix(bytes: &mut Vec<u8>, random: &mut Random) {
    bytes.resize(bytes.len().next_multiple_of(EDIT_BYTES).max(EDIT_BYTES), 0);
    // Wrong records pass for right ones when several of their fields agree.
    let (mut region, mut page) = (random.next() as u8, random.next() as u8);
    for edit in bytes.chunks_exact_mut(EDIT_BYTES) {
        if random.one_in(3) {
            continue;
        }
        if random.one_in(3) {
            (region, page) = (random.next() as u8, random.next() as u8);
        }
        // Header, descriptors or units, and now and then a checksum.
        let head_bytes = [128, 320, 1408, PAGE_SIZE as u64][random.index(4)];
        let place = random.below(head_bytes) as u16;
        let value = match random.below(4) {
            0 => random.below(64 << 10) * PAGE,
            1 if random.one_in(2) => 0_u64.wrapping_sub(PAGE << random.below(40)),
            1 => random.below(64),
            _ => interesting(random, 64),
        };
        (edit[1], edit[4]) = (region, page);
        edit[2] =
            [1, 2, 7, 7, random.below(8) as u8][random.index(5)] | if random.one_in(6) { 0 } else { SEALED };
        edit[3] = (random.below(4) as u8) << 2;
        edit[6..8].copy_from_slice(&place.to_le_bytes());
        edit[8..].copy_from_slice(&value.to_le_bytes());
    }
}

fn with_image<T>(number: u8, work: impl FnOnce(&Image) -> T) -> T {
    IMAGES.with(|images| {
        let images = images.get_or_init(|| (0..3).map(Image::make).collect());
        work(&images[usize::from(number) % images.len()])
    })
}

fn check(input: &[u8], may_seal: bool) -> anyhow::Result<Verdict> {
    let edits: Vec<Edit<'_>> = input.chunks_exact(EDIT_BYTES).filter_map(Edit::of).collect();
    with_image(edits.first().map_or(2, |edit| edit.image), |image| {
        let device = image.device.fork();
        for edit in &edits {
            edit.apply(image, &device, may_seal);
        }
        let sealed = may_seal && edits.iter().any(|edit| edit.operation & SEALED != 0);
        let journal_hit = edits.iter().any(|edit| edit.hits_journal(image));
        examine(image, &device, sealed, journal_hit)
    })
}

fn examine(image: &Image, device: &SimDevice, sealed: bool, journal_hit: bool) -> anyhow::Result<Verdict> {
    let (mut rig, recovered) = match Rig::open(device) {
        Ok(opened) => opened,
        Err(error) => {
            ensure!(error.code().number() > 0, "an error without a number");
            return Ok(Verdict::Refused);
        }
    };
    for group in &recovered.groups {
        for entry in &group.pending {
            let Some(data) = &entry.data else { continue };
            ensure!(
                page_checksums(&data.bytes) == data.checksums,
                "pending data does not match its checksums"
            );
        }
    }
    look_at(&mut rig, image, sealed)?;
    if !sealed && !journal_hit && !recovered.damaged {
        has_what_was_flushed(&mut rig, image, &recovered)?;
    }
    // The store goes on: it takes a write, puts it in its place, and has it after the next opening.
    let pages = PageRange::new(30, 3);
    let took = rig.write(GROUPS[0], key(0), pages, Some(77_000));
    rig.settle()?;
    let tail = rig.store.tail(GROUPS[0]).last.seq;
    rig.store.apply(GROUPS[0], tail);
    rig.idle(40_000_000_000)?;
    let (mut rig, again) = Rig::open(device).context("a store that opened does not open again")?;
    ensure!(again.damaged || !recovered.damaged || sealed, "the store has forgotten that it is damaged");
    if took {
        rig.store.apply(GROUPS[0], tail);
        let read = rig.read(GROUPS[0], key(0), pages)?;
        ensure!(read.len() == 3 || again.damaged, "a write after the damage can not be read");
        for (page, bytes) in read {
            let right = bytes == page_bytes(77_000 + u64::from(page - pages.first));
            ensure!(right || again.damaged, "page {page} is not what was written after the damage");
        }
    }
    Ok(Verdict::Accepted)
}

/// The store says that it is whole: then nothing is gone that was flushed. What is pending is there too, it is only not applied.
fn has_what_was_flushed(rig: &mut Rig, image: &Image, recovered: &Recovered) -> anyhow::Result<()> {
    let mut pending: BTreeSet<(GroupId, BlockKey, u16, u32)> = BTreeSet::new();
    for entry in recovered.groups.iter().flat_map(|group| &group.pending) {
        for (index, page) in entry.pages.pages().enumerate() {
            let zeroes = || crc32c(&[0; PAGE_SIZE]);
            let checksum = entry.data.as_ref().map_or_else(zeroes, |data| data.checksums[index]);
            pending.insert((entry.group, entry.key, page, checksum));
        }
    }
    for group in GROUPS {
        for block in 0..BLOCKS {
            for (page, bytes) in rig.read(group, key(block), PAGES)? {
                let Some(contents) = image.story.flushed.get(&(group, block, page)) else { continue };
                let there = contents.contains(&crc32c(&bytes));
                let waits = || {
                    contents.iter().any(|checksum| pending.contains(&(group, key(block), page, *checksum)))
                };
                ensure!(
                    there || waits(),
                    "page {page} of block {block} of group {group} was flushed and is gone, and the store says that it is whole"
                );
            }
        }
    }
    Ok(())
}

/// Reads all there may be.
fn look_at(rig: &mut Rig, image: &Image, sealed: bool) -> anyhow::Result<()> {
    for group in GROUPS {
        for (block, _) in rig.store.blocks_after(group, None, 1000) {
            rig.store.unit_versions(group, block);
            rig.store.locate(group, block);
        }
        for block in 0..BLOCKS {
            for (page, bytes) in rig.read(group, key(block), PAGES)? {
                let is_zero = bytes.iter().all(|byte| *byte == 0);
                let known = is_zero || image.story.written.contains(&(group, block, page, crc32c(&bytes)));
                ensure!(
                    known || sealed,
                    "page {page} of block {block} of group {group} is what nobody wrote there"
                );
            }
        }
    }
    rig.store.status();
    Ok(())
}
