//! A host: its clock, its devices, its control process, and (if it runs) its data process.

use std::collections::BTreeMap;
use std::sync::Arc;

use xsan_controlplane::clock::BootTime;
use xsan_controlplane::link::Link;
use xsan_controlplane::state::ClusterState;
use xsan_dataplane::disk::buffers::BufferPool;
use xsan_dataplane::io::DiskAction;
use xsan_dataplane::testing::SimDevice;
use xsan_protocol::ids::{BootId, NodeId, StoreId};

use crate::process::Process;

pub struct Host {
    pub node: NodeId,
    pub powered: bool,
    pub boot: BootId,
    /// CLOCK_BOOTTIME at virtual time 0 of this boot, and how much faster it runs than true time.
    pub clock_base: u64,
    pub booted_at: u64,
    pub drift_ppm: i64,
    pub store: StoreId,
    /// Its store was damaged behind its back, in this run.
    pub damage_allowed: bool,
    /// Its store, if it lost records.
    pub damaged_stores: Vec<xsan_protocol::map::DamagedStore>,
    pub capacity: SimDevice,
    pub cache: Option<SimDevice>,
    /// Device operations under way, by number.
    pub in_flight: BTreeMap<u64, InFlight>,
    /// Until then every operation of the capacity device takes a hundred times as long.
    pub slow_until: u64,
    /// And of the cache device.
    pub slow_cache: bool,
    /// The next flush fails whose loss can be borne, and takes what it was to cover with it.
    pub flush_to_fail: bool,
    /// Until then the others find it slow, whether it is or not.
    pub found_slow_until: u64,
    pub control: Control,
    /// Memory of the data process.
    pub pool: &'static BufferPool,
    /// `None`: it does not run.
    pub process: Option<Process>,
    /// Counts the lives of the data process: events of an earlier one are void.
    pub life: u64,
    /// Stopped (SIGSTOP) until then.
    pub data_paused_until: u64,
    pub control_paused_until: u64,
    /// What the cluster agreed on reaches it no sooner; beats do.
    pub maps_late_until: u64,
}

/// A device operation, with what a flush covers.
pub struct InFlight {
    pub action: DiskAction,
    pub mark: u64,
}

/// The control process: what its host knows of the cluster, and the link to the data process.
pub struct Control {
    pub alive: bool,
    pub life: u64,
    pub link: Link,
    pub known: Arc<ClusterState>,
}

impl Host {
    /// This host's CLOCK_BOOTTIME at a true time.
    pub fn clock(&self, now: u64) -> BootTime {
        let since = (now - self.booted_at) as i128;
        let drift = since * i128::from(self.drift_ppm) / 1_000_000;
        BootTime(self.clock_base + (since + drift) as u64)
    }

    pub fn device(&self, role: xsan_dataplane::io::DeviceRole) -> &SimDevice {
        match role {
            xsan_dataplane::io::DeviceRole::Capacity => &self.capacity,
            xsan_dataplane::io::DeviceRole::Cache => {
                self.cache.as_ref().expect("the store was opened with it")
            }
        }
    }

    /// Are there processes that can answer?
    pub fn control_runs(&self, now: u64) -> bool {
        self.powered && self.control.alive && self.control_paused_until <= now
    }
}
