//! Scheduler, paged KV cache and sampler: many requests, one model.
//!
//! One thread owns the model's cache and everything in flight; clients hold
//! channels. What may not happen here: a request's text depending on who else
//! is served (batch, chunking, prefix cache, preemption), a block staying taken
//! after its request ended, a client waiting on a scheduler that is gone.
//! Checked by `scheduler/tests.rs` over random schedules and by
//! `tests/real_model.rs`.
//!
//! Rejected: a lock around the model with one task a request. Batching needs
//! one place that sees every sequence between two steps.
#![forbid(unsafe_code)]

mod backend;
pub mod bench;
mod blocks;
mod error;
#[cfg(test)]
mod fake;
mod forward;
mod memory;
mod plan;
mod sampler;
mod scheduler;
mod stop;
mod vocab;

pub use ashlar_model::{KvType, PackedCache};
pub use backend::{EngineConfig, LocalBackend};
pub use error::EngineError;
pub use memory::MemorySource;
pub use plan::MemoryPlan;
pub use vocab::{folder, tokenizer, vocab};
