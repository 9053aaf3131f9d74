//! What `[telemetry]` and the standard `OTEL_…` variables come to.
//!
//! The file goes before the environment, as code does in the specification.
//! Nothing is exported unless one of the two names a collector.

use crate::config::{ConfigError, TelemetrySettings};
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

/// Where one signal goes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Signal {
    pub(crate) url: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) timeout: Duration,
}

/// Everything an exporter needs.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    pub(crate) traces: Option<Signal>,
    pub(crate) metrics: Option<Signal>,
    /// What says who sends this: `service.name` and what the environment adds.
    pub(crate) resource: BTreeMap<String, String>,
    pub(crate) sample: f64,
    pub(crate) contents: bool,
    pub(crate) queue: usize,
    pub(crate) interval: Duration,
}

fn invalid(path: &str, why: String) -> ConfigError {
    ConfigError::Invalid { path: path.to_owned(), why }
}

impl Resolved {
    /// `None` where nothing is to be exported. `env` reads a variable; an empty one
    /// is as none.
    ///
    /// # Errors
    /// Names what cannot be meant: the variable or the key.
    pub(crate) fn of(settings: &TelemetrySettings, env: &dyn Fn(&str) -> Option<String>) -> Result<Option<Self>, ConfigError> {
        let var = |name: &str| env(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        if var("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let traces = settings.traces.then(|| signal(settings, &var, "TRACES", "/v1/traces")).transpose()?.flatten();
        let metrics = settings.metrics.then(|| signal(settings, &var, "METRICS", "/v1/metrics")).transpose()?.flatten();
        if traces.is_none() && metrics.is_none() {
            return Ok(None);
        }
        let mut resource = match var("OTEL_RESOURCE_ATTRIBUTES") {
            Some(text) => pairs("OTEL_RESOURCE_ATTRIBUTES", &text)?.into_iter().collect(),
            None => BTreeMap::new(),
        };
        let name = settings.service_name.clone().or_else(|| var("OTEL_SERVICE_NAME"));
        if let Some(name) = name {
            resource.insert(super::semconv::SERVICE_NAME.into(), name);
        }
        resource.entry(super::semconv::SERVICE_NAME.into()).or_insert_with(|| "ashlar-gateway".into());
        Ok(Some(Self {
            traces,
            metrics,
            resource,
            sample: settings.sample,
            contents: settings.contents,
            queue: settings.queue,
            interval: Duration::from_secs_f64(settings.interval_s),
        }))
    }
}

fn signal(
    settings: &TelemetrySettings,
    var: &dyn Fn(&str) -> Option<String>,
    name: &str,
    path: &str,
) -> Result<Option<Signal>, ConfigError> {
    // A variable of the signal goes before that of all signals.
    let either = |key: &str| {
        [format!("OTEL_EXPORTER_OTLP_{name}_{key}"), format!("OTEL_EXPORTER_OTLP_{key}")]
            .into_iter()
            .find_map(|k| Some((var(&k)?, k)))
    };
    let below = |base: String| format!("{}{path}", base.trim_end_matches('/'));
    let url = match (&settings.otlp_endpoint, either("ENDPOINT")) {
        (Some(base), _) => below(base.clone()),
        // By the specification a signal's own address is taken as it is.
        (None, Some((url, key))) if key.contains(name) => url,
        (None, Some((base, _))) => below(base),
        (None, None) => return Ok(None),
    };
    if !(url.starts_with("http://") || url.starts_with("https://")) {
        return Err(invalid("telemetry.otlp_endpoint", format!("{url:?} is no address: write http://HOST:4318")));
    }
    for (key, known) in [("PROTOCOL", "http/protobuf"), ("COMPRESSION", "none")] {
        if let Some((value, key)) = either(key).filter(|(v, _)| v != known) {
            return Err(invalid(&key, format!("{value:?} is not spoken here, only {known}")));
        }
    }
    let mut headers: BTreeMap<String, String> = match either("HEADERS") {
        Some((text, key)) => pairs(&key, &text)?.into_iter().map(|(k, v)| (k.to_ascii_lowercase(), v)).collect(),
        None => BTreeMap::new(),
    };
    headers.extend(settings.headers.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.clone())));
    let timeout = match either("TIMEOUT") {
        Some((ms, key)) => {
            let ms: u64 = ms.parse().map_err(|_| invalid(&key, format!("it must be milliseconds, got {ms:?}")))?;
            Duration::from_millis(ms.max(1))
        }
        None => Duration::from_secs_f64(settings.timeout_s),
    };
    let ca_file = settings.ca_file.clone().or_else(|| either("CERTIFICATE").map(|(path, _)| path.into()));
    Ok(Some(Signal { url, headers: headers.into_iter().collect(), ca_file, timeout }))
}

/// `k=v,k=v`, values percent-encoded, as in W3C Baggage.
fn pairs(key: &str, text: &str) -> Result<Vec<(String, String)>, ConfigError> {
    let bad = |part: &str| invalid(key, format!("it must be NAME=VALUE,…, got {part:?}"));
    let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
    let read = parts.map(|part| {
        let (k, v) = part.split_once('=').ok_or_else(|| bad(part))?;
        let v = decode(v.trim()).ok_or_else(|| bad(part))?;
        Ok((k.trim().to_owned(), v))
    });
    read.collect()
}

fn decode(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut out = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let (code, rest) = part.split_at_checked(2)?;
        out.push(u8::from_str_radix(code, 16).ok()?);
        out.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(settings: &TelemetrySettings, vars: &[(&str, &str)]) -> Result<Option<Resolved>, String> {
        let env = |name: &str| vars.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        Resolved::of(settings, &env).map_err(|e| e.to_string())
    }

    #[test]
    fn nothing_is_sent_unless_someone_names_a_collector() {
        let off = TelemetrySettings::default();
        assert_eq!(resolve(&off, &[("OTEL_SERVICE_NAME", "x")]), Ok(None));
        assert_eq!(resolve(&off, &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]), Ok(None));
        let on = TelemetrySettings { otlp_endpoint: Some("http://c:4318/".into()), ..TelemetrySettings::default() };
        assert_eq!(resolve(&on, &[("OTEL_SDK_DISABLED", "TRUE")]), Ok(None));
        let r = resolve(&on, &[]).unwrap().unwrap();
        assert_eq!((r.traces.unwrap().url, r.metrics.unwrap().url), ("http://c:4318/v1/traces".into(), "http://c:4318/v1/metrics".into()));
        assert_eq!((r.contents, &*r.resource["service.name"]), (false, "ashlar-gateway"));
    }

    #[test]
    fn variables_of_a_signal_go_before_those_of_all() {
        let vars = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/in"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Bearer%20a%2Cb, x=1"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "250"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,service.name=no"),
            ("OTEL_SERVICE_NAME", "yes"),
        ];
        let r = resolve(&TelemetrySettings::default(), &vars).unwrap().unwrap();
        let (t, m) = (r.traces.unwrap(), r.metrics.unwrap());
        assert_eq!((&*t.url, &*m.url), ("https://t/in", "http://c:4318/v1/metrics"));
        assert_eq!(t.headers, [("authorization".into(), "Bearer a,b".into()), ("x".into(), "1".into())]);
        assert_eq!((t.timeout.as_millis(), m.timeout.as_millis()), (10_000, 250));
        assert_eq!((&*r.resource["service.name"], &*r.resource["deployment.environment.name"]), ("yes", "prod"));
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c");
        for (var, says) in [
            (("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), "only http/protobuf"),
            (("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"), "only none"),
            (("OTEL_EXPORTER_OTLP_HEADERS", "x"), "NAME=VALUE"),
            (("OTEL_EXPORTER_OTLP_HEADERS", "x=%f"), "NAME=VALUE"),
            (("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"), "milliseconds"),
            (("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "c:4318"), "no address"),
        ] {
            let e = resolve(&TelemetrySettings::default(), &[base, var]).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
