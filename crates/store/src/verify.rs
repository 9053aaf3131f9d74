//! The check of a whole home: log against ledger against object files.
//!
//! It reads and reports; it repairs nothing.

use crate::{
    StoreError,
    ledger::{Store, artifact_of},
    lineage::TakedownRecord,
    log::{self, Nodes},
    object::{self, TEMP_PREFIX},
    release::release_of,
    run,
};
use ashlar_core::Digest;
use serde::Serialize;
use std::{collections::BTreeMap, fs, path::Path};
use tlog_tiles::tlog::tree_hash;

/// What [`Store::verify_ledger`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LedgerReport {
    /// Entries of the log.
    pub entries: u64,
    /// Object files whose bytes were hashed.
    pub objects: u64,
    /// Whether there is no fault.
    pub ok: bool,
    /// One line for each fault.
    pub faults: Vec<String>,
}

impl Store {
    /// Recomputes the log's tree from its entries, compares it with the stored
    /// root, the node file and the checkpoint; checks that each artifact,
    /// finished run, release and takedown is what its entry says, and that no
    /// entry lacks its row; hashes each object file.
    ///
    /// # Errors
    /// When something cannot be read at all; what can be read and is wrong is a
    /// fault in the report.
    pub async fn verify_ledger(&self) -> Result<LedgerReport, StoreError> {
        let mut faults = Vec::new();
        let entries: Vec<(i64, String, String, Vec<u8>)> =
            sqlx::query_as("SELECT seq, kind, subject, body FROM log_entry ORDER BY seq")
                .fetch_all(self.pool())
                .await?;
        self.check_tree(&entries, &mut faults).await?;
        self.check_rows(&entries, &mut faults).await?;
        let objects = self.check_objects(&mut faults).await?;
        Ok(LedgerReport {
            entries: entries.len() as u64,
            objects,
            ok: faults.is_empty(),
            faults,
        })
    }

    async fn check_tree(
        &self,
        entries: &[(i64, String, String, Vec<u8>)],
        faults: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        let mut nodes = Nodes::default();
        for (n, (seq, _, _, body)) in (0..).zip(entries) {
            if *seq != n as i64 {
                faults.push(format!("log: entry {n} is missing, entry {seq} follows"));
                return Ok(());
            }
            nodes.push(n, body)?;
        }
        let found = Digest::from_bytes(tree_hash(entries.len() as u64, &nodes)?.0);
        let (size, root) = self.log_root().await?;
        if size != entries.len() as u64 {
            faults.push(format!(
                "log: the root is over {size} entries, there are {}",
                entries.len()
            ));
        } else if found != root {
            faults.push(format!(
                "log: the entries give the root {found}, stored is {root}"
            ));
        }
        let path = self.home().join("log/hashes");
        let on_disk = fs::read(&path).map_err(StoreError::io(&path))?;
        let want = nodes.bytes();
        if on_disk.get(..want.len()) != Some(&want[..]) {
            faults.push("log: log/hashes does not hold the tree over the entries".into());
        }
        let path = self.home().join("log/checkpoint");
        if !path.exists() || !log::checkpoint_holds(self.home(), size)? {
            faults.push(format!(
                "log: log/checkpoint is not a head this log of {size} entries ever had"
            ));
        }
        if self.home().join("log/checkpoint.contradicted").exists() {
            faults.push("log: log/checkpoint.contradicted: the ledger was once replaced by an older or other one".into());
        }
        Ok(())
    }

    async fn check_rows(
        &self,
        entries: &[(i64, String, String, Vec<u8>)],
        faults: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        let mut logged: BTreeMap<(&str, String), &[u8]> = BTreeMap::new();
        for (seq, kind, subject, body) in entries {
            if kind != "note" && logged.insert((kind, subject.clone()), body).is_some() {
                faults.push(format!(
                    "log: entry {seq} is a second one for {kind} {subject}"
                ));
            }
        }
        let mut check =
            |kind: &'static str, subject: &str, body: Result<Vec<u8>, StoreError>| match (
                logged.remove(&(kind, subject.to_string())),
                body,
            ) {
                (None, _) => faults.push(format!("{kind} {subject}: has no log entry")),
                (_, Err(e)) => faults.push(format!("{kind} {subject}: {e}")),
                (Some(entry), Ok(body)) if entry != body => {
                    faults.push(format!(
                        "{kind} {subject}: the row differs from its log entry"
                    ));
                }
                _ => {}
            };
        for row in sqlx::query("SELECT * FROM artifact ORDER BY digest")
            .fetch_all(self.pool())
            .await?
        {
            let subject: String = sqlx::Row::try_get(&row, "digest")?;
            check(
                "artifact",
                &subject,
                artifact_of(&row).and_then(|a| log::body("artifact", &a)),
            );
        }
        for record in run::records(self).await? {
            check("run", &record.id, log::body("run", &record));
        }
        for row in sqlx::query("SELECT * FROM release ORDER BY seq")
            .fetch_all(self.pool())
            .await?
        {
            let subject: String = sqlx::Row::try_get(&row, "id")?;
            check(
                "release",
                &subject,
                release_of(&row).and_then(|r| log::body("release", &r)),
            );
        }
        for t in self.takedowns().await? {
            check(
                "takedown",
                &t.doc.to_string(),
                log::body("takedown", &TakedownRecord::of(&t)),
            );
        }
        for (kind, subject) in logged.into_keys() {
            faults.push(format!(
                "{kind} {subject}: is in the log but not in the ledger"
            ));
        }
        Ok(())
    }

    async fn check_objects(&self, faults: &mut Vec<String>) -> Result<u64, StoreError> {
        let (count, found) = self
            .blocking(Path::new(""), |objects, _| {
                let (mut count, mut found) = (0, Vec::new());
                object::walk(&objects.0, &mut |path| {
                    let name = path
                        .file_name()
                        .and_then(|n| n.to_str())
                        .unwrap_or_default();
                    if name.starts_with(TEMP_PREFIX) {
                        return Ok(());
                    }
                    let (digest, _) = object::hash_file(path)?;
                    count += 1;
                    if digest.hex() != name || objects.at(&digest) != path {
                        found.push(format!("object {name}: its bytes hash to {digest}"));
                    }
                    Ok(())
                })?;
                Ok((count, found))
            })
            .await?;
        faults.extend(found);
        for row in sqlx::query("SELECT * FROM artifact ORDER BY digest")
            .fetch_all(self.pool())
            .await?
        {
            match artifact_of(&row) {
                Ok(a) if !self.intact(&a) => {
                    faults.push(format!(
                        "artifact {} ({}, {:?}): its objects are missing or of another size",
                        a.digest, a.kind, a.name
                    ));
                }
                _ => {}
            }
        }
        Ok(count)
    }
}
