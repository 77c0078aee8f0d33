//! The service between control processes: Raft's messages, joining, forwarded commands, and what a node knows of itself.

use tonic::{Request, Response, Status, Streaming};
use xsan_protocol::error::Code;
use xsan_protocol::ids::NodeId;
use xsan_protocol::proto;
use xsan_protocol::proto::raft_server::Raft;

use super::error::{ApiError, status};
use super::{Context, gather};
use crate::clock::BootTime;
use crate::link::server::decode_proposals;
use crate::membership::join;
use crate::raft::handle::ProposeError;
use crate::raft::service::Receiver;
use crate::state::command::{Command, Reply};

/// Raft's own messages stay on the runtime that serves them; the rest moves to the main one.
pub struct Internal {
    pub context: Context,
    pub receiver: Receiver,
}

type Message = proto::RaftMessage;

#[tonic::async_trait]
impl Raft for Internal {
    async fn vote(&self, request: Request<Message>) -> Result<Response<Message>, Status> {
        self.receiver.vote(request).await
    }

    async fn pre_vote(&self, request: Request<Message>) -> Result<Response<Message>, Status> {
        self.receiver.pre_vote(request).await
    }

    async fn append_entries(&self, request: Request<Message>) -> Result<Response<Message>, Status> {
        self.receiver.append_entries(request).await
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<Message>>,
    ) -> Result<Response<Message>, Status> {
        self.receiver.install_snapshot(request).await
    }

    async fn transfer_leader(&self, _: Request<Message>) -> Result<Response<Message>, Status> {
        Err(status(Code::Unsupported, "cluster".to_owned(), "leadership is not handed over"))
    }

    async fn join(&self, request: Request<proto::JoinRequest>) -> Result<Response<proto::JoinReply>, Status> {
        let command = join::command(request.into_inner()).map_err(ApiError::Refused)?;
        let context = self.context.clone();
        self.context
            .answer(async move {
                match context.propose(command).await? {
                    Reply::Node(node) => Ok(proto::JoinReply { node_id: node.0 }),
                    _ => Err(ApiError::Unexpected),
                }
            })
            .await
    }

    async fn propose(
        &self,
        request: Request<proto::ProposeRequest>,
    ) -> Result<Response<proto::ProposeReply>, Status> {
        let command = Command::decode(&request.into_inner().command)
            .map_err(|_| ApiError::Invalid { field: "command", object: "cluster".to_owned() })?;
        let context = self.context.clone();
        self.context
            .answer(async move {
                if context.handle.leadership().is_none() {
                    return Err(ApiError::Raft(ProposeError::NotLeader));
                }
                let reply = context.handle.propose_here(command).await?;
                let map_version = context.handle.state().version().0;
                Ok(proto::ProposeReply { response: reply.encode(), map_version })
            })
            .await
    }

    async fn propose_groups(
        &self,
        request: Request<proto::GroupProposals>,
    ) -> Result<Response<proto::ProposeGroupsReply>, Status> {
        if self.context.handle.leadership().is_none() {
            return Err(ApiError::Raft(ProposeError::NotLeader).into());
        }
        self.context.leader.on_proposals(decode_proposals(&request.into_inner()));
        Ok(Response::new(proto::ProposeGroupsReply {}))
    }

    async fn report_slow(
        &self,
        request: Request<proto::SlowReport>,
    ) -> Result<Response<proto::SlowReportReply>, Status> {
        if self.context.handle.leadership().is_none() {
            return Err(ApiError::Raft(ProposeError::NotLeader).into());
        }
        let report = request.into_inner();
        let nodes = report.nodes.into_iter().map(NodeId);
        self.context.leader.on_slow_report(BootTime::now(), NodeId(report.from), nodes);
        Ok(Response::new(proto::SlowReportReply {}))
    }

    async fn local_status(
        &self,
        request: Request<proto::LocalStatusRequest>,
    ) -> Result<Response<proto::LocalStatusReply>, Status> {
        gather::check_addressee(self.context.handle.node(), &request)?;
        Ok(Response::new(gather::local_status(&self.context)))
    }

    async fn local_events(
        &self,
        request: Request<proto::ListEventsRequest>,
    ) -> Result<Response<proto::ListEventsReply>, Status> {
        gather::check_addressee(self.context.handle.node(), &request)?;
        Ok(Response::new(gather::local_events(&self.context)))
    }

    async fn local_perf(
        &self,
        request: Request<proto::PerfStatsRequest>,
    ) -> Result<Response<proto::PerfStatsReply>, Status> {
        gather::check_addressee(self.context.handle.node(), &request)?;
        let context = self.context.clone();
        self.context
            .answer(async move { gather::local_perf(&context).await.ok_or(ApiError::NoDataProcess) })
            .await
    }

    async fn local_block(
        &self,
        request: Request<proto::BlockQuery>,
    ) -> Result<Response<proto::BlockReplica>, Status> {
        gather::check_addressee(self.context.handle.node(), &request)?;
        let (context, query) = (self.context.clone(), request.into_inner());
        self.context
            .answer(async move { gather::local_block(&context, query).await.ok_or(ApiError::NoDataProcess) })
            .await
    }
}
