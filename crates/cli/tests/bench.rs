//! `ashlar bench`: which figures there are and that they count what they say.
//! How fast anything is, is no test's business: see `benches/README.md`.

mod common;

use common::{ashlar, json, peer, said, served};
use serde_json::Value;

#[test]
fn engine_gives_one_object_a_test() {
    let Some(model) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let home = tempfile::tempdir().expect("temp dir");
    let mut command = ashlar(home.path(), &["bench", "engine", "--json", "--threads", "1", "--repeat", "2"]);
    command.args(["--prompt", "5,9", "--generate", "3", "--batch", "1,2", "--model"]).arg(&model);
    let out = command.output().expect("starts");
    assert!(out.status.success(), "{}", said(&out));
    let text = String::from_utf8_lossy(&out.stdout);
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
    let shape = |v: &Value| ["n_batch_sequences", "n_depth", "n_prompt", "n_gen"].map(|k| v[k].as_u64().expect("count"));
    let wanted = [
        [1, 0, 5, 0], [1, 0, 9, 0], [1, 0, 0, 3],
        [2, 0, 5, 0], [2, 5, 0, 3], [2, 0, 9, 0], [2, 9, 0, 3],
    ];
    assert_eq!(lines.iter().map(shape).collect::<Vec<_>>(), wanted);
    for v in &lines {
        for key in ["avg_ts", "median_ts", "start_ms", "peak_rss_bytes", "read_gb_per_s", "bits_per_weight"] {
            assert!(v[key].as_f64().is_some_and(|n| n > 0.0), "{key}: {v}");
        }
        assert!(v["stddev_ts"].as_f64().is_some_and(|n| n >= 0.0), "{v}");
        assert_eq!((v["samples_ts"].as_array().map(Vec::len), v["n_threads"].as_u64()), (Some(2), Some(1)));
        assert_eq!(v["model"].as_str(), model.file_name().and_then(|n| n.to_str()));
        assert!(v["model_type"].as_str().is_some_and(|t| t.contains("Q4_1:")), "{v}");
        assert!(v["isa_tier"].is_string(), "{v}");
        let alone = v["n_batch_sequences"] == 1 && v["n_gen"] == 3;
        assert_eq!(v["weights_gb_per_s"].is_number(), alone, "{v}");
    }
    let mut none = ashlar(home.path(), &["bench", "engine", "--prompt", "0", "--generate", "0", "--model"]);
    let out = none.arg(&model).output().expect("starts");
    assert!(!out.status.success() && said(&out).contains("nothing to measure"), "{}", said(&out));
    let mut long = ashlar(home.path(), &["bench", "engine", "--prompt", "99999", "--generate", "0", "--model"]);
    let out = long.arg(&model).output().expect("starts");
    assert!(!out.status.success() && said(&out).contains("context of 8192"), "{}", said(&out));
}

#[test]
fn serve_loads_our_server_both_ways() {
    let Some(model) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let home = tempfile::tempdir().expect("temp dir");
    let (_running, url, name) = served(home.path(), &model.to_string_lossy());
    let bench = |more: &[&str]| {
        let mut command = ashlar(home.path(), &["bench", "serve", "--json", "--url", &url, "--model", &name]);
        json(command.args(["--requests", "6", "--prompt-tokens", "uniform:3..9", "--output-tokens", "4"]).args(more))
    };
    let closed = bench(&["--clients", "3", "--shared-prefix", "40", "--ban-tokens", "0,2"]);
    assert_eq!((&closed["completed"], &closed["sent"], &closed["clients"]), (&6.into(), &6.into(), &3.into()), "{closed}");
    assert_eq!(closed["errors"], serde_json::json!({}));
    // Lengths as asked: a word is a token, and nothing ended early.
    assert_eq!(closed["total_output_tokens"], 24);
    let prompt = closed["total_prompt_tokens"].as_u64().expect("count");
    assert!((6 * 43..=6 * 49).contains(&prompt), "{closed}");
    assert!(closed["total_cached_tokens"].as_u64().is_some_and(|n| n > 0), "{closed}");
    for key in ["ttft_ms", "itl_ms", "tpot_ms", "e2e_latency_ms"] {
        let at = |q: &str| closed[key][q].as_f64().unwrap_or(-1.0);
        assert!(at("mean") > 0.0 && at("p50") <= at("p90") && at("p90") <= at("p95") && at("p95") <= at("p99"), "{closed}");
    }
    let open = bench(&["--rate", "50", "--seed", "3"]);
    assert_eq!((&open["completed"], &open["rate"], &open["clients"]), (&6.into(), &50.0.into(), &Value::Null), "{open}");
    // Refusals are counted by kind, and none answered is a failure.
    let mut wrong = ashlar(home.path(), &["bench", "serve", "--json", "--requests", "2", "--url", &url, "--model", "nobody"]);
    let out = wrong.output().expect("starts");
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert!(!out.status.success() && report["errors"]["http_404"] == 2, "{}", said(&out));
    assert!(report["first_refusal"].as_str().is_some_and(|t| t.contains("nobody")), "{report}");
}
