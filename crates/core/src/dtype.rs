//! Tensor element and block types, under the names GGUF and safetensors use.
//!
//! Only shapes live here; the arithmetic of a block lives in `kernels`.

use serde::{Deserialize, Serialize};

/// How a tensor's values are stored: plain numbers or ggml's quantized blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types, missing_docs)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    /// Four bits, two values to a byte, the first in the low half.
    U4,
    /// One sign, four exponent, three mantissa bits; no infinity (`float8_e4m3fn`).
    F8_E4M3,
    /// One sign, five exponent, two mantissa bits: the upper half of F16.
    F8_E5M2,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
}

impl DType {
    /// Values in one block; 1 for numbers of whole bytes.
    pub const fn block_len(self) -> usize {
        match self {
            Self::U4 => 2,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
            _ => 1,
        }
    }

    /// Bytes in one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::I8 | Self::U8 | Self::U4 | Self::F8_E4M3 | Self::F8_E5M2 => 1,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bytes of `elements` values, or `None` when they do not fill whole
    /// blocks or the product overflows.
    pub const fn bytes_for(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::DType;

    #[test]
    fn sizes() {
        assert_eq!(DType::Q8_0.bytes_for(64), Some(68));
        assert_eq!(DType::Q4_1.bytes_for(576), Some(360));
        assert_eq!((DType::U4.bytes_for(6), DType::U4.bytes_for(7)), (Some(3), None));
        assert_eq!(DType::Q6_K.bytes_for(576), None);
        assert_eq!(DType::F64.bytes_for(usize::MAX), None);
    }
}
