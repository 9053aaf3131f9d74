//! Keys, limits and the usage ledger on real databases.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

mod databases;
mod keys;
mod ledger;
mod limits;
mod processes;
mod properties;

use ashlar_store::{Access, Accounts, Finish, KeySettings, Limit, Request, Tokens, Used};
use std::sync::Arc;

pub const PRICES: &str = r#"
    version = "t1"
    currency = "USD"
    [[price]]
    model = "small"
    input = "1"
    cache_read = "0.1"
    output = "2"
    reasoning = "output"
    [[machine]]
    backend = "local"
    second = "0.5"
"#;

/// E.g. `limit("tokens/minute/1000")`.
pub fn limit(text: &str) -> Limit {
    let parts: Vec<&str> = text.split('/').collect();
    let currency = (parts[0] == "money").then_some("USD");
    let json = serde_json::json!({"measure": parts[0], "window": parts[1], "amount": parts[2], "currency": currency});
    serde_json::from_value(json).unwrap()
}

/// A key with limits, ready to use.
pub async fn key_with(accounts: &Accounts, limits: &[&str]) -> Arc<Access> {
    let limits = limits.iter().map(|l| limit(l)).collect();
    let settings = KeySettings { name: "k".into(), limits, ..Default::default() };
    let (_, secret) = accounts.create_key(&settings).await.unwrap();
    accounts.authenticate(secret.reveal()).unwrap()
}

/// A request of at most `input` + `output` tokens.
pub fn request(id: &str, access: &Arc<Access>, input: u64, output: u64) -> Request {
    Request {
        id: id.into(),
        access: Some(access.clone()),
        model: "small".into(),
        backend: "up".into(),
        endpoint: "/v1/chat/completions".into(),
        most: Tokens { input, output, ..Default::default() },
        ..Default::default()
    }
}

pub fn used(input: u64, output: u64) -> Used {
    Used { tokens: Tokens { input, output, ..Default::default() }, total_us: 1000, ..Used::new(Finish::Stop) }
}
