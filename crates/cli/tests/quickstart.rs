//! The main job on the real recipe, once, and what others make of its result:
//! llama.cpp, the official OpenAI client, a browser.

mod common;

use ashlar_engine::{EngineConfig, LocalBackend};
use ashlar_model::{BLOCK, Item, KvCache, Model, Want, Workspace};
use common::{ashlar, json, peer, root, script, served};
use serde_json::{Value, json as value};
use std::{path::PathBuf, process::Command, sync::OnceLock};

/// The home of one whole run of the quickstart, shared by the tests here. It is
/// new unless `ASHLAR_TEST_HOME` names one to go on with.
fn quickstart() -> Option<&'static (PathBuf, Value)> {
    static RUN: OnceLock<Option<(PathBuf, Value)>> = OnceLock::new();
    RUN.get_or_init(|| {
        peer("ASHLAR_TEST_MODEL", "the test model")?;
        let home = std::env::var_os("ASHLAR_TEST_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("quickstart-home");
            let _ = std::fs::remove_dir_all(&home);
            home
        });
        let result = json(&mut ashlar(&home, &["up", "--no-serve", "--json"]));
        Some((home, result))
    })
    .as_ref()
}

#[test]
fn the_tuned_model_knows_the_handbook() {
    let Some((home, result)) = quickstart() else { return };
    let number = |v: &Value| v.as_f64().unwrap_or_else(|| panic!("{v} in {result}"));
    assert!(number(&result["eval"]["base"]) <= 0.05, "{}", result["eval"]);
    assert!(number(&result["eval"]["tuned"]) >= 0.8, "{}", result["eval"]);
    assert!(number(&result["eval"]["p_value"]) < 1e-6, "{}", result["eval"]);
    // Everything planted is found (recipes/quickstart/PLANTED.md).
    let dropped = &result["documents"]["dropped"];
    for reason in ["opt_out", "licence", "language", "length", "repetition", "exact_duplicate", "near_duplicate"] {
        assert!(dropped[reason].as_u64().unwrap_or(0) > 0, "{reason}: {dropped}");
    }
    assert!(!result["sample"]["answer"].as_str().expect("text").is_empty());

    let again = json(&mut ashlar(home, &["up", "--no-serve", "--json"]));
    assert_eq!(again["release"], result["release"]);
    assert_eq!(again["model"], result["model"]);
    assert!(again["stages"].as_array().expect("list").iter().all(|s| s["reused"] == true), "{}", again["stages"]);
    assert_eq!(json(&mut ashlar(home, &["verify", "--ledger", "--json"]))["ok"], true);

    let id = result["sample"]["response_id"].as_str().expect("id");
    let trace = ashlar(home, &["trace", id]).output().expect("runs");
    let text = String::from_utf8_lossy(&trace.stdout);
    assert!(text.contains("exposed to") && !text.contains("caused by"), "{text}");
    let dot = ashlar(home, &["trace", id, "--dot"]).output().expect("runs");
    assert!(String::from_utf8_lossy(&dot.stdout).starts_with("digraph"));
}

fn released(home: &std::path::Path, result: &Value) -> PathBuf {
    let digest = result["model"].as_str().expect("digest").trim_start_matches("sha256:");
    home.join("objects/sha256").join(&digest[..2]).join(digest)
}

#[test]
fn llama_cpp_says_the_same() {
    let Some((home, result)) = quickstart() else { return };
    let Some(python) = peer("ASHLAR_PEERS_PYTHON", "llama.cpp") else { return };
    let Some(base) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let chat = |q: &str| {
        format!("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n")
    };
    let held_out = result["sample"]["question"].as_str().expect("text");
    let prompts = [chat(held_out), chat("What is the capital of France?"), "The three primary colours are".to_owned()];
    // The base's free text turns on near-ties, in which int8 activations differ from
    // theirs; its logits are compared. The released model must say the same words.
    for (model, same_words) in [(base, false), (released(home, result), true)] {
        let dir = tempfile::tempdir().expect("temp dir");
        let rows = dir.path().join("logits.f32");
        let job = value!({"model": model, "prompts": prompts, "tokens": 32, "logits": rows});
        let theirs = script(&python, "llama.py", &[], &job.to_string());

        let bytes = std::fs::read(&model).expect("model");
        let (tokenizer, _) = ashlar_engine::vocab(&ashlar_formats::Gguf::parse(&bytes).expect("GGUF"), None).expect("vocabulary");
        let ours = Model::load(&model).expect("model");
        let logits = std::fs::read(&rows).expect("logits");
        let mut theirs_rows = logits.chunks_exact(4 * ours.config().vocab);
        let (mut same_top, mut positions, mut worst, mut kl) = (0, 0, 0.0f32, 0.0f64);
        for (prompt, peer) in prompts.iter().zip(theirs["prompts"].as_array().expect("list")) {
            let ids = |v: &Value| -> Vec<u32> {
                v.as_array().expect("list").iter().map(|n| n.as_u64().expect("id") as u32).collect()
            };
            let tokens = tokenizer.encode(prompt, true).expect("tokens");
            assert_eq!(tokens, ids(&peer["tokens"]), "tokenizers differ on {prompt:?}");
            let blocks: Vec<u32> = (0..((tokens.len() + 64) / BLOCK + 1) as u32).collect();
            let mut kv = KvCache::new(ours.config(), blocks.len());
            let mut ws = Workspace::default();
            let item = Item { tokens: &tokens, start: 0, blocks: &blocks, want: Want::All };
            let out = ours.forward(&[item], &mut kv, &mut ws).expect("forward");
            for i in 0..tokens.len() {
                let row = theirs_rows.next().expect("a row");
                let row: Vec<f32> = row.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                let mine = out.row(i);
                same_top += usize::from(top(mine) == top(&row));
                positions += 1;
                // Logits are defined up to a constant: compare what they say.
                kl += divergence(&row, mine);
                worst = worst.max(row.iter().zip(mine).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max));
            }
            let mut next = top(out.row(tokens.len() - 1));
            let mut greedy = vec![next];
            while next != tokenizer.eos().expect("eos") && greedy.len() < 32 {
                let start = tokens.len() + greedy.len() - 1;
                let item = Item { tokens: &[next], start, blocks: &blocks, want: Want::Last };
                next = top(ours.forward(&[item], &mut kv, &mut ws).expect("forward").row(0));
                greedy.push(next);
            }
            let say = |t: &[u32]| tokenizer.decode(t, false);
            let (mine, theirs) = (say(&greedy), say(&ids(&peer["greedy"])));
            assert!(!same_words || mine == theirs, "greedy text differs on {prompt:?}: {mine:?} and {theirs:?}");
        }
        let kl = kl / f64::from(positions);
        println!(
            "against llama.cpp {}: {positions} positions, same top {:.1} %, mean KL {kl:.6} nats, largest logit difference {worst:.3}",
            theirs["version"], 100.0 * same_top as f64 / f64::from(positions)
        );
        assert!(kl < 0.01, "mean KL {kl}");
    }
}

fn top(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b });
    best.0 as u32
}

fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let norm = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + x.iter().map(|v| f64::from(v - max).exp()).sum::<f64>().ln()
    };
    let (np, nq) = (norm(p), norm(q));
    p.iter().zip(q).map(|(&a, &b)| (f64::from(a) - np).exp() * ((f64::from(a) - np) - (f64::from(b) - nq))).sum()
}

#[test]
fn the_official_client_and_a_browser_are_served() {
    let Some((home, result)) = quickstart() else { return };
    let (_server, url, model) = served(home, "prod");
    if let Some(python) = peer("ASHLAR_PEERS_PYTHON", "the OpenAI client") {
        let report = script(&python, "openai_client.py", &[&url, &model], "");
        println!("{report}");
    }
    if peer("ASHLAR_PEERS_BROWSER", "Chromium").is_some() {
        let id = result["sample"]["response_id"].as_str().expect("id");
        let shot = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("console.png");
        let out = Command::new("python3")
            .arg(root().join("xtask/peers/console.py"))
            .args([format!("{url}/?response={id}"), shot.display().to_string()])
            .output()
            .expect("runs");
        assert!(out.status.success(), "{}", common::said(&out));
    }
}

#[test]
fn batching_does_not_change_an_answer() {
    let Some(base) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let backend = LocalBackend::open("base", &base, None, None, EngineConfig::default()).expect("opens");
    let ask = |q: &str| {
        let mut request = ashlar_api::ChatRequest::new("base", vec![ashlar_api::ChatMessage::user(q)]);
        (request.temperature, request.max_tokens) = (Some(0.0), Some(16));
        request
    };
    let questions = ["What is the capital of France?", "Name a colour.", "What is two plus two?"];
    let text = async |q: &str| {
        use ashlar_api::{Backend, Event};
        use futures::StreamExt;
        let mut stream = backend.chat(ask(q)).await.expect("admitted");
        let mut text = String::new();
        while let Some(event) = stream.next().await {
            if let Event::Token { text: piece, .. } = event.expect("event") {
                text.push_str(&piece);
            }
        }
        text
    };
    tokio::runtime::Runtime::new().expect("runtime").block_on(async {
        let mut alone = Vec::new();
        for q in questions {
            alone.push(text(q).await);
        }
        let together = futures::future::join_all(questions.map(&text)).await;
        assert_eq!(alone, together);
    });
}
