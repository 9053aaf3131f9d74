//! What goes on now: gauges, requests in flight, backends, the last minutes.

use super::{Shared, number};
use crate::{error::Failure, route::Canary, series::Series, table::Table};
use ashlar_api::ApiError;
use axum::{
    Json,
    extract::{Query, State},
};
use serde_json::{Value, json};
use std::collections::HashMap;

/// The last `minutes` as columns; see [`Series::window`].
pub(super) async fn series(
    State(app): Shared,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<Value>, Failure> {
    let windows = Series::windows();
    let minutes = number(&query, "minutes", 5, 1..=1440)?;
    if !windows.contains(&minutes) {
        let message = format!("minutes must be one of {windows:?}, got {minutes}");
        return Err(ApiError::bad_request(message, Some("minutes"), Some("invalid_value")).into());
    }
    Ok(Json(app.series.window(minutes, app.tables.now().limits.objective)))
}

/// What the engines hold, and what runs.
pub(super) async fn live(State(app): Shared) -> Json<Value> {
    let engine = app.gauges().engine;
    Json(json!({
        "limit": app.tables.now().limits.max_in_flight, "waiting": engine.waiting,
        "blocks_used": engine.blocks_used, "blocks_total": engine.blocks_total, "requests": app.live.to_json(),
    }))
}

/// The evidence of each canary.
pub(super) fn canaries(table: &Table) -> Vec<Value> {
    let shown = |(model, canary): (&str, &Canary)| {
        let mut shown = canary.to_json();
        shown["model"] = json!(model);
        shown
    };
    table.canaries().map(shown).collect()
}

/// `{backends, targets, canaries, mirrors, config}`: each backend's health, each
/// target's load, what canaries and mirrors have shown.
pub(super) async fn backends(State(app): Shared) -> Json<Value> {
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
    let mirrors = table.mirrors().map(|(model, mirror)| {
        let mut shown = mirror.to_json();
        shown["model"] = json!(model);
        shown
    });
    let file = app.tables.file();
    Json(json!({
        "mirrors": mirrors.collect::<Vec<_>>(),
        "canaries": canaries(&table),
        "backends": nodes.collect::<Vec<_>>(), "targets": targets.collect::<Vec<_>>(),
        "config": {"reloads": file.reloads, "failures": file.failures, "error": file.error},
    }))
}
