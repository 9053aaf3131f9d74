//! The line between who asks and who generates.
//!
//! A backend answers with a stream of [`Event`]s. Dropping the stream is the
//! one way to cancel: the backend must then free what the request held.

use crate::{ApiError, ChatRequest, CompletionRequest};
use futures::Stream;
use serde::{Deserialize, Serialize};
use std::pin::Pin;

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the context was used up.
    Length,
    /// A tool is to be called.
    ToolCalls,
    /// A guard or a server's filter ended it.
    ContentFilter,
    /// The client went away or the server is stopping.
    Cancelled,
}

impl Finish {
    /// Its name on the wire and in the ledger.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
            Self::ContentFilter => "content_filter",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Token counts of one request. Cached tokens are part of the prompt's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// Tokens generated, the end token included.
    pub completion_tokens: u32,
    /// The sum of both.
    pub total_tokens: u32,
    /// What of the prompt was not computed anew.
    pub prompt_tokens_details: PromptDetails,
}

/// OpenAI's `prompt_tokens_details`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptDetails {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
}

impl Usage {
    /// Counts of a request whose prompt of `prompt` tokens had `cached` of them
    /// in the prefix cache.
    pub fn new(prompt: u32, cached: u32, completion: u32) -> Self {
        Self {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt.saturating_add(completion),
            prompt_tokens_details: PromptDetails {
                cached_tokens: cached,
            },
        }
    }

    /// Prompt tokens found in the prefix cache.
    pub fn cached_tokens(&self) -> u32 {
        self.prompt_tokens_details.cached_tokens
    }
}

/// Where the time of a request went, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timings {
    /// From submission until its first step.
    pub queue_ms: f64,
    /// From its first step until its first token.
    pub prefill_ms: f64,
    /// From its first token until its last: over `completion_tokens - 1`, the
    /// mean time between tokens.
    pub decode_ms: f64,
}

/// What happens to a request, in order: `Started`, any number of `Token`,
/// `Done`. An `Err` in the stream ends it instead of `Done`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request runs; its prompt is being read.
    Started {
        /// Tokens of the rendered prompt.
        prompt_tokens: u32,
        /// Of these, found in the prefix cache.
        cached_tokens: u32,
    },
    /// Text became certain. `text` is complete UTF-8, holds no part of a stop
    /// string, and may cover several tokens or none.
    Token {
        /// The text.
        text: String,
        /// The token that completed it.
        id: u32,
        /// Natural log of the token's probability before temperature, when the
        /// request asked for it.
        logprob: Option<f32>,
    },
    /// The request is over.
    Done {
        /// Why.
        finish: Finish,
        /// Its token counts.
        usage: Usage,
        /// Its times.
        timings: Timings,
    },
}

/// The events of one request. Dropping it cancels the request.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, ApiError>> + Send>>;

/// A model a backend serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The name requests use.
    pub id: String,
    /// Seconds since 1970 when it was loaded.
    pub created: i64,
    /// Who made it available.
    pub owned_by: String,
    /// Tokens of prompt and answer together that fit; 0 where that is not known.
    pub context: u32,
}

/// How likely a continuation is after a context.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Sum of natural log-probabilities of the continuation's tokens.
    pub logprob: f64,
    /// Tokens of the continuation.
    pub tokens: u32,
    /// Whether greedy decoding would have given exactly these tokens.
    pub greedy: bool,
}

/// How many tokens forward passes computed, as a histogram.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IterationTokens {
    /// Passes by the first bound they do not exceed; the last entry is of those
    /// above every bound.
    pub counts: [u64; 14],
    /// Tokens of all passes.
    pub sum: u64,
}

impl IterationTokens {
    /// Upper bounds, those of vLLM's `iteration_tokens_total`.
    pub const BOUNDS: [u64; 13] = [
        1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
    ];

    /// Counts a pass of `tokens`.
    pub fn observe(&mut self, tokens: u64) {
        let at = Self::BOUNDS.partition_point(|&bound| bound < tokens);
        self.counts[at] += 1;
        self.sum += tokens;
    }
}

/// A moment's view of a backend. Counters only grow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BackendStats {
    /// Requests holding KV blocks.
    pub running: u32,
    /// Requests waiting for a place.
    pub waiting: u32,
    /// KV blocks held by running requests.
    pub blocks_used: u32,
    /// KV blocks free but still holding a reusable prefix.
    pub blocks_cached: u32,
    /// KV blocks in all.
    pub blocks_total: u32,
    /// Counter: prompt tokens of started requests.
    pub prompt_tokens: u64,
    /// Counter: of these, found in the prefix cache.
    pub cached_tokens: u64,
    /// Counter: tokens generated.
    pub generated_tokens: u64,
    /// Counter: prompts looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Counter: of these, found at least one block.
    pub prefix_hits: u64,
    /// Counter: requests that gave up their blocks to others and were recomputed.
    pub preemptions: u64,
    /// Counter: requests that ended by stop or length.
    pub finished: u64,
    /// Counter: requests whose client went away.
    pub cancelled: u64,
    /// Counter: requests that ended by an error of the backend.
    pub failed: u64,
    /// Counter: requests that waited for another to compute their common prefix.
    pub prefix_waits: u64,
    /// Counter: forward passes.
    pub steps: u64,
    /// Counter: forward passes that panicked.
    pub panics: u64,
    /// Tokens computed in each forward pass.
    pub iteration_tokens: IterationTokens,
    /// Bytes of requests that have not started.
    pub queued_bytes: u64,
    /// Why the backend cannot serve, when it cannot.
    pub unhealthy: Option<String>,
}

impl BackendStats {
    /// Adds another backend's figures; the first reason for ill health stays.
    pub fn add(&mut self, other: Self) {
        self.running += other.running;
        self.waiting += other.waiting;
        self.blocks_used += other.blocks_used;
        self.blocks_cached += other.blocks_cached;
        self.blocks_total += other.blocks_total;
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.generated_tokens += other.generated_tokens;
        self.prefix_queries += other.prefix_queries;
        self.prefix_hits += other.prefix_hits;
        self.preemptions += other.preemptions;
        self.finished += other.finished;
        self.cancelled += other.cancelled;
        self.failed += other.failed;
        self.prefix_waits += other.prefix_waits;
        self.steps += other.steps;
        self.panics += other.panics;
        for (count, n) in self.iteration_tokens.counts.iter_mut().zip(other.iteration_tokens.counts) {
            *count += n;
        }
        self.iteration_tokens.sum += other.iteration_tokens.sum;
        self.queued_bytes += other.queued_bytes;
        self.unhealthy = self.unhealthy.take().or(other.unhealthy);
    }
}

/// Something that generates text.
#[async_trait::async_trait]
pub trait Backend: Send + Sync {
    /// Its name in logs and the ledger.
    fn name(&self) -> &str;

    /// What it serves.
    fn models(&self) -> Vec<ModelInfo>;

    /// Answers a conversation.
    async fn chat(&self, request: ChatRequest) -> Result<EventStream, ApiError>;

    /// Continues a text.
    async fn complete(&self, request: CompletionRequest) -> Result<EventStream, ApiError>;

    /// Log-probability of `continuation` after `context`, both plain text.
    async fn score(&self, context: &str, continuation: &str) -> Result<Score, ApiError>;

    /// Its state now.
    fn stats(&self) -> BackendStats;
}

#[cfg(test)]
mod tests {
    use super::IterationTokens;

    #[test]
    fn a_pass_on_a_bound_falls_under_it() {
        let mut h = IterationTokens::default();
        for tokens in [1, 2, 8, 16384, 16385, u64::from(u32::MAX)] {
            h.observe(tokens);
        }
        assert_eq!((h.counts[0], h.counts[1]), (1, 2));
        assert_eq!((h.counts[12], h.counts[13]), (1, 2));
        assert_eq!(IterationTokens::BOUNDS.len() + 1, h.counts.len());
    }
}
