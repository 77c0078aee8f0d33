//! The cluster as its gRPC API shows it, for waiting and for checks: blocking, typed, with deadlines.
//!
//! What a user sees goes through `xsan-cli`; this is for what is asked for many times a second.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tonic::transport::{Channel, Endpoint};
use xsan_protocol::proto::cluster_client::ClusterClient;
use xsan_protocol::proto::{
    ClusterMap, ClusterStatusReply, ClusterStatusRequest, GetMapRequest, GetVolumeRequest, LocateBlockReply,
    LocateBlockRequest, PerfStatsReply, PerfStatsRequest, ScrubStatusReply, ScrubStatusRequest, VolumeStatus,
};

const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the first of several nodes that answers.
#[derive(Clone, Debug)]
pub struct Control {
    addresses: Vec<SocketAddr>,
}

impl Control {
    pub const fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { addresses }
    }

    pub fn status(&self) -> Result<ClusterStatusReply> {
        self.call(async |mut client| client.cluster_status(ClusterStatusRequest {}).await)
    }

    pub fn map(&self) -> Result<ClusterMap> {
        self.call(async |mut client| client.get_map(GetMapRequest {}).await)
    }

    pub fn volume(&self, name: &str) -> Result<VolumeStatus> {
        self.call(async |mut client| client.get_volume(GetVolumeRequest { name: name.to_owned() }).await)
    }

    pub fn locate(&self, volume: &str, block_index: u64) -> Result<LocateBlockReply> {
        let request = LocateBlockRequest { volume: volume.to_owned(), block_index };
        self.call(async |mut client| client.locate_block(request.clone()).await)
    }

    pub fn perf_stats(&self) -> Result<PerfStatsReply> {
        self.call(async |mut client| client.perf_stats(PerfStatsRequest { node: None }).await)
    }

    pub fn scrub_status(&self) -> Result<ScrubStatusReply> {
        self.call(async |mut client| client.scrub_status(ScrubStatusRequest {}).await)
    }

    fn call<T, F>(&self, request: impl Fn(ClusterClient<Channel>) -> F) -> Result<T>
    where
        F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut last = anyhow!("there is no node to ask");
        for address in &self.addresses {
            match runtime.block_on(ask(*address, &request)) {
                Ok(reply) => return Ok(reply),
                Err(error) => last = error.context(format!("asking {address}")),
            }
        }
        Err(last)
    }
}

async fn ask<T, F>(address: SocketAddr, request: impl Fn(ClusterClient<Channel>) -> F) -> Result<T>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CALL_TIMEOUT);
    let channel = endpoint.timeout(CALL_TIMEOUT).connect().await.context("connecting")?;
    match tokio::time::timeout(CALL_TIMEOUT, request(ClusterClient::new(channel))).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => bail!("{}: {}", status.code(), status.message()),
        Err(_) => bail!("no answer within {CALL_TIMEOUT:?}"),
    }
}

/// Whether there is a leader, every node is up and every replica of every group acts. Where volumes are, there are groups.
pub fn is_healthy(status: &ClusterStatusReply, node_count: usize) -> bool {
    let groups = status.groups.unwrap_or_default();
    status.nodes.len() == node_count
        && status.nodes.iter().any(|node| node.leader)
        && status.nodes.iter().all(|node| node.state == "up")
        && (groups.total > 0 || status.volume_count == 0)
        && groups.healthy == groups.total
        && groups.resyncing == 0
}

/// The life of the data process of a node; `None` when it has had none.
pub fn life(status: &ClusterStatusReply, node: &str) -> Option<u64> {
    let nodes = status.nodes.iter().filter_map(|status| status.node.as_ref());
    nodes.into_iter().find(|found| found.name == node)?.data.as_ref().map(|data| data.incarnation)
}

/// One line of what a status says, for messages.
pub fn summary(status: &ClusterStatusReply) -> String {
    let groups = status.groups.unwrap_or_default();
    let states: Vec<&str> = status.nodes.iter().map(|node| node.state.as_str()).collect();
    format!(
        "{}nodes {}; groups {} of {} healthy, {} degraded, {} resyncing, {} inactive; {} bytes to resync",
        if status.nodes.iter().any(|node| node.leader) { "" } else { "no leader; " },
        states.join("/"),
        groups.healthy,
        groups.total,
        groups.degraded,
        groups.resyncing,
        groups.inactive,
        groups.resync_bytes_left
    )
}

/// Pages of damaged stores that were rewritten from other replicas, over the whole cluster.
pub fn repaired_pages(status: &ClusterStatusReply) -> u64 {
    status.nodes.iter().flat_map(|node| &node.stores).map(|store| store.repaired_pages).sum()
}

#[cfg(test)]
mod tests {
    use xsan_protocol::proto::{DataProcess, GroupCounts, Node, NodeStatus};

    use super::*;

    fn healthy() -> ClusterStatusReply {
        let node = |id: u32| NodeStatus {
            node: Some(Node {
                name: format!("node-{id}"),
                data: Some(DataProcess { incarnation: u64::from(id) * 100, ..Default::default() }),
                ..Default::default()
            }),
            state: "up".to_owned(),
            leader: id == 2,
            ..Default::default()
        };
        ClusterStatusReply {
            nodes: (1..=3).map(node).collect(),
            volume_count: 1,
            groups: Some(GroupCounts { total: 256, healthy: 256, ..Default::default() }),
            ..Default::default()
        }
    }

    /// A cluster whose leader had just died passed for healthy, and so did one of which nothing was known.
    #[test]
    fn what_only_looks_healthy_is_not() {
        let is = |change: &dyn Fn(&mut ClusterStatusReply)| {
            let mut status = healthy();
            change(&mut status);
            is_healthy(&status, 3)
        };
        assert!(is(&|_| {}));
        assert!(!is(&|status| status.nodes[1].leader = false), "nobody leads");
        assert!(!is(&|status| status.groups = None), "a volume without groups");
        assert!(!is(&|status| status.nodes[0].state = "down".to_owned()));
        assert!(!is(&|status| status.groups.as_mut().unwrap().healthy = 255));
        assert!(!is(&|status| drop(status.nodes.pop())));
        assert!(is(&|status| (status.volume_count, status.groups) = (0, None)), "an empty cluster");
    }

    #[test]
    fn the_life_of_a_data_process_is_found_by_its_nodes_name() {
        assert_eq!(life(&healthy(), "node-3"), Some(300));
        assert_eq!(life(&healthy(), "node-4"), None);
    }
}
