//! From pieces to HTTP bodies: a whole JSON answer or server-sent events.
//!
//! A failure before the first piece is an HTTP error; one in the middle of a
//! stream is an `{"error": …}` event, after which the stream ends without
//! `[DONE]`, as official clients expect.

use crate::{
    ask::{Ask, Endpoint},
    error::{self, Failure},
    protocol::{self, Protocol},
    session::Session,
    upstream::{Chunk, End, Piece, json_string},
};
use ashlar_api::{ApiError, ChatChunk, ChatCompletion, TextCompletion};
use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures::StreamExt as _;
use std::convert::Infallible;

/// The response id, on every answer that was admitted.
pub(crate) const RESPONSE_ID: HeaderName = HeaderName::from_static("x-ashlar-response-id");

/// How answers to one call are spelt.
pub(crate) struct Form {
    chat: bool,
    /// Another protocol than the two that are written here.
    other: Option<Box<dyn Protocol>>,
    stream: bool,
    include_usage: bool,
    id: String,
    model: String,
    /// `"id":…,"model":…`, which the gateway says of every object.
    head: String,
    created: i64,
    /// A server's own objects were passed on, so it has said how it ended.
    theirs: bool,
    usage_sent: bool,
}

impl Form {
    pub(crate) fn of(ask: &Ask, session: &Session) -> Self {
        let (id, model) = (session.id(), session.model());
        let created = ashlar_core::clock::now_ms() / 1000;
        let mut head = String::from("\"id\":");
        json_string(&mut head, id);
        head.push_str(",\"model\":");
        json_string(&mut head, model);
        Self {
            chat: ask.endpoint == Endpoint::Chat,
            other: match ask.endpoint {
                Endpoint::Messages => Some(Box::new(protocol::messages::Reply::new(id, model))),
                Endpoint::Responses => Some(Box::new(protocol::responses::Reply::new(id, model, created))),
                _ => None,
            },
            stream: ask.stream,
            include_usage: ask.include_usage,
            id: id.to_owned(),
            model: model.to_owned(),
            head,
            created,
            theirs: false,
            usage_sent: false,
        }
    }

    /// A server's object under our id and model name.
    fn object(&self, out: &mut Vec<u8>, chunk: &Chunk, usage: bool) {
        out.push(b'{');
        out.extend_from_slice(self.head.as_bytes());
        for part in [Some(chunk.fields.as_str()).filter(|f| !f.is_empty())].into_iter().flatten() {
            out.push(b',');
            out.extend_from_slice(part.as_bytes());
        }
        if let Some(usage) = chunk.usage.as_deref().filter(|_| usage) {
            out.extend_from_slice(b",\"usage\":");
            out.extend_from_slice(usage.as_bytes());
        }
        out.push(b'}');
    }

    /// The role chunk of an engine's answer; completions have none.
    fn opening(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if self.chat {
            frame(&mut out, &ChatChunk::role(&self.id, self.created, &self.model));
        }
        out
    }

    /// What a piece puts on the wire, perhaps nothing.
    fn frames(&mut self, piece: Piece) -> Vec<u8> {
        if let Some(other) = &mut self.other {
            return other.take(&piece);
        }
        let (id, at, model) = (&self.id, self.created, &self.model);
        let mut out = Vec::new();
        match piece {
            Piece::Started { .. } => {}
            // Tokens may carry no text yet; clients get only what has some.
            Piece::Text(text) | Piece::Rest(text) if text.is_empty() => {}
            Piece::Text(text) | Piece::Rest(text) if self.chat => frame(&mut out, &ChatChunk::text(id, at, model, text)),
            Piece::Text(text) | Piece::Rest(text) => frame(&mut out, &TextCompletion::new(id, at, model, text, None, None)),
            Piece::Chunk(chunk) if chunk.fields.is_empty() => {}
            Piece::Chunk(chunk) => {
                self.theirs = true;
                self.usage_sent |= chunk.usage.is_some();
                if !chunk.bare || self.include_usage {
                    out.reserve(self.head.len() + chunk.fields.len() + 32);
                    out.extend_from_slice(b"data: ");
                    self.object(&mut out, &chunk, self.include_usage);
                    out.extend_from_slice(b"\n\n");
                }
            }
            Piece::Done(end) => self.closing(&mut out, &end),
        }
        out
    }

    /// The finish chunk and the usage chunk, where a server did not send its
    /// own, and `[DONE]`.
    fn closing(&self, out: &mut Vec<u8>, end: &End) {
        let (id, at, model) = (&self.id, self.created, &self.model);
        if !self.theirs {
            if self.chat {
                frame(out, &ChatChunk::finish(id, at, model, end.finish));
            } else {
                frame(out, &TextCompletion::new(id, at, model, String::new(), Some(end.finish), None));
            }
        }
        if self.include_usage && !self.usage_sent {
            let usage = end.tokens.usage();
            let mut chunk = if self.chat {
                serde_json::to_value(ChatChunk::usage(id, at, model, usage))
            } else {
                serde_json::to_value(TextCompletion::usage(id, at, model, usage))
            };
            if let Ok(chunk) = &mut chunk
                && end.tokens.estimated
            {
                chunk["usage"]["estimated"] = true.into();
            }
            frame(out, &chunk.unwrap_or_default());
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Answers from `session`, streamed or whole as the call asked.
    pub(crate) async fn answer(self, session: Session) -> Result<Response, Failure> {
        let id = self.id.clone();
        let mut response = if self.stream {
            self.streamed(session)
        } else {
            self.collected(session).await.map_err(|error| Failure {
                error,
                response_id: Some(id.clone()),
            })?
        };
        if let Ok(id) = HeaderValue::try_from(id) {
            response.headers_mut().insert(RESPONSE_ID, id);
        }
        Ok(response)
    }

    async fn collected(mut self, mut session: Session) -> Result<Response, ApiError> {
        if let Some(mut other) = self.other.take() {
            loop {
                let piece = session.next().await?;
                other.take(&piece);
                if matches!(piece, Piece::Done(_)) {
                    return Ok(axum::Json(other.whole()).into_response());
                }
            }
        }
        let (mut answer, mut whole) = (String::new(), None);
        let end = loop {
            match session.next().await? {
                Piece::Started { .. } => {}
                Piece::Text(text) | Piece::Rest(text) => answer.push_str(&text),
                Piece::Chunk(chunk) => whole = Some(chunk),
                Piece::Done(end) => break end,
            }
        };
        let kind = [(header::CONTENT_TYPE, "application/json")];
        if let Some(chunk) = whole {
            let mut body = Vec::with_capacity(self.head.len() + chunk.fields.len() + 256);
            self.object(&mut body, &chunk, true);
            return Ok((kind, body).into_response());
        }
        let (id, at, model, usage) = (&self.id, self.created, &self.model, end.tokens.usage());
        Ok(if self.chat {
            axum::Json(ChatCompletion::new(id, at, model, answer, end.finish, usage)).into_response()
        } else {
            let answer = TextCompletion::new(id, at, model, answer, Some(end.finish), Some(usage));
            axum::Json(answer).into_response()
        })
    }

    fn streamed(self, session: Session) -> Response {
        let opening = if session.is_engine() && self.other.is_none() { self.opening() } else { Vec::new() };
        let rest = futures::stream::unfold(Some((self, session)), |state| async move {
            let (mut form, mut session) = state?;
            loop {
                match session.next().await {
                    Ok(piece) => {
                        let over = matches!(piece, Piece::Done(_));
                        let frames = form.frames(piece);
                        if over {
                            return Some((frames, None));
                        }
                        if !frames.is_empty() {
                            return Some((frames, Some((form, session))));
                        }
                    }
                    Err(e) => {
                        let mut out = Vec::new();
                        match &mut form.other {
                            Some(other) => out = other.error(&e),
                            None => frame(&mut out, &e.body()),
                        }
                        return Some((out, None));
                    }
                }
            }
        });
        let opening = futures::stream::iter((!opening.is_empty()).then_some(opening));
        let frames = opening.chain(rest).map(|f| Ok::<_, Infallible>(Bytes::from(f)));
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, Body::from_stream(frames)).into_response()
    }
}

/// One server-sent event. JSON holds no raw line break, so one line suffices.
fn frame(out: &mut Vec<u8>, value: &impl serde::Serialize) {
    out.extend_from_slice(b"data: ");
    let start = out.len();
    if let Err(e) = serde_json::to_writer(&mut *out, value) {
        out.truncate(start);
        let fallback = error::body(&ApiError::internal(format!("chunk is not JSON: {e}")));
        out.extend_from_slice(fallback.to_string().as_bytes());
    }
    out.extend_from_slice(b"\n\n");
}
