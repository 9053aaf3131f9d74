//! Copies of requests, a model exchanged under load, and routing by what a
//! prompt is about: over sockets, with a mock behind.

use crate::{
    endpoints::{encoder, vector},
    mock::{Mock, TOKENS},
    support::Server,
};
use ashlar_gateway::{Config, Examples, Head, HeadKind, Quality, Scored, Want};
use serde_json::{Value, json};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

const CHAT: &str = "/v1/chat/completions";

fn backend(name: &str, mock: &Mock) -> String {
    format!("[backends.\"{name}\"]\nkind = \"vllm\"\nurl = \"{}\"\nprobe = \"\"\nbreaker_failures = 1000\n", mock.url())
}

fn body(model: &str, prompt: &str, stream: bool) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": prompt}], "stream": stream})
}

async fn mirror(server: &Server) -> Value {
    server.get("/ashlar/backends").await.json()["mirrors"][0].clone()
}

/// Waits until `done` holds of the mirror.
async fn until(server: &Server, done: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..500 {
        let shown = mirror(server).await;
        if done(&shown) {
            return shown;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not after 5 s: {}", mirror(server).await);
}

async fn mirrored(mock: &Mock, model: &str, queue: usize) -> Server {
    let toml = format!(
        "{}{}[models.m]\nretries = 0\ntargets = [{{ backend = \"a\", model = \"good\" }}]\n\
         mirror = {{ backend = \"b\", model = \"{model}\", share = 1.0, queue = {queue} }}\n",
        backend("a", mock),
        backend("b", mock),
    );
    Server::routed(&toml).await
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_are_compared_and_have_rows_of_their_own() {
    let mock = Mock::start().await;
    let server = mirrored(&mock, "good", 16).await;
    for stream in [false, true] {
        let reply = server.post(CHAT, &body("m", "x", stream)).await;
        assert!(reply.status == 200 && reply.header("x-ashlar-response-id").unwrap().starts_with("chatcmpl-"), "{reply:?}");
    }
    let shown = until(&server, |m| m["pairs"] == 2).await;
    assert_eq!((&shown["copied"], &shown["failed"], &shown["agreement"]), (&json!(2), &json!(0), &json!(1.0)), "{shown}");
    assert_eq!((&shown["refusals"]["alike"], &shown["tokens"]["mirror"]), (&json!(2), &json!(4.0)));
    assert!(shown["total_ms"]["mirror"].as_f64().unwrap() > 0.0);
    let rows = server.store.responses(10).await.unwrap();
    let copies: Vec<_> = rows.iter().filter(|r| r.admission.endpoint == "mirror:/v1/chat/completions").collect();
    assert_eq!((rows.len(), copies.len()), (4, 2));
    for copy in copies {
        assert!(copy.admission.id.starts_with("mirror-") && copy.admission.backend == "b");
        let settled = copy.settlement.as_ref().unwrap();
        assert_eq!((settled.finish.as_str(), settled.answer.as_deref()), ("stop", Some(&*TOKENS.concat())));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_neither_delays_nor_fails_its_answer() {
    let mock = Mock::start().await;
    for (model, field) in [("500", "failed"), ("truncated", "failed")] {
        let server = mirrored(&mock, model, 16).await;
        for stream in [false, true] {
            assert_eq!(server.post(CHAT, &body("m", "x", stream)).await.status, 200);
        }
        until(&server, |m| m[field] == 2).await;
        server.stop().await;
    }
    // Copies that take seconds: the answers are there before any has ended, and
    // beyond the room there are none.
    let server = mirrored(&mock, "slow-head", 2).await;
    for _ in 0..5 {
        assert_eq!(server.post(CHAT, &body("m", "x", false)).await.status, 200);
    }
    let shown = mirror(&server).await;
    assert_eq!((&shown["copied"], &shown["no_room"], &shown["pairs"]), (&json!(2), &json!(3), &json!(0)), "{shown}");
    // Stopped in the middle, they are settled all the same.
    let store = server.stop().await;
    let rows = store.responses(10).await.unwrap();
    let open = rows.iter().filter(|r| r.admission.id.starts_with("mirror-"));
    assert!(open.clone().count() == 2 && open.clone().all(|r| r.settlement.as_ref().is_some_and(|s| s.finish == "cancelled")));
}

/// Requests in flight and after, streamed and whole, while the model is
/// exchanged for another and back.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_exchanged_under_load_and_no_request_is_dropped() {
    let (old, new) = (Mock::start().await, Mock::start().await);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("gateway.toml");
    let write = |mock: &Mock, model: &str| {
        let toml = format!("{}[models.m]\nretries = 0\ntargets = [{{ backend = \"now\", model = \"{model}\" }}]\n", backend("now", mock));
        let next = folder.path().join("next");
        std::fs::write(&next, toml).unwrap();
        std::fs::rename(&next, &file).unwrap();
    };
    write(&old, "good");
    let server = Arc::new(Server::reloading(Path::new(&file)).await);
    let (over, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..6)
        .map(|i| {
            let (server, over, answered) = (server.clone(), over.clone(), answered.clone());
            tokio::spawn(async move {
                while !over.load(SeqCst) {
                    let reply = server.post(CHAT, &body("m", "x", i % 2 == 0)).await;
                    assert_eq!(reply.status, 200, "{reply:?}");
                    assert!(i % 2 != 0 || reply.events().last().unwrap() == "[DONE]", "{reply:?}");
                    answered.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    for (round, (mock, model)) in [(&new, "late"), (&old, "good"), (&new, "good")].into_iter().enumerate() {
        write(mock, model);
        let (before, answers) = (mock.asked(), answered.load(SeqCst));
        for _ in 0..1000 {
            if mock.asked() > before + 6 && answered.load(SeqCst) > answers + 6 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(mock.asked() > before + 6, "round {round}: the new one is asked");
    }
    over.store(true, SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    let page = server.get("/ashlar/backends").await.json();
    assert_eq!((&page["config"]["reloads"], &page["config"]["failures"]), (&json!(3), &json!(0)), "{page}");
    let total = answered.load(SeqCst);
    assert_eq!(old.asked() + new.asked(), total, "each was asked once");
    let server = Arc::into_inner(server).unwrap();
    server.stop().await;
}

/// Texts of one letter mostly, which `vector` tells apart.
fn prompts(letter: &str, other: &str) -> Vec<String> {
    (0..30).map(|i| letter.repeat(4 + i) + &other.repeat(i % 3)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_is_routed_by_its_task_and_by_its_need() {
    let mock = Mock::start().await;
    let folder = tempfile::tempdir().unwrap();
    let (task, need) = (folder.path().join("task.json"), folder.path().join("need.json"));
    let mut id = None;
    // The encoder's name and digest, as the server has them.
    let probe = Server::of(|state| {
        encoder(state);
        id = state.encoder.as_ref().map(|e| e.id.clone());
    })
    .await;
    probe.stop().await;
    let id = id.unwrap();
    let (code, talk) = (prompts("a", "b"), prompts("b", "a"));
    let mut examples = Examples::default();
    let mut scored = Vec::new();
    for (texts, is_code) in [(&code, true), (&talk, false)] {
        for text in texts {
            let share = |yes: bool| f32::from(u8::from(yes));
            examples.rows.push(vector(text));
            examples.targets.push(vec![share(is_code), share(!is_code)]);
            // The weak model cannot code.
            scored.push(Scored { row: vector(text), strong: 1.0, weak: if is_code { 0.0 } else { 1.0 } });
        }
    }
    let head = Head::train(id.clone(), HeadKind::Softmax, vec!["code".into(), "talk".into()], &examples).unwrap();
    std::fs::write(&task, head.to_json().unwrap()).unwrap();
    let quality = Quality::calibrate(id, ("big", "small"), &scored, Want::Quality(0.99)).unwrap();
    std::fs::write(&need, quality.to_json().unwrap()).unwrap();
    let toml = format!(
        "[encoder]\npath = \"unused\"\n{}{}\
         [models.t]\nretries = 0\npolicy = \"task\"\ntargets = [{{ backend = \"one\", model = \"good\" }}, {{ backend = \"two\", model = \"good\" }}]\n\
         task = {{ head = \"{}\", default = \"one\", labels = {{ code = \"two\", talk = \"one\" }}, min_probability = 0.6 }}\n\
         [models.q]\nretries = 0\npolicy = \"quality\"\ntargets = [{{ backend = \"one\", model = \"good\" }}, {{ backend = \"two\", model = \"good\" }}]\n\
         quality = {{ head = \"{}\", strong = \"two\", weak = \"one\" }}\n\
         [models.by]\nretries = 0\ntargets = [{{ backend = \"one\", model = \"good\" }}]\nrules = [{{ to = \"t\", min_bytes = 1 }}]\n",
        backend("one", &mock),
        backend("two", &mock),
        task.display(),
        need.display(),
    );
    let parsed = Config::parse(&toml).unwrap();
    let server = Server::of(|state| {
        encoder(state);
        state.routing = parsed;
    })
    .await;
    for (model, prompt, backend, label) in [
        ("t", "aaaaaaaaab", "two", "code"),
        ("t", "bbbbbbbbba", "one", "talk"),
        ("by", "aaaaaaaaab", "two", "code"),
        ("q", "aaaaaaaaab", "two", "strong wins"),
        ("q", "bbbbbbbbba", "one", "strong wins"),
    ] {
        let reply = server.post(CHAT, &body(model, prompt, false)).await;
        let id = reply.header("x-ashlar-response-id").unwrap_or_else(|| panic!("{reply:?}"));
        let shown = server.get(&format!("/ashlar/requests/{id}")).await.json();
        assert_eq!(shown["route"]["attempts"][0]["backend"], backend, "{model} {prompt}: {shown}");
        let stage = shown["route"]["stages"].as_array().unwrap().last().unwrap().clone();
        let judged = &stage["judged"];
        assert_eq!(judged["label"], label, "{stage}");
        assert!(judged["probability"].as_f64().is_some_and(|p| (0.0..=1.0).contains(&p)) && stage["reason"].as_str().unwrap().len() > 10);
    }
    let fallen = server.post(CHAT, &body("t", "fall over", false)).await;
    let id = fallen.header("x-ashlar-response-id").unwrap();
    let shown = server.get(&format!("/ashlar/requests/{id}")).await.json();
    assert!(fallen.status == 200 && shown["route"]["attempts"][0]["backend"] == "one", "{shown}");
    assert!(shown["route"]["stages"][0]["reason"].as_str().unwrap().contains("the encoder fell over"), "{shown}");
    server.stop().await;

    for (wrong, says) in [
        (toml.replace("[encoder]\npath = \"unused\"\n", ""), "it needs an encoder"),
        (toml.replace("policy = \"task\"\n", ""), "the policy is not \"task\""),
        (toml.replace("default = \"one\"", "default = \"three\""), "no target is on a backend \"three\""),
    ] {
        assert!(Config::parse(&wrong).unwrap_err().to_string().contains(says), "{says}");
    }
}
