//! OLMo 2: norms after attention and feed-forward, queries and keys normed over
//! their whole width.

use super::{Description, GGUF, HF, Names, activation, base_gguf, base_hf};
use crate::{Config, ModelError, Order, QkNorm, keys::Keys, source::Source};

fn shared(mut c: Config) -> Config {
    c.order = Order::Post;
    c.qk_norm = Some(QkNorm::Width);
    c
}

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(base_hf(k, "full_attention")?);
    c.activation = activation(k, "hidden_act", "silu", true)?;
    c.qkv_bias = k.flag("attention_bias", false)?;
    c.o_bias = c.qkv_bias;
    let names = Names {
        attn_post_norm: "post_attention_layernorm",
        ffn_post_norm: "post_feedforward_layernorm",
        ..HF
    };
    Ok((c, names))
}

pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    Ok((shared(base_gguf(k, file)?), GGUF))
}
