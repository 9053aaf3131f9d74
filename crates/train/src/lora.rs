//! The low-rank updates: where each factor lies in the flat parameter vector, a
//! linear with its update forward and backward, and the PEFT folder.
//!
//! Linears that share an input share one `Site`: their A factors are stacked, so
//! one product serves them all.

use crate::{TrainConfig, TrainError, base::Dims, rng::Rng};
use ashlar_core::DType;
use ashlar_formats::{peft, safetensors};
use ashlar_kernels::{Pool, sgemm::sgemm};
use std::{collections::BTreeMap, path::Path};

/// Linears with one input.
pub(crate) struct Site {
    /// Width of the input.
    pub input: usize,
    /// Name in PEFT, width and offset of B, for each output.
    pub outs: Vec<(&'static str, usize, usize)>,
    /// Offset of the stacked A, `[outs · rank, input]`.
    pub a: usize,
    rank: usize,
    scale: f32,
}

impl Site {
    /// Width of the stacked outputs.
    pub(crate) fn width(&self) -> usize {
        self.outs.iter().map(|o| o.1).sum()
    }

    /// Width of the stacked low-rank activations.
    pub(crate) fn low(&self) -> usize {
        self.outs.len() * self.rank
    }

    /// y = x·Wᵀ + u·Bᵀ with u = scale · x·Aᵀ; added to `y` when `add`. Keeps `u`.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn forward(
        &self,
        pool: &Pool,
        w: &[f32],
        params: &[f32],
        x: &[f32],
        u: &mut [f32],
        y: &mut [f32],
        add: bool,
    ) {
        let (n, low, m) = (self.width(), self.low(), x.len() / self.input);
        let a = &params[self.a..];
        sgemm(pool, m, n, self.input, x, self.input, false, w, self.input, true, y, n, add);
        sgemm(pool, m, low, self.input, x, self.input, false, a, self.input, true, u, low, false);
        u.iter_mut().for_each(|v| *v *= self.scale);
        let (mut at, r) = (0, self.rank);
        for (i, &(_, out, b)) in self.outs.iter().enumerate() {
            let (u, b, y) = (&u[i * r..], &params[b..], &mut y[at..]);
            sgemm(pool, m, out, r, u, low, false, b, r, true, y, n, true);
            at += out;
        }
    }

    /// Adds the factors' gradients to `grads`; writes the input's to `dx`, if asked.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn backward(
        &self,
        pool: &Pool,
        w: &[f32],
        params: &[f32],
        x: &[f32],
        u: &[f32],
        dy: &[f32],
        du: &mut Vec<f32>,
        grads: &mut [f32],
        dx: Option<&mut [f32]>,
    ) {
        let (n, low, m) = (self.width(), self.low(), x.len() / self.input);
        du.resize(m * low, 0.0);
        let (mut at, r) = (0, self.rank);
        for (i, &(_, out, b)) in self.outs.iter().enumerate() {
            let (dy, u, span) = (&dy[at..], &u[i * r..], b..b + out * r);
            sgemm(pool, out, r, m, dy, n, true, u, low, false, &mut grads[span.clone()], r, true);
            sgemm(pool, m, r, out, dy, n, false, &params[span], r, false, &mut du[i * r..], low, false);
            at += out;
        }
        du.iter_mut().for_each(|v| *v *= self.scale);
        let span = self.a..self.a + low * self.input;
        let da = &mut grads[span.clone()];
        sgemm(pool, low, self.input, m, du, low, true, x, self.input, false, da, self.input, true);
        if let Some(dx) = dx {
            let k = self.input;
            sgemm(pool, m, k, n, dy, n, false, w, k, false, dx, k, false);
            sgemm(pool, m, k, low, du, low, false, &params[span], k, false, dx, k, true);
        }
    }
}

/// All updates of a model.
pub(crate) struct Lora {
    /// Queries·keys·values, attention output, gate·up, down.
    pub sites: [Site; 4],
    /// Parameters of one layer.
    pub layer: usize,
    layers: usize,
    rank: usize,
    alpha: f32,
}

impl Lora {
    pub(crate) fn new(dims: &Dims, rank: usize, alpha: f32) -> Self {
        let mut at = 0;
        let mut site = |input, outs: &[(&'static str, usize)]| {
            let a = at;
            at += outs.len() * rank * input;
            let outs = outs
                .iter()
                .map(|&(name, out)| {
                    at += out * rank;
                    (name, out, at - out * rank)
                })
                .collect();
            Site { input, outs, a, rank, scale: alpha / rank as f32 }
        };
        let sites = [
            site(
                dims.hidden,
                &[
                    ("self_attn.q_proj", dims.q()),
                    ("self_attn.k_proj", dims.kv()),
                    ("self_attn.v_proj", dims.kv()),
                ],
            ),
            site(dims.q(), &[("self_attn.o_proj", dims.hidden)]),
            site(dims.hidden, &[("mlp.gate_proj", dims.ffn), ("mlp.up_proj", dims.ffn)]),
            site(dims.ffn, &[("mlp.down_proj", dims.hidden)]),
        ];
        Self { sites, layer: at, layers: dims.layers, rank, alpha }
    }

    /// Parameters of the whole model.
    pub(crate) fn len(&self) -> usize {
        self.layer * self.layers
    }

    /// PEFT's start: A uniform within ±1/√in (Kaiming with a = √5), B zero.
    pub(crate) fn init(&self, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed, 0);
        let mut params = vec![0.0; self.len()];
        for layer in params.chunks_exact_mut(self.layer) {
            for s in &self.sites {
                let bound = 1.0 / (s.input as f32).sqrt();
                layer[s.a..s.a + s.low() * s.input].fill_with(|| rng.signed() * bound);
            }
        }
        params
    }

    /// Name, shape and place of every factor, in order of the flat vector.
    pub(crate) fn factors(&self) -> Vec<(String, [usize; 2], usize)> {
        let mut all = Vec::new();
        for l in 0..self.layers {
            for s in &self.sites {
                for (i, &(name, out, b)) in s.outs.iter().enumerate() {
                    let a = s.a + i * self.rank * s.input;
                    let at = l * self.layer;
                    all.push((peft::tensor_name(l, name, "A"), [self.rank, s.input], at + a));
                    all.push((peft::tensor_name(l, name, "B"), [out, self.rank], at + b));
                }
            }
        }
        all
    }

    /// Writes the PEFT folder.
    pub(crate) fn export(&self, params: &[f32], base: &str, out: &Path) -> Result<(), TrainError> {
        let mut factors = self.factors();
        factors.sort();
        let bytes: Vec<Vec<u8>> = factors
            .iter()
            .map(|(_, [r, c], at)| {
                params[*at..at + r * c].iter().flat_map(|v| v.to_le_bytes()).collect()
            })
            .collect();
        let tensors: Vec<_> = factors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), data)| (name.as_str(), &shape[..], DType::F32, &data[..]))
            .collect();
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut file = Vec::new();
        safetensors::write(&tensors, &metadata, &mut file)?;
        let modules = self.sites.iter().flat_map(|s| &s.outs);
        let modules = modules.filter_map(|o| o.0.rsplit('.').next()).map(str::to_owned);
        let config = peft::LoraConfig::new(self.rank, self.alpha.into(), modules.collect(), base);
        std::fs::create_dir_all(out).map_err(TrainError::io(out))?;
        for (name, bytes) in
            [(peft::WEIGHTS_FILE, &file[..]), (peft::CONFIG_FILE, config.to_json().as_bytes())]
        {
            let path = out.join(name);
            std::fs::write(&path, bytes).map_err(TrainError::io(&path))?;
        }
        Ok(())
    }
}

/// Refuses settings the updates cannot be built from.
pub(crate) fn check(config: &TrainConfig) -> Result<(), TrainError> {
    let fault = |name, value: String, must| Err(TrainError::Setting { name, value, must });
    if config.rank == 0 || config.rank > 1024 {
        return fault("rank", config.rank.to_string(), "within 1..=1024");
    }
    if config.epochs == 0 {
        return fault("epochs", "0".into(), "at least 1");
    }
    if config.batch_tokens == 0 {
        return fault("batch_tokens", "0".into(), "at least 1");
    }
    for (name, v) in [("alpha", config.alpha), ("learning_rate", config.learning_rate)] {
        if !(v.is_finite() && v > 0.0) {
            return fault(name, v.to_string(), "a finite number above 0");
        }
    }
    Ok(())
}
