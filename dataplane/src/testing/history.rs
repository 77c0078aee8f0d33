//! What clients saw, sector by sector, and whether one order of all of it explains that.
//!
//! Every write of data has a value of its own, so the check is exact for them: Gibbons and Korach, "Testing Shared Memories", 1997
//! (zones). Zeroes are written by many; a read of zero is checked against each of them.
//! A write that was tried again may be seen more than once while it is not answered (docs/decisions/0009).

use std::collections::BTreeMap;

pub type Sector = (u64, u16, u16);

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
            register.check().map_err(|error| format!("sector {sector:?}: {error}"))?;
        }
        Ok(())
    }
}

impl Register {
    fn check(&self) -> Result<(), String> {
        let mut zones: BTreeMap<u64, Span> = BTreeMap::new();
        for (value, read) in &self.reads {
            if *value == 0 {
                self.check_zero(*read)?;
                continue;
            }
            let Write { span: write, repeated } =
                *self.writes.get(value).ok_or(format!("read {value}, which nobody wrote"))?;
            if read.end < write.start {
                return Err(format!("read {value} before it was written"));
            }
            if let Some(between) =
                self.zeroes.iter().find(|zero| write.end < zero.start && zero.end < read.start)
            {
                return Err(format!("read {value} {read:?} ({write:?}) after it was zeroed {between:?}"));
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
        let forward: Vec<_> = zones.iter().filter(|(_, zone)| zone.end < zone.start).collect();
        for (index, (a, one)) in forward.iter().enumerate() {
            for (b, two) in &forward[index + 1..] {
                if one.end < two.start && two.end < one.start {
                    return Err(format!(
                        "values {a} and {b} were each read after the other: {one:?} {two:?}"
                    ));
                }
            }
            for (b, two) in zones.iter().filter(|(_, zone)| zone.end >= zone.start) {
                if one.end < two.start && two.end < one.start {
                    return Err(format!("value {a} was read on both sides of {b}: {one:?} {two:?}"));
                }
            }
        }
        Ok(())
    }

    /// A read of zeroes needs some writer of zeroes (or the beginning) that was not surely overwritten.
    fn check_zero(&self, read: Span) -> Result<(), String> {
        let beginning = Span { start: 0, end: 0 };
        let possible = |zero: &Span| {
            zero.start <= read.end
                && !self
                    .writes
                    .values()
                    .any(|write| zero.end < write.span.start && write.span.end < read.start)
        };
        let mut all = self.zeroes.iter().chain(std::iter::once(&beginning));
        all.any(possible).then_some(()).ok_or_else(|| format!("read zero {read:?} where data was written"))
    }
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
