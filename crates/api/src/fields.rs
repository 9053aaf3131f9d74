//! Reading a JSON object field by field, so that every refusal names its field.
//!
//! Rejected: deriving `Deserialize` with `deny_unknown_fields`: it cannot tell
//! unknown from unsupported, stops at the first type error without the field's
//! path, and reads `null` and an absent field differently.

use crate::ApiError;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// The fields not read yet, and the path in front of their names.
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

/// A top-level object; a key given twice is an error, since one would be lost.
struct Unique(Map<String, Value>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Unique;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Unique, A::Error> {
                let mut map = Map::new();
                while let Some((key, value)) = access.next_entry::<String, Value>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format!(
                            "{:?} is given twice",
                            brief(&key)
                        )));
                    }
                    map.insert(key, value);
                }
                Ok(Unique(map))
            }
        }
        d.deserialize_map(V)
    }
}

/// At most 80 characters of what a client sent, for messages.
pub(crate) fn brief(s: &str) -> String {
    let mut out: String = s.chars().take(80).collect();
    if out.len() < s.len() {
        out.push('…');
    }
    out
}

fn show(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "an array".into(),
        Value::Bool(_) => "a boolean".into(),
        Value::Null => "null".into(),
        Value::String(s) => format!("the string {:?}", brief(s)),
        Value::Number(n) => n.to_string(),
    }
}

/// 400 for a value of the wrong JSON type.
pub(crate) fn wrong_type(param: &str, wanted: &str, got: &Value) -> ApiError {
    ApiError::bad_request(
        format!("{param} must be {wanted}, got {}", show(got)),
        Some(param),
        Some("invalid_type"),
    )
}

/// 400 for a value of the right type that cannot be meant.
pub(crate) fn invalid(param: &str, message: String) -> ApiError {
    ApiError::bad_request(message, Some(param), Some("invalid_value"))
}

/// 400 for a field of the public schema that is not served here.
pub(crate) fn unsupported(param: &str, why: &str) -> ApiError {
    ApiError::bad_request(
        format!("{param} is not supported here: {why}"),
        Some(param),
        Some("unsupported_parameter"),
    )
}

impl Fields {
    /// Reads a request body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let Unique(map) = serde_json::from_slice(body).map_err(|e| {
            ApiError::bad_request(
                format!("the body is not the JSON object expected: {e}"),
                None,
                Some("invalid_json"),
            )
        })?;
        Ok(Self {
            path: String::new(),
            map,
        })
    }

    /// Reads an object inside a request; `path` is its own name.
    pub(crate) fn nested(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self {
                path: format!("{path}."),
                map,
            }),
            other => Err(wrong_type(path, "an object", &other)),
        }
    }

    /// The full name of the field `key`.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{}", self.path, brief(key))
    }

    /// Takes a field; `null` counts as absent.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|v| !v.is_null())
    }

    /// Takes a field that must be there.
    pub(crate) fn required(&mut self, key: &str) -> Result<Value, ApiError> {
        self.take(key).ok_or_else(|| {
            let name = self.name(key);
            ApiError::bad_request(
                format!("{name} is required"),
                Some(&name),
                Some("missing_required_parameter"),
            )
        })
    }

    pub(crate) fn string(&mut self, key: &str) -> Result<Option<String>, ApiError> {
        self.take(key)
            .map(|v| match v {
                Value::String(s) => Ok(s),
                other => Err(wrong_type(&self.name(key), "a string", &other)),
            })
            .transpose()
    }

    pub(crate) fn bool(&mut self, key: &str) -> Result<Option<bool>, ApiError> {
        self.take(key)
            .map(|v| {
                v.as_bool()
                    .ok_or_else(|| wrong_type(&self.name(key), "true or false", &v))
            })
            .transpose()
    }

    /// An integer within `low..=high`.
    pub(crate) fn integer(
        &mut self,
        key: &str,
        low: i64,
        high: i64,
    ) -> Result<Option<i64>, ApiError> {
        let Some(v) = self.take(key) else {
            return Ok(None);
        };
        let name = self.name(key);
        let range = || {
            invalid(
                &name,
                format!("{name} must be between {low} and {high}, got {v}"),
            )
        };
        match v.as_i64() {
            Some(i) if (low..=high).contains(&i) => Ok(Some(i)),
            Some(_) => Err(range()),
            None if v.is_u64() => Err(range()),
            None => Err(wrong_type(&name, "an integer", &v)),
        }
    }

    /// A count of at least `low` that fits 32 bits.
    pub(crate) fn count(&mut self, key: &str, low: u32) -> Result<Option<u32>, ApiError> {
        let read = self.integer(key, i64::from(low), i64::from(u32::MAX))?;
        Ok(read.and_then(|i| u32::try_from(i).ok()))
    }

    /// A number within `low..=high`.
    pub(crate) fn number(
        &mut self,
        key: &str,
        low: f64,
        high: f64,
    ) -> Result<Option<f32>, ApiError> {
        let Some(v) = self.take(key) else {
            return Ok(None);
        };
        let name = self.name(key);
        match v.as_f64() {
            Some(x) if (low..=high).contains(&x) => Ok(Some(x as f32)),
            Some(_) => Err(invalid(
                &name,
                format!("{name} must be between {low} and {high}, got {v}"),
            )),
            None => Err(wrong_type(&name, "a number", &v)),
        }
    }

    /// Takes a known field that is served only where it changes nothing.
    pub(crate) fn only_if(
        &mut self,
        key: &str,
        why: &str,
        means_nothing: impl Fn(&Value) -> bool,
    ) -> Result<(), ApiError> {
        match self.take(key) {
            Some(v) if !means_nothing(&v) => Err(unsupported(&self.name(key), why)),
            _ => Ok(()),
        }
    }

    /// Ends the reading: a field left over is named.
    pub(crate) fn finish(mut self) -> Result<(), ApiError> {
        // Even with a null value: a misspelt field is misspelt all the same.
        let Some((key, _)) = std::mem::take(&mut self.map).into_iter().next() else {
            return Ok(());
        };
        let name = self.name(&key);
        Err(ApiError::bad_request(
            format!("unknown field {name:?}"),
            Some(&name),
            Some("unknown_parameter"),
        ))
    }
}
