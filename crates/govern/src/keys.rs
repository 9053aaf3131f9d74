//! ECDSA keys on the three NIST curves, read from and written to PEM.
//!
//! The hash follows the curve: SHA-256, SHA-384, SHA-512. Signatures are DER.
//! Keys in the ledger, in environment variables or behind a pass phrase were
//! left out: a file with mode 0600 is what `ssh` users know.

use crate::{GovernError, error::cut};
use ashlar_core::Digest;
use p256::{
    ecdsa::signature::{Signer as _, Verifier as _},
    pkcs8::{
        DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _,
        LineEnding,
    },
};
use std::{
    fs::OpenOptions,
    io::{ErrorKind, Read as _, Write as _},
    path::{Path, PathBuf},
};

/// No PEM file with one key is larger than this many bytes.
const LARGEST_PEM: u64 = 64 * 1024;

/// Where a pair of keys lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPair {
    /// PKCS#8 PEM, mode 0600.
    pub private: PathBuf,
    /// SPKI PEM, for everybody.
    pub public: PathBuf,
}

impl KeyPair {
    /// The pair's paths within `dir`, whether or not it exists.
    pub fn within(dir: &Path) -> Self {
        Self {
            private: dir.join("ashlar.key"),
            public: dir.join("ashlar.pub"),
        }
    }

    /// The pair in `dir`; made first when neither file is there. A lost public
    /// half is written again from the private one.
    ///
    /// # Errors
    /// As [`keygen`], and when the private key cannot be read.
    pub fn open_or_create(dir: &Path) -> Result<Self, GovernError> {
        let pair = Self::within(dir);
        if !pair.private.exists() {
            return keygen(dir);
        }
        let public = Private::read(&pair.private)?.public();
        if !pair.public.exists() {
            write_new(&pair.public, public.pem()?.as_bytes(), 0o644)?;
        }
        Ok(pair)
    }
}

/// Makes a P-256 pair in `dir`, which is created when needed.
///
/// # Errors
/// [`GovernError::KeyExists`] when either file is there; the file system's and
/// the random source's failures.
pub fn keygen(dir: &Path) -> Result<KeyPair, GovernError> {
    let pair = KeyPair::within(dir);
    std::fs::create_dir_all(dir).map_err(GovernError::io(dir))?;
    if pair.public.exists() {
        return Err(GovernError::KeyExists(pair.public));
    }
    let secret = random_p256()?;
    let pem = secret
        .to_pkcs8_pem(LineEnding::LF)
        .map_err(|e| GovernError::Sign(e.to_string()))?;
    write_new(&pair.private, pem.as_bytes(), 0o600)?;
    write_new(
        &pair.public,
        Private::P256(secret.into()).public().pem()?.as_bytes(),
        0o644,
    )?;
    Ok(pair)
}

fn random_p256() -> Result<p256::SecretKey, GovernError> {
    // Uniform by rejection: a draw is outside 1..n with probability 2^-32.
    for _ in 0..16 {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)
            .map_err(|e| GovernError::Sign(format!("no randomness: {e}")))?;
        let secret = p256::SecretKey::from_slice(&bytes);
        bytes.fill(0);
        if let Ok(secret) = secret {
            return Ok(secret);
        }
    }
    Err(GovernError::Sign("the random source repeats itself".into()))
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), GovernError> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    let mut file = options.open(path).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => GovernError::KeyExists(path.to_owned()),
        _ => GovernError::Io {
            path: path.to_owned(),
            source: e,
        },
    })?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(GovernError::io(path))
}

/// Reads a file of at most `limit` bytes.
pub(crate) fn read_limited(
    path: &Path,
    what: &'static str,
    limit: u64,
) -> Result<Vec<u8>, GovernError> {
    let file = std::fs::File::open(path).map_err(GovernError::io(path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(GovernError::io(path))?;
    let found = bytes.len() as u64;
    if found > limit {
        return Err(GovernError::TooLarge { what, found, limit });
    }
    Ok(bytes)
}

fn read_pem(path: &Path, wanted: &'static str) -> Result<String, GovernError> {
    String::from_utf8(read_limited(path, "bytes of a key file", LARGEST_PEM)?).map_err(|_| {
        GovernError::Key {
            path: path.to_owned(),
            wanted,
        }
    })
}

/// A private key.
pub(crate) enum Private {
    P256(p256::ecdsa::SigningKey),
    P384(p384::ecdsa::SigningKey),
    P521(p521::ecdsa::SigningKey),
}

impl Private {
    /// Reads PKCS#8 (`PRIVATE KEY`) or SEC1 (`EC PRIVATE KEY`) PEM.
    pub(crate) fn read(path: &Path) -> Result<Self, GovernError> {
        let pem = read_pem(path, "private")?;
        if let Ok(k) =
            p256::SecretKey::from_pkcs8_pem(&pem).or_else(|_| p256::SecretKey::from_sec1_pem(&pem))
        {
            return Ok(Self::P256(k.into()));
        }
        if let Ok(k) =
            p384::SecretKey::from_pkcs8_pem(&pem).or_else(|_| p384::SecretKey::from_sec1_pem(&pem))
        {
            return Ok(Self::P384(k.into()));
        }
        p521::SecretKey::from_pkcs8_pem(&pem)
            .or_else(|_| p521::SecretKey::from_sec1_pem(&pem))
            .ok()
            .and_then(|k| p521::ecdsa::SigningKey::from_bytes(&k.to_bytes()).ok())
            .map(Self::P521)
            .ok_or_else(|| GovernError::Key {
                path: path.to_owned(),
                wanted: "private",
            })
    }

    pub(crate) fn public(&self) -> Public {
        match self {
            Self::P256(k) => Public::P256(*k.verifying_key()),
            Self::P384(k) => Public::P384(*k.verifying_key()),
            Self::P521(k) => Public::P521(p521::ecdsa::VerifyingKey::from(k)),
        }
    }

    /// A DER signature over `message`.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, GovernError> {
        let failed = |e: p256::ecdsa::Error| GovernError::Sign(e.to_string());
        Ok(match self {
            Self::P256(k) => {
                let s: p256::ecdsa::Signature = k.try_sign(message).map_err(failed)?;
                s.to_der().as_bytes().to_vec()
            }
            Self::P384(k) => {
                let s: p384::ecdsa::Signature = k.try_sign(message).map_err(failed)?;
                s.to_der().as_bytes().to_vec()
            }
            Self::P521(k) => {
                let s: p521::ecdsa::Signature = k.try_sign(message).map_err(failed)?;
                s.to_der().as_bytes().to_vec()
            }
        })
    }
}

/// A public key.
pub(crate) enum Public {
    P256(p256::ecdsa::VerifyingKey),
    P384(p384::ecdsa::VerifyingKey),
    P521(p521::ecdsa::VerifyingKey),
}

impl Public {
    /// Reads SPKI (`PUBLIC KEY`) PEM.
    pub(crate) fn read(path: &Path) -> Result<Self, GovernError> {
        let pem = read_pem(path, "public")?;
        if let Ok(k) = p256::PublicKey::from_public_key_pem(&pem) {
            return Ok(Self::P256(k.into()));
        }
        if let Ok(k) = p384::PublicKey::from_public_key_pem(&pem) {
            return Ok(Self::P384(k.into()));
        }
        p521::PublicKey::from_public_key_pem(&pem)
            .ok()
            .and_then(|k| p521::ecdsa::VerifyingKey::from_affine(*k.as_affine()).ok())
            .map(Self::P521)
            .ok_or_else(|| GovernError::Key {
                path: path.to_owned(),
                wanted: "public",
            })
    }

    /// SPKI PEM with `\n` line ends.
    pub(crate) fn pem(&self) -> Result<String, GovernError> {
        let failed = |e: p256::pkcs8::spki::Error| GovernError::Sign(e.to_string());
        match self {
            Self::P256(k) => p256::PublicKey::from(k)
                .to_public_key_pem(LineEnding::LF)
                .map_err(failed),
            Self::P384(k) => p384::PublicKey::from(k)
                .to_public_key_pem(LineEnding::LF)
                .map_err(failed),
            Self::P521(k) => p521::PublicKey::from_affine(*k.as_affine())
                .map_err(|e| GovernError::Sign(e.to_string()))?
                .to_public_key_pem(LineEnding::LF)
                .map_err(failed),
        }
    }

    /// The hex SHA-256 of the PEM, by which bundles name a key.
    pub(crate) fn id(&self) -> Result<String, GovernError> {
        Ok(Digest::of(self.pem()?.as_bytes()).hex())
    }

    /// Checks a DER signature over `message`.
    pub(crate) fn verify(&self, message: &[u8], der: &[u8]) -> Result<(), GovernError> {
        let ok = match self {
            Self::P256(k) => {
                p256::ecdsa::Signature::from_der(der).and_then(|s| k.verify(message, &s))
            }
            Self::P384(k) => {
                p384::ecdsa::Signature::from_der(der).and_then(|s| k.verify(message, &s))
            }
            Self::P521(k) => {
                p521::ecdsa::Signature::from_der(der).and_then(|s| k.verify(message, &s))
            }
        };
        ok.map_err(|_| GovernError::BadSignature)
    }

    /// Refuses a signature that names another key.
    pub(crate) fn expect_id(&self, signed: Option<&str>) -> Result<(), GovernError> {
        let given = self.id()?;
        match signed {
            Some(signed) if !signed.is_empty() && signed != given => Err(GovernError::WrongKey {
                signed: cut(signed),
                given,
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_private_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let pair = keygen(dir.path()).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&pair.private), 0o600);
            assert_eq!(mode(&pair.public) & 0o600, 0o600);
        }
        let before = std::fs::read(&pair.private).unwrap();
        assert!(matches!(keygen(dir.path()), Err(GovernError::KeyExists(_))));
        std::fs::remove_file(&pair.public).unwrap();
        assert!(matches!(keygen(dir.path()), Err(GovernError::KeyExists(_))));
        assert_eq!(KeyPair::open_or_create(dir.path()).unwrap(), pair);
        assert_eq!(std::fs::read(&pair.private).unwrap(), before);
        let (private, public) = (
            Private::read(&pair.private).unwrap(),
            Public::read(&pair.public).unwrap(),
        );
        assert_eq!(private.public().id().unwrap(), public.id().unwrap());
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pair = keygen(dir.path()).unwrap();
        assert!(matches!(
            Private::read(&pair.public),
            Err(GovernError::Key {
                wanted: "private",
                ..
            })
        ));
        assert!(matches!(
            Public::read(&pair.private),
            Err(GovernError::Key {
                wanted: "public",
                ..
            })
        ));
        let junk = dir.path().join("junk");
        std::fs::write(&junk, [0xff; 200]).unwrap();
        assert!(matches!(Public::read(&junk), Err(GovernError::Key { .. })));
        std::fs::write(&junk, vec![b'a'; 100_000]).unwrap();
        assert!(matches!(
            Private::read(&junk),
            Err(GovernError::TooLarge { .. })
        ));
        assert!(matches!(
            Private::read(&dir.path().join("none")),
            Err(GovernError::Io { .. })
        ));
    }
}
