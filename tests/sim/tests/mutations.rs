//! Some bugs that the simulator finds soon, of each kind one: what it checks must not fall asleep. All of them: `tools/sim --mutations`.
#![cfg(feature = "mutations")]

use xsan_protocol::mutation::Mutation;
use xsan_sim::{Plan, run};

/// Today all of them are found within 16 seeds; plans change.
const SEEDS_MAX: u64 = 60;

fn is_found(mutation: Mutation) {
    Mutation::sow(Some(mutation));
    let found = (1..=SEEDS_MAX).find(|seed| run(&Plan::of(*seed)).is_err());
    Mutation::sow(None);
    println!("{mutation:?}: found at seed {found:?}");
    let seed = found.unwrap_or_else(|| panic!("{mutation:?} is not found within {SEEDS_MAX} seeds"));
    let clean = run(&Plan::of(seed)).map(drop);
    assert!(clean.is_ok(), "seed {seed} fails without {mutation:?}, too: {clean:?}");
}

#[test]
fn acknowledged_too_early() {
    is_found(Mutation::AckedByFastest);
    is_found(Mutation::UnackedRead);
    is_found(Mutation::MergeUnlocked);
    is_found(Mutation::FlushAnsweredAtOnce);
    is_found(Mutation::PreviousVersionIgnored);
}

#[test]
fn promised_without_a_flush() {
    is_found(Mutation::FuaForgotten);
}
