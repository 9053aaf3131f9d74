//! Releases and canaries: what is served, what is tried, and taking it back.

use super::{Shared, failure, live::canaries as canaries_of, period_ms};
use crate::{error::Failure, intake};
use ashlar_api::ApiError;
use axum::{
    Json,
    extract::{Path, Query, Request, State},
};
use base64::Engine as _;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Largest gate statement read, in bytes.
const STATEMENT_LIMIT: u64 = 1 << 20;

/// `{current, serving, models, releases}`; `current` is the first release that
/// is served, with its gate checks and the losses of the runs behind it.
pub(super) async fn releases(State(app): Shared) -> Result<Json<Value>, Failure> {
    let store = &app.state.store;
    let rows = store.releases().await.map_err(failure)?;
    let served = app.state.releases.first();
    let mut current = Value::Null;
    if let Some(row) = served.and_then(|s| rows.iter().find(|r| r.id == s.id)) {
        current = serde_json::to_value(row).map_err(|e| ApiError::internal(e.to_string()))?;
        let statement = store.path(&row.statement);
        // A statement that is gone or is no JSON leaves the page without checks.
        let statement = match statement {
            Some(path) => read_json(&path).await,
            None => None,
        };
        current["checks"] = checks(statement.as_ref());
        let trace = store.trace(&row.id).await.map_err(failure)?;
        let summaries = trace.nodes.iter().filter_map(|n| n.detail.get("summary"));
        let losses = summaries.into_iter().find_map(|s| s.get("losses")?.as_array());
        current["losses"] = json!(losses);
        current["serving"] = json!(served.map(|s| &s.model));
    }
    let models = app.models();
    Ok(Json(json!({"current": current, "models": models, "releases": rows})))
}

async fn read_json(path: &std::path::Path) -> Option<Value> {
    let size = tokio::fs::metadata(path).await.ok()?.len();
    if size > STATEMENT_LIMIT {
        return None;
    }
    serde_json::from_slice(&tokio::fs::read(path).await.ok()?).ok()
}

/// `[{name, passed, detail}]` of the gate's report, out of the statement or, when
/// it is signed, of the statement in its envelope's payload. The page shows what
/// was signed; whoever wants to rely on it runs `ashlar verify`.
fn checks(statement: Option<&Value>) -> Value {
    let payload = statement
        .and_then(|s| s.get("payload")?.as_str())
        .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let list = payload.as_ref().or(statement).and_then(|s| s.pointer("/predicate/checks")?.as_array());
    json!(list)
}

/// `{canaries, sums}`: the evidence of each canary, and of the last `days` what
/// each backend of its model answered.
pub(super) async fn canaries(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let table = app.tables.now();
    let from_ms = period_ms(&query)?;
    let models: Vec<&str> = table.canaries().map(|(model, _)| model).collect();
    if models.is_empty() {
        return Ok(Json(json!({"canaries": [], "sums": []})));
    }
    let mut sums = app.state.store.response_sums(from_ms).await.map_err(failure)?;
    sums.retain(|s| models.contains(&&*s.model));
    Ok(Json(json!({"canaries": canaries_of(&table), "sums": sums})))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TakeBack {
    /// The backend that is to be taken back, so that a page that is behind the
    /// configuration cannot take back another.
    backend: String,
}

/// Takes a model's canary back at once, as the test would.
pub(super) async fn take_back(
    State(app): Shared,
    Path(model): Path<String>,
    request: Request,
) -> Result<Json<Value>, Failure> {
    let (parts, body) = request.into_parts();
    let body = intake::read_body(&app.state.config, &parts.headers, body).await?;
    let asked: TakeBack = serde_json::from_slice(&body).map_err(|e| {
        ApiError::bad_request(format!("the body must be {{\"backend\": \"…\"}}: {e}"), Some("backend"), Some("invalid_json"))
    })?;
    let table = app.tables.now();
    let found = table.canaries().find(|(name, c)| *name == model && c.settings.backend == asked.backend);
    let Some((_, canary)) = found else {
        let (model, backend): (String, String) = (model.chars().take(80).collect(), asked.backend.chars().take(80).collect());
        let message = format!("{model:?} has no canary at {backend:?}; reload the page: the configuration may have changed");
        return Err(ApiError::not_found(message, Some("model"), Some("no_canary")).into());
    };
    let first = canary.take_back("taken back by hand in the console");
    Ok(Json(json!({"taken_back": first, "rolled_back": canary.rolled_back()})))
}
