//! The known architectures: each reads its configuration and names its tensors.
//!
//! A file here says what an architecture has, never how it is computed; that is
//! `forward` and `encoder`, from the shared [`Config`].

mod bert;
mod bloom;
mod gemma;
mod gpt_neox;
mod llama;
mod olmo2;
mod phi3;
mod qwen;

use crate::{
    Activation, Config, Experts, ModelError, Order,
    formats::{Gguf, Value},
    keys::Keys,
    rope,
    source::Source,
};

/// Tensor names. `{}` stands for the layer, then the expert; an empty name is a
/// tensor the architecture lacks. Weights end in `.weight`, biases in `.bias`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// Put before every name but those that begin with `/`.
    pub(crate) prefix: &'static str,
    pub(crate) embed: &'static str,
    pub(crate) embed_norm: &'static str,
    pub(crate) norm: &'static str,
    pub(crate) head: &'static str,
    /// Put before every name below.
    pub(crate) layer: &'static str,
    pub(crate) attn_norm: &'static str,
    pub(crate) attn_post_norm: &'static str,
    pub(crate) ffn_norm: &'static str,
    pub(crate) ffn_post_norm: &'static str,
    pub(crate) qkv: Qkv,
    pub(crate) q_norm: &'static str,
    pub(crate) k_norm: &'static str,
    pub(crate) o: &'static str,
    pub(crate) gate_up: GateUp,
    pub(crate) down: &'static str,
    pub(crate) router: &'static str,
    pub(crate) experts: ExpertNames,
    /// Added to norm gains when they are read: Gemma stores them less 1.
    pub(crate) gain_offset: f32,
}

/// How queries, keys and values lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Qkv {
    Apart([&'static str; 3]),
    /// All queries, all keys, all values.
    Stacked(&'static str),
    /// Query, key and value of each head in turn.
    ByHead(&'static str),
}

/// How gate and up lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GateUp {
    Apart(&'static str, &'static str),
    /// The gate's rows, then up's.
    Stacked(&'static str),
}

/// How experts' gate, up and down lie.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertNames {
    /// One tensor an expert.
    Apart([&'static str; 3]),
    /// `[expert, out, in]`.
    Stacked([&'static str; 3]),
}

/// llama.cpp's names, which all its architectures share.
pub(crate) const GGUF: Names = Names {
    prefix: "",
    embed: "token_embd",
    embed_norm: "token_embd_norm",
    norm: "output_norm",
    head: "output",
    layer: "blk.{}.",
    attn_norm: "attn_norm",
    attn_post_norm: "post_attention_norm",
    ffn_norm: "ffn_norm",
    ffn_post_norm: "post_ffw_norm",
    qkv: Qkv::Apart(["attn_q", "attn_k", "attn_v"]),
    q_norm: "attn_q_norm",
    k_norm: "attn_k_norm",
    o: "attn_output",
    gate_up: GateUp::Apart("ffn_gate", "ffn_up"),
    down: "ffn_down",
    router: "ffn_gate_inp",
    experts: ExpertNames::Stacked(["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"]),
    gain_offset: 0.0,
};

/// Hugging Face's names of the llama family.
pub(crate) const HF: Names = Names {
    prefix: "model.",
    embed: "embed_tokens",
    embed_norm: "",
    norm: "norm",
    head: "/lm_head",
    layer: "layers.{}.",
    attn_norm: "input_layernorm",
    attn_post_norm: "",
    ffn_norm: "post_attention_layernorm",
    ffn_post_norm: "",
    qkv: Qkv::Apart(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    q_norm: "self_attn.q_norm",
    k_norm: "self_attn.k_norm",
    o: "self_attn.o_proj",
    gate_up: GateUp::Apart("mlp.gate_proj", "mlp.up_proj"),
    down: "mlp.down_proj",
    router: "mlp.gate",
    experts: ExpertNames::Apart([
        "mlp.experts.{}.gate_proj",
        "mlp.experts.{}.up_proj",
        "mlp.experts.{}.down_proj",
    ]),
    gain_offset: 0.0,
};

/// What a file's configuration says, and its tensors' names.
pub(crate) type Description = (Config, Names);

/// Reads a `config.json`.
pub(crate) fn from_hf(json: &[u8]) -> Result<Description, ModelError> {
    let keys = &Keys::from_json(json)?;
    let kind = keys.text("model_type")?.ok_or_else(|| keys.lacks("model_type"))?;
    let (config, names) = match kind {
        "llama" => llama::hf(keys),
        "mistral" => llama::mistral(keys),
        "mixtral" => llama::mixtral(keys),
        "qwen2" => qwen::hf2(keys),
        "qwen3" => qwen::hf3(keys),
        "qwen3_moe" => qwen::hf3_moe(keys),
        "gemma2" => gemma::hf2(keys),
        "gemma3_text" => gemma::hf3(keys),
        "phi3" => phi3::hf(keys),
        "olmo2" => olmo2::hf(keys),
        "gpt_neox" => gpt_neox::hf(keys),
        "bloom" => bloom::hf(keys),
        "bert" => bert::hf(keys),
        other => Err(ModelError::Architecture(other.into())),
    }?;
    // What makes a decoder is the architecture; `bert` checks the key itself.
    keys.get("is_decoder");
    // `quantized::Scheme` checks this one.
    keys.get("quantization_config");
    keys.only("add_cross_attention", &false.into(), "false")?;
    keys.finish()?;
    config.check()?;
    Ok((config, names))
}

/// Reads GGUF metadata.
pub(crate) fn from_gguf(gguf: &Gguf, source: &Source) -> Result<Description, ModelError> {
    let text = |key: &str| gguf.meta(key).and_then(Value::as_str).map(str::to_owned);
    let key = "general.architecture";
    let architecture = text(key).ok_or_else(|| ModelError::Metadata { key: key.into() })?;
    let keys = &Keys::from_gguf(gguf, &architecture);
    let (mut config, names) = match architecture.as_str() {
        "llama" => llama::gguf(keys, source),
        "qwen2" => qwen::gguf2(keys, source),
        "qwen3" => qwen::gguf3(keys, source),
        "qwen3moe" => qwen::gguf3_moe(keys, source),
        "gemma2" => gemma::gguf2(keys, source),
        "gemma3" => gemma::gguf3(keys, source),
        "phi3" => phi3::gguf(keys, source),
        "olmo2" => olmo2::gguf(keys, source),
        "gptneox" => gpt_neox::gguf(keys, source),
        "bloom" => bloom::gguf(keys, source),
        "bert" => bert::gguf(keys, source),
        other => Err(ModelError::Architecture(other.into())),
    }?;
    config.name = text("general.name");
    config.architecture = architecture;
    keys.finish()?;
    config.check()?;
    Ok((config, names))
}

/// A llama-style decoder's configuration, without what differs between them.
/// `kind` picks the rotary parameters where layer types have their own.
fn base_hf(k: &Keys, kind: &str) -> Result<Config, ModelError> {
    let (hidden, heads) = (k.size("hidden_size")?, k.size("num_attention_heads")?);
    let head_dim = match k.maybe_size("head_dim")? {
        Some(dim) => dim,
        None => share(k, "num_attention_heads", hidden, heads)?,
    };
    let mut context = k.size("max_position_embeddings")?;
    let rope = rope::from_hf(k, kind, head_dim, &mut context)?;
    let layers = k.layers("num_hidden_layers")?;
    Ok(Config {
        architecture: k.text("model_type")?.unwrap_or_default().to_owned(),
        ffn: k.size("intermediate_size")?,
        kv_heads: k.maybe_size("num_key_value_heads")?.unwrap_or(heads),
        vocab: k.size("vocab_size")?,
        eps: k.maybe_float("rms_norm_eps")?.unwrap_or(1e-6),
        tied: k.flag("tie_word_embeddings", false)?,
        rope: Some(rope),
        ..plain(hidden, layers, heads, head_dim, context)
    })
}

/// The same of GGUF.
fn base_gguf(k: &Keys, file: &Source) -> Result<Config, ModelError> {
    let mut config = sizes_gguf(k, file)?;
    config.eps = k.float("attention.layer_norm_rms_epsilon")?;
    config.rope = Some(rope::from_gguf(k, file, config.head_dim, &mut config.context)?);
    Ok(config)
}

/// GGUF's dimensions alone.
fn sizes_gguf(k: &Keys, file: &Source) -> Result<Config, ModelError> {
    let (hidden, heads) = (k.size("embedding_length")?, k.size("attention.head_count")?);
    let head_dim = match k.maybe_size("attention.key_length")? {
        Some(dim) => dim,
        None => share(k, "attention.head_count", hidden, heads)?,
    };
    k.only("attention.value_length", &head_dim.into(), "the key length")?;
    let name = "token_embd.weight";
    let embedding = file.find(name).ok_or_else(|| ModelError::Missing(name.into()))?;
    let layers = k.layers("block_count")?;
    let vocab = embedding.shape.first().copied().unwrap_or(0);
    if !(1..=1 << 20).contains(&vocab) {
        return Err(k.must("vocabulary", vocab, "within 1..=1048576"));
    }
    Ok(Config {
        ffn: k.size("feed_forward_length")?,
        kv_heads: k.maybe_size("attention.head_count_kv")?.unwrap_or(heads),
        vocab,
        tied: !file.has("output.weight"),
        ..plain(hidden, layers, heads, head_dim, k.size("context_length")?)
    })
}

/// A decoder with none of the options.
fn plain(hidden: usize, layers: usize, heads: usize, head_dim: usize, context: usize) -> Config {
    Config {
        architecture: String::new(),
        name: None,
        hidden,
        layers,
        heads,
        kv_heads: heads,
        head_dim,
        ffn: 0,
        vocab: 0,
        context,
        eps: 0.0,
        tied: false,
        layer_norm: false,
        order: Order::Pre,
        qk_norm: None,
        activation: Activation::SiluGlu,
        qkv_bias: false,
        o_bias: false,
        ffn_bias: false,
        rope: None,
        local_rope: None,
        windows: vec![None; layers],
        alibi: false,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        attention_softcap: None,
        logit_softcap: None,
        embedding_scale: 1.0,
        embedding_norm: false,
        experts: None,
    }
}

/// `hidden / heads`, which must come out even.
fn share(k: &Keys, key: &str, hidden: usize, heads: usize) -> Result<usize, ModelError> {
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    Err(k.must(key, heads, "a divisor of the hidden size"))
}

/// The activation that `key` names.
fn activation(k: &Keys, key: &str, otherwise: &str, gated: bool) -> Result<Activation, ModelError> {
    let name = k.text(key)?.unwrap_or(otherwise);
    match (name, gated) {
        ("silu" | "swish", true) => Ok(Activation::SiluGlu),
        ("gelu_pytorch_tanh" | "gelu_new", true) => Ok(Activation::GeluTanhGlu),
        ("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast", false) => Ok(Activation::GeluTanh),
        ("gelu", false) => Ok(Activation::Gelu),
        _ => Err(k.must(key, name, "an activation this architecture has")),
    }
}

/// Each layer's window: by `layer_types` where given, else where `local` says.
fn windows(k: &Keys, layers: usize, local: impl Fn(usize) -> bool) -> Result<Vec<Option<usize>>, ModelError> {
    let window = k.maybe_size("sliding_window")?;
    let Some(types) = k.list("layer_types")? else {
        return Ok((0..layers).map(|i| window.filter(|_| local(i))).collect());
    };
    if types.len() != layers {
        return Err(k.must("layer_types", types.len(), "one a layer"));
    }
    let one = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => window.map(Some).ok_or_else(|| k.lacks("sliding_window")),
        _ => Err(k.must("layer_types", kind, "full_attention or sliding_attention")),
    };
    types.iter().map(one).collect()
}

/// GGUF's window, 0 being none.
fn window_gguf(k: &Keys) -> Result<Option<usize>, ModelError> {
    let key = "attention.sliding_window";
    if k.get(key).and_then(serde_json::Value::as_u64) == Some(0) {
        return Ok(None);
    }
    k.maybe_size(key)
}

/// GGUF's experts, where there are any.
fn experts_gguf(k: &Keys) -> Result<Option<Experts>, ModelError> {
    let Some(count) = k.maybe_size("expert_count")? else { return Ok(None) };
    let used = k.size("expert_used_count")?;
    // Gates are a softmax scaled to sum to 1, as llama.cpp does for these.
    Ok(Some(Experts { count, used, normalized: true }))
}
