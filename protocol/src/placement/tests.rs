use super::*;
use crate::ids::PoolId;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn pool(replica_count: u8, group_count: u16) -> Pool {
    Pool { id: PoolId(1), replica_count, min_replicas: 1, group_count }
}

fn node(id: u32, domain: &str, gib: u64) -> Candidate {
    Candidate {
        node: NodeId(id),
        failure_domain: domain.to_owned(),
        stores: vec![(StoreId(u64::from(id) * 10), gib * GIB)],
    }
}

fn equal_nodes(count: u32) -> Vec<Candidate> {
    (1..=count).map(|id| node(id, DEFAULT_FAILURE_DOMAIN, 100)).collect()
}

/// Groups such that a node holds about 256 replicas, as a power of two.
fn groups_for(nodes: u32, replicas: u32) -> u16 {
    u16::try_from((nodes * 256 / replicas).next_power_of_two()).expect("small")
}

fn loads(placed: &[Placement]) -> BTreeMap<NodeId, u64> {
    let mut loads = BTreeMap::new();
    placed.iter().flat_map(|p| &p.replicas).for_each(|r| *loads.entry(r.node).or_default() += 1);
    loads
}

#[test]
fn load_is_within_a_tenth_of_the_mean_and_primaries_are_even() {
    for count in [3u32, 4, 5, 6, 8, 12, 16, 24] {
        let groups = groups_for(count, 3);
        let placed = place(&pool(3, groups), &equal_nodes(count)).expect("enough nodes");
        let loads = loads(&placed);
        let mean = f64::from(groups) * 3.0 / f64::from(count);
        let max = *loads.values().max().expect("nodes") as f64;
        assert!(max / mean <= 1.10, "{count} nodes: max {max}, mean {mean}");

        let mut primaries: BTreeMap<NodeId, u64> = BTreeMap::new();
        placed.iter().for_each(|p| *primaries.entry(p.replicas[0].node).or_default() += 1);
        let mean = f64::from(groups) / f64::from(count);
        let max = *primaries.values().max().expect("nodes") as f64;
        assert!(max / mean <= 1.10, "{count} nodes: primaries max {max}, mean {mean}");
    }
}

#[test]
fn a_node_that_joins_moves_at_most_half_more_than_its_share() {
    for count in [4u32, 5, 6, 8, 12, 16, 24] {
        let pool = pool(3, groups_for(count, 3));
        let before = place(&pool, &equal_nodes(count - 1)).expect("enough nodes");
        let after = place(&pool, &equal_nodes(count)).expect("enough nodes");
        let moved: usize = before
            .iter()
            .zip(&after)
            .map(|(old, new)| new.replicas.iter().filter(|r| !old.replicas.contains(r)).count())
            .sum();
        let limit = 1.5 / f64::from(count) * f64::from(pool.group_count) * 3.0;
        assert!(moved as f64 <= limit, "{count} nodes: moved {moved}, limit {limit}");
    }
}

#[test]
fn capacity_is_followed() {
    let mut nodes = equal_nodes(7);
    nodes.push(node(8, DEFAULT_FAILURE_DOMAIN, 200));
    let loads = loads(&place(&pool(2, 1024), &nodes).expect("enough nodes"));
    let small = loads[&NodeId(1)] as f64;
    let large = loads[&NodeId(8)] as f64;
    assert!((1.6..2.4).contains(&(large / small)), "{large} on the large node, {small} on a small one");
}

#[test]
fn too_few_nodes_or_domains_are_refused() {
    let error = place(&pool(3, 256), &equal_nodes(2)).expect_err("two nodes");
    assert_eq!(error, PlacementError::TooFewNodes { nodes: 2, replicas: 3 });
    let racks = vec![node(1, "a", 1), node(2, "a", 1), node(3, "b", 1)];
    let error = place(&pool(3, 256), &racks).expect_err("two racks");
    assert_eq!(error, PlacementError::TooFewDomains { domains: 2, replicas: 3 });
    assert_eq!(error.code(), Code::TooFewNodes);
    assert!(place(&pool(3, 256), &equal_nodes(3)).is_ok(), "no domains configured: nodes are enough");
    let placed = place_what_fits(&pool(3, 256), &racks);
    assert!(placed.iter().all(|p| p.replicas.len() == 2));
}

#[test]
fn a_group_goes_to_a_store_by_weight_and_stays_when_another_is_added() {
    let two = [(StoreId(1), 100 * GIB), (StoreId(2), 300 * GIB)];
    let three = [two[0], two[1], (StoreId(3), 100 * GIB)];
    let on_second = (0..4000).filter(|&g| store_of(GroupId(g), &two) == Some(StoreId(2))).count();
    assert!((2800..3200).contains(&on_second), "{on_second} of 4000 on three quarters of the capacity");
    for group in (0..4000).map(GroupId) {
        let (old, new) = (store_of(group, &two), store_of(group, &three));
        assert!(new == old || new == Some(StoreId(3)), "{group} moved between stores that stayed");
    }
    assert_eq!(store_of(GroupId(0), &[]), None);
}

proptest! {
    #[test]
    fn replicas_are_in_distinct_domains(
        domains in prop::collection::vec(0u8..6, 3..20),
        capacities in prop::collection::vec(1u64..2000, 20),
        replicas in 1u8..4,
    ) {
        let nodes: Vec<_> = domains
            .iter()
            .enumerate()
            .map(|(i, d)| node(i as u32 + 1, &format!("rack-{d}"), capacities[i]))
            .collect();
        let distinct = domains.iter().collect::<BTreeSet<_>>().len();
        match place(&pool(replicas, 64), &nodes) {
            Err(_) => prop_assert!(distinct < usize::from(replicas)),
            Ok(placed) => for placement in placed {
                prop_assert_eq!(placement.replicas.len(), usize::from(replicas));
                let used: BTreeSet<_> =
                    placement.replicas.iter().map(|r| domains[r.node.0 as usize - 1]).collect();
                prop_assert_eq!(used.len(), usize::from(replicas));
            },
        }
    }

    #[test]
    fn the_order_of_candidates_does_not_matter(count in 3u32..10, seed in any::<u64>()) {
        let nodes = equal_nodes(count);
        let mut shuffled = nodes.clone();
        shuffled.sort_by_key(|c| hash(&[seed, u64::from(c.node.0)]));
        prop_assert_eq!(place(&pool(3, 64), &nodes), place(&pool(3, 64), &shuffled));
    }
}
