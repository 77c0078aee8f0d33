//! Model check of the parking protocol between shards: every interleaving that the memory model allows.
//!
//! The model runs the shards' own code, with loom's atomics under it.

#[path = "../src/shard/parker.rs"]
mod parker;

use loom::sync::Arc;
use loom::sync::atomic::{self, AtomicUsize, Ordering};
use loom::thread;
use parker::Parker;

/// A queue of which only the length matters, and an eventfd of which only the count does.
#[derive(Default)]
struct Shared {
    queued: AtomicUsize,
    wakes: AtomicUsize,
    parker: Parker,
}

#[test]
fn a_consumer_that_sleeps_has_been_or_will_be_woken() {
    loom::model(|| {
        let shared = Arc::new(Shared::default());
        let producers: Vec<_> = (0..2)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.queued.fetch_add(1, Ordering::Release);
                    if shared.parker.must_wake() {
                        shared.wakes.fetch_add(1, Ordering::Release);
                    }
                })
            })
            .collect();
        let taken = shared.queued.swap(0, Ordering::Acquire);
        let sleeps = shared.parker.park(|| shared.queued.load(Ordering::Acquire) == 0);
        producers.into_iter().for_each(|producer| producer.join().unwrap());
        shared.parker.unpark();
        if sleeps && taken < 2 {
            assert!(shared.wakes.load(Ordering::Acquire) > 0, "it sleeps on {} messages", 2 - taken);
        }
    });
}
