//! A node as the cluster map has it, for tests that need a map.

use xsan_protocol::ids::{BootId, Incarnation, NodeId};
use xsan_protocol::map::{DataProcess, Node, Store};

/// A voter on loopback whose data process lives.
pub fn node_of_map(id: NodeId, incarnation: Incarnation, stores: Vec<Store>) -> Node {
    let data =
        DataProcess { incarnation, boot_id: BootId(1), shard_ports: vec![9100], nbd_port: 10809, stores };
    Node {
        id,
        name: format!("node-{:03}", id.0),
        address: std::net::IpAddr::from([127, 0, 0, 1]),
        control_port: 8080,
        failure_domain: String::new(),
        voter: true,
        data: Some(data),
    }
}
