//! Activations times packed weights.
//!
//! Against quantized weights, an activation row is quantized to int8, 32 values
//! to a scale. Within a block of 32 the sum is exact in integers: Σ code·q, each
//! half of the block times its sub-scale where the kind has them. Across blocks
//! two chains run in ascending k,
//!
//! `a = fma(sum, scale_w * scale_a, a)` and `b = fma(min_w, scale_a * Σq, b)`
//! (for K kinds `b = fma(Σ min·Σq, min_w * scale_a, b)`),
//!
//! and the element is `a + b` (K kinds `a − b`; `a` alone without minimums). A zero
//! point is taken off in integers, `sum = Σ code·q − zero·Σq`. Where a matrix has
//! an order of its own along k, activations are put in that order first, and
//! "ascending" means its places.
//! Against plain weights the element is one `fma` chain in ascending k; 8-bit floats
//! have two chains for each run, of its even and of its odd places, and runs join by
//! `a = fma(even + odd, scale, a)`; of E4M3 the chains are in units of 256 and the
//! scale is taken 256-fold, which is exact. Each tier
//! follows that order, so an element has one value, whatever computes it; but for
//! 16-bit floats on AMX, whose order is in `amx.rs`.
//!
//! Rejected: one activation scale a row, which saves a multiply a block but lets
//! one outlier take the precision of its whole row.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use crate::{
    Isa, PackedMatrix, Pool,
    isa::tiered,
    packed::{self, BLOCK, Block, FORMATS, GROUP, Kind, Per},
    pool::SendPtr,
};
use std::{
    cell::RefCell,
    sync::atomic::{AtomicUsize, Ordering},
};

/// How far ahead weights are asked for, in bytes, into the second cache: the
/// processor's own prefetch stays too close, and the first cache takes too few
/// requests at once.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8 << 10;
/// Activation rows a task takes at most: their int8 form stays in L2.
const ROWS: usize = 128;

/// Bytes of weights a thread takes at once where few rows meet them.
const STEP: usize = 32 << 10;

/// Groups taken of a thread's part, on a line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Taken(AtomicUsize);

/// Rows quantized to int8, or otherwise made ready.
#[derive(Default)]
struct Quantized {
    /// `[m, k]`.
    codes: Vec<i8>,
    /// `[m, k/32]`.
    blocks: Vec<Activation>,
    /// What AMX multiplies with 16-bit floats.
    parts: Vec<u16>,
    /// By thread.
    taken: Vec<Taken>,
}

/// What the kernels need of 32 quantized activations besides their codes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(8))]
struct Activation {
    /// Value of a code of 1.
    scale: f32,
    /// `scale * (halves[0] + halves[1])`.
    sum: f32,
    /// Codes summed over each half of the block.
    halves: [i32; 2],
}

thread_local! {
    /// The activations of the product this thread has asked for.
    static SCRATCH: RefCell<Quantized> = RefCell::new(Quantized::default());
}

/// Rows of activations as a kernel reads them.
#[derive(Clone, Copy)]
struct Rows<'a> {
    x: &'a [f32],
    codes: &'a [i8],
    blocks: &'a [Activation],
    parts: &'a [u16],
    k: usize,
    /// Values along k that share a head in the weights.
    run: usize,
}

/// Where a kernel writes: `cols` columns of each row, rows `stride` apart.
#[derive(Clone, Copy)]
struct Out {
    at: *mut f32,
    stride: usize,
    cols: usize,
}

/// Does `$call` for `$m_name` rows from `$r` on, written at `$at`, until `$range` is
/// done: the first of the numbers that still fits, the last being 1.
#[cfg(target_arch = "x86_64")]
macro_rules! by_rows {
    ($range:expr, $out:expr, [$($m:literal),*], |$r:ident, $at:ident, $m_name:ident| $call:expr) => {{
        let (first, mut $r, end) = ($range.start, $range.start, $range.end);
        while $r < end {
            let left = end - $r;
            let $at = Out { at: $out.at.add(($r - first) * $out.stride), ..$out };
            $(if left >= $m {
                const $m_name: usize = $m;
                $call;
                $r += $m;
                continue;
            })*
        }
    }};
}

/// Does `$call` with `$f` as the constant `$name`.
#[cfg(target_arch = "x86_64")]
macro_rules! by_format {
    ($f:expr, $name:ident, $call:expr) => {
        by_format!(@ $f, $name, $call, 0 1 2 3 4 5 6 7 8 9 10 11 12 13)
    };
    (@ $f:expr, $name:ident, $call:expr, $($i:literal)*) => {
        match $f {
            $($i => {
                const $name: usize = $i;
                $call
            })*
            f => unreachable!("format {f} of {}", FORMATS.len()),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use {by_format, by_rows};

/// What kernels of quantized weights lean on, whatever the caller says.
#[cfg(target_arch = "x86_64")]
fn check_quantized(f: usize, data: &[u8], rows: Rows, range: &std::ops::Range<usize>) {
    let blocks = rows.k / BLOCK;
    assert!(rows.codes.len() >= range.end * rows.k && rows.k.is_multiple_of(BLOCK));
    assert!(rows.blocks.len() >= range.end * blocks);
    assert_eq!(data.len(), Kind::Quantized(f).group_bytes(rows.k, rows.run));
}

/// What kernels of plain weights lean on.
#[cfg(target_arch = "x86_64")]
fn check_plain(kind: Kind, data: &[u8], rows: Rows, range: &std::ops::Range<usize>) {
    assert!(rows.x.len() >= range.end * rows.k);
    assert_eq!(data.len(), kind.group_bytes(rows.k, rows.run));
}

/// `out = x · wᵀ`: x is `[m, k]`, w `[n, k]`, out `[m, n]`, all row-major.
///
/// # Panics
/// When a slice does not have its shape's length.
pub fn matmul(pool: &Pool, x: &[f32], m: usize, w: &PackedMatrix, out: &mut [f32]) {
    matmul_many(pool, x, m, &mut [(w, out)]);
}

/// [`matmul`] of the same rows with several matrices, in one parallel run.
///
/// # Panics
/// When a slice does not have its shape's length.
pub fn matmul_many(pool: &Pool, x: &[f32], m: usize, ws: &mut [(&PackedMatrix, &mut [f32])]) {
    matmul_on(Isa::active(), pool, x, m, ws);
}

/// Bytes of the buffers that products of up to `m` rows of up to `k` values keep on
/// `threads` threads, on the tier in use.
pub fn matmul_bytes(m: usize, k: usize, threads: usize) -> usize {
    let quantized = m * k + (m * k).div_ceil(BLOCK) * size_of::<Activation>();
    #[cfg(target_arch = "x86_64")]
    if Isa::active() == Isa::Amx {
        return quantized + amx::bytes(m, k, threads);
    }
    let _ = threads;
    quantized
}

pub(crate) fn matmul_on(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    m: usize,
    ws: &mut [(&PackedMatrix, &mut [f32])],
) {
    let Some(k) = ws.first().map(|w| w.0.k()) else { return };
    assert_eq!(x.len(), m * k, "activations: {m} rows of {k}");
    for (w, out) in ws.iter() {
        assert_eq!(w.k(), k, "matrices of one call share k");
        assert_eq!(out.len(), m * w.n(), "product: {m} rows of {}", w.n());
    }
    if m == 0 {
        return;
    }
    // Matrices that share an order share the activations put in it.
    for ws in ws.chunk_by_mut(|a, b| a.0.order() == b.0.order()) {
        ordered(isa, pool, x, m, ws);
    }
}

/// [`matmul_on`] of matrices that have one order along k.
fn ordered(isa: Isa, pool: &Pool, x: &[f32], m: usize, ws: &mut [(&PackedMatrix, &mut [f32])]) {
    let Some((k, order)) = ws.first().map(|w| (w.0.k(), w.0.order())) else { return };
    SCRATCH.with_borrow_mut(|scratch| {
        if ws.iter().any(|w| matches!(w.0.kind(), Kind::Quantized(_))) {
            quantize_rows(isa, pool, x, m, k, order, scratch);
        }
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx && ws.iter().any(|w| matches!(w.0.kind(), Kind::F16 | Kind::BF16)) {
            // SAFETY: the tier has AVX-512 BF16.
            unsafe { amx::split(pool, x, m, k, &mut scratch.parts) };
        }
        let rows = Rows { x, codes: &scratch.codes, blocks: &scratch.blocks, parts: &scratch.parts, k, run: k };
        let outs: Vec<_> = ws.iter_mut().map(|w| SendPtr(w.1.as_mut_ptr())).collect();
        let total: usize = ws.iter().map(|w| w.0.groups()).sum();
        // Groups `from..to` of all matrices one after the other, times `span_rows`.
        let body = |span_rows: std::ops::Range<usize>, from: usize, to: usize| {
            let mut base = 0;
            for ((w, _), out) in ws.iter().zip(&outs) {
                let (first, last) = (from.max(base), to.min(base + w.groups()));
                if first < last {
                    // SAFETY: rows × columns of `out` belong to one call each,
                    // and its length was checked above.
                    unsafe {
                        product(isa, w, first - base..last - base, rows, span_rows.clone(), out.get());
                    }
                }
                base += w.groups();
            }
        };
        let threads = pool.threads();
        if m <= ROWS {
            // Memory is the limit: each thread reads a part of its own from end to
            // end and only then helps with another's.
            let part = total.div_ceil(threads);
            let bytes = ws.iter().map(|w| w.0.bytes()).sum::<usize>() / total.max(1);
            let step = (STEP / bytes.max(1)).clamp(1, part.max(1));
            scratch.taken.resize_with(threads, Taken::default);
            scratch.taken.iter_mut().for_each(|t| *t.0.get_mut() = 0);
            let taken = &scratch.taken;
            pool.run(threads, |_, worker| {
                for of in (worker..threads).chain(0..worker) {
                    let end = total.min((of + 1) * part);
                    loop {
                        let from = of * part + taken[of].0.fetch_add(step, Ordering::Relaxed);
                        if from >= end {
                            break;
                        }
                        body(0..m, from, end.min(from + step));
                    }
                }
            });
            return;
        }
        // Several tasks a thread, so that a late thread costs little.
        let span = total.div_ceil(threads * 6).clamp(1, 32);
        let col_tasks = total.div_ceil(span);
        pool.run(col_tasks * m.div_ceil(ROWS), |task, _| {
            let (row_task, col_task) = (task / col_tasks, task % col_tasks);
            let span_rows = row_task * ROWS..m.min((row_task + 1) * ROWS);
            body(span_rows, col_task * span, total.min((col_task + 1) * span));
        });
    });
}

/// The dot products of rows `range` with `groups` of `w`, written to the matrix
/// `[m, n]` at `out`.
///
/// # Safety
/// `out` is valid for those rows and columns and no one else writes them.
unsafe fn product(
    isa: Isa,
    w: &PackedMatrix,
    groups: std::ops::Range<usize>,
    rows: Rows,
    range: std::ops::Range<usize>,
    out: *mut f32,
) {
    let (n, rows) = (w.n(), Rows { run: w.run(), ..rows });
    for g in groups {
        let cols = (n - g * GROUP).min(GROUP);
        // SAFETY: the caller's promise, for the rows from the range's first on.
        let out = Out { at: unsafe { out.add(range.start * n + g * GROUP) }, stride: n, cols };
        match (isa, w.kind()) {
            (Isa::Reference, Kind::Quantized(f)) => reference(f, w.group(g), rows, range.clone(), out),
            (Isa::Reference, kind) => plain_reference(kind, w.group(g), rows, range.clone(), out),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `Isa::available` found the features; `out` as above.
            (Isa::Avx2, Kind::Quantized(f)) => unsafe {
                avx2::quantized(f, w.group(g), rows, range.clone(), out);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Avx2, kind) => unsafe { avx2::plain(kind, w.group(g), rows, range.clone(), out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Vnni, Kind::Quantized(f)) => unsafe {
                avx512::quantized(f, w.group(g), rows, range.clone(), out);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Amx, Kind::Quantized(f)) => unsafe {
                amx::quantized(f, w.group(g), rows, range.clone(), out);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Amx, kind @ (Kind::F16 | Kind::BF16)) => unsafe {
                amx::plain(kind, w.group(g), rows, range.clone(), out);
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            (Isa::Vnni | Isa::Amx, kind) => unsafe { avx512::plain(kind, w.group(g), rows, range.clone(), out) },
        }
    }
}

impl Out {
    /// Writes element `col` of row `i`.
    fn set(self, i: usize, col: usize, value: f32) {
        debug_assert!(col < self.cols);
        // SAFETY: whoever made this promised its rows and columns.
        unsafe { *self.at.add(i * self.stride + col) = value };
    }
}

fn reference(f: usize, data: &[u8], rows: Rows, range: std::ops::Range<usize>, out: Out) {
    let (f, blocks) = (FORMATS[f], rows.k / BLOCK);
    for (i, r) in range.enumerate() {
        let codes = &rows.codes[r * rows.k..][..rows.k];
        let meta = &rows.blocks[r * blocks..][..blocks];
        for col in 0..out.cols {
            let (mut a, mut b) = (0f32, 0f32);
            for (at, (q, act)) in codes.chunks_exact(BLOCK).zip(meta).enumerate() {
                let w = Block::at(f, data, blocks, rows.run, at);
                let half = |half: usize| {
                    let q = q[half * 16..][..16].iter().enumerate();
                    let dot: i32 = q.map(|(i, &q)| w.code(col, half * 16 + i) * i32::from(q)).sum();
                    dot * w.sub(col, half)
                };
                let sum = half(0) + half(1) - w.zero(col) * (act.halves[0] + act.halves[1]);
                a = (sum as f32).mul_add(w.scale(col) * act.scale, a);
                b = match f.min {
                    Per::Nothing | Per::Zero => b,
                    Per::Block => w.min(col).mul_add(act.sum, b),
                    _ => {
                        let sum = w.sub_min(col, 0) * act.halves[0] + w.sub_min(col, 1) * act.halves[1];
                        (sum as f32).mul_add(w.min(col) * act.scale, b)
                    }
                };
            }
            out.set(i, col, match f.min {
                Per::Nothing | Per::Zero => a,
                Per::Block => a + b,
                _ => a - b,
            });
        }
    }
}

/// Plain weights: one chain of fused multiply-adds a sum, in ascending k; of 8-bit
/// floats two a run.
fn plain_reference(kind: Kind, data: &[u8], rows: Rows, range: std::ops::Range<usize>, out: Out) {
    let (heads, data) = data.split_at(kind.heads_bytes(rows.k, rows.run));
    let step = data.len() / rows.k;
    for (i, r) in range.enumerate() {
        let x = &rows.x[r * rows.k..][..rows.k];
        for col in 0..out.cols {
            let chain = |x: &[f32], data: &[u8], first: usize, by: usize| {
                let steps = x.iter().zip(data.chunks_exact(step)).skip(first).step_by(by);
                steps.fold(0f32, |s, (x, step)| x.mul_add(packed::plain(kind, step, col), s))
            };
            let sum = if heads.is_empty() {
                chain(x, data, 0, 1)
            } else {
                let runs = x.chunks(rows.run).zip(data.chunks(rows.run * step)).enumerate();
                runs.fold(0f32, |a, (run, (x, data))| {
                    let scale = packed::float_at(heads, run * GROUP + col) * kind.unit();
                    (chain(x, data, 0, 2) + chain(x, data, 1, 2)).mul_add(scale, a)
                })
            };
            out.set(i, col, sum);
        }
    }
}

fn quantize_rows(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    m: usize,
    k: usize,
    order: Option<&[u32]>,
    to: &mut Quantized,
) {
    let blocks = m * k / BLOCK;
    to.codes.resize(m * k, 0);
    to.blocks.resize(blocks, Activation::default());
    let (codes, meta) = (SendPtr(to.codes.as_mut_ptr()), SendPtr(to.blocks.as_mut_ptr()));
    // A block takes some ten ns: below a thousand a thread, waking costs more.
    let part = blocks.div_ceil(pool.threads()).max(1024);
    pool.run(blocks.div_ceil(part), |task, _| {
        let (from, len) = (task * part, part.min(blocks - task * part));
        // SAFETY: parts are disjoint and inside the buffers, one task each.
        let (codes, meta) = unsafe {
            (
                std::slice::from_raw_parts_mut(codes.get().add(from * BLOCK), len * BLOCK),
                std::slice::from_raw_parts_mut(meta.get().add(from), len),
            )
        };
        let Some(order) = order else {
            return quantize(isa, &x[from * BLOCK..][..len * BLOCK], codes, meta);
        };
        for (i, (codes, meta)) in codes.chunks_exact_mut(BLOCK).zip(meta.chunks_exact_mut(1)).enumerate() {
            let (row, at) = ((from + i) * BLOCK / k, (from + i) * BLOCK % k);
            let block: [f32; BLOCK] = std::array::from_fn(|i| x[row * k + order[at + i] as usize]);
            quantize(isa, &block, codes, meta);
        }
    });
}

fn quantize(isa: Isa, x: &[f32], codes: &mut [i8], meta: &mut [Activation]) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Isa::available` found the features.
        Isa::Vnni | Isa::Amx => unsafe { avx512::quantize(x, codes, meta) },
        isa => quantize_blocks(isa, x, codes, meta),
    }
}

tiered! {
    fn quantize_blocks(x: &[f32], codes: &mut [i8], meta: &mut [Activation]) = quantize_body;
}

#[inline(always)]
fn quantize_body(x: &[f32], codes: &mut [i8], meta: &mut [Activation]) {
    let (xs, _) = x.as_chunks::<BLOCK>();
    let (codes, _) = codes.as_chunks_mut::<BLOCK>();
    for ((x, codes), meta) in xs.iter().zip(codes).zip(meta) {
        let mut tops = [0f32; 8];
        for x in x.as_chunks::<8>().0 {
            for (top, x) in tops.iter_mut().zip(x) {
                let x = x.abs();
                *top = if x > *top { x } else { *top };
            }
        }
        let top = tops.iter().fold(0f32, |a, &b| if b > a { b } else { a });
        let inverse = if top > 0.0 { 127.0 / top } else { 0.0 };
        // Adding 1.5·2²³ rounds to an integer, ties to even, in the low bits.
        for (c, x) in codes.iter_mut().zip(x) {
            let rounded = (x * inverse + 12_582_912.0).to_bits() as i32 - 0x4B40_0000;
            *c = rounded.clamp(-127, 127) as i8;
        }
        let sum = |half: &[i8]| half.iter().map(|&c| i32::from(c)).sum::<i32>();
        let halves = [sum(&codes[..16]), sum(&codes[16..])];
        let scale = top / 127.0;
        *meta = Activation { scale, sum: scale * (halves[0] + halves[1]) as f32, halves };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Runs, dequantize, quantize};
    use ashlar_core::DType;
    use proptest::prelude::*;

    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2) + 1;
        (0..len)
            .map(|_| {
                s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Rows as a file holds them: quantized, or for Q5 made of random codes.
    fn rows(dtype: DType, n: usize, k: usize, seed: u64) -> Vec<u8> {
        let values = noise(n * k, seed);
        let mut bytes = Vec::new();
        if quantize(dtype, &values, &mut bytes).is_err() {
            let block = dtype.block_bytes();
            // Small scales where the type keeps them, any bits elsewhere.
            let scales = match dtype {
                DType::Q2_K => 80..84,
                DType::Q3_K => 108..110,
                DType::Q6_K => 208..210,
                _ => 0..if dtype.block_len() == 32 && dtype != DType::Q5_1 { 2 } else { 4 },
            };
            bytes = (0..dtype.bytes_for(n * k).unwrap())
                .map(|i| if scales.contains(&(i % block)) { 0x20 } else { (values[i] * 128.0) as i8 as u8 })
                .collect();
        }
        bytes
    }

    /// The tiers to test; AMX in software where the processor has none.
    fn tiers() -> Vec<Isa> {
        #[allow(unused_mut)]
        let mut all = Isa::available();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if all.last() == Some(&Isa::Vnni) && amx::emulated::install() {
            all.push(Isa::Amx);
        }
        all
    }

    /// Whether a tier gives this type bits of its own.
    fn own_bits(isa: Isa, dtype: DType) -> bool {
        isa.name() == "amx" && matches!(dtype, DType::F16 | DType::BF16)
    }

    const TYPES: [DType; 14] = [
        DType::Q4_0, DType::Q4_1, DType::Q5_0, DType::Q5_1, DType::Q8_0, DType::IQ4_NL,
        DType::Q2_K, DType::Q3_K, DType::Q4_K, DType::Q5_K, DType::Q6_K,
        DType::F32, DType::F16, DType::BF16,
    ];

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|v| v.to_bits()).collect()
    }

    /// A matrix and the values its file says it has.
    struct Made {
        name: String,
        dtype: DType,
        w: PackedMatrix,
        values: Vec<f32>,
    }

    /// One of every kind: from rows of blocks, and in runs.
    fn made(n: usize, blocks: usize, seed: u64) -> Vec<Made> {
        let of_rows = TYPES.map(|dtype| {
            let k = blocks * dtype.block_len().max(32);
            let bytes = rows(dtype, n, k, seed);
            let mut values = vec![0.0; n * k];
            dequantize(dtype, &bytes, &mut values).unwrap();
            let w = PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
            Made { name: format!("{dtype:?}"), dtype, w, values }
        });
        let mut all = Vec::from(of_rows);
        for (i, len) in [32, 64, 96, 128, 4096].into_iter().enumerate() {
            let seed = seed + i as u64;
            all.push(in_runs(DType::U4, n, blocks * 96, len, seed, true));
            all.push(in_runs(DType::U4, n, blocks * 64, len, seed, false));
            all.push(in_runs(DType::U8, n, blocks * 64, len, seed, false));
            all.push(in_runs(DType::F8_E4M3, n, blocks * 64 + 5, len + i, seed, false));
            all.push(in_runs(DType::F8_E5M2, n, blocks * 64 + 5, len + i, seed, false));
        }
        all
    }

    /// Random codes in runs of `len`; `halves` rounds scales to `f16`.
    fn in_runs(dtype: DType, n: usize, k: usize, len: usize, seed: u64, halves: bool) -> Made {
        let floats = matches!(dtype, DType::F8_E4M3 | DType::F8_E5M2);
        let random = noise(n * k, seed);
        let codes: Vec<u8> = random.iter().map(|v| match dtype {
            DType::U4 => (v * 8.0 + 8.0) as u8,
            DType::U8 => (v * 128.0 + 128.0) as u8,
            // Finite ones of all sizes.
            _ => (v.abs() * 120.0) as u8 | if *v < 0.0 { 0x80 } else { 0 },
        }).collect();
        let per_row = k.div_ceil(len);
        let scales: Vec<f32> = noise(n * per_row, seed + 1).iter().map(|v| match (floats, halves) {
            (true, _) => v / 256.0,
            (_, true) => half::f16::from_f32(v / 8.0).to_f32(),
            _ => v / 64.0,
        }).collect();
        let top = if dtype == DType::U4 { 16.0 } else { 256.0 };
        let zeros = noise(n * per_row, seed + 2).into_iter().map(|v| ((v + 1.0) * 0.5 * top).round() as i16);
        let zeros: Vec<i16> = if floats { Vec::new() } else { zeros.collect() };
        let order = (!floats && seed % 2 == 1).then(|| {
            let mut order: Vec<u32> = (0..k as u32).collect();
            order.sort_by(|&a, &b| random[a as usize].total_cmp(&random[b as usize]));
            order.into_boxed_slice()
        });
        let mut values = vec![0.0; n * k];
        for (i, &code) in codes.iter().enumerate() {
            let (row, at) = (i / k, i % k);
            let run = row * per_row + at / len;
            let mut decoded = [0.0];
            let code = match floats {
                true => dequantize(dtype, &[code], &mut decoded).map(|()| decoded[0]).unwrap(),
                false => f32::from(i16::from(code) - zeros[run]),
            };
            values[row * k + order.as_ref().map_or(at, |o| o[at] as usize)] = scales[run] * code;
        }
        let runs = Runs { len, scales, zeros, order };
        let w = PackedMatrix::read_runs::<crate::KernelError>(&Pool::new(2), dtype, n, k, runs, |i, to| {
            to.copy_from_slice(&codes[i * k..][..to.len()]);
            Ok(())
        });
        Made { name: format!("{dtype:?} in runs of {len} of {k}"), dtype, w: w.unwrap(), values }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_row_has_one_value_on_every_tier_batch_and_thread_count(
            m in prop_oneof![1usize..11, 15usize..40], n in 1usize..40, blocks in 1usize..5, seed in 0u64..1000,
        ) {
            for Made { name, dtype, w, .. } in made(n, blocks, seed) {
                let k = w.k();
                let mut x = noise(m * k, seed + 1);
                x[k / 2] *= 40.0;
                let mut want = vec![0.0; m * n];
                let one = Pool::new(1);
                for (x, out) in x.chunks(k).zip(want.chunks_mut(n)) {
                    matmul_on(Isa::Reference, &one, x, 1, &mut [(&w, out)]);
                }
                let other = PackedMatrix::from_rows(DType::F32, 1, k, &vec![0; 4 * k]).unwrap();
                for isa in tiers() {
                    let mut want = want.clone();
                    if own_bits(isa, dtype) {
                        for (x, out) in x.chunks(k).zip(want.chunks_mut(n)) {
                            matmul_on(isa, &one, x, 1, &mut [(&w, out)]);
                        }
                    }
                    for threads in [1, 2, 3] {
                        let (mut got, mut twin, mut zero) = (vec![0.0; m * n], vec![0.0; m * n], vec![1.0; m]);
                        let mut ws = [(&w, &mut got[..]), (&other, &mut zero[..]), (&w, &mut twin[..])];
                        matmul_on(isa, &Pool::new(threads), &x, m, &mut ws);
                        prop_assert_eq!(bits(&got), bits(&want), "{} {:?} {} threads", name, isa, threads);
                        prop_assert_eq!(bits(&twin), bits(&want));
                        prop_assert!(zero.iter().all(|v| *v == 0.0));
                    }
                }
            }
        }

        #[test]
        fn packed_rows_and_products_agree_with_the_file(n in 1usize..20, seed in 0u64..1000) {
            for Made { name, w, values, .. } in made(n, 2, seed) {
                let k = w.k();
                let mut row = vec![0.0; k];
                for i in 0..n {
                    w.dequantize_row(i, &mut row);
                    // By value: the two may give zeros of either sign.
                    prop_assert_eq!(&row, &values[i * k..][..k], "{}", name);
                }
                let x = noise(k, seed + 9);
                let mut out = vec![0.0; n];
                matmul(&Pool::new(1), &x, 1, &w, &mut out);
                for (i, got) in out.iter().enumerate() {
                    let pairs = || x.iter().zip(&values[i * k..]);
                    let want: f64 = pairs().map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    // Half a step of int8 on each activation, at worst all one way.
                    let room: f64 = pairs().map(|(_, b)| f64::from(b.abs()) / 254.0).sum::<f64>() + 1e-4;
                    prop_assert!((f64::from(*got) - want).abs() <= room, "{name}: {got} for {want}");
                }
            }
        }

        #[test]
        fn rows_read_piece_by_piece_pack_as_whole_ones_do(n in 1usize..20, seed in 0u64..1000) {
            for dtype in TYPES {
                let k = 256;
                let bytes = rows(dtype, n, k, seed);
                let row = bytes.len() / n;
                let w = PackedMatrix::read_rows::<crate::KernelError>(&Pool::new(2), dtype, n, k, |i, to| {
                    to.copy_from_slice(&bytes[i * row..][..to.len()]);
                    Ok(())
                });
                let w = w.unwrap();
                let whole = PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
                prop_assert!((0..w.groups()).all(|g| w.group(g) == whole.group(g)), "{:?}", dtype);
            }
        }
    }

    #[test]
    fn runs_that_do_not_fit_are_refused() {
        use crate::KernelError as E;
        let (n, k) = (3, 64);
        let good = Runs { len: 32, scales: vec![1.0; 6], zeros: vec![8; 6], order: None };
        let pack = |dtype, k, runs: Runs, byte: u8| {
            PackedMatrix::read_runs::<E>(&Pool::new(1), dtype, n, k, runs, |i, to| {
                assert!(i * k + to.len() <= n * k);
                to.fill(byte);
                Ok(())
            })
        };
        pack(DType::U4, k, good.clone(), 15).unwrap();
        let with = |change: &dyn Fn(&mut Runs)| {
            let mut runs = good.clone();
            change(&mut runs);
            pack(DType::U4, k, runs, 0).unwrap_err()
        };
        assert!(matches!(with(&|r| r.len = 0), E::Runs { need: 1, got: 0, .. }));
        assert!(matches!(with(&|r| r.len = 48), E::Runs { need: 0, got: 16, .. }));
        assert!(matches!(with(&|r| r.len = 64), E::Runs { what: "scales", need: 3, got: 6 }));
        assert!(matches!(with(&|r| r.zeros.clear()), E::Runs { what: "zero points", need: 6, got: 0 }));
        assert!(matches!(with(&|r| r.zeros[5] = 17), E::Runs { need: 16, got: 17, .. }));
        assert!(matches!(with(&|r| r.zeros[5] = -1), E::Runs { need: 16, got: 1, .. }));
        for order in [vec![0; 64], (1..65).collect(), (0..63).collect(), (0..64).chain([1]).collect::<Vec<u32>>()] {
            assert!(matches!(with(&|r| r.order = Some(order.clone().into())), E::Runs { need: 64, .. }), "{order:?}");
        }
        assert!(matches!(pack(DType::U4, 40, good.clone(), 0), Err(E::Ragged { values: 40, .. })));
        assert!(matches!(pack(DType::I8, k, good.clone(), 0), Err(E::Unsupported { .. } | E::Runs { .. })));
        let floats = Runs { zeros: Vec::new(), ..good };
        pack(DType::F8_E4M3, k, floats.clone(), 0xfe).unwrap();
        assert!(matches!(pack(DType::F8_E4M3, k, floats, 0xff), Err(E::NotANumber { row: 0 })));
    }

    #[test]
    fn extreme_codes_do_not_saturate() {
        let mut block = half::f16::ONE.to_le_bytes().to_vec();
        block.extend([0x80u8; 32]);
        let w = PackedMatrix::from_rows(DType::Q8_0, 1, 32, &block).unwrap();
        let mut nibbles = [half::f16::ONE.to_le_bytes(), half::f16::ZERO.to_le_bytes()].concat();
        nibbles.extend([0xffu8; 16]);
        let v = PackedMatrix::from_rows(DType::Q4_1, 1, 32, &nibbles).unwrap();
        for isa in tiers() {
            for sign in [1.0, -1.0] {
                let (mut a, mut b) = ([0.0], [0.0]);
                let x = [127.0 * sign; 32];
                matmul_on(isa, &Pool::new(1), &x, 1, &mut [(&w, &mut a), (&v, &mut b)]);
                assert_eq!((a, b), ([-128.0 * 127.0 * 32.0 * sign], [15.0 * 127.0 * 32.0 * sign]));
            }
        }
    }
    /// `THREADS=2 cargo test --release -p ashlar-kernels matmul_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn matmul_speed() {
        // Beyond any cache, as a model's layers are.
        let (layers, n, k) = (40, 1536, 1536);
        let pool = Pool::new(std::env::var("THREADS").map_or(1, |t| t.parse().unwrap()));
        let of_rows = [DType::Q4_0, DType::Q5_0, DType::Q8_0, DType::Q4_K, DType::Q6_K, DType::F16].map(|dtype| {
            let bytes = rows(dtype, n, k, 1);
            let one = move || PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
            (format!("{dtype:?}"), Box::new(one) as Box<dyn Fn() -> PackedMatrix>)
        });
        let of_runs = [(DType::U4, 128, 0), (DType::U4, 128, 1), (DType::U8, 128, 0), (DType::F8_E4M3, 128, 0), (DType::F8_E5M2, k, 0)];
        let of_runs = of_runs.map(|(dtype, len, seed)| {
            let one = move || in_runs(dtype, n, k, len, seed, true).w;
            (format!("{dtype:?} in runs of {len}, order {seed}"), Box::new(one) as Box<dyn Fn() -> PackedMatrix>)
        });
        for (name, one) in of_rows.into_iter().chain(of_runs) {
            let ws: Vec<_> = (0..layers).map(|_| one()).collect();
            let size = ws.iter().map(PackedMatrix::bytes).sum::<usize>() as f64;
            let mut line = format!("{name}:");
            for isa in Isa::available().into_iter().skip(1) {
                for m in [1usize, 4, 16, 256] {
                    let (x, mut out) = (noise(m * k, 3), vec![0.0; m * n]);
                    let mut best = f64::MAX;
                    for _ in 0..5 {
                        let start = std::time::Instant::now();
                        let some = if m > 16 { 4 } else { layers };
                        ws[..some].iter().for_each(|w| matmul_on(isa, &pool, &x, m, &mut [(w, &mut out)]));
                        best = best.min(start.elapsed().as_secs_f64() / some as f64 * layers as f64);
                    }
                    let macs = (layers * n * k * m) as f64 / best / 1e9;
                    line += &format!("  {}x{m} {:.1} GB/s {macs:.0} GMAC/s", isa.name(), size / best / 1e9);
                }
            }
            eprintln!("{line}");
        }
    }

    /// The order that `amx.rs` documents, number by number.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn tiles_of_floats_keep_their_documented_order() {
        if !tiers().contains(&Isa::Amx) {
            return;
        }
        for (dtype, m, n, k) in [(DType::BF16, 1, 5, 48), (DType::F16, 17, 33, 100), (DType::F16, 40, 16, 31)] {
            let bytes = rows(dtype, n, k, 7);
            let w = PackedMatrix::from_rows(dtype, n, k, &bytes).unwrap();
            let mut plain = vec![0.0; n * k];
            dequantize(dtype, &bytes, &mut plain).unwrap();
            let x = noise(m * k, 8);
            let mut got = vec![0.0; m * n];
            matmul_on(Isa::Amx, &Pool::new(2), &x, m, &mut [(&w, &mut got)]);
            let halves = |v: f32| {
                let first = half::bf16::from_f32(v).to_f32();
                [first, half::bf16::from_f32(v - first).to_f32()]
            };
            for (at, got) in got.iter().enumerate() {
                let row = |v: &[f32], i: usize| v[i * k..][..k].iter().map(|&v| halves(v)).collect::<Vec<_>>();
                let (x, w) = (row(&x, at / n), row(&plain, at % n));
                let exact: f64 = x.iter().zip(&w).map(|(x, w)| f64::from(x[0] + x[1]) * f64::from(w[0] + w[1])).sum();
                let (mut main, mut small) = (0f32, 0f32);
                for (x, w) in x.chunks(32).zip(w.chunks(32)) {
                    let tile = |i: usize, j: usize| {
                        let chain = |odd: usize| {
                            let every = x.iter().zip(w).skip(odd).step_by(2);
                            every.fold(0f32, |s, (x, w)| x[i].mul_add(w[j], s))
                        };
                        chain(0) + chain(1)
                    };
                    main += tile(0, 0);
                    small += tile(1, 0);
                    if dtype == DType::F16 {
                        small += tile(0, 1);
                    }
                }
                assert_eq!(got.to_bits(), (main + small).to_bits(), "{dtype:?} {at}: {got} for {}", main + small);
                assert!((f64::from(*got) - exact).abs() < 2e-4, "{got} for {exact}");
            }
        }
    }
}
