//! The engine in this process as an upstream.

use super::{End, Piece, Pieces, Tokens, Upstream, UpstreamError};
use crate::ask::{Ask, Endpoint};
use ashlar_api::{ApiError, Backend, ChatRequest, CompletionRequest, Event, ModelInfo};
use futures::StreamExt as _;
use std::sync::Arc;

/// A request as the engine reads it.
#[derive(Debug, Clone)]
pub(crate) enum Call {
    Chat(ChatRequest),
    Completion(CompletionRequest),
}

impl Call {
    pub(crate) fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, ApiError> {
        match endpoint.inner() {
            Endpoint::Chat => ChatRequest::parse(body).map(Self::Chat),
            Endpoint::Completions => CompletionRequest::parse(body).map(Self::Completion),
            _ => {
                let message = format!("the engine generates text and does not answer {}", endpoint.path());
                Err(ApiError::bad_request(message, Some("model"), Some("unsupported_endpoint")))
            }
        }
    }
}

/// The engine.
pub(crate) struct Local(pub(crate) Arc<dyn Backend>);

#[async_trait::async_trait]
impl Upstream for Local {
    fn check(&self, ask: &Ask, _model: &str) -> Result<(), ApiError> {
        ask.call().map(drop)
    }

    async fn send(&self, ask: &Ask, model: &str, seed: i64) -> Result<Pieces, UpstreamError> {
        let call = ask.call().cloned().map_err(UpstreamError::Local)?;
        let asked = match call {
            Call::Chat(mut r) => {
                model.clone_into(&mut r.model);
                r.seed.get_or_insert(seed);
                self.0.chat(r).await
            }
            Call::Completion(mut r) => {
                model.clone_into(&mut r.model);
                r.seed.get_or_insert(seed);
                self.0.complete(r).await
            }
        };
        let events = asked.map_err(UpstreamError::Local)?;
        Ok(Box::pin(events.map(|event| event.map(piece).map_err(UpstreamError::Local))))
    }

    async fn probe(&self) -> Result<(), UpstreamError> {
        match self.unhealthy() {
            None => Ok(()),
            Some(why) => Err(UpstreamError::Local(ApiError::unavailable(why))),
        }
    }

    fn models(&self) -> Vec<ModelInfo> {
        self.0.models()
    }

    fn unhealthy(&self) -> Option<String> {
        self.0.stats().unhealthy
    }
}

fn piece(event: Event) -> Piece {
    match event {
        Event::Started { prompt_tokens, cached_tokens } => Piece::Started { prompt_tokens, cached_tokens },
        Event::Token { text, .. } => Piece::Text(text),
        Event::Done { finish, usage, timings } => Piece::Done(End {
            finish,
            refused: false,
            tokens: Tokens::from(usage),
            timings: Some(timings),
        }),
    }
}
