//! A disk that is slow: a process gets so many writes a second to a block device, and no more.
//!
//! By a control group of its own, version 1 or 2, which needs root; when it goes, the process is as fast as before.
//!
//! Source: the kernel's `Documentation/admin-guide/cgroup-v1/blkio-controller.rst` and `cgroup-v2.rst`, "IO Interface Files".

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const VERSION_1: &str = "/sys/fs/cgroup/blkio";
const VERSION_2: &str = "/sys/fs/cgroup";

/// Writes of a process are slow until this is dropped.
#[derive(Debug)]
pub struct SlowWrites {
    pid: u32,
    group: PathBuf,
}

impl SlowWrites {
    /// `device`: a whole disk or a loop device.
    pub fn of(pid: u32, device: &Path, per_second: u32) -> Result<Self> {
        let name = device.file_name().context("a device has a name")?;
        let number = fs::read_to_string(Path::new("/sys/block").join(name).join("dev"))?;
        let number = number.trim();
        let (root, file, limit) = if Path::new(VERSION_1).is_dir() {
            (VERSION_1, "blkio.throttle.write_iops_device", format!("{number} {per_second}"))
        } else {
            fs::write(Path::new(VERSION_2).join("cgroup.subtree_control"), "+io")
                .context("the io controller: control groups need root")?;
            (VERSION_2, "io.max", format!("{number} wiops={per_second}"))
        };
        let group = Path::new(root).join(format!("xsan-test-{pid}"));
        fs::create_dir(&group).with_context(|| format!("{}: control groups need root", group.display()))?;
        // What follows may fail: the group goes in any case.
        let slow = Self { pid, group };
        fs::write(slow.group.join(file), limit).with_context(|| format!("{file} of {}", device.display()))?;
        fs::write(slow.group.join("cgroup.procs"), pid.to_string())?;
        Ok(slow)
    }
}

impl Drop for SlowWrites {
    fn drop(&mut self) {
        let root = self.group.parent().expect("it was made below the root");
        // The process may have ended; a group without one can be removed.
        let _ = fs::write(root.join("cgroup.procs"), self.pid.to_string());
        if let Err(error) = fs::remove_dir(&self.group) {
            eprintln!("{} is left behind: {error}", self.group.display());
        }
    }
}
