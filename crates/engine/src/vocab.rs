//! The tokenizer and chat template inside a GGUF file, or beside a checkpoint in
//! Hugging Face's layout.

use crate::EngineError;
use ashlar_model::formats::{Gguf, Value};
use ashlar_text::{ChatTemplate, GgufVocab, Tokenizer};
use serde_json::Value as Json;
use std::path::Path;

/// Builds the tokenizer and chat template a GGUF file describes; `template` takes
/// the place of the file's own. A base model has none.
///
/// # Errors
/// [`EngineError::Metadata`] for a missing key or one of another type,
/// [`EngineError::Text`] for a tokenizer or template that is not supported.
pub fn vocab(gguf: &Gguf<'_>, template: Option<&str>) -> Result<(Tokenizer, Option<ChatTemplate>), EngineError> {
    let tokens = gguf.meta("tokenizer.ggml.tokens").and_then(Value::as_array);
    let spelling = |key| {
        special(gguf, key)
            .and_then(|id| tokens?.get(id as usize)?.as_str())
            .unwrap_or_default()
    };
    let key = "tokenizer.chat_template";
    let own = gguf.meta(key).is_some().then(|| text(gguf, key)).transpose()?;
    let template = compiled(template.or(own.as_deref()), spelling(BOS), spelling(EOS))?;
    Ok((tokenizer(gguf)?, template))
}

fn compiled(source: Option<&str>, bos: &str, eos: &str) -> Result<Option<ChatTemplate>, EngineError> {
    Ok(source.map(|source| ChatTemplate::new(source, bos, eos)).transpose()?)
}

/// Builds the tokenizer and chat template of a folder in Hugging Face's layout:
/// `tokenizer.json`, `tokenizer_config.json` and, where the template is a file
/// of its own, `chat_template.jinja`; `template` takes its place.
///
/// # Errors
/// [`EngineError::Io`] for a file that cannot be read, and as [`vocab`].
pub fn folder(path: &Path, template: Option<&str>) -> Result<(Tokenizer, Option<ChatTemplate>), EngineError> {
    let read = |name: &str| {
        let path = path.join(name);
        std::fs::read(&path).map_err(|source| EngineError::Io { path, source })
    };
    let wrong = |key, wanted| EngineError::Metadata { key, wanted };
    let tokenizer = Tokenizer::from_json(&read("tokenizer.json")?)?;
    let config = serde_json::from_slice::<Json>(&read("tokenizer_config.json")?);
    let config = config.map_err(|_| wrong("tokenizer_config.json", "JSON"))?;
    let token = |key: &str| {
        let token = &config[key];
        token.as_str().or(token["content"].as_str()).unwrap_or_default()
    };
    let (bos, eos) = (token("bos_token"), token("eos_token"));
    let set = &config["chat_template"];
    // Several templates are a list; one of them is called "default".
    let named = set.as_array().and_then(|l| l.iter().find(|t| t["name"] == "default"));
    let own = match path.join("chat_template.jinja").exists() {
        true => String::from_utf8(read("chat_template.jinja")?).ok(),
        false => set.as_str().or(named.and_then(|t| t["template"].as_str())).map(str::to_owned),
    };
    if own.is_none() && !set.is_null() {
        return Err(wrong("chat_template", "a string"));
    }
    let eos_id = tokenizer.token_id(eos);
    let template = compiled(template.or(own.as_deref()), bos, eos)?;
    Ok((tokenizer.with_eos(eos_id), template))
}

const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";

/// Builds the tokenizer alone, for models without a chat template.
///
/// # Errors
/// As [`vocab`].
pub fn tokenizer(gguf: &Gguf<'_>) -> Result<Tokenizer, EngineError> {
    let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
    let model = text(gguf, "tokenizer.ggml.model")?;
    let key = "tokenizer.ggml.token_type";
    let token_types = match gguf.meta(key).and_then(Value::as_array) {
        None => Vec::new(),
        Some(list) => list
            .iter()
            .map(|v| v.as_i64().and_then(|i| i32::try_from(i).ok()))
            .collect::<Option<_>>()
            .ok_or(EngineError::Metadata {
                key,
                wanted: "an array of 32-bit integers",
            })?,
    };
    let scores = match gguf.meta("tokenizer.ggml.scores").and_then(Value::as_array) {
        None => Vec::new(),
        Some(list) => list
            .iter()
            .map(Value::as_f32)
            .collect::<Option<_>>()
            .ok_or(EngineError::Metadata {
                key: "tokenizer.ggml.scores",
                wanted: "an array of floats",
            })?,
    };
    let merges = match gguf.meta("tokenizer.ggml.merges") {
        None => Vec::new(),
        Some(_) => strings(gguf, "tokenizer.ggml.merges")?,
    };
    let pre = gguf.meta("tokenizer.ggml.pre").and_then(Value::as_str);
    let add_bos = gguf
        .meta("tokenizer.ggml.add_bos_token")
        .and_then(Value::as_bool);
    let add_space_prefix = gguf
        .meta("tokenizer.ggml.add_space_prefix")
        .and_then(Value::as_bool);
    Ok(Tokenizer::from_gguf(GgufVocab {
        model,
        pre: pre.unwrap_or_default().to_owned(),
        tokens,
        token_types,
        scores,
        add_space_prefix,
        unknown: special(gguf, "tokenizer.ggml.unknown_token_id"),
        merges,
        bos: special(gguf, BOS),
        eos: special(gguf, EOS),
        add_bos: add_bos.unwrap_or(false),
    })?)
}

fn special(gguf: &Gguf<'_>, key: &str) -> Option<u32> {
    let id = gguf.meta(key).and_then(Value::as_u64);
    id.and_then(|id| u32::try_from(id).ok())
}

fn text(gguf: &Gguf<'_>, key: &'static str) -> Result<String, EngineError> {
    let text = gguf.meta(key).and_then(Value::as_str);
    text.map(str::to_owned).ok_or(EngineError::Metadata {
        key,
        wanted: "a string",
    })
}

fn strings(gguf: &Gguf<'_>, key: &'static str) -> Result<Vec<String>, EngineError> {
    gguf.meta(key)
        .and_then(Value::as_array)
        .and_then(|list| {
            list.iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<_>>()
        })
        .ok_or(EngineError::Metadata {
            key,
            wanted: "an array of strings",
        })
}
