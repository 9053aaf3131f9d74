//! Phi-3, 3.5 and 4: fused projections, windows, stretched rotary positions.

use super::{Description, GGUF, GateUp, HF, Names, Qkv, activation, base_gguf, base_hf, window_gguf, windows};
use crate::{ModelError, keys::Keys, source::Source};

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let mut c = base_hf(k, "full_attention")?;
    c.activation = activation(k, "hidden_act", "silu", true)?;
    c.windows = windows(k, c.layers, |_| true)?;
    c.qkv_bias = k.flag("attention_bias", false)?;
    // Phi-4 names these, at the values that change nothing.
    for key in ["lm_head_bias", "mlp_bias"] {
        k.only(key, &false.into(), "false")?;
    }
    for key in ["full_attn_mod", "interpolate_factor"] {
        k.only(key, &1.into(), "1")?;
    }
    let names = Names {
        qkv: Qkv::Stacked("self_attn.qkv_proj"),
        gate_up: GateUp::Stacked("mlp.gate_up_proj"),
        ..HF
    };
    Ok((c, names))
}

pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = base_gguf(k, file)?;
    c.windows = vec![window_gguf(k)?; c.layers];
    let names = Names { qkv: Qkv::Stacked("attn_qkv"), gate_up: GateUp::Stacked("ffn_up"), ..GGUF };
    Ok((c, names))
}
