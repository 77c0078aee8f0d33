//! The one request that every gateway makes of a volume, and its answer.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

use xsan_protocol::error::Code;
use xsan_protocol::ids::VolumeId;

use crate::disk::buffers::Buffer;

/// A write-zeroes that keeps its space is written, from one buffer that needs no room; but so many bytes of it, in so many parts,
/// are on their way at once, and in the buffers of others.
pub const ZEROES_BYTES: usize = 128 * 1024;
pub const ZEROES_PARTS_MAX: usize = 4;

/// A request of one volume: at most `FRAME_DATA_MAX` bytes for reads and writes, any length for the others.
#[derive(Clone, Debug)]
pub struct BlockRequest {
    pub volume: VolumeId,
    /// Byte offset in the volume, a multiple of the sector size, as is `length`.
    pub offset: u64,
    pub length: u64,
    pub operation: Operation,
    pub client: Client,
}

/// Who waits for answers; all requests of one connection share it.
#[derive(Clone, Debug, Default)]
pub struct Client(Rc<Cell<bool>>);

impl Client {
    /// From now on nobody waits: of its requests nothing more is sent, and they end when what was sent has. The client
    /// may have come back elsewhere, and must not be overtaken by its past.
    pub fn leave(&self) {
        self.0.set(true);
    }

    pub fn is_gone(&self) -> bool {
        self.0.get()
    }
}

#[derive(Clone, Debug)]
pub enum Operation {
    Read,
    /// `data` is `length` bytes, placed so that its address and the request's offset are equal modulo the page
    /// size: whole pages go to devices without a copy.
    Write {
        data: Buffer,
        fua: bool,
    },
    WriteZeroes {
        fua: bool,
        /// The range keeps or gets its space, so that a later write there does not fail for want of it.
        no_hole: bool,
    },
    Trim {
        fua: bool,
    },
    /// Of the whole volume; `offset` and `length` are 0.
    Flush,
    /// Which parts hold data, from the start of the range on.
    BlockStatus {
        extents_max: usize,
    },
}

#[derive(Clone, Debug)]
pub enum BlockReply {
    Done,
    /// The bytes asked for, in order.
    Data(Vec<Segment>),
    /// Extents in order, from the start of the range: length in bytes, and whether it holds data. They cover the range
    /// unless there are `extents_max`; neighbours differ.
    Extents(Vec<(u64, bool)>),
}

#[derive(Clone, Debug)]
pub enum Segment {
    Data(Buffer),
    /// That many bytes of zeroes, which are not stored.
    Zero(u32),
}

/// What a client sees of a volume before and after it opens it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub volume: VolumeId,
    pub name: String,
    pub size_bytes: u64,
}

/// The volumes of the cluster as a gateway sees them: implemented by `volume`, and by tests of gateways.
pub trait Volumes: Clone + 'static {
    fn exports(&self) -> Vec<Export>;

    /// Attaches the volume to this node; every open is paired with one `close`.
    ///
    /// # Errors
    /// 304 `VolumeNotFound`, 104 `NoQuorum`, 5 `Timeout`.
    fn open(&self, name: &str) -> impl Future<Output = Result<Export, Code>>;

    fn close(&self, volume: VolumeId);

    /// The volume's present size, which may have grown since it was opened; `None` once it is deleted.
    fn size_bytes(&self, volume: VolumeId) -> Option<u64>;

    /// Carries out one request; any number may be under way, in no promised order among themselves.
    ///
    /// # Errors
    /// 202 `StorageFull`, 303 `OutOfRange`, 304 `VolumeNotFound`, 312 `ClientGone`, 5 `Timeout`.
    fn submit(&self, request: BlockRequest) -> impl Future<Output = Result<BlockReply, Code>>;
}
