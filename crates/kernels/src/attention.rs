//! Causal attention over a paged cache.
//!
//! A query head walks the blocks of 32 positions it sees in ascending order with
//! a running (maximum, sum, weighted values) triple (Milakov and Gimelshein 2018;
//! Dao et al. 2022). Every [`SPLIT`] positions a new triple begins; triples are
//! merged in ascending order. The steps depend on the position alone, so neither
//! batching, nor the cut of a prompt, nor how many threads share a long context
//! changes a bit. Query heads that share keys, and neighbouring rows, meet a
//! block together, so that it is unpacked once.
//!
//! Keys and values are kept as 16-bit floats or as int8 with a scale a position
//! and head. With int8, scores are exact integers times scales; a block's weights
//! (probability × value scale) become 8-bit codes of the block's largest.
//!
//! In a block, keys lie `[head_dim][32]` (int8: `[head_dim/4][32][4]`) so that 32
//! scores build up side by side with no sum across lanes; values lie
//! `[32][head_dim]` (int8: `[8][head_dim][4]`). Rejected: a mask matrix; the range
//! of positions a row sees says it all.

#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::{Isa, Pool, isa::tiered, memory::Bytes, ops, pool::SendPtr};
use half::{bf16, f16};
use std::{cell::RefCell, ops::Range};

/// Positions in a block.
const BLOCK: usize = 32;
/// Positions a triple runs over.
const SPLIT: usize = 512;
/// Query vectors that meet a block together, about.
const TILE: usize = 48;

/// How keys and values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvType {
    /// IEEE half precision.
    #[default]
    F16,
    /// The upper half of `f32`.
    BF16,
    /// As computed.
    F32,
    /// Signed bytes with a scale for each position and head; heads a multiple
    /// of four wide.
    Int8,
}

impl KvType {
    /// Every type.
    pub const ALL: [Self; 4] = [Self::F16, Self::BF16, Self::F32, Self::Int8];

    /// The name settings use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// Where one layer's keys and values lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Values a head.
    pub head_dim: usize,
    /// How they are kept.
    pub dtype: KvType,
}

impl KvLayout {
    /// Bytes of one head's keys in a block, or of its values.
    const fn part_bytes(&self) -> usize {
        match self.dtype {
            KvType::F16 | KvType::BF16 => BLOCK * self.head_dim * 2,
            KvType::F32 => BLOCK * self.head_dim * 4,
            KvType::Int8 => BLOCK * self.head_dim + BLOCK * 4,
        }
    }

    /// Bytes of one layer's keys and values in one block of 32 positions.
    pub const fn block_bytes(&self) -> usize {
        2 * self.kv_heads * self.part_bytes()
    }

    /// Where head `h`'s keys (or values) of a block begin.
    const fn at(&self, block: u32, h: usize, values: bool) -> usize {
        block as usize * self.block_bytes() + (2 * h + values as usize) * self.part_bytes()
    }
}

/// One layer's keys and values, in blocks of 32 positions.
pub struct KvLayer {
    layout: KvLayout,
    data: Bytes,
}

impl std::fmt::Debug for KvLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvLayer({:?}, {} bytes)", self.layout, self.data.len())
    }
}

impl KvLayer {
    /// Room for `blocks` blocks, all zero.
    ///
    /// # Panics
    /// When the type is int8 and the heads are not a multiple of four wide.
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        let whole = layout.dtype != KvType::Int8 || layout.head_dim.is_multiple_of(4);
        assert!(whole, "int8 heads of {}", layout.head_dim);
        Self { layout, data: Bytes::zeroed(blocks * layout.block_bytes()) }
    }

    /// Writes the keys and values of some rows (`kv_heads * head_dim` each) to
    /// the block and slot that `place` gives for each.
    ///
    /// # Panics
    /// When a block is beyond the cache or a slot beyond the block.
    pub fn store(
        &mut self,
        pool: &Pool,
        keys: &[f32],
        values: &[f32],
        place: impl Fn(usize) -> (u32, usize) + Sync,
    ) {
        let layout = self.layout;
        let (dim, width) = (layout.head_dim, layout.kv_heads * layout.head_dim);
        let (len, base) = (self.data.len(), SendPtr(self.data.as_mut_ptr()));
        let body = |task: usize, _: usize| {
            let (h, is_value) = (task / 2, task % 2 == 1);
            let rows = if is_value { values } else { keys };
            for (i, row) in rows.chunks_exact(width).enumerate() {
                let (block, slot) = place(i);
                let (at, bytes) = (layout.at(block, h, is_value), layout.part_bytes());
                assert!(slot < BLOCK && at + bytes <= len, "slot {slot} of block {block}");
                // SAFETY: inside the data, and this task alone has this part of
                // this head.
                let part = unsafe { std::slice::from_raw_parts_mut(base.get().add(at), bytes) };
                store_part(layout, is_value, part, slot, &row[h * dim..][..dim]);
            }
        };
        // A few rows are written sooner than a thread wakes.
        if keys.len() < 16 * width {
            (0..2 * layout.kv_heads).for_each(|task| body(task, 0));
        } else {
            pool.run(2 * layout.kv_heads, body);
        }
    }
}

/// Writes one position of one head's keys or values.
fn store_part(layout: KvLayout, is_value: bool, part: &mut [u8], slot: usize, row: &[f32]) {
    let dim = layout.head_dim;
    let index = |d: usize| if is_value { slot * dim + d } else { d * BLOCK + slot };
    match layout.dtype {
        KvType::F16 => row.iter().enumerate().for_each(|(d, v)| {
            // A finite value stays one: an infinity times a weight of 0 would not be 0.
            let v = f16::from_f32(v.clamp(-65504.0, 65504.0));
            part[index(d) * 2..][..2].copy_from_slice(&v.to_le_bytes());
        }),
        KvType::BF16 => row.iter().enumerate().for_each(|(d, v)| {
            part[index(d) * 2..][..2].copy_from_slice(&bf16::from_f32(*v).to_le_bytes());
        }),
        KvType::F32 => row.iter().enumerate().for_each(|(d, v)| {
            part[index(d) * 4..][..4].copy_from_slice(&v.to_le_bytes());
        }),
        KvType::Int8 => {
            let (codes, scales) = part.split_at_mut(BLOCK * dim);
            let scale = quantize(row, |d, code| {
                let at = if is_value { (slot / 4 * dim + d) * 4 + slot % 4 } else { (d / 4 * BLOCK + slot) * 4 + d % 4 };
                // Keys are kept unsigned, as the byte dot product wants one side.
                codes[at] = code as u8 ^ if is_value { 0 } else { 0x80 };
            });
            scales[slot * 4..][..4].copy_from_slice(&scale.to_le_bytes());
        }
    }
}

/// Hands over the int8 codes of a row; the value of a code of 1.
#[inline(always)]
fn quantize(row: &[f32], mut put: impl FnMut(usize, i8)) -> f32 {
    let top = row.iter().fold(0f32, |a, v| if v.abs() > a { v.abs() } else { a });
    let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
    for (d, v) in row.iter().enumerate() {
        // Adding 1.5·2²³ rounds to an integer, ties to even, in the low bits.
        let code = (v * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
        put(d, code.clamp(-127, 127) as i8);
    }
    top / 127.0
}

/// What attention does to scores, and which positions a row sees.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Multiplies each score.
    pub scale: f32,
    /// How many positions a row sees at most, its own included.
    pub window: Option<usize>,
    /// Scores become `cap * tanh(score / cap)`.
    pub softcap: Option<f32>,
    /// Per query head, added to a score for each position that the key lies
    /// behind, negative (ALiBi, Press et al. 2022).
    pub alibi: Option<Vec<f32>>,
}

impl AttentionSpec {
    /// Plain causal attention scaled by `1/sqrt(head_dim)`.
    pub fn causal(head_dim: usize) -> Self {
        Self { scale: 1.0 / (head_dim as f32).sqrt(), window: None, softcap: None, alibi: None }
    }
}

/// The running triple of one query vector; its weighted values lie beside.
#[derive(Debug, Clone, Copy)]
struct Triple {
    top: f32,
    total: f32,
}

const EMPTY: Triple = Triple { top: f32::NEG_INFINITY, total: 0.0 };

/// One query vector of a tile.
#[derive(Debug, Clone, Copy)]
struct Vector {
    row: usize,
    head: usize,
    /// Positions it sees.
    sees: (usize, usize),
    /// Int8: value of a code of 1, times the spec's scale; and the sum of codes.
    scale: f32,
    sum: i32,
}

/// Buffers of one tile.
#[derive(Default)]
struct Scratch {
    /// A block as floats: `[head_dim][32]`, `[32][head_dim]`.
    keys: Vec<f32>,
    values: Vec<f32>,
    vectors: Vec<Vector>,
    /// `[vectors][head_dim]`.
    codes: Vec<i8>,
    /// Of the split at hand.
    triples: Vec<Triple>,
    /// Of all splits so far.
    wholes: Vec<Triple>,
    /// `[vectors][head_dim]`, of the split at hand.
    sums: Vec<f32>,
    active: Vec<usize>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Rows that see the same pages, met together.
struct Tile<'a> {
    rows: Range<usize>,
    pages: &'a [u32],
}

/// Attention of query rows (`heads * head_dim` each) over one layer's cache.
///
/// `row(i)` gives row i's page table and how many positions it sees, its own
/// included.
///
/// # Panics
/// When a page lies beyond the cache, or a row sees more than its pages hold.
pub fn attention<'a>(
    pool: &Pool,
    spec: &AttentionSpec,
    q: &[f32],
    layer: &KvLayer,
    row: impl Fn(usize) -> (&'a [u32], usize) + Sync,
    out: &mut [f32],
) {
    attention_on(Isa::active(), pool, spec, q, layer, row, out);
}

fn attention_on<'a>(
    isa: Isa,
    pool: &Pool,
    spec: &AttentionSpec,
    q: &[f32],
    layer: &KvLayer,
    row: impl Fn(usize) -> (&'a [u32], usize) + Sync,
    out: &mut [f32],
) {
    let l = &layer.layout;
    let width = l.heads * l.head_dim;
    assert_eq!(q.len(), out.len(), "queries and result");
    assert!(spec.alibi.as_ref().is_none_or(|a| a.len() == l.heads), "one slope a head");
    let m = q.len() / width;
    let group = l.heads / l.kv_heads;
    let most = (TILE / group).clamp(1, 16);
    let mut tiles: Vec<Tile<'a>> = Vec::new();
    for i in 0..m {
        let pages = row(i).0;
        match tiles.last_mut() {
            Some(t) if std::ptr::eq(t.pages.as_ptr(), pages.as_ptr()) && t.rows.len() < most => t.rows.end += 1,
            _ => tiles.push(Tile { rows: i..i + 1, pages }),
        }
    }
    let held = layer.data.len() / l.block_bytes();
    let seen_by = |tile: &Tile| tile.rows.clone().map(|i| row(i).1).max().unwrap_or(0);
    for tile in &tiles {
        let (seen, pages) = (seen_by(tile), tile.pages);
        assert!(seen <= pages.len() * BLOCK, "{seen} positions on {} pages", pages.len());
        let used = &pages[..seen.div_ceil(BLOCK)];
        assert!(used.iter().all(|&p| (p as usize) < held), "a page beyond {held}");
    }
    let see = |i: usize| {
        let seen = row(i).1;
        (spec.window.map_or(0, |w| seen.saturating_sub(w)), seen)
    };
    let job = Job { spec, q, layer, see: &see };
    let heads = l.kv_heads;
    let pairs = tiles.len() * heads;
    let splits = tiles.iter().map(|t| seen_by(t).div_ceil(SPLIT)).max().unwrap_or(0);
    // Where a tile's vector `v` of key head `head` is written.
    let place = |tile: &Tile, head: usize, v: usize| {
        (tile.rows.start + v / group) * width + (head * group + v % group) * l.head_dim
    };
    // Few tiles and a long context: the splits are shared out too.
    if pairs < 2 * pool.threads() && splits > 1 && pool.threads() > 1 {
        let stride = tiles.iter().map(|t| t.rows.len()).max().unwrap_or(0) * group;
        let mut triples = vec![EMPTY; pairs * splits * stride];
        let mut sums = vec![0f32; triples.len() * l.head_dim];
        let (at_triples, at_sums) = (SendPtr(triples.as_mut_ptr()), SendPtr(sums.as_mut_ptr()));
        pool.run(pairs * splits, |task, _| {
            let (tile, head) = (&tiles[task / splits / heads], task / splits % heads);
            SCRATCH.with_borrow_mut(|s| {
                job.prepare(tile, head, s);
                job.split(isa, tile, head, task % splits, s);
                // SAFETY: each task has `stride` vectors of its own, and a tile
                // has no more.
                unsafe {
                    let to = at_triples.get().add(task * stride);
                    to.copy_from_nonoverlapping(s.triples.as_ptr(), s.triples.len());
                    let to = at_sums.get().add(task * stride * l.head_dim);
                    to.copy_from_nonoverlapping(s.sums.as_ptr(), s.sums.len());
                }
            });
        });
        for pair in 0..pairs {
            let (tile, head) = (&tiles[pair / heads], pair % heads);
            for v in 0..tile.rows.len() * group {
                let out = &mut out[place(tile, head, v)..][..l.head_dim];
                let mut whole = EMPTY;
                for split in 0..splits {
                    let at = (pair * splits + split) * stride + v;
                    join(&mut whole, out, triples[at], &sums[at * l.head_dim..][..l.head_dim]);
                }
                divide(out, whole);
            }
        }
        return;
    }
    let base = SendPtr(out.as_mut_ptr());
    pool.run(pairs, |task, _| {
        let (tile, head) = (&tiles[task / heads], task % heads);
        SCRATCH.with_borrow_mut(|s| {
            job.prepare(tile, head, s);
            // SAFETY: inside `out`; this task alone has these rows of this head.
            let out = |v: usize| unsafe {
                std::slice::from_raw_parts_mut(base.get().add(place(tile, head, v)), l.head_dim)
            };
            s.wholes.clear();
            s.wholes.resize(s.vectors.len(), EMPTY);
            for split in 0..seen_by(tile).div_ceil(SPLIT) {
                job.split(isa, tile, head, split, s);
                for (v, whole) in s.wholes.iter_mut().enumerate() {
                    join(whole, out(v), s.triples[v], &s.sums[v * l.head_dim..][..l.head_dim]);
                }
            }
            s.wholes.iter().enumerate().for_each(|(v, whole)| divide(out(v), *whole));
        });
    });
}

/// Adds the next split's triple to those before it, whose sums are in `out`.
fn join(whole: &mut Triple, out: &mut [f32], part: Triple, sums: &[f32]) {
    if part.total == 0.0 {
        return;
    }
    if whole.total == 0.0 {
        *whole = part;
        out.copy_from_slice(sums);
        return;
    }
    let top = if part.top > whole.top { part.top } else { whole.top };
    let (a, b) = (ops::exp(whole.top - top), ops::exp(part.top - top));
    *whole = Triple { top, total: (whole.total * a) + part.total * b };
    for (o, s) in out.iter_mut().zip(sums) {
        *o = (*o * a) + s * b;
    }
}

/// Weighted values over the sum of weights.
fn divide(out: &mut [f32], whole: Triple) {
    let inverse = 1.0 / whole.total;
    out.iter_mut().for_each(|o| *o *= inverse);
}

struct Job<'a> {
    spec: &'a AttentionSpec,
    q: &'a [f32],
    layer: &'a KvLayer,
    /// Positions a row sees.
    see: &'a (dyn Fn(usize) -> (usize, usize) + Sync),
}

impl Job<'_> {
    /// Lists the tile's query vectors of key head `head`.
    fn prepare(&self, tile: &Tile, head: usize, s: &mut Scratch) {
        let l = &self.layer.layout;
        let (dim, group) = (l.head_dim, l.heads / l.kv_heads);
        let int8 = l.dtype == KvType::Int8;
        s.vectors.clear();
        s.codes.clear();
        for row in tile.rows.clone() {
            for head in head * group..(head + 1) * group {
                let mut v = Vector { row, head, sees: (self.see)(row), scale: self.spec.scale, sum: 0 };
                if int8 {
                    let (codes, sum) = (&mut s.codes, &mut v.sum);
                    let unit = quantize(&self.q[(row * l.heads + head) * dim..][..dim], |_, code| {
                        codes.push(code);
                        *sum += i32::from(code);
                    });
                    v.scale *= unit;
                }
                s.vectors.push(v);
            }
        }
        s.keys.resize(dim * BLOCK, 0.0);
        s.values.resize(dim * BLOCK, 0.0);
    }

    /// The triples of the tile's vectors over one split.
    fn split(&self, isa: Isa, tile: &Tile, head: usize, split: usize, s: &mut Scratch) {
        let dim = self.layer.layout.head_dim;
        s.triples.clear();
        s.triples.resize(s.vectors.len(), EMPTY);
        s.sums.clear();
        s.sums.resize(s.vectors.len() * dim, 0.0);
        let first = s.vectors.iter().map(|v| v.sees.0).min().unwrap_or(0).max(split * SPLIT) / BLOCK;
        let last = s.vectors.iter().map(|v| v.sees.1).max().unwrap_or(0).min((split + 1) * SPLIT);
        for block in first..last.div_ceil(BLOCK) {
            let Scratch { active, vectors, .. } = s;
            active.clear();
            let here = |v: &Vector| v.sees.0 < (block + 1) * BLOCK && v.sees.1 > block * BLOCK;
            active.extend((0..vectors.len()).filter(|&v| here(&vectors[v])));
            let page = tile.pages[block];
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::available` found the features.
                Isa::Vnni | Isa::Amx => unsafe { avx512::block(self, head, page, block, s) },
                isa => plain_block(isa, self, head, page, block, s),
            }
        }
    }

    /// One head's keys (or values) of a page.
    #[inline(always)]
    fn part(&self, page: u32, head: usize, values: bool) -> &[u8] {
        let l = &self.layer.layout;
        &self.layer.data[l.at(page, head, values)..][..l.part_bytes()]
    }
}

/// The arithmetic of a block, `R` vectors at once.
trait Arith {
    /// A part of floats as `f32`.
    fn widen(dtype: KvType, part: &[u8], out: &mut [f32]);

    /// `Σ q[d] * keys[d][j]`, each one chain of fused multiply-adds in order of d.
    fn scores<const R: usize>(q: [&[f32]; R], keys: &[f32], out: &mut [[f32; BLOCK]; R]);

    /// Turns scores into `e^(score − high)`, `high` being the largest of them and
    /// of `top`; `high` and their sum, lane by lane joined in halves.
    fn soften(scores: &mut [f32; BLOCK], top: f32) -> (f32, f32);

    /// `sums = sums * shrink`, then for each position in order
    /// `sums = fma(weight, value, sums)`.
    fn weigh<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        weights: &[[f32; BLOCK]; R],
        values: &[f32],
    );

    /// `Σ q[d] * (key[d][j] + 128)` in integers.
    fn dots<const R: usize>(q: [&[i8]; R], keys: &[u8], out: &mut [[i32; BLOCK]; R]);

    /// `out = (dots − shift) * (scales * unit)`; scales are `f32` as bytes.
    fn scale(dots: &[i32; BLOCK], shift: i32, scales: &[u8], unit: f32, out: &mut [f32; BLOCK]);

    /// 8-bit codes of `weights * scales`; the value of a code of 1. A weight of 0
    /// stays 0, whatever its scale.
    fn encode(weights: &[f32; BLOCK], scales: &[u8], codes: &mut [u8; BLOCK]) -> f32;

    /// `sums = fma(Σ code[j] * value[j], unit, sums * shrink)`.
    fn weigh_codes<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        codes: &[[u8; BLOCK]; R],
        unit: [f32; R],
        values: &[u8],
    );
}

/// Plain Rust, also compiled for AVX2.
struct Plain;

impl Arith for Plain {
    #[inline(always)]
    fn widen(dtype: KvType, part: &[u8], out: &mut [f32]) {
        if dtype == KvType::F32 {
            for (o, b) in out.iter_mut().zip(part.as_chunks::<4>().0) {
                *o = f32::from_le_bytes(*b);
            }
            return;
        }
        for (o, b) in out.iter_mut().zip(part.as_chunks::<2>().0) {
            let h = u32::from(u16::from_le_bytes(*b));
            *o = if dtype == KvType::BF16 {
                f32::from_bits(h << 16)
            } else {
                // Exponents are moved by a product, which is exact and takes
                // subnormal numbers along.
                let magnitude = h & 0x7fff;
                let wide = f32::from_bits(magnitude << 13) * f32::from_bits(0x7780_0000);
                let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
                f32::from_bits(wide.to_bits() | special | (h & 0x8000) << 16)
            };
        }
    }

    #[inline(always)]
    fn scores<const R: usize>(q: [&[f32]; R], keys: &[f32], out: &mut [[f32; BLOCK]; R]) {
        for (q, out) in q.into_iter().zip(out) {
            let mut s = [0f32; BLOCK];
            for (q, k) in q.iter().zip(keys.as_chunks::<BLOCK>().0) {
                for (s, k) in s.iter_mut().zip(k) {
                    *s = q.mul_add(*k, *s);
                }
            }
            *out = s;
        }
    }

    #[inline(always)]
    fn soften(scores: &mut [f32; BLOCK], top: f32) -> (f32, f32) {
        let mut tops = [f32::NEG_INFINITY; 16];
        for half in scores.as_chunks::<16>().0 {
            for (t, s) in tops.iter_mut().zip(half) {
                *t = if *s > *t { *s } else { *t };
            }
        }
        let high = tops.iter().fold(top, |a, &b| if b > a { b } else { a });
        for s in scores.iter_mut() {
            *s = ops::exp(*s - high);
        }
        let mut part: [f32; 16] = std::array::from_fn(|j| scores[j] + scores[j + 16]);
        for width in [8, 4, 2, 1] {
            for j in 0..width {
                part[j] += part[j + width];
            }
        }
        (high, part[0])
    }

    #[inline(always)]
    fn weigh<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        weights: &[[f32; BLOCK]; R],
        values: &[f32],
    ) {
        for ((sums, shrink), weights) in sums.into_iter().zip(shrink).zip(weights) {
            sums.iter_mut().for_each(|s| *s *= shrink);
            for (w, v) in weights.iter().zip(values.chunks_exact(sums.len())) {
                for (s, v) in sums.iter_mut().zip(v) {
                    *s = w.mul_add(*v, *s);
                }
            }
        }
    }

    #[inline(always)]
    fn dots<const R: usize>(q: [&[i8]; R], keys: &[u8], out: &mut [[i32; BLOCK]; R]) {
        for (q, out) in q.into_iter().zip(out) {
            *out = [0; BLOCK];
            for (q, k) in q.as_chunks::<4>().0.iter().zip(keys.as_chunks::<{ 4 * BLOCK }>().0) {
                for (o, k) in out.iter_mut().zip(k.as_chunks::<4>().0) {
                    for (q, k) in q.iter().zip(k) {
                        *o += i32::from(*q) * i32::from(*k);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn scale(dots: &[i32; BLOCK], shift: i32, scales: &[u8], unit: f32, out: &mut [f32; BLOCK]) {
        for ((o, d), s) in out.iter_mut().zip(dots).zip(scales.as_chunks::<4>().0) {
            *o = (d - shift) as f32 * (f32::from_le_bytes(*s) * unit);
        }
    }

    #[inline(always)]
    fn encode(weights: &[f32; BLOCK], scales: &[u8], codes: &mut [u8; BLOCK]) -> f32 {
        let mut scaled = [0f32; BLOCK];
        let mut top = 0f32;
        for ((o, w), s) in scaled.iter_mut().zip(weights).zip(scales.as_chunks::<4>().0) {
            *o = if *w > 0.0 { w * f32::from_le_bytes(*s) } else { 0.0 };
            top = if *o > top { *o } else { top };
        }
        let inverse = if top > 0.0 { 255.0 / top } else { 0.0 };
        for (c, s) in codes.iter_mut().zip(scaled) {
            let code = (s * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
            *c = code.clamp(0, 255) as u8;
        }
        top / 255.0
    }

    #[inline(always)]
    fn weigh_codes<const R: usize>(
        sums: [&mut [f32]; R],
        shrink: [f32; R],
        codes: &[[u8; BLOCK]; R],
        unit: [f32; R],
        values: &[u8],
    ) {
        for (i, sums) in sums.into_iter().enumerate() {
            let dim = sums.len();
            for (d, s) in sums.iter_mut().enumerate() {
                let mut dot = 0;
                for (j, c) in codes[i].iter().enumerate() {
                    let v = values[(j / 4 * dim + d) * 4 + j % 4] as i8;
                    dot += i32::from(*c) * i32::from(v);
                }
                *s = (dot as f32).mul_add(unit[i], *s * shrink[i]);
            }
        }
    }
}

tiered! {
    fn plain_block(job: &Job, head: usize, page: u32, block: usize, s: &mut Scratch)
        = block_of::<Plain>;
}

/// Lets the tile's active vectors meet one block.
#[inline(always)]
fn block_of<A: Arith>(job: &Job, head: usize, page: u32, block: usize, s: &mut Scratch) {
    let dtype = job.layer.layout.dtype;
    if dtype != KvType::Int8 {
        A::widen(dtype, job.part(page, head, false), &mut s.keys);
        A::widen(dtype, job.part(page, head, true), &mut s.values);
        // Slots that nobody here sees hold what another sequence left.
        let seen = s.active.iter().map(|&v| s.vectors[v].sees.1).max().unwrap_or(0);
        let unseen = (seen - block * BLOCK).min(BLOCK) * job.layer.layout.head_dim;
        s.values[unseen..].fill(0.0);
    }
    let mut at = 0;
    let left = s.active.len();
    while left - at >= 4 {
        meet::<A, 4>(job, head, page, block, at, s);
        at += 4;
    }
    // A decoded row has as many vectors as heads share keys: one after the other,
    // their few chains would not hide each other's latency.
    match left - at {
        3 => meet::<A, 3>(job, head, page, block, at, s),
        2 => meet::<A, 2>(job, head, page, block, at, s),
        1 => meet::<A, 1>(job, head, page, block, at, s),
        _ => {}
    }
}

#[inline(always)]
fn meet<A: Arith, const R: usize>(
    job: &Job,
    head: usize,
    page: u32,
    block: usize,
    at: usize,
    s: &mut Scratch,
) {
    let l = &job.layer.layout;
    let dim = l.head_dim;
    let Scratch { keys, values, vectors, codes, triples, sums, active, .. } = s;
    let chosen: [usize; R] = std::array::from_fn(|i| active[at + i]);
    let mut scores = [[0f32; BLOCK]; R];
    if l.dtype == KvType::Int8 {
        let (k, scales) = job.part(page, head, false).split_at(BLOCK * dim);
        let mut dots = [[0i32; BLOCK]; R];
        A::dots::<R>(chosen.map(|v| &codes[v * dim..][..dim]), k, &mut dots);
        for i in 0..R {
            let v = &vectors[chosen[i]];
            A::scale(&dots[i], 128 * v.sum, scales, v.scale, &mut scores[i]);
        }
    } else {
        let query = |v: usize| {
            let v = &vectors[v];
            &job.q[(v.row * l.heads + v.head) * dim..][..dim]
        };
        A::scores::<R>(chosen.map(query), keys, &mut scores);
        for i in 0..R {
            scores[i].iter_mut().for_each(|s| *s *= vectors[chosen[i]].scale);
        }
    }
    let mut shrink = [0f32; R];
    for i in 0..R {
        let v = &vectors[chosen[i]];
        let s = &mut scores[i];
        if let Some(cap) = job.spec.softcap {
            s.iter_mut().for_each(|s| *s = cap * ops::tanh(*s / cap));
        }
        if let Some(slopes) = &job.spec.alibi {
            let behind = v.sees.1 as f32 - 1.0 - (block * BLOCK) as f32;
            for (j, s) in s.iter_mut().enumerate() {
                *s -= slopes[v.head] * (behind - j as f32);
            }
        }
        let from = v.sees.0.saturating_sub(block * BLOCK);
        let to = (v.sees.1 - block * BLOCK).min(BLOCK);
        if from > 0 || to < BLOCK {
            for (j, s) in s.iter_mut().enumerate() {
                *s = if j >= from && j < to { *s } else { f32::NEG_INFINITY };
            }
        }
        let triple = &mut triples[chosen[i]];
        let (high, sum) = A::soften(s, triple.top);
        shrink[i] = ops::exp(triple.top - high);
        *triple = Triple { top: high, total: triple.total.mul_add(shrink[i], sum) };
    }
    let base = SendPtr(sums.as_mut_ptr());
    // SAFETY: the chosen vectors are different ones, so their sums are disjoint.
    let sums = chosen.map(|v| unsafe { std::slice::from_raw_parts_mut(base.get().add(v * dim), dim) });
    if l.dtype != KvType::Int8 {
        A::weigh::<R>(sums, shrink, &scores, values);
        return;
    }
    let (v, scales) = job.part(page, head, true).split_at(BLOCK * dim);
    let (mut quantized, mut unit) = ([[0u8; BLOCK]; R], [0f32; R]);
    for i in 0..R {
        unit[i] = A::encode(&scores[i], scales, &mut quantized[i]);
    }
    A::weigh_codes::<R>(sums, shrink, &quantized, unit, v);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_tier_and_tiling_equals_plain_attention(
            seen in 1usize..1200, rows in 1usize..40, wide in 0usize..3, dtype in 0usize..4,
            window in 0usize..3, extra in 0usize..3, seed in 1u32..1000,
        ) {
            let dtype = [KvType::F16, KvType::BF16, KvType::Int8, KvType::F32][dtype];
            let layout = KvLayout { heads: 6, kv_heads: 2, head_dim: [8, 64, 80][wide], dtype };
            let (dim, rows) = (layout.head_dim, rows.min(seen));
            let mut spec = AttentionSpec::causal(dim);
            spec.window = [None, Some(7), Some(100)][window];
            spec.softcap = (extra == 1).then_some(20.0);
            spec.alibi = (extra == 2).then(|| (1..=6).map(|h| 0.5f32.powi(h)).collect());
            let value = |i: usize| ((i as u32).wrapping_mul(2_654_435_761).wrapping_mul(seed) >> 16) as f32 / 32768.0 - 1.0;
            let blocks = seen.div_ceil(BLOCK);
            let mut layer = KvLayer::new(layout, blocks);
            // Another sequence left what it had, which nobody may see.
            let poison = vec![f32::NAN; blocks * BLOCK * 2 * dim];
            layer.store(&Pool::new(1), &poison, &poison, |p| ((p / BLOCK) as u32, p % BLOCK));
            // Pages in another order than the positions.
            let pages: Vec<u32> = (0..blocks as u32).rev().collect();
            let kv = 2 * dim;
            let all: Vec<f32> = (0..seen * kv * 2).map(value).collect();
            let (ks, vs) = all.split_at(seen * kv);
            layer.store(&Pool::new(2), ks, vs, |p| (pages[p / BLOCK], p % BLOCK));
            let q: Vec<f32> = (0..rows * 6 * dim).map(|i| value(i + 77) * 3.0).collect();
            let see = |i: usize| seen - rows + i + 1;
            let mut want = vec![0.0; q.len()];
            for i in 0..rows {
                let (q, out) = (&q[i * 6 * dim..][..6 * dim], &mut want[i * 6 * dim..][..6 * dim]);
                attention_on(Isa::Reference, &Pool::new(1), &spec, q, &layer, |_| (&pages, see(i)), out);
            }
            let room = match dtype { KvType::F32 => 1e-4, KvType::F16 => 2e-3, KvType::BF16 => 2e-2, KvType::Int8 => 4e-2 };
            for i in (0..rows).step_by(7) {
                for h in 0..6 {
                    let at = h / 3 * dim;
                    let from = spec.window.map_or(0, |w| see(i).saturating_sub(w));
                    let dot = |p: usize| {
                        let dot = (0..dim).map(|d| f64::from(q[(i * 6 + h) * dim + d] * ks[p * kv + at + d])).sum::<f64>();
                        let mut s = dot / (dim as f64).sqrt();
                        if extra == 1 { s = 20.0 * (s / 20.0).tanh() }
                        if extra == 2 { s -= 0.5f64.powi(h as i32 + 1) * (see(i) - 1 - p) as f64 }
                        s
                    };
                    let weights: Vec<f64> = (from..see(i)).map(|p| dot(p).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for d in 0..dim {
                        let plain: f64 = (from..see(i)).map(|p| weights[p - from] * f64::from(vs[p * kv + at + d])).sum::<f64>() / total;
                        let got = want[(i * 6 + h) * dim + d];
                        prop_assert!((f64::from(got) - plain).abs() < room, "{:?} {} for {}", dtype, got, plain);
                    }
                }
            }
            for isa in Isa::available() {
                for threads in [1, 2, 7] {
                    let mut got = vec![0.0; q.len()];
                    attention_on(isa, &Pool::new(threads), &spec, &q, &layer, |i| (&pages, see(i)), &mut got);
                    let same = got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits());
                    prop_assert!(same, "{:?} {:?} on {} threads", isa, dtype, threads);
                }
            }
        }
    }

    #[test]
    fn halves_are_read_as_they_are() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut wide = vec![0f32; 1 << 16];
        Plain::widen(KvType::F16, &all, &mut wide);
        for (i, w) in wide.iter().enumerate() {
            let h = f16::from_bits(i as u16);
            assert!(w.to_bits() == h.to_f32().to_bits() || h.is_nan() && w.is_nan(), "{i:x}");
        }
    }
}
