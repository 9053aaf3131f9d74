//! A messages answer of Anthropic's as a chat answer of OpenAI's.

use crate::upstream::{
    Chunk, End, Link, Piece, Tokens, UpstreamError,
    http::Reader,
    usage::AnthropicUsage,
};
use crate::{ask::estimate, protocol::ERRORS};
use ashlar_api::Finish;
use ashlar_core::clock;
use serde::Deserialize;
use serde_json::{Value, json};

/// OpenAI's word for a stop reason, ours, and whether it is a refusal.
fn stop_reason(reason: &str) -> (&'static str, Finish, bool) {
    match reason {
        "max_tokens" | "model_context_window_exceeded" => ("length", Finish::Length, false),
        "tool_use" => ("tool_calls", Finish::ToolCalls, false),
        "refusal" => ("content_filter", Finish::ContentFilter, true),
        _ => ("stop", Finish::Stop, false),
    }
}

/// `usage` as OpenAI's clients read it, with Anthropic's classes kept visible.
fn usage_json(tokens: &Tokens) -> String {
    json!({
        "prompt_tokens": tokens.prompt(), "completion_tokens": tokens.completion(),
        "total_tokens": tokens.prompt().saturating_add(tokens.completion()),
        "prompt_tokens_details": {"cached_tokens": tokens.cache_read, "cache_creation_tokens": tokens.cache_write},
    })
    .to_string()
}

#[derive(Deserialize)]
struct Whole {
    content: Vec<Value>,
    stop_reason: Option<String>,
    #[serde(default)]
    usage: AnthropicUsage,
}

/// Both pieces of a whole answer.
pub(super) fn whole(body: &[u8], prompt: u32) -> Result<[Piece; 2], String> {
    let whole: Whole = serde_json::from_slice(body).map_err(|e| e.to_string())?;
    let (mut text, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for block in &whole.content {
        match block["type"].as_str() {
            Some("text") => text.push_str(block["text"].as_str().unwrap_or_default()),
            Some("thinking") => reasoning.push_str(block["thinking"].as_str().unwrap_or_default()),
            Some("redacted_thinking") => {}
            Some("tool_use") => calls.push(json!({
                "id": block["id"], "type": "function",
                "function": {"name": block["name"], "arguments": block["input"].to_string()},
            })),
            other => return Err(format!("a content block of type {other:?}")),
        }
    }
    let (word, finish, refused) = stop_reason(whole.stop_reason.as_deref().unwrap_or("end_turn"));
    let spoken = estimate(text.len() + reasoning.len() + calls.iter().map(|c| c.to_string().len()).sum::<usize>());
    let counted = whole.usage.tokens();
    let tokens = counted.unwrap_or_else(|| Tokens::estimate(prompt, spoken));
    let content = if text.is_empty() && !calls.is_empty() { Value::Null } else { text.as_str().into() };
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": word});
    let chunk = Chunk {
        fields: format!("\"object\":\"chat.completion\",\"created\":{},\"choices\":[{choice}]", clock::now_ms() / 1000),
        text,
        gains: 1,
        bare: false,
        usage: counted.map(|t| usage_json(&t)),
    };
    Ok([Piece::Chunk(chunk), Piece::Done(End { finish, refused, tokens, timings: None })])
}

/// A streamed answer in the making.
pub(super) struct Reply {
    prompt: u32,
    created: i64,
    usage: AnthropicUsage,
    /// For each content block: the index among tool calls, if it is one.
    blocks: Vec<Option<u32>>,
    calls: u32,
    gains: u32,
    stop: Option<(&'static str, Finish, bool)>,
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Wire {
    MessageStart {
        message: Start,
    },
    ContentBlockStart {
        index: usize,
        content_block: Value,
    },
    ContentBlockDelta {
        index: usize,
        delta: Value,
    },
    MessageDelta {
        delta: StopWire,
        #[serde(default)]
        usage: AnthropicUsage,
    },
    MessageStop,
    Error {
        error: ErrorWire,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
struct Start {
    #[serde(default)]
    usage: AnthropicUsage,
}

#[derive(Deserialize)]
struct StopWire {
    #[serde(default)]
    stop_reason: Option<String>,
}

#[derive(Deserialize)]
struct ErrorWire {
    #[serde(rename = "type")]
    kind: String,
}

/// The status an error in a stream would have had as an answer of its own.
fn status_of(kind: &str) -> u16 {
    ERRORS.iter().find(|(_, name)| *name == kind).map_or(500, |(status, _)| *status)
}

impl Reply {
    pub(super) fn new(prompt: u32) -> Self {
        Self {
            prompt,
            created: clock::now_ms() / 1000,
            usage: AnthropicUsage::default(),
            blocks: Vec::new(),
            calls: 0,
            gains: 0,
            stop: None,
        }
    }

    fn chunk(&mut self, delta: &Value, finish: Option<&str>, text: &str, gains: u32) -> Piece {
        self.gains += gains;
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish});
        Piece::Chunk(Chunk {
            fields: format!("\"object\":\"chat.completion.chunk\",\"created\":{},\"choices\":[{choice}]", self.created),
            text: text.into(),
            gains,
            bare: false,
            usage: None,
        })
    }

    /// What one event adds.
    pub(super) fn event(&mut self, data: &[u8], link: &Link, reader: &Reader) -> Result<Vec<Piece>, UpstreamError> {
        let malformed = |why: &dyn ToString| reader.malformed("an event that is not of the protocol", why.to_string());
        let wire: Wire = serde_json::from_slice(data).map_err(|e| malformed(&e))?;
        if let Wire::Error { error } = &wire {
            return Err(link.status_error(status_of(&error.kind), data, None));
        }
        self.translate(wire).map_err(|why| malformed(&why))
    }

    fn translate(&mut self, wire: Wire) -> Result<Vec<Piece>, String> {
        Ok(match wire {
            Wire::MessageStart { message } => {
                self.usage.merge(message.usage);
                vec![self.chunk(&json!({"role": "assistant", "content": ""}), None, "", 0)]
            }
            Wire::ContentBlockStart { index, content_block } => {
                if index != self.blocks.len() {
                    return Err(format!("content block {index} begins after {}", self.blocks.len()));
                }
                if content_block["type"] != "tool_use" {
                    self.blocks.push(None);
                    return Ok(Vec::new());
                }
                let call = self.calls;
                self.calls += 1;
                self.blocks.push(Some(call));
                let delta = json!({"tool_calls": [{
                    "index": call, "id": content_block["id"], "type": "function",
                    "function": {"name": content_block["name"], "arguments": ""},
                }]});
                vec![self.chunk(&delta, None, "", 1)]
            }
            Wire::ContentBlockDelta { index, delta } => {
                let text = |key: &str| delta[key].as_str().map(str::to_owned).ok_or(format!("a delta without {key}"));
                match delta["type"].as_str() {
                    Some("text_delta") => {
                        let text = text("text")?;
                        vec![self.chunk(&json!({"content": text}), None, &text, 1)]
                    }
                    Some("thinking_delta") => {
                        let delta = json!({"reasoning_content": text("thinking")?});
                        vec![self.chunk(&delta, None, "", 1)]
                    }
                    Some("input_json_delta") => {
                        let Some(Some(call)) = self.blocks.get(index) else {
                            return Err(format!("arguments for content block {index}, which is no call"));
                        };
                        let delta = json!({"tool_calls": [{"index": call, "function": {"arguments": text("partial_json")?}}]});
                        vec![self.chunk(&delta, None, "", 1)]
                    }
                    // A signature of thinking has no place in OpenAI's form.
                    Some("signature_delta" | "citations_delta") => Vec::new(),
                    other => return Err(format!("a delta of type {other:?}")),
                }
            }
            Wire::MessageDelta { delta, usage } => {
                self.usage.merge(usage);
                let Some(reason) = delta.stop_reason else { return Ok(Vec::new()) };
                let stop = stop_reason(&reason);
                self.stop = Some(stop);
                vec![self.chunk(&json!({}), Some(stop.0), "", 0)]
            }
            Wire::MessageStop => {
                let (_, finish, refused) = self.stop.unwrap_or(("stop", Finish::Stop, false));
                let counted = self.usage.tokens();
                let tokens = counted.unwrap_or_else(|| Tokens::estimate(self.prompt, self.gains));
                let mut pieces = Vec::new();
                if let Some(tokens) = counted {
                    pieces.push(Piece::Chunk(Chunk {
                        fields: format!("\"object\":\"chat.completion.chunk\",\"created\":{},\"choices\":[]", self.created),
                        bare: true,
                        usage: Some(usage_json(&tokens)),
                        ..Chunk::default()
                    }));
                }
                pieces.push(Piece::Done(End { finish, refused, tokens, timings: None }));
                pieces
            }
            // `ping`, `content_block_stop`, and what later versions add: the
            // protocol asks clients to pass over events they do not know.
            Wire::Error { .. } | Wire::Other => Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(events: &[Value]) -> Result<Vec<Piece>, String> {
        let mut reply = Reply::new(7);
        let mut out = Vec::new();
        for event in events {
            out.extend(reply.translate(serde_json::from_value(event.clone()).map_err(|e| e.to_string())?)?);
        }
        Ok(out)
    }

    #[test]
    fn a_stream_of_text_and_calls() {
        let pieces = run(&[
            json!({"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 5, "cache_read_input_tokens": 2, "output_tokens": 1}}}),
            json!({"type": "ping"}),
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hé\n"}}),
            json!({"type": "content_block_stop", "index": 0}),
            json!({"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}}),
            json!({"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{\"a\":"}}),
            json!({"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}),
            json!({"type": "message_stop"}),
        ])
        .unwrap();
        let objects: Vec<Value> = pieces
            .iter()
            .filter_map(|p| match p {
                Piece::Chunk(c) => Some(serde_json::from_str(&format!("{{{}}}", c.fields)).unwrap()),
                _ => None,
            })
            .collect();
        let delta = |i: usize| &objects[i]["choices"][0]["delta"];
        assert_eq!(delta(0)["role"], "assistant");
        assert_eq!(delta(1)["content"], "Hé\n");
        assert_eq!(delta(2)["tool_calls"][0]["function"]["name"], "f");
        assert_eq!(delta(3)["tool_calls"][0]["function"]["arguments"], "{\"a\":");
        assert_eq!(objects[4]["choices"][0]["finish_reason"], "tool_calls");
        assert_eq!(objects[5]["choices"], json!([]));
        let Some(Piece::Done(end)) = pieces.last() else { panic!("{pieces:?}") };
        assert_eq!((end.tokens.input, end.tokens.cache_read, end.tokens.output, end.tokens.estimated), (5, 2, 9, false));
    }

    #[test]
    fn without_counts_an_estimate_is_marked() {
        let pieces = run(&[
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text"}}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}),
            json!({"type": "message_delta", "delta": {"stop_reason": "refusal"}}),
            json!({"type": "message_stop"}),
        ])
        .unwrap();
        let Some(Piece::Done(end)) = pieces.last() else { panic!("{pieces:?}") };
        assert_eq!((end.tokens, end.refused), (Tokens::estimate(7, 1), true));
    }

    #[test]
    fn hostile_events_are_refused() {
        for events in [
            vec![json!({"type": "content_block_start", "index": 4_000_000_000u64, "content_block": {}})],
            vec![json!({"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": "x"}})],
            vec![json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}})],
            vec![json!({"no": "type"})],
        ] {
            assert!(run(&events).is_err(), "{events:?}");
        }
    }

    #[test]
    fn a_whole_answer() {
        let body = json!({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}],
            "stop_reason": "end_turn", "usage": {"input_tokens": 3, "output_tokens": 2}});
        let [Piece::Chunk(chunk), Piece::Done(end)] = whole(body.to_string().as_bytes(), 1).unwrap() else { panic!() };
        let object: Value = serde_json::from_str(&format!("{{{}}}", chunk.fields)).unwrap();
        assert_eq!(object["choices"][0]["message"]["content"], "yes");
        assert_eq!(object["choices"][0]["message"]["reasoning_content"], "hm");
        assert_eq!((chunk.text.as_str(), end.finish, end.tokens.completion()), ("yes", Finish::Stop, 2));
        assert!(whole(b"{}", 1).is_err());
    }
}
