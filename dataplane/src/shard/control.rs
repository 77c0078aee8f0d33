//! Shard 0's side of the link: what the data process tells the control process and what it is told.
//!
//! Used by the shard's turn. Other shards reach it by messages. Knows no group, store or socket: questions
//! are put to every shard and their reports are put together here.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockIndex, BlockKey, GroupId, Layer, Lineage, MapVersion, ShardIndex, VolumeId};
use xsan_protocol::map::{ClusterMap, Volume};
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::proto::{self, LinkMessage};

use super::link::{LinkEvent, LinkSender};
use super::message::{Message, Question, Report};
use crate::replication::ScrubOrder;
use crate::stats::Stats;

/// What the shard is to do after a link event.
pub enum Outcome {
    Nothing,
    /// Put this question to every shard; their reports come back with `number`.
    Ask {
        number: u64,
        question: Question,
    },
    /// A newer map, for every shard.
    Map(Arc<ClusterMap>),
    /// What is to be scrubbed, for every shard.
    Scrub {
        bytes_per_second: u64,
        orders: Arc<[ScrubOrder]>,
    },
    /// Messages for shards.
    Tell(Vec<(ShardIndex, Message)>),
}

/// A question that shards are answering.
struct Asked {
    /// The control process's request; `None` for the regular status.
    request_id: Option<u64>,
    waiting: usize,
    reports: Vec<Report>,
}

/// An open that the control process has not answered.
struct Open {
    shard: ShardIndex,
    number: u64,
    name: String,
}

/// A volume that is attached, and given to its client once nothing is under way of clients of this node that are gone: it may
/// be one of them, which asks for the same again and then for something else.
struct Sweep {
    /// Shards that have not answered.
    waiting: usize,
    shard: ShardIndex,
    opened: Message,
}

pub struct Control {
    link: LinkSender,
    shard_count: usize,
    cluster_id: Rc<str>,
    lease_until_ns: Arc<AtomicU64>,
    next_number: u64,
    opens: HashMap<u64, Open>,
    /// Sessions of every shard, by volume. The control process learns it from each status: it may be another one by then.
    sessions: BTreeMap<VolumeId, u32>,
    asked: HashMap<u64, Asked>,
    sweeps: HashMap<u64, Sweep>,
}

impl Control {
    pub fn new(
        link: LinkSender,
        shard_count: usize,
        cluster_id: Rc<str>,
        lease_until_ns: Arc<AtomicU64>,
    ) -> Self {
        let (opens, asked, sessions) = (HashMap::new(), HashMap::new(), BTreeMap::new());
        let (next_number, sweeps) = (1, HashMap::new());
        Self { link, shard_count, cluster_id, lease_until_ns, next_number, opens, sessions, asked, sweeps }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn send(&self, request_id: u64, body: Body) -> bool {
        self.link.send(LinkMessage { request_id, body: Some(body) })
    }

    /// A message that only shard 0 takes.
    pub fn on_message(&mut self, from: ShardIndex, message: Message) -> Outcome {
        match message {
            Message::Open { number, name } => {
                let request_id = self.number();
                if self.send(request_id, Body::OpenVolume(proto::OpenVolume { name: name.clone() })) {
                    self.opens.insert(request_id, Open { shard: from, number, name });
                } else {
                    return Outcome::Tell(vec![(
                        from,
                        Message::Opened { number, result: Err(Code::NoQuorum) },
                    )]);
                }
            }
            Message::Close(volume) => self.close(volume),
            Message::Swept(number) => return self.swept(number),
            Message::Propose(proposals) => {
                // Lost while the link is down: primaries propose again until the map changes.
                self.send(0, Body::Proposals(proto::GroupProposals { proposals }));
            }
            Message::Report { number, report } => self.on_report(number, *report),
            Message::StatusDue => return self.ask_status(),
            other => unreachable!("{other:?} is taken by every shard"),
        }
        Outcome::Nothing
    }

    /// Starts the regular status.
    pub fn ask_status(&mut self) -> Outcome {
        self.ask(None, Question::Status)
    }

    fn ask(&mut self, request_id: Option<u64>, question: Question) -> Outcome {
        let number = self.number();
        self.asked.insert(number, Asked { request_id, waiting: self.shard_count, reports: Vec::new() });
        Outcome::Ask { number, question }
    }

    pub fn on_link(&mut self, event: LinkEvent) -> Outcome {
        match event {
            LinkEvent::Down => {
                let lost = self.opens.drain().map(|(_, open)| {
                    (open.shard, Message::Opened { number: open.number, result: Err(Code::NoQuorum) })
                });
                Outcome::Tell(lost.collect())
            }
            LinkEvent::Message(message) => self.on_link_message(message),
        }
    }

    fn on_link_message(&mut self, message: LinkMessage) -> Outcome {
        let request_id = message.request_id;
        match message.body {
            Some(Body::Lease(lease)) => {
                self.lease_until_ns.store(lease.until_boottime_ns, Ordering::Release);
                Outcome::Nothing
            }
            Some(Body::Map(map)) => match ClusterMap::try_from(map) {
                Ok(map) => Outcome::Map(Arc::new(map)),
                Err(error) => {
                    tracing::error!(code = %error.code(), %error, "the control process sent a map that is not valid; the old one stays");
                    Outcome::Nothing
                }
            },
            Some(Body::Welcome(welcome)) => {
                assert!(*welcome.cluster_id == *self.cluster_id, "both processes read one node.json");
                Outcome::Nothing
            }
            Some(Body::OpenVolumeReply(reply)) => {
                let result = reply
                    .volume
                    .ok_or(Code::FrameInvalid)
                    .and_then(|volume| Volume::try_from(volume).map_err(|error| error.code()));
                let version = MapVersion(reply.map_version);
                self.opened(request_id, result.map(|volume| Box::new((volume, version))))
            }
            Some(Body::Error(error)) => {
                let code =
                    u16::try_from(error.code).ok().and_then(Code::from_number).unwrap_or(Code::Internal);
                self.opened(request_id, Err(code))
            }
            Some(Body::ScrubOrders(wanted)) => {
                let order = |order: &proto::ScrubOrder| ScrubOrder {
                    group: GroupId(order.group),
                    deep: order.deep,
                    number: order.number,
                };
                let orders = wanted.orders.iter().map(order).collect();
                Outcome::Scrub { bytes_per_second: wanted.bytes_per_second, orders }
            }
            Some(Body::PerfStatsRequest(_)) => self.ask(Some(request_id), Question::Perf),
            Some(Body::BlockQuery(query)) => {
                let Ok(index) = u32::try_from(query.block_index) else { return Outcome::Nothing };
                let key = BlockKey {
                    lineage: Lineage(query.lineage),
                    layer: Layer(query.layer),
                    index: BlockIndex(index),
                };
                self.ask(Some(request_id), Question::Block { group: GroupId(query.group), key })
            }
            other => {
                tracing::warn!(?other, "a link message that a data process does not take");
                Outcome::Nothing
            }
        }
    }

    fn opened(&mut self, request_id: u64, result: Result<Box<(Volume, MapVersion)>, Code>) -> Outcome {
        let Some(Open { shard, number, .. }) = self.opens.remove(&request_id) else {
            return Outcome::Nothing;
        };
        let attached = result.as_ref().ok().map(|opened| opened.0.id);
        let opened = Message::Opened { number, result };
        let Some(volume) = attached else { return Outcome::Tell(vec![(shard, opened)]) };
        *self.sessions.entry(volume).or_default() += 1;
        let number = self.number();
        self.sweeps.insert(number, Sweep { waiting: self.shard_count, shard, opened });
        let shards = (0..self.shard_count).map(|shard| ShardIndex(shard as u16));
        Outcome::Tell(shards.map(|shard| (shard, Message::Sweep { number, volume })).collect())
    }

    fn swept(&mut self, number: u64) -> Outcome {
        let Some(sweep) = self.sweeps.get_mut(&number) else { return Outcome::Nothing };
        sweep.waiting -= 1;
        if sweep.waiting > 0 {
            return Outcome::Nothing;
        }
        let Sweep { shard, opened, .. } = self.sweeps.remove(&number).expect("it was there above");
        Outcome::Tell(vec![(shard, opened)])
    }

    /// A session has ended. With the link down nothing is lost: the next status says what is open.
    fn close(&mut self, volume: VolumeId) {
        let Some(count) = self.sessions.get_mut(&volume) else { return };
        *count -= 1;
        if *count == 0 {
            self.sessions.remove(&volume);
            self.send(0, Body::CloseVolume(proto::CloseVolume { volume: volume.0 }));
        }
    }

    fn add_sessions(&self, status: &mut proto::DataStatus) {
        status.open_volumes = self.sessions.keys().map(|volume| volume.0).collect();
        status.opening_volumes = self.opens.values().map(|open| open.name.clone()).collect();
    }

    /// One shard's report; the last one completes the answer.
    fn on_report(&mut self, number: u64, report: Report) {
        let Some(asked) = self.asked.get_mut(&number) else { return };
        asked.reports.push(report);
        asked.waiting -= 1;
        if asked.waiting > 0 {
            return;
        }
        let asked = self.asked.remove(&number).expect("it was there above");
        if let Some(mut body) = put_together(asked.reports) {
            if let Body::Status(status) = &mut body {
                self.add_sessions(status);
            }
            self.send(asked.request_id.unwrap_or(0), body);
        }
    }
}

/// One answer of the process from the reports of its shards; all are of one kind.
fn put_together(reports: Vec<Report>) -> Option<Body> {
    let mut stats: Option<Stats> = None;
    let mut status: Option<proto::DataStatus> = None;
    let mut block = None;
    for report in reports {
        match report {
            Report::Perf(one) => match &mut stats {
                Some(all) => all.merge(&one),
                None => stats = Some(*one),
            },
            Report::Status(one) => match &mut status {
                Some(all) => add_status(all, one),
                None => status = Some(one),
            },
            // Of the one shard that has the replica's store.
            Report::Block(one) => block = block.or(one),
        }
    }
    if let Some(stats) = stats {
        let (latencies, counters) = stats.to_messages();
        let node = proto::NodePerf { latencies, counters, reachable: true, ..proto::NodePerf::default() };
        return Some(Body::PerfStats(proto::PerfStatsReply { nodes: vec![node] }));
    }
    status.map(Body::Status).or(Some(Body::BlockReplica(block.unwrap_or_default())))
}

fn add_status(all: &mut proto::DataStatus, one: proto::DataStatus) {
    // The newest map that *every* shard acts on.
    all.map_version = all.map_version.min(one.map_version);
    all.stores.extend(one.stores);
    all.resync_bytes_moved += one.resync_bytes_moved;
    all.resync_bytes_left += one.resync_bytes_left;
    all.slow_members.extend(one.slow_members);
    all.scrub_bytes += one.scrub_bytes;
    all.scrubs_running.extend(one.scrubs_running);
    all.scrubs_ended.extend(one.scrubs_ended);
}

#[cfg(test)]
mod tests {
    use xsan_protocol::ids::PoolId;

    use super::*;

    const SHARD: ShardIndex = ShardIndex(1);

    fn volume() -> Volume {
        Volume {
            id: VolumeId(7),
            name: "vm".into(),
            lineage: Lineage(7),
            layer: Layer(0),
            size_bytes: 1 << 30,
            pool: PoolId(1),
            durability: Default::default(),
            policy: String::new(),
            created_unix_ms: 1,
            attached_nodes: vec![],
        }
    }

    fn told(control: &Control) -> (Vec<u32>, Vec<String>) {
        let mut status = proto::DataStatus::default();
        control.add_sessions(&mut status);
        (status.open_volumes, status.opening_volumes)
    }

    /// The control process counted, and lost count with its own life and with every link.
    #[test]
    fn a_status_tells_what_is_open_whatever_became_of_the_link() {
        let mut control = Control::new(LinkSender::default(), 2, "c".into(), Arc::default());
        for request in [1, 2] {
            control.opens.insert(request, Open { shard: SHARD, number: request, name: "vm".into() });
        }
        assert_eq!(told(&control), (vec![], vec!["vm".to_owned(); 2]));
        for request in [1, 2] {
            let Outcome::Tell(told) = control.opened(request, Ok(Box::new((volume(), MapVersion(1))))) else {
                panic!("all shards are told")
            };
            let [(_, Message::Sweep { number, .. }), (_, Message::Sweep { .. })] = told[..] else {
                panic!("another client may have left something: {told:?}")
            };
            assert!(matches!(control.on_message(SHARD, Message::Swept(number)), Outcome::Nothing));
            let Outcome::Tell(told) = control.on_message(SHARD, Message::Swept(number)) else {
                panic!("the client's shard is told")
            };
            assert!(matches!(told[..], [(SHARD, Message::Opened { result: Ok(_), .. })]), "{told:?}");
        }
        assert_eq!(told(&control), (vec![7], vec![]));
        control.on_link(LinkEvent::Down);
        control.on_message(SHARD, Message::Close(VolumeId(7)));
        assert_eq!(told(&control), (vec![7], vec![]), "one of two sessions is left");
        control.on_message(SHARD, Message::Close(VolumeId(7)));
        assert_eq!(told(&control), (vec![], vec![]));
    }
}
