//! What can go wrong in a run, with the numbers and the next step.

use ashlar_core::{Fault, Hint};
use ashlar_formats::FormatError;
use ashlar_model::ModelError;
use std::path::PathBuf;

/// Why a run ended without an adapter.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Nothing to train on.
    #[error("there are no samples")]
    NoSamples,
    /// A sample whose mask and tokens differ in length.
    #[error("sample {index} has {tokens} tokens and a mask of {mask}")]
    Mask {
        /// Position in the list of samples.
        index: usize,
        /// Tokens of the sample.
        tokens: usize,
        /// Flags of its mask.
        mask: usize,
    },
    /// A sample that teaches nothing.
    #[error("sample {index} trains on none of its {tokens} tokens")]
    NothingTrained {
        /// Position in the list of samples.
        index: usize,
        /// Tokens of the sample.
        tokens: usize,
    },
    /// A sample the model cannot see whole.
    #[error("sample {index} has {tokens} tokens, the model's context holds {context}")]
    TooLong {
        /// Position in the list of samples.
        index: usize,
        /// Tokens of the sample.
        tokens: usize,
        /// Tokens the model was made for.
        context: usize,
    },
    /// A token the model does not have.
    #[error("sample {index} holds token {token}, the vocabulary has {vocab}")]
    Token {
        /// Position in the list of samples.
        index: usize,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A setting outside its range.
    #[error("{name} = {value}, must be {must}")]
    Setting {
        /// Which one.
        name: &'static str,
        /// What it was.
        value: String,
        /// What it has to be.
        must: &'static str,
    },
    /// The loss or its gradient is not a number any more.
    #[error("step {step} of {of}: {what} is {value} at learning rate {lr}")]
    NonFinite {
        /// The step, from 1.
        step: usize,
        /// Steps in the run.
        of: usize,
        /// The loss or the gradient's norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// Learning rate of the step.
        lr: f32,
    },
    /// The caller asked for an end.
    #[error("interrupted after step {step} of {of}")]
    Interrupted {
        /// Steps done.
        step: usize,
        /// Steps in the run.
        of: usize,
    },
    /// A shape the trainer does not know.
    #[error("the model has {0}, which the trainer does not support")]
    Unsupported(String),
    /// The model file.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter's file format.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A file or folder.
    #[error("{path}: {source}")]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl TrainError {
    /// Names the path in an I/O error.
    pub(crate) fn io(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}

impl Hint for TrainError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. } | Self::Interrupted { .. } => Fault::Environment,
            Self::Model(e) => e.fault(),
            Self::Format(e) => e.fault(),
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoSamples => "check that the filters before training kept something".into(),
            Self::Mask { .. } => "give one flag for each token".into(),
            Self::NothingTrained { .. } => {
                "check that the chat template marks the assistant's turn, or drop the sample".into()
            }
            Self::TooLong { .. } => "split the sample or drop it; it is never cut silently".into(),
            Self::Token { .. } => "tokenize with the tokenizer of this very model".into(),
            Self::Setting { name, .. } => format!("change {name}"),
            Self::NonFinite { .. } => "lower learning_rate and start from an empty scratch folder".into(),
            Self::Interrupted { .. } => "run it again: it resumes from its last checkpoint".into(),
            Self::Unsupported(_) => "train a llama-shaped model with tied embeddings".into(),
            Self::Model(e) => return e.hint(),
            Self::Format(e) => return e.hint(),
            Self::Io { .. } => "check the path, its permissions and the free space".into(),
        })
    }
}
