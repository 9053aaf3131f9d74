//! The tokenizer and chat template inside a GGUF file.

use crate::EngineError;
use ashlar_model::formats::{Gguf, Value};
use ashlar_text::{ChatTemplate, GgufVocab, Tokenizer};

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
