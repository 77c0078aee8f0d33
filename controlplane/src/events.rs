//! What happened in the cluster, for people: the last events that this node saw while it led.
//!
//! Written by `controller` from what it sees before each plan; `file` has them outlive the process; the API puts those of all
//! nodes together, as each has led at its time. Decides nothing. See `docs/decisions/0021-events-stay-where-they-were-seen.md`.
//!
//! Invariants
//! - At most `EVENTS_MAX` events, the oldest are dropped.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use xsan_protocol::ids::{GroupId, NodeId, StoreId};
use xsan_protocol::proto;
use xsan_protocol::proto::ScrubFindings;

use crate::lease::Health;
use crate::state::{ClusterState, Departure};

pub mod file;

/// Events kept and listed: weeks of a quiet cluster, and a few hundred KiB.
pub const EVENTS_MAX: usize = 1000;
/// Changes of groups within this time are one event: a resync of hours must not push out what it came from.
const SUMMARY_MS: u64 = 600_000;
const RECONFIGURED: &str = "groups-reconfigured";

#[derive(Debug, Default)]
pub struct EventLog {
    events: VecDeque<proto::Event>,
    /// The summary that is being added to: its groups, and since when.
    summary: Option<(u64, u64)>,
    unsaved: Unsaved,
}

/// What has changed since the events were saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Unsaved {
    #[default]
    Nothing,
    /// Only what a summary sums up: not worth a flush each time.
    Summary,
    Events,
}

impl EventLog {
    /// A log that goes on after `events`, those of an earlier life.
    pub fn after(events: Vec<proto::Event>) -> Self {
        let surplus = events.len().saturating_sub(EVENTS_MAX);
        Self { events: events.into_iter().skip(surplus).collect(), ..Self::default() }
    }

    /// All events, if some of them are to be saved, which the caller does; for a summary that has grown only with `summaries`.
    pub fn take_unsaved(&mut self, summaries: bool) -> Option<Vec<proto::Event>> {
        let least = if summaries { Unsaved::Summary } else { Unsaved::Events };
        if self.unsaved < least {
            return None;
        }
        self.unsaved = Unsaved::Nothing;
        Some(self.list())
    }

    /// What was taken to be saved was not.
    pub fn not_saved(&mut self) {
        self.unsaved = Unsaved::Events;
    }

    pub fn add(&mut self, unix_ms: u64, kind: &str, object: String, message: String) {
        tracing::info!(kind, object, "{message}");
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        let kind = kind.to_owned();
        self.events.push_back(proto::Event { unix_ms, kind, object, message, ..Default::default() });
        self.summary = None;
        self.unsaved = Unsaved::Events;
    }

    /// Groups have changed: added to the last event when that is about the same, and began less than `SUMMARY_MS` ago.
    pub fn reconfigured(&mut self, unix_ms: u64, groups: u64) {
        if let Some((since, so_far)) = self.summary
            && let ms = unix_ms.saturating_sub(since)
            && ms < SUMMARY_MS
            && let Some(last) = self.events.back_mut()
        {
            self.summary = Some((since, so_far + groups));
            last.message = changes(so_far + groups, ms);
            self.unsaved = self.unsaved.max(Unsaved::Summary);
            return;
        }
        self.add(unix_ms, RECONFIGURED, "groups".to_owned(), changes(groups, 0));
        self.summary = Some((unix_ms, groups));
    }

    /// Oldest first.
    pub fn list(&self) -> Vec<proto::Event> {
        self.events.iter().cloned().collect()
    }
}

fn changes(count: u64, ms: u64) -> String {
    let what = if count == 1 { "change of a group" } else { "changes of groups" };
    match ms.div_ceil(1000) {
        0 => format!("{count} {what}"),
        s => format!("{count} {what} within {s} s"),
    }
}

/// What a node was like when it was last looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    name: String,
    up: Option<bool>,
    maintenance: bool,
    slow: bool,
    departure: Departure,
    failed: BTreeSet<StoreId>,
}

/// Finds what changed from one look to the next, within one term of leadership.
#[derive(Debug, Default)]
pub struct Observer {
    nodes: Option<BTreeMap<NodeId, Seen>>,
    learners: usize,
    scrubs: Option<ScrubsSeen>,
}

/// The scrubs when they were last looked at.
#[derive(Debug, Default)]
struct ScrubsSeen {
    /// When the last scrub of each group ended.
    ended: BTreeMap<GroupId, u64>,
    /// Groups that somebody wants scrubbed.
    wished: usize,
    /// What was found since somebody wanted that.
    sum: ScrubFindings,
    groups: usize,
}

impl Observer {
    /// Looks at the cluster and logs what is new; the first look only remembers.
    pub fn look(
        &mut self,
        unix_ms: u64,
        state: &ClusterState,
        health: impl Fn(NodeId) -> Health,
        slow: &BTreeSet<NodeId>,
        log: &mut EventLog,
    ) {
        let earlier = self.nodes.take();
        let mut nodes = BTreeMap::new();
        for node in state.map().nodes.values() {
            let before = earlier.as_ref().and_then(|earlier| earlier.get(&node.id));
            let stores = node.data.iter().flat_map(|data| &data.stores);
            let seen = Seen {
                name: node.name.clone(),
                up: match health(node.id) {
                    Health::Up => Some(true),
                    Health::Gone => Some(false),
                    Health::Assumed => before.and_then(|before| before.up),
                },
                maintenance: state.is_in_maintenance(node.id),
                slow: slow.contains(&node.id),
                departure: state.departure(node.id),
                failed: stores.filter(|store| store.failed).map(|store| store.id).collect(),
            };
            match (before, &earlier) {
                (Some(before), _) => compare(unix_ms, before, &seen, log),
                (None, Some(_)) => say(unix_ms, &seen, "node-joined", "joined the cluster", log),
                (None, None) => {}
            }
            nodes.insert(node.id, seen);
        }
        for (id, seen) in earlier.iter().flatten() {
            if !nodes.contains_key(id) {
                say(unix_ms, seen, "node-removed", "left the cluster", log);
            }
        }
        let learners = state.map().groups.values().filter(|group| group.learners().count() > 0).count();
        if learners == 0 && self.learners > 0 {
            let message = "every replica is up to date".to_owned();
            log.add(unix_ms, "resync-finished", "groups".to_owned(), message);
        }
        (self.nodes, self.learners) = (Some(nodes), learners);
        self.look_at_scrubs(unix_ms, state, log);
    }

    fn look_at_scrubs(&mut self, unix_ms: u64, state: &ClusterState, log: &mut EventLog) {
        let wished = state.groups().filter(|(_, group)| state.scrubs(group.id).wish.is_some()).count();
        let first = self.scrubs.is_none();
        let seen = self.scrubs.get_or_insert_default();
        if !first && seen.wished == 0 && wished > 0 {
            let message = format!("{wished} groups are to be scrubbed");
            log.add(unix_ms, "scrub-started", "groups".to_owned(), message);
            (seen.sum, seen.groups) = (ScrubFindings::default(), 0);
        }
        for (_, group) in state.groups() {
            let Some(last) = state.scrubs(group.id).last() else { continue };
            let news = seen.ended.insert(group.id, last.unix_ms) != Some(last.unix_ms);
            let found = last.findings.unwrap_or_default();
            if first || !news {
                continue;
            }
            seen.groups += 1;
            seen.sum.damaged_pages += found.damaged_pages;
            seen.sum.mended_pages += found.mended_pages;
            seen.sum.lost_pages += found.lost_pages;
            seen.sum.differences += found.differences;
            let kind = match found {
                found if found.lost_pages > 0 || found.differences > 0 => "scrub-errors",
                found if found.damaged_pages > 0 => "scrub-repaired",
                _ => continue,
            };
            log.add(unix_ms, kind, format!("group {}", group.id), scrub_findings(&found));
        }
        if !first && seen.wished > 0 && wished == 0 {
            let message = format!("{} groups were scrubbed: {}", seen.groups, scrub_findings(&seen.sum));
            log.add(unix_ms, "scrub-ended", "groups".to_owned(), message);
        }
        seen.wished = wished;
    }
}

/// `2 pages damaged, 2 mended, 0 lost, 0 units differ`.
fn scrub_findings(found: &ScrubFindings) -> String {
    let ScrubFindings { damaged_pages, mended_pages, lost_pages, differences, .. } = found;
    format!(
        "{damaged_pages} pages damaged, {mended_pages} mended, {lost_pages} lost, {differences} units differ"
    )
}

fn say(unix_ms: u64, node: &Seen, kind: &str, what: &str, log: &mut EventLog) {
    log.add(unix_ms, kind, format!("node {}", node.name), format!("node {} {what}", node.name));
}

fn compare(unix_ms: u64, before: &Seen, now: &Seen, log: &mut EventLog) {
    match (before.up, now.up) {
        (Some(true) | None, Some(false)) => say(unix_ms, now, "node-down", "is down: it has no lease", log),
        (Some(false), Some(true)) => say(unix_ms, now, "node-up", "is up", log),
        _ => {}
    }
    match (before.maintenance, now.maintenance) {
        (false, true) => say(unix_ms, now, "maintenance-on", "is in maintenance", log),
        (true, false) => say(unix_ms, now, "maintenance-off", "is in maintenance no more", log),
        _ => {}
    }
    match (before.slow, now.slow) {
        (false, true) => say(unix_ms, now, "node-slow", "is far slower than its peers", log),
        (true, false) => say(unix_ms, now, "node-slow-ended", "keeps up with its peers again", log),
        _ => {}
    }
    if before.departure != now.departure {
        let (kind, what) = match now.departure {
            Departure::Stays => ("node-stays", "is not removed after all"),
            Departure::Leaving => ("node-leaving", "is being removed"),
            Departure::Lost => ("node-given-up", "is given up and being removed"),
        };
        say(unix_ms, now, kind, what, log);
    }
    for store in now.failed.difference(&before.failed) {
        say(unix_ms, now, "store-failed", &format!("has a failed store, {store}"), log);
    }
}

#[cfg(test)]
mod tests;
