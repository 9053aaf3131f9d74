//! A small world that several tests look at.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use ashlar_core::{ArtifactKind as Kind, Digest};
use ashlar_store::{Admission, Exposure, Observation, Outcome, Release, Settlement, Stage, Store};
use serde_json::json;
use sqlx::{SqlitePool, sqlite::SqliteConnectOptions};
use std::path::Path;

pub fn doc(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

pub fn seen(name: &str) -> Observation {
    Observation {
        doc: doc(name),
        source: "handbook.jsonl".into(),
        id: format!("hb-{name}"),
        title: format!("About {name}"),
        licence: Some("CC0-1.0".into()),
        consent: "unknown".into(),
        lang: Some("en".into()),
    }
}

pub fn exposures(names: &[&str]) -> Vec<Exposure> {
    names
        .iter()
        .map(|n| Exposure {
            doc: doc(n),
            samples: 2,
        })
        .collect()
}

/// Runs the stage `name`, whose one output `out` has `bytes` and holds `docs`.
pub async fn make(
    store: &Store,
    name: &str,
    kind: Kind,
    inputs: &[(&str, Digest)],
    bytes: &[u8],
    docs: &[&str],
) -> Outcome {
    match store
        .stage(name, &json!({ "n": name }), inputs, "1")
        .await
        .unwrap()
    {
        Stage::Reused(outcome) => outcome,
        Stage::Run(mut run) => {
            let made = run.output_bytes("out", kind, name, bytes).await.unwrap();
            if !docs.is_empty() {
                run.exposed(made, &exposures(docs)).await.unwrap();
            }
            run.finish(json!({ "size": bytes.len() })).await.unwrap()
        }
    }
}

pub fn admission(id: &str, release: Option<&str>) -> Admission {
    Admission {
        id: id.into(),
        release: release.map(Into::into),
        model: "quickstart".into(),
        backend: "local".into(),
        endpoint: "/v1/chat/completions".into(),
        at_ms: 1_700_000_000_000,
        seed: Some(u64::MAX - 1),
        stream: true,
    }
}

pub fn stop() -> Settlement {
    Settlement {
        finish: "stop".into(),
        prompt_tokens: 30,
        cached_tokens: 8,
        completion_tokens: 12,
        total_ms: 80.5,
        answer: Some("Ten days.".into()),
        ..Settlement::default()
    }
}

pub struct World {
    pub base: Digest,
    pub snapshot: Digest,
    pub adapter: Digest,
    pub model: Digest,
    pub other: Digest,
    pub release: String,
}

/// documents a, b, c → snapshot → pack → adapter (with base) → model → release
/// → response `resp-1`; `a2` and `a3` are near-duplicates of `a`; document d is
/// only in `other`.
pub async fn world(store: &Store) -> World {
    store
        .observe(&["a", "a2", "a3", "b", "c", "d"].map(seen))
        .await
        .unwrap();
    store
        .siblings(&[(doc("a2"), doc("a")), (doc("a3"), doc("a2"))])
        .await
        .unwrap();
    let base = store
        .put_bytes(Kind::Model, "base.gguf", b"base")
        .await
        .unwrap();
    let out = |o: &Outcome| o.outputs["out"];
    let snapshot = out(&make(
        store,
        "curate",
        Kind::Snapshot,
        &[],
        b"snapshot",
        &["a", "b", "c"],
    )
    .await);
    let pack = out(&make(
        store,
        "pack",
        Kind::Pack,
        &[("snapshot", snapshot)],
        b"pack",
        &["a", "b"],
    )
    .await);
    let adapter = out(&make(
        store,
        "train",
        Kind::Adapter,
        &[("base", base), ("pack", pack)],
        b"adapter",
        &[],
    )
    .await);
    let model = out(&make(
        store,
        "merge",
        Kind::Model,
        &[("adapter", adapter), ("base", base)],
        b"model",
        &[],
    )
    .await);
    let other = out(&make(store, "other", Kind::Snapshot, &[], b"other", &["d"]).await);
    let statement = store
        .put_bytes(Kind::Report, "statement.json", b"{}")
        .await
        .unwrap();
    let mut r = Release::new(model, statement);
    r.adapter = Some(adapter);
    r.snapshot = Some(snapshot);
    let release = store.release("prod", &r).await.unwrap();
    store
        .admit(&admission("resp-1", Some(&release)))
        .await
        .unwrap();
    store.settle("resp-1", &stop()).await.unwrap();
    World {
        base,
        snapshot,
        adapter,
        model,
        other,
        release,
    }
}

/// The ledger behind the store's back.
pub async fn ledger(home: &Path) -> SqlitePool {
    SqlitePool::connect_with(SqliteConnectOptions::new().filename(home.join("ledger.db")))
        .await
        .unwrap()
}

/// Overwrites the read-only object of `digest`.
pub fn overwrite(store: &Store, digest: &Digest, bytes: &[u8]) {
    let path = store.path(digest).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
}
