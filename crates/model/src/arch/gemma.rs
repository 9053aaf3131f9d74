//! Gemma 2 and 3, text only: norms on both sides, gains stored less 1, GeGLU,
//! scaled embeddings, windows in most layers; 2 has softcaps, 3 norms queries
//! and keys and gives layers with a window rotary positions of their own.

use super::{Description, GGUF, HF, Names, activation, base_gguf, base_hf, window_gguf, windows};
use crate::{Activation, Config, ModelError, Order, QkNorm, source::Source, keys::Keys, rope::{self, Rope}};

const NAMES: Names = Names {
    attn_post_norm: "post_attention_layernorm",
    ffn_norm: "pre_feedforward_layernorm",
    ffn_post_norm: "post_feedforward_layernorm",
    gain_offset: 1.0,
    ..HF
};

fn shared(mut c: Config) -> Config {
    c.order = Order::Sandwich;
    c.embedding_scale = (c.hidden as f32).sqrt();
    c
}

fn hf(k: &Keys) -> Result<Config, ModelError> {
    let mut c = shared(base_hf(k, "full_attention")?);
    c.tied = k.flag("tie_word_embeddings", true)?;
    // The older key is "gelu" in files that mean the newer one's value.
    let old = k.text("hidden_act")?;
    let key = if k.has("hidden_activation") || old.is_none() { "hidden_activation" } else { "hidden_act" };
    c.activation = activation(k, key, "gelu_pytorch_tanh", true)?;
    c.qkv_bias = k.flag("attention_bias", false)?;
    c.o_bias = c.qkv_bias;
    let scalar = k.maybe_float("query_pre_attn_scalar")?.unwrap_or(256.0);
    c.attention_scale = 1.0 / scalar.sqrt();
    c.attention_softcap = k.maybe_float("attn_logit_softcapping")?;
    c.logit_softcap = k.maybe_float("final_logit_softcapping")?;
    k.only("use_bidirectional_attention", &false.into(), "false")?;
    Ok(c)
}

pub(super) fn hf2(k: &Keys) -> Result<Description, ModelError> {
    let mut c = hf(k)?;
    c.windows = windows(k, c.layers, |i| i % 2 == 0)?;
    Ok((c, NAMES))
}

pub(super) fn hf3(k: &Keys) -> Result<Description, ModelError> {
    let mut c = hf(k)?;
    c.qk_norm = Some(QkNorm::Head);
    let new = k.maybe_size("_sliding_window_pattern")?;
    let pattern = k.maybe_size("sliding_window_pattern")?.or(new).unwrap_or(6);
    c.windows = windows(k, c.layers, |i| (i + 1) % pattern != 0)?;
    let local = k.maybe_float("rope_local_base_freq")?.unwrap_or(10_000.0);
    let several = k.nested("rope_parameters")?.is_some_and(|r| r.has("sliding_attention"));
    c.local_rope = Some(match several {
        true => rope::from_hf(k, "sliding_attention", c.head_dim, &mut c.context)?,
        false => Rope::plain(local, c.head_dim),
    });
    Ok((c, NAMES))
}

fn gguf(k: &Keys, file: &Source, local: impl Fn(usize) -> bool) -> Result<Config, ModelError> {
    let mut c = shared(base_gguf(k, file)?);
    c.activation = Activation::GeluTanhGlu;
    let window = window_gguf(k)?;
    c.windows = (0..c.layers).map(|i| window.filter(|_| local(i))).collect();
    c.attention_softcap = k.maybe_float("attn_logit_softcapping")?;
    c.logit_softcap = k.maybe_float("final_logit_softcapping")?;
    // The metadata may not tell the scale; the 27B models alone have another.
    let large = matches!((c.architecture.as_str(), c.layers), ("gemma2", 46) | ("gemma3", 62));
    let width = if large { c.hidden / c.heads } else { c.head_dim };
    c.attention_scale = k.maybe_float("attention.scale")?.unwrap_or(1.0 / (width as f32).sqrt());
    Ok(c)
}

pub(super) fn gguf2(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    Ok((gguf(k, file, |i| i % 2 == 0)?, GGUF))
}

pub(super) fn gguf3(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let pattern = k.maybe_size("attention.sliding_window_pattern")?.unwrap_or(6);
    let mut c = gguf(k, file, |i| (i + 1) % pattern != 0)?;
    c.qk_norm = Some(QkNorm::Head);
    let local = k.maybe_float("rope.freq_base_swa")?.unwrap_or(10_000.0);
    c.local_rope = Some(Rope::plain(local, c.head_dim));
    Ok((c, GGUF))
}
