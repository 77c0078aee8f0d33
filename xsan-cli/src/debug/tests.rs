//! What the commands print, in full.

use clap::{CommandFactory, Parser};
use xsan_protocol::proto::{BlockReplica, Counter, Latency, LocateBlockReply, NodePerf, UnitLocation};

use super::args::Block;
use super::*;
use crate::sample;

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn blocks_are_named_by_index_or_byte() {
    let block = |text: &str| text.parse::<Block>().map(|block| (block.volume, block.index));
    assert_eq!(block("vm-1:17"), Ok(("vm-1".into(), 17)));
    assert_eq!(block("vm-1@4194303"), Ok(("vm-1".into(), 0)));
    assert_eq!(block("vm-1@4MiB"), Ok(("vm-1".into(), 1)));
    for bad in ["vm-1", ":1", "vm-1:", "vm-1:x", "@5", "vm-1@x", "vm-1:-1"] {
        assert!(block(bad).is_err(), "{bad}");
    }
    Args::command().debug_assert();
    Args::try_parse_from(["xsan-debug", "block-location", "vm-1"]).expect_err("no block");
}

#[test]
fn cluster_status_lists_lives_and_sick_groups() {
    let shown = show::cluster_status(&sample::cluster_status(), &sample::map());
    assert_eq!(
        lines(&shown),
        [
            "Cluster  xsan-cluster-001",
            "Raft     term 3, leader node-001",
            "Map      version 42",
            "Groups   256 (0 healthy, 256 degraded, 0 inactive, 12 resyncing, 256 at risk)",
            "Resync   12 MiB moved, 100 MiB left",
            "",
            "NODE      ID  STATE  VOTER  HEARTBEAT  INCARNATION       BOOT              PRIMARY  REPLICAS  LEARNERS",
            "node-001   1  up     yes       120 ms  000000000000000b  000000000000b007      128       256         0",
            "node-002   2  up     yes       120 ms  000000000000000c  000000000000b007      128       256         0",
            "node-003   3  down   yes       42.0 s  000000000000000d  000000000000b007        0         0       256",
            "",
            "GROUP  EPOCH  STATE     PRIMARY   ACTING              LEARNERS",
            "0.0        5  degraded  node-001  node-001, node-002  node-003",
            "0.1        6  degraded  node-002  node-001, node-002  node-003",
            "0.2        7  degraded  node-001  node-001, node-002  node-003",
            "0.3        8  inactive  -         node-001            node-002, node-003",
        ]
    );
}

/// After a loss of power the map stays as it is until enough are back: groups that nobody served passed for healthy.
#[test]
fn a_member_of_another_life_or_on_a_failed_store_does_not_act() {
    let map = sample::map();
    let state = |change: &dyn Fn(&mut xsan_protocol::proto::DataProcess)| {
        let mut nodes = sample::cluster_status().nodes;
        let node = nodes[1].node.as_mut().expect("a node");
        change(node.data.as_mut().expect("a data process"));
        layout::state_in(&map, &map.groups[0], &layout::Serving::of(&nodes))
    };
    assert_eq!(state(&|_| {}), "degraded");
    assert_eq!(state(&|data| data.incarnation += 1), "inactive");
    assert_eq!(state(&|data| data.stores.iter_mut().for_each(|store| store.failed = true)), "inactive");
    let value = json::cluster_status(&sample::cluster_status(), &map);
    assert_eq!(
        (&value["group_list"][0]["state"], &value["group_list"][3]["state"]),
        (&"degraded".into(), &"inactive".into())
    );
    assert_eq!(value["nodes"][0]["boot_id"], "000000000000b007");
}

#[test]
fn silence_of_all_that_were_asked_is_a_failure() {
    assert_eq!(answered(String::new(), true).exit_code, 0);
    assert_eq!(answered(String::new(), false).exit_code, 4);
}

#[test]
fn topology_goes_from_domains_to_stores() {
    let shown = show::topology(&sample::cluster_status(), &sample::map());
    let shown = lines(&shown);
    assert_eq!(
        shown[..6],
        [
            "cluster xsan-cluster-001 (map version 42)",
            "  rack-1",
            "    node-001 (number 1, up, voter)  127.0.0.1 control 8080 nbd 10809",
            "      shard 0  port 9100",
            "        store 0123456789abcdef  ssd  8 GiB  /var/lib/xsan/data/store-0.img",
            "      shard 1  port 9101",
        ]
    );
    assert_eq!(
        shown[10..12],
        ["  rack-2", "    node-003 (number 3, down, voter)  127.0.0.3 control 8080 nbd 10809"]
    );
}

#[test]
fn volume_info_counts_blocks_and_groups() {
    let shown = show::volume_info(&sample::volume_status(), &sample::map(), &sample::cluster_status().nodes);
    assert_eq!(
        lines(&shown),
        [
            "Volume      vm-1 (number 1)",
            "State       degraded",
            "Lineage     00000000feedbeef, layer 1",
            "Size        100 GB (100000000000 bytes)",
            "Blocks      23842 of 4 MiB",
            "Pool        0 (3 replicas, I/O needs 2)",
            "Groups      4: 1 inactive, 3 degraded",
            "Durability  on-flush",
            "Attached    node-002",
        ]
    );
}

#[test]
fn layout_accounts_for_every_block() {
    let map = sample::map();
    let layout = layout::of(&sample::volume(), &map, &sample::cluster_status().nodes);
    assert_eq!(layout.groups.iter().map(|group| group.blocks).sum::<u64>(), 23842);
    let (_, held) = layout.blocks_of(&map.nodes[2]);
    assert_eq!(held, 23842, "node 3 is a member of every group");
    let shown = show::layout(&layout, &map);
    let shown = lines(&shown);
    assert_eq!(shown[0], "NODE      PRIMARY BLOCKS  REPLICA BLOCKS");
    assert_eq!(shown[5], "GROUP  EPOCH  STATE     PRIMARY   ACTING              LEARNERS            BLOCKS");
    let value = json::layout(&layout, &map);
    assert_eq!(value["groups"][3]["state"], "inactive");
    assert_eq!(value["groups"][0]["members"][2]["learner"], true);
}

fn unit(unit: u32, seq: u64, device_offset: u64, journalled_pages: u32) -> UnitLocation {
    UnitLocation { unit, version_epoch: 7, version_seq: seq, device_offset, journalled_pages }
}

fn location(replicas: Vec<(&str, bool, Vec<UnitLocation>)>) -> LocateBlockReply {
    let replica = |(name, reachable, units): (&str, bool, Vec<UnitLocation>)| BlockReplica {
        node: 1,
        node_name: name.into(),
        role: if name == "node-001" { "primary".into() } else { "secondary".into() },
        store: 0xabc,
        device: "/dev/sdb".into(),
        reachable,
        units,
    };
    LocateBlockReply {
        lineage: 0xfeed,
        layer: 1,
        block_index: 17,
        group: 65_538,
        epoch: 7,
        replicas: replicas.into_iter().map(replica).collect(),
    }
}

#[test]
fn a_block_is_shown_unit_by_unit_across_replicas() {
    let block = Block { volume: "vm-1".into(), index: 17 };
    let reply = location(vec![
        ("node-001", true, vec![unit(0, 8, 0x10_0000, 0), unit(3, 9, 0, 2)]),
        ("node-002", true, vec![unit(0, 8, 0x20_0000, 1)]),
        ("node-003", false, vec![]),
    ]);
    assert_eq!(
        lines(&show::location(&block, &reply)),
        [
            "Block  vm-1:17 (bytes 71303168 to 75497471 of the volume)",
            "Key    lineage 000000000000feed, layer 1, index 17",
            "Group  1.2 at epoch 7",
            "",
            "NODE      ROLE       REACHABLE  STORE             DEVICE    UNITS  JOURNALLED PAGES",
            "node-001  primary    yes        0000000000000abc  /dev/sdb      2                 2",
            "node-002  secondary  yes        0000000000000abc  /dev/sdb      1                 1",
            "node-003  secondary  no         0000000000000abc  /dev/sdb      -                 -",
            "",
            "UNIT  OFFSET   SAME  NODE-001            NODE-002                                NODE-003",
            "0     0 KiB    yes   7.8 at 0x100000     7.8 at 0x200000, 1 page in the journal  ?",
            "3     192 KiB  no    7.9 in the journal  zero                                    ?",
        ]
    );
    let empty = location(vec![("node-001", true, vec![])]);
    assert!(
        show::location(&block, &empty).ends_with("nothing was written to this block: it reads as zeroes\n")
    );
    assert_eq!(json::location(&block, &reply)["replicas"][0]["units"][1]["version"], "7.9");
}

#[test]
fn latencies_have_units_that_fit() {
    let stage = Latency {
        name: "write.total".into(),
        count: 1_000_000,
        us_p50: 86,
        us_p99: 1_240,
        us_p999: 9_000,
        us_max: 2_100_000,
        us_mean: 99.5,
    };
    let counter = |name: &str, value| Counter { name: name.into(), value };
    let nodes = [
        NodePerf {
            node: 1,
            name: "node-001".into(),
            reachable: true,
            latencies: vec![stage],
            counters: vec![counter("copied_bytes", 3 << 30), counter("busy_answers", 7)],
        },
        NodePerf { node: 2, name: "node-002".into(), ..NodePerf::default() },
    ];
    assert_eq!(
        lines(&show::perf(&nodes)),
        [
            "node-001",
            "  STAGE          COUNT    MEAN    P50      P99    P99.9     MAX",
            "  write.total  1000000  100 µs  86 µs  1.24 ms  9.00 ms  2.10 s",
            "",
            "  COUNTER            VALUE",
            "  copied_bytes  3221225472  3 GiB",
            "  busy_answers           7",
            "",
            "node-002: does not answer",
        ]
    );
    let value = json::perf(&nodes);
    assert_eq!(value[0]["latencies"]["write.total"]["us_p99"], 1240);
    assert_eq!(value[0]["counters"]["copied_bytes"], 3u64 << 30);
    assert_eq!(value[1]["reachable"], false);
}
