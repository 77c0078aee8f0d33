//! A device of a store: a block device, or a file preallocated to a size.
//!
//! Opened once at start, before the shard serves: format and recovery use it through [`Device`], then
//! `disk::ring` registers it. Knows no store.
//!
//! Invariants
//! - All I/O is O_DIRECT: what a write reports is what the device said.
//! - The device is locked for as long as any descriptor of this opening lives. A killed process's lock goes
//!   only when the kernel has ended its last operation in flight, so a successor that got the lock never
//!   meets a write of its predecessor.
//! - A file has its full size from the moment it has its name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use xsan_protocol::error::Code;
use xsan_protocol::units::PAGE_SIZE;

use crate::disk::os;
use crate::io::Device;

/// How long to wait for the lock: a killed predecessor's writes end within this on any device that works.
pub const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Bytes that unaligned slices are copied through at a time.
const BOUNCE_BYTES: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is neither a block device nor a file")]
    NotADevice { path: PathBuf },
    #[error(
        "{path}: the file system does not take O_DIRECT for it; use a plain file on ext4 (not data=journal) or XFS, or a block device"
    )]
    NotDirect { path: PathBuf },
    #[error("{path} needs I/O aligned to {needed} bytes, more than a page")]
    Alignment { path: PathBuf, needed: u32 },
    #[error("{path} is in use: it is mounted, or another process still holds it after {waited:?}")]
    Locked { path: PathBuf, waited: Duration },
    #[error("{path}: a file of {bytes} bytes can not be allocated: {source}")]
    Allocate { path: PathBuf, bytes: u64, source: io::Error },
    #[error("{path} has {bytes} bytes, a store needs at least {minimum}")]
    TooSmall { path: PathBuf, bytes: u64, minimum: u64 },
}

impl DeviceError {
    pub const fn code(&self) -> Code {
        match self {
            Self::TooSmall { .. } => Code::DeviceTooSmall,
            _ => Code::DeviceUnusable,
        }
    }
}

/// What to open.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    pub path: PathBuf,
    /// Size of the file to create where nothing is at `path`; `None`: it must exist.
    pub create_bytes: Option<u64>,
    pub minimum_bytes: u64,
    pub lock_wait: Duration,
}

impl DeviceOptions {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), create_bytes: None, minimum_bytes: PAGE_SIZE as u64, lock_wait: LOCK_WAIT }
    }

    #[must_use]
    pub fn create(mut self, bytes: u64) -> Self {
        self.create_bytes = Some(bytes);
        self
    }

    #[must_use]
    pub fn minimum(mut self, bytes: u64) -> Self {
        self.minimum_bytes = bytes;
        self
    }
}

/// An open and locked device.
#[derive(Debug)]
pub struct FileDevice {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    created: bool,
}

impl FileDevice {
    /// Opens and locks the device; blocks for up to `lock_wait` while another process holds it.
    ///
    /// # Errors
    /// 209 `DeviceUnusable`, 207 `DeviceTooSmall`.
    pub fn open(options: &DeviceOptions) -> Result<Self, DeviceError> {
        let path = options.path.clone();
        let deadline = Instant::now() + options.lock_wait;
        let exists = path.try_exists().map_err(|source| DeviceError::Open { path: path.clone(), source })?;
        let minimum = options.minimum_bytes.max(PAGE_SIZE as u64);
        let (mut file, created) = match options.create_bytes {
            Some(bytes) if !exists && bytes < minimum => {
                return Err(DeviceError::TooSmall { path, bytes, minimum });
            }
            Some(bytes) if !exists => (create(&path, bytes, deadline, options.lock_wait)?, true),
            _ => (open_locked(&path, false, deadline, options.lock_wait)?, false),
        };
        if let Some((memory, offset)) = os::direct_alignment(&file) {
            let needed = memory.max(offset);
            if needed == 0 {
                return Err(DeviceError::NotDirect { path });
            }
            if needed as usize > PAGE_SIZE {
                return Err(DeviceError::Alignment { path, needed });
            }
        }
        // The end of a block device is its size, as of a file.
        let end = file.seek(SeekFrom::End(0));
        let end = end.map_err(|source| DeviceError::Open { path: path.clone(), source })?;
        let size_bytes = end - end % PAGE_SIZE as u64;
        if size_bytes < minimum {
            return Err(DeviceError::TooSmall { path, bytes: end, minimum });
        }
        Ok(Self { file, path, size_bytes, created })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Was the file made by this opening (so that it holds nothing)?
    pub fn is_created(&self) -> bool {
        self.created
    }

    fn check_range(&self, offset: u64, length: usize) {
        assert!(offset.is_multiple_of(PAGE_SIZE as u64));
        assert!(length.is_multiple_of(PAGE_SIZE));
        assert!(
            offset + length as u64 <= self.size_bytes,
            "{length} bytes at {offset} pass the device's end"
        );
    }
}

impl AsRawFd for FileDevice {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Device for FileDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len());
        if is_aligned(buffer) {
            return self.file.read_exact_at(buffer, offset);
        }
        let mut bounce = Bounce::new(buffer.len());
        for (index, part) in buffer.chunks_mut(BOUNCE_BYTES).enumerate() {
            let aligned = bounce.aligned(part.len());
            self.file.read_exact_at(aligned, offset + (index * BOUNCE_BYTES) as u64)?;
            part.copy_from_slice(aligned);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len());
        if is_aligned(buffer) {
            return self.file.write_all_at(buffer, offset);
        }
        let mut bounce = Bounce::new(buffer.len());
        for (index, part) in buffer.chunks(BOUNCE_BYTES).enumerate() {
            let aligned = bounce.aligned(part.len());
            aligned.copy_from_slice(part);
            self.file.write_all_at(aligned, offset + (index * BOUNCE_BYTES) as u64)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

fn is_aligned(buffer: &[u8]) -> bool {
    (buffer.as_ptr() as usize).is_multiple_of(PAGE_SIZE)
}

/// Memory with an aligned part, for slices that O_DIRECT does not take.
struct Bounce(Vec<u8>);

impl Bounce {
    fn new(length: usize) -> Self {
        Self(vec![0; length.min(BOUNCE_BYTES) + PAGE_SIZE])
    }

    fn aligned(&mut self, length: usize) -> &mut [u8] {
        let skip = self.0.as_ptr().align_offset(PAGE_SIZE);
        &mut self.0[skip..skip + length]
    }
}

/// Opens and locks what is at `path`, trying again until `deadline` while it is held.
fn open_locked(path: &Path, create: bool, deadline: Instant, wait: Duration) -> Result<File, DeviceError> {
    let open_error = |source| DeviceError::Open { path: path.to_owned(), source };
    loop {
        let is_block = match std::fs::metadata(path) {
            Ok(metadata) if metadata.file_type().is_block_device() => true,
            Ok(metadata) if metadata.is_file() => false,
            Ok(_) => return Err(DeviceError::NotADevice { path: path.to_owned() }),
            Err(error) if create && error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(open_error(error)),
        };
        // O_EXCL on a block device: the kernel refuses one that is mounted or part of another volume.
        let flags = libc::O_DIRECT | if is_block { libc::O_EXCL } else { 0 };
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .custom_flags(flags)
            .open(path);
        match opened {
            Ok(file) => match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(open_error(error)),
            },
            Err(error) if is_block && error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Err(DeviceError::NotDirect { path: path.to_owned() });
            }
            Err(error) => return Err(open_error(error)),
        }
        if Instant::now() >= deadline {
            return Err(DeviceError::Locked { path: path.to_owned(), waited: wait });
        }
        std::thread::sleep(LOCK_RETRY);
    }
}

/// Makes the file under another name and renames it when its space is allocated and on the device: a crash
/// between leaves nothing that looks like a device.
fn create(path: &Path, bytes: u64, deadline: Instant, wait: Duration) -> Result<File, DeviceError> {
    let bytes = bytes - bytes % PAGE_SIZE as u64;
    let error = |source| DeviceError::Allocate { path: path.to_owned(), bytes, source };
    let mut name =
        path.file_name().ok_or_else(|| DeviceError::NotADevice { path: path.to_owned() })?.to_owned();
    name.push(".new");
    let unnamed = path.with_file_name(name);
    let file = open_locked(&unnamed, true, deadline, wait)?;
    // Another process may have finished the file while this one waited for the lock.
    if path.try_exists().map_err(error)? {
        return Err(DeviceError::Locked { path: path.to_owned(), waited: wait });
    }
    let made = file.set_len(0).and_then(|()| os::allocate(&file, bytes)).and_then(|()| file.sync_all());
    if let Err(source) = made {
        // Without this a full file system would stay full of an unusable file.
        let _keeps_first_error = std::fs::remove_file(&unnamed);
        return Err(error(source));
    }
    std::fs::rename(&unnamed, path).map_err(error)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(error)?;
    Ok(file)
}

#[cfg(test)]
mod tests;
