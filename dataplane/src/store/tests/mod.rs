//! The store against a simulated device: random work checked against a model, crashes everywhere, damage.
//!
//! A failing random test prints its seed; `STORE_SEED=n cargo test -p xsan-dataplane --lib store` runs that one alone,
//! and `STORE_SEED=m..n` those from m on below n.

mod basics;
mod carry;
mod crash;
mod damage;
mod model;
mod random;
mod rig;
