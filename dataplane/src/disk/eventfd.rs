//! An eventfd: how a device ring or another thread wakes a shard that waits in its runtime.
//!
//! Used by `disk::ring` (the kernel signals completions) and `shard::mailbox` (producers signal messages).
//!
//! Invariants
//! - A signal given while nobody waits is kept: the next wait returns at once.
//! - At most one wait is under way for one `EventWaiter`.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crate::disk::os;

/// The signalling end; clones share the counter.
#[derive(Clone, Debug)]
pub struct EventFd(Arc<File>);

impl EventFd {
    pub fn new() -> io::Result<Self> {
        os::eventfd().map(|file| Self(Arc::new(file)))
    }

    /// Ends the present or the next wait.
    pub fn signal(&self) {
        // The counter overflows after 2^64 - 2 signals without a wait; any other failure is a closed
        // descriptor, which the Arc excludes.
        (&*self.0).write_all(&1u64.to_ne_bytes()).expect("an eventfd takes a signal");
    }

    /// The waiting end, for one task of the thread that calls this.
    pub fn waiter(&self) -> io::Result<EventWaiter> {
        let file = monoio::fs::File::from_std(self.0.try_clone()?)?;
        Ok(EventWaiter { file, counter: vec![0; 8] })
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The waiting end of an [`EventFd`], on the runtime of one thread.
pub struct EventWaiter {
    file: monoio::fs::File,
    counter: Vec<u8>,
}

impl EventWaiter {
    /// Returns once a signal was given since the last return.
    ///
    /// # Errors
    /// The kernel refuses the read: the ring of the runtime is broken.
    pub async fn wait(&mut self) -> io::Result<()> {
        loop {
            let counter = std::mem::take(&mut self.counter);
            let counter = if counter.len() == 8 { counter } else { vec![0; 8] };
            let (result, counter) = self.file.read_at(counter, 0).await;
            self.counter = counter;
            match result {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
