//! A checkpoint in Hugging Face's layout, tiny and random, served.

use ashlar_api::{Backend, ChatMessage, ChatRequest, CompletionRequest, Event};
use ashlar_core::DType;
use ashlar_engine::{EngineConfig, EngineError, LocalBackend};
use ashlar_model::formats::safetensors;
use futures::{StreamExt, executor::block_on};
use serde_json::json;
use std::{collections::BTreeMap, path::Path};

const VOCAB: usize = 258;

fn save(folder: &Path) {
    let config = json!({"model_type": "qwen2", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": VOCAB,
        "tie_word_embeddings": true});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();

    let mut all: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut put = |name: &str, shape: &[usize]| {
        let value = |i: usize| ((i * 7919 + name.len() * 31) % 997) as f32 / 997.0 - 0.5;
        let bytes = (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect();
        all.push((format!("model.{name}"), shape.to_vec(), bytes));
    };
    put("embed_tokens.weight", &[VOCAB, 8]);
    put("norm.weight", &[8]);
    for (name, shape) in [("q", [8, 8]), ("k", [4, 8]), ("v", [4, 8]), ("o", [8, 8])] {
        put(&format!("layers.0.self_attn.{name}_proj.weight"), &shape);
        if name != "o" {
            put(&format!("layers.0.self_attn.{name}_proj.bias"), &shape[..1]);
        }
    }
    for (name, shape) in [("gate", [12, 8]), ("up", [12, 8]), ("down", [8, 12])] {
        put(&format!("layers.0.mlp.{name}_proj.weight"), &shape);
    }
    put("layers.0.input_layernorm.weight", &[8]);
    put("layers.0.post_attention_layernorm.weight", &[8]);
    let views: Vec<(&str, &[usize], DType, &[u8])> =
        all.iter().map(|(n, s, b)| (n.as_str(), &s[..], DType::F32, &b[..])).collect();
    let mut out = Vec::new();
    safetensors::write(&views, &BTreeMap::new(), &mut out).unwrap();
    std::fs::write(folder.join("model.safetensors"), out).unwrap();

    // Printable bytes spell themselves in the byte-level alphabet.
    let mut ids = serde_json::Map::new();
    ids.insert("<end>".into(), 0.into());
    for (i, c) in (33..127u8).enumerate() {
        ids.insert(char::from(c).to_string(), (i + 1).into());
    }
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<end>", "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false}],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": ids, "merges": []},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for m in messages %}{{ m['content'] }}{% endfor %}";
    let settings = json!({"eos_token": {"content": "<end>"}, "bos_token": null, "chat_template": template});
    std::fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();
}

#[test]
fn a_base_model_completes_and_chats_only_with_a_template() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    let config = EngineConfig { kv_blocks: Some(8), ..EngineConfig::default() };
    let chat = |template: Option<&str>| {
        let backend = LocalBackend::open("m", dir.path(), template, None, config).unwrap();
        let completion = CompletionRequest { max_tokens: Some(2), ..CompletionRequest::new("m", "hello") };
        assert!(block_on(backend.complete(completion)).is_ok());
        let messages = vec![ChatMessage::user("hello")];
        block_on(backend.chat(ChatRequest { max_tokens: Some(2), ..ChatRequest::new("m", messages) })).err()
    };
    let refused = chat(None).unwrap();
    assert_eq!((refused.status, refused.code.as_deref()), (400, Some("no_chat_template")));
    assert!(refused.message.contains("/v1/completions") && refused.message.contains("--chat-template"));
    assert_eq!(chat(Some("{{ messages[0]['content'] }}")), None);
    let broken = LocalBackend::open("m", dir.path(), Some("{% for"), None, config);
    assert!(matches!(broken, Err(EngineError::Text(_))));
}

fn open(folder: &Path) -> Result<LocalBackend, EngineError> {
    LocalBackend::open("m", folder, None, None, EngineConfig { kv_blocks: Some(8), ..EngineConfig::default() })
}

#[test]
fn a_folder_is_served_like_a_file() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let backend = open(dir.path()).unwrap();
    let go = || {
        let request = CompletionRequest {
            temperature: Some(0.0),
            max_tokens: Some(8),
            ..CompletionRequest::new("m", "hello")
        };
        block_on(async {
            let mut stream = backend.complete(request).await.unwrap();
            let mut tokens = 0;
            while let Some(event) = stream.next().await {
                tokens += usize::from(matches!(event.unwrap(), Event::Token { .. }));
            }
            tokens
        })
    };
    let tokens = go();
    assert!(tokens > 0 && tokens == go());

    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"chat_template": 7}"#).unwrap();
    assert!(matches!(open(dir.path()), Err(EngineError::Metadata { key: "chat_template", .. })));
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(matches!(open(dir.path()), Err(EngineError::Metadata { .. })));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    assert!(matches!(open(dir.path()), Err(EngineError::Io { .. })));
}
