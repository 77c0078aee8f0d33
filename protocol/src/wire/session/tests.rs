use proptest::prelude::*;

use super::*;

fn any_hello() -> impl Strategy<Value = Hello> {
    (any::<(u32, u64, u64, u64, u16, u16)>(), "[a-z0-9-]{0,128}").prop_map(|(ids, cluster_id)| Hello {
        node: NodeId(ids.0),
        incarnation: Incarnation(ids.1),
        client_id: ids.2,
        session: ids.3,
        shard: ShardIndex(ids.4),
        shard_count: ids.5,
        cluster_id,
    })
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(hello in any_hello()) {
        prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }

    #[test]
    fn every_truncation_is_refused(hello in any_hello()) {
        let bytes = hello.encode();
        for end in 0..bytes.len() {
            prop_assert!(Hello::decode(&bytes[..end]).is_err());
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let _ = Hello::decode(&bytes);
    }
}

#[test]
fn a_version_range_outside_ours_is_refused() {
    let hello = Hello::decode(&[2, 3].into_iter().chain([0; META_SIZE - 2]).collect::<Vec<u8>>());
    assert_eq!(hello, Err(HelloError::Version { min: 2, max: 3 }));
}
