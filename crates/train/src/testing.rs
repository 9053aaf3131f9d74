//! What several test modules build: a tiny base and samples.

use crate::{
    Sample,
    base::{Base, Dims, Layer},
    rng::Rng,
};
use std::ops::Range;

/// Two layers, four heads on two KV heads, forty tokens, random weights.
pub(crate) fn tiny() -> Base {
    random(
        Dims {
            hidden: 24,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 6,
            ffn: 20,
            vocab: 40,
            context: 256,
            theta: 100.0,
            eps: 1e-5,
        },
        0.4,
    )
}

/// SmolLM2-135M's shape with random weights, to measure on.
pub(crate) fn smol() -> Base {
    random(
        Dims {
            hidden: 576,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49_152,
            context: 8192,
            theta: 1e5,
            eps: 1e-5,
        },
        0.05,
    )
}

fn random(dims: Dims, spread: f32) -> Base {
    let mut rng = Rng::new(11, 0);
    let mut fill = |n: usize, middle: f32, spread: f32| -> Vec<f32> {
        (0..n).map(|_| middle + spread * rng.signed()).collect()
    };
    let layers = (0..dims.layers)
        .map(|_| Layer {
            attn_norm: fill(dims.hidden, 1.0, 0.3),
            ffn_norm: fill(dims.hidden, 1.0, 0.3),
            linear: [
                fill(dims.qkv() * dims.hidden, 0.0, spread),
                fill(dims.hidden * dims.q(), 0.0, spread),
                fill(2 * dims.ffn * dims.hidden, 0.0, spread),
                fill(dims.hidden * dims.ffn, 0.0, spread),
            ],
        })
        .collect();
    Base {
        dims,
        embed: fill(dims.vocab * dims.hidden, 0.0, 2.0 * spread),
        norm: fill(dims.hidden, 1.0, 0.3),
        layers,
    }
}

/// `tokens`, trained within `span`.
pub(crate) fn sample(tokens: &[u32], span: Range<usize>) -> Sample {
    Sample { tokens: tokens.to_vec(), trained: (0..tokens.len()).map(|i| span.contains(&i)).collect() }
}
