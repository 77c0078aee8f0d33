//! Which volumes the node's data process has open, by its own word, beside which the cluster shows as attached here.
//!
//! `server` brings the second in line with the first. The data process alone counts its sessions: it outlives links and control
//! processes, and what either missed its next status says again. Knows no socket, and nothing of Raft.
//!
//! Invariants
//! - A volume that is open, or being opened, is not detached. While one is being detached, whoever opens it waits.
//! - Before the first status of a connection nothing is known, and nothing follows.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};
use xsan_protocol::ids::{NodeId, VolumeId};
use xsan_protocol::map::Volume;
use xsan_protocol::proto;

use crate::state::ClusterState;

/// Of one connection.
pub struct Attachments {
    inner: Mutex<Inner>,
    /// Something may be due.
    changed: Notify,
    /// Counts the ends of detaches.
    detached: watch::Sender<u64>,
}

#[derive(Default)]
struct Inner {
    told: bool,
    open: BTreeSet<VolumeId>,
    /// Names; the next status has those that are still wanted.
    opening: BTreeSet<String>,
    detaching: Option<VolumeId>,
}

/// What is to be told the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Due {
    Attach {
        name: String,
    },
    /// Until `end_detach` whoever opens it waits.
    Detach {
        volume: VolumeId,
    },
}

impl Default for Attachments {
    fn default() -> Self {
        let (detached, _) = watch::channel(0);
        Self { inner: Mutex::default(), changed: Notify::new(), detached }
    }
}

impl Attachments {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn on_status(&self, status: &proto::DataStatus) {
        let mut inner = self.lock();
        inner.told = true;
        inner.open = status.open_volumes.iter().copied().map(VolumeId).collect();
        inner.opening = status.opening_volumes.iter().cloned().collect();
        self.changed.notify_one();
    }

    pub fn on_open(&self, name: &str) {
        self.lock().opening.insert(name.to_owned());
    }

    pub fn on_closed(&self, volume: VolumeId) {
        self.lock().open.remove(&volume);
        self.changed.notify_one();
    }

    /// Waits until something may be due.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is to be told the cluster first, for it to show what `node` has open.
    pub fn due(&self, state: &ClusterState, node: NodeId) -> Option<Due> {
        let mut inner = self.lock();
        if !inner.told {
            return None;
        }
        let volumes = || state.map().volumes.values();
        let is_attached = |volume: &Volume| volume.attached_nodes.contains(&node);
        let is_wanted =
            |volume: &Volume| inner.open.contains(&volume.id) || inner.opening.contains(&volume.name);
        let stale =
            volumes().find(|volume| is_attached(volume) && !is_wanted(volume)).map(|volume| volume.id);
        if let Some(volume) = stale {
            inner.detaching = Some(volume);
            return Some(Due::Detach { volume });
        }
        let missing = volumes().find(|volume| !is_attached(volume) && inner.open.contains(&volume.id));
        missing.map(|volume| Due::Attach { name: volume.name.clone() })
    }

    pub fn end_detach(&self) {
        self.lock().detaching = None;
        self.detached.send_modify(|count| *count += 1);
    }

    /// Waits until `volume` is not being detached.
    pub async fn wait_for_detach(&self, volume: VolumeId) {
        let mut detached = self.detached.subscribe();
        while self.lock().detaching == Some(volume) {
            if detached.changed().await.is_err() {
                return;
            }
        }
    }

    /// Has the data process a session of it already?
    pub fn is_open(&self, volume: VolumeId) -> bool {
        self.lock().open.contains(&volume)
    }
}

#[cfg(test)]
mod tests {
    use xsan_protocol::ids::Incarnation;

    use super::*;
    use crate::api::sample::state;
    use crate::state::command::Command;

    const NODE: NodeId = NodeId(2);
    const VM: VolumeId = VolumeId(1);

    fn status(open: &[u32], opening: &[&str]) -> proto::DataStatus {
        proto::DataStatus {
            open_volumes: open.to_vec(),
            opening_volumes: opening.iter().map(|name| (*name).to_owned()).collect(),
            ..proto::DataStatus::default()
        }
    }

    /// The volume `vm`, attached at the node or not.
    fn cluster(attached: bool) -> ClusterState {
        let mut state = state(3, 3);
        if attached {
            let (volume, incarnation) = ("vm".to_owned(), Incarnation(2));
            assert!(!state.apply(&Command::Attach { volume, node: NODE, incarnation }).1.is_empty());
        }
        state
    }

    /// The control process had counted the sessions that it had seen open itself: after its restart the first close of two passed
    /// for the last, and a close while it was away was never heard of.
    #[test]
    fn the_status_alone_says_what_is_open() {
        let attachments = Attachments::default();
        let attached = cluster(true);
        assert_eq!(attachments.due(&attached, NODE), None, "nothing is known yet");
        attachments.on_closed(VolumeId(9));
        attachments.on_status(&status(&[1], &[]));
        assert_eq!(attachments.due(&attached, NODE), None);
        attachments.on_status(&status(&[], &[]));
        assert_eq!(attachments.due(&attached, NODE), Some(Due::Detach { volume: VM }));
        assert_eq!(attachments.due(&cluster(false), NODE), None);
    }

    #[test]
    fn what_is_open_and_not_attached_is_attached() {
        let attachments = Attachments::default();
        attachments.on_status(&status(&[1], &[]));
        assert_eq!(attachments.due(&cluster(false), NODE), Some(Due::Attach { name: "vm".into() }));
        attachments.on_closed(VM);
        assert_eq!(attachments.due(&cluster(false), NODE), None);
        assert_eq!(attachments.due(&cluster(true), NODE), Some(Due::Detach { volume: VM }));
    }

    #[test]
    fn what_is_being_opened_is_not_detached_until_a_status_says_otherwise() {
        let attachments = Attachments::default();
        let attached = cluster(true);
        attachments.on_status(&status(&[], &[]));
        attachments.on_open("vm");
        assert_eq!(attachments.due(&attached, NODE), None);
        attachments.on_status(&status(&[], &["vm"]));
        assert_eq!(attachments.due(&attached, NODE), None);
        attachments.on_status(&status(&[], &[]));
        assert_eq!(attachments.due(&attached, NODE), Some(Due::Detach { volume: VM }));
    }

    #[tokio::test]
    async fn an_open_waits_for_a_detach_and_attaches_anew() {
        let attachments = Attachments::default();
        attachments.on_status(&status(&[], &[]));
        assert_eq!(attachments.due(&cluster(true), NODE), Some(Due::Detach { volume: VM }));
        attachments.on_open("vm");
        let waits = attachments.wait_for_detach(VM);
        tokio::pin!(waits);
        assert!(futures::poll!(&mut waits).is_pending());
        attachments.end_detach();
        waits.await;
        assert!(!attachments.is_open(VM), "it is attached again, whatever the state here shows");
        attachments.on_status(&status(&[1], &[]));
        assert!(attachments.is_open(VM));
    }
}
