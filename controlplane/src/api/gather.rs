//! What only the nodes themselves know, asked of all at once, each within a deadline.

use std::net::SocketAddr;

use futures::future::join_all;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use xsan_protocol::ids::{BlockIndex, NodeId};
use xsan_protocol::map::{Group, Member, Node, Volume};
use xsan_protocol::proto;
use xsan_protocol::proto::link_message::Body;
use xsan_protocol::proto::raft_client::RaftClient;

use super::Context;
use super::error::ApiError;
use crate::clock::{BootTime, unix_ms};
use crate::events::EVENTS_MAX;
use crate::state::ClusterState;
use crate::timing::GATHER_WAIT;

/// Names the node that is asked.
const NODE_KEY: &str = "xsan-node";

pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// What this node knows of itself; on the leader, of the others too.
pub fn local_status(context: &Context) -> proto::LocalStatusReply {
    proto::LocalStatusReply {
        data: context.link.status(),
        release: RELEASE.to_owned(),
        health: context.leader.health(BootTime::now()),
        resync_bytes_per_second: context.link.resync_rate(),
        unix_ms: unix_ms(),
        scrub_bytes_per_second: context.link.scrub_rate(),
    }
}

/// The latencies and counters of this node's data process; `None` when it does not answer.
pub async fn local_perf(context: &Context) -> Option<proto::PerfStatsReply> {
    let ask = Body::PerfStatsRequest(proto::PerfStatsRequest::default());
    match context.link.request(ask, GATHER_WAIT).await {
        Ok(Body::PerfStats(reply)) => Some(reply),
        _ => None,
    }
}

/// Where this node's data process has a block; `None` when it does not answer.
pub async fn local_block(context: &Context, query: proto::BlockQuery) -> Option<proto::BlockReplica> {
    match context.link.request(Body::BlockQuery(query), GATHER_WAIT).await {
        Ok(Body::BlockReplica(replica)) => Some(replica),
        _ => None,
    }
}

fn client(context: &Context, node: &Node) -> Option<RaftClient<Channel>> {
    context.channels.client(&SocketAddr::new(node.address, node.control_port).to_string()).ok()
}

/// What is asked of a node, by its name: where it was, another one may be now.
fn to<T>(node: &Node, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(NODE_KEY, MetadataValue::from(node.id.0));
    request
}

/// Refuses what is asked of another node.
pub fn check_addressee<T>(own: NodeId, request: &Request<T>) -> Result<(), ApiError> {
    let own = MetadataValue::from(own.0);
    let is_other = request.metadata().get(NODE_KEY).is_some_and(|node| *node != own);
    if is_other { Err(ApiError::OtherNode) } else { Ok(()) }
}

/// The answer of another node; `None` when it does not come in time.
async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Option<T> {
    Some(tokio::time::timeout(GATHER_WAIT * 2, call).await.ok()?.ok()?.into_inner())
}

pub async fn status(context: &Context, node: &Node) -> Option<proto::LocalStatusReply> {
    if node.id == context.handle.node() {
        return Some(local_status(context));
    }
    let mut client = client(context, node)?;
    within(client.local_status(to(node, proto::LocalStatusRequest {}))).await
}

/// What the nodes saw happen while they led, the oldest first, each by its own clock; of those that are no node any more nothing.
pub async fn events(context: &Context) -> proto::ListEventsReply {
    let state = context.handle.state();
    let ask = async |node: &Node| {
        if node.id == context.handle.node() {
            return Some(local_events(context));
        }
        let mut client = client(context, node)?;
        within(client.local_events(to(node, proto::ListEventsRequest {}))).await
    };
    let nodes = || state.map().nodes.values();
    let replies = join_all(nodes().map(ask)).await;
    let mut all = proto::ListEventsReply::default();
    for (node, reply) in nodes().zip(replies) {
        match reply {
            Some(reply) => {
                let named = |event| proto::Event { seen_by: node.name.clone(), ..event };
                all.events.extend(reply.events.into_iter().map(named));
            }
            None => all.silent_nodes.push(node.name.clone()),
        }
    }
    all.events.sort_by_key(|event| event.unix_ms);
    let surplus = all.events.len().saturating_sub(EVENTS_MAX);
    all.events.drain(..surplus);
    all.left_out = u32::try_from(surplus).unwrap_or(u32::MAX);
    all
}

/// What this node saw happen while it led.
pub fn local_events(context: &Context) -> proto::ListEventsReply {
    proto::ListEventsReply { events: context.leader.events(), ..Default::default() }
}

pub async fn perf(context: &Context, nodes: &[&Node]) -> proto::PerfStatsReply {
    let ask = async |node: &Node| {
        let reply = if node.id == context.handle.node() {
            local_perf(context).await
        } else {
            match client(context, node) {
                Some(mut client) => {
                    within(client.local_perf(to(node, proto::PerfStatsRequest::default()))).await
                }
                None => None,
            }
        };
        let reachable = reply.is_some();
        let first = reply.and_then(|reply| reply.nodes.into_iter().next()).unwrap_or_default();
        proto::NodePerf { node: node.id.0, name: node.name.clone(), reachable, ..first }
    };
    proto::PerfStatsReply { nodes: join_all(nodes.iter().map(|node| ask(node))).await }
}

pub async fn locate(
    context: &Context,
    state: &ClusterState,
    volume: &Volume,
    index: BlockIndex,
) -> Result<proto::LocateBlockReply, ApiError> {
    let pool = state.map().pools.get(&volume.pool).ok_or(ApiError::Unexpected)?;
    let id = pool.group_of(volume.lineage, index);
    let group = state.map().groups.get(&id).ok_or(ApiError::Unexpected)?;
    let query = proto::BlockQuery {
        group: id.0,
        lineage: volume.lineage.0,
        layer: volume.layer.0,
        block_index: u64::from(index.0),
    };
    let replicas = group.members.iter().map(|member| replica(context, state, group, member, query));
    Ok(proto::LocateBlockReply {
        lineage: volume.lineage.0,
        layer: volume.layer.0,
        block_index: u64::from(index.0),
        group: id.0,
        epoch: group.epoch.0,
        replicas: join_all(replicas).await,
    })
}

async fn replica(
    context: &Context,
    state: &ClusterState,
    group: &Group,
    member: &Member,
    query: proto::BlockQuery,
) -> proto::BlockReplica {
    let node = state.map().nodes.get(&member.node);
    let found = match node {
        Some(node) if node.id == context.handle.node() => local_block(context, query).await,
        Some(node) => match client(context, node) {
            Some(mut client) => within(client.local_block(to(node, query))).await,
            None => None,
        },
        None => None,
    };
    let stores = node.and_then(|node| node.data.as_ref()).map_or(&[][..], |data| &data.stores);
    let device = stores.iter().find(|store| store.id == member.store).map(|store| store.device.clone());
    proto::BlockReplica {
        node: member.node.0,
        node_name: node.map_or_else(String::new, |node| node.name.clone()),
        role: role(group, member.node, member.learner).to_owned(),
        store: member.store.0,
        device: device.unwrap_or_default(),
        reachable: found.as_ref().is_some_and(|found| found.reachable),
        units: found.map(|found| found.units).unwrap_or_default(),
    }
}

fn role(group: &Group, node: NodeId, learner: bool) -> &'static str {
    match learner {
        true => "learner",
        false if group.primary == Some(node) => "primary",
        false => "secondary",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::sample;

    /// Another node at a dead one's address answered for it: health counted it as alive. Found by reading.
    #[test]
    fn what_is_asked_of_another_node_is_refused() {
        let state = sample::state(2, 1);
        let request = to(&state.map().nodes[&NodeId(2)], ());
        assert_eq!(check_addressee(NodeId(2), &request), Ok(()));
        assert_eq!(check_addressee(NodeId(1), &request), Err(ApiError::OtherNode));
        assert_eq!(check_addressee(NodeId(1), &Request::new(())), Ok(()), "who asks a node without a name");
    }
}
