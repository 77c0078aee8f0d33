//! Flushes: one at a time for a store, shared by everyone who waits for it.
//!
//! Many groups of a store ask for a flush in one turn; the first gets one at once, all others share the next.
//! Used by `replica` (writes that must be stable), `primary` (client flushes) and members asked by a primary.
//!
//! Invariants
//! - A waiter is released only by a flush that was issued after it asked.

use std::collections::BTreeMap;

use xsan_protocol::ids::{Epoch, GroupId, NodeId, StoreId};
use xsan_protocol::mutation::Mutation;

use super::action::Action;

/// Who waits for a store's flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlushWaiter {
    /// What the replica had in its journal becomes stable.
    Replica { group: GroupId, ticket: u64 },
    /// A primary asked for it.
    Member { group: GroupId, epoch: Epoch, to: NodeId, request_id: u64 },
    /// This node's part of a round of flushes that it leads.
    Round { group: GroupId, round: u64 },
}

#[derive(Debug, Default)]
struct StoreFlush {
    /// Token of the flush under way.
    token: Option<u64>,
    current: Vec<FlushWaiter>,
    next: Vec<FlushWaiter>,
}

#[derive(Debug, Default)]
pub(super) struct Flushes {
    stores: BTreeMap<StoreId, StoreFlush>,
}

impl Flushes {
    /// `waiter` is to be released by a flush issued from now on. `token` names the flush if one starts now.
    pub fn request(&mut self, store: StoreId, waiter: FlushWaiter, token: u64, out: &mut Vec<Action>) {
        let flush = self.stores.entry(store).or_default();
        if flush.token.is_some() {
            let late =
                if Mutation::FlushServesLateComers.is_on() { &mut flush.current } else { &mut flush.next };
            late.push(waiter);
            return;
        }
        flush.token = Some(token);
        flush.current.push(waiter);
        out.push(Action::Flush { store, token });
    }

    /// The flush `token` of `store` ended; starts the next as `next_token` if someone waits. Returns who is released.
    pub fn on_flushed(
        &mut self,
        store: StoreId,
        token: u64,
        next_token: u64,
        out: &mut Vec<Action>,
    ) -> Vec<FlushWaiter> {
        let Some(flush) = self.stores.get_mut(&store) else { return Vec::new() };
        if flush.token != Some(token) {
            return Vec::new();
        }
        let released = std::mem::replace(&mut flush.current, std::mem::take(&mut flush.next));
        flush.token = None;
        if !flush.current.is_empty() {
            flush.token = Some(next_token);
            out.push(Action::Flush { store, token: next_token });
        }
        released
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_under_way_does_not_serve_who_came_later() {
        let (store, mut out, mut flushes) = (StoreId(1), Vec::new(), Flushes::default());
        let waiter = |group| FlushWaiter::Replica { group: GroupId(group), ticket: 1 };
        flushes.request(store, waiter(1), 10, &mut out);
        flushes.request(store, waiter(2), 11, &mut out);
        flushes.request(store, waiter(3), 12, &mut out);
        assert_eq!(out.len(), 1);
        assert_eq!(flushes.on_flushed(store, 10, 13, &mut out), vec![waiter(1)]);
        assert_eq!(out.len(), 2);
        assert_eq!(flushes.on_flushed(store, 13, 14, &mut out), vec![waiter(2), waiter(3)]);
        assert_eq!(out.len(), 2);
    }
}
