//! Who is in the cluster: joining, the voters of Raft, and the beats by which nodes are known to live.

pub mod heartbeat;
pub mod join;
pub mod voters;
