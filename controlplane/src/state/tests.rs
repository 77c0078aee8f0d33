use super::command::{GroupChange, NewNode, NewVolume, SettingsChange};
use super::scrub::ScrubEnd;
use super::*;
use crate::api::sample;
use xsan_protocol::error::Code;
use xsan_protocol::ids::{BootId, Incarnation, StoreId};
use xsan_protocol::limits::GROUPS_PER_POOL;
use xsan_protocol::map::{DamagedStore, Durability};
use xsan_protocol::proto;

fn new_node(name: &str, instance: u64) -> Command {
    Command::AddNode(NewNode {
        cluster_id: "c1".into(),
        name: name.into(),
        address: "127.0.0.1".parse().expect("an address"),
        control_port: 8080,
        failure_domain: "default".into(),
        instance,
        founder: instance == 1,
    })
}

fn started(node: u32, incarnation: u64, is_damaged: bool) -> Command {
    // The first life of a node is a multiple of 1000 in these tests, and each later one the next number.
    let replaces = (!incarnation.is_multiple_of(1000)).then(|| incarnation - 1);
    started_after(replaces, node, incarnation, is_damaged)
}

fn started_after(replaces: Option<u64>, node: u32, incarnation: u64, is_damaged: bool) -> Command {
    let process = sample::process(StoreId(u64::from(node) * 100), Incarnation(incarnation));
    let damaged = DamagedStore { store: process.stores[0].id, intact_groups: vec![GroupId(1 << 16 | 6)] };
    let damaged_stores = is_damaged.then_some(damaged).into_iter().collect();
    let replaces = replaces.map(Incarnation);
    Command::DataStarted { node: NodeId(node), process, damaged_stores, replaces }
}

fn attach(volume: &str, node: u32, incarnation: u64) -> Command {
    Command::Attach { volume: volume.into(), node: NodeId(node), incarnation: Incarnation(incarnation) }
}

/// Of the first volume.
fn detach(node: u32, incarnation: u64) -> Command {
    let incarnation = Incarnation(incarnation);
    Command::Detach { volume: VolumeId(1), node: NodeId(node), incarnation }
}

fn new_volume(name: &str, request: u64) -> Command {
    Command::CreateVolume(NewVolume {
        name: name.into(),
        size_bytes: 1 << 30,
        replica_count: 3,
        policy: String::new(),
        durability: Durability::OnFlush,
        created_unix_ms: 1,
        request,
        group_count: GROUPS_PER_POOL,
    })
}

/// Three nodes with a store each.
fn cluster() -> ClusterState {
    let mut state = ClusterState::default();
    for node in 1..=3 {
        state.apply(&new_node(&format!("node-{node}"), u64::from(node)));
        state.apply(&started(node, u64::from(node) * 1000, false));
    }
    state
}

/// Applies what must be refused; returns the number.
fn refused(state: &mut ClusterState, command: Command) -> Code {
    let before = state.clone();
    let (Reply::Refused(refusal), touched) = state.apply(&command) else { panic!("{command} was accepted") };
    assert!(touched.is_empty());
    assert_eq!(*state, before, "a refused command changes nothing");
    assert!(!refusal.object.is_empty() && !refusal.message.is_empty());
    refusal.code
}

fn any_group(state: &ClusterState) -> xsan_protocol::map::Group {
    state.map.groups[&GroupId::new(PoolId(1), 5)].clone()
}

#[test]
fn nodes_join_once_and_the_first_names_the_cluster() {
    let mut state = ClusterState::default();
    // A node that joined before the founder had its place once took the founder's id, and Raft had two nodes 1.
    assert_eq!(refused(&mut state, new_node("early", 2)), Code::NoQuorum);
    assert_eq!(state.apply(&new_node("a", 1)).0, Reply::Node(NodeId(1)));
    assert_eq!(state.map().cluster_id, "c1");
    let version = state.version();
    assert_eq!(state.apply(&new_node("a", 1)).0, Reply::Node(NodeId(1)), "the same node asks again");
    assert_eq!(state.version(), version, "nothing changed");
    assert_eq!(refused(&mut state, new_node("a", 2)), Code::NodeIdTaken);
    let Command::AddNode(mut other) = new_node("b", 3) else { unreachable!() };
    other.cluster_id = "c2".into();
    assert_eq!(refused(&mut state, Command::AddNode(other)), Code::ClusterIdMismatch);
    assert_eq!(refused(&mut state, new_node("no spaces", 4)), Code::InvalidArgument);
    assert_eq!(state.apply(&new_node("b", 3)).0, Reply::Node(NodeId(2)));
}

#[test]
fn voters_are_shown_whichever_comes_first() {
    let mut state = ClusterState::default();
    assert!(state.set_voters([NodeId(1)].into()).is_empty());
    state.apply(&new_node("a", 1));
    state.apply(&new_node("b", 2));
    assert!(state.map().nodes[&NodeId(1)].voter && !state.map().nodes[&NodeId(2)].voter);
    let version = state.version();
    let touched = state.set_voters([NodeId(1), NodeId(2)].into());
    assert_eq!(touched.nodes, [NodeId(2)].into());
    assert!(state.version() > version);
}

#[test]
fn the_first_volume_of_a_replica_count_makes_its_pool() {
    let mut state = cluster();
    let (Reply::Volume(volume), touched) = state.apply(&new_volume("vm-1", 11)) else { panic!() };
    assert_eq!(touched.groups.len(), usize::from(GROUPS_PER_POOL));
    let pool = &state.map().pools[&volume.pool];
    assert_eq!((pool.replica_count, pool.min_replicas), (3, 2));
    let mut primaries = BTreeMap::<NodeId, u32>::new();
    for group in pool.groups().map(|id| &state.map().groups[&id]) {
        assert_eq!(group.acting().count(), 3);
        *primaries.entry(group.primary.expect("a primary")).or_default() += 1;
    }
    assert!(primaries.values().all(|count| (75..=90).contains(count)), "{primaries:?}");

    let (_, touched) = state.apply(&new_volume("vm-2", 12));
    assert!(touched.groups.is_empty(), "the pool is there already");
}

#[test]
fn a_repeated_request_makes_one_volume_and_ids_are_not_reused() {
    let mut state = cluster();
    let (Reply::Volume(first), _) = state.apply(&new_volume("vm-1", 11)) else { panic!() };
    let (again, touched) = state.apply(&new_volume("vm-1", 11));
    assert_eq!((again, touched.is_empty()), (Reply::Volume(first.clone()), true));
    assert_eq!(refused(&mut state, new_volume("vm-1", 12)), Code::VolumeExists);
    assert_eq!(state.apply(&Command::DeleteVolume { volume: VolumeId(1) }).0, Reply::Done);
    let (Reply::Volume(second), _) = state.apply(&new_volume("vm-1", 13)) else { panic!() };
    assert!(second.id > first.id && second.lineage != first.lineage);
}

#[test]
fn volumes_are_checked() {
    let mut state = cluster();
    let with = |change: fn(&mut NewVolume)| {
        let Command::CreateVolume(mut new) = new_volume("vm", 1) else { unreachable!() };
        change(&mut new);
        Command::CreateVolume(new)
    };
    assert_eq!(refused(&mut state, with(|v| v.size_bytes = 0)), Code::InvalidArgument);
    assert_eq!(refused(&mut state, with(|v| v.size_bytes = 1000)), Code::InvalidArgument);
    assert_eq!(refused(&mut state, with(|v| v.name = "../etc".into())), Code::InvalidArgument);
    assert_eq!(refused(&mut state, with(|v| v.replica_count = 0)), Code::InvalidArgument);
    assert_eq!(refused(&mut state, with(|v| v.replica_count = 4)), Code::TooFewNodes);

    state.apply(&new_volume("vm", 1));
    let resize =
        |size_bytes, allow_shrink| Command::ResizeVolume { name: "vm".into(), size_bytes, allow_shrink };
    assert_eq!(refused(&mut state, resize(1 << 20, false)), Code::ShrinkLosesData);
    let (Reply::Volume(volume), _) = state.apply(&resize(1 << 20, true)) else { panic!() };
    assert_eq!(volume.size_bytes, 1 << 20);
    assert_eq!(refused(&mut state, Command::DeleteVolume { volume: VolumeId(9) }), Code::VolumeNotFound);
}

#[test]
fn an_attached_volume_is_not_deleted_until_its_data_process_ends() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let attach = attach("vm", 2, 2000);
    state.apply(&attach);
    assert!(state.apply(&attach).1.is_empty(), "attached already");
    assert_eq!(refused(&mut state, Command::DeleteVolume { volume: VolumeId(1) }), Code::VolumeAttached);
    state.apply(&started(2, 2001, false));
    assert_eq!(state.apply(&Command::DeleteVolume { volume: VolumeId(1) }).0, Reply::Done);
}

/// A command that one life of a data process had proposed came after the next life was registered, and undid what that had.
#[test]
fn what_an_earlier_life_proposed_does_not_touch_the_next() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    state.apply(&started(2, 2001, false));
    assert_eq!(refused(&mut state, attach("vm", 2, 2000)), Code::LifeNotRegistered);
    assert!(!state.apply(&attach("vm", 2, 2001)).1.is_empty());
    assert!(state.apply(&started(2, 2001, false)).1.is_empty(), "the same life again");
    assert!(state.apply(&detach(2, 2000)).1.is_empty());
    let late = started_after(None, 2, 2000, false);
    assert_eq!(refused(&mut state, late), Code::LifeNotRegistered);
    assert!(state.is_registered(NodeId(2), Incarnation(2001)));
    assert_eq!(state.map.volumes[&VolumeId(1)].attached_nodes, [NodeId(2)]);
    // The clock of a host may go back, and with it the numbers of its lives.
    assert_eq!(state.apply(&started_after(Some(2001), 2, 1999, false)).0, Reply::Done);
}

/// A delete that had to be tried again found another volume under that name, and took that too.
#[test]
fn a_delete_is_of_one_volume_whatever_its_name() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let delete = Command::DeleteVolume { volume: VolumeId(1) };
    assert_eq!(state.apply(&delete).0, Reply::Done);
    state.apply(&new_volume("vm", 2));
    assert_eq!(refused(&mut state, delete), Code::VolumeNotFound);
    assert!(state.map.volume_named("vm").is_some());
}

/// Nothing limited them but the assertion that a map fits into a frame, which every node would have met.
#[test]
fn a_map_with_all_volumes_that_there_may_be_fits_into_a_frame() {
    use prost::Message;
    use xsan_protocol::limits::{LINK_FRAME_MAX, NAME_BYTES_MAX, NODES_MAX, VOLUME_MESSAGE_MAX, VOLUMES_MAX};

    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let mut largest = state.map.volumes[&VolumeId(1)].clone();
    largest.name = "n".repeat(NAME_BYTES_MAX);
    largest.policy = "p".repeat(NAME_BYTES_MAX);
    (largest.size_bytes, largest.created_unix_ms) = (u64::MAX, u64::MAX);
    largest.attached_nodes = vec![NodeId(u32::MAX); NODES_MAX];
    for number in 2..=VOLUMES_MAX {
        let id = VolumeId(number as u32);
        let lineage = xsan_protocol::ids::Lineage(u64::MAX);
        state.map.volumes.insert(id, xsan_protocol::map::Volume { id, lineage, ..largest.clone() });
    }
    let message = proto::ClusterMap::from(&state.map);
    let volumes = message.volumes.iter().map(|volume| volume.encoded_len() + 4);
    assert!(volumes.max() <= Some(VOLUME_MESSAGE_MAX));
    assert!(message.encoded_len() <= LINK_FRAME_MAX);
    assert_eq!(refused(&mut state, new_volume("one-more", 2)), Code::ClusterFull);
    assert!(matches!(state.apply(&new_volume("vm", 1)).0, Reply::Volume(_)), "it was made before");
}

#[test]
fn a_group_changes_by_compare_and_set_on_its_epoch() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let group = any_group(&state);
    let since = state.primary_since(group.id);
    let other = group.acting().find(|m| Some(m.node) != group.primary).expect("three members").node;
    let change = GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: Some(other),
        members: group.members.clone(),
        settle: false,
    };
    let batch = Command::ReconfigureGroups(vec![change.clone(), change]);
    assert_eq!(state.apply(&batch).0, Reply::Groups { changed: 1, refused: 1 });
    let changed = any_group(&state);
    assert_eq!((changed.epoch, changed.primary), (group.epoch.next(), Some(other)));
    assert!(state.primary_since(group.id) > since);
    assert_eq!(state.primary_since(group.id), state.version());
    let version = state.version();
    assert_eq!(state.apply(&batch).0, Reply::Groups { changed: 0, refused: 2 });
    assert_eq!(state.version(), version, "no effect, no new version");
}

#[test]
fn changes_that_do_not_hold_together_are_refused() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let group = any_group(&state);
    let valid = GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: group.primary,
        members: group.members.clone(),
        settle: false,
    };
    let broken: [fn(&mut GroupChange); 5] = [
        |c| c.primary = None,
        |c| c.members.clear(),
        |c| c.members[1].node = c.members[0].node,
        |c| c.members[0].node = NodeId(99),
        |c| c.group = GroupId::new(PoolId(9), 0),
    ];
    for break_it in broken {
        let mut change = valid.clone();
        break_it(&mut change);
        let reply = state.apply(&Command::ReconfigureGroups(vec![change])).0;
        assert_eq!(reply, Reply::Groups { changed: 0, refused: 1 });
    }
}

#[test]
fn damage_is_remembered_until_the_learner_is_promoted() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let group = any_group(&state);
    state.apply(&started(2, 2001, true));
    assert!(state.is_damaged(NodeId(2), group.id));
    assert!(!state.is_damaged(NodeId(2), GroupId::new(PoolId(1), 6)), "the store has this one whole");
    let mut change = GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: Some(NodeId(1)),
        members: group.members.clone(),
        settle: false,
    };
    for member in change.members.iter_mut().filter(|m| m.node == NodeId(2)) {
        (member.learner, member.damaged, member.incarnation) = (true, true, Incarnation(2001));
    }
    state.apply(&Command::ReconfigureGroups(vec![change.clone()]));
    assert!(state.is_damaged(NodeId(2), group.id));
    // The store may have learnt what it still knew of, and count as whole.
    state.apply(&started(2, 2002, false));
    assert!(state.is_damaged(NodeId(2), group.id), "it was no learner since");
    change.expected = group.epoch.next();
    for member in change.members.iter_mut().filter(|m| m.node == NodeId(2)) {
        (member.learner, member.damaged, member.incarnation) = (false, false, Incarnation(2002));
    }
    state.apply(&Command::ReconfigureGroups(vec![change]));
    assert!(!state.is_damaged(NodeId(2), group.id));
}

/// Between the plan and its commit the learner's process had died and come up with damage: that was cleared.
#[test]
fn a_promotion_heals_the_life_that_was_promoted_and_no_later_one() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let group = any_group(&state);
    let mut change = GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: Some(NodeId(1)),
        members: group.members.clone(),
        settle: false,
    };
    change.members.iter_mut().filter(|m| m.node == NodeId(2)).for_each(|member| member.learner = true);
    state.apply(&Command::ReconfigureGroups(vec![change.clone()]));
    state.apply(&started(2, 2001, true));
    assert!(state.is_damaged(NodeId(2), group.id));
    change.expected = group.epoch.next();
    change.members.iter_mut().for_each(|member| member.learner = false);
    state.apply(&Command::ReconfigureGroups(vec![change]));
    assert!(state.is_damaged(NodeId(2), group.id));
}

#[test]
fn a_failed_store_of_an_earlier_life_is_old_news() {
    let mut state = cluster();
    let failed = |incarnation| Command::StoreFailed {
        node: NodeId(2),
        incarnation: Incarnation(incarnation),
        store: StoreId(200),
    };
    assert!(state.apply(&failed(1)).1.is_empty());
    assert_eq!(state.candidates(&BTreeSet::new()).len(), 3);
    assert!(!state.apply(&failed(2000)).1.is_empty());
    assert_eq!(state.candidates(&BTreeSet::new()).len(), 2);
}

#[test]
fn a_life_that_tells_of_an_earlier_failure_may_lack_writes() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let members = |state: &ClusterState, node: u32| -> Vec<BootId> {
        let members = state.map().groups.values().flat_map(|group| &group.members);
        members.filter(|member| member.node == NodeId(node)).map(|member| member.boot_id).collect()
    };
    assert!(members(&state, 2).contains(&BootId(7)));
    let group = any_group(&state);
    let mut again = started(2, 2001, false);
    let Command::DataStarted { process, .. } = &mut again else { unreachable!("it starts a process") };
    process.stores[0].failed_before = true;
    state.apply(&again);
    assert!(members(&state, 2).iter().all(|boot| *boot == BootId(0)));
    assert!(members(&state, 3).iter().all(|boot| *boot == BootId(7)));
    // What was decided before that was known, and does nothing to the acting set.
    let change = GroupChange {
        group: group.id,
        expected: group.epoch,
        primary: group.primary,
        members: group.members,
        settle: false,
    };
    assert_eq!(
        state.apply(&Command::ReconfigureGroups(vec![change])).0,
        Reply::Groups { changed: 1, refused: 0 }
    );
    assert!(members(&state, 2).iter().all(|boot| *boot == BootId(0)));
}

fn scrub_end(group: GroupId, number: u64) -> ScrubEnd {
    let findings = proto::ScrubFindings { damaged_pages: 2, mended_pages: 1, ..Default::default() };
    ScrubEnd { group, deep: true, number, findings }
}

#[test]
fn records_and_images_give_the_same_state_again() {
    let mut state = cluster();
    state.set_voters([NodeId(1), NodeId(3)].into());
    state.apply(&new_volume("vm", 1));
    state.apply(&started(2, 2001, true));
    state.apply(&maintenance(3, true));
    state.apply(&leave(2, Departure::Lost));
    state.apply(&Command::ChangeSettings(SettingsChange {
        down_out_interval: Some(Duration::from_secs(60)),
        ..Default::default()
    }));
    state.apply(&Command::ChangeSettings(SettingsChange {
        scrub_interval: Some(Duration::ZERO),
        scrub_bytes_per_second: Some(1 << 20),
        demote_slow_nodes: Some(true),
        ..Default::default()
    }));
    let group = any_group(&state).id;
    let wish = proto::ScrubWish { deep: true, unix_ms: 6 };
    state.apply(&Command::WishScrubs { groups: vec![group, GroupId(group.0 + 1)], wish: Some(wish) });
    state.apply(&Command::EndScrubs { unix_ms: 8, ends: vec![scrub_end(group, 6)] });
    assert_eq!(ClusterState::from_image(state.image()).expect("a good image"), state);
    let records: Vec<_> = state.records(&state.all()).into_iter().map(|(k, v)| (k.encode(), v)).collect();
    let pairs = records.iter().map(|(k, v)| (k.as_slice(), v.as_deref().expect("all exist")));
    assert_eq!(ClusterState::load(pairs).expect("good records"), state);
}

#[test]
fn records_of_a_release_without_maintenance_and_settings_are_read() {
    let state = cluster();
    let mut image = state.image();
    image.head.as_mut().expect("a head").down_out_interval_ms = 0;
    assert_eq!(ClusterState::from_image(image.clone()).expect("an older image"), state);
    assert_eq!(state.settings().down_out_interval, OUT_AFTER);
    image.head.as_mut().expect("a head").down_out_interval_ms = 1;
    ClusterState::from_image(image.clone()).expect_err("out of bounds");
    image.head.as_mut().expect("a head").down_out_interval_ms = 60_000;
    image.nodes[0].departure = 77;
    ClusterState::from_image(image).expect_err("of a newer release");
}

/// A light scrub that was asked for while a deep one waited took its place, and said nothing. Found by reading.
#[test]
fn a_wish_for_a_light_scrub_leaves_a_deep_one_that_waits() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    let groups = vec![any_group(&state).id];
    let [deep, light, later] =
        [(true, 6), (false, 7), (true, 8)].map(|(deep, unix_ms)| proto::ScrubWish { deep, unix_ms });
    let wish =
        |state: &mut ClusterState, wish| state.apply(&Command::WishScrubs { groups: groups.clone(), wish }).0;
    let changed = Reply::Groups { changed: 1, refused: 0 };
    for (asked, kept) in [
        (Some(light), Some(light)),
        (Some(deep), Some(deep)),
        (Some(light), Some(deep)),
        (Some(later), Some(later)),
        (None, None),
    ] {
        assert_eq!(wish(&mut state, asked), changed);
        assert_eq!(state.scrubs(groups[0]).wish, kept);
    }
}

#[test]
fn commands_and_replies_survive_their_encoding() {
    let state = {
        let mut state = cluster();
        state.apply(&new_volume("vm", 1));
        state
    };
    let group = any_group(&state);
    let wish = proto::ScrubWish { deep: true, unix_ms: 6 };
    let commands = [
        new_node("a", 1),
        started(1, 2, true),
        new_volume("v", 3),
        Command::StoreFailed { node: NodeId(1), incarnation: Incarnation(2), store: StoreId(3) },
        Command::ReconfigureGroups(vec![GroupChange {
            group: group.id,
            expected: group.epoch,
            primary: group.primary,
            members: group.members,
            settle: false,
        }]),
        Command::ResizeVolume { name: "v".into(), size_bytes: 5, allow_shrink: true },
        Command::DeleteVolume { volume: VolumeId(1) },
        attach("v", 1, 1000),
        detach(1, 1000),
        maintenance(3, true),
        leave(3, Departure::Leaving),
        leave(3, Departure::Lost),
        leave(3, Departure::Stays),
        Command::RemoveNode { node: NodeId(3) },
        Command::ChangeSettings(SettingsChange {
            down_out_interval: Some(Duration::from_secs(60)),
            ..Default::default()
        }),
        Command::ChangeSettings(SettingsChange::default()),
        Command::ChangeSettings(SettingsChange {
            scrub_bytes_per_second: Some(1 << 20),
            scrub_interval: Some(Duration::ZERO),
            deep_scrub_interval: Some(Duration::from_secs(60)),
            demote_slow_nodes: Some(true),
            ..Default::default()
        }),
        Command::WishScrubs { groups: vec![GroupId(7)], wish: Some(wish) },
        Command::WishScrubs { groups: vec![], wish: None },
        Command::EndScrubs { unix_ms: 8, ends: vec![scrub_end(GroupId(7), 6)] },
    ];
    for command in commands {
        assert_eq!(Command::decode(&command.encode()), Ok(command.clone()));
        let json = serde_json::to_string(&command).expect("commands are JSON strings");
        assert_eq!(serde_json::from_str::<Command>(&json).expect("it was one"), command);
    }
    let volume = state.map().volumes.values().next().expect("one volume").clone();
    let refusal = StateError::ClusterFull.into();
    for reply in [
        Reply::Done,
        Reply::Node(NodeId(4)),
        Reply::Volume(Box::new(volume)),
        Reply::Groups { changed: 1, refused: 2 },
        Reply::Refused(refusal),
    ] {
        assert_eq!(Reply::decode(&reply.encode()), Ok(reply));
    }
}

fn maintenance(node: u32, on: bool) -> Command {
    Command::SetMaintenance { node: NodeId(node), on, force: false }
}

fn leave(node: u32, departure: Departure) -> Command {
    Command::LeaveNode { node: NodeId(node), departure }
}

/// Moves every group off `node`, to what is left.
fn evacuate(state: &mut ClusterState, node: u32) {
    let changes = state.map.groups.values().map(|group| {
        let members: Vec<_> = group.members.iter().filter(|m| m.node != NodeId(node)).copied().collect();
        let primary = members.first().map(|member| member.node);
        GroupChange { group: group.id, expected: group.epoch, primary, members, settle: false }
    });
    let changes: Vec<_> = changes.collect();
    let settle = |change: &GroupChange| GroupChange {
        expected: change.expected.next(),
        settle: true,
        ..change.clone()
    };
    let settled = changes.iter().map(settle).collect();
    state.apply(&Command::ReconfigureGroups(changes));
    assert!(state.has_replicas(NodeId(node)), "it counts until the others have all of it");
    state.apply(&Command::ReconfigureGroups(settled));
}

#[test]
fn maintenance_that_would_stop_groups_is_refused_unless_forced() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    assert_eq!(state.apply(&maintenance(1, true)).0, Reply::Done);
    assert!(state.is_in_maintenance(NodeId(1)) && state.avoids(NodeId(1)));
    assert!(state.apply(&maintenance(1, true)).1.is_empty(), "it is on already");
    // Two of three replicas are needed: the second node would be one too many.
    assert_eq!(refused(&mut state, maintenance(2, true)), Code::MaintenanceStopsIo);
    let forced = Command::SetMaintenance { node: NodeId(2), on: true, force: true };
    assert_eq!(state.apply(&forced).0, Reply::Done);
    assert_eq!(state.apply(&maintenance(1, false)).0, Reply::Done);
    assert!(!state.avoids(NodeId(1)));
    assert_eq!(refused(&mut state, maintenance(9, true)), Code::NodeNotFound);
}

#[test]
fn a_node_leaves_when_the_others_can_hold_its_replicas() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    assert_eq!(refused(&mut state, leave(3, Departure::Leaving)), Code::NodeNeeded);
    state.apply(&new_node("node-4", 4));
    assert_eq!(refused(&mut state, leave(3, Departure::Leaving)), Code::NodeNeeded, "it has no store yet");
    state.apply(&started(4, 4000, false));
    assert_eq!(refused(&mut state, Command::RemoveNode { node: NodeId(3) }), Code::InvalidArgument);
    assert_eq!(state.apply(&leave(3, Departure::Leaving)).0, Reply::Done);
    let candidates: Vec<_> = state.candidates(&BTreeSet::new()).iter().map(|c| c.node.0).collect();
    assert_eq!(candidates, [1, 2, 4]);
    assert_eq!(refused(&mut state, leave(4, Departure::Leaving)), Code::NodeNeeded, "one is leaving");
    assert_eq!(refused(&mut state, Command::RemoveNode { node: NodeId(3) }), Code::NodeBusy);
    assert_eq!(state.apply(&leave(3, Departure::Stays)).0, Reply::Done);
    assert_eq!(state.candidates(&BTreeSet::new()).len(), 4);
}

#[test]
fn a_node_is_removed_when_it_holds_nothing_votes_no_more_and_serves_nobody() {
    let mut state = cluster();
    state.apply(&new_node("node-4", 4));
    state.apply(&started(4, 4000, false));
    state.apply(&new_volume("vm", 1));
    state.set_voters([NodeId(1), NodeId(3)].into());
    state.apply(&attach("vm", 3, 3000));
    state.apply(&leave(3, Departure::Leaving));
    let remove = Command::RemoveNode { node: NodeId(3) };
    assert_eq!(refused(&mut state, remove.clone()), Code::NodeBusy, "it has replicas");
    evacuate(&mut state, 3);
    assert_eq!(refused(&mut state, remove.clone()), Code::NodeBusy, "it votes");
    state.set_voters([NodeId(1)].into());
    assert_eq!(refused(&mut state, remove.clone()), Code::NodeBusy, "a volume is attached there");
    state.apply(&detach(3, 3000));
    assert!(!state.was_removed(NodeId(3)));
    let (reply, touched) = state.apply(&remove);
    assert_eq!((reply, touched.nodes), (Reply::Done, [NodeId(3)].into()));
    assert!(state.was_removed(NodeId(3)));
    assert!(!state.was_removed(NodeId(0)) && !state.was_removed(NodeId(5)));
    assert!(state.apply(&remove).1.is_empty(), "it may be asked again");
    let (_, gone) = state.records(&Touched { nodes: [NodeId(3)].into(), ..Touched::default() }).remove(1);
    assert_eq!(gone, None);
    assert_eq!(ClusterState::from_image(state.image()).expect("a good image"), state);
    // The name is free again; the number is not.
    assert_eq!(state.apply(&new_node("node-3", 33)).0, Reply::Node(NodeId(5)));
}

#[test]
fn a_lost_node_takes_its_sessions_along_and_the_last_node_stays() {
    let mut state = cluster();
    state.apply(&new_volume("vm", 1));
    state.apply(&attach("vm", 3, 3000));
    assert_eq!(state.apply(&leave(3, Departure::Lost)).0, Reply::Done);
    evacuate(&mut state, 3);
    assert_eq!(state.apply(&Command::RemoveNode { node: NodeId(3) }).0, Reply::Done);
    assert!(state.map.volumes[&VolumeId(1)].attached_nodes.is_empty());
    state.apply(&leave(2, Departure::Lost));
    assert_eq!(refused(&mut state, leave(1, Departure::Lost)), Code::LastNode);
    assert_eq!(refused(&mut state, leave(1, Departure::Leaving)), Code::LastNode);
}

#[test]
fn settings_are_kept_within_bounds() {
    let mut state = cluster();
    let set = |seconds| {
        Command::ChangeSettings(SettingsChange {
            down_out_interval: Some(Duration::from_secs(seconds)),
            ..Default::default()
        })
    };
    let version = state.version();
    assert_eq!(state.apply(&set(60)).0, Reply::Done);
    assert!(state.version() > version, "every node is told");
    assert!(state.apply(&set(60)).1.is_empty());
    assert_eq!(refused(&mut state, set(4)), Code::InvalidArgument);
    assert_eq!(refused(&mut state, set(31 * 24 * 3600)), Code::InvalidArgument);
    assert_eq!(state.settings().down_out_interval, Duration::from_secs(60));
}
