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
type Typed = BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>;

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
    let typed = tensors.iter().map(|(n, (s, b))| (n.clone(), (DType::F32, s.clone(), b.clone())));
    save_typed(path, &typed.collect());
}

fn save_typed(path: &Path, tensors: &Typed) {
    let views: Vec<(&str, &[usize], DType, &[u8])> =
        tensors.iter().map(|(n, (d, s, b))| (n.as_str(), &s[..], *d, &b[..])).collect();
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
        (json!({"quantization_config": {"bits": 4}}), "quantization_config.quant_method"),
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

/// A llama of one layer whose matrices are 64 by 64.
const SMALL: &str = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "vocab_size": 11,
    "tie_word_embeddings": true}"#;

/// [`SMALL`] stored so; `part` has a matrix's tensors.
struct Stored {
    settings: Json,
    part: Vec<(&'static str, DType, Vec<usize>)>,
}

fn stored(method: &str) -> Stored {
    let of = |settings, part: &[(&'static str, DType, &[usize])]| Stored {
        settings,
        part: part.iter().map(|(name, dtype, shape)| (*name, *dtype, shape.to_vec())).collect(),
    };
    let weights = |bits: usize, kind: &str, strategy: &str| {
        json!({"quant_method": "compressed-tensors", "format": if kind == "int" { "pack-quantized" } else { "float-quantized" },
            "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights":
            {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": 32, "symmetric": true, "dynamic": false}}}})
    };
    match method {
        "gptq" => of(json!({"quant_method": "gptq", "bits": 4, "group_size": 32}), &[
            ("qweight", DType::I32, &[8, 64]), ("qzeros", DType::I32, &[2, 8]), ("scales", DType::F16, &[2, 64]),
            ("g_idx", DType::I32, &[64]),
        ]),
        "awq" => of(json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}), &[
            ("qweight", DType::I32, &[64, 8]), ("qzeros", DType::I32, &[1, 8]), ("scales", DType::F16, &[1, 64]),
        ]),
        "fp8" => of(json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), &[
            ("weight", DType::F8_E4M3, &[64, 64]), ("weight_scale_inv", DType::F32, &[1, 1]),
        ]),
        "float" => of(weights(8, "float", "tensor"), &[
            ("weight", DType::F8_E5M2, &[64, 64]), ("weight_scale", DType::BF16, &[1]),
        ]),
        _ => of(weights(4, "int", "group"), &[
            ("weight_packed", DType::I32, &[64, 8]), ("weight_scale", DType::BF16, &[64, 2]), ("weight_shape", DType::I64, &[2]),
        ]),
    }
}

impl Stored {
    /// A matrix's places, 0 to 63 in groups of 32, or sizes.
    fn bytes(name: &str, dtype: DType, shape: &[usize]) -> Vec<u8> {
        match name {
            "g_idx" | "weight_g_idx" => (0..64).flat_map(|i: i32| (i / 32).to_le_bytes()).collect(),
            "weight_shape" => [64i64, 64].iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => vec![0x11; dtype.bytes_for(shape.iter().product()).unwrap()],
        }
    }

    /// Loads it after `change` of one matrix's tensors and of the settings.
    fn load(&self, change: impl Fn(&mut Typed), settings: Json) -> Result<(), ModelError> {
        let mut all = Typed::new();
        let mut put = |name: &str, dtype, shape: &[usize]| {
            let last = name.rsplit('.').next().unwrap();
            all.insert(name.into(), (dtype, shape.to_vec(), Self::bytes(last, dtype, shape)));
        };
        put("model.embed_tokens.weight", DType::F32, &[11, 64]);
        put("model.norm.weight", DType::F32, &[64]);
        put("model.layers.0.input_layernorm.weight", DType::F32, &[64]);
        put("model.layers.0.post_attention_layernorm.weight", DType::F32, &[64]);
        for name in ["self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"] {
            for (part, dtype, shape) in &self.part {
                put(&format!("model.layers.0.{name}_proj.{part}"), *dtype, shape);
            }
        }
        change(&mut all);
        let mut config: Json = serde_json::from_str(SMALL).unwrap();
        let mut own = self.settings.clone();
        merge(&mut own, settings);
        config["quantization_config"] = own;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        save_typed(&dir.path().join("model.safetensors"), &all);
        step(&Model::load_with(dir.path(), Pool::new(1))?)
    }
}

/// Puts `changes` into `to`, objects into objects.
fn merge(to: &mut Json, changes: Json) {
    match (to, changes) {
        (Json::Object(to), Json::Object(changes)) => {
            changes.into_iter().for_each(|(key, value)| merge(to.entry(key).or_insert(Json::Null), value));
        }
        (to, changes) => *to = changes,
    }
}

const METHODS: [&str; 5] = ["gptq", "awq", "fp8", "float", "packed"];

#[test]
fn quantization_settings_that_are_not_known_are_refused_by_name() {
    for method in METHODS {
        stored(method).load(|_| (), json!({})).unwrap_or_else(|e| panic!("{method}: {e}"));
    }
    let weights = |change: Json| json!({"config_groups": {"group_0": {"weights": change}}});
    for (method, changes, named) in [
        ("gptq", json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        ("gptq", json!({"quant_method": null}), "quant_method"),
        ("gptq", json!({"bits": 3}), "bits is 3"),
        ("gptq", json!({"bits": "4"}), "bits"),
        ("gptq", json!({"bits": 8}), "expected [16, 64]"),
        ("gptq", json!({"group_size": 0}), "group_size is 0"),
        ("gptq", json!({"group_size": null}), "group_size"),
        ("gptq", json!({"group_size": -2}), "group_size"),
        ("gptq", json!({"group_size": 1u64 << 40}), "group_size"),
        ("gptq", json!({"group_size": 16}), "expected [4, 8]"),
        ("gptq", json!({"group_size": 48}), "the size of group 0 in model.layers.0.self_attn.q_proj.g_idx is 32"),
        ("gptq", json!({"group_size": 64}), "expected [1, 8]"),
        ("gptq", json!({"checkpoint_format": "marlin"}), "marlin"),
        ("gptq", json!({"pack_dtype": "int16"}), "pack_dtype"),
        ("gptq", json!({"rotation": "hadamard"}), "quantization_config.rotation"),
        ("gptq", json!({"ignore": "lm_head"}), "ignore"),
        ("awq", json!({"version": "gemv"}), "gemv"),
        ("awq", json!({"bits": 8}), "bits is 8"),
        ("awq", json!({"zero_point": false}), "must be 8"),
        ("fp8", json!({"fmt": "e3m4"}), "e3m4"),
        ("fp8", json!({"scale_fmt": "odd"}), "odd"),
        ("fp8", json!({"weight_block_size": [128]}), "weight_block_size"),
        ("fp8", json!({"weight_block_size": [0, 128]}), "weight_block_size"),
        ("fp8", json!({"weight_block_size": [32, 32]}), "expected [2, 2]"),
        ("packed", json!({"format": "nvfp4-pack-quantized"}), "nvfp4"),
        ("packed", json!({"quantization_status": "frozen"}), "frozen"),
        ("packed", json!({"transform_config": {"config_groups": {"R1": {}}}}), "transform_config.config_groups"),
        ("packed", json!({"sparsity_config": {"format": "sparse-24"}}), "sparsity_config.format"),
        ("packed", json!({"config_groups": null}), "config_groups"),
        ("packed", json!({"config_groups": {"group_0": 3}}), "group_0"),
        ("packed", json!({"config_groups": {"group_1": {"weights": {"num_bits": 8}}}}), "group"),
        ("packed", weights(json!({"num_bits": 3})), "num_bits is 3 (int)"),
        ("packed", weights(json!({"type": "float"})), "num_bits is 4 (float)"),
        ("packed", weights(json!({"strategy": "token"})), "token"),
        ("packed", weights(json!({"strategy": "block"})), "block_structure"),
        ("packed", weights(json!({"group_size": 0})), "group_size is 0"),
        ("packed", weights(json!({"group_size": 48})), "blocks of 32: 16"),
        ("packed", weights(json!({"symmetric": false})), "weight_zero_point"),
        ("packed", weights(json!({"twist": 1})), "weights.twist"),
        ("float", weights(json!({"strategy": "channel"})), ""),
        ("float", weights(json!({"strategy": "group"})), "expected [64, 2]"),
    ] {
        match stored(method).load(|_| (), changes.clone()) {
            // One scale for all rows is read where each row's could stand.
            Ok(()) if named.is_empty() => {}
            Ok(()) => panic!("{method} {changes} was taken"),
            Err(e) => assert!(!named.is_empty() && e.to_string().contains(named), "{method} {changes}: {e}"),
        }
    }
}

#[test]
fn quantized_tensors_that_lie_are_refused_by_name() {
    type Change = fn(&mut (DType, Vec<usize>, Vec<u8>));
    let resized: Change = |t| {
        t.1[0] += 1;
        t.2.resize(t.0.bytes_for(t.1.iter().product()).unwrap(), 0);
    };
    let retyped: Change = |t| t.0 = DType::F32;
    let scalar: Change = |t| *t = (t.0, vec![], t.2[..t.0.block_bytes()].to_vec());
    let far: Change = |t| t.2[4 * 5..][..4].copy_from_slice(&2i32.to_le_bytes());
    let negative: Change = |t| t.2[4 * 5..][..4].copy_from_slice(&(-7i32).to_le_bytes());
    let crowded: Change = |t| t.2[4 * 5..][..4].copy_from_slice(&1i32.to_le_bytes());
    let not_a_number: Change = |t| t.2[65] = 0xff;
    let wrong_size: Change = |t| t.2[8] = 65;
    let at = "model.layers.0.mlp.up_proj";
    let cases: [(&str, &str, Change, &str); 19] = [
        ("gptq", "qweight", resized, "expected [8, 64]"),
        ("gptq", "qweight", retyped, "F32 is not supported"),
        ("gptq", "qweight", scalar, "expected [8, 64]"),
        ("gptq", "qzeros", resized, "expected [2, 8]"),
        ("gptq", "scales", resized, "expected [2, 64]"),
        ("gptq", "g_idx", resized, "expected [64]"),
        ("gptq", "g_idx", far, "g_idx[5], of 2 groups, is 2"),
        ("gptq", "g_idx", negative, "g_idx[5], of 2 groups, is -7"),
        ("gptq", "g_idx", crowded, "g_idx is 31"),
        ("awq", "qweight", resized, "expected [64, 8]"),
        ("awq", "qzeros", scalar, "expected [1, 8]"),
        ("fp8", "weight", resized, "expected [64, 64]"),
        ("fp8", "weight", not_a_number, "row 1 is not a number"),
        ("fp8", "weight_scale_inv", resized, "expected [1, 1]"),
        ("float", "weight_scale", resized, "expected [64, 1]"),
        ("packed", "weight_packed", resized, "expected [64, 8]"),
        ("packed", "weight_scale", scalar, "expected [64, 2]"),
        ("packed", "weight_shape", wrong_size, "is [64, 65]"),
        ("packed", "weight_shape", scalar, "expected [2]"),
    ];
    for (method, part, change, named) in cases {
        let name = format!("{at}.{part}");
        let said = stored(method).load(|all| change(all.get_mut(&name).unwrap()), json!({})).unwrap_err().to_string();
        assert!(said.contains(named), "{method} {part}: {said}");
    }
    for method in METHODS {
        for (part, ..) in &stored(method).part {
            let name = format!("{at}.{part}");
            let got = stored(method).load(|all| drop(all.remove(&name)), json!({"desc_act": true}));
            assert!(matches!(&got, Err(ModelError::Missing(_) | ModelError::Unknown { .. })), "{method} without {part}: {got:?}");
        }
    }
    // A bias that no module has: nothing, if it is 0.
    for (value, taken) in [(0, true), (1, false)] {
        let bias = |all: &mut Typed| drop(all.insert(format!("{at}.bias"), (DType::U8, vec![64], vec![value; 64])));
        assert_eq!(stored("gptq").load(bias, json!({})).is_ok(), taken);
    }
    // A plain matrix among quantized ones is plain; one in eight bits needs its scale.
    let plain = |all: &mut Typed| {
        all.retain(|n, _| !n.starts_with(at));
        all.insert(format!("{at}.weight"), (DType::F32, vec![64, 64], bytes(&[64, 64])));
    };
    for method in METHODS {
        stored(method).load(plain, json!({})).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn damaged_quantized_folders_never_panic(
        method in 0usize..5, part in 0usize..4, to in 0usize..70, dimension in 0usize..2, dtype in 0usize..6, group in -1i64..200,
    ) {
        let mut stored = stored(METHODS[method]);
        let part = part % stored.part.len();
        let part = &mut stored.part[part];
        let dimension = dimension % part.2.len();
        part.2[dimension] = to;
        part.1 = [part.1, DType::I32, DType::F16, DType::I64, DType::F8_E4M3, DType::U8][dtype];
        if matches!(part.0, "g_idx" | "weight_shape") {
            *part = ("scales", DType::F16, vec![to]);
        }
        let _ = stored.load(|_| (), json!({"group_size": group}));
    }

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
