//! Why an engine could not start. Errors of a request are `ApiError`s.

use crate::{
    memory::MemorySource,
    plan::{MemoryPlan, size},
};
use ashlar_core::{Fault, Hint};
use ashlar_model::ModelError;
use ashlar_text::TextError;
use std::path::PathBuf;

/// An engine that could not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The model file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// The weights cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The vocabulary or chat template cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Metadata the tokenizer needs is missing or of another type.
    #[error("the model file's {key} is missing or not {wanted}")]
    Metadata {
        /// The metadata key.
        key: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// Tokens the model has no weights for.
    #[error("the tokenizer has {tokenizer} tokens, the model {model}")]
    Vocabulary {
        /// Ids of the tokenizer.
        tokenizer: usize,
        /// Rows of the model's output.
        model: usize,
    },
    /// A setting that cannot work.
    #[error("engine setting {name} is {value}, must be at least {least}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What was given.
        value: usize,
        /// The least that works.
        least: usize,
    },
    /// Heads that int8 keys and values cannot be kept of.
    #[error("kv_type is int8, which takes heads of a multiple of 4 values; this model's have {head}")]
    KvType {
        /// Values a head.
        head: usize,
    },
    /// The memory does not hold the model and the least it needs beside it.
    #[error(
        "the engine needs {} of memory, {} are {}: weights {}, {} of KV cache a block of 32 tokens, \
         workspace {}, requests {}, reserve {}",
        size(*.needed), size(*.available), .plan.source, size(.plan.weights_bytes),
        size(.plan.kv_block_bytes), size(.plan.workspace_bytes), size(.plan.requests_bytes),
        size(.plan.reserve_bytes)
    )]
    Memory {
        /// Bytes needed in all.
        needed: u64,
        /// Bytes there are.
        available: u64,
        /// KV blocks there would be room for; 0 when too few to serve.
        blocks_that_fit: usize,
        /// The plan that does not fit.
        plan: Box<MemoryPlan>,
    },
    /// The file alone is larger than the memory.
    #[error("the model file has {}, {} of memory are {source_of}", size(*.file), size(*.available))]
    FileMemory {
        /// Bytes of the file.
        file: u64,
        /// Bytes there are.
        available: u64,
        /// Who says so.
        source_of: MemorySource,
    },
    /// The scheduler's thread could not be started.
    #[error("starting the scheduler thread: {0}")]
    Thread(std::io::Error),
}

impl Hint for EngineError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. } | Self::Thread(_) | Self::Memory { .. } | Self::FileMemory { .. } => {
                Fault::Environment
            }
            Self::Model(e) => e.fault(),
            Self::Text(e) => e.fault(),
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Model(e) => e.hint(),
            Self::Text(e) => e.hint(),
            Self::Metadata { .. } => {
                Some("use a GGUF file with its tokenizer and chat template inside".into())
            }
            Self::Vocabulary { .. } => Some("use the tokenizer the model was made with".into()),
            Self::Io { .. } => Some("check the path and its permissions".into()),
            Self::KvType { .. } => Some("choose kv_type f16, bf16 or f32".into()),
            Self::Setting { name, least, .. } => Some(format!("set {name} to {least} or more")),
            Self::Memory {
                blocks_that_fit: 0, ..
            }
            | Self::FileMemory { .. } => Some(
                "free memory or raise its limit, lower max_batch or max_prefill, or choose a \
                 smaller model or quantization"
                    .into(),
            ),
            Self::Memory {
                blocks_that_fit, ..
            } => Some(format!(
                "set kv_blocks to at most {blocks_that_fit}, or leave it out to have it fitted"
            )),
            Self::Thread(_) => Some("raise the limit of processes for this user".into()),
        }
    }
}
