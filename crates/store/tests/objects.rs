//! Objects: whole or absent, never changed.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::*;

use ashlar_core::{ArtifactKind as Kind, Digest};
use ashlar_store::{Store, StoreError};
use proptest::prelude::*;
use std::{collections::BTreeMap, fs, path::Path};

#[tokio::test]
async fn bytes_files_and_folders_come_back() {
    let (home, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Store::open(home.path()).await.unwrap();
    let by_bytes = store.put_bytes(Kind::Source, "x", b"stone").await.unwrap();
    assert_eq!(by_bytes, Digest::of(b"stone"));
    let file = work.path().join("f");
    fs::write(&file, b"stone").unwrap();
    assert_eq!(
        store.put_file(Kind::Model, "y", &file).await.unwrap(),
        by_bytes
    );
    assert!(file.exists(), "the source stays");
    let artifact = store.artifact(&by_bytes).await.unwrap().unwrap();
    assert_eq!(
        (artifact.kind, &*artifact.name, artifact.bytes),
        (Kind::Source, "x", 5)
    );
    let path = store.path(&by_bytes).unwrap();
    assert!(fs::metadata(&path).unwrap().permissions().readonly());
    assert!(store.path(&Digest::of(b"?")).is_none());
    store
        .materialize(&by_bytes, &work.path().join("out/copy"))
        .await
        .unwrap();
    assert_eq!(fs::read(work.path().join("out/copy")).unwrap(), b"stone");
    assert_eq!(store.log_root().await.unwrap().0, 1, "one thing, one entry");
}

#[tokio::test]
async fn damage_is_seen() {
    let (home, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Store::open(home.path()).await.unwrap();
    fs::create_dir(work.path().join("d")).unwrap();
    fs::write(work.path().join("d/a"), b"one").unwrap();
    let dir = store
        .put_dir(Kind::Model, "d", &work.path().join("d"))
        .await
        .unwrap();
    overwrite(&store, &Digest::of(b"one"), b"two");
    let got = store.materialize(&dir, &work.path().join("e")).await;
    assert!(matches!(got, Err(StoreError::Damaged { .. })), "{got:?}");
    assert!(!work.path().join("e/a").exists());
    let report = store.verify_ledger().await.unwrap();
    assert!(!report.ok);
    assert_eq!(report.faults.len(), 1, "{:?}", report.faults);
    assert!(
        report.faults[0].contains(&Digest::of(b"one").hex()),
        "{:?}",
        report.faults
    );
    // A manifest that leaves its folder is refused even when its digest is right.
    let evil = format!(
        r#"{{"files":[{{"bytes":3,"digest":"{}","path":"../x"}}]}}"#,
        Digest::of(b"two")
    );
    let evil = store
        .put_bytes(Kind::Model, "evil", evil.as_bytes())
        .await
        .unwrap();
    sqlx::query("UPDATE artifact SET form = 'folder' WHERE digest = $1")
        .bind(evil.to_string())
        .execute(&ledger(home.path()).await)
        .await
        .unwrap();
    let got = store.materialize(&evil, &work.path().join("g")).await;
    assert!(matches!(got, Err(StoreError::Damaged { .. })), "{got:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn links_are_refused() {
    let (home, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let store = Store::open(home.path()).await.unwrap();
    std::os::unix::fs::symlink("/etc/hostname", work.path().join("link")).unwrap();
    let got = store.put_dir(Kind::Model, "d", work.path()).await;
    assert!(matches!(got, Err(StoreError::Unstorable { .. })), "{got:?}");
}

#[tokio::test]
async fn a_killed_writers_rest_is_swept() {
    let home = tempfile::tempdir().unwrap();
    let rest = home.path().join("objects/sha256/ab/.tmp-dead");
    drop(Store::open(home.path()).await.unwrap());
    fs::create_dir_all(rest.parent().unwrap()).unwrap();
    fs::write(&rest, b"half").unwrap();
    let first = Store::open(home.path()).await.unwrap();
    assert!(!rest.exists());
    // Not while someone else may still be writing it.
    fs::write(&rest, b"half").unwrap();
    let second = Store::open(home.path()).await.unwrap();
    assert!(rest.exists());
    assert!(second.verify_ledger().await.unwrap().ok);
    drop((first, second));
}

fn write_tree(at: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        let path = at.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn folders_round_trip(files in prop::collection::btree_map("[a-c]/[a-z0-9 é]{1,8}", prop::collection::vec(any::<u8>(), 0..300), 0..8)) {
        let (home, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            let store = Store::open(home.path()).await.unwrap();
            let (from, to) = (work.path().join("from"), work.path().join("to"));
            fs::create_dir(&from).unwrap();
            write_tree(&from, &files);
            let digest = store.put_dir(Kind::Snapshot, "d", &from).await.unwrap();
            store.materialize(&digest, &to).await.unwrap();
            for (name, bytes) in &files {
                assert_eq!(&fs::read(to.join(name)).unwrap(), bytes);
            }
            assert_eq!(store.put_dir(Kind::Snapshot, "d", &to).await.unwrap(), digest);
            assert!(store.verify_ledger().await.unwrap().ok);
        });
    }
}
