//! How much memory a step takes, reckoned before the first one.
//!
//! What may not happen here: an estimate that is too low. `tests/footprint.rs`
//! holds it against what the allocator hands out, so a buffer added to the
//! forward pass or to a kernel must be added here.

use crate::Config;

/// Bytes of the buffers of one step of at most `rows` tokens that wants the
/// logits of at most `wanted` of them: those of [`crate::Workspace`] and the
/// matmul's quantized activations. Buffers that grew from step to step may
/// take twice that, for vectors grow by doubling.
pub fn workspace_bytes(config: &Config, rows: usize, wanted: usize) -> usize {
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
    // A code a value; a scale, a scaled sum and two sums for each 32 of them.
    let codes = most * widest;
    let scales = codes.div_ceil(32) * 16;
    // A block of keys and values as floats, and the sums of a tile's vectors,
    // for the splits of a context too.
    let group = c.heads / c.kv_heads;
    let vectors = group * rows.min((48 / group).clamp(1, 16));
    let attention = 2 * 32 * 4 * c.head_dim + vectors * (5 * c.head_dim + 64);
    // Grown item by item, hence up to twice as long as they need be.
    let lists = 2 * (rows * 16 + wanted * 8 + rows * 4);
    // The smallest vectors are longer than they need be.
    4 * (floats + experts) + codes + scales + attention + lists + 1024
}

/// Bytes a loaded model takes beside its matrices ([`crate::Model::bytes`]) at
/// most: gains of the norms, the rotary angles of the whole context.
pub fn tables_bytes(config: &Config) -> usize {
    let c = config;
    4 * ((2 * c.layers + 1) * c.hidden + c.context * c.head_dim)
}
