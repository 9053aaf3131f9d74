//! The parts of a layer that work on rows alone: norms, linears, feed-forward,
//! mixture of experts.
//!
//! A row's experts are added in ascending order of their number, whoever else
//! went to them, so that a row's result has the same bits in every batch.

use crate::{
    Activation, Experts,
    load::{Ffn, Linear, Mlp, Norm},
};
use ashlar_kernels::{
    PackedMatrix, Pool, add, gelu, gelu_tanh, gelu_tanh_mul, layer_norm, matmul, matmul_many, rms_norm,
    silu_mul, softmax,
};

/// Rows a task takes in element-wise steps.
pub(crate) const ROWS: usize = 8;

/// Buffers of feed-forward layers, kept from one step to the next.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    gate: Vec<f32>,
    up: Vec<f32>,
    scores: Vec<f32>,
    /// (expert, row, slot, weight), a row's slots in ascending order of expert.
    picks: Vec<(usize, usize, usize, f32)>,
    gathered: Vec<f32>,
    result: Vec<f32>,
    /// `[row][slot][hidden]`, times the weights.
    slots: Vec<f32>,
}

/// `out = norm(x)`, row by row.
pub(crate) fn norm(pool: &Pool, x: &[f32], norm: &Norm, eps: f32, out: &mut Vec<f32>) {
    out.resize(x.len(), 0.0);
    let size = ROWS * norm.gain.len();
    pool.chunks_mut(out, size, |chunk, out| {
        let x = &x[chunk * size..][..out.len()];
        match &norm.bias {
            None => rms_norm(x, &norm.gain, eps, out),
            Some(bias) => layer_norm(x, &norm.gain, bias, eps, out),
        }
    });
}

/// The products of `m` rows with each linear, biases added.
pub(crate) fn linears(pool: &Pool, x: &[f32], m: usize, ws: &mut [(&Linear, &mut Vec<f32>)]) {
    for (linear, out) in ws.iter_mut() {
        out.resize(m * linear.w.n(), 0.0);
    }
    let mut products: Vec<_> = ws.iter_mut().map(|(l, out)| (&l.w, out.as_mut_slice())).collect();
    matmul_many(pool, x, m, &mut products);
    for (linear, out) in ws.iter_mut() {
        if let Some(bias) = &linear.bias {
            out.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
        }
    }
}

/// `out` = what the feed-forward layer makes of `m` rows.
pub(crate) fn ffn(
    pool: &Pool,
    ffn: &Ffn,
    kind: Activation,
    x: &[f32],
    m: usize,
    buffers: &mut Buffers,
    out: &mut Vec<f32>,
) {
    match ffn {
        Ffn::Dense(one) => mlp(pool, one, kind, x, m, buffers, out),
        Ffn::Experts { router, experts, spec } => {
            route(pool, router, *spec, x, m, buffers);
            mixture(pool, experts, spec.used, kind, x, buffers, out);
        }
    }
}

fn mlp(pool: &Pool, mlp: &Mlp, kind: Activation, x: &[f32], m: usize, b: &mut Buffers, out: &mut Vec<f32>) {
    let Buffers { gate, up, .. } = b;
    let inner = match &mlp.gate {
        Some(g) => {
            linears(pool, x, m, &mut [(g, gate), (&mlp.up, up)]);
            gate
        }
        None => {
            linears(pool, x, m, &mut [(&mlp.up, gate)]);
            gate
        }
    };
    let size = ROWS * mlp.up.w.n();
    pool.chunks_mut(inner, size, |chunk, inner| match kind {
        Activation::SiluGlu => silu_mul(inner, &up[chunk * size..]),
        Activation::GeluTanhGlu => gelu_tanh_mul(inner, &up[chunk * size..]),
        Activation::Gelu => gelu(inner),
        Activation::GeluTanh => gelu_tanh(inner),
    });
    linears(pool, inner, m, &mut [(&mlp.down, out)]);
}

/// Chooses every row's experts.
fn route(pool: &Pool, router: &PackedMatrix, spec: Experts, x: &[f32], m: usize, b: &mut Buffers) {
    let Buffers { scores, picks, .. } = b;
    scores.resize(m * spec.count, 0.0);
    matmul(pool, x, m, router, scores);
    picks.clear();
    for (row, scores) in scores.chunks_exact_mut(spec.count).enumerate() {
        softmax(scores);
        let chosen = choose(scores, spec).into_iter().enumerate();
        picks.extend(chosen.map(|(slot, (expert, weight))| (expert, row, slot, weight)));
    }
}

/// Runs each expert on the rows that chose it and adds up a row's results.
fn mixture(
    pool: &Pool,
    experts: &[Mlp],
    used: usize,
    kind: Activation,
    x: &[f32],
    b: &mut Buffers,
    out: &mut Vec<f32>,
) {
    let hidden = experts[0].down.w.n();
    let [mut gathered, mut result] = [&mut b.gathered, &mut b.result].map(std::mem::take);
    let mut picks = std::mem::take(&mut b.picks);
    picks.sort_unstable_by_key(|p| (p.0, p.1));
    b.slots.resize(x.len() * used, 0.0);
    for group in picks.chunk_by(|a, b| a.0 == b.0) {
        gathered.clear();
        group.iter().for_each(|p| gathered.extend(&x[p.1 * hidden..][..hidden]));
        mlp(pool, &experts[group[0].0], kind, &gathered, group.len(), b, &mut result);
        for (&(_, row, slot, weight), result) in group.iter().zip(result.chunks_exact(hidden)) {
            let to = &mut b.slots[(row * used + slot) * hidden..][..hidden];
            to.iter_mut().zip(result).for_each(|(to, r)| *to = weight * r);
        }
    }
    (b.picks, b.gathered, b.result) = (picks, gathered, result);
    out.clear();
    out.resize(x.len(), 0.0);
    for (out, slots) in out.chunks_exact_mut(hidden).zip(b.slots.chunks_exact(used * hidden)) {
        slots.chunks_exact(hidden).for_each(|slot| add(out, slot));
    }
}

/// The most probable experts of one row with their weights, in ascending order;
/// of equal ones the lower number wins.
fn choose(scores: &[f32], e: Experts) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.truncate(e.used);
    let total: f32 = if e.normalized { order.iter().map(|&i| scores[i]).sum() } else { 1.0 };
    order.sort_unstable();
    order.into_iter().map(|i| (i, scores[i] / total)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_probable_experts_in_order() {
        let e = Experts { count: 4, used: 2, normalized: true };
        assert_eq!(choose(&[0.1, 0.6, 0.1, 0.2], e), [(1, 0.75), (3, 0.25)]);
        assert_eq!(choose(&[0.25; 4], Experts { normalized: false, ..e }), [(0, 0.25), (1, 0.25)]);
    }
}
