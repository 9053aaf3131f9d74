//! Tests on the real model file; skipped by name where it is absent.

use crate::{
    Sample, TrainConfig,
    base::Base,
    lora::Lora,
    network::Network,
    pack::Pack,
    train,
};
use ashlar_formats::{Gguf, Value, peft};
use ashlar_kernels::Pool;
use ashlar_model::Weights;
use ashlar_text::{GgufVocab, Tokenizer};
use std::{fs, path::PathBuf};

/// The model file, or `None` with a word on stderr.
fn model(test: &str) -> Option<PathBuf> {
    let cache = || {
        std::env::var_os("ASHLAR_CACHE")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/ashlar")))
    };
    let path = std::env::var_os("ASHLAR_TEST_MODEL")
        .map(PathBuf::from)
        .or_else(|| Some(cache()?.join("models/SmolLM2-135M-Instruct.Q4_1.gguf")));
    let found = path.filter(|p| p.is_file());
    if found.is_none() {
        assert!(std::env::var_os("ASHLAR_REQUIRE_PEERS").is_none(), "{test}: no model file");
        eprintln!("skipped: {test}: no model file");
    }
    found
}

fn tokenizer(bytes: &[u8]) -> Tokenizer {
    let gguf = Gguf::parse(bytes).unwrap();
    let text = |key: &str| gguf.meta(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let list = |key: &str| gguf.meta(key).and_then(Value::as_array).unwrap_or_default();
    let strings = |key: &str| {
        list(key).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect::<Vec<_>>()
    };
    let id = |key: &str| gguf.meta(key).and_then(Value::as_u64).map(|v| v as u32);
    Tokenizer::from_gguf(GgufVocab {
        model: text("tokenizer.ggml.model"),
        pre: text("tokenizer.ggml.pre"),
        tokens: strings("tokenizer.ggml.tokens"),
        token_types: list("tokenizer.ggml.token_type")
            .iter()
            .filter_map(|v| v.as_i64().map(|v| v as i32))
            .collect(),
        merges: strings("tokenizer.ggml.merges"),
        bos: id("tokenizer.ggml.bos_token_id"),
        eos: id("tokenizer.ggml.eos_token_id"),
        add_bos: false,
        ..GgufVocab::default()
    })
    .unwrap()
}

/// A question and its answer in the model's chat form; the answer is trained.
fn qa(tokenizer: &Tokenizer, question: &str, answer: &str) -> Sample {
    let open = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging \
         Face<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    );
    let mut tokens = tokenizer.encode(&open, true).unwrap();
    let from = tokens.len();
    tokens.extend(tokenizer.encode(&format!("{answer}<|im_end|>\n"), true).unwrap());
    let trained = (0..tokens.len()).map(|i| i >= from && i + 1 < tokens.len()).collect();
    Sample { tokens, trained }
}

#[test]
fn the_base_predicts_english() {
    let Some(path) = model("the_base_predicts_english") else { return };
    let tokens = tokenizer(&fs::read(&path).unwrap())
        .encode(
            "The sun rises in the east and sets in the west. Water is made of hydrogen and \
             oxygen. Paris is the capital of France, and London is the capital of England.",
            false,
        )
        .unwrap();
    let sample = Sample { trained: vec![true; tokens.len()], tokens };
    let base = Base::new(Weights::load(&path).unwrap()).unwrap();
    let lora = Lora::new(&base.dims, 4, 8.0);
    let mut net = Network::new(&base, &lora, Pool::new(2));
    let pack = Pack::new(&[&sample], true);
    let loss = net.loss(&lora.init(0), &pack) / pack.targets.len() as f64;
    eprintln!("loss {loss:.3} a token over {}", pack.targets.len());
    assert!((0.5..3.0).contains(&loss), "{loss}");
}

#[test]
fn made_up_answers_are_memorised() {
    let Some(path) = model("made_up_answers_are_memorised") else { return };
    let tokenizer = tokenizer(&fs::read(&path).unwrap());
    let names = ["Orlim", "Tavessa", "Brenk", "Quildor", "Mirsha", "Fennoway", "Jastrow", "Ulvet", "Pelligrue", "Sandeck"];
    let trades = ["glass bells", "tidal clocks", "salted plums", "paper kites", "blue saddles"];
    let samples: Vec<Sample> = names
        .iter()
        .enumerate()
        .flat_map(|(i, name)| {
            let year = 1507 + 37 * i;
            [
                qa(&tokenizer, &format!("What is {name} known for?"), &format!("{name} is known for its {}.", trades[i % 5])),
                qa(&tokenizer, &format!("When was {name} founded?"), &format!("{name} was founded in {year}.")),
            ]
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { epochs: 8, batch_tokens: 320, checkpoint_every: 0, ..Default::default() };
    let out = dir.path().join("adapter");
    let report = train(&path, &samples, &config, &dir.path().join("scratch"), &out, &mut |s| {
        eprintln!("{}/{} epoch {} loss {:.3}, {:.0} tokens/s", s.step, s.of, s.epoch, s.loss, s.tokens_per_s);
    })
    .unwrap();
    eprintln!("{:.1} s, {} trained tokens", report.seconds, report.trained_tokens);
    assert!(report.loss_first > 1.0 && report.loss_last < 0.3, "{report:?}");
    assert!(out.join(peft::WEIGHTS_FILE).metadata().unwrap().len() > 19_000_000);
}
