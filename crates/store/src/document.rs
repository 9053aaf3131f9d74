//! Documents: a document is its raw bytes' digest; where it was seen, under
//! which licence and with what consent are observations beside it.

use crate::{
    StoreError,
    ledger::{Store, digest_of},
    trace::Thing,
};
use ashlar_core::{Digest, clock};
use serde::{Deserialize, Serialize};
use sqlx::{QueryBuilder, Row as _, sqlite::SqliteRow};

/// A document as one source showed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Digest of the raw bytes.
    pub doc: Digest,
    /// The file or address it came from.
    pub source: String,
    /// Its id in the corpus.
    pub id: String,
    /// Its title.
    pub title: String,
    /// SPDX id; `None` when the source gave none.
    pub licence: Option<String>,
    /// What the source said about use for training, e.g. `unknown`, `opt-out`.
    pub consent: String,
    /// ISO 639-1 code, where it was found.
    pub lang: Option<String>,
}

/// All that is known about a document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DocumentRow {
    /// Digest of the raw bytes.
    pub doc: Digest,
    /// Where it was seen, by source and id.
    pub observations: Vec<Observation>,
    /// Its near-duplicates, transitively, without itself.
    pub siblings: Vec<Digest>,
    /// Why it was taken down, if it was.
    pub taken_down: Option<String>,
}

impl Store {
    /// Writes down where documents were seen. The latest word of one source on
    /// one id replaces its earlier one; the time of the first sight stays.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn observe(&self, observations: &[Observation]) -> Result<(), StoreError> {
        let now = clock::now_ms();
        let mut write = self.write().await?;
        for chunk in observations.chunks(500) {
            QueryBuilder::new("INSERT INTO observation (doc, source, id, title, licence, consent, lang, seen_ms) ")
                .push_values(chunk, |mut row, o| {
                    row.push_bind(o.doc.to_string())
                        .push_bind(&o.source)
                        .push_bind(&o.id)
                        .push_bind(&o.title)
                        .push_bind(&o.licence)
                        .push_bind(&o.consent)
                        .push_bind(&o.lang)
                        .push_bind(now);
                })
                .push(
                    " ON CONFLICT (doc, source, id) DO UPDATE SET title = excluded.title, \
                     licence = excluded.licence, consent = excluded.consent, lang = excluded.lang",
                )
                .build()
                .execute(&mut *write.tx)
                .await?;
        }
        write.commit().await
    }

    /// Writes down near-duplicates as `(document, representative)`. Edges are
    /// never forgotten, so that a takedown reaches what an earlier snapshot
    /// dropped.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn siblings(&self, edges: &[(Digest, Digest)]) -> Result<(), StoreError> {
        let edges: Vec<_> = edges.iter().filter(|(a, b)| a != b).collect();
        let mut write = self.write().await?;
        for chunk in edges.chunks(1000) {
            QueryBuilder::new("INSERT INTO sibling (doc, representative) ")
                .push_values(chunk, |mut row, (doc, representative)| {
                    row.push_bind(doc.to_string())
                        .push_bind(representative.to_string());
                })
                .push(" ON CONFLICT (doc, representative) DO NOTHING")
                .build()
                .execute(&mut *write.tx)
                .await?;
        }
        write.commit().await
    }

    /// The document with this digest, prefix of at least 6 hex digits, or id in
    /// its corpus; `None` when there is none.
    ///
    /// # Errors
    /// [`StoreError::Ambiguous`] when there are several.
    pub async fn document(&self, id: &str) -> Result<Option<DocumentRow>, StoreError> {
        let docs = self
            .candidates(id)
            .await?
            .into_iter()
            .filter_map(|t| match t {
                Thing::Document(doc) => Some(doc),
                _ => None,
            });
        let docs: Vec<Digest> = docs.collect();
        match docs[..] {
            [] => Ok(None),
            [doc] => Ok(Some(self.document_row(doc).await?)),
            _ => {
                let candidates = docs.iter().take(20).map(ToString::to_string).collect();
                Err(StoreError::Ambiguous {
                    id: id.into(),
                    candidates,
                })
            }
        }
    }

    pub(crate) async fn document_row(&self, doc: Digest) -> Result<DocumentRow, StoreError> {
        let mut siblings = self.sibling_closure(&[doc]).await?;
        siblings.remove(&doc);
        Ok(DocumentRow {
            doc,
            observations: self.observations(doc).await?,
            siblings: siblings.into_iter().collect(),
            taken_down: sqlx::query_scalar("SELECT reason FROM takedown WHERE doc = $1")
                .bind(doc.to_string())
                .fetch_optional(self.pool())
                .await?,
        })
    }

    pub(crate) async fn observations(&self, doc: Digest) -> Result<Vec<Observation>, StoreError> {
        sqlx::query("SELECT * FROM observation WHERE doc = $1 ORDER BY source, id")
            .bind(doc.to_string())
            .fetch_all(self.pool())
            .await?
            .iter()
            .map(observation_of)
            .collect()
    }
}

impl Store {
    /// Keeps hashes of what `doc`, which was taken down, says, so that answers can
    /// be held against them without its text.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn forbid(&self, doc: &Digest, hashes: &[u64]) -> Result<(), StoreError> {
        // Two's complement: SQL has no unsigned integers.
        let signed: Vec<i64> = hashes.iter().map(|h| *h as i64).collect();
        let mut write = self.write().await?;
        sqlx::query("INSERT INTO takedown_shingle (doc, hash) SELECT $1, value FROM json_each($2) WHERE 1 = 1 ON CONFLICT (doc, hash) DO NOTHING")
            .bind(doc.to_string())
            .bind(serde_json::to_string(&signed)?)
            .execute(&mut *write.tx)
            .await?;
        write.commit().await
    }

    /// All hashes that [`Store::forbid`] keeps.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn takedown_shingles(&self) -> Result<Vec<u64>, StoreError> {
        let all: Vec<i64> = sqlx::query_scalar("SELECT DISTINCT hash FROM takedown_shingle").fetch_all(self.pool()).await?;
        Ok(all.into_iter().map(|h| h as u64).collect())
    }

    /// How many there are: another number is another set, since none is removed.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn takedown_shingle_count(&self) -> Result<i64, StoreError> {
        Ok(sqlx::query_scalar("SELECT COUNT(*) FROM takedown_shingle").fetch_one(self.pool()).await?)
    }
}

pub(crate) fn observation_of(row: &SqliteRow) -> Result<Observation, StoreError> {
    Ok(Observation {
        doc: digest_of(row, "doc")?,
        source: row.try_get("source")?,
        id: row.try_get("id")?,
        title: row.try_get("title")?,
        licence: row.try_get("licence")?,
        consent: row.try_get("consent")?,
        lang: row.try_get("lang")?,
    })
}
