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

use crate::{app::Prices, upstream::Dialect};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Limits of the server; what is left out keeps the command line's.
    pub server: ServerSettings,
    /// Retries of all models together.
    pub retry: RetrySettings,
    /// Who answers, by name.
    pub backends: BTreeMap<String, BackendSettings>,
    /// What clients may ask for, by name.
    pub models: BTreeMap<String, ModelSettings>,
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
    /// For the prefix-affine policy: what computing a block of prompt weighs
    /// against a block of running work. Left out: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill_scale: Option<f64>,
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
            prefill_scale: None,
        }
    }
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
    /// Prices of 1000 tokens. Left out: the server's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Prices>,
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

impl Config {
    /// Reads a file's text.
    ///
    /// # Errors
    /// [`ConfigError`], naming line or key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| syntax(text, &e))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |path: String, why: String| Err(ConfigError::Invalid { path, why });
        for (name, b) in &self.backends {
            let at = |key: &str| format!("backends.{name}.{key}");
            let Some(kind) = b.kind else {
                return invalid(at("kind"), "it is missing: say what kind of server this is".into());
            };
            match (kind, &b.url, &b.serve) {
                (Dialect::Engine, Some(_), _) => {
                    return invalid(at("url"), "an engine runs in this process and has no address".into());
                }
                (Dialect::Engine, None, None) => {
                    return invalid(at("serve"), "it is missing: the channel, file or folder to serve".into());
                }
                (Dialect::Engine, None, Some(_)) => {}
                (_, _, Some(_)) => return invalid(at("serve"), format!("only an engine has it, this is {}", kind.as_str())),
                (_, None, None) if kind.default_url().is_none() => {
                    return invalid(at("url"), "it is missing: write http://HOST:PORT/v1".into());
                }
                _ => {}
            }
            if b.api_key_env.is_some() && b.api_key_file.is_some() {
                return invalid(at("api_key_file"), "api_key_env is given too: give one".into());
            }
            if let Some(secret) = b.headers.keys().find(|h| {
                ["authorization", "x-api-key", "api-key", "proxy-authorization", "cookie"].contains(&h.to_ascii_lowercase().as_str())
            }) {
                return invalid(at("headers"), format!("{secret} holds a secret: use api_key_env or api_key_file"));
            }
            for (key, seconds) in [
                ("connect_timeout_s", b.connect_timeout_s),
                ("first_byte_timeout_s", b.first_byte_timeout_s),
                ("idle_timeout_s", b.idle_timeout_s),
                ("probe_interval_s", b.probe_interval_s),
                ("probe_timeout_s", b.probe_timeout_s),
                ("breaker_open_s", b.breaker_open_s),
            ] {
                positive(&at(key), seconds)?;
            }
            for (key, n) in [
                ("probe_failures", u64::from(b.probe_failures)),
                ("breaker_failures", b.breaker_failures.into()),
                ("breaker_trials", b.breaker_trials.into()),
                ("max_answer_bytes", b.max_answer_bytes),
                ("max_event_bytes", b.max_event_bytes as u64),
                ("default_max_tokens", b.default_max_tokens.into()),
            ] {
                if n == 0 {
                    return invalid(at(key), "it must be at least 1, got 0".into());
                }
            }
            if b.probe.as_ref().is_some_and(|p| !p.is_empty() && !p.starts_with('/')) {
                return invalid(at("probe"), "it must begin with / or be empty".into());
            }
        }
        for (key, n) in [("backoff_s", self.retry.backoff_s), ("max_wait_s", self.retry.max_wait_s)] {
            positive(&format!("retry.{key}"), n)?;
        }
        for (key, n) in [("budget_ratio", self.retry.budget_ratio), ("budget_per_s", self.retry.budget_per_s)] {
            if !(0.0..=1e6).contains(&n) {
                return invalid(format!("retry.{key}"), format!("it must be between 0 and 1000000, got {n}"));
            }
        }
        for (key, n) in [("body_timeout_s", self.server.body_timeout_s), ("request_timeout_s", self.server.request_timeout_s)] {
            if let Some(n) = n {
                positive(&format!("server.{key}"), n)?;
            }
        }
        let mut names: BTreeSet<&str> = self.models.keys().map(String::as_str).collect();
        for (name, m) in &self.models {
            for alias in &m.aliases {
                if !names.insert(alias) {
                    return invalid(format!("models.{name}.aliases"), format!("{alias:?} is the name of another model"));
                }
            }
        }
        for (name, m) in &self.models {
            self.check_model(name, m)?;
        }
        Ok(())
    }

    fn check_model(&self, name: &str, m: &ModelSettings) -> Result<(), ConfigError> {
        let invalid = |key: String, why: String| Err(ConfigError::Invalid { path: format!("models.{name}.{key}"), why });
        let unknown = |what: &str, given: &str, known: Vec<&str>| {
            let near = nearest(given, &known).map(|n| format!(", did you mean {n:?}?")).unwrap_or_default();
            format!("there is no {what} {given:?}{near}")
        };
        if m.targets.is_empty() && m.rules.iter().all(|r| r.to.is_none()) {
            return invalid("targets".into(), "it is empty: no one would answer".into());
        }
        for (i, t) in m.targets.iter().enumerate() {
            if !self.backends.contains_key(&t.backend) {
                let known = self.backends.keys().map(String::as_str).collect();
                return invalid(format!("targets[{i}].backend"), unknown("backend", &t.backend, known));
            }
            if !(0.0..=1e9).contains(&t.weight) {
                return invalid(format!("targets[{i}].weight"), format!("it must be between 0 and 1e9, got {}", t.weight));
            }
            if let Some(p) = t.price
                && ![p.input, p.cached, p.output].iter().all(|p| (0.0..1e12).contains(p))
            {
                return invalid(format!("targets[{i}].price"), "prices are not negative".into());
            }
            if m.targets[..i].iter().any(|o| (&o.backend, &o.model) == (&t.backend, &t.model)) {
                return invalid(format!("targets[{i}]"), "the same backend and model are listed before".into());
            }
        }
        if let Some(s) = m.hedge_after_s {
            positive(&format!("models.{name}.hedge_after_s"), s)?;
        }
        let others: Vec<&str> = self.models.keys().map(String::as_str).collect();
        for (i, other) in m.fallback.iter().enumerate() {
            if !self.models.contains_key(other) || other == name {
                return invalid(format!("fallback[{i}]"), unknown("other model", other, others));
            }
        }
        for (i, rule) in m.rules.iter().enumerate() {
            let at = |key: &str| format!("rules[{i}].{key}");
            match (&rule.to, rule.only.is_empty()) {
                (None, true) => return invalid(at("use"), "the rule has neither use nor to: it would do nothing".into()),
                (Some(_), false) => return invalid(at("to"), "use is given too: give one".into()),
                (Some(to), true) => {
                    let ends = self.models.get(to).is_some_and(|m| m.rules.iter().all(|r| r.to.is_none()));
                    if to == name || !ends {
                        let why = unknown("other model without a to of its own", to, others);
                        return invalid(at("to"), why);
                    }
                }
                (None, false) => {}
            }
            if let Some(b) = rule.only.iter().find(|b| !m.targets.iter().any(|t| t.backend == **b)) {
                let known = m.targets.iter().map(|t| t.backend.as_str()).collect();
                return invalid(at("use"), unknown("target on backend", b, known));
            }
            if let Some(Err(e)) = rule.regex.as_deref().map(regex::Regex::new) {
                return invalid(at("regex"), e.to_string().replace('\n', " "));
            }
        }
        Ok(())
    }
}

fn positive(path: &str, n: f64) -> Result<(), ConfigError> {
    if n > 0.0 && n <= 1e7 {
        return Ok(());
    }
    Err(ConfigError::Invalid { path: path.into(), why: format!("it must be above 0 and at most 1e7, got {n}") })
}

/// serde names an unknown field and the known ones in backquotes.
fn syntax(text: &str, e: &toml::de::Error) -> ConfigError {
    let line = e.span().map(|s| text.get(..s.start).unwrap_or("").matches('\n').count() + 1);
    let at = line.map(|l| format!("line {l}: ")).unwrap_or_default();
    let message = e.message();
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let mut quoted = rest.split('`').skip(1).step_by(2).map(str::to_owned);
        if let Some(key) = quoted.next() {
            let known: Vec<String> = quoted.collect();
            let names: Vec<&str> = known.iter().map(String::as_str).collect();
            let nearest = nearest(&key, &names).map(str::to_owned);
            return ConfigError::Unknown { at, key, nearest, known };
        }
    }
    ConfigError::Syntax { at, why: message.replace('\n', " ") }
}

/// The name of `known` fewest edits away from `given`, when that is less than
/// half of it.
fn nearest<'a>(given: &str, known: &[&'a str]) -> Option<&'a str> {
    let best = known.iter().map(|k| (edits(given, k), *k)).min()?;
    (best.0 * 2 <= given.chars().count().max(2)).then_some(best.1)
}

/// Insertions, deletions, replacements and swaps of neighbours between two
/// words (Damerau and Levenshtein, the restricted form).
fn edits(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let differs = usize::from(a[i - 1] != b[j - 1]);
                let mut best = (rows[i - 1][j - 1] + differs).min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        [backends.a]
        kind = "vllm"
        url = "http://a/v1"
        [backends.b]
        kind = "openai"
        api_key_env = "K"
        [models.m]
        aliases = ["n"]
        targets = [{ backend = "a", weight = 3 }, { backend = "b", model = "x", price = { input = 1, output = 2 } }]
        fallback = ["f"]
        [[models.m.rules]]
        min_bytes = 10
        use = ["b"]
        [models.f]
        targets = [{ backend = "b" }]
    "#;

    #[test]
    fn defaults_are_filled_in_and_read_back() {
        let config = Config::parse(GOOD).unwrap();
        let printed = serde_json::to_value(&config).unwrap();
        assert_eq!(printed["backends"]["a"]["idle_timeout_s"], 60.0);
        assert_eq!(serde_json::from_value::<Config>(printed).unwrap(), config);
        assert_eq!(config.models["m"].targets[0].weight, 3.0);
    }

    #[test]
    fn mistakes_are_named_with_the_nearest_name() {
        let cases = [
            ("wieght = 3", "weight = 3", "did you mean \"weight\""),
            ("[model.f]", "[models.f]", "did you mean \"models\""),
            ("kind = \"vlmm\"", "kind = \"vllm\"", "unknown variant `vlmm`"),
            ("backend = \"aa\", weight", "backend = \"a\", weight", "no backend \"aa\", did you mean \"a\"?"),
            ("fallback = [\"g\"]", "fallback = [\"f\"]", "models.m.fallback[0]: there is no other model \"g\""),
            ("fallback = [\"m\"]", "fallback = [\"f\"]", "models.m.fallback[0]"),
            ("use = [\"c\"]", "use = [\"b\"]", "models.m.rules[0].use"),
            ("regex = \"(\"", "min_bytes = 10", "models.m.rules[0].regex"),
            ("aliases = [\"f\"]", "aliases = [\"n\"]", "models.m.aliases"),
            ("probe_timeout_s = -1", "url = \"http://a/v1\"", "backends.a.url"),
            ("url = \"http://a/v1\"\nidle_timeout_s = 0", "url = \"http://a/v1\"", "backends.a.idle_timeout_s: it must be above 0"),
            ("headers = { Authorization = \"x\" }", "api_key_env = \"K\"", "holds a secret"),
            ("serve = \"prod\"", "api_key_env = \"K\"", "only an engine has it"),
            ("[backends.a", "[backends.a]", "line 2"),
        ];
        for (wrong, right, says) in cases {
            assert!(GOOD.contains(right), "{right}");
            let e = Config::parse(&GOOD.replace(right, wrong)).unwrap_err().to_string();
            assert!(e.contains(says), "{wrong}: {e}");
        }
    }

    #[test]
    fn the_nearest_name_must_be_near() {
        assert_eq!(nearest("wieght", &["weight", "model"]), Some("weight"));
        assert_eq!(nearest("completely_else", &["weight", "model"]), None);
        assert_eq!((edits("ab", "ba"), edits("", "abc"), edits("kitten", "sitting")), (1, 3, 3));
    }
}
