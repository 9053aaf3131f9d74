//! Norms, activations, softmax and rotary positions.
//!
//! Each is one body compiled once a tier ([`crate::isa`]); sums run in eight
//! lanes joined in a fixed order. What may not happen here: a call into the
//! system's maths library inside a per-token loop, whose results differ from one
//! platform to the next.

use crate::{Isa, isa::tiered};

/// e^x by a degree-6 polynomial on [−ln2/2, ln2/2] (Cody and Waite's reduction);
/// within 2 units in the last place, 0 below −87, infinite from 89 on.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.0, 89.0);
    // Adding 1.5·2²³ rounds to an integer held in the low bits.
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = r.mul_add(1.0 / 720.0, 1.0 / 120.0);
    let p = p.mul_add(r, 1.0 / 24.0);
    let p = p.mul_add(r, 1.0 / 6.0);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r, 1.0);
    let p = p.mul_add(r, 1.0);
    // 2^n in two factors: n reaches 128, whose power alone overflows.
    let n = shifted.to_bits() as i32 - 0x4B40_0000;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let y = p * power(half) * power(n - half);
    if x < -87.0 { 0.0 } else { y }
}

/// Eight lanes to one, in a fixed order.
#[inline(always)]
fn join(v: [f32; 8]) -> f32 {
    let [a, b, c, d] = [v[0] + v[4], v[1] + v[5], v[2] + v[6], v[3] + v[7]];
    (a + c) + (b + d)
}

tiered! {
    fn rms_norm_on(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body;
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let k = weight.len();
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
        let mut sums = [0f32; 8];
        let (lanes, rest) = x.as_chunks::<8>();
        for lane in lanes {
            for (s, v) in sums.iter_mut().zip(lane) {
                *s = v.mul_add(*v, *s);
            }
        }
        for (s, v) in sums.iter_mut().zip(rest) {
            *s = v.mul_add(*v, *s);
        }
        let scale = 1.0 / (join(sums) / k as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = x * scale * w;
        }
    }
}

/// Root-mean-square norm (Zhang and Sennrich 2019) of rows as long as `weight`:
/// `x / sqrt(mean(x²) + eps) * weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    rms_norm_on(Isa::active(), x, weight, eps, out);
}

tiered! {
    fn silu_mul_on(gate: &mut [f32], up: &[f32]) = silu_mul_body;
}

#[inline(always)]
fn silu_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

/// SwiGLU (Shazeer 2020) in place: `gate = silu(gate) * up`.
pub fn silu_mul(gate: &mut [f32], up: &[f32]) {
    silu_mul_on(Isa::active(), gate, up);
}

tiered! {
    fn softmax_on(x: &mut [f32]) = softmax_body;
}

#[inline(always)]
fn softmax_body(x: &mut [f32]) {
    let top = x.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut sums = [0f32; 8];
    for chunk in x.chunks_mut(8) {
        for (s, v) in sums.iter_mut().zip(chunk) {
            *v = exp(*v - top);
            *s += *v;
        }
    }
    let scale = 1.0 / join(sums);
    x.iter_mut().for_each(|v| *v *= scale);
}

/// Softmax in place. An empty row stays empty.
pub fn softmax(x: &mut [f32]) {
    softmax_on(Isa::active(), x);
}

/// `x += y`, element by element.
pub fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Cosines and sines of every position, made once in `f64`.
#[derive(Debug)]
pub struct RopeTable {
    pairs: usize,
    /// `[position][pair]` of (cosine, sine).
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Angles `position * theta^(-2i/dim) / factors[i]` (Su et al. 2021), with
    /// factors of 1 where `factors` is `None`.
    pub fn new(positions: usize, dim: usize, theta: f32, factors: Option<&[f32]>) -> Self {
        let pairs = dim / 2;
        let turns = (0..positions)
            .flat_map(|position| {
                (0..pairs).map(move |i| {
                    let factor = factors.and_then(|f| f.get(i)).map_or(1.0, |&f| f64::from(f));
                    let speed = f64::from(theta).powf(-2.0 * i as f64 / dim as f64) / factor;
                    let (sin, cos) = (position as f64 * speed).sin_cos();
                    (cos as f32, sin as f32)
                })
            })
            .collect();
        Self { pairs, turns }
    }

    fn at(&self, position: usize) -> &[(f32, f32)] {
        &self.turns[position * self.pairs..][..self.pairs]
    }
}

/// Turns each head of `x` (heads × `head_dim`) at `position`; element 2i pairs
/// with 2i + 1, as GGUF stores llama's rows.
///
/// # Panics
/// When `position` is beyond the table.
pub fn rope_interleaved(x: &mut [f32], head_dim: usize, position: usize, table: &RopeTable) {
    let turns = table.at(position);
    for head in x.chunks_exact_mut(head_dim) {
        for (pair, (cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
            let [a, b] = *pair;
            *pair = [a * cos - b * sin, a * sin + b * cos];
        }
    }
}

/// Turns each head of `x` at `position`; element i pairs with i + half the
/// turned dimensions ("neox"), as Hugging Face stores llama's rows.
///
/// # Panics
/// When `position` is beyond the table.
pub fn rope_halves(x: &mut [f32], head_dim: usize, position: usize, table: &RopeTable) {
    let turns = table.at(position);
    for head in x.chunks_exact_mut(head_dim) {
        let (low, high) = head.split_at_mut(table.pairs);
        for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(turns) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn exp_is_close_everywhere() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 4e-7, "e^{x}: {got} for {want}");
        }
        assert_eq!((exp(0.0), exp(-1e9), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert_eq!(exp(1e9), f32::INFINITY);
    }

    proptest! {
        #[test]
        fn tiers_agree_bitwise(x in prop::collection::vec(-20f32..20.0, 1..70)) {
            let w: Vec<f32> = x.iter().map(|v| 1.0 - v / 64.0).collect();
            let run = |isa| {
                let (mut norm, mut gate, mut soft) = (x.clone(), x.clone(), x.clone());
                rms_norm_on(isa, &x, &w, 1e-5, &mut norm);
                silu_mul_on(isa, &mut gate, &w);
                softmax_on(isa, &mut soft);
                [norm, gate, soft].concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            for isa in Isa::available() {
                prop_assert_eq!(run(isa), run(Isa::Reference));
            }
        }

        #[test]
        fn values_match_the_formulas(x in prop::collection::vec(-20f32..20.0, 1..70)) {
            let ones = vec![1.0; x.len()];
            let mut norm = x.clone();
            rms_norm(&x, &ones, 1e-5, &mut norm);
            let mean = x.iter().map(|v| f64::from(v * v)).sum::<f64>() / x.len() as f64;
            let (mut soft, mut gate) = (x.clone(), x.clone());
            softmax(&mut soft);
            silu_mul(&mut gate, &ones);
            let total: f64 = x.iter().map(|v| f64::from(*v).exp()).sum();
            for i in 0..x.len() {
                let v = f64::from(x[i]);
                prop_assert!((f64::from(norm[i]) - v / (mean + 1e-5).sqrt()).abs() < 1e-4);
                prop_assert!((f64::from(soft[i]) - v.exp() / total).abs() < 1e-6);
                prop_assert!((f64::from(gate[i]) - v / (1.0 + (-v).exp())).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn both_rope_layouts_turn_the_same_pairs() {
        let table = RopeTable::new(9, 8, 10_000.0, None);
        let halves: Vec<f32> = (0..8).map(|v| v as f32).collect();
        let mut inter: Vec<f32> = (0..8).map(|i| halves[i / 2 + i % 2 * 4]).collect();
        let mut turned = halves.clone();
        rope_halves(&mut turned, 8, 5, &table);
        rope_interleaved(&mut inter, 8, 5, &table);
        assert!((0..8).all(|i| inter[i] == turned[i / 2 + i % 2 * 4]));
        assert!((turned[0] - (0.0 * 5f32.cos() - 4.0 * 5f32.sin())).abs() < 1e-6);
        rope_halves(&mut turned, 8, 0, &table);
    }
}
