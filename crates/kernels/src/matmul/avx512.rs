//! The AVX-512 tier: sixteen columns to a register, the VNNI byte dot product.
//!
//! Weights of a block are unpacked once and met by several rows; each row keeps
//! its chains in registers over the whole of k. What is computed, and in which
//! order, is in the parent module.

use super::{AHEAD, Activation, Out, Rows, by_format, by_rows, check_plain, check_quantized};
use crate::packed::{BLOCK, Codes, FORMATS, Format, GROUP, Kind, Per, SUPER};
use crate::quants::IQ4_NL;
use std::{arch::x86_64::*, ops::Range};

/// Rows `range` times one group of quantized weights of format `f`.
///
/// # Safety
/// Needs AVX-512 F, BW, VL, DQ and VNNI; `out` is valid for the rows.
pub(super) unsafe fn quantized(f: usize, data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    check_quantized(f, data, rows, &range);
    // SAFETY: lengths just checked; the rest is the caller's promise.
    unsafe {
        by_format!(f, F, rows_of::<F>(data, rows, range, out));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn rows_of<const F: usize>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [8, 4, 2, 1], |r, at, M| tile::<F, M>(data, rows, r, at));
    }
}

pub(super) struct Of<const F: usize>;

impl<const F: usize> Of<F> {
    pub(super) const FORMAT: Format = FORMATS[F];
    /// Whether halves of a block have scales of their own.
    pub(super) const HALVES: bool = matches!(FORMATS[F].scale, Per::Sub16);
}

/// Steps `i` and `i + 4` of a block of codes, unsigned.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn unpack<const F: usize>(codes: *const u8, i: usize) -> (__m512i, __m512i) {
    // SAFETY: the caller's block holds all of its format's bytes.
    unsafe {
        let load = |at: usize| _mm512_loadu_si512(codes.add(at).cast());
        if matches!(Of::<F>::FORMAT.codes, Codes::Byte) {
            return (load(i * 64), load((i + 4) * 64));
        }
        let both = load(i * 64);
        let low_bits = _mm512_set1_epi8(15);
        let mut low = _mm512_and_si512(both, low_bits);
        let mut high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low_bits);
        let plane = |p: usize, s: usize| codes.add(256 + p * 64 + s * 8).cast::<u64>().read_unaligned();
        match Of::<F>::FORMAT.codes {
            Codes::Table => {
                let shifted: [i8; 16] = const {
                    let mut t = IQ4_NL;
                    let mut j = 0;
                    while j < 16 {
                        t[j] = (t[j] as u8 ^ 0x80) as i8;
                        j += 1;
                    }
                    t
                };
                let table = _mm512_broadcast_i32x4(_mm_loadu_si128(shifted.as_ptr().cast()));
                low = _mm512_shuffle_epi8(table, low);
                high = _mm512_shuffle_epi8(table, high);
            }
            Codes::Five | Codes::Six => {
                let bit = _mm512_set1_epi8(16);
                low = _mm512_mask_add_epi8(low, plane(0, i), low, bit);
                high = _mm512_mask_add_epi8(high, plane(0, i + 4), high, bit);
                if matches!(Of::<F>::FORMAT.codes, Codes::Six) {
                    let bit = _mm512_set1_epi8(32);
                    low = _mm512_mask_add_epi8(low, plane(1, i), low, bit);
                    high = _mm512_mask_add_epi8(high, plane(1, i + 4), high, bit);
                }
            }
            _ => {}
        }
        (low, high)
    }
}

/// `M` rows from `r` on times the group.
///
/// # Safety
/// As [`quantized`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn tile<const F: usize, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    let f = Of::<F>::FORMAT;
    let (k, blocks) = (rows.k, rows.k / BLOCK);
    // SAFETY: `quantized` checked that the group and the rows have these lengths.
    unsafe {
        let heads = data.as_ptr();
        let codes = heads.add(f.heads_bytes(blocks, rows.run));
        let span = f.span(rows.run);
        let mut a = [_mm512_setzero_ps(); M];
        let mut b = [_mm512_setzero_ps(); M];
        for block in 0..blocks {
            let code = codes.add(block * f.code_bytes());
            for line in (0..f.code_bytes()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(code.wrapping_add(AHEAD + line).cast());
            }
            let q = rows.codes.as_ptr().add(r * k + block * BLOCK);
            let act = rows.blocks.as_ptr().add(r * blocks + block);
            let mut low = [_mm512_setzero_si512(); M];
            let mut high = [_mm512_setzero_si512(); M];
            let shift = f.offset.trailing_zeros();
            for i in 0..M {
                if f.offset != 0 {
                    let [x, y] = (*act.add(i * blocks)).halves;
                    if Of::<F>::HALVES {
                        low[i] = _mm512_set1_epi32(-(x << shift));
                        high[i] = _mm512_set1_epi32(-(y << shift));
                    } else {
                        low[i] = _mm512_set1_epi32(-((x + y) << shift));
                    }
                }
            }
            for s in 0..4 {
                let (w_low, w_high) = unpack::<F>(code, s);
                for i in 0..M {
                    let at = |s: usize| {
                        _mm512_set1_epi32(q.add(i * k + s * 4).cast::<i32>().read_unaligned())
                    };
                    low[i] = _mm512_dpbusd_epi32(low[i], w_low, at(s));
                    // One row alone has too few chains to hide their latency.
                    if Of::<F>::HALVES || M == 1 {
                        high[i] = _mm512_dpbusd_epi32(high[i], w_high, at(s + 4));
                    } else {
                        low[i] = _mm512_dpbusd_epi32(low[i], w_high, at(s + 4));
                    }
                }
            }
            if M == 1 && !Of::<F>::HALVES {
                low[0] = _mm512_add_epi32(low[0], high[0]);
            }
            add_block::<F, M>(Head::of(f, heads, block, span), act, blocks, &low, &high, &mut a, &mut b);
        }
        for i in 0..M {
            store(out, i, joined(f, a[i], b[i]));
        }
    }
}

/// Where a block's scales and minimums lie.
#[derive(Clone, Copy)]
pub(super) struct Head {
    factors: *const u8,
    subs: *const u8,
}

impl Head {
    /// That of block number `block` of a group that begins at `heads`, where 2 to the
    /// `span` blocks share one.
    ///
    /// # Safety
    /// The group has that block.
    #[inline(always)]
    pub(super) unsafe fn of(f: Format, heads: *const u8, block: usize, span: u32) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let factors = heads.add((block >> span) * f.head_bytes());
            Self { factors, subs: factors.add(f.factor_bytes() + block % SUPER * f.sub_bytes()) }
        }
    }
}

/// Adds one block to the chains of `M` rows, from its dot products: `low` of the
/// whole block, or where halves have their own scales of the first half and
/// `high` of the second. Row `i`'s activation is at `act + i * blocks`.
///
/// # Safety
/// Needs what [`quantized`] needs; the block and the activations are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn add_block<const F: usize, const M: usize>(
    head: Head,
    act: *const Activation,
    blocks: usize,
    low: &[__m512i; M],
    high: &[__m512i; M],
    a: &mut [__m512; M],
    b: &mut [__m512; M],
) {
    let f = Of::<F>::FORMAT;
    // SAFETY: the caller's promise.
    unsafe {
        let halves16 = |p: *const u8| _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        let bytes = |p: *const u8| _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        let signed = |p: *const u8| _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
        let scale = match f.scale {
            Per::Run32 => _mm512_loadu_ps(head.factors.cast()),
            _ => halves16(head.factors),
        };
        let sub = head.subs;
        // Pairs of the zero point, negated, and 0.
        let mut less = _mm512_setzero_si512();
        if matches!(f.min, Per::Zero) {
            let zeros = _mm256_loadu_si256(head.factors.add(GROUP * f.scale.factor()).cast());
            less = _mm512_cvtepu16_epi32(_mm256_sub_epi16(_mm256_setzero_si256(), zeros));
        }
        for i in 0..M {
            let act = act.add(i * blocks);
            let dot = match f.scale {
                Per::Sub16 => _mm512_add_epi32(
                    _mm512_mullo_epi32(low[i], signed(sub)),
                    _mm512_mullo_epi32(high[i], signed(sub.add(16))),
                ),
                _ if f.is_super() => _mm512_mullo_epi32(low[i], bytes(sub)),
                // Sums of 32 codes fit 16 bits.
                _ if matches!(f.min, Per::Zero) => {
                    let sum = (*act).halves[0] + (*act).halves[1];
                    _mm512_dpwssd_epi32(low[i], less, _mm512_set1_epi32(sum))
                }
                _ => low[i],
            };
            let both = _mm512_mul_ps(scale, _mm512_set1_ps((*act).scale));
            a[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, a[i]);
        }
        if matches!(f.min, Per::Nothing | Per::Zero) {
            return;
        }
        let min = halves16(head.factors.add(32));
        for i in 0..M {
            let act = act.add(i * blocks);
            let of = |half: usize| _mm512_set1_epi32((*act).halves[half]);
            let mins = sub.add(16 * f.scale.subs());
            let sum = match f.min {
                Per::Block => {
                    b[i] = _mm512_fmadd_ps(min, _mm512_set1_ps((*act).sum), b[i]);
                    continue;
                }
                Per::Sub32 => _mm512_mullo_epi32(bytes(mins), _mm512_add_epi32(of(0), of(1))),
                _ => _mm512_add_epi32(
                    _mm512_mullo_epi32(bytes(mins), of(0)),
                    _mm512_mullo_epi32(bytes(mins.add(16)), of(1)),
                ),
            };
            let both = _mm512_mul_ps(min, _mm512_set1_ps((*act).scale));
            b[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, b[i]);
        }
    }
}

/// What the chains come to.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn joined(f: Format, a: __m512, b: __m512) -> __m512 {
    match f.min {
        Per::Nothing | Per::Zero => a,
        Per::Block => _mm512_add_ps(a, b),
        _ => _mm512_sub_ps(a, b),
    }
}

/// Writes row `i` of a tile.
///
/// # Safety
/// `out` is valid for that row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn store(out: Out, i: usize, row: __m512) {
    let mask = ((1u32 << out.cols) - 1) as u16;
    // SAFETY: the mask leaves out columns beyond the matrix.
    unsafe { _mm512_mask_storeu_ps(out.at.add(i * out.stride), mask, row) };
}

/// Rows `range` times one group of plain weights.
///
/// # Safety
/// As [`quantized`].
pub(super) unsafe fn plain(kind: Kind, data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    check_plain(kind, data, rows, &range);
    // SAFETY: lengths just checked; the rest is the caller's promise.
    unsafe {
        match kind {
            Kind::F16 => plain_rows::<0>(data, rows, range, out),
            Kind::BF16 => plain_rows::<1>(data, rows, range, out),
            Kind::E4M3 => scaled_rows::<true>(data, rows, range, out),
            Kind::E5M2 => scaled_rows::<false>(data, rows, range, out),
            _ => plain_rows::<2>(data, rows, range, out),
        }
    }
}

/// Sixteen 8-bit floats, E4M3 in units of [`Kind::unit`].
///
/// # Safety
/// Needs what [`quantized`] needs, and sixteen bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn bytes_to_floats<const E4M3: bool>(at: *const u8) -> __m512 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadu_si128(at.cast()) };
    let half = if E4M3 {
        // The sign arrives twice, above the exponent too.
        let shifted = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
        _mm256_and_si256(shifted, _mm256_set1_epi16(!0x4000))
    } else {
        _mm256_slli_epi16::<8>(_mm256_cvtepu8_epi16(bytes))
    };
    _mm512_cvtph_ps(half)
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scaled_rows<const E4M3: bool>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [8, 4, 2, 1], |r, at, M| scaled_tile::<E4M3, M>(data, rows, r, at));
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn scaled_tile<const E4M3: bool, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    let (kind, k) = (if E4M3 { Kind::E4M3 } else { Kind::E5M2 }, rows.k);
    // SAFETY: `plain` checked the lengths.
    unsafe {
        let x = rows.x.as_ptr().add(r * k);
        let values = data.as_ptr().add(kind.heads_bytes(k, rows.run));
        let mut a = [_mm512_setzero_ps(); M];
        for first in (0..k).step_by(rows.run) {
            let (mut even, mut odd) = ([_mm512_setzero_ps(); M], [_mm512_setzero_ps(); M]);
            let end = k.min(first + rows.run);
            let weights = |p: usize| bytes_to_floats::<E4M3>(values.add(p * GROUP));
            let at = |i: usize, p: usize| _mm512_set1_ps(*x.add(i * k + p));
            for p in (first..end - 1).step_by(2) {
                _mm_prefetch::<_MM_HINT_T1>(values.wrapping_add(AHEAD + p * GROUP).cast());
                let (w, v) = (weights(p), weights(p + 1));
                for i in 0..M {
                    even[i] = _mm512_fmadd_ps(at(i, p), w, even[i]);
                    odd[i] = _mm512_fmadd_ps(at(i, p + 1), v, odd[i]);
                }
            }
            if (end - first) % 2 == 1 {
                let w = weights(end - 1);
                for i in 0..M {
                    even[i] = _mm512_fmadd_ps(at(i, end - 1), w, even[i]);
                }
            }
            let scale = _mm512_loadu_ps(data.as_ptr().cast::<f32>().add(first / rows.run * GROUP));
            let scale = _mm512_mul_ps(scale, _mm512_set1_ps(kind.unit()));
            for (i, a) in a.iter_mut().enumerate() {
                *a = _mm512_fmadd_ps(_mm512_add_ps(even[i], odd[i]), scale, *a);
            }
        }
        for (i, a) in a.into_iter().enumerate() {
            store(out, i, a);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn plain_rows<const T: u8>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [16, 8, 4, 2, 1], |r, at, M| plain_tile::<T, M>(data, rows, r, at));
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn plain_tile<const T: u8, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    // SAFETY: `plain` checked the lengths.
    unsafe {
        let x = rows.x.as_ptr().add(r * rows.k);
        let mut sums = [_mm512_setzero_ps(); M];
        for p in 0..rows.k {
            _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().wrapping_add(AHEAD + p * if T < 2 { 32 } else { 64 }).cast());
            let half = || _mm256_loadu_si256(data.as_ptr().add(p * 32).cast());
            let w = match T {
                0 => _mm512_cvtph_ps(half()),
                1 => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half()))),
                _ => _mm512_loadu_ps(data.as_ptr().add(p * 64).cast()),
            };
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(i * rows.k + p)), w, *sum);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            store(out, i, sum);
        }
    }
}

/// [`super::quantize_body`] with the same results for finite numbers.
///
/// # Safety
/// Needs what [`quantized`] needs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn quantize(x: &[f32], codes: &mut [i8], meta: &mut [Activation]) {
    let (xs, _) = x.as_chunks::<BLOCK>();
    let (codes, _) = codes.as_chunks_mut::<BLOCK>();
    for ((x, codes), meta) in xs.iter().zip(codes).zip(meta) {
        // SAFETY: a block is 32 floats and 32 bytes.
        unsafe {
            let (x, y) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16)));
            // The second operand is taken where one is not a number, as `>` does.
            let zero = _mm512_setzero_ps();
            let top = _mm512_max_ps(_mm512_abs_ps(y), _mm512_max_ps(_mm512_abs_ps(x), zero));
            let top = _mm512_reduce_max_ps(top);
            let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
            let inverse = _mm512_set1_ps(inverse);
            let round = |v: __m512| {
                let v = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
                _mm512_min_epi32(_mm512_max_epi32(v, _mm512_set1_epi32(-127)), _mm512_set1_epi32(127))
            };
            let (x, y) = (round(x), round(y));
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(x));
            _mm_storeu_si128(codes.as_mut_ptr().add(16).cast(), _mm512_cvtepi32_epi8(y));
            let halves = [_mm512_reduce_add_epi32(x), _mm512_reduce_add_epi32(y)];
            let scale = top / 127.0;
            *meta = Activation { scale, sum: scale * (halves[0] + halves[1]) as f32, halves };
        }
    }
}
