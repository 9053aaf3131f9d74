//! The store's handle: opening a home, transactions, artifacts.
//!
//! Writers take one in-process lock and `BEGIN IMMEDIATE`, so that no
//! transaction ever fails half-way for want of the write lock. Rejected: one
//! database connection for everything, which makes readers wait for writers.

use crate::{
    StoreError,
    lock::{self, Lock},
    log,
    object::{self, Objects},
};
use ashlar_core::{ArtifactKind, Digest, clock, id};
use serde::Serialize;
use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::{Mutex, OwnedMutexGuard};

const MIGRATIONS: &[&str] = &[include_str!("schema/1.sql"), include_str!("schema/2.sql")];

const README: &str = "This folder is an Ashlar home: objects, their ledger and its log.\n\
Several processes may use it at once. Nothing in it is meant to be edited by hand;\n\
deleting the whole folder forgets everything, including the signing keys.\n";

/// A home folder, opened. Clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) home: PathBuf,
    pub(crate) objects: Objects,
    pub(crate) pool: SqlitePool,
    /// Names this opening of the home in the responses it admits.
    pub(crate) session: String,
    writer: Arc<Mutex<()>>,
    _home_lock: Lock,
    _session_lock: Option<Lock>,
}

/// A stored thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Artifact {
    /// Its identity.
    pub digest: Digest,
    /// What it is.
    pub kind: ArtifactKind,
    /// What it was called when it was first stored.
    pub name: String,
    /// Whether `digest` is that of a folder's manifest.
    pub folder: bool,
    /// Its size; for a folder, all files together.
    pub bytes: u64,
    /// When it was first stored.
    pub created_ms: i64,
}

/// One write transaction; dropped without [`Write::commit`] it leaves no trace.
pub(crate) struct Write {
    pub(crate) tx: Transaction<'static, Sqlite>,
    _one_writer: OwnedMutexGuard<()>,
}

impl Write {
    pub(crate) async fn commit(self) -> Result<(), StoreError> {
        Ok(self.tx.commit().await?)
    }
}

impl Store {
    /// Opens the home folder, making it if need be, and repairs what a killed
    /// process left: temporary files, scratch of finished runs, and log files
    /// that lag behind the ledger.
    ///
    /// # Errors
    /// When the folder cannot be written or its ledger is not one of ours.
    pub async fn open(home: &Path) -> Result<Self, StoreError> {
        let home = std::path::absolute(home).map_err(StoreError::io(home))?;
        for dir in ["objects/sha256", "log", "runs", "locks", "keys"] {
            let dir = home.join(dir);
            fs::create_dir_all(&dir).map_err(StoreError::io(&dir))?;
        }
        let readme = home.join("README.txt");
        if !readme.exists() {
            object::replace(&readme, README.as_bytes())?;
        }
        let lock_path = home.join("locks/home");
        // Alone with the home, we may clear up after the dead.
        let alone = lock::try_exclusive(&lock_path)?;
        let options = SqliteConnectOptions::new()
            .filename(home.join("ledger.db"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(60));
        let objects = Objects(home.join("objects/sha256"));
        let session = id::new("session");
        let connect = SqlitePoolOptions::new()
            .max_connections(8)
            .connect_with(options);
        let pool = if alone.is_some() {
            let pool = connect.await?;
            migrate(&pool).await?;
            objects.sweep()?;
            sweep_runs(&home, &pool).await?;
            sweep_sessions(&home)?;
            log::repair(&home, &pool).await?;
            pool
        } else {
            // Another process may be in the middle of the branch above.
            drop(shared(&lock_path).await?);
            let pool = connect.await?;
            migrate(&pool).await?;
            pool
        };
        drop(alone);
        let home_lock = shared(&lock_path).await?;
        let session_lock = lock::try_exclusive(&session_path(&home, &session))?;
        let inner = Inner {
            home,
            objects,
            pool,
            session,
            writer: Arc::new(Mutex::new(())),
            _home_lock: home_lock,
            _session_lock: session_lock,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The home folder, absolute.
    pub fn home(&self) -> &Path {
        &self.inner.home
    }

    /// Closes the ledger's connections, of all clones of this store. Dropping the
    /// last one does so too, but some time later: whoever copies or replaces the
    /// files waits for this.
    pub async fn close(self) {
        self.pool().close().await;
    }

    pub(crate) fn pool(&self) -> &SqlitePool {
        &self.inner.pool
    }

    pub(crate) async fn write(&self) -> Result<Write, StoreError> {
        let guard = self.inner.writer.clone().lock_owned().await;
        let tx = self.pool().begin_with("BEGIN IMMEDIATE").await?;
        Ok(Write {
            tx,
            _one_writer: guard,
        })
    }

    /// Flushes what is committed to disk, for steps that are reported as done.
    pub(crate) async fn flush(&self) -> Result<(), StoreError> {
        sqlx::query("PRAGMA wal_checkpoint(FULL)")
            .fetch_optional(self.pool())
            .await?;
        log::write_checkpoint(self).await
    }

    /// Stores `bytes` under their digest.
    ///
    /// # Errors
    /// When the disk or the ledger refuses.
    pub async fn put_bytes(
        &self,
        kind: ArtifactKind,
        name: &str,
        bytes: &[u8],
    ) -> Result<Digest, StoreError> {
        let digest = self.inner.objects.put_bytes(bytes)?;
        self.register(&new_artifact(digest, kind, name, false, bytes.len() as u64))
            .await?;
        Ok(digest)
    }

    /// Stores a copy of the file at `path`, streamed.
    ///
    /// # Errors
    /// When it cannot be read, changes meanwhile, or the disk or ledger refuses.
    pub async fn put_file(
        &self,
        kind: ArtifactKind,
        name: &str,
        path: &Path,
    ) -> Result<Digest, StoreError> {
        let (digest, bytes) = self.blocking(path, |o, p| o.put_file(p)).await?;
        self.register(&new_artifact(digest, kind, name, false, bytes))
            .await?;
        Ok(digest)
    }

    /// Stores each file of the folder at `path`, and the folder as the canonical
    /// JSON manifest `{"files":[{"bytes","digest","path"}]}` in path order, whose
    /// digest names it. Symbolic links and empty folders: the first are refused,
    /// the second not kept.
    ///
    /// # Errors
    /// As [`Store::put_file`].
    pub async fn put_dir(
        &self,
        kind: ArtifactKind,
        name: &str,
        path: &Path,
    ) -> Result<Digest, StoreError> {
        let (digest, bytes) = self.blocking(path, |o, p| o.put_dir(p)).await?;
        self.register(&new_artifact(digest, kind, name, true, bytes))
            .await?;
        Ok(digest)
    }

    /// The object file of `digest`, where it is present. Read-only; for a folder
    /// it is the manifest.
    pub fn path(&self, digest: &Digest) -> Option<PathBuf> {
        let path = self.inner.objects.at(digest);
        path.is_file().then_some(path)
    }

    /// Writes the artifact to `to`: a folder's files below it, a file at it.
    /// Every byte is checked; files already there and equal stay, others of the
    /// same name are replaced, files of other names are left alone.
    ///
    /// # Errors
    /// When it is not stored, damaged, or `to` cannot be written.
    pub async fn materialize(&self, digest: &Digest, to: &Path) -> Result<(), StoreError> {
        let artifact = self
            .artifact(digest)
            .await?
            .ok_or(StoreError::UnknownArtifact {
                what: "artifact",
                digest: *digest,
            })?;
        let digest = *digest;
        self.blocking(to, move |objects, to| {
            if !artifact.folder {
                return objects.copy_out(&digest, to);
            }
            fs::create_dir_all(to).map_err(StoreError::io(to))?;
            objects
                .manifest(&digest)?
                .files
                .iter()
                .try_for_each(|file| objects.copy_out(&file.digest, &to.join(&file.path)))
        })
        .await
    }

    /// What is known about `digest`.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn artifact(&self, digest: &Digest) -> Result<Option<Artifact>, StoreError> {
        sqlx::query("SELECT * FROM artifact WHERE digest = $1")
            .bind(digest.to_string())
            .fetch_optional(self.pool())
            .await?
            .map(|row| artifact_of(&row))
            .transpose()
    }

    /// Whether every object of `artifact` is present with its size.
    pub(crate) fn intact(&self, artifact: &Artifact) -> bool {
        let objects = &self.inner.objects;
        if artifact.folder {
            objects.manifest(&artifact.digest).is_ok_and(|m| {
                m.files
                    .iter()
                    .all(|f| objects.size(&f.digest) == Some(f.bytes))
            })
        } else {
            objects.size(&artifact.digest) == Some(artifact.bytes)
        }
    }

    async fn register(&self, artifact: &Artifact) -> Result<(), StoreError> {
        if self.artifact(&artifact.digest).await?.is_some() {
            return Ok(());
        }
        let mut write = self.write().await?;
        insert_artifact(&mut write, &self.inner.home, artifact).await?;
        write.commit().await
    }

    /// Runs `work` where blocking is allowed.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        path: &Path,
        work: impl FnOnce(&Objects, &Path) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (objects, path) = (self.inner.objects.clone(), path.to_path_buf());
        tokio::task::spawn_blocking(move || work(&objects, &path))
            .await
            .map_err(|e| StoreError::Task(e.to_string()))?
    }
}

pub(crate) fn new_artifact(
    digest: Digest,
    kind: ArtifactKind,
    name: &str,
    folder: bool,
    bytes: u64,
) -> Artifact {
    Artifact {
        digest,
        kind,
        name: name.into(),
        folder,
        bytes,
        created_ms: clock::now_ms(),
    }
}

/// Inserts the row and its log entry unless the digest is known.
pub(crate) async fn insert_artifact(
    write: &mut Write,
    home: &Path,
    a: &Artifact,
) -> Result<(), StoreError> {
    let done = sqlx::query(
        "INSERT INTO artifact (digest, kind, name, form, bytes, created_ms) \
         VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (digest) DO NOTHING",
    )
    .bind(a.digest.to_string())
    .bind(a.kind.as_str())
    .bind(&a.name)
    .bind(if a.folder { "folder" } else { "file" })
    .bind(a.bytes as i64)
    .bind(a.created_ms)
    .execute(&mut *write.tx)
    .await?;
    if done.rows_affected() == 1 {
        let body = log::body("artifact", a)?;
        log::append(write, home, "artifact", &a.digest.to_string(), &body).await?;
    }
    Ok(())
}

pub(crate) fn artifact_of(row: &SqliteRow) -> Result<Artifact, StoreError> {
    let kind: String = row.try_get("kind")?;
    Ok(Artifact {
        digest: digest_of(row, "digest")?,
        kind: serde_json::from_value(kind.clone().into())
            .map_err(|_| StoreError::Corrupt(format!("artifact kind {kind:?} is unknown")))?,
        name: row.try_get("name")?,
        folder: row.try_get::<String, _>("form")? == "folder",
        bytes: row.try_get::<i64, _>("bytes")? as u64,
        created_ms: row.try_get("created_ms")?,
    })
}

/// The digest in `column`.
pub(crate) fn digest_of(row: &SqliteRow, column: &str) -> Result<Digest, StoreError> {
    parse_digest(&row.try_get::<String, _>(column)?)
}

/// The digest in `column`, where it is not null.
pub(crate) fn digest_opt(row: &SqliteRow, column: &str) -> Result<Option<Digest>, StoreError> {
    row.try_get::<Option<String>, _>(column)?
        .map(|s| parse_digest(&s))
        .transpose()
}

/// A digest read from the ledger.
pub(crate) fn parse_digest(text: &str) -> Result<Digest, StoreError> {
    text.parse()
        .map_err(|e| StoreError::Corrupt(format!("{e}")))
}

pub(crate) fn session_path(home: &Path, session: &str) -> PathBuf {
    home.join("locks").join(session)
}

async fn shared(path: &Path) -> Result<Lock, StoreError> {
    let path = path.to_path_buf();
    tokio::task::spawn_blocking(move || lock::shared(&path))
        .await
        .map_err(|e| StoreError::Task(e.to_string()))?
}

async fn migrate(pool: &SqlitePool) -> Result<(), StoreError> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT PRIMARY KEY)")
        .execute(&mut *tx)
        .await?;
    let found: i64 = sqlx::query_scalar("SELECT COALESCE(MAX(version), 0) FROM schema_version")
        .fetch_one(&mut *tx)
        .await?;
    let known = MIGRATIONS.len() as i64;
    if found > known || found < 0 {
        return Err(StoreError::Schema { found, known });
    }
    for (version, sql) in (1i64..).zip(MIGRATIONS).skip(found as usize) {
        sqlx::raw_sql(sql).execute(&mut *tx).await?;
        sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
            .bind(version)
            .execute(&mut *tx)
            .await?;
    }
    Ok(tx.commit().await?)
}

/// Removes the scratch of runs that finished but were killed before tidying.
async fn sweep_runs(home: &Path, pool: &SqlitePool) -> Result<(), StoreError> {
    let runs = home.join("runs");
    let finished: Vec<String> = sqlx::query_scalar(
        "SELECT key FROM run WHERE state = 'finished' \
         AND NOT EXISTS (SELECT 1 FROM run AS later WHERE later.key = run.key AND later.id > run.id)",
    ).fetch_all(pool).await?;
    let finished: BTreeSet<String> = finished.into_iter().collect();
    for entry in fs::read_dir(&runs)
        .map_err(StoreError::io(&runs))?
        .flatten()
    {
        if entry
            .file_name()
            .to_str()
            .is_some_and(|name| finished.contains(name))
        {
            fs::remove_dir_all(entry.path()).map_err(StoreError::io(&entry.path()))?;
        }
    }
    Ok(())
}

/// Removes the lock files of dead sessions and stages.
fn sweep_sessions(home: &Path) -> Result<(), StoreError> {
    let locks = home.join("locks");
    for entry in fs::read_dir(&locks)
        .map_err(StoreError::io(&locks))?
        .flatten()
    {
        if entry.file_name() != "home" {
            fs::remove_file(entry.path()).map_err(StoreError::io(&entry.path()))?;
        }
    }
    Ok(())
}
