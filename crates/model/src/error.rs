//! What loading and running a model refuse.

use crate::formats::FormatError;
use ashlar_core::{Fault, Hint};
use ashlar_kernels::KernelError;
use std::path::PathBuf;

/// A model file or a request that cannot be taken.
#[derive(Debug, Clone, thiserror::Error)]
#[allow(missing_docs)] // The message of each says what its fields are.
pub enum ModelError {
    #[error("cannot read {}: {cause}", path.display())]
    Read { path: PathBuf, cause: String },
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("architecture {0:?} is not supported")]
    Architecture(String),
    #[error("the file lacks {key:?}, or holds another type than expected there")]
    Metadata { key: String },
    #[error("{what} is {value}, which must be {must}")]
    Setting { what: String, value: String, must: &'static str },
    #[error("the file lacks the tensor {0:?}")]
    Missing(String),
    #[error("{what} does not parse: {cause}")]
    Json { what: String, cause: String },
    #[error("the configuration sets {key} to {value}, which is not known here and may change the result")]
    Unknown { key: String, value: String },
    #[error("the file holds the tensor {0:?}, which its architecture does not use")]
    Unused(String),
    #[error("two shards hold the tensor {0:?}")]
    Twice(String),
    #[error("{architecture} is {is}")]
    Role { architecture: String, is: &'static str },
    #[error("tensor {name:?} has shape {got:?}, expected {expected:?}")]
    Shape { name: String, expected: Vec<usize>, got: Vec<usize> },
    #[error("tensor {name:?}: {cause}")]
    Tensor { name: String, cause: KernelError },
    #[error("item {item}: token {token} is outside the vocabulary of {vocab}")]
    Token { item: usize, token: u32, vocab: usize },
    #[error("item {item} has no tokens")]
    Empty { item: usize },
    #[error("item {item}: {len} tokens exceed the context of {context}")]
    Context { item: usize, len: usize, context: usize },
    #[error("item {item}: {len} tokens need {need} blocks, its table has {got}")]
    Pages { item: usize, len: usize, need: usize, got: usize },
    #[error("item {item}: block {block} is outside the cache of {blocks}")]
    Page { item: usize, block: u32, blocks: usize },
    #[error("block {block} would be written at two places at once")]
    Shared { block: u32 },
    #[error("the cache was made for another model")]
    Cache,
}

impl Hint for ModelError {
    fn fault(&self) -> Fault {
        match self {
            Self::Read { .. } => Fault::Environment,
            Self::Format(e) => e.fault(),
            Self::Pages { .. } | Self::Page { .. } | Self::Shared { .. } | Self::Cache => Fault::Bug,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Read { .. } => "check the path and its permissions".into(),
            Self::Format(e) => return e.hint(),
            Self::Architecture(_) => "use one of llama, mistral, mixtral, qwen2, qwen3, qwen3moe, gemma2, gemma3 (text), phi3, olmo2, gpt_neox, bloom, bert".into(),
            Self::Metadata { .. } | Self::Setting { .. } | Self::Missing(_) | Self::Shape { .. } => {
                "convert the model again with a current converter, or choose another file".into()
            }
            Self::Json { .. } | Self::Twice(_) => "fetch the folder again".into(),
            Self::Unknown { .. } | Self::Unused(_) => {
                "the model has a part this version lacks; choose another, or ask for the part by that name".into()
            }
            Self::Role { .. } => return None,
            Self::Tensor { cause, .. } => return cause.hint(),
            Self::Token { .. } => "encode the text with this model's own tokenizer".into(),
            Self::Empty { .. } => "give at least one token".into(),
            Self::Context { .. } => "shorten the prompt or ask for fewer tokens".into(),
            Self::Pages { .. } | Self::Page { .. } | Self::Shared { .. } | Self::Cache => return None,
        })
    }
}
