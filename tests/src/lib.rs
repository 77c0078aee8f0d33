//! Harness for whole clusters of real processes, on this host's loopback addresses or in network namespaces.
//!
//! Used by the process-level tests (`tests/tests/process`) and by the demo, the soak and the benchmark
//! (`tests/src/bin`). It knows XSAN only from outside: its commands, its gRPC API, NBD and `/proc`. It never
//! links the data plane or the control plane.
//!
//! Invariants
//! - Every wait has a deadline and names what it waited for; nothing sleeps and hopes.
//! - Only processes that the harness started are signalled, through their pidfd, never by name.
//! - What was started is dead, and its directory gone, when its owner is dropped (kept when a test fails).

pub mod cluster;
pub mod control;
pub mod crowd;
pub mod device;
pub mod fio;
pub mod flushes;
pub mod foreground;
pub mod garbage;
pub mod history;
pub mod image;
pub mod machine;
pub mod namespace;
pub mod nbd;
pub mod network;
pub mod node;
pub mod process;
pub mod random;
pub mod rot;
pub mod stamp;
pub mod switch;
pub mod throttle;
pub mod tools;
pub mod wait;
pub mod writer;
