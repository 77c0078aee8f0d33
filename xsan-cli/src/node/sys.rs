//! The few calls to the kernel that the standard library does not have, behind safe functions.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tokio::process::Command;

/// Has the kernel kill the child when the thread that starts it ends.
///
/// That is the *thread*: to be called, and the child spawned, on one that lives as long as the process.
pub fn kill_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made (prctl, getppid), and no memory is allocated.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the request was made; then nobody would ever kill this child.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

/// Asks a child that has not been waited for to end.
pub fn terminate(pid: u32) {
    let pid = libc::pid_t::try_from(pid).expect("the kernel's process ids fit");
    // SAFETY: plain system call. The pid can not have been reused, because the child was not waited for; if it has
    // ended, the signal does nothing.
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

/// Was this process started with SIGHUP ignored?
pub fn hangup_is_ignored() -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: nothing is set, and `action` is a valid place for the answer.
    let result = unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) };
    assert!(result == 0, "SIGHUP is a signal");
    // SAFETY: the call succeeded, so it has filled in every field.
    unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Bytes that may still be written to the file system of `path`.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` ends in NUL and `stat` is large enough; both outlive the call.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled in every field.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
