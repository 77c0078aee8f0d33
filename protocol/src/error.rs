//! The one table of error numbers: what a user sees, what crosses the wire, whether to try again.
//!
//! Modules have their own typed errors; each picks its number here once, in `code()`.
//! A number is never reused. `docs/errors/README.md` is generated from this table and checked by a test.

use std::fmt;

/// What a caller does with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails again.
    Never,
    /// Fetch a newer cluster map, then try again.
    Refresh,
    /// Wait a little, then try again.
    Backoff,
}

macro_rules! errors {
    ($( $number:literal $name:ident $retry:ident $what:literal $remedy:literal; )*) => {
        /// An error number. `Code::name`, `what`, `remedy` and `retry` say the rest.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Code { $( #[doc = $what] $name = $number, )* }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Code] = &[ $( Code::$name, )* ];

            pub const fn name(self) -> &'static str {
                match self { $( Code::$name => stringify!($name), )* }
            }

            /// What happened, for the operator.
            pub const fn what(self) -> &'static str {
                match self { $( Code::$name => $what, )* }
            }

            /// What to do about it.
            pub const fn remedy(self) -> &'static str {
                match self { $( Code::$name => $remedy, )* }
            }

            pub const fn retry(self) -> Retry {
                match self { $( Code::$name => Retry::$retry, )* }
            }

            /// The code with this number; `None` for a number of a newer release.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $( $number => Some(Code::$name), )* _ => None }
            }
        }
    };
}

errors! {
    1   Internal            Never   "an invariant of XSAN was broken" "keep the logs of the node and report the bug";
    2   InvalidArgument     Never   "a value is malformed or out of range" "correct the named field";
    3   NotFound            Never   "no object has that name or id" "list what exists and correct the name";
    4   AlreadyExists       Never   "an object of that name exists" "choose another name, or delete the old one";
    5   Timeout             Backoff "no answer within the time limit" "look at the health of the cluster, then try again";
    6   Busy                Backoff "a queue is full" "try again; if it lasts, the named node is overloaded";
    7   Unsupported         Never   "this release does not support the request" "upgrade, or do without the option";
    8   ConfigInvalid       Never   "the configuration file is not valid" "correct the field that the message names";
    9   DataDirUnusable     Never   "the data directory can not be used" "make it writable, with free space, and not used by another node";
    10  AddressInUse        Never   "an address or port is in use" "stop the other program, or configure another port";
    11  MemoryShort         Never   "memory could not be locked or reserved" "lower dataplane.memory, or raise the memlock limit of the service";
    12  Unreachable         Backoff "nothing answers at the address" "check that the node runs and is reachable, or name another node with --address or XSAN_ADDRESS";

    100 ClusterIdMismatch   Never   "the node belongs to another cluster" "correct --cluster-id or --join-address";
    101 NodeIdTaken         Never   "another node has that node id" "give this node an id of its own";
    102 VersionMismatch     Never   "the two sides have no protocol version in common" "upgrade the older side";
    103 JoinAddressDead     Backoff "nothing answers at the join address" "check that the node there runs and is reachable, then try again";
    104 NoQuorum            Backoff "the control plane has no leader with a quorum" "bring back a majority of the voters";
    105 NotLeader           Refresh "this node is not the Raft leader" "ask the leader that the answer names";
    106 NodeNotFound        Never   "no node has that id" "xsan-cli node list shows the nodes";
    107 ClusterExists       Never   "the data directory holds a node already" "start without --init-cluster or --join-cluster, or give another --data-dir";
    108 TooFewNodes         Never   "fewer nodes (or failure domains) than replicas" "add nodes, or lower the replica count";
    109 LeaseEnded          Backoff "the node's lease has ended, it can not reach the leader" "check the network between the node and the leader";
    110 ClusterFull         Never   "the cluster has its largest number of nodes or volumes" "delete volumes that nobody needs, or use a second cluster";
    111 MaintenanceStopsIo  Never   "without the node some groups could not serve" "wait until cluster status shows no degraded group, or confirm with --force";
    112 NodeNeeded          Never   "the other nodes can not take over the node's replicas" "add a node or space first; a node that is dead goes with --force";
    113 LastNode            Never   "the cluster has no other node" "stop the node and wipe its data directory to end the cluster";
    114 NodeIsUp            Never   "the node is not down" "leave --force out, or stop the node first";
    115 NodeRemoved         Never   "the node was removed from its cluster" "wipe its data directory; the host may join again as a new node, with --force-format PATH for each of its block devices";
    116 NodeBusy            Backoff "the node can not leave yet" "wait until it holds no replica and no volume is attached there";
    117 RaftLogLost         Never   "the node's Raft log and vote are gone" "put control/raft.redb back if it was moved; else give the node up with xsan-cli node remove --force, wipe its data directory and join again, with --force-format PATH for each of its block devices";
    118 LifeNotRegistered   Backoff "the cluster knows another life of the node's data process" "it registers by itself; if it lasts, look into the log of xsan-control there";

    200 StoreNotFormatted   Never   "the device holds no store" "correct the path; a node formats an empty device when it starts, and another when --force-format names it";
    201 DeviceInUse         Never   "the device holds data that is not XSAN's, a store of another cluster or node, a damaged one, or half of one" "correct the path, or start the node with --force-format PATH for the device that the message names; what it holds is lost";
    202 StorageFull         Never   "no space left in the pool for the write" "delete or trim data, or add devices";
    203 JournalFull         Backoff "the journal waits for destage" "try again; if it lasts, the capacity device is too slow";
    204 StoreFailed         Refresh "the store's device failed, it takes no more writes" "its replicas are made elsewhere; replace the device, its path in its place in storage.devices, and restart the node, with --force-format PATH if the new one is not empty and for the other half of a store with a cache";
    205 ChecksumMismatch    Backoff "stored data does not match its checksum" "it is repaired from another replica; replace the device if it repeats";
    206 StoreCorrupt        Never   "the store's own records are damaged, it can not be opened" "its replicas are made elsewhere; restart the node with --force-format PATH for each device of the store, or replace the device if it repeats";
    207 DeviceTooSmall      Never   "the device is too small for a store" "use a device or file of at least the size that the message names";
    208 FormatUnsupported   Never   "what is stored has a format that this release does not read" "start the release that wrote it; to give a store up, start the node with --force-format PATH for each of its devices";
    209 DeviceUnusable      Never   "the device can not be opened, locked or sized" "check that the path exists and that no other process uses it";

    300 NotPrimary          Refresh "this node is not the primary of the group" "refresh the map and ask the primary";
    301 StaleEpoch          Refresh "the request is of an older configuration of the group" "refresh the map";
    302 GroupInactive       Backoff "too few replicas of the group are up" "bring back the nodes that xsan-cli cluster status names";
    303 OutOfRange          Never   "the request reaches past the end of the volume" "stay within the volume's size";
    304 VolumeNotFound      Never   "no volume has that name" "xsan-cli volume list shows the volumes";
    305 VolumeExists        Never   "a volume of that name exists" "choose another name";
    306 VolumeAttached      Never   "the volume is attached" "close it at the nodes that the message names; where one is down it counts as closed after down-out-interval";
    307 Fenced              Never   "a newer session of this client has taken over" "reconnect";
    308 FrameInvalid        Never   "a frame is malformed" "upgrade the older side; if the versions match, suspect the network";
    // 309 was AuthFailed, which nothing raised.
    310 ShrinkLosesData     Never   "the new size is smaller than the volume" "confirm with --allow-shrink; what lies behind the new end is lost";
    311 ReplicaBehind       Backoff "the replica does not have that version yet" "it is being brought up to date";
    312 ClientGone          Never   "the request's client has gone before it was carried out" "connect again and read what is there";
}

impl Code {
    pub const fn number(self) -> u16 {
        self as u16
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.number(), self.name())
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error {} {}: {}", self.number(), self.name(), self.what())
    }
}

/// The page `docs/errors/README.md`.
pub fn document() -> String {
    let mut page = String::from(
        "# Error numbers\n\nGenerated from `protocol/src/error.rs` by `cargo run -p xsan-protocol --example errors`; a test checks it.\n\n\
         Retry: *never*: the same request fails again; *refresh*: with a newer cluster map; *backoff*: after a wait.\n\n\
         | number | name | what happened | what to do | retry |\n| --- | --- | --- | --- | --- |\n",
    );
    for code in Code::ALL {
        let retry = match code.retry() {
            Retry::Never => "never",
            Retry::Refresh => "refresh",
            Retry::Backoff => "backoff",
        };
        page += &format!(
            "| {} | {} | {} | {} | {retry} |\n",
            code.number(),
            code.name(),
            code.what(),
            code.remedy()
        );
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_ordered_and_found_again() {
        for pair in Code::ALL.windows(2) {
            assert!(pair[0].number() < pair[1].number(), "{:?} before {:?}", pair[0], pair[1]);
        }
        for code in Code::ALL {
            assert_eq!(Code::from_number(code.number()), Some(*code));
        }
        assert_eq!(Code::from_number(0), None);
    }

    #[test]
    fn the_document_is_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors/README.md");
        let written = std::fs::read_to_string(path).expect("docs/errors/README.md is in the repository");
        assert!(written == document(), "run: cargo run -p xsan-protocol --example errors");
    }
}
