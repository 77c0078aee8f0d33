//! Bugs sown on purpose, one at a time, to see that the simulator (`tools/sim --mutations`) and the crashes of the store
//! alone (`tools/crash --mutations`) find them.
//!
//! Each is asked for at the line that it spoils. Without the feature `mutations` the answer is a constant, and no build but
//! those of these two commands and of `tools/test` has the feature: see docs/testing.md.

macro_rules! mutations {
    ($($name:ident: $what:literal,)+) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Mutation {
            $(#[doc = $what] $name,)+
        }

        impl Mutation {
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// What goes wrong.
            pub const fn what(self) -> &'static str {
                match self {
                    $(Self::$name => $what,)+
                }
            }

            /// Are the crashes of the store alone to find it? The moment is too short for the simulator, which comes by at random.
            pub const fn needs_every_crash(self) -> bool {
                matches!(
                    self,
                    Self::JournalFreedEarly
                        | Self::JournalFreedUnflushed
                        | Self::CarriedEarly
                        | Self::CarryUnfinished
                )
            }
        }
    };
}

mutations! {
    AckedByFastest: "a write is acknowledged once the fastest member has it",
    UnackedRead: "a read does not wait for the write that it shows to be acknowledged",
    OldEpochFollowed: "a member follows whoever sends, whatever the epoch",
    LongestJournalIgnored: "a new primary does not fetch what a member's longer journal has",
    SettledAtOnce: "an epoch counts on its members before their journals are complete",
    NewcomersForgotten: "who was taken in and left again before the epoch was settled is forgotten",
    LeaseIgnored: "a primary serves after its lease",
    LeaseFromArrival: "a lease counts from the grant's arrival, not from when it was asked for",
    LeaseWithoutMap: "a lease counts before the data process acts on the map it was granted under",
    LeasesOfOldLeaderIgnored: "a new leader does not wait for the leases of the one before",
    LeaseGrantedMeanwhile: "a lease is granted while the decision that its holder is gone is on its way",
    DeadBeforeLeaseEnds: "a node counts as gone while its lease may run",
    FlushAnsweredAtOnce: "a flush is answered once its writes are acknowledged",
    FlushOfPrimaryOnly: "a flush leaves the other members out",
    FlushCoversLaterWrites: "a flush counts for what was acknowledged while it was under way",
    FlushServesLateComers: "who asks for a flush while one is under way is answered with it",
    StoreFlushCoversLater: "a device's flush counts for what was written while it was under way",
    FuaForgotten: "a write with FUA is answered without a flush",
    FencedRequestKept: "requests of a fenced session go on",
    MergeUnlocked: "other writes go on while a page is read to put sectors into it",
    PushUnlocked: "writes to a unit go on while it is read for a learner",
    PromotedEarly: "a learner is proposed after one pass, whatever became of the units pushed to it",
    PromotedUnflushed: "a learner that acts vouches for what is not on stable media",
    KeptWithoutBound: "what late learners lack is kept for them without bound",
    PreviousVersionIgnored: "a part of a unit is written over another content and gets the version nevertheless",
    ChecksumIgnored: "what a read brings is not compared with its checksum",
    DamageLeft: "damaged pages that destage meets in the journal are left there, and nobody is told",
    JournalOutOfOrder: "a journal batch counts as durable before those ahead of it",
    TornBatchReplayed: "replay takes a batch whose data does not match its checksums",
    StaleBatchReplayed: "replay takes batches whatever session and position they follow",
    RecordBeforeData: "a block record is written before its data is on stable media",
    JournalFreedEarly: "journal space is reused before the checkpoint that gives it up is written",
    JournalFreedUnflushed: "journal space is reused before the checkpoint that gives it up is on stable media",
    CarriedEarly: "journal space behind entries that are carried is given up before the carry is complete",
    CarryUnfinished: "replay takes entries of a carry that was not complete",
    CheckpointBeforeRecords: "journal space is given up before the records of what was in it are on stable media",
}

#[cfg(feature = "mutations")]
mod active {
    use std::cell::Cell;

    use super::Mutation;

    thread_local! {
        static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    impl Mutation {
        /// Spoils what this thread runs from now on; `None`: nothing.
        pub fn sow(mutation: Option<Self>) {
            ACTIVE.set(mutation);
        }

        pub fn is_on(self) -> bool {
            ACTIVE.get() == Some(self)
        }
    }
}

#[cfg(not(feature = "mutations"))]
impl Mutation {
    /// Is this bug sown? Never, in this build.
    pub const fn is_on(self) -> bool {
        false
    }
}
