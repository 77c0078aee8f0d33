//! What xsan-cli shows to people: pure functions of the cluster's replies.

use xsan_nodekit::size::{Amount, Size};
use xsan_protocol::health::Severity;
use xsan_protocol::proto::{
    ClusterMap, ClusterSettings, ClusterStatusReply, Durability, Event, Finding, GroupCounts,
    ListEventsReply, Node, NodePlan, NodeStatus, Volume, VolumeStatus,
};

use crate::text::{self, Number, Text, age, count, facts, join, percent, table, time, yes_or_no};

/// Findings that a status ends with, so that its tables stay in sight; damage may be found in hundreds of groups.
const FINDINGS_SHOWN: usize = 10;

/// One word for the health of all groups, the worst first.
pub fn health(groups: &GroupCounts) -> &'static str {
    match groups {
        groups if groups.inactive > 0 => "inactive",
        groups if groups.degraded > 0 => "degraded",
        groups if groups.resyncing > 0 => "resyncing",
        _ => "healthy",
    }
}

fn health_sentence(groups: &GroupCounts) -> String {
    let part = |number: u32| format!("{number} of {}", count(groups.total, "group"));
    match health(groups) {
        "inactive" => format!("inactive: {} without enough replicas, no I/O there", part(groups.inactive)),
        "degraded" if groups.at_risk > 0 => {
            format!(
                "degraded: {} with fewer replicas; one more failure stops {}",
                part(groups.degraded),
                groups.at_risk
            )
        }
        "degraded" => format!("degraded: {} with fewer replicas, all I/O goes on", part(groups.degraded)),
        "resyncing" => format!("resyncing: {} bringing a replica up to date", part(groups.resyncing)),
        _ if groups.total == 0 => String::from("healthy: no volumes yet"),
        _ => String::from("healthy: every replica is up to date"),
    }
}

pub fn cluster_status(status: &ClusterStatusReply) -> String {
    let groups = status.groups.unwrap_or_default();
    let voters = status.nodes.iter().filter(|node| node.node.as_ref().is_some_and(|node| node.voter)).count();
    let leader = node_name(&status.nodes, status.leader);
    let mut lines = vec![
        ("Cluster", status.cluster_id.clone()),
        ("Health", health_sentence(&groups)),
        ("Nodes", format!("{}, {}", nodes_by_state(&status.nodes), count(voters as u64, "voter"))),
        ("Leader", format!("{leader} (term {}, map version {})", status.raft_term, status.map_version)),
        ("Volumes", status.volume_count.to_string()),
        ("Space", space(status.used_bytes, status.capacity_bytes)),
    ];
    if groups.total > 0 {
        let parts = [
            (groups.healthy, "healthy"),
            (groups.degraded, "degraded"),
            (groups.inactive, "inactive"),
            (groups.resyncing, "resyncing"),
            (groups.at_risk, "at risk"),
        ];
        let parts = parts
            .into_iter()
            .filter(|(number, _)| *number > 0)
            .map(|(number, what)| format!("{number} {what}"));
        lines.push(("Groups", format!("{}: {}", groups.total, join(parts))));
    }
    if groups.resync_bytes_moved > 0 || groups.resync_bytes_left > 0 {
        lines.push(("Resync", resync(&groups)));
    }
    lines.push(("Out after", interval(status.settings.unwrap_or_default())));
    let mut text = facts(&lines);
    text.push('\n');
    text += &nodes(&status.nodes);
    text += &worse_than_info(&status.findings);
    text
}

/// The findings that ask for something, a line each.
fn worse_than_info(findings: &[Finding]) -> String {
    let is_worse = |finding: &&Finding| Severity::named(&finding.severity) != Some(Severity::Info);
    let worse: Vec<_> = findings.iter().filter(is_worse).collect();
    let line = |Finding { severity, code, object, message, .. }: &Finding| {
        format!("{severity} {code}: {object}: {message}\n")
    };
    let mut text = String::from(if worse.is_empty() { "" } else { "\n" });
    text.extend(worse.iter().take(FINDINGS_SHOWN).map(|finding| line(finding)));
    if worse.len() > FINDINGS_SHOWN {
        text += &format!("{} more: xsan-cli health\n", worse.len() - FINDINGS_SHOWN);
    }
    text
}

/// `2 of 4 up, 1 down, 1 in maintenance`.
fn nodes_by_state(nodes: &[NodeStatus]) -> String {
    let number = |is_so: &dyn Fn(&NodeStatus) -> bool| nodes.iter().filter(|node| is_so(node)).count();
    let up = number(&|node| node.state == "up");
    let others = [
        (number(&|node| node.state == "down"), "down"),
        (number(&|node| node.state == "data-down"), "without a data process"),
        (number(&|node| node.maintenance), "in maintenance"),
        (number(&|node| node.leaving), "leaving"),
    ];
    let others = others.into_iter().filter(|(number, _)| *number > 0);
    let others = others.map(|(number, what)| format!("{number} {what}"));
    join(std::iter::once(format!("{up} of {} up", nodes.len())).chain(others))
}

/// Milliseconds until resync is done at its present rate; `None` when it does not move.
pub fn resync_ms_left(groups: &GroupCounts) -> Option<u64> {
    groups.resync_bytes_left.saturating_mul(1000).checked_div(groups.resync_bytes_per_second)
}

fn resync(groups: &GroupCounts) -> String {
    let (moved, left) = (Amount(groups.resync_bytes_moved), Amount(groups.resync_bytes_left));
    let mut text = format!("{moved} moved, {left} left");
    if groups.resync_bytes_left > 0
        && let Some(ms) = resync_ms_left(groups)
    {
        text += &format!(", {}/s, {} to go", Amount(groups.resync_bytes_per_second), age(ms));
    }
    text
}

fn interval(settings: ClusterSettings) -> String {
    match settings.down_out_interval_ms {
        0 => "unknown: the node is of an older release".into(),
        ms => format!("{} s down (down-out-interval)", ms / 1000),
    }
}

pub fn settings(settings: &ClusterSettings) -> String {
    let slow = if settings.demote_slow_nodes { "demoted (slow-nodes)" } else { "reported (slow-nodes)" };
    let mut lines = vec![("Out after", interval(*settings)), ("Slow nodes", slow.to_owned())];
    lines.extend(scrub_settings(settings));
    facts(&lines)
}

/// How often and how fast groups are scrubbed.
pub fn scrub_settings(settings: &ClusterSettings) -> Vec<(&'static str, String)> {
    let every = |ms, name| match ms {
        0 => format!("only when asked for ({name})"),
        ms => format!("every {} ({name})", text::interval(ms)),
    };
    vec![
        ("Scrub", every(settings.scrub_interval_ms, "scrub-interval")),
        ("Deep scrub", every(settings.deep_scrub_interval_ms, "deep-scrub-interval")),
        ("Scrub rate", format!("{}/s a shard (scrub-rate)", Amount(settings.scrub_bytes_per_second))),
    ]
}

fn space(used: u64, capacity: u64) -> String {
    format!("{} of {} used ({})", Amount(used), Amount(capacity), percent(used, capacity))
}

/// Name of the node with that number.
pub fn node_name(nodes: &[NodeStatus], id: u32) -> String {
    let named = nodes.iter().filter_map(|status| status.node.as_ref()).find(|node| node.id == id);
    match (named, id) {
        (Some(node), _) => node.name.clone(),
        (None, 0) => String::from("none"),
        (None, id) => format!("node {id}"),
    }
}

fn state(status: &NodeStatus) -> String {
    let mut text = status.state.clone();
    if status.maintenance {
        text += ", maintenance";
    }
    if status.leaving {
        text += if status.lost { ", given up" } else { ", leaving" };
    }
    if status.leader { format!("{text} (leader)") } else { text }
}

fn endpoint(address: &str, port: u32) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

pub fn nodes(nodes: &[NodeStatus]) -> String {
    let rows = nodes.iter().map(|status| {
        let node = status.node.clone().unwrap_or_default();
        vec![
            node.name,
            node.id.to_string(),
            state(status),
            endpoint(&node.address, node.control_port),
            node.failure_domain,
            status.primary_groups.to_string(),
            status.member_groups.to_string(),
            status.learner_groups.to_string(),
            status.used_bytes.map_or_else(|| "?".into(), |used| Amount(used).to_string()),
            Amount(status.capacity_bytes).to_string(),
        ]
    });
    let columns = [
        Text("NODE"),
        Number("ID"),
        Text("STATE"),
        Text("ADDRESS"),
        Text("DOMAIN"),
        Number("PRIMARY"),
        Number("REPLICAS"),
        Number("LEARNERS"),
        Number("USED"),
        Number("CAPACITY"),
    ];
    table(&columns, rows)
}

pub fn node(status: &NodeStatus) -> String {
    let node = status.node.clone().unwrap_or_default();
    let mut lines = vec![
        ("Node", format!("{} (number {})", node.name, node.id)),
        ("State", state(status)),
        (
            "Last heartbeat",
            status.last_heartbeat_age_ms.map_or_else(|| "unknown".into(), |ms| format!("{} ago", age(ms))),
        ),
        ("Voter", yes_or_no(node.voter).into()),
        (
            "Failure domain",
            if node.failure_domain.is_empty() { "its own".into() } else { node.failure_domain.clone() },
        ),
        ("Control plane", endpoint(&node.address, node.control_port)),
    ];
    if let Some(data) = &node.data {
        lines.push(("Data plane", join(data.shard_ports.iter().map(|port| endpoint(&node.address, *port)))));
        lines.push(("NBD", format!("nbd://{}", endpoint(&node.address, data.nbd_port))));
    }
    lines.push((
        "Groups",
        format!(
            "primary of {}, replica of {}, learner of {}",
            status.primary_groups, status.member_groups, status.learner_groups
        ),
    ));
    let space = match status.used_bytes {
        Some(used) => space(used, status.capacity_bytes),
        None => format!("{}; it does not say how much is used", Amount(status.capacity_bytes)),
    };
    lines.push(("Space", space));
    if !status.release.is_empty() {
        lines.push(("Release", status.release.clone()));
    }
    let mut text = facts(&lines);
    if !status.stores.is_empty() {
        text.push('\n');
        text += &stores(status);
    }
    for store in status.stores.iter().filter(|store| !store.problem.is_empty()) {
        text += &format!("\nwarning: {} {}\n", store.device, store.problem);
    }
    text
}

fn stores(status: &NodeStatus) -> String {
    // Of a node that does not answer, only what the map says is known.
    let told = |figure: &dyn Fn() -> String| if status.used_bytes.is_some() { figure() } else { "?".into() };
    let rows = status.stores.iter().map(|store| {
        vec![
            format!("{:016x}", store.id),
            store.device.clone(),
            if store.cache_device.is_empty() { "-".into() } else { store.cache_device.clone() },
            store.media.clone(),
            if store.failed { "failed".into() } else { "ok".into() },
            told(&|| Amount(store.used_bytes).to_string()),
            Amount(store.capacity_bytes).to_string(),
            told(&|| percent(store.journal_used_bytes, store.journal_bytes)),
            store.write_us_p99.map_or_else(|| "-".into(), |us| us.to_string()),
            told(&|| store.checksum_errors.to_string()),
            told(&|| store.repaired_pages.to_string()),
        ]
    });
    let columns = [
        Text("STORE"),
        Text("DEVICE"),
        Text("CACHE"),
        Text("MEDIA"),
        Text("STATE"),
        Number("USED"),
        Number("CAPACITY"),
        Number("JOURNAL"),
        Number("WRITE P99 µs"),
        Number("CHECKSUM ERRORS"),
        Number("REPAIRED PAGES"),
    ];
    table(&columns, rows)
}

pub fn volumes(volumes: &[VolumeStatus]) -> String {
    if volumes.is_empty() {
        return String::from("no volumes; make one with: xsan-cli volume create --name vm-1 --size 100GB\n");
    }
    let rows = volumes.iter().map(|status| {
        let volume = status.volume.clone().unwrap_or_default();
        vec![
            volume.name,
            Size(volume.size_bytes).to_string(),
            status.replica_count.to_string(),
            status.state.clone(),
            join(&status.attached),
            volume.policy,
        ]
    });
    let columns =
        [Text("VOLUME"), Number("SIZE"), Number("REPLICAS"), Text("STATE"), Text("ATTACHED"), Text("POLICY")];
    table(&columns, rows)
}

/// Where a volume can be opened: at each node whose data process has registered.
pub fn nbd_addresses(map: &ClusterMap, volume: &str) -> Vec<String> {
    let uri = |node: &Node| {
        let data = node.data.as_ref()?;
        Some(format!("nbd://{}/{volume}", endpoint(&node.address, data.nbd_port)))
    };
    map.nodes.iter().filter_map(uri).collect()
}

pub fn durability(number: i32) -> &'static str {
    match Durability::try_from(number) {
        Ok(Durability::OnFlush) => "on-flush",
        Ok(Durability::EveryWrite) => "every-write",
        Err(_) => "of a newer release",
    }
}

fn volume_facts(volume: &Volume) -> Vec<(&'static str, String)> {
    let bytes = volume.size_bytes;
    vec![
        ("Volume", format!("{} (number {})", volume.name, volume.id)),
        ("Size", format!("{} ({bytes} bytes)", Size(bytes))),
        ("Durability", durability(volume.durability).into()),
        ("Policy", if volume.policy.is_empty() { "none".into() } else { volume.policy.clone() }),
        ("Created", time(volume.created_unix_ms)),
    ]
}

/// A volume as the answer to a change tells it.
pub fn changed_volume(volume: &Volume) -> String {
    facts(&volume_facts(volume))
}

pub fn volume(status: &VolumeStatus, map: &ClusterMap) -> String {
    let volume = status.volume.clone().unwrap_or_default();
    let mut lines = volume_facts(&volume);
    lines.insert(1, ("State", status.state.clone()));
    lines.insert(3, ("Replicas", format!("{}, I/O needs {}", status.replica_count, status.min_replicas)));
    lines.push((
        "Attached",
        if status.attached.is_empty() { "nowhere".into() } else { join(&status.attached) },
    ));
    for (index, address) in nbd_addresses(map, &volume.name).into_iter().enumerate() {
        lines.push((if index == 0 { "Open at" } else { "" }, address));
    }
    facts(&lines)
}

/// `12 replicas, 1.20 GiB to move, 12.0 s at 100 MiB/s (assumed)`.
pub fn moves(plan: &NodePlan) -> String {
    if plan.moves == 0 {
        return "no replica to move".into();
    }
    let how = if plan.rate_is_measured { "measured" } else { "assumed" };
    format!(
        "{} and {} to move, {} at {}/s ({how})",
        count(plan.moves, "replica"),
        Amount(plan.bytes_to_move),
        age(move_ms(plan)),
        Amount(plan.bytes_per_second)
    )
}

/// Milliseconds that the moves take.
pub fn move_ms(plan: &NodePlan) -> u64 {
    plan.bytes_to_move.saturating_mul(1000).checked_div(plan.bytes_per_second).unwrap_or(0)
}

/// What giving a node up loses.
pub fn losses(plan: &NodePlan) -> String {
    let mut parts = Vec::new();
    if !plan.groups_lost.is_empty() {
        parts.push(format!(
            "LOST: the only copy of {}; blocks of {} read as zeros there",
            count(plan.groups_lost.len() as u64, "group"),
            if plan.volumes_lost.is_empty() { "no volume".into() } else { join(&plan.volumes_lost) }
        ));
    }
    if plan.groups_in_doubt > 0 {
        let groups = count(plan.groups_in_doubt, "group");
        parts.push(format!("AT RISK: of {groups} no other node that is up surely has all that was written"));
    }
    if parts.is_empty() {
        "nothing is lost: every group has another copy, whole and live".into()
    } else {
        parts.join("; ")
    }
}

/// What a change of a node would do.
pub fn plan(plan: &NodePlan) -> String {
    let risk = match (plan.groups_stopped, plan.groups_at_risk) {
        _ if !plan.groups_lost.is_empty() || plan.groups_in_doubt > 0 => losses(plan),
        (0, 0) => "none".into(),
        (0, at_risk) => format!("one more failure stops {}", count(at_risk, "group")),
        (stopped, _) => format!("no I/O in {} while it is down", count(stopped, "group")),
    };
    let verdict = match &plan.refusal {
        None => "accepted".into(),
        Some(detail) => format!("refused, error {}: {}", detail.code, detail.message),
    };
    facts(&[
        ("Node", plan.name.clone()),
        ("Groups", format!("replica of {}, primary of {}", plan.groups, plan.primary_groups)),
        ("Moves", moves(plan)),
        ("Risk", risk),
        ("Would be", verdict),
        ("Changed", "nothing: dry run".into()),
    ])
}

/// How far the removal of a node is.
pub fn progress(node: &NodeStatus, groups: &GroupCounts) -> String {
    let left = node.member_groups + node.learner_groups;
    match left {
        0 => "no replica left; the node leaves when it votes no more and no volume is attached there".into(),
        left => format!("{} left; resync: {}", count(left, "replica"), resync(groups)),
    }
}

pub fn findings(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return String::from("healthy: nothing was found\n");
    }
    let rows = findings.iter().map(|finding| {
        vec![
            finding.severity.clone(),
            finding.code.clone(),
            finding.object.clone(),
            format!("{}; {}", finding.message, finding.remedy),
        ]
    });
    table(&[Text("SEVERITY"), Text("CODE"), Text("OBJECT"), Text("WHAT")], rows)
}

pub fn events(reply: &ListEventsReply) -> String {
    let row = |event: &Event| {
        vec![time(event.unix_ms), event.kind.clone(), event.seen_by.clone(), event.message.clone()]
    };
    let columns = [Text("TIME"), Text("EVENT"), Text("SEEN BY"), Text("WHAT")];
    let mut text = match reply.events.is_empty() {
        true => String::from("no events\n"),
        false => table(&columns, reply.events.iter().map(row)),
    };
    for node in &reply.silent_nodes {
        text += &format!("note: node {node} does not answer; what it saw while it led is not listed\n");
    }
    if reply.left_out > 0 {
        text += &format!("note: {} older events are in the logs of the nodes\n", reply.left_out);
    }
    text
}
