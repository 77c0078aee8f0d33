//! Opening volumes for the node's data process, and keeping the cluster's attachments in line with what it has open.
//!
//! Part of `server`, one connection each; what is due is worked out in `attachments`.
//!
//! Invariants
//! - An open is answered `OPEN_WAIT` after it came, whatever the others wait for.
//! - An attach or detach that is proposed for one life of the process does nothing for another.

use std::convert::Infallible;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use xsan_protocol::error::Code;
use xsan_protocol::ids::{Incarnation, VolumeId};
use xsan_protocol::map::Volume;
use xsan_protocol::proto;
use xsan_protocol::proto::LinkMessage;
use xsan_protocol::proto::link_message::Body;

use super::attachments::{Attachments, Due};
use super::server::{LinkServer, RETRY_INTERVAL, link_error};
use crate::raft::handle::ProposeError;
use crate::state::command::{Command, Reply};
use crate::timing::LEADER_WAIT;

/// Opens that are carried out at once, and as many again that wait for one of them to end. More are refused as `Busy`.
pub const OPENS_MAX: usize = 256;
/// An open is answered by then: with an error that may be tried again, if the cluster has not answered.
const OPEN_WAIT: Duration = LEADER_WAIT;

/// An open that is to be carried out.
pub struct WaitingOpen {
    request_id: u64,
    pub name: String,
    deadline: Instant,
}

impl WaitingOpen {
    pub fn new(request_id: u64, name: String) -> Self {
        Self { request_id, name, deadline: Instant::now() + OPEN_WAIT }
    }
}

impl LinkServer {
    /// Carries opens out, beside each other. Ends with the connection.
    pub(super) async fn serve_opens(
        &self,
        mut waiting: mpsc::Receiver<WaitingOpen>,
        outbound: &mpsc::Sender<LinkMessage>,
        incarnation: Incarnation,
        attachments: &Attachments,
    ) {
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                open = waiting.recv(), if running.len() < OPENS_MAX => {
                    let Some(open) = open else { return };
                    running.push(async move {
                        let request_id = open.request_id;
                        let body = Some(self.open(open, incarnation, attachments).await);
                        outbound.send(LinkMessage { request_id, body }).await
                    });
                }
                Some(sent) = running.next() => if sent.is_err() { return },
            }
        }
    }

    async fn open(&self, open: WaitingOpen, incarnation: Incarnation, attachments: &Attachments) -> Body {
        let object = || format!("volume {}", open.name);
        match timeout_at(open.deadline, self.attach(&open.name, incarnation, attachments)).await {
            Ok(Ok(volume)) => Body::OpenVolumeReply(proto::OpenVolumeReply {
                volume: Some((&volume).into()),
                map_version: self.handle.state().version().0,
            }),
            Ok(Err(ProposeError::Refused(refusal))) => link_error(refusal.code, refusal.object),
            Ok(Err(error)) => link_error(error.code(), object()),
            Err(_) => link_error(Code::Timeout, object()),
        }
    }

    /// Attaches a volume, or finds it attached.
    async fn attach(
        &self,
        name: &str,
        incarnation: Incarnation,
        attachments: &Attachments,
    ) -> Result<Volume, ProposeError> {
        let node = self.handle.node();
        let mut state = self.handle.watch_state();
        // Until this life is registered, an attach would be refused.
        let registered = state.wait_for(|state| state.is_registered(node, incarnation));
        registered.await.map_err(|_| ProposeError::Stopped)?;
        let known = || self.handle.state().map().volume_named(name).cloned();
        if let Some(volume) = known() {
            attachments.wait_for_detach(volume.id).await;
        }
        let is_attached = |volume: &Volume| volume.attached_nodes.contains(&node);
        // Of one that is not open, a detach may be on its way: the attach is to come behind it.
        if let Some(volume) = known().filter(|volume| is_attached(volume) && attachments.is_open(volume.id)) {
            return Ok(volume);
        }
        match self.handle.propose(Command::Attach { volume: name.to_owned(), node, incarnation }).await? {
            Reply::Volume(volume) => Ok(*volume),
            _ => Err(ProposeError::NoQuorum),
        }
    }

    /// Has the cluster show what the data process has open. Runs for ever.
    pub(super) async fn keep_attached(
        &self,
        incarnation: Incarnation,
        attachments: &Attachments,
    ) -> Infallible {
        let node = self.handle.node();
        loop {
            attachments.changed().await;
            loop {
                let state = self.handle.state();
                if !state.is_registered(node, incarnation) {
                    // It has nothing attached, and can have nothing attached.
                    break;
                }
                let result = match attachments.due(&state, node) {
                    Some(Due::Detach { volume }) => {
                        let result = self.detach(volume, incarnation).await;
                        attachments.end_detach();
                        result
                    }
                    Some(Due::Attach { name }) => {
                        tracing::warn!(%name, "an open volume was not attached; it is attached again");
                        let command = Command::Attach { volume: name, node, incarnation };
                        self.handle.propose(command).await.map(drop)
                    }
                    None => break,
                };
                if let Err(error) = result {
                    tracing::warn!(code = error.code().number(), "attachments are not as they are: {error}");
                    sleep(RETRY_INTERVAL).await;
                    // The next status may say otherwise.
                    break;
                }
            }
        }
    }

    async fn detach(&self, volume: VolumeId, incarnation: Incarnation) -> Result<(), ProposeError> {
        let command = Command::Detach { volume, node: self.handle.node(), incarnation };
        match self.handle.propose(command).await {
            // It was deleted meanwhile.
            Err(ProposeError::Refused(refusal)) if refusal.code == Code::VolumeNotFound => Ok(()),
            result => result.map(drop),
        }
    }

    /// The process is dead: detaches what it had open, until its next life does so by registering.
    pub(super) async fn detach_all(&self, incarnation: Incarnation) {
        let node = self.handle.node();
        loop {
            let state = self.handle.state();
            let mut volumes = state.map().volumes.values();
            let attached =
                volumes.find(|volume| volume.attached_nodes.contains(&node)).map(|volume| volume.id);
            let Some(volume) = attached.filter(|_| state.is_registered(node, incarnation)) else { return };
            if let Err(error) = self.detach(volume, incarnation).await {
                let code = error.code().number();
                tracing::warn!(code, %volume, "the volume is shown as attached still: {error}");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}
