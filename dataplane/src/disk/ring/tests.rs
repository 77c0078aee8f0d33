use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::*;
use crate::disk::device::DeviceOptions;
use crate::io::DeviceRole;

const DEVICE_PAGES: usize = 512;
/// The ring goes by its own slots, and not by the role.
const CAPACITY: DeviceRole = DeviceRole::Capacity;

struct Bench {
    _directory: tempfile::TempDir,
    devices: Vec<FileDevice>,
}

fn bench(count: usize) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let devices = (0..count)
        .map(|index| {
            let options = DeviceOptions::new(directory.path().join(format!("store-{index}.img")));
            FileDevice::open(&options.create((DEVICE_PAGES * PAGE_SIZE) as u64)).unwrap()
        })
        .collect();
    Bench { _directory: directory, devices }
}

fn filled(pool: &'static BufferPool, pages: usize, value: u8) -> Buffer {
    let mut buffer = pool.alloc(pages * PAGE_SIZE).unwrap();
    buffer.fill(value);
    buffer.freeze()
}

fn run(ring: &mut DiskRing, device: usize, action: DiskAction) -> DiskCompletion {
    let mut out = Vec::new();
    ring.submit(device, action);
    ring.drain(&mut out).unwrap();
    assert_eq!(out.len(), 1);
    let Completed { slot, completion, .. } = out.pop().unwrap();
    assert_eq!(slot, device);
    completion
}

fn random() -> TestRng {
    // A fixed seed: a failure repeats.
    TestRng::deterministic_rng(RngAlgorithm::ChaCha)
}

/// Random reads, writes of several parts and flushes on two devices, a few turns' worth in flight at once, against
/// arrays in memory. Operations under way never overlap, as the journal and destage never let them.
#[test]
fn devices_hold_what_a_model_holds() {
    let bench = bench(2);
    let pool = BufferPool::anonymous(32 << 20);
    let other_pool = BufferPool::anonymous(16 << 20);
    let devices: Vec<&FileDevice> = bench.devices.iter().collect();
    let mut ring = DiskRing::new(&devices, &[pool], 8).unwrap();
    let mut model = [vec![0_u8; DEVICE_PAGES], vec![0_u8; DEVICE_PAGES]];
    let mut random = random();
    let mut below = |bound: usize| random.next_u32() as usize % bound;
    let mut expected = std::collections::HashMap::new();
    let mut id = 0;
    for round in 0..200 {
        // 16 actions (twice the ring's depth) on stripes of 32 pages that no other action of the round uses.
        for stripe in 0..16 {
            let (device, start) = (below(2), stripe * 32 + below(8));
            id += 1;
            let offset = (start * PAGE_SIZE) as u64;
            match below(8) {
                0 => {
                    expected.insert(id, (device, Vec::new()));
                    ring.submit(device, DiskAction::Flush { id, device: CAPACITY });
                }
                1..4 => {
                    let pages = 1 + below(20);
                    let buffer = pool.alloc(pages * PAGE_SIZE).unwrap();
                    expected.insert(id, (device, model[device][start..start + pages].to_vec()));
                    ring.submit(device, DiskAction::Read { id, device: CAPACITY, offset, buffer });
                }
                _ => {
                    let mut parts = Vec::new();
                    let mut at = start;
                    for _ in 0..1 + below(6) {
                        let (pages, value) = (1 + below(4), below(256) as u8);
                        let from = if below(4) == 0 { other_pool } else { pool };
                        parts.push(filled(from, pages, value));
                        model[device][at..at + pages].fill(value);
                        at += pages;
                    }
                    expected.insert(id, (device, Vec::new()));
                    ring.submit(device, DiskAction::Write { id, device: CAPACITY, offset, parts });
                }
            }
        }
        let mut out = Vec::new();
        ring.flush_submissions().unwrap();
        ring.drain(&mut out).unwrap();
        assert_eq!(out.len(), 16, "round {round}");
        for Completed { slot: device, completion, .. } in out {
            let (expected_device, pages) = expected.remove(&completion.id).expect("each completes once");
            assert_eq!(device, expected_device);
            if let DiskOk::Read(buffer) = completion.result.unwrap() {
                let read: Vec<u8> = buffer.chunks(PAGE_SIZE).map(|page| page[PAGE_SIZE / 2]).collect();
                assert_eq!(read, pages, "round {round}");
            }
        }
    }
    assert!(expected.is_empty());
    assert_eq!(ring.in_flight(), 0);
    for pool in [pool, other_pool] {
        assert!(pool.occupancy().iter().all(|(free, slots)| free == slots), "a buffer was kept: {pool:?}");
    }
    for (device, model) in bench.devices.iter().zip(&model) {
        let mut all = vec![0; DEVICE_PAGES * PAGE_SIZE];
        device.read_at(0, &mut all).unwrap();
        let pages: Vec<u8> = all.chunks(PAGE_SIZE).map(|page| page[0]).collect();
        assert!(pages == *model);
    }
}

#[test]
fn a_write_of_more_parts_than_one_call_takes_is_written_whole() {
    let directory = tempfile::tempdir().unwrap();
    let pages = IOV_MAX + 100;
    let options = DeviceOptions::new(directory.path().join("store.img")).create((pages * PAGE_SIZE) as u64);
    let device = FileDevice::open(&options).unwrap();
    let pool = BufferPool::anonymous(64 << 20);
    let mut ring = DiskRing::new(&[&device], &[pool], 8).unwrap();
    let mut parts: Vec<Buffer> = (0..pages).map(|index| filled(pool, 1, index as u8)).collect();
    // From the end of the arena to its start, so that no two are neighbours.
    parts.reverse();
    run(&mut ring, 0, DiskAction::Write { id: 1, device: CAPACITY, offset: 0, parts }).result.unwrap();
    assert_eq!((ring.counters().writes, ring.counters().written_bytes), (1, (pages * PAGE_SIZE) as u64));
    let mut all = vec![0; pages * PAGE_SIZE];
    device.read_at(0, &mut all).unwrap();
    for (index, page) in all.chunks(PAGE_SIZE).rev().enumerate() {
        assert!(page.iter().all(|byte| *byte == index as u8), "page {index}");
    }
}

#[test]
fn a_transfer_that_stops_early_goes_on_with_the_rest() {
    let bench = bench(1);
    let pool = BufferPool::anonymous(16 << 20);
    let mut ring = DiskRing::new(&[&bench.devices[0]], &[pool], 8).unwrap();
    let parts = vec![filled(pool, 2, 7), filled(pool, 1, 8), filled(pool, 3, 9)];
    ring.submit(0, DiskAction::Write { id: 5, device: CAPACITY, offset: 0, parts });
    // The kernel's part is played by hand: it took the entry and moved three of the six pages.
    let index = ring.backlog.pop_front().unwrap();
    assert!(ring.on_result(index, 3 * PAGE_SIZE as i32).is_none());
    assert!(ring.on_result(index, -libc::EAGAIN).is_none());
    ring.backlog.pop_back();
    let mut out = Vec::new();
    ring.drain(&mut out).unwrap();
    let [Completed { slot: 0, completion, .. }] = &out[..] else { panic!("{out:?}") };
    assert!(matches!(completion, DiskCompletion { id: 5, result: Ok(DiskOk::Written) }));
    let mut all = vec![1; 7 * PAGE_SIZE];
    bench.devices[0].read_at(0, &mut all).unwrap();
    let pages: Vec<u8> = all.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    assert_eq!(pages, [0, 0, 0, 9, 9, 9, 0], "the rest was not written at its place");
}

#[test]
fn a_transfer_that_moves_nothing_or_half_a_page_fails() {
    let bench = bench(1);
    let pool = BufferPool::anonymous(16 << 20);
    let mut ring = DiskRing::new(&[&bench.devices[0]], &[pool], 8).unwrap();
    for result in [0, 512, -libc::ENOSPC] {
        ring.submit(
            0,
            DiskAction::Write { id: 1, device: CAPACITY, offset: 0, parts: vec![filled(pool, 1, 1)] },
        );
        let index = ring.backlog.pop_front().unwrap();
        let completion = ring.on_result(index, result).unwrap().completion;
        let errno = if result < 0 { -result } else { libc::EIO };
        assert_eq!(completion.result.unwrap_err(), DiskError { errno });
    }
    assert_eq!(ring.counters().failures, 3);
}

#[test]
fn a_device_that_became_shorter_answers_with_an_error() {
    let bench = bench(1);
    let pool = BufferPool::anonymous(16 << 20);
    let mut ring = DiskRing::new(&[&bench.devices[0]], &[pool], 8).unwrap();
    std::fs::OpenOptions::new().write(true).open(bench.devices[0].path()).unwrap().set_len(8192).unwrap();
    let buffer = pool.alloc(4 * PAGE_SIZE).unwrap();
    let completion = run(&mut ring, 0, DiskAction::Read { id: 9, device: CAPACITY, offset: 0, buffer });
    assert_eq!(completion.result.unwrap_err(), DiskError { errno: libc::EIO });
}

#[test]
fn a_task_of_the_runtime_is_woken_for_completions() {
    let bench = bench(1);
    let pool = BufferPool::anonymous(16 << 20);
    let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().enable_timer().build().unwrap();
    runtime.block_on(async {
        let mut ring = DiskRing::new(&[&bench.devices[0]], &[pool], 8).unwrap();
        let mut waiter = ring.eventfd().waiter().unwrap();
        let mut out = Vec::new();
        for id in 0..500 {
            let offset = (id % DEVICE_PAGES as u64) * PAGE_SIZE as u64;
            ring.submit(
                0,
                DiskAction::Write { id, device: CAPACITY, offset, parts: vec![filled(pool, 1, id as u8)] },
            );
            ring.flush_submissions().unwrap();
            while out.is_empty() {
                let woken = monoio::time::timeout(std::time::Duration::from_secs(5), waiter.wait()).await;
                woken.expect("the ring never signalled").unwrap();
                ring.completions(&mut out);
            }
            let done = out.pop().unwrap();
            assert!(matches!((done.slot, done.completion.result), (0, Ok(DiskOk::Written))));
        }
    });
}

/// A shard that has no store could not start: with the default of one store for all cores, none of a host with more than one.
#[test]
fn a_ring_without_devices_is_one() {
    let mut ring = DiskRing::new(&[], &[BufferPool::anonymous(16 << 20)], 8).unwrap();
    ring.drain(&mut Vec::new()).unwrap();
    assert_eq!(ring.in_flight(), 0);
}
