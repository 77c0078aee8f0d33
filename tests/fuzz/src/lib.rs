//! The fuzzer: every decoder of XSAN under mutated valid encodings, on stable Rust, repeatable from one seed.
//!
//! `tools/fuzz` runs `main` for as long as it is told to; `cargo test -p xsan-fuzz` runs the corpus and a few
//! thousand inputs of every target. Knows nothing of coverage: the structure of the inputs has to do.
//!
//! Invariants
//! - Input n of a seed is a function of the target's name, the seed and n alone, whatever ran before.
//! - A target decodes through the functions that the processes call, not through copies of them.

pub mod campaign;
pub mod corpus;
pub mod measure;
pub mod mutate;
pub mod target;
pub mod targets;
