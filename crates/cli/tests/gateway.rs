//! `ashlar serve` in front of another `ashlar serve`: two real processes, one
//! real model.

mod common;

use common::{peer, served, served_with};
use serde_json::{Value, json};
use std::{io::Read as _, path::Path, process::Command, time::{Duration, Instant}};

fn post(url: &str, body: &Value) -> (u16, String) {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let mut reply = agent.post(url).send_json(body).expect("an answer");
    (reply.status().as_u16(), reply.body_mut().read_to_string().expect("text"))
}

fn get(url: &str) -> Value {
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    agent.get(url).call().expect("an answer").body_mut().read_json().expect("JSON")
}

fn write(path: &Path, inner: &str, model: &str, route: &str) {
    let toml = format!(
        "[backends.inner]\nkind = \"ashlar\"\nurl = \"{inner}/v1\"\nprobe_interval_s = 0.2\n\
         [models.{route}]\nretries = 0\ntargets = [{{ backend = \"inner\", model = \"{model}\" }}]\n"
    );
    std::fs::write(path, toml).expect("write");
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(15), "{what}: not after 15 s");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn one_server_answers_for_another() {
    let Some(model) = peer("ASHLAR_TEST_MODEL", "the test model") else { return };
    let home = tempfile::tempdir().expect("temp dir");
    let (inner_home, outer_home) = (home.path().join("inner"), home.path().join("outer"));
    let (mut inner, inner_url, name) = served(&inner_home, model.to_str().expect("UTF-8"));
    let config = home.path().join("gateway.toml");
    write(&config, &inner_url, &name, "far");
    let (mut outer, outer_url, route) = served_with(&outer_home, &["--config", config.to_str().expect("UTF-8")]);
    assert_eq!(route, "far");

    let mut body = json!({"model": name, "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0, "max_tokens": 12, "seed": 1});
    let (status, direct) = post(&format!("{inner_url}/v1/chat/completions"), &body);
    assert_eq!(status, 200, "{direct}");
    let direct: Value = serde_json::from_str(&direct).expect("JSON");
    body["model"] = "far".into();
    let chat = format!("{outer_url}/v1/chat/completions");
    let (status, through) = post(&chat, &body);
    assert_eq!(status, 200, "{through}");
    let through: Value = serde_json::from_str(&through).expect("JSON");
    assert_eq!(through["choices"], direct["choices"], "the same words");
    assert_eq!(through["usage"]["completion_tokens"], direct["usage"]["completion_tokens"]);
    let id = through["id"].as_str().expect("id");
    let seen = get(&format!("{outer_url}/ashlar/requests/{id}"));
    assert_eq!(seen["response"]["settlement"]["completion_tokens"], direct["usage"]["completion_tokens"], "{seen}");
    assert_eq!((&seen["route"]["attempts"][0]["backend"], &seen["route"]["tokens"]["estimated"]), (&json!("inner"), &json!(false)));

    body["stream"] = true.into();
    let (_, events) = post(&chat, &body);
    let text: String = events
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l.strip_prefix("data: ")?).ok())
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(text, direct["choices"][0]["message"]["content"].as_str().expect("text"));
    assert!(events.ends_with("data: [DONE]\n\n"), "{events}");

    // A new file at SIGHUP; the old name is gone, the new one answers.
    write(&config, &inner_url, &name, "near");
    let hangup = Command::new("kill").args(["-HUP", &outer.child.id().to_string()]).status().expect("kill runs");
    assert!(hangup.success());
    body["stream"] = false.into();
    let mut asked = |model: &str| {
        body["model"] = model.into();
        post(&chat, &body).0
    };
    until("reload", || asked("near") == 200);
    assert_eq!(asked("far"), 404);
    // Rows are written a moment after their answers; a kill within it would settle those too.
    get(&format!("{outer_url}/ashlar/responses"));

    // The gateway is killed in the middle of an answer: its next start settles it.
    let long = json!({"model": "near", "messages": [{"role": "user", "content": "Tell a very long story."}],
        "stream": true, "max_tokens": 600, "temperature": 1});
    let (began, first_byte) = std::sync::mpsc::channel();
    let client = std::thread::spawn(move || {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut answer = agent.post(&chat).send_json(&long).expect("an answer begins");
        let mut body = answer.body_mut().as_reader();
        body.read_exact(&mut [0]).expect("a byte of it");
        began.send(()).expect("the test waits");
        // It breaks off; how, is no matter.
        let _ = body.read_to_end(&mut Vec::new());
    });
    // Nothing leaves before the admission is written; a request killed before that
    // was never admitted.
    first_byte.recv_timeout(Duration::from_secs(15)).expect("the stream begins");
    outer.child.kill().expect("killed");
    outer.child.wait().expect("gone");
    client.join().expect("the client ends");
    let (_outer, outer_url, _) = served_with(&outer_home, &["--config", config.to_str().expect("UTF-8")]);
    let rows = get(&format!("{outer_url}/ashlar/responses"))["responses"].clone();
    let finishes: Vec<&str> = rows.as_array().expect("rows").iter().filter_map(|r| r["settlement"]["finish"].as_str()).collect();
    assert_eq!(finishes.len(), rows.as_array().expect("rows").len(), "all settled: {rows}");
    assert_eq!(finishes.iter().filter(|f| **f == "killed").count(), 1, "{rows}");

    // The engine's process dies: the gateway says so and lives.
    inner.child.kill().expect("killed");
    inner.child.wait().expect("gone");
    body["model"] = "near".into();
    let chat = format!("{outer_url}/v1/chat/completions");
    until("death noticed", || matches!(post(&chat, &body).0, 502 | 503));
    until("probes fail", || get(&format!("{outer_url}/health"))["backends"][0]["unhealthy"].is_string());
    let open = get(&format!("{outer_url}/ashlar/responses"))["responses"].clone();
    assert!(open.as_array().expect("rows").iter().all(|r| r["settlement"].is_object()), "all settled: {open}");
}
