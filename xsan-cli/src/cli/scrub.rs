//! Scrubs: have groups scrubbed now, take that back, and what the last ones found.

use serde_json::{Value, json};
use xsan_client::ControlClient;
use xsan_nodekit::size::Amount;
use xsan_protocol::ids::GroupId;
use xsan_protocol::proto::{
    GroupScrub, ScrubFindings, ScrubResult, ScrubStatusReply, StartScrubRequest, StopScrubRequest,
};

use super::args::ScrubCommand;
use super::{json as fields, show};
use crate::failure::Failure;
use crate::text::{Number, Text, count, facts, join, table, time};

pub async fn run(client: &ControlClient, command: ScrubCommand, as_json: bool) -> Result<String, Failure> {
    match command {
        ScrubCommand::Start { deep, group, volume, all: _ } => {
            let groups = client.start_scrub(StartScrubRequest { deep, group, volume }).await?.groups;
            let kind = if deep { "deep scrub" } else { "scrub" };
            let text = format!("{kind} of {} begins; xsan-cli scrub status shows it", count(groups, "group"));
            Ok(if as_json { format!("{:#}", json!({ "groups": groups, "deep": deep })) } else { text })
        }
        ScrubCommand::Stop => {
            let groups = client.stop_scrub(StopScrubRequest {}).await?.groups;
            let text = match groups {
                0 => String::from("nothing was asked for; regular scrubs go on as their intervals say"),
                groups => format!("{} are not scrubbed but as the intervals say", count(groups, "group")),
            };
            Ok(if as_json { format!("{:#}", json!({ "groups": groups })) } else { text })
        }
        ScrubCommand::Status => {
            let status = client.scrub_status().await?;
            Ok(if as_json { format!("{:#}", to_json(&status)) } else { show_status(&status) })
        }
    }
}

fn found(result: &ScrubResult) -> ScrubFindings {
    result.findings.unwrap_or_default()
}

/// The last scrubs of a group, the newest first.
fn results(group: &GroupScrub) -> impl Iterator<Item = &ScrubResult> {
    group.last_light.iter().chain(&group.last_deep)
}

fn has_findings(found: &ScrubFindings) -> bool {
    found.damaged_pages > 0 || found.lost_pages > 0 || found.differences > 0
}

fn total(groups: &[GroupScrub]) -> ScrubFindings {
    groups.iter().map(|group| group.found.unwrap_or_default()).fold(ScrubFindings::default(), |sum, found| {
        ScrubFindings {
            damaged_pages: sum.damaged_pages + found.damaged_pages,
            mended_pages: sum.mended_pages + found.mended_pages,
            lost_pages: sum.lost_pages + found.lost_pages,
            differences: sum.differences + found.differences,
            ..sum
        }
    })
}

fn oldest(groups: &[GroupScrub], when: impl Fn(&GroupScrub) -> u64) -> Option<u64> {
    groups.iter().map(when).filter(|unix_ms| *unix_ms > 0).min()
}

pub fn show_status(status: &ScrubStatusReply) -> String {
    let groups = &status.groups;
    let running: Vec<_> = groups.iter().filter(|group| group.running).collect();
    let wished = groups.iter().filter(|group| group.wish.is_some()).count() as u64;
    let scrubbed = groups.iter().filter(|group| results(group).next().is_some()).count();
    let run = |group: &&GroupScrub| {
        let (kind, so_far) =
            (if group.running_deep { "deep, " } else { "" }, group.so_far.unwrap_or_default());
        format!("{} on {} ({kind}{} read)", GroupId(group.group), group.node, Amount(so_far.bytes))
    };
    let when = |unix_ms: Option<u64>| unix_ms.map_or_else(|| "never".to_owned(), time);
    let sum = total(groups);
    let mut lines = show::scrub_settings(&status.settings.unwrap_or_default());
    lines.extend([
        ("Running", if running.is_empty() { "nothing".into() } else { join(running.iter().map(run)) }),
        ("Reads", format!("{}/s", Amount(status.bytes_per_second))),
        (
            "Asked for",
            if wished == 0 { "nothing".into() } else { format!("{} left", count(wished, "group")) },
        ),
        ("Scrubbed", format!("{scrubbed} of {}", count(groups.len() as u64, "group"))),
        ("Oldest", when(oldest(groups, |group| group.light_unix_ms))),
        ("Oldest deep", when(oldest(groups, |group| group.deep_unix_ms))),
        (
            "Found",
            format!(
                "{} damaged, {} mended, {} lost, {} different",
                count(sum.damaged_pages, "page"),
                sum.mended_pages,
                sum.lost_pages,
                count(sum.differences, "unit")
            ),
        ),
    ]);
    let mut text = facts(&lines);
    let row_of = |group| results(group).filter_map(|result| row(group, result));
    let rows: Vec<Vec<String>> = groups.iter().flat_map(row_of).collect();
    if !rows.is_empty() {
        let columns = [
            Text("GROUP"),
            Text("KIND"),
            Text("ENDED"),
            Number("DAMAGED"),
            Number("MENDED"),
            Number("LOST"),
            Number("DIFFERENT"),
            Number("REBUILT"),
        ];
        text.push('\n');
        text += &table(&columns, rows);
    }
    text
}

/// A scrub that found something.
fn row(group: &GroupScrub, last: &ScrubResult) -> Option<Vec<String>> {
    let found = Some(found(last)).filter(has_findings)?;
    Some(vec![
        GroupId(group.group).to_string(),
        if last.deep { "deep".into() } else { "light".into() },
        time(last.unix_ms),
        found.damaged_pages.to_string(),
        found.mended_pages.to_string(),
        found.lost_pages.to_string(),
        found.differences.to_string(),
        found.rebuilt_replicas.to_string(),
    ])
}

pub fn to_json(status: &ScrubStatusReply) -> Value {
    let result = |last: &ScrubResult| json!({ "unix_ms": last.unix_ms, "findings": findings(&found(last)) });
    let group = |group: &GroupScrub| {
        json!({
            "group": group.group,
            "light_unix_ms": group.light_unix_ms,
            "deep_unix_ms": group.deep_unix_ms,
            "last_light": group.last_light.as_ref().map(result),
            "last_deep": group.last_deep.as_ref().map(result),
            "found": findings(&group.found.unwrap_or_default()),
            "wish": group.wish.as_ref().map(|wish| json!({ "deep": wish.deep, "unix_ms": wish.unix_ms })),
            "running": group.running.then(|| json!({
                "deep": group.running_deep,
                "node": group.node,
                "findings": findings(&group.so_far.unwrap_or_default()),
            })),
        })
    };
    json!({
        "settings": status.settings.as_ref().map(fields::settings),
        "bytes_per_second": status.bytes_per_second,
        "wished": status.groups.iter().filter(|group| group.wish.is_some()).count(),
        "found": findings(&total(&status.groups)),
        "groups": status.groups.iter().map(group).collect::<Value>(),
    })
}

fn findings(found: &ScrubFindings) -> Value {
    json!({
        "blocks": found.blocks,
        "bytes": found.bytes,
        "damaged_pages": found.damaged_pages,
        "mended_pages": found.mended_pages,
        "lost_pages": found.lost_pages,
        "differences": found.differences,
        "rebuilt_replicas": found.rebuilt_replicas,
        "skipped_units": found.skipped_units,
    })
}

#[cfg(test)]
mod tests {
    use xsan_protocol::proto::{ClusterSettings, ScrubWish};

    use super::*;

    fn status() -> ScrubStatusReply {
        let last = |lost_pages| ScrubResult {
            deep: true,
            unix_ms: 1_795_235_400_000,
            findings: Some(ScrubFindings {
                damaged_pages: 2 * lost_pages,
                mended_pages: lost_pages,
                lost_pages,
                ..Default::default()
            }),
        };
        let group = |group: u32, lost| GroupScrub {
            group: 1 << 16 | group,
            light_unix_ms: 1_795_235_400_000,
            deep_unix_ms: 1_795_235_400_000 - u64::from(group),
            last_deep: Some(last(lost)),
            found: last(lost).findings,
            ..GroupScrub::default()
        };
        let wish = Some(ScrubWish { deep: true, unix_ms: 5 });
        let so_far = Some(ScrubFindings { bytes: 3 << 20, ..Default::default() });
        let running = GroupScrub {
            wish,
            running: true,
            running_deep: true,
            node: "node-002".into(),
            so_far,
            ..GroupScrub::default()
        };
        ScrubStatusReply {
            settings: Some(ClusterSettings {
                down_out_interval_ms: 600_000,
                scrub_bytes_per_second: 50 << 20,
                scrub_interval_ms: 86_400_000,
                deep_scrub_interval_ms: 0,
                demote_slow_nodes: false,
            }),
            bytes_per_second: 12 << 20,
            groups: vec![GroupScrub { group: 1 << 16, ..running }, group(1, 0), group(2, 1)],
        }
    }

    #[test]
    fn the_status_tells_what_runs_what_is_left_and_what_was_found() {
        let shown = show_status(&status());
        assert_eq!(
            shown.lines().collect::<Vec<_>>(),
            [
                "Scrub        every 24 h (scrub-interval)",
                "Deep scrub   only when asked for (deep-scrub-interval)",
                "Scrub rate   50 MiB/s a shard (scrub-rate)",
                "Running      1.0 on node-002 (deep, 3 MiB read)",
                "Reads        12 MiB/s",
                "Asked for    1 group left",
                "Scrubbed     2 of 3 groups",
                "Oldest       2026-11-21 04:30:00 UTC",
                "Oldest deep  2026-11-21 04:29:59 UTC",
                "Found        2 pages damaged, 1 mended, 1 lost, 0 units different",
                "",
                "GROUP  KIND  ENDED                    DAMAGED  MENDED  LOST  DIFFERENT  REBUILT",
                "1.2    deep  2026-11-21 04:30:00 UTC        2       1     1          0        0",
            ]
        );
    }

    #[test]
    fn programs_are_told_all_of_it() {
        let value = to_json(&status());
        assert_eq!((&value["wished"], &value["bytes_per_second"]), (&json!(1), &json!(12 << 20)));
        assert_eq!(value["groups"][0]["running"]["node"], "node-002");
        assert_eq!(value["groups"][2]["last_deep"]["findings"]["lost_pages"], 1);
        assert_eq!(
            (&value["groups"][2]["found"]["lost_pages"], &value["found"]["lost_pages"]),
            (&json!(1), &json!(1))
        );
        assert_eq!(value["groups"][1]["running"], Value::Null);
        assert_eq!(value["settings"]["deep_scrub_interval_ms"], 0);
    }
}
