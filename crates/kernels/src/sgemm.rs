//! `f32` matrix product for training: packed panels, register tiles, one result.
//!
//! Every element of C is one chain of fused multiply-adds over k in ascending
//! order, starting from 0 or from C. Blocking only parks the running sum in
//! memory, which is exact, so the bits do not depend on the threads, on the
//! block sizes or on the instruction set: the plain [`reference`] gives the same
//! ones. What may not happen here: a split of k across threads or lanes, and a
//! product and sum that are rounded apart.
//!
//! Layout after Goto and van de Geijn, "Anatomy of High-Performance Matrix
//! Multiplication" (2008): A in panels of `mr` rows, B in panels of `nr` columns,
//! both with k slowest, zero-padded at the rim.
//!
//! Rejected: packing the frozen weights once. They would be needed in both
//! orientations, a gigabyte for 135M parameters, to save some 3 % of a step.
//! A target without a fused multiply-add instruction computes it in software:
//! right, and slow.

use crate::Pool;
use std::{cell::RefCell, ops::Range};

/// k of one packed block: a B panel of 32 columns stays within 48 KiB.
const KC: usize = 384;
/// Columns of one packed block of B, which stays within 3 MiB.
const NC: usize = 2048;
/// Multiply-adds below which waking the pool costs more than it saves.
const SERIAL: usize = 1 << 18;

/// The register tile of an instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tier {
    /// 12×32, `vfmadd` on 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 6×16, `vfmadd` on 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 4×8, left to the compiler (`fmla` on aarch64).
    Portable,
}

impl Tier {
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
            {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Rows and columns of the register tile.
    const fn tile(self) -> (usize, usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => (12, 32),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => (6, 16),
            Self::Portable => (4, 8),
        }
    }
}

thread_local! {
    /// Packed A and B of the product this thread has asked for.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// A matrix as it lies in memory: element (i, j) is at `i * ld + j`, or at
/// `j * ld + i` when `t`.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    ld: usize,
    t: bool,
}

/// Where C lies. Tasks write disjoint tiles of it.
#[derive(Clone, Copy)]
struct Out {
    data: *mut f32,
    ld: usize,
}
// SAFETY: every task of one `pool.run` writes its own rows × columns.
unsafe impl Sync for Out {}

impl Out {
    /// C from element (i, j) on.
    ///
    /// # Safety
    /// (i, j) is inside C.
    unsafe fn at(self, i: usize, j: usize) -> Self {
        // SAFETY: the caller's promise.
        Self { data: unsafe { self.data.add(i * self.ld + j) }, ..self }
    }
}

/// A packing buffer: its panels are written by one task each, then read by all.
#[derive(Clone, Copy)]
struct Panels(*mut f32);
// SAFETY: one panel, one writing task; reads begin after the writing run ends.
unsafe impl Sync for Panels {}

impl Panels {
    /// # Safety
    /// `at .. at + len` is inside the buffer and no one else holds it.
    unsafe fn slice<'a>(self, at: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(at), len) }
    }

    /// # Safety
    /// `at` is inside the buffer.
    unsafe fn at(self, at: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(at) }
    }
}

/// C = op(A)·op(B), or C += op(A)·op(B) when `beta_one`.
///
/// op(A) is `[m, k]`, op(B) `[k, n]`, C `[m, n]`, all row-major with the leading
/// dimension (elements from one stored row to the next) given. `ta` says that A
/// is stored `[k, m]`, `tb` that B is stored `[n, k]`.
///
/// # Panics
/// When a slice is shorter than its shape and leading dimension say.
#[allow(clippy::too_many_arguments)]
pub fn sgemm(
    pool: &Pool,
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    ta: bool,
    b: &[f32],
    ldb: usize,
    tb: bool,
    c: &mut [f32],
    ldc: usize,
    beta_one: bool,
) {
    let a = Matrix { data: a, ld: lda, t: ta };
    let b = Matrix { data: b, ld: ldb, t: tb };
    product(Some(pool), Tier::best(), m, n, k, a, b, c, ldc, beta_one);
}

/// [`sgemm`] on the calling thread alone: the same bits, for use inside a task.
///
/// # Panics
/// As [`sgemm`].
#[allow(clippy::too_many_arguments)]
pub fn sgemm_serial(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    ta: bool,
    b: &[f32],
    ldb: usize,
    tb: bool,
    c: &mut [f32],
    ldc: usize,
    beta_one: bool,
) {
    let a = Matrix { data: a, ld: lda, t: ta };
    let b = Matrix { data: b, ld: ldb, t: tb };
    product(None, Tier::best(), m, n, k, a, b, c, ldc, beta_one);
}

/// The plain product that the fast one must equal bit for bit.
///
/// # Panics
/// As [`sgemm`].
#[allow(clippy::too_many_arguments)]
pub fn reference(
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    ta: bool,
    b: &[f32],
    ldb: usize,
    tb: bool,
    c: &mut [f32],
    ldc: usize,
    beta_one: bool,
) {
    for i in 0..m {
        for j in 0..n {
            let mut sum = if beta_one { c[i * ldc + j] } else { 0.0 };
            for p in 0..k {
                let x = a[if ta { p * lda + i } else { i * lda + p }];
                let y = b[if tb { j * ldb + p } else { p * ldb + j }];
                sum = x.mul_add(y, sum);
            }
            c[i * ldc + j] = sum;
        }
    }
}

/// Checks that `rows` stored rows of `cols` fit in `len` elements.
fn check(what: &str, len: usize, rows: usize, cols: usize, ld: usize) {
    assert!(ld >= cols || rows <= 1, "{what}: leading dimension {ld} < {cols} columns");
    let need = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * ld + cols };
    assert!(len >= need, "{what}: {len} elements, {rows}x{cols} with ld {ld} needs {need}");
}

#[allow(clippy::too_many_arguments)]
fn product(
    pool: Option<&Pool>,
    tier: Tier,
    m: usize,
    n: usize,
    k: usize,
    a: Matrix,
    b: Matrix,
    c: &mut [f32],
    ldc: usize,
    beta_one: bool,
) {
    let (ar, ac) = if a.t { (k, m) } else { (m, k) };
    let (br, bc) = if b.t { (n, k) } else { (k, n) };
    check("A", a.data.len(), ar, ac, a.ld);
    check("B", b.data.len(), br, bc, b.ld);
    check("C", c.len(), m, n, ldc);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !beta_one {
            (0..m).for_each(|i| c[i * ldc..i * ldc + n].fill(0.0));
        }
        return;
    }
    let pool = pool.filter(|p| p.threads() > 1 && m * n * k >= SERIAL);
    let (mr, nr) = tier.tile();
    let out = Out { data: c.as_mut_ptr(), ld: ldc };
    let m_panels = m.div_ceil(mr);
    let kc = k.div_ceil(k.div_ceil(KC));
    SCRATCH.with_borrow_mut(|(pa, pb)| {
        grow(pa, m_panels * mr * kc);
        grow(pb, n.min(NC).next_multiple_of(nr) * kc);
        let (pa, pb) = (Panels(pa.as_mut_ptr()), Panels(pb.as_mut_ptr()));
        for j0 in (0..n).step_by(NC) {
            let cols = (n - j0).min(NC);
            let n_panels = cols.div_ceil(nr);
            for p0 in (0..k).step_by(kc) {
                let depth = (k - p0).min(kc);
                let load = beta_one || p0 > 0;
                // A's panels are packed again for each block of columns; only
                // the vocabulary is wider than one block.
                run(pool, m_panels + n_panels, |t| {
                    // SAFETY: panel t of its buffer belongs to task t alone.
                    unsafe {
                        if t < m_panels {
                            let rows = t * mr..m.min((t + 1) * mr);
                            pack(a, rows, p0, mr, pa.slice(t * mr * depth, mr * depth));
                        } else {
                            let q = t - m_panels;
                            let span = j0 + q * nr..j0 + cols.min((q + 1) * nr);
                            let bt = Matrix { t: !b.t, ..b };
                            pack(bt, span, p0, nr, pb.slice(q * nr * depth, nr * depth));
                        }
                    }
                });
                let (sm, sn) = stripes(pool, m_panels, n_panels);
                let tasks_n = n_panels.div_ceil(sn);
                run(pool, m_panels.div_ceil(sm) * tasks_n, |t| {
                    let (ti, tj) = (t / tasks_n, t % tasks_n);
                    for q in tj * sn..n_panels.min((tj + 1) * sn) {
                        for r in ti * sm..m_panels.min((ti + 1) * sm) {
                            let (i, j) = (r * mr, q * nr);
                            // SAFETY: both panels are packed, and this tile of C
                            // is in bounds (checked above) and this task's own.
                            unsafe {
                                tile(
                                    tier,
                                    depth,
                                    pa.at(r * mr * depth),
                                    pb.at(q * nr * depth),
                                    out.at(i, j0 + j),
                                    (m - i).min(mr),
                                    (cols - j).min(nr),
                                    load,
                                );
                            }
                        }
                    }
                });
            }
        }
    });
}

/// Panels of A and of B in one task: big enough to reuse a B panel, small
/// enough to keep every thread busy.
fn stripes(pool: Option<&Pool>, m_panels: usize, n_panels: usize) -> (usize, usize) {
    let Some(pool) = pool else { return (m_panels, n_panels) };
    let (mut sm, mut sn) = (m_panels.min(24), n_panels.min(4));
    while m_panels.div_ceil(sm) * n_panels.div_ceil(sn) < 4 * pool.threads() && sm * sn > 1 {
        if sm > sn { sm = sm.div_ceil(2) } else { sn = sn.div_ceil(2) }
    }
    (sm, sn)
}

fn run(pool: Option<&Pool>, tasks: usize, f: impl Fn(usize) + Sync) {
    match pool {
        Some(pool) => pool.run(tasks, |t, _| f(t)),
        None => (0..tasks).for_each(f),
    }
}

fn grow(v: &mut Vec<f32>, len: usize) {
    if v.len() < len {
        v.resize(len, 0.0);
    }
}

/// Packs rows `rows` of op(M), k from `p0`, as `[k][width]`, zeros past the rim.
fn pack(x: Matrix, rows: Range<usize>, p0: usize, width: usize, out: &mut [f32]) {
    match width {
        32 => pack_width::<32>(x, rows, p0, out),
        16 => pack_width::<16>(x, rows, p0, out),
        12 => pack_width::<12>(x, rows, p0, out),
        8 => pack_width::<8>(x, rows, p0, out),
        6 => pack_width::<6>(x, rows, p0, out),
        _ => pack_width::<4>(x, rows, p0, out),
    }
}

fn pack_width<const W: usize>(x: Matrix, rows: Range<usize>, p0: usize, out: &mut [f32]) {
    let (have, first) = (rows.len(), rows.start);
    let (steps, _) = out.as_chunks_mut::<W>();
    if x.t {
        for (p, step) in steps.iter_mut().enumerate() {
            let at = (p0 + p) * x.ld + first;
            match x.data[at..].first_chunk::<W>() {
                Some(whole) if have == W => *step = *whole,
                _ => {
                    step[..have].copy_from_slice(&x.data[at..at + have]);
                    step[have..].fill(0.0);
                }
            }
        }
        return;
    }
    if have < W {
        steps.as_flattened_mut().fill(0.0);
    }
    // Sixteen k at a time, so that the strided writes stay in the first cache,
    // transposed by squares of four, which compile to shuffles.
    for (b, steps) in steps.chunks_mut(16).enumerate() {
        let col = p0 + b * 16;
        let (squares, n) = (have / 4 * 4, steps.len() / 4 * 4);
        for r in (0..squares).step_by(4) {
            let at: [usize; 4] = std::array::from_fn(|i| (first + r + i) * x.ld + col);
            for (q, steps) in steps[..n].as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let s: [&[f32]; 4] = at.map(|a| &x.data[a + 4 * q..a + 4 * q + 4]);
                for (j, step) in steps.iter_mut().enumerate() {
                    step[r..r + 4].copy_from_slice(&[s[0][j], s[1][j], s[2][j], s[3][j]]);
                }
            }
        }
        for r in 0..have {
            let from = if r < squares { n } else { 0 };
            let at = (first + r) * x.ld + col;
            for (p, step) in steps.iter_mut().enumerate().skip(from) {
                step[r] = x.data[at + p];
            }
        }
    }
}

/// One register tile; at the rim it goes through a full tile on the stack.
///
/// # Safety
/// `a` and `b` hold `depth` packed steps, `c` is valid for `rows` × `cols`, and
/// the machine has `tier`.
#[allow(clippy::too_many_arguments)]
unsafe fn tile(
    tier: Tier,
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: Out,
    rows: usize,
    cols: usize,
    load: bool,
) {
    let (mr, nr) = tier.tile();
    if (rows, cols) == (mr, nr) {
        // SAFETY: the caller's promise.
        return unsafe { micro(tier, depth, a, b, c, load) };
    }
    let mut full = [0.0f32; 12 * 32];
    // SAFETY: only rows × cols of C are touched; `full` holds any tier's tile.
    unsafe {
        if load {
            for i in 0..rows {
                c.data.add(i * c.ld).copy_to_nonoverlapping(full.as_mut_ptr().add(i * nr), cols);
            }
        }
        micro(tier, depth, a, b, Out { data: full.as_mut_ptr(), ld: nr }, load);
        for i in 0..rows {
            c.data.add(i * c.ld).copy_from_nonoverlapping(full.as_ptr().add(i * nr), cols);
        }
    }
}

/// # Safety
/// As [`tile`], with a full tile of C.
unsafe fn micro(tier: Tier, depth: usize, a: *const f32, b: *const f32, c: Out, load: bool) {
    // SAFETY: the caller's promise.
    unsafe {
        match tier {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 => x86::micro512(depth, a, b, c, load),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => x86::micro256(depth, a, b, c, load),
            Tier::Portable => micro_portable(depth, a, b, c, load),
        }
    }
}

/// # Safety
/// As [`micro`].
unsafe fn micro_portable(depth: usize, a: *const f32, b: *const f32, c: Out, load: bool) {
    let mut acc = [[0.0f32; 8]; 4];
    // SAFETY: the caller's promise.
    unsafe {
        if load {
            for (i, row) in acc.iter_mut().enumerate() {
                *row = c.data.add(i * c.ld).cast::<[f32; 8]>().read();
            }
        }
        for p in 0..depth {
            let x = a.add(p * 4).cast::<[f32; 4]>().read();
            let y = b.add(p * 8).cast::<[f32; 8]>().read();
            for (row, x) in acc.iter_mut().zip(x) {
                for (s, y) in row.iter_mut().zip(y) {
                    *s = x.mul_add(y, *s);
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            c.data.add(i * c.ld).cast::<[f32; 8]>().write(*row);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Out;
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`super::micro`]; needs AVX-512F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn micro512(k: usize, a: *const f32, b: *const f32, c: Out, load: bool) {
        let mut acc = [[_mm512_setzero_ps(); 2]; 12];
        // SAFETY: the caller's promise.
        unsafe {
            if load {
                for (i, row) in acc.iter_mut().enumerate() {
                    let at = c.data.add(i * c.ld);
                    *row = [_mm512_loadu_ps(at), _mm512_loadu_ps(at.add(16))];
                }
            }
            for p in 0..k {
                let b0 = _mm512_loadu_ps(b.add(p * 32));
                let b1 = _mm512_loadu_ps(b.add(p * 32 + 16));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = _mm512_set1_ps(*a.add(p * 12 + i));
                    row[0] = _mm512_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm512_fmadd_ps(x, b1, row[1]);
                }
            }
            for (i, row) in acc.iter().enumerate() {
                let at = c.data.add(i * c.ld);
                _mm512_storeu_ps(at, row[0]);
                _mm512_storeu_ps(at.add(16), row[1]);
            }
        }
    }

    /// # Safety
    /// As [`super::micro`]; needs AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn micro256(k: usize, a: *const f32, b: *const f32, c: Out, load: bool) {
        let mut acc = [[_mm256_setzero_ps(); 2]; 6];
        // SAFETY: the caller's promise.
        unsafe {
            if load {
                for (i, row) in acc.iter_mut().enumerate() {
                    let at = c.data.add(i * c.ld);
                    *row = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
                }
            }
            for p in 0..k {
                let b0 = _mm256_loadu_ps(b.add(p * 16));
                let b1 = _mm256_loadu_ps(b.add(p * 16 + 8));
                for (i, row) in acc.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(p * 6 + i));
                    row[0] = _mm256_fmadd_ps(x, b0, row[0]);
                    row[1] = _mm256_fmadd_ps(x, b1, row[1]);
                }
            }
            for (i, row) in acc.iter().enumerate() {
                let at = c.data.add(i * c.ld);
                _mm256_storeu_ps(at, row[0]);
                _mm256_storeu_ps(at.add(8), row[1]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tiers() -> Vec<Tier> {
        let mut all = vec![Tier::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                all.push(Tier::Avx2);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                all.push(Tier::Avx512);
            }
        }
        all
    }

    /// Values whose products round, from a small congruential generator.
    fn noise(len: usize, seed: u64) -> Vec<f32> {
        let mut s = seed.wrapping_mul(2) + 1;
        (0..len)
            .map(|_| {
                s = s.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn case(m: usize, n: usize, k: usize, pad: usize, flags: [bool; 3], seed: u64) {
        let [ta, tb, beta] = flags;
        let (lda, ldb, ldc) = (if ta { m } else { k } + pad, if tb { k } else { n } + pad, n + pad);
        let a = noise(lda * if ta { k } else { m }, seed);
        let b = noise(ldb * if tb { n } else { k }, seed + 1);
        let start = noise(ldc * m, seed + 2);
        let mut want = start.clone();
        reference(m, n, k, &a, lda, ta, &b, ldb, tb, &mut want, ldc, beta);
        let (ma, mb) = (Matrix { data: &a, ld: lda, t: ta }, Matrix { data: &b, ld: ldb, t: tb });
        for tier in tiers() {
            for threads in [0, 1, 2, 3] {
                let pool = (threads > 0).then(|| Pool::new(threads));
                let mut got = start.clone();
                product(pool.as_deref(), tier, m, n, k, ma, mb, &mut got, ldc, beta);
                let same = got.iter().zip(&want).all(|(x, y)| x.to_bits() == y.to_bits());
                assert!(same, "{tier:?} {threads} threads {m}x{n}x{k} {flags:?}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn every_tier_and_thread_count_equals_the_reference(
            m in 0usize..70, n in 0usize..90, k in 0usize..70, pad in 0usize..3,
            flags: [bool; 3], seed in 0u64..1000,
        ) {
            case(m, n, k, pad, flags, seed);
        }
    }

    #[test]
    fn blocks_of_k_and_of_columns_join() {
        case(25, 33, 2 * KC + 5, 1, [false, true, false], 7);
        case(13, NC + 37, 40, 0, [true, false, true], 8);
    }

    #[test]
    #[should_panic(expected = "C: 5 elements")]
    fn refuses_a_short_slice() {
        sgemm_serial(2, 3, 1, &[0.0; 2], 1, false, &[0.0; 3], 3, false, &mut [0.0; 5], 3, false);
    }

    /// `cargo test --release -p ashlar-kernels sgemm_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn sgemm_speed() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Pool::new(threads);
        for tier in tiers().into_iter().filter(|t| *t != Tier::Portable) {
            for (m, n, k, tb) in [(512, 960, 576, true), (512, 3072, 576, true), (512, 576, 3072, false), (128, 49152, 576, true)] {
                let (a, b) = (noise(m * k, 1), noise(n * k, 2));
                let mut c = vec![0.0; m * n];
                let mut best = f64::MAX;
                for _ in 0..8 {
                    let t = std::time::Instant::now();
                    let (ma, mb) = (Matrix { data: &a, ld: k, t: false }, Matrix { data: &b, ld: if tb { k } else { n }, t: tb });
                    product(Some(&pool), tier, m, n, k, ma, mb, &mut c, n, false);
                    best = best.min(t.elapsed().as_secs_f64());
                }
                let gflops = 2.0 * (m * n * k) as f64 / best / 1e9;
                eprintln!("{tier:?} {threads} threads {m}x{n}x{k}: {gflops:.0} GFLOP/s");
            }
        }
    }
}
