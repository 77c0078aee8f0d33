//! Transcripts: `tests/scripts/*.txt` of the repository, commands at the margin, what node 1 does about them indented below.
//!
//! `UPDATE=1 cargo test -p xsan-dataplane --lib replication::tests::script` rewrites what is indented. The words of the
//! language are explained in `tests/scripts/README.md`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{
    BlockIndex, BlockKey, BootId, Epoch, GroupId, Incarnation, Layer, Lineage, MapVersion, NodeId, PoolId,
    Seq, ShardIndex, StoreId, Version,
};
use xsan_protocol::map::{ClusterMap, Durability, Group, Member, Pool};
use xsan_protocol::units::{PAGE_SIZE, PAGES_PER_UNIT, PageRange, SECTOR_SIZE, UNITS_PER_BLOCK};
use xsan_protocol::wire::header::{Header, Opcode, flags};
use xsan_protocol::wire::replication::{
    BlockDigest, BlockVersions, PeerInfo, PushMeta, UnitChecksums, block_digest,
};
use zerocopy::IntoBytes;

use super::model::ModelStore;
use super::pool;
use crate::disk::buffers::Buffer;
use crate::net::frame::{Frame, Meta};
use crate::replication::frames::{self, KEY_MAX};
use crate::replication::{Action, Operation, Origin, Replication, Reply, Request, RequestId, ScrubOrder};
use crate::store::{Entry, PageData, Record, StoreError, StoreEvent, Withdrawn};

const OWN: NodeId = NodeId(1);
const STORE: StoreId = StoreId(1);
const MS: u64 = 1_000_000;

fn group_id() -> GroupId {
    GroupId::new(PoolId(1), 5)
}

struct Script {
    replication: Replication,
    store: ModelStore,
    incarnation: u64,
    now_ns: u64,
    epoch: Epoch,
    map_version: u64,
    names: Vec<String>,
    /// The last frame of each kind sent to each node: what its answers refer to.
    asked: BTreeMap<(NodeId, u8), Frame>,
    text: String,
    withdrawn: Vec<(GroupId, Withdrawn)>,
}

/// The words of one command after its first.
struct Words<'a> {
    words: Vec<&'a str>,
}

impl<'a> Words<'a> {
    fn named(&self, name: &str) -> Option<&'a str> {
        self.words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    fn has(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.named(name).map(|value| value.parse().unwrap())
    }

    fn nodes(&self, name: &str) -> Vec<u32> {
        let list = self.named(name).unwrap_or_default();
        list.split(',').filter(|part| !part.is_empty()).map(|part| part.parse().unwrap()).collect()
    }

    fn version(&self, name: &str) -> Version {
        self.named(name).map_or(Version::ZERO, version)
    }

    fn key(&self) -> BlockKey {
        let is_block =
            |word: &&&str| word.strip_prefix('b').is_some_and(|index| index.parse::<u32>().is_ok());
        key(self.words.iter().find(is_block).expect("a block"))
    }

    /// `3+2`: pages 3 and 4.
    fn pages(&self) -> PageRange {
        let word = self.words.iter().find(|word| word.contains('+')).expect("pages");
        let (first, count) = word.split_once('+').unwrap();
        PageRange::new(first.parse().unwrap(), count.parse().unwrap())
    }
}

fn key(word: &str) -> BlockKey {
    let index = BlockIndex(word[1..].parse().unwrap());
    BlockKey { lineage: Lineage(7), layer: Layer(1), index }
}

fn version(text: &str) -> Version {
    match text {
        "zero" => return Version::ZERO,
        "unknown" => return Version::UNKNOWN,
        _ => {}
    }
    let (epoch, seq) = text.split_once('.').unwrap();
    Version::new(Epoch(epoch.parse().unwrap()), Seq(seq.parse().unwrap()))
}

fn filled(letter: &str, length: usize) -> Buffer {
    let mut buffer = pool().alloc(length).unwrap();
    buffer.fill(letter.as_bytes()[0]);
    buffer.freeze()
}

/// One letter for all pages, or one for each: `.` is zeroes, and so are those that are left out.
fn pages_of(letters: &str, pages: PageRange) -> PageData {
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
fn content(data: &PageData) -> String {
    let letter = |byte: u8| if byte == 0 { '.' } else { char::from(byte) };
    let page = |bytes: &[u8]| {
        let sectors: String = bytes.chunks(SECTOR_SIZE as usize).map(|sector| letter(sector[0])).collect();
        let same = sectors.chars().all(|sector| sectors.starts_with(sector));
        if same { sectors[..1].to_owned() } else { format!("[{sectors}]") }
    };
    data.bytes.chunks(PAGE_SIZE).map(page).collect()
}

fn place(key: BlockKey, pages: PageRange) -> String {
    format!("b{} {}+{}", key.index, pages.first, pages.count)
}

fn show_entry(entry: &Entry) -> String {
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

fn show_frame(frame: &Frame) -> String {
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
            write!(text, " {shown}").unwrap();
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
        (Opcode::Check, _) => {
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

impl Script {
    fn new() -> Self {
        let mut replication = Replication::new(OWN, Incarnation(1), ShardIndex(0), pool());
        replication.add_store(STORE, Vec::new(), false);
        Self {
            replication,
            store: ModelStore::new(STORE),
            incarnation: 1,
            now_ns: MS,
            epoch: Epoch(0),
            map_version: 0,
            names: vec![String::new()],
            asked: BTreeMap::new(),
            text: String::new(),
            withdrawn: Vec::new(),
        }
    }

    fn say(&mut self, line: &str) {
        self.text.push_str("    ");
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn call(&mut self, act: impl FnOnce(&mut Replication, &ModelStore, u64, &mut Vec<Action>)) {
        let mut out = Vec::new();
        act(&mut self.replication, &self.store, self.now_ns, &mut out);
        self.carry_out_all(out);
    }

    fn carry_out_all(&mut self, out: Vec<Action>) {
        let mut refused = Vec::new();
        for action in out {
            let line = self.carry_out(action, &mut refused);
            self.say(&line);
        }
        if !self.withdrawn.is_empty() {
            let withdrawn = std::mem::take(&mut self.withdrawn);
            self.call(|replication, store, now_ns, out| {
                replication.on_withdrawn(withdrawn, store, now_ns, out);
            });
        }
        for (record, error) in refused {
            self.call(|replication, store, now_ns, out| {
                replication.on_append_refused(STORE, record, error, store, now_ns, out);
            });
        }
    }

    fn carry_out(&mut self, action: Action, refused: &mut Vec<(Record, StoreError)>) -> String {
        match action {
            Action::Send { to, frame } => {
                let line = format!("to {to}: {}", show_frame(&frame));
                self.asked.insert((to, frame.header.opcode as u8), frame);
                line
            }
            Action::Unsend { to, .. } => format!("unsend to {to}"),
            Action::Append { record, .. } => {
                let line = match &record {
                    Record::Entry(entry) => format!("journal {}", show_entry(entry)),
                    Record::Push { key, unit, version, as_of, .. } => {
                        format!("journal unit {unit} of b{}, version {version}, as of {as_of}", key.index)
                    }
                    Record::Reset { last, .. } => format!("journal reset to {last}"),
                };
                match self.store.append(record.clone()) {
                    Ok(()) => line,
                    Err(error) => {
                        refused.push((record, error));
                        format!("{line}, which is refused")
                    }
                }
            }
            Action::Withdraw { group, .. } => {
                let left = self.store.withdraw(group);
                let line = format!("withdraw what comes behind {}", left.last);
                self.withdrawn.push((group, left));
                line
            }
            Action::Apply { group, through, .. } => {
                self.store.apply(group, through);
                format!("apply {through}")
            }
            Action::Read { token, group, key, pages, buffer, .. } => {
                self.store.read(token, group, key, pages, buffer);
                format!("read {}", place(key, pages))
            }
            Action::Flush { token, .. } => {
                self.store.flush(token);
                "flush".to_owned()
            }
            Action::Repair { group, key, pages, data, .. } => {
                self.store.repair(group, key, pages, &data);
                format!("repair {} {}", place(key, pages), content(&data))
            }
            Action::Complete { request, result } => {
                let name = &self.names[request.number as usize];
                match result {
                    Ok(Reply::Done) => format!("answer {name}: done"),
                    Ok(Reply::Data(None)) => format!("answer {name}: nothing is stored"),
                    Ok(Reply::Data(Some(data))) => format!("answer {name}: {}", content(&data)),
                    Ok(Reply::Status(held)) => {
                        let shown: String = held.iter().map(|held| if *held { '#' } else { '.' }).collect();
                        format!("answer {name}: {shown}")
                    }
                    Err(code) => format!("answer {name}: {code:?}"),
                }
            }
            Action::Propose { epoch, node, change, .. } => {
                format!("propose {change:?} of {node} in e{epoch}")
            }
        }
    }

    fn event(&mut self, event: StoreEvent) {
        self.call(|replication, store, now_ns, out| {
            replication.on_store_event(STORE, event, store, now_ns, out)
        });
    }

    fn run(&mut self, line: &str) {
        let mut words = line.split_whitespace();
        let command = words.next().unwrap();
        let words = Words { words: words.collect() };
        let node = || NodeId(words.words[0].parse().unwrap());
        match command {
            "map" => self.map(&words),
            "lease" => {
                let until_ns = self.now_ns + words.words[0].parse::<u64>().unwrap() * MS;
                self.replication.on_lease(until_ns);
            }
            "tick" => {
                self.now_ns += words.words[0].parse::<u64>().unwrap() * MS;
                self.call(|replication, store, now_ns, out| replication.on_tick(now_ns, store, out));
            }
            "durable" => {
                let all = self.store.in_flight();
                let count = words.words.first().map_or(all, |count| count.parse().unwrap());
                for event in self.store.complete(count) {
                    self.event(event);
                }
            }
            "fail" => self.event(StoreEvent::Failed),
            "flushed" => {
                let event = self.store.complete_flush().expect("a flush is under way");
                self.event(event);
            }
            "read-done" => {
                let event = self.store.reads.pop_front().expect("a read is under way");
                self.event(event);
            }
            "damage" => {
                assert!(self.store.damage(group_id(), words.key(), words.pages().first));
            }
            "scrub" => {
                let order = ScrubOrder {
                    group: group_id(),
                    deep: words.has("deep"),
                    number: words.number("number").unwrap_or(0),
                };
                let orders = if words.has("nothing") { Vec::new() } else { vec![order] };
                self.call(|replication, store, now_ns, out| {
                    replication.set_scrubs(1 << 30, orders, store, now_ns, out);
                });
            }
            "scrubbed" => self.scrubbed(),
            "refuse" => {
                self.store.refusing = words.has("journal-full").then_some(StoreError::JournalFull);
                self.store.full = words.has("storage-full");
            }
            "lost" => self
                .call(|replication, store, now_ns, out| replication.on_peer_lost(node(), store, now_ns, out)),
            "up" => self
                .call(|replication, store, now_ns, out| replication.on_peer_up(node(), store, now_ns, out)),
            "gone" => {
                let origin = Origin::Connection(words.words[0].parse().unwrap());
                self.replication.on_origin_gone(origin);
            }
            "restart" => {
                self.incarnation += 1;
                let recovered = self.store.restart(words.has("power"), |_| 0);
                let incarnation = Incarnation(self.incarnation);
                self.replication = Replication::new(OWN, incarnation, ShardIndex(0), pool());
                self.replication.add_store(STORE, recovered, false);
                self.map_version = 0;
            }
            "from" => self.frame(&words),
            _ => self.request(command, &words),
        }
    }

    fn scrubbed(&mut self) {
        let status = self.replication.scrub_status();
        let (what, outcome) = match (status.running, status.outcomes.first()) {
            (Some(running), _) => ("scrubs", running),
            (None, Some(outcome)) => ("scrubbed", *outcome),
            (None, None) => return self.say("nothing is scrubbed"),
        };
        let found = outcome.findings;
        let line = format!(
            "{what}: {} blocks, {} KiB, {} damaged, {} mended, {} lost, {} different, {} rebuilt, {} skipped",
            found.blocks,
            found.bytes / 1024,
            found.damaged_pages,
            found.mended_pages,
            found.lost_pages,
            found.differences,
            found.rebuilt_replicas,
            found.skipped_units
        );
        self.say(&line);
    }

    fn map(&mut self, words: &Words<'_>) {
        self.map_version += 1;
        let mut map = ClusterMap { version: MapVersion(self.map_version), ..ClusterMap::default() };
        let min_replicas = words.number("min").unwrap_or(1) as u8;
        map.pools.insert(PoolId(1), Pool { id: PoolId(1), replica_count: 3, min_replicas, group_count: 256 });
        self.epoch = Epoch(words.number("epoch").unwrap() as u32);
        let own = words.number("incarnation").unwrap_or(self.incarnation);
        let member = |node: u32, learner: bool| Member {
            node: NodeId(node),
            store: StoreId(u64::from(node)),
            incarnation: Incarnation(if node == OWN.0 { own } else { 1 }),
            boot_id: BootId(1),
            learner,
            damaged: false,
        };
        let acting = words.nodes("acting").into_iter().map(|node| member(node, false));
        let learners = words.nodes("learners").into_iter().map(|node| member(node, true));
        let group = Group {
            id: group_id(),
            epoch: self.epoch,
            primary: words.number("primary").map(|node| NodeId(node as u32)),
            members: acting.chain(learners).collect(),
            former: words.nodes("former").into_iter().map(|node| member(node, false)).collect(),
        };
        map.groups.insert(group.id, group);
        let map = Arc::new(map);
        self.call(|replication, store, now_ns, out| replication.on_map(&map, store, now_ns, out));
    }

    fn request(&mut self, command: &str, words: &Words<'_>) {
        let fua = words.has("fua");
        let letter = words.named("fill").unwrap_or("x");
        let operation = match command {
            "read" => Operation::Read { key: words.key(), pages: words.pages() },
            "status" => Operation::BlockStatus { key: words.key(), pages: words.pages() },
            "zero" => Operation::Zero { key: words.key(), pages: words.pages(), fua },
            "write" => {
                let pages = words.pages();
                Operation::Write { key: words.key(), pages, data: pages_of(letter, pages), fua }
            }
            "sectors" => {
                let pages = words.pages();
                let offset = pages.byte_offset() + words.number("sector").unwrap() as u32 * SECTOR_SIZE;
                Operation::WriteSectors {
                    key: words.key(),
                    offset,
                    bytes: filled(letter, SECTOR_SIZE as usize),
                    fua,
                }
            }
            "flush" => Operation::Flush,
            other => panic!("no command {other}"),
        };
        self.names.push(words.words[0].to_owned());
        let id = RequestId {
            origin: Origin::Connection(words.number("session").unwrap_or(1)),
            number: self.names.len() as u64 - 1,
        };
        let epoch = words.number("epoch").map_or(self.epoch, |epoch| Epoch(epoch as u32));
        let durability = if words.has("every") { Durability::EveryWrite } else { Durability::OnFlush };
        let request = Request { id, group: group_id(), epoch, durability, operation };
        self.call(|replication, store, now_ns, out| replication.on_request(request, store, now_ns, out));
    }

    /// `from 2 append-ok 7`: a frame of another node.
    fn frame(&mut self, words: &Words<'_>) {
        let from = NodeId(words.words[0].parse().unwrap());
        let epoch = words.number("epoch").map_or(self.epoch, |epoch| Epoch(epoch as u32));
        let number = || words.words[2].parse::<u64>().unwrap();
        let numbered = |opcode, number| frames::numbered(opcode, group_id(), epoch, number);
        let answered = |opcode: Opcode| self.asked[&(from, opcode as u8)].header;
        let mut frame = match words.words[1] {
            "append-ok" => numbered(Opcode::AppendOk, number()),
            "commit" => numbered(Opcode::Commit, number()),
            "peer" => numbered(Opcode::Peer, 0),
            "member-flush" => numbered(Opcode::MemberFlush, 1),
            "flushed" => numbered(Opcode::MemberFlushReply, answered(Opcode::MemberFlush).request_id),
            "peer-info" => {
                let last = words.version("last");
                let durable = Seq(words.number("durable").unwrap_or(last.seq.0));
                let mut frame = numbered(Opcode::PeerInfo, 0);
                frame.meta = Meta::PeerInfo(PeerInfo {
                    last,
                    durable,
                    acked: Seq(words.number("acked").unwrap_or(0)),
                });
                frame
            }
            word @ ("append" | "fetched") => {
                let opcode = if word == "append" { Opcode::Append } else { Opcode::FetchReply };
                let entry = Self::entry(words);
                frames::of_entry(opcode, &entry, epoch, entry.acked, words.has("stable"))
            }
            "fetch" => {
                let mut frame = numbered(Opcode::Fetch, 0);
                frame.meta = Meta::Fetch(xsan_protocol::wire::replication::FetchMeta {
                    from: Seq(words.number("first").unwrap()),
                    to: Seq(words.number("to").unwrap()),
                });
                frame
            }
            "learn-start" => {
                let attempt = words.number("attempt").unwrap_or(1) as u32;
                frames::learn_start(Opcode::LearnStart, group_id(), epoch, words.version("after"), attempt)
            }
            "learn-started" => {
                let (after, attempt) = frames::learn_start_of(&answered(Opcode::LearnStart));
                frames::learn_start(Opcode::LearnStartReply, group_id(), epoch, after, attempt)
            }
            "compare" => Self::compare(words, epoch),
            "compared" => {
                let mut frame = numbered(Opcode::CompareReply, answered(Opcode::Compare).request_id);
                frame.header.key = KEY_MAX;
                frame.data = Self::versions(words);
                frame
            }
            "push" => {
                let meta = PushMeta {
                    version: words.version("version"),
                    as_of: Seq(words.number("as-of").unwrap()),
                };
                let unit = words.number("unit").unwrap() as u8;
                let data = words.named("fill").map(|letter| pages_of(letter, PageRange::of_unit(unit)));
                frames::push(group_id(), epoch, words.key(), unit, meta, data)
            }
            "pushed" => numbered(Opcode::PushReply, answered(Opcode::Push).request_id),
            "fetch-pages" => {
                let mut frame = numbered(Opcode::FetchPages, 1);
                let pages = words.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (words.key(), pages.byte_offset(), pages.bytes() as u32);
                frame
            }
            "check" => {
                let mut frame = numbered(Opcode::Check, 1);
                let pages = words.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (words.key(), pages.byte_offset(), pages.bytes() as u32);
                frame
            }
            "checked" => Self::checked(words, epoch, &answered(Opcode::Check)),
            "mend" => {
                let mut frame = numbered(Opcode::Mend, 0);
                let pages = words.pages();
                (frame.header.key, frame.header.offset, frame.header.length) =
                    (words.key(), pages.byte_offset(), pages.bytes() as u32);
                let data = pages_of(words.named("fill").unwrap(), pages);
                (frame.data, frame.checksums) = (Some(data.bytes), Some(data.checksums));
                frame
            }
            "pages" => {
                let mut frame = numbered(Opcode::FetchPagesReply, answered(Opcode::FetchPages).request_id);
                let pages = frames::pages_of(&answered(Opcode::FetchPages)).unwrap();
                let data = pages_of(words.named("fill").unwrap_or("x"), pages);
                (frame.data, frame.checksums) = (Some(data.bytes), Some(data.checksums));
                frame
            }
            other => panic!("no frame {other}"),
        };
        if let Some(number) = words.number("status") {
            let code = Code::from_number(number as u16).unwrap();
            frame = Frame::new(frame.header);
            frame.header.status = Some(code);
        }
        self.call(|replication, store, now_ns, out| replication.on_frame(from, frame, store, now_ns, out));
    }

    fn entry(words: &Words<'_>) -> Entry {
        let pages = words.pages();
        Entry {
            group: group_id(),
            version: words.version("version"),
            acked: Seq(words.number("acked").unwrap_or(0)),
            key: words.key(),
            pages,
            data: words.named("fill").map(|letter| pages_of(letter, pages)),
            previous_first: words.version("over"),
            previous_last: words.version("and"),
        }
    }

    /// `compare b1:1.4,zero b3:2.7`: versions of the first units of blocks, sent as digests.
    fn compare(words: &Words<'_>, epoch: Epoch) -> Frame {
        let mut list: Vec<BlockDigest> = blocks_of(words)
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
    fn checked(words: &Words<'_>, epoch: Epoch, asked: &Header) -> Frame {
        let range = frames::pages_of(asked).unwrap();
        let data = pages_of(&format!("{}.", words.named("pages").unwrap()), range);
        let damaged = words.nodes("damaged");
        let versions = words.named("versions").unwrap().split(',').map(version);
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

    fn versions(words: &Words<'_>) -> Option<Buffer> {
        let list: Vec<BlockVersions> =
            blocks_of(words).iter().map(|(key, versions)| BlockVersions::new(*key, versions)).collect();
        (!list.is_empty()).then(|| {
            let mut buffer = pool().alloc(size_of_val(list.as_slice())).unwrap();
            buffer.copy_from_slice(list.as_slice().as_bytes());
            buffer.freeze()
        })
    }
}

fn blocks_of(words: &Words<'_>) -> Vec<(BlockKey, [Version; UNITS_PER_BLOCK])> {
    let blocks = words.words.iter().filter_map(|word| word.split_once(':'));
    let parse = |(name, list): (&str, &str)| {
        let mut versions = [Version::ZERO; UNITS_PER_BLOCK];
        for (unit, text) in list.split(',').enumerate() {
            versions[unit] = version(text);
        }
        (key(name), versions)
    };
    blocks.map(parse).collect()
}

/// Runs a transcript and gives it as it should be.
fn run(transcript: &str) -> String {
    let mut script = Script::new();
    for line in transcript.lines().filter(|line| !line.starts_with("    ")) {
        script.text.push_str(line);
        script.text.push('\n');
        if !line.is_empty() && !line.starts_with('#') {
            script.run(line);
        }
    }
    script.text
}

#[test]
fn what_is_kept_for_late_learners_is_bounded() {
    let mut script = Script::new();
    let lines = [
        "map epoch=1 primary=1 acting=1 learners=3 min=1",
        "lease 100000",
        "durable",
        "write a b5 0+1 fill=a",
        "durable",
        "from 3 learn-started",
        "write b b5 0+1 fill=b",
        "write c b5 0+1 fill=c",
        "durable",
    ];
    lines.iter().for_each(|line| script.run(line));
    let bound = |script: &mut Script, bytes: usize| {
        script.text.clear();
        script.call(|replication, store, now_ns, out| {
            replication.bound_retained(bytes, crate::replication::Learner::is_late, store, now_ns, out);
        });
        script.run("tick 200");
        script.text.contains("unsend to 3")
    };
    assert!(!bound(&mut script, PAGE_SIZE), "for one that is not late all is kept: {}", script.text);
    script.run("tick 500");
    assert!(!bound(&mut script, 4 * PAGE_SIZE), "{}", script.text);
    assert!(bound(&mut script, PAGE_SIZE), "{}", script.text);
    script.run("tick 800");
    assert!(!script.text.contains("LearnStart"), "it is left alone: {}", script.text);
    script.run("tick 200");
    assert!(script.text.contains("LearnStart"), "{}", script.text);
}

#[test]
fn transcripts_are_what_replication_does() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scripts");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("tests/scripts is in the repository")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 10, "transcripts are missing from {}", folder.display());
    let mut wrong = Vec::new();
    for path in paths {
        let before = std::fs::read_to_string(&path).unwrap();
        let after = run(&before);
        if before == after {
            continue;
        }
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(&path, after).unwrap();
            continue;
        }
        let difference = before.lines().zip(after.lines()).position(|(a, b)| a != b);
        let line = difference.unwrap_or(before.lines().count().min(after.lines().count()));
        let at = |text: &str| text.lines().nth(line).unwrap_or("(end)").to_owned();
        wrong.push(format!(
            "{}:{}\n  written: {}\n  happens: {}",
            path.display(),
            line + 1,
            at(&before),
            at(&after)
        ));
    }
    assert!(wrong.is_empty(), "{}\nUPDATE=1 rewrites them", wrong.join("\n"));
}

#[test]
fn a_late_learner_forgets_what_its_device_does_not_take() {
    let mut script = Script::new();
    let lines = [
        "map epoch=1 primary=2 acting=2,3 learners=1 min=2",
        "from 2 learn-start after=1.7",
        "durable",
        "from 2 append version=1.8 b5 0+1 fill=a acked=7",
        "durable",
        "from 2 append version=1.9 b5 1+1 fill=b acked=8",
        "from 2 append version=1.10 b5 2+1 fill=c acked=8",
        "tick 20",
    ];
    lines.iter().for_each(|line| script.run(line));
    let bound = |script: &mut Script, bytes: usize| {
        script.text.clear();
        script.call(|replication, _, now_ns, out| replication.bound_learned(bytes, now_ns, out));
        script.text.contains("withdraw what comes behind 1.8")
    };
    assert!(!bound(&mut script, PAGE_SIZE), "it is not late: {}", script.text);
    script.run("tick 500");
    assert!(!bound(&mut script, 4 * PAGE_SIZE), "it holds little: {}", script.text);
    script.run("from 2 peer");
    assert!(script.text.contains("refused: 6 Busy"), "late, it is told nothing more: {}", script.text);
    assert!(bound(&mut script, PAGE_SIZE), "{}", script.text);
    assert!(script.text.contains("refused"), "the primary learns of it: {}", script.text);
    // It goes on where it was.
    script.run("tick 20");
    script.run("from 2 peer");
    assert!(script.text.contains("PeerInfo e1 last 1.8"), "{}", script.text);
    script.text.clear();
    script.run("from 2 append version=1.9 b5 1+1 fill=b acked=8");
    script.run("durable");
    assert!(script.text.contains("AppendOk e1 9"), "{}", script.text);
}
