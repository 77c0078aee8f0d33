//! A disk that takes its time: every fsync and fdatasync of a process is held up before the kernel gets it.
//!
//! By strace, which needs root; when it ends, however it does, the process goes on as before.
//!
//! Source: strace(1), "Tampering".

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::process::Running;
use crate::wait::{Look, until};

const ATTACH_DEADLINE: Duration = Duration::from_secs(10);

/// The flushes of a process are slow until this is dropped.
#[derive(Debug)]
pub struct SlowFlushes(#[expect(dead_code, reason = "it is dropped")] Running);

impl SlowFlushes {
    /// Returns once all threads of the process are held up.
    pub fn of(pid: u32, delay: Duration) -> Result<Self> {
        let inject = format!("inject=fsync,fdatasync:delay_enter={}us", delay.as_micros());
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync,fdatasync", "-e", &inject, "-p"]);
        let mut strace = Running::start(command.arg(pid.to_string()))?;
        until("strace to hold every thread", ATTACH_DEADLINE, || {
            anyhow::ensure!(strace.exit_status()?.is_none(), "strace has ended; it needs root");
            let tracer = format!("TracerPid:\t{}\n", strace.pid());
            let mut free = 0;
            for task in fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread may end between the listing and the reading.
                let status = fs::read_to_string(task?.path().join("status"));
                free += u32::from(status.is_ok_and(|status| !status.contains(&tracer)));
            }
            Ok(if free == 0 { Look::Done(()) } else { Look::NotYet(format!("{free} threads are free")) })
        })?;
        Ok(Self(strace))
    }
}
