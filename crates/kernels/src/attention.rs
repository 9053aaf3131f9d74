//! Causal attention over a paged cache.
//!
//! A query head walks its sequence's blocks in ascending order with a running
//! (maximum, sum, weighted values) triple (Milakov and Gimelshein 2018; Dao et
//! al. 2022), always a block of 32 positions at a time. The steps depend on the
//! position alone, so neither batching nor the cut of a prompt changes a bit.
//!
//! In a block, keys lie `[head_dim][32]` so that 32 scores build up side by side
//! with no sum across lanes; values lie `[32][head_dim]`. Rejected for now:
//! 16-bit caches, which halve the memory but need a conversion a read.

use crate::{Isa, Pool, isa::tiered, ops};

/// Positions in a block.
const BLOCK: usize = 32;
/// The widest head; the running sum lives on the stack.
const MAX_HEAD: usize = 256;

/// Where one layer's keys and values lie.
#[derive(Debug, Clone, Copy)]
pub struct KvLayout {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values a head, at most 256.
    pub head_dim: usize,
}

impl KvLayout {
    /// Floats of one layer's keys (or values) in one block of 32 positions.
    pub const fn block_len(&self) -> usize {
        BLOCK * self.kv_heads * self.head_dim
    }
}

/// How scores become weights; what varies from architecture to architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Scores are multiplied by this, usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// A row sees this many positions back, its own included; `None` is all.
    pub window: Option<usize>,
    /// Scaled scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Slope of each query head: a key at distance d gets `-slope * d` added
    /// (ALiBi, Press et al. 2022).
    pub alibi: Option<Vec<f32>>,
}

/// Writes one position's key and value rows (`kv_heads * head_dim`) to `slot`
/// of block `block` of a layer.
///
/// # Panics
/// When the block is beyond the cache or `slot` beyond the block.
pub fn store_kv(
    layout: &KvLayout,
    keys: &mut [f32],
    values: &mut [f32],
    block: u32,
    slot: usize,
    key: &[f32],
    value: &[f32],
) {
    assert!(slot < BLOCK, "slot {slot} of {BLOCK}");
    let (len, dim) = (layout.block_len(), layout.head_dim);
    let keys = &mut keys[block as usize * len..][..len];
    let values = &mut values[block as usize * len..][..len];
    for h in 0..layout.kv_heads {
        let (to_k, to_v) = (&mut keys[h * BLOCK * dim..], &mut values[h * BLOCK * dim..]);
        for (d, k) in key[h * dim..][..dim].iter().enumerate() {
            to_k[d * BLOCK + slot] = *k;
        }
        to_v[slot * dim..][..dim].copy_from_slice(&value[h * dim..][..dim]);
    }
}

/// Attention of query rows (`heads * head_dim` each) over one layer's cache.
///
/// `row(i)` gives row i's page table and how many positions it sees, its own
/// included.
///
/// # Panics
/// When a page lies beyond the cache, or a row sees more than its pages hold.
#[allow(clippy::too_many_arguments)]
pub fn attention<'a>(
    pool: &Pool,
    layout: &KvLayout,
    spec: &AttentionSpec,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    row: impl Fn(usize) -> (&'a [u32], usize) + Sync,
    out: &mut [f32],
) {
    attention_on(Isa::active(), pool, layout, spec, q, keys, values, row, out);
}

#[allow(clippy::too_many_arguments)]
fn attention_on<'a>(
    isa: Isa,
    pool: &Pool,
    layout: &KvLayout,
    spec: &AttentionSpec,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    row: impl Fn(usize) -> (&'a [u32], usize) + Sync,
    out: &mut [f32],
) {
    let dim = layout.head_dim;
    assert!(dim <= MAX_HEAD, "head of {dim}, at most {MAX_HEAD}");
    assert_eq!(q.len(), out.len(), "queries and result");
    pool.chunks_mut(out, dim, |task, out| {
        let (i, head) = (task / layout.heads, task % layout.heads);
        let (pages, seen) = row(i);
        let kv_head = head / (layout.heads / layout.kv_heads);
        let slope = spec.alibi.as_ref().map_or(0.0, |slopes| slopes[head]);
        one_head(isa, layout, spec, slope, kv_head, &q[task * dim..][..dim], keys, values, pages, seen, out);
    });
}

tiered! {
    fn one_head(
        layout: &KvLayout, spec: &AttentionSpec, slope: f32, kv_head: usize, q: &[f32], keys: &[f32], values: &[f32],
        pages: &[u32], seen: usize, out: &mut [f32],
    ) = one_head_body;
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn one_head_body(
    layout: &KvLayout,
    spec: &AttentionSpec,
    slope: f32,
    kv_head: usize,
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    pages: &[u32],
    seen: usize,
    out: &mut [f32],
) {
    let dim = q.len();
    // The first position seen.
    let from = spec.window.map_or(0, |w| seen.saturating_sub(w));
    let mut sums = [0f32; MAX_HEAD];
    let (mut top, mut total) = (f32::NEG_INFINITY, 0f32);
    for (index, &page) in pages[..seen.div_ceil(BLOCK)].iter().enumerate().skip(from / BLOCK) {
        let at = page as usize * layout.block_len() + kv_head * BLOCK * dim;
        let (k, _) = keys[at..][..BLOCK * dim].as_chunks::<BLOCK>();
        let v = &values[at..][..BLOCK * dim];
        let count = (seen - index * BLOCK).min(BLOCK);
        let mut s = [0f32; BLOCK];
        for (q, k) in q.iter().zip(k) {
            for (s, k) in s.iter_mut().zip(k) {
                *s = q.mul_add(*k, *s);
            }
        }
        s.iter_mut().for_each(|s| *s *= spec.scale);
        if let Some(cap) = spec.softcap {
            s.iter_mut().for_each(|s| *s = cap * ops::tanh(*s / cap));
        }
        if slope != 0.0 {
            let distance = (seen - 1) as f32 - (index * BLOCK) as f32;
            for (i, s) in s.iter_mut().enumerate() {
                *s -= slope * (distance - i as f32);
            }
        }
        let first = from.saturating_sub(index * BLOCK);
        let mut high = top;
        for (i, s) in s.iter_mut().enumerate() {
            *s = if (first..count).contains(&i) { *s } else { f32::NEG_INFINITY };
            high = if *s > high { *s } else { high };
        }
        let shrink = ops::exp(top - high);
        top = high;
        let mut part = [0f32; 8];
        for s in s.as_chunks_mut::<8>().0 {
            for (p, s) in part.iter_mut().zip(s) {
                *s = ops::exp(*s - high);
                *p += *s;
            }
        }
        total = total.mul_add(shrink, part.iter().sum::<f32>());
        for (c, sums) in sums[..dim].chunks_mut(64).enumerate() {
            weigh(sums, &s[..count], &v[c * 64..], dim, shrink);
        }
    }
    let inverse = 1.0 / total;
    for (o, s) in out.iter_mut().zip(sums) {
        *o = s * inverse;
    }
}

/// `sums = sums * shrink + Σ weights[j] * v[j * stride ..]`, up to 64 sums.
#[inline(always)]
fn weigh(sums: &mut [f32], weights: &[f32], v: &[f32], stride: usize, shrink: f32) {
    if let Ok(sums) = <&mut [f32; 64]>::try_from(&mut *sums) {
        // A copy of known length stays in registers.
        let mut acc = *sums;
        acc.iter_mut().for_each(|a| *a *= shrink);
        for (j, w) in weights.iter().enumerate() {
            if let Some(v) = v[j * stride..].first_chunk::<64>() {
                for (a, v) in acc.iter_mut().zip(v) {
                    *a = w.mul_add(*v, *a);
                }
            }
        }
        *sums = acc;
    } else {
        sums.iter_mut().for_each(|a| *a *= shrink);
        for (j, w) in weights.iter().enumerate() {
            for (a, v) in sums.iter_mut().zip(&v[j * stride..]) {
                *a = w.mul_add(*v, *a);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn every_tier_equals_plain_attention(
            seen in 1usize..100, wide in 0usize..3, shift in 0u32..7, seed in 1u32..1000, window in 0usize..100,
        ) {
            let layout = KvLayout { heads: 6, kv_heads: 2, head_dim: [8, 64, 80][wide] };
            let dim = layout.head_dim;
            let odd = window % 2 == 1;
            let spec = AttentionSpec {
                scale: 1.0 / (dim as f32).sqrt(),
                window: (window > 0).then_some(window),
                softcap: odd.then_some(2.0),
                alibi: odd.then(|| (0..6).map(|h| 0.1 * h as f32).collect()),
            };
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_mul(seed) >> 16) as f32 / 32768.0 - 1.0;
            let (mut keys, mut values) = (vec![9.0; 7 * layout.block_len()], vec![9.0; 7 * layout.block_len()]);
            let pages: Vec<u32> = (0..7).map(|i| (i * 3 + shift) % 7).collect();
            let kv = 2 * dim;
            let rows: Vec<f32> = (0..seen * kv * 2).map(value).collect();
            let (ks, vs) = rows.split_at(seen * kv);
            for p in 0..seen {
                store_kv(&layout, &mut keys, &mut values, pages[p / 32], p % 32, &ks[p * kv..][..kv], &vs[p * kv..][..kv]);
            }
            let q: Vec<f32> = (0..6 * dim).map(|i| value(i + 77) * 3.0).collect();
            let mut want = vec![0.0; q.len()];
            attention_on(Isa::Reference, &Pool::new(1), &layout, &spec, &q, &keys, &values, |_| (&pages, seen), &mut want);
            for h in 0..6 {
                let at = h / 3 * dim;
                let dot = |p: usize| (0..dim).map(|d| f64::from(q[h * dim + d] * ks[p * kv + at + d])).sum::<f64>() / (dim as f64).sqrt();
                let score = |p: usize| match odd {
                    true => 2.0 * (dot(p) / 2.0).tanh() - 0.1 * h as f64 * (seen - 1 - p) as f64,
                    false => dot(p),
                };
                let far = |p: usize| window > 0 && p + window < seen;
                let weights: Vec<f64> = (0..seen).map(|p| if far(p) { 0.0 } else { score(p).exp() }).collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let plain: f64 = (0..seen).map(|p| weights[p] * f64::from(vs[p * kv + at + d])).sum::<f64>() / total;
                    prop_assert!((f64::from(want[h * dim + d]) - plain).abs() < 1e-4);
                }
            }
            for isa in Isa::available() {
                let mut got = vec![0.0; q.len()];
                attention_on(isa, &Pool::new(2), &layout, &spec, &q, &keys, &values, |_| (&pages, seen), &mut got);
                prop_assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa:?}");
            }
        }
    }
}
