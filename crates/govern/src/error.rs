//! What can go wrong with keys, signatures and statements.

use ashlar_core::{Digest, Fault, Hint};
use std::path::{Path, PathBuf};

/// A failure of signing or verification.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GovernError {
    /// The file system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was touched.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A key file is already there; keys are never overwritten.
    #[error("{} exists already", .0.display())]
    KeyExists(PathBuf),
    /// A PEM file that is no key we can use.
    #[error("{} holds no {wanted} key on P-256, P-384 or P-521", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// `private` or `public`.
        wanted: &'static str,
    },
    /// The system gave no randomness, or the key refused to sign.
    #[error("signing failed: {0}")]
    Sign(String),
    /// More bytes or entries than any honest signature has.
    #[error("{what}: {found}, at most {limit} are read")]
    TooLarge {
        /// What is counted, with its unit.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many are allowed.
        limit: u64,
    },
    /// Not the JSON of a signature.
    #[error("the signature is malformed: {0}")]
    Malformed(String),
    /// A signature that follows a format or method not handled here.
    #[error("{what} is {found:?}, supported is {supported:?}")]
    Unsupported {
        /// Which field.
        what: &'static str,
        /// Its value, cut to 80 characters.
        found: String,
        /// What is handled.
        supported: &'static str,
    },
    /// Signed by another key than the one given.
    #[error("signed by key {signed}, not by the given key {given}")]
    WrongKey {
        /// SHA-256 of the signer's public key, as the signature says.
        signed: String,
        /// SHA-256 of the public key given.
        given: String,
    },
    /// The signature does not match the payload under this key.
    #[error("the signature does not match its payload: one of the two was changed")]
    BadSignature,
    /// The signed root is not the digest of the signed list of files.
    #[error("the signed root {signed} is not that of the listed files, {listed}")]
    Root {
        /// In the statement.
        signed: Digest,
        /// Over the list.
        listed: Digest,
    },
    /// A signed path that would leave the folder or is ambiguous.
    #[error("path {path:?} is refused: {why}")]
    UnsafePath {
        /// The path, cut to 80 characters.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A path that is listed twice.
    #[error("{0:?} is listed twice")]
    DuplicatePath(String),
    /// A symbolic link, socket or device in the folder.
    #[error("{} is neither a plain file nor a folder", .0.display())]
    NotPlain(PathBuf),
    /// A folder without any file.
    #[error("{} holds no file to sign", .0.display())]
    Empty(PathBuf),
    /// A file whose bytes are not those signed.
    #[error("{path:?} was changed: signed {signed}, found {found}")]
    Changed {
        /// Path within the folder.
        path: String,
        /// Digest in the signature.
        signed: Digest,
        /// Digest on disk.
        found: Digest,
    },
    /// A signed file that lies under another name.
    #[error("{from:?} was renamed to {to:?}")]
    Renamed {
        /// The signed name.
        from: String,
        /// The name found.
        to: String,
    },
    /// A signed file that is gone.
    #[error("{path:?} is missing ({count} of the signed files are)")]
    Missing {
        /// The first such path.
        path: String,
        /// How many there are.
        count: usize,
    },
    /// A file that was not signed.
    #[error("{path:?} was not signed ({count} such files)")]
    Extra {
        /// The first such path.
        path: String,
        /// How many there are.
        count: usize,
    },
    /// A statement about something else.
    #[error("the statement is about {found}, not {wanted}")]
    Subject {
        /// Digest in the statement.
        found: Digest,
        /// Digest asked for.
        wanted: Digest,
    },
}

impl GovernError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Io { path, source }
    }

    pub(crate) fn unsupported(what: &'static str, found: &str, supported: &'static str) -> Self {
        Self::Unsupported {
            what,
            found: cut(found),
            supported,
        }
    }
}

/// At most 80 characters of text from outside, for a message.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

impl Hint for GovernError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. } | Self::Sign(_) => Fault::Environment,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::KeyExists(_) => "move the old key away first; what it signed needs it".into(),
            Self::Key { wanted, .. } => {
                format!(
                    "give an unencrypted PEM file with an EC {wanted} key (PKCS#8, SEC1 or SPKI)"
                )
            }
            Self::WrongKey { .. } => "give the public key of the one who signed".into(),
            Self::Changed { .. }
            | Self::Renamed { .. }
            | Self::Missing { .. }
            | Self::Extra { .. } => {
                "fetch the folder anew, or sign it again if the change was yours".into()
            }
            Self::BadSignature
            | Self::Root { .. }
            | Self::UnsafePath { .. }
            | Self::DuplicatePath(_) => {
                "do not use this folder; ask its publisher for a fresh signature".into()
            }
            Self::NotPlain(_) => "replace the link with the file it points to".into(),
            _ => return None,
        })
    }
}
