//! LoRA fine-tuning of llama-shaped models on a CPU: forward pass, hand-written
//! backward pass, optimizer, checkpoints.
//!
//! The base is frozen at the values its quantized file holds; low-rank updates on
//! all seven linears of each layer are trained and written as a PEFT adapter.
//! What may not happen here: an unsafe block, a result that depends on the thread
//! count or on an interruption, a sample silently shortened, a loss averaged over
//! anything but the trained tokens of its whole step. Checked by the tests
//! beside each file; gradients against finite differences in `network`.
//!
//! Rejected: an autograd library. The block is fixed, its backward is three
//! hundred lines, and tapes cost the memory and speed this crate exists to save.
#![forbid(unsafe_code)]

mod adam;
mod attention;
mod base;
mod checkpoint;
mod error;
mod loss;
mod lora;
mod network;
mod ops;
mod pack;
mod rng;
mod run;
#[cfg(test)]
mod real;
#[cfg(test)]
mod testing;

pub use error::TrainError;
pub use run::{train, train_until};

use serde::{Deserialize, Serialize};

/// Settings of a run. Unknown keys are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Rank of each update.
    pub rank: usize,
    /// An update is scaled by `alpha / rank`.
    pub alpha: f32,
    /// Peak learning rate: reached after a tenth of the steps, then cosine to 0.
    pub learning_rate: f32,
    /// Passes over the samples.
    pub epochs: usize,
    /// Sample tokens in one optimizer step, about.
    pub batch_tokens: usize,
    /// Seed of the data order and of the initial factors.
    pub seed: u64,
    /// Threads; 0 takes what the process may use. Never changes the result.
    pub threads: usize,
    /// Steps between checkpoints; 0 writes none. Never changes the result.
    pub checkpoint_every: usize,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            learning_rate: 2e-3,
            epochs: 5,
            batch_tokens: 512,
            seed: 0,
            threads: 0,
            checkpoint_every: 50,
        }
    }
}

/// A token sequence and which of its tokens the loss counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The whole sequence, template included.
    pub tokens: Vec<u32>,
    /// One flag a token. The first token has nothing before it to be predicted
    /// from, so its flag counts for nothing.
    pub trained: Vec<bool>,
}

/// One optimizer step, as reported while training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Step {
    /// Steps done, from 1.
    pub step: usize,
    /// Steps in the run.
    pub of: usize,
    /// Epoch of this step, from 1.
    pub epoch: usize,
    /// Mean negative log-likelihood of the step's trained tokens, before it.
    pub loss: f32,
    /// Sample tokens in the step.
    pub tokens: usize,
    /// Sample tokens a second over the steps of this process so far.
    pub tokens_per_s: f64,
    /// Learning rate of the step.
    pub lr: f32,
}

/// What a finished run has to say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainReport {
    /// Optimizer steps.
    pub steps: usize,
    /// Loss of the first step.
    pub loss_first: f32,
    /// Loss of the last step.
    pub loss_last: f32,
    /// Loss of every step, interrupted ones included.
    pub losses: Vec<f32>,
    /// Trained tokens over all epochs.
    pub trained_tokens: u64,
    /// Seconds in this process.
    pub seconds: f64,
}
