//! What a shard answers to the control plane's questions.

use xsan_protocol::ids::{BlockKey, GroupId, Version};
use xsan_protocol::proto;

use super::{BrokenStore, Devices, Question, Report, Shard};
use crate::replication;
use crate::stats::{Counter, Stage, Stats};
use crate::store::Store;

impl Shard {
    pub(super) fn answer(&mut self, question: Question) -> Report {
        match question {
            Question::Perf => Report::Perf(Box::new(self.stats_now())),
            Question::Status => Report::Status(self.status_now()),
            Question::Block { group, key } => Report::Block(self.block_now(group, key)),
        }
    }

    /// The shard's latencies and counters, with those that others count for it.
    fn stats_now(&mut self) -> Stats {
        let mut samples = Vec::new();
        self.driver.replication.drain_latencies(&mut samples);
        let mut kept = self.stats.borrow_mut();
        for (stage, ns) in samples {
            kept.record(stage_of(stage), ns);
        }
        let mut stats = kept.clone();
        drop(kept);
        let net = &self.connections.counters;
        stats.add(Counter::FramesSent, net.frames_sent.get());
        stats.add(Counter::FramesReceived, net.frames_received.get());
        stats.add(Counter::SentBytes, net.sent_bytes.get());
        stats.add(Counter::ReceivedBytes, net.received_bytes.get());
        stats.add(Counter::CopiedBytes, net.copied_bytes.get());
        for store in self.driver.stores() {
            let counters = store.status().counters;
            stats.add(Counter::EntryBytes, counters.entry_bytes);
            stats.add(Counter::WrittenBytes, counters.written_bytes());
            stats.add(Counter::ReadBytes, counters.read_bytes);
            stats.add(Counter::DeviceFlushes, counters.flushes);
            stats.add(Counter::ChecksumErrors, counters.checksum_errors);
            stats.add(Counter::RepairedPages, counters.repaired_pages);
        }
        let status = self.driver.replication.status();
        stats.add(Counter::GroupWrites, status.counters.writes);
        stats.add(Counter::GroupReads, status.counters.reads);
        stats.add(Counter::ResyncBytesMoved, status.counters.resync_bytes_moved);
        stats.add(Counter::MendedPages, status.counters.pages_mended);
        stats.add(Counter::Scrubs, status.counters.scrubs);
        stats.add(Counter::ScrubBytes, status.counters.scrub_bytes);
        stats.add(Counter::ScrubDamagedPages, status.counters.scrub_damaged_pages);
        stats.add(Counter::ScrubLostPages, status.counters.scrub_lost_pages);
        stats.add(Counter::ScrubDifferences, status.counters.scrub_differences);
        stats
    }

    fn status_now(&self) -> proto::DataStatus {
        let replication = self.driver.replication.status();
        let scrubs = self.driver.replication.scrub_status();
        let slow = |slow: &replication::SlowMember| proto::SlowMember {
            node: slow.node.0,
            us_p99: slow.us_p99,
            us_p99_peers: slow.us_p99_peers,
        };
        let open = self.driver.stores().map(|store| self.devices[&store.id()].message(store));
        proto::DataStatus {
            map_version: self.map.version.0,
            stores: open.chain(self.broken_stores.iter().map(BrokenStore::message)).collect(),
            resync_bytes_moved: replication.counters.resync_bytes_moved,
            resync_bytes_left: replication.resync_bytes_left,
            slow_members: replication.slow_members.iter().map(slow).collect(),
            scrub_bytes: replication.counters.scrub_bytes,
            scrubs_running: scrubs.running.iter().map(scrub_report).collect(),
            scrubs_ended: scrubs.outcomes.iter().map(scrub_report).collect(),
            // Shard 0 knows the sessions of all.
            ..proto::DataStatus::default()
        }
    }

    /// Where a block lies here; `None` when its group has no replica on this shard.
    fn block_now(&self, group: GroupId, key: BlockKey) -> Option<proto::BlockReplica> {
        let store = self.map.groups.get(&group)?.member(self.identity.node)?.store;
        let unit = |location: crate::store::UnitLocation| {
            let Version { epoch, seq } = location.version;
            proto::UnitLocation {
                unit: u32::from(location.unit),
                version_epoch: epoch.0,
                version_seq: seq.0,
                device_offset: location.device_offset.unwrap_or(0),
                journalled_pages: u32::from(location.journalled_pages),
            }
        };
        Some(proto::BlockReplica {
            node: self.identity.node.0,
            store: store.0,
            device: self.devices.get(&store)?.path.clone(),
            reachable: true,
            units: self.driver.store(store)?.locate(group, key).into_iter().map(unit).collect(),
            ..proto::BlockReplica::default()
        })
    }
}

const fn stage_of(stage: replication::Stage) -> Stage {
    match stage {
        replication::Stage::JournalLocal => Stage::JournalLocal,
        replication::Stage::Acknowledge => Stage::Acknowledge,
        replication::Stage::Read => Stage::PrimaryRead,
        replication::Stage::Peering => Stage::Peering,
    }
}

fn scrub_report(scrub: &replication::ScrubOutcome) -> proto::ScrubReport {
    let (order, found) = (scrub.order, scrub.findings);
    proto::ScrubReport {
        order: Some(proto::ScrubOrder { group: order.group.0, deep: order.deep, number: order.number }),
        findings: Some(proto::ScrubFindings {
            blocks: found.blocks,
            bytes: found.bytes,
            damaged_pages: found.damaged_pages,
            mended_pages: found.mended_pages,
            lost_pages: found.lost_pages,
            differences: found.differences,
            rebuilt_replicas: found.rebuilt_replicas,
            skipped_units: found.skipped_units,
        }),
    }
}

impl Devices {
    fn message(&self, store: &Store) -> proto::StoreStatus {
        let status = store.status();
        proto::StoreStatus {
            id: store.id().0,
            device: self.path.clone(),
            media: self.media.clone(),
            capacity_bytes: status.capacity_bytes,
            used_bytes: status.used_bytes,
            journal_bytes: status.journal_bytes,
            journal_used_bytes: status.journal_used_bytes,
            failed: status.failed,
            checksum_errors: status.counters.checksum_errors,
            repaired_pages: status.counters.repaired_pages,
            problem: String::new(),
            write_us_p99: self.writes.p99().map(|ns| ns / 1000),
            cache_device: self.cache_path.clone().unwrap_or_default(),
        }
    }
}
