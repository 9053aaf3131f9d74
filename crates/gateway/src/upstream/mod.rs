//! Who answers: the engine in this process, or a server over HTTP.
//!
//! Every answer is a stream of [`Piece`]s, whole answers too, so that one path
//! records, guards and settles them all. Dropping the stream cancels the work:
//! an engine frees its blocks, a connection is closed.
//!
//! What may not happen here: text that reaches a client around [`Piece`], or a
//! stream that ends without `Done` or an error.
//!
//! Rejected: one trait with `ashlar_api::Backend`. That one speaks in parsed
//! requests and tokens, which is right for evaluation and for our engine; a
//! remote server's answer has fields of its own that must come through
//! unchanged.

mod anthropic;
mod dialect;
mod encode;
mod error;
mod http;
mod local;
mod openai;
mod retry_after;
mod sse;
mod usage;

pub use dialect::Dialect;
pub use usage::Tokens;
pub(crate) use anthropic::{Anthropic, VERSION as ANTHROPIC_VERSION};
pub(crate) use encode::Encode;
pub(crate) use error::UpstreamError;
pub(crate) use http::{Link, LinkSettings};
pub(crate) use local::{Call, Local};
#[cfg(test)]
pub(crate) use openai::pieces;
pub(crate) use openai::{OpenAi, string as json_string};

use crate::ask::Ask;
use ashlar_api::{ApiError, Finish, ModelInfo, Timings};
use futures::Stream;
use std::pin::Pin;

/// A part of an answer, in order: at most one `Started`, any number of `Text`,
/// `Rest` and `Chunk`, one `Done`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Piece {
    /// The engine reads the prompt.
    Started { prompt_tokens: u32, cached_tokens: u32 },
    /// A token of the engine; its text may be empty.
    Text(String),
    /// Text the guard had held back, of tokens that came before.
    Rest(String),
    /// What a server sent: a chunk of a stream, or its whole answer.
    Chunk(Chunk),
    /// The answer is complete.
    Done(End),
}

impl Piece {
    /// Whether it brings a token, or more.
    pub(crate) fn gains(&self) -> bool {
        match self {
            Self::Text(_) => true,
            Self::Chunk(chunk) => chunk.gains > 0,
            Self::Started { .. } | Self::Rest(_) | Self::Done(_) => false,
        }
    }
}

/// An object of OpenAI's protocol that a server sent.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Chunk {
    /// The object's fields as JSON, without braces and on one line. `id`,
    /// `model` and `usage` are left out: the gateway says its own. Nothing: what
    /// its tokens say is held back by the guard.
    pub(crate) fields: String,
    /// Text of the first choice in it.
    pub(crate) text: String,
    /// Choices that gained text, reasoning or a tool call: at least so many
    /// tokens.
    pub(crate) gains: u32,
    /// It has no choices: a closing usage chunk.
    pub(crate) bare: bool,
    /// Its `usage` as JSON.
    pub(crate) usage: Option<String>,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct End {
    pub(crate) finish: Finish,
    /// The server says that it refused or filtered.
    pub(crate) refused: bool,
    pub(crate) tokens: Tokens,
    /// Known of the engine alone.
    pub(crate) timings: Option<Timings>,
}

/// The pieces of one answer.
pub(crate) type Pieces = Pin<Box<dyn Stream<Item = Result<Piece, UpstreamError>> + Send>>;

/// Something that answers.
#[async_trait::async_trait]
pub(crate) trait Upstream: Send + Sync {
    /// Refuses what it could not do, before anything is recorded or sent.
    fn check(&self, ask: &Ask, model: &str) -> Result<(), ApiError>;

    /// Asks `model`. `seed` is for an engine when the client gave none.
    async fn send(&self, ask: &Ask, model: &str, seed: i64) -> Result<Pieces, UpstreamError>;

    /// Whether it could serve now, found out at little cost.
    async fn probe(&self) -> Result<(), UpstreamError>;

    /// What an engine serves; a server's models are configured.
    fn models(&self) -> Vec<ModelInfo> {
        Vec::new()
    }

    /// Why an engine cannot serve, when it cannot.
    fn unhealthy(&self) -> Option<String> {
        None
    }
}
