//! The paged cache of keys and values.

use crate::{BLOCK, Config};
use ashlar_kernels::KvLayout;

/// Keys and values of `blocks` blocks of [`BLOCK`] positions, for all layers.
/// Which sequence owns which block is the caller's to keep.
pub struct KvCache {
    pub(crate) layout: KvLayout,
    pub(crate) blocks: usize,
    /// One entry a layer: all keys, all values.
    pub(crate) layers: Vec<(Vec<f32>, Vec<f32>)>,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvCache({} blocks)", self.blocks)
    }
}

impl KvCache {
    /// A cache for a model of this configuration. The system hands out the
    /// memory as blocks are first written.
    pub fn new(config: &Config, blocks: usize) -> Self {
        let layout = layout(config);
        let len = blocks * layout.block_len();
        let layers = (0..config.layers).map(|_| (vec![0.0; len], vec![0.0; len])).collect();
        Self { layout, blocks, layers }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(config: &Config) -> usize {
        config.layers * 2 * 4 * BLOCK * config.kv_heads * config.head_dim
    }
}

pub(crate) fn layout(config: &Config) -> KvLayout {
    KvLayout { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
}
