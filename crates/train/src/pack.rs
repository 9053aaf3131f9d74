//! Samples to rows: which samples make a step, and how a step's samples lie side
//! by side without seeing each other.
//!
//! Samples of one pack that open with the same tokens (a template's system
//! prompt) share those rows: computed once, seen by all, given gradients by all.
//! Rows whose output nothing needs (the last trained token and what follows) are
//! left out. Neither changes a gradient; `network` tests that.

use crate::{Sample, TrainConfig, TrainError, rng::Rng};
use std::ops::Range;

/// Rows of one pack: bounds the memory of stored activations.
const PACK_ROWS: usize = 1024;

/// Rows computed together.
pub(crate) struct Pack {
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    /// Rows `0..prefix` are seen by every segment.
    pub prefix: usize,
    /// Rows that see each other causally; the shared prefix, if any, is the first.
    pub segments: Vec<Range<usize>>,
    /// Row and the token it has to predict.
    pub targets: Vec<(usize, u32)>,
}

/// Tokens a sample trains on.
fn trained(s: &Sample) -> impl Iterator<Item = usize> {
    (1..s.tokens.len()).filter(|&i| s.trained[i])
}

/// Trained tokens of a sample.
pub(crate) fn trained_len(s: &Sample) -> usize {
    trained(s).count()
}

/// Rows a sample needs: all before its last trained token.
fn needed(s: &Sample) -> usize {
    trained(s).last().unwrap_or(0)
}

/// How many opening rows all samples have in common; 0 for a lone sample.
fn common(samples: &[&Sample]) -> usize {
    let [first, rest @ ..] = samples else { return 0 };
    if rest.is_empty() {
        return 0;
    }
    let same = |s: &&Sample| s.tokens.iter().zip(&first.tokens).take_while(|(a, b)| a == b).count();
    let shortest = samples.iter().map(|s| needed(s)).min().unwrap_or(0);
    rest.iter().map(same).min().unwrap_or(0).min(shortest)
}

impl Pack {
    /// Lays out `samples`, sharing their common opening if `share`.
    pub(crate) fn new(samples: &[&Sample], share: bool) -> Self {
        let prefix = if share { common(samples) } else { 0 };
        let mut pack = Self {
            tokens: Vec::new(),
            positions: Vec::new(),
            prefix,
            segments: Vec::new(),
            targets: Vec::new(),
        };
        let add = |pack: &mut Self, s: &Sample, span: Range<usize>| {
            let start = pack.tokens.len();
            pack.tokens.extend(&s.tokens[span.clone()]);
            pack.positions.extend(span.map(|p| p as u32));
            if pack.tokens.len() > start {
                pack.segments.push(start..pack.tokens.len());
            }
            start
        };
        if let Some(first) = samples.first() {
            add(&mut pack, first, 0..prefix);
        }
        for s in samples {
            let start = add(&mut pack, s, prefix..needed(s));
            // A token at `i` is predicted by the row before it, which may be shared.
            pack.targets.extend(trained(s).map(|i| {
                let before = i - 1;
                let row = if before < prefix { before } else { start + before - prefix };
                (row, s.tokens[i])
            }));
        }
        pack
    }

    /// Rows.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// One optimizer step.
pub(crate) struct Batch {
    /// From 0.
    pub epoch: usize,
    /// Positions in the list of samples.
    pub samples: Vec<usize>,
}

impl Batch {
    /// Packs of at most [`PACK_ROWS`] rows, a longer sample alone.
    pub(crate) fn packs(&self, samples: &[Sample]) -> Vec<Pack> {
        let mut groups: Vec<Vec<&Sample>> = vec![];
        let mut rows = 0;
        for s in self.samples.iter().map(|&i| &samples[i]) {
            let n = needed(s);
            match groups.last_mut() {
                Some(group) if rows + n <= PACK_ROWS => group.push(s),
                _ => {
                    groups.push(vec![s]);
                    rows = 0;
                }
            }
            rows += n;
        }
        groups.iter().map(|g| Pack::new(g, true)).collect()
    }
}

/// Every step of the run: each epoch shuffled by the seed and cut into steps of
/// near-equal tokens.
pub(crate) fn plan(samples: &[Sample], config: &TrainConfig) -> Vec<Batch> {
    let total: usize = samples.iter().map(|s| s.tokens.len()).sum();
    let steps = total.div_ceil(config.batch_tokens).max(1);
    let mut plan = Vec::new();
    for epoch in 0..config.epochs {
        let mut order: Vec<usize> = (0..samples.len()).collect();
        Rng::new(config.seed, 1 + epoch as u64).shuffle(&mut order);
        let mut parts = vec![vec![]; steps];
        let mut seen = 0;
        for i in order {
            let len = samples[i].tokens.len();
            parts[((seen + len / 2) * steps / total).min(steps - 1)].push(i);
            seen += len;
        }
        parts.retain(|p| !p.is_empty());
        plan.extend(parts.into_iter().map(|samples| Batch { epoch, samples }));
    }
    plan
}

/// Refuses samples that cannot be trained on whole.
pub(crate) fn check(samples: &[Sample], vocab: usize, context: usize) -> Result<(), TrainError> {
    if samples.is_empty() {
        return Err(TrainError::NoSamples);
    }
    for (index, s) in samples.iter().enumerate() {
        let tokens = s.tokens.len();
        if s.trained.len() != tokens {
            return Err(TrainError::Mask { index, tokens, mask: s.trained.len() });
        }
        if tokens > context {
            return Err(TrainError::TooLong { index, tokens, context });
        }
        if let Some(&token) = s.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(TrainError::Token { index, token, vocab });
        }
        if trained_len(s) == 0 {
            return Err(TrainError::NothingTrained { index, tokens });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::sample;

    #[test]
    fn shares_the_opening_and_drops_unneeded_rows() {
        let a = sample(&[1, 2, 3, 4, 5, 6], 3..5);
        let b = sample(&[1, 2, 3, 7, 8], 4..5);
        let p = Pack::new(&[&a, &b], true);
        // a's first target, at 3, is predicted from row 2: the last shared one.
        assert_eq!(p.prefix, 3);
        assert_eq!(p.tokens, [1, 2, 3, 4, 7]);
        assert_eq!(p.positions, [0, 1, 2, 3, 3]);
        assert_eq!(p.segments, [0..3, 3..4, 4..5]);
        assert_eq!(p.targets, [(2, 4), (3, 5), (4, 8)]);
        let q = Pack::new(&[&a, &b], false);
        assert_eq!(q.tokens, [1, 2, 3, 4, 1, 2, 3, 7]);
        assert_eq!(q.targets, [(2, 4), (3, 5), (7, 8)]);
    }

    #[test]
    fn a_plan_takes_each_sample_once_an_epoch_in_the_seeds_order() {
        let samples: Vec<_> = (0..40).map(|i| sample(&vec![1; 5 + i % 7], 2..4)).collect();
        let config = TrainConfig { batch_tokens: 50, epochs: 2, ..Default::default() };
        let plan_ = plan(&samples, &config);
        for epoch in 0..2 {
            let mut all: Vec<_> =
                plan_.iter().filter(|b| b.epoch == epoch).flat_map(|b| b.samples.clone()).collect();
            assert_ne!(all, (0..40).collect::<Vec<_>>());
            all.sort_unstable();
            assert_eq!(all, (0..40).collect::<Vec<_>>());
        }
        for b in &plan_ {
            let tokens: usize = b.samples.iter().map(|&i| samples[i].tokens.len()).sum();
            assert!((35..=65).contains(&tokens), "{tokens}");
        }
        let other = plan(&samples, &TrainConfig { seed: 1, ..config });
        assert!(plan_.iter().zip(&other).any(|(a, b)| a.samples != b.samples));
    }

    #[test]
    fn refuses_what_cannot_be_trained_on() {
        let good = sample(&[1, 2, 3], 1..2);
        let bad = |s: Sample| check(&[good.clone(), s], 10, 4).unwrap_err();
        assert!(matches!(check(&[], 10, 4), Err(TrainError::NoSamples)));
        assert!(check(&[good.clone()], 10, 4).is_ok());
        assert!(matches!(
            bad(sample(&[1, 2], 0..1)),
            TrainError::NothingTrained { index: 1, tokens: 2 }
        ));
        assert!(matches!(
            bad(sample(&[1; 5], 1..2)),
            TrainError::TooLong { index: 1, tokens: 5, context: 4 }
        ));
        assert!(matches!(
            bad(sample(&[1, 10], 1..2)),
            TrainError::Token { index: 1, token: 10, vocab: 10 }
        ));
        let mask = Sample { tokens: vec![1, 2], trained: vec![true] };
        assert!(matches!(bad(mask), TrainError::Mask { index: 1, tokens: 2, mask: 1 }));
    }
}
