//! From a row of logits to a token.
//!
//! A choice depends on the row, the request's settings, its tokens so far and
//! its seed: never on time, batch or what was sampled elsewhere. Each position
//! draws its own number from `(seed, position)`, so a request that was
//! preempted continues as if nothing had happened.
//!
//! Order: penalties, bias, temperature, `min_p`, `top_k`, `top_p`.

use ashlar_api::Sampling;

/// Resolved settings of one request.
#[derive(Debug, Clone)]
pub(crate) struct Sampler {
    temperature: f32,
    top_p: f32,
    top_k: usize,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    bias: Vec<(u32, f32)>,
    seed: u64,
    logprobs: bool,
}

/// Buffers shared by every request of one scheduler.
#[derive(Default)]
pub(crate) struct Scratch {
    logits: Vec<f32>,
    candidates: Vec<(f32, u32)>,
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    /// Of the unchanged row, when asked for.
    pub(crate) logprob: Option<f32>,
}

impl Sampler {
    pub(crate) fn new(s: &Sampling) -> Self {
        Self {
            temperature: s.temperature.unwrap_or(1.0),
            top_p: s.top_p.unwrap_or(1.0),
            top_k: s.top_k.unwrap_or(0) as usize,
            min_p: s.min_p.unwrap_or(0.0),
            repetition: s.repetition_penalty.unwrap_or(1.0),
            presence: s.presence_penalty.unwrap_or(0.0),
            frequency: s.frequency_penalty.unwrap_or(0.0),
            bias: s.logit_bias.clone(),
            seed: s.seed.map_or_else(random, |s| s as u64),
            logprobs: s.logprobs,
        }
    }

    /// Chooses the token after `tokens`, of which the first `prompt` are the
    /// prompt's. `None` when the row has no finite logit.
    pub(crate) fn choose(
        &self,
        row: &[f32],
        tokens: &[u32],
        prompt: usize,
        scratch: &mut Scratch,
    ) -> Option<Choice> {
        let changed = self.repetition != 1.0
            || self.presence != 0.0
            || self.frequency != 0.0
            || !self.bias.is_empty();
        let token = if changed {
            let mut logits = std::mem::take(&mut scratch.logits);
            logits.clear();
            logits.extend_from_slice(row);
            self.penalize(&mut logits, tokens, prompt);
            let token = self.pick(&logits, tokens.len(), scratch);
            scratch.logits = logits;
            token
        } else {
            self.pick(row, tokens.len(), scratch)
        }?;
        Some(Choice {
            token,
            logprob: self.logprobs.then(|| logprob(row, token) as f32),
        })
    }

    fn penalize(&self, logits: &mut [f32], tokens: &[u32], prompt: usize) {
        let runs = |part: &[u32], change: &mut dyn FnMut(&mut f32, usize)| {
            let mut ids = part.to_vec();
            ids.sort_unstable();
            for run in ids.chunk_by(|a, b| a == b) {
                if let Some(l) = logits.get_mut(run[0] as usize) {
                    change(l, run.len());
                }
            }
        };
        let mut runs = runs;
        if self.repetition != 1.0 {
            runs(tokens, &mut |l, _| {
                *l = if *l > 0.0 {
                    *l / self.repetition
                } else {
                    *l * self.repetition
                };
            });
        }
        if self.presence != 0.0 || self.frequency != 0.0 {
            runs(&tokens[prompt..], &mut |l, n| {
                *l -= self.presence + self.frequency * n as f32;
            });
        }
        for &(id, bias) in &self.bias {
            if let Some(l) = logits.get_mut(id as usize) {
                *l += bias;
            }
        }
    }

    fn pick(&self, logits: &[f32], position: usize, scratch: &mut Scratch) -> Option<u32> {
        let (best, max) = argmax(logits)?;
        if self.temperature == 0.0 {
            return Some(best);
        }
        let all = &mut scratch.candidates;
        all.clear();
        all.extend(
            (0u32..)
                .zip(logits)
                .map(|(id, &l)| (((l - max) / self.temperature).exp(), id))
                // Below this the draw's 53 bits cannot reach it.
                .filter(|&(w, _)| w > 1e-20 && w >= self.min_p),
        );
        if self.top_k > 0 && self.top_k < all.len() {
            all.select_nth_unstable_by(self.top_k - 1, by_weight);
            all.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            nucleus(all, self.top_p);
        }
        // In order of ids, so that sums do not depend on how the set was found.
        all.sort_unstable_by_key(|&(_, id)| id);
        let total: f64 = all.iter().map(|&(w, _)| f64::from(w)).sum();
        let mut left = uniform(self.seed, position as u64) * total;
        for &(w, id) in all.iter() {
            left -= f64::from(w);
            if left < 0.0 {
                return Some(id);
            }
        }
        Some(best)
    }
}

/// Likelier first, then the lower id.
fn by_weight(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the smallest set of likeliest candidates with a share of at least
/// `top_p`, one at the least; sorts no more of them than needed.
fn nucleus(all: &mut Vec<(f32, u32)>, top_p: f32) {
    all.sort_unstable_by_key(|&(_, id)| id);
    let total: f64 = all.iter().map(|&(w, _)| f64::from(w)).sum();
    let wanted = total * f64::from(top_p);
    let mut head = 64;
    loop {
        let whole = head >= all.len();
        if !whole {
            all.select_nth_unstable_by(head, by_weight);
        }
        let n = head.min(all.len());
        all[..n].sort_unstable_by(by_weight);
        let mut sum = 0.0;
        for i in 0..n {
            sum += f64::from(all[i].0);
            if sum >= wanted {
                all.truncate(i + 1);
                return;
            }
        }
        if whole {
            return;
        }
        head *= 8;
    }
}

/// The likeliest token, the lowest id among equals, and its logit; NaN never
/// wins.
pub(crate) fn argmax(row: &[f32]) -> Option<(u32, f32)> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &l) in (0u32..).zip(row) {
        if l.is_finite() && best.is_none_or(|(_, b)| l > b) {
            best = Some((id, l));
        }
    }
    best
}

/// Natural log of the share of `token` in the softmax of `row`.
pub(crate) fn logprob(row: &[f32], token: u32) -> f64 {
    let max = argmax(row).map_or(0.0, |(_, m)| m);
    let sum: f64 = row.iter().map(|&l| f64::from((l - max).exp())).sum();
    row.get(token as usize)
        .map_or(f64::NEG_INFINITY, |&l| f64::from(l - max) - sum.ln())
}

/// A number in 0..1 for one position of one request: SplitMix64 (Steele, Lea,
/// Flood 2014) of the seed, stepped by the position.
fn uniform(seed: u64, position: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let step = position.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    // Mixed once before stepping, so that near seeds do not share a sequence.
    let bits = mix(mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15)).wrapping_add(step));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// A seed for requests that gave none, from the standard library's randomly
/// keyed hasher.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn draw(s: &Sampling, row: &[f32], position: usize) -> u32 {
        let tokens = vec![0; position];
        let mut scratch = Scratch::default();
        Sampler::new(s)
            .choose(row, &tokens, position, &mut scratch)
            .unwrap()
            .token
    }

    fn seeded() -> Sampling {
        Sampling {
            seed: Some(7),
            ..Sampling::default()
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_on_ties_and_never_nan() {
        let s = Sampling {
            temperature: Some(0.0),
            ..Sampling::default()
        };
        assert_eq!(draw(&s, &[f32::NAN, 1.0, 3.0, 3.0], 0), 2);
        let mut scratch = Scratch::default();
        let none = Sampler::new(&s).choose(&[f32::NAN, f32::NEG_INFINITY], &[], 0, &mut scratch);
        assert_eq!(none, None);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let row = [0.0f32, (2.0f32).ln(), (5.0f32).ln()];
        let mut counts = [0u32; 3];
        for position in 0..40_000 {
            counts[draw(&seeded(), &row, position) as usize] += 1;
        }
        for (n, p) in counts.iter().zip([1.0 / 8.0, 2.0 / 8.0, 5.0 / 8.0]) {
            let share = f64::from(*n) / 40_000.0;
            assert!((share - p).abs() < 0.01, "{share} for {p}");
        }
    }

    #[test]
    fn truncations_keep_only_what_they_name() {
        let row = [5.0f32, 4.0, 3.0, -1.0];
        let seen = |s: Sampling| {
            (0..3000)
                .map(|i| draw(&s, &row, i))
                .collect::<std::collections::BTreeSet<_>>()
        };
        let set = |ids: &[u32]| ids.iter().copied().collect();
        assert_eq!(
            seen(Sampling {
                top_k: Some(2),
                ..seeded()
            }),
            set(&[0, 1])
        );
        assert_eq!(
            seen(Sampling {
                top_p: Some(0.0),
                ..seeded()
            }),
            set(&[0])
        );
        assert_eq!(
            seen(Sampling {
                top_p: Some(0.8),
                ..seeded()
            }),
            set(&[0, 1])
        );
        assert_eq!(
            seen(Sampling {
                min_p: Some(0.1),
                ..seeded()
            }),
            set(&[0, 1, 2])
        );
        assert_eq!(
            seen(Sampling {
                logit_bias: vec![(3, 100.0)],
                ..seeded()
            }),
            set(&[3])
        );
        assert_eq!(
            seen(Sampling {
                temperature: Some(1e-30),
                ..seeded()
            }),
            set(&[0])
        );
    }

    #[test]
    fn penalties_act_on_what_was_said() {
        let greedy = Sampling {
            temperature: Some(0.0),
            ..Sampling::default()
        };
        let row = [2.0f32, 1.9, -1.0];
        let pick = |s: Sampling, tokens: &[u32], prompt| {
            let mut scratch = Scratch::default();
            Sampler::new(&s)
                .choose(&row, tokens, prompt, &mut scratch)
                .unwrap()
                .token
        };
        let presence = Sampling {
            presence_penalty: Some(0.5),
            ..greedy.clone()
        };
        assert_eq!(
            pick(presence.clone(), &[0], 1),
            0,
            "the prompt does not count"
        );
        assert_eq!(pick(presence, &[0, 0], 1), 1);
        let frequency = Sampling {
            frequency_penalty: Some(0.06),
            ..greedy.clone()
        };
        assert_eq!(pick(frequency.clone(), &[0], 0), 0);
        assert_eq!(pick(frequency, &[0, 0], 0), 1);
        let repetition = Sampling {
            repetition_penalty: Some(1.2),
            ..greedy
        };
        assert_eq!(pick(repetition, &[0], 1), 1, "the prompt counts");
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let row = [0.0f32, (3.0f32).ln()];
        assert!((logprob(&row, 1) - 0.75f64.ln()).abs() < 1e-6);
        assert_eq!(logprob(&row, 9), f64::NEG_INFINITY);
    }

    proptest! {
        /// The partial sort finds the set a full sort finds.
        #[test]
        fn nucleus_is_exact(weights in prop::collection::vec(1e-6f32..1.0, 1..700), p in 0f32..1.0) {
            let all: Vec<(f32, u32)> = weights.into_iter().zip(0..).collect();
            let total: f64 = all.iter().map(|x| f64::from(x.0)).sum();
            let mut full = all.clone();
            full.sort_unstable_by(by_weight);
            let mut sum = 0.0;
            let n = full.iter().position(|x| { sum += f64::from(x.0); sum >= total * f64::from(p) });
            full.truncate(n.map_or(full.len(), |n| n + 1));
            let mut fast = all;
            nucleus(&mut fast, p);
            prop_assert_eq!(fast, full);
        }

        #[test]
        fn any_row_gives_a_token_of_the_row(
            row in prop::collection::vec(-1e30f32..1e30, 1..50), temperature in 0f32..2.0,
            top_p in 0f32..=1.0, top_k in 0u32..60, min_p in 0f32..=1.0, seed: i64,
        ) {
            let s = Sampling { temperature: Some(temperature), top_p: Some(top_p), top_k: Some(top_k), min_p: Some(min_p), seed: Some(seed), ..Sampling::default() };
            prop_assert!((draw(&s, &row, 3) as usize) < row.len());
            prop_assert_eq!(draw(&s, &row, 3), draw(&s, &row, 3));
        }
    }
}
