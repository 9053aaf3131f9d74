//! Tokenizers, chat templates and detectors of language, personal data and
//! secrets.
//!
//! What may not happen here: text of a user becoming a control token
//! ([`ChatTemplate::encode`] ensures it, property tests check it); broken UTF-8
//! leaving a [`StreamDecoder`]; a template running without fuel. No I/O.

#![forbid(unsafe_code)]

mod bytes;
mod chat;
pub mod detect;
mod error;
mod jinja;
mod mask;
mod overlap;
mod tokenizer;

pub use chat::{ChatTemplate, Message};
pub use error::TextError;
pub use mask::{Masked, masked_chat};
pub use overlap::{Overlap, overlap};
pub use tokenizer::{GgufVocab, StreamDecoder, Tokenizer};
