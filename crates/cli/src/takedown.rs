//! `ashlar takedown`: withdraw a document and everything near it.

use crate::out;
use anyhow::{Context, Result};
use ashlar_core::ArtifactKind;
use ashlar_store::Store;
use serde_json::json;
use std::{collections::BTreeSet, path::Path};

/// How many ids of a kind the terminal shows; `--json` has them all.
const SHOWN: usize = 8;

/// Marks the document and its near-duplicates, unless `dry_run`, and says what
/// was exposed to them.
pub(crate) async fn run(home: &Path, id: &str, reason: &str, dry_run: bool, as_json: bool) -> Result<()> {
    let store = Store::open(home).await?;
    let document = store
        .document(id)
        .await?
        .with_context(|| format!("no document {id:?} in {}; `ashlar trace` shows the ids a response stands on", home.display()))?;
    let exposed = store.exposed_to(&[document.doc]).await?;
    if !dry_run {
        store.takedown(&[document.doc], reason).await?;
        forbid(&store, &exposed.documents, &exposed.artifacts).await?;
    }
    if as_json {
        return out::json(&json!({"document": document, "exposed": exposed, "reason": reason, "dry_run": dry_run}));
    }
    out::line(format!(
        "{} {} and {} near-duplicates",
        if dry_run { "would take down" } else { "taken down:" },
        document.doc,
        exposed.documents.len().saturating_sub(1)
    ));
    let digests = |d: &[ashlar_core::Digest]| d.iter().map(ToString::to_string).collect::<Vec<_>>();
    for (what, ids) in [
        ("documents", digests(&exposed.documents)),
        ("runs", exposed.runs.clone()),
        ("artifacts", digests(&exposed.artifacts)),
        ("releases", exposed.releases.clone()),
        ("responses", exposed.responses.clone()),
    ] {
        out::line(format!("  {what:<10} {}", ids.len()));
        for id in ids.iter().take(SHOWN) {
            out::line(format!("    {id}"));
        }
        if ids.len() > SHOWN {
            out::line(format!("    and {} more (--json lists all)", ids.len() - SHOWN));
        }
    }
    out::line("exposed to, not caused by: this lists what could have learned from the documents.".into());
    if !dry_run && !exposed.releases.is_empty() {
        out::line("next: `ashlar up` rebuilds and releases without them; until then the gate stays closed for these artifacts.".into());
    }
    Ok(())
}

/// Keeps hashes of what the documents say, from the snapshots that hold them, for
/// the gateway's `check = "takedown"`.
async fn forbid(store: &Store, documents: &[ashlar_core::Digest], artifacts: &[ashlar_core::Digest]) -> Result<()> {
    let mut left: BTreeSet<_> = documents.iter().copied().collect();
    for artifact in artifacts {
        if left.is_empty() {
            break;
        }
        let known = store.artifact(artifact).await?;
        if known.is_none_or(|a| a.kind != ArtifactKind::Snapshot) {
            continue;
        }
        let dir = tempfile::tempdir()?;
        let there = store.materialize(artifact, dir.path()).await.map_err(anyhow::Error::from);
        // The takedown stands, whether its text can still be read or not.
        let kept = match there.and_then(|_| Ok(ashlar_data::read_kept(dir.path())?)) {
            Ok(kept) => kept,
            Err(e) => {
                out::note(format!("warning: snapshot {artifact} cannot be read: {e:#}"));
                continue;
            }
        };
        for kept in kept {
            if left.remove(&kept.doc) {
                store.forbid(&kept.doc, &ashlar_gateway::guard::shingles(&kept.text)).await?;
            }
        }
    }
    if !left.is_empty() {
        let text = "of {} documents no snapshot holds the text: the gateway cannot look for it in answers";
        out::note(text.replace("{}", &left.len().to_string()));
    }
    Ok(())
}
