//! The predicted buffers against what the allocator hands out. A test program
//! of its own, for it counts every allocation of the process.

mod common;

use common::file;
use ashlar_model::{BLOCK, Item, KvCache, KvType, Model, Pool, Want, Workspace, held_bytes, tables_bytes, workspace_bytes};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

struct Counting;

/// What the allocator has given and what the kernels took beside it.
fn live() -> usize {
    LIVE.load(Ordering::Relaxed) + held_bytes()
}

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes kept by a fresh workspace after steps of these many rows, of which
/// `wanted` give logits.
fn kept(model: &Model, cache: &mut KvCache, steps: &[usize], wanted: usize) -> usize {
    let tokens = vec![7; BLOCK * 16];
    let blocks: Vec<u32> = (0..16).collect();
    // On a thread of its own: what a kernel keeps for its thread goes with it.
    std::thread::scope(|scope| {
        let work = move || {
            let before = live();
            let mut ws = Workspace::default();
            for &rows in steps {
                let wanted = wanted.min(rows);
                let (quiet, loud) = (rows - wanted, BLOCK * 15);
                let items = [
                    Item { tokens: &tokens[..quiet], start: 0, blocks: &blocks, want: Want::None },
                    Item { tokens: &tokens[..wanted], start: loud, blocks: &blocks, want: Want::All },
                ];
                model.forward(&items, cache, &mut ws).unwrap();
            }
            live() - before
        };
        scope.spawn(work).join().unwrap()
    })
}

#[test]
fn a_step_takes_what_was_predicted() {
    let Some(path) = file() else { return };
    // One thread, so that no other allocates beside the counted one.
    let before = live();
    let model = Model::load_with(&path, Pool::new(1)).unwrap();
    let got = live() - before;
    let want = model.bytes() + tables_bytes(model.config());
    eprintln!("model: {got} bytes, {want} predicted");
    // Angles come as positions are used.
    let least = want - 4 * model.config().context * model.config().head_dim;
    assert!(got >= least && got < want + want / 100, "model: {got} bytes, {want} predicted");
    let before = live();
    let mut cache = KvCache::new(model.config(), 16);
    let cached = live() - before;
    let blocks = 16 * KvCache::block_bytes(model.config(), KvType::F16);
    assert!(cached >= blocks && cached < blocks + 4096, "{cached} bytes for {blocks}");
    // Angles of these positions are made, and are not a step's.
    kept(&model, &mut cache, &[BLOCK * 15], 1);
    for (rows, wanted) in [(1, 1), (272, 16), (272, 32), (40, 32), (480, 1)] {
        let want = workspace_bytes(model.config(), rows, wanted, 1);
        let got = kept(&model, &mut cache, &[rows], wanted);
        eprintln!("{rows} rows, {wanted} wanted: {got} bytes, {want} predicted");
        assert!(got <= want, "{rows} rows, {wanted} wanted: {got} bytes, {want} predicted");
        assert!(got as f64 > 0.8 * want as f64, "{got} bytes, {want} predicted: too much");
        if rows == 272 {
            // Just above half: the most that doubling wastes.
            let got = kept(&model, &mut cache, &[3, rows / 2 + 1, rows], wanted);
            eprintln!("  grown: {got} bytes");
            assert!(got <= 2 * want, "grown to {got} bytes, twice {want} predicted");
        }
    }
}
