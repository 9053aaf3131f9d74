//! The AVX2 tier: a group as two halves of eight columns.
//!
//! Without a byte dot product that adds to 32 bits, products go through 16 bits:
//! codes of up to five bits may be summed over a half block there, wider ones are
//! widened pair by pair. What is computed, and in which order, is in the parent
//! module.

use super::{AHEAD, Out, Rows, by_format, by_rows, check_plain, check_quantized};
use crate::packed::{BLOCK, Codes, FORMATS, Format, GROUP, Kind, Per, SUPER};
use crate::quants::IQ4_NL;
use std::{arch::x86_64::*, ops::Range};

/// Rows `range` times one group of quantized weights of format `f`.
///
/// # Safety
/// Needs AVX2, FMA and F16C; `out` is valid for the rows.
pub(super) unsafe fn quantized(f: usize, data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    check_quantized(f, data, rows, &range);
    // SAFETY: lengths just checked; the rest is the caller's promise.
    unsafe {
        by_format!(f, F, rows_of::<F>(data, rows, range, out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of<const F: usize>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [4, 1], |r, at, M| tile::<F, M>(data, rows, r, at));
    }
}

struct Of<const F: usize>;

impl<const F: usize> Of<F> {
    const FORMAT: Format = FORMATS[F];
    /// Whether four products of pairs fit 16 bits.
    const SMALL: bool = matches!(FORMATS[F].codes, Codes::Nibble | Codes::Five);
    /// Whether eight do: a whole block, of one scale, is summed there.
    const WHOLE: bool =
        matches!(FORMATS[F].codes, Codes::Nibble) && !matches!(FORMATS[F].scale, Per::Sub16);
}

/// Spreads 32 bits to 32 bytes of `value` where they are set.
#[inline]
#[target_feature(enable = "avx2")]
fn bits(plane: u32, value: i8) -> __m256i {
    let spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(plane as i32),
        _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303),
    );
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
    _mm256_and_si256(set, _mm256_set1_epi8(value))
}

/// Steps `i` and `i + 4` of eight columns of a block: unsigned codes, or signed
/// ones for bytes and tables.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const F: usize>(codes: *const u8, i: usize, side: usize) -> (__m256i, __m256i) {
    // SAFETY: the caller's block holds all of its format's bytes.
    unsafe {
        let load = |step: usize| _mm256_loadu_si256(codes.add(step * 64 + side * 32).cast());
        if matches!(Of::<F>::FORMAT.codes, Codes::Byte) {
            let flip = _mm256_set1_epi8(-128);
            return (_mm256_xor_si256(load(i), flip), _mm256_xor_si256(load(i + 4), flip));
        }
        let (both, low_bits) = (load(i), _mm256_set1_epi8(15));
        let mut low = _mm256_and_si256(both, low_bits);
        let mut high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low_bits);
        let plane = |p: usize, s: usize| {
            codes.add(256 + p * 64 + s * 8 + side * 4).cast::<u32>().read_unaligned()
        };
        match Of::<F>::FORMAT.codes {
            Codes::Table => {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_NL.as_ptr().cast()));
                low = _mm256_shuffle_epi8(table, low);
                high = _mm256_shuffle_epi8(table, high);
            }
            Codes::Five | Codes::Six => {
                low = _mm256_or_si256(low, bits(plane(0, i), 16));
                high = _mm256_or_si256(high, bits(plane(0, i + 4), 16));
                if matches!(Of::<F>::FORMAT.codes, Codes::Six) {
                    low = _mm256_or_si256(low, bits(plane(1, i), 32));
                    high = _mm256_or_si256(high, bits(plane(1, i + 4), 32));
                }
            }
            _ => {}
        }
        (low, high)
    }
}

/// `M` rows from `r` on times the group, eight columns at a time.
///
/// # Safety
/// As [`quantized`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const F: usize, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    // SAFETY: `quantized` checked that the group and the rows have these lengths.
    unsafe {
        for side in 0..out.cols.div_ceil(8) {
            half::<F, M>(data, rows, r, side, out);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half<const F: usize, const M: usize>(
    data: &[u8],
    rows: Rows,
    r: usize,
    side: usize,
    out: Out,
) {
    let f = Of::<F>::FORMAT;
    let signed_codes = matches!(f.codes, Codes::Byte | Codes::Table);
    let (k, blocks) = (rows.k, rows.k / BLOCK);
    // SAFETY: `quantized` checked the lengths; `side` is 0 or 1.
    unsafe {
        let heads = data.as_ptr();
        let codes = heads.add(f.heads_bytes(blocks, rows.run));
        let span = f.span(rows.run);
        let factor = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.add(side * 16).cast()));
        let unsigned = |p: *const u8| _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(side * 8).cast()));
        let signed = |p: *const u8| _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(side * 8).cast()));
        let ones = _mm256_set1_epi16(1);
        let mut a = [_mm256_setzero_ps(); M];
        let mut b = [_mm256_setzero_ps(); M];
        for block in 0..blocks {
            let code = codes.add(block * f.code_bytes());
            for line in (0..f.code_bytes()).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(code.wrapping_add(AHEAD + line).cast());
            }
            let q = rows.codes.as_ptr().add(r * k + block * BLOCK);
            let act = rows.blocks.as_ptr().add(r * blocks + block);
            let head = heads.add((block >> span) * f.head_bytes());
            let sub = head.add(f.factor_bytes() + block % SUPER * f.sub_bytes());
            let mut low = [_mm256_setzero_si256(); M];
            let mut high = [_mm256_setzero_si256(); M];
            for s in 0..4 {
                let (w_low, w_high) = unpack::<F>(code, s, side);
                for i in 0..M {
                    let at = |s: usize| {
                        _mm256_set1_epi32(q.add(i * k + s * 4).cast::<i32>().read_unaligned())
                    };
                    let add = |acc: __m256i, w: __m256i, q: __m256i| {
                        if signed_codes {
                            // |w| ≤ 128 and |q| ≤ 127: a pair fits 16 bits.
                            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
                            return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones));
                        }
                        let pairs = _mm256_maddubs_epi16(w, q);
                        if Of::<F>::SMALL {
                            // At most 4 × 2 × 31 × 127, or 8 × 2 × 15 × 127: 16 bits.
                            _mm256_add_epi16(acc, pairs)
                        } else {
                            _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, ones))
                        }
                    };
                    low[i] = add(low[i], w_low, at(s));
                    if Of::<F>::WHOLE {
                        low[i] = add(low[i], w_high, at(s + 4));
                    } else {
                        high[i] = add(high[i], w_high, at(s + 4));
                    }
                }
            }
            let scale = match f.scale {
                Per::Run32 => _mm256_loadu_ps(head.add(side * 32).cast()),
                _ => factor(head),
            };
            // Pairs of the zero point and 0.
            let mut zero = _mm256_setzero_si256();
            if matches!(f.min, Per::Zero) {
                let zeros = head.add(GROUP * f.scale.factor() + side * 16);
                zero = _mm256_cvtepu16_epi32(_mm_loadu_si128(zeros.cast()));
            }
            for i in 0..M {
                let act = act.add(i * blocks);
                let of = |half: usize| _mm256_set1_epi32((*act).halves[half]);
                let sum = |sum: __m256i, of: __m256i| {
                    let sum = if Of::<F>::SMALL { _mm256_madd_epi16(sum, ones) } else { sum };
                    if f.offset == 0 || signed_codes {
                        return sum;
                    }
                    let shift = _mm_cvtsi32_si128(f.offset.trailing_zeros() as i32);
                    _mm256_sub_epi32(sum, _mm256_sll_epi32(of, shift))
                };
                if Of::<F>::WHOLE {
                    low[i] = sum(low[i], _mm256_add_epi32(of(0), of(1)));
                } else {
                    (low[i], high[i]) = (sum(low[i], of(0)), sum(high[i], of(1)));
                }
                let (low, high) = (low[i], high[i]);
                let dot = match f.scale {
                    Per::Sub16 => _mm256_add_epi32(
                        _mm256_mullo_epi32(low, signed(sub)),
                        _mm256_mullo_epi32(high, signed(sub.add(16))),
                    ),
                    Per::Sub32 => _mm256_mullo_epi32(_mm256_add_epi32(low, high), unsigned(sub)),
                    // Sums of 32 codes fit 16 bits.
                    _ if matches!(f.min, Per::Zero) => _mm256_sub_epi32(
                        _mm256_add_epi32(low, high),
                        _mm256_madd_epi16(zero, _mm256_add_epi32(of(0), of(1))),
                    ),
                    _ => _mm256_add_epi32(low, high),
                };
                let both = _mm256_mul_ps(scale, _mm256_set1_ps((*act).scale));
                a[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), both, a[i]);
            }
            if matches!(f.min, Per::Nothing | Per::Zero) {
                continue;
            }
            let min = factor(head.add(32));
            let mins = sub.add(16 * f.scale.subs());
            for i in 0..M {
                let act = act.add(i * blocks);
                let of = |half: usize| _mm256_set1_epi32((*act).halves[half]);
                let sum = match f.min {
                    Per::Block => {
                        b[i] = _mm256_fmadd_ps(min, _mm256_set1_ps((*act).sum), b[i]);
                        continue;
                    }
                    Per::Sub32 => _mm256_mullo_epi32(unsigned(mins), _mm256_add_epi32(of(0), of(1))),
                    _ => _mm256_add_epi32(
                        _mm256_mullo_epi32(unsigned(mins), of(0)),
                        _mm256_mullo_epi32(unsigned(mins.add(16)), of(1)),
                    ),
                };
                let both = _mm256_mul_ps(min, _mm256_set1_ps((*act).scale));
                b[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, b[i]);
            }
        }
        for i in 0..M {
            let sum = match f.min {
                Per::Nothing | Per::Zero => a[i],
                Per::Block => _mm256_add_ps(a[i], b[i]),
                _ => _mm256_sub_ps(a[i], b[i]),
            };
            store(out, i, side, sum);
        }
    }
}

/// Writes one half of row `i` of a tile.
///
/// # Safety
/// `out` is valid for that row.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn store(out: Out, i: usize, side: usize, row: __m256) {
    let left = (out.cols - side * 8).min(8) as i32;
    let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    // SAFETY: the mask leaves out columns beyond the matrix.
    unsafe { _mm256_maskstore_ps(out.at.add(i * out.stride + side * 8), mask, row) };
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

/// Eight 8-bit floats, E4M3 in units of [`Kind::unit`].
///
/// # Safety
/// Needs what [`quantized`] needs, and eight bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bytes_to_floats<const E4M3: bool>(at: *const u8) -> __m256 {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadl_epi64(at.cast()) };
    let half = if E4M3 {
        // The sign arrives twice, above the exponent too.
        _mm_and_si128(_mm_slli_epi16::<7>(_mm_cvtepi8_epi16(bytes)), _mm_set1_epi16(!0x4000))
    } else {
        _mm_slli_epi16::<8>(_mm_cvtepu8_epi16(bytes))
    };
    _mm256_cvtph_ps(half)
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scaled_rows<const E4M3: bool>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [4, 1], |r, at, M| scaled_tile::<E4M3, M>(data, rows, r, at));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scaled_tile<const E4M3: bool, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    let (kind, k) = (if E4M3 { Kind::E4M3 } else { Kind::E5M2 }, rows.k);
    // SAFETY: `plain` checked the lengths.
    unsafe {
        let x = rows.x.as_ptr().add(r * k);
        let values = data.as_ptr().add(kind.heads_bytes(k, rows.run));
        for side in 0..out.cols.div_ceil(8) {
            let mut a = [_mm256_setzero_ps(); M];
            for first in (0..k).step_by(rows.run) {
                let (mut even, mut odd) = ([_mm256_setzero_ps(); M], [_mm256_setzero_ps(); M]);
                let end = k.min(first + rows.run);
                let weights = |p: usize| bytes_to_floats::<E4M3>(values.add(p * GROUP + side * 8));
                let at = |i: usize, p: usize| _mm256_set1_ps(*x.add(i * k + p));
                for p in (first..end - 1).step_by(2) {
                    _mm_prefetch::<_MM_HINT_T1>(values.wrapping_add(AHEAD + p * GROUP).cast());
                    let (w, v) = (weights(p), weights(p + 1));
                    for i in 0..M {
                        even[i] = _mm256_fmadd_ps(at(i, p), w, even[i]);
                        odd[i] = _mm256_fmadd_ps(at(i, p + 1), v, odd[i]);
                    }
                }
                if (end - first) % 2 == 1 {
                    let w = weights(end - 1);
                    for i in 0..M {
                        even[i] = _mm256_fmadd_ps(at(i, end - 1), w, even[i]);
                    }
                }
                let scale = data.as_ptr().cast::<f32>().add(first / rows.run * GROUP + side * 8);
                let scale = _mm256_mul_ps(_mm256_loadu_ps(scale), _mm256_set1_ps(kind.unit()));
                for (i, a) in a.iter_mut().enumerate() {
                    *a = _mm256_fmadd_ps(_mm256_add_ps(even[i], odd[i]), scale, *a);
                }
            }
            for (i, a) in a.into_iter().enumerate() {
                store(out, i, side, a);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn plain_rows<const T: u8>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    // SAFETY: the caller's promise.
    unsafe {
        by_rows!(range, out, [4, 1], |r, at, M| plain_tile::<T, M>(data, rows, r, at));
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn plain_tile<const T: u8, const M: usize>(data: &[u8], rows: Rows, r: usize, out: Out) {
    // SAFETY: `plain` checked the lengths.
    unsafe {
        let x = rows.x.as_ptr().add(r * rows.k);
        let mut sums = [[_mm256_setzero_ps(); 2]; M];
        for p in 0..rows.k {
            let width = if T < 2 { 32 } else { 64 };
            _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().wrapping_add(AHEAD + p * width).cast());
            let w: [__m256; 2] = std::array::from_fn(|side| {
                let half = || _mm_loadu_si128(data.as_ptr().add(p * 32 + side * 16).cast());
                match T {
                    0 => _mm256_cvtph_ps(half()),
                    1 => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half()))),
                    _ => _mm256_loadu_ps(data.as_ptr().add(p * 64 + side * 32).cast()),
                }
            });
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_set1_ps(*x.add(i * rows.k + p));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm256_fmadd_ps(x, w, *sum);
                }
            }
        }
        for (i, sums) in sums.into_iter().enumerate() {
            for side in 0..out.cols.div_ceil(8) {
                store(out, i, side, sums[side]);
            }
        }
    }
}
