//! Times that begin with the first byte, spans as a collector gets them, and a
//! server that is told to stop.
//!
//! The collector is `xtask/peers/otlp.py`, which decodes by OpenTelemetry's own
//! definitions; `ASHLAR_DEPLOY_PYTHON` names a Python that has them.

use crate::{
    mock::Mock,
    peers::{script, skip},
    support::{MODEL, Server, chat_body},
    total, value,
};
use serde_json::{Value, json};
use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Command},
};

const PAUSE: Duration = Duration::from_millis(150);

async fn pause() {
    tokio::time::sleep(PAUSE).await;
}

/// Writes a request with pauses before it, within its head and within its body.
/// Seconds from its first byte to its answer's end.
async fn slowly(socket: &mut TcpStream) -> f64 {
    let body = chat_body("hello", false).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    pause().await;
    let began = Instant::now();
    for part in [&head[..10], &head[10..], &body[..5], &body[5..]] {
        socket.write_all(part.as_bytes()).await.unwrap();
        if part.len() != body.len() - 5 {
            pause().await;
        }
    }
    let mut reply = String::new();
    let whole = |reply: &str| {
        let (head, body) = reply.split_once("\r\n\r\n")?;
        let length: usize = head.lines().find_map(|l| l.strip_prefix("content-length: "))?.parse().ok()?;
        Some(body.len() >= length)
    };
    while whole(&reply) != Some(true) {
        let mut some = [0; 4096];
        let n = socket.read(&mut some).await.unwrap();
        assert!(n > 0, "{reply}");
        reply.push_str(&String::from_utf8_lossy(&some[..n]));
    }
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    began.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread")]
async fn times_begin_with_the_first_byte_of_a_request() {
    let server = Server::start().await;
    let mut socket = TcpStream::connect(server.at).await.unwrap();
    let (mut took, reading) = (0.0, 2.0 * 3.0 * PAUSE.as_secs_f64());
    for _ in 0..2 {
        took += slowly(&mut socket).await;
    }
    let page = server.get("/metrics").await.body;
    for name in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_duration_seconds"] {
        let sum = total(&page, &format!("ashlar:{name}_sum"));
        assert!(sum >= reading, "{name}: {sum} s, of which {reading} were spent on reading");
        assert!(sum <= took, "{name}: {sum} s, but a client that thinks is not counted: {took} s");
    }
    let read = total(&page, "ashlar:request_read_time_seconds_sum");
    assert!(read >= reading && read <= took, "{read}");
    let added = total(&page, "ashlar:added_latency_seconds_sum");
    assert!(added > 0.0 && added <= took - reading, "{added} is not what reading took");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_come_from_the_configuration_alone() {
    let mock = Mock::start().await;
    let server = Server::routed(&routed(&mock, "")).await;
    for i in 0..20 {
        let path = format!("/v1/made-up-{i}");
        let headers = [("content-type", "application/json"), ("traceparent", "x"), ("x-model", "made-up")];
        assert_eq!(server.send("POST", &path, &headers, b"{}").await.status, 404);
        let body = json!({"model": format!("made-up-{i}"), "messages": [], "user": format!("made-up-{i}")});
        assert_eq!(server.post("/v1/chat/completions", &body).await.status, 404);
    }
    let page = server.get("/metrics").await.body;
    assert!(!page.contains("made-up"), "{page}");
    assert_eq!(value(&page, "ashlar:request_rejected_total{status=\"404\"}"), 40.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_says_so_before_it_refuses() {
    let mock = Mock::start().await;
    let server = Server::routed(&(routed(&mock, "") + "[server]\ndrain_s = 1.5\ngrace_s = 8.0\n")).await;
    let at = server.at;
    assert_eq!(server.get("/health").await.status, 200);
    server.tell_to_stop();
    // The mock takes 3 s for it.
    let late = tokio::spawn(async move { raw(at, "slow-head").await });
    let health = loop {
        let reply = server.get("/health").await;
        if reply.status != 200 {
            break reply;
        }
    };
    assert_eq!((health.status, &health.json()["status"]), (503, &json!("draining")));
    assert_eq!(server.get("/livez").await.status, 200, "a server that drains is alive");
    let page = server.get("/metrics").await.body;
    assert_eq!(value(&page, "ashlar:draining"), 1.0);
    // Still answered, on a connection that is given up.
    let reply = raw(at, "m").await;
    assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("connection: close"), "{reply}");
    // One that takes longer than the drain is finished within the grace, when no
    // one is let in any more.
    let late = late.await.unwrap();
    assert!(late.starts_with("HTTP/1.1 200") && late.contains("Grüße"), "{late}");
    assert!(TcpStream::connect(at).await.is_err());
    server.stop().await;
}

/// The whole answer of `model`, whoever closes the connection after it.
async fn raw(at: SocketAddr, model: &str) -> String {
    let body = json!({"model": model, "messages": [{"role": "user", "content": "x"}]}).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut socket = TcpStream::connect(at).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut reply = String::new();
    socket.read_to_string(&mut reply).await.unwrap();
    reply
}

/// A gateway before the mock, with more in its file.
fn routed(mock: &Mock, more: &str) -> String {
    let url = mock.url();
    format!(
        "[backends.a]\nkind = \"vllm\"\nurl = \"{url}\"\nprobe = \"\"\n[backends.b]\nkind = \"sglang\"\nurl = \"{url}\"\nprobe = \"\"\n\
         [models.m]\ntargets = [{{ backend = \"a\" }}]\n[models.slow-head]\ntargets = [{{ backend = \"a\" }}]\n\
         [models.two]\npolicy = \"ordered\"\nretries = 1\ntargets = [{{ backend = \"a\", model = \"500\" }}, {{ backend = \"b\" }}]\n{more}"
    )
}

struct Collector {
    _child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    port: u16,
}

impl Collector {
    /// `None`, and said so, without a Python that can decode.
    async fn start(args: &[&str]) -> Option<Self> {
        let python = std::env::var("ASHLAR_DEPLOY_PYTHON").unwrap_or_else(|_| "python3".into());
        let mut child = Command::new(python)
            .arg(script("otlp.py"))
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .ok()?;
        let mut lines = BufReader::new(child.stdout.take()?).lines();
        let Some(port) = lines.next_line().await.ok().flatten().and_then(|l| l.parse().ok()) else {
            skip("a Python with opentelemetry-proto");
            return None;
        };
        Some(Self { _child: child, lines, port })
    }

    fn config(&self, more: &str) -> String {
        format!("[telemetry]\notlp_endpoint = \"http://127.0.0.1:{}\"\ninterval_s = 3600\nheaders = {{ x-tenant = \"t\" }}\n{more}", self.port)
    }

    /// All that came, once the server has stopped.
    async fn seen(mut self) -> Vec<Value> {
        let mut seen = Vec::new();
        while let Ok(Ok(Some(line))) = tokio::time::timeout(Duration::from_millis(500), self.lines.next_line()).await {
            let message: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(message["unknown"], false, "fields the definitions do not have: {line}");
            assert_eq!(message["headers"]["x-tenant"], "t");
            seen.push(message);
        }
        seen
    }
}

fn spans(seen: &[Value]) -> Vec<Value> {
    let requests = seen.iter().filter(|m| m["path"] == "/v1/traces");
    requests
        .flat_map(|m| m["message"]["resourceSpans"].as_array().unwrap())
        .flat_map(|r| r["scopeSpans"][0]["spans"].as_array().unwrap().clone())
        .collect()
}

/// A span's attribute, whatever its type.
fn attribute(span: &Value, key: &str) -> Value {
    let list = span["attributes"].as_array().cloned().unwrap_or_default();
    let found: Vec<Value> = list.into_iter().filter(|kv| kv["key"] == key).map(|kv| kv["value"].clone()).collect();
    assert!(found.len() <= 1, "{key} is given twice: {span}");
    let value = found.first().and_then(|v| v.as_object()?.values().next().cloned());
    value.unwrap_or_default()
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// base64, as protobuf's JSON has bytes, in hex.
fn hex(field: &Value) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(field.as_str().unwrap_or_default()).unwrap();
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_spans_of_the_request_and_of_each_attempt() {
    let Some(collector) = Collector::start(&[]).await else { return };
    let mock = Mock::start().await;
    let server = Server::routed(&routed(&mock, &collector.config(""))).await;
    let secret = "Where is the mason's yard?";
    let body = json!({
        "model": "two", "messages": [{"role": "user", "content": secret}], "stream": true,
        "temperature": 0.5, "max_tokens": 9, "stop": ["x"], "top_p": 1,
    });
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let headers = [("content-type", "application/json"), ("traceparent", &*parent), ("tracestate", "v=1")];
    let reply = server.send("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes()).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let upstream = mock.last();
    let carried = |name: &str| upstream.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
    assert_eq!(carried("tracestate").as_deref(), Some("v=1"));
    let carried = carried("traceparent").unwrap();
    // Unrecorded by its client: nothing of it is sent, and its parent goes on.
    let unsampled = format!("00-{TRACE}-00f067aa0ba902b8-00");
    let headers = [("content-type", "application/json"), ("traceparent", &*unsampled)];
    server.send("POST", "/v1/chat/completions", &headers, body.to_string().as_bytes()).await;
    assert!(mock.last().headers.contains(&("traceparent".into(), unsampled)));
    server.post("/v1/chat/completions", &json!({"model": "none", "messages": []})).await;
    server.post("/v1/chat/completions", &chat_body("refuse", false)).await;
    let page = server.get("/metrics").await.body;
    assert_eq!(value(&page, "ashlar:telemetry_spans_dropped_total"), 0.0);
    server.stop().await;
    let seen = collector.seen().await;
    assert!(!seen.iter().any(|m| m.to_string().contains("mason")), "contents are off");
    let spans = spans(&seen);
    let of = |kind: &str, model: &str| {
        let mine = |s: &&Value| s["kind"] == kind && attribute(s, "gen_ai.request.model") == model;
        spans.iter().filter(mine).cloned().collect::<Vec<Value>>()
    };
    let servers = of("SPAN_KIND_SERVER", "two");
    assert_eq!(servers.len(), 1, "{spans:#?}");
    let root = &servers[0];
    assert_eq!((hex(&root["traceId"]), hex(&root["parentSpanId"])), (TRACE.into(), "00f067aa0ba902b7".into()));
    assert_eq!(root["name"], "chat two");
    for (key, value) in [
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.temperature", json!(0.5)),
        ("gen_ai.request.max_tokens", json!("9")),
        ("gen_ai.response.id", json!(reply.header("x-ashlar-response-id").unwrap())),
        ("gen_ai.usage.input_tokens", json!("9")),
        ("gen_ai.usage.cache_read.input_tokens", json!("5")),
        ("ashlar.backend", json!("b")),
        ("ashlar.outcome", json!("answered")),
        ("http.response.status_code", json!("200")),
    ] {
        assert_eq!(attribute(root, key), value, "{key}: {root:#}");
    }
    assert_eq!(root["events"][0]["name"], "ashlar.first_token");
    let (failed, good) = (&of("SPAN_KIND_CLIENT", "500")[0], &of("SPAN_KIND_CLIENT", "two")[0]);
    for hop in [failed, good] {
        assert_eq!((&hop["traceId"], &hop["parentSpanId"]), (&root["traceId"], &root["spanId"]));
        let time = |span: &Value, key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
        assert!(time(root, "startTimeUnixNano") <= time(hop, "startTimeUnixNano"));
        assert!(time(hop, "startTimeUnixNano") <= time(hop, "endTimeUnixNano"));
        assert!(time(hop, "endTimeUnixNano") <= time(root, "endTimeUnixNano"));
    }
    assert_eq!((&failed["status"]["code"], attribute(failed, "error.type")), (&json!("STATUS_CODE_ERROR"), json!("server_error")));
    assert_eq!(attribute(good, "gen_ai.provider.name"), "sglang");
    assert_eq!(attribute(good, "server.port"), mock.at.port().to_string());
    assert_eq!(carried, format!("00-{TRACE}-{}-01", hex(&good["spanId"])), "the attempt is the upstream's parent");
    let refused = &of("SPAN_KIND_SERVER", MODEL)[0];
    let names: Vec<&str> = refused["events"].as_array().unwrap().iter().filter_map(|e| e["name"].as_str()).collect();
    assert!(names.contains(&"gen_ai.evaluation.result"), "{refused:#}");
    assert!(spans.iter().any(|s| attribute(s, "http.response.status_code") == "404"), "one that was turned away, too");
    // Metrics came with the last flush.
    let metrics = seen.iter().rfind(|m| m["path"] == "/v1/metrics").unwrap();
    let resource = &metrics["message"]["resourceMetrics"][0];
    assert_eq!(attribute(&resource["resource"], "service.name"), "ashlar-gateway");
    let list = resource["scopeMetrics"][0]["metrics"].as_array().unwrap();
    let find = |name: &str| list.iter().filter(|m| m["name"] == name).collect::<Vec<_>>();
    for name in [
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.client.token.usage",
        "ashlar.cost",
        "ashlar.kv_cache_usage_perc",
    ] {
        assert_eq!(find(name).len(), 1, "{name}");
    }
    let usage = &find("gen_ai.client.token.usage")[0]["histogram"];
    assert_eq!(usage["aggregationTemporality"], "AGGREGATION_TEMPORALITY_CUMULATIVE");
    let kinds: std::collections::BTreeSet<String> =
        usage["dataPoints"].as_array().unwrap().iter().map(|p| attribute(p, "gen_ai.token.type").to_string()).collect();
    assert_eq!(kinds.len(), 2, "{kinds:?}");
    for point in usage["dataPoints"].as_array().unwrap() {
        let (counts, bounds) = (point["bucketCounts"].as_array().unwrap(), point["explicitBounds"].as_array().unwrap());
        assert_eq!(counts.len(), bounds.len() + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_are_sent_when_asked_for_and_a_failing_collector_is_asked_again() {
    let Some(collector) = Collector::start(&["--fail", "1"]).await else { return };
    let server = Server::routed(&collector.config("contents = true\nmetrics = false\n")).await;
    assert_eq!(server.chat("good morning", false).await.status, 200);
    server.stop().await;
    let spans = spans(&collector.seen().await);
    let server = spans.iter().find(|s| s["kind"] == "SPAN_KIND_SERVER").unwrap();
    let read = |key: &str| serde_json::from_str::<Value>(attribute(server, key).as_str().unwrap()).unwrap();
    assert_eq!(read("gen_ai.input.messages"), json!([{"role": "user", "parts": [{"type": "text", "content": "good morning"}]}]));
    let said = "You said: good morning Grüße 🧱";
    assert_eq!(read("gen_ai.output.messages"), json!([{"role": "assistant", "parts": [{"type": "text", "content": said}]}]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_never_answers_hurts_no_one_and_losses_are_counted() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = silent.local_addr().unwrap();
    let toml = format!("[telemetry]\notlp_endpoint = \"http://{at}\"\nqueue = 4\ntimeout_s = 600\nmetrics = false\n");
    let server = Server::routed(&toml).await;
    // One batch is on its way for ever; the queue holds four more spans.
    for i in 0..30 {
        assert_eq!(server.chat("hello", i % 2 == 0).await.status, 200);
        if i == 0 {
            tokio::time::sleep(Duration::from_millis(1500)).await;
        }
    }
    // Two spans each, less the queue's four; a stream's last comes after its end.
    let (mut page, lost) = (String::new(), f64::from(2 * 29 - 4));
    for _ in 0..100 {
        page = server.get("/metrics").await.body;
        if value(&page, "ashlar:telemetry_spans_dropped_total") == lost {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(value(&page, "ashlar:telemetry_spans_dropped_total"), lost);
    assert_eq!(value(&page, "ashlar:telemetry_spans_sent_total"), 0.0);
    server.stop().await;
}
