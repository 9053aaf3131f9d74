//! The kinds of durable things the lineage graph joins.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What an artifact is; its identity is its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum ArtifactKind {
    Source,
    Snapshot,
    Pack,
    Model,
    Adapter,
    Evaluation,
    Signature,
    Card,
    Report,
}

impl ArtifactKind {
    /// Its name in the ledger and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Snapshot => "snapshot",
            Self::Pack => "pack",
            Self::Model => "model",
            Self::Adapter => "adapter",
            Self::Evaluation => "evaluation",
            Self::Signature => "signature",
            Self::Card => "card",
            Self::Report => "report",
        }
    }
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
