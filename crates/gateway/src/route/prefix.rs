//! Which prompts went where: an approximation of what each target's prefix
//! cache holds.
//!
//! A prompt's JSON is cut into blocks; each block's hash covers all before it,
//! so equal hashes mean equal beginnings. Targets are remembered per block.
//! What a server has thrown out of its cache meanwhile is not known: blocks not
//! sent for a while are forgotten, and a wrong guess costs one prompt computed
//! again.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Mutex, PoisonError},
};

/// Bytes of JSON a block: about 128 tokens.
pub(crate) const BLOCK_BYTES: usize = 512;
/// Blocks of one prompt that are looked at; what shares so many is shared.
const MOST_BLOCKS: usize = 512;
/// Blocks remembered in all.
const CAPACITY: usize = 1 << 16;

/// Hashes of a prompt's blocks, whole ones only.
pub(crate) fn blocks(model: &str, tools: &str, prompt: &str) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    (model, tools).hash(&mut hasher);
    let whole = prompt.as_bytes().chunks_exact(BLOCK_BYTES).take(MOST_BLOCKS);
    whole
        .map(|block| {
            hasher.write(block);
            hasher.finish()
        })
        .collect()
}

/// Blocks a prompt has, a begun one included.
pub(crate) fn count(prompt: &str) -> u64 {
    prompt.len().div_ceil(BLOCK_BYTES) as u64
}

/// For each block: targets it was sent to, and when last.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    blocks: HashMap<u64, (Vec<u64>, u64)>,
    tick: u64,
}

impl PrefixIndex {
    /// How many of `blocks`, from the first on, each of `targets` was sent.
    pub(crate) fn overlap(&self, blocks: &[u64], targets: &[u64]) -> Vec<u64> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        targets
            .iter()
            .map(|t| blocks.iter().take_while(|b| held.blocks.get(b).is_some_and(|(at, _)| at.contains(t))).count() as u64)
            .collect()
    }

    /// `blocks` were sent to `target`.
    pub(crate) fn sent(&self, blocks: &[u64], target: u64) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.tick += 1;
        let tick = held.tick;
        for block in blocks {
            let (targets, used) = held.blocks.entry(*block).or_default();
            *used = tick;
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        if held.blocks.len() > CAPACITY {
            // The half longest unused goes, so that the next thousands of
            // requests need no tidying.
            let mut ages: Vec<u64> = held.blocks.values().map(|(_, used)| *used).collect();
            let (_, middle, _) = ages.select_nth_unstable(CAPACITY / 2);
            let oldest = *middle;
            held.blocks.retain(|_, (_, used)| *used > oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_alike_overlaps() {
        let index = PrefixIndex::default();
        let long = "x".repeat(BLOCK_BYTES * 4 + 10);
        let a = blocks("m", "", &long);
        assert_eq!((a.len(), count(&long)), (4, 5));
        index.sent(&a[..3], 1);
        index.sent(&a[..1], 2);
        assert_eq!(index.overlap(&a, &[1, 2, 3]), [3, 1, 0]);
        let mut other = long.clone();
        other.replace_range(BLOCK_BYTES..=BLOCK_BYTES, "y");
        assert_eq!(index.overlap(&blocks("m", "", &other), &[1]), [1], "the same up to the change only");
        assert_eq!(index.overlap(&blocks("n", "", &long), &[1]), [0], "another model has another cache");
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stays() {
        let index = PrefixIndex::default();
        for i in 0..3 * CAPACITY as u64 {
            index.sent(&[i], 1);
        }
        assert!(index.0.lock().unwrap().blocks.len() <= CAPACITY);
        assert_eq!(index.overlap(&[3 * CAPACITY as u64 - 1], &[1]), [1]);
    }
}
