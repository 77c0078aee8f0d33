use proptest::prelude::*;

use super::*;

fn any_header() -> impl Strategy<Value = Header> {
    (
        0..Opcode::ALL.len(),
        0..=flags::ALL,
        proptest::option::of(0..Code::ALL.len()),
        any::<(u64, u32, u32, u64, u32, u32)>(),
        any::<(u32, u32, u32)>(),
        0..=FRAME_MAX as u32,
    )
        .prop_map(|(opcode, flags, status, ids, (offset, length, payload_crc), payload_length)| Header {
            opcode: Opcode::ALL[opcode],
            flags,
            status: status.map(|index| Code::ALL[index]),
            request_id: ids.0,
            group: GroupId(ids.1),
            epoch: Epoch(ids.2),
            key: BlockKey { lineage: Lineage(ids.3), layer: Layer(ids.4), index: BlockIndex(ids.5) },
            offset,
            length,
            payload_length,
            payload_crc,
        })
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn every_flipped_bit_is_refused(header in any_header()) {
        let bytes = header.encode();
        for bit in 0..HEADER_SIZE * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&flipped).is_err(), "bit {} was accepted", bit);
        }
    }

    #[test]
    fn random_bytes_are_refused(bytes in prop::array::uniform32(any::<u8>())) {
        let mut all = [0; HEADER_SIZE];
        all[..32].copy_from_slice(&bytes);
        prop_assert!(Header::decode(&all).is_err());
    }
}

fn resealed(change: impl FnOnce(&mut RawHeader)) -> [u8; HEADER_SIZE] {
    let mut raw = RawHeader::read_from_bytes(&Header::new(Opcode::Ping).encode()[..]).unwrap();
    raw.header_crc = 0.into();
    change(&mut raw);
    raw.header_crc = crc32c(raw.as_bytes()).into();
    raw.as_bytes().try_into().unwrap()
}

#[test]
fn a_valid_checksum_does_not_excuse_a_wrong_field() {
    use HeaderError as E;
    let cases: [([u8; HEADER_SIZE], E); 6] = [
        (resealed(|raw| raw.version = VERSION + 1), E::Version { found: VERSION + 1 }),
        (resealed(|raw| raw.opcode = 255), E::Opcode { found: 255 }),
        (resealed(|raw| raw.flags = 0x8000.into()), E::Flags { found: 0x8000, reserved: 0 }),
        (resealed(|raw| raw.reserved = 1.into()), E::Flags { found: 0, reserved: 1 }),
        (resealed(|raw| raw.status = 9999.into()), E::Status { found: 9999 }),
        (
            resealed(|raw| raw.payload_length = (FRAME_MAX as u32 + 1).into()),
            E::PayloadLength { found: FRAME_MAX as u32 + 1, max: FRAME_MAX },
        ),
    ];
    for (bytes, error) in cases {
        assert_eq!(Header::decode(&bytes), Err(error));
    }
}
