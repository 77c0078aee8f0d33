//! Mutations that know nothing of the format but that integers are aligned to their size.

use xsan_dataplane::testing::Random;

use super::interesting;

/// Structure comes first in every format of ours, so half of all mutations go to the first bytes.
const HEAD_BYTES: usize = 256;

fn place(random: &mut Random, length: usize) -> usize {
    let length = length.max(1);
    if random.one_in(2) { random.index(length.min(HEAD_BYTES)) } else { random.index(length) }
}

fn range(random: &mut Random, length: usize) -> std::ops::Range<usize> {
    let start = place(random, length).min(length);
    let most = (length - start).min(if random.one_in(4) { usize::MAX } else { 32 });
    start..start + random.index(most + 1)
}

pub fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if input.is_empty() {
        input.extend_from_slice(other);
        return;
    }
    match random.below(14) {
        0..=1 => {
            let at = place(random, input.len());
            input[at] ^= 1 << random.below(8);
        }
        2 => {
            let at = place(random, input.len());
            input[at] = random.next() as u8;
        }
        3..=6 => set_integer(input, random),
        7 => add_to_integer(input, random),
        8 => {
            let length = input.len();
            input.truncate(random.index(length));
        }
        9 => {
            let byte = if random.one_in(2) { 0 } else { random.next() as u8 };
            let bytes = if random.one_in(4) { 4096 } else { 1 + random.index(64) };
            input.resize(input.len() + bytes, byte);
        }
        10 => {
            let cut = range(random, input.len());
            input.drain(cut);
        }
        11 => {
            let copied = range(random, input.len());
            let bytes = input[copied].to_vec();
            let at = place(random, input.len());
            input.splice(at..at, bytes);
        }
        12 => {
            // The beginning of this one, the end of the other.
            let at = place(random, input.len().min(other.len()));
            input.truncate(at);
            input.extend_from_slice(other.get(at..).unwrap_or_default());
        }
        _ => {
            let fill = range(random, input.len());
            let byte = if random.one_in(2) { 0 } else { 0xff };
            input[fill].fill(byte);
        }
    }
}

/// A field of 1, 2, 4 or 8 bytes at an offset that suits it (offsets of ours are multiples of 4 at least).
fn field(random: &mut Random, length: usize) -> Option<(usize, usize)> {
    let bytes = 1 << random.below(4);
    let at = place(random, length) / bytes.min(4) * bytes.min(4);
    (at + bytes <= length).then_some((at, bytes))
}

fn write(input: &mut [u8], at: usize, bytes: usize, value: u64, big_endian: bool) {
    let to = &mut input[at..at + bytes];
    if big_endian {
        to.copy_from_slice(&value.to_be_bytes()[8 - bytes..]);
    } else {
        to.copy_from_slice(&value.to_le_bytes()[..bytes]);
    }
}

fn set_integer(input: &mut [u8], random: &mut Random) {
    let Some((at, bytes)) = field(random, input.len()) else { return };
    let value = interesting(random, bytes as u32 * 8);
    write(input, at, bytes, value, random.one_in(4));
}

fn add_to_integer(input: &mut [u8], random: &mut Random) {
    let Some((at, bytes)) = field(random, input.len()) else { return };
    let big_endian = random.one_in(4);
    let mut wide = [0; 8];
    if big_endian {
        wide[8 - bytes..].copy_from_slice(&input[at..at + bytes]);
    } else {
        wide[..bytes].copy_from_slice(&input[at..at + bytes]);
    }
    let value = if big_endian { u64::from_be_bytes(wide) } else { u64::from_le_bytes(wide) };
    let most = if random.one_in(2) { 4 } else { 4096 };
    let step = 1 + random.below(most);
    let value = if random.one_in(2) { value.wrapping_add(step) } else { value.wrapping_sub(step) };
    write(input, at, bytes, value, big_endian);
}

/// For texts: what a parser of numbers, units and quotes may trip over.
pub fn mutate_text(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    const PIECES: [&str; 30] = [
        "0",
        "9",
        "-",
        "+",
        ".",
        "..",
        " ",
        "\t",
        "\n",
        "e",
        "E9",
        "kB",
        "KiB",
        "GiB",
        "PB",
        "B",
        "\"",
        "\\u0000",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "null",
        "true",
        "18446744073709551616",
        "\u{130}",
        "\u{feff}",
        "٣",
    ];
    if random.one_in(2) {
        let piece = PIECES[random.index(PIECES.len())].repeat(1 + random.index(3));
        let at = random.index(input.len() + 1);
        let until = (at + random.index(3)).min(input.len());
        input.splice(at..until, piece.into_bytes());
    } else {
        mutate(input, other, random);
    }
}
