//! The server as clients meet it, over sockets, with a scripted backend and a
//! real store.

#[path = "../../../store/tests/accounts/databases.rs"]
#[allow(dead_code, unreachable_pub, unused_imports, unused_macros)]
mod databases;
mod demo;
mod deploy;
mod door;
mod endpoints;
mod guard;
mod mock;
mod peers;
mod releases;
mod settling;
mod support;
mod telemetry;
mod tls;
mod upstreams;

use ashlar_core::Decimal;
use serde_json::{Value, json};
use std::{sync::atomic::Ordering::SeqCst, time::Duration};
use support::{CONTEXT, MODEL, Server, XSS, chat_body};
use tokio::io::AsyncReadExt as _;

fn deltas(events: &[String], at: &str) -> String {
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    chunks
        .iter()
        .map(|c| serde_json::from_str::<Value>(c).unwrap())
        .filter_map(|c| c.pointer(at)?.as_str().map(str::to_owned))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_chunks_are_the_whole_answer() {
    let server = Server::start().await;
    let whole = server.chat("good morning", false).await;
    assert_eq!(whole.status, 200, "{whole:?}");
    let streamed = server.chat("good morning", true).await;
    assert_eq!(streamed.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let body = whole.json();
    let events = streamed.events();
    let text = deltas(&events, "/choices/0/delta/content");
    assert_eq!(text, "You said: good morning Grüße 🧱");
    assert_eq!(body["choices"][0]["message"]["content"], text);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(events.iter().all(|e| !e.contains("\"usage\"")), "nobody asked for usage");

    let mut with_usage = chat_body("good morning", true);
    with_usage["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/chat/completions", &with_usage).await.events();
    let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"], body["usage"]);

    let ask = |stream: bool| json!({"model": "best", "prompt": "good morning", "stream": stream});
    let whole = server.post("/v1/completions", &ask(false)).await.json();
    let streamed = server.post("/v1/completions", &ask(true)).await;
    assert_eq!(whole["choices"][0]["text"], text);
    assert_eq!(deltas(&streamed.events(), "/choices/0/text"), text);
    assert_eq!(whole["model"], MODEL);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_is_there_when_the_answer_ends() {
    let server = Server::start().await;
    for stream in [false, true] {
        let reply = server.chat("hello there", stream).await;
        let id = reply.header("x-ashlar-response-id").unwrap();
        assert!(id.starts_with("chatcmpl-"));
        assert!(reply.body.contains(&format!("\"id\":\"{id}\"")), "one id everywhere");
        let row = server.store.response(id).await.unwrap().unwrap();
        let s = row.settlement.expect("settled before the client saw the end");
        assert_eq!((&*s.finish, s.prompt_tokens, s.cached_tokens), ("stop", 2, 1));
        assert_eq!(s.answer.as_deref(), Some("You said: hello there Grüße 🧱"));
        assert!(s.ttft_ms > 0.0 && s.ttft_ms <= s.total_ms && s.queue_ms == 1.5);
        // Thousandths: one token read, one found, the others written.
        let cost = Decimal::from_picos((1_500 + 2_000 * i128::from(s.completion_tokens)) * 1_000_000);
        assert_eq!(s.cost, Some(cost));
        assert_eq!(row.admission.release.as_deref(), Some(&*server.release));
        assert!(row.admission.seed.is_some());
        assert_eq!((row.admission.stream, s.refusal), (stream, false));
    }
    let mut by_channel = chat_body("refuse", false);
    by_channel["model"] = "main".into();
    by_channel["seed"] = 41.into();
    let reply = server.post("/v1/chat/completions", &by_channel).await;
    let id = reply.header("x-ashlar-response-id").unwrap();
    let row = server.store.response(id).await.unwrap().unwrap();
    assert!(row.settlement.unwrap().refusal);
    assert_eq!(row.admission.seed, Some(41));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_settles_once_as_cancelled() {
    let server = Server::start().await;
    for (prompt, stream) in [("slow", true), ("hang", true), ("hang", false)] {
        let before = server.dropped.load(SeqCst);
        let body = chat_body(prompt, stream).to_string();
        let kind = [("content-type", "application/json")];
        let mut socket = server.open("POST", "/v1/chat/completions", &kind, body.as_bytes()).await;
        if stream {
            let mut some = [0; 700];
            socket.read_exact(&mut some).await.unwrap();
        } else {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(server.get("/ashlar/live").await.json()["requests"][0]["model"], MODEL);
        drop(socket);
        let row = server.settled().await;
        let s = row.settlement.unwrap();
        assert_eq!((&*s.finish, s.prompt_tokens), ("cancelled", 1), "{prompt}");
        assert!(s.completion_tokens > 3 && s.answer.unwrap().starts_with("one two"));
        assert_eq!(server.dropped.load(SeqCst), before + 1, "the backend was told");
        assert_eq!(server.get("/ashlar/live").await.json()["requests"], json!([]));
    }
    let page = server.get("/metrics").await.body;
    let key = "ashlar:request_success_total{model_name=\"fake-1\",endpoint=\"/v1/chat/completions\",finished_reason=\"cancelled\"}";
    assert_eq!(value(&page, key), 3.0);
    assert_eq!(value(&page, "ashlar:ledger_errors_total"), 0.0, "no second settlement");
    server.stop().await;
}

/// The backend is asked before the store has acknowledged the admission.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_an_answer_leaves_that_the_ledger_did_not_admit() {
    let server = Server::start().await;
    assert_eq!(server.chat("good morning", true).await.status, 200);
    server.store.clone().close().await;
    for stream in [false, true] {
        let reply = server.chat("good morning", stream).await;
        assert_eq!(reply.status, 503, "{reply:?}");
        assert!(reply.body.contains("the ledger did not take the request"), "{reply:?}");
        assert!(!reply.body.contains("You said"), "{reply:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_settled_as_errors() {
    let server = Server::with(|c| c.request_timeout = Duration::from_millis(300)).await;
    for (prompt, stream, status, says) in [
        ("die", false, 500, "fell over"),
        ("cut", false, 500, "without finishing"),
        ("hang", false, 504, "0.3 s"),
        ("die", true, 200, "fell over"),
        ("cut", true, 200, "without finishing"),
        ("hang", true, 200, "0.3 s"),
        ("slow", true, 200, "0.3 s"),
    ] {
        let reply = server.chat(prompt, stream).await;
        assert_eq!(reply.status, status, "{prompt}: {reply:?}");
        let error = if stream {
            let events = reply.events();
            assert!(!events.iter().any(|e| e == "[DONE]"), "an error is not an end");
            serde_json::from_str(events.last().unwrap()).unwrap()
        } else {
            reply.json()
        };
        assert!(error["error"]["message"].as_str().unwrap().contains(says), "{error}");
        // Not the newest: two answers in one millisecond sort by chance.
        let id = reply.header("x-ashlar-response-id").unwrap();
        let s = server.store.response(id).await.unwrap().unwrap().settlement.unwrap();
        assert_eq!((&*s.finish, s.error.unwrap().contains(says)), ("error", true));
    }
    let page = server.get("/metrics").await.body;
    assert_eq!(value(&page, "ashlar:ledger_errors_total"), 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_cuts_off_and_settles_what_still_runs() {
    let server = Server::start().await;
    let body = chat_body("slow", true).to_string();
    let kind = [("content-type", "application/json")];
    let mut socket = server.open("POST", "/v1/chat/completions", &kind, body.as_bytes()).await;
    let mut some = [0; 700];
    socket.read_exact(&mut some).await.unwrap();
    let client = tokio::spawn(async move {
        let mut rest = String::new();
        socket.read_to_string(&mut rest).await.unwrap();
        rest
    });
    let store = server.stop().await;
    assert!(client.await.unwrap().contains("the server is stopping"));
    let row = store.responses(1).await.unwrap().pop().unwrap();
    assert_eq!(row.settlement.unwrap().finish, "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_json_and_say_what_is_wrong() {
    let server = Server::with(|c| c.max_body_bytes = 1000).await;
    let chat = "/v1/chat/completions";
    let kind = ("content-type", "application/json");
    let big = vec![b' '; 1500];
    let long = chat_body(&"w ".repeat(100), false).to_string();
    let unknown = chat_body("x", false).to_string().replace(MODEL, "gpt-9");
    let mut odd = chat_body("x", false);
    odd["tools"] = json!([{"type": "function"}]);
    let odd = odd.to_string();
    type Case<'a> = (&'a str, &'a str, Vec<(&'a str, &'a str)>, &'a [u8], u16, &'a str, Option<&'a str>);
    let table: Vec<Case<'_>> = vec![
        ("POST", chat, vec![kind], unknown.as_bytes(), 404, "served: fake-1, best, main", Some("model")),
        ("POST", chat, vec![kind], b"{\"model\":", 400, "JSON", None),
        ("POST", chat, vec![kind], b"", 400, "JSON", None),
        ("POST", chat, vec![kind], odd.as_bytes(), 400, "tools", Some("tools")),
        ("POST", chat, vec![kind], &big, 413, "1500 bytes, the limit is 1000", None),
        ("POST", chat, vec![kind], long.as_bytes(), 400, "100 tokens, the context holds 64", Some("messages")),
        ("POST", chat, vec![("content-type", "text/plain")], b"{}", 415, "\"text/plain\"", None),
        ("POST", chat, vec![], b"{}", 415, "application/json", None),
        ("GET", chat, vec![], b"", 405, "does not take GET", None),
        ("DELETE", "/v1/models", vec![], b"", 405, "DELETE", None),
        ("GET", "/v1/nothing", vec![], b"", 404, "no route GET /v1/nothing", None),
        ("GET", "/v1/models/gpt-9", vec![], b"", 404, "gpt-9", Some("model")),
        ("GET", "/health", vec![("host", "evil.example")], b"", 403, "evil.example", None),
        ("GET", "/ashlar/trace/chatcmpl-0", vec![], b"", 404, "chatcmpl-0", Some("id")),
        ("GET", "/ashlar/graph/x", vec![], b"", 404, "ID.svg", None),
        ("GET", "/ashlar/responses?limit=0", vec![], b"", 400, "1 to 500", Some("limit")),
    ];
    for (method, path, headers, body, status, says, param) in &table {
        let reply = server.send(method, path, headers, body).await;
        assert_eq!(reply.status, *status, "{method} {path}: {reply:?}");
        assert_eq!(reply.header("content-type"), Some("application/json"), "{path}");
        let error = &reply.json()["error"];
        assert!(error["message"].as_str().unwrap().contains(says), "{error} does not say {says}");
        assert_eq!(error["param"].as_str(), *param, "{error}");
        assert!(error["type"].is_string() && error.get("code").is_some());
        if *status == 405 {
            assert!(reply.header("allow").is_some(), "{reply:?}");
        }
    }
    // A body that never comes in full is dropped, not waited for.
    let part = server.open("POST", chat, &[kind, ("content-length", "50")], b"{").await;
    drop(part);
    assert_eq!(server.get("/health").await.status, 200);
    let page = server.get("/metrics").await.body;
    assert_eq!(value(&page, "ashlar:request_rejected_total{status=\"415\"}"), 2.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_at_once_are_sent_away() {
    let server = Server::with(|c| c.max_in_flight = 1).await;
    let body = chat_body("slow", true).to_string();
    let kind = [("content-type", "application/json")];
    let mut socket = server.open("POST", "/v1/chat/completions", &kind, body.as_bytes()).await;
    let mut some = [0; 400];
    socket.read_exact(&mut some).await.unwrap();
    let reply = server.chat("hello", false).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("1")));
    assert!(reply.body.contains("the limit is 1"));
    drop(socket);
    server.settled().await;
    assert_eq!(server.chat("hello", false).await.status, 200);
    server.stop().await;
}

/// The value of one series, which must be on the page exactly once.
fn value(page: &str, series: &str) -> f64 {
    let hits: Vec<&str> = page
        .lines()
        .filter_map(|l| l.strip_prefix(series)?.strip_prefix(' '))
        .collect();
    assert_eq!(hits.len(), 1, "{series} in\n{page}");
    hits[0].parse().unwrap()
}

/// The sum of a name's series, of which there must be some.
fn total(page: &str, name: &str) -> f64 {
    let series = page.lines().filter(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
    let values: Vec<f64> = series.map(|l| l.rsplit_once(' ').unwrap().1.parse().unwrap()).collect();
    assert!(!values.is_empty(), "{name} in\n{page}");
    values.iter().sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_parse_and_add_up() {
    let server = Server::start().await;
    for stream in [true, false] {
        assert_eq!(server.chat("hello", stream).await.status, 200);
    }
    let page = server.get("/metrics").await.body;
    let mut typed = std::collections::BTreeSet::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(matches!(kind, "counter" | "gauge" | "histogram"));
            assert!(typed.insert(name.to_owned()), "{name} declared twice");
        } else if !line.starts_with('#') {
            let (series, number) = line.rsplit_once(' ').unwrap();
            number.parse::<f64>().unwrap();
            let name = series.split('{').next().unwrap();
            let known = ["", "_bucket", "_sum", "_count"]
                .iter()
                .any(|end| name.strip_suffix(end).is_some_and(|n| typed.contains(n)));
            assert!(known, "{name} has no TYPE");
        }
    }
    let tokens = value(&page, "ashlar:generation_tokens_total{model_name=\"fake-1\"}");
    assert!(tokens > 20.0);
    assert_eq!(value(&page, "ashlar:prompt_tokens_total{model_name=\"fake-1\"}"), 2.0);
    assert_eq!(value(&page, "ashlar:prefix_cache_hits_total{model_name=\"fake-1\"}"), 2.0);
    assert_eq!(value(&page, "ashlar:time_to_first_token_seconds_count{model_name=\"fake-1\",endpoint=\"/v1/chat/completions\"}"), 2.0);
    assert_eq!(value(&page, "ashlar:inter_token_latency_seconds_count{model_name=\"fake-1\",endpoint=\"/v1/chat/completions\"}"), tokens - 2.0);
    assert_eq!(value(&page, "ashlar:e2e_request_latency_seconds_bucket{model_name=\"fake-1\",endpoint=\"/v1/chat/completions\",le=\"+Inf\"}"), 2.0);
    assert_eq!(value(&page, "ashlar:num_requests_waiting"), 2.0);
    assert_eq!(value(&page, "ashlar:kv_cache_blocks_used"), 3.0);
    assert_eq!(value(&page, "ashlar:kv_cache_usage_perc"), 0.375);
    let cost = total(&page, "ashlar:cost_total");
    assert!((cost - (2.0 * 0.5 + 2.0 * tokens) / 1000.0).abs() < 1e-9, "{cost}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_health_and_console_routes() {
    let server = Server::start().await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(server.get("/v1/models/main").await.json()["max_model_len"], CONTEXT);
    assert_eq!(server.get("/health").await.json()["status"], "ok");
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/console/style/base.css", "text/css; charset=utf-8"),
        ("/console/main.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
    ] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(kind)), "{path}");
        let policy = reply.header("content-security-policy").unwrap();
        assert!(policy.contains("script-src 'self'") && !policy.contains("unsafe-inline"));
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(reply.header("access-control-allow-origin"), None);
    }
    let releases = server.get("/ashlar/releases").await.json();
    let current = &releases["current"];
    assert_eq!((&current["id"], &current["serving"]), (&json!(server.release), &json!(MODEL)));
    assert_eq!(current["checks"][0]["name"], "signature");
    assert_eq!(current["losses"].as_array().unwrap().len(), 60);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lineage_is_drawn_and_hostile_text_is_escaped() {
    let server = Server::start().await;
    let reply = server.chat(XSS, false).await;
    let id = reply.header("x-ashlar-response-id").unwrap().to_owned();
    let trace = server.get(&format!("/ashlar/trace/{id}")).await.json();
    let documents: Vec<&Value> = trace["trace"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|n| n["kind"] == "document")
        .collect();
    assert_eq!(documents.len(), 15);
    assert_eq!(documents[0]["detail"]["id"], "doc-14", "what shares text comes first");
    assert!(documents[0]["detail"]["span"].as_str().unwrap().contains("<script>"));
    assert_eq!(trace["response"]["id"], *id);

    for layout in ["wide", "tall"] {
        let reply = server.get(&format!("/ashlar/graph/{id}.svg?layout={layout}")).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("image/svg+xml")));
        let tree = roxmltree::Document::parse(&reply.body).expect("well-formed XML");
        for node in tree.descendants().filter(|n| n.is_element()) {
            let name = node.tag_name().name();
            let plain = matches!(name, "svg" | "title" | "style" | "path" | "g" | "rect" | "text");
            assert!(plain, "{name} does not belong in the picture");
            assert!(node.attributes().all(|a| !a.name().starts_with("on") && a.name() != "href"));
        }
        let words: String = tree.descendants().filter_map(|n| n.text()).collect();
        for word in ["response", "release", "model", "adapter", "train", "snapshot", "curate", "exposed to 15 documents", "3 more", "● Chapter 14", "<script>"] {
            assert!(words.contains(word), "{word} is missing in {words}");
        }
        let shared = tree.descendants().filter(|n| n.attribute("class") == Some("shared"));
        assert_eq!(shared.count(), 1);
        // Nothing is drawn outside the picture or over another card.
        let view: Vec<f64> = tree.root_element().attribute("viewBox").unwrap().split(' ').map(|v| v.parse().unwrap()).collect();
        let boxes: Vec<[f64; 4]> = tree
            .descendants()
            .filter(|n| n.has_tag_name(("http://www.w3.org/2000/svg", "rect")))
            .map(|n| ["x", "y", "width", "height"].map(|a| n.attribute(a).unwrap().parse().unwrap()))
            .collect();
        for (i, [x, y, w, h]) in boxes.iter().enumerate() {
            assert!(*x >= 0.0 && *y >= 0.0 && x + w <= view[2] && y + h <= view[3]);
            for [x2, y2, w2, h2] in &boxes[..i] {
                let apart = x + w <= *x2 || x2 + w2 <= *x || y + h <= *y2 || y2 + h2 <= *y;
                assert!(apart, "cards overlap in {layout}");
            }
        }
        if layout == "tall" {
            assert!(view[2] <= 390.0, "{} is too wide for a narrow screen", view[2]);
        }
    }
    // Any node can be the root, seen from both ends.
    for root in [&*server.release, "doc-3"] {
        let reply = server.get(&format!("/ashlar/graph/{root}.svg")).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
        roxmltree::Document::parse(&reply.body).unwrap();
    }
    server.stop().await;
}
