//! Closures over the lineage graph, and takedowns.
//!
//! A document reaches its near-duplicates (both ways, transitively), the
//! artifacts declared to hold any of them, whatever a run made with such an
//! artifact among its inputs, the releases of those and their responses. This
//! errs on the side of too much: it says exposure, never influence.
//!
//! Run and near-duplicate edges are read whole and walked in memory: they are
//! thousands where documents and responses are millions.

use crate::{
    StoreError,
    ledger::{Store, digest_of, parse_digest},
    log,
};
use ashlar_core::{Digest, clock};
use serde::Serialize;
use sqlx::{QueryBuilder, Row as _};
use std::collections::{BTreeMap, BTreeSet};

/// Everything that documents reached; each list sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Exposed {
    /// The documents asked for and their near-duplicates.
    pub documents: Vec<Digest>,
    /// Runs that read or made an exposed artifact.
    pub runs: Vec<String>,
    /// Artifacts that hold them or derive from such.
    pub artifacts: Vec<Digest>,
    /// Releases of such artifacts.
    pub releases: Vec<String>,
    /// Responses served from them.
    pub responses: Vec<String>,
}

/// A document that may no longer be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Takedown {
    /// The document.
    pub doc: Digest,
    /// The document asked for, when this one is its near-duplicate.
    pub via: Option<Digest>,
    /// Why.
    pub reason: String,
    /// Since when.
    pub at_ms: i64,
}

/// What the log says of a takedown. The reason may name people, so only its
/// digest, salted by document and time, is logged.
#[derive(Debug, Serialize)]
pub(crate) struct TakedownRecord {
    doc: Digest,
    via: Option<Digest>,
    reason: Digest,
    at_ms: i64,
}

impl TakedownRecord {
    pub(crate) fn of(t: &Takedown) -> Self {
        let reason = Digest::of(format!("{} {} {}", t.doc, t.at_ms, t.reason).as_bytes());
        Self {
            doc: t.doc,
            via: t.via,
            reason,
            at_ms: t.at_ms,
        }
    }
}

/// Runs and the artifacts they read and made.
#[derive(Default)]
pub(crate) struct Graph {
    /// By run: `(role, artifact)`, sorted.
    pub(crate) reads: BTreeMap<String, Vec<(String, Digest)>>,
    pub(crate) makes: BTreeMap<String, Vec<(String, Digest)>>,
    /// By artifact: runs, sorted.
    pub(crate) read_by: BTreeMap<Digest, Vec<String>>,
    pub(crate) made_by: BTreeMap<Digest, Vec<String>>,
}

impl Graph {
    /// `from` and all that derives from it.
    fn descendants(&self, from: impl IntoIterator<Item = Digest>) -> BTreeSet<Digest> {
        reach(from, |a| {
            let runs = self.read_by.get(a).into_iter().flatten();
            runs.filter_map(|r| self.makes.get(r))
                .flatten()
                .map(|(_, d)| *d)
                .collect()
        })
    }

    /// `from` and all that it derives from.
    fn ancestors(&self, from: Digest) -> BTreeSet<Digest> {
        reach([from], |a| {
            let runs = self.made_by.get(a).into_iter().flatten();
            runs.filter_map(|r| self.reads.get(r))
                .flatten()
                .map(|(_, d)| *d)
                .collect()
        })
    }
}

fn reach(
    from: impl IntoIterator<Item = Digest>,
    next: impl Fn(&Digest) -> Vec<Digest>,
) -> BTreeSet<Digest> {
    let mut seen: BTreeSet<Digest> = from.into_iter().collect();
    let mut open: Vec<Digest> = seen.iter().copied().collect();
    while let Some(at) = open.pop() {
        open.extend(next(&at).into_iter().filter(|d| seen.insert(*d)));
    }
    seen
}

impl Store {
    pub(crate) async fn graph(&self) -> Result<Graph, StoreError> {
        let mut graph = Graph::default();
        let rows =
            |table| format!("SELECT run, role, artifact FROM {table} ORDER BY run, role, artifact");
        for (table, by_run, by_artifact) in [
            ("run_input", &mut graph.reads, &mut graph.read_by),
            ("run_output", &mut graph.makes, &mut graph.made_by),
        ] {
            let edges: Vec<(String, String, String)> =
                sqlx::query_as(&rows(table)).fetch_all(self.pool()).await?;
            for (run, role, artifact) in edges {
                let artifact = parse_digest(&artifact)?;
                let runs: &mut Vec<String> = by_artifact.entry(artifact).or_default();
                if runs.last() != Some(&run) {
                    runs.push(run.clone());
                }
                by_run.entry(run).or_default().push((role, artifact));
            }
        }
        Ok(graph)
    }

    /// `docs` and their near-duplicates, both ways, transitively.
    pub(crate) async fn sibling_closure(
        &self,
        docs: &[Digest],
    ) -> Result<BTreeSet<Digest>, StoreError> {
        let rows: Vec<(String, String)> = sqlx::query_as("SELECT doc, representative FROM sibling")
            .fetch_all(self.pool())
            .await?;
        let mut edges: BTreeMap<Digest, Vec<Digest>> = BTreeMap::new();
        for (a, b) in rows {
            let (a, b) = (parse_digest(&a)?, parse_digest(&b)?);
            edges.entry(a).or_default().push(b);
            edges.entry(b).or_default().push(a);
        }
        Ok(reach(docs.iter().copied(), |d| {
            edges.get(d).cloned().unwrap_or_default()
        }))
    }

    /// Rows `(column, key)` of `table` whose `key` is among `keys`, as text.
    pub(crate) async fn matching(
        &self,
        table: &str,
        columns: &str,
        key: &str,
        keys: impl IntoIterator<Item = String>,
    ) -> Result<Vec<sqlx::sqlite::SqliteRow>, StoreError> {
        let keys: Vec<String> = keys.into_iter().collect();
        let mut rows = Vec::new();
        for chunk in keys.chunks(1000) {
            let mut query =
                QueryBuilder::new(format!("SELECT {columns} FROM {table} WHERE {key} IN ("));
            let mut list = query.separated(", ");
            for key in chunk {
                list.push_bind(key);
            }
            query.push(")");
            rows.extend(query.build().fetch_all(self.pool()).await?);
        }
        Ok(rows)
    }

    /// Everything that is exposed to any of `docs` or their near-duplicates.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn exposed_to(&self, docs: &[Digest]) -> Result<Exposed, StoreError> {
        let documents = self.sibling_closure(docs).await?;
        let (mut holding, mut runs) = (BTreeSet::new(), BTreeSet::new());
        for row in self
            .matching("exposure", "artifact, run", "doc", texts(&documents))
            .await?
        {
            holding.insert(digest_of(&row, "artifact")?);
            runs.insert(row.try_get("run")?);
        }
        let graph = self.graph().await?;
        let artifacts = graph.descendants(holding);
        for artifact in &artifacts {
            runs.extend(graph.read_by.get(artifact).into_iter().flatten().cloned());
            runs.extend(graph.made_by.get(artifact).into_iter().flatten().cloned());
        }
        let mut releases = BTreeSet::new();
        for column in ["model", "adapter", "snapshot"] {
            for row in self
                .matching("release", "id", column, texts(&artifacts))
                .await?
            {
                releases.insert(row.try_get::<String, _>("id")?);
            }
        }
        let mut responses = BTreeSet::new();
        for row in self
            .matching("response", "id", "release", releases.iter().cloned())
            .await?
        {
            responses.insert(row.try_get("id")?);
        }
        // A model served by digest, without a release.
        for row in self
            .matching("response", "id", "model", texts(&artifacts))
            .await?
        {
            responses.insert(row.try_get("id")?);
        }
        Ok(Exposed {
            documents: documents.into_iter().collect(),
            runs: runs.into_iter().collect(),
            artifacts: artifacts.into_iter().collect(),
            releases: releases.into_iter().collect(),
            responses: responses.into_iter().collect(),
        })
    }

    /// Takes `docs` and their near-duplicates down. From here on no artifact
    /// exposed to them can be released. Taking down twice keeps the first word.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn takedown(&self, docs: &[Digest], reason: &str) -> Result<(), StoreError> {
        let at_ms = clock::now_ms();
        let mut asked = Vec::new();
        for &doc in docs {
            asked.push(Takedown {
                doc,
                via: None,
                reason: reason.into(),
                at_ms,
            });
        }
        for &doc in docs {
            for sibling in self.sibling_closure(&[doc]).await? {
                if sibling != doc {
                    asked.push(Takedown {
                        doc: sibling,
                        via: Some(doc),
                        reason: reason.into(),
                        at_ms,
                    });
                }
            }
        }
        let mut write = self.write().await?;
        for t in asked {
            let done = sqlx::query(
                "INSERT INTO takedown (doc, via, reason, at_ms) VALUES ($1, $2, $3, $4) ON CONFLICT (doc) DO NOTHING",
            )
            .bind(t.doc.to_string())
            .bind(t.via.map(|d| d.to_string()))
            .bind(&t.reason)
            .bind(t.at_ms)
            .execute(&mut *write.tx)
            .await?;
            if done.rows_affected() == 1 {
                let body = log::body("takedown", &TakedownRecord::of(&t))?;
                log::append(
                    &mut write,
                    self.home(),
                    "takedown",
                    &t.doc.to_string(),
                    &body,
                )
                .await?;
            }
        }
        write.commit().await?;
        self.flush().await
    }

    /// All takedowns, oldest first.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn takedowns(&self) -> Result<Vec<Takedown>, StoreError> {
        let rows = sqlx::query("SELECT * FROM takedown ORDER BY at_ms, doc")
            .fetch_all(self.pool())
            .await?;
        rows.iter()
            .map(|row| {
                Ok(Takedown {
                    doc: digest_of(row, "doc")?,
                    via: crate::ledger::digest_opt(row, "via")?,
                    reason: row.try_get("reason")?,
                    at_ms: row.try_get("at_ms")?,
                })
            })
            .collect()
    }

    /// The documents `artifact` is exposed to that were taken down or are
    /// near-duplicates of such, sorted; empty when it may be released. Near-
    /// duplicates found after the takedown count.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn open_takedowns(&self, artifact: &Digest) -> Result<Vec<Digest>, StoreError> {
        let down: Vec<Digest> = self.takedowns().await?.into_iter().map(|t| t.doc).collect();
        if down.is_empty() {
            return Ok(Vec::new());
        }
        let down = self.sibling_closure(&down).await?;
        let ancestors = self.graph().await?.ancestors(*artifact);
        let mut open = BTreeSet::new();
        for row in self
            .matching("exposure", "artifact, doc", "doc", texts(&down))
            .await?
        {
            if ancestors.contains(&digest_of(&row, "artifact")?) {
                open.insert(digest_of(&row, "doc")?);
            }
        }
        Ok(open.into_iter().collect())
    }
}

fn texts(digests: &BTreeSet<Digest>) -> impl Iterator<Item = String> {
    digests.iter().map(ToString::to_string)
}
