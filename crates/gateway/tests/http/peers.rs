//! Programs of others against the server: the official OpenAI client and a
//! browser. Where one is absent the test says so and passes, unless
//! `ASHLAR_REQUIRE_PEERS=1`.
//!
//! `ASHLAR_PEERS_PYTHON` names a Python that has `openai` (default `python3`);
//! `ASHLAR_SCREENSHOTS` a folder in which the screenshots stay.

use crate::{
    demo::Demo,
    support::{MODEL, Server},
};
use ashlar_store::{AccountSettings, Accounts, KeySettings};
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

/// Runs `console.py`; false where there is no browser.
async fn console(url: String, arguments: &[String]) -> bool {
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var("ASHLAR_SCREENSHOTS");
    let folder = folder.as_deref().map_or(temporary.path(), Path::new);
    let mut command = Command::new("python3");
    command.arg(script("console.py")).arg(url).arg(folder.join("console.png")).args(arguments);
    let output = command.output().await.unwrap();
    if output.status.code() == Some(3) {
        skip("Chromium");
        return false;
    }
    assert!(output.status.success(), "{}", shown(&output));
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_shows_itself_in_a_browser() {
    let demo = Demo::start().await;
    console(format!("http://{}/?response={}", demo.server.at, demo.routed), &["--seeded".into()]).await;
    demo.server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_the_console_in_a_browser() {
    let home = tempfile::tempdir().unwrap();
    let at = home.path().join("accounts.db");
    let accounts = Accounts::open(AccountSettings::new(at.to_str().unwrap().parse().unwrap())).await.unwrap();
    let settings = KeySettings { name: "operator".into(), console: true, ..Default::default() };
    let (_, secret) = accounts.create_key(&settings).await.unwrap();
    let server = Server::of(|state| (state.accounts, state.config.require_keys) = (Some(accounts), true)).await;
    assert_eq!(server.get("/ashlar/responses").await.status, 401);
    console(format!("http://{}", server.at), &[format!("--key={}", secret.reveal())]).await;
    server.stop().await;
}
