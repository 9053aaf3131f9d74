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
    let text = |key, value: Option<&Value>| {
        value
            .and_then(Value::as_str)
            .map(str::to_owned)
            .ok_or(EngineError::Metadata {
                key,
                wanted: "a string",
            })
    };
    let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
    let special = |key| {
        gguf.meta(key)
            .and_then(Value::as_u64)
            .and_then(|id| u32::try_from(id).ok())
    };
    let bos = special("tokenizer.ggml.bos_token_id");
    let eos = special("tokenizer.ggml.eos_token_id");
    let spelling = |id: Option<u32>| {
        id.and_then(|id| tokens.get(id as usize))
            .cloned()
            .unwrap_or_default()
    };
    let key = "tokenizer.chat_template";
    let source = text(key, gguf.meta(key))?;
    let template = ChatTemplate::new(&source, &spelling(bos), &spelling(eos))?;
    let key = "tokenizer.ggml.model";
    let model = text(key, gguf.meta(key))?;
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
    let merges = match gguf.meta("tokenizer.ggml.merges") {
        None => Vec::new(),
        Some(_) => strings(gguf, "tokenizer.ggml.merges")?,
    };
    let pre = gguf.meta("tokenizer.ggml.pre").and_then(Value::as_str);
    let add_bos = gguf
        .meta("tokenizer.ggml.add_bos_token")
        .and_then(Value::as_bool);
    let tokenizer = Tokenizer::from_gguf(GgufVocab {
        model,
        pre: pre.unwrap_or_default().to_owned(),
        tokens,
        token_types,
        merges,
        bos,
        eos,
        add_bos: add_bos.unwrap_or(false),
    })?;
    Ok((tokenizer, template))
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
