//! What clients saw, sector by sector, and whether one order of all of it explains that.
//!
//! Every write of data has a value of its own, so the check is exact for them: Gibbons and Korach, "Testing Shared Memories", 1997
//! (zones). Zeroes are written by many; a read of zero is checked against each of them.
//! A write that was tried again may be seen more than once while it is not answered (docs/decisions/0010).

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
}

#[derive(Debug, Default)]
struct Register {
    writes: BTreeMap<u64, Write>,
    zeroes: Vec<Span>,
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
        if value == 0 {
            register.zeroes.push(span);
        } else {
            assert!(register.writes.insert(value, Write { span, repeated }).is_none());
        }
    }

    pub fn read(&mut self, sector: Sector, value: u64, span: Span) {
        self.registers.entry(sector).or_default().reads.push((value, span));
    }

    pub fn check(&self) -> Result<(), String> {
        for (sector, register) in &self.registers {
            register.check().map_err(|error| format!("sector {sector:?}: {error}\n{}", register.newest()))?;
        }
        Ok(())
    }
}

/// Spans in the order of their starts, asked for the earliest end behind a moment and the latest end before one.
struct Sorted {
    starts: Vec<u64>,
    /// Of the spans from each on: the earliest end.
    earliest: Vec<u64>,
    /// Of the spans up to each: the latest end.
    latest: Vec<u64>,
}

impl Sorted {
    fn new(spans: impl Iterator<Item = Span>) -> Self {
        let mut spans: Vec<Span> = spans.collect();
        spans.sort_unstable_by_key(|span| span.start);
        let mut latest: Vec<u64> = spans.iter().map(|span| span.end).collect();
        let mut earliest = latest.clone();
        for index in 1..spans.len() {
            latest[index] = latest[index].max(latest[index - 1]);
            let back = spans.len() - 1 - index;
            earliest[back] = earliest[back].min(earliest[back + 1]);
        }
        Self { starts: spans.iter().map(|span| span.start).collect(), earliest, latest }
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
        let zeroes = self.zeroes.iter().map(|span| (span.start, span.end, "zero".to_owned()));
        let mut all: Vec<_> = reads.chain(writes).chain(zeroes).collect();
        all.sort();
        let newest = all.iter().skip(all.len().saturating_sub(NEWEST_SHOWN));
        newest.map(|(start, end, what)| format!("  {start}..{end} {what}\n")).collect()
    }

    fn check(&self) -> Result<(), String> {
        let zeroes = Sorted::new(self.zeroes.iter().copied().chain([Span { start: 0, end: 0 }]));
        let writes = Sorted::new(self.writes.values().map(|write| write.span));
        let mut zones: BTreeMap<u64, Span> = BTreeMap::new();
        for (value, read) in &self.reads {
            if *value == 0 {
                check_zero(*read, &zeroes, &writes)?;
                continue;
            }
            let Write { span: write, repeated } =
                *self.writes.get(value).ok_or(format!("read {value}, which nobody wrote"))?;
            if read.end < write.start {
                return Err(format!("read {value} before it was written"));
            }
            if zeroes.earliest_end_after(write.end).is_some_and(|end| end < read.start) {
                return Err(format!("read {value} {read:?} ({write:?}) after it was zeroed"));
            }
            if repeated && read.start <= write.end {
                continue;
            }
            let zone = zones.entry(*value).or_insert(Span { start: write.start, end: write.end });
            // As Gibbons and Korach have it: from the first end to the last start.
            zone.end = zone.end.min(read.end);
            zone.start = zone.start.max(read.start);
        }
        for (value, write) in &self.writes {
            if write.span.end != u64::MAX {
                zones.entry(*value).or_insert(write.span);
            }
        }
        check_zones(&zones)
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
fn check_zones(zones: &BTreeMap<u64, Span>) -> Result<(), String> {
    let (mut forward, backward): (Vec<_>, Vec<_>) = zones.iter().partition(|(_, zone)| zone.end < zone.start);
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
    let mut good = History::default();
    good.wrote(sector, 1, span(1, 9));
    good.wrote(sector, 2, span(1, u64::MAX));
    good.wrote(sector, 0, span(10, 11));
    good.read(sector, 1, span(2, 3));
    good.read(sector, 2, span(4, 5));
    good.read(sector, 0, span(12, 13));
    assert_eq!(good.check(), Ok(()));
}
