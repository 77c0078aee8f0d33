//! Wakes one task of this thread: set any number of times, taken once.
//!
//! Used for the shard's turn and its writers. Local to a thread; between threads `mailbox` wakes.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

#[derive(Default)]
pub struct Notify {
    set: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Notify {
    /// Wakes the waiting task, or lets its next wait end at once.
    pub fn notify(&self) {
        if !self.set.replace(true)
            && let Some(waker) = self.waker.borrow_mut().take()
        {
            waker.wake();
        }
    }

    /// Would a wait end at once?
    pub fn is_set(&self) -> bool {
        self.set.get()
    }

    /// Waits until `notify` was called since the last wait ended. One task waits at a time.
    pub async fn notified(&self) {
        poll_fn(|context| {
            if self.set.replace(false) {
                return Poll::Ready(());
            }
            *self.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
