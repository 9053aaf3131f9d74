//! A little-endian cursor that cannot leave its bytes.

use crate::{FormatError, error::clip};

/// Reads forward through `bytes`; every step is checked.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn short(&self, what: &str, need: u64) -> FormatError {
        FormatError::Truncated {
            what: clip(what),
            at: self.at,
            need,
            have: self.left(),
        }
    }

    /// The next `n` bytes.
    pub(crate) fn take(&mut self, what: &str, n: u64) -> Result<&'a [u8], FormatError> {
        let slice = usize::try_from(n)
            .ok()
            .and_then(|n| self.at.checked_add(n))
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or_else(|| self.short(what, n))?;
        self.at += slice.len();
        Ok(slice)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(what, N as u64)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `each` bytes, refused when they
    /// cannot all be there. What it returns is safe to reserve for.
    pub(crate) fn count(&mut self, what: &str, each: u64) -> Result<usize, FormatError> {
        let n = self.u64(what)?;
        let need = n.saturating_mul(each);
        match usize::try_from(n) {
            Ok(n) if need <= self.left() as u64 => Ok(n),
            _ => Err(self.short(what, need)),
        }
    }

    /// A length-prefixed UTF-8 string.
    pub(crate) fn string(&mut self, what: &str) -> Result<&'a str, FormatError> {
        let n = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(what, n)?;
        std::str::from_utf8(bytes).map_err(|_| FormatError::Utf8 {
            what: clip(what),
            at,
        })
    }
}
