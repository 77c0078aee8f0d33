//! When does a node serve? When its control process answers and counts its data process as up, and NBD accepts.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use xsan_client::{Address, ControlClient, Options};
use xsan_nodekit::config::NodeConfig;
use xsan_protocol::proto::ClusterStatusReply;

const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How often a node that does not serve yet says why.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Returns once the node of `config` serves.
pub async fn wait(config: &NodeConfig) {
    let options = Options {
        connect_timeout: Duration::from_millis(500),
        attempt_timeout: Duration::from_secs(2),
        deadline: Duration::from_secs(2),
        unreachable_deadline: Duration::ZERO,
    };
    let client = ControlClient::new(vec![Address::from(config.cluster.control_address())], options);
    let nbd = SocketAddr::new(config.cluster.bind_ip, config.dataplane.nbd_port);
    let mut report_at = Instant::now() + REPORT_INTERVAL;
    loop {
        let missing = match client.cluster_status().await {
            Err(error) => format!("the control process: {error}"),
            Ok(status) if !data_is_up(&status, config.numeric_id.0) => {
                String::from("the data process is not registered yet")
            }
            // Last, as each try makes the gateway look at a connection that asks for nothing.
            Ok(_) => match TcpStream::connect(nbd).await {
                Ok(_) => return,
                Err(error) => format!("the NBD gateway at {nbd}: {error}"),
            },
        };
        if Instant::now() >= report_at {
            tracing::info!("the node does not serve yet: {missing}");
            report_at += REPORT_INTERVAL;
        }
        sleep(POLL_INTERVAL).await;
    }
}

fn data_is_up(status: &ClusterStatusReply, id: u32) -> bool {
    let mine = status.nodes.iter().find(|status| status.node.as_ref().is_some_and(|node| node.id == id));
    mine.is_some_and(|status| status.state == "up")
}

/// The line that tells people and scripts that the node serves.
pub fn line(config: &NodeConfig) -> String {
    let cluster = &config.cluster;
    let nbd = SocketAddr::new(cluster.bind_ip, config.dataplane.nbd_port);
    format!("node {} serves: control {}, nbd {nbd}", cluster.node_id, cluster.control_address())
}

#[cfg(test)]
mod tests {
    use super::*;
    use xsan_protocol::proto::{Node, NodeStatus};

    #[test]
    fn only_the_own_data_process_counts() {
        let node = |id, state: &str| NodeStatus {
            node: Some(Node { id, ..Node::default() }),
            state: state.into(),
            ..NodeStatus::default()
        };
        let status = ClusterStatusReply {
            nodes: vec![node(1, "up"), node(2, "data-down")],
            ..ClusterStatusReply::default()
        };
        assert!(data_is_up(&status, 1));
        assert!(!data_is_up(&status, 2));
        assert!(!data_is_up(&status, 3));
    }

    #[test]
    fn the_line_names_node_and_addresses() {
        let mut config = NodeConfig::default();
        config.cluster.node_id = "node-001".into();
        assert_eq!(line(&config), "node node-001 serves: control 127.0.0.1:8080, nbd 127.0.0.1:10809");
    }
}
