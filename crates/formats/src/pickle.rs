//! Recognises Python pickle, so that it is refused by name.
//!
//! Nothing here reads a pickle. Protocol 0 is plain text without a mark and
//! cannot be told from other text; it fails as an unknown format instead.

use crate::FormatError;

/// What kind of pickle `bytes` begin with, if they do.
///
/// Knows protocols 2 to 5 (a `PROTO` opcode first) and PyTorch's checkpoints
/// (a zip archive holding `data.pkl`; any zip archive is named as such).
pub fn sniff(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0x80, 2..=5, ..] => Some("a Python pickle"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive, as PyTorch checkpoints with pickle are"),
        _ => None,
    }
}

pub(crate) fn refuse(bytes: &[u8]) -> Result<(), FormatError> {
    sniff(bytes).map_or(Ok(()), |kind| Err(FormatError::Pickle(kind)))
}
