//! Tokenizers, chat templates and detectors of language, personal data and
//! secrets.
//!
//! What may not happen here: text of a user becoming a control token
//! ([`ChatTemplate::encode`] ensures it, property tests check it); broken UTF-8
//! leaving a [`StreamDecoder`]; a template running without fuel. No I/O.

#![forbid(unsafe_code)]

mod bpe;
mod bytes;
mod chat;
pub mod detect;
mod error;
mod gguf;
mod jinja;
mod mask;
mod overlap;
mod split;
mod table;
mod tokenizer;
mod vocab;

pub use chat::{ChatTemplate, Message};
pub use error::TextError;
pub use gguf::GgufVocab;
pub use mask::{Masked, masked_chat};
pub use overlap::{Overlap, overlap};
pub use tokenizer::{StreamDecoder, Tokenizer};
