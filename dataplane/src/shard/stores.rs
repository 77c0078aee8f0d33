//! The stores of a node when its data process starts: what is formatted, what is opened, what has failed.
//!
//! Used by `boot`, on the thread of the shard that the store belongs to. Knows no cluster map.
//!
//! Invariants
//! - Nothing is written to a device that is neither empty nor itself named with `--force-format`.
//! - Of the devices of a store all are formatted, or none.
//! - A store whose records are damaged, or whose device is gone or can not be read, is told as failed: the others serve.
//! - A store is opened on the node that it was made on. On another one all that it holds would count as left behind.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use xsan_nodekit::config::{Media, NodeConfig, Role};
use xsan_protocol::disk::FORMAT_VERSION;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{NodeId, ShardIndex, StoreId};
use xsan_protocol::{map, proto};

use super::boot::BootError;
use super::failures::Failures;
use crate::disk::buffers::BufferPool;
use crate::disk::device::{DeviceError, DeviceOptions, FileDevice};
use crate::disk::os;
use crate::store::{Content, FormatError, FormatParameters, OpenError, Options, Recovered, Store};

/// Smallest store worth formatting.
const STORE_BYTES_MIN: u64 = 128 << 20;
/// How long a device that is not there is waited for.
const DEVICE_WAIT: Duration = Duration::from_secs(5);
const DEVICE_RETRY: Duration = Duration::from_millis(100);

/// A device of a store to open, as the configuration has it.
#[derive(Clone, Debug)]
struct DevicePlan {
    options: DeviceOptions,
    /// The operator has named it: it is formatted, whatever it holds.
    named: bool,
}

/// A store to open.
#[derive(Clone, Debug)]
pub struct StorePlan {
    capacity: DevicePlan,
    cache: Option<DevicePlan>,
    media: Media,
}

/// The stores of a node: one for each capacity device, or the files of an embedded one.
pub fn plan(config: &NodeConfig) -> Vec<StorePlan> {
    let device = |path: &Path| DevicePlan {
        options: DeviceOptions::new(path).minimum(STORE_BYTES_MIN),
        named: config.force_format.iter().any(|named| named == path),
    };
    if config.storage.devices.is_empty() {
        let file = |path: PathBuf| {
            let mut capacity = device(&path);
            capacity.options = capacity.options.create(config.dataplane.file_size);
            StorePlan { capacity, cache: None, media: Media::Ssd }
        };
        return config.store_files().into_iter().map(file).collect();
    }
    let of_role = |role| config.storage.devices.iter().filter(move |device| device.role == role);
    let mut caches = of_role(Role::Cache).map(|cache| device(&cache.path));
    of_role(Role::Capacity)
        .map(|capacity| StorePlan {
            capacity: device(&capacity.path),
            cache: caches.next(),
            media: capacity.media,
        })
        .collect()
}

/// A store that is open, with its devices.
pub struct OpenStore {
    pub store: Store,
    pub recovered: Recovered,
    pub capacity: FileDevice,
    pub cache: Option<FileDevice>,
    pub media: Media,
}

/// A store of this node that can not be opened: its records are damaged, or its device is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenStore {
    /// `None`: not even that could be read.
    id: Option<StoreId>,
    device: String,
    media: Media,
    problem: String,
}

/// What came of opening the stores of a shard.
#[derive(Default)]
pub struct Opened {
    pub stores: Vec<OpenStore>,
    pub broken: Vec<BrokenStore>,
    /// What was wrong with the first device that is gone: the process ends with it when nothing is left.
    pub dead: Option<BootError>,
}

impl Opened {
    /// What the cluster's map is to say of them.
    pub fn for_map(&self, shard: ShardIndex, failed_before: &BTreeSet<StoreId>) -> Vec<map::Store> {
        let open = self.stores.iter().map(|open| map::Store {
            id: open.store.id(),
            capacity_bytes: open.store.status().capacity_bytes,
            shard,
            device: open.capacity.path().display().to_string(),
            media: media_name(open.media).to_owned(),
            failed: false,
            failed_before: failed_before.contains(&open.store.id()) || open.recovered.lost_end,
        });
        // It has a place in the map, so that the cluster knows that what it held has to be made elsewhere.
        // One that nobody can name is missing there, which says the same.
        let named = self.broken.iter().filter_map(|broken| broken.id.map(|id| (id, broken)));
        let broken = named.map(|(id, broken)| map::Store {
            id,
            capacity_bytes: 0,
            shard,
            device: broken.device.clone(),
            media: media_name(broken.media).to_owned(),
            failed: true,
            failed_before: failed_before.contains(&id),
        });
        open.chain(broken).collect()
    }

    /// The stores that lost records.
    pub fn damaged(&self) -> Vec<map::DamagedStore> {
        let damaged = self.stores.iter().filter(|open| open.recovered.damaged);
        damaged
            .map(|open| map::DamagedStore {
                store: open.store.id(),
                intact_groups: open.recovered.intact_groups(),
            })
            .collect()
    }
}

impl BrokenStore {
    pub fn message(&self) -> proto::StoreStatus {
        proto::StoreStatus {
            id: self.id.map_or(0, |id| id.0),
            device: self.device.clone(),
            media: media_name(self.media).to_owned(),
            failed: true,
            problem: self.problem.clone(),
            ..proto::StoreStatus::default()
        }
    }
}

pub const fn media_name(media: Media) -> &'static str {
    match media {
        Media::Ssd => "ssd",
        Media::Hdd => "hdd",
    }
}

/// Whose stores are opened.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    pub cluster_id: &'a str,
    pub node: NodeId,
}

/// Opens the planned stores of a shard; those on empty or named devices are formatted first.
///
/// # Errors
/// A device that can not be used though it is there, or that holds something that nobody said may be lost.
pub fn open(
    plans: &[StorePlan],
    owner: Owner<'_>,
    failures: &Failures,
    pool: &'static BufferPool,
) -> Result<Opened, BootError> {
    let mut opened = Opened::default();
    for plan in plans {
        match open_store(plan, owner, failures, pool) {
            Ok(Ok(open)) => opened.stores.push(open),
            Ok(Err(broken)) => opened.broken.push(broken),
            Err(error) if is_dead(&error) => {
                let device = plan.capacity.options.path.display().to_string();
                let code = error.code();
                tracing::error!(code = code.number(), %device, "the store can not be opened: {error}; {}", code.remedy());
                let problem = format!("can not be opened: {error}");
                opened.broken.push(BrokenStore { id: None, device, media: plan.media, problem });
                opened.dead.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(opened)
}

/// Is a device gone, or does it fail? What else is wrong with one is wrong with the configuration.
fn is_dead(error: &BootError) -> bool {
    let source = match error {
        BootError::Device(DeviceError::Open { source, .. })
        | BootError::Format { source: FormatError::Device(source), .. }
        | BootError::Open { source: OpenError::Device(FormatError::Device(source)), .. } => source,
        _ => return false,
    };
    matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV | libc::EIO))
}

/// Opens a device; one that is not there is waited for, as the system may be starting too.
fn open_device(options: &DeviceOptions) -> Result<FileDevice, DeviceError> {
    let deadline = Instant::now() + DEVICE_WAIT;
    loop {
        match FileDevice::open(options) {
            Err(DeviceError::Open { source, .. })
                if source.kind() == ErrorKind::NotFound && Instant::now() < deadline =>
            {
                std::thread::sleep(DEVICE_RETRY);
            }
            opened => return opened,
        }
    }
}

fn open_store(
    plan: &StorePlan,
    owner: Owner<'_>,
    failures: &Failures,
    pool: &'static BufferPool,
) -> Result<Result<OpenStore, BrokenStore>, BootError> {
    let capacity = open_device(&plan.capacity.options)?;
    let cache = plan.cache.as_ref().map(|cache| open_device(&cache.options)).transpose()?;
    let path = capacity.path().to_owned();
    let format_error = |source| BootError::Format { path: path.clone(), source };
    let plans = std::iter::once(&plan.capacity).chain(&plan.cache);
    let devices = std::iter::once(&capacity).chain(&cache).zip(plans);
    let kept = what_is_kept(devices, owner, pool).map_err(|error| match error {
        KeptError::Probe(source) => format_error(source),
        KeptError::Foreign { path, content, code } => BootError::Foreign { path, content, code },
    })?;
    let id = kept.unwrap_or_else(|| StoreId(draw()));
    if kept.is_none() {
        let parameters = FormatParameters {
            cluster_id: owner.cluster_id.to_owned(),
            node: owner.node,
            store: id,
            created_ns: wall_clock_ns(),
            journal_bytes: None,
        };
        tracing::info!(device = %path.display(), store = %id, "formatting a store");
        Store::format(&capacity, cache.as_ref().map(|device| device as _), &parameters, pool)
            .map_err(format_error)?;
    }
    let cluster_id = Some(owner.cluster_id.to_owned());
    let options = Options { now_ns: os::boottime_ns(), cluster_id, ..Options::default() };
    let opened = Store::open(&capacity, cache.as_ref().map(|device| device as _), pool, options);
    if may_lack_writes(&opened)
        && let Err(error) = failures.note_earlier(id)
    {
        tracing::error!(store = %id, %error, "that it may lack writes can not be noted in the data directory");
    }
    let (store, recovered) = match opened {
        Ok(opened) => opened,
        Err(source) if source.code() == Code::StoreCorrupt => {
            let problem = format!("can not be opened: {source}");
            let code = source.code();
            tracing::error!(code = code.number(), device = %path.display(), store = %id, "the store {problem}; {}", code.remedy());
            // They stay locked, as those of every store of the node.
            std::mem::forget((capacity, cache));
            let device = path.display().to_string();
            return Ok(Err(BrokenStore { id: Some(id), device, media: plan.media, problem }));
        }
        Err(source) => return Err(BootError::Open { path, source }),
    };
    tracing::info!(device = %path.display(), store = %store.id(), groups = recovered.groups.len(), damaged = recovered.damaged, "store open");
    Ok(Ok(OpenStore { store, recovered, capacity, cache, media: plan.media }))
}

/// May it lack what it had in an earlier life? That life's writes are made stable by the opening: where that fails, the next one may find that
/// they were never there.
fn may_lack_writes(opened: &Result<(Store, Recovered), OpenError>) -> bool {
    match opened {
        Ok((_, recovered)) => recovered.lost_end,
        Err(error) => matches!(error, OpenError::Device(FormatError::Device(_))),
    }
}

enum KeptError {
    Probe(FormatError),
    Foreign { path: PathBuf, content: String, code: Code },
}

/// The store on these devices that is to be opened; `None`: they are to be formatted.
///
/// Looks at all of them before anything is written to one.
fn what_is_kept<'a>(
    devices: impl Iterator<Item = (&'a FileDevice, &'a DevicePlan)>,
    owner: Owner<'_>,
    pool: &'static BufferPool,
) -> Result<Option<StoreId>, KeptError> {
    let mut stores = Vec::new();
    for (device, plan) in devices {
        let path = || device.path().to_owned();
        let refused = |code, content: String| KeptError::Foreign { path: path(), content, code };
        let foreign = |content| refused(Code::DeviceInUse, content);
        let content = Store::probe(device, pool).map_err(KeptError::Probe)?;
        let store = match content {
            Content::Blank => None,
            _ if plan.named => {
                tracing::warn!(device = %path().display(), ?content, "--force-format names this device: what it holds is lost");
                None
            }
            Content::Ours { cluster_id, .. } if cluster_id != owner.cluster_id => {
                return Err(foreign(format!("holds a store of cluster {cluster_id}")));
            }
            Content::Ours { node, .. } if node != owner.node => {
                let (own, content) = (owner.node, "holds a store of another node of this cluster");
                return Err(foreign(format!("{content}: it was made on node {node}, this is node {own}")));
            }
            Content::Ours { store, .. } => Some(store),
            Content::OtherVersion { found } => {
                let content = format!("holds a store of format {found}, this release reads {FORMAT_VERSION}");
                return Err(refused(Code::FormatUnsupported, content));
            }
            Content::Foreign(kind) => return Err(foreign(format!("holds {}", kind.name()))),
        };
        stores.push((path(), store));
    }
    let found = stores.iter().find_map(|(path, store)| store.map(|store| (path.clone(), store)));
    let Some((path, kept)) = found else { return Ok(None) };
    match stores.iter().find(|(_, store)| *store != Some(kept)) {
        None => Ok(Some(kept)),
        Some((other, _)) => {
            let content =
                format!("holds a part of store {kept}, whose other part is not on {}", other.display());
            Err(KeptError::Foreign { path, content, code: Code::DeviceInUse })
        }
    }
}

pub(super) fn wall_clock_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// A random number, from the hasher's per-process keys and the clock.
fn draw() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one((std::process::id(), wall_clock_ns(), os::boottime_ns())).max(1)
}

#[cfg(test)]
mod tests;
