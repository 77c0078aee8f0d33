//! Parking: a consumer that found nothing says that it will sleep; a producer wakes it only then.
//!
//! Used by `mailbox`. Only the decision is here, so that loom can check it (`dataplane/tests/loom.rs` includes
//! this file); the sleep itself is an eventfd.
//!
//! Why no wake is lost: the consumer stores `parked`, then fences, then looks at its queues; the producer pushes,
//! then fences, then looks at `parked`. Of two sequentially consistent fences one comes first: either the
//! consumer sees the message, or the producer sees that it is parked.

// The standard library's in the shard, loom's in the model.
use super::atomic::{AtomicBool, Ordering, fence};

#[derive(Debug)]
pub struct Parker {
    parked: AtomicBool,
}

impl Parker {
    pub fn new() -> Self {
        Self { parked: AtomicBool::new(false) }
    }

    /// The consumer is about to sleep; `is_empty` looks at its queues once more. `false`: do not sleep.
    pub fn park(&self, is_empty: impl FnOnce() -> bool) -> bool {
        self.parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let sleep = is_empty();
        if !sleep {
            self.parked.store(false, Ordering::Relaxed);
        }
        sleep
    }

    /// The consumer is awake.
    pub fn unpark(&self) {
        self.parked.store(false, Ordering::Relaxed);
    }

    /// A producer has pushed: is it the one to wake the consumer?
    pub fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.parked.load(Ordering::Relaxed) && self.parked.swap(false, Ordering::Relaxed)
    }
}

impl Default for Parker {
    fn default() -> Self {
        Self::new()
    }
}
