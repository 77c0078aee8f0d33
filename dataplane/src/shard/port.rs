//! How the volumes of this shard send: into the shard's next turn.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use xsan_protocol::error::{Code, Retry};
use xsan_protocol::ids::{GroupId, NodeId, PoolId, ShardIndex, VolumeId};
use xsan_protocol::map::{ClusterMap, Durability, Volume};

use super::{Event, Handle, Identity, Message, Opens};
use crate::disk::os;
use crate::replication::{Operation, Origin, Request, RequestId};
use crate::stats::{Stage, Stats};
use crate::volume::{IO_TIMEOUT, Port, Target, wire};

/// How often an attach is tried again while the control plane has no leader.
const OPEN_RETRY: Duration = Duration::from_millis(100);
/// How often the map is looked at while it does not have an attached volume yet.
const MAP_WAIT: Duration = Duration::from_millis(2);

pub struct ShardPort {
    pub identity: Rc<Identity>,
    pub handle: Handle,
    pub opens: Opens,
    pub stats: Rc<RefCell<Stats>>,
}

impl Port for ShardPort {
    fn map(&self) -> Arc<ClusterMap> {
        self.handle.map()
    }

    fn send(&self, number: u64, to: Target, durability: Durability, operation: Operation) {
        let id = RequestId { origin: Origin::Shard(self.identity.shard), number };
        let request = Request { id, group: to.group, epoch: to.epoch, durability, operation };
        self.handle.push(if to.node != self.identity.node {
            Event::Send { number, peer: (to.node, to.shard), frame: wire::request_frame(&request) }
        } else if to.shard != self.identity.shard {
            Event::Tell(to.shard, Message::Request(Box::new(request)))
        } else {
            Event::Request(Box::new(request))
        });
    }

    fn send_flush(&self, number: u64, node: NodeId, shard: ShardIndex, pool: PoolId) {
        self.handle.push(if node != self.identity.node {
            Event::Send {
                number,
                peer: (node, shard),
                frame: wire::flush_frame(number, GroupId::new(pool, 0)),
            }
        } else if shard != self.identity.shard {
            Event::Tell(shard, Message::Flush { number, pool })
        } else {
            Event::Message(shard, Message::Flush { number, pool })
        });
    }

    fn open(&self, name: &str) -> Pin<Box<dyn Future<Output = Result<Volume, Code>>>> {
        let (handle, opens, name) = (self.handle.clone(), self.opens.clone(), name.to_owned());
        let deadline_ns = os::boottime_ns() + IO_TIMEOUT.as_nanos() as u64;
        Box::pin(async move {
            loop {
                let (number, call) = opens.start(());
                handle.push(Event::Tell(ShardIndex(0), Message::Open { number, name: name.clone() }));
                match call.await {
                    Ok(opened) => {
                        let (volume, version) = *opened;
                        while handle.map().version < version {
                            monoio::time::sleep(MAP_WAIT).await;
                        }
                        return Ok(volume);
                    }
                    Err(code) if code.retry() == Retry::Never || os::boottime_ns() >= deadline_ns => {
                        return Err(code);
                    }
                    Err(_) => monoio::time::sleep(OPEN_RETRY).await,
                }
            }
        })
    }

    fn close(&self, volume: VolumeId) {
        self.handle.push(Event::Tell(ShardIndex(0), Message::Close(volume)));
    }

    fn now_ns(&self) -> u64 {
        os::boottime_ns()
    }

    fn observe(&self, stage: Stage, ns: u64) {
        self.stats.borrow_mut().record(stage, ns);
    }
}
