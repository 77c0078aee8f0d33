//! Messages between the shards of a process: one bounded single-producer ring for each ordered pair.
//!
//! A shard stages what it sends during its turn and publishes it at the end; a parked receiver is woken by its
//! eventfd, a running one is not. Other threads reach a shard through its many-to-one [`Inbox`].
//! Used by `shard`; knows nothing of what is sent.
//!
//! Invariants
//! - Messages of one shard to another arrive in the order sent, none lost: what a full ring does not take
//!   stays staged until the receiver has made room, and then wakes the sender.
//! - A receiver that sleeps has nothing published for it that it has not been woken for (`parker`).

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;
use rtrb::{Consumer, Producer, RingBuffer};
use xsan_protocol::ids::ShardIndex;

use super::parker::Parker;
use crate::disk::eventfd::EventFd;

/// Messages that other threads may have waiting at a shard.
const INBOX_CAPACITY: usize = 64;

/// How a shard is woken.
#[derive(Debug)]
struct Bell {
    parker: Parker,
    eventfd: EventFd,
}

impl Bell {
    fn ring(&self) {
        if self.parker.must_wake() {
            self.eventfd.signal();
        }
    }
}

/// The way into a shard for threads that are no shards.
#[derive(Debug)]
pub struct Inbox<T> {
    queue: Arc<ArrayQueue<T>>,
    bell: Arc<Bell>,
}

impl<T> Inbox<T> {
    /// Sends a message; gives it back when too many wait.
    pub fn send(&self, message: T) -> Result<(), T> {
        self.queue.push(message)?;
        self.bell.ring();
        Ok(())
    }
}

struct Outgoing<T> {
    ring: Producer<T>,
    staged: VecDeque<T>,
    /// The receiver's.
    bell: Arc<Bell>,
    /// Parked while the ring is full and more is staged.
    room: Arc<Parker>,
}

struct Incoming<T> {
    ring: Consumer<T>,
    /// The sender's.
    bell: Arc<Bell>,
    room: Arc<Parker>,
}

/// One shard's end of the mesh.
pub struct MeshEnd<T> {
    outgoing: Vec<Option<Outgoing<T>>>,
    incoming: Vec<Option<Incoming<T>>>,
    inbox: Arc<ArrayQueue<T>>,
    bell: Arc<Bell>,
}

/// The ends of a mesh of `shards` shards, with rings for `capacity` messages each.
///
/// # Panics
/// No eventfd can be had: the process has too many open files at its start.
pub fn mesh<T>(shards: usize, capacity: usize) -> Vec<MeshEnd<T>> {
    let bell = || {
        let eventfd = EventFd::new().expect("a starting process has descriptors left");
        Arc::new(Bell { parker: Parker::new(), eventfd })
    };
    let bells: Vec<_> = (0..shards).map(|_| bell()).collect();
    let mut ends: Vec<_> = bells
        .iter()
        .map(|bell| MeshEnd {
            outgoing: (0..shards).map(|_| None).collect(),
            incoming: (0..shards).map(|_| None).collect(),
            inbox: Arc::new(ArrayQueue::new(INBOX_CAPACITY)),
            bell: bell.clone(),
        })
        .collect();
    for from in 0..shards {
        for to in (0..shards).filter(|to| *to != from) {
            let (producer, consumer) = RingBuffer::new(capacity);
            let room = Arc::new(Parker::new());
            ends[from].outgoing[to] = Some(Outgoing {
                ring: producer,
                staged: VecDeque::new(),
                bell: bells[to].clone(),
                room: room.clone(),
            });
            ends[to].incoming[from] = Some(Incoming { ring: consumer, bell: bells[from].clone(), room });
        }
    }
    ends
}

impl<T> MeshEnd<T> {
    /// The way in for other threads.
    pub fn inbox(&self) -> Inbox<T> {
        Inbox { queue: self.inbox.clone(), bell: self.bell.clone() }
    }

    /// Signalled when messages came while the shard was parked.
    pub fn eventfd(&self) -> &EventFd {
        &self.bell.eventfd
    }

    /// Stages a message; `flush` publishes it.
    ///
    /// # Panics
    /// To the shard itself: it needs no ring for that.
    pub fn send(&mut self, to: ShardIndex, message: T) {
        let outgoing = self.outgoing[usize::from(to.0)].as_mut();
        outgoing.expect("a shard sends itself nothing through the mesh").staged.push_back(message);
    }

    /// Publishes what is staged, as far as the rings take it, and wakes parked receivers.
    ///
    /// A receiver that makes room in a full ring signals this shard's eventfd.
    pub fn flush(&mut self) {
        for outgoing in self.outgoing.iter_mut().flatten().filter(|outgoing| !outgoing.staged.is_empty()) {
            let mut published = false;
            while let Some(message) = outgoing.staged.pop_front() {
                match outgoing.ring.push(message) {
                    Ok(()) => published = true,
                    Err(rtrb::PushError::Full(message)) => {
                        outgoing.staged.push_front(message);
                        if outgoing.room.park(|| outgoing.ring.is_full()) {
                            break;
                        }
                    }
                }
            }
            if published {
                outgoing.bell.ring();
            }
        }
    }

    /// Takes everything that was sent to this shard, with its sender; other threads count as this shard.
    pub fn receive(&mut self, own: ShardIndex, out: &mut Vec<(ShardIndex, T)>) {
        for (from, incoming) in self.incoming.iter_mut().enumerate() {
            let Some(incoming) = incoming else { continue };
            let before = out.len();
            while let Ok(message) = incoming.ring.pop() {
                out.push((ShardIndex(from as u16), message));
            }
            if out.len() > before && incoming.room.must_wake() {
                incoming.bell.eventfd.signal();
            }
        }
        while let Some(message) = self.inbox.pop() {
            out.push((own, message));
        }
    }

    /// Before the shard sleeps: `false` when messages are there after all.
    pub fn park(&self) -> bool {
        self.bell
            .parker
            .park(|| self.inbox.is_empty() && self.incoming.iter().flatten().all(|from| from.ring.is_empty()))
    }

    /// The shard is awake: it needs no waking until it parks again.
    pub fn unpark(&self) {
        self.bell.parker.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ShardIndex = ShardIndex(0);
    const B: ShardIndex = ShardIndex(1);

    /// Waits as a shard does, in its runtime, and takes what is there.
    fn drain(end: &mut MeshEnd<u64>, own: ShardIndex, expected: u64) -> Vec<u64> {
        let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build().unwrap();
        runtime.block_on(async {
            let mut waiter = end.eventfd().waiter().unwrap();
            let (mut messages, mut taken) = (Vec::new(), Vec::new());
            while (taken.len() as u64) < expected {
                if end.park() {
                    waiter.wait().await.unwrap();
                }
                end.unpark();
                end.receive(own, &mut messages);
                taken.extend(messages.drain(..).map(|(_, message)| message));
            }
            taken
        })
    }

    /// Flushes until nothing is staged; waits for the receiver to make room meanwhile.
    fn flush_all(sender: &mut MeshEnd<u64>) {
        let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build().unwrap();
        runtime.block_on(async {
            let mut waiter = sender.eventfd().waiter().unwrap();
            sender.flush();
            while sender.outgoing.iter().flatten().any(|outgoing| !outgoing.staged.is_empty()) {
                waiter.wait().await.unwrap();
                sender.flush();
            }
        });
    }

    #[test]
    fn no_message_and_no_wake_is_lost_between_threads() {
        const COUNT: u64 = 200_000;
        let mut ends = mesh::<u64>(2, 64);
        let mut receiver = ends.pop().unwrap();
        let mut sender = ends.pop().unwrap();
        let sending = std::thread::spawn(move || {
            for message in 0..COUNT {
                sender.send(B, message);
                // Turns of all sizes, so that the receiver parks often.
                if message % 7 == 0 || message % 100 == 99 {
                    sender.flush();
                }
            }
            flush_all(&mut sender);
        });
        let taken = drain(&mut receiver, B, COUNT);
        sending.join().unwrap();
        assert!(taken.into_iter().eq(0..COUNT));
    }

    #[test]
    fn another_thread_wakes_a_parked_shard() {
        let mut end = mesh::<u64>(1, 4).pop().unwrap();
        let inbox = end.inbox();
        let sending = std::thread::spawn(move || inbox.send(7).unwrap());
        assert_eq!(drain(&mut end, A, 1), [7]);
        sending.join().unwrap();
    }

    /// What a full ring did not take was tried again at the sender's next turn alone, up to a tick later. Found by
    /// reading.
    #[test]
    fn what_a_full_ring_does_not_take_waits_in_order_and_the_sender_is_woken() {
        let mut ends = mesh::<u64>(2, 2);
        let mut receiver = ends.pop().unwrap();
        let mut sender = ends.pop().unwrap();
        let sending = std::thread::spawn(move || {
            (0..1000).for_each(|message| sender.send(B, message));
            flush_all(&mut sender);
        });
        assert!(drain(&mut receiver, B, 1000).into_iter().eq(0..1000));
        sending.join().unwrap();
    }
}
