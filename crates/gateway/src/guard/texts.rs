//! The texts of a request: every string of its body but for those that are no
//! text by their nature.
//!
//! No list of places where text may be, which the next API field would be
//! missing from: a list of what is none.

use crate::ask::Ask;
use ashlar_api::ApiError;
use serde_json::Value;

/// Fields whose strings are names, not text.
const NAMES: &[&str] = &[
    "model", "user", "safety_identifier", "prompt_cache_key", "cache_salt", "request_id", "rid", "session_id",
    "service_tier", "stream", "stream_options", "reasoning_effort", "verbosity", "encoding_format",
];

/// Whether `key`'s string inside a message is data in base64, by its parent and
/// its form. Text written there does not reach a model as text.
fn is_data(parent: &str, key: &str, text: &str) -> bool {
    let encoded = |t: &str| !t.is_empty() && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=_-".contains(&b));
    match (parent, key) {
        ("image_url" | "video_url" | "audio_url" | "", "url" | "image_url") => {
            text.strip_prefix("data:").and_then(|t| t.split_once(";base64,")).is_some_and(|(_, data)| encoded(data))
        }
        ("input_audio" | "audio", "data") | ("file", "file_data") => {
            encoded(text.split_once(";base64,").filter(|(head, _)| head.starts_with("data:")).map_or(text, |(_, data)| data))
        }
        _ => false,
    }
}

/// Calls `each` with every text of `value`, keys of objects among them, and puts
/// what it gives in their place.
fn walk(value: &mut Value, parent: &str, key: &str, each: &mut dyn FnMut(&str) -> Option<String>) {
    match value {
        Value::String(text) => {
            if !is_data(parent, key, text)
                && let Some(new) = each(text)
            {
                *text = new;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|v| walk(v, parent, key, each)),
        Value::Object(map) => {
            let mut renamed = Vec::new();
            for (k, v) in map.iter_mut() {
                walk(v, key, k, each);
                if let Some(new) = each(k) {
                    renamed.push((k.clone(), new));
                }
            }
            for (old, new) in renamed {
                if let Some(v) = map.shift_remove(&old) {
                    map.insert(new, v);
                }
            }
        }
        _ => {}
    }
}

/// The request's text fields, read.
pub(super) fn read(ask: &Ask) -> Result<Vec<(String, Value)>, ApiError> {
    let mut out = Vec::new();
    for (name, raw) in ask.fields().filter(|(name, _)| !NAMES.contains(name)) {
        // Numbers and switches hold no text.
        if raw.contains('"') {
            let value = serde_json::from_str(raw).map_err(|e| {
                ApiError::bad_request(format!("{name} is not JSON: {e}"), Some(name), Some("invalid_json"))
            })?;
            out.push((name.to_owned(), value));
        }
    }
    Ok(out)
}

/// Calls `each` with every text of `fields`; what it gives is put in its place.
/// The names of fields that changed.
pub(super) fn each(fields: &mut [(String, Value)], mut each: impl FnMut(&str) -> Option<String>) -> Vec<String> {
    let mut changed = Vec::new();
    for (name, value) in fields {
        let mut new = false;
        walk(value, "", name, &mut |text| {
            let out = each(text);
            new |= out.is_some();
            out
        });
        if new {
            changed.push(name.clone());
        }
    }
    changed
}

/// What users say: of each message with a role other than the operator's or the
/// model's, or of each prompt, its texts together. What a system message says is the
/// operator's own.
pub(super) fn said(fields: &[(String, Value)]) -> Vec<String> {
    let mut out = Vec::new();
    for (name, value) in fields {
        let each: Vec<&Value> = match (name.as_str(), value) {
            ("messages" | "input" | "documents", Value::Array(all)) => {
                let theirs = |m: &&Value| !matches!(m["role"].as_str(), Some("system" | "developer" | "assistant"));
                all.iter().filter(theirs).map(|m| m.get("content").unwrap_or(m)).collect()
            }
            ("prompt", Value::Array(all)) => all.iter().collect(),
            ("prompt" | "input" | "query", one) => vec![one],
            _ => continue,
        };
        for one in each {
            let mut text = String::new();
            gather(one, "", "content", &mut text);
            if !text.is_empty() {
                out.push(text);
            }
        }
    }
    out
}

/// Joins the strings of a message's content, line by line: of a part all but what
/// says of which kind it is.
fn gather(value: &Value, parent: &str, key: &str, out: &mut String) {
    match value {
        Value::String(text) if key == "type" || is_data(parent, key, text) => {}
        Value::String(text) => {
            if !out.is_empty() {
                out.push('\n');
            }
            out.push_str(text);
        }
        Value::Array(items) => items.iter().for_each(|v| gather(v, parent, key, out)),
        Value::Object(map) => map.iter().for_each(|(k, v)| gather(v, key, k, out)),
        _ => {}
    }
}

/// Whether the prompt is given as token ids, which no one here can read.
pub(super) fn unreadable(ask: &Ask) -> Option<&'static str> {
    ["prompt", "input", "tokens"].into_iter().find(|name| {
        let raw = ask.raw(name).unwrap_or("");
        raw.starts_with('[') && raw.bytes().any(|b| b.is_ascii_digit()) && serde_json::from_str::<Value>(raw).is_ok_and(|v| numbers(&v))
    })
}

fn numbers(value: &Value) -> bool {
    match value {
        Value::Array(items) => items.iter().any(numbers),
        Value::Number(_) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Endpoint;
    use axum::http::HeaderMap;
    use serde_json::json;

    fn ask(endpoint: Endpoint, body: Value) -> Ask {
        Ask::read(endpoint, HeaderMap::new(), body.to_string().into(), std::time::Instant::now()).unwrap()
    }

    #[test]
    fn every_string_is_seen_wherever_it_is() {
        let body = json!({"model": "SECRET", "stop": ["SECRET"], "new_field": {"SECRET": [["a SECRET"]]},
            "tools": [{"type": "function", "function": {"name": "f", "description": "SECRET", "parameters": {"x": "SECRET"}}}],
            "messages": [{"role": "user", "content": "SECRET"}, {"role": "user", "content": [
                {"type": "text", "text": "SECRET"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,SECRET"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,a SECRET"}},
                {"type": "input_audio", "input_audio": {"data": "SECRET", "format": "wav"}}]},
                {"role": "assistant", "tool_calls": [{"function": {"arguments": "{\"a\":\"SECRET\"}"}}]},
                {"role": "tool", "content": "data:;base64,SECRET"}]});
        let mut fields = read(&ask(Endpoint::Chat, body)).unwrap();
        let mut seen = 0;
        let changed = each(&mut fields, |t| t.contains("SECRET").then(|| { seen += 1; t.replace("SECRET", "-") }));
        assert_eq!((seen, changed.len()), (11 - 1, 4), "{fields:?}");
        let left: usize = fields.iter().map(|(_, v)| v.to_string().matches("SECRET").count()).sum();
        assert_eq!(left, 2, "an image's and a sound's bytes: {fields:?}");
    }

    #[test]
    fn only_users_are_users() {
        let body = json!({"model": "m", "messages": [{"role": "system", "content": "rules"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": [{"type": "text", "text": "there"}]}]});
        assert_eq!(said(&read(&ask(Endpoint::Chat, body)).unwrap()), ["hi", "there"]);
        let parts = json!([{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "two"}]);
        let body = json!({"model": "m", "messages": [{"role": "user", "content": parts}]});
        assert_eq!(said(&read(&ask(Endpoint::Chat, body)).unwrap()), ["one\ntwo"], "a message is one text, and a picture none");
        let body = json!({"model": "m", "prompt": ["a", "b"]});
        assert_eq!(said(&read(&ask(Endpoint::Completions, body)).unwrap()), ["a", "b"]);
    }

    #[test]
    fn ids_are_no_text() {
        for (prompt, ids) in [(json!([1, 2]), true), (json!([[1], [2]]), true), (json!("1 2"), false), (json!(["1", "2"]), false)] {
            let ask = ask(Endpoint::Completions, json!({"model": "m", "prompt": prompt}));
            assert_eq!(unreadable(&ask).is_some(), ids);
        }
    }
}
