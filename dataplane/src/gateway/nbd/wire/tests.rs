//! Properties of the codec: what is encoded is decoded again, and no bytes make it panic.

use proptest::prelude::*;

use super::*;

fn export_query(name: &str, kinds: &[u16]) -> Vec<u8> {
    let mut bytes = server_payload(name);
    bytes.extend_from_slice(&(kinds.len() as u16).to_be_bytes());
    kinds.iter().for_each(|kind| bytes.extend_from_slice(&kind.to_be_bytes()));
    bytes
}

fn context_query(name: &str, queries: &[String]) -> Vec<u8> {
    let mut bytes = server_payload(name);
    bytes.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| bytes.extend_from_slice(&server_payload(query)));
    bytes
}

#[test]
fn heads_are_what_the_protocol_says() {
    assert_eq!(greeting(), b"NBDMAGICIHAVEOPT\x00\x03");
    let reply = simple_reply(0x0102_0304_0506_0708, Some(Errno::NoSpc));
    assert_eq!(reply, *b"\x67\x44\x66\x98\0\0\0\x1c\x01\x02\x03\x04\x05\x06\x07\x08");
    let data = chunk_data(7, 0x1000, 512, false);
    assert_eq!(data, *b"\x66\x8e\x33\xef\0\0\0\x01\0\0\0\0\0\0\0\x07\0\0\x02\x08\0\0\0\0\0\0\x10\0");
    let hole = chunk_hole(7, 0x1000, 512, true);
    assert_eq!(hole[..20], *b"\x66\x8e\x33\xef\0\x01\0\x02\0\0\0\0\0\0\0\x07\0\0\0\x0c");
    assert_eq!(hole[20..], *b"\0\0\0\0\0\0\x10\0\0\0\x02\0");
    let error = chunk_error(7, Errno::Io);
    assert_eq!(error, *b"\x66\x8e\x33\xef\0\x01\x80\x01\0\0\0\0\0\0\0\x07\0\0\0\x06\0\0\0\x05\0\0");
    let error = chunk_error_offset(7, Errno::Io, 512, false);
    assert_eq!(error[..20], *b"\x66\x8e\x33\xef\0\0\x80\x02\0\0\0\0\0\0\0\x07\0\0\0\x0e");
    assert_eq!(error[20..], *b"\0\0\0\x05\0\0\0\0\0\0\0\0\x02\0");
}

#[test]
fn block_status_tells_holes_from_data() {
    let mut out = Vec::new();
    chunk_block_status(&mut out, 7, &[(512, true), (1024, false)]);
    assert_eq!(out[..20], *b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x14");
    assert_eq!(out[20..], *b"\0\0\0\x01\0\0\x02\0\0\0\0\0\0\0\x04\0\0\0\0\x03");
}

#[test]
fn the_zeroes_behind_an_export_are_left_out_when_agreed() {
    let mut out = Vec::new();
    export_name_reply(&mut out, 1 << 30, export_flags(false), false);
    assert_eq!(out.len(), 10 + EXPORT_NAME_ZEROES);
    out.clear();
    export_name_reply(&mut out, 1 << 30, export_flags(false), true);
    assert_eq!(out.len(), 10);
    assert_ne!(export_flags(true), export_flags(false));
}

#[test]
fn a_claimed_count_or_length_is_not_believed() {
    let mut query = context_query("disk", &[]);
    let count = query.len() - 4;
    query[count..].fill(0xff);
    assert_eq!(ContextQuery::decode(&query), Err(Malformed::OptionPayload));
    assert_eq!(ContextQuery::decode(&[0xff; 4]), Err(Malformed::String));
    assert_eq!(ExportQuery::decode(&[0, 0, 0, 9, b'x']), Err(Malformed::OptionPayload));
    assert_eq!(export_name(&[b'x'; STRING_BYTES_MAX + 1]), Err(Malformed::String));
}

#[test]
fn queries_select_the_one_context() {
    let lists = |queries: &[&str]| ContextQuery { name: "", queries: queries.to_vec() }.lists_allocation();
    assert!(lists(&[]) && lists(&["base:"]) && lists(&["x", "base:allocation"]));
    assert!(!lists(&["qemu:"]));
    let sets = |queries: &[&str]| ContextQuery { name: "", queries: queries.to_vec() }.sets_allocation();
    assert!(sets(&["base:allocation"]) && !sets(&[]) && !sets(&["base:"]));
}

proptest! {
    #[test]
    fn requests_survive_the_wire(
        flags: u16, command: u16, cookie: u64, offset: u64, length: u32, byte in 0..Request::SIZE, bit in 0u8..8,
    ) {
        let request = Request { flags, command, cookie, offset, length };
        let mut bytes = request.encode();
        prop_assert_eq!(Request::decode(&bytes), Ok(request));
        bytes[byte] ^= 1u8 << bit;
        match Request::decode(&bytes) {
            Ok(other) => prop_assert!(byte >= 4 && other != request),
            Err(error) => prop_assert!(byte < 4 && matches!(error, Malformed::RequestMagic(_))),
        }
    }

    #[test]
    fn queries_survive_the_wire_whole_only(
        name in "[a-z0-9é]{0,40}", kinds in prop::collection::vec(0u16..5, 0..5),
        queries in prop::collection::vec("[a-z:]{0,20}", 0..5), cut in 1usize..40, extra in 1usize..5,
    ) {
        let bytes = export_query(&name, &kinds);
        let query = ExportQuery { name: &name, wants_name: kinds.contains(&info::NAME) };
        prop_assert_eq!(ExportQuery::decode(&bytes), Ok(query));
        prop_assert!(ExportQuery::decode(&bytes[..bytes.len().saturating_sub(cut)]).is_err());
        prop_assert!(ExportQuery::decode(&[&bytes[..], &vec![0; extra]].concat()).is_err());

        let bytes = context_query(&name, &queries);
        let query = ContextQuery::decode(&bytes).unwrap();
        prop_assert_eq!((query.name, query.queries), (&*name, queries.iter().map(|q| &**q).collect()));
        prop_assert!(ContextQuery::decode(&bytes[..bytes.len().saturating_sub(cut)]).is_err());
        prop_assert!(ContextQuery::decode(&[&bytes[..], &vec![0; extra]].concat()).is_err());
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        _ = ExportQuery::decode(&bytes);
        _ = ContextQuery::decode(&bytes);
        _ = export_name(&bytes);
        if let Some(bytes) = bytes.first_chunk() {
            _ = Request::decode(bytes);
        }
        if let Some(bytes) = bytes.first_chunk() {
            _ = OptionHeader::decode(bytes);
        }
    }

    #[test]
    fn flipped_bits_are_decoded_or_refused(at: prop::sample::Index, bit in 0u8..8) {
        let mut bytes = context_query("disk", &["base:allocation".into(), "x".into()]);
        let index = at.index(bytes.len());
        bytes[index] ^= 1u8 << bit;
        _ = ContextQuery::decode(&bytes);
        let mut bytes = export_query("disk", &[0, 1, 3]);
        let index = at.index(bytes.len());
        bytes[index] ^= 1u8 << bit;
        _ = ExportQuery::decode(&bytes);
    }
}
