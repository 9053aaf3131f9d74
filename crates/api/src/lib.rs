//! OpenAI wire types and the [`Backend`] trait every engine stands behind.
//!
//! What may not happen here: no network, no tokenizer, no model. A request is
//! either read completely or refused with the name of the field at fault;
//! nothing is ignored, clamped or defaulted silently.
//!
//! ```
//! use ashlar_api::ChatRequest;
//! let body = br#"{"model":"m","messages":[{"role":"user","content":"hi"}],"tempo":1}"#;
//! let bad = ChatRequest::parse(body).unwrap_err();
//! assert_eq!((bad.status, bad.param.as_deref()), (400, Some("tempo")));
//! ```
#![forbid(unsafe_code)]

mod backend;
mod error;
mod fields;
mod request;
mod response;

pub use backend::{
    Backend, BackendStats, Event, EventStream, Finish, IterationTokens, ModelInfo, PromptDetails,
    Score, Timings, Usage,
};
pub use error::{ApiError, ErrorBody, ErrorDetail};
pub use request::{ChatMessage, ChatRequest, CompletionRequest, Prompt, Sampling, StreamOptions};
pub use response::{
    ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, Delta, ModelList, ModelObject,
    ReplyMessage, TextChoice, TextCompletion,
};
