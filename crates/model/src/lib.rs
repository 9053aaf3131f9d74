//! Architectures, weights and the inference forward pass.
//!
//! What may not happen here: scheduling, sampling, text. A row of logits depends
//! on its own sequence alone; `kernels` keeps that promise bit for bit, and
//! nothing here sums across rows.

mod arch;
mod cache;
mod config;
mod encoder;
mod error;
mod file;
mod ffn;
mod footprint;
mod forward;
mod keys;
mod load;
mod packed;
mod quantized;
mod rope;
mod source;
mod weights;

pub use ashlar_formats as formats;
pub use ashlar_kernels::{KvType, Pool, held_bytes};
pub use cache::KvCache;
pub use config::{Activation, Config, Experts, Order, QkNorm};
pub use encoder::{Encoder, Pooling};
pub use error::ModelError;
pub use file::GgufFile;
pub use footprint::{tables_bytes, workspace_bytes};
pub use forward::{Item, Logits, Want, Workspace};
pub use load::Model;
pub use packed::PackedCache;
pub use rope::Rope;
pub use source::{TensorSize, tensor_sizes};
pub use weights::{LayerWeights, Weights};

/// Tokens in a block of the KV cache.
pub const BLOCK: usize = 32;
