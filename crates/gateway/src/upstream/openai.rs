//! Servers that speak OpenAI's protocol.
//!
//! The request's bytes go out as they came, but for the model's name and
//! `stream_options.include_usage`, which is always asked for: a stream without
//! it could not be billed. The answer's objects come back as they came, but for
//! `id`, `model` and `usage`.

use super::{
    Chunk, Dialect, End, Link, Piece, Pieces, Tokens, Upstream, UpstreamError,
    http::Reader,
    sse::Parser,
    usage,
};
use crate::ask::{Ask, Fields, estimate};
use ashlar_api::{ApiError, Finish};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::sync::Arc;

/// A server.
pub(crate) struct OpenAi {
    pub(crate) link: Arc<Link>,
    pub(crate) dialect: Dialect,
    pub(crate) probe: String,
}

#[async_trait::async_trait]
impl Upstream for OpenAi {
    fn check(&self, ask: &Ask, _model: &str) -> Result<(), ApiError> {
        self.dialect.check(ask, &self.link.settings.backend)
    }

    async fn send(&self, ask: &Ask, model: &str, _seed: i64) -> Result<Pieces, UpstreamError> {
        let body = request(ask, model, self.dialect);
        let mut reader = self.link.post(self.dialect.tail(ask.endpoint), body).await?;
        let counted = ask.prompt_estimate();
        if ask.stream {
            if !reader.event_stream {
                // Some servers answer a stream's refusal with 200 and JSON.
                let body = reader.whole().await?;
                return Err(refusal(&self.link, &body)
                    .unwrap_or_else(|| reader.malformed("JSON", "an event stream was asked for")));
            }
            let parser = Parser::new(reader.max_event_bytes);
            let stream = Streamed {
                link: self.link.clone(),
                reader: Some(reader),
                parser,
                prompt: counted,
                gains: 0,
                finish: None,
                refused: false,
                tokens: None,
            };
            return Ok(Box::pin(futures::stream::try_unfold(stream, |mut s| async move {
                Ok(s.next().await?.map(|piece| (piece, s)))
            })));
        }
        let body = reader.whole().await?;
        let choices = ask.endpoint.streams();
        let (chunk, end) = whole(&self.link, &reader, &body, counted, choices)?;
        Ok(Box::pin(futures::stream::iter([Ok(Piece::Chunk(chunk)), Ok(Piece::Done(end))])))
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        self.link.get(&self.probe).await
    }
}

/// The body sent upstream.
fn request(ask: &Ask, model: &str, dialect: Dialect) -> Bytes {
    let mut out = String::with_capacity(ask.body().len() + model.len() + 64);
    out.push('{');
    for (name, raw) in ask.fields() {
        if matches!(name, "model" | "stream_options") {
            continue;
        }
        string(&mut out, dialect.renamed(name));
        out.push(':');
        out.push_str(raw);
        out.push(',');
    }
    if ask.stream {
        out.push_str("\"stream_options\":{\"include_usage\":true");
        let options = ask.raw("stream_options").and_then(|raw| serde_json::from_str::<Fields<'_>>(raw).ok());
        for (name, raw) in options.into_iter().flat_map(|f| f.0) {
            if name != "include_usage" {
                out.push(',');
                string(&mut out, &name);
                out.push(':');
                out.push_str(raw.get());
            }
        }
        out.push_str("},");
    }
    out.push_str("\"model\":");
    string(&mut out, model);
    out.push('}');
    out.into()
}

/// Appends `text` as a JSON string.
pub(crate) fn string(out: &mut String, text: &str) {
    // A str is always a JSON string.
    out.push_str(&serde_json::to_string(text).unwrap_or_default());
}

/// An error object sent with status 200, alone or in a stream.
fn refusal(link: &Link, body: &[u8]) -> Option<UpstreamError> {
    #[derive(Deserialize)]
    struct Code {
        code: Option<serde_json::Value>,
    }
    #[derive(Deserialize)]
    struct Wire {
        #[serde(default)]
        error: Option<serde_json::Value>,
        #[serde(default)]
        object: Option<String>,
        #[serde(default)]
        code: Option<serde_json::Value>,
    }
    let wire: Wire = serde_json::from_slice(body).ok()?;
    let old_form = wire.object.as_deref() == Some("error");
    let error = wire.error.filter(|e| !e.is_null());
    if error.is_none() && !old_form {
        return None;
    }
    let inner = error.and_then(|e| serde_json::from_value::<Code>(e).ok()).and_then(|c| c.code);
    let code = inner.or(wire.code).and_then(|c| c.as_u64()).and_then(|c| u16::try_from(c).ok());
    let status = code.filter(|c| (400..600).contains(c)).unwrap_or(500);
    Some(link.status_error(status, body, None))
}

#[derive(Default, Deserialize)]
struct Choice {
    #[serde(default)]
    index: u32,
    #[serde(default)]
    delta: Option<Message>,
    #[serde(default)]
    message: Option<Message>,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Default, Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    refusal: Option<String>,
    #[serde(default, alias = "reasoning")]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<serde::de::IgnoredAny>>,
}

/// What an object says beside its fields.
struct Read {
    chunk: Chunk,
    finish: Option<Finish>,
    refused: bool,
    tokens: Option<Tokens>,
    /// Bytes of text of all choices.
    bytes: usize,
}

/// Reads one object of the protocol.
fn read(json: &str, has_choices: bool) -> Result<Read, String> {
    let Fields(all) = serde_json::from_str(json).map_err(|e| e.to_string())?;
    let mut out = Read { chunk: Chunk::default(), finish: None, refused: false, tokens: None, bytes: 0 };
    out.chunk.fields.reserve(json.len());
    let (mut choices, mut timings) = (None, None);
    for (name, raw) in all {
        match name.as_ref() {
            "id" | "model" => continue,
            "usage" => {
                if raw.get() != "null" {
                    out.chunk.usage = Some(one_line(raw));
                }
                continue;
            }
            "choices" => choices = Some(raw),
            "timings" => timings = Some(raw),
            _ => {}
        }
        if !out.chunk.fields.is_empty() {
            out.chunk.fields.push(',');
        }
        string(&mut out.chunk.fields, &name);
        out.chunk.fields.push(':');
        push_one_line(&mut out.chunk.fields, raw);
    }
    let usage = out.chunk.usage.as_deref();
    out.tokens = usage.and_then(|u| usage::openai(u, timings.map(RawValue::get)));
    if !has_choices {
        return Ok(out);
    }
    let choices = choices.ok_or("there is no field \"choices\"")?;
    let choices: Vec<Choice> = serde_json::from_str(choices.get()).map_err(|e| format!("choices: {e}"))?;
    out.chunk.bare = choices.is_empty();
    for choice in choices {
        let message = choice.delta.or(choice.message).unwrap_or_default();
        let text = message.content.or(choice.text).unwrap_or_default();
        let beside = message.reasoning_content.as_deref().map_or(0, str::len)
            + message.refusal.as_deref().map_or(0, str::len);
        out.bytes += text.len() + beside;
        let called = message.tool_calls.is_some_and(|c| !c.is_empty());
        out.chunk.gains += u32::from(!text.is_empty() || beside > 0 || called);
        out.refused |= message.refusal.is_some_and(|r| !r.is_empty());
        if let Some(finish) = choice.finish_reason {
            out.refused |= finish == "content_filter";
            out.finish = Some(match finish.as_str() {
                "length" => Finish::Length,
                "tool_calls" | "function_call" => Finish::ToolCalls,
                "content_filter" => Finish::ContentFilter,
                _ => Finish::Stop,
            });
        }
        if choice.index == 0 {
            out.chunk.text.push_str(&text);
        }
    }
    Ok(out)
}

/// JSON holds line breaks between tokens only; an event's line may not.
fn push_one_line(out: &mut String, raw: &RawValue) {
    if raw.get().contains(['\n', '\r']) {
        out.extend(raw.get().chars().map(|c| if matches!(c, '\n' | '\r') { ' ' } else { c }));
    } else {
        out.push_str(raw.get());
    }
}

fn one_line(raw: &RawValue) -> String {
    let mut out = String::new();
    push_one_line(&mut out, raw);
    out
}

/// Reads a whole answer.
fn whole(link: &Link, reader: &Reader, body: &[u8], prompt: u32, choices: bool) -> Result<(Chunk, End), UpstreamError> {
    let malformed = |why: String| reader.malformed("an answer that is not of the protocol", why);
    let text = std::str::from_utf8(body).map_err(|e| malformed(e.to_string()))?;
    if !choices && let Some(refused) = refusal(link, body) {
        return Err(refused);
    }
    let read = read(text, choices).map_err(|why| refusal(link, body).unwrap_or_else(|| malformed(why)))?;
    let end = End {
        finish: read.finish.unwrap_or(Finish::Stop),
        refused: read.refused,
        tokens: read.tokens.unwrap_or_else(|| Tokens::estimate(prompt, estimate(read.bytes))),
        timings: None,
    };
    Ok((read.chunk, end))
}

/// A streamed answer in the making.
struct Streamed {
    link: Arc<Link>,
    /// None once the answer is complete.
    reader: Option<Reader>,
    parser: Parser,
    prompt: u32,
    gains: u32,
    finish: Option<Finish>,
    refused: bool,
    tokens: Option<Tokens>,
}

impl Streamed {
    async fn next(&mut self) -> Result<Option<Piece>, UpstreamError> {
        loop {
            let Some(reader) = &mut self.reader else { return Ok(None) };
            let limit = reader.max_event_bytes as u64;
            let event = self.parser.next().map_err(|_| reader.too_large("an event", limit))?;
            let Some(event) = event else {
                match reader.next().await? {
                    Some(bytes) => self.parser.push(&bytes),
                    // All choices are finished; only the end mark is missing.
                    None if self.finish.is_some() => return Ok(self.done()),
                    None => return Err(reader.closed("the stream ended without its end mark".into())),
                }
                continue;
            };
            if event.data == b"[DONE]" {
                return Ok(self.done());
            }
            let malformed = |why: String| reader.malformed("an event that is not of the protocol", why);
            let text = std::str::from_utf8(&event.data).map_err(|e| malformed(e.to_string()))?;
            let read = read(text, true).map_err(|why| refusal(&self.link, &event.data).unwrap_or_else(|| malformed(why)))?;
            self.finish = read.finish.or(self.finish);
            self.refused |= read.refused;
            self.tokens = read.tokens.or(self.tokens);
            self.gains = self.gains.saturating_add(read.chunk.gains);
            return Ok(Some(Piece::Chunk(read.chunk)));
        }
    }

    fn done(&mut self) -> Option<Piece> {
        self.reader.take()?.finish();
        Some(Piece::Done(End {
            finish: self.finish.unwrap_or(Finish::Stop),
            refused: self.refused,
            tokens: self.tokens.unwrap_or_else(|| Tokens::estimate(self.prompt, self.gains)),
            timings: None,
        }))
    }
}

/// The pieces of a stream's bytes, as they come from a server in these parts.
#[cfg(test)]
pub(crate) fn pieces(parts: &[&[u8]]) -> Vec<Piece> {
    let (mut parser, mut out) = (Parser::new(1 << 20), Vec::new());
    for part in parts {
        parser.push(part);
        while let Ok(Some(event)) = parser.next() {
            if event.data == b"[DONE]" {
                let tokens = Tokens::estimate(1, 1);
                out.push(Piece::Done(End { finish: Finish::Stop, refused: false, tokens, timings: None }));
            } else if let Ok(read) = read(std::str::from_utf8(&event.data).unwrap_or_default(), true) {
                out.push(Piece::Chunk(read.chunk));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ask::Endpoint;
    use axum::http::HeaderMap;
    use serde_json::{Value, json};

    fn sent(body: &str, dialect: Dialect) -> Value {
        let ask = Ask::read(Endpoint::Chat, HeaderMap::new(), Bytes::copy_from_slice(body.as_bytes()), std::time::Instant::now());
        serde_json::from_slice(&request(&ask.unwrap(), "their \"name\"", dialect)).unwrap()
    }

    #[test]
    fn what_the_client_sent_goes_out_unchanged() {
        let body = r#"{"model":"ours","messages":[{"role":"user","content":"a\u0000é"}],"temperature":0.10,"tools":null}"#;
        let out = sent(body, Dialect::Vllm);
        assert_eq!(out, json!({"messages": [{"role": "user", "content": "a\u{0}é"}], "temperature": 0.1, "model": "their \"name\""}));
        let stream = r#"{"model":"ours","messages":[],"stream":true,"stream_options":{"include_usage":false,"continuous_usage_stats":true}}"#;
        let out = sent(stream, Dialect::Vllm);
        assert_eq!(out["stream_options"], json!({"include_usage": true, "continuous_usage_stats": true}));
        let out = sent(r#"{"model":"m","messages":[],"stream":true,"max_completion_tokens":5}"#, Dialect::Tgi);
        assert_eq!((&out["max_tokens"], out.get("max_completion_tokens")), (&json!(5), None));
        assert_eq!(out["stream_options"], json!({"include_usage": true}));
    }

    #[test]
    fn objects_are_read_and_kept() {
        let r = read("{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\n\"model\":\"m\",\"choices\":[{\"index\":1,\"delta\":{\"content\":\"b\"}},{\"index\":0,\"delta\":{\"content\":\"a\",\"odd\":1},\"finish_reason\":\"length\"}],\"usage\":{\"prompt_tokens\":2,\n\"completion_tokens\":1}}", true).unwrap();
        assert_eq!((r.chunk.text.as_str(), r.chunk.gains, r.finish), ("a", 2, Some(Finish::Length)));
        assert_eq!(r.tokens.unwrap().prompt(), 2);
        assert!(r.chunk.fields.starts_with("\"object\":\"chat.completion.chunk\",\"choices\":[{") && r.chunk.fields.contains("\"odd\":1"));
        assert!(!r.chunk.usage.unwrap().contains('\n'));
        let r = read(r#"{"choices":[],"usage":null}"#, true).unwrap();
        assert!(r.chunk.bare && r.chunk.usage.is_none());
        let r = read(r#"{"choices":[{"message":{"content":null,"refusal":"no","tool_calls":[{}]},"finish_reason":"content_filter"}]}"#, true).unwrap();
        assert!(r.refused && r.chunk.gains == 1 && r.finish == Some(Finish::ContentFilter));
        let r = read(r#"{"choices":[{"delta":{"tool_calls":[{}]},"finish_reason":"tool_calls"}]}"#, true).unwrap();
        assert_eq!(r.finish, Some(Finish::ToolCalls));
        for bad in ["", "[]", "{}", r#"{"choices":{}}"#, r#"{"choices":[{"delta":{"content":5}}]}"#, r#"{"choices":[],"choices":[]}"#] {
            assert!(read(bad, true).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_object_is_read_or_refused(text: String) {
            let _ = read(&text, true);
        }
    }
}
