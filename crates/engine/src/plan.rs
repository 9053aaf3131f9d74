//! What an engine will take of memory, reckoned before it serves.
//!
//! The KV pool is fitted to what is left beside weights, buffers and queue, or
//! the start is refused with the figures and the next step. What may not
//! happen: serving with a pool that the memory does not hold, or a request's
//! memory that is not in the plan.

use crate::{
    EngineConfig, EngineError,
    memory::{Available, MemorySource},
    scheduler::SCORE_ROWS,
};
use ashlar_model::{BLOCK, Config, KvCache, tables_bytes, workspace_bytes};
use serde::Serialize;
use std::fmt;

/// A pool for less than this many tokens (or the model's context, where that is
/// shorter) is refused rather than fitted.
const LEAST_CONTEXT: usize = 512;
/// Blocks when nothing tells how much memory there is.
const BLIND_BLOCKS: usize = 512;
/// Bytes a token of a request takes outside the KV cache: its id, its part of a
/// block's digest.
pub(crate) const TOKEN_BYTES: usize = 5;
/// Bytes of a request without its tokens.
pub(crate) const REQUEST_BYTES: usize = 16 << 10;

/// Where the engine's memory goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Bytes the engine may take in all, weights included; `None` when nothing
    /// tells.
    pub available_bytes: Option<u64>,
    /// Who says so.
    pub source: MemorySource,
    /// Packed weights and the tables beside them.
    pub weights_bytes: u64,
    /// One KV block of [`BLOCK`] tokens, over all layers.
    pub kv_block_bytes: u64,
    /// KV blocks.
    pub kv_blocks: usize,
    /// All of them.
    pub kv_bytes: u64,
    /// Buffers of a step at the configured batch and prefill.
    pub workspace_bytes: u64,
    /// Waiting and running requests, apart from the KV cache.
    pub requests_bytes: u64,
    /// Left to the rest of the process and the system.
    pub reserve_bytes: u64,
    /// Tokens of the longest request that fits, answer included.
    pub context: usize,
    /// Tokens of the longest sequence the model was made for.
    pub model_context: usize,
    /// Requests computed together.
    pub max_batch: usize,
    /// Prompt tokens a step.
    pub max_prefill: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Processors this process may use; more threads than these slow it down.
    pub processors: usize,
}

/// What a model asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    pub(crate) weights: u64,
    pub(crate) kv_block: u64,
    pub(crate) workspace: u64,
    pub(crate) context: usize,
    pub(crate) threads: usize,
}

impl Need {
    pub(crate) fn of(
        model: &Config,
        matrices: usize,
        threads: usize,
        config: &EngineConfig,
    ) -> Self {
        let rows = config.max_batch.saturating_add(config.max_prefill);
        let wanted = config.max_batch.saturating_add(SCORE_ROWS);
        // Twice, for buffers grow by doubling; and the sampler's two.
        let workspace = 2 * workspace_bytes(model, rows, wanted, threads) + 2 * 12 * model.vocab;
        Self {
            weights: (matrices + tables_bytes(model)) as u64,
            kv_block: KvCache::block_bytes(model, config.kv_type) as u64,
            workspace: workspace as u64,
            context: model.context,
            threads,
        }
    }
}

impl MemoryPlan {
    /// Fits the KV pool to `memory`, which does not count the weights as taken.
    pub(crate) fn fit(
        need: Need,
        config: &EngineConfig,
        memory: Available,
    ) -> Result<Self, EngineError> {
        let whole = need.context.div_ceil(BLOCK);
        let running = config
            .max_batch
            .saturating_mul(need.context * TOKEN_BYTES + REQUEST_BYTES);
        let requests = config.max_queue_bytes.saturating_add(running) as u64;
        let reserve = match memory.source {
            MemorySource::Setting => 0,
            _ => memory.bytes.unwrap_or(0) / 10,
        };
        let fixed = (need.weights + need.workspace)
            .saturating_add(requests)
            .saturating_add(reserve);
        let left = memory.bytes.map(|b| b.saturating_sub(fixed));
        let fits =
            left.map(|left| usize::try_from(left / need.kv_block.max(1)).unwrap_or(usize::MAX));
        let least = whole.min(LEAST_CONTEXT.div_ceil(BLOCK));
        let most = config.max_batch.saturating_mul(whole);
        let blocks = match (config.kv_blocks, fits) {
            (Some(set), _) => set,
            (None, Some(fits)) => fits.min(most),
            (None, None) => BLIND_BLOCKS.min(most),
        };
        // Block numbers are 32 bits wide.
        let blocks = blocks.min(u32::MAX as usize);
        let plan = Self {
            available_bytes: memory.bytes,
            source: memory.source,
            weights_bytes: need.weights,
            kv_block_bytes: need.kv_block,
            kv_blocks: blocks,
            kv_bytes: need.kv_block.saturating_mul(blocks as u64),
            workspace_bytes: need.workspace,
            requests_bytes: requests,
            reserve_bytes: reserve,
            context: need.context.min(blocks.saturating_mul(BLOCK)),
            model_context: need.context,
            max_batch: config.max_batch,
            max_prefill: config.max_prefill,
            threads: need.threads,
            processors: std::thread::available_parallelism().map_or(1, usize::from),
        };
        match (memory.bytes, fits) {
            (Some(available), Some(fits))
                if blocks > fits || (config.kv_blocks.is_none() && blocks < least) =>
            {
                let needed = config.kv_blocks.unwrap_or(least) as u64;
                Err(EngineError::Memory {
                    needed: fixed.saturating_add(needed.saturating_mul(need.kv_block)),
                    available,
                    blocks_that_fit: if fits < least { 0 } else { fits },
                    plan: Box::new(plan),
                })
            }
            _ => Ok(plan),
        }
    }

    /// Bytes in all, the reserve not counted.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes
            .saturating_add(self.kv_bytes)
            .saturating_add(self.workspace_bytes)
            .saturating_add(self.requests_bytes)
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.available_bytes {
            Some(bytes) => writeln!(f, "memory     {} {}", size(bytes), self.source)?,
            None => writeln!(f, "memory     unknown on this system; set memory_bytes")?,
        }
        writeln!(f, "weights    {}", size(self.weights_bytes))?;
        writeln!(
            f,
            "KV cache   {} ({} blocks of {BLOCK} tokens, {} each: {} tokens)",
            size(self.kv_bytes),
            self.kv_blocks,
            size(self.kv_block_bytes),
            self.kv_blocks.saturating_mul(BLOCK)
        )?;
        writeln!(
            f,
            "workspace  {} ({} requests at once, {} prompt tokens a step)",
            size(self.workspace_bytes),
            self.max_batch,
            self.max_prefill
        )?;
        writeln!(f, "requests   {}", size(self.requests_bytes))?;
        writeln!(
            f,
            "left free  {}",
            self.available_bytes.map_or("unknown".into(), |b| {
                size(b.saturating_sub(self.total_bytes()))
            })
        )?;
        let threads = match self.threads > self.processors {
            true => format!(
                "{}, more than the {} processors: lower threads",
                self.threads, self.processors
            ),
            false => self.threads.to_string(),
        };
        let context = match self.context < self.model_context {
            true => format!(
                "{} tokens; the model was made for {}, which need {} more blocks",
                self.context,
                self.model_context,
                self.model_context.div_ceil(BLOCK) - self.kv_blocks
            ),
            false => format!("{} tokens, all the model was made for", self.context),
        };
        writeln!(f, "threads    {threads}")?;
        write!(f, "context    {context}")
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["B", "kB", "MB", "GB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_core::Hint;

    const NEED: Need = Need {
        weights: 100_000_000,
        kv_block: 1_000_000,
        workspace: 20_000_000,
        context: 8192,
        threads: 2,
    };

    fn fit(bytes: Option<u64>, config: EngineConfig) -> Result<MemoryPlan, EngineError> {
        let source = match bytes {
            Some(_) => MemorySource::Setting,
            None => MemorySource::Unknown,
        };
        MemoryPlan::fit(NEED, &config, Available { bytes, source })
    }

    #[test]
    fn the_pool_is_fitted_and_capped() {
        let plan = fit(Some(100 << 30), EngineConfig::default()).unwrap();
        assert_eq!((plan.kv_blocks, plan.context), (16 * 256, 8192));
        let plan = fit(Some(300_000_000), EngineConfig::default()).unwrap();
        assert!(plan.total_bytes() <= 300_000_000, "{plan}");
        assert!(plan.total_bytes() > 299_000_000, "a block more would fit");
        assert_eq!(plan.context, plan.kv_blocks * 32);
        assert!(plan.to_string().contains("more blocks"), "{plan}");
        let plan = fit(None, EngineConfig::default()).unwrap();
        assert_eq!(plan.kv_blocks, BLIND_BLOCKS);
        let shown = serde_json::to_value(&plan).unwrap();
        assert_eq!(shown["kv_bytes"], 512_000_000);
        assert_eq!(shown["source"], "unknown");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_next_step() {
        let e = fit(Some(150_000_000), EngineConfig::default()).unwrap_err();
        let EngineError::Memory {
            blocks_that_fit: 0,
            available: 150_000_000,
            ..
        } = &e
        else {
            panic!("{e:?}");
        };
        assert!(e.to_string().contains("150 MB"), "{e}");
        assert!(e.hint().unwrap().contains("smaller"), "{e}");
        let set = EngineConfig {
            kv_blocks: Some(1000),
            ..EngineConfig::default()
        };
        let e = fit(Some(300_000_000), set).unwrap_err();
        let EngineError::Memory {
            blocks_that_fit, ..
        } = e
        else {
            panic!("{e:?}");
        };
        assert!(
            e.hint().unwrap().contains(&format!("{blocks_that_fit}")),
            "{e}"
        );
        let fits = EngineConfig {
            kv_blocks: Some(blocks_that_fit),
            ..set
        };
        assert!(fit(Some(300_000_000), fits).is_ok(), "the hint is true");
        let over = EngineConfig {
            kv_blocks: Some(blocks_that_fit + 1),
            ..set
        };
        assert!(fit(Some(300_000_000), over).is_err(), "and exact");
        let small = EngineConfig {
            kv_blocks: Some(4),
            ..set
        };
        assert!(
            fit(Some(300_000_000), small).is_ok(),
            "a small pool may be asked for"
        );
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in [
            (999, "999 B"),
            (1000, "1.0 kB"),
            (999_600, "1.0 MB"),
            (98_362_432, "98 MB"),
            (6_039_797_760, "6.0 GB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
