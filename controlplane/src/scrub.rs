//! Which groups are due for a scrub, and what comes of it: between the cluster's state and the data process of this node.
//!
//! Each node orders the scrubs of the groups that it leads, from the state alone, and commits their ends; so they go on through
//! the death of any process, and nobody has to be asked. Scrubbing itself is the data plane's. Decision: docs/decisions/0011-scrub.md.

use std::sync::Arc;
use std::time::Duration;

use xsan_protocol::ids::{GroupId, NodeId};
use xsan_protocol::map::Pool;
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::proto::{ScrubOrder, ScrubOrders};

use crate::clock::unix_ms;
use crate::link::Link;
use crate::raft::handle::RaftHandle;
use crate::state::command::{Command, milliseconds};
use crate::state::scrub::{GroupScrubs, ScrubEnd};
use crate::state::{ClusterState, Settings};
use crate::timing::{SCRUB_AHEAD_MAX, SCRUB_TICK};

/// Ordered at once; the others follow when these have ended.
const ORDERS_MAX: usize = 1024;

/// The loop, and what the data process was told last.
pub struct Scrubs {
    handle: RaftHandle,
    link: Arc<Link>,
    told: Option<(u64, ScrubOrders)>,
}

impl Scrubs {
    pub const fn new(handle: RaftHandle, link: Arc<Link>) -> Self {
        Self { handle, link, told: None }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        loop {
            tokio::time::sleep(SCRUB_TICK).await;
            self.tick().await;
        }
    }

    async fn tick(&mut self) {
        let Some(connection) = self.link.connection() else { return };
        let state = self.handle.state();
        let orders = orders(&state, self.handle.node(), unix_ms());
        if self.told.as_ref() != Some(&(connection, orders.clone()))
            && self.link.tell(Body::ScrubOrders(orders.clone()))
        {
            self.told = Some((connection, orders));
        }
        let told = self.link.status().unwrap_or_default().scrubs_ended;
        let ends = told.into_iter().filter_map(|report| ScrubEnd::try_from(report).ok());
        let ends: Vec<ScrubEnd> = ends.filter(|end| is_open(&state, end)).collect();
        if !ends.is_empty() {
            let count = ends.len();
            let command = Command::EndScrubs { unix_ms: unix_ms(), ends };
            if let Err(error) = self.handle.propose(command).await {
                tracing::warn!(
                    count,
                    code = error.code().number(),
                    "ends of scrubs are not kept yet: {error}"
                );
            }
        }
    }
}

/// Does the cluster not know of this end yet?
fn is_open(state: &ClusterState, end: &ScrubEnd) -> bool {
    let scrubs = state.scrubs(end.group);
    let periodic = GroupScrubs { wish: None, ..scrubs };
    scrubs.order_number(end.deep) == end.number || periodic.order_number(end.deep) == end.number
}

/// What the data process of `node` is to scrub: first what somebody asked for, then what has waited longest.
fn orders(state: &ClusterState, node: NodeId, now_unix_ms: u64) -> ScrubOrders {
    let settings = state.settings();
    let led = state.groups().filter(|(_, group)| group.primary == Some(node));
    let mut due: Vec<(u64, ScrubOrder)> = led
        .filter_map(|(pool, group)| due(&settings, pool, group.id, &state.scrubs(group.id), now_unix_ms))
        .collect();
    due.sort_unstable_by_key(|(since, order)| (*since, order.group));
    due.truncate(ORDERS_MAX);
    let orders = due.into_iter().map(|(_, order)| order).collect();
    ScrubOrders { bytes_per_second: settings.scrub_bytes_per_second, orders }
}

/// The group's order, and since when it is due (0: somebody asked for it).
fn due(
    settings: &Settings,
    pool: &Pool,
    group: GroupId,
    scrubs: &GroupScrubs,
    now_unix_ms: u64,
) -> Option<(u64, ScrubOrder)> {
    let order = |deep| ScrubOrder { group: group.0, deep, number: scrubs.order_number(deep) };
    if let Some(wish) = scrubs.wish {
        return Some((0, order(wish.deep)));
    }
    let due_at = |last: u64, interval: Duration| {
        if is_ahead(last, now_unix_ms) {
            return 0;
        }
        let interval = milliseconds(interval);
        // Each group has its own moment of every interval, so that the scrubs of a pool are spread evenly, and stay so.
        let moment = u128::from(interval) * u128::from(group.index()) / u128::from(pool.group_count);
        let moment = u64::try_from(moment).expect("it is less than the interval");
        let begun = last.saturating_add(interval - moment) / interval;
        begun.saturating_mul(interval).saturating_add(moment)
    };
    let kinds = [
        (true, scrubs.deep_unix_ms, settings.deep_scrub_interval),
        (false, scrubs.light_unix_ms, settings.scrub_interval),
    ];
    kinds
        .into_iter()
        .filter(|(_, _, interval)| !interval.is_zero())
        .map(|(deep, last, interval)| (due_at(last, interval).max(1), order(deep)))
        .find(|(since, _)| *since <= now_unix_ms)
}

/// Did a wrong clock tell this time? Each node tells its own, and the state believes it.
fn is_ahead(last: u64, now_unix_ms: u64) -> bool {
    last > now_unix_ms.saturating_add(milliseconds(SCRUB_AHEAD_MAX))
}

/// Is the group overdue by as much again as its interval?
pub fn is_overdue(settings: &Settings, scrubs: &GroupScrubs, now_unix_ms: u64) -> bool {
    let late = |last: u64, interval: Duration| {
        let twice = milliseconds(interval).saturating_mul(2);
        let is_late = is_ahead(last, now_unix_ms) || now_unix_ms.saturating_sub(last) > twice;
        !interval.is_zero() && last != 0 && is_late
    };
    late(scrubs.light_unix_ms, settings.scrub_interval)
        || late(scrubs.deep_unix_ms, settings.deep_scrub_interval)
}

#[cfg(test)]
mod tests;
