//! Whole clusters in one thread, from one seed.
//!
//! What runs is the real code of `replication`, `store`, placement, planner, leases and link; what is simulated is
//! what surrounds it: clocks, network, devices, processes, and the agreement of Raft (one log, whose leader changes). Time is
//! virtual: an event queue, and nothing waits. The same seed gives the same run, to the byte.
//!
//! Reading order: `world` (events, and the parts of a run), `host`, `process` (a data process's turn), `control`, `network`,
//! `workload` (clients), `faults` (what goes wrong, and when), `rest` and `check` (what must hold).

mod check;
mod control;
mod faults;
mod host;
mod memory;
mod network;
mod plan;
mod process;
mod rest;
mod workload;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use faults::{FAULTS, FAULTS_RARE};
pub use plan::Plan;

/// What one seed did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Client operations that were answered well.
    pub answered: u64,
    /// Client operations that ended with an error or without an answer.
    pub failed: u64,
    /// Why, and how often.
    pub ended: BTreeMap<String, u64>,
    /// What went wrong, by kind, and how often.
    pub faults: BTreeMap<&'static str, u64>,
    /// Events of the simulation.
    pub events: u64,
    pub virtual_ns: u64,
    /// The longest time that an operation took while not all was broken.
    pub longest_ns: u64,
}

impl Summary {
    pub fn add(&mut self, other: &Self) {
        self.answered += other.answered;
        self.failed += other.failed;
        for (why, count) in &other.ended {
            *self.ended.entry(why.clone()).or_default() += count;
        }
        for (fault, count) in &other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
        self.events += other.events;
        self.virtual_ns += other.virtual_ns;
        self.longest_ns = self.longest_ns.max(other.longest_ns);
    }
}

/// A promise that did not hold, and the log of events that led to it.
#[derive(Debug)]
pub struct Violation {
    pub what: String,
    pub log: Vec<String>,
}

/// Runs one seed.
///
/// # Errors
/// What was violated. A panic of the code under test is a violation, too.
pub fn run(plan: &Plan) -> Result<Summary, Violation> {
    let mut world = world::World::new(plan.clone());
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let what = match result {
        Ok(Ok(())) => return Ok(world.summary()),
        Ok(Err(what)) => what,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            format!("panic: {}", text.unwrap_or_else(|| "without a message".to_owned()))
        }
    };
    Err(Violation { what, log: world.take_log() })
}
