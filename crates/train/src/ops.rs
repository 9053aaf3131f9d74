//! The elementwise parts of a block and their derivatives, in parallel by rows.
//!
//! Loops are written so that the compiler vectorises them without reordering a
//! sum: reductions run in [`LANES`] fixed lanes, so every machine gets the same
//! bits.

use ashlar_kernels::Pool;
use std::sync::{Mutex, PoisonError};

/// Rows of one task.
const ROWS: usize = 8;
/// Independent partial sums of a reduction.
const LANES: usize = 16;

/// Runs `f(chunk index, chunk)` over `data` cut into chunks of `size`.
pub(crate) fn chunks(pool: &Pool, data: &mut [f32], size: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    scatter(pool, data.chunks_mut(size).collect(), f);
}

/// Runs `f(index, part)` once for each part.
pub(crate) fn scatter<T: Send>(pool: &Pool, parts: Vec<T>, f: impl Fn(usize, T) + Sync) {
    let parts: Vec<_> = parts.into_iter().map(|p| Mutex::new(Some(p))).collect();
    pool.run(parts.len(), |i, _| {
        if let Some(part) = parts[i].lock().unwrap_or_else(PoisonError::into_inner).take() {
            f(i, part);
        }
    });
}

/// Runs `f(row, its slice)` over rows of `width`.
pub(crate) fn rows(pool: &Pool, data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    chunks(pool, data, ROWS * width, |c, part| {
        for (i, row) in part.chunks_mut(width).enumerate() {
            f(c * ROWS + i, row);
        }
    });
}

fn lanes(a: &[f32], start: f32, f: impl Fn(f32, usize) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [start; LANES];
    let whole = a.len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for (l, s) in acc.iter_mut().enumerate() {
            *s = join(*s, f(a[at + l], at + l));
        }
    }
    for i in whole..a.len() {
        acc[0] = join(acc[0], f(a[i], i));
    }
    acc.into_iter().fold(start, join)
}

/// Sum of `a[i] * b[i]`.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let b = &b[..a.len()];
    lanes(a, 0.0, |x, i| x * b[i], |s, v| s + v)
}

/// Sum.
pub(crate) fn sum(a: &[f32]) -> f32 {
    lanes(a, 0.0, |x, _| x, |s, v| s + v)
}

/// Largest value; a NaN may hide here and shows in the sum of exponentials.
pub(crate) fn max(a: &[f32]) -> f32 {
    lanes(a, f32::NEG_INFINITY, |x, _| x, |s, v| if v > s { v } else { s })
}

/// `e^x` to about 2 ulp, branch-free so that loops over it vectorise; clamped to
/// the normal range, NaN kept. Range reduction and polynomial as in Cephes'
/// `expf`.
#[inline]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
    let x = x.clamp(-87.0, 88.0);
    let t = x * std::f32::consts::LOG2_E + ROUND;
    let n = t - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    // The low bits of t are n in two's complement; the rest shifts out.
    (p * r * r + r + 1.0) * f32::from_bits(t.to_bits().wrapping_add(127) << 23)
}

/// `exp` of `row[i] - shift`, in place; returns the sum.
pub(crate) fn exp_shifted(row: &mut [f32], shift: f32) -> f32 {
    for v in row.iter_mut() {
        *v = exp(*v - shift);
    }
    sum(row)
}

/// `1 / sqrt(mean(x²) + eps)`.
pub(crate) fn inv_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// y = x · inv(x) · gain for rows of `gain.len()`; `inv` keeps one factor a row.
pub(crate) fn rms_norm(pool: &Pool, x: &[f32], gain: &[f32], eps: f32, inv: &mut [f32], y: &mut [f32]) {
    let width = gain.len();
    for (v, x) in inv.iter_mut().zip(x.chunks(width)) {
        *v = inv_rms(x, eps);
    }
    rms_norm_again(pool, x, gain, inv, y);
}

/// [`rms_norm`] with the factors already known.
pub(crate) fn rms_norm_again(pool: &Pool, x: &[f32], gain: &[f32], inv: &[f32], y: &mut [f32]) {
    let width = gain.len();
    rows(pool, y, width, |i, y| {
        for ((y, x), g) in y.iter_mut().zip(&x[i * width..]).zip(gain) {
            *y = x * inv[i] * g;
        }
    });
}

/// One row of the norm's backward: dx += ∂/∂x of `dy · norm(x)`.
pub(crate) fn rms_norm_back_row(dy: &[f32], x: &[f32], gain: &[f32], inv: f32, dx: &mut [f32]) {
    let mut dot = [0.0f32; LANES];
    for (i, ((d, x), g)) in dy.iter().zip(x).zip(gain).enumerate() {
        dot[i % LANES] += d * g * x;
    }
    let s = dot.iter().sum::<f32>() * inv * inv * inv / x.len() as f32;
    for (((o, d), x), g) in dx.iter_mut().zip(dy).zip(x).zip(gain) {
        *o += d * g * inv - x * s;
    }
}

/// The norm's backward over all rows, added to `dx`.
pub(crate) fn rms_norm_back(pool: &Pool, dy: &[f32], x: &[f32], gain: &[f32], inv: &[f32], dx: &mut [f32]) {
    let w = gain.len();
    rows(pool, dx, w, |i, dx| {
        rms_norm_back_row(&dy[i * w..(i + 1) * w], &x[i * w..(i + 1) * w], gain, inv[i], dx);
    });
}

/// Cosines and sines by row and half dimension.
pub(crate) struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl Angles {
    /// Angles of `positions` for heads of `head_dim` at base `theta`.
    pub(crate) fn new(positions: &[u32], head_dim: usize, theta: f32) -> Self {
        let half = head_dim / 2;
        let (sin, cos) = positions
            .iter()
            .flat_map(|&p| {
                (0..half).map(move |j| {
                    let freq = f64::from(theta).powf(-2.0 * j as f64 / head_dim as f64);
                    let (s, c) = (f64::from(p) * freq).sin_cos();
                    (s as f32, c as f32)
                })
            })
            .unzip();
        Self { cos, sin, half }
    }

    /// Rotates the heads in `row` (halves paired); `back` rotates the other way.
    pub(crate) fn rotate(&self, i: usize, row: &mut [f32], back: bool) {
        let span = i * self.half..(i + 1) * self.half;
        let (cos, sin) = (&self.cos[span.clone()], &self.sin[span]);
        let sign = if back { -1.0 } else { 1.0 };
        for head in row.chunks_exact_mut(2 * self.half) {
            let (a, b) = head.split_at_mut(self.half);
            for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let s = s * sign;
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
            }
        }
    }
}

/// h = silu(gate) · up, for rows `[gate | up]`.
pub(crate) fn swiglu(pool: &Pool, gate_up: &[f32], ffn: usize, h: &mut [f32]) {
    rows(pool, h, ffn, |i, h| {
        let (gate, up) = gate_up[i * 2 * ffn..(i + 1) * 2 * ffn].split_at(ffn);
        for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
            *h = g / (1.0 + exp(-g)) * u;
        }
    });
}

/// The derivative of [`swiglu`]: `gate_up` becomes its own gradient.
pub(crate) fn swiglu_back(pool: &Pool, dh: &[f32], ffn: usize, gate_up: &mut [f32]) {
    rows(pool, gate_up, 2 * ffn, |i, row| {
        let (gate, up) = row.split_at_mut(ffn);
        for ((g, u), d) in gate.iter_mut().zip(up).zip(&dh[i * ffn..]) {
            let s = 1.0 / (1.0 + exp(-*g));
            (*g, *u) = (d * *u * s * (1.0 + *g * (1.0 - s)), d * *g * s);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library() {
        let mut worst = 0.0f32;
        for i in -870..880 {
            for f in [0.0, 0.031, 0.07] {
                let x = i as f32 / 10.0 + f;
                if x <= 88.0 && x >= -87.0 {
                    worst = worst.max((exp(x) / x.exp() - 1.0).abs());
                }
            }
        }
        assert!(worst < 4e-7, "{worst}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
    }

    #[test]
    fn reductions_take_every_element() {
        let a: Vec<f32> = (0..37).map(|i| i as f32 - 40.0).collect();
        assert_eq!(sum(&a), a.iter().sum::<f32>());
        assert_eq!(max(&a), -4.0);
        assert_eq!(dot(&a, &a), a.iter().map(|x| x * x).sum::<f32>());
    }

    #[test]
    fn rotating_back_undoes_a_rotation() {
        let angles = Angles::new(&[3, 1000], 8, 10_000.0);
        let start: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let mut row = start.clone();
        angles.rotate(1, &mut row, false);
        assert!((row[0] - start[0]).abs() > 0.1);
        angles.rotate(1, &mut row, true);
        row.iter().zip(&start).for_each(|(a, b)| assert!((a - b).abs() < 1e-5));
    }
}
