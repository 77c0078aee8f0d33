use proptest::prelude::*;

use super::*;

fn any_version() -> impl Strategy<Value = Version> {
    any::<(u32, u64)>().prop_map(|(epoch, seq)| Version::new(Epoch(epoch), Seq(seq)))
}

proptest! {
    #[test]
    fn appends_round_trip(version in any_version(), first in any_version(), last in any_version(), acked in any::<u64>(), zero in any::<bool>()) {
        let kind = if zero { EntryKind::Zero } else { EntryKind::Write };
        let meta = AppendMeta { kind, version, acked: Seq(acked), previous_first: first, previous_last: last };
        prop_assert_eq!(AppendMeta::decode(&meta.encode()), Ok(meta));
        for end in 0..AppendMeta::SIZE {
            prop_assert!(AppendMeta::decode(&meta.encode()[..end]).is_err());
        }
    }

    #[test]
    fn the_other_metas_round_trip(version in any_version(), a in any::<u64>(), b in any::<u64>()) {
        let info = PeerInfo { last: version, durable: Seq(a), acked: Seq(b) };
        prop_assert_eq!(PeerInfo::decode(&info.encode()), Ok(info));
        let push = PushMeta { version, as_of: Seq(a), lost: b as u16 };
        prop_assert_eq!(PushMeta::decode(&push.encode()), Ok(push));
        let fetch = FetchMeta { from: Seq(a.min(b)), to: Seq(a.max(b)) };
        prop_assert_eq!(FetchMeta::decode(&fetch.encode()), Ok(fetch));
    }

    #[test]
    fn a_changed_version_changes_the_digest(unit in 0..UNITS_PER_BLOCK, old in any_version(), new in any_version()) {
        prop_assume!(old != new);
        let mut versions = [Version::new(Epoch(1), Seq(7)); UNITS_PER_BLOCK];
        versions[unit] = old;
        let before = block_digest(&versions);
        versions[unit] = new;
        prop_assert_ne!(before, block_digest(&versions));
    }
}

#[test]
fn a_fetch_that_ends_before_it_starts_is_refused() {
    let mut bytes = FetchMeta { from: Seq(1), to: Seq(2) }.encode();
    bytes[0] = 3;
    assert_eq!(FetchMeta::decode(&bytes), Err(MetaError::Field { field: "to" }));
}

#[test]
fn an_empty_block_has_digest_zero_and_no_other_has() {
    assert_eq!(block_digest(&[Version::ZERO; UNITS_PER_BLOCK]), 0);
    assert_ne!(block_digest(&[Version::UNKNOWN; UNITS_PER_BLOCK]), 0);
}

#[test]
fn checksums_of_units_are_listed_and_nothing_else_is() {
    let version = Version::new(Epoch(3), Seq(77));
    let units = [
        UnitChecksums::new(version, 0b1000_0000_0000_0001, &std::array::from_fn(|page| page as u32)),
        UnitChecksums::new(Version::UNKNOWN, 0, &[7; PAGES_PER_UNIT]),
    ];
    let bytes = units.as_slice().as_bytes();
    assert_eq!(bytes.len(), 160);
    assert_eq!(UnitChecksums::list(bytes), Ok(&units[..]));
    assert_eq!((units[0].version(), units[0].damaged()), (version, 0x8001));
    assert_eq!(units[0].checksums()[15], 15);
    UnitChecksums::list(&bytes[..159]).expect_err("a part of a unit");
    let mut newer = bytes.to_vec();
    newer[94] = 1;
    assert_eq!(UnitChecksums::list(&newer), Err(MetaError::Field { field: "reserved" }));
}
