//! The Grafana dashboard in `deploy/`, written from the list below: a panel is a
//! title, a unit and its queries. `cargo xtask dashboard` writes it; a test fails
//! while the file is another.
//!
//! Queries name metrics of `/metrics` alone; the gateway's tests ask a Prometheus
//! each of them.

use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;

/// Columns of Grafana's grid.
const WIDTH: u32 = 24;
/// Columns and rows of a panel.
const PANEL: (u32, u32) = (8, 8);

struct Panel {
    title: &'static str,
    unit: &'static str,
    about: &'static str,
    /// Query and legend.
    queries: &'static [(&'static str, &'static str)],
}

/// Rows with their panels.
const ROWS: &[(&str, &[Panel])] = &[
    ("Requests", &[
        Panel {
            title: "Requests by outcome", unit: "reqps", about: "",
            queries: &[(r#"sum by (outcome) (rate(ashlar:request_duration_seconds_count{model_name=~"$model"}[$__rate_interval]))"#, "{{outcome}}")],
        },
        Panel {
            title: "Failed share", unit: "percentunit", about: "Of admitted requests. The alerts burn a budget of 0.5 %.",
            queries: &[(
                r#"sum(rate(ashlar:request_duration_seconds_count{model_name=~"$model",outcome="failed"}[$__rate_interval])) / sum(rate(ashlar:request_duration_seconds_count{model_name=~"$model"}[$__rate_interval]))"#,
                "failed",
            )],
        },
        Panel {
            title: "In flight", unit: "short", about: "",
            queries: &[
                ("sum by (instance) (ashlar:num_responses_in_flight)", "{{instance}}"),
                ("sum by (backend) (ashlar:backend_requests_in_flight)", "at {{backend}}"),
            ],
        },
        Panel {
            title: "Turned away", unit: "reqps", about: "Before a response was admitted, by status.",
            queries: &[("sum by (status) (rate(ashlar:request_rejected_total[$__rate_interval]))", "{{status}}")],
        },
        Panel {
            title: "Ends", unit: "reqps", about: "",
            queries: &[(r#"sum by (finished_reason) (rate(ashlar:request_success_total{model_name=~"$model"}[$__rate_interval]))"#, "{{finished_reason}}")],
        },
        Panel {
            title: "Refusals", unit: "percentunit", about: "Share of answers that refuse.",
            queries: &[(
                r#"sum by (model_name) (rate(ashlar:refusals_total{model_name=~"$model"}[$__rate_interval])) / sum by (model_name) (rate(ashlar:request_success_total{model_name=~"$model"}[$__rate_interval]))"#,
                "{{model_name}}",
            )],
        },
        Panel {
            title: "Guard", unit: "reqps", about: "What its policies did, and what it refused because of who asked.",
            queries: &[
                ("sum by (policy, action) (rate(ashlar:guard_verdicts_total[$__rate_interval])) or vector(0)", "{{policy}} {{action}}"),
                ("sum(rate(ashlar:guard_judge_failures_total[$__rate_interval]))", "judges that failed"),
                ("sum(rate(ashlar:moderations_total[$__rate_interval]))", "texts judged when asked"),
                ("sum(rate(ashlar:abuse_refusals_total[$__rate_interval]))", "end users refused"),
            ],
        },
    ]),
    ("Latency, from the first byte of the request", &[
        Panel {
            title: "Time to first token", unit: "s", about: "",
            queries: &[
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:time_to_first_token_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p50"),
                (r#"histogram_quantile(0.95, sum by (le) (rate(ashlar:time_to_first_token_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p95"),
                (r#"histogram_quantile(0.99, sum by (le) (rate(ashlar:time_to_first_token_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p99"),
            ],
        },
        Panel {
            title: "Between tokens", unit: "s", about: "",
            queries: &[
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:inter_token_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p50"),
                (r#"histogram_quantile(0.99, sum by (le) (rate(ashlar:inter_token_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p99"),
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:request_time_per_output_token_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "mean of a response, p50"),
            ],
        },
        Panel {
            title: "Whole requests", unit: "s", about: "",
            queries: &[
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:e2e_request_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p50"),
                (r#"histogram_quantile(0.99, sum by (le) (rate(ashlar:e2e_request_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "p99"),
            ],
        },
        Panel {
            title: "By backend", unit: "s", about: "Whole requests, p95.",
            queries: &[(
                r#"histogram_quantile(0.95, sum by (le, backend) (rate(ashlar:request_duration_seconds_bucket{model_name=~"$model",outcome="answered"}[$__rate_interval])))"#,
                "{{backend}}",
            )],
        },
        Panel {
            title: "What the gateway adds", unit: "s", about: "Of the time to the first token, what was neither reading the request nor the attempt that answered.",
            queries: &[
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:added_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "added p50"),
                (r#"histogram_quantile(0.99, sum by (le) (rate(ashlar:added_latency_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "added p99"),
                (r#"histogram_quantile(0.99, sum by (le) (rate(ashlar:request_read_time_seconds_bucket{model_name=~"$model"}[$__rate_interval])))"#, "reading p99"),
            ],
        },
        Panel {
            title: "Phases in engines of this process", unit: "s", about: "Mean.",
            queries: &[
                ("sum(rate(ashlar:request_queue_time_seconds_sum[$__rate_interval])) / sum(rate(ashlar:request_queue_time_seconds_count[$__rate_interval]))", "queue"),
                ("sum(rate(ashlar:request_prefill_time_seconds_sum[$__rate_interval])) / sum(rate(ashlar:request_prefill_time_seconds_count[$__rate_interval]))", "prefill"),
                ("sum(rate(ashlar:request_decode_time_seconds_sum[$__rate_interval])) / sum(rate(ashlar:request_decode_time_seconds_count[$__rate_interval]))", "decode"),
                ("sum(rate(ashlar:request_inference_time_seconds_sum[$__rate_interval])) / sum(rate(ashlar:request_inference_time_seconds_count[$__rate_interval]))", "both"),
            ],
        },
    ]),
    ("Tokens and cost", &[
        Panel {
            title: "Tokens", unit: "short", about: "A second.",
            queries: &[
                (r#"sum(rate(ashlar:prompt_tokens_total{model_name=~"$model"}[$__rate_interval]))"#, "prompt"),
                (r#"sum(rate(ashlar:generation_tokens_total{model_name=~"$model"}[$__rate_interval]))"#, "generated"),
            ],
        },
        Panel {
            title: "Lengths", unit: "short", about: "Tokens.",
            queries: &[
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:request_prompt_tokens_bucket{model_name=~"$model"}[$__rate_interval])))"#, "prompt p50"),
                (r#"histogram_quantile(0.95, sum by (le) (rate(ashlar:request_prompt_tokens_bucket{model_name=~"$model"}[$__rate_interval])))"#, "prompt p95"),
                (r#"histogram_quantile(0.5, sum by (le) (rate(ashlar:request_generation_tokens_bucket{model_name=~"$model"}[$__rate_interval])))"#, "answer p50"),
                (r#"histogram_quantile(0.95, sum by (le) (rate(ashlar:request_generation_tokens_bucket{model_name=~"$model"}[$__rate_interval])))"#, "answer p95"),
            ],
        },
        Panel {
            title: "Prefix cache hits", unit: "percentunit", about: "Share of prompt tokens.",
            queries: &[(
                r#"sum by (model_name) (rate(ashlar:prefix_cache_hits_total{model_name=~"$model"}[$__rate_interval])) / sum by (model_name) (rate(ashlar:prefix_cache_queries_total{model_name=~"$model"}[$__rate_interval]))"#,
                "{{model_name}}",
            )],
        },
        Panel {
            title: "Cost an hour", unit: "short", about: "By the price list.",
            queries: &[(r#"3600 * sum by (model_name, currency) (rate(ashlar:cost_total{model_name=~"$model"}[$__rate_interval]))"#, "{{model_name}} {{currency}}")],
        },
        Panel {
            title: "Bills that are not exact", unit: "reqps", about: "Responses without a price, or whose tokens no one counted.",
            queries: &[
                (r#"sum(rate(ashlar:cost_unknown_total{model_name=~"$model"}[$__rate_interval]))"#, "no price"),
                (r#"sum(rate(ashlar:usage_estimated_total{model_name=~"$model"}[$__rate_interval]))"#, "guessed"),
            ],
        },
        Panel {
            title: "Ledger errors", unit: "short", about: "Must be zero.",
            queries: &[("sum by (instance) (increase(ashlar:ledger_errors_total[$__rate_interval]))", "{{instance}}")],
        },
    ]),
    ("Backends", &[
        Panel {
            title: "May be asked", unit: "short", about: "1 yes, 0 no.",
            queries: &[("min by (backend) (ashlar:backend_available)", "{{backend}}")],
        },
        Panel {
            title: "Circuits", unit: "short", about: "0 closed, 1 half open, 2 open.",
            queries: &[
                ("max by (backend) (ashlar:backend_circuit)", "{{backend}}"),
                ("sum by (backend) (increase(ashlar:backend_circuit_opened_total[$__rate_interval]))", "{{backend}} opened"),
            ],
        },
        Panel {
            title: "Failed attempts", unit: "reqps", about: "",
            queries: &[("sum by (backend, error) (rate(ashlar:backend_attempt_errors_total[$__rate_interval]))", "{{backend}}: {{error}}")],
        },
        Panel {
            title: "Retries and hedges", unit: "reqps", about: "`budget` were forbidden by it.",
            queries: &[("sum by (kind) (rate(ashlar:retries_total[$__rate_interval]))", "{{kind}}")],
        },
        Panel {
            title: "Requests sent", unit: "reqps", about: "",
            queries: &[
                ("sum by (backend) (rate(ashlar:backend_requests_total[$__rate_interval]))", "{{backend}}"),
                ("sum by (backend) (rate(ashlar:backend_errors_total[$__rate_interval]))", "{{backend}} failed"),
            ],
        },
        Panel {
            title: "Canaries taken back", unit: "short", about: "",
            queries: &[("max by (model_name) (ashlar:canary_rolled_back)", "{{model_name}}")],
        },
    ]),
    ("Engines of this process", &[
        Panel {
            title: "Sequences", unit: "short", about: "",
            queries: &[
                ("sum(ashlar:num_requests_running)", "running"),
                ("sum(ashlar:num_requests_waiting)", "waiting"),
                ("sum(rate(ashlar:num_preemptions_total[$__rate_interval]))", "preempted a second"),
                ("sum(rate(ashlar:prefix_waits_total[$__rate_interval]))", "waited for a prefix a second"),
            ],
        },
        Panel {
            title: "KV cache", unit: "percentunit", about: "",
            queries: &[
                ("ashlar:kv_cache_usage_perc", "{{instance}} in use"),
                ("ashlar:kv_cache_blocks_cached / ashlar:kv_cache_blocks", "{{instance}} kept for prefixes"),
            ],
        },
        Panel {
            title: "Forward passes", unit: "short", about: "",
            queries: &[
                ("sum(rate(ashlar:engine_steps_total[$__rate_interval]))", "a second"),
                ("sum(rate(ashlar:iteration_tokens_total_sum[$__rate_interval])) / sum(rate(ashlar:iteration_tokens_total_count[$__rate_interval]))", "tokens each"),
            ],
        },
        Panel {
            title: "Failures", unit: "short", about: "",
            queries: &[
                ("sum(increase(ashlar:engine_failed_total[$__rate_interval]))", "failed"),
                ("sum(increase(ashlar:engine_panics_total[$__rate_interval]))", "panics"),
                ("sum(increase(ashlar:engine_cancelled_total[$__rate_interval]))", "cancelled"),
            ],
        },
        Panel { title: "Queued bytes", unit: "bytes", about: "", queries: &[("sum(ashlar:queued_bytes)", "waiting")] },
    ]),
    ("Process", &[
        Panel { title: "Memory", unit: "bytes", about: "", queries: &[("process_resident_memory_bytes{job=\"ashlar\"}", "{{instance}}")] },
        Panel {
            title: "Connections", unit: "short", about: "",
            queries: &[
                ("ashlar:connections", "{{instance}}"),
                ("sum(rate(ashlar:connections_accepted_total[$__rate_interval]))", "accepted a second"),
                ("sum(rate(ashlar:tls_handshakes_failed_total[$__rate_interval]))", "TLS failed a second"),
            ],
        },
        Panel {
            title: "Configuration", unit: "short", about: "",
            queries: &[
                ("ashlar:config_valid", "{{instance}} valid"),
                ("ashlar:draining", "{{instance}} draining"),
                ("increase(ashlar:config_reloads_total[$__rate_interval])", "{{instance}} reloads"),
                ("increase(ashlar:tls_certificate_reloads_total[$__rate_interval])", "{{instance}} certificates"),
            ],
        },
        Panel {
            title: "Telemetry", unit: "short", about: "Spans a second.",
            queries: &[
                ("sum(rate(ashlar:telemetry_spans_sent_total[$__rate_interval]))", "sent"),
                ("sum(rate(ashlar:telemetry_spans_dropped_total[$__rate_interval]))", "dropped"),
                ("sum(rate(ashlar:telemetry_exports_failed_total[$__rate_interval]))", "failed exports"),
            ],
        },
        Panel { title: "Versions", unit: "short", about: "", queries: &[("count by (version) (ashlar:build_info)", "{{version}}")] },
    ]),
];

const SOURCE: &str = "${datasource}";

fn source() -> Value {
    json!({"type": "prometheus", "uid": SOURCE})
}

/// The dashboard, as Grafana imports it.
fn dashboard() -> Value {
    let (mut panels, mut y, mut id) = (Vec::new(), 0, 0);
    let mut next = || {
        id += 1;
        id
    };
    for (title, row) in ROWS {
        panels.push(json!({
            "id": next(), "type": "row", "title": title, "collapsed": false, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
        }));
        y += 1;
        for (i, panel) in (0u32..).zip(row.iter()) {
            let (w, h) = PANEL;
            let (column, line) = (i % (WIDTH / w), i / (WIDTH / w));
            let targets = panel.queries.iter().zip('A'..).map(|((expr, legend), letter)| {
                json!({"refId": letter.to_string(), "expr": expr, "legendFormat": legend, "datasource": source()})
            });
            panels.push(json!({
                "id": next(), "type": "timeseries", "title": panel.title, "description": panel.about,
                "datasource": source(), "gridPos": {"x": column * w, "y": y + line * h, "w": w, "h": h},
                "targets": targets.collect::<Vec<_>>(),
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
            }));
        }
        let lines = u32::try_from(row.len()).unwrap_or(0).div_ceil(WIDTH / PANEL.0);
        y += lines * PANEL.1;
    }
    json!({
        "uid": "ashlar-gateway", "title": "Ashlar gateway", "tags": ["ashlar", "llm"], "schemaVersion": 39, "version": 1,
        "editable": true, "graphTooltip": 1, "refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "timezone": "",
        "annotations": {"list": []}, "links": [],
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "hide": 0},
            {
                "name": "model", "type": "query", "label": "Model", "datasource": source(), "refresh": 2, "sort": 1,
                "query": "label_values(ashlar:request_success_total, model_name)",
                "definition": "label_values(ashlar:request_success_total, model_name)",
                "multi": true, "includeAll": true, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
            },
        ]},
        "panels": panels,
    })
}

fn text() -> Result<String> {
    Ok(serde_json::to_string_pretty(&dashboard())? + "\n")
}

const PATH: &str = "deploy/grafana/dashboard.json";

/// Writes the file.
pub(crate) fn write(root: &Path) -> Result<()> {
    Ok(std::fs::write(root.join(PATH), text()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_what_the_list_says() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let file = std::fs::read_to_string(root.join(PATH)).expect("deploy/ has it");
        assert!(file == text().expect("JSON"), "run `cargo xtask dashboard`");
    }

    #[test]
    fn panels_lie_apart_and_titles_are_told_apart() {
        let board = dashboard();
        let panels = board["panels"].as_array().expect("a list");
        let place = |p: &Value| ["x", "y", "w", "h"].map(|k| p["gridPos"][k].as_u64().expect("a number"));
        for (i, a) in panels.iter().enumerate() {
            let [x, y, w, h] = place(a);
            assert!(x + w <= u64::from(WIDTH));
            for b in &panels[..i] {
                let [x2, y2, w2, h2] = place(b);
                assert!(x + w <= x2 || x2 + w2 <= x || y + h <= y2 || y2 + h2 <= y, "{} over {}", a["title"], b["title"]);
                assert_ne!(a["title"], b["title"]);
            }
        }
    }
}
