//! Transcripts: `tests/scripts/*.txt` of the repository, commands at the margin, what node 1 does about them indented below.
//!
//! `UPDATE=1 cargo test -p xsan-dataplane --lib replication::tests::script` rewrites what is indented. The words of the
//! language are explained in `tests/scripts/README.md`.

mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use words::{Words, content, filled, lost_pages, pages_of, place, show_entry, show_frame};
use xsan_protocol::ids::{
    BootId, Epoch, GroupId, Incarnation, MapVersion, NodeId, PoolId, ShardIndex, StoreId,
};
use xsan_protocol::map::{ClusterMap, Durability, Group, Member, Pool};
use xsan_protocol::units::{PAGE_SIZE, SECTOR_SIZE};

use super::model::ModelStore;
use super::pool;
use crate::net::frame::Frame;
use crate::replication::{Action, Operation, Origin, Replication, Reply, Request, RequestId, ScrubOrder};
use crate::store::{Record, StoreError, StoreEvent, Withdrawn};

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
                    Record::Push { key, unit, version, as_of, lost, .. } => {
                        let lost = lost_pages(*lost);
                        format!(
                            "journal unit {unit} of b{}, version {version}, as of {as_of}{lost}",
                            key.index
                        )
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
            "destage-met" => {
                self.event(StoreEvent::Damaged { group: group_id(), key: words.key(), pages: words.pages() });
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
            "lost" => self.call(|replication, store, now_ns, out| {
                replication.on_peer_lost(node(), &|_| true, store, now_ns, out)
            }),
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
            dropped: words.nodes("dropped").into_iter().map(|node| member(node, false)).collect(),
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
        let frame = words.frame(epoch, |opcode| self.asked[&(from, opcode as u8)].header);
        self.call(|replication, store, now_ns, out| replication.on_frame(from, frame, store, now_ns, out));
    }
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
fn what_was_kept_for_learners_is_not_kept_while_members_are_asked() {
    let begin = [
        "map epoch=1 primary=1 acting=1,2 learners=3 min=1",
        "from 2 peer-info last=zero",
        "lease 100000",
        "durable",
        "from 3 learn-started",
        "write a b5 0+1 fill=a",
        "durable",
        "from 2 append-ok 1",
        "tick 20",
    ];
    let kept_in = |map: &str| {
        let mut script = Script::new();
        begin.iter().chain([&map]).for_each(|line| script.run(line));
        script.run("tick 20");
        script.replication.groups[&group_id()].replica.retained_bytes()
    };
    assert_eq!(kept_in("map epoch=2 primary=1 acting=1,2 learners=3 min=1"), 0);
    assert_ne!(
        kept_in("map epoch=2 primary=1 acting=1,2,3 min=1"),
        0,
        "who acts now may lack what came last"
    );
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
