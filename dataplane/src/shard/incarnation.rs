//! The number of this life of the data process: above all numbers that its lives before used.
//!
//! Used by `boot`. Peers tell lives apart by it, and sessions are numbered from it on: of one sender only the newest
//! session is served. The wall clock alone gives no such number, because it can be set back: peers would refuse every
//! session of the new life until the clock has passed the old one. So the last number is kept in the data directory.
//! The other way, that peers take a lower session from the life that the map names, asks every receiver to tell lives
//! apart before it has the map that names them. The control plane only compares incarnations for equality.
//!
//! Invariants
//! - A number is on stable media before it is used.

use std::io;
use std::path::Path;

use xsan_nodekit::config;
use xsan_protocol::ids::Incarnation;

/// The last number given out, in decimal.
pub const FILE: &str = "incarnation";
/// More sessions than a life has: one for each connection that it makes or takes.
const SESSIONS_MAX: u64 = 1 << 40;

/// Begins a life.
///
/// # Errors
/// `directory` can not be read or written, or the file in it is not one of ours.
pub fn begin(directory: &Path, wall_clock_ns: u64) -> io::Result<Incarnation> {
    let file = directory.join(FILE);
    let last = match std::fs::read_to_string(&file) {
        Ok(text) => text.trim().parse().map_err(|_| {
            // Without it, a clock that was set back would have peers refuse this node.
            let problem = "is not a number as the data process writes; write the nanoseconds since 1970 into it (date +%s%N)";
            io::Error::new(io::ErrorKind::InvalidData, problem)
        })?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let number = wall_clock_ns.max(u64::saturating_add(last, SESSIONS_MAX));
    config::replace(&file, format!("{number}\n").as_bytes())?;
    Ok(Incarnation(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node whose clock had stepped back was refused by its peers after a restart, as an outdated session of
    /// itself, until the clock had caught up. Found by reading.
    #[test]
    fn a_later_life_has_a_higher_number_whatever_the_clock_says() {
        let directory = tempfile::tempdir().unwrap();
        let begin = |clock| begin(directory.path(), clock).unwrap().0;
        let hour = 3_600_000_000_000;
        assert_eq!(begin(100 * hour), 100 * hour);
        let after_step = begin(50 * hour);
        assert!(after_step > 100 * hour, "{after_step}");
        let again = begin(0);
        assert!(again >= after_step + SESSIONS_MAX);
        assert_eq!(begin(200 * hour), 200 * hour);
    }

    #[test]
    fn a_file_of_somebody_else_is_told() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(FILE), "yesterday").unwrap();
        assert_eq!(begin(directory.path(), 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
