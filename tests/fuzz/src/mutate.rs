//! Mutations: from valid encodings to ones that are nearly valid.
//!
//! Pure; all chance comes from the caller's generator.

mod bytes;
mod json;
mod message;

use xsan_dataplane::testing::Random;

use crate::target::{Form, Target};

/// Numbers at the edges of types, sizes and limits.
const INTERESTING: [u64; 32] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    511,
    512,
    1000,
    1023,
    1024,
    4095,
    4096,
    4097,
    65535,
    65536,
    1 << 20,
    (1 << 22) - 4096,
    1 << 22,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    u64::MAX,
];

/// A number worth trying in a field of `bits` bits.
pub fn interesting(random: &mut Random, bits: u32) -> u64 {
    let value = match random.below(8) {
        0 => random.next(),
        1 => 1_u64.wrapping_shl(random.below(u64::from(bits)) as u32),
        2 => u64::MAX - random.below(8),
        3 => (1_u64 << (bits - 1)).wrapping_add(random.below(5)).wrapping_sub(2),
        4 => (1_u64 << random.below(u64::from(bits))).wrapping_sub(1),
        5 => random.below(300),
        _ => INTERESTING[random.index(INTERESTING.len())],
    };
    if bits == 64 { value } else { value & ((1 << bits) - 1) }
}

/// An input of `target`: a seed, mutated some times, with its checksums right again, mostly.
pub fn input(target: &Target, seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut input = seeds[random.index(seeds.len())].clone();
    // Now and then a seed as it is: the oracle must hold for what the encoders make.
    if random.one_in(64) {
        return input;
    }
    // Some inputs are far off, most are close to valid.
    let count = 1 + if random.one_in(4) { random.below(16) } else { random.below(3) };
    for _ in 0..count {
        mutate_once(target.form, &mut input, seeds, random);
    }
    input.truncate(target.bytes_max);
    if !random.one_in(8) {
        (target.fix)(&mut input, random);
        input.truncate(target.bytes_max);
    }
    input
}

fn mutate_once(form: Form, input: &mut Vec<u8>, seeds: &[Vec<u8>], random: &mut Random) {
    let other = &seeds[random.index(seeds.len())];
    let structured = !random.one_in(5);
    match form {
        Form::Message if structured => message::mutate(input, other, random),
        Form::Json if structured => json::mutate(input, other, random),
        Form::Text | Form::Json => bytes::mutate_text(input, other, random),
        Form::Bytes | Form::Message => bytes::mutate(input, other, random),
    }
}
