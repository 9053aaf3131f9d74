//! Our families and attributes in OTLP's messages.

use super::{
    proto::{
        Any, AnyValue, Array, Data, Distribution, Gauge, Histogram, KeyValue, Metric, Metrics, Number, Resource,
        ResourceMetrics, ResourceSpans, Scope, ScopeMetrics, ScopeSpans, Span, Sum, Traces,
    },
    semconv,
};
use crate::metrics::family::{Family, Kind, Value};

/// `AGGREGATION_TEMPORALITY_CUMULATIVE`: counts since the start.
const CUMULATIVE: i32 = 2;

impl From<&str> for Any {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Any {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Any {
    fn from(n: i64) -> Self {
        Self::Int(n)
    }
}

impl From<f64> for Any {
    fn from(n: f64) -> Self {
        Self::Float(n)
    }
}

impl From<bool> for Any {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}

impl From<Vec<String>> for Any {
    fn from(texts: Vec<String>) -> Self {
        let values = texts.into_iter().map(|t| AnyValue { value: Some(Self::Text(t)) }).collect();
        Self::Array(Array { values })
    }
}

/// An attribute.
pub(crate) fn attribute(key: &str, value: impl Into<Any>) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value.into()) }) }
}

fn scope() -> Option<Scope> {
    Some(Scope { name: "ashlar.gateway".into(), version: env!("CARGO_PKG_VERSION").into() })
}

/// A batch of spans.
pub(crate) fn traces(resource: &Resource, spans: Vec<Span>) -> Traces {
    let scope_spans = vec![ScopeSpans { scope: scope(), spans }];
    Traces { resource_spans: vec![ResourceSpans { resource: Some(resource.clone()), scope_spans }] }
}

/// All families, counted from `start` to `now`, in nanoseconds since 1970.
/// Families of one name in OTLP become one metric.
pub(crate) fn metrics(resource: &Resource, families: &[Family], start: u64, now: u64) -> Metrics {
    let mut out: Vec<Metric> = Vec::new();
    for family in families.iter().filter(|f| !f.points.is_empty()) {
        let (name, unit, extra) = semconv::metric(family.name);
        let extra: Vec<KeyValue> = extra.map(|(k, v)| attribute(k, v)).into_iter().collect();
        let attributes = |labels: &[(&'static str, String)]| {
            let mut list = extra.clone();
            list.extend(labels.iter().map(|(k, v)| {
                let (key, value) = semconv::attribute(k, v);
                attribute(key, value)
            }));
            // Several routes are one operation: both, or their points would be one.
            if let Some((_, route)) = labels.iter().find(|(k, _)| *k == "endpoint") {
                list.push(attribute(semconv::OPERATION, semconv::operation(route)));
            }
            if name.starts_with("gen_ai.") {
                list.push(attribute(semconv::PROVIDER, semconv::OURS));
            }
            list
        };
        let (mut numbers, mut distributions) = (Vec::new(), Vec::new());
        for point in &family.points {
            let attributes = attributes(&point.labels);
            let (start_time_unix_nano, time_unix_nano) = (start, now);
            match &point.value {
                Value::Number(n) => {
                    numbers.push(Number { attributes, start_time_unix_nano, time_unix_nano, as_double: Some(*n) });
                }
                Value::Buckets(b) => distributions.push(Distribution {
                    attributes,
                    start_time_unix_nano,
                    time_unix_nano,
                    count: b.count(),
                    sum: Some(b.sum),
                    bucket_counts: b.counts.clone(),
                    explicit_bounds: b.bounds.clone(),
                }),
            }
        }
        if let Some(Metric { data: Some(Data::Histogram(h)), .. }) = out.iter_mut().find(|m| m.name == name) {
            h.data_points.append(&mut distributions);
            continue;
        }
        let data = match family.kind {
            Kind::Gauge => Data::Gauge(Gauge { data_points: numbers }),
            Kind::Counter => Data::Sum(Sum { data_points: numbers, aggregation_temporality: CUMULATIVE, is_monotonic: true }),
            Kind::Histogram => Data::Histogram(Histogram { data_points: distributions, aggregation_temporality: CUMULATIVE }),
        };
        out.push(Metric { name, description: family.help.to_owned(), unit: unit.to_owned(), data: Some(data) });
    }
    let scope_metrics = vec![ScopeMetrics { scope: scope(), metrics: out }];
    Metrics { resource_metrics: vec![ResourceMetrics { resource: Some(resource.clone()), scope_metrics }] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::family::Families;
    use std::collections::BTreeSet;

    /// Two points of one identity are one to a collector, or none.
    #[test]
    fn no_point_is_taken_for_another() {
        let mut f = Families::default();
        let one = || Value::Number(1.0);
        let endpoints = ["/v1/chat/completions", "/v1/messages", "/v1/completions", "/v1/rerank", "mirror:/v1/completions"];
        f.add("prompt_tokens_total", Kind::Counter, "", endpoints.map(|e| (vec![("model_name", "m"), ("endpoint", e)], one())));
        let verdicts = [("pii", "request", "block"), ("pii", "answer", "block"), ("pii", "answer", "redact"), ("x", "answer", "redact")];
        f.add("guard_verdicts_total", Kind::Counter, "", verdicts.map(|(p, s, a)| (vec![("policy", p), ("stage", s), ("action", a)], one())));
        let sent = metrics(&Resource::default(), &f.0, 0, 1);
        for metric in &sent.resource_metrics[0].scope_metrics[0].metrics {
            let Some(Data::Sum(sum)) = &metric.data else { panic!("{metric:?}") };
            let mut seen = BTreeSet::new();
            for point in &sum.data_points {
                let keys: BTreeSet<&str> = point.attributes.iter().map(|a| a.key.as_str()).collect();
                assert_eq!(keys.len(), point.attributes.len(), "{point:?}");
                assert!(seen.insert(format!("{:?}", point.attributes)), "{point:?}");
            }
            assert!(seen.len() >= 4);
        }
    }
}
