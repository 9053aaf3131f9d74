//! A responses request as a chat request.

use crate::protocol::{Object, unsupported, whole, wrong};
use ashlar_api::ApiError;
use serde_json::{Map, Value, json};

/// The chat request's body.
pub(crate) fn to_chat(body: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut o = Object::body(body)?;
    let mut out = Map::new();
    out.insert("model".into(), o.need("model")?);
    let mut turns = Vec::new();
    if let Some(text) = o.text("instructions")? {
        turns.push(json!({"role": "system", "content": text}));
    }
    match o.need("input")? {
        Value::String(text) => turns.push(json!({"role": "user", "content": text})),
        Value::Array(items) => {
            for (i, one) in items.into_iter().enumerate() {
                item(&format!("input[{i}]"), one, &mut turns)?;
            }
        }
        _ => return Err(wrong("input", "a string or an array of items")),
    }
    out.insert("messages".into(), turns.into());
    for (theirs, ours) in [
        ("max_output_tokens", "max_completion_tokens"), ("temperature", "temperature"), ("top_p", "top_p"), ("stream", "stream"),
        ("user", "user"), ("safety_identifier", "safety_identifier"), ("parallel_tool_calls", "parallel_tool_calls"),
    ] {
        if let Some(v) = o.take(theirs) {
            out.insert(ours.into(), v);
        }
    }
    tools(&mut o, &mut out)?;
    if let Some(text) = o.take("text") {
        let mut t = Object::at("text", text)?;
        if let Some(format) = t.take("format") {
            let mut f = Object::at("text.format", format)?;
            match f.need_text("type")?.as_str() {
                "text" => {}
                "json_object" => drop(out.insert("response_format".into(), json!({"type": "json_object"}))),
                "json_schema" => {
                    let mut schema = json!({"name": f.need("name")?, "schema": f.need("schema")?});
                    for field in ["strict", "description"] {
                        if let Some(v) = f.take(field) {
                            schema[field] = v;
                        }
                    }
                    out.insert("response_format".into(), json!({"type": "json_schema", "json_schema": schema}));
                }
                _ => return Err(wrong("text.format.type", "\"text\", \"json_object\" or \"json_schema\"")),
            }
            f.end()?;
        }
        t.end()?;
    }
    if let Some(reasoning) = o.take("reasoning") {
        let mut r = Object::at("reasoning", reasoning)?;
        if let Some(effort) = r.take("effort") {
            out.insert("reasoning_effort".into(), effort);
        }
        r.end()?;
    }
    let nothing = |v: &Value| v == false || *v == json!([]) || *v == 0;
    o.only("store", "answers are not kept to be asked for later", nothing)?;
    o.only("background", "answers are waited for", nothing)?;
    o.only("include", "nothing beside the answer is", nothing)?;
    o.only("top_logprobs", "probabilities are not in these answers", nothing)?;
    o.only("truncation", "only \"disabled\" is", |v| v == "disabled")?;
    o.only("service_tier", "only \"auto\" and \"default\" are", |v| v == "auto" || v == "default")?;
    o.only("stream_options", "chunks are not padded", |v| *v == json!({}) || *v == json!({"include_obfuscation": false}))?;
    if let Some(v) = o.take("metadata")
        && !v.as_object().is_some_and(|m| m.values().all(Value::is_string))
    {
        return Err(wrong("metadata", "an object of strings"));
    }
    o.end()?;
    Ok(Value::Object(out).to_string().into_bytes())
}

fn tools(o: &mut Object, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    match o.take("tools") {
        None => {}
        Some(Value::Array(tools)) => {
            let mut list = Vec::new();
            for (i, tool) in tools.into_iter().enumerate() {
                let mut t = Object::at(&format!("tools[{i}]"), tool)?;
                if t.need_text("type")? != "function" {
                    return Err(unsupported(&t.name("type"), "only functions, which the client runs, are"));
                }
                let mut function = json!({"name": t.need_text("name")?});
                for field in ["description", "parameters", "strict"] {
                    if let Some(v) = t.take(field) {
                        function[field] = v;
                    }
                }
                t.end()?;
                list.push(json!({"type": "function", "function": function}));
            }
            if !list.is_empty() {
                out.insert("tools".into(), list.into());
            }
        }
        Some(_) => return Err(wrong("tools", "an array")),
    }
    match o.take("tool_choice") {
        None => {}
        Some(Value::String(s)) if ["auto", "none", "required"].contains(&s.as_str()) => {
            out.insert("tool_choice".into(), s.into());
        }
        Some(choice) => {
            let mut c = Object::at("tool_choice", choice)?;
            c.only("type", "only a function is", |v| v == "function")?;
            out.insert("tool_choice".into(), json!({"type": "function", "function": {"name": c.need_text("name")?}}));
            c.end()?;
        }
    }
    Ok(())
}

fn item(path: &str, item: Value, turns: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut o = Object::at(path, item)?;
    let kind = o.text("type")?.unwrap_or_else(|| "message".into());
    match kind.as_str() {
        "message" => {
            let role = o.need_text("role")?;
            if !["user", "assistant", "system", "developer"].contains(&role.as_str()) {
                return Err(wrong(&o.name("role"), "\"user\", \"assistant\", \"system\" or \"developer\""));
            }
            let content = content(&o.name("content"), o.need("content")?)?;
            // Of earlier answers that are sent back.
            o.text("id")?;
            o.text("status")?;
            turns.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let call = json!({"id": o.need_text("call_id")?, "type": "function",
                "function": {"name": o.need_text("name")?, "arguments": o.need_text("arguments")?}});
            o.text("id")?;
            o.text("status")?;
            // What is said and called at once is one turn.
            match turns.last_mut().filter(|t| t["role"] == "assistant") {
                Some(turn) => match turn["tool_calls"].as_array_mut() {
                    Some(calls) => calls.push(call),
                    None => turn["tool_calls"] = json!([call]),
                },
                None => turns.push(json!({"role": "assistant", "content": null, "tool_calls": [call]})),
            }
        }
        // Ours, sent back. Chat requests have no place for it, nor do models read it.
        "reasoning" => {
            for field in ["id", "status", "summary", "content", "encrypted_content"] {
                o.take(field);
            }
        }
        "function_call_output" => {
            let (id, output) = (o.need_text("call_id")?, o.need("output")?);
            let content = content(&o.name("output"), output)?;
            o.text("id")?;
            o.text("status")?;
            turns.push(json!({"role": "tool", "tool_call_id": id, "content": content}));
        }
        other => {
            let other: String = other.chars().take(80).collect();
            return Err(unsupported(&o.name("type"), &format!("{other:?} items are not")));
        }
    }
    o.end()
}

fn content(path: &str, content: Value) -> Result<Value, ApiError> {
    let parts = match content {
        Value::String(_) => return Ok(content),
        Value::Array(parts) => parts,
        _ => return Err(wrong(path, "a string or an array of parts")),
    };
    let mut out = Vec::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut p = Object::at(&format!("{path}[{i}]"), part)?;
        let part = match p.need_text("type")?.as_str() {
            "input_text" | "output_text" => {
                p.only("annotations", "answers cite nothing", |v| *v == json!([]))?;
                p.only("logprobs", "they are not read", |v| *v == json!([]))?;
                json!({"type": "text", "text": p.need_text("text")?})
            }
            "refusal" => json!({"type": "text", "text": p.need_text("refusal")?}),
            "input_image" => {
                let mut image = json!({"url": p.need_text("image_url")?});
                if let Some(detail) = p.take("detail") {
                    image["detail"] = detail;
                }
                json!({"type": "image_url", "image_url": image})
            }
            _ => return Err(unsupported(&p.name("type"), "only text and image_url parts are")),
        };
        p.end()?;
        out.push(part);
    }
    Ok(whole(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &Value) -> Result<Value, ApiError> {
        Ok(serde_json::from_slice(&to_chat(body.to_string().as_bytes())?).unwrap())
    }

    #[test]
    fn a_conversation_with_tools() {
        let got = of(&json!({
            "model": "m", "instructions": "be brief", "max_output_tokens": 9, "store": false, "stream": true,
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "f"}, "reasoning": {"effort": "low"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "7"},
            ],
        })).unwrap();
        assert_eq!(got, json!({
            "model": "m", "max_completion_tokens": 9, "stream": true, "reasoning_effort": "low",
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": true}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "messages": [
                {"role": "system", "content": "be brief"}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "7"},
            ],
        }));
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        for (field, value, param) in [
            ("previous_response_id", json!("resp_1"), "previous_response_id"),
            ("store", json!(true), "store"),
            ("background", json!(true), "background"),
            ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
            ("truncation", json!("auto"), "truncation"),
            ("input", json!([{"type": "item_reference", "id": "x"}]), "input[0].type"),
            ("reasoning", json!({"summary": "auto"}), "reasoning.summary"),
            ("tempreature", json!(1), "tempreature"),
        ] {
            let mut body = json!({"model": "m", "input": "hi"});
            body[field] = value;
            let e = of(&body).unwrap_err();
            assert_eq!((e.status, e.param.as_deref()), (400, Some(param)), "{}", e.message);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_body_is_read_or_refused(body: Vec<u8>) {
            let _ = to_chat(&body);
        }
    }
}
