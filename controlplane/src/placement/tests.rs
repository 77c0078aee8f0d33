//! The decision table, one row a test: three nodes, one pool of three replicas, and one group looked at.

use std::collections::BTreeSet;
use std::time::Duration;

use xsan_protocol::ids::{BootId, Incarnation, MapVersion, PoolId, ShardIndex, StoreId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{DamagedStore, DataProcess, Durability, Group, Member, Store};
use xsan_protocol::placement::place_what_fits;

use super::balance::balance;
use super::decide::decide;
use super::*;
use crate::lease::Health;
use crate::state::command::{Command, GroupChange, NewNode, NewVolume, SettingsChange};
use crate::state::{ClusterState, Departure};
use crate::timing::BALANCE_AFTER;

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
        self.nodes.insert(NodeId(node), NodeView { health: Health::Up, confirmed, slow: false });
    }

    fn set_health(&mut self, node: NodeId, health: Health) {
        self.nodes.get_mut(&node).expect("a node").health = health;
    }

    fn set_slow(&mut self, node: NodeId, slow: bool) {
        self.nodes.get_mut(&node).expect("a node").slow = slow;
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
        let view = View {
            now: self.now,
            state: &self.state,
            nodes: &self.nodes,
            targets: &self.targets,
            unsure: false,
        };
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
        let view = View {
            now: self.now,
            state: &self.state,
            nodes: &self.nodes,
            targets: &self.targets,
            unsure: false,
        };
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
        let view = View {
            now: self.now,
            state: &self.state,
            nodes: &self.nodes,
            targets: &self.targets,
            unsure: false,
        };
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
fn a_slow_member_becomes_a_learner_and_stays_one_for_as_long_as_it_is_slow() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.wish(slow, ProposedChange::Promote);
    cluster.rest();
    let other = cluster.secondary();
    cluster.set_slow(other, true);
    cluster.rest();
    cluster.set_slow(other, false);
    cluster.set_slow(slow, false);
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), []);
    cluster.rest();
}

#[test]
fn a_slow_primary_hands_over_before_it_becomes_a_learner() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.primary();
    cluster.set_slow(slow, true);
    cluster.step();
    assert_eq!(cluster.primary(), slow, "`follow_wishes` relieves it");
    assert!(cluster.follow() > 0);
    cluster.settle();
    cluster.confirm_all();
    assert_ne!(cluster.primary(), slow);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.balance();
    cluster.pass(BALANCE_AFTER);
    cluster.balance();
    assert_ne!(cluster.primary(), slow, "nor does it lead again by balance");
}

#[test]
fn a_slow_learner_with_everything_acts_at_once_where_it_is_needed() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    let (primary, dead) = (cluster.primary(), cluster.secondary());
    cluster.set_health(dead, Health::Gone);
    cluster.rest();
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert!(cluster.acting().contains(&slow));
    assert!(cluster.acting().contains(&primary));
    assert_eq!(cluster.acting().len(), 2);
}

#[test]
fn a_slow_learner_acts_where_another_member_does_not_get_on() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    let silent = cluster.secondary();
    cluster.wish(silent, ProposedChange::Demote);
    cluster.rest();
    cluster.wish(slow, ProposedChange::Promote);
    assert!(cluster.step());
    assert_eq!(cluster.acting().len(), 3);
    cluster.rest();
    cluster.wish(silent, ProposedChange::Demote);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [silent]);
}

#[test]
fn a_slow_node_can_be_removed() {
    let mut cluster = Cluster::new(4, 3);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.leave(slow, Departure::Leaving);
    let new = *cluster.others(&[&cluster.acting()[..], &[slow]].concat()).first().expect("a fourth node");
    assert!(cluster.step());
    assert_eq!(cluster.learners().len(), 2);
    cluster.wish(new, ProposedChange::Promote);
    assert!(cluster.step());
    cluster.step();
    assert!(cluster.acting().contains(&new));
    assert_eq!(cluster.group().member(slow), None);
}

#[test]
fn a_slow_member_acts_on_while_another_is_in_maintenance() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    let resting = cluster.others(&[slow, cluster.primary()])[0];
    cluster.set_maintenance(resting, true);
    cluster.set_slow(slow, true);
    cluster.rest();
}

#[test]
fn a_learner_that_can_not_go_on_gets_another_epoch() {
    let mut cluster = Cluster::new(3, 3);
    let slow = cluster.secondary();
    cluster.set_slow(slow, true);
    assert!(cluster.step());
    cluster.wish(slow, ProposedChange::Renew);
    cluster.rest();
    cluster.set_slow(slow, false);
    cluster.wish(slow, ProposedChange::Renew);
    assert!(cluster.step());
    assert_eq!(cluster.learners(), [slow]);
    cluster.rest();
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
fn a_store_that_had_failed_does_not_pass_for_whole_when_it_is_back() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    // B loses its power and what it had not flushed, a flush fails on A, and C is cut off.
    cluster.set_health(b, Health::Gone);
    cluster.fail_store(a);
    cluster.set_health(c, Health::Gone);
    cluster.start(b.0, 2, 8, false);
    cluster.start(a.0, 2, 7, false);
    cluster.pass(Duration::from_secs(60));
    cluster.rest();
    assert!(cluster.group().holders().any(|holder| holder.node == c), "it is waited for");
    cluster.start(c.0, 2, 7, false);
    assert!(cluster.step());
    assert!(cluster.acting().contains(&c), "it is the one that has everything");
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
    assert_eq!(cluster.group().former.len(), 2);
    // B is back without what it had not flushed.
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.step());
    let acting: Vec<_> = cluster.group().acting().map(|member| member.node).collect();
    assert!(acting.contains(&a), "{acting:?}");
    assert_eq!(cluster.primary(), a, "who surely has everything leads");
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

impl Cluster {
    fn set_maintenance(&mut self, node: NodeId, on: bool) {
        self.state.apply(&Command::SetMaintenance { node, on, force: true });
        assert_eq!(self.state.is_in_maintenance(node), on);
    }

    fn leave(&mut self, node: NodeId, departure: Departure) {
        let reply = self.state.apply(&Command::LeaveNode { node, departure }).0;
        assert_eq!(reply, crate::state::command::Reply::Done);
        self.place();
    }

    /// What the operator asked for, applied until nothing is left. Returns the number of changes.
    fn follow(&mut self) -> usize {
        let mut count = 0;
        loop {
            let view = View {
                now: self.now,
                state: &self.state,
                nodes: &self.nodes,
                targets: &self.targets,
                unsure: false,
            };
            let changes = super::life::follow_wishes(&view, &[]);
            if changes.is_empty() {
                return count;
            }
            count += changes.len();
            assert!(count <= 512, "it comes to an end");
            self.apply(changes);
        }
    }

    fn led_by(&self, node: NodeId) -> usize {
        self.state.map().groups.values().filter(|group| group.primary == Some(node)).count()
    }
}

#[test]
fn a_node_in_maintenance_hands_every_primary_over_and_leads_none_while_it_is_on() {
    let mut cluster = Cluster::new(3, 3);
    let resting = cluster.primary();
    let [left, right] = cluster.others(&[resting])[..] else { panic!() };
    let led = cluster.led_by(resting);
    cluster.set_maintenance(resting, true);
    assert_eq!(cluster.follow(), led);
    assert_eq!(cluster.led_by(resting), 0);
    assert!(cluster.led_by(left).abs_diff(cluster.led_by(right)) <= 2);
    assert!(cluster.acting().contains(&resting), "it keeps its replicas");
    cluster.confirm_all();
    // Balance would have it lead what it is preferred for.
    for _ in 0..20 {
        cluster.rest();
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        assert_eq!(cluster.led_by(resting), 0);
        assert_eq!(cluster.follow(), 0);
    }
    // Another primary dies: the third takes over, not the one in maintenance.
    cluster.set_health(left, Health::Gone);
    assert!(cluster.step());
    assert_eq!((cluster.led_by(resting), cluster.led_by(right)), (0, 256));
    // With nobody else left, it leads rather than that there is no I/O.
    cluster.set_health(left, Health::Up);
    let mut cluster = Cluster::new(1, 1);
    cluster.set_maintenance(NodeId(1), true);
    assert_eq!(cluster.follow(), 0);
    assert_eq!(cluster.led_by(NodeId(1)), 256);
}

#[test]
fn after_maintenance_a_node_leads_again() {
    let mut cluster = Cluster::new(3, 3);
    let resting = cluster.primary();
    let led = cluster.led_by(resting);
    cluster.set_maintenance(resting, true);
    cluster.follow();
    cluster.set_maintenance(resting, false);
    for _ in 0..64 {
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        cluster.confirm_all();
    }
    assert_eq!(cluster.led_by(resting), led);
}

#[test]
fn a_node_that_leaves_gives_its_replicas_away_and_no_group_ever_has_fewer() {
    let mut cluster = Cluster::new(4, 3);
    cluster.leave(NodeId(4), Departure::Leaving);
    let members = |cluster: &Cluster| {
        cluster.state.map().groups.values().filter(|group| group.member(NodeId(4)).is_some()).count()
    };
    assert!(members(&cluster) > 0);
    let mut steps = 0;
    while members(&cluster) > 0 {
        cluster.pass(Duration::from_secs(6));
        cluster.balance();
        promote_all(&mut cluster);
        for _ in 0..4 {
            cluster.confirm_all();
            cluster.step();
            let least = cluster.state.map().groups.values().map(|group| group.acting().count()).min();
            assert_eq!(least, Some(3));
        }
        steps += 1;
        assert!(steps < 100, "it comes to an end");
    }
    assert_eq!(cluster.led_by(NodeId(4)), 0);
    assert!(cluster.state.map().groups.values().all(|group| group.acting().count() == 3));
}

#[test]
fn a_group_goes_on_without_its_only_copy_once_the_operator_gave_that_up() {
    let mut cluster = Cluster::new(2, 1);
    let dead = cluster.primary();
    let other = cluster.others(&[dead])[0];
    cluster.set_health(dead, Health::Gone);
    cluster.rest();
    assert_eq!(cluster.follow(), 0, "nobody gave it up");
    let held = cluster.led_by(dead);
    cluster.leave(dead, Departure::Lost);
    cluster.rest();
    assert_eq!(cluster.follow(), held);
    assert_eq!((cluster.primary(), cluster.acting()), (other, vec![other]));
    assert_eq!(cluster.led_by(dead), 0);
    cluster.confirm_all();
    cluster.rest();
}

#[test]
fn a_lost_node_that_lives_keeps_its_groups_until_they_have_moved() {
    let mut cluster = Cluster::new(2, 1);
    let alive = cluster.primary();
    cluster.leave(alive, Departure::Lost);
    assert_eq!(cluster.follow(), 0);
    cluster.set_health(alive, Health::Assumed);
    assert_eq!(cluster.follow(), 0, "it may have a lease of an earlier leader");
}

#[test]
fn members_that_are_back_go_on_without_a_lost_one_and_those_that_are_not_are_waited_for() {
    let mut cluster = Cluster::new(3, 3);
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    cluster.start(a.0, 2, 8, false);
    cluster.set_health(b, Health::Gone);
    cluster.leave(c, Departure::Lost);
    assert_eq!(cluster.follow(), 0, "b may come back with what a lost in the power cut");
    cluster.start(b.0, 2, 8, false);
    cluster.rest();
    assert!(cluster.follow() > 0);
    assert_eq!(cluster.acting(), [a, b]);
    assert!(cluster.group().member(c).is_none());
}

#[test]
fn a_group_that_went_on_without_a_lost_node_does_so_again_when_that_was_not_settled() {
    let mut cluster = Cluster::new(3, 3);
    cluster.settles = false;
    let [a, b, c] = cluster.others(&[])[..] else { panic!() };
    cluster.set_health(c, Health::Gone);
    cluster.leave(c, Departure::Lost);
    cluster.start(a.0, 2, 8, false);
    cluster.start(b.0, 2, 8, false);
    assert!(cluster.follow() > 0);
    assert!(!cluster.group().is_settled());
    assert_eq!(cluster.follow(), 0, "it goes on already");
    cluster.start(a.0, 3, 9, false);
    cluster.start(b.0, 3, 9, false);
    cluster.rest();
    assert!(cluster.follow() > 0);
    assert_eq!(cluster.acting(), [a, b]);
}

mod planner {
    //! The planner with its clock and leases: who is left out, and when.

    use super::*;
    use crate::lease::{Beat, LeaseTable};
    use crate::placement::planner::Planner;
    use crate::timing::OUT_AFTER;

    /// Four nodes, three replicas; node 4 has been silent since `0`, the others beat at every step of 1 s.
    struct Cluster4 {
        cluster: Cluster,
        leases: LeaseTable,
        planner: Planner,
    }

    impl Cluster4 {
        fn new() -> Self {
            let cluster = Cluster::new(4, 3);
            let leases = LeaseTable::new(BootTime(0), Duration::from_secs(2));
            Self { cluster, leases, planner: Planner::default() }
        }

        /// Lets time pass; returns the number of groups that have a learner then.
        fn pass(&mut self, seconds: u64) -> usize {
            for _ in 0..seconds {
                self.cluster.pass(Duration::from_secs(1));
                let now = self.cluster.now;
                for node in 1..=3 {
                    let data = self.cluster.state.map().nodes[&NodeId(node)].data.as_ref();
                    let incarnation = data.map(|data| data.incarnation);
                    let map_version = self.cluster.state.version();
                    let beat = Beat {
                        node: NodeId(node),
                        incarnation,
                        stopped: None,
                        sent: now,
                        map_version,
                        heard: now,
                    };
                    self.leases.on_beat(now, &beat, incarnation, true);
                }
                let changes =
                    self.planner.plan(now, &self.cluster.state, &mut self.leases, &[], &BTreeSet::new());
                self.cluster.apply(changes);
                self.cluster.settle();
                self.leases.release();
            }
            self.cluster.state.map().groups.values().filter(|group| group.learners().count() > 0).count()
        }
    }

    #[test]
    fn a_node_gone_for_the_default_time_is_rebuilt_elsewhere() {
        let mut cluster = Cluster4::new();
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() - 10), 0);
        assert!(cluster.pass(20) > 0);
    }

    #[test]
    fn the_time_is_a_setting_of_the_cluster() {
        let mut cluster = Cluster4::new();
        let down_out_interval = Some(Duration::from_secs(30));
        cluster
            .cluster
            .state
            .apply(&Command::ChangeSettings(SettingsChange { down_out_interval, ..Default::default() }));
        assert_eq!(cluster.pass(25), 0);
        assert!(cluster.pass(15) > 0);
    }

    #[test]
    fn a_node_in_maintenance_is_not_rebuilt_however_long_it_is_gone() {
        let mut cluster = Cluster4::new();
        cluster.cluster.set_maintenance(NodeId(4), true);
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() + 60), 0);
        assert!(cluster.cluster.state.map().groups.values().all(|group| group.acting().count() >= 2));
        // The time in maintenance does not count afterwards.
        cluster.cluster.set_maintenance(NodeId(4), false);
        assert_eq!(cluster.pass(OUT_AFTER.as_secs() - 10), 0);
        assert!(cluster.pass(20) > 0);
    }

    #[test]
    fn a_dead_node_that_leaves_is_rebuilt_at_once() {
        let mut cluster = Cluster4::new();
        assert_eq!(cluster.pass(10), 0);
        cluster.cluster.leave(NodeId(4), Departure::Leaving);
        assert!(cluster.pass(2) > 0);
    }
}
