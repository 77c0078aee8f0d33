//! Calls under way: requests whose answers have not come, of primaries or of the control plane.
//!
//! Used by `volume` (starts and awaits) and by `shard` (completes). Local to a shard; a call's number carries
//! a generation, so that an answer to a call given up long ago finds nobody.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use xsan_protocol::error::Code;
use xsan_protocol::ids::{GroupId, Incarnation, NodeId};
use xsan_protocol::map::ClusterMap;

use crate::replication::Reply;

/// What a call is answered with.
#[derive(Debug)]
pub enum Answer {
    Reply(Reply),
    /// The groups that a flush of a pool covered.
    Flushed(Vec<GroupId>),
}

/// Where a call went: one life of one node's data process, for one group (none for a flush of a pool).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    pub node: NodeId,
    pub incarnation: Incarnation,
    pub group: Option<GroupId>,
}

enum Slot<D, A> {
    Free,
    Waiting { destination: D, waker: Option<Waker> },
    Done(Result<A, Code>),
}

struct Table<D, A> {
    slots: Vec<(u32, Slot<D, A>)>,
    free: Vec<u32>,
}

/// Calls to destinations `D` that are answered with `A`; a handle that the shard's tasks share.
pub struct Calls<D = Destination, A = Answer>(Rc<RefCell<Table<D, A>>>);

impl<D, A> Default for Calls<D, A> {
    fn default() -> Self {
        Self(Rc::new(RefCell::new(Table { slots: Vec::new(), free: Vec::new() })))
    }
}

impl<D, A> Clone for Calls<D, A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<D, A> Calls<D, A> {
    /// A new call: its number, for the request, and the future of its answer.
    pub fn start(&self, destination: D) -> (u64, Call<D, A>) {
        let mut table = self.0.borrow_mut();
        let index = table.free.pop().unwrap_or_else(|| {
            table.slots.push((0, Slot::Free));
            (table.slots.len() - 1) as u32
        });
        let (generation, slot) = &mut table.slots[index as usize];
        assert!(matches!(slot, Slot::Free));
        *slot = Slot::Waiting { destination, waker: None };
        let number = u64::from(*generation) << 32 | u64::from(index);
        (number, Call { calls: self.clone(), number })
    }

    /// The answer to call `number`; nothing happens if it was given up.
    pub fn complete(&self, number: u64, result: Result<A, Code>) {
        self.offer(number, result);
    }

    /// As [`Self::complete`]; an answer that nobody waits for is given back.
    pub fn offer(&self, number: u64, result: Result<A, Code>) -> Option<Result<A, Code>> {
        let mut table = self.0.borrow_mut();
        match table.slots.get_mut(number as u32 as usize) {
            Some((generation, slot @ Slot::Waiting { .. })) if u64::from(*generation) == number >> 32 => {
                let before = std::mem::replace(slot, Slot::Done(result));
                drop(table);
                if let Slot::Waiting { waker: Some(waker), .. } = before {
                    waker.wake();
                }
                None
            }
            _ => Some(result),
        }
    }

    /// Ends every waiting call that `lost` picks with `code`: its answer will not come.
    pub fn fail_where(&self, code: Code, mut lost: impl FnMut(&D) -> bool) {
        let mut wakers = Vec::new();
        for (_, slot) in &mut self.0.borrow_mut().slots {
            if let Slot::Waiting { destination, waker } = slot
                && lost(destination)
            {
                wakers.extend(waker.take());
                *slot = Slot::Done(Err(code));
            }
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Does call `number` wait for its answer?
    pub fn is_waiting(&self, number: u64) -> bool {
        let table = self.0.borrow();
        let slot = table.slots.get(number as u32 as usize);
        matches!(slot, Some((generation, Slot::Waiting { .. })) if u64::from(*generation) == number >> 32)
    }

    /// Calls that wait.
    pub fn count(&self) -> usize {
        let table = self.0.borrow();
        table.slots.len() - table.free.len()
    }
}

impl Calls {
    /// Ends the calls whose group has another primary by `map` than the one they were sent to, and flushes of a pool
    /// at nodes that are primary of nothing any more.
    ///
    /// The old primary can not answer any more, or only with an error: its lease has ended or it has taken the new
    /// epoch. A call to a primary that stays is never given up: sent twice, its first copy could land late. A flush may.
    pub fn on_map(&self, map: &ClusterMap) {
        self.fail_where(Code::StaleEpoch, |destination| match destination.group {
            Some(group) => map.route(group).is_none_or(|(node, ..)| {
                let incarnation = map.nodes[&node].data.as_ref().map(|data| data.incarnation);
                node != destination.node || incarnation != Some(destination.incarnation)
            }),
            None => {
                let node = map.nodes.get(&destination.node);
                let data = node.and_then(|node| node.data.as_ref());
                data.is_none_or(|data| data.incarnation != destination.incarnation)
                    || map.groups.values().all(|group| group.primary != Some(destination.node))
            }
        });
    }
}

/// The future of one answer. Dropped, the call is given up.
pub struct Call<D = Destination, A = Answer> {
    calls: Calls<D, A>,
    number: u64,
}

impl<D, A> Call<D, A> {
    /// The answer, if it has come and the future did not return it.
    pub fn take(&mut self) -> Option<Result<A, Code>> {
        let mut table = self.calls.0.borrow_mut();
        match &mut table.slots[self.number as u32 as usize].1 {
            Slot::Done(result) => Some(std::mem::replace(result, Err(Code::Internal))),
            _ => None,
        }
    }
}

impl<D, A> Future for Call<D, A> {
    type Output = Result<A, Code>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.take() {
            return Poll::Ready(result);
        }
        let mut table = self.calls.0.borrow_mut();
        match &mut table.slots[self.number as u32 as usize].1 {
            Slot::Waiting { waker, .. } => *waker = Some(context.waker().clone()),
            _ => unreachable!("a call keeps its slot until it is dropped"),
        }
        Poll::Pending
    }
}

impl<D, A> Drop for Call<D, A> {
    fn drop(&mut self) {
        let mut table = self.calls.0.borrow_mut();
        let index = self.number as u32;
        let (generation, slot) = &mut table.slots[index as usize];
        *generation = generation.wrapping_add(1);
        *slot = Slot::Free;
        table.free.push(index);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use xsan_protocol::ids::Epoch;
    use xsan_protocol::map::Group;

    use super::*;
    use crate::testing::node_of_map;

    const DESTINATION: Destination =
        Destination { node: NodeId(1), incarnation: Incarnation(7), group: Some(GroupId(3)) };

    fn poll(call: &mut Call) -> Poll<Result<Answer, Code>> {
        Pin::new(call).poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn an_answer_reaches_its_call_once() {
        let calls = Calls::default();
        let (number, mut call) = calls.start(DESTINATION);
        assert!(poll(&mut call).is_pending());
        assert!(calls.offer(number, Ok(Answer::Reply(Reply::Done))).is_none());
        assert!(!calls.is_waiting(number));
        assert!(calls.offer(number, Err(Code::Busy)).is_some());
        assert!(matches!(poll(&mut call), Poll::Ready(Ok(Answer::Reply(Reply::Done)))));
    }

    #[test]
    fn an_answer_to_a_call_given_up_finds_nobody() {
        let calls = Calls::default();
        let (old, call) = calls.start(DESTINATION);
        drop(call);
        let (new, mut call) = calls.start(DESTINATION);
        assert_ne!(old, new);
        assert!(calls.is_waiting(new) && !calls.is_waiting(old));
        assert!(calls.offer(old, Ok(Answer::Reply(Reply::Done))).is_some());
        assert!(poll(&mut call).is_pending());
        assert_eq!(calls.count(), 1);
    }

    fn map(primary: NodeId) -> ClusterMap {
        let node = node_of_map(NodeId(1), Incarnation(7), Vec::new());
        let id = GroupId(3);
        let (members, former, dropped) = (Vec::new(), Vec::new(), Vec::new());
        let group = Group { id, epoch: Epoch(1), primary: Some(primary), members, former, dropped };
        ClusterMap {
            nodes: [(NodeId(1), node)].into(),
            groups: [(id, group)].into(),
            ..ClusterMap::default()
        }
    }

    /// A flush under way to a node that was cut off waited until the connection broke, 10 s, though the map had
    /// moved on at once. Found by the process-level test of one-way cuts.
    #[test]
    fn a_flush_at_a_node_that_leads_nothing_any_more_is_given_up() {
        let calls = Calls::default();
        let (_, mut flush) = calls.start(Destination { group: None, ..DESTINATION });
        calls.on_map(&map(NodeId(1)));
        assert!(poll(&mut flush).is_pending());
        calls.on_map(&map(NodeId(2)));
        assert!(matches!(poll(&mut flush), Poll::Ready(Err(Code::StaleEpoch))));
    }

    #[test]
    fn a_lost_connection_ends_its_calls_and_no_others() {
        let calls = Calls::default();
        let (_, mut lost) = calls.start(DESTINATION);
        let (_, mut kept) = calls.start(Destination { node: NodeId(2), ..DESTINATION });
        calls.fail_where(Code::GroupInactive, |destination| destination.node == NodeId(1));
        assert!(matches!(poll(&mut lost), Poll::Ready(Err(Code::GroupInactive))));
        assert!(poll(&mut kept).is_pending());
    }
}
