//! Every architecture against Hugging Face's transformers, on tiny random
//! checkpoints that `xtask/peers/architectures.py` makes, as safetensors and as
//! GGUF; quantized checkpoints that `xtask/peers/quantized.py` makes; and each one's
//! logits on every schedule, bit by bit.

use ashlar_kernels::Pool;
use ashlar_model::{Encoder, Item, KvCache, KvType, Model, Want, Workspace};
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// The path in environment variable `name`; where it is missing the peer is
/// skipped by name, or the test fails if peers are required.
fn peer(name: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(name).map(PathBuf::from).filter(|p| p.exists());
    if path.is_none() {
        assert!(std::env::var("ASHLAR_REQUIRE_PEERS").as_deref() != Ok("1"), "{what} is required: set {name}");
        eprintln!("skipped: {what} ({name} is not set; `cargo xtask test` sets it)");
    }
    path
}

fn floats(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap();
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Logits of every token, the sequence cut at `cuts`.
fn run(model: &Model, tokens: &[u32], cuts: &[usize], blocks: &[u32]) -> Vec<f32> {
    let mut cache = KvCache::of(model.config(), 8, KvType::F32);
    let mut ws = Workspace::default();
    let mut out = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([tokens.len()]) {
        let item = Item { tokens: &tokens[start..end], start, blocks, want: Want::All };
        let logits = model.forward(&[item], &mut cache, &mut ws).unwrap();
        (0..logits.rows()).for_each(|i| out.extend(logits.row(i)));
        start = end;
    }
    out
}

/// The largest difference, against the largest value expected.
fn apart(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let top = want.iter().fold(0f32, |a, v| a.max(v.abs()));
    got.iter().zip(want).fold(0f32, |a, (g, w)| a.max((g - w).abs())) / top
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

fn decoder(path: &Path, tokens: &[u32], want: &[f32]) -> f32 {
    let name = path.file_name().unwrap().display();
    let model = Model::load_with(path, Pool::new(1)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let whole = run(&model, tokens, &[], &[0, 1, 2]);
    let steps: Vec<usize> = (1..tokens.len()).collect();
    assert!(same(&run(&model, tokens, &steps, &[5, 3, 1]), &whole), "{name}: token by token");
    let threads = Model::load_with(path, Pool::new(3)).unwrap();
    assert!(same(&run(&threads, tokens, &[3, 33, 64], &[7, 2, 4]), &whole), "{name}: cut, three threads");

    // Beside another sequence, the last token alone.
    let (mut cache, mut ws) = (KvCache::of(model.config(), 8, KvType::F32), Workspace::default());
    let other: Vec<u32> = tokens.iter().rev().copied().collect();
    let last = tokens.len() - 1;
    let prompt = Item { tokens: &tokens[..last], start: 0, blocks: &[0, 1, 2], want: Want::None };
    model.forward(&[prompt], &mut cache, &mut ws).unwrap();
    let items = [
        Item { tokens: &other, start: 0, blocks: &[4, 6, 5], want: Want::Last },
        Item { tokens: &tokens[last..], start: last, blocks: &[0, 1, 2], want: Want::Last },
    ];
    let logits = model.forward(&items, &mut cache, &mut ws).unwrap();
    let vocab = model.config().vocab;
    assert!(same(logits.row(1), &whole[last * vocab..]), "{name}: beside another");
    apart(&whole, want)
}

fn encoder(path: &Path, tokens: &[u32], want: &[f32]) -> f32 {
    let encoder = Encoder::load_with(path, Pool::new(2)).unwrap();
    let alone = encoder.embed(&[tokens]).unwrap().remove(0);
    let both = encoder.embed(&[&tokens[..9], tokens]).unwrap();
    assert!(same(&both[1], &alone), "beside another");
    assert!(Model::load(path).is_err(), "an encoder is no decoder");
    apart(&alone, want)
}

/// Has `script` write checkpoints into `dir`; its report. `None` where transformers
/// is not at hand.
fn written(script: &str, dir: &Path) -> Option<serde_json::Value> {
    let python = peer("ASHLAR_TRANSFORMERS_PYTHON", "transformers, the reference for architectures")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xtask/peers").join(script);
    let out = Command::new(python).arg(script).arg(dir).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8_lossy(&out.stdout);
    Some(serde_json::from_str(text.lines().last().unwrap()).unwrap())
}

fn tokens(folder: &Path) -> Vec<u32> {
    serde_json::from_slice(&std::fs::read(folder.join("tokens.json")).unwrap()).unwrap()
}

fn names(list: &serde_json::Value) -> impl Iterator<Item = &str> {
    list.as_array().unwrap().iter().map(|name| name.as_str().unwrap())
}

#[test]
fn logits_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let Some(report) = written("architectures.py", dir.path()) else { return };
    let mut wrong = Vec::new();
    for name in names(&report["names"]) {
        let folder = dir.path().join(name);
        let tokens = tokens(&folder);
        let check: fn(&Path, &[u32], &[f32]) -> f32 = if name == "bert" { encoder } else { decoder };
        let want = floats(&folder.join(if name == "bert" { "vector.bin" } else { "logits.bin" }));
        let gguf = dir.path().join(format!("{name}.gguf"));
        for path in [folder].iter().chain(gguf.exists().then_some(&gguf)) {
            let apart = check(path, &tokens, &want);
            eprintln!("{:24} largest difference {apart:.1e} of the largest logit", path.file_name().unwrap().display());
            if apart.is_nan() || apart > 2e-5 {
                wrong.push(name);
            }
        }
    }
    assert!(wrong.is_empty(), "apart from transformers {}: {wrong:?}", report["version"]);
}

#[test]
fn quantized_checkpoints_are_what_their_tools_say() {
    let dir = tempfile::tempdir().unwrap();
    let Some(report) = written("quantized.py", dir.path()) else { return };
    let mut wrong = Vec::new();
    for name in names(&report["names"]) {
        let folder = dir.path().join(name);
        let apart = decoder(&folder, &tokens(&folder), &floats(&folder.join("logits.bin")));
        eprintln!("{name:24} largest difference {apart:.1e} of the largest logit");
        // Against integer codes activations are rounded to int8, a step being some
        // 1/50 of a typical one: of thousands of logits the farthest moves by as much
        // as 1/20. That the weights are right bit for bit, `quantized` tests.
        let room = if name.contains("fp8") { 2e-5 } else { 0.1 };
        if apart.is_nan() || apart > room {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "apart from transformers {}: {wrong:?}", report["version"]);
}
