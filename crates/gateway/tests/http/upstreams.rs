//! The gateway in front of servers that behave and servers that do not.

use crate::{
    mock::{Mock, TOKENS, converse, usage},
    peers::skip,
    support::{MODEL, Reply, Server},
    total, value,
};
use serde_json::{Value, json};
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};
use tokio::io::AsyncReadExt as _;

const CHAT: &str = "/v1/chat/completions";

/// A model of the mock as a model here, on a backend of its own.
pub(crate) fn config(mock: &Mock, models: &[&str]) -> String {
    let mut toml = String::new();
    for model in models {
        toml += &format!(
            "[backends.\"{model}\"]\nkind = \"vllm\"\nurl = \"{}\"\nprobe = \"\"\nfirst_byte_timeout_s = 0.3\n\
             idle_timeout_s = 0.3\nmax_answer_bytes = 200000\nmax_event_bytes = 20000\nbreaker_failures = 1000\n\
             [models.\"{model}\"]\nretries = 0\ntargets = [{{ backend = \"{model}\" }}]\n",
            mock.url()
        );
    }
    toml
}

fn body(model: &str, stream: bool) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "tell me about kilns"}], "stream": stream})
}

async fn ask(server: &Server, model: &str, stream: bool) -> Reply {
    server.post(CHAT, &body(model, stream)).await
}

fn id(reply: &Reply) -> String {
    reply.header("x-ashlar-response-id").unwrap_or_else(|| panic!("{reply:?}")).to_owned()
}

async fn settlement(server: &Server, reply: &Reply) -> ashlar_store::Settlement {
    server.store.response(&id(reply)).await.unwrap().unwrap().settlement.expect("settled")
}

fn chunks(reply: &Reply) -> Vec<Value> {
    reply.events().iter().filter(|e| *e != "[DONE]").map(|e| serde_json::from_str(e).unwrap()).collect()
}

fn text(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_comes_through_as_it_is_under_our_id() {
    let mock = Mock::start().await;
    let server = Server::routed(&config(&mock, &["good"])).await;
    let mut sent = body("good", false);
    sent["top_k"] = 3.into();
    sent["response_format"] = json!({"type": "json_object"});
    sent["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
    let reply = server.post(CHAT, &sent).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(mock.last().body, sent, "nothing is added, dropped or changed");
    assert_eq!(mock.last().path, "/v1/chat/completions");
    let got = reply.json();
    assert_eq!((&got["id"], &got["model"], &got["system_fingerprint"]), (&json!(id(&reply)), &json!("good"), &json!("fp")));
    assert_eq!(got["choices"][0]["message"]["reasoning_content"], "hm");
    assert_eq!((&got["choices"][0]["logprobs"], &got["usage"]), (&json!({"content": [1]}), &usage()));
    let s = settlement(&server, &reply).await;
    assert_eq!((&*s.finish, s.prompt_tokens, s.cached_tokens, s.completion_tokens), ("stop", 9, 5, 4));
    assert_eq!(s.answer.as_deref(), Some(&*TOKENS.concat()));

    let reply = ask(&server, "good", true).await;
    assert_eq!(mock.last().body["stream_options"], json!({"include_usage": true}), "asked for on our own");
    let got = chunks(&reply);
    assert_eq!(text(&got), TOKENS.concat());
    assert!(got.iter().all(|c| c["id"] == id(&reply) && c["model"] == "good" && c["odd"]["kept"] == true && c.get("usage").is_none()));
    assert_eq!(got.last().unwrap()["choices"][0]["finish_reason"], "stop", "no usage chunk: no one asked");
    assert_eq!(settlement(&server, &reply).await.cached_tokens, 5);

    sent = body("good", true);
    sent["stream_options"] = json!({"include_usage": true});
    let got = chunks(&server.post(CHAT, &sent).await);
    assert_eq!((&got.last().unwrap()["choices"], &got.last().unwrap()["usage"]), (&json!([]), &usage()));
    assert_eq!(mock.state.connections.load(SeqCst), 1, "one connection was used for all");

    sent["kv_transfer_params"] = json!({});
    let refused = server.post(CHAT, &sent).await;
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("kv_transfer_params")));
    assert_eq!(mock.asked(), 3);
    assert_eq!(server.get("/v1/models/good").await.json().get("max_model_len"), None);
    assert_eq!(server.chat("hi", false).await.status, 200, "the engine's own model is still served");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_has_its_error_and_settles_once() {
    let mock = Mock::start().await;
    let models = [
        "500", "401", "400", "429", "slow-head", "no-json", "error-200", "truncated", "reset", "stall", "bad-event",
        "error-event", "endless", "huge-line", "good",
    ];
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-very-secret").unwrap();
    let with_key = format!("[backends.\"401\"]\napi_key_file = \"{}\"\n", key.display());
    let toml = config(&mock, &models).replace("[backends.\"401\"]\n", &with_key)
        + &format!("[backends.nowhere]\nkind = \"vllm\"\nurl = \"http://{nowhere}/v1\"\nprobe = \"\"\n[models.nowhere]\nretries = 0\ntargets = [{{ backend = \"nowhere\" }}]\n");
    let server = Server::routed(&toml).await;
    // Model, streamed, status, code, what the message says; a streamed 200 has
    // the error as its last event.
    let table: &[(&str, bool, u16, &str, &str)] = &[
        ("nowhere", false, 502, "upstream_unreachable", "cannot be reached"),
        ("nowhere", true, 502, "upstream_unreachable", "cannot be reached"),
        ("500", false, 502, "upstream_error", "answered 500: it fell over"),
        ("500", true, 502, "upstream_error", "answered 500: it fell over"),
        ("401", false, 502, "upstream_auth", "answered 401: the key [key] is wrong"),
        ("400", true, 400, "odd", "top_p is odd"),
        ("slow-head", false, 504, "upstream_timeout", "did not answer within 0.3 s"),
        ("slow-head", true, 504, "upstream_timeout", "did not answer within 0.3 s"),
        ("no-json", false, 502, "upstream_malformed", "not of the protocol"),
        ("no-json", true, 502, "upstream_malformed", "event stream was asked for"),
        ("error-200", true, 400, "", "too long"),
        ("error-200", false, 400, "", "too long"),
        ("truncated", true, 200, "upstream_closed", "without its end mark"),
        ("truncated", false, 502, "upstream_malformed", "not of the protocol"),
        ("reset", true, 200, "upstream_closed", "broke off after"),
        ("reset", false, 502, "upstream_closed", "broke off after"),
        ("stall", true, 200, "upstream_timeout", "did not go on within 0.3 s"),
        ("stall", false, 504, "upstream_timeout", "did not go on within 0.3 s"),
        ("bad-event", true, 200, "upstream_malformed", "not of the protocol"),
        ("error-event", true, 200, "upstream_error", "answered 507: out of memory"),
        ("endless", true, 200, "upstream_too_large", "more than 200000 bytes"),
        ("endless", false, 502, "upstream_too_large", "more than 200000 bytes"),
        ("huge-line", true, 200, "upstream_too_large", "an event of more than 20000 bytes"),
        // Last: it asks to be left alone.
        ("429", false, 429, "upstream_rate_limited", "answered 429: slow down"),
    ];
    let settled = |page: &str| -> f64 {
        let lines = page.lines().filter(|l| l.starts_with("ashlar:request_success_total{"));
        lines.map(|l| l.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    };
    for (model, stream, status, code, says) in table {
        let (reply, other) = tokio::join!(ask(&server, model, *stream), ask(&server, "good", true));
        assert_eq!(text(&chunks(&other)), TOKENS.concat(), "another request beside {model} notices nothing");
        assert_eq!(reply.status, *status, "{model} {stream}: {reply:?}");
        let error = if *status == 200 {
            assert!(!reply.events().contains(&"[DONE]".to_owned()), "an error is not an end");
            let got = chunks(&reply);
            assert!(text(&got).starts_with(&TOKENS[..2].concat()), "{model}: what came before was passed on");
            got.last().unwrap()["error"].clone()
        } else {
            reply.json()["error"].clone()
        };
        assert!(error["message"].as_str().unwrap().contains(says), "{model}: {error}");
        assert_eq!(error["code"].as_str().unwrap_or_default(), *code, "{model}: {error}");
        let s = settlement(&server, &reply).await;
        assert_eq!((&*s.finish, s.error.is_some()), ("error", true), "{model}");
        if *status == 200 {
            assert!(s.completion_tokens >= 2 && s.prompt_tokens > 0, "{model}: what came is booked: {s:?}");
        }
        assert!(!reply.body.contains("sk-very-secret"));
        if *model == "429" {
            assert_eq!(reply.header("retry-after"), Some("7"));
        }
    }
    let resting = ask(&server, "429", false).await;
    assert_eq!((resting.status, resting.header("retry-after")), (503, Some("7")), "{resting:?}");
    let page = server.get("/metrics").await.body;
    assert_eq!(settled(&page), 2.0 * table.len() as f64);
    assert_eq!(value(&page, "ashlar:ledger_errors_total"), 0.0, "none settled twice");
    assert_eq!(value(&page, "ashlar:num_responses_in_flight"), 0.0);
    assert_eq!(value(&page, "ashlar:backend_attempt_errors_total{backend=\"reset\",error=\"closed\"}"), 2.0);
    let rows = server.store.responses(500).await.unwrap();
    assert_eq!(rows.len(), 2 * table.len());
    assert!(rows.iter().all(|r| r.settlement.is_some()));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_one_counted_is_estimated_and_marked() {
    let mock = Mock::start().await;
    let server = Server::routed(&config(&mock, &["no-usage", "wrong-usage"])).await;
    for model in ["no-usage", "wrong-usage"] {
        for stream in [true, false] {
            let reply = ask(&server, model, stream).await;
            assert_eq!(reply.status, 200);
            let s = settlement(&server, &reply).await;
            assert!(s.prompt_tokens > 5 && (4..=8).contains(&s.completion_tokens), "{model}: {s:?}");
            let request = server.get(&format!("/ashlar/requests/{}", id(&reply))).await.json();
            assert_eq!(request["route"]["tokens"]["estimated"], true, "{request}");
        }
    }
    let mut with_usage = body("no-usage", true);
    with_usage["stream_options"] = json!({"include_usage": true});
    let got = chunks(&server.post(CHAT, &with_usage).await);
    assert_eq!(got.last().unwrap()["usage"]["estimated"], true, "who asked is told, and told how sure it is");
    assert_eq!(total(&server.get("/metrics").await.body, "ashlar:usage_estimated_total"), 5.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_noticed_upstream() {
    let mock = Mock::start().await;
    let toml = config(&mock, &["drip", "silent"]).replace("_timeout_s = 0.3", "_timeout_s = 30");
    let server = Server::routed(&toml).await;
    for (i, (model, wait)) in [("drip", true), ("silent", false)].into_iter().enumerate() {
        let sent = body(model, true).to_string();
        let kind = [("content-type", "application/json")];
        let mut socket = server.open("POST", CHAT, &kind, sent.as_bytes()).await;
        if wait {
            let mut some = [0; 900];
            socket.read_exact(&mut some).await.unwrap();
        } else {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(mock.state.abandoned.load(SeqCst), i);
        drop(socket);
        let row = server.settled().await;
        assert_eq!(row.settlement.unwrap().finish, "cancelled");
        for _ in 0..300 {
            if mock.state.abandoned.load(SeqCst) == i + 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(mock.state.abandoned.load(SeqCst), i + 1, "the upstream of {model} was told");
    }
    server.stop().await;
}

pub(crate) fn two(mock: &Mock, first: &str, second: &str, more: &str) -> String {
    let backend = |name: &str| {
        format!("[backends.{name}]\nkind = \"vllm\"\nurl = \"{}\"\nprobe = \"\"\nbreaker_failures = 3\nbreaker_open_s = 60\n", mock.url())
    };
    format!(
        "{}{}[models.m]\npolicy = \"ordered\"\n{more}\ntargets = [{{ backend = \"a\", model = \"{first}\" }}, {{ backend = \"b\", model = \"{second}\" }}]\n",
        backend("a"),
        backend("b")
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_goes_to_the_next_and_opens_the_circuit() {
    let mock = Mock::start().await;
    let server = Server::routed(&two(&mock, "500", "good", "aliases = [\"n\"]")).await;
    for i in 0..5 {
        let reply = ask(&server, if i % 2 == 0 { "m" } else { "n" }, i % 2 == 0).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let request = server.get(&format!("/ashlar/requests/{}", id(&reply))).await.json();
        let attempts = request["route"]["attempts"].as_array().unwrap();
        let stage = &request["route"]["stages"][0];
        if i < 3 {
            assert_eq!(attempts.len(), 2, "{request}");
            assert!(attempts[0]["outcome"].as_str().unwrap().contains("answered 500"));
        } else {
            assert_eq!(attempts.len(), 1, "the open circuit is not asked: {request}");
            assert!(stage["candidates"][0]["excluded"].as_str().unwrap().contains("circuit is open"));
        }
        assert_eq!(attempts.last().unwrap()["backend"], "b");
        assert_eq!((&stage["policy"], request["route"]["tokens"]["cache_read"].as_u64()), (&json!("ordered"), Some(5)));
    }
    let page = server.get("/metrics").await.body;
    assert_eq!(value(&page, "ashlar:backend_circuit{backend=\"a\"}"), 2.0);
    assert_eq!(value(&page, "ashlar:backend_available{backend=\"b\"}"), 1.0);
    assert_eq!(value(&page, "ashlar:retries_total{kind=\"retry\"}"), 3.0);
    let seen = server.get("/ashlar/backends").await.json();
    let a = seen["backends"].as_array().unwrap().iter().find(|b| b["name"] == "a").unwrap().clone();
    assert_eq!((&a["circuit"], &a["errors"]), (&json!("open"), &json!(3)));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_of_the_client_is_not_retried() {
    let mock = Mock::start().await;
    let server = Server::routed(&two(&mock, "400", "good", "")).await;
    assert_eq!(ask(&server, "m", false).await.status, 400);
    assert_eq!(mock.asked(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fallbacks_answer_under_their_own_name() {
    let mock = Mock::start().await;
    let toml = two(&mock, "500", "500", "fallback = [\"f\"]\nretries = 1")
        + "[models.f]\ntargets = [{ backend = \"b\", model = \"good\" }]\n";
    let server = Server::routed(&toml).await;
    let reply = ask(&server, "m", false).await;
    assert_eq!((reply.status, &reply.json()["model"]), (200, &json!("f")), "{reply:?}");
    let route = server.get(&format!("/ashlar/requests/{}", id(&reply))).await.json()["route"].clone();
    assert_eq!((route["stages"].as_array().unwrap().len(), route["attempts"].as_array().unwrap().len()), (2, 3));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_stay_within_the_budget() {
    let mock = Mock::start().await;
    let toml = format!("[retry]\nbudget_ratio = 0\nbudget_per_s = 0.1\n{}", two(&mock, "500", "500", "")).replace("breaker_failures = 3", "breaker_failures = 99");
    let server = Server::routed(&toml).await;
    for _ in 0..4 {
        assert_eq!(ask(&server, "m", false).await.status, 502);
    }
    assert_eq!(mock.asked(), 5, "four requests and the one retry saved up");
    assert!(value(&server.get("/metrics").await.body, "ashlar:retries_total{kind=\"budget\"}") >= 3.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_rest_is_waited_for() {
    let mock = Mock::start().await;
    let server = Server::routed(&config(&mock, &["once"]).replace("retries = 0", "retries = 1")).await;
    let began = Instant::now();
    let reply = ask(&server, "once", false).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert!(began.elapsed() >= Duration::from_secs(1), "the upstream asked for a second");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hedge_answers_first_and_both_are_booked() {
    let mock = Mock::start().await;
    for (first, second, winner) in [("silent", "good", "b"), ("late", "silent", "a")] {
        let server = Server::routed(&two(&mock, first, second, "hedge_after_s = 0.05")).await;
        let abandoned = mock.state.abandoned.load(SeqCst);
        let reply = ask(&server, "m", true).await;
        assert_eq!(text(&chunks(&reply)), TOKENS.concat(), "{reply:?}");
        let route = server.get(&format!("/ashlar/requests/{}", id(&reply))).await.json()["route"].clone();
        let attempts = route["attempts"].as_array().unwrap();
        let won = attempts.iter().find(|a| a["outcome"] == "answered").unwrap();
        assert_eq!((attempts.len(), &won["backend"], &won["hedge"]), (2, &json!(winner), &json!(winner == "b")));
        let mut rows = Vec::new();
        for _ in 0..200 {
            rows = server.store.responses(9).await.unwrap();
            if rows.len() == 2 && rows.iter().all(|r| r.settlement.is_some()) && mock.state.abandoned.load(SeqCst) > abandoned {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(rows.len(), 2);
        let lost = rows.iter().find(|r| r.admission.id != id(&reply)).unwrap();
        let s = lost.settlement.as_ref().unwrap();
        assert_eq!((&*s.finish, s.prompt_tokens > 0), ("cancelled", true));
        assert_ne!(lost.admission.backend, winner);
        assert_eq!(mock.state.abandoned.load(SeqCst), abandoned + 1, "the loser was cancelled");
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_send_a_request_where_it_fits() {
    let mock = Mock::start().await;
    let toml = two(&mock, "good", "also-good", "") + "[[models.m.rules]]\nname = \"gold\"\nheaders = { x-tier = \"gold\" }\nuse = [\"b\"]\n\
        [[models.m.rules]]\nname = \"code\"\nregex = \"fn main\"\nto = \"coder\"\n[models.coder]\ntargets = [{ backend = \"a\", model = \"code-model\" }]\n";
    let server = Server::routed(&toml).await;
    let kind = ("content-type", "application/json");
    let sent = body("m", false).to_string();
    server.send("POST", CHAT, &[kind], sent.as_bytes()).await;
    assert_eq!(mock.last().body["model"], "good");
    server.send("POST", CHAT, &[kind, ("x-tier", "gold")], sent.as_bytes()).await;
    assert_eq!(mock.last().body["model"], "also-good");
    let reply = server.send("POST", CHAT, &[kind], sent.replace("kilns", "fn main").as_bytes()).await;
    assert_eq!((&mock.last().body["model"], &reply.json()["model"]), (&json!("code-model"), &json!("coder")));
    let route = server.get(&format!("/ashlar/requests/{}", id(&reply))).await.json()["route"].clone();
    assert_eq!((&route["asked"], &route["stages"][0]["rule"]), (&json!("m"), &json!("code")));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_leave_a_backend_out_and_bring_it_back() {
    let mock = Mock::start().await;
    let toml = config(&mock, &["good"]).replace("probe = \"\"", "probe_interval_s = 0.05");
    let server = Server::routed(&toml).await;
    assert_eq!(ask(&server, "good", false).await.status, 200);
    for (down, status) in [(true, 503), (false, 200)] {
        mock.state.down.store(down, SeqCst);
        let mut got = 0;
        for _ in 0..200 {
            got = ask(&server, "good", false).await.status;
            if got == status {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(got, status);
        let health = server.get("/health").await.json();
        let good = health["backends"].as_array().unwrap().iter().find(|b| b["name"] == "good").unwrap().clone();
        assert_eq!(good["unhealthy"].is_string(), down, "{health}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_file_is_taken_up_and_a_bad_one_is_not() {
    let mock = Mock::start().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gateway.toml");
    let first = config(&mock, &["good", "drip"]).replace("_timeout_s = 0.3", "_timeout_s = 30");
    std::fs::write(&path, &first).unwrap();
    let server = Server::reloading(&path).await;
    let kind = [("content-type", "application/json")];
    let mut running = server.open("POST", CHAT, &kind, body("drip", true).to_string().as_bytes()).await;
    let mut some = [0; 900];
    running.read_exact(&mut some).await.unwrap();
    assert_eq!(ask(&server, "new", false).await.status, 404);

    let wait = async |what: &str, done: &dyn Fn(&Value, &str) -> bool| {
        for _ in 0..400 {
            let (health, page) = (server.get("/health").await, server.get("/metrics").await.body);
            assert_eq!(health.status, 200);
            if done(&health.json(), &page) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{what}: not after 8 s");
    };
    // The stream's backend is gone from the new file; the stream is not.
    std::fs::write(&path, config(&mock, &["good", "new"])).unwrap();
    wait("new file", &|_, page| value(page, "ashlar:config_reloads_total") == 1.0).await;
    assert_eq!(ask(&server, "new", false).await.status, 200);
    assert_eq!(ask(&server, "drip", false).await.status, 404);
    running.read_exact(&mut some).await.unwrap();

    std::fs::write(&path, "[models.new]\ntragets = []").unwrap();
    wait("bad file", &|health, page| {
        health["config_error"].as_str().is_some_and(|e| e.contains("did you mean \"targets\"")) && value(page, "ashlar:config_valid") == 0.0
    })
    .await;
    assert_eq!(ask(&server, "new", false).await.status, 200, "the old one stays in force");
    std::fs::write(&path, config(&mock, &["good", "new"])).unwrap();
    wait("mended file", &|health, page| health["config_error"].is_null() && value(page, "ashlar:config_valid") == 1.0).await;
    drop(running);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropic_answers_in_openais_form() {
    let mock = Mock::start().await;
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::write(&key, "sk-very-secret\n").unwrap();
    let toml = format!(
        "[backends.c]\nkind = \"anthropic\"\nurl = \"{}\"\nprobe = \"\"\napi_key_file = \"{}\"\n[models.m]\nretries = 0\ntargets = [{{ backend = \"c\", model = \"claude\" }}]\n",
        mock.url(),
        key.display()
    );
    let server = Server::routed(&toml).await;
    let whole = ask(&server, "m", false).await;
    let got = whole.json();
    assert_eq!(got["choices"][0]["message"]["content"], "bonjour", "{got}");
    assert_eq!((&got["choices"][0]["finish_reason"], &got["usage"]["prompt_tokens"]), (&json!("length"), &json!(13)));
    let seen = mock.last();
    assert_eq!((seen.path.as_str(), &seen.body["max_tokens"]), ("/v1/messages", &json!(4096)));
    let header = |name: &str| seen.headers.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
    assert_eq!(header("x-api-key").as_deref(), Some("sk-very-secret"));
    assert_eq!(header("anthropic-version").as_deref(), Some("2023-06-01"));
    let mut sent = body("m", true);
    sent["stream_options"] = json!({"include_usage": true});
    let streamed = server.post(CHAT, &sent).await;
    let chunks = chunks(&streamed);
    assert_eq!(text(&chunks), "bonjour");
    assert_eq!(chunks.last().unwrap()["usage"]["prompt_tokens_details"]["cached_tokens"], 10);
    for reply in [&whole, &streamed] {
        let s = settlement(&server, reply).await;
        assert_eq!((&*s.finish, s.prompt_tokens, s.cached_tokens, s.completion_tokens), ("length", 13, 10, 2));
    }
    let refused = server.post("/v1/completions", &json!({"model": "m", "prompt": "x"})).await;
    assert_eq!(refused.status, 400);
    for path in ["/metrics", "/health", "/ashlar/backends", "/ashlar/live", "/ashlar/responses"] {
        assert!(!server.get(path).await.body.contains("sk-very-secret"), "{path}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_and_strangers_are_not_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "9", "-subj", "/CN=test"])
        .args(["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args([std::ffi::OsStr::new("-keyout"), key.as_os_str(), "-out".as_ref(), cert.as_os_str()])
        .output();
    if !made.is_ok_and(|o| o.status.success()) {
        return skip("openssl");
    }
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from_pem_file(&cert).unwrap()], PrivateKeyDer::from_pem_file(&key).unwrap())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                if let Ok(socket) = acceptor.accept(socket).await {
                    converse(socket, Arc::default()).await;
                }
            });
        }
    });
    let backend = |name: &str, ca: &str| {
        format!("[backends.{name}]\nkind = \"openai\"\nurl = \"https://{at}/v1\"\nprobe = \"\"\n{ca}\n[models.{name}]\nretries = 0\ntargets = [{{ backend = \"{name}\" }}]\n")
    };
    let toml = backend("known", &format!("ca_file = \"{}\"", cert.display())) + &backend("stranger", "");
    let server = Server::routed(&toml).await;
    assert_eq!(text(&chunks(&ask(&server, "known", true).await)), TOKENS.concat());
    let reply = ask(&server, "stranger", false).await;
    assert_eq!(reply.status, 502);
    assert!(reply.body.contains("certificate"), "{}", reply.body);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_may_stand_before_a_gateway() {
    let inner = Server::start().await;
    let toml = format!(
        "[backends.inner]\nkind = \"ashlar\"\nurl = \"http://{}/v1\"\n[models.outer]\ntargets = [{{ backend = \"inner\", model = \"{MODEL}\" }}]\n",
        inner.at
    );
    let outer = Server::routed(&toml).await;
    for stream in [true, false] {
        let reply = ask(&outer, "outer", stream).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        let (mine, theirs) = (settlement(&outer, &reply).await, inner.settled().await.settlement.unwrap());
        assert_eq!((mine.prompt_tokens, mine.completion_tokens, mine.cached_tokens), (theirs.prompt_tokens, theirs.completion_tokens, theirs.cached_tokens));
        assert_eq!(mine.answer, theirs.answer);
    }
    let refused = outer.post(CHAT, &json!({"model": "outer", "messages": [], "tempo": 1})).await;
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("tempo")));
    outer.stop().await;
    inner.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_fails_is_taken_back_and_no_client_notices() {
    let mock = Mock::start().await;
    let toml = two(&mock, "good", "500", "canary = { backend = \"b\", share = 0.3 }").replace("breaker_failures = 3", "breaker_failures = 99");
    let server = Server::routed(&toml).await;
    let mut seen = Value::Null;
    for _ in 0..200 {
        assert_eq!(ask(&server, "m", false).await.status, 200);
        seen = server.get("/ashlar/backends").await.json()["canaries"][0].clone();
        if seen["rolled_back"].is_string() {
            break;
        }
    }
    assert!(seen["rolled_back"].as_str().unwrap().contains("failures"), "{seen}");
    assert_eq!(value(&server.get("/metrics").await.body, "ashlar:canary_rolled_back{model_name=\"m\"}"), 1.0);
    let before = mock.state.seen.lock().unwrap().iter().filter(|s| s.body["model"] == "500").count();
    for _ in 0..20 {
        assert_eq!(ask(&server, "m", false).await.status, 200);
    }
    assert_eq!(mock.state.seen.lock().unwrap().iter().filter(|s| s.body["model"] == "500").count(), before);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_always_break_off_open_the_circuit() {
    let mock = Mock::start().await;
    let server = Server::routed(&two(&mock, "reset", "good", "")).await;
    for i in 0..5 {
        let reply = ask(&server, "m", true).await;
        let ended = reply.events().contains(&"[DONE]".to_owned());
        assert_eq!((reply.status, ended), (200, i >= 3), "three broken answers, then the other backend");
    }
    server.stop().await;
}
