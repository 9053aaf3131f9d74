//! Whether an answer is JSON of the schema it was asked for.
//!
//! The part of JSON Schema that structured outputs use (OpenAI's subset, 2020-12
//! meanings): type, enum, const, properties, required, additionalProperties,
//! items, prefixItems, minItems, maxItems, minimum, maximum and the exclusive
//! ones, multipleOf, minLength, maxLength, pattern, anyOf, oneOf, allOf, not,
//! `$ref` within the schema, `$defs`. A keyword beyond these that would refuse
//! something makes the schema unusable here, and says so; it is not passed over.
//!
//! Rejected: the `jsonschema` crate, whose formats and remote references bring
//! some forty dependencies for what a model's output is never asked.

use regex::Regex;
use serde_json::{Map, Value};
use std::{cell::Cell, collections::HashMap};

/// Most nested references.
const DEPTH: usize = 64;
/// Most schemas held against one answer: what refers to itself twice doubles with
/// each level.
const STEPS: u32 = 1_000_000;

/// Keywords that say nothing about which values are right.
const NOTES: &[&str] = &[
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$defs", "definitions", "format", "nullable",
];
const KNOWN: &[&str] = &[
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems",
    "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength",
    "pattern", "anyOf", "oneOf", "allOf", "not", "$ref",
];

/// A schema.
#[derive(Debug, Clone)]
pub(crate) struct Schema {
    value: Value,
    /// Its patterns, compiled.
    patterns: HashMap<String, Regex>,
}

/// One check: how many steps are left.
struct Check<'s> {
    schema: &'s Schema,
    steps: Cell<u32>,
}

impl Schema {
    /// Reads a schema.
    ///
    /// # Errors
    /// What is wrong with it, or which keyword is not checked here.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        Self::of(serde_json::from_str(text).map_err(|e| e.to_string())?)
    }

    /// Takes a schema.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub(crate) fn of(value: Value) -> Result<Self, String> {
        let mut patterns = HashMap::new();
        usable(&value, &value, 0, &mut patterns)?;
        Ok(Self { value, patterns })
    }

    /// Checks an answer's text.
    ///
    /// # Errors
    /// Where it differs: a path and a keyword, no text of the answer.
    pub(crate) fn check(&self, answer: &str) -> Result<(), String> {
        let value = serde_json::from_str(answer.trim()).map_err(|e| format!("no JSON (line {}, column {})", e.line(), e.column()))?;
        Check { schema: self, steps: Cell::new(STEPS) }.value(&self.value, &value, "$", DEPTH)
    }
}

impl Check<'_> {
    fn value(&self, schema: &Value, value: &Value, at: &str, depth: usize) -> Result<(), String> {
        let Some(depth) = depth.checked_sub(1) else { return Err(format!("{at}: references without end")) };
        let Some(steps) = self.steps.get().checked_sub(1) else { return Err(format!("{at}: more than {STEPS} steps")) };
        self.steps.set(steps);
        let s = match schema {
            Value::Bool(true) => return Ok(()),
            Value::Object(s) => s,
            _ => return Err(format!("{at}: nothing is allowed here")),
        };
        let fail = |keyword: &str| Err(format!("{at}: {keyword}"));
        if let Some(target) = s.get("$ref").and_then(Value::as_str) {
            // It was found when the schema was taken.
            let found = referred(&self.schema.value, target);
            self.value(found.ok_or_else(|| format!("{at}: $ref"))?, value, at, depth)?;
        }
        let kind = |name: &Value| match name.as_str() {
            Some("null") => value.is_null(),
            Some("boolean") => value.is_boolean(),
            Some("string") => value.is_string(),
            Some("array") => value.is_array(),
            Some("object") => value.is_object(),
            Some("number") => value.is_number(),
            Some("integer") => value.as_f64().is_some_and(|n| n.fract() == 0.0),
            _ => false,
        };
        let nullable = value.is_null() && s.get("nullable") == Some(&Value::Bool(true));
        match s.get("type") {
            Some(Value::Array(any)) if !any.iter().any(kind) && !nullable => return fail("type"),
            Some(one @ Value::String(_)) if !kind(one) && !nullable => return fail("type"),
            _ => {}
        }
        if s.get("enum").and_then(Value::as_array).is_some_and(|all| !all.contains(value)) {
            return fail("enum");
        }
        if s.get("const").is_some_and(|c| c != value) {
            return fail("const");
        }
        let holds = |other: &Value| self.value(other, value, at, depth).is_ok();
        let list = |key: &str| s.get(key).and_then(Value::as_array);
        for all in list("allOf").into_iter().flatten() {
            self.value(all, value, at, depth)?;
        }
        if list("anyOf").is_some_and(|any| !any.iter().any(holds)) {
            return fail("anyOf");
        }
        if list("oneOf").is_some_and(|one| one.iter().filter(|o| holds(o)).count() != 1) {
            return fail("oneOf");
        }
        if s.get("not").is_some_and(holds) {
            return fail("not");
        }
        match value {
            Value::Object(map) => self.object(s, map, at, depth),
            Value::Array(items) => self.array(s, items, at, depth),
            Value::String(text) => {
                let length = text.chars().count() as u64;
                let count = |key: &str| s.get(key).and_then(Value::as_u64);
                if count("minLength").is_some_and(|n| length < n) {
                    return fail("minLength");
                }
                if count("maxLength").is_some_and(|n| length > n) {
                    return fail("maxLength");
                }
                let pattern = s.get("pattern").and_then(Value::as_str).and_then(|p| self.schema.patterns.get(p));
                if pattern.is_some_and(|p| !p.is_match(text)) { fail("pattern") } else { Ok(()) }
            }
            Value::Number(n) => {
                let Some(n) = n.as_f64() else { return fail("type") };
                let bound = |key: &str| s.get(key).and_then(Value::as_f64);
                for (key, wrong) in [
                    ("minimum", bound("minimum").is_some_and(|b| n < b)),
                    ("maximum", bound("maximum").is_some_and(|b| n > b)),
                    ("exclusiveMinimum", bound("exclusiveMinimum").is_some_and(|b| n <= b)),
                    ("exclusiveMaximum", bound("exclusiveMaximum").is_some_and(|b| n >= b)),
                    ("multipleOf", bound("multipleOf").is_some_and(|b| ((n / b) - (n / b).round()).abs() > 1e-9)),
                ] {
                    if wrong {
                        return fail(key);
                    }
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn object(&self, s: &Map<String, Value>, map: &Map<String, Value>, at: &str, depth: usize) -> Result<(), String> {
        let required = s.get("required").and_then(Value::as_array).into_iter().flatten();
        if required.filter_map(Value::as_str).any(|name| !map.contains_key(name)) {
            return Err(format!("{at}: required"));
        }
        let known = s.get("properties").and_then(Value::as_object);
        for (i, (name, value)) in map.iter().enumerate() {
            match (known.and_then(|k| k.get(name)), s.get("additionalProperties")) {
                (Some(schema), _) => self.value(schema, value, &format!("{at}.{name}"), depth)?,
                // The name is the answer's own and is not repeated.
                (None, Some(Value::Bool(false))) => return Err(format!("{at}: additionalProperties")),
                (None, Some(schema)) => self.value(schema, value, &format!("{at}.({i})"), depth)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn array(&self, s: &Map<String, Value>, items: &[Value], at: &str, depth: usize) -> Result<(), String> {
        let count = |key: &str| s.get(key).and_then(Value::as_u64);
        if count("minItems").is_some_and(|n| (items.len() as u64) < n) {
            return Err(format!("{at}: minItems"));
        }
        if count("maxItems").is_some_and(|n| items.len() as u64 > n) {
            return Err(format!("{at}: maxItems"));
        }
        let first = s.get("prefixItems").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        for (i, item) in items.iter().enumerate() {
            if let Some(schema) = first.get(i).or(s.get("items")) {
                self.value(schema, item, &format!("{at}[{i}]"), depth)?;
            }
        }
        Ok(())
    }
}

/// What `target` stands for in `root`.
fn referred<'v>(root: &'v Value, target: &str) -> Option<&'v Value> {
    root.pointer(target.strip_prefix('#')?)
}

/// Refuses a schema whose meaning is not fully checked here; collects its patterns.
fn usable(root: &Value, schema: &Value, depth: usize, patterns: &mut HashMap<String, Regex>) -> Result<(), String> {
    if depth > DEPTH {
        return Err(format!("it is nested deeper than {DEPTH}"));
    }
    let Some(map) = schema.as_object() else {
        return if schema.is_boolean() { Ok(()) } else { Err("a schema is an object or a boolean".into()) };
    };
    for (key, value) in map {
        match key.as_str() {
            "pattern" => {
                let pattern = value.as_str().ok_or("pattern must be a string")?;
                let regex = Regex::new(pattern).map_err(|e| format!("pattern {pattern:?}: {}", e.to_string().replace('\n', " ")))?;
                patterns.insert(pattern.to_owned(), regex);
            }
            "$ref" => {
                let target = value.as_str().ok_or("$ref must be a string")?;
                referred(root, target).ok_or_else(|| format!("$ref {target:?} is not in the schema"))?;
            }
            "properties" | "$defs" | "definitions" => {
                let inner = value.as_object().ok_or_else(|| format!("{key} must be an object"))?;
                inner.values().try_for_each(|s| usable(root, s, depth + 1, patterns))?;
            }
            "items" | "additionalProperties" | "not" => usable(root, value, depth + 1, patterns)?,
            "anyOf" | "oneOf" | "allOf" | "prefixItems" => {
                let inner = value.as_array().ok_or_else(|| format!("{key} must be an array"))?;
                inner.iter().try_for_each(|s| usable(root, s, depth + 1, patterns))?;
            }
            known if KNOWN.contains(&known) || NOTES.contains(&known) => {}
            unknown => return Err(format!("the keyword {unknown:?} is not checked here")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_are_right_or_the_place_is_named() {
        let schema = Schema::of(json!({
            "type": "object", "required": ["name", "tags"], "additionalProperties": false,
            "properties": {
                "name": {"type": "string", "minLength": 1, "pattern": "^[a-z]+$"},
                "age": {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": 200},
                "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
                "child": {"$ref": "#/$defs/node"},
                "x": {"anyOf": [{"type": "string"}, {"type": "number", "multipleOf": 0.5}]},
            },
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": false}},
        }))
        .unwrap();
        for right in [r#"{"name":"ab","tags":[]}"#, r#" {"name":"a","tags":["a","b"],"age":3.0,"x":1.5,"child":{"next":{}}} "#, r#"{"name":"a","tags":[],"age":null}"#] {
            assert_eq!(schema.check(right), Ok(()), "{right}");
        }
        for (wrong, says) in [
            ("", "no JSON"), ("Sure! {}", "no JSON"), ("[]", "$: type"), (r#"{"name":"a"}"#, "$: required"),
            (r#"{"name":"","tags":[]}"#, "$.name: minLength"), (r#"{"name":"A","tags":[]}"#, "$.name: pattern"),
            (r#"{"name":"a","tags":["c"]}"#, "$.tags[0]: enum"), (r#"{"name":"a","tags":["a","a","a"]}"#, "$.tags: maxItems"),
            (r#"{"name":"a","tags":[],"age":1.5}"#, "$.age: type"), (r#"{"name":"a","tags":[],"age":200}"#, "$.age: exclusiveMaximum"),
            (r#"{"name":"a","tags":[],"z":1}"#, "$: additionalProperties"), (r#"{"name":"a","tags":[],"x":0.3}"#, "$.x: anyOf"),
            (r#"{"name":"a","tags":[],"child":{"next":{"next":1}}}"#, "$.child.next.next: type"),
        ] {
            assert_eq!(schema.check(wrong).map_err(|e| e.split(" (").next().unwrap().to_owned()), Err(says.to_owned()), "{wrong}");
        }
    }

    #[test]
    fn what_is_not_checked_is_not_passed_over() {
        assert!(Schema::of(json!({"properties": {"a": {"dependentRequired": {}}}})).unwrap_err().contains("dependentRequired"));
        assert!(Schema::of(json!({"pattern": "("})).unwrap_err().contains("pattern"));
        let endless = Schema::of(json!({"$ref": "#"})).unwrap();
        assert!(endless.check("1").unwrap_err().contains("without end"));
    }

    #[test]
    fn a_schema_that_doubles_ends() {
        let bomb = Schema::of(json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}, {"$ref": "#"}]})).unwrap();
        assert!(bomb.check("1").is_err());
        for (schema, says) in [(json!({"$ref": "#/nowhere"}), "not in the schema"), (json!({"$ref": "https://example.org/s"}), "not in the schema"), (json!({"$ref": 1}), "a string")] {
            let why = Schema::of(schema).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
        let many = Schema::of(json!({"items": {"pattern": "^a+$"}})).unwrap();
        assert_eq!(many.check(&json!(vec!["aa"; 10_000]).to_string()), Ok(()));
    }
}
