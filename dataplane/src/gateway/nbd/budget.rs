//! Budget: what one connection may have under way at once, in operations, bytes and buffers of the pool.
//!
//! The session admits each operation before it reads its payload or starts it; while there is no room it reads
//! nothing from the socket, which is what holds the client back. A permit travels with its operation into the
//! batch of replies and ends when they are written, so that a client which does not read is bounded too.
//!
//! Buffers are counted in slots, since a buffer takes a whole one, however few bytes are in it. All connections of a
//! gateway share a part of the slots of each class. A connection gets more only as long as it holds no more than is
//! left; so one alone gets half, two a third each, and there is always something for the next. One that holds
//! nothing comes before those that do, in the order of arrival: what is given back goes to it.
//!
//! Invariants
//! - `bytes`, `slots` and `operations` are the sums over all living permits.
//! - The connections hold no more of a class than `slots_max` together, except one that holds all of it alone.
//!
//! Source: Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::Counters;
use crate::disk::buffers::{BufferPool, CLASS_BYTES, Claim, size_class};

/// Buffers that an operation takes of the pool, all of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slots {
    class: usize,
    count: usize,
}

impl Slots {
    pub const NONE: Self = Self { class: 0, count: 0 };

    /// `count` buffers of up to `length` bytes each.
    pub fn new(count: usize, length: usize) -> Self {
        Self { class: size_class(length), count }
    }

    const fn bytes(self) -> usize {
        self.count * CLASS_BYTES[self.class]
    }
}

/// One class of slots, as the connections share it.
#[derive(Default)]
struct Class {
    slots_max: usize,
    slots: Cell<usize>,
    /// Connections that hold nothing of the class and wait for some of it.
    hungry: RefCell<VecDeque<(u64, Waker)>>,
    /// Connections that wait and hold something already.
    waiters: RefCell<Vec<Waker>>,
}

impl Class {
    fn free(&self) -> usize {
        self.slots_max.saturating_sub(self.slots.get())
    }

    /// Wakes who may be next.
    fn wake(&self) {
        match self.hungry.borrow().front() {
            Some((_, first)) => first.wake_by_ref(),
            None => self.waiters.borrow_mut().drain(..).for_each(Waker::wake),
        }
    }
}

/// What the connections of one gateway may hold of its pool together.
pub(super) struct Share {
    classes: [Class; CLASS_BYTES.len()],
    next_ticket: Cell<u64>,
    counters: Arc<Counters>,
}

impl Share {
    /// As much of each class as clients' payloads may take of it.
    pub fn new(pool: &BufferPool, counters: Arc<Counters>) -> Rc<Self> {
        let classes = pool.occupancy().map(|(_, slots)| Class {
            slots_max: (slots - Claim::Client.leaves(slots)).max(1),
            ..Class::default()
        });
        Rc::new(Self { classes, next_ticket: Cell::new(0), counters })
    }
}

pub(super) struct Budget {
    bytes_max: usize,
    operations_max: usize,
    bytes: Cell<usize>,
    operations: Cell<usize>,
    slots: [Cell<usize>; CLASS_BYTES.len()],
    share: Rc<Share>,
    waiters: RefCell<Vec<Waker>>,
}

/// One operation and its buffers, until dropped.
pub(super) struct Permit {
    budget: Rc<Budget>,
    slots: Slots,
}

/// A connection's place among those that hold nothing; given up when dropped.
struct Place<'a> {
    class: &'a Class,
    ticket: Option<u64>,
}

impl Place<'_> {
    fn is_first(&self) -> bool {
        self.class.hungry.borrow().front().is_none_or(|(first, _)| Some(*first) == self.ticket)
    }

    fn keep(&mut self, waker: &Waker, next_ticket: &Cell<u64>) {
        let mut hungry = self.class.hungry.borrow_mut();
        match hungry.iter_mut().find(|(ticket, _)| Some(*ticket) == self.ticket) {
            Some((_, kept)) => kept.clone_from(waker),
            None => {
                let ticket = next_ticket.replace(next_ticket.get() + 1);
                self.ticket = Some(ticket);
                hungry.push_back((ticket, waker.clone()));
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.ticket.is_some() {
            self.class.hungry.borrow_mut().retain(|(ticket, _)| Some(*ticket) != self.ticket);
            self.class.wake();
        }
    }
}

impl Budget {
    pub fn new(bytes_max: usize, operations_max: usize, share: Rc<Share>) -> Rc<Self> {
        assert!(operations_max > 0);
        Rc::new(Self {
            bytes_max,
            operations_max,
            bytes: Cell::new(0),
            operations: Cell::new(0),
            slots: Default::default(),
            share,
            waiters: RefCell::default(),
        })
    }

    /// Waits for room for one more operation that takes `slots`; one that is larger than the budget runs alone.
    pub async fn admit(self: &Rc<Self>, slots: Slots) -> Permit {
        let class = &self.share.classes[slots.class];
        let mut place = Place { class, ticket: None };
        let mut waited = false;
        poll_fn(|context| {
            // What this connection gives back itself may be what it waits for, or make it one that holds nothing.
            let wait_for_own = || self.waiters.borrow_mut().push(context.waker().clone());
            if !self.has_room(slots) {
                wait_for_own();
                return Poll::Pending;
            }
            if slots.count == 0 || self.may_take(slots, &place) {
                return Poll::Ready(());
            }
            if !std::mem::replace(&mut waited, true) {
                self.share.counters.pool_waits.fetch_add(1, Ordering::Relaxed);
            }
            wait_for_own();
            if self.slots[slots.class].get() == 0 {
                place.keep(context.waker(), &self.share.next_ticket);
            } else {
                class.waiters.borrow_mut().push(context.waker().clone());
            }
            Poll::Pending
        })
        .await;
        self.bytes.set(self.bytes.get() + slots.bytes());
        self.operations.set(self.operations.get() + 1);
        self.slots[slots.class].set(self.slots[slots.class].get() + slots.count);
        class.slots.set(class.slots.get() + slots.count);
        Permit { budget: Rc::clone(self), slots }
    }

    /// Is there room by the bounds of this connection alone?
    fn has_room(&self, slots: Slots) -> bool {
        let fits = self.bytes.get() + slots.bytes() <= self.bytes_max || self.bytes.get() == 0;
        fits && self.operations.get() < self.operations_max
    }

    /// Is it this connection's turn, by what the others hold?
    fn may_take(&self, slots: Slots, place: &Place) -> bool {
        let held = self.slots[slots.class].get();
        let fits = held + slots.count <= place.class.free() || place.class.slots.get() == 0;
        fits && place.is_first()
    }

    /// Does it hold buffers?
    pub fn holds_buffers(&self) -> bool {
        self.bytes.get() > 0
    }

    /// Who waits first for some of what it holds, and has nothing of that.
    pub fn starves(&self) -> Option<u64> {
        let mut held = self.slots.iter().zip(&self.share.classes).filter(|(held, _)| held.get() > 0);
        held.find_map(|(_, class)| Some(class.hungry.borrow().front()?.0))
    }

    /// Waits until nothing is under way and every reply is written.
    pub async fn idle(&self) {
        poll_fn(|context| {
            if self.operations.get() == 0 {
                return Poll::Ready(());
            }
            self.waiters.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn give_back(&self, operations: usize, slots: Slots) {
        self.operations.set(self.operations.get() - operations);
        self.bytes.set(self.bytes.get() - slots.bytes());
        let held = &self.slots[slots.class];
        held.set(held.get() - slots.count);
        // All of them, in the order they came: each looks for itself.
        self.waiters.borrow_mut().drain(..).for_each(Waker::wake);
        if slots.count > 0 {
            let class = &self.share.classes[slots.class];
            class.slots.set(class.slots.get() - slots.count);
            class.wake();
        }
    }
}

impl Permit {
    /// The payload is gone, only the reply is left to be written.
    pub fn release_slots(&mut self) {
        self.budget.give_back(0, std::mem::take(&mut self.slots));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.give_back(1, self.slots);
    }
}

#[cfg(test)]
mod tests;
