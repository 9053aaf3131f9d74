//! Tokenizers, from `tokenizer.json` or from GGUF metadata: byte-level BPE,
//! SentencePiece's BPE, WordPiece (`tokenizer.json` only).
//!
//! Encoding is by hand for GGUF ([`crate::bpe`]), the `tokenizers` crate's for
//! `tokenizer.json`. Decoding is a table of each token's
//! bytes, so that a stream and a whole decode alike and an added token is its
//! literal text. Rejected: that crate's decoders, which map added tokens through
//! the byte alphabet and whose stream can differ from the whole.

use crate::{
    GgufVocab, TextError,
    bpe::{Bpe, Part, SPACE, Scratch},
    bytes::spell,
    error::clip,
    table::{Table, byte_of_piece},
};
use serde_json::Value;
use std::{ops::Range, sync::Arc};

/// Text to tokens and back. Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    model: Arc<Model>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

struct Model {
    encoder: Encoder,
    table: Table,
}

enum Encoder {
    Bpe(Box<Bpe>),
    /// Whatever else a `tokenizer.json` asks for.
    Json {
        /// Recognises control tokens in the text.
        parsing: Box<tokenizers::Tokenizer>,
        /// Reads them as plain text.
        plain: Box<tokenizers::Tokenizer>,
    },
}

impl Tokenizer {
    /// Reads Hugging Face's `tokenizer.json`. Truncation and padding that it
    /// may ask for are left out: nothing is cut silently. The end-of-sequence
    /// token is not in that file; see [`Tokenizer::with_eos`].
    ///
    /// # Errors
    /// [`TextError`] for a file that does not parse, or is neither byte-level,
    /// SentencePiece's nor WordPiece. WordPiece forgets spacing: each word comes back with a
    /// space before it.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TextError> {
        let tokenizer = parse(bytes)?;
        let byte_level = |v: &Value| v["type"] == "ByteLevel";
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or(Value::Null);
        let nested = decoder["decoders"].as_array();
        let word_piece = decoder["type"] == "WordPiece" && decoder["prefix"] == "##";
        let sentence_piece = nested.is_some_and(|d| {
            let plain = |v: &Value| match v["type"].as_str() {
                Some("Replace") => v["pattern"]["String"] == "▁" && v["content"] == " ",
                Some("ByteFallback" | "Fuse" | "Strip") => true,
                _ => false,
            };
            d.iter().any(|v| v["type"] == "ByteFallback") && d.iter().all(plain)
        });
        let byte_level = byte_level(&decoder) || nested.is_some_and(|d| d.iter().all(byte_level));
        if !word_piece && !sentence_piece && !byte_level {
            return Err(TextError::Unsupported {
                what: "tokenizer.json decoder",
                found: clip(decoder["type"].as_str().unwrap_or("none")),
                known: "ByteLevel, WordPiece and SentencePiece's",
            });
        }
        let mut table = Table::default();
        let added = tokenizer.get_added_tokens_decoder();
        let mut vocab: Vec<_> = tokenizer
            .get_vocab(true)
            .into_iter()
            .map(|(token, id)| (id, token))
            .collect();
        vocab.sort_unstable();
        for (id, token) in vocab {
            // Ids come from the file: a far one must not fill the table.
            if table.len().abs_diff(id as usize) > 1 << 16 {
                return Err(TextError::Vocabulary(format!(
                    "token {:?} has id {id}, with {} ids below it",
                    clip(&token),
                    table.len()
                )));
            }
            while table.len() < id as usize {
                table.push(&[], false);
            }
            if table.len() > id as usize {
                return Err(TextError::Vocabulary(format!(
                    "token {:?} has id {id}, which is taken",
                    clip(&token)
                )));
            }
            match added.get(&id) {
                Some(a) => table.push(a.content.as_bytes(), a.special),
                None if word_piece => match token.strip_prefix("##") {
                    Some(rest) => table.push(rest.as_bytes(), false),
                    None => table.push(format!(" {token}").as_bytes(), false),
                },
                None if sentence_piece => match byte_of_piece(&token) {
                    Some(byte) => table.push(&[byte], false),
                    None => table.push(token.replace(SPACE, " ").as_bytes(), false),
                },
                None => table.extend(false, |bytes| spell(&token, bytes)),
            }
        }
        let first = tokenizer
            .encode_fast("", true)
            .ok()
            .and_then(|e| e.get_ids().first().copied());
        let mut plain = tokenizer.clone();
        plain.set_encode_special_tokens(true);
        let encoder = Encoder::Json {
            parsing: Box::new(tokenizer),
            plain: Box::new(plain),
        };
        Ok(Self::assemble(Model { encoder, table }, first, None, first.is_some()))
    }

    /// Builds the tokenizer a GGUF file describes. Pre-tokenizers are
    /// llama.cpp's, by name.
    ///
    /// # Errors
    /// [`TextError`] for a model or pre-tokenizer that is not supported, or a
    /// vocabulary that contradicts itself.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TextError> {
        let (bpe, table) = vocab.build()?;
        let encoder = Encoder::Bpe(Box::new(bpe));
        Ok(Self::assemble(Model { encoder, table }, vocab.bos, vocab.eos, vocab.add_bos))
    }

    fn assemble(model: Model, bos: Option<u32>, eos: Option<u32>, add_bos: bool) -> Self {
        Self(Arc::new(Inner {
            model: Arc::new(model),
            bos,
            eos,
            add_bos,
        }))
    }

    /// The tokens of `text`, none added. With `special`, the text of a control
    /// token becomes that token; without, no control token can come out.
    ///
    /// # Errors
    /// [`TextError::Encode`] when the tokenizer fails, [`TextError::Control`]
    /// when its merges spell a control token out of plain text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TextError> {
        let ids = match &self.0.model.encoder {
            Encoder::Bpe(bpe) => {
                fits(text)?;
                bpe.encode(text, special)
            }
            Encoder::Json { parsing, plain } => ids(if special { parsing } else { plain }, text, false)?,
        };
        if !special && let Some(&id) = ids.iter().find(|&&id| self.is_control(id)) {
            return Err(TextError::Control {
                token: clip(&self.decode(&[id], false)),
            });
        }
        Ok(ids)
    }

    /// The tokens of `text` with those that the file's post-processor puts
    /// around it, as encoders of sentences want them. No control token can come
    /// out of the text itself.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_framed(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let ids = self.encode(text, false)?;
        match &self.0.model.encoder {
            Encoder::Bpe(_) => Ok(ids),
            Encoder::Json { plain, .. } => self::ids(plain, text, true),
        }
    }

    /// Where control tokens stand in `text`: their bytes and ids.
    pub(crate) fn controls(&self, text: &str) -> Result<Vec<(Range<usize>, u32)>, TextError> {
        let mut found = Vec::new();
        match &self.0.model.encoder {
            Encoder::Bpe(bpe) => {
                fits(text)?;
                let (mut scratch, mut ids) = (Scratch::default(), Vec::new());
                bpe.parts(text, true, |part| match part {
                    Part::Token(id, range) => found.push((range, id)),
                    // Merges may spell a control token too.
                    Part::Plain(range) => {
                        bpe.plain(&text[range.clone()], &mut scratch, &mut ids);
                        let mut at = range.start;
                        for id in ids.drain(..) {
                            let end = (at + bpe.text_len(id)).min(range.end);
                            found.push((at..end, id));
                            at = end;
                        }
                    }
                });
            }
            Encoder::Json { parsing, .. } => {
                let encoding = parsing.encode(text, false).map_err(|e| failed(text, &*e))?;
                let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end);
                found.extend(offsets.zip(encoding.get_ids().iter().copied()));
            }
        }
        found.retain(|(_, id)| self.is_control(*id));
        Ok(found)
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside
    /// the vocabulary nothing. With `skip_special`, control tokens are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_control(id)) {
                bytes.extend_from_slice(self.0.model.table.piece(id));
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes `id` stands for; none outside the vocabulary.
    pub fn piece(&self, id: u32) -> &[u8] {
        self.0.model.table.piece(id)
    }

    /// Whether `id` is a control token, which no text of a user may become.
    pub fn is_control(&self, id: u32) -> bool {
        self.0.model.table.is_control(id)
    }

    /// Number of ids: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.0.model.table.len()
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.0.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.0.eos
    }

    /// Whether raw prompts begin with [`Tokenizer::bos`]. `encode` never adds
    /// it; a chat template writes its own.
    pub fn add_bos(&self) -> bool {
        self.0.add_bos
    }

    /// The same tokenizer with another end-of-sequence token.
    #[must_use]
    pub fn with_eos(&self, eos: Option<u32>) -> Self {
        Self(Arc::new(Inner {
            model: Arc::clone(&self.0.model),
            eos,
            ..*self.0
        }))
    }

    /// The id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.0.model.encoder {
            Encoder::Bpe(bpe) => bpe.vocab.id(token.as_bytes()),
            Encoder::Json { parsing, .. } => parsing.token_to_id(token),
        }
    }

    /// Decodes a stream of tokens; the pieces joined are
    /// `decode(all, skip_special = true)`.
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder {
            tokenizer: self.clone(),
            pending: Vec::new(),
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

/// Turns tokens into text as they come, never splitting a character.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The beginning of a character whose end has not come.
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// Takes the next token; returns the text that is complete, if any.
    pub fn push(&mut self, token: u32) -> Option<String> {
        if self.tokenizer.is_control(token) {
            return None;
        }
        self.pending.extend_from_slice(self.tokenizer.piece(token));
        let mut complete = 0;
        while let Err(e) = std::str::from_utf8(&self.pending[complete..]) {
            match e.error_len() {
                Some(bad) => complete += e.valid_up_to() + bad,
                None => {
                    complete += e.valid_up_to();
                    let tail = self.pending.split_off(complete);
                    return text(std::mem::replace(&mut self.pending, tail));
                }
            }
        }
        text(std::mem::take(&mut self.pending))
    }

    /// Ends the stream: a character left incomplete becomes U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        text(std::mem::take(&mut self.pending))
    }
}

fn text(bytes: Vec<u8>) -> Option<String> {
    let text = String::from_utf8_lossy(&bytes).into_owned();
    (!text.is_empty()).then_some(text)
}

/// The tokens of `text` by the `tokenizers` crate.
fn ids(tokenizer: &tokenizers::Tokenizer, text: &str, framed: bool) -> Result<Vec<u32>, TextError> {
    let encoding = tokenizer.encode_fast(text, framed);
    Ok(encoding.map_err(|e| failed(text, &*e))?.get_ids().to_vec())
}

/// Positions in a text are kept in 32 bits.
fn fits(text: &str) -> Result<(), TextError> {
    match u32::try_from(text.len()).is_ok_and(|n| n < u32::MAX - 1) {
        true => Ok(()),
        false => Err(failed(text, &"one text is at most 4 GiB")),
    }
}

fn failed(text: &str, why: &dyn std::fmt::Display) -> TextError {
    TextError::Encode {
        bytes: text.len(),
        why: clip(&why.to_string()),
    }
}

fn parse(bytes: &[u8]) -> Result<tokenizers::Tokenizer, TextError> {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
        .map_err(|e| TextError::Vocabulary(clip(&e.to_string())))?;
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|e| TextError::Vocabulary(clip(&e.to_string())))?;
    Ok(tokenizer)
}
