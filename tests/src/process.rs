//! Exact control of processes: signals through pidfds, children and usage from `/proc`.
//!
//! Invariants
//! - A `Handle` names one process for ever: when that has ended, signalling it does nothing, even if its
//!   number is in use again.
//! - A `Running` process is dead and reaped when it is dropped, and dies with the harness.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wait::{Look, until};

/// One process, found by number and checked to be the one that was meant.
#[derive(Debug)]
pub struct Handle {
    pub pid: u32,
    fd: OwnedFd,
}

impl Handle {
    /// # Errors
    /// No such process.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Self { pid, fd })
    }

    /// Sends a signal; a process that has ended already is no error.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open, and a null siginfo is what plain kill(2) would send.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, no_info, 0) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }

    pub fn has_ended(&self) -> io::Result<bool> {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd, no waiting.
        let ready = unsafe { libc::poll(&mut poll, 1, 0) };
        if ready < 0 { Err(io::Error::last_os_error()) } else { Ok(ready > 0) }
    }

    pub fn wait_ended(&self, deadline: Duration) -> Result<()> {
        until(&format!("process {} to end", self.pid), deadline, || {
            Ok(if self.has_ended()? { Look::Done(()) } else { Look::NotYet("it runs".to_owned()) })
        })
    }

    /// SIGKILL, and waits until the process is surely gone.
    pub fn kill(&self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        self.wait_ended(Duration::from_secs(20))
    }
}

/// The children of a process, with those that have ended and that it has not waited for yet.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    let tasks =
        fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} has ended"))?;
    for task in tasks {
        // A thread may end between the listing and the reading; its children are then another thread's.
        let text = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        for word in text.split_whitespace() {
            found.push(word.parse().context("/proc/PID/task/TID/children")?);
        }
    }
    Ok(found)
}

/// The live child of `parent` whose command is `name`.
pub fn child_named(parent: u32, name: &str) -> Result<Option<Handle>> {
    for pid in children(parent)? {
        let Ok(handle) = Handle::open(pid) else { continue };
        // Read after the handle was opened: the number can not have gone to another process in between.
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if command.trim_end() == name && parent_of(pid) == Some(parent) && !handle.has_ended()? {
            return Ok(Some(handle));
        }
    }
    Ok(None)
}

fn parent_of(pid: u32) -> Option<u32> {
    stat_fields(pid).ok()?.get(1)?.parse().ok()
}

/// Fields of `/proc/PID/stat` behind the command's name: index 0 is the state.
fn stat_fields(pid: u32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = text.rsplit_once(')').context("/proc/PID/stat has no command")?;
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu: Duration,
    pub resident_bytes: u64,
}

impl std::ops::Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { cpu: self.cpu + other.cpu, resident_bytes: self.resident_bytes + other.resident_bytes }
    }
}

pub fn usage(pid: u32) -> Result<Usage> {
    let fields = stat_fields(pid)?;
    let field =
        |index: usize| -> Result<u64> { Ok(fields.get(index).context("/proc/PID/stat is short")?.parse()?) };
    let ticks = field(11)? + field(12)?;
    let pages = field(21)?;
    Ok(Usage {
        cpu: Duration::from_nanos(ticks * 1_000_000_000 / system_value(libc::_SC_CLK_TCK)),
        resident_bytes: pages * system_value(libc::_SC_PAGESIZE),
    })
}

fn system_value(name: i32) -> u64 {
    // SAFETY: sysconf takes a number and touches no memory.
    let value = unsafe { libc::sysconf(name) };
    u64::try_from(value).expect("sysconf knows its standard names")
}

/// A process that the harness started.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
}

impl Running {
    /// Starts a command that is killed when the thread that started it ends: even a harness that is itself
    /// killed leaves nothing behind. So start from a thread that outlives the process.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        // SAFETY: prctl is safe to call between fork and exec; it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                    Ok(())
                } else {
                    Err(io::Error::last_os_error())
                }
            });
        }
        let child = command.spawn().with_context(|| format!("{name} does not start"))?;
        Ok(Self { child, name })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn exit_status(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("{} (process {}) to end", self.name, self.pid());
        until(&what, deadline, || {
            Ok(match self.exit_status()? {
                Some(status) => Look::Done(status),
                None => Look::NotYet("it runs".to_owned()),
            })
        })
    }

    /// SIGTERM, and a clean exit is expected.
    pub fn terminate(&mut self, deadline: Duration) -> Result<()> {
        if self.exit_status()?.is_none() {
            Handle::open(self.pid())?.signal(libc::SIGTERM)?;
        }
        let status = self.wait(deadline)?;
        ensure!(status.success(), "{} ended with {status} when it was told to stop", self.name);
        Ok(())
    }

    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{} (process {}) could not be killed: {error}", self.name, self.pid());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    fn sleeping_child(parent: u32) -> Handle {
        until("the child", Duration::from_secs(5), || {
            Ok(match child_named(parent, "sleep")? {
                Some(child) => Look::Done(child),
                None => Look::NotYet("no child".to_owned()),
            })
        })
        .unwrap()
    }

    #[test]
    fn children_are_found_by_name_and_killed() {
        let mut shell = Running::start(Command::new("sh").args(["-c", "sleep 1000 & wait"])).unwrap();
        let child = sleeping_child(shell.pid());
        assert!(child_named(shell.pid(), "other").unwrap().is_none());
        // It has its name before its memory.
        until("memory of the child", Duration::from_secs(5), || {
            let usage = usage(child.pid)?;
            Ok(if usage.resident_bytes > 0 { Look::Done(()) } else { Look::NotYet("none".to_owned()) })
        })
        .unwrap();
        child.kill().unwrap();
        // A handle of a process that is gone takes signals without harm.
        child.signal(libc::SIGKILL).unwrap();
        assert!(shell.wait(Duration::from_secs(5)).unwrap().success());
    }

    #[test]
    fn a_killed_child_is_not_found_before_its_parent_waits_for_it() {
        // A program that waits for no child, and here for its input only.
        let mut command = Command::new("sh");
        let parent =
            Running::start(command.args(["-c", "sleep 1000 & exec cat"]).stdin(Stdio::piped())).unwrap();
        let child = sleeping_child(parent.pid());
        child.kill().unwrap();
        assert_eq!(children(parent.pid()).unwrap(), [child.pid]);
        assert!(child_named(parent.pid(), "sleep").unwrap().is_none());
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let running = Running::start(Command::new("sleep").arg("1000")).unwrap();
        let handle = Handle::open(running.pid()).unwrap();
        drop(running);
        assert!(handle.has_ended().unwrap());
    }
}
