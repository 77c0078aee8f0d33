//! Which cores shards run on, and memory near them.
//!
//! Used by `boot`, on the thread that becomes the shard.

use std::io;

use core_affinity::CoreId;
use hwlocality::Topology;
use hwlocality::memory::binding::{Bytes, MemoryBindingFlags, MemoryBindingPolicy};
use hwlocality::object::types::ObjectType;
use xsan_nodekit::config::Numa;
use xsan_protocol::error::Code;
use xsan_protocol::limits::SHARDS_MAX;

use crate::disk::buffers::BufferPool;

/// A core of this machine that the process may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core(CoreId);

#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    #[error("dataplane.cores: \"{text}\" is not `auto` or a list as 0-3,6")]
    Malformed { text: String },
    #[error("dataplane.cores: core {core} is not one that this process may use ({allowed})")]
    NotAllowed { core: usize, allowed: String },
    #[error("dataplane.cores: the machine tells no cores")]
    None,
    #[error("{bytes} bytes of memory for shard buffers: {source}")]
    Memory { bytes: usize, source: io::Error },
}

impl TopologyError {
    pub const fn code(&self) -> Code {
        match self {
            Self::Malformed { .. } | Self::NotAllowed { .. } | Self::None => Code::ConfigInvalid,
            Self::Memory { .. } => Code::MemoryShort,
        }
    }
}

/// The cores that `text` lists; `auto` is every core that the process may use.
///
/// To be called before any thread is pinned: a pinned one may use its own core alone.
///
/// # Errors
/// 8 `ConfigInvalid`.
pub fn cores(text: &str) -> Result<Vec<Core>, TopologyError> {
    let allowed: Vec<usize> =
        core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
    choose(text, &allowed).map(|ids| ids.into_iter().map(|id| Core(CoreId { id })).collect())
}

fn choose(text: &str, allowed: &[usize]) -> Result<Vec<usize>, TopologyError> {
    let malformed = || TopologyError::Malformed { text: text.to_owned() };
    let mut chosen = Vec::new();
    if text == "auto" {
        chosen.extend(allowed);
    } else {
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(|_| malformed())?;
            let last: usize = last.trim().parse().map_err(|_| malformed())?;
            if last < first || last - first > SHARDS_MAX {
                return Err(malformed());
            }
            chosen.extend(first..=last);
        }
    }
    chosen.truncate(SHARDS_MAX);
    if let Some(core) = chosen.iter().find(|core| !allowed.contains(core)) {
        let allowed: Vec<String> = allowed.iter().map(usize::to_string).collect();
        return Err(TopologyError::NotAllowed { core: *core, allowed: allowed.join(",") });
    }
    if chosen.is_empty() { Err(TopologyError::None) } else { Ok(chosen) }
}

/// Keeps the calling thread on `core`.
pub fn pin(core: &Core) {
    if !core_affinity::set_for_current(core.0) {
        tracing::warn!(core = core.0.id, "the shard could not be pinned to its core; it runs on any");
    }
}

/// A pool of `bytes` for the shard on `core`, from the core's NUMA node unless `numa` is off. Where memory can not be bound
/// to a node, as without NUMA in the kernel, the pool is of any, and the log says so.
///
/// # Errors
/// 11 `MemoryShort`.
pub fn memory(core: &Core, bytes: usize, numa: Numa) -> Result<&'static BufferPool, TopologyError> {
    if numa == Numa::Auto {
        match bound_memory(core, bytes) {
            Ok(pool) => return Ok(pool),
            Err(error) => {
                tracing::warn!(core = core.0.id, bytes, %error, "the shard's memory is not bound to the NUMA node of its core; dataplane.numa \"off\" says that it need not be");
            }
        }
    }
    BufferPool::mapped(bytes).map_err(|source| TopologyError::Memory { bytes, source })
}

fn bound_memory(core: &Core, bytes: usize) -> io::Result<&'static BufferPool> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(error.to_string());
    // Bound memory lives as long as its topology, and that as long as the process.
    let topology: &'static Topology = Box::leak(Box::new(Topology::new().map_err(|error| failed(&error))?));
    let units = topology.objects_with_type(ObjectType::PU);
    let unit = units.into_iter().find(|unit| unit.os_index() == Some(core.0.id));
    let nodes =
        unit.and_then(|unit| unit.nodeset()).ok_or_else(|| io::Error::other("its NUMA node is not known"))?;
    let bound =
        topology.allocate_bound_memory(bytes, &*nodes, MemoryBindingPolicy::Bind, MemoryBindingFlags::STRICT);
    let memory = bound.map_err(|error| failed(&error))?;
    tracing::info!(core = core.0.id, numa_nodes = %&*nodes, bytes, "shard memory");
    let memory: &'static mut Bytes<'static> = Box::leak(Box::new(memory));
    Ok(BufferPool::from_static(memory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores() {
        let allowed = [0, 1, 2, 3, 6];
        assert_eq!(choose("auto", &allowed).unwrap(), allowed);
        assert_eq!(choose("0-2,6", &allowed).unwrap(), [0, 1, 2, 6]);
        assert!(matches!(choose("3-5", &allowed), Err(TopologyError::NotAllowed { core: 4, .. })));
        for malformed in ["", "a", "2-1", "1,,2", "0-99999"] {
            assert!(
                matches!(choose(malformed, &allowed), Err(TopologyError::Malformed { .. })),
                "{malformed}"
            );
        }
    }

    #[test]
    fn memory_of_a_core_is_zeroed() {
        let core = cores("auto").unwrap()[0];
        for numa in [Numa::Auto, Numa::Off] {
            let pool = memory(&core, 32 << 20, numa).unwrap();
            assert!(pool.alloc(4096).unwrap().iter().all(|byte| *byte == 0));
        }
    }
}
