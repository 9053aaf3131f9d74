//! The console: a page at `/` and the JSON and pictures it reads.
//!
//! The page is a handful of files compiled in (`asset`); it loads nothing from
//! elsewhere and its policy forbids anything inline but the picture served here.
//! Data reach the page as JSON and are set as text. One file here for each thing it
//! shows; all they do is read, but for [`release::take_back`].

mod asset;
mod lineage;
mod live;
mod release;
mod request;
mod safety;
mod usage;

use crate::{app::App, error::Failure, signin};
use ashlar_api::ApiError;
use ashlar_core::clock;
use ashlar_store::{AccountError, StoreError};
use axum::{
    Router,
    extract::State,
    http::{HeaderName, header},
    middleware,
    routing::{get, post},
};
use std::{collections::HashMap, ops::RangeInclusive, sync::Arc};

type Shared = State<Arc<App>>;

/// Sent with every answer of the server.
pub(crate) const SECURITY_HEADERS: [(HeaderName, &str); 5] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

pub(crate) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    let ledgers = Router::new()
        .route("/ashlar/canaries", get(release::canaries))
        .route("/ashlar/responses", get(request::responses))
        .route("/ashlar/requests/{id}", get(request::request))
        .route("/ashlar/cost", get(usage::cost))
        .route("/ashlar/cache", get(usage::cache))
        .route("/ashlar/safety", get(safety::safety))
        .route("/ashlar/abuse", get(safety::abuse))
        .route("/ashlar/trace/{id}", get(lineage::trace))
        .route("/ashlar/graph/{file}", get(lineage::picture))
        .route_layer(middleware::from_fn_with_state(app.clone(), signin::written));
    Router::new()
        .route("/", get(asset::page))
        .route("/icon.svg", get(asset::icon))
        .route("/console/{*name}", get(asset::file))
        .route("/ashlar/live", get(live::live))
        .route("/ashlar/series", get(live::series))
        .route("/ashlar/backends", get(live::backends))
        .route("/ashlar/releases", get(release::releases))
        .route("/ashlar/canaries/{model}/take-back", post(release::take_back))
        .merge(ledgers)
}

/// The whole number `name` of a query.
fn number(query: &HashMap<String, String>, name: &'static str, usual: i64, range: RangeInclusive<i64>) -> Result<i64, ApiError> {
    let Some(text) = query.get(name) else { return Ok(usual) };
    text.parse().ok().filter(|n| range.contains(n)).ok_or_else(|| {
        let shown: String = text.chars().take(40).collect();
        let message = format!("{name} must be {} to {}, got {shown:?}", range.start(), range.end());
        ApiError::bad_request(message, Some(name), Some("invalid_value"))
    })
}

/// The beginning of the last `days` of a query; of seven without.
fn period_ms(query: &HashMap<String, String>) -> Result<i64, ApiError> {
    Ok(clock::now_ms() - number(query, "days", 7, 1..=3650)? * 86_400_000)
}

/// Ours: the accounts' database could not be read.
fn account_failure(e: AccountError) -> Failure {
    ApiError::unavailable(format!("the accounts cannot be read: {e}")).into()
}

fn failure(e: StoreError) -> Failure {
    use ashlar_core::Hint as _;
    let hint = e.hint().map(|h| format!("; {h}")).unwrap_or_default();
    let message = format!("{e}{hint}");
    match e {
        StoreError::NotFound(_) => ApiError::not_found(message, Some("id"), Some("not_found")),
        StoreError::Ambiguous { .. } => {
            ApiError::bad_request(message, Some("id"), Some("ambiguous_id"))
        }
        _ => ApiError::internal(message),
    }
    .into()
}
