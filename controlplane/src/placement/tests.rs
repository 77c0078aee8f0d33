//! What the planner decides for a small cluster: some nodes, one pool, and one group looked at.

use std::collections::BTreeSet;
use std::time::Duration;

use xsan_protocol::ids::{BootId, Incarnation, MapVersion, PoolId, StoreId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{DamagedStore, DataProcess, Durability, Group, Member};
use xsan_protocol::placement::place_what_fits;

use super::balance::balance;
use super::decide::decide;
use super::*;
use crate::api::sample;
use crate::lease::Health;
use crate::state::command::{Command, GroupChange, NewNode, NewVolume, SettingsChange};
use crate::state::{ClusterState, Departure};
use crate::timing::BALANCE_AFTER;

mod decide;
mod life;
mod slow;

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
        let incarnation = Incarnation(u64::from(node) * 1000 + life);
        let process =
            DataProcess { boot_id: BootId(boot), ..sample::process(StoreId(u64::from(node)), incarnation) };
        let damaged = DamagedStore { store: process.stores[0].id, intact_groups: Vec::new() };
        let damaged_stores = is_damaged.then_some(damaged).into_iter().collect();
        let present = self.state.map().nodes[&NodeId(node)].data.as_ref();
        let replaces = present.map(|data| data.incarnation);
        self.state.apply(&Command::DataStarted { node: NodeId(node), process, damaged_stores, replaces });
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

    /// The acting members of the group looked at, once it has followed a wish; `None` when it stays as it is.
    fn follow_group(&mut self) -> Option<Vec<NodeId>> {
        let epoch = self.group().epoch;
        self.follow();
        (self.group().epoch != epoch).then(|| self.acting())
    }

    fn led_by(&self, node: NodeId) -> usize {
        self.state.map().groups.values().filter(|group| group.primary == Some(node)).count()
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
