//! Which nodes vote in Raft; the leader brings Raft's membership in line with the cluster's nodes.
//!
//! Driven by `controller`. An odd number of voters, at most `VOTERS_MAX`: an even one bears no more failures and
//! needs more acknowledgements. The other nodes follow as learners, with the same state.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use xsan_protocol::ids::NodeId;
use xsan_protocol::limits::VOTERS_MAX;

use crate::raft::handle::{Members, ProposeError, RaftHandle};
use crate::state::command::{Command, Reply};
use crate::state::{ClusterState, Departure};

/// The voters to have: the present ones first, then those whose logs are long enough, lowest ids first.
///
/// When one of the present ones is `retiring`, those who lag come last: the others may have to do without them.
pub fn wanted(members: &Members, own: u64, retiring: &BTreeSet<u64>) -> BTreeSet<u64> {
    if members.voters.iter().any(|voter| retiring.contains(voter)) {
        let stays = |node: &u64| !retiring.contains(node);
        let rank = |node: &u64| {
            let votes = members.voters.contains(node);
            (*node != own, !members.caught_up.contains(node), !votes, *node)
        };
        let mut able: Vec<u64> = members.voters.union(&members.caught_up).copied().filter(stays).collect();
        able.sort_by_key(rank);
        able.truncate(odd(able.len()));
        return if able.is_empty() { members.voters.clone() } else { able.into_iter().collect() };
    }
    let mut able: Vec<u64> = members.voters.iter().copied().collect();
    able.extend(members.caught_up.difference(&members.voters).filter(|node| !retiring.contains(node)));
    let count = odd(able.len());
    if count <= members.voters.len() {
        return members.voters.clone();
    }
    able.into_iter().take(count).collect()
}

/// How many of so many vote.
fn odd(able: usize) -> usize {
    let most = able.min(VOTERS_MAX);
    if most.is_multiple_of(2) { most.saturating_sub(1) } else { most }
}

/// Nodes that are to leave and hold nothing any more: till then their votes count.
pub fn retiring(state: &ClusterState) -> BTreeSet<NodeId> {
    let nodes = state.map().nodes.keys().copied();
    nodes.filter(|node| state.departure(*node) != Departure::Stays && !state.has_replicas(*node)).collect()
}

/// One step towards what is wanted.
///
/// # Errors
/// This node does not lead, or a change is under way: the next step tries again.
pub async fn reconcile(handle: &RaftHandle) -> Result<(), ProposeError> {
    let members = handle.members();
    if members.is_joint {
        // A leader that died in the middle of a change left it so, and Raft does not end it by itself: if one half lost its
        // quorum, the other would be worth nothing.
        tracing::info!(voters = ?members.voters, "ending a change of the voters");
        return handle.change_voters(members.voters).await;
    }
    let state = handle.state();
    for node in state.map().nodes.values() {
        let id = u64::from(node.id.0);
        if !members.addresses.contains_key(&id) {
            let address = SocketAddr::new(node.address, node.control_port).to_string();
            tracing::info!(node = id, address, "replicating to a new node");
            return handle.add_learner(id, &address).await;
        }
    }
    let retiring = retiring(&state);
    let retiring_ids = retiring.iter().map(|node| u64::from(node.0)).collect();
    let voters = wanted(&members, u64::from(handle.node().0), &retiring_ids);
    if voters != members.voters {
        tracing::info!(?voters, "changing the voters");
        return handle.change_voters(voters).await;
    }
    for node in retiring.iter().filter(|node| !members.voters.contains(&u64::from(node.0))) {
        remove(handle, *node).await?;
    }
    let was_removed = |id: &u64| u32::try_from(*id).is_ok_and(|id| state.was_removed(NodeId(id)));
    let gone = members.addresses.keys().copied().filter(|id| was_removed(id) && !members.voters.contains(id));
    for id in gone {
        tracing::info!(node = id, "replicating no more to a removed node");
        handle.remove_learner(id).await?;
    }
    Ok(())
}

/// Takes a node out of the map; it is told by its own log, or by the answer to its next beat.
async fn remove(handle: &RaftHandle, node: NodeId) -> Result<(), ProposeError> {
    match handle.propose_here(Command::RemoveNode { node }).await? {
        Reply::Refused(refusal) => {
            tracing::debug!(code = refusal.code.number(), "a node stays for now: {}", refusal.message);
        }
        _ => tracing::info!(%node, "a node was removed"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::raft::network::Channels;
    use crate::raft::tests::{joint_membership, open};
    use crate::timing::RaftTiming;

    fn members(voters: &[u64], caught_up: &[u64]) -> Members {
        Members {
            voters: voters.iter().copied().collect(),
            caught_up: caught_up.iter().copied().collect(),
            ..Members::default()
        }
    }

    fn check(voters: &[u64], caught_up: &[u64], expected: &[u64]) {
        let found = wanted(&members(voters, caught_up), 1, &BTreeSet::new());
        assert_eq!(found, expected.iter().copied().collect());
    }

    fn check_without(retiring: u64, voters: &[u64], caught_up: &[u64], expected: &[u64]) {
        let found = wanted(&members(voters, caught_up), 1, &[retiring].into());
        assert_eq!(found, expected.iter().copied().collect());
    }

    #[test]
    fn voters_are_odd_in_number_and_at_most_five() {
        check(&[1], &[1], &[1]);
        check(&[1], &[1, 2], &[1]);
        check(&[1], &[1, 2, 3], &[1, 2, 3]);
        check(&[1, 2, 3], &[1, 2, 3, 4], &[1, 2, 3]);
        check(&[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5]);
        check(&[1, 2, 3], &[4, 5, 6, 7], &[1, 2, 3, 4, 5]);
        check(&[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5, 6, 7], &[1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_node_that_leaves_votes_no_more_and_another_takes_its_place() {
        check_without(3, &[1, 2, 3], &[1, 2, 3, 4], &[1, 2, 4]);
        check_without(1, &[1, 2, 3], &[1, 2, 3, 4], &[2, 3, 4]);
        check_without(3, &[1, 2, 3], &[1, 2, 3], &[1]);
        check_without(4, &[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 3]);
        // A voter that lags is better than none, and worse than one that does not.
        check_without(3, &[1, 2, 3], &[1, 4], &[1, 2, 4]);
        check_without(3, &[1, 2, 3], &[1, 4, 5], &[1, 4, 5]);
        check_without(1, &[1], &[1], &[1]);
    }

    #[test]
    fn a_voter_that_lags_stays_one() {
        check(&[1, 2, 3], &[1, 3], &[1, 2, 3]);
    }

    /// A leader died between the two steps of a change. No later one ended it: the union of both halves was taken for the
    /// voters, and that was what was wanted.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_change_that_a_dead_leader_left_half_done_is_ended() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (mut log, machine) = open(directory.path());
        joint_membership(&mut log).await;
        let timing = RaftTiming::new(Duration::from_millis(400));
        let started = RaftHandle::start(NodeId(1), "c1", log, machine, timing, Channels::default());
        let handle = started.await.expect("it starts");
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while handle.members().voters.is_empty() {
            assert!(tokio::time::Instant::now() < end, "Raft does not tell its members");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(handle.members().is_joint);
        while handle.members().is_joint {
            assert!(tokio::time::Instant::now() < end, "the membership stays joint");
            if let Err(error) = reconcile(&handle).await {
                assert_eq!(error, ProposeError::NotLeader, "it is not elected yet");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(handle.members().voters, [1].into());
        handle.shutdown().await;
    }
}
