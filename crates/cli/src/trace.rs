//! `ashlar trace`, and which documents share words with an answer.
//!
//! Sharing words is shown because it helps a reader; the trace claims exposure
//! and never influence.

use crate::out;
use anyhow::{Context, Result};
use ashlar_core::Digest;
use ashlar_data::KeptDoc;
use ashlar_store::{ResponseRow, Store, Trace};
use std::path::Path;

/// Shortest shared run of words worth showing.
const MIN_WORDS: usize = 3;

/// The kept documents of a snapshot, to compare answers with.
pub(crate) struct Overlaps {
    documents: Vec<KeptDoc>,
}

impl Overlaps {
    /// Reads the kept documents of `snapshot`.
    pub(crate) async fn load(store: &Store, snapshot: &Digest) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        store.materialize(snapshot, dir.path()).await?;
        Ok(Self { documents: ashlar_data::read_kept(dir.path())? })
    }

    /// Documents that share a run of words with `answer`, longest first: digest
    /// and the shared span as the document writes it.
    pub(crate) fn rank(&self, answer: &str) -> Vec<(String, String)> {
        let mut found: Vec<_> = self
            .documents
            .iter()
            .filter_map(|d| {
                let o = ashlar_text::overlap(answer, &d.text)?;
                let span = d.text.get(o.document.clone())?;
                (span.split_whitespace().count() >= MIN_WORDS).then_some((o.chars, d.doc, span))
            })
            .collect();
        found.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        found.into_iter().map(|(_, doc, span)| (doc.to_string(), span.to_string())).collect()
    }
}

/// The trace of `id`; a response's documents are put in order of shared words.
pub(crate) async fn ranked(store: &Store, id: &str) -> Result<Trace> {
    let mut trace = store.trace(id).await?;
    if let Some(ResponseRow { admission, settlement: Some(settlement), .. }) = store.response(id).await? {
        let releases = store.releases().await?;
        let snapshot = releases.iter().find(|r| Some(&r.id) == admission.release.as_ref()).and_then(|r| r.snapshot);
        if let (Some(answer), Some(snapshot)) = (settlement.answer, snapshot) {
            trace.rank_documents(&Overlaps::load(store, &snapshot).await?.rank(&answer));
        }
    }
    Ok(trace)
}

/// Prints the trace of `id` as text, JSON or Graphviz.
pub(crate) async fn run(home: &Path, id: &str, dot: bool, as_json: bool) -> Result<()> {
    let store = Store::open(home).await?;
    let trace = ranked(&store, id).await.with_context(|| format!("tracing {id:?} in {}", home.display()))?;
    if as_json {
        return out::json(&serde_json::to_value(&trace)?);
    }
    out::line(if dot { trace.to_dot() } else { trace.to_text() });
    Ok(())
}
