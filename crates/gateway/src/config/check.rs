//! What a configuration must hold beyond its form: names that point somewhere,
//! numbers that can be meant. And the nearest known name for one that is not.

use super::{Config, ConfigError, ModelSettings};
use crate::upstream::Dialect;
use std::collections::{BTreeMap, BTreeSet};

impl Config {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let invalid = |path: String, why: String| Err(ConfigError::Invalid { path, why });
        self.accounts.check()?;
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
            if let Some(secret) = secret_header(&b.headers) {
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
        self.guard.check()?;
        self.check_server()?;
        self.check_telemetry()?;
        if let Some(n) = self.server.objective.filter(|n| !(0.0..1.0).contains(n)) {
            return invalid("server.objective".into(), format!("it must be at least 0 and less than 1, got {n}"));
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

    fn check_server(&self) -> Result<(), ConfigError> {
        let s = &self.server;
        for (key, n) in [("drain_s", s.drain_s), ("grace_s", s.grace_s)] {
            if let Some(n) = n.filter(|n| !(0.0..=1e5).contains(n)) {
                return Err(ConfigError::Invalid { path: format!("server.{key}"), why: format!("it must be between 0 and 100000, got {n}") });
            }
        }
        match (&s.tls_cert, &s.tls_key) {
            (Some(_), None) => Err(ConfigError::Invalid { path: "server.tls_key".into(), why: "it is missing, and tls_cert is given".into() }),
            (None, Some(_)) => Err(ConfigError::Invalid { path: "server.tls_cert".into(), why: "it is missing, and tls_key is given".into() }),
            _ => Ok(()),
        }
    }

    fn check_telemetry(&self) -> Result<(), ConfigError> {
        let t = &self.telemetry;
        let invalid = |key: &str, why: String| Err(ConfigError::Invalid { path: format!("telemetry.{key}"), why });
        if let Some(secret) = secret_header(&t.headers) {
            return invalid("headers", format!("{secret} holds a secret: put it into OTEL_EXPORTER_OTLP_HEADERS"));
        }
        if !(0.0..=1.0).contains(&t.sample) {
            return invalid("sample", format!("it is a probability, got {}", t.sample));
        }
        if !(1..=1 << 20).contains(&t.queue) {
            return invalid("queue", format!("it must be between 1 and {}, got {}", 1 << 20, t.queue));
        }
        positive("telemetry.interval_s", t.interval_s)?;
        positive("telemetry.timeout_s", t.timeout_s)
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
            if m.targets[..i].iter().any(|o| (&o.backend, &o.model) == (&t.backend, &t.model)) {
                return invalid(format!("targets[{i}]"), "the same backend and model are listed before".into());
            }
        }
        if let Some(c) = &m.canary {
            if m.targets.iter().filter(|t| t.backend == c.backend).count() != 1 || m.targets.len() < 2 {
                return invalid("canary.backend".into(), format!("{:?} must be one target's backend, and there must be others", c.backend));
            }
            for (key, p) in [("share", c.share), ("alpha", c.alpha)] {
                if !(p > 0.0 && p <= 0.5) {
                    return invalid(format!("canary.{key}"), format!("it must be above 0 and at most 0.5, got {p}"));
                }
            }
        }
        if let Some(mirror) = &m.mirror {
            if !self.backends.contains_key(&mirror.backend) {
                let known = self.backends.keys().map(String::as_str).collect();
                return invalid("mirror.backend".into(), unknown("backend", &mirror.backend, known));
            }
            if !(mirror.share > 0.0 && mirror.share <= 1.0) || !(1..=4096).contains(&mirror.queue) {
                let why = format!("share must be above 0 and at most 1, queue between 1 and 4096, got {} and {}", mirror.share, mirror.queue);
                return invalid("mirror".into(), why);
            }
        }
        super::fit::check(name, m, self.encoder.is_some())?;
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

/// A header of `headers` that is known to hold a secret.
fn secret_header(headers: &BTreeMap<String, String>) -> Option<&String> {
    let secret = ["authorization", "x-api-key", "api-key", "proxy-authorization", "cookie"];
    headers.keys().find(|h| secret.contains(&h.to_ascii_lowercase().as_str()))
}

fn positive(path: &str, n: f64) -> Result<(), ConfigError> {
    if n > 0.0 && n <= 1e7 {
        return Ok(());
    }
    Err(ConfigError::Invalid { path: path.into(), why: format!("it must be above 0 and at most 1e7, got {n}") })
}

/// serde names an unknown field and the known ones in backquotes.
pub(super) fn syntax(text: &str, e: &toml::de::Error) -> ConfigError {
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
        [accounts]
        database = "postgres://ashlar@db/ashlar"
        [backends.a]
        kind = "vllm"
        url = "http://a/v1"
        [backends.b]
        kind = "openai"
        api_key_env = "K"
        [models.m]
        aliases = ["n"]
        targets = [{ backend = "a", weight = 3 }, { backend = "b", model = "x" }]
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
            ("database = \"postgres://a:b@db/x\"", "database = \"postgres://ashlar@db/ashlar\"", "accounts.database: it holds a password"),
            ("database = \"mysql://db/x\"", "database = \"postgres://ashlar@db/ashlar\"", "accounts.database: accounts are kept in"),
            ("requir_keys = true", "database = \"postgres://ashlar@db/ashlar\"", "did you mean \"require_keys\""),
            ("assume_tokens = 0", "database = \"postgres://ashlar@db/ashlar\"", "accounts.assume_tokens: it must be at least 1"),
            ("[model.f]", "[models.f]", "did you mean \"models\""),
            ("kind = \"vlmm\"", "kind = \"vllm\"", "unknown variant `vlmm`"),
            ("backend = \"aa\", weight", "backend = \"a\", weight", "no backend \"aa\", did you mean \"a\"?"),
            ("fallback = [\"g\"]", "fallback = [\"f\"]", "models.m.fallback[0]: there is no other model \"g\""),
            ("fallback = [\"m\"]", "fallback = [\"f\"]", "models.m.fallback[0]"),
            ("use = [\"c\"]", "use = [\"b\"]", "models.m.rules[0].use"),
            ("[server]\ntls_cert = \"c.pem\"\n[backends.a]", "[backends.a]", "server.tls_key: it is missing"),
            ("[server]\ngrace_s = -1\n[backends.a]", "[backends.a]", "server.grace_s"),
            ("[telemetry]\nsample = 2\n[backends.a]", "[backends.a]", "telemetry.sample: it is a probability"),
            ("[telemetry]\nheaders = { Authorization = \"x\" }\n[backends.a]", "[backends.a]", "OTEL_EXPORTER_OTLP_HEADERS"),
            ("[telemetry]\notlp_endpont = \"http://c\"\n[backends.a]", "[backends.a]", "did you mean \"otlp_endpoint\""),
            ("regex = \"(\"", "min_bytes = 10", "models.m.rules[0].regex"),
            ("aliases = [\"f\"]", "aliases = [\"n\"]", "models.m.aliases"),
            ("probe_timeout_s = -1", "url = \"http://a/v1\"", "backends.a.url"),
            ("url = \"http://a/v1\"\nidle_timeout_s = 0", "url = \"http://a/v1\"", "backends.a.idle_timeout_s: it must be above 0"),
            ("headers = { Authorization = \"x\" }", "api_key_env = \"K\"", "holds a secret"),
            ("serve = \"prod\"", "api_key_env = \"K\"", "only an engine has it"),
            ("[backends.a", "[backends.a]", "line 4"),
            ("fallback = [\"f\"]\ncanary = { backend = \"c\", share = 0.1 }", "fallback = [\"f\"]", "models.m.canary.backend"),
            ("fallback = [\"f\"]\ncanary = { backend = \"b\", share = 0.6 }", "fallback = [\"f\"]", "models.m.canary.share: it must be above 0"),
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
