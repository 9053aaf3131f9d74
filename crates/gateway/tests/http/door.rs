//! Keys at the door: who is let in, what for, and what the others are told.

use crate::{
    databases,
    mock::Mock,
    support::{MODEL, Reply, Server, chat_body},
    upstreams::config,
};
use ashlar_api::{ApiError, Backend, BackendStats, ChatRequest, CompletionRequest, EventStream, ModelInfo, Score};
use ashlar_core::clock;
use ashlar_gateway::Config;
use ashlar_store::{Accounts, KeySettings, Limit};
use serde_json::{Value, json};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

pub(crate) const CHAT: &str = "/v1/chat/completions";

/// Fresh accounts in a file.
pub(crate) async fn accounts() -> (databases::Place, Accounts) {
    let place = databases::sqlite();
    let accounts = Accounts::open(place.settings()).await.unwrap();
    (place, accounts)
}

/// A server that requires keys of `accounts`.
pub(crate) async fn guarded(accounts: &Accounts, toml: &str) -> Server {
    Server::of(|state| {
        state.routing = Config::parse(toml).unwrap();
        state.accounts = Some(accounts.clone());
        state.config.require_keys = true;
    })
    .await
}

/// E.g. `limit("tokens/minute/1000")`; money is in USD.
pub(crate) fn limit(text: &str) -> Limit {
    let parts: Vec<&str> = text.split('/').collect();
    let currency = (parts[0] == "money").then_some("USD");
    serde_json::from_value(json!({"measure": parts[0], "window": parts[1], "amount": parts[2], "currency": currency})).unwrap()
}

/// The secret of a new key.
pub(crate) async fn key(accounts: &Accounts, settings: KeySettings) -> String {
    let settings = KeySettings { name: "k".into(), ..settings };
    accounts.create_key(&settings).await.unwrap().1.reveal().to_owned()
}

pub(crate) fn limited(limits: &[&str]) -> KeySettings {
    KeySettings { limits: limits.iter().map(|l| limit(l)).collect(), ..KeySettings::default() }
}

pub(crate) fn body(model: &str, stream: bool) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "tell me about kilns"}], "stream": stream, "max_tokens": 4})
}

fn code(reply: &Reply) -> (u16, String) {
    (reply.status, reply.json()["error"]["code"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_good_key_is_let_in_and_no_other_is_told_why() {
    let (_place, accounts) = accounts().await;
    let server = guarded(&accounts, "").await;
    let (good, revoked) = (key(&accounts, KeySettings::default()).await, key(&accounts, KeySettings::default()).await);
    let expired = key(&accounts, KeySettings { expires_ms: Some(clock::now_ms() - 1), ..Default::default() }).await;
    let disabled = key(&accounts, KeySettings { disabled: true, ..Default::default() }).await;
    let id = accounts.authenticate(&revoked).unwrap().key().id.clone();
    accounts.revoke_key(&id).await.unwrap();
    let mut wrong = good.clone();
    wrong.replace_range(wrong.len() - 1.., if good.ends_with('0') { "1" } else { "0" });

    let reply = server.post(CHAT, &chat_body("hi", false)).await;
    assert_eq!((code(&reply), reply.header("www-authenticate")), ((401, "missing_api_key".into()), Some("Bearer")));
    let mut said = std::collections::BTreeSet::new();
    for bad in [&wrong, &revoked, &expired, &disabled, "EMPTY", "sk-ashlar-"] {
        let reply = server.post_as(bad, CHAT, &chat_body("hi", false)).await;
        assert_eq!(code(&reply), (401, "invalid_api_key".into()), "{bad}");
        assert_eq!(reply.json()["error"]["type"], "authentication_error");
        said.insert(reply.body);
    }
    assert_eq!(said.len(), 1, "the same words for all: {said:?}");
    assert_eq!(server.post_as(&good, CHAT, &chat_body("hi", false)).await.status, 200);
    let headers = [("content-type", "application/json"), ("x-api-key", good.as_str())];
    assert_eq!(server.send("POST", CHAT, &headers, chat_body("hi", true).to_string().as_bytes()).await.status, 200);
    // A stranger's body is not read: this one never comes.
    let headers = [("content-type", "application/json"), ("content-length", "1000000")];
    let early = tokio::time::timeout(Duration::from_secs(5), server.send("POST", CHAT, &headers, b"")).await;
    assert_eq!(early.expect("before the body").status, 401);
    for path in ["/v1/models", "/v1/models/fake-1"] {
        assert_eq!((server.get(path).await.status, server.get_as(&good, path).await.status), (401, 200), "{path}");
    }
    let store = server.stop().await;
    assert_eq!(store.responses(10).await.unwrap().len(), 2, "no one else left a trace");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_required_keys_anyone_is_served_and_a_bad_key_is_not() {
    let (_place, accounts) = accounts().await;
    let server = Server::of(|state| state.accounts = Some(accounts.clone())).await;
    for secret in ["EMPTY", "sk-no-key-needed"] {
        assert_eq!(server.post_as(secret, CHAT, &chat_body("hi", false)).await.status, 200);
    }
    assert_eq!(server.chat("hi", false).await.status, 200);
    assert_eq!(server.post_as("sk-ashlar-mistyped", CHAT, &chat_body("hi", false)).await.status, 401);
    let good = key(&accounts, limited(&["requests/total/1"])).await;
    assert_eq!(server.post_as(&good, CHAT, &chat_body("hi", false)).await.status, 200);
    assert_eq!(server.post_as(&good, CHAT, &chat_body("hi", false)).await.status, 429, "a key's limits hold all the same");
    let shown = server.get("/ashlar/session").await.json();
    assert_eq!(shown, json!({"required": false, "signed_in": false, "key": null, "team": null}));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_sees_and_asks_for_its_own_models() {
    let (_place, accounts) = accounts().await;
    let mock = Mock::start().await;
    let server = guarded(&accounts, &config(&mock, &["good", "tools"]).replace("[models.\"good\"]\n", "[models.\"good\"]\naliases = [\"fine\"]\n")).await;
    let secret = key(&accounts, KeySettings { models: vec!["go*".into()], ..Default::default() }).await;
    let listed = server.get_as(&secret, "/v1/models").await.json();
    assert_eq!(listed["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect::<Vec<_>>(), ["good"]);
    for name in ["good", "fine"] {
        assert_eq!(server.post_as(&secret, CHAT, &body(name, false)).await.status, 200, "{name}");
    }
    for name in ["tools", MODEL, "best", "no-such-model"] {
        let reply = server.post_as(&secret, CHAT, &body(name, false)).await;
        assert_eq!(code(&reply), (403, "model_not_allowed".into()), "{name}");
        let said = reply.json()["error"]["message"].as_str().unwrap().replace(name, "?");
        assert_eq!(said, "this key may not ask for the model \"?\"; it may ask for: good", "served or not");
        assert_eq!(server.get_as(&secret, &format!("/v1/models/{name}")).await.status, 403);
    }
    let reply = server.post_as(&secret, CHAT, &body("goo", false)).await;
    assert_eq!(code(&reply), (404, "model_not_found".into()));
    assert!(!reply.body.contains("tools"), "{reply:?}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_limit_is_answered_with_its_numbers() {
    let (_place, accounts) = accounts().await;
    let mock = Mock::start().await;
    let server = guarded(&accounts, &config(&mock, &["good", "unpriced"])).await;
    let secret = key(&accounts, limited(&["requests/hour/2", "tokens/day/100000"])).await;
    for left in ["1", "0"] {
        let reply = server.post_as(&secret, CHAT, &body("good", left == "0")).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        assert_eq!((reply.header("x-ratelimit-limit-requests"), reply.header("x-ratelimit-remaining-requests")), (Some("2"), Some(left)));
        assert_eq!(reply.header("x-ratelimit-limit-tokens"), Some("100000"));
        let tokens: u64 = reply.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
        assert!((99_000..100_000).contains(&tokens), "{tokens}");
    }
    let reply = server.post_as(&secret, CHAT, &body("good", false)).await;
    assert_eq!(code(&reply), (429, "rate_limit_exceeded".into()));
    let wait: u32 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=3600).contains(&wait) && reply.header("x-ratelimit-reset-requests") == Some(&format!("{wait}s")), "{reply:?}");
    assert_eq!((reply.header("x-ratelimit-remaining-requests"), reply.header("x-ashlar-response-id")), (Some("0"), None));
    assert!(reply.json()["error"]["message"].as_str().unwrap().starts_with("this key may use 2 requests per hour; 2 are taken"));

    // The mock's answer has 13 tokens; twice as many and some are set aside.
    let budget = key(&accounts, limited(&["tokens/total/100"])).await;
    let mut served = 0;
    let last = loop {
        let reply = server.post_as(&budget, CHAT, &body("good", false)).await;
        if reply.status != 200 {
            break reply;
        }
        served += 1;
    };
    assert!((1..=7).contains(&served), "{served}");
    assert_eq!((code(&last), last.header("x-should-retry"), last.header("retry-after")), ((429, "insufficient_quota".into()), Some("false"), None));

    let money = key(&accounts, limited(&["money/month/1"])).await;
    assert_eq!(server.post_as(&money, CHAT, &body("good", false)).await.status, 200);
    let reply = server.post_as(&money, CHAT, &body("unpriced", false)).await;
    assert_eq!(code(&reply), (403, "price_unknown".into()));
    assert!(reply.body.contains("no rate of output for unpriced"), "{reply:?}");
    let unlimited = key(&accounts, KeySettings::default()).await;
    let reply = server.post_as(&unlimited, CHAT, &body("unpriced", false)).await;
    accounts.flush().await.unwrap();
    let row = accounts.usage(reply.header("x-ashlar-response-id").unwrap()).await.unwrap().unwrap();
    assert_eq!(row.cost.cost, None, "unknown, not nought");
    assert!(row.cost.no_cost_reason.unwrap().contains("no rate of cache_read"));
    let page = server.get("/metrics").await.body;
    assert_eq!(crate::total(&page, "ashlar:cost_unknown_total"), 1.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_user_is_limited_and_attributed_by_a_hash() {
    let (_place, accounts) = accounts().await;
    let server = guarded(&accounts, "").await;
    let secret = key(&accounts, KeySettings { user_limits: vec![limit("requests/day/1")], ..Default::default() }).await;
    let ask = async |user: Value| {
        let mut asked = chat_body("hi", false);
        asked.as_object_mut().unwrap().extend(user.as_object().unwrap().clone());
        server.post_as(&secret, CHAT, &asked).await
    };
    let first = ask(json!({"user": "ann"})).await;
    assert_eq!((first.status, ask(json!({"user": "ann"})).await.status), (200, 429));
    let second = ask(json!({"user": "ann", "safety_identifier": "bob"})).await;
    assert_eq!(second.status, 200, "the safety identifier goes first");
    accounts.flush().await.unwrap();
    for (reply, user) in [(first, "ann"), (second, "bob")] {
        let row = accounts.usage(reply.header("x-ashlar-response-id").unwrap()).await.unwrap().unwrap();
        assert_eq!(row.end_user, Some(accounts.user_hash(user)));
    }
    server.stop().await;
}

/// Remembers the priorities it is asked with.
struct Watching(Arc<Mutex<Vec<Option<i32>>>>);

#[async_trait::async_trait]
impl Backend for Watching {
    fn name(&self) -> &str {
        "watching"
    }

    fn models(&self) -> Vec<ModelInfo> {
        vec![ModelInfo { id: "w".into(), created: 1, owned_by: "test".into(), context: 64 }]
    }

    async fn chat(&self, request: ChatRequest) -> Result<EventStream, ApiError> {
        self.0.lock().unwrap().push(request.priority);
        Err(ApiError::bad_request("seen", None, None))
    }

    async fn complete(&self, _: CompletionRequest) -> Result<EventStream, ApiError> {
        Err(ApiError::unavailable("chat only"))
    }

    async fn score(&self, _: &str, _: &str) -> Result<Score, ApiError> {
        Err(ApiError::unavailable("chat only"))
    }

    fn stats(&self) -> BackendStats {
        BackendStats::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_one_asks_for_more_priority_than_the_key_has() {
    let (_place, accounts) = accounts().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let server = Server::of(|state| {
        state.backends.push(Arc::new(Watching(seen.clone())));
        state.accounts = Some(accounts.clone());
    })
    .await;
    for (most, asked, got) in [
        (Some(3), Some(9), Some(3)),
        (Some(3), Some(-9), Some(-9)),
        (Some(3), None, None),
        (Some(-5), None, Some(-5)),
        (None, Some(9), Some(9)),
    ] {
        let secret = key(&accounts, KeySettings { max_priority: most, ..Default::default() }).await;
        let mut asks = body("w", false);
        if let Some(asked) = asked {
            asks["priority"] = asked.into();
        }
        assert_eq!(server.post_as(&secret, CHAT, &asks).await.status, 400);
        assert_eq!(seen.lock().unwrap().pop().unwrap(), got, "{most:?} {asked:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_for_keys_that_may_see_it() {
    let (_place, accounts) = accounts().await;
    let server = guarded(&accounts, "").await;
    let team = accounts.create_team(&ashlar_store::TeamSettings { name: "ops".into(), ..Default::default() }).await.unwrap();
    let (may, plain) =
        (key(&accounts, KeySettings { console: true, team: Some(team.id), ..Default::default() }).await, key(&accounts, KeySettings::default()).await);
    let nobody = json!({"required": true, "signed_in": false, "key": null, "team": null});
    assert_eq!(server.get("/ashlar/session").await.json(), nobody);
    assert_eq!(server.get("/").await.status, 200, "the page asks for the key");
    let data = ["/ashlar/live", "/ashlar/responses", "/ashlar/backends", "/ashlar/requests/x", "/ashlar/trace/x", "/ashlar/releases"];
    for path in data {
        assert_eq!((server.get(path).await.status, server.get_as(&plain, path).await.status), (401, 403), "{path}");
    }
    assert_eq!(server.get_as(&may, "/ashlar/live").await.status, 200);
    let sign_in = async |secret: &str| server.post("/ashlar/session", &json!({"key": secret})).await;
    assert_eq!((code(&sign_in("no").await), code(&sign_in(&plain).await)), ((401, "invalid_api_key".into()), (403, "console_not_allowed".into())));
    assert_eq!(server.post("/ashlar/session", &json!({"kye": may})).await.status, 400);

    let reply = sign_in(&may).await;
    let cookie = reply.header("set-cookie").unwrap().to_owned();
    assert_eq!((reply.status, &*reply.body), (204, ""));
    assert!(cookie.contains("; HttpOnly") && cookie.contains("; SameSite=Strict") && !cookie.contains(&may[10..]), "{cookie}");
    let cookie = cookie.split(';').next().unwrap();
    let get = async |path: &str| server.send("GET", path, &[("cookie", &format!("a=b; {cookie}"))], b"").await;
    assert_eq!(get("/ashlar/session").await.json(), json!({"required": true, "signed_in": true, "key": "k", "team": "ops"}));
    assert_eq!(get("/ashlar/responses").await.status, 200);
    assert_eq!(server.send("POST", CHAT, &[("cookie", cookie), ("content-type", "application/json")], b"{}").await.status, 401, "it asks no model");
    let out = server.send("DELETE", "/ashlar/session", &[("cookie", cookie)], b"").await;
    assert!(out.status == 204 && out.header("set-cookie").unwrap().contains("Max-Age=0"));
    assert_eq!(get("/ashlar/responses").await.status, 401);

    let again = sign_in(&may).await;
    let cookie = again.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let id = accounts.authenticate(&may).unwrap().key().id.clone();
    accounts.revoke_key(&id).await.unwrap();
    let reply = server.send("GET", "/ashlar/live", &[("cookie", &cookie)], b"").await;
    assert_eq!(reply.status, 401, "a session ends with its key");
    server.stop().await;
}

/// A request that goes no further than the door is no one's to pay for.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_guard_does_not_take_costs_nothing() {
    let (_place, accounts) = accounts().await;
    let toml = "[guard.policies.pii]\ncheck = \"pii\"\n";
    let server = guarded(&accounts, toml).await;
    let secret = key(&accounts, limited(&["tokens/day/100000", "requests/day/2"])).await;
    let id = accounts.authenticate(&secret).unwrap().key().id.clone();
    let mut asked = body(MODEL, false);
    (asked["logprobs"], asked["max_tokens"]) = (true.into(), 4096.into());
    for _ in 0..3 {
        let reply = server.post_as(&secret, CHAT, &asked).await;
        assert_eq!(code(&reply), (400, "unsupported_parameter".into()), "{reply:?}");
    }
    accounts.flush().await.unwrap();
    let standing = accounts.standing(&id, None).await.unwrap();
    assert!(standing.iter().all(|s| s.spent == 0u64.into()), "{standing:?}");
    assert_eq!(server.post_as(&secret, CHAT, &body(MODEL, false)).await.status, 200);
    server.stop().await;
}
