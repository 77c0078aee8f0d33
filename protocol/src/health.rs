//! The one table of what `xsan-cli health` finds: a code name that stays, how bad it is, and what to do.
//!
//! The control plane decides which are true; `docs/health.md` is generated from this table and checked by a test.

/// How bad a finding is; the worst one is the exit code of `xsan-cli health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Severity {
    /// As it should be, and good to know.
    Info = 0,
    /// All I/O goes on; the cluster bears less than it should.
    Warning = 1,
    /// Some I/O does not go on, or nobody can tell.
    Error = 2,
}

impl Severity {
    pub const ALL: &'static [Self] = &[Self::Info, Self::Warning, Self::Error];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }

    /// The severity of that name; `None` for one of a newer release.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|severity| severity.name() == name)
    }
}

macro_rules! checks {
    ($( $name:ident $code:literal $severity:ident $what:literal $remedy:literal; )*) => {
        /// Something that may be found. `code`, `severity`, `what` and `remedy` say the rest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Check { $( #[doc = $what] $name, )* }

        impl Check {
            /// Every check, in the order of the table.
            pub const ALL: &'static [Check] = &[ $( Check::$name, )* ];

            /// The name that programs know it by.
            pub const fn code(self) -> &'static str {
                match self { $( Check::$name => $code, )* }
            }

            pub const fn severity(self) -> Severity {
                match self { $( Check::$name => Severity::$severity, )* }
            }

            /// What is so.
            pub const fn what(self) -> &'static str {
                match self { $( Check::$name => $what, )* }
            }

            /// What to do about it.
            pub const fn remedy(self) -> &'static str {
                match self { $( Check::$name => $remedy, )* }
            }
        }
    };
}

checks! {
    NoLeader           "NO_LEADER"           Error   "the control plane has no leader, so nothing below is certain" "bring back a majority of the voters";
    GroupsUnavailable  "GROUPS_UNAVAILABLE"  Error   "groups have fewer live replicas than I/O needs" "bring back the nodes that are down";
    StoreFailed        "STORE_FAILED"        Error   "a store has failed or can not be opened; its replicas are made elsewhere, where other copies and places are" "replace the device and restart the node; to use the same one again, restart it with --force-format PATH";
    StoreFull          "STORE_FULL"          Error   "a store is more than 95 % full; writes are refused soon" "delete or trim data, or add devices or nodes";
    ScrubErrors        "SCRUB_ERRORS"        Error   "the last scrubs of a group found replicas that differ, or damage that no replica can mend" "read the primary's log for the blocks; restore them, then scrub the group again: xsan-cli scrub start --deep --group G";
    NodeDown           "NODE_DOWN"           Warning "a node is not heard of" "start it; if it is to stay away, set maintenance or remove it";
    DataDown           "DATA_DOWN"           Warning "a node's control process runs, its data process does not serve" "read the node's log for the reason";
    NoQuorumMargin     "NO_QUORUM_MARGIN"    Warning "one more voter lost stops the control plane" "bring voters back, or take one that stays away out with xsan-cli node remove: until then it keeps its vote; three nodes bear the loss of one, fewer none";
    GroupsDegraded     "GROUPS_DEGRADED"     Warning "groups have fewer live replicas than wanted" "bring back the nodes that are down, or wait for the resync";
    GroupsAtRisk       "GROUPS_AT_RISK"      Warning "one more failure stops the I/O of groups" "let nothing else go down until the resync is done";
    StoreNearfull      "STORE_NEARFULL"      Warning "a store is more than 85 % full" "delete or trim data, or add devices or nodes";
    ChecksumErrors     "CHECKSUM_ERRORS"     Warning "a store returned pages that do not match their checksum" "they are repaired from other replicas; replace the device if the number grows";
    ScrubOverdue       "SCRUB_OVERDUE"       Warning "groups were not scrubbed for twice the interval that is set" "raise scrub-rate, or find out why their nodes are always busy: xsan-cli scrub status";
    SlowMember         "SLOW_MEMBER"         Warning "a node answers far later than its peers" "look at its devices and its network; xsan-cli cluster set slow-nodes demote keeps clients from waiting for it";
    ClockSkew          "CLOCK_SKEW"          Warning "a node's wall clock is more than a second off" "synchronise it: leases do not need it, logs and events do";
    RemovalWaits       "REMOVAL_WAITS"       Warning "a node that leaves holds nothing any more, but serves clients" "move the clients of the named volumes to another node; of a node that is down they are forgotten after down-out-interval, or at once with xsan-cli node remove --force NODE";
    NodeMaintenance    "NODE_MAINTENANCE"    Info    "a node is in maintenance: it leads no group and is never left out" "when the work is done: xsan-cli node maintenance NODE off";
    NodeLeaving        "NODE_LEAVING"        Info    "a node is being removed" "wait, or take it back: xsan-cli node remove --cancel NODE";
    Resync             "RESYNC"              Info    "replicas are being brought up to date" "wait";
    ScrubRepaired      "SCRUB_REPAIRED"      Info    "the last scrub of groups met damaged pages and mended them" "nothing now; replace the device if it comes back";
    ReleasesMixed      "RELEASES_MIXED"      Info    "the nodes run different releases" "upgrade the others, one at a time";
}

/// The page `docs/health.md`.
pub fn document() -> String {
    let mut page = String::from(
        "# Health\n\nGenerated from `protocol/src/health.rs` by `cargo run -p xsan-protocol --example health`; a test checks it.\n\n\
         `xsan-cli health` lists what it finds, the worst first. Its exit code is the worst severity: 0 none or info, 1 warning,\n\
         2 error. When the cluster can not be asked, it is the exit code of every other command (`xsan-cli --help`).\n\n\
         | code | severity | what is so | what to do |\n| --- | --- | --- | --- |\n",
    );
    for check in Check::ALL {
        let (code, severity) = (check.code(), check.severity().name());
        page += &format!("| {code} | {severity} | {} | {} |\n", check.what(), check.remedy());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_the_worst_come_first() {
        let mut codes: Vec<_> = Check::ALL.iter().map(|check| check.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Check::ALL.len());
        assert!(Check::ALL.is_sorted_by_key(|check| std::cmp::Reverse(check.severity())));
        for severity in Severity::ALL {
            assert_eq!(Severity::named(severity.name()), Some(*severity));
        }
        assert_eq!(Severity::named("catastrophe"), None);
    }

    #[test]
    fn the_document_is_what_the_table_says() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/health.md");
        let written = std::fs::read_to_string(path).expect("docs/health.md is in the repository");
        assert!(written == document(), "run: cargo run -p xsan-protocol --example health");
    }
}
