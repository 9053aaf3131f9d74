//! What can go wrong between a source file and a pack.

use ashlar_core::{Fault, Hint};
use datafusion::{arrow::error::ArrowError, error::DataFusionError, parquet::errors::ParquetError};
use std::path::PathBuf;

/// A fault of the data layer.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file or folder that cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line or file that is not a document.
    #[error("{file}:{line}:{column}: {problem}")]
    Malformed {
        /// The file, relative to its source.
        file: String,
        /// Line, from 1.
        line: u64,
        /// Byte of the line, from 1.
        column: u64,
        /// What is wrong.
        problem: String,
    },
    /// A file given by name whose kind is not known.
    #[error("{}: not a folder, .jsonl, .txt or .md file", .0.display())]
    UnknownKind(PathBuf),
    /// Sources without a single document.
    #[error("no document in {sources}, {ignored} other files ignored")]
    NoDocuments {
        /// The sources, for people.
        sources: String,
        /// Files of other kinds that were passed over.
        ignored: usize,
    },
    /// A setting out of its range.
    #[error("data setting {setting}: {problem}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What is wrong, with the numbers.
        problem: String,
    },
    /// A table that lacks a column or holds an impossible value.
    #[error("{}: column {column}: {problem}", path.display())]
    Table {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// What is wrong.
        problem: String,
    },
    /// Two kept documents share the id that a question names.
    #[error("question {qa} names document {doc:?}, but {count} kept documents have that id")]
    Ambiguous {
        /// The question.
        qa: String,
        /// The id.
        doc: String,
        /// How many documents have it.
        count: usize,
    },
    /// A question that the tokenizer or the chat template refuses.
    #[error("question {qa}: {source}")]
    Text {
        /// The question.
        qa: String,
        /// Why.
        source: ashlar_text::TextError,
    },
    /// Kept and dropped do not add up.
    #[error("{kept} kept + {dropped} dropped is not {raw} raw documents")]
    Unbalanced {
        /// Rows kept.
        kept: u64,
        /// Rows dropped.
        dropped: u64,
        /// Rows read.
        raw: u64,
    },
    /// DataFusion failed.
    #[error("query engine: {0}")]
    Engine(#[from] DataFusionError),
    /// Arrow failed.
    #[error("arrow: {0}")]
    Arrow(#[from] ArrowError),
    /// Parquet failed.
    #[error("parquet: {0}")]
    Parquet(#[from] ParquetError),
}

impl Hint for DataError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. } => Fault::Environment,
            Self::Unbalanced { .. } | Self::Engine(_) | Self::Arrow(_) => Fault::Bug,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Io { .. } => "check that the path exists and may be read or written".into(),
            Self::Malformed { .. } => {
                "mend the line, or set on_bad = \"quarantine\" to set such lines aside".into()
            }
            Self::UnknownKind(_) => "give a folder, or a .jsonl, .txt or .md file".into(),
            Self::NoDocuments { .. } => {
                "put .jsonl (one {\"id\", \"title\", \"text\"} a line), .txt or .md files there"
                    .into()
            }
            Self::Setting { setting, .. } => format!("correct {setting}"),
            Self::Table { .. } | Self::Parquet(_) => {
                "the file is not one that curate or pack of this version wrote: run the stage again"
                    .into()
            }
            Self::Ambiguous { .. } => "give each document of the sources its own id".into(),
            Self::Text { .. } => "shorten or mend the question or its answer".into(),
            Self::Unbalanced { .. } | Self::Engine(_) | Self::Arrow(_) => {
                "please report this with the recipe".into()
            }
        })
    }
}
