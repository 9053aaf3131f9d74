//! The scanner on its own, for `benches/peers/presidio.py` and for a profiler.
//!
//! `cargo run --release -p ashlar-text --example detect_bench -- …`
//! - `corpus SEED DOCUMENTS SENTENCES dense|sparse`: planted texts, a JSON line each;
//! - `scan FILE SECONDS`: scans the texts of such a file on one core for that
//!   long, then prints the speed and what it found, a JSON line each.

#![allow(clippy::print_stdout)]

mod planted;

use ashlar_text::detect::{Finding, Kinds, Scanner};
use serde_json::{Value, json};
use std::{
    hint::black_box,
    io::BufRead as _,
    time::{Duration, Instant},
};

type Any = Box<dyn std::error::Error>;

fn main() -> Result<(), Any> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["corpus", seed, n, sentences, how] => {
            let dense = *how == "dense";
            for d in planted::documents(seed.parse()?, n.parse()?, sentences.parse()?, dense) {
                let plants = d.plants.iter().map(|(kind, s, e)| span(&d.text, kind.as_str(), *s, *e));
                println!("{}", json!({"text": d.text, "spans": plants.collect::<Vec<_>>()}));
            }
            Ok(())
        }
        ["scan", file, seconds] => scan(file, seconds.parse()?),
        _ => Err("usage: detect_bench corpus SEED DOCUMENTS SENTENCES dense|sparse | scan FILE SECONDS".into()),
    }
}

/// A span in characters, as Python counts.
fn span(text: &str, kind: &str, start: usize, end: usize) -> Value {
    let chars = |to: usize| text[..to].chars().count();
    json!([kind, chars(start), chars(end)])
}

fn scan(file: &str, seconds: f64) -> Result<(), Any> {
    let mut texts = Vec::new();
    for line in std::io::BufReader::new(std::fs::File::open(file)?).lines() {
        let document: Value = serde_json::from_str(&line?)?;
        texts.push(document["text"].as_str().ok_or("a line without text")?.to_owned());
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    let mut report = serde_json::Map::new();
    for (name, kinds) in [("all", Kinds::ALL), ("core", Kinds::CORE)] {
        let scanner = Scanner::new(kinds);
        let (begun, mut passes) = (Instant::now(), 0u32);
        while begun.elapsed() < Duration::from_secs_f64(seconds) || passes == 0 {
            for t in &texts {
                black_box(scanner.find(black_box(t)));
            }
            passes += 1;
        }
        let speed = bytes as f64 * f64::from(passes) / begun.elapsed().as_secs_f64();
        report.insert(format!("{name}_mb_per_s"), json!(speed / 1e6));
    }
    println!("{}", Value::Object(report));
    let scanner = Scanner::new(Kinds::ALL);
    for t in &texts {
        let spans = scanner.find(t);
        let spans: Vec<Value> = spans.iter().map(|f: &Finding| span(t, f.kind.as_str(), f.start, f.end)).collect();
        println!("{}", json!(spans));
    }
    Ok(())
}
