//! What can be wrong with a file, with the numbers and the offender's name.

use ashlar_core::{DType, Fault, Hint};

/// A file, or a tensor to be written, that breaks its format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The first bytes belong to another format.
    #[error("not a {expected} file: it begins with {found}")]
    Magic {
        /// The format asked for.
        expected: &'static str,
        /// The first bytes, escaped.
        found: String,
    },
    /// Python pickle, bare or inside a zip archive: it runs code when loaded.
    #[error("this is {0}; pickle runs code when it is loaded and is refused")]
    Pickle(&'static str),
    /// A version of the format that is not read.
    #[error("GGUF version {found}; versions 2 and 3, little-endian, are read")]
    Version {
        /// The version field as read.
        found: u32,
    },
    /// A length or count that points past the end.
    #[error("{what} at byte {at} needs {need} bytes; {have} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Offset in the file.
        at: usize,
        /// Bytes needed.
        need: u64,
        /// Bytes left.
        have: usize,
    },
    /// A string that is not UTF-8.
    #[error("{what} at byte {at} is not UTF-8")]
    Utf8 {
        /// What was being read.
        what: String,
        /// Offset in the file.
        at: usize,
    },
    /// A type number or name that is unknown.
    #[error("{what} has type {found}, which is not one we read")]
    Type {
        /// The key or tensor.
        what: String,
        /// The type as stored.
        found: String,
    },
    /// A value outside what its type or key allows.
    #[error("{what} is {found}; it must be {need}")]
    Value {
        /// The key or field.
        what: String,
        /// What was found.
        found: String,
        /// What is allowed.
        need: &'static str,
    },
    /// Two keys or tensors of one name.
    #[error("{what} {name:?} appears twice")]
    Duplicate {
        /// "key" or "tensor".
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Arrays in arrays beyond the limit.
    #[error("{key}: arrays nested deeper than {limit}")]
    Depth {
        /// The metadata key.
        key: String,
        /// The limit.
        limit: usize,
    },
    /// Metadata whose decoded form is out of proportion to the file.
    #[error("metadata needs more than {limit} bytes once decoded, at key {key}")]
    Memory {
        /// The metadata key.
        key: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// A shape that cannot be.
    #[error("tensor {name:?} of type {dtype:?} has shape {shape:?}: {why}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: DType,
        /// Its shape, slowest first.
        shape: Vec<u64>,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Data whose length does not fit the shape.
    #[error("tensor {name:?} has {found} bytes; its shape and type need {need}")]
    Size {
        /// The tensor.
        name: String,
        /// Bytes its shape needs.
        need: u64,
        /// Bytes it has.
        found: u64,
    },
    /// Data outside the file, or not on a multiple of the alignment.
    #[error("tensor {name:?} at data offset {offset}, {bytes} bytes: {why} ({limit})")]
    Offset {
        /// The tensor.
        name: String,
        /// Offset from the start of the data section.
        offset: u64,
        /// Its size.
        bytes: u64,
        /// What is wrong.
        why: &'static str,
        /// The data section's length, or the alignment, or the expected offset.
        limit: u64,
    },
    /// Two tensors that share bytes.
    #[error("tensors {a:?} and {b:?} overlap at data offset {offset}")]
    Overlap {
        /// The first tensor.
        a: String,
        /// The second.
        b: String,
        /// Where the second starts.
        offset: u64,
    },
    /// A JSON header or configuration that does not parse.
    #[error("{what}: {why}")]
    Json {
        /// Which JSON.
        what: &'static str,
        /// The parser's words, with line and column.
        why: String,
    },
    /// An adapter setting that changes the result and is not supported.
    #[error("adapter setting {field} is {found}; only {need} is supported")]
    Adapter {
        /// The setting.
        field: &'static str,
        /// Its value.
        found: String,
        /// What is supported.
        need: &'static str,
    },
    /// The output could not be written.
    #[error("cannot write: {0}")]
    Io(String),
}

impl FormatError {
    pub(crate) fn json(what: &'static str, error: &serde_json::Error) -> Self {
        let why = clip(&error.to_string());
        Self::Json { what, why }
    }
}

impl Hint for FormatError {
    fn fault(&self) -> Fault {
        match self {
            Self::Io(_) => Fault::Environment,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Pickle(_) => "convert it to safetensors where the file is trusted",
            Self::Truncated { .. } | Self::Offset { .. } | Self::Size { .. } => {
                "the file may be cut short: fetch it again and compare its digest"
            }
            Self::Magic { .. } => "give a GGUF or safetensors file",
            Self::Version { .. } => "convert it again with a current llama.cpp",
            Self::Type { .. } => "use a file in a supported type, for example Q8_0 or F16",
            Self::Adapter { .. } => "train or export the adapter with that setting",
            Self::Io(_) => "look at the free space and the permissions of the folder",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

/// At most 96 characters of hostile text, control characters escaped.
pub(crate) fn clip(text: &str) -> String {
    const MAX: usize = 96;
    let mut chars = text.chars();
    let mut out = String::new();
    for c in chars.by_ref().take(MAX) {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    if chars.next().is_some() {
        out.push('…');
    }
    out
}
