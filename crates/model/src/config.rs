//! A model's dimensions, read from GGUF metadata.

use crate::{
    ModelError,
    formats::{Gguf, Value},
};
use serde::{Deserialize, Serialize};

/// Dimensions and constants of a llama-style decoder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// `general.architecture`.
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
    /// Values a head; all of them turn with the position.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Longest sequence the model was made for.
    pub context: usize,
    /// Base of the rotary angles.
    pub rope_theta: f32,
    /// Added to the mean square in norms.
    pub eps: f32,
    /// Whether the head is the embedding.
    pub tied: bool,
}

impl Config {
    /// Reads and checks the dimensions.
    ///
    /// # Errors
    /// Another architecture, a key missing or of the wrong type, or a dimension
    /// that the forward pass cannot take.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let text = |key: &str| gguf.meta(key).and_then(Value::as_str).map(str::to_owned);
        let architecture = text("general.architecture")
            .ok_or_else(|| ModelError::Metadata { key: "general.architecture".into() })?;
        if architecture != "llama" {
            return Err(ModelError::Architecture(architecture));
        }
        let number = |key: &str, otherwise: Option<usize>| {
            let key = format!("llama.{key}");
            match gguf.meta(&key) {
                None => otherwise,
                Some(v) => v.as_u64().and_then(|v| usize::try_from(v).ok()),
            }
            .ok_or(ModelError::Metadata { key })
        };
        let float = |key: &str, otherwise: Option<f32>| {
            let key = format!("llama.{key}");
            gguf.meta(&key).map_or(otherwise, Value::as_f32).ok_or(ModelError::Metadata { key })
        };
        if let Some(kind) = text("llama.rope.scaling.type").filter(|k| k != "none") {
            let what = "llama.rope.scaling.type".into();
            return Err(ModelError::Setting { what, value: kind, must: "none" });
        }
        let hidden = number("embedding_length", None)?;
        let heads = number("attention.head_count", None)?;
        let head_dim = number("attention.key_length", hidden.checked_div(heads))?;
        let embedding = gguf
            .tensor("token_embd.weight")
            .ok_or_else(|| ModelError::Missing("token_embd.weight".into()))?;
        let config = Self {
            architecture,
            name: text("general.name"),
            hidden,
            layers: number("block_count", None)?,
            heads,
            kv_heads: number("attention.head_count_kv", Some(heads))?,
            head_dim,
            ffn: number("feed_forward_length", None)?,
            vocab: embedding.shape.first().copied().unwrap_or(0),
            context: number("context_length", None)?,
            rope_theta: float("rope.freq_base", Some(10_000.0))?,
            eps: float("attention.layer_norm_rms_epsilon", None)?,
            tied: gguf.tensor("output.weight").is_none(),
        };
        let turned = number("rope.dimension_count", Some(head_dim))?;
        config.check(turned)?;
        Ok(config)
    }

    fn check(&self, turned: usize) -> Result<(), ModelError> {
        let within = |what: &str, value: usize, ok: bool, must: &'static str| {
            if ok {
                return Ok(());
            }
            Err(ModelError::Setting { what: what.into(), value: value.to_string(), must })
        };
        // Caps keep every product of dimensions far from overflow.
        const CAP: usize = 1 << 20;
        let range = "within 1..=1048576";
        for (what, value) in [
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("feed_forward_length", self.ffn),
            ("context_length", self.context),
            ("vocabulary", self.vocab),
        ] {
            within(what, value, (1..=CAP).contains(&value), range)?;
        }
        let dim = self.head_dim;
        within("head size", dim, (2..=256).contains(&dim) && dim % 2 == 0, "even, within 2..=256")?;
        within("rope.dimension_count", turned, turned == dim, "the head size")?;
        let whole = self.heads.is_multiple_of(self.kv_heads);
        within("attention.head_count_kv", self.kv_heads, whole, "a divisor of the head count")?;
        let sane = self.eps.is_finite() && self.eps >= 0.0;
        let rope = self.rope_theta.is_finite() && self.rope_theta > 0.0;
        within("attention.layer_norm_rms_epsilon", 0, sane, "finite, not negative")?;
        within("rope.freq_base", 0, rope, "finite and positive")
    }
}
