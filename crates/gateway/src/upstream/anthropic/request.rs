//! A chat request of OpenAI's as a messages request of Anthropic's.
//!
//! What may not happen here: a part of the conversation that is dropped. What
//! has no counterpart is refused by name.

use crate::{
    ask::Ask,
    protocol::{unsupported, wrong},
};
use ashlar_api::ApiError;
use serde_json::{Map, Value, json};

/// The body for `model`; `limit` where the client set none.
pub(super) fn translate(ask: &Ask, model: &str, limit: u32) -> Result<Value, ApiError> {
    let mut out = Map::new();
    out.insert("model".into(), model.into());
    let new: Option<u32> = ask.typed("max_completion_tokens", "a count")?;
    let old: Option<u32> = ask.typed("max_tokens", "a count")?;
    if let (Some(new), Some(old)) = (new, old)
        && new != old
    {
        let message = format!("max_tokens is {old} but max_completion_tokens is {new}: give one");
        return Err(ApiError::bad_request(message, Some("max_tokens"), Some("invalid_value")));
    }
    out.insert("max_tokens".into(), new.or(old).unwrap_or(limit).into());
    let (system, messages) = messages(ask)?;
    if !system.is_empty() {
        out.insert("system".into(), system.into());
    }
    out.insert("messages".into(), messages.into());
    if ask.stream {
        out.insert("stream".into(), true.into());
    }
    if let Some(t) = ask.typed::<f64>("temperature", "a number")? {
        if !(0.0..=1.0).contains(&t) {
            let message = format!("temperature must be between 0 and 1 for this backend, got {t}");
            return Err(ApiError::bad_request(message, Some("temperature"), Some("invalid_value")));
        }
        out.insert("temperature".into(), t.into());
    }
    for name in ["top_p", "top_k"] {
        if let Some(v) = ask.typed::<Value>(name, "a number")? {
            out.insert(name.into(), v);
        }
    }
    match ask.typed::<Value>("stop", "a string or an array of strings")? {
        None => {}
        Some(Value::String(s)) => {
            out.insert("stop_sequences".into(), json!([s]));
        }
        Some(list @ Value::Array(_)) => {
            out.insert("stop_sequences".into(), list);
        }
        Some(_) => return Err(wrong("stop", "a string or an array of strings")),
    }
    let user: Option<String> = ask.typed("safety_identifier", "a string")?;
    let user = user.map_or_else(|| ask.typed("user", "a string"), |u| Ok(Some(u)))?;
    if let Some(user) = user {
        out.insert("metadata".into(), json!({"user_id": user}));
    }
    if ask.typed::<u32>("n", "a count")?.is_some_and(|n| n != 1) {
        return Err(unsupported("n", "this backend gives one answer a request"));
    }
    if let Some(format) = ask.typed::<Value>("response_format", "an object")?
        && format != json!({"type": "text"})
    {
        return Err(unsupported("response_format", "this backend takes only {\"type\":\"text\"}"));
    }
    if let Some(tier) = ask.typed::<String>("service_tier", "a string")? {
        let tier = match tier.as_str() {
            "auto" => "auto",
            "default" | "standard_only" => "standard_only",
            _ => return Err(unsupported("service_tier", "this backend takes \"auto\" and \"default\"")),
        };
        out.insert("service_tier".into(), tier.into());
    }
    tools(ask, &mut out)?;
    Ok(Value::Object(out))
}

fn tools(ask: &Ask, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(tools) = ask.typed::<Vec<Value>>("tools", "an array")?.filter(|t| !t.is_empty()) else {
        return Ok(());
    };
    let mut list = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        let function = &tool["function"];
        let (Some("function"), Some(name)) = (tool["type"].as_str(), function["name"].as_str()) else {
            return Err(unsupported(&format!("tools[{i}]"), "only tools of type function with a name are"));
        };
        let schema = function.get("parameters").cloned().unwrap_or_else(|| json!({"type": "object"}));
        let mut one = json!({"name": name, "input_schema": schema});
        if let Some(text) = function.get("description") {
            one["description"] = text.clone();
        }
        if function.get("strict").is_some_and(|s| s == true) {
            one["strict"] = true.into();
        }
        list.push(one);
    }
    out.insert("tools".into(), list.into());
    let choice = ask.typed::<Value>("tool_choice", "a string or an object")?;
    let mut choice = match &choice {
        None => None,
        Some(Value::String(s)) => Some(match s.as_str() {
            "auto" => json!({"type": "auto"}),
            "none" => json!({"type": "none"}),
            "required" => json!({"type": "any"}),
            _ => return Err(wrong("tool_choice", "\"auto\", \"none\", \"required\" or a function")),
        }),
        Some(other) => match other["function"]["name"].as_str() {
            Some(name) => Some(json!({"type": "tool", "name": name})),
            None => return Err(wrong("tool_choice", "\"auto\", \"none\", \"required\" or a function")),
        },
    };
    if ask.typed::<bool>("parallel_tool_calls", "true or false")? == Some(false) {
        let choice = choice.get_or_insert_with(|| json!({"type": "auto"}));
        if choice["type"] != "none" {
            choice["disable_parallel_tool_use"] = true.into();
        }
    }
    if let Some(choice) = choice {
        out.insert("tool_choice".into(), choice);
    }
    Ok(())
}

/// The system text and the turns; neighbours of one role become one turn, as
/// the results of several tools must.
fn messages(ask: &Ask) -> Result<(String, Vec<Value>), ApiError> {
    let list: Vec<Map<String, Value>> =
        ask.typed("messages", "an array of objects")?.unwrap_or_default();
    let mut system: Vec<String> = Vec::new();
    let mut turns: Vec<(&str, Vec<Value>)> = Vec::new();
    for (i, message) in list.iter().enumerate() {
        let at = |field: &str| format!("messages[{i}].{field}");
        for (field, value) in message {
            let known = matches!(field.as_str(), "role" | "content" | "tool_calls" | "tool_call_id" | "annotations" | "refusal");
            if !known && !value.is_null() {
                return Err(unsupported(&at(field), "this backend's messages have no such field"));
            }
        }
        let role = message.get("role").and_then(Value::as_str).unwrap_or_default();
        let content = message.get("content").unwrap_or(&Value::Null);
        let (turn, blocks) = match role {
            "system" | "developer" => {
                if !turns.is_empty() {
                    return Err(unsupported(&at("role"), "this backend takes instructions before the first turn only"));
                }
                for block in parts(content, &at("content"))? {
                    match block["text"].as_str() {
                        Some(text) => system.push(text.to_owned()),
                        None => return Err(unsupported(&at("content"), "instructions are text only")),
                    }
                }
                continue;
            }
            "user" => ("user", parts(content, &at("content"))?),
            "assistant" => {
                let mut blocks = parts(content, &at("content"))?;
                let calls = message.get("tool_calls").and_then(Value::as_array);
                for (j, call) in calls.into_iter().flatten().enumerate() {
                    let function = &call["function"];
                    let arguments = function["arguments"].as_str().unwrap_or("");
                    let input: Value = serde_json::from_str(if arguments.is_empty() { "{}" } else { arguments })
                        .map_err(|_| wrong(&at(&format!("tool_calls[{j}].function.arguments")), "JSON"))?;
                    blocks.push(json!({"type": "tool_use", "id": call["id"], "name": function["name"], "input": input}));
                }
                ("assistant", blocks)
            }
            "tool" => {
                let id = message.get("tool_call_id").and_then(Value::as_str);
                let id = id.ok_or_else(|| wrong(&at("tool_call_id"), "the id of a call"))?;
                let result = parts(content, &at("content"))?;
                ("user", vec![json!({"type": "tool_result", "tool_use_id": id, "content": result})])
            }
            _ => return Err(wrong(&at("role"), "system, developer, user, assistant or tool")),
        };
        match turns.last_mut() {
            Some((last, all)) if *last == turn => all.extend(blocks),
            _ => turns.push((turn, blocks)),
        }
    }
    let turns = turns.into_iter().map(|(role, content)| json!({"role": role, "content": content}));
    Ok((system.join("\n\n"), turns.collect()))
}

/// Content as blocks; empty text, which the API refuses, is no block.
fn parts(content: &Value, path: &str) -> Result<Vec<Value>, ApiError> {
    match content {
        Value::Null => Ok(Vec::new()),
        Value::String(s) if s.is_empty() => Ok(Vec::new()),
        Value::String(s) => Ok(vec![json!({"type": "text", "text": s})]),
        Value::Array(parts) => parts.iter().enumerate().map(|(i, p)| part(p, &format!("{path}[{i}]"))).collect(),
        _ => Err(wrong(path, "a string or an array of parts")),
    }
}

fn part(part: &Value, path: &str) -> Result<Value, ApiError> {
    match part["type"].as_str() {
        Some("text" | "refusal") => {
            let text = part["text"].as_str().or(part["refusal"].as_str());
            let text = text.ok_or_else(|| wrong(&format!("{path}.text"), "a string"))?;
            Ok(json!({"type": "text", "text": text}))
        }
        Some("image_url") => {
            let url = part["image_url"]["url"].as_str();
            let url = url.ok_or_else(|| wrong(&format!("{path}.image_url.url"), "a string"))?;
            let source = match url.strip_prefix("data:").map(|d| d.split_once(";base64,")) {
                None => json!({"type": "url", "url": url}),
                Some(Some((kind, data))) => json!({"type": "base64", "media_type": kind, "data": data}),
                Some(None) => return Err(wrong(&format!("{path}.image_url.url"), "an address or base64 data")),
            };
            Ok(json!({"type": "image", "source": source}))
        }
        _ => Err(unsupported(path, "only parts of type text and image_url are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Endpoint;
    use axum::http::HeaderMap;

    fn of(body: Value) -> Result<Value, ApiError> {
        let body = body.to_string();
        let ask = Ask::read(Endpoint::Chat, HeaderMap::new(), body.into(), std::time::Instant::now())?;
        translate(&ask, "claude-x", 4096)
    }

    #[test]
    fn a_conversation_with_tools_and_images() {
        let got = of(json!({
            "model": "m", "stream": true, "stop": "END", "temperature": 0.5, "user": "u", "max_tokens": 9,
            "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}],
            "tool_choice": "required", "parallel_tool_calls": false,
            "messages": [
                {"role": "system", "content": "be brief"}, {"role": "developer", "content": [{"type": "text", "text": "really"}]},
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}]},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}, {"id": "t2", "type": "function", "function": {"name": "f", "arguments": ""}}]},
                {"role": "tool", "tool_call_id": "t1", "content": "one"}, {"role": "tool", "tool_call_id": "t2", "content": "two"},
                {"role": "user", "content": "so?"},
            ],
        })).unwrap();
        assert_eq!(got, json!({
            "model": "claude-x", "max_tokens": 9, "system": "be brief\n\nreally", "stream": true, "temperature": 0.5,
            "stop_sequences": ["END"], "metadata": {"user_id": "u"},
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}]},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}, {"type": "tool_use", "id": "t2", "name": "f", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "one"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "two"}]},
                    {"type": "text", "text": "so?"},
                ]},
            ],
        }));
    }

    #[test]
    fn what_has_no_counterpart_is_refused_by_name() {
        let user = json!([{"role": "user", "content": "hi"}]);
        for (field, value, param) in [
            ("temperature", json!(1.5), "temperature"),
            ("n", json!(2), "n"),
            ("response_format", json!({"type": "json_object"}), "response_format"),
            ("tools", json!([{"type": "web"}]), "tools[0]"),
            ("max_completion_tokens", json!(5), "max_tokens"),
            ("messages", json!([{"role": "user", "content": "a", "name": "b"}]), "messages[0].name"),
            ("messages", json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]), "messages[1].role"),
            ("messages", json!([{"role": "user", "content": [{"type": "input_audio"}]}]), "messages[0].content[0]"),
            ("messages", json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
        ] {
            let mut body = json!({"model": "m", "messages": user, "max_tokens": 4});
            body[field] = value;
            let e = of(body).unwrap_err();
            assert_eq!((e.status, e.param.as_deref()), (400, Some(param)), "{}", e.message);
        }
        assert_eq!(of(json!({"model": "m", "messages": user})).unwrap()["max_tokens"], 4096);
    }
}
