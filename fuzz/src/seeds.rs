//! The targets and the valid files they start from.

use ashlar_core::DType;
use ashlar_formats::{FormatError, Gguf, GgufWriter, Value, peft::LoraConfig, safetensors};
use std::collections::BTreeMap;

use crate::Target;

/// The outcome of an input that parses.
pub const ACCEPTED: &str = "accepted";

/// The target called `name` with its seeds.
pub fn target(name: &str) -> Option<(Target, Vec<Vec<u8>>)> {
    Some(match name {
        "gguf" => (gguf as Target, gguf_seeds()),
        "safetensors" => (tensors, tensors_seeds()),
        "adapter" => (adapter, adapter_seeds()),
        _ => return None,
    })
}

/// What each target says of `bytes`.
pub fn all(bytes: &[u8]) -> String {
    format!(
        "gguf {}, safetensors {}, adapter {}",
        gguf(bytes),
        tensors(bytes),
        adapter(bytes)
    )
}

/// What went wrong without the input's own numbers and names, so that there are
/// some dozens of kinds.
fn kind(error: &FormatError) -> String {
    let debug = format!("{error:?}");
    let variant = debug.split([' ', '(', '{']).next().unwrap_or_default();
    let detail = match error {
        FormatError::Shape { why, .. } | FormatError::Offset { why, .. } => (*why).to_owned(),
        FormatError::Value { need, .. } | FormatError::Adapter { need, .. } => (*need).to_owned(),
        FormatError::Json { why, .. } => {
            let plain = why.split(" at line").next().unwrap_or_default();
            let end = plain.find(|c: char| !(c.is_ascii_alphabetic() || c == ' '));
            plain[..end.unwrap_or(plain.len())].to_owned()
        }
        // How far reading came, by powers of two.
        FormatError::Truncated { at, .. } | FormatError::Utf8 { at, .. } => {
            at.checked_ilog2().unwrap_or(0).to_string()
        }
        _ => String::new(),
    };
    format!("{variant} {detail}")
}

fn gguf(bytes: &[u8]) -> String {
    let file = match Gguf::parse(bytes) {
        Ok(file) => file,
        Err(e) => return kind(&e),
    };
    let mut w = GgufWriter::new();
    for (key, value) in file.metadata() {
        assert!(file.meta(key).is_some());
        w.meta(key, value.clone());
    }
    let mut writable = true;
    for t in file.tensors() {
        assert_eq!(t.dtype.bytes_for(t.elements()), Some(t.data.len()));
        assert_eq!(file.tensor(t.name).as_ref(), Some(&t));
        writable &= w.tensor(t.name, &t.shape, t.dtype, t.data.to_vec()).is_ok();
    }
    // What is read and can be written is read again the same.
    let mut again = Vec::new();
    if writable && w.write_to(&mut again).is_ok() {
        let again = Gguf::parse(&again).expect("our own file");
        assert!(again.tensors().eq(file.tensors()));
        assert_eq!(again.metadata().count(), file.metadata().count());
    }
    ACCEPTED.to_owned()
}

fn tensors(bytes: &[u8]) -> String {
    let file = match safetensors::SafeTensors::parse(bytes) {
        Ok(file) => file,
        Err(e) => return kind(&e),
    };
    let views: Vec<_> = file.tensors().collect();
    for t in &views {
        assert_eq!(t.dtype.bytes_for(t.elements()), Some(t.data.len()));
        assert_eq!(file.tensor(t.name).as_ref(), Some(t));
    }
    let list: Vec<_> = views
        .iter()
        .map(|t| (t.name, t.shape.as_slice(), t.dtype, t.data))
        .collect();
    let mut again = Vec::new();
    safetensors::write(&list, file.metadata(), &mut again).expect("a file that was read");
    let again = safetensors::SafeTensors::parse(&again).expect("our own file");
    assert_eq!(again.tensors().count(), views.len());
    assert_eq!(again.metadata(), file.metadata());
    ACCEPTED.to_owned()
}

fn adapter(bytes: &[u8]) -> String {
    match LoraConfig::from_json(bytes) {
        Ok(config) => {
            let mut again =
                LoraConfig::from_json(config.to_json().as_bytes()).expect("our own JSON");
            // `serde_json` without `float_roundtrip` may read a long number one
            // unit off; the scale applied is an f32, which must not notice.
            assert!((again.scaling() - config.scaling()).abs() <= config.scaling().abs() * 1e-6);
            again.lora_alpha = config.lora_alpha;
            again.lora_dropout = config.lora_dropout;
            assert_eq!(again, config);
            ACCEPTED.to_owned()
        }
        Err(e) => kind(&e),
    }
}

fn gguf_seeds() -> Vec<Vec<u8>> {
    let text = |s: &str| Value::String(s.to_owned());
    let mut full = GgufWriter::new();
    full.meta("general.architecture", text("llama"));
    full.meta("general.alignment", Value::U32(32));
    full.meta(
        "tokens",
        Value::Array(vec![text("<s>"), text("Ġthe"), text("")]),
    );
    full.meta("types", Value::Array(vec![Value::I32(3); 3]));
    full.meta(
        "nested",
        Value::Array(vec![Value::Array(vec![Value::Bool(true); 2]); 2]),
    );
    for (i, v) in [
        Value::U8(1),
        Value::I8(-1),
        Value::U16(1),
        Value::I16(-1),
        Value::I32(-1),
        Value::U64(1),
        Value::I64(-1),
        Value::F32(0.5),
        Value::F64(0.5),
        Value::Bool(true),
    ]
    .into_iter()
    .enumerate()
    {
        full.meta(&format!("k{i}"), v);
    }
    let mut small = GgufWriter::new();
    for (name, shape, dtype) in [
        ("token_embd.weight", &[4, 32][..], DType::Q4_1),
        ("blk.0.attn_q.weight", &[2, 32], DType::Q8_0),
        ("blk.0.ffn_up.weight", &[1, 256], DType::Q6_K),
        ("output_norm.weight", &[8], DType::F32),
        ("cube", &[2, 2, 2, 3], DType::F16),
    ] {
        let bytes = dtype
            .bytes_for(shape.iter().product())
            .expect("whole blocks");
        for w in [&mut full, &mut small] {
            w.tensor(name, shape, dtype, vec![3; bytes]).expect("valid");
        }
    }
    [GgufWriter::new(), small, full]
        .iter()
        .map(|w| {
            let mut out = Vec::new();
            w.write_to(&mut out).expect("memory");
            out
        })
        .collect()
}

fn tensors_seeds() -> Vec<Vec<u8>> {
    let lists: [&[(&str, &[usize], DType, &[u8])]; 3] = [
        &[],
        &[("x", &[2, 3], DType::F32, &[1; 24])],
        &[
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
                &[2, 4],
                DType::BF16,
                &[1; 16],
            ),
            (
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
                &[4, 2],
                DType::F16,
                &[2; 16],
            ),
            ("scalar", &[], DType::F64, &[0; 8]),
            ("empty", &[0, 7], DType::I64, &[]),
            ("bytes", &[5], DType::U8, &[9; 5]),
        ],
    ];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    lists
        .iter()
        .map(|list| {
            let mut out = Vec::new();
            safetensors::write(list, &metadata, &mut out).expect("valid");
            out
        })
        .collect()
}

fn adapter_seeds() -> Vec<Vec<u8>> {
    let config = LoraConfig::new(8, 16.0, vec!["q_proj".to_owned()], "base");
    let minimal = r#"{"peft_type":"LORA","r":4,"lora_alpha":8,"target_modules":["q_proj"]}"#;
    vec![config.to_json().into_bytes(), minimal.as_bytes().to_vec()]
}
