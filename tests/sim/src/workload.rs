//! Clients: each with some operations under way through the gateway of one host, by the rules of `volume::client`.
//!
//! An operation is tried again, with back-off, for as long as its code allows. When its gateway dies nobody knows what
//! became of it, and its client moves to another host.

use std::collections::{BTreeMap, BTreeSet};

use xsan_dataplane::disk::buffers::{Buffer, CLASS_BYTES, Claim};
use xsan_dataplane::replication::Operation;
use xsan_dataplane::store::PageData;
use xsan_dataplane::volume::calls::Answer;
use xsan_protocol::checksum::page_checksums;
use xsan_protocol::error::{Code, Retry};
use xsan_protocol::ids::{BlockIndex, BlockKey, GroupId, Layer, Lineage, PoolId};
use xsan_protocol::map::{Durability, Pool};
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, SECTOR_SIZE};

use crate::check::{Access, SectorRange, fill};
use crate::plan::{MS, Plan, SECOND, US};
use crate::process::data_of;
use crate::world::{Event, TICK, World};

const IO_TIMEOUT: u64 = 30 * SECOND;
/// So long after the last fault no operation may end for its age.
const LATE_AFTER_FAULTS_MAX: u64 = 15 * SECOND;
/// Clients wait for buffers that no request under way and no hanging device holds no longer than this.
const STARVED_TICKS_MAX: u64 = SECOND / TICK;
const BACKOFF_FIRST: u64 = 2 * MS;
const BACKOFF_MAX: u64 = 50 * MS;
pub const POOL: PoolId = PoolId(1);
/// Few enough that writes which wait at a primary that is cut off mostly miss them.
const READ_PAGES: [u16; 4] = [1, 14, 30, 2];
const SECTORS_PER_PAGE: u16 = (PAGE_SIZE / SECTOR_SIZE as usize) as u16;
/// Pages of each block that clients use: two units and a bit, so that ranges cross units.
pub const PAGES_USED: u16 = 36;
/// Blocks that are written at the end where the devices are too small for all of them.
const BLOCKS_WRITTEN_FULL: u32 = 4;
/// Whole units, so that zeroes free them.
const PAGES_ZEROED: u16 = PAGES_USED.next_multiple_of(PAGES_PER_UNIT as u16);

pub struct Workload {
    /// Do clients begin new operations?
    pub running: bool,
    clients: Vec<Client>,
    operations: BTreeMap<u64, UnderWay>,
    next: u64,
    /// Why operations ended without a good answer, and how many.
    pub ended: BTreeMap<String, u64>,
    /// How long a host has had no buffer of so many bytes for its clients.
    starved_ticks: BTreeMap<(usize, usize), u64>,
}

struct Client {
    host: usize,
    under_way: usize,
    /// The page that it reads, if it does nothing else.
    reads: Option<u16>,
}

/// A client operation that has no answer yet.
struct UnderWay {
    client: Option<usize>,
    host: usize,
    kind: Kind,
    started: u64,
    deadline: u64,
    backoff: u64,
    /// How often it was tried.
    tries: u32,
}

enum Kind {
    One {
        group: GroupId,
        operation: Operation,
    },
    /// Groups that no answer covered yet, and calls that have none.
    Flush {
        missing: BTreeSet<GroupId>,
        calls: usize,
        refusal: Code,
    },
}

impl Workload {
    pub fn new(plan: &Plan) -> Self {
        let client = |client: usize| {
            let reads = client.checked_sub(plan.clients).map(|reader| READ_PAGES[reader % READ_PAGES.len()]);
            Client { host: client % plan.nodes, under_way: 0, reads }
        };
        let clients = (0..plan.clients + plan.readers).map(client);
        Self {
            running: false,
            clients: clients.collect(),
            operations: BTreeMap::new(),
            next: 0,
            ended: BTreeMap::new(),
            starved_ticks: BTreeMap::new(),
        }
    }

    /// Does anything go on through a host?
    pub fn uses(&self, host: usize) -> bool {
        self.operations.values().any(|under_way| under_way.host == host)
    }

    /// The operation that waits the longest, in words; `None` when there is none.
    pub fn oldest(&self) -> Option<String> {
        let (number, oldest) = self.operations.iter().next()?;
        let what = match &oldest.kind {
            Kind::One { group, operation } => format!("{} in group {group}", name(operation)),
            Kind::Flush { missing, .. } => format!("flush, {} groups missing", missing.len()),
        };
        Some(format!("operation {number} through host {} waits: {what}", oldest.host))
    }
}

const fn name(operation: &Operation) -> &'static str {
    match operation {
        Operation::Read { .. } => "read",
        Operation::Write { .. } => "write",
        Operation::WriteSectors { .. } => "sub-page write",
        Operation::Zero { .. } => "write-zeroes",
        Operation::BlockStatus { .. } => "block status",
        Operation::Flush => "flush",
    }
}

pub fn key(block: u32) -> BlockKey {
    BlockKey { lineage: Lineage(1), layer: Layer(0), index: BlockIndex(block) }
}

impl World {
    pub fn start_clients(&mut self) {
        for client in 0..self.workload.clients.len() {
            self.after(1 + client as u64, Event::Client { client });
        }
    }

    /// A client looks for something to do.
    pub fn client(&mut self, client: usize) {
        let least = if self.workload.running { 50 * US } else { 5 * MS };
        let wait = self.plan.think_ns / 2 + self.random.below(self.plan.think_ns + least);
        self.after(wait, Event::Client { client });
        let idle = self.workload.clients[client].under_way < self.plan.depth;
        if !self.workload.running || !idle {
            return;
        }
        let Client { host, reads, .. } = self.workload.clients[client];
        let stays = self.present().any(|present| present == host) && !self.leaves(host);
        if self.hosts[host].process.is_none() || !stays || (reads.is_none() && self.random.one_in(500)) {
            self.workload.clients[client].host = self.some_host();
            return;
        }
        let operation = match reads {
            Some(page) => {
                let key = key(self.block_led_by(host, client));
                Some(Operation::Read { key, pages: PageRange::new(page, 1) })
            }
            None => self.random_operation(host),
        };
        if let Some(operation) = operation {
            self.workload.clients[client].under_way += 1;
            self.submit_operation(Some(client), host, operation);
        }
    }

    /// The first block from the `client`th on of a group that the host leads, as far as it knows; if there is none, that one.
    fn block_led_by(&self, host: usize, client: usize) -> u32 {
        let count = self.plan.blocks;
        let mut blocks = (0..count).map(|block| (block + client as u32) % count);
        let leads = |block: &u32| {
            let key = key(*block);
            let group = Pool::group_in(POOL, self.plan.group_count, key.lineage, key.index);
            let route = self.hosts[host].process.as_ref().and_then(|process| process.map.route(group));
            route.is_some_and(|(node, ..)| node == self.hosts[host].node)
        };
        blocks.find(leads).unwrap_or(client as u32 % count)
    }

    fn random_pages(&mut self) -> PageRange {
        let starts = [0, 1, 2, 13, 14, 15, 16, 30];
        let first = starts[self.random.index(starts.len())];
        match self.random.below(10) {
            0 => PageRange::new(0, 16),
            1 => PageRange::new(first, 4),
            2 => PageRange::new(0, PAGES_USED),
            _ => PageRange::new(first, 1 + self.random.below(2) as u16),
        }
    }

    /// `None`: a gateway that has no buffers stops reading its clients.
    fn buffer(&mut self, host: usize, sectors: SectorRange, value: u64) -> Option<Buffer> {
        let pool = self.hosts[host].pool;
        let bytes = usize::from(sectors.count) * SECTOR_SIZE as usize;
        let Some(mut buffer) = pool.alloc_for(Claim::Client, bytes) else {
            self.workload.starved_ticks.entry((host, bytes)).or_insert(0);
            return None;
        };
        fill(&mut buffer, sectors, value);
        Some(buffer.freeze())
    }

    /// Looks for buffers that clients of a host wait for.
    pub fn watch_starved(&mut self, host: usize) {
        let waiting = self.workload.starved_ticks.range((host, 0)..(host + 1, 0));
        let waiting: Vec<usize> = waiting.map(|((_, bytes), _)| *bytes).collect();
        // What a device has been handed can not be taken back from it, and what comes behind waits in order.
        let hangs = self.hosts[host].device_hangs(self.now);
        for bytes in waiting {
            let lacks = self.lacks_buffers(host, bytes);
            let entry = self.workload.starved_ticks.entry((host, bytes));
            let ticks = *entry.and_modify(|ticks| *ticks += u64::from(!hangs)).or_default();
            if !lacks {
                self.workload.starved_ticks.remove(&(host, bytes));
            } else if ticks > STARVED_TICKS_MAX {
                let free = self.hosts[host].pool.occupancy();
                let what =
                    format!("clients of host {host} wait for buffers of {bytes} bytes: {free:?} are free");
                self.ledger.violation = Some(what);
            }
        }
    }

    /// Would clients have to wait for a buffer even if all requests under way let go of what they hold here?
    fn lacks_buffers(&self, host: usize, bytes: usize) -> bool {
        let Some(process) = &self.hosts[host].process else { return false };
        let leads = |group| process.map.route(group).is_some_and(|(node, ..)| node == self.hosts[host].node);
        let mut requests = [0; CLASS_BYTES.len()];
        for under_way in self.workload.operations.values() {
            let Kind::One { group, operation } = &under_way.kind else { continue };
            let held = match operation {
                Operation::Write { data, .. } => data.bytes.len(),
                Operation::WriteSectors { bytes, .. } => bytes.len(),
                Operation::Read { pages, .. } => pages.bytes(),
                _ => continue,
            };
            if under_way.host == host || leads(*group) {
                requests[CLASS_BYTES.partition_point(|class| *class < held)] += 1;
            }
        }
        let free = self.hosts[host].pool.occupancy();
        // Half of each class is never for clients.
        let fits = |class: usize| 2 * (free[class].0 + requests[class]) > free[class].1;
        !(0..CLASS_BYTES.len()).any(|class| CLASS_BYTES[class] >= bytes && fits(class))
    }

    fn random_operation(&mut self, host: usize) -> Option<Operation> {
        let block = self.random.below(u64::from(self.plan.blocks)) as u32;
        let (key, pages) = (key(block), self.random_pages());
        let fua = self.random.one_in(8) && self.plan.fua;
        let operation = match self.random.below(12) {
            0..4 => Operation::Read { key, pages },
            4 => Operation::Zero { key, pages, fua },
            5 => Operation::Flush,
            6..8 => {
                let count = 1 + self.random.below(3) as u16;
                let first = pages.first * SECTORS_PER_PAGE + self.random.below(6) as u16;
                self.sector_write(host, SectorRange { block, first, count }, fua)?
            }
            _ => self.page_write(host, block, pages, fua)?,
        };
        Some(operation)
    }

    fn page_write(&mut self, host: usize, block: u32, pages: PageRange, fua: bool) -> Option<Operation> {
        let bytes = self.buffer(host, sectors_of(block, pages), self.workload.next + 1)?;
        let checksums = page_checksums(&bytes);
        Some(Operation::Write { key: key(block), pages, data: PageData { bytes, checksums }, fua })
    }

    fn sector_write(&mut self, host: usize, sectors: SectorRange, fua: bool) -> Option<Operation> {
        let bytes = self.buffer(host, sectors, self.workload.next + 1)?;
        let offset = u32::from(sectors.first) * SECTOR_SIZE;
        Some(Operation::WriteSectors { key: key(sectors.block), offset, bytes, fua })
    }

    /// Takes an operation up: notes that it began, and tries it.
    pub fn submit_operation(&mut self, client: Option<usize>, host: usize, operation: Operation) {
        self.workload.next += 1;
        let number = self.workload.next;
        let access = access_of(&operation, number, self.plan.every_write);
        self.ledger.begin(number, access);
        let kind = match operation {
            Operation::Flush => {
                let groups = self.control.state.map().pools.get(&POOL).map(Pool::groups);
                let missing = groups.into_iter().flatten().collect();
                Kind::Flush { missing, calls: 0, refusal: Code::GroupInactive }
            }
            operation => {
                let key = operation.key().expect("only a flush has none");
                let group = Pool::group_in(POOL, self.plan.group_count, key.lineage, key.index);
                Kind::One { group, operation }
            }
        };
        let under_way = UnderWay {
            client,
            host,
            kind,
            started: self.now,
            deadline: self.now + IO_TIMEOUT,
            backoff: BACKOFF_FIRST,
            tries: 0,
        };
        self.workload.operations.insert(number, under_way);
        self.try_operation(number);
    }

    pub fn try_operation(&mut self, number: u64) {
        let Some(under_way) = self.workload.operations.get_mut(&number) else { return };
        let host = under_way.host;
        under_way.tries += 1;
        match &mut under_way.kind {
            Kind::One { group, operation } => {
                let (group, operation) = (*group, operation.clone());
                let every_write = self.plan.every_write;
                let durability = if every_write { Durability::EveryWrite } else { Durability::OnFlush };
                if self.start_call(host, number, group, durability, operation).is_none() {
                    self.refused(number, Code::GroupInactive);
                }
            }
            Kind::Flush { missing, .. } => {
                let missing = missing.clone();
                let asked = self.start_flushes(host, number, POOL, &missing);
                let under_way = self.workload.operations.get_mut(&number).expect("it was there above");
                if let Kind::Flush { calls, .. } = &mut under_way.kind {
                    *calls = asked;
                }
                if asked == 0 {
                    self.refused(number, Code::GroupInactive);
                }
            }
        }
    }

    /// One call of operation `number` was answered.
    pub fn on_answer(&mut self, number: u64, result: Result<Answer, Code>) {
        let Some(under_way) = self.workload.operations.get_mut(&number) else { return };
        match (&mut under_way.kind, result) {
            (Kind::One { group, .. }, Ok(Answer::Reply(reply))) => {
                let (group, data) = (*group, data_of(reply));
                let acknowledged = self.acknowledged(&self.control.state.map().groups[&group]);
                let known = self.acknowledged.entry(group).or_default();
                *known = acknowledged.max(*known);
                self.end(number, |ledger, repeated| {
                    ledger.answered(number, data.as_ref().map(|data| &data.bytes[..]), repeated);
                });
            }
            (Kind::One { .. }, Err(code)) => self.refused(number, code),
            (Kind::Flush { missing, calls, refusal }, result) => {
                match result {
                    Ok(Answer::Flushed(covered)) => covered.iter().for_each(|group| {
                        missing.remove(group);
                    }),
                    Ok(Answer::Reply(_)) => {}
                    Err(code) => *refusal = code,
                }
                *calls -= 1;
                if *calls > 0 {
                    return;
                }
                let (done, refusal) = (missing.is_empty(), *refusal);
                if done {
                    self.end(number, |ledger, repeated| ledger.answered(number, None, repeated));
                } else {
                    self.refused(number, refusal);
                }
            }
            (Kind::One { .. }, Ok(Answer::Flushed(_))) => unreachable!("only a flush is answered so"),
        }
    }

    /// A try failed: another follows, or the operation ends with the code.
    fn refused(&mut self, number: u64, code: Code) {
        let Some(under_way) = self.workload.operations.get_mut(&number) else { return };
        let late = self.now >= under_way.deadline;
        if code.retry() == Retry::Never || late {
            self.log(|| format!("operation {number} ends with {code}"));
            *self.workload.ended.entry(code.to_string()).or_default() += 1;
            let excused = match code {
                Code::StorageFull => self.plan.is_full(),
                _ => late && self.now < self.faults_end.saturating_add(LATE_AFTER_FAULTS_MAX),
            };
            if !excused {
                self.ledger.violation = Some(format!("operation {number} ends with {code}"));
            }
            return self.end(number, |ledger, repeated| ledger.lost(number, repeated));
        }
        let wait = under_way.backoff;
        under_way.backoff = (wait * 2).min(BACKOFF_MAX);
        self.after(wait, Event::Retry { operation: number });
    }

    fn end(&mut self, number: u64, note: impl FnOnce(&mut crate::check::Ledger, bool)) {
        let Some(under_way) = self.workload.operations.remove(&number) else { return };
        note(&mut self.ledger, under_way.tries > 1);
        let took = self.now - under_way.started;
        self.ledger.longest_ns = self.ledger.longest_ns.max(took);
        if let Some(client) = under_way.client {
            self.workload.clients[client].under_way -= 1;
        }
    }

    /// The gateway of a host is gone, and with it what was under way through it.
    pub fn lose_operations(&mut self, host: usize) {
        self.workload.starved_ticks.retain(|(starved, _), _| *starved != host);
        let lost: Vec<u64> = self
            .workload
            .operations
            .iter()
            .filter(|(_, under_way)| under_way.host == host)
            .map(|(number, _)| *number)
            .collect();
        for number in lost {
            self.end(number, |ledger, repeated| ledger.lost(number, repeated));
        }
    }

    /// Zeroes every `nth` block.
    pub fn free(&mut self, nth: usize) {
        for block in (0..self.plan.blocks).step_by(nth) {
            let host = self.some_host();
            let pages = PageRange::new(0, PAGES_ZEROED);
            self.submit_operation(None, host, Operation::Zero { key: key(block), pages, fua: false });
        }
    }

    /// Writes to every block, in all the ways there are, without anything else going on. Where the devices are too small for all,
    /// everything is zeroed first, and some are written.
    pub fn write_everything(&mut self) -> Result<(), String> {
        self.ledger.rest();
        let mut blocks = 0..self.plan.blocks;
        if self.plan.is_full() {
            self.free(1);
            self.run_until(60 * SECOND, Self::is_quiet)?;
            self.check_destage()?;
            blocks.end = blocks.end.min(BLOCKS_WRITTEN_FULL);
        }
        let (answered, mut writes) = (self.ledger.answered, 0);
        for block in blocks {
            let host = self.some_host();
            let sectors = SectorRange { block, first: 5 * SECTORS_PER_PAGE + 3, count: 2 };
            // Each has the next number as its value, so one is made when the one before has been submitted.
            for step in 0..4 {
                let operation = match step {
                    0 => self.page_write(host, block, PageRange::new(1, 3), false),
                    1 => self.sector_write(host, sectors, true),
                    2 => Some(Operation::Zero { key: key(block), pages: PageRange::new(8, 2), fua: false }),
                    _ => Some(Operation::Flush),
                };
                let operation = operation.ok_or("a client has no buffer while nothing goes on")?;
                self.submit_operation(None, host, operation);
                writes += 1;
            }
            self.run_until(60 * SECOND, Self::is_quiet)?;
        }
        let written = self.ledger.answered - answered;
        if written < writes {
            return Err(format!("of {writes} writes and flushes without faults {written} were answered"));
        }
        Ok(())
    }

    /// Reads every page that clients use, without anything else going on.
    pub fn read_everything(&mut self) -> Result<(), String> {
        self.ledger.rest();
        let answered = self.ledger.answered;
        let mut reads = 0;
        for block in 0..self.plan.blocks {
            let host = self.some_host();
            for first in (0..PAGES_ZEROED).step_by(12) {
                reads += 1;
                let pages = PageRange::new(first, 12);
                self.submit_operation(None, host, Operation::Read { key: key(block), pages });
            }
        }
        self.run_until(60 * SECOND, World::is_quiet)?;
        let read = self.ledger.answered - answered;
        if read < reads {
            return Err(format!("of {reads} reads without faults {read} were answered"));
        }
        self.ledger.everything_was_read()
    }
}

const fn sectors_of(block: u32, pages: PageRange) -> SectorRange {
    SectorRange { block, first: pages.first * SECTORS_PER_PAGE, count: pages.count * SECTORS_PER_PAGE }
}

/// What the checker is to know of an operation.
fn access_of(operation: &Operation, value: u64, every_write: bool) -> Access {
    let pages_of = |key: &BlockKey, pages: &PageRange| sectors_of(key.index.0, *pages);
    match operation {
        Operation::Read { key, pages } => Access::Read(pages_of(key, pages)),
        Operation::Write { key, pages, fua, .. } => {
            Access::Write { sectors: pages_of(key, pages), value, durable: *fua || every_write }
        }
        Operation::Zero { key, pages, fua } => {
            Access::Write { sectors: pages_of(key, pages), value: 0, durable: *fua || every_write }
        }
        Operation::WriteSectors { key, offset, bytes, fua } => {
            let sectors = SectorRange {
                block: key.index.0,
                first: (*offset / SECTOR_SIZE) as u16,
                count: (bytes.len() / SECTOR_SIZE as usize) as u16,
            };
            Access::Write { sectors, value, durable: *fua || every_write }
        }
        Operation::Flush => Access::Flush,
        Operation::BlockStatus { .. } => unreachable!("clients of the simulation do not ask for it"),
    }
}
