//! Matmul, attention, norms, thread pool; a plain reference beside each fast path.
//!
//! The promise of this crate: a row of any result has the same bits whatever
//! other rows are computed with it, on however many threads, on whichever
//! instruction set (but for 16-bit weights on AMX). It is kept by fixing the order of every floating-point
//! operation and writing each fused multiply-add as one. What may not happen
//! here: file formats, model shapes, a sum split by thread or by batch.

mod attention;
mod error;
mod form;
mod isa;
mod matmul;
mod memory;
mod ops;
mod packed;
mod pool;
mod quants;
pub mod sgemm;

pub use attention::{AttentionSpec, KvLayer, KvLayout, KvType, attention};
pub use error::KernelError;
pub use form::{Form, LAYOUT, PIECE};
pub use isa::Isa;
pub use matmul::{matmul, matmul_bytes, matmul_many};
pub use memory::held_bytes;
pub use ops::{
    RopeTable, add, gelu, gelu_tanh, gelu_tanh_mul, layer_norm, rms_norm, rope_halves,
    rope_interleaved, silu_mul, softcap, softmax,
};
pub use packed::{PackedMatrix, Runs};
pub use pool::Pool;
pub use quants::{dequantize, quantize};
