//! The transparency log and what it catches.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;
use common::*;

use ashlar_core::Digest;
use ashlar_store::{Store, StoreError};
use sha2::{Digest as _, Sha256};
use std::fs;

/// RFC 6962 §2.1, word for word.
fn mth(leaves: &[Vec<u8>]) -> [u8; 32] {
    match leaves {
        [] => Sha256::digest(b"").into(),
        [one] => Sha256::digest([&[0], &one[..]].concat()).into(),
        many => {
            let k = 1 << (many.len() - 1).ilog2();
            Sha256::digest([&[1], &mth(&many[..k])[..], &mth(&many[k..])].concat()).into()
        }
    }
}

#[tokio::test]
async fn roots_are_those_of_rfc_6962() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let mut leaves = Vec::new();
    for i in 0..70u64 {
        assert_eq!(
            store.log_root().await.unwrap(),
            (i, Digest::from_bytes(mth(&leaves)))
        );
        leaves.push(format!("entry {i}").into_bytes());
        assert_eq!(store.log_append(&leaves[i as usize]).await.unwrap(), i);
    }
    assert!(store.verify_ledger().await.unwrap().ok);
}

#[tokio::test]
async fn each_tampering_is_reported() {
    let tamperings = [
        (
            "UPDATE artifact SET name = 'harmless' WHERE kind = 'adapter'",
            "the row differs",
        ),
        (
            "UPDATE artifact SET bytes = bytes + 1 WHERE kind = 'pack'",
            "the row differs",
        ),
        (
            "UPDATE run SET settings = '{}' WHERE name = 'train'",
            "the row differs",
        ),
        (
            "UPDATE run SET summary = '{}' WHERE name = 'train'",
            "the row differs",
        ),
        (
            "DELETE FROM run_input WHERE role = 'pack'",
            "the row differs",
        ),
        (
            "DELETE FROM exposure WHERE doc LIKE 'sha256:%' AND samples = 2",
            "the row differs",
        ),
        ("UPDATE release SET created_ms = 0", "the row differs"),
        ("DELETE FROM release", "is in the log but not in the ledger"),
        (
            "DELETE FROM takedown",
            "is in the log but not in the ledger",
        ),
        ("UPDATE takedown SET reason = 'none'", "the row differs"),
        (
            "INSERT INTO takedown VALUES ('sha256:0000000000000000000000000000000000000000000000000000000000000000', NULL, 'r', 1)",
            "has no log entry",
        ),
        (
            "UPDATE log_entry SET body = x'7b7d' WHERE seq = 3",
            "the entries give the root",
        ),
        ("DELETE FROM log_entry WHERE seq = 2", "entry 2 is missing"),
        (
            "DELETE FROM log_entry WHERE seq = (SELECT MAX(seq) FROM log_entry)",
            "the root is over",
        ),
    ];
    for (sql, want) in tamperings {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).await.unwrap();
        world(&store).await;
        store.takedown(&[doc("d")], "asked").await.unwrap();
        let report = store.verify_ledger().await.unwrap();
        assert!(
            report.ok && report.entries > 10 && report.objects == 7,
            "{report:?}"
        );
        let done = sqlx::query(sql)
            .execute(&ledger(home.path()).await)
            .await
            .unwrap();
        assert!(done.rows_affected() > 0, "{sql}");
        let report = store.verify_ledger().await.unwrap();
        assert!(
            !report.ok && report.faults.iter().any(|f| f.contains(want)),
            "{sql}: {:?}",
            report.faults
        );
    }
}

#[tokio::test]
async fn files_that_lag_are_repaired_and_a_rolled_back_ledger_is_not_hidden() {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).await.unwrap();
    store.log_append(b"zero").await.unwrap();
    drop(store);
    let copy = tempfile::tempdir().unwrap();
    let old = ledger(home.path()).await;
    sqlx::query("VACUUM INTO $1")
        .bind(copy.path().join("old.db").to_str().unwrap())
        .execute(&old)
        .await
        .unwrap();
    old.close().await;
    let store = Store::open(home.path()).await.unwrap();
    world(&store).await;
    drop(store);
    for damage in [&b""[..], b"short", &[7; 32 * 100]] {
        fs::write(home.path().join("log/hashes"), damage).unwrap();
        fs::remove_file(home.path().join("log/checkpoint")).unwrap();
        let store = Store::open(home.path()).await.unwrap();
        let report = store.verify_ledger().await.unwrap();
        assert!(report.ok, "{:?}", report.faults);
        store.log_append(b"goes on").await.unwrap();
        assert!(store.verify_ledger().await.unwrap().ok);
        // A connection that closes late would write into the file put there.
        store.close().await;
    }
    for side in ["ledger.db-wal", "ledger.db-shm"] {
        let _ = fs::remove_file(home.path().join(side));
    }
    fs::copy(copy.path().join("old.db"), home.path().join("ledger.db")).unwrap();
    let store = Store::open(home.path()).await.unwrap();
    let report = store.verify_ledger().await.unwrap();
    assert!(
        report
            .faults
            .iter()
            .any(|f| f.contains("replaced by an older")),
        "{:?}",
        report.faults
    );
}

#[tokio::test]
async fn a_newer_ledger_is_refused() {
    let home = tempfile::tempdir().unwrap();
    drop(Store::open(home.path()).await.unwrap());
    sqlx::query("INSERT INTO schema_version VALUES (99)")
        .execute(&ledger(home.path()).await)
        .await
        .unwrap();
    let got = Store::open(home.path()).await.map(|_| ());
    assert!(
        matches!(got, Err(StoreError::Schema { found: 99, .. })),
        "{got:?}"
    );
}
