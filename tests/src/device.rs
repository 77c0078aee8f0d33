//! Block devices that fail when they are told to: loop devices over a file, or over too little memory.
//!
//! Used by `cluster` for nodes whose store is to fail, or whose flushes are to be counted. A loop device is gone when its last user is, however the
//! harness ends; so is the file system of `over_memory`, which is mounted nowhere.
//!
//! Source: loop(4), and `linux/loop.h` for the numbers; the kernel's `Documentation/block/stat.rst`.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const BLKROSET: libc::Ioctl = 0x125D;
const FSCONFIG_SET_STRING: u32 = 1;
const FSCONFIG_CMD_CREATE: u32 = 6;
const FSCONFIG_CMD_RECONFIGURE: u32 = 7;
const FSPICK_EMPTY_PATH: u32 = 8;
/// The word of `/sys/block/NAME/stat` that counts flushes.
const STAT_FLUSHES: usize = 15;
/// Another harness may take the free device first.
const TRIES_MAX: usize = 50;

/// `struct loop_config`, with the `loop_info64` in it.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    before_flags: [u8; 52],
    flags: u32,
    behind_flags: [u8; 176],
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopConfig>() == 304);

#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    device: File,
    /// The file system in memory that it lies on.
    memory: Option<OwnedFd>,
}

impl LoopDevice {
    /// A device over a new sparse file; needs root.
    pub fn over_file(file: &Path, bytes: u64) -> Result<Self> {
        let backing = File::options().read(true).write(true).create_new(true).open(file)?;
        backing.set_len(bytes)?;
        Self::over(&backing, None)
    }

    /// A device that says it has `bytes`, over a file system in memory that takes no more than `limit`: what is
    /// written beyond fails for want of space, as on a thin device whose pool is full. Needs root.
    pub fn over_memory(bytes: u64, limit: u64) -> Result<Self> {
        let mount = memory_file_system(limit).context("making a file system in memory")?;
        let flags = libc::O_CREAT | libc::O_RDWR | libc::O_CLOEXEC;
        // SAFETY: the descriptor is open and the path is a C string.
        let fd = unsafe { libc::openat(mount.as_raw_fd(), c"backing".as_ptr(), flags, 0o600) };
        let backing = File::from(owned(i64::from(fd))?);
        backing.set_len(bytes)?;
        Self::over(&backing, Some(mount))
    }

    fn over(backing: &File, memory: Option<OwnedFd>) -> Result<Self> {
        let control = File::options().read(true).write(true).open("/dev/loop-control");
        let control = control.context("/dev/loop-control: loop devices need root")?;
        for _ in 0..TRIES_MAX {
            // SAFETY: the request takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            ensure!(number >= 0, "no loop device is free: {}", io::Error::last_os_error());
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options().read(true).write(true).open(&path)?;
            let config = LoopConfig {
                fd: backing.as_raw_fd() as u32,
                block_size: 0,
                before_flags: [0; 52],
                flags: LO_FLAGS_AUTOCLEAR,
                behind_flags: [0; 176],
                reserved: [0; 8],
            };
            // SAFETY: the argument is a loop_config that outlives the call; the kernel takes its own hold of the file.
            if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
                return Ok(Self { path, device, memory });
            }
            let error = io::Error::last_os_error();
            ensure!(error.raw_os_error() == Some(libc::EBUSY), "{}: {error}", path.display());
        }
        anyhow::bail!("every free loop device was taken by somebody else");
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes that the device has carried out, as the kernel counts them; since Linux 5.5.
    pub fn flush_count(&self) -> Result<u64> {
        let name = self.path.file_name().expect("a device has a name");
        let stat = fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
        let count = stat.split_whitespace().nth(STAT_FLUSHES);
        Ok(count.context("this kernel counts no flushes")?.parse()?)
    }

    /// The pool of a device over memory is full from now on, or has room for `limit` bytes in all.
    pub fn limit_pool(&self, limit: Option<u64>) -> Result<()> {
        let memory = self.memory.as_ref().context("a device over a file has no pool")?;
        // What is used may grow before it is the limit, which is refused then.
        for _ in 0..TRIES_MAX {
            let bytes = limit.map_or_else(|| used_bytes(memory), Ok)?;
            match set_limit(memory, bytes) {
                Err(error) if limit.is_none() && error.raw_os_error() == Some(libc::EINVAL) => {}
                result => {
                    return result.with_context(|| format!("limiting {} to {bytes}", self.path.display()));
                }
            }
        }
        anyhow::bail!("{} was written to all the time", self.path.display())
    }

    /// A device that is read-only fails every write, and reads on: what worn out flash does.
    pub fn set_read_only(&self, read_only: bool) -> Result<()> {
        let value = libc::c_int::from(read_only);
        // SAFETY: the argument is an int that outlives the call.
        let result = unsafe { libc::ioctl(self.device.as_raw_fd(), BLKROSET, &raw const value) };
        ensure!(result == 0, "{}: {}", self.path.display(), io::Error::last_os_error());
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // The next one with this number would be read-only, too.
        if let Err(error) = self.set_read_only(false) {
            eprintln!("{error:#}");
        }
    }
}

/// The root of a new file system that is mounted nowhere and gone with its last file.
fn memory_file_system(limit: u64) -> io::Result<OwnedFd> {
    // SAFETY: fsopen takes a C string and flags.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0) })?;
    configure_limit(&context, limit, FSCONFIG_CMD_CREATE)?;
    // SAFETY: fsmount takes a descriptor and flags.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 0, 0) })
}

/// Changes how much a file system in memory takes.
fn set_limit(memory: &OwnedFd, limit: u64) -> io::Result<()> {
    // SAFETY: fspick takes a descriptor, a C string and flags.
    let context =
        unsafe { libc::syscall(libc::SYS_fspick, memory.as_raw_fd(), c"".as_ptr(), FSPICK_EMPTY_PATH) };
    configure_limit(&owned(context)?, limit, FSCONFIG_CMD_RECONFIGURE)
}

fn configure_limit(context: &OwnedFd, limit: u64, then: u32) -> io::Result<()> {
    let size = CString::new(limit.to_string()).expect("digits hold no zero byte");
    let set = |command: u32, key: Option<&CStr>, value: Option<&CStr>| {
        let [key, value] = [key, value].map(|text| text.map_or(std::ptr::null(), CStr::as_ptr));
        // SAFETY: the descriptor is open; key and value are C strings that outlive the call, or null.
        let result =
            unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    set(FSCONFIG_SET_STRING, Some(c"size"), Some(&size))?;
    set(then, None, None)
}

fn used_bytes(memory: &OwnedFd) -> io::Result<u64> {
    // SAFETY: zeroes are a valid statfs, and the call fills it.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open and the result outlives the call.
    if unsafe { libc::fstatfs(memory.as_raw_fd(), &raw mut found) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((found.f_blocks - found.f_bfree) * found.f_bsize as u64)
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
