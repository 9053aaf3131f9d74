//! The decoder forward and backward over one pack.
//!
//! The forward keeps per layer what the backward needs (about 6 KiB a row and
//! layer at hidden 576) and recomputes only the cheap elementwise parts. The
//! backward yields gradients of the LoRA factors alone: no frozen weight has one,
//! and nothing is propagated below the first layer's projections.

use crate::{
    attention,
    base::{Base, Layer},
    lora::Lora,
    loss,
    ops::{self, Angles},
    pack::Pack,
};
use ashlar_kernels::Pool;
use std::sync::Arc;

/// What one layer's forward leaves for its backward.
#[derive(Default)]
struct Kept {
    /// Residual stream into the attention half and into the MLP half.
    x: [Vec<f32>; 2],
    /// Norm factors of both.
    inv: [Vec<f32>; 2],
    /// Low-rank activations by site.
    u: [Vec<f32>; 4],
    /// Rotated queries and keys, values.
    qkv: Vec<f32>,
    /// Attention output and log-sum-exps.
    out: Vec<f32>,
    lse: Vec<f32>,
    gate_up: Vec<f32>,
}

/// Buffers that no layer keeps.
#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    h: Vec<f32>,
    dx: Vec<f32>,
    d_normed: Vec<f32>,
    d_out: Vec<f32>,
    d_qkv: Vec<f32>,
    dh: Vec<f32>,
    du: Vec<f32>,
    attention: attention::Scratch,
    loss: loss::Scratch,
}

/// The frozen base with its updates, and the buffers to run them.
pub(crate) struct Network<'a> {
    base: &'a Base,
    lora: &'a Lora,
    pool: Arc<Pool>,
    kept: Vec<Kept>,
    /// Final hidden states.
    x: Vec<f32>,
    scratch: Scratch,
}

impl<'a> Network<'a> {
    pub(crate) fn new(base: &'a Base, lora: &'a Lora, pool: Arc<Pool>) -> Self {
        let kept = base.layers.iter().map(|_| Kept::default()).collect();
        Self { base, lora, pool, kept, x: Vec::new(), scratch: Scratch::default() }
    }

    /// Sum of −log p over the pack's targets.
    #[cfg(test)]
    pub(crate) fn loss(&mut self, params: &[f32], pack: &Pack) -> f64 {
        self.forward(params, pack);
        let scratch = &mut self.scratch.loss;
        loss::cross_entropy(&self.pool, self.base, &self.x, &pack.targets, scratch, None)
    }

    /// The same, adding the gradient of `scale ×` it to `grads`.
    pub(crate) fn gradient(&mut self, params: &[f32], pack: &Pack, scale: f32, grads: &mut [f32]) -> f64 {
        let angles = self.forward(params, pack);
        let s = &mut self.scratch;
        s.dx.clear();
        s.dx.resize(self.x.len(), 0.0);
        let grad = Some((&mut s.dx[..], scale));
        let targets = &pack.targets;
        let loss = loss::cross_entropy(&self.pool, self.base, &self.x, targets, &mut s.loss, grad);
        let step = self.lora.layer;
        for l in (0..self.base.layers.len()).rev() {
            let span = l * step..(l + 1) * step;
            self.layer_back(l, &params[span.clone()], pack, &angles, &mut grads[span]);
        }
        loss
    }

    /// Logits of every row, for comparison with the inference engine.
    #[cfg(test)]
    pub(crate) fn logits(&mut self, params: &[f32], pack: &Pack) -> Vec<f32> {
        self.forward(params, pack);
        loss::all_logits(&self.pool, self.base, &self.x)
    }

    fn forward(&mut self, params: &[f32], pack: &Pack) -> Angles {
        let dims = &self.base.dims;
        let angles = Angles::new(&pack.positions, dims.head_dim, dims.theta);
        self.x.clear();
        for &t in &pack.tokens {
            let at = t as usize * dims.hidden;
            self.x.extend_from_slice(&self.base.embed[at..at + dims.hidden]);
        }
        let step = self.lora.layer;
        for (l, layer) in self.base.layers.iter().enumerate() {
            self.layer(l, layer, &params[l * step..(l + 1) * step], pack, &angles);
        }
        angles
    }

    fn layer(&mut self, l: usize, layer: &Layer, params: &[f32], pack: &Pack, angles: &Angles) {
        let (pool, dims, n) = (&*self.pool, &self.base.dims, pack.len());
        let (k, s) = (&mut self.kept[l], &mut self.scratch);
        let [qkv, o, gate_up, down] = &self.lora.sites;
        for (u, site) in k.u.iter_mut().zip(&self.lora.sites) {
            u.resize(n * site.low(), 0.0);
        }
        k.inv.iter_mut().for_each(|v| v.resize(n, 0.0));
        k.qkv.resize(n * dims.qkv(), 0.0);
        k.out.resize(n * dims.q(), 0.0);
        k.lse.resize(n * dims.heads, 0.0);
        k.gate_up.resize(n * 2 * dims.ffn, 0.0);
        s.normed.resize(n * dims.hidden, 0.0);
        s.h.resize(n * dims.ffn, 0.0);
        let [w_qkv, w_o, w_gate_up, w_down] = &layer.linear;

        k.x[0].clone_from(&self.x);
        ops::rms_norm(pool, &self.x, &layer.attn_norm, dims.eps, &mut k.inv[0], &mut s.normed);
        qkv.forward(pool, w_qkv, params, &s.normed, &mut k.u[0], &mut k.qkv, false);
        ops::rows(pool, &mut k.qkv, dims.qkv(), |i, row| {
            angles.rotate(i, &mut row[..dims.q() + dims.kv()], false);
        });
        attention::forward(pool, dims, pack, &k.qkv, &mut s.attention, &mut k.out, &mut k.lse);
        o.forward(pool, w_o, params, &k.out, &mut k.u[1], &mut self.x, true);

        k.x[1].clone_from(&self.x);
        ops::rms_norm(pool, &self.x, &layer.ffn_norm, dims.eps, &mut k.inv[1], &mut s.normed);
        gate_up.forward(pool, w_gate_up, params, &s.normed, &mut k.u[2], &mut k.gate_up, false);
        ops::swiglu(pool, &k.gate_up, dims.ffn, &mut s.h);
        down.forward(pool, w_down, params, &s.h, &mut k.u[3], &mut self.x, true);
    }

    /// Turns `scratch.dx` from the gradient of the layer's output into that of its
    /// input, which the first layer leaves unfinished.
    fn layer_back(&mut self, l: usize, params: &[f32], pack: &Pack, angles: &Angles, grads: &mut [f32]) {
        let (pool, dims, n) = (&*self.pool, &self.base.dims, pack.len());
        let (layer, k, s) = (&self.base.layers[l], &mut self.kept[l], &mut self.scratch);
        let [qkv, o, gate_up, down] = &self.lora.sites;
        let [w_qkv, w_o, w_gate_up, w_down] = &layer.linear;
        s.normed.resize(n * dims.hidden, 0.0);
        s.d_normed.resize(n * dims.hidden, 0.0);
        s.d_out.resize(n * dims.q(), 0.0);
        s.d_qkv.resize(n * dims.qkv(), 0.0);
        s.h.resize(n * dims.ffn, 0.0);
        s.dh.resize(n * dims.ffn, 0.0);
        let du = &mut s.du;

        ops::swiglu(pool, &k.gate_up, dims.ffn, &mut s.h);
        let dh = Some(&mut s.dh[..]);
        down.backward(pool, w_down, params, &s.h, &k.u[3], &s.dx, du, grads, dh);
        ops::swiglu_back(pool, &s.dh, dims.ffn, &mut k.gate_up);
        ops::rms_norm_again(pool, &k.x[1], &layer.ffn_norm, &k.inv[1], &mut s.normed);
        let d_normed = Some(&mut s.d_normed[..]);
        let d_gate_up = &k.gate_up;
        gate_up.backward(pool, w_gate_up, params, &s.normed, &k.u[2], d_gate_up, du, grads, d_normed);
        ops::rms_norm_back(pool, &s.d_normed, &k.x[1], &layer.ffn_norm, &k.inv[1], &mut s.dx);

        let d_out = Some(&mut s.d_out[..]);
        o.backward(pool, w_o, params, &k.out, &k.u[1], &s.dx, du, grads, d_out);
        let scratch = &mut s.attention;
        attention::backward(
            pool, dims, pack, &k.qkv, angles, &k.out, &s.d_out, &k.lse, scratch, &mut s.d_qkv,
        );
        ops::rms_norm_again(pool, &k.x[0], &layer.attn_norm, &k.inv[0], &mut s.normed);
        let d_normed = (l > 0).then_some(&mut s.d_normed[..]);
        qkv.backward(pool, w_qkv, params, &s.normed, &k.u[0], &s.d_qkv, du, grads, d_normed);
        if l > 0 {
            ops::rms_norm_back(pool, &s.d_normed, &k.x[0], &layer.attn_norm, &k.inv[0], &mut s.dx);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Sample,
        testing::{sample, tiny},
    };

    /// Factors that are all well away from zero.
    fn factors(lora: &Lora) -> Vec<f32> {
        let mut rng = crate::rng::Rng::new(3, 9);
        (0..lora.len()).map(|_| rng.signed() * 0.4).collect()
    }

    fn samples() -> Vec<Sample> {
        vec![
            sample(&[1, 2, 3, 4, 5, 6, 7, 8], 4..8),
            sample(&[1, 2, 3, 9, 10, 11], 3..5),
            sample(&[1, 2, 3, 4, 12, 13, 2, 2, 9, 30], 5..10),
        ]
    }

    fn gradient(threads: usize, packs: &[Pack]) -> (f64, Vec<f32>) {
        let base = tiny();
        let lora = Lora::new(&base.dims, 2, 3.0);
        let mut net = Network::new(&base, &lora, Pool::new(threads));
        let mut grads = vec![0.0; lora.len()];
        let params = factors(&lora);
        let loss = packs.iter().map(|p| net.gradient(&params, p, 0.1, &mut grads)).sum();
        (loss, grads)
    }

    fn distance(a: &[f32], b: &[f32]) -> f64 {
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
        (norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut b.iter().copied())).sqrt()
    }

    #[test]
    fn gradients_equal_finite_differences_in_every_factor() {
        let base = tiny();
        let lora = Lora::new(&base.dims, 2, 3.0);
        let all = samples();
        let pack = Pack::new(&all.iter().collect::<Vec<_>>(), true);
        assert_eq!(pack.prefix, 3);
        let mut net = Network::new(&base, &lora, Pool::new(1));
        let mut params = factors(&lora);
        let mut grads = vec![0.0; lora.len()];
        net.gradient(&params, &pack, 1.0, &mut grads);
        let h = 4e-3;
        for (name, [r, c], at) in lora.factors() {
            let span = at..at + r * c;
            let slopes: Vec<f32> = span
                .clone()
                .map(|i| {
                    let keep = params[i];
                    params[i] = keep + h;
                    let up = net.loss(&params, &pack);
                    params[i] = keep - h;
                    let down = net.loss(&params, &pack);
                    params[i] = keep;
                    ((up - down) / (2.0 * f64::from(h))) as f32
                })
                .collect();
            assert!(slopes.iter().any(|s| s.abs() > 1e-2), "{name}: flat");
            let d = distance(&grads[span], &slopes);
            assert!(d < 1e-2, "{name}: {d}");
        }
    }

    #[test]
    fn layout_changes_no_gradient() {
        let all = samples();
        let refs: Vec<_> = all.iter().collect();
        let (loss, shared) = gradient(1, &[Pack::new(&refs, true)]);
        let (loss_apart, apart) = gradient(1, &[Pack::new(&refs, false)]);
        let alone: Vec<_> = refs.iter().map(|s| Pack::new(&[s], true)).collect();
        let (loss_alone, accumulated) = gradient(1, &alone);
        assert!((loss - loss_apart).abs() < 1e-4 && (loss - loss_alone).abs() < 1e-4);
        assert!(distance(&shared, &apart) < 1e-4, "{}", distance(&shared, &apart));
        assert!(distance(&accumulated, &apart) < 1e-4, "{}", distance(&accumulated, &apart));
    }

    #[test]
    fn threads_change_no_bit() {
        let long: Vec<u32> = (0..150).map(|i| i * 7 % 40).collect();
        let mut all = samples();
        all.push(sample(&long, 90..150));
        let refs: Vec<_> = all.iter().collect();
        let packs = [Pack::new(&refs, true), Pack::new(&refs[1..], true)];
        assert_eq!(gradient(1, &packs), gradient(3, &packs));
    }

    #[test]
    fn another_sample_is_never_seen() {
        let base = tiny();
        let lora = Lora::new(&base.dims, 2, 3.0);
        let params = factors(&lora);
        let mut net = Network::new(&base, &lora, Pool::new(1));
        let [a, b, c] = &samples()[..] else { unreachable!() };
        let both = net.logits(&params, &Pack::new(&[a, b], false));
        let other = net.logits(&params, &Pack::new(&[a, c], false));
        let rows = 7 * base.dims.vocab;
        assert_eq!(both[..rows], other[..rows]);
        assert_ne!(both[rows..], other[rows..both.len()]);
    }

    /// `cargo test --release -p ashlar-train speed -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn speed() {
        let base = crate::testing::smol();
        let lora = Lora::new(&base.dims, 16, 32.0);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut net = Network::new(&base, &lora, Pool::new(threads));
        let (params, mut grads) = (lora.init(0), vec![0.0; lora.len()]);
        // Question and answer of 65 tokens, of which the template opens 30.
        let qa: Vec<_> = (0..16u32)
            .map(|i| {
                let own = (0..35).map(|j| (i * 977 + j * 31) % 49_152);
                sample(&(0..30).chain(own).collect::<Vec<_>>(), 50..64)
            })
            .collect();
        for n in [8, 16] {
            let refs: Vec<_> = qa[..n].iter().collect();
            for share in [false, true] {
                let pack = Pack::new(&refs, share);
                let mut best = f64::MAX;
                for _ in 0..3 {
                    let t = std::time::Instant::now();
                    net.gradient(&params, &pack, 1.0, &mut grads);
                    best = best.min(t.elapsed().as_secs_f64());
                }
                let (tokens, rows) = (65 * n, pack.len());
                let rate = tokens as f64 / best;
                eprintln!("{n} samples, {rows} rows, {best:.2} s, {rate:.0} sample tokens/s");
            }
        }
    }
}
