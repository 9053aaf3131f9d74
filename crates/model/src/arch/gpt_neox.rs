//! GPT-NeoX and Pythia: layer norms, biases, part of a head turning, attention
//! and feed-forward side by side, plain GELU.

use super::{Description, GGUF, GateUp, HF, Names, Qkv, activation, base_hf, sizes_gguf};
use crate::{Activation, Config, ModelError, Order, source::Source, keys::Keys, rope};

fn shared(mut c: Config, parallel: bool) -> Config {
    c.layer_norm = true;
    c.order = if parallel { Order::Parallel } else { Order::Pre };
    (c.qkv_bias, c.o_bias, c.ffn_bias) = (true, true, true);
    c
}

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(base_hf(k, "full_attention")?, k.flag("use_parallel_residual", true)?);
    c.eps = k.maybe_float("layer_norm_eps")?.unwrap_or(1e-5);
    c.activation = activation(k, "hidden_act", "gelu", false)?;
    c.qkv_bias = k.flag("attention_bias", true)?;
    c.o_bias = c.qkv_bias;
    // Version 4 of transformers has names of its own for the rotary settings.
    if let Some(rope) = c.rope.as_mut().filter(|_| k.has("rotary_pct") || k.has("rotary_emb_base")) {
        let part = k.maybe_float("rotary_pct")?.unwrap_or(0.25);
        if !(part > 0.0 && part <= 1.0) {
            return Err(k.must("rotary_pct", part, "within 0..=1"));
        }
        if rope.factors.is_some() {
            return Err(k.must("rope_scaling", "set", "none beside rotary_pct"));
        }
        rope.dim = (c.head_dim as f32 * part) as usize;
        rope.theta = k.maybe_float("rotary_emb_base")?.unwrap_or(10_000.0);
    }
    let names = Names {
        prefix: "gpt_neox.",
        embed: "embed_in",
        norm: "final_layer_norm",
        head: "/embed_out",
        qkv: Qkv::ByHead("attention.query_key_value"),
        o: "attention.dense",
        gate_up: GateUp::Apart("", "mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        ..HF
    };
    Ok((c, names))
}

pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = shared(sizes_gguf(k, file)?, k.flag("use_parallel_residual", true)?);
    c.eps = k.float("attention.layer_norm_epsilon")?;
    c.rope = Some(rope::from_gguf(k, file, c.head_dim, &mut c.context)?);
    c.activation = Activation::Gelu;
    Ok((c, Names { qkv: Qkv::Stacked("attn_qkv"), ..GGUF }))
}
