//! Figures read at the moment of a scrape: engines, backends, the process.

use super::{
    family::{Families, Kind, Value},
    histogram::Buckets,
};
use crate::guard;
use ashlar_api::{BackendStats, IterationTokens};
use ashlar_core::clock;
use std::sync::LazyLock;

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
    /// Requests being answered by it.
    pub(crate) in_flight: u64,
}

/// What the listener and the exporter count.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ProcessGauges {
    pub(crate) connections: u64,
    pub(crate) accepted: u64,
    pub(crate) handshakes_failed: u64,
    pub(crate) certificate_reloads: u64,
    pub(crate) certificate_failures: u64,
    pub(crate) draining: bool,
    pub(crate) spans_sent: u64,
    pub(crate) spans_dropped: u64,
    pub(crate) exports_failed: u64,
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
    /// What the guard did.
    pub(crate) guard: guard::Counts,
    /// What came of the configuration file.
    pub(crate) file: crate::table::File,
    pub(crate) process: ProcessGauges,
}

impl Gauges {
    pub(super) fn write(&self, f: &mut Families) {
        self.backends(f);
        self.engine(f);
        self.guard(f);
        self.process(f);
    }

    fn guard(&self, f: &mut Families) {
        let g = &self.guard;
        // Without the kind of what was found: a server's fields can be among those.
        let mut sums = std::collections::BTreeMap::<_, u64>::new();
        for (policy, stage, action, _, n) in &g.verdicts {
            *sums.entry((policy.as_str(), stage.as_str(), action.as_str())).or_default() += n;
        }
        let points = sums.into_iter().map(|((policy, stage, action), n)| {
            (vec![("policy", policy), ("stage", stage), ("action", action)], Value::Number(n as f64))
        });
        f.add("guard_verdicts_total", Kind::Counter, "Responses in which a policy found something, by kind of finding.", points);
        for (name, help, n) in [
            ("guard_judge_failures_total", "Verdicts of a judge that could not be had.", g.judge_failures),
            ("moderations_total", "Texts judged at /v1/moderations.", g.moderations),
            ("abuse_refusals_total", "Requests refused because of their end user's standing.", g.abuse_refusals),
        ] {
            f.number(name, Kind::Counter, help, n as f64);
        }
    }

    fn backends(&self, f: &mut Families) {
        type Read = fn(&BackendGauges) -> f64;
        let series: [(&'static str, Kind, &'static str, Read); 6] = [
            ("backend_available", Kind::Gauge, "1 while the backend may be asked.", |b| f64::from(u8::from(b.available))),
            ("backend_circuit", Kind::Gauge, "0 closed, 1 half open, 2 open.", |b| f64::from(b.circuit)),
            ("backend_requests_in_flight", Kind::Gauge, "Requests the backend is answering.", |b| b.in_flight as f64),
            ("backend_requests_total", Kind::Counter, "Requests sent to the backend.", |b| b.requests as f64),
            ("backend_errors_total", Kind::Counter, "Requests the backend failed or refused.", |b| b.errors as f64),
            ("backend_circuit_opened_total", Kind::Counter, "Times the circuit opened.", |b| b.opened as f64),
        ];
        for (name, kind, help, read) in series {
            let points = self.backends.iter().map(|b| (vec![("backend", b.name.as_str())], Value::Number(read(b))));
            f.add(name, kind, help, points);
        }
        let points = self.canaries.iter().map(|(model, back)| {
            (vec![("model_name", model.as_str())], Value::Number(f64::from(u8::from(*back))))
        });
        f.add("canary_rolled_back", Kind::Gauge, "1 once the model's canary was taken back.", points);
        f.number("config_reloads_total", Kind::Counter, "New configurations put to work.", self.file.reloads as f64);
        f.number("config_failures_total", Kind::Counter, "New configurations refused.", self.file.failures as f64);
        let valid = f64::from(u8::from(self.file.error.is_none()));
        f.number("config_valid", Kind::Gauge, "1 while the file as it is now is in force.", valid);
    }

    fn engine(&self, f: &mut Families) {
        let e = &self.engine;
        let used = f64::from(e.blocks_used) / f64::from(e.blocks_total.max(1));
        for (name, help, v) in [
            ("num_requests_running", "Sequences being computed by engines of this process.", f64::from(e.running)),
            ("num_requests_waiting", "Sequences waiting for a place in them.", f64::from(e.waiting)),
            ("num_responses_in_flight", "Responses admitted and not yet settled.", self.in_flight as f64),
            ("kv_cache_blocks_used", "KV blocks in use.", f64::from(e.blocks_used)),
            ("kv_cache_blocks_cached", "KV blocks free that hold a reusable prefix.", f64::from(e.blocks_cached)),
            ("kv_cache_blocks", "KV blocks in all.", f64::from(e.blocks_total)),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used),
            ("queued_bytes", "Bytes of requests that have not started.", e.queued_bytes as f64),
        ] {
            f.number(name, Kind::Gauge, help, v);
        }
        for (name, help, n) in [
            ("num_preemptions_total", "Sequences that gave up their blocks and were recomputed.", e.preemptions),
            ("prefix_waits_total", "Sequences that waited for another to compute their prefix.", e.prefix_waits),
            ("engine_steps_total", "Forward passes.", e.steps),
            ("engine_panics_total", "Forward passes that panicked.", e.panics),
            ("engine_failed_total", "Sequences that ended by an error of the engine.", e.failed),
            ("engine_cancelled_total", "Sequences whose client went away.", e.cancelled),
        ] {
            f.number(name, Kind::Counter, help, n as f64);
        }
        let tokens = &e.iteration_tokens;
        let buckets = Buckets {
            bounds: IterationTokens::BOUNDS.iter().map(|b| *b as f64).collect(),
            counts: tokens.counts.to_vec(),
            sum: tokens.sum as f64,
        };
        f.add("iteration_tokens_total", Kind::Histogram, "Tokens of a forward pass.", [(Vec::new(), Value::Buckets(buckets))]);
    }

    fn process(&self, f: &mut Families) {
        let p = &self.process;
        f.number("connections", Kind::Gauge, "Connections of clients.", p.connections as f64);
        f.number("draining", Kind::Gauge, "1 once the server was told to stop.", f64::from(u8::from(p.draining)));
        for (name, help, n) in [
            ("connections_accepted_total", "Connections accepted.", p.accepted),
            ("tls_handshakes_failed_total", "Connections that ended before TLS was agreed on.", p.handshakes_failed),
            ("tls_certificate_reloads_total", "New certificates put to work.", p.certificate_reloads),
            ("tls_certificate_failures_total", "New certificates that could not be used.", p.certificate_failures),
            ("telemetry_spans_sent_total", "Spans the collector took.", p.spans_sent),
            ("telemetry_spans_dropped_total", "Spans lost to a full queue or a collector that failed.", p.spans_dropped),
            ("telemetry_exports_failed_total", "Batches of spans or metrics the collector did not take.", p.exports_failed),
        ] {
            f.number(name, Kind::Counter, help, n as f64);
        }
        let version = env!("CARGO_PKG_VERSION");
        f.add("build_info", Kind::Gauge, "Always 1.", [(vec![("version", version)], Value::Number(1.0))]);
        let started = *STARTED as f64 / 1e3;
        f.number("process_start_time_seconds", Kind::Gauge, "Seconds since 1970 when the process began to serve.", started);
        if let Some(bytes) = resident_bytes() {
            f.number("process_resident_memory_bytes", Kind::Gauge, "Memory in use.", bytes as f64);
        }
    }
}

/// Milliseconds since 1970 when this was first asked for.
pub(crate) static STARTED: LazyLock<i64> = LazyLock::new(clock::now_ms);

/// Where Linux tells it.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}
