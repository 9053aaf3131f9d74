//! The tokenizer and chat template inside a GGUF file, or beside a checkpoint in
//! Hugging Face's layout.

use crate::EngineError;
use ashlar_model::formats::{Gguf, Value};
use ashlar_text::{ChatTemplate, GgufVocab, Tokenizer};
use serde_json::Value as Json;
use std::path::Path;

/// Builds the tokenizer and chat template a GGUF file describes.
///
/// # Errors
/// [`EngineError::Metadata`] for a missing key or one of another type,
/// [`EngineError::Text`] for a tokenizer or template that is not supported.
pub fn vocab(gguf: &Gguf<'_>) -> Result<(Tokenizer, ChatTemplate), EngineError> {
    let tokens = gguf.meta("tokenizer.ggml.tokens").and_then(Value::as_array);
    let spelling = |key| {
        special(gguf, key)
            .and_then(|id| tokens?.get(id as usize)?.as_str())
            .unwrap_or_default()
    };
    let source = text(gguf, "tokenizer.chat_template")?;
    let (bos, eos) = (spelling(BOS), spelling(EOS));
    let template = ChatTemplate::new(&source, bos, eos)?;
    Ok((tokenizer(gguf)?, template))
}

/// Builds the tokenizer and chat template of a folder in Hugging Face's layout:
/// `tokenizer.json`, `tokenizer_config.json` and, where the template is a file
/// of its own, `chat_template.jinja`.
///
/// # Errors
/// [`EngineError::Io`] for a file that cannot be read, and as [`vocab`].
pub fn folder(path: &Path) -> Result<(Tokenizer, ChatTemplate), EngineError> {
    let read = |name: &str| {
        let path = path.join(name);
        std::fs::read(&path).map_err(|source| EngineError::Io { path, source })
    };
    let tokenizer = Tokenizer::from_json(&read("tokenizer.json")?)?;
    let config = serde_json::from_slice::<Json>(&read("tokenizer_config.json")?);
    let config = config.map_err(|_| EngineError::Metadata {
        key: "tokenizer_config.json",
        wanted: "JSON",
    })?;
    let token = |key: &str| {
        let token = &config[key];
        token.as_str().or(token["content"].as_str()).unwrap_or_default()
    };
    let (bos, eos) = (token("bos_token"), token("eos_token"));
    let own = path.join("chat_template.jinja");
    let template = &config["chat_template"];
    // Several templates are a list; one of them is called "default".
    let named = template.as_array().and_then(|l| l.iter().find(|t| t["name"] == "default"));
    let source = match own.exists() {
        true => String::from_utf8(read("chat_template.jinja")?).ok(),
        false => template.as_str().or(named.and_then(|t| t["template"].as_str())).map(str::to_owned),
    };
    let source = source.ok_or(EngineError::Metadata {
        key: "chat_template",
        wanted: "a string",
    })?;
    let eos_id = tokenizer.token_id(eos);
    let template = ChatTemplate::new(&source, bos, eos)?;
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
