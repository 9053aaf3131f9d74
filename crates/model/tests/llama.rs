//! The real model: sensible text, one result on every schedule, and its speed.

mod common;

use common::file;
use ashlar_kernels::Pool;
use ashlar_model::{BLOCK, Item, KvCache, Model, ModelError, Want, Workspace, formats::{Gguf, Value}};
use std::time::Instant;

fn best(row: &[f32]) -> u32 {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32
}

/// Logits of every token, the prompt cut at `cuts`.
fn run(model: &Model, tokens: &[u32], cuts: &[usize], blocks: &[u32]) -> Vec<Vec<u32>> {
    let mut cache = KvCache::new(model.config(), 16);
    let mut ws = Workspace::default();
    let mut out = Vec::new();
    let ends = cuts.iter().copied().chain([tokens.len()]);
    let mut start = 0;
    for end in ends {
        let item = Item { tokens: &tokens[start..end], start, blocks, want: Want::All };
        let logits = model.forward(&[item], &mut cache, &mut ws).unwrap();
        out.extend((0..logits.rows()).map(|i| bits(logits.row(i))));
        start = end;
    }
    out
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_capital_of_france() {
    let Some(path) = file() else { return };
    let bytes = std::fs::read(&path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let list = gguf.meta("tokenizer.ggml.tokens").and_then(Value::as_array).unwrap();
    let words = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"];
    let id = |w: &str| list.iter().position(|t| t.as_str() == Some(w)).unwrap() as u32;
    let mut tokens: Vec<u32> = words.map(id).to_vec();
    let model = Model::from_gguf(&gguf, Pool::new(0)).unwrap();
    let (mut cache, mut ws) = (KvCache::new(model.config(), 2), Workspace::default());
    let (mut start, mut said) = (0, String::new());
    for _ in 0..12 {
        let item = Item { tokens: &tokens[start..], start, blocks: &[1, 0], want: Want::Last };
        let next = best(model.forward(&[item], &mut cache, &mut ws).unwrap().row(0));
        start = tokens.len();
        tokens.push(next);
        said += list[next as usize].as_str().unwrap();
    }
    eprintln!("{said}");
    assert!(said.contains("ĠParis"), "{said}");
}

#[test]
fn logits_do_not_depend_on_the_schedule() {
    let Some(path) = file() else { return };
    let one = Model::load_with(&path, Pool::new(1)).unwrap();
    let three = Model::load_with(&path, Pool::new(3)).unwrap();
    let tokens: Vec<u32> = (0..70).map(|i| i * 631 % 49_152).collect();
    let want = run(&one, &tokens, &[], &[0, 1, 2]);
    let steps: Vec<usize> = (1..70).collect();
    assert!(run(&one, &tokens, &steps, &[5, 3, 1]) == want, "token by token");
    assert!(run(&three, &tokens, &[3, 33, 64], &[9, 2, 4]) == want, "cut, three threads");

    // Two prompts and a decode of the first in one batch.
    let (mut cache, mut ws) = (KvCache::new(three.config(), 16), Workspace::default());
    let other: Vec<u32> = tokens.iter().rev().copied().collect();
    let items = |from: usize, to: usize, want| [
        Item { tokens: &other[..40 - from / 2], start: 0, blocks: &[7, 8], want: Want::Last },
        Item { tokens: &tokens[from..to], start: from, blocks: &[12, 10, 11], want },
    ];
    three.forward(&items(0, 66, Want::None), &mut cache, &mut ws).unwrap();
    let logits = three.forward(&items(66, 67, Want::Last), &mut cache, &mut ws).unwrap();
    assert_eq!(logits.rows(), 2);
    assert!(bits(logits.row(1)) == want[66], "decode beside a prompt");
}

#[test]
fn refuses_what_it_cannot_run() {
    let Some(path) = file() else { return };
    let model = Model::load(&path).unwrap();
    let (mut cache, mut ws) = (KvCache::new(model.config(), 4), Workspace::default());
    let mut go = |items: &[Item]| model.forward(items, &mut cache, &mut ws).map(|l| l.rows());
    let item = Item { tokens: &[1, 2], start: 0, blocks: &[0], want: Want::All };
    assert_eq!(go(&[item]).unwrap(), 2);
    assert_eq!(go(&[]).unwrap(), 0);
    let token = go(&[Item { tokens: &[49_152], ..item }]);
    assert!(matches!(token, Err(ModelError::Token { token: 49_152, vocab: 49_152, .. })));
    assert!(matches!(go(&[Item { start: 31, ..item }]), Err(ModelError::Pages { need: 2, got: 1, .. })));
    assert!(matches!(go(&[Item { blocks: &[4], ..item }]), Err(ModelError::Page { block: 4, .. })));
    assert!(matches!(go(&[item, item]), Err(ModelError::Shared { block: 0 })));
    let long = go(&[Item { start: model.config().context - 1, ..item }]);
    assert!(matches!(long, Err(ModelError::Context { .. })));
}

/// `cargo test --release -p ashlar-model bench_decode -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn bench_decode() {
    let Some(path) = file() else { return };
    let since = Instant::now();
    let model = Model::load(&path).unwrap();
    eprintln!("loaded in {:.2} s, {:.1} MB packed, {} threads, {:?}", since.elapsed().as_secs_f64(),
        model.bytes() as f64 / 1e6, model.pool().threads(), ashlar_kernels::Isa::active());
    let mut ws = Workspace::default();
    let tokens: Vec<u32> = (0..2048).map(|i| i * 631 % 49_152).collect();
    let blocks: Vec<u32> = (0..(2048 / BLOCK) as u32).collect();
    let mut cache = KvCache::new(model.config(), 4 * blocks.len());
    for len in [128, 512, 2048] {
        let mut fastest = f64::MAX;
        for _ in 0..3 {
            let since = Instant::now();
            for start in (0..len).step_by(512) {
                let end = len.min(start + 512);
                let item = Item { tokens: &tokens[start..end], start, blocks: &blocks, want: Want::Last };
                model.forward(&[item], &mut cache, &mut ws).unwrap();
            }
            fastest = fastest.min(since.elapsed().as_secs_f64());
        }
        eprintln!("prefill {len}: {:.0} tokens/s", len as f64 / fastest);
    }
    for batch in [1, 4, 8] {
        let tables: Vec<Vec<u32>> = (0..batch).map(|b| (0..8).map(|i| b * 8 + i).collect()).collect();
        let mut fastest = f64::MAX;
        for round in 0..3 {
            let since = Instant::now();
            for t in 0..64 {
                let at = 64 * (round % 3) + t;
                let items: Vec<Item> = tables.iter()
                    .map(|blocks| Item { tokens: &tokens[at..=at], start: at, blocks, want: Want::Last })
                    .collect();
                model.forward(&items, &mut cache, &mut ws).unwrap();
            }
            fastest = fastest.min(since.elapsed().as_secs_f64());
        }
        eprintln!("decode x{batch}: {:.0} tokens/s", 64.0 * f64::from(batch) / fastest);
    }
}
