//! What a store holds of a group that has gone elsewhere, with the real stores of one shard.

use std::collections::BTreeMap;
use std::sync::Arc;

use xsan_protocol::ids::{
    BlockIndex, BlockKey, BootId, Epoch, GroupId, Incarnation, Layer, Lineage, MapVersion, NodeId, PoolId,
    Seq, ShardIndex, StoreId,
};
use xsan_protocol::map::{ClusterMap, Durability, Group, Member, Pool};
use xsan_protocol::units::PageRange;

use super::pool;
use crate::io::DiskAction;
use crate::replication::{Driver, Operation, Origin, Output, Replication, Request, RequestId};
use crate::store::{FormatParameters, Options, PageData, Store};
use crate::testing::{SimDevice, node_of_map};

const OWN: NodeId = NodeId(1);
const GROUP: GroupId = GroupId::new(PoolId(1), 0);
const STORES: [StoreId; 2] = [StoreId(1), StoreId(2)];
const TICK_NS: u64 = 20_000_000;
const PAGES: PageRange = PageRange::new(0, 64);

/// One shard with two devices.
struct Shard {
    devices: BTreeMap<StoreId, SimDevice>,
    driver: Driver,
    incarnation: Incarnation,
    version: u64,
    now_ns: u64,
}

impl Shard {
    fn new() -> Self {
        let devices = STORES.map(|store| {
            let device = SimDevice::new(64 << 20);
            let parameters = FormatParameters {
                cluster_id: "test".to_owned(),
                node: NodeId(1),
                store,
                created_ns: 1,
                journal_bytes: Some(8 << 20),
            };
            Store::format(&device, None, &parameters, pool()).unwrap();
            (store, device)
        });
        Self::start(devices.into(), 1, 1)
    }

    fn start(devices: BTreeMap<StoreId, SimDevice>, incarnation: u64, now_ns: u64) -> Self {
        let incarnation = Incarnation(incarnation);
        let mut driver = Driver::new(Replication::new(OWN, incarnation, ShardIndex(0), pool()));
        for device in devices.values() {
            let (store, recovered) =
                Store::open(device, None, pool(), Options { now_ns, ..Options::default() }).unwrap();
            driver.add_store(store, recovered);
        }
        driver.replication.on_lease(u64::MAX);
        Self { devices, driver, incarnation, version: 0, now_ns }
    }

    fn restart(self) -> Self {
        Self::start(self.devices, self.incarnation.0 + 1, self.now_ns)
    }

    /// Completes what is on its way to the devices, and what follows from it.
    fn settle(&mut self, out: &mut Vec<Output>) {
        loop {
            let mut operations = Vec::new();
            self.driver.end_turn(self.now_ns, &mut operations, out);
            if operations.is_empty() {
                return;
            }
            for (store, action) in operations {
                let device = &self.devices[&store];
                let mark = if matches!(action, DiskAction::Flush { .. }) { device.mark() } else { 0 };
                self.driver.on_disk(store, device.carry_out(action, mark));
            }
        }
    }

    /// So much time that all is destaged.
    fn rest(&mut self) {
        for _ in 0..1500 {
            self.now_ns += TICK_NS;
            let mut out = Vec::new();
            self.driver.on_tick(self.now_ns, &mut out);
            self.settle(&mut out);
        }
    }

    /// The only replica of the group is on `store`, by a map that knows this life of the process, or an earlier one.
    fn map(&mut self, epoch: u32, store: StoreId, incarnation: Incarnation) {
        self.version += 1;
        let (boot_id, node) = (BootId(1), node_of_map(OWN, incarnation, Vec::new()));
        let member = Member { node: OWN, store, incarnation, boot_id, learner: false, damaged: false };
        let group = Group {
            id: GROUP,
            epoch: Epoch(epoch),
            primary: Some(OWN),
            members: vec![member],
            former: Vec::new(),
            dropped: Vec::new(),
        };
        let pool = Pool { id: GROUP.pool(), replica_count: 1, min_replicas: 1, group_count: 1 };
        let map = Arc::new(ClusterMap {
            version: MapVersion(self.version),
            lineage_end: Lineage(9),
            nodes: [(OWN, node)].into(),
            pools: [(pool.id, pool)].into(),
            groups: [(GROUP, group)].into(),
            ..ClusterMap::default()
        });
        let mut out = Vec::new();
        self.driver.call(self.now_ns, &mut out, |replication, stores, now_ns, out| {
            replication.on_map(&map, stores, now_ns, out);
        });
        self.settle(&mut out);
    }

    fn write(&mut self, block: u32) {
        self.write_to_journal(block);
        self.rest();
    }

    fn write_to_journal(&mut self, block: u32) {
        let mut buffer = pool().alloc(PAGES.bytes()).unwrap();
        buffer.fill(block as u8 + 1);
        let bytes = buffer.freeze();
        let checksums = xsan_protocol::checksum::page_checksums(&bytes);
        let key = BlockKey { lineage: Lineage(9), layer: Layer(0), index: BlockIndex(block) };
        let request = Request {
            id: RequestId { origin: Origin::Connection(1), number: u64::from(block) },
            group: GROUP,
            epoch: Epoch(self.version as u32),
            durability: Durability::OnFlush,
            operation: Operation::Write {
                key,
                pages: PAGES,
                data: PageData { bytes, checksums },
                fua: false,
            },
        };
        let mut out = Vec::new();
        self.driver.call(self.now_ns, &mut out, |replication, stores, now_ns, out| {
            replication.on_request(request, stores, now_ns, out);
        });
        self.settle(&mut out);
    }

    fn used(&self) -> [u64; 2] {
        STORES.map(|store| self.driver.store(store).unwrap().status().used_bytes)
    }
}

/// A group that came back to its node on another store of the same shard never gave back what it had on the first: only
/// groups that were nowhere in the shard were emptied. Found by reading.
#[test]
fn a_group_that_goes_to_another_store_of_its_shard_leaves_nothing_behind() {
    for restarts in [false, true] {
        let mut shard = Shard::new();
        shard.map(1, STORES[0], shard.incarnation);
        // More blocks than are emptied at once.
        (0..40).for_each(|block| shard.write(block));
        let full = shard.used()[0];
        assert!(full >= 40 * PAGES.bytes() as u64, "{full}");
        if restarts {
            shard = shard.restart();
        }
        shard.map(2, STORES[1], shard.incarnation);
        shard.version = 2;
        shard.write(0);
        shard.rest();
        let used = shard.used();
        assert_eq!(used[0], 0, "what was left is gone");
        assert!(used[1] >= PAGES.bytes() as u64, "what is in use is not");
        assert_eq!(shard.driver.replication.busy_group(), None);
        assert_eq!(shard.driver.store(STORES[0]).unwrap().tail(GROUP).last.seq, Seq(0));
        // And it may come back again.
        shard.map(3, STORES[0], shard.incarnation);
        shard.write(1);
        shard.rest();
        let used = shard.used();
        assert!(used[0] >= PAGES.bytes() as u64, "{used:?}");
        assert_eq!(used[1], 0);
    }
}

/// A node that had just been given a group, and started again with a map from before that, began to empty what others
/// might soon depend on. Found by reading.
#[test]
fn nothing_is_emptied_by_a_map_that_may_be_older_than_this_life() {
    let mut shard = Shard::new();
    shard.map(1, STORES[0], shard.incarnation);
    shard.write(0);
    let full = shard.used()[0];
    let before = shard.incarnation;
    let mut shard = shard.restart();
    shard.map(2, STORES[1], before);
    shard.rest();
    assert_eq!(shard.used()[0], full);
    shard.map(3, STORES[1], shard.incarnation);
    shard.rest();
    assert_eq!(shard.used()[0], 0);
}

/// The failure of a store is told before its stop, so that the next life can know of it: also one that the flush of the
/// stop finds.
#[test]
fn a_store_that_fails_is_told_before_it_has_stopped() {
    let told = |out: &[Output]| -> Vec<(bool, StoreId)> {
        let of_store = |output: &Output| match output {
            Output::StoreFailed(store) => Some((false, *store)),
            Output::StoreStopped(store) => Some((true, *store)),
            _ => None,
        };
        out.iter().filter_map(of_store).collect()
    };
    let mut shard = Shard::new();
    shard.map(1, STORES[0], shard.incarnation);
    shard.write_to_journal(1);
    shard.devices[&STORES[0]].fail_next_flush();
    let mut out = Vec::new();
    shard.driver.stop(&mut out);
    shard.settle(&mut out);
    let order = told(&out);
    let place = |what| order.iter().position(|other| *other == what).expect("it is told");
    assert!(place((false, STORES[0])) < place((true, STORES[0])), "{order:?}");
    assert_eq!((order.len(), order.contains(&(true, STORES[1]))), (3, true), "{order:?}");
    let mut again = Vec::new();
    shard.driver.stop(&mut again);
    assert!(told(&again).contains(&(true, STORES[0])), "it is known to have failed");
}
