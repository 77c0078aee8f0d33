//! The device ring of one shard: carries out [`DiskAction`]s with io_uring.
//!
//! A second ring beside the runtime's, because that one has neither registered buffers nor registered files.
//! The shard queues actions during its turn, enters the kernel once at the turn's end
//! (`flush_submissions`), and is woken for completions through an eventfd that a task of its runtime awaits.
//! Knows devices by their slot number; no store, no format.
//!
//! Invariants
//! - The ring owns every buffer of an operation until the kernel has completed it.
//! - Every action ends in exactly one completion; a transfer that moved only part goes on with the rest, and
//!   one that moves nothing is an error.
//! - At most `depth` operations are at the kernel, half of its completion queue: completions never overflow.
//!
//! COOP_TASKRUN and not DEFER_TASKRUN: completions are posted whenever this thread enters the kernel, which
//! it does for its sockets anyway, so taking them needs no system call of its own.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use xsan_protocol::error::Code;
use xsan_protocol::units::PAGE_SIZE;

use crate::disk::buffers::{Buffer, BufferMut, BufferPool};
use crate::disk::device::FileDevice;
use crate::disk::eventfd::EventFd;
use crate::disk::monoio_buffers::VECTORS_PER_WRITE_MAX as IOV_MAX;
use crate::disk::os;
use crate::io::{Device, DiskAction, DiskCompletion, DiskError, DiskOk};

/// Largest single registration the kernel takes; a larger arena is registered in several.
const REGISTRATION_BYTES_MAX: usize = 1 << 30;

#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("io_uring is not available: {source}; it needs Linux 5.19 and kernel.io_uring_disabled = 0")]
    Unavailable { source: io::Error },
    #[error(
        "{bytes} bytes could not be registered with io_uring: {source}; the memlock limit is {limit} bytes: \
         set LimitMEMLOCK=infinity in the unit of the service, or lower dataplane.memory"
    )]
    Memory { bytes: usize, limit: u64, source: io::Error },
    #[error("the devices could not be registered with io_uring: {source}")]
    Devices { source: io::Error },
    #[error("io_uring refused submissions: {source}")]
    Submit { source: io::Error },
}

impl RingError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Memory { .. } => Code::MemoryShort,
            Self::Unavailable { .. } => Code::Unsupported,
            Self::Devices { .. } => Code::DeviceUnusable,
            Self::Submit { .. } => Code::Internal,
        }
    }
}

/// What an operation transfers, and owns until it is completed.
enum Work {
    Read(BufferMut),
    Write {
        /// Holds the memory that `iovecs` name.
        _parts: Vec<Buffer>,
        /// What is left to write.
        iovecs: Box<[libc::iovec]>,
        /// Whole iovecs done.
        next: usize,
        /// Registration that holds all the parts, if one does.
        registration: Option<u16>,
    },
    Flush,
}

struct Operation {
    device: usize,
    id: u64,
    submitted_ns: u64,
    /// Device offset and bytes of the whole operation; both 0 for a flush.
    offset: u64,
    length: usize,
    done: usize,
    work: Work,
}

/// What has completed, on the device in which slot, and after how long.
#[derive(Debug)]
pub struct Completed {
    pub slot: usize,
    pub took_ns: u64,
    pub completion: DiskCompletion,
}

/// How many of what the ring has carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingCounters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub failures: u64,
    /// Entries into the kernel.
    pub enters: u64,
}

/// One registered part of an arena.
struct Registration {
    start: usize,
    end: usize,
}

pub struct DiskRing {
    ring: IoUring,
    eventfd: EventFd,
    depth: usize,
    device_bytes: Vec<u64>,
    registrations: Vec<Registration>,
    has_writev_fixed: bool,
    /// By index, which is the `user_data` of an operation's entry.
    operations: Vec<Option<Operation>>,
    free: Vec<u32>,
    /// Operations for which the kernel has no room yet, in order.
    backlog: VecDeque<u32>,
    /// Entries that are pushed or at the kernel.
    in_kernel: usize,
    counters: RingCounters,
}

impl DiskRing {
    /// A ring for `devices`, which actions name by their place in the list. Buffers of `pools` take the
    /// registered path; those of other pools work, at the price of pinning their pages each time.
    ///
    /// Called on the thread that submits.
    ///
    /// # Errors
    /// 11 `MemoryShort`: the memlock limit; 7 `Unsupported`: no io_uring; 209 `DeviceUnusable`.
    pub fn new(
        devices: &[&FileDevice],
        pools: &[&'static BufferPool],
        depth: u32,
    ) -> Result<Self, RingError> {
        let unavailable = |source| RingError::Unavailable { source };
        let depth = depth.next_power_of_two();
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_single_issuer()
            .setup_submit_all()
            .setup_cqsize(depth * 2)
            .build(depth)
            .or_else(|error| match error.raw_os_error() {
                // A kernel before 6.0 has no SINGLE_ISSUER.
                Some(libc::EINVAL) => IoUring::builder().setup_cqsize(depth * 2).build(depth),
                _ => Err(error),
            })
            .map_err(unavailable)?;
        let eventfd = EventFd::new().map_err(unavailable)?;
        ring.submitter().register_eventfd(eventfd.as_raw_fd()).map_err(unavailable)?;
        let fds: Vec<RawFd> = devices.iter().map(|device| device.as_raw_fd()).collect();
        // A shard may have no store; the kernel takes no empty list.
        if !fds.is_empty() {
            ring.submitter().register_files(&fds).map_err(|source| RingError::Devices { source })?;
        }
        let registrations = register_arenas(&ring, pools)?;
        let mut probe = Probe::new();
        let probed = ring.submitter().register_probe(&mut probe).is_ok();
        Ok(Self {
            ring,
            eventfd,
            depth: depth as usize,
            device_bytes: devices.iter().map(|device| device.size_bytes()).collect(),
            registrations,
            has_writev_fixed: probed && probe.is_supported(opcode::WritevFixed::CODE),
            operations: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            in_kernel: 0,
            counters: RingCounters::default(),
        })
    }

    /// Signalled when completions are there; for one waiting task.
    pub fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    /// Operations that were submitted and are not completed.
    pub fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }

    pub fn counters(&self) -> RingCounters {
        self.counters
    }

    /// Queues `action` for the device at `device`; the kernel sees it at `flush_submissions`.
    ///
    /// # Panics
    /// Not whole pages, past the end of the device, or no such device: our bug.
    pub fn submit(&mut self, device: usize, action: DiskAction) {
        let (id, offset, length, work) = match action {
            DiskAction::Read { id, offset, buffer, .. } => (id, offset, buffer.len(), Work::Read(buffer)),
            DiskAction::Write { id, offset, parts, .. } => {
                let (work, length) = self.write_work(parts);
                (id, offset, length, work)
            }
            DiskAction::Flush { id, .. } => {
                assert!(device < self.device_bytes.len());
                (id, 0, 0, Work::Flush)
            }
        };
        let submitted_ns = os::boottime_ns();
        let operation = Operation { device, id, submitted_ns, offset, length, done: 0, work };
        if !matches!(operation.work, Work::Flush) {
            assert!(operation.offset.is_multiple_of(PAGE_SIZE as u64));
            assert!(operation.length > 0 && operation.length.is_multiple_of(PAGE_SIZE));
            let end = operation.offset + operation.length as u64;
            assert!(end <= self.device_bytes[device], "{end} is past the end of device {device}");
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.operations.push(None);
            u32::try_from(self.operations.len() - 1).expect("memory ends before 2^32 operations")
        });
        self.operations[index as usize] = Some(operation);
        self.backlog.push_back(index);
    }

    /// Hands everything queued to the kernel, as far as `depth` allows, with one system call; none when there
    /// is nothing to hand over. What is left goes with a later turn: completions are due before.
    ///
    /// # Errors
    /// The ring is broken; operations in flight may never complete.
    pub fn flush_submissions(&mut self) -> Result<(), RingError> {
        while self.in_kernel < self.depth {
            let Some(index) = self.backlog.pop_front() else { break };
            let entry = self.entry(index);
            // SAFETY: the memory that the entry names is owned by the operation, which stays in `operations`
            // until its completion is taken; the iovecs are boxed and change only then.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            pushed.expect("the queue has `depth` entries, and fewer are at the kernel");
            self.in_kernel += 1;
        }
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enter()
    }

    /// Appends what has completed to `out`. Does not enter the kernel.
    pub fn completions(&mut self, out: &mut Vec<Completed>) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { break };
            self.in_kernel -= 1;
            let index = u32::try_from(entry.user_data()).expect("user_data is an index of ours");
            if let Some(completed) = self.on_result(index, entry.result()) {
                out.push(completed);
            }
        }
    }

    /// Waits until everything submitted has completed.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn drain(&mut self, out: &mut Vec<Completed>) -> Result<(), RingError> {
        while self.in_flight() > 0 {
            self.flush_submissions()?;
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(RingError::Submit { source }),
            }
            self.completions(out);
        }
        Ok(())
    }

    fn enter(&mut self) -> Result<(), RingError> {
        self.counters.enters += 1;
        loop {
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    // EAGAIN, EBUSY: the kernel is out of request memory for the moment.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(RingError::Submit { source: error }),
                },
            }
        }
    }

    /// The registration that holds all of `length` bytes at `start`.
    fn registration(&self, start: *const u8, length: usize) -> Option<u16> {
        let (start, end) = (start as usize, start as usize + length);
        let found = self.registrations.iter().position(|part| part.start <= start && end <= part.end);
        found.map(|index| index as u16)
    }

    fn write_work(&self, parts: Vec<Buffer>) -> (Work, usize) {
        let mut iovecs: Vec<libc::iovec> = Vec::with_capacity(parts.len());
        let mut length = 0;
        let mut registrations = parts.first().and_then(|part| self.registration(part.as_ptr(), part.len()));
        for part in &parts {
            assert!(
                part.len().is_multiple_of(PAGE_SIZE) && (part.as_ptr() as usize).is_multiple_of(PAGE_SIZE)
            );
            length += part.len();
            if self.registration(part.as_ptr(), part.len()) != registrations {
                registrations = None;
            }
            match iovecs.last_mut() {
                // Neighbours in the arena become one transfer.
                Some(last) if last.iov_base as usize + last.iov_len == part.as_ptr() as usize => {
                    last.iov_len += part.len();
                }
                _ => iovecs
                    .push(libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }),
            }
        }
        let iovecs = iovecs.into_boxed_slice();
        (Work::Write { _parts: parts, iovecs, next: 0, registration: registrations }, length)
    }

    /// The entry for what is left of an operation.
    fn entry(&mut self, index: u32) -> squeue::Entry {
        let operation = self.operations[index as usize].as_mut().expect("it is in flight");
        let file = types::Fixed(operation.device as u32);
        let offset = operation.offset + operation.done as u64;
        let entry = match &mut operation.work {
            Work::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Read(buffer) => {
                let rest = &mut buffer[operation.done..];
                let (start, length) = (rest.as_mut_ptr(), rest.len());
                match self.registration(start, length) {
                    Some(registration) => opcode::ReadFixed::new(file, start, length as u32, registration)
                        .offset(offset)
                        .build(),
                    None => opcode::Read::new(file, start, length as u32).offset(offset).build(),
                }
            }
            Work::Write { iovecs, next, registration, .. } => {
                let rest = &iovecs[*next..];
                let count = rest.len().min(IOV_MAX) as u32;
                let (start, length) = (rest[0].iov_base.cast::<u8>().cast_const(), rest[0].iov_len as u32);
                match (rest.len(), *registration) {
                    (1, Some(index)) => {
                        opcode::WriteFixed::new(file, start, length, index).offset(offset).build()
                    }
                    (1, None) => opcode::Write::new(file, start, length).offset(offset).build(),
                    (_, Some(index)) if self.has_writev_fixed => {
                        opcode::WritevFixed::new(file, rest.as_ptr(), count, index).offset(offset).build()
                    }
                    _ => opcode::Writev::new(file, rest.as_ptr(), count).offset(offset).build(),
                }
            }
        };
        entry.user_data(u64::from(index))
    }

    /// Ends the operation, or queues the rest of it.
    fn on_result(&mut self, index: u32, result: i32) -> Option<Completed> {
        let operation = self.operations[index as usize].as_mut().expect("it is in flight");
        let is_flush = matches!(operation.work, Work::Flush);
        let failed = match result {
            _ if result == -libc::EINTR || result == -libc::EAGAIN => {
                self.backlog.push_back(index);
                return None;
            }
            ..0 => Some(-result),
            // The device ended early, or the transfer stopped within a page: O_DIRECT can not go on from there.
            _ if !is_flush && (result == 0 || !(result as usize).is_multiple_of(PAGE_SIZE)) => {
                Some(libc::EIO)
            }
            moved if !is_flush => {
                operation.done += moved as usize;
                assert!(operation.done <= operation.length);
                if let Work::Write { iovecs, next, .. } = &mut operation.work {
                    *next += advance(&mut iovecs[*next..], moved as usize);
                }
                if operation.done < operation.length {
                    self.backlog.push_back(index);
                    return None;
                }
                None
            }
            _ => None,
        };
        let operation = self.operations[index as usize].take().expect("looked at above");
        self.free.push(index);
        let length = operation.length as u64;
        let result = match (failed, operation.work) {
            (Some(errno), _) => {
                self.counters.failures += 1;
                Err(DiskError { errno })
            }
            (None, Work::Read(buffer)) => {
                self.counters.reads += 1;
                self.counters.read_bytes += length;
                Ok(DiskOk::Read(buffer))
            }
            (None, Work::Write { .. }) => {
                self.counters.writes += 1;
                self.counters.written_bytes += length;
                Ok(DiskOk::Written)
            }
            (None, Work::Flush) => {
                self.counters.flushes += 1;
                Ok(DiskOk::Flushed)
            }
        };
        let took_ns = os::boottime_ns().saturating_sub(operation.submitted_ns);
        let completion = DiskCompletion { id: operation.id, result };
        Some(Completed { slot: operation.device, took_ns, completion })
    }
}

impl Drop for DiskRing {
    fn drop(&mut self) {
        // The kernel may still write into buffers that would return to the pool.
        if self.drain(&mut Vec::new()).is_err() {
            std::mem::take(&mut self.operations).into_iter().for_each(std::mem::forget);
        }
    }
}

fn register_arenas(ring: &IoUring, pools: &[&'static BufferPool]) -> Result<Vec<Registration>, RingError> {
    let mut registrations = Vec::new();
    for (base, bytes) in pools.iter().map(|pool| pool.arena()) {
        for skip in (0..bytes).step_by(REGISTRATION_BYTES_MAX) {
            let start = base as usize + skip;
            registrations
                .push(Registration { start, end: start + (bytes - skip).min(REGISTRATION_BYTES_MAX) });
        }
    }
    if registrations.is_empty() {
        return Ok(registrations);
    }
    let iovecs: Vec<libc::iovec> = registrations
        .iter()
        .map(|part| libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(part.start),
            iov_len: part.end - part.start,
        })
        .collect();
    let bytes = iovecs.iter().map(|iovec| iovec.iov_len).sum();
    // SAFETY: arenas are never unmapped, so the kernel's view of them stays good.
    let registered = unsafe { ring.submitter().register_buffers(&iovecs) };
    registered.map_err(|source| RingError::Memory { bytes, limit: os::memlock_limit(), source })?;
    Ok(registrations)
}

/// Takes `count` transferred bytes off the front of `iovecs`: the number of iovecs that are done whole.
///
/// # Panics
/// More was transferred than the list holds.
fn advance(iovecs: &mut [libc::iovec], mut count: usize) -> usize {
    let mut done = 0;
    while count > 0 {
        let first = &mut iovecs[done];
        let taken = count.min(first.iov_len);
        first.iov_base = first.iov_base.cast::<u8>().wrapping_add(taken).cast();
        first.iov_len -= taken;
        count -= taken;
        if first.iov_len == 0 {
            done += 1;
        }
    }
    done
}

#[cfg(test)]
mod tests;
