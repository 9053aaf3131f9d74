//! Weights as the matmul reads them: sixteen rows side by side.
//!
//! Rows go in groups of sixteen, the last group padded with zeros. A group of a
//! quantized matrix is its heads (scales and minimums), padded to 64 bytes, then
//! its codes, block after block of 32 k:
//!
//! - codes are eight steps of 4 k × 16 columns, a column's 4 k adjacent, so that
//!   one 512-bit byte dot product serves sixteen columns (and one AMX tile is
//!   sixteen steps as they lie). Narrow codes put the low four bits of step s in
//!   the low and of step s + 4 in the high halves of the same 64 bytes; the fifth
//!   and sixth bit follow as bit planes, 64 bits a step.
//! - heads are, for kinds with one scale a block: 16 `f16` scales (and 16 `f16`
//!   minimums) a block; for K kinds, a run of 256 k: 16 `f16` factors (and 16 of
//!   the minimums), then for each block 16 (or twice 16, for halves of a block)
//!   bytes of scale and as many of minimum.
//!
//! - where a matrix says itself how long a run along k is that shares a scale
//!   ([`Runs`]), a head belongs to a run: 16 `f16` or `f32` scales, 16 `i16` zero
//!   points.
//!
//! Plain matrices are `[group][k][16]` of `f32` or 16-bit floats. 8-bit floats have
//! the 16 `f32` scales of each run before that.
//!
//! Every kind keeps what its file says bit for bit: a value is
//! `scale * (code − offset) ± minimum` in the order [`crate::dequantize`] has, or
//! `scale * (code − zero)`. A run's scales are `f16` where all of the matrix are
//! that exactly, whatever the file has them as.
//! What may not happen here: rounding a scale to make two kinds one.

use crate::{KernelError, Pool, memory::Bytes, quants};
use ashlar_core::DType;
use half::{bf16, f16};
use std::{
    cell::RefCell,
    sync::{Arc, Mutex, PoisonError},
};

/// Columns of a group.
pub(crate) const GROUP: usize = 16;
/// Values along k in a block.
pub(crate) const BLOCK: usize = 32;
/// Bytes of a file that a thread holds while it packs them, about.
pub(crate) const SCRATCH: usize = if cfg!(test) { 2 << 10 } else { 256 << 10 };
/// Blocks that share the factors of a K kind.
pub(crate) const SUPER: usize = 8;

thread_local! {
    /// What this thread has read and not packed yet.
    static READ: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How wide codes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Four bits.
    Nibble,
    /// Five bits.
    Five,
    /// Six bits.
    Six,
    /// A byte.
    Byte,
    /// Four bits that choose from IQ4_NL's sixteen values.
    Table,
}

/// Where a scale or minimum holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Per {
    /// There is none.
    Nothing,
    /// `f16` a block of 32.
    Block,
    /// `f16` a run of 256, times a byte a block of 32.
    Sub32,
    /// `f16` a run of 256, times a byte a half block of 16.
    Sub16,
    /// `f16` a run of the matrix's own length.
    Run16,
    /// `f32` a run of the matrix's own length.
    Run32,
    /// As a minimum: `i16` a run, taken off each code.
    Zero,
}

impl Per {
    /// Bytes of factors a column has in a head of a run (K kinds) or a block.
    pub(crate) const fn factor(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Run32 => 4,
            _ => 2,
        }
    }

    /// Sub-scales a column has in a block.
    pub(crate) const fn subs(self) -> usize {
        match self {
            Self::Sub32 => 1,
            Self::Sub16 => 2,
            _ => 0,
        }
    }
}

/// One kind of quantized matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) codes: Codes,
    /// Taken off each (unsigned) code; a power of two or 0.
    pub(crate) offset: i32,
    pub(crate) scale: Per,
    pub(crate) min: Per,
}

/// What a packed matrix is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One of [`FORMATS`], by its index.
    Quantized(usize),
    /// `f32`.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of `f32`.
    BF16,
    /// 8-bit floats with scales.
    E4M3,
    /// The upper half of `f16`, with scales.
    E5M2,
}

const fn format(codes: Codes, offset: i32, scale: Per, min: Per) -> Format {
    Format { codes, offset, scale, min }
}

/// The quantized kinds and the file types they hold.
pub(crate) const TYPES: [DType; 11] = [
    DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::IQ4_NL,
    DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K,
];
/// In the order of [`TYPES`], then those of [`Runs`].
pub(crate) const FORMATS: [Format; 14] = [
    format(Codes::Nibble, 8, Per::Block, Per::Nothing),
    format(Codes::Nibble, 0, Per::Block, Per::Block),
    format(Codes::Five, 16, Per::Block, Per::Nothing),
    format(Codes::Five, 0, Per::Block, Per::Block),
    format(Codes::Byte, 128, Per::Block, Per::Nothing),
    format(Codes::Table, 128, Per::Block, Per::Nothing),
    format(Codes::Nibble, 0, Per::Sub16, Per::Sub16),
    format(Codes::Nibble, 4, Per::Sub16, Per::Nothing),
    format(Codes::Nibble, 0, Per::Sub32, Per::Sub32),
    format(Codes::Five, 0, Per::Sub32, Per::Sub32),
    format(Codes::Six, 32, Per::Sub16, Per::Nothing),
    format(Codes::Nibble, 0, Per::Run16, Per::Zero),
    format(Codes::Nibble, 0, Per::Run32, Per::Zero),
    format(Codes::Byte, 128, Per::Run32, Per::Zero),
];
/// Of [`FORMATS`], what four-bit codes in runs become, with `f16` or `f32` scales,
/// and what bytes become.
const NIBBLES_16: usize = 11;
const NIBBLES_32: usize = 12;
const BYTES_32: usize = 13;

impl Format {
    /// Whether scales come in runs of 256.
    pub(crate) const fn is_super(self) -> bool {
        self.scale.subs() > 0
    }

    /// Bytes of codes in a block of a group.
    pub(crate) const fn code_bytes(self) -> usize {
        match self.codes {
            Codes::Nibble | Codes::Table => 256,
            Codes::Five => 256 + 64,
            Codes::Six => 256 + 128,
            Codes::Byte => 512,
        }
    }

    /// Bytes of factors at the start of a head.
    pub(crate) const fn factor_bytes(self) -> usize {
        GROUP * (self.scale.factor() + self.min.factor())
    }

    /// Bytes of one block's sub-scales and minimums.
    pub(crate) const fn sub_bytes(self) -> usize {
        GROUP * (self.scale.subs() + self.min.subs())
    }

    /// Bytes of one head: of a run of 256 for K kinds, else of a block.
    pub(crate) const fn head_bytes(self) -> usize {
        self.factor_bytes() + if self.is_super() { SUPER * self.sub_bytes() } else { 0 }
    }

    /// How many blocks share a head, as a power of two, in a matrix with runs of
    /// `run` values.
    pub(crate) const fn span(self, run: usize) -> u32 {
        match self.scale {
            Per::Run16 | Per::Run32 => (run / BLOCK).trailing_zeros(),
            _ if self.is_super() => SUPER.trailing_zeros(),
            _ => 0,
        }
    }

    /// Bytes of a group's heads, padded.
    pub(crate) const fn heads_bytes(self, blocks: usize, run: usize) -> usize {
        (blocks.div_ceil(1 << self.span(run)) * self.head_bytes()).next_multiple_of(64)
    }
}

impl Kind {
    const fn of(dtype: DType) -> Self {
        let mut i = 0;
        while i < TYPES.len() {
            if TYPES[i] as u8 == dtype as u8 {
                return Self::Quantized(i);
            }
            i += 1;
        }
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }

    /// Bytes of the scales before a group of 8-bit floats.
    pub(crate) const fn heads_bytes(self, k: usize, run: usize) -> usize {
        if matches!(self, Self::E4M3 | Self::E5M2) { k.div_ceil(run) * GROUP * 4 } else { 0 }
    }

    /// What [`plain`] has values in units of.
    pub(crate) const fn unit(self) -> f32 {
        if matches!(self, Self::E4M3) { quants::E4M3_UNIT } else { 1.0 }
    }

    /// Bytes of one group over `k` in runs of `run`.
    pub(crate) const fn group_bytes(self, k: usize, run: usize) -> usize {
        match self {
            Self::Quantized(f) => {
                FORMATS[f].heads_bytes(k / BLOCK, run) + k / BLOCK * FORMATS[f].code_bytes()
            }
            Self::F32 => k * GROUP * 4,
            Self::F16 | Self::BF16 => k * GROUP * 2,
            Self::E4M3 | Self::E5M2 => self.heads_bytes(k, run) + k * GROUP,
        }
    }
}

/// A weight matrix of n rows and k columns, packed for [`crate::matmul`]. Clones
/// share its bytes.
#[derive(Clone)]
pub struct PackedMatrix {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) dtype: DType,
    pub(crate) kind: Kind,
    /// Values along k that share a head, where the kind leaves that to the matrix.
    pub(crate) run: usize,
    /// Which k each place along a row is for, where they do not ascend.
    pub(crate) order: Option<Box<[u32]>>,
    pub(crate) data: Arc<Bytes>,
}

/// How the codes of a matrix get their scales: in runs along k.
///
/// A value is `scale * (code − zero)`, or for 8-bit floats `scale * value`.
#[derive(Debug, Clone, Default)]
pub struct Runs {
    /// Values in a run, but for the last one of a row. For integer codes a multiple
    /// of 32, or at least k.
    pub len: usize,
    /// `[n, k / len]`, the division rounded up.
    pub scales: Vec<f32>,
    /// As many zero points, at most one more than the largest code. Empty for floats.
    pub zeros: Vec<i16>,
    /// The k that each place along a row of codes is for, if they do not ascend: a
    /// permutation. Integer codes only.
    pub order: Option<Box<[u32]>>,
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
        Self::from_rows_on(&Pool::new(1), dtype, n, k, bytes)
    }

    /// [`PackedMatrix::from_rows`] on a pool's threads.
    ///
    /// # Errors
    /// As [`PackedMatrix::from_rows`].
    pub fn from_rows_on(
        pool: &Pool,
        dtype: DType,
        n: usize,
        k: usize,
        bytes: &[u8],
    ) -> Result<Self, KernelError> {
        let row = row_bytes(dtype, k)?;
        if row.checked_mul(n) != Some(bytes.len()) {
            let (values, expected) = (n.saturating_mul(k), row.saturating_mul(n));
            return Err(KernelError::Length { dtype, values, expected, got: bytes.len() });
        }
        let (kind, size) = packable(dtype, k)?;
        let mut data = Bytes::weights(n.div_ceil(GROUP) * size);
        pool.chunks_mut(&mut data, size, |g, dst| {
            let from = g * GROUP * row;
            pack_group(dtype, kind, k, &bytes[from..bytes.len().min(from + GROUP * row)], dst);
        });
        Ok(Self { n, k, dtype, kind, run: k, order: None, data: Arc::new(data) })
    }

    /// [`PackedMatrix::from_rows_on`] of rows that are not in memory: `read(i, to)`
    /// fills `to` with whole rows from row `i` on. It is called on the pool's
    /// threads for some [`SCRATCH`] bytes at a time, each row once.
    ///
    /// # Errors
    /// As [`PackedMatrix::from_rows`], and what `read` refuses.
    pub fn read_rows<E: From<KernelError> + Send>(
        pool: &Pool,
        dtype: DType,
        n: usize,
        k: usize,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let row = row_bytes(dtype, k)?;
        let (kind, size) = packable(dtype, k)?;
        let mut data = Bytes::weights(n.div_ceil(GROUP) * size);
        let pack = |_, src: &[u8], dst: &mut [u8]| {
            pack_group(dtype, kind, k, src, dst);
            Ok(())
        };
        read_groups(pool, n, row, &mut data, size, read, pack)?;
        Ok(Self { n, k, dtype, kind, run: k, order: None, data: Arc::new(data) })
    }

    /// Packs `n` rows of `k` codes that have their scales in `runs`. `read(i, to)`
    /// fills `to` with whole rows from row `i` on, a byte a code, and is called as
    /// in [`PackedMatrix::read_rows`]. `dtype` is U4 or U8 for unsigned integers,
    /// F8_E4M3 or F8_E5M2.
    ///
    /// # Errors
    /// Another type, k of integers that does not fill whole blocks of 32, runs that
    /// are not as [`Runs`] says, an E4M3 byte that is not a number, and what `read`
    /// refuses.
    pub fn read_runs<E: From<KernelError> + Send>(
        pool: &Pool,
        dtype: DType,
        n: usize,
        k: usize,
        runs: Runs,
        read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let kind = runs.check(dtype, n, k)?;
        let Runs { len, scales, zeros, order } = runs;
        let run = match kind {
            // A power of two of blocks: runs of another length are cut up.
            Kind::Quantized(_) if len >= k => (k / BLOCK).next_power_of_two() * BLOCK,
            Kind::Quantized(_) => BLOCK << (len / BLOCK).trailing_zeros(),
            _ => len.min(k.max(1)),
        };
        let size = kind.group_bytes(k, run);
        let mut data = Bytes::weights(n.div_ceil(GROUP) * size);
        let per_row = k.div_ceil(len);
        let pack = |first: usize, src: &[u8], dst: &mut [u8]| {
            for (col, src) in src.chunks_exact(k.max(1)).enumerate() {
                let row = first + col;
                let scales = &scales[row * per_row..][..per_row];
                let zeros = zeros.get(row * per_row..).unwrap_or_default();
                let at = |head: usize| head * run / len;
                let Kind::Quantized(f) = kind else {
                    if kind == Kind::E4M3 && src.iter().any(|b| b & 0x7f == quants::E4M3_NAN) {
                        return Err(KernelError::NotANumber { row });
                    }
                    let (heads, values) = dst.split_at_mut(kind.heads_bytes(k, run));
                    for (h, head) in heads.chunks_exact_mut(GROUP * 4).enumerate() {
                        head[col * 4..][..4].copy_from_slice(&scales[at(h)].to_le_bytes());
                    }
                    for (v, s) in values.chunks_exact_mut(GROUP).zip(src) {
                        v[col] = *s;
                    }
                    continue;
                };
                let f = FORMATS[f];
                let blocks = k / BLOCK;
                let (heads, codes) = dst.split_at_mut(f.heads_bytes(blocks, run));
                let heads = heads.chunks_exact_mut(f.head_bytes()).take(blocks.div_ceil(1 << f.span(run)));
                for (h, head) in heads.enumerate() {
                    let (scale, zero) = (scales[at(h)], zeros[at(h)] - f.offset as i16);
                    match f.scale {
                        Per::Run16 => head[col * 2..][..2].copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
                        _ => head[col * 4..][..4].copy_from_slice(&scale.to_le_bytes()),
                    }
                    head[GROUP * f.scale.factor() + col * 2..][..2].copy_from_slice(&zero.to_le_bytes());
                }
                for (src, dst) in src.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(f.code_bytes())) {
                    pack_codes(f, src, col, dst);
                }
            }
            Ok(())
        };
        read_groups(pool, n, k, &mut data, size, read, pack)?;
        Ok(Self { n, k, dtype, kind, run, order, data: Arc::new(data) })
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

    /// Values along k that share a head, where the kind leaves that to the matrix.
    pub(crate) fn run(&self) -> usize {
        self.run
    }

    /// Which k each place along a row is for, where they do not ascend.
    pub(crate) fn order(&self) -> Option<&[u32]> {
        self.order.as_deref()
    }

    pub(crate) fn groups(&self) -> usize {
        self.n.div_ceil(GROUP)
    }

    /// The bytes of group `g`.
    pub(crate) fn group(&self, g: usize) -> &[u8] {
        let size = self.kind.group_bytes(self.k, self.run);
        &self.data[g * size..][..size]
    }

    /// Writes row `i`, the same values [`crate::dequantize`] gives.
    ///
    /// # Panics
    /// When `i` is not below n or `out` is not k long.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n, "row {i} of {}", self.n);
        assert_eq!(out.len(), self.k, "length of a row");
        let (data, col) = (self.group(i / GROUP), i % GROUP);
        match self.kind {
            Kind::Quantized(f) => {
                let f = FORMATS[f];
                for b in 0..self.k / BLOCK {
                    let block = Block::at(f, data, self.k / BLOCK, self.run, b);
                    for i in 0..BLOCK {
                        let at = b * BLOCK + i;
                        out[self.order().map_or(at, |order| order[at] as usize)] = block.value(col, i);
                    }
                }
            }
            kind @ (Kind::E4M3 | Kind::E5M2) => {
                let (heads, values) = data.split_at(kind.heads_bytes(self.k, self.run));
                for (i, (v, o)) in values.chunks_exact(GROUP).zip(out).enumerate() {
                    *o = plain(kind, v, col) * kind.unit() * float_at(heads, i / self.run * GROUP + col);
                }
            }
            kind => {
                for (step, o) in data.chunks_exact(data.len() / self.k).zip(out) {
                    *o = plain(kind, step, col);
                }
            }
        }
    }
}

/// One block of a group, read the plain way.
pub(crate) struct Block<'a> {
    f: Format,
    factors: &'a [u8],
    subs: &'a [u8],
    codes: &'a [u8],
}

impl<'a> Block<'a> {
    /// Block `b` of `blocks` in the bytes of a group with runs of `run` values.
    pub(crate) fn at(f: Format, group: &'a [u8], blocks: usize, run: usize, b: usize) -> Self {
        let (heads, codes) = group.split_at(f.heads_bytes(blocks, run));
        let head = &heads[(b >> f.span(run)) * f.head_bytes()..][..f.head_bytes()];
        let (factors, subs) = head.split_at(f.factor_bytes());
        let subs = &subs[b % SUPER * f.sub_bytes()..][..f.sub_bytes()];
        Self { f, factors, subs, codes: &codes[b * f.code_bytes()..][..f.code_bytes()] }
    }

    fn factor(&self, index: usize) -> f32 {
        f16::from_le_bytes([self.factors[index * 2], self.factors[index * 2 + 1]]).to_f32()
    }

    /// A column's `f16` or `f32` scale.
    pub(crate) fn scale(&self, col: usize) -> f32 {
        if self.f.scale == Per::Run32 { float_at(self.factors, col) } else { self.factor(col) }
    }

    /// A column's zero point; 0 where there is none.
    pub(crate) fn zero(&self, col: usize) -> i32 {
        if self.f.min != Per::Zero {
            return 0;
        }
        let at = GROUP * self.f.scale.factor() + col * 2;
        i32::from(i16::from_le_bytes([self.factors[at], self.factors[at + 1]]))
    }

    /// A column's `f16` minimum.
    pub(crate) fn min(&self, col: usize) -> f32 {
        if self.f.min == Per::Nothing { 0.0 } else { self.factor(GROUP + col) }
    }

    /// A column's scale byte for a half of the block; 1 where there is none.
    pub(crate) fn sub(&self, col: usize, half: usize) -> i32 {
        match self.f.scale.subs() {
            0 => 1,
            1 => i32::from(self.subs[col]),
            _ => i32::from(self.subs[half * GROUP + col] as i8),
        }
    }

    /// A column's minimum byte for a half of the block; 1 where there is none.
    pub(crate) fn sub_min(&self, col: usize, half: usize) -> i32 {
        let at = self.f.scale.subs() * GROUP;
        match self.f.min.subs() {
            0 => 1,
            1 => i32::from(self.subs[at + col]),
            _ => i32::from(self.subs[at + half * GROUP + col]),
        }
    }

    /// A column's code for k number `i`, its offset taken off.
    pub(crate) fn code(&self, col: usize, i: usize) -> i32 {
        let (step, lane) = (i / 4, col * 4 + i % 4);
        let narrow = || i32::from(self.codes[step % 4 * 64 + lane] >> (step / 4 * 4) & 15);
        let plane = |p: usize| {
            let at = 256 + p * 64 + step * 8 + lane / 8;
            i32::from(self.codes[at] >> (lane % 8) & 1)
        };
        let code = match self.f.codes {
            Codes::Nibble => narrow(),
            Codes::Five => narrow() | plane(0) << 4,
            Codes::Six => narrow() | plane(0) << 4 | plane(1) << 5,
            Codes::Byte => i32::from(self.codes[step * 64 + lane]),
            Codes::Table => i32::from(quants::IQ4_NL[narrow() as usize]) + 128,
        };
        code - self.f.offset
    }

    fn value(&self, col: usize, i: usize) -> f32 {
        let (half, code) = (i / 16, self.code(col, i) as f32);
        match (self.f.scale, self.f.min) {
            (_, Per::Zero) => (self.code(col, i) - self.zero(col)) as f32 * self.scale(col),
            (Per::Block, Per::Nothing) => code * self.scale(col),
            (Per::Block, _) => code * self.scale(col) + self.min(col),
            (_, Per::Nothing) => self.scale(col) * self.sub(col, half) as f32 * code,
            _ => {
                let min = self.min(col) * self.sub_min(col, half) as f32;
                self.scale(col) * self.sub(col, half) as f32 * code - min
            }
        }
    }
}

/// Number `i` of `f32` bytes.
#[inline(always)]
pub(crate) fn float_at(bytes: &[u8], i: usize) -> f32 {
    let s = &bytes[i * 4..][..4];
    f32::from_le_bytes([s[0], s[1], s[2], s[3]])
}

/// A plain matrix's value of one k and column, in units of [`Kind::unit`] and before
/// its scale.
#[inline(always)]
pub(crate) fn plain(kind: Kind, step: &[u8], col: usize) -> f32 {
    match kind {
        Kind::F16 => f16::from_le_bytes([step[col * 2], step[col * 2 + 1]]).to_f32(),
        Kind::BF16 => bf16::from_le_bytes([step[col * 2], step[col * 2 + 1]]).to_f32(),
        Kind::E4M3 => quants::e4m3_small(step[col]),
        Kind::E5M2 => quants::e5m2(step[col]),
        _ => float_at(step, col),
    }
}

impl Runs {
    /// What the runs of `n` rows of `k` codes become, if they are right.
    fn check(&self, dtype: DType, n: usize, k: usize) -> Result<Kind, KernelError> {
        let integers = matches!(dtype, DType::U4 | DType::U8);
        let must = |what, need, got: usize, ok: bool| match ok {
            true => Ok(()),
            false => Err(KernelError::Runs { what, need, got }),
        };
        if integers && !k.is_multiple_of(BLOCK) {
            return Err(KernelError::Ragged { dtype, values: k, block: BLOCK });
        }
        must("values a run", 1, self.len, self.len > 0)?;
        let whole = !integers || self.len >= k || self.len.is_multiple_of(BLOCK);
        must("values a run that are left over from whole blocks of 32", 0, self.len % BLOCK, whole)?;
        let all = n.saturating_mul(k.div_ceil(self.len));
        must("scales", all, self.scales.len(), self.scales.len() == all)?;
        let zeros = if integers { all } else { 0 };
        must("zero points", zeros, self.zeros.len(), self.zeros.len() == zeros)?;
        if let Some(order) = &self.order {
            let mut seen = vec![false; k];
            let new = |&&i: &&u32| seen.get_mut(i as usize).is_some_and(|seen| !std::mem::replace(seen, true));
            let got = order.iter().filter(new).count();
            must("different places along k", k, got, integers && got == k && order.len() == k)?;
        }
        let most = if dtype == DType::U4 { 16 } else { 256 };
        let odd = self.zeros.iter().find(|z| !(0..=most).contains(*z));
        must("a zero point", most as usize, odd.map_or(0, |z| usize::from(z.unsigned_abs())), odd.is_none())?;
        let halves = || self.scales.iter().all(|&s| f16::from_f32(s).to_f32().to_bits() == s.to_bits());
        match dtype {
            DType::U4 if halves() => Ok(Kind::Quantized(NIBBLES_16)),
            DType::U4 => Ok(Kind::Quantized(NIBBLES_32)),
            DType::U8 => Ok(Kind::Quantized(BYTES_32)),
            DType::F8_E4M3 => Ok(Kind::E4M3),
            DType::F8_E5M2 => Ok(Kind::E5M2),
            _ => Err(KernelError::Unsupported { action: "packing runs of", dtype }),
        }
    }
}

/// Reads `n` rows of `row` bytes for some [`SCRATCH`] bytes at a time and has `pack`
/// put each group of them, from its first row's number on, into its `size` bytes.
fn read_groups<E: From<KernelError> + Send>(
    pool: &Pool,
    n: usize,
    row: usize,
    data: &mut [u8],
    size: usize,
    read: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
    pack: impl Fn(usize, &[u8], &mut [u8]) -> Result<(), KernelError> + Sync,
) -> Result<(), E> {
    let groups = (SCRATCH / (GROUP * row).max(1)).max(1);
    let failed = Mutex::new(None);
    pool.chunks_mut(data, groups * size, |task, dst| {
        let first = task * groups * GROUP;
        let rows = (groups * GROUP).min(n - first);
        READ.with_borrow_mut(|src| {
            src.resize(rows * row, 0);
            let mut done = read(first, src);
            let each = src.chunks((GROUP * row).max(1)).zip(dst.chunks_exact_mut(size.max(1)));
            for (g, (src, dst)) in each.enumerate() {
                done = done.and_then(|()| Ok(pack(first + g * GROUP, src, dst)?));
            }
            if let Err(e) = done {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            }
        });
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Bytes of a row of `k` values.
fn row_bytes(dtype: DType, k: usize) -> Result<usize, KernelError> {
    dtype.bytes_for(k).ok_or(KernelError::Ragged { dtype, values: k, block: dtype.block_len() })
}

/// What a type's matrices become, and the bytes of one group.
fn packable(dtype: DType, k: usize) -> Result<(Kind, usize), KernelError> {
    let kind = Kind::of(dtype);
    if kind == Kind::F32 {
        // What may fail in a row depends on the type alone.
        quants::dequantize(dtype, &[], &mut [])?;
    }
    Ok((kind, kind.group_bytes(k, k)))
}

/// Packs at most sixteen rows of a file.
fn pack_group(dtype: DType, kind: Kind, k: usize, src: &[u8], dst: &mut [u8]) {
    let row = dtype.bytes_for(k).unwrap_or(0).max(1);
    let rows = src.chunks_exact(row);
    rows.enumerate().for_each(|(col, src)| pack_row(dtype, kind, k, src, col, dst));
}

/// Writes one row of a file as column `col` of a group.
fn pack_row(dtype: DType, kind: Kind, k: usize, src: &[u8], col: usize, dst: &mut [u8]) {
    match kind {
        Kind::F16 | Kind::BF16 => {
            for (d, s) in dst.chunks_exact_mut(2 * GROUP).zip(src.chunks_exact(2)) {
                d[col * 2..][..2].copy_from_slice(s);
            }
        }
        Kind::Quantized(f) => {
            let f = FORMATS[f];
            let (heads, codes) = dst.split_at_mut(f.heads_bytes(k / BLOCK, k));
            let span = if f.is_super() { SUPER } else { 1 };
            let heads = heads.chunks_exact_mut(f.head_bytes());
            let codes = codes.chunks_exact_mut(span * f.code_bytes());
            let mut parts = [0; BLOCK * SUPER];
            for ((s, head), codes) in src.chunks_exact(dtype.block_bytes()).zip(heads).zip(codes) {
                pack_head(dtype, f, s, col, head);
                if let Some((nibbles, fifths)) = quants::nibbles(dtype, s) {
                    pack_nibbles(f, nibbles, fifths, col, codes);
                    continue;
                }
                quants::codes(dtype, s, &mut parts);
                for (part, codes) in parts.chunks_exact(BLOCK).zip(codes.chunks_exact_mut(f.code_bytes())) {
                    pack_codes(f, part, col, codes);
                }
            }
        }
        // No rows of a file become 8-bit floats by themselves.
        Kind::F32 | Kind::E4M3 | Kind::E5M2 => {
            let mut plain = vec![0.0; k];
            // The caller tried the type, and a row has its length.
            let _ = quants::dequantize(dtype, src, &mut plain);
            for (d, v) in dst.chunks_exact_mut(4 * GROUP).zip(&plain) {
                d[col * 4..][..4].copy_from_slice(&v.to_le_bytes());
            }
        }
    }
}

/// Writes one column of a head from a file's block.
fn pack_head(dtype: DType, f: Format, src: &[u8], col: usize, head: &mut [u8]) {
    let parts = quants::scales(dtype, src);
    head[col * 2..][..2].copy_from_slice(&parts.scale);
    if f.min != Per::Nothing {
        head[(GROUP + col) * 2..][..2].copy_from_slice(&parts.min);
    }
    if !f.is_super() {
        return;
    }
    let per = |per: Per, b: usize, half: usize| if per == Per::Sub16 { b * 2 + half } else { b };
    let subs = head[f.factor_bytes()..].chunks_exact_mut(f.sub_bytes());
    for (b, sub) in subs.enumerate() {
        let (scales, mins) = sub.split_at_mut(f.scale.subs() * GROUP);
        for half in 0..f.scale.subs() {
            scales[half * GROUP + col] = parts.subs[per(f.scale, b, half)];
        }
        for half in 0..f.min.subs() {
            mins[half * GROUP + col] = parts.mins[per(f.min, b, half)];
        }
    }
}

/// [`pack_codes`] of a file's 16 bytes, whose halves are steps 0 to 3 and 4 to 7
/// already, and of the fifth bits.
fn pack_nibbles(f: Format, nibbles: &[u8], fifths: u32, col: usize, dst: &mut [u8]) {
    for (step, four) in nibbles.chunks_exact(4).enumerate() {
        dst[step * 64 + col * 4..][..4].copy_from_slice(four);
    }
    if f.codes == Codes::Five {
        for step in 0..8 {
            let four = (fifths >> (step * 4) & 15) as u8;
            dst[256 + step * 8 + col / 2] |= four << (col % 2 * 4);
        }
    }
}

/// Writes one column of a block of codes, four at a time: those of a step.
fn pack_codes(f: Format, codes: &[u8], col: usize, dst: &mut [u8]) {
    let (codes, _) = codes.as_chunks::<4>();
    let put = |dst: &mut [u8], step: usize, word: u32| {
        dst[step * 64 + col * 4..][..4].copy_from_slice(&word.to_le_bytes());
    };
    if f.codes == Codes::Byte {
        for (step, four) in codes.iter().enumerate() {
            put(dst, step, u32::from_le_bytes(*four));
        }
        return;
    }
    const LOW: u32 = 0x0f0f_0f0f;
    let planes = match f.codes {
        Codes::Five => 1,
        Codes::Six => 2,
        _ => 0,
    };
    for step in 0..4 {
        let [low, high] = [step, step + 4].map(|s| u32::from_le_bytes(codes[s]));
        put(dst, step, low & LOW | (high & LOW) << 4);
        for (step, word) in [(step, low), (step + 4, high)] {
            for p in 0..planes {
                // Bit 0 of each byte, moved to bits 28 to 31 in order.
                let four = (word >> (4 + p) & 0x0101_0101).wrapping_mul(0x1020_4080) >> 28;
                dst[256 + p * 64 + step * 8 + col / 2] |= (four as u8) << (col % 2 * 4);
            }
        }
    }
}
