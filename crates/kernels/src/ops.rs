//! Norms, activations, softmax and rotary positions.
//!
//! Each is one body compiled once a tier ([`crate::isa`]); sums run in eight
//! lanes joined in a fixed order. What may not happen here: a call into the
//! system's maths library inside a per-token loop, whose results differ from one
//! platform to the next.

use crate::{Isa, isa::tiered};
use std::sync::OnceLock;

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

/// Hyperbolic tangent: an odd polynomial (least squares) below 0.625, above it
/// `1 - 2 / (e^2|x| + 1)`; within 3e-7 of the value.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let (size, z) = (x.abs(), x * x);
    let p = z.mul_add(-0.005_731_195, 0.020_664_724);
    let p = p.mul_add(z, -0.053_748_44);
    let p = p.mul_add(z, 0.133_315_61);
    let p = p.mul_add(z, -0.333_332_87);
    let small = (p * z).mul_add(x, x);
    let large = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    if size < 0.625 { small } else { large }
}

/// 1 − erf(x) for x ≥ 0, as `e^(-x²) · t · Q(t)` with `t = 1 / (1 + 0.43 x)`;
/// Q is our own fit, within 3e-7 of the value.
#[inline(always)]
fn erfc(x: f32) -> f32 {
    let t = 1.0 / 0.43f32.mul_add(x, 1.0);
    let q = t.mul_add(0.074_525_304, -0.313_725_62);
    let q = q.mul_add(t, 0.389_413_06);
    let q = q.mul_add(t, -0.090_940_84);
    let q = q.mul_add(t, 0.249_598_52);
    let q = q.mul_add(t, 0.204_113_14);
    let q = q.mul_add(t, 0.244_511_04);
    let q = q.mul_add(t, 0.242_505_63);
    exp(-x * x) * t * q
}

/// `x · Φ(x)` with the normal distribution itself.
#[inline(always)]
fn gelu_one(x: f32) -> f32 {
    let tail = 0.5 * erfc(x.abs() * std::f32::consts::FRAC_1_SQRT_2);
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// `x · Φ(x)` with Φ approximated by tanh, written as the logistic function it is.
#[inline(always)]
fn gelu_tanh_one(x: f32) -> f32 {
    // √(8/π)·(x + 0.044715 x³)
    let u = 1.595_769 * (0.044_715 * x * x).mul_add(x, x);
    x / (1.0 + exp(-u))
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
    fn layer_norm_on(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) = layer_norm_body;
}

#[inline(always)]
fn layer_norm_body(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let k = weight.len();
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
        let mut sums = [0f32; 8];
        for chunk in x.chunks(8) {
            for (s, v) in sums.iter_mut().zip(chunk) {
                *s += v;
            }
        }
        let mean = join(sums) / k as f32;
        let mut squares = [0f32; 8];
        for chunk in x.chunks(8) {
            for (s, v) in squares.iter_mut().zip(chunk) {
                let d = v - mean;
                *s = d.mul_add(d, *s);
            }
        }
        let scale = 1.0 / (join(squares) / k as f32 + eps).sqrt();
        for (((o, x), w), b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *o = ((x - mean) * scale).mul_add(*w, *b);
        }
    }
}

/// Layer norm (Ba et al. 2016) of rows as long as `weight` and `bias`:
/// `(x - mean) / sqrt(variance + eps) * weight + bias`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    layer_norm_on(Isa::active(), x, weight, bias, eps, out);
}

tiered! {
    fn gelu_on(x: &mut [f32]) = gelu_body;
}

#[inline(always)]
fn gelu_body(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = gelu_one(*v));
}

/// GELU (Hendrycks and Gimpel 2016) in place, by the error function.
pub fn gelu(x: &mut [f32]) {
    gelu_on(Isa::active(), x);
}

tiered! {
    fn gelu_tanh_on(x: &mut [f32]) = gelu_tanh_body;
}

#[inline(always)]
fn gelu_tanh_body(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = gelu_tanh_one(*v));
}

/// GELU in place, by its tanh approximation.
pub fn gelu_tanh(x: &mut [f32]) {
    gelu_tanh_on(Isa::active(), x);
}

tiered! {
    fn gelu_tanh_mul_on(gate: &mut [f32], up: &[f32]) = gelu_tanh_mul_body;
}

#[inline(always)]
fn gelu_tanh_mul_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = gelu_tanh_one(*g) * u;
    }
}

/// GeGLU (Shazeer 2020) in place, by the tanh approximation:
/// `gate = gelu(gate) * up`.
pub fn gelu_tanh_mul(gate: &mut [f32], up: &[f32]) {
    gelu_tanh_mul_on(Isa::active(), gate, up);
}

tiered! {
    fn softcap_on(x: &mut [f32], cap: f32) = softcap_body;
}

#[inline(always)]
fn softcap_body(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|v| *v = cap * tanh(*v / cap));
}

/// `x = cap * tanh(x / cap)`, in place.
pub fn softcap(x: &mut [f32], cap: f32) {
    softcap_on(Isa::active(), x, cap);
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

/// Positions whose turns are made at once.
const SPAN: usize = 256;

/// `[position][pair]` of (cosine, sine).
type Span = Box<[(f32, f32)]>;

/// Cosines and sines by position, made in `f64` as positions are first reached:
/// a model's context may be far longer than any sequence it is given.
#[derive(Debug)]
pub struct RopeTable {
    /// Radians a position, one a pair.
    speeds: Vec<f64>,
    scale: f32,
    spans: Vec<OnceLock<Span>>,
}

impl RopeTable {
    /// Angles `position * theta^(-2i/dim) / factors[i]` (Su et al. 2021) for
    /// the first `dim` values of a head, with factors of 1 where `factors` is
    /// `None`. Cosines and sines are multiplied by `scale`, which is 1 but for
    /// context extensions (Peng et al. 2023).
    pub fn new(positions: usize, dim: usize, theta: f32, factors: Option<&[f32]>, scale: f32) -> Self {
        let speeds = (0..dim / 2)
            .map(|i| {
                let factor = factors.and_then(|f| f.get(i)).map_or(1.0, |&f| f64::from(f));
                f64::from(theta).powf(-2.0 * i as f64 / dim as f64) / factor
            })
            .collect();
        let spans = (0..positions.div_ceil(SPAN)).map(|_| OnceLock::new()).collect();
        Self { speeds, scale, spans }
    }

    /// Pairs that turn; the rest of a head stays as it is.
    fn pairs(&self) -> usize {
        self.speeds.len()
    }

    fn at(&self, position: usize) -> &[(f32, f32)] {
        let turns = self.spans[position / SPAN].get_or_init(|| {
            let first = position / SPAN * SPAN;
            let turn = |angle: f64| {
                let (sin, cos) = angle.sin_cos();
                (cos as f32 * self.scale, sin as f32 * self.scale)
            };
            let positions = first..first + SPAN;
            positions.flat_map(|p| self.speeds.iter().map(move |s| turn(p as f64 * s))).collect()
        });
        &turns[position % SPAN * self.pairs()..][..self.pairs()]
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
        let (low, high) = head.split_at_mut(table.pairs());
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
                let (mut layer, mut exact, mut wave, mut glu, mut cap) = (x.clone(), x.clone(), x.clone(), x.clone(), x.clone());
                layer_norm_on(isa, &x, &w, &x, 1e-5, &mut layer);
                gelu_on(isa, &mut exact);
                gelu_tanh_on(isa, &mut wave);
                gelu_tanh_mul_on(isa, &mut glu, &w);
                softcap_on(isa, &mut cap, 5.0);
                [norm, gate, soft, layer, exact, wave, glu, cap].concat().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
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
            let (mut layer, mut wave) = (x.clone(), x.clone());
            layer_norm(&x, &ones, &ones, 1e-5, &mut layer);
            gelu_tanh(&mut wave);
            let centre = x.iter().map(|v| f64::from(*v)).sum::<f64>() / x.len() as f64;
            let spread = x.iter().map(|v| (f64::from(*v) - centre).powi(2)).sum::<f64>() / x.len() as f64;
            for i in 0..x.len() {
                let v = f64::from(x[i]);
                prop_assert!((f64::from(norm[i]) - v / (mean + 1e-5).sqrt()).abs() < 1e-4);
                let bent = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044_715 * v.powi(3));
                prop_assert!((f64::from(layer[i]) - 1.0 - (v - centre) / (spread + 1e-5).sqrt()).abs() < 1e-3);
                prop_assert!((f64::from(wave[i]) - 0.5 * v * (1.0 + bent.tanh())).abs() < 1e-5);
                prop_assert!((f64::from(soft[i]) - v.exp() / total).abs() < 1e-6);
                prop_assert!((f64::from(gate[i]) - v / (1.0 + (-v).exp())).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn tanh_and_gelu_are_close_everywhere() {
        // Φ(x) by Simpson's rule over the normal density, from 0.
        let normal = |x: f64| {
            let step = x / 2000.0;
            let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
            let inner: f64 = (1..2000).map(|i| density(f64::from(i) * step) * f64::from(2 + i % 2 * 2)).sum();
            0.5 + (density(0.0) + inner + density(x)) * step / 3.0
        };
        for i in -900..=900 {
            let x = i as f32 / 100.0;
            let wide = f64::from(x);
            assert!((f64::from(tanh(x)) - wide.tanh()).abs() < 3e-7, "tanh({x})");
            assert!((f64::from(gelu_one(x)) - wide * normal(wide)).abs() < 4e-7 * wide.abs().max(1.0), "gelu({x})");
        }
        assert_eq!((tanh(1e9), tanh(-1e9), gelu_one(0.0), gelu_one(100.0)), (1.0, -1.0, 0.0, 100.0));
    }

    #[test]
    fn part_of_a_head_turns() {
        let table = RopeTable::new(600, 4, 100.0, Some(&[1.0, 2.0]), 2.0);
        let mut x: Vec<f32> = (1..=8).map(|v| v as f32).collect();
        rope_halves(&mut x, 8, 300, &table);
        let (sin, cos) = (300.0f64 * 0.1 / 2.0).sin_cos();
        assert!((f64::from(x[1]) - 2.0 * (2.0 * cos - 4.0 * sin)).abs() < 1e-5);
        assert!((f64::from(x[3]) - 2.0 * (2.0 * sin + 4.0 * cos)).abs() < 1e-5);
        assert_eq!(x[4..], [5.0, 6.0, 7.0, 8.0]);
    }

    #[test]
    fn both_rope_layouts_turn_the_same_pairs() {
        let table = RopeTable::new(9, 8, 10_000.0, None, 1.0);
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
