//! What clients saw, sector by sector, and whether one order of all of it explains that.
//!
//! Every write of data has a value of its own, so the check is exact for them: Gibbons and Korach, "Testing Shared Memories", 1997
//! (zones). Zeroes are written by many; a read of zero is checked against each of them.
//! A write that was tried again may be seen more than once while it is not answered (docs/decisions/0010). One that is never
//! answered may take effect at any time until all is at rest (`rest`), or never.

use std::collections::BTreeMap;

pub type Sector = (u64, u16, u16);

/// Operations on a sector that a violation shows.
const NEWEST_SHOWN: usize = 40;

#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub start: u64,
    /// `u64::MAX`: no answer, it may take effect at any time, or never.
    pub end: u64,
}

#[derive(Clone, Copy, Debug)]
struct Write {
    span: Span,
    /// It was tried more than once: until it is answered, it may take effect more than once.
    repeated: bool,
    answered: bool,
}

impl Write {
    fn new(span: Span, repeated: bool) -> Self {
        Self { span, repeated, answered: span.end != u64::MAX }
    }

    /// Nothing of it is under way any more.
    fn rest(&mut self, moment: u64) {
        self.span.end = self.span.end.min(moment);
    }

    /// When it has surely taken effect.
    fn surely_by(&self) -> u64 {
        if self.answered { self.span.end } else { u64::MAX }
    }
}

#[derive(Debug, Default)]
struct Register {
    writes: BTreeMap<u64, Write>,
    zeroes: Vec<Write>,
    reads: Vec<(u64, Span)>,
}

#[derive(Debug, Default)]
pub struct History {
    registers: BTreeMap<Sector, Register>,
}

impl History {
    pub fn wrote(&mut self, sector: Sector, value: u64, span: Span) {
        self.wrote_in(sector, value, span, false);
    }

    /// As `wrote`, for a write that was tried more than once.
    pub fn wrote_repeatedly(&mut self, sector: Sector, value: u64, span: Span) {
        self.wrote_in(sector, value, span, true);
    }

    fn wrote_in(&mut self, sector: Sector, value: u64, span: Span, repeated: bool) {
        let register = self.registers.entry(sector).or_default();
        let write = Write::new(span, repeated);
        if value == 0 {
            register.zeroes.push(write);
        } else {
            assert!(register.writes.insert(value, write).is_none());
        }
    }

    /// All is at rest: what was not answered has taken effect by now, or never will.
    pub fn rest(&mut self, moment: u64) {
        for register in self.registers.values_mut() {
            let writes = register.writes.values_mut().chain(&mut register.zeroes);
            writes.for_each(|write| write.rest(moment));
        }
    }

    pub fn read(&mut self, sector: Sector, value: u64, span: Span) {
        self.registers.entry(sector).or_default().reads.push((value, span));
    }

    /// When each value of a sector was last asked for and returned.
    pub fn last_seen(&self, sector: Sector) -> BTreeMap<u64, u64> {
        let mut seen = BTreeMap::new();
        for (value, span) in self.registers.get(&sector).iter().flat_map(|register| &register.reads) {
            let last: &mut u64 = seen.entry(*value).or_default();
            *last = span.start.max(*last);
        }
        seen
    }

    pub fn check(&self) -> Result<(), String> {
        for (sector, register) in &self.registers {
            register.check().map_err(|error| format!("sector {sector:?}: {error}\n{}", register.newest()))?;
        }
        Ok(())
    }
}

/// Writes in the order of their starts, asked which has surely ended first behind a moment, and which may have ended last before one.
struct Sorted {
    starts: Vec<u64>,
    /// Of the writes from each on: the earliest moment at which one has surely taken effect.
    earliest: Vec<u64>,
    /// Of the writes up to each: the latest moment at which one may have.
    latest: Vec<u64>,
}

impl Sorted {
    fn new(writes: impl Iterator<Item = Write>) -> Self {
        let mut writes: Vec<Write> = writes.collect();
        writes.sort_unstable_by_key(|write| write.span.start);
        let mut latest: Vec<u64> = writes.iter().map(|write| write.span.end).collect();
        let mut earliest: Vec<u64> = writes.iter().map(Write::surely_by).collect();
        for index in 1..writes.len() {
            latest[index] = latest[index].max(latest[index - 1]);
            let back = writes.len() - 1 - index;
            earliest[back] = earliest[back].min(earliest[back + 1]);
        }
        Self { starts: writes.iter().map(|write| write.span.start).collect(), earliest, latest }
    }

    /// The earliest end of those that start after `moment`.
    fn earliest_end_after(&self, moment: u64) -> Option<u64> {
        self.earliest.get(self.starts.partition_point(|start| *start <= moment)).copied()
    }

    /// The latest end of those that start at `moment` or before.
    fn latest_end_until(&self, moment: u64) -> Option<u64> {
        let count = self.starts.partition_point(|start| *start <= moment);
        self.latest.get(count.checked_sub(1)?).copied()
    }
}

impl Register {
    /// What was done last, for those who look for the cause.
    fn newest(&self) -> String {
        let reads = self.reads.iter().map(|(value, span)| (span.start, span.end, format!("read {value}")));
        let writes = self.writes.iter().map(|(value, write)| {
            let again = if write.repeated { ", repeated" } else { "" };
            (write.span.start, write.span.end, format!("write {value}{again}"))
        });
        let zeroes = self.zeroes.iter().map(|zero| (zero.span.start, zero.span.end, "zero".to_owned()));
        let mut all: Vec<_> = reads.chain(writes).chain(zeroes).collect();
        all.sort();
        let newest = all.iter().skip(all.len().saturating_sub(NEWEST_SHOWN));
        newest.map(|(start, end, what)| format!("  {start}..{end} {what}\n")).collect()
    }

    fn check(&self) -> Result<(), String> {
        let beginning = Write::new(Span { start: 0, end: 0 }, false);
        let zeroes = Sorted::new(self.zeroes.iter().copied().chain([beginning]));
        let writes = Sorted::new(self.writes.values().copied());
        let mut zones: BTreeMap<u64, Span> = BTreeMap::new();
        // Reads of writes that may take effect again: each shows one time.
        let mut times = Vec::new();
        for (value, read) in &self.reads {
            if *value == 0 {
                check_zero(*read, &zeroes, &writes)?;
                continue;
            }
            let Write { span: write, repeated, .. } =
                *self.writes.get(value).ok_or(format!("read {value}, which nobody wrote"))?;
            if read.end < write.start {
                return Err(format!("read {value} before it was written"));
            }
            if zeroes.earliest_end_after(write.end).is_some_and(|end| end < read.start) {
                return Err(format!("read {value} {read:?} ({write:?}) after it was zeroed"));
            }
            if repeated && read.start <= write.end {
                times.push((*value, *read));
                continue;
            }
            let zone = zones.entry(*value).or_insert(Span { start: write.start, end: write.end });
            // As Gibbons and Korach have it: from the first end to the last start.
            zone.end = zone.end.min(read.end);
            zone.start = zone.start.max(read.start);
        }
        for (value, write) in &self.writes {
            if write.answered {
                zones.entry(*value).or_insert(write.span);
            }
        }
        check_zones(zones.into_iter().chain(times))
    }
}

/// A read of zeroes needs some writer of zeroes (or the beginning) that was not surely overwritten.
fn check_zero(read: Span, zeroes: &Sorted, writes: &Sorted) -> Result<(), String> {
    // Of those that had begun, the one that ended last is overwritten by the fewest.
    let zero = zeroes.latest_end_until(read.end).unwrap_or(0);
    match writes.earliest_end_after(zero) {
        Some(end) if end < read.start => Err(format!("read zero {read:?} where data was written")),
        _ => Ok(()),
    }
}

/// Zones whose first end comes before their last start (forward ones) overlap no other, and contain no backward one.
fn check_zones(zones: impl Iterator<Item = (u64, Span)>) -> Result<(), String> {
    let (mut forward, backward): (Vec<_>, Vec<_>) = zones.partition(|(_, zone)| zone.end < zone.start);
    forward.sort_unstable_by_key(|(_, zone)| zone.end);
    for pair in forward.windows(2) {
        let [(a, one), (b, two)] = pair else { unreachable!("windows of two") };
        if two.end < one.start {
            return Err(format!("values {a} and {b} were each read after the other: {one:?} {two:?}"));
        }
    }
    for (b, two) in backward {
        let before = forward.partition_point(|(_, zone)| zone.end < two.start);
        if let Some((a, one)) = before.checked_sub(1).map(|index| forward[index])
            && two.end < one.start
        {
            return Err(format!("value {a} was read on both sides of {b}: {one:?} {two:?}"));
        }
    }
    Ok(())
}

#[test]
fn a_lost_write_and_a_read_from_the_past_are_found() {
    let span = |start, end| Span { start, end };
    let sector = (0, 0, 0);
    let mut lost = History::default();
    lost.wrote(sector, 1, span(1, 2));
    lost.wrote(sector, 2, span(3, 4));
    lost.read(sector, 1, span(5, 6));
    assert!(lost.check().is_err());
    let mut past = History::default();
    past.wrote(sector, 1, span(1, 2));
    past.wrote(sector, 2, span(3, u64::MAX));
    past.read(sector, 2, span(5, 6));
    past.read(sector, 1, span(7, 8));
    assert!(past.check().is_err());
    let mut zero = History::default();
    zero.wrote(sector, 1, span(1, 2));
    zero.read(sector, 0, span(3, 4));
    assert!(zero.check().is_err());
    let mut again = History::default();
    again.wrote_repeatedly(sector, 1, span(1, 8));
    again.wrote(sector, 2, span(3, 4));
    for (value, read) in [(1, span(2, 3)), (2, span(5, 5)), (1, span(6, 7))] {
        again.read(sector, value, read);
    }
    assert_eq!(again.check(), Ok(()));
    again.read(sector, 2, span(9, 9));
    again.read(sector, 1, span(10, 10));
    assert!(again.check().is_err());
    // Until all is at rest, what was not answered may still come.
    let mut late = History::default();
    late.wrote_repeatedly(sector, 1, span(1, u64::MAX));
    late.wrote(sector, 2, span(3, 4));
    late.wrote(sector, 0, span(1, u64::MAX));
    for (value, read) in [(2, span(5, 5)), (1, span(6, 7)), (2, span(8, 8)), (0, span(9, 9))] {
        late.read(sector, value, read);
    }
    assert!(late.check().is_err(), "2 was answered, and is back after another");
    let mut late = History::default();
    late.wrote_repeatedly(sector, 1, span(1, u64::MAX));
    late.wrote(sector, 2, span(3, 4));
    late.wrote(sector, 0, span(1, u64::MAX));
    for (value, read) in [(1, span(2, 2)), (2, span(5, 6))] {
        late.read(sector, value, read);
    }
    late.rest(10);
    late.read(sector, 2, span(11, 12));
    assert_eq!(late.check(), Ok(()));
    late.read(sector, 1, span(13, 14));
    assert!(late.check().is_err(), "it comes after the rest");
    let mut zero = History::default();
    zero.wrote(sector, 0, span(1, u64::MAX));
    zero.rest(10);
    zero.wrote(sector, 1, span(11, 12));
    zero.read(sector, 1, span(13, 14));
    assert_eq!(zero.check(), Ok(()));
    zero.read(sector, 0, span(15, 16));
    assert!(zero.check().is_err(), "zeroes come after the rest");
    let mut good = History::default();
    good.wrote(sector, 1, span(1, 9));
    good.wrote(sector, 2, span(1, u64::MAX));
    good.wrote(sector, 0, span(10, 11));
    good.read(sector, 1, span(2, 3));
    good.read(sector, 2, span(4, 5));
    good.read(sector, 0, span(12, 13));
    assert_eq!(good.check(), Ok(()));
}
