//! The gateway's TOML file: backends, models, rules, limits.
//!
//! ```
//! use ashlar_gateway::Config;
//! let config = Config::parse(r#"
//!     [backends.a]
//!     kind = "vllm"
//!     url = "http://10.0.0.5:8000/v1"
//!     [models.chat]
//!     policy = "latency"
//!     targets = [{ backend = "a", model = "org/model-8b" }]
//! "#).unwrap();
//! assert_eq!(config.backends["a"].breaker_failures, 5);
//! let typo = Config::parse("[backends.a]\nknid = \"vllm\"").unwrap_err();
//! assert!(typo.to_string().contains("did you mean \"kind\""), "{typo}");
//! ```
//!
//! Reading gives the resolved form: every default is filled in, printed by
//! `ashlar gateway check`, and changed by nothing later. Keys of upstreams are
//! named here, never held (`api_key_env`, `api_key_file`).
//!
//! What may not happen here: a key that is not known is passed over, or a name
//! that points nowhere is found out by a request.

mod accounts;
mod check;
mod fit;

pub use accounts::AccountsSettings;
pub use fit::{QualitySettings, TaskSettings};

use crate::{guard::GuardSettings, upstream::Dialect};
use ashlar_core::{Fault, Hint};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Keys, limits and usage.
    pub accounts: AccountsSettings,
    /// The encoder that classifiers and `/v1/embeddings` use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder: Option<EncoderSettings>,
    /// Limits of the server; what is left out keeps the command line's.
    pub server: ServerSettings,
    /// Traces and metrics to a collector.
    pub telemetry: TelemetrySettings,
    /// Retries of all models together.
    pub retry: RetrySettings,
    /// Who answers, by name.
    pub backends: BTreeMap<String, BackendSettings>,
    /// What clients may ask for, by name.
    pub models: BTreeMap<String, ModelSettings>,
    /// What is looked for in requests and answers.
    pub guard: GuardSettings,
}

/// `[server]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSettings {
    /// Largest request body in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_body_bytes: Option<usize>,
    /// Responses in flight beyond which requests are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_in_flight: Option<usize>,
    /// Seconds for a request body to arrive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_timeout_s: Option<f64>,
    /// Seconds for a whole answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_timeout_s: Option<f64>,
    /// The share of requests that should succeed, 0.999 for three nines; the
    /// console shows what is left of the rest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objective: Option<f64>,
    /// Seconds in which a server that is told to stop still takes requests, while
    /// /health says that it is draining. Left out: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_s: Option<f64>,
    /// Seconds answers in flight get to finish after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace_s: Option<f64>,
    /// The certificate chain for TLS, a PEM file. Left out: no TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
}

/// `[telemetry]`: spans and metrics by OTLP over HTTP. The standard
/// `OTEL_EXPORTER_OTLP_…` variables fill in what is left out here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetrySettings {
    /// The collector, e.g. `http://10.0.0.9:4318`. Left out: nothing is sent,
    /// unless a variable names one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,
    /// More roots of trust for TLS, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Who says it is sending. Left out: `ashlar-gateway`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_name: Option<String>,
    /// Send spans.
    pub traces: bool,
    /// Send metrics.
    pub metrics: bool,
    /// Probability of a request without a trace of its own to be recorded; one
    /// that brings a trace is recorded when its client records it.
    pub sample: f64,
    /// Put prompts and answers into spans.
    pub contents: bool,
    /// Spans that may wait; more are dropped, and counted.
    pub queue: usize,
    /// Seconds between two reports of metrics.
    pub interval_s: f64,
    /// Seconds for the collector's answer.
    pub timeout_s: f64,
    /// Headers sent along, none of them secret: those come from
    /// `OTEL_EXPORTER_OTLP_HEADERS`.
    pub headers: BTreeMap<String, String>,
}

impl Default for TelemetrySettings {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            ca_file: None,
            service_name: None,
            traces: true,
            metrics: true,
            sample: 1.0,
            contents: false,
            queue: 2048,
            interval_s: 60.0,
            timeout_s: 10.0,
            headers: BTreeMap::new(),
        }
    }
}

/// `[encoder]`. Opened when the server starts; a change of it is refused until
/// the next start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderSettings {
    /// A folder in Hugging Face's layout with weights and tokenizer.
    pub path: PathBuf,
    /// Its name for clients. Left out: the folder's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// It was trained so that the beginnings of its vectors are vectors, too
    /// (Matryoshka, Kusupati et al. 2022): `dimensions` of a request may be fewer.
    #[serde(default)]
    pub truncatable: bool,
}

/// `[retry]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetrySettings {
    /// Retries and hedges allowed for each request that comes in.
    pub budget_ratio: f64,
    /// Retries and hedges allowed each second whatever comes in.
    pub budget_per_s: f64,
    /// First pause before the same backend is asked again, in seconds; it
    /// doubles, and a random share of it is waited.
    pub backoff_s: f64,
    /// Longest pause, also when a backend asks for more: then the client is
    /// told to come back later.
    pub max_wait_s: f64,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self { budget_ratio: 0.2, budget_per_s: 10.0, backoff_s: 0.05, max_wait_s: 2.0 }
    }
}

/// `[backends.NAME]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackendSettings {
    /// What kind of server it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<Dialect>,
    /// Base address, e.g. `http://10.0.0.5:8000/v1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// For an engine: the channel, file or folder it serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serve: Option<String>,
    /// The environment variable that holds the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// The file that holds the key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// More roots of trust for TLS, a PEM file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// Headers sent along, none of them secret.
    pub headers: BTreeMap<String, String>,
    /// Seconds for a connection, TLS included.
    pub connect_timeout_s: f64,
    /// Seconds until the answer begins.
    pub first_byte_timeout_s: f64,
    /// Seconds between two pieces of an answer.
    pub idle_timeout_s: f64,
    /// Largest answer in bytes.
    pub max_answer_bytes: u64,
    /// Largest event of a stream in bytes.
    pub max_event_bytes: usize,
    /// Connections kept open while unused.
    pub idle_connections: usize,
    /// For Anthropic: `max_tokens` where a client sets none.
    pub default_max_tokens: u32,
    /// Where probes ask: `//path` from the host's root, `/path` below `url`;
    /// empty for none. Left out, what suits the kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// Seconds between probes.
    pub probe_interval_s: f64,
    /// Seconds for a probe's answer.
    pub probe_timeout_s: f64,
    /// Failed probes in a row until the backend is left out.
    pub probe_failures: u32,
    /// Failed requests in a row that open the circuit.
    pub breaker_failures: u32,
    /// Seconds an open circuit lets nothing through; doubled each time it opens
    /// again right away, up to sixteenfold.
    pub breaker_open_s: f64,
    /// Requests tried at once while half open.
    pub breaker_trials: u32,
}

impl Default for BackendSettings {
    fn default() -> Self {
        Self {
            kind: None,
            url: None,
            serve: None,
            api_key_env: None,
            api_key_file: None,
            ca_file: None,
            headers: BTreeMap::new(),
            connect_timeout_s: 3.0,
            first_byte_timeout_s: 120.0,
            idle_timeout_s: 60.0,
            max_answer_bytes: 64 << 20,
            max_event_bytes: 4 << 20,
            idle_connections: 256,
            default_max_tokens: 4096,
            probe: None,
            probe_interval_s: 5.0,
            probe_timeout_s: 2.0,
            probe_failures: 2,
            breaker_failures: 5,
            breaker_open_s: 5.0,
            breaker_trials: 1,
        }
    }
}

/// How one of several backends is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// At random by `weight`.
    #[default]
    Weighted,
    /// The quicker of two drawn at random, by recent times and load.
    Latency,
    /// The cheapest for this prompt and the usual length of answers.
    Cost,
    /// The one with most of this prompt in its cache, against its load.
    PrefixAffine,
    /// In the order written.
    Ordered,
    /// By what the prompt is about; see [`TaskSettings`].
    Task,
    /// The strong model where it is likely to do better; see [`QualitySettings`].
    Quality,
}

/// `[models.NAME]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// Other names of it.
    pub aliases: Vec<String>,
    /// Who answers.
    pub targets: Vec<TargetSettings>,
    /// How a target is chosen.
    pub policy: Policy,
    /// The first that fits decides.
    pub rules: Vec<RuleSettings>,
    /// Models asked next when all targets failed, in order.
    pub fallback: Vec<String>,
    /// Attempts after the first, each at another target while there is one.
    pub retries: u32,
    /// Seconds without a token after which a second target is asked too; the
    /// slower one is cancelled. Left out: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hedge_after_s: Option<f64>,
    /// Tokens of prompt and answer that fit, shown to clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<u32>,
    /// A target tried on a share of requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<CanarySettings>,
    /// For the prefix-affine policy: what computing a block of prompt weighs
    /// against a block of running work. Left out: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_scale: Option<f64>,
    /// A target that gets copies of a share of requests, and answers no one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorSettings>,
    /// For the task policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskSettings>,
    /// For the quality policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quality: Option<QualitySettings>,
}

impl Default for ModelSettings {
    fn default() -> Self {
        Self {
            aliases: Vec::new(),
            targets: Vec::new(),
            policy: Policy::default(),
            rules: Vec::new(),
            fallback: Vec::new(),
            retries: 2,
            hedge_after_s: None,
            context: None,
            canary: None,
            prefill_scale: None,
            mirror: None,
            task: None,
            quality: None,
        }
    }
}

/// `[models.NAME.canary]`: one of the targets gets this share of requests and no
/// others, until it is worse than they are; then it gets none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CanarySettings {
    /// The target's backend.
    pub backend: String,
    /// Probability of a request to be drawn for it.
    pub share: f64,
    /// Probability of taking it back though it is no worse.
    #[serde(default = "one_in_a_hundred")]
    pub alpha: f64,
    /// JSON lines `{"canary": 0.8, "incumbent": 0.9}`, both 0 to 1: scores of
    /// both on the same prompts, read as an evaluation appends them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<PathBuf>,
}

/// `[models.NAME.mirror]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorSettings {
    /// The backend that gets the copies; it need not be a target's.
    pub backend: String,
    /// What it calls the model. Left out: as here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Probability of a request to be copied.
    pub share: f64,
    /// Copies under way at once; beyond it requests are not copied.
    #[serde(default = "sixteen")]
    pub queue: usize,
}

const fn sixteen() -> usize {
    16
}

const fn one_in_a_hundred() -> f64 {
    0.01
}

/// One of `targets`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetSettings {
    /// A backend's name.
    pub backend: String,
    /// What the backend calls the model. Left out: as here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Share of requests under the weighted policy; 0 takes none at first.
    #[serde(default = "one")]
    pub weight: f64,
}

const fn one() -> f64 {
    1.0
}

/// One of `rules`: where all conditions given hold, only the targets of `use`
/// are candidates, or the request goes to the model `to`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RuleSettings {
    /// Its name in decisions.
    pub name: String,
    /// The client asked under one of these names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub asked_as: Vec<String>,
    /// These headers have these values; `*` is any.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The request has these fields.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<String>,
    /// The prompt has at least this many bytes of JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_bytes: Option<usize>,
    /// And at most this many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<usize>,
    /// Found in the prompt's JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regex: Option<String>,
    /// Backends that remain candidates.
    #[serde(rename = "use", skip_serializing_if = "Vec::is_empty")]
    pub only: Vec<String>,
    /// The model asked instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// No TOML, or a value of the wrong type.
    #[error("{at}{why}")]
    Syntax {
        /// `line 3: ` or nothing.
        at: String,
        /// In the reader's words.
        why: String,
    },
    /// A key that is not known.
    #[error("{at}unknown key {key:?}{}; known here: {}", .nearest.as_ref().map(|n| format!(", did you mean {n:?}?")).unwrap_or_default(), .known.join(", "))]
    Unknown {
        /// `line 3: ` or nothing.
        at: String,
        /// The key.
        key: String,
        /// The known key most like it.
        nearest: Option<String>,
        /// All known keys of its table.
        known: Vec<String>,
    },
    /// A value that cannot be meant.
    #[error("{path}: {why}")]
    Invalid {
        /// The key's whole name.
        path: String,
        /// What is wrong, with the numbers.
        why: String,
    },
    /// A key or certificate that cannot be had.
    #[error("backends.{backend}: {why}")]
    Backend {
        /// The backend.
        backend: String,
        /// What is wrong.
        why: String,
    },
}

impl Hint for ConfigError {
    fn fault(&self) -> Fault {
        match self {
            Self::Backend { .. } => Fault::Environment,
            _ => Fault::Input,
        }
    }

    fn hint(&self) -> Option<String> {
        Some("`ashlar gateway check FILE` says whether a file can be used".into())
    }
}

impl Config {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`ConfigError`], naming line or key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| check::syntax(text, &e))?;
        config.check()?;
        Ok(config)
    }
}
