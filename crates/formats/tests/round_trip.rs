//! What is written reads back the same, and the real model file parses.

#![allow(clippy::unwrap_used)] // a failed test is meant to panic

use ashlar_core::DType;
use ashlar_formats::{Gguf, GgufWriter, Value, peft, safetensors};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e30f32..1e30).prop_map(Value::F32),
        (-1e300f64..1e300).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        any::<String>().prop_map(Value::String),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => scalar(),
        1 => (scalar(), 1usize..9).prop_map(|(v, n)| Value::Array(vec![v; n])),
        1 => prop::collection::vec(any::<String>(), 0..6)
            .prop_map(|v| Value::Array(v.into_iter().map(Value::String).collect())),
        1 => prop::collection::vec(prop::collection::vec(any::<i32>(), 1..4), 1..4).prop_map(|v| {
            Value::Array(
                v.into_iter()
                    .map(|v| Value::Array(v.into_iter().map(Value::I32).collect()))
                    .collect(),
            )
        }),
    ]
}

const GGUF_TYPES: [DType; 6] = [
    DType::F32,
    DType::F16,
    DType::I8,
    DType::Q8_0,
    DType::Q4_1,
    DType::Q6_K,
];

type Tensor = (Vec<usize>, DType, Vec<u8>);

/// A tensor whose last dimension is a multiple of the block.
fn tensor(types: &'static [DType]) -> impl Strategy<Value = Tensor> {
    let shape = prop::collection::vec(1usize..4, 1..5);
    (shape, prop::sample::select(types), any::<u8>()).prop_map(|(mut shape, dtype, fill)| {
        if let Some(last) = shape.last_mut() {
            *last *= dtype.block_len();
        }
        let bytes = dtype.bytes_for(shape.iter().product()).unwrap();
        let data = (0..bytes).map(|i| fill.wrapping_add(i as u8)).collect();
        (shape, dtype, data)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn gguf(
        meta in prop::collection::btree_map("[a-z.]{1,12}", value(), 0..8),
        tensors in prop::collection::btree_map("[a-z0-9.]{1,20}", tensor(&GGUF_TYPES), 0..8),
    ) {
        let mut w = GgufWriter::new();
        for (k, v) in &meta {
            w.meta(k, v.clone());
        }
        for (name, (shape, dtype, data)) in &tensors {
            w.tensor(name, shape, *dtype, data.clone()).unwrap();
        }
        let mut bytes = Vec::new();
        w.write_to(&mut bytes).unwrap();
        let g = Gguf::parse(&bytes).unwrap();
        let read: BTreeMap<_, _> = g.metadata().map(|(k, v)| (k.to_owned(), v.clone())).collect();
        prop_assert_eq!(&read, &meta);
        let read: BTreeMap<_, _> = g
            .tensors()
            .map(|t| (t.name.to_owned(), (t.shape, t.dtype, t.data.to_vec())))
            .collect();
        prop_assert_eq!(&read, &tensors);
        for t in g.tensors() {
            prop_assert_eq!(g.tensor(t.name), Some(t));
        }

        // Version 2 has the same layout.
        bytes[4] = 2;
        prop_assert!(Gguf::parse(&bytes).is_ok());
    }

    #[test]
    fn safetensors_any_order_same_bytes(
        tensors in prop::collection::btree_map(
            any::<String>(),
            tensor(&[DType::F64, DType::F32, DType::BF16, DType::U8]),
            0..8,
        ),
        metadata in prop::collection::btree_map(any::<String>(), any::<String>(), 0..4),
    ) {
        let mut list: Vec<_> = tensors
            .iter()
            .map(|(n, (s, t, d))| (n.as_str(), s.as_slice(), *t, d.as_slice()))
            .collect();
        let (mut bytes, mut again) = (Vec::new(), Vec::new());
        safetensors::write(&list, &metadata, &mut bytes).unwrap();
        list.reverse();
        safetensors::write(&list, &metadata, &mut again).unwrap();
        prop_assert_eq!(&bytes, &again);

        let st = safetensors::SafeTensors::parse(&bytes).unwrap();
        prop_assert_eq!(st.metadata(), &metadata);
        let read: BTreeMap<_, _> = st
            .tensors()
            .map(|t| (t.name.to_owned(), (t.shape, t.dtype, t.data.to_vec())))
            .collect();
        prop_assert_eq!(&read, &tensors);
        for t in st.tensors() {
            prop_assert!(t.data.as_ptr().addr().wrapping_sub(bytes.as_ptr().addr())
                % t.dtype.block_bytes() == 0, "values are aligned in the file");
            prop_assert_eq!(st.tensor(t.name), Some(t));
        }
    }
}

#[test]
fn safetensors_scalars_and_empty_tensors() {
    let mut bytes = Vec::new();
    let data = 1f32.to_le_bytes();
    let list: [(&str, &[usize], DType, &[u8]); 3] = [
        ("scalar", &[], DType::F32, &data),
        ("empty", &[0, 4], DType::F32, &[]),
        ("also_empty", &[3, 0], DType::F32, &[]),
    ];
    safetensors::write(&list, &BTreeMap::new(), &mut bytes).unwrap();
    let st = safetensors::SafeTensors::parse(&bytes).unwrap();
    assert_eq!(st.tensor("scalar").unwrap().data, data);
    assert_eq!(st.tensor("empty").unwrap().shape, [0, 4]);
    assert_eq!(st.tensors().count(), 3);
}

#[test]
fn writing_keeps_alignment_and_order() {
    let mut w = GgufWriter::default();
    w.meta("general.alignment", Value::U32(64));
    w.meta("z", Value::U32(1));
    w.meta("a", Value::U32(1));
    w.meta("z", Value::U32(2));
    w.tensor("t", &[1], DType::I8, vec![1]).unwrap();
    w.tensor("s", &[3], DType::I8, vec![1, 2, 3]).unwrap();
    let mut bytes = Vec::new();
    w.write_to(&mut bytes).unwrap();
    let g = Gguf::parse(&bytes).unwrap();
    let keys: Vec<_> = g.metadata().map(|(k, _)| k).collect();
    assert_eq!(keys, ["general.alignment", "z", "a"]);
    assert_eq!(g.meta("general.alignment").unwrap().as_u64(), Some(32));
    assert_eq!(g.meta("z"), Some(&Value::U32(2)));
    let offsets: Vec<_> = g
        .tensors()
        .map(|t| t.data.as_ptr().addr() - bytes.as_ptr().addr())
        .collect();
    assert!(offsets.iter().all(|o| o % 32 == 0), "{offsets:?}");
}

#[test]
fn adapter_config_and_names() {
    let config = peft::LoraConfig::new(8, 16.0, vec!["q_proj".into(), "v_proj".into()], "base");
    let json = config.to_json();
    assert_eq!(
        peft::LoraConfig::from_json(json.as_bytes()).unwrap(),
        config
    );
    assert_eq!(config.scaling(), 2.0);
    let name = peft::tensor_name(12, "self_attn.q_proj", "A");
    assert_eq!(
        name,
        "base_model.model.model.layers.12.self_attn.q_proj.lora_A.weight"
    );
    assert_eq!(
        peft::parse_tensor_name(&name),
        Some((12, "self_attn.q_proj", "A"))
    );
    for bad in ["", "x", "base_model.model.model.layers.x.m.lora_A.weight"] {
        assert_eq!(peft::parse_tensor_name(bad), None);
    }

    // What PEFT writes by default reads; what we do not implement is named.
    let minimal = br#"{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"]}"#;
    assert_eq!(peft::LoraConfig::from_json(minimal).unwrap().scaling(), 2.0);
    for (field, value) in [
        ("use_dora", "true"),
        ("use_rslora", "true"),
        ("bias", "\"all\""),
        ("target_modules", "\"all-linear\""),
        ("rank_pattern", "{\"q_proj\":2}"),
        ("modules_to_save", "[\"lm_head\"]"),
        ("peft_type", "\"IA3\""),
    ] {
        let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
        json[field] = serde_json::from_str(value).unwrap();
        let error = peft::LoraConfig::from_json(json.to_string().as_bytes()).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
    assert!(peft::LoraConfig::from_json(b"[1]").is_err());
    assert!(
        peft::LoraConfig::from_json(&json.replace("\"r\": 8", "\"r\": 0").into_bytes()).is_err()
    );
}

#[test]
fn the_real_model_parses_and_survives_a_rewrite() {
    let path = std::env::var_os("ASHLAR_TEST_MODEL").map_or_else(
        || {
            let cache = std::env::var_os("ASHLAR_CACHE").map_or_else(
                || {
                    let home = std::env::var_os("HOME").unwrap_or_default();
                    std::path::PathBuf::from(home).join(".cache/ashlar")
                },
                Into::into,
            );
            cache.join("models/SmolLM2-135M-Instruct.Q4_1.gguf")
        },
        Into::into,
    );
    let Ok(bytes) = std::fs::read(&path) else {
        assert!(
            std::env::var_os("ASHLAR_REQUIRE_PEERS").is_none_or(|v| v != "1"),
            "{} is missing",
            path.display()
        );
        eprintln!("skipped: {} is missing", path.display());
        return;
    };
    let g = Gguf::parse(&bytes).unwrap();
    assert_eq!(
        g.meta("general.architecture").and_then(Value::as_str),
        Some("llama")
    );
    let embed = g.tensor("token_embd.weight").unwrap();
    assert_eq!(embed.shape, [49152, 576], "slowest dimension first");

    let mut w = GgufWriter::new();
    for (k, v) in g.metadata() {
        w.meta(k, v.clone());
    }
    for t in g.tensors() {
        w.tensor(t.name, &t.shape, t.dtype, t.data.to_vec())
            .unwrap();
    }
    let mut again = Vec::new();
    w.write_to(&mut again).unwrap();
    let h = Gguf::parse(&again).unwrap();
    assert!(g.metadata().eq(h.metadata()));
    assert!(g.tensors().eq(h.tensors()));
}
