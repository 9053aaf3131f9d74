//! Other protocols in front of the same answers: Anthropic's messages and
//! OpenAI's responses, each as a chat request inside and an answer of its own
//! outside.
//!
//! A request is translated where it is read (`ask`), the answer where it is
//! written (`reply`), so that everything between is the one path of all
//! endpoints. Streamed and whole answers come out of one state.
//!
//! What may not happen here: a part of a request that is dropped. What has no
//! counterpart is refused by the name it has in the client's protocol.

pub(crate) mod messages;
pub(crate) mod responses;

use crate::upstream::{Chunk, Piece};
use ashlar_api::ApiError;
use serde_json::{Map, Value};

/// How an answer is written.
pub(crate) trait Protocol: Send {
    /// Takes a piece in and gives what it adds to a stream.
    fn take(&mut self, piece: &Piece) -> Vec<u8>;

    /// The whole answer, once it has ended.
    fn whole(&self) -> Value;

    /// What a stream ends with when the answer failed.
    fn error(&mut self, error: &ApiError) -> Vec<u8>;
}

/// What an answer gains, whichever server it comes from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Part {
    Text(String),
    Reasoning(String),
    /// Of a tool call: its place among them, its id and name where they are
    /// told, and a piece of its arguments.
    Call { index: u64, id: Option<String>, name: Option<String>, arguments: String },
}

/// What `piece` adds to the first choice.
pub(crate) fn parts(piece: &Piece) -> Vec<Part> {
    match piece {
        Piece::Text(text) | Piece::Rest(text) if !text.is_empty() => vec![Part::Text(text.clone())],
        Piece::Chunk(chunk) => chunk_parts(chunk),
        _ => Vec::new(),
    }
}

fn chunk_parts(chunk: &Chunk) -> Vec<Part> {
    // Read from a server's JSON already; it is an object.
    let object: Value = serde_json::from_str(&format!("{{{}}}", chunk.fields)).unwrap_or_default();
    let mut out = Vec::new();
    let choices = object["choices"].as_array();
    for choice in choices.into_iter().flatten().filter(|c| c["index"].as_u64().unwrap_or(0) == 0) {
        let said = if choice["delta"].is_object() { &choice["delta"] } else { &choice["message"] };
        let text = |name: &str| said[name].as_str().filter(|s| !s.is_empty()).map(str::to_owned);
        out.extend(text("reasoning_content").or_else(|| text("reasoning")).map(Part::Reasoning));
        out.extend(text("content").map(Part::Text));
        out.extend(text("refusal").map(Part::Text));
        for (i, call) in said["tool_calls"].as_array().into_iter().flatten().enumerate() {
            let of = |v: &Value| v.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
            out.push(Part::Call {
                index: call["index"].as_u64().unwrap_or(i as u64),
                id: of(&call["id"]),
                name: of(&call["function"]["name"]),
                arguments: call["function"]["arguments"].as_str().unwrap_or_default().to_owned(),
            });
        }
    }
    out
}

/// A part of an answer that is being put together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Block {
    Text(String),
    Reasoning(String),
    Call { index: u64, id: String, name: String, arguments: String },
}

/// Whether `part` goes on with `block`.
pub(crate) fn continues(block: &Block, part: &Part) -> bool {
    match (block, part) {
        (Block::Text(_), Part::Text(_)) | (Block::Reasoning(_), Part::Reasoning(_)) => true,
        (Block::Call { index, .. }, Part::Call { index: other, .. }) => index == other,
        _ => false,
    }
}

impl Block {
    /// The block that `part` begins, empty.
    pub(crate) fn begin(part: &Part) -> Self {
        match part {
            Part::Text(_) => Self::Text(String::new()),
            Part::Reasoning(_) => Self::Reasoning(String::new()),
            Part::Call { index, id, name, .. } => Self::Call {
                index: *index,
                id: id.clone().unwrap_or_else(|| ashlar_core::id::new("call")),
                name: name.clone().unwrap_or_default(),
                arguments: String::new(),
            },
        }
    }

    /// Adds `part`, and gives what was added.
    pub(crate) fn add(&mut self, part: Part) -> String {
        match (self, part) {
            (Self::Text(all) | Self::Reasoning(all), Part::Text(new) | Part::Reasoning(new)) => {
                all.push_str(&new);
                new
            }
            (Self::Call { arguments: all, .. }, Part::Call { arguments: new, .. }) => {
                all.push_str(&new);
                new
            }
            _ => String::new(),
        }
    }
}

/// A named server-sent event.
pub(crate) fn event(out: &mut Vec<u8>, name: &str, data: &Value) {
    out.extend_from_slice(format!("event: {name}\ndata: {data}\n\n").as_bytes());
}

/// 400 for what is not served.
pub(crate) fn unsupported(param: &str, why: &str) -> ApiError {
    let message = format!("{param} is not supported here: {why}");
    ApiError::bad_request(message, Some(param), Some("unsupported_parameter"))
}

/// Statuses and what Anthropic's errors call them.
pub(crate) const ERRORS: [(u16, &str); 9] = [
    (400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error"), (403, "permission_error"),
    (404, "not_found_error"), (413, "request_too_large"), (429, "rate_limit_error"), (503, "overloaded_error"),
    (504, "timeout_error"),
];

/// 400 for a value of another type.
pub(crate) fn wrong(param: &str, wanted: &str) -> ApiError {
    ApiError::bad_request(format!("{param} must be {wanted}"), Some(param), Some("invalid_type"))
}

/// Parts of a content; one text stays a plain string, as servers of text read it.
pub(crate) fn whole(mut parts: Vec<Value>) -> Value {
    match parts.as_mut_slice() {
        [one] if one["type"] == "text" => one["text"].take(),
        _ => parts.into(),
    }
}

/// A JSON object read field by field, so that none is left unseen.
pub(crate) struct Object {
    path: String,
    map: Map<String, Value>,
}

impl Object {
    /// A request's body.
    pub(crate) fn body(body: &[u8]) -> Result<Self, ApiError> {
        let bad = |e: String| {
            let message = format!("the body is not the JSON object expected: {e}");
            ApiError::bad_request(message, None, Some("invalid_json"))
        };
        // `Fields` refuses a field given twice, which a map would lose.
        let text = std::str::from_utf8(body).map_err(|e| bad(e.to_string()))?;
        let crate::ask::Fields(fields) = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let mut map = Map::new();
        for (name, raw) in fields {
            map.insert(name.into_owned(), serde_json::from_str(raw.get()).map_err(|e| bad(e.to_string()))?);
        }
        Ok(Self { path: String::new(), map })
    }

    /// An object at `path` in it.
    pub(crate) fn at(path: &str, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path: format!("{path}."), map }),
            _ => Err(wrong(path, "an object")),
        }
    }

    /// The whole name of a field.
    pub(crate) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// Takes a field; null counts as absent.
    pub(crate) fn take(&mut self, field: &str) -> Option<Value> {
        self.map.shift_remove(field).filter(|v| !v.is_null())
    }

    /// Takes a string.
    pub(crate) fn text(&mut self, field: &str) -> Result<Option<String>, ApiError> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(wrong(&self.name(field), "a string")),
        }
    }

    /// Takes a field that must be there.
    pub(crate) fn need(&mut self, field: &str) -> Result<Value, ApiError> {
        self.take(field).ok_or_else(|| {
            let name = self.name(field);
            ApiError::bad_request(format!("{name} is required"), Some(&name), Some("missing_required_parameter"))
        })
    }

    /// Takes a string that must be there.
    pub(crate) fn need_text(&mut self, field: &str) -> Result<String, ApiError> {
        match self.need(field)? {
            Value::String(s) => Ok(s),
            _ => Err(wrong(&self.name(field), "a string")),
        }
    }

    /// Takes a field that is served where `fine` holds of it.
    pub(crate) fn only(&mut self, field: &str, why: &str, fine: impl Fn(&Value) -> bool) -> Result<(), ApiError> {
        match self.take(field) {
            Some(v) if !fine(&v) => Err(unsupported(&self.name(field), why)),
            _ => Ok(()),
        }
    }

    /// Ends the reading: a field that is left over is refused by name.
    pub(crate) fn end(self) -> Result<(), ApiError> {
        match self.map.into_iter().find(|(_, v)| !v.is_null()) {
            None => Ok(()),
            Some((field, _)) => {
                let field: String = field.chars().take(80).collect();
                Err(unsupported(&format!("{}{field}", self.path), "it is not known, or not served"))
            }
        }
    }
}
