//! SHA-256 names: `sha256:<64 hex>`, the identity of every durable thing.
//!
//! Rejected: other algorithms and multihash. One spelling means that two names
//! are equal exactly when their bytes are.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// The SHA-256 of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// A string that is not a digest. The fault is the caller's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// No `sha256:` in front.
    #[error("digest {0:?} does not start with \"sha256:\"")]
    Prefix(String),
    /// Wrong number of characters after the prefix.
    #[error("digest has {0} characters after \"sha256:\", needs 64")]
    Length(usize),
    /// A character that is not lower-case hex.
    #[error("digest holds {0:?}, which is not a lower-case hex digit")]
    Hex(char),
}

impl Digest {
    /// Hashes `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Wraps 32 raw digest bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hex digits without the prefix.
    pub fn hex(&self) -> String {
        to_hex(&self.0)
    }

    /// The first 12 hex digits, for people; never an identity.
    pub fn short(&self) -> String {
        to_hex(&self.0[..6])
    }
}

/// Lower-case hex of `bytes`.
pub fn to_hex(bytes: &[u8]) -> String {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut out = String::with_capacity(bytes.len() * 2);
    for b in bytes {
        out.push(HEX[usize::from(b >> 4)] as char);
        out.push(HEX[usize::from(b & 15)] as char);
    }
    out
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        let hex = s
            .strip_prefix("sha256:")
            .ok_or_else(|| DigestError::Prefix(s.chars().take(80).collect()))?;
        if let Some(c) = hex.chars().find(|c| !matches!(c, '0'..='9' | 'a'..='f')) {
            return Err(DigestError::Hex(c));
        }
        if hex.len() != 64 {
            return Err(DigestError::Length(hex.len()));
        }
        let nibble = |b: u8| if b <= b'9' { b - b'0' } else { b - b'a' + 10 };
        let mut out = [0; 32];
        for (o, pair) in out.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *o = nibble(pair[0]) << 4 | nibble(pair[1]);
        }
        Ok(Self(out))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(D::Error::custom)
    }
}

/// Incremental hashing, for files that are not held in memory.
#[derive(Default, Clone)]
pub struct Hasher(Sha256);

impl Hasher {
    /// A hasher that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Feeds `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all that was fed.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_input_matches_fips_180() {
        assert_eq!(
            Digest::of(b"").to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn refuses_what_is_not_a_digest() {
        let good = Digest::of(b"x").to_string();
        assert!(matches!(
            "md5:00".parse::<Digest>(),
            Err(DigestError::Prefix(_))
        ));
        assert!(matches!(
            good[..70].parse::<Digest>(),
            Err(DigestError::Length(63))
        ));
        assert!(matches!(
            good.to_uppercase().replace("SHA", "sha").parse::<Digest>(),
            Err(DigestError::Hex(_))
        ));
        assert!("sha256:é".parse::<Digest>().is_err());
    }

    proptest::proptest! {
        #[test]
        fn parts_hash_like_the_whole(a: Vec<u8>, b: Vec<u8>) {
            let mut h = Hasher::new();
            h.update(&a);
            h.update(&b);
            let d = h.finish();
            proptest::prop_assert_eq!(d, Digest::of(&[a, b].concat()));
            proptest::prop_assert_eq!(d.to_string().parse::<Digest>().unwrap(), d);
        }
    }
}
