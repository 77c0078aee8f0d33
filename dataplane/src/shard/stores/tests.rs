//! What is formatted and what is not, with files for devices.

use std::fs;
use std::os::unix::fs::FileExt;

use xsan_nodekit::config::Device;
use xsan_protocol::checksum::crc32c;
use xsan_protocol::disk::checkpoint::Checkpoint;
use xsan_protocol::disk::journal::{BatchHeader, Descriptor, HeadWriter, Kind};
use xsan_protocol::disk::superblock::{OFFSETS, Superblock};
use xsan_protocol::ids::{BlockKey, GroupId, Incarnation, Seq, Version};
use xsan_protocol::units::PageRange;

use super::*;

const CLUSTER: &str = "c";
const BYTES: u64 = 256 << 20;
/// Where the two slots of checkpoints lie (docs/format/store.md).
const CHECKPOINTS: std::ops::Range<u64> = 128 << 10..640 << 10;

/// The format's version in a superblock: behind magic and checksum.
const VERSION: std::ops::Range<usize> = 12..14;

/// A node with these devices.
struct Host {
    directory: tempfile::TempDir,
    config: NodeConfig,
}

impl Host {
    fn new(names: &[(&str, Role)]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut config = NodeConfig::default();
        config.cluster.data_dir = directory.path().into();
        for (name, role) in names {
            let path = directory.path().join(name);
            fs::File::create(&path).and_then(|file| file.set_len(BYTES)).expect("a file");
            config.storage.devices.push(Device { path, media: Media::Ssd, role: *role });
        }
        Self { directory, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn name(&mut self, names: &[&str]) {
        self.config.force_format = names.iter().map(|name| self.directory.path().join(name)).collect();
    }

    fn open_for(&self, cluster_id: &str, node: u32) -> Result<Opened, BootError> {
        thread_local! {
            static POOL: &'static BufferPool = BufferPool::anonymous(64 << 20);
        }
        let owner = Owner { cluster_id, node: NodeId(node) };
        open(&plan(&self.config), owner, &self.failures(), POOL.with(|pool| *pool))
    }

    fn failures(&self) -> Failures {
        Failures::new(self.directory.path().to_owned(), Incarnation(7))
    }

    /// The ids of the stores that open.
    fn ids(&self) -> Result<Vec<StoreId>, BootError> {
        Ok(self.open_for(CLUSTER, 1)?.stores.iter().map(|open| open.store.id()).collect())
    }

    /// Refused, with a message that names this device, and nothing is changed anywhere.
    fn refused(&self, name: &str) {
        self.refused_with(Code::DeviceInUse, name);
    }

    fn refused_with(&self, code: Code, name: &str) {
        let devices = &self.config.storage.devices;
        let content =
            || -> Vec<Vec<u8>> { devices.iter().map(|d| fs::read(&d.path).expect("it reads")).collect() };
        let before = content();
        let error = self.ids().expect_err("it holds something");
        assert_eq!(error.code(), code);
        assert!(error.to_string().contains(&self.path(name).display().to_string()), "{error}");
        assert!(content() == before, "a refused start wrote to a device");
    }

    /// A file system, as far as we look.
    fn make_foreign(&self, name: &str) {
        let file = fs::OpenOptions::new().write(true).open(self.path(name)).expect("it opens");
        file.write_all_at(&[0x53, 0xef], 0x438).expect("it writes");
    }

    fn empty(&self, name: &str) {
        let file = fs::File::create(self.path(name)).expect("it opens");
        file.set_len(BYTES).expect("it has room");
    }
}

const PAIR: [(&str, Role); 2] = [("capacity", Role::Capacity), ("cache", Role::Cache)];

#[test]
fn an_empty_device_is_formatted_and_a_store_is_kept() {
    let host = Host::new(&PAIR);
    let ids = host.ids().expect("empty devices");
    assert_eq!(host.ids().expect("its own store"), ids);
    assert_eq!(host.open_for("other", 1).err().expect("not its own").code(), Code::DeviceInUse);
}

/// Two nodes whose disks had changed places took them as their own, as replicas that nobody needs, and emptied both.
#[test]
fn a_store_of_another_node_is_refused() {
    let host = Host::new(&PAIR);
    let ids = host.ids().expect("empty devices");
    let error = host.open_for(CLUSTER, 2).err().expect("it was made on node 1");
    assert_eq!(error.code(), Code::DeviceInUse);
    assert!(error.to_string().contains("it was made on node 1, this is node 2"), "{error}");
    assert_eq!(host.ids().expect("its own store"), ids);
}

/// Once the advice was to format it.
#[test]
fn a_store_of_another_format_is_refused_with_its_own_error() {
    let mut host = Host::new(&[("one", Role::Capacity)]);
    let before = host.ids().expect("an empty device");
    let file = fs::OpenOptions::new().read(true).write(true).open(host.path("one")).expect("it opens");
    for offset in OFFSETS {
        let mut bytes = [0; Superblock::SIZE];
        file.read_exact_at(&mut bytes, offset).expect("it reads");
        bytes[VERSION].copy_from_slice(&(FORMAT_VERSION + 1).to_le_bytes());
        let checksum = crc32c(&bytes[VERSION.start..]).to_le_bytes();
        bytes[VERSION.start - checksum.len()..VERSION.start].copy_from_slice(&checksum);
        file.write_all_at(&bytes, offset).expect("it writes");
    }
    host.refused_with(Code::FormatUnsupported, "one");
    host.name(&["one"]);
    assert_ne!(host.ids().expect("it is named"), before);
}

/// One dead disk kept the whole node down after its next restart.
#[test]
fn a_device_that_is_gone_is_told_and_the_others_serve() {
    let host = Host::new(&[("one", Role::Capacity), ("two", Role::Capacity)]);
    let ids = host.ids().expect("empty devices");
    fs::rename(host.path("one"), host.path("elsewhere")).expect("it moves");
    let opened = host.open_for(CLUSTER, 1).expect("the other one opens");
    let told: Vec<_> = opened.for_map(ShardIndex(0), &BTreeSet::new()).iter().map(|store| store.id).collect();
    assert_eq!(told, ids[1..]);
    let status = opened.broken[0].message();
    assert!(status.failed && status.id == 0 && status.device.ends_with("one"), "{status:?}");
    assert!(status.problem.contains("No such file or directory"), "{status:?}");
    assert_eq!(opened.dead.as_ref().map(BootError::code), Some(Code::DeviceUnusable));
    drop(opened);
    fs::rename(host.path("elsewhere"), host.path("one")).expect("it moves");
    assert_eq!(host.ids().expect("it is back"), ids);
}

/// A device that nobody had named was formatted with the one beside it that somebody had.
#[test]
fn naming_one_device_does_not_format_another() {
    let mut host = Host::new(&PAIR);
    host.make_foreign("capacity");
    host.make_foreign("cache");
    host.refused("capacity");
    host.name(&["capacity"]);
    host.refused("cache");
    host.name(&["cache"]);
    host.refused("capacity");
    host.name(&["capacity", "cache"]);
    assert_eq!(host.ids().expect("both are named").len(), 1);
}

#[test]
fn a_named_store_of_this_cluster_is_formatted_as_a_new_one() {
    let mut host = Host::new(&[("one", Role::Capacity), ("two", Role::Capacity)]);
    let before = host.ids().expect("empty devices");
    host.name(&["two"]);
    let after = host.ids().expect("one is named");
    assert_eq!(after[0], before[0], "it was not named");
    assert_ne!(after[1], before[1], "it is another store now");
}

#[test]
fn half_a_store_is_neither_opened_nor_formatted_until_it_is_named() {
    let mut host = Host::new(&PAIR);
    let before = host.ids().expect("empty devices");
    host.name(&["cache"]);
    host.refused("capacity");
    host.name(&[]);
    host.empty("capacity");
    host.refused("cache");
    host.name(&["cache"]);
    assert_ne!(host.ids().expect("empty, and named"), before);
    host.name(&[]);
    host.empty("cache");
    host.refused("capacity");
}

#[test]
fn caches_that_changed_places_are_refused() {
    let mut host = Host::new(&[
        ("capacity-1", Role::Capacity),
        ("cache-1", Role::Cache),
        ("capacity-2", Role::Capacity),
        ("cache-2", Role::Cache),
    ]);
    host.ids().expect("empty devices");
    host.config.storage.devices.swap(1, 3);
    host.refused("capacity-1");
}

#[test]
fn the_file_of_an_embedded_store_can_be_named() {
    let mut host = Host::new(&[]);
    host.config.dataplane.file_size = BYTES;
    fs::create_dir(host.path("data")).expect("a directory");
    let before = host.ids().expect("a new file");
    host.name(&["data/store-0.img"]);
    assert_eq!(host.config.store_files(), host.config.force_format);
    assert_ne!(host.ids().expect("it is named"), before);
}

/// Once this ended the data process, again and again, and took the node's other stores away with it.
#[test]
fn a_store_that_can_not_be_opened_is_told_and_the_others_serve() {
    let mut host = Host::new(&[("one", Role::Capacity), ("two", Role::Capacity)]);
    let ids = host.ids().expect("empty devices");
    let file = fs::OpenOptions::new().write(true).open(host.path("one")).expect("it opens");
    file.write_all_at(&vec![0xee; (CHECKPOINTS.end - CHECKPOINTS.start) as usize], CHECKPOINTS.start)
        .expect("it writes");

    let opened = host.open_for(CLUSTER, 1).expect("the other one opens");
    let working: Vec<StoreId> = opened.stores.iter().map(|open| open.store.id()).collect();
    assert_eq!(working, ids[1..]);
    let told: Vec<_> = opened
        .for_map(ShardIndex(0), &BTreeSet::new())
        .iter()
        .map(|store| (store.id, store.failed))
        .collect();
    assert_eq!(told, [(ids[1], false), (ids[0], true)]);
    let status = opened.broken[0].message();
    assert!(status.failed && status.device.ends_with("one"), "{status:?}");
    assert_eq!(status.problem, "can not be opened: neither checkpoint is valid");
    drop(opened);

    // The remedy. (Within this process the broken store holds its lock, so the file is another one.)
    fs::copy(host.path("one"), host.path("copy")).expect("it copies");
    fs::rename(host.path("copy"), host.path("one")).expect("it moves");
    host.name(&["one"]);
    let after = host.ids().expect("it is formatted anew");
    assert!(after[0] != ids[0] && after[1] == ids[1], "{after:?}");
}

#[test]
fn an_opening_that_fails_at_the_device_is_noted_for_the_next_life() {
    let failed = |error| may_lack_writes(&Err(error));
    assert!(failed(OpenError::from(std::io::Error::from_raw_os_error(libc::EIO))));
    assert!(!failed(OpenError::Mismatch));
}

/// The end of the journal was cut off in silence, and the node counted as one that had lost nothing.
#[test]
fn a_store_that_misses_what_was_written_says_so_until_the_cluster_knows() {
    let host = Host::new(&[("one", Role::Capacity)]);
    let ids = host.ids().expect("an empty device");
    assert!(host.failures().before().expect("it reads").is_empty());
    let file = fs::OpenOptions::new().write(true).read(true).open(host.path("one")).expect("it opens");
    let mut page = [0; Superblock::SIZE];
    file.read_exact_at(&mut page, 0).expect("it reads");
    let journal = Superblock::decode(&page).expect("it is a store").journal;
    let slot = (CHECKPOINTS.end - CHECKPOINTS.start) / 2;
    let checkpoints = [CHECKPOINTS.start, CHECKPOINTS.start + slot].map(|offset| {
        let mut bytes = vec![0; slot as usize];
        file.read_exact_at(&mut bytes, offset).expect("it reads");
        Checkpoint::decode(&bytes).ok()
    });
    let Checkpoint { session, tail, .. } =
        checkpoints.into_iter().flatten().max_by_key(|found| found.number).expect("there is one");
    // A later batch of the present session, where the first one is not.
    let position = tail + 9 * Superblock::SIZE as u64;
    let reset = Descriptor {
        kind: Kind::Reset,
        group: GroupId(1),
        version: Version::ZERO,
        acked: Seq(0),
        key: BlockKey::default(),
        pages: PageRange::new(0, 1),
        previous_first: Version::ZERO,
        previous_last: Version::ZERO,
        data_page: 0,
        start: 0,
        lost: 0,
    };
    let header = BatchHeader {
        store: ids[0],
        position,
        previous_end: position,
        flushed: 0,
        durable: position,
        session,
        descriptor_count: 1,
        data_pages: 0,
    };
    let mut head = vec![0; header.head_bytes()];
    let mut writer = HeadWriter::new(header, &mut head);
    writer.push(&reset, &[]);
    writer.finish();
    file.write_all_at(&head, journal.offset + position % journal.bytes).expect("it writes");

    let opened = host.open_for(CLUSTER, 1).expect("it opens");
    let told = opened.for_map(ShardIndex(0), &BTreeSet::new());
    assert!(told[0].failed_before && !told[0].failed, "{told:?}");
    drop(opened);
    assert_eq!(host.failures().before().expect("it reads"), ids.into_iter().collect());
}
