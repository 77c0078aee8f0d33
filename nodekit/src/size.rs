//! Sizes as people write them: `100GB` is decimal, `100GiB` binary, a bare number is bytes.
//!
//! Used by the configuration and the command line; the wire and the disk count in bytes.

use std::fmt;

const DECIMAL: [(&str, u64); 5] = [
    ("PB", 1_000_000_000_000_000),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
];
const BINARY: [(&str, u64); 5] =
    [("PiB", 1 << 50), ("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("is not a size; write a number and a unit, as 100GB (decimal) or 100GiB (binary)")]
    Malformed,
    #[error("has an unknown unit; the units are B, kB, MB, GB, TB, PB and KiB, MiB, GiB, TiB, PiB")]
    UnknownUnit,
    #[error("is not a whole number of bytes")]
    Fraction,
    #[error("is more than 16 EiB")]
    TooLarge,
}

/// Bytes of `text`: digits, perhaps a fraction, perhaps a unit (in any case, with or without a space before it).
///
/// `G` alone is refused: it means a decimal unit to one tool and a binary one to the next.
///
/// # Errors
/// `text` is no size, or not a whole number of bytes below 2^64.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..unit_at], text[unit_at..].trim_start());
    let scale = unit_bytes(unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let malformed =
        whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty());
    if malformed {
        return Err(SizeError::Malformed);
    }
    let whole: u128 = whole.parse().map_err(|_| SizeError::TooLarge)?;
    let mut bytes = whole.checked_mul(u128::from(scale)).ok_or(SizeError::TooLarge)?;
    if !fraction.is_empty() {
        // Past 15 digits no unit has a whole number of bytes but by trailing zeroes.
        let digits = fraction.trim_end_matches('0');
        if digits.len() > 15 {
            return Err(SizeError::Fraction);
        }
        let tenths = 10u128.pow(digits.len() as u32);
        let part = if digits.is_empty() { 0 } else { digits.parse().map_err(|_| SizeError::Malformed)? };
        let scaled = part * u128::from(scale);
        if !scaled.is_multiple_of(tenths) {
            return Err(SizeError::Fraction);
        }
        bytes += scaled / tenths;
    }
    u64::try_from(bytes).map_err(|_| SizeError::TooLarge)
}

fn unit_bytes(unit: &str) -> Result<u64, SizeError> {
    if unit.is_empty() || unit.eq_ignore_ascii_case("b") {
        return Ok(1);
    }
    DECIMAL
        .iter()
        .chain(&BINARY)
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))
        .map(|(_, bytes)| *bytes)
        .ok_or(SizeError::UnknownUnit)
}

/// Shows a size shortly: exactly where a unit divides it (`100 GB`, `4 MiB`), else rounded to binary units (`93.1 GiB`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&short(self.0))
    }
}

fn short(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // The largest unit that divides the size says it exactly; binary wins a tie, as it can not be read wrongly.
    let exact = |units: &[(&'static str, u64); 5]| {
        units.iter().find(|(_, unit)| bytes.is_multiple_of(*unit)).map(|(name, unit)| (bytes / unit, *name))
    };
    let best = [exact(&BINARY), exact(&DECIMAL)].into_iter().flatten().min_by_key(|(count, _)| *count);
    if let Some((count, unit)) = best
        && count < 10_000
    {
        return format!("{count} {unit}");
    }
    let (unit, scale) = BINARY.iter().find(|(_, unit)| bytes >= *unit).copied().unwrap_or(("B", 1));
    let value = bytes as f64 / scale as f64;
    match value {
        v if v < 9.995 => format!("{value:.2} {unit}"),
        v if v < 99.95 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

/// Shows a measured amount, as space used: always binary units, never more than three digits' precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Amount(pub u64);

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        let Some((unit, scale)) = BINARY.iter().find(|(_, unit)| bytes >= *unit) else {
            return f.pad(&format!("{bytes} B"));
        };
        let value = bytes as f64 / *scale as f64;
        let text = match value {
            _ if bytes.is_multiple_of(*scale) => format!("{value:.0} {unit}"),
            v if v < 9.995 => format!("{value:.2} {unit}"),
            v if v < 99.95 => format!("{value:.1} {unit}"),
            _ => format!("{value:.0} {unit}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_and_binary_units_differ() {
        assert_eq!(parse("100GB"), Ok(100_000_000_000));
        assert_eq!(parse("100GiB"), Ok(100 << 30));
        assert_eq!(parse(" 1.5 tib "), Ok(3 << 39));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("0.5kB"), Ok(500));
        assert_eq!(parse("1.500000000000000000MB"), Ok(1_500_000));
        assert_eq!(parse("12 b"), Ok(12));
    }

    #[test]
    fn what_is_no_size_says_why() {
        for text in ["", "GB", ".5GB", "5.GB", "1.2.3GB", "-1GB"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert_eq!(parse("5."), Err(SizeError::Malformed));
        assert_eq!(parse("10G"), Err(SizeError::UnknownUnit));
        assert_eq!(parse("10 GBs"), Err(SizeError::UnknownUnit));
        assert_eq!(parse("0.3B"), Err(SizeError::Fraction));
        assert_eq!(parse("0.1KiB"), Err(SizeError::Fraction));
        assert_eq!(parse("16384PiB"), Err(SizeError::TooLarge));
        assert_eq!(parse("99999999999999999999999999999999999999999"), Err(SizeError::TooLarge));
    }

    #[test]
    fn sizes_are_shown_as_they_were_given() {
        for text in ["100 GB", "100 GiB", "4 MiB", "1 TB", "512 B", "1536 KiB", "9999 MB"] {
            assert_eq!(Size(parse(text).expect("a size")).to_string(), text);
        }
        assert_eq!(Size(100_000_000_001).to_string(), "93.1 GiB");
        assert_eq!(Size(1025).to_string(), "1.00 KiB");
        assert_eq!(Size(u64::MAX).to_string(), "16384 PiB");
    }

    #[test]
    fn amounts_are_binary_and_short() {
        assert_eq!(Amount(0).to_string(), "0 B");
        assert_eq!(Amount(8 << 30).to_string(), "8 GiB");
        assert_eq!(Amount(100_000_000_000).to_string(), "93.1 GiB");
        assert_eq!(Amount(1_500_000).to_string(), "1.43 MiB");
        assert_eq!(Amount(1023 << 20).to_string(), "1023 MiB");
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn every_number_of_bytes_parses_back(bytes: u64) {
            proptest::prop_assert_eq!(parse(&bytes.to_string()), Ok(bytes));
        }
    }
}
