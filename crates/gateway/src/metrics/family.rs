//! Metrics as they leave the process: families of points, and the Prometheus
//! text format (version 0.0.4) of them. `telemetry::otlp` is the other format.

use super::histogram::Buckets;
use std::fmt::Write as _;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Number(f64),
    Buckets(Buckets),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Point {
    pub(crate) labels: Vec<(&'static str, String)>,
    pub(crate) value: Value,
}

/// All points of one name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Family {
    /// Without prefix; `process_…` has none.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) help: &'static str,
    pub(crate) points: Vec<Point>,
}

/// Families in the making.
#[derive(Debug, Default)]
pub(crate) struct Families(pub(crate) Vec<Family>);

impl Families {
    fn family(&mut self, name: &'static str, kind: Kind, help: &'static str) -> &mut Family {
        let at = self.0.iter().position(|f| f.name == name).unwrap_or_else(|| {
            self.0.push(Family { name, kind, help, points: Vec::new() });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// A family with its points; without any, its name is known all the same.
    pub(crate) fn add<'a>(
        &mut self,
        name: &'static str,
        kind: Kind,
        help: &'static str,
        points: impl IntoIterator<Item = (Vec<(&'static str, &'a str)>, Value)>,
    ) {
        let family = self.family(name, kind, help);
        family.points.extend(points.into_iter().map(|(labels, value)| Point {
            labels: labels.into_iter().map(|(k, v)| (k, v.to_owned())).collect(),
            value,
        }));
    }

    /// A number without labels.
    pub(crate) fn number(&mut self, name: &'static str, kind: Kind, help: &'static str, value: f64) {
        self.add(name, kind, help, [(Vec::new(), Value::Number(value))]);
    }
}

/// The name under which Prometheus sees a family: vLLM's with our prefix.
pub(crate) fn exposed(name: &str) -> String {
    if name.starts_with("process_") { name.to_owned() } else { format!("ashlar:{name}") }
}

/// The page of `/metrics`.
pub(crate) fn text(families: &[Family]) -> String {
    let mut out = String::with_capacity(32 << 10);
    // Writing to a String cannot fail.
    for family in families {
        let name = exposed(family.name);
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(out, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
        for point in &family.points {
            let labels = labels(&point.labels);
            match &point.value {
                Value::Number(n) => line(&mut out, &name, "", &labels, None, *n),
                Value::Buckets(b) => {
                    let mut seen = 0;
                    for (bound, count) in b.bounds.iter().zip(&b.counts) {
                        seen += count;
                        line(&mut out, &name, "_bucket", &labels, Some(&bound.to_string()), seen as f64);
                    }
                    let total = b.count() as f64;
                    line(&mut out, &name, "_bucket", &labels, Some("+Inf"), total);
                    line(&mut out, &name, "_sum", &labels, None, b.sum);
                    line(&mut out, &name, "_count", &labels, None, total);
                }
            }
        }
    }
    out
}

/// `a="…",b="…"`, escaped.
fn labels(labels: &[(&'static str, String)]) -> String {
    let mut out = String::new();
    for (k, v) in labels {
        if !out.is_empty() {
            out.push(',');
        }
        let _ = write!(out, "{k}=\"");
        for c in v.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out
}

fn line(out: &mut String, name: &str, suffix: &str, labels: &str, le: Option<&str>, value: f64) {
    let _ = write!(out, "{name}{suffix}");
    match (labels, le) {
        ("", None) => {}
        ("", Some(le)) => drop(write!(out, "{{le=\"{le}\"}}")),
        (labels, None) => drop(write!(out, "{{{labels}}}")),
        (labels, Some(le)) => drop(write!(out, "{{{labels},le=\"{le}\"}}")),
    }
    let _ = writeln!(out, " {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_buckets_that_add_up_and_escaped_labels() {
        let mut f = Families::default();
        let buckets = Buckets { bounds: vec![0.5, 1.0], counts: vec![2, 0, 3], sum: 7.5 };
        f.add("x_seconds", Kind::Histogram, "X.", [(vec![("m", "q\"b\\s\nn")], Value::Buckets(buckets))]);
        f.number("n", Kind::Gauge, "N.", 0.25);
        f.number("process_x", Kind::Counter, "P.", 1.0);
        let m = "m=\"q\\\"b\\\\s\\nn\"";
        let want = format!(
            "# HELP ashlar:x_seconds X.\n# TYPE ashlar:x_seconds histogram\n\
             ashlar:x_seconds_bucket{{{m},le=\"0.5\"}} 2\nashlar:x_seconds_bucket{{{m},le=\"1\"}} 2\n\
             ashlar:x_seconds_bucket{{{m},le=\"+Inf\"}} 5\nashlar:x_seconds_sum{{{m}}} 7.5\nashlar:x_seconds_count{{{m}}} 5\n\
             # HELP ashlar:n N.\n# TYPE ashlar:n gauge\nashlar:n 0.25\n\
             # HELP process_x P.\n# TYPE process_x counter\nprocess_x 1\n"
        );
        assert_eq!(text(&f.0), want);
    }
}
