//! The frozen base in `f32`, its linears fused where they share an input.

use crate::TrainError;
use ashlar_model::{Config, Weights};

/// The numbers a forward pass needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub context: usize,
    pub theta: f32,
    pub eps: f32,
}

impl Dims {
    /// Width of the attention output.
    pub(crate) fn q(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub(crate) fn kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of a row of queries, keys and values.
    pub(crate) fn qkv(&self) -> usize {
        self.q() + 2 * self.kv()
    }
}

impl From<&Config> for Dims {
    fn from(c: &Config) -> Self {
        Self {
            hidden: c.hidden,
            layers: c.layers,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            ffn: c.ffn,
            vocab: c.vocab,
            context: c.context,
            theta: c.rope_theta(),
            eps: c.eps,
        }
    }
}

/// One decoder layer. Linears are `[out, in]`, by [`crate::lora::Site`] order.
pub(crate) struct Layer {
    pub attn_norm: Vec<f32>,
    pub ffn_norm: Vec<f32>,
    /// q·k·v stacked, o, gate·up stacked, down.
    pub linear: [Vec<f32>; 4],
}

/// All frozen weights. The head is the embedding.
pub(crate) struct Base {
    pub dims: Dims,
    /// `[vocab, hidden]`.
    pub embed: Vec<f32>,
    pub norm: Vec<f32>,
    pub layers: Vec<Layer>,
}

impl Base {
    /// Takes over loaded weights.
    pub(crate) fn new(w: Weights) -> Result<Self, TrainError> {
        if !w.config.tied {
            return Err(TrainError::Unsupported("an output head of its own".into()));
        }
        let dims = Dims::from(&w.config);
        let layers = w
            .layers
            .into_iter()
            .map(|l| Layer {
                attn_norm: l.attn_norm,
                ffn_norm: l.ffn_norm,
                linear: [[l.q, l.k, l.v].concat(), l.o, [l.gate, l.up].concat(), l.down],
            })
            .collect();
        Ok(Self { dims, embed: w.embed, norm: w.norm, layers })
    }
}
