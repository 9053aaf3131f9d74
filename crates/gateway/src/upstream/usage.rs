//! Token counts in classes that do not overlap, from what each dialect reports.
//!
//! OpenAI-like servers count cached tokens within the prompt and reasoning
//! within the completion; Anthropic counts cache reads and writes beside its
//! input. Bills that add such numbers up without care charge cached tokens
//! twice.
//!
//! What may not happen here: a count that contradicts itself is believed. It is
//! treated as none, and the gateway's own estimate is marked as one.

use ashlar_api::Usage;
use serde::{Deserialize, Serialize};

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    /// Of the prompt, computed anew.
    pub input: u32,
    /// Of the prompt, found in a cache.
    pub cache_read: u32,
    /// Of the prompt, computed and put into a cache that charges for it.
    pub cache_write: u32,
    /// Generated and shown.
    pub output: u32,
    /// Generated as reasoning.
    pub reasoning: u32,
    /// The upstream gave no usable count; these are guesses of the gateway.
    pub estimated: bool,
}

impl Tokens {
    /// All of the prompt.
    pub fn prompt(&self) -> u32 {
        self.input.saturating_add(self.cache_read).saturating_add(self.cache_write)
    }

    /// All that was generated.
    pub fn completion(&self) -> u32 {
        self.output.saturating_add(self.reasoning)
    }

    /// As OpenAI counts.
    pub fn usage(&self) -> Usage {
        Usage::new(self.prompt(), self.cache_read, self.completion())
    }

    /// As the usage ledger has them.
    pub fn classes(&self) -> ashlar_store::Tokens {
        ashlar_store::Tokens {
            input: self.input.into(),
            cache_read: self.cache_read.into(),
            cache_write: self.cache_write.into(),
            output: self.output.into(),
            reasoning: self.reasoning.into(),
        }
    }

    /// A guess.
    pub(crate) fn estimate(prompt: u32, completion: u32) -> Self {
        Self { input: prompt, output: completion, estimated: true, ..Self::default() }
    }
}

impl From<Usage> for Tokens {
    fn from(usage: Usage) -> Self {
        let cached = usage.cached_tokens().min(usage.prompt_tokens);
        Self {
            input: usage.prompt_tokens - cached,
            cache_read: cached,
            output: usage.completion_tokens,
            ..Self::default()
        }
    }
}

/// `usage` of OpenAI's protocol with what dialects add.
#[derive(Deserialize)]
struct Wire {
    prompt_tokens: u32,
    #[serde(default)]
    completion_tokens: Option<u32>,
    #[serde(default)]
    prompt_tokens_details: Option<PromptWire>,
    #[serde(default)]
    completion_tokens_details: Option<CompletionWire>,
    /// SGLang's place for it.
    #[serde(default)]
    reasoning_tokens: Option<u32>,
    /// DeepSeek's place for cached tokens.
    #[serde(default)]
    prompt_cache_hit_tokens: Option<u32>,
}

#[derive(Default, Deserialize)]
struct PromptWire {
    #[serde(default)]
    cached_tokens: Option<u32>,
}

#[derive(Default, Deserialize)]
struct CompletionWire {
    #[serde(default)]
    reasoning_tokens: Option<u32>,
}

/// `timings` of llama-server: tokens it took from its cache.
#[derive(Deserialize)]
struct LlamaTimings {
    #[serde(default)]
    cache_n: Option<u32>,
}

/// Reads OpenAI-like `usage`, and llama-server's `timings` where there are any;
/// `None` for what is malformed or contradicts itself.
pub(crate) fn openai(usage: &str, timings: Option<&str>) -> Option<Tokens> {
    let wire: Wire = serde_json::from_str(usage).ok()?;
    let prompt_details = wire.prompt_tokens_details.unwrap_or_default();
    let details = wire.completion_tokens_details.unwrap_or_default();
    let from_timings = || serde_json::from_str::<LlamaTimings>(timings?).ok()?.cache_n;
    let cached = prompt_details.cached_tokens.or(wire.prompt_cache_hit_tokens).or_else(from_timings).unwrap_or(0);
    let reasoning = details.reasoning_tokens.or(wire.reasoning_tokens).unwrap_or(0);
    let completion = wire.completion_tokens.unwrap_or(0);
    Some(Tokens {
        input: wire.prompt_tokens.checked_sub(cached)?,
        cache_read: cached,
        cache_write: 0,
        output: completion.checked_sub(reasoning)?,
        reasoning,
        estimated: false,
    })
}

/// `usage` of Anthropic's messages; a stream sends it in two parts.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(crate) struct AnthropicUsage {
    pub(crate) input_tokens: Option<u32>,
    pub(crate) output_tokens: Option<u32>,
    pub(crate) cache_read_input_tokens: Option<u32>,
    pub(crate) cache_creation_input_tokens: Option<u32>,
}

impl AnthropicUsage {
    /// Later counts replace earlier ones: they are running totals.
    pub(crate) fn merge(&mut self, later: Self) {
        self.input_tokens = later.input_tokens.or(self.input_tokens);
        self.output_tokens = later.output_tokens.or(self.output_tokens);
        self.cache_read_input_tokens = later.cache_read_input_tokens.or(self.cache_read_input_tokens);
        self.cache_creation_input_tokens = later.cache_creation_input_tokens.or(self.cache_creation_input_tokens);
    }

    /// The classes; `None` when input or output was never given.
    pub(crate) fn tokens(&self) -> Option<Tokens> {
        Some(Tokens {
            input: self.input_tokens?,
            cache_read: self.cache_read_input_tokens.unwrap_or(0),
            cache_write: self.cache_creation_input_tokens.unwrap_or(0),
            output: self.output_tokens?,
            reasoning: 0,
            estimated: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classes(t: Tokens) -> (u32, u32, u32, u32, u32) {
        (t.input, t.cache_read, t.cache_write, t.output, t.reasoning)
    }

    #[test]
    fn classes_never_overlap() {
        let read = |usage, timings| openai(usage, timings).map(classes);
        let openai = r#"{"prompt_tokens":10,"completion_tokens":7,"total_tokens":17,"prompt_tokens_details":{"cached_tokens":4,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":5}}"#;
        assert_eq!(read(openai, None), Some((6, 4, 0, 2, 5)));
        let sglang = r#"{"prompt_tokens":10,"completion_tokens":7,"prompt_tokens_details":null,"reasoning_tokens":3}"#;
        assert_eq!(read(sglang, None), Some((10, 0, 0, 4, 3)));
        let plain = r#"{"prompt_tokens":10,"completion_tokens":7}"#;
        assert_eq!(read(plain, Some(r#"{"cache_n":9,"prompt_n":1}"#)), Some((1, 9, 0, 7, 0)));
        assert_eq!(read(r#"{"prompt_tokens":3}"#, None), Some((3, 0, 0, 0, 0)), "embeddings generate nothing");
        let deepseek = r#"{"prompt_tokens":10,"completion_tokens":1,"prompt_cache_hit_tokens":8}"#;
        assert_eq!(read(deepseek, None), Some((2, 8, 0, 1, 0)));
    }

    #[test]
    fn contradictions_are_no_count() {
        for wrong in [
            r#"{"prompt_tokens":1,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":2}}"#,
            r#"{"prompt_tokens":1,"completion_tokens":1,"completion_tokens_details":{"reasoning_tokens":2}}"#,
            r#"{"prompt_tokens":-1,"completion_tokens":1}"#,
            r#"{"prompt_tokens":"1","completion_tokens":1}"#,
            r#"{"completion_tokens":1}"#,
            "null",
            "7",
        ] {
            assert_eq!(openai(wrong, None), None, "{wrong}");
        }
    }

    #[test]
    fn anthropic_counts_caches_beside_its_input() {
        let read = |s| serde_json::from_str::<AnthropicUsage>(s).unwrap();
        let mut usage = read(r#"{"input_tokens":5,"cache_read_input_tokens":90,"cache_creation_input_tokens":3,"output_tokens":1}"#);
        usage.merge(read(r#"{"output_tokens":12}"#));
        let tokens = usage.tokens().unwrap();
        assert_eq!(classes(tokens), (5, 90, 3, 12, 0));
        assert_eq!((tokens.prompt(), tokens.completion()), (98, 12));
        assert_eq!(read("{}").tokens(), None);
    }
}
