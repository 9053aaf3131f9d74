//! A new target tried on a share of requests, and taken back when it is worse.
//!
//! Requests are drawn for the canary with a fixed probability. Were it as good
//! as the others, each failure would be the canary's with just that probability,
//! whatever the rate of failures is: the test looks at failures alone. It is a
//! sequential one (an e-process, a mixture of likelihood ratios over several odds;
//! Ville's inequality bounds its false alarms), so that it may be looked at after
//! each request and stopped at any. The same holds of slow first tokens and of
//! refusals. Where an evaluation gives scores of both on the same prompts, a bet
//! on the incumbent being better grows when it is (Waudby-Smith and Ramdas 2024,
//! with fixed stakes). The tests share the error probability (Bonferroni).
//!
//! What may not happen here: a retry or a fallback is counted, which no draw
//! assigned; or a canary that was taken back comes again by itself.

use crate::config::CanarySettings;
use serde_json::{Value, json};
use std::sync::{Mutex, PoisonError};

/// Odds of a failure at the canary against the others that are tested for.
const ODDS: [f64; 6] = [1.25, 1.5, 2.0, 3.0, 5.0, 10.0];
/// First tokens later than this quantile of all are slow.
const SLOW: f64 = 0.9;

/// Evidence that events fall on the canary more often than it is drawn.
#[derive(Debug, Clone)]
struct Evidence {
    share: f64,
    log: [f64; ODDS.len()],
    /// Events at the canary, and at the others.
    events: (u64, u64),
}

impl Evidence {
    fn new(share: f64) -> Self {
        Self { share, log: [0.0; ODDS.len()], events: (0, 0) }
    }

    fn event(&mut self, canary: bool) {
        let s = self.share;
        for (log, odds) in self.log.iter_mut().zip(ODDS) {
            // The event's probability to be the canary's under these odds.
            let p = odds * s / (odds * s + 1.0 - s);
            *log += if canary { (p / s).ln() } else { ((1.0 - p) / (1.0 - s)).ln() };
        }
        if canary { self.events.0 += 1 } else { self.events.1 += 1 }
    }

    /// The e-value: its inverse bounds the probability of so much by chance.
    fn value(&self) -> f64 {
        self.log.iter().map(|l| l.exp()).sum::<f64>() / ODDS.len() as f64
    }
}

/// What became of a drawn request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Seen {
    Failed,
    /// Seconds to the first token.
    FirstToken(f64),
    Refused,
}

/// Stakes of the bet that the incumbent scores higher.
const STAKES: [f64; 5] = [0.1, 0.25, 0.5, 0.75, 0.95];

/// Evidence that the incumbent's scores are higher on average.
#[derive(Debug, Clone, Default)]
struct Scores {
    log: [f64; STAKES.len()],
    pairs: u64,
    sums: (f64, f64),
    /// Bytes of the file that were read.
    read: usize,
    /// What of it could not be.
    error: Option<String>,
}

impl Scores {
    fn pair(&mut self, canary: f64, incumbent: f64) {
        // Fair or better for the canary, each factor is at most 1 on average.
        for (log, stake) in self.log.iter_mut().zip(STAKES) {
            *log += (stake * (incumbent - canary)).ln_1p();
        }
        self.pairs += 1;
        self.sums = (self.sums.0 + canary, self.sums.1 + incumbent);
    }

    fn value(&self) -> f64 {
        self.log.iter().map(|l| l.exp()).sum::<f64>() / STAKES.len() as f64
    }

    fn means(&self) -> (f64, f64) {
        let n = self.pairs.max(1) as f64;
        (self.sums.0 / n, self.sums.1 / n)
    }
}

/// A line of the scores' file.
#[derive(serde::Deserialize)]
struct Line {
    canary: f64,
    incumbent: f64,
}

#[derive(Debug)]
struct State {
    scores: Scores,
    failures: Evidence,
    slow: Evidence,
    refusals: Evidence,
    /// The running quantile of first tokens, in seconds, and samples of it.
    quantile: (f64, u64),
    drawn: (u64, u64),
    rolled_back: Option<String>,
}

/// One canary.
#[derive(Debug)]
pub(crate) struct Canary {
    pub(crate) settings: CanarySettings,
    state: Mutex<State>,
}

impl Canary {
    pub(crate) fn new(settings: CanarySettings) -> Self {
        let evidence = || Evidence::new(settings.share);
        let state = State {
            scores: Scores::default(),
            failures: evidence(),
            slow: evidence(),
            refusals: evidence(),
            quantile: (0.0, 0),
            drawn: (0, 0),
            rolled_back: None,
        };
        Self { settings, state: Mutex::new(state) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Why it was taken back, if it was.
    pub(crate) fn rolled_back(&self) -> Option<String> {
        self.with(|s| s.rolled_back.clone())
    }

    /// Takes it back by hand; false when it was taken back before.
    pub(crate) fn take_back(&self, why: &str) -> bool {
        self.with(|s| {
            let first = s.rolled_back.is_none();
            s.rolled_back.get_or_insert_with(|| why.to_owned());
            first
        })
    }

    /// A request was drawn for the canary, or for the others.
    pub(crate) fn drawn(&self, canary: bool) {
        self.with(|s| if canary { s.drawn.0 += 1 } else { s.drawn.1 += 1 });
    }

    /// The e-value at which it is taken back: the error probability is divided
    /// among the tests there are.
    fn limit(&self) -> f64 {
        let tests = if self.settings.scores.is_some() { 4.0 } else { 3.0 };
        tests / self.settings.alpha
    }

    /// Reads what the scores' file has more than before. May take the canary
    /// back.
    pub(crate) async fn read_scores(&self) {
        let Some(path) = &self.settings.scores else { return };
        match tokio::fs::read(path).await {
            Ok(bytes) => self.score(&bytes),
            // A file that is not there yet has no scores.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => self.with(|s| s.scores.error = Some(format!("{}: {e}", path.display()))),
        }
    }

    fn score(&self, file: &[u8]) {
        let limit = self.limit();
        self.with(|s| {
            // A file begun anew is read from its beginning; its scores add to
            // the evidence.
            if file.len() < s.scores.read {
                s.scores.read = 0;
            }
            let new = file.get(s.scores.read..).unwrap_or_default();
            // A line that is still being written is left for the next time.
            let Some(end) = new.iter().rposition(|b| *b == b'\n') else { return };
            s.scores.read += end + 1;
            for line in new[..end].split(|b| *b == b'\n').filter(|l| !l.trim_ascii().is_empty()) {
                match serde_json::from_slice::<Line>(line) {
                    Ok(l) if (0.0..=1.0).contains(&l.canary) && (0.0..=1.0).contains(&l.incumbent) => {
                        s.scores.pair(l.canary, l.incumbent);
                    }
                    Ok(l) => s.scores.error = Some(format!("scores must be between 0 and 1, got {} and {}", l.canary, l.incumbent)),
                    Err(e) => s.scores.error = Some(e.to_string()),
                }
                if s.scores.value() >= limit && s.rolled_back.is_none() {
                    let (canary, incumbent) = s.scores.means();
                    s.rolled_back = Some(format!(
                        "evaluation scores: {canary:.3} at the canary, {incumbent:.3} elsewhere, of {} pairs (e-value {:.0}, limit {limit:.0})",
                        s.scores.pairs,
                        s.scores.value(),
                    ));
                }
            }
        });
    }

    /// A drawn request's outcome. May take the canary back.
    pub(crate) fn seen(&self, canary: bool, what: Seen) {
        let limit = self.limit();
        self.with(|s| {
            let (name, evidence) = match what {
                Seen::Failed => ("failures", &mut s.failures),
                Seen::Refused => ("refusals", &mut s.refusals),
                Seen::FirstToken(seconds) => {
                    // Robbins and Monro's recursion; what is slow is decided
                    // before the sample is taken in.
                    let (quantile, n) = &mut s.quantile;
                    let slow = seconds > *quantile;
                    let step = (quantile.max(seconds) * 0.05).max(1e-6);
                    *quantile = (*quantile + step * if slow { SLOW } else { SLOW - 1.0 }).max(0.0);
                    *n += 1;
                    // The quantile must have settled first.
                    if !slow || *n < 200 {
                        return;
                    }
                    ("slow first tokens", &mut s.slow)
                }
            };
            evidence.event(canary);
            if evidence.value() >= limit && s.rolled_back.is_none() {
                let (at, others) = evidence.events;
                s.rolled_back = Some(format!(
                    "{name}: {at} at the canary, {others} elsewhere, with {} of requests drawn for it (e-value {:.0}, limit {limit:.0})",
                    self.settings.share,
                    evidence.value(),
                ));
            }
        });
    }

    /// For the console.
    pub(crate) fn to_json(&self) -> Value {
        self.with(|s| {
            let show = |e: &Evidence| json!({"canary": e.events.0, "others": e.events.1, "e_value": e.value()});
            json!({
                "backend": self.settings.backend, "share": self.settings.share, "alpha": self.settings.alpha,
                "drawn": {"canary": s.drawn.0, "others": s.drawn.1}, "failures": show(&s.failures),
                "slow_first_tokens": show(&s.slow), "refusals": show(&s.refusals), "rolled_back": s.rolled_back,
                "scores": self.settings.scores.as_ref().map(|_| json!({
                    "pairs": s.scores.pairs, "canary": s.scores.means().0, "incumbent": s.scores.means().1,
                    "e_value": s.scores.value(), "error": s.scores.error,
                })),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::random;

    fn canary(share: f64) -> Canary {
        Canary::new(CanarySettings { backend: "new".into(), share, alpha: 0.01, scores: Some("scores".into()) })
    }

    /// Requests until it is taken back, at most `most`.
    fn run(canary: &Canary, most: u32, mut bad: impl FnMut(bool) -> bool) -> u32 {
        for n in 0..most {
            if canary.rolled_back().is_some() {
                return n;
            }
            let drawn = random() < canary.settings.share;
            if bad(drawn) {
                canary.seen(drawn, Seen::Failed);
            }
        }
        most
    }

    #[test]
    fn a_worse_canary_is_taken_back_soon_and_an_equal_one_is_not() {
        let worse = canary(0.1);
        let after = run(&worse, 20_000, |drawn| random() < if drawn { 0.2 } else { 0.02 });
        assert!(after < 2000, "{after} requests");
        assert!(worse.rolled_back().unwrap().contains("failures"));
        // At most 1 in 100 false alarms, and far fewer in truth: 200 trials of
        // 5000 requests with 3 in 10 failing, at both alike.
        let alarms = (0..200).filter(|_| run(&canary(0.1), 5000, |_| random() < 0.3) < 5000).count();
        assert!(alarms <= 6, "{alarms} of 200");
        let better = canary(0.1);
        assert_eq!(run(&better, 20_000, |drawn| random() < if drawn { 0.01 } else { 0.1 }), 20_000);
    }

    #[test]
    fn a_slow_canary_is_taken_back() {
        let slow = canary(0.2);
        let mut n = 0;
        while slow.rolled_back().is_none() && n < 20_000 {
            let drawn = random() < 0.2;
            slow.seen(drawn, Seen::FirstToken(0.1 * random() + if drawn { 0.1 } else { 0.0 }));
            n += 1;
        }
        assert!(n < 3000 && slow.rolled_back().unwrap().contains("slow"), "{n}");
    }

    #[test]
    fn refusals_alone_take_it_back() {
        let prude = canary(0.1);
        let mut n = 0;
        while prude.rolled_back().is_none() && n < 20_000 {
            let drawn = random() < 0.1;
            if random() < if drawn { 0.3 } else { 0.02 } {
                prude.seen(drawn, Seen::Refused);
            }
            n += 1;
        }
        assert!(n < 4000 && prude.rolled_back().unwrap().contains("refusals"), "{n}");
    }

    #[test]
    fn worse_scores_take_it_back_and_equal_ones_do_not() {
        let lines = |n: usize, worse: f64| -> String {
            let one = |_| format!("{{\"canary\": {:.3}, \"incumbent\": {:.3}}}\n", random() * (1.0 - worse), random());
            (0..n).map(one).collect()
        };
        let worse = canary(0.1);
        worse.score(lines(400, 0.4).as_bytes());
        assert!(worse.rolled_back().unwrap().contains("evaluation scores"));
        let alarms = (0..100).filter(|_| {
            let fair = canary(0.1);
            fair.score(lines(1000, 0.0).as_bytes());
            fair.rolled_back().is_some()
        });
        assert!(alarms.count() <= 4);
        // Read as it grows, each line once, an unfinished one when it is whole.
        let grows = canary(0.1);
        grows.score(b"{\"canary\": 1, \"incumbent\": 0}\n{\"canary\": 1, \"inc");
        grows.score(b"{\"canary\": 1, \"incumbent\": 0}\n{\"canary\": 1, \"incumbent\": 0.5}\nnonsense\n");
        let shown = &grows.to_json()["scores"];
        assert_eq!((&shown["pairs"], &shown["incumbent"]), (&json!(2), &json!(0.25)));
        assert!(shown["error"].is_string() && grows.rolled_back().is_none());
    }

    #[test]
    fn the_evidence_of_a_fair_draw_does_not_grow_on_average() {
        // An e-process is a martingale under the null: its mean over one step is
        // what it was.
        let base = Evidence::new(0.3);
        let (mut hit, mut miss) = (base.clone(), base.clone());
        hit.event(true);
        miss.event(false);
        assert!((0.3 * hit.value() + 0.7 * miss.value() - base.value()).abs() < 1e-12);
    }
}
