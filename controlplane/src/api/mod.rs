//! The API: what xsan-cli, xsan-debug and the SDK ask, answered by any node.
//!
//! Changes go through the leader, wherever it is. Reads come from this node's own applied state; what only other
//! nodes know (space, latencies, blocks) is gathered from them within a deadline, and a node that does not
//! answer is marked and fails nothing.
//!
//! Invariants
//! - Every error is a number of the one table, with its object, in the status's details.

pub mod error;
mod gather;
mod health;
pub mod internal;
mod life;
#[cfg(test)]
pub mod sample;
mod scrub;
mod status;
mod survey;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{BlockIndex, NodeId, VolumeId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{Durability, Node, Volume};
use xsan_protocol::proto;
use xsan_protocol::proto::cluster_server::Cluster;
use xsan_protocol::units::BLOCK_SIZE;

use crate::clock::unix_ms;
use crate::controller::Leader;
use crate::link::Link;
use crate::raft::handle::RaftHandle;
use crate::raft::network::Channels;
use crate::state::ClusterState;
use crate::state::command::{Command, NewVolume, Reply, SettingsChange};
use error::ApiError;
use survey::Survey;

/// How long a name that is not known here may take to arrive: some of Raft's heartbeats.
const NAME_WAIT: Duration = Duration::from_millis(500);

/// What the services share.
#[derive(Clone)]
pub struct Context {
    pub handle: RaftHandle,
    pub leader: Arc<Leader>,
    pub link: Arc<Link>,
    pub channels: Channels,
    pub default_replica_count: u8,
    /// Where answers are worked out: not on Raft's own runtime, whose heartbeats must not wait.
    pub runtime: Handle,
}

impl Context {
    /// Works an answer out on the main runtime; gives up when nobody waits for it any more, so that a change is not
    /// tried for longer than whoever asked for it believes.
    async fn answer<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
    ) -> Result<Response<T>, Status> {
        // Dropped with the request, it ends its task.
        let mut task = JoinSet::new();
        task.spawn_on(work, &self.runtime);
        match task.join_next().await {
            Some(Ok(Ok(answer))) => Ok(Response::new(answer)),
            Some(Ok(Err(error))) => Err(error.into()),
            Some(Err(_)) | None => Err(ApiError::Stopping.into()),
        }
    }

    /// The volume that has that name. One made a moment ago through another node may not be known here yet.
    async fn number_of(&self, name: &str) -> Result<VolumeId, ApiError> {
        let mut state = self.handle.watch_state();
        let known = state.wait_for(|state| state.map().volume_named(name).is_some());
        if tokio::time::timeout(NAME_WAIT, known).await.is_err() {
            return Err(ApiError::VolumeNotFound { name: name.to_owned() });
        }
        find_volume(&self.handle.state(), name).map(|volume| volume.id)
    }

    async fn propose(&self, command: Command) -> Result<Reply, ApiError> {
        Ok(self.handle.propose(command).await?)
    }

    async fn propose_volume(&self, command: Command) -> Result<proto::Volume, ApiError> {
        match self.propose(command).await? {
            Reply::Volume(volume) => Ok(proto::Volume::from(&*volume)),
            _ => Err(ApiError::Unexpected),
        }
    }
}

/// A node by its name or its number; no name is a number.
fn find_node<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Node, ApiError> {
    let by_number = name.parse().ok().and_then(|number| state.map().nodes.get(&NodeId(number)));
    by_number
        .or_else(|| state.map().node_named(name))
        .ok_or_else(|| ApiError::NodeNotFound { name: name.to_owned() })
}

fn find_volume<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Volume, ApiError> {
    state.map().volume_named(name).ok_or_else(|| ApiError::VolumeNotFound { name: name.to_owned() })
}

fn new_volume(request: proto::CreateVolumeRequest, default_replica_count: u8) -> Result<Command, ApiError> {
    let invalid = |field| ApiError::Invalid { field, object: format!("volume {}", request.name) };
    // `request.durability()` would take what a newer client asks for as the weakest.
    let durability = match proto::Durability::try_from(request.durability) {
        Ok(proto::Durability::OnFlush) => Durability::OnFlush,
        Ok(proto::Durability::EveryWrite) => Durability::EveryWrite,
        Err(_) => return Err(invalid("durability")),
    };
    let replica_count = match u8::try_from(request.replica_count) {
        Ok(0) => default_replica_count,
        Ok(count) => count,
        Err(_) => return Err(invalid("replica_count")),
    };
    Ok(Command::CreateVolume(NewVolume {
        name: request.name,
        size_bytes: request.size_bytes,
        replica_count,
        policy: request.policy,
        durability,
        created_unix_ms: unix_ms(),
        request: crate::random::number(),
        group_count: GROUPS_PER_POOL,
    }))
}

#[tonic::async_trait]
impl Cluster for Context {
    async fn cluster_status(
        &self,
        _: Request<proto::ClusterStatusRequest>,
    ) -> Result<Response<proto::ClusterStatusReply>, Status> {
        let context = self.clone();
        self.answer(async move { Ok(status::cluster(&Survey::take(&context).await)) }).await
    }

    async fn get_map(&self, _: Request<proto::GetMapRequest>) -> Result<Response<proto::ClusterMap>, Status> {
        Ok(Response::new(self.handle.state().map().into()))
    }

    async fn get_node(
        &self,
        request: Request<proto::GetNodeRequest>,
    ) -> Result<Response<proto::NodeStatus>, Status> {
        let (context, name) = (self.clone(), request.into_inner().name);
        self.answer(async move {
            let id = find_node(&context.handle.state(), &name)?.id;
            let nodes = status::cluster(&Survey::take(&context).await).nodes;
            let found = nodes.into_iter().find(|status| status.node.as_ref().is_some_and(|n| n.id == id.0));
            found.ok_or(ApiError::NodeNotFound { name })
        })
        .await
    }

    async fn create_volume(
        &self,
        request: Request<proto::CreateVolumeRequest>,
    ) -> Result<Response<proto::Volume>, Status> {
        let command = new_volume(request.into_inner(), self.default_replica_count)?;
        let context = self.clone();
        self.answer(async move { context.propose_volume(command).await }).await
    }

    async fn list_volumes(
        &self,
        _: Request<proto::ListVolumesRequest>,
    ) -> Result<Response<proto::ListVolumesReply>, Status> {
        let context = self.clone();
        self.answer(async move {
            let volumes = status::volumes(&Survey::of_leader(&context).await);
            Ok(proto::ListVolumesReply { volumes })
        })
        .await
    }

    async fn get_volume(
        &self,
        request: Request<proto::GetVolumeRequest>,
    ) -> Result<Response<proto::VolumeStatus>, Status> {
        let (context, name) = (self.clone(), request.into_inner().name);
        self.answer(async move {
            let id = context.number_of(&name).await?;
            let mut volumes = status::volumes(&Survey::of_leader(&context).await).into_iter();
            let found = volumes.find(|status| status.volume.as_ref().is_some_and(|volume| volume.id == id.0));
            found.ok_or(ApiError::VolumeNotFound { name })
        })
        .await
    }

    async fn resize_volume(
        &self,
        request: Request<proto::ResizeVolumeRequest>,
    ) -> Result<Response<proto::Volume>, Status> {
        let proto::ResizeVolumeRequest { name, size_bytes, allow_shrink } = request.into_inner();
        let context = self.clone();
        let command = Command::ResizeVolume { name, size_bytes, allow_shrink };
        self.answer(async move { context.propose_volume(command).await }).await
    }

    async fn delete_volume(
        &self,
        request: Request<proto::DeleteVolumeRequest>,
    ) -> Result<Response<proto::DeleteVolumeReply>, Status> {
        let (context, name) = (self.clone(), request.into_inner().name);
        self.answer(async move {
            let mut volume = context.number_of(&name).await?;
            loop {
                match context.propose(Command::DeleteVolume { volume }).await {
                    // This node may have known an earlier volume of that name.
                    Err(ApiError::Refused(refusal)) if refusal.code == Code::VolumeNotFound => {
                        let known = std::mem::replace(&mut volume, context.number_of(&name).await?);
                        if volume == known {
                            return Err(ApiError::VolumeNotFound { name });
                        }
                    }
                    result => return result.map(|_| proto::DeleteVolumeReply {}),
                }
            }
        })
        .await
    }

    async fn locate_block(
        &self,
        request: Request<proto::LocateBlockRequest>,
    ) -> Result<Response<proto::LocateBlockReply>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move {
            context.number_of(&request.volume).await?;
            let state = context.handle.state();
            let volume = find_volume(&state, &request.volume)?;
            let blocks = volume.size_bytes.div_ceil(BLOCK_SIZE as u64);
            if request.block_index >= blocks {
                return Err(ApiError::OutOfRange {
                    volume: request.volume,
                    block: request.block_index,
                    blocks,
                });
            }
            let index = u32::try_from(request.block_index).expect("limits keep block indexes in 32 bits");
            gather::locate(&context, &state, volume, BlockIndex(index)).await
        })
        .await
    }

    async fn perf_stats(
        &self,
        request: Request<proto::PerfStatsRequest>,
    ) -> Result<Response<proto::PerfStatsReply>, Status> {
        let (context, name) = (self.clone(), request.into_inner().node);
        self.answer(async move {
            let state = context.handle.state();
            let nodes = match name {
                None => state.map().nodes.values().collect(),
                Some(name) => vec![find_node(&state, &name)?],
            };
            Ok(gather::perf(&context, &nodes).await)
        })
        .await
    }

    async fn set_maintenance(
        &self,
        request: Request<proto::SetMaintenanceRequest>,
    ) -> Result<Response<proto::NodePlan>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move { life::set_maintenance(&context, request).await }).await
    }

    async fn remove_node(
        &self,
        request: Request<proto::RemoveNodeRequest>,
    ) -> Result<Response<proto::NodePlan>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move { life::remove_node(&context, request).await }).await
    }

    async fn plan_join(
        &self,
        request: Request<proto::PlanJoinRequest>,
    ) -> Result<Response<proto::NodePlan>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move { life::plan_join(&Survey::take(&context).await, request) }).await
    }

    async fn change_settings(
        &self,
        request: Request<proto::ChangeSettingsRequest>,
    ) -> Result<Response<proto::ClusterSettings>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move {
            let interval = request.down_out_interval_ms;
            let change = SettingsChange {
                down_out_interval: (interval != 0).then(|| Duration::from_millis(interval)),
                scrub_bytes_per_second: request.scrub_bytes_per_second,
                scrub_interval: request.scrub_interval_ms.map(Duration::from_millis),
                deep_scrub_interval: request.deep_scrub_interval_ms.map(Duration::from_millis),
                demote_slow_nodes: request.demote_slow_nodes,
            };
            context.propose(Command::ChangeSettings(change)).await?;
            Ok(status::settings(&context.handle.state()))
        })
        .await
    }

    async fn start_scrub(
        &self,
        request: Request<proto::StartScrubRequest>,
    ) -> Result<Response<proto::StartScrubReply>, Status> {
        let (context, request) = (self.clone(), request.into_inner());
        self.answer(async move { scrub::start(&context, request).await }).await
    }

    async fn stop_scrub(
        &self,
        _: Request<proto::StopScrubRequest>,
    ) -> Result<Response<proto::StopScrubReply>, Status> {
        let context = self.clone();
        self.answer(async move { scrub::stop(&context).await }).await
    }

    async fn scrub_status(
        &self,
        _: Request<proto::ScrubStatusRequest>,
    ) -> Result<Response<proto::ScrubStatusReply>, Status> {
        let context = self.clone();
        self.answer(async move { Ok(scrub::show(&Survey::take(&context).await)) }).await
    }

    async fn health(&self, _: Request<proto::HealthRequest>) -> Result<Response<proto::HealthReply>, Status> {
        let context = self.clone();
        self.answer(async move {
            let findings = status::cluster(&Survey::take(&context).await).findings;
            Ok(proto::HealthReply { findings })
        })
        .await
    }

    async fn list_events(
        &self,
        _: Request<proto::ListEventsRequest>,
    ) -> Result<Response<proto::ListEventsReply>, Status> {
        let context = self.clone();
        self.answer(async move { Ok(gather::events(&context).await) }).await
    }
}
