//! Checkpoints that lie: refused by name, never with a panic.

use ashlar_core::DType;
use ashlar_kernels::Pool;
use ashlar_model::{
    Encoder, Item, KvCache, Model, ModelError, Want, Weights, Workspace,
    formats::{Gguf, GgufWriter, Value, safetensors},
};
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use std::{
    collections::BTreeMap,
    path::Path,
};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

const CONFIG: &str = r#"{"model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 12,
    "moe_intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "max_position_embeddings": 64, "vocab_size": 11, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": true,
    "tie_word_embeddings": true, "hidden_act": "silu"}"#;

fn value(i: usize) -> f32 {
    ((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 65536.0 - 0.5
}

fn bytes(shape: &[usize]) -> Vec<u8> {
    (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect()
}

/// The tensors of [`CONFIG`], under Hugging Face's names.
fn tensors() -> Tensors {
    let mut all = Tensors::new();
    let mut put = |name: String, shape: &[usize]| {
        all.insert(format!("{name}.weight"), (shape.to_vec(), bytes(shape)));
    };
    put("model.embed_tokens".into(), &[11, 8]);
    put("model.norm".into(), &[8]);
    for i in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| put(format!("model.layers.{i}.{name}"), shape);
        layer("input_layernorm", &[8]);
        layer("post_attention_layernorm", &[8]);
        for (name, shape) in [("q_proj", [8, 8]), ("k_proj", [4, 8]), ("v_proj", [4, 8]), ("o_proj", [8, 8])] {
            layer(&format!("self_attn.{name}"), &shape);
        }
        layer("self_attn.q_norm", &[4]);
        layer("self_attn.k_norm", &[4]);
        layer("mlp.gate", &[3, 8]);
        for e in 0..3 {
            for (name, shape) in [("gate_proj", [6, 8]), ("up_proj", [6, 8]), ("down_proj", [8, 6])] {
                layer(&format!("mlp.experts.{e}.{name}"), &shape);
            }
        }
    }
    all
}

fn save(path: &Path, tensors: &Tensors) {
    let views: Vec<(&str, &[usize], DType, &[u8])> =
        tensors.iter().map(|(n, (s, b))| (n.as_str(), &s[..], DType::F32, &b[..])).collect();
    let mut out = Vec::new();
    safetensors::write(&views, &BTreeMap::new(), &mut out).unwrap();
    std::fs::write(path, out).unwrap();
}

/// Loads a folder with this configuration and these tensors, and takes a step.
fn load(config: &str, tensors: &Tensors) -> Result<(), ModelError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    save(&dir.path().join("model.safetensors"), tensors);
    step(&Model::load_with(dir.path(), Pool::new(1))?)
}

fn step(model: &Model) -> Result<(), ModelError> {
    let mut cache = KvCache::new(model.config(), 1);
    let item = Item { tokens: &[1, 2, 3], start: 0, blocks: &[0], want: Want::Last };
    let mut ws = Workspace::default();
    let logits = model.forward(&[item], &mut cache, &mut ws)?;
    assert_eq!(logits.row(0).len(), model.config().vocab);
    Ok(())
}

fn with(changes: Json) -> String {
    let mut config: Json = serde_json::from_str(CONFIG).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config.to_string()
}

#[test]
fn settings_that_are_not_known_are_refused_by_name() {
    load(CONFIG, &tensors()).unwrap();
    load(&with(json!({"use_cache": true, "quantization_config": null})), &tensors()).unwrap();
    for (changes, named) in [
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"residual_multiplier": 0.2}), "residual_multiplier"),
        (json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), "dynamic"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "twist": 1}}), "rope_scaling.twist"),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}), "rotary factor"),
        (json!({"rope_scaling": {"rope_type": "linear"}}), "rope_scaling.factor"),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0,
            "high_freq_factor": 1.0, "original_max_position_embeddings": 8}}), "low_freq_factor"),
        (json!({"rope_theta": -1.0}), "rotary base"),
        (json!({"rope_theta": "big"}), "rope_theta"),
        (json!({"hidden_act": "relu"}), "hidden_act"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_attention_heads": 3, "head_dim": null}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "key and value heads"),
        (json!({"head_dim": 512}), "head size"),
        (json!({"num_hidden_layers": 1u64 << 40}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 5000}), "num_hidden_layers"),
        (json!({"num_experts_per_tok": 4}), "experts used"),
        (json!({"mlp_only_layers": [1]}), "mlp_only_layers"),
        (json!({"use_sliding_window": true, "layer_types": ["full_attention", "sliding_attention"]}), "sliding_window"),
        (json!({"layer_types": ["full_attention"]}), ""),
        (json!({"use_sliding_window": true, "sliding_window": 4, "layer_types": ["linear_attention", "full_attention"]}), "linear_attention"),
        (json!({"model_type": "mamba"}), "mamba"),
        (json!({"model_type": null}), "model_type"),
    ] {
        let said = match load(&with(changes.clone()), &tensors()) {
            // Layer types say nothing where windows are off.
            Ok(()) if named.is_empty() => continue,
            Ok(()) => panic!("{changes} was taken"),
            Err(e) => e.to_string(),
        };
        assert!(said.contains(named), "{changes}: {said}");
    }
}

#[test]
fn tensors_that_are_missing_left_over_or_misshapen_are_refused_by_name() {
    let name = "model.layers.1.mlp.experts.2.up_proj.weight";
    let mut less = tensors();
    less.remove(name);
    assert!(matches!(load(CONFIG, &less), Err(ModelError::Missing(n)) if n == name));
    let mut more = tensors();
    more.insert("model.layers.0.self_attn.q_proj.bias".into(), (vec![8], bytes(&[8])));
    assert!(matches!(load(CONFIG, &more), Err(ModelError::Unused(n)) if n.ends_with("q_proj.bias")));
    let mut other = tensors();
    other.insert("model.norm.weight".into(), (vec![4, 2], bytes(&[8])));
    assert!(matches!(load(CONFIG, &other), Err(ModelError::Shape { .. })));
    // A head beside a tied one is the same or an error.
    let mut head = tensors();
    head.insert("lm_head.weight".into(), (vec![11, 8], bytes(&[11, 8])));
    load(CONFIG, &head).unwrap();
    head.get_mut("lm_head.weight").unwrap().1[3] ^= 1;
    assert!(matches!(load(CONFIG, &head), Err(ModelError::Unused(n)) if n == "lm_head.weight"));
}

#[test]
fn an_index_stays_in_its_folder_and_keeps_its_word() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("config.json"), CONFIG).unwrap();
    let all = tensors();
    let half = all.len() / 2;
    let first: Tensors = all.clone().into_iter().take(half).collect();
    let second: Tensors = all.clone().into_iter().skip(half).collect();
    save(&folder.join("a.safetensors"), &first);
    save(&folder.join("b.safetensors"), &second);
    save(&dir.path().join("b.safetensors"), &second);
    let go = |file: &dyn Fn(&str) -> &'static str| {
        let map: BTreeMap<&String, &str> = all.keys().map(|n| (n, file(n))).collect();
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        std::fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        Model::load_with(&folder, Pool::new(1)).map(drop)
    };
    let right = |n: &str| if first.contains_key(n) { "a.safetensors" } else { "b.safetensors" };
    go(&right).unwrap();
    for outside in ["../b.safetensors", "/etc/passwd", "..", "sub/b.safetensors", ""] {
        let escaped = go(&|n| if first.contains_key(n) { "a.safetensors" } else { outside });
        assert!(matches!(escaped, Err(ModelError::Setting { .. })), "{outside:?}: {escaped:?}");
    }
    assert!(matches!(go(&|_| "a.safetensors"), Err(ModelError::Missing(_))));
    assert!(matches!(go(&|_| "c.safetensors"), Err(ModelError::Read { .. })));
    save(&folder.join("b.safetensors"), &all);
    assert!(matches!(go(&right), Err(ModelError::Twice(_))));
}

/// The same model as GGUF.
fn gguf() -> Vec<u8> {
    let mut w = GgufWriter::new();
    w.meta("general.architecture", Value::String("qwen3moe".into()));
    for (key, value) in [
        ("context_length", 64), ("embedding_length", 8), ("block_count", 2), ("feed_forward_length", 12),
        ("expert_feed_forward_length", 6), ("attention.head_count", 2), ("attention.head_count_kv", 1),
        ("attention.key_length", 4), ("attention.value_length", 4), ("expert_count", 3), ("expert_used_count", 2),
    ] {
        w.meta(&format!("qwen3moe.{key}"), Value::U32(value));
    }
    w.meta("qwen3moe.attention.layer_norm_rms_epsilon", Value::F32(1e-6));
    w.meta("qwen3moe.rope.freq_base", Value::F32(10_000.0));
    let mut put = |name: &str, shape: &[usize]| w.tensor(&format!("{name}.weight"), shape, DType::F32, bytes(shape)).unwrap();
    put("token_embd", &[11, 8]);
    put("output_norm", &[8]);
    for i in 0..2 {
        let mut layer = |name: &str, shape: &[usize]| put(&format!("blk.{i}.{name}"), shape);
        layer("attn_norm", &[8]);
        layer("ffn_norm", &[8]);
        for (name, shape) in [("attn_q", [8, 8]), ("attn_k", [4, 8]), ("attn_v", [4, 8]), ("attn_output", [8, 8])] {
            layer(name, &shape);
        }
        layer("attn_q_norm", &[4]);
        layer("attn_k_norm", &[4]);
        layer("ffn_gate_inp", &[3, 8]);
        layer("ffn_gate_exps", &[3, 6, 8]);
        layer("ffn_up_exps", &[3, 6, 8]);
        layer("ffn_down_exps", &[3, 8, 6]);
    }
    let mut out = Vec::new();
    w.write_to(&mut out).unwrap();
    out
}

fn load_gguf(bytes: &[u8]) -> Result<(), ModelError> {
    step(&Model::from_gguf(&Gguf::parse(bytes)?, Pool::new(1))?)
}

#[test]
fn gguf_is_held_to_the_same() {
    let file = gguf();
    load_gguf(&file).unwrap();
    // The same bytes of a key with one letter changed: not known any more.
    let at = file.windows(9).position(|w| w == b"freq_base").unwrap();
    let mut odd = file.clone();
    odd[at] = b'g';
    let said = load_gguf(&odd).unwrap_err().to_string();
    assert!(said.contains("qwen3moe.rope.greq_base"), "{said}");
    let parsed = Gguf::parse(&file).unwrap();
    assert!(matches!(Weights::from_gguf(&parsed), Err(ModelError::Role { .. })), "the trainer knows llama alone");
    assert!(matches!(Encoder::from_gguf(&parsed, Pool::new(1)), Err(ModelError::Role { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_configurations_never_panic(at in 0usize..600, to in prop::char::range(' ', '~'), insert: bool) {
        let mut config: Vec<char> = CONFIG.chars().collect();
        let at = at % config.len();
        if insert { config.insert(at, to) } else { config[at] = to }
        let _ = load(&config.iter().collect::<String>(), &tensors());
    }

    #[test]
    fn damaged_gguf_never_panics(hits in prop::collection::vec((0usize..2000, any::<u8>()), 1..4)) {
        let mut file = gguf();
        for (at, to) in hits {
            file[at] = to;
        }
        let _ = load_gguf(&file);
    }
}
