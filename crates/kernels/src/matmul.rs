//! Activations times packed weights.
//!
//! Against quantized weights, an activation row is quantized to int8, 32 values
//! to a scale. Within a block of 32 the sum is exact in integers; across blocks
//! two chains run in ascending k,
//!
//! `a = fma(codes·q, scale_w * scale_a, a)` and `b = fma(min_w, scale_a * Σq, b)`,
//!
//! and the element is `a + b` (`a` alone without minimums). Against plain
//! weights the element is one `fma` chain in ascending k. Each tier follows that
//! order, so an element has one value, whatever computes it.

use crate::{
    Isa, PackedMatrix, Pool,
    isa::tiered,
    packed::{self, BLOCK, GROUP, Kind},
    pool::SendPtr,
};
use std::cell::RefCell;

/// Activation rows a task takes at most: their int8 form stays in L2.
const ROWS: usize = 128;

/// Rows quantized to int8.
#[derive(Default)]
struct Quantized {
    /// `[m, k]`.
    codes: Vec<i8>,
    /// `[m, k/32]`: scale, scale·Σcodes.
    scales: Vec<[f32; 2]>,
    /// `[m, k/32]`: Σcodes.
    sums: Vec<i32>,
}

thread_local! {
    /// The activations of the product this thread has asked for.
    static SCRATCH: RefCell<Quantized> = RefCell::new(Quantized::default());
}

/// Rows of activations as a kernel reads them.
#[derive(Clone, Copy)]
struct Rows<'a> {
    x: &'a [f32],
    codes: &'a [i8],
    scales: &'a [[f32; 2]],
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    sums: &'a [i32],
    k: usize,
}

/// `out = x · wᵀ`: x is `[m, k]`, w `[n, k]`, out `[m, n]`, all row-major.
///
/// # Panics
/// When a slice does not have its shape's length.
pub fn matmul(pool: &Pool, x: &[f32], m: usize, w: &PackedMatrix, out: &mut [f32]) {
    matmul_many(pool, x, m, &mut [(w, out)]);
}

/// [`matmul`] of the same rows with several matrices, in one parallel run.
///
/// # Panics
/// When a slice does not have its shape's length.
pub fn matmul_many(pool: &Pool, x: &[f32], m: usize, ws: &mut [(&PackedMatrix, &mut [f32])]) {
    matmul_on(Isa::active(), pool, x, m, ws);
}

pub(crate) fn matmul_on(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    m: usize,
    ws: &mut [(&PackedMatrix, &mut [f32])],
) {
    let Some(k) = ws.first().map(|w| w.0.k()) else { return };
    assert_eq!(x.len(), m * k, "activations: {m} rows of {k}");
    for (w, out) in ws.iter() {
        assert_eq!(w.k(), k, "matrices of one call share k");
        assert_eq!(out.len(), m * w.n(), "product: {m} rows of {}", w.n());
    }
    if m == 0 {
        return;
    }
    SCRATCH.with_borrow_mut(|scratch| {
        if ws.iter().any(|w| w.0.kind().quantized()) {
            quantize_rows(isa, pool, x, m, k, scratch);
        }
        let rows = Rows { x, codes: &scratch.codes, scales: &scratch.scales, sums: &scratch.sums, k };
        let outs: Vec<_> = ws.iter_mut().map(|w| SendPtr(w.1.as_mut_ptr())).collect();
        let total: usize = ws.iter().map(|w| w.0.groups()).sum();
        // Several tasks a thread, so that a late thread costs little.
        let span = total.div_ceil(pool.threads() * 6).clamp(1, 64);
        let col_tasks = total.div_ceil(span);
        let row_tasks = m.div_ceil(ROWS);
        let body = |task: usize, _: usize| {
            let (row_task, col_task) = (task / col_tasks, task % col_tasks);
            let span_rows = row_task * ROWS..m.min((row_task + 1) * ROWS);
            let (from, to) = (col_task * span, total.min((col_task + 1) * span));
            let mut base = 0;
            for ((w, _), out) in ws.iter().zip(&outs) {
                for g in from.max(base)..to.min(base + w.groups()) {
                    let g = g - base;
                    for r in (span_rows.start..span_rows.end).step_by(4) {
                        let count = (span_rows.end - r).min(4);
                        let mut tile = [[0.0; GROUP]; 4];
                        product(isa, w, g, rows, r, count, &mut tile);
                        let cols = (w.n() - g * GROUP).min(GROUP);
                        for (i, tile) in tile[..count].iter().enumerate() {
                            let at = (r + i) * w.n() + g * GROUP;
                            // SAFETY: rows × columns of `out` belong to one
                            // task each, and its length was checked above.
                            unsafe {
                                out.get().add(at).copy_from_nonoverlapping(tile.as_ptr(), cols);
                            }
                        }
                    }
                }
                base += w.groups();
            }
        };
        pool.run(col_tasks * row_tasks, body);
    });
}

/// The dot products of rows `r .. r + count` with group `g` of `w`.
fn product(
    isa: Isa,
    w: &PackedMatrix,
    g: usize,
    rows: Rows,
    r: usize,
    count: usize,
    tile: &mut [[f32; GROUP]; 4],
) {
    let (kind, data) = (w.kind(), w.group(g));
    if !kind.quantized() {
        let x = &rows.x[r * rows.k..][..count * rows.k];
        match isa {
            Isa::Reference => plain_reference(kind, data, x, tile),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::available` found the features.
            _ => unsafe {
                match count {
                    1 => x86::plain::<1>(kind, data, x, tile),
                    2 => x86::plain::<2>(kind, data, x, tile),
                    3 => x86::plain::<3>(kind, data, x, tile),
                    _ => x86::plain::<4>(kind, data, x, tile),
                }
            },
        }
        return;
    }
    match isa {
        Isa::Reference => reference(kind, data, rows, r, count, tile),
        #[cfg(target_arch = "x86_64")]
        _ => {
            let vnni = isa == Isa::Vnni;
            // SAFETY: `Isa::available` found the features.
            unsafe {
                match count {
                    1 => x86::tile::<1>(vnni, kind, data, rows, r, tile),
                    2 => x86::tile::<2>(vnni, kind, data, rows, r, tile),
                    3 => x86::tile::<3>(vnni, kind, data, rows, r, tile),
                    _ => x86::tile::<4>(vnni, kind, data, rows, r, tile),
                }
            }
        }
    }
}

fn reference(
    kind: Kind,
    data: &[u8],
    rows: Rows,
    r: usize,
    count: usize,
    tile: &mut [[f32; GROUP]; 4],
) {
    let blocks = rows.k / BLOCK;
    for (i, out) in tile[..count].iter_mut().enumerate() {
        let codes = &rows.codes[(r + i) * rows.k..][..rows.k];
        let scales = &rows.scales[(r + i) * blocks..][..blocks];
        for (col, out) in out.iter_mut().enumerate() {
            let (mut a, mut b) = (0f32, 0f32);
            let steps = data.chunks_exact(kind.stride()).zip(codes.chunks_exact(BLOCK));
            for ((w, q), [scale, scaled_sum]) in steps.zip(scales) {
                let dot: i32 = q
                    .iter()
                    .enumerate()
                    .map(|(i, &q)| packed::code(kind, w, col, i) * i32::from(q))
                    .sum();
                a = (dot as f32).mul_add(packed::half_at(w, col) * scale, a);
                if kind != Kind::Byte {
                    b = packed::block_min(kind, w, col).mul_add(*scaled_sum, b);
                }
            }
            *out = if kind == Kind::Byte { a } else { a + b };
        }
    }
}

/// Plain weights: one chain of fused multiply-adds a sum, in ascending k.
fn plain_reference(kind: Kind, data: &[u8], x: &[f32], tile: &mut [[f32; GROUP]; 4]) {
    let k = data.len() / kind.stride();
    let mut sums = [[0f32; GROUP]; 4];
    for (p, step) in data.chunks_exact(kind.stride()).enumerate() {
        for (sum, x) in sums.iter_mut().zip(x.chunks_exact(k)) {
            for (col, s) in sum.iter_mut().enumerate() {
                *s = x[p].mul_add(packed::plain(kind, step, col), *s);
            }
        }
    }
    *tile = sums;
}

fn quantize_rows(isa: Isa, pool: &Pool, x: &[f32], m: usize, k: usize, to: &mut Quantized) {
    let blocks = m * k / BLOCK;
    to.codes.resize(m * k, 0);
    to.scales.resize(blocks, [0.0; 2]);
    to.sums.resize(blocks, 0);
    let (codes, scales, sums) = (
        SendPtr(to.codes.as_mut_ptr()),
        SendPtr(to.scales.as_mut_ptr()),
        SendPtr(to.sums.as_mut_ptr()),
    );
    // A block takes some 20 ns: below a thousand a thread, waking costs more.
    let part = blocks.div_ceil(pool.threads()).max(1024);
    pool.run(blocks.div_ceil(part), |task, _| {
        let (from, len) = (task * part, part.min(blocks - task * part));
        // SAFETY: parts are disjoint and inside the three buffers, one task each.
        let (codes, scales, sums) = unsafe {
            (
                std::slice::from_raw_parts_mut(codes.get().add(from * BLOCK), len * BLOCK),
                std::slice::from_raw_parts_mut(scales.get().add(from), len),
                std::slice::from_raw_parts_mut(sums.get().add(from), len),
            )
        };
        quantize_blocks(isa, &x[from * BLOCK..][..len * BLOCK], codes, scales, sums);
    });
}

tiered! {
    fn quantize_blocks(x: &[f32], codes: &mut [i8], scales: &mut [[f32; 2]], sums: &mut [i32])
        = quantize_body;
}

#[inline(always)]
fn quantize_body(x: &[f32], codes: &mut [i8], scales: &mut [[f32; 2]], sums: &mut [i32]) {
    let (xs, _) = x.as_chunks::<BLOCK>();
    let (codes, _) = codes.as_chunks_mut::<BLOCK>();
    for (((x, codes), scale), sum) in xs.iter().zip(codes).zip(scales).zip(sums) {
        let mut tops = [0f32; GROUP];
        for x in x.as_chunks::<GROUP>().0 {
            for (top, x) in tops.iter_mut().zip(x) {
                let x = x.abs();
                *top = if x > *top { x } else { *top };
            }
        }
        let top = tops.iter().fold(0f32, |a, &b| if b > a { b } else { a });
        let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
        // Adding 1.5·2²³ rounds to an integer, ties to even, in the low bits.
        let mut total = 0;
        for (c, x) in codes.iter_mut().zip(x) {
            let rounded = (x * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
            *c = rounded.clamp(-127, 127) as i8;
            total += i32::from(*c);
        }
        let s = top / 127.0;
        *scale = [s, s * total as f32];
        *sum = total;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, GROUP, Kind, Rows};
    use std::arch::x86_64::*;

    /// The tile of `M` rows; see [`super::reference`] for what it computes.
    ///
    /// # Safety
    /// Needs AVX2, FMA and F16C, and AVX-512 VNNI and VL when `vnni`; `rows`
    /// holds `r .. r + M`.
    pub(super) unsafe fn tile<const M: usize>(
        vnni: bool,
        kind: Kind,
        data: &[u8],
        rows: Rows,
        r: usize,
        tile: &mut [[f32; GROUP]; 4],
    ) {
        assert!(rows.codes.len() >= (r + M) * rows.k && rows.k % BLOCK == 0);
        assert!(rows.scales.len() >= (r + M) * rows.k / BLOCK && rows.sums.len() == rows.scales.len());
        assert_eq!(data.len(), rows.k / BLOCK * kind.stride());
        // SAFETY: lengths just checked, features by the caller.
        unsafe {
            match (kind, vnni) {
                (Kind::Nibble, false) => nibble_avx2::<M>(data, rows, r, tile),
                (Kind::Nibble, true) => nibble_vnni::<M>(data, rows, r, tile),
                (Kind::Byte, false) => byte_avx2::<M, false>(data, rows, r, tile),
                (Kind::Byte, true) => byte_vnni::<M, false>(data, rows, r, tile),
                (_, false) => byte_avx2::<M, true>(data, rows, r, tile),
                (_, true) => byte_vnni::<M, true>(data, rows, r, tile),
            }
        }
    }

    /// Plain weights; see [`super::plain_reference`]. `x` holds `M` rows.
    ///
    /// # Safety
    /// Needs AVX2, FMA and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn plain<const M: usize>(
        kind: Kind,
        data: &[u8],
        x: &[f32],
        tile: &mut [[f32; GROUP]; 4],
    ) {
        let k = data.len() / kind.stride();
        assert!(x.len() == M * k && data.len() == k * kind.stride());
        // SAFETY: `p` stays below k, for which lengths were just checked.
        unsafe {
            let half = |p: usize| _mm_loadu_si128(data.as_ptr().add(p * 16).cast());
            let sums = match kind {
                Kind::F16 => chain::<M>(k, x, |p| _mm256_cvtph_ps(half(p))),
                Kind::BF16 => chain::<M>(k, x, |p| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half(p))))
                }),
                _ => chain::<M>(k, x, |p| _mm256_loadu_ps(data.as_ptr().add(p * 32).cast())),
            };
            for (sum, out) in sums.into_iter().zip(tile.iter_mut()) {
                _mm256_storeu_ps(out.as_mut_ptr(), sum);
            }
        }
    }

    /// `M` chains over k of the eight columns that `weights` gives.
    ///
    /// # Safety
    /// `x` holds `M` rows of `k`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn chain<const M: usize>(k: usize, x: &[f32], weights: impl Fn(usize) -> __m256) -> [__m256; M] {
        let mut sums = [_mm256_setzero_ps(); M];
        for p in 0..k {
            let w = weights(p);
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                let x = unsafe { _mm256_broadcast_ss(x.get_unchecked(i * k + p)) };
                *sum = _mm256_fmadd_ps(x, w, *sum);
            }
        }
        sums
    }

    /// Adds a block's integer sums to the two chains of each row.
    ///
    /// # Safety
    /// `w` points at a block with its head, `scales` at `M` rows, `blocks` apart.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scale<const M: usize, const MIN: bool>(
        dots: [__m256i; M],
        w: *const u8,
        scales: *const [f32; 2],
        blocks: usize,
        a: &mut [__m256; M],
        b: &mut [__m256; M],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let d = _mm256_cvtph_ps(_mm_loadu_si128(w.cast()));
            let min = if MIN {
                _mm256_cvtph_ps(_mm_loadu_si128(w.add(16).cast()))
            } else {
                _mm256_setzero_ps()
            };
            for i in 0..M {
                let s = scales.add(i * blocks).cast::<f32>();
                let both = _mm256_mul_ps(d, _mm256_broadcast_ss(&*s));
                a[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[i]), both, a[i]);
                if MIN {
                    b[i] = _mm256_fmadd_ps(min, _mm256_broadcast_ss(&*s.add(1)), b[i]);
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn finish<const M: usize, const MIN: bool>(
        a: [__m256; M],
        b: [__m256; M],
        tile: &mut [[f32; GROUP]; 4],
    ) {
        for i in 0..M {
            let sum = if MIN { _mm256_add_ps(a[i], b[i]) } else { a[i] };
            // SAFETY: a tile row is eight floats.
            unsafe { _mm256_storeu_ps(tile[i].as_mut_ptr(), sum) };
        }
    }

    /// Four adjacent codes of a row, in every lane.
    ///
    /// # Safety
    /// `q` is valid for 4 bytes.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn spread(q: *const i8) -> __m256i {
        // SAFETY: the caller's promise.
        _mm256_set1_epi32(unsafe { q.cast::<i32>().read_unaligned() })
    }

    /// Writes one kernel: the loop over blocks around `$dots`, which turns block
    /// `$w` and codes `$q` (rows `$k` apart, number `$at` of the blocks) into
    /// exact integer sums.
    macro_rules! kernel {
        ($name:ident, $features:literal, <$M:ident $(, $MIN:ident)?>, $min:expr, $stride:expr,
         |$w:ident, $q:ident, $k:ident, $sums:ident, $blocks:ident| $dots:block) => {
            /// # Safety
            /// As [`tile`].
            #[target_feature(enable = $features)]
            unsafe fn $name<const $M: usize $(, const $MIN: bool)?>(
                data: &[u8],
                rows: Rows,
                r: usize,
                tile: &mut [[f32; GROUP]; 4],
            ) {
                let ($k, $blocks) = (rows.k, rows.k / BLOCK);
                let mut a = [_mm256_setzero_ps(); $M];
                let mut b = [_mm256_setzero_ps(); $M];
                for block in 0..$blocks {
                    // SAFETY: `tile` checked the lengths.
                    unsafe {
                        let $w = data.as_ptr().add(block * $stride);
                        let $q = rows.codes.as_ptr().add(r * $k + block * BLOCK);
                        let $sums = rows.sums.as_ptr().add(r * $blocks + block);
                        let dots: [__m256i; $M] = $dots;
                        let _ = $sums;
                        let scales = rows.scales.as_ptr().add(r * $blocks + block);
                        scale::<$M, { $min }>(dots, $w, scales, $blocks, &mut a, &mut b);
                    }
                }
                finish::<$M, { $min }>(a, b, tile);
            }
        };
    }

    // Codes reach 15: a sum of 8 × 2 products, each at most 15·127, is 30480
    // and fits 16 bits, so one widening serves the block.
    kernel!(nibble_avx2, "avx2,fma,f16c", <M>, true, Kind::Nibble.stride(), |w, q, k, sums, blocks| {
        let mut acc = [_mm256_setzero_si256(); M];
        for s in 0..4 {
            let both = _mm256_loadu_si256(w.add(32 + s * 32).cast());
            let low = _mm256_and_si256(both, _mm256_set1_epi8(15));
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), _mm256_set1_epi8(15));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_maddubs_epi16(low, spread(q.add(i * k + s * 4)));
                let y = _mm256_maddubs_epi16(high, spread(q.add(i * k + s * 4 + 16)));
                *acc = _mm256_add_epi16(*acc, _mm256_add_epi16(x, y));
            }
        }
        acc.map(|x| _mm256_madd_epi16(x, _mm256_set1_epi16(1)))
    });

    kernel!(nibble_vnni, "avx2,fma,f16c,avx512vnni,avx512vl", <M>, true, Kind::Nibble.stride(), |w, q, k, sums, blocks| {
        let mut acc = [_mm256_setzero_si256(); M];
        for s in 0..4 {
            let both = _mm256_loadu_si256(w.add(32 + s * 32).cast());
            let low = _mm256_and_si256(both, _mm256_set1_epi8(15));
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(both), _mm256_set1_epi8(15));
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = _mm256_dpbusd_epi32(*acc, low, spread(q.add(i * k + s * 4)));
                *acc = _mm256_dpbusd_epi32(*acc, high, spread(q.add(i * k + s * 4 + 16)));
            }
        }
        acc
    });

    // |w| ≤ 128 and |q| ≤ 127: a pair is at most 32512 and fits 16 bits.
    kernel!(byte_avx2, "avx2,fma,f16c", <M, MIN>, MIN, 16 + 16 * MIN as usize + 256, |w, q, k, sums, blocks| {
        let mut acc = [_mm256_setzero_si256(); M];
        for s in 0..8 {
            let signed = _mm256_loadu_si256(w.add(16 + 16 * MIN as usize + s * 32).cast());
            let size = _mm256_abs_epi8(signed);
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm256_sign_epi8(spread(q.add(i * k + s * 4)), signed);
                let pairs = _mm256_maddubs_epi16(size, x);
                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
        acc
    });

    // Codes are shifted by 128 to be unsigned, and 128·Σq is taken off again.
    kernel!(byte_vnni, "avx2,fma,f16c,avx512vnni,avx512vl", <M, MIN>, MIN, 16 + 16 * MIN as usize + 256, |w, q, k, sums, blocks| {
        let mut acc = [_mm256_setzero_si256(); M];
        for (i, acc) in acc.iter_mut().enumerate() {
            *acc = _mm256_set1_epi32(-128 * *sums.add(i * blocks));
        }
        for s in 0..8 {
            let signed = _mm256_loadu_si256(w.add(16 + 16 * MIN as usize + s * 32).cast());
            let shifted = _mm256_xor_si256(signed, _mm256_set1_epi8(-128));
            for (i, acc) in acc.iter_mut().enumerate() {
                *acc = _mm256_dpbusd_epi32(*acc, shifted, spread(q.add(i * k + s * 4)));
            }
        }
        acc
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dequantize, quantize};
    use ashlar_core::DType;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2) + 1;
        (0..len)
            .map(|_| {
                s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Rows as a file holds them: quantized, or for Q5 made of random codes.
    fn rows(dtype: DType, n: usize, k: usize, seed: u64) -> Vec<u8> {
        let values = noise(n * k, seed);
        let mut bytes = Vec::new();
        if quantize(dtype, &values, &mut bytes).is_err() {
            let block = dtype.block_bytes();
            let len = dtype.bytes_for(n * k).unwrap();
            bytes = (0..len).map(|i| if i % block < 4 { 0x20 } else { (values[i] * 128.0) as i8 as u8 }).collect();
        }
        bytes
    }

    const TYPES: [DType; 9] = [
        DType::Q4_1, DType::Q4_0, DType::Q8_0, DType::Q5_0, DType::Q5_1,
        DType::F32, DType::F16, DType::BF16, DType::Q4_K,
    ];

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|v| v.to_bits()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_row_has_one_value_on_every_tier_batch_and_thread_count(
            m in 1usize..11, n in 1usize..40, blocks in 1usize..5, seed in 0u64..1000,
        ) {
            for dtype in TYPES {
                let k = blocks * if dtype == DType::Q4_K { 256 } else { 32 };
                let bytes = rows(dtype, n, k, seed);
                let w = PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
                let mut x = noise(m * k, seed + 1);
                x[k / 2] *= 40.0;
                let mut want = vec![0.0; m * n];
                let one = Pool::new(1);
                for (x, out) in x.chunks(k).zip(want.chunks_mut(n)) {
                    matmul_on(Isa::Reference, &one, x, 1, &mut [(&w, out)]);
                }
                for isa in Isa::available() {
                    for threads in [1, 2, 3] {
                        let (mut got, mut twin) = (vec![0.0; m * n], vec![0.0; m * n]);
                        matmul_on(isa, &Pool::new(threads), &x, m, &mut [(&w, &mut got), (&w, &mut twin)]);
                        prop_assert_eq!(bits(&got), bits(&want), "{:?} {:?} {} threads", dtype, isa, threads);
                        prop_assert_eq!(bits(&twin), bits(&want));
                    }
                }
            }
        }

        #[test]
        fn packed_rows_and_products_agree_with_the_file(n in 1usize..20, seed in 0u64..1000) {
            for dtype in TYPES {
                let k = 256;
                let bytes = rows(dtype, n, k, seed);
                let w = PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
                let mut plain = vec![0.0; n * k];
                dequantize(dtype, &bytes, &mut plain).unwrap();
                let mut row = vec![0.0; k];
                for i in 0..n {
                    w.dequantize_row(i, &mut row);
                    // By value: the two may give zeros of either sign.
                    prop_assert_eq!(&row, &plain[i * k..][..k], "{:?}", dtype);
                }
                let x = noise(k, seed + 9);
                let mut out = vec![0.0; n];
                matmul(&Pool::new(1), &x, 1, &w, &mut out);
                for (i, got) in out.iter().enumerate() {
                    let pairs = || x.iter().zip(&plain[i * k..]);
                    let want: f64 = pairs().map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    // Half a step of int8 on each activation, at worst all one way.
                    let room: f64 = pairs().map(|(_, b)| f64::from(b.abs()) / 254.0).sum::<f64>() + 1e-4;
                    prop_assert!((f64::from(*got) - want).abs() <= room, "{dtype:?}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn extreme_codes_do_not_saturate() {
        let mut block = half::f16::ONE.to_le_bytes().to_vec();
        block.extend([0x80u8; 32]);
        let w = PackedMatrix::from_rows(DType::Q8_0, 1, 32, &block).unwrap();
        let mut nibbles = [half::f16::ONE.to_le_bytes(), half::f16::ZERO.to_le_bytes()].concat();
        nibbles.extend([0xffu8; 16]);
        let v = PackedMatrix::from_rows(DType::Q4_1, 1, 32, &nibbles).unwrap();
        for isa in Isa::available() {
            for sign in [1.0, -1.0] {
                let (mut a, mut b) = ([0.0], [0.0]);
                let x = [127.0 * sign; 32];
                matmul_on(isa, &Pool::new(1), &x, 1, &mut [(&w, &mut a), (&v, &mut b)]);
                assert_eq!((a, b), ([-128.0 * 127.0 * 32.0 * sign], [15.0 * 127.0 * 32.0 * sign]));
            }
        }
    }
}
