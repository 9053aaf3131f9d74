//! What happened of late, second by second and minute by minute, for the console.
//!
//! Counters for Prometheus say what happened since the start; a page that is
//! opened now wants the last minutes without another server that kept them. Two
//! rings hold them: a quarter of an hour in seconds, a day in minutes. A second in
//! which nothing happened takes no room.
//!
//! What may not happen here: growth. A slot has a fixed size (counts by bucket, no
//! samples), and a ring drops what is too old at each new slot, so that all of it
//! stays below 5 MB however many requests come.
//!
//! Rejected: an average of averages. Slots keep histograms, whose sum over any
//! time has a quantile; its error is that of a bucket, a quarter at most.

use crate::metrics::Sample;
use ashlar_core::clock;
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

/// Windows one may ask for: minutes, and milliseconds between two points.
const WINDOWS: [(i64, i64); 5] = [(5, 5_000), (15, 10_000), (60, 60_000), (360, 300_000), (1440, 900_000)];
/// Seconds and minutes kept.
const KEPT: [(i64, i64); 2] = [(1_000, 15 * 60), (60_000, 24 * 60)];

/// Buckets that grow by a factor: `low`·`ratio`ⁱ are their upper bounds.
#[derive(Debug, Clone, Copy)]
struct Scale {
    low: f64,
    ratio: f64,
}

const BUCKETS: usize = 72;
/// 0.1 ms to a quarter of an hour.
const SECONDS: Scale = Scale { low: 1e-4, ratio: 1.25 };
/// 1 token to ten million.
const TOKENS: Scale = Scale { low: 1.0, ratio: 1.25 };

impl Scale {
    fn bucket(self, value: f64) -> usize {
        // A value that is no number counts as the smallest.
        let i = ((value / self.low).ln() / self.ratio.ln()).ceil().max(0.0);
        (i as usize).min(BUCKETS - 1)
    }

    fn bound(self, i: usize) -> f64 {
        self.low * self.ratio.powi(i32::try_from(i).unwrap_or(i32::MAX))
    }
}

/// Counts by bucket of a [`Scale`].
#[derive(Debug, Clone)]
struct Sketch {
    counts: [u32; BUCKETS],
    sum: f64,
}

impl Default for Sketch {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], sum: 0.0 }
    }
}

impl Sketch {
    fn add(&mut self, scale: Scale, value: f64) {
        let n = &mut self.counts[scale.bucket(value)];
        *n = n.saturating_add(1);
        self.sum += value;
    }

    fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(a, b)| *a = a.saturating_add(b));
        self.sum += other.sum;
    }

    fn count(&self) -> u64 {
        self.counts.iter().map(|n| u64::from(*n)).sum()
    }

    /// The value below which a share `q` of all are, interpolated in its bucket.
    fn quantile(&self, scale: Scale, q: f64) -> Option<f64> {
        let rank = q * self.count() as f64;
        let mut below = 0.0;
        for (i, n) in self.counts.iter().enumerate().filter(|(_, n)| **n > 0) {
            let n = f64::from(*n);
            if below + n >= rank {
                let part = ((rank - below) / n).clamp(0.0, 1.0);
                return Some(scale.bound(i) * scale.ratio.powf(part - 1.0));
            }
            below += n;
        }
        None
    }

    /// `{bounds, counts, sum}` from the first to the last bucket with a count.
    fn to_json(&self, scale: Scale) -> Value {
        let used = |n: &u32| *n > 0;
        let first = self.counts.iter().position(used).unwrap_or(0);
        let last = self.counts.iter().rposition(used).map_or(first, |i| i + 1);
        let bounds: Vec<f64> = (first..last).map(|i| scale.bound(i)).collect();
        json!({"bounds": bounds, "counts": self.counts[first..last], "sum": self.sum})
    }
}

/// Where an answer's time went, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub(crate) struct Phases {
    /// In the gateway before it was sent to who answered: reading, routing, failed
    /// attempts.
    pub(crate) gateway: f64,
    /// Waiting for the guard.
    pub(crate) guard: f64,
    /// In the backend before its first forward pass, where it says so.
    pub(crate) upstream_queue: f64,
    /// From there to the first token.
    pub(crate) prefill: f64,
    /// From the first token to the end.
    pub(crate) decode: f64,
}

impl Phases {
    const NAMES: [&str; 5] = ["gateway", "guard", "upstream_queue", "prefill", "decode"];

    /// Taken apart from what a record knows: seconds to sending, in the guard, in
    /// the backend's queue, to the first token, and in all. `None` without a first
    /// token. Parts never add up to more than the whole.
    pub(crate) fn of(sent: f64, guard: f64, queue: f64, ttft: Option<f64>, total: f64) -> Option<Self> {
        let ttft = ttft?.clamp(0.0, total);
        let gateway = sent.clamp(0.0, ttft);
        let guard = guard.clamp(0.0, ttft - gateway);
        let upstream_queue = queue.clamp(0.0, ttft - gateway - guard);
        let prefill = ttft - gateway - guard - upstream_queue;
        Some(Self { gateway, guard, upstream_queue, prefill, decode: total - ttft })
    }

    fn parts(&self) -> [f64; 5] {
        [self.gateway, self.guard, self.upstream_queue, self.prefill, self.decode]
    }
}

/// What happened in one step of a ring.
#[derive(Debug, Clone, Default)]
struct Slot {
    /// Its beginning.
    at_ms: i64,
    arrived: u64,
    settled: u64,
    errors: u64,
    cancelled: u64,
    /// Refused by the gateway: too many, or nobody to ask.
    turned_away: u64,
    refusals: u64,
    estimated: u64,
    prompt_tokens: u64,
    cached_tokens: u64,
    output_tokens: u64,
    /// The most at once.
    in_flight: u64,
    ttft: Sketch,
    gap: Sketch,
    total: Sketch,
    prompt: Sketch,
    output: Sketch,
    phases: [f64; 5],
    phased: u64,
}

impl Slot {
    fn merge(&mut self, o: &Self) {
        self.arrived += o.arrived;
        self.settled += o.settled;
        self.errors += o.errors;
        self.cancelled += o.cancelled;
        self.turned_away += o.turned_away;
        self.refusals += o.refusals;
        self.estimated += o.estimated;
        self.prompt_tokens += o.prompt_tokens;
        self.cached_tokens += o.cached_tokens;
        self.output_tokens += o.output_tokens;
        self.in_flight = self.in_flight.max(o.in_flight);
        self.ttft.merge(&o.ttft);
        self.gap.merge(&o.gap);
        self.total.merge(&o.total);
        self.prompt.merge(&o.prompt);
        self.output.merge(&o.output);
        self.phases.iter_mut().zip(o.phases).for_each(|(a, b)| *a += b);
        self.phased += o.phased;
    }

    /// Of requests that were let in or turned away, those that failed by our fault
    /// or a backend's, and all that count.
    fn failures(&self) -> (u64, u64) {
        let bad = self.errors + self.turned_away;
        (bad, bad + self.settled - self.errors - self.cancelled)
    }

    fn to_json(&self) -> Value {
        json!({
            "requests": self.arrived, "settled": self.settled, "errors": self.errors, "cancelled": self.cancelled,
            "turned_away": self.turned_away, "refusals": self.refusals, "estimated": self.estimated,
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "output_tokens": self.output_tokens,
            "ttft": self.ttft.to_json(SECONDS), "gap": self.gap.to_json(SECONDS), "total": self.total.to_json(SECONDS),
            "prompt": self.prompt.to_json(TOKENS), "output": self.output.to_json(TOKENS),
            "ttft_s": quantiles(&self.ttft), "gap_s": quantiles(&self.gap), "total_s": quantiles(&self.total),
            "phases_s": self.mean_phases(),
        })
    }

    fn mean_phases(&self) -> Value {
        let mean = |i: usize| (self.phased > 0).then(|| self.phases[i] / self.phased as f64);
        Phases::NAMES.iter().enumerate().map(|(i, name)| ((*name).to_owned(), json!(mean(i)))).collect()
    }
}

/// `[p50, p95, p99]` in seconds.
fn quantiles(sketch: &Sketch) -> [Option<f64>; 3] {
    [0.5, 0.95, 0.99].map(|q| sketch.quantile(SECONDS, q))
}

#[derive(Debug)]
struct Ring {
    step_ms: i64,
    kept: i64,
    /// By time, none of them empty.
    slots: VecDeque<Slot>,
}

impl Ring {
    /// The slot of now.
    fn slot(&mut self, now_ms: i64) -> &mut Slot {
        let at_ms = now_ms - now_ms.rem_euclid(self.step_ms);
        // A clock that was set back goes on in the newest slot.
        if self.slots.back().is_none_or(|s| s.at_ms < at_ms) {
            let oldest = at_ms - self.kept * self.step_ms;
            while self.slots.front().is_some_and(|s| s.at_ms <= oldest) {
                self.slots.pop_front();
            }
            self.slots.push_back(Slot { at_ms, ..Slot::default() });
        }
        let last = self.slots.len() - 1;
        &mut self.slots[last]
    }

    fn since(&self, from_ms: i64) -> impl Iterator<Item = &Slot> {
        self.slots.iter().filter(move |s| s.at_ms >= from_ms)
    }
}

/// The rings of one server.
#[derive(Debug)]
pub(crate) struct Series {
    since_ms: i64,
    rings: Mutex<[Ring; 2]>,
}

impl Series {
    pub(crate) fn new() -> Self {
        let ring = |(step_ms, kept)| Ring { step_ms, kept, slots: VecDeque::new() };
        Self { since_ms: clock::now_ms(), rings: Mutex::new(KEPT.map(ring)) }
    }

    fn note(&self, now_ms: i64, f: impl Fn(&mut Slot)) {
        // Counts stay meaningful when another holder panicked.
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.iter_mut().for_each(|r| f(r.slot(now_ms)));
    }

    /// A request was let in; `in_flight` with it.
    pub(crate) fn arrived(&self, in_flight: usize) {
        self.note(clock::now_ms(), |s| {
            s.arrived += 1;
            s.in_flight = s.in_flight.max(in_flight as u64);
        });
    }

    /// A request was refused by the gateway for want of room or of a backend.
    pub(crate) fn turned_away(&self) {
        self.note(clock::now_ms(), |s| s.turned_away += 1);
    }

    /// A token came `seconds` after the one before it.
    pub(crate) fn token_gap(&self, seconds: f64) {
        self.note(clock::now_ms(), |s| s.gap.add(SECONDS, seconds));
    }

    /// A response was settled.
    pub(crate) fn settled(&self, sample: &Sample<'_>, phases: Option<Phases>) {
        self.settled_at(clock::now_ms(), sample, phases);
    }

    fn settled_at(&self, now_ms: i64, sample: &Sample<'_>, phases: Option<Phases>) {
        self.note(now_ms, |s| {
            s.settled += 1;
            s.errors += u64::from(sample.finish == "error");
            s.cancelled += u64::from(sample.finish == "cancelled");
            s.refusals += u64::from(sample.refusal);
            s.estimated += u64::from(sample.estimated);
            s.prompt_tokens += u64::from(sample.prompt_tokens);
            s.cached_tokens += u64::from(sample.cached_tokens);
            s.output_tokens += u64::from(sample.completion_tokens);
            s.total.add(SECONDS, sample.total_s);
            s.prompt.add(TOKENS, sample.prompt_tokens.into());
            s.output.add(TOKENS, sample.completion_tokens.into());
            if let Some(ttft) = sample.ttft_s {
                s.ttft.add(SECONDS, ttft);
            }
            if let Some(phases) = phases {
                s.phases.iter_mut().zip(phases.parts()).for_each(|(a, b)| *a += b);
                s.phased += 1;
            }
        });
    }

    /// Minutes one may ask [`Self::window`] for.
    pub(crate) fn windows() -> [i64; 5] {
        WINDOWS.map(|(minutes, _)| minutes)
    }

    /// The last `minutes`, one of [`Self::windows`], as columns: times in seconds,
    /// `null` where nothing was measured or the server did not run yet. `objective`
    /// is the share of requests that should succeed.
    pub(crate) fn window(&self, minutes: i64, objective: f64) -> Value {
        self.window_at(clock::now_ms(), minutes, objective)
    }

    fn window_at(&self, now_ms: i64, minutes: i64, objective: f64) -> Value {
        let step_ms = WINDOWS.iter().find(|(m, _)| *m == minutes).map_or(60_000, |(_, s)| *s);
        let end_ms = now_ms - now_ms.rem_euclid(step_ms) + step_ms;
        let n = usize::try_from(minutes * 60_000 / step_ms).unwrap_or(0);
        let from_ms = end_ms - n as i64 * step_ms;
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let ring = &rings[usize::from(step_ms >= KEPT[1].0)];
        let mut points: Vec<Slot> = vec![Slot::default(); n];
        let mut total = Slot::default();
        for slot in ring.since(from_ms) {
            let i = usize::try_from((slot.at_ms - from_ms) / step_ms).unwrap_or(0).min(n.saturating_sub(1));
            if let Some(point) = points.get_mut(i) {
                point.merge(slot);
            }
            total.merge(slot);
        }
        let recent: u64 = rings[0].since(now_ms - 10_000).map(|s| s.arrived).sum();
        let budget = budget(&rings[1], now_ms, self.since_ms, objective);
        // A token waits for this lock: what follows takes its time.
        drop(rings);
        let at: Vec<i64> = (0..n as i64).map(|i| from_ms + i * step_ms).collect();
        // Before the start nothing was measured, which is another thing than zero.
        let ran = |i: usize| at[i] + step_ms > self.since_ms;
        let column = |f: &dyn Fn(&Slot) -> Value| -> Vec<Value> {
            points.iter().enumerate().map(|(i, p)| if ran(i) { f(p) } else { Value::Null }).collect()
        };
        let rate = |f: &dyn Fn(&Slot) -> u64| -> Vec<Value> {
            let per_s = points.iter().enumerate().map(|(i, p)| {
                // The first and the last step are not whole.
                let began = at[i].max(self.since_ms);
                let seconds = ((at[i] + step_ms).min(now_ms) - began).max(1000) as f64 / 1e3;
                if ran(i) { json!(f(p) as f64 / seconds) } else { Value::Null }
            });
            per_s.collect()
        };
        let phases = Phases::NAMES.iter().enumerate().map(|(k, name)| {
            let mean = |p: &Slot| json!((p.phased > 0).then(|| p.phases[k] / p.phased as f64));
            ((*name).to_owned(), Value::from(column(&mean)))
        });
        let phases: serde_json::Map<String, Value> = phases.collect();
        let quantile = |f: fn(&Slot) -> &Sketch, q: f64| column(&|p| json!(f(p).quantile(SECONDS, q)));
        let of = |f: fn(&Slot) -> &Sketch| json!({"p50": quantile(f, 0.5), "p95": quantile(f, 0.95), "p99": quantile(f, 0.99)});
        let recent_s = (now_ms - self.since_ms).clamp(1000, 10_000) as f64 / 1e3;
        json!({
            "now_ms": now_ms, "since_ms": self.since_ms, "minutes": minutes, "windows": Self::windows(), "step_ms": step_ms,
            "at_ms": at, "requests_per_s": rate(&|p| p.arrived), "errors_per_s": rate(&|p| p.errors),
            "turned_away_per_s": rate(&|p| p.turned_away),
            "prompt_tokens_per_s": rate(&|p| p.prompt_tokens), "cached_tokens_per_s": rate(&|p| p.cached_tokens),
            "output_tokens_per_s": rate(&|p| p.output_tokens),
            "in_flight": column(&|p| json!(p.in_flight)),
            "ttft_s": of(|p| &p.ttft), "gap_s": of(|p| &p.gap), "total_s": of(|p| &p.total), "phases_s": phases,
            "total": total.to_json(), "rate_now": recent as f64 / recent_s,
            "budget": budget,
        })
    }
}

/// The error budget of the day: how many may fail, how many did, and how fast the
/// last hour used it up (1 is just the whole of it in a day).
fn budget(minutes: &Ring, now_ms: i64, since_ms: i64, objective: f64) -> Value {
    let sum = |from_ms: i64| {
        minutes.since(from_ms).fold((0, 0), |(bad, all), s| {
            let (b, a) = s.failures();
            (bad + b, all + a)
        })
    };
    let day = now_ms - KEPT[1].0 * KEPT[1].1;
    let (bad, all) = sum(day);
    let (bad_hour, all_hour) = sum(now_ms - 3_600_000);
    let allowed = (1.0 - objective) * all as f64;
    let left = (all > 0).then(|| if allowed > 0.0 { 1.0 - bad as f64 / allowed } else { f64::from(u8::from(bad == 0)) });
    let burn = (all_hour > 0 && objective < 1.0).then(|| bad_hour as f64 / all_hour as f64 / (1.0 - objective));
    json!({
        "objective": objective, "requests": all, "failed": bad, "allowed": allowed, "left": left, "burn_last_hour": burn,
        "hours": ((now_ms - since_ms.max(day)) as f64 / 3.6e6),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(finish: &str, ttft_s: f64) -> Sample<'_> {
        Sample {
            model: "m",
            endpoint: "/v1/chat/completions",
            finish,
            prompt_tokens: 100,
            cached_tokens: 40,
            completion_tokens: 10,
            queue_s: None,
            ttft_s: Some(ttft_s),
            total_s: ttft_s * 2.0,
            refusal: false,
            cost: None,
            estimated: false,
        }
    }

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut sketch = Sketch::default();
        (1..=1000).for_each(|i| sketch.add(SECONDS, f64::from(i) / 1000.0));
        for q in [0.01, 0.5, 0.95, 0.99] {
            let got = sketch.quantile(SECONDS, q).unwrap();
            assert!((got / q).ln().abs() < 1.25f64.ln(), "{q}: {got}");
        }
        assert_eq!(Sketch::default().quantile(SECONDS, 0.5), None);
        let mut odd = Sketch::default();
        [f64::NAN, -1.0, 0.0, f64::INFINITY].iter().for_each(|v| odd.add(SECONDS, *v));
        assert_eq!((odd.counts[0], odd.counts[BUCKETS - 1], odd.count()), (3, 1, 4));
        let shown = sketch.to_json(SECONDS);
        let counts = shown["counts"].as_array().unwrap();
        assert_eq!(counts.len(), shown["bounds"].as_array().unwrap().len());
        assert!(counts[0] != 0 && counts[counts.len() - 1] != 0, "trimmed to what there is");
    }

    #[test]
    fn a_window_adds_up_and_says_what_was_not_measured() {
        let mut series = Series::new();
        let now = 1_000_000_000_000;
        series.since_ms = now - 120_000;
        for s in 0..100 {
            series.settled_at(now - 100_000 + s * 1000, &sample(if s % 10 == 0 { "error" } else { "stop" }, 0.2), None);
        }
        let w = series.window_at(now, 5, 0.99);
        let n = w["at_ms"].as_array().unwrap().len();
        assert_eq!(n, 60);
        for name in ["requests_per_s", "errors_per_s", "in_flight", "output_tokens_per_s"] {
            assert_eq!(w[name].as_array().unwrap().len(), n, "{name}");
        }
        assert!(w["requests_per_s"][0].is_null(), "the server did not run yet");
        assert_eq!(w["errors_per_s"][n - 25], json!(0.0), "it ran and nothing came");
        let tokens: f64 = w["output_tokens_per_s"].as_array().unwrap().iter().filter_map(Value::as_f64).sum();
        assert!((tokens * 5.0 - 1000.0).abs() < 60.0, "{tokens}");
        assert_eq!((&w["total"]["settled"], &w["total"]["errors"]), (&json!(100), &json!(10)));
        let p50 = w["total"]["ttft_s"][0].as_f64().unwrap();
        assert!((0.16..0.25).contains(&p50), "{p50}");
        assert_eq!((&w["budget"]["failed"], &w["budget"]["requests"]), (&json!(10), &json!(100)));
        let left = w["budget"]["left"].as_f64().unwrap();
        assert!((left + 9.0).abs() < 1e-9, "ten failed where one may: {left}");
        let burn = w["budget"]["burn_last_hour"].as_f64().unwrap();
        assert!((burn - 10.0).abs() < 1e-9, "{burn}");
    }

    #[test]
    fn rings_do_not_grow() {
        let series = Series::new();
        for s in 0..200_000i64 {
            series.note(s * 1000, |slot| slot.arrived += 1);
        }
        series.note(5_000, |slot| slot.arrived += 1);
        let rings = series.rings.lock().unwrap();
        assert_eq!([rings[0].slots.len(), rings[1].slots.len()], KEPT.map(|(_, n)| n as usize));
        assert_eq!(rings[1].slots.back().map(|s| s.arrived), Some(21), "set back, it counts in the newest");
        let bytes = (rings[0].slots.len() + rings[1].slots.len()) * std::mem::size_of::<Slot>();
        assert!(bytes < 5 << 20, "{bytes}");
    }

    proptest::proptest! {
        #[test]
        fn phases_add_up_to_the_whole(sent in 0.0..9.0f64, guard in 0.0..9.0f64, queue in 0.0..9.0f64, ttft in 0.0..9.0f64, total in 0.0..9.0f64) {
            let parts = Phases::of(sent, guard, queue, Some(ttft), total).unwrap().parts();
            assert!(parts.iter().all(|p| *p >= 0.0), "{parts:?}");
            assert!((parts.iter().sum::<f64>() - total).abs() < 1e-9, "{parts:?}");
        }
    }
}
