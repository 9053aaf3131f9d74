//! OpenSSF Model Signing v1.0, key method: one signature over a whole folder.
//!
//! The signature is a Sigstore bundle holding a DSSE envelope, which holds an
//! in-toto statement, which lists each file with its SHA-256. The subject's
//! digest is the SHA-256 over the files' raw digests in the order listed.
//! PyPI's `model-signing` reads ours, and we read its; a test runs both ways.
//!
//! Paths that the signed statement itself says to ignore, and the signature
//! file, are the only files in the folder that may be unsigned. Certificates,
//! keyless signing, shards, BLAKE hashes, followed links and the pre-1.0 format
//! are refused by name rather than half-checked.

use crate::{
    GovernError,
    dsse::Envelope,
    error::cut,
    keys::{Private, Public, read_limited},
    tree::{self, Name},
};
use ashlar_core::Digest;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Write as _,
    path::Path,
};

const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const PREDICATE: &str = "https://model_signing/signature/v1.0";
const SHA256: &str = "sha256";
/// What `model-signing` leaves out unless told otherwise; doing the same keeps
/// a checkout's signature valid under both.
const GIT: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];
/// Largest bundle read, in bytes; about 150,000 files.
pub(crate) const LARGEST_BUNDLE: u64 = 32 << 20;
/// Most files one signature may list.
const MOST_FILES: u64 = 100_000;

/// What a valid signature says about a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// The folder's name when it was signed; not compared with today's.
    pub name: String,
    /// Digest over the digests of all files: the signature's subject.
    pub root: Digest,
    /// Each file's path and digest, in the order signed.
    pub files: Vec<(String, Digest)>,
    /// Hex SHA-256 of the public key's PEM.
    pub key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    verification_material: Material,
    dsse_envelope: Envelope,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Material {
    // A bundle made with a certificate has none.
    public_key: Option<PublicKey>,
    #[serde(default)]
    tlog_entries: Vec<serde_json::Value>,
}

#[derive(Serialize, Deserialize)]
struct PublicKey {
    #[serde(default)]
    hint: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    subject: Vec<Subject>,
    predicate_type: String,
    predicate: Predicate,
}

#[derive(Serialize, Deserialize)]
struct Subject {
    name: String,
    digest: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct Predicate {
    resources: Vec<Resource>,
    serialization: Serialization,
}

#[derive(Serialize, Deserialize)]
struct Resource {
    name: String,
    digest: String,
    algorithm: String,
}

#[derive(Serialize, Deserialize)]
struct Serialization {
    method: String,
    hash_type: String,
    allow_symlinks: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ignore_paths: Vec<String>,
}

/// Signs every file below `dir` with the PEM key at `key` and writes the bundle
/// to `out`, atomically. `out` may lie inside `dir`; Git's own files and `out`
/// are left out, and the signature says so.
///
/// # Errors
/// An empty folder, a link or an odd name in it, a key we cannot use.
pub fn sign_dir(dir: &Path, key: &Path, out: &Path) -> Result<Verified, GovernError> {
    let key = Private::read(key)?;
    let id = key.public().id()?;
    let mut ignore = GIT
        .map(Name::new)
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    ignore.extend(tree::inside(dir, out)?);
    let files = tree::digests(dir, &ignore)?;
    if files.is_empty() {
        return Err(GovernError::Empty(dir.to_owned()));
    }
    limit(files.len())?;
    let real = dir.canonicalize().map_err(GovernError::io(dir))?;
    let name = real
        .file_name()
        .map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    let root = tree::root(files.values());
    let statement = Statement {
        kind: STATEMENT.into(),
        subject: vec![Subject {
            name: name.clone(),
            digest: [(SHA256.to_owned(), root.hex())].into(),
        }],
        predicate_type: PREDICATE.into(),
        predicate: Predicate {
            resources: files
                .iter()
                .map(|(n, d)| Resource {
                    name: n.as_str().into(),
                    digest: d.hex(),
                    algorithm: SHA256.into(),
                })
                .collect(),
            serialization: Serialization {
                method: "files".into(),
                hash_type: SHA256.into(),
                allow_symlinks: false,
                ignore_paths: ignore.iter().map(|n| n.as_str().to_owned()).collect(),
            },
        },
    };
    let json = |e: serde_json::Error| GovernError::Malformed(e.to_string());
    let payload = serde_json::to_vec(&statement).map_err(json)?;
    let bundle = Bundle {
        media_type: BUNDLE.into(),
        verification_material: Material {
            public_key: Some(PublicKey {
                hint: Some(id.clone()),
            }),
            tlog_entries: vec![],
        },
        // The bundle names the key in its verification material.
        dsse_envelope: Envelope::seal(&payload, &key, String::new())?,
    };
    write_atomically(out, &serde_json::to_vec(&bundle).map_err(json)?)?;
    let files = files
        .into_iter()
        .map(|(n, d)| (n.as_str().to_owned(), d))
        .collect();
    Ok(Verified {
        name,
        root,
        files,
        key: id,
    })
}

/// Checks that `dir` holds exactly the files that the bundle at `signature`
/// lists, byte for byte, and that the key at `public` signed that list.
///
/// # Errors
/// Each way to fail has its own [`GovernError`]; where several apply, a changed
/// file comes before a renamed, a missing and an unsigned one.
pub fn verify_dir(dir: &Path, signature: &Path, public: &Path) -> Result<Verified, GovernError> {
    let key = Public::read(public)?;
    let bytes = read_limited(signature, "bytes of a signature", LARGEST_BUNDLE)?;
    let (verified, mut ignore) = open(&bytes, &key)?;
    ignore.extend(tree::inside(dir, signature)?);
    let found = tree::digests(dir, &ignore)?;
    compare(&verified.files, &found)?;
    Ok(verified)
}

/// The signed list of files and what it says to ignore, without touching them.
fn open(bytes: &[u8], key: &Public) -> Result<(Verified, Vec<Name>), GovernError> {
    let json = |e: serde_json::Error| GovernError::Malformed(cut(&e.to_string()));
    let bundle: Bundle = serde_json::from_slice(bytes).map_err(json)?;
    if bundle.media_type != BUNDLE {
        return Err(GovernError::unsupported(
            "mediaType",
            &bundle.media_type,
            BUNDLE,
        ));
    }
    let Some(material) = bundle.verification_material.public_key else {
        return Err(GovernError::unsupported(
            "verificationMaterial",
            "no publicKey",
            "publicKey",
        ));
    };
    key.expect_id(material.hint.as_deref())?;
    let statement: Statement =
        serde_json::from_slice(&bundle.dsse_envelope.open(key)?).map_err(json)?;
    if statement.kind != STATEMENT {
        return Err(GovernError::unsupported(
            "_type",
            &statement.kind,
            STATEMENT,
        ));
    }
    if statement.predicate_type != PREDICATE {
        return Err(GovernError::unsupported(
            "predicateType",
            &statement.predicate_type,
            PREDICATE,
        ));
    }
    let Serialization {
        method,
        hash_type,
        allow_symlinks,
        ignore_paths,
    } = statement.predicate.serialization;
    if method != "files" {
        return Err(GovernError::unsupported(
            "serialization.method",
            &method,
            "files",
        ));
    }
    if hash_type != SHA256 {
        return Err(GovernError::unsupported(
            "serialization.hash_type",
            &hash_type,
            SHA256,
        ));
    }
    if allow_symlinks {
        return Err(GovernError::unsupported(
            "serialization.allow_symlinks",
            "true",
            "false",
        ));
    }
    let [subject] = statement.subject.as_slice() else {
        return Err(GovernError::Malformed(format!(
            "{} subjects, one is wanted",
            statement.subject.len()
        )));
    };
    let signed = match subject.digest.get(SHA256) {
        Some(hex) => parse_digest(hex)?,
        None => {
            return Err(GovernError::Malformed(
                "the subject has no sha256 digest".into(),
            ));
        }
    };
    limit(statement.predicate.resources.len())?;
    let ignore = ignore_paths
        .iter()
        .map(|p| Name::new(p))
        .collect::<Result<Vec<_>, _>>()?;
    let mut seen = BTreeSet::new();
    let mut files = Vec::with_capacity(statement.predicate.resources.len());
    for Resource {
        name,
        digest,
        algorithm,
    } in statement.predicate.resources
    {
        if algorithm != SHA256 {
            return Err(GovernError::unsupported("algorithm", &algorithm, SHA256));
        }
        let digest = parse_digest(&digest)?;
        if !seen.insert(Name::new(&name)?) {
            return Err(GovernError::DuplicatePath(name));
        }
        files.push((name, digest));
    }
    let listed = tree::root(files.iter().map(|(_, d)| d));
    if listed != signed {
        return Err(GovernError::Root { signed, listed });
    }
    Ok((
        Verified {
            name: subject.name.clone(),
            root: signed,
            files,
            key: key.id()?,
        },
        ignore,
    ))
}

fn compare(signed: &[(String, Digest)], found: &BTreeMap<Name, Digest>) -> Result<(), GovernError> {
    let mut found: HashMap<&str, &Digest> = found.iter().map(|(n, d)| (n.as_str(), d)).collect();
    let mut missing = Vec::new();
    for (path, digest) in signed {
        match found.remove(path.as_str()) {
            Some(same) if same == digest => {}
            Some(other) => {
                return Err(GovernError::Changed {
                    path: path.clone(),
                    signed: *digest,
                    found: *other,
                });
            }
            None => missing.push((path, digest)),
        }
    }
    let mut extra: Vec<_> = found.into_iter().collect();
    extra.sort_unstable();
    let by_digest: HashMap<_, _> = extra.iter().rev().map(|(to, d)| (*d, *to)).collect();
    for (path, digest) in &missing {
        if let Some(to) = by_digest.get(digest) {
            return Err(GovernError::Renamed {
                from: (*path).clone(),
                to: (*to).to_owned(),
            });
        }
    }
    if let Some((path, _)) = missing.first() {
        return Err(GovernError::Missing {
            path: (*path).clone(),
            count: missing.len(),
        });
    }
    match extra.first() {
        Some((path, _)) => Err(GovernError::Extra {
            path: (*path).to_owned(),
            count: extra.len(),
        }),
        None => Ok(()),
    }
}

fn limit(files: usize) -> Result<(), GovernError> {
    match files as u64 {
        found if found > MOST_FILES => Err(GovernError::TooLarge {
            what: "files in one signature",
            found,
            limit: MOST_FILES,
        }),
        _ => Ok(()),
    }
}

pub(crate) fn parse_digest(hex: &str) -> Result<Digest, GovernError> {
    format!("sha256:{}", cut(hex))
        .parse()
        .map_err(|e| GovernError::Malformed(format!("digest {:?}: {e}", cut(hex))))
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), GovernError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::File::create(&temporary)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|source| {
        // Nothing else can be done about a temporary file that cannot go.
        let _ = fs::remove_file(&temporary);
        GovernError::Io {
            path: path.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests;
