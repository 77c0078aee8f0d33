//! Mutations of protocol buffers: fields are changed, dropped, doubled and moved, lengths stay right.
//!
//! Knows the wire format and no message: a length-delimited field that parses as fields is taken for a message.

use xsan_dataplane::testing::Random;

use super::{bytes, interesting};

/// Nesting that mutations look into; prost itself goes to 100.
const DEPTH_MAX: usize = 8;

#[derive(Clone, Debug)]
enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Fixed32([u8; 4]),
    Bytes(Vec<u8>),
    Message(Vec<Field>),
}

#[derive(Clone, Debug)]
struct Field {
    number: u32,
    value: Value,
}

pub fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let (Some(mut fields), Some(others)) = (parse(input, 0), parse(other, 0)) else {
        return bytes::mutate(input, other, random);
    };
    change(&mut fields, &others, random);
    input.clear();
    write(&fields, input);
}

fn change(fields: &mut Vec<Field>, others: &[Field], random: &mut Random) {
    // Most of a large message is in its depths.
    let nested: Vec<usize> =
        (0..fields.len()).filter(|at| matches!(fields[*at].value, Value::Message(_))).collect();
    if let Some(at) = random.pick(&nested)
        && !random.one_in(3)
        && let Value::Message(inner) = &mut fields[*at].value
    {
        return change(inner, others, random);
    }
    let at = random.index(fields.len().max(1));
    match random.below(10) {
        0 if at < fields.len() => drop(fields.remove(at)),
        1 if at < fields.len() => fields.push(fields[at].clone()),
        2 if at < fields.len() => {
            let with = random.index(fields.len());
            fields.swap(at, with);
        }
        3 if at < fields.len() => fields[at].number = 1 + random.below(24) as u32,
        4 => {
            if let Some(field) = random.pick(others) {
                fields.insert(at.min(fields.len()), field.clone());
            }
        }
        5 => {
            let value = Value::Varint(interesting(random, 64));
            fields.push(Field { number: 1 + random.below(24) as u32, value });
        }
        6 if at < fields.len() => {
            // One message more at the same place: lists grow long.
            let copies = 1 + random.index(40);
            let field = fields[at].clone();
            fields.extend(std::iter::repeat_n(field, copies));
        }
        _ if at < fields.len() => change_value(&mut fields[at].value, random),
        _ => {}
    }
}

fn change_value(value: &mut Value, random: &mut Random) {
    match value {
        Value::Varint(number) => {
            let bits = if random.one_in(3) { 64 } else { 32 };
            *number = interesting(random, bits);
        }
        Value::Fixed64(number) => *number = interesting(random, 64).to_le_bytes(),
        Value::Fixed32(number) => *number = (interesting(random, 32) as u32).to_le_bytes(),
        Value::Bytes(text) => bytes::mutate_text(text, b"10.0.0.1", random),
        Value::Message(_) => *value = Value::Varint(interesting(random, 32)),
    }
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn parse(mut bytes: &[u8], depth: usize) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let number = u32::try_from(tag >> 3).ok().filter(|number| *number > 0)?;
        let value = match tag & 7 {
            0 => Value::Varint(varint(&mut bytes)?),
            1 => {
                let (head, rest) = bytes.split_first_chunk()?;
                bytes = rest;
                Value::Fixed64(*head)
            }
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (head, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                let inner = if depth < DEPTH_MAX && !head.is_empty() { parse(head, depth + 1) } else { None };
                inner.map_or_else(|| Value::Bytes(head.to_vec()), Value::Message)
            }
            5 => {
                let (head, rest) = bytes.split_first_chunk()?;
                bytes = rest;
                Value::Fixed32(*head)
            }
            _ => return None,
        };
        fields.push(Field { number, value });
    }
    Some(fields)
}

fn write_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn tag(field: &Field, kind: u64, out: &mut Vec<u8>) {
    write_varint(u64::from(field.number) << 3 | kind, out);
}

fn write(fields: &[Field], out: &mut Vec<u8>) {
    for field in fields {
        match &field.value {
            Value::Varint(number) => {
                tag(field, 0, out);
                write_varint(*number, out);
            }
            Value::Fixed64(number) => {
                tag(field, 1, out);
                out.extend_from_slice(number);
            }
            Value::Fixed32(number) => {
                tag(field, 5, out);
                out.extend_from_slice(number);
            }
            Value::Bytes(bytes) => {
                tag(field, 2, out);
                write_varint(bytes.len() as u64, out);
                out.extend_from_slice(bytes);
            }
            Value::Message(fields) => {
                tag(field, 2, out);
                let mut inner = Vec::new();
                write(fields, &mut inner);
                write_varint(inner.len() as u64, out);
                out.extend_from_slice(&inner);
            }
        }
    }
}
