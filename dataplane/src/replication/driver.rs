//! The driver: replication and the stores of one shard, together.
//!
//! Replication's actions on stores, the stores' events and the refusals of records are settled in here; what is
//! for the world comes out as [`Output`]. `shard` carries that out with sockets and devices; so does the simulator, with its own.
//!
//! Invariants
//! - The actions of one call are carried out, in order, before the next call.
//! - Behind a record that its store refused, no later record of the same group and call is offered to it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use xsan_protocol::error::Code;
use xsan_protocol::ids::{Epoch, GroupId, NodeId, StoreId};

use super::action::{Action, Change, Reply, RequestId};
use super::call::Stores;
use super::{RecoveredGroup, Replication};
use crate::io::{DiskAction, DiskCompletion};
use crate::net::frame::Frame;
use crate::store::{Recovered, Refused, Store, StoreEvent, StoreView, Withdrawn};

/// Flush token of a clean stop; replication's tokens count from 1.
const STOP_TOKEN: u64 = u64::MAX;

/// What the state machines want of the world, in this order.
#[derive(Debug)]
pub enum Output {
    Send {
        to: NodeId,
        frame: Frame,
    },
    Unsend {
        to: NodeId,
        group: GroupId,
    },
    Complete {
        request: RequestId,
        result: Result<Reply, Code>,
    },
    Propose {
        group: GroupId,
        epoch: Epoch,
        node: NodeId,
        change: Change,
    },
    /// The store takes nothing more.
    StoreFailed(StoreId),
    /// After `stop`: everything durable in the store is on stable media, or it has failed.
    StoreStopped(StoreId),
}

#[derive(Debug)]
pub struct Driver {
    pub replication: Replication,
    stores: StoreTable,
    /// Stores that were told to have failed.
    failed: BTreeSet<StoreId>,
    /// Stores whose flush, or failure, a clean stop waits for.
    stopping: BTreeSet<StoreId>,
    /// Emptied by every call; kept for their memory.
    actions: Vec<Action>,
    events: Vec<StoreEvent>,
    operations: Vec<DiskAction>,
}

/// The shard's stores, as replication asks for them.
#[derive(Debug, Default)]
pub struct StoreTable(BTreeMap<StoreId, Store>);

impl StoreTable {
    /// # Panics
    /// The store is not of this shard: replication names only those that it was given.
    fn get(&mut self, id: StoreId) -> &mut Store {
        self.0.get_mut(&id).expect("replication names only this shard's stores")
    }
}

impl Stores for StoreTable {
    fn view(&self, id: StoreId) -> &dyn StoreView {
        &self.0[&id]
    }
}

impl Driver {
    pub fn new(replication: Replication) -> Self {
        Self {
            replication,
            stores: StoreTable::default(),
            failed: BTreeSet::new(),
            stopping: BTreeSet::new(),
            actions: Vec::new(),
            events: Vec::new(),
            operations: Vec::new(),
        }
    }

    /// Takes a store in, with what it recovered.
    pub fn add_store(&mut self, store: Store, recovered: Recovered) {
        let groups = recovered.groups.into_iter().map(|group| RecoveredGroup {
            group: group.group,
            tail: group.tail,
            pending: group.pending,
        });
        self.replication.add_store(store.id(), groups.collect(), recovered.damaged);
        self.stores.0.insert(store.id(), store);
    }

    pub fn stores(&self) -> impl Iterator<Item = &Store> {
        self.stores.0.values()
    }

    pub fn store(&self, id: StoreId) -> Option<&Store> {
        self.stores.0.get(&id)
    }

    /// Calls into replication, then carries out what it asks of the stores, until it asks for nothing more.
    pub fn call(
        &mut self,
        now_ns: u64,
        out: &mut Vec<Output>,
        call: impl FnOnce(&mut Replication, &StoreTable, u64, &mut Vec<Action>),
    ) {
        let mut actions = std::mem::take(&mut self.actions);
        let (mut refused, mut withdrawn) = (VecDeque::new(), Vec::new());
        call(&mut self.replication, &self.stores, now_ns, &mut actions);
        loop {
            for action in actions.drain(..) {
                self.carry_out(action, &mut refused, &mut withdrawn, out);
            }
            if !withdrawn.is_empty() {
                let withdrawn = std::mem::take(&mut withdrawn);
                self.replication.on_withdrawn(withdrawn, &self.stores, now_ns, &mut actions);
                continue;
            }
            let Some((store, Refused { record, error })) = refused.pop_front() else { break };
            self.replication.on_append_refused(store, *record, error, &self.stores, now_ns, &mut actions);
        }
        self.actions = actions;
    }

    fn carry_out(
        &mut self,
        action: Action,
        refused: &mut VecDeque<(StoreId, Refused)>,
        withdrawn: &mut Vec<(GroupId, Withdrawn)>,
        out: &mut Vec<Output>,
    ) {
        match action {
            Action::Append { store, record } => {
                let group = record.group();
                let same =
                    |(of, earlier): &&(StoreId, Refused)| *of == store && earlier.record.group() == group;
                let behind = refused.iter().find(same);
                let result = match behind {
                    Some((_, earlier)) => Err(Refused { record: Box::new(record), error: earlier.error }),
                    None => self.stores.get(store).append(record),
                };
                refused.extend(result.err().map(|refusal| (store, refusal)));
            }
            Action::Withdraw { store, group } => {
                withdrawn.push((group, self.stores.get(store).withdraw(group)));
            }
            Action::Apply { store, group, through } => self.stores.get(store).apply(group, through),
            Action::Read { store, token, group, key, pages, buffer } => {
                self.stores.get(store).read(token, group, key, pages, buffer);
            }
            Action::Flush { store, token } => self.stores.get(store).flush(token),
            Action::Repair { store, token, group, key, pages, data } => {
                self.stores.get(store).repair(token, group, key, pages, data);
            }
            Action::Send { to, frame } => out.push(Output::Send { to, frame }),
            Action::Unsend { to, group } => out.push(Output::Unsend { to, group }),
            Action::Complete { request, result } => out.push(Output::Complete { request, result }),
            Action::Propose { group, epoch, node, change } => {
                out.push(Output::Propose { group, epoch, node, change });
            }
        }
    }

    pub fn on_tick(&mut self, now_ns: u64, out: &mut Vec<Output>) {
        self.stores.0.values_mut().for_each(|store| store.tick(now_ns));
        self.call(now_ns, out, |replication, stores, now, out| replication.on_tick(now, stores, out));
    }

    /// A device operation of `store` ended. What follows is in `end_turn`.
    pub fn on_disk(&mut self, store: StoreId, completion: DiskCompletion) {
        self.stores.get(store).on_disk(completion);
    }

    /// Ends a turn: settles what the stores report, and hands out their device operations of the whole turn.
    pub fn end_turn(
        &mut self,
        now_ns: u64,
        operations: &mut Vec<(StoreId, DiskAction)>,
        out: &mut Vec<Output>,
    ) {
        self.take_events(now_ns, out);
        while self.replication.has_deferred() {
            self.call(now_ns, out, |replication, stores, now, out| replication.on_tick(now, stores, out));
        }
        for (id, store) in &mut self.stores.0 {
            store.end_turn(&mut self.operations);
            operations.extend(self.operations.drain(..).map(|operation| (*id, operation)));
        }
        // What `end_turn` itself brought about, as reads of what is in memory.
        self.take_events(now_ns, out);
    }

    /// Feeds the stores' events to replication, until the stores are quiet.
    fn take_events(&mut self, now_ns: u64, out: &mut Vec<Output>) {
        let mut events = std::mem::take(&mut self.events);
        let ids: Vec<StoreId> = self.stores.0.keys().copied().collect();
        for id in ids {
            loop {
                self.stores.get(id).take_events(&mut events);
                if events.is_empty() {
                    break;
                }
                for event in events.drain(..) {
                    self.on_store_event(id, event, now_ns, out);
                }
            }
        }
        self.events = events;
    }

    fn on_store_event(&mut self, store: StoreId, event: StoreEvent, now_ns: u64, out: &mut Vec<Output>) {
        match event {
            StoreEvent::Flushed { token: STOP_TOKEN } => return self.stopped(store, out),
            StoreEvent::Failed => {
                self.failed.insert(store);
                out.push(Output::StoreFailed(store));
                self.stopped(store, out);
            }
            _ => {}
        }
        self.call(now_ns, out, |replication, stores, now, out| {
            replication.on_store_event(store, event, stores, now, out);
        });
    }

    /// Begins a clean stop: every store ends with `StoreStopped`, also one that has failed or fails before its flush.
    pub fn stop(&mut self, out: &mut Vec<Output>) {
        for (id, store) in &mut self.stores.0 {
            self.stopping.insert(*id);
            store.flush(STOP_TOKEN);
        }
        // Of one whose failure is not told yet, that comes first.
        for id in self.failed.clone() {
            self.stopped(id, out);
        }
    }

    fn stopped(&mut self, store: StoreId, out: &mut Vec<Output>) {
        if self.stopping.remove(&store) {
            out.push(Output::StoreStopped(store));
        }
    }
}
