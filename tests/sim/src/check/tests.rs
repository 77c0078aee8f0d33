//! Histories that are known to be good or bad: what the ledger must not find, and what it must.

use super::*;

const SECTOR: SectorRange = SectorRange { block: 1, first: 9, count: 1 };

/// A ledger, and the number of its next operation: also the value that it writes.
#[derive(Default)]
struct Story {
    ledger: Ledger,
    next: u64,
}

impl Story {
    fn begin(&mut self, access: impl FnOnce(u64) -> Access) -> u64 {
        self.next += 1;
        self.ledger.begin(self.next, access(self.next));
        self.next
    }

    fn begin_write(&mut self, durable: bool) -> u64 {
        self.begin(|value| Access::Write { sectors: SECTOR, value, durable })
    }

    /// A write that is answered; its value.
    fn write(&mut self, durable: bool) -> u64 {
        let value = self.begin_write(durable);
        self.ledger.answered(value, None, false);
        value
    }

    fn zero(&mut self, durable: bool) {
        let number = self.begin(|_| Access::Write { sectors: SECTOR, value: 0, durable });
        self.ledger.answered(number, None, false);
    }

    fn flush(&mut self) {
        let number = self.begin(|_| Access::Flush);
        self.ledger.answered(number, None, false);
    }

    fn read(&mut self, value: u64) {
        let mut bytes = vec![0; SECTOR_SIZE as usize];
        fill(&mut bytes, SECTOR, value);
        let number = self.begin(|_| Access::Read(SECTOR));
        self.ledger.answered(number, Some(&bytes), false);
    }

    fn lose_power(&mut self) {
        self.ledger.rest();
        self.ledger.blackout();
    }

    fn is_bad(&self) -> bool {
        self.ledger.violation.is_some() || self.ledger.check().is_err()
    }
}

/// What is read after `story` and a loss of power.
fn may_be_read(story: impl Fn(&mut Story), value: u64) -> bool {
    let mut told = Story::default();
    story(&mut told);
    told.lose_power();
    told.read(value);
    !told.is_bad()
}

#[test]
fn what_a_flush_covered_is_there_or_something_newer() {
    let flushed = |story: &mut Story| {
        story.write(false);
        story.write(false);
        story.flush();
        story.write(false);
    };
    assert!(!may_be_read(flushed, 0) && !may_be_read(flushed, 1), "older than what was flushed");
    assert!(may_be_read(flushed, 2) && may_be_read(flushed, 4));
}

#[test]
fn what_nobody_flushed_may_be_lost() {
    let story = |story: &mut Story| {
        story.write(false);
        story.write(false);
    };
    assert!((0..=2).all(|value| may_be_read(story, value)));
    assert!(!may_be_read(story, 3), "nobody wrote that");
}

#[test]
fn a_flush_covers_only_what_had_been_answered_when_it_began() {
    let story = |story: &mut Story| {
        let write = story.begin_write(false);
        let flush = story.begin(|_| Access::Flush);
        story.ledger.answered(write, None, false);
        story.ledger.answered(flush, None, false);
    };
    assert!(may_be_read(story, 0) && may_be_read(story, 1));
    let failed = |story: &mut Story| {
        story.write(false);
        let flush = story.begin(|_| Access::Flush);
        story.ledger.lost(flush, false);
    };
    assert!(may_be_read(failed, 0) && may_be_read(failed, 1));
}

#[test]
fn a_durable_write_is_there_without_a_flush() {
    let story = |story: &mut Story| {
        story.write(true);
    };
    assert!(!may_be_read(story, 0) && may_be_read(story, 1));
    let zeroed = |story: &mut Story| {
        story.write(false);
        story.zero(true);
    };
    assert!(may_be_read(zeroed, 0) && !may_be_read(zeroed, 1));
}

#[test]
fn what_was_not_answered_may_be_there_or_not() {
    let story = |story: &mut Story| {
        story.write(true);
        let write = story.begin_write(true);
        story.ledger.lost(write, false);
    };
    assert!(!may_be_read(story, 0) && may_be_read(story, 1) && may_be_read(story, 2));
}

#[test]
fn what_is_read_after_one_loss_of_power_holds_for_the_next() {
    let mut story = Story::default();
    story.write(true);
    story.write(false);
    story.lose_power();
    story.read(1);
    assert!(!story.is_bad());
    story.lose_power();
    story.read(2);
    assert!(story.is_bad(), "it was gone");
    let mut unread = Story::default();
    unread.write(true);
    unread.write(false);
    unread.lose_power();
    unread.lose_power();
    unread.read(2);
    assert!(!unread.is_bad(), "nobody looked in between");
}

#[test]
fn a_sector_that_was_read_must_not_go_back() {
    let mut story = Story::default();
    story.write(false);
    story.write(false);
    story.read(2);
    assert!(!story.is_bad());
    story.read(1);
    assert!(story.is_bad());
}
