//! A crash after every single device operation of three recorded workloads: one destages, trims, resets and raises the mark of
//! the block records, one writes as much as the journal takes while it is destaged, and in one the journal goes on while entries
//! of other groups wait to be acknowledged. What was flushed is there after power
//! loss, what was durable after a kill. Each with every subset of the pages that may be lost and as often at random with
//! pages torn between sectors, or, when there are too many, with some random ones of both kinds (`tools/crash`).
//!
//! It found that a page was overwritten in place whose newer entry came back as pending, because nothing on disk said
//! that it had been acknowledged; hence the checkpoint before the copying (`destage`).

use xsan_protocol::ids::{GroupId, Seq};
use xsan_protocol::units::PageRange;

use super::model::{Event, KEYS, Model, PAGES};
use super::rig::{Rig, data, key, version};
use crate::store::{Entry, Record, StoreEvent, StoreView};
use crate::testing::{NOTHING, Random, WHOLE};

const GROUP: GroupId = GroupId(0);
/// Fills the journal beside others.
const BUSY: GroupId = GroupId(1);
/// Nothing of it is ever acknowledged.
const STUCK: GroupId = GroupId(2);

/// Of whole blocks: more than the journal holds.
const WRITES: u64 = 20;

enum Step {
    Write(u32, PageRange, u64),
    WriteTo(GroupId, u32, PageRange, u64),
    /// Everything of `GROUP`.
    Acknowledge,
    Flush,
    Reset,
    Idle,
    Turn,
    /// So many writes of whole blocks, each as soon as the journal has room; acknowledged as soon as they are durable, and
    /// flushed one flush after the other.
    Press(GroupId, u64),
}

/// Goes around the journal, which is full when its tail moves.
fn full_journal(writes: u64) -> Vec<Step> {
    let whole = PageRange::new(0, PAGES);
    let fill = (0..6).map(|number| Step::Write(number % KEYS, whole, 1000 * (u64::from(number) + 1)));
    fill.chain([Step::Acknowledge, Step::Flush, Step::Press(GROUP, writes), Step::Idle]).collect()
}

/// Entries wait to be acknowledged until the journal has gone round, and are carried twice; others stay behind the first of their
/// copies.
fn carried_entries() -> Vec<Step> {
    let mut steps = vec![
        Step::Write(0, PageRange::new(0, PAGES), 1000),
        Step::Acknowledge,
        Step::Flush,
        // Each copy of these needs a batch of its own.
        Step::Write(0, PageRange::new(0, PAGES), 2000),
        Step::Write(0, PageRange::new(40, 200), 3000),
        Step::Write(1, PageRange::new(3, 2), 4000),
        Step::Turn,
        Step::Flush,
    ];
    steps.extend([Step::Press(BUSY, 6), Step::WriteTo(STUCK, 0, PageRange::new(7, 3), 5000)]);
    steps.extend([Step::Press(BUSY, 4), Step::Write(0, PageRange::of_unit(4), 0), Step::Press(BUSY, 9)]);
    steps.extend([Step::Acknowledge, Step::Write(1, PageRange::new(4, 1), 6000), Step::Press(BUSY, 6)]);
    steps.extend([Step::Idle, Step::Write(2, PageRange::new(0, 1), 7000), Step::Acknowledge, Step::Idle]);
    steps
}

fn every_kind() -> Vec<Step> {
    let mut steps = Vec::new();
    for round in 0..3u64 {
        let content = 1000 * (round + 1);
        steps.push(Step::Write(0, PageRange::new(0, 20), content));
        steps.push(Step::Write(1, PageRange::new(10 + round as u16, 3), content + 100));
        steps.push(Step::Acknowledge);
        steps.push(Step::Flush);
        steps.push(Step::Write(2, PageRange::new(0, 64), content + 200));
        steps.push(Step::Turn);
        steps.push(Step::Write(0, PageRange::of_unit(1), 0));
        steps.push(Step::Acknowledge);
        steps.push(Step::Idle);
        steps.push(Step::Write(1, PageRange::new(0, 256), if round % 2 == 0 { 0 } else { content + 300 }));
        steps.push(Step::Write(0, PageRange::new(5, 1), content + 600));
        if round == 1 {
            steps.push(Step::Reset);
            steps.push(Step::Turn);
            steps.push(Step::Flush);
        }
        steps.push(Step::Acknowledge);
        steps.push(Step::Write(2, PageRange::new(3, 1), content + 700));
        steps.push(Step::Idle);
    }
    steps
}

struct Replay {
    rig: Rig,
    model: Model,
    /// The flush under way, and what each group had durable when it was asked for.
    flush_covers: Option<(u64, Vec<usize>)>,
    left: u64,
}

impl Replay {
    fn learn(&mut self) {
        let groups = &mut self.model.groups;
        for event in self.rig.events.drain(..) {
            match event {
                StoreEvent::Durable { group, seq } => {
                    let model = groups.get_mut(&group).unwrap();
                    let newest = model.log.iter().rposition(
                        |event| matches!(event, Event::Entry { version, .. } if version.seq == seq),
                    );
                    model.durable = model.durable.max(newest.expect("it was appended") + 1);
                }
                StoreEvent::Flushed { token } => {
                    let (_, counts) = self.flush_covers.take_if(|(own, _)| *own == token).expect("asked for");
                    for (model, count) in groups.values_mut().zip(counts) {
                        model.flushed = model.flushed.max(count);
                    }
                }
                StoreEvent::Reset { group } => groups.get_mut(&group).unwrap().reset_is_durable(),
                _ => panic!("unexpected: {event:?}"),
            }
        }
    }

    /// Runs what is under way; `false` when the operation to crash at was reached.
    fn settle(&mut self) -> bool {
        loop {
            self.rig.end_turn();
            self.learn();
            if self.rig.operations == self.left {
                return false;
            }
            if !self.rig.complete_one() {
                return true;
            }
            self.learn();
        }
    }

    fn step(&mut self, step: &Step) -> bool {
        match step {
            Step::Write(index, pages, content) => self.step(&Step::WriteTo(GROUP, *index, *pages, *content)),
            Step::WriteTo(group, index, pages, content) => {
                let model = &self.model.groups[group];
                let (last, head) = (model.last(), model.head());
                let version = version(last.epoch.0.max(1), last.seq.0 + 1);
                let at = key(*index);
                let previous = (head.version(at, pages.first_unit()), head.version(at, pages.last_unit()));
                let entry = Entry {
                    group: *group,
                    version,
                    acked: model.acked,
                    key: at,
                    pages: *pages,
                    data: (*content != 0).then(|| data(*content, pages.count)),
                    previous_first: previous.0,
                    previous_last: previous.1,
                };
                self.rig.store.append(Record::Entry(entry)).unwrap();
                let event = Event::Entry { version, key: at, pages: *pages, content: *content, previous };
                self.model.groups.get_mut(group).unwrap().log.push(event);
                true
            }
            Step::Acknowledge => {
                if !self.settle() {
                    return false;
                }
                let model = self.model.groups.get_mut(&GROUP).unwrap();
                model.acked = model.last().seq;
                self.rig.store.apply(GROUP, model.acked);
                true
            }
            Step::Flush => {
                self.begin_flush();
                self.settle()
            }
            Step::Reset => {
                let applied = self.rig.store.tail(GROUP).acked;
                let last = version(5, applied.0);
                self.rig.store.append(Record::Reset { group: GROUP, last }).unwrap();
                let model = self.model.groups.get_mut(&GROUP).unwrap();
                model.log.push(Event::Reset { last, applied });
                model.acked = last.seq;
                true
            }
            Step::Idle => {
                self.rig.now_ns += 20_000_000_000;
                self.rig.store.tick(self.rig.now_ns);
                self.settle()
            }
            Step::Turn => self.settle(),
            Step::Press(group, count) => self.press(*group, *count),
        }
    }

    fn begin_flush(&mut self) {
        let token = self.rig.token();
        let durable = self.model.groups.values().map(|group| group.durable);
        self.flush_covers = Some((token, durable.collect()));
        self.rig.store.flush(token);
    }

    fn press(&mut self, group: GroupId, count: u64) -> bool {
        let mut written = 0;
        loop {
            while written < count && self.rig.store.admit(usize::from(PAGES)).is_ok() {
                written += 1;
                let (index, content) = ((written % u64::from(KEYS)) as u32, 10_000 + 1000 * written);
                self.step(&Step::WriteTo(group, index, PageRange::new(0, PAGES), content));
            }
            if written < count && self.flush_covers.is_none() {
                self.begin_flush();
            }
            self.rig.end_turn();
            if self.rig.operations == self.left {
                return false;
            }
            if !self.rig.complete_one() {
                assert!(written == count);
                return true;
            }
            self.learn();
            let model = self.model.groups.get_mut(&group).unwrap();
            model.acked = model.last_durable();
            self.rig.store.apply(group, model.acked);
        }
    }
}

/// States to check of each crash point.
fn states_max() -> u64 {
    std::env::var("XSAN_CRASH_STATES")
        .map_or(4, |states| states.parse().expect("XSAN_CRASH_STATES is a number"))
}

/// What a crash point was.
struct Point {
    /// Was there such an operation?
    reached: bool,
    /// States that the crash may leave, by whole pages.
    states: u64,
}

/// Runs the workload up to `operation`, crashes into one of the possible states, checks, and goes on a little.
fn crash_at(workload: &[Step], operation: u64, power: bool, cached: bool, state: u64) -> Point {
    // Each point with a seed of its own: another order of completions.
    let rig = Rig::new(operation + 1, cached);
    let mut replay = Replay { rig, model: Model::new(), flush_covers: None, left: operation };
    let reached = workload.iter().any(|step| !replay.step(step));
    replay.learn();
    let Replay { mut rig, mut model, .. } = replay;
    let undecided = rig.undecided(power);
    let states = 1u64.checked_shl(undecided as u32).unwrap_or(u64::MAX);
    if states <= states_max() && state < states {
        let mut subset = state;
        rig = rig.crash_into(power, || {
            let keep = if subset & 1 == 1 { WHOLE } else { NOTHING };
            subset >>= 1;
            keep
        });
    } else {
        rig.random = Random::new((operation + 1) << 32 | state);
        rig = rig.crash(power);
    }
    model.recover(&mut rig, power);
    // It works on, and a second crash right away finds the same.
    rig = rig.crash(true);
    model.recover(&mut rig, true);
    for group in [GROUP, BUSY] {
        let state = model.groups.get_mut(&group).unwrap();
        state.acked = state.last().seq;
        rig.store.apply(group, state.acked);
    }
    rig.idle();
    rig = rig.crash(true);
    model.recover(&mut rig, true);
    rig.write_through(GROUP, key(2), PageRange::new(9, 1), 4242);
    rig.expect(GROUP, key(2), PageRange::new(9, 1), |_| 4242);
    Point { reached, states }
}

fn crash_everywhere(workload: &[Step], power: bool, cached: bool) {
    let (mut points, mut checked, mut complete) = (0, 0, 0);
    loop {
        let point = crash_at(workload, points, power, cached, 0);
        if !point.reached {
            break;
        }
        let is_complete = point.states <= states_max();
        // Whole pages in all ways that there are, and then at random as often, with pages that are torn.
        let states = if is_complete { 2 * point.states } else { states_max() };
        for state in 1..states {
            crash_at(workload, points, power, cached, state);
        }
        points += 1;
        checked += states;
        complete += u64::from(is_complete);
    }
    println!("{points} crash points, {checked} states, of {complete} points all there are; none bad");
    assert!(points > 80, "the workload has only {points} operations");
}

#[test]
fn power_loss_after_every_operation() {
    crash_everywhere(&every_kind(), true, false);
}

#[test]
fn power_loss_after_every_operation_with_a_cache_device() {
    crash_everywhere(&every_kind(), true, true);
}

#[test]
fn a_kill_after_every_operation() {
    crash_everywhere(&every_kind(), false, false);
}

#[test]
fn power_loss_while_the_journal_is_full() {
    crash_everywhere(&full_journal(WRITES), true, false);
}

#[test]
fn power_loss_while_the_journal_of_a_cache_device_is_full() {
    crash_everywhere(&full_journal(WRITES), true, true);
}

#[test]
fn a_kill_while_the_journal_is_full() {
    crash_everywhere(&full_journal(WRITES), false, false);
}

#[test]
fn power_loss_while_entries_are_carried() {
    crash_everywhere(&carried_entries(), true, false);
}

#[test]
fn power_loss_while_entries_are_carried_in_a_cache_device() {
    crash_everywhere(&carried_entries(), true, true);
}

#[test]
fn a_kill_while_entries_are_carried() {
    crash_everywhere(&carried_entries(), false, false);
}

#[cfg(feature = "mutations")]
#[test]
fn sown_bugs_are_found() {
    use xsan_protocol::mutation::Mutation;
    let sown: Vec<_> = Mutation::ALL.iter().filter(|mutation| mutation.needs_every_crash()).collect();
    assert!(!sown.is_empty());
    // What is found without the bug, too, the bug did not do.
    let run = || {
        crash_everywhere(&carried_entries(), false, false);
        crash_everywhere(&carried_entries(), true, false);
        crash_everywhere(&full_journal(4 * WRITES), true, true);
    };
    run();
    for &mutation in sown {
        Mutation::sow(Some(mutation));
        let found = std::panic::catch_unwind(run);
        Mutation::sow(None);
        assert!(found.is_err(), "{mutation:?} (\"{}\") is not found", mutation.what());
        println!("found: {mutation:?}, {}", mutation.what());
    }
}

#[test]
fn the_mark_of_the_records_is_raised_and_survives() {
    let mut rig = Rig::new(1, false);
    // More blocks than were zeroed at format.
    for index in 0..70 {
        rig.write_through(GROUP, key(index), PageRange::new(7, 1), 1 + u64::from(index));
    }
    rig.flush();
    rig.idle();
    rig = rig.crash(true);
    assert!(!rig.recovered.damaged);
    assert_eq!(rig.store.tail(GROUP).acked, Seq(70));
    for index in 0..70 {
        assert_eq!(rig.store.locate(GROUP, key(index))[0].journalled_pages, 0);
        rig.expect(GROUP, key(index), PageRange::new(7, 1), |_| 1 + u64::from(index));
    }
}
