//! Frames between data processes, and between the two processes of a node.
//!
//! A frame is a 64-byte header, then `payload_length` bytes: the opcode's fixed part (`meta`), the page
//! checksum table (4 bytes for each page of data) and the data. `payload_crc` covers meta and table; the
//! table covers the data, page by page, so that a checksum made at the gateway is the one on disk.

pub mod header;
pub mod replication;
pub mod session;
