//! Advisory file locks between processes that share a home.
//!
//! The operating system drops a lock with its process, so `kill -9` never
//! leaves one behind. Rejected: lock rows with a heartbeat in the ledger, which
//! need a clock and a guess about who is dead.

use crate::StoreError;
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::Write as _,
    path::Path,
};

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub(crate) struct Lock(#[allow(dead_code)] File);

fn open(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(StoreError::io(path))
}

/// The exclusive lock on `path`, or `None` when another holder has it. The file
/// then names the holder's process, for people.
pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Lock>, StoreError> {
    let mut file = open(path)?;
    match file.try_lock() {
        Ok(()) => {
            let note = format!("held by process {}\n", std::process::id());
            file.set_len(0)
                .and_then(|()| file.write_all(note.as_bytes()))
                .map_err(StoreError::io(path))?;
            Ok(Some(Lock(file)))
        }
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(StoreError::io(path)(e)),
    }
}

/// The exclusive lock on `path`; waits for it.
pub(crate) fn exclusive(path: &Path) -> std::io::Result<Lock> {
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    file.lock()?;
    Ok(Lock(file))
}

/// The shared lock on `path`; waits while someone holds it exclusively.
pub(crate) fn shared(path: &Path) -> Result<Lock, StoreError> {
    let file = open(path)?;
    file.lock_shared().map_err(StoreError::io(path))?;
    Ok(Lock(file))
}
