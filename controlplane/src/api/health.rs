//! What an operator should know or mend: the checks of `xsan_protocol::health` against one look at the cluster.
//!
//! Pure: everything is in the survey.

use std::collections::BTreeSet;

use xsan_protocol::health::Check;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto;

use super::survey::Survey;
use crate::scrub::is_overdue;

/// From here on a store is nearly full, in percent.
const NEARFULL_PERCENT: u64 = 85;
/// From here on a store is full, in percent.
const FULL_PERCENT: u64 = 95;
/// The state words of a node's status.
const UP: &str = "up";
const DOWN: &str = "down";

/// What is found, the worst first, in a cluster of that status.
pub fn findings(survey: &Survey, status: &proto::ClusterStatusReply) -> Vec<proto::Finding> {
    let mut found = Found::default();
    of_cluster(survey, status, &mut found);
    of_groups(&status.groups.unwrap_or_default(), &mut found);
    of_scrubs(survey, &mut found);
    for node in &status.nodes {
        of_node(survey, node, &mut found);
        node.stores.iter().for_each(|store| of_store(node, store, &mut found));
    }
    found.0.sort_by_key(|(check, _)| *check);
    found.0.into_iter().map(|(_, finding)| finding).collect()
}

#[derive(Default)]
struct Found(Vec<(Check, proto::Finding)>);

impl Found {
    fn add(&mut self, check: Check, object: String, message: String) {
        let finding = proto::Finding {
            code: check.code().to_owned(),
            severity: check.severity().name().to_owned(),
            object,
            message,
            remedy: check.remedy().to_owned(),
        };
        self.0.push((check, finding));
    }
}

fn name(status: &proto::NodeStatus) -> String {
    status.node.as_ref().map(|node| node.name.clone()).unwrap_or_default()
}

fn of_cluster(survey: &Survey, status: &proto::ClusterStatusReply, found: &mut Found) {
    let cluster = || format!("cluster {}", status.cluster_id);
    let voters = status.nodes.iter().filter(|node| node.node.as_ref().is_some_and(|node| node.voter));
    let voters: Vec<_> = voters.collect();
    let alive = voters.iter().filter(|node| node.state != DOWN).count();
    let quorum = voters.len() / 2 + 1;
    let message = || format!("{alive} of {} voters are there, {quorum} are needed", voters.len());
    if survey.health.is_empty() {
        found.add(Check::NoLeader, cluster(), format!("no node leads with a quorum; {}", message()));
    } else if alive <= quorum {
        found.add(Check::NoQuorumMargin, cluster(), message());
    }
    let releases: BTreeSet<&str> = status.nodes.iter().map(|node| node.release.as_str()).collect();
    let releases: Vec<&str> = releases.into_iter().filter(|release| !release.is_empty()).collect();
    if releases.len() > 1 {
        found.add(Check::ReleasesMixed, cluster(), format!("releases {}", releases.join(", ")));
    }
}

fn of_groups(groups: &proto::GroupCounts, found: &mut Found) {
    let mut add = |check, count: u32, what: &str| {
        if count > 0 {
            found.add(check, "groups".to_owned(), format!("{count} of {} groups {what}", groups.total));
        }
    };
    add(Check::GroupsUnavailable, groups.inactive, "have too few live replicas: no I/O there");
    add(Check::GroupsDegraded, groups.degraded, "have fewer live replicas than wanted");
    add(Check::GroupsAtRisk, groups.at_risk, "are one failure away from no I/O");
    let left = groups.resync_bytes_left;
    add(Check::Resync, groups.resyncing, &format!("bring a replica up to date, {left} bytes are left"));
}

fn of_scrubs(survey: &Survey, found: &mut Found) {
    let (settings, state) = (survey.state.settings(), &survey.state);
    let (mut total, mut overdue, mut mended) = (0, 0, 0);
    for (_, group) in state.groups() {
        let scrubs = state.scrubs(group.id);
        total += 1;
        overdue += u64::from(is_overdue(&settings, &scrubs, survey.unix_ms));
        let findings = scrubs.found();
        mended += u64::from(findings.mended_pages > 0);
        let (lost, different) = (findings.lost_pages, findings.differences);
        if lost > 0 || different > 0 {
            let message =
                format!("{lost} pages can not be mended, {different} units differ between replicas");
            found.add(Check::ScrubErrors, format!("group {}", group.id), message);
        }
    }
    let mut add = |check, count: u64, what: &str| {
        if count > 0 {
            found.add(check, "groups".to_owned(), format!("{count} of {total} groups {what}"));
        }
    };
    add(Check::ScrubOverdue, overdue, "are overdue for a scrub");
    add(Check::ScrubRepaired, mended, "had damaged pages, which were mended");
}

fn of_node(survey: &Survey, status: &proto::NodeStatus, found: &mut Found) {
    let object = || format!("node {}", name(status));
    match status.state.as_str() {
        UP => {}
        DOWN => {
            // A leader that never heard of it can not say for how long.
            let age_ms = status.last_heartbeat_age_ms;
            let message =
                age_ms.map_or_else(|| "no beat".to_owned(), |ms| format!("no beat for {} s", ms / 1000));
            found.add(Check::NodeDown, object(), message);
        }
        _ => found.add(Check::DataDown, object(), "its data process has no lease".to_owned()),
    }
    if status.maintenance {
        found.add(Check::NodeMaintenance, object(), "in maintenance".to_owned());
    }
    let id = NodeId(status.node.as_ref().map_or(0, |node| node.id));
    if status.leaving {
        let replicas = status.member_groups + status.learner_groups;
        let volumes = survey.state.map().volumes.values();
        let attached: Vec<&str> = volumes
            .filter(|volume| volume.attached_nodes.contains(&id))
            .map(|volume| volume.name.as_str())
            .collect();
        if replicas == 0 && !attached.is_empty() {
            found.add(Check::RemovalWaits, object(), format!("attached: {}", attached.join(", ")));
        } else {
            found.add(Check::NodeLeaving, object(), format!("{replicas} replicas are left there"));
        }
    }
    let Some(answer) = survey.answers.get(&id) else { return };
    if answer.skew_ms > 0 {
        found.add(
            Check::ClockSkew,
            object(),
            format!("its clock and that of the node that was asked differ by {} ms", answer.skew_ms),
        );
    }
    for slow in answer.status.data.iter().flat_map(|data| &data.slow_members) {
        let nodes = &survey.state.map().nodes;
        let whom =
            nodes.get(&NodeId(slow.node)).map_or_else(|| slow.node.to_string(), |node| node.name.clone());
        let (own, peers, seen_by) = (slow.us_p99, slow.us_p99_peers, name(status));
        let told = survey.answers.get(&NodeId(slow.node)).and_then(|answer| answer.status.data.as_ref());
        let reason = why_slow(told.map_or(&[], |data| &data.stores), own);
        let message = format!("p99 {own} µs, its peers {peers} µs, seen by node {seen_by}{reason}");
        found.add(Check::SlowMember, format!("node {whom}"), message);
    }
}

/// Which part of a write's way is slow, where that takes `us_p99` from the primary to these stores and back.
fn why_slow(stores: &[proto::StoreStatus], us_p99: u64) -> String {
    let timed = stores.iter().filter_map(|store| {
        let journal = if store.cache_device.is_empty() { &store.device } else { &store.cache_device };
        Some((store.write_us_p99?, journal))
    });
    match timed.max() {
        Some((us, device)) if us > us_p99 / 2 => format!("; its device {device} takes {us} µs for a write"),
        Some((us, _)) => {
            format!("; its devices take {us} µs for a write at most: it is its network, or the host is busy")
        }
        None => String::new(),
    }
}

fn of_store(node: &proto::NodeStatus, store: &proto::StoreStatus, found: &mut Found) {
    let object = || format!("store {:016x} of node {}", store.id, name(node));
    if store.failed {
        let problem = if store.problem.is_empty() { "failed" } else { &store.problem };
        return found.add(Check::StoreFailed, object(), format!("{} {problem}", store.device));
    }
    let percent = store.used_bytes.saturating_mul(100).checked_div(store.capacity_bytes).unwrap_or(0);
    let used = || format!("{} is {percent} % full", store.device);
    if percent > FULL_PERCENT {
        found.add(Check::StoreFull, object(), used());
    } else if percent > NEARFULL_PERCENT {
        found.add(Check::StoreNearfull, object(), used());
    }
    if store.checksum_errors > 0 {
        let (bad, good) = (store.checksum_errors, store.repaired_pages);
        let message = format!("{} returned {bad} bad pages, {good} are repaired", store.device);
        found.add(Check::ChecksumErrors, object(), message);
    }
}

#[cfg(test)]
mod tests;
