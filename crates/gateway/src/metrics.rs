//! Counters and histograms of the gateway, in the Prometheus text format.
//!
//! Names follow vLLM's with the prefix `ashlar_`, and so do the buckets, so
//! that existing dashboards need only a new prefix; inter-token latency has
//! finer buckets below 10 ms, because a small model is faster than vLLM's
//! first. What may not happen here: a label whose value a client chooses
//! freely (model labels are ids of served models only), so that the number of
//! series stays bounded.
//!
//! Rejected: a metrics crate with a global registry. Two servers in one
//! process, as in the tests, would then share their counts.

use ashlar_api::{BackendStats, IterationTokens};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Mutex, PoisonError},
};

/// Upper bounds in seconds of the time to the first token.
pub(crate) const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Upper bounds in seconds of the time between two tokens.
pub(crate) const ITL: &[f64] = &[
    0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.05, 0.075, 0.1, 0.15,
    0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// Upper bounds in seconds of a whole request, and of its time in the queue.
pub(crate) const E2E: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];

/// Counts by bucket; the last count is of values above every bound.
#[derive(Debug, Clone)]
pub(crate) struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    fn observe(&mut self, seconds: f64) {
        let bucket = self.bounds.partition_point(|b| *b < seconds);
        self.counts[bucket] += 1;
        self.sum += seconds;
    }

    /// `{bounds, counts, sum}` for the console.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        serde_json::json!({"bounds": self.bounds, "counts": self.counts, "sum": self.sum})
    }
}

#[derive(Debug)]
struct Series {
    requests: BTreeMap<(String, &'static str, String), u64>,
    rejected: BTreeMap<u16, u64>,
    ttft: Histogram,
    itl: Histogram,
    e2e: Histogram,
    queue: Histogram,
    prompt: u64,
    cached: u64,
    completion: u64,
    refusals: u64,
    cost: f64,
    unpriced: u64,
    ledger_errors: u64,
    estimated: u64,
    retries: BTreeMap<&'static str, u64>,
    upstream_errors: BTreeMap<(String, &'static str), u64>,
}

/// What one settled response adds.
#[derive(Debug, Clone)]
pub(crate) struct Sample<'a> {
    pub(crate) model: &'a str,
    pub(crate) endpoint: &'static str,
    pub(crate) finish: &'a str,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) completion_tokens: u32,
    pub(crate) queue_s: Option<f64>,
    pub(crate) ttft_s: Option<f64>,
    pub(crate) total_s: f64,
    pub(crate) refusal: bool,
    /// `None` where no price is known.
    pub(crate) cost: Option<f64>,
    pub(crate) estimated: bool,
}

/// One backend at the moment of a scrape.
#[derive(Debug, Clone, Default)]
pub(crate) struct BackendGauges {
    pub(crate) name: String,
    pub(crate) available: bool,
    /// 0 closed, 1 half open, 2 open.
    pub(crate) circuit: u8,
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) opened: u64,
}

/// Figures read at the moment of a scrape.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gauges {
    pub(crate) in_flight: u64,
    /// Summed over the engines.
    pub(crate) engine: BackendStats,
    pub(crate) backends: Vec<BackendGauges>,
    /// Models with a canary, and whether it was taken back.
    pub(crate) canaries: Vec<(String, bool)>,
    /// What came of the configuration file.
    pub(crate) file: crate::table::File,
}

/// All series of one server.
#[derive(Debug)]
pub(crate) struct Metrics(Mutex<Series>);

impl Metrics {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Series {
            requests: BTreeMap::new(),
            rejected: BTreeMap::new(),
            ttft: Histogram::new(TTFT),
            itl: Histogram::new(ITL),
            e2e: Histogram::new(E2E),
            queue: Histogram::new(E2E),
            prompt: 0,
            cached: 0,
            completion: 0,
            refusals: 0,
            cost: 0.0,
            unpriced: 0,
            ledger_errors: 0,
            estimated: 0,
            retries: BTreeMap::new(),
            upstream_errors: BTreeMap::new(),
        }))
    }

    // Counts stay meaningful when another holder panicked, so poison is ignored.
    fn with<T>(&self, f: impl FnOnce(&mut Series) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A token arrived `seconds` after the one before it.
    pub(crate) fn token_gap(&self, seconds: f64) {
        self.with(|s| s.itl.observe(seconds));
    }

    /// A request was answered with `status` before a response was admitted.
    pub(crate) fn rejected(&self, status: u16) {
        self.with(|s| *s.rejected.entry(status).or_default() += 1);
    }

    /// The ledger did not take an entry.
    pub(crate) fn ledger_error(&self) {
        self.with(|s| s.ledger_errors += 1);
    }

    /// A `retry` or `hedge` was sent, or the `budget` forbade one.
    pub(crate) fn retry(&self, kind: &'static str) {
        self.with(|s| *s.retries.entry(kind).or_default() += 1);
    }

    /// An attempt at `backend` failed.
    pub(crate) fn upstream_error(&self, backend: &str, class: &'static str) {
        self.with(|s| *s.upstream_errors.entry((backend.to_owned(), class)).or_default() += 1);
    }

    /// A response was settled.
    pub(crate) fn settled(&self, sample: &Sample<'_>) {
        self.with(|s| {
            let key = (
                sample.model.to_owned(),
                sample.endpoint,
                sample.finish.to_owned(),
            );
            *s.requests.entry(key).or_default() += 1;
            s.prompt += u64::from(sample.prompt_tokens);
            s.cached += u64::from(sample.cached_tokens);
            s.completion += u64::from(sample.completion_tokens);
            s.refusals += u64::from(sample.refusal);
            s.cost += sample.cost.unwrap_or(0.0);
            s.unpriced += u64::from(sample.cost.is_none());
            s.estimated += u64::from(sample.estimated);
            s.e2e.observe(sample.total_s);
            if let Some(t) = sample.ttft_s {
                s.ttft.observe(t);
            }
            if let Some(t) = sample.queue_s {
                s.queue.observe(t);
            }
        });
    }

    /// The three histograms the console draws.
    pub(crate) fn histograms(&self) -> serde_json::Value {
        self.with(|s| {
            serde_json::json!({
                "ttft": s.ttft.to_json(), "itl": s.itl.to_json(), "e2e": s.e2e.to_json(),
            })
        })
    }

    /// Everything in the Prometheus text format, version 0.0.4.
    pub(crate) fn render(&self, gauges: Gauges) -> String {
        self.with(|s| {
            let mut p = Page(String::with_capacity(8192));
            p.head("request_success_total", "counter", "Settled responses.");
            for ((model, endpoint, finish), n) in &s.requests {
                let labels = [
                    ("model_name", model.as_str()),
                    ("endpoint", endpoint),
                    ("finished_reason", finish),
                ];
                p.line("request_success_total", &labels, *n as f64);
            }
            p.head(
                "request_rejected_total",
                "counter",
                "Requests answered with an error before a response was admitted.",
            );
            for (status, n) in &s.rejected {
                let status = status.to_string();
                p.line("request_rejected_total", &[("status", &status)], *n as f64);
            }
            let hit_rate_base = s.prompt as f64;
            for (name, help, v) in [
                ("prompt_tokens_total", "Prompt tokens.", s.prompt as f64),
                (
                    "generation_tokens_total",
                    "Generated tokens.",
                    s.completion as f64,
                ),
                (
                    "prefix_cache_queries_total",
                    "Prompt tokens looked up in the prefix cache.",
                    hit_rate_base,
                ),
                (
                    "prefix_cache_hits_total",
                    "Prompt tokens found in the prefix cache.",
                    s.cached as f64,
                ),
                (
                    "refusals_total",
                    "Answers whose opening reads as a refusal (a weak test).",
                    s.refusals as f64,
                ),
                ("cost_total", "Cost in the currency of the price list.", s.cost),
                (
                    "ledger_errors_total",
                    "Entries the ledger did not take.",
                    s.ledger_errors as f64,
                ),
            ] {
                p.head(name, "counter", help);
                p.line(name, &[], v);
            }
            p.head("usage_estimated_total", "counter", "Responses whose tokens no one counted: they are guesses.");
            p.line("usage_estimated_total", &[], s.estimated as f64);
            p.head("cost_unknown_total", "counter", "Responses without a price: their cost is not in cost_total.");
            p.line("cost_unknown_total", &[], s.unpriced as f64);
            p.head("retries_total", "counter", "Attempts after the first, by kind; those the budget forbade.");
            for (kind, n) in &s.retries {
                p.line("retries_total", &[("kind", kind)], *n as f64);
            }
            p.head("backend_attempt_errors_total", "counter", "Attempts at a backend that failed, by kind.");
            for ((backend, class), n) in &s.upstream_errors {
                p.line("backend_attempt_errors_total", &[("backend", backend), ("error", class)], *n as f64);
            }
            gauges.write(&mut p);
            p.seconds(
                "time_to_first_token_seconds",
                "From the request's arrival to its first token.",
                &s.ttft,
            );
            p.seconds(
                "inter_token_latency_seconds",
                "Between two tokens of one response.",
                &s.itl,
            );
            p.seconds(
                "e2e_request_latency_seconds",
                "From the request's arrival to its settlement.",
                &s.e2e,
            );
            p.seconds(
                "request_queue_time_seconds",
                "Waiting in the backend.",
                &s.queue,
            );
            p.0
        })
    }
}

impl Gauges {
    fn write(&self, p: &mut Page) {
        type Read = fn(&BackendGauges) -> f64;
        let series: [(&str, &str, &str, Read); 5] = [
            ("backend_available", "gauge", "1 while the backend may be asked.", |b| f64::from(u8::from(b.available))),
            ("backend_circuit", "gauge", "0 closed, 1 half open, 2 open.", |b| f64::from(b.circuit)),
            ("backend_requests_total", "counter", "Requests sent to the backend.", |b| b.requests as f64),
            ("backend_errors_total", "counter", "Requests the backend failed or refused.", |b| b.errors as f64),
            ("backend_circuit_opened_total", "counter", "Times the circuit opened.", |b| b.opened as f64),
        ];
        for (name, kind, help, read) in series {
            p.head(name, kind, help);
            for b in &self.backends {
                p.line(name, &[("backend", &b.name)], read(b));
            }
        }
        p.head("canary_rolled_back", "gauge", "1 once the model's canary was taken back.");
        for (model, back) in &self.canaries {
            p.line("canary_rolled_back", &[("model_name", model)], f64::from(u8::from(*back)));
        }
        for (name, kind, help, v) in [
            ("config_reloads_total", "counter", "New configurations put to work.", self.file.reloads as f64),
            ("config_failures_total", "counter", "New configurations refused.", self.file.failures as f64),
            ("config_valid", "gauge", "1 while the file as it is now is in force.", f64::from(u8::from(self.file.error.is_none()))),
        ] {
            p.head(name, kind, help);
            p.line(name, &[], v);
        }
        let e = &self.engine;
        let used = f64::from(e.blocks_used) / f64::from(e.blocks_total.max(1));
        for (name, help, v) in [
            ("num_requests_running", "Sequences being computed.", f64::from(e.running)),
            ("num_requests_waiting", "Sequences waiting for a place.", f64::from(e.waiting)),
            ("num_responses_in_flight", "Responses admitted and not yet settled.", self.in_flight as f64),
            ("kv_cache_blocks_used", "KV blocks in use.", f64::from(e.blocks_used)),
            ("kv_cache_blocks_cached", "KV blocks free that hold a reusable prefix.", f64::from(e.blocks_cached)),
            ("kv_cache_blocks_total", "KV blocks in all.", f64::from(e.blocks_total)),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used),
            ("queued_bytes", "Bytes of requests that have not started.", e.queued_bytes as f64),
        ] {
            p.head(name, "gauge", help);
            p.line(name, &[], v);
        }
        for (name, help, n) in [
            ("num_preemptions_total", "Sequences that gave up their blocks and were recomputed.", e.preemptions),
            ("prefix_waits_total", "Sequences that waited for another to compute their prefix.", e.prefix_waits),
            ("engine_steps_total", "Forward passes.", e.steps),
            ("engine_panics_total", "Forward passes that panicked.", e.panics),
            ("engine_failed_total", "Sequences that ended by an error of the engine.", e.failed),
            ("engine_cancelled_total", "Sequences whose client went away.", e.cancelled),
        ] {
            p.head(name, "counter", help);
            p.line(name, &[], n as f64);
        }
        let tokens = &e.iteration_tokens;
        let bounds = IterationTokens::BOUNDS.map(|b| b as f64);
        p.histogram("iteration_tokens_total", "Tokens of a forward pass.", &bounds, &tokens.counts, tokens.sum as f64);
    }
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.0,
            "# HELP ashlar_{name} {help}\n# TYPE ashlar_{name} {kind}"
        );
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let _ = write!(self.0, "ashlar_{name}");
        for (i, (k, v)) in labels.iter().enumerate() {
            let v = v
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{}{k}=\"{v}\"", if i == 0 { '{' } else { ',' });
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    fn seconds(&mut self, name: &str, help: &str, h: &Histogram) {
        self.histogram(name, help, h.bounds, &h.counts, h.sum);
    }

    /// `counts` has one more than `bounds`: values above every bound.
    fn histogram(&mut self, name: &str, help: &str, bounds: &[f64], counts: &[u64], sum: f64) {
        self.head(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut seen = 0;
        for (bound, count) in bounds.iter().zip(counts) {
            seen += count;
            self.line(&bucket, &[("le", &bound.to_string())], seen as f64);
        }
        let total: u64 = counts.iter().sum();
        self.line(&bucket, &[("le", "+Inf")], total as f64);
        self.line(&format!("{name}_sum"), &[], sum);
        self.line(&format!("{name}_count"), &[], total as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_on_a_bound_falls_under_it() {
        let m = Metrics::new();
        m.token_gap(0.001);
        m.token_gap(0.0011);
        m.token_gap(1e9);
        let page = m.render(Gauges::default());
        for line in [
            "ashlar_inter_token_latency_seconds_bucket{le=\"0.0005\"} 0",
            "ashlar_inter_token_latency_seconds_bucket{le=\"0.001\"} 1",
            "ashlar_inter_token_latency_seconds_bucket{le=\"0.002\"} 2",
            "ashlar_inter_token_latency_seconds_bucket{le=\"80\"} 2",
            "ashlar_inter_token_latency_seconds_bucket{le=\"+Inf\"} 3",
            "ashlar_inter_token_latency_seconds_count 3",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} not in\n{page}");
        }
    }

    #[test]
    fn what_backends_count_is_summed() {
        let mut engine = BackendStats { blocks_total: 8, panics: 1, queued_bytes: 5, ..BackendStats::default() };
        engine.iteration_tokens.observe(9);
        let mut sum = engine.clone();
        sum.add(BackendStats { blocks_used: 4, ..engine });
        let page = Metrics::new().render(Gauges { in_flight: 3, engine: sum, ..Gauges::default() });
        for line in [
            "ashlar_num_responses_in_flight 3",
            "ashlar_kv_cache_usage_perc 0.25",
            "ashlar_engine_panics_total 2",
            "ashlar_queued_bytes 10",
            "ashlar_iteration_tokens_total_bucket{le=\"8\"} 0",
            "ashlar_iteration_tokens_total_bucket{le=\"16\"} 2",
            "ashlar_iteration_tokens_total_sum 18",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} not in\n{page}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let mut p = Page(String::new());
        p.line("x", &[("a", "q\"b\\s\nn")], 1.0);
        assert_eq!(p.0, "ashlar_x{a=\"q\\\"b\\\\s\\nn\"} 1\n");
    }
}
