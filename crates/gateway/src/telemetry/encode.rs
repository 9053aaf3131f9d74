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
