//! Llama 2 and 3, and what Hugging Face calls llama: SmolLM, Yi, TinyLlama;
//! Mistral (windows) and Mixtral (experts), which GGUF calls llama as well.

use super::{Description, ExpertNames, GGUF, HF, Names, activation, base_gguf, base_hf, experts_gguf, window_gguf, windows};
use crate::{Config, Experts, ModelError, keys::Keys, source::Source};

fn shared(k: &Keys) -> Result<Config, ModelError> {
    let mut c = base_hf(k, "full_attention")?;
    c.activation = activation(k, "hidden_act", "silu", true)?;
    Ok(c)
}

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(k)?;
    c.qkv_bias = k.flag("attention_bias", false)?;
    c.o_bias = c.qkv_bias;
    c.ffn_bias = k.flag("mlp_bias", false)?;
    Ok((c, HF))
}

pub(super) fn mistral(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(k)?;
    c.windows = windows(k, c.layers, |_| true)?;
    Ok((c, HF))
}

pub(super) fn mixtral(k: &Keys) -> Result<Description, ModelError> {
    let mut c = shared(k)?;
    c.windows = windows(k, c.layers, |_| true)?;
    let (count, used) = (k.size("num_local_experts")?, k.size("num_experts_per_tok")?);
    c.experts = Some(Experts { count, used, normalized: true });
    let names = Names {
        router: "block_sparse_moe.gate",
        experts: ExpertNames::Apart([
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "block_sparse_moe.experts.{}.w2",
        ]),
        ..HF
    };
    Ok((c, names))
}

/// Rows of queries and keys lie pair by pair. Biases are not in the metadata.
pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = base_gguf(k, file)?;
    if let Some(rope) = &mut c.rope {
        rope.interleaved = true;
    }
    c.windows = vec![window_gguf(k)?; c.layers];
    c.experts = experts_gguf(k)?;
    let has = |name: &str| file.has(name);
    c.qkv_bias = has("blk.0.attn_q.bias");
    c.o_bias = has("blk.0.attn_output.bias");
    c.ffn_bias = has("blk.0.ffn_up.bias");
    Ok((c, GGUF))
}
