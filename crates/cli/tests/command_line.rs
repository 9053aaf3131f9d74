//! The command line's face: help texts as committed in `snapshots/`, and what
//! wrong input is told. `ASHLAR_BLESS=1` writes the snapshots anew.

mod common;

use common::{ashlar, json, said, served_with};
use std::path::Path;

const VERBS: [&str; 18] = [
    "", "up", "trace", "takedown", "serve", "gateway check", "keys", "keys create", "teams", "teams create", "usage", "chat", "bench", "bench engine", "bench serve", "sign", "verify", "doctor",
];

#[test]
fn help_is_as_committed() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let home = tempfile::tempdir().expect("temp dir");
    let mut all = String::new();
    for verb in VERBS {
        let args: Vec<&str> = verb.split_whitespace().chain(["--help"]).collect();
        let out = ashlar(home.path(), &args).env_remove("ASHLAR_HOME").output().expect("runs");
        assert!(out.status.success(), "{}", said(&out));
        all += &format!("$ ashlar {}\n{}\n", args.join(" "), String::from_utf8_lossy(&out.stdout));
    }
    let path = dir.join("help.txt");
    if std::env::var_os("ASHLAR_BLESS").is_some() {
        std::fs::write(&path, &all).expect("write");
    }
    let wanted = std::fs::read_to_string(&path).expect("snapshot");
    assert_eq!(all, wanted, "the help changed; if it should, run this test with ASHLAR_BLESS=1");
}

#[test]
fn wrong_input_is_told_what_is_wrong_and_what_to_do() {
    let home = tempfile::tempdir().expect("temp dir");
    for (args, wanted) in [
        (&["up", "no-such.toml"][..], "no-such.toml"),
        (&["trace", "no-such-thing"], "no-such-thing"),
        (&["takedown", "no-such-document"], "no-such-document"),
        (&["serve", "--model", "no-such-model", "--listen", "127.0.0.1:0"], "no-such-model"),
        (&["serve", "--listen", "0.0.0.0:0"], "--require-keys"),
        (&["keys", "create", "k", "--limit", "tokens/day"], "requests/minute=60"),
        (&["keys", "create", "k", "--team", "nobody"], "no team \"nobody\""),
        (&["keys", "revoke", "nothing"], "`ashlar keys list`"),
        (&["usage", "--from", "2026-02-30"], "no day"),
        (&["serve", "--kv-type", "int4"], "f16, bf16, f32, int8"),
        (&["verify"], "--public-key"),
        (&["sign", "no-such-folder", "--key", "no-such-key"], "no-such"),
        (&["up", "--no-such-option"], "--no-such-option"),
        (&["bench", "engine", "--model", "no-such-model"], "no-such-model"),
        (&["bench", "serve", "--url", "http://192.0.2.1", "--model", "m"], "--allow-remote"),
        (&["bench", "serve", "--url", "http://127.0.0.1:1", "--model", "m", "--rate", "0"], "--rate is 0"),
        (&["bench", "serve", "--url", "http://127.0.0.1:1", "--model", "m", "--output-tokens", "0"], "1..="),
    ] {
        let out = ashlar(home.path(), args).output().expect("runs");
        assert!(!out.status.success(), "{args:?} must fail");
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(text.contains(wanted) && !text.contains("panicked"), "{args:?}: {text}");
        assert!(out.stdout.is_empty(), "{args:?} wrote to stdout: {}", said(&out));
    }
}

#[test]
fn a_gateway_file_is_checked_and_shown_with_its_defaults() {
    let home = tempfile::tempdir().expect("temp dir");
    let file = home.path().join("gateway.toml");
    let path = file.to_str().expect("UTF-8");
    let good = "[backends.a]\nkind = \"llama-server\"\nurl = \"http://127.0.0.1:9/v1\"\n\
                [models.m]\npolicy = \"latency\"\ntargets = [{ backend = \"a\" }]\n";
    std::fs::write(&file, good).expect("write");
    let shown = json(&mut ashlar(home.path(), &["gateway", "check", path, "--json"]));
    assert_eq!(shown["backends"]["a"]["breaker_failures"], 5, "{shown}");
    assert_eq!(shown["models"]["m"]["retries"], 2, "{shown}");
    // What is printed without --json can be used as a file.
    let out = ashlar(home.path(), &["gateway", "check", path]).output().expect("runs");
    assert!(out.status.success(), "{}", said(&out));
    std::fs::write(&file, &out.stdout).expect("write");
    assert_eq!(json(&mut ashlar(home.path(), &["gateway", "check", path, "--json"])), shown);
    for (wrong, wanted) in [
        (good.replace("polcy", "x").replace("policy", "polcy"), "line 5: unknown key \"polcy\", did you mean \"policy\"?"),
        (good.replace("kind =", "api_key_env = \"NO_SUCH_VARIABLE\"\nkind ="), "NO_SUCH_VARIABLE is not set"),
        (good.replace("http:", "gopher:"), "not an http or https address"),
    ] {
        std::fs::write(&file, wrong).expect("write");
        for args in [&["gateway", "check", path][..], &["serve", "--config", path, "--listen", "127.0.0.1:0"]] {
            let out = ashlar(home.path(), args).output().expect("runs");
            assert!(!out.status.success() && said(&out).contains(wanted), "{args:?}: {}", said(&out));
        }
    }
}

#[test]
fn a_key_is_made_used_and_revoked() {
    let home = tempfile::tempdir().expect("temp dir");
    let run = |args: &[&str]| json(ashlar(home.path(), args).arg("--json"));
    run(&["teams", "create", "ops", "--limit", "USD/month=50"]);
    let made = run(&["keys", "create", "docs", "--team", "ops", "--model", "m*", "--limit", "requests/minute=60", "--tag", "cost=7", "--console"]);
    let secret = made["secret"].as_str().expect("secret");
    let file = home.path().join("gateway.toml");
    let toml = "[backends.a]\nkind = \"vllm\"\nurl = \"http://127.0.0.1:9/v1\"\nprobe = \"\"\n\
                [models.m]\nretries = 0\ntargets = [{ backend = \"a\" }]\n[accounts]\nprices = \"PRICES\"\n";
    let prices = home.path().join("prices.toml");
    std::fs::write(&prices, "version = \"1\"\ncurrency = \"USD\"\n[[price]]\nmodel = \"m\"\ninput = \"1\"\noutput = \"2\"\n").expect("write");
    std::fs::write(&file, toml.replace("PRICES", prices.to_str().expect("UTF-8"))).expect("write");
    let args = ["--config", file.to_str().expect("UTF-8"), "--require-keys"];
    let (server, url, _) = served_with(home.path(), &args);
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let ask = |secret: &str| {
        let request = agent.post(format!("{url}/v1/chat/completions")).header("authorization", format!("Bearer {secret}"));
        request.send_json(serde_json::json!({"model": "m", "messages": []})).expect("an answer").status().as_u16()
    };
    // Nobody listens on port 9: a good key gets as far as that.
    assert_eq!((ask("wrong"), ask(secret)), (401, 502));
    let standing = run(&["keys", "show", "docs"])["standing"].clone();
    assert_eq!(standing.as_array().expect("limits").len(), 2, "the key's and the team's: {standing}");
    run(&["keys", "revoke", "docs"]);
    let began = std::time::Instant::now();
    while ask(secret) != 401 {
        assert!(began.elapsed() < std::time::Duration::from_secs(10), "a revocation is seen within its time");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    drop(server);
    assert_eq!(run(&["keys", "list"])["keys"][0]["console"], true);
    let usage = run(&["usage", "--by", "team,finish"])["usage"].clone();
    let error = usage.as_array().expect("sums").iter().find(|s| s["of"][1] == "error").cloned().expect("the request that failed");
    assert!(error["requests"].as_u64() >= Some(1) && error["estimated"] == error["requests"], "{usage}");
    let csv = home.path().join("focus.csv");
    let rows = run(&["usage", "--export", csv.to_str().expect("UTF-8")])["rows"].as_u64().expect("count");
    let text = std::fs::read_to_string(&csv).expect("the export");
    assert!(rows >= 1 && text.starts_with("BilledCost,") && text.lines().count() as u64 > rows, "{text}");
}

#[test]
fn doctor_says_what_runs_here() {
    let home = tempfile::tempdir().expect("temp dir");
    let report = json(&mut ashlar(home.path(), &["doctor", "--json"]));
    assert_eq!(report["can_run"]["serve"], true);
    assert!(report["cores"].as_u64().expect("count") > 0);
    assert!(report["home_free_bytes"].as_u64().expect("bytes") > 0);
}

#[test]
fn a_forced_tier_that_is_not_there_is_refused() {
    let home = tempfile::tempdir().expect("temp dir");
    let out = ashlar(home.path(), &["doctor"]).env("ASHLAR_ISA", "avx1024").output().expect("runs");
    assert!(!out.status.success(), "{}", said(&out));
    assert!(said(&out).contains("ASHLAR_ISA is avx1024; this machine has reference"), "{}", said(&out));
}
