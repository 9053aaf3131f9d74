//! An answer as the clients of OpenAI's responses API read it.

use crate::{
    protocol::{Block, Protocol, continues, event, parts},
    upstream::{End, Piece},
};
use ashlar_api::{ApiError, Finish};
use serde_json::{Value, json};

/// An answer in the making.
pub(crate) struct Reply {
    id: String,
    model: String,
    created: i64,
    /// Each with its item's id.
    blocks: Vec<(Block, String)>,
    begun: bool,
    /// Of the next event.
    sequence: u64,
    end: Option<End>,
}

impl Reply {
    pub(crate) fn new(id: &str, model: &str, created: i64) -> Self {
        Self { id: id.into(), model: model.into(), created, blocks: Vec::new(), begun: false, sequence: 0, end: None }
    }

    fn say(&mut self, out: &mut Vec<u8>, name: &str, mut data: Value) {
        data["type"] = name.into();
        data["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        event(out, name, &data);
    }

    fn begin(&mut self, out: &mut Vec<u8>) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let response = self.whole();
        self.say(out, "response.created", json!({"response": response}));
        self.say(out, "response.in_progress", json!({"response": response}));
    }

    /// The last block is complete.
    fn close(&mut self, out: &mut Vec<u8>) {
        let Some((block, id)) = self.blocks.last().cloned() else { return };
        let at = self.blocks.len() - 1;
        match &block {
            Block::Text(text) => {
                self.say(out, "response.output_text.done", json!({"item_id": id, "output_index": at, "content_index": 0, "text": text, "logprobs": []}));
                self.say(out, "response.content_part.done", json!({"item_id": id, "output_index": at, "content_index": 0, "part": part(text)}));
            }
            Block::Reasoning(text) => {
                self.say(out, "response.reasoning_text.done", json!({"item_id": id, "output_index": at, "content_index": 0, "text": text}));
            }
            Block::Call { arguments, name, .. } => {
                self.say(out, "response.function_call_arguments.done", json!({"item_id": id, "output_index": at, "name": name, "arguments": arguments}));
            }
        }
        self.say(out, "response.output_item.done", json!({"output_index": at, "item": item(&block, &id, "completed")}));
    }
}

fn part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn item(block: &Block, id: &str, status: &str) -> Value {
    match block {
        Block::Text(text) => {
            let content = if text.is_empty() && status == "in_progress" { json!([]) } else { json!([part(text)]) };
            json!({"type": "message", "id": id, "role": "assistant", "status": status, "content": content})
        }
        Block::Reasoning(text) => json!({
            "type": "reasoning", "id": id, "status": status, "summary": [], "content": [{"type": "reasoning_text", "text": text}],
        }),
        Block::Call { id: call, name, arguments, .. } => json!({
            "type": "function_call", "id": id, "call_id": call, "name": name, "arguments": arguments, "status": status,
        }),
    }
}

impl Protocol for Reply {
    fn take(&mut self, piece: &Piece) -> Vec<u8> {
        let mut out = Vec::new();
        self.begin(&mut out);
        for new in parts(piece) {
            if !self.blocks.last().is_some_and(|(b, _)| continues(b, &new)) {
                self.close(&mut out);
                let block = Block::begin(&new);
                let id = ashlar_core::id::new(match block {
                    Block::Text(_) => "msg",
                    Block::Reasoning(_) => "rs",
                    Block::Call { .. } => "fc",
                });
                let at = self.blocks.len();
                self.say(&mut out, "response.output_item.added", json!({"output_index": at, "item": item(&block, &id, "in_progress")}));
                if matches!(block, Block::Text(_)) {
                    self.say(&mut out, "response.content_part.added", json!({"item_id": id, "output_index": at, "content_index": 0, "part": part("")}));
                }
                self.blocks.push((block, id));
            }
            let at = self.blocks.len() - 1;
            let Some((block, id)) = self.blocks.last_mut() else { continue };
            let (delta, id) = (block.add(new), id.clone());
            if delta.is_empty() {
                continue;
            }
            let (name, data) = match block {
                Block::Text(_) => ("response.output_text.delta", json!({"content_index": 0, "logprobs": []})),
                Block::Reasoning(_) => ("response.reasoning_text.delta", json!({"content_index": 0})),
                Block::Call { .. } => ("response.function_call_arguments.delta", json!({})),
            };
            let mut data = data;
            (data["item_id"], data["output_index"], data["delta"]) = (id.into(), at.into(), delta.into());
            self.say(&mut out, name, data);
        }
        if let Piece::Done(end) = piece {
            self.close(&mut out);
            self.end = Some(*end);
            let response = self.whole();
            let name = if response["status"] == "completed" { "response.completed" } else { "response.incomplete" };
            self.say(&mut out, name, json!({"response": response}));
        }
        out
    }

    fn whole(&self) -> Value {
        let (status, why) = match self.end.map(|e| e.finish) {
            None => ("in_progress", Value::Null),
            Some(Finish::Length) => ("incomplete", json!({"reason": "max_output_tokens"})),
            Some(Finish::ContentFilter) => ("incomplete", json!({"reason": "content_filter"})),
            Some(_) => ("completed", Value::Null),
        };
        let usage = self.end.map(|e| json!({
            "input_tokens": e.tokens.prompt(), "input_tokens_details": {"cached_tokens": e.tokens.cache_read},
            "output_tokens": e.tokens.completion(), "output_tokens_details": {"reasoning_tokens": e.tokens.reasoning},
            "total_tokens": e.tokens.prompt().saturating_add(e.tokens.completion()),
        }));
        let output: Vec<Value> = self.blocks.iter().map(|(b, id)| item(b, id, "completed")).collect();
        json!({
            "id": self.id, "object": "response", "created_at": self.created, "model": self.model, "status": status,
            "incomplete_details": why, "error": null, "output": output, "usage": usage, "parallel_tool_calls": true,
            "tool_choice": "auto", "tools": [], "store": false, "previous_response_id": null, "metadata": {},
        })
    }

    fn error(&mut self, error: &ApiError) -> Vec<u8> {
        let mut out = Vec::new();
        let data = json!({"code": error.code, "message": error.message, "param": error.param});
        self.say(&mut out, "error", data);
        out
    }
}
