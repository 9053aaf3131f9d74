//! Object files: immutable bytes under `objects/sha256/ab/<hex>`, read-only.
//!
//! Write to a temporary sibling, flush, rename: a name is either absent or
//! whole. Rejected: hard links from scratch files, because whoever still holds
//! the scratch path could then change the object.

use crate::StoreError;
use ashlar_core::{Digest, Hasher, json};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Component, Path, PathBuf},
};

pub(crate) const TEMP_PREFIX: &str = ".tmp-";

/// A stored folder: its files in byte order of their paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    pub(crate) files: Vec<ManifestFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ManifestFile {
    /// Relative, `/`-separated, plain components only.
    pub(crate) path: String,
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

/// The object folder of one home.
#[derive(Debug, Clone)]
pub(crate) struct Objects(pub(crate) PathBuf);

impl Objects {
    /// Where `digest` lies, present or not.
    pub(crate) fn at(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.0.join(&hex[..2]).join(hex)
    }

    /// Its size, where it is present.
    pub(crate) fn size(&self, digest: &Digest) -> Option<u64> {
        fs::metadata(self.at(digest))
            .ok()
            .filter(fs::Metadata::is_file)
            .map(|m| m.len())
    }

    /// Stores `bytes`.
    pub(crate) fn put_bytes(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        if self.size(&digest) != Some(bytes.len() as u64) {
            self.write(&digest, |out| out.write_all(bytes))?;
        }
        Ok(digest)
    }

    /// Stores the file at `path`, streamed: its digest and size.
    pub(crate) fn put_file(&self, path: &Path) -> Result<(Digest, u64), StoreError> {
        let (digest, bytes) = hash_file(path)?;
        if self.size(&digest) != Some(bytes) {
            let mut from = File::open(path).map_err(StoreError::io(path))?;
            let mut again = Hasher::new();
            let mut changed = false;
            self.write(&digest, |out| {
                copy(&mut from, |chunk| {
                    again.update(chunk);
                    out.write_all(chunk)
                })?;
                changed = std::mem::take(&mut again).finish() != digest;
                if changed {
                    Err(std::io::ErrorKind::InvalidData.into())
                } else {
                    Ok(())
                }
            })
            .map_err(|e| {
                if changed {
                    StoreError::Changed(path.to_path_buf())
                } else {
                    e
                }
            })?;
        }
        Ok((digest, bytes))
    }

    /// Stores each file of the folder at `path` and the manifest: its digest and
    /// the bytes of all files together.
    pub(crate) fn put_dir(&self, path: &Path) -> Result<(Digest, u64), StoreError> {
        let mut found = Vec::new();
        walk(path, &mut |file| {
            found.push(file.to_path_buf());
            Ok(())
        })?;
        let mut files = Vec::with_capacity(found.len());
        for file in found {
            let relative = file.strip_prefix(path).unwrap_or(&file);
            let unstorable = |why| StoreError::Unstorable {
                path: file.clone(),
                why,
            };
            let mut parts = Vec::new();
            for part in relative.components() {
                let Component::Normal(part) = part else {
                    return Err(unstorable("its path leaves the folder"));
                };
                parts.push(
                    part.to_str()
                        .ok_or_else(|| unstorable("its name is not UTF-8"))?,
                );
            }
            let relative = parts.join("/");
            let (digest, bytes) = self.put_file(&file)?;
            files.push(ManifestFile {
                path: relative,
                digest,
                bytes,
            });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let total = files.iter().map(|f| f.bytes).sum();
        let digest = self.put_bytes(json::canonical(&Manifest { files })?.as_bytes())?;
        Ok((digest, total))
    }

    /// Reads the manifest of the folder `digest`.
    pub(crate) fn manifest(&self, digest: &Digest) -> Result<Manifest, StoreError> {
        let damaged = |said: String| StoreError::Damaged {
            digest: *digest,
            said,
        };
        let bytes = fs::read(self.at(digest)).map_err(|e| damaged(e.to_string()))?;
        if Digest::of(&bytes) != *digest {
            return Err(damaged("its bytes do not hash to its name".into()));
        }
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        for file in &manifest.files {
            let plain = !file.path.is_empty()
                && Path::new(&file.path)
                    .components()
                    .all(|c| matches!(c, Component::Normal(_)));
            if !plain {
                return Err(damaged(format!("path {:?} leaves the folder", file.path)));
            }
        }
        Ok(manifest)
    }

    /// Writes the object to `to`, checked; a file already there and equal stays.
    pub(crate) fn copy_out(&self, digest: &Digest, to: &Path) -> Result<(), StoreError> {
        if to.is_file() && hash_file(to)?.0 == *digest {
            return Ok(());
        }
        let dir = to.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir).map_err(StoreError::io(dir))?;
        let from = self.at(digest);
        let damaged = |said: String| StoreError::Damaged {
            digest: *digest,
            said,
        };
        let mut reader = File::open(&from).map_err(|e| damaged(e.to_string()))?;
        let mut temp = temp_in(dir)?;
        let mut hasher = Hasher::new();
        copy(&mut reader, |chunk| {
            hasher.update(chunk);
            temp.write_all(chunk)
        })
        .map_err(StoreError::io(to))?;
        let found = hasher.finish();
        if found != *digest {
            return Err(damaged(format!("its bytes hash to {found}")));
        }
        set_mode(temp.as_file(), 0o644).map_err(StoreError::io(to))?;
        temp.persist(to).map_err(|e| StoreError::io(to)(e.error))?;
        Ok(())
    }

    /// Removes what killed writers left. Only when no one else has the home open.
    pub(crate) fn sweep(&self) -> Result<(), StoreError> {
        sweep(&self.0)
    }

    fn write(
        &self,
        digest: &Digest,
        fill: impl FnOnce(&mut File) -> std::io::Result<()>,
    ) -> Result<(), StoreError> {
        let path = self.at(digest);
        let dir = path.parent().unwrap_or(&self.0);
        fs::create_dir_all(dir).map_err(StoreError::io(dir))?;
        let mut temp = temp_in(dir)?;
        fill(temp.as_file_mut())
            .and_then(|()| set_mode(temp.as_file(), 0o444))
            .and_then(|()| temp.as_file().sync_all())
            .map_err(StoreError::io(&path))?;
        temp.persist(&path)
            .map_err(|e| StoreError::io(&path)(e.error))?;
        sync_dir(dir)
    }
}

/// Removes the temporary files that killed writers left below `dir`, which no
/// one may be writing to.
pub(crate) fn sweep(dir: &Path) -> Result<(), StoreError> {
    walk(dir, &mut |file| {
        let leftover = file
            .file_name()
            .and_then(|n| n.to_str())
            .is_some_and(|n| n.starts_with(TEMP_PREFIX));
        if leftover {
            fs::remove_file(file).map_err(StoreError::io(file))
        } else {
            Ok(())
        }
    })
}

/// A temporary file in `dir`, removed on drop.
pub(crate) fn temp_in(dir: &Path) -> Result<tempfile::NamedTempFile, StoreError> {
    tempfile::Builder::new()
        .prefix(TEMP_PREFIX)
        .tempfile_in(dir)
        .map_err(StoreError::io(dir))
}

/// Replaces `path` by `bytes` in one step.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut temp = temp_in(dir)?;
    temp.write_all(bytes)
        .and_then(|()| temp.as_file().sync_all())
        .map_err(StoreError::io(path))?;
    temp.persist(path)
        .map_err(|e| StoreError::io(path)(e.error))?;
    Ok(())
}

/// Flushes a folder's entries, so that a rename survives a power cut.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(StoreError::io(dir))
}

#[cfg(unix)]
fn set_mode(file: &File, mode: u32) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    file.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(not(unix))]
fn set_mode(_: &File, _: u32) -> std::io::Result<()> {
    Ok(())
}

/// Digest and size of the file at `path`, streamed.
pub(crate) fn hash_file(path: &Path) -> Result<(Digest, u64), StoreError> {
    let mut file = File::open(path).map_err(StoreError::io(path))?;
    let mut hasher = Hasher::new();
    let mut bytes = 0;
    copy(&mut file, |chunk| {
        hasher.update(chunk);
        bytes += chunk.len() as u64;
        Ok(())
    })
    .map_err(StoreError::io(path))?;
    Ok((hasher.finish(), bytes))
}

/// Hands `from` to `sink` in chunks.
pub(crate) fn copy(
    from: &mut impl Read,
    mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => sink(&buffer[..n])?,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Visits each plain file below `dir`; anything else but folders is refused.
pub(crate) fn walk(
    dir: &Path,
    visit: &mut dyn FnMut(&Path) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut entries = fs::read_dir(dir)
        .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
        .map_err(StoreError::io(dir))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type().map_err(StoreError::io(&path))?;
        if kind.is_dir() {
            walk(&path, visit)?;
        } else if kind.is_file() {
            visit(&path)?;
        } else {
            return Err(StoreError::Unstorable {
                path,
                why: "it is neither a plain file nor a folder",
            });
        }
    }
    Ok(())
}
