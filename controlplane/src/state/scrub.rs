//! What the cluster remembers of scrubs: when each group had its last ones, with what result, and which somebody asked for.
//!
//! Kept with the group's record. What is due follows from it (`crate::scrub`); nothing here knows the time.
//!
//! Invariants
//! - The end of a scrub counts once, however often it is told: the next order of the group has another number.

use std::time::Duration;

use xsan_protocol::ids::GroupId;
use xsan_protocol::proto;
use xsan_protocol::proto::{ScrubFindings, ScrubResult, ScrubWish};

use super::command::{CommandError, Reply, SettingsChange, milliseconds};
use super::error::StateError;
use super::{ClusterState, Touched};
use crate::timing::{SCRUB_INTERVAL_MAX, SCRUB_INTERVAL_MIN, SCRUB_RATE_MAX, SCRUB_RATE_MIN};

/// The scrubs of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GroupScrubs {
    /// When the last one ended, or the group was made; 0: unknown. A deep one counts as both.
    pub light_unix_ms: u64,
    pub deep_unix_ms: u64,
    /// The last light one, if no deep one ended after it.
    pub last_light: Option<ScrubResult>,
    pub last_deep: Option<ScrubResult>,
    pub wish: Option<ScrubWish>,
}

/// A scrub that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScrubEnd {
    pub group: GroupId,
    pub deep: bool,
    /// Of its order.
    pub number: u64,
    pub findings: ScrubFindings,
}

impl GroupScrubs {
    /// Number of the order that answers the wish, or that is due after the last one of its kind.
    pub fn order_number(&self, deep: bool) -> u64 {
        match self.wish {
            Some(wish) => wish.unix_ms,
            None if deep => self.deep_unix_ms,
            None => self.light_unix_ms,
        }
    }

    pub fn last(&self) -> Option<ScrubResult> {
        self.last_light.or(self.last_deep)
    }

    /// What is so as far as is known: what a light scrub does not look at is as the last deep one found it.
    pub fn found(&self) -> ScrubFindings {
        let of = |result: Option<ScrubResult>| result.and_then(|result| result.findings);
        let deep = of(self.last_deep).unwrap_or_default();
        let light = of(self.last_light).unwrap_or_default();
        ScrubFindings { differences: deep.differences.max(light.differences), ..deep }
    }

    fn take(&mut self, end: &ScrubEnd, unix_ms: u64) -> bool {
        let wished = self.wish.is_some_and(|wish| wish.deep == end.deep && wish.unix_ms == end.number);
        let periodic = GroupScrubs { wish: None, ..*self };
        if !wished && periodic.order_number(end.deep) != end.number {
            return false;
        }
        // Not the later of both: a time that a wrong clock told would stay for ever. The next order has another number all the same.
        let taken = [self.light_unix_ms, self.deep_unix_ms];
        let unix_ms = (unix_ms..=u64::MAX).find(|time| !taken.contains(time)).unwrap_or(unix_ms);
        self.light_unix_ms = unix_ms;
        if end.deep {
            self.deep_unix_ms = unix_ms;
        }
        let result = Some(ScrubResult { deep: end.deep, unix_ms, findings: Some(end.findings) });
        (self.last_light, self.last_deep) = if end.deep { (None, result) } else { (result, self.last_deep) };
        self.wish = self.wish.filter(|_| !wished);
        true
    }
}

impl ClusterState {
    pub fn scrubs(&self, group: GroupId) -> GroupScrubs {
        self.scrubs.get(&group).copied().unwrap_or_default()
    }

    /// Records of groups without any are equal to none.
    pub(super) fn set_scrubs(&mut self, group: GroupId, scrubs: GroupScrubs) {
        if scrubs == GroupScrubs::default() {
            self.scrubs.remove(&group);
        } else {
            self.scrubs.insert(group, scrubs);
        }
    }

    /// Somebody wants the groups scrubbed, or (without a wish) not any more.
    pub(super) fn wish_scrubs(
        &mut self,
        groups: &[GroupId],
        wish: Option<ScrubWish>,
        touched: &mut Touched,
    ) -> Reply {
        let mut changed = 0;
        for group in groups {
            let scrubs = self.scrubs(*group);
            if scrubs.wish == wish || !self.map.groups.contains_key(group) {
                continue;
            }
            changed += 1;
            // A deep one that is still to come looks at all that a light one does.
            let is_light = wish.is_some_and(|wish| !wish.deep);
            if is_light && scrubs.wish.is_some_and(|wish| wish.deep) {
                continue;
            }
            self.set_scrubs(*group, GroupScrubs { wish, ..scrubs });
            touched.groups.insert(*group);
        }
        Reply::Groups { changed, refused: 0 }
    }

    pub(super) fn end_scrubs(&mut self, ends: &[ScrubEnd], unix_ms: u64, touched: &mut Touched) -> Reply {
        for end in ends {
            let mut scrubs = self.scrubs(end.group);
            if self.map.groups.contains_key(&end.group) && scrubs.take(end, unix_ms) {
                self.set_scrubs(end.group, scrubs);
                touched.groups.insert(end.group);
            }
        }
        Reply::Done
    }

    /// Groups that have just been made are scrubbed first an interval later.
    pub(super) fn count_scrubs_from(&mut self, groups: &Touched, unix_ms: u64) {
        for group in &groups.groups {
            let made =
                GroupScrubs { light_unix_ms: unix_ms, deep_unix_ms: unix_ms, ..GroupScrubs::default() };
            self.set_scrubs(*group, made);
        }
    }
}

/// # Errors
/// What is set is out of bounds.
pub fn check_settings(change: &SettingsChange) -> Result<(), StateError> {
    let rates = SCRUB_RATE_MIN..=SCRUB_RATE_MAX;
    if let Some(rate) = change.scrub_bytes_per_second.filter(|rate| !rates.contains(rate)) {
        return Err(StateError::SettingInvalid {
            field: "scrub-rate",
            value: rate,
            unit: "bytes a second",
            min: SCRUB_RATE_MIN,
            max: SCRUB_RATE_MAX,
        });
    }
    let intervals =
        [("scrub-interval", change.scrub_interval), ("deep-scrub-interval", change.deep_scrub_interval)];
    for (field, interval) in intervals {
        let possible = |interval: &Duration| {
            interval.is_zero() || (SCRUB_INTERVAL_MIN..=SCRUB_INTERVAL_MAX).contains(interval)
        };
        if let Some(interval) = interval.filter(|interval| !possible(interval)) {
            return Err(StateError::SettingInvalid {
                field,
                value: milliseconds(interval),
                unit: "ms",
                min: milliseconds(SCRUB_INTERVAL_MIN),
                max: milliseconds(SCRUB_INTERVAL_MAX),
            });
        }
    }
    Ok(())
}

impl From<&ScrubEnd> for proto::ScrubReport {
    fn from(end: &ScrubEnd) -> Self {
        let order = proto::ScrubOrder { group: end.group.0, deep: end.deep, number: end.number };
        Self { order: Some(order), findings: Some(end.findings) }
    }
}

impl TryFrom<proto::ScrubReport> for ScrubEnd {
    type Error = CommandError;

    fn try_from(report: proto::ScrubReport) -> Result<Self, CommandError> {
        let order = report.order.ok_or(CommandError::Field { field: "order" })?;
        let findings = report.findings.ok_or(CommandError::Field { field: "findings" })?;
        Ok(Self { group: GroupId(order.group), deep: order.deep, number: order.number, findings })
    }
}
