//! How fast this machine runs a model: the forward pass alone, timed.
//!
//! The tests are llama-bench's: a prompt of n tokens (pp), n tokens generated
//! one by one from an empty context (tg), and llama-batched-bench's: N prompts,
//! then N sequences that generate together. Tokens are pseudo-random and fed
//! back unsampled, as there, so that only the model is timed.
//!
//! What may not happen here: printing, reading arguments, a figure without its
//! samples, a clock running while buffers are set up.
//!
//! Rejected: timing through the scheduler. Its share belongs to the load test
//! against a server, and no peer's tool includes it here.

use crate::forward::{Forward, Local};
use ashlar_core::{Fault, Hint};
use ashlar_model::{BLOCK, Item, KvCache, Model, ModelError, TensorSize, Want, Workspace};
use std::{collections::BTreeMap, hint::black_box, sync::Arc, time::Instant};

/// Most tokens that all sequences of a test may hold together.
const MOST_TOKENS: usize = 1 << 20;
/// Most samples a test takes.
const MOST_SAMPLES: usize = 1000;
/// Most sequences of a batched test.
const MOST_SEQUENCES: usize = 1024;

/// What to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchConfig {
    /// Prompt lengths; 0 leaves the prompt test out.
    pub prompt: Vec<usize>,
    /// Tokens to generate; 0 leaves the generation test out.
    pub generate: Vec<usize>,
    /// Sequences at once: 1 stands for the single tests, more for a batched
    /// one with every pair of `prompt` and `generate`.
    pub batch: Vec<usize>,
    /// Prompt tokens a step.
    pub chunk: usize,
    /// Samples a test, after one warm-up.
    pub repeat: usize,
}

/// One test, with llama-bench's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchTest {
    /// Sequences that run together.
    pub sequences: usize,
    /// Tokens each has in its cache before the clock starts.
    pub depth: usize,
    /// Prompt tokens of each sequence, under the clock.
    pub prompt: usize,
    /// Tokens each generates, under the clock.
    pub generate: usize,
}

/// A test and its samples.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchResult {
    /// What was run.
    pub test: BenchTest,
    /// Tokens of all sequences a second, one figure a sample.
    pub rates: Vec<f64>,
}

impl BenchResult {
    fn new(test: BenchTest, seconds: &[f64]) -> Self {
        let tokens = (test.sequences * (test.prompt + test.generate)) as f64;
        let rates = seconds.iter().map(|s| tokens / s.max(1e-9)).collect();
        Self { test, rates }
    }

    /// Arithmetic mean of the samples.
    pub fn mean(&self) -> f64 {
        self.rates.iter().sum::<f64>() / self.rates.len().max(1) as f64
    }

    /// The sample in the middle, or the mean of the two there.
    pub fn median(&self) -> f64 {
        let mut sorted = self.rates.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        }
    }

    /// Sample standard deviation; 0 for a single sample.
    pub fn deviation(&self) -> f64 {
        let (mean, n) = (self.mean(), self.rates.len());
        let squares: f64 = self.rates.iter().map(|r| (r - mean).powi(2)).sum();
        (squares / n.saturating_sub(1).max(1) as f64).sqrt()
    }
}

/// A measurement that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A setting outside its range.
    #[error("{name} is {value}, must be within {least}..={most}")]
    Setting {
        /// Which.
        name: &'static str,
        /// What was given.
        value: usize,
        /// The least that works.
        least: usize,
        /// The most that is run.
        most: usize,
    },
    /// Sequences that would not fit.
    #[error("{sequences} sequences of {tokens} tokens are more than {most} tokens")]
    Size {
        /// Sequences at once.
        sequences: usize,
        /// Tokens of each.
        tokens: usize,
        /// The most in all.
        most: usize,
    },
    /// A sequence longer than the model can run.
    #[error("a sequence of {tokens} tokens exceeds the model's context of {context}")]
    Context {
        /// Prompt and generated tokens of one sequence.
        tokens: usize,
        /// The most the model runs.
        context: usize,
    },
    /// The model refused.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl Hint for BenchError {
    fn fault(&self) -> Fault {
        match self {
            Self::Model(e) => e.fault(),
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Model(e) => e.hint(),
            Self::Setting { name, .. } => Some(format!("choose another {name}")),
            Self::Size { .. } | Self::Context { .. } => {
                Some("measure fewer or shorter sequences".into())
            }
        }
    }
}

/// Runs every test of `config` on `model`, handing over each result as it is
/// known: prompts, generations, then the batched pairs.
///
/// # Errors
/// [`BenchError`]: nothing is run when a setting is out of range or a sequence
/// would exceed the model's context.
pub fn bench(
    model: Arc<Model>,
    config: &BenchConfig,
    mut each: impl FnMut(BenchResult),
) -> Result<(), BenchError> {
    let blocks = check(config, model.config().context)?;
    let forward = Local {
        cache: KvCache::new(model.config(), blocks),
        workspace: Workspace::default(),
        model,
    };
    let mut runner = Runner {
        vocab: forward.vocab(),
        forward,
        chunk: config.chunk,
        state: 0,
    };
    let sizes = |list: &[usize]| list.iter().copied().filter(|&n| n > 0).collect::<Vec<_>>();
    let (prompts, generations) = (sizes(&config.prompt), sizes(&config.generate));
    if config.batch.contains(&1) {
        for &prompt in &prompts {
            runner.prompts(1, prompt, prompt)?;
            let seconds = sample(config.repeat, || runner.prompts(1, prompt, prompt))?;
            let test = BenchTest {
                sequences: 1,
                depth: 0,
                prompt,
                generate: 0,
            };
            each(BenchResult::new(test, &seconds));
        }
        for &generate in &generations {
            runner.generations(1, 0, generate.min(8), generate)?;
            let seconds = sample(config.repeat, || {
                runner.generations(1, 0, generate, generate)
            })?;
            let test = BenchTest {
                sequences: 1,
                depth: 0,
                prompt: 0,
                generate,
            };
            each(BenchResult::new(test, &seconds));
        }
    }
    for &sequences in config.batch.iter().filter(|&&n| n > 1) {
        for &depth in if prompts.is_empty() {
            &[0][..]
        } else {
            &prompts
        } {
            for &generate in if generations.is_empty() {
                &[0][..]
            } else {
                &generations
            } {
                let total = depth + generate;
                runner.prompts(sequences, depth, total)?;
                runner.generations(sequences, depth, generate.min(2), total)?;
                let (mut prompt_seconds, mut seconds) = (Vec::new(), Vec::new());
                for _ in 0..config.repeat {
                    prompt_seconds.push(runner.prompts(sequences, depth, total)?);
                    seconds.push(runner.generations(sequences, depth, generate, total)?);
                }
                let test = BenchTest {
                    sequences,
                    depth: 0,
                    prompt: depth,
                    generate: 0,
                };
                if depth > 0 {
                    each(BenchResult::new(test, &prompt_seconds));
                }
                let test = BenchTest {
                    sequences,
                    depth,
                    prompt: 0,
                    generate,
                };
                if generate > 0 {
                    each(BenchResult::new(test, &seconds));
                }
            }
        }
    }
    Ok(())
}

/// The blocks that the largest test needs, if every setting is in range.
fn check(config: &BenchConfig, context: usize) -> Result<usize, BenchError> {
    let range = |name, value, least, most| {
        if (least..=most).contains(&value) {
            return Ok(());
        }
        Err(BenchError::Setting {
            name,
            value,
            least,
            most,
        })
    };
    range("repeat", config.repeat, 1, MOST_SAMPLES)?;
    range("chunk", config.chunk, 1, MOST_TOKENS)?;
    for &n in &config.batch {
        range("batch", n, 1, MOST_SEQUENCES)?;
    }
    for &n in &config.prompt {
        range("prompt", n, 0, MOST_TOKENS)?;
    }
    for &n in &config.generate {
        range("generate", n, 0, MOST_TOKENS)?;
    }
    let most = |list: &[usize]| list.iter().copied().max().unwrap_or(0);
    let (prompt, generate, sequences) = (
        most(&config.prompt),
        most(&config.generate),
        most(&config.batch),
    );
    let tokens = if sequences > 1 {
        prompt + generate
    } else {
        prompt.max(generate)
    };
    if tokens > context {
        return Err(BenchError::Context { tokens, context });
    }
    if sequences.saturating_mul(tokens) > MOST_TOKENS {
        return Err(BenchError::Size {
            sequences,
            tokens,
            most: MOST_TOKENS,
        });
    }
    Ok(sequences.max(1) * tokens.div_ceil(BLOCK).max(1))
}

fn sample(
    repeat: usize,
    mut once: impl FnMut() -> Result<f64, BenchError>,
) -> Result<Vec<f64>, BenchError> {
    (0..repeat).map(|_| once()).collect()
}

/// A model, its cache, and where the tokens come from.
struct Runner<F> {
    forward: F,
    vocab: usize,
    chunk: usize,
    state: u64,
}

impl<F: Forward> Runner<F> {
    /// Seconds to run `sequences` prompts of `len` tokens, `chunk` tokens a
    /// step whichever sequence they are of; only a prompt's end has logits.
    fn prompts(&mut self, sequences: usize, len: usize, total: usize) -> Result<f64, BenchError> {
        let tokens: Vec<u32> = (0..sequences * len).map(|_| self.token()).collect();
        let tables = tables(sequences, total);
        let start = Instant::now();
        let mut at = 0;
        while at < tokens.len() {
            let end = (at + self.chunk).min(tokens.len());
            let mut items = Vec::new();
            while at < end {
                let (sequence, from) = (at / len, at % len);
                let take = (len - from).min(end - at);
                items.push(Item {
                    tokens: &tokens[at..at + take],
                    start: from,
                    blocks: &tables[sequence],
                    want: if from + take == len {
                        Want::Last
                    } else {
                        Want::None
                    },
                });
                at += take;
            }
            self.step(&items)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds for `sequences` to generate `steps` tokens each from `depth` on.
    fn generations(
        &mut self,
        sequences: usize,
        depth: usize,
        steps: usize,
        total: usize,
    ) -> Result<f64, BenchError> {
        let tokens: Vec<u32> = (0..sequences * steps).map(|_| self.token()).collect();
        let tables = tables(sequences, total);
        let start = Instant::now();
        for (step, row) in tokens.chunks_exact(sequences).enumerate() {
            let items: Vec<_> = row
                .chunks_exact(1)
                .zip(&tables)
                .map(|(token, blocks)| Item {
                    tokens: token,
                    start: depth + step,
                    blocks,
                    want: Want::Last,
                })
                .collect();
            self.step(&items)?;
        }
        Ok(start.elapsed().as_secs_f64())
    }

    fn step(&mut self, items: &[Item<'_>]) -> Result<(), ModelError> {
        self.forward.forward(items, &mut |_, row| {
            black_box(row);
        })
    }

    /// The next token (splitmix64): the same ones in every run.
    fn token(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % self.vocab.max(1) as u64) as u32
    }
}

/// Page tables of sequences of `total` tokens, side by side in the cache.
fn tables(sequences: usize, total: usize) -> Vec<Vec<u32>> {
    let each = total.div_ceil(BLOCK);
    let block = |i: usize| u32::try_from(i).unwrap_or(u32::MAX);
    (0..sequences)
        .map(|s| (s * each..(s + 1) * each).map(block).collect())
        .collect()
}

/// Bytes of memory a second that `model`'s threads read together: the best of
/// several passes over `bytes` of memory, which should be well above what the
/// last-level cache holds. The bound of generation at batch 1.
pub fn read_bandwidth(model: &Model, bytes: usize) -> f64 {
    const PIECE: usize = 1 << 17;
    // Written once: untouched pages would all be the one page of zeros.
    let words = vec![1u64; (bytes / 8).max(1)];
    let pass = || {
        let start = Instant::now();
        model
            .pool()
            .run(words.len().div_ceil(PIECE), |task, _worker| {
                let piece = &words[task * PIECE..words.len().min((task + 1) * PIECE)];
                black_box(piece.iter().fold(0u64, |sum, &w| sum.wrapping_add(w)));
            });
        (words.len() * 8) as f64 / start.elapsed().as_secs_f64().max(1e-9)
    };
    (0..6).map(|_| pass()).fold(0.0, f64::max)
}

/// What a model file is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct FileSummary {
    /// Tensors of each type, the type with most bytes first.
    pub types: Vec<(String, usize)>,
    /// Values in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
}

impl FileSummary {
    /// Counts a checkpoint's tensors.
    pub fn new(tensors: &[TensorSize]) -> Self {
        let mut types = BTreeMap::<String, (u64, usize)>::new();
        for tensor in tensors {
            let entry = types.entry(format!("{:?}", tensor.dtype)).or_default();
            entry.0 += tensor.bytes;
            entry.1 += 1;
        }
        let mut types: Vec<_> = types.into_iter().collect();
        types.sort_by_key(|(_, (bytes, _))| std::cmp::Reverse(*bytes));
        Self {
            types: types.into_iter().map(|(t, (_, n))| (t, n)).collect(),
            parameters: tensors.iter().map(|t| t.values).sum(),
            bytes: tensors.iter().map(|t| t.bytes).sum(),
        }
    }

    /// Bits a value takes on average, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.parameters.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts rows and remembers the longest sequence.
    #[derive(Default)]
    struct Counter {
        steps: usize,
        tokens: usize,
        rows: usize,
        furthest: usize,
    }

    impl Forward for Counter {
        fn vocab(&self) -> usize {
            7
        }

        fn forward(
            &mut self,
            items: &[Item<'_>],
            row: &mut dyn FnMut(usize, &[f32]),
        ) -> Result<(), ModelError> {
            self.steps += 1;
            for item in items {
                let end = item.start + item.tokens.len();
                assert!(item.blocks.len() * BLOCK >= end && item.tokens.iter().all(|&t| t < 7));
                self.tokens += item.tokens.len();
                self.furthest = self.furthest.max(end);
                if item.want == Want::Last {
                    row(self.rows, &[0.0; 7]);
                    self.rows += 1;
                }
            }
            Ok(())
        }
    }

    fn runner(chunk: usize) -> Runner<Counter> {
        Runner {
            forward: Counter::default(),
            vocab: 7,
            chunk,
            state: 0,
        }
    }

    #[test]
    fn every_prompt_token_runs_once_and_ends_have_logits() {
        let mut r = runner(10);
        r.prompts(3, 7, 9).unwrap();
        let c = &r.forward;
        assert_eq!((c.steps, c.tokens, c.rows, c.furthest), (3, 21, 3, 7));
        let mut r = runner(4);
        r.prompts(1, 0, 5).unwrap();
        r.generations(3, 7, 5, 12).unwrap();
        let c = &r.forward;
        assert_eq!((c.steps, c.tokens, c.rows, c.furthest), (5, 15, 15, 12));
    }

    #[test]
    fn tables_share_no_block() {
        let mut all: Vec<u32> = tables(5, 70).concat();
        assert_eq!(all.len(), 15);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 15);
    }

    #[test]
    fn figures_of_samples() {
        let test = BenchTest {
            sequences: 2,
            depth: 3,
            prompt: 0,
            generate: 6,
        };
        let r = BenchResult::new(test, &[1.0, 2.0, 4.0]);
        assert_eq!(r.rates, [12.0, 6.0, 3.0]);
        assert_eq!((r.mean(), r.median()), (7.0, 6.0));
        assert!((r.deviation() - 21f64.sqrt()).abs() < 1e-12);
        assert_eq!(BenchResult::new(test, &[1.0]).deviation(), 0.0);
    }

    #[test]
    fn sizes_out_of_range_are_refused_with_numbers() {
        let good = BenchConfig {
            prompt: vec![64],
            generate: vec![33],
            batch: vec![1, 4],
            chunk: 16,
            repeat: 1,
        };
        assert_eq!(check(&good, 1 << 20).unwrap(), 16);
        let bad = |change: fn(&mut BenchConfig)| {
            let mut config = good.clone();
            change(&mut config);
            check(&config, 1 << 20).unwrap_err().to_string()
        };
        assert!(bad(|c| c.repeat = 0).contains("repeat is 0"));
        assert!(bad(|c| c.batch = vec![0]).contains("batch is 0"));
        assert!(bad(|c| c.chunk = 0).contains("chunk is 0"));
        assert!(bad(|c| c.generate = vec![usize::MAX]).contains("generate"));
        assert!(bad(|c| (c.prompt, c.batch) = (vec![1 << 19], vec![4])).contains("1048576"));
        let long = check(&good, 96).unwrap_err().to_string();
        assert!(long.contains("97 tokens") && long.contains("96"), "{long}");
    }
}
