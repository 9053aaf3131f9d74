//! Released weights of other architectures than llama: Gemma 3 beside llama.cpp,
//! MiniLM beside transformers, tokenizers included. Skipped by name where the
//! files or the peers are absent.

use ashlar_model::{BLOCK, Encoder, Item, KvCache, Model, Want, Workspace, formats::Gguf};
use ashlar_text::Tokenizer;
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The path in environment variable `name`; where it is missing the peer is
/// skipped by name, or the test fails if peers are required.
fn peer(name: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map(PathBuf::from).filter(|p| p.exists());
    if path.is_none() {
        assert!(
            std::env::var("ASHLAR_REQUIRE_PEERS").as_deref() != Ok("1"),
            "{what} is required: set {name}"
        );
        eprintln!("skipped: {what} ({name} is not set; `cargo xtask test` sets it)");
    }
    path
}

/// Runs a peer script with `input` on stdin; its last line of stdout as JSON.
fn script(python: &Path, name: &str, input: &Value) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/peers").join(name);
    let mut child = Command::new(python)
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python starts");
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input.to_string().as_bytes()).expect("stdin");
    drop(stdin);
    let out = child.wait_with_output().expect("ends");
    assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    serde_json::from_str(text.lines().last().unwrap_or_default()).expect("JSON")
}

fn numbers(value: &Value) -> Vec<u32> {
    let list = value.as_array().expect("a list").iter();
    list.map(|v| v.as_u64().expect("a number") as u32).collect()
}

fn best(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}

/// Logits of every token.
fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    let blocks: Vec<u32> = (0..tokens.len().div_ceil(BLOCK) as u32).collect();
    let mut cache = KvCache::new(model.config(), blocks.len());
    let mut ws = Workspace::default();
    let item = Item { tokens, start: 0, blocks: &blocks, want: Want::All };
    let logits = model.forward(&[item], &mut cache, &mut ws).unwrap();
    (0..logits.rows()).map(|i| logits.row(i).to_vec()).collect()
}

#[test]
fn gemma_says_what_llama_cpp_says() {
    let Some(path) = peer("ASHLAR_TEST_GEMMA", "Gemma 3 270M") else { return };
    let bytes = std::fs::read(&path).unwrap();
    let since = std::time::Instant::now();
    let tokenizer = ashlar_engine::tokenizer(&Gguf::parse(&bytes).unwrap()).unwrap();
    drop(bytes);
    eprintln!("tokenizer in {:.1} s", since.elapsed().as_secs_f64());
    let model = Model::load(&path).unwrap();
    eprintln!("model in {:.1} s", since.elapsed().as_secs_f64());
    let mut tokens = tokenizer.encode("<bos>The capital of France is Paris, the capital of Italy is", true).unwrap();
    let prompt = tokens.len();
    for _ in 0..4 {
        tokens.push(best(logits(&model, &tokens).last().unwrap()));
    }
    let said = tokenizer.decode(&tokens[prompt..], true);
    assert!(said.contains("Rome"), "{said}");

    let Some(python) = peer("ASHLAR_PEERS_PYTHON", "llama.cpp") else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("logits.bin");
    let long = "The river rises in the hills, turns north by the old mill and reaches the sea. ".repeat(6);
    let prompts = [
        "<bos>The capital of France is",
        "<bos>Once upon a time, there was a little girl   named\n\n\nLily \u{1f642} who dr\u{f6}ve 12345 km.\t<tag> and",
        "<bos>fn main() {\n    println!(\"\u{65e5}\u{672c} {}\", x);\n}\n\u{1f9ff}\u{200d}\u{fe0f} \u{0} end",
        &format!("<bos>{long}The"),
    ];
    let input = json!({"model": path, "prompts": prompts, "tokens": 1, "logits": file});
    let report = script(&python, "llama.py", &input);
    let theirs = std::fs::read(&file).unwrap();
    let theirs: Vec<f32> = theirs.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut rows = theirs.chunks_exact(model.config().vocab);
    let (mut agree, mut all, mut worst) = (0, 0, 0f64);
    for (prompt, answer) in prompts.iter().zip(report["prompts"].as_array().unwrap()) {
        let tokens = tokenizer.encode(prompt, true).unwrap();
        assert_eq!(tokens, numbers(&answer["tokens"]), "{prompt:?}");
        assert_eq!(tokenizer.decode(&tokens, true), prompt[5..], "there and back");
        for ours in logits(&model, &tokens) {
            let theirs = rows.next().unwrap();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            worst = worst.max(1.0 - dot(&ours, theirs) / (dot(&ours, &ours) * dot(theirs, theirs)).sqrt());
            agree += usize::from(best(&ours) == best(theirs));
            all += 1;
        }
    }
    eprintln!("most likely token the same in {agree} of {all} rows; cosine distance at most {worst:.1e}");
    // Both round activations to 8 bits, llama.cpp in longer blocks.
    assert!(agree * 100 >= all * 95 && worst < 2e-2, "{agree} of {all}, {worst}");
}

#[test]
fn minilm_embeds_as_transformers_does() {
    let Some(folder) = peer("ASHLAR_TEST_MINILM", "MiniLM") else { return };
    let encoder = Encoder::load(&folder).unwrap();
    let tokenizer = Tokenizer::from_json(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let texts = [
        "How do I reset my password?",
        "I forgot my login credentials and cannot sign in.",
        "The recipe needs two eggs and a cup of flour.",
        "[CLS] Na\u{ef}ve caf\u{e9}-owners don't \u{65e5}\u{672c}\u{8a9e} antidisestablishmentarianism [SEP]",
    ];
    let tokens: Vec<Vec<u32>> = texts.iter().map(|t| tokenizer.encode_framed(t).unwrap()).collect();
    let views: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let vectors = encoder.embed(&views).unwrap();
    let close = |a: usize, b: usize| vectors[a].iter().zip(&vectors[b]).map(|(a, b)| a * b).sum::<f32>();
    eprintln!("similar {:.3}, unrelated {:.3}", close(0, 1), close(0, 2));
    assert!(close(0, 1) > 0.4 && close(0, 1) > close(0, 2) + 0.2);

    let Some(python) = peer("ASHLAR_TRANSFORMERS_PYTHON", "transformers") else { return };
    let report = script(&python, "embed.py", &json!({"model": folder, "texts": &texts[..3]}));
    for (i, answer) in report["texts"].as_array().unwrap().iter().enumerate() {
        assert_eq!(tokens[i], numbers(&answer["tokens"]), "{}", texts[i]);
        let theirs = answer["vector"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap());
        let apart = vectors[i].iter().zip(theirs).fold(0f64, |a, (o, t)| a.max((f64::from(*o) - t).abs()));
        eprintln!("largest difference {apart:.1e}");
        assert!(apart < 1e-5, "{}", texts[i]);
    }
    // Text cannot frame itself.
    let inner = &tokens[3][1..tokens[3].len() - 1];
    assert!(inner.iter().all(|&t| !tokenizer.is_control(t)), "{inner:?}");
}
