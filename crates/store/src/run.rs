//! Stages and runs: the only way in which lineage comes to be.
//!
//! A stage's key is the digest of its name, resolved settings, inputs and code
//! version. A finished run of that key whose outputs are intact is reused; else
//! a new run gets the key's scratch folder, which outlives `kill -9`, so that
//! what a killed run left there can be picked up. The key's file lock keeps two
//! processes from running one stage at once: the second waits, then reuses.

use crate::{
    StoreError,
    ledger::{Artifact, Store, artifact_of, insert_artifact, new_artifact, parse_digest},
    lock::{self, Lock},
    log, object,
};
use ashlar_core::{ArtifactKind, Digest, clock, id, json};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{QueryBuilder, Row as _};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// What [`Store::stage`] found.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Stage {
    /// The same stage was run before; nothing is to be done.
    Reused(Outcome),
    /// It is to be run, or to be resumed from the run's folder.
    Run(Run),
}

/// What a finished run made.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The run's id.
    pub run: String,
    /// The stage's name.
    pub name: String,
    /// Artifacts by role.
    pub outputs: BTreeMap<String, Digest>,
    /// What the run said about itself.
    pub summary: Value,
    /// Whether it was run earlier rather than now.
    pub reused: bool,
    /// How long the run took when it ran.
    pub seconds: f64,
    /// Digest of `outputs` as canonical JSON.
    pub digest: Digest,
}

/// A document that went into an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exposure {
    /// The document.
    pub doc: Digest,
    /// In how many samples.
    pub samples: u32,
}

/// A run that is under way. Dropped without [`Run::finish`] it counts as
/// interrupted and its folder stays.
#[derive(Debug)]
pub struct Run {
    store: Store,
    id: String,
    record: Record,
    dir: PathBuf,
    artifacts: Vec<Artifact>,
    exposures: BTreeMap<Digest, BTreeMap<Digest, u64>>,
    started: Instant,
    _lock: Lock,
}

/// What the log says of a finished run.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) key: String,
    pub(crate) name: String,
    pub(crate) settings: Digest,
    pub(crate) code: String,
    pub(crate) host: String,
    pub(crate) started_ms: i64,
    pub(crate) ended_ms: i64,
    pub(crate) seconds: f64,
    pub(crate) summary: Digest,
    /// `(role, digest)`, sorted.
    pub(crate) inputs: Vec<(String, Digest)>,
    pub(crate) outputs: BTreeMap<String, Digest>,
    /// By artifact: the number of documents and the Merkle root over the lines
    /// `<document> <samples>` in order of the documents.
    pub(crate) exposures: BTreeMap<String, (u64, Digest)>,
}

/// The entry of [`Record::exposures`] for one artifact.
pub(crate) fn exposure_root(docs: &BTreeMap<Digest, u64>) -> Result<(u64, Digest), StoreError> {
    let lines: Vec<String> = docs.iter().map(|(doc, n)| format!("{doc} {n}")).collect();
    Ok((
        lines.len() as u64,
        log::merkle_root(lines.iter().map(String::as_bytes))?,
    ))
}

impl Store {
    /// Begins, resumes or reuses the stage `name` with these resolved settings,
    /// inputs (role, artifact) and version of the code. While another process
    /// runs the same stage this waits for it.
    ///
    /// # Errors
    /// When the settings are not JSON, or the disk or ledger refuses.
    pub async fn stage(
        &self,
        name: &str,
        settings: &impl Serialize,
        inputs: &[(&str, Digest)],
        code: &str,
    ) -> Result<Stage, StoreError> {
        let settings = json::canonical(settings)?;
        let mut inputs: Vec<(String, Digest)> =
            inputs.iter().map(|(r, d)| ((*r).to_string(), *d)).collect();
        inputs.sort();
        inputs.dedup();
        let key = json::digest(
            &json!({ "name": name, "settings": settings, "inputs": inputs, "code": code }),
        )?
        .hex();

        if let Some(outcome) = self.finished(&key).await? {
            return Ok(Stage::Reused(outcome));
        }
        let lock = self.stage_lock(&key).await?;
        // Whoever held the lock may have finished it.
        if let Some(outcome) = self.finished(&key).await? {
            return Ok(Stage::Reused(outcome));
        }

        let dir = self.home().join("runs").join(&key);
        fs::create_dir_all(&dir).map_err(StoreError::io(&dir))?;
        // A folder laid out again must hold its files and nothing else.
        object::sweep(&dir)?;
        let record = Record {
            id: id::new("run"),
            key,
            name: name.into(),
            settings: Digest::of(settings.as_bytes()),
            code: code.into(),
            host: format!(
                "{} {}, {} cores",
                std::env::consts::OS,
                std::env::consts::ARCH,
                std::thread::available_parallelism().map_or(1, usize::from)
            ),
            started_ms: clock::now_ms(),
            ended_ms: 0,
            seconds: 0.0,
            summary: Digest::of(b""),
            inputs,
            outputs: BTreeMap::new(),
            exposures: BTreeMap::new(),
        };
        let mut write = self.write().await?;
        // We hold the stage's lock, so whoever is written down as running is dead.
        sqlx::query("UPDATE run SET state = 'interrupted' WHERE key = $1 AND state = 'running'")
            .bind(&record.key)
            .execute(&mut *write.tx)
            .await?;
        sqlx::query(
            "INSERT INTO run (id, key, name, settings, code, host, state, started_ms) \
             VALUES ($1, $2, $3, $4, $5, $6, 'running', $7)",
        )
        .bind(&record.id)
        .bind(&record.key)
        .bind(name)
        .bind(&settings)
        .bind(code)
        .bind(&record.host)
        .bind(record.started_ms)
        .execute(&mut *write.tx)
        .await?;
        for (role, artifact) in &record.inputs {
            sqlx::query("INSERT INTO run_input (run, role, artifact) VALUES ($1, $2, $3)")
                .bind(&record.id)
                .bind(role)
                .bind(artifact.to_string())
                .execute(&mut *write.tx)
                .await?;
        }
        write.commit().await?;
        Ok(Stage::Run(Run {
            store: self.clone(),
            id: record.id.clone(),
            record,
            dir,
            artifacts: Vec::new(),
            exposures: BTreeMap::new(),
            started: Instant::now(),
            _lock: lock,
        }))
    }

    async fn stage_lock(&self, key: &str) -> Result<Lock, StoreError> {
        let path = self.home().join("locks").join(format!("stage-{key}"));
        loop {
            if let Some(lock) = lock::try_exclusive(&path)? {
                return Ok(lock);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The latest finished run of `key` whose outputs are all present.
    async fn finished(&self, key: &str) -> Result<Option<Outcome>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, name, seconds, summary FROM run WHERE key = $1 AND state = 'finished' ORDER BY id DESC",
        )
        .bind(key)
        .fetch_all(self.pool())
        .await?;
        'runs: for row in rows {
            let run: String = row.try_get("id")?;
            let mut outputs = BTreeMap::new();
            let made = sqlx::query(
                "SELECT o.role, a.* FROM run_output o JOIN artifact a ON a.digest = o.artifact WHERE o.run = $1",
            )
            .bind(&run)
            .fetch_all(self.pool())
            .await?;
            for row in made {
                let artifact = artifact_of(&row)?;
                if !self.intact(&artifact) {
                    continue 'runs;
                }
                outputs.insert(row.try_get("role")?, artifact.digest);
            }
            return Ok(Some(Outcome {
                digest: json::digest(&outputs)?,
                run,
                name: row.try_get("name")?,
                outputs,
                summary: serde_json::from_str(&row.try_get::<String, _>("summary")?)?,
                reused: true,
                seconds: row.try_get("seconds")?,
            }));
        }
        Ok(None)
    }
}

impl Run {
    /// The run's scratch folder. What a killed run of the same stage wrote is
    /// still there.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The run's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Stores the file or folder at `path` as the output `role`.
    ///
    /// # Errors
    /// When the role is taken, the path cannot be stored, or the disk refuses.
    pub async fn output(
        &mut self,
        role: &str,
        kind: ArtifactKind,
        name: &str,
        path: &Path,
    ) -> Result<Digest, StoreError> {
        self.free(role)?;
        let folder = path.is_dir();
        let put = move |o: &crate::object::Objects, p: &Path| {
            if folder { o.put_dir(p) } else { o.put_file(p) }
        };
        let (digest, bytes) = self.store.blocking(path, put).await?;
        self.note(role, new_artifact(digest, kind, name, folder, bytes));
        Ok(digest)
    }

    /// Stores `bytes` as the output `role`.
    ///
    /// # Errors
    /// As [`Run::output`].
    pub async fn output_bytes(
        &mut self,
        role: &str,
        kind: ArtifactKind,
        name: &str,
        bytes: &[u8],
    ) -> Result<Digest, StoreError> {
        self.free(role)?;
        let digest = self.store.inner.objects.put_bytes(bytes)?;
        self.note(
            role,
            new_artifact(digest, kind, name, false, bytes.len() as u64),
        );
        Ok(digest)
    }

    fn free(&self, role: &str) -> Result<(), StoreError> {
        if self.record.outputs.contains_key(role) {
            return Err(StoreError::RoleTaken {
                run: self.id.clone(),
                role: role.into(),
            });
        }
        Ok(())
    }

    fn note(&mut self, role: &str, artifact: Artifact) {
        self.record.outputs.insert(role.into(), artifact.digest);
        self.artifacts.push(artifact);
    }

    /// Declares that `artifact`, an input or output of this run, holds `docs`.
    /// What is later derived from it is exposed to them too, without being told.
    ///
    /// # Errors
    /// When `artifact` is neither input nor output of this run.
    pub async fn exposed(&mut self, artifact: Digest, docs: &[Exposure]) -> Result<(), StoreError> {
        let known = self
            .record
            .outputs
            .values()
            .chain(self.record.inputs.iter().map(|(_, d)| d));
        if !known.into_iter().any(|d| *d == artifact) {
            return Err(StoreError::NotOfRun {
                run: self.id.clone(),
                artifact,
            });
        }
        if docs.is_empty() {
            return Ok(());
        }
        let of = self.exposures.entry(artifact).or_default();
        for e in docs {
            *of.entry(e.doc).or_default() += u64::from(e.samples);
        }
        Ok(())
    }

    /// Writes outputs, exposures and the summary down in one step, then removes
    /// the scratch folder.
    ///
    /// # Errors
    /// When the disk or the ledger refuses; the run then counts as interrupted.
    pub async fn finish(mut self, summary: Value) -> Result<Outcome, StoreError> {
        let summary_text = json::canonical(&summary)?;
        let record = &mut self.record;
        record.summary = Digest::of(summary_text.as_bytes());
        record.ended_ms = clock::now_ms();
        record.seconds = self.started.elapsed().as_secs_f64();
        for (artifact, docs) in &self.exposures {
            record
                .exposures
                .insert(artifact.to_string(), exposure_root(docs)?);
        }
        let home = self.store.home();
        let mut write = self.store.write().await?;
        for artifact in &self.artifacts {
            insert_artifact(&mut write, home, artifact).await?;
        }
        for (role, artifact) in &record.outputs {
            sqlx::query("INSERT INTO run_output (run, role, artifact) VALUES ($1, $2, $3)")
                .bind(&self.id)
                .bind(role)
                .bind(artifact.to_string())
                .execute(&mut *write.tx)
                .await?;
        }
        for (artifact, docs) in &self.exposures {
            let docs: Vec<_> = docs.iter().collect();
            for chunk in docs.chunks(1000) {
                QueryBuilder::new("INSERT INTO exposure (artifact, doc, run, samples) ")
                    .push_values(chunk, |mut row, (doc, samples)| {
                        row.push_bind(artifact.to_string())
                            .push_bind(doc.to_string())
                            .push_bind(&self.id)
                            .push_bind(**samples as i64);
                    })
                    .build()
                    .execute(&mut *write.tx)
                    .await?;
            }
        }
        sqlx::query(
            "UPDATE run SET state = 'finished', ended_ms = $2, seconds = $3, summary = $4 WHERE id = $1",
        )
        .bind(&self.id)
        .bind(record.ended_ms)
        .bind(record.seconds)
        .bind(&summary_text)
        .execute(&mut *write.tx)
        .await?;
        log::append(
            &mut write,
            home,
            "run",
            &self.id,
            &log::body("run", record)?,
        )
        .await?;
        write.commit().await?;
        self.store.flush().await?;
        fs::remove_dir_all(&self.dir).map_err(StoreError::io(&self.dir))?;
        Ok(Outcome {
            run: self.id,
            digest: json::digest(&self.record.outputs)?,
            name: self.record.name,
            outputs: self.record.outputs,
            summary,
            reused: false,
            seconds: self.record.seconds,
        })
    }

    /// Marks the run as failed for this reason; the scratch folder stays.
    ///
    /// # Errors
    /// When the ledger refuses.
    pub async fn fail(self, why: &str) -> Result<(), StoreError> {
        let mut write = self.store.write().await?;
        sqlx::query("UPDATE run SET state = 'failed', ended_ms = $2, seconds = $3, error = $4 WHERE id = $1")
            .bind(&self.id)
            .bind(clock::now_ms())
            .bind(self.started.elapsed().as_secs_f64())
            .bind(why)
            .execute(&mut *write.tx)
            .await?;
        write.commit().await
    }
}

/// The log record of each finished run as the rows have it now.
pub(crate) async fn records(store: &Store) -> Result<Vec<Record>, StoreError> {
    let rows = sqlx::query("SELECT * FROM run WHERE state = 'finished' ORDER BY id")
        .fetch_all(store.pool())
        .await?;
    let mut records = Vec::with_capacity(rows.len());
    for row in rows {
        let id: String = row.try_get("id")?;
        let inputs: Vec<(String, String)> =
            sqlx::query_as("SELECT role, artifact FROM run_input WHERE run = $1")
                .bind(&id)
                .fetch_all(store.pool())
                .await?;
        let mut inputs = inputs
            .into_iter()
            .map(|(r, d)| Ok((r, parse_digest(&d)?)))
            .collect::<Result<Vec<_>, StoreError>>()?;
        inputs.sort();
        let outputs: Vec<(String, String)> =
            sqlx::query_as("SELECT role, artifact FROM run_output WHERE run = $1")
                .bind(&id)
                .fetch_all(store.pool())
                .await?;
        let exposures: Vec<(String, String, i64)> =
            sqlx::query_as("SELECT artifact, doc, samples FROM exposure WHERE run = $1")
                .bind(&id)
                .fetch_all(store.pool())
                .await?;
        let mut by_artifact: BTreeMap<String, BTreeMap<Digest, u64>> = BTreeMap::new();
        for (artifact, doc, samples) in exposures {
            by_artifact
                .entry(artifact)
                .or_default()
                .insert(parse_digest(&doc)?, samples as u64);
        }
        records.push(Record {
            id,
            key: row.try_get("key")?,
            name: row.try_get("name")?,
            settings: Digest::of(row.try_get::<String, _>("settings")?.as_bytes()),
            code: row.try_get("code")?,
            host: row.try_get("host")?,
            started_ms: row.try_get("started_ms")?,
            ended_ms: row.try_get("ended_ms")?,
            seconds: row.try_get("seconds")?,
            summary: Digest::of(row.try_get::<String, _>("summary")?.as_bytes()),
            inputs,
            outputs: outputs
                .into_iter()
                .map(|(r, d)| Ok((r, parse_digest(&d)?)))
                .collect::<Result<_, StoreError>>()?,
            exposures: by_artifact
                .iter()
                .map(|(artifact, docs)| Ok((artifact.clone(), exposure_root(docs)?)))
                .collect::<Result<_, StoreError>>()?,
        });
    }
    Ok(records)
}
