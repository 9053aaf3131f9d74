//! How much memory a step takes, reckoned before the first one.
//!
//! What may not happen here: an estimate that is too low. `tests/footprint.rs`
//! holds it against what the allocator hands out, so a buffer added to the
//! forward pass or to a kernel must be added here.

use crate::{Config, Order, QkNorm};
use ashlar_kernels::matmul_bytes;

/// Bytes of the buffers of one step of at most `rows` tokens that wants the
/// logits of at most `wanted` of them, on `threads` threads: those of
/// [`crate::Workspace`], the matmul's and attention's. Buffers that grew from step
/// to step may take twice that, for vectors grow by doubling.
pub fn workspace_bytes(config: &Config, rows: usize, wanted: usize, threads: usize) -> usize {
    let c = config;
    let (wide, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let most = rows.max(wanted);
    let floats = most * c.hidden // norms
        + rows * 2 * c.hidden // the stream and what is added to it
        + rows * (wide + 2 * kv + 2 * c.ffn) // queries, keys, values, gate, up
        + (rows * wide).max(wanted * c.hidden) // attention's output, then the wanted rows
        + wanted * c.vocab;
    let widest = wide.max(c.ffn).max(c.hidden);
    let experts = c.experts.as_ref().map_or(0, |e| {
        // What goes to the experts and comes back, slot by slot; the scores.
        rows * (e.used * (2 * c.hidden + c.ffn) + c.hidden + e.count + 8 * e.used)
    });
    let products = matmul_bytes(most, widest, threads);
    // Each thread's block of keys and values as floats, and the sums of a tile's
    // vectors.
    let group = c.heads / c.kv_heads;
    let vectors = group * rows.min((48 / group).clamp(1, 16));
    let attention = threads * (2 * 32 * 4 * c.head_dim + vectors * (5 * c.head_dim + 72));
    // Splits of 512 positions that several threads share, fewer than two tiles a
    // thread.
    let shared = if threads > 1 { 2 * threads * c.context.div_ceil(512) } else { 0 };
    let attention = attention + shared * vectors * (4 * c.head_dim + 8);
    // Grown item by item, hence up to twice as long as they need be.
    let lists = 2 * (rows * 16 + wanted * 8 + rows * 4);
    // The smallest vectors are longer than they need be.
    4 * (floats + experts) + products + attention + lists + 1024
}

/// Bytes a loaded model takes beside its matrices ([`crate::Model::bytes`]) at
/// most: gains of the norms, the rotary angles of the whole context.
pub fn tables_bytes(config: &Config) -> usize {
    let c = config;
    let (wide, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let norms = if c.order == Order::Sandwich { 4 } else { 2 } * c.hidden;
    let heads = match c.qk_norm {
        None => 0,
        Some(QkNorm::Head) => 2 * c.head_dim,
        Some(QkNorm::Width) => wide + kv,
    };
    let biases = [(c.qkv_bias, wide + 2 * kv), (c.o_bias, c.hidden), (c.ffn_bias, 2 * c.ffn + c.hidden)];
    let biases: usize = biases.iter().filter(|b| b.0).map(|b| b.1).sum();
    let gains = c.layers * (norms + heads) + (1 + usize::from(c.embedding_norm)) * c.hidden;
    // A layer norm has as many biases as gains.
    let gains = gains * if c.layer_norm { 2 } else { 1 };
    let slopes = if c.alibi { c.layers * c.heads } else { 0 };
    let angles = [&c.rope, &c.local_rope].into_iter().flatten().map(|r| c.context * r.dim).sum::<usize>();
    4 * (gains + c.layers * biases + slopes + angles)
}
