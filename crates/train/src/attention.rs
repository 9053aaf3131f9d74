//! Causal attention by segment, forward and backward, with grouped queries.
//!
//! A row sees the shared prefix and its own segment up to itself, never another
//! segment: that is what keeps packed samples apart. Each task owns one segment
//! and one KV head and writes its own stretch of a scratch buffer; gradients of
//! the shared prefix are summed afterwards in segment order, so the threads leave
//! no mark. Probabilities are recomputed in the backward from the stored
//! log-sum-exp (Dao et al., FlashAttention, 2022).

use crate::{
    base::Dims,
    ops::{self, Angles},
    pack::Pack,
};
use ashlar_kernels::{Pool, sgemm::sgemm_serial as gemm};
use std::ops::Range;

/// Query rows scored at once: bounds a task's memory to this times the keys.
const BLOCK: usize = 64;

/// Buffers kept between calls.
#[derive(Default)]
pub(crate) struct Scratch(Vec<f32>);

/// One segment and one KV head.
struct Task<'a> {
    dims: &'a Dims,
    qkv: &'a [f32],
    rows: Range<usize>,
    /// Shared rows seen besides its own; 0 for the prefix itself.
    prefix: usize,
    kv: usize,
}

impl<'a> Task<'a> {
    fn group(&self) -> usize {
        self.dims.heads / self.dims.kv_heads
    }

    /// From query `row` of head `head` on; stride `dims.qkv()`, as below.
    fn q(&self, row: usize, head: usize) -> &'a [f32] {
        &self.qkv[row * self.dims.qkv() + head * self.dims.head_dim..]
    }

    fn k(&self, row: usize) -> &'a [f32] {
        self.q(row, self.dims.heads + self.kv)
    }

    fn v(&self, row: usize) -> &'a [f32] {
        self.q(row, self.dims.heads + self.dims.kv_heads + self.kv)
    }

    /// Scores of `block` (rows within the segment) against all keys it may see:
    /// `[block, prefix + block.end]`, scaled, not yet masked.
    fn scores(&self, block: &Range<usize>, head: usize, s: &mut Vec<f32>) -> usize {
        let (d, ld, width) = (self.dims.head_dim, self.dims.qkv(), self.prefix + block.end);
        s.resize(block.len() * width, 0.0);
        let q = self.q(self.rows.start + block.start, head);
        let own = self.k(self.rows.start);
        gemm(block.len(), self.prefix, d, q, ld, false, self.k(0), ld, true, s, width, false);
        let s_own = &mut s[self.prefix..];
        gemm(block.len(), block.end, d, q, ld, false, own, ld, true, s_own, width, false);
        let scale = (d as f32).sqrt().recip();
        s.iter_mut().for_each(|v| *v *= scale);
        width
    }

    /// Writes `[rows, group · head_dim]` and one log-sum-exp a row and head.
    fn forward(&self, out: &mut [f32], lse: &mut [f32]) {
        let (d, ld, g) = (self.dims.head_dim, self.dims.qkv(), self.group());
        let mut s = Vec::new();
        for h in 0..g {
            for block in blocks(self.rows.len()) {
                let width = self.scores(&block, self.kv * g + h, &mut s);
                for (row, i) in s.chunks_exact_mut(width).zip(block.clone()) {
                    let (seen, hidden) = row.split_at_mut(self.prefix + i + 1);
                    let top = ops::max(seen);
                    let total = ops::exp_shifted(seen, top);
                    seen.iter_mut().for_each(|v| *v /= total);
                    hidden.fill(0.0);
                    lse[i * g + h] = top + total.ln();
                }
                let o = &mut out[(block.start * g + h) * d..];
                let (n, own) = (block.len(), &s[self.prefix..]);
                gemm(n, d, self.prefix, &s, width, false, self.v(0), ld, false, o, g * d, false);
                let v = self.v(self.rows.start);
                gemm(n, d, block.end, own, width, false, v, ld, false, o, g * d, true);
            }
        }
    }

    /// Length of what [`Task::backward`] writes.
    fn grad_len(&self) -> usize {
        ((self.group() + 2) * self.rows.len() + 2 * self.prefix) * self.dims.head_dim
    }

    /// Writes dq `[rows, group · d]`, then dk and dv of its own rows `[rows, d]`,
    /// then dk and dv of the prefix `[prefix, d]`. `out`, `d_out` and `lse` cover
    /// all rows and heads of the pack.
    fn backward(&self, out: &[f32], d_out: &[f32], lse: &[f32], grads: &mut [f32]) {
        let (d, ld, g, n) = (self.dims.head_dim, self.dims.qkv(), self.group(), self.rows.len());
        let (oq, heads, p) = (self.dims.q(), self.dims.heads, self.prefix);
        let scale = (d as f32).sqrt().recip();
        grads.fill(0.0);
        let (dq, rest) = grads.split_at_mut(n * g * d);
        let (dk, rest) = rest.split_at_mut(n * d);
        let (dv, rest) = rest.split_at_mut(n * d);
        let (dk_p, dv_p) = rest.split_at_mut(p * d);
        let (mut s, mut ds) = (Vec::new(), Vec::new());
        for h in 0..g {
            let head = self.kv * g + h;
            for block in blocks(n) {
                let width = self.scores(&block, head, &mut s);
                let (m, first) = (block.len(), self.rows.start + block.start);
                let go = &d_out[first * oq + head * d..];
                ds.resize(m * width, 0.0);
                gemm(m, p, d, go, oq, false, self.v(0), ld, true, &mut ds, width, false);
                let v = self.v(self.rows.start);
                gemm(m, block.end, d, go, oq, false, v, ld, true, &mut ds[p..], width, false);
                let rows = s.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width));
                for (i, (s, ds)) in rows.enumerate() {
                    let (row, seen) = (first + i, p + block.start + i + 1);
                    let at = row * oq + head * d;
                    let mean = ops::dot(&out[at..at + d], &d_out[at..at + d]);
                    ops::exp_shifted(&mut s[..seen], lse[row * heads + head]);
                    s[seen..].fill(0.0);
                    for (ds, s) in ds.iter_mut().zip(&*s) {
                        *ds = s * (*ds - mean) * scale;
                    }
                }
                let q = self.q(first, head);
                gemm(p, d, m, &s, width, true, go, oq, false, dv_p, d, true);
                gemm(block.end, d, m, &s[p..], width, true, go, oq, false, dv, d, true);
                gemm(p, d, m, &ds, width, true, q, ld, false, dk_p, d, true);
                gemm(block.end, d, m, &ds[p..], width, true, q, ld, false, dk, d, true);
                let dq = &mut dq[(block.start * g + h) * d..];
                gemm(m, d, p, &ds, width, false, self.k(0), ld, false, dq, g * d, false);
                let k = self.k(self.rows.start);
                gemm(m, d, block.end, &ds[p..], width, false, k, ld, false, dq, g * d, true);
            }
        }
    }
}

fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(BLOCK).map(move |a| a..rows.min(a + BLOCK))
}

fn tasks<'a>(dims: &'a Dims, pack: &Pack, qkv: &'a [f32]) -> Vec<Task<'a>> {
    let mut all = Vec::new();
    for rows in &pack.segments {
        let prefix = if rows.start < pack.prefix { 0 } else { pack.prefix };
        all.extend((0..dims.kv_heads).map(|kv| Task { dims, qkv, rows: rows.clone(), prefix, kv }));
    }
    all
}

/// Cuts `data` into consecutive parts of the given lengths.
fn cut(mut data: &mut [f32], lens: impl Iterator<Item = usize>) -> Vec<&mut [f32]> {
    lens.map(|n| data.split_off_mut(..n).unwrap_or_default()).collect()
}

/// Attention of rotated `qkv` into `out` `[rows, heads · head_dim]`; `lse` keeps
/// `[rows, heads]`.
pub(crate) fn forward(
    pool: &Pool,
    dims: &Dims,
    pack: &Pack,
    qkv: &[f32],
    scratch: &mut Scratch,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (tasks, d) = (tasks(dims, pack, qkv), dims.head_dim);
    let g = dims.heads / dims.kv_heads;
    // Per task: outputs, then log-sum-exps.
    let lens: Vec<usize> = tasks.iter().map(|t| t.rows.len() * g * (d + 1)).collect();
    scratch.0.resize(lens.iter().sum(), 0.0);
    ops::scatter(pool, cut(&mut scratch.0, lens.iter().copied()), |i, part| {
        let t = &tasks[i];
        let (o, l) = part.split_at_mut(t.rows.len() * g * d);
        t.forward(o, l);
    });
    let mut at = 0;
    for (t, len) in tasks.iter().zip(lens) {
        let (o, l) = scratch.0[at..at + len].split_at(t.rows.len() * g * d);
        for (i, row) in t.rows.clone().enumerate() {
            let h = row * dims.heads + t.kv * g;
            out[h * d..(h + g) * d].copy_from_slice(&o[i * g * d..(i + 1) * g * d]);
            lse[h..h + g].copy_from_slice(&l[i * g..(i + 1) * g]);
        }
        at += len;
    }
}

/// The gradient of the unrotated `qkv` into `d_qkv`.
#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    pool: &Pool,
    dims: &Dims,
    pack: &Pack,
    qkv: &[f32],
    angles: &Angles,
    out: &[f32],
    d_out: &[f32],
    lse: &[f32],
    scratch: &mut Scratch,
    d_qkv: &mut [f32],
) {
    let (tasks, d) = (tasks(dims, pack, qkv), dims.head_dim);
    let g = dims.heads / dims.kv_heads;
    let lens: Vec<usize> = tasks.iter().map(Task::grad_len).collect();
    scratch.0.resize(lens.iter().sum(), 0.0);
    ops::scatter(pool, cut(&mut scratch.0, lens.iter().copied()), |i, part| {
        tasks[i].backward(out, d_out, lse, part);
    });
    // The prefix is the first segment, so its own gradients are in place before
    // the other segments add theirs.
    let mut at = 0;
    for (t, len) in tasks.iter().zip(lens) {
        let n = t.rows.len();
        let (dq, rest) = scratch.0[at..at + len].split_at(n * g * d);
        let (dk, rest) = rest.split_at(n * d);
        let (dv, rest) = rest.split_at(n * d);
        let (dk_p, dv_p) = rest.split_at(t.prefix * d);
        let (k_at, v_at) = (dims.q() + t.kv * d, dims.q() + dims.kv() + t.kv * d);
        for (i, row) in t.rows.clone().enumerate() {
            let o = &mut d_qkv[row * dims.qkv()..(row + 1) * dims.qkv()];
            o[t.kv * g * d..(t.kv + 1) * g * d].copy_from_slice(&dq[i * g * d..(i + 1) * g * d]);
            o[k_at..k_at + d].copy_from_slice(&dk[i * d..(i + 1) * d]);
            o[v_at..v_at + d].copy_from_slice(&dv[i * d..(i + 1) * d]);
        }
        for row in 0..t.prefix {
            let o = &mut d_qkv[row * dims.qkv()..(row + 1) * dims.qkv()];
            for (at, part) in [(k_at, dk_p), (v_at, dv_p)] {
                for (o, v) in o[at..at + d].iter_mut().zip(&part[row * d..]) {
                    *o += v;
                }
            }
        }
        at += len;
    }
    ops::rows(pool, d_qkv, dims.qkv(), |i, row| {
        angles.rotate(i, &mut row[..dims.q() + dims.kv()], true);
    });
}
