//! The AVX-512 tier of attention: four query vectors meet a block in registers.

use super::{Arith, BLOCK, Job, KvType, Plain, Scratch, block_of};
use std::arch::x86_64::*;

/// [`block_of`] with this tier's arithmetic.
///
/// # Safety
/// Needs AVX-512 F, BW, VL, DQ and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn block(job: &Job, head: usize, page: u32, block: usize, s: &mut Scratch) {
    block_of::<Avx512>(job, head, page, block, s);
}

/// [`crate::ops::exp`] of sixteen numbers, the same steps.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
fn exp(x: __m512) -> __m512 {
    let set = |v: f32| _mm512_set1_ps(v);
    let clamped = _mm512_min_ps(set(89.0), _mm512_max_ps(set(-87.0), x));
    let shifted = _mm512_fmadd_ps(clamped, set(std::f32::consts::LOG2_E), set(12_582_912.0));
    let n = _mm512_sub_ps(shifted, set(12_582_912.0));
    let r = _mm512_fmadd_ps(n, set(-0.693_359_4), clamped);
    let r = _mm512_fmadd_ps(n, set(2.121_944_4e-4), r);
    let p = _mm512_fmadd_ps(r, set(1.0 / 720.0), set(1.0 / 120.0));
    let p = _mm512_fmadd_ps(p, r, set(1.0 / 24.0));
    let p = _mm512_fmadd_ps(p, r, set(1.0 / 6.0));
    let p = _mm512_fmadd_ps(p, r, set(0.5));
    let p = _mm512_fmadd_ps(p, r, set(1.0));
    let p = _mm512_fmadd_ps(p, r, set(1.0));
    let n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4B40_0000));
    let half = _mm512_srai_epi32::<1>(n);
    let power = |n: __m512i| {
        let n = _mm512_add_epi32(n, _mm512_set1_epi32(127));
        _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
    };
    let y = _mm512_mul_ps(_mm512_mul_ps(p, power(half)), power(_mm512_sub_epi32(n, half)));
    let there = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, set(-87.0));
    _mm512_maskz_mov_ps(there, y)
}

/// Which of the columns `c .. c + 64`, sixteen to a mask, are below `dim`.
fn masks(dim: usize, c: usize) -> [u16; 4] {
    std::array::from_fn(|p| {
        let left = dim.saturating_sub(c + p * 16).min(16);
        ((1u32 << left) - 1) as u16
    })
}

/// Only named from [`block`], so the features are there.
struct Avx512;

impl Arith for Avx512 {
    #[inline(always)]
    fn widen(dtype: KvType, part: &[u8], out: &mut [f32]) {
        if dtype != KvType::F16 || !out.len().is_multiple_of(16) || part.len() != 2 * out.len() {
            return Plain::widen(dtype, part, out);
        }
        for at in (0..out.len()).step_by(16) {
            // SAFETY: sixteen halves and sixteen floats from `at` on are there.
            unsafe {
                let half = _mm256_loadu_si256(part.as_ptr().add(at * 2).cast());
                _mm512_storeu_ps(out.as_mut_ptr().add(at), _mm512_cvtph_ps(half));
            }
        }
    }

    #[inline(always)]
    fn scores<const R: usize>(q: [&[f32]; R], keys: &[f32], out: &mut [[f32; BLOCK]; R]) {
        // SAFETY: keys are `[dim][32]` and each query `dim` long, as asserted.
        unsafe {
            let dim = keys.len() / BLOCK;
            assert!(q.iter().all(|q| q.len() == dim));
            let mut s = [[_mm512_setzero_ps(); 2]; R];
            for d in 0..dim {
                let k = keys.as_ptr().add(d * BLOCK);
                let k = [_mm512_loadu_ps(k), _mm512_loadu_ps(k.add(16))];
                for i in 0..R {
                    let q = _mm512_set1_ps(*q[i].get_unchecked(d));
                    s[i][0] = _mm512_fmadd_ps(q, k[0], s[i][0]);
                    s[i][1] = _mm512_fmadd_ps(q, k[1], s[i][1]);
                }
            }
            for i in 0..R {
                _mm512_storeu_ps(out[i].as_mut_ptr(), s[i][0]);
                _mm512_storeu_ps(out[i].as_mut_ptr().add(16), s[i][1]);
            }
        }
    }

    #[inline(always)]
    fn soften(scores: &mut [f32; BLOCK], top: f32) -> (f32, f32) {
        // SAFETY: two registers are the block.
        unsafe {
            let at = scores.as_mut_ptr();
            let (a, b) = (_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16)));
            // The second operand is taken where one is not a number: `top` is one.
            let most = _mm512_max_ps(b, _mm512_max_ps(a, _mm512_set1_ps(top)));
            let high = _mm512_reduce_max_ps(most);
            let high_all = _mm512_set1_ps(high);
            let (a, b) = (exp(_mm512_sub_ps(a, high_all)), exp(_mm512_sub_ps(b, high_all)));
            _mm512_storeu_ps(at, a);
            _mm512_storeu_ps(at.add(16), b);
            let s = _mm512_add_ps(a, b);
            let s = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps::<1>(s));
            let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
            let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
            let s = _mm_add_ss(s, _mm_shuffle_ps::<1>(s, s));
            (high, _mm_cvtss_f32(s))
        }
    }

    #[inline(always)]
    fn weigh<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        weights: &[[f32; BLOCK]; R],
        values: &[f32],
    ) {
        let dim = values.len() / BLOCK;
        assert!(sums.iter().all(|s| s.len() == dim));
        // SAFETY: values are `[32][dim]`; the mask leaves out what lies beyond.
        unsafe {
            let mut c = 0;
            while c < dim {
                // Up to 64 columns stay in registers over all positions.
                let masks = masks(dim, c);
                let mut a = [[_mm512_setzero_ps(); 4]; R];
                for i in 0..R {
                    for p in 0..4 {
                        let at = sums[i].as_ptr().wrapping_add(c + p * 16);
                        let old = _mm512_maskz_loadu_ps(masks[p], at);
                        a[i][p] = _mm512_mul_ps(old, _mm512_set1_ps(shrink[i]));
                    }
                }
                for j in 0..BLOCK {
                    let row = values.as_ptr().add(j * dim);
                    let v: [__m512; 4] =
                        std::array::from_fn(|p| _mm512_maskz_loadu_ps(masks[p], row.wrapping_add(c + p * 16)));
                    for i in 0..R {
                        let w = _mm512_set1_ps(weights[i][j]);
                        for p in 0..4 {
                            a[i][p] = _mm512_fmadd_ps(w, v[p], a[i][p]);
                        }
                    }
                }
                for i in 0..R {
                    for p in 0..4 {
                        let at = sums[i].as_mut_ptr().wrapping_add(c + p * 16);
                        _mm512_mask_storeu_ps(at, masks[p], a[i][p]);
                    }
                }
                c += 64;
            }
        }
    }

    #[inline(always)]
    fn dots<const R: usize>(q: [&[i8]; R], keys: &[u8], out: &mut [[i32; BLOCK]; R]) {
        // SAFETY: keys are `[dim/4][32][4]` and each query `dim` long, as asserted.
        unsafe {
            let dim = keys.len() / BLOCK;
            assert!(q.iter().all(|q| q.len() == dim) && dim.is_multiple_of(4));
            let mut s = [[_mm512_setzero_si512(); 2]; R];
            for d in 0..dim / 4 {
                let k = keys.as_ptr().add(d * 4 * BLOCK);
                let k = [_mm512_loadu_si512(k.cast()), _mm512_loadu_si512(k.add(64).cast())];
                for i in 0..R {
                    let q = _mm512_set1_epi32(q[i].as_ptr().add(d * 4).cast::<i32>().read_unaligned());
                    s[i][0] = _mm512_dpbusd_epi32(s[i][0], k[0], q);
                    s[i][1] = _mm512_dpbusd_epi32(s[i][1], k[1], q);
                }
            }
            for i in 0..R {
                _mm512_storeu_si512(out[i].as_mut_ptr().cast(), s[i][0]);
                _mm512_storeu_si512(out[i].as_mut_ptr().add(16).cast(), s[i][1]);
            }
        }
    }

    #[inline(always)]
    fn scale(dots: &[i32; BLOCK], shift: i32, scales: &[u8], unit: f32, out: &mut [f32; BLOCK]) {
        assert_eq!(scales.len(), 4 * BLOCK);
        for at in [0, 16] {
            // SAFETY: sixteen of each from `at` on are there.
            unsafe {
                let d = _mm512_loadu_si512(dots.as_ptr().add(at).cast());
                let d = _mm512_cvtepi32_ps(_mm512_sub_epi32(d, _mm512_set1_epi32(shift)));
                let s = _mm512_loadu_ps(scales.as_ptr().add(at * 4).cast());
                let s = _mm512_mul_ps(d, _mm512_mul_ps(s, _mm512_set1_ps(unit)));
                _mm512_storeu_ps(out.as_mut_ptr().add(at), s);
            }
        }
    }

    #[inline(always)]
    fn encode(weights: &[f32; BLOCK], scales: &[u8], codes: &mut [u8; BLOCK]) -> f32 {
        assert_eq!(scales.len(), 4 * BLOCK);
        // SAFETY: sixteen of each from 0 and 16 on are there.
        unsafe {
            let zero = _mm512_setzero_ps();
            let scaled = |at: usize| {
                let w = _mm512_loadu_ps(weights.as_ptr().add(at));
                let s = _mm512_loadu_ps(scales.as_ptr().add(at * 4).cast());
                _mm512_maskz_mul_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(w, zero), w, s)
            };
            let (a, b) = (scaled(0), scaled(16));
            let top = _mm512_reduce_max_ps(_mm512_max_ps(b, _mm512_max_ps(a, zero)));
            let inverse = _mm512_set1_ps(if top > 0.0 { 255.0 / top } else { 0.0 });
            for (at, v) in [(0, a), (16, b)] {
                let c = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
                let c = _mm512_min_epi32(_mm512_max_epi32(c, _mm512_setzero_si512()), _mm512_set1_epi32(255));
                _mm_storeu_si128(codes.as_mut_ptr().add(at).cast(), _mm512_cvtepi32_epi8(c));
            }
            top / 255.0
        }
    }

    #[inline(always)]
    fn weigh_codes<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        codes: &[[u8; BLOCK]; R],
        unit: [f32; R],
        values: &[u8],
    ) {
        let dim = values.len() / BLOCK;
        assert!(sums.iter().all(|s| s.len() == dim));
        // SAFETY: values are `[8][dim][4]`; the mask leaves out what lies beyond.
        unsafe {
            let mut c = 0;
            while c < dim {
                let masks = masks(dim, c);
                let mut dots = [[_mm512_setzero_si512(); 4]; R];
                for step in 0..BLOCK / 4 {
                    let row = values.as_ptr().add(step * dim * 4);
                    let v: [__m512i; 4] = std::array::from_fn(|p| {
                        _mm512_maskz_loadu_epi32(masks[p], row.wrapping_add((c + p * 16) * 4).cast())
                    });
                    for i in 0..R {
                        let w = _mm512_set1_epi32(codes[i].as_ptr().add(step * 4).cast::<i32>().read_unaligned());
                        for p in 0..4 {
                            dots[i][p] = _mm512_dpbusd_epi32(dots[i][p], w, v[p]);
                        }
                    }
                }
                for i in 0..R {
                    for p in 0..4 {
                        let at = sums[i].as_mut_ptr().wrapping_add(c + p * 16);
                        let old = _mm512_maskz_loadu_ps(masks[p], at);
                        let old = _mm512_mul_ps(old, _mm512_set1_ps(shrink[i]));
                        let dot = _mm512_cvtepi32_ps(dots[i][p]);
                        _mm512_mask_storeu_ps(at, masks[p], _mm512_fmadd_ps(dot, _mm512_set1_ps(unit[i]), old));
                    }
                }
                c += 64;
            }
        }
    }
}
