//! Free capacity units and free slots of block records, in memory; rebuilt at open from the block records.
//!
//! A unit or slot is given back only by `destage`, after the record that no longer names it is on stable media.

use std::collections::BTreeSet;

/// Capacity units, one bit each. Allocation goes on from where it last was, so that units written together lie
/// together.
#[derive(Debug)]
pub struct Units {
    /// Bit set: in use.
    words: Vec<u64>,
    count: u32,
    free: u32,
    cursor: u32,
}

impl Units {
    pub fn new(count: u32) -> Self {
        let mut words = vec![0u64; (count as usize).div_ceil(64)];
        if !count.is_multiple_of(64) {
            // The bits behind the last unit are never free.
            *words.last_mut().expect("a store has units") |= u64::MAX << (count % 64);
        }
        Self { words, count, free: count, cursor: 0 }
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn free(&self) -> u32 {
        self.free
    }

    /// Marks a unit that a block record names as in use; `false` when it does not exist or is taken.
    pub fn take(&mut self, unit: u32) -> bool {
        let (word, bit) = (unit as usize / 64, 1u64 << (unit % 64));
        if unit >= self.count || self.words[word] & bit != 0 {
            return false;
        }
        self.words[word] |= bit;
        self.free -= 1;
        true
    }

    pub fn allocate(&mut self) -> Option<u32> {
        if self.free == 0 {
            return None;
        }
        let start = self.cursor as usize / 64;
        let below = (1u64 << (self.cursor % 64)) - 1;
        let masked = self.words[start] | below;
        let found = if masked == u64::MAX {
            let order = (start + 1..self.words.len()).chain(0..=start);
            let mut open = order.filter(|word| self.words[*word] != u64::MAX);
            let word = open.next().expect("`free` is not 0");
            word as u32 * 64 + (!self.words[word]).trailing_zeros()
        } else {
            start as u32 * 64 + (!masked).trailing_zeros()
        };
        assert!(self.take(found));
        self.cursor = (found + 1) % self.count;
        Some(found)
    }

    /// # Panics
    /// The unit is free: our bug.
    pub fn release(&mut self, unit: u32) {
        let (word, bit) = (unit as usize / 64, 1u64 << (unit % 64));
        assert!(unit < self.count);
        assert!(self.words[word] & bit != 0, "unit {unit} is free already");
        self.words[word] &= !bit;
        self.free += 1;
    }
}

/// Slots of block records below the zeroed mark, lowest first, and the generation each was written with last.
#[derive(Debug)]
pub struct Slots {
    generations: Vec<u64>,
    /// Of all of them.
    sum: u64,
    free: BTreeSet<u32>,
    count: u32,
}

impl Slots {
    /// # Panics
    /// A mark beyond the last slot: `recover` has checked it.
    pub fn new(count: u32, mark: u32) -> Self {
        assert!(mark <= count);
        Self { generations: vec![0; mark as usize], sum: 0, free: (0..mark).collect(), count }
    }

    /// Slots below this one were zeroed and may be written.
    pub fn mark(&self) -> u32 {
        self.generations.len() as u32
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    /// The sum of all generations, modulo 2^64: a record that recovery found may name any.
    pub fn generations(&self) -> u64 {
        self.sum
    }

    /// All the slots that hold no block, zeroed or not.
    pub fn free(&self) -> u32 {
        self.free.len() as u32 + (self.count - self.mark())
    }

    /// Slots that can be allocated without raising the mark.
    pub fn ready(&self) -> u32 {
        self.free.len() as u32
    }

    pub fn raise_mark(&mut self, mark: u32) {
        assert!(mark > self.mark() && mark <= self.count);
        self.free.extend(self.mark()..mark);
        self.generations.resize(mark as usize, 0);
    }

    pub fn allocate(&mut self) -> Option<u32> {
        self.free.pop_first()
    }

    /// What recovery found in a slot.
    pub fn set_recovered(&mut self, slot: u32, generation: u64, in_use: bool) {
        let before = std::mem::replace(&mut self.generations[slot as usize], generation);
        self.sum = self.sum.wrapping_sub(before).wrapping_add(generation);
        if in_use {
            assert!(self.free.remove(&slot));
        }
    }

    /// # Panics
    /// The slot is free: our bug.
    pub fn release(&mut self, slot: u32) {
        assert!(slot < self.mark());
        assert!(self.free.insert(slot), "slot {slot} is free already");
    }

    /// The generation for the next record of the slot.
    pub fn next_generation(&mut self, slot: u32) -> u64 {
        let generation = &mut self.generations[slot as usize];
        *generation += 1;
        self.sum = self.sum.wrapping_add(1);
        *generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_given_out_once_each_and_in_order() {
        let mut units = Units::new(130);
        let all: Vec<u32> = std::iter::from_fn(|| units.allocate()).collect();
        assert_eq!(all, (0..130).collect::<Vec<_>>());
        units.release(7);
        units.release(129);
        assert_eq!(units.free(), 2);
        assert!(!units.take(8));
        assert!(!units.take(130));
        assert_eq!(units.allocate(), Some(7));
        assert_eq!(units.allocate(), Some(129));
        assert_eq!(units.allocate(), None);
    }

    #[test]
    fn slots_above_the_mark_wait_for_it() {
        let mut slots = Slots::new(6, 2);
        slots.set_recovered(0, 5, true);
        assert_eq!((slots.free(), slots.ready()), (5, 1));
        assert_eq!(slots.allocate(), Some(1));
        assert_eq!(slots.allocate(), None);
        slots.raise_mark(6);
        assert_eq!(slots.allocate(), Some(2));
        slots.release(0);
        assert_eq!(slots.allocate(), Some(0));
        assert_eq!(slots.next_generation(0), 6);
        assert_eq!(slots.next_generation(2), 1);
        assert_eq!(slots.generations(), 7);
    }
}
