//! Raft: the one module that knows openraft.
//!
//! `log_store` keeps vote, log and snapshots in redb, which must survive power loss; `state_machine` keeps the
//! applied state in sled, which can be rebuilt from them; `network` and `service` are the two ends of its
//! messages; `handle` is what the rest of the control plane sees.
//!
//! Invariants
//! - Vote and log entries are on stable media before they are answered.
//! - A storage error ends Raft, and with it the process: its supervisor starts it again.
//! - Leadership is never handed over on purpose: see `timing` for why a hand-over would need more care.
//!
//! Source: Ongaro, "Consensus: Bridging Theory and Practice", 2014.

pub mod encoding;
pub mod handle;
pub mod log_store;
mod log_writer;
pub mod network;
pub mod service;
pub mod state_machine;

use openraft::impls::{BasicNode, leader_id_std};

use crate::state::command::{Command, Reply};

openraft::declare_raft_types!(
    /// One leader per term; commands of the cluster state.
    pub TypeConfig:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = BasicNode,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
);

pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Vec<u8>>;
pub type Raft = openraft::Raft<TypeConfig, state_machine::StateMachine>;

#[cfg(test)]
pub(crate) mod tests;
