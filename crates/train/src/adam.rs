//! The optimizer: Adam (Kingma and Ba; no weight decay, so AdamW is the same),
//! the gradient's norm, the learning-rate schedule.

use crate::ops;
use ashlar_kernels::Pool;
use std::f64::consts::PI;

const BETAS: [f32; 2] = [0.9, 0.999];
const EPS: f32 = 1e-8;
/// Norm to which a larger gradient is scaled down.
const CLIP: f64 = 1.0;
/// Parameters of one task.
const CHUNK: usize = 1 << 14;

/// First and second moments.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Adam {
    pub m: Vec<f32>,
    pub v: Vec<f32>,
}

impl Adam {
    pub(crate) fn new(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len] }
    }

    /// Step `t` (from 1): clips `grads` of norm `norm` and moves `params`.
    pub(crate) fn step(&mut self, pool: &Pool, t: usize, lr: f32, norm: f64, params: &mut [f32], grads: &[f32]) {
        let clip = (CLIP / norm.max(CLIP)) as f32;
        let power = |b: f32| (1.0 - f64::from(b).powf(t as f64)) as f32;
        let (c1, c2) = (power(BETAS[0]), power(BETAS[1]));
        let parts = params
            .chunks_mut(CHUNK)
            .zip(self.m.chunks_mut(CHUNK))
            .zip(self.v.chunks_mut(CHUNK))
            .zip(grads.chunks(CHUNK))
            .collect();
        ops::scatter(pool, parts, |_, (((p, m), v), g): (((&mut [f32], &mut [f32]), &mut [f32]), &[f32])| {
            for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
                let g = g * clip;
                *m = BETAS[0] * *m + (1.0 - BETAS[0]) * g;
                *v = BETAS[1] * *v + (1.0 - BETAS[1]) * g * g;
                *p -= lr * (*m / c1) / ((*v / c2).sqrt() + EPS);
            }
        });
    }
}

/// Euclidean norm, summed in double precision in a fixed order.
pub(crate) fn norm(pool: &Pool, grads: &[f32]) -> f64 {
    let mut sums = vec![0.0f64; grads.len().div_ceil(CHUNK)];
    let parts = sums.iter_mut().zip(grads.chunks(CHUNK)).collect();
    ops::scatter(pool, parts, |_, (sum, part): (&mut f64, &[f32])| {
        *sum = part.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
    });
    sums.iter().sum::<f64>().sqrt()
}

/// Rate of step `i` (from 0) of `steps`: linear over the first tenth, then cosine.
pub(crate) fn rate(peak: f32, i: usize, steps: usize) -> f32 {
    let warm = steps.div_ceil(10);
    let at = if i < warm {
        (i + 1) as f64 / warm as f64
    } else {
        let done = (i - warm + 1) as f64 / (steps - warm + 1) as f64;
        0.5 * (1.0 + (PI * done).cos())
    };
    (f64::from(peak) * at) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_step_is_the_rate_against_the_sign() {
        let mut adam = Adam::new(3);
        let mut p = vec![1.0; 3];
        let g = [30.0, -40.0, 0.0];
        let pool = Pool::new(1);
        assert_eq!(norm(&pool, &g), 50.0);
        adam.step(&pool, 1, 0.1, 50.0, &mut p, &g);
        p.iter().zip([0.9, 1.1, 1.0]).for_each(|(a, b)| assert!((a - b).abs() < 1e-5, "{p:?}"));
        // Clipped to norm 1: m = 0.1 · 30 / 50.
        assert!((adam.m[0] - 0.06).abs() < 1e-6);
    }

    #[test]
    fn the_rate_rises_then_falls() {
        let rates: Vec<_> = (0..50).map(|i| rate(1.0, i, 50)).collect();
        assert_eq!(rates[4], 1.0);
        assert!(rates[..5].is_sorted() && rates[4..].is_sorted_by(|a, b| a > b));
        assert!(rates[49] > 0.0 && rates[49] < 0.01);
        assert_eq!(rate(1.0, 0, 1), 1.0);
    }
}
