//! The console: a page at `/` and the JSON and pictures it reads.
//!
//! The page is three files compiled in; it loads nothing from elsewhere and
//! its policy forbids anything inline but the picture served here. Data reach
//! the page as JSON and are set as text.

use crate::{
    app::App,
    error::{Failure, refuse},
    graph::{self, Layout},
};
use ashlar_api::ApiError;
use ashlar_store::{ResponseRow, StoreError, Trace};
use base64::Engine as _;
use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::{HeaderName, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::{Value, json};
use std::{collections::HashMap, sync::Arc};

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

/// The picture carries its own styles and may do nothing else.
const PICTURE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'";
/// Responses listed when no limit is asked for, and at most.
const RECENT: (u64, u64) = (50, 500);
/// Largest gate statement read, in bytes.
const STATEMENT_LIMIT: u64 = 1 << 20;

pub(crate) fn routes() -> Router<Arc<App>> {
    let file = |kind: &'static str, text: &'static str| {
        get(move || async move {
            let headers = [(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")];
            (headers, text).into_response()
        })
    };
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("../console/index.html")))
        .route("/console.css", file("text/css; charset=utf-8", include_str!("../console/console.css")))
        .route("/console.js", file("text/javascript; charset=utf-8", include_str!("../console/console.js")))
        .route("/icon.svg", file("image/svg+xml", include_str!("../console/icon.svg")))
        .route("/ashlar/releases", get(releases))
        .route("/ashlar/responses", get(responses))
        .route("/ashlar/live", get(live))
        .route("/ashlar/backends", get(backends))
        .route("/ashlar/requests/{id}", get(request))
        .route("/ashlar/trace/{id}", get(trace))
        .route("/ashlar/graph/{file}", get(picture))
}

/// `{current, serving, models, releases}`; `current` is the first release that
/// is served, with its gate checks and the losses of the runs behind it.
async fn releases(State(app): Shared) -> Result<Json<Value>, Failure> {
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

async fn responses(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let limit = match query.get("limit") {
        None => RECENT.0,
        Some(text) => text.parse().ok().filter(|n| (1..=RECENT.1).contains(n)).ok_or_else(|| {
            let shown: String = text.chars().take(40).collect();
            let message = format!("limit must be 1 to {}, got {shown:?}", RECENT.1);
            ApiError::bad_request(message, Some("limit"), Some("invalid_value"))
        })?,
    };
    let rows = app.state.store.responses(limit).await.map_err(failure)?;
    Ok(Json(json!({"responses": rows})))
}

async fn live(State(app): Shared) -> Json<Value> {
    let g = app.gauges();
    let mut body = app.metrics.histograms();
    body["now_ms"] = json!(ashlar_core::clock::now_ms());
    body["running"] = json!(g.engine.running);
    body["waiting"] = json!(g.engine.waiting);
    body["blocks_used"] = json!(g.engine.blocks_used);
    body["blocks_total"] = json!(g.engine.blocks_total);
    body["requests"] = app.live.to_json();
    Json(body)
}

/// `{backends, targets, canaries, mirrors, config}`: each backend's health, each
/// target's load, what canaries and mirrors have shown.
async fn backends(State(app): Shared) -> Json<Value> {
    let (table, now) = (app.tables.now(), std::time::Instant::now());
    let nodes = table.nodes.iter().map(|n| {
        let mut health = n.health.to_json(now);
        health["name"] = json!(n.name);
        health["kind"] = json!(n.dialect);
        health
    });
    let targets = table.targets().map(|(route, t)| {
        let (ttft, itl) = t.load.times(now);
        let ms = |s: Option<f64>| s.map(|s| s * 1e3);
        json!({
            "model": route.name, "policy": route.policy, "backend": t.node.name, "upstream_model": t.model,
            "weight": t.weight, "in_flight": t.load.in_flight(), "ttft_ms": ms(ttft), "itl_ms": ms(itl),
            "usual_answer_tokens": t.load.usual_answer(),
        })
    });
    let canaries = table.canaries().map(|(model, canary)| {
        let mut shown = canary.to_json();
        shown["model"] = json!(model);
        shown
    });
    let mirrors = table.mirrors().map(|(model, mirror)| {
        let mut shown = mirror.to_json();
        shown["model"] = json!(model);
        shown
    });
    let file = app.tables.file();
    Json(json!({
        "mirrors": mirrors.collect::<Vec<_>>(),
        "canaries": canaries.collect::<Vec<_>>(),
        "backends": nodes.collect::<Vec<_>>(), "targets": targets.collect::<Vec<_>>(),
        "config": {"reloads": file.reloads, "failures": file.failures, "error": file.error},
    }))
}

/// `{response, route}`: the ledger's row, and why the request went where it went.
async fn request(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    let mut response = app.state.store.response(&id).await.map_err(failure)?;
    let route = route(&app, &id, &mut response);
    if response.is_none() && route.is_null() {
        return Err(failure(StoreError::NotFound(id)));
    }
    Ok(Json(json!({"response": response, "route": route})))
}

async fn trace(State(app): Shared, Path(id): Path<String>) -> Result<Json<Value>, Failure> {
    let (trace, mut response) = ranked(&app, &id).await?;
    let id = response.as_ref().map_or_else(String::new, |r| r.admission.id.clone());
    let route = route(&app, &id, &mut response);
    Ok(Json(json!({"trace": trace, "response": response, "route": route})))
}

/// The decision on a request: as it is while that is remembered, else as it was
/// written down.
fn route(app: &App, id: &str, response: &mut Option<ResponseRow>) -> Value {
    let written = response.as_mut().and_then(|r| r.route.take());
    app.decisions.get(id).map_or_else(|| json!(written), |decision| json!(*decision))
}

/// `{id}.svg`, with `?layout=tall` for narrow screens.
async fn picture(
    State(app): Shared,
    Path(file): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, Failure> {
    let Some(id) = file.strip_suffix(".svg") else {
        let shown: String = file.chars().take(80).collect();
        let message = format!("pictures are named ID.svg, not {shown:?}");
        return Err(refuse(404, "not_found", message).into());
    };
    let layout = match query.get("layout").map(String::as_str) {
        Some("tall") => Layout::Tall,
        _ => Layout::Wide,
    };
    let (trace, _) = ranked(&app, id).await?;
    let headers = [
        (header::CONTENT_TYPE, "image/svg+xml"),
        (header::CONTENT_SECURITY_POLICY, PICTURE_POLICY),
        (header::CACHE_CONTROL, "no-store"),
    ];
    Ok((headers, graph::svg(&trace, layout)).into_response())
}

/// The trace of `id`; for a response, documents that share text with it first.
async fn ranked(app: &Arc<App>, id: &str) -> Result<(Trace, Option<ResponseRow>), Failure> {
    let store = &app.state.store;
    let mut trace = store.trace(id).await.map_err(failure)?;
    let response = store.response(&trace.root).await.map_err(failure)?;
    if let (Some(rank), Some(row)) = (app.state.rank.clone(), response.clone()) {
        // Comparing with every document is work for a thread that may block.
        let order = tokio::task::spawn_blocking(move || rank(&row))
            .await
            .map_err(|e| ApiError::internal(format!("the overlap search died: {e}")))?;
        trace.rank_documents(&order);
    }
    Ok((trace, response))
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
