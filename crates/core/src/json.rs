//! Canonical JSON: one byte string for one value, so that settings can be
//! hashed.
//!
//! Keys sorted by bytes, no white space, as RFC 8785 asks; numbers are printed
//! by `serde_json` (shortest form that reads back the same), which differs from
//! RFC 8785 only in exponents.

use crate::Digest;
use serde::Serialize;
use serde_json::Value;

/// `value` as canonical JSON.
///
/// # Errors
/// When `value` cannot be JSON at all (a map whose keys are not strings).
pub fn canonical<T: Serialize + ?Sized>(value: &T) -> Result<String, serde_json::Error> {
    let mut out = String::new();
    write(&serde_json::to_value(value)?, &mut out);
    Ok(out)
}

/// The digest of [`canonical`].
///
/// # Errors
/// As [`canonical`].
pub fn digest<T: Serialize + ?Sized>(value: &T) -> Result<Digest, serde_json::Error> {
    Ok(Digest::of(canonical(value)?.as_bytes()))
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(k, _)| k.as_bytes());
            out.push('{');
            for (i, (k, v)) in entries.into_iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                out.push_str(&Value::from(k.as_str()).to_string());
                out.push(':');
                write(v, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, v) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write(v, out);
            }
            out.push(']');
        }
        scalar => out.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn order_of_keys_does_not_matter() {
        let a = json!({"b": [1, {"z": null, "a": "é\n"}], "a": 0.1});
        let b = json!({"a": 0.1, "b": [1, {"a": "é\n", "z": null}]});
        assert_eq!(
            canonical(&a).unwrap(),
            r#"{"a":0.1,"b":[1,{"a":"é\n","z":null}]}"#
        );
        assert_eq!(digest(&a).unwrap(), digest(&b).unwrap());
        assert_ne!(digest(&a).unwrap(), digest(&json!({"a": 0.2})).unwrap());
    }
}
