//! What the kernels refuse.

use ashlar_core::{DType, Fault, Hint};

/// A block type or buffer that a kernel cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// No arithmetic is known for this type.
    #[error("{action} {dtype:?} is not supported")]
    Unsupported {
        /// What was asked: "dequantizing", "quantizing".
        action: &'static str,
        /// The type.
        dtype: DType,
    },
    /// Bytes and values do not match.
    #[error("{values} values of {dtype:?} take {expected} bytes, got {got}")]
    Length {
        /// The type.
        dtype: DType,
        /// Values asked for.
        values: usize,
        /// Bytes they take; 0 when they do not fill whole blocks.
        expected: usize,
        /// Bytes there are.
        got: usize,
    },
    /// Values do not fill whole blocks.
    #[error("{values} values do not fill whole blocks of {block} ({dtype:?})")]
    Ragged {
        /// The type.
        dtype: DType,
        /// Values given.
        values: usize,
        /// Values in a block.
        block: usize,
    },
    /// Runs that do not fit their matrix.
    #[error("{what}: {got}, must be {need}")]
    Runs {
        /// What was counted.
        what: &'static str,
        /// What it must be.
        need: usize,
        /// What it is.
        got: usize,
    },
    /// A weight that is not a number.
    #[error("a weight of row {row} is not a number")]
    NotANumber {
        /// The row.
        row: usize,
    },
    /// A packed matrix that cannot be.
    #[error("no packed matrix of {n} x {k} is of kind {kind} with runs of {run}")]
    Form {
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// Its number.
        kind: u8,
        /// Values that share a scale.
        run: usize,
    },
    /// An instruction-set tier that this machine does not have.
    #[error("ASHLAR_ISA is {name}; this machine has {}", available.join(", "))]
    Tier {
        /// What was asked for.
        name: String,
        /// What there is.
        available: Vec<&'static str>,
    },
}

impl Hint for KernelError {
    fn fault(&self) -> Fault {
        Fault::Input
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unsupported { .. } => {
                "convert the file to Q8_0, Q4_1, Q4_0, F16 or F32".to_owned()
            }
            Self::Length { .. } => "the file is cut short or mislabelled; fetch it again".to_owned(),
            Self::Runs { .. } | Self::NotANumber { .. } => {
                "quantize the model again with a current tool, or choose another file".to_owned()
            }
            Self::Form { .. } => "remove the file of packed weights; it is made anew".to_owned(),
            Self::Tier { .. } => "unset it to use the fastest tier there is".to_owned(),
            Self::Ragged { block, .. } => {
                format!("rows must be a multiple of {block} values; choose a plain type such as F16")
            }
        })
    }
}
