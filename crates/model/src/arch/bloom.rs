//! BLOOM: ALiBi in place of positions, layer norms with biases, the first of
//! them on the embeddings.

use super::{Description, GGUF, GateUp, HF, Names, Qkv, plain, share, sizes_gguf};
use crate::{Activation, Config, ModelError, keys::Keys, source::Source};

/// The model has no length of its own; this is the longest it was trained on.
const CONTEXT: usize = 2048;

fn shared(mut c: Config) -> Config {
    (c.layer_norm, c.embedding_norm, c.alibi) = (true, true, true);
    (c.qkv_bias, c.o_bias, c.ffn_bias) = (true, true, true);
    c.activation = Activation::GeluTanh;
    c
}

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let either = |a: &str, b: &'static str| if k.has(a) { a.to_owned() } else { b.to_owned() };
    let hidden = k.size(&either("hidden_size", "n_embed"))?;
    let (heads_key, layers_key) = (either("n_head", "num_attention_heads"), either("n_layer", "num_hidden_layers"));
    let (heads, layers) = (k.size(&heads_key)?, k.layers(&layers_key)?);
    let head_dim = share(k, &heads_key, hidden, heads)?;
    // A copy under the other name must say the same.
    k.only("n_embed", &hidden.into(), "the hidden size")?;
    k.only("num_attention_heads", &heads.into(), "n_head")?;
    k.only("num_hidden_layers", &layers.into(), "n_layer")?;
    k.only("apply_residual_connection_post_layernorm", &false.into(), "false")?;
    let c = shared(Config {
        architecture: "bloom".into(),
        ffn: 4 * hidden,
        vocab: k.size("vocab_size")?,
        eps: k.maybe_float("layer_norm_epsilon")?.unwrap_or(1e-5),
        tied: k.flag("tie_word_embeddings", true)?,
        ..plain(hidden, layers, heads, head_dim, CONTEXT)
    });
    let names = Names {
        prefix: "transformer.",
        embed: "word_embeddings",
        embed_norm: "word_embeddings_layernorm",
        norm: "ln_f",
        layer: "h.{}.",
        qkv: Qkv::ByHead("self_attention.query_key_value"),
        o: "self_attention.dense",
        gate_up: GateUp::Apart("", "mlp.dense_h_to_4h"),
        down: "mlp.dense_4h_to_h",
        ..HF
    };
    Ok((c, names))
}

pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = shared(sizes_gguf(k, file)?);
    c.eps = k.float("attention.layer_norm_epsilon")?;
    k.only("attention.max_alibi_bias", &8.0.into(), "8")?;
    Ok((c, Names { qkv: Qkv::Stacked("attn_qkv"), ..GGUF }))
}
