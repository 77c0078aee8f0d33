//! The store against a simulated device: random work checked against a model, crashes everywhere, damage.
//!
//! A failing random test prints its seed; `STORE_SEED=n cargo test -p xsan-dataplane --lib store` runs that one alone.

mod basics;
mod crash;
mod damage;
mod model;
mod random;
mod rig;
mod sim;

/// A small generator of test decisions: the same seed, the same run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
