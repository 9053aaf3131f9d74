use super::*;
use ashlar_api::BackendStats;

fn sample(model: &str) -> Sample<'_> {
    Sample {
        model,
        endpoint: "/v1/chat/completions",
        finish: "stop",
        prompt_tokens: 10,
        cached_tokens: 4,
        completion_tokens: 2,
        queue_s: None,
        ttft_s: Some(0.02),
        total_s: 1.2,
        refusal: false,
        cost: None,
        estimated: false,
    }
}

fn has(page: &str, line: &str) {
    assert!(page.lines().any(|l| l == line), "{line} not in\n{page}");
}

#[test]
fn models_are_told_apart_and_summed_for_the_console() {
    let m = Metrics::new();
    m.settled(&sample("a"));
    m.settled(&Sample { cost: Some((0.5, "EUR")), ..sample("a") });
    m.settled(&Sample { endpoint: "/v1/completions", ..sample("b") });
    m.token_gap("a", "/v1/chat/completions", 0.003);
    m.ended("a", "x", "answered", 0.4);
    let page = m.render(&Gauges::default());
    for line in [
        "ashlar:prompt_tokens_total{model_name=\"a\"} 20",
        "ashlar:prefix_cache_hits_total{model_name=\"b\"} 4",
        "ashlar:cost_total{model_name=\"a\",currency=\"EUR\"} 0.5",
        "ashlar:cost_unknown_total{model_name=\"a\"} 1",
        "ashlar:time_to_first_token_seconds_bucket{model_name=\"a\",endpoint=\"/v1/chat/completions\",le=\"0.01\"} 0",
        "ashlar:time_to_first_token_seconds_bucket{model_name=\"a\",endpoint=\"/v1/chat/completions\",le=\"0.02\"} 2",
        "ashlar:inter_token_latency_seconds_bucket{model_name=\"a\",endpoint=\"/v1/chat/completions\",le=\"0.004\"} 1",
        "ashlar:e2e_request_latency_seconds_count{model_name=\"b\",endpoint=\"/v1/completions\"} 1",
        "ashlar:request_duration_seconds_bucket{model_name=\"a\",backend=\"x\",outcome=\"answered\",le=\"0.5\"} 1",
    ] {
        has(&page, line);
    }
    let sum = |name: &str| {
        let lines = page.lines().filter(|l| l.starts_with(name));
        lines.map(|l| l.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum::<f64>()
    };
    assert_eq!(sum("ashlar:e2e_request_latency_seconds_count"), 3.0);
    assert_eq!(sum("ashlar:inter_token_latency_seconds_sum"), 0.003);
}

#[test]
fn what_backends_count_is_summed() {
    let mut engine = BackendStats { blocks_total: 8, panics: 1, failed: 3, queued_bytes: 5, ..BackendStats::default() };
    engine.iteration_tokens.observe(9);
    let mut sum = engine.clone();
    sum.add(BackendStats { blocks_used: 4, ..engine });
    let page = Metrics::new().render(&Gauges { in_flight: 3, engine: sum, ..Gauges::default() });
    for line in [
        "ashlar:num_responses_in_flight 3",
        "ashlar:kv_cache_usage_perc 0.25",
        "ashlar:engine_panics_total 2",
        "ashlar:engine_failed_total 6",
        "ashlar:queued_bytes 10",
        "ashlar:iteration_tokens_total_bucket{le=\"8\"} 0",
        "ashlar:iteration_tokens_total_bucket{le=\"16\"} 2",
        "ashlar:iteration_tokens_total_sum 18",
    ] {
        has(&page, line);
    }
}

#[test]
fn every_family_is_named_before_it_has_a_point() {
    let families = Metrics::new().collect(&Gauges::default());
    let names: std::collections::BTreeSet<_> = families.iter().map(|f| f.name).collect();
    assert_eq!(names.len(), families.len(), "one family a name");
    for name in BY_MODEL.iter().map(|(n, ..)| *n).chain(["request_rejected_total", "retries_total", "backend_circuit"]) {
        assert!(names.contains(name), "{name}");
    }
}
