//! Waiting for a condition with a deadline: the only way the harness lets time pass.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What one look at the condition saw.
pub enum Look<T> {
    Done(T),
    /// Not yet; says what was seen, for the message when the deadline passes.
    NotYet(String),
}

/// Looks until the condition holds.
///
/// # Errors
/// The deadline passed (with what was seen last), or the look itself failed.
pub fn until<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Look<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        let seen = match look()? {
            Look::Done(value) => return Ok(value),
            Look::NotYet(seen) => seen,
        };
        if started.elapsed() >= deadline {
            bail!("waited {deadline:?} for {what}; last seen: {seen}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_ends_with_what_was_seen() {
        let result = until::<()>("rain", Duration::from_millis(50), || Ok(Look::NotYet("sun".to_owned())));
        let message = result.unwrap_err().to_string();
        assert!(message.contains("rain") && message.contains("sun"), "{message}");
    }

    #[test]
    fn a_condition_that_comes_true_is_seen() {
        let mut looks = 0;
        let value = until("the third look", Duration::from_secs(5), || {
            looks += 1;
            Ok(if looks == 3 { Look::Done(looks) } else { Look::NotYet(format!("look {looks}")) })
        });
        assert_eq!(value.unwrap(), 3);
    }
}
