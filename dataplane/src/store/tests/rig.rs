//! A store on simulated devices: carries out its actions one by one, in any order, and can crash between them.

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::ids::{
    BlockIndex, BlockKey, Epoch, GroupId, Layer, Lineage, NodeId, Seq, StoreId, Version,
};
use xsan_protocol::units::{PAGE_SIZE, PageRange};

use crate::disk::buffers::BufferPool;
use crate::io::{Device, DeviceRole, DiskAction};
use crate::store::{
    Entry, FormatParameters, OpenError, Options, PageData, ReadError, ReadPages, Record, Recovered, Refused,
    Store, StoreEvent,
};
use crate::testing::{Random, Sectors, SimDevice, WHOLE};

pub const JOURNAL_BYTES: u64 = 16 << 20;
pub const DEVICE_BYTES: u64 = 64 << 20;

thread_local! {
    static POOL: &'static BufferPool = BufferPool::anonymous(96 << 20);
}

pub fn pool() -> &'static BufferPool {
    POOL.with(|pool| *pool)
}

pub fn key(index: u32) -> BlockKey {
    BlockKey { lineage: Lineage(7), layer: Layer(1), index: BlockIndex(index) }
}

pub fn version(epoch: u32, seq: u64) -> Version {
    Version::new(Epoch(epoch), Seq(seq))
}

/// The bytes of a page with this content number; 0 is zeroes.
pub fn page_bytes(content: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        let value = if content == 0 { 0 } else { content.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64 };
        word.copy_from_slice(&value.to_le_bytes());
    }
    page
}

/// Pages with contents `first..`.
pub fn data(first: u64, count: u16) -> PageData {
    let mut buffer = pool().alloc(usize::from(count) * PAGE_SIZE).expect("the test pool is large");
    for (content, page) in (first..).zip(buffer.chunks_exact_mut(PAGE_SIZE)) {
        page.copy_from_slice(&page_bytes(content));
    }
    let checksums = page_checksums(&buffer);
    PageData { bytes: buffer.freeze(), checksums }
}

/// What is under way, with what a flush would cover.
struct InFlight {
    action: DiskAction,
    mark: u64,
}

pub struct Rig {
    pub capacity: SimDevice,
    pub cache: Option<SimDevice>,
    pub store: Store,
    pub recovered: Recovered,
    in_flight: Vec<InFlight>,
    pub events: Vec<StoreEvent>,
    pub random: Random,
    pub now_ns: u64,
    pub operations: u64,
    pub fail_next_flush: bool,
    /// The next write stays on its way: it never gets to the device.
    pub hold_next_write: bool,
    next_token: u64,
}

pub fn format(capacity: &SimDevice, cache: Option<&SimDevice>) {
    format_with(capacity, cache, JOURNAL_BYTES);
}

fn format_with(capacity: &SimDevice, cache: Option<&SimDevice>, journal_bytes: u64) {
    let parameters = FormatParameters {
        cluster_id: "test".to_owned(),
        node: NodeId(1),
        store: StoreId(0xabcd),
        created_ns: 1,
        journal_bytes: Some(journal_bytes),
    };
    let cache = cache.map(|device| device as &dyn Device);
    Store::format(capacity, cache, &parameters, pool()).unwrap();
}

pub fn open(capacity: &SimDevice, cache: Option<&SimDevice>) -> Result<(Store, Recovered), OpenError> {
    let cache = cache.map(|device| device as &dyn Device);
    let options = Options { cluster_id: Some("test".to_owned()), ..Options::default() };
    Store::open(capacity, cache, pool(), options)
}

impl Rig {
    pub fn new(seed: u64, cached: bool) -> Self {
        Self::with_bytes(seed, cached, DEVICE_BYTES)
    }

    pub fn with_bytes(seed: u64, cached: bool, bytes: u64) -> Self {
        let capacity = SimDevice::new(bytes);
        let cache = cached.then(|| SimDevice::new(JOURNAL_BYTES + (1 << 20)));
        format(&capacity, cache.as_ref());
        Self::on(capacity, cache, seed)
    }

    /// With a larger journal, as real devices have them.
    pub fn with_journal(seed: u64, journal_bytes: u64) -> Self {
        let capacity = SimDevice::new(4 * journal_bytes);
        format_with(&capacity, None, journal_bytes);
        Self::on(capacity, None, seed)
    }

    pub fn on(capacity: SimDevice, cache: Option<SimDevice>, seed: u64) -> Self {
        let (store, recovered) = open(&capacity, cache.as_ref()).expect("the store opens");
        Self {
            capacity,
            cache,
            store,
            recovered,
            in_flight: Vec::new(),
            events: Vec::new(),
            random: Random::new(seed),
            now_ns: 0,
            operations: 0,
            fail_next_flush: false,
            hold_next_write: false,
            next_token: 1,
        }
    }

    fn device(&self, role: DeviceRole) -> &SimDevice {
        match role {
            DeviceRole::Capacity => &self.capacity,
            DeviceRole::Cache => self.cache.as_ref().expect("the store knows its devices"),
        }
    }

    /// Hands the store's actions to the devices.
    pub fn end_turn(&mut self) {
        let mut actions = Vec::new();
        self.store.end_turn(&mut actions);
        for action in actions {
            if matches!(action, DiskAction::Write { .. }) && std::mem::take(&mut self.hold_next_write) {
                continue;
            }
            let mark = match &action {
                DiskAction::Flush { device, .. } => self.device(*device).mark(),
                DiskAction::Read { .. } | DiskAction::Write { .. } => 0,
            };
            self.in_flight.push(InFlight { action, mark });
        }
        self.store.take_events(&mut self.events);
    }

    /// Completes one operation, any of those under way. `false`: there was none.
    pub fn complete_one(&mut self) -> bool {
        if self.in_flight.is_empty() {
            return false;
        }
        let index = self.random.below(self.in_flight.len() as u64) as usize;
        let InFlight { action, mark } = self.in_flight.swap_remove(index);
        self.operations += 1;
        let fails = matches!(action, DiskAction::Flush { .. }) && std::mem::take(&mut self.fail_next_flush);
        let device = self.device(action.device());
        if fails {
            device.fail_next_flush();
        }
        let completion = device.carry_out(action, mark);
        self.store.on_disk(completion);
        self.store.take_events(&mut self.events);
        true
    }

    /// Runs until nothing is under way.
    pub fn settle(&mut self) {
        loop {
            self.end_turn();
            if !self.complete_one() {
                return;
            }
        }
    }

    /// Lets the store think that nothing happens for a while: it destages all.
    pub fn idle(&mut self) {
        self.now_ns += 20_000_000_000;
        self.store.tick(self.now_ns);
        self.settle();
    }

    /// Process killed (or power lost): writes under way land in part, the store is opened anew.
    pub fn crash(mut self, power: bool) -> Self {
        for InFlight { action, .. } in std::mem::take(&mut self.in_flight) {
            self.device(action.device()).clone().tear(&action, &mut self.random);
        }
        if power {
            for device in self.devices() {
                device.lose_power(&mut self.random);
            }
        }
        self.reopen()
    }

    /// The same, and `keep` says of each of the `undecided` pages what of it is there afterwards.
    pub fn crash_into(mut self, power: bool, mut keep: impl FnMut() -> Sectors) -> Self {
        for InFlight { action, .. } in std::mem::take(&mut self.in_flight) {
            self.device(action.device()).clone().tear_but(&action, || if power { WHOLE } else { keep() });
        }
        if power {
            for device in self.devices() {
                device.lose_power_but(&mut keep);
            }
        }
        self.reopen()
    }

    /// Pages of which a crash now decides whether they are there: those of writes under way, and without power all that
    /// are not flushed.
    pub fn undecided(&self, power: bool) -> usize {
        let under_way = self.in_flight.iter().map(|in_flight| SimDevice::pages_written(&in_flight.action));
        let unflushed: usize = self.devices().iter().map(SimDevice::unflushed).sum();
        under_way.sum::<usize>() + if power { unflushed } else { 0 }
    }

    fn devices(&self) -> Vec<SimDevice> {
        [Some(&self.capacity), self.cache.as_ref()].into_iter().flatten().cloned().collect()
    }

    fn reopen(mut self) -> Self {
        let (capacity, cache) = (self.capacity.clone(), self.cache.clone());
        let seed = self.random.next();
        Self { operations: self.operations, ..Self::on(capacity, cache, seed) }
    }

    pub fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Appends a write as the next entry of its group, first version 1.seq.
    pub fn write(&mut self, group: GroupId, block: BlockKey, pages: PageRange, content: u64) -> Version {
        self.try_write(group, block, pages, content).expect("there is room")
    }

    pub fn try_write(
        &mut self,
        group: GroupId,
        block: BlockKey,
        pages: PageRange,
        content: u64,
    ) -> Result<Version, Refused> {
        let bytes = (content != 0).then(|| data(content, pages.count));
        let last = self.store.tail(group).last;
        let version = Version::new(Epoch(last.epoch.0.max(1)), last.seq.next());
        let acked = self.store.tail(group).acked;
        let (previous_first, previous_last) = (Version::ZERO, Version::ZERO);
        let entry =
            Entry { group, version, acked, key: block, pages, data: bytes, previous_first, previous_last };
        self.store.append(Record::Entry(entry))?;
        Ok(version)
    }

    /// Writes, and has it applied.
    pub fn write_through(
        &mut self,
        group: GroupId,
        block: BlockKey,
        pages: PageRange,
        content: u64,
    ) -> Version {
        let version = self.write(group, block, pages, content);
        self.settle();
        self.store.apply(group, version.seq);
        version
    }

    pub fn flush(&mut self) {
        let token = self.token();
        self.store.flush(token);
        self.settle();
        assert!(
            self.events
                .iter()
                .any(|event| matches!(event, StoreEvent::Flushed { token: done } if *done == token))
        );
    }

    pub fn read(
        &mut self,
        group: GroupId,
        block: BlockKey,
        pages: PageRange,
    ) -> Result<ReadPages, ReadError> {
        let token = self.token();
        let buffer = pool().alloc(pages.bytes()).expect("the test pool is large");
        self.store.read(token, group, block, pages, buffer);
        self.settle();
        let position = self
            .events
            .iter()
            .position(|event| matches!(event, StoreEvent::ReadDone { token: done, .. } if *done == token));
        let event = self.events.swap_remove(position.expect("a read ends"));
        let StoreEvent::ReadDone { result, .. } = event else { unreachable!("found as such") };
        result
    }

    /// Reads pages that must be fine, and checks them against content numbers.
    pub fn expect(
        &mut self,
        group: GroupId,
        block: BlockKey,
        pages: PageRange,
        content: impl Fn(u16) -> u64,
    ) {
        let read = self.read(group, block, pages).expect("the pages are undamaged");
        for (page, bytes) in pages.pages().zip(read.buffer.chunks_exact(PAGE_SIZE)) {
            assert!(bytes == page_bytes(content(page)), "{block} page {page} is not {}", content(page));
        }
        assert!(read.checksums == page_checksums(&read.buffer));
    }
}
