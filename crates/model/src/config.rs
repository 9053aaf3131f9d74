//! What a model is made of: dimensions, and which of the known parts it uses.
//!
//! One description covers every decoder here; `arch` fills it in from a file.
//! What may not happen: a branch on an architecture's name anywhere else.

use crate::{ModelError, rope::Rope};
use serde::{Deserialize, Serialize};

/// Dimensions, constants and parts of a transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The architecture, by the name its file has for it.
    pub architecture: String,
    /// `general.name`, where given.
    pub name: Option<String>,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer, or of one expert's.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence taken.
    pub context: usize,
    /// Added to the mean square, or the variance, in norms.
    pub eps: f32,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Layer norm with bias where true, else root-mean-square norm.
    pub layer_norm: bool,
    /// Where norms stand.
    pub order: Order,
    /// Whether queries and keys are normed before they turn.
    pub qk_norm: Option<QkNorm>,
    /// The feed-forward layer's nonlinearity.
    pub activation: Activation,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the attention output has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward layer's linears have a bias.
    pub ffn_bias: bool,
    /// Rotary positions of layers without a window; `None` where there are none.
    pub rope: Option<Rope>,
    /// Rotary positions of layers with a window, where they differ.
    pub local_rope: Option<Rope>,
    /// Positions seen back by each layer, the token's own included; `None` is all.
    pub windows: Vec<Option<usize>>,
    /// Whether scores fall with distance, by each head's slope (ALiBi).
    pub alibi: bool,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    /// Bound on scores, `cap * tanh(score / cap)`.
    pub attention_softcap: Option<f32>,
    /// The same bound on logits.
    pub logit_softcap: Option<f32>,
    /// Embeddings are multiplied by this.
    pub embedding_scale: f32,
    /// Whether embeddings are normed.
    pub embedding_norm: bool,
    /// Mixture of experts, in every layer or in none.
    pub experts: Option<Experts>,
}

/// Where a layer's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Before attention and feed-forward.
    Pre,
    /// On their results, before these are added.
    Post,
    /// Both.
    Sandwich,
    /// Before, both reading the layer's input; results are added together.
    Parallel,
    /// On the sum of input and result: BERT.
    Sum,
}

/// What a norm of queries and keys spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum QkNorm {
    /// Each head by itself.
    Head,
    /// All heads together.
    Width,
}

/// The feed-forward layer's nonlinearity; `Glu` kinds multiply a gate with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// SwiGLU.
    SiluGlu,
    /// GeGLU, GELU by its tanh approximation.
    GeluTanhGlu,
    /// GELU by the error function, no gate.
    Gelu,
    /// GELU by its tanh approximation, no gate.
    GeluTanh,
}

impl Activation {
    /// Whether there is a gate.
    pub fn gated(self) -> bool {
        matches!(self, Self::SiluGlu | Self::GeluTanhGlu)
    }
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts a layer.
    pub count: usize,
    /// Experts a token goes through, those of the highest probability.
    pub used: usize,
    /// Whether the used ones' probabilities are scaled to sum to 1.
    pub normalized: bool,
}

impl Config {
    /// Base of the rotary angles; 0 where positions do not turn.
    pub fn rope_theta(&self) -> f32 {
        self.rope.as_ref().map_or(0.0, |r| r.theta)
    }

    /// Whether it is llama with none of the options, which the trainer knows.
    pub(crate) fn plain(&self) -> bool {
        let rope = self.rope.as_ref();
        self.architecture == "llama"
            && rope.is_some_and(|r| r.factors.is_none() && r.scale == 1.0 && r.dim == self.head_dim)
            && self.windows.iter().all(Option::is_none)
            && self.experts.is_none()
            && !(self.qkv_bias || self.o_bias || self.ffn_bias)
    }

    /// The rotary positions of a layer.
    pub(crate) fn rope_of(&self, layer: usize) -> Option<&Rope> {
        let local = self.local_rope.as_ref().filter(|_| self.windows[layer].is_some());
        local.or(self.rope.as_ref())
    }

    /// Slope of each query head: 2^(-8i/n) for a power of two n of heads; the
    /// heads beyond take every second slope of twice as many (Press et al. 2022).
    pub(crate) fn slopes(&self) -> Option<Vec<f32>> {
        let n = 1 << self.heads.ilog2();
        let slope = |i: usize| {
            let (step, of) = if i < n { (i + 1, n) } else { (2 * (i - n) + 1, 2 * n) };
            2f64.powf(-8.0 * step as f64 / of as f64) as f32
        };
        self.alibi.then(|| (0..self.heads).map(slope).collect())
    }

    /// Refuses what the forward pass cannot take.
    pub(crate) fn check(&self) -> Result<(), ModelError> {
        let within = |what: &str, value: &dyn ToString, ok: bool, must: &'static str| {
            if ok {
                return Ok(());
            }
            Err(ModelError::Setting { what: what.into(), value: value.to_string(), must })
        };
        let dim = self.head_dim;
        within("head size", &dim, (2..=256).contains(&dim) && dim.is_multiple_of(2), "even, within 2..=256")?;
        let whole = self.heads.is_multiple_of(self.kv_heads);
        within("key and value heads", &self.kv_heads, whole, "a divisor of the head count")?;
        within("norm epsilon", &self.eps, self.eps.is_finite() && self.eps >= 0.0, "finite, not negative")?;
        for rope in [&self.rope, &self.local_rope].into_iter().flatten() {
            let ok = rope.theta.is_finite() && rope.theta > 0.0;
            within("rotary base", &rope.theta, ok, "finite and positive")?;
            let ok = rope.dim <= dim && rope.dim.is_multiple_of(2) && rope.dim > 0;
            within("rotary dimensions", &rope.dim, ok, "even, at most the head size")?;
            let good = |f: &f32| f.is_finite() && *f > 0.0;
            let factors = rope.factors.iter().flatten();
            let ok = rope.factors.as_ref().is_none_or(|f| f.len() == rope.dim / 2);
            within("rotary factors", &rope.factors.as_ref().map_or(0, Vec::len), ok, "one a pair")?;
            for f in factors.chain([&rope.scale]) {
                within("rotary factor", f, good(f), "finite and positive")?;
            }
        }
        for (what, cap) in [("attention softcap", self.attention_softcap), ("logit softcap", self.logit_softcap)] {
            let cap = cap.unwrap_or(1.0);
            within(what, &cap, cap.is_finite() && cap > 0.0, "finite and positive")?;
        }
        let scale = self.attention_scale;
        within("attention scale", &scale, scale.is_finite() && scale > 0.0, "finite and positive")?;
        within("window", &0, self.windows.iter().flatten().all(|w| *w > 0), "at least 1")?;
        within("windows", &self.windows.len(), self.windows.len() == self.layers, "one a layer")?;
        if let Some(e) = self.experts {
            within("experts", &e.count, (1..=4096).contains(&e.count), "within 1..=4096")?;
            within("experts used", &e.used, (1..=e.count).contains(&e.used), "at most the experts there are")?;
        }
        Ok(())
    }
}
