//! The decision table, one row a test: three nodes, one pool of three replicas, and one group looked at.

use std::time::Duration;

use xsan_protocol::ids::{BootId, Incarnation, MapVersion, PoolId, ShardIndex, StoreId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{DamagedStore, DataProcess, Durability, Group, Member, Store};
use xsan_protocol::placement::place_what_fits;

use super::balance::balance;
use super::decide::decide;
use super::*;
use crate::lease::Health;
use crate::state::ClusterState;
use crate::state::command::{Command, GroupChange, NewNode, NewVolume};

const GROUP: GroupId = GroupId::new(PoolId(1), 0);

/// A cluster whose changes are applied as they are decided.
struct Cluster {
    state: ClusterState,
    nodes: BTreeMap<NodeId, NodeView>,
    targets: Targets,
    memory: Memory,
    now: BootTime,
    proposals: Vec<Proposal>,
    /// Do primaries have their epochs settled at once?
    settles: bool,
}

impl Cluster {
    fn new(node_count: u32, replica_count: u8) -> Self {
        let mut cluster = Self {
            state: ClusterState::default(),
            nodes: BTreeMap::new(),
            targets: Targets::new(),
            memory: Memory::default(),
            now: BootTime(1),
            proposals: Vec::new(),
            settles: true,
        };
        (1..=node_count).for_each(|node| cluster.add_node(node));
        cluster.state.apply(&Command::CreateVolume(NewVolume {
            name: "vm".into(),
            size_bytes: 1 << 30,
            replica_count,
            policy: String::new(),
            durability: Durability::OnFlush,
            created_unix_ms: 1,
            request: 1,
            group_count: GROUPS_PER_POOL,
        }));
        cluster.place();
        cluster.confirm_all();
        cluster
    }

    fn add_node(&mut self, node: u32) {
        self.state.apply(&Command::AddNode(NewNode {
            cluster_id: "c1".into(),
            name: format!("node-{node}"),
            address: "127.0.0.1".parse().expect("an address"),
            control_port: 8080,
            failure_domain: String::new(),
            instance: u64::from(node),
            founder: node == 1,
        }));
        self.start(node, 1, 7, false);
    }

    fn place(&mut self) {
        let candidates = self.state.candidates(&Default::default());
        for pool in self.state.map().pools.values() {
            let placed = place_what_fits(pool, &candidates);
            self.targets.extend(placed.into_iter().map(|p| (p.group, p.replicas)));
        }
    }

    /// A data process comes up: life number `life`, on boot `boot`.
    fn start(&mut self, node: u32, life: u64, boot: u64, is_damaged: bool) {
        let process = DataProcess {
            incarnation: Incarnation(u64::from(node) * 1000 + life),
            boot_id: BootId(boot),
            shard_ports: vec![9100],
            nbd_port: 10809,
            stores: vec![Store {
                id: StoreId(u64::from(node)),
                capacity_bytes: 1 << 40,
                shard: ShardIndex(0),
                device: "/dev/x".into(),
                media: "ssd".into(),
                failed: false,
            }],
        };
        let damaged = DamagedStore { store: process.stores[0].id, intact_groups: Vec::new() };
        let damaged_stores = is_damaged.then_some(damaged).into_iter().collect();
        self.state.apply(&Command::DataStarted { node: NodeId(node), process, damaged_stores });
        let confirmed = MapVersion(0);
        self.nodes.insert(NodeId(node), NodeView { health: Health::Up, confirmed });
    }

    fn set_health(&mut self, node: NodeId, health: Health) {
        self.nodes.get_mut(&node).expect("a node").health = health;
    }

    fn fail_store(&mut self, node: NodeId) {
        let incarnation = self.state.map().nodes[&node].data.as_ref().expect("a data process").incarnation;
        let store = StoreId(u64::from(node.0));
        self.state.apply(&Command::StoreFailed { node, incarnation, store });
    }

    fn confirm_all(&mut self) {
        let version = self.state.version();
        self.nodes.values_mut().for_each(|node| node.confirmed = version);
    }

    fn group(&self) -> &Group {
        &self.state.map().groups[&GROUP]
    }

    fn primary(&self) -> NodeId {
        self.group().primary.expect("a primary")
    }

    /// An acting member that is not primary.
    fn secondary(&self) -> NodeId {
        let primary = self.group().primary;
        self.group().acting().find(|m| Some(m.node) != primary).expect("a secondary").node
    }

    fn acting(&self) -> Vec<NodeId> {
        self.group().acting().map(|member| member.node).collect()
    }

    fn learners(&self) -> Vec<NodeId> {
        self.group().learners().map(|member| member.node).collect()
    }

    fn others(&self, not: &[NodeId]) -> Vec<NodeId> {
        self.state.map().nodes.keys().copied().filter(|node| !not.contains(node)).collect()
    }

    fn wish(&mut self, node: NodeId, change: ProposedChange) {
        let epoch = self.group().epoch;
        self.proposals.push(Proposal { group: GROUP, epoch, node, change });
    }

    /// One decision, applied. Returns whether the group changed.
    fn step(&mut self) -> bool {
        let view = View { now: self.now, state: &self.state, nodes: &self.nodes, targets: &self.targets };
        let changes = decide(&view, &mut self.memory, &std::mem::take(&mut self.proposals));
        let epoch = self.group().epoch;
        self.apply(changes);
        if self.settles {
            self.settle();
        }
        self.group().epoch != epoch
    }

    /// Every acting member answers its primary.
    fn settle(&mut self) {
        let open = self.state.map().groups.values().filter(|group| !group.is_settled());
        let wish = |group: &Group| Proposal {
            group: group.id,
            epoch: group.epoch,
            node: group.primary.expect("it has one"),
            change: ProposedChange::Settle,
        };
        let wishes: Vec<Proposal> = open.map(wish).collect();
        let view = View { now: self.now, state: &self.state, nodes: &self.nodes, targets: &self.targets };
        let changes = decide(&view, &mut self.memory, &wishes);
        self.apply(changes.into_iter().filter(|change| change.settle).collect());
    }

    fn apply(&mut self, changes: Vec<GroupChange>) {
        if !changes.is_empty() {
            let count = u32::try_from(changes.len()).expect("few");
            let reply = self.state.apply(&Command::ReconfigureGroups(changes)).0;
            assert_eq!(reply, crate::state::command::Reply::Groups { changed: count, refused: 0 });
        }
    }

    fn rest(&mut self) {
        assert!(!self.step(), "nothing more to do");
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn balance(&mut self) -> usize {
        let view = View { now: self.now, state: &self.state, nodes: &self.nodes, targets: &self.targets };
        let changes = balance(&view, &mut self.memory);
        let count = changes.len();
        self.apply(changes);
        count
    }
}

#[test]
fn a_healthy_cluster_rests() {
    let mut cluster = Cluster::new(3, 3);
    cluster.rest();
    cluster.set_health(NodeId(2), Health::Assumed);
    cluster.rest();
}

#[test]
fn a_dead_secondary_leaves_and_comes_back_as_learner() {
    let mut cluster = Cluster::new(3, 3);
    let (primary, dead) = (cluster.primary(), cluster.secondary());
    cluster.set_health(dead, Health::Gone);
    assert!(cluster.step());
    assert_eq!(cluster.primary(), primary);
    assert_eq!(cluster.acting(), cluster.others(&[dead]));
    assert!(cluster.learners().is_empty());
    cluster.rest();

    cluster.start(dead.0, 2, 7, false);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [dead]);
    cluster.rest();

    cluster.wish(dead, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.acting().len(), 3);
    cluster.rest();
}

#[test]
fn the_groups_of_a_dead_primary_are_spread_over_the_others() {
    let mut cluster = Cluster::new(3, 3);
    let dead = cluster.primary();
    cluster.set_health(dead, Health::Gone);
    assert!(cluster.step());
    let [left, right] = cluster.others(&[dead])[..] else { panic!() };
    let count = |node| cluster.state.map().groups.values().filter(|g| g.primary == Some(node)).count();
    assert_eq!(count(left) + count(right), 256);
    assert!(count(left).abs_diff(count(right)) <= 2, "{} and {}", count(left), count(right));
}

#[test]
fn a_restarted_primary_is_a_learner_at_once() {
    let mut cluster = Cluster::new(3, 3);
    let restarted = cluster.primary();
    cluster.start(restarted.0, 2, 7, false);
    assert!(cluster.step());
    assert_ne!(cluster.primary(), restarted);
    assert_eq!(cluster.learners(), [restarted]);
    cluster.rest();
}

#[test]
fn a_live_primary_with_a_failed_store_hands_over_before_it_leaves() {
    let mut cluster = Cluster::new(3, 3);
    let failed = cluster.primary();
    cluster.fail_store(failed);
    assert!(cluster.step());
    assert_ne!(cluster.primary(), failed);
    assert!(cluster.acting().contains(&failed), "it may still answer reads");
    cluster.rest();
    cluster.confirm_all();
    assert!(cluster.step());
    assert_eq!(cluster.group().members.len(), 2);
    cluster.rest();
}

#[test]
fn a_secondary_that_was_primary_stays_until_it_knows() {
    let mut cluster = Cluster::new(3, 3);
    let old = cluster.primary();
    let to = cluster.secondary();
    let moved = GroupChange {
        group: GROUP,
        expected: cluster.group().epoch,
        primary: Some(to),
        members: cluster.group().members.clone(),
        settle: false,
    };
    cluster.apply(vec![moved]);
    cluster.wish(old, ProposedChange::Demote);
    cluster.rest();
    cluster.confirm_all();
    cluster.wish(old, ProposedChange::Demote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [old]);
}

#[test]
fn a_primary_that_does_not_get_on_hands_over_and_so_does_one_with_a_short_journal() {
    let mut cluster = Cluster::new(3, 3);
    let first = cluster.primary();
    cluster.wish(first, ProposedChange::Demote);
    assert!(cluster.step());
    let second = cluster.primary();
    assert_ne!(first, second);
    let third = cluster.others(&[first, second])[0];
    cluster.wish(third, ProposedChange::Lead);
    assert!(cluster.step());
    assert_eq!(cluster.primary(), third);
    assert_eq!(cluster.learners(), []);
}

#[test]
fn members_without_the_groups_past_leave_however_few_are_left() {
    let mut cluster = Cluster::new(3, 3);
    let members = cluster.others(&[cluster.primary()]);
    for member in &members {
        cluster.wish(*member, ProposedChange::Exclude);
        assert!(cluster.step());
    }
    assert_eq!(cluster.learners(), members);
    assert_eq!(cluster.group().acting().count(), 1);
}

#[test]
fn wishes_of_another_epoch_or_below_the_minimum_are_not_granted() {
    let mut cluster = Cluster::new(3, 3);
    let secondary = cluster.secondary();
    cluster.wish(secondary, ProposedChange::Demote);
    cluster.proposals[0].epoch = Epoch(99);
    cluster.rest();
    let primary = cluster.primary();
    let other = cluster.others(&[primary, secondary])[0];
    cluster.set_health(other, Health::Gone);
    assert!(cluster.step());
    cluster.wish(secondary, ProposedChange::Demote);
    cluster.rest();
}

#[test]
fn with_one_live_member_the_others_are_taken_in_again_when_they_are_back() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(b, Health::Gone);
    cluster.set_health(c, Health::Gone);
    cluster.rest();
    // Even after power loss: the live member has all that was acknowledged.
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.step());
    assert_eq!(cluster.acting(), [a, b]);
}

#[test]
fn below_the_minimum_the_live_one_goes_on_alone_after_a_while() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(b, Health::Gone);
    cluster.set_health(c, Health::Gone);
    cluster.rest();
    cluster.pass(Duration::from_secs(9));
    cluster.rest();
    cluster.pass(Duration::from_secs(2));
    assert!(cluster.step());
    assert_eq!(cluster.acting(), [a]);
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.step());
    assert_eq!((cluster.acting(), cluster.learners()), (vec![a], vec![b]));
}

#[test]
fn when_all_processes_restart_two_that_lost_nothing_are_enough() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    for node in [a, b, c] {
        cluster.set_health(node, Health::Gone);
    }
    cluster.rest();
    cluster.start(a.0, 2, 7, false);
    cluster.rest();
    cluster.start(b.0, 2, 7, false);
    assert!(cluster.step());
    assert_eq!(cluster.acting(), [a, b]);
    cluster.start(c.0, 2, 7, false);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [c]);
}

#[test]
fn after_power_loss_of_all_every_member_must_be_back() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    cluster.start(a.0, 2, 8, false);
    cluster.start(b.0, 2, 8, false);
    cluster.rest();
    cluster.pass(Duration::from_secs(60));
    cluster.rest();
    cluster.start(c.0, 2, 8, false);
    assert!(cluster.step());
    assert_eq!(cluster.acting(), [a, b, c]);
}

#[test]
fn who_was_only_taken_for_live_does_not_outweigh_who_lost_nothing() {
    let mut cluster = Cluster::new(2, 2);
    cluster.settles = false;
    let [a, b] = cluster.others(&[])[..] else { panic!() };
    // B has lost its power, and nobody knows: its lease still runs. A is killed and comes back, whole.
    cluster.start(a.0, 2, 7, false);
    assert!(cluster.step());
    assert_eq!(cluster.group().acting().map(|member| member.node).collect::<Vec<_>>(), [b]);
    assert_eq!(cluster.group().former.len(), 1);
    // B is back without what it had not flushed.
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.step());
    let acting: Vec<_> = cluster.group().acting().map(|member| member.node).collect();
    assert!(acting.contains(&a), "{acting:?}");
}

#[test]
fn a_damaged_member_comes_back_as_learner_when_others_are_whole() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.start(a.0, 2, 7, true);
    cluster.start(b.0, 2, 7, false);
    cluster.start(c.0, 2, 7, false);
    assert!(cluster.step());
    assert_eq!((cluster.acting(), cluster.learners()), (vec![b, c], vec![a]));
    assert!(cluster.group().member(a).expect("a learner").damaged);
    cluster.wish(a, ProposedChange::Promote);
    assert!(cluster.step());
    assert!(!cluster.group().member(a).expect("it acts").damaged);
    assert!(!cluster.state.is_damaged(a, GROUP));
}

#[test]
fn one_damaged_of_two_lets_the_whole_one_go_on_after_a_while() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    assert!(cluster.step());
    cluster.start(a.0, 2, 8, true);
    cluster.start(b.0, 2, 8, false);
    cluster.rest();
    cluster.pass(Duration::from_secs(11));
    assert!(cluster.step());
    assert_eq!((cluster.acting(), cluster.learners()), (vec![b], vec![a]));
}

#[test]
fn a_single_replica_follows_its_restarts() {
    let mut cluster = Cluster::new(1, 1);
    cluster.start(1, 2, 7, false);
    assert!(cluster.step());
    assert_eq!(cluster.group().members[0].incarnation, Incarnation(1002));
    cluster.start(1, 3, 8, false);
    assert!(cluster.step(), "after power loss too: it is all there is");
    cluster.rest();
}

#[test]
fn a_new_node_takes_its_share_over_one_step_at_a_time() {
    let mut cluster = Cluster::new(3, 3);
    cluster.add_node(4);
    cluster.place();
    cluster.confirm_all();
    cluster.rest();
    assert_eq!(cluster.balance(), 0, "well for no time yet");
    let mut steps = 0;
    loop {
        cluster.pass(Duration::from_secs(6));
        let moved = cluster.balance();
        assert!(moved <= 16 + 8);
        promote_all(&mut cluster);
        for _ in 0..4 {
            cluster.confirm_all();
            cluster.step();
        }
        steps += 1;
        if moved == 0 {
            break;
        }
        assert!(steps < 100, "it comes to an end");
    }
    for group in cluster.state.map().groups.values() {
        let mut members: Vec<_> = group.acting().map(|m| m.node).collect();
        let mut wanted: Vec<_> = cluster.targets[&group.id].iter().map(|r| r.node).collect();
        assert_eq!(group.primary, Some(wanted[0]));
        members.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(members, wanted);
    }
}

/// Resync ends everywhere.
fn promote_all(cluster: &mut Cluster) {
    let mut proposals = Vec::new();
    for group in cluster.state.map().groups.values() {
        proposals.extend(group.learners().map(|learner: &Member| Proposal {
            group: group.id,
            epoch: group.epoch,
            node: learner.node,
            change: ProposedChange::Promote,
        }));
    }
    cluster.proposals = proposals;
}
