//! The transparency log: an RFC 6962 Merkle tree over what the ledger claims.
//!
//! The entries and the root are rows, committed with what they describe. The
//! files under `log/` follow from the entries: `hashes` holds the tree's nodes,
//! 32 bytes each, in the order of `stored_hash_index` (Crosby and Wallach,
//! 2009), and `checkpoint` a C2SP tree head. They are written ahead of the
//! commit (`hashes`) or after it (`checkpoint`), so after a kill they are at
//! most longer or older than the truth, which [`repair`] puts right.
//!
//! Rejected: partial tile files on each append, which leave 255 dead files per
//! full tile; tiles can be cut from `hashes` when the log is published.

use crate::{StoreError, ledger::Write, object};
use ashlar_core::{Digest, json};
use serde::Serialize;
use sqlx::SqlitePool;
use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
};
use tlog_tiles::{
    checkpoint::Checkpoint,
    tlog::{
        EMPTY_HASH, Error, HASH_SIZE, Hash, HashReader, record_hash, stored_hash_count,
        stored_hash_index, stored_hashes, stored_hashes_for_record_hash, tree_hash,
    },
};

/// First line of each checkpoint.
const ORIGIN: &str = "ashlar";

/// The tree's nodes, by stored hash index.
#[derive(Default)]
pub(crate) struct Nodes(pub(crate) Vec<Hash>);

impl HashReader for Nodes {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<Hash>, Error> {
        let at = |i: &u64| {
            usize::try_from(*i)
                .ok()
                .and_then(|i| self.0.get(i))
                .copied()
        };
        indexes
            .iter()
            .map(|i| at(i).ok_or(Error::IndexesNotInTree))
            .collect()
    }
}

impl Nodes {
    /// Adds entry number `n`; entries come in order from 0.
    pub(crate) fn push(&mut self, n: u64, body: &[u8]) -> Result<(), StoreError> {
        let new = stored_hashes(n, body, self)?;
        self.0.extend(new);
        Ok(())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|h| h.0).collect()
    }
}

/// The same, in `log/hashes`.
struct NodeFile(File);

impl HashReader for NodeFile {
    fn read_hashes(&self, indexes: &[u64]) -> Result<Vec<Hash>, Error> {
        let mut file = &self.0;
        indexes
            .iter()
            .map(|i| {
                let mut hash = [0; HASH_SIZE];
                file.seek(SeekFrom::Start(i * HASH_SIZE as u64))
                    .and_then(|_| file.read_exact(&mut hash))
                    .map(|()| Hash(hash))
                    .map_err(|_| Error::IndexesNotInTree)
            })
            .collect()
    }
}

fn open_nodes(home: &Path) -> Result<NodeFile, StoreError> {
    let path = home.join("log/hashes");
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map(NodeFile)
        .map_err(StoreError::io(&path))
}

/// The leaf that says `value` is so: canonical JSON `{kind: value}`.
pub(crate) fn body(kind: &str, value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    let value = serde_json::to_value(value)?;
    Ok(json::canonical(&serde_json::Map::from_iter([(kind.to_string(), value)]))?.into_bytes())
}

/// RFC 6962 root over `leaves`.
pub(crate) fn merkle_root<'a>(
    leaves: impl Iterator<Item = &'a [u8]>,
) -> Result<Digest, StoreError> {
    let (mut nodes, mut n) = (Nodes::default(), 0);
    for leaf in leaves {
        nodes.push(n, leaf)?;
        n += 1;
    }
    Ok(Digest::from_bytes(tree_hash(n, &nodes)?.0))
}

/// Appends a leaf within the transaction; its number.
pub(crate) async fn append(
    write: &mut Write,
    home: &Path,
    kind: &str,
    subject: &str,
    body: &[u8],
) -> Result<u64, StoreError> {
    let (n, _) = root_in(&mut *write.tx).await?;
    let nodes = open_nodes(home)?;
    // The write lock is held: no one else touches the file from here to the commit.
    let new = stored_hashes_for_record_hash(n, record_hash(body), &nodes)?;
    let bytes: Vec<u8> = new.iter().flat_map(|h| h.0).collect();
    let mut file = &nodes.0;
    file.seek(SeekFrom::Start(stored_hash_index(0, n) * HASH_SIZE as u64))
        .and_then(|_| file.write_all(&bytes))
        .map_err(StoreError::io(&home.join("log/hashes")))?;
    let root = Digest::from_bytes(tree_hash(n + 1, &nodes)?.0);
    sqlx::query("INSERT INTO log_entry (seq, kind, subject, body) VALUES ($1, $2, $3, $4)")
        .bind(n as i64)
        .bind(kind)
        .bind(subject)
        .bind(body)
        .execute(&mut *write.tx)
        .await?;
    sqlx::query(
        "INSERT INTO log_root (one, size, root) VALUES (1, $1, $2) \
         ON CONFLICT (one) DO UPDATE SET size = excluded.size, root = excluded.root",
    )
    .bind((n + 1) as i64)
    .bind(root.to_string())
    .execute(&mut *write.tx)
    .await?;
    Ok(n)
}

/// The stored size and root.
pub(crate) async fn root_in<'c>(
    db: impl sqlx::SqliteExecutor<'c>,
) -> Result<(u64, Digest), StoreError> {
    let row: Option<(i64, String)> = sqlx::query_as("SELECT size, root FROM log_root")
        .fetch_optional(db)
        .await?;
    match row {
        None => Ok((0, Digest::from_bytes(EMPTY_HASH.0))),
        Some((size, root)) => {
            let size = u64::try_from(size)
                .map_err(|_| StoreError::Corrupt(format!("log size is {size}")))?;
            Ok((size, crate::ledger::parse_digest(&root)?))
        }
    }
}

/// Rebuilds `log/hashes` when it does not give the stored root but the entries
/// do, and moves a checkpoint that the log contradicts aside. What cannot be
/// repaired is left for `verify_ledger` to report.
pub(crate) async fn repair(home: &Path, pool: &SqlitePool) -> Result<(), StoreError> {
    let (size, root) = root_in(pool).await?;
    let nodes = open_nodes(home)?;
    if !tree_hash(size, &nodes).is_ok_and(|h| h.0 == *root.as_bytes()) {
        let mut rebuilt = Nodes::default();
        let bodies: Vec<Vec<u8>> = sqlx::query_scalar("SELECT body FROM log_entry ORDER BY seq")
            .fetch_all(pool)
            .await?;
        for (n, body) in (0..).zip(&bodies) {
            rebuilt.push(n, body)?;
        }
        if tree_hash(bodies.len() as u64, &rebuilt)?.0 == *root.as_bytes() {
            object::replace(&home.join("log/hashes"), &rebuilt.bytes())?;
        }
    } else {
        let path = home.join("log/hashes");
        nodes
            .0
            .set_len(stored_hash_count(size) * HASH_SIZE as u64)
            .map_err(StoreError::io(&path))?;
    }
    let path = home.join("log/checkpoint");
    if path.exists() && !checkpoint_holds(home, size)? {
        let aside = home.join("log/checkpoint.contradicted");
        std::fs::rename(&path, &aside).map_err(StoreError::io(&path))?;
    }
    publish(home, size, root)
}

/// Whether the checkpoint on disk is a tree head this log once had.
pub(crate) fn checkpoint_holds(home: &Path, size: u64) -> Result<bool, StoreError> {
    let path = home.join("log/checkpoint");
    let text = std::fs::read(&path).map_err(StoreError::io(&path))?;
    let Ok(old) = Checkpoint::from_bytes(&text) else {
        return Ok(false);
    };
    Ok(old.size() <= size
        && tree_hash(old.size(), &open_nodes(home)?).is_ok_and(|h| h == *old.hash()))
}

fn publish(home: &Path, size: u64, root: Digest) -> Result<(), StoreError> {
    let head = Checkpoint::new(ORIGIN, size, Hash(*root.as_bytes()), "")
        .map_err(|e| StoreError::Corrupt(e.to_string()))?;
    object::replace(&home.join("log/checkpoint"), &head.to_bytes())
}

/// Writes the present tree head to `log/checkpoint`.
pub(crate) async fn write_checkpoint(store: &crate::Store) -> Result<(), StoreError> {
    let (size, root) = root_in(store.pool()).await?;
    publish(store.home(), size, root)
}

impl crate::Store {
    /// Appends a note of the caller's to the log; its number. Personal data has
    /// no place in it: entries are for ever.
    ///
    /// # Errors
    /// When the disk or the ledger refuses.
    pub async fn log_append(&self, entry: &[u8]) -> Result<u64, StoreError> {
        let mut write = self.write().await?;
        let n = append(&mut write, self.home(), "note", "", entry).await?;
        write.commit().await?;
        Ok(n)
    }

    /// Number of entries and RFC 6962 root of the log.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn log_root(&self) -> Result<(u64, Digest), StoreError> {
        root_in(self.pool()).await
    }
}
