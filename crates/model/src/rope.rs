//! Rotary positions and the ways of stretching them over a longer context.
//!
//! A stretch is a factor each pair's angle is divided by, and a scale on cosines
//! and sines, so that `kernels` knows one kind. What may not happen: angles that
//! depend on a sequence's length, because a cached key would then be another
//! key. Therefore "dynamic" is refused, and "longrope" runs with its factors for
//! short contexts, within the original context.

use crate::{ModelError, keys::Keys, source::Source};
use serde::{Deserialize, Serialize};
use std::f64::consts::TAU;

/// How positions turn queries and keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the angles.
    pub theta: f32,
    /// Values of a head that turn, from its first.
    pub dim: usize,
    /// What each pair's angle is divided by; `None` is 1.
    pub factors: Option<Vec<f32>>,
    /// What cosines and sines are multiplied by.
    pub scale: f32,
    /// Whether value 2i pairs with 2i + 1 (GGUF's llama) instead of i + dim / 2.
    pub interleaved: bool,
}

impl Rope {
    /// Plain rotary positions.
    pub(crate) fn plain(theta: f32, dim: usize) -> Self {
        Self { theta, dim, factors: None, scale: 1.0, interleaved: false }
    }

    /// Radians a position of each pair, before any factor.
    fn speeds(&self) -> impl Iterator<Item = f64> {
        let (theta, dim) = (f64::from(self.theta), self.dim as f64);
        (0..self.dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / dim))
    }

    fn with(mut self, factors: Vec<f32>, scale: f32) -> Self {
        (self.factors, self.scale) = (Some(factors), scale);
        self
    }

    fn linear(self, factor: f32) -> Self {
        let factors = vec![factor; self.dim / 2];
        self.with(factors, 1.0)
    }

    /// Llama 3.1: slow pairs are stretched, fast ones stay, between them a blend.
    fn llama3(self, factor: f32, low: f32, high: f32, original: usize) -> Self {
        let [factor, low, high] = [factor, low, high].map(f64::from);
        let factors = self.speeds().map(|speed| {
            let turns = original as f64 * speed / TAU;
            let blend = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - blend) / factor + blend)) as f32
        });
        let factors = factors.collect();
        self.with(factors, 1.0)
    }

    /// YaRN (Peng et al. 2023): a ramp between the pairs that make `fast` and
    /// `slow` turns within the original context.
    fn yarn(self, factor: f32, original: usize, [fast, slow]: [f32; 2], scale: f32) -> Self {
        let (dim, theta) = (self.dim as f64, f64::from(self.theta));
        let pair = |turns: f32| dim * (original as f64 / (f64::from(turns) * TAU)).ln() / (2.0 * theta.ln());
        let low = pair(fast).floor().max(0.0);
        let mut high = pair(slow).ceil().min(dim - 1.0);
        if low == high {
            high += 0.001;
        }
        let factors = (0..self.dim / 2).map(|i| {
            let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / (ramp / f64::from(factor) + 1.0 - ramp)) as f32
        });
        let factors = factors.collect();
        self.with(factors, scale)
    }
}

/// Reads `config.json`: `rope_parameters` (version 5 of transformers) or
/// `rope_theta` with `rope_scaling`. `kind` picks one layer type's parameters
/// where there are several. May shorten `context`.
pub(crate) fn from_hf(
    k: &Keys,
    kind: &str,
    head_dim: usize,
    context: &mut usize,
) -> Result<Rope, ModelError> {
    let mut own = k.nested("rope_parameters")?;
    if let Some(all) = &own
        && let Some(one) = all.nested(kind)?
    {
        own = Some(one);
    }
    let scaling = match own {
        Some(own) => Some(own),
        None => k.nested("rope_scaling")?,
    };
    let float = |key: &str| -> Result<Option<f32>, ModelError> {
        let inner = scaling.as_ref().map(|s| s.maybe_float(key)).transpose()?.flatten();
        let outer = k.maybe_float(key)?;
        Ok(inner.or(outer))
    };
    let theta = float("rope_theta")?.unwrap_or(10_000.0);
    let part = float("partial_rotary_factor")?.unwrap_or(1.0);
    if !(part > 0.0 && part <= 1.0) {
        return Err(k.must("partial_rotary_factor", part, "within 0..=1"));
    }
    let rope = Rope::plain(theta, (head_dim as f32 * part) as usize);
    let original = k.maybe_size("original_max_position_embeddings")?;
    let Some(s) = scaling else { return Ok(rope) };
    let original = s.maybe_size("original_max_position_embeddings")?.or(original);
    // Older files say "type", some say both.
    let old = s.text("type")?;
    let rope = match s.text("rope_type")?.or(old).unwrap_or("default") {
        "default" => rope,
        "linear" => rope.linear(s.float("factor")?),
        "llama3" => {
            let original = original.ok_or_else(|| s.lacks("original_max_position_embeddings"))?;
            let (low, high) = (s.float("low_freq_factor")?, s.float("high_freq_factor")?);
            if low >= high {
                return Err(s.must("low_freq_factor", low, "below high_freq_factor"));
            }
            rope.llama3(s.float("factor")?, low, high, original)
        }
        "yarn" => {
            let factor = s.float("factor")?;
            let grow = |by: f32| if factor > 1.0 { 0.1 * by * factor.ln() + 1.0 } else { 1.0 };
            let scale = match (s.maybe_float("mscale")?, s.maybe_float("mscale_all_dim")?) {
                (Some(a), Some(b)) => grow(a) / grow(b),
                _ => grow(1.0),
            };
            let scale = s.maybe_float("attention_factor")?.unwrap_or(scale);
            s.only("truncate", &true.into(), "true")?;
            let ends = [s.maybe_float("beta_fast")?.unwrap_or(32.0), s.maybe_float("beta_slow")?.unwrap_or(1.0)];
            rope.yarn(factor, original.unwrap_or(*context), ends, scale)
        }
        "longrope" | "su" => {
            let original = original.ok_or_else(|| s.lacks("original_max_position_embeddings"))?;
            let factor = s.maybe_float("factor")?.unwrap_or(*context as f32 / original as f32);
            let grown = (1.0 + f64::from(factor).ln() / (original as f64).ln()).sqrt() as f32;
            let scale = s.maybe_float("attention_factor")?.unwrap_or(if factor > 1.0 { grown } else { 1.0 });
            s.floats("long_factor")?;
            *context = (*context).min(original);
            rope.with(s.floats("short_factor")?, scale)
        }
        other => return Err(s.must("rope_type", other, "default, linear, llama3, yarn or longrope")),
    };
    s.finish()?;
    Ok(rope)
}

/// Reads GGUF's `rope.` keys and tensors of factors. May shorten `context`.
pub(crate) fn from_gguf(
    k: &Keys,
    file: &Source,
    head_dim: usize,
    context: &mut usize,
) -> Result<Rope, ModelError> {
    let theta = k.maybe_float("rope.freq_base")?.unwrap_or(10_000.0);
    let dim = k.maybe_size("rope.dimension_count")?.unwrap_or(head_dim);
    let rope = Rope::plain(theta, dim);
    let original = k.maybe_size("rope.scaling.original_context_length")?;
    let given = k.maybe_float("rope.scaling.attn_factor")?;
    let factor = k.maybe_float("rope.scaling.factor")?;
    let need = || factor.ok_or_else(|| k.lacks("rope.scaling.factor"));
    let read = |name: &str| file.has(name).then(|| file.floats(name, &[dim / 2])).transpose();
    if let Some(factors) = read("rope_factors_short.weight")? {
        k.text("rope.scaling.type")?;
        let original = original.ok_or_else(|| k.lacks("rope.scaling.original_context_length"))?;
        *context = (*context).min(original);
        return Ok(rope.with(factors, given.unwrap_or(1.0)));
    }
    let rope = match k.text("rope.scaling.type")?.unwrap_or("none") {
        "none" => rope,
        "linear" => rope.linear(need()?),
        "yarn" => {
            let factor = need()?;
            let scale = given.unwrap_or(1.0) * (0.1 * factor.ln() + 1.0);
            rope.yarn(factor, original.unwrap_or(*context), [32.0, 1.0], scale)
        }
        other => return Err(k.must("rope.scaling.type", other, "none, linear or yarn")),
    };
    match read("rope_freqs.weight")? {
        None => Ok(rope),
        Some(_) if rope.factors.is_some() => {
            Err(k.must("rope.scaling.type", "set", "none beside the tensor \"rope_freqs.weight\""))
        }
        Some(factors) => Ok(rope.with(factors, 1.0)),
    }
}
