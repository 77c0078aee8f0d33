//! Which nodes vote in Raft; the leader brings Raft's membership in line with the cluster's nodes.
//!
//! Driven by `controller`. An odd number of voters, at most `VOTERS_MAX`: an even one bears no more failures and
//! needs more acknowledgements. The other nodes follow as learners, with the same state.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use xsan_protocol::limits::VOTERS_MAX;

use crate::raft::handle::{Members, ProposeError, RaftHandle};

/// The voters to have: the present ones first, then those whose logs are long enough, lowest ids first.
pub fn wanted(members: &Members) -> BTreeSet<u64> {
    let mut able: Vec<u64> = members.voters.iter().copied().collect();
    able.extend(members.caught_up.difference(&members.voters));
    let most = able.len().min(VOTERS_MAX);
    let count = if most.is_multiple_of(2) { most.saturating_sub(1) } else { most };
    if count <= members.voters.len() {
        return members.voters.clone();
    }
    able.into_iter().take(count).collect()
}

/// One step towards what is wanted.
///
/// # Errors
/// This node does not lead, or a change is under way: the next step tries again.
pub async fn reconcile(handle: &RaftHandle) -> Result<(), ProposeError> {
    let members = handle.members();
    let state = handle.state();
    for node in state.map().nodes.values() {
        let id = u64::from(node.id.0);
        if !members.addresses.contains_key(&id) {
            let address = SocketAddr::new(node.address, node.control_port).to_string();
            tracing::info!(node = id, address, "replicating to a new node");
            return handle.add_learner(id, &address).await;
        }
    }
    let voters = wanted(&members);
    if voters != members.voters {
        tracing::info!(?voters, "changing the voters");
        handle.change_voters(voters).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(voters: &[u64], caught_up: &[u64]) -> Members {
        Members {
            voters: voters.iter().copied().collect(),
            caught_up: caught_up.iter().copied().collect(),
            ..Members::default()
        }
    }

    fn check(voters: &[u64], caught_up: &[u64], expected: &[u64]) {
        assert_eq!(wanted(&members(voters, caught_up)), expected.iter().copied().collect());
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
    fn a_voter_that_lags_stays_one() {
        check(&[1, 2, 3], &[1, 3], &[1, 2, 3]);
    }
}
