//! Bytes in, views out: GGUF, safetensors, adapter layouts.
//!
//! Every parser here is a pure function of `&[u8]`; the caller maps or reads
//! the file. What may not happen, whatever the bytes are: no panic, no
//! arithmetic overflow, no code run (pickle is refused by name), and no
//! allocation out of proportion to the input, because every count is compared
//! with the bytes that are left before anything is reserved for it. Ensured by
//! the cursor in `read`, checked by `tests/` and by the workspace in `fuzz/`.
//!
//! Rejected: the `safetensors` crate, because duplicate names, unknown types
//! and gaps must all be named in errors of ours, and the format is one page.
//!
//! ```
//! use ashlar_core::DType;
//! use ashlar_formats::{Gguf, GgufWriter, Value};
//! let mut w = GgufWriter::new();
//! w.meta("general.architecture", Value::String("llama".into()));
//! w.tensor("x", &[2, 3], DType::F32, vec![0; 24])?;
//! let mut bytes = Vec::new();
//! w.write_to(&mut bytes).unwrap();
//! let file = Gguf::parse(&bytes)?;
//! assert_eq!(file.tensor("x").unwrap().shape, [2, 3]);
//! # Ok::<(), ashlar_formats::FormatError>(())
//! ```

#![forbid(unsafe_code)]

mod error;
pub mod gguf;
pub mod peft;
pub mod pickle;
mod read;
pub mod safetensors;
mod value;
mod write;

pub use error::FormatError;
pub use gguf::Gguf;
pub use value::Value;
pub use write::GgufWriter;

use ashlar_core::DType;
use std::ops::Range;

/// A tensor of a file of which only the beginning may be at hand.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Sizes, as in [`TensorView`].
    pub shape: &'a [usize],
    /// How the values are stored.
    pub dtype: DType,
    /// Where in the file its bytes are: inside it, checked when parsed.
    pub range: Range<u64>,
}

/// A tensor inside a file's bytes; nothing is copied or decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorView<'a> {
    /// Its name in the file.
    pub name: &'a str,
    /// Sizes, row-major: the slowest dimension first, rows are the last one.
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub dtype: DType,
    /// Exactly the bytes of the values, little-endian.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Number of values: the product of the shape, checked when parsed.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}
