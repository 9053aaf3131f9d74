//! Traces both ways, takedowns and what they reach.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::*;

use ashlar_core::{ArtifactKind as Kind, Digest};
use ashlar_store::{Exposure, Release, Stage, Store, StoreError, Trace};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn kinds(trace: &Trace, kind: &str) -> usize {
    trace.nodes.iter().filter(|n| n.kind == kind).count()
}

fn has(trace: &Trace, id: impl ToString) -> bool {
    trace.nodes.iter().any(|n| n.id == id.to_string())
}

#[tokio::test]
async fn a_response_is_traced_to_its_documents() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let w = world(&store).await;
    let mut trace = store.trace("resp-1").await.unwrap();
    assert_eq!(trace.root, "resp-1");
    assert_eq!(trace.nodes[0].kind, "response");
    for id in [&w.base, &w.snapshot, &w.adapter, &w.model] {
        assert!(has(&trace, id));
    }
    assert_eq!(
        (
            kinds(&trace, "document"),
            kinds(&trace, "run"),
            kinds(&trace, "release")
        ),
        (3, 4, 1)
    );
    assert!(!has(&trace, w.other) && !has(&trace, doc("d")));

    trace.rank_documents(&[("hb-b".into(), "ten days".into())]);
    let text = trace.to_text();
    let order = [
        "response resp-1",
        "release prod",
        "model merge",
        "run merge",
        "adapter train",
        "run train",
        "pack",
        "snapshot curate",
        "hb-b, About b — shares \"ten days\"",
        "hb-a, About a",
    ];
    let mut at = 0;
    for part in order {
        at += text[at..]
            .find(part)
            .unwrap_or_else(|| panic!("{part:?} is not after the others in\n{text}"));
    }
    assert!(text.contains("exposed to 3 documents"), "{text}");
    assert!(
        text.contains("exposed to 2 documents, listed above"),
        "{text}"
    );
    assert!(!text.contains("caused by"), "{text}");
    assert_eq!(text, {
        let mut again = store.trace("resp-1").await.unwrap();
        again.rank_documents(&[("hb-b".into(), "ten days".into())]);
        again.to_text()
    });

    let dot = trace.to_dot();
    assert!(dot.starts_with("digraph") && dot.matches('{').count() == dot.matches('}').count());
    let json = serde_json::to_value(&trace).unwrap();
    assert_eq!(json["nodes"].as_array().unwrap().len(), trace.nodes.len());
    assert!(
        json["edges"]
            .as_array()
            .unwrap()
            .iter()
            .any(|e| e["role"] == "exposed")
    );
}

#[tokio::test]
async fn a_document_is_traced_to_the_responses() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let w = world(&store).await;
    // By a dropped near-duplicate, by its id in the corpus, its digest and a prefix.
    let a3 = doc("a3");
    for id in [
        "hb-a3",
        &a3.to_string(),
        &a3.hex(),
        &a3.hex()[..8],
        &a3.to_string()[..14],
    ] {
        let trace = store.trace(id).await.unwrap();
        assert_eq!(trace.root, a3.to_string());
        for id in [
            doc("a").to_string(),
            w.model.to_string(),
            w.release.clone(),
            "resp-1".into(),
        ] {
            assert!(has(&trace, &id), "{id}");
        }
        let text = trace.to_text();
        assert!(
            text.contains("near-duplicate: document hb-a, About a") && text.contains("response"),
            "{text}"
        );
    }
    let alone = store.trace("hb-d").await.unwrap();
    assert!(has(&alone, w.other) && !has(&alone, w.model));
    // The middle looks both ways.
    for id in [w.adapter.to_string(), w.release.clone()] {
        let trace = store.trace(&id).await.unwrap();
        assert!(has(&trace, doc("c")) && has(&trace, "resp-1"), "{id}");
    }
    // The base model was exposed to nothing of ours.
    let base = store.trace(&w.base.hex()[..10]).await.unwrap();
    assert_eq!(kinds(&base, "document"), 0);
    assert!(has(&base, "resp-1"));
}

#[tokio::test]
async fn unclear_ids_are_told() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    world(&store).await;
    for id in ["nothing", "abc", "sha256:", "", "ffffffffffff"] {
        assert!(
            matches!(store.trace(id).await, Err(StoreError::NotFound(_))),
            "{id:?}"
        );
    }
    // Two documents of one corpus id.
    let mut twin = seen("b");
    twin.doc = doc("b, edited");
    store.observe(&[twin.clone()]).await.unwrap();
    let Err(StoreError::Ambiguous { candidates, .. }) = store.trace("hb-b").await else {
        panic!()
    };
    let mut want = [doc("b").to_string(), twin.doc.to_string()];
    want.sort();
    assert_eq!(candidates, want);
    assert!(matches!(
        store.document("hb-b").await,
        Err(StoreError::Ambiguous { .. })
    ));
    // Two artifacts of one prefix: search for a pair of digests that share 6 digits
    // is long, so the ledger is asked with documents that are made to.
    let (x, y) = (
        Digest::from_bytes([0xab; 32]),
        Digest::from_bytes([[0xab; 16], [0xcd; 16]].concat().try_into().unwrap()),
    );
    store.siblings(&[(x, y)]).await.unwrap();
    assert!(matches!(
        store.trace("abababab").await,
        Err(StoreError::Ambiguous { .. })
    ));
    assert_eq!(store.trace(&x.hex()).await.unwrap().root, x.to_string());
}

#[tokio::test]
async fn long_lists_are_cut_in_text_but_not_in_json() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let names: Vec<String> = (0..40).map(|i| format!("n{i:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut observations: Vec<_> = names.iter().map(|n| seen(n)).collect();
    observations[0].title = "red\u{1b}[31m\nalert".into();
    store.observe(&observations).await.unwrap();
    let made = make(&store, "curate", Kind::Snapshot, &[], b"s", &names)
        .await
        .outputs["out"];
    let mut trace = store.trace(&made.to_string()).await.unwrap();
    assert_eq!(kinds(&trace, "document"), 40);
    let text = trace.to_text();
    assert!(
        text.contains("exposed to 40 documents") && text.contains("└─ and 28 more"),
        "{text}"
    );
    assert_eq!(text.matches("hb-n").count(), 12);
    assert!(!text.contains('\u{1b}'));
    assert!(trace.to_dot().contains("and 28 more"));
    trace.rank_documents(&[
        (doc("n39").to_string(), "x".into()),
        ("hb-n38".into(), "y".into()),
        ("none".into(), "z".into()),
    ]);
    let docs: Vec<_> = trace
        .nodes
        .iter()
        .filter(|n| n.kind == "document")
        .map(|n| n.id.clone())
        .collect();
    assert_eq!(
        (docs.len(), &docs[0], &docs[1], &docs[2]),
        (
            40,
            &doc("n39").to_string(),
            &doc("n38").to_string(),
            &doc("n00").to_string()
        )
    );
}

#[tokio::test]
async fn a_takedown_closes_over_siblings_and_lineage() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let w = world(&store).await;
    assert!(store.open_takedowns(&w.model).await.unwrap().is_empty());
    let before = store.exposed_to(&[doc("a3")]).await.unwrap();
    assert_eq!(before.documents.len(), 3);
    assert_eq!((before.runs.len(), before.artifacts.len()), (4, 4));
    assert_eq!(
        (&before.releases, &before.responses),
        (&vec![w.release.clone()], &vec!["resp-1".to_string()])
    );
    assert!(!before.artifacts.contains(&w.base) && !before.artifacts.contains(&w.other));
    assert!(!store.current("prod").await.unwrap().unwrap().revoked);

    store
        .takedown(&[doc("a3")], "asked by its author")
        .await
        .unwrap();
    store.takedown(&[doc("a3")], "again").await.unwrap();
    let down = store.takedowns().await.unwrap();
    let docs: BTreeSet<_> = down.iter().map(|t| t.doc).collect();
    assert_eq!(docs, ["a", "a2", "a3"].map(doc).into());
    assert!(down.iter().all(|t| t.reason == "asked by its author" && (t.via.is_none()) == (t.doc == doc("a3"))));
    assert_eq!(store.open_takedowns(&w.model).await.unwrap(), [doc("a")]);
    assert!(store.open_takedowns(&w.other).await.unwrap().is_empty());
    assert!(store.open_takedowns(&w.base).await.unwrap().is_empty());
    assert!(store.current("prod").await.unwrap().unwrap().revoked);
    assert_eq!(
        store
            .document("hb-a")
            .await
            .unwrap()
            .unwrap()
            .taken_down
            .as_deref(),
        Some("asked by its author")
    );

    let statement = store
        .put_bytes(Kind::Report, "statement.json", b"{}")
        .await
        .unwrap();
    let refused = store
        .release("prod", &Release::new(w.model, statement))
        .await;
    assert!(
        matches!(refused, Err(StoreError::OpenTakedown { ref docs, .. }) if *docs == [doc("a")]),
        "{refused:?}"
    );
    // Rebuilt without it, the gate opens.
    let clean = make(
        &store,
        "curate again",
        Kind::Snapshot,
        &[],
        b"snapshot 2",
        &["b", "c"],
    )
    .await
    .outputs["out"];
    let model = make(
        &store,
        "train again",
        Kind::Model,
        &[("base", w.base), ("pack", clean)],
        b"model 2",
        &[],
    )
    .await;
    let id = store
        .release("prod", &Release::new(model.outputs["out"], statement))
        .await
        .unwrap();
    assert_eq!(store.current("prod").await.unwrap().unwrap().id, id);
    // A near-duplicate found later is reached by the same takedown.
    store.siblings(&[(doc("c"), doc("a"))]).await.unwrap();
    assert_eq!(
        store.open_takedowns(&model.outputs["out"]).await.unwrap(),
        [doc("c")]
    );
    assert_eq!(
        store
            .releases()
            .await
            .unwrap()
            .iter()
            .map(|r| r.revoked)
            .collect::<Vec<_>>(),
        [true, true]
    );
    let report = store.verify_ledger().await.unwrap();
    assert!(report.ok, "{:?}", report.faults);
}

#[tokio::test]
async fn a_release_wants_stored_artifacts() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let statement = store.put_bytes(Kind::Report, "s", b"{}").await.unwrap();
    let got = store
        .release("prod", &Release::new(Digest::of(b"?"), statement))
        .await;
    assert!(
        matches!(got, Err(StoreError::UnknownArtifact { what: "model", .. })),
        "{got:?}"
    );
    assert!(store.current("prod").await.unwrap().is_none());
}

/// A random pipeline: each run reads earlier artifacts and makes one.
#[derive(Debug, Clone)]
struct Pipeline {
    /// By run: indexes of what it reads (modulo what there is), documents its output holds.
    runs: Vec<(Vec<usize>, Vec<u8>)>,
    siblings: Vec<(u8, u8)>,
    asked: u8,
}

fn pipelines() -> impl Strategy<Value = Pipeline> {
    let run = (
        prop::collection::vec(any::<usize>(), 0..3),
        prop::collection::vec(0..8u8, 0..3),
    );
    (
        prop::collection::vec(run, 1..9),
        prop::collection::vec((0..8u8, 0..8u8), 0..5),
        0..8u8,
    )
        .prop_map(|(runs, siblings, asked)| Pipeline {
            runs,
            siblings,
            asked,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]
    /// The closure equals a fixed point computed the plain way, and its two
    /// directions agree.
    #[test]
    fn closures_agree_with_a_plain_fixed_point(p in pipelines()) {
        let home = tempfile::tempdir().unwrap();
        let name = |i: u8| Digest::of(&[b'd', i]);
        let mut docs = BTreeSet::from([p.asked]);
        let mut exposed = vec![false; p.runs.len()];
        let reads = |i: usize| p.runs[i].0.iter().filter_map(move |r| (i > 0).then(|| r % i));
        for _ in 0..20 {
            for (a, b) in &p.siblings {
                if docs.contains(a) || docs.contains(b) {
                    docs.extend([*a, *b]);
                }
            }
        }
        for i in 0..p.runs.len() {
            exposed[i] = p.runs[i].1.iter().any(|d| docs.contains(d)) || reads(i).any(|r| exposed[r]);
        }
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = Store::open(home.path()).await.unwrap();
            let edges: Vec<_> = p.siblings.iter().map(|(a, b)| (name(*a), name(*b))).collect();
            store.siblings(&edges).await.unwrap();
            let mut made: Vec<Digest> = Vec::new();
            for (i, (_, holds)) in p.runs.iter().enumerate() {
                let inputs: Vec<(&str, Digest)> = reads(i).map(|r| ("in", made[r])).collect();
                let Stage::Run(mut run) = store.stage(&format!("r{i}"), &(), &inputs, "1").await.unwrap() else { panic!() };
                let out = run.output_bytes("out", Kind::Snapshot, "o", &[i as u8]).await.unwrap();
                let holds: Vec<_> = holds.iter().map(|d| Exposure { doc: name(*d), samples: 1 }).collect();
                run.exposed(out, &holds).await.unwrap();
                run.finish(serde_json::json!({})).await.unwrap();
                made.push(out);
            }
            let got = store.exposed_to(&[name(p.asked)]).await.unwrap();
            let want: BTreeSet<_> = made.iter().zip(&exposed).filter(|(_, e)| **e).map(|(d, _)| *d).collect();
            assert_eq!(got.artifacts.iter().copied().collect::<BTreeSet<_>>(), want);
            assert_eq!(got.documents.iter().copied().collect::<BTreeSet<_>>(), docs.iter().map(|d| name(*d)).collect());
            store.takedown(&[name(p.asked)], "r").await.unwrap();
            for (digest, exposed) in made.iter().zip(&exposed) {
                assert_eq!(!store.open_takedowns(digest).await.unwrap().is_empty(), *exposed);
            }
            let report = store.verify_ledger().await.unwrap();
            assert!(report.ok, "{:?}", report.faults);
        });
    }
}
