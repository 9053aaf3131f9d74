//! Qwen 2, 2.5 (biases of queries, keys, values), Qwen 3 (their norms) and its
//! mixture of experts.

use super::{Description, GGUF, HF, activation, base_gguf, base_hf, experts_gguf, windows};
use crate::{Config, Experts, ModelError, QkNorm, keys::Keys, source::Source};

fn shared(k: &Keys) -> Result<Config, ModelError> {
    let mut c = base_hf(k, "full_attention")?;
    c.activation = activation(k, "hidden_act", "silu", true)?;
    let first = k.get("max_window_layers").and_then(serde_json::Value::as_u64).unwrap_or(0);
    let windows = windows(k, c.layers, |i| i as u64 >= first);
    if k.flag("use_sliding_window", false)? {
        c.windows = windows?;
    }
    Ok(c)
}

pub(super) fn hf2(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(k)?;
    c.qkv_bias = true;
    // Some files tell of the multimodal sibling's rotary positions.
    k.only("use_mrope", &false.into(), "false")?;
    Ok((c, HF))
}

pub(super) fn hf3(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(k)?;
    c.qkv_bias = k.flag("attention_bias", false)?;
    c.o_bias = c.qkv_bias;
    c.qk_norm = Some(QkNorm::Head);
    Ok((c, HF))
}

pub(super) fn hf3_moe(k: &Keys) -> Result<Description, ModelError> {
    let (mut c, names) = hf3(k)?;
    c.ffn = k.size("moe_intermediate_size")?;
    let old = k.maybe_size("num_experts")?;
    let count = match k.maybe_size("num_local_experts")? {
        Some(n) => n,
        None => old.ok_or_else(|| k.lacks("num_experts"))?,
    };
    let (used, normalized) = (k.size("num_experts_per_tok")?, k.flag("norm_topk_prob", false)?);
    k.only("decoder_sparse_step", &1.into(), "1, experts in every layer")?;
    k.only("mlp_only_layers", &serde_json::json!([]), "empty, experts in every layer")?;
    c.experts = Some(Experts { count, used, normalized });
    Ok((c, names))
}

pub(super) fn gguf2(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = base_gguf(k, file)?;
    c.qkv_bias = true;
    Ok((c, GGUF))
}

pub(super) fn gguf3(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = base_gguf(k, file)?;
    c.qk_norm = Some(QkNorm::Head);
    Ok((c, GGUF))
}

pub(super) fn gguf3_moe(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let (mut c, names) = gguf3(k, file)?;
    c.experts = experts_gguf(k)?;
    c.ffn = k.size("expert_feed_forward_length")?;
    Ok((c, names))
}
