//! Requests as clients send them, read strictly.
//!
//! A field is served, or accepted because it changes nothing here (`user`,
//! `metadata`, `store: false`, `n: 1`, `tools: []`, …), or refused by name.
//! Fields beyond OpenAI's schema carry the names vLLM gave them: `top_k`,
//! `min_p`, `repetition_penalty`, `priority`.

use crate::ApiError;
use crate::fields::{Fields, brief, invalid, unsupported, wrong_type};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Most stop strings in one request, as OpenAI allows.
const MAX_STOPS: usize = 4;
/// Most bytes of one stop string; text of this length may be held back.
const MAX_STOP_BYTES: usize = 1024;
/// Most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`; `developer` is read as `system`.
    pub role: String,
    /// Its text; text parts are joined without a separator.
    pub content: String,
}

impl ChatMessage {
    fn new(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }

    /// An instruction for the whole conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// What the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamOptions {
    /// Send a last chunk with the token counts.
    pub include_usage: bool,
}

/// How tokens are chosen, and how many. `None` is the default named beside it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    /// 0–2; 0 takes the likeliest token. Default 1.
    pub temperature: Option<f32>,
    /// 0–1: the smallest set of likeliest tokens with this mass. Default 1.
    pub top_p: Option<f32>,
    /// Only this many likeliest tokens; 0 means all. Default 0.
    pub top_k: Option<u32>,
    /// 0–1: only tokens at least this share as likely as the likeliest. Default 0.
    pub min_p: Option<f32>,
    /// Divides (or multiplies, when negative) the logit of each token already
    /// in prompt or answer. Default 1.
    pub repetition_penalty: Option<f32>,
    /// −2–2: taken off the logit of each token already in the answer. Default 0.
    pub presence_penalty: Option<f32>,
    /// −2–2: taken off once for each time a token is in the answer. Default 0.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed and request give the same text. Default: a random one.
    pub seed: Option<i64>,
    /// Most tokens to generate. Default: as many as the context has room for.
    pub max_tokens: Option<u32>,
    /// Generation ends before any of these.
    pub stop: Vec<String>,
    /// Report each token's log-probability in its event.
    pub logprobs: bool,
}

/// `POST /v1/chat/completions`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct ChatRequest {
    /// The model asked for.
    pub model: String,
    /// The conversation, at least one message.
    pub messages: Vec<ChatMessage>,
    /// See [`Sampling::temperature`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// See [`Sampling::top_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// See [`Sampling::top_k`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// See [`Sampling::min_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// See [`Sampling::presence_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// See [`Sampling::frequency_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// See [`Sampling::logit_bias`].
    #[serde(skip)]
    pub logit_bias: Vec<(u32, f32)>,
    /// The older name of `max_completion_tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// See [`Sampling::max_tokens`]; wins over `max_tokens` for Rust callers,
    /// while over the wire giving both with different values is an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_completion_tokens: Option<u32>,
    /// See [`Sampling::stop`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// See [`Sampling::seed`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Answer in server-sent events.
    pub stream: bool,
    /// Only with `stream`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// Answers wanted: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// The end user, as the caller names them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// A stable hash of the end user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub safety_identifier: Option<String>,
    /// Lower goes sooner, whoever else waits. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// See [`Sampling::logprobs`]; for Rust callers only, the wire has no such
    /// answer yet.
    #[serde(skip)]
    pub logprobs: bool,
}

/// What `/v1/completions` continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text; the caller writes all of it, so control tokens written out are
    /// control tokens, as in other servers.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

/// `POST /v1/completions`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CompletionRequest {
    /// The model asked for.
    pub model: String,
    /// What to continue.
    pub prompt: Prompt,
    /// See [`Sampling::temperature`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// See [`Sampling::top_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// See [`Sampling::top_k`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// See [`Sampling::min_p`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f32>,
    /// See [`Sampling::repetition_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    /// See [`Sampling::presence_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
    /// See [`Sampling::frequency_penalty`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f32>,
    /// See [`Sampling::logit_bias`].
    #[serde(skip)]
    pub logit_bias: Vec<(u32, f32)>,
    /// See [`Sampling::max_tokens`]. Over the wire the default is 16, OpenAI's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// See [`Sampling::stop`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stop: Vec<String>,
    /// See [`Sampling::seed`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<i64>,
    /// Answer in server-sent events.
    pub stream: bool,
    /// Only with `stream`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_options: Option<StreamOptions>,
    /// Answers wanted: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// The end user, as the caller names them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Lower goes sooner, whoever else waits. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,
    /// See [`Sampling::logprobs`]; for Rust callers only.
    #[serde(skip)]
    pub logprobs: bool,
}

impl ChatRequest {
    /// A request with every default.
    pub fn new(model: impl Into<String>, messages: Vec<ChatMessage>) -> Self {
        Self {
            model: model.into(),
            messages,
            ..Self::default()
        }
    }

    /// Reads a request body.
    ///
    /// # Errors
    /// 400 naming line and column of malformed JSON, or the field at fault.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut f = Fields::parse(body)?;
        let model = model(&mut f)?;
        let messages = messages(f.required("messages")?)?;
        let s = sampling(&mut f)?;
        let max_completion_tokens = f.count("max_completion_tokens", 1)?;
        if let (Some(new), Some(old)) = (max_completion_tokens, s.max_tokens)
            && new != old
        {
            return Err(invalid(
                "max_tokens",
                format!("max_tokens is {old} but max_completion_tokens is {new}: give one"),
            ));
        }
        let (stream, stream_options) = streaming(&mut f)?;
        let n = single(&mut f, "n")?;
        let user = f.string("user")?;
        let safety_identifier = f.string("safety_identifier")?;
        let priority = priority(&mut f)?;
        harmless(&mut f)?;

        let none_or = |word: &'static str| move |v: &Value| v == "none" || v == word;
        let empty = |v: &Value| v.as_array().is_some_and(Vec::is_empty);
        f.only_if("tools", "tool calls are not served", empty)?;
        f.only_if("functions", "tool calls are not served", empty)?;
        f.only_if("tool_choice", "tool calls are not served", none_or("auto"))?;
        f.only_if(
            "function_call",
            "tool calls are not served",
            none_or("auto"),
        )?;
        f.only_if(
            "parallel_tool_calls",
            "it must be true or false",
            Value::is_boolean,
        )?;
        f.only_if("response_format", "only {\"type\":\"text\"} is", |v| {
            v.as_object()
                .is_some_and(|o| o.len() == 1 && o.get("type").is_some_and(|t| t == "text"))
        })?;
        f.only_if("logprobs", "log-probabilities are not served", |v| {
            v == false
        })?;
        f.only_if("top_logprobs", "log-probabilities are not served", |v| {
            v == 0
        })?;
        f.only_if("modalities", "only [\"text\"] is", |v| {
            v.as_array()
                .is_some_and(|a| a.len() == 1 && a.iter().all(|m| m == "text"))
        })?;
        for (key, why) in [
            ("audio", "only text is served"),
            ("prediction", "predicted outputs are not served"),
            ("reasoning_effort", "no reasoning models are served"),
            ("verbosity", "the length is up to the model and max_tokens"),
            ("web_search_options", "nothing leaves this machine"),
        ] {
            f.only_if(key, why, |_| false)?;
        }
        f.finish()?;
        Ok(Self {
            model,
            messages,
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias,
            max_tokens: s.max_tokens,
            max_completion_tokens,
            stop: s.stop,
            seed: s.seed,
            stream,
            stream_options,
            n,
            user,
            safety_identifier,
            priority,
            logprobs: false,
        })
    }

    /// How its tokens are chosen.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            max_tokens: self.max_completion_tokens.or(self.max_tokens),
            stop: self.stop.clone(),
            logprobs: self.logprobs,
        }
    }
}

impl CompletionRequest {
    /// A request with every default; unlike over the wire, `max_tokens` is then
    /// the rest of the context.
    pub fn new(model: impl Into<String>, prompt: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            prompt: Prompt::Text(prompt.into()),
            ..Self::default()
        }
    }

    /// Reads a request body.
    ///
    /// # Errors
    /// 400 naming line and column of malformed JSON, or the field at fault.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut f = Fields::parse(body)?;
        let model = model(&mut f)?;
        let prompt = prompt(f.required("prompt")?)?;
        let s = sampling(&mut f)?;
        let (stream, stream_options) = streaming(&mut f)?;
        let n = single(&mut f, "n")?;
        single(&mut f, "best_of")?;
        let user = f.string("user")?;
        f.string("safety_identifier")?;
        let priority = priority(&mut f)?;
        harmless(&mut f)?;
        f.only_if("echo", "the prompt is not sent back", |v| v == false)?;
        f.only_if("logprobs", "log-probabilities are not served", |_| false)?;
        f.only_if("suffix", "only plain continuation is served", |v| v == "")?;
        f.finish()?;
        Ok(Self {
            model,
            prompt,
            temperature: s.temperature,
            top_p: s.top_p,
            top_k: s.top_k,
            min_p: s.min_p,
            repetition_penalty: s.repetition_penalty,
            presence_penalty: s.presence_penalty,
            frequency_penalty: s.frequency_penalty,
            logit_bias: s.logit_bias,
            max_tokens: Some(s.max_tokens.unwrap_or(16)),
            stop: s.stop,
            seed: s.seed,
            stream,
            stream_options,
            n,
            user,
            priority,
            logprobs: false,
        })
    }

    /// How its tokens are chosen.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            logprobs: self.logprobs,
        }
    }
}

fn model(f: &mut Fields) -> Result<String, ApiError> {
    match f.required("model")? {
        Value::String(s) if s.is_empty() => Err(invalid("model", "model is empty".into())),
        Value::String(s) => Ok(s),
        other => Err(wrong_type("model", "a string", &other)),
    }
}

fn sampling(f: &mut Fields) -> Result<Sampling, ApiError> {
    Ok(Sampling {
        temperature: f.number("temperature", 0.0, 2.0)?,
        top_p: f.number("top_p", 0.0, 1.0)?,
        // −1 is vLLM's spelling of "all".
        top_k: f
            .integer("top_k", -1, i64::from(u32::MAX))?
            .map(|k| u32::try_from(k).unwrap_or(0)),
        min_p: f.number("min_p", 0.0, 1.0)?,
        repetition_penalty: f.number("repetition_penalty", 0.01, 10.0)?,
        presence_penalty: f.number("presence_penalty", -2.0, 2.0)?,
        frequency_penalty: f.number("frequency_penalty", -2.0, 2.0)?,
        logit_bias: logit_bias(f)?,
        seed: f.integer("seed", i64::MIN, i64::MAX)?,
        max_tokens: f.count("max_tokens", 1)?,
        stop: stop(f)?,
        logprobs: false,
    })
}

fn logit_bias(f: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = f.take("logit_bias") else {
        return Ok(Vec::new());
    };
    let Value::Object(map) = value else {
        return Err(wrong_type("logit_bias", "an object", &value));
    };
    if map.len() > MAX_BIASES {
        return Err(invalid(
            "logit_bias",
            format!("logit_bias has {} entries, at most {MAX_BIASES}", map.len()),
        ));
    }
    map.iter()
        .map(|(key, value)| {
            let name = format!("logit_bias.{}", brief(key));
            let id = key
                .parse::<u32>()
                .map_err(|_| invalid(&name, format!("{name}: the key must be a token id")))?;
            match value.as_f64() {
                Some(b) if (-100.0..=100.0).contains(&b) => Ok((id, b as f32)),
                Some(b) => Err(invalid(
                    &name,
                    format!("{name} must be between -100 and 100, got {b}"),
                )),
                None => Err(wrong_type(&name, "a number", value)),
            }
        })
        .collect()
}

fn stop(f: &mut Fields) -> Result<Vec<String>, ApiError> {
    let list = match f.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(one @ Value::String(_)) => vec![one],
        Some(other) => {
            return Err(wrong_type(
                "stop",
                "a string or an array of strings",
                &other,
            ));
        }
    };
    if list.len() > MAX_STOPS {
        return Err(invalid(
            "stop",
            format!("stop has {} strings, at most {MAX_STOPS}", list.len()),
        ));
    }
    list.into_iter()
        .enumerate()
        .map(|(i, v)| {
            let name = format!("stop[{i}]");
            match v {
                Value::String(s) if s.is_empty() => Err(invalid(&name, format!("{name} is empty"))),
                Value::String(s) if s.len() > MAX_STOP_BYTES => Err(invalid(
                    &name,
                    format!("{name} has {} bytes, at most {MAX_STOP_BYTES}", s.len()),
                )),
                Value::String(s) => Ok(s),
                other => Err(wrong_type(&name, "a string", &other)),
            }
        })
        .collect()
}

fn streaming(f: &mut Fields) -> Result<(bool, Option<StreamOptions>), ApiError> {
    let stream = f.bool("stream")?.unwrap_or(false);
    let Some(value) = f.take("stream_options") else {
        return Ok((stream, None));
    };
    let mut inner = Fields::nested("stream_options", value)?;
    let include_usage = inner.bool("include_usage")?.unwrap_or(false);
    inner.only_if("include_obfuscation", "chunks are not padded", |v| {
        v == false
    })?;
    inner.finish()?;
    if !stream {
        return Err(invalid(
            "stream_options",
            "stream_options is only allowed when stream is true".into(),
        ));
    }
    Ok((stream, Some(StreamOptions { include_usage })))
}

fn priority(f: &mut Fields) -> Result<Option<i32>, ApiError> {
    let value = f.integer("priority", i32::MIN.into(), i32::MAX.into())?;
    Ok(value.and_then(|p| i32::try_from(p).ok()))
}

/// `n` and `best_of`: 1 or absent.
fn single(f: &mut Fields, key: &str) -> Result<Option<u32>, ApiError> {
    match f.count(key, 1)? {
        Some(n) if n > 1 => Err(unsupported(
            key,
            &format!("one answer a request, {key} is {n}"),
        )),
        n => Ok(n),
    }
}

/// Fields that change nothing here, checked for type all the same.
fn harmless(f: &mut Fields) -> Result<(), ApiError> {
    if let Some(v) = f.take("metadata")
        && !v
            .as_object()
            .is_some_and(|m| m.values().all(Value::is_string))
    {
        return Err(wrong_type("metadata", "an object of strings", &v));
    }
    f.string("prompt_cache_key")?;
    f.only_if("store", "answers are kept in the ledger alone", |v| {
        v == false
    })?;
    f.only_if("service_tier", "only \"auto\" and \"default\" are", |v| {
        v == "auto" || v == "default"
    })
}

fn messages(value: Value) -> Result<Vec<ChatMessage>, ApiError> {
    let Value::Array(list) = value else {
        return Err(wrong_type("messages", "an array", &value));
    };
    if list.is_empty() {
        return Err(invalid(
            "messages",
            "messages is empty, at least one is needed".into(),
        ));
    }
    list.into_iter()
        .enumerate()
        .map(|(i, m)| message(&format!("messages[{i}]"), m))
        .collect()
}

fn message(path: &str, value: Value) -> Result<ChatMessage, ApiError> {
    let mut f = Fields::nested(path, value)?;
    let role = match f.required("role")? {
        Value::String(s) => s,
        other => return Err(wrong_type(&f.name("role"), "a string", &other)),
    };
    let role = match role.as_str() {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => {
            return Err(unsupported(&f.name("role"), "tool calls are not served"));
        }
        other => {
            return Err(invalid(
                &f.name("role"),
                format!(
                    "{path}.role must be system, developer, user or assistant, got {:?}",
                    brief(other)
                ),
            ));
        }
    };
    f.only_if("tool_calls", "tool calls are not served", |v| {
        v.as_array().is_some_and(Vec::is_empty)
    })?;
    for (key, why) in [
        ("name", "the chat template has no place for it"),
        ("refusal", "put it into content"),
        ("tool_call_id", "tool calls are not served"),
        ("function_call", "tool calls are not served"),
        ("audio", "only text is served"),
        ("reasoning_content", "no reasoning models are served"),
    ] {
        f.only_if(key, why, |_| false)?;
    }
    // What clients echo back from an earlier answer.
    f.only_if("annotations", "only text is served", |v| {
        v.as_array().is_some_and(Vec::is_empty)
    })?;
    let content = content(&f.name("content"), f.required("content")?)?;
    f.finish()?;
    Ok(ChatMessage {
        role: role.into(),
        content,
    })
}

fn content(path: &str, value: Value) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(s) => return Ok(s),
        Value::Array(parts) => parts,
        other => {
            return Err(wrong_type(
                path,
                "a string or an array of text parts",
                &other,
            ));
        }
    };
    if parts.is_empty() {
        return Err(invalid(path, format!("{path} has no parts")));
    }
    let mut text = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut f = Fields::nested(&format!("{path}[{i}]"), part)?;
        match f.required("type")? {
            Value::String(t) if t == "text" => {}
            Value::String(t) => {
                return Err(unsupported(
                    &f.name("type"),
                    &format!("only text parts are, got {:?}", brief(&t)),
                ));
            }
            other => return Err(wrong_type(&f.name("type"), "a string", &other)),
        }
        match f.required("text")? {
            Value::String(s) => text.push_str(&s),
            other => return Err(wrong_type(&f.name("text"), "a string", &other)),
        }
        f.finish()?;
    }
    Ok(text)
}

fn prompt(value: Value) -> Result<Prompt, ApiError> {
    let list = match value {
        Value::String(s) => return Ok(Prompt::Text(s)),
        Value::Array(list) => list,
        other => {
            return Err(wrong_type(
                "prompt",
                "a string, token ids, or an array holding one of either",
                &other,
            ));
        }
    };
    match list.as_slice() {
        [] => Err(invalid("prompt", "prompt is empty".into())),
        [Value::String(s)] => Ok(Prompt::Text(s.clone())),
        [Value::Array(ids)] if !ids.is_empty() => token_ids("prompt[0]", ids),
        [Value::Number(_), ..] => token_ids("prompt", &list),
        [_, _, ..] => Err(unsupported(
            "prompt",
            &format!("one prompt a request, got {}", list.len()),
        )),
        [other] => Err(wrong_type("prompt[0]", "a string or token ids", other)),
    }
}

fn token_ids(path: &str, ids: &[Value]) -> Result<Prompt, ApiError> {
    ids.iter()
        .enumerate()
        .map(|(i, v)| {
            v.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| wrong_type(&format!("{path}[{i}]"), "a token id", v))
        })
        .collect::<Result<_, _>>()
        .map(Prompt::Tokens)
}

#[cfg(test)]
mod tests;
