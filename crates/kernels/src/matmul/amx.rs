//! The AMX tier: sixteen rows times sixteen columns in one tile instruction.
//!
//! Quantized weights: a group's codes are unpacked to signed bytes once for all
//! rows of a task, a byte tile product gives a block's integer sums of sixteen
//! rows, and AVX-512 joins blocks as in `avx512.rs`: the same integers, the same
//! chains, the same bits. Rows that fill no tile go there too.
//!
//! 16-bit floats: weights and activations become sums of `bf16` numbers, whose
//! products the tiles add in `f32`. An activation is taken as its first sixteen
//! bits (two parts), BF16 weights as they are, F16 weights exactly (two parts).
//! With `x = x0 + x1` and `w = w0 + w1` an element is `main + small`, where per 32
//! k, in ascending order, `main` adds `x0·w0` and `small` adds `x1·w0`, then
//! `x0·w1`; within 32 k a tile sums even and odd k in chains of their own. So
//! these bits differ from the other tiers', and are the same for a row whatever
//! its batch, since one row alone goes through tiles too. Intel's Software
//! Developer's Manual, volume 2, TDPBF16PS, has the order within a tile.
//!
//! What may not happen here: a choice by the number of rows that changes bits.
//! No machine with AMX was at hand: `emulated.rs` runs these instructions in
//! software for the tests, and nothing is known of their speed.
//!
//! Rejected: adding blocks of quantized weights inside a tile, for their scales
//! differ; a tier of its own for attention, which is floats.

#[cfg(test)]
pub(crate) mod emulated;

use super::{
    Out, Rows, avx512,
    avx512::{Head, Of, add_block, joined, store, unpack},
    by_format, check_plain, check_quantized,
};
use crate::{Pool, pool::SendPtr};
use crate::{memory::Bytes, packed::{BLOCK, FORMATS, GROUP, Kind}};
use std::{arch::asm, arch::x86_64::*, cell::RefCell, ops::Range};

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Bytes of a tile of sixteen rows.
const BYTES: usize = 1024;
/// Values along k in a tile of 16-bit floats.
const STEP: usize = 32;
/// Blocks multiplied before they are joined: their sums stay in L1.
const CHUNK: usize = 8;

/// A thread's buffers.
struct Scratch {
    /// A group's weights as tiles.
    weights: Bytes,
    /// Integer sums of [`CHUNK`] blocks, or four tiles of floats.
    sums: Bytes,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        RefCell::new(Scratch { weights: Bytes::zeroed(0), sums: Bytes::zeroed(2 * CHUNK * BYTES) });
}

/// Bytes of parts and of each thread's buffers.
pub(super) fn bytes(m: usize, k: usize, threads: usize) -> usize {
    let wide = k.next_multiple_of(STEP);
    let parts = 2 * size_of::<u16>() * m.next_multiple_of(TILE) * wide;
    parts + threads * (wide / STEP * 2 * BYTES + 2 * CHUNK * BYTES)
}

/// The shapes of the eight tile registers.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes a row.
    width: [u16; 16],
    rows: [u8; 16],
}

const fn shapes(each: [(u8, u16); 8]) -> Shapes {
    let mut s = Shapes { palette: 1, start_row: 0, reserved: [0; 14], width: [0; 16], rows: [0; 16] };
    let mut i = 0;
    while i < 8 {
        (s.rows[i], s.width[i]) = each[i];
        i += 1;
    }
    s
}

/// Two of sums; activations and weights of a block; the same of half a block, twice.
const OF_BLOCKS: Shapes =
    shapes([(16, 64), (16, 64), (16, 32), (8, 64), (16, 16), (4, 64), (16, 16), (4, 64)]);
const OF_FLOATS: Shapes = shapes([(16, 64); 8]);

/// Sets the tile registers' shapes until dropped. While it lives, the processor
/// saves eight kilobytes more at a switch of threads.
struct Configured;

impl Configured {
    /// # Safety
    /// Needs AMX, allowed by the system.
    unsafe fn new(shapes: &'static Shapes) -> Self {
        // SAFETY: 64 bytes are read.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, preserves_flags, readonly)) };
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: whoever configured tiles has AMX.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) };
    }
}

/// Loads register `T`, rows `stride` bytes apart.
#[inline(always)]
unsafe fn load<const T: u8>(at: *const u8, stride: usize) {
    // SAFETY: the caller has the register's rows there.
    unsafe {
        asm!("tileloadd tmm{t}, [{at} + {stride}*1]", t = const T, at = in(reg) at, stride = in(reg) stride,
            options(nostack, preserves_flags, readonly));
    }
}

/// Writes register `T`, sixteen rows of 64 bytes.
#[inline(always)]
unsafe fn save<const T: u8>(at: *mut u8) {
    // SAFETY: the caller has a kilobyte there.
    unsafe {
        asm!("tilestored [{at} + {stride}*1], tmm{t}", t = const T, at = in(reg) at, stride = in(reg) 64usize,
            options(nostack, preserves_flags));
    }
}

#[inline(always)]
unsafe fn zero<const T: u8>() {
    // SAFETY: tiles are configured.
    unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, preserves_flags, nomem)) };
}

/// Register `C` += signed bytes of `A` · signed bytes of `B`.
#[inline(always)]
unsafe fn dot_bytes<const C: u8, const A: u8, const B: u8>() {
    // SAFETY: tiles are configured.
    unsafe {
        asm!("tdpbssd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, preserves_flags, nomem));
    }
}

/// Register `C` += pairs of `bf16` of `A` · pairs of `B`.
#[inline(always)]
unsafe fn dot_floats<const C: u8, const A: u8, const B: u8>() {
    // SAFETY: tiles are configured.
    unsafe {
        asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
            options(nostack, preserves_flags, nomem));
    }
}

/// Rows `range` times one group of quantized weights of format `f`.
///
/// # Safety
/// Needs AMX with int8 and what `avx512::quantized` needs; `out` is valid for
/// the rows.
pub(super) unsafe fn quantized(f: usize, data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    check_quantized(f, data, rows, &range);
    let whole = range.len() / TILE * TILE;
    let tail = range.start + whole..range.end;
    // SAFETY: lengths just checked; the rest is the caller's promise.
    unsafe {
        if whole > 0 {
            by_format!(f, F, sets_of::<F>(data, rows, range.start..tail.start, out));
        }
        if !tail.is_empty() {
            avx512::quantized(f, data, rows, tail, Out { at: out.at.add(whole * out.stride), ..out });
        }
    }
}

/// Whole sets of sixteen rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn sets_of<const F: usize>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    SCRATCH.with_borrow_mut(|Scratch { weights, sums }| {
        let (f, blocks) = (Of::<F>::FORMAT, rows.k / BLOCK);
        let bytes = rows.k * GROUP;
        if weights.len() < bytes {
            *weights = Bytes::zeroed(bytes);
        }
        // SAFETY: the group holds its blocks' codes; `weights` has room for them
        // as bytes; the rest is the caller's promise.
        unsafe {
            let offset = _mm512_set1_epi8(f.offset as i8);
            for block in 0..blocks {
                let codes = data.as_ptr().add(f.heads_bytes(blocks, rows.run) + block * f.code_bytes());
                let to: *mut __m512i = weights.as_mut_ptr().add(block * BLOCK * GROUP).cast();
                for s in 0..4 {
                    let (low, high) = unpack::<F>(codes, s);
                    _mm512_storeu_si512(to.add(s), _mm512_sub_epi8(low, offset));
                    _mm512_storeu_si512(to.add(s + 4), _mm512_sub_epi8(high, offset));
                }
            }
            let _tiles = Configured::new(&OF_BLOCKS);
            for r in range.clone().step_by(TILE) {
                let out = Out { at: out.at.add((r - range.start) * out.stride), ..out };
                set::<F>(data.as_ptr(), rows, r, weights.as_ptr(), sums.as_mut_ptr(), out);
            }
        }
    });
}

/// Sixteen rows from `r` on.
///
/// # Safety
/// As [`quantized`]; tiles are [`OF_BLOCKS`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
unsafe fn set<const F: usize>(
    heads: *const u8,
    rows: Rows,
    r: usize,
    weights: *const u8,
    sums: *mut u8,
    out: Out,
) {
    const HALF: usize = TILE / 2;
    let (f, k, blocks) = (Of::<F>::FORMAT, rows.k, rows.k / BLOCK);
    let size = if Of::<F>::HALVES { 2 * BYTES } else { BYTES };
    // Eight rows' chains at a time fit the registers.
    let mut a = [[_mm512_setzero_ps(); HALF]; 2];
    let mut b = a;
    // SAFETY: the caller's promise; `sums` holds two tiles for each of CHUNK blocks.
    unsafe {
        for first in (0..blocks).step_by(CHUNK) {
            let last = blocks.min(first + CHUNK);
            for block in first..last {
                let q = rows.codes.as_ptr().add(r * k + block * BLOCK).cast::<u8>();
                let w = weights.add(block * BLOCK * GROUP);
                let c = sums.add((block - first) * size);
                zero::<0>();
                if Of::<F>::HALVES {
                    load::<4>(q, k);
                    load::<5>(w, 64);
                    dot_bytes::<0, 4, 5>();
                    zero::<1>();
                    load::<6>(q.add(BLOCK / 2), k);
                    load::<7>(w.add(BLOCK / 2 * GROUP), 64);
                    dot_bytes::<1, 6, 7>();
                    save::<1>(c.add(BYTES));
                } else {
                    load::<2>(q, k);
                    load::<3>(w, 64);
                    dot_bytes::<0, 2, 3>();
                }
                save::<0>(c);
            }
            for half in 0..2 {
                for block in first..last {
                    let c = sums.add((block - first) * size + half * BYTES / 2);
                    let row = |at: usize| _mm512_loadu_si512(c.add(at).cast());
                    let low: [__m512i; HALF] = std::array::from_fn(|i| row(i * 64));
                    let mut high = low;
                    if Of::<F>::HALVES {
                        high = std::array::from_fn(|i| row(BYTES + i * 64));
                    }
                    let act = rows.blocks.as_ptr().add((r + half * HALF) * blocks + block);
                    let head = Head::of(f, heads, block, f.span(rows.run));
                    add_block::<F, HALF>(head, act, blocks, &low, &high, &mut a[half], &mut b[half]);
                }
            }
        }
        for i in 0..TILE {
            let (half, j) = (i / HALF, i % HALF);
            store(out, i, joined(f, a[half][j], b[half][j]));
        }
    }
}

/// Parts of `m` rows of activations, `[part][rows, whole tiles][k, whole tiles]` as
/// the bits of `bf16`: the number rounded, then what is left rounded.
///
/// # Safety
/// Needs AVX-512 F, BW, VL and BF16.
pub(super) unsafe fn split(pool: &Pool, x: &[f32], m: usize, k: usize, to: &mut Vec<u16>) {
    let wide = k.next_multiple_of(STEP);
    let part = m.next_multiple_of(TILE) * wide;
    to.clear();
    to.resize(2 * part, 0);
    let (first, second) = to.split_at_mut(part);
    let second = SendPtr(second.as_mut_ptr());
    let x = &x[..m * k];
    pool.chunks_mut(first, TILE * wide, |set, first| {
        let rows = x[set * TILE * k..].chunks_exact(k).take(TILE);
        for (i, (x, first)) in rows.zip(first.chunks_exact_mut(wide)).enumerate() {
            // SAFETY: rows are disjoint, the second part is as long as the first;
            // the caller has the instructions.
            unsafe {
                let second = second.get().add((set * TILE + i) * wide);
                split_row(x, first, std::slice::from_raw_parts_mut(second, wide));
            }
        }
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn split_row(x: &[f32], first: &mut [u16], second: &mut [u16]) {
    let to = first.as_chunks_mut::<16>().0.iter_mut().zip(second.as_chunks_mut::<16>().0);
    for (x, (first, second)) in x.chunks(16).zip(to) {
        // SAFETY: a mask leaves out what is beyond the row.
        let x = unsafe { _mm512_maskz_loadu_ps(((1u32 << x.len()) - 1) as u16, x.as_ptr()) };
        let rounded = _mm512_cvtneps_pbh(x);
        let rest = _mm512_cvtneps_pbh(_mm512_sub_ps(x, _mm512_cvtpbh_ps(rounded)));
        // SAFETY: sixteen numbers of sixteen bits each way.
        (*first, *second) = unsafe { (std::mem::transmute(rounded), std::mem::transmute(rest)) };
    }
}

/// Rows `range` times one group of 16-bit floats; `range` starts at a whole tile.
///
/// # Safety
/// Needs AMX with bf16 and AVX-512 F, BW and BF16; `out` is valid for the rows.
pub(super) unsafe fn plain(kind: Kind, data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    check_plain(kind, data, rows, &range);
    assert!(range.start.is_multiple_of(TILE));
    assert_eq!(rows.parts.len() % (2 * TILE * rows.k.next_multiple_of(STEP)), 0);
    assert!(rows.parts.len() >= 2 * range.end * rows.k.next_multiple_of(STEP));
    // SAFETY: lengths just checked; the rest is the caller's promise.
    unsafe {
        match kind {
            Kind::F16 => plain_rows::<true>(data, rows, range, out),
            _ => plain_rows::<false>(data, rows, range, out),
        }
    }
}

/// A group's 16-bit floats as tiles of `bf16`: for each 32 k one tile, of F16 a
/// second one with what the first leaves.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn unpack_floats<const F16: bool>(data: &[u8], k: usize, to: *mut u8) {
    // Columns of an even k, then of the odd one after it → pairs of both.
    let pairs: [u16; 32] = const {
        let mut p = [0; 32];
        let mut i = 0;
        while i < 32 {
            p[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        p
    };
    // SAFETY: two rows of 16 columns are 64 bytes; past the last, none are read.
    unsafe {
        let pairs = _mm512_loadu_si512(pairs.as_ptr().cast());
        let size = if F16 { 2 * BYTES } else { BYTES };
        for two in 0..k.next_multiple_of(STEP) / 2 {
            let there = k.saturating_sub(2 * two).min(2);
            let mask = ((1u64 << (there * GROUP)) - 1) as u32;
            let both = _mm512_maskz_loadu_epi16(mask, data.as_ptr().wrapping_add(two * 64).cast());
            let at = to.add(two / GROUP * size + two % GROUP * 64);
            let write = |at: *mut u8, v: __m512i| {
                _mm512_storeu_si512(at.cast(), _mm512_permutexvar_epi16(pairs, v));
            };
            if !F16 {
                write(at, both);
                continue;
            }
            let even = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
            let odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(both));
            let first = |v: __m512| _mm512_cvtpbh_ps(_mm512_cvtneps_pbh(v));
            let (even0, odd0) = (first(even), first(odd));
            let join = |odd: __m512, even: __m512| std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
            write(at, join(odd0, even0));
            write(at.add(BYTES), join(_mm512_sub_ps(odd, odd0), _mm512_sub_ps(even, even0)));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn plain_rows<const F16: bool>(data: &[u8], rows: Rows, range: Range<usize>, out: Out) {
    let wide = rows.k.next_multiple_of(STEP);
    let size = if F16 { 2 * BYTES } else { BYTES };
    SCRATCH.with_borrow_mut(|Scratch { weights, sums }| {
        if weights.len() < wide / STEP * size {
            *weights = Bytes::zeroed(wide / STEP * size);
        }
        // SAFETY: `plain` checked that the parts of all rows' sets are there;
        // `sums` holds four tiles; `weights` holds the group.
        unsafe {
            unpack_floats::<F16>(data, rows.k, weights.as_mut_ptr());
            let _tiles = Configured::new(&OF_FLOATS);
            let rest = rows.parts.len(); // Two bytes each, half of them: where the second part begins.
            for r in range.clone().step_by(2 * TILE) {
                let two = range.end - r > TILE;
                let x = rows.parts.as_ptr().cast::<u8>().add(r * wide * 2);
                zero::<0>();
                zero::<1>();
                zero::<2>();
                zero::<3>();
                for step in 0..wide / STEP {
                    let (x, w) = (x.add(step * 64), weights.as_ptr().add(step * size));
                    load::<6>(w, 64);
                    load::<4>(x, wide * 2);
                    load::<5>(x.add(rest), wide * 2);
                    dot_floats::<0, 4, 6>();
                    dot_floats::<1, 5, 6>();
                    if F16 {
                        load::<7>(w.add(BYTES), 64);
                        dot_floats::<1, 4, 7>();
                    }
                    if two {
                        let x = x.add(TILE * wide * 2);
                        load::<4>(x, wide * 2);
                        load::<5>(x.add(rest), wide * 2);
                        dot_floats::<2, 4, 6>();
                        dot_floats::<3, 5, 6>();
                        if F16 {
                            dot_floats::<3, 4, 7>();
                        }
                    }
                }
                let c = sums.as_mut_ptr();
                save::<0>(c);
                save::<1>(c.add(BYTES));
                save::<2>(c.add(2 * BYTES));
                save::<3>(c.add(3 * BYTES));
                let here = Out { at: out.at.add((r - range.start) * out.stride), ..out };
                for i in 0..(range.end - r).min(2 * TILE) {
                    let at = c.add(i / TILE * 2 * BYTES + i % TILE * 64);
                    let sum = _mm512_add_ps(_mm512_loadu_ps(at.cast()), _mm512_loadu_ps(at.add(BYTES).cast()));
                    store(here, i, sum);
                }
            }
        }
    });
}
