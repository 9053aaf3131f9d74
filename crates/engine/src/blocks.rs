//! Who holds which KV block, and which free blocks still hold a known prefix.
//!
//! A full block is known by the digest of its tokens chained onto its parent's,
//! so equal digests mean equal prefixes. Freed known blocks stay reusable until
//! their room is needed, the longest unused first.
//!
//! Rejected: a cheaper hash. A collision would let one client read another's
//! context, and SHA-256 of a block costs a thousandth of computing it.

use ashlar_core::{Digest, Hasher};
use std::collections::{BTreeMap, HashMap};

#[derive(Clone, Default)]
struct Block {
    refs: u32,
    /// Its entry in `known`.
    key: Option<Digest>,
    /// Its entry in `idle`, while free and known.
    tick: u64,
}

/// The block pool.
pub(crate) struct Blocks {
    blocks: Vec<Block>,
    /// Free and holding nothing known.
    blank: Vec<u32>,
    /// Free and known, by the time they were freed.
    idle: BTreeMap<u64, u32>,
    known: HashMap<Digest, u32>,
    clock: u64,
}

/// The name of a block holding `tokens` after the block named `parent`.
pub(crate) fn chain(parent: Option<&Digest>, tokens: &[u32]) -> Digest {
    let mut h = Hasher::new();
    h.update(parent.unwrap_or(&Digest::from_bytes([0; 32])).as_bytes());
    for t in tokens {
        h.update(&t.to_le_bytes());
    }
    h.finish()
}

impl Blocks {
    pub(crate) fn new(total: usize) -> Self {
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        Self {
            blocks: vec![Block::default(); total as usize],
            blank: (0..total).rev().collect(),
            idle: BTreeMap::new(),
            known: HashMap::new(),
            clock: 0,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks nobody holds.
    pub(crate) fn free(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Of these, the ones whose content may be found again.
    pub(crate) fn cached(&self) -> usize {
        self.idle.len()
    }

    /// Takes the blocks of the longest known prefix of `keys`.
    pub(crate) fn find(&mut self, keys: &[Digest]) -> Vec<u32> {
        let found: Vec<u32> = keys
            .iter()
            .map_while(|k| self.known.get(k).copied())
            .collect();
        for &id in &found {
            let b = &mut self.blocks[id as usize];
            if b.refs == 0 {
                self.idle.remove(&b.tick);
            }
            b.refs += 1;
        }
        found
    }

    /// Takes a block to write into; one that holds nothing known if there is
    /// one, else the longest unused.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let id = self.blank.pop().or_else(|| {
            let (_, id) = self.idle.pop_first()?;
            if let Some(key) = self.blocks[id as usize].key.take() {
                self.known.remove(&key);
            }
            Some(id)
        })?;
        self.blocks[id as usize].refs = 1;
        Some(id)
    }

    /// Makes the full block `id` findable. A second block of the same content
    /// stays unknown.
    pub(crate) fn publish(&mut self, id: u32, key: Digest) {
        let b = &mut self.blocks[id as usize];
        if b.key.is_none() && !self.known.contains_key(&key) {
            b.key = Some(key);
            self.known.insert(key, id);
        }
    }

    /// Gives up a sequence's blocks, its last one first, so that a prefix
    /// outlives what hangs on it.
    pub(crate) fn release(&mut self, ids: &mut Vec<u32>) {
        while let Some(id) = ids.pop() {
            let b = &mut self.blocks[id as usize];
            b.refs -= 1;
            if b.refs > 0 {
                continue;
            }
            if b.key.is_some() {
                self.clock += 1;
                b.tick = self.clock;
                self.idle.insert(b.tick, id);
            } else {
                self.blank.push(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(tokens: &[u32]) -> Vec<Digest> {
        let mut out: Vec<Digest> = Vec::new();
        for t in tokens {
            out.push(chain(out.last(), &[*t]));
        }
        out
    }

    #[test]
    fn a_prefix_outlives_its_tail() {
        let mut p = Blocks::new(3);
        let k = keys(&[1, 2, 3]);
        let mut ids: Vec<u32> = (0..3).map(|_| p.take().unwrap()).collect();
        for (id, key) in ids.iter().zip(&k) {
            p.publish(*id, *key);
        }
        assert!(p.take().is_none());
        p.release(&mut ids);
        assert_eq!((p.free(), p.cached()), (3, 3));
        let mut other = vec![p.take().unwrap()];
        assert_eq!(p.find(&k).len(), 2, "the tail went first");
        p.release(&mut other);
    }

    proptest! {
        /// Against a model of the pool: nothing is lost, nothing is shared
        /// unless found, and what is found is what was published.
        #[test]
        fn blocks_are_never_lost_or_mixed_up(
            ops in prop::collection::vec((0u8..3, prop::collection::vec(0u32..3, 1..5)), 1..80)
        ) {
            let total = 6;
            let mut p = Blocks::new(total);
            let mut content: HashMap<u32, Digest> = HashMap::new();
            let mut held: Vec<Vec<u32>> = Vec::new();
            for (op, tokens) in ops {
                if op == 2 && !held.is_empty() {
                    let mut ids = held.remove(tokens[0] as usize % held.len());
                    p.release(&mut ids);
                } else {
                    let k = keys(&tokens);
                    let mut ids = p.find(&k);
                    for (id, key) in ids.iter().zip(&k) {
                        prop_assert_eq!(content[id], *key);
                    }
                    let fresh = ids.len();
                    while ids.len() < k.len() {
                        match p.take() {
                            Some(id) => {
                                prop_assert!(!held.iter().flatten().any(|h| *h == id));
                                ids.push(id);
                            }
                            None => break,
                        }
                    }
                    for (i, &id) in ids.iter().enumerate().skip(fresh) {
                        content.insert(id, k[i]);
                        p.publish(id, k[i]);
                    }
                    held.push(ids);
                }
                let used: std::collections::BTreeSet<u32> = held.iter().flatten().copied().collect();
                prop_assert_eq!(p.free() + used.len(), total);
            }
            for mut ids in held {
                p.release(&mut ids);
            }
            prop_assert_eq!(p.free(), total);
            prop_assert!(p.blocks.iter().all(|b| b.refs == 0));
        }
    }
}
