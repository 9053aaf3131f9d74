//! An answer as Anthropic's clients read it.

use crate::{
    protocol::{Block, ERRORS, Protocol, continues, event, parts},
    reply::RESPONSE_ID,
    upstream::{End, Piece, Tokens},
};
use ashlar_api::{ApiError, Finish};
use axum::{http::header, response::Response};
use serde_json::{Value, json};

/// An answer in the making.
pub(crate) struct Reply {
    id: String,
    model: String,
    blocks: Vec<Block>,
    /// The beginning was said.
    begun: bool,
    prompt: (u32, u32),
    end: Option<End>,
}

/// `{"type":"error",…}`.
fn error_body(error: &ApiError, id: Option<&str>) -> Value {
    let known = ERRORS.iter().find(|(status, _)| *status == error.status);
    let other = if (400..500).contains(&error.status) { "invalid_request_error" } else { "api_error" };
    let kind = known.map_or(other, |(_, kind)| kind);
    json!({"type": "error", "error": {"type": kind, "message": error.message}, "request_id": id})
}

/// An error's answer in Anthropic's form; status and headers stay.
pub(crate) async fn error_response(response: Response) -> Response {
    let (mut parts, body) = response.into_parts();
    // Our own errors are short.
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
    let read: Value = serde_json::from_slice(&body).unwrap_or_default();
    let message = read["error"]["message"].as_str().unwrap_or("no reason given");
    let error = ApiError { status: parts.status.as_u16(), ..ApiError::internal(message) };
    let id = parts.headers.get(RESPONSE_ID).and_then(|v| v.to_str().ok());
    let body = error_body(&error, id).to_string();
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, body.into())
}

fn usage(tokens: &Tokens) -> Value {
    json!({
        "input_tokens": tokens.input, "cache_read_input_tokens": tokens.cache_read,
        "cache_creation_input_tokens": tokens.cache_write, "output_tokens": tokens.completion(),
    })
}

/// A block as it stands; what a call is given must be an object.
fn shown(block: &Block) -> Value {
    match block {
        Block::Text(text) => json!({"type": "text", "text": text}),
        Block::Reasoning(text) => json!({"type": "thinking", "thinking": text, "signature": ""}),
        Block::Call { id, name, arguments, .. } => {
            let input: Value = serde_json::from_str(arguments).unwrap_or_else(|_| json!({}));
            json!({"type": "tool_use", "id": id, "name": name, "input": input})
        }
    }
}

impl Reply {
    pub(crate) fn new(id: &str, model: &str) -> Self {
        Self { id: id.into(), model: model.into(), blocks: Vec::new(), begun: false, prompt: (0, 0), end: None }
    }

    fn stop_reason(&self) -> Option<&'static str> {
        let called = self.blocks.iter().any(|b| matches!(b, Block::Call { .. }));
        Some(match self.end?.finish {
            Finish::Length => "max_tokens",
            Finish::ContentFilter => "refusal",
            Finish::ToolCalls => "tool_use",
            // A call that was demanded by name ends as `stop` with some servers.
            Finish::Stop | Finish::Cancelled => if called { "tool_use" } else { "end_turn" },
        })
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let (prompt, cached) = self.prompt;
        let known = Tokens { input: prompt.saturating_sub(cached), cache_read: cached, ..Tokens::default() };
        let message = json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": [],
            "stop_reason": null, "stop_sequence": null, "usage": usage(&known),
        });
        event(out, "message_start", &json!({"type": "message_start", "message": message}));
    }

    fn close(&self, out: &mut Vec<u8>) {
        if let Some(i) = self.blocks.len().checked_sub(1) {
            event(out, "content_block_stop", &json!({"type": "content_block_stop", "index": i}));
        }
    }
}

impl Protocol for Reply {
    fn take(&mut self, piece: &Piece) -> Vec<u8> {
        let mut out = Vec::new();
        match piece {
            Piece::Started { prompt_tokens, cached_tokens } => self.prompt = (*prompt_tokens, *cached_tokens),
            Piece::Done(end) => {
                self.begin(&mut out);
                self.close(&mut out);
                self.end = Some(*end);
                let delta = json!({"stop_reason": self.stop_reason(), "stop_sequence": null});
                event(&mut out, "message_delta", &json!({"type": "message_delta", "delta": delta, "usage": usage(&end.tokens)}));
                event(&mut out, "message_stop", &json!({"type": "message_stop"}));
                return out;
            }
            Piece::Text(_) | Piece::Rest(_) | Piece::Chunk(_) => {}
        }
        self.begin(&mut out);
        for part in parts(piece) {
            if !self.blocks.last().is_some_and(|b| continues(b, &part)) {
                self.close(&mut out);
                let block = Block::begin(&part);
                event(&mut out, "content_block_start", &json!({
                    "type": "content_block_start", "index": self.blocks.len(), "content_block": shown(&block),
                }));
                self.blocks.push(block);
            }
            let index = self.blocks.len() - 1;
            let Some(block) = self.blocks.last_mut() else { continue };
            let new = block.add(part);
            if new.is_empty() {
                continue;
            }
            let delta = match block {
                Block::Text(_) => json!({"type": "text_delta", "text": new}),
                Block::Reasoning(_) => json!({"type": "thinking_delta", "thinking": new}),
                Block::Call { .. } => json!({"type": "input_json_delta", "partial_json": new}),
            };
            event(&mut out, "content_block_delta", &json!({"type": "content_block_delta", "index": index, "delta": delta}));
        }
        out
    }

    fn whole(&self) -> Value {
        let tokens = self.end.map(|e| e.tokens).unwrap_or_default();
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model,
            "content": self.blocks.iter().map(shown).collect::<Vec<_>>(),
            "stop_reason": self.stop_reason(), "stop_sequence": null, "usage": usage(&tokens),
        })
    }

    fn error(&mut self, error: &ApiError) -> Vec<u8> {
        let mut out = Vec::new();
        event(&mut out, "error", &error_body(error, Some(&self.id)));
        out
    }
}
