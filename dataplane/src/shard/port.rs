//! How the volumes of this shard send: into the shard's next turn.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use xsan_protocol::error::{Code, Retry};
use xsan_protocol::ids::{GroupId, MapVersion, NodeId, PoolId, ShardIndex, VolumeId};
use xsan_protocol::map::{ClusterMap, Durability, Volume};

use super::{Event, Handle, Identity, Message, Opened, Opens};
use crate::disk::os;
use crate::replication::{Operation, Origin, Request, RequestId};
use crate::stats::{Stage, Stats};
use crate::volume::calls::Call;
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
        Box::pin(open(self.handle.clone(), self.opens.clone(), name.to_owned(), IO_TIMEOUT))
    }

    fn close(&self, volume: VolumeId) {
        close(&self.handle, volume);
    }

    fn now_ns(&self) -> u64 {
        os::boottime_ns()
    }

    fn observe(&self, stage: Stage, ns: u64) {
        self.stats.borrow_mut().record(stage, ns);
    }
}

fn close(handle: &Handle, volume: VolumeId) {
    handle.push(Event::Tell(ShardIndex(0), Message::Close(volume)));
}

/// Attaches a volume within `limit`: the control process may hang, or have no leader for as long as it likes.
async fn open(handle: Handle, opens: Opens, name: String, limit: Duration) -> Result<Volume, Code> {
    let deadline_ns = os::boottime_ns() + limit.as_nanos() as u64;
    let tries = async {
        loop {
            let (number, call) = opens.start(());
            handle.push(Event::Tell(ShardIndex(0), Message::Open { number, name: name.clone() }));
            match (Opening { handle: &handle, call }).answer().await {
                Ok((attached, version)) => {
                    while handle.map().version < version {
                        monoio::time::sleep(MAP_WAIT).await;
                    }
                    return Ok(attached.keep());
                }
                Err(code) if code.retry() == Retry::Never || os::boottime_ns() >= deadline_ns => {
                    return Err(code);
                }
                Err(_) => monoio::time::sleep(OPEN_RETRY).await,
            }
        }
    };
    monoio::time::timeout(limit, tries).await.unwrap_or(Err(Code::Timeout))
}

/// The answer to an attach. A volume that nobody waits for any more is closed: its client has got an error, or gone.
pub fn on_opened(handle: &Handle, opens: &Opens, number: u64, result: Result<Opened, Code>) {
    if let Some(Ok(late)) = opens.offer(number, result) {
        close(handle, late.0.id);
    }
}

/// An attach under way. Dropped with an answer that was not taken, it closes the volume.
struct Opening<'a> {
    handle: &'a Handle,
    call: Call<(), Opened>,
}

impl<'a> Opening<'a> {
    async fn answer(mut self) -> Result<(Attached<'a>, MapVersion), Code> {
        let (volume, version) = *(&mut self.call).await?;
        Ok((Attached { handle: self.handle, volume: Some(volume) }, version))
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(Ok(opened)) = self.call.take() {
            close(self.handle, opened.0.id);
        }
    }
}

/// A volume that is closed again unless it is kept.
struct Attached<'a> {
    handle: &'a Handle,
    volume: Option<Volume>,
}

impl Attached<'_> {
    fn keep(mut self) -> Volume {
        self.volume.take().expect("it is kept once")
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if let Some(volume) = &self.volume {
            close(self.handle, volume.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use xsan_protocol::ids::{Layer, Lineage};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(150);

    fn opened(version: u64) -> Opened {
        let volume = Volume {
            id: VolumeId(7),
            name: "disk".to_owned(),
            lineage: Lineage(1),
            layer: Layer(0),
            size_bytes: 1 << 30,
            pool: PoolId(1),
            durability: Durability::OnFlush,
            policy: String::new(),
            created_unix_ms: 0,
            attached_nodes: Vec::new(),
        };
        Box::new((volume, MapVersion(version)))
    }

    /// What was asked of shard 0: the numbers of opens, and how many volumes were closed.
    fn asked(handle: &Handle) -> (Vec<u64>, usize) {
        let (mut opens, mut closes) = (Vec::new(), 0);
        for event in handle.0.events.borrow_mut().drain(..) {
            match event {
                Event::Tell(_, Message::Open { number, .. }) => opens.push(number),
                Event::Tell(_, Message::Close(VolumeId(7))) => closes += 1,
                _ => panic!("nothing else is asked"),
            }
        }
        (opens, closes)
    }

    fn run<F: Future>(work: F) -> F::Output {
        let builder = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new();
        builder.enable_timer().build().unwrap().block_on(work)
    }

    /// The control process got an attach and never answered: the client waited for ever. Found by reading.
    #[test]
    fn an_attach_ends_in_time_and_a_late_answer_closes_the_volume() {
        run(async {
            let (handle, opens) = (Handle::new(), Opens::default());
            let ended = open(handle.clone(), opens.clone(), "disk".to_owned(), LIMIT);
            let ended = monoio::time::timeout(10 * LIMIT, ended).await.expect("it has a time limit");
            assert_eq!(ended.unwrap_err(), Code::Timeout);
            let (asked_opens, closes) = asked(&handle);
            assert_eq!((asked_opens.len(), closes, opens.count()), (1, 0, 0));
            on_opened(&handle, &opens, asked_opens[0], Ok(opened(0)));
            assert_eq!(asked(&handle), (vec![], 1));
            on_opened(&handle, &opens, asked_opens[0], Err(Code::NotFound));
            assert_eq!(asked(&handle), (vec![], 0));
        });
    }

    #[test]
    fn an_attach_that_is_answered_in_time_is_kept() {
        run(async {
            let (handle, opens) = (Handle::new(), Opens::default());
            let ended = monoio::spawn(open(handle.clone(), opens.clone(), "disk".to_owned(), LIMIT));
            monoio::time::sleep(LIMIT / 10).await;
            on_opened(&handle, &opens, asked(&handle).0[0], Ok(opened(0)));
            assert_eq!(ended.await.unwrap().id, VolumeId(7));
            assert_eq!(asked(&handle), (vec![], 0));
        });
    }

    #[test]
    fn an_attach_whose_map_does_not_come_is_undone() {
        run(async {
            let (handle, opens) = (Handle::new(), Opens::default());
            let ended = monoio::spawn(open(handle.clone(), opens.clone(), "disk".to_owned(), LIMIT));
            monoio::time::sleep(LIMIT / 10).await;
            on_opened(&handle, &opens, asked(&handle).0[0], Ok(opened(9)));
            let ended = monoio::time::timeout(10 * LIMIT, ended).await.expect("it has a time limit");
            assert_eq!(ended.unwrap_err(), Code::Timeout);
            assert_eq!(asked(&handle), (vec![], 1));
        });
    }

    #[test]
    fn an_attach_that_is_given_up_with_its_answer_is_undone() {
        run(async {
            let (handle, opens) = (Handle::new(), Opens::default());
            let (number, call) = opens.start(());
            let opening = Opening { handle: &handle, call };
            on_opened(&handle, &opens, number, Ok(opened(0)));
            assert_eq!(asked(&handle), (vec![], 0));
            drop(opening);
            assert_eq!(asked(&handle), (vec![], 1));
        });
    }
}
