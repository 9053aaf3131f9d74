//! Tokenizers as GGUF files describe them: byte-level BPE by its merges,
//! SentencePiece's BPE by its scores.

use crate::{
    TextError,
    bpe::{Bpe, SPACE},
    bytes::spell,
    error::clip,
    split::pre_tokenizer,
    table::{Table, byte_of_piece},
    vocab::Vocab,
};

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

// `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

impl GgufVocab {
    /// The encoder and the bytes of each token.
    pub(crate) fn build(&self) -> Result<(Bpe, Table), TextError> {
        let sentence_piece = match self.model.as_str() {
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
        let n = self.tokens.len();
        if !self.token_types.is_empty() && self.token_types.len() != n {
            return Err(TextError::Vocabulary(format!(
                "{n} tokens but {} token types",
                self.token_types.len()
            )));
        }
        for (what, id) in [("beginning", self.bos), ("end", self.eos)] {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return Err(TextError::Vocabulary(format!(
                    "{what}-of-sequence token is {id} of {n} tokens"
                )));
            }
        }
        if sentence_piece { self.by_scores() } else { self.by_merges() }
    }

    fn kind(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
    }

    /// Tokens that stand in a text as they are.
    fn added(&self) -> Vec<(u32, bool)> {
        let kinds = (0u32..).zip(&self.tokens).map(|(id, token)| (id, token, self.kind(id as usize)));
        let added = kinds.filter(|(_, token, kind)| matches!(*kind, CONTROL | USER_DEFINED) && !token.is_empty());
        added.map(|(id, _, kind)| (id, kind == CONTROL)).collect()
    }

    fn by_merges(&self) -> Result<(Bpe, Table), TextError> {
        let (splits, whole_words) = pre_tokenizer(&self.pre)?;
        let mut table = Table::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = self.kind(id);
            table.extend(kind == CONTROL, |bytes| match kind {
                CONTROL | USER_DEFINED => bytes.extend_from_slice(token.as_bytes()),
                _ => spell(token, bytes),
            });
        }
        let bpe = Bpe::by_merges(Vocab::new(&self.tokens)?, self.added(), &self.merges, splits, whole_words)?;
        Ok((bpe, table))
    }

    /// Where llama.cpp joins the neighbours whose joint token has the highest
    /// score, so does this.
    fn by_scores(&self) -> Result<(Bpe, Table), TextError> {
        let n = self.tokens.len();
        if self.scores.len() != n || self.token_types.len() != n {
            return Err(TextError::Vocabulary(format!(
                "{n} tokens but {} scores and {} token types",
                self.scores.len(),
                self.token_types.len()
            )));
        }
        let mut table = Table::with_capacity(n);
        for (token, &kind) in self.tokens.iter().zip(&self.token_types) {
            match kind {
                BYTE => {
                    let byte = byte_of_piece(token).ok_or_else(|| {
                        TextError::Vocabulary(format!("byte token {:?} is not of the form <0x0A>", clip(token)))
                    })?;
                    table.push(&[byte], false);
                }
                CONTROL | UNKNOWN => table.push(token.as_bytes(), kind == CONTROL),
                _ => table.extend(false, |bytes| {
                    let mut parts = token.split(SPACE);
                    bytes.extend_from_slice(parts.next().unwrap_or_default().as_bytes());
                    for part in parts {
                        bytes.push(b' ');
                        bytes.extend_from_slice(part.as_bytes());
                    }
                }),
            }
        }
        let bpe = Bpe::by_scores(
            Vocab::new(&self.tokens)?,
            self.added(),
            &self.scores,
            |id| !matches!(self.kind(id as usize), BYTE | CONTROL | UNKNOWN),
            self.add_space_prefix.unwrap_or(true),
            self.unknown,
        )?;
        Ok((bpe, table))
    }
}
