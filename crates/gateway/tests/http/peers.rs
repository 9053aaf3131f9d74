//! Programs of others against the server: the official OpenAI client and a
//! browser. Where one is absent the test says so and passes, unless
//! `ASHLAR_REQUIRE_PEERS=1`.
//!
//! `ASHLAR_PEERS_PYTHON` names a Python that has `openai` (default `python3`);
//! `ASHLAR_SCREENSHOTS` a folder in which the screenshots stay.

use crate::support::{MODEL, Server, XSS};
use std::{path::Path, process::Output};
use tokio::process::Command;

pub(crate) fn skip(what: &str) {
    let required = std::env::var("ASHLAR_REQUIRE_PEERS").is_ok_and(|v| v == "1");
    assert!(!required, "{what} is required");
    eprintln!("skipped: {what} is absent");
}

pub(crate) fn script(name: &str) -> String {
    format!("{}/../../xtask/peers/{name}", env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn shown(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_official_client_is_content() {
    let python = std::env::var("ASHLAR_PEERS_PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = Command::new(&python).args(["-c", "import openai, httpx"]).output().await;
    if !probe.is_ok_and(|o| o.status.success()) {
        return skip("a Python with openai");
    }
    let server = Server::start().await;
    let output = Command::new(&python)
        .args([&script("openai_client.py"), &format!("http://{}", server.at), MODEL, "slow"])
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_shows_itself_in_a_browser() {
    let server = Server::start().await;
    for prompt in ["When does the kiln cool down?", "refuse", XSS, "How do I book the mason's yard?"] {
        server.chat(prompt, true).await;
    }
    server.chat("die", false).await;
    let reply = server.chat(&format!("Is the kiln warm in winter? {XSS}"), false).await;
    let id = reply.header("x-ashlar-response-id").unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var("ASHLAR_SCREENSHOTS");
    let folder = folder.as_deref().map_or(temporary.path(), Path::new);
    let output = Command::new("python3")
        .arg(script("console.py"))
        .arg(format!("http://{}/?response={id}", server.at))
        .arg(folder.join("console.png"))
        .output()
        .await
        .unwrap();
    if output.status.code() == Some(3) {
        return skip("Chromium");
    }
    assert!(output.status.success(), "{}", shown(&output));
    server.stop().await;
}
