//! What can go wrong in the store, whose fault it is and what to do next.

use ashlar_core::{Digest, Fault, Hint};
use std::path::{Path, PathBuf};

/// A failure of the store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The database refused.
    #[error("ledger: {0}")]
    Sql(#[from] sqlx::Error),
    /// A value cannot be JSON.
    #[error("not JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// The Merkle tree refused.
    #[error("transparency log: {0}")]
    Log(#[from] tlog_tiles::tlog::Error),
    /// A stored value that Ashlar would not have written.
    #[error("ledger: {0}")]
    Corrupt(String),
    /// The ledger was written by a newer program.
    #[error("the ledger has schema {found}, this program knows up to {known}")]
    Schema {
        /// Version in the ledger.
        found: i64,
        /// Highest version known here.
        known: i64,
    },
    /// Nothing has this id.
    #[error("nothing is known as {0:?}")]
    NotFound(String),
    /// Several things have this id.
    #[error("{id:?} could be any of {}: {}", candidates.len(), candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        id: String,
        /// All that match, at most 20.
        candidates: Vec<String>,
    },
    /// A digest that names no artifact of this ledger.
    #[error("{what} {digest} is not in the store")]
    UnknownArtifact {
        /// What it was wanted as.
        what: &'static str,
        /// The digest.
        digest: Digest,
    },
    /// An object whose bytes do not hash to its name, or that is gone.
    #[error("object {digest} is damaged: {said}")]
    Damaged {
        /// The object's name.
        digest: Digest,
        /// What was found.
        said: String,
    },
    /// A file that changed while it was read.
    #[error("{} changed while it was being stored", .0.display())]
    Changed(PathBuf),
    /// Neither a plain file nor a folder of plain files.
    #[error("{} cannot be stored: {why}", path.display())]
    Unstorable {
        /// The offender.
        path: PathBuf,
        /// The reason.
        why: &'static str,
    },
    /// A run gave two outputs one role.
    #[error("run {run} already has an output {role:?}")]
    RoleTaken {
        /// The run.
        run: String,
        /// The role.
        role: String,
    },
    /// An exposure for an artifact the run neither read nor wrote.
    #[error("run {run} has {artifact} neither as input nor as output")]
    NotOfRun {
        /// The run.
        run: String,
        /// The artifact.
        artifact: Digest,
    },
    /// A release of something that holds documents taken down.
    #[error("{digest} is exposed to {} document(s) that were taken down, first {}", docs.len(), docs[0])]
    OpenTakedown {
        /// The model or adapter.
        digest: Digest,
        /// The documents, never empty.
        docs: Vec<Digest>,
    },
    /// A response id admitted twice.
    #[error("response {0} was admitted before")]
    AlreadyAdmitted(String),
    /// A response settled twice.
    #[error("response {id} was settled before, as {finish:?}")]
    AlreadySettled {
        /// The response.
        id: String,
        /// How it was settled the first time.
        finish: String,
    },
    /// A response that was never admitted.
    #[error("response {0} was never admitted")]
    UnknownResponse(String),
    /// A finish reason outside the vocabulary.
    #[error("finish {0:?} is none of stop, length, cancelled, error")]
    Finish(String),
    /// A background thread of ours died.
    #[error("a store task died: {0}")]
    Task(String),
}

impl StoreError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

impl Hint for StoreError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. }
            | Self::Sql(_)
            | Self::Schema { .. }
            | Self::Corrupt(_)
            | Self::Damaged { .. }
            | Self::Log(_) => Fault::Environment,
            Self::RoleTaken { .. }
            | Self::NotOfRun { .. }
            | Self::AlreadySettled { .. }
            | Self::AlreadyAdmitted(_)
            | Self::UnknownResponse(_)
            | Self::Finish(_)
            | Self::Task(_) => Fault::Bug,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::StorageFull => "free some space, then run the same command again: it resumes".into(),
                std::io::ErrorKind::PermissionDenied => "make the home folder writable, or name another with --home".into(),
                _ => return None,
            },
            Self::Schema { .. } => "use the newer program, or another --home".into(),
            Self::NotFound(_) => "an id is a response, run or release id, a document's id in its corpus, a digest, or at least 6 hex digits of one".into(),
            Self::Ambiguous { .. } => "give more digits, or one of the candidates in full".into(),
            Self::UnknownArtifact { .. } => "store it first, or check that --home is the home it was made in".into(),
            Self::Damaged { digest, .. } => format!(
                "delete objects/sha256/{}/{} under the home folder and run the pipeline again: the stage that made it runs anew",
                &digest.hex()[..2],
                digest.hex()
            ),
            Self::Corrupt(_) => "`ashlar verify --ledger` lists every fault; restore ledger.db from a copy".into(),
            Self::Changed(_) => "wait until nothing writes to it, then try again".into(),
            Self::OpenTakedown { .. } => "run the pipeline again: it rebuilds without the documents".into(),
            _ => return None,
        })
    }
}
