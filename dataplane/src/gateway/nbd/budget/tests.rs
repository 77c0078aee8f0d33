use std::pin::{Pin, pin};
use std::task::Context;

use super::*;

const LARGE: usize = CLASS_BYTES[3];
/// Slots of the largest class that all connections share, of a pool of the default size.
const LARGE_SLOTS: usize = 12;

fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    poll(pin!(future))
}

fn share() -> Rc<Share> {
    let share = Share::new(BufferPool::anonymous(64 << 20), Arc::default());
    assert_eq!(share.classes[3].slots_max, LARGE_SLOTS);
    share
}

fn large(count: usize) -> Slots {
    Slots::new(count, LARGE)
}

/// As many permits of one large slot each as there are to be had.
fn fill(budget: &Rc<Budget>) -> Vec<Permit> {
    std::iter::from_fn(|| now(budget.admit(large(1)))).collect()
}

#[test]
fn slots_and_operations_are_both_bounded() {
    let small = |count| Slots::new(count, 1);
    let budget = Budget::new(10 * CLASS_BYTES[0], 3, share());
    let mut first = now(budget.admit(small(6))).unwrap();
    assert!(budget.holds_buffers());
    assert!(now(budget.admit(small(6))).is_none(), "a slot counts whole, whatever is in it");
    let second = now(budget.admit(small(4))).unwrap();
    first.release_slots();
    let third = now(budget.admit(small(6))).unwrap();
    assert!(now(budget.admit(Slots::NONE)).is_none(), "three operations are under way");
    assert!(now(budget.idle()).is_none());
    drop((first, second, third));
    assert!(now(budget.idle()).is_some());
    assert!(!budget.holds_buffers());
}

#[test]
fn what_is_larger_than_the_budget_runs_alone() {
    let share = share();
    let budget = Budget::new(1, 3, share.clone());
    let small = now(budget.admit(Slots::new(1, 1))).unwrap();
    assert!(now(budget.admit(large(1))).is_none());
    drop(small);
    let larger = now(budget.admit(large(LARGE_SLOTS + 1))).unwrap();
    let other = Budget::new(usize::MAX, 3, share);
    assert!(now(other.admit(large(1))).is_none());
    assert!(now(other.admit(Slots::new(1, 1))).is_some(), "of another class there is enough");
    drop(larger);
    assert_eq!((budget.bytes.get(), budget.operations.get()), (0, 0));
    assert!(now(other.admit(large(1))).is_some());
}

/// One client that took nothing of its replies held every large buffer of its shard: its budget counted bytes, and 64
/// reads of 256 KiB take 64 slots of 1 MiB. Found by reading.
#[test]
fn one_connection_gets_half_and_two_a_third_each() {
    let share = share();
    let budget = || Budget::new(usize::MAX, 256, share.clone());
    let (first, second) = (budget(), budget());
    let mut held = fill(&first);
    assert_eq!(held.len(), LARGE_SLOTS / 2);
    let others = fill(&second);
    assert_eq!(others.len(), LARGE_SLOTS / 4);
    held.truncate(4);
    assert_eq!(others.len() + fill(&second).len(), 4);
    assert!(now(budget().admit(large(1))).is_some(), "there is always something for the next");
}

#[test]
fn those_that_hold_nothing_come_first_and_in_order() {
    let share = share();
    let budget = || Budget::new(usize::MAX, 256, share.clone());
    let all: Vec<_> = (0..LARGE_SLOTS).map(|_| budget()).collect();
    let mut held: Vec<_> = all.iter().map(|one| now(one.admit(large(1))).unwrap()).collect();
    let (first, second) = (budget(), budget());
    let mut wide = Box::pin(first.admit(large(4)));
    let mut narrow = Box::pin(second.admit(large(1)));
    assert!(poll(wide.as_mut()).is_none() && poll(narrow.as_mut()).is_none());
    held.truncate(LARGE_SLOTS - 2);
    assert!(poll(narrow.as_mut()).is_none(), "what is free is kept for the first");
    assert!(now(all[0].admit(large(1))).is_none(), "and not given to one that holds something");
    held.truncate(LARGE_SLOTS - 4);
    assert!(poll(narrow.as_mut()).is_none());
    let _taken = poll(wide.as_mut()).unwrap();
    assert!(poll(narrow.as_mut()).is_none());
    held.pop();
    assert!(poll(narrow.as_mut()).is_some());
    assert_eq!(share.counters.pool_waits.load(Ordering::Relaxed), 3);
}

#[test]
fn one_that_gives_up_its_place_lets_the_next_in() {
    let share = share();
    let budget = || Budget::new(usize::MAX, 256, share.clone());
    let all: Vec<_> = (0..LARGE_SLOTS).map(|_| budget()).collect();
    let mut held: Vec<_> = all.iter().map(|one| now(one.admit(large(1))).unwrap()).collect();
    let (gone, next) = (budget(), budget());
    let mut wide = Box::pin(gone.admit(large(4)));
    let mut narrow = Box::pin(next.admit(large(1)));
    assert!(poll(wide.as_mut()).is_none() && poll(narrow.as_mut()).is_none());
    held.pop();
    assert!(poll(narrow.as_mut()).is_none());
    drop(wide);
    assert!(poll(narrow.as_mut()).is_some());
    assert!(share.classes[3].hungry.borrow().is_empty());
}
