//! How many files a process may have open, connections among them (`RLIMIT_NOFILE`).
//!
//! Used by xsan-control and xsan-data. The soft limit is 1024 where nobody set another, for programs that use `select`; ours do not.

use std::io;

/// Files that this process may have open.
pub fn limit() -> u64 {
    get().rlim_cur
}

/// Raises the limit as far as the system lets this process. What came of it is logged.
pub fn raise_limit() {
    let before = get();
    match set(libc::rlimit { rlim_cur: before.rlim_max, ..before }) {
        Ok(()) => tracing::info!(limit = before.rlim_max, "the limit on open files is raised"),
        Err(error) => tracing::warn!(
            limit = before.rlim_cur, hard_limit = before.rlim_max, %error,
            "the limit on open files can not be raised: set LimitNOFILE of the service"
        ),
    }
}

fn get() -> libc::rlimit {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    assert!(result == 0, "every kernel has this limit");
    limit
}

fn set(limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: `limit` lives across the call, which only reads it.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_the_hard_one() {
        let hard = get().rlim_max;
        set(libc::rlimit { rlim_cur: 512, rlim_max: hard }).expect("lower is always allowed");
        assert_eq!(limit(), 512);
        raise_limit();
        assert_eq!(limit(), hard);
    }
}
