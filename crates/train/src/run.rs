//! The loop: plan, resume, step, checkpoint, export.

use crate::{
    Sample, Step, TrainConfig, TrainError, TrainReport,
    adam::{self, Adam},
    base::Base,
    checkpoint::{self, State},
    lora::{self, Lora},
    network::Network,
    pack,
};
use ashlar_core::{Digest, Hasher, json};
use ashlar_kernels::Pool;
use ashlar_model::Weights;
use std::{fs, io::Read, ops::ControlFlow, path::Path, time::Instant};

/// Trains updates of the GGUF file `model` on `samples` and writes a PEFT adapter
/// folder to `out`. Checkpoints live in `scratch`, from where a run with the same
/// model, samples and settings resumes; the adapter's bytes are those of an
/// uninterrupted run.
///
/// # Errors
/// Samples or settings that cannot be trained on (with index and numbers), a loss
/// that is not finite (with its step), the model file, the disk.
pub fn train(
    model: &Path,
    samples: &[Sample],
    config: &TrainConfig,
    scratch: &Path,
    out: &Path,
    progress: &mut dyn FnMut(Step),
) -> Result<TrainReport, TrainError> {
    train_until(model, samples, config, scratch, out, &mut |step| {
        progress(step);
        ControlFlow::Continue(())
    })
}

/// [`train`] that ends with [`TrainError::Interrupted`] when `progress` breaks.
/// The state at that point is not saved beyond the last checkpoint.
///
/// # Errors
/// As [`train`].
pub fn train_until(
    model: &Path,
    samples: &[Sample],
    config: &TrainConfig,
    scratch: &Path,
    out: &Path,
    progress: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<TrainReport, TrainError> {
    lora::check(config)?;
    let weights = Weights::load(model)?;
    pack::check(samples, weights.config.vocab, weights.config.context)?;
    let base = Base::new(weights)?;
    let name = model.file_name().map(|n| n.to_string_lossy()).unwrap_or_default();
    let digest = file_digest(model)?;
    run(&base, &name, digest, samples, config, scratch, out, progress)
}

fn file_digest(path: &Path) -> Result<Digest, TrainError> {
    let mut file = fs::File::open(path).map_err(TrainError::io(path))?;
    let (mut hasher, mut buffer) = (Hasher::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(TrainError::io(path))? {
            0 => return Ok(hasher.finish()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// What decides a run's result: not the threads, not the checkpoints.
fn identity(model: Digest, samples: &[Sample], config: &TrainConfig) -> Digest {
    let config = TrainConfig { threads: 0, checkpoint_every: 0, ..config.clone() };
    let mut hasher = Hasher::new();
    hasher.update(env!("CARGO_PKG_VERSION").as_bytes());
    hasher.update(model.as_bytes());
    // Settings are numbers alone, which are always JSON.
    hasher.update(json::canonical(&config).unwrap_or_default().as_bytes());
    for s in samples {
        hasher.update(&(s.tokens.len() as u64).to_le_bytes());
        for (t, &on) in s.tokens.iter().zip(&s.trained) {
            hasher.update(&t.to_le_bytes());
            hasher.update(&[u8::from(on)]);
        }
    }
    hasher.finish()
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn run(
    base: &Base,
    name: &str,
    model: Digest,
    samples: &[Sample],
    config: &TrainConfig,
    scratch: &Path,
    out: &Path,
    progress: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<TrainReport, TrainError> {
    lora::check(config)?;
    pack::check(samples, base.dims.vocab, base.dims.context)?;
    fs::create_dir_all(scratch).map_err(TrainError::io(scratch))?;
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let pool = Pool::new(threads);
    let lora = Lora::new(&base.dims, config.rank, config.alpha);
    let plan = pack::plan(samples, config);
    let of = plan.len();
    let id = identity(model, samples, config);
    let mut state = checkpoint::load(scratch, &id, lora.len()).unwrap_or_else(|| State {
        params: lora.init(config.seed),
        adam: Adam::new(lora.len()),
        losses: vec![],
    });
    let mut network = Network::new(base, &lora, pool.clone());
    let mut grads = vec![0.0; lora.len()];
    let (start, mut seen) = (Instant::now(), 0);
    for (i, batch) in plan.iter().enumerate().skip(state.losses.len()) {
        let step = i + 1;
        let lr = adam::rate(config.learning_rate, i, of);
        let members = || batch.samples.iter().map(|&s| &samples[s]);
        let trained: usize = members().map(pack::trained_len).sum();
        let scale = 1.0 / trained as f32;
        grads.fill(0.0);
        let total: f64 = batch
            .packs(samples)
            .iter()
            .map(|p| network.gradient(&state.params, p, scale, &mut grads))
            .sum();
        let (loss, norm) = (total / trained as f64, adam::norm(&pool, &grads));
        for (what, value) in [("the loss", loss), ("the gradient's norm", norm)] {
            if !value.is_finite() {
                return Err(TrainError::NonFinite { step, of, what, value, lr });
            }
        }
        state.adam.step(&pool, step, lr, norm, &mut state.params, &grads);
        state.losses.push(loss as f32);
        if config.checkpoint_every > 0 && step % config.checkpoint_every == 0 && step < of {
            checkpoint::save(scratch, &id, &state)?;
        }
        let tokens = members().map(|s| s.tokens.len()).sum();
        seen += tokens;
        let tokens_per_s = seen as f64 / start.elapsed().as_secs_f64();
        let epoch = batch.epoch + 1;
        let report = Step { step, of, epoch, loss: loss as f32, tokens, tokens_per_s, lr };
        if progress(report).is_break() && step < of {
            return Err(TrainError::Interrupted { step, of });
        }
    }
    lora.export(&state.params, name, out)?;
    let per_epoch: usize = samples.iter().map(pack::trained_len).sum();
    Ok(TrainReport {
        steps: of,
        loss_first: state.losses.first().copied().unwrap_or_default(),
        loss_last: state.losses.last().copied().unwrap_or_default(),
        losses: state.losses,
        trained_tokens: (per_epoch * config.epochs) as u64,
        seconds: start.elapsed().as_secs_f64(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{sample, tiny};
    use ashlar_formats::{peft, safetensors::SafeTensors};

    fn samples() -> Vec<Sample> {
        (0..6u32)
            .map(|i| {
                let body = (0..4 + i % 3).map(|j| (i * 11 + j * 5 + 7) % 40);
                let tokens: Vec<u32> = [1, 2, 3, 4 + i].into_iter().chain(body).collect();
                sample(&tokens, 4..tokens.len())
            })
            .collect()
    }

    fn config() -> TrainConfig {
        TrainConfig {
            rank: 4,
            alpha: 8.0,
            learning_rate: 2e-2,
            epochs: 30,
            batch_tokens: 25,
            threads: 1,
            checkpoint_every: 7,
            ..Default::default()
        }
    }

    fn go(
        config: &TrainConfig,
        dir: &Path,
        mut stop: impl FnMut(Step) -> bool,
    ) -> Result<(TrainReport, Vec<u8>), TrainError> {
        let out = dir.join("out");
        let mut progress = |s| if stop(s) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let scratch = dir.join("scratch");
        let model = Digest::of(b"tiny");
        let report = run(&tiny(), "tiny", model, &samples(), config, &scratch, &out, &mut progress)?;
        Ok((report, fs::read(out.join(peft::WEIGHTS_FILE)).unwrap()))
    }

    #[test]
    fn memorises_a_few_sequences() {
        let dir = tempfile::tempdir().unwrap();
        let (report, file) = go(&config(), dir.path(), |_| false).unwrap();
        assert!(report.loss_first > 3.0, "{report:?}");
        assert!(report.loss_last < 0.05, "{report:?}");
        assert_eq!(report.losses.len(), report.steps);
        let tensors = SafeTensors::parse(&file).unwrap();
        assert_eq!(tensors.metadata()["format"], "pt");
        let down = tensors
            .tensor("base_model.model.model.layers.1.mlp.down_proj.lora_A.weight")
            .unwrap();
        assert_eq!(down.shape, [4, 20]);
        assert_eq!(tensors.tensors().count(), 2 * 7 * 2);
        let json = fs::read_to_string(dir.path().join("out").join(peft::CONFIG_FILE)).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["r"], &json["peft_type"]), (&4.into(), &"LORA".into()));
        assert_eq!(json["target_modules"].as_array().unwrap().len(), 7);
    }

    #[test]
    fn interruption_threads_and_damage_leave_no_mark() {
        let clean = tempfile::tempdir().unwrap();
        let (want, bytes) = go(&config(), clean.path(), |_| false).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for stop in [5, 12, 29] {
            let config = TrainConfig { threads: stop % 3 + 1, ..config() };
            let mut first = None;
            let end = go(&config, dir.path(), |s| {
                first.get_or_insert(s.step);
                s.step == stop
            });
            assert!(matches!(end, Err(TrainError::Interrupted { step, .. }) if step == stop));
            assert_eq!(first, Some(if stop == 5 || stop == 12 { 1 } else { 8 }));
        }
        // The newest checkpoint is cut short: the run goes back to the one before.
        let newest = dir.path().join("scratch/step-00000028.ckpt");
        let whole = fs::read(&newest).unwrap();
        fs::write(&newest, &whole[..whole.len() / 2]).unwrap();
        let mut first = None;
        let (got, again) = go(&config(), dir.path(), |s| {
            first.get_or_insert(s.step);
            false
        })
        .unwrap();
        assert_eq!(first, Some(22));
        assert_eq!(again, bytes);
        assert_eq!(got.losses, want.losses);
        // Other settings do not pick up these checkpoints.
        let other = TrainConfig { seed: 1, ..config() };
        go(&other, dir.path(), |s| {
            assert_eq!(s.step, 1);
            true
        })
        .unwrap_err();
    }

    #[test]
    fn a_diverged_run_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let wild = TrainConfig { learning_rate: 1e30, ..config() };
        let end = go(&wild, dir.path(), |_| false);
        assert!(matches!(end, Err(TrainError::NonFinite { step: 2.., .. })), "{end:?}");
    }

    #[test]
    fn refuses_settings_out_of_range() {
        let dir = tempfile::tempdir().unwrap();
        for bad in [
            TrainConfig { rank: 0, ..config() },
            TrainConfig { epochs: 0, ..config() },
            TrainConfig { batch_tokens: 0, ..config() },
            TrainConfig { learning_rate: f32::NAN, ..config() },
        ] {
            assert!(matches!(go(&bad, dir.path(), |_| false), Err(TrainError::Setting { .. })));
        }
        assert!(serde_json::from_str::<TrainConfig>(r#"{"lr": 1}"#).is_err());
    }
}
