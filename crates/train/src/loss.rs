//! Cross-entropy at the trained positions only, head and softmax by chunks of
//! rows: the logits of a batch are never whole in memory.

use crate::{base::Base, ops};
use ashlar_kernels::{Pool, sgemm::sgemm};

/// Rows whose logits exist at once: 48 MiB for 49,152 tokens.
const CHUNK: usize = 256;

/// Buffers kept between calls.
#[derive(Default)]
pub(crate) struct Scratch {
    rows: Vec<f32>,
    inv: Vec<f32>,
    logits: Vec<f32>,
}

/// Normed hidden rows of `targets` times the tied head, into `scratch.logits`.
fn logits(pool: &Pool, base: &Base, x: &[f32], targets: &[(usize, u32)], scratch: &mut Scratch) {
    let (h, v, n) = (base.dims.hidden, base.dims.vocab, targets.len());
    scratch.rows.resize(n * h, 0.0);
    scratch.logits.resize(n * v, 0.0);
    scratch.inv.clear();
    for (o, &(row, _)) in scratch.rows.chunks_exact_mut(h).zip(targets) {
        let x = &x[row * h..(row + 1) * h];
        let inv = ops::inv_rms(x, base.dims.eps);
        scratch.inv.push(inv);
        for ((o, x), g) in o.iter_mut().zip(x).zip(&base.norm) {
            *o = x * inv * g;
        }
    }
    sgemm(pool, n, v, h, &scratch.rows, h, false, &base.embed, h, true, &mut scratch.logits, v, false);
}

/// Sum of −log p over `targets`; with `grad` as (dx, scale), adds the gradient of
/// `scale ×` that sum to `dx`, the final hidden states' gradient.
pub(crate) fn cross_entropy(
    pool: &Pool,
    base: &Base,
    x: &[f32],
    targets: &[(usize, u32)],
    scratch: &mut Scratch,
    mut grad: Option<(&mut [f32], f32)>,
) -> f64 {
    let (h, v) = (base.dims.hidden, base.dims.vocab);
    let mut total = 0.0;
    for targets in targets.chunks(CHUNK) {
        logits(pool, base, x, targets, scratch);
        let scale = grad.as_ref().map(|g| g.1);
        let mut losses = vec![0.0f64; targets.len()];
        let parts = scratch.logits.chunks_mut(v).zip(losses.iter_mut()).collect();
        ops::scatter(pool, parts, |i, (row, loss): (&mut [f32], &mut f64)| {
            let hit = targets[i].1 as usize;
            let (top, own) = (ops::max(row), row[hit]);
            let sum = ops::exp_shifted(row, top);
            *loss = f64::from(top) - f64::from(own) + f64::from(sum).ln();
            if let Some(scale) = scale {
                let f = scale / sum;
                row.iter_mut().for_each(|p| *p *= f);
                row[hit] -= scale;
            }
        });
        total += losses.iter().sum::<f64>();
        if let Some((dx, _)) = &mut grad {
            let n = targets.len();
            let Scratch { rows, inv, logits } = &mut *scratch;
            sgemm(pool, n, h, v, logits, v, false, &base.embed, h, false, rows, h, false);
            // In order: a shared row may predict for several samples.
            for (i, &(row, _)) in targets.iter().enumerate() {
                let span = row * h..(row + 1) * h;
                let dy = &rows[i * h..(i + 1) * h];
                ops::rms_norm_back_row(dy, &x[span.clone()], &base.norm, inv[i], &mut dx[span]);
            }
        }
    }
    total
}

/// The logits themselves, for comparison with the inference engine.
#[cfg(test)]
pub(crate) fn all_logits(pool: &Pool, base: &Base, x: &[f32]) -> Vec<f32> {
    let targets: Vec<_> = (0..x.len() / base.dims.hidden).map(|r| (r, 0)).collect();
    let mut scratch = Scratch::default();
    logits(pool, base, x, &targets, &mut scratch);
    scratch.logits
}
