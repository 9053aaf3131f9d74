//! What the gateway counts.
//!
//! Names and bounds follow vLLM's with the prefix `ashlar:`, so that existing
//! dashboards need only a new prefix; what a gateway has and vLLM has not is
//! named in the same manner. [`Metrics::collect`] reads everything once, for
//! `/metrics` (`family`) and for OTLP (`telemetry`).
//!
//! What may not happen here: a label whose value a client chooses freely (models
//! and backends are names of the configuration, the rest are words of ours), so
//! that the number of series stays bounded; or a lock that a token waits for
//! while a page is written.
//!
//! Rejected: a metrics crate with a global registry. Two servers in one
//! process, as in the tests, would then share their counts.

pub(crate) mod family;
mod gauges;
pub(crate) mod histogram;

pub(crate) use gauges::{BackendGauges, Gauges, ProcessGauges, STARTED};

use family::{Families, Family, Kind, Value};
use histogram::{Buckets, E2E, Histogram, ITL, OWN, TOKENS, TTFT};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock, Mutex, PoisonError, RwLock},
};

/// Histograms of one model at one endpoint.
#[derive(Debug)]
pub(crate) struct ModelSeries {
    pub(crate) ttft: Histogram,
    pub(crate) itl: Histogram,
    pub(crate) per_token: Histogram,
    pub(crate) e2e: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
    pub(crate) inference: Histogram,
    pub(crate) prompt: Histogram,
    pub(crate) generation: Histogram,
    pub(crate) read: Histogram,
    pub(crate) added: Histogram,
}

type Pick = fn(&ModelSeries) -> &Histogram;

/// Name, help and place of each of them.
const BY_MODEL: [(&str, &str, Pick); 12] = [
    ("time_to_first_token_seconds", "From the request's first byte to the first token of its answer.", |m| &m.ttft),
    ("inter_token_latency_seconds", "Between two tokens of one response.", |m| &m.itl),
    ("request_time_per_output_token_seconds", "Mean time between the tokens of a response.", |m| &m.per_token),
    ("e2e_request_latency_seconds", "From the request's first byte to its settlement.", |m| &m.e2e),
    ("request_queue_time_seconds", "Waiting in an engine of this process.", |m| &m.queue),
    ("request_prefill_time_seconds", "From an engine's first step for the request to its first token.", |m| &m.prefill),
    ("request_decode_time_seconds", "From an engine's first token to its last.", |m| &m.decode),
    ("request_inference_time_seconds", "From an engine's first step for the request to its last token.", |m| &m.inference),
    ("request_prompt_tokens", "Tokens of prompts.", |m| &m.prompt),
    ("request_generation_tokens", "Tokens of answers.", |m| &m.generation),
    ("request_read_time_seconds", "From the request's first byte to its last.", |m| &m.read),
    ("added_latency_seconds", "Of the time to the first token, what was neither reading the request nor the attempt that answered.", |m| &m.added),
];

impl ModelSeries {
    fn new() -> Self {
        let [e2e, queue, prefill, decode, inference] = [(); 5].map(|()| Histogram::new(E2E));
        Self {
            ttft: Histogram::new(TTFT),
            itl: Histogram::new(ITL),
            per_token: Histogram::new(ITL),
            e2e,
            queue,
            prefill,
            decode,
            inference,
            prompt: Histogram::new(TOKENS),
            generation: Histogram::new(TOKENS),
            read: Histogram::new(OWN),
            added: Histogram::new(OWN),
        }
    }
}

/// Sums of one model's settled responses.
#[derive(Debug, Default)]
struct Sums {
    prompt: u64,
    cached: u64,
    completion: u64,
    refusals: u64,
    /// By currency.
    cost: BTreeMap<String, f64>,
    unpriced: u64,
    estimated: u64,
}

#[derive(Debug, Default)]
struct Counters {
    /// By model, endpoint and end.
    requests: BTreeMap<(String, &'static str, String), u64>,
    /// By model, backend and outcome.
    durations: BTreeMap<(String, String, &'static str), Arc<Histogram>>,
    sums: BTreeMap<String, Sums>,
    rejected: BTreeMap<u16, u64>,
    ledger_errors: u64,
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
    /// With its currency; `None` where no price is known.
    pub(crate) cost: Option<(f64, &'a str)>,
    pub(crate) estimated: bool,
}

/// Series of models by endpoint and name.
type Models = HashMap<&'static str, HashMap<String, Arc<ModelSeries>>>;

/// All series of one server.
#[derive(Debug)]
pub(crate) struct Metrics {
    models: RwLock<Models>,
    counters: Mutex<Counters>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        LazyLock::force(&STARTED);
        Self { models: RwLock::default(), counters: Mutex::default() }
    }

    // Counts stay meaningful when another holder panicked, so poison is ignored.
    fn with<T>(&self, f: impl FnOnce(&mut Counters) -> T) -> T {
        f(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The histograms of `model`, a name of the configuration.
    pub(crate) fn model(&self, model: &str, endpoint: &'static str) -> Arc<ModelSeries> {
        let find = |all: &Models| all.get(endpoint)?.get(model).cloned();
        let known = find(&self.models.read().unwrap_or_else(PoisonError::into_inner));
        known.unwrap_or_else(|| {
            let mut all = self.models.write().unwrap_or_else(PoisonError::into_inner);
            let models = all.entry(endpoint).or_default();
            models.entry(model.to_owned()).or_insert_with(|| Arc::new(ModelSeries::new())).clone()
        })
    }

    /// A token arrived `seconds` after the one before it.
    pub(crate) fn token_gap(&self, model: &str, endpoint: &'static str, seconds: f64) {
        self.model(model, endpoint).itl.observe(seconds);
    }

    /// A request was answered with `status` before a response was admitted.
    pub(crate) fn rejected(&self, status: u16) {
        self.with(|c| *c.rejected.entry(status).or_default() += 1);
    }

    /// The ledger did not take an entry.
    pub(crate) fn ledger_error(&self) {
        self.with(|c| c.ledger_errors += 1);
    }

    /// A `retry` or `hedge` was sent, or the `budget` forbade one.
    pub(crate) fn retry(&self, kind: &'static str) {
        self.with(|c| *c.retries.entry(kind).or_default() += 1);
    }

    /// An attempt at `backend` failed.
    pub(crate) fn upstream_error(&self, backend: &str, class: &'static str) {
        self.with(|c| *c.upstream_errors.entry((backend.to_owned(), class)).or_default() += 1);
    }

    /// A response of `model` ended `seconds` after its request's first byte;
    /// `backend` is who was asked last.
    pub(crate) fn ended(&self, model: &str, backend: &str, outcome: &'static str, seconds: f64) {
        let key = (model.to_owned(), backend.to_owned(), outcome);
        self.with(|c| c.durations.entry(key).or_insert_with(|| Arc::new(Histogram::new(E2E))).observe(seconds));
    }

    /// A response was settled.
    pub(crate) fn settled(&self, sample: &Sample<'_>) {
        self.with(|c| {
            let key = (sample.model.to_owned(), sample.endpoint, sample.finish.to_owned());
            *c.requests.entry(key).or_default() += 1;
            if !c.sums.contains_key(sample.model) {
                c.sums.insert(sample.model.to_owned(), Sums::default());
            }
            let Some(s) = c.sums.get_mut(sample.model) else { return };
            s.prompt += u64::from(sample.prompt_tokens);
            s.cached += u64::from(sample.cached_tokens);
            s.completion += u64::from(sample.completion_tokens);
            s.refusals += u64::from(sample.refusal);
            if let Some((amount, currency)) = sample.cost {
                *s.cost.entry(currency.to_owned()).or_default() += amount;
            }
            s.unpriced += u64::from(sample.cost.is_none());
            s.estimated += u64::from(sample.estimated);
        });
        let series = self.model(sample.model, sample.endpoint);
        series.e2e.observe(sample.total_s);
        if let Some(t) = sample.ttft_s {
            series.ttft.observe(t);
        }
        if let Some(t) = sample.queue_s {
            series.queue.observe(t);
        }
    }

    /// All models by endpoint and name, sorted.
    fn models(&self) -> Vec<(&'static str, String, Arc<ModelSeries>)> {
        let all = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let each = all.iter().flat_map(|(endpoint, models)| models.iter().map(|(m, s)| (*endpoint, m.clone(), s.clone())));
        let mut each: Vec<_> = each.collect();
        each.sort_by(|a, b| (&a.1, a.0).cmp(&(&b.1, b.0)));
        each
    }

    /// Everything, as of now.
    pub(crate) fn collect(&self, gauges: &Gauges) -> Vec<Family> {
        let mut f = Families::default();
        let durations = self.with(|c| {
            c.write(&mut f);
            c.durations.iter().map(|(k, h)| (k.clone(), h.now())).collect::<Vec<(_, Buckets)>>()
        });
        let points = durations.iter().map(|((model, backend, outcome), b)| {
            let labels = vec![("model_name", model.as_str()), ("backend", backend), ("outcome", outcome)];
            (labels, Value::Buckets(b.clone()))
        });
        f.add("request_duration_seconds", Kind::Histogram, "From a request's first byte to the end of its answer.", points);
        let models = self.models();
        for (name, help, pick) in BY_MODEL {
            let points = models.iter().map(|(endpoint, model, series)| {
                (vec![("model_name", model.as_str()), ("endpoint", *endpoint)], Value::Buckets(pick(series).now()))
            });
            f.add(name, Kind::Histogram, help, points);
        }
        gauges.write(&mut f);
        f.0
    }

    /// Everything in the Prometheus text format.
    pub(crate) fn render(&self, gauges: &Gauges) -> String {
        family::text(&self.collect(gauges))
    }
}

impl Counters {
    fn write(&self, f: &mut Families) {
        let requests = self.requests.iter().map(|((model, endpoint, finish), n)| {
            let labels = vec![("model_name", model.as_str()), ("endpoint", *endpoint), ("finished_reason", finish)];
            (labels, Value::Number(*n as f64))
        });
        f.add("request_success_total", Kind::Counter, "Settled responses.", requests);
        for (status, n) in &self.rejected {
            let status = status.to_string();
            let point = (vec![("status", status.as_str())], Value::Number(*n as f64));
            f.add("request_rejected_total", Kind::Counter, REJECTED, [point]);
        }
        f.add("request_rejected_total", Kind::Counter, REJECTED, []);
        type Read = fn(&Sums) -> f64;
        let sums: [(&'static str, &'static str, Read); 7] = [
            ("prompt_tokens_total", "Prompt tokens.", |s| s.prompt as f64),
            ("generation_tokens_total", "Generated tokens.", |s| s.completion as f64),
            ("prefix_cache_queries_total", "Prompt tokens looked up in a prefix cache.", |s| s.prompt as f64),
            ("prefix_cache_hits_total", "Prompt tokens found in a prefix cache.", |s| s.cached as f64),
            ("refusals_total", "Answers that refuse, by the server's word or their opening.", |s| s.refusals as f64),
            ("cost_unknown_total", "Responses without a price: their cost is not in cost_total.", |s| s.unpriced as f64),
            ("usage_estimated_total", "Responses whose tokens no one counted: they are guesses.", |s| s.estimated as f64),
        ];
        for (name, help, read) in sums {
            let points = self.sums.iter().map(|(model, s)| (vec![("model_name", model.as_str())], Value::Number(read(s))));
            f.add(name, Kind::Counter, help, points);
        }
        let costs = self.sums.iter().flat_map(|(model, s)| s.cost.iter().map(move |(currency, sum)| (model, currency, sum)));
        let costs = costs.map(|(model, currency, sum)| {
            (vec![("model_name", model.as_str()), ("currency", currency.as_str())], Value::Number(*sum))
        });
        f.add("cost_total", Kind::Counter, "Cost by the price list.", costs);
        f.number("ledger_errors_total", Kind::Counter, "Entries the ledger did not take.", self.ledger_errors as f64);
        let retries = self.retries.iter().map(|(kind, n)| (vec![("kind", *kind)], Value::Number(*n as f64)));
        f.add("retries_total", Kind::Counter, "Attempts after the first, by kind; those the budget forbade.", retries);
        let errors = self.upstream_errors.iter().map(|((backend, class), n)| {
            (vec![("backend", backend.as_str()), ("error", *class)], Value::Number(*n as f64))
        });
        f.add("backend_attempt_errors_total", Kind::Counter, "Attempts at a backend that failed, by kind.", errors);
    }
}

const REJECTED: &str = "Requests answered with an error before a response was admitted.";

#[cfg(test)]
mod tests;
