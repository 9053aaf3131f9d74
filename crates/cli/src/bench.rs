//! `ashlar bench`: the speed of the engine here, or of any server.
//!
//! Arguments and printing only. The engine is timed in `engine::bench`, a server
//! in `bench/load.rs`, so that neither can tell a good figure from a bad one.
//! One JSON object a line with `--json`, in llama-bench's key names where they
//! mean the same; else a table.

mod load;

use crate::out;
use anyhow::{Result, bail, ensure};
use ashlar_engine::{
    EngineConfig,
    bench::{BenchConfig, BenchResult, FileSummary, bench, read_bandwidth},
};
use ashlar_kernels::{Isa, Pool};
use ashlar_model::Model;
use clap::{Args, Subcommand};
use load::{Arrival, Load, Tokens};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

/// Memory read to measure bandwidth: well above common last-level caches.
const BANDWIDTH_BYTES: usize = 512 << 20;

#[derive(Subcommand)]
pub(crate) enum What {
    /// Time a model's forward pass: prompts, generation, batches.
    Engine(Engine),
    /// Load an OpenAI-compatible server with streaming requests and report its latencies.
    Serve(Serve),
}

#[derive(Args)]
pub(crate) struct Engine {
    /// The GGUF file, or a folder in Hugging Face's layout.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Prompt lengths; 0 for no prompt test.
    #[arg(long, default_value = "512", value_delimiter = ',', value_name = "N,…")]
    prompt: Vec<usize>,
    /// Tokens to generate; 0 for no generation test.
    #[arg(long, default_value = "128", value_delimiter = ',', value_name = "N,…")]
    generate: Vec<usize>,
    /// Sequences at once; above 1 each has a prompt of --prompt tokens before it generates.
    #[arg(long, default_value = "1", value_delimiter = ',', value_name = "N,…")]
    batch: Vec<usize>,
    /// Threads; 0 for every processor this process may use.
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// Prompt tokens computed in one step.
    #[arg(long, default_value_t = EngineConfig::default().max_prefill, value_name = "N")]
    chunk: usize,
    /// Samples a test, after a warm-up.
    #[arg(long, default_value_t = 5, value_name = "N")]
    repeat: usize,
    /// Leave out the machine's read bandwidth, for which 512 MiB are held at the end.
    #[arg(long)]
    no_bandwidth: bool,
}

#[derive(Args)]
pub(crate) struct Serve {
    /// The server, up to but without /v1.
    #[arg(long, value_name = "URL")]
    url: String,
    /// The model's name there.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Requests a second, arriving at random (Poisson) whether or not earlier ones are answered.
    #[arg(long, value_name = "R", conflicts_with = "clients")]
    rate: Option<f64>,
    /// Clients that each send their next request when the last one is answered [default: 1].
    #[arg(long, value_name = "N")]
    clients: Option<usize>,
    /// Requests in all.
    #[arg(long, default_value_t = 64, value_name = "N")]
    requests: usize,
    /// Prompt tokens of a request, its own part: `128` or `uniform:64..512`.
    #[arg(long, default_value = "128", value_name = "DIST")]
    prompt_tokens: Tokens,
    /// Most tokens of an answer: `64` or `uniform:16..256`.
    #[arg(long, default_value = "64", value_name = "DIST")]
    output_tokens: Tokens,
    /// Tokens that every prompt begins with, before its own part.
    #[arg(long, default_value_t = 0, value_name = "N")]
    shared_prefix: u32,
    /// Of arrivals, lengths and words.
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Token ids never generated (say the end of text), so that answers reach their length.
    #[arg(long, value_delimiter = ',', value_name = "ID,…")]
    ban_tokens: Vec<u32>,
    /// Seconds one request may take.
    #[arg(long, default_value_t = 120, value_name = "S")]
    timeout: u64,
    /// Seconds after which no further request is sent.
    #[arg(long, default_value_t = 600, value_name = "S")]
    time_limit: u64,
    /// Environment variable with the API key to send.
    #[arg(long, value_name = "VAR")]
    key_env: Option<String>,
    /// Allow a server that is not on this machine.
    #[arg(long)]
    allow_remote: bool,
}

/// `ashlar bench …`.
pub(crate) async fn run(what: What, as_json: bool) -> Result<()> {
    // Both measure with threads of their own and would hold up an async worker.
    tokio::task::spawn_blocking(move || match what {
        What::Engine(args) => engine(&args, as_json),
        What::Serve(args) => serve(args, as_json),
    })
    .await?
}

fn engine(args: &Engine, as_json: bool) -> Result<()> {
    let summary = FileSummary::new(&ashlar_model::tensor_sizes(&args.model)?);
    let start = Instant::now();
    let model = Arc::new(Model::load_with(&args.model, Pool::new(args.threads))?);
    let start_ms = start.elapsed().as_secs_f64() * 1e3;
    let config = BenchConfig {
        prompt: args.prompt.clone(),
        generate: args.generate.clone(),
        batch: args.batch.clone(),
        chunk: args.chunk,
        repeat: args.repeat,
    };
    let mut results = Vec::new();
    bench(Arc::clone(&model), &config, |r| {
        out::note(format!("  {}: {:.1} tokens/s", name(&r), r.median()));
        results.push((r, peak_rss_bytes()));
    })?;
    ensure!(!results.is_empty(), "nothing to measure: --prompt and --generate leave every test out");
    // Last, so that its memory is not taken for the model's.
    let read = (!args.no_bandwidth).then(|| read_bandwidth(&model, BANDWIDTH_BYTES) / 1e9);
    let packed = model.bytes();
    let types: Vec<String> = summary.types.iter().map(|(t, n)| format!("{t}:{n}")).collect();
    let file = args.model.file_name().unwrap_or_default().to_string_lossy();
    let objects = results.iter().map(|(r, peak)| {
        let t = &r.test;
        let decode = t.sequences == 1 && t.generate > 0;
        json!({
            "model": file,
            "model_type": format!("{} {}", model.config().architecture, types.join(" ")),
            "bits_per_weight": round(summary.bits_per_weight(), 3),
            "model_size": summary.bytes,
            "model_n_params": summary.parameters,
            "packed_bytes": packed,
            "isa_tier": Isa::active().name(),
            "n_threads": model.pool().threads(),
            "n_ubatch": args.chunk,
            "n_batch_sequences": t.sequences,
            "n_depth": t.depth,
            "n_prompt": t.prompt,
            "n_gen": t.generate,
            "avg_ts": round(r.mean(), 3),
            "stddev_ts": round(r.deviation(), 3),
            "median_ts": round(r.median(), 3),
            "samples_ts": r.rates.iter().map(|&v| round(v, 3)).collect::<Vec<_>>(),
            "start_ms": round(start_ms, 3),
            "peak_rss_bytes": peak,
            "read_gb_per_s": read.map(|v| round(v, 2)),
            "weights_gb_per_s": decode.then(|| round(packed as f64 * r.median() / 1e9, 2)),
        })
    });
    if as_json {
        return objects.into_iter().try_for_each(|o| out::json(&o));
    }
    out::line(format!(
        "{file}: {}, {:.2} bits a weight, {} packed; {} threads, {} kernels; loaded in {start_ms:.0} ms",
        types.join(" "),
        summary.bits_per_weight(),
        out::bytes(packed as u64),
        model.pool().threads(),
        Isa::active().name(),
    ));
    out::line(format!("{:<24} {:>10} {:>8} {:>10} {:>12} {:>12}", "test", "tokens/s", "±", "median", "weights GB/s", "peak RSS"));
    for (o, (r, peak)) in objects.zip(&results) {
        let weights = o["weights_gb_per_s"].as_f64().map_or("–".into(), |v| format!("{v:.2}"));
        let peak = peak.map_or("unknown".into(), out::bytes);
        out::line(format!("{:<24} {:>10.1} {:>8.1} {:>10.1} {weights:>12} {peak:>12}", name(r), r.mean(), r.deviation(), r.median()));
    }
    if let Some(read) = read {
        out::line(format!("memory is read at {read:.1} GB/s: the bound of weights GB/s for weights larger than the caches"));
    }
    Ok(())
}

/// A test's name as llama-bench writes it, `×N` for N sequences.
fn name(r: &BenchResult) -> String {
    let t = &r.test;
    let what = if t.generate > 0 { format!("tg{}", t.generate) } else { format!("pp{}", t.prompt) };
    let depth = if t.depth > 0 { format!(" @ d{}", t.depth) } else { String::new() };
    let times = if t.sequences > 1 { format!(" ×{}", t.sequences) } else { String::new() };
    what + &depth + &times
}

fn round(v: f64, digits: i32) -> f64 {
    let unit = 10f64.powi(digits);
    (v * unit).round() / unit
}

/// The most memory this process ever had in RAM.
fn peak_rss_bytes() -> Option<u64> {
    // SAFETY: rusage is plain data, for which all-zero is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` outlives the call.
    let done = unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) } == 0;
    // Bytes on macOS, KiB elsewhere.
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    done.then(|| u64::try_from(usage.ru_maxrss).ok()?.checked_mul(unit)).flatten()
}

fn serve(args: Serve, as_json: bool) -> Result<()> {
    ensure!(
        args.allow_remote || load::is_loopback(&args.url),
        "{} is not on this machine; pass --allow-remote if you may load that server",
        args.url
    );
    let arrival = match (args.rate, args.clients) {
        (Some(rate), _) => {
            ensure!(rate.is_finite() && rate > 0.0 && rate <= 1e4, "--rate is {rate}, must be above 0 and at most 10000");
            Arrival::Open { rate }
        }
        (None, clients) => {
            let clients = clients.unwrap_or(1);
            ensure!((1..=load::MOST_CLIENTS).contains(&clients), "--clients is {clients}, must be within 1..={}", load::MOST_CLIENTS);
            Arrival::Closed { clients }
        }
    };
    let most = load::MOST_REQUESTS;
    ensure!((1..=most).contains(&args.requests), "--requests is {}, must be within 1..={most}", args.requests);
    ensure!(args.shared_prefix <= load::MOST_TOKENS, "--shared-prefix is {}, must be at most {}", args.shared_prefix, load::MOST_TOKENS);
    let key = match &args.key_env {
        None => None,
        Some(name) => match std::env::var(name) {
            Ok(key) if !key.is_empty() => Some(key),
            _ => bail!("--key-env names {name}, which is not set"),
        },
    };
    let load = Load {
        url: format!("{}/v1/completions", args.url.trim_end_matches('/')),
        model: args.model.clone(),
        key,
        arrival,
        requests: args.requests,
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens,
        shared_prefix: args.shared_prefix,
        seed: args.seed,
        ban_tokens: args.ban_tokens,
        timeout: Duration::from_secs(args.timeout.clamp(1, 3600)),
        time_limit: Duration::from_secs(args.time_limit.clamp(1, 24 * 3600)),
    };
    let bar = out::bar(load.requests as u64, "requests");
    let report = load.run(|| bar.inc(1));
    bar.finish_and_clear();
    let value = report.json(&load);
    if as_json {
        out::json(&value)?;
    } else {
        table(&value);
    }
    if let Some(said) = value["first_refusal"].as_str() {
        out::note(format!("the server refused a request: {said}"));
    }
    ensure!(report.completed() > 0, "no request was answered: {}", value["errors"]);
    Ok(())
}

fn table(v: &Value) {
    let number = |v: &Value| v.as_f64().map_or("–".into(), |n| format!("{n:.1}"));
    out::line(format!(
        "{} of {} requests answered in {} s: {} requests/s, {} output tokens/s",
        v["completed"], v["requests"], number(&v["duration_s"]), number(&v["requests_per_s"]), number(&v["output_tokens_per_s"]),
    ));
    out::line(format!("{:<20} {:>10} {:>10} {:>10} {:>10} {:>10}", "ms", "mean", "p50", "p90", "p95", "p99"));
    for (name, key) in [
        ("to first token", "ttft_ms"),
        ("between tokens", "itl_ms"),
        ("a token after first", "tpot_ms"),
        ("end to end", "e2e_latency_ms"),
    ] {
        let cell = |k: &str| number(&v[key][k]);
        out::line(format!(
            "{name:<20} {:>10} {:>10} {:>10} {:>10} {:>10}",
            cell("mean"), cell("p50"), cell("p90"), cell("p95"), cell("p99"),
        ));
    }
    for (kind, n) in v["errors"].as_object().into_iter().flatten() {
        out::line(format!("errors: {n} × {kind}"));
    }
}
