//! Placement: which nodes and stores hold a group, and which of them is primary.
//!
//! Used by the control plane, when a pool is made and whenever nodes come and go. Pure functions of their
//! arguments, in integers only: every node computes the same answer from the same log, on any machine.
//!
//! Invariants
//! - The replicas of a group are on distinct nodes, and in distinct failure domains.
//! - No node holds more than its share of the replicas plus `LOAD_SLACK_PERCENT`, where capacities and failure
//!   domains leave that choice.
//! - A node that joins or leaves moves little more than its own share.
//!
//! Source: Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018;
//! weighted rendezvous hashing (Schindelhauer and Schomaker, 2005) for the stores of a node.

use std::collections::{BTreeMap, BTreeSet};

use crate::checksum::crc64;
use crate::error::Code;
use crate::ids::{GroupId, NodeId, StoreId};
use crate::map::Pool;

/// The failure domain of a node whose operator named none.
pub const DEFAULT_FAILURE_DOMAIN: &str = "default";

/// Points on the ring of a node of mean capacity: enough that the bound clips few of its groups.
const POINTS_PER_NODE: u64 = 256;
/// Most points of one node, whatever its capacity.
const POINTS_MAX: u64 = 4 * POINTS_PER_NODE;
/// How far above its share a node may be loaded. Below the promised 10 %, because shares are rounded up.
const LOAD_SLACK_PERCENT: u64 = 8;
/// How far above their even share primaries may gather, before the next replica is taken.
const PRIMARY_SLACK_PERCENT: u64 = 4;

/// A node that may hold replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub node: NodeId,
    pub failure_domain: String,
    /// Stores in use, with their capacities in bytes.
    pub stores: Vec<(StoreId, u64)>,
}

/// Where the replicas of one group belong; the first is the preferred primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    pub group: GroupId,
    pub replicas: Vec<Replica>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replica {
    pub node: NodeId,
    pub store: StoreId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    #[error("{nodes} nodes have a store, {replicas} replicas need as many")]
    TooFewNodes { nodes: usize, replicas: u8 },
    #[error("the nodes are in {domains} failure domains, {replicas} replicas need as many")]
    TooFewDomains { domains: usize, replicas: u8 },
}

impl PlacementError {
    pub const fn code(self) -> Code {
        Code::TooFewNodes
    }
}

/// Places every group of `pool`, in the order of the groups.
///
/// When every candidate is in [`DEFAULT_FAILURE_DOMAIN`], no domains were configured and each node counts as one.
///
/// # Errors
/// 108 `TooFewNodes`: fewer candidates with a store, or fewer failure domains, than replicas.
pub fn place(pool: &Pool, candidates: &[Candidate]) -> Result<Vec<Placement>, PlacementError> {
    let nodes = usable(candidates);
    let replicas = pool.replica_count;
    if nodes.len() < usize::from(replicas) {
        return Err(PlacementError::TooFewNodes { nodes: nodes.len(), replicas });
    }
    let domains = nodes.iter().map(|node| node.domain).collect::<BTreeSet<_>>().len();
    if domains < usize::from(replicas) {
        return Err(PlacementError::TooFewDomains { domains, replicas });
    }
    Ok(place_on(pool, &nodes, usize::from(replicas)))
}

/// Like [`place`], but with as many replicas as the candidates allow: what to aim for while nodes are missing.
pub fn place_what_fits(pool: &Pool, candidates: &[Candidate]) -> Vec<Placement> {
    let nodes = usable(candidates);
    let domains = nodes.iter().map(|node| node.domain).collect::<BTreeSet<_>>().len();
    place_on(pool, &nodes, domains.min(usize::from(pool.replica_count)))
}

/// A candidate with a store, its domain as a small number.
struct Usable<'a> {
    node: NodeId,
    domain: usize,
    capacity: u64,
    stores: &'a [(StoreId, u64)],
}

fn usable(candidates: &[Candidate]) -> Vec<Usable<'_>> {
    let none_configured =
        candidates.iter().all(|c| c.failure_domain.is_empty() || c.failure_domain == DEFAULT_FAILURE_DOMAIN);
    let mut numbers = BTreeMap::new();
    let mut nodes: Vec<_> = candidates.iter().filter(|c| !c.stores.is_empty()).collect();
    nodes.sort_by_key(|candidate| candidate.node);
    nodes
        .into_iter()
        .enumerate()
        .map(|(index, candidate)| {
            let next = numbers.len();
            let domain = if none_configured {
                index
            } else {
                *numbers.entry(candidate.failure_domain.as_str()).or_insert(next)
            };
            // In MiB, so that sums of products stay far below 2^64; never zero.
            let capacity = candidate.stores.iter().map(|(_, bytes)| bytes >> 20).sum::<u64>().max(1);
            Usable { node: candidate.node, domain, capacity, stores: &candidate.stores }
        })
        .collect()
}

fn place_on(pool: &Pool, nodes: &[Usable<'_>], replica_count: usize) -> Vec<Placement> {
    if replica_count == 0 {
        return pool.groups().map(|group| Placement { group, replicas: Vec::new() }).collect();
    }
    let ring = Ring::new(nodes);
    let total = u64::from(pool.group_count) * replica_count as u64;
    let bounds = shares(nodes, total, LOAD_SLACK_PERCENT);
    let mut loads = vec![0; nodes.len()];
    let walks: Vec<Vec<usize>> = pool
        .groups()
        .map(|group| {
            let chosen = ring.walk(nodes, group, replica_count, &mut loads, &bounds);
            chosen.iter().for_each(|&index| loads[index] += 1);
            chosen
        })
        .collect();
    let primary_bounds = shares(nodes, u64::from(pool.group_count), PRIMARY_SLACK_PERCENT);
    let mut primaries = vec![0; nodes.len()];
    pool.groups()
        .zip(walks)
        .map(|(group, mut chosen)| {
            let first = pick_primary(&chosen, &mut primaries, &primary_bounds);
            chosen[..=first].rotate_right(1);
            let replica = |&index: &usize| Replica {
                node: nodes[index].node,
                store: store_of(group, nodes[index].stores).expect("usable nodes have a store"),
            };
            Placement { group, replicas: chosen.iter().map(replica).collect() }
        })
        .collect()
}

/// Each node's share of `total` in proportion to its capacity, plus `slack` percent, rounded up.
fn shares(nodes: &[Usable<'_>], total: u64, slack: u64) -> Vec<u64> {
    let capacity: u64 = nodes.iter().map(|node| node.capacity).sum();
    let share = |node: &Usable<'_>| {
        let scaled = u128::from(total) * u128::from(node.capacity) * u128::from(100 + slack);
        u64::try_from(scaled.div_ceil(u128::from(capacity) * 100)).expect("a share is at most the total")
    };
    nodes.iter().map(share).collect()
}

/// The first of `chosen` that still has room for a primary, else the least loaded; counts it.
fn pick_primary(chosen: &[usize], primaries: &mut [u64], bounds: &[u64]) -> usize {
    let with_room = chosen.iter().position(|&index| primaries[index] < bounds[index]);
    let first = with_room.unwrap_or_else(|| {
        let least = chosen.iter().enumerate().min_by_key(|&(_, &index)| primaries[index]);
        least.expect("a group has at least one replica").0
    });
    primaries[chosen[first]] += 1;
    first
}

/// Points on a circle of 64-bit hashes, each of one node.
struct Ring {
    points: Vec<(u64, usize)>,
}

impl Ring {
    fn new(nodes: &[Usable<'_>]) -> Self {
        let total: u64 = nodes.iter().map(|node| node.capacity).sum();
        let mean = (total / nodes.len() as u64).max(1);
        let mut points = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let count = (POINTS_PER_NODE * node.capacity).div_ceil(mean).clamp(1, POINTS_MAX);
            points.extend((0..count).map(|point| (hash(&[u64::from(node.node.0), point]), index)));
        }
        points.sort_unstable();
        Self { points }
    }

    /// The nodes for `group`: clockwise from its hash, one per failure domain, none above its bound. When the
    /// bounds leave too few, they are given up for the rest of this group.
    fn walk(
        &self,
        nodes: &[Usable<'_>],
        group: GroupId,
        count: usize,
        loads: &mut [u64],
        bounds: &[u64],
    ) -> Vec<usize> {
        let position = hash(&[u64::from(group.0)]);
        let start = self.points.partition_point(|&(point, _)| point < position);
        let mut chosen: Vec<usize> = Vec::with_capacity(count);
        let mut domains: Vec<usize> = Vec::with_capacity(count);
        for bounded in [true, false] {
            for step in 0..self.points.len() {
                if chosen.len() == count {
                    return chosen;
                }
                let index = self.points[(start + step) % self.points.len()].1;
                let full = bounded && loads[index] >= bounds[index];
                if full || domains.contains(&nodes[index].domain) {
                    continue;
                }
                chosen.push(index);
                domains.push(nodes[index].domain);
            }
        }
        assert_eq!(chosen.len(), count, "the caller asks for no more replicas than there are domains");
        chosen
    }
}

/// The store of a node that holds `group`: by rendezvous hash, weighted with capacity. `None`: no stores.
pub fn store_of(group: GroupId, stores: &[(StoreId, u64)]) -> Option<StoreId> {
    // The weighted rendezvous winner has the least −log(hash) / weight; compared by cross-multiplication.
    let score = |&(store, bytes): &(StoreId, u64)| {
        (negative_log2(hash(&[u64::from(group.0), store.0])), (bytes >> 20).max(1), store)
    };
    stores
        .iter()
        .map(score)
        .min_by(|a, b| {
            let (left, right) = (u128::from(a.0) * u128::from(b.1), u128::from(b.0) * u128::from(a.1));
            left.cmp(&right).then(a.2.cmp(&b.2))
        })
        .map(|(_, _, store)| store)
}

/// −log2(hash / 2^64) in 1/2^32: integers, because floating logarithms differ between machines.
fn negative_log2(hash: u64) -> u64 {
    const FRACTION_BITS: u32 = 32;
    let value = hash.max(1);
    let exponent = u64::from(value.ilog2());
    // The mantissa in [1, 2), as 1.63 fixed point; each squaring yields one bit of the logarithm.
    let mut mantissa = u128::from(value << value.leading_zeros());
    let mut fraction = 0u64;
    for _ in 0..FRACTION_BITS {
        mantissa = (mantissa * mantissa) >> 63;
        fraction <<= 1;
        if mantissa >> 64 != 0 {
            fraction |= 1;
            mantissa >>= 1;
        }
    }
    (64 << FRACTION_BITS) - ((exponent << FRACTION_BITS) | fraction)
}

/// A well-mixed hash: CRC-64 spreads, and the finisher of SplitMix64 breaks its linearity.
fn hash(words: &[u64]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut mixed = crc64(&bytes).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests;
