//! Weights as the matmul reads them: eight rows side by side.
//!
//! Rows go in groups of eight, the last group padded with zeros. A group is a
//! run of k-blocks; a k-block of a quantized matrix holds, for 32 k,
//!
//! - eight `f16` scales, then (if the kind has minimums) eight `f16` minimums;
//! - the codes as eight steps of 4 k × 8 columns, a column's 4 k adjacent, so
//!   that one 256-bit byte dot product serves eight columns. 4-bit codes put
//!   step s in the low and step s + 4 in the high halves of the same 32 bytes.
//!
//! Plain matrices are `[group][k][8]` of `f32` or 16-bit floats.
//!
//! A value is `scale * code + minimum`. Q4_0 becomes that form exactly (minimum
//! −8·scale), Q5 codes take a byte each. Rejected: K-quants in packed form; they
//! are unpacked to `f32` until a model here needs them small.

use crate::{KernelError, quants};
use ashlar_core::DType;
use half::{bf16, f16};

/// Columns of a group.
pub(crate) const GROUP: usize = 8;
/// Values along k in a block.
pub(crate) const BLOCK: usize = 32;

/// What a packed matrix is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 4-bit codes 0..=15 with minimums.
    Nibble,
    /// Signed byte codes.
    Byte,
    /// Signed byte codes with minimums.
    ByteMin,
    /// `f32`.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of `f32`.
    BF16,
}

impl Kind {
    /// Bytes of the scales and minimums at the head of a k-block.
    pub(crate) const fn head(self) -> usize {
        match self {
            Self::Nibble | Self::ByteMin => 32,
            Self::Byte => 16,
            _ => 0,
        }
    }

    /// Bytes of one group's k-block (quantized) or of one k (plain).
    pub(crate) const fn stride(self) -> usize {
        match self {
            Self::Nibble => 32 + 128,
            Self::Byte => 16 + 256,
            Self::ByteMin => 32 + 256,
            Self::F32 => 32,
            Self::F16 | Self::BF16 => 16,
        }
    }

    pub(crate) const fn quantized(self) -> bool {
        matches!(self, Self::Nibble | Self::Byte | Self::ByteMin)
    }
}

/// A weight matrix of n rows and k columns, packed for [`crate::matmul`].
pub struct PackedMatrix {
    n: usize,
    k: usize,
    dtype: DType,
    kind: Kind,
    data: Vec<u8>,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix({:?} {}x{})", self.dtype, self.n, self.k)
    }
}

impl PackedMatrix {
    /// Packs `n` rows of `k` values stored row after row as `dtype`.
    ///
    /// # Errors
    /// A type [`crate::dequantize`] does not take, k that does not fill whole
    /// blocks, or bytes of another length.
    pub fn from_rows(dtype: DType, n: usize, k: usize, bytes: &[u8]) -> Result<Self, KernelError> {
        let row = dtype.bytes_for(k).ok_or(KernelError::Ragged {
            dtype,
            values: k,
            block: dtype.block_len(),
        })?;
        if row.checked_mul(n) != Some(bytes.len()) {
            let (values, expected) = (n.saturating_mul(k), row.saturating_mul(n));
            return Err(KernelError::Length { dtype, values, expected, got: bytes.len() });
        }
        let kind = match dtype {
            DType::Q4_0 | DType::Q4_1 => Kind::Nibble,
            DType::Q5_0 | DType::Q8_0 => Kind::Byte,
            DType::Q5_1 => Kind::ByteMin,
            DType::F16 => Kind::F16,
            DType::BF16 => Kind::BF16,
            _ => Kind::F32,
        };
        let steps = if kind.quantized() { k / BLOCK } else { k };
        let data = vec![0; n.div_ceil(GROUP) * steps * kind.stride()];
        let mut packed = Self { n, k, dtype, kind, data };
        let mut plain = vec![0.0; if kind == Kind::F32 { k } else { 0 }];
        for r in 0..n {
            let src = &bytes[r * row..][..row];
            let (group, col) = (r / GROUP, r % GROUP);
            let dst = &mut packed.data[group * steps * kind.stride()..];
            match kind {
                Kind::F32 => {
                    quants::dequantize(dtype, src, &mut plain)?;
                    for (d, v) in dst.chunks_exact_mut(32).zip(&plain) {
                        d[col * 4..][..4].copy_from_slice(&v.to_le_bytes());
                    }
                }
                Kind::F16 | Kind::BF16 => {
                    for (d, s) in dst.chunks_exact_mut(16).zip(src.chunks_exact(2)) {
                        d[col * 2..][..2].copy_from_slice(s);
                    }
                }
                _ => {
                    let blocks = src.chunks_exact(dtype.block_bytes());
                    for (d, s) in dst.chunks_exact_mut(kind.stride()).zip(blocks) {
                        pack_block(dtype, kind, s, col, d);
                    }
                }
            }
        }
        Ok(packed)
    }

    /// Rows: the width of the product.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the width of an activation row.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The type the rows were stored as.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of one group of eight columns.
    pub(crate) fn group_bytes(&self) -> usize {
        self.kind.stride() * if self.kind.quantized() { self.k / BLOCK } else { self.k }
    }

    pub(crate) fn groups(&self) -> usize {
        self.n.div_ceil(GROUP)
    }

    pub(crate) fn group(&self, g: usize) -> &[u8] {
        &self.data[g * self.group_bytes()..][..self.group_bytes()]
    }

    /// Writes row `i`, the same values [`crate::dequantize`] gives.
    ///
    /// # Panics
    /// When `i` is not below n or `out` is not k long.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k, "length of a row");
        let (data, col) = (self.group(i / GROUP), i % GROUP);
        if self.kind.quantized() {
            for (b, out) in data.chunks_exact(self.kind.stride()).zip(out.chunks_exact_mut(BLOCK)) {
                let (scale, min) = (half_at(b, col), block_min(self.kind, b, col));
                for (i, o) in out.iter_mut().enumerate() {
                    *o = code(self.kind, b, col, i) as f32 * scale + min;
                }
            }
        } else {
            for (step, o) in data.chunks_exact(self.kind.stride()).zip(out) {
                *o = plain(self.kind, step, col);
            }
        }
    }
}

/// The `f16` number `index` of a block's head.
#[inline(always)]
pub(crate) fn half_at(block: &[u8], index: usize) -> f32 {
    f16::from_le_bytes([block[index * 2], block[index * 2 + 1]]).to_f32()
}

/// A column's minimum in a block.
pub(crate) fn block_min(kind: Kind, block: &[u8], col: usize) -> f32 {
    if kind == Kind::Byte { 0.0 } else { half_at(block, GROUP + col) }
}

/// A column's code for k number `i` of a block.
#[inline(always)]
pub(crate) fn code(kind: Kind, block: &[u8], col: usize, i: usize) -> i32 {
    let (step, within) = (i / 4, i % 4);
    if kind == Kind::Nibble {
        let byte = block[kind.head() + step % 4 * 32 + col * 4 + within];
        i32::from(byte >> (step / 4 * 4) & 15)
    } else {
        i32::from(block[kind.head() + step * 32 + col * 4 + within] as i8)
    }
}

/// A plain matrix's value of one k and column.
#[inline(always)]
pub(crate) fn plain(kind: Kind, step: &[u8], col: usize) -> f32 {
    match kind {
        Kind::F16 => f16::from_le_bytes([step[col * 2], step[col * 2 + 1]]).to_f32(),
        Kind::BF16 => bf16::from_le_bytes([step[col * 2], step[col * 2 + 1]]).to_f32(),
        _ => {
            let s = &step[col * 4..][..4];
            f32::from_le_bytes([s[0], s[1], s[2], s[3]])
        }
    }
}

fn pack_block(dtype: DType, kind: Kind, src: &[u8], col: usize, dst: &mut [u8]) {
    dst[col * 2..][..2].copy_from_slice(&src[..2]);
    let min = match dtype {
        DType::Q4_0 => Some(f16::from_f32(half_at(src, 0) * -8.0).to_le_bytes()),
        DType::Q4_1 | DType::Q5_1 => Some([src[2], src[3]]),
        _ => None,
    };
    if let Some(min) = min {
        dst[(GROUP + col) * 2..][..2].copy_from_slice(&min);
    }
    let codes: [u8; BLOCK] = match dtype {
        DType::Q8_0 => std::array::from_fn(|i| src[2 + i]),
        DType::Q5_0 => quants::fives(&src[2..]).map(|q| q.wrapping_sub(16)),
        DType::Q5_1 => quants::fives(&src[4..]),
        _ => {
            let s = &src[src.len() - 16..];
            std::array::from_fn(|i| if i < 16 { s[i] & 15 } else { s[i - 16] >> 4 })
        }
    };
    let dst = &mut dst[kind.head()..];
    for (i, q) in codes.into_iter().enumerate() {
        let (step, at) = (i / 4, col * 4 + i % 4);
        if kind == Kind::Nibble {
            dst[step % 4 * 32 + at] |= q << (step / 4 * 4);
        } else {
            dst[step * 32 + at] = q;
        }
    }
}
