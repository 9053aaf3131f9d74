//! Mutates files our own writers made and feeds them to the readers.
//!
//! `cargo run --release --manifest-path fuzz/Cargo.toml -- TARGET SECONDS [SEED]`
//! with TARGET `gguf`, `safetensors` or `adapter`. A panic, or a reader that
//! reserves more than its bound, ends the run with exit code 1 and leaves the
//! input in `fuzz/finds/`. Overflow checks and debug assertions are on.
//!
//! Inputs that parse, or fail with an error not seen before, join the corpus:
//! the variety of errors stands in for coverage.

mod alloc;
mod mutate;
mod seeds;

use ashlar_core::Digest;
use mutate::Rng;
use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

/// Reads one input; the text says how it ended, without numbers.
type Target = fn(&[u8]) -> String;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: ashlar-fuzz gguf|safetensors|adapter SECONDS [SEED] | replay FILE...";
    if let [first, files @ ..] = args.as_slice()
        && first == "replay"
    {
        for file in files {
            match std::fs::read(file) {
                Ok(bytes) => println!("{file}: {}", seeds::all(&bytes)),
                Err(e) => println!("{file}: {e}"),
            }
        }
        return ExitCode::SUCCESS;
    }
    let seconds = args.get(1).and_then(|s| s.parse().ok());
    let seed = args.get(2).map_or(Some(1), |s| s.parse().ok());
    let target = args.first().and_then(|name| seeds::target(name));
    let (Some(seconds), Some(seed), Some((target, corpus))) = (seconds, seed, target) else {
        eprintln!("{usage}");
        return ExitCode::from(2);
    };
    let run = fuzz(target, corpus, Duration::from_secs(seconds), seed);
    println!(
        "{}: {} inputs in {:.0} s, {} accepted, {} kinds of error, largest reservation {:.1} MiB, {} finds",
        args[0],
        run.inputs,
        run.seconds,
        run.accepted,
        run.kinds,
        run.peak as f64 / (1 << 20) as f64,
        run.finds.len()
    );
    for find in &run.finds {
        println!("find: {}", find.display());
    }
    ExitCode::from(u8::from(!run.finds.is_empty()))
}

struct Run {
    inputs: u64,
    accepted: u64,
    kinds: usize,
    peak: usize,
    seconds: f64,
    finds: Vec<PathBuf>,
}

fn fuzz(target: Target, mut corpus: Vec<Vec<u8>>, time: Duration, seed: u64) -> Run {
    const MAX_CORPUS: usize = 4096;
    const MAX_FINDS: usize = 8;
    let mut rng = Rng::new(seed);
    let mut kinds = HashSet::new();
    let mut run = Run {
        inputs: 0,
        accepted: 0,
        kinds: 0,
        peak: 0,
        seconds: 0.0,
        finds: Vec::new(),
    };
    let start = Instant::now();
    // Seeds first as they are, then mutants until the time is over.
    let mut fresh = corpus.len();
    while start.elapsed() < time && run.finds.len() < MAX_FINDS {
        let input = match fresh.checked_sub(1) {
            Some(i) => {
                fresh = i;
                corpus[i].clone()
            }
            None => mutate::mutant(&corpus, &mut rng),
        };
        run.inputs += 1;
        alloc::reset();
        let outcome = catch_unwind(AssertUnwindSafe(|| target(&input)));
        let peak = alloc::peak();
        run.peak = run.peak.max(peak);
        match outcome {
            Ok(kind) if peak <= alloc::bound(input.len()) => {
                run.accepted += u64::from(kind == seeds::ACCEPTED);
                let new = !kinds.contains(&kind);
                let keep = new || (kind == seeds::ACCEPTED && rng.one_in(64));
                if new {
                    kinds.insert(kind);
                }
                if keep && corpus.len() < MAX_CORPUS {
                    corpus.push(input);
                }
            }
            _ => run.finds.push(save(&input)),
        }
    }
    run.kinds = kinds.iter().filter(|k| *k != seeds::ACCEPTED).count();
    run.seconds = start.elapsed().as_secs_f64();
    run
}

/// Keeps an input by its digest, so that one find is one file.
fn save(input: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("finds");
    let path = folder.join(Digest::of(input).short());
    let done = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, input));
    if let Err(e) = done {
        eprintln!("cannot keep {}: {e}", path.display());
    }
    path
}
