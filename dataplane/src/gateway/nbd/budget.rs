//! Budget: what may be under way at once, in operations and in bytes: of one connection, or of several.
//!
//! The session admits each operation before it reads its payload or starts it; while there is no room it reads
//! nothing from the socket, which is what holds the client back. A permit travels with its operation into the
//! batch of replies and ends when they are written, so that a client which does not read is bounded too.
//!
//! Invariants
//! - `bytes` and `operations` are the sums over all living permits.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

pub(super) struct Budget {
    bytes_max: usize,
    operations_max: usize,
    bytes: Cell<usize>,
    operations: Cell<usize>,
    waiters: RefCell<Vec<Waker>>,
}

/// One operation and its bytes, until dropped.
pub(super) struct Permit {
    budget: Rc<Budget>,
    bytes: usize,
}

impl Budget {
    pub fn new(bytes_max: usize, operations_max: usize) -> Rc<Self> {
        assert!(operations_max > 0);
        Rc::new(Self {
            bytes_max,
            operations_max,
            bytes: Cell::new(0),
            operations: Cell::new(0),
            waiters: RefCell::default(),
        })
    }

    /// Waits for room for one more operation of `bytes`; one that is larger than the budget runs alone.
    pub async fn admit(self: &Rc<Self>, bytes: usize) -> Permit {
        self.wait(|budget| {
            let fits = budget.bytes.get() + bytes <= budget.bytes_max || budget.bytes.get() == 0;
            fits && budget.operations.get() < budget.operations_max
        })
        .await;
        self.bytes.set(self.bytes.get() + bytes);
        self.operations.set(self.operations.get() + 1);
        Permit { budget: Rc::clone(self), bytes }
    }

    /// Waits until nothing is under way and every reply is written.
    pub async fn idle(&self) {
        self.wait(|budget| budget.operations.get() == 0).await;
    }

    async fn wait(&self, condition: impl Fn(&Self) -> bool) {
        poll_fn(|context| {
            if condition(self) {
                return Poll::Ready(());
            }
            self.waiters.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn give_back(&self, operations: usize, bytes: usize) {
        self.operations.set(self.operations.get() - operations);
        self.bytes.set(self.bytes.get() - bytes);
        // All of them, in the order they came: each looks for itself.
        self.waiters.borrow_mut().drain(..).for_each(Waker::wake);
    }
}

impl Permit {
    /// The payload is gone, only the reply is left to be written.
    pub fn release_bytes(&mut self) {
        self.budget.give_back(0, std::mem::take(&mut self.bytes));
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.give_back(1, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn bytes_and_operations_are_both_bounded() {
        let budget = Budget::new(100, 3);
        let mut first = now(budget.admit(60)).unwrap();
        assert!(now(budget.admit(60)).is_none());
        let second = now(budget.admit(40)).unwrap();
        first.release_bytes();
        let third = now(budget.admit(60)).unwrap();
        assert!(now(budget.admit(0)).is_none(), "three operations are under way");
        assert!(now(budget.idle()).is_none());
        drop((first, second, third));
        assert!(now(budget.idle()).is_some());
    }

    #[test]
    fn what_is_larger_than_the_budget_runs_alone() {
        let budget = Budget::new(100, 3);
        let small = now(budget.admit(1)).unwrap();
        assert!(now(budget.admit(1000)).is_none());
        drop(small);
        let large = now(budget.admit(1000)).unwrap();
        assert!(now(budget.admit(1)).is_none());
        drop(large);
        assert_eq!((budget.bytes.get(), budget.operations.get()), (0, 0));
    }
}
