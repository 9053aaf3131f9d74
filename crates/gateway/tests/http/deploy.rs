//! What `deploy/` holds, against the tools it is for: Prometheus, Compose, Helm.
//!
//! `ASHLAR_PROMETHEUS_BIN` is a folder with `prometheus` and `promtool`,
//! `ASHLAR_DEPLOY_PYTHON` a Python with `kubernetes-validate` and `yamllint`, and
//! `ASHLAR_HELM` is helm; by default they are looked for in the PATH.

use crate::{
    mock::Mock,
    peers::skip,
    support::{Reply, Server, chat_body},
};
use ashlar_gateway::Config;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    process::Command,
};

fn deploy(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../deploy").join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(deploy(path)).unwrap()
}

fn tool(name: &str) -> PathBuf {
    std::env::var_os("ASHLAR_PROMETHEUS_BIN").map_or_else(|| name.into(), |folder| PathBuf::from(folder).join(name))
}

/// Runs a tool; `None`, and said so, where it is absent.
async fn run(command: &mut Command, what: &str) -> Option<Output> {
    let output = command.output().await;
    if output.is_err() {
        skip(what);
    }
    output.ok()
}

fn shown(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A gateway that has counted something of everything.
async fn busy(mock: &Mock) -> Server {
    let url = mock.url();
    let server = Server::routed(&format!(
        "[backends.a]\nkind = \"vllm\"\nurl = \"{url}\"\nprobe = \"\"\n[backends.b]\nkind = \"vllm\"\nurl = \"{url}\"\nprobe = \"\"\n\
         [models.m]\npolicy = \"ordered\"\nretries = 1\ntargets = [{{ backend = \"a\", model = \"500\" }}, {{ backend = \"b\" }}]\n\
         [models.c]\ntargets = [{{ backend = \"a\" }}, {{ backend = \"b\" }}]\ncanary = {{ backend = \"b\", share = 0.1 }}\n"
    ))
    .await;
    let body = |model: &str| json!({"model": model, "messages": [{"role": "user", "content": "x"}], "stream": true});
    for model in ["m", "c"] {
        assert_eq!(server.post("/v1/chat/completions", &body(model)).await.status, 200);
    }
    assert_eq!(server.post("/v1/chat/completions", &body("none")).await.status, 404);
    for stream in [true, false] {
        server.chat("hello", stream).await;
    }
    assert_eq!(server.post("/v1/chat/completions", &chat_body("die", false)).await.status, 500);
    server
}

/// Every query of the dashboard, with its panel's title, as Grafana would send it.
fn queries() -> Vec<(String, String)> {
    let board: Value = serde_json::from_str(&read("grafana/dashboard.json")).unwrap();
    let mut queries = Vec::new();
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap().replace("$model", ".*").replace("$__rate_interval", "1m");
            queries.push((panel["title"].as_str().unwrap().to_owned(), query));
        }
    }
    assert!(queries.len() > 50, "{}", queries.len());
    queries
}

/// Metrics named in `text`.
fn named(text: &str) -> BTreeSet<String> {
    let names = regex::Regex::new(r"\b(?:ashlar:|process_)[a-z0-9_]+").unwrap();
    names.find_iter(text).map(|m| m.as_str().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dashboard_and_the_alerts_name_metrics_that_exist() {
    let mock = Mock::start().await;
    let server = busy(&mock).await;
    let page = server.get("/metrics").await.body;
    let typed: BTreeSet<(&str, &str)> =
        page.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let all: String = queries().into_iter().map(|(_, q)| q + "\n").collect();
    let mut names = named(&all);
    names.extend(named(&read("prometheus/alerts.yml")));
    names.extend(named(&read("grafana/dashboard.json")));
    for name in &names {
        let histogram = ["_bucket", "_sum", "_count"].iter().filter_map(|end| name.strip_suffix(end));
        let known = typed.iter().any(|(n, kind)| n == name && *kind != "histogram")
            || histogram.into_iter().any(|n| typed.contains(&(n, "histogram")));
        assert!(known, "{name} is not in /metrics");
    }
    // And the other way round: what is counted is shown, or known not to be.
    let unseen = ["ashlar:config_failures_total", "ashlar:tls_certificate_failures_total", "ashlar:kv_cache_blocks_used", "ashlar:guard_verdicts_total", "process_start_time_seconds"];
    for (name, _) in &typed {
        let shown = names.iter().any(|n| n == name || n.strip_prefix(name).is_some_and(|end| matches!(end, "_bucket" | "_sum" | "_count")));
        assert!(shown || unseen.contains(name), "no panel and no alert has {name}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn promtool_has_nothing_against_our_names_but_vllms() {
    let mock = Mock::start().await;
    let server = busy(&mock).await;
    let page = server.get("/metrics").await.body;
    server.stop().await;
    let mut command = Command::new(tool("promtool"));
    let child = command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let Ok(mut child) = child else { return skip("promtool") };
    child.stdin.take().unwrap().write_all(page.as_bytes()).await.unwrap();
    let output = child.wait_with_output().await.unwrap();
    let text = shown(&output);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{text}");
    let mut colons = 0;
    for line in text.lines() {
        // The prefix is vLLM's manner, and so is this one histogram's name.
        let colon = line.starts_with("ashlar:") && line.ends_with("metric names should not contain ':'");
        let total = line.starts_with("ashlar:iteration_tokens_total ") && line.contains("_total");
        assert!(colon || total, "{line}");
        colons += usize::from(colon);
    }
    let typed = page.lines().filter(|l| l.starts_with("# TYPE ashlar:")).count();
    assert!(colons > 40 && colons <= typed, "{colons} of {typed}: was the page read at all?");
}

struct Prometheus {
    _child: tokio::process::Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// One that scrapes `server`; `None`, and said so, where it is absent.
    async fn start(server: &Server) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}\nscrape_configs:\n- job_name: ashlar\n  static_configs: [{{targets: [\"{}\"]}}]\n",
            server.at
        );
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        // Free now, and for as long as no one else looks for one.
        let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let child = Command::new(tool("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        let Ok(child) = child else {
            skip("Prometheus");
            return None;
        };
        let me = Self { _child: child, port, _folder: folder };
        for _ in 0..300 {
            let scraped = me.query("count_over_time(up[1m])").await.ok().and_then(|r| r[0]["value"][1].as_str()?.parse::<f64>().ok());
            if scraped.is_some_and(|n| n >= 5.0) {
                return Some(me);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("Prometheus has not scraped after 30 s");
    }

    /// The result of an instant query.
    async fn query(&self, query: &str) -> Result<Value, String> {
        let text = |e: std::io::Error| e.to_string();
        let query: String = query.bytes().map(|b| format!("%{b:02x}")).collect();
        let mut socket = TcpStream::connect(("127.0.0.1", self.port)).await.map_err(text)?;
        let head = format!("GET /api/v1/query?query={query} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        socket.write_all(head.as_bytes()).await.map_err(text)?;
        let mut bytes = Vec::new();
        socket.read_to_end(&mut bytes).await.map_err(text)?;
        let reply = Reply::parse(&bytes);
        if reply.status != 200 {
            return Err(reply.body);
        }
        Ok(reply.json()["data"]["result"].clone())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_answers_every_query_of_the_dashboard_and_the_alerts() {
    let mock = Mock::start().await;
    let server = busy(&mock).await;
    let Some(prometheus) = Prometheus::start(&server).await else { return };
    for (panel, query) in queries() {
        let result = prometheus.query(&query).await.unwrap_or_else(|e| panic!("{panel}: {query}: {e}"));
        assert!(!result.as_array().unwrap().is_empty(), "{panel}: nothing for {query}");
    }
    let rules: String = read("prometheus/alerts.yml");
    let mut alerts = 0;
    for rule in rules.split("- alert: ").skip(1) {
        let expr = rule.split_once("expr:").unwrap().1;
        let expr = expr.split("\n        for:").next().unwrap().split("\n        labels:").next().unwrap();
        let expr = expr.trim().trim_start_matches('|');
        prometheus.query(expr).await.unwrap_or_else(|e| panic!("{expr}: {e}"));
        alerts += 1;
    }
    assert!(alerts >= 15, "{alerts}");
    // Figures come through as they were counted.
    let count = prometheus.query("sum(ashlar:request_duration_seconds_count{outcome=\"answered\"})").await.unwrap();
    assert_eq!(count[0]["value"][1], "4");
    let count = prometheus.query("ashlar:retries_total{kind=\"retry\"}").await.unwrap();
    assert_eq!(count[0]["value"][1], "1");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_takes_our_configuration_and_its_alerts_fire() {
    for args in [["check", "config", "prometheus.yml"], ["check", "rules", "alerts.yml"], ["test", "rules", "alerts.test.yml"]] {
        let mut command = Command::new(tool("promtool"));
        let Some(output) = run(command.args(args).current_dir(deploy("prometheus")), "promtool").await else { return };
        assert!(output.status.success(), "{args:?}: {}", shown(&output));
    }
}

/// The gateway's file in one of ours.
fn config(text: &str) -> Config {
    Config::parse(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn compose_takes_our_file_and_the_gateway_its_own() {
    let config = config(&read("gateway.toml"));
    assert!(config.accounts.require_keys, "its command listens on every address");
    let wait = config.server.drain_s.unwrap() + config.server.grace_s.unwrap();
    let compose = read("compose.yaml");
    let given = regex::Regex::new(r"stop_grace_period: (\d+)s").unwrap().captures(&compose).unwrap()[1].parse::<f64>().unwrap();
    assert!(given > wait, "killed after {given} s, while it may take {wait} s");
    let mut command = Command::new("docker-compose");
    command.args(["-f", "compose.yaml", "config", "--quiet"]).current_dir(deploy("")).env("POSTGRES_PASSWORD", "x");
    let Some(output) = run(&mut command, "docker-compose").await else { return };
    assert!(output.status.success(), "{}", shown(&output));
    let output = command.env_remove("POSTGRES_PASSWORD").output().await.unwrap();
    assert!(!output.status.success() && shown(&output).contains("choose one"), "a password is asked for: {}", shown(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_and_our_yaml_are_linted() {
    let python = std::env::var("ASHLAR_DEPLOY_PYTHON").unwrap_or_else(|_| "python3".into());
    let rules = "{extends: default, rules: {line-length: disable, document-start: disable, braces: {max-spaces-inside: 1}, comments: {min-spaces-from-content: 1}}}";
    let mut lint = Command::new(&python);
    lint.args(["-m", "yamllint", "--strict", "-d", rules, "compose.yaml", "prometheus", "grafana/provisioning"]);
    lint.args(["helm/ashlar-gateway/values.yaml", "helm/ashlar-gateway/Chart.yaml"]);
    let Some(output) = run(lint.current_dir(deploy("")), "Python").await else { return };
    if shown(&output).contains("No module named") {
        return skip("yamllint");
    }
    assert!(output.status.success(), "{}", shown(&output));
    let hadolint = PathBuf::from(python).with_file_name("hadolint");
    let Some(output) = run(Command::new(hadolint).arg("Dockerfile").current_dir(deploy("")), "hadolint").await else { return };
    assert!(output.status.success(), "{}", shown(&output));
}

/// The chart with `--set` of each of `values`.
async fn helm(args: &[&str], values: &[&str]) -> Option<Output> {
    let mut command = Command::new(std::env::var("ASHLAR_HELM").unwrap_or_else(|_| "helm".into()));
    command.args(args).arg(deploy("helm/ashlar-gateway"));
    for value in values {
        command.args(["--set", value]);
    }
    run(&mut command, "helm").await
}

const EVERYTHING: &[&str] = &[
    "database.url=postgres://a:b@c/d",
    "autoscaling.enabled=true",
    "serviceMonitor.enabled=true",
    "prometheusRule.enabled=true",
    "tls.secret=t",
    "env[0].name=KEY,env[0].value=x",
];

#[tokio::test(flavor = "multi_thread")]
async fn helm_renders_what_kubernetes_takes() {
    let Some(output) = helm(&["lint", "--strict"], EVERYTHING).await else { return };
    assert!(output.status.success(), "{}", shown(&output));
    let wrong = helm(&["template"], &["replicas=0"]).await.unwrap();
    assert!(!wrong.status.success() && shown(&wrong).contains("replicas"), "{}", shown(&wrong));
    let typo = helm(&["template"], &["replica=3"]).await.unwrap();
    assert!(!typo.status.success() && shown(&typo).contains("replica"), "{}", shown(&typo));
    let folder = tempfile::tempdir().unwrap();
    let python = std::env::var("ASHLAR_DEPLOY_PYTHON").unwrap_or_else(|_| "python3".into());
    let plain: &[&str] = &["persistence.enabled=false", "database.existingSecret=s", "networkPolicy.enabled=false"];
    let seconds = regex::Regex::new(r"terminationGracePeriodSeconds: (\d+)").unwrap();
    for (values, kinds) in [
        (EVERYTHING, &["StatefulSet", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "ServiceMonitor", "PrometheusRule", "Secret"][..]),
        (plain, &["Deployment", "Service", "ConfigMap", "ServiceAccount"][..]),
    ] {
        let output = helm(&["template", "r"], values).await.unwrap();
        assert!(output.status.success(), "{}", shown(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        for kind in kinds {
            assert!(text.contains(&format!("\nkind: {kind}\n")), "no {kind}");
        }
        // The file inside is one the gateway takes.
        let (_, toml) = text.split_once("gateway.toml: |\n").unwrap();
        let toml: String = toml.lines().take_while(|l| l.is_empty() || l.starts_with("    ")).map(|l| format!("{}\n", l.trim())).collect();
        let config = config(&toml);
        assert!(config.accounts.require_keys, "its command listens on every address");
        assert_eq!(config.server.tls_cert.is_some(), values.contains(&"tls.secret=t"), "{toml}");
        let given = seconds.captures(&text).unwrap()[1].parse::<f64>().unwrap();
        assert!(given > config.server.drain_s.unwrap() + config.server.grace_s.unwrap());
        let file = folder.path().join("all.yaml");
        std::fs::write(&file, &text).unwrap();
        let mut validate = Command::new(PathBuf::from(&python).with_file_name("kubernetes-validate"));
        let Some(output) = run(validate.arg("--strict").arg(&file), "kubernetes-validate").await else { return };
        assert!(output.status.success() && shown(&output).contains("passed"), "{}", shown(&output));
    }
}

/// As `gateway_bench soak 200000`, with fewer.
#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_flat() {
    let bench = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/gateway_bench");
    let Some(output) = run(Command::new(bench).args(["soak", "10000"]), "the built bench").await else { return };
    assert!(output.status.success(), "{}", shown(&output));
}
