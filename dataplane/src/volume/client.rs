//! The gateways' client: carries out one request on the groups that it touches.

use std::cell::Cell;
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use xsan_protocol::checksum::page_checksums;
use xsan_protocol::error::{Code, Retry};
use xsan_protocol::ids::{BlockKey, Epoch, GroupId, NodeId, PoolId, ShardIndex, VolumeId};
use xsan_protocol::limits::FRAME_DATA_MAX;
use xsan_protocol::map::{ClusterMap, Durability, Pool, Volume};
use xsan_protocol::units::BLOCK_SIZE;

use super::calls::{Answer, Call, Calls, Destination};
use super::request::{
    BlockReply, BlockRequest, Client, Export, Operation as Wanted, Segment, Volumes, ZEROES_BYTES,
    ZEROES_PARTS_MAX,
};
use super::split::{self, Address, ZeroPart};
use crate::disk::buffers::{Buffer, BufferPool};
use crate::replication::{Operation, Reply};
use crate::stats::Stage;
use crate::store::PageData;

/// How long a request is tried before its client sees an error.
pub const IO_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits between tries: short at first, since most fail-overs take milliseconds.
const BACKOFF_FIRST: Duration = Duration::from_millis(2);
const BACKOFF_MAX: Duration = Duration::from_millis(50);

/// Parts of one request that are under way at once: a write-zeroes of a whole volume has thousands.
const PARTS_MAX: usize = 32;

const _: () = assert!(ZEROES_BYTES <= FRAME_DATA_MAX);

/// What `volume` asks of the shard it lives on.
pub trait Port {
    fn map(&self) -> Arc<ClusterMap>;
    /// Sends one operation to a group's primary; the answer completes call `number`.
    fn send(&self, number: u64, to: Target, durability: Durability, operation: Operation);
    /// Has a shard flush every group of the pool that it is primary of; the answer completes call `number`.
    fn send_flush(&self, number: u64, node: NodeId, shard: ShardIndex, pool: PoolId);
    /// Attaches a volume by name, through the control plane.
    fn open(&self, name: &str) -> std::pin::Pin<Box<dyn Future<Output = Result<Volume, Code>>>>;
    fn close(&self, volume: VolumeId);
    fn now_ns(&self) -> u64;
    /// One finished request: its stage and how long it took.
    fn observe(&self, stage: Stage, ns: u64);
}

/// A group's primary by the present map.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub group: GroupId,
    pub epoch: Epoch,
    pub node: NodeId,
    pub shard: ShardIndex,
}

/// One a shard, shared by all its gateway sessions.
#[derive(Clone)]
pub struct VolumeClient {
    port: Rc<dyn Port>,
    calls: Calls,
    /// For all that is zeroed by a write: a request that takes no buffer waits for none.
    zeroes: PageData,
}

/// How a range is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Zeroing {
    /// Space is given back; the partial pages at the ends may stay as they are.
    Trim,
    /// All of it reads as zeroes, and space is given back.
    Hole,
    /// All of it reads as zeroes and has space: what is written there later finds the pool not full.
    Provisioned,
}

/// What every part of one request has in common.
#[derive(Clone)]
struct Context {
    address: Address,
    pool: PoolId,
    group_count: u16,
    durability: Durability,
    deadline_ns: u64,
    client: Client,
}

impl VolumeClient {
    /// # Panics
    /// The pool has no buffer: it is not that of a shard that starts.
    pub fn new(port: Rc<dyn Port>, calls: Calls, pool: &'static BufferPool) -> Self {
        let mut zeroes = pool.alloc(ZEROES_BYTES).expect("the pool of a shard that starts has buffers");
        zeroes.fill(0);
        let checksums = page_checksums(&zeroes);
        Self { port, calls, zeroes: PageData { bytes: zeroes.freeze(), checksums } }
    }

    /// Checks the request against the volume as the map has it now.
    fn admit(&self, request: &BlockRequest) -> Result<Context, Code> {
        let map = self.port.map();
        let volume = map.volumes.get(&request.volume).ok_or(Code::VolumeNotFound)?;
        let end = request.offset.checked_add(request.length).ok_or(Code::OutOfRange)?;
        if end > volume.size_bytes {
            return Err(Code::OutOfRange);
        }
        let pool = &map.pools[&volume.pool];
        Ok(Context {
            address: Address { lineage: volume.lineage, layer: volume.layer },
            pool: pool.id,
            group_count: pool.group_count,
            durability: volume.durability,
            deadline_ns: self.deadline_ns(),
            client: request.client.clone(),
        })
    }

    fn deadline_ns(&self) -> u64 {
        self.port.now_ns() + IO_TIMEOUT.as_nanos() as u64
    }

    /// Sends `operation` to the group's present primary; `None` while it has none.
    fn start(&self, group: GroupId, durability: Durability, operation: Operation) -> Option<Call> {
        let map = self.port.map();
        let (node, shard, epoch) = map.route(group)?;
        let incarnation = map.nodes[&node].data.as_ref()?.incarnation;
        let (number, call) = self.calls.start(Destination { node, incarnation, group: Some(group) });
        self.port.send(number, Target { group, epoch, node, shard }, durability, operation);
        Some(call)
    }

    /// One operation of one group, until it is answered for good, or `failed`: then it is not sent again.
    async fn carry_out(
        &self,
        context: &Context,
        operation: Operation,
        failed: &Cell<Option<Code>>,
    ) -> Result<Reply, Code> {
        let key = operation.key().expect("only operations of blocks are carried out one by one");
        let group = group_of(context, key);
        context.check_client()?;
        let mut backoff = Backoff::new();
        loop {
            if let Some(code) = failed.get() {
                return Err(code);
            }
            let outcome = match self.start(group, context.durability, operation.clone()) {
                Some(call) => call.await,
                None => Err(Code::GroupInactive),
            };
            match outcome {
                Ok(Answer::Reply(reply)) => return Ok(reply),
                Ok(Answer::Flushed(_)) => return Err(Code::FrameInvalid),
                Err(code) => self.pause(&mut backoff, context, code).await?,
            }
        }
    }

    /// Waits before another try, or ends with the code that ends the request.
    async fn pause(&self, backoff: &mut Backoff, context: &Context, code: Code) -> Result<(), Code> {
        if code.retry() == Retry::Never {
            return Err(code);
        }
        if self.port.now_ns() < context.deadline_ns {
            monoio::time::sleep(backoff.next()).await;
            if self.port.now_ns() < context.deadline_ns {
                return context.check_client();
            }
        }
        tracing::warn!(cause = %code, seconds = IO_TIMEOUT.as_secs(), "a request got no answer in time");
        Err(Code::Timeout)
    }

    /// All of `operations`, up to `parts_max` at once; their replies in order, or the error that came first.
    ///
    /// Ends when the last part that was sent has, also after an error: what the client writes next must not be
    /// overtaken by a part of this request (docs/decisions/0010). Each part has the time limit of a request.
    async fn carry_out_all(
        &self,
        context: &Context,
        operations: impl IntoIterator<Item = Operation>,
        parts_max: usize,
    ) -> Result<Vec<Reply>, Code> {
        let failed = Rc::new(Cell::new(None));
        let mut replies = Vec::new();
        let mut under_way = VecDeque::with_capacity(2);
        let mut operations = operations.into_iter();
        loop {
            while under_way.len() < parts_max
                && failed.get().is_none()
                && let Some(operation) = operations.next()
            {
                let (this, failed) = (self.clone(), failed.clone());
                let context = Context { deadline_ns: self.deadline_ns(), ..context.clone() };
                under_way.push_back(monoio::spawn(async move {
                    let result = this.carry_out(&context, operation, &failed).await;
                    failed.set(failed.get().or(result.as_ref().err().copied()));
                    result
                }));
            }
            match under_way.pop_front() {
                Some(part) => replies.extend(part.await.ok()),
                None => return failed.get().map_or(Ok(replies), Err),
            }
        }
    }

    /// The only part of a request.
    async fn carry_out_one(&self, context: &Context, operation: Operation) -> Result<Reply, Code> {
        self.carry_out(context, operation, &Cell::new(None)).await
    }

    async fn read(&self, context: &Context, offset: u64, length: u64) -> Result<BlockReply, Code> {
        let parts = split::read(context.address, offset, length);
        let operations = parts.iter().map(|part| Operation::Read { key: part.key, pages: part.pages });
        let replies = match &parts[..] {
            [part] => {
                vec![self.carry_out_one(context, Operation::Read { key: part.key, pages: part.pages }).await?]
            }
            _ => self.carry_out_all(context, operations, PARTS_MAX).await?,
        };
        let mut segments = Vec::with_capacity(parts.len());
        for (part, reply) in parts.iter().zip(replies) {
            let (skip, length) = (part.skip as usize, part.length as usize);
            segments.push(match reply {
                Reply::Data(None) => Segment::Zero(part.length),
                Reply::Data(Some(data)) if data.bytes.len() == part.pages.bytes() => {
                    Segment::Data(data.bytes.slice(skip..skip + length))
                }
                _ => return Err(Code::FrameInvalid),
            });
        }
        Ok(BlockReply::Data(segments))
    }

    async fn write(
        &self,
        context: &Context,
        offset: u64,
        data: Buffer,
        fua: bool,
    ) -> Result<BlockReply, Code> {
        let mut parts = split::write(context.address, offset, &data, fua);
        if parts.len() == 1 {
            self.carry_out_one(context, parts.remove(0)).await?;
        } else {
            self.carry_out_all(context, parts, PARTS_MAX).await?;
        }
        Ok(BlockReply::Done)
    }

    async fn zero(
        &self,
        context: &Context,
        (offset, length): (u64, u64),
        zeroing: Zeroing,
        fua: bool,
    ) -> Result<BlockReply, Code> {
        let (span_max, parts_max) = match zeroing {
            Zeroing::Provisioned => (ZEROES_BYTES, ZEROES_PARTS_MAX),
            Zeroing::Hole | Zeroing::Trim => (BLOCK_SIZE, PARTS_MAX),
        };
        let parts = split::zero(context.address, offset, length, span_max as u64);
        let operations = parts.filter_map(|part| match part {
            ZeroPart::Pages { key, pages } if zeroing == Zeroing::Provisioned => {
                let checksums = self.zeroes.checksums[..usize::from(pages.count)].into();
                let data = PageData { bytes: self.zeroes.bytes.slice(0..pages.bytes()), checksums };
                Some(Operation::Write { key, pages, data, fua })
            }
            ZeroPart::Pages { key, pages } => Some(Operation::Zero { key, pages, fua }),
            ZeroPart::Sectors { .. } if zeroing == Zeroing::Trim => None,
            ZeroPart::Sectors { key, offset, length } => {
                let bytes = self.zeroes.bytes.slice(0..length as usize);
                Some(Operation::WriteSectors { key, offset, bytes, fua })
            }
        });
        self.carry_out_all(context, operations, parts_max).await?;
        Ok(BlockReply::Done)
    }

    /// Extents from `offset` on, at most `extents_max`, neighbours of one kind joined.
    async fn extents(
        &self,
        context: &Context,
        (offset, length): (u64, u64),
        extents_max: usize,
    ) -> Result<BlockReply, Code> {
        let parts = split::cover(context.address, offset, length);
        let operations = parts.iter().map(|part| Operation::BlockStatus { key: part.key, pages: part.pages });
        let replies = self.carry_out_all(context, operations, PARTS_MAX).await?;
        let mut extents: Vec<(u64, bool)> = Vec::new();
        for (part, reply) in parts.iter().zip(replies) {
            let Reply::Status(held) = reply else { return Err(Code::FrameInvalid) };
            if held.len() != usize::from(part.pages.count) {
                return Err(Code::FrameInvalid);
            }
            for (index, held) in held.into_iter().enumerate() {
                let bytes = part.bytes_of_page(index);
                let count = extents.len();
                match extents.last_mut() {
                    Some((length, last)) if *last == held => *length += bytes,
                    _ if count == extents_max => return Ok(BlockReply::Extents(extents)),
                    _ => extents.push((bytes, held)),
                }
            }
        }
        Ok(BlockReply::Extents(extents))
    }

    /// Flushes every group of the volume's pool: each primary covers its own, and those not covered are asked again.
    async fn flush(&self, context: &Context) -> Result<BlockReply, Code> {
        let group = |index| GroupId::new(context.pool, index);
        let mut missing: HashSet<GroupId> = (0..context.group_count).map(group).collect();
        let mut backoff = Backoff::new();
        loop {
            let map = self.port.map();
            let shards: BTreeSet<_> = missing
                .iter()
                .filter_map(|group| map.route(*group))
                .map(|(node, shard, _)| (node, shard))
                .collect();
            let calls: Vec<Call> = shards
                .into_iter()
                .filter_map(|(node, shard)| {
                    let incarnation = map.nodes[&node].data.as_ref()?.incarnation;
                    let (number, call) = self.calls.start(Destination { node, incarnation, group: None });
                    self.port.send_flush(number, node, shard, context.pool);
                    Some(call)
                })
                .collect();
            let mut refusal = Code::GroupInactive;
            for call in calls {
                match call.await {
                    Ok(Answer::Flushed(covered)) => covered.iter().for_each(|group| {
                        missing.remove(group);
                    }),
                    Ok(Answer::Reply(_)) => return Err(Code::FrameInvalid),
                    Err(code) => refusal = code,
                }
            }
            if missing.is_empty() {
                return Ok(BlockReply::Done);
            }
            self.pause(&mut backoff, context, refusal).await?;
        }
    }

    /// Flushes every group of `pool` that this shard is primary of: the answer to another shard's flush.
    pub async fn flush_own(&self, pool: PoolId, own: (NodeId, ShardIndex)) -> Vec<GroupId> {
        let map = self.port.map();
        let Some(groups) = map.pools.get(&pool).map(Pool::groups) else { return Vec::new() };
        let mine = |group: &GroupId| map.route(*group).is_some_and(|(node, shard, _)| (node, shard) == own);
        let calls: Vec<_> = groups
            .filter(mine)
            .filter_map(|group| Some((group, self.start(group, Durability::OnFlush, Operation::Flush)?)))
            .collect();
        let mut covered = Vec::with_capacity(calls.len());
        for (group, call) in calls {
            if call.await.is_ok() {
                covered.push(group);
            }
        }
        covered
    }
}

impl Context {
    /// # Errors
    /// 312 `ClientGone`: nothing more may be sent.
    fn check_client(&self) -> Result<(), Code> {
        if self.client.is_gone() { Err(Code::ClientGone) } else { Ok(()) }
    }
}

/// The group of a block of the context's pool.
fn group_of(context: &Context, key: BlockKey) -> GroupId {
    Pool::group_in(context.pool, context.group_count, key.lineage, key.index)
}

/// Growing waits between tries.
struct Backoff(Duration);

impl Backoff {
    fn new() -> Self {
        Self(BACKOFF_FIRST)
    }

    fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (wait * 2).min(BACKOFF_MAX);
        wait
    }
}

impl Volumes for VolumeClient {
    fn exports(&self) -> Vec<Export> {
        self.port.map().volumes.values().map(export).collect()
    }

    async fn open(&self, name: &str) -> Result<Export, Code> {
        let volume = self.port.open(name).await?;
        Ok(export(&volume))
    }

    fn close(&self, volume: VolumeId) {
        self.port.close(volume);
    }

    fn size_bytes(&self, volume: VolumeId) -> Option<u64> {
        Some(self.port.map().volumes.get(&volume)?.size_bytes)
    }

    async fn submit(&self, request: BlockRequest) -> Result<BlockReply, Code> {
        let context = self.admit(&request)?;
        let (offset, length) = (request.offset, request.length);
        let started_ns = self.port.now_ns();
        let range = (offset, length);
        let (stage, result) = match request.operation {
            Wanted::Read => (Stage::Read, self.read(&context, offset, length).await),
            Wanted::Write { data, fua } => (Stage::Write, self.write(&context, offset, data, fua).await),
            Wanted::WriteZeroes { fua, no_hole } => {
                let zeroing = if no_hole { Zeroing::Provisioned } else { Zeroing::Hole };
                (Stage::Zero, self.zero(&context, range, zeroing, fua).await)
            }
            Wanted::Trim { fua } => (Stage::Zero, self.zero(&context, range, Zeroing::Trim, fua).await),
            Wanted::Flush => (Stage::Flush, self.flush(&context).await),
            Wanted::BlockStatus { extents_max } => {
                (Stage::BlockStatus, self.extents(&context, range, extents_max).await)
            }
        };
        self.port.observe(stage, self.port.now_ns() - started_ns);
        result
    }
}

fn export(volume: &Volume) -> Export {
    Export { volume: volume.id, name: volume.name.clone(), size_bytes: volume.size_bytes }
}

#[cfg(test)]
mod tests;
