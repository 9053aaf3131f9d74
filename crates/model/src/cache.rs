//! The paged cache of keys and values.

use crate::Config;
use ashlar_kernels::{KvLayer, KvLayout, KvType};

/// Keys and values of `blocks` blocks of [`crate::BLOCK`] positions, for all layers.
/// Which sequence owns which block is the caller's to keep.
pub struct KvCache {
    pub(crate) layout: KvLayout,
    pub(crate) blocks: usize,
    pub(crate) layers: Vec<KvLayer>,
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvCache({} blocks of {})", self.blocks, self.layout.dtype.name())
    }
}

impl KvCache {
    /// A cache of 16-bit floats for a model of this configuration. The system
    /// hands out the memory as blocks are first written.
    pub fn new(config: &Config, blocks: usize) -> Self {
        Self::of(config, blocks, KvType::default())
    }

    /// [`KvCache::new`] with keys and values kept as `dtype`.
    ///
    /// # Panics
    /// When the type is int8 and the heads are not a multiple of four wide.
    pub fn of(config: &Config, blocks: usize, dtype: KvType) -> Self {
        let layout = layout(config, dtype);
        let layers = (0..config.layers).map(|_| KvLayer::new(layout, blocks)).collect();
        Self { layout, blocks, layers }
    }

    /// Blocks in all.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(config: &Config, dtype: KvType) -> usize {
        config.layers * layout(config, dtype).block_bytes()
    }
}

pub(crate) fn layout(config: &Config, dtype: KvType) -> KvLayout {
    let Config { heads, kv_heads, head_dim, .. } = *config;
    KvLayout { heads, kv_heads, head_dim, dtype }
}
