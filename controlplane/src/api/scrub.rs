//! Scrubs asked for, and how all of them stand.

use std::collections::{BTreeSet, HashMap};

use xsan_protocol::ids::{BlockIndex, GroupId};
use xsan_protocol::proto;
use xsan_protocol::proto::ScrubWish;
use xsan_protocol::units::BLOCK_SIZE;

use super::error::ApiError;
use super::life::BLOCKS_LOOKED_AT;
use super::survey::Survey;
use super::{Context, find_volume, status};
use crate::clock::unix_ms;
use crate::state::ClusterState;
use crate::state::command::{Command, Reply};

/// # Errors
/// 304 `VolumeNotFound`, 2 `InvalidArgument` for a group that is none.
pub async fn start(
    context: &Context,
    request: proto::StartScrubRequest,
) -> Result<proto::StartScrubReply, ApiError> {
    if let (None, Some(volume)) = (request.group, &request.volume) {
        context.number_of(volume).await?;
    }
    let groups = chosen(&context.handle.state(), &request)?;
    let count = groups.len() as u32;
    let wish = Some(ScrubWish { deep: request.deep, unix_ms: unix_ms() });
    context.propose(Command::WishScrubs { groups, wish }).await?;
    Ok(proto::StartScrubReply { groups: count })
}

fn chosen(state: &ClusterState, request: &proto::StartScrubRequest) -> Result<Vec<GroupId>, ApiError> {
    if let Some(group) = request.group.map(GroupId) {
        let known = state.map().groups.contains_key(&group);
        let error = || ApiError::Invalid { field: "group", object: format!("group {group}") };
        return known.then(|| vec![group]).ok_or_else(error);
    }
    let Some(volume) = &request.volume else {
        return Ok(state.groups().map(|(_, group)| group.id).collect());
    };
    let volume = find_volume(state, volume)?;
    let pool = state.map().pools.get(&volume.pool).ok_or(ApiError::Unexpected)?;
    let blocks = volume.size_bytes.div_ceil(BLOCK_SIZE as u64).min(BLOCKS_LOOKED_AT);
    let index = |block: u64| BlockIndex(u32::try_from(block).expect("few are looked at"));
    let groups: BTreeSet<GroupId> =
        (0..blocks).map(|block| pool.group_of(volume.lineage, index(block))).collect();
    Ok(groups.into_iter().collect())
}

/// Takes all wishes back, also those that this node has not heard of yet.
pub async fn stop(context: &Context) -> Result<proto::StopScrubReply, ApiError> {
    let groups = context.handle.state().groups().map(|(_, group)| group.id).collect();
    match context.propose(Command::WishScrubs { groups, wish: None }).await? {
        Reply::Groups { changed, .. } => Ok(proto::StopScrubReply { groups: changed }),
        _ => Err(ApiError::Unexpected),
    }
}

/// Every group with its last scrubs, and what runs.
pub fn show(survey: &Survey) -> proto::ScrubStatusReply {
    let state = &survey.state;
    let running: HashMap<u32, (String, proto::ScrubReport)> = survey
        .answers
        .iter()
        .flat_map(|(node, answer)| {
            let name = state.map().nodes.get(node).map_or_else(|| node.to_string(), |node| node.name.clone());
            let reports = answer.status.data.iter().flat_map(|data| &data.scrubs_running);
            reports.map(move |report| (report.order.unwrap_or_default().group, (name.clone(), *report)))
        })
        .collect();
    let group = |id: GroupId| {
        let scrubs = state.scrubs(id);
        let runs = running.get(&id.0);
        proto::GroupScrub {
            group: id.0,
            light_unix_ms: scrubs.light_unix_ms,
            deep_unix_ms: scrubs.deep_unix_ms,
            last_light: scrubs.last_light,
            last_deep: scrubs.last_deep,
            found: Some(scrubs.found()),
            wish: scrubs.wish,
            running: runs.is_some(),
            running_deep: runs.is_some_and(|(_, report)| report.order.unwrap_or_default().deep),
            node: runs.map(|(name, _)| name.clone()).unwrap_or_default(),
            so_far: runs.and_then(|(_, report)| report.findings),
        }
    };
    proto::ScrubStatusReply {
        settings: Some(status::settings(state)),
        bytes_per_second: survey.answers.values().map(|answer| answer.status.scrub_bytes_per_second).sum(),
        groups: state.groups().map(|(_, known)| group(known.id)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{answers, state, survey};
    use super::*;

    #[test]
    fn a_volume_has_the_groups_of_its_blocks() {
        let state = state(3, 3);
        let ask = |volume: Option<&str>, group| proto::StartScrubRequest {
            deep: true,
            group,
            volume: volume.map(str::to_owned),
        };
        assert_eq!(chosen(&state, &ask(None, None)).expect("all").len(), 256);
        let of_volume = chosen(&state, &ask(Some("vm"), None)).expect("it exists");
        assert!(of_volume.len() > 128 && of_volume.len() <= 256, "256 blocks in 256 groups");
        assert_eq!(chosen(&state, &ask(None, Some(of_volume[3].0))).expect("one"), [of_volume[3]]);
        chosen(&state, &ask(None, Some(1))).expect_err("no such group");
        chosen(&state, &ask(Some("vm-9"), None)).expect_err("no such volume");
        // A script whose variable was not set had every group scrubbed.
        chosen(&state, &ask(Some(""), None)).expect_err("no volume has no name");
    }

    #[test]
    fn what_runs_is_shown_with_its_node() {
        let state = state(3, 3);
        let group = state.groups().next().expect("a group").1.id;
        let mut answers = answers(3, &[]);
        let answer = answers.values_mut().next().expect("it answers");
        let order = Some(proto::ScrubOrder { group: group.0, deep: true, number: 1 });
        let findings = Some(proto::ScrubFindings { bytes: 77, ..Default::default() });
        answer.status.data.as_mut().expect("data").scrubs_running =
            vec![proto::ScrubReport { order, findings }];
        answer.status.scrub_bytes_per_second = 5;
        let shown = show(&survey(&state, answers));
        assert_eq!((shown.groups.len(), shown.bytes_per_second), (256, 5));
        let runs: Vec<_> = shown.groups.iter().filter(|group| group.running).collect();
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].group, runs[0].running_deep, runs[0].so_far), (group.0, true, findings));
        assert!(runs[0].node.starts_with('n'));
    }
}
