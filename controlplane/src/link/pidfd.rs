//! A process that is watched: readable once it is dead, all its threads gone.
//!
//! Used by `server`. A pidfd and not the closing of a socket: a process can close its socket and live on.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

#[derive(Debug)]
pub struct ProcessWatch {
    descriptor: AsyncFd<OwnedFd>,
}

impl ProcessWatch {
    /// # Errors
    /// No process has that id (any more).
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::pid_t::from(pid), 0) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let raw = RawFd::try_from(result).expect("descriptors are small");
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        let owned = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: an `OwnedFd` keeps its descriptor open, and the same, until it is dropped.
        let descriptor = unsafe { AsyncFd::register_with_interest(owned, Interest::READABLE) };
        Ok(Self { descriptor: descriptor.map_err(io::Error::from)? })
    }

    /// Waits until the process is dead.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn dead(&self) -> io::Result<()> {
        self.descriptor.readable().await?.retain_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn death_is_seen_and_life_is_not_taken_for_it() {
        let mut child = tokio::process::Command::new("sleep").arg("60").spawn().expect("sleep is there");
        let pid = i32::try_from(child.id().expect("it runs")).expect("a pid");
        let watch = ProcessWatch::open(pid).expect("it runs");
        assert!(tokio::time::timeout(Duration::from_millis(50), watch.dead()).await.is_err());
        child.start_kill().expect("it runs");
        tokio::time::timeout(Duration::from_secs(5), watch.dead()).await.expect("it dies").expect("watched");
        child.wait().await.expect("it ran");
        assert!(ProcessWatch::open(pid).is_err());
    }
}
