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

/// Only named from [`block`], so the features are there.
struct Avx512;

impl Arith for Avx512 {
    #[inline(always)]
    fn widen(dtype: KvType, part: &[u8], out: &mut [f32]) {
        Plain::widen(dtype, part, out);
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
                let masks: [u16; 4] = std::array::from_fn(|p| {
                    let left = dim.saturating_sub(c + p * 16).min(16);
                    ((1u32 << left) - 1) as u16
                });
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
                let masks: [u16; 4] = std::array::from_fn(|p| {
                    let left = dim.saturating_sub(c + p * 16).min(16);
                    ((1u32 << left) - 1) as u16
                });
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
