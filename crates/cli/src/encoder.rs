//! Opens an encoder for the gateway, which knows it as a function.

use anyhow::{Context, Result, ensure};
use ashlar_api::ApiError;
use ashlar_core::Hasher;
use ashlar_gateway::{Embed, EncoderId, EncoderInfo, EncoderSettings};
use ashlar_model::Encoder;
use ashlar_text::Tokenizer;
use std::{fs, path::Path, sync::Arc};

/// Tokens computed at once; a page of texts is cut into parts of this size.
const BATCH_TOKENS: usize = 4096;
/// Bytes of a text looked at first for each token that fits, so that a large prompt
/// is not tokenized whole for its beginning.
const BYTES_PER_TOKEN: usize = 16;

/// The encoder in a folder with `config.json`, safetensors and `tokenizer.json`.
pub(crate) fn open(settings: &EncoderSettings) -> Result<(Embed, EncoderInfo)> {
    let path = &settings.path;
    let file = path.join("tokenizer.json");
    let json = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let tokenizer = Arc::new(Tokenizer::from_json(&json).with_context(|| file.display().to_string())?);
    let encoder = Encoder::load(path).with_context(|| format!("cannot open the encoder {}", path.display()))?;
    let config = encoder.config();
    let (context, dimensions) = (config.context, config.hidden);
    let folder = || path.file_name().map_or_else(|| "encoder".into(), |n| n.to_string_lossy().into_owned());
    let id = EncoderId { name: settings.name.clone().unwrap_or_else(folder), digest: digest(path, &json)?, dimensions };
    let words = tokenizer.clone();
    let tokens = move |text: &str| {
        words.encode_framed(text).map_err(|e| ApiError::bad_request(e.to_string(), Some("input"), None))
    };
    let info = EncoderInfo { id, context: u32::try_from(context)?, truncatable: settings.truncatable, tokens: Arc::new(tokens) };
    let embed = move |texts: &[&str]| {
        let mut ids = Vec::with_capacity(texts.len());
        for text in texts {
            let bad = |e: ashlar_text::TextError| ApiError::bad_request(e.to_string(), Some("input"), None);
            let beginning = &text[..text.floor_char_boundary(context * BYTES_PER_TOKEN)];
            let mut of = tokenizer.encode_framed(beginning).map_err(bad)?;
            if of.len() < context && beginning.len() < text.len() {
                of = tokenizer.encode_framed(text).map_err(bad)?;
            }
            if of.len() > context {
                // The last token closes the frame.
                let last = of.last().copied();
                of.truncate(context - 1);
                of.extend(last);
            }
            ids.push(of);
        }
        let mut rows = Vec::with_capacity(ids.len());
        let mut rest = &ids[..];
        while !rest.is_empty() {
            let mut total = 0;
            let fits = |t: &&Vec<u32>| {
                total += t.len();
                total <= BATCH_TOKENS
            };
            let (part, after) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            let part: Vec<&[u32]> = part.iter().map(Vec::as_slice).collect();
            rows.extend(encoder.embed(&part).map_err(|e| ApiError::bad_request(e.to_string(), Some("input"), None))?);
            rest = after;
        }
        Ok(rows)
    };
    Ok((Arc::new(embed), info))
}

/// Of all that vectors come from: tokenizer, configuration, how tokens are pooled,
/// and the weights' files in the order of their names.
fn digest(path: &Path, tokenizer: &[u8]) -> Result<ashlar_core::Digest> {
    let mut files = fs::read_dir(path)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    ensure!(!files.is_empty(), "{} holds no safetensors file", path.display());
    let settings = ["config.json", "1_Pooling/config.json"].map(|name| path.join(name));
    files.splice(0..0, settings.into_iter().filter(|f| f.exists()));
    let mut hasher = Hasher::new();
    hasher.update(tokenizer);
    for file in files {
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        hasher.update(&bytes);
    }
    Ok(hasher.finish())
}
