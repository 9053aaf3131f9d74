//! From events to HTTP bodies: a whole JSON answer or server-sent events.
//!
//! A failure before the first event is an HTTP error; one in the middle of a
//! stream is an `{"error": …}` event, after which the stream ends without
//! `[DONE]`, as official clients expect.

use crate::{
    error::{self, Failure},
    session::{Call, Session},
};
use ashlar_api::{ApiError, ChatChunk, ChatCompletion, Event, Finish, TextCompletion, Usage};
use axum::{
    body::Body,
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use std::convert::Infallible;

/// The response id, on every answer that was admitted.
pub(crate) const RESPONSE_ID: HeaderName = HeaderName::from_static("x-ashlar-response-id");

/// How answers to one call are spelt.
pub(crate) struct Form {
    chat: bool,
    stream: bool,
    include_usage: bool,
    model: String,
    created: i64,
}

impl Form {
    pub(crate) fn of(call: &Call, model: &str) -> Self {
        Self {
            chat: matches!(call, Call::Chat(_)),
            stream: call.stream(),
            include_usage: call.include_usage(),
            model: model.to_owned(),
            created: ashlar_core::clock::now_ms() / 1000,
        }
    }

    fn text(&self, id: &str, text: String) -> Bytes {
        let (at, model) = (self.created, &self.model);
        if self.chat {
            frame(&ChatChunk::text(id, at, model, text))
        } else {
            frame(&TextCompletion::new(id, at, model, text, None, None))
        }
    }

    /// The role chunk; completions have none.
    fn opening(&self, id: &str) -> Bytes {
        if self.chat {
            frame(&ChatChunk::role(id, self.created, &self.model))
        } else {
            Bytes::new()
        }
    }

    /// The finish chunk, the usage chunk when asked for, and `[DONE]`.
    fn closing(&self, id: &str, finish: Finish, usage: Usage) -> Bytes {
        let (at, model) = (self.created, &self.model);
        let mut parts = Vec::new();
        if self.chat {
            parts.push(frame(&ChatChunk::finish(id, at, model, finish)));
        } else {
            let last = TextCompletion::new(id, at, model, String::new(), Some(finish), None);
            parts.push(frame(&last));
        }
        if self.include_usage {
            parts.push(if self.chat {
                frame(&ChatChunk::usage(id, at, model, usage))
            } else {
                frame(&TextCompletion::usage(id, at, model, usage))
            });
        }
        parts.push(Bytes::from_static(b"data: [DONE]\n\n"));
        parts.concat().into()
    }

    fn whole(&self, id: &str, text: String, finish: Finish, usage: Usage) -> Response {
        let (at, model) = (self.created, &self.model);
        if self.chat {
            axum::Json(ChatCompletion::new(id, at, model, text, finish, usage)).into_response()
        } else {
            let answer = TextCompletion::new(id, at, model, text, Some(finish), Some(usage));
            axum::Json(answer).into_response()
        }
    }

    /// Answers from `session`, streamed or whole as the call asked.
    pub(crate) async fn answer(self, session: Session) -> Result<Response, Failure> {
        let id = session.id().to_owned();
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

    async fn collected(self, mut session: Session) -> Result<Response, ApiError> {
        let mut answer = String::new();
        loop {
            match session.next().await? {
                Event::Started { .. } => {}
                Event::Token { text, .. } => answer.push_str(&text),
                Event::Done { finish, usage, .. } => {
                    return Ok(self.whole(session.id(), answer, finish, usage));
                }
            }
        }
    }

    fn streamed(self, session: Session) -> Response {
        let id = session.id().to_owned();
        let opening = self.opening(&id);
        let rest = futures::stream::unfold(Some((self, session)), move |state| {
            let id = id.clone();
            async move {
                let (form, mut session) = state?;
                // Tokens may carry no text yet; clients get only what has some.
                loop {
                    return match session.next().await {
                        Ok(Event::Started { .. }) => continue,
                        Ok(Event::Token { text, .. }) if text.is_empty() => continue,
                        Ok(Event::Token { text, .. }) => {
                            Some((form.text(&id, text), Some((form, session))))
                        }
                        Ok(Event::Done { finish, usage, .. }) => {
                            Some((form.closing(&id, finish, usage), None))
                        }
                        Err(e) => Some((frame(&e.body()), None)),
                    };
                }
            }
        });
        let opening = futures::stream::iter((!opening.is_empty()).then_some(opening));
        let frames = futures::StreamExt::chain(opening, rest);
        let frames = futures::StreamExt::map(frames, Ok::<_, Infallible>);
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, Body::from_stream(frames)).into_response()
    }
}

/// One server-sent event. JSON holds no raw line break, so one line suffices.
fn frame(value: &impl serde::Serialize) -> Bytes {
    let json = serde_json::to_string(value).unwrap_or_else(|e| {
        let fallback = error::body(&ApiError::internal(format!("chunk is not JSON: {e}")));
        fallback.to_string()
    });
    format!("data: {json}\n\n").into()
}
