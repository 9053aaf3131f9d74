//! What a span says of a request and, where contents are asked for, its words.

use crate::{
    ask::Ask,
    telemetry::{encode::attribute, proto::Span, semconv},
};
use serde_json::{Value, json};

/// Most bytes of a prompt or an answer in a span.
pub(super) const CONTENTS: usize = 64 << 10;

/// What `ask` asks for, without its words.
pub(super) fn request(span: &mut Span, ask: &Ask, id: &str, model: &str) {
    let operation = semconv::operation(ask.endpoint.path());
    span.name = format!("{operation} {model}");
    span.attributes.extend([
        attribute(semconv::OPERATION, operation),
        attribute(semconv::PROVIDER, semconv::OURS),
        attribute(semconv::REQUEST_MODEL, ask.model.as_str()),
        attribute(semconv::RESPONSE_ID, id),
    ]);
    for (field, name) in semconv::NUMBERS {
        let Some(raw) = ask.raw(field) else { continue };
        if span.attributes.iter().any(|kv| kv.key == name) {
            continue;
        }
        if let Ok(n) = raw.parse::<i64>() {
            span.attributes.push(attribute(name, n));
        } else if let Ok(n) = raw.parse::<f64>() {
            span.attributes.push(attribute(name, n));
        }
    }
    let (field, name) = semconv::STOP;
    if let Some(raw) = ask.raw(field) {
        let one = serde_json::from_str::<String>(raw).map(|s| vec![s]);
        if let Ok(stop) = serde_json::from_str::<Vec<String>>(raw).or(one) {
            span.attributes.push(attribute(name, stop));
        }
    }
    if let Some(n) = ask.raw("n").and_then(|raw| raw.parse::<i64>().ok()).filter(|n| *n != 1) {
        span.attributes.push(attribute(semconv::CHOICES, n));
    }
}

/// A prompt's JSON in the conventions' form: roles with parts. One that is too
/// long to be sent whole is cut, and is JSON no more.
pub(super) fn messages(prompt: &str) -> String {
    let part = |part: &Value| match part["text"].as_str() {
        Some(text) => json!({"type": "text", "content": text}),
        // Pictures and sound stay out.
        None => json!({"type": part["type"]}),
    };
    let parts = |content: &Value| match content {
        Value::String(text) => json!([{"type": "text", "content": text}]),
        Value::Array(list) => list.iter().map(part).collect(),
        _ => json!([]),
    };
    let list = match serde_json::from_str(prompt).unwrap_or_default() {
        Value::Array(list) if list.iter().all(|m| m.get("role").is_some()) => {
            list.iter().map(|m| json!({"role": m["role"], "parts": parts(&m["content"])})).collect()
        }
        other => json!([{"role": "user", "parts": parts(&other)}]),
    };
    cut(list.to_string())
}

/// An answer in the same form.
pub(super) fn answer(text: String) -> String {
    json!([{"role": "assistant", "parts": [{"type": "text", "content": cut(text)}]}]).to_string()
}

fn cut(mut text: String) -> String {
    if text.len() > CONTENTS {
        let end = (0..=CONTENTS).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_every_form_become_messages() {
        let read = |prompt: &str| serde_json::from_str::<Value>(&messages(prompt)).unwrap();
        let text = |t: &str| json!({"type": "text", "content": t});
        assert_eq!(read(r#"[{"role":"user","content":"é"}]"#), json!([{"role": "user", "parts": [text("é")]}]));
        let mixed = r#"[{"role":"system","content":[{"type":"text","text":"a"},{"type":"image_url","image_url":{"url":"data:x"}}]}]"#;
        assert_eq!(read(mixed), json!([{"role": "system", "parts": [text("a"), {"type": "image_url"}]}]));
        assert_eq!(read("\"once\""), json!([{"role": "user", "parts": [text("once")]}]));
        assert_eq!(read("[1,2]")[0]["role"], "user");
        assert_eq!(read("{")[0]["parts"], json!([]));
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = cut("é".repeat(CONTENTS));
        assert_eq!((long.len(), long.chars().all(|c| c == 'é')), (CONTENTS, true));
        assert!(cut(format!("a{}", "é".repeat(CONTENTS))).len() < CONTENTS);
    }
}
