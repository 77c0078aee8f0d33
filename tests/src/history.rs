//! Histories of pages with one writer each, and the check that they are linearizable.
//!
//! Each page has a single writer, whose writes carry growing generations; anyone reads. For such registers
//! linearizability is decided exactly by three rules, without a search:
//!
//! 1. a read returns at least the newest generation whose write had ended before the read began;
//! 2. a read returns nothing newer than the newest write that had begun before the read ended;
//! 3. a read returns at least what any read returned that had ended before this one began.
//!
//! A write without an answer may have happened or not, at any time after it began: it never binds rule 1.
//!
//! Source: Lamport, "On Interprocess Communication", 1986 (atomic registers).

use std::collections::BTreeMap;
use std::time::Duration;

/// What happened to one page; times are since the start of the run, on one clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `ended` is `None` when no answer came.
    Write {
        generation: u64,
        began: Duration,
        ended: Option<Duration>,
    },
    Read {
        generation: u64,
        began: Duration,
        ended: Duration,
    },
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pages: BTreeMap<u64, Vec<Operation>>,
}

/// A read that no order of the operations explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {page}: a read of {began:?} to {ended:?} returned generation {generation}, but {rule}")]
pub struct Violation {
    pub page: u64,
    pub generation: u64,
    pub began: Duration,
    pub ended: Duration,
    pub rule: Rule,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rule {
    #[error("the write of generation {0} had ended before")]
    LostWrite(u64),
    #[error("no write newer than generation {0} had begun")]
    FromTheFuture(u64),
    #[error("an earlier read had returned generation {0}")]
    WentBack(u64),
}

impl History {
    pub fn record(&mut self, page: u64, operation: Operation) {
        self.pages.entry(page).or_default().push(operation);
    }

    pub fn merge(&mut self, other: Self) {
        for (page, operations) in other.pages {
            self.pages.entry(page).or_default().extend(operations);
        }
    }

    pub fn operation_count(&self) -> usize {
        self.pages.values().map(Vec::len).sum()
    }

    pub fn read_count(&self) -> usize {
        let operations = self.pages.values().flatten();
        operations.filter(|operation| matches!(operation, Operation::Read { .. })).count()
    }

    /// # Errors
    /// The first read, page by page, that breaks a rule.
    pub fn check(&self) -> Result<(), Violation> {
        self.pages.iter().try_for_each(|(page, operations)| check_page(*page, operations))
    }
}

fn check_page(page: u64, operations: &[Operation]) -> Result<(), Violation> {
    // Times at which something became true: sorted, with the running maximum of what had become true.
    let mut written = Vec::new();
    let mut begun = Vec::new();
    let mut seen = Vec::new();
    for operation in operations {
        match *operation {
            Operation::Write { generation, began, ended } => {
                begun.push((began, generation));
                written.extend(ended.map(|ended| (ended, generation)));
            }
            Operation::Read { generation, ended, .. } => seen.push((ended, generation)),
        }
    }
    let (written, begun, seen) = (running_maximum(written), running_maximum(begun), running_maximum(seen));

    for operation in operations {
        let Operation::Read { generation, began, ended } = *operation else { continue };
        let broken = |rule| Violation { page, generation, began, ended, rule };
        let acknowledged = newest_before(&written, began);
        if generation < acknowledged {
            return Err(broken(Rule::LostWrite(acknowledged)));
        }
        let possible = newest_before(&begun, ended);
        if generation > possible {
            return Err(broken(Rule::FromTheFuture(possible)));
        }
        let returned = newest_before(&seen, began);
        if generation < returned {
            return Err(broken(Rule::WentBack(returned)));
        }
    }
    Ok(())
}

fn running_maximum(mut events: Vec<(Duration, u64)>) -> Vec<(Duration, u64)> {
    events.sort_unstable();
    let mut newest = 0;
    for (_, generation) in &mut events {
        newest = newest.max(*generation);
        *generation = newest;
    }
    events
}

/// The maximum of what had become true before `time`; 0, the page's first content, when nothing had.
fn newest_before(events: &[(Duration, u64)], time: Duration) -> u64 {
    let count = events.partition_point(|(at, _)| *at < time);
    if count == 0 { 0 } else { events[count - 1].1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn write(generation: u64, began: u64, ended: Option<u64>) -> Operation {
        Operation::Write { generation, began: at(began), ended: ended.map(at) }
    }

    fn read(generation: u64, began: u64, ended: u64) -> Operation {
        Operation::Read { generation, began: at(began), ended: at(ended) }
    }

    fn verdict(operations: &[Operation]) -> Result<(), Rule> {
        let mut history = History::default();
        for operation in operations {
            history.record(1, *operation);
        }
        history.check().map_err(|violation| violation.rule)
    }

    #[test]
    fn reads_beside_a_write_see_either_side_of_it() {
        verdict(&[write(1, 0, Some(10)), read(0, 1, 5), read(1, 5, 8), read(1, 11, 12)]).unwrap();
    }

    #[test]
    fn a_lost_write_is_found() {
        assert_eq!(verdict(&[write(1, 0, Some(10)), read(0, 11, 12)]), Err(Rule::LostWrite(1)));
    }

    #[test]
    fn a_value_that_nobody_had_written_is_found() {
        assert_eq!(verdict(&[write(1, 10, Some(20)), read(1, 1, 5)]), Err(Rule::FromTheFuture(0)));
    }

    #[test]
    fn a_read_taken_back_is_found() {
        assert_eq!(verdict(&[write(1, 0, Some(20)), read(1, 1, 5), read(0, 6, 8)]), Err(Rule::WentBack(1)));
    }

    #[test]
    fn an_unanswered_write_may_have_happened_or_not_but_not_both() {
        verdict(&[write(1, 0, None), read(0, 50, 60)]).unwrap();
        verdict(&[write(1, 0, None), read(0, 10, 20), read(1, 50, 60)]).unwrap();
        assert_eq!(verdict(&[write(1, 0, None), read(1, 10, 20), read(0, 50, 60)]), Err(Rule::WentBack(1)));
    }

    #[test]
    fn pages_are_judged_each_for_itself() {
        let mut history = History::default();
        history.record(1, write(5, 0, Some(1)));
        history.record(2, read(0, 2, 3));
        history.check().unwrap();
        assert_eq!(history.operation_count(), 2);
    }
}
