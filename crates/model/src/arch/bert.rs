//! BERT, as sentence encoders use it (MiniLM): learned positions, norms on the
//! sums, every token sees every other.

use super::{Description, GGUF, GateUp, HF, Names, Qkv, activation, plain, share, sizes_gguf};
use crate::{Activation, Config, ModelError, Order, keys::Keys, source::Source};

fn shared(mut c: Config) -> Config {
    c.order = Order::Sum;
    (c.layer_norm, c.embedding_norm) = (true, true);
    (c.qkv_bias, c.o_bias, c.ffn_bias) = (true, true, true);
    c.tied = true;
    c
}

pub(super) fn hf(k: &Keys) -> Result<Description, ModelError> {
    let (hidden, heads) = (k.size("hidden_size")?, k.size("num_attention_heads")?);
    let head_dim = share(k, "num_attention_heads", hidden, heads)?;
    k.only("position_embedding_type", &"absolute".into(), "absolute")?;
    k.only("type_vocab_size", &2.into(), "2")?;
    k.only("is_decoder", &false.into(), "false")?;
    k.get("tie_word_embeddings");
    let layers = k.layers("num_hidden_layers")?;
    let c = shared(Config {
        architecture: "bert".into(),
        ffn: k.size("intermediate_size")?,
        vocab: k.size("vocab_size")?,
        eps: k.maybe_float("layer_norm_eps")?.unwrap_or(1e-12),
        activation: activation(k, "hidden_act", "gelu", false)?,
        ..plain(hidden, layers, heads, head_dim, k.size("max_position_embeddings")?)
    });
    let names = Names {
        prefix: "bert.",
        embed: "embeddings.word_embeddings",
        embed_norm: "embeddings.LayerNorm",
        layer: "encoder.layer.{}.",
        attn_norm: "attention.output.LayerNorm",
        ffn_norm: "output.LayerNorm",
        qkv: Qkv::Apart(["attention.self.query", "attention.self.key", "attention.self.value"]),
        o: "attention.output.dense",
        gate_up: GateUp::Apart("", "intermediate.dense"),
        down: "output.dense",
        ..HF
    };
    Ok((c, names))
}

pub(super) fn gguf(k: &Keys, file: &Source) -> Result<Description, ModelError> {
    let mut c = shared(sizes_gguf(k, file)?);
    c.eps = k.float("attention.layer_norm_epsilon")?;
    c.activation = Activation::Gelu;
    k.only("attention.causal", &false.into(), "false")?;
    // Read again by `encoder`.
    k.get("pooling_type");
    Ok((c, Names { attn_norm: "attn_output_norm", ffn_norm: "layer_output_norm", ..GGUF }))
}
