//! What a fuzz target is: seeds, how to mutate them, how to make a mutation pass the checksums, and the oracle.

use xsan_dataplane::testing::Random;

/// What the bytes of a target's inputs are, for mutations that keep them nearly right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Fixed structures: integers of 1 to 8 bytes at fixed offsets.
    Bytes,
    /// A protocol buffer.
    Message,
    Json,
    Text,
}

/// What became of an input that broke nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The decoder took it, and what it took held against the oracle.
    Accepted,
    /// The decoder refused it.
    Refused,
}

impl Verdict {
    pub fn of<T, E>(result: &Result<T, E>) -> Self {
        if result.is_ok() { Self::Accepted } else { Self::Refused }
    }
}

/// A panic that is reported and not mended yet: the file of the panic, and a part of its message.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub file: &'static str,
    pub message: &'static str,
}

pub struct Target {
    pub name: &'static str,
    /// What is decoded, for `--list`.
    pub what: &'static str,
    pub form: Form,
    /// No input is longer.
    pub bytes_max: usize,
    /// Inputs of the random part of `cargo test`.
    pub test_inputs: u64,
    /// Valid encodings made by the real encoders, the same at every call.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Recomputes the checksums of a mutated encoding; does nothing where there are none.
    pub fix: fn(&mut Vec<u8>, &mut Random),
    /// Decodes and checks. An error or a panic is a finding.
    pub check: fn(&[u8]) -> anyhow::Result<Verdict>,
    pub known: &'static [Known],
}

/// The `fix` of formats without checksums.
pub fn no_checksum(_: &mut Vec<u8>, _: &mut Random) {}
