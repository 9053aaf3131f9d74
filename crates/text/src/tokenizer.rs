//! Tokenizers, from `tokenizer.json` or from GGUF metadata: byte-level BPE,
//! SentencePiece's BPE, WordPiece (`tokenizer.json` only).
//!
//! Encoding is the `tokenizers` crate's. Decoding is a table of each token's
//! bytes, so that a stream and a whole decode alike and an added token is its
//! literal text. Rejected: that crate's decoders, which map added tokens through
//! the byte alphabet and whose stream can differ from the whole.

use crate::{TextError, bytes::spell, error::clip};
use serde_json::{Value, json};
use std::{collections::HashMap, ops::Range, sync::Arc};

/// What a GGUF file says about its tokenizer.
#[derive(Debug, Clone, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`, e.g. `gpt2`.
    pub model: String,
    /// `tokenizer.ggml.pre`, e.g. `smollm`; empty where absent.
    pub pre: String,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, one for each token or none at all.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`, one for each token; SentencePiece alone has them.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.add_space_prefix`: whether text is read as if a space
    /// stood before it. SentencePiece alone has it; `None` is yes there.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.merges`: left and right part with a space between.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: bool,
}

/// Text to tokens and back. Clones share the vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    /// Recognises control tokens in the text.
    parsing: tokenizers::Tokenizer,
    /// Reads them as plain text.
    plain: tokenizers::Tokenizer,
    table: Table,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
}

/// The bytes of each token, one after the other.
#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    control: Vec<bool>,
}

impl Table {
    fn push(&mut self, piece: &[u8], control: bool) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(self.bytes.len());
        self.control.push(control);
    }

    /// The bytes of `id`; none for an id outside the vocabulary.
    fn piece(&self, id: u32) -> &[u8] {
        let i = id as usize;
        let start = i.checked_sub(1).and_then(|i| self.ends.get(i)).copied();
        match self.ends.get(i) {
            Some(&end) => &self.bytes[start.unwrap_or(0)..end],
            None => &[],
        }
    }

    fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).is_some_and(|&c| c)
    }
}

// `tokenizer.ggml.token_type`.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// SentencePiece's space, U+2581.
const SPACE: char = '▁';

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
            if table.ends.len().abs_diff(id as usize) > 1 << 16 {
                return Err(TextError::Vocabulary(format!(
                    "token {:?} has id {id}, with {} ids below it",
                    clip(&token),
                    table.ends.len()
                )));
            }
            while table.ends.len() < id as usize {
                table.push(&[], false);
            }
            if table.ends.len() > id as usize {
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
                None => table.push(&spell(&token), false),
            }
        }
        let first = tokenizer
            .encode_fast("", true)
            .ok()
            .and_then(|e| e.get_ids().first().copied());
        Ok(Self::assemble(
            tokenizer,
            table,
            first,
            None,
            first.is_some(),
        ))
    }

    /// Builds the tokenizer a GGUF file describes. Pre-tokenizers are
    /// llama.cpp's, by name.
    ///
    /// # Errors
    /// [`TextError`] for a model or pre-tokenizer that is not supported, or a
    /// vocabulary that contradicts itself.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TextError> {
        let sentence_piece = match vocab.model.as_str() {
            "gpt2" => false,
            "llama" => true,
            other => {
                return Err(TextError::Unsupported {
                    what: "GGUF tokenizer model",
                    found: clip(other),
                    known: "gpt2 (byte-level BPE) and llama (SentencePiece)",
                });
            }
        };
        let n = vocab.tokens.len();
        if !vocab.token_types.is_empty() && vocab.token_types.len() != n {
            return Err(TextError::Vocabulary(format!(
                "{n} tokens but {} token types",
                vocab.token_types.len()
            )));
        }
        for (what, id) in [("beginning", vocab.bos), ("end", vocab.eos)] {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return Err(TextError::Vocabulary(format!(
                    "{what}-of-sequence token is {id} of {n} tokens"
                )));
            }
        }

        if sentence_piece { from_scores(vocab) } else { from_merges(vocab) }
    }

    fn assemble(
        parsing: tokenizers::Tokenizer,
        table: Table,
        bos: Option<u32>,
        eos: Option<u32>,
        add_bos: bool,
    ) -> Self {
        let mut plain = parsing.clone();
        plain.set_encode_special_tokens(true);
        Self(Arc::new(Inner {
            parsing,
            plain,
            table,
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
        let inner = &*self.0;
        let tokenizer = if special {
            &inner.parsing
        } else {
            &inner.plain
        };
        let ids = tokenizer
            .encode_fast(text, false)
            .map_err(|e| failed(text, &*e))?
            .get_ids()
            .to_vec();
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
        self.encode(text, false)?;
        let framed = self.0.plain.encode_fast(text, true);
        Ok(framed.map_err(|e| failed(text, &*e))?.get_ids().to_vec())
    }

    /// Where control tokens stand in `text`: their bytes and ids.
    pub(crate) fn controls(&self, text: &str) -> Result<Vec<(Range<usize>, u32)>, TextError> {
        let encoding = self
            .0
            .parsing
            .encode(text, false)
            .map_err(|e| failed(text, &*e))?;
        Ok(encoding
            .get_ids()
            .iter()
            .zip(encoding.get_offsets())
            .filter(|(id, _)| self.is_control(**id))
            .map(|(&id, &(start, end))| (start..end, id))
            .collect())
    }

    /// The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside
    /// the vocabulary nothing. With `skip_special`, control tokens are left out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_control(id)) {
                bytes.extend_from_slice(self.0.table.piece(id));
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes `id` stands for; none outside the vocabulary.
    pub fn piece(&self, id: u32) -> &[u8] {
        self.0.table.piece(id)
    }

    /// Whether `id` is a control token, which no text of a user may become.
    pub fn is_control(&self, id: u32) -> bool {
        self.0.table.is_control(id)
    }

    /// Number of ids: one more than the largest.
    pub fn vocab_size(&self) -> usize {
        self.0.table.ends.len()
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
        let i = &*self.0;
        let table = Table {
            bytes: i.table.bytes.clone(),
            ends: i.table.ends.clone(),
            control: i.table.control.clone(),
        };
        Self::assemble(i.parsing.clone(), table, i.bos, eos, i.add_bos)
    }

    /// The id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.parsing.token_to_id(token)
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

/// Byte-level BPE.
fn from_merges(vocab: GgufVocab) -> Result<Tokenizer, TextError> {
    let (splits, ignore_merges) = pre_tokenizer(&vocab.pre)?;
    let mut table = Table::default();
    let mut added = Vec::new();
    let mut ids = serde_json::Map::new();
    for (id, token) in vocab.tokens.into_iter().enumerate() {
        let kind = vocab.token_types.get(id).copied().unwrap_or(1);
        if matches!(kind, CONTROL | USER_DEFINED) && !token.is_empty() {
            table.push(token.as_bytes(), kind == CONTROL);
            added.push(added_token(id, &token, kind));
        } else {
            table.push(&spell(&token), kind == CONTROL);
        }
        if ids.contains_key(&token) {
            return Err(twice(&token, id));
        }
        ids.insert(token, id.into());
    }
    let merges = vocab
        .merges
        .iter()
        .map(|m| {
            // The left part is never empty and may itself be a space.
            let skip = m.chars().next().map_or(0, char::len_utf8);
            m[skip..]
                .split_once(' ')
                .map(|(left, right)| (&m[..skip + left.len()], right))
                .ok_or_else(|| {
                    TextError::Vocabulary(format!("merge {:?} has one part", clip(m)))
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut stages: Vec<Value> = splits
        .iter()
        .map(|regex| {
            json!({"type": "Split", "pattern": {"Regex": regex},
                   "behavior": "Isolated", "invert": false})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                            "trim_offsets": true, "use_regex": false});
    stages.push(byte_level.clone());
    let file = json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": merges,
                  "ignore_merges": ignore_merges},
    });
    let tokenizer = parse(file.to_string().as_bytes())?;
    Ok(Tokenizer::assemble(
        tokenizer,
        table,
        vocab.bos,
        vocab.eos,
        vocab.add_bos,
    ))
}

/// SentencePiece's BPE. Where llama.cpp joins the neighbours whose joint token
/// has the highest score, merges in falling order of that score do the same.
fn from_scores(vocab: GgufVocab) -> Result<Tokenizer, TextError> {
    let n = vocab.tokens.len();
    if vocab.scores.len() != n || vocab.token_types.len() != n {
        return Err(TextError::Vocabulary(format!(
            "{n} tokens but {} scores and {} token types",
            vocab.scores.len(),
            vocab.token_types.len()
        )));
    }
    let mut table = Table::default();
    let mut added = Vec::new();
    let mut ids: HashMap<&str, usize> = HashMap::with_capacity(n);
    for (id, (token, &kind)) in vocab.tokens.iter().zip(&vocab.token_types).enumerate() {
        if ids.insert(token, id).is_some() {
            return Err(twice(token, id));
        }
        match kind {
            BYTE => {
                let byte = byte_of_piece(token).ok_or_else(|| {
                    TextError::Vocabulary(format!("byte token {:?} is not of the form <0x0A>", clip(token)))
                })?;
                table.push(&[byte], false);
            }
            CONTROL | UNKNOWN => table.push(token.as_bytes(), kind == CONTROL),
            _ => table.push(token.replace(SPACE, " ").as_bytes(), false),
        }
        if matches!(kind, CONTROL | USER_DEFINED) && !token.is_empty() {
            added.push(added_token(id, token, kind));
        }
    }
    // (score of the joint token, its id, bytes of the left part)
    let mut merges: Vec<(f32, usize, usize)> = Vec::new();
    for (id, (token, &kind)) in vocab.tokens.iter().zip(&vocab.token_types).enumerate() {
        if matches!(kind, BYTE | CONTROL | UNKNOWN) {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((vocab.scores[id], id, at));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let merges: Vec<Value> = merges
        .iter()
        .map(|&(_, id, at)| {
            let (left, right) = vocab.tokens[id].split_at(at);
            json!([left, right])
        })
        .collect();
    let space = SPACE.to_string();
    let mut stages = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": space})];
    if vocab.add_space_prefix.unwrap_or(true) {
        stages.insert(0, json!({"type": "Prepend", "prepend": space}));
    }
    let unknown = vocab.unknown.and_then(|id| vocab.tokens.get(id as usize));
    let file = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": stages},
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "unk_token": unknown,
                  "fuse_unk": true, "byte_fallback": true},
    });
    let tokenizer = parse(file.to_string().as_bytes())?;
    Ok(Tokenizer::assemble(tokenizer, table, vocab.bos, vocab.eos, vocab.add_bos))
}

/// The byte that SentencePiece writes as `<0x0A>`.
fn byte_of_piece(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok()
}

fn added_token(id: usize, content: &str, kind: i32) -> Value {
    json!({
        "id": id, "content": content, "special": kind == CONTROL,
        "normalized": false, "single_word": false, "lstrip": false, "rstrip": false,
    })
}

fn twice(token: &str, id: usize) -> TextError {
    TextError::Vocabulary(format!("token {:?} appears twice, the second time as id {id}", clip(token)))
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

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The expressions that split text one after the other, and whether a word that
/// is a token as it stands skips the merges. Names and expressions follow
/// llama.cpp's `llama-vocab.cpp`.
fn pre_tokenizer(name: &str) -> Result<(&'static [&'static str], bool), TextError> {
    Ok(match name {
        "gpt-2" | "mpt" | "olmo" | "jais" => (&[GPT2], false),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => (&[r"\p{N}", GPT2], false),
        "llama-bpe" | "llama-v3" | "llama3" => (&[LLAMA3], true),
        "qwen2" | "stablelm2" | "deepseek-r1-qwen" => (&[QWEN2], false),
        "default" | "" => (
            &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
            false,
        ),
        _ => {
            return Err(TextError::Unsupported {
                what: "GGUF pre-tokenizer",
                found: clip(name),
                known: "gpt-2, smollm, llama-bpe, qwen2, default and their equals",
            });
        }
    })
}
