//! Frames and the connections that carry them between shards of different processes.

pub mod connection;
pub mod frame;
pub mod listener;
pub mod notify;
pub mod receive;
