//! Volumes in memory, sparse, for tests and measurements of the NBD gateway alone.
//!
//! The name of a volume says how it behaves: `slow-*` delays each request by 0 to 3 ms, so that requests end out
//! of order; `faulty-*` fails those that touch its second half; `stuck-*` ends none before it is released or the
//! client is gone; `sent-*` not even then, as what is on its way to a primary.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::volume::request::{BlockReply, BlockRequest, Export, Operation, Segment, Volumes};
use xsan_protocol::error::Code;
use xsan_protocol::ids::VolumeId;

/// What is allocated at once.
const UNIT: u64 = 64 * 1024;

/// What other threads see of a volume.
#[derive(Debug, Default)]
pub struct Shared {
    /// The present size; 0 once the volume is deleted.
    pub size_bytes: AtomicU64,
    /// Opens without their close.
    pub opens: AtomicUsize,
    /// Requests of a stuck or sent volume go on.
    pub released: AtomicBool,
    /// Requests of a stuck or sent volume that were carried out.
    pub carried_out: AtomicUsize,
    /// Bytes of changes that were to be on stable media before they were answered.
    pub fua_bytes: AtomicU64,
    pub flushes: AtomicUsize,
}

struct Volume {
    export: Export,
    shared: Arc<Shared>,
    units: RefCell<HashMap<u64, Box<[u8]>>>,
    slow: bool,
    faulty: bool,
    stuck: bool,
    sent: bool,
}

impl Volume {
    fn new((index, &(name, size_bytes)): (usize, &(&str, u64))) -> Self {
        Self {
            export: Export { volume: VolumeId(index as u32 + 1), name: name.to_owned(), size_bytes },
            shared: Arc::new(Shared { size_bytes: size_bytes.into(), ..Shared::default() }),
            units: RefCell::default(),
            slow: name.starts_with("slow-"),
            faulty: name.starts_with("faulty-"),
            stuck: name.starts_with("stuck-"),
            sent: name.starts_with("sent-"),
        }
    }
}

#[derive(Clone)]
pub struct MemoryVolumes {
    volumes: Rc<Vec<Volume>>,
    pool: &'static BufferPool,
    requests: Rc<Cell<u64>>,
}

impl MemoryVolumes {
    /// Volumes of these names and sizes, and what other threads see of each.
    pub fn new(pool: &'static BufferPool, volumes: &[(&str, u64)]) -> (Self, Vec<Arc<Shared>>) {
        let volumes: Vec<Volume> = volumes.iter().enumerate().map(Volume::new).collect();
        let shared = volumes.iter().map(|volume| Arc::clone(&volume.shared)).collect();
        (Self { volumes: Rc::new(volumes), pool, requests: Rc::default() }, shared)
    }

    fn volume(&self, id: VolumeId) -> &Volume {
        &self.volumes[id.0 as usize - 1]
    }

    async fn read(&self, volume: &Volume, offset: u64, length: u64) -> Vec<Segment> {
        let is_data = |(unit, _, _): (u64, usize, usize)| volume.units.borrow().contains_key(&unit);
        if !parts(offset, length).any(is_data) {
            return vec![Segment::Zero(length as u32)];
        }
        // One buffer for all: a request that holds some while it waits for more could wait for its like.
        let mut buffer = loop {
            match self.pool.alloc(length as usize) {
                Some(buffer) => break buffer,
                None => monoio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        let units = volume.units.borrow();
        for (unit, begin, length, at) in places(offset, length) {
            match units.get(&unit) {
                Some(data) => buffer[at..at + length].copy_from_slice(&data[begin..begin + length]),
                None => buffer[at..at + length].fill(0),
            }
        }
        let buffer = buffer.freeze();
        let segment = |(unit, _, length, at): (u64, usize, usize, usize)| match units.contains_key(&unit) {
            true => Segment::Data(buffer.slice(at..at + length)),
            false => Segment::Zero(length as u32),
        };
        places(offset, length).map(segment).collect()
    }

    fn write(volume: &Volume, offset: u64, data: &[u8]) {
        let mut units = volume.units.borrow_mut();
        let mut rest = data;
        for (unit, begin, length) in parts(offset, data.len() as u64) {
            let target = units.entry(unit).or_insert_with(|| vec![0; UNIT as usize].into());
            let (part, behind) = rest.split_at(length);
            target[begin..begin + length].copy_from_slice(part);
            rest = behind;
        }
    }

    fn zero(volume: &Volume, offset: u64, length: u64) {
        let mut units = volume.units.borrow_mut();
        for (unit, begin, length) in parts(offset, length) {
            if length == UNIT as usize {
                units.remove(&unit);
            } else if let Some(data) = units.get_mut(&unit) {
                data[begin..begin + length].fill(0);
            }
        }
    }

    async fn carry_out(&self, request: &BlockRequest) -> Result<BlockReply, Code> {
        let volume = self.volume(request.volume);
        let (offset, length) = (request.offset, request.length);
        assert!(volume.shared.opens.load(Ordering::Relaxed) > 0, "requests come between open and close");
        assert!(offset.is_multiple_of(512) && length.is_multiple_of(512));
        if volume.faulty && offset + length > volume.export.size_bytes / 2 {
            let writes = matches!(request.operation, Operation::Write { .. });
            return Err(if writes { Code::StorageFull } else { Code::Timeout });
        }
        if let Operation::Write { fua, .. } | Operation::WriteZeroes { fua, .. } | Operation::Trim { fua } =
            request.operation
        {
            volume.shared.fua_bytes.fetch_add(if fua { length } else { 0 }, Ordering::Relaxed);
        }
        match &request.operation {
            Operation::Read => return Ok(BlockReply::Data(self.read(volume, offset, length).await)),
            Operation::Write { data, .. } => {
                assert_eq!(data.len() as u64, length);
                assert_eq!(data.as_ptr() as u64 % 4096, offset % 4096, "whole pages are aligned");
                Self::write(volume, offset, data);
            }
            Operation::WriteZeroes { no_hole: true, .. } => {
                Self::write(volume, offset, &vec![0; length as usize]);
            }
            Operation::WriteZeroes { .. } | Operation::Trim { .. } => Self::zero(volume, offset, length),
            Operation::Flush => {
                assert_eq!((offset, length), (0, 0));
                volume.shared.flushes.fetch_add(1, Ordering::Relaxed);
            }
            Operation::BlockStatus { extents_max } => {
                let units = volume.units.borrow();
                let mut extents: Vec<(u64, bool)> = Vec::new();
                for (unit, _, length) in parts(offset, length) {
                    match (extents.last_mut(), units.contains_key(&unit)) {
                        (Some((bytes, last)), held) if *last == held => *bytes += length as u64,
                        (_, held) => extents.push((length as u64, held)),
                    }
                }
                extents.truncate(*extents_max);
                return Ok(BlockReply::Extents(extents));
            }
        }
        Ok(BlockReply::Done)
    }
}

/// The parts of a range by unit: unit, first byte in it, length.
fn parts(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = offset + length;
    let units = offset / UNIT..end.div_ceil(UNIT);
    units.map(move |unit| {
        let (from, to) = (offset.max(unit * UNIT), end.min((unit + 1) * UNIT));
        (unit, (from - unit * UNIT) as usize, (to - from) as usize)
    })
}

/// As `parts`, with where each begins in the range.
fn places(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    parts(offset, length).scan(0, |at, (unit, begin, length)| {
        *at += length;
        Some((unit, begin, length, *at - length))
    })
}

impl Volumes for MemoryVolumes {
    fn exports(&self) -> Vec<Export> {
        let present = |volume: &Volume| Export {
            size_bytes: volume.shared.size_bytes.load(Ordering::Relaxed),
            ..volume.export.clone()
        };
        self.volumes.iter().map(present).collect()
    }

    async fn open(&self, name: &str) -> Result<Export, Code> {
        let export = self.exports().into_iter().find(|export| export.name == name);
        let export = export.ok_or(Code::VolumeNotFound)?;
        self.volume(export.volume).shared.opens.fetch_add(1, Ordering::Relaxed);
        Ok(export)
    }

    fn close(&self, volume: VolumeId) {
        let before = self.volume(volume).shared.opens.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "every close is of an open");
    }

    fn size_bytes(&self, volume: VolumeId) -> Option<u64> {
        let size_bytes = self.volume(volume).shared.size_bytes.load(Ordering::Relaxed);
        (size_bytes > 0).then_some(size_bytes)
    }

    async fn submit(&self, request: BlockRequest) -> Result<BlockReply, Code> {
        self.requests.set(self.requests.get() + 1);
        let volume = self.volume(request.volume);
        if volume.slow {
            monoio::time::sleep(Duration::from_millis(self.requests.get() * 7 % 4)).await;
        }
        if volume.stuck || volume.sent {
            while !volume.shared.released.load(Ordering::Relaxed) {
                if volume.stuck && request.client.is_gone() {
                    return Err(Code::ClientGone);
                }
                monoio::time::sleep(Duration::from_millis(1)).await;
            }
            volume.shared.carried_out.fetch_add(1, Ordering::Relaxed);
        }
        self.carry_out(&request).await
    }
}
