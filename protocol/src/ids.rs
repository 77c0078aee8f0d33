//! Newtypes of every id, number and version that crosses a module boundary.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            serde::Serialize, serde::Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

id!(
    /// A host in the cluster; given by Raft when the node joins, never reused. 0 is no node.
    NodeId(u32)
);
id!(
    /// A pool of groups with one replica count.
    PoolId(u16)
);
id!(
    /// Configuration number of a group; grows by one with every change of its replicas.
    Epoch(u32)
);
id!(
    /// Position of a write in its group; the first write is 1.
    Seq(u64)
);
id!(
    /// A volume; never reused.
    VolumeId(u32)
);
id!(
    /// The family of a volume, its snapshots and its clones; blocks of one lineage and index share a group.
    Lineage(u64)
);
id!(
    /// One generation of a lineage: the head of a volume or a snapshot.
    Layer(u32)
);
id!(
    /// Number of a 4 MiB block in its volume, from 0.
    BlockIndex(u32)
);
id!(
    /// Number of a shard in its data process, from 0.
    ShardIndex(u16)
);
id!(
    /// One life of a data process; every start draws a new one. 0 is none.
    Incarnation(u64)
);
id!(
    /// One power-on of a host (a hash of the kernel's boot id): same boot, nothing written was lost. 0 is none: of a member
    /// whose store has failed since, and may have lost what was not flushed.
    BootId(u64)
);
id!(
    /// Version of the cluster map; grows with every change.
    MapVersion(u64)
);

/// A store: one journal and capacity region; random, written once into its superblock.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct StoreId(pub u64);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreId({self})")
    }
}

/// A placement group: pool in the upper 16 bits, index in the pool in the lower 16. Shown as `1.17`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct GroupId(pub u32);

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.pool(), self.index())
    }
}

impl GroupId {
    /// The group `index` of `pool`.
    pub const fn new(pool: PoolId, index: u16) -> Self {
        Self(((pool.0 as u32) << 16) | index as u32)
    }

    pub const fn pool(self) -> PoolId {
        PoolId((self.0 >> 16) as u16)
    }

    pub const fn index(self) -> u16 {
        self.0 as u16
    }
}

impl Epoch {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("an epoch a microsecond lasts an hour; real ones are rare"))
    }
}

impl Seq {
    /// The last one has itself: 2^64 writes outlast the hardware, but a peer may name any.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// What wrote a page, unit or entry last: ordered by epoch, then seq.
///
/// `ZERO` means never written or trimmed whole: the content reads as zero. `UNKNOWN` means that the
/// content is not any version's (a learner wrote into a unit it did not have whole); it equals no other version.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct Version {
    pub epoch: Epoch,
    pub seq: Seq,
}

impl Version {
    pub const ZERO: Self = Self { epoch: Epoch(0), seq: Seq(0) };
    pub const UNKNOWN: Self = Self { epoch: Epoch(u32::MAX), seq: Seq(u64::MAX) };

    pub const fn new(epoch: Epoch, seq: Seq) -> Self {
        Self { epoch, seq }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ZERO => f.write_str("zero"),
            Self::UNKNOWN => f.write_str("unknown"),
            Self { epoch, seq } => write!(f, "{epoch}.{seq}"),
        }
    }
}

/// Names a block: 4 MiB of one layer of a lineage.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct BlockKey {
    pub lineage: Lineage,
    pub layer: Layer,
    pub index: BlockIndex,
}

impl fmt::Display for BlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}/{}/{}", self.lineage.0, self.layer, self.index)
    }
}
