//! What servers that speak OpenAI's protocol differ in: the fields they take,
//! what they call some of them, where they answer probes.
//!
//! The lists are of what a server acts on, read from the sources of vLLM,
//! SGLang, TGI, TensorRT-LLM and llama.cpp and from OpenAI's reference, all in
//! November 2026. Most servers ignore a field they do not know; here it is
//! refused by name, so that no one believes it had an effect. Left out on
//! purpose are fields that steer a cluster's insides (`bootstrap_host`,
//! `kv_transfer_params`, data-parallel ranks): no client of a gateway may.

use crate::ask::{Ask, Endpoint};
use ashlar_api::ApiError;
use serde::{Deserialize, Serialize};

/// What kind of server a backend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// The engine in this process.
    Engine,
    /// vLLM's server, and Ashlar's own.
    Vllm,
    /// SGLang's server.
    Sglang,
    /// Hugging Face's Text Generation Inference.
    Tgi,
    /// TensorRT-LLM's `trtllm-serve`.
    TrtllmServe,
    /// llama.cpp's `llama-server`.
    LlamaServer,
    /// OpenAI's API, or one like it without extensions.
    Openai,
    /// Anthropic's messages API.
    Anthropic,
    /// Another gateway or `ashlar serve`.
    Ashlar,
}

/// Fields of both endpoints that every dialect takes.
const COMMON: &[&str] = &[
    "model", "stream", "stream_options", "temperature", "top_p", "max_tokens", "stop", "seed",
    "presence_penalty", "frequency_penalty", "n", "logprobs",
];
/// Fields of the chat endpoint that every dialect takes.
const CHAT: &[&str] = &["messages", "top_logprobs", "tools", "tool_choice", "response_format"];
/// Fields of the completions endpoint that every dialect takes.
const TEXT: &[&str] = &["prompt", "echo", "suffix"];

/// Fields of embeddings.
const EMBED: &[&str] = &["model", "input", "encoding_format", "dimensions", "user"];
/// Fields of a ranking.
const RERANK: &[&str] = &["model", "query", "documents", "top_n"];
/// What vLLM takes beside them.
const VLLM_POOL: &[&str] = &["truncate_prompt_tokens", "add_special_tokens", "priority"];
/// Fields of vLLM's tokenizer endpoint.
const TOKENIZE: &[&str] = &[
    "model", "prompt", "messages", "add_special_tokens", "return_token_strs", "add_generation_prompt",
    "continue_final_message", "chat_template", "chat_template_kwargs", "tools",
];

/// What Anthropic's API can be given, under OpenAI's names.
const ANTHROPIC: &[&str] = &[
    "model", "stream", "stream_options", "temperature", "top_p", "top_k", "max_tokens",
    "max_completion_tokens", "stop", "messages", "tools", "tool_choice", "parallel_tool_calls",
    "user", "safety_identifier", "n", "response_format", "service_tier",
];

impl Dialect {
    /// Its name in configuration and errors.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::Tgi => "tgi",
            Self::TrtllmServe => "trtllm-serve",
            Self::LlamaServer => "llama-server",
            Self::Openai => "openai",
            Self::Anthropic => "anthropic",
            Self::Ashlar => "ashlar",
        }
    }

    /// The address used when none is set.
    pub(crate) const fn default_url(self) -> Option<&'static str> {
        match self {
            Self::Openai => Some("https://api.openai.com/v1"),
            Self::Anthropic => Some("https://api.anthropic.com/v1"),
            _ => None,
        }
    }

    /// Where a probe asks: from the host's root when it begins with `//`,
    /// else below the base address.
    pub(crate) const fn default_probe(self) -> &'static str {
        match self {
            Self::Openai | Self::Anthropic => "/models",
            _ => "//health",
        }
    }

    /// Fields beyond the common ones, for both endpoints and for chat alone.
    const fn extra(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Openai => (
                &["user", "logit_bias", "best_of"],
                &[
                    "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "store", "metadata",
                    "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity",
                    "modalities", "audio", "prediction", "web_search_options", "functions", "function_call",
                ],
            ),
            Self::Vllm => (
                &[
                    "user", "logit_bias", "top_k", "min_p", "repetition_penalty", "length_penalty", "use_beam_search",
                    "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
                    "spaces_between_special_tokens", "truncate_prompt_tokens", "truncation_side", "prompt_logprobs",
                    "allowed_token_ids", "bad_words", "add_special_tokens", "structured_outputs", "guided_json",
                    "guided_regex", "guided_choice", "guided_grammar", "priority", "request_id", "session_id",
                    "return_tokens_as_token_ids", "return_token_ids", "cache_salt", "vllm_xargs", "logprob_token_ids",
                    "repetition_detection", "stream_interval", "response_format",
                ],
                &[
                    "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "include_reasoning",
                    "thinking_token_budget", "echo", "add_generation_prompt", "continue_final_message", "documents",
                    "chat_template", "chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs",
                ],
            ),
            Self::Sglang => (
                &[
                    "user", "logit_bias", "top_k", "min_p", "min_tokens", "regex", "ebnf", "json_schema",
                    "repetition_penalty", "stop_token_ids", "stop_regex", "no_stop_trim", "ignore_eos",
                    "skip_special_tokens", "session_id", "custom_params", "rid", "extra_key", "cache_salt", "priority",
                    "return_hidden_states", "return_token_ids", "response_format",
                ],
                &[
                    "max_completion_tokens", "parallel_tool_calls", "reasoning_effort", "continue_final_message",
                    "separate_reasoning", "stream_reasoning", "chat_template_kwargs",
                ],
            ),
            // TGI names the limit `max_tokens` alone.
            Self::Tgi => (&["logit_bias", "max_completion_tokens"], &["tool_prompt", "guideline"]),
            Self::TrtllmServe => (
                &[
                    "user", "logit_bias", "best_of", "use_beam_search", "top_k", "top_p_min", "min_p",
                    "repetition_penalty", "length_penalty", "early_stopping", "stop_token_ids",
                    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens",
                    "spaces_between_special_tokens", "truncate_prompt_tokens", "add_special_tokens", "response_format",
                    "cache_salt",
                ],
                &[
                    "max_completion_tokens", "reasoning_effort", "add_generation_prompt", "documents",
                    "chat_template", "chat_template_kwargs",
                ],
            ),
            Self::LlamaServer => (
                &[
                    "logit_bias", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold",
                    "dynatemp_range", "dynatemp_exponent", "repeat_penalty", "repeat_last_n", "dry_multiplier",
                    "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "mirostat",
                    "mirostat_tau", "mirostat_eta", "grammar", "json_schema", "ignore_eos", "samplers", "cache_prompt",
                    "timings_per_token", "return_tokens", "post_sampling_probs", "min_keep", "n_predict", "n_keep",
                    "t_max_predict_ms", "lora", "response_format",
                ],
                &[
                    "max_completion_tokens", "parallel_tool_calls", "chat_template_kwargs", "reasoning_format",
                    "add_generation_prompt", "parse_tool_calls",
                ],
            ),
            // What our own server reads; it refuses the rest by name itself.
            Self::Ashlar => (
                &[
                    "user", "logit_bias", "top_k", "min_p", "repetition_penalty", "priority", "metadata", "store",
                    "service_tier", "prompt_cache_key", "safety_identifier", "best_of",
                ],
                &[
                    "max_completion_tokens", "parallel_tool_calls", "modalities", "functions", "function_call",
                    "reasoning_effort",
                ],
            ),
            Self::Anthropic | Self::Engine => (&[], &[]),
        }
    }

    /// Whether this kind of server has the endpoint, in the form it has here.
    const fn answers(self, endpoint: Endpoint) -> bool {
        match endpoint {
            Endpoint::Chat | Endpoint::Messages | Endpoint::Responses => true,
            Endpoint::Completions => !matches!(self, Self::Anthropic),
            Endpoint::Embeddings => !matches!(self, Self::Anthropic | Self::Tgi),
            // SGLang answers with a bare array.
            Endpoint::Rerank => matches!(self, Self::Vllm | Self::LlamaServer | Self::Ashlar),
            // llama-server's have another form.
            Endpoint::Tokenize | Endpoint::Detokenize => matches!(self, Self::Vllm | Self::Ashlar),
        }
    }

    /// Where it answers `endpoint`, in the form of [`Dialect::default_probe`].
    pub(crate) const fn tail(self, endpoint: Endpoint) -> &'static str {
        match (self, endpoint) {
            (Self::Ashlar, Endpoint::Tokenize) => "/tokenize",
            (Self::Ashlar, Endpoint::Detokenize) => "/detokenize",
            (_, endpoint) => endpoint.tail(),
        }
    }

    fn takes(self, endpoint: Endpoint, field: &str) -> bool {
        if self == Self::Anthropic {
            return ANTHROPIC.contains(&field);
        }
        let (both, chat) = self.extra();
        let own = match endpoint {
            Endpoint::Completions => TEXT.contains(&field),
            Endpoint::Embeddings => return EMBED.contains(&field) || (self == Self::Vllm && VLLM_POOL.contains(&field)),
            Endpoint::Rerank => return RERANK.contains(&field) || (self == Self::Vllm && VLLM_POOL.contains(&field)),
            Endpoint::Tokenize => return TOKENIZE.contains(&field),
            Endpoint::Detokenize => return ["model", "tokens"].contains(&field),
            _ => CHAT.contains(&field) || chat.contains(&field),
        };
        COMMON.contains(&field) || own || both.contains(&field)
    }

    /// The name `field` has there.
    pub(crate) fn renamed(self, field: &str) -> &str {
        match (self, field) {
            (Self::Tgi, "max_completion_tokens") => "max_tokens",
            (Self::LlamaServer, "repetition_penalty") => "repeat_penalty",
            _ => field,
        }
    }

    /// Refuses a request with a field this kind of server does not take.
    ///
    /// # Errors
    /// 400 `unsupported_parameter` naming the field and the backend.
    pub(crate) fn check(self, ask: &Ask, backend: &str) -> Result<(), ApiError> {
        if !self.answers(ask.endpoint.inner()) {
            let message = format!("backend {backend:?} ({}) does not answer {}", self.as_str(), ask.endpoint.path());
            return Err(ApiError::bad_request(message, None, Some("unsupported_endpoint")));
        }
        let mut sent: Vec<&str> = Vec::new();
        for (field, _) in ask.fields() {
            let name = self.renamed(field);
            if !self.takes(ask.endpoint.inner(), name) && !self.takes(ask.endpoint.inner(), field) {
                let field: String = field.chars().take(80).collect();
                let message = format!(
                    "{field} is not supported here: backend {backend:?} is of kind {}, which does not take it",
                    self.as_str()
                );
                return Err(ApiError::bad_request(message, Some(&field), Some("unsupported_parameter")));
            }
            if sent.contains(&name) {
                let message = format!("{field} and another field both mean {name} to backend {backend:?}: give one");
                return Err(ApiError::bad_request(message, Some(field), Some("invalid_value")));
            }
            sent.push(name);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderMap;

    fn check(dialect: Dialect, endpoint: Endpoint, field: &str) -> Result<(), ApiError> {
        let body = format!(r#"{{"model":"m","{}":[],{field}}}"#, endpoint.prompt());
        let ask = Ask::read(endpoint, HeaderMap::new(), body.into(), std::time::Instant::now()).unwrap();
        dialect.check(&ask, "b")
    }

    #[test]
    fn what_a_server_does_not_take_is_refused_by_name() {
        use Dialect::*;
        use Endpoint::*;
        for (dialect, endpoint, field, ok) in [
            (Openai, Chat, "\"temperature\":1", true),
            (Openai, Chat, "\"top_k\":1", false),
            (Openai, Completions, "\"max_completion_tokens\":1", false),
            (Vllm, Chat, "\"top_k\":1", true),
            (Vllm, Chat, "\"kv_transfer_params\":{}", false),
            (Vllm, Chat, "\"repeat_penalty\":1", false),
            (LlamaServer, Completions, "\"repetition_penalty\":1", true),
            (Tgi, Chat, "\"max_completion_tokens\":1", true),
            (Tgi, Chat, "\"user\":\"x\"", false),
            (Tgi, Chat, "\"user\":null", true),
            (Anthropic, Chat, "\"logprobs\":true", false),
            (Anthropic, Completions, "\"stop\":[]", false),
            (TrtllmServe, Completions, "\"best_of\":2", true),
            (Sglang, Chat, "\"regex\":\"a\"", true),
            (Sglang, Chat, "\"tempreature\":1", false),
        ] {
            let got = check(dialect, endpoint, field);
            assert_eq!(got.is_ok(), ok, "{dialect:?} {endpoint:?} {field}: {got:?}");
        }
        let e = check(Openai, Chat, "\"top_k\":1").unwrap_err();
        assert_eq!((e.status, e.param.as_deref()), (400, Some("top_k")));
        let e = check(Tgi, Chat, "\"max_tokens\":1,\"max_completion_tokens\":2").unwrap_err();
        assert_eq!(e.param.as_deref(), Some("max_completion_tokens"), "neither may be lost");
    }
}
