//! Which files of a folder count, in which order, and what they hash to.
//!
//! Links are refused rather than followed: a signature over a folder must not
//! depend on what lies outside. Names are refused when another system would
//! read them as something else (`..`, `\`, control characters).

use crate::{GovernError, error::cut};
use ashlar_core::{Digest, Hasher};
use std::{
    cmp::Ordering,
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
};

/// Folders within folders beyond this depth are refused.
const DEEPEST: usize = 64;

/// A checked path within a folder: `a/b/c`, ordered by its components.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name(String);

impl Name {
    pub(crate) fn new(path: &str) -> Result<Self, GovernError> {
        let why = if path.is_empty() {
            "it is empty"
        } else if path.len() > 4096 {
            "it is longer than 4096 bytes"
        } else if path.starts_with('/') {
            "it is absolute"
        } else if path.contains('\\') || path.chars().any(char::is_control) {
            "it holds a backslash or a control character"
        } else if path.split('/').any(|c| matches!(c, "" | "." | "..")) {
            "a component is empty, \".\" or \"..\""
        } else {
            return Ok(Self(path.to_owned()));
        };
        Err(GovernError::UnsafePath {
            path: cut(path),
            why,
        })
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `self` is `folder` or lies below it.
    fn within(&self, folder: &Self) -> bool {
        self.0
            .strip_prefix(&folder.0)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.split('/').cmp(other.0.split('/'))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The digest of every file below `dir` that no entry of `ignore` covers.
pub(crate) fn digests(dir: &Path, ignore: &[Name]) -> Result<BTreeMap<Name, Digest>, GovernError> {
    let mut files = BTreeMap::new();
    let mut todo: Vec<(PathBuf, String, usize)> = vec![(dir.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = todo.pop() {
        if depth > DEEPEST {
            return Err(GovernError::TooLarge {
                what: "folders within each other",
                found: depth as u64,
                limit: DEEPEST as u64,
            });
        }
        for entry in fs::read_dir(&folder).map_err(GovernError::io(&folder))? {
            let entry = entry.map_err(GovernError::io(&folder))?;
            let path = entry.path();
            let file_name = entry.file_name();
            let part = file_name.to_str().ok_or_else(|| GovernError::UnsafePath {
                path: cut(&file_name.to_string_lossy()),
                why: "it is not UTF-8",
            })?;
            let name = Name::new(&format!("{prefix}{part}"))?;
            if ignore.iter().any(|i| name.within(i)) {
                continue;
            }
            let kind = entry.file_type().map_err(GovernError::io(&path))?;
            if kind.is_dir() {
                todo.push((path, format!("{}/", name.0), depth + 1));
            } else if kind.is_file() {
                let digest = digest(&path)?;
                files.insert(name, digest);
            } else {
                return Err(GovernError::NotPlain(path));
            }
        }
    }
    Ok(files)
}

fn digest(path: &Path) -> Result<Digest, GovernError> {
    let mut file = fs::File::open(path).map_err(GovernError::io(path))?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(GovernError::io(path))? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// SHA-256 over the raw file digests in the order given.
pub(crate) fn root<'a>(digests: impl IntoIterator<Item = &'a Digest>) -> Digest {
    let mut hasher = Hasher::new();
    for digest in digests {
        hasher.update(digest.as_bytes());
    }
    hasher.finish()
}

/// Where `file` lies within `dir`, or `None` when it lies outside. The file
/// itself need not exist, its folder must.
pub(crate) fn inside(dir: &Path, file: &Path) -> Result<Option<Name>, GovernError> {
    let parent = match file.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let real = |p: &Path| p.canonicalize().map_err(GovernError::io(p));
    let (dir, parent) = (real(dir)?, real(parent)?);
    let (Ok(below), Some(name)) = (parent.strip_prefix(&dir), file.file_name()) else {
        return Ok(None);
    };
    let path = below.join(name);
    let parts: Option<Vec<_>> = path.components().map(|c| c.as_os_str().to_str()).collect();
    match parts {
        Some(parts) => Name::new(&parts.join("/")).map(Some),
        None => Err(GovernError::UnsafePath {
            path: cut(&path.to_string_lossy()),
            why: "it is not UTF-8",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_mislead_are_refused() {
        for bad in [
            "",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a//b",
            "./a",
            "a/.",
            "a/",
            "a\\b",
            "a\nb",
            "a\0b",
        ] {
            assert!(
                matches!(Name::new(bad), Err(GovernError::UnsafePath { .. })),
                "{bad:?}"
            );
        }
        assert!(Name::new(&"a/".repeat(3000)).is_err());
        for good in ["a", "..a", "a..", ".hidden", "é/ü 1.bin", "a/b/c"] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn order_is_by_component() {
        let mut names: Vec<_> = ["sub.x", "sub/b", "a", "sub-c"]
            .map(|n| Name::new(n).unwrap())
            .into();
        names.sort();
        let sorted: Vec<_> = names.iter().map(Name::as_str).collect();
        assert_eq!(sorted, ["a", "sub/b", "sub-c", "sub.x"]);
    }

    #[test]
    fn ignoring_is_by_component() {
        let git = Name::new(".git").unwrap();
        assert!(Name::new(".git/config").unwrap().within(&git));
        assert!(Name::new(".git").unwrap().within(&git));
        assert!(!Name::new(".gitignore").unwrap().within(&git));
    }
}
