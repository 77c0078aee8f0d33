//! System calls that std has no safe wrapper for, each behind one.
//!
//! Used by `disk`, `net` and `shard`, so that none of them needs `unsafe` of its own for a plain call.
//! Knows nothing of what the calls are for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// Since Linux 6.15; libc does not name it yet.
const TCP_RTO_MAX_MS: libc::c_int = 44;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Gives the first `bytes` of `file` blocks of the device, and makes the file that long.
pub fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    let bytes = libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: the descriptor is open for as long as `file` lives; no memory is passed.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes) }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(|_| ()),
        }
    }
}

/// Alignment that O_DIRECT needs of memory and of offsets, where the file system tells it; 0 where it would go through the
/// page cache all the same.
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    // SAFETY: an all-zero statx is a valid value of the plain struct.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string (AT_EMPTY_PATH: the descriptor itself), `status` is ours.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &mut status)
    };
    let told = result == 0 && status.stx_mask & libc::STATX_DIOALIGN != 0;
    told.then_some((status.stx_dio_mem_align, status.stx_dio_offset_align))
}

/// A new eventfd with counter 0. It blocks, because io_uring answers a read of a non-blocking one at once.
pub fn eventfd() -> io::Result<File> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Ends the connection of `socket` when sent data stays unacknowledged for `timeout`.
pub fn set_user_timeout(socket: &impl AsRawFd, timeout: Duration) -> io::Result<()> {
    set_tcp_option(socket, libc::TCP_USER_TIMEOUT, timeout)
}

/// Sent data that stays unacknowledged is sent again after `interval` at the latest, however often it was before.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.15: the kernel waits twice as long each time.
pub fn set_retransmission_interval(socket: &impl AsRawFd, interval: Duration) -> io::Result<()> {
    set_tcp_option(socket, TCP_RTO_MAX_MS, interval)
}

/// Has the peer of `socket` closed it, or its half that sends? Also while bytes that it sent before are unread.
pub fn is_hung_up(socket: RawFd) -> bool {
    let mut poll = libc::pollfd { fd: socket, events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid pollfd, and no wait.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Sets an option that is a number of milliseconds.
fn set_tcp_option(socket: &impl AsRawFd, option: libc::c_int, time: Duration) -> io::Result<()> {
    let millis = libc::c_uint::try_from(time.as_millis()).unwrap_or(libc::c_uint::MAX);
    // SAFETY: the option takes one c_uint, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const millis).cast(),
            size_of::<libc::c_uint>() as libc::socklen_t,
        )
    };
    check(result).map(|_| ())
}

/// Bytes that this process may lock (`RLIMIT_MEMLOCK`); `u64::MAX` is no limit.
pub fn memlock_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid place for the answer.
    match check(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) }) {
        Ok(_) => limit.rlim_cur,
        Err(_) => 0,
    }
}

/// Nanoseconds since boot, suspended time included (CLOCK_BOOTTIME).
pub fn boottime_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    assert!(result == 0, "CLOCK_BOOTTIME exists since Linux 2.6.39");
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// SIGTERM and SIGINT, which no thread takes on its own any more.
pub struct Termination(libc::sigset_t);

/// Keeps the termination signals from every thread that is started from now on; [`Termination::wait`] takes them.
pub fn block_termination_signals() -> Termination {
    // SAFETY: an all-zero sigset_t is a valid value of the plain struct.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `signals` is ours; the calls fail only for numbers that are no signals.
    unsafe {
        libc::sigemptyset(&mut signals);
        libc::sigaddset(&mut signals, libc::SIGTERM);
        libc::sigaddset(&mut signals, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &signals, std::ptr::null_mut());
    }
    Termination(signals)
}

impl Termination {
    /// The first termination signal.
    pub fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: both places are valid for the call.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
        signal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_time_goes_forward() {
        let before = boottime_ns();
        std::thread::sleep(Duration::from_millis(2));
        assert!(boottime_ns() >= before + 2_000_000);
    }
}
