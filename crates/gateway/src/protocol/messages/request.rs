//! A messages request of Anthropic's as a chat request of OpenAI's.
//!
//! Accepted though they change nothing: `cache_control` (a hint to a cache that
//! works by itself here), and thinking of earlier turns, which Anthropic's API
//! leaves out of the conversation, too.

use crate::protocol::{Object, unsupported, whole, wrong};
use ashlar_api::ApiError;
use serde_json::{Map, Value, json};

/// The chat request's body.
pub(crate) fn to_chat(body: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut o = Object::body(body)?;
    let mut out = Map::new();
    out.insert("model".into(), o.need("model")?);
    let limit = o.need("max_tokens")?;
    if !limit.as_u64().is_some_and(|n| n >= 1) {
        return Err(wrong("max_tokens", "a count of at least 1"));
    }
    out.insert("max_tokens".into(), limit);
    let mut turns = Vec::new();
    if let Some(system) = o.take("system") {
        turns.push(json!({"role": "system", "content": text_content("system", system)?}));
    }
    let Value::Array(messages) = o.need("messages")? else { return Err(wrong("messages", "an array")) };
    let last = messages.len().saturating_sub(1);
    for (i, message) in messages.into_iter().enumerate() {
        turn(&format!("messages[{i}]"), message, i == last, &mut turns)?;
    }
    out.insert("messages".into(), turns.into());
    for (theirs, ours) in [("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"), ("stream", "stream"), ("stop_sequences", "stop")] {
        if let Some(v) = o.take(theirs).filter(|v| v != &json!([])) {
            out.insert(ours.into(), v);
        }
    }
    if let Some(metadata) = o.take("metadata") {
        let mut m = Object::at("metadata", metadata)?;
        if let Some(user) = m.text("user_id")? {
            out.insert("user".into(), user.into());
        }
        m.end()?;
    }
    tools(&mut o, &mut out)?;
    o.only("thinking", "only {\"type\":\"disabled\"} is", |v| *v == json!({"type": "disabled"}))?;
    o.only("service_tier", "only \"auto\" is", |v| v == "auto")?;
    o.end()?;
    Ok(Value::Object(out).to_string().into_bytes())
}

fn tools(o: &mut Object, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let mut list = Vec::new();
    match o.take("tools") {
        None => {}
        Some(Value::Array(tools)) => {
            for (i, tool) in tools.into_iter().enumerate() {
                let mut t = Object::at(&format!("tools[{i}]"), tool)?;
                t.only("type", "only tools that the client runs are", |v| v == "custom")?;
                let mut function = json!({"name": t.need_text("name")?, "parameters": t.need("input_schema")?});
                for field in ["description", "strict"] {
                    if let Some(v) = t.take(field) {
                        function[field] = v;
                    }
                }
                t.take("cache_control");
                t.end()?;
                list.push(json!({"type": "function", "function": function}));
            }
        }
        Some(_) => return Err(wrong("tools", "an array")),
    }
    if let Some(choice) = o.take("tool_choice") {
        let mut c = Object::at("tool_choice", choice)?;
        let choice = match c.need_text("type")?.as_str() {
            "auto" => json!("auto"),
            "any" => json!("required"),
            "none" => json!("none"),
            "tool" => json!({"type": "function", "function": {"name": c.need_text("name")?}}),
            _ => return Err(wrong("tool_choice.type", "\"auto\", \"any\", \"tool\" or \"none\"")),
        };
        match c.take("disable_parallel_tool_use") {
            None => {}
            Some(Value::Bool(off)) => {
                out.insert("parallel_tool_calls".into(), (!off).into());
            }
            Some(_) => return Err(wrong("tool_choice.disable_parallel_tool_use", "true or false")),
        }
        c.end()?;
        out.insert("tool_choice".into(), choice);
    }
    if !list.is_empty() {
        out.insert("tools".into(), list.into());
    }
    Ok(())
}

/// A text, or the text blocks of an array.
fn text_content(path: &str, content: Value) -> Result<Value, ApiError> {
    let blocks = match content {
        Value::String(_) => return Ok(content),
        Value::Array(blocks) => blocks,
        _ => return Err(wrong(path, "a string or an array of blocks")),
    };
    let mut parts = Vec::new();
    for (i, block) in blocks.into_iter().enumerate() {
        let mut b = Object::at(&format!("{path}[{i}]"), block)?;
        b.only("type", "only text is here", |v| v == "text")?;
        parts.push(text_part(b)?);
    }
    Ok(whole(parts))
}

fn text_part(mut b: Object) -> Result<Value, ApiError> {
    let text = b.need_text("text")?;
    b.take("cache_control");
    b.only("citations", "answers cite nothing", |v| *v == json!([]))?;
    b.end()?;
    Ok(json!({"type": "text", "text": text}))
}

/// A turn; results of tools become turns of their own before what else is said.
fn turn(path: &str, message: Value, last: bool, turns: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut m = Object::at(path, message)?;
    let role = m.need_text("role")?;
    let content = m.need("content")?;
    m.end()?;
    let at = format!("{path}.content");
    let assistant = match role.as_str() {
        "user" => false,
        "assistant" if last => {
            return Err(unsupported(&format!("{path}.role"), "the last turn must be the user's: an answer is not begun by the client"));
        }
        "assistant" => true,
        _ => return Err(wrong(&format!("{path}.role"), "\"user\" or \"assistant\"")),
    };
    let blocks = match content {
        Value::String(text) => vec![json!({"type": "text", "text": text})],
        Value::Array(blocks) => blocks,
        _ => return Err(wrong(&at, "a string or an array of blocks")),
    };
    let (mut parts, mut calls) = (Vec::new(), Vec::new());
    for (i, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{i}]");
        let mut b = Object::at(&at, block)?;
        match (b.need_text("type")?.as_str(), assistant) {
            ("text", _) => parts.push(text_part(b)?),
            ("image", false) => parts.push(image(b)?),
            ("tool_use", true) => {
                let (id, name, input) = (b.need_text("id")?, b.need_text("name")?, b.need("input")?);
                b.take("cache_control");
                b.end()?;
                calls.push(json!({"id": id, "type": "function", "function": {"name": name, "arguments": input.to_string()}}));
            }
            ("tool_result", false) => {
                let id = b.need_text("tool_use_id")?;
                let content = match b.take("content") {
                    Some(content) => text_content(&format!("{at}.content"), content)?,
                    None => "".into(),
                };
                let failed = match b.take("is_error") {
                    None => false,
                    Some(Value::Bool(failed)) => failed,
                    Some(_) => return Err(wrong(&format!("{at}.is_error"), "true or false")),
                };
                b.take("cache_control");
                b.end()?;
                // Chat messages cannot say that a tool failed but in words.
                let content = match content {
                    Value::String(s) if failed => format!("error: {s}").into(),
                    Value::Array(mut parts) if failed => {
                        parts.insert(0, json!({"type": "text", "text": "error: "}));
                        parts.into()
                    }
                    other => other,
                };
                turns.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
            }
            ("thinking" | "redacted_thinking", true) => {}
            (kind, _) => {
                let kind: String = kind.chars().take(80).collect();
                return Err(unsupported(&format!("{at}.type"), &format!("{kind:?} in a turn of the {role}")));
            }
        }
    }
    if assistant {
        let content = if parts.is_empty() { Value::Null } else { whole(parts) };
        let mut turn = json!({"role": role, "content": content});
        if !calls.is_empty() {
            turn["tool_calls"] = calls.into();
        }
        turns.push(turn);
    } else if !parts.is_empty() {
        turns.push(json!({"role": role, "content": whole(parts)}));
    }
    Ok(())
}

fn image(mut b: Object) -> Result<Value, ApiError> {
    let at = b.name("source");
    let mut source = Object::at(&at, b.need("source")?)?;
    b.take("cache_control");
    b.end()?;
    let url = match source.need_text("type")?.as_str() {
        "url" => source.need_text("url")?,
        "base64" => format!("data:{};base64,{}", source.need_text("media_type")?, source.need_text("data")?),
        _ => return Err(unsupported(&format!("{at}.type"), "only \"url\" and \"base64\" are")),
    };
    source.end()?;
    Ok(json!({"type": "image_url", "image_url": {"url": url}}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &Value) -> Result<Value, ApiError> {
        Ok(serde_json::from_slice(&to_chat(body.to_string().as_bytes())?).unwrap())
    }

    #[test]
    fn a_conversation_with_tools_and_images() {
        let cached = json!({"type": "ephemeral"});
        let got = of(&json!({
            "model": "m", "max_tokens": 9, "stream": true, "temperature": 0.5, "top_k": 3, "stop_sequences": ["END"],
            "system": [{"type": "text", "text": "be brief", "cache_control": cached}], "metadata": {"user_id": "u"},
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}]},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "so"}, {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": true}, {"type": "text", "text": "and?"}]},
            ],
        })).unwrap();
        assert_eq!(got, json!({
            "model": "m", "max_tokens": 9, "stream": true, "temperature": 0.5, "top_k": 3, "stop": ["END"], "user": "u",
            "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}}, "parallel_tool_calls": false,
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}]},
                {"role": "assistant", "content": "so", "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]},
                {"role": "tool", "tool_call_id": "t1", "content": "error: no"},
                {"role": "user", "content": "and?"},
            ],
        }));
    }

    #[test]
    fn what_has_no_counterpart_is_refused_by_name() {
        let user = json!([{"role": "user", "content": "hi"}]);
        for (field, value, param) in [
            ("max_tokens", json!(0), "max_tokens"),
            ("thinking", json!({"type": "enabled", "budget_tokens": 1024}), "thinking"),
            ("mcp_servers", json!([]), "mcp_servers"),
            ("tools", json!([{"type": "web_search_20250305", "name": "web_search"}]), "tools[0].type"),
            ("metadata", json!({"user": "x"}), "metadata.user"),
            ("messages", json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "messages[1].role"),
            ("messages", json!([{"role": "user", "content": [{"type": "document", "source": {}}]}]), "messages[0].content[0].type"),
            ("messages", json!([{"role": "system", "content": "x"}]), "messages[0].role"),
        ] {
            let mut body = json!({"model": "m", "messages": user, "max_tokens": 4});
            body[field] = value;
            let e = of(&body).unwrap_err();
            assert_eq!((e.status, e.param.as_deref()), (400, Some(param)), "{}", e.message);
        }
        assert_eq!(of(&json!({"model": "m", "messages": user})).unwrap_err().param.as_deref(), Some("max_tokens"));
    }

    proptest::proptest! {
        #[test]
        fn any_body_is_read_or_refused(body: Vec<u8>) {
            let _ = to_chat(&body);
        }
    }
}
