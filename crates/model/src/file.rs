//! Checkpoint files, read piece by piece.
//!
//! Only a file's header stays in memory; values are read when they are packed,
//! by whichever thread packs them. Not mapped: touching a page of a map whose
//! file was cut short meanwhile would end the process, while a read just comes
//! out short. What may not happen here: a buffer for more bytes than the file
//! has.

use crate::{
    ModelError,
    formats::{FormatError, Gguf},
};
use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// Bytes of a GGUF file tried first as its header; vocabularies take most of it.
const HEAD: u64 = 4 << 20;

/// An open file.
pub(crate) struct Opened {
    file: File,
    pub(crate) path: PathBuf,
    /// Bytes it had when opened.
    pub(crate) len: u64,
}

impl Opened {
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let fault = |e: std::io::Error| ModelError::Read { path: path.into(), cause: e.to_string() };
        let file = File::open(path).map_err(fault)?;
        let len = file.metadata().map_err(fault)?.len();
        Ok(Self { file, path: path.into(), len })
    }

    /// What the system says of it now.
    pub(crate) fn metadata(&self) -> std::io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// Fills `to` with the bytes from `from` on.
    pub(crate) fn read(&self, from: u64, to: &mut [u8]) -> Result<(), ModelError> {
        self.file.read_exact_at(to, from).map_err(|e| {
            let cause = match e.kind() {
                std::io::ErrorKind::UnexpectedEof => {
                    format!("it had {} bytes and now ends before byte {}", self.len, from + to.len() as u64)
                }
                _ => e.to_string(),
            };
            ModelError::Read { path: self.path.clone(), cause }
        })
    }

    /// The file's first bytes, at most `len`.
    pub(crate) fn begin(&self, len: u64) -> Result<Vec<u8>, ModelError> {
        let mut bytes = Vec::new();
        self.extend(&mut bytes, len)?;
        Ok(bytes)
    }

    /// Makes the file's first bytes `len` long, or as long as the file is.
    fn extend(&self, bytes: &mut Vec<u8>, len: u64) -> Result<(), ModelError> {
        let from = bytes.len();
        // The file is in no memory: what is longer than memory fails to reserve.
        bytes.resize(usize::try_from(len.min(self.len)).unwrap_or(usize::MAX), 0);
        self.read(from as u64, &mut bytes[from..])
    }
}

/// An open GGUF file, its values unread.
pub struct GgufFile {
    pub(crate) file: Opened,
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GgufFile({}, {} bytes)", self.file.path.display(), self.file.len)
    }
}

impl GgufFile {
    /// Opens the file at `path` and hands over its header, whose tensors' values
    /// are in the file alone.
    ///
    /// # Errors
    /// A file that cannot be read, or is not well-formed GGUF.
    pub fn read<T>(path: &Path, then: impl FnOnce(&Self, &Gguf) -> T) -> Result<T, ModelError> {
        let file = Opened::open(path)?;
        let (mut head, mut want) = (Vec::new(), HEAD);
        loop {
            file.extend(&mut head, want)?;
            match Gguf::head(&head, file.len) {
                Err(FormatError::Truncated { .. }) if (head.len() as u64) < file.len => want = want.saturating_mul(4),
                Err(e) => return Err(e.into()),
                Ok(gguf) => return Ok(then(&Self { file }, &gguf)),
            }
        }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.file.len
    }
}
