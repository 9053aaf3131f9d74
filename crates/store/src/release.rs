//! Releases: a channel points at a model. Pointers are only ever added, so the
//! last one of a channel is current and a rollback is one more.

use crate::{
    StoreError,
    ledger::{Store, digest_of, digest_opt},
    log,
};
use ashlar_core::{Digest, clock, id};
use serde::Serialize;
use sqlx::{Row as _, sqlite::SqliteRow};

/// What a channel is to point at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The model that is served.
    pub model: Digest,
    /// The signed statement that its gates held.
    pub statement: Digest,
    /// The adapter the model was merged from, if any.
    pub adapter: Option<Digest>,
    /// The snapshot of documents it was trained on, if any.
    pub snapshot: Option<Digest>,
    /// The evaluation the gate read, if any.
    pub evaluation: Option<Digest>,
}

impl Release {
    /// A release of `model` vouched for by `statement`.
    pub fn new(model: Digest, statement: Digest) -> Self {
        Self {
            model,
            statement,
            adapter: None,
            snapshot: None,
            evaluation: None,
        }
    }
}

/// A release as it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReleaseRow {
    /// Its id.
    pub id: String,
    /// The channel it moved.
    pub channel: String,
    /// The model that is served.
    pub model: Digest,
    /// The adapter the model was merged from, if any.
    pub adapter: Option<Digest>,
    /// The snapshot of documents it was trained on, if any.
    pub snapshot: Option<Digest>,
    /// The evaluation the gate read, if any.
    pub evaluation: Option<Digest>,
    /// The signed statement.
    pub statement: Digest,
    /// When it was made.
    pub created_ms: i64,
    /// Whether a takedown reaches it now. Follows from the lineage; the log does
    /// not hold it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub revoked: bool,
}

impl Store {
    /// Points `channel` at a model; the release's id.
    ///
    /// # Errors
    /// [`StoreError::UnknownArtifact`] when an artifact is not stored,
    /// [`StoreError::OpenTakedown`] when a takedown reaches one.
    pub async fn release(&self, channel: &str, release: &Release) -> Result<String, StoreError> {
        let parts = [
            ("model", Some(release.model)),
            ("statement", Some(release.statement)),
            ("adapter", release.adapter),
            ("snapshot", release.snapshot),
            ("evaluation", release.evaluation),
        ];
        for (what, digest) in parts {
            let Some(digest) = digest else { continue };
            if self.artifact(&digest).await?.is_none() {
                return Err(StoreError::UnknownArtifact { what, digest });
            }
        }
        // A takedown has to write too, so none can slip in before the commit.
        let mut write = self.write().await?;
        for (what, digest) in parts {
            let Some(digest) = digest.filter(|_| what != "statement") else {
                continue;
            };
            let docs = self.open_takedowns(&digest).await?;
            if !docs.is_empty() {
                return Err(StoreError::OpenTakedown { digest, docs });
            }
        }
        let row = ReleaseRow {
            id: id::new("rel"),
            channel: channel.into(),
            model: release.model,
            adapter: release.adapter,
            snapshot: release.snapshot,
            evaluation: release.evaluation,
            statement: release.statement,
            created_ms: clock::now_ms(),
            revoked: false,
        };
        let text = |d: Option<Digest>| d.map(|d| d.to_string());
        sqlx::query(
            "INSERT INTO release (seq, id, channel, model, statement, adapter, snapshot, evaluation, created_ms) \
             VALUES ((SELECT COALESCE(MAX(seq), 0) + 1 FROM release), $1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&row.id)
        .bind(channel)
        .bind(row.model.to_string())
        .bind(row.statement.to_string())
        .bind(text(row.adapter))
        .bind(text(row.snapshot))
        .bind(text(row.evaluation))
        .bind(row.created_ms)
        .execute(&mut *write.tx)
        .await?;
        log::append(
            &mut write,
            self.home(),
            "release",
            &row.id,
            &log::body("release", &row)?,
        )
        .await?;
        write.commit().await?;
        self.flush().await?;
        Ok(row.id)
    }

    /// What `channel` points at.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn current(&self, channel: &str) -> Result<Option<ReleaseRow>, StoreError> {
        let row = sqlx::query("SELECT * FROM release WHERE channel = $1 ORDER BY seq DESC LIMIT 1")
            .bind(channel)
            .fetch_optional(self.pool())
            .await?;
        match row {
            None => Ok(None),
            Some(row) => {
                let mut release = release_of(&row)?;
                self.mark_revoked(std::slice::from_mut(&mut release))
                    .await?;
                Ok(Some(release))
            }
        }
    }

    /// All releases, newest first.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn releases(&self) -> Result<Vec<ReleaseRow>, StoreError> {
        let rows = sqlx::query("SELECT * FROM release ORDER BY seq DESC")
            .fetch_all(self.pool())
            .await?;
        let mut releases = rows.iter().map(release_of).collect::<Result<Vec<_>, _>>()?;
        self.mark_revoked(&mut releases).await?;
        Ok(releases)
    }

    async fn mark_revoked(&self, releases: &mut [ReleaseRow]) -> Result<(), StoreError> {
        let down: Vec<Digest> = self.takedowns().await?.into_iter().map(|t| t.doc).collect();
        if down.is_empty() {
            return Ok(());
        }
        let reached = self.exposed_to(&down).await?.releases;
        for release in releases {
            release.revoked = reached.binary_search(&release.id).is_ok();
        }
        Ok(())
    }
}

pub(crate) fn release_of(row: &SqliteRow) -> Result<ReleaseRow, StoreError> {
    Ok(ReleaseRow {
        id: row.try_get("id")?,
        channel: row.try_get("channel")?,
        model: digest_of(row, "model")?,
        adapter: digest_opt(row, "adapter")?,
        snapshot: digest_opt(row, "snapshot")?,
        evaluation: digest_opt(row, "evaluation")?,
        statement: digest_of(row, "statement")?,
        created_ms: row.try_get("created_ms")?,
        revoked: false,
    })
}
