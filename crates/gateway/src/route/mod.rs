//! Which target answers a request, in which order others are tried, and why.
//!
//! [`Route::choose`] is a function of the request, the targets' load and health
//! and a random number; it sends nothing. `attempt` walks the order it gives.
//!
//! What may not happen here: a target that cannot do what the request asks for
//! is chosen, or one is left out without a reason in the record.

mod budget;
mod canary;
mod decision;
mod fit;
mod load;
mod prefix;
mod rules;

pub(crate) use budget::Budget;
pub(crate) use canary::{Canary, Seen};
pub(crate) use decision::{Attempt, Candidate, Decision, Decisions, Stage};
pub(crate) use fit::{Fit, Judged};
pub(crate) use load::{InFlight, Load};
pub(crate) use prefix::PrefixIndex;
pub(crate) use rules::Rule;

use crate::{ask::Ask, config::Policy, mirror::Mirror, node::Node};
use ashlar_api::ApiError;
use ashlar_core::clock;
use ashlar_store::{PriceList, Tokens};
use std::{
    cmp::Ordering,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// Tokens an answer is taken to have before one was seen.
const USUAL_ANSWER: u32 = 256;

/// A model on a backend.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) node: Arc<Node>,
    /// What the backend calls the model.
    pub(crate) model: String,
    pub(crate) weight: f64,
    pub(crate) prices: Option<Arc<PriceList>>,
    pub(crate) load: Arc<Load>,
    /// Names it in the prefix index.
    pub(crate) key: u64,
}

/// A model clients may ask for.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) name: String,
    pub(crate) policy: Policy,
    pub(crate) targets: Vec<Arc<Target>>,
    pub(crate) rules: Vec<Rule>,
    pub(crate) fallback: Vec<String>,
    pub(crate) retries: u32,
    pub(crate) hedge_after: Option<Duration>,
    pub(crate) context: u32,
    pub(crate) prefill_scale: f64,
    pub(crate) prefix: Arc<PrefixIndex>,
    pub(crate) canary: Option<Arc<Canary>>,
    pub(crate) mirror: Option<Arc<Mirror>>,
    /// For the policies that look at what a prompt is about.
    pub(crate) fit: Option<Fit>,
}

/// What [`Route::choose`] found.
#[derive(Debug)]
pub(crate) struct Choice {
    /// Targets in the order they are to be tried.
    pub(crate) order: Vec<Arc<Target>>,
    pub(crate) stage: Stage,
    /// The prompt's blocks, when the policy looks at them.
    pub(crate) blocks: Vec<u64>,
    /// Whether a draw gave it to the canary, when there was one.
    pub(crate) drawn: Option<bool>,
    /// Why there is none, when there is none.
    pub(crate) error: Option<ApiError>,
}

/// Uniform in 0..1, never 0: splitmix64 (Steele, Lea, Flood 2014) from a seed of
/// the process.
pub(crate) fn random() -> f64 {
    static STATE: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(0)));
    let mut z = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 + f64::EPSILON / 4.0
}

impl Target {
    /// Money for `ask` when its answer has `tokens`, for a comparison; `None`
    /// without a price. A machine is taken to work for nobody else meanwhile.
    fn cost(&self, ask: &Ask, tokens: u32, now: Instant) -> Option<f64> {
        let machine_us = (self.load.predicted_s(tokens, now) * 1e6) as u64;
        let tokens = Tokens { input: ask.prompt_estimate().into(), output: tokens.into(), ..Tokens::default() };
        let list = self.prices.as_ref()?;
        let cost = list.cost(&self.model, &self.node.name, clock::now_ms(), &tokens, machine_us);
        cost.total.map(|d| d.picos() as f64 / 1e12)
    }
}

impl Route {
    /// The rule that decides on `ask`.
    pub(crate) fn rule(&self, ask: &Ask) -> Option<(usize, &Rule)> {
        self.rules.iter().enumerate().find(|(_, rule)| rule.fits(ask))
    }

    /// Tokens the answer to `ask` is expected to have.
    fn expected(&self, ask: &Ask) -> u32 {
        let seen: Vec<u32> = self.targets.iter().filter_map(|t| t.load.usual_answer()).collect();
        let mean = seen.iter().map(|n| u64::from(*n)).sum::<u64>().checked_div(seen.len() as u64);
        let usual = mean.and_then(|m| u32::try_from(m).ok()).unwrap_or(USUAL_ANSWER);
        ask.max_tokens().map_or(usual, |most| most.min(usual))
    }

    /// Chooses for `ask` at `now`, with `random` numbers in 0..1.
    pub(crate) fn choose(&self, ask: &Ask, now: Instant, random: &mut dyn FnMut() -> f64) -> Choice {
        let rule = self.rule(ask);
        let only = rule.map(|(_, r)| r.settings.only.as_slice()).unwrap_or_default();
        let mut candidates = Vec::with_capacity(self.targets.len());
        let mut fit: Vec<usize> = Vec::new();
        let (mut refused, mut unfit_s): (Option<ApiError>, Option<Option<u32>>) = (None, None);
        for (i, target) in self.targets.iter().enumerate() {
            let excluded = if !only.is_empty() && !only.contains(&target.node.name) {
                Some("the rule leaves it out".to_owned())
            } else if let Err(e) = target.node.upstream.check(ask, &target.model) {
                let why = e.message.clone();
                refused.get_or_insert(e);
                Some(why)
            } else if let Err(unfit) = target.node.check(now) {
                unfit_s = Some(match (unfit_s, unfit.seconds) {
                    (Some(Some(a)), Some(b)) => Some(a.min(b)),
                    (Some(a), b) => a.or(b),
                    (None, b) => b,
                });
                Some(unfit.why)
            } else {
                fit.push(i);
                None
            };
            candidates.push(Candidate {
                backend: target.node.name.clone(),
                model: target.model.clone(),
                score: None,
                detail: String::new(),
                excluded,
            });
        }
        let (mut blocks, mut judged) = (Vec::new(), None);
        let (drawn, canary) = self.draw(random, &mut fit, &mut candidates);
        let mut reason = match fit.as_slice() {
            [] => "no target is left".to_owned(),
            [_] => "the only target left".to_owned(),
            _ => match &self.fit {
                Some(by) => {
                    let (reason, said) = by.order(ask.vector.get(), &mut fit, &mut candidates);
                    judged = said;
                    reason
                }
                None => self.score(ask, now, random, &mut fit, &mut candidates, &mut blocks),
            },
        };
        if let Some(canary) = canary {
            fit.insert(0, canary);
            reason = "drawn for the canary".into();
        }
        let error = fit.is_empty().then(|| self.nobody(&candidates, refused, unfit_s));
        Choice {
            order: fit.iter().map(|i| self.targets[*i].clone()).collect(),
            stage: Stage {
                model: self.name.clone(),
                policy: self.policy,
                rule: rule.map(|(i, r)| r.name(i)),
                candidates,
                reason,
                judged,
            },
            blocks,
            drawn,
            error,
        }
    }

    /// Takes the canary out of `fit`; gives it back when this request is drawn
    /// for it.
    fn draw(
        &self,
        random: &mut dyn FnMut() -> f64,
        fit: &mut Vec<usize>,
        candidates: &mut [Candidate],
    ) -> (Option<bool>, Option<usize>) {
        let Some(canary) = &self.canary else { return (None, None) };
        let is_it = |i: &usize| self.targets[*i].node.name == canary.settings.backend;
        let Some(at) = fit.iter().position(is_it) else { return (None, None) };
        if let Some(why) = canary.rolled_back() {
            candidates[fit.remove(at)].excluded = Some(format!("the canary was taken back: {why}"));
            return (None, None);
        }
        if fit.len() == 1 {
            return (None, None);
        }
        let (i, drawn) = (fit.remove(at), random() < canary.settings.share);
        if !drawn {
            candidates[i].excluded = Some("not drawn for the canary".into());
        }
        (Some(drawn), drawn.then_some(i))
    }

    /// Sorts `fit`, best first, and says why.
    fn score(
        &self,
        ask: &Ask,
        now: Instant,
        random: &mut dyn FnMut() -> f64,
        fit: &mut [usize],
        candidates: &mut [Candidate],
        blocks: &mut Vec<u64>,
    ) -> String {
        let target = |i: usize| &self.targets[i];
        let tokens = self.expected(ask);
        let mut by = |fit: &mut [usize], scores: Vec<(f64, String)>| {
            for (i, (score, detail)) in fit.iter().zip(scores) {
                candidates[*i].score = Some(score);
                candidates[*i].detail = detail;
            }
            let score = |i: &usize| candidates[*i].score.unwrap_or(f64::INFINITY);
            fit.sort_by(|a, b| score(a).partial_cmp(&score(b)).unwrap_or(Ordering::Equal));
        };
        let times = |i: usize| {
            let load = &target(i).load;
            let ms = |s: Option<f64>| s.map_or("–".into(), |s| format!("{:.1} ms", s * 1e3));
            let (ttft, itl) = load.times(now);
            let score = load.predicted_s(tokens, now);
            (score, format!("first token {}, between tokens {}, {} in flight", ms(ttft), ms(itl), load.in_flight()))
        };
        match self.policy {
            // Without their heads, which `choose` asks.
            Policy::Ordered | Policy::Task | Policy::Quality => "the first in the order written".into(),
            Policy::Weighted => {
                // The smallest of exponential variables with rates w is i with
                // probability w_i / Σw; sorted, they are a draw without return
                // (Efraimidis and Spirakis 2006).
                let scores = fit.iter().map(|i| {
                    let w = target(*i).weight;
                    (if w > 0.0 { -random().ln() / w } else { f64::MAX }, format!("weight {w}"))
                });
                let scores = scores.collect();
                by(fit, scores);
                "drawn by weight".into()
            }
            Policy::Latency => {
                let scores = fit.iter().map(|i| times(*i)).collect();
                // Two drawn at random, the better of them first: looking at all
                // would send everyone to the same one (Mitzenmacher 2001).
                let n = fit.len();
                let a = (random() * n as f64) as usize % n;
                let b = (a + 1 + (random() * (n - 1) as f64) as usize % (n - 1)) % n;
                let (a, b) = (fit[a], fit[b]);
                by(fit, scores);
                let score = |i: usize| candidates[i].score;
                let first = if score(b) < score(a) { b } else { a };
                let at = fit.iter().position(|i| *i == first).unwrap_or(0);
                fit[..=at].rotate_right(1);
                let name = |i: usize| &target(i).node.name;
                format!("quicker of two drawn, {} and {}, for {tokens} tokens", name(a), name(b))
            }
            Policy::Cost => {
                let scores = fit.iter().map(|i| match target(*i).cost(ask, tokens, now) {
                    Some(cost) => (cost, format!("{} prompt and {tokens} answer tokens", ask.prompt_estimate())),
                    None => (f64::MAX, "no price is known".into()),
                });
                let scores = scores.collect();
                by(fit, scores);
                // Equal prices: the quicker first.
                let key = |i: &usize| (candidates[*i].score, target(*i).load.predicted_s(tokens, now));
                fit.sort_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(Ordering::Equal));
                format!("cheapest for {tokens} tokens")
            }
            Policy::PrefixAffine => {
                *blocks = prefix::blocks(&self.name, ask.raw("tools").unwrap_or(""), ask.prompt());
                let keys: Vec<u64> = fit.iter().map(|i| target(*i).key).collect();
                let overlaps = self.prefix.overlap(blocks, &keys);
                let new = prefix::count(ask.prompt());
                // NVIDIA Dynamo's cost, in blocks; equal ones by chance.
                let scores = fit.iter().zip(overlaps).map(|(i, overlap)| {
                    let (prefill, decode) = target(*i).load.blocks();
                    let read = (prefill + new).saturating_sub(overlap) as f64;
                    let score = self.prefill_scale * read + decode as f64 + new as f64 + random() * 1e-6;
                    (score, format!("{overlap} of {new} blocks cached, {prefill} being read, {decode} being answered"))
                });
                let scores = scores.collect();
                by(fit, scores);
                "least to compute, cached prompt counted".into()
            }
        }
    }

    /// The prompt blocks `target` has to compute for `ask`.
    pub(crate) fn new_blocks(&self, ask: &Ask, target: &Target, blocks: &[u64]) -> u64 {
        let overlap = self.prefix.overlap(blocks, &[target.key]).first().copied().unwrap_or(0);
        prefix::count(ask.prompt()).saturating_sub(overlap)
    }

    fn nobody(&self, candidates: &[Candidate], refused: Option<ApiError>, unfit: Option<Option<u32>>) -> ApiError {
        match (refused, unfit) {
            // Someone could, were it well: the client may come back.
            (_, Some(seconds)) => {
                let reasons = candidates.iter().map(|c| format!("{}: {}", c.backend, c.excluded.as_deref().unwrap_or("")));
                let reasons: Vec<String> = reasons.collect();
                ApiError {
                    retry_after: Some(seconds.unwrap_or(5)),
                    ..ApiError::unavailable(format!("no backend of {:?} can be asked now; {}", self.name, reasons.join("; ")))
                }
            }
            (Some(e), None) => e,
            (None, None) => ApiError::unavailable(format!("{:?} has no target", self.name)),
        }
    }
}

#[cfg(test)]
mod tests;
