//! Mutations of JSON: values are replaced, dropped, renamed and moved; the text stays JSON.

use serde_json::{Value, json};
use xsan_dataplane::testing::Random;

use super::{bytes, interesting};

pub fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let (Ok(mut value), Ok(other)) = (serde_json::from_slice(input), serde_json::from_slice(other)) else {
        return bytes::mutate_text(input, other, random);
    };
    change(&mut value, &other, random);
    *input = value.to_string().into_bytes();
}

fn change(value: &mut Value, other: &Value, random: &mut Random) {
    match value {
        Value::Object(fields) if !fields.is_empty() && !random.one_in(12) => {
            let keys: Vec<String> = fields.keys().cloned().collect();
            let key = &keys[random.index(keys.len())];
            match random.below(12) {
                0 => drop(fields.remove(key)),
                1 => {
                    let moved = fields.remove(key).unwrap_or_default();
                    let renamed =
                        keys[random.index(keys.len())].clone() + if random.one_in(2) { "" } else { "x" };
                    fields.insert(renamed, moved);
                }
                2 => {
                    if let Some(given) = other.get(key) {
                        fields.insert(key.clone(), given.clone());
                    }
                }
                _ => {
                    let given = other.get(key).cloned().unwrap_or_default();
                    change(&mut fields[key], &given, random);
                }
            }
        }
        Value::Array(entries) if !entries.is_empty() && !random.one_in(6) => {
            let at = random.index(entries.len());
            match random.below(4) {
                0 => drop(entries.remove(at)),
                1 => entries.push(entries[at].clone()),
                _ => change(&mut entries[at], other, random),
            }
        }
        Value::String(text) if !random.one_in(3) => {
            let mut bytes = std::mem::take(text).into_bytes();
            bytes::mutate_text(&mut bytes, b"0-255,9", random);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        _ => *value = replacement(random),
    }
}

fn replacement(random: &mut Random) -> Value {
    match random.below(13) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!([]),
        3 => json!({}),
        4 => json!(""),
        5 => json!("auto"),
        6 => json!("0-65535"),
        7 => json!("1e999GiB"),
        8 => json!(-1),
        9 => json!(0.5),
        10 => json!(interesting(random, 16)),
        _ => json!(interesting(random, 64)),
    }
}
